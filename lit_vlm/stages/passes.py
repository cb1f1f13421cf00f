"""One pass over all records of a run before it trains: what a frozen model makes of them, kept for this run and others."""

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
    """Where a pass is kept. None, in memory, where the weights are in no folder: nothing then says that they are the same
    the next time; or where the data module has no store."""
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
    """`work` on micro-batches of all records that the run draws or holds out and that are not kept yet, shared by the ranks.
    A pass that was cut short goes on. From then on batches say what their pictures hold."""
    data = _data_of(trainer, kept.what)
    data.contents = True
    drawn = np.unique(np.concatenate([data.plan.samples(step) for step in range(data.plan.num_steps)]))
    for index, samples in ((data.index, drawn), (data.held_out, np.arange(len(data.held_out)))):
        # one look for all ranks: they walk through the same number of micro-batches
        new, others = trainer.strategy.broadcast(_new(data, kept, index, samples) if trainer.is_global_zero else None)
        if len(samples):
            which = "drawn" if index is data.index else "held-out"
            replaced = f", {others:,} with other pictures than before" if others else ""
            found = f"of {counted(len(samples), f'{which} record')} {counted(len(new), 'is', 'are')} new{replaced}"
            say(f"{kept.what}: {found}; {kept.folder or 'in memory'}")
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
    """Those of the samples that are not kept, and how many of them are for their pictures alone."""
    keys = index.keys(samples)
    known, contents = kept.knows(keys), np.zeros(len(samples), np.uint64)
    contents[known] = data.contents_of(index, samples[known])
    missing = kept.missing(keys, contents)
    return samples[missing], int(np.count_nonzero(missing & known))


def _data_of(trainer: L.Trainer, what: str) -> Any:
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "plan", None) is None:
        raise UserError(
            f"A pass before training ({what}) needs lit_vlm's DataModule, which knows the records of the run."
        )
    return data


class Seen(Kept):
    """[tiles, P, C] of each record's pictures, as a frozen tower sees them.

    Args:
        blank: [1, P, C] of a batch without any; it is multiplied by zero.
    """

    def __init__(self, folder: Path | None, blank: Tensor) -> None:
        super().__init__(folder, "the kept features of the pictures", "stage.cache_features")
        self.blank = blank

    def add_batch(self, batch: Batch, seen: Tensor) -> None:
        """[N, P, C] of the batch's tiles; a record without pictures is kept as one without rows."""
        for number, part in enumerate(seen[: batch.num_tiles].split(batch.tiles_of_records)):
            self.add(batch.keys[number], batch.contents[number], [len(part)], part)

    def of(self, batch: Batch) -> Tensor:
        """[N, P, C]; [1, P, C] of a batch without pictures."""
        if not batch.num_tiles:
            return self.blank
        parts = [self.rows(batch, number, [count]) for number, count in enumerate(batch.tiles_of_records) if count]
        return torch.cat(parts).to(batch.input_ids.device)


def keep_features(
    trainer: L.Trainer, model: Any, weights: str | Path | None, say: Callable[[str], None], **what: Any
) -> Seen:
    """What the model's tower sees in all pictures of the run. From then on the data module decodes none for training."""
    layer, width = model.config.vision_feature_layer, model.config.vision_config.hidden_size
    blank = torch.zeros(1, model.model.image_settings.side**2, width, device=trainer.strategy.root_device)
    features = Seen(folder_for(trainer, "features", weights, layer=layer, **what), blank)

    def look(batch: Batch) -> None:
        seen = model(batch=batch, look_only=True)
        if not batch.blank:
            features.add_batch(batch, seen)

    pass_over(trainer, features, look, say)
    _data_of(trainer, features.what).pixels = False
    return features
