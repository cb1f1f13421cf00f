"""Reading of checkpoints: verify all files first, then load on each rank the intervals that it holds."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import (
    INDEX_FILE,
    CheckpointIndex,
    CorruptCheckpointError,
    RunFingerprint,
    SampleHash,
    StoredInterval,
    find_coverage_errors,
)
from lit_vlm.distributed.collectives import gather_objects, make_rank_zero_error
from lit_vlm.distributed.sharded_state import ShardedState, StateKind, TensorShard
from lit_vlm.formatting import format_count


def read_index(folder: Path) -> CheckpointIndex:
    """Read and verify the index of a checkpoint folder.

    Raises:
        CorruptCheckpointError: the index is missing, was changed, or belongs to another step.
    """
    file = folder / INDEX_FILE
    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise CorruptCheckpointError(f"{file} cannot be read ({error.strerror})") from None
    index = CheckpointIndex.from_text(text, file)
    if folder.name != f"step-{index.step:08d}":
        raise CorruptCheckpointError(f"{file} is the index of step {index.step}")
    for error_text in find_coverage_errors(index):
        raise CorruptCheckpointError(f"{file}: {error_text}")
    return index


def check_files(folder: Path, index: CheckpointIndex, rank: int = 0, world_size: int = 1) -> None:
    """Verify the sizes of all files, and the SHA-256 of every `world_size`-th file: together the ranks read each file once.

    Raises:
        CorruptCheckpointError: a file is missing, unreadable or changed. The text names it.
    """
    for stored in index.files:
        file = folder / stored.name
        if not file.is_file():
            raise CorruptCheckpointError(f"{file} is missing")
        if file.stat().st_size != stored.size:
            raise CorruptCheckpointError(f"{file} has {file.stat().st_size:,} bytes and had {stored.size:,}")
    for stored in index.files[rank::world_size]:
        try:
            digest = compute_file_digest(folder / stored.name)
        except OSError as error:
            raise CorruptCheckpointError(f"{folder / stored.name} cannot be read ({error.strerror})") from None
        if digest != stored.sha256:
            raise CorruptCheckpointError(f"{folder / stored.name} is not as it was written: its SHA-256 differs")


def find_state_mismatches(
    index: CheckpointIndex, shapes: dict[str, tuple[int, ...]], shards: Iterable[TensorShard] = ()
) -> list[str]:
    """Find differences between the stored tensors and the trainable parameters. Returns one text for each.

    Args:
        shapes: name -> shape of each trainable parameter.
        shards: shards that this rank will load.
    """
    stored, tensors = index.get_shapes(), index.group_by_tensor()
    missing_kinds = set()
    mismatches = [f"it lacks {name}" for name in shapes.keys() - stored.keys()]
    for shard in shards:
        parts = tensors.get((str(shard.kind), shard.name))
        if parts is None and shard.name in stored:
            missing_kinds.add(shard.kind)
        elif shard.kind is StateKind.buffer and (parts is None or parts[0].shape != shard.shape):
            found = f"{shard.name} is {list(parts[0].shape)} in it and {list(shard.shape)} here" if parts else ""
            mismatches.append(found or f"it lacks {shard.name}")
    mismatches += [f"it has {name}, which does not train" for name in stored.keys() - shapes.keys()]
    for name in stored.keys() & shapes.keys():
        if stored[name] != tuple(shapes[name]):
            mismatches.append(f"{name} is {list(stored[name])} in it and {list(shapes[name])} here")
    return sorted(mismatches) + [f"it lacks the optimizer's {kind}" for kind in sorted(missing_kinds)]


def load_tensors(folder: Path, index: CheckpointIndex, shards: Iterable[TensorShard]) -> None:
    """Load the stored values into the shards of this rank, in place. Any rank may have written them.

    Only the needed parts of each file are read.

    Args:
        shards: values [n] of each are overwritten.
    """
    tensors, open_files = index.group_by_tensor(), dict[str, Any]()
    starts = {key: [stored.start for stored in intervals] for key, intervals in tensors.items()}
    with torch.no_grad():
        for shard in shards:
            key, end = (str(shard.kind), shard.name), shard.start + len(shard.values)
            first = bisect_right(starts[key], shard.start) - 1
            for stored in tensors[key][max(0, first) :]:
                if stored.start >= end:
                    break
                if stored.file not in open_files:
                    open_files[stored.file] = safe_open(folder / stored.file, framework="pt")
                _copy_overlap(open_files[stored.file], stored, shard)


def _copy_overlap(file: Any, stored: StoredInterval, shard: TensorShard) -> None:
    """Copy the elements that a stored interval and a shard have in common."""
    begin, end = max(stored.start, shard.start), min(stored.stop, shard.start + len(shard.values))
    if begin < end:
        values = file.get_slice(stored.key)[begin - stored.start : end - stored.start]
        shard.values[begin - shard.start : end - shard.start].copy_(values)


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
        raise make_rank_zero_error(trainer, refusal)
    errors = [missing] if missing else []
    for path in candidates:
        error_text = _check_candidate(trainer, state, path, fingerprint)
        if error_text is None:
            for message in errors:
                say(f"{message}. Goes on from the one before, {path.name}.")
            return path, read_index(path)
        errors.append(error_text)
    if errors:
        raise make_rank_zero_error(trainer, _describe_no_usable_checkpoint(errors, folder, resume_from))
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
    results = gather_objects((refusal, corruption), trainer.world_size)
    for message, _ in results:
        if message:
            raise make_rank_zero_error(trainer, message)
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


def compute_file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
