"""Tests of the guard in a plain Lightning trainer, without a run folder."""

import pytest
import torch
from test_callbacks import fit

from callbacks import Exchange, Guard, make_callbacks
from lit_vlm.distributed.collectives import StepFlag, get_shared_flags
from lit_vlm.stages import SFTStage
from lit_vlm.types import UserError


def make_broken_stage(*steps):
    class Broken(SFTStage):
        def compute_loss(self, batch):
            return super().compute_loss(batch) * (float("nan") if batch.step in steps else 1.0)

    return Broken


def test_a_skipped_first_step_does_not_update_the_optimizer_and_the_gradient_check_waits(blueprint):
    guard = Guard(on_nonfinite="skip")
    trainer, stage, _ = fit(blueprint, [guard], stage_class=make_broken_stage(0))
    assert guard.figures() == {"skipped_steps": 1}
    counts = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert counts == {trainer.global_step - 1} == {3}
    assert stage._gradients_checked


def test_more_consecutive_skips_than_allowed_stop_the_run(blueprint):
    with pytest.raises(
        UserError, match=r"Step 4: the loss is not a number, the last of 3 in a row \(guard.max_skipped=2\)"
    ):
        fit(blueprint, [Guard(on_nonfinite="skip", max_skipped=2)], stage_class=make_broken_stage(1, 2, 3))


def test_skipped_steps_that_are_not_consecutive_do_not_stop_the_run(blueprint):
    guard = Guard(on_nonfinite="skip", max_skipped=1)
    fit(blueprint, [guard], stage_class=make_broken_stage(0, 2))
    assert guard.figures() == {"skipped_steps": 2}


def test_the_ranks_exchange_the_square_of_the_gradients_norm(blueprint):
    norms = []

    class NormRecorder(Guard):
        def on_after_exchange(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            norms.append((get_shared_flags(trainer).get(StepFlag.grad_square_sum) ** 0.5, norm))

    fit(blueprint, [NormRecorder()])
    assert len(norms) == 4 and all(exchanged == pytest.approx(norm, rel=1e-5) and norm > 0 for exchanged, norm in norms)


def test_ranks_exchange_without_a_guard_and_once_with_one(tmp_path):
    without, guarded = make_callbacks(["throughput"], tmp_path), make_callbacks(["throughput", "guard"], tmp_path)
    assert [type(callback) for callback in without if isinstance(callback, Exchange)] == [Exchange]
    assert [type(callback) for callback in guarded if isinstance(callback, Exchange)] == [Guard]
