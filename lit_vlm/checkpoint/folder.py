"""Folder of a run's checkpoints: complete steps, the pointer files `latest` and `best`, atomic removal. Reads no tensors."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from lit_vlm.files import read_json_or_none, sync_to_disk, write_json, write_text_atomically
from lit_vlm.types import UserError

LATEST_FILE, BEST_FILE = "latest", "best"
STEP_FOLDER_PATTERN = re.compile(r"step-(\d{8,})")


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: rename it first, so that no incomplete folder ever has the name of a checkpoint."""
    hidden_path = path.with_name(f".gone-{path.name.lstrip('.')}-{uuid4().hex}")
    os.rename(path, hidden_path)
    shutil.rmtree(hidden_path, ignore_errors=True)  # on some systems an open file stays; `clean_before_run` removes it


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """Folder `<run>/checkpoints`, with one subfolder for each saved step.

    Only rank 0 removes, renames and updates the pointer files. A subfolder whose name has no leading dot is complete.
    """

    path: Path

    def get_step_path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.path / f"step-{step:08d}"

    def get_temporary_path(self, step: int) -> Path:
        """Return the temporary folder in which the checkpoint of a step is written."""
        return self.path / f".step-{step:08d}"

    def list_steps(self) -> list[int]:
        """List the steps of all complete checkpoints, the newest first."""
        entries = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(
            (int(match[1]) for entry in entries if (match := STEP_FOLDER_PATTERN.fullmatch(entry.name))), reverse=True
        )

    def move_into_place(self, step: int) -> None:
        """Rename the temporary folder of a step to its final name, and point `latest` to it."""
        temporary, target = self.get_temporary_path(step), self.get_step_path(step)
        sync_to_disk(temporary)
        if target.exists():
            remove_folder(target)
        os.rename(temporary, target)
        sync_to_disk(self.path)
        write_text_atomically(self.path / LATEST_FILE, f"{target.name}\n")

    def read_latest_step(self) -> int | None:
        """Return the step that the pointer file `latest` names, even if its folder is missing. None without a valid pointer."""
        file = self.path / LATEST_FILE
        match = (
            STEP_FOLDER_PATTERN.fullmatch(file.read_text(encoding="utf-8", errors="replace").strip())
            if file.is_file()
            else None
        )
        return int(match[1]) if match else None

    def mark_best(self, step: int, value: float, metric: str = "val/loss") -> None:
        """Write the pointer file `best` with a step and the value of its metric."""
        key = metric.replace("/", "_")
        write_json(self.path / BEST_FILE, {"checkpoint": self.get_step_path(step).name, key: value})

    def read_best(self, metric: str | None = None) -> tuple[int, float] | None:
        """Return step and value of the best checkpoint; None if there is none or if its folder is missing.

        Args:
            metric: None if the best is of another metric; without it, whichever metric it is.
        """
        pointer = read_json_or_none(self.path / BEST_FILE)
        try:
            values = {key: float(value) for key, value in pointer.items() if key != "checkpoint"}
            match = STEP_FOLDER_PATTERN.fullmatch(pointer["checkpoint"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        value = values.get(metric.replace("/", "_")) if metric else next(iter(values.values()), None)
        if match is None or value is None or not self.get_step_path(int(match[1])).is_dir():
            return None
        return int(match[1]), value

    def remove_old(self, keep_last: int) -> None:
        """Remove all checkpoints except the newest `keep_last` and the best."""
        best = self.read_best()
        for step in self.list_steps()[keep_last:]:
            if best is None or step != best[0]:
                with contextlib.suppress(OSError):  # the new checkpoint is complete; the next call tries again
                    remove_folder(self.get_step_path(step))

    def clean_before_run(self, resume_step: int) -> None:
        """Remove leftovers of killed writers and checkpoints later than the resumed step, before a run writes here.

        Raises:
            UserError: a folder has the name of a pointer file, or a file has the name of the checkpoint folder.
        """
        for pointer in (self.path / LATEST_FILE, self.path / BEST_FILE):
            if pointer.is_dir():
                raise UserError(
                    f"{pointer} is a folder, and a file that names a checkpoint is kept there. Remove it, and start the run again."
                )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"{self.path} is no folder, and checkpoints are kept there. Remove it, and start the run again."
            )
        if not self.path.is_dir():
            return
        for entry in self.path.iterdir():
            if entry.name.startswith("."):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        for later_step in self.list_steps():
            if later_step > resume_step:
                remove_folder(self.get_step_path(later_step))
        if self.read_best() is None:
            (self.path / BEST_FILE).unlink(missing_ok=True)
        remaining_steps = self.list_steps()
        if remaining_steps and self.read_latest_step() != remaining_steps[0]:
            write_text_atomically(self.path / LATEST_FILE, f"{self.get_step_path(remaining_steps[0]).name}\n")
        elif not remaining_steps:
            (self.path / LATEST_FILE).unlink(missing_ok=True)

    def remove_all(self, *, keep_best: bool = False) -> None:
        """Remove all checkpoints once the run is finished and its model is saved, and leftovers of a killed removal.

        Args:
            keep_best: keep the best checkpoint.
        """
        for leftover in (*self.path.glob(".*"), *self.path.parent.glob(f".gone-{self.path.name}-*")):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        best = self.read_best() if keep_best else None
        if best is None:
            if self.path.is_dir():
                remove_folder(self.path)
            return
        for step in self.list_steps():
            if step != best[0]:
                remove_folder(self.get_step_path(step))
        write_text_atomically(self.path / LATEST_FILE, f"{self.get_step_path(best[0]).name}\n")
