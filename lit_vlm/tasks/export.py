"""task=export: exports a run's checkpoint to a model folder, the same that the run writes at its end. Read top to bottom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import CheckpointIndex, CorruptCheckpointError
from lit_vlm.checkpoint.resume import check_files, find_state_mismatches, load_tensors, read_index
from lit_vlm.config import Run
from lit_vlm.config.pair_stages import PairStageConfig
from lit_vlm.config.schema import DataConfig, ModelConfig, StageConfig
from lit_vlm.config.settings import read_model_config
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.sharded_state import StateKind, TensorShard
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.fault_tolerance.run_lock import RunIsHeldError, RunLock
from lit_vlm.files import CorruptFileError, compute_weights_digest, lock_file
from lit_vlm.formatting import format_count
from lit_vlm.model.adapters import can_export_adapter, export_adapter, get_adapter_folder
from lit_vlm.model.box_tokens import TOKENIZER_FILE, has_special_boxes, set_special_boxes
from lit_vlm.model.export import export_model
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.model.tensor_files import raise_os_errors
from lit_vlm.runs.rebuild import read_config_file
from lit_vlm.runs.run_folder import (
    RunFolder,
    compute_parts_digest,
    describe_parent,
    read_manifest,
    read_manifest_or_empty,
)
from lit_vlm.stages import Stage
from lit_vlm.tasks.build_stage import make_stage
from lit_vlm.tasks.prepare_data import resolve_template_date, resolve_tiny_parts
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

AUTO = "auto"
EXPORT_LOCK = "export.lock"


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """Complete checkpoint, with the settings of its run."""

    path: Path
    index: CheckpointIndex
    init_from: str | None
    parts_dir: Path  # folder of the parts of the tiny model
    model: ModelConfig
    stage: StageConfig
    data: DataConfig  # tiling and lock; the rest has its defaults
    precision: str
    seed: int


def export(run: Run) -> None:
    """Export the newest complete checkpoint to `hf/` of a finished run, or to `hf-step-N/` of an unfinished one.

    The run is the folder at `init_from`, or the one of these settings; `resume_from` names another checkpoint of it. It may be under
    way: then its checkpoint is read while it trains on. If its model is there with the other value of `special_boxes`, only the
    files of its tokenizer are written again.

    Raises:
        UserError: there is no such run or no complete checkpoint, or the model that the run started from has changed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("task=export is one process. Start it with python run.py, not with torchrun.")
    disable_library_warnings()
    special_boxes = run.config.special_boxes
    if not run.config.overwrite and change_boxes(find_model_folder(run.init_from, run.dir), special_boxes):
        return
    folder = find_run_folder(run.init_from, run.dir)
    with RunLock(folder) as run_lock, lock_file(folder / EXPORT_LOCK):
        is_running = not acquire_lock(run_lock, folder)
        checkpoint = open_checkpoint(folder, run.config.resume_from, run.config.run_dir)
        manifest = read_manifest_or_empty(folder)
        is_last = checkpoint.index.step == (manifest.get("plan") or {}).get("steps")
        is_finished = manifest.get("status") == "finished" and is_last and not is_running
        target = folder / ("hf" if is_finished else f"hf-{checkpoint.path.name}")
        if not run.config.overwrite and change_boxes(target, special_boxes):
            return
        if target.is_dir() and not run.config.overwrite:
            raise UserError(f"{target} is there already. Use it, or make it anew with overwrite=true.")
        write_model(checkpoint, folder, target, special_boxes)
        if is_finished:
            RunFolder(folder, manifest).update(weights_digest=compute_weights_digest(target))
    note = (
        ""
        if is_finished
        else f" The run is not finished: this is its model after {format_count(checkpoint.index.step, 'step')}."
    )
    say(f"Model: {target}   From: {checkpoint.path}{note}")


def acquire_lock(run_lock: RunLock, folder: Path) -> bool:
    """Acquire the lock of a run; False if the run is training, which an export does not disturb.

    Raises:
        UserError: another process changes a finished run, or the lock files cannot be used.
    """
    try:
        run_lock.acquire()
    except RunIsHeldError:
        if read_manifest_or_empty(folder).get("status") == "finished":
            raise
        return False
    return True


