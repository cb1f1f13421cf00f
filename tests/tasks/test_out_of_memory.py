"""Tests of out of memory: half the token limit, the same samples in each step, the weights of an undisturbed run.

Also tests of the restart of a run that ended for out of memory or for a corrupt record.
"""

import json
import os
import random
import sys

import pytest
import torch
from fault_cases import combine_patches, raise_out_of_memory_at, read_step_records, record_steps
from resume_cases import build_overrides, open_run, read_last_state, read_metrics, run_to_end, start
from run_helpers import TWO
from safetensors.torch import load_file

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.fault_tolerance.exit_status import RESTART
from lit_vlm.tasks import pipeline
from lit_vlm.types import Fault, RecordError

# No LoRA dropout, so other micro-batches use no other random numbers. This Adam eps does not amplify rounding.
EXACT = [
    "data.global_batch_size=6",
    "data.tokens_per_micro_batch=300",
    "stage.adam_eps=1e-6",
    "stage.parts.language_model.lora.dropout=0",
    "callbacks=[guard]",
]


def read_sample_ids(folder, rank=0):
    """Return step -> sample ids of the last time that the step was run."""
    return {
        row["step"]: sorted(name for micro in row["ids"] for name in micro) for row in read_step_records(folder, rank)
    }


def load_last_weights(folder, name):
    checkpoints = CheckpointFolder(folder / "runs" / name / "checkpoints")
    return load_file(next(checkpoints.get_step_path(checkpoints.list_steps()[0]).glob("*.safetensors")))


def run_with_out_of_memory(folder, place, *extra):
    overrides = build_overrides(folder, "sft", *EXACT, *extra)
    code, output = run_to_end(
        [*overrides, "run_name=low"], folder, 1, combine_patches(raise_out_of_memory_at(*place), record_steps(folder))
    )
    assert code == 0, output
    assert "low: out of memory; resumes with at most 150 tokens and 32 tiles" in output
    return output


def run_without_fault(folder, *extra):
    overrides = build_overrides(folder, "sft", *EXACT, *extra)
    code, output = run_to_end([*overrides, "run_name=calm"], folder, 1, record_steps(folder))
    assert code == 0, output


def check_equal(folder, undisturbed):
    assert read_sample_ids(folder) == read_sample_ids(undisturbed)
    assert read_last_state(folder, "low").consumed == read_last_state(undisturbed, "calm").consumed
    for name, tensor in load_last_weights(folder, "low").items():
        torch.testing.assert_close(tensor, load_last_weights(undisturbed, "calm")[name], atol=2e-6, rtol=1e-5)
    assert [row["step"] for row in read_metrics(folder, "low")] == [
        row["step"] for row in read_metrics(undisturbed, "calm")
    ]
    plan = open_run(folder, "low").manifest["plan"]
    assert plan["k"] > open_run(undisturbed, "calm").manifest["plan"]["k"]


