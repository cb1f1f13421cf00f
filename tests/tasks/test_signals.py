"""Tests of signals at any moment of any process: a documented status, nothing lost, no traceback.

Signals during training are in `tests/slurm/test_preemption.py`; `signal_moments.py` samples the moments of a whole run.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from resume_cases import (
    build_overrides,
    is_same_state,
    list_leftovers,
    read_last_state,
    read_metrics,
    run_undisturbed,
    start,
)
from run_helpers import RUN, TINY, write_data_choice
from signal_moments import AT_ONCE, ENVIRONMENT, SAVED, SIGNALS, run_moments
from waiting import until

from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED
from lit_vlm.fault_tolerance.signals import get_signal_handler, handle_signals, postpone_signals
from lit_vlm.tasks import pipeline
from lit_vlm.tasks.chat import read_lines

SEED = 5


def fork_process(run_child: Callable[[], object]) -> int:
    """Fork a process that handles signals and calls `run_child`. Return its pid."""
    pid = os.fork()
    if pid == 0:
        code = 98
        try:
            handle_signals()
            run_child()
            code = 0
        except SystemExit as left:
            code = left.code
        finally:
            os._exit(code)
    return pid


def wait_for_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_signal_at_every_import_of_a_run_ends_it_there(tmp_path):
    """It prepares data and then trains: reading an index imports other libraries than building one."""
    builtin = {"format": "builtin", "path": "caption", "language": "en", "num_samples": 4}
    overrides = [
        *TINY,
        "stage=sft",
        *write_data_choice(tmp_path, sources={"a": builtin}),
        "run_name=a",
        "trainer.max_steps=1",
    ]
    overrides = [*overrides, "task=prepare", "--", *overrides]
    script = Path(__file__).with_name("signal_imports.py")
    command = [sys.executable, str(script), str(tmp_path / "seen.json"), str(RUN), *overrides]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "done. Model" in done.stdout, done.stderr[-3000:]
    record = json.loads((tmp_path / "seen.json").read_text())
    assert record["faults"] == [] and record["points"] > 1000, record
    assert {"pandas", "torch", "transformers", "lightning"} <= {*record["in earnest"]}
    assert "KeyboardInterrupt" not in done.stderr and "Traceback" not in done.stderr


def test_one_signal_of_each_at_a_random_moment_of_a_run_loses_nothing(tmp_path):
    """Each start is a fork with all imports done; its moment is a share of the processor time of a whole run."""
    overrides, rng = build_overrides(tmp_path, "sft"), Random(SEED)
    run_undisturbed([*overrides, "run_name=whole"], tmp_path)
    cpu_seconds = send_signal_after(start([*overrides, "run_name=again"], tmp_path, patch=handle_signals), None)
    for number in SIGNALS:
        run_overrides = [*overrides, f"run_name={number.name}"]
        started = start(run_overrides, tmp_path, patch=handle_signals)
        send_signal_after(started, number, rng.uniform(0, 0.9) * cpu_seconds)
        output, status = started.read_output(), started.wait()[0]
        expected = {"saved at step": SAVED[number], "nothing is to be saved": AT_ONCE[number]}
        assert status == next((code for text, code in expected.items() if text in output), 0), output
        assert "Traceback" not in output and "KeyboardInterrupt" not in output
        assert status or "done" in output
        assert start(run_overrides, tmp_path).wait() == [0]
        assert is_same_state(read_last_state(tmp_path, "whole"), read_last_state(tmp_path, number.name))
        assert (
            read_metrics(tmp_path, "whole") == read_metrics(tmp_path, number.name)
            and list_leftovers(tmp_path, number.name) == []
        )


def send_signal_after(started, number: int | None, after: float = 0.0) -> float:
    """Send the signal once the process has used `after` seconds of processor time. Return the time used at its end."""
    (pid,), cpu_seconds = started.pids, 0.0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        cpu_seconds = time.clock_gettime(((~pid) << 3) | 2)
        if number is not None and cpu_seconds >= after and has_handler(pid):
            os.kill(pid, number)
            number = None
        time.sleep(0.002)
    return cpu_seconds


def has_handler(pid: int) -> bool:
    return pipeline._has_signal_handler(pid, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_without_signal_handlers_is_ended_by_the_pipeline_with_the_status_of_the_signal(tmp_path, number):
    """This happens while Python itself starts, when Ctrl-C would print a traceback."""
    child_code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(100)"

    def send_signal():
        until((tmp_path / "up").exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_signal, daemon=True).start()
    status, signals = pipeline.run_process([sys.executable, "-c", child_code])
    assert status == AT_ONCE[number] and len(signals) == 1


def test_a_pipeline_stops_after_a_stage_that_succeeds_after_a_signal(tmp_path, monkeypatch):
    stage_code = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    stage_code += f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(100)"
    (tmp_path / "stage.py").write_text(stage_code, encoding="utf-8")
    started_stages = []

    def run_child():
        stages = SimpleNamespace(config=SimpleNamespace(recipe="tiny", run_dir="runs"), overrides=["recipe=tiny"])
        monkeypatch.setattr(
            pipeline,
            "build_command",
            lambda devices, overrides: started_stages.append(overrides) or [sys.executable, str(tmp_path / "stage.py")],
        )
        pipeline.run_pipeline(stages)
        os._exit(97)  # all stages ran

    pid = fork_process(run_child)
    until((tmp_path / "up").exists)
    os.kill(pid, signal.SIGTERM)
    assert wait_for_status(pid) == TERMINATED


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, TERMINATED), (signal.SIGUSR1, RESTART), (signal.SIGINT, 0)]
)
def test_a_signal_ends_a_chat_that_waits_for_input_and_ctrl_c_acts_like_end_of_input(tmp_path, number, status):
    read_end, write_end = os.pipe()

    def run_child():
        os.dup2(read_end, 0)
        sys.stdin = os.fdopen(0)
        for _ in read_lines():
            (tmp_path / "up").touch()

    pid = fork_process(run_child)
    os.write(write_end, b"hello\n")
    until((tmp_path / "up").exists)
    until(lambda: is_sleeping(pid))
    os.kill(pid, number)
    assert wait_for_status(pid) == status


def is_sleeping(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_does_not_separate_submitting_a_job_from_recording_its_number(tmp_path, number):
    def run_child():
        with postpone_signals():
            os.kill(os.getpid(), number)
            (tmp_path / "written").touch()
        (tmp_path / "more").touch()

    assert wait_for_status(fork_process(run_child)) == AT_ONCE[number]
    assert (tmp_path / "written").exists() and not (tmp_path / "more").exists()


def test_a_second_ctrl_c_ends_a_process_whose_shutdown_takes_long(tmp_path):
    """This happens with W&B's client and a server that does not answer. Here the shutdown needs a held lock."""
    lock = threading.Lock()

    def run_child():
        get_signal_handler().before_exit = lambda code: lock.acquire() and code
        with lock:
            os.kill(os.getpid(), signal.SIGINT)

    pid = fork_process(run_child)
    time.sleep(2.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGINT)
    assert wait_for_status(pid) == INTERRUPTED


