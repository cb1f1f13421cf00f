"""Tests of a stuck rank: all ranks end within the time limit plus ten seconds, and the stuck rank is reported."""

import os
import random
import signal
import time

import pytest
from fault_cases import SMALL, Fault, combine_patches, inject_faults
from resume_cases import build_overrides, start
from run_helpers import TWO
from waiting import until

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.fault_tolerance.exit_status import STUCK, TERMINATED
from lit_vlm.fault_tolerance.watchdog import read_heartbeat

LIMIT = 4.0
QUICK = [f"trainer.timeout_minutes={LIMIT / 60}", "guard.heartbeat_seconds=1", "trainer.max_steps=200", *SMALL]


def stop_rank_at_step(overrides, folder, ranks, rank, step, seconds=0.0, patch=None):
    """Stop this rank at that step. Return the processes, the run folder, the exit codes, and the seconds until all ended."""
    started = start(overrides, folder, ranks, patch)
    run = folder / "runs" / "held"
    try:
        until(lambda: (beat := read_heartbeat(run, rank)) is not None and beat.step >= step)
    except BaseException:
        started.kill()
        raise
    time.sleep(seconds)
    os.kill(started.pids[rank], signal.SIGSTOP)
    stopped = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started.pids]
    return started, run, codes, time.monotonic() - stopped


def check_stopped_rank(folder, ranks, rank, step, seconds=0.0):
    two = [word.replace("devices=2", f"devices={ranks}") for word in TWO]
    overrides = build_overrides(folder, "sft", *two, *QUICK, "run_name=held")
    started, run, codes, seconds_until_end = stop_rank_at_step(overrides, folder, ranks, rank, step, seconds)
    output = started.read_output()
    assert codes[rank] == -signal.SIGKILL  # it cannot exit by itself
    assert [code for other, code in enumerate(codes) if other != rank] == [STUCK] * (ranks - 1), output
    assert seconds_until_end < LIMIT + 10
    assert output.count("Stuck: ") == 1
    assert f"rank {rank} on {os.uname().nodename} (pid {started.pids[rank]}) does not answer any more" in output
    heartbeat = read_heartbeat(run, rank)
    assert f"{heartbeat.doing} of step {heartbeat.step + 1}, micro-batch" in output
    assert all(name in output for name in heartbeat.samples)
    for other in range(ranks):
        file = run / "stuck" / f"rank-{other}.txt"
        if other == rank:
            assert not file.exists()
            continue
        text = file.read_text()
        assert "Current thread" in text and "training_epoch_loop.py" in text
        assert f"rank {other}, host" in text and "-train-0-" in text


def test_a_stopped_rank_ends_all_ranks_in_time_and_is_named(tmp_path):
    check_stopped_rank(tmp_path, 2, 1, 3)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.long if n else pytest.mark.slow) for n in range(10)]
)
def test_any_of_four_ranks_stopped_at_any_step_ends_all_in_time(tmp_path, seed):
    generator = random.Random(seed)
    check_stopped_rank(tmp_path, 4, generator.randrange(4), generator.randrange(1, 4), generator.random())


@pytest.mark.slow
def test_a_rank_that_waits_for_data_forever_is_named_and_writes_its_stack(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *TWO, *QUICK, "run_name=held")
    started = start(overrides, tmp_path, 2, _patch_read_forever)
    start_time = time.monotonic()
    run = tmp_path / "runs" / "held"
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started.pids]
    assert codes == [STUCK, STUCK], started.read_output()
    assert time.monotonic() - start_time < 60
    assert (
        f"rank 1 on {os.uname().nodename} (pid {started.pids[1]}) does not get on, waiting for data"
        in started.read_output()
    )
    assert "in _wait_for_ever" in (run / "stuck" / "rank-1.txt").read_text()


@pytest.mark.slow
def test_other_ranks_wait_for_a_long_export_of_one_rank(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *TWO, *QUICK, "trainer.max_steps=2", "run_name=held")
    started = start(overrides, tmp_path, 2, _patch_long_export)
    assert started.wait() == [0, 0], started.read_output()
    assert not (tmp_path / "runs" / "held" / "stuck").exists()


@pytest.mark.slow
def test_ranks_wait_for_a_slow_disk_although_the_export_takes_longer_than_any_limit(tmp_path):
    overrides = build_overrides(
        tmp_path, "sft", *TWO, *QUICK, "trainer.max_steps=2", "callbacks=[]", "export=true", "run_name=held"
    )
    started = start(overrides, tmp_path, 2, _patch_slow_disk)
    assert started.wait() == [0, 0], started.read_output()
    assert (tmp_path / "runs" / "held" / "hf").is_dir() and not (tmp_path / "runs" / "held" / "stuck").exists()


