"""A run folder belongs to one process at a time, and a killed process leaves nothing that must be cleaned up."""

import json
import os
import signal
import socket
import time

import pytest

from lit_vlm.fault_tolerance.run_lock import HOLDER_FILE, LOCK_FILE, RunLock
from lit_vlm.types import UserError


def run_in_child(work) -> int:
    """Run `work` in a child process and return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            work()
            code = 0
        except UserError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def acquire_lock(folder):
    with RunLock(folder) as lock:
        lock.acquire()


def test_the_second_process_gets_an_error_with_the_holder_its_host_and_its_start(tmp_path):
    reading, writing = os.pipe()

    def report_error():
        try:
            acquire_lock(tmp_path)
        except UserError as error:
            os.write(writing, str(error).encode())
            raise

    with RunLock(tmp_path) as lock:
        assert lock.acquire() and not lock.acquire()
        assert run_in_child(report_error) == 1
        message = os.read(reading, 4096).decode()
    assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in message
    assert "Wait for it or end that process" in message and "run_name=" in message
    assert run_in_child(lambda: acquire_lock(tmp_path)) == 0  # once it is released


def test_a_killed_holder_and_its_orphans_do_not_block_the_lock(tmp_path):
    def leave_orphan():
        RunLock(tmp_path).acquire()
        if os.fork() == 0:  # stands for a loader process
            time.sleep(2)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(leave_orphan) == -signal.SIGKILL and (tmp_path / HOLDER_FILE).is_file()
    acquire_lock(tmp_path)
    assert not (tmp_path / HOLDER_FILE).exists()


@pytest.mark.parametrize(
    "content",
    ["[1]", "5", "null", "{}", '{"config": {}}', json.dumps({"host": socket.gethostname()}), '{"process": 1}', "\0"],
)
def test_a_damaged_holder_file_names_no_process_and_hides_no_lock(content, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vlm.fault_tolerance.run_lock.ORPHAN_WAIT_SECONDS", 0.0)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        (tmp_path / HOLDER_FILE).write_text(content)
        with pytest.raises(UserError, match="under way already, in another process"):
            acquire_lock(tmp_path)
    (tmp_path / HOLDER_FILE).write_text(content)
    acquire_lock(tmp_path)


@pytest.mark.parametrize("name", [HOLDER_FILE, LOCK_FILE])
def test_a_folder_in_the_place_of_a_lock_file_is_reported(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} cannot be used: .*Remove it"):
        acquire_lock(tmp_path)
    (tmp_path / name).rmdir()
    acquire_lock(tmp_path)


def test_a_holder_file_that_becomes_a_folder_does_not_keep_the_lock(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.acquire()
        (tmp_path / HOLDER_FILE).unlink()
        (tmp_path / HOLDER_FILE).mkdir()
    (tmp_path / HOLDER_FILE).rmdir()
    acquire_lock(tmp_path)


def test_only_rank_0_acquires_the_lock_and_no_folder_is_created_before(tmp_path, monkeypatch):
    with RunLock(tmp_path / "run") as lock:
        assert not (tmp_path / "run").exists()
        monkeypatch.setenv("RANK", "1")
        assert not lock.acquire() and not (tmp_path / "run").exists()
        monkeypatch.setenv("RANK", "0")
        assert lock.acquire()
        monkeypatch.setenv("RANK", "1")
        assert run_in_child(lambda: acquire_lock(tmp_path / "run")) == 0
