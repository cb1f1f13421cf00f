"""task=sync and W&B's own `wandb sync`: copied folders, other home folders, running runs, missing files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_cases import get_history, log_steps, make_run_folder, make_saved_rows, start_run, write_samples

from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.loggers import wandb_client
from lit_vlm.runs.run_folder import RunFolder, read_manifest
from lit_vlm.tasks.sync import send_run
from lit_vlm.types import UserError

PICTURES = {"a_plain.png", "b_0.png", "b_1.png"}


def write_offline_run(path: Path, messages: list[str] | None = None, *, close: str = "finished") -> RunFolder:
    """Write a run of six steps with a table of three pictures, interrupted once and resumed."""
    folder, messages = make_run_folder(path), [] if messages is None else messages
    tracker = start_run(folder, messages, offline=True)
    tracker.log_samples("before", write_samples(path), step=0)
    log_steps(tracker, range(4))
    tracker.close("interrupted", {})
    tracker = start_run(folder, messages, has_earlier_run=True, offline=True)
    tracker.replay(make_saved_rows(range(2)))
    log_steps(tracker, range(2, 6))
    rows = make_saved_rows(range(6))
    names = ["epoch", "step", "train/loss", "val/loss"]
    lines = [",".join(str(row.get(name, "")) for name in names) for row in rows]
    (path / "metrics.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    if close:
        tracker.close(close, {"status": close})
        folder.update(status=close)
    return folder


def run_wandb_sync(path: Path, home: Path) -> str:
    """Return the output of W&B's own command with another home folder."""
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_DATA_DIR"}
    command = [sys.executable, "-m", "wandb", "sync", str(path)]
    done = subprocess.run(
        command,
        cwd=home,
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def list_uploaded_pictures(server) -> set[str]:
    """Return the pictures on the server that belong to complete artifacts."""
    whole = {number for number, artifact in server.state.artifacts.items() if artifact.state == "COMMITTED"}
    return {
        Path(name).name
        for name in server.state.files
        if name.startswith("artifacts/") and name.endswith(".png") and name.split("/")[1] in whole
    }


def get_run(server, folder: RunFolder):
    return server.runs[folder.manifest["tracking"]["wandb"]["id"]]


def test_a_copied_folder_is_uploaded_completely_from_another_home_and_only_once(server, tmp_path, monkeypatch, capsys):
    messages: list[str] = []
    folder = write_offline_run(tmp_path / "node" / "run", messages)
    assert server.requests == [] and messages[-1].endswith(f"`python run.py task=sync sync={folder.path}`")
    shutil.copytree(folder.path, tmp_path / "login" / "run")
    shutil.rmtree(tmp_path / "node")
    monkeypatch.setenv("HOME", str(tmp_path / "login"))
    send_run(tmp_path / "login" / "run")
    run = get_run(server, folder)
    rows = [{key: value for key, value in row.items() if key != "samples/before"} for row in get_history(run)]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(step, 1.0 / (step + 3)) for step in range(6)]
    assert list_uploaded_pictures(server) == PICTURES and {one.state for one in server.state.artifacts.values()} == {
        "COMMITTED"
    }
    assert (run.state, run.summary["status"], run.group) == ("finished", "finished", f"tiny-{run.name}")
    requests = len(server.requests)
    send_run(tmp_path / "login" / "run")
    assert len(server.requests) == requests and "was sent already" in capsys.readouterr().out
    assert not list((tmp_path / "login" / "run").glob("wandb/offline-run-*"))  # `wandb sync` would send it again


def test_wandbs_own_sync_from_another_home_finds_every_picture_in_the_run_folder(server, tmp_path):
    folder = write_offline_run(tmp_path / "run")
    assert not list((tmp_path / "home").rglob("*staging*"))
    (newest,) = folder.path.glob("wandb/offline-run-*")
    assert len(list(folder.path.glob("wandb/earlier/offline-run-*"))) == 1
    run_wandb_sync(newest, tmp_path / "other")
    run_wandb_sync(newest, tmp_path / "other")
    assert list_uploaded_pictures(server) == PICTURES and wandb_client.is_synced(folder.path)
    send_run(folder.path)  # knows that all rows have arrived
    run = get_run(server, folder)
    assert [row["_step"] for row in get_history(run)] == list(range(6)) and "samples/before" in run.history[0]
    assert (run.state, run.summary["status"]) == ("finished", "finished")


def test_a_running_run_is_sent_by_neither_command_and_arrives_complete_after_its_end(server, tmp_path):
    with RunLock(tmp_path / "run") as lock:
        lock.acquire()
        folder = write_offline_run(tmp_path / "run", close="")
        with pytest.raises(UserError, match="under way already, in process .* sent once it has ended"):
            send_run(folder.path)
        assert not list(folder.path.glob("wandb/offline-run-*"))  # so `wandb sync` finds no incomplete run
        assert "No runs to sync" in run_wandb_sync(folder.path / "wandb", tmp_path / "other")
    assert server.requests == []
    send_run(folder.path)  # stands for a run that was killed here
    run = get_run(server, folder)
    assert [row["_step"] for row in get_history(run)] == list(range(6)) and run.state == "preempted"
    folder = RunFolder(folder.path, read_manifest(folder.path) or {}, is_resumed=True)
    messages: list[str] = []
    assert (
        start_run(folder, messages, has_earlier_run=True, offline=True).experiment is None
        and "is there already" in messages[0]
    )
    folder.update(status="finished")
    send_run(folder.path)
    assert [row["_step"] for row in get_history(run)] == list(range(6)) and run.state == "finished"


def test_missing_files_are_named_and_nothing_is_sent(server, tmp_path):
    folder = write_offline_run(tmp_path / "run")
    (folder.path / "samples" / "b_1.png").unlink()
    with pytest.raises(
        UserError, match=r"run: samples/b_1\.png is missing, so nothing is sent\. Copy the whole folder"
    ):
        send_run(folder.path)
    with pytest.raises(UserError, match="holds no run: there is no manifest.json"):
        send_run(tmp_path)
    assert server.requests == [] and not server.runs


def test_without_an_answer_nothing_counts_as_sent(server, session, tmp_path, monkeypatch):
    folder = write_offline_run(tmp_path / "run")
    monkeypatch.setattr(wandb_client, "ANSWER_SECONDS", 2)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    server.fail(500)
    with pytest.raises(UserError, match="nothing was sent. Start it again once the server can be reached"):
        send_run(folder.path)
    assert "online" not in (read_manifest(folder.path) or {})["tracking"]["wandb"]
    server.recover()
    send_run(folder.path)
    assert list_uploaded_pictures(server) == PICTURES
