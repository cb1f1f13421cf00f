"""The recipe lora/1_sft: what it trains, and the memory that both READMEs state for released models."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_helpers import make_llava_record
from safetensors.torch import load_file
from support import blueprint_of

from lit_vlm.config import parse
from lit_vlm.config.model_folders import require_model_folders
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tokenizer
from lit_vlm.tasks.preflight import run_preflight
from lit_vlm.tasks.train import train

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {  # row of the READMEs -> patch size of the so400m tower, config class and sizes of the language model
    "LLaVA-OneVision 0.5 B": (
        14,
        "Qwen2Config",
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 152000,
            "max_position_embeddings": 32768,
        },
    ),
    "VARCO-VISION-2.0 1.7 B": (
        16,
        "Qwen3Config",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 6144,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
    ),
}


def write_llava(folder: Path, num: int, size: tuple[int, int]) -> list[str]:
    Image.new("RGB", size, "red").save(folder / "red.jpg")
    rows = [
        make_llava_record(
            "<image>\n무엇이 보이나요?", f"A caption with number {number}. " * 8, id=str(number), image="red.jpg"
        )
        for number in range(num)
    ]
    (folder / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    return ["experiment=lora/1_sft", f"data.sources.mine.path={folder / 'llava.json'}", f"run_dir={folder / 'runs'}"]


def test_the_lora_recipe_trains_the_projector_and_adapters_and_the_next_run_starts_from_them(tmp_path, small_parts):
    blueprint = blueprint_of(small_parts)
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "released")
    overrides = write_llava(tmp_path, 4, (84, 56))
    overrides += [f"init_from={tmp_path / 'released'}", "trainer=tiny", "data.num_workers=0", "run_name=mine"]
    job = parse([*overrides, "trainer.max_steps=1"])
    train(job)
    trained = json.loads((job.dir / "manifest.json").read_text(encoding="utf-8"))["trained"]
    how = {part["part"]: part["how"] for part in trained if part["trainable"]}
    assert set(how) == {"projector", "language_model"} and "LoRA rank 128" in how["language_model"]
    assert (job.dir / "hf" / "model.safetensors").is_file()
    adapter = job.dir / "hf-adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "released"
    changes = {"run_name=mine": "run_name=next", f"init_from={tmp_path / 'released'}": f"init_from={adapter}"}
    next_job = parse([*(changes.get(word, word) for word in overrides), "trainer.max_steps=1"])
    require_model_folders(next_job)
    train(next_job)
    built = build_model(load_model_spec(ModelConfig(), init_from=str(adapter)))
    merged = load_file(job.dir / "hf" / "model.safetensors")["language_model.model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(built.get_submodule("model.language_model.layers.0.self_attn.q_proj").weight, merged)
    base = json.loads((next_job.dir / "hf-adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "../../mine/hf"


def write_parts(folder: Path, patch: int, config_class: str, sizes: dict) -> list[str]:
    """Write the configs of a released shape, without weights."""
    import transformers

    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    transformers.SiglipVisionConfig(**tower, image_size=384, patch_size=patch).save_pretrained(folder / "tower")
    config = getattr(transformers, config_class)(**sizes, tie_word_embeddings=True)
    config.save_pretrained(folder / "language")
    make_tokenizer().save_pretrained(folder / "language")
    return [f"model.vision_tower={folder / 'tower'}", f"model.language_model={folder / 'language'}", "init_from=null"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_that_the_readmes_state_is_preflights(name, tmp_path):
    overrides = write_llava(tmp_path, 32, (1920, 1080)) + write_parts(tmp_path, *SHAPES[name])
    cells = []
    for device in ("rtx4090", "h100"):
        job = parse(["task=preflight", *overrides, f"preflight.device={device}", f"run_name={device}"])
        run_preflight(job)
        facts = json.loads((job.dir / "preflight.json").read_text(encoding="utf-8"))
        (chosen,) = [row for row in facts["memory"]["rows"] if row["chosen"]]
        assert facts["would_run"] and facts["memory"]["at_caps"] < facts["memory"]["capacity"]
        cells.append(f"{facts['memory']['at_caps'] / 1e9:.1f} GB, {chosen['name'].split()[-1]}")
    counts = [sum(part[key] for part in facts["parts"]) / 1e6 for key in ("parameters", "trainable")]
    shown = [f"{count / 1e3:.3g} G" if count > 999 else f"{count:.3g} M" for count in counts]
    row = f"| {name} | {', '.join(shown)} | {' | '.join(cells)} |"
    for readme in ("README.md", "README.ko.md"):
        assert row in re.findall(r"(?m)^\|.*\|$", (ROOT / readme).read_text(encoding="utf-8"))
