"""Runs of two nodes on a real Slurm, which is started for the test: preempted, at their time limit, with a node killed.

What comes out is what comes out of a run that nobody disturbed.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mini_slurm import MISSING, MiniSlurm
from safetensors.torch import load_file
from waiting import PATIENCE

RUN = Path(__file__).resolve().parents[2] / "run.py"
pytestmark = [
    pytest.mark.timeout(3 * PATIENCE),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here (Debian: apt-get install slurm-wlm)"),
]
slow, long = pytest.mark.slow, pytest.mark.long
CASES = {
    "align-ddp": ["data=builtin_align", "stage=align", "trainer.strategy=ddp"],
    "sft-ddp": ["data=builtin_sft", "stage=sft", "trainer.strategy=ddp"],
    "align-zero3": ["data=builtin_align", "stage=align", "trainer.strategy=deepspeed_zero3"],
    "sft-zero3": ["data=builtin_sft", "stage=sft", "trainer.strategy=deepspeed_zero3"],
}
STEPS = 60
BASE = "model=tiny model.grid=2 model.max_tiles=4 trainer=tiny trainer.num_nodes=2 data.num_workers=0 data.global_batch_size=8"
OWN = "data.tokens_per_micro_batch=400 callbacks=[throughput,guard,export] checkpoint.every_minutes=null submit.signal_seconds=50"


def command(*words: str) -> list[str]:
    return [*BASE.split(), *OWN.split(), f"trainer.max_steps={STEPS}", *words]


@pytest.fixture
def slurm(tmp_path):
    with MiniSlurm(tmp_path / "slurm") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Weights of a case's run on two local processes."""
    known: dict[str, dict] = {}

    def weights(case: str) -> dict:
        if case not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            words = [word for word in command(*CASES[case], "run_name=run") if not word.startswith("submit.")]
            local = ["task=train", *words, "trainer.num_nodes=1", "trainer.devices=2"]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            environment = MiniSlurm(folder).environment | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*launcher, str(RUN), *local],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            known[case] = load_file(folder / "runs/run/hf/model.safetensors")
            shutil.rmtree(folder)
        return known[case]

    return weights


class Submitted:
    """A run that `task=submit` put into the queue."""

    def __init__(self, slurm: MiniSlurm, place: Path, *words: str) -> None:
        self.slurm, self.folder = slurm, place / "runs/run"
        line = [sys.executable, str(RUN), "task=submit", *command(*words, "run_name=run", "submit.partition=low")]
        slurm.run(*line, cwd=place, timeout=PATIENCE)
        self.number = json.loads((self.folder / "slurm.json").read_text())["job"]

    @property
    def log(self) -> str:
        found = list(self.folder.glob("slurm-*.log"))
        return found[0].read_text(errors="replace") if found else ""

    def until_step(self, least: int, limit: float = PATIENCE) -> None:
        end = time.monotonic() + limit
        while self._last_step() < least:
            assert time.monotonic() < end and self.slurm.job(self.number)["JobState"] != "FAILED", self.log[-3000:]
            time.sleep(0.1)

    def _last_step(self) -> int:
        metrics = self.folder / "metrics.csv"
        rows = metrics.read_text().splitlines()[1:] if metrics.exists() else []
        return sum("," in row for row in rows)

    def finished(self, limit: float = PATIENCE) -> dict[str, str]:
        job = self.slurm.wait(self.number, limit=limit)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.log[-4000:]
        assert json.loads((self.folder / "manifest.json").read_text())["status"] == "finished"
        return job

    def same_as(self, other: dict[str, torch.Tensor]) -> None:
        mine = load_file(self.folder / "hf/model.safetensors")
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


@pytest.mark.parametrize("case", [pytest.param(case, marks=slow if case == "sft-zero3" else long) for case in CASES])
def test_a_run_that_makes_room_for_another_ends_as_one_that_never_did(slurm, tmp_path, undisturbed, case):
    run = Submitted(slurm, tmp_path, *CASES[case], "trainer.log_every_n_steps=1")
    run.until_step(5)
    other = slurm.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1")
    assert slurm.wait(other)["JobState"] == "COMPLETED"
    assert run.finished()["Restarts"] == "1"
    assert run.log.count("saved at step") == 1 and f"job {run.number} is requeued" in run.log
    assert "goes on at step" in run.log and "Traceback" not in run.log
    run.same_as(undisturbed(case))


