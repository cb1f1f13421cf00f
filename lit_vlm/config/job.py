"""Resources and environment of a Slurm job: the same for task=submit and for a grid."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from lit_vlm.config.schema import RunConfig

GPU_ACCELERATORS = ("gpu", "cuda")
# Nodes may have no internet access: models and data are in the caches of the login node, and logs are synced from there.
OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def get_gpus_per_node(config: RunConfig) -> int:
    """Return the number of GPUs that the job requests for each node."""
    if config.submit.gpus_per_node is not None:
        return config.submit.gpus_per_node
    return config.trainer.devices if config.trainer.accelerator in GPU_ACCELERATORS else 0


def get_cpus_per_task(config: RunConfig) -> int:
    """Return the number of CPU cores for each process."""
    return config.submit.cpus_per_task or 1 + config.data.num_workers


def render_job_environment(config: RunConfig) -> Iterator[str]:
    """Render the lines of the job script that set up the environment of all ranks."""
    yield "# Ranks find each other by Slurm's words: the first node's name, and a port made of the job's id."
    yield "unset MASTER_ADDR MASTER_PORT RANK LOCAL_RANK NODE_RANK WORLD_SIZE"
    threads = config.trainer.num_threads or get_cpus_per_task(config)
    for name, value in {"OMP_NUM_THREADS": str(threads), **OFFLINE_VARIABLES, **config.submit.env}.items():
        yield f"export {name}={shlex.quote(str(value))}"
