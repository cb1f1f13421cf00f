"""Heartbeats, and what is made of them when nothing goes on."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from waiting import PATIENCE, until

from callbacks import Heartbeat
from lit_vlm.engine import watch_thread
from lit_vlm.engine.exits import STUCK
from lit_vlm.engine.watch import (
    Activity,
    Progress,
    RankHeartbeat,
    make_heartbeat,
    read_heartbeat,
    read_start_time,
    write_heartbeat,
)
from lit_vlm.engine.watch_thread import ExitNotice, Watchdog, _is_busy_alone, _kill_process, make_stuck_notice
from lit_vlm.types import UserError


def beat(rank=0, **changes) -> RankHeartbeat:
    now = time.time()
    facts = {
        "host": "a",
        "pid": 1,
        "started": 0,
        "state": "alive",
        "doing": Activity.backward.value,
        "step": 4,
        "micro_step": 0,
    }
    return RankHeartbeat(
        rank=rank, **{**facts, "since": now, "moved": now, "beat": now, "samples": [f"s{rank}"], **changes}
    )


def test_a_heartbeat_says_where_a_rank_is(tmp_path):
    pulse = Progress()
    pulse.set_activity(Activity.forward, step=3, micro_step=1, samples=("a", "b"))
    write_heartbeat(tmp_path, make_heartbeat(2, pulse))
    found = read_heartbeat(tmp_path, 2)
    assert (found.doing, found.step, found.micro_step, found.samples) == ("in the forward pass", 3, 1, ["a", "b"])
    assert (found.host, found.pid, found.started) == (socket.gethostname(), os.getpid(), read_start_time(os.getpid()))
    assert read_heartbeat(tmp_path, 1) is None


def test_one_that_no_longer_beats_is_named_before_those_who_wait_for_it(tmp_path):
    old = time.time() - 100
    note = make_stuck_notice([beat(0), beat(1, beat=old, moved=old), beat(2)], 100, tmp_path)
    assert note.code == STUCK and [found.rank for found in note.frozen] == [1]
    assert "rank 1 on a (pid 1) does not answer any more" in note.message and "rank 0" not in note.message
    assert "samples s1" in note.message and "step 5, micro-batch 1" in note.message


def test_the_least_far_is_named_when_all_beat(tmp_path):
    note = make_stuck_notice([beat(0), beat(1, doing=Activity.data.value), beat(2)], 100, tmp_path)
    assert "rank 1 on a (pid 1) does not get on, waiting for data of step 5" in note.message and not note.frozen
    note = make_stuck_notice([beat(0), beat(1), beat(2, step=3, doing=Activity.optimizer.value)], 100, tmp_path)
    assert "rank 2" in note.message


def test_ranks_at_the_same_place_accuse_nobody(tmp_path):
    assert (
        "all ranks are at the same place and wait for each other"
        in make_stuck_notice([beat(0), beat(1)], 9, tmp_path).message
    )


def test_only_the_first_to_notice_speaks(tmp_path):
    first, second = ExitNotice(STUCK, "one", [beat(1)]), ExitNotice(1, "two", [])
    assert first.create_file(tmp_path) and not second.create_file(tmp_path)
    assert ExitNotice.read(tmp_path) == first


@pytest.mark.parametrize(
    ("changes", "waited_for"),
    [
        ({"doing": Activity.exporting.value}, True),
        ({"doing": Activity.exporting.value, "moved": time.time() - 1000}, False),  # it exports, and hangs in it
        ({"doing": Activity.saving.value, "beat": time.time() - 1000}, False),
        ({"doing": Activity.backward.value}, False),
        ({"doing": Activity.exporting.value, "state": "failed"}, False),
    ],
)
def test_a_rank_that_saves_or_exports_is_waited_for_while_it_gets_on(changes, waited_for):
    assert _is_busy_alone(beat(**changes), 100) is waited_for


def test_only_the_process_that_wrote_the_heartbeat_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = {"host": socket.gethostname(), "pid": process.pid, "started": read_start_time(process.pid)}
    for other in ({"host": "elsewhere"}, {"started": own["started"] + 1}, {"started": 0}):
        _kill_process(beat(**own | other))
    assert process.poll() is None
    _kill_process(beat(**own))
    assert process.wait(PATIENCE) == -signal.SIGKILL


def watched(tmp_path, pulse, world=1, limit=1.0, **options):
    class Told(Watchdog):
        notes = []

        def exit_process(self, note):
            self.notes.append(note)
            self._stopped.set()

    watch = Told(pulse, tmp_path, 0, world, heartbeat_seconds=0.1, timeout_seconds=limit, **options)
    watch.notes = []
    return watch


def test_a_main_thread_that_gets_on_is_left_alone_and_one_that_does_not_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    pulse = Progress()
    pulse.set_activity(Activity.forward)
    watch = watched(tmp_path, pulse)
    watch.start()
    for _ in range(40):  # twice the limit
        time.sleep(0.05)
        pulse.mark_progress()
    assert not watch.notes
    watch.join(PATIENCE)
    assert [note.code for note in watch.notes] == [STUCK]
    watch.stop()


def test_nothing_is_expected_of_a_start(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    watch = watched(tmp_path, Progress())
    watch.start()
    time.sleep(2.0)
    watch.stop()
    assert not watch.notes
    assert read_heartbeat(tmp_path, 0).state == "left"


def test_a_neighbour_that_left_is_no_frozen_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    pulse = Progress()
    write_heartbeat(tmp_path, replace(beat(1), state="left"))
    watch = watched(tmp_path, pulse, world=2)
    watch.start()
    time.sleep(2.0)
    watch.stop()
    assert not watch.notes
    write_heartbeat(tmp_path, beat(1))
    watch = watched(tmp_path, pulse, world=2)
    watch.start()
    watch.join(PATIENCE)
    assert "rank 1" in watch.notes[0].message
    watch.stop()


def test_a_file_system_that_stumbles_and_a_note_that_is_half_written_end_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    read = Path.read_text

    def stale(self, *options, **more):
        if self.name == "leave.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, *options, **more)

    pulse = Progress()
    watch = watched(tmp_path, pulse)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        watch.start()
        until(lambda: "Stale file handle" in capsys.readouterr().err)
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck" / "leave.json").touch()
    time.sleep(0.3)
    assert watch.is_alive() and not watch.notes
    (tmp_path / "stuck" / "leave.json").unlink()
    ExitNotice(STUCK, "whole", []).create_file(tmp_path)
    watch.join(PATIENCE)
    assert [note.message for note in watch.notes] == ["whole"]
    watch.stop()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_who_announce_one_is_first_and_its_note_is_whole(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")))
    first = []

    def announce(number):
        if ExitNotice(1, str(number), []).create_file(tmp_path):
            first.append(str(number))

    threads = [Thread(target=announce, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first == [ExitNotice.read(tmp_path).message]
    assert [path.name for path in (tmp_path / "stuck").iterdir()] == ["leave.json"]


def test_a_note_is_never_seen_half_written(tmp_path):
    note, file = ExitNotice(STUCK, "", [beat(rank) for rank in range(5000)]), tmp_path / "stuck" / "leave.json"
    writer = Thread(target=note.create_file, args=(tmp_path,))
    writer.start()
    while writer.is_alive() and not file.exists():
        pass
    first = ExitNotice.read(tmp_path)
    writer.join()
    assert first == note


def test_a_rank_that_is_ending_with_an_exception_is_not_cut_short_but_for_stuck_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr(watch_thread, "GRACE_SECONDS", 0.1)
    ExitNotice(1, "another rank failed", []).create_file(tmp_path)
    for failing, limit, left in ((True, 60.0, False), (True, 0.5, True), (False, 60.0, True)):
        watch = watched(tmp_path, Progress(), limit=limit, failing=lambda failing=failing: failing)
        watch.start()
        watch.join(PATIENCE if left else 1.5)
        assert bool(watch.notes) is left
        watch.stop()
    (tmp_path / "stuck" / "leave.json").unlink()
    ExitNotice(STUCK, "stuck", []).create_file(tmp_path)
    watch = watched(tmp_path, Progress(), limit=60.0, failing=lambda: True)
    watch.start()
    watch.join(PATIENCE)
    assert [note.code for note in watch.notes] == [STUCK]
    watch.stop()


def test_of_ranks_that_fail_alike_only_the_one_with_words_is_announced(tmp_path):
    trainer = SimpleNamespace(world_size=2, global_rank=1)
    for error, announced in ((UserError(""), False), (UserError("no room"), True)):
        heartbeat = Heartbeat(tmp_path)
        heartbeat._watchdog = Watchdog(Progress(), tmp_path, 1, 2, heartbeat_seconds=1, timeout_seconds=4)
        heartbeat._watchdog.start()
        heartbeat.on_exception(trainer, None, error)
        assert (ExitNotice.read(tmp_path) is not None) is announced
