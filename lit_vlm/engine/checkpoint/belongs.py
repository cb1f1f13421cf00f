"""Fingerprint that a checkpoint must share with the run that resumes it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lit_vlm.data.plan.plan import Plan
from lit_vlm.secrets import is_same_when_redacted

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
            own_settings, stored_settings = _flatten_settings(self.settings), _flatten_settings(stored["settings"])
            keys = sorted(
                key
                for key in own_settings.keys() | stored_settings.keys()
                if not is_same_when_redacted(own_settings.get(key), stored_settings.get(key))
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


def _flatten_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            key: leaf
            for name, item in value.items()
            for key, leaf in _flatten_settings(item, f"{prefix}{name}.").items()
        }
    return {prefix.rstrip("."): value}
