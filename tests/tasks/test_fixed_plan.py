"""A run that goes on reads what it was planned with: the day in its template, its tokenizer, its pictures; and it goes on when
its manifest is lost."""

import json
import shutil
import signal
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from mixture_cases import run_prepare
from PIL import Image
from resume_cases import (
    build_overrides,
    is_same_state,
    kill_at_micro_batch,
    read_last_state,
    read_metrics,
    run_to_end,
    run_undisturbed,
    start,
)
from run_helpers import TINY, RunOutput, make_llava_record, run, write_records

from lit_vlm.model.vocabulary import CHATML
from lit_vlm.tasks import stage_data
from lit_vlm.types import UserError

DAY = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}"


def on(day: str):
    """A patch: today is that day, for us and for transformers."""

    def patch() -> None:
        import transformers.utils.chat_template_utils as utils

        class Today(date):
            @classmethod
            def today(cls):
                return date.fromisoformat(day)

        class Now(utils.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        stage_data.date, utils.datetime = Today, Now

    return patch


def also(*patches):
    return lambda: [patch() for patch in patches]


# The day that a template writes


@pytest.fixture(scope="module")
def dated(tmp_path_factory) -> tuple[Path, list[str]]:
    place = tmp_path_factory.mktemp("dated")
    (place / "t.jinja").write_text(DAY + CHATML)
    words = build_overrides(place, "sft", f"model.chat_template={place / 't.jinja'}", "checkpoint.asynchronous=false")
    run_undisturbed([*words, "run_name=whole", "model.template_date=2026-04-30"], place)
    return place, words


def test_a_run_resumed_in_another_month_uses_the_template_date_of_its_start(dated):
    place, words = dated
    words, k = [*words, "run_name=killed"], RunOutput(place / "runs" / "whole").manifest["plan"]["k"]
    assert -signal.SIGKILL in start(words, place, 1, also(on("2026-04-30"), kill_at_micro_batch(2 * k))).wait()
    code, said = run_to_end(words, place, 1, on("2026-09-23"))
    assert code == 0 and "goes on at step" in said, said
    assert "the chat template writes today's date; in all that this run reads it is 2026-04-30, as when it was" in said
    one, other = read_last_state(place, "whole"), read_last_state(place, "killed")
    assert one.files == other.files and read_metrics(place, "whole") == read_metrics(place, "killed")
    assert not (place / "runs" / "killed" / "ledger.jsonl").exists()
    manifest = RunOutput(place / "runs" / "killed").manifest
    assert manifest["template_date"] == "2026-04-30"
    assert json.loads((place / "runs" / "killed" / "mixture.lock").read_text())["template_date"] == "2026-04-30"


def test_a_changed_chat_template_in_the_same_file_is_refused_on_resume(dated):
    place, words = dated
    words, k = [*words, "run_name=edited"], RunOutput(place / "runs" / "whole").manifest["plan"]["k"]
    assert -signal.SIGKILL in start(words, place, 1, kill_at_micro_batch(2 * k)).wait()
    before = (place / "t.jinja").read_text()
    (place / "t.jinja").write_text(before.replace("Today", "Again"))
    code, said = run_to_end(words, place)
    (place / "t.jinja").write_text(before)
    assert code == 1 and "another tokenizer, chat template (or day that it writes), or image settings" in said, said
    assert run_to_end(words, place)[0] == 0


def test_prepared_data_are_trained_on_with_the_template_date_of_preparing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text(DAY + CHATML)
    write_records(tmp_path / "a.jsonl", [make_llava_record(f"question {n}", f"answer {n}") for n in range(8)])
    words = ["stage=sft", "data=llava_json", "data.sources.mine.path=a.jsonl", "model.chat_template=t.jinja"]
    words += ["run_name=a", "data.validation.fraction=0", "trainer.max_steps=1", "callbacks=[]", "export=false"]
    words += ["stage.trainable=[language_model]"]
    today = stage_data.date
    monkeypatch.setattr(stage_data, "date", type("Day", (date,), {"today": classmethod(lambda cls: date(2026, 4, 30))}))
    run_prepare(*words)
    monkeypatch.setattr(stage_data, "date", today)
    capsys.readouterr()
    ran = run(*words)
    said = capsys.readouterr().out
    assert ran.manifest["template_date"] == "2026-04-30" and "2026-04-30, as when it was first prepared" in said
    assert "since mixture.lock was written" not in said
    assert run(*words, "run_name=b", f"data.lock={ran.dir / 'mixture.lock'}").manifest["template_date"] == "2026-04-30"
    fresh = run(*words, "run_name=c").manifest["template_date"]
    assert fresh != "2026-04-30"
    with pytest.raises(UserError, match=r"model.template_date=yesterday: is no day"):
        run(*words, "run_name=d", "model.template_date=yesterday")


# Pictures


def draw(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(16):
        pixels = np.random.default_rng(100 * seed + number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory) -> tuple[Path, list[str]]:
    place = tmp_path_factory.mktemp("pictured")
    draw(place / "images", 0)
    write_records(
        place / "a.jsonl",
        [make_llava_record(f"<image>\nq{n}", f"answer {n:02d}", image=f"{n}.bmp", id=str(n)) for n in range(16)],
    )
    words = [*TINY, "stage=sft", "data=llava_json", "data.sources.mine.path=a.jsonl", "data.validation.fraction=0"]
    words += [
        "data.sources.mine.image_root=images",
        "trainer.max_steps=4",
        "checkpoint.every_steps=1",
        "callbacks=[guard]",
    ]
    words += ["checkpoint.asynchronous=false", "export=false", "data.tiling=base"]
    run_undisturbed([*words, "run_name=whole"], place)
    return place, words


def killed(place: Path, words: list[str]) -> None:
    assert -signal.SIGKILL in start(words, place, 1, kill_at_micro_batch(2)).wait()


def test_replaced_images_end_a_resumed_run_and_the_restored_ones_let_it_resume(pictured):
    place, words = pictured
    words = [*words, "run_name=replaced"]
    killed(place, words)
    shutil.copytree(place / "images", place / "old")
    draw(place / "images", 1)
    code, said = run_to_end(words, place)
    assert code == 1 and ".bmp' holds something else than when it was indexed: a file was replaced since" in said, said
    assert "Traceback" not in said and not (place / "runs" / "replaced" / "ledger.jsonl").exists()
    shutil.rmtree(place / "images")
    shutil.copytree(place / "old", place / "images", copy_function=shutil.copyfile)  # with times of their own
    code, said = run_to_end(words, place)
    assert code == 0 and "goes on at step" in said, said
    assert is_same_state(read_last_state(place, "whole"), read_last_state(place, "replaced"))


def test_replaced_and_prepared_images_make_another_run(pictured, monkeypatch):
    place, words = pictured
    words = [*words, "run_name=prepared"]
    killed(place, words)
    shutil.copytree(place / "images", place / "kept")
    draw(place / "images", 2)
    monkeypatch.chdir(place)
    run_prepare(*words[len(TINY) :])
    code, said = run_to_end(words, place)
    assert code == 1 and "another content of the pictures" in said, said
    shutil.rmtree(place / "images")
    shutil.move(place / "kept", place / "images")
    run_prepare(*words[len(TINY) :])
    assert run_to_end(words, place)[0] == 0
    assert is_same_state(read_last_state(place, "whole"), read_last_state(place, "prepared"))


# A manifest that is lost


DAMAGE = {"empty": b"", "cut": None, "no object": b"[]\n", "without its settings": b"{}"}


@pytest.mark.parametrize("zero_second_half", DAMAGE)
def test_a_run_with_a_damaged_manifest_resumes_from_its_checkpoint(pictured, zero_second_half):
    place, words = pictured
    name = zero_second_half.replace(" ", "_")
    words = [*words, f"run_name={name}"]
    killed(place, words)
    manifest = place / "runs" / name / "manifest.json"
    data = DAMAGE[zero_second_half]
    manifest.write_bytes(manifest.read_bytes()[:200] if data is None else data)
    code, said = run_to_end(words, place)
    assert code == 0 and "Traceback" not in said, said
    assert f"{manifest} is damaged: " in said and "It is made again from the checkpoint of step" in said
    assert RunOutput(manifest.parent).manifest["status"] == "finished"
    assert is_same_state(read_last_state(place, "whole"), read_last_state(place, name))


def test_a_run_of_other_settings_is_refused_although_the_manifest_is_lost(pictured):
    place, words = pictured
    words = [*words, "run_name=other"]
    killed(place, words)
    (place / "runs" / "other" / "manifest.json").write_bytes(b"")
    (place / "runs" / "other" / "config.yaml").unlink()
    code, said = run_to_end([*words, "stage.learning_rate=0.123"], place)
    assert code == 1 and "stage.learning_rate" in said, said
    code, said = run_to_end(words, place)
    assert code == 0, said


def test_a_finished_run_with_a_damaged_manifest_stays_finished_and_the_next_stage_starts_from_it(
    pictured, monkeypatch, capsys
):
    place, words = pictured
    monkeypatch.chdir(place)
    own = [*words[len(TINY) :], "run_name=done", "export=true"]
    done = run(*own)
    weights = done.manifest["weights_digest"]
    (done.dir / "manifest.json").write_bytes(b"")
    child = run(*words[len(TINY) :], "run_name=child", f"init_from={done.hf}", "trainer.max_steps=1")
    assert child.manifest["parent"]["digest"] == weights
    capsys.readouterr()
    run(*own)
    said = " ".join(capsys.readouterr().out.split())
    assert "manifest.json is damaged: it is empty" in said and "finished already" in said, said
    assert done.manifest["weights_digest"] == weights and done.manifest["status"] == "finished"
    capsys.readouterr()
    run(*own)
    assert "damaged" not in capsys.readouterr().out


def test_a_damaged_lock_file_and_budget_are_written_again(pictured, monkeypatch, capsys):
    place, words = pictured
    monkeypatch.chdir(place)
    own = [*words[len(TINY) :], "run_name=lock"]
    folder = place / "runs" / "lock"
    folder.mkdir(parents=True)
    (folder / "mixture.lock").write_text('{"version": 1, "sou')
    (folder / "budget.json").write_text('{"tokens": "a", "tiles": 1, "of_tokens": 16384, "of_tiles": 64, "halved": 1}')
    assert run(*own).manifest["status"] == "finished"
    assert "It is written anew" in " ".join(capsys.readouterr().out.split())
    assert json.loads((folder / "mixture.lock").read_text())["version"] == 1
