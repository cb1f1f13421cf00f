"""Disk cache of frozen-model outputs, one entry for each record, in files that other runs reuse.

One folder belongs to one combination of weights, template, image settings and precision; its name is their digest.
Files are written atomically, and the files of a pass that was interrupted are used.

A record is identified by its key and by the content of its images: another image under the same name makes it another
record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.files import atomic_write, compute_weights_digest
from lit_vlm.formatting import format_count
from lit_vlm.model.tensor_files import raise_os_errors
from lit_vlm.types import Batch, UserError

VERSION = 2  # increase it when the same model and data give other numbers
PART_BYTES = 1 << 26  # minimum size of a file; the last one of a pass is smaller


def compute_cache_key(**inputs: Any) -> str:
    """Compute the folder name: a digest of everything that the numbers depend on."""
    text = json.dumps([VERSION, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class RecordCache:
    """Cache of rows [n, ...] by record; the rows of a record may have several parts, with known counts.

    Args:
        folder: where the files are; None: in memory only.
        label: name of the content, for messages.
        setting: the setting that enables this cache.
    """

    def __init__(self, folder: Path | None, label: str, setting: str) -> None:
        self.folder, self.label, self.setting = folder, label, setting
        self._pending: list[tuple[int, int, Sequence[int], Tensor]] = []
        self._pending_bytes = 0
        self._part_values: list[Any] = []  # of each file, read on request; in memory: tensors
        self._keys, self._record_hashes = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._locations, self._counts = np.empty((0, 2), np.int64), np.empty((0, 0), np.int64)
        self.read()

    def read(self) -> None:
        """Read the index of all files in the folder, including those of other runs and ranks."""
        files = sorted(self.folder.glob("part-*.safetensors")) if self.folder else []
        parts = [_open_part(file) for file in files] + ([_pack_records(self._pending)] if self._pending else [])
        if not parts:
            return
        keys, contents = (
            np.concatenate([part[name].numpy().view(np.uint64) for part in parts]) for name in ("keys", "contents")
        )
        counts = [part["counts"].numpy() for part in parts]
        locations = [np.stack([np.full(len(c), n), np.cumsum([0, *c.sum(1)])[:-1]], 1) for n, c in enumerate(counts)]
        self._keys = np.unique(keys)
        self._record_hashes, indices = np.unique(_hash_records(keys, contents), return_index=True)
        self._counts, self._locations = np.concatenate(counts)[indices], np.concatenate(locations)[indices]
        self._part_values = [part["values"] for part in parts]

    def has_keys(self, keys: np.ndarray) -> np.ndarray:
        """Return [keys] bool: True for keys in the cache, whatever the content of their images."""
        return np.isin(keys, self._keys)

    def find_missing(self, keys: np.ndarray, contents: np.ndarray) -> np.ndarray:
        """Find the records that are not in the cache, [keys] bool."""
        return ~np.isin(_hash_records(keys, contents), self._record_hashes)

    def add(self, key: int, content: int, counts: Sequence[int], rows: Tensor) -> None:
        """Add the rows of a record; `counts` sums to their number."""
        self._pending.append((key, content, counts, rows.detach().cpu()))
        self._pending_bytes += rows.numel() * rows.element_size()
        if self.folder is not None and self._pending_bytes > PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write the pending records to a new file, atomically.

        Raises:
            UserError: there is no space or no permission.
        """
        if self.folder is None or not self._pending:
            return
        with (
            atomic_write(self.folder / f"part-{uuid4().hex}.safetensors", self.label.capitalize()) as temporary,
            raise_os_errors(),
        ):
            save_file(_pack_records(self._pending), temporary)
        self._pending, self._pending_bytes = [], 0

    def gather_from_ranks(self) -> None:
        """Gather the pending records of all ranks on every rank, for a cache in memory. All ranks call it together."""
        pending_by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(pending_by_rank, self._pending)
        self._pending = [record for pending in pending_by_rank for record in pending]

    def get_rows(self, batch: Batch, record: int, counts: Sequence[int]) -> Tensor:
        """Get the rows of the record at this position of the batch.

        Raises:
            UserError: the record is not in the cache, or has other counts or other images now.
        """
        key, content = (np.array([column[record]], np.uint64) for column in (batch.record_keys, batch.image_hashes))
        (record_hash,) = _hash_records(key, content)
        place = int(np.searchsorted(self._record_hashes, record_hash))
        known = place < len(self._record_hashes) and self._record_hashes[place] == record_hash
        if not known or self._counts[place].tolist() != list(counts):
            raise UserError(
                f"{batch.sample_ids[record]}: {self._describe_missing(key, known)} or train with {self.setting}=false."
            )
        part, start = self._locations[place].tolist()
        return self._part_values[part][start : start + sum(counts)]

    def _describe_missing(self, key: np.ndarray, known: bool) -> str:
        """Describe why a record is not in the cache."""
        label = f"{self.label} ({self.folder or 'in memory'})"
        if known or not self.has_keys(key).all():
            return f"{label} lack this record as it is now. Remove that folder,"
        return (
            f"its pictures hold something else than when {label} were made of them: a file was replaced under the same name. "
            "Start again, and this record is looked at anew,"
        )


