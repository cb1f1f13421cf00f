"""Slices of benchmarks while a stage trains, with lmms-eval's recorded prompts and rule in its place."""

import sys
from pathlib import Path

import pytest
from run_helpers import TINY

ROOT = Path(__file__).resolve().parents[2]

from made_benchmarks import make_rows, write_parquet

from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.parse import parse
from lit_vlm.evaluation.evaluation_summary import read_scores
from lit_vlm.evaluation.harness_environment import MARKER, compute_pins_digest
from lit_vlm.files import read_csv_rows, read_json, read_json_lines
from lit_vlm.tasks.evaluate import evaluate
from lit_vlm.tasks.train import train
from lit_vlm.types import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with made rows and an environment whose Python is the recorded harness."""
    place = tmp_path_factory.mktemp("slices")
    tasks = place / "lmms_eval" / "lib/python3/site-packages/lmms_eval/tasks"
    tasks.mkdir(parents=True)
    write_parquet(make_rows("k_dtcbench", 24), place / "files" / "k_dtcbench" / "test.parquet")
    (tasks / "dtcbench.yaml").write_text("task: dtcbench\n")
    (place / "lmms_eval" / MARKER).write_text(compute_pins_digest())
    python = place / "lmms_eval" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests/evaluation/recorded_harness.py"}" "$@"\n')
    python.chmod(0o755)
    return place


def make_overrides(place, *more):
    settings = [f"evaluate.files={place / 'files'}", f"evaluate.environment={place / 'lmms_eval'}"]
    return [*settings, "evaluate.max_new_tokens=6", f"run_dir={place / 'runs'}", *more]


def run_training(place, name, *more):
    asked = [
        "benchmarks=[k_dtcbench]",
        "evaluate.training_rows=6",
        "evaluate.every_steps=2",
        "evaluate.training_items=0",
    ]
    own = ["stage=sft", "data=builtin_sft", "callbacks=[throughput]"]
    train(parse([*TINY, *own, *asked, *make_overrides(place, f"run_name={name}", *more)]))
    return place / "runs" / name


@pytest.fixture(scope="module")
def trained(place):
    best = ["checkpoint.keep_best=true", "checkpoint.best_metric=benchmark/k_dtcbench"]
    return run_training(place, "first", *best)


@pytest.mark.slow
def test_the_answers_and_the_score_of_the_last_step_are_those_of_task_evaluate_on_the_exported_model(place, trained):
    evaluate(
        parse(
            [
                "task=evaluate",
                "benchmarks=[k_dtcbench]",
                "evaluate.limit=6",
                "trainer=tiny",
                *make_overrides(place, f"init_from={trained / 'hf'}", "run_name=evaluated"),
            ]
        )
    )
    rows = read_json_lines(place / "runs" / "evaluated" / "samples" / "k_dtcbench.jsonl")
    answers = [row["text"] for row in read_json_lines(trained / "benchmarks" / "step-00000003.jsonl")]
    assert sorted(answers) == sorted(row["answer"] for row in rows) and len(answers) == 6 and any(answers)
    score = read_scores(place / "runs" / "evaluated")["k_dtcbench"].score
    last = read_json(trained / "manifest.json", "")["figures"]["benchmark"]["last"]
    assert last == {"benchmark/k_dtcbench": pytest.approx(score)}


@pytest.mark.slow
def test_scores_are_logged_at_their_steps_with_their_share_of_the_time(trained):
    rows = [row for row in read_csv_rows(trained / "metrics.csv") if row["benchmark/k_dtcbench"]]
    assert [int(row["step"]) for row in rows] == [1, 2]  # rows count from 0; the last step has scores too
    figures = read_json(trained / "manifest.json", "")["figures"]["benchmark"]
    assert figures["count"] == 2 and 0 < figures["time_share"] < 1
    assert "Benchmark k_dtcbench" in (trained / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_harness_asks_its_questions_once_for_all_runs_and_training_goes_on_when_it_fails(
    place, trained, monkeypatch, capsys
):
    monkeypatch.setenv("HARNESS_FAULT", "crash")  # collecting would end the run
    folder = run_training(place, "second")
    output = " ".join(capsys.readouterr().out.split())
    assert "Collecting" not in output and "no scores of benchmarks, training continues" in output
    assert "a column of the wrong type" in output
    assert len(read_json_lines(folder / "benchmarks" / "step-00000002.jsonl")) == 6
    assert (folder / "hf").is_dir() and not any(
        "benchmark/k" in key for key in read_csv_rows(folder / "metrics.csv")[0]
    )


def test_a_benchmark_whose_file_is_missing_ends_the_run_before_it_trains(place):
    with pytest.raises(UserError, match=r"pope: no file ending in .* Get it from"):
        run_training(place, "third", "benchmarks=[pope]")
    assert not (place / "runs" / "third" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmarks=[koffvqa]", "evaluate.every_steps=2"], "koffvqa is scored by a judge"),
        (["benchmarks=[k_dtc]", "evaluate.every_steps=2"], "Did you mean k_dtcbench?"),
        (["benchmarks=[mmmu_val]", "evaluate.every_steps=2"], "there is no mmmu_val"),
        (["benchmarks=[pope,pope]", "evaluate.every_steps=2"], "pope is named 2 times"),
        (["benchmarks=[pope]"], "with evaluate.every_steps=<steps> while a stage trains"),
        (["logger.metric=benchmark/pope", "evaluate.every_steps=2"], "Name it in benchmarks"),
        (["checkpoint.best_metric=benchmark/pope"], "Set evaluate.every_steps"),
        (["logger.metric=exam/mean", "evaluate.every_steps=2", "evaluate.training_items=0"], "leaves the exam out"),
        (["task=chat", "benchmarks=[pope]"], "is read with task=evaluate only"),
    ],
)
def test_benchmarks_that_no_stage_can_be_scored_on_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=".*") as caught:
        parse(["experiment=tiny/1_align", *overrides])
    assert message in str(caught.value)
