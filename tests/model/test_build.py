"""Building a model from parts in the hub's layout, and refusing wrong ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from float64 import Float64
from support import blueprint_of, sample
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import build_on_meta
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tokenizer, make_vision_tower
from lit_vlm.types import SPECIAL_TOKENS, ModelPart, UserError

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_language_folder(folder: Path, config_class, **settings) -> str:
    """Save a random language model of another family, with the tiny tokenizer."""
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = config_class(**{**SHAPE, "vocab_size": len(tokenizer), **ids, **settings})
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_parameter_belongs_to_exactly_one_part(model):
    owners = {name: get_part(name) for name, _ in model.named_parameters()}
    assert set(owners.values()) == set(ModelPart)
    assert owners["model.image_newline"] is ModelPart.projector
    assert owners["lm_head.weight"] is ModelPart.language_model


@pytest.mark.parametrize(("layers", "layer"), [(27, None), (26, -1), (27, -2), (27, 26)])
def test_the_selected_feature_layer_is_the_same_for_26_and_27_layer_towers(tmp_path, small_parts, layers, layer):
    """Google's checkpoint has 27 layers and the second to last feeds; LLaVA-OneVision's has 26 and the last feeds."""
    make_vision_tower(
        tmp_path / "full", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=27
    )
    folder = tmp_path / "tower"
    if layers == 26:
        full = SiglipVisionModel.from_pretrained(tmp_path / "full")
        full.config.num_hidden_layers = 26
        full.encoder.layers = full.encoder.layers[:26]
        full.save_pretrained(folder)
    else:
        shutil.copytree(tmp_path / "full", folder)
    blueprint = blueprint_of((str(folder), small_parts[1]), vision_feature_layer=layer)
    model = build_model(blueprint)
    assert len(model.model.vision_tower.encoder.layers) == 26
    tiles = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = SiglipVisionModel.from_pretrained(tmp_path / "full").double()
    with torch.no_grad(), Float64():  # rounding adds up over 26 layers
        expected = reference((tiles.float() / 255 - 0.5) / 0.5, output_hidden_states=True).hidden_states[26]
        torch.testing.assert_close(model.double().model.encode_tiles(tiles), expected, atol=1e-6, rtol=0)


def test_a_layer_that_the_tower_lacks_is_refused(small_parts):
    with pytest.raises(UserError, match="vision_feature_layer=9 of a tower with 3 layers"):
        blueprint_of(small_parts, vision_feature_layer=9)


def test_a_whole_siglip_checkpoint_serves_as_a_tower(tmp_path, small_parts):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    torch.manual_seed(0)
    both = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    both.save_pretrained(tmp_path)
    model = build_model(blueprint_of((str(tmp_path), small_parts[1])))
    torch.testing.assert_close(
        model.model.vision_tower.embeddings.patch_embedding.weight, both.vision_model.embeddings.patch_embedding.weight
    )
    assert not hasattr(model.model.vision_tower, "head")


def test_a_clip_tower_drops_its_class_token(tmp_path, small_parts):
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    blueprint = blueprint_of((str(tmp_path), small_parts[1]))
    processor, model = Processor(blueprint.tokenizer, blueprint.images), build_model(blueprint)
    assert blueprint.config.vision_feature_select_strategy == "default"
    batch = collate(processor, [sample("뭐?", "원", (56, 100))])
    assert torch.isfinite(model.model(batch=batch)).all()
    assert processor.images.mean[0] == pytest.approx(0.48145466)  # CLIP's own normalisation


def test_special_tokens_have_one_id_each_and_start_as_the_mean_of_their_spelling(small_parts):
    blueprint = blueprint_of(small_parts)
    model = build_model(blueprint)
    table = model.get_input_embeddings().weight
    for token in SPECIAL_TOKENS:
        ids = blueprint.tokenizer.encode(token, add_special_tokens=False)
        assert len(ids) == 1
        spelled = Processor(blueprint.tokenizer, blueprint.images).template.plain_tokenizer.encode(token).ids
        torch.testing.assert_close(table[ids[0]], table[spelled].mean(0))


def test_special_tokens_that_the_vocabulary_has_keep_their_ids_and_rows(small_parts, tmp_path):
    """As reserved tokens of a vocabulary that no tokenizer file lists as added."""
    folder = Path(make_language_folder(tmp_path / "language", Qwen2Config, vocab_size=len(make_tokenizer()) + 16))
    state, reserved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), len(make_tokenizer())
    state["model"]["vocab"]["<bbox>"] = reserved
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    blueprint = blueprint_of((small_parts[0], str(folder)))
    assert blueprint.tokenizer.convert_tokens_to_ids("<bbox>") == reserved and "<bbox>" not in blueprint.new_tokens
    assert blueprint.tokenizer.encode("a<bbox>b")[1] == reserved and "</bbox>" in blueprint.new_tokens
    own = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(build_model(blueprint).get_input_embeddings().weight[reserved], own[reserved])


def test_a_padded_embedding_table_keeps_its_size_and_a_full_one_grows(small_parts, tmp_path):
    roomy = build_model(blueprint_of(small_parts))
    assert roomy.get_input_embeddings().num_embeddings == len(make_tokenizer()) + 16
    full = make_language_folder(tmp_path / "full", Qwen2Config, vocab_size=len(make_tokenizer()))
    grown = build_model(blueprint_of((small_parts[0], full)))
    assert grown.get_input_embeddings().num_embeddings == grown.lm_head.out_features >= len(make_tokenizer()) + 11


def test_a_linear_projector_trains_one_matrix_and_the_identity_after_it_is_frozen(small_parts):
    from lit_vlm.config.choices import ProjectorName
    from lit_vlm.stages import AlignStage

    model = build_model(blueprint_of(small_parts, projector=ProjectorName.linear))
    projector = model.model.multi_modal_projector
    features = torch.randn(3, 32)
    torch.testing.assert_close(projector(features), projector.linear_1(features))
    stage = AlignStage(model)
    stage.configure_model()
    assert projector.linear_1.weight.requires_grad
    assert not projector.linear_2.weight.requires_grad


def test_sharded_weights_load_like_whole_ones(small_parts, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(small_parts[1])
    shutil.copytree(small_parts[1], tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="50kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    one, other = (
        build_model(blueprint_of(small_parts)),
        build_model(blueprint_of((small_parts[0], str(tmp_path / "sharded")))),
    )
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_folder_with_half_of_its_weights_is_refused(small_parts, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_parts[1], tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "layers.1" not in k},
        tmp_path / "half" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="weights are missing or of another shape"):
        build_model(blueprint_of((small_parts[0], str(tmp_path / "half"))))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"vision_tower": "/nowhere/tower"}, r"model\.vision_tower=/nowhere/tower: no such folder"),
        ({"language_model": "./nowhere"}, r"model\.language_model=\./nowhere: no such folder"),
    ],
)
def test_a_missing_folder_is_named_with_its_setting(small_parts, setting, message):
    names = {"vision_tower": small_parts[0], "language_model": small_parts[1]}
    with pytest.raises(UserError, match=message):
        load_model_spec(ModelConfig(**{**names, **setting}))


def test_a_checkpoint_of_another_model_is_refused(small_parts):
    with pytest.raises(
        UserError, match=r"model of type 'qwen2'; a stage starts from a model of one of the types llava, "
    ):
        load_model_spec(ModelConfig(special_tokens=[]), init_from=small_parts[1])
    with pytest.raises(UserError, match="'qwen2'; SigLIP, SigLIP 2 .* and CLIP towers are known"):
        blueprint_of((small_parts[1], small_parts[1]))


def test_varco_vision_14b_builds_at_full_size_with_the_published_counts(tmp_path):
    """Published: so400m towers of 27 layers, of which 26 feed; Qwen2.5-14B 14.7 B (13.1 B without embeddings)."""
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    SiglipVisionConfig(**vision).save_pretrained(tmp_path / "tower")
    language = {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    }
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "language")
    Qwen2Config(
        **language, vocab_size=152064, max_position_embeddings=32768, tie_word_embeddings=False
    ).save_pretrained(tmp_path / "language")
    blueprint = load_model_spec(
        ModelConfig(vision_tower=str(tmp_path / "tower"), language_model=str(tmp_path / "language"))
    )
    model = build_on_meta(blueprint.config)
    count = {part: sum(p.numel() for n, p in model.named_parameters() if get_part(n) is part) for part in ModelPart}
    assert count[ModelPart.language_model] == 14_770_033_664  # Qwen2.5-14B's own count
    embeddings = 2 * 152064 * 5120
    assert round((count[ModelPart.language_model] - embeddings) / 1e9, 1) == 13.2  # its model card rounds to 13.1
    assert count[ModelPart.projector] == 1152 * 5120 + 5120 + 5120 * 5120 + 5120 + 5120
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 1152 + 4304 + 4 * 1152
    assert (
        count[ModelPart.vision_tower] == 14 * 14 * 3 * 1152 + 1152 + 729 * 1152 + 26 * layer + 2 * 1152
    )  # no head, no 27th layer
    assert (blueprint.images.side, blueprint.images.max_tiles, len(blueprint.images.grid_pinpoints)) == (27, 9, 36)
    assert AutoConfig.from_pretrained(tmp_path / "tower").num_hidden_layers == 27  # the user's folder is unchanged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5]}, r"image_mean=\[0.5\]; three numbers are needed, for red, green and blue"),
        ({"image_mean": [0.5, 0.5, None]}, "three numbers are needed"),
        ({"image_mean": "0.5"}, "three numbers are needed"),
        ({"image_std": [0.5, 0.0, 0.5]}, "three numbers above 0 are needed"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "three numbers above 0 are needed"),
        ({"resample": 9}, "resample=9; Pillow's filters are 0 to 5"),
    ],
)
def test_invalid_image_settings_are_refused(small_parts, tmp_path, settings, message):
    tower = tmp_path / "tower"
    shutil.copytree(small_parts[0], tower)
    path = tower / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_model_spec(ModelConfig(vision_tower=str(tower), language_model=small_parts[1]))


def test_one_mean_applies_to_all_three_colours(small_parts, tmp_path):
    tower = tmp_path / "tower"
    shutil.copytree(small_parts[0], tower)
    path = tower / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"image_mean": 0.25}), encoding="utf-8")
    images = load_model_spec(ModelConfig(vision_tower=str(tower), language_model=small_parts[1])).images
    assert images.mean == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("setting", "needed"),
    [("vision_tower", "preprocessor_config.json"), ("language_model", "tokenizer.json")],
)
def test_a_base_model_that_is_not_there_is_named_with_its_files_and_the_way_to_get_them(small_parts, setting, needed):
    parts = dict(zip(("vision_tower", "language_model"), small_parts, strict=True)) | {setting: "nobody/none"}
    with pytest.raises(
        UserError, match=rf"model\.{setting}=nobody/none: .*config\.json, {needed} and model\.safetensors"
    ) as error:
        load_model_spec(ModelConfig(**parts))
    assert f"hf download nobody/none --local-dir models/none, then model.{setting}=models/none." in str(error.value)
