"""Folders and projector files of LLaVA's own repositories: the same logits as transformers' model, and clear errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from float64 import Float64
from safetensors.torch import save_file
from support import blueprint_of, sample
from test_model_classes import make_clip_tower, make_inputs
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from lit_vlm.anyres import ModelClass
from lit_vlm.config import parse
from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.classes import get_model_class
from lit_vlm.model.export import export_model
from lit_vlm.model.original_layout import make_config, rename_original_tensors
from lit_vlm.model.skeleton import build_on_meta, defer_weights, fill_skeleton
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tokenizer, make_vision_tower
from lit_vlm.model.weights import rename_to_memory
from lit_vlm.types import UserError

# Names in memory -> names of the published indexes, written down here a second time
ORIGINAL = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
}
NEXT = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
ONEVISION = {
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": [[56 * w, 56 * h] for w in (1, 2, 3) for h in (1, 2, 3)],
    "mm_newline_position": "one_token",
}


def rename_to_original(name: str) -> str:
    for own, original in ORIGINAL.items():
        if name.startswith(own):
            return original + name.removeprefix(own)
    return name


def write_original(folder: Path, kind: str) -> torch.nn.Module:
    """Write a small model in the original layout, and return transformers' model with the same weights."""
    torch.manual_seed(3)
    tokenizer, tower = make_tokenizer(), folder / "tower"
    pinpoints = (ONEVISION if kind == "varco" else NEXT)["image_grid_pinpoints"]
    common = {"image_grid_pinpoints": [[h, w] for w, h in pinpoints], "image_token_index": len(tokenizer)}
    common |= {"tie_word_embeddings": False}
    rows = {"vocab_size": len(tokenizer) + 16, "tie_word_embeddings": False}
    if kind == "varco":  # LLaVA-NeXT's SigLIP tower drops its last layer
        make_vision_tower(tower, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3)
        vision = SiglipVisionConfig.from_pretrained(tower)
        vision.num_hidden_layers, vision.vision_use_head = 2, False
        config = LlavaOnevisionConfig(
            vision_config=vision, text_config=Qwen2Config(**TEXT, **rows), vision_feature_layer=-1,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4", **common,
        )  # fmt: skip
        model, architecture = LlavaOnevisionForConditionalGeneration(config), "LlavaQwenForCausalLM"
    else:
        make_clip_tower(tower)
        text = {"mistral": MistralConfig, "llama": LlamaConfig}[kind](**TEXT, **rows)
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig.from_pretrained(tower), text_config=text, vision_feature_layer=-2, **common
        )
        model = LlavaNextForConditionalGeneration(config)
        architecture = {"mistral": "LlavaMistralForCausalLM", "llama": "LlavaLlamaForCausalLM"}[kind]
    tensors = {rename_to_original(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = TEXT | rows | (ONEVISION if kind == "varco" else NEXT)
    values |= {
        "architectures": [architecture], "model_type": "llava", "mm_vision_tower": str(tower), "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_feature": "patch",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)
    return model.eval().double()


def load_original(folder: Path):
    return load_model_spec(ModelConfig(special_tokens=[]), init_from=str(folder))


@pytest.mark.parametrize("kind", ["mistral", "llama", "varco"])
def test_a_folder_in_the_original_layout_has_the_logits_of_transformers_model_and_continues(kind, mixed, tmp_path):
    theirs, spec = write_original(tmp_path, kind), load_original(tmp_path)
    assert spec.images.model_class is (ModelClass.llava_onevision if kind == "varco" else ModelClass.llava_next)
    model, processor = build_model(spec).double(), Processor(spec.tokenizer, spec.images)
    known = len(make_tokenizer())
    with Float64(), torch.no_grad():
        for record in [*mixed, sample("무엇이 보이나요?", "고양이", (150, 60), seed=5)]:
            batch = collate(processor, [record], step_supervised_tokens=1)
            logits = theirs(**make_inputs(spec, record), use_cache=False).logits[0]
            ours = model.lm_head(model.model(batch=batch))
            torch.testing.assert_close(ours[:, :known], logits[:, :known], atol=1e-5, rtol=0)
    with defer_weights():
        in_shards = build_model(load_original(tmp_path))
    fill_skeleton(in_shards, torch.float32)
    for name, value in in_shards.named_parameters():
        assert torch.equal(value.double(), model.get_parameter(name)), name
    export_model(model.float(), spec.tokenizer, spec.images, tmp_path / "hf")
    again = build_model(load_model_spec(ModelConfig(special_tokens=[]), init_from=str(tmp_path / "hf")))
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path):
    write_original(tmp_path, "mistral")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"6 weights.*gate_proj|down_proj.*\(32 x 48 there, 32 x 64 needed\)"):
        build_model(load_original(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM; of the original layout"),
        ({"image_aspect_ratio": "pad"}, "model.projector_weights=<mm_projector.bin>"),
        ({"mm_projector_type": "ldpnet"}, "its projector is 'ldpnet'; mlp2x_gelu is known"),
        ({"mm_vision_tower": "/none/tower"}, "vision tower /none/tower cannot be read.*model.vision_tower="),
    ],
)
def test_an_original_folder_that_is_not_known_is_refused_with_what_was_found(tmp_path, change, message):
    write_original(tmp_path, "llama")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        load_original(tmp_path)


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
MISTRAL_7B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
QWEN2_14B = {  # config.json of NCSOFT/VARCO-VISION-14B and Qwen2.5-14B-Instruct
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
# Names as published: indexes of toshi456/llava-jp-1.3b-v1.0 (CLIP) and v1.1 (SigLIP); lmms-lab's of LLaVA-NeXT-Video-34B-DPO
PUBLISHED = [
    "lm_head.weight",
    "model.mm_projector.0.bias",
    "model.mm_projector.0.weight",
    "model.mm_projector.2.bias",
    "model.mm_projector.2.weight",
    "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
    "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.layer_norm1.bias",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    "model.layers.9.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.image_newline",
]
OF_CLIP = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"


@pytest.mark.parametrize(
    ("architecture", "aspect", "text", "tower", "more"),
    [
        (
            "LlavaMistralForCausalLM",
            "anyres",
            MISTRAL_7B,
            CLIPVisionConfig(**CLIP_L, image_size=336, patch_size=14),
            OF_CLIP,
        ),
        (
            "LlavaQwenForCausalLM",
            "anyres_max_9",
            QWEN2_14B,
            SiglipVisionConfig(**SO400M, image_size=384, patch_size=14),
            None,
        ),
    ],
    ids=["llava-v1.6-mistral-7b", "VARCO-VISION-14B"],
)
def test_published_names_reach_every_parameter_of_the_real_shape(architecture, aspect, text, tower, more):
    values = {
        **text, "architectures": [architecture], "image_aspect_ratio": aspect, "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_layer": -2, "image_grid_pinpoints": [[672, 336]],
    }  # fmt: skip
    config = make_config(values, tower, "released")
    model = build_on_meta(config)
    assert type(model) is get_model_class(config)
    shapes = {rename_to_original(name): tuple(value.shape) for name, value in model.state_dict().items()}
    published = [*PUBLISHED, more] if more else PUBLISHED
    assert [name for name in published if name not in shapes] == []
    found = rename_to_memory(model, "released", rename_original_tensors(shapes))
    assert found == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    width, hidden = tower.hidden_size, text["hidden_size"]
    assert shapes["model.mm_projector.0.weight"] == (hidden, width) and shapes["model.image_newline"] == (hidden,)


# Projector files


def write_projector(path: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    generator = torch.Generator().manual_seed(1)
    tensors = {f"model.mm_projector.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(tensors | changes, path)
    return tensors


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_mm_projector_bin_becomes_the_projector_of_a_model_of_parts(small_parts, tmp_path, suffix):
    tensors = write_projector(tmp_path / "mm_projector.bin")
    save_file(tensors, tmp_path / "mm_projector.safetensors")
    spec = blueprint_of(small_parts, projector_weights=str(tmp_path / f"mm_projector.{suffix}"))
    projector = build_model(spec).model.multi_modal_projector
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        for kind in ("weight", "bias"):
            assert torch.equal(
                projector.get_parameter(f"{layer}.{kind}"), tensors[f"model.mm_projector.{number}.{kind}"]
            )
    with defer_weights():
        skeleton = build_model(spec)
    fill_skeleton(skeleton, torch.float32)
    for name, value in projector.named_parameters():
        assert torch.equal(value, skeleton.model.multi_modal_projector.get_parameter(name))


def test_the_projector_of_llava_1_is_one_matrix(small_parts, tmp_path):
    weights = {"model.mm_projector.weight": torch.randn(32, 32), "model.mm_projector.bias": torch.randn(32)}
    torch.save(weights, tmp_path / "mm_projector.bin")
    settings = {"projector": "linear", "projector_weights": str(tmp_path / "mm_projector.bin")}
    projector = build_model(blueprint_of(small_parts, **settings)).model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, weights["model.mm_projector.weight"])
    assert torch.equal(projector.linear_2.weight, torch.eye(32))


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


def test_a_projector_file_that_does_not_fit_is_refused_with_both_shapes_and_code_in_it_never_runs(
    small_parts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mm_projector.bin"
    spec = blueprint_of(small_parts, projector_weights=str(path))
    with pytest.raises(UserError, match="cannot be read"):
        build_model(spec)
    write_projector(path, **{"model.mm_projector.0.weight": torch.zeros(32, 1024)})
    with pytest.raises(UserError, match=r"1 tensor does not fit.*0\.weight: 32 x 1024 there, 32 x 32 needed"):
        build_model(spec)
    torch.save({"model.mm_projector.0.weight": torch.zeros(32, 32)}, path)
    with pytest.raises(UserError, match=r"3 tensors do not fit.*0\.bias: none there, 32 needed"):
        build_model(spec)
    path.write_bytes(pickle.dumps({"model.mm_projector.0.weight": Harmful()}))
    with pytest.raises(UserError, match="no file of tensors alone"):
        build_model(spec)
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(ConfigError, match=r"model\.projector_weights: has no effect here"):
        parse(["experiment=tiny/2_sft", f"model.projector_weights={path}", "init_from=runs/tiny/1_align/hf"])
