"""Rank and number of processes, inferred from the environment variables of srun, torchrun and Slurm's shells."""

import os
import subprocess
import sys

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.environments import SLURMEnvironment
from waiting import PATIENCE

from lit_vlm.distributed.ranks import count_srun_tasks, get_global_rank, make_cluster_plugins
from lit_vlm.types import UserError

# As a real Slurm sets them; the batch script and an interactive shell also have those of the first line
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NAME": "tiny/2_sft"}
SHELL = {**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "interactive"}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (
            "RANK",
            "LOCAL_RANK",
            "NODE_RANK",
            "TORCHELASTIC_RUN_ID",
            "MASTER_ADDR",
        ):
            monkeypatch.delenv(name)

    def set_variables(**names: str) -> None:
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("rank", [0, 3])
def test_a_task_of_srun_is_a_rank_and_lightnings_own_requeue_handler_is_off(environment, rank):
    environment(**JOB | STEP | {"SLURM_PROCID": str(rank)})
    assert get_global_rank() == rank
    (plugin,) = make_cluster_plugins(devices=2, num_nodes=2)
    assert isinstance(plugin, SLURMEnvironment) and plugin.auto_requeue is False
    assert (plugin.global_rank(), plugin.world_size()) == (rank, 4)


@pytest.mark.parametrize(
    "shell", [JOB, SHELL, {**JOB, **STEP, "SLURM_JOB_NAME": "bash"}], ids=["batch", "salloc", "pty"]
)
def test_a_shell_of_slurm_starts_one_process(environment, shell):
    environment(**shell)
    assert (count_srun_tasks(), get_global_rank()) == (1, 0)
    assert isinstance(make_cluster_plugins(devices=1, num_nodes=1)[0], LightningEnvironment)


def test_torchrun_inside_of_slurm_sets_the_rank(environment):
    environment(**JOB, **STEP, RANK="2", TORCHELASTIC_RUN_ID="x")
    assert get_global_rank() == 2 and make_cluster_plugins(devices=2, num_nodes=2) == []


def test_outside_of_slurm_no_plugin_is_made(environment):
    assert make_cluster_plugins(devices=2, num_nodes=1) == [] and get_global_rank() == 0
    environment(LOCAL_RANK="1")
    assert get_global_rank() == 1


def test_srun_with_another_number_of_tasks_is_reported_once(environment):
    environment(**JOB, **STEP)
    with pytest.raises(UserError, match=r"srun started 4 tasks on 2 nodes; .* needs 16 on 2: srun --nodes=2 --ntasks"):
        make_cluster_plugins(devices=8, num_nodes=2)
    environment(SLURM_PROCID="1")
    with pytest.raises(SystemExit):
        make_cluster_plugins(devices=8, num_nodes=2)


def test_several_nodes_without_a_launcher_are_refused_without_waiting(environment):
    with pytest.raises(UserError, match=r"MASTER_ADDR.*task=submit"):
        make_cluster_plugins(devices=1, num_nodes=2)


@pytest.mark.slow
def test_a_plain_run_in_a_batch_script_trains_on_one_rank_without_a_message_about_srun(repository, tmp_path):
    overrides = "task=train model=tiny model.grid=2 trainer=tiny data.num_workers=0 data.global_batch_size=4 trainer.max_steps=1"
    own = {"OMP_NUM_THREADS": "1", **JOB, "SLURM_JOB_NAME": "job.sh"}
    command = [
        sys.executable,
        str(repository / "run.py"),
        *overrides.split(),
        "callbacks=[throughput,guard]",
        "run_name=a",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 1 rank" in done.stdout and "srun" not in done.stdout + done.stderr
