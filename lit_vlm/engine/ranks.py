"""Which of a run's processes this is, and how they find each other: told from what the launcher left in the environment.

torchrun sets RANK; srun sets SLURM_PROCID in each task of a step. Slurm's other words are in every shell of a job as well
(salloc, `srun --pty bash`, a batch script), where a plain `python run.py` is one process and stays one.
"""

from __future__ import annotations

import os
from typing import Any

from lit_vlm.types import UserError, counted

_SPECIAL_STEPS = 0xFFFFFFF0  # step numbers from here on are Slurm's own: batch script, interactive shell, extern


def srun_tasks() -> int:
    """Tasks of the srun step that this process is one of; 1 outside of a step and in a shell."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _SPECIAL_STEPS or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def in_sweep() -> bool:
    """Whether an agent of a W&B sweep started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def started_again() -> bool:
    """Whether a scheduler started this run before and starts it once more, with the words that it had then."""
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) for count in counts)


def global_rank() -> int:
    """This process among all of the run, before and after they have found each other."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if srun_tasks() > 1:
        return int(os.environ["SLURM_PROCID"])
    # Lightning's own subprocesses, on one machine or, with MASTER_ADDR and NODE_RANK set by hand, on several
    return int(os.environ.get("LOCAL_RANK", "0")) or int(os.environ.get("NODE_RANK", "0"))


def cluster_environment(devices: int, num_nodes: int) -> list[Any]:
    """For `Trainer(plugins=...)`: how ranks find each other, where Lightning's own guess would be wrong; else nothing.

    Raises:
        UserError: the launcher started another number of processes than the settings ask for. Told by the first.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    wanted, tasks = devices * num_nodes, srun_tasks()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    if tasks == 1:
        if num_nodes > 1 and not ("MASTER_ADDR" in os.environ and "NODE_RANK" in os.environ):
            raise UserError(
                f"trainer.num_nodes={num_nodes}: this is one process, and nothing says where the others are (no srun, no "
                "torchrun, no MASTER_ADDR). Submit the run with task=submit, start it on every node with torchrun "
                "(docs/cluster.md), or set trainer.num_nodes=1."
            )
        return [LightningEnvironment()] if "SLURM_NTASKS" in os.environ else []
    if tasks != wanted or int(os.environ.get("SLURM_STEP_NUM_NODES", num_nodes)) != num_nodes:
        _refuse(tasks, devices, num_nodes)
    os.environ.setdefault(
        "SLURM_NTASKS_PER_NODE", str(devices)
    )  # Lightning insists on it; srun -n alone does not set it
    # Lightning's own handlers save inside a signal handler, where ranks wait for each other at different places for ever
    return [SLURMEnvironment(auto_requeue=False)]


def _refuse(tasks: int, devices: int, num_nodes: int) -> None:
    if global_rank():
        raise SystemExit(1)
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "?")
    raise UserError(
        f"srun started {counted(tasks, 'task')} on {nodes} node{'' if nodes == '1' else 's'}; trainer.num_nodes={num_nodes} with"
        f" trainer.devices={devices} needs {devices * num_nodes} on {num_nodes}: srun --nodes={num_nodes}"
        f" --ntasks-per-node={devices}. task=submit writes a script in which they agree."
    )
