"""Training runs whose results must be the same in one process and in several, and callbacks that record them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from support import blueprint_of, builtin

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.sharded_state import get_sharded_state
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.generate import generate
from lit_vlm.stages import STAGES, Stage

ADAM_EPS = 1e-6  # at 1e-8 Adam amplifies the noise of a bias whose true gradient is zero
LORA = {"parts": {"language_model": {"lora": {"rank": 4}}}}
STAGE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "align": ("align", {}),
    "sft": ("sft", {"parts": {"vision_tower": {"learning_rate": 2e-3}}, "weight_decay": 0.1}),
    "sft_lora": ("sft", LORA),
    "highres": ("highres", {"activation_checkpointing": "full"}),
    "selective": ("highres", {"activation_checkpointing": "selective"}),
    "selective_lora": ("sft", LORA | {"activation_checkpointing": "selective"}),
    "dpo": ("dpo", {}),
    "dpo_lora": ("dpo", LORA),
    "dpo_kept": ("dpo", {"cache_reference": True}),  # in memory: the ranks exchange their results
    "align_kept": ("align", {"cache_features": True}),
}


@dataclass(frozen=True)
class Case:
    """A short run. SGD is the default because AdamW hides a wrong loss scale."""

    stage: str = "sft"
    sgd: bool = True
    clip: float | None = 1.0
    tokens: int = 130  # several micro-batches, some dummy, some without images
    batch: int = 9
    steps: int = 3
    precision: str = "32-true"
    options: dict[str, Any] = field(default_factory=dict)  # options of the stage

    def make_stage(self, parts: tuple[str, str]) -> Stage:
        name, options = STAGE_CASES[self.stage]
        stage = STAGES[name](
            blueprint_of(parts), **({"learning_rate": 1e-3, "adam_eps": ADAM_EPS} | options | self.options)
        )
        if self.sgd:
            stage.configure_optimizers = lambda: torch.optim.SGD(
                [weight for weight in stage.model.parameters() if weight.requires_grad], lr=0.05
            )
        return stage

    def make_data(self, parts: tuple[str, str]) -> DataModule:
        blueprint, preferences = blueprint_of(parts), self.stage.startswith("dpo")
        kinds = ("preference",) if preferences else ("text", "caption", "grounding", "multi_image")
        return DataModule(
            Processor(blueprint.tokenizer, blueprint.images),
            builtin(*kinds, n=24 if preferences else 12),
            0.1,
            global_batch_size=self.batch,
            tokens_per_micro_batch=2 * self.tokens if preferences else self.tokens,
            tiles_per_micro_batch=10_000,
            max_steps=self.steps,
        )


class RunRecorder(L.Callback):
    """Records the values of each step and the weights at the end."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {"losses": [], "hooks": [], "rates": [], "sums": {}}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.results["hooks"].append(trainer.global_step)
        if not self.results["sums"]:
            self.results["sums"] = pl_module._compute_gradient_sums()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.results["losses"].append(float(trainer.callback_metrics["train/loss"]))
            self.results["rates"].append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        names = [name for name, _ in pl_module.model.named_parameters()]
        whole = getattr(trainer.strategy, "whole_weights", None)
        weights = dict(pl_module.model.named_parameters())
        find = whole(pl_module.model) if whole else weights.__getitem__
        self.results["weights"] = {name: find(name).detach().float().clone() for name in names}
        self.results |= {"global_step": trainer.global_step, "k": trainer.accumulate_grad_batches}


class StateRecorder(L.Callback):
    """Records the shards of this rank's state after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.pieces, self.writes = step, [], True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.step * trainer.accumulate_grad_batches:
            shards = get_sharded_state(trainer)
            self.pieces = [
                (p.name, p.kind.value, p.shape, p.start, p.values.clone())
                for p in shards.iter_shards()
                if not p.is_replica
            ]
            self.writes = shards.is_writer


class StateRestorer(L.Callback):
    """Overwrites the state after a step with wrong values, then restores a whole one."""

    def __init__(self, step: int, whole: dict[tuple[str, str], torch.Tensor]) -> None:
        self.step, self.whole = step, whole

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 != self.step * trainer.accumulate_grad_batches:
            return
        shards = get_sharded_state(trainer)
        for piece in shards.iter_shards():
            piece.values.fill_(0.5)
        shards.sync_after_load(1000)
        for piece in shards.iter_shards():
            piece.values.copy_(self.whole[piece.name, piece.kind.value][piece.start : piece.start + len(piece.values)])
        shards.sync_after_load(self.step)


def assemble(ranks: list[list[tuple]]) -> dict[tuple[str, str], torch.Tensor]:
    """Return whole flat tensors by name and kind; fail on an element that no rank or more than one rank holds."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    held: dict[tuple[str, str], torch.Tensor] = {}
    for name, kind, shape, start, values in (piece for pieces in ranks for piece in pieces):
        part, size = slice(start, start + len(values)), torch.Size(shape).numel()
        whole.setdefault((name, kind), torch.zeros(size, dtype=values.dtype))[part] = values
        held.setdefault((name, kind), torch.zeros(size))[part] += 1
    assert all(bool((count == 1).all()) for count in held.values())
    return whole


class AnswerRecorder(L.Callback):
    """Records the generated answers to a held-out micro-batch after a step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == trainer.accumulate_grad_batches:
            held_out = trainer.datamodule.val_dataloader().dataset
            packs = held_out.packs  # packs of this rank; all ranks generate the same
            held_out.packs = [tuple(range(2))]
            self.answers = generate(pl_module.model, held_out[0], max_new_tokens=6)
            held_out.packs = packs


def fit(case: Case, parts: tuple[str, str], strategy: Any, *callbacks: L.Callback, world: int = 1) -> dict[str, Any]:
    """Train and return the recorded results."""
    recorder, stage = RunRecorder(), case.make_stage(parts)
    trainer = make_trainer(case, strategy, [*callbacks, recorder], world)
    trainer.fit(stage, case.make_data(parts))
    return recorder.results | {"val": float(trainer.callback_metrics["val/loss"])}


def validate(case: Case, parts: tuple[str, str], strategy: Any, world: int = 1) -> float:
    """Return the held-out loss of an untrained model."""
    trainer = make_trainer(case, strategy, [], world)
    return trainer.validate(case.make_stage(parts), case.make_data(parts), verbose=False)[0]["val/loss"]


def make_trainer(case: Case, strategy: Any, callbacks: list[L.Callback], world: int) -> L.Trainer:
    disable_library_warnings()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    return L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision=case.precision,
        gradient_clip_val=case.clip,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


__all__ = ["STAGE_CASES", "AnswerRecorder", "Case", "StateRecorder", "StateRestorer", "assemble", "fit", "validate"]
