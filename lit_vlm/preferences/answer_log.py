"""Log of generated answers on disk, one line for each prompt, so that an interrupted task resumes after the last line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lit_vlm.data.packing.mixture_lock import TEMPLATE_DATE_KEY
from lit_vlm.data.quarantine import BAD_RECORDS_FILE
from lit_vlm.files import CorruptFileError, append_line, atomic_write, handle_write_errors, read_json, read_json_lines
from lit_vlm.types import UserError

MANIFEST, ANSWERS, IMAGES = "manifest.json", "answers.jsonl", "images"
OWN_FILES = (
    MANIFEST,
    ANSWERS,
    IMAGES,
    "quarantine.jsonl",
    BAD_RECORDS_FILE,
)  # the code that reads the data writes the last two


class AnswerLog:
    """Log folder of an output file: `pairs.jsonl` has `pairs_files/`.

    `manifest.json` holds the request (all settings that decide the pairs) and the status, `answers.jsonl` one line for each
    prompt, `images/` the images that have no file of their own. The output file is written once, at the end.

    Attributes:
        lines: lines of the finished prompts, by their keys.
        is_finished: all prompts are finished and the output file exists.
        replaces_existing: `start` deletes the files of an earlier request.
    """

    def __init__(self, output: Path, request: dict[str, Any]) -> None:
        self.output, self.request = output, request
        self.folder = get_log_folder(output)
        self.lines: dict[str, dict[str, Any]] = {}
        self.is_finished = self.replaces_existing = False

    @classmethod
    def open(cls, output: Path, request: dict[str, Any], *, overwrite: bool) -> AnswerLog:
        """Open the log of an output file: new, interrupted (it resumes) or finished. Nothing is written before `start`.

        Args:
            output: the file of pairs.
            request: all settings that decide the pairs, as JSON values.
            overwrite: replace a finished log or one of another request; an interrupted one resumes.

        Raises:
            UserError: the output or its folder exists and belongs to something else.
        """
        log = cls(output, json.loads(json.dumps(request)))  # in the form in which it is read back
        try:
            manifest = _read_manifest(log.folder)
        except CorruptFileError:
            if not overwrite:
                raise
            manifest = {"question": {}, "status": "damaged"}
        differences = _find_differences(manifest["question"], log.request) if manifest else []
        is_finished = manifest is not None and manifest["status"] == "finished" and output.exists()
        if manifest is None and (output.exists() or log.folder.exists()):
            log._require_own_files(overwrite)
        elif differences and not overwrite:
            raise UserError(
                f"{output} holds pairs of another question: they differ in {', '.join(differences)}. "
                "Name another file with prefer.output=..., or replace this one with overwrite=true."
            )
        log.replaces_existing = overwrite and bool(manifest) and (bool(differences) or is_finished)
        if manifest and not log.replaces_existing:
            rows = read_json_lines(log.folder / ANSWERS)  # the prompt of an incomplete line is processed again
            log.lines, log.is_finished = {row["key"]: row for row in rows if "key" in row}, is_finished
        return log

    def start(self) -> None:
        """Claim the folder for this request: delete replaced files and write the manifest."""
        if self.replaces_existing:
            for old in (self.output, self.folder / MANIFEST, self.folder / ANSWERS):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.folder / IMAGES, ignore_errors=True)
        self._write_manifest("running")

    def add(self, line: dict[str, Any]) -> None:
        """Append the line of a finished prompt. It is on disk when this returns."""
        with handle_write_errors(self.folder, "The answers", "prefer.output"):
            append_line(self.folder / ANSWERS, json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        self.lines[line["key"]] = line

    def write_output(self, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Write the output file and mark the log as finished."""
        with (
            atomic_write(self.output, "The pairs", "prefer.output") as draft,
            draft.open("w", encoding="utf-8") as stream,
        ):
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._write_manifest("finished", summary=summary)
        self.is_finished = True

    def _write_manifest(self, status: str, **more: Any) -> None:
        text = json.dumps({"status": status, "question": self.request, **more}, indent=2, ensure_ascii=False)
        with atomic_write(self.folder / MANIFEST, "The answers", "prefer.output") as draft:
            draft.write_text(text + "\n", encoding="utf-8")

    def _require_own_files(self, overwrite: bool) -> None:
        """Require that existing files are of this task. A folder of something else is never replaced, a file is with overwrite."""
        if self.folder.exists() and (not self.folder.is_dir() or set(os.listdir(self.folder)) - {*OWN_FILES}):
            raise UserError(f"{self.folder} is in the way and not of this task. Name another file: prefer.output=...")
        if self.output.is_dir() or (self.output.exists() and not overwrite):
            raise UserError(
                f"{self.output} exists and was not made by this task. Name another file with prefer.output=..., "
                "or replace it with overwrite=true."
            )


def get_log_folder(output: Path) -> Path:
    """Return the log folder of an output file."""
    return output.with_name(f"{output.stem}_files")


def find_template_day(output: Path) -> str | None:
    """Find the date that the chat template wrote when the log was started; None if it wrote none or there is no log."""
    try:
        manifest = _read_manifest(get_log_folder(output)) or {}
    except CorruptFileError:
        return None
    day = manifest.get("question", {}).get(TEMPLATE_DATE_KEY)
    return day if isinstance(day, str) else None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    remedy = f"Replace what is in {folder} with overwrite=true, or name another file with prefer.output=..."
    manifest = read_json(folder / MANIFEST, remedy)
    if manifest is not None and not (isinstance(manifest.get("question"), dict) and "status" in manifest):
        raise CorruptFileError(f"{folder / MANIFEST} is damaged: it lacks what every one has. {remedy}")
    return manifest


def _find_differences(known: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*known, *requested}) if known.get(name) != requested.get(name)]
