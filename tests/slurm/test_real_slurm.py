"""Runs of two nodes on a real Slurm that is started for the test: preemption, time limit, a killed node.

The results equal those of an undisturbed run.
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

from lit_vlm.curation.features import FEATURES_FOLDER
from lit_vlm.data.index.shard_cache import SHARD_RECORDS

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


def make_overrides(*overrides: str) -> list[str]:
    return [*BASE.split(), *OWN.split(), f"trainer.max_steps={STEPS}", *overrides]


@pytest.fixture
def slurm(tmp_path):
    with MiniSlurm(tmp_path / "slurm") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Return a function that returns the weights of a case's run on two local processes."""
    known: dict[str, dict] = {}

    def get_weights(case: str) -> dict:
        if case not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            overrides = [
                override
                for override in make_overrides(*CASES[case], "run_name=run")
                if not override.startswith("submit.")
            ]
            local = ["task=train", *overrides, "trainer.num_nodes=1", "trainer.devices=2"]
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

    return get_weights


class SubmittedRun:
    """A run that was submitted with `task=submit`."""

    def __init__(self, slurm: MiniSlurm, workdir: Path, *overrides: str) -> None:
        self.slurm, self.folder = slurm, workdir / "runs/run"
        line = [
            sys.executable,
            str(RUN),
            "task=submit",
            *make_overrides(*overrides, "run_name=run", "submit.partition=low"),
        ]
        slurm.run(*line, cwd=workdir, timeout=PATIENCE)
        self.number = json.loads((self.folder / "slurm.json").read_text())["job"]

    @property
    def log(self) -> str:
        found = list(self.folder.glob("slurm-*.log"))
        return found[0].read_text(errors="replace") if found else ""

    def wait_for_step(self, min_step: int, limit: float = PATIENCE) -> None:
        end = time.monotonic() + limit
        while self._get_last_step() < min_step:
            assert time.monotonic() < end and self.slurm.get_job(self.number)["JobState"] != "FAILED", self.log[-3000:]
            time.sleep(0.1)

    def _get_last_step(self) -> int:
        metrics = self.folder / "metrics.csv"
        rows = metrics.read_text().splitlines()[1:] if metrics.exists() else []
        return sum("," in row for row in rows)

    def wait_until_finished(self, limit: float = PATIENCE) -> dict[str, str]:
        job = self.slurm.wait(self.number, limit=limit)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.log[-4000:]
        assert json.loads((self.folder / "manifest.json").read_text())["status"] == "finished"
        return job

    def require_same_weights(self, other: dict[str, torch.Tensor]) -> None:
        mine = load_file(self.folder / "hf/model.safetensors")
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


@pytest.mark.parametrize("case", [pytest.param(case, marks=slow if case == "sft-zero3" else long) for case in CASES])
def test_a_preempted_run_ends_with_the_weights_of_an_undisturbed_one(slurm, tmp_path, undisturbed, case):
    run = SubmittedRun(slurm, tmp_path, *CASES[case], "trainer.log_every_n_steps=1")
    run.wait_for_step(5)
    other = slurm.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1")
    assert slurm.wait(other)["JobState"] == "COMPLETED"
    assert run.wait_until_finished()["Restarts"] == "1"
    assert run.log.count("saved at step") == 1 and f"job {run.number} is requeued" in run.log
    assert "resumes at step" in run.log and "Traceback" not in run.log
    run.require_same_weights(undisturbed(case))


SLOW = """
import time
import lightning as L
class Slow(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        time.sleep(1.5 / trainer.accumulate_grad_batches)
"""


