"""The adapter folder of a LoRA stage: PEFT's own loading, starting from it, and bases that it does not belong to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from float64 import Float64, restore_pixels
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import blueprint_of, sample
from test_build import make_language_folder
from test_forward import make_plain_processor
from transformers import AutoModelForImageTextToText, Qwen2Config

from lit_vlm.config.model_folders import find_folder_errors
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.adapters import can_export_adapter, export_adapter, find_adapter_obstacle, get_adapter_folder
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.skeleton import defer_weights
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tokenizer
from lit_vlm.stages import SFTStage
from lit_vlm.types import UserError

LORA = {"language_model": {"lora": {"rank": 4, "alpha": 8}}}
BOTH = {**LORA, "vision_tower": {"lora": {"rank": 2, "alpha": 3}}}
SETTINGS = {
    "projector and language model": {"parts": LORA, "trainable": ["projector", "language_model"]},
    "tower of another rank": {"parts": BOTH},
    "whole tower": {"parts": LORA},
    "projector with adapters": {
        "parts": {**LORA, "projector": {"lora": {"rank": 3}}},
        "trainable": ["projector", "language_model"],
    },
}


def write_base(folder: Path, parts: tuple[str, str], seed: int = 0, special_tokens: tuple[str, ...] = ()) -> Path:
    """Write a whole model without VARCO's tokens, as a released one."""
    spec = blueprint_of(parts, special_tokens=list(special_tokens))
    export_model(build_model(spec, seed=seed), spec.tokenizer, spec.images, folder)
    return folder


def train_stage(base: Path, **settings) -> SFTStage:
    """Make a stage from a base, and give its adapters, rows and trained parts other values."""
    stage = SFTStage(load_model_spec(ModelConfig(), init_from=str(base)), **settings)
    stage.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    stage.model.eval()
    return stage


def export_both(stage: SFTStage, run: Path, base: Path) -> tuple[Path, Path]:
    spec = load_model_spec(ModelConfig(), init_from=str(base))
    assert can_export_adapter(stage.model)
    export_model(stage.model, spec.tokenizer, spec.images, run / "hf")
    export_adapter(stage.model, spec.tokenizer, spec.images, get_adapter_folder(run / "hf"))
    return run / "hf", run / "hf-adapter"


def compute_logits(model, spec, is_ours: bool) -> torch.Tensor:
    """Compute the logits of a sample with a picture and box tokens, in float64."""
    processor, record = Processor(spec.tokenizer, spec.images), sample("어디?", "여기", (90, 60))
    batch = collate(processor, [record])
    batch.input_ids[-4:-2] = torch.tensor(spec.tokenizer.convert_tokens_to_ids(["<bbox>", "<obj>"]))
    with torch.no_grad(), Float64():
        if is_ours:
            return model.lm_head(model.model(batch=batch))
        inputs = make_plain_processor(processor).image_processor([record.images[0].load()], return_tensors="pt")
        inputs["pixel_values"] = restore_pixels(inputs["pixel_values"])
        return model(input_ids=batch.input_ids[None], **inputs, use_cache=False).logits[0]


def load_with_peft(base: Path, folder: Path) -> PeftModel:
    model = AutoModelForImageTextToText.from_pretrained(base)
    rows = json.loads((folder / "lit_vlm.json").read_text())["rows"]
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, folder).eval()


def write_full_parts(small_parts: tuple[str, str], folder: Path) -> tuple[str, str]:
    """Write parts whose tables have no spare row: a run that adds tokens extends the base's."""
    language = make_language_folder(folder, Qwen2Config, vocab_size=len(make_tokenizer()), tie_word_embeddings=True)
    return small_parts[0], language


