"""Tests of runs and their folders: run again, refused, overwritten, interrupted; a resumed pipeline; one rank and two."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from run_helpers import (
    RUN,
    TINY,
    TWO,
    RunOutput,
    build_data,
    make_conversations,
    make_llava_record,
    open_place,
    run,
    run_process,
    save_photos,
    write_records,
)
from waiting import PATIENCE

from lit_vlm.checkpoint.index import RunFingerprint
from lit_vlm.config import build_stage_overrides, parse
from lit_vlm.runs.run_folder import open_run_folder, to_plain
from lit_vlm.tasks import pipeline
from lit_vlm.tasks.open_run import open_sources
from lit_vlm.tasks.pipeline import build_command
from lit_vlm.types import UserError
from run import dispatch

real_run = subprocess.run

LLAVA = ["stage=sft", "data=llava_json", "data.sources.mine.path=train.jsonl", "data.sources.mine.image_root=images"]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    save_photos(folder / "images")
    write_records(folder / "train.jsonl", make_conversations())
    return folder


@pytest.fixture(autouse=True)
def current_folder(user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)


def build_overrides(name, *overrides):
    return [*LLAVA, f"run_name={name}", *overrides]


# One run, one folder


def test_a_finished_run_started_again_is_reported_as_finished_and_trains_nothing(capsys):
    run_output = run(*build_overrides("again"))
    before = run_output.take_snapshot()
    capsys.readouterr()
    # Settings of the machine only
    run(*build_overrides("again", "trainer.num_threads=1", "data.num_workers=2", "data.tokens_per_micro_batch=9000"))
    output = capsys.readouterr().out
    assert "again: finished already, in " in output and "overwrite=true" in output
    assert run_output.take_snapshot() == before


def test_a_run_of_before_a_setting_was_added_is_the_same_run_while_the_setting_is_off(capsys):
    run_output = run(*build_overrides("older"))
    manifest = run_output.manifest
    del manifest["config"]["data"]["scaled_decode"]
    (run_output.dir / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    run(*build_overrides("older"))
    assert "older: finished already" in capsys.readouterr().out
    assert "differs from this one in data.scaled_decode" in read_refusal(
        *build_overrides("older", "data.scaled_decode=true")
    )
    stored = {"stage": "align", "settings": manifest["config"]}  # of a checkpoint
    for added, differences in ((False, []), (True, ["data.scaled_decode (it has None, this run True)"])):
        data = {**manifest["config"]["data"], "scaled_decode": added}
        fingerprint = RunFingerprint("align", {**manifest["config"], "data": data})
        assert fingerprint.find_differences(stored) == differences


def read_refusal(*overrides):
    with pytest.raises(UserError) as caught:
        run(*overrides)
    assert "run_name=" in str(caught.value) and "overwrite=true" in str(caught.value)
    return str(caught.value)


def test_another_config_other_data_or_another_parent_under_one_name_is_refused(user_folder):
    first, parent = run(*build_overrides("one")), run(*build_overrides("parent", "seed=3"))
    before = first.take_snapshot()
    assert "differs from this one in trainer.max_steps" in read_refusal(*build_overrides("one", "trainer.max_steps=2"))
    assert "stage.learning_rate" in read_refusal(*build_overrides("one", "stage.learning_rate=1e-4"))
    assert "the model it starts from" in read_refusal(*build_overrides("one", f"init_from={parent.hf}"))
    write_records(user_folder / "more.jsonl", make_conversations(14))
    assert "its data" in read_refusal(*build_overrides("one", "data.sources.mine.path=more.jsonl"))
    assert first.take_snapshot() == before


def test_overwrite_runs_again_with_the_new_settings():
    run(*build_overrides("over"))
    run_output = run(*build_overrides("over", "trainer.max_steps=2", "overwrite=true"))
    assert run_output.manifest["plan"]["steps"] == 2 and run_output.manifest["status"] == "finished"
    assert read_refusal(*build_overrides("over"))  # the former settings now differ from the run


def test_the_same_settings_give_the_same_weights_twice():
    first = run(*build_overrides("same")).load_weights()
    second = run(*build_overrides("same", "overwrite=true")).load_weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_whose_loss_rose_says_so_and_what_to_change(capsys):
    run(*build_overrides("calm"))
    assert "diverged" not in capsys.readouterr().out
    run_output = run(*build_overrides("diverged", "stage.learning_rate=0.9"))
    first, last = (run_output.manifest["figures"][name] for name in ("loss_first", "loss_last"))
    output = " ".join(capsys.readouterr().out.split())
    assert f"diverged: the loss rose from {first:.2f} to {last:.2f}, so training diverged" in output and last > first
    assert "Lower stage.learning_rate (0.9 now) or lengthen stage.warmup (0.03 now)" in output


def test_an_interrupted_run_restarts_its_stage():
    run_output = run(*build_overrides("cut"))
    whole = run_output.load_weights()
    manifest = run_output.manifest | {"status": "running"}
    (run_output.dir / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run_output.hf)
    run(*build_overrides("cut"))
    assert run_output.manifest["status"] == "finished"
    again = run_output.load_weights()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_missing_preceding_stage_is_named_with_the_command_to_run(user_folder):
    with pytest.raises(
        UserError,
        match=r"init_from=.*tiny/2_sft/hf: the run that .* does not exist\. Run the stage before it first .`python run\.py`",
    ):
        dispatch(["experiment=tiny/3_highres", f"run_dir={user_folder / 'none'}"])
    assert not (user_folder / "none").exists()


def test_a_folder_that_cannot_be_created_is_named_before_anything_is_built(user_folder):
    (user_folder / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/x cannot be made: .*file is no folder\. Choose another with run_dir="):
        run(*LLAVA, f"run_dir={user_folder / 'file'}", "run_name=x")


def test_an_unfinished_preceding_stage_is_reported_as_unfinished():
    run_output = run(*build_overrides("half"))
    shutil.rmtree(run_output.hf)
    (run_output.dir / "manifest.json").write_text(json.dumps(run_output.manifest | {"status": "running"}))
    with pytest.raises(UserError, match="is not finished"):
        run(*build_overrides("child", f"init_from={run_output.hf}"))


# The pipeline

FEW = ["trainer.max_steps=2", "data.global_batch_size=8", "data.num_workers=0", "data.validation.max_samples=1"]
FEW += ["evaluate.exam_items=1"]
STAGES = ["tiny/1_align", "tiny/2_sft", "tiny/3_highres", "tiny/4_dpo"]


def read_manifests(runs):
    """Return name without hash -> manifest, of the stages in their order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs.glob("tiny/*/manifest.json"))]
    return {manifest["name"].split("-")[0]: manifest for manifest in found}


