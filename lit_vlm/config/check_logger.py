"""Validation of the `logger` settings."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.config.settings import did_you_mean, nearest

ARTIFACTS = ("model", "lock", "report")


def mistakes_in_logger(logger: LoggerConfig) -> Iterator[str]:
    """Yield an error message for each unknown artifact, and for artifacts without W&B."""
    for name in logger.artifacts:
        if name not in ARTIFACTS:
            suggestion = did_you_mean(nearest(name, ARTIFACTS))
            yield f"logger.artifacts: there is no artifact {name}; there are {', '.join(ARTIFACTS)}.{suggestion}"
    if logger.artifacts and not logger.wandb:
        yield "logger.artifacts: are uploaded to Weights & Biases, and logger.wandb is false; choose logger=wandb."
