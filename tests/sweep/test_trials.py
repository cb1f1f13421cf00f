"""Trials as processes: early stopping, failures, interruptions. The processes are small programs that log like a run, save
on SIGTERM like a run, and train nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from waiting import PATIENCE, until

from lit_vlm.sweep.search import Search, TrialOutcome
from lit_vlm.sweep.sweep_file import parse_sweep
from lit_vlm.sweep.trial_runner import TrialProcess, TrialRunner, collect_records
from lit_vlm.types import UserError

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, os, pathlib, signal, sys, time
a = json.loads(sys.argv[1])
folder, table = pathlib.Path.cwd(), pathlib.Path("metrics.csv")
def leave(*_):
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, leave)
print("cuda", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if a.get("fails"):
    sys.exit("it broke: " + a["fails"])
if a.get("again") and not pathlib.Path("left").exists():
    pathlib.Path("left").touch()
    sys.exit(75)
lines = table.read_text().splitlines() if table.exists() else ["step," + a.get("metric", "m")]
for i in range(len(lines) - 1, a.get("steps", 3)):
    lines.append(f"{i},{a['value'] + 1 / (i + 1)}")
    table.write_text("\\n".join(lines) + "\\n")
    time.sleep(float(os.environ.get("PACE") or a.get("sleep", 0.02)))
pathlib.Path("manifest.json").write_text(json.dumps({"status": "finished", "figures": {"seconds": 1.5}}))
"""


def make_sweep(trials: list[dict], **keys):
    """Return a grid sweep over these trials."""
    settings = {"method": "grid", "metric": {"name": "m"}, "parameters": {"a": {"values": trials}}, **keys}
    return parse_sweep(settings, "x.yaml")


class SweepRunner:
    """Runs the trials of a sweep in a folder."""

    def __init__(self, folder: Path, file, places=((),), **options) -> None:
        self.folder, self.messages = folder, []
        self.search = Search(file, folder / "journal.log")
        self.trials = TrialRunner(
            self.search, "m", folder, self.make_trial, device_groups=list(places), say=self.messages.append, **options
        )

    def make_trial(self, number, parameters):
        trial_folder = self.folder / str(number)
        trial_folder.mkdir(parents=True, exist_ok=True)
        name = f"run_name=sweeps/{self.folder.name}/{number}"
        start = f'cd {trial_folder} && exec {sys.executable} -c "$1" "$2" {name}'
        line = ["bash", "-c", start, "bash", RUN, json.dumps(parameters["a"])]
        return TrialProcess(number, parameters, trial_folder, line, dict(os.environ))

    def run(self):
        self.trials.run()
        return self

    @property
    def records(self):
        return collect_records(self.search, self.folder, "m")

    @property
    def states(self):
        return [record.state for record in self.records]


def test_each_trial_runs_once_and_its_last_value_is_its_result(tmp_path):
    runner = SweepRunner(tmp_path, make_sweep([{"value": 1.0}, {"value": 2.0}])).run()
    assert [(r.state, r.value, r.seconds) for r in runner.records] == [
        ("finished", pytest.approx(v + 1 / 3), 1.5) for v in (1, 2)
    ]
    again = SweepRunner(tmp_path, make_sweep([{"value": 1.0}, {"value": 2.0}])).run()
    assert again.messages == [] and again.states == runner.states


def test_devices_are_assigned_and_released(tmp_path):
    file = make_sweep([{"value": float(n), "sleep": 0.3} for n in range(4)])
    runner = SweepRunner(tmp_path, file, places=[("0", "1"), ("2", "3")]).run()
    seen = [(tmp_path / str(n) / "trial.log").read_text().split()[1] for n in range(4)]
    assert sorted(seen[:2]) == ["0,1", "2,3"] and set(seen[2:]) <= {"0,1", "2,3"} and runner.states == ["finished"] * 4


def test_a_worse_trial_is_stopped_after_saving(tmp_path):
    file = make_sweep(
        [{"value": 1.0}, {"value": 2.0, "steps": 400, "sleep": 0.05}],
        early_terminate={"type": "hyperband", "min_iter": 2},
    )
    runner = SweepRunner(tmp_path, file).run()
    assert runner.states == ["finished", "stopped"] and "saved" in (tmp_path / "1/trial.log").read_text()
    assert any("trial 1: stopped early, m" in line for line in runner.messages)


def test_a_failed_trial_is_reported_with_its_last_line_and_the_sweep_continues(tmp_path):
    runner = SweepRunner(tmp_path, make_sweep([{"value": 1.0}, {"fails": "no such picture"}, {"value": 2.0}])).run()
    assert runner.states == ["finished", "failed", "finished"]
    assert runner.records[1].note == "it broke: no such picture" and any(
        "no such picture" in line for line in runner.messages
    )


