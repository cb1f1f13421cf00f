"""Tests of the step timer: the parts of a step add up, and the slowest rank is found."""

import time
from types import SimpleNamespace

import pytest
import torch
from test_callbacks import fit

from callbacks import Guard, Throughput
from callbacks.step_time import STEP_PARTS, StepTimer, StragglerMonitor, measure_memory_parts
from lit_vlm.stages import SFTStage

CPU = torch.device("cpu")


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.05)
        return gradient


def make_times(data=1.0, forward=2.0, backward=4.0, communication=1.0, optimizer=2.0):
    return dict(zip(STEP_PARTS, (data, forward, backward, communication, optimizer), strict=True))


def make_monitor():
    messages = []
    return StragglerMonitor(messages.append, lambda number: f"host-{number}"), messages


def test_time_is_counted_for_the_part_that_was_running():
    parts = StepTimer(CPU)
    parts.mark("data")
    time.sleep(0.02)
    parts.mark("forward")
    parts.pause()
    time.sleep(0.5)
    parts.mark("data")
    found = parts.collect()
    assert 0.02 <= found["forward"] < 0.5 and sum(found.values()) == found["forward"]
    assert sum(parts.collect().values()) == 0


def test_waiting_for_other_ranks_is_not_backward():
    """Autograd calls the callback of DDP after that of the timer. The time in it is communication."""
    parts, weight = StepTimer(CPU), torch.ones(3, requires_grad=True)

    def queue_communication(gradient):
        torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.5))

    weight.register_hook(queue_communication)
    loss = SlowBackward.apply(weight).sum()
    parts.mark("forward")
    parts.mark_after_backward(loss, "backward")
    loss.backward()
    parts.mark("communication")
    found = parts.collect()
    assert 0.05 <= found["backward"] < 0.5 <= found["communication"]


def test_the_parts_add_up_to_the_time_of_a_step_and_are_logged(blueprint):
    throughput = Throughput()
    trainer, _, _ = fit(blueprint, [Guard(), throughput])
    logged = {name.removeprefix("throughput/"): float(value) for name, value in trainer.callback_metrics.items()}
    parts = [logged[f"time_{part}"] for part in STEP_PARTS]
    assert all(value >= 0 for value in parts)
    samples = trainer.datamodule.plan.get_step(0).num_samples
    assert sum(parts) == pytest.approx(samples / logged["samples_per_second"], rel=0.3)
    assert logged["time_forward"] > 0 and logged["time_backward"] > 0 and logged["time_optimizer"] > 0


def test_the_slowest_rank_is_reported_once_when_it_stays_the_slowest():
    monitor, messages = make_monitor()
    slow = [make_times(), make_times(), make_times(backward=6.0), make_times()]
    for _ in range(2):
        found = monitor.update(slow)
    assert found == {"slowest_rank": 2.0, "slowest_excess": pytest.approx(2 / 7)} and not messages
    # Another rank: the count starts again
    monitor.update([make_times(backward=6.0), make_times(), make_times(), make_times()])
    for _ in range(10):
        monitor.update(slow)
    assert messages == [
        "Rank 2 on host-2 takes 29% longer than the median rank, most of it in backward; all others wait for it."
    ]


def test_ranks_of_about_equal_speed_and_a_single_rank_are_not_reported():
    monitor, messages = make_monitor()
    for _ in range(10):
        monitor.update([make_times(), make_times(backward=4.9)])
    alone, other_messages = make_monitor()
    assert alone.update([make_times(data=0.5)] * 1) == {}
    assert not messages and not other_messages


def test_waiting_for_data_is_reported_once_and_not_for_the_first_steps():
    monitor, messages = make_monitor()
    monitor.update([make_times(data=9.0)])
    assert not messages
    for _ in range(5):
        monitor.update([make_times(data=3.0)])
    assert messages == ["36% of the time is spent waiting for data: raise data.num_workers."]


def test_memory_is_measured_by_part(blueprint):
    found = {}

    class MemoryRecorder(Guard):
        def on_after_exchange(self, trainer, pl_module, optimizer):
            found[trainer.global_step] = measure_memory_parts(trainer, pl_module)

    stage = fit(blueprint, [MemoryRecorder()], stage_class=SFTStage, trainable=["projector"])[1]
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad) * 4
    everything = sum(p.numel() for p in stage.model.parameters()) * 4
    assert found[0]["gradients"] == found[1]["gradients"] == trained
    assert found[0]["optimizer"] == 0 and trained * 2 <= found[1]["optimizer"] < trained * 2 + 1000
    assert everything <= found[1]["weights"] < 1.2 * everything  # and buffers


def test_a_line_is_printed_without_a_progress_bar(capsys):
    throughput = Throughput()
    trainer = SimpleNamespace(
        progress_bar_callback=None, is_global_zero=True, callback_metrics={"train/loss": torch.tensor(2.5)}
    )
    trainer.global_step, trainer.max_steps = 40, 1000
    rates = {"tokens_per_second": 1234.0} | {f"time_{part}": value for part, value in make_times().items()}
    throughput._last_print_time = float("-inf")
    throughput._print_line(trainer, rates)
    throughput._print_line(trainer, rates)  # too soon
    assert capsys.readouterr().out == (
        "step 40/1,000  loss 2.5000  1,234 tokens/s  10.00 s: data 10%, forward 20%, backward 40%, communication 10%, "
        "optimizer 20%\n"
    )