def _hash_records(keys: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Hash each (key, content) pair to a uint64, [keys].

    Multiplication by an odd number modulo 2^64 is one-to-one, so different contents give different terms.
    """
    return keys + contents * np.uint64(0x9E3779B97F4A7C15)


def _pack_records(pending: Sequence[tuple[int, int, Sequence[int], Tensor]]) -> dict[str, Tensor]:
    keys, contents, counts, values = zip(*pending, strict=True)
    return {
        "keys": torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
        "contents": torch.from_numpy(np.array(contents, np.uint64).view(np.int64)),
        "counts": torch.tensor(counts),
        "values": torch.cat(values),
    }


def _open_part(file: Path) -> dict[str, Any]:
    """Open a file of the cache and check that it is complete; values are not read yet."""
    try:
        part = safe_open(file, framework="pt")
        tensors = {name: part.get_tensor(name) for name in ("keys", "contents", "counts")}
        tensors["values"] = part.get_slice("values")
        is_complete = int(tensors["counts"].sum()) == tensors["values"].get_shape()[0]
        is_complete = is_complete and len(tensors["keys"]) == len(tensors["contents"]) == len(tensors["counts"])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}). Remove it; what it held is made again.") from error
    if not is_complete:
        raise UserError(f"{file}: is damaged. Remove it; what it held is made again.")
    return tensors


def get_cache_folder(trainer: L.Trainer, name: str, weights: str | Path | None, **key_inputs: Any) -> Path | None:
    """Return the folder of a cache.

    None (in memory) when the weights are in no folder, because they could not be identified the next time; or when the
    data module has no store.
    """
    data = _get_datamodule(trainer, name)
    if data.store is None or weights is None or not Path(weights).is_dir():
        return None
    digest = trainer.strategy.broadcast(compute_weights_digest(Path(weights)) if trainer.is_global_zero else "")
    key_inputs |= {"weights": digest, "processor": data.processor.digest, "precision": trainer.precision}
    return data.store / name / compute_cache_key(**key_inputs)


@torch.no_grad()
def fill_cache(
    trainer: L.Trainer,
    cache: RecordCache,
    process_batch: Callable[[Batch], None],
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill a cache: call `process_batch` on micro-batches of all records of the run that are not in it yet.

    The ranks share the work. The records are those that the plan samples and the held-out ones. A pass that was
    interrupted resumes. From then on batches contain the content hashes of their images.
    """
    data = _get_datamodule(trainer, cache.label)
    data.with_image_hashes = True
    sampled = np.unique(np.concatenate([data.plan.get_samples(step) for step in range(data.plan.num_steps)]))
    for index, samples in ((data.index, sampled), (data.held_out, np.arange(len(data.held_out)))):
        # one rank decides for all: they iterate over the same number of micro-batches
        new, changed = trainer.strategy.broadcast(
            _find_new_samples(data, cache, index, samples) if trainer.is_global_zero else None
        )
        if len(samples):
            which = "training" if index is data.index else "held-out"
            replaced = f", {changed:,} with other pictures than before" if changed else ""
            counts = f"of {format_count(len(samples), f'{which} record')} {format_count(len(new), 'is', 'are')} new{replaced}"
            say(f"{cache.label}: {counts}; {cache.folder or 'in memory'}")
        for batch in data.make_subset_dataloader(index, new) if len(new) else ():
            batch = data.on_before_batch_transfer(batch, 0).to(trainer.strategy.root_device)
            with trainer.precision_plugin.forward_context():
                process_batch(batch)
    cache.write()
    if cache.folder is None and trainer.world_size > 1:
        cache.gather_from_ranks()
    trainer.strategy.barrier()
    cache.read()


def _find_new_samples(data: Any, cache: RecordCache, index: SampleIndex, samples: np.ndarray) -> tuple[np.ndarray, int]:
    """Find the samples that are not in the cache, and the number of them whose images alone have changed."""
    keys = index.compute_keys(samples)
    has_key, contents = cache.has_keys(keys), np.zeros(len(samples), np.uint64)
    contents[has_key] = data.compute_image_hashes(index, samples[has_key])
    missing = cache.find_missing(keys, contents)
    return samples[missing], int(np.count_nonzero(missing & has_key))


def _get_datamodule(trainer: L.Trainer, label: str) -> Any:
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "plan", None) is None:
        raise UserError(
            f"A pass before training ({label}) needs lit_vlm's DataModule, which knows the records of the run."
        )
    return data


