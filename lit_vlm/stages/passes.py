"""One pass over all records of a run before training: fill a cache with the outputs of a frozen model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lit_vlm.data.index.columns import SampleIndex
from lit_vlm.model.tensor_files import compute_weights_digest
from lit_vlm.stages.kept import RecordCache, compute_cache_key
from lit_vlm.types import Batch, UserError, format_count


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
            which = "drawn" if index is data.index else "held-out"
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