SLOW = """
import time
import lightning as L
class Slow(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        time.sleep(1.5 / trainer.accumulate_grad_batches)
"""


@long
def test_a_time_limit_is_a_break_and_not_the_end(slurm, tmp_path, undisturbed, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["callbacks=[throughput,guard,export,slow.Slow]", "submit.time=2", "submit.signal_seconds=30"]
    run = Submitted(slurm, tmp_path, *CASES["sft-ddp"], *words)
    assert run.finished(500)["Restarts"] >= "1"
    assert "Asked to requeue: saved at step" in run.log
    run.same_as(undisturbed("sft-ddp"))


@slow
def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint_and_nothing_else(tmp_path, undisturbed):
    words = ["trainer.log_every_n_steps=1", "checkpoint.every_steps=4", "trainer.timeout_minutes=2"]
    with MiniSlurm(tmp_path / "slurm", nodes=3) as slurm:
        run = Submitted(slurm, tmp_path, *CASES["align-ddp"], *words)
        run.until_step(10)
        slurm.kill_node("127.0.0.12")
        job = run.finished()
        assert (job["Restarts"], job["NodeList"]) == ("1", "127.0.0.[11,13]")
        assert "goes on at step" in run.log
        run.same_as(undisturbed("align-ddp"))


@slow
def test_a_run_that_fails_is_a_failed_job_and_ends_those_that_wait_for_it(slurm, tmp_path):
    run = Submitted(slurm, tmp_path, *CASES["align-ddp"], "data.max_length=1")
    job = slurm.wait(run.number)
    # 1, or 143 of a rank that srun ended because the other had failed
    assert job["JobState"] == "FAILED" and job["ExitCode"] in ("1:0", "143:0") and job["Restarts"] == "0", run.log
    assert "No usable sample" in run.log and "Traceback" not in run.log
    after = slurm.sbatch(f"--dependency=afterok:{run.number}", "--kill-on-invalid-dep=yes", "--wrap=true")
    assert slurm.wait(after)["JobState"] == "CANCELLED"


@long
def test_a_grid_goes_through_the_launcher_and_outlasts_a_requeue(slurm, tmp_path):
    words = [word for word in command(*CASES["align-ddp"], "trainer.log_every_n_steps=1") if "max_steps" not in word]
    grid = ["hydra/launcher=submitit_slurm", "submit.partition=low", "trainer.max_steps=30", "seed=0,1"]
    options = {
        "cwd": tmp_path,
        "env": slurm.environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    launcher = subprocess.Popen([sys.executable, str(RUN), "-m", "task=train", *words, *grid], **options)
    try:
        end = time.monotonic() + PATIENCE
        while not any(len(path.read_text().splitlines()) > 4 for path in tmp_path.glob("runs/train/*/metrics.csv")):
            assert time.monotonic() < end and launcher.poll() is None, launcher.stdout.read()[-3000:]
            time.sleep(0.1)
        slurm.run("scancel", "--signal=USR1", "--state=RUNNING", "--user=root")
        assert launcher.wait(PATIENCE) == 0, launcher.stdout.read()[-3000:]
    finally:
        if launcher.poll() is None:
            launcher.kill()
    states = [json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/train/*/manifest.json")]
    assert states == ["finished"] * 2
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/.submitit/*/*.out"))
    assert "is requeued" in logs and "goes on at step" in logs


@slow
def test_nothing_of_slurm_is_left_running(tmp_path):
    with MiniSlurm(tmp_path / "slurm") as running:
        number = running.sbatch("--nodes=2", "--ntasks-per-node=1", "--output=/dev/null", "--wrap=srun sleep 100")
        running.wait(number, ("RUNNING",))
    assert running._descendants() == []
