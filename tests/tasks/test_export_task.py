"""The model that a run leaves, whatever callbacks are named, and task=export, which makes it of a checkpoint."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from resume_cases import build_overrides, kill_at_micro_batch, run_undisturbed, start
from run_helpers import TWO, RunOutput
from safetensors.torch import load_file

from lit_vlm.config import parse
from lit_vlm.tasks.export import export
from lit_vlm.types import UserError

LORA = "sft"  # of resume_cases: with LoRA of the language model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def pair(place):
    """By stage: the same run with its own export, and without."""
    made: dict[str, tuple[RunOutput, RunOutput, list[str]]] = {}

    def of(stage: str) -> tuple[RunOutput, RunOutput, list[str]]:
        if stage not in made:
            words = build_overrides(place, stage)
            run_undisturbed([*words, f"run_name={stage}_own", "export=true"], place, finished=True)
            run_undisturbed([*words, f"run_name={stage}_later"], place)
            made[stage] = (
                RunOutput(place / "runs" / f"{stage}_own"),
                RunOutput(place / "runs" / f"{stage}_later"),
                words,
            )
        return made[stage]

    return of


def exported(*words: str) -> None:
    export(parse(["task=export", *words]))


def same_folder(one: Path, other: Path) -> None:
    """Every file to the byte, weights and template among them."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    different = [name for name in sorted(names) if (one / name).read_bytes() != (other / name).read_bytes()]
    assert different == []


@pytest.mark.parametrize("stage", ["align", LORA, "dpo"])
def test_the_exported_folder_equals_the_one_that_the_run_itself_exports(pair, stage):
    own, later, _ = pair(stage)
    assert own.hf.is_dir() and not later.hf.exists()
    exported(f"init_from={later.dir}")
    same_folder(own.hf, later.hf)
    assert later.manifest["weights_digest"] == own.manifest["weights_digest"] and later.manifest["status"] == "finished"
    shutil.rmtree(later.hf)


def test_the_exported_model_gives_the_same_logits(pair):
    from transformers import AutoModelForImageTextToText

    own, later, _ = pair("align")
    exported(f"init_from={later.dir}")
    models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in (own.hf, later.hf)]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in models)
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="is there already.*overwrite=true"):
        exported(f"init_from={later.dir}")
    exported(f"init_from={later.dir}", "overwrite=true")
    shutil.rmtree(later.hf)


def test_a_killed_run_exports_its_last_checkpoint_to_a_folder_named_after_the_step(place, pair):
    _, later, words = pair("align")
    words = [*words, "run_name=killed", "checkpoint.asynchronous=false"]
    assert -signal.SIGKILL in start(words, place, 1, kill_at_micro_batch(3 * later.manifest["plan"]["k"])).wait()
    folder = place / "runs" / "killed"
    steps = sorted((folder / "checkpoints").glob("step-*"))
    exported(f"init_from={folder}")
    assert not (folder / "hf").exists() and (folder / f"hf-{steps[-1].name}" / "config.json").is_file()
    exported(f"init_from={folder}", f"resume_from={steps[0]}")
    one, other = (load_file(folder / f"hf-{path.name}" / "model.safetensors") for path in (steps[0], steps[-1]))
    assert one.keys() == other.keys() and any(not torch.equal(one[key], other[key]) for key in one)


def test_a_lost_manifest_does_not_prevent_the_export(pair):
    own, later, _ = pair("align")
    kept = (later.dir / "manifest.json").read_bytes()
    (later.dir / "manifest.json").write_bytes(kept[:100])
    exported(f"init_from={later.dir}")
    (later.dir / "manifest.json").write_bytes(kept)
    (folder,) = later.dir.glob("hf-step-*")
    same_folder(own.hf, folder)
    shutil.rmtree(folder)


def test_a_corrupt_checkpoint_is_named_and_the_preceding_one_is_used(pair, place, capsys):
    _, later, _ = pair("align")
    copy = Path(shutil.copytree(later.dir, place / "runs" / "damaged"))
    newest = max((copy / "checkpoints").glob("step-*"))
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    exported(f"init_from={copy}")
    assert "its SHA-256 differs. Takes the one before" in " ".join(capsys.readouterr().out.split())
    steps = sorted((copy / "checkpoints").glob("step-*"))
    assert [path.name for path in copy.glob("hf-step-*")] == [f"hf-{steps[-2].name}"]


def test_a_chat_template_other_than_in_training_is_refused(pair, place):
    own, _, _ = pair("align")
    words = build_overrides(place, LORA, f"init_from={place / 'start'}", "run_name=from_start", "trainer.max_steps=1")
    shutil.copytree(own.hf, place / "start")
    run_undisturbed(words, place)
    template = place / "start" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ '' }}")
    with pytest.raises(UserError, match="start: .*tokenizer, chat template or image settings are others now"):
        exported(f"init_from={place / 'runs' / 'from_start'}")
    shutil.copy(own.hf / "chat_template.jinja", template)
    exported(f"init_from={place / 'runs' / 'from_start'}")


@pytest.mark.slow
def test_checkpoints_of_two_ranks_export_the_same_model(pair, place):
    pair("align")
    words = [*build_overrides(place, "align"), *TWO, "run_name=two"]
    assert start(words, place, 2).wait() == [0, 0]
    exported(f"init_from={place / 'runs' / 'two'}")
    one, other = (load_file(place / "runs" / name / "hf" / "model.safetensors") for name in ("two", "align_own"))
    assert all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-3) for key in other)


def test_a_folder_without_a_run_is_refused_with_what_is_needed(place):
    with pytest.raises(UserError, match=r"holds no checkpoints/. Name the folder of a run that has checkpoints"):
        exported(f"init_from={place}")


def test_a_run_without_a_model_reports_it_and_the_command_to_export_one(pair, place, capsys):
    _, later, words = pair("align")
    capsys.readouterr()
    run_again(words, "run_name=align_later")
    said = " ".join(capsys.readouterr().out.split())
    assert "finished already" in said and f"task=export init_from={later.dir}" in said
    with pytest.raises(UserError, match=r"that run is finished and left no model there .* task=export init_from="):
        run_again(words, "run_name=child", f"init_from={later.hf}")


def run_again(words: list[str], *more: str) -> None:
    from lit_vlm.tasks.train import train

    train(parse([*words, *more]))


def test_user_callbacks_do_not_prevent_the_export(pair, place, capsys, monkeypatch):
    monkeypatch.syspath_prepend(place)
    _, _, words = pair("align")
    (place / "own_callback.py").write_text("import lightning\nclass Mine(lightning.Callback):\n    pass\n")
    run_again(words, "run_name=own", "export=true", "callbacks=[only,own_callback.Mine]", "trainer.max_steps=1")
    said = " ".join(capsys.readouterr().out.split())
    assert f"done. Model: {place / 'runs' / 'own' / 'hf'}" in said
    assert (place / "runs" / "own" / "hf" / "config.json").is_file()


def test_the_best_command_of_a_sweep_exports_a_model():
    from lit_vlm.sweep.file import try_read_sweep
    from lit_vlm.sweep.words import build_trial_overrides, format_trial_command

    for path in sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml")):
        file, wrong = try_read_sweep(path)
        assert not wrong
        values = {key: one.list_example_values()[0] for key, one in file.search_space.items()} | file.fixed
        assert "export=false" in build_trial_overrides(file, values, [])
        assert "export" not in format_trial_command(file, values, ["export=false"])
