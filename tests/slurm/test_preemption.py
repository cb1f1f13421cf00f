"""A preempted run saves and exits at the end of a step, on all ranks alike, and resumes as if it had not been interrupted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fakes import get_path_with, make_fake_slurm, read_calls
from waiting import PATIENCE

from lit_vlm.cluster.slurm import is_preempted, requeue
from lit_vlm.config import parse
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED
from lit_vlm.fault_tolerance.signals import use_listener
from lit_vlm.tasks import pipeline

WORKER = Path(__file__).with_name("preempt_worker.py")
RUN = Path(__file__).resolve().parents[2] / "run.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TINY = "task=train model=tiny model.grid=2 model.max_tiles=4 trainer=tiny data.global_batch_size=4 trainer.max_steps=4000 run_name=a"


def run_worker(
    parts, folder: Path, signals: int, steps: int, ranks: int, limit: float = PATIENCE, seed: int = 0
) -> dict:
    folder.mkdir(parents=True)
    command = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    arguments = [str(WORKER), *parts, str(folder), str(signals), str(steps), str(seed)]
    path = get_path_with(make_fake_slurm(folder / "bin"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": path, "SLURM_JOB_ID": "77"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


def check_chain(results: dict, folder: Path, signals: int) -> None:
    assert results["k"] > 1
    for rank in results["ranks"]:
        assert rank == results["ranks"][0]
        assert [start["code"] for start in rank] == [RESTART] * signals + [None]
        for start in rank[:-1]:
            assert start["saved"] == start["step"] > 0 and start["whole"]
        steps = [start["step"] for start in rank]
        assert steps == sorted(steps) and len(set(steps)) == len(steps)
    assert read_calls(folder / "bin", "scontrol") == [["requeue", "77"]] * signals


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.long)])
def test_signals_at_random_moments_save_at_the_end_of_a_step_and_requeue_once(small_parts, tmp_path, ranks):
    results = run_worker(small_parts, tmp_path / "chain", 5, 40, ranks)
    check_chain(results, tmp_path / "chain", 5)
    run_worker(small_parts, tmp_path / "whole", 0, 40, ranks)
    one, other = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("chain", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hundred_signals_at_random_moments_save_and_requeue(small_parts, tmp_path, ranks):
    results = run_worker(small_parts, tmp_path / "chain", 100, 700, ranks, limit=800, seed=ranks)
    check_chain(results, tmp_path / "chain", 100)


class BackgroundRun:
    """`python run.py` in the background, with its output in a file."""

    def __init__(
        self, folder: Path, *arguments: str, ranks: int = 1, base: str = TINY, run: str = "a", **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{time.monotonic_ns()}"
        command = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
        variables = {
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, str(RUN), *base.split(), f"trainer.devices={ranks}", *arguments],
                cwd=folder,
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
            )
        self.metrics = folder / "runs" / run / "metrics.csv"

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until_training(self, limit: float = PATIENCE) -> None:
        end, known = time.monotonic() + limit, self._count_rows()
        while self._count_rows() <= known:
            assert self.process.poll() is None and time.monotonic() < end, self.output[-3000:]
            time.sleep(0.05)

    def _count_rows(self) -> int:
        return len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0

    def wait(self, limit: float = PATIENCE) -> int:
        try:
            return self.process.wait(limit)
        finally:
            if self.process.poll() is None:
                self.process.kill()


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_the_restart_status_and_ctrl_c_with_its_own_status(tmp_path):
    run = BackgroundRun(tmp_path, "data.num_workers=1")
    run.wait_until_training()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == RESTART, run.output
    assert "saved at step" in run.output and "Traceback" not in run.output
    run = BackgroundRun(tmp_path, "data.num_workers=1")
    run.wait_until_training()
    assert "resumes at step" in run.output
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == INTERRUPTED, run.output
    assert "saved at step" in run.output and "Traceback" not in run.output


@pytest.mark.slow
def test_sigterm_to_torchrun_reaches_its_ranks_which_save(tmp_path):
    run = BackgroundRun(tmp_path, "data.num_workers=0", ranks=2)
    run.wait_until_training()
    run.process.send_signal(signal.SIGTERM)
    run.wait(90)
    assert run.output.count("saved at step") == 1
    run = BackgroundRun(tmp_path, "data.num_workers=0", ranks=2)
    run.wait_until_training()
    assert "resumes at step" in run.output
    run.process.send_signal(signal.SIGTERM)
    run.wait(90)


@pytest.mark.slow
def test_sigterm_to_a_pipeline_reaches_its_stage_and_the_next_start_resumes(tmp_path):
    (name,) = {parse(["experiment=tiny/1_align", "trainer.max_steps=3000"]).name}
    for message in ("saved at step", "resumes at step"):
        run = BackgroundRun(tmp_path, base="recipe=tiny trainer.max_steps=3000", run=name)
        run.wait_until_training()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == RESTART, run.output
        assert message in run.output and "Traceback" not in run.output


@pytest.mark.slow
def test_loader_workers_ignore_a_signal_to_all_processes(tmp_path):
    run = BackgroundRun(tmp_path, "data.num_workers=2")
    run.wait_until_training()
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    for pid in [*map(int, children), run.process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert run.wait() == RESTART, run.output
    assert "saved at step" in run.output and "unexpectedly" not in run.output


def test_a_signal_before_the_first_step_exits_immediately_and_requeues(tmp_path):
    folder = make_fake_slurm(tmp_path / "bin")
    run = BackgroundRun(
        tmp_path, PATH=get_path_with(folder), SLURM_JOB_ID="5", SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="2"
    )
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "runs").exists():  # the first folder that it creates
        assert run.process.poll() is None and time.monotonic() < end, run.output
        time.sleep(0.01)
    run.process.send_signal(signal.SIGUSR1)
    assert run.wait() == RESTART, run.output
    assert read_calls(folder, "scontrol") == [["requeue", "4_2"]]
    assert "nothing is to be saved" in run.output and "Traceback" not in run.output


def test_answers_of_slurm_are_parsed(tmp_path, monkeypatch):
    folder = make_fake_slurm(tmp_path / "bin", scontrol="sys.exit('Requested operation is presently disabled')")
    monkeypatch.setenv("PATH", get_path_with(folder))
    assert requeue("5") == "Requested operation is presently disabled" and not is_preempted("5")
    for state, moment, taken in (
        ("RUNNING", "2026-11-21T15:19:41", True),
        ("RUNNING", "None", False),
        ("COMPLETING", "2026-11-21T15:19:41", False),  # cancelled during preemption
    ):
        make_fake_slurm(folder, scontrol=f"print('JobId=5 JobState={state} PreemptTime={moment}')")
        assert requeue("5") is None and is_preempted("5") is taken
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol" in requeue("5") and not is_preempted("5")


LEAVES = """
import os, signal, sys, time
from lit_vlm.fault_tolerance import signals
signals.RANK_ZERO_SECONDS = 0.5
signals.handle_signals()
try:
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
except BaseException:  # as the `import` of a library may
    pass
