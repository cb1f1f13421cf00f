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
