"""Checkpoints: one layout for every sharding of the state, complete or absent, and a damaged one is detected before it is used."""

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
from checkpoint_cases import DAMAGES, SHAPES, SlicedState, list_tensor_files, make_index, make_slices, save_checkpoint
from safetensors.torch import load_file
from torch import nn
from waiting import PATIENCE

from lit_vlm.checkpoint import write
from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import CheckpointIndex, CorruptCheckpointError, RunFingerprint
from lit_vlm.checkpoint.resume import (
    check_files,
    find_resume_checkpoint,
    find_state_mismatches,
    load_tensors,
    read_index,
)
from lit_vlm.checkpoint.write import CheckpointWriter
from lit_vlm.distributed.sharded_state import MOMENTS, ReplicatedState, StateKind
from lit_vlm.types import UserError


def make_model(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    return model


def make_trainer() -> SimpleNamespace:
    """Return the part of a one-rank trainer that is needed to find a checkpoint."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    module = SimpleNamespace(model=make_model(SHAPES))
    return SimpleNamespace(
        strategy=strategy, lightning_module=module, global_rank=0, world_size=1, is_global_zero=True, datamodule=None
    )


def find_checkpoint(path: Path, resume_from: str = "auto", shards=None, belongs=None, messages=None):
    report = (messages if messages is not None else []).append
    return find_resume_checkpoint(
        make_trainer(),
        shards or SlicedState(),
        CheckpointFolder(path),
        resume_from,
        belongs or RunFingerprint(),
        report,
    )


# One layout


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [False, True])
def test_what_any_number_of_ranks_wrote_any_other_number_reads(tmp_path, writers, rows):
    folder = save_checkpoint(tmp_path, 7, make_slices(writers, rows=rows))
    index = read_index(folder)
    check_files(folder, index)
    for readers in (1, 2, 4):
        for other_rows in (False, True):
            for rank in range(readers):
                loaded = SlicedState(rank, readers, seed=99, rows=other_rows)
                load_tensors(folder, index, loaded.iter_shards())
                assert loaded.equals(SlicedState(rank, readers, rows=other_rows))


def test_the_files_are_plain_safetensors(tmp_path):
    folder = save_checkpoint(tmp_path, 7, [SlicedState()])
    (file,) = list_tensor_files(folder)
    tensors = load_file(file)
    for piece in SlicedState().iter_shards():
        assert torch.equal(tensors[f"{piece.kind}:{piece.name}:0"], piece.values)
    assert json.loads((folder / "index.json").read_text())["files"][0]["size"] == file.stat().st_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_saved_bit_for_bit(tmp_path, dtype):
    shards = SlicedState()
    values = torch.randn(50).to(dtype)
    shards.held = [SimpleNamespace(name="w", kind=StateKind.weight, shape=(50,), start=0, values=values)]
    folder = save_checkpoint(tmp_path, 1, [shards])
    loaded = SimpleNamespace(name="w", kind=StateKind.weight, shape=(50,), start=0, values=torch.zeros(50, dtype=dtype))
    load_tensors(folder, read_index(folder), [loaded])
    assert torch.equal(loaded.values, values)


def test_a_large_state_is_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 20_000)
    folder = save_checkpoint(tmp_path, 3, make_slices(2))
    assert len(list_tensor_files(folder)) > 4
    loaded = SlicedState(seed=99)
    load_tensors(folder, read_index(folder), loaded.iter_shards())
    assert loaded.equals(SlicedState())


def test_saving_the_same_state_twice_gives_the_same_bytes(tmp_path):
    one, two = (read_index(save_checkpoint(tmp_path / name, 3, [SlicedState()])) for name in "ab")
    assert one.files == two.files and one.intervals == two.intervals


# Adam's state of a whole model


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    for number in range(count):
        torch.manual_seed(seed + number)
        optimizer.zero_grad()
        sum((parameter * torch.randn_like(parameter)).square().sum() for parameter in model.parameters()).backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_resumes_bit_for_bit(tmp_path, fused):
    def make_training():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
        return model, optimizer, ReplicatedState(model, optimizer)

    model, optimizer, shards = make_training()
    train_steps(model, optimizer, 3, seed=5)
    writer = CheckpointWriter(CheckpointFolder(tmp_path))
    writer.start(make_index(3), list(shards.iter_shards()), asynchronous=True)
    train_steps(model, optimizer, 2, seed=8)  # while the checkpoint is written
    assert writer.wait() is None
    again, its_optimizer, its_shards = make_training()
    folder = CheckpointFolder(tmp_path).get_step_path(3)
    load_tensors(folder, read_index(folder), its_shards.iter_shards())
    its_shards.sync_after_load(3)
    train_steps(again, its_optimizer, 2, seed=8)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, its_optimizer.state[theirs][key])


def test_adam_moments_exist_before_the_first_step_and_change_nothing():
    def train(prepared: bool):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        if prepared:
            assert {piece.kind for piece in ReplicatedState(model, optimizer).iter_shards()} == {
                StateKind.weight,
                *MOMENTS,
            }
        train_steps(model, optimizer, 3, seed=1)
        return model.weight

    assert torch.equal(train(True), train(False))


def test_another_optimizers_state_is_refused_and_plain_sgd_has_none():
    model = nn.Linear(2, 2)
    assert {p.kind for p in ReplicatedState(model, torch.optim.SGD(model.parameters(), lr=0.1)).iter_shards()} == {
        StateKind.weight
    }
    with pytest.raises(UserError, match="Checkpoints hold AdamW's state, and the optimizer is SGD"):
        ReplicatedState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


# Complete or absent


def test_the_last_checkpoints_and_the_best_are_kept_and_the_pointer_names_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, [SlicedState()], keep_last=2)
        if step == 2:
            folder.mark_best(2, 0.5)
    assert folder.list_steps() == [5, 4, 2] and folder.read_latest_step() == 5 and folder.read_best() == (2, 0.5)
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    assert not [path for path in tmp_path.rglob(".*")]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    kept = save_checkpoint(tmp_path, 2, [SlicedState()])
    save_checkpoint(tmp_path, 9, [SlicedState()])
    (tmp_path / ".step-00000004").mkdir()
    (tmp_path / ".step-00000004" / "rank-00000-000.safetensors").write_bytes(b"half")
    (tmp_path / ".latest").write_text("step-")
    (tmp_path / ".gone-step-00000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    CheckpointFolder(tmp_path).clean_before_run(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "notes.txt", kept.name]
    assert CheckpointFolder(tmp_path).read_latest_step() == 2


def test_a_rank_that_cannot_write_ends_the_wait_of_rank_0(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, make_slices(2))
    real = write.write_shards

    def fail_on_rank_1(draft, rank, pieces):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return real(draft, rank, pieces)

    monkeypatch.setattr(write, "write_shards", fail_on_rank_1)
    folder, shards = CheckpointFolder(tmp_path), make_slices(2)
    writers = [CheckpointWriter(folder, rank=rank, writer_ranks=(0, 1), timeout_seconds=PATIENCE) for rank in (0, 1)]
    for writer, held in zip(writers, shards, strict=True):
        writer.start(make_index(2), list(held.iter_shards()), asynchronous=True)
    errors = [writer.wait() for writer in writers]
    assert str(errors[0]) == "rank 1 could not write its part" and errors[1].strerror == "No space left on device"
    writers[0].remove_unfinished()
    assert folder.list_steps() == [1] and not [path for path in tmp_path.rglob(".*")]


def test_an_old_checkpoint_that_cannot_be_removed_costs_only_disk_space(tmp_path, monkeypatch):
    """A network file system refuses the removal while a file is open."""
    monkeypatch.setattr("lit_vlm.checkpoint.folder.remove_folder", _raise_busy)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, make_slices(1), keep_last=1)
    assert CheckpointFolder(tmp_path).list_steps() == [3, 2, 1] and CheckpointFolder(tmp_path).read_latest_step() == 3


def _raise_busy(path):
    raise OSError(16, "Device or resource busy")


def test_rank_0_waits_no_longer_than_its_timeout(tmp_path):
    writer = CheckpointWriter(CheckpointFolder(tmp_path), rank=0, writer_ranks=(0, 1), timeout_seconds=0.2)
    writer.start(make_index(2), list(SlicedState(0, 2).iter_shards()), asynchronous=True)
    assert "do all machines share the folder?" in str(writer.wait())


def test_values_that_change_during_the_write_are_saved_as_they_were(tmp_path, monkeypatch):
    held, real, copied = SlicedState(), write.write_shards, threading.Event()

    def write_slowly(*arguments):
        copied.wait(PATIENCE)
        return real(*arguments)

    monkeypatch.setattr(write, "write_shards", write_slowly)
    writer = CheckpointWriter(CheckpointFolder(tmp_path))
    writer.start(make_index(1), list(held.iter_shards()), asynchronous=True)
    for piece in held.iter_shards():
        piece.values.zero_()
    copied.set()
    assert writer.wait() is None
    load_tensors(
        CheckpointFolder(tmp_path).get_step_path(1),
        read_index(CheckpointFolder(tmp_path).get_step_path(1)),
        held.iter_shards(),
    )
    assert held.equals(SlicedState())


@pytest.mark.parametrize("level", range(20))
def test_at_twenty_levels_of_a_full_disk_the_previous_checkpoint_stays_complete(tmp_path, level):
    """A file size limit stands in for the full disk: the write that exceeds it fails, wherever that is."""
    before = save_checkpoint(tmp_path, 1, [SlicedState()])
    size = list_tensor_files(before)[0].stat().st_size
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * level // 20, size * level // 20))
        writer = CheckpointWriter(CheckpointFolder(tmp_path))
        writer.start(make_index(2), list(SlicedState(seed=1).iter_shards()), asynchronous=level % 2 == 0)
        error = writer.wait()
        writer.remove_unfinished()
        os._exit(0 if isinstance(error, OSError) and error.strerror == "File too large" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", before.name]
    check_files(before, read_index(before))


# Detected before a weight is used


def test_the_newest_valid_checkpoint_is_used_and_none_starts_from_the_beginning(tmp_path):
    assert find_checkpoint(tmp_path / "nothing") is None
    save_checkpoint(tmp_path, 1, [SlicedState()])
    newest = save_checkpoint(tmp_path, 2, [SlicedState()])
    assert find_checkpoint(tmp_path)[0] == newest
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path, str(tmp_path / "step-00000001"))[1].step == 1


@pytest.mark.parametrize("writers", [1, 3])
def test_three_hundred_damaged_checkpoints_are_each_detected_and_the_previous_one_is_used(tmp_path, writers):
    rng = Random(7 + writers)
    clean = tmp_path / "clean"
    before = save_checkpoint(clean, 1, make_slices(writers, seed=1), belongs="x")
    save_checkpoint(clean, 2, make_slices(writers, seed=2), belongs="x")
    for number in range(150):
        case_folder = tmp_path / f"case_{number}"
        shutil.copytree(clean, case_folder)
        damage = DAMAGES[number % len(DAMAGES)]
        file = damage(case_folder / "step-00000002", case_folder / before.name, rng)
        shards, untouched, messages = SlicedState(seed=5), SlicedState(seed=5), []
        found = find_checkpoint(case_folder, shards=shards, messages=messages)
        case = (number, damage.__name__, messages)
        assert found is not None and found[1].step == 1 and shards.equals(untouched), case
        assert len(messages) == 1 and f"step-00000002/{file}" in messages[0], case
        assert messages[0].endswith("Goes on from the one before, step-00000001."), case
        shutil.rmtree(case_folder)


def test_a_missing_folder_that_the_pointer_names_is_reported(tmp_path):
    save_checkpoint(tmp_path, 1, [SlicedState()])
    shutil.rmtree(save_checkpoint(tmp_path, 2, [SlicedState()]))
    messages = []
    assert find_checkpoint(tmp_path, messages=messages)[1].step == 1
    assert "step-00000002 is missing. Goes on from the one before, step-00000001." in messages[0]


def test_without_a_usable_checkpoint_the_run_stops_and_reports_how_to_start_from_the_beginning(tmp_path):
    for step in (1, 2):
        (save_checkpoint(tmp_path, step, [SlicedState()]) / "index.json").unlink()
    with pytest.raises(UserError) as caught:
        find_checkpoint(tmp_path)
    messages = str(caught.value)
    assert (
        "step-00000002/index.json cannot be read" in messages and "step-00000001/index.json cannot be read" in messages
    )
    assert messages.endswith("resume_from=none starts the run from its beginning.")
    assert find_checkpoint(tmp_path, "none") is None


def test_a_damaged_checkpoint_that_was_named_is_not_replaced_by_another(tmp_path):
    save_checkpoint(tmp_path, 1, [SlicedState()])
    named = save_checkpoint(tmp_path, 2, [SlicedState()])
    list_tensor_files(named)[0].unlink()
    with pytest.raises(UserError, match=r"resume_from=.*safetensors is missing\. The run's own are .*resume_from=auto"):
        find_checkpoint(tmp_path, str(named))


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_checkpoints_inside(tmp_path):
    inside = save_checkpoint(tmp_path / "runs" / "checkpoints", 2, [SlicedState()])
    with pytest.raises(UserError, match=f"is not the folder of a checkpoint .*It holds {inside}; name one of them"):
        find_checkpoint(tmp_path, str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("mine", "message"),
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
def test_another_runs_checkpoint_is_refused_with_the_difference(tmp_path, mine, message):
    theirs = {
        "stage": "align",
        "data": "d1",
        "parent": "p1",
        "plan": "q1",
        "settings": {"stage": {"learning_rate": 1.0}},
    }
    save_checkpoint(tmp_path, 1, [SlicedState()], **theirs)
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path, belongs=mine)


def test_another_models_checkpoint_is_refused_with_the_tensor_names(tmp_path):
    index = read_index(save_checkpoint(tmp_path, 1, [SlicedState()]))
    assert find_state_mismatches(index, SHAPES, SlicedState().iter_shards()) == []
    other = {**SHAPES, "lm_head.weight": (91, 50), "new": (3,)}
    del other["scale"]
    assert find_state_mismatches(index, other) == [
        "it has scale, which does not train",
        "it lacks new",
        "lm_head.weight is [90, 50] in it and [91, 50] here",
    ]
    for interval in [one for one in index.intervals if one.kind == StateKind.exp_avg]:
        index.intervals.remove(interval)
    assert find_state_mismatches(index, SHAPES, SlicedState().iter_shards()) == ["it lacks the optimizer's exp_avg"]


def test_an_index_that_omits_or_repeats_elements_is_corrupt_even_if_its_digest_matches(tmp_path):
    folder = save_checkpoint(tmp_path, 1, make_slices(2))
    whole = read_index(folder)
    for change in (lambda all: all[1:], lambda all: [*all, all[0]]):
        index = CheckpointIndex(**{name: getattr(whole, name) for name in CheckpointIndex.__dataclass_fields__})
        index.intervals = change(whole.intervals)
        (folder / "index.json").write_text(index.to_text())
        with pytest.raises(CorruptCheckpointError, match="is not there exactly once"):
            read_index(folder)


@pytest.mark.parametrize("but_best", [False, True])
def test_the_next_start_completes_a_removal_that_was_killed(tmp_path, but_best):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for left in (tmp_path / ".gone-checkpoints-1/step-00000002", checkpoints.path / ".gone-step-00000001-2"):
        left.mkdir(parents=True)
        (left / "index.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    checkpoints.remove_all(keep_best=but_best)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
