"""W&B agents as jobs of a real Slurm: `sweeps/agent.sbatch`, and their runs on two nodes."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
from mini_slurm import MISSING, MiniSlurm
from waiting import PATIENCE, until

from sweeps.wandb_server import LoopbackServer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3 * PATIENCE),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here (Debian: apt-get install slurm-wlm)"),
]
STEPS = 400
TWO_NODES = {
    "experiment": "tiny/1_align",
    "trainer": "ddp",
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.devices": 1,
    "trainer.num_nodes": 2,
    "trainer.num_threads": 1,
    "trainer.max_steps": STEPS,
    "trainer.log_every_n_steps": 1,
    "data.num_workers": 0,
    "data.global_batch_size": 4,
    "data.validation.max_samples": 4,
}
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--array=1-1"]


@pytest.fixture
def server():
    with LoopbackServer() as loopback:
        yield loopback
        assert loopback.unknown == []


@pytest.fixture
def submit(server, tmp_path):
    """Return a function that creates a sweep over two learning rates and submits an agent for it as a Slurm job."""
    with MiniSlurm(tmp_path / "slurm") as slurm:

        def submit_agent():
            import yaml

            parameters = {key: {"value": value} for key, value in TWO_NODES.items()}
            parameters["run_dir"] = {"value": str(tmp_path / "runs")}
            parameters["stage.learning_rate"] = {"values": [1e-3, 3e-3]}
            plain = {"program": "run.py", "project": "p", "method": "grid", "parameters": parameters}
            plain["command"] = ["bash", "sweeps/launch.sh", "${args_json}"]
            sweep = server.state.add_sweep("p", yaml.safe_dump(plain), plain).name
            path = os.pathsep.join([str(Path(sys.executable).parent), slurm.environment["PATH"]])
            own = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
            found = {name: value for name, value in slurm.environment.items() if not name.startswith("WANDB_")}
            environment = {**server.environment(), **found, **own, "OMP_NUM_THREADS": "1"}
            environment["WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"] = "1"
            log = f"--output={tmp_path}/agent.log"
            job = slurm.run(
                "sbatch",
                "--parsable",
                *OPTIONS,
                log,
                "sweeps/agent.sbatch",
                server.path(sweep),
                env=environment,
                cwd=ROOT,
            )
            return slurm, job.strip(), server.state.sweeps[sweep]

        yield submit_agent


def read_log(tmp_path) -> str:
    log = tmp_path / "agent.log"
    return log.read_text(errors="replace")[-6000:] if log.is_file() else "no log"


def test_an_agent_in_a_job_runs_its_trials_on_all_nodes_of_the_allocation(server, submit, tmp_path):
    slurm, job, sweep = submit()
    slurm.wait(job)
    runs = server.state.list_runs(sweep.name)
    assert [run.state for run in runs] == ["finished"] * 2, read_log(tmp_path)
    assert [run.settings["run"]["plan"]["world_size"] for run in runs] == [2, 2]
    assert [run.starts for run in runs] == [1, 1]


def test_an_agent_at_its_time_limit_requeues_and_its_trial_resumes(server, submit, tmp_path):
    slurm, job, sweep = submit()
    show_log = partial(read_log, tmp_path)
    run = until(
        lambda: next((run for run in server.state.list_runs(sweep.name) if len(run.history) > 3), None), said=show_log
    )
    slurm.run("scancel", "--batch", "--signal=TERM", job)  # Slurm sends this signal before the limit
    until(lambda: run.state == "preempted" or run.starts > 1, said=show_log)
    until(lambda: sweep.state == "finished", said=show_log)
    runs = server.state.list_runs(sweep.name)
    assert [one.state for one in runs] == ["finished"] * 2, read_log(tmp_path)
    assert run.starts == 2 and int(slurm.get_job(job).get("Restarts", 0)) == 1
    steps = [row["_step"] for row in run.history if "train/loss" in row]
    assert len(steps) == STEPS == len(set(steps))
