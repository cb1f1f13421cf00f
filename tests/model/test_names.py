"""Names of exported weights: those of the released checkpoints, the only ones that inference servers know."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import blueprint_of
from test_weights import TOWER, assert_same_weights
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.build import build_model
from lit_vlm.model.export import MergedStateDict, export_model
from lit_vlm.model.skeleton import build_on_meta, defer_weights
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tensor_files import split_into_files
from lit_vlm.stages import SFTStage


def read_released_names(*sections: str, tower_layers: int, language_layers: int) -> set[str]:
    """Return the key list of a released checkpoint with this number of layers."""
    text = Path(__file__).with_name("released_names.txt").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\[(\w+)\]\n(.*?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL))
    names = [name for section in sections for name in listed[section].split()]
    counts = {"vision_tower": tower_layers, "language_model": language_layers}
    return {
        name.replace(".N.", f".{layer}.")
        for name in names
        for layer in range(counts[name.partition(".")[0]] if ".N." in name else 1)
    }


def read_names(folder: Path) -> dict[str, list[str]]:
    """Return the names by file, in the order of the files."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names[file.name] = list(opened.keys())
    return names


SIZES = {  # LLaVA-OneVision's releases: width, layers, heads, inner width, vocabulary size, tied, and number of 5 GB files
    "0.5b": ((896, 24, 14, 2, 4864, 152000, True), 1),
    "7b": ((3584, 28, 28, 4, 18944, 152128, False), 4),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_model_of_a_released_shape_has_the_released_key_list_and_number_of_files(size):
    (width, layers, heads, kv_heads, inner, vocab_size, tied), files = SIZES[size]
    text = Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, dtype="float16", tie_word_embeddings=tied)
    model = build_on_meta(config).half()
    planned = split_into_files(MergedStateDict(model).tensors)
    sections = ["siglip", "projector", "qwen2", *([] if tied else ["head"])]
    released = read_released_names(*sections, tower_layers=26, language_layers=layers)
    assert {name for file in planned for name in file.tensors} == released
    assert len(planned) == files


def make_tower(kind: str, folder: Path) -> str:
    """Save a tower as published: SigLIP and SigLIP 2 with their text model, CLIP's tower alone."""
    vision = {**TOWER, "image_size": 56, "patch_size": 14}
    text = {**TOWER, "num_hidden_layers": 1, "vocab_size": 20}
    torch.manual_seed(5)
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder)
    else:  # SigLIP 2 with a fixed resolution is SigLIP's class with another tokenizer
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("largest_file", ["5GB", "60kB"])
@pytest.mark.parametrize("way", ["from parts", "with LoRA", "from an older export", "in shards"])
def test_every_export_has_the_released_names_and_plain_transformers_finds_them_all(
    small_parts, tmp_path, tower, largest_file, way
):
    blueprint = blueprint_of((make_tower(tower, tmp_path / "tower"), small_parts[1]))
    if way == "with LoRA":
        lora = {"language_model": {"lora": {"rank": 2}}, "vision_tower": {"lora": {"rank": 2}}}
        stage = SFTStage(blueprint, parts=lora)
        stage.configure_model()
        model = stage.model
    elif way == "in shards":
        stage = SFTStage(blueprint, frozen_dtype="float32", trainable=["projector"])
        stage.configure_model()
        model = stage.model
        assert model.weights
    else:
        model = build_model(blueprint)
    if way == "from an older export":
        blueprint, model = reload_older_export(blueprint, model, tmp_path / "older")
    export_model(model, blueprint.tokenizer, blueprint.images, tmp_path / "hf", max_shard_size=largest_file)
    found = read_names(tmp_path / "hf")
    released = read_released_names(tower, "projector", "qwen2", "head", tower_layers=2, language_layers=2)
    assert {name for names in found.values() for name in names} == released
    assert (len(found) > 1) is (largest_file != "5GB")
    if len(found) > 1:
        index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
        assert index == {name: file for file, names in found.items() for name in names}
    plain, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def reload_older_export(blueprint, model, folder: Path):
    """Return the model read back from a folder with the weight names of older exports, by both ways of loading."""
    export_model(model, blueprint.tokenizer, blueprint.images, folder)
    tensors = load_file(folder / "model.safetensors")
    older = {key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    settings = ModelConfig(grid=3, max_tiles=4)
    again = load_model_spec(settings, init_from=str(folder))
    loaded = build_model(again)
    for (name, one), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with defer_weights():
        assert_same_weights(loaded, build_model(load_model_spec(settings, init_from=str(folder))))
    return again, loaded