class FeatureCache(RecordCache):
    """Disk cache of vision features: [tiles, P, C] of each record's images, from a frozen vision tower.

    Args:
        dummy: [1, P, C] features of a batch without images; they are multiplied by zero.
    """

    def __init__(self, folder: Path | None, dummy: Tensor) -> None:
        super().__init__(folder, "the kept features of the pictures", "stage.cache_features")
        self.dummy = dummy

    def add_batch(self, batch: Batch, vision_features: Tensor) -> None:
        """Add features [N, P, C] of the batch's tiles; a record without images is stored with zero rows."""
        for number, part in enumerate(vision_features[: batch.num_tiles].split(batch.tiles_per_record)):
            self.add(batch.record_keys[number], batch.image_hashes[number], [len(part)], part)

    def get(self, batch: Batch) -> Tensor:
        """Get features [N, P, C] of the batch's tiles; [1, P, C] for a batch without images."""
        if not batch.num_tiles:
            return self.dummy
        parts = [self.get_rows(batch, number, [count]) for number, count in enumerate(batch.tiles_per_record) if count]
        return torch.cat(parts).to(batch.input_ids.device)


def build_feature_cache(
    trainer: L.Trainer, model: Any, weights: str | Path | None, say: Callable[[str], None], **key_inputs: Any
) -> FeatureCache:
    """Build the cache of vision features of all images of the run.

    From then on the data module decodes no images for training.
    """
    layer, width = model.config.vision_feature_layer, model.config.vision_config.hidden_size
    dummy = torch.zeros(1, model.model.image_settings.side**2, width, device=trainer.strategy.root_device)
    features = FeatureCache(get_cache_folder(trainer, "features", weights, layer=layer, **key_inputs), dummy)

    def encode(batch: Batch) -> None:
        vision_features = model(batch=batch, vision_only=True)
        if not batch.dummy:
            features.add_batch(batch, vision_features)

    fill_cache(trainer, features, encode, say)
    _get_datamodule(trainer, features.label).with_pixels = False
    return features


class ReferenceLogProbCache(RecordCache):
    """Disk cache of reference log-probabilities [tokens]: of each pair's chosen answer, then of its rejected one."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder, "the kept log-probabilities of the reference", "stage.cache_reference")

    def add_batch(self, batch: Batch, log_probs: Tensor) -> None:
        """Add log-probabilities [R] in the order of the batch's row."""
        answers = log_probs.float().split(batch.segment_supervised_tokens[-2 * batch.num_pairs :])
        for number, record in enumerate(zip(batch.record_keys, batch.image_hashes, strict=True)):
            pair = answers[number], answers[batch.num_pairs + number]
            self.add(*record, list(map(len, pair)), torch.cat(pair))

    def get(self, batch: Batch) -> Tensor:
        """Get log-probabilities [R] in the order of the batch's row."""
        chosen, rejected = [], []
        for number in range(batch.num_pairs):
            counts = [
                batch.segment_supervised_tokens[number - 2 * batch.num_pairs],
                batch.segment_supervised_tokens[number - batch.num_pairs],
            ]
            chosen_log_probs, rejected_log_probs = self.get_rows(batch, number, counts).split(counts)
            chosen.append(chosen_log_probs)
            rejected.append(rejected_log_probs)
        return torch.cat([*chosen, *rejected]).to(batch.input_ids.device)
