"""The recipes of published systems: a small twin of each runs all its stages and learns; real shapes have the published counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_helpers import RunOutput, make_llava_record
from support import builtin
from test_model_classes import make_clip_tower
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from lit_vlm.anyres import ModelClass
from lit_vlm.config import parse
from lit_vlm.config.compose import compose_config
from lit_vlm.config.recipe import list_recipes, list_stages
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import build_on_meta
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_language_model, make_tokenizer, make_vision_tower
from lit_vlm.tasks.train import train
from lit_vlm.types import Language, ModelPart

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = [name for name in list_recipes() if name.startswith(("llava", "kollava", "aiku"))]
TYPES = {"llava_next": "llava_next", "llava_onevision": "llava_onevision"}  # model type of the exports; others: llava
STEPS = 60


@pytest.fixture(scope="module")
def twin_parts(tmp_path_factory) -> dict[str, str]:
    """Small towers of the systems' classes, and a language model."""
    folder = tmp_path_factory.mktemp("twins")
    make_vision_tower(folder / "siglip", hidden_size=32, intermediate_size=48, num_attention_heads=2)
    make_language_model(folder / "language", hidden_size=48, intermediate_size=64, num_hidden_layers=2)
    return {
        "clip": make_clip_tower(folder / "clip"),
        "fine clip": make_clip_tower(folder / "fine_clip", image_size=72, patch_size=4),  # 18 x 18 patches
        "siglip": str(folder / "siglip"),
        "language": str(folder / "language"),
    }


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """LLaVA JSON in both languages with pictures, as the published sets are."""
    folder, records = tmp_path_factory.mktemp("captions"), []
    for language in (Language.ko, Language.en):
        for number, sample in enumerate(builtin("caption", n=96, language=language)[0]):
            name = f"{language}_{number}.png"
            sample.images[0].load().save(folder / name)
            question, answer = (message.text for message in sample.messages)
            records.append(make_llava_record(f"<image>\n{question.strip()}", answer, id=name, image=name))
    (folder / "llava.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder


def make_twin_overrides(experiment: str, parts: dict[str, str], captions: Path, folder: Path) -> list[str]:
    """Return the recipe's command in small: parts, data and steps are the twin's, all else is the recipe's."""
    config = compose_config([f"experiment={experiment}"])
    tower = "siglip" if "siglip" in config.model.vision_tower else "clip"
    tower = "fine clip" if config.model.projector == "ldpnetv2" else tower
    sources = [
        f"data.sources.{name}.{key}={value}"
        for name in config.data.sources
        for key, value in (("path", captions / "llava.json"), ("image_root", captions))
    ]
    return [
        f"experiment={experiment}",
        f"run_dir={folder / 'runs'}",
        f"model.vision_tower={parts[tower]}",
        f"model.language_model={parts['language']}",
        *sources,
        "trainer=tiny",
        "trainer.precision=32-true",
        "trainer.devices=1",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1",
        "data.global_batch_size=16",
        "data.num_workers=0",
        "data.tiles_per_micro_batch=256",
        "data.validation.fraction=0",
        "stage.learning_rate=3e-3",  # of random parts
        "stage.parts.projector.learning_rate=null",
    ]


def run_twin(
    recipe: str, parts: dict[str, str], captions: Path, folder: Path, num_stages: int | None = None
) -> list[RunOutput]:
    """Run the first stages of a recipe in small, each from the one before; None: all."""
    outputs: list[RunOutput] = []
    for experiment in list_stages(recipe)[:num_stages]:
        overrides = make_twin_overrides(experiment, parts, captions, folder)
        start = str(compose_config([f"experiment={experiment}"]).init_from)
        if start.startswith("runs/"):  # the first stage of another recipe
            outputs += run_twin(start.split("/")[1], parts, captions, folder, num_stages=1)
        if outputs:
            overrides.append(f"init_from={outputs[-1].hf}")
        job = parse(overrides)
        train(job)
        outputs.append(RunOutput(job.dir))
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SYSTEMS)
def test_the_twin_of_a_recipe_runs_all_its_stages_and_learns(recipe, twin_parts, captions, tmp_path):
    outputs = run_twin(recipe, twin_parts, captions, tmp_path)
    losses = [output.read_column("train/loss") for output in outputs]
    assert [len(each) for each in losses] == [STEPS] * len(outputs)
    first, last = sum(losses[0][:5]) / 5, sum(losses[-1][-5:]) / 5
    assert last < 0.7 * first
    config = json.loads((outputs[-1].hf / "config.json").read_text())
    is_aiku = recipe.startswith("aiku")
    assert config["model_type"] == ("lit_vlm_llava" if is_aiku else TYPES.get(recipe, "llava"))
    assert config.get("projector") == ("ldpnetv2" if is_aiku else None)
    how = {part["part"]: part["how"] for part in outputs[0].manifest["trained"]}
    # Every system aligns first. The rows are those of <image> and OneVision's <video>, which no text contains.
    rows = "rows of 2 tokens" if recipe == "llava_onevision" else "rows of 1 token"
    assert how == {"vision_tower": "frozen", "projector": "all", "language_model": rows}
    how = {part["part"]: part["how"] for part in outputs[-1].manifest["trained"]}
    assert ("LoRA" in how["language_model"]) is (is_aiku or "lora" in recipe)
    tower_trains = recipe in ("llava_next", "llava_onevision")
    assert (how["vision_tower"] == "frozen") is not tower_trains


