"""The recipes of published systems: a small twin of each runs all its stages and learns; real shapes have the published counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from run_helpers import RunOutput, make_llava_record
from support import builtin, picture
from test_model_classes import make_clip_tower
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from lit_vlm.anyres import ModelClass
from lit_vlm.config import parse
from lit_vlm.config.compose import compose_config
from lit_vlm.config.recipe import list_recipes, list_stages
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.subsets import EnlargedImage
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import build_on_meta
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_language_model, make_tokenizer, make_vision_tower
from lit_vlm.tasks.preflight import run_preflight
from lit_vlm.tasks.train import train
from lit_vlm.types import Language, ModelPart

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("llava", "kollava", "aiku", "hf_", "varco_vision_2", "varco_vision_small")
SYSTEMS = [name for name in list_recipes() if name.startswith(NAMES)]
ONE_OF_EACH = (
    "llava_v1_5",
    "llava_next",
    "llava_onevision",
    "aiku_korean_small",
    "varco_vision_small_0_5b",
)  # the others are long
STEPS = 60


def get_model_type(recipe: str) -> str:
    """Return the model type of a recipe's exports."""
    if recipe.startswith("aiku"):
        return "lit_vlm_llava"
    return {"llava_next": "llava_next"}.get(
        recipe, "llava_onevision" if recipe.startswith(("llava_onevision", "varco")) else "llava"
    )


