"""Checks before the first step that all ranks share settings, code and data, because different ranks would hang in it."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy as LightningStrategy

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import RunConfig, Strategy
from lit_vlm.data.datamodule import DataModule
from lit_vlm.engine.checkpoint import plan_digest
from lit_vlm.engine.run_folder import to_plain, versions
from lit_vlm.types import UserError, counted

# Settings that may differ between machines. All others, also those of `config/elsewhere.py`, must be equal on all ranks.
OF_A_MACHINE = ("run_dir", "index_dir", "num_threads", "num_workers", "index_workers", "enable_progress_bar", "logger")
NUM_NAMED = 8  # maximum number of ranks, and of settings, in a message


class Agreement(L.Callback):
    """Callback that compares all ranks once the process group exists: UserError on rank 0, exit status 1 on all ranks."""

    def __init__(self, config: RunConfig, datamodule: DataModule) -> None:
        self.config, self.datamodule = config, datamodule

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare all ranks before training."""
        if stage == "fit" and trainer.world_size > 1:
            level = getattr(pl_module, "level", Level.none)
            facts = facts_of(self.config, self.datamodule, trainer.strategy, level)
            require_same(facts, trainer.strategy.root_device)


def facts_of(
    config: RunConfig, datamodule: DataModule, strategy: LightningStrategy, level: Level = Level.none
) -> dict[str, Any]:
    """Collect what must be equal on all ranks, keyed by its name in the error message."""
    plan, index = datamodule.plan, datamodule.index
    assert plan is not None and index is not None
    return {
        "settings": settings_of(config, strategy, level),
        "code": code_digest(),
        "packages": versions(),
        "data": index.digest(),
        "tokenizer, chat template or day that it writes": datamodule.processor.digest,
        "plan": [plan_digest(plan), plan.k, plan.world_size],
        "ledger and caps of micro-batches": [plan.left_out.tolist(), *datamodule.budget],
    }


def settings_of(config: RunConfig, strategy: LightningStrategy, level: Level = Level.none) -> dict[str, Any]:
    """Collect all settings by their full keys.

    For `auto`, the chosen strategy and level of activation checkpointing are added: unequal devices may choose differently.
    """
    settings = _flat(to_plain(asdict(config)))
    if config.trainer.strategy is Strategy.auto:
        settings["trainer.strategy"] = f"auto, here {getattr(strategy, 'setting', type(strategy).__name__)}"
    if config.stage.activation_checkpointing is Level.auto:
        settings["stage.activation_checkpointing"] = f"auto, here {level.value}"
    return settings


def code_digest() -> str:
    """Compute the SHA-256 of the source files of this package and of the callbacks."""
    root, hasher = Path(__file__).resolve().parents[2], hashlib.sha256()
    for file in sorted([*root.glob("lit_vlm/**/*.py"), *root.glob("callbacks/*.py")]):
        hasher.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()


def require_same(facts: dict[str, Any], device: torch.device) -> None:
    """Require that all facts are equal on all ranks, by one all-gather of a digest for each fact.

    Only if digests differ, the settings themselves are gathered for the message.

    Raises:
        UserError: on all ranks. The message on rank 0 names the ranks and the differences.
    """
    digests = b"".join(hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest() for fact in facts.values())
    own_digests = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(len(facts), -1).to(device)
    world = torch.distributed.get_world_size()
    gathered = [torch.empty_like(own_digests) for _ in range(world)]
    torch.distributed.all_gather(gathered, own_digests)
    equal = torch.stack([(other == gathered[0]).all(dim=1) for other in gathered]).tolist()  # [ranks, facts]
    if all(map(all, equal)):
        return
    rank_settings: list[Any] = [None] * world
    torch.distributed.all_gather_object(rank_settings, (socket.gethostname(), facts["settings"]))
    if torch.distributed.get_rank():
        raise UserError("")
    differences = [
        f"rank {rank} on {rank_settings[rank][0]} in its {' and '.join(_names(facts, same, rank_settings[rank][1], rank_settings[0][1]))}"
        for rank, same in enumerate(equal)
        if not all(same)
    ]
    more = f"; and {counted(len(differences) - NUM_NAMED, 'more rank')}" if len(differences) > NUM_NAMED else ""
    raise UserError(
        f"The ranks were not started alike. Other than rank 0 on {rank_settings[0][0]}: {'; '.join(differences[:NUM_NAMED])}{more}. "
        "Start all of them with the same command, the same checkout and packages, and the same files."
    )


def _names(facts: dict[str, Any], same: list[bool], settings: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Describe how a rank differs from rank 0.

    Different settings also change data and plan. Then only the causes are named: settings, code and packages.
    """
    names = [name for name, is_equal in zip(facts, same, strict=True) if not is_equal]
    if "settings" in names:
        keys = [key for key in sorted({*settings, *first}) if settings.get(key) != first.get(key)]
        changed = ", ".join(f"{key} ({settings.get(key)} and not {first.get(key)})" for key in keys[:NUM_NAMED])
        return [f"settings: {changed}", *(name for name in names if name in ("code", "packages"))]
    return names


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            key: leaf
            for name, item in value.items()
            if name not in OF_A_MACHINE
            for key, leaf in _flat(item, f"{prefix}{name}.").items()
        }
    return {prefix.rstrip("."): value}
