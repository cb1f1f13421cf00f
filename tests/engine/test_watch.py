"""Heartbeats, and what is made of them when nothing goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from lit_vlm.engine.exits import STUCK
from lit_vlm.engine.watch import Beat, Doing, Pulse, beat_of, read_beat, started_at, write_beat
from lit_vlm.engine.watch_thread import Note, Watch, _goes_on, _kill, verdict


def beat(rank=0, **changes) -> Beat:
    now = time.time()
    facts = {
        "host": "a",
        "pid": 1,
        "started": 0,
        "state": "alive",
        "doing": Doing.backward.value,
        "step": 4,
        "micro_step": 0,
    }
    return Beat(rank=rank, **{**facts, "since": now, "moved": now, "beat": now, "samples": [f"s{rank}"], **changes})


def test_a_heartbeat_says_where_a_rank_is(tmp_path):
    pulse = Pulse()
    pulse.turn_to(Doing.forward, step=3, micro_step=1, samples=("a", "b"))
    write_beat(tmp_path, beat_of(2, pulse))
    found = read_beat(tmp_path, 2)
    assert (found.doing, found.step, found.micro_step, found.samples) == ("in the forward pass", 3, 1, ["a", "b"])
    assert (found.host, found.pid, found.started) == (socket.gethostname(), os.getpid(), started_at(os.getpid()))
    assert read_beat(tmp_path, 1) is None


def test_one_that_no_longer_beats_is_named_before_those_who_wait_for_it(tmp_path):
    old = time.time() - 100
    note = verdict([beat(0), beat(1, beat=old, moved=old), beat(2)], 100, tmp_path)
    assert note.code == STUCK and [found.rank for found in note.frozen] == [1]
    assert "rank 1 on a (pid 1) does not answer any more" in note.message and "rank 0" not in note.message
    assert "samples s1" in note.message and "step 5, micro-batch 1" in note.message


def test_the_least_far_is_named_when_all_beat(tmp_path):
    note = verdict([beat(0), beat(1, doing=Doing.data.value), beat(2)], 100, tmp_path)
    assert "rank 1 on a (pid 1) does not get on, waiting for data of step 5" in note.message and not note.frozen
    note = verdict([beat(0), beat(1), beat(2, step=3, doing=Doing.optimizer.value)], 100, tmp_path)
    assert "rank 2" in note.message


def test_ranks_at_the_same_place_accuse_nobody(tmp_path):
    assert "all ranks are at the same place and wait for each other" in verdict([beat(0), beat(1)], 9, tmp_path).message


def test_only_the_first_to_notice_speaks(tmp_path):
    first, second = Note(STUCK, "one", [beat(1)]), Note(1, "two", [])
    assert first.announce(tmp_path) and not second.announce(tmp_path)
    assert Note.read(tmp_path) == first


@pytest.mark.parametrize(
    ("changes", "waited_for"),
    [
        ({"doing": Doing.exporting.value}, True),
        ({"doing": Doing.exporting.value, "moved": time.time() - 1000}, False),  # it exports, and hangs in it
        ({"doing": Doing.saving.value, "beat": time.time() - 1000}, False),
        ({"doing": Doing.backward.value}, False),
        ({"doing": Doing.exporting.value, "state": "failed"}, False),
    ],
)
def test_a_rank_that_saves_or_exports_is_waited_for_while_it_gets_on(changes, waited_for):
    assert _goes_on(beat(**changes), 100) is waited_for


def test_only_the_process_that_wrote_the_heartbeat_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = {"host": socket.gethostname(), "pid": process.pid, "started": started_at(process.pid)}
    for other in ({"host": "elsewhere"}, {"started": own["started"] + 1}, {"started": 0}):
        _kill(beat(**own | other))
    assert process.poll() is None
    _kill(beat(**own))
    assert process.wait(10) == -signal.SIGKILL


def watched(tmp_path, pulse, world=1, limit=0.4):
    class Told(Watch):
        notes = []

        def leave(self, note):
            self.notes.append(note)
            self._ended.set()

    watch = Told(pulse, tmp_path, 0, world, seconds=0.1, limit=limit)
    watch.notes = []
    return watch


def test_a_main_thread_that_gets_on_is_left_alone_and_one_that_does_not_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    pulse = Pulse()
    pulse.turn_to(Doing.forward)
    watch = watched(tmp_path, pulse)
    watch.start()
    for _ in range(10):
        time.sleep(0.1)
        pulse.tick()
    assert not watch.notes
    watch.join(5)
    assert [note.code for note in watch.notes] == [STUCK]
    watch.end()


def test_nothing_is_expected_of_a_start(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    watch = watched(tmp_path, Pulse())
    watch.start()
    time.sleep(1.0)
    watch.end()
    assert not watch.notes
    assert read_beat(tmp_path, 0).state == "left"


def test_a_neighbour_that_left_is_no_frozen_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    pulse = Pulse()
    write_beat(tmp_path, replace(beat(1), state="left"))
    watch = watched(tmp_path, pulse, world=2)
    watch.start()
    time.sleep(1.0)
    watch.end()
    assert not watch.notes
    write_beat(tmp_path, beat(1))
    watch = watched(tmp_path, pulse, world=2)
    watch.start()
    watch.join(5)
    assert "rank 1" in watch.notes[0].message
    watch.end()
