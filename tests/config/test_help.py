"""Tests of run.py for a user: help, errors and Hydra's own flags, with real processes, imports and exit codes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from waiting import PATIENCE

import run as program
from lit_vlm.config.choices import Task
from lit_vlm.config.compose import list_choices
from lit_vlm.config.settings import list_settings
from lit_vlm.tasks import TASKS
from lit_vlm.types import UserError

ROOT = Path(program.__file__).resolve().parent
HEAVY = ("torch", "transformers", "lightning", "numpy", "PIL")


def run_py(*arguments: str, python: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python run.py ...` from a folder that is not the repository."""
    command = [sys.executable, *python, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=PATIENCE)


@pytest.fixture
def dispatched_runs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Runs that were passed to a task."""
    runs = []
    for task in Task:
        monkeypatch.setitem(TASKS, task, runs.append)
    return runs


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--help", "settings"], ["experiment=tiny/2_sft", "stage.lerning_rate=1"]]
)
def test_help_and_errors_import_nothing_heavy(arguments):
    lines = run_py(*arguments, python=("-X", "importtime")).stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert "hydra" in imported and not imported & set(HEAVY)


def test_help_shows_choices_settings_and_examples():
    text = run_py("--help").stdout
    for word in (
        "recipe=",
        "tiny",
        "kollava_instruct",
        "stage.learning_rate",
        "--cfg job",
        "-sc install=bash",
        "--help settings",
    ):
        assert word in text
    assert "schema" not in text


def test_help_settings_shows_every_setting_with_a_meaning():
    text = run_py("--help", "settings").stdout
    rows = [row for row in list_settings() if not row.key.startswith(("stage.parts.", "data.validation.sources."))]
    assert [row.key for row in rows if f"  {row.key}   " not in text] == []
    lines = text.splitlines()
    bare = [
        line
        for line, after in itertools.pairwise(lines)
        if line.startswith("  ") and line[2] != " " and after[:6] != " " * 6
    ]
    assert bare == []


def test_an_error_prints_only_its_message_and_exits_with_status_1():
    result = run_py("experiment=tiny/2_sft", "stage.lerning_rate=1", "seed=x", "model=tny")
    assert result.returncode == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert (
        result.stderr.startswith("3 mistakes in the configuration:\n")
        and "Did you mean stage.learning_rate?" in result.stderr
    )


def test_hydras_cfg_flag_works_and_writes_no_file(tmp_path):
    result = run_py("--cfg", "job", "experiment=tiny/2_sft", "prompt=무엇?")
    config = yaml.safe_load(result.stdout)
    assert (result.returncode, config["task"], config["stage"]["name"], config["prompt"]) == (
        0,
        "train",
        "sft",
        "무엇?",
    )
    refused = run_py("--cfg", "job", "experiment=tiny/2_sft", "sed=1", "seed=x")
    assert refused.returncode == 1 and refused.stderr.startswith("2 mistakes")
    assert list(tmp_path.iterdir()) == []


def test_completion_offers_groups_and_choices():
    assert "complete" in run_py("-sc", "install=bash").stdout
    line = "python run.py stage="
    offered = run_py("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).stdout
    assert offered.split() == [f"stage={name}" for name in list_choices("stage")]


def test_a_run_is_passed_to_its_task_and_writes_no_file(dispatched_runs, tmp_path):
    program.dispatch(["experiment=tiny/2_sft", "seed=1"])
    program.dispatch([])
    assert [run.config.task for run in dispatched_runs] == [Task.train, Task.pipeline]
    assert list(tmp_path.iterdir()) == []


def test_multirun_runs_one_job_per_value(dispatched_runs, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    program.dispatch(["-m", "experiment=tiny/2_sft", "seed=1,2", "trainer.extra.max_time='00:00:01:00'"])
    assert [run.config.seed for run in dispatched_runs] == [1, 2] and len({run.name for run in dispatched_runs}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # Hydra's list of jobs, in run_dir


def test_multirun_over_several_devices_is_refused_with_the_reason(dispatched_runs):
    with pytest.raises(UserError, match="every device's process would run the whole list"):
        program.dispatch(["-m", "experiment=tiny/2_sft", "seed=1,2", "trainer.devices=1,2"])
    with pytest.raises(UserError, match="Did you mean seed"):
        program.dispatch(["-m", "experiment=tiny/2_sft", "sede=1,2"])
    assert dispatched_runs == []


def test_every_task_has_a_function():
    assert set(TASKS) == set(Task)


def test_main_shows_a_user_error_without_a_traceback(monkeypatch):
    def task(run):
        raise UserError("the folder is empty")

    monkeypatch.setitem(TASKS, Task.train, task)
    monkeypatch.setattr(sys, "argv", ["run.py", "experiment=tiny/1_align"])
    with pytest.raises(SystemExit) as exited:
        program.main()
    assert exited.value.code == "the folder is empty"  # the interpreter prints it to stderr and exits with status 1
