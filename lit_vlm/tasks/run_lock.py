"""Mixture lock of a run: writes mixture.lock into the run folder and compares the data with `data.lock`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_vlm.data.plan.lock import DAY, LOCK, differences, read_lock, source_facts, write_lock
from lit_vlm.engine.run_folder import find_manifest, is_rank_zero, versions
from lit_vlm.secrets import redacted
from lit_vlm.tasks.stage_data import StageData
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

LOCKED = "path hub split revision fraction num_samples max_tiles weight repeat count".split()


def lock_of(data: StageData) -> dict[str, Any]:
    """Build the mixture lock: counts and digests of the data, and the settings of the mixture. It fixes the training data."""
    config, datamodule = data.run.config, data.datamodule
    assert datamodule.index is not None
    sources = {}
    for number, (name, source_config, source) in enumerate(data.configs):
        given = {key: getattr(source_config, key) for key in LOCKED}
        facts = {"records": len(source), **source_facts(datamodule.index, number)}
        sources[name] = {"format": source_config.format.value, **given, **facts}
    return {
        "sources": sources,
        "processor": datamodule.processor.digest,
        **name_template_day(data),
        "weights_in": config.data.weights_in.value,
        "temperature": config.data.temperature,
        "shares": asdict(config.data.share),
        "on_overlong": config.data.on_overlong.value,
        "global_batch_size": config.data.global_batch_size,
        "global_batch_tokens": config.data.global_batch_tokens,
        "seed": config.seed,
        "versions": {
            name: number for name, number in versions().items() if name in ("python", "tokenizers", "transformers")
        },
    }


def name_template_day(data: StageData) -> dict[str, str]:
    """Return the date that the chat template writes, as an entry for the manifest; {} if it writes none."""
    template = data.datamodule.processor.template
    return {DAY: template.day.isoformat()} if template.writes_day else {}


def read_own_lock(path: Path) -> dict[str, Any] | None:
    """Read the lock that an earlier start wrote into the run folder. None if there is none, or if it is damaged (reported)."""
    try:
        return read_lock(path) if path.is_file() else None
    except UserError as error:
        say(f"{str(error).partition('. Take')[0]}. It is written anew.")
        return None


def hold_to_lock(data: StageData) -> None:
    """Compare the data with `data.lock`, report changes since the run's mixture.lock was written, and write it.

    The lock of a finished run stays unchanged if the data differ.

    Raises:
        UserError: `data.lock` is the lock of different data.
    """
    run, lock = data.run, redacted(lock_of(data))
    if run.config.data.lock:
        changes = differences(read_lock(run.config.data.lock), lock)
        if changes:
            listed = "\n".join(f"  {change}" for change in changes)
            raise UserError(
                f"The data are not those of data.lock={run.config.data.lock}:\n{listed}\n"
                "Bring them back, or take data.lock away to train on what is there."
            )
    path = run.dir / LOCK
    if not is_rank_zero():
        return
    changes = differences(known, lock) if (known := read_own_lock(path)) else []
    for change in changes:
        say(f"since {path.name} was written: {change}")
    if changes and not run.config.overwrite and find_manifest(run.dir).get("status") == "finished":
        say(f"{path} stays what the finished run was trained on.")
    else:
        write_lock(path, lock)
