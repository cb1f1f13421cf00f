"""Mixture lock of a run: writes mixture.lock into the run folder and compares the data with `data.lock`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_vlm.config.schema import DataConfig
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.packing.mixture_lock import (
    LOCK_FILE,
    TEMPLATE_DATE_KEY,
    compare_locks,
    describe_source,
    read_lock,
    write_lock,
)
from lit_vlm.data.processor import Processor
from lit_vlm.redaction import redact
from lit_vlm.runs.run_folder import get_package_versions, is_rank_zero, read_manifest_or_empty
from lit_vlm.tasks.prepare_data import StageData
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

LOCKED_SOURCE_KEYS = "path hub split revision fraction num_samples max_tiles weight repeat count".split()


def build_mixture_lock(stage_data: StageData[Any], index: SampleIndex, data: DataConfig, seed: int) -> dict[str, Any]:
    """Build the mixture lock: counts and digests of the data, and the settings of the mixture. It fixes the training data."""
    processor, sources = stage_data.training_data.processor, {}
    for number, (name, source) in enumerate(zip(data.sources, stage_data.sources.training, strict=True)):
        settings = data.sources[name]
        given = {key: getattr(settings, key) for key in LOCKED_SOURCE_KEYS}
        if settings.enlarge_to_px is not None:  # a later key: locks without it stay as they are
            given["enlarge_to_px"] = settings.enlarge_to_px
        facts = {"records": len(source), **describe_source(index, number)}
        sources[name] = {"format": str(settings.format), **given, **facts}
    return {
        "sources": sources,
        "processor": processor.digest,
        **get_template_date(processor),
        "weights_in": data.weights_in.value,
        "temperature": data.temperature,
        "shares": asdict(data.share),
        "on_overlong": data.on_overlong.value,
        "global_batch_size": data.global_batch_size,
        "global_batch_tokens": data.global_batch_tokens,
        "seed": seed,
        "versions": {
            name: number
            for name, number in get_package_versions().items()
            if name in ("python", "tokenizers", "transformers")
        },
    }


def get_template_date(processor: Processor) -> dict[str, str]:
    """Return the date that the chat template writes, as an entry for the manifest; {} if it writes none."""
    template = processor.template
    return {TEMPLATE_DATE_KEY: template.day.isoformat()} if template.is_date_dependent else {}


def read_previous_lock(path: Path) -> dict[str, Any] | None:
    """Read the lock that an earlier start wrote into the run folder. None if there is none, or if it is damaged (reported)."""
    try:
        return read_lock(path) if path.is_file() else None
    except UserError as error:
        say(f"{str(error).partition('. Take')[0]}. It is written anew.")
        return None


def check_mixture_lock(lock: dict[str, Any], expected: str | None, run_dir: Path, *, overwrite: bool) -> None:
    """Compare the data with `data.lock`, report changes since the run's mixture.lock was written, and write it.

    The lock of a finished run stays unchanged if the data differ.

    Args:
        lock: mixture lock of the data, see `build_mixture_lock`.
        expected: file that data.lock names.

    Raises:
        UserError: `data.lock` is the lock of different data.
    """
    lock = redact(lock)
    if expected:
        changes = compare_locks(read_lock(expected), lock)
        if changes:
            listed = "\n".join(f"  {change}" for change in changes)
            raise UserError(
                f"The data are not those of data.lock={expected}:\n{listed}\n"
                "Bring them back, or take data.lock away to train on what is there."
            )
    path = run_dir / LOCK_FILE
    if not is_rank_zero():
        return
    changes = compare_locks(known, lock) if (known := read_previous_lock(path)) else []
    for change in changes:
        say(f"since {path.name} was written: {change}")
    if changes and not overwrite and read_manifest_or_empty(run_dir).get("status") == "finished":
        say(f"{path} stays what the finished run was trained on.")
    else:
        write_lock(path, lock)
