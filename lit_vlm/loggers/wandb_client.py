"""W&B artifacts: upload of a run's results, and the link to the model that a stage starts from."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_vlm.compat.wandb import is_run_stopped
from lit_vlm.config.schema import LoggerConfig
from lit_vlm.distributed.ranks import is_in_sweep
from lit_vlm.files import read_json_lines
from lit_vlm.redaction import redact, redact_text
from lit_vlm.types import UserError

MODEL, LOCK, REPORT = "model", "lock", "report"
ARTIFACT_PATHS = {MODEL: "hf", LOCK: "mixture.lock", REPORT: "report.html"}


def upload_artifacts(run: Any, run_dir: Path, kinds: list[str]) -> dict[str, str]:
    """Upload the requested results that exist as artifacts. Returns the artifact name of each kind.

    The client reads the files in place, so a model takes no disk space a second time.

    Args:
        run: the client's run.
        kinds: keys of `ARTIFACT_PATHS`.
    """
    import wandb

    names = {}
    for kind in kinds:
        path = run_dir / ARTIFACT_PATHS[kind]
        if not path.exists():
            continue
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        if path.is_dir():
            artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        else:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
        names[kind] = artifact.name.partition(":")[0]
    return names


def link_parent_model(run: Any, parent: dict[str, Any]) -> bool:
    """Link this run to the model artifact of the run that it starts from. Returns False when that model is no artifact.

    Raises:
        Exception: an error of the client, when the server does not know the artifact.
    """
    name = (parent.get("artifacts") or {}).get(MODEL)
    if not name:
        return False
    project_path = "/".join(filter(None, (parent.get("entity"), parent.get("project"))))
    run.use_artifact(f"{project_path}/{name}:latest" if project_path else f"{name}:latest")
    return True


COLUMNS = ("id", "source", "kind", "language", "prompt", "reference", "prediction", "score")
MAX_IMAGES = 4  # image columns; further images of a sample are in samples.jsonl only


def read_samples(run_dir: Path, phase: str) -> list[dict[str, Any]]:
    """Read the rows of one phase from `samples.jsonl`. Incomplete lines are skipped, as in the code that writes them."""
    return [row for row in read_json_lines(run_dir / "samples.jsonl") if row.get("phase") == phase]


def build_table(run_dir: Path, rows: list[dict[str, Any]]) -> Any:
    """Build a `wandb.Table` with one row for each sample and one column for each metric."""
    import wandb

    num_images = min(MAX_IMAGES, max((len(row["images"]) for row in rows), default=0))
    names = [f"picture{f'_{number + 1}' if number else ''}" for number in range(num_images)]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("text_scores") or {}))
    cells = [
        [row[name] for name in COLUMNS]
        + [(row.get("text_scores") or {}).get(name) for name in metrics]
        + _make_image_cells(run_dir, row, num_images)
        for row in rows
    ]
    return wandb.Table(columns=[*COLUMNS, *metrics, *names], data=cells)


def list_sample_images(run_dir: Path) -> list[str]:
    """List the image files of the tables, relative to the run folder, without duplicates."""
    rows = [row for phase in ("before", "after") for row in read_samples(run_dir, phase)]
    return list(dict.fromkeys(path for row in rows for path in _get_image_paths(row)[:MAX_IMAGES]))


def _get_image_paths(row: dict[str, Any]) -> list[str]:
    """Return the image paths of a sample. If it has boxes, use the image without them: W&B draws boxes that can be switched off."""
    return [row["plain"]] if row.get("plain") else list(row["images"])


def _make_image_cells(run_dir: Path, row: dict[str, Any], num_columns: int) -> list[Any]:
    """Make the image cells of one row, one for each image column."""
    import wandb

    found = [
        str(run_dir / path) if (run_dir / path).is_file() else None for path in _get_image_paths(row)[:num_columns]
    ]
    overlay = build_box_overlays(row.get("boxes") or [])
    images = [wandb.Image(path, boxes=overlay or None) if path else None for path in found]
    return images + [None] * (num_columns - len(images))


def build_box_overlays(boxes: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the box overlays of a `wandb.Image`, one layer each for asked, reference and prediction.

    Args:
        boxes: rows of `layer`, `label` and `box`, (x1, y1, x2, y2) as fractions of the image's sides.
    """
    labels = {label: number for number, label in enumerate(dict.fromkeys(box["label"] or "text" for box in boxes))}
    layers: dict[str, Any] = {}
    for box in boxes:
        layer = layers.setdefault(
            box["layer"], {"box_data": [], "class_labels": {number: label for label, number in labels.items()}}
        )
        x1, y1, x2, y2 = box["box"]
        layer["box_data"].append(
            {
                "position": {"minX": min(x1, x2), "minY": min(y1, y2), "maxX": max(x1, x2), "maxY": max(y1, y2)},
                "class_id": labels[box["label"] or "text"],
                "box_caption": box["label"] or "text",
            }
        )
    return layers


ANSWER_SECONDS = 10  # timeout of the server at the start; a run waits no longer
FINISH_SECONDS = 60  # timeout of the last uploads at the end
FINISH_IN_SWEEP_SECONDS = 20  # an agent kills a run that has not ended 30 s after its stop signal
FINISH_WITH_MODEL_SECONDS = 3600  # a model of 28 GB at 8 MB/s
UNFINISHED, EARLIER, STAGED = "wandb/unfinished", "wandb/earlier", "wandb/staged"  # in a run's folder
OFFLINE, DISABLED = ("offline", "dryrun"), ("disabled",)
NO_LOGIN = (
    "logger.wandb=true: there is no login for Weights & Biases on this machine. Run `wandb login`, set WANDB_API_KEY, or set"
    " logger.offline=true and upload later with task=sync."
)


