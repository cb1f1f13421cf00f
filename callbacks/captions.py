"""Callbacks of the stages that learn from image-text pairs: captions of held-out images, and the exported folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from callbacks.export import export_to
from callbacks.samples import Samples, ScoredAnswer, score_answer, select_samples, to_sample
from lit_vlm.fault_tolerance.watchdog import Progress, get_progress
from lit_vlm.model.skeleton import replace_parameters
from lit_vlm.types import SampleKind


class Captions(Samples):
    """Scores the captions of held-out images before and after training, and writes samples as `Samples` does.

    An image is captioned once; all its held-out texts are references, as in COCO and Flickr30k. Needs a stage whose
    `predict_step` returns the caption of each image of a batch.
    """

    def generate_scored_answers(self, pl_module: Any, datamodule: Any, progress: Progress) -> list[ScoredAnswer]:
        """Generate a caption of each held-out image; every rank generates all of them."""
        with pl_module.gather_weights():
            return self._generate_captions(pl_module, datamodule, progress)

    def _generate_captions(self, pl_module: Any, datamodule: Any, progress: Progress) -> list[ScoredAnswer]:
        index = datamodule.held_out
        images: dict[int, list[int]] = {}  # samples of each image
        for sample, image in enumerate(index.group.tolist()):
            images.setdefault(image, []).append(sample)
        first = sorted(samples[0] for samples in images.values())
        chosen = (
            [first[row] for row in select_samples(index.select(np.array(first)), self.max_samples)] if first else []
        )
        batches = datamodule.make_held_out_batches(chosen)
        answers, was_training = [], pl_module.training
        pl_module.eval()
        for number in progress.iterate(range(len(batches))):
            batch = datamodule.require_readable(batches[number])
            batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            captions = pl_module.predict_step(batch, number)
            for row, caption in zip(batches.rows[number], captions, strict=True):
                others = images[int(index.group[row])][1:]
                references = [to_sample(index.get_record(other)).messages[-1].text.strip() for other in others]
                shown = replace(to_sample(index.get_record(row)), kind=SampleKind.caption)  # whatever its source asks
                answers.append(score_answer(shown, caption, references))
        pl_module.train(was_training)
        return answers


class PairExport(L.Callback):
    """Exports the model of a stage to `run_dir/hf` at the end of training.

    Args:
        save: saves a model to a folder.
    """

    def __init__(self, run_dir: Path, save: Callable[[Any, Path], None]) -> None:
        self.folder, self.save = Path(run_dir) / "hf", save
        self.copy: Any = None  # of a model that the strategy will shard, without its weights

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if hasattr(trainer.strategy, "whole_weights"):
            self.copy = copy_without_weights(pl_module.model)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with export_to(self.folder, trainer) as progress:
            model = pl_module.model
            if self.copy is not None:
                model = self._gather_model(trainer, model, progress)
            if trainer.is_global_zero:
                progress.wrap(partial(self.save, model, self.folder))()

    def _gather_model(self, trainer: L.Trainer, model: Any, progress: Progress) -> Any:
        """Gather the weights of a sharded model on rank 0, one at a time, into the copy; all ranks must call it."""
        gather_weight, weights = trainer.strategy.whole_weights(model), {}
        for name, _ in model.named_parameters():
            value = progress.wrap(gather_weight)(name)
            if trainer.is_global_zero:
                weights[name] = value.detach().to("cpu", copy=True)
        if trainer.is_global_zero:
            replace_parameters(self.copy, lambda name, old: nn.Parameter(weights.pop(name), old.requires_grad))
        return self.copy


def copy_without_weights(model: nn.Module) -> nn.Module:
    """Copy a model with its buffers; its parameters are on `meta`, and those that stand in several places stay one."""
    empty = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad) for one in model.parameters()
    }
    return copy.deepcopy(model, empty)


class ValidationPulse(L.Callback):
    """Reports progress while a validation matches many candidates, so that the watchdog does not take it for stuck."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.pulse = get_progress(trainer).mark_progress
