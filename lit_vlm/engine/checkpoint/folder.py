"""The checkpoint folder of a run: list, find the latest and the best, remove old checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.engine.checkpoint.durable import remove_folder
from lit_vlm.files import sync, write_atomically, write_json
from lit_vlm.types import UserError

LATEST, BEST = "latest", "best"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Folder:
    """Folder `<run>/checkpoints`, with one subfolder for each saved step.

    Only rank 0 removes, renames and updates the pointer files. A subfolder whose name has no leading dot is complete.
    """

    path: Path

    def of(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.path / f"step-{step:08d}"

    def draft(self, step: int) -> Path:
        """Return the temporary folder in which the checkpoint of a step is written."""
        return self.path / f".step-{step:08d}"

    def steps(self) -> list[int]:
        """List the steps of all complete checkpoints, the newest first."""
        entries = self.path.iterdir() if self.path.is_dir() else ()
        return sorted((int(match[1]) for entry in entries if (match := NAME.fullmatch(entry.name))), reverse=True)

    def place(self, step: int) -> None:
        """Rename the temporary folder of a step to its final name, and point `latest` to it."""
        temporary, target = self.draft(step), self.of(step)
        sync(temporary)
        if target.exists():
            remove_folder(target)
        os.rename(temporary, target)
        sync(self.path)
        write_atomically(self.path / LATEST, f"{target.name}\n")

    def latest(self) -> int | None:
        """Return the step that the pointer file `latest` names, even if its folder is missing. None without a valid pointer."""
        file = self.path / LATEST
        match = NAME.fullmatch(file.read_text(encoding="utf-8", errors="replace").strip()) if file.is_file() else None
        return int(match[1]) if match else None

    def point_to_best(self, step: int, loss: float) -> None:
        """Write the pointer file `best` with a step and its val/loss."""
        write_json(self.path / BEST, {"checkpoint": self.of(step).name, "val_loss": loss})

    def best(self) -> tuple[int, float] | None:
        """Return step and val/loss of the best checkpoint; None if there is none or if its folder is missing."""
        try:
            pointer = json.loads((self.path / BEST).read_text(encoding="utf-8"))
            match = NAME.fullmatch(pointer["checkpoint"])
            loss = float(pointer["val_loss"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (int(match[1]), loss) if match and self.of(int(match[1])).is_dir() else None

    def prune(self, keep_last: int) -> None:
        """Remove all checkpoints except the newest `keep_last` and the best."""
        best = self.best()
        for step in self.steps()[keep_last:]:
            if best is None or step != best[0]:
                with contextlib.suppress(OSError):  # the new checkpoint is complete; the next call tries again
                    remove_folder(self.of(step))

    def sweep(self, step: int) -> None:
        """Remove leftovers of killed writers and checkpoints later than the resumed step, before a run writes here.

        Raises:
            UserError: a folder has the name of a pointer file, or a file has the name of the checkpoint folder.
        """
        for pointer in (self.path / LATEST, self.path / BEST):
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
        for later_step in self.steps():
            if later_step > step:
                remove_folder(self.of(later_step))
        if self.best() is None:
            (self.path / BEST).unlink(missing_ok=True)
        remaining_steps = self.steps()
        if remaining_steps and self.latest() != remaining_steps[0]:
            write_atomically(self.path / LATEST, f"{self.of(remaining_steps[0]).name}\n")
        elif not remaining_steps:
            (self.path / LATEST).unlink(missing_ok=True)

    def remove(self, *, but_best: bool = False) -> None:
        """Remove all checkpoints once the run is finished and its model is saved, and leftovers of a killed removal.

        Args:
            keep_best: keep the checkpoint with the lowest val/loss.
        """
        for leftover in (*self.path.glob(".*"), *self.path.parent.glob(f".gone-{self.path.name}-*")):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        best = self.best() if but_best else None
        if best is None:
            if self.path.is_dir():
                remove_folder(self.path)
            return
        for step in self.steps():
            if step != best[0]:
                remove_folder(self.of(step))
        write_atomically(self.path / LATEST, f"{self.of(best[0]).name}\n")
