"""lmms-eval itself scores made rows of each benchmark through task=evaluate. `make test-outside` runs this."""

import json
import re
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from harness_runs import LMMS_EVAL
from made_benchmarks import make_rows, write_parquet

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/evaluation"))

from record_lmms_eval import NUM_ROWS, record
from scripted_endpoint import ScriptedModel

from lit_vlm.config.parse import parse
from lit_vlm.evaluation.benchmarks import BENCHMARKS, list_harness_tasks
from lit_vlm.evaluation.evaluation_summary import read_scores
from lit_vlm.evaluation.harness_environment import is_current
from lit_vlm.files import read_json_lines
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.serving.recording_endpoint import run_in_thread
from lit_vlm.tasks.evaluate import evaluate

ENVIRONMENT = LMMS_EVAL.parents[1]
COMMITTED = ROOT / "tests/evaluation/lmms_eval_runs.json"
pytestmark = [
    pytest.mark.outside,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not is_current(ENVIRONMENT), reason=f"no lmms-eval in {ENVIRONMENT}; make test-outside puts it there"
    ),
]


def run_evaluate(place, init_from, names, *more):
    for name in names:
        write_parquet(make_rows(name, 8), place / "files" / name / "test.parquet")
    arguments = ["task=evaluate", f"init_from={init_from}", f"benchmarks=[{','.join(names)}]", f"run_dir={place}"]
    arguments += [f"evaluate.files={place / 'files'}", f"evaluate.environment={ENVIRONMENT}", "run_name=made"]
    evaluate(parse([*arguments, *more]))
    return read_scores(place / "made")


def test_lmms_eval_gives_the_recorded_scores_and_prompts_of_each_benchmark():
    found = json.loads(json.dumps(record(ENVIRONMENT)))
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert found["version"] == committed["version"] and list(found["runs"]) == list(NUM_ROWS)
    for name, run in committed["runs"].items():
        assert found["runs"][name] == run, name


def test_lmms_evals_tasks_are_those_of_the_committed_list(tmp_path):
    """`TaskManager` lists tasks, groups and tags."""
    import subprocess

    code = "from lmms_eval.tasks import TaskManager; print('\\n'.join(TaskManager().all_tasks))"
    done = subprocess.run([LMMS_EVAL, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert {line for line in done.stdout.splitlines() if re.fullmatch(r"[\w.+-]+", line)} >= list_harness_tasks()


def make_judge(reply) -> FastAPI:
    app = FastAPI()
    app.state.requests = []

    @app.post("/v1/chat/completions")
    def complete(body: dict) -> dict:
        app.state.requests.append(body)
        message = {"role": "assistant", "content": reply(body["messages"][-1]["content"])}
        return {
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {},
        }

    return app


def test_a_judge_behind_the_recorder_scores_k_llava_w_and_unreadable_reviews_are_counted(tmp_path):
    replies = iter(["8 6", "좋은 답변입니다.", "10 9", *["8 8"] * 99])
    judge = make_judge(lambda _: next(replies))
    more = ("judge.model=my-judge", "evaluate.num_concurrent=1")
    with ScriptedModel().run() as url, run_in_thread(judge) as judge_url:
        score = run_evaluate(tmp_path, url, ["k_llava_w"], f"judge.endpoint={judge_url}", *more)["k_llava_w"]
        num_asked = len(judge.state.requests)  # equal questions with equal answers are asked once
        assert 3 < num_asked <= 8 and {body["model"] for body in judge.state.requests} == {"my-judge"}
        again = run_evaluate(tmp_path, url, ["k_llava_w"], f"judge.endpoint={judge_url}", *more)["k_llava_w"]
        assert again == score and len(judge.state.requests) == num_asked
    rows = read_json_lines(tmp_path / "made/samples/k_llava_w.jsonl")
    pairs = [row["scores"]["gpt_eval_llava_all"]["scores"] for row in rows]
    expected = 100 * round(sum(pair[1] for pair in pairs) / 8, 3) / round(sum(pair[0] for pair in pairs) / 8, 3)
    assert score.score == pytest.approx(expected, abs=0.06) and [-1, -1] in pairs  # lmms-eval rounds to one decimal
    assert score.judge == f"my-judge at {judge_url}" and any(
        "1 review of 8 had no two scores" in note for note in score.notes
    )


def test_a_judge_reads_the_answers_that_mmbenchs_rules_cannot(tmp_path):
    judge = make_judge(lambda prompt: "B" if "Question" in prompt else "?")
    with ScriptedModel().run() as url, run_in_thread(judge) as judge_url:
        more = (f"judge.endpoint={judge_url}", "judge.model=my-judge")
        score = run_evaluate(tmp_path, url, ["k_mmbench"], *more)["k_mmbench"]
    assert score.is_circular and score.judge is not None and 0 <= score.score <= 100
    unread = [
        row["answer"] for row in read_json_lines(tmp_path / "made/samples/k_mmbench.jsonl") if "정답" in row["answer"]
    ]
    assert bool(judge.state.requests) <= bool(unread)  # it is asked about such answers only


def test_lmms_eval_scores_the_sets_of_the_task_pack_with_and_without_a_judge(tmp_path):
    judge = make_judge(lambda prompt: "최종 점수: 10점 만점에 8점" if "채점 기준" in prompt else "?")
    names = ["koffvqa", "cord_popeval", "grounding_markup", "xm3600_ko"]
    with ScriptedModel().run() as url, run_in_thread(judge) as judge_url:
        scores = run_evaluate(tmp_path, url, names, f"judge.endpoint={judge_url}", "judge.model=my-judge")
    assert set(scores) == set(names) and all(0 <= score.score <= 100 for score in scores.values())
    assert scores["koffvqa"].judge and scores["cord_popeval"].judge is None and judge.state.requests
    assert scores["cord_popeval"].score > 50  # all boxes and half of the texts are right
    assert scores["grounding_markup"].metrics["grounding_acc_50"] == scores["grounding_markup"].score


def test_lmms_eval_scores_a_checkpoint_that_this_process_serves(tmp_path, blueprint):
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "run" / "hf")
    score = run_evaluate(tmp_path, tmp_path / "run/hf", ["k_dtcbench"], "evaluate.max_new_tokens=4")["k_dtcbench"]
    assert (score.num_samples, score.num_asked, score.max_new_tokens) == (8, 8, 4)
    (log,) = (tmp_path / "made/answers").glob("*.jsonl")
    assert all(1 <= row["usage"]["completion_tokens"] <= 4 for row in read_json_lines(log))
    assert score.num_published == BENCHMARKS["k_dtcbench"].num_rows
