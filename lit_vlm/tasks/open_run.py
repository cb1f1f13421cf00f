"""Opens a run: its sources and its folder. Imports no torch, so a finished run is reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.config.schema import DataConfig
from lit_vlm.data.quarantine import find_wrong_image_roots
from lit_vlm.data.selection import require_contamination_search
from lit_vlm.data.sources import open_source
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.formatting import format_count
from lit_vlm.loggers.tracker import RunTracker
from lit_vlm.runs.run_folder import (
    RunFolder,
    compute_sources_digest,
    describe_parent,
    is_rank_zero,
    open_run_folder,
    require_writable,
)
from lit_vlm.tasks.terminal import say
from lit_vlm.types import Source, UserError


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Name and folders of a run.

    Attributes:
        dir: run folder.
        index_dir: folder of data indexes and plans, shared by all runs.
        parts_dir: folder of the parts of the tiny model, shared by all runs.
        benchmark_dir: folder of the questions of benchmarks that are asked while a stage trains, shared by all runs.
    """

    name: str
    dir: Path
    index_dir: Path
    parts_dir: Path
    benchmark_dir: Path

    @classmethod
    def from_settings(cls, name: str, folder: Path, run_dir: str, index_dir: str | None) -> RunPlace:
        """Make the place from the run's name and folder, and the settings run_dir and data.index_dir."""
        root = Path(run_dir)
        return cls(name, folder, Path(index_dir or root / "index"), root / "parts", root / "benchmarks")

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Folder of the run's checkpoints."""
        return CheckpointFolder(self.dir / "checkpoints")

    def say(self, text: str) -> None:
        """Print a line that begins with the name of the run."""
        say(f"{self.name}: {text}")


@dataclass(frozen=True, slots=True)
class Sources:
    """Opened sources of a stage.

    Attributes:
        training: training sources, in the order of `data.sources`.
        validation: separate validation sources; empty: a share of the training sources is held out.
    """

    training: list[Source]
    validation: list[Source]

    def compute_digest(self) -> str:
        """Compute the digest of all sources, without reading their records."""
        return compute_sources_digest([*self.training, *self.validation])


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Point from which a start continues the run.

    Attributes:
        resume_from: auto, none, or the folder of a checkpoint.
        is_fresh: nothing of an earlier start is used.
    """

    resume_from: str
    is_fresh: bool


def open_sources(data: DataConfig, place: RunPlace, seed: int) -> Sources:
    """Open the training sources, and the validation sources if there are separate ones.

    Raises:
        UserError: the run folder cannot be written, a source cannot be opened, or all images of a source are missing.
    """
    require_writable(place.dir)
    for name, selection in require_contamination_search(data).items():
        left_out = format_count(len(selection.list_left_out()), "record")
        say(f"data.drop_contaminated: {name}: {left_out} of {selection.identity.num_records:,} left out")
    options: dict[str, Any] = {
        "max_image_pixels": data.max_image_pixels,
        "seed": seed,
        "cache": place.index_dir,
    }
    training = [open_source(name, source, **options) for name, source in data.sources.items()]
    validation = [
        open_source(name, source, held_out=True, **options) for name, source in data.validation.sources.items()
    ]
    errors = find_wrong_image_roots(training, data.sources)
    errors |= find_wrong_image_roots(validation, data.validation.sources, "data.validation.sources")
    if errors:
        raise UserError("\n".join(message for message, _ in errors.values()))
    return Sources(training, validation)


def open_run(
    place: RunPlace,
    settings: dict[str, Any],
    sources: Sources,
    init_from: str | None,
    run_lock: RunLock,
    *,
    overwrite: bool,
) -> RunFolder:
    """Open the run folder: it is new, interrupted or finished. An existing folder of a run that is not finished is locked.

    Args:
        settings: all settings of the run, for the manifest, see `to_plain`.
        init_from: model that the run starts from.

    Raises:
        UserError: the folder holds another run, or another process holds the lock.
    """
    digest, parent = sources.compute_digest(), describe_parent(init_from)

    def open_folder() -> RunFolder:
        return open_run_folder(
            place.dir, settings, name=place.name, overwrite=overwrite, data_digest=digest, parent=parent
        )

    folder = open_folder()
    if not folder.is_finished and place.dir.is_dir() and run_lock.acquire():
        folder = open_folder()  # another process may have trained this run until it released the lock
    if folder.rebuild_note:
        place.say(folder.rebuild_note)
    return folder


def report_finished(place: RunPlace, folder: RunFolder, tracker: RunTracker) -> None:
    """Report a finished run, which stays as it is: send what a tracker lacks, remove checkpoints that an interruption left."""
    if folder.rebuild_note:
        folder.update()
    if is_rank_zero() and folder.hf_path.is_dir():
        place.checkpoints.remove_all(keep_best=True)  # an earlier start was interrupted while it finished
    place.say(f"finished already, in {folder.path}. {format_export_hint(folder)}Start it anew with overwrite=true.")
    tracker.send_missing(folder)


def format_export_hint(folder: RunFolder) -> str:
    """Return the command that exports the model of a finished run; "" if the model is there already."""
    if folder.hf_path.is_dir():
        return ""
    return f"It left no model (export=false); python run.py task=export init_from={folder.path} makes it.   "


def choose_start_point(place: RunPlace, folder: RunFolder, resume_from: str, *, is_restart: bool) -> StartPoint:
    """Choose the point to continue from. A restart by the same command resumes from the last checkpoint, if there is one.

    Raises:
        UserError: resume_from is a checkpoint of the run that overwrite=true replaces.
    """
    checkpoints = place.checkpoints
    if folder.replaces_other_run and Path(resume_from).resolve().is_relative_to(checkpoints.path.resolve()):
        raise UserError(
            f"resume_from={resume_from} is a checkpoint of the run that overwrite=true replaces. Give this run a name "
            "of its own (run_name=...), or leave overwrite=true out."
        )
    is_fresh = folder.replaces_other_run or (resume_from == "none" and not is_restart)
    return StartPoint("auto" if is_restart and checkpoints.list_steps() else resume_from, is_fresh)
