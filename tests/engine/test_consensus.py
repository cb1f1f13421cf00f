"""Flags that ranks exchange once per step, on one rank and on two, and ranks that were started with different settings."""

import json
import socket
import sys
from dataclasses import asdict

import pytest
import torch
import torch.multiprocessing as mp
from waiting import PATIENCE

from lit_vlm.config.choices import StrategyName
from lit_vlm.config.schema import RunConfig
from lit_vlm.distributed.collectives import SharedFlags, StepFlag, get_shared_flags
from lit_vlm.distributed.trainer import make_strategy
from lit_vlm.fault_tolerance.rank_check import collect_rank_settings, require_equal_facts
from lit_vlm.runs.run_folder import to_plain
from lit_vlm.types import UserError


class SingleRankTrainer:
    """The part of a trainer that is needed on one rank."""

    world_size = 1


class TwoRankTrainer:
    world_size = 2

    class strategy:
        root_device = torch.device("cpu")


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_on_two_ranks(work, folder, *arguments):
    """Run `work(rank, *arguments)` in two gloo processes; return both results."""
    context = mp.get_context("fork")
    port = find_free_port()
    processes = [context.Process(target=_run_rank, args=(work, rank, port, folder, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _run_rank(work, rank, port, folder, *arguments):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(work(rank, *arguments)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()


def test_an_added_flag_is_visible_from_one_sync_to_the_next():
    flags = SharedFlags()
    flags.add(StepFlag.save)
    flags.add(StepFlag.save)
    flags.add(StepFlag.grad_square_sum, 2.5)
    assert flags.get(StepFlag.save) == 0
    flags.sync(SingleRankTrainer())
    assert (
        flags.get(StepFlag.save),
        flags.get(StepFlag.grad_square_sum),
        flags.get(StepFlag.save_and_stop),
    ) == (2, 2.5, 0)
    flags.sync(SingleRankTrainer())
    assert flags.get(StepFlag.save) == 0


def test_a_flag_that_a_signal_handler_adds_during_a_sync_is_visible_after_the_next():
    flags = SharedFlags()

    class Interrupting(list):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            self.append((StepFlag.save_and_stop, 1.0))  # the signal comes right after the list was read
            return found

    flags._pending = Interrupting([(StepFlag.save, 1.0)])
    flags.sync(SingleRankTrainer())
    assert (flags.get(StepFlag.save), flags.get(StepFlag.save_and_stop)) == (1, 0)
    flags._pending = list(flags._pending)
    flags.sync(SingleRankTrainer())
    assert (flags.get(StepFlag.save), flags.get(StepFlag.save_and_stop)) == (0, 1)


def test_each_trainer_has_its_own_flags():
    one, other = SingleRankTrainer(), SingleRankTrainer()
    assert get_shared_flags(one) is get_shared_flags(one) is not get_shared_flags(other)


def _sync_flags(rank):
    flags, found = SharedFlags(), []
    flags.add(StepFlag.nonfinite_losses, rank)
    flags.add(StepFlag.grad_square_sum, float("nan") if rank else 1.0)
    for _ in range(2):
        flags.sync(TwoRankTrainer())
        found.append([flags.get(flag) for flag in (StepFlag.nonfinite_losses, StepFlag.grad_square_sum, StepFlag.save)])
        if not rank:
            flags.add(StepFlag.save)
    return found


def test_ranks_see_the_sum_and_one_nan_makes_it_nan(tmp_path):
    found = run_on_two_ranks(_sync_flags, tmp_path)
    assert str(found[0]) == str(found[1]) == "[[1.0, nan, 0.0], [0.0, 0.0, 1.0]]"


def _compare_facts(rank, differs):
    same = {"settings": {"seed": 0, "stage.learning_rate": 1e-3}, "code": "a", "data": "b", "plan": [1, 2]}
    facts = same | ({key: value for key, value in differs.items()} if rank else {})
    try:
        require_equal_facts(facts, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("differs", "named"),
    [
        ({}, None),
        ({"code": "x"}, "rank 1 on {host} in its code."),
        ({"data": "x", "plan": [1, 3]}, "rank 1 on {host} in its data and plan."),
        (
            {"settings": {"seed": 1, "stage.learning_rate": 1e-3}, "plan": [1, 3]},
            "rank 1 on {host} in its settings: seed (1 and not 0).",
        ),
    ],
    ids=["nothing", "code", "data", "settings"],
)
def test_ranks_with_different_settings_are_named_by_rank_0(tmp_path, differs, named):
    first, second = run_on_two_ranks(_compare_facts, tmp_path, differs)
    if named is None:
        assert first is second is None
        return
    assert first.startswith(f"The ranks were not started alike. Other than rank 0 on {socket.gethostname()}: ")
    assert named.format(host=socket.gethostname()) in first
    assert second == ""


def _compare_strategies(rank):
    """Compare the settings of ranks that chose different strategies, as with unequal devices."""
    config = RunConfig()
    config.trainer.devices = 2
    strategy = make_strategy(config.trainer, StrategyName.fsdp2 if rank else StrategyName.ddp)
    try:
        require_equal_facts(
            {"settings": collect_rank_settings(to_plain(asdict(config)), strategy)}, torch.device("cpu")
        )
    except UserError as error:
        return str(error)
    return None


def test_ranks_for_which_auto_chose_different_strategies_are_reported_with_both(tmp_path):
    first, _ = run_on_two_ranks(_compare_strategies, tmp_path)
    assert "its settings: trainer.strategy (auto, here fsdp2 and not auto, here ddp)" in first
