"""The pages in Chromium: they fit a phone and a sheet of paper, and load nothing. Without Chromium these tests are skipped."""

import pytest
from browsing import browser, find_page_faults  # noqa: F401
from support import picture
from test_preflight_page import datamodule, facts  # noqa: F401
from test_profile_page import FP32, TraceWriter
from test_report import folder, render_page  # noqa: F401

from lit_vlm.curation.mixture import ResultTable, ScoreDistribution
from lit_vlm.messages import set_language
from lit_vlm.reports.curation import CurationExample, CurationPage, SourceCounts, show_record, write_curation_page
from lit_vlm.reports.preflight.facts import Finding, Severity
from lit_vlm.reports.preflight.report import write_preflight_page
from lit_vlm.reports.profile.page import write_profile_page

pytestmark = pytest.mark.slow
COMMAND = (
    "python run.py experiment=tiny/2_sft data=llava_json data.sources.mine.path=/a/long/folder/of/mine/records.json"
)


@pytest.fixture(params=["en", "ko"])
def language(request):
    set_language(request.param)


def test_the_report_fits_phone_and_paper(language, folder, browser):  # noqa: F811
    render_page(folder)
    assert find_page_faults(browser, folder.parent / "deep" / "report.html") == []


def test_the_preflight_page_fits_phone_and_paper(language, facts, tmp_path, browser):  # noqa: F811
    facts.command, facts.findings = COMMAND, [Finding(Severity.failure, f"A problem of {'x' * 90}.", "Do this.")]
    assert find_page_faults(browser, write_preflight_page(tmp_path, facts)) == []


def test_the_profile_page_fits_phone_and_paper(language, tmp_path, browser):  # noqa: F811
    trace = TraceWriter()
    trace.add_step(0)
    trace.add_matmul(33, 36, [[2], [8, 4], [4, 2]], FP32, "aten::addmm")
    write_profile_page(tmp_path / "profile.html", trace.summarize(tmp_path, command=COMMAND))
    assert find_page_faults(browser, tmp_path / "profile.html") == []


def test_the_curation_page_fits_phone_and_paper(language, tmp_path, browser):  # noqa: F811
    record = show_record("left out", "mine.json[3]", "user: What?\nassistant: A dog.", [picture(90, 150)])
    example = CurationExample("same picture, similarity of the turns 0.93", (record, record))
    page = CurationPage(
        "Curation: duplicates",
        [SourceCounts("mine_with_a_long_name", 1_200_000, 3, 0, 40)],
        [("records that share a picture and stay", 12)],
        [example],
        [example],
        [("method", "duplicates"), ("min_similarity", "0.8")],
        command=COMMAND,
        tables=[
            ResultTable("Groups", ("group", "records", "asked", "kept"), [("document/ko", "1,200,000", "20.0%", "40")])
        ],
        scores=[ScoreDistribution("cosine of picture and text", {"ko": [0.1, 0.31], "en": [0.2, 0.25]}, 0.24)],
    )
    write_curation_page(tmp_path / "page.html", page)
    assert find_page_faults(browser, tmp_path / "page.html") == []
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<code>{COMMAND}</code>" in text
