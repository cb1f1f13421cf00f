"""Generated turns: files of task=generate and task=curate, whose turns take the place of a source's own. Pictures stay those of the records.

A file points at the records and copies no picture. `data.sources.<name>.generated` applies it to a source of any format. It
belongs to the records that it was made from: their number and a digest are compared when it is read. Its first line says what
it is; each other line holds the turns of one new sample. Control tokens and pictures are parts of their own, so no text that a
model wrote can become one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.data.selection import RowsIdentity, describe_changed_rows
from lit_vlm.files import atomic_write
from lit_vlm.types import (
    ContentPart,
    ControlToken,
    Fault,
    ImagePlaceholder,
    Language,
    Message,
    Record,
    RecordError,
    Role,
    Sample,
    SampleKind,
    Source,
    UserError,
)

GENERATED_VERSION = 1
GENERATED_SUFFIX = ".generated.jsonl"
REMEDY = "Make it again with task=generate or task=curate."


@dataclass(frozen=True, slots=True)
class GeneratedTurns:
    """Turns of a new sample.

    Attributes:
        position: of the record whose pictures they are about.
        id: of the new sample, unique in the file.
    """

    position: int
    id: str
    kind: SampleKind
    language: Language
    messages: tuple[Message, ...]


def write_generated(
    path: Path,
    source: Source,
    identity: RowsIdentity,
    origin: Mapping[str, Any],
    rows: Iterable[GeneratedTurns],
    setting: str,
) -> None:
    """Write a file of generated turns.

    Args:
        identity: of the records that they were made from.
        origin: description of the model and the prompts.
        setting: setting that names the folder, for messages.
    """
    head = {"version": GENERATED_VERSION, "source": source.name, "identity": asdict(identity), "origin": dict(origin)}
    with atomic_write(path, "The generated turns", setting) as draft, draft.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(head, ensure_ascii=False) + "\n")
        stream.writelines(json.dumps(_dump_turns(row), ensure_ascii=False) + "\n" for row in rows)


def _dump_turns(row: GeneratedTurns) -> dict[str, Any]:
    messages = [
        {"role": message.role.value, "content": [_dump_part(part) for part in message.content]}
        | ({} if message.supervised else {"supervised": False})
        for message in row.messages
    ]
    return {
        "position": row.position,
        "id": row.id,
        "kind": row.kind.value,
        "language": row.language.value,
        "messages": messages,
    }


def _dump_part(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, ImagePlaceholder):
        return {"image": part.index}
    return {"text": part} if isinstance(part, str) else {"token": part.token}


def _parse_turns(values: Mapping[str, Any]) -> GeneratedTurns:
    messages = tuple(
        Message(
            Role(message["role"]), tuple(map(_parse_part, message["content"])), bool(message.get("supervised", True))
        )
        for message in values["messages"]
    )
    return GeneratedTurns(
        int(values["position"]), str(values["id"]), SampleKind(values["kind"]), Language(values["language"]), messages
    )


def _parse_part(part: Mapping[str, Any]) -> ContentPart:
    if "image" in part:
        return ImagePlaceholder(int(part["image"]))
    return str(part["text"]) if "text" in part else ControlToken(str(part["token"]))


class GeneratedSource:
    """Source of generated turns with the pictures of another source's records.

    Args:
        source: with all of the records that the turns were made from.
        path: file of the turns.
        setting: key of the path, for messages.
        limit: use only the first `limit` samples.

    Raises:
        UserError: the file cannot be read, has no samples, or was made of other records.
    """

    def __init__(self, source: Source, path: Path, setting: str, limit: int | None = None) -> None:
        self.name, self._source, self._path = source.name, source, path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{setting}={path}: {error.strerror or error}. {REMEDY}") from None
        _check_head(data.partition(b"\n")[0], source, path, setting)
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")).astype(np.int64) + 1
        if not len(ends) or ends[-1] != len(data):
            raise UserError(f"{setting}={path}: its last line is cut off. {REMEDY}")
        self._offsets = ends[: None if limit is None else limit + 1]  # line k + 1 is [offsets[k], offsets[k + 1])
        if len(self._offsets) < 2:
            raise UserError(f"{setting}={path}: has no samples. Take the source away.")
        digest = hashlib.sha256(data[: self._offsets[-1]]).hexdigest()
        self.digest = hashlib.sha256(f"{source.digest}\0{digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        turns = self._read_turns(index)
        record = self._source[turns.position]
        places = [part for message in turns.messages for part in message.content if isinstance(part, ImagePlaceholder)]
        if not isinstance(record, Sample) or len(places) != len(record.images):
            reason = f"its turns are about {len(places)} pictures, and the record does not have as many"
            raise RecordError(self.origin(index), reason, REMEDY, Fault.changed)
        return replace(
            record,
            id=turns.id,
            origin=self.origin(index),
            kind=turns.kind,
            language=turns.language,
            messages=turns.messages,
            nfc_changed=False,
            unused_keys=(),
        )

    def origin(self, index: int) -> str:
        """Return the line of a sample for the user."""
        return f"{self._path.name}:{index + 2}"

    def digest_of(self, start: int, stop: int) -> str:
        """Hash the turns of samples start to stop - 1, and the identity of the source."""
        data = self._read(int(self._offsets[start]), int(self._offsets[stop]))
        return hashlib.sha256(self._source.digest.encode() + data).hexdigest()

    def _read_turns(self, index: int) -> GeneratedTurns:
        line = self._read(int(self._offsets[index]), int(self._offsets[index + 1]))
        try:
            return _parse_turns(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(self.origin(index), f"the line is damaged: {error}", REMEDY) from None

    def _read(self, start: int, stop: int) -> bytes:
        with self._path.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


def _check_head(line: bytes, source: Source, path: Path, setting: str) -> None:
    """Check that a file of generated turns was made of the records of this source."""
    try:
        head = json.loads(line)
        version, identity = head["version"], RowsIdentity(**head["identity"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{setting}={path}: is no file of task=generate or task=curate. {REMEDY}") from None
    if version != GENERATED_VERSION:
        raise UserError(f"{setting}={path}: has version {version}, and {GENERATED_VERSION} is read. {REMEDY}")
    if reason := describe_changed_rows(identity, source):
        raise UserError(
            f"{setting}={path}: {reason}. Run task=generate or task=curate again, or take the setting away."
        )
