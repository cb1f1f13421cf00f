"""Checkpoints: one layout for every slicing of the state, whole or not there, and a damaged one is found before it is used."""

import json
import os
import resource
import shutil
import threading
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import DAMAGES, SHAPES, Sliced, all_slices, index_of, save, tensors_in
from safetensors.torch import load_file
from torch import nn
from waiting import PATIENCE

from lit_vlm.engine.checkpoint import (
    CheckpointFolder,
    CheckpointIndex,
    CheckpointWriter,
    CorruptCheckpointError,
    RunFingerprint,
    load_tensors,
    read_index,
)
from lit_vlm.engine.checkpoint import write as writing
from lit_vlm.engine.checkpoint.read import check_files, find_state_mismatches
from lit_vlm.engine.checkpoint.resume import find_resume_checkpoint
from lit_vlm.engine.shards import ReplicatedState, StateKind
from lit_vlm.types import UserError


def model_of(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        place = model
        for word in path:
            if not hasattr(place, word):
                place.add_module(word, nn.Module())
            place = getattr(place, word)
        place.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    return model


def trainer_of() -> SimpleNamespace:
    """All that finding a checkpoint asks of a trainer of one rank."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    module = SimpleNamespace(model=model_of(SHAPES))
    return SimpleNamespace(
        strategy=strategy, lightning_module=module, global_rank=0, world_size=1, is_global_zero=True, datamodule=None
    )


def found_in(path: Path, resume_from: str = "auto", shards=None, belongs=None, said=None):
    say = (said if said is not None else []).append
    return find_resume_checkpoint(
        trainer_of(), shards or Sliced(), CheckpointFolder(path), resume_from, belongs or RunFingerprint(), say
    )


# One layout


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [False, True])
def test_what_any_ranks_wrote_any_other_ranks_read(tmp_path, writers, rows):
    folder = save(tmp_path, 7, all_slices(writers, rows=rows))
    index = read_index(folder)
    check_files(folder, index)
    for readers in (1, 2, 4):
        for other_rows in (False, True):
            for rank in range(readers):
                got = Sliced(rank, readers, seed=99, rows=other_rows)
                load_tensors(folder, index, got.iter_shards())
                assert got.same_as(Sliced(rank, readers, rows=other_rows))


def test_the_files_are_safetensors_that_anybody_can_read(tmp_path):
    folder = save(tmp_path, 7, [Sliced()])
    (file,) = tensors_in(folder)
    tensors = load_file(file)
    for piece in Sliced().iter_shards():
        assert torch.equal(tensors[f"{piece.kind}:{piece.name}:0"], piece.values)
    assert json.loads((folder / "index.json").read_text())["files"][0]["size"] == file.stat().st_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept_bit_for_bit(tmp_path, dtype):
    shards = Sliced()
    values = torch.randn(50).to(dtype)
    shards.held = [SimpleNamespace(name="w", kind=StateKind.weight, shape=(50,), start=0, values=values)]
    folder = save(tmp_path, 1, [shards])
    got = SimpleNamespace(name="w", kind=StateKind.weight, shape=(50,), start=0, values=torch.zeros(50, dtype=dtype))
    load_tensors(folder, read_index(folder), [got])
    assert torch.equal(got.values, values)


def test_a_large_state_is_cut_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_FILE_BYTES", 20_000)
    folder = save(tmp_path, 3, all_slices(2))
    assert len(tensors_in(folder)) > 4
    got = Sliced(seed=99)
    load_tensors(folder, read_index(folder), got.iter_shards())
    assert got.same_as(Sliced())


def test_a_checkpoint_is_the_same_bytes_whoever_asks_twice(tmp_path):
    one, two = (read_index(save(tmp_path / name, 3, [Sliced()])) for name in "ab")
    assert one.files == two.files and one.intervals == two.intervals


# Adam's state of a whole model


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    for number in range(count):
        torch.manual_seed(seed + number)
        optimizer.zero_grad()
        sum((parameter * torch.randn_like(parameter)).square().sum() for parameter in model.parameters()).backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_goes_on_bit_for_bit(tmp_path, fused):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
        return model, optimizer, ReplicatedState(model, optimizer)

    model, optimizer, shards = made()
    steps_of(model, optimizer, 3, seed=5)
    writer = CheckpointWriter(CheckpointFolder(tmp_path))
    writer.start(index_of(3), list(shards.iter_shards()), asynchronous=True)
    steps_of(model, optimizer, 2, seed=8)  # meanwhile
    assert writer.wait() is None
    again, its_optimizer, its_shards = made()
    folder = CheckpointFolder(tmp_path).get_step_path(3)
    load_tensors(folder, read_index(folder), its_shards.iter_shards())
    its_shards.sync_after_load(3)
    steps_of(again, its_optimizer, 2, seed=8)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, its_optimizer.state[theirs][key])


def test_moments_are_there_before_the_first_step_and_change_nothing():
    def trained(prepared: bool):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        if prepared:
            assert {piece.kind for piece in ReplicatedState(model, optimizer).iter_shards()} == set(StateKind)
        steps_of(model, optimizer, 3, seed=1)
        return model.weight

    assert torch.equal(trained(True), trained(False))


def test_another_optimizers_state_is_refused_and_plain_sgd_has_none():
    model = nn.Linear(2, 2)
    assert {p.kind for p in ReplicatedState(model, torch.optim.SGD(model.parameters(), lr=0.1)).iter_shards()} == {
        StateKind.weight
    }
    with pytest.raises(UserError, match="Checkpoints hold AdamW's state, and the optimizer is SGD"):
        ReplicatedState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


# Whole or not there


def test_the_last_ones_and_the_best_stay_and_the_pointer_names_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, [Sliced()], keep_last=2)
        if step == 2:
            folder.mark_best(2, 0.5)
    assert folder.list_steps() == [5, 4, 2] and folder.read_latest_step() == 5 and folder.read_best() == (2, 0.5)
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    assert not [path for path in tmp_path.rglob(".*")]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path):
    kept = save(tmp_path, 2, [Sliced()])
    save(tmp_path, 9, [Sliced()])
    (tmp_path / ".step-00000004").mkdir()
    (tmp_path / ".step-00000004" / "rank-00000-000.safetensors").write_bytes(b"half")
    (tmp_path / ".latest").write_text("step-")
    (tmp_path / ".gone-step-00000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    CheckpointFolder(tmp_path).clean_before_run(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "notes.txt", kept.name]
    assert CheckpointFolder(tmp_path).read_latest_step() == 2


def test_a_rank_that_cannot_write_ends_the_wait_of_the_first(tmp_path, monkeypatch):
    save(tmp_path, 1, all_slices(2))
    real = writing.write_shards

    def full(draft, rank, pieces):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return real(draft, rank, pieces)

    monkeypatch.setattr(writing, "write_shards", full)
    folder, shards = CheckpointFolder(tmp_path), all_slices(2)
    writers = [CheckpointWriter(folder, rank=rank, writer_ranks=(0, 1), timeout_seconds=PATIENCE) for rank in (0, 1)]
    for writer, held in zip(writers, shards, strict=True):
        writer.start(index_of(2), list(held.iter_shards()), asynchronous=True)
    errors = [writer.wait() for writer in writers]
    assert str(errors[0]) == "rank 1 could not write its part" and errors[1].strerror == "No space left on device"
    writers[0].remove_unfinished()
    assert folder.list_steps() == [1] and not [path for path in tmp_path.rglob(".*")]


def test_an_old_one_that_cannot_be_removed_costs_nothing_but_its_room(tmp_path, monkeypatch):
    """As a network's file system refuses it while a file is open."""
    monkeypatch.setattr("lit_vlm.engine.checkpoint.folder.remove_folder", _busy)
    for step in (1, 2, 3):
        save(tmp_path, step, all_slices(1), keep_last=1)
    assert CheckpointFolder(tmp_path).list_steps() == [3, 2, 1] and CheckpointFolder(tmp_path).read_latest_step() == 3


def _busy(path):
    raise OSError(16, "Device or resource busy")


def test_the_first_rank_waits_no_longer_than_it_is_told(tmp_path):
    writer = CheckpointWriter(CheckpointFolder(tmp_path), rank=0, writer_ranks=(0, 1), timeout_seconds=0.2)
    writer.start(index_of(2), list(Sliced(0, 2).iter_shards()), asynchronous=True)
    assert "do all machines share the folder?" in str(writer.wait())


def test_values_that_change_while_they_are_written_are_those_of_the_save(tmp_path, monkeypatch):
    held, real, copied = Sliced(), writing.write_shards, threading.Event()

    def slow(*arguments):
        copied.wait(PATIENCE)
        return real(*arguments)

    monkeypatch.setattr(writing, "write_shards", slow)
    writer = CheckpointWriter(CheckpointFolder(tmp_path))
    writer.start(index_of(1), list(held.iter_shards()), asynchronous=True)
    for piece in held.iter_shards():
        piece.values.zero_()
    copied.set()
    assert writer.wait() is None
    load_tensors(
        CheckpointFolder(tmp_path).get_step_path(1),
        read_index(CheckpointFolder(tmp_path).get_step_path(1)),
        held.iter_shards(),
    )
    assert held.same_as(Sliced())


@pytest.mark.parametrize("level", range(20))
def test_at_twenty_levels_of_a_full_disk_the_checkpoint_before_stays_whole(tmp_path, level):
    """A limit on the size of a file stands for the disk: the write that passes it fails, wherever that is."""
    before = save(tmp_path, 1, [Sliced()])
    size = tensors_in(before)[0].stat().st_size
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * level // 20, size * level // 20))
        writer = CheckpointWriter(CheckpointFolder(tmp_path))
        writer.start(index_of(2), list(Sliced(seed=1).iter_shards()), asynchronous=level % 2 == 0)
        error = writer.wait()
        writer.remove_unfinished()
        os._exit(0 if isinstance(error, OSError) and error.strerror == "File too large" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", before.name]
    check_files(before, read_index(before))


# Found before a weight is used


def test_the_newest_good_one_is_taken_and_none_means_from_the_beginning(tmp_path):
    assert found_in(tmp_path / "nothing") is None
    save(tmp_path, 1, [Sliced()])
    newest = save(tmp_path, 2, [Sliced()])
    assert found_in(tmp_path)[0] == newest
    assert found_in(tmp_path, "none") is None
    assert found_in(tmp_path, str(tmp_path / "step-00000001"))[1].step == 1


@pytest.mark.parametrize("writers", [1, 3])
def test_three_hundred_damaged_ones_are_each_found_and_the_one_before_is_taken(tmp_path, writers):
    dice = Random(7 + writers)
    clean = tmp_path / "clean"
    before = save(clean, 1, all_slices(writers, seed=1), belongs="x")
    save(clean, 2, all_slices(writers, seed=2), belongs="x")
    for number in range(150):
        place = tmp_path / f"case_{number}"
        shutil.copytree(clean, place)
        hurt = DAMAGES[number % len(DAMAGES)]
        file = hurt(place / "step-00000002", place / before.name, dice)
        shards, untouched, said = Sliced(seed=5), Sliced(seed=5), []
        found = found_in(place, shards=shards, said=said)
        case = (number, hurt.__name__, said)
        assert found is not None and found[1].step == 1 and shards.same_as(untouched), case
        assert len(said) == 1 and f"step-00000002/{file}" in said[0], case
        assert said[0].endswith("Goes on from the one before, step-00000001."), case
        shutil.rmtree(place)


def test_a_folder_that_is_gone_although_the_pointer_names_it_is_told(tmp_path):
    save(tmp_path, 1, [Sliced()])
    shutil.rmtree(save(tmp_path, 2, [Sliced()]))
    said = []
    assert found_in(tmp_path, said=said)[1].step == 1
    assert "step-00000002 is missing. Goes on from the one before, step-00000001." in said[0]


def test_where_none_can_be_used_the_run_stops_and_says_how_to_start_anew(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step, [Sliced()]) / "index.json").unlink()
    with pytest.raises(UserError) as caught:
        found_in(tmp_path)
    said = str(caught.value)
    assert "step-00000002/index.json cannot be read" in said and "step-00000001/index.json cannot be read" in said
    assert said.endswith("resume_from=none starts the run from its beginning.")
    assert found_in(tmp_path, "none") is None


def test_a_damaged_one_that_was_named_is_not_replaced_by_another(tmp_path):
    save(tmp_path, 1, [Sliced()])
    named = save(tmp_path, 2, [Sliced()])
    tensors_in(named)[0].unlink()
    with pytest.raises(UserError, match=r"resume_from=.*safetensors is missing\. The run's own are .*resume_from=auto"):
        found_in(tmp_path, str(named))


def test_a_folder_that_is_no_checkpoint_is_refused_with_those_inside(tmp_path):
    inside = save(tmp_path / "runs" / "checkpoints", 2, [Sliced()])
    with pytest.raises(UserError, match=f"is not the folder of a checkpoint .*It holds {inside}; name one of them"):
        found_in(tmp_path, str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (RunFingerprint(stage="sft"), "another stage"),
        (RunFingerprint(data="d2"), "another data"),
        (RunFingerprint(parent="p2"), "another model to start from"),
        (RunFingerprint(plan="q2"), "another samples in its steps"),
        (
            RunFingerprint(settings={"stage": {"learning_rate": 2.0}}),
            r"another stage\.learning_rate \(it has 1\.0, this run 2\.0\)",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused_with_what_differs(tmp_path, mine, said):
    theirs = {
        "stage": "align",
        "data": "d1",
        "parent": "p1",
        "plan": "q1",
        "settings": {"stage": {"learning_rate": 1.0}},
    }
    save(tmp_path, 1, [Sliced()], **theirs)
    with pytest.raises(UserError, match=said):
        found_in(tmp_path, belongs=mine)


def test_another_models_checkpoint_is_refused_with_the_tensors(tmp_path):
    index = read_index(save(tmp_path, 1, [Sliced()]))
    assert find_state_mismatches(index, SHAPES, Sliced().iter_shards()) == []
    other = {**SHAPES, "lm_head.weight": (91, 50), "new": (3,)}
    del other["scale"]
    assert find_state_mismatches(index, other) == [
        "it has scale, which does not train",
        "it lacks new",
        "lm_head.weight is [90, 50] in it and [91, 50] here",
    ]
    for interval in [one for one in index.intervals if one.kind == StateKind.exp_avg]:
        index.intervals.remove(interval)
    assert find_state_mismatches(index, SHAPES, Sliced().iter_shards()) == ["it lacks the optimizer's exp_avg"]


def test_an_index_that_leaves_out_or_repeats_elements_is_damaged_even_if_it_says_so_itself(tmp_path):
    folder = save(tmp_path, 1, all_slices(2))
    whole = read_index(folder)
    for change in (lambda all: all[1:], lambda all: [*all, all[0]]):
        index = CheckpointIndex(**{name: getattr(whole, name) for name in CheckpointIndex.__dataclass_fields__})
        index.intervals = change(whole.intervals)
        (folder / "index.json").write_text(index.to_text())
        with pytest.raises(CorruptCheckpointError, match="is not there exactly once"):
            read_index(folder)


@pytest.mark.parametrize("but_best", [False, True])
def test_the_next_start_removes_what_a_removal_that_was_killed_left(tmp_path, but_best):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for left in (tmp_path / ".gone-checkpoints-1/step-00000002", checkpoints.path / ".gone-step-00000001-2"):
        left.mkdir(parents=True)
        (left / "index.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    checkpoints.remove_all(keep_best=but_best)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