@pytest.mark.slow
def test_ranks_with_other_code_end_before_the_first_step_with_one_message(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *TWO, *SMALL, "run_name=held")
    started = start(overrides, tmp_path, 2, _patch_code_digest)
    assert started.wait() == [1, 1]
    assert started.read_output().count("The ranks were not started alike") == 1
    assert f"rank 1 on {os.uname().nodename} in its code." in started.read_output()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_its_cause(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *SMALL, "data.num_workers=2", "trainer.max_steps=300", "run_name=held")
    started = start(overrides, tmp_path)
    run = tmp_path / "runs" / "held"
    until(lambda: (beat := read_heartbeat(run, 0)) is not None and beat.step >= 1)
    os.kill(_list_children(started.pids[0])[0], signal.SIGKILL)
    assert started.wait() == [1]
    assert "DataLoader worker" in started.read_output() and "killed by signal" in started.read_output()


@pytest.mark.slow
def test_a_running_save_is_finished_and_one_message_is_printed_when_all_ranks_stop(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *TWO, *SMALL, "checkpoint.every_steps=3", "run_name=held")
    started = start(overrides, tmp_path, 2, combine_patches(inject_faults([Fault("loss", 3, 0, 1)]), _patch_slow_write))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started.pids]
    assert codes == [1, 1] and started.read_output().count("the loss is not a number, so the run stops") == 1, (
        started.read_output()
    )
    assert CheckpointFolder(tmp_path / "runs" / "held" / "checkpoints").list_steps() == [3]


def test_a_rank_with_a_stop_signal_after_the_last_step_does_not_wait_for_others(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *TWO, *SMALL, "trainer.max_steps=1", "run_name=held")
    started = start(overrides, tmp_path, 2, _patch_stop_signal_at_end)
    assert started.wait()[0] == TERMINATED, started.read_output()
    assert started.read_output().count("no step is under way") == 1


def _patch_slow_write():
    """Write longer than the other ranks wait for a silent rank."""
    from lit_vlm.checkpoint import write

    write_shards = write.write_shards

    def write_slowly(draft, rank, pieces):
        if rank == 0:
            time.sleep(9)
        return write_shards(draft, rank, pieces)

    write.write_shards = write_slowly


def _patch_stop_signal_at_end():
    import torch

    from callbacks import Heartbeat

    def signal_and_wait(self, trainer, stage):
        if trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)
        torch.distributed.recv(torch.zeros(1), src=0)

    Heartbeat.on_train_end = signal_and_wait


def _list_children(pid):
    from pathlib import Path

    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for_ever():
    time.sleep(3600)


def _patch_read_forever():
    from lit_vlm.data.micro_batches import TrainMicroBatches

    get = TrainMicroBatches.__getitem__

    def get_or_wait(self, number):
        if number == 5 and self.rank == 1:
            _wait_for_ever()
        return get(self, number)

    TrainMicroBatches.__getitem__ = get_or_wait


def _patch_code_digest():
    from lit_vlm.fault_tolerance import rank_check

    if os.environ["RANK"] == "1":
        rank_check.compute_code_digest = lambda: "another"


def _patch_slow_disk():
    """Write slowly, with a process group timeout as short as the limit of the watchdog."""
    from datetime import timedelta

    from lit_vlm.distributed import trainer as strategy
    from lit_vlm.model.tensor_files import SafetensorsFile

    write = SafetensorsFile.write

    def write_slowly(self, folder, values):
        def iter_slowly():
            for value in values:
                time.sleep(2.5 * LIMIT / len(self.tensors))
                yield value

        write(self, folder, iter_slowly())

    SafetensorsFile.write = write_slowly
    strategy.timedelta = lambda **_: timedelta(seconds=LIMIT)


def _patch_long_export():
    from callbacks import Heartbeat
    from lit_vlm.fault_tolerance.watchdog import Activity, get_progress

    end = Heartbeat.on_train_end

    def end_late(self, trainer, stage):
        end(self, trainer, stage)
        if trainer.is_global_zero:
            with get_progress(trainer).use_activity(Activity.exporting):
                for _ in range(6):  # twice the limit
                    time.sleep(LIMIT / 3)
                    get_progress(trainer).mark_progress()
        trainer.strategy.barrier("exported")

    Heartbeat.on_train_end = end_late
