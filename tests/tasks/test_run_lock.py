"""mixture.lock through the commands: written by task=prepare, held to by data.lock, and what changed said in words."""

from pathlib import Path

import pytest
from mixture_cases import run_prepare
from run_helpers import make_conversations, make_llava_record, run, save_photos, write_data_choice, write_records

from lit_vlm.types import UserError


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_photos(tmp_path / "images")
    write_records(tmp_path / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {i}.") for i in range(12)])
    write_records(tmp_path / "seen.jsonl", make_conversations(12))
    return tmp_path


@pytest.fixture
def words(place) -> list[str]:
    sources = {
        "talk": {"path": str(place / "talk.jsonl"), "weight": 1},
        "seen": {"path": str(place / "seen.jsonl"), "image_root": str(place / "images"), "weight": 2},
    }
    return write_data_choice(place, sources=sources)


@pytest.fixture
def locked(words) -> list[str]:
    """Words of a run that is held to the lock of what was prepared; another run, or its own manifest would say it first."""
    lock = run_prepare(*words, "run_name=before").dir / "mixture.lock"
    return [*words, "stage=sft", "run_name=after", f"data.lock={lock}", "callbacks=[export]"]


def refused(*words: str) -> str:
    """The message, of training and of preparing alike; nothing is trained and no lock is written."""
    said = []
    for task in (run, run_prepare):
        with pytest.raises(UserError) as caught:
            task(*words)
        said.append(str(caught.value))
    folder = Path("runs") / "after"
    assert not any((folder / name).exists() for name in ("manifest.json", "hf", "mixture.lock", "metrics.csv"))
    assert said[0] == said[1] and "Bring them back, or take data.lock away to train on what is there." in said[0]
    return said[0]


def test_the_same_data_are_trained_on_and_give_the_same_lock_file(locked):
    ran = run(*locked)
    assert ran.manifest["status"] == "finished"
    assert (ran.dir / "mixture.lock").read_bytes() == (ran.dir.parent / "before" / "mixture.lock").read_bytes()


def answer(place: Path) -> None:
    write_records(place / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {(i + 1) % 12}.") for i in range(12)])


def more(place: Path) -> None:
    write_records(place / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {i}.") for i in range(13)])


def order(place: Path) -> None:
    write_records(place / "talk.jsonl", [make_llava_record(f"{i}?", f"Answer {i}.") for i in reversed(range(12))])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (answer, ["talk: what its records say changed"]),
        (order, ["talk: what its records say changed"]),
        (more, ["talk: 12 records then, 13 now", "talk: 12 usable records then, 13 now"]),
    ],
)
def test_changed_records_are_refused(locked, place, change, said):
    change(place)
    text = refused(*locked)
    assert all(f"\n  {part}" in text for part in said) and "seen:" not in text, text


@pytest.mark.parametrize(
    ("word", "said"),
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
def test_other_settings_are_refused(locked, word, said):
    assert f"\n  {said}" in refused(*locked, word)


def test_another_chat_template_is_refused(locked, place):
    (ready,) = place.glob("runs/parts/tiny_qwen2*/chat_template.jinja")
    template = ready.read_text("utf-8").replace("<|im_start|>", "<|im_start|> ", 1)
    (place / "other.jinja").write_text(template, encoding="utf-8")
    text = refused(*locked, f"model.chat_template={place / 'other.jinja'}")
    assert "the tokenizer, the chat template or the image settings changed" in text


def test_settings_that_do_not_affect_the_mixture_are_no_change(locked):
    words = ["data.num_workers=1", "data.index_workers=1", "data.index_dir=other", "trainer.max_steps=2"]
    assert run(*locked, *words).manifest["status"] == "finished"


def test_without_data_lock_the_change_is_reported(words, place, capsys):
    first = run_prepare(*words, "run_name=mine")
    before = (first.dir / "mixture.lock").read_bytes()
    capsys.readouterr()
    run_prepare(*words, "run_name=mine")
    assert "since mixture.lock was written" not in capsys.readouterr().out
    answer(place)
    run_prepare(*words, "run_name=mine", "data.sources.seen.weight=3")
    said = capsys.readouterr().out
    assert "since mixture.lock was written: talk: what its records say changed" in said
    assert "since mixture.lock was written: seen: weight was 2.0, is 3.0" in said
    assert (first.dir / "mixture.lock").read_bytes() != before


def test_a_missing_lock_file_is_named(words):
    with pytest.raises(UserError, match=r"nowhere/mixture\.lock: No such file or directory"):
        run(*words, "stage=sft", "data.lock=nowhere/mixture.lock")
