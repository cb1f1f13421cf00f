"""The report's questions on which a stage changed its mind."""

from dataclasses import replace

from lit_vlm.evaluation.exam import ExamAnswers, find_item, get_identity, make_items, score_answer
from lit_vlm.reports.changed_answers import MAX_CARDS, collect_changed_answers
from lit_vlm.reports.report import write_report


def make_answers(tmp_path, items, answer):
    rows = [score_answer(item, answer(item)) for item in items]
    return ExamAnswers(tmp_path / "exam.jsonl", get_identity(), "weights", rows)


def get_reference(item):
    return item.sample.messages[-1].text.strip()


def test_better_and_worse_answers_of_each_stage_are_shown_with_their_pictures(tmp_path):
    items = [item for item in make_items(1) if not item.hard]
    wrong = make_answers(tmp_path, items, lambda item: "<b>?</b>")
    right = make_answers(tmp_path, items, get_reference)
    first, second = collect_changed_answers([("align", wrong), ("sft", right), ("dpo", wrong)])
    assert (first["title"], second["title"]) == ("sft", "dpo")
    assert len(first["better"]) == len(second["worse"]) == MAX_CARDS and not first["worse"] and not second["better"]
    assert len({card["kind"] for card in first["better"]}) == MAX_CARDS
    assert {card["language"] for card in first["better"]} == {"ko", "en"}
    for card in first["better"]:
        before, after = card["answers"]
        assert before["answer"] == "<b>?</b>" and after["answer"] == card["reference"] and after["score"] == 1.0
        assert card["pictures"] and all(picture.startswith("data:image/png;base64,") for picture in card["pictures"])
    assert collect_changed_answers([("sft", right), ("dpo", right)]) == collect_changed_answers([("sft", right)]) == []


def test_an_item_that_this_version_makes_otherwise_is_left_out(tmp_path):
    items = make_items(1)[:8]
    rows = [score_answer(item, get_reference(item)) for item in items]
    assert [find_item(row) for row in rows] == list(items)
    assert find_item(rows[0] | {"content": "0" * 16}) is find_item(rows[0] | {"number": 10**6}) is None
    changed = [[row | {"content": "0" * 16, "score": score} for row in rows] for score in (0.0, 1.0)]
    exams = [ExamAnswers(tmp_path, get_identity(), "w", each) for each in changed]
    assert collect_changed_answers([("align", exams[0]), ("sft", exams[1])]) == []


def test_markup_of_an_answer_is_escaped_on_the_page(tmp_path, monkeypatch):
    items = make_items(1)
    right, wrong = (make_answers(tmp_path, items, answer) for answer in (get_reference, lambda item: "<b>?</b>"))
    exams = [("sft", right), ("dpo", replace(wrong, weights="other"))]
    monkeypatch.setattr("lit_vlm.reports.report.list_exams", lambda runs: exams)
    write_report(tmp_path / "report.html", [tmp_path / "a", tmp_path / "b"], "tiny")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Where a stage changed its mind" in page and "dpo: worse" in page
    assert "<b>?</b>" not in page and "&lt;b&gt;?&lt;/b&gt;" in page
