"""Weights that are read from safetensors in intervals, and models that exist before their weights (skeletons)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from alive import Alive
from safetensors.torch import load_file, save_file
from support import blueprint_of
from test_build import make_language_folder
from test_language_model_families import FAMILIES, make_family_folder
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen3MoeConfig, SiglipConfig, SiglipModel

from lit_vlm.config.choices import ProjectorName
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model import export
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.skeleton import defer_weights, read_initial_values
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tokenizer
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.types import UserError

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def assert_same_weights(whole: torch.nn.Module, skeleton: torch.nn.Module) -> None:
    """Assert equal weights bit for bit, read in three intervals, and equal buffers and configs."""
    expected, empty = dict(whole.named_parameters()), dict(skeleton.named_parameters())
    assert list(expected) == list(empty)
    for name, parameter in empty.items():
        value, n = expected[name], parameter.numel()
        assert parameter.is_meta, name
        assert (parameter.shape, parameter.dtype, parameter.requires_grad) == (
            value.shape,
            value.dtype,
            value.requires_grad,
        ), name
        bounds = [0, n // 3, n // 3 + n // 2, n]
        pieces = [
            read_initial_values(skeleton, name, parameter.shape, a, b) for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        assert torch.equal(torch.cat(pieces), value.detach().flatten()), name
    for (name, one), (_, other) in zip(whole.named_buffers(), skeleton.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert whole.config.to_dict() == skeleton.config.to_dict()
    assert whole.generation_config.to_dict() == skeleton.generation_config.to_dict()


def build_whole_and_skeleton(load_spec, dtype: torch.dtype = torch.float32, seed: int = 3):
    whole = build_model(load_spec(), dtype, seed)
    with defer_weights():
        return whole, build_model(load_spec(), dtype, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeletons_initial_values_equal_those_of_the_ordinary_build_for_every_family(small_parts, tmp_path, family):
    folder = make_family_folder(tmp_path / "language", family)
    assert_same_weights(*build_whole_and_skeleton(lambda: blueprint_of((small_parts[0], folder))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"projector": ProjectorName.linear}, {"special_tokens": []}])
def test_a_skeleton_equals_the_ordinary_build_for_all_settings(small_parts, dtype, settings):
    assert_same_weights(*build_whole_and_skeleton(lambda: blueprint_of(small_parts, **settings), dtype))


def test_an_extended_table_has_its_new_rows_in_a_skeleton_too(small_parts, tmp_path):
    full = make_language_folder(tmp_path / "full", Qwen2Config, vocab_size=len(make_tokenizer()))
    whole, skeleton = build_whole_and_skeleton(lambda: blueprint_of((small_parts[0], full)))
    assert whole.get_input_embeddings().num_embeddings > len(make_tokenizer())
    assert_same_weights(whole, skeleton)


def test_text_models_and_class_tokens_are_left_out_of_a_skeleton(small_parts, tmp_path):
    vision = {**TOWER, "image_size": 56, "patch_size": 14}
    text = {**TOWER, "num_hidden_layers": 1, "vocab_size": 20}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "siglip")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "clip")
    for tower in ("siglip", "clip"):
        assert_same_weights(
            *build_whole_and_skeleton(lambda tower=tower: blueprint_of((str(tmp_path / tower), small_parts[1])))
        )


@pytest.mark.parametrize("parts_of", ["small_parts", "parts"])
def test_a_hub_folder_of_many_files_is_read_as_in_the_ordinary_build(parts_of, request, tmp_path):
    blueprint = blueprint_of(request.getfixturevalue(parts_of))
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "hf", max_shard_size="100kB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    whole, skeleton = build_whole_and_skeleton(
        lambda: load_model_spec(ModelConfig(special_tokens=["<new>"]), init_from=str(tmp_path / "hf"))
    )
    assert_same_weights(whole, skeleton)


@pytest.mark.parametrize(
    ("stage_class", "options"),
    [
        (AlignStage, {}),
        (SFTStage, {"parts": {"language_model": {"lora": {"rank": 3}}, "vision_tower": {"lora": {"rank": 2}}}}),
        (DPOStage, {}),
    ],
)
def test_adapters_rows_of_new_tokens_and_references_are_the_same_in_a_skeleton(small_parts, stage_class, options):
    whole, later = (stage_class(blueprint_of(small_parts), seed=5, **options) for _ in range(2))
    whole.configure_model()
    with defer_weights():
        later.configure_model()
    assert_same_weights(whole.model, later.model)
    assert [row.to_dict() for row in whole.part_summary] == [row.to_dict() for row in later.part_summary]
    if stage_class is DPOStage:
        assert_same_weights(whole.reference, later.reference)


def test_reading_half_of_a_weight_takes_the_memory_of_that_half(small_parts, tmp_path):
    """Stored in bfloat16 and read in float32: the values must be converted, so they cannot stay mapped from the file."""
    folder, file = copy_language_folder(small_parts, tmp_path)
    tensors = {key: value.bfloat16() for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with defer_weights():
        skeleton = build_model(blueprint_of((small_parts[0], str(folder)), special_tokens=[]))
    shape = torch.Size([48, 32])
    with Alive() as alive:
        values = read_initial_values(skeleton, "model.language_model.layers.0.mlp.up_proj.weight", shape, 768, 1536)
    assert torch.equal(values, tensors["model.layers.0.mlp.up_proj.weight"][24:].float().flatten())
    assert alive.most == values.nbytes


def test_an_export_takes_the_memory_of_the_largest_weight_and_a_copy(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts)
    stage = SFTStage(blueprint, parts={"language_model": {"lora": {"rank": 3}}})
    stage.configure_model()
    largest = max(parameter.nbytes for parameter in stage.model.parameters())
    with Alive() as alive:
        export_model(stage.model, blueprint.tokenizer, blueprint.images, tmp_path / "hf")
    assert sum(parameter.nbytes for parameter in stage.model.parameters()) > 3 * largest
    assert alive.most <= 2 * largest


def test_merged_weights_may_be_on_another_device_than_weights_read_from_files(small_parts, monkeypatch):
    stage = SFTStage(blueprint_of(small_parts), parts={"language_model": {"lora": {"rank": 3}}})
    with defer_weights():
        stage.configure_model()
    names = {name for name, parameter in stage.model.named_parameters() if parameter.requires_grad}
    monkeypatch.setattr(export, "read_initial_values", lambda *interval: read_initial_values(*interval).to("meta"))
    shapes = {name: parameter.shape for name, parameter in stage.model.named_parameters()}
    weights = export.MergedStateDict(stage.model, gather_weight=lambda name: torch.zeros(shapes[name]))
    merged_into = {"lora_A", "new_tokens"}
    assert all(any(word in name for name in names) for word in merged_into)
    for name, described in weights.tensors.items():
        assert weights.compute_value(name).shape == described.shape


def copy_language_folder(parts: tuple[str, str], tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(parts[1], tmp_path / "language")
    return tmp_path / "language", tmp_path / "language" / "model.safetensors"


@pytest.mark.parametrize("damage", ["half", "shape", "truncated", "no safetensors", "a file of several"])
def test_weights_that_cannot_be_read_in_intervals_are_refused_before_anything_is_built(small_parts, tmp_path, damage):
    folder, file = copy_language_folder(small_parts, tmp_path)
    tensors = load_file(file)
    message = "weights? (is|are) missing or of another shape"
    if damage == "half":
        tensors = {key: value for key, value in tensors.items() if "layers.1" not in key}
    elif damage == "shape":
        tensors["model.norm.weight"] = torch.ones(31)
    elif damage == "truncated":
        message = "its weights could not be loaded"
    elif damage == "no safetensors":
        message = r"no model\.safetensors there.*save_pretrained"
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        message = r"model-00001-of-00002\.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage in ("no safetensors", "a file of several"):
        file.unlink()
    with defer_weights(), pytest.raises(UserError, match=message):
        build_model(blueprint_of((small_parts[0], str(folder))))


def test_weights_that_are_fused_on_loading_are_refused_with_the_strategy_that_can_load_them(small_parts, tmp_path):
    options = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    folder = make_language_folder(tmp_path / "moe", Qwen3MoeConfig, **options)
    with defer_weights(), pytest.raises(UserError, match=r"fuses weights .* Use trainer\.strategy=ddp\.$"):
        build_model(blueprint_of((small_parts[0], folder)))
