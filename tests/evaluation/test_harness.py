"""lmms-eval's process and its files: recorded output is read as it is, and its environment is made again only when the pins change."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_vlm.evaluation import harness_environment
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.evaluation.harness import (
    FAILED,
    HarnessResult,
    compute_relative_score,
    list_unreadable_reviews,
    read_results,
    write_task,
)
from lit_vlm.evaluation.harness_environment import (
    MARKER,
    VERSION,
    ensure_environment,
    is_current,
    make_process_environment,
    read_pins,
)
from lit_vlm.types import UserError

RECORDED = json.loads((Path(__file__).parent / "lmms_eval_runs.json").read_text(encoding="utf-8"))


def write_output(folder: Path, name: str) -> Path:
    """Write recorded results and samples where lmms-eval writes them."""
    run = RECORDED["runs"][name]
    place = folder / "model"
    place.mkdir(parents=True)
    (place / "20260101_000000_results.json").write_text(json.dumps({"results": run["results"]}), encoding="utf-8")
    lines = [json.dumps(sample, ensure_ascii=False) for sample in reversed(run["samples"])]
    (place / f"20260101_000000_samples_lit_vlm_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "submissions").mkdir()
    (folder / "submissions" / "zz_results.json").write_text("{}")  # MMBench writes such files beside
    return folder


@pytest.mark.parametrize("name", RECORDED["runs"])
def test_the_main_score_of_each_benchmark_is_in_recorded_results(name, tmp_path):
    assert RECORDED["version"] == VERSION
    ((task, result),) = read_results(write_output(tmp_path, name), name)
    assert task == f"lit_vlm_{name}" and BENCHMARKS[name].metric in result.metrics
    assert not any("stderr" in metric for metric in result.metrics)
    assert [row["doc_id"] for row in result.samples] == list(range(len(result.samples))) and result.failed == []


def count_hits(name, is_hit):
    samples = RECORDED["runs"][name]["samples"]
    return sum(is_hit(sample["filtered_resps"].strip(), sample["target"]) for sample in samples) / len(samples)


def get_recorded_score(name):
    (values,) = RECORDED["runs"][name]["results"].values()
    return values[f"{BENCHMARKS[name].metric},none"]


@pytest.mark.parametrize("name", ["k_dtcbench", "k_seed"])
def test_only_the_first_character_of_an_answer_counts_in_lmms_evals_korean_sets(name):
    assert get_recorded_score(name) == pytest.approx(count_hits(name, lambda answer, right: answer[:1] == right))
    samples = RECORDED["runs"][name]["samples"]
    assert (
        any(sample["filtered_resps"] == f"정답은 {sample['target']}입니다." for sample in samples) or name == "k_seed"
    )


def read_choice(sample):
    """Read the letter of an answer: alone, in brackets, in a sentence, or by the text of its option."""
    options = {text: letter for letter, text in re.findall(r"^([A-D])\. (.*)$", sample["input"], re.MULTILINE)}
    answer = sample["filtered_resps"]
    return options.get(answer) or re.search("[A-D]", answer)[0]


@pytest.mark.parametrize("name", ["k_mmbench", "mmbench"])
def test_a_circular_question_counts_only_if_all_its_rotations_are_right(name):
    samples = RECORDED["runs"][name]["samples"]
    groups = [samples[start : start + 4] for start in range(0, len(samples), 4)]
    hits = [all(read_choice(sample) == sample["target"] for sample in group) for group in groups]
    assert get_recorded_score(name) == pytest.approx(100 * sum(hits) / len(hits))
    assert 0 < sum(hits) < len(hits)


def test_a_request_without_an_answer_is_found_by_its_row():
    samples = [{"doc_id": 0, "filtered_resps": "A"}, {"doc_id": 1, "filtered_resps": f"{FAILED} after 2 retries] 502"}]
    assert HarnessResult({"acc": 0.5}, samples).failed == [1]


def test_output_without_a_score_is_an_error_with_its_last_lines(tmp_path):
    (tmp_path / "harness.log").write_text("start\n\x1b[31mValueError: no such column\x1b[0m\n")
    with pytest.raises(UserError, match=r"(?s)gave no score for pope:.*ValueError: no such column\n.*harness\.log"):
        read_results(tmp_path, "pope")


def test_reviews_that_hold_no_two_scores_are_listed_and_left_out_of_our_relative_score():
    pairs = [[8, 6], [-1, -1], [10, 9]]
    samples = [{"doc_id": number, "all": {"scores": pair}} for number, pair in enumerate(pairs)]
    assert list_unreadable_reviews(samples, "all") == [1]
    assert compute_relative_score(samples, "all") == pytest.approx(100 * 15 / 18)
    assert compute_relative_score(samples[1:2], "all") is None


def test_the_task_for_local_rows_changes_where_rows_come_from_and_nothing_else(tmp_path):
    import yaml

    own = tmp_path / "harness" / "mmbench_ko_dev.yaml"
    own.parent.mkdir()
    own.write_text("include: base_yaml\ntask: mmbench_ko_dev\n", encoding="utf-8")
    (own.parent / "base_yaml").write_text("test_split: dev\n", encoding="utf-8")
    (own.parent / "utils.py").write_text("PROMPT = 1\n", encoding="utf-8")
    arguments = (own, tmp_path / "rows.parquet", tmp_path / "tasks")
    judged = write_task("k_mmbench", BENCHMARKS["k_mmbench"], *arguments, has_judge=True)
    text = (tmp_path / "tasks" / f"{judged.name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert set(values) == {"include", "task", "dataset_path", "dataset_name", "dataset_kwargs", "test_split"}
    assert values["dataset_kwargs"]["data_files"] == {"dev": str(tmp_path / "rows.parquet")}
    assert "test_split: dev" in judged.text
    ruled = write_task("k_mmbench", BENCHMARKS["k_mmbench"], *arguments, has_judge=False)
    assert "mmbench_aggregate_dev_results_static" in (tmp_path / "tasks" / f"{ruled.name}.yaml").read_text(
        encoding="utf-8"
    )
    (own.parent / "utils.py").write_text("PROMPT = 2\n", encoding="utf-8")
    changed = write_task("k_mmbench", BENCHMARKS["k_mmbench"], *arguments, has_judge=True)
    assert len({judged.digest, ruled.digest, changed.digest}) == 3


def test_the_harness_gets_no_key_of_the_user(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "MY_SECRET"):
        monkeypatch.setenv(name, "sk-" + "Ab1" * 9)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = make_process_environment(tmp_path, {"HF_HUB_OFFLINE": "1"}, keep_hub_token=False)
    assert not any("Ab1" in value for value in found.values()) and "PYTHONPATH" not in found
    assert found["OPENAI_API_KEY"] == "none" and found["HF_HUB_OFFLINE"] == "1" and found["PATH"] == os.environ["PATH"]
    assert "Ab1" in make_process_environment(tmp_path, {}, keep_hub_token=True)["HF_TOKEN"]


@pytest.fixture
def pip_calls(monkeypatch):
    """Replace the commands of the installation: a venv is a file, pip succeeds or fails as `pip_calls.status` says."""

    class Calls(list):
        status = 0

    calls = Calls()

    def run(command, **options):
        calls.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
            (Path(command[-1]) / "pyvenv.cfg").touch()
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, calls.status, "ERROR: No matching distribution\n", "")

    monkeypatch.setattr(harness_environment.subprocess, "run", run)
    return calls


def test_the_environment_is_made_once_and_again_when_the_pins_change(tmp_path, pip_calls, monkeypatch):
    folder, said = tmp_path / "lmms_eval", []
    assert ensure_environment(folder, said.append) == folder / "bin" / "python"
    assert [command[-1] for command in pip_calls][1:] == [str(folder / "lmms_eval_requirements.txt"), "torchvision"]
    ensure_environment(folder, said.append)
    assert len(said) == 1 and len(pip_calls) == 3
    monkeypatch.setattr(harness_environment, "read_pins", lambda: "lmms-eval==0.7.4\n")
    ensure_environment(folder, said.append)
    assert len(said) == 2 and is_current(folder)


def test_an_installation_that_failed_says_why_and_is_repeated(tmp_path, pip_calls):
    pip_calls.status = 1
    with pytest.raises(UserError, match=r"(?s)could not be made:\n  ERROR: No matching.*evaluate\.environment"):
        ensure_environment(tmp_path / "env", print)
    assert not is_current(tmp_path / "env")
    pip_calls.status = 0
    ensure_environment(tmp_path / "env", print)
    assert is_current(tmp_path / "env")


def test_a_folder_of_something_else_is_never_replaced(tmp_path, pip_calls):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is no Python environment"):
        ensure_environment(tmp_path, print)
    assert (tmp_path / "mine.txt").read_text() == "kept" and not (tmp_path / MARKER).exists()


def test_every_package_of_the_harness_is_pinned():
    lines = [line for line in read_pins().splitlines() if not line.startswith("#")]
    assert all("==" in line and "+" not in line for line in lines) and f"lmms-eval=={VERSION}" in [
        line.replace("_", "-") for line in lines
    ]
    assert sys.version_info >= (3, 11)