def test_a_signal_does_not_change_the_status_of_a_finished_process():
    def run_child():
        handle_signals().final_status = 0
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(97)

    assert wait_for_status(fork_process(run_child)) == 0


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_ten_signals_of_each_at_random_moments_lose_nothing(tmp_path):
    moments = run_moments(tmp_path, 10, SEED)
    assert [one.faults for one in moments] == [[]] * 30
    assert {"left", "saved"} <= {one.answer for one in moments}


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_signals_at_random_moments_of_two_ranks_lose_nothing(tmp_path):
    moments = run_moments(tmp_path, 3, SEED, ranks=2)
    assert [one.faults for one in moments] == [[]] * 9


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "overrides", ["task=prepare", "recipe=tiny trainer.max_steps=2", "task=sweep sweep=sweep.yaml"]
)
def test_a_process_that_does_not_train_exits_with_the_documented_status(tmp_path, overrides, number):
    """The signal comes while the process imports, while its stage or trial imports, and later."""
    trials = {"method": "grid", "metric": {"name": "val/loss"}, "parameters": {"seed": {"values": [1, 2]}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(trials))
    rng, allowed = Random(SEED + number), {AT_ONCE[number], SAVED[number], 0}
    overrides = [*([] if "recipe" in overrides else TINY), *overrides.split()]
    for seconds in (rng.uniform(0, 2), rng.uniform(2, 6), rng.uniform(6, 15)):
        log = (tmp_path / "log").open("w+")
        command = [sys.executable, str(RUN), *overrides, "run_dir=runs"]
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        until(lambda pid=process.pid: has_handler(pid))
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(number)
        status = process.wait(300)
        output = (tmp_path / "log").read_text()
        assert status in allowed | ({RESTART} if "sweep" in overrides else set()), output
        assert "Traceback" not in output and "KeyboardInterrupt" not in output, output