@pytest.mark.parametrize("where", ["backward", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_one_device_continues_in_the_same_process_with_half_the_budget(tmp_path, where):
    """There is no checkpoint before, so one is made of the state before the step. After an error in the optimizer the
    weights are uncertain, and the run restarts from the beginning."""
    faulty, undisturbed = tmp_path / "low", tmp_path / "calm"
    faulty.mkdir(), undisturbed.mkdir()
    output = run_with_out_of_memory(faulty, (3, 0, where), "checkpoint.every_steps=100")
    run_without_fault(undisturbed, "checkpoint.every_steps=100")
    check_equal(faulty, undisturbed)
    assert ("resumes at step 3 of 6" in output) == (where == "backward")
    assert [row["step"] for row in read_step_records(faulty)] == (
        [0, 1, 2, 3, 4, 5] if where == "backward" else [0, 1, 2, *range(6)]
    )


@pytest.mark.long
def test_out_of_memory_at_ten_random_places_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    run_without_fault(tmp_path)
    generator = random.Random(0)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        place = (generator.randrange(6), 0, generator.choice(["forward", "backward", "optimizer"]))
        run_with_out_of_memory(folder, place)
        check_equal(folder, tmp_path)


@pytest.mark.slow
def test_no_sample_is_dropped_for_memory_and_the_last_halving_is_reported(tmp_path):
    """The largest sample has 68 tokens, so the limits are 300, 150, 75 and 68."""
    overrides = build_overrides(
        tmp_path, "sft", *EXACT, "guard.max_oom_retries=9", "data.tiles_per_micro_batch=2", "run_name=low"
    )
    code, output = run_to_end(overrides, tmp_path, 1, raise_out_of_memory_at(1, 0, "forward", times=99))
    assert code == 1
    assert "at most 68 tokens and 2 tiles, and the largest sample alone needs as much" in output
    assert output.count("80 samples, 8 held out") == 4
    assert "Traceback" not in output


def test_several_ranks_exit_to_restart_with_half_the_budget(tmp_path):
    overrides = build_overrides(
        tmp_path, "sft", *EXACT, *TWO, "data.global_batch_size=12", "trainer.timeout_minutes=2", "run_name=low"
    )
    started = start(
        overrides, tmp_path, 2, combine_patches(raise_out_of_memory_at(3, 0, "forward", rank=1), record_steps(tmp_path))
    )
    assert started.wait()[1] == RESTART
    assert started.read_output().count("Rank 1 ran out of memory, in the forward pass of step 4") == 1
    budget = json.loads((tmp_path / "runs" / "low" / "budget.json").read_text())
    assert (budget["tokens"], budget["of_tokens"], budget["halved"]) == (150, 300, 1)
    before = read_sample_ids(tmp_path)
    code, output = run_to_end(overrides, tmp_path, 2, record_steps(tmp_path))
    assert code == 0, output
    assert "low: resumes at step 3 of 6" in output
    assert open_run(tmp_path, "low").manifest["plan"]["k"] > 1
    assert sorted(read_sample_ids(tmp_path)) == list(range(6)) and all(
        read_sample_ids(tmp_path)[step] == before[step] for step in before
    )


def test_one_rank_requeues_the_slurm_job_when_several_run_out_of_memory_together(tmp_path):
    overrides = build_overrides(tmp_path, "sft", *EXACT, *TWO, "data.global_batch_size=12", "run_name=low")
    overrides += ["guard.max_oom_retries=1", "trainer.timeout_minutes=2"]
    together = [raise_out_of_memory_at(3, 0, "forward", rank=rank) for rank in (0, 1)]
    started = start(overrides, tmp_path, 2, combine_patches(simulate_slurm_job(tmp_path), *together))
    assert RESTART in started.wait(), started.read_output()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    assert started.read_output().count("ran out of memory") == 1 and "Job 77 is requeued." in started.read_output()
    assert json.loads((tmp_path / "runs" / "low" / "budget.json").read_text())["halved"] == 1


@pytest.mark.parametrize(("in_slurm", "share", "code"), [(True, 0.5, RESTART), (True, 0.0, 1), (False, 0.5, 1)])
def test_a_corrupt_record_requeues_the_job_while_few_are_quarantined(tmp_path, in_slurm, share, code):
    overrides = build_overrides(
        tmp_path, "sft", "guard.heartbeat_seconds=1", f"data.max_quarantined={share}", "run_name=bad"
    )
    patches = [corrupt_two_samples, *([simulate_slurm_job(tmp_path)] if in_slurm else [])]
    for number in range(2):  # one corrupt record is always allowed
        found, output = run_to_end(overrides, tmp_path, 1, combine_patches(*patches))
        assert found == (RESTART if in_slurm and number == 0 else code), output
        assert output.count("3 tries failed now. It is entered in") == 1
    calls = (tmp_path / "scontrol.txt").read_text().splitlines() if in_slurm else []
    assert calls == ["requeue 77"] * ((code == RESTART) + in_slurm)


def simulate_slurm_job(folder):
    """Return a patch that simulates a Slurm job whose scontrol records its arguments."""
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{folder}/scontrol.txt"\n')
    (folder / "bin" / "scontrol").chmod(0o755)

    def patch():
        os.environ |= {"SLURM_JOB_ID": "77", "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    return patch


def corrupt_two_samples():
    """Make the first two samples of the second step corrupt."""
    from lit_vlm.data import micro_batches

    read, bad = micro_batches._read_micro_batch_once, set()

    def read_or_fail(processor, index, pack, **step):
        if step.get("step") == 1 and len(bad) < 2:
            bad.update(pack[:2])
        if bad.intersection(pack):
            raise RecordError("somewhere:1", "image '1.jpg' not found", fault=Fault.missing)
        return read(processor, index, pack, **step)

    micro_batches._read_micro_batch_once, micro_batches.RETRY_DELAYS = read_or_fail, (0.01, 0.01)


STARTS = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
number = len(list(folder.glob("start-*")))
(folder / f"start-{number}").touch()
if number < int(sys.argv[2]):
    (folder / "budget.json").write_text(str(number))
    sys.exit(1)
sys.exit(int(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("devices", "halved", "status", "starts"), [(2, 2, 0, 3), (2, 2, 1, 3), (2, 0, 1, 1), (2, 99, 1, 4), (1, 2, 1, 1)]
)
def test_a_pipeline_restarts_a_stage_each_time_its_ranks_halve_the_budget(
    tmp_path, monkeypatch, devices, halved, status, starts
):
    overrides = [sys.executable, "-c", STARTS, str(tmp_path), str(halved), str(status)]
    monkeypatch.setattr(pipeline, "build_command", lambda devices, overrides: overrides)
    assert pipeline.run_stage(tmp_path, overrides, devices, 3) == status
    assert len(list(tmp_path.glob("start-*"))) == starts