def list_finished(runs):
    return [name for name, manifest in read_manifests(runs).items() if manifest["status"] == "finished"]


def check_pipeline(runs, output):
    """Check that each stage started from the preceding one, and that the pipeline reported its end once."""
    assert list_finished(runs) == STAGES
    for before, after in itertools.pairwise(read_manifests(runs).values()):
        assert after["parent"]["digest"] == before["weights_digest"]
    assert all(f"{number}/4  {run_stage}" in output for number, run_stage in enumerate(STAGES, 1))
    assert output.count(" s in all. Report: ") == 1
    (report,) = runs.glob("tiny/report*.html")
    assert report.stat().st_size > 5000
    # the table of the pipeline, with the comparison of each stage with the one before, on the terminal and in the report
    assert output.rindex("Exam of 56 questions") > output.rindex("Held-out score after each stage")
    for text in (output[output.rindex("Exam of 56 questions") :], report.read_text(encoding="utf-8")):
        assert len(re.findall(r"gained in \d+ of 69 cells, lost in \d+", text)) == 3


@pytest.mark.slow
def test_a_pipeline_on_digits_resumes_with_the_failed_stage(tmp_path, monkeypatch, capfd):
    """The stages are calls instead of processes; the test below starts processes."""

    def run_stage(overrides, **_):
        try:
            dispatch(overrides[2:])
        except UserError as error:
            print(error, file=sys.stderr)
            return subprocess.CompletedProcess(overrides, 1)
        return subprocess.CompletedProcess(overrides, 0)

    monkeypatch.setattr(
        pipeline.subprocess,
        "run",
        lambda overrides, **options: run_stage(overrides) if str(RUN) in overrides else real_run(overrides, **options),
    )
    runs = tmp_path / "runs"
    overrides = [
        f"run_dir={runs}",
        *FEW,
        "data=digits",
        "data.sources.digits_ko.num_samples=20",
        "data.sources.digits_en.num_samples=20",
    ]
    third = parse(["experiment=tiny/3_highres", *build_stage_overrides(overrides, "tiny/3_highres")]).dir
    third.parent.mkdir(parents=True)
    third.write_text("in the way")
    with pytest.raises(
        UserError, match=r"tiny/3_highres ended with exit status 1; see above\. `python run\.py` resumes it"
    ):
        dispatch(overrides)
    assert list_finished(runs) == STAGES[:2]
    assert f"The run's folder {third} cannot be made" in capfd.readouterr().err
    snapshots = {path: RunOutput(path.parent).take_snapshot() for path in runs.glob("tiny/*/manifest.json")}

    third.unlink()
    dispatch(overrides)
    output = capfd.readouterr().out
    check_pipeline(runs, output)
    assert output.count("finished already") == 2
    assert all(RunOutput(path.parent).take_snapshot() == before for path, before in snapshots.items())
    assert {"digits_ko", "digits_en"} <= {
        row["name"] for row in read_manifests(runs)["tiny/3_highres"]["data"]["mixture"]
    }
    dpo = read_manifests(runs)["tiny/4_dpo"]["data"]["mixture"]
    assert {"preference_ko", "preference_en"} <= {row["name"] for row in dpo}  # dpo keeps the recipe's data


