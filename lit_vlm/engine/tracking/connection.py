"""Reaching the server of Weights & Biases, in bounded time, and how a run of its client is set up.

The client is told to keep its hands off what may hold a key: it captures no terminal, reads no git remote, and writes no
list of the program's arguments. What it should know of them is in the config that it is given, without secrets.
"""

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

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.engine.ranks import in_sweep
from lit_vlm.secrets import redacted, redacted_text
from lit_vlm.types import UserError

ANSWER_SECONDS = 10  # that the server is given at the start; a run waits no longer for it
FINISH_SECONDS = 60  # that what is left is given at the end
FINISH_IN_SWEEP_SECONDS = 20  # an agent kills what has not ended 30 s after it was told to
FINISH_WITH_MODEL_SECONDS = 3600  # a model of 28 GB at 8 MB/s
UNFINISHED, EARLIER, STAGED = "wandb/unfinished", "wandb/earlier", "wandb/staged"  # in a run's folder
OFFLINE, DISABLED = ("offline", "dryrun"), ("disabled",)
NO_LOGIN = (
    "logger.wandb=true: there is no login for Weights & Biases on this machine. Run `wandb login`, set WANDB_API_KEY, or set"
    " logger.offline=true and upload later with task=sync."
)


def is_offline(logger: LoggerConfig) -> bool:
    return logger.offline or os.environ.get("WANDB_MODE") in OFFLINE


def is_wanted(logger: LoggerConfig) -> bool:
    """Whether anything goes to W&B at all; WANDB_MODE=disabled is its own word for no."""
    return logger.wandb and os.environ.get("WANDB_MODE") not in DISABLED


def log_in() -> str:
    """Ask the server whether it knows us. "": it does; else why it could not be asked.

    Raises:
        UserError: no login on this machine.
        Refused: the server does not know the key.
    """
    import wandb
    from wandb.errors import AuthenticationError

    wandb.setup(wandb.Settings(silent=True))
    began = time.monotonic()
    try:
        # a run that is under way in this process, a notebook's, has its login
        known = wandb.run is not None or wandb.login(prompt=False, verify=True)
    except AuthenticationError as error:
        # what may pass is tried again until the time is up; only a refusal comes at once
        if time.monotonic() - began < 0.9 * wandb.env.get_http_timeout(ANSWER_SECONDS):
            raise Refused(redacted_text(str(error))) from None
        return f"the server at {wandb.setup().settings.base_url} did not answer within {ANSWER_SECONDS} s"
    if not known:
        raise UserError(NO_LOGIN)
    return ""


class Refused(Exception):
    """The server answers, and does not know the key."""


def begin(
    logger: LoggerConfig,
    run_dir: Path,
    known: dict[str, Any],
    stop: Callable[[], None],
    *,
    offline: bool,
    finish_seconds: float | None = None,
    **about: Any,
) -> Any:
    """Begin or continue the run of W&B. Returns the client's run.

    Args:
        known: `id` of the run, as the manifest keeps it.
        stop: called from a thread of the client's when the server wants the run to stop.
        finish_seconds: that what is left is given at the end; None: as long as a run that trains waits.
        about: further arguments of `wandb.init`: name, group, job_type, config.

    Raises:
        wandb.Error: the server did not take it within `ANSWER_SECONDS`.
    """
    import wandb

    # an agent has said where the run belongs, and the client warns when that is said again
    place = {} if in_sweep() else {"project": logger.project, "entity": logger.entity, "id": known["id"]}
    set_aside(run_dir)
    place_of_client = run_dir / UNFINISHED if offline else run_dir
    place_of_client.mkdir(parents=True, exist_ok=True)  # else the client takes a temporary folder
    # the client copies the pictures of tables: not into the home folder, which another machine does not have
    os.environ["WANDB_DATA_DIR"] = str(run_dir / STAGED)
    return wandb.init(
        **redacted({**place, **about, "tags": logger.tags}),
        dir=str(place_of_client),
        mode="offline" if offline else "online",
        resume=None if offline else "allow",
        reinit="finish_previous",
        settings=_settings(logger, stop, finish_seconds),
    )


def _settings(logger: LoggerConfig, stop: Callable[[], None], finish_seconds: float | None) -> Any:
    import wandb

    seconds = FINISH_IN_SWEEP_SECONDS if in_sweep() else FINISH_SECONDS
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


def set_aside(run_dir: Path) -> None:
    """What earlier starts wrote offline goes to `wandb/earlier/`: the newest holds all of it once more."""
    _move([*run_dir.glob("wandb/offline-run-*"), *run_dir.glob(f"{UNFINISHED}/wandb/offline-run-*")], run_dir / EARLIER)


def set_out(run_dir: Path) -> None:
    """What the client has closed goes where `wandb sync` looks. It must not see a run that is under way: it would send half
    of it, and the same rows once more at the end."""
    _move([*run_dir.glob(f"{UNFINISHED}/wandb/offline-run-*")], run_dir / "wandb")
    shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)


def _move(folders: list[Path], place: Path) -> None:
    for folder in sorted(folders):
        place.mkdir(exist_ok=True)
        free = (f"{folder.name}{f'-{number}' if number else ''}" for number in itertools.count())
        # two starts of one second have one name
        folder.rename(next(place / name for name in free if not (place / name).exists()))


def forget_staged(run_dir: Path) -> None:
    """The client's copies of what has arrived."""
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)


def was_synced(run_dir: Path) -> bool:
    """Whether somebody uploaded what a start wrote offline; the client leaves a mark."""
    return any(run_dir.glob("wandb/**/*.wandb.synced"))


def sync_command(run_dir: Path) -> str:
    """The command that uploads what was written offline."""
    return f"python run.py task=sync sync={shlex.quote(str(run_dir))}"


def is_asked_to_stop(entity: str, project: str, run_id: str) -> bool:
    """Whether the server wants this run to stop, asked directly: the client hears of it with the next rows only. False
    when it does not answer."""
    import wandb

    query = (
        "query RunStoppedStatus($entityName: String, $projectName: String, $runId: String!)"
        " { project(name: $projectName, entityName: $entityName) { run(name: $runId) { stopped } } }"
    )
    variables = {"entityName": entity, "projectName": project, "runId": run_id}
    try:
        api = wandb.Api(timeout=ANSWER_SECONDS)
        data: Any = api._service_api.execute_graphql(query, variables=variables, timeout=ANSWER_SECONDS)
        return bool(data["project"]["run"]["stopped"])
    except Exception:  # a client of another version, a server without an answer: then nobody has asked
        return False


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call that may hang.

    Raises:
        TimeoutError: it goes on in a thread of its own, which does not hold the process.
        Exception: whatever the call raised.
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
