"""Checks before the first step that all ranks share settings, code and data, because different ranks would hang in it."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy as LightningStrategy

from lit_vlm.checkpoint.index import compute_plan_digest
from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import StrategyName
from lit_vlm.data.datamodule import DataModule
from lit_vlm.distributed.collectives import gather_objects
from lit_vlm.formatting import format_count
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.types import UserError, flatten

# Settings that may differ between machines. All others, also those of `config/elsewhere.py`, must be equal on all ranks.
MACHINE_SETTINGS = (
    "run_dir",
    "index_dir",
    "num_threads",
    "num_workers",
    "index_workers",
    "enable_progress_bar",
    "logger",
)
MAX_LISTED = 8  # maximum number of ranks, and of settings, in a message


class RankConsistencyCheck(L.Callback):
    """Callback that compares all ranks once the process group exists: UserError on rank 0, exit status 1 on all ranks.

    Args:
        settings: all settings of the run, see `to_plain`.
    """

    def __init__(self, settings: dict[str, Any], datamodule: DataModule) -> None:
        self.settings, self.datamodule = settings, datamodule

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare all ranks before training."""
        if stage == "fit" and trainer.world_size > 1:
            level = getattr(pl_module, "level", Level.none)
            facts = collect_rank_facts(self.settings, self.datamodule, trainer.strategy, level)
            require_equal_facts(facts, trainer.strategy.root_device)


def collect_rank_facts(
    settings: dict[str, Any], datamodule: DataModule, strategy: LightningStrategy, level: Level = Level.none
) -> dict[str, Any]:
    """Collect what must be equal on all ranks, keyed by its name in the error message."""
    plan, index = datamodule.plan, datamodule.index
    assert plan is not None and index is not None
    return {
        "settings": collect_rank_settings(settings, strategy, level),
        "code": compute_code_digest(),
        "packages": get_package_versions(),
        "data": index.compute_digest(),
        "tokenizer, chat template or day that it writes": datamodule.processor.digest,
        "plan": [compute_plan_digest(plan), plan.accumulate_grad_batches, plan.world_size],
        "ledger and caps of micro-batches": [plan.excluded_samples.tolist(), *datamodule.micro_batch_limits],
    }


def collect_rank_settings(
    settings: dict[str, Any], strategy: LightningStrategy, level: Level = Level.none
) -> dict[str, Any]:
    """Collect all settings by their full keys.

    For `auto`, the chosen strategy and level of activation checkpointing are added: unequal devices may choose differently.
    """
    flat = {key: value for key, value in flatten(settings).items() if not set(key.split(".")) & set(MACHINE_SETTINGS)}
    if flat["trainer.strategy"] == StrategyName.auto.name:
        flat["trainer.strategy"] = f"auto, here {getattr(strategy, 'setting', type(strategy).__name__)}"
    if flat["stage.activation_checkpointing"] == Level.auto.name:
        flat["stage.activation_checkpointing"] = f"auto, here {level.value}"
    return flat


def compute_code_digest() -> str:
    """Compute the SHA-256 of the source files of this package and of the callbacks."""
    root, hasher = Path(__file__).resolve().parents[2], hashlib.sha256()
    for file in sorted([*root.glob("lit_vlm/**/*.py"), *root.glob("callbacks/*.py")]):
        hasher.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()


def require_equal_facts(facts: dict[str, Any], device: torch.device) -> None:
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
    rank_settings = gather_objects((socket.gethostname(), facts["settings"]), world)
    if torch.distributed.get_rank():
        raise UserError("")
    differences = []
    for rank, same in enumerate(equal):
        if not all(same):
            host, settings = rank_settings[rank]
            found = _describe_differences(facts, same, settings, rank_settings[0][1])
            differences.append(f"rank {rank} on {host} in its {' and '.join(found)}")
    more = f"; and {format_count(len(differences) - MAX_LISTED, 'more rank')}" if len(differences) > MAX_LISTED else ""
    raise UserError(
        f"The ranks were not started alike. Other than rank 0 on {rank_settings[0][0]}: {'; '.join(differences[:MAX_LISTED])}{more}. "
        "Start all of them with the same command, the same checkout and packages, and the same files."
    )


def _describe_differences(
    facts: dict[str, Any], equal_facts: list[bool], settings: dict[str, Any], first_settings: dict[str, Any]
) -> list[str]:
    """Describe how a rank differs from rank 0.

    Different settings also change data and plan. Then only the causes are named: settings, code and packages.
    """
    names = [name for name, is_equal in zip(facts, equal_facts, strict=True) if not is_equal]
    if "settings" in names:
        keys = [key for key in sorted({*settings, *first_settings}) if settings.get(key) != first_settings.get(key)]
        changed = ", ".join(
            f"{key} ({settings.get(key)} and not {first_settings.get(key)})" for key in keys[:MAX_LISTED]
        )
        return [f"settings: {changed}", *(name for name in names if name in ("code", "packages"))]
    return names
