"""The committed verdicts of lmms-eval and VLMEvalKit, and the page that shows them. `make test-outside` makes the verdicts anew."""

import json
from pathlib import Path

import made_benchmarks
import pytest

from benchmarks.harness_answers import FORMS, MAKERS, make_answers
from benchmarks.harnesses import (
    HARNESSES,
    RESULTS,
    ROTATION,
    compute_score,
    list_differences,
    make_item,
    make_table,
    read_items,
    read_sets,
    run_worker,
    summarize,
)
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.evaluation.task_pack.choice_letters import read_choice_letter
from lit_vlm.types import UserError

COMPARED = json.loads(RESULTS.read_text(encoding="utf-8"))
PAGE = (Path(__file__).resolve().parents[2] / "docs/evaluation_harnesses.md").read_text(encoding="utf-8")
ITEMS = {name: [make_item(name, row) for row in make_answers(name)] for name in MAKERS}


def test_the_page_has_the_table_of_the_committed_verdicts():
    assert f"<!-- table of benchmarks/results/harnesses.json -->\n{make_table(COMPARED)}\n" in PAGE
    assert "```\n" + "\n".join(summarize(COMPARED)) + "\n```" in PAGE


def test_the_committed_verdicts_are_of_the_answers_that_are_made():
    for name, rows in COMPARED["sets"].items():
        made = [(item["index"], item["answer"], item["prediction"]) for item in ITEMS[name]]
        assert made == [(row["index"], row["right"], row["answer"]) for row in rows], name
    assert COMPARED["sets"].keys() == MAKERS.keys()


@pytest.mark.parametrize("name", ["k_dtcbench", "k_seed"])
def test_lmms_eval_compares_the_first_character_of_an_answer(name):
    for row in COMPARED["sets"][name]:
        first = row["answer"].strip()[:1]
        assert row["lmms_eval"] == {"letter": first, "hit": first.lower() == row["right"].lower()}, row


def test_the_verdict_of_k_mmbench_is_that_of_all_rotations():
    rows = COMPARED["sets"]["k_mmbench"]
    for group in {row["index"] % ROTATION for row in rows}:
        of_group = [row for row in rows if row["index"] % ROTATION == group]
        for harness in HARNESSES:
            assert len({row[harness]["hit"] for row in of_group}) == 1 and len(of_group) == 4
            read_all = all(row[harness]["letter"] == row["right"] for row in of_group)
            assert of_group[0][harness]["hit"] == read_all


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_reader_of_the_task_pack_reads_what_a_person_reads(form):
    for name in MAKERS:
        for row in make_answers(name):
            if row["form"] == form.name:
                item = make_item(name, row)
                assert (read_choice_letter(item["prediction"], item["options"]) == item["answer"]) == form.is_right, row


def test_differences_are_listed_with_the_letters_that_were_read():
    lines = list_differences(COMPARED, limit=3)
    assert lines[0] == "K-DTCBench 2: 'a', right A, read lmms_eval 'a', vlmevalkit 'nothing'"
    assert lines[3].endswith(" more") and len(lines) == 4


def test_own_answers_are_read_from_lines_of_published_rows(tmp_path):
    for name in MAKERS:
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in make_answers(name)]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        assert read_items(path) == ITEMS[name]


def test_answers_of_an_evaluation_are_read_with_the_published_files(tmp_path):
    run, files = tmp_path / "run", tmp_path / "files"
    for name in MAKERS:
        rows = made_benchmarks.make_rows(name, 8)
        made_benchmarks.write_parquet(rows, files / name / f"{BENCHMARKS[name].split}.parquet")
        (run / "samples").mkdir(parents=True, exist_ok=True)
        samples = [
            {"id": number, "question": "?", "answer": f"정답은 {rows[number]['answer']}"} for number in (0, 1, 5)
        ]
        (run / f"samples/{name}.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n", encoding="utf-8")
    sets = read_sets(run, files)
    for name, items in sets.items():
        rows = made_benchmarks.make_rows(name, 8)
        assert [item["answer"] for item in items] == [rows[number]["answer"] for number in (0, 1, 5)]
        assert all(item["prediction"] == f"정답은 {item['answer']}" and len(item["options"]) == 4 for item in items)
    assert sets.keys() == MAKERS.keys()
    with pytest.raises(UserError, match="with --files"):
        read_sets(run, None)
    (run / "samples/k_seed.jsonl").write_text(json.dumps({"id": 8, "answer": "A"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="has an answer to row 8, but .* has 8 rows"):
        read_sets(run, files)


@pytest.mark.parametrize("name", ["k_dtcbench", "k_seed", "k_mmstar"])
def test_rows_in_the_layout_of_vlmevalkit_are_the_same_items(name):
    for row, item in zip(make_answers(name), ITEMS[name], strict=True):
        other = {"index": item["index"], "question": item["question"], **item["options"], "answer": item["answer"]}
        found = make_item(name, other | {"category": item["category"], "prediction": row["prediction"]})
        assert {key: found[key] for key in item if key != "row"} == {key: item[key] for key in item if key != "row"}
        assert found["row"]["question_id"] == str(item["index"]) and found["row"]["data_type"] == "image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": ...}, "k_dtcbench.jsonl:1: no row of K-DTCBench with an answer: no 'prediction'"),
        ({"choice_b": ...}, "no 'choice_b'"),
        ({"answer": "E"}, "the right answer 'E' is none of A, B, C, D"),
        ({"index": "x"}, "invalid literal"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, change, message):
    row = {key: value for key, value in (make_answers("k_dtcbench")[0] | change).items() if value is not ...}
    path = tmp_path / "k_dtcbench.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_items(path)
    assert message in str(caught.value)


def test_a_repeated_index_an_empty_file_and_a_missing_environment_are_named(tmp_path):
    path = tmp_path / "k_dtcbench.jsonl"
    row = json.dumps(make_answers("k_dtcbench")[0])
    path.write_text(f"{row}\n{row}\n", encoding="utf-8")
    with pytest.raises(UserError, match="index 0 is there more than once"):
        read_items(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no rows"):
        read_items(path)
    with pytest.raises(UserError, match="make test-outside"):
        run_worker("vlmevalkit", ITEMS, tmp_path / "python")


def test_a_score_counts_each_question_of_k_mmbench_once():
    judged = [
        ({"index": index}, {"hit": hit})
        for index, hit in ((0, True), (ROTATION, True), (1, False), (ROTATION + 1, False))
    ]
    assert compute_score("k_mmbench", judged) == 0.5
