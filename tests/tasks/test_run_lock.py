"""Tests of mixture.lock: task=prepare writes it, data.lock enforces it, and changes are reported."""

from pathlib import Path

import pytest
from mixture_cases import run_prepare
from run_helpers import make_conversations, make_llava_record, run, save_photos, write_data_choice, write_records

from lit_vlm.types import UserError


@pytest.fixture
def work_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_photos(tmp_path / "images")
    write_records(tmp_path / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {i}.") for i in range(12)])
    write_records(tmp_path / "seen.jsonl", make_conversations(12))
    return tmp_path


@pytest.fixture
def overrides(work_folder) -> list[str]:
    sources = {
        "talk": {"path": str(work_folder / "talk.jsonl"), "weight": 1},
        "seen": {"path": str(work_folder / "seen.jsonl"), "image_root": str(work_folder / "images"), "weight": 2},
    }
    return write_data_choice(work_folder, sources=sources)


@pytest.fixture
def locked_overrides(overrides) -> list[str]:
    """Overrides of a run with the lock file of another, prepared run; its own manifest would report changes first."""
    lock = run_prepare(*overrides, "run_name=before").dir / "mixture.lock"
    return [*overrides, "stage=sft", "run_name=after", f"data.lock={lock}", "callbacks=[export]"]


def read_refusal(*overrides: str) -> str:
    """Return the error, which is the same for train and prepare. Nothing is trained and no lock file is written."""
    messages = []
    for task in (run, run_prepare):
        with pytest.raises(UserError) as caught:
            task(*overrides)
        messages.append(str(caught.value))
    folder = Path("runs") / "after"
    assert not any((folder / name).exists() for name in ("manifest.json", "hf", "mixture.lock", "metrics.csv"))
    assert (
        messages[0] == messages[1]
        and "Bring them back, or take data.lock away to train on what is there." in messages[0]
    )
    return messages[0]


def test_the_same_data_are_trained_on_and_give_the_same_lock_file(locked_overrides):
    run_output = run(*locked_overrides)
    assert run_output.manifest["status"] == "finished"
    assert (run_output.dir / "mixture.lock").read_bytes() == (
        run_output.dir.parent / "before" / "mixture.lock"
    ).read_bytes()


def change_answers(work_folder: Path) -> None:
    write_records(
        work_folder / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {(i + 1) % 12}.") for i in range(12)]
    )


def add_record(work_folder: Path) -> None:
    write_records(work_folder / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {i}.") for i in range(13)])


def reverse_records(work_folder: Path) -> None:
    write_records(work_folder / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {i}.") for i in reversed(range(12))])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_answers, ["talk: what its records say changed"]),
        (reverse_records, ["talk: what its records say changed"]),
        (add_record, ["talk: 12 records then, 13 now", "talk: 12 usable records then, 13 now"]),
    ],
)
def test_changed_records_are_refused(locked_overrides, work_folder, change, expected):
    change(work_folder)
    text = read_refusal(*locked_overrides)
    assert all(f"\n  {part}" in text for part in expected) and "seen:" not in text, text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources.talk.weight=3", "talk: weight was 1.0, is 3.0"),
        ("data.sources.seen.max_tiles=1", "seen: max_tiles was not given, is 1"),
        ("data.sources.seen.fraction=0.5", "seen: fraction was not given, is 0.5"),
        ("~data.sources.talk", "talk: it was trained on then, and is not now"),
        ("data.weights_in=tokens", 'weights_in was "samples", is "tokens"'),
        ("data.share.ko=0.5", "data.share.ko was not given, is 0.5"),
        ("data.global_batch_size=2", "data.global_batch_size was 4, is 2"),
        ("data.validation.fraction=0.2", "talk: 12 usable records then, 10 now"),
        ("seed=1", "seed was 0, is 1"),
        ("model.grid=1", "the tokenizer, the chat template or the image settings changed"),
        ("data.tiling=base", "the tokenizer, the chat template or the image settings changed"),
    ],
)
def test_other_settings_are_refused(locked_overrides, override, expected):
    assert f"\n  {expected}" in read_refusal(*locked_overrides, override)


def test_another_chat_template_is_refused(locked_overrides, work_folder):
    (ready,) = work_folder.glob("runs/parts/tiny_qwen2*/chat_template.jinja")
    template = ready.read_text("utf-8").replace("<|im_start|>", "<|im_start|> ", 1)
    (work_folder / "other.jinja").write_text(template, encoding="utf-8")
    text = read_refusal(*locked_overrides, f"model.chat_template={work_folder / 'other.jinja'}")
    assert "the tokenizer, the chat template or the image settings changed" in text


def test_settings_that_do_not_affect_the_mixture_are_no_change(locked_overrides):
    overrides = ["data.num_workers=1", "data.index_workers=1", "data.index_dir=other", "trainer.max_steps=2"]
    assert run(*locked_overrides, *overrides).manifest["status"] == "finished"


def test_without_data_lock_the_change_is_reported(overrides, work_folder, capsys):
    first = run_prepare(*overrides, "run_name=mine")
    before = (first.dir / "mixture.lock").read_bytes()
    capsys.readouterr()
    run_prepare(*overrides, "run_name=mine")
    assert "since mixture.lock was written" not in capsys.readouterr().out
    change_answers(work_folder)
    run_prepare(*overrides, "run_name=mine", "data.sources.seen.weight=3")
    output = capsys.readouterr().out
    assert "since mixture.lock was written: talk: what its records say changed" in output
    assert "since mixture.lock was written: seen: weight was 2.0, is 3.0" in output
    assert (first.dir / "mixture.lock").read_bytes() != before


def test_a_missing_lock_file_is_named(overrides):
    with pytest.raises(UserError, match=r"nowhere/mixture\.lock: No such file or directory"):
        run(*overrides, "stage=sft", "data.lock=nowhere/mixture.lock")