@pytest.mark.slow
def test_the_pipeline_runs_as_processes_and_resumes_where_it_stopped(tmp_path):
    runs = tmp_path / "runs"
    third = parse([f"run_dir={runs}", *FEW, "experiment=tiny/3_highres"]).dir
    third.parent.mkdir(parents=True)
    third.write_text("in the way")
    first = run_process(f"run_dir={runs}", *FEW, cwd=tmp_path, base=[])
    assert first.returncode == 1 and list_finished(runs) == STAGES[:2]
    assert (
        first.stderr.rstrip().endswith("`python run.py` resumes it when that is mended.")
        and "Traceback" not in first.stderr
    )
    third.unlink()
    second = run_process(f"run_dir={runs}", *FEW, cwd=tmp_path, base=[])
    assert second.returncode == 0, second.stderr
    check_pipeline(runs, second.stdout)
    assert second.stdout.count("finished already") == 2


def test_a_finished_run_imports_neither_torch_nor_lightning(tmp_path):
    overrides = ["experiment=tiny/1_align", f"run_dir={tmp_path / 'runs'}"]
    job = parse(overrides)
    sources = open_sources(job.config.data, open_place(job), job.config.seed)
    folder = open_run_folder(
        job.dir,
        to_plain(asdict(job.config)),
        name=job.name,
        overwrite=False,
        data_digest=sources.compute_digest(),
        parent=None,
    )
    folder.update(status="finished")
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(RUN.parent)!r}); runpy.run_path({str(RUN)!r}, run_name='__main__')"
    )
    code += "; print('imported:', sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, *overrides]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert f"{job.name}: finished already" in output and output.endswith("imported: []\n")


