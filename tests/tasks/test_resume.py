"""Tests that a killed and resumed run ends as an undisturbed one: weights, moments, consumed samples and metrics."""

import json
import os
import resource
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from resume_cases import (
    KINDS,
    STEPS,
    build_overrides,
    is_same_state,
    kill_at_micro_batch,
    list_leftovers,
    open_run,
    parse_once,
    read_last_state,
    read_metrics,
    run_to_end,
    run_undisturbed,
    start,
)
from run_helpers import TWO

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.types import UserError


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


def kill_and_resume(
    work_folder: Path, overrides: list[str], kills: list[int], ranks: int = 1, name: str = "killed"
) -> str:
    """Start a run, kill it in each of these micro-batches, and let it end. Return the output of the last start."""
    for micro_batch in kills:
        assert (
            -signal.SIGKILL
            in start([*overrides, f"run_name={name}"], work_folder, ranks, kill_at_micro_batch(micro_batch)).wait()
        )
    code, output = run_to_end([*overrides, f"run_name={name}"], work_folder, ranks)
    assert code == 0, output
    return output


def check_same_end(work_folder: Path, one: str, other: str) -> None:
    assert is_same_state(read_last_state(work_folder, one), read_last_state(work_folder, other))
    assert read_metrics(work_folder, one) == read_metrics(work_folder, other)
    assert list_leftovers(work_folder, other) == []


def find_resumed_step(output: str) -> int | None:
    found = [line for line in output.splitlines() if "resumes at step" in line]
    assert len(found) <= 1
    return int(found[0].split("resumes at step ")[1].split()[0]) if found else None


# Identical bit by bit


@pytest.mark.parametrize(
    ("stage", "workers"),
    [("align", 2), ("sft", 0), pytest.param("highres", 2, marks=pytest.mark.slow), ("dpo", 0)],
)
def test_a_run_killed_twice_ends_as_an_undisturbed_one(work_folder, stage, workers):
    overrides, name = (
        build_overrides(work_folder, stage, f"data.num_workers={workers}"),
        run_undisturbed_stage(work_folder, stage),
    )
    k = open_run(work_folder, name).manifest["plan"]["k"]
    output = kill_and_resume(work_folder, overrides, [2 * k, 4 * k], name=f"{stage}_killed")
    assert find_resumed_step(output) >= 2
    check_same_end(work_folder, name, f"{stage}_killed")


@cache
def run_undisturbed_stage(work_folder: Path, stage: str) -> str:
    """Return the name of an undisturbed run of that stage. Workers and checkpoints do not affect its result."""
    run_undisturbed(build_overrides(work_folder, stage, f"run_name={stage}_whole"), work_folder)
    return f"{stage}_whole"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", KINDS)
def test_a_run_killed_in_each_of_its_steps_ends_as_an_undisturbed_one(work_folder, stage, workers):
    overrides, undisturbed = (
        build_overrides(work_folder, stage, f"data.num_workers={workers}"),
        run_undisturbed_stage(work_folder, stage),
    )
    k = open_run(work_folder, undisturbed).manifest["plan"]["k"]
    for step in range(STEPS):
        name = f"{stage}_{workers}_{step}"
        kill_and_resume(work_folder, overrides, [step * k + k - 1], name=name)
        check_same_end(work_folder, undisturbed, name)


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_two_ranks_of_which_one_is_killed_end_as_two_undisturbed_ones(work_folder, stage):
    overrides = build_overrides(work_folder, stage, *TWO)
    code, output = run_to_end([*overrides, f"run_name={stage}_two"], work_folder, 2)
    assert code == 0, output

    def kill_on_rank(rank: int):
        return lambda: kill_at_micro_batch(3)() if os.environ["RANK"] == str(rank) else None

    for rank in (1, 0):
        codes = start([*overrides, f"run_name={stage}_two_killed"], work_folder, 2, kill_on_rank(rank)).wait()
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0
    kill_and_resume(work_folder, overrides, [], 2, f"{stage}_two_killed")
    check_same_end(work_folder, f"{stage}_two", f"{stage}_two_killed")


def test_a_killed_run_ends_with_the_validation_best_checkpoint_and_metrics_of_an_undisturbed_one(work_folder):
    """The run is killed in the step after a validation, and in a validation, which is then run again and logged once."""
    overrides = build_overrides(
        work_folder, "sft", "data.validation.every_steps=2", "checkpoint.keep_best=true", "checkpoint.keep_last=1"
    )
    run_undisturbed([*overrides, "run_name=val_whole"], work_folder)

    def kill_in_validation():
        from lit_vlm.stages.base import Stage

        Stage.validation_step = lambda self, batch, number: os.kill(os.getpid(), signal.SIGKILL)

    started = start([*overrides, "run_name=val_killed"], work_folder, patch=kill_in_validation)
    assert started.wait() == [-signal.SIGKILL]
    kill_and_resume(work_folder, overrides, [2, 4], name="val_killed")
    check_same_end(work_folder, "val_whole", "val_killed")
    assert sum(bool(row["val/loss"]) for row in read_metrics(work_folder, "val_killed")) == 3
    folders = [
        CheckpointFolder(open_run(work_folder, name).dir / "checkpoints") for name in ("val_whole", "val_killed")
    ]
    assert folders[0].read_best() == folders[1].read_best() and folders[0].read_best()[1] > 0
    assert folders[1].list_steps() == sorted({STEPS, folders[1].read_best()[0]}, reverse=True)


