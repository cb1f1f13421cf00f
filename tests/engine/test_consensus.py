"""What ranks tell each other once per step, on one rank and on two; and ranks that were not started alike."""

import json
import socket
import sys

import pytest
import torch
import torch.multiprocessing as mp
from waiting import PATIENCE

from lit_vlm.config.schema import RunConfig, StrategyName
from lit_vlm.engine.agreement import collect_rank_settings, require_equal_facts
from lit_vlm.engine.consensus import SharedFlags, StepFlag, get_shared_flags
from lit_vlm.engine.strategy import make_strategy
from lit_vlm.types import UserError


class Alone:
    """As much of a trainer as is needed on one rank."""

    world_size = 1


class Two:
    world_size = 2

    class strategy:
        root_device = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_two_ranks(work, folder, *arguments):
    """`work(rank, *arguments)` in two gloo processes; what each returns."""
    context = mp.get_context("fork")
    port = free_port()
    processes = [context.Process(target=_rank, args=(work, rank, port, folder, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _rank(work, rank, port, folder, *arguments):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(work(rank, *arguments)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()


def test_what_is_told_is_heard_until_the_next_exchange():
    consensus = SharedFlags()
    consensus.add(StepFlag.save)
    consensus.add(StepFlag.save)
    consensus.add(StepFlag.grad_square_sum, 2.5)
    assert consensus.get(StepFlag.save) == 0
    consensus.sync(Alone())
    assert (
        consensus.get(StepFlag.save),
        consensus.get(StepFlag.grad_square_sum),
        consensus.get(StepFlag.save_and_stop),
    ) == (2, 2.5, 0)
    consensus.sync(Alone())
    assert consensus.get(StepFlag.save) == 0


def test_what_a_signal_handler_tells_during_an_exchange_is_heard_in_the_next():
    consensus = SharedFlags()

    class Interrupting(list):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            self.append((StepFlag.save_and_stop, 1.0))  # the signal comes right after the list was read
            return found

    consensus._pending = Interrupting([(StepFlag.save, 1.0)])
    consensus.sync(Alone())
    assert (consensus.get(StepFlag.save), consensus.get(StepFlag.save_and_stop)) == (1, 0)
    consensus._pending = list(consensus._pending)
    consensus.sync(Alone())
    assert (consensus.get(StepFlag.save), consensus.get(StepFlag.save_and_stop)) == (0, 1)


def test_each_trainer_has_its_own():
    one, other = Alone(), Alone()
    assert get_shared_flags(one) is get_shared_flags(one) is not get_shared_flags(other)


def _tell(rank):
    consensus, found = SharedFlags(), []
    consensus.add(StepFlag.nonfinite_losses, rank)
    consensus.add(StepFlag.grad_square_sum, float("nan") if rank else 1.0)
    for _ in range(2):
        consensus.sync(Two())
        found.append(
            [consensus.get(word) for word in (StepFlag.nonfinite_losses, StepFlag.grad_square_sum, StepFlag.save)]
        )
        if not rank:
            consensus.add(StepFlag.save)
    return found


def test_ranks_hear_the_sum_and_one_that_is_no_number_makes_none(tmp_path):
    found = on_two_ranks(_tell, tmp_path)
    assert str(found[0]) == str(found[1]) == "[[1.0, nan, 0.0], [0.0, 0.0, 1.0]]"


def _agree(rank, differs):
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
def test_ranks_that_were_not_started_alike_are_named_by_the_first(tmp_path, differs, named):
    first, second = on_two_ranks(_agree, tmp_path, differs)
    if named is None:
        assert first is second is None
        return
    assert first.startswith(f"The ranks were not started alike. Other than rank 0 on {socket.gethostname()}: ")
    assert named.format(host=socket.gethostname()) in first
    assert second == ""


def _choose(rank):
    """Unequal devices: the ranks come to different strategies."""
    config = RunConfig()
    config.trainer.devices = 2
    strategy = make_strategy(config.trainer, StrategyName.fsdp2 if rank else StrategyName.ddp)
    try:
        require_equal_facts({"settings": collect_rank_settings(config, strategy)}, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return None


def test_ranks_for_which_auto_chose_unlike_strategies_are_told_both(tmp_path):
    first, _ = on_two_ranks(_choose, tmp_path)
    assert "its settings: trainer.strategy (auto, here fsdp2 and not auto, here ddp)" in first