def find_model_folder(init_from: str | None, run_dir: Path) -> Path:
    """Find the model folder: `init_from` itself, or `hf/` in it or in the folder of these settings. It need not exist."""
    if init_from is None:
        return run_dir / "hf"
    given = Path(init_from)
    return given if (given / TOKENIZER_FILE).is_file() else given / "hf"


def change_boxes(model_folder: Path, special_boxes: bool) -> bool:
    """Change the form of the box tokens in a model folder. Returns False if it has this form, or no box tokens.

    Raises:
        UserError: the folder is damaged or cannot be written.
    """
    if has_special_boxes(model_folder) != (not special_boxes):
        return False
    try:
        set_special_boxes(model_folder, special_boxes)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{model_folder} cannot be written: {reason}. Make room or change its rights.") from error
    form = "special tokens now" if special_boxes else "ordinary tokens now, which chat servers keep"
    say(f"Model: {model_folder}   Its box tokens are {form}; weights and ids are unchanged.")
    return True


def find_run_folder(init_from: str | None, run_dir: Path) -> Path:
    """Find the run folder: init_from names it or its model folder; otherwise it is the folder of these settings."""
    given = Path(init_from) if init_from else None
    folders = [given, given.parent] if given else []
    for folder in (*folders, run_dir):
        if (folder / "checkpoints").is_dir():
            return folder
    searched = given or run_dir
    model = next((place / "hf" for place in (searched, run_dir) if (place / "hf").is_dir()), None)
    description = f"its model is in {model} already" if model else "it holds no checkpoints/"
    raise UserError(
        f"{searched}: {description}. Name the folder of a run that has checkpoints: task=export init_from=runs/<name>, or the words "
        "that the run was started with, with task=export beside them."
    )


def open_checkpoint(folder: Path, resume_from: str, run_dir: str) -> RunCheckpoint:
    """Find the checkpoint and read the settings of its run.

    Args:
        resume_from: auto, or the folder of a checkpoint.
        run_dir: folder of all runs, if the settings of the run do not name it.
    """
    path, index = find_checkpoint(folder, resume_from)
    try:
        manifest = read_manifest(folder) or {}
    except CorruptFileError as error:
        say(f"{str(error).partition(' Start')[0]} The settings are read from what lies beside it.")
        manifest = {}
    settings = manifest.get("config") or read_config_file(folder) or index.belongs.get("settings") or {}
    config = read_model_config(settings, str(folder))
    parts_dir = Path(str(settings.get("run_dir") or run_dir)) / "parts"
    init_from = (manifest.get("parent") or {}).get("path") if manifest else settings.get("init_from")
    if init_from == "previous":
        raise UserError(
            f"{folder}: its manifest is lost, and with it the name of the model that it started from. Start the run again with "
            "its own words, which makes it anew."
        )
    return RunCheckpoint(
        path,
        index,
        init_from,
        parts_dir,
        config.model,
        config.stage,
        config.data,
        config.trainer.precision,
        config.seed,
    )


def find_checkpoint(folder: Path, resume_from: str) -> tuple[Path, CheckpointIndex]:
    """Find the newest complete checkpoint, or the one that `resume_from` names. Every byte of it is verified."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    is_named = resume_from != AUTO
    candidates = (
        [Path(resume_from).expanduser().resolve()]
        if is_named
        else list(map(checkpoints.get_step_path, checkpoints.list_steps()))
    )
    errors: list[str] = []
    for path in candidates:
        try:
            index = read_index(path)
            check_files(path, index)
            for problem in errors:
                say(f"{problem}. Takes the one before, {path.name}.")
            return path, index
        except CorruptCheckpointError as error:
            errors.append(str(error))
    found = "; ".join(errors) or "there is none"
    raise UserError(f"No checkpoint of {checkpoints.path} can be used: {found}. Start the run again to make one.")


def write_model(checkpoint: RunCheckpoint, folder: Path, target: Path, special_boxes: bool) -> None:
    """Build the model as the run did, load the checkpoint's weights into it, and export it to `target`."""
    if isinstance(checkpoint.stage, PairStageConfig):
        write_pair_model(checkpoint, checkpoint.stage, target)
        return
    settings = resolve_tiny_parts(checkpoint.model, checkpoint.parts_dir, checkpoint.seed)
    spec = load_model_spec(settings, checkpoint.init_from, checkpoint.data.tiling)
    require_same_parent(checkpoint, spec, folder)
    stage = build_export_stage(spec, checkpoint)
    model = stage.model
    assert model is not None
    load_trained_weights(checkpoint, model)
    with explain_write_errors(target):
        export_model(model, spec.tokenizer, spec.images, target, special_boxes=special_boxes)
        if can_export_adapter(model):
            export_adapter(model, spec.tokenizer, spec.images, get_adapter_folder(target))


