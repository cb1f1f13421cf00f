"""However a run ends, its trackers record it, and inside a sweep agent the exit status is the one that the sweep needs."""

import pytest
from tracking_cases import make_run_folder

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED, CoordinatedExit, EarlyStoppingExit
from lit_vlm.fault_tolerance.signals import SignalHandler, StopRequest
from lit_vlm.loggers.run_metadata import EXIT_CODES
from lit_vlm.loggers.tracker import RunTracker
from lit_vlm.types import UserError


class FakeWandbRun:
    """Stands in for W&B's run: records how it was closed, and whether the server requests a stop."""

    behind = False

    def __init__(self, stop: bool) -> None:
        self.stop, self.status, self.summary, self.num_queries = stop, None, {}, 0

    def open(self, folder, known):
        return known

    def is_asked_to_stop(self) -> bool:
        self.num_queries += 1
        return self.stop

    def close(self, status, summary, uploads=False):
        self.status, self.summary = status, summary
        return {}


def end_run(tmp_path, error: BaseException, stop: bool = False) -> tuple[FakeWandbRun, object, dict]:
    """Raise the error inside a run; return its tracker, the exit status of the process and the manifest."""
    folder = make_run_folder(tmp_path, tracking={"wandb": {"id": "a"}})
    tracking = RunTracker(LoggerConfig(), tmp_path, None, print)
    tracking.wandb = wandb_run = FakeWandbRun(stop)
    code: object = None
    try:
        with tracking:
            tracking.open(folder)
            raise error
    except SystemExit as caught:
        code = caught.code
    except BaseException as caught:
        code = type(caught).__name__
    return wandb_run, code, folder.manifest


@pytest.mark.parametrize(
    ("error", "stop", "in_sweep", "status", "code"),
    [
        (EarlyStoppingExit(), False, True, "stopped early", 0),
        (CoordinatedExit(RESTART), True, True, "preempted", RESTART),  # the ranks have exchanged the request already
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
def test_an_ended_run_is_marked_and_has_the_right_exit_status(
    tmp_path, monkeypatch, error, stop, in_sweep, status, code
):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    if in_sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    wandb_run, found, manifest = end_run(tmp_path, error, stop)
    assert (wandb_run.status, wandb_run.summary["status"], found) == (status, status, code)
    assert manifest["status"] == ("stopped" if status == "stopped early" else "running")
    assert EXIT_CODES[status] == {"failed": 1, "interrupted": 255, "preempted": 75, "stopped early": 0}[status]


def test_an_error_is_in_the_summary_without_its_secrets(tmp_path):
    wandb_run, _, _ = end_run(tmp_path, UserError("https://a:secret12@host is gone\nand more"))
    assert wandb_run.summary["error"] == "UserError: https://<redacted>@host is gone"


def test_a_request_of_another_thread_waits_for_the_first_step():
    signals, requests = SignalHandler(), []
    signals.submit(StopRequest.early_stop)
    signals.set_listener(requests.append)
    assert requests == [StopRequest.early_stop]
    signals.submit(StopRequest.early_stop)
    assert requests == [StopRequest.early_stop] * 2
