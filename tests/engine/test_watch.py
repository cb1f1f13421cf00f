"""Heartbeats, and the diagnosis that is made from them when a run is stuck."""

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
from lit_vlm.fault_tolerance import watchdog_thread
from lit_vlm.fault_tolerance.exit_status import STUCK
from lit_vlm.fault_tolerance.watchdog import (
    Activity,
    Progress,
    RankHeartbeat,
    make_heartbeat,
    read_heartbeat,
    read_start_time,
    write_heartbeat,
)
from lit_vlm.fault_tolerance.watchdog_thread import (
    ExitNotice,
    Watchdog,
    _is_busy_alone,
    _kill_process,
    make_stuck_notice,
)
from lit_vlm.types import UserError


def make_rank_heartbeat(rank=0, **changes) -> RankHeartbeat:
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


def test_a_heartbeat_records_where_a_rank_is(tmp_path):
    progress = Progress()
    progress.set_activity(Activity.forward, step=3, micro_step=1, samples=("a", "b"))
    write_heartbeat(tmp_path, make_heartbeat(2, progress))
    found = read_heartbeat(tmp_path, 2)
    assert (found.doing, found.step, found.micro_step, found.samples) == ("in the forward pass", 3, 1, ["a", "b"])
    assert (found.host, found.pid, found.started) == (socket.gethostname(), os.getpid(), read_start_time(os.getpid()))
    assert read_heartbeat(tmp_path, 1) is None


def test_a_rank_without_heartbeats_is_named_before_the_ranks_that_wait_for_it(tmp_path):
    old = time.time() - 100
    notice = make_stuck_notice(
        [make_rank_heartbeat(0), make_rank_heartbeat(1, beat=old, moved=old), make_rank_heartbeat(2)], 100, tmp_path
    )
    assert notice.code == STUCK and [found.rank for found in notice.frozen] == [1]
    assert "rank 1 on a (pid 1) does not answer any more" in notice.message and "rank 0" not in notice.message
    assert "samples s1" in notice.message and "step 5, micro-batch 1" in notice.message


def test_the_least_advanced_rank_is_named_if_all_have_heartbeats(tmp_path):
    notice = make_stuck_notice(
        [make_rank_heartbeat(0), make_rank_heartbeat(1, doing=Activity.data.value), make_rank_heartbeat(2)],
        100,
        tmp_path,
    )
    assert "rank 1 on a (pid 1) does not get on, waiting for data of step 5" in notice.message and not notice.frozen
    notice = make_stuck_notice(
        [
            make_rank_heartbeat(0),
            make_rank_heartbeat(1),
            make_rank_heartbeat(2, step=3, doing=Activity.optimizer.value),
        ],
        100,
        tmp_path,
    )
    assert "rank 2" in notice.message


def test_ranks_at_the_same_place_are_not_blamed(tmp_path):
    assert (
        "all ranks are at the same place and wait for each other"
        in make_stuck_notice([make_rank_heartbeat(0), make_rank_heartbeat(1)], 9, tmp_path).message
    )


def test_only_the_first_exit_notice_is_written(tmp_path):
    first, second = ExitNotice(STUCK, "one", [make_rank_heartbeat(1)]), ExitNotice(1, "two", [])
    assert first.create_file(tmp_path) and not second.create_file(tmp_path)
    assert ExitNotice.read(tmp_path) == first


@pytest.mark.parametrize(
    ("changes", "waited_for"),
    [
        ({"doing": Activity.exporting.value}, True),
        ({"doing": Activity.exporting.value, "moved": time.time() - 1000}, False),  # it exports, and the export hangs
        ({"doing": Activity.saving.value, "beat": time.time() - 1000}, False),
        ({"doing": Activity.backward.value}, False),
        ({"doing": Activity.exporting.value, "state": "failed"}, False),
    ],
)
def test_a_rank_that_saves_or_exports_is_waited_for_while_it_makes_progress(changes, waited_for):
    assert _is_busy_alone(make_rank_heartbeat(**changes), 100) is waited_for


def test_only_the_process_that_wrote_the_heartbeat_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = {"host": socket.gethostname(), "pid": process.pid, "started": read_start_time(process.pid)}
    for other in ({"host": "elsewhere"}, {"started": own["started"] + 1}, {"started": 0}):
        _kill_process(make_rank_heartbeat(**own | other))
    assert process.poll() is None
    _kill_process(make_rank_heartbeat(**own))
    assert process.wait(PATIENCE) == -signal.SIGKILL


