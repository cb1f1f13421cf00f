"""Tests that a resumed run uses the template date, tokenizer and images of its plan, and resumes without a manifest."""

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
from lit_vlm.tasks import prepare_data
from lit_vlm.types import UserError

DAY = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}"


def set_today(day: str):
    """Return a patch that sets today's date for this project and for transformers."""

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

        prepare_data.date, utils.datetime = Today, Now

    return patch


def combine_patches(*patches):
    return lambda: [patch() for patch in patches]


# The date that a chat template writes


@pytest.fixture(scope="module")
def dated_run(tmp_path_factory) -> tuple[Path, list[str]]:
    work_folder = tmp_path_factory.mktemp("dated")
    (work_folder / "t.jinja").write_text(DAY + CHATML)
    overrides = build_overrides(
        work_folder, "sft", f"model.chat_template={work_folder / 't.jinja'}", "checkpoint.asynchronous=false"
    )
    run_undisturbed([*overrides, "run_name=whole", "model.template_date=2026-04-30"], work_folder)
    return work_folder, overrides


def test_a_run_resumed_in_another_month_uses_the_template_date_of_its_start(dated_run):
    work_folder, overrides = dated_run
    overrides, k = [*overrides, "run_name=killed"], RunOutput(work_folder / "runs" / "whole").manifest["plan"]["k"]
    assert (
        -signal.SIGKILL
        in start(overrides, work_folder, 1, combine_patches(set_today("2026-04-30"), kill_at_micro_batch(2 * k))).wait()
    )
    code, output = run_to_end(overrides, work_folder, 1, set_today("2026-09-23"))
    assert code == 0 and "resumes at step" in output, output
    assert (
        "the chat template writes today's date; in all that this run reads it is 2026-04-30, as when it was" in output
    )
    one, other = read_last_state(work_folder, "whole"), read_last_state(work_folder, "killed")
    assert one.files == other.files and read_metrics(work_folder, "whole") == read_metrics(work_folder, "killed")
    assert not (work_folder / "runs" / "killed" / "ledger.jsonl").exists()
    manifest = RunOutput(work_folder / "runs" / "killed").manifest
    assert manifest["template_date"] == "2026-04-30"
    assert json.loads((work_folder / "runs" / "killed" / "mixture.lock").read_text())["template_date"] == "2026-04-30"


def test_a_changed_chat_template_in_the_same_file_is_refused_on_resume(dated_run):
    work_folder, overrides = dated_run
    overrides, k = [*overrides, "run_name=edited"], RunOutput(work_folder / "runs" / "whole").manifest["plan"]["k"]
    assert -signal.SIGKILL in start(overrides, work_folder, 1, kill_at_micro_batch(2 * k)).wait()
    before = (work_folder / "t.jinja").read_text()
    (work_folder / "t.jinja").write_text(before.replace("Today", "Again"))
    code, output = run_to_end(overrides, work_folder)
    (work_folder / "t.jinja").write_text(before)
    assert code == 1 and "another tokenizer, chat template (or day that it writes), or image settings" in output, output
    assert run_to_end(overrides, work_folder)[0] == 0


def test_prepared_data_are_trained_on_with_the_template_date_of_preparing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text(DAY + CHATML)
    write_records(tmp_path / "a.jsonl", [make_llava_record(f"question {n}", f"answer {n}") for n in range(8)])
    overrides = ["stage=sft", "data=llava_json", "data.sources.mine.path=a.jsonl", "model.chat_template=t.jinja"]
    overrides += ["run_name=a", "data.validation.fraction=0", "trainer.max_steps=1", "callbacks=[]", "export=false"]
    overrides += ["stage.trainable=[language_model]"]
    today = prepare_data.date
    monkeypatch.setattr(
        prepare_data, "date", type("Day", (date,), {"today": classmethod(lambda cls: date(2026, 4, 30))})
    )
    run_prepare(*overrides)
    monkeypatch.setattr(prepare_data, "date", today)
    capsys.readouterr()
    run_output = run(*overrides)
    output = capsys.readouterr().out
    assert (
        run_output.manifest["template_date"] == "2026-04-30" and "2026-04-30, as when it was first prepared" in output
    )
    assert "since mixture.lock was written" not in output
    assert (
        run(*overrides, "run_name=b", f"data.lock={run_output.dir / 'mixture.lock'}").manifest["template_date"]
        == "2026-04-30"
    )
    fresh = run(*overrides, "run_name=c").manifest["template_date"]
    assert fresh != "2026-04-30"
    with pytest.raises(UserError, match=r"model.template_date=yesterday: is no day"):
        run(*overrides, "run_name=d", "model.template_date=yesterday")


# Images


