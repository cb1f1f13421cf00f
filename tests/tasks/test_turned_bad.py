"""Tests of an image that becomes corrupt after indexing: read again, logged, reported.

The same command then resumes without it, and every other sample stays in its place.
"""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from mixture_cases import build_datamodule, list_sample_names, read_json_lines, run_prepare, zero_second_half
from PIL import Image
from run_helpers import (
    PHOTOS,
    TWO,
    RunOutput,
    make_conversations,
    make_llava_record,
    run,
    run_process,
    save_photos,
    write_data_choice,
    write_records,
)
from waiting import until

from lit_vlm.data import loader as look_ahead
from lit_vlm.data import micro_batches
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.stages.base import Stage
from lit_vlm.types import Fault, RecordError, UserError

COUNT = 24


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(micro_batches, "RETRY_DELAYS", (0.01, 0.02))


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    """Overrides for 24 records, each with its own photograph; `mine/5` has 5.jpg."""
    originals = save_photos(tmp_path / "originals")
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        shutil.copy(originals / PHOTOS[0], tmp_path / "images" / f"{number}.jpg")
    records = [make_llava_record("<image>\nWhat?", f"Number {i}", image=f"{i}.jpg", id=str(i)) for i in range(COUNT)]
    path = write_records(tmp_path / "train.jsonl", records)
    overrides = ["stage=sft", "data=llava_json", f"data.sources.mine.path={path}", "trainer.max_steps=6"]
    return [*overrides, "data.sources.mine.image_root=images", "run_name=bad", "data.validation.max_samples=4"]


def train_and_list_steps(monkeypatch, *overrides: str) -> list[list[str]]:
    """Train, and return the sample ids of each optimizer step, from the batches."""
    steps: dict[int, list[str]] = {}
    step = Stage.training_step

    def record_and_step(self, batch, number):
        steps.setdefault(batch.step, []).extend(batch.sample_ids)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", record_and_step)
        assert run(*overrides).manifest["status"] == "finished"
    return [sorted(steps[number]) for number in sorted(steps)]


def remove_samples(steps: list[list[str]], *removed: str) -> list[list[str]]:
    return [[name for name in step if name not in removed] for step in steps]


def read_weights_digest(name: str) -> str:
    return RunOutput(Path("runs") / name).manifest["weights_digest"]


