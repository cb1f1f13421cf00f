"""The real `wandb sweep`, `wandb agent` and run.py against the loopback server."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from clients import ROOT
from waiting import PATIENCE, until

COMMAND = ["bash", "sweeps/launch.sh", "${args_json}"]
TINY = {
    "experiment": "tiny/1_align",
    "data.num_workers": 0,
    "data.global_batch_size": 4,
    "data.validation.every_steps": 2,
    "data.validation.max_samples": 4,
    "trainer.log_every_n_steps": 1,
    "logger.metric": "val/loss_ko",
}
METRIC = {"name": "val/loss_ko", "goal": "minimize"}
RATES = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}


def make_fixed_parameters(folder: Path, **settings) -> dict:
    return {key: {"value": value} for key, value in {**TINY, "run_dir": str(folder / "runs"), **settings}.items()}


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_an_agent_runs_the_suggested_trials_and_values_config_and_metrics_arrive(server, client, tmp_path):
    parameters = make_fixed_parameters(tmp_path, **{"trainer.max_steps": 4, "logger.tags": ["한국어, 둘"]})
    parameters["stage.learning_rate"] = RATES
    sweep = client.create_sweep(method="bayes", metric=METRIC, command=COMMAND, parameters=parameters, run_cap=3)
    output = client.run_agent(sweep)
    runs = server.state.list_runs(sweep)
    assert [run.state for run in runs] == ["finished"] * 3, output
    assert len({run.parameters["stage.learning_rate"] for run in runs}) == 3
    for run in runs:
        assert run.exit_code == 0 and run.starts == 1
        rate = run.parameters["stage.learning_rate"]
        assert 1e-4 <= rate <= 1e-2
        assert run.settings["stage"]["learning_rate"] == rate == run.settings["stage.learning_rate"]
        assert run.settings["logger"]["tags"] == ["한국어, 둘"]
        assert len(run.values("val/loss_ko")) == 2 and len(run.values("train/loss")) == 4
        assert run.summary["val/loss_ko"] == run.values("val/loss_ko")[-1]
        (folder,) = (tmp_path / "runs").glob(f"tiny/1_align-*{run.name}")
        manifest = read_manifest(folder)
        assert manifest["status"] == "finished" and manifest["config"]["stage"]["learning_rate"] == rate
    assert server.sweeps[sweep].state == "finished"


@pytest.mark.slow
def test_a_trial_that_is_stopped_early_saves_and_counts_as_finished(server, client, tmp_path):
    parameters = make_fixed_parameters(tmp_path, **{"trainer.max_steps": 60, "data.validation.every_steps": 4})
    parameters["stage.learning_rate"] = {"values": [3e-3, 1e-7]}
    hyperband = {"type": "hyperband", "min_iter": 1, "eta": 3}
    sweep = client.create_sweep(
        method="grid", metric=METRIC, command=COMMAND, parameters=parameters, early_terminate=hyperband
    )
    output = client.run_agent(sweep)
    good, bad = sorted(server.state.list_runs(sweep), key=lambda run: -run.parameters["stage.learning_rate"])
    assert (good.state, good.stop) == ("finished", False), output
    assert (bad.state, bad.stop, bad.exit_code) == ("finished", True, 0), output
    assert len(bad.values("train/loss")) < 60 == len(good.values("train/loss"))
    (folder,) = (tmp_path / "runs").glob(f"tiny/1_align-*{bad.name}")
    assert read_manifest(folder)["status"] != "finished" and list((folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_failed_trial_is_marked_failed_and_the_agent_continues(server, client, tmp_path):
    parameters = make_fixed_parameters(tmp_path, **{"trainer.max_steps": 2})
    # the first is refused before it contacts the server, the second ends with an error during the run
    parameters["logger.metric"] = {"values": ["val/loss_ko", "val/los_ko"]}
    parameters["stage.learning_rate"] = {"values": [-1.0, 1e-3]}
    sweep = client.create_sweep(method="grid", command=COMMAND, parameters=parameters)
    output = client.run_agent(sweep, WANDB_AGENT_DISABLE_FLAPPING="true")
    states = {
        (run.parameters["stage.learning_rate"], run.parameters["logger.metric"]): run
        for run in server.state.list_runs(sweep)
    }
    assert states[1e-3, "val/loss_ko"].state == "finished", output
    assert states[-1.0, "val/loss_ko"].state == states[-1.0, "val/los_ko"].state == "failed"
    assert states[1e-3, "val/los_ko"].state == "failed" and states[1e-3, "val/los_ko"].exit_code == 1
    assert "stage.learning_rate: must be above 0 and at most 1000, found -1.0." in output
    assert "val/los_ko" in output and "Did you mean val/loss_ko?" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_terminated_agent_leaves_its_trial_to_the_next_one_which_resumes_it(server, client, tmp_path):
    parameters = make_fixed_parameters(tmp_path, **{"trainer.max_steps": 120})
    sweep = client.create_sweep(method="grid", metric=METRIC, command=COMMAND, parameters=parameters)
    agent = client.start("agent", "--forward-signals", server.path(sweep))
    (run,) = until(lambda: [run for run in server.state.list_runs(sweep) if len(run.history) > 3])
    agent.send_signal(signal.SIGTERM)
    output, _ = agent.communicate(timeout=PATIENCE)
    assert run.state == "preempted" and run.exit_code == 75 and 3 < len(run.values("train/loss")) < 120, output
    output += client.run_agent(sweep)
    assert (run.state, run.starts) == ("finished", 2), output
    steps = [row["_step"] for row in run.history if "train/loss" in row]
    assert len(steps) == 120 == len(set(steps)), output


@pytest.mark.slow
def test_trials_of_an_agent_run_under_torchrun(server, client, tmp_path):
    two = {"trainer": "ddp", "trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.devices": 2}
    parameters = make_fixed_parameters(tmp_path, **two, **{"trainer.num_threads": 1, "trainer.max_steps": 4})
    sweep = client.create_sweep(method="grid", metric=METRIC, command=COMMAND, parameters=parameters)
    output = client.run_agent(sweep, LIT_VLM_LAUNCH="torchrun --standalone --nproc-per-node 2")
    (run,) = server.state.list_runs(sweep)
    assert (run.state, run.settings["run"]["plan"]["world_size"]) == ("finished", 2), output
    assert len(run.values("train/loss")) == 4


@pytest.mark.slow
def test_an_agent_killed_during_a_run_leaves_a_run_that_resumes_as_the_same_run(server, client, tmp_path):
    settings = {"trainer.max_steps": 120, "checkpoint.every_steps": 2, "checkpoint.asynchronous": False}
    parameters = make_fixed_parameters(tmp_path, **settings)
    sweep = client.create_sweep(method="grid", metric=METRIC, command=COMMAND, parameters=parameters)
    agent = client.start("agent", server.path(sweep))
    (run,) = until(lambda: [run for run in server.state.list_runs(sweep) if len(run.history) > 5])
    children = _list_descendants(agent.pid)
    agent.kill()
    for child in children:
        os.kill(child, signal.SIGKILL)
    agent.communicate()
    arguments = json.dumps(run.parameters, ensure_ascii=False)
    again = {"WANDB_RUN_ID": run.name, "WANDB_SWEEP_ID": sweep, "WANDB_PROJECT": "p"}
    done = subprocess.run(
        ["bash", "sweeps/launch.sh", arguments],
        cwd=ROOT,
        env=client.environment(**again),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.state == "finished" and run.exit_code == 0
    steps = [row["_step"] for row in run.history if "train/loss" in row]
    assert len(steps) == 120 == len(set(steps))


def _list_descendants(pid: int) -> list[int]:
    """Return the processes that it started, and their descendants."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
        waiting += map(int, listed.split())
        found += map(int, listed.split())
    return found
