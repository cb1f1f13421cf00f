"""One rank of a training run with SGD: `torchrun --nproc-per-node=N rank_worker.py PARTS OUT TOKENS BATCH LEVEL`, where
LEVEL is that of activation checkpointing. Started by test_ranks.py."""

import logging
import sys
from pathlib import Path

import lightning as L
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support import blueprint_of, builtin

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.trainer import close_process_group
from lit_vlm.stages import SFTStage


def main(tower: str, language: str, out: str, tokens: str, batch: str, level: str) -> None:
    logging.getLogger("lightning").setLevel(logging.ERROR)
    blueprint = blueprint_of((tower, language))
    stage = SFTStage(blueprint, learning_rate=0.05, activation_checkpointing=level)
    stage.configure_optimizers = lambda: torch.optim.SGD(
        [p for p in stage.model.parameters() if p.requires_grad], lr=0.05
    )
    sources = builtin("text", "caption", "grounding", "multi_image", n=24)
    module = DataModule(
        Processor(blueprint.tokenizer, blueprint.images),
        sources,
        0.1,
        global_batch_size=int(batch),
        tokens_per_micro_batch=int(tokens),
        tiles_per_micro_batch=10_000,
        max_steps=4,
    )
    world = int(__import__("os").environ.get("WORLD_SIZE", "1"))
    losses = []

    class LossRecorder(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))

    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[LossRecorder()],
    )
    trainer.fit(stage, module)
    if trainer.is_global_zero:
        val = float(trainer.callback_metrics["val/loss"])
        torch.save(
            {
                "weights": stage.model.state_dict(),
                "val": val,
                "k": module.plan.accumulate_grad_batches,
                "loss": losses[-1],
            },
            out,
        )
    close_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
