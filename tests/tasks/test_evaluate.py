"""task=evaluate from the command to the scores, with lmms-eval's recorded output in its place (tests/evaluation/recorded_harness.py)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "evaluation"))

from made_benchmarks import make_rows, write_parquet
from scripted_endpoint import ScriptedModel
from waiting import PATIENCE, until

from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.parse import parse
from lit_vlm.evaluation.evaluation_summary import read_scores
from lit_vlm.evaluation.harness_environment import MARKER, compute_pins_digest
from lit_vlm.files import read_json_lines
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.tasks.evaluate import evaluate
from lit_vlm.types import UserError

RECORDED = json.loads((ROOT / "tests/evaluation/lmms_eval_runs.json").read_text(encoding="utf-8"))["runs"]["k_dtcbench"]
SCORE = 100 * RECORDED["results"]["lit_vlm_k_dtcbench"]["dtcbench_acc,none"]
NUM_ROWS = len(RECORDED["samples"])
datasets.disable_progress_bars()


@pytest.fixture
def place(tmp_path):
    """A folder with made rows and an environment whose Python is the recorded harness."""
    write_parquet(make_rows("k_dtcbench", NUM_ROWS), tmp_path / "files" / "k_dtcbench" / "test.parquet")
    environment = tmp_path / "lmms_eval"
    task = environment / "lib/python3/site-packages/lmms_eval/tasks/dtcbench/dtcbench.yaml"
    task.parent.mkdir(parents=True)
    task.write_text("task: dtcbench\n")
    (environment / MARKER).write_text(compute_pins_digest())
    python = environment / "bin" / "python"
    python.parent.mkdir()
    harness = ROOT / "tests/evaluation/recorded_harness.py"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{harness}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def make_arguments(place, url, *more):
    arguments = ["task=evaluate", f"init_from={url}", "benchmarks=[k_dtcbench]", f"evaluate.files={place / 'files'}"]
    return [*arguments, f"evaluate.environment={place / 'lmms_eval'}", f"run_dir={place}", "run_name=made", *more]


def run_evaluate(place, url, *more):
    evaluate(parse(make_arguments(place, url, *more)))
    return read_scores(place / "made")


def test_a_benchmark_is_scored_shown_and_not_asked_again(place, capsys):
    model = ScriptedModel()
    with model.run() as url:
        score = run_evaluate(place, url)["k_dtcbench"]
        assert model.num_asked == NUM_ROWS
        assert run_evaluate(place, url)["k_dtcbench"] == score and model.num_asked == NUM_ROWS
    assert score.score == pytest.approx(SCORE) and (score.num_samples, score.judge) == (NUM_ROWS, None)
    assert score.prompt.startswith(RECORDED["samples"][0]["input"]) and score.seconds > score.model_seconds > 0
    shown = capsys.readouterr().out
    assert "24 of 24 requests answered" in shown and "84.58" in shown and "scored already" in shown
    assert f"{NUM_ROWS} rows, and the published set has 240" in shown
    page = (place / "made" / "evaluation.md").read_text(encoding="utf-8")
    assert "| VARCO-VISION-14B | 84.58 | VARCO-VISION (NCSOFT, 2024), table 1 |" in page and "No judge." in page
    samples = read_json_lines(place / "made" / "samples" / "k_dtcbench.jsonl")
    assert [row["answer"] for row in samples] == [row["filtered_resps"] for row in RECORDED["samples"]]
    assert not (place / "made" / "rows").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_only_the_requests_without_an_answer_are_asked(place, end):
    model = ScriptedModel()
    with model.run() as url:
        model.fail = lambda number: model.gate.clear() if number == 9 else None  # all wait from the ninth on
        command = [sys.executable, str(ROOT / "run.py"), *make_arguments(place, url, "evaluate.num_concurrent=1")]
        output = place / "out.txt"
        with output.open("w") as stream:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=place, env=environment)
        log = place / "made" / "answers"
        until(lambda: model.num_asked >= 10 or process.poll() is not None, said=output.read_text)
        until(lambda: len(read_json_lines(next(log.glob("*.jsonl")))) == 9, said=output.read_text)
        process.send_signal(end)
        process.wait(PATIENCE)
        if end == signal.SIGINT:
            assert process.returncode == 130 and "9 of 24 requests answered. They are kept" in output.read_text()
        model.fail = lambda number: None
        model.gate.set()
        asked = model.num_asked
        score = run_evaluate(place, url)["k_dtcbench"]
    assert score.score == pytest.approx(SCORE)
    assert model.num_asked - asked == score.num_asked == NUM_ROWS - 9


def test_an_endpoint_that_dies_ends_the_run_by_message_and_its_answers_are_kept(place):
    model = ScriptedModel(fail=lambda number: 504 if number > 5 else None)
    with model.run() as url:
        with pytest.raises(UserError, match=r"5 of 24 requests answered, then the endpoint no longer answered"):
            run_evaluate(place, url, "evaluate.num_concurrent=1")
        assert read_scores(place / "made") == {}
        model.fail, asked = lambda number: None, model.num_asked
        assert run_evaluate(place, url)["k_dtcbench"].score == pytest.approx(SCORE)
        assert model.num_asked - asked == NUM_ROWS - 5


def test_a_request_without_an_answer_is_never_scored_as_an_empty_one(place):
    model = ScriptedModel(fail=lambda number: 400 if number == 3 else None)
    with model.run() as url:
        with pytest.raises(
            UserError, match=r"(?s)1 request of 24 had no answer, so there is no score.*the model is too small"
        ):
            run_evaluate(place, url)
        assert read_scores(place / "made") == {}
        model.fail, asked = lambda number: 400, model.num_asked
        score = run_evaluate(place, url, "evaluate.leave_out=true")["k_dtcbench"]
        assert model.num_asked - asked == 1
    assert score.num_samples == NUM_ROWS - 1 and score.left_out == {"requests without an answer": 1}


def test_rows_that_cannot_be_read_end_the_run_before_the_environment_is_looked_at(place):
    rows = make_rows("k_dtcbench", NUM_ROWS)
    path = place / "files" / "k_dtcbench" / "test.parquet"
    write_parquet(rows, path)
    data = path.read_bytes()
    image = data.index(b"IDAT")
    path.write_bytes(data[: image + 6] + bytes(4) + data[image + 10 :])
    model = ScriptedModel()
    with model.run() as url:
        with pytest.raises(UserError, match=r"1 row cannot be used:\n  test\.parquet\[\d+\]: its image"):
            run_evaluate(place, url, f"evaluate.environment={place / 'nowhere'}")
        assert model.num_asked == 0 and not (place / "nowhere").exists()
        score = run_evaluate(place, url, "evaluate.leave_out=true")["k_dtcbench"]
    assert score.num_samples == NUM_ROWS - 1 and score.left_out == {"rows that cannot be read": 1}


def test_an_error_of_the_harness_is_shown(place, monkeypatch):
    monkeypatch.setenv("HARNESS_FAULT", "crash")
    with ScriptedModel().run() as url, pytest.raises(UserError, match="ValueError: a column of the wrong type"):
        run_evaluate(place, url)


@pytest.mark.slow
def test_limit_scores_the_first_questions_and_other_models_and_overwrite_ask_again(place):
    model = ScriptedModel()
    with model.run() as url:
        score = run_evaluate(place, url, "evaluate.limit=6")["k_dtcbench"]
        assert (score.num_samples, model.num_asked) == (6, 6)
        run_evaluate(place, url, "evaluate.limit=8")
        assert model.num_asked == 8
        run_evaluate(place, url, "evaluate.limit=8", "evaluate.model_name=another")
        assert model.num_asked == 16
        run_evaluate(place, url, "evaluate.limit=8", "overwrite=true")
        assert model.num_asked == 24


def test_a_checkpoint_is_served_and_scored(place, blueprint):
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, place / "run" / "hf")
    score = run_evaluate(place, f"{place}/run/hf", "evaluate.limit=3", "evaluate.max_new_tokens=2")["k_dtcbench"]
    assert (score.num_samples, score.num_asked, score.max_new_tokens) == (3, 3, 2)
    (log,) = (place / "made" / "answers").glob("*.jsonl")
    assert all(1 <= row["usage"]["completion_tokens"] <= 2 for row in read_json_lines(log))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmarks=[k_dtcbanch]"], "there is no k_dtcbanch.*Did you mean k_dtcbench"),
        (["benchmarks=[k_dtcbench,k_dtcbench]"], "k_dtcbench is named 2 times"),
        (["benchmarks=[]"], "benchmarks is not set"),
        (["benchmarks=[k_llava_w]"], "k_llava_w: scored by a judge. Set judge.endpoint"),
        (["judge.endpoint=http://127.0.0.1:9/v1"], "judge.model is not set"),
        (["evaluate.num_concurrent=400"], "serve.max_waiting=256"),
        (["init_from=http://user:word@host/v1"], "is no URL of an endpoint|secret|password"),
        (["init_from=ftp://host/v1"], "is no URL of an endpoint"),
        (["init_from=owner/model", "evaluate.model_name=a"], "evaluate.model_name: is read with an endpoint only"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message):
    given = ["task=evaluate", "init_from=http://127.0.0.1:9/v1", "benchmarks=[k_dtcbench]", *arguments]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse(given)


def test_benchmarks_without_task_evaluate_are_an_error():
    with pytest.raises(ConfigError, match="benchmarks: is read with task=evaluate, or with evaluate.every_steps"):
        parse(["experiment=tiny/2_sft", "benchmarks=[k_dtcbench]"])


def test_an_endpoint_that_cannot_be_used_is_named(place, monkeypatch):
    with pytest.raises(UserError, match="cannot be reached"):
        run_evaluate(place, "http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        run_evaluate(place, "http://127.0.0.1:1/v1", "evaluate.files=nowhere")
    with ScriptedModel().run() as url:
        with pytest.raises(UserError, match=r"answered 404 to /models.*evaluate\.key_variable"):
            run_evaluate(place, f"{url}/v2")
        monkeypatch.delenv("MY_KEY", raising=False)
        with pytest.raises(UserError, match="evaluate.key_variable=MY_KEY: this environment variable is not set"):
            run_evaluate(place, url, "evaluate.key_variable=MY_KEY")


def test_the_folder_of_an_evaluation_has_the_name_of_the_model(tmp_path):
    (tmp_path / "runs/tiny/2_sft/hf").mkdir(parents=True)
    (tmp_path / "other/model").mkdir(parents=True)

    def get_name(init_from, *more):
        return parse(
            ["task=evaluate", f"init_from={init_from}", "benchmarks=[pope]", f"run_dir={tmp_path}/runs", *more]
        ).name

    assert get_name(f"{tmp_path}/runs/tiny/2_sft/hf") == "evaluate/tiny/2_sft"
    assert get_name(f"{tmp_path}/other/model").startswith("evaluate/model-")
    assert get_name("http://127.0.0.1:8000/v1") == "evaluate/127.0.0.1-8000-v1"
    assert get_name("llava-hf/ov", "run_name=mine") == "mine"
