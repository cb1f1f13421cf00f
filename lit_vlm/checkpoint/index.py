"""Layout of a checkpoint folder: safetensors files of tensor intervals, and one index that locates each tensor's elements.

    checkpoints/
        step-00000120/
            rank-00000-000.safetensors   intervals of the flattened tensors of the state
            index.json                   every interval, every file with its size and SHA-256, the run's fingerprint
        latest                           name of the newest complete checkpoint
        best                             JSON: checkpoint with the best checkpoint.best_metric, if checkpoint.keep_best

The layout does not depend on the strategy, nor on the number of ranks that wrote it.
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

import numpy as np

from lit_vlm.data.packing.plan import Plan
from lit_vlm.distributed.sharded_state import StateKind
from lit_vlm.redaction import is_same_setting
from lit_vlm.types import flatten

INDEX_FILE, INDEX_FORMAT = "index.json", 1


class CorruptCheckpointError(Exception):
    """Error for a checkpoint that must not be used. Its text names the file and the fault."""


@dataclass(frozen=True, slots=True)
class StoredInterval:
    """Elements [start, stop) of one flattened tensor of the state, stored as tensor `key` in `file`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: str

    @property
    def key(self) -> str:
        """Name of the tensor in the safetensors file."""
        return f"{self.kind}:{self.name}:{self.start}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One safetensors file of a checkpoint."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(slots=True)
class CheckpointIndex:
    """Index of a checkpoint: everything except the tensor values.

    Attributes:
        step: number of optimizer steps that were taken.
        updates: number of those steps that changed the weights, as the optimizer counts them.
        belongs: fingerprint of the run, see `RunFingerprint`.
        consumed: SHA-256 over the ids of all samples of these steps, in order.
        state: other state to resume: callbacks, log, gradient scale of float16. Small, plain JSON.
    """

    step: int
    updates: int
    intervals: list[StoredInterval]
    files: list[StoredFile]
    belongs: dict[str, Any]
    consumed: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    written: str = ""  # UTC, ISO 8601
    format: int = INDEX_FORMAT

    def to_text(self) -> str:
        """Return the index as JSON text that contains its own SHA-256."""
        body = asdict(self)
        return json.dumps({"sha256": _compute_digest(body), **body}, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str, path: Path) -> CheckpointIndex:
        """Parse the JSON text of an index.

        Args:
            path: file that the text comes from, for error messages.

        Raises:
            CorruptCheckpointError: the text is not what was written, or it has another format.
        """
        try:
            body = json.loads(text)
            digest = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CorruptCheckpointError(f"{path} is no index of a checkpoint ({error})") from None
        if digest != _compute_digest(body):
            raise CorruptCheckpointError(f"{path} is not as it was written: its SHA-256 differs")
        if body["format"] != INDEX_FORMAT:
            raise CorruptCheckpointError(
                f"{path} is of format {body['format']}; this version reads format {INDEX_FORMAT}"
            )
        body["intervals"] = [StoredInterval(**{**one, "shape": tuple(one["shape"])}) for one in body["intervals"]]
        body["files"] = [StoredFile(**one) for one in body["files"]]
        return cls(**{item.name: body[item.name] for item in fields(cls)})

    def group_by_tensor(self) -> dict[tuple[str, str], list[StoredInterval]]:
        """Group the intervals by tensor: (kind, name) -> intervals, sorted by their first element."""
        groups: dict[tuple[str, str], list[StoredInterval]] = {}
        for interval in self.intervals:
            groups.setdefault((interval.kind, interval.name), []).append(interval)
        return {key: sorted(parts, key=lambda interval: interval.start) for key, parts in groups.items()}

    def get_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each parameter in the checkpoint."""
        return {interval.name: interval.shape for interval in self.intervals if interval.kind == StateKind.weight}


def find_coverage_errors(index: CheckpointIndex) -> Iterator[str]:
    """Find tensors whose elements are not stored exactly once. Yields one text for each; none for a complete checkpoint."""
    listed_files = {stored.name for stored in index.files}
    for (kind, name), intervals in index.group_by_tensor().items():
        if any(interval.file not in listed_files for interval in intervals):
            yield f"{name} ({kind}) is in a file that the index does not list"
        ends = [0, *(interval.stop for interval in intervals)]
        gap = any(interval.start != end for interval, end in zip(intervals, ends, strict=False)) or ends[-1] != prod(
            intervals[0].shape
        )
        if gap or any(first.shape != second.shape for first, second in pairwise(intervals)):
            yield f"{name} ({kind}) is not there exactly once"


def _compute_digest(body: dict[str, Any]) -> str:
    """Compute the SHA-256 of a canonical JSON form, which does not change when it is written and read."""
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


SAMPLES_PER_BLOCK = 1 << 20  # samples that are hashed in one block
FIELD_LABELS = {
    "stage": "stage",
    "data": "data",
    "parent": "model to start from",
    "processor": "tokenizer, chat template (or day that it writes), or image settings",
    "pictures": "content of the pictures: other files under their names",
    "plan": "samples in its steps",
}


@dataclass(slots=True)
class RunFingerprint:
    """Digests and settings that a resumed run must share with the interrupted run. Empty fields are not compared.

    Attributes:
        stage: name of the stage.
        settings: all settings that define what is computed. Settings of where and how fast it runs are left out.
        data: digest of the sources.
        parent: digest of the frozen weights, which a checkpoint does not contain.
        plan: digest of all samples in all steps.
        processor: digest of the tokenizer, its chat template, the date that the template writes, and the image settings.
        pictures: digest of the content of the training images at the time of indexing.
    """

    stage: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    parent: str = ""
    plan: str = ""
    processor: str = ""
    pictures: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for the index of a checkpoint."""
        return asdict(self)

    def find_differences(self, stored: dict[str, Any]) -> list[str]:
        """Return the differences to a stored fingerprint, each as text for the user."""
        own_fields = self.to_dict()
        changed_fields = [
            key for key in FIELD_LABELS if own_fields[key] and stored.get(key) and own_fields[key] != stored[key]
        ]
        differences = [FIELD_LABELS["stage"]] if "stage" in changed_fields else []
        if self.settings and stored.get("settings"):
            own_settings, stored_settings = flatten(self.settings), flatten(stored["settings"])
            keys = sorted(
                key
                for key in own_settings.keys() | stored_settings.keys()
                if not is_same_setting(key, own_settings, stored_settings)
            )
            differences += [
                f"{key} (it has {stored_settings.get(key)}, this run {own_settings.get(key)})" for key in keys
            ]
        return differences + [FIELD_LABELS[key] for key in changed_fields if key != "stage"]