@long
def test_a_run_resumes_after_its_time_limit(slurm, tmp_path, undisturbed, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    overrides = ["callbacks=[throughput,guard,export,slow.Slow]", "submit.time=2", "submit.signal_seconds=30"]
    run = SubmittedRun(slurm, tmp_path, *CASES["sft-ddp"], *overrides)
    assert run.wait_until_finished(500)["Restarts"] >= "1"
    assert "Asked to requeue: saved at step" in run.log
    run.require_same_weights(undisturbed("sft-ddp"))


@slow
def test_a_killed_node_costs_only_the_steps_since_the_last_checkpoint(tmp_path, undisturbed):
    overrides = ["trainer.log_every_n_steps=1", "checkpoint.every_steps=4", "trainer.timeout_minutes=2"]
    with MiniSlurm(tmp_path / "slurm", nodes=3) as slurm:
        run = SubmittedRun(slurm, tmp_path, *CASES["align-ddp"], *overrides)
        run.wait_for_step(10)
        slurm.kill_node("127.0.0.12")
        job = run.wait_until_finished()
        assert (job["Restarts"], job["NodeList"]) == ("1", "127.0.0.[11,13]")
        assert "resumes at step" in run.log
        run.require_same_weights(undisturbed("align-ddp"))


@slow
def test_a_failed_run_is_a_failed_job_and_cancels_its_dependent_jobs(slurm, tmp_path):
    run = SubmittedRun(slurm, tmp_path, *CASES["align-ddp"], "data.max_length=1")
    job = slurm.wait(run.number)
    # 1, or 143 from a rank that srun ended because the other had failed
    assert job["JobState"] == "FAILED" and job["ExitCode"] in ("1:0", "143:0") and job["Restarts"] == "0", run.log
    assert "No usable sample" in run.log and "Traceback" not in run.log
    after = slurm.sbatch(f"--dependency=afterok:{run.number}", "--kill-on-invalid-dep=yes", "--wrap=true")
    assert slurm.wait(after)["JobState"] == "CANCELLED"


@long
def test_a_grid_of_the_launcher_survives_a_requeue(slurm, tmp_path):
    overrides = [
        override
        for override in make_overrides(*CASES["align-ddp"], "trainer.log_every_n_steps=1")
        if "max_steps" not in override
    ]
    grid = ["hydra/launcher=submitit_slurm", "submit.partition=low", "trainer.max_steps=30", "seed=0,1"]
    options = {
        "cwd": tmp_path,
        "env": slurm.environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    launcher = subprocess.Popen([sys.executable, str(RUN), "-m", "task=train", *overrides, *grid], **options)
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
    assert "is requeued" in logs and "resumes at step" in logs


@slow
def test_a_curation_of_an_array_hashes_each_record_once_and_searches_after_it(slurm, tmp_path):
    num_rows = 2 * SHARD_RECORDS + 100  # three blocks, the last one short; its rows repeat the first
    texts = [f"{number % (num_rows - 100)}번 질문" for number in range(num_rows)]
    rows = [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "네."}]} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [sys.executable, str(RUN), "task=curate", "data=llava_json", "data.sources.mine.path=rows.jsonl"]
    line += ["curate.slurm=2", "submit.partition=low", "submit.cpus_per_task=1"]
    slurm.run(*line, cwd=tmp_path, timeout=PATIENCE)
    output = tmp_path / "runs/curate/duplicates"
    jobs = [json.loads((folder / "slurm.json").read_text())["job"] for folder in (output, output / "search")]
    last = slurm.wait(jobs[1])
    logs = {path.name: path.read_text(errors="replace") for path in output.rglob("slurm-*.log")}
    assert (last["JobState"], last["ExitCode"]) == ("COMPLETED", "0:0"), logs
    said = "".join(logs.values())
    assert "job 0 of 2: hashed 2 of 3 blocks of records" in said and "job 1 of 2: hashed 1 of 3" in said, logs
    array = [one for one in slurm.run("scontrol", "--oneliner", "show", "job", jobs[0]).splitlines() if one]
    ended = [dict(word.split("=", 1) for word in one.split() if "=" in word)["EndTime"] for one in array]
    assert len(array) == 2 and max(ended) <= last["StartTime"]
    hashed = list((tmp_path / "runs/index" / FEATURES_FOLDER).glob("*.rows.npy"))
    assert len(hashed) == 3 and json.loads((output / "mine.selection.json").read_text())["left_out"] == [
        [num_rows - 100, num_rows - 1]
    ]


@slow
def test_no_process_of_slurm_is_left_running(tmp_path):
    with MiniSlurm(tmp_path / "slurm") as running:
        number = running.sbatch("--nodes=2", "--ntasks-per-node=1", "--output=/dev/null", "--wrap=srun sleep 100")
        running.wait(number, ("RUNNING",))
    assert running._list_descendants() == []
