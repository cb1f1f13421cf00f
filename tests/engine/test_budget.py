"""Half a micro-batch budget: how far down, for how long, and the same samples in each step."""

import subprocess
import sys

import pytest
from support import builtin

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.engine.budget import MicroBatchBudget, halve_budget
from lit_vlm.files import get_temporary_path, write_text_atomically
from lit_vlm.types import UserError


@pytest.fixture
def module(processor: Processor) -> DataModule:
    return module_of(processor)


def module_of(processor, tokens=400):
    caps = {"tokens_per_micro_batch": tokens, "tiles_per_micro_batch": 8}
    return DataModule(processor, builtin("caption", "text", n=12), 0.1, global_batch_size=6, max_steps=4, **caps)


def test_half_the_budget_is_dealt_at_the_next_start_with_the_same_samples_in_each_step(module, processor, tmp_path):
    before = module.make_plan()
    halve_budget(tmp_path, module, 3)
    again = module_of(processor)
    MicroBatchBudget.read(tmp_path, again).apply(again)
    after = again.make_plan()
    assert (after.max_tokens, after.max_tiles) == (200, 4)
    assert after.accumulate_grad_batches > before.accumulate_grad_batches
    for step in range(before.num_steps):
        assert sorted(before.get_samples(step)) == sorted(after.get_samples(step))
        assert before.get_step(step).num_supervised == after.get_step(step).num_supervised
        packs = after.get_step(step).packs
        assert all(after.index.tokens[list(pack)].sum() <= 200 for pack in packs)


def test_no_sample_is_dropped_and_below_the_largest_there_is_nothing(module, processor, tmp_path):
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


def test_it_is_halved_as_often_as_is_allowed(module, tmp_path):
    halve_budget(tmp_path, module, 1).apply(module)
    with pytest.raises(UserError, match=r"halved 1 times \(guard.max_oom_retries\)"):
        halve_budget(tmp_path, module, 1)


@pytest.mark.parametrize(
    "found", [None, "{", '{"tokens": 1}', '{"tokens": 1, "tiles": 1, "of_tokens": 7, "of_tiles": 8, "halved": 2}']
)
def test_settings_that_were_changed_count_and_a_file_that_is_none_does_not(module, tmp_path, found):
    if found is not None:
        (tmp_path / "budget.json").write_text(found)
    assert MicroBatchBudget.read(tmp_path, module) == MicroBatchBudget(400, 8, 400, 8, 0)


def test_ranks_that_run_out_together_halve_it_once(processor, tmp_path):
    written = {halve_budget(tmp_path, module_of(processor), 1) for _ in range(5)}
    assert written == {MicroBatchBudget(200, 4, 400, 8, 1)}


def test_a_start_that_read_the_half_halves_it_again_though_its_largest_sample_is_larger(module, tmp_path):
    """What is entered in the file may be below a sample that has come back; the end of halving comes all the same."""
    lowest = module.get_min_micro_batch_limits()
    MicroBatchBudget(1, 1, 400, 8, 1).write(tmp_path)
    MicroBatchBudget.read(tmp_path, module).apply(module)
    assert module.micro_batch_limits == lowest
    with pytest.raises(UserError, match="the largest sample alone"):
        halve_budget(tmp_path, module, 9)


def test_a_draft_is_removed_only_where_its_process_is_gone(tmp_path):
    path = tmp_path / "budget.json"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = get_temporary_path(path).name
    host = own.rpartition(".")[0]
    theirs, elsewhere = tmp_path / f"{host}.{process.pid}-1", tmp_path / f"{host}.domain.{2**22 + 1}-1"
    for draft in (theirs, elsewhere):
        draft.write_text("{}")
    write_text_atomically(path, "1")
    assert theirs.exists() and elsewhere.exists() and path.read_text() == "1"
    process.communicate(b"\n")
    write_text_atomically(path, "2")
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, path])
