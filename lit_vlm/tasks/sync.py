"""task=sync: upload runs to Weights & Biases from their run folders. Read top to bottom.

The client's `wandb sync` reads a file that names the images of tables by their paths on the machine that wrote the run. It
reports "Finished" although they are missing, and it sends rows a second time. Here everything is read from the run folder
(`manifest.json`, `metrics.csv`, `samples.jsonl` and its images). So a folder may be copied to another machine, and nothing
that the server already has is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_vlm.config import Run
from lit_vlm.config.schema import LoggerConfig
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.formatting import format_count
from lit_vlm.loggers import wandb_client
from lit_vlm.loggers.tracker import RunTracker
from lit_vlm.loggers.wandb_client import ARTIFACT_PATHS, list_sample_images
from lit_vlm.runs.run_folder import RunFolder, read_manifest, require_writable
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

RETRY_ADVICE = "It is sent once it has ended; the same command then sends all of it, and nothing twice."


def sync(run: Run) -> None:
    """Send every run folder of `sync`. An error in one folder does not stop the others.

    Raises:
        UserError: with every folder that was not sent, or not completely.
    """
    errors = []
    for path in map(Path, run.config.sync):
        try:
            send_run(path)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))


def send_run(path: Path) -> None:
    """Send the part of a run that the server does not have yet.

    Raises:
        UserError: the folder holds no run, the run is still in progress, files are missing, or the server did not accept
            everything.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path}: holds no run: there is no manifest.json. Name the folder of a run, sync=runs/<name>.")
    require_writable(path)
    with RunLock(path, RETRY_ADVICE) as hold:
        hold.acquire()
        manifest = {"tracking": {}, **(read_manifest(path) or manifest)}
        folder = RunFolder(path, manifest, is_resumed=True)
        require_files(folder)
        known = manifest["tracking"].get("wandb") or {}
        if folder.is_finished and known.get("online") and not known.get("behind"):
            say(f"{path}: was sent already, all of it: {known.get('url')}")
            return
        tracking = RunTracker(
            make_logger_config(manifest, known), path, None, say, wandb_client.FINISH_WITH_MODEL_SECONDS
        )
        if tracking.wandb is None or tracking.wandb.offline:
            raise UserError(
                f"{path}: nothing is sent, for WANDB_MODE says so. Take that variable out of the environment."
            )
        tracking.wandb.verify_login(has_earlier_run=False)
        if tracking.wandb.offline:
            raise UserError(f"{path}: nothing was sent. Start it again once the server can be reached.")
        folder.update(tracking=tracking.get_tracking_record(folder))
        tracking.send_all(folder, finished=folder.is_finished)
        if tracking.wandb.behind:
            raise UserError(f"{path}: not everything was sent. The same command sends what is missing.")
    say(
        f"{path}: sent{'' if folder.is_finished else '; the run is not finished, and the same command sends what comes'}."
    )


def make_logger_config(manifest: dict[str, Any], known: dict[str, Any]) -> LoggerConfig:
    """Make the logger config from the run's own settings, with W&B online."""
    given = (manifest.get("config") or {}).get("logger") or {}
    run_settings = {one.name: given[one.name] for one in fields(LoggerConfig) if one.name in given}
    run_location = {key: known[key] for key in ("project", "entity") if known.get(key)}
    return LoggerConfig(**{**run_settings, **run_location, "wandb": True, "offline": False, "tensorboard": False})


def require_files(folder: RunFolder) -> None:
    """Require every file that would be sent. A row is sent once, so a row without its images could not be repaired later.

    Raises:
        UserError: with the missing files.
    """
    missing = list(find_missing_files(folder))
    if missing:
        more = f" and {format_count(len(missing) - 3, 'other file')}" if len(missing) > 3 else ""
        raise UserError(
            f"{folder.path}: {', '.join(missing[:3])}{more} {'is' if len(missing) == 1 else 'are'} missing, so nothing is"
            " sent. Copy the whole folder; of pictures that are gone for good, take their rows out of samples.jsonl."
        )


def find_missing_files(folder: RunFolder) -> Iterator[str]:
    """Find the missing files of a run folder, as paths relative to it."""
    if not (folder.path / "metrics.csv").is_file():
        yield "metrics.csv"
    yield from (name for name in list_sample_images(folder.path) if not (folder.path / name).is_file())
    artifacts = ((folder.manifest.get("config") or {}).get("logger") or {}).get("artifacts") or []
    if folder.is_finished:
        yield from (
            ARTIFACT_PATHS[artifact] for artifact in artifacts if not (folder.path / ARTIFACT_PATHS[artifact]).exists()
        )
