"""Tests of the exported model of a run, with any callbacks, and of task=export, which exports a checkpoint."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_cases import build_overrides, kill_at_micro_batch, run_undisturbed, start
from run_helpers import RUN, TWO, RunOutput
from safetensors.torch import load_file
from waiting import PATIENCE

from lit_vlm.config import parse
from lit_vlm.evaluation.exam import get_answers_path
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.tasks.export import export
from lit_vlm.types import UserError

LORA = "sft"  # stage of resume_cases with LoRA of the language model


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(autouse=True)
def current_folder(work_folder, monkeypatch):
    monkeypatch.chdir(work_folder)


@pytest.fixture(scope="module")
def get_run_pair(work_folder):
    """Return a function: stage -> the same run with its own export and without, and its overrides."""
    pairs: dict[str, tuple[RunOutput, RunOutput, list[str]]] = {}

    def get_pair(stage: str) -> tuple[RunOutput, RunOutput, list[str]]:
        if stage not in pairs:
            overrides = build_overrides(work_folder, stage)
            run_undisturbed([*overrides, f"run_name={stage}_own", "export=true"], work_folder, finished=True)
            run_undisturbed([*overrides, f"run_name={stage}_later"], work_folder)
            pairs[stage] = (
                RunOutput(work_folder / "runs" / f"{stage}_own"),
                RunOutput(work_folder / "runs" / f"{stage}_later"),
                overrides,
            )
        return pairs[stage]

    return get_pair


def run_in_process(*overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which does not share this one's locks."""
    return subprocess.run(
        [sys.executable, str(RUN), *overrides], capture_output=True, text=True, timeout=PATIENCE, check=check
    )


def run_export(*overrides: str) -> None:
    export(parse(["task=export", *overrides]))