def test_the_pipeline_starts_one_process_per_device():
    overrides = build_command(2, ["experiment=tiny/1_align"])
    assert overrides[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


# One rank and two

EXACT = [
    "stage.adam_eps=1e-6",
    "stage.learning_rate=1e-3",
    "stage.parts.vision_tower.learning_rate=null",
    "trainer.log_every_n_steps=1",
]


def make_mixed_records():
    """Return long records with photographs and short ones without, so that packing often gives a rank only text."""
    records = make_conversations(8)
    return records + [make_llava_record(f"{i}번 질문입니다.", "네, 글만 있습니다. " * (i % 3 + 1)) for i in range(2)]


def check_same_weights(one, two, atol=1e-5):
    one_weights, two_weights = one.load_weights(), two.load_weights()
    assert one_weights.keys() == two_weights.keys()
    worst = max(float((one_weights[key] - two_weights[key]).abs().max()) for key in one_weights)
    assert worst == pytest.approx(0, abs=atol)
    assert one.read_column("train/loss") == pytest.approx(two.read_column("train/loss"), rel=1e-4)


def count_text_only_packs(overrides):
    """Return the numbers of packs without an image, of empty packs, and of micro-batches in a step, for two ranks."""
    job = parse([*TINY, *overrides])
    plan = build_data(job).training_data.make_plan(2)
    packs = [pack for number in range(plan.num_steps) for pack in plan.get_step(number).packs]
    return (
        sum(not any(plan.index.tiles[i] for i in pack) for pack in packs if pack),
        sum(not pack for pack in packs),
        plan.accumulate_grad_batches,
    )


@pytest.mark.slow
def test_two_ranks_train_the_same_weights_as_one(user_folder):
    """This holds also in steps in which a rank has only text or nothing, without a hang."""
    write_records(user_folder / "mixed.jsonl", make_mixed_records())
    limits = [
        "data.global_batch_size=3",
        "data.tiles_per_micro_batch=5",
        "data.validation.fraction=0.2",
        "data.validation.max_samples=1",
    ]
    overrides = [*LLAVA, *EXACT, "data.sources.mine.path=mixed.jsonl", *limits]
    text, empty, k = count_text_only_packs(overrides)
    assert text > 0 and empty > 0 and k > 1, (text, empty, k)
    one = run(*overrides, "run_name=ranks_1")
    result = run_process(*overrides, *TWO, "run_name=ranks_2", cwd=user_folder, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    two = RunOutput(user_folder / "runs" / "ranks_2")
    assert two.manifest["status"] == "finished" and two.manifest["plan"]["world_size"] == 2
    assert one.manifest["data"]["mixture"] == two.manifest["data"]["mixture"]
    assert two.manifest["figures"]["val/loss"] == pytest.approx(one.manifest["figures"]["val/loss"], rel=1e-4)
    assert result.stdout.count(": done. Model: ") == 1
    assert not [path for path in two.dir.iterdir() if path.name.startswith(".")]  # no temporary file of a second writer
    check_same_weights(one, two)


@pytest.mark.slow
def test_two_ranks_train_dpo_to_the_same_weights_as_one(user_folder):
    pairs = [
        {"prompt": f"<image>\n{i}?", "chosen": "네" * (i + 1), "rejected": "아니요", "image": "china.jpg"}
        for i in range(3)
    ]
    pairs += [{"prompt": f"{i}?", "chosen": "Yes", "rejected": "No, " * i + "no"} for i in range(3)]
    write_records(user_folder / "pairs.jsonl", pairs)
    overrides = [
        "stage=dpo",
        "data=preference",
        "data.sources.mine.path=pairs.jsonl",
        "data.sources.mine.image_root=images",
    ]
    overrides += [
        "stage.adam_eps=1e-6",
        "stage.learning_rate=1e-3",
        "trainer.log_every_n_steps=1",
        "data.global_batch_size=3",
        "data.tiling=base",
    ]
    one = run(*overrides, "run_name=dpo_1")
    result = run_process(*overrides, *TWO, "run_name=dpo_2", cwd=user_folder, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    check_same_weights(one, RunOutput(user_folder / "runs" / "dpo_2"))


@pytest.mark.slow
def test_a_run_finished_on_one_rank_is_finished_on_two(user_folder):
    run(*build_overrides("elsewhere"))
    result = run_process(
        *build_overrides("elsewhere"), "trainer.devices=2", "trainer.strategy=ddp", cwd=user_folder, ranks=2
    )
    assert result.returncode == 0 and result.stdout.count("finished already") == 1


@pytest.mark.slow
def test_two_devices_without_torchrun_start_their_second_process(user_folder):
    one = run(*build_overrides("direct_1", *EXACT))
    result = run_process(
        *build_overrides("direct_2", *EXACT), "trainer.devices=2", "trainer.strategy=ddp", cwd=user_folder
    )
    assert result.returncode == 0, result.stderr[-3000:]
    check_same_weights(one, RunOutput(user_folder / "runs" / "direct_2"))