def test_three_failures_at_the_start_end_the_sweep_with_the_reason(tmp_path):
    file = make_sweep([{"fails": str(n)} for n in range(5)])
    with pytest.raises(UserError, match=r"The first 3 trials failed[^\n]*\n(.*\n)*it broke: 2\n"):
        SweepRunner(tmp_path, file).run()
    assert len(SweepRunner(tmp_path, file).records) == 3


def test_a_metric_that_is_never_logged_fails_with_the_nearest_name(tmp_path):
    runner = SweepRunner(tmp_path, make_sweep([{"value": 1.0, "metric": "mm"}])).run()
    assert runner.states == ["failed"] and runner.records[0].note == "it never logged m; it logged mm. Did you mean mm?"


def test_a_trial_that_exits_for_a_restart_is_restarted(tmp_path):
    runner = SweepRunner(tmp_path, make_sweep([{"value": 1.0, "again": True}])).run()
    assert runner.states == ["finished"]


def test_reaching_the_target_ends_the_sweep(tmp_path):
    file = make_sweep(
        [{"value": 3.0}, {"value": 1.0}, {"value": 0.5}], metric={"name": "m", "goal": "minimize", "target": 2}
    )
    assert SweepRunner(tmp_path, file).run().states == ["finished", "finished"]


def test_a_worker_resumes_only_its_own_trials(tmp_path):
    file = make_sweep([{"value": 1.0}, {"value": 2.0}, {"value": 3.0}])
    search = Search(file, tmp_path / "journal.log")
    for worker in (0, 1):
        search.ask(worker)  # and both workers have ended
    runner = SweepRunner(tmp_path, file, worker=1, num_workers=2).run()
    assert [trial.outcome for trial in runner.search.list_trials()] == [
        None,
        TrialOutcome.finished,
        TrialOutcome.finished,
    ]
    assert SweepRunner(tmp_path, file).run().states == ["finished"] * 3


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r} + "/tests", {root!r}]
from pathlib import Path
from test_trials import SweepRunner, make_sweep
runner = SweepRunner(Path({folder!r}), make_sweep([{{"value": float(n), "steps": 40, "sleep": 5}} for n in range(3)]), places=((), ()))
print("asked", [str(request) for request in runner.run().trials.stop_requests], flush=True)
"""


def start_sweep(folder: Path) -> subprocess.Popen:
    """Start a sweep of three trials of some minutes, two at a time, in a separate process."""
    code = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder)))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until(lambda: (folder / "1/metrics.csv").exists() or process.poll() is not None)
    assert process.poll() is None
    return process


def count_rows(folder: Path, number: int) -> int:
    return len((folder / str(number) / "metrics.csv").read_text().splitlines()) - 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_asked_to_stop_lets_its_trials_save_and_resumes_later(tmp_path, monkeypatch, number):
    process = start_sweep(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    request = {signal.SIGINT: "interrupt", signal.SIGTERM: "leave"}[number]
    assert f"asked ['{request}']" in output
    assert all((tmp_path / str(n) / "trial.log").read_text().endswith("saved\n") for n in (0, 1))
    done = [count_rows(tmp_path, n) for n in (0, 1)]
    assert all(0 < n < 40 for n in done)
    monkeypatch.setenv("PACE", "0.001")  # finish as fast as possible
    runner = SweepRunner(
        tmp_path, make_sweep([{"value": float(n), "steps": 40, "sleep": 5} for n in range(3)]), places=((), ())
    ).run()
    assert runner.states == ["finished"] * 3 and count_rows(tmp_path, 0) == 40


def test_a_killed_sweep_resumes_and_runs_no_trial_twice_at_the_same_time(tmp_path, monkeypatch):
    process = start_sweep(tmp_path)
    process.kill()
    process.communicate(timeout=PATIENCE)
    trial_pid = int((tmp_path / "0/trial.pid").read_text())
    os.kill(trial_pid, 0)  # the trial is still running
    monkeypatch.setenv("PACE", "0.001")  # finish as fast as possible
    runner = SweepRunner(
        tmp_path, make_sweep([{"value": float(n), "steps": 40, "sleep": 5} for n in range(3)]), places=((), ())
    ).run()
    assert runner.states == ["finished"] * 3 and [count_rows(tmp_path, n) for n in range(3)] == [40] * 3
    assert "saved" in (tmp_path / "0/trial.log").read_text()  # it was asked to stop before it was started again
