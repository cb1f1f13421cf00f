"""Mixture lock of a run: writes mixture.lock into the run folder and compares the data with `data.lock`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_vlm.data.packing.mixture_lock import (
    LOCK_FILE,
    TEMPLATE_DATE_KEY,
    compare_locks,
    describe_source,
    read_lock,
    write_lock,
)
from lit_vlm.redaction import redact
from lit_vlm.runs.run_folder import get_package_versions, is_rank_zero, read_manifest_or_empty
from lit_vlm.tasks.prepare_data import StageData
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

LOCKED_SOURCE_KEYS = "path hub split revision fraction num_samples max_tiles weight repeat count".split()


def build_mixture_lock(data: StageData) -> dict[str, Any]:
    """Build the mixture lock: counts and digests of the data, and the settings of the mixture. It fixes the training data."""
    config, datamodule = data.run.config, data.datamodule
    assert datamodule.index is not None
    sources = {}
    for number, (name, source_config, source) in enumerate(data.configured_sources):
        given = {key: getattr(source_config, key) for key in LOCKED_SOURCE_KEYS}
        facts = {"records": len(source), **describe_source(datamodule.index, number)}
        sources[name] = {"format": str(source_config.format), **given, **facts}
    return {
        "sources": sources,
        "processor": datamodule.processor.digest,
        **get_template_date(data),
        "weights_in": config.data.weights_in.value,
        "temperature": config.data.temperature,
        "shares": asdict(config.data.share),
        "on_overlong": config.data.on_overlong.value,
        "global_batch_size": config.data.global_batch_size,
        "global_batch_tokens": config.data.global_batch_tokens,
        "seed": config.seed,
        "versions": {
            name: number
            for name, number in get_package_versions().items()
            if name in ("python", "tokenizers", "transformers")
        },
    }


def get_template_date(data: StageData) -> dict[str, str]:
    """Return the date that the chat template writes, as an entry for the manifest; {} if it writes none."""
    template = data.datamodule.processor.template
    return {TEMPLATE_DATE_KEY: template.day.isoformat()} if template.is_date_dependent else {}


def read_previous_lock(path: Path) -> dict[str, Any] | None:
    """Read the lock that an earlier start wrote into the run folder. None if there is none, or if it is damaged (reported)."""
    try:
        return read_lock(path) if path.is_file() else None
    except UserError as error:
        say(f"{str(error).partition('. Take')[0]}. It is written anew.")
        return None


def check_mixture_lock(data: StageData) -> None:
    """Compare the data with `data.lock`, report changes since the run's mixture.lock was written, and write it.

    The lock of a finished run stays unchanged if the data differ.

    Raises:
        UserError: `data.lock` is the lock of different data.
    """
    run, lock = data.run, redact(build_mixture_lock(data))
    if run.config.data.lock:
        changes = compare_locks(read_lock(run.config.data.lock), lock)
        if changes:
            listed = "\n".join(f"  {change}" for change in changes)
            raise UserError(
                f"The data are not those of data.lock={run.config.data.lock}:\n{listed}\n"
                "Bring them back, or take data.lock away to train on what is there."
            )
    path = run.dir / LOCK_FILE
    if not is_rank_zero():
        return
    changes = compare_locks(known, lock) if (known := read_previous_lock(path)) else []
    for change in changes:
        say(f"since {path.name} was written: {change}")
    if changes and not run.config.overwrite and read_manifest_or_empty(run.dir).get("status") == "finished":
        say(f"{path} stays what the finished run was trained on.")
    else:
        write_lock(path, lock)
