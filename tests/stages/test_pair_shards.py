"""The stages of image-text pairs under FSDP2, HSDP, ZeRO-2 and ZeRO-3, beside DDP, on two ranks."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)
from waiting import PATIENCE

from lit_vlm.model.tiny import make_language_model, make_text_encoder

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
from rank_runs import run_ranks

EXPORTED = {
    "represent": (Blip2ForImageTextRetrieval, ""),
    "generate": (Blip2ForConditionalGeneration, ""),
    "blip_pretrain": (BlipForImageTextRetrieval, "retrieval"),
    "blip_caption": (BlipForConditionalGeneration, ""),
    "blip_retrieval": (BlipForImageTextRetrieval, ""),
}

# (strategy, stage); with offloading the stage with momentum encoders
ZERO = [*itertools.product(("zero2", "zero3"), EXPORTED), ("zero3_offload", "blip_pretrain")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def parts(out) -> list[str]:
    make_text_encoder(out / "text", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    make_language_model(out / "language", hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return [str(out / "text"), str(out / "language")]


def run_worker(out: Path, parts: list[str], *strategies: str) -> list[dict[str, dict]]:
    out.mkdir()
    worker = Path(__file__).with_name("pair_shards_worker.py")
    return run_ranks(worker, [str(out), *parts, *strategies], EXPORTED, out, 2, PATIENCE)


@pytest.fixture(scope="module")
def results(out, parts) -> list[dict[str, dict]]:
    return run_worker(out / "fsdp", parts, "fsdp2", "hsdp")


@pytest.fixture(scope="module")
def zero_results(out, parts) -> list[dict[str, dict]]:
    return run_worker(out / "zero", parts, "zero2", "zero3", "zero3_offload")


@pytest.mark.parametrize("stage", EXPORTED)
@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_sharded_pair_stages_have_the_weights_figures_and_captions_of_ddp(results, stage, strategy):
    """Momentum encoders and queue are among the weights; the two ranks validate different numbers of batches."""
    require_results_of_ddp(results, stage, strategy, atol=1e-9, rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "stage"), ZERO)
def test_pair_stages_under_zero_have_the_weights_figures_and_captions_of_ddp(zero_results, stage, strategy):
    """In float32, as DeepSpeed's master weights are."""
    require_results_of_ddp(zero_results, stage, strategy, atol=1e-6, rel=1e-5)


def require_results_of_ddp(results: list[dict[str, dict]], stage: str, strategy: str, atol: float, rel: float) -> None:
    ddp, sharded = (results[0][stage][name] for name in ("ddp", strategy))
    assert sharded["weights"].keys() == ddp["weights"].keys()
    for name, value in ddp["weights"].items():
        # A key's bias changes no attention, so its gradient is rounding error, which Adam amplifies
        limit = 100 * atol if name.endswith("key.bias") else atol
        torch.testing.assert_close(
            sharded["weights"][name], value, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert sharded["figures"] == pytest.approx(ddp["figures"], rel=rel)
    assert any(name.startswith("val/") for name in ddp["figures"])
    assert sharded["captions"] == ddp["captions"] == results[1][stage][strategy]["captions"]
    assert bool(ddp["captions"]) == (stage in ("generate", "blip_caption"))
    if stage in ("blip_pretrain", "blip_retrieval"):
        assert 0.49 < ddp["weights"]["temperature"] < 0.51  # it began at 0.6, above its limit


@pytest.mark.parametrize("stage", EXPORTED)
@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_shards_of_a_pair_stage_resume_bit_for_bit(results, stage, strategy):
    """Each element of the state is written by one rank, and what it holds decides the rest of the fit."""
    require_equal_resumption(results, stage, strategy)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "stage"), ZERO)
def test_a_pair_stage_under_zero_resumes_bit_for_bit(zero_results, stage, strategy):
    require_equal_resumption(zero_results, stage, strategy)


def require_equal_resumption(results: list[dict[str, dict]], stage: str, strategy: str) -> None:
    for rank in results:
        whole, resumed = rank[stage][strategy]["weights"], rank[stage][f"{strategy} resumed"]["weights"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert ("queue.images" in whole and "momentum.text_proj.weight" in whole) == (
        stage in ("blip_pretrain", "blip_retrieval")
    )


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_momentum_encoders_and_queue_stay_float32_under_zero_in_bfloat16(zero_results, strategy):
    """A step moves a momentum encoder by less than a bfloat16 can hold, so rounded ones would not move."""
    ddp, zero = (zero_results[0]["blip_pretrain"][f"{name} bf16-mixed"]["weights"] for name in ("ddp", strategy))
    names = [name for name in ddp if name.startswith("momentum.") and name.endswith("dense.weight")]
    for name in names:
        assert zero[name].dtype == torch.float32
        rounding = (ddp[name] - ddp[name].bfloat16()).abs().max()
        assert (zero[name] - ddp[name]).abs().max() < rounding / 4
    assert names and zero["queue.images"].dtype == torch.float32


@pytest.mark.parametrize("stage", EXPORTED)
def test_a_sharded_pair_stage_exports_the_folder_of_ddp(results, out, stage):
    require_folder_of_ddp(out / "fsdp", stage, "fsdp2")


@pytest.mark.long
@pytest.mark.parametrize("stage", EXPORTED)
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_pair_stage_under_zero_exports_the_folder_of_ddp(zero_results, out, stage, strategy):
    require_folder_of_ddp(out / "zero", stage, strategy)


def require_folder_of_ddp(folder: Path, stage: str, strategy: str) -> None:
    kind, part = EXPORTED[stage]
    models = []
    for name in ("ddp", strategy):
        model, report = kind.from_pretrained(folder / f"{stage}-{name}" / "hf" / part, output_loading_info=True)
        assert not report["missing_keys"] and type(model) is kind
        assert model.config.architectures == [kind.__name__]
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        limit = 1e-4 if name.endswith("key.bias") else 1e-6
        torch.testing.assert_close(models[1][name], value, rtol=0, atol=limit)