time.sleep(60)
"""
TAKEN = "print('JobId=5 JobState=RUNNING PreemptTime=2026-11-21T15:19:41')"


@pytest.mark.parametrize(
    ("number", "rank", "job", "answer", "code", "requeued"),
    [
        ("SIGUSR1", "1", "5", "", RESTART, True),  # although rank 0 may never reach this point
        ("SIGUSR1", "1", None, "", RESTART, False),
        ("SIGINT", "1", None, "", INTERRUPTED, False),
        ("SIGTERM", "1", "5", "", TERMINATED, False),  # from srun, after another rank failed
        ("SIGTERM", None, None, "", TERMINATED, False),
        ("SIGTERM", None, "5", TAKEN, RESTART, True),
    ],
)
def test_without_a_running_step_each_process_exits_by_itself(
    tmp_path, repository, number, rank, job, answer, code, requeued
):
    folder = make_fake_slurm(tmp_path / "bin", scontrol=answer)
    variables = {"PATH": get_path_with(folder), "RANK": rank, "SLURM_JOB_ID": job}
    environment = {**os.environ, **{name: value for name, value in variables.items() if value}}
    arguments = [sys.executable, "-c", LEAVES, number]
    done = subprocess.run(arguments, cwd=repository, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stderr
    assert (["requeue", "5"] in read_calls(folder, "scontrol")) is requeued


def test_a_rank_that_exits_with_the_others_ignores_further_signals():
    """Slurm ends the processes of a requeued job while they still wait for each other."""
    with use_listener(lambda request: pytest.fail("it was called away")) as signals:
        signals.is_exiting = True
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.01)


def test_a_job_that_slurm_requeued_without_an_answer_in_time_counts_as_requeued(tmp_path, monkeypatch):
    late = "print('JobId=5 JobState=COMPLETING Restarts=2') if 'show' in sys.argv else sys.exit('Socket timed out')"
    monkeypatch.setenv("PATH", get_path_with(make_fake_slurm(tmp_path / "bin", scontrol=late)))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert requeue("5") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # it was restarted before, and not again
    assert requeue("5") == "Socket timed out"


FAILS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("devices", "status"), [(1, 1), (2, RESTART)])
def test_a_stage_that_fails_after_a_signal_counts_as_failed_if_its_exit_status_is_its_own(
    tmp_path, monkeypatch, devices, status
):
    monkeypatch.setattr(
        pipeline, "build_command", lambda devices, arguments: [sys.executable, "-c", FAILS, str(tmp_path / "ready")]
    )

    def send_signal_when_ready():
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_signal_when_ready, daemon=True).start()
    assert pipeline.run_stage(tmp_path, [], devices, 3) == status