@pytest.mark.parametrize("tables", ["tied", "untied", "full"])
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "tower of another rank" else pytest.mark.slow) for name in SETTINGS]
)
def test_peft_loads_the_adapter_on_its_base_with_the_logits_of_the_unmerged_model(
    case, tables, parts, small_parts, tmp_path
):
    chosen = {"tied": parts, "untied": small_parts}.get(tables) or write_full_parts(small_parts, tmp_path / "full")
    base = write_base(tmp_path / "base", chosen)
    stage = train_stage(base, **SETTINGS[case])
    assert len(stage.model.adapter_base.new_ids) == 9
    spec = load_model_spec(ModelConfig(), init_from=str(base))
    hf, folder = export_both(stage, tmp_path / "run", base)
    merged = AutoModelForImageTextToText.from_pretrained(hf)
    ours = compute_logits(stage.model.double(), spec, True)
    loaded = load_with_peft(base, folder).double()
    torch.testing.assert_close(compute_logits(loaded, spec, False), ours, atol=1e-9, rtol=1e-9)
    # each once, on tied tables too: by our merge and by peft's
    torch.testing.assert_close(compute_logits(merged.double(), spec, False), ours, atol=1e-5, rtol=1e-4)
    by_peft = load_with_peft(base, folder).merge_and_unload().double()
    torch.testing.assert_close(compute_logits(by_peft, spec, False), ours, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_starts_from_an_adapter_and_its_base_has_the_weights_of_the_merged_model(
    tied, parts, small_parts, tmp_path
):
    base = write_base(tmp_path / "runs/base/hf", parts if tied else small_parts)
    stage = train_stage(base, parts=BOTH)
    hf, folder = export_both(stage, tmp_path / "runs/next", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base/hf"  # no path of the machine
    assert not [path.name for path in folder.iterdir() if path.suffix == ".json" and str(tmp_path) in path.read_text()]
    from_adapter = load_model_spec(ModelConfig(), init_from=str(folder))
    from_merged = load_model_spec(ModelConfig(), init_from=str(hf))
    assert (
        from_adapter.whole == str(base) and from_adapter.new_tokens == [] and from_adapter.images == from_merged.images
    )
    digests = [Processor(spec.tokenizer, spec.images).digest for spec in (from_adapter, from_merged)]
    assert digests[0] == digests[1]
    one, other = build_model(from_adapter), build_model(from_merged)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.adapter_base.name == str(hf)  # for the adapter of the next run
    shutil.move(base, tmp_path / "elsewhere")
    (message,) = find_folder_errors("init_from", str(folder), tmp_path / "runs")
    assert "is an adapter, and its base '../../base/hf' is no folder" in message and "model.adapter_base=" in message
    moved = ModelConfig(adapter_base=str(tmp_path / "elsewhere"))
    assert load_model_spec(moved, init_from=str(folder)).whole == str(tmp_path / "elsewhere")
    assert [*find_folder_errors("init_from", str(folder), tmp_path / "runs", str(tmp_path / "elsewhere"))] == []


def test_an_adapter_for_another_base_is_refused_by_name(parts, small_parts, tmp_path):
    base, twin = write_base(tmp_path / "base", small_parts), write_base(tmp_path / "twin", small_parts, seed=1)
    other = write_base(tmp_path / "other", parts)
    _, folder = export_both(train_stage(base, parts=LORA), tmp_path / "run", base)
    for wrong in (twin, other):
        spec = load_model_spec(ModelConfig(adapter_base=str(wrong)), init_from=str(folder))
        with pytest.raises(
            UserError, match=rf"run/hf-adapter: is an adapter of \.\./\.\./base, and {wrong} holds other weights"
        ):
            build_model(spec)
    own = folder / "lit_vlm.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"base": {}}))  # as of another program
    with pytest.raises(UserError, match=rf"an adapter of another model than {other}: its .* for one of shape"):
        build_model(load_model_spec(ModelConfig(adapter_base=str(other)), init_from=str(folder)))


def test_an_adapter_that_peft_itself_saved_is_merged_as_peft_merges_it(small_parts, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = write_base(tmp_path / "base", small_parts)
    plain = AutoModelForImageTextToText.from_pretrained(base)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2},
        modules_to_save=["multi_modal_projector"],
        trainable_token_indices=[5, 9],
        use_rslora=True,
    )
    model = get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    ours = build_model(load_model_spec(ModelConfig(special_tokens=[]), init_from=str(tmp_path / "adapter")))
    expected = dict(model.merge_and_unload().named_parameters())
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_an_adapter_of_a_kind_that_is_not_merged_here_is_refused_with_the_fix(small_parts, tmp_path):
    base = write_base(tmp_path / "base", small_parts)
    _, folder = export_both(train_stage(base, parts=LORA), tmp_path / "run", base)
    path, settings = folder / "adapter_config.json", ModelConfig(adapter_base=str(base))
    config = json.loads(path.read_text())
    for change, name in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "peft_type=IA3")):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=rf"{name} are not read here. Merge it with peft"):
            load_model_spec(settings, init_from=str(folder))
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file({name: value for name, value in tensors.items() if name != key}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="half of it is missing"):
        build_model(load_model_spec(settings, init_from=str(folder)))
    with defer_weights(), pytest.raises(UserError, match=r"reads weights piece by piece. Start from the merged model"):
        build_model(load_model_spec(settings, init_from=str(folder)))
    with pytest.raises(UserError, match=r"model\.adapter_base=there: init_from=.* is no adapter"):
        load_model_spec(ModelConfig(adapter_base="there"), init_from=str(base))


def test_a_model_of_parts_and_a_whole_language_model_have_no_adapter_folder(small_parts, tmp_path):
    stage = SFTStage(blueprint_of(small_parts), parts=LORA)
    stage.configure_model()
    assert "made from parts" in find_adapter_obstacle(stage.model) and not can_export_adapter(stage.model)
    base = write_base(tmp_path / "base", small_parts)
    whole = train_stage(base, parts={"vision_tower": {"lora": {"rank": 2}}})
    assert "trained as a whole" in find_adapter_obstacle(whole.model) and not can_export_adapter(whole.model)
    assert not can_export_adapter(train_stage(base).model)


def test_ranks_that_do_not_write_gather_what_the_adapter_needs_in_the_same_order(small_parts, tmp_path):
    base = write_base(tmp_path / "base", small_parts)
    stage = train_stage(base, parts=BOTH)
    spec, gathered = load_model_spec(ModelConfig(), init_from=str(base)), []
    weights = dict(stage.model.named_parameters())

    def get_weight(name):
        gathered.append(name)
        return weights[name]

    for is_writer in (True, False):
        export_adapter(
            stage.model,
            spec.tokenizer,
            spec.images,
            tmp_path / f"adapter-{is_writer}",
            gather_weight=get_weight,
            is_writer=is_writer,
            before_each_weight=lambda: gathered.append("barrier"),
        )
    half = len(gathered) // 2
    assert gathered[:half] == gathered[half:] and "new_tokens.head" in gathered
    assert not (tmp_path / "adapter-False").exists()
