"""Count collective bytes and state bytes of a training step: `torchrun -m benchmarks.counting STRATEGY MICRO PRECISION OUT PARTS`.

This is one rank; benchmarks/scaling.py starts it. Each call to a process group of torch.distributed passes the counter,
from any engine: DDP's reducer in C++, fully_shard or DeepSpeed.
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

from lit_vlm.config.choices import StrategyName
from lit_vlm.config.schema import ModelConfig, TrainerConfig
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.distributed.trainer import close_process_group, disable_library_warnings, make_strategy
from lit_vlm.model.spec import load_model_spec
from lit_vlm.stages import SFTStage
from lit_vlm.types import Language

# After two steps the engines are warm: DDP has ordered its buckets, and DeepSpeed knows the order of layers.
COUNTED_STEP = 2
SMALL_BYTES = 64  # bytes; such messages are values for logging and norms for gradient clipping


class CollectiveCounter(TorchDispatchMode):
    """Counter of the bytes of the full tensor in each collective, by kind. Small messages are counted separately."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, size = self._classify(func._schema.name.removeprefix("c10d::").strip("_"), args)
            if kind:
                kind = f"{kind}, small" if size <= SMALL_BYTES else kind
                self.bytes[kind] += size
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _classify(name: str, args: Any) -> tuple[str, int]:
        if name.startswith("allreduce"):
            return "all-reduce", _count_bytes(args[0])
        if name.startswith("allgather"):
            return "all-gather", _count_bytes(args[0])  # the output is the full tensor
        if name.startswith("reduce_scatter"):
            return "reduce-scatter", _count_bytes(args[1])  # the input is the full tensor
        return ("", 0) if name in ("barrier", "monitored_barrier") else (name, _count_bytes(args[0]))


def _count_bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_count_bytes, tensors))


class StepCounter(L.Callback):
    """Counts collectives from the first micro-step of a step to the end of its update."""

    def __init__(self) -> None:
        self.counter = CollectiveCounter()
        self.states: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, stage: Any, optimizer: Any) -> None:
        self.states = measure_states(trainer, stage.model)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == COUNTED_STEP and self._get_micro_step(trainer) == 0:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (
            trainer.global_step == COUNTED_STEP + 1
            and self._get_micro_step(trainer) == trainer.accumulate_grad_batches - 1
        ):
            self.counter.__exit__(None, None, None)

    def _get_micro_step(self, trainer: L.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches


def measure_states(trainer: L.Trainer, model: Any) -> dict[str, int]:
    """Measure the state bytes of this rank between the last backward pass of a step and its update."""
    zero_optimizer = getattr(getattr(trainer.strategy, "deepspeed_engine", None), "optimizer", None)
    parameters = list(model.parameters())
    sizes = {"weights": sum(_count_bytes(_get_local(p)) for p in parameters)}
    if zero_optimizer is None:
        sizes["gradients"] = sum(_count_bytes(_get_local(p.grad)) for p in parameters if p.grad is not None)
        adam = trainer.optimizers[0]
    else:
        partitioned = hasattr(zero_optimizer, "fp32_partitioned_groups_flat")
        sizes["float32 masters"] = _count_bytes(
            zero_optimizer.fp32_partitioned_groups_flat
            if partitioned
            else zero_optimizer.single_partition_of_fp32_groups
        )
        sizes["gradients"] = sum(_count_bytes(group) for group in zero_optimizer.averaged_gradients.values() if group)
        adam = zero_optimizer.optimizer
    moments = (_get_local(state[name]) for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return sizes | {"AdamW's moments": sum(map(_count_bytes, moments))}


def _get_local(tensor: Any) -> torch.Tensor:
    if hasattr(tensor, "ds_tensor"):  # DeepSpeed's partition
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(strategy: str, num_micro_batches: str, precision: str, out: str, tower: str, language: str) -> None:
    disable_library_warnings()
    torch.set_num_threads(1)
    world, accumulation_steps = int(os.environ["WORLD_SIZE"]), int(num_micro_batches)
    blueprint = load_model_spec(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    stage = SFTStage(blueprint)
    settings = TrainerConfig(accelerator="cpu", devices=world, strategy=StrategyName(strategy), precision=precision)
    settings.shard_size = max(1, world // 2) if settings.strategy is StrategyName.hsdp else None
    source = BuiltinSource("caption_ko", "caption", language=Language.ko, num_samples=20 * world)
    samples = 4 * world * accumulation_steps
    data = DataModule(
        Processor(blueprint.tokenizer, blueprint.images),
        [source],
        0.0,
        global_batch_size=samples,
        max_steps=COUNTED_STEP + 2,
        tokens_per_micro_batch=1 << 20 if accumulation_steps == 1 else 200,
        num_workers=0,
    )
    step_counter = StepCounter()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=_make_strategy(settings),
        precision=precision,
        gradient_clip_val=1.0,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[step_counter],
    )
    trainer.fit(stage, data)
    counted = {"bytes": dict(step_counter.counter.bytes), "calls": dict(step_counter.counter.calls)}
    rank_results: list[Any] = [None] * world
    dist.all_gather_object(rank_results, counted | {"states": step_counter.states})
    if trainer.is_global_zero:
        all_equal = all(rank_result["bytes"] == counted["bytes"] for rank_result in rank_results)
        max_states = {
            name: max(rank_result["states"][name] for rank_result in rank_results) for name in step_counter.states
        }
        result = {
            "strategy": strategy,
            "precision": precision,
            "ranks": world,
            "k": data.plan.accumulate_grad_batches,
            "alike": all_equal,
        }
        Path(out).write_text(json.dumps(result | count_parameters(stage.model) | counted | {"states": max_states}))
    close_process_group()


def count_parameters(model: Any) -> dict[str, int]:
    """Count the parameters that the communication formulas need.

    `root`: parameters outside of all layers, which FSDP2 gathers once instead of twice. `table`: parameters of embeddings
    that are tied to the head.
    """
    counts = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    frozen = sum(counts[name] for name, p in model.named_parameters() if not p.requires_grad)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = counts["model.language_model.embed_tokens.weight"] if tied else 0
    root = sum(count for name, count in counts.items() if ".layers." not in name)
    total = sum(counts.values())
    return {"total": total, "trainable": total - frozen, "root": root, "table": table}


def _make_strategy(settings: TrainerConfig) -> Any:
    """Make the strategy of this project, with ZeRO-3 set to partition all weights.

    By default ZeRO-3 would keep a model of this size unpartitioned.
    """
    strategy: Any = make_strategy(settings)
    if settings.strategy is StrategyName.deepspeed_zero3:
        strategy.config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,  # elements of a weight that stays unpartitioned
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    return strategy


if __name__ == "__main__":
    main(*sys.argv[1:])