def run_and_read_error(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_record_is_reported_logged_and_left_out_and_other_samples_stay_in_their_step(
    overrides, tmp_path, monkeypatch, workers
):
    overrides = [*overrides, f"data.num_workers={workers}"]
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    zero_second_half(tmp_path / "images" / "5.jpg")
    output = run_and_read_error(*overrides)
    ledger = tmp_path / "runs" / "bad" / "ledger.jsonl"
    assert output.startswith("train.jsonl:6: image '5.jpg' cannot be decoded") and "Traceback" not in output
    assert f"3 tries failed now. It is entered in {ledger}: the same command resumes without it" in output
    (entry,) = read_json_lines(ledger)
    assert (entry["source"], entry["position"], entry["origin"], entry["fault"]) == (
        "mine",
        5,
        "train.jsonl:6",
        "broken",
    )
    assert train_and_list_steps(monkeypatch, *overrides) == remove_samples(undisturbed, "mine/5")
    assert sum(map(len, undisturbed)) == COUNT and len(read_json_lines(ledger)) == 1


def test_each_corrupt_record_costs_one_start(overrides, tmp_path, monkeypatch):
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    for number in (2, 7, 11):
        zero_second_half(tmp_path / "images" / f"{number}.jpg")
    assert len({run_and_read_error(*overrides).split(":")[1] for _ in range(3)}) == 3
    assert train_and_list_steps(monkeypatch, *overrides) == remove_samples(undisturbed, "mine/2", "mine/7", "mine/11")


SET_ASIDE = ("data.on_bad_record=quarantine", "data.max_quarantined=0.2")


PACKS = pytest.param(["data.global_batch_size=8", "data.tokens_per_micro_batch=200"], marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [[], PACKS])
def test_with_quarantine_one_process_restarts_and_trains_as_if_they_were_left_out_from_the_start(
    overrides, tmp_path, monkeypatch, capsys, more
):
    overrides = [*overrides, *more, *SET_ASIDE]
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    for number in (2, 7, 11):
        zero_second_half(tmp_path / "images" / f"{number}.jpg")
    capsys.readouterr()
    steps = train_and_list_steps(monkeypatch, *overrides)  # it finishes
    output = " ".join(capsys.readouterr().out.split())
    ledger = tmp_path / "runs" / "bad" / "ledger.jsonl"
    assert {entry["position"] for entry in read_json_lines(ledger)} == {2, 7, 11}
    assert (
        output.count("3 tries failed now. It is entered in") == 3 == output.count("and the run continues without it.")
    )
    assert "train.jsonl:8: image '7.jpg' cannot be decoded" in output and "resumes at step" in output

    (tmp_path / "runs" / "given").mkdir()
    shutil.copy(ledger, tmp_path / "runs" / "given" / "ledger.jsonl")
    with_ledger = train_and_list_steps(monkeypatch, *overrides, "run_name=given")
    assert (
        with_ledger
        == remove_samples(undisturbed, "mine/2", "mine/7", "mine/11")
        == [sorted(set(step)) for step in steps]
    )
    assert read_weights_digest("bad") == read_weights_digest("given") != read_weights_digest("whole")
    tables = [pd.read_csv(tmp_path / "runs" / name / "metrics.csv") for name in ("bad", "given")]
    columns = [name for name in tables[0].columns if "loss" in name or name == "step"]
    assert len(columns) > 1 and tables[0][columns].equals(tables[1][columns])


def test_idle_workers_log_corrupt_records_before_their_step(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(look_ahead, "RETRY_DELAYS", (0.01, 0.02))
    overrides = [*overrides, *SET_ASIDE, "data.num_workers=2", "data.prefetch_factor=1"]
    datamodule = build_datamodule(*overrides, "data.global_batch_size=2", "trainer.max_steps=12")
    plan = datamodule.make_plan()
    bad = {int(datamodule.index.position[sample]) for sample in plan.get_samples(11)}
    for number in bad:
        zero_second_half(tmp_path / "images" / f"{number}.jpg")
    ledger, loader = tmp_path / "runs" / "bad" / "ledger.jsonl", iter(datamodule.train_dataloader())
    ledger.parent.mkdir(parents=True, exist_ok=True)
    first = next(loader)  # no further batch is read: the workers are idle from here on
    assert first.sample_ids and not isinstance(first, micro_batches.CorruptRecord)
    until(lambda: ledger.exists() and len(read_json_lines(ledger)) == len(bad) == 2)
    assert {entry["position"] for entry in read_json_lines(ledger)} == bad
    rest = list(loader)
    found = [batch for batch in rest if isinstance(batch, micro_batches.CorruptRecord)]
    assert isinstance(found[0].add_to_ledger(datamodule.ledger), micro_batches.RecordLoggedError)
    assert len(read_json_lines(ledger)) == 2  # it is logged already
    assert not build_datamodule(*overrides, "data.on_bad_record=stop").look_ahead


def test_more_corrupt_records_than_max_quarantined_end_the_run(overrides, tmp_path):
    run(*overrides, "run_name=first")
    for number in range(6):
        zero_second_half(tmp_path / "images" / f"{number}.jpg")
    output = run_and_read_error(*overrides, *SET_ASIDE)
    assert "They are 5 by now, more than data.max_quarantined=0.2 of the training records" in output
    assert len(read_json_lines(tmp_path / "runs" / "bad" / "ledger.jsonl")) == 5


def test_left_out_records_are_reported_at_the_next_start(overrides, tmp_path, capsys):
    zero_second_half(tmp_path / "images" / "5.jpg")
    run_and_read_error(*overrides)
    capsys.readouterr()
    run(*overrides)
    assert "1 that turned bad while training left out, see" in capsys.readouterr().out


def test_a_step_without_remaining_samples_trains_nothing(overrides, tmp_path, monkeypatch):
    overrides = [*overrides, "data.global_batch_size=1", "trainer.max_steps=24"]
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    zero_second_half(tmp_path / "images" / "5.jpg")
    run_and_read_error(*overrides)
    again = train_and_list_steps(monkeypatch, *overrides)
    assert len(again) == len(undisturbed) == 24 and again == remove_samples(undisturbed, "mine/5")


def change_image_size(path: Path) -> None:
    Image.open(path).resize((90, 300)).save(path)


def delete_image(path: Path) -> None:
    path.unlink()


def test_an_image_missing_after_indexing_is_reported_and_left_out(overrides, tmp_path, monkeypatch):
    run(*overrides, "run_name=first")
    delete_image(tmp_path / "images" / "5.jpg")
    assert run_and_read_error(*overrides).startswith("train.jsonl:6: image '5.jpg' not found in")
    (entry,) = read_json_lines(tmp_path / "runs" / "bad" / "ledger.jsonl")
    assert (entry["position"], entry["fault"]) == (5, "missing")
    assert sum(map(len, train_and_list_steps(monkeypatch, *overrides))) == COUNT - 1


def test_an_image_changed_after_indexing_is_reported_and_is_no_bad_record(overrides, tmp_path, monkeypatch):
    run(*overrides, "run_name=first")
    change_image_size(tmp_path / "images" / "5.jpg")
    text = run_and_read_error(*overrides)
    assert text.startswith("train.jsonl:6: ") and "tokens now and had" in text and "task=prepare" in text
    assert not (tmp_path / "runs" / "bad" / "ledger.jsonl").exists()
    run_prepare(*overrides)
    assert sum(map(len, train_and_list_steps(monkeypatch, *overrides))) == COUNT


def fail_opening(monkeypatch, times: int) -> list[str]:
    """Make opening 5.jpg fail `times` times. Return the list of failed tries."""
    tries, original_open = [], FileImage._open

    def open_or_fail(self):
        if self.path == "5.jpg" and len(tries) < times:
            tries.append(self.path)
            raise RecordError(self.origin, "image '5.jpg' cannot be opened: Input/output error", fault=Fault.unreadable)
        return original_open(self)

    monkeypatch.setattr(FileImage, "_open", open_or_fail)
    return tries


@pytest.mark.parametrize("held_out", [False, True])
def test_a_read_error_that_passes_within_the_retries_does_not_stop_the_run(overrides, tmp_path, monkeypatch, held_out):
    if held_out:
        overrides = ["stage=sft", *build_own_validation(tmp_path), "run_name=bad", "trainer.max_steps=3"]
    run(*overrides, "run_name=first", "trainer.max_steps=1")  # builds the index
    tries = fail_opening(monkeypatch, 2)
    assert run(*overrides).manifest["status"] == "finished" and len(tries) == 2
    assert not (tmp_path / "runs" / "bad" / "ledger.jsonl").exists()


def test_one_failed_read_too_many_ends_the_run(overrides, tmp_path, monkeypatch):
    run(*overrides, "run_name=first")
    fail_opening(monkeypatch, 10**6)
    assert "Input/output error" in run_and_read_error(*overrides)
    assert read_json_lines(tmp_path / "runs" / "bad" / "ledger.jsonl")[0]["fault"] == "unreadable"


def build_own_validation(folder: Path) -> list[str]:
    """Return overrides of a validation source that has the name of the training source and other images."""
    path = write_records(
        folder / "held" / "train.jsonl", [make_llava_record("<image>\nQ?", "a", image=f"{i}.jpg") for i in (5, 6, 7)]
    )
    held_source = {"path": str(path), "image_root": str(folder / "images"), "format": "llava"}
    training_source = held_source | {
        "path": str(write_records(folder / "train.jsonl", make_conversations(12))),
        "image_root": str(folder / "originals"),
    }
    return write_data_choice(folder, sources={"mine": training_source}, validation={"sources": {"mine": held_source}})


@pytest.mark.parametrize("callbacks", ["[export]", "[samples,export]"])
def test_an_image_of_a_validation_source_is_left_out_of_validation_only(overrides, tmp_path, monkeypatch, callbacks):
    overrides = [
        "stage=sft",
        *build_own_validation(tmp_path),
        "run_name=bad",
        f"callbacks={callbacks}",
        "trainer.max_steps=3",
    ]
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    zero_second_half(tmp_path / "images" / "5.jpg")
    text = run_and_read_error(*overrides)
    assert text.startswith("train.jsonl:1: image '5.jpg' cannot be decoded") and "It is entered in" in text
    (entry,) = read_json_lines(tmp_path / "runs" / "bad" / "ledger.jsonl")
    assert (entry["source"], entry["position"], entry["held_out"]) == ("mine", 0, True)
    # Read first, or after the last step
    assert train_and_list_steps(monkeypatch, *overrides) == (undisturbed if "samples" in callbacks else [])
    assert read_weights_digest("bad") == read_weights_digest("whole")
    assert RunOutput(tmp_path / "runs" / "bad").manifest["data"]["num_held_out"] == 2


@pytest.mark.parametrize("callbacks", ["[export]", "[samples,export]"])
def test_an_image_of_the_held_out_share_is_left_out(overrides, tmp_path, monkeypatch, callbacks):
    overrides = [*overrides, "data.validation.fraction=0.2", f"callbacks={callbacks}"]
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    datamodule = build_datamodule(*overrides)
    datamodule.build_indexes()
    number = int(datamodule.held_out.position[1])
    zero_second_half(tmp_path / "images" / f"{number}.jpg")
    assert f"image '{number}.jpg' cannot be decoded" in run_and_read_error(*overrides)
    assert train_and_list_steps(monkeypatch, *overrides) == (undisturbed if "samples" in callbacks else [])
    assert read_weights_digest("bad") == read_weights_digest("whole")
    assert RunOutput(tmp_path / "runs" / "bad").manifest["data"]["num_held_out"] == len(datamodule.held_out) - 1


@pytest.mark.slow
def test_two_ranks_both_leave_out_the_corrupt_record(overrides, tmp_path, monkeypatch):
    undisturbed = train_and_list_steps(monkeypatch, *overrides, "run_name=whole")
    zero_second_half(tmp_path / "images" / "5.jpg")
    first = run_process(*overrides, *TWO, cwd=tmp_path, ranks=2)
    assert first.returncode != 0 and "train.jsonl:6: image '5.jpg' cannot be decoded" in first.stderr
    assert {entry["position"] for entry in read_json_lines(tmp_path / "runs" / "bad" / "ledger.jsonl")} == {5}
    second = run_process(*overrides, *TWO, cwd=tmp_path, ranks=2)
    assert second.returncode == 0, second.stderr[-3000:]
    assert RunOutput(tmp_path / "runs" / "bad").manifest["status"] == "finished"
    datamodule = build_datamodule(*overrides)
    plan = datamodule.make_plan(2)
    steps = [list_sample_names(datamodule.index, plan.get_samples(step)) for step in range(plan.num_steps)]
    assert [sorted(step) for step in steps] == remove_samples(undisturbed, "mine/5")
    packs = [[*pack] for step in range(plan.num_steps) for pack in plan.get_step(step).packs]
    assert sum(map(len, packs)) == COUNT - 1