def check_same_folder(one: Path, other: Path) -> None:
    """Check that all files are equal byte by byte, including weights and template."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    different = [name for name in sorted(names) if (one / name).read_bytes() != (other / name).read_bytes()]
    assert different == []


@pytest.mark.parametrize("stage", ["align", LORA, "dpo"])
def test_the_exported_folder_equals_the_one_that_the_run_itself_exports(get_run_pair, stage):
    own, later, _ = get_run_pair(stage)
    assert own.hf.is_dir() and not later.hf.exists()
    run_export(f"init_from={later.dir}")
    check_same_folder(own.hf, later.hf)
    assert later.manifest["weights_digest"] == own.manifest["weights_digest"] and later.manifest["status"] == "finished"
    shutil.rmtree(later.hf)


def test_the_exported_model_gives_the_same_logits(get_run_pair):
    from transformers import AutoModelForImageTextToText

    own, later, _ = get_run_pair("align")
    run_export(f"init_from={later.dir}")
    models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in (own.hf, later.hf)]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in models)
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="is there already.*overwrite=true"):
        run_export(f"init_from={later.dir}")
    run_export(f"init_from={later.dir}", "overwrite=true")
    shutil.rmtree(later.hf)


def test_a_killed_run_exports_its_last_checkpoint_to_a_folder_named_after_the_step(work_folder, get_run_pair):
    _, later, overrides = get_run_pair("align")
    overrides = [*overrides, "run_name=killed", "checkpoint.asynchronous=false"]
    assert (
        -signal.SIGKILL in start(overrides, work_folder, 1, kill_at_micro_batch(3 * later.manifest["plan"]["k"])).wait()
    )
    folder = work_folder / "runs" / "killed"
    steps = sorted((folder / "checkpoints").glob("step-*"))
    run_export(f"init_from={folder}")
    assert not (folder / "hf").exists() and (folder / f"hf-{steps[-1].name}" / "config.json").is_file()
    run_export(f"init_from={folder}", f"resume_from={steps[0]}")
    one, other = (load_file(folder / f"hf-{path.name}" / "model.safetensors") for path in (steps[0], steps[-1]))
    assert one.keys() == other.keys() and any(not torch.equal(one[key], other[key]) for key in one)


def test_a_run_under_way_exports_its_last_checkpoint_while_it_trains_on(work_folder, get_run_pair):
    own, later, overrides = get_run_pair("align")
    overrides = [*overrides, "run_name=running", "checkpoint.asynchronous=false", "export=true"]
    stopped = start(overrides, work_folder, 1, kill_at_micro_batch(3 * later.manifest["plan"]["k"]))
    assert -signal.SIGKILL in stopped.wait()
    folder = work_folder / "runs" / "running"
    with RunLock(folder) as held:  # as the running process holds it
        held.acquire()
        run_in_process("task=export", f"init_from={folder}")
        (exported,) = folder.glob("hf-step-*")
        assert (exported / "config.json").is_file() and not (folder / "hf").exists()
    assert get_answers_path(str(exported), work_folder) == folder / "exam" / exported.name / "exam.jsonl"
    run_undisturbed(overrides, work_folder, finished=True)
    check_same_folder(own.hf, folder / "hf")


def test_a_finished_run_that_another_process_changes_is_not_exported(get_run_pair):
    _, later, _ = get_run_pair("align")
    with RunLock(later.dir) as held:
        held.acquire()
        done = run_in_process("task=export", f"init_from={later.dir}", check=False)
    assert done.returncode != 0 and "under way already" in " ".join(done.stderr.split()) and not later.hf.exists()


def test_a_lost_manifest_does_not_prevent_the_export(get_run_pair):
    own, later, _ = get_run_pair("align")
    manifest = (later.dir / "manifest.json").read_bytes()
    (later.dir / "manifest.json").write_bytes(manifest[:100])
    run_export(f"init_from={later.dir}")
    (later.dir / "manifest.json").write_bytes(manifest)
    (folder,) = later.dir.glob("hf-step-*")
    check_same_folder(own.hf, folder)
    shutil.rmtree(folder)


def test_a_corrupt_checkpoint_is_named_and_the_preceding_one_is_used(get_run_pair, work_folder, capsys):
    _, later, _ = get_run_pair("align")
    copy = Path(shutil.copytree(later.dir, work_folder / "runs" / "damaged"))
    newest = max((copy / "checkpoints").glob("step-*"))
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    run_export(f"init_from={copy}")
    assert "its SHA-256 differs. Takes the one before" in " ".join(capsys.readouterr().out.split())
    steps = sorted((copy / "checkpoints").glob("step-*"))
    assert [path.name for path in copy.glob("hf-step-*")] == [f"hf-{steps[-2].name}"]


def test_a_chat_template_other_than_in_training_is_refused(get_run_pair, work_folder):
    own, _, _ = get_run_pair("align")
    overrides = build_overrides(
        work_folder, LORA, f"init_from={work_folder / 'start'}", "run_name=from_start", "trainer.max_steps=1"
    )
    shutil.copytree(own.hf, work_folder / "start")
    run_undisturbed(overrides, work_folder)
    template = work_folder / "start" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ '' }}")
    with pytest.raises(UserError, match="start: .*tokenizer, chat template or image settings are others now"):
        run_export(f"init_from={work_folder / 'runs' / 'from_start'}")
    shutil.copy(own.hf / "chat_template.jinja", template)
    run_export(f"init_from={work_folder / 'runs' / 'from_start'}")


@pytest.mark.slow
def test_checkpoints_of_two_ranks_export_the_same_model(get_run_pair, work_folder):
    get_run_pair("align")
    overrides = [*build_overrides(work_folder, "align"), *TWO, "run_name=two"]
    assert start(overrides, work_folder, 2).wait() == [0, 0]
    run_export(f"init_from={work_folder / 'runs' / 'two'}")
    one, other = (load_file(work_folder / "runs" / name / "hf" / "model.safetensors") for name in ("two", "align_own"))
    assert all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-3) for key in other)


def test_a_folder_without_a_run_is_refused_with_what_is_needed(work_folder):
    with pytest.raises(UserError, match=r"holds no checkpoints/. Name the folder of a run that has checkpoints"):
        run_export(f"init_from={work_folder}")


def test_a_run_without_a_model_reports_it_and_the_command_to_export_one(get_run_pair, work_folder, capsys):
    _, later, overrides = get_run_pair("align")
    capsys.readouterr()
    run_again(overrides, "run_name=align_later")
    output = " ".join(capsys.readouterr().out.split())
    assert "finished already" in output and f"task=export init_from={later.dir}" in output
    with pytest.raises(UserError, match=r"that run is finished and left no model there .* task=export init_from="):
        run_again(overrides, "run_name=child", f"init_from={later.hf}")


def run_again(overrides: list[str], *extra: str) -> None:
    from lit_vlm.tasks.train import train

    train(parse([*overrides, *extra]))


def test_user_callbacks_do_not_prevent_the_export(get_run_pair, work_folder, capsys, monkeypatch):
    monkeypatch.syspath_prepend(work_folder)
    _, _, overrides = get_run_pair("align")
    (work_folder / "own_callback.py").write_text("import lightning\nclass Mine(lightning.Callback):\n    pass\n")
    run_again(overrides, "run_name=own", "export=true", "callbacks=[only,own_callback.Mine]", "trainer.max_steps=1")
    output = " ".join(capsys.readouterr().out.split())
    assert f"done. Model: {work_folder / 'runs' / 'own' / 'hf'}" in output
    assert (work_folder / "runs" / "own" / "hf" / "config.json").is_file()


def test_the_best_command_of_a_sweep_exports_a_model():
    from lit_vlm.sweep.sweep_file import build_trial_overrides, format_trial_command, try_read_sweep

    for path in sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml")):
        file, errors = try_read_sweep(path)
        assert not errors
        values = {key: one.list_example_values()[0] for key, one in file.search_space.items()} | file.fixed
        assert "export=false" in build_trial_overrides(file, values, [])
        assert "export" not in format_trial_command(file, values, ["export=false"])
