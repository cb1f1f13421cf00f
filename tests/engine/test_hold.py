"""A run folder is one process's at a time, and nobody has to clear up after one that was killed."""

import json
import os
import signal
import socket
import time

import pytest

from lit_vlm.engine.hold import HOLDER_FILE, LOCK_FILE, RunLock
from lit_vlm.types import UserError


def in_child(work) -> int:
    """Exit status of a process that does it; negative ones are signals."""
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


def take(folder):
    with RunLock(folder) as hold:
        hold.acquire()


def test_the_second_process_is_told_who_holds_the_folder_where_and_since_when(tmp_path):
    reading, writing = os.pipe()

    def tell():
        try:
            take(tmp_path)
        except UserError as error:
            os.write(writing, str(error).encode())
            raise

    with RunLock(tmp_path) as hold:
        assert hold.acquire() and not hold.acquire()
        assert in_child(tell) == 1
        said = os.read(reading, 4096).decode()
    assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in said
    assert "Wait for it or end that process" in said and "run_name=" in said
    assert in_child(lambda: take(tmp_path)) == 0  # once it is let go


def test_a_lock_left_by_a_killed_process_holds_nobody_up_nor_do_its_orphans(tmp_path):
    def killed():
        RunLock(tmp_path).acquire()
        if os.fork() == 0:  # a loader process
            time.sleep(2)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL and (tmp_path / HOLDER_FILE).is_file()
    take(tmp_path)
    assert not (tmp_path / HOLDER_FILE).exists()


@pytest.mark.parametrize(
    "content",
    ["[1]", "5", "null", "{}", '{"config": {}}', json.dumps({"host": socket.gethostname()}), '{"process": 1}', "\0"],
)
def test_a_damaged_note_of_the_holder_names_nobody_and_hides_no_lock(content, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vlm.engine.hold.ORPHAN_WAIT_SECONDS", 0.0)
    with RunLock(tmp_path) as hold:
        hold.acquire()
        (tmp_path / HOLDER_FILE).write_text(content)
        with pytest.raises(UserError, match="under way already, in another process"):
            take(tmp_path)
    (tmp_path / HOLDER_FILE).write_text(content)
    take(tmp_path)


@pytest.mark.parametrize("name", [HOLDER_FILE, LOCK_FILE])
def test_a_folder_in_the_place_of_a_file_of_the_lock_is_told(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} cannot be used: .*Remove it"):
        take(tmp_path)
    (tmp_path / name).rmdir()
    take(tmp_path)


def test_a_holder_that_turns_into_a_folder_does_not_keep_the_lock(tmp_path):
    with RunLock(tmp_path) as hold:
        hold.acquire()
        (tmp_path / HOLDER_FILE).unlink()
        (tmp_path / HOLDER_FILE).mkdir()
    (tmp_path / HOLDER_FILE).rmdir()
    take(tmp_path)


def test_only_the_first_rank_takes_it_and_no_folder_is_made_before(tmp_path, monkeypatch):
    with RunLock(tmp_path / "run") as hold:
        assert not (tmp_path / "run").exists()
        monkeypatch.setenv("RANK", "1")
        assert not hold.acquire() and not (tmp_path / "run").exists()
        monkeypatch.setenv("RANK", "0")
        assert hold.acquire()
        monkeypatch.setenv("RANK", "1")
        assert in_child(lambda: take(tmp_path / "run")) == 0