def is_offline(logger: LoggerConfig) -> bool:
    """Return whether the run logs to W&B without a network connection."""
    return logger.offline or os.environ.get("WANDB_MODE") in OFFLINE


def is_enabled(logger: LoggerConfig) -> bool:
    """Return whether the run logs to W&B at all. WANDB_MODE=disabled is W&B's own setting for no."""
    return logger.wandb and os.environ.get("WANDB_MODE") not in DISABLED


def verify_login() -> str:
    """Verify the login at the server. Returns "" on success, else the reason why the server could not be reached.

    Raises:
        UserError: no login on this machine.
        LoginRefusedError: the server does not know the key.
    """
    import wandb
    from wandb.errors import AuthenticationError

    wandb.setup(wandb.Settings(silent=True))
    start_time = time.monotonic()
    try:
        # an active run in this process (of a notebook) is logged in already
        logged_in = wandb.run is not None or wandb.login(prompt=False, verify=True)
    except AuthenticationError as error:
        # the client retries temporary errors until the timeout; only a refusal comes at once
        if time.monotonic() - start_time < 0.9 * wandb.env.get_http_timeout(ANSWER_SECONDS):
            raise LoginRefusedError(redact_text(str(error))) from None
        return f"the server at {wandb.setup().settings.base_url} did not answer within {ANSWER_SECONDS} s"
    if not logged_in:
        raise UserError(NO_LOGIN)
    return ""


class LoginRefusedError(Exception):
    """Error: the server answers and does not know the key."""


def init_run(
    logger: LoggerConfig,
    run_dir: Path,
    run_record: dict[str, Any],
    stop: Callable[[], None],
    *,
    offline: bool,
    finish_seconds: float | None = None,
    **init_kwargs: Any,
) -> Any:
    """Start or resume the W&B run. Returns the client's run.

    Args:
        run_record: `id` of the run, as stored in the manifest.
        stop: called from a thread of the client when the server requests a stop.
        finish_seconds: timeout of the last uploads at the end; None: the timeout of a training run.
        init_kwargs: further arguments of `wandb.init`: name, group, job_type, config.

    Raises:
        wandb.Error: the server did not accept the run within `ANSWER_SECONDS`.
    """
    import wandb

    # the agent has set project and id already, and the client warns when they are set twice
    destination = {} if is_in_sweep() else {"project": logger.project, "entity": logger.entity, "id": run_record["id"]}
    move_earlier_offline_runs(run_dir)
    client_dir = run_dir / UNFINISHED if offline else run_dir
    client_dir.mkdir(parents=True, exist_ok=True)  # else the client uses a temporary folder
    # the client copies the images of tables; the home folder would be wrong, another machine does not have it
    os.environ["WANDB_DATA_DIR"] = str(run_dir / STAGED)
    return wandb.init(
        **redact({**destination, **init_kwargs, "tags": logger.tags}),
        dir=str(client_dir),
        mode="offline" if offline else "online",
        resume=None if offline else "allow",
        reinit="finish_previous",
        settings=_make_settings(logger, stop, finish_seconds),
    )


def _make_settings(logger: LoggerConfig, stop: Callable[[], None], finish_seconds: float | None) -> Any:
    import wandb

    seconds = FINISH_IN_SWEEP_SECONDS if is_in_sweep() else FINISH_SECONDS
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        init_timeout=ANSWER_SECONDS,
        finish_timeout=finish_seconds or (FINISH_WITH_MODEL_SECONDS if "model" in logger.artifacts else seconds),
        finish_timeout_raises=True,
        stop_fn=stop,
    )


def move_earlier_offline_runs(run_dir: Path) -> None:
    """Move the offline runs of earlier starts to `wandb/earlier/`: the newest offline run contains all of their rows again."""
    _move_folders(
        [*run_dir.glob("wandb/offline-run-*"), *run_dir.glob(f"{UNFINISHED}/wandb/offline-run-*")], run_dir / EARLIER
    )


def move_closed_offline_runs(run_dir: Path) -> None:
    """Move closed offline runs to the folder that `wandb sync` reads. It must not see a run that is still open: it would
    upload half of it now, and the same rows again at the end."""
    _move_folders([*run_dir.glob(f"{UNFINISHED}/wandb/offline-run-*")], run_dir / "wandb")
    shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)


def _move_folders(folders: list[Path], target: Path) -> None:
    for folder in sorted(folders):
        target.mkdir(exist_ok=True)
        candidates = (f"{folder.name}{f'-{number}' if number else ''}" for number in itertools.count())
        # two starts of one second have one name
        folder.rename(next(target / name for name in candidates if not (target / name).exists()))


def delete_staged_files(run_dir: Path) -> None:
    """Delete the client's copies of files that the server has."""
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)


def is_synced(run_dir: Path) -> bool:
    """Return whether an offline run of this folder was uploaded; the client leaves a marker file."""
    return any(run_dir.glob("wandb/**/*.wandb.synced"))


def format_sync_command(run_dir: Path) -> str:
    """Format the command that uploads the offline runs of a run folder."""
    return f"python run.py task=sync sync={shlex.quote(str(run_dir))}"


def is_stop_requested(entity: str, project: str, run_id: str) -> bool:
    """Ask the server directly whether this run should stop: the client learns it with the next rows only. Returns False
    when the server does not answer."""
    try:
        return is_run_stopped(entity, project, run_id, ANSWER_SECONDS)
    except Exception:  # another version of the client, or no answer: no stop was requested
        return False


def call_with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """Call a function that may hang, with a timeout. Returns its result.

    Raises:
        TimeoutError: the timeout passed; the call continues in a daemon thread, which does not block the end of the process.
        Exception: any error that the call raised.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
