"""One rank of several under ZeRO: `torchrun --nproc-per-node=N zero_worker.py TOWER LANGUAGE OUT CHECK...`.

Started by test_deepspeed.py; writes the results of each check to OUT/<check>.<rank>.pt.
"""

from __future__ import annotations

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
from rank_cases import AnswerRecorder, Case, StateRecorder, StateRestorer, assemble, fit, validate

from lit_vlm.distributed import zero
from lit_vlm.distributed.trainer import close_process_group
from lit_vlm.distributed.zero import ZeroStrategy

WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
Parts = tuple[str, str]


def make_strategy(name: str, persistent: int = 0) -> ZeroStrategy:
    """Return the strategy. With `persistent=0` every weight is sharded, however small."""
    stage = {"zero2": 2, "zero3": 3, "zero3_offload": 3}[name]
    limit = timedelta(minutes=10)
    return ZeroStrategy(
        stage, offload=name.endswith("offload"), persistence_threshold=persistent, timeout=limit, bucket_size=100_000
    )


def train(parts: Parts, out: Path, name: str, **case: Any) -> dict[str, Any]:
    return fit(Case(**case), parts, make_strategy(name), world=WORLD)


class SizeRecorder(L.Callback):
    """Records the sizes of the weights on this rank between steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        named = list(pl_module.named_parameters())  # for DPO those of both models
        self.sizes = {name: (w.ds_numel, w.ds_tensor.numel(), w.numel(), w.ds_status.name) for name, w in named}


def inspect_shards(parts: Parts, out: Path) -> dict[str, Any]:
    sizes, answers = SizeRecorder(), AnswerRecorder()
    results = fit(Case("dpo", steps=2), parts, make_strategy("zero3"), answers, sizes, world=WORLD)
    return results | {"sizes": sizes.sizes, "answers": answers.answers}


class InitialStateRecorder(L.Callback):
    def on_train_start(self, trainer, pl_module):
        model, shards = pl_module.model, trainer.strategy.get_sharded_state(pl_module)
        whole = trainer.strategy.whole_weights(model)
        self.weights = {name: whole(name) for name, _ in model.named_parameters()}
        self.dtypes = {weight.dtype for weight in model.parameters()}
        self.masters = [(p.name, p.kind.value, p.shape, p.start, p.values.clone()) for p in shards.iter_shards()]


def inspect_masters(parts: Parts, out: Path, name: str) -> dict[str, Any]:
    """Train in bf16-mixed; return the initial float32 master weights and the types that compute."""
    first = InitialStateRecorder()
    results = fit(Case(sgd=False, precision="bf16-mixed"), parts, make_strategy(name), first, world=WORLD)
    return results | {"masters": first.masters, "dtypes": first.dtypes}


class LoadedStateRecorder(L.Callback):
    """Records the weights that compute after another state was loaded."""

    def on_train_start(self, trainer, pl_module):
        shards, whole = trainer.strategy.get_sharded_state(pl_module), trainer.strategy.whole_weights(pl_module.model)
        for piece in shards.iter_shards():
            piece.values.mul_(2.0)
        shards.sync_after_load(0)
        trained = [(name, weight) for name, weight in pl_module.model.named_parameters() if weight.requires_grad]
        self.weights = {name: (weight.detach().clone(), whole(name)) for name, weight in trained if weight.numel()}


def inspect_loaded_weights(parts: Parts, out: Path) -> dict[str, Any]:
    """Load another state with small weights that stay whole on each rank, as in a run."""
    recorder = LoadedStateRecorder()
    fit(
        Case(sgd=False, steps=1, precision="bf16-mixed"),
        parts,
        make_strategy("zero3", persistent=10_000),
        recorder,
        world=WORLD,
    )
    return {"weights": recorder.weights}


def measure_building(parts: Parts, out: Path) -> dict[str, Any]:
    """Measure what exists in this process whenever a weight's values are read."""
    real, largest = zero.read_initial_values, {"whole": 0, "read": 0.0}

    def read_and_measure(model, name, shape, start, stop):
        whole = [weight for weight in model.parameters() if not weight.is_meta and weight.numel()]
        largest["whole"] = max(largest["whole"], len(whole))
        largest["read"] = max(largest["read"], (stop - start) / shape.numel())
        return real(model, name, shape, start, stop)

    zero.read_initial_values = read_and_measure
    try:
        fit(Case("align", steps=1), parts, make_strategy("zero3"), first := InitialStateRecorder(), world=WORLD)
    finally:
        zero.read_initial_values = real
    return largest | {"weights": first.weights}


def train_and_record_state(parts: Parts, out: Path, name: str) -> dict[str, Any]:
    recorder = StateRecorder(2)
    return fit(Case(sgd=False, steps=4), parts, make_strategy(name), recorder, world=WORLD) | {
        "pieces": recorder.pieces
    }


def train_and_restore_state(parts: Parts, out: Path, name: str, source: str) -> dict[str, Any]:
    """Resume from the state that the check `kept` saved under the strategy `source`, possibly on another number of ranks."""
    files = sorted(out.glob(f"kept name={source}.*.pt"))
    whole = assemble([torch.load(file, weights_only=False)["pieces"] for file in files])
    return fit(Case(sgd=False, steps=4), parts, make_strategy(name), StateRestorer(2, whole), world=WORLD)


def validate_without_training(parts: Parts, out: Path) -> dict[str, Any]:
    """Run `trainer.validate` without training, with rows of new tokens that are applied in hooks."""
    return {"val": validate(Case("align"), parts, make_strategy("zero3"), world=WORLD)}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "trained": train,
    "shared_out": inspect_shards,
    "masters": inspect_masters,
    "built": measure_building,
    "loaded": inspect_loaded_weights,
    "kept": train_and_record_state,
    "put": train_and_restore_state,
    "validated": validate_without_training,
}


def main(tower: str, language: str, out: str, *checks: str) -> None:
    """Run the checks; a check is its name and arguments: `trained name=zero2,clip=None`."""
    for check in checks:
        name, _, arguments = check.partition(" ")
        given = dict(pair.split("=") for pair in arguments.split(",") if pair)
        values = {key: _parse_value(text) for key, text in given.items()}
        results = CHECKS[name]((tower, language), Path(out), **values)
        torch.save(results, Path(out) / f"{check}.{RANK}.pt")
        torch.distributed.barrier()
    close_process_group()


def _parse_value(text: str) -> Any:
    known = {"None": None, "True": True, "False": False}
    return known[text] if text in known else int(text) if text.isdigit() else text


if __name__ == "__main__":
    main(*sys.argv[1:])
