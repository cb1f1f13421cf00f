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
    candidates, missing, refusal = trainer.strategy.broadcast(
        _candidates(folder, resume_from) if trainer.is_global_zero else None
    )
    if refusal:
        raise _told_by_first(trainer, refusal)
    errors = [missing] if missing else []
    for path in candidates:
        error_text = _judged(trainer, shards, path, belongs)
        if error_text is None:
            for message in errors:
                say(f"{message}. Goes on from the one before, {path.name}.")
            return path, read_index(path)
        errors.append(error_text)
    if errors:
        raise _told_by_first(trainer, _none_left(errors, folder, resume_from))
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
    is_lost = latest is not None and latest not in steps
    return [folder.of(step) for step in steps], f"{folder.of(latest)} is missing" if is_lost and latest else "", ""


def _named(path: Path) -> tuple[list[Path], str, str]:
    """Resolve the folder of resume_from=<path>, without links and dots, because the folder's name contains the step."""
    resolved = path.expanduser().resolve()
    if (resolved / INDEX).is_file() or resolved.name.startswith("step-"):
        return [resolved], "", ""
    nested_folders = [index_file.parent for index_file in sorted(resolved.glob(f"**/step-*/{INDEX}"))]
    contents = (
        f"It holds {', '.join(map(str, nested_folders[-3:]))}; name one of them."
        if nested_folders
        else "It holds none."
    )
    return [], "", f"resume_from={path} is not the folder of a checkpoint (step-...). {contents}"


def _judged(trainer: L.Trainer, shards: Shards, path: Path, belongs: Belongs) -> str | None:
    """Check one candidate; the ranks share the reading of its files.

    Returns:
        None if it can be used, else text about the corruption.

    Raises:
        UserError: the checkpoint belongs to another run.
    """
    refusal, corruption = "", ""
    try:
        index = read_index(path)
        if mismatch := _foreign(trainer, shards, index, belongs):
            refusal = (
                f"{path} cannot be gone on from: {mismatch}. Give this run a name of its own (run_name=...). {ANEW}"
            )
        else:
            check_files(path, index, trainer.global_rank, trainer.world_size)
    except Damaged as error:
        corruption = str(error)
    results = gathered(trainer, (refusal, corruption))
    for message, _ in results:
        if message:
            raise _told_by_first(trainer, message)
    return next((message for _, message in results if message), None)


def _foreign(trainer: L.Trainer, shards: Shards, index: Index, belongs: Belongs) -> str:
    """Return why a valid checkpoint does not belong to this run; empty text if it does."""
    if differences := belongs.differences(index.belongs):
        return f"it is of a run with another {'; '.join(differences[:3])}"
    plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if plan is not None and index.step > plan.num_steps:
        return f"it has {counted(index.step, 'step')}, and this run takes {plan.num_steps:,}"
    if plan is not None and index.consumed and Consumed(plan).until(index.step) != index.consumed:
        return "its steps read other samples than this run's (other data, another mixture, or other caps)"
    mismatches = misfits(index, shapes_of(trainer), shards.pieces())
    return f"another model: {'; '.join(mismatches[:3])}" if mismatches else ""


def shapes_of(trainer: L.Trainer) -> dict[str, tuple[int, ...]]:
    """Return name -> full (unsharded) shape of each trainable parameter, under every strategy."""
    module: Any = trainer.lightning_module
    named_parameters = getattr(module, "model", module).named_parameters()
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in named_parameters
        if parameter.requires_grad
    }


def gathered(trainer: L.Trainer, mine: Any) -> list[Any]:
    """Gather one object from every rank, in the order of the ranks."""
    if trainer.world_size == 1:
        return [mine]
    values = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, mine)
    return values


def _told_by_first(trainer: L.Trainer, text: str) -> UserError:
    """Make the error that all ranks raise; only rank 0 has the message."""
    return UserError(text if trainer.is_global_zero else "")


def _none_left(damage: Sequence[str], folder: Folder, resume_from: str) -> str:
    joined_errors = "; ".join(damage)
    if resume_from == AUTO:
        return f"No checkpoint in {folder.path} can be used: {joined_errors}. {ANEW}"
    other_paths = [str(folder.of(step)) for step in folder.steps()[:3]]
    alternative = (
        f"The run's own are {', '.join(other_paths)}; resume_from=auto takes the newest good one."
        if other_paths
        else ANEW
    )
    return f"resume_from={resume_from} cannot be used: {joined_errors}. {alternative}"
