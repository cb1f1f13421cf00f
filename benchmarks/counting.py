"""One rank of a training step whose messages and states are counted: `torchrun -m benchmarks.counting STRATEGY MICRO PRECISION OUT PARTS`.

Started by benchmarks/scaling.py. Every call that reaches torch.distributed's process groups passes the counter, whichever
engine makes it: DDP's reducer in C++, fully_shard, DeepSpeed.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")
warnings.filterwarnings("ignore")

import lightning as L
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lit_vlm.config.schema import ModelConfig, Strategy, TrainerConfig
from lit_vlm.data.builtin import BuiltinSource
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.engine.strategy import make_strategy
from lit_vlm.engine.trainer import leave_process_group, quiet
from lit_vlm.model.build import draw_up
from lit_vlm.stages import SFTStage
from lit_vlm.types import Language

COUNTED_STEP = (
    2  # by then engines have seen a whole step: DDP has ordered its buckets, DeepSpeed knows the order of layers
)
FEW = 64  # bytes; smaller messages are numbers for the log and norms for clipping


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor that each collective is about, by its kind; small ones apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, size = self._seen(func._schema.name.removeprefix("c10d::").strip("_"), args)
            if kind:
                kind = f"{kind}, small" if size <= FEW else kind
                self.bytes[kind] += size
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _seen(name: str, args: Any) -> tuple[str, int]:
        if name.startswith("allreduce"):
            return "all-reduce", _bytes(args[0])
        if name.startswith("allgather"):
            return "all-gather", _bytes(args[0])  # what comes out is the whole
        if name.startswith("reduce_scatter"):
            return "reduce-scatter", _bytes(args[1])  # what goes in is
        return ("", 0) if name in ("barrier", "monitored_barrier") else (name, _bytes(args[0]))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


class CountOneStep(L.Callback):
    """Counts from the first micro-step of a step to the end of its update."""

    def __init__(self) -> None:
        self.counter = Collectives()
        self.states: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, stage: Any, optimizer: Any) -> None:
        self.states = states(trainer, stage.model)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == COUNTED_STEP and self._micro(trainer) == 0:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == COUNTED_STEP + 1 and self._micro(trainer) == trainer.accumulate_grad_batches - 1:
            self.counter.__exit__(None, None, None)

    def _micro(self, trainer: L.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches


def states(trainer: L.Trainer, model: Any) -> dict[str, int]:
    """Bytes that this rank holds between a step's last backward pass and its update."""
    zero = getattr(getattr(trainer.strategy, "deepspeed_engine", None), "optimizer", None)
    parameters = list(model.parameters())
    held = {"weights": sum(_bytes(_local(p)) for p in parameters)}
    if zero is None:
        held["gradients"] = sum(_bytes(_local(p.grad)) for p in parameters if p.grad is not None)
        adam = trainer.optimizers[0]
    else:
        partitioned = hasattr(zero, "fp32_partitioned_groups_flat")
        held["float32 masters"] = _bytes(
            zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups
        )
        held["gradients"] = sum(_bytes(group) for group in zero.averaged_gradients.values() if group)
        adam = zero.optimizer
    moments = (_local(state[name]) for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return held | {"AdamW's moments": sum(map(_bytes, moments))}


def _local(tensor: Any) -> torch.Tensor:
    if hasattr(tensor, "ds_tensor"):  # DeepSpeed's slice
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(strategy: str, micro_steps: str, precision: str, out: str, tower: str, language: str) -> None:
    quiet()
    torch.set_num_threads(1)
    world, k = int(os.environ["WORLD_SIZE"]), int(micro_steps)
    blueprint = draw_up(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    stage = SFTStage(blueprint)
    settings = TrainerConfig(accelerator="cpu", devices=world, strategy=Strategy(strategy), precision=precision)
    settings.shard_size = max(1, world // 2) if settings.strategy is Strategy.hsdp else None
    source = BuiltinSource("caption_ko", "caption", language=Language.ko, num_samples=20 * world)
    samples = 4 * world * k
    data = DataModule(
        Processor(blueprint.tokenizer, blueprint.images),
        [source],
        0.0,
        global_batch_size=samples,
        max_steps=COUNTED_STEP + 2,
        tokens_per_micro_batch=1 << 20 if k == 1 else 200,
        num_workers=0,
    )
    count = CountOneStep()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=_strategy(settings),
        precision=precision,
        gradient_clip_val=1.0,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[count],
    )
    trainer.fit(stage, data)
    counted = {"bytes": dict(count.counter.bytes), "calls": dict(count.counter.calls)}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, counted | {"states": count.states})
    if trainer.is_global_zero:
        alike = all(other["bytes"] == counted["bytes"] for other in everyone)
        most = {name: max(other["states"][name] for other in everyone) for name in count.states}
        result = {"strategy": strategy, "precision": precision, "ranks": world, "k": data.plan.k, "alike": alike}
        Path(out).write_text(json.dumps(result | sizes_of(stage.model) | counted | {"states": most}))
    leave_process_group()


def sizes_of(model: Any) -> dict[str, int]:
    """Numbers of parameters that the formulas ask for.

    `root`: outside of all layers, where FSDP2 gathers once and not twice. `table`: of embeddings that are the head too.
    """
    named = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    frozen = sum(named[name] for name, p in model.named_parameters() if not p.requires_grad)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = named["model.language_model.embed_tokens.weight"] if tied else 0
    root = sum(number for name, number in named.items() if ".layers." not in name)
    total = sum(named.values())
    return {"total": total, "trainable": total - frozen, "root": root, "table": table}


def _strategy(settings: TrainerConfig) -> Any:
    """This project's own. ZeRO-3 would leave a model as tiny as this whole all the time; here it leaves nothing whole."""
    strategy: Any = make_strategy(settings)
    if settings.strategy is Strategy.deepspeed_zero3:
        strategy.config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,  # elements of a weight that stays whole
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    return strategy


if __name__ == "__main__":
    main(*sys.argv[1:])
