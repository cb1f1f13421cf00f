"""Tests of task=sweep: errors before any run, the plan, real trials of the tiny model, interruption and Slurm."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from run_helpers import RUN, run_process
from waiting import PATIENCE

from lit_vlm.config import ConfigError, parse
from lit_vlm.config.schema import TrainerConfig
from lit_vlm.config.sweep_overrides import get_sweep_overrides, get_trial_overrides
from lit_vlm.sweep.search import Search, TrialOutcome
from lit_vlm.sweep.sweep_file import read_sweep
from lit_vlm.tasks.sweep import (
    Sweep,
    assign_devices,
    format_missing_held_out,
    lock_sweep_folder,
    prepare_sweep_folder,
    run_sweep,
)
from lit_vlm.types import UserError

FILE = """
program: run.py
command: ["${{env}}", "${{interpreter}}", "${{program}}", "experiment=tiny/1_align", "${{args_json}}"]
method: {method}
metric: {{name: {metric}, goal: minimize}}
run_cap: {cap}
parameters:
  stage.learning_rate:  # around the recipe's
    distribution: log_uniform_values
    min: 1.0e-3
    max: 1.0e-2
  stage.warmup: {{values: [0, 0.1]}}
  trainer.max_steps: {{value: 4}}
  data.global_batch_size: {{value: 4}}
  data.num_workers: {{value: 0}}
  data.sources.caption_ko.num_samples: {{value: 40}}
  data.sources.caption_en.num_samples: {{value: 40}}
  callbacks: {{value: [throughput, guard]}}
