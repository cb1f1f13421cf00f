"""The viewer's page in Chromium. Without Chromium these tests are skipped."""

from collections import namedtuple

import pytest
from served import run_app, stop_servers
from waiting import until

from lit_vlm.tasks.serve import list_loopback_names
from lit_vlm.viewer.curated import CuratedList
from lit_vlm.viewer.pages import create_view_app
from lit_vlm.viewer.samples import SampleTable

pytestmark = pytest.mark.slow
Served = namedtuple("Served", "url")


def open_record(page, source):
    page.select_option("#source", source)
    until(lambda: page.locator("#rows button .where").first.inner_text().startswith(source))
    button = page.locator("#rows button").first
    button.click()
    # The row is marked when its record is shown; the record of before is there until then.
    until(lambda: button.get_attribute("aria-current") == "true")


def test_a_record_is_shown_with_tiles_boxes_and_mask(viewer, open_page):
    page = open_page(viewer)
    open_record(page, "grounding_ko")
    until(lambda: page.evaluate("[...document.querySelectorAll('.tiles img')].every((image) => image.naturalWidth)"))
    record = viewer.table.parts["training"].get_record(0)
    assert page.locator(".tiles img").count() == sum(map(len, viewer.table.processor.load_tiles(record)))
    assert page.locator(".canvas .box").count() == 1
    shown = page.locator(".run.supervised").all_inner_texts()
    assert record.messages[-1].text in "".join(shown) and record.messages[0].text.strip() not in "".join(shown)
    box, image = (page.locator(each).bounding_box() for each in (".canvas .box", ".canvas img"))
    x1 = float(record.messages[-1].text.partition("<bbox>")[2].split(",")[0])
    assert abs((box["x"] - image["x"]) / image["width"] - x1) < 2 / image["width"]


def test_filters_pages_and_bad_records_are_reached_by_keyboard_in_korean(viewer, open_page):
    page = open_page(viewer, language="ko-KR")
    assert page.locator("html").get_attribute("lang") == "ko"
    until(lambda: page.locator("#count").inner_text() == "642개")  # the first page of rows has come
    page.focus("#next")
    page.keyboard.press("Enter")
    until(lambda: page.locator("#range").inner_text() == "51~100")
    page.focus("#max-tokens")
    page.keyboard.type("1")
    page.keyboard.press("Tab")
    until(lambda: page.locator("#count").inner_text() == "0개")
    page.select_option("#fault", "missing")
    until(lambda: "none.png" in page.locator("#rows").inner_text())


def test_a_record_is_left_out_by_a_button_that_shows_the_setting(viewer, open_page):
    page = open_page(viewer)
    open_record(page, "mine")
    page.focus("#flag")
    page.keyboard.press("Enter")
    until(lambda: "data.sources.mine.selection=" in page.locator("#settings").inner_text())
    assert page.locator("#flag").get_attribute("aria-pressed") == "true"
    assert page.locator("#rows button").first.inner_text().endswith("left out")
    page.check("#flagged")
    until(lambda: page.locator("#count").inner_text() == "1 found")
    page.uncheck("#flagged")
    open_record(page, "text_ko")  # no selection applies to it here
    assert page.locator("#flag-line").is_hidden()


def test_markup_of_a_record_stays_text_and_a_pair_has_two_answers(viewer, open_page):
    page = open_page(viewer)
    open_record(page, "mine")
    assert "<script>x</script> <gro>" in page.locator(".tokens").inner_text()
    assert page.locator("#content :is(script, b)").count() == 0
    open_record(page, "preference_en")
    until(lambda: page.locator("#content h3").count() == 2)
    assert page.locator("#content h3").first.inner_text().startswith("Chosen answer")


def test_the_viewer_has_no_accessibility_error_on_a_desktop_and_a_phone(viewer, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for scheme, width in (("light", 1280), ("dark", 390)):
        settings = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "bypass_csp": True}
        page = open_page(viewer, **settings)
        open_record(page, "ocr_ko")
        violations = axe.run(page).response["violations"]
        found = [(each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"]) for each in violations]
        assert found == [], (scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_opens_in_the_language_that_is_set_until_a_person_chooses_another(table, open_page):
    running = []
    app = create_view_app(table, "tiny/2_sft", None, list_loopback_names("127.0.0.1"), language="ko")
    page = open_page(Served(run_app(app, [], running).url + "/"), language="en-US")
    assert page.locator("html").get_attribute("lang") == "ko" and page.locator("#next").inner_text() == "다음"
    page.click("#language")
    page.reload()
    until(lambda: page.locator("#next").inner_text() == "Next")
    assert page.locator("html").get_attribute("lang") == "en"
    stop_servers(running)


def test_records_of_a_curated_list_are_chosen_and_explained(table, open_page):
    running = []
    line = {"source": "mine", "position": 1, "evidence": "same_pixels", "same_as": {"origin": "mine.json[0]"}}
    shown = SampleTable(table.parts, table.processor, table.flags, {"duplicates": CuratedList.from_lines([line])})
    app = create_view_app(shown, "tiny/2_sft", None, list_loopback_names("127.0.0.1"))
    page = open_page(Served(run_app(app, [], running).url + "/"))
    page.select_option("#curated", "duplicates")
    until(lambda: page.locator("#count").inner_text() == "1 found")
    page.locator("#rows button").first.click()
    page.wait_for_selector("#found li")
    assert page.locator("#found").inner_text() == "duplicates: evidence same pixels, same as mine.json[0]"
    stop_servers(running)
