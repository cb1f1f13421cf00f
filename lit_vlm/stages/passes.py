"""One pass over all records of a run before training: fill a cache with the outputs of a frozen model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lit_vlm.data.index.columns import Index
from lit_vlm.model.tensor_files import digest_of_weights
from lit_vlm.stages.kept import Kept, key_of
from lit_vlm.types import Batch, UserError, counted


def folder_for(trainer: L.Trainer, name: str, weights: str | Path | None, **what: Any) -> Path | None:
    """Return the folder of a cache.

    None (in memory) when the weights are in no folder, because they could not be identified the next time; or when the
    data module has no store.
    """
    data = _data_of(trainer, name)
    if data.store is None or weights is None or not Path(weights).is_dir():
        return None
    digest = trainer.strategy.broadcast(digest_of_weights(Path(weights)) if trainer.is_global_zero else "")
    what |= {"weights": digest, "processor": data.processor.digest, "precision": trainer.precision}
    return data.store / name / key_of(**what)


@torch.no_grad()
def pass_over(
    trainer: L.Trainer, kept: Kept, work: Callable[[Batch], None], say: Callable[[str], None] = lambda text: None
) -> None:
    """Fill a cache: call `process_batch` on micro-batches of all records of the run that are not in it yet.

    The ranks share the work. The records are those that the plan samples and the held-out ones. A pass that was
    interrupted resumes. From then on batches contain the content hashes of their images.
    """
    data = _data_of(trainer, kept.what)
    data.contents = True
    sampled = np.unique(np.concatenate([data.plan.samples(step) for step in range(data.plan.num_steps)]))
    for index, samples in ((data.index, sampled), (data.held_out, np.arange(len(data.held_out)))):
        # one rank decides for all: they iterate over the same number of micro-batches
        new, changed = trainer.strategy.broadcast(_new(data, kept, index, samples) if trainer.is_global_zero else None)
        if len(samples):
            which = "drawn" if index is data.index else "held-out"
            replaced = f", {changed:,} with other pictures than before" if changed else ""
            counts = f"of {counted(len(samples), f'{which} record')} {counted(len(new), 'is', 'are')} new{replaced}"
            say(f"{kept.what}: {counts}; {kept.folder or 'in memory'}")
        for batch in data.pass_over(index, new) if len(new) else ():
            batch = data.on_before_batch_transfer(batch, 0).to(trainer.strategy.root_device)
            with trainer.precision_plugin.forward_context():
                work(batch)
    kept.write()
    if kept.folder is None and trainer.world_size > 1:
        kept.exchange()
    trainer.strategy.barrier()
    kept.read()


def _new(data: Any, kept: Kept, index: Index, samples: np.ndarray) -> tuple[np.ndarray, int]:
    """Find the samples that are not in the cache, and the number of them whose images alone have changed."""
    keys = index.keys(samples)
    has_key, contents = kept.knows(keys), np.zeros(len(samples), np.uint64)
    contents[has_key] = data.contents_of(index, samples[has_key])
    missing = kept.missing(keys, contents)
    return samples[missing], int(np.count_nonzero(missing & has_key))


def _data_of(trainer: L.Trainer, what: str) -> Any:
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "plan", None) is None:
        raise UserError(
            f"A pass before training ({what}) needs lit_vlm's DataModule, which knows the records of the run."
        )
    return data


class Seen(Kept):
    """Disk cache of vision features: [tiles, P, C] of each record's images, from a frozen vision tower.

    Args:
        dummy: [1, P, C] features of a batch without images; they are multiplied by zero.
    """

    def __init__(self, folder: Path | None, blank: Tensor) -> None:
        super().__init__(folder, "the kept features of the pictures", "stage.cache_features")
        self.blank = blank

    def add_batch(self, batch: Batch, seen: Tensor) -> None:
        """Add features [N, P, C] of the batch's tiles; a record without images is stored with zero rows."""
        for number, part in enumerate(seen[: batch.num_tiles].split(batch.tiles_of_records)):
            self.add(batch.keys[number], batch.contents[number], [len(part)], part)

    def of(self, batch: Batch) -> Tensor:
        """Get features [N, P, C] of the batch's tiles; [1, P, C] for a batch without images."""
        if not batch.num_tiles:
            return self.blank
        parts = [self.rows(batch, number, [count]) for number, count in enumerate(batch.tiles_of_records) if count]
        return torch.cat(parts).to(batch.input_ids.device)


def keep_features(
    trainer: L.Trainer, model: Any, weights: str | Path | None, say: Callable[[str], None], **what: Any
) -> Seen:
    """Build the cache of vision features of all images of the run.

    From then on the data module decodes no images for training.
    """
    layer, width = model.config.vision_feature_layer, model.config.vision_config.hidden_size
    dummy = torch.zeros(1, model.model.image_settings.side**2, width, device=trainer.strategy.root_device)
    features = Seen(folder_for(trainer, "features", weights, layer=layer, **what), dummy)

    def look(batch: Batch) -> None:
        vision_features = model(batch=batch, look_only=True)
        if not batch.blank:
            features.add_batch(batch, vision_features)

    pass_over(trainer, features, look, say)
    _data_of(trainer, features.what).pixels = False
    return features
