"""The stages of image-text pairs under FSDP2 and HSDP, beside DDP, on two ranks."""

from __future__ import annotations

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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def results(out) -> list[dict[str, dict]]:
    make_text_encoder(out / "text", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    make_language_model(out / "language", hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    worker = Path(__file__).with_name("pair_shards_worker.py")
    return run_ranks(worker, [str(out), str(out / "text"), str(out / "language")], EXPORTED, out, 2, PATIENCE)


@pytest.mark.parametrize("stage", EXPORTED)
@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_sharded_pair_stages_have_the_weights_figures_and_captions_of_ddp(results, stage, strategy):
    """Momentum encoders and queue are among the weights; the two ranks validate different numbers of batches."""
    ddp, sharded = (results[0][stage][name] for name in ("ddp", strategy))
    assert sharded["weights"].keys() == ddp["weights"].keys()
    for name, value in ddp["weights"].items():
        torch.testing.assert_close(
            sharded["weights"][name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert sharded["figures"] == pytest.approx(ddp["figures"], rel=1e-9)
    assert any(name.startswith("val/") for name in ddp["figures"])
    assert sharded["captions"] == ddp["captions"] == results[1][stage][strategy]["captions"]
    assert bool(ddp["captions"]) == (stage in ("generate", "blip_caption"))


@pytest.mark.parametrize("stage", EXPORTED)
@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_shards_of_a_pair_stage_resume_bit_for_bit(results, stage, strategy):
    """Each element of the state is written by one rank, and what it holds decides the rest of the fit."""
    for rank in results:
        whole, resumed = rank[stage][strategy]["weights"], rank[stage][f"{strategy} resumed"]["weights"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert ("queue.images" in whole and "momentum.text_proj.weight" in whole) == (
        stage in ("blip_pretrain", "blip_retrieval")
    )


@pytest.mark.parametrize("stage", EXPORTED)
def test_a_sharded_pair_stage_exports_the_folder_of_ddp(results, out, stage):
    kind, part = EXPORTED[stage]
    models = []
    for strategy in ("ddp", "fsdp2"):
        model, report = kind.from_pretrained(out / f"{stage}-{strategy}" / "hf" / part, output_loading_info=True)
        assert not report["missing_keys"] and type(model) is kind
        assert model.config.architectures == [kind.__name__]
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=0, atol=1e-6)
