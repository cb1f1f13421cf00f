"""Finds the checkpoint that a run resumes from: the newest valid one of the same run. All ranks choose the same one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_vlm.engine.checkpoint.belongs import RunFingerprint, SampleHash
from lit_vlm.engine.checkpoint.folder import CheckpointFolder
from lit_vlm.engine.checkpoint.layout import INDEX_FILE, CheckpointIndex, CorruptCheckpointError
from lit_vlm.engine.checkpoint.read import check_files, find_state_mismatches, read_index
from lit_vlm.engine.shards import ShardedState
from lit_vlm.types import UserError, format_count

AUTO, NONE = "auto", "none"
RESTART_HINT = "resume_from=none starts the run from its beginning."

FoundCheckpoint = tuple[Path, CheckpointIndex]
Say = Callable[[str], None]


def find_resume_checkpoint(
    trainer: L.Trainer,
    state: ShardedState,
    folder: CheckpointFolder,
    resume_from: str,
    fingerprint: RunFingerprint,
    say: Say,
) -> FoundCheckpoint | None:
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
        _list_candidates(folder, resume_from) if trainer.is_global_zero else None
    )
    if refusal:
        raise _make_rank_zero_error(trainer, refusal)
    errors = [missing] if missing else []
    for path in candidates:
        error_text = _check_candidate(trainer, state, path, fingerprint)
        if error_text is None:
            for message in errors:
                say(f"{message}. Goes on from the one before, {path.name}.")
            return path, read_index(path)
        errors.append(error_text)
    if errors:
        raise _make_rank_zero_error(trainer, _describe_no_usable_checkpoint(errors, folder, resume_from))
    return None


def _list_candidates(folder: CheckpointFolder, resume_from: str) -> tuple[list[Path], str, str]:
    """List the folders that the run may resume from.

    Returns:
        the folders, the newest first; text about a missing latest checkpoint; text why resume_from is invalid.
    """
    if resume_from == NONE:
        return [], "", ""
    if resume_from != AUTO:
        return _resolve_named_checkpoint(Path(resume_from))
    steps, latest = folder.list_steps(), folder.read_latest_step()
    is_lost = latest is not None and latest not in steps
    return (
        [folder.get_step_path(step) for step in steps],
        f"{folder.get_step_path(latest)} is missing" if is_lost and latest else "",
        "",
    )


def _resolve_named_checkpoint(path: Path) -> tuple[list[Path], str, str]:
    """Resolve the folder of resume_from=<path>, without links and dots, because the folder's name contains the step."""
    resolved = path.expanduser().resolve()
    if (resolved / INDEX_FILE).is_file() or resolved.name.startswith("step-"):
        return [resolved], "", ""
    nested_folders = [index_file.parent for index_file in sorted(resolved.glob(f"**/step-*/{INDEX_FILE}"))]
    contents = (
        f"It holds {', '.join(map(str, nested_folders[-3:]))}; name one of them."
        if nested_folders
        else "It holds none."
    )
    return [], "", f"resume_from={path} is not the folder of a checkpoint (step-...). {contents}"


def _check_candidate(trainer: L.Trainer, state: ShardedState, path: Path, fingerprint: RunFingerprint) -> str | None:
    """Check one candidate; the ranks share the reading of its files.

    Returns:
        None if it can be used, else text about the corruption.

    Raises:
        UserError: the checkpoint belongs to another run.
    """
    refusal, corruption = "", ""
    try:
        index = read_index(path)
        if mismatch := _find_mismatch(trainer, state, index, fingerprint):
            refusal = f"{path} cannot be gone on from: {mismatch}. Give this run a name of its own (run_name=...). {RESTART_HINT}"
        else:
            check_files(path, index, trainer.global_rank, trainer.world_size)
    except CorruptCheckpointError as error:
        corruption = str(error)
    results = gather_objects(trainer, (refusal, corruption))
    for message, _ in results:
        if message:
            raise _make_rank_zero_error(trainer, message)
    return next((message for _, message in results if message), None)


def _find_mismatch(trainer: L.Trainer, state: ShardedState, index: CheckpointIndex, fingerprint: RunFingerprint) -> str:
    """Return why a valid checkpoint does not belong to this run; empty text if it does."""
    if differences := fingerprint.find_differences(index.belongs):
        return f"it is of a run with another {'; '.join(differences[:3])}"
    plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if plan is not None and index.step > plan.num_steps:
        return f"it has {format_count(index.step, 'step')}, and this run takes {plan.num_steps:,}"
    if plan is not None and index.consumed and SampleHash(plan).compute_digest(index.step) != index.consumed:
        return "its steps read other samples than this run's (other data, another mixture, or other caps)"
    mismatches = find_state_mismatches(index, get_trainable_shapes(trainer), state.iter_shards())
    return f"another model: {'; '.join(mismatches[:3])}" if mismatches else ""


def get_trainable_shapes(trainer: L.Trainer) -> dict[str, tuple[int, ...]]:
    """Return name -> full (unsharded) shape of each trainable parameter, under every strategy."""
    module: Any = trainer.lightning_module
    named_parameters = getattr(module, "model", module).named_parameters()
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in named_parameters
        if parameter.requires_grad
    }


def gather_objects(trainer: L.Trainer, value: Any) -> list[Any]:
    """Gather one object from every rank, in the order of the ranks."""
    if trainer.world_size == 1:
        return [value]
    values = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _make_rank_zero_error(trainer: L.Trainer, text: str) -> UserError:
    """Make the error that all ranks raise; only rank 0 has the message."""
    return UserError(text if trainer.is_global_zero else "")


def _describe_no_usable_checkpoint(errors: Sequence[str], folder: CheckpointFolder, resume_from: str) -> str:
    joined_errors = "; ".join(errors)
    if resume_from == AUTO:
        return f"No checkpoint in {folder.path} can be used: {joined_errors}. {RESTART_HINT}"
    other_paths = [str(folder.get_step_path(step)) for step in folder.list_steps()[:3]]
    alternative = (
        f"The run's own are {', '.join(other_paths)}; resume_from=auto takes the newest good one."
        if other_paths
        else RESTART_HINT
    )
    return f"resume_from={resume_from} cannot be used: {joined_errors}. {alternative}"
