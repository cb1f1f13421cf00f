"""Validation of the `logger` settings."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.config.settings import find_nearest, format_suggestion

ARTIFACTS = ("model", "lock", "report")


def find_logger_errors(logger: LoggerConfig) -> Iterator[str]:
    """Yield an error message for each unknown artifact, and for artifacts without W&B."""
    for name in logger.artifacts:
        if name not in ARTIFACTS:
            suggestion = format_suggestion(find_nearest(name, ARTIFACTS))
            yield f"logger.artifacts: there is no artifact {name}; there are {', '.join(ARTIFACTS)}.{suggestion}"
    if logger.artifacts and not logger.wandb:
        yield "logger.artifacts: are uploaded to Weights & Biases, and logger.wandb is false; choose logger=wandb."