def write_images(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(16):
        pixels = np.random.default_rng(100 * seed + number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")


@pytest.fixture(scope="module")
def image_run(tmp_path_factory) -> tuple[Path, list[str]]:
    work_folder = tmp_path_factory.mktemp("pictured")
    write_images(work_folder / "images", 0)
    write_records(
        work_folder / "a.jsonl",
        [make_llava_record(f"<image>\nq{n}", f"answer {n:02d}", image=f"{n}.bmp", id=str(n)) for n in range(16)],
    )
    overrides = [*TINY, "stage=sft", "data=llava_json", "data.sources.mine.path=a.jsonl", "data.validation.fraction=0"]
    overrides += [
        "data.sources.mine.image_root=images",
        "trainer.max_steps=4",
        "checkpoint.every_steps=1",
        "callbacks=[guard]",
    ]
    overrides += ["checkpoint.asynchronous=false", "export=false", "data.tiling=base"]
    run_undisturbed([*overrides, "run_name=whole"], work_folder)
    return work_folder, overrides


def start_and_kill(work_folder: Path, overrides: list[str]) -> None:
    assert -signal.SIGKILL in start(overrides, work_folder, 1, kill_at_micro_batch(2)).wait()


def test_replaced_images_end_a_resumed_run_and_the_restored_ones_let_it_resume(image_run):
    work_folder, overrides = image_run
    overrides = [*overrides, "run_name=replaced"]
    start_and_kill(work_folder, overrides)
    shutil.copytree(work_folder / "images", work_folder / "old")
    write_images(work_folder / "images", 1)
    code, output = run_to_end(overrides, work_folder)
    assert code == 1 and ".bmp' holds something else than when it was indexed: a file was replaced since" in output, (
        output
    )
    assert "Traceback" not in output and not (work_folder / "runs" / "replaced" / "ledger.jsonl").exists()
    shutil.rmtree(work_folder / "images")
    # With new modification times
    shutil.copytree(work_folder / "old", work_folder / "images", copy_function=shutil.copyfile)
    code, output = run_to_end(overrides, work_folder)
    assert code == 0 and "resumes at step" in output, output
    assert is_same_state(read_last_state(work_folder, "whole"), read_last_state(work_folder, "replaced"))


def test_replaced_and_prepared_images_make_another_run(image_run, monkeypatch):
    work_folder, overrides = image_run
    overrides = [*overrides, "run_name=prepared"]
    start_and_kill(work_folder, overrides)
    shutil.copytree(work_folder / "images", work_folder / "kept")
    write_images(work_folder / "images", 2)
    monkeypatch.chdir(work_folder)
    run_prepare(*overrides[len(TINY) :])
    code, output = run_to_end(overrides, work_folder)
    assert code == 1 and "another content of the pictures" in output, output
    shutil.rmtree(work_folder / "images")
    shutil.move(work_folder / "kept", work_folder / "images")
    run_prepare(*overrides[len(TINY) :])
    assert run_to_end(overrides, work_folder)[0] == 0
    assert is_same_state(read_last_state(work_folder, "whole"), read_last_state(work_folder, "prepared"))


# A lost manifest


DAMAGE = {"empty": b"", "cut": None, "no object": b"[]\n", "without its settings": b"{}"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_with_a_damaged_manifest_resumes_from_its_checkpoint(image_run, damage):
    work_folder, overrides = image_run
    name = damage.replace(" ", "_")
    overrides = [*overrides, f"run_name={name}"]
    start_and_kill(work_folder, overrides)
    manifest = work_folder / "runs" / name / "manifest.json"
    data = DAMAGE[damage]
    manifest.write_bytes(manifest.read_bytes()[:200] if data is None else data)
    code, output = run_to_end(overrides, work_folder)
    assert code == 0 and "Traceback" not in output, output
    assert f"{manifest} is damaged: " in output and "It is made again from the checkpoint of step" in output
    assert RunOutput(manifest.parent).manifest["status"] == "finished"
    assert is_same_state(read_last_state(work_folder, "whole"), read_last_state(work_folder, name))


def test_a_run_of_other_settings_is_refused_although_the_manifest_is_lost(image_run):
    work_folder, overrides = image_run
    overrides = [*overrides, "run_name=other"]
    start_and_kill(work_folder, overrides)
    (work_folder / "runs" / "other" / "manifest.json").write_bytes(b"")
    (work_folder / "runs" / "other" / "config.yaml").unlink()
    code, output = run_to_end([*overrides, "stage.learning_rate=0.123"], work_folder)
    assert code == 1 and "stage.learning_rate" in output, output
    code, output = run_to_end(overrides, work_folder)
    assert code == 0, output


def test_a_finished_run_with_a_damaged_manifest_stays_finished_and_the_next_stage_starts_from_it(
    image_run, monkeypatch, capsys
):
    work_folder, overrides = image_run
    monkeypatch.chdir(work_folder)
    run_overrides = [*overrides[len(TINY) :], "run_name=done", "export=true"]
    done = run(*run_overrides)
    weights = done.manifest["weights_digest"]
    (done.dir / "manifest.json").write_bytes(b"")
    child = run(*overrides[len(TINY) :], "run_name=child", f"init_from={done.hf}", "trainer.max_steps=1")
    assert child.manifest["parent"]["digest"] == weights
    capsys.readouterr()
    run(*run_overrides)
    output = " ".join(capsys.readouterr().out.split())
    assert "manifest.json is damaged: it is empty" in output and "finished already" in output, output
    assert done.manifest["weights_digest"] == weights and done.manifest["status"] == "finished"
    capsys.readouterr()
    run(*run_overrides)
    assert "damaged" not in capsys.readouterr().out


def test_a_damaged_lock_file_and_budget_are_written_again(image_run, monkeypatch, capsys):
    work_folder, overrides = image_run
    monkeypatch.chdir(work_folder)
    run_overrides = [*overrides[len(TINY) :], "run_name=lock"]
    folder = work_folder / "runs" / "lock"
    folder.mkdir(parents=True)
    (folder / "mixture.lock").write_text('{"version": 1, "sou')
    (folder / "budget.json").write_text('{"tokens": "a", "tiles": 1, "of_tokens": 16384, "of_tiles": 64, "halved": 1}')
    assert run(*run_overrides).manifest["status"] == "finished"
    assert "It is written anew" in " ".join(capsys.readouterr().out.split())
    assert json.loads((folder / "mixture.lock").read_text())["version"] == 1
