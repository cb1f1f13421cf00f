"""Finds the checkpoint that a run resumes from: the newest valid one of the same run. All ranks choose the same one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_vlm.engine.checkpoint.belongs import Belongs, Consumed
from lit_vlm.engine.checkpoint.folder import Folder
from lit_vlm.engine.checkpoint.layout import INDEX, Damaged, Index
from lit_vlm.engine.checkpoint.read import check_files, misfits, read_index
from lit_vlm.engine.shards import Shards
from lit_vlm.types import UserError, counted

AUTO, NONE = "auto", "none"
ANEW = "resume_from=none starts the run from its beginning."

Found = tuple[Path, Index]
Say = Callable[[str], None]


def find(
    trainer: L.Trainer, shards: Shards, folder: Folder, resume_from: str, belongs: Belongs, say: Say
) -> Found | None:
    """Find the checkpoint to resume from and verify it completely.

    All ranks must call it at the same place.

    Args:
        state: state of this rank, whose tensors the checkpoint must contain.
        resume_from: "auto", "none", or the folder of a checkpoint.
        fingerprint: what the checkpoint must share with this run.
        say: receives the message about a corrupt checkpoint that is skipped.

    Returns:
        folder and index; None if the run starts from its beginning.

    Raises:
        UserError: the checkpoint belongs to another run, or no existing checkpoint can be used.
    """
    candidates, gone, refused = trainer.strategy.broadcast(
        _candidates(folder, resume_from) if trainer.is_global_zero else None
    )
    if refused:
        raise _told_by_first(trainer, refused)
    damage = [gone] if gone else []
    for path in candidates:
        problem = _judged(trainer, shards, path, belongs)
        if problem is None:
            for text in damage:
                say(f"{text}. Goes on from the one before, {path.name}.")
            return path, read_index(path)
        damage.append(problem)
    if damage:
        raise _told_by_first(trainer, _none_left(damage, folder, resume_from))
    return None


def _candidates(folder: Folder, resume_from: str) -> tuple[list[Path], str, str]:
    """List the folders that the run may resume from.

    Returns:
        the folders, the newest first; text about a missing latest checkpoint; text why resume_from is invalid.
    """
    if resume_from == NONE:
        return [], "", ""
    if resume_from != AUTO:
        return _named(Path(resume_from))
    steps, latest = folder.steps(), folder.latest()
    lost = latest is not None and latest not in steps
    return [folder.of(step) for step in steps], f"{folder.of(latest)} is missing" if lost and latest else "", ""


def _named(path: Path) -> tuple[list[Path], str, str]:
    """Resolve the folder of resume_from=<path>, without links and dots, because the folder's name contains the step."""
    resolved = path.expanduser().resolve()
    if (resolved / INDEX).is_file() or resolved.name.startswith("step-"):
        return [resolved], "", ""
    inside = [found.parent for found in sorted(resolved.glob(f"**/step-*/{INDEX}"))]
    there = f"It holds {', '.join(map(str, inside[-3:]))}; name one of them." if inside else "It holds none."
    return [], "", f"resume_from={path} is not the folder of a checkpoint (step-...). {there}"


def _judged(trainer: L.Trainer, shards: Shards, path: Path, belongs: Belongs) -> str | None:
    """Check one candidate; the ranks share the reading of its files.

    Returns:
        None if it can be used, else text about the corruption.

    Raises:
        UserError: the checkpoint belongs to another run.
    """
    refused, damaged = "", ""
    try:
        index = read_index(path)
        if problem := _foreign(trainer, shards, index, belongs):
            refused = (
                f"{path} cannot be gone on from: {problem}. Give this run a name of its own (run_name=...). {ANEW}"
            )
        else:
            check_files(path, index, trainer.global_rank, trainer.world_size)
    except Damaged as error:
        damaged = str(error)
    told = gathered(trainer, (refused, damaged))
    for text, _ in told:
        if text:
            raise _told_by_first(trainer, text)
    return next((text for _, text in told if text), None)


def _foreign(trainer: L.Trainer, shards: Shards, index: Index, belongs: Belongs) -> str:
    """Return why a valid checkpoint does not belong to this run; empty text if it does."""
    if different := belongs.differences(index.belongs):
        return f"it is of a run with another {'; '.join(different[:3])}"
    plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if plan is not None and index.step > plan.num_steps:
        return f"it has {counted(index.step, 'step')}, and this run takes {plan.num_steps:,}"
    if plan is not None and index.consumed and Consumed(plan).until(index.step) != index.consumed:
        return "its steps read other samples than this run's (other data, another mixture, or other caps)"
    found = misfits(index, shapes_of(trainer), shards.pieces())
    return f"another model: {'; '.join(found[:3])}" if found else ""


def shapes_of(trainer: L.Trainer) -> dict[str, tuple[int, ...]]:
    """Return name -> full (unsharded) shape of each trainable parameter, under every strategy."""
    module: Any = trainer.lightning_module
    named = getattr(module, "model", module).named_parameters()
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def gathered(trainer: L.Trainer, mine: Any) -> list[Any]:
    """Gather one object from every rank, in the order of the ranks."""
    if trainer.world_size == 1:
        return [mine]
    answers = [None] * trainer.world_size
    torch.distributed.all_gather_object(answers, mine)
    return answers


def _told_by_first(trainer: L.Trainer, text: str) -> UserError:
    """Make the error that all ranks raise; only rank 0 has the message."""
    return UserError(text if trainer.is_global_zero else "")


def _none_left(damage: Sequence[str], folder: Folder, resume_from: str) -> str:
    found = "; ".join(damage)
    if resume_from == AUTO:
        return f"No checkpoint in {folder.path} can be used: {found}. {ANEW}"
    others = [str(folder.of(step)) for step in folder.steps()[:3]]
    instead = f"The run's own are {', '.join(others)}; resume_from=auto takes the newest good one." if others else ANEW
    return f"resume_from={resume_from} cannot be used: {found}. {instead}"
