"""Sweep workers on a real Slurm that is started for the test: an array that shares the trials, a preempted worker, trials on
two nodes."""

import json
import sys
import time
from pathlib import Path

import pytest
from mini_slurm import MISSING, MiniSlurm
from waiting import PATIENCE

from lit_vlm.sweep.search import Search, Trial
from lit_vlm.sweep.sweep_file import read_sweep

RUN = Path(__file__).resolve().parents[2] / "run.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * PATIENCE),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here (Debian: apt-get install slurm-wlm)"),
]
FILE = """
command: ["${program}", "data=builtin_align", "stage=align", "model=tiny", "trainer=tiny", "${args_json}"]
method: random
metric: {name: val/loss}
run_cap: 4
parameters:
  stage.learning_rate: {distribution: log_uniform_values, min: 1.0e-3, max: 1.0e-2}
  model.grid: {value: 2}
  model.max_tiles: {value: 4}
  data.num_workers: {value: 0}
  data.global_batch_size: {value: 8}
  callbacks: {value: [throughput, guard]}
"""


@pytest.fixture
def slurm(tmp_path):
    with MiniSlurm(tmp_path / "slurm") as running:
        yield running


class SubmittedSweep:
    """A sweep whose workers were submitted with `task=sweep`."""

    def __init__(self, slurm: MiniSlurm, workdir: Path, *overrides: str, name: str = "mine") -> None:
        self.slurm, self.workdir, self.folder = slurm, workdir, workdir / f"runs/sweeps/{name}"
        (workdir / "mine.yaml").write_text(FILE, encoding="utf-8")
        line = [
            sys.executable,
            str(RUN),
            "task=sweep",
            "sweep=mine.yaml",
            "submit.partition=low",
            f"run_name=sweeps/{name}",
            *overrides,
        ]
        slurm.run(*line, cwd=workdir, timeout=PATIENCE)
        self.number = json.loads((self.folder / "slurm.json").read_text())["job"]

    def wait_until_finished(self, workers: int, limit: float = PATIENCE) -> list[dict[str, str]]:
        jobs = [self.slurm.wait(f"{self.number}_{worker}", limit=limit) for worker in range(workers)]
        assert [(job["JobState"], job["ExitCode"]) for job in jobs] == [("COMPLETED", "0:0")] * workers, self.log
        return jobs

    @property
    def log(self) -> str:
        logs = [*self.folder.glob("slurm-*.log"), *self.folder.glob("*/trial.log")]
        return "\n".join(f"{path}\n{path.read_text(errors='replace')[-2500:]}" for path in sorted(logs))

    @property
    def trials(self) -> list[Trial]:
        return Search(read_sweep(self.workdir / "mine.yaml"), self.folder / "journal.log").list_trials()

    def wait_for_rows(self, number: int, min_rows: int, limit: float = PATIENCE) -> None:
        table, end = self.folder / str(number) / "metrics.csv", time.monotonic() + limit
        while not table.exists() or len(table.read_text().splitlines()) <= min_rows:
            assert time.monotonic() < end, self.log
            time.sleep(0.1)


def test_the_workers_of_an_array_share_the_trials(slurm, tmp_path):
    sweep = SubmittedSweep(slurm, tmp_path, "trials.slurm=2", "trainer.max_steps=4")
    sweep.wait_until_finished(2)
    assert [str(trial.outcome) for trial in sweep.trials] == ["finished"] * 4, sweep.log
    assert {trial.worker for trial in sweep.trials} == {0, 1}
    assert "4 of 4 trials: 4 finished" in (sweep.folder / "sweep.html").read_text(encoding="utf-8")


def test_a_preempted_worker_lets_its_trial_save_and_resumes_it(slurm, tmp_path):
    overrides = ["trials.slurm=1", "trials.count=1", "trainer.max_steps=150", "trainer.log_every_n_steps=1"]
    sweep = SubmittedSweep(slurm, tmp_path, *overrides)
    sweep.wait_for_rows(0, 5)
    other = slurm.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1")
    assert slurm.wait(other)["JobState"] == "COMPLETED"
    (job,) = sweep.wait_until_finished(1)
    assert job["Restarts"] == "1" and "requeued" in sweep.log
    (trial,) = sweep.trials
    log = (sweep.folder / "0/trial.log").read_text()
    assert str(trial.outcome) == "finished" and "saved at step" in log and "resumes at step" in log


def test_a_trial_of_two_nodes_is_a_job_step_of_its_worker_and_is_stopped_with_it(slurm, tmp_path):
    overrides = ["trials.slurm=1", "trials.count=2", "trainer.num_nodes=2", "trainer.strategy=ddp"]
    sweep = SubmittedSweep(slurm, tmp_path, *overrides, "trainer.max_steps=6")
    sweep.wait_until_finished(1)
    assert [str(trial.outcome) for trial in sweep.trials] == ["finished"] * 2
    plans = [json.loads((sweep.folder / f"{n}/manifest.json").read_text())["plan"]["world_size"] for n in range(2)]
    assert plans == [2, 2]
    longer = ["trainer.max_steps=4000", "trainer.log_every_n_steps=1"]
    again = SubmittedSweep(slurm, tmp_path, *overrides, *longer, name="long")
    again.wait_for_rows(0, 5)
    slurm.run("scancel", "--batch", "--signal=TERM", f"{again.number}_0")
    job = slurm.wait(f"{again.number}_0")
    assert job["ExitCode"] == "75:0" and "saved at step" in (again.folder / "0/trial.log").read_text(), again.log
