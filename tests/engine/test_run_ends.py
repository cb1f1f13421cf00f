"""However a run ends, its trackers say so, and inside an agent of a sweep the exit status is what the sweep needs."""

import pytest
from tracking_cases import run_folder

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.engine.exits import INTERRUPTED, RESTART, TERMINATED, CoordinatedExit, EarlyStoppingExit
from lit_vlm.engine.signals import SignalHandler, StopRequest
from lit_vlm.engine.tracking import RunTracker
from lit_vlm.engine.tracking.wandb_run import EXIT_CODES
from lit_vlm.types import UserError


class Told:
    """In the place of W&B's run: keeps how it was closed, and whether the server wants a stop."""

    behind = False

    def __init__(self, stop: bool) -> None:
        self.stop, self.status, self.summary, self.asked = stop, None, {}, 0

    def open(self, folder, known):
        return known

    def is_asked_to_stop(self) -> bool:
        self.asked += 1
        return self.stop

    def close(self, status, summary, uploads=False):
        self.status, self.summary = status, summary
        return {}


def left(tmp_path, error: BaseException, stop: bool = False) -> tuple[Told, object, dict]:
    """A run that ends with this: its tracker, the exit status that the process has then, and the manifest."""
    folder = run_folder(tmp_path, tracking={"wandb": {"id": "a"}})
    tracking = RunTracker(LoggerConfig(), tmp_path, None, print)
    tracking.wandb = told = Told(stop)
    code: object = None
    try:
        with tracking:
            tracking.open(folder)
            raise error
    except SystemExit as caught:
        code = caught.code
    except BaseException as caught:
        code = type(caught).__name__
    return told, code, folder.manifest


@pytest.mark.parametrize(
    ("error", "stop", "in_sweep", "status", "code"),
    [
        (EarlyStoppingExit(), False, True, "stopped early", 0),
        (CoordinatedExit(RESTART), True, True, "preempted", RESTART),  # the ranks have asked already
        (CoordinatedExit(RESTART), False, False, "preempted", RESTART),
        (CoordinatedExit(INTERRUPTED), False, False, "interrupted", INTERRUPTED),
        (KeyboardInterrupt(), False, False, "interrupted", "KeyboardInterrupt"),
        (SystemExit(TERMINATED), True, True, "stopped early", 0),
        (SystemExit(TERMINATED), False, True, "preempted", RESTART),
        (SystemExit(RESTART), True, True, "stopped early", 0),
        (SystemExit(TERMINATED), False, False, "preempted", TERMINATED),
        (UserError("no such thing"), False, True, "failed", "UserError"),
        (RuntimeError("CUDA"), False, False, "failed", "RuntimeError"),
    ],
)
def test_a_run_that_is_left_is_marked_and_its_exit_status_fits(
    tmp_path, monkeypatch, error, stop, in_sweep, status, code
):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    if in_sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    told, found, manifest = left(tmp_path, error, stop)
    assert (told.status, told.summary["status"], found) == (status, status, code)
    assert manifest["status"] == ("stopped" if status == "stopped early" else "running")
    assert EXIT_CODES[status] == {"failed": 1, "interrupted": 255, "preempted": 75, "stopped early": 0}[status]


def test_an_error_stands_in_the_summary_without_its_secrets(tmp_path):
    told, _, _ = left(tmp_path, UserError("https://a:secret12@host is gone\nand more"))
    assert told.summary["error"] == "UserError: https://<redacted>@host is gone"


def test_what_another_thread_tells_waits_for_the_first_step():
    signals, heard = SignalHandler(), []
    signals.submit(StopRequest.early_stop)
    signals.set_listener(heard.append)
    assert heard == [StopRequest.early_stop]
    signals.submit(StopRequest.early_stop)
    assert heard == [StopRequest.early_stop] * 2
