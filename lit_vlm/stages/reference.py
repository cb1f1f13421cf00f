"""The reference's log-probabilities of a preference stage's answers, made once and kept.

They depend on the reference's weights, the template, the image settings and the precision, and on nothing that a sweep of
the loss varies: one folder per such combination serves every run that starts from the same model. Each answer's tokens
are kept one by one in float32, so that every loss can be had from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from lit_vlm.types import Batch, UserError

VERSION = 1  # raise it when the same model and data come to other numbers
PART_TOKENS = 4_000_000  # answers' tokens in a file of the folder, 16 MB


def key_of(**what: Any) -> str:
    """The name of the folder for a reference, its template, image settings and precision."""
    text = json.dumps([VERSION, what], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ReferenceLogProbs:
    """Log-probabilities by record.

    Args:
        folder: where they are kept; None: in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._new: list[tuple[int, Sequence[int], np.ndarray]] = []
        self._tokens = 0
        self._keys, self._starts, self._lengths = np.empty(0, np.uint64), np.empty(0, np.int64), np.empty((0, 2), int)
        self._values = np.empty(0, np.float32)
        self.read()

    def read(self) -> None:
        """What the folder holds, of all who wrote to it."""
        parts = [_read(file) for file in sorted(self.folder.glob("part-*.safetensors"))] if self.folder else []
        if self._new:
            parts.append(_packed(self._new))
        if not parts:
            return
        keys, lengths, values = (
            np.concatenate([part[name] for part in parts]) for name in ("keys", "lengths", "values")
        )
        starts = np.cumsum([0, *lengths.sum(1)])[:-1]
        self._keys, first = np.unique(keys, return_index=True)
        self._starts, self._lengths, self._values = starts[first], lengths[first], values

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[keys] bool."""
        return ~np.isin(keys, self._keys)

    def add(self, batch: Batch, log_probs: Tensor) -> None:
        """Of a batch's pairs; [R] along its row."""
        pairs, counts = batch.num_pairs, batch.supervised[-2 * batch.num_pairs :]
        parts = log_probs.float().cpu().numpy()
        bounds = np.cumsum([0, *counts])
        for number, key in enumerate(batch.keys):
            both = [number, pairs + number]
            answers = np.concatenate([parts[bounds[i] : bounds[i + 1]] for i in both])
            self._new.append((key, [counts[i] for i in both], answers))
            self._tokens += len(answers)
        if self.folder is not None and self._tokens > PART_TOKENS:
            self.write()

    def write(self) -> None:
        """What is new becomes a file of its own, whole or not at all."""
        if self.folder is None or not self._new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"part-{uuid4().hex}.safetensors"
        beside = self.folder / f".{name}"
        save_file(_packed(self._new), beside)
        os.replace(beside, self.folder / name)
        self._new, self._tokens = [], 0

    def rows(self, batch: Batch) -> Tensor:
        """[R] along the batch's row.

        Raises:
            UserError: a record is not among them, or has other answers now.
        """
        places = np.searchsorted(self._keys, np.array(batch.keys, np.uint64))
        chosen, rejected = [], []
        for number, (place, key) in enumerate(zip(places.tolist(), batch.keys, strict=True)):
            counts = [batch.supervised[-2 * batch.num_pairs + number], batch.supervised[-batch.num_pairs + number]]
            known = place < len(self._keys) and int(self._keys[place]) == key
            if not known or self._lengths[place].tolist() != counts:
                raise UserError(
                    f"{batch.sample_ids[number]}: the kept log-probabilities of the reference ({self.folder or 'in memory'}) do not "
                    f"have this pair as it is now. Remove that folder, or train with stage.cache_reference=false."
                )
            start, middle = int(self._starts[place]), int(self._starts[place]) + counts[0]
            chosen.append(self._values[start:middle])
            rejected.append(self._values[middle : middle + counts[1]])
        return torch.from_numpy(np.concatenate([*chosen, *rejected])).to(batch.input_ids.device)


def _packed(new: Iterable[tuple[int, Sequence[int], np.ndarray]]) -> dict[str, np.ndarray]:
    keys, lengths, values = zip(*new, strict=True)
    return {
        "keys": np.array(keys, np.uint64),
        "lengths": np.array(lengths, np.int64),
        "values": np.concatenate(values),
    }


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        part = load_file(file)
        whole = int(part["lengths"].sum()) == len(part["values"]) and len(part["keys"]) == len(part["lengths"])
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}). Remove it; what it held is made again.") from error
    if not whole:
        raise UserError(f"{file}: is damaged. Remove it; what it held is made again.")
    return part
