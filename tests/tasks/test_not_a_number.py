"""Tests of a non-finite loss or gradient on any rank: all ranks take the same decision in the same step."""

import json

import pytest
from fault_cases import SMALL, Fault, combine_patches, inject_faults, read_step_records, record_steps
from resume_cases import build_overrides, is_same_state, open_run, read_last_state, run_to_end, start
from run_helpers import TWO

K = 3
INF = float("inf")
# 20 places: loss and gradient, either rank, first, middle and last micro-step, first and last step
PLACES = [
    Fault(("loss", "gradient")[n // 6 % 2], n, n % K, n // K % 2, (float("nan"), INF)[n // 12]) for n in range(20)
]
SKIP = ["guard.on_nonfinite=skip", "guard.max_skipped=3", *SMALL]


def space_out(faults):
    """Move the faults to every other step, so that training continues in between."""
    return [Fault(f.where, 2 * n, f.micro_step, f.rank, f.value) for n, f in enumerate(faults)]


def read_skipped(folder, name):
    lines = (folder / "runs" / name / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_skipping(folder, faults, steps, strategy="ddp"):
    extra = [f"trainer.max_steps={steps}", f"trainer.strategy={strategy}", "run_name=skips"]
    overrides = build_overrides(folder, "sft", *TWO, *SKIP, *extra)
    code, output = run_to_end(overrides, folder, 2, combine_patches(inject_faults(faults), record_steps(folder)))
    assert code == 0, output
    ranks = [read_step_records(folder, rank) for rank in range(2)]
    rows = read_skipped(folder, "skips")
    assert [row["step"] for row in rows] == [fault.step for fault in faults]
    for fault, row in zip(faults, rows, strict=True):
        one, other = (rank[fault.step] for rank in ranks)
        assert len(one["ids"]) == K
        assert one["before"] == one["after"] and other["before"] == other["after"]
        own_ids = ranks[fault.rank][fault.step]["ids"][fault.micro_step]
        all_ids = [name for rank in ranks for ids in rank[fault.step]["ids"] for name in ids]
        assert row["reason"] == fault.where
        assert row["samples"] == (own_ids if fault.where == "loss" else all_ids)
        assert all(name in output for name in own_ids)
    broken_steps = {fault.step for fault in faults}
    for one, other in zip(*ranks, strict=True):
        assert one["after"] == other["after"] or strategy != "ddp"  # only ddp holds the whole state on each rank
        assert (one["before"] == one["after"]) == (one["step"] in broken_steps) == (other["before"] == other["after"])
    rates = [row["lr"] for row in ranks[0]]
    assert len(set(rates)) == len(rates)  # the learning-rate schedule depends on the step number
    assert read_last_state(folder, "skips").updates == steps - len(faults)
    assert open_run(folder, "skips").manifest["figures"]["skipped_steps"] == len(faults)


def test_all_ranks_skip_the_same_step_without_a_trace_in_the_state(tmp_path):
    check_skipping(tmp_path, space_out([PLACES[0], PLACES[4], PLACES[8], PLACES[10]]), 8)


@pytest.mark.slow
def test_all_ranks_skip_the_same_step_at_twenty_places(tmp_path):
    check_skipping(tmp_path, space_out(PLACES), 40)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_all_ranks_skip_the_same_step_under_sharding(tmp_path, strategy):
    """Sharded gradients are not in `parameter.grad`, or only in part, so the fault is injected into the loss."""
    faults = [fault for fault in PLACES if fault.where == "loss"][:6]
    check_skipping(tmp_path, space_out(faults), 13, strategy)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("loss", 1, 1, 1), id="loss"),
        pytest.param(Fault("gradient", 1, 2, 0, INF), id="gradient", marks=pytest.mark.slow),
    ],
)
def test_a_fault_on_one_rank_stops_all_ranks_with_one_message(tmp_path, fault):
    overrides = build_overrides(tmp_path, "sft", *TWO, *SMALL, "run_name=stops")
    started = start(overrides, tmp_path, 2, combine_patches(inject_faults([fault]), record_steps(tmp_path)))
    assert started.wait() == [1, 1]
    assert started.read_output().count("is not a number, so the run stops") == 1
    assert f"Step 2: the {fault.where} is not a number" in started.read_output()
    assert "Traceback" not in started.read_output()
    assert [len(read_step_records(tmp_path, rank)) for rank in range(2)] == [
        1,
        1,
    ]  # nothing of the second step was applied


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rollback_omits_the_step_and_equals_a_run_that_skipped_it(tmp_path, ranks):
    fault, two = Fault("loss", 3, 1, ranks - 1), TWO if ranks == 2 else []
    overrides = build_overrides(tmp_path, "sft", *two, *SMALL, "checkpoint.every_steps=2")
    back = [*overrides, "guard.on_nonfinite=rollback", "run_name=back"]
    code, output = run_to_end(back, tmp_path, ranks, combine_patches(inject_faults([fault]), record_steps(tmp_path)))
    assert code == 0, output
    assert "back: resumes at step 2 of 6" in output
    assert "Step 4: the loss is not a number" in output
    assert [(row["step"], row["ids"]) for row in read_step_records(tmp_path) if not any(row["ids"])] == [
        (3, [[]] * len(read_step_records(tmp_path)[0]["ids"]))
    ]
    assert [row["step"] for row in read_step_records(tmp_path)] == [0, 1, 2, 2, 3, 4, 5]
    code, output = run_to_end(
        [*overrides, "guard.on_nonfinite=skip", "run_name=skips"], tmp_path, ranks, inject_faults([fault])
    )
    assert code == 0, output
    assert is_same_state(read_last_state(tmp_path, "back"), read_last_state(tmp_path, "skips"))


@pytest.mark.slow
def test_a_skipped_step_is_also_omitted_after_a_restart(tmp_path):
    """The run is killed after the skipped step and resumes before it. The second start has no fault, but skips it too."""
    from resume_cases import kill_at_micro_batch

    fault = Fault("gradient", 1, 0, 0)
    overrides = build_overrides(tmp_path, "sft", *SKIP, "checkpoint.every_steps=100")
    code, output = run_to_end([*overrides, "run_name=whole"], tmp_path, 1, inject_faults([fault]))
    assert code == 0, output
    run_to_end(
        [*overrides, "run_name=killed"], tmp_path, 1, combine_patches(inject_faults([fault]), kill_at_micro_batch(20))
    )
    code, output = run_to_end([*overrides, "run_name=killed"], tmp_path)
    assert code == 0, output
    assert is_same_state(read_last_state(tmp_path, "killed"), read_last_state(tmp_path, "whole"))
