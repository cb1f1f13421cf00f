"""One rank of several under FSDP2: `torchrun --nproc-per-node=N fsdp_worker.py TOWER LANGUAGE OUT CHECKS`.

CHECKS is JSON: the function and its arguments by the name of the check. Started by test_fsdp.py; writes the results of
each check to OUT/<name>.<rank>.pt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

import lightning as L
import torch
from alive import Alive
from rank_cases import AnswerRecorder, Case, StateRecorder, StateRestorer, assemble, fit, validate

from callbacks.export import Export
from lit_vlm.distributed import fsdp
from lit_vlm.distributed.fsdp import FSDP2Strategy
from lit_vlm.distributed.trainer import close_process_group

WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
Parts = tuple[str, str]


def make_strategy(**options: Any) -> FSDP2Strategy:
    return FSDP2Strategy(**{"timeout": timedelta(minutes=10)} | options)


def make_zero_strategy() -> Any:
    from lit_vlm.distributed.zero import ZeroStrategy

    return ZeroStrategy(3, persistence_threshold=0, timeout=timedelta(minutes=10), bucket_size=100_000)


def train(parts: Parts, out: Path, shard_size: int | None = None, **case: Any) -> dict[str, Any]:
    return fit(Case(**case), parts, make_strategy(hybrid=shard_size is not None, shard_size=shard_size), world=WORLD)


class RowRecorder(L.Callback):
    """Records the weights of this rank between steps: elements in total, elements in this rank's rows, and their type."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        named = list(pl_module.named_parameters())  # for DPO those of both models
        self.rows = {name: (w.numel(), w.to_local().numel(), str(w.dtype), w.requires_grad) for name, w in named}


def inspect_shards(parts: Parts, out: Path, precision: str = "32-true") -> dict[str, Any]:
    rows, answers = RowRecorder(), AnswerRecorder()
    results = fit(Case("dpo", steps=2, precision=precision), parts, make_strategy(), rows, answers, world=WORLD)
    return results | {"rows": rows.rows, "answers": answers.answers}


def measure_loading(parts: Parts, out: Path) -> dict[str, Any]:
    """Measure the memory that filling a skeleton takes, and the memory that it holds afterwards."""
    real, alive = fsdp.load_local_weights, Alive()

    def fill_and_measure(model, device):
        assert all(parameter.is_meta for parameter in model.parameters())
        with alive:
            real(model, device)

    class InitialStateRecorder(L.Callback):
        def on_train_start(self, trainer, pl_module):
            local = [weight.to_local() for weight in pl_module.model.parameters()]
            self.held, self.largest = sum(rows.nbytes for rows in local), max(rows.nbytes for rows in local)
            whole = trainer.strategy.whole_weights(pl_module.model)
            self.weights = {name: whole(name) for name, _ in pl_module.model.named_parameters()}

    fsdp.load_local_weights = fill_and_measure
    try:
        fit(Case("sft_lora", steps=1), parts, make_strategy(), first := InitialStateRecorder(), world=WORLD)
    finally:
        fsdp.load_local_weights = real
    return {"most": alive.most, "held": first.held, "largest": first.largest, "weights": first.weights}


def train_and_record_state(parts: Parts, out: Path, shard_size: int | None = None, **case: Any) -> dict[str, Any]:
    """Train, record the state of a step, and export at the end from ranks that hold shards."""
    chosen_strategy = make_strategy(hybrid=shard_size is not None, shard_size=shard_size)
    recorder, export = StateRecorder(2), Export(out / "exported")
    results = fit(Case(**{"sgd": False, "steps": 4} | case), parts, chosen_strategy, recorder, export, world=WORLD)
    return results | {"pieces": recorder.pieces, "writes": recorder.writes}


def train_and_restore_state(
    parts: Parts, out: Path, source: str, shard_size: int | None = None, **case: Any
) -> dict[str, Any]:
    """Resume from the state that a check saved under the name `source`, possibly on another number of ranks."""
    ranks = [torch.load(file, weights_only=False) for file in sorted(out.glob(f"{source}.*.pt"))]
    whole = assemble([rank["pieces"] for rank in ranks if rank["writes"]])
    chosen_strategy = make_strategy(hybrid=shard_size is not None, shard_size=shard_size)
    return fit(Case(**{"sgd": False, "steps": 4} | case), parts, chosen_strategy, StateRestorer(2, whole), world=WORLD)


def train_under_zero3(parts: Parts, out: Path, **case: Any) -> dict[str, Any]:
    """Train under ZeRO-3, export, and record a state from which FSDP2 resumes."""
    recorder, export = StateRecorder(2), Export(out / "zero3")
    results = fit(Case(**{"sgd": False, "steps": 4} | case), parts, make_zero_strategy(), recorder, export, world=WORLD)
    return results | {"pieces": recorder.pieces, "writes": recorder.writes}


class PrebuiltCase(Case):
    """A case whose stage builds the whole model before the strategy."""

    def make_stage(self, parts: Parts) -> Any:
        stage = super().make_stage(parts)
        stage.configure_model()
        return stage


def train_prebuilt_model(parts: Parts, out: Path, zero: bool = False) -> dict[str, Any]:
    """Train a prebuilt model in bfloat16 and export it."""
    chosen_strategy = make_zero_strategy() if zero else make_strategy()
    export = Export(out / ("given_zero3" if zero else "given"))
    return fit(PrebuiltCase("align", sgd=False, precision="bf16-mixed"), parts, chosen_strategy, export, world=WORLD)


def validate_without_training(parts: Parts, out: Path) -> dict[str, Any]:
    """Run `trainer.validate` without training, with rows of new tokens that are applied in hooks."""
    return {"val": validate(Case("align"), parts, make_strategy(), world=WORLD)}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        train,
        inspect_shards,
        measure_loading,
        train_and_record_state,
        train_and_restore_state,
        train_under_zero3,
        train_prebuilt_model,
        validate_without_training,
    )
}


def main(tower: str, language: str, out: str, checks: str) -> None:
    for name, (function, arguments) in json.loads(checks).items():
        results = CHECKS[function]((tower, language), Path(out), **arguments)
        torch.save(results, Path(out) / f"{name}.{RANK}.pt")
        torch.distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
