"""The exported folder of a run, read by plain transformers."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from float64 import Float64, restore_pixels
from support import blueprint_of, builtin, picture, sample
from test_build import make_language_folder
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3MoeConfig

from lit_vlm.anyres import Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import MergedStateDict, export_model
from lit_vlm.model.generate import generate
from lit_vlm.model.lora import find_lora_layers
from lit_vlm.model.spec import load_model_spec, read_tiling
from lit_vlm.model.tensor_files import SafetensorsFile
from lit_vlm.stages import AlignStage, SFTStage


def export(model, blueprint, tmp_path):
    export_model(model, blueprint.tokenizer, blueprint.images, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "options", [{}, {"parts": {"language_model": {"lora": {"rank": 4}}, "vision_tower": {"lora": {"rank": 2}}}}]
)
@pytest.mark.parametrize("stage_class", [SFTStage, AlignStage])
def test_an_exported_model_loads_in_plain_transformers_and_gives_the_same_logits(
    small_parts, tmp_path, mixed, options, stage_class
):
    blueprint = blueprint_of(small_parts)
    processor = Processor(blueprint.tokenizer, blueprint.images)
    if stage_class is AlignStage and options:
        options = {"parts": {"projector": {"lora": {"rank": 2}}}}
    stage = stage_class(blueprint, **options)
    stage.configure_model()
    with torch.no_grad():  # adapters start as zero; give them an effect
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name or name.startswith("new_tokens"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    stage.model.eval()
    folder = export(stage.model, blueprint, tmp_path)
    from test_forward import make_plain_processor

    plain = AutoModelForImageTextToText.from_pretrained(folder).eval().double()
    stage.model.double()
    assert type(plain).__module__.startswith("transformers.")
    stock = make_plain_processor(processor)
    for record in [*mixed, builtin("grounding")[0][0]]:
        batch = collate(processor, [record])
        images = [image.load() for image in record.images]
        inputs = {}
        if images:
            inputs = dict(stock.image_processor([images], return_tensors="pt"))
            inputs["pixel_values"] = restore_pixels(inputs["pixel_values"])
        with torch.no_grad(), Float64():
            theirs = plain(input_ids=batch.input_ids[None], **inputs).logits[0]
            ours = stage.model.lm_head(stage.model.model(batch=batch))
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_a_stage_can_start_from_an_exported_folder(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts, Tiling.base)
    model = build_model(blueprint)
    folder = export(model, blueprint, tmp_path)
    again = load_model_spec(ModelConfig(), init_from=str(folder), tiling=read_tiling(str(folder)))
    assert again.new_tokens == []
    assert again.images == blueprint.images
    for (name, a), (_, b) in zip(model.named_parameters(), build_model(again).named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.tokenizer.chat_template == blueprint.tokenizer.chat_template


def test_no_exported_file_names_a_folder_of_the_machine_that_wrote_it(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts, Tiling.base)
    model, machine_folder = build_model(blueprint), "/home/mina/models/base"
    for config in (model.config, model.config.text_config, model.config.vision_config, model.generation_config):
        config._name_or_path = machine_folder
    model.config.text_config.base_model_name_or_path = machine_folder
    model.config.vision_config.teacher_name_or_path = "google/siglip2-so400m-patch14-384"  # a name on the hub: is kept
    blueprint.tokenizer.init_kwargs |= {"name_or_path": machine_folder, "vocab_file": f"{machine_folder}/vocab.json"}
    blueprint.tokenizer.name_or_path = machine_folder
    files = [path for path in export(model, blueprint, tmp_path).iterdir() if path.suffix != ".safetensors"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    assert [
        name for name, text in texts.items() if machine_folder in text or str(small_parts) in text or "mina" in text
    ] == []
    assert "google/siglip2-so400m-patch14-384" in texts["config.json"] and len(files) >= 8


def test_plain_transformers_answers_from_the_folder_in_a_process_without_our_code(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts)
    folder = export(build_model(blueprint), blueprint, tmp_path)
    picture(90, 60).load().save(tmp_path / "photo.png")
    program = f"""
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor
class P(LlavaOnevisionProcessor):
    @classmethod
    def get_attributes(cls): return ["image_processor", "tokenizer"]
