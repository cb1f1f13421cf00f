"""`-m hydra/launcher=submitit_slurm`: the plugin's launcher with values under which a run survives its time limit.

What a job asks for follows from trainer.* and submit.*, as with task=submit; all of it is a setting of `hydra.launcher`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import II

SETUP = (
    "export HF_HUB_OFFLINE=1 WANDB_MODE=offline",  # nodes may have no way out
    'test -z "$SLURM_CPUS_PER_TASK" || export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK',
)


def _signalled() -> dict[str, Any]:
    """In place of submitit's own signal, which ends the job's first process without a checkpoint."""
    return {"signal": "USR1@${submit.signal_seconds}", "requeue": True}


@dataclass
class SlurmLauncherConfig(SlurmQueueConf):
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    name: str = "lit_vlm"
    nodes: int = II("trainer.num_nodes")
    tasks_per_node: int = II("trainer.devices")
    gpus_per_node: int | None = II("submit.gpus_per_node")
    cpus_per_task: int | None = II("submit.cpus_per_task")
    timeout_min: int = 24 * 60  # of one job; a requeued one gets it anew
    partition: str | None = II("submit.partition")
    account: str | None = II("submit.account")
    qos: str | None = II("submit.qos")
    constraint: str | None = II("submit.constraint")
    stderr_to_stdout: bool = True
    setup: list[str] | None = field(default_factory=lambda: list(SETUP))
    additional_parameters: dict[str, Any] = field(default_factory=_signalled)
    srun_args: list[str] = field(default_factory=lambda: ["--kill-on-bad-exit=1"])  # one rank that fails ends all


def register_launcher() -> None:
    """In place of the plugin's choice of the same name."""
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=SlurmLauncherConfig)
