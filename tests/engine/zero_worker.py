"""One rank of several under ZeRO: `torchrun --nproc-per-node=N zero_worker.py TOWER LANGUAGE OUT CHECK...`.

Started by test_deepspeed.py; leaves what each check found in OUT/<check>.<rank>.pt.
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
from rank_cases import Answers, Case, Keep, Put, assembled, fit, validate

from lit_vlm.engine import zero_model
from lit_vlm.engine.deepspeed import ZeroStrategy
from lit_vlm.engine.trainer import close_process_group

WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
Parts = tuple[str, str]


def strategy(name: str, persistent: int = 0) -> ZeroStrategy:
    """`persistent=0`: every weight is shared out, however small."""
    stage = {"zero2": 2, "zero3": 3, "zero3_offload": 3}[name]
    limit = timedelta(minutes=10)
    return ZeroStrategy(
        stage, offload=name.endswith("offload"), persistence_threshold=persistent, timeout=limit, bucket_size=100_000
    )


def trained(parts: Parts, out: Path, name: str, **case: Any) -> dict[str, Any]:
    return fit(Case(**case), parts, strategy(name), world=WORLD)


class Sizes(L.Callback):
    """Of the weights on this rank between steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        named = list(pl_module.named_parameters())  # of DPO both models
        self.sizes = {name: (w.ds_numel, w.ds_tensor.numel(), w.numel(), w.ds_status.name) for name, w in named}


def shared_out(parts: Parts, out: Path) -> dict[str, Any]:
    sizes, answers = Sizes(), Answers()
    seen = fit(Case("dpo", steps=2), parts, strategy("zero3"), answers, sizes, world=WORLD)
    return seen | {"sizes": sizes.sizes, "answers": answers.answers}


class FirstState(L.Callback):
    def on_train_start(self, trainer, pl_module):
        model, shards = pl_module.model, trainer.strategy.get_sharded_state(pl_module)
        whole = trainer.strategy.whole_weights(model)
        self.weights = {name: whole(name) for name, _ in model.named_parameters()}
        self.dtypes = {weight.dtype for weight in model.parameters()}
        self.masters = [(p.name, p.kind.value, p.shape, p.start, p.values.clone()) for p in shards.iter_shards()]


def masters(parts: Parts, out: Path, name: str) -> dict[str, Any]:
    """bf16-mixed: what is computed with, what is kept, and that it learns."""
    first = FirstState()
    seen = fit(Case(sgd=False, precision="bf16-mixed"), parts, strategy(name), first, world=WORLD)
    return seen | {"masters": first.masters, "dtypes": first.dtypes}


class Loaded(L.Callback):
    """Weights that compute, once another state is in the place of the first."""

    def on_train_start(self, trainer, pl_module):
        shards, whole = trainer.strategy.get_sharded_state(pl_module), trainer.strategy.whole_weights(pl_module.model)
        for piece in shards.iter_shards():
            piece.values.mul_(2.0)
        shards.sync_after_load(0)
        trained = [(name, weight) for name, weight in pl_module.model.named_parameters() if weight.requires_grad]
        self.weights = {name: (weight.detach().clone(), whole(name)) for name, weight in trained if weight.numel()}


def loaded(parts: Parts, out: Path) -> dict[str, Any]:
    """With small weights that stay whole on each rank, as in a run."""
    loaded = Loaded()
    fit(
        Case(sgd=False, steps=1, precision="bf16-mixed"),
        parts,
        strategy("zero3", persistent=10_000),
        loaded,
        world=WORLD,
    )
    return {"weights": loaded.weights}


def built(parts: Parts, out: Path) -> dict[str, Any]:
    """What exists in this process whenever a weight's values are read."""
    real, most = zero_model.read_initial_values, {"whole": 0, "read": 0.0}

    def first_values(model, name, shape, start, stop):
        whole = [weight for weight in model.parameters() if not weight.is_meta and weight.numel()]
        most["whole"] = max(most["whole"], len(whole))
        most["read"] = max(most["read"], (stop - start) / shape.numel())
        return real(model, name, shape, start, stop)

    zero_model.read_initial_values = first_values
    try:
        fit(Case("align", steps=1), parts, strategy("zero3"), first := FirstState(), world=WORLD)
    finally:
        zero_model.read_initial_values = real
    return most | {"weights": first.weights}


def kept(parts: Parts, out: Path, name: str) -> dict[str, Any]:
    keep = Keep(2)
    return fit(Case(sgd=False, steps=4), parts, strategy(name), keep, world=WORLD) | {"pieces": keep.pieces}


def put(parts: Parts, out: Path, name: str, source: str) -> dict[str, Any]:
    """Goes on from the state that `kept` left of the strategy `source`, perhaps on another number of ranks."""
    files = sorted(out.glob(f"kept name={source}.*.pt"))
    whole = assembled([torch.load(file, weights_only=False)["pieces"] for file in files])
    return fit(Case(sgd=False, steps=4), parts, strategy(name), Put(2, whole), world=WORLD)


def validated(parts: Parts, out: Path) -> dict[str, Any]:
    """`trainer.validate` alone, with rows of new tokens that sit in hooks."""
    return {"val": validate(Case("align"), parts, strategy("zero3"), world=WORLD)}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "trained": trained,
    "shared_out": shared_out,
    "masters": masters,
    "built": built,
    "loaded": loaded,
    "kept": kept,
    "put": put,
    "validated": validated,
}


def main(tower: str, language: str, out: str, *checks: str) -> None:
    """A check is its name and arguments: `trained name=zero2,clip=None`."""
    for check in checks:
        name, _, arguments = check.partition(" ")
        given = dict(pair.split("=") for pair in arguments.split(",") if pair)
        values = {key: _value(text) for key, text in given.items()}
        found = CHECKS[name]((tower, language), Path(out), **values)
        torch.save(found, Path(out) / f"{check}.{RANK}.pt")
        torch.distributed.barrier()
    close_process_group()


def _value(text: str) -> Any:
    known = {"None": None, "True": True, "False": False}
    return known[text] if text in known else int(text) if text.isdigit() else text


if __name__ == "__main__":
    main(*sys.argv[1:])