def write_pair_model(checkpoint: RunCheckpoint, stage: PairStageConfig, target: Path) -> None:
    """Build the model of a stage of image-text pairs, load the checkpoint's weights into it, and export it to `target`."""
    from lit_vlm.tasks.pair_models import build_pair_model, resolve_pair_parts

    settings = (checkpoint.parts_dir, stage, checkpoint.model, checkpoint.init_from, checkpoint.seed)
    parts = resolve_pair_parts(*settings)
    digest = parts.compute_parent_digest((describe_parent(checkpoint.init_from) or {}).get("digest") or "")
    if checkpoint.index.belongs.get("parent") not in (None, "", digest):
        raise UserError(
            f"{checkpoint.path}: the run started from models whose weights are others now. Bring them back: what did not train is"
            " read from there."
        )
    model = build_pair_model(parts, stage, num_steps=1, global_batch_size=1, steps_per_epoch=1, seed=checkpoint.seed)
    load_trained_weights(checkpoint, model.stage.model)
    with explain_write_errors(target):
        model.save(model.stage.model, target)


def load_trained_weights(checkpoint: RunCheckpoint, model: nn.Module) -> None:
    """Load the weights of a checkpoint into the trainable parameters of a model.

    Raises:
        UserError: the checkpoint is of another model, or it was removed meanwhile.
    """
    index = checkpoint.index
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if mismatches := find_state_mismatches(index, {name: tuple(value.shape) for name, value in trainable.items()}):
        raise UserError(f"{checkpoint.path} is of another model: {'; '.join(mismatches[:3])}.")
    pieces = [
        TensorShard(name, StateKind.weight, tuple(one.shape), 0, one.detach().view(-1))
        for name, one in trainable.items()
    ]
    try:
        load_tensors(checkpoint.path, index, pieces)
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint.path} was removed while it was read: its run saved newer ones. Start the same command again, or keep more"
            " checkpoints with checkpoint.keep_last=..."
        ) from error


@contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Raise an error of the file system as UserError."""
    try:
        with raise_os_errors():
            yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"The model cannot be written to {target}: {reason}. Make room or change its rights."
        ) from error


def build_export_stage(spec: ModelSpec, checkpoint: RunCheckpoint) -> Stage:
    """Build the stage without what only training needs: no feature cache, and no reference model."""
    tiling, config = checkpoint.data.tiling.value, checkpoint.stage.make_export_config()
    stage = make_stage(spec, config, precision=checkpoint.precision, tiling=tiling, seed=checkpoint.seed)
    stage.configure_model()
    return stage


def require_same_parent(checkpoint: RunCheckpoint, spec: ModelSpec, folder: Path) -> None:
    """Raise UserError if frozen weights, tokenizer or chat template are not those that the checkpoint was trained with."""
    template_date, _ = resolve_template_date(checkpoint.model.template_date, folder, checkpoint.data.lock)
    current = {
        "processor": Processor(spec.tokenizer, spec.images, day=template_date).digest,
        "parent": (describe_parent(checkpoint.init_from) or {}).get("digest")
        or compute_parts_digest(spec.whole, spec.vision_tower, spec.language_model),
    }
    descriptions = {"processor": "tokenizer, chat template or image settings", "parent": "weights"}
    parent = checkpoint.init_from or f"{spec.vision_tower} and {spec.language_model}"
    for key, description in descriptions.items():
        known = checkpoint.index.belongs.get(key)
        if known and known != current[key]:
            raise UserError(
                f"{parent}: the run started from there, and the {description} are others now. Bring them back: what did not train is read "
                "from there."
            )
