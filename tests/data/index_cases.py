"""Source over a JSONL file that logs which records it read, and folders of images for it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lit_vlm.data.lazy_images import FileImage
from lit_vlm.types import ImagePlaceholder, Language, Message, PreferencePair, RecordError, Role, Sample, SampleKind


class LinesSource:
    """Source of {"turns": [question, answer, ...], "images": [[path, turn], ...]}; with "rejected", of pairs."""

    def __init__(self, path: Path, name: str = "lines", *, seconds: float = 0, kill_until: Path | None = None) -> None:
        self.path, self.name, self.lines = path, name, path.read_bytes().splitlines()
        self.seconds, self.kill_until = (
            seconds,
            kill_until,
        )  # time of a record; record 5 kills the process until this file exists
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"\n".join(self.lines)).hexdigest()

    def digest_of(self, start: int, stop: int) -> str:
        return hashlib.sha256(b"\n".join([str(self.path.parent).encode(), *self.lines[start:stop]])).hexdigest()

    def origin(self, index: int) -> str:
        return f"{self.path.name}:{index + 1}"

    def __getitem__(self, index: int):
        self.reads.append(index)
        time.sleep(self.seconds)
        with open(self.path.with_suffix(".reads"), "a") as log:
            log.write(f"{index}\n")
        if index == 5 and self.kill_until and not self.kill_until.exists():
            if self.kill_until.name == "once":
                self.kill_until.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._parse_row(json.loads(self.lines[index]), self.origin(index))

    def _parse_row(self, row: dict, origin: str):
        if "turns" not in row:
            raise RecordError(origin, "missing 'turns'")
        roles = (Role.user, Role.assistant)
        images = row.get("images", [])
        messages = []
        for number, text in enumerate(row["turns"]):
            slots = tuple(ImagePlaceholder(i) for i, (_, turn) in enumerate(images) if turn == number)
            messages.append(Message(roles[number % 2], (*slots, text)))
        files = tuple(FileImage(path, self.path.parent, origin, 64_000_000) for path, _ in images)
        common = (origin, self.name, origin, SampleKind.instruction, Language.en)
        if "rejected" in row:
            rejected = Message(Role.assistant, (row["rejected"],))
            return PreferencePair(*common, tuple(messages[:-1]), messages[-1], rejected, files)
        return Sample(*common, tuple(messages), files)


def write(path: Path, rows: list[dict], mode: str = "w") -> Path:
    with open(path, mode) as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def save_photo(path: Path, width: int = 90, height: int = 60, seed: int = 0, orientation: int = 1) -> Path:
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(colours).resize((width, height)).save(path, quality=90, exif=exif)
    return path


def make_rows(folder: Path, count: int, pictures: int = 4) -> list[dict]:
    """Make rows: every third is text only, the others are about one of a few images."""
    for number in range(pictures):
        save_photo(folder / f"{number}.jpg", width=60 + 30 * number, seed=number)
    return [
        {"turns": [f"Question {i}?", f"Answer number {i}."]}
        | ({} if i % 3 == 0 else {"images": [[f"{i % pictures}.jpg", 0]]})
        for i in range(count)
    ]
