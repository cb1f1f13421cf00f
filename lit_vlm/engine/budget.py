"""The micro-batch budget of a run whose device ran out of memory: `budget.json`, until the settings name another one.

Half the tokens and tiles of a micro-batch are about half of what the activations need. The samples of a step stay the
same; it is dealt into more micro-batches.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_vlm.files import write_json
from lit_vlm.types import UserError, counted

if TYPE_CHECKING:
    from lit_vlm.data.datamodule import DataModule

NAME = "budget.json"
STEPS_DOWN = "Free memory otherwise: stage.activation_checkpointing=full, a strategy that shares out more, more devices"


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps of a micro-batch, and the settings that they were halved from."""

    tokens: int
    tiles: int
    of_tokens: int
    of_tiles: int
    halved: int  # how often

    @classmethod
    def read(cls, run_dir: Path, datamodule: DataModule) -> Budget:
        """What an earlier start left; else, and where the settings are others now, the settings'."""
        settings = (datamodule.most_tokens, datamodule.most_tiles)
        try:
            found = cls(**json.loads((run_dir / NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls(*settings, *settings, 0)
        if not all(type(value) is int and value >= 0 for value in asdict(found).values()):
            return cls(*settings, *settings, 0)
        return found if (found.of_tokens, found.of_tiles) == settings else cls(*settings, *settings, 0)

    def apply(self, datamodule: DataModule) -> None:
        if self.halved:
            datamodule.lower_budget(self.tokens, self.tiles)

    def write(self, run_dir: Path) -> None:
        """Whole or not at all. Several ranks may; they write the same."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / NAME, asdict(self))


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device; libraries below PyTorch have words of their own for it."""
    import torch  # not for task=pipeline, which computes nothing itself

    words = ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    known = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return known or isinstance(error, torch.OutOfMemoryError)


def halve_budget(run_dir: Path, datamodule: DataModule, most_times: int) -> Budget:
    """Write half the budget for the next start to read. Nothing is dropped for it: the largest sample still fits.

    Of several ranks that run out of memory together the first to come halves it, and the others find what it wrote.

    Raises:
        UserError: it was halved `most_times` before, or the largest sample alone is what does not fit.
    """
    before, smallest = Budget.read(run_dir, datamodule), datamodule.smallest_budget()
    if before.halved and (max(before.tokens, smallest[0]), max(before.tiles, smallest[1])) != datamodule.budget:
        return before  # not what this start read
    now = f"{datamodule.budget[0]:,} tokens and {counted(datamodule.budget[1], 'tile')}"
    if before.halved >= most_times:
        raise UserError(
            f"A device ran out of memory with micro-batches of at most {now}, after the budget was halved {before.halved} "
            f"times (guard.max_oom_retries). {STEPS_DOWN}."
        )
    tokens, tiles = max(datamodule.budget[0] // 2, smallest[0]), max(datamodule.budget[1] // 2, smallest[1])
    if (tokens, tiles) == datamodule.budget:
        raise UserError(
            f"A device ran out of memory with micro-batches of at most {now}, and the largest sample alone needs as much. "
            f"{STEPS_DOWN}; or let no sample be so large: data.max_length, data.sources.<name>.max_tiles."
        )
    half = Budget(tokens, tiles, before.of_tokens, before.of_tiles, before.halved + 1)
    half.write(run_dir)
    return half
