"""Halving the micro-batch budget: its lower limit, its duration, and the same samples in each step."""

import subprocess
import sys

import pytest
from support import builtin

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.fault_tolerance.oom import MicroBatchBudget, halve_budget
from lit_vlm.files import get_temporary_path, write_text_atomically
from lit_vlm.types import UserError


@pytest.fixture
def module(processor: Processor) -> DataModule:
    return make_module(processor)


def make_module(processor, tokens=400):
    limits = {"tokens_per_micro_batch": tokens, "tiles_per_micro_batch": 8}
    return DataModule(processor, builtin("caption", "text", n=12), 0.1, global_batch_size=6, max_steps=4, **limits)


def test_the_next_start_packs_the_same_samples_of_each_step_with_half_the_budget(module, processor, tmp_path):
    before = module.make_plan()
    halve_budget(tmp_path, module, 3)
    again = make_module(processor)
    MicroBatchBudget.read(tmp_path, again).apply(again)
    after = again.make_plan()
    assert (after.max_tokens, after.max_tiles) == (200, 4)
    assert after.accumulate_grad_batches > before.accumulate_grad_batches
    for step in range(before.num_steps):
        assert sorted(before.get_samples(step)) == sorted(after.get_samples(step))
        assert before.get_step(step).num_supervised == after.get_step(step).num_supervised
        packs = after.get_step(step).packs
        assert all(after.index.tokens[list(pack)].sum() <= 200 for pack in packs)


def test_no_sample_is_dropped_and_the_budget_stays_above_the_largest_sample(module, processor, tmp_path):
    module.build_indexes()
    number, largest = len(module.index), (int(module.index.tokens.max()), int(module.index.tiles.max()))
    budgets = []
    with pytest.raises(
        UserError, match=f"at most {largest[0]} tokens and {largest[1]} tiles, and the largest sample alone"
    ):
        for _ in range(20):
            half = halve_budget(tmp_path, module, 99)
            half.apply(module)
            budgets.append(module.micro_batch_limits)
    assert budgets[-1] == largest == module.get_min_micro_batch_limits()
    assert len(module.index) == number and len(module.make_plan().index) == number


def test_the_budget_is_halved_as_often_as_the_settings_allow(module, tmp_path):
    halve_budget(tmp_path, module, 1).apply(module)
    with pytest.raises(UserError, match=r"halved 1 times \(guard.max_oom_retries\)"):
        halve_budget(tmp_path, module, 1)


@pytest.mark.parametrize(
    "found", [None, "{", '{"tokens": 1}', '{"tokens": 1, "tiles": 1, "of_tokens": 7, "of_tiles": 8, "halved": 2}']
)
def test_changed_settings_win_and_an_invalid_file_is_ignored(module, tmp_path, found):
    if found is not None:
        (tmp_path / "budget.json").write_text(found)
    assert MicroBatchBudget.read(tmp_path, module) == MicroBatchBudget(400, 8, 400, 8, 0)


def test_ranks_that_run_out_of_memory_together_halve_the_budget_once(processor, tmp_path):
    written = {halve_budget(tmp_path, make_module(processor), 1) for _ in range(5)}
    assert written == {MicroBatchBudget(200, 4, 400, 8, 1)}


def test_a_start_with_half_the_budget_halves_it_again_even_if_its_largest_sample_is_larger(module, tmp_path):
    """The budget in the file may be below a sample that was added again; halving still ends."""
    lowest = module.get_min_micro_batch_limits()
    MicroBatchBudget(1, 1, 400, 8, 1).write(tmp_path)
    MicroBatchBudget.read(tmp_path, module).apply(module)
    assert module.micro_batch_limits == lowest
    with pytest.raises(UserError, match="the largest sample alone"):
        halve_budget(tmp_path, module, 9)


def test_a_temporary_file_is_removed_only_if_its_process_has_ended(tmp_path):
    path = tmp_path / "budget.json"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = get_temporary_path(path).name
    host = own.rpartition(".")[0]
    theirs, elsewhere = tmp_path / f"{host}.{process.pid}-1", tmp_path / f"{host}.domain.{2**22 + 1}-1"
    for temporary in (theirs, elsewhere):
        temporary.write_text("{}")
    write_text_atomically(path, "1")
    assert theirs.exists() and elsewhere.exists() and path.read_text() == "1"
    process.communicate(b"\n")
    write_text_atomically(path, "2")
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, path])
