"""ZeRO-2 and ZeRO-3 in CPU processes against one process without them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from rank_cases import STAGE_CASES, AnswerRecorder, Case, StateRecorder, assemble, fit, validate
from rank_runs import require_equal, run_ranks
from waiting import PATIENCE

from lit_vlm.config.choices import StrategyName
from lit_vlm.config.schema import TrainerConfig
from lit_vlm.distributed.trainer import make_strategy

WORKER = Path(__file__).with_name("zero_worker.py")
TRAINED = {
    "trained name=zero2": Case(),
    "trained name=zero3,clip=None": Case(clip=None),
    "trained name=zero3,stage=selective_lora": Case("selective_lora"),
    "trained name=zero2,tokens=100000,batch=1": Case(tokens=100_000, batch=1),  # one rank is always idle
    "trained name=zero3,tokens=100000,batch=1": Case(tokens=100_000, batch=1),
    "trained name=zero2,stage=align,sgd=False": Case("align", sgd=False),
    "trained name=zero3,stage=dpo_lora,sgd=False": Case("dpo_lora", sgd=False),
    "trained name=zero3,stage=dpo_kept": Case("dpo_kept"),
    "trained name=zero3,stage=align_kept": Case("align_kept"),
}
SAVED, RESUMED = "kept name=zero2", "put name=zero3,source=zero2"
OTHERS = ["shared_out", "masters name=zero2", "masters name=zero3", "built", "loaded", SAVED, RESUMED, "validated"]


def run_checks(
    checks: list[str], parts: tuple[str, str], out: Path, world: int = 2, limit: float = PATIENCE
) -> list[dict[str, dict]]:
    """Return the results of each check on each rank. A hang ends at the limit, in seconds."""
    return run_ranks(WORKER, [*parts, str(out), *checks], checks, out, world, limit)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(small_parts, out) -> list[dict[str, dict]]:
    return run_checks([*TRAINED, *OTHERS], small_parts, out)


@pytest.mark.parametrize("check", TRAINED)
def test_two_ranks_under_zero_train_as_one_process_does(results, small_parts, check):
    one = fit(TRAINED[check], small_parts, "auto")
    require_equal(results[0][check], one, TRAINED[check].steps, atol=1e-6 if TRAINED[check].sgd else 1e-5)
    assert results[1][check]["losses"] == results[0][check]["losses"]
    if TRAINED[check].batch == 9:
        assert results[0][check]["k"] > 1


@pytest.mark.parametrize("check", ["trained name=zero2", "trained name=zero3,clip=None"])
def test_the_gradient_audit_sees_the_gradients_of_one_process(results, small_parts, check):
    one = fit(TRAINED[check], small_parts, "auto")["sums"]
    for rank in results:
        sums = rank[check]["sums"]
        assert sums.keys() == one.keys()
        assert sums == pytest.approx(one, abs=1e-4 * max(one.values()), rel=0)


def test_zero3_holds_only_one_slice_of_each_weight_on_each_rank_between_steps(results):
    ranks = [rank["shared_out"]["sizes"] for rank in results]
    assert any(name.startswith("reference.") for name in ranks[0])  # DPO's reference is sharded as well
    for name, (size, mine, whole, status) in ranks[0].items():
        others = ranks[1][name]
        assert whole == others[2] == 0 and status == others[3] == "NOT_AVAILABLE", name
        assert mine == others[1] == -(-size // 2), name


def test_a_sharded_model_generates_the_same_answers_as_a_whole_one_and_keeps_training(results, small_parts):
    one = fit(Case("dpo", steps=2), small_parts, "auto", answers := AnswerRecorder())
    assert results[0]["shared_out"]["answers"] == results[1]["shared_out"]["answers"] == answers.answers
    require_equal(results[0]["shared_out"], one, steps=2)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_bf16_mixed_computes_in_bfloat16_and_starts_from_the_exact_float32_weights(results, small_parts, name):
    case = Case(sgd=False, precision="bf16-mixed")
    stage = case.make_stage(small_parts)
    stage.configure_model()
    ranks = [rank[f"masters name={name}"] for rank in results]
    masters = assemble([rank["masters"] for rank in ranks])
    for name, weight in stage.model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(masters[name, "weight"], weight.detach().flatten()), name
    assert ranks[0]["dtypes"] == {torch.bfloat16}
    one = fit(case, small_parts, "auto")
    assert ranks[0]["losses"] == pytest.approx(one["losses"], rel=2e-2)


def test_no_process_holds_a_whole_weight_while_a_sharded_model_is_built(results, small_parts):
    stage = Case("align").make_stage(small_parts)
    stage.configure_model()
    for rank in results:
        measured = rank["built"]
        assert measured["whole"] == 0 and measured["read"] <= 0.75  # a weight may have an odd number of elements
        for name, weight in stage.model.named_parameters():
            assert torch.equal(measured["weights"][name], weight.detach()), name


def test_shards_of_two_ranks_make_the_state_of_one_process(results, small_parts):
    recorder = StateRecorder(2)
    fit(Case(sgd=False, steps=4), small_parts, "auto", recorder)
    one, two = assemble([recorder.pieces]), assemble([rank[SAVED]["pieces"] for rank in results])
    assert two.keys() == one.keys()
    for (name, kind), values in one.items():
        scale = values.abs().max().item() or 1.0
        torch.testing.assert_close(two[name, kind], values, atol=1e-4 * scale + 1e-6, rtol=1e-4, msg=f"{name} {kind}")


def test_a_state_of_zero2_resumes_under_zero3(results):
    require_equal(results[0][RESUMED], results[0][SAVED], steps=4)


def test_weights_that_stay_whole_equal_those_of_the_loaded_state(results):
    for rank in results:
        weights = rank["loaded"]["weights"]
        assert len(weights) > 20 and all(torch.equal(one, master.bfloat16()) for one, master in weights.values())


def test_validation_without_training_keeps_the_rows_of_new_tokens(results, small_parts):
    one = validate(Case("align"), small_parts, "auto")
    assert [rank["validated"]["val"] for rank in results] == pytest.approx([one, one], rel=1e-5)


def test_deepspeed_prints_no_warnings(results, out):
    output = (out / "terminal").read_text(encoding="utf-8")
    for word in ("deepspeed", "accelerator", "WARNING", "Warning"):
        assert word not in output, output


def test_strategies_get_the_timeout_and_one_device_needs_no_strategy():
    assert make_strategy(TrainerConfig()) == "auto"
    assert make_strategy(TrainerConfig(strategy=StrategyName.single)) == "auto"
    for name in (
        StrategyName.ddp,
        StrategyName.deepspeed_zero2,
        StrategyName.deepspeed_zero3,
        StrategyName.deepspeed_zero3_offload,
    ):
        strategy = make_strategy(TrainerConfig(strategy=name, devices=2, timeout_minutes=3))
        assert timedelta(minutes=3) <= strategy._timeout < timedelta(minutes=5)
        if name is not StrategyName.ddp:
            zero = strategy.config["zero_optimization"]
            assert (zero["stage"], "offload_param" in zero) == (
                2 if name.value.endswith("2") else 3,
                name.value.endswith("offload"),
            )


@pytest.mark.long
@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize(
    ("name", "tables"),
    [("zero2", "small_parts"), ("zero3", "small_parts"), ("zero3_offload", "small_parts"), ("zero3", "parts")],
    ids=["zero2", "zero3", "zero3_offload", "zero3 with tied tables"],
)
def test_every_stage_trains_under_every_zero_stage_as_in_one_process(request, tmp_path, name, tables):
    """SGD with and without gradient clipping, and AdamW."""
    models, cases = request.getfixturevalue(tables), {}
    for stage in STAGE_CASES:
        cases[f"trained name={name},stage={stage}"] = Case(stage)
        cases[f"trained name={name},stage={stage},clip=None"] = Case(stage, clip=None)
        cases[f"trained name={name},stage={stage},sgd=False"] = Case(stage, sgd=False)
    several = run_checks(list(cases), models, tmp_path, limit=3 * PATIENCE)
    for check, case in cases.items():
        require_equal(several[0][check], fit(case, models, "auto"), case.steps)


@pytest.mark.slow
def test_four_ranks_under_zero3_train_as_one_process_does(small_parts, tmp_path):
    cases = {"trained name=zero3,stage=sft": Case("sft"), "trained name=zero3,stage=dpo_lora": Case("dpo_lora")}
    several = run_checks(list(cases), small_parts, tmp_path, world=4)
    for check, case in cases.items():
        require_equal(several[0][check], fit(case, small_parts, "auto"), case.steps)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 4])
def test_a_state_of_two_ranks_resumes_on_another_number_of_ranks(small_parts, tmp_path, world):
    saved = run_checks(["kept name=zero3"], small_parts, tmp_path)
    resumed = ["put name=zero3,source=zero3", "put name=zero2,source=zero3"]
    several = run_checks(resumed, small_parts, tmp_path, world=world)
    for check in resumed:
        require_equal(several[0][check], saved[0]["kept name=zero3"], steps=4)