"""


def write_sweep_file(folder: Path, name="mine", method="random", metric="val/loss", cap=2) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(FILE.format(method=method, metric=metric, cap=cap), encoding="utf-8")
    return path


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_sweep_without_checks(path: Path, *overrides: str) -> Sweep:
    """Load the sweep of a valid file without checking its values."""
    run = parse(["task=sweep", f"sweep={path}", *overrides])
    config = run.config
    overrides = get_trial_overrides(run.overrides)
    return Sweep(run.name, run.dir, read_sweep(path), overrides, config.trials, config.seed, config.overwrite)


# Overrides and errors


def test_overrides_of_the_sweep_and_of_its_trials_are_separated():
    overrides = (
        "task=sweep sweep=x.yaml trials.count=3 submit.time=60 run_name=a overwrite=true run_dir=r seed=2 stage.beta=1"
    )
    assert get_sweep_overrides(overrides.split()) == overrides.split()[:-1]
    assert get_trial_overrides(overrides.split()) == ["run_dir=r", "seed=2", "stage.beta=1"]


def test_a_sweep_is_named_by_its_file_and_its_trials_by_their_numbers(work_folder):
    job = load_sweep_without_checks(write_sweep_file(work_folder), "seed=3")
    assert (job.name, job.dir) == ("sweeps/mine", work_folder / "runs/sweeps/mine")
    overrides = job.build_overrides(4, {"stage.learning_rate": 0.002, "stage.warmup": 0})
    trial = parse(overrides)
    assert (trial.name, trial.dir, trial.config.seed) == ("sweeps/mine/4", work_folder / "runs/sweeps/mine/4", 3)
    assert (
        load_sweep_without_checks(write_sweep_file(work_folder), "run_name=sweeps/other").dir
        == work_folder / "runs/sweeps/other"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sweep=minee.yaml"], "there is no such file. Did you mean mine.yaml?"),
        ([], "sweep is not set"),
        (["sweep=mine.yaml", "trials.cuont=3"], "unknown setting trials.cuont. Did you mean trials.count?"),
        (["sweep=mine.yaml", "trials.count=0"], "trials.count: must be above 0, found 0."),
        (["sweep=mine.yaml", "trials.slurm=2", "trials.parallel=2"], "trials.parallel: with trials.slurm"),
        (["sweep=mine.yaml", "trials.carry_to=tiny/1_alin"], "Did you mean tiny/1_align?"),
        (
            ["sweep=mine.yaml", "stage.learning_rte=3"],
            "unknown setting stage.learning_rte. Did you mean stage.learning_rate?",
        ),
        (["sweep=mine.yaml", "stage.warmup=3"], "parameters.stage.warmup: is swept"),
        (["sweep=odd.yaml"], "Did you mean val/loss_ko?"),
    ],
)
def test_an_error_is_reported_before_anything_runs(work_folder, overrides, expected):
    write_sweep_file(work_folder)
    write_sweep_file(work_folder, "odd", metric="val/loss_kr")
    with pytest.raises(UserError) as error:
        run_sweep(parse(["task=sweep", *overrides]))
    assert expected in str(error.value) and not (work_folder / "runs").exists()


def test_values_that_another_experiment_does_not_know_are_not_carried_over(work_folder):
    path = work_folder / "dpo.yaml"
    path.write_text(
        "method: random\nmetric: {name: val/loss}\nparameters:\n  experiment: {value: tiny/4_dpo}\n  stage.beta: {min: 0.1, max: 0.2}\n"
        "  init_from: {value: runs/tiny/3_highres/hf}\n"
    )
    with pytest.raises(ConfigError, match=r"trials.carry_to=tiny/2_sft: stage.beta is a setting of stage=dpo"):
        run_sweep(parse(["task=sweep", f"sweep={path}", "trials.carry_to=tiny/2_sft"]))


def test_the_plan_shows_ranges_reasons_and_commands_and_runs_nothing(work_folder, capsys):
    run_sweep(
        parse(
            [
                "task=sweep",
                f"sweep={write_sweep_file(work_folder)}",
                "trials.dry_run=true",
                "run_name='스윕 하나'",
                "seed=1",
            ]
        )
    )
    output = capsys.readouterr().out
    assert (
        "around the recipe's" in output
        and "0.001 to 0.01, logarithmic" in output
        and "random, 2 trials, by val/loss" in output
    )
    commands = [line for line in output.splitlines() if "python run.py" in line]
    runs = [parse(shlex.split(line)[2:]) for line in commands]
    assert [run.name for run in runs] == ["스윕 하나/0", "스윕 하나/1"] and not (work_folder / "runs").exists()
    assert runs[0].config.stage.learning_rate != runs[1].config.stage.learning_rate
    assert "No trial will log" not in output


def check_held_out(metric, overrides):
    config = parse(overrides).config
    return format_missing_held_out(metric, config.data, config.seed)


def test_the_plan_says_that_few_records_hold_out_nothing(work_folder):
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
        for i in range(12)
    ]
    (work_folder / "few.json").write_text(json.dumps(records), encoding="utf-8")
    overrides = ["experiment=tiny/2_sft", "init_from=null", "data=llava_json", "data.sources.mine.path=few.json"]
    hint = check_held_out("val/loss", overrides)
    assert "No trial will log val/loss" in hint and "data.validation.fraction=0.1" in hint
    assert not check_held_out("val/loss", [*overrides, "data.validation.fraction=0.1"])
    assert not check_held_out("train/loss", overrides)


# The folder


def test_a_folder_belongs_to_one_sweep_and_overwrite_replaces_another_with_its_trials(work_folder):
    job = load_sweep_without_checks(write_sweep_file(work_folder))
    prepare_sweep_folder(job)
    prepare_sweep_folder(job)
    search = job.create_search(job.dir / "journal.log")
    search.tell(search.ask().number, 1.0, TrialOutcome.finished)
    (job.dir / "0").mkdir()
    with pytest.raises(UserError, match="differs from this one in the overrides for its trials"):
        prepare_sweep_folder(load_sweep_without_checks(write_sweep_file(work_folder), "seed=4"))
    with pytest.raises(UserError, match="differs from this one in the sweep file"):
        prepare_sweep_folder(load_sweep_without_checks(write_sweep_file(work_folder, cap=3)))
    prepare_sweep_folder(
        load_sweep_without_checks(write_sweep_file(work_folder), "overwrite=true")
    )  # the same unfinished sweep is resumed
    assert (job.dir / "0").is_dir() and len(job.create_search(job.dir / "journal.log").list_trials()) == 1
    prepare_sweep_folder(load_sweep_without_checks(write_sweep_file(work_folder), "seed=4", "overwrite=true"))
    assert not (job.dir / "0").exists() and not (job.dir / "journal.log").exists()


def test_one_process_runs_a_sweep_at_a_time(work_folder):
    code = "import sys; from pathlib import Path; from lit_vlm.tasks.sweep import lock_sweep_folder\n"
    code += "with lock_sweep_folder(Path('s')): print('in', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(RUN.parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="runs already, in another process"), lock_sweep_folder(Path("s")):
        pass
    other.communicate(timeout=PATIENCE)
    with lock_sweep_folder(Path("s")):
        pass


def test_devices_are_assigned_by_what_a_trial_needs(monkeypatch):
    monkeypatch.setattr("lit_vlm.tasks.sweep.list_visible_devices", lambda: ["4", "5", "6", "7", "9"])

    def assign(parallel=None, **trainer):
        return assign_devices(TrainerConfig(**trainer), parallel)

    assert (assign(accelerator="cpu"), assign(3, accelerator="cpu")) == ([()], [()] * 3)
    assert assign() == [("4",), ("5",), ("6",), ("7",), ("9",)]
    assert assign(accelerator="gpu", devices=2) == [("4", "5"), ("6", "7")]
    assert assign(2) == [("4",), ("5",)] and assign(7)[5:] == [("4",), ("5",)]
    with pytest.raises(UserError, match="needs 8 devices"):
        assign(devices=8)
    with pytest.raises(UserError, match=r"needs a cluster: trials.slurm"):
        assign(num_nodes=2)


# Slurm


def test_workers_are_one_job_array_whose_script_passes_signals_to_them(work_folder, capsys):
    overrides = [
        "trials.slurm=3",
        "trials.dry_run=true",
        "submit.time=60",
        "submit.partition=a",
        "trainer=ddp",
        "trainer.devices=4",
    ]
    run_sweep(parse(["task=sweep", f"sweep={write_sweep_file(work_folder)}", "run_name='스윕 1'", *overrides]))
    output = capsys.readouterr().out
    options = [line.removeprefix("#SBATCH ") for line in output.splitlines() if line.startswith("#SBATCH")]
    expected_options = [
        "--array=0-2",
        "--signal=B:USR1@120",
        "--requeue",
        "--gpus-per-node=4",
        "--time=60",
        "--partition=a",
        "--open-mode=append",
    ]
    assert set(expected_options) <= set(options) and any("slurm-%A_%a.log" in option for option in options)
    script = output[output.index("#!/bin/bash") : output.index("\nsbatch ")]
    Path("job.sh").write_text(re.sub("exec .*", "exec printf '%s\\\\0' \\\\", script, count=1))
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "2"}
    completed = subprocess.run(
        ["bash", "job.sh"], capture_output=True, text=True, check=True, env=environment, timeout=PATIENCE
    )
    run = parse(completed.stdout.split("\0")[:-1])
    assert (run.config.trials.worker, run.config.trials.slurm, run.name, run.config.trials.dry_run) == (
        2,
        3,
        "스윕 1",
        False,
    )
    assert not any(text.startswith("submit.") for text in run.overrides) and not (work_folder / "runs").exists()


def test_an_invalid_job_is_refused_before_it_is_submitted(work_folder):
    def submit_with(*overrides: str):
        run_sweep(
            parse(
                [
                    "task=sweep",
                    f"sweep={write_sweep_file(work_folder)}",
                    "trials.slurm=2",
                    "trials.dry_run=true",
                    *overrides,
                ]
            )
        )

    with pytest.raises(UserError, match="submit.time: expected minutes"):
        submit_with("submit.time=soon")
    with pytest.raises(UserError, match="workers of a sweep start their trials on the node itself"):
        submit_with("submit.container=x.sqsh")


# Real trials


def start_sweep(work_folder: Path, *overrides: str, limit: float = PATIENCE) -> subprocess.CompletedProcess:
    return run_process(*overrides, cwd=work_folder, limit=limit, base=["task=sweep", "sweep=mine.yaml"])


def list_outcomes(work_folder: Path) -> list[str]:
    search = Search(read_sweep(work_folder / "mine.yaml"), work_folder / "runs/sweeps/mine/journal.log")
    return [str(trial.outcome) for trial in search.list_trials()]


@pytest.mark.slow
def test_a_sweep_of_tiny_runs_ends_with_a_page_and_a_command_that_is_accepted(work_folder):
    write_sweep_file(work_folder)
    result = start_sweep(work_folder, "trials.carry_to=tiny/2_sft", "trials.parallel=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert list_outcomes(work_folder) == ["finished"] * 2
    commands = [shlex.split(line)[2:] for line in result.stdout.splitlines() if line.startswith("  python run.py")]
    best, carried = (
        parse([*overrides, *([] if n == 0 else ["init_from=x/hf"])]) for n, overrides in enumerate(commands)
    )
    assert best.experiment == "tiny/1_align" and carried.experiment == "tiny/2_sft"
    assert best.config.stage.learning_rate == carried.config.stage.learning_rate
    trials = [json.loads((work_folder / f"runs/sweeps/mine/{n}/manifest.json").read_text()) for n in range(2)]
    assert [trial["status"] for trial in trials] == ["finished"] * 2
    page = (work_folder / "runs/sweeps/mine/sweep.html").read_text(encoding="utf-8")
    assert "2 of 2 trials: 2 finished" in page and shlex.join(commands[0]).split()[1] in page
    again = start_sweep(work_folder, "trials.carry_to=tiny/2_sft", "trials.parallel=2")
    assert again.returncode == 0 and "trial 0:" not in again.stdout and "resumes after 2 of 2 trials" in again.stdout


def start_sweep_process(work_folder: Path, *overrides: str) -> subprocess.Popen:
    line = [sys.executable, str(RUN), "task=sweep", "sweep=mine.yaml", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        line, cwd=work_folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_rows(work_folder: Path, number: int, rows: int, limit: float = PATIENCE) -> None:
    table, end = work_folder / f"runs/sweeps/mine/{number}/metrics.csv", time.monotonic() + limit
    while not table.exists() or len(table.read_text().splitlines()) <= rows:
        assert time.monotonic() < end
        time.sleep(0.05)


def kill_running_trials(work_folder: Path) -> None:
    """Send SIGKILL to the trials that the sweep left running."""
    for file in (work_folder / "runs/sweeps/mine").glob("*/trial.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


LONG = ["data.validation.every_steps=20", "trainer.log_every_n_steps=1", "checkpoint.every_steps=5"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_an_interrupted_sweep_resumes_where_it_stopped(work_folder, how):
    path = write_sweep_file(work_folder)
    path.write_text(path.read_text().replace("trainer.max_steps: {value: 4}", "trainer.max_steps: {value: 60}"))
    sweeping = start_sweep_process(work_folder, *LONG)
    wait_for_rows(work_folder, 0, 12)
    sweeping.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
    output, _ = sweeping.communicate(timeout=PATIENCE)
    if how == "kill":
        kill_running_trials(work_folder)
    else:
        assert sweeping.returncode == 130 and "its trials are saved. The same command resumes it." in output
    assert list_outcomes(work_folder) == ["None"]
    result = start_sweep(work_folder, *LONG)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list_outcomes(work_folder) == ["finished"] * 2
    log = (work_folder / "runs/sweeps/mine/0/trial.log").read_text()
    assert "resumes at step" in log and "Traceback" not in log


@pytest.mark.slow
def test_a_sweep_whose_trials_all_fail_stops_after_three_with_the_reason(work_folder):
    path = write_sweep_file(work_folder, cap=5)
    path.write_text(path.read_text().replace("callbacks: {value: [throughput, guard]}", "data.max_length: {value: 1}"))
    result = start_sweep(work_folder)
    assert result.returncode == 1 and "The first 3 trials failed" in result.stderr
    assert "set such records aside with data.on_bad_record=quarantine" in result.stderr  # message of the trial itself
    assert "Traceback" not in result.stderr and list_outcomes(work_folder) == ["failed"] * 3