def test_a_killed_run_ends_with_the_figures_and_the_export_of_an_undisturbed_one(work_folder):
    overrides = build_overrides(
        work_folder, "align", "callbacks=[throughput,guard,samples]", "export=true", "data.validation.max_samples=1"
    )
    run_undisturbed([*overrides, "run_name=hf_whole", "checkpoint.every_steps=null"], work_folder, finished=True)
    kill_and_resume(work_folder, overrides, [3], name="hf_killed")
    one, other = open_run(work_folder, "hf_whole"), open_run(work_folder, "hf_killed")
    assert one.manifest["weights_digest"] == other.manifest["weights_digest"]
    for key in (
        "steps",
        "tokens",
        "supervised_tokens",
        "samples",
        "images",
        "loss_first",
        "loss_last",
        "scores",
        "val/loss",
    ):
        assert one.manifest["figures"][key] == other.manifest["figures"][key], key
    assert [line["phase"] for line in map(json.loads, (other.dir / "samples.jsonl").read_text().splitlines())].count(
        "before"
    ) == 2
    for run_output in (one, other):
        assert not (run_output.dir / "checkpoints").exists() and list_leftovers(work_folder, run_output.dir.name) == []


def test_a_run_killed_after_its_last_step_repeats_no_step(work_folder):
    overrides = build_overrides(work_folder, "align", "export=true", "run_name=end")

    def kill_in_export():
        from callbacks.export import Export

        Export.on_train_end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def forbid_training_steps():
        from lit_vlm.stages.base import Stage

        def fail_on_step(self, batch, number):
            raise AssertionError("a step was taken")

        Stage.training_step = fail_on_step

    assert start(overrides, work_folder, patch=kill_in_export).wait() == [-signal.SIGKILL]
    code, output = run_to_end(overrides, work_folder, patch=forbid_training_steps)
    assert code == 0 and find_resumed_step(output) == STEPS, output
    run_output = open_run(work_folder, "end")
    assert run_output.manifest["status"] == "finished" and run_output.manifest["figures"]["steps"] == STEPS
    assert len([row for row in read_metrics(work_folder, "end") if row["val/loss"]]) == 1


# Other devices and token limits


def read_losses(work_folder: Path, name: str) -> list[float]:
    return [float(row["train/loss"]) for row in read_metrics(work_folder, name) if row["train/loss"]]


ELASTIC = ["stage.adam_eps=1e-6"]  # a bias without a true gradient makes Adam amplify the order of sums


def check_elastic_resume(work_folder: Path, world_sizes: list[int], name: str, *extra: str) -> None:
    overrides = build_overrides(work_folder, "highres", *ELASTIC, *extra)
    undisturbed = run_undisturbed([*overrides, f"run_name={name}_one"], work_folder)
    for number, ranks in enumerate(world_sizes):
        last = number == len(world_sizes) - 1
        several = [*TWO, f"trainer.devices={ranks}"] if ranks > 1 else []
        # for any number of micro-batches in the step
        at = None if last else f"step {(number + 1) * STEPS // len(world_sizes)}"
        started = start(
            [*overrides, *several, f"run_name={name}"], work_folder, ranks, at and kill_in_step(int(at.split()[1]))
        )
        codes = started.wait()
        assert codes[0] == 0 if last else -signal.SIGKILL in codes, started.read_output()
    found = read_last_state(work_folder, name)
    assert (found.step, found.consumed) == (undisturbed.step, undisturbed.consumed)
    assert read_losses(work_folder, name) == pytest.approx(read_losses(work_folder, f"{name}_one"), rel=1e-5)


def kill_in_step(step: int):
    def patch() -> None:
        from lit_vlm.stages.base import Stage

        train = Stage.training_step

        def kill_or_step(self, batch, number):
            if batch.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return train(self, batch, number)

        Stage.training_step = kill_or_step

    return patch


def test_a_run_resumed_on_another_number_of_ranks_reads_the_same_samples(work_folder):
    check_elastic_resume(work_folder, [2, 1, 2], "elastic")


