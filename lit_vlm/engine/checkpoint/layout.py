"""What a checkpoint's folder holds: safetensors files of intervals, and one index that says where each tensor's elements are.

    checkpoints/
        step-00000120/
            rank-00000-000.safetensors   intervals of the flattened tensors of the state
            index.json                   every interval, every file with its size and SHA-256, what the state belongs to
        latest                           the name of the newest complete one
        best                             JSON: the one of the lowest val/loss, if checkpoint.keep_best

Nothing in it depends on the strategy or on the number of ranks that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from lit_vlm.engine.shards import Kind

INDEX, FORMAT = "index.json", 1


class Damaged(Exception):
    """A checkpoint that must not be used. Its text names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [start, stop) of one flattened tensor of the state; they are the tensor `key` of `file`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: str

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.name}:{self.start}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    size: int  # bytes
    sha256: str


@dataclass(slots=True)
class Index:
    """Everything about a checkpoint but the numbers.

    Attributes:
        step: optimizer steps that were taken.
        updates: those of them that changed the weights; the optimizer's own count.
        belongs: what the state is of, see `Belongs`.
        consumed: SHA-256 over the ids of all samples of these steps, in their order.
        state: what else goes on: callbacks, log, the scale of 16-bit gradients. Small, plain JSON.
    """

    step: int
    updates: int
    intervals: list[Interval]
    files: list[StoredFile]
    belongs: dict[str, Any]
    consumed: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    written: str = ""  # UTC, ISO 8601
    format: int = FORMAT

    def to_text(self) -> str:
        """JSON that carries its own SHA-256."""
        body = asdict(self)
        return json.dumps({"sha256": _digest(body), **body}, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str, where: Path) -> Index:
        """Raises Damaged: it is not what was written."""
        try:
            body = json.loads(text)
            digest = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise Damaged(f"{where} is no index of a checkpoint ({error})") from None
        if digest != _digest(body):
            raise Damaged(f"{where} is not as it was written: its SHA-256 differs")
        if body["format"] != FORMAT:
            raise Damaged(f"{where} is of format {body['format']}; this version reads format {FORMAT}")
        body["intervals"] = [Interval(**{**one, "shape": tuple(one["shape"])}) for one in body["intervals"]]
        body["files"] = [StoredFile(**one) for one in body["files"]]
        return cls(**{item.name: body[item.name] for item in fields(cls)})

    def tensors(self) -> dict[tuple[str, str], list[Interval]]:
        """(kind, name) -> its intervals from the first element on."""
        found: dict[tuple[str, str], list[Interval]] = {}
        for one in self.intervals:
            found.setdefault((one.kind, one.name), []).append(one)
        return {key: sorted(parts, key=lambda one: one.start) for key, parts in found.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each parameter in it -> shape."""
        return {one.name: one.shape for one in self.intervals if one.kind == Kind.weight}


def uncovered(index: Index) -> Iterator[str]:
    """Tensors whose elements are not there exactly once, in words; none of a whole checkpoint."""
    known = {stored.name for stored in index.files}
    for (kind, name), parts in index.tensors().items():
        if any(part.file not in known for part in parts):
            yield f"{name} ({kind}) is in a file that the index does not list"
        ends = [0, *(part.stop for part in parts)]
        gap = any(part.start != end for part, end in zip(parts, ends, strict=False)) or ends[-1] != prod(parts[0].shape)
        if gap or any(one.shape != other.shape for one, other in pairwise(parts)):
            yield f"{name} ({kind}) is not there exactly once"


def _digest(body: dict[str, Any]) -> str:
    """Over a form that JSON's writer and reader keep."""
    plain = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()
