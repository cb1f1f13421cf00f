"""FSDP2 and HSDP in CPU processes against one process without them."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import STAGE_CASES, AnswerRecorder, Case, StateRecorder, assemble, fit, validate
from rank_runs import require_equal, run_ranks
from transformers import AutoModelForImageTextToText
from waiting import PATIENCE

from callbacks.export import Export
from lit_vlm.config.choices import StrategyName
from lit_vlm.config.schema import TrainerConfig
from lit_vlm.distributed.fsdp import FSDP2Strategy
from lit_vlm.distributed.trainer import make_strategy
from lit_vlm.types import UserError

WORKER = Path(__file__).with_name("fsdp_worker.py")
ONE_ROW = {"options": {"parts": {"language_model": {"lora": {"rank": 1}}}}}  # the second rank has no row of it
TRAINED: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft"},
    "unclipped": {"stage": "highres", "clip": None},
    "selective": {"stage": "selective"},
    "one_rank_has_nothing": {"stage": "sft", "tokens": 100_000, "batch": 1},
    "align": {"stage": "align", "sgd": False},
    "dpo_lora": {"stage": "dpo_lora", "sgd": False},
    "dpo_kept": {"stage": "dpo_kept"},
    "align_kept": {"stage": "align_kept"},
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_out": ("inspect_shards", {}),
    "mixed": ("inspect_shards", {"precision": "bf16-mixed"}),
    "built": ("measure_loading", {}),
    "kept": ("train_and_record_state", {"stage": "sft_lora", **ONE_ROW}),
    "put": ("train_and_restore_state", {"source": "kept", "stage": "sft_lora", **ONE_ROW}),
    "given": ("train_prebuilt_model", {}),
    "validated": ("validate_without_training", {}),
}


def run_checks(
    checks: dict[str, Any], parts: tuple[str, str], out: Path, world: int = 2, limit: float = PATIENCE
) -> list[dict]:
    """Return the results of each check on each rank. A hang ends at the limit, in seconds."""
    return run_ranks(WORKER, [*parts, str(out), json.dumps(checks)], checks, out, world, limit)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def results(small_parts, out) -> list[dict[str, dict]]:
    return run_checks({name: ("train", case) for name, case in TRAINED.items()} | OTHERS, small_parts, out)


@pytest.mark.parametrize("check", TRAINED)
def test_two_ranks_under_fsdp2_train_as_one_process_does(results, small_parts, check):
    case = Case(**TRAINED[check])
    require_equal(results[0][check], fit(case, small_parts, "auto"), case.steps, atol=1e-6 if case.sgd else 1e-5)
    assert results[1][check]["losses"] == results[0][check]["losses"]
    if case.batch == 9:
        assert results[0][check]["k"] > 1


def test_the_gradient_audit_sees_the_gradients_of_one_process(results, small_parts):
    one = fit(Case(**TRAINED["unclipped"]), small_parts, "auto")["sums"]
    for rank in results:
        sums = rank["unclipped"]["sums"]
        assert sums.keys() == one.keys()
        assert sums == pytest.approx(one, abs=1e-4 * max(one.values()), rel=0)


def test_fsdp2_holds_only_some_rows_of_each_weight_on_each_rank_between_steps(results):
    ranks = [rank["shared_out"]["rows"] for rank in results]
    assert any(name.startswith("reference.") for name in ranks[0])  # DPO's reference is sharded as well
    for name, (size, mine, _, _) in ranks[0].items():
        assert mine + ranks[1][name][1] == size and mine >= ranks[1][name][1], name
    assert sum(row[1] for row in ranks[0].values()) < 0.52 * sum(row[0] for row in ranks[0].values())


def test_a_sharded_model_generates_the_same_answers_as_a_whole_one_and_keeps_training(results, small_parts):
    one = fit(Case("dpo", steps=2), small_parts, "auto", answers := AnswerRecorder())
    assert results[0]["shared_out"]["answers"] == results[1]["shared_out"]["answers"] == answers.answers
    require_equal(results[0]["shared_out"], one, steps=2)


def test_bf16_mixed_keeps_trainable_weights_in_float32_and_trains_as_one_process_does(results, small_parts):
    one = fit(Case("dpo", steps=2, precision="bf16-mixed"), small_parts, "auto")
    for rank in results:
        for name, (_, _, dtype, trains) in rank["mixed"]["rows"].items():
            assert dtype == ("torch.float32" if trains else "torch.bfloat16"), name
        assert rank["mixed"]["losses"] == pytest.approx(one["losses"], rel=2e-2)


def test_no_rank_holds_more_than_its_rows_while_a_model_is_loaded(results, small_parts):
    """LoRA: frozen weights are read from files; adapters and rows of new tokens are initialised and copied."""
    stage = Case("sft_lora").make_stage(small_parts)
    stage.configure_model()
    for rank in results:
        measured = rank["built"]
        assert measured["held"] < 0.52 * sum(weight.nbytes for weight in stage.model.parameters())
        assert measured["most"] <= measured["held"] + 2 * measured["largest"]
        for name, weight in stage.model.named_parameters():
            assert torch.equal(measured["weights"][name], weight.detach()), name


def test_shards_of_two_ranks_make_the_state_of_one_process_even_if_uneven_or_empty(results, small_parts):
    fit(Case("sft_lora", sgd=False, steps=4, **ONE_ROW), small_parts, "auto", recorder := StateRecorder(2))
    one, two = assemble([recorder.pieces]), assemble([rank["kept"]["pieces"] for rank in results])
    assert two.keys() == one.keys()
    for (name, kind), values in one.items():
        scale = values.abs().max().item() or 1.0
        torch.testing.assert_close(two[name, kind], values, atol=1e-4 * scale + 1e-6, rtol=1e-4, msg=f"{name} {kind}")
    counts = [len({piece[0] for piece in rank["kept"]["pieces"]}) for rank in results]
    assert counts[0] > counts[1]  # the second rank has no shard of a weight of one row


def test_a_state_that_was_overwritten_and_restored_trains_as_if_untouched(results):
    require_equal(results[0]["put"], results[0]["kept"], steps=4)


def require_same_folder(one: Path, two: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for name in ("config.json", "generation_config.json", "processor_config.json", "lit_vlm.json"):
        assert (one / name).read_text() == (two / name).read_text(), name
    weights = AutoModelForImageTextToText.from_pretrained(two).state_dict()
    for name, value in AutoModelForImageTextToText.from_pretrained(one).state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_folder_that_two_ranks_export_equals_that_of_one_process(results, small_parts, tmp_path, out):
    fit(Case("sft_lora", sgd=False, steps=4, **ONE_ROW), small_parts, "auto", Export(tmp_path))
    require_same_folder(tmp_path / "hf", out / "exported" / "hf")


def require_float32(folder: Path, parts: tuple[str, str], *, frozen_exact: bool) -> None:
    """Require that trained weights keep the bits that bfloat16 lacks and that frozen weights are as they were built."""
    stage = Case("align").make_stage(parts)
    stage.configure_model()
    weights = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()
    learned = [weights[name] for name in weights if "multi_modal_projector" in name]
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert len(learned) == 4 and all(bool((weight != weight.bfloat16()).any()) for weight in learned)
    for name, weight in stage.model.named_parameters() if frozen_exact else ():
        table = name == "lm_head.weight" or "embed_tokens" in name  # has rows of new tokens, which are trained
        assert weight.requires_grad or table or torch.equal(weights[name], weight), name


def test_a_prebuilt_model_is_exported_in_float32_and_its_frozen_weights_are_not_rounded(results, small_parts, out):
    require_float32(out / "given" / "hf", small_parts, frozen_exact=True)


@pytest.mark.slow
def test_under_zero3_a_prebuilt_model_is_exported_from_its_master_weights(small_parts, tmp_path):
    run_checks({"given": ("train_prebuilt_model", {"zero": True})}, small_parts, tmp_path)
    require_float32(tmp_path / "given_zero3" / "hf", small_parts, frozen_exact=False)


def test_validation_without_training_keeps_the_rows_of_new_tokens(results, small_parts):
    one = validate(Case("align"), small_parts, "auto")
    assert [rank["validated"]["val"] for rank in results] == pytest.approx([one, one], rel=1e-5)


def test_fsdp2_prints_no_warnings(results, out):
    output = (out / "terminal").read_text(encoding="utf-8")
    assert not re.search(r"(torch|lightning)/.*Warning", output), output


def test_fsdp2_and_hsdp_get_the_timeout_and_the_shard_size():
    for name, size in ((StrategyName.fsdp2, None), (StrategyName.hsdp, 4)):
        config = TrainerConfig(strategy=name, devices=8, timeout_minutes=3, shard_size=size)
        strategy = make_strategy(config)
        assert isinstance(strategy, FSDP2Strategy)
        assert (strategy.hybrid, strategy.shard_size) == (name is StrategyName.hsdp, size)
        assert strategy._timeout >= timedelta(minutes=3)


@pytest.mark.parametrize(("size", "words"), [(3, r"trainer\.shard_size=3"), (None, "the 4 devices of a machine")])
def test_a_mesh_that_does_not_divide_evenly_is_refused_with_both_numbers(monkeypatch, size, words):
    monkeypatch.setattr(FSDP2Strategy, "world_size", 10 if size is None else 8)
    monkeypatch.setattr(FSDP2Strategy, "num_processes", 4)
    strategy = FSDP2Strategy(hybrid=True, shard_size=size)
    with pytest.raises(UserError, match=rf"{10 if size is None else 8} devices .* groups of {size or 4} .*{words}"):
        strategy.setup_environment()


@pytest.mark.slow
def test_fsdp2_works_on_one_device(small_parts, tmp_path):
    case = Case("sft", steps=1)
    one = run_checks({"alone": ("train", {"stage": "sft", "steps": 1})}, small_parts, tmp_path, world=1)
    require_equal(one[0]["alone"], fit(case, small_parts, "auto"), steps=1, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [None, 2])
def test_four_ranks_under_fsdp2_and_hsdp_train_as_one_process_does(small_parts, tmp_path, shard_size):
    cases: dict[str, dict[str, Any]] = {"sft": {"stage": "sft"}, "dpo": {"stage": "dpo_lora"}}
    checks = {name: ("train", case | {"shard_size": shard_size}) for name, case in cases.items()}
    several = run_checks(checks, small_parts, tmp_path, world=4)
    for name, case in cases.items():
        require_equal(several[0][name], fit(Case(**case), small_parts, "auto"), 3)


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("stage", STAGE_CASES)
@pytest.mark.parametrize(
    ("world", "shard_size", "tables"),
    [(2, None, "small_parts"), (4, 2, "parts")],
    ids=["fsdp2", "hsdp with tied tables"],
)
def test_every_stage_trains_under_fsdp2_and_hsdp_as_in_one_process(request, tmp_path, stage, world, shard_size, tables):
    """SGD with and without gradient clipping, and AdamW."""
    models = request.getfixturevalue(tables)
    cases: dict[str, dict[str, Any]] = {
        "sgd": {"stage": stage},
        "unclipped": {"stage": stage, "clip": None},
        "adam": {"stage": stage, "sgd": False},
    }
    checks = {name: ("train", case | {"shard_size": shard_size}) for name, case in cases.items()}
    several = run_checks(checks, models, tmp_path, world=world)
    for name, case in cases.items():
        require_equal(several[0][name], fit(Case(**case), models, "auto"), 3)


@pytest.mark.long
@pytest.mark.parametrize(("world", "shard_size"), [(1, None), (4, None), (4, 2)])
def test_a_state_of_two_ranks_resumes_on_another_number_of_ranks(small_parts, tmp_path, world, shard_size):
    saved = run_checks({"kept": ("train_and_record_state", {})}, small_parts, tmp_path)
    checks = {"put": ("train_and_restore_state", {"source": "kept", "shard_size": shard_size})}
    several = run_checks(checks, small_parts, tmp_path, world=world)
    require_equal(several[0]["put"], saved[0]["kept"], steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "sft_lora"])
def test_zero3_exports_the_folder_of_one_process_and_fsdp2_resumes_from_its_state(small_parts, tmp_path, stage):
    checks = {
        "saved": ("train_under_zero3", {"stage": stage}),
        "put": ("train_and_restore_state", {"source": "saved", "stage": stage}),
    }
    several = run_checks(checks, small_parts, tmp_path)
    fit(Case(stage, sgd=False, steps=4), small_parts, "auto", Export(tmp_path / "one"))
    require_same_folder(tmp_path / "one" / "hf", tmp_path / "zero3" / "hf")
    require_equal(several[0]["put"], several[0]["saved"], steps=4)


@pytest.mark.long
def test_under_hsdp_only_one_replica_is_written(small_parts, tmp_path):
    saved = run_checks({"kept": ("train_and_record_state", {"shard_size": 2})}, small_parts, tmp_path, world=4)
    assert [rank["kept"]["writes"] for rank in saved] == [True, True, False, False]
    resumed = run_checks({"put": ("train_and_restore_state", {"source": "kept"})}, small_parts, tmp_path, world=2)
    require_equal(resumed[0]["put"], saved[0]["kept"], steps=4)
