"""Debian's Chromium without a window, and pages in it."""

import shutil
from contextlib import contextmanager

import pytest
from waiting import PATIENCE

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium without a window. `make setup-dev` brings Playwright, apt the browser."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium fonts-noto-cjk")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: make setup-dev")
    with contextmanager(_launch)(playwright, program) as found:
        yield found


def _launch(playwright, program):
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens the page of a demo; the page has no error at the end."""
    contexts, errors = [], []

    def start(demo, language="en-US", **settings):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}, "locale": language} | settings))
        context.set_default_timeout(PATIENCE * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(demo.url)
        page.wait_for_selector("#main:not([hidden]), #gate:not([hidden])")
        return page

    yield start
    for context in contexts:
        context.close()
    assert errors == []


def find_page_faults(browser, path) -> list[str]:
    """Find what a page of one file lacks on a phone, in the dark, on paper and for screen readers; [] for none.

    Nothing may be wider than a phone or a sheet, load anything, or have no name; paper is white with dark text.
    """
    faults, requests = [], []
    for name, width, settings in (("phone", 390, {"color_scheme": "dark"}), ("paper", 700, {"color_scheme": "dark"})):
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **settings)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.emulate_media(media="print" if name == "paper" else "screen", color_scheme="dark")
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        found = page.evaluate(MEASURE_PAGE)
        if found["width"] > width:
            faults.append(f"{name}: {found['width']} pixels wide instead of {width}")
        faults += [f"{name}: {each}" for each in [*found["nameless"], *(found["paper"] if name == "paper" else [])]]
        context.close()
    return faults + [f"loads {url[:80]}" for url in requests if not url.startswith(("file:", "data:"))]


MEASURE_PAGE = """() => {
  const all = [...document.querySelectorAll("main *")].map((each) => [each, getComputedStyle(each)]);
  const level = (color) => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
  const list = (what, test) => all.filter(test).map(([each]) => `${what}: ${each.outerHTML.slice(0, 80)}`);
  const isNamed = (each) => each.getAttribute("aria-label") || each.getAttribute("alt");
  const isCut = (each, style) => style.overflowX !== "visible" || each.scrollWidth > each.clientWidth + 1;
  return {
    width: document.documentElement.scrollWidth,
    nameless: list("no name", ([each]) => each.matches("img, svg, [role=img]") && !isNamed(each)),
    paper: [
      ...(level(getComputedStyle(document.body).backgroundColor) < 250 ? ["the page is not white"] : []),
      ...list("sticks", ([, style]) => style.position === "sticky" || style.position === "fixed"),
      ...list("pale", ([each, style]) => each.matches("td, th, p, h1, h2, dd") && level(style.color) > 130),
      ...list("cut", ([each, style]) => each.matches(".scroll, .rendered, pre") && isCut(each, style)),
    ],
  };
}"""