def make_watchdog(tmp_path, progress, world=1, limit=1.0, **options):
    class RecordingWatchdog(Watchdog):
        notices = []

        def exit_process(self, notice):
            self.notices.append(notice)
            self._stopped.set()

    watchdog = RecordingWatchdog(progress, tmp_path, 0, world, heartbeat_seconds=0.1, timeout_seconds=limit, **options)
    watchdog.notices = []
    return watchdog


def test_a_main_thread_that_makes_progress_is_left_alone_and_a_stuck_one_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    progress = Progress()
    progress.set_activity(Activity.forward)
    watchdog = make_watchdog(tmp_path, progress)
    watchdog.start()
    for _ in range(40):  # twice the limit
        time.sleep(0.05)
        progress.mark_progress()
    assert not watchdog.notices
    watchdog.join(PATIENCE)
    assert [notice.code for notice in watchdog.notices] == [STUCK]
    watchdog.stop()


def test_the_watchdog_has_no_timeout_before_training_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    watchdog = make_watchdog(tmp_path, Progress())
    watchdog.start()
    time.sleep(2.0)
    watchdog.stop()
    assert not watchdog.notices
    assert read_heartbeat(tmp_path, 0).state == "left"


def test_a_rank_that_exited_is_not_taken_for_a_frozen_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    progress = Progress()
    write_heartbeat(tmp_path, replace(make_rank_heartbeat(1), state="left"))
    watchdog = make_watchdog(tmp_path, progress, world=2)
    watchdog.start()
    time.sleep(2.0)
    watchdog.stop()
    assert not watchdog.notices
    write_heartbeat(tmp_path, make_rank_heartbeat(1))
    watchdog = make_watchdog(tmp_path, progress, world=2)
    watchdog.start()
    watchdog.join(PATIENCE)
    assert "rank 1" in watchdog.notices[0].message
    watchdog.stop()


def test_a_file_system_error_and_a_half_written_notice_end_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    read = Path.read_text

    def raise_stale(self, *options, **more):
        if self.name == "leave.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, *options, **more)

    progress = Progress()
    watchdog = make_watchdog(tmp_path, progress)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", raise_stale)
        watchdog.start()
        until(lambda: "Stale file handle" in capsys.readouterr().err)
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck" / "leave.json").touch()
    time.sleep(0.3)
    assert watchdog.is_alive() and not watchdog.notices
    (tmp_path / "stuck" / "leave.json").unlink()
    ExitNotice(STUCK, "whole", []).create_file(tmp_path)
    watchdog.join(PATIENCE)
    assert [notice.message for notice in watchdog.notices] == ["whole"]
    watchdog.stop()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_exit_notices_exactly_one_is_first_and_it_is_complete(tmp_path, monkeypatch, links):
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


def test_a_notice_is_never_read_half_written(tmp_path):
    notice, file = (
        ExitNotice(STUCK, "", [make_rank_heartbeat(rank) for rank in range(5000)]),
        tmp_path / "stuck" / "leave.json",
    )
    writer = Thread(target=notice.create_file, args=(tmp_path,))
    writer.start()
    while writer.is_alive() and not file.exists():
        pass
    first = ExitNotice.read(tmp_path)
    writer.join()
    assert first == notice


def test_a_rank_that_ends_with_an_exception_is_not_interrupted_unless_others_are_stuck(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr(watchdog_thread, "GRACE_SECONDS", 0.1)
    ExitNotice(1, "another rank failed", []).create_file(tmp_path)
    for failing, limit, left in ((True, 60.0, False), (True, 0.5, True), (False, 60.0, True)):
        watchdog = make_watchdog(tmp_path, Progress(), limit=limit, failing=lambda failing=failing: failing)
        watchdog.start()
        watchdog.join(PATIENCE if left else 1.5)
        assert bool(watchdog.notices) is left
        watchdog.stop()
    (tmp_path / "stuck" / "leave.json").unlink()
    ExitNotice(STUCK, "stuck", []).create_file(tmp_path)
    watchdog = make_watchdog(tmp_path, Progress(), limit=60.0, failing=lambda: True)
    watchdog.start()
    watchdog.join(PATIENCE)
    assert [notice.code for notice in watchdog.notices] == [STUCK]
    watchdog.stop()


def test_of_ranks_with_the_same_error_only_the_one_with_a_message_is_announced(tmp_path):
    trainer = SimpleNamespace(world_size=2, global_rank=1)
    for error, announced in ((UserError(""), False), (UserError("no room"), True)):
        heartbeat = Heartbeat(tmp_path)
        heartbeat._watchdog = Watchdog(Progress(), tmp_path, 1, 2, heartbeat_seconds=1, timeout_seconds=4)
        heartbeat._watchdog.start()
        heartbeat.on_exception(trainer, None, error)
        assert (ExitNotice.read(tmp_path) is not None) is announced
