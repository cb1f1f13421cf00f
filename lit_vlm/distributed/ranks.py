"""Rank of this process and rendezvous of all ranks, from the environment variables that the launcher sets.

torchrun sets RANK; srun sets SLURM_PROCID in each task of a step. The other Slurm variables exist in every shell of a job
as well (salloc, `srun --pty bash`, a batch script). There a plain `python run.py` is a single process.
"""

from __future__ import annotations

import os
from typing import Any

from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

_FIRST_RESERVED_STEP = (
    0xFFFFFFF0  # step ids from here on are reserved by Slurm: batch script, interactive shell, extern
)


def count_srun_tasks() -> int:
    """Count the tasks of the srun step that contains this process; 1 outside a step and in a shell."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if (
        not step.isdigit()
        or int(step) >= _FIRST_RESERVED_STEP
        or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    ):
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def is_in_sweep() -> bool:
    """Return True if an agent of a W&B sweep started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def is_restarted() -> bool:
    """Return True if a scheduler (Slurm, torchrun) restarts this run, with the same overrides as before."""
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) for count in counts)


def get_global_rank() -> int:
    """Return the global rank of this process, also before the process group exists."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if count_srun_tasks() > 1:
        return int(os.environ["SLURM_PROCID"])
    # Lightning's own subprocesses, on one machine or, with MASTER_ADDR and NODE_RANK set by hand, on several
    return int(os.environ.get("LOCAL_RANK", "0")) or int(os.environ.get("NODE_RANK", "0"))


def make_cluster_plugins(devices: int, num_nodes: int) -> list[Any]:
    """Make the plugins for `Trainer(plugins=...)` that define the cluster environment; empty if Lightning's own choice is right.

    Raises:
        UserError: the launcher started another number of processes than the settings require. Raised on rank 0; the
            other ranks exit with status 1.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    num_devices, num_tasks = devices * num_nodes, count_srun_tasks()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    if num_tasks == 1:
        if num_nodes > 1 and not ("MASTER_ADDR" in os.environ and "NODE_RANK" in os.environ):
            raise UserError(
                f"trainer.num_nodes={num_nodes}: this is one process, and nothing says where the others are (no srun, no "
                "torchrun, no MASTER_ADDR). Submit the run with task=submit, start it on every node with torchrun "
                "(docs/cluster.md), or set trainer.num_nodes=1."
            )
        return [LightningEnvironment()] if "SLURM_NTASKS" in os.environ else []
    if num_tasks != num_devices or int(os.environ.get("SLURM_STEP_NUM_NODES", num_nodes)) != num_nodes:
        _raise_task_mismatch(num_tasks, devices, num_nodes)
    os.environ.setdefault(
        "SLURM_NTASKS_PER_NODE", str(devices)
    )  # Lightning requires this variable; srun -n alone does not set it
    # no auto-requeue: Lightning's handlers save inside a signal handler, where ranks would wait for each other for ever
    return [SLURMEnvironment(auto_requeue=False)]


def _raise_task_mismatch(tasks: int, devices: int, num_nodes: int) -> None:
    if get_global_rank():
        raise SystemExit(1)
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "?")
    raise UserError(
        f"srun started {format_count(tasks, 'task')} on {nodes} node{'' if nodes == '1' else 's'}; trainer.num_nodes={num_nodes} with"
        f" trainer.devices={devices} needs {devices * num_nodes} on {num_nodes}: srun --nodes={num_nodes}"
        f" --ntasks-per-node={devices}. task=submit writes a script in which they agree."
    )