@pytest.fixture(scope="module")
def twin_parts(tmp_path_factory) -> dict[str, str]:
    """Small towers of the systems' classes, and a language model."""
    folder = tmp_path_factory.mktemp("twins")
    make_vision_tower(folder / "siglip", hidden_size=32, intermediate_size=48, num_attention_heads=2)
    make_language_model(folder / "language", hidden_size=48, intermediate_size=64, num_hidden_layers=2)
    shape = json.loads((folder / "language/config.json").read_text())
    make_tokenizer().save_pretrained(folder / "qwen3")
    torch.manual_seed(0)
    sizes = {key: shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    qwen3 = Qwen3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=None, eos_token_id=shape["eos_token_id"], pad_token_id=shape["pad_token_id"],
    )  # fmt: skip
    Qwen3ForCausalLM(qwen3).save_pretrained(folder / "qwen3")
    return {
        "clip": make_clip_tower(folder / "clip"),
        "fine clip": make_clip_tower(folder / "fine_clip", image_size=72, patch_size=4),  # 18 x 18 patches
        "siglip": str(folder / "siglip"),
        "language": str(folder / "language"),
        "qwen3": str(folder / "qwen3"),
    }


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """LLaVA JSON, messages and pairs in both languages with pictures, as the published sets are; some with two pictures."""
    folder, records, pairs, messages = tmp_path_factory.mktemp("captions"), [], [], []
    for language in (Language.ko, Language.en):
        for number, sample in enumerate(builtin("caption", n=96, language=language)[0]):
            name = f"{language}_{number}.png"
            sample.images[0].load().save(folder / name)
            question, answer = (message.text for message in sample.messages)
            records.append(make_llava_record(f"<image>\n{question.strip()}", answer, id=name, image=name))
            parts = [{"type": "image"}, {"type": "text", "text": question.strip()}]
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            messages.append({"messages": turns, "images": [name]})
            wrong = [{"role": "assistant", "content": answer[::-1]}]
            pairs.append({"prompt": turns[:1], "chosen": turns[1:], "rejected": wrong, "images": [name]})
    for one, other in zip(records[:8], records[8:16], strict=True):
        answer, names = one["conversations"][1]["value"], [one["image"], other["image"]]
        records.append(make_llava_record("<image><image>\nWhat is in the first?", answer, id="two", image=names))
    (folder / "llava.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for name, rows in (("pairs", pairs), ("messages", messages)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def make_source_overrides(name: str, source, captions: Path) -> list[str]:
    """Return the overrides with which a named set reads the made records of its form."""
    file = {"preference": "pairs.jsonl", "messages": "messages.jsonl"}.get(str(source.format), "llava.json")
    values = {"path": captions / file, "image_root": captions, "split": "null"}
    if source.mapping is not None:
        values |= {"format": "llava", "mapping": "null", "kind": "null"}
    return [f"data.sources.{name}.{key}={value}" for key, value in values.items()]


def make_twin_overrides(experiment: str, parts: dict[str, str], captions: Path, folder: Path) -> list[str]:
    """Return the recipe's command in small: parts, data and steps are the twin's, all else is the recipe's."""
    config = compose_config([f"experiment={experiment}"])
    tower = "siglip" if "siglip" in config.model.vision_tower else "clip"
    tower = "fine clip" if config.model.projector == "ldpnetv2" else tower
    language = "qwen3" if "Qwen3" in config.model.language_model else "language"
    settings = parse([f"experiment={experiment}"]).config.data.sources
    sources = [text for name, source in settings.items() for text in make_source_overrides(name, source, captions)]
    if any(source.enlarge_to_px for source in settings.values()):
        sources.append("data.sources.aihub_81_glyphs.enlarge_to_px=112")  # of tiles of 56 px
    return [
        f"experiment={experiment}",
        f"run_dir={folder / 'runs'}",
        f"model.vision_tower={parts[tower]}",
        f"model.language_model={parts[language]}",
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
        f"stage.learning_rate={3e-4 if config.stage.name == 'dpo' else 3e-3}",  # of random parts
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


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.slow if name in ONE_OF_EACH else pytest.mark.long) for name in SYSTEMS],
)
def test_the_twin_of_a_recipe_runs_all_its_stages_and_learns(recipe, twin_parts, captions, tmp_path):
    outputs = run_twin(recipe, twin_parts, captions, tmp_path)
    losses = [output.read_column("train/loss") for output in outputs]
    assert [len(each) for each in losses] == [STEPS] * len(outputs)
    has_pairs = recipe.startswith("varco")
    of_text = losses[:-1] if has_pairs else losses
    assert sum(of_text[-1][-5:]) / 5 < 0.7 * sum(of_text[0][:5]) / 5
    if has_pairs:  # from ln 2
        assert losses[-1][0] == pytest.approx(math.log(2), rel=1e-3) and sum(losses[-1][-5:]) / 5 < 0.5
    config = json.loads((outputs[-1].hf / "config.json").read_text())
    is_aiku = recipe.startswith("aiku")
    assert config["model_type"] == get_model_type(recipe)
    assert config.get("projector") == ("ldpnetv2" if is_aiku else None)
    how = {part["part"]: part["how"] for part in outputs[0].manifest["trained"]}
    # Every system aligns first. The rows are those of <image> and OneVision's <video>, which no text contains, and VARCO's nine.
    count = 11 if has_pairs else 2 if recipe == "llava_onevision" else 1
    rows = f"rows of {count} token{'s' if count > 1 else ''}"
    assert how == {"vision_tower": "frozen", "projector": "all", "language_model": rows}
    how = {part["part"]: part["how"] for part in outputs[-1].manifest["trained"]}
    assert ("LoRA" in how["language_model"]) is (is_aiku or "lora" in recipe or recipe == "varco_vision_small_1_7b")
    tower_trains = recipe in ("llava_next", "llava_onevision", "hf_sft_llava")
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


QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
QWEN3_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3_14B = {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN2_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("name", "patch_size", "language", "published"),
    [
        # cards of Qwen3-1.7B ("1.7B", "1.4B" without embeddings), Qwen3-14B ("14.8B", "13.2B") and Qwen2.5-0.5B ("0.49B", "0.36B")
        (
            "varco_vision_2_0_1_7b",
            16,
            Qwen3Config(**QWEN3, **QWEN3_1_7B, tie_word_embeddings=True),
            (1.7, 1.4, 1),
        ),
        ("varco_vision_2_0_14b", 16, Qwen3Config(**QWEN3, **QWEN3_14B, tie_word_embeddings=False), (14.8, 13.2, 1)),
        ("varco_vision_small_0_5b", 14, Qwen2Config(**QWEN2_0_5B, tie_word_embeddings=True), (0.49, 0.36, 2)),
    ],
)
def test_a_varco_recipes_model_builds_at_its_real_size_with_its_cards_counts(
    tmp_path, name, patch_size, language, published
):
    """The tower is SigLIP's so400m without its last layer and its pooling head; 428 M with these, its card."""
    tower = SiglipVisionConfig(**SO400M, image_size=384, patch_size=patch_size)
    counts = count_parameters(tmp_path, tower, language, read_model_settings(name))
    width, table = language.hidden_size, language.vocab_size * language.hidden_size
    assert counts[ModelPart.projector] == 1152 * width + width + width * width + width + width  # newline
    patches = (3 * patch_size**2 + 1) * 1152 + (384 // patch_size) ** 2 * 1152 + 2 * 1152
    assert counts[ModelPart.vision_tower] == 26 * SIGLIP_LAYER + patches
    total, body, digits = published
    assert round(counts[ModelPart.language_model] / 1e9, digits) == total
    tables = table if language.tie_word_embeddings else 2 * table
    assert round((counts[ModelPart.language_model] - tables) / 1e9, digits) == body


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "patch_size", "language"),
    [
        ("varco_vision_small_0_5b", 14, Qwen2Config(**QWEN2_0_5B, tie_word_embeddings=True)),
        ("varco_vision_small_1_7b", 16, Qwen3Config(**QWEN3, **QWEN3_1_7B, tie_word_embeddings=True)),
    ],
)
def test_each_stage_of_a_small_sibling_fits_24_gb_as_the_page_says(recipe, patch_size, language, captions, tmp_path):
    SiglipVisionConfig(**SO400M, image_size=384, patch_size=patch_size).save_pretrained(tmp_path / "tower")
    make_tokenizer().save_pretrained(tmp_path / "language")
    language.save_pretrained(tmp_path / "language")
    page = (ROOT / "docs/systems.md").read_text(encoding="utf-8")
    for experiment in list_stages(recipe):
        sources = parse([f"experiment={experiment}"]).config.data.sources
        overrides = [f"model.vision_tower={tmp_path / 'tower'}", f"model.language_model={tmp_path / 'language'}"]
        overrides += [
            text for name, source in sources.items() for text in make_source_overrides(name, source, captions)
        ]
        overrides += ["init_from=null", f"run_dir={tmp_path / 'runs'}", "preflight.device=rtx4090", "run_name=memory"]
        job = parse(["task=preflight", f"experiment={experiment}", *overrides])
        run_preflight(job)
        memory = json.loads((job.dir / "preflight.json").read_text(encoding="utf-8"))["memory"]
        (chosen,) = [row for row in memory["rows"] if row["chosen"]]
        assert memory["at_caps"] < memory["capacity"] == 24e9
        assert f"| `{experiment}` | {memory['at_caps'] / 1e9:.1f} GB, {chosen['name'].split()[-1]} |" in page


def test_a_picture_of_varco_vision_2_has_576_tokens_per_tile_and_an_enlarged_page_all_36_tiles(tmp_path):
    """arXiv 2509.10105: SigLIP 2 so400m/16-384, so 24 x 24 patches. Its card enlarges to 2304 px, six tiles, before OCR."""
    tower = SiglipVisionConfig(**SO400M, image_size=384, patch_size=16)
    language = Qwen3Config(**QWEN3, **{**QWEN3_1_7B, "num_hidden_layers": 1})
    settings = read_model_settings("varco_vision_2_0_1_7b")
    count_parameters(tmp_path, tower, language, settings)
    parts = {"vision_tower": str(tmp_path / "tower"), "language_model": str(tmp_path / "language")}
    images = load_model_spec(ModelConfig(**{**settings, **parts})).images
    page = EnlargedImage(picture(400, 400), 2304)
    assert images.side**2 == 576 and page.size == (2304, 2304)
    assert images.compute_layout(*page.size).num_tiles == 1 + 36
    assert images.compute_layout(400, 400).num_tiles < 6


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
