"""What was asked of a model and what came of it, line by line on the disk: an interrupted run goes on behind it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_vlm.data.plan.lock import DAY
from lit_vlm.data.quarantine import STOPPED
from lit_vlm.files import DamagedFile, append_line, read_json, writable, written
from lit_vlm.types import UserError

MANIFEST, ANSWERS, IMAGES = "manifest.json", "answers.jsonl", "images"
OWN = (MANIFEST, ANSWERS, IMAGES, "quarantine.jsonl", STOPPED)  # the last two are written by those who read the data


class Journal:
    """The folder beside an output file: `pairs.jsonl` has `pairs_files/`.

    `manifest.json` says what was asked for (the question) and whether all of it is done, `answers.jsonl` has a line for each
    prompt, `images/` the pictures that have no file of their own. The output is written at the end, whole.

    Attributes:
        lines: of the prompts that are done, by their keys.
        finished: all of them are, and the output is there.
    """

    def __init__(self, output: Path, question: dict[str, Any]) -> None:
        self.output, self.question = output, question
        self.folder = folder_of(output)
        self.lines: dict[str, dict[str, Any]] = {}
        self.finished = self.replaces = False

    @classmethod
    def open(cls, output: Path, question: dict[str, Any], *, overwrite: bool) -> Journal:
        """New, interrupted (it goes on) or finished. Nothing is written before `start`.

        With `overwrite`, what is finished or was another question is replaced; what was interrupted goes on.

        Raises:
            UserError: the output or its folder is there and belongs to something else.
        """
        journal = cls(output, json.loads(json.dumps(question)))  # as it will be read again
        try:
            known = _read_manifest(journal.folder)
        except DamagedFile:
            if not overwrite:
                raise
            known = {"question": {}, "status": "damaged"}
        different = _different(known["question"], journal.question) if known else []
        finished = bool(known) and known["status"] == "finished" and output.exists()
        if known is None and (output.exists() or journal.folder.exists()):
            journal._refuse_foreign(overwrite)
        elif different and not overwrite:
            raise UserError(
                f"{output} holds pairs of another question: they differ in {', '.join(different)}. "
                "Name another file with prefer.output=..., or replace this one with overwrite=true."
            )
        journal.replaces = overwrite and bool(known) and (bool(different) or finished)
        if known and not journal.replaces:
            journal.lines, journal.finished = {line["key"]: line for line in _read(journal.folder)}, finished
        return journal

    def start(self) -> None:
        """From here on it is this question's."""
        if self.replaces:
            for old in (self.output, self.folder / MANIFEST, self.folder / ANSWERS):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.folder / IMAGES, ignore_errors=True)
        self._write_manifest("running")

    def add(self, line: dict[str, Any]) -> None:
        """A prompt is done: its line is on the disk when this returns."""
        with writable(self.folder, "The answers", "prefer.output"):
            append_line(self.folder / ANSWERS, json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        self.lines[line["key"]] = line

    def finish(self, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        with written(self.output, "The pairs", "prefer.output") as draft, draft.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._write_manifest("finished", summary=summary)
        self.finished = True

    def _write_manifest(self, status: str, **more: Any) -> None:
        text = json.dumps({"status": status, "question": self.question, **more}, indent=2, ensure_ascii=False)
        with written(self.folder / MANIFEST, "The answers", "prefer.output") as draft:
            draft.write_text(text + "\n", encoding="utf-8")

    def _refuse_foreign(self, overwrite: bool) -> None:
        """A folder that is not ours stays, whatever is asked; a file may be replaced."""
        if self.folder.exists() and (not self.folder.is_dir() or set(os.listdir(self.folder)) - {*OWN}):
            raise UserError(f"{self.folder} is in the way and not of this task. Name another file: prefer.output=...")
        if self.output.is_dir() or (self.output.exists() and not overwrite):
            raise UserError(
                f"{self.output} exists and was not made by this task. Name another file with prefer.output=..., "
                "or replace it with overwrite=true."
            )


def folder_of(output: Path) -> Path:
    return output.with_name(f"{output.stem}_files")


def find_day(output: Path) -> str | None:
    """Find the day that the chat template wrote when the output was begun; None where it wrote none, or nothing is begun."""
    try:
        known = _read_manifest(folder_of(output)) or {}
    except DamagedFile:
        return None
    day = known.get("question", {}).get(DAY)
    return day if isinstance(day, str) else None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    remedy = f"Replace what is in {folder} with overwrite=true, or name another file with prefer.output=..."
    found = read_json(folder / MANIFEST, remedy)
    if found is not None and not (isinstance(found.get("question"), dict) and "status" in found):
        raise DamagedFile(f"{folder / MANIFEST} is damaged: it lacks what every one has. {remedy}")
    return found


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines that are whole; one that was torn by the end of its process is asked for again."""
    file = folder / ANSWERS
    text = file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""
    for line in text.split("\n"):  # not at every line separator of Unicode
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "key" in found:
            yield found


def _different(known: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*known, *asked}) if known.get(name) != asked.get(name)]