class SampleHash:
    """Running SHA-256 over the ids of the samples that the steps read. It depends on the plan alone.

    Samples that the ledger lists are hashed as they were sampled. So a record that becomes corrupt later changes no
    digest of earlier steps.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._num_hashed = plan, 0
        self._hasher = hashlib.sha256("\0".join(source.name for source in plan.index.sources).encode())

    def compute_digest(self, step: int) -> str:
        """Compute the digest of all steps before `step`. Calls must come in increasing order of `step`."""
        index, ends = self._plan.index, self._plan.step_ends
        end = int(ends[step - 1]) if step else 0
        for start in range(self._num_hashed, end, SAMPLES_PER_BLOCK):
            samples = self._plan.get_sample_sequence()[start : min(start + SAMPLES_PER_BLOCK, end)]
            rows = np.stack([index.source_ids[samples], index.position[samples]], axis=1)
            self._hasher.update(rows.astype("<i8").tobytes())
        self._num_hashed = max(self._num_hashed, end)
        return self._hasher.copy().hexdigest()


def compute_plan_digest(plan: Plan) -> str:
    """Compute the SHA-256 of every sample of every step. It does not depend on world size or micro-batches."""
    ends = hashlib.sha256(np.asarray(plan.step_ends, dtype="<i8").tobytes()).hexdigest()
    return hashlib.sha256((SampleHash(plan).compute_digest(plan.num_steps) + ends).encode()).hexdigest()