# Real shapes

CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
}
MISTRAL_7B = VICUNA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
CLIP_LAYER = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 1024 + 4096 + 4 * 1024
SIGLIP_LAYER = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 1152 + 4304 + 4 * 1152


def count_parameters(folder: Path, tower, language, settings: dict) -> dict[ModelPart, int]:
    """Count the parameters of each part of a model of this real shape, on `meta`."""
    tower.save_pretrained(folder / "tower")
    make_tokenizer().save_pretrained(folder / "language")
    language.save_pretrained(folder / "language")
    parts = {"vision_tower": str(folder / "tower"), "language_model": str(folder / "language")}
    spec = load_model_spec(ModelConfig(**{**settings, **parts}))
    model = build_on_meta(spec.config)
    counts = dict.fromkeys(ModelPart, 0)
    for name, parameter in model.named_parameters():
        counts[get_part(name)] += parameter.numel()
    return counts


def read_model_settings(name: str) -> dict:
    """Read a file of conf/model as arguments of `ModelConfig`."""
    model = compose_config(["task=train", f"model={name}"]).model
    return {key: model[key] for key in ("model_class", "projector", "pad_to_square", "special_tokens")}


@pytest.mark.parametrize(
    ("name", "image_size", "tower_count", "projector_count"),
    [
        # CLIP's towers have 303,179,776 and 303,507,456 weights on the hub, of which the last layer feeds nothing here
        ("llava_v1_7b", 224, 303_179_776 - CLIP_LAYER, 1024 * 3584 + 3584 + 3584 * 3584 + 3584),
        ("llava_v1_5_7b", 336, 303_507_456 - CLIP_LAYER, 1024 * 3584 + 3584 + 3584 * 3584 + 3584),
        ("kollava_v1_5_7b", 336, 303_507_456 - CLIP_LAYER, 1024 * 3584 + 3584 + 3584 * 3584 + 3584),
        ("llava_next_7b", 336, 303_507_456 - CLIP_LAYER, 1024 * 3584 + 3584 + 3584 * 3584 + 3584 + 3584),  # newline
    ],
)
def test_a_recipes_model_builds_at_its_real_size_with_the_published_counts(
    tmp_path, name, image_size, tower_count, projector_count
):
    tower = CLIPVisionConfig(**CLIP, image_size=image_size, patch_size=14)
    counts = count_parameters(tmp_path, tower, Qwen2Config(**QWEN2_7B), read_model_settings(name))
    assert counts[ModelPart.vision_tower] == tower_count
    assert counts[ModelPart.projector] == projector_count
    assert counts[ModelPart.language_model] == 7_615_616_512  # Qwen2-7B and Qwen2.5-7B: "7.61B", their cards


def test_llava_onevision_7b_has_the_published_count(tmp_path):
    """lmms-lab's card says 8.03 B: Qwen2-7B, so400m with 26 layers, projector and newline."""
    tower = SiglipVisionConfig(**SO400M, image_size=384, patch_size=14)
    counts = count_parameters(tmp_path, tower, Qwen2Config(**QWEN2_7B), read_model_settings("llava_onevision_7b"))
    assert counts[ModelPart.projector] == 1152 * 3584 + 3584 + 3584 * 3584 + 3584 + 3584
    assert round(sum(counts.values()) / 1e9, 2) == 8.03


@pytest.mark.parametrize(
    ("language", "model_class", "published"),
    [
        # llava-hf/llava-1.5-7b-hf: index of 14,126,854,144 bytes in float16; Vicuna's table has 64 rows more there
        (LlamaConfig(**VICUNA_7B), ModelClass.llava, 7_063_427_072),
        # llava-hf/llava-v1.6-mistral-7b-hf: "7.57B", its card
        (MistralConfig(**MISTRAL_7B), ModelClass.llava_next, 7_566_747_648),
    ],
    ids=["LLaVA-1.5 7B", "LLaVA-NeXT Mistral 7B"],
)
def test_the_shape_of_a_released_model_has_its_count_without_the_unused_clip_layer(
    tmp_path, language, model_class, published
):
    tower = CLIPVisionConfig(**CLIP, image_size=336, patch_size=14)
    counts = count_parameters(tmp_path, tower, language, {"model_class": model_class, "special_tokens": []})
    assert sum(counts.values()) == published - CLIP_LAYER


def test_ldpnetv2_of_the_korean_small_model_makes_144_tokens_of_a_336_pixel_picture(tmp_path):
    """Width 1024 stands for HyperCLOVA X SEED 0.5B, whose config.json was not at hand."""
    language = LlamaConfig(**{**VICUNA_7B, "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16})
    tower = CLIPVisionConfig(**CLIP, image_size=336, patch_size=14)
    settings = read_model_settings("aiku_korean_small")
    counts = count_parameters(tmp_path, tower, language, settings)
    assert counts[ModelPart.projector] == 2 * (1024 * 1024 + 1024) + 9 * 1024 + 1024
    parts = {"vision_tower": str(tmp_path / "tower"), "language_model": str(tmp_path / "language")}
    images = load_model_spec(ModelConfig(**{**settings, **parts})).images
    assert (images.compute_layout(500, 700).num_tokens, images.token_px) == (144, 28)


@pytest.mark.parametrize("page", ["systems.md", "systems.ko.md"])
def test_the_page_of_systems_names_every_recipe(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in [*SYSTEMS, "varco_vision_14b"] if f"`{name}`" not in text] == []