@pytest.mark.slow
def test_two_one_four_and_two_ranks_read_the_samples_of_one_rank(work_folder):
    check_elastic_resume(work_folder, [2, 1, 4, 2], "elastic_four")


@pytest.mark.slow
def test_a_run_resumed_under_other_strategies_reads_the_same_samples(work_folder):
    overrides = build_overrides(work_folder, "highres", *ELASTIC)
    undisturbed = run_undisturbed([*overrides, "run_name=one_strategy"], work_folder)
    strategies = ["deepspeed_zero3", "fsdp2", "single", "deepspeed_zero2", "ddp"]
    for number, strategy in enumerate(strategies, 1):
        last, ranks = number == len(strategies), 1 if strategy == "single" else 2
        several = [*TWO, f"trainer.strategy={strategy}"] if ranks > 1 else []
        started = start(
            [*overrides, *several, "run_name=moves"], work_folder, ranks, None if last else kill_in_step(number)
        )
        codes = started.wait()
        assert codes[0] == 0 if last else -signal.SIGKILL in codes, started.read_output()
    found = read_last_state(work_folder, "moves")
    assert (found.step, found.consumed) == (undisturbed.step, undisturbed.consumed)
    # The bound of the tests of each strategy
    assert read_losses(work_folder, "moves") == pytest.approx(read_losses(work_folder, "one_strategy"), rel=1e-3)


def test_a_run_resumed_with_smaller_micro_batches_reads_the_same_samples(work_folder):
    overrides = build_overrides(work_folder, "sft", *ELASTIC, "stage.parts.language_model.lora.dropout=0")
    undisturbed = run_undisturbed([*overrides, "run_name=large"], work_folder)
    assert start([*overrides, "run_name=small"], work_folder, patch=kill_at_micro_batch(3)).wait() == [-signal.SIGKILL]
    code, output = run_to_end([*overrides, "run_name=small", "data.tokens_per_micro_batch=150"], work_folder)
    assert code == 0 and find_resumed_step(output) >= 2, output
    k = [open_run(work_folder, name).manifest["plan"]["k"] for name in ("large", "small")]
    assert k[1] > k[0] and read_last_state(work_folder, "small").consumed == undisturbed.consumed
    assert read_losses(work_folder, "small") == pytest.approx(read_losses(work_folder, "large"), rel=1e-5)


# Faults


def test_a_corrupt_checkpoint_is_named_and_the_run_resumes_from_the_preceding_one(work_folder):
    overrides = build_overrides(work_folder, "align")
    assert start([*overrides, "run_name=hurt"], work_folder, patch=kill_at_micro_batch(4)).wait() == [-signal.SIGKILL]
    folder = CheckpointFolder(open_run(work_folder, "hurt").dir / "checkpoints")
    newest, before = folder.list_steps()[:2]
    (file,) = folder.get_step_path(newest).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    output = kill_and_resume(work_folder, overrides, [], name="hurt")
    assert f"{file} is not as it was written" in output and find_resumed_step(output) == before
    check_same_end(work_folder, run_undisturbed_stage(work_folder, "align"), "hurt")


LEVELS = [pytest.param(level, marks=() if level == 13 else pytest.mark.slow) for level in range(1, 21)]


@pytest.mark.parametrize("level", LEVELS)
def test_a_full_disk_stops_the_run_with_one_message_and_loses_only_the_last_steps(work_folder, level):
    overrides = build_overrides(
        work_folder, "align", "checkpoint.every_steps=2", f"checkpoint.asynchronous={str(level % 2 == 0).lower()}"
    )
    name = f"full_{level}"

    def limit_file_size():
        """Limit the file size to a share of a checkpoint file, from the save of step 4 on."""
        from lit_vlm.checkpoint.write import CheckpointWriter

        begin = CheckpointWriter.start

        def start_with_limit(self, index, pieces, **options):
            if index.step == 4:
                (file,) = self.folder.get_step_path(2).glob("*.safetensors")
                limit = file.stat().st_size * level // 21
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            begin(self, index, pieces, **options)

        CheckpointWriter.start = start_with_limit

    code, output = run_to_end([*overrides, f"run_name={name}"], work_folder, patch=limit_file_size)
    assert code == 1 and "Traceback" not in output, output
    messages = [line for line in output.splitlines() if "could not be written" in line]
    assert len(messages) == 1 and "The checkpoint of step 4 could not be written to" in messages[0]
    assert "File too large. The one before, of step 2, is whole. Make room" in messages[0]
    assert CheckpointFolder(open_run(work_folder, name).dir / "checkpoints").list_steps() == [2]
    output = kill_and_resume(work_folder, overrides, [], name=name)
    assert find_resumed_step(output) == 2
    check_same_end(work_folder, run_undisturbed_stage(work_folder, "align"), name)


