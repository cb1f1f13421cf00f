"""Micro-batch limits after out of memory (OOM), stored in `budget.json` until the settings change.

Half of the tokens and tiles of a micro-batch need about half of the activation memory. The samples of a step stay the
same: the step is packed into more micro-batches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_vlm.files import read_json_or_none, write_json
from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.data.training_data import TrainingData

BUDGET_FILE = "budget.json"
MEMORY_HINT = (
    "Free memory otherwise: stage.activation_checkpointing=full, a strategy that shares out more, more devices"
)


@dataclass(frozen=True, slots=True)
class MicroBatchBudget:
    """Token and tile limits of a micro-batch, and the settings that they were halved from.

    Attributes:
        tokens: maximum tokens of a micro-batch.
        tiles: maximum tiles of a micro-batch.
        of_tokens: token limit of the settings.
        of_tiles: tile limit of the settings.
        halved: number of times that the limits were halved.
    """

    tokens: int
    tiles: int
    of_tokens: int
    of_tiles: int
    halved: int

    @classmethod
    def read(cls, run_dir: Path, training_data: TrainingData) -> MicroBatchBudget:
        """Read the limits of an earlier start; if there are none, or the settings have changed, return those of the settings."""
        settings = (training_data.max_tokens, training_data.max_tiles)
        try:
            found = cls(**read_json_or_none(run_dir / BUDGET_FILE))
        except TypeError:
            return cls(*settings, *settings, 0)
        if not all(type(value) is int and value >= 0 for value in asdict(found).values()):
            return cls(*settings, *settings, 0)
        return found if (found.of_tokens, found.of_tiles) == settings else cls(*settings, *settings, 0)

    def apply(self, training_data: TrainingData) -> None:
        """Lower the limits of the training data, if they were halved."""
        if self.halved:
            training_data.reduce_micro_batch_limits(self.tokens, self.tiles)

    def write(self, run_dir: Path) -> None:
        """Write the limits atomically. Several ranks may write at once; they write the same content."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / BUDGET_FILE, asdict(self))


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an out-of-memory error (OOM) of the device. Libraries below PyTorch raise their own error texts."""
    import torch  # imported here, because task=pipeline needs no torch

    texts = ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    is_known = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return is_known or isinstance(error, torch.OutOfMemoryError)


def halve_budget(run_dir: Path, training_data: TrainingData, max_halvings: int) -> MicroBatchBudget:
    """Halve the micro-batch limits and write them for the next start. No sample is dropped: the largest one still fits.

    If several ranks run out of memory together, the first one halves the limits, and the others read its result.

    Returns:
        the limits for the next start.

    Raises:
        UserError: the limits were halved `max_halvings` times before, or the largest sample alone does not fit, or a step
            cannot be split.
    """
    if not training_data.splits_steps:
        raise UserError(
            "A device ran out of memory, and a step of image-text pairs cannot be split: its losses compare all pairs. Lower "
            "data.global_batch_size or stage.image_size, or share it out over more devices."
        )
    before, smallest = MicroBatchBudget.read(run_dir, training_data), training_data.get_min_micro_batch_limits()
    if (
        before.halved
        and (max(before.tokens, smallest[0]), max(before.tiles, smallest[1])) != training_data.micro_batch_limits
    ):
        return before  # another rank has halved the limits since this start
    current = f"{training_data.micro_batch_limits[0]:,} tokens and {format_count(training_data.micro_batch_limits[1], 'tile')}"
    if before.halved >= max_halvings:
        raise UserError(
            f"A device ran out of memory with micro-batches of at most {current}, after the budget was halved {before.halved} "
            f"times (guard.max_oom_retries). {MEMORY_HINT}."
        )
    tokens, tiles = (
        max(training_data.micro_batch_limits[0] // 2, smallest[0]),
        max(training_data.micro_batch_limits[1] // 2, smallest[1]),
    )
    if (tokens, tiles) == training_data.micro_batch_limits:
        raise UserError(
            f"A device ran out of memory with micro-batches of at most {current}, and the largest sample alone needs as much. "
            f"{MEMORY_HINT}; or let no sample be so large: data.max_length, data.sources.<name>.max_tiles."
        )
    halved_budget = MicroBatchBudget(tokens, tiles, before.of_tokens, before.of_tiles, before.halved + 1)
    halved_budget.write(run_dir)
    return halved_budget
