"""One rank of several under FSDP2: `torchrun --nproc-per-node=N fsdp_worker.py TOWER LANGUAGE OUT CHECKS`.

CHECKS is JSON: of each check's name the function and its arguments. Started by test_fsdp.py; leaves what each check
found in OUT/<name>.<rank>.pt.
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
from rank_cases import Answers, Case, Keep, Put, assembled, fit, validate

from callbacks.export import Export
from lit_vlm.engine import fsdp
from lit_vlm.engine.fsdp import FSDP2Strategy
from lit_vlm.engine.trainer import close_process_group

WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
Parts = tuple[str, str]


def strategy(**options: Any) -> FSDP2Strategy:
    return FSDP2Strategy(**{"timeout": timedelta(minutes=10)} | options)


def zero_strategy() -> Any:
    from lit_vlm.engine.deepspeed import ZeroStrategy

    return ZeroStrategy(3, persistence_threshold=0, timeout=timedelta(minutes=10), bucket_size=100_000)


def trained(parts: Parts, out: Path, shard_size: int | None = None, **case: Any) -> dict[str, Any]:
    return fit(Case(**case), parts, strategy(hybrid=shard_size is not None, shard_size=shard_size), world=WORLD)


class Rows(L.Callback):
    """What this rank holds of the weights between steps: elements of the whole, of this rank's rows, and their type."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        named = list(pl_module.named_parameters())  # of DPO both models
        self.rows = {name: (w.numel(), w.to_local().numel(), str(w.dtype), w.requires_grad) for name, w in named}


def shared_out(parts: Parts, out: Path, precision: str = "32-true") -> dict[str, Any]:
    rows, answers = Rows(), Answers()
    seen = fit(Case("dpo", steps=2, precision=precision), parts, strategy(), rows, answers, world=WORLD)
    return seen | {"rows": rows.rows, "answers": answers.answers}


def built(parts: Parts, out: Path) -> dict[str, Any]:
    """Memory that filling a skeleton takes, and what it then holds."""
    real, alive = fsdp.load_local_weights, Alive()

    def fill(model, device):
        assert all(parameter.is_meta for parameter in model.parameters())
        with alive:
            real(model, device)

    class First(L.Callback):
        def on_train_start(self, trainer, pl_module):
            local = [weight.to_local() for weight in pl_module.model.parameters()]
            self.held, self.largest = sum(rows.nbytes for rows in local), max(rows.nbytes for rows in local)
            whole = trainer.strategy.whole_weights(pl_module.model)
            self.weights = {name: whole(name) for name, _ in pl_module.model.named_parameters()}

    fsdp.load_local_weights = fill
    try:
        fit(Case("sft_lora", steps=1), parts, strategy(), first := First(), world=WORLD)
    finally:
        fsdp.load_local_weights = real
    return {"most": alive.most, "held": first.held, "largest": first.largest, "weights": first.weights}


def kept(parts: Parts, out: Path, shard_size: int | None = None, **case: Any) -> dict[str, Any]:
    """And exported at the end, from ranks that share the weights out."""
    chosen = strategy(hybrid=shard_size is not None, shard_size=shard_size)
    keep, export = Keep(2), Export(out / "exported")
    seen = fit(Case(**{"sgd": False, "steps": 4} | case), parts, chosen, keep, export, world=WORLD)
    return seen | {"pieces": keep.pieces, "writes": keep.writes}


def put(parts: Parts, out: Path, source: str, shard_size: int | None = None, **case: Any) -> dict[str, Any]:
    """Goes on from the state that `kept` left under the name `source`, perhaps on another number of ranks."""
    ranks = [torch.load(file, weights_only=False) for file in sorted(out.glob(f"{source}.*.pt"))]
    whole = assembled([rank["pieces"] for rank in ranks if rank["writes"]])
    chosen = strategy(hybrid=shard_size is not None, shard_size=shard_size)
    return fit(Case(**{"sgd": False, "steps": 4} | case), parts, chosen, Put(2, whole), world=WORLD)


def zero3(parts: Parts, out: Path, **case: Any) -> dict[str, Any]:
    """`kept` under ZeRO-3: its folder, and its state for FSDP2 to go on from."""
    keep, export = Keep(2), Export(out / "zero3")
    seen = fit(Case(**{"sgd": False, "steps": 4} | case), parts, zero_strategy(), keep, export, world=WORLD)
    return seen | {"pieces": keep.pieces, "writes": keep.writes}


class Built(Case):
    """A stage whose model is there, whole, before the strategy."""

    def make_stage(self, parts: Parts) -> Any:
        stage = super().make_stage(parts)
        stage.configure_model()
        return stage


def given(parts: Parts, out: Path, zero: bool = False) -> dict[str, Any]:
    """A model that was built before, computed with in bfloat16, and its export."""
    chosen = zero_strategy() if zero else strategy()
    export = Export(out / ("given_zero3" if zero else "given"))
    return fit(Built("align", sgd=False, precision="bf16-mixed"), parts, chosen, export, world=WORLD)


def validated(parts: Parts, out: Path) -> dict[str, Any]:
    """`trainer.validate` alone, with rows of new tokens that sit in hooks."""
    return {"val": validate(Case("align"), parts, strategy(), world=WORLD)}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (trained, shared_out, built, kept, put, zero3, given, validated)
}


def main(tower: str, language: str, out: str, checks: str) -> None:
    for name, (function, arguments) in json.loads(checks).items():
        found = CHECKS[function]((tower, language), Path(out), **arguments)
        torch.save(found, Path(out) / f"{name}.{RANK}.pt")
        torch.distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