def test_resume_from_none_starts_from_the_beginning(work_folder):
    overrides = build_overrides(work_folder, "align", "run_name=anew")
    assert start(overrides, work_folder, patch=kill_at_micro_batch(3)).wait() == [-signal.SIGKILL]
    code, output = run_to_end([*overrides, "resume_from=none"], work_folder)
    assert code == 0 and find_resumed_step(output) is None
    check_same_end(work_folder, run_undisturbed_stage(work_folder, "align"), "anew")


def test_a_requeued_job_resumes_although_its_overrides_say_resume_from_none(work_folder):
    overrides = build_overrides(work_folder, "align", "run_name=requeued", "resume_from=none")
    assert start(overrides, work_folder, patch=kill_at_micro_batch(3)).wait() == [-signal.SIGKILL]
    code, output = run_to_end(overrides, work_folder, patch=lambda: os.environ.update(SLURM_RESTART_COUNT="1"))
    assert code == 0 and find_resumed_step(output) >= 2
    check_same_end(work_folder, run_undisturbed_stage(work_folder, "align"), "requeued")


def test_overwrite_does_not_replace_a_run_whose_checkpoint_is_resumed_from(work_folder):
    run_undisturbed_stage(work_folder, "align")
    overrides = build_overrides(work_folder, "align", "run_name=replaced")
    run_undisturbed(overrides, work_folder)
    folder = CheckpointFolder(open_run(work_folder, "replaced").dir / "checkpoints")
    before = folder.list_steps()
    code, output = run_to_end(
        [*overrides, "seed=3", "overwrite=true", f"resume_from={folder.get_step_path(before[0])}"], work_folder
    )
    assert code == 1 and "Give this run a name of its own" in output and folder.list_steps() == before


def test_overwrite_does_not_stop_a_run_of_the_same_settings_from_resuming(work_folder):
    """A requeued job has the overrides it was submitted with."""
    overrides = build_overrides(work_folder, "align", "run_name=over", "overwrite=true")
    assert start(overrides, work_folder, patch=kill_at_micro_batch(3)).wait() == [-signal.SIGKILL]
    code, output = run_to_end(overrides, work_folder)
    assert code == 0 and find_resumed_step(output) >= 2
    code, output = run_to_end([*overrides, "seed=3"], work_folder)  # another run: nothing is resumed
    assert code == 0 and find_resumed_step(output) is None


def test_a_checkpoint_of_another_run_or_stage_is_refused(work_folder):
    align, sft = build_overrides(work_folder, "align"), build_overrides(work_folder, "sft")
    checkpoint = CheckpointFolder(
        open_run(work_folder, run_undisturbed_stage(work_folder, "align")).dir / "checkpoints"
    ).get_step_path(STEPS)
    for overrides, expected in (
        ([*align, "stage.learning_rate=1e-4"], "another stage.learning_rate (it has 0.001, this run 0.0001)"),
        ([*align, "seed=5"], "another seed (it has 0, this run 5)"),
        (sft, "of a run with another "),
    ):
        code, output = run_to_end(
            [*overrides, "run_name=mine", f"resume_from={checkpoint}", "overwrite=true"], work_folder
        )
        assert code == 1 and expected in output and "Traceback" not in output, output
    shutil.copytree(checkpoint, work_folder / "elsewhere" / checkpoint.name)  # of the same run, in another folder
    code, output = run_to_end(
        [*align, "run_name=mine", f"resume_from={work_folder / 'elsewhere' / checkpoint.name}", "overwrite=true"],
        work_folder,
    )
    assert code == 0 and find_resumed_step(output) == STEPS, output


def test_settings_that_no_run_can_use_are_reported_before_anything_is_loaded(work_folder):
    invalid = {
        "checkpoint.every_steps=0": "checkpoint.every_steps: must be above 0, found 0.",
        "checkpoint.every_minutes=-1": "checkpoint.every_minutes: must be above 0 and at most 527040, found -1.0.",
        "checkpoint.keep_last=0": "checkpoint.keep_last: must be above 0, found 0.",
        "resume_from=nowhere": "resume_from: there is no folder nowhere; name a checkpoint's",
    }
    with pytest.raises(UserError) as caught:
        parse_once(work_folder, *build_overrides(work_folder, "align", *invalid))
    assert all(text in str(caught.value) for text in invalid.values())


def test_dropout_seeds_depend_on_step_micro_batch_and_rank_only():
    from lit_vlm.stages.base import compute_seed

    seeds = {
        compute_seed(seed, step, micro, rank)
        for seed in (0, 1)
        for step in (0, 1)
        for micro in (0, 1)
        for rank in (0, 1)
    }
    assert len(seeds) == 16 and compute_seed(0, 1, 2, 3) == compute_seed(0, 1, 2, 3)
    torch.manual_seed(max(seeds))  # it accepts all of them