P.__name__ = "LlavaOnevisionProcessor"
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r})
processor = P.from_pretrained({str(folder)!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "무엇이 보이나요?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open({str(tmp_path / "photo.png")!r}), return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist())
assert not any(name.split(".")[0] in ("lit_vlm", "callbacks") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = load_model_spec(ModelConfig(), init_from=str(folder))
    processor, model = Processor(again.tokenizer, again.images), build_model(again)
    record = sample("무엇이 보이나요?", "x", (90, 60), seed=0)
    ours = generate(model, collate(processor, [record]), max_new_tokens=8)
    assert json.loads(done.stdout.strip().splitlines()[-1]) == ours[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest_file", ["5GB", "100kB"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_configs_are_written_byte_for_byte_as_transformers_writes_them(
    parts, small_parts, tmp_path, dtype, largest_file, tied
):
    blueprint = blueprint_of(parts if tied else small_parts)
    model = build_model(blueprint, dtype)
    export_model(model, blueprint.tokenizer, blueprint.images, tmp_path / "hf", max_shard_size=largest_file)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=dtype)
    plain.save_pretrained(tmp_path / "theirs", max_shard_size=largest_file)
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert (len(theirs) > 3) is (largest_file != "5GB")
    for name, content in theirs.items():
        assert (tmp_path / "hf" / name).read_bytes() == content, name


def test_merged_adapters_equal_pefts_bit_for_bit(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts)
    stage = SFTStage(blueprint, parts={"language_model": {"lora": {"rank": 4}}, "vision_tower": {"lora": {"rank": 2}}})
    stage.configure_model()
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = export(stage.model, blueprint, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    layers = find_lora_layers(stage.model)
    assert len(layers) > 14
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        assert torch.equal(plain.get_submodule(name).weight, layer.get_base_layer().weight), name


def test_the_processor_files_name_the_classes_that_torchvision_needs(small_parts, tmp_path):
    folder = export(build_model(blueprint_of(small_parts)), blueprint_of(small_parts), tmp_path)
    config = json.loads((folder / "processor_config.json").read_text())
    assert config["processor_class"] == "LlavaOnevisionProcessor"
    assert config["video_processor"]["video_processor_type"] == "LlavaOnevisionVideoProcessor"
    assert config["num_image_tokens"] == 16
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<bbox>") > 0


def test_an_export_replaces_an_older_folder_completely_and_leaves_no_temporary_files(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts)
    model = build_model(blueprint)
    folder = export(model, blueprint, tmp_path)
    (folder / "stale.txt").write_text("old")
    export(model, blueprint, tmp_path)
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("older", [False, True])
def test_an_export_onto_a_full_disk_leaves_no_temporary_files_and_the_older_folder_complete(
    small_parts, tmp_path, monkeypatch, older
):
    blueprint = blueprint_of(small_parts)
    model = build_model(blueprint)
    if older:
        export(model, blueprint, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").rglob("*")}
    monkeypatch.setattr(SafetensorsFile, "write", fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(model, blueprint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] * older
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").rglob("*")} == before


def test_leftovers_of_a_killed_export_are_removed_by_the_next_one(small_parts, tmp_path, monkeypatch):
    blueprint = blueprint_of(small_parts)
    model = build_model(blueprint)
    killed = os.fork()
    if not killed:
        monkeypatch.setattr(SafetensorsFile, "write", lambda file, folder, values: os._exit(9))
        export(model, blueprint, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 1
    export(model, blueprint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def fail_with_full_disk(file, folder, values):
    (folder / file.name).write_bytes(b"some of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_ranks_that_do_not_write_take_part_in_gathering_fused_experts(small_parts, tmp_path):
    """All ranks must gather the same weights in the same order, or they wait for each other for ever."""
    options = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    model = build_model(
        blueprint_of((small_parts[0], make_language_folder(tmp_path / "moe", Qwen3MoeConfig, **options)))
    )
    weights, gathered = dict(model.named_parameters()), []

    def get_weight(name):
        gathered.append(name)
        return weights[name]

    writes, helps = MergedStateDict(model, get_weight), MergedStateDict(model, get_weight)
    values = {name: writes.compute_value(name) for name in writes.tensors}
    written, gathered = gathered, []
    for name in helps.tensors:
        helps.gather(name)
    assert gathered == written and any(name.endswith("experts.gate_up_proj") for name in gathered)
    assert {name: value.shape for name, value in values.items()} == {n: t.shape for n, t in writes.tensors.items()}


def test_generation_stops_at_the_end_of_an_answer_in_the_template_and_at_the_tokenizers_end(small_parts, tmp_path):
    """A base model ends texts with <|endoftext|>; trained on ChatML it must stop at <|im_end|>."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(small_parts[1], base)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        file = json.loads((base / name).read_text())
        if name == "tokenizer_config.json":
            file["eos_token"] = "<|endoftext|>"
        else:
            file["eos_token_id"] = 0
        (base / name).write_text(json.dumps(file))
    blueprint = blueprint_of((small_parts[0], str(base)), chat_template="chatml")
    folder = export(build_model(blueprint), blueprint, tmp_path)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == {blueprint.tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}


TORCHVISION = Path(sys.prefix) / "torchvision"  # make setup installs it there, without the CUDA libraries that it needs


@pytest.mark.skipif(not TORCHVISION.is_dir(), reason="torchvision is not in .venv/torchvision; make test puts it there")
def test_autoprocessor_loads_the_folder_if_torchvision_is_installed(small_parts, tmp_path, processor):
    blueprint = blueprint_of(small_parts)
    folder = export(build_model(blueprint), blueprint, tmp_path)
    picture(90, 60).load().save(tmp_path / "photo.png")
    program = f"""
import sys, torch
try:
    torch.ops.load_library({str(TORCHVISION / "torchvision" / "_C.so")!r})
except OSError:  # its binaries need CUDA's, which a build of torch for CPUs lacks; nothing here calls these two operators
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.insert(0, {str(TORCHVISION)!r})
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "무엇이 보이나요?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open({str(tmp_path / "photo.png")!r}), return_tensors="pt")
print(type(processor).__name__, inputs["input_ids"][0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, _, ids = done.stdout.strip().splitlines()[-1].partition(" ")
    assert name == "LlavaOnevisionProcessor"
    assert json.loads(ids) == processor.encode_prompt(sample("무엇이 보이나요?", "x", (90, 60))).input_ids.tolist()
