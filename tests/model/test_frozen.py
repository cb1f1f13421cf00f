"""Frozen matrices stored in bfloat16: the same bits as with autocast, half the memory, and exact exported files."""

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from support import blueprint_of, builtin, sample

from lit_vlm.data.collate import collate
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.generate import generate
from lit_vlm.model.tiny import make_language_model
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.types import UserError

LORA = {"parts": {"language_model": {"lora": {"rank": 4}}}}
CASES = {
    "align": (AlignStage, {}),
    "frozen tower": (SFTStage, {"trainable": ["language_model", "projector"]}),
    "lora": (SFTStage, LORA),
    "dpo": (DPOStage, {}),
    "dpo lora": (DPOStage, LORA),
}


@pytest.fixture(scope="module")
def tied_parts(small_parts, tmp_path_factory) -> tuple[str, str]:
    """Parts whose head is tied to the embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    make_language_model(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return small_parts[0], str(folder)


def make_stage(folders, case, stores_bfloat16: bool):
    stage_class, options = CASES[case]
    stage = stage_class(blueprint_of(folders), frozen_dtype="bfloat16" if stores_bfloat16 else None, seed=5, **options)
    stage.configure_model()
    return stage


def make_batch(stage):
    blueprint = stage._model_source
    records = [sample("무엇?", "빨간 원", (60, 90)), sample("안녕?", "네. " * 9), sample("What?", "a star", (56, 56))]
    return collate(Processor(blueprint.tokenizer, blueprint.images), records)


def make_trainer(precision="bf16-mixed") -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", precision=precision, num_sanity_val_steps=0, **dict.fromkeys(quiet, False))


def make_data(stage, steps=2) -> DataModule:
    blueprint = stage._model_source
    kinds = ("preference",) if isinstance(stage, DPOStage) else ("caption", "text")
    processor = Processor(blueprint.tokenizer, blueprint.images)
    return DataModule(processor, builtin(*kinds, n=16), 0.1, global_batch_size=4, max_steps=steps)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["small_parts", "tied_parts"])
def test_outputs_and_gradients_equal_those_of_autocast_bit_for_bit(request, kind, case):
    folders, seen = request.getfixturevalue(kind), []
    for stores_bfloat16 in (False, True):
        stage = make_stage(folders, case, stores_bfloat16)
        batch = make_batch(stage)
        with torch.autocast("cpu", torch.bfloat16):
            losses = stage.compute_token_losses(batch)
            reference = getattr(stage, "reference", None)
            vision_features = stage.model.model.encode_images(batch)  # the reference has no separate tower
            answer = reference(batch=batch, vision_features=vision_features)[0] if reference is not None else None
        losses.sum().backward()
        seen.append((losses, answer, {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}))
    (losses, answer, gradients), (others, other_answer, other_gradients) = seen
    assert torch.equal(losses, others) and gradients.keys() == other_gradients.keys() != set()
    assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())
    assert answer is None or torch.equal(answer, other_answer)


@pytest.mark.parametrize("kind", ["small_parts", "tied_parts"])
def test_weights_used_outside_products_and_trainable_weights_stay_float32(request, kind):
    """Embeddings, norms, positions and a tied head, and everything that trains."""
    stage = make_stage(request.getfixturevalue(kind), "align", stores_bfloat16=True)
    types = {name: p.dtype for name, p in stage.model.named_parameters() if not p.requires_grad}
    half = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert {name for name in types if "_proj." in name or "patch_embedding" in name or ".fc" in name} <= half
    assert all("norm" in name or "embed_tokens" in name or "position" in name for name in types.keys() - half)
    assert ("lm_head.weight" in half) is (kind == "small_parts")
    assert {p.dtype for p in stage.model.parameters() if p.requires_grad} == {torch.float32}
    dpo = make_stage(request.getfixturevalue(kind), "dpo", stores_bfloat16=True)
    assert dpo.reference.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert dpo.model.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def train_and_export(stage, folder) -> tuple[dict, dict]:
    """Train; return the exported tensors and those of the model that the run started from."""
    make_trainer().fit(stage, make_data(stage))
    blueprint = stage._model_source
    export_model(stage.model, blueprint.tokenizer, blueprint.images, folder / "hf")
    start = blueprint_of((blueprint.vision_tower, blueprint.language_model))
    export_model(build_model(start, seed=5), blueprint.tokenizer, blueprint.images, folder / "start")
    last, first = (load_file(folder / name / "model.safetensors") for name in ("hf", "start"))
    assert {tensor.dtype for tensor in last.values()} == {torch.float32} and last.keys() == first.keys()
    return last, first


def test_exported_frozen_weights_have_the_values_of_the_files(small_parts, tmp_path):
    """The weights are random float32 values, which bfloat16 cannot represent."""
    stage = make_stage(small_parts, "align", stores_bfloat16=True)
    last, first = train_and_export(stage, tmp_path)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed and all(
        "projector" in name or "newline" in name or "embed" in name or "lm_head" in name for name in changed
    )
    for name in changed - {name for name in changed if "projector" in name or "newline" in name}:
        rows = (first[name] != last[name]).any(1).sum()  # rows of new tokens
        assert 0 < rows <= len(stage._model_source.new_tokens)


def test_adapters_are_merged_into_the_exact_float32_weights(small_parts, tmp_path):
    stage = make_stage(small_parts, "lora", stores_bfloat16=True)
    last, first = train_and_export(stage, tmp_path)
    layer = stage.model.get_submodule("model.language_model.layers.0.mlp.down_proj")
    key = next(key for key in first if key.endswith("layers.0.mlp.down_proj.weight"))
    expected = first[key] + layer.get_delta_weight("language_model").detach()
    torch.testing.assert_close(last[key], expected, atol=1e-7, rtol=0)
    rounded = first[key].bfloat16().float() + layer.get_delta_weight("language_model").detach()
    assert (last[key] - rounded).abs().max() > 1e-5


@pytest.mark.parametrize("case", ["align", "lora", "dpo"])
def test_a_run_ends_with_the_same_weights_with_and_without_bfloat16_storage(small_parts, case):
    ends = []
    for stores_bfloat16 in (False, True):
        stage = make_stage(small_parts, case, stores_bfloat16)
        make_trainer().fit(stage, make_data(stage))
        ends.append({n: p.detach() for n, p in stage.model.named_parameters() if p.requires_grad})
    assert ends[0] and all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_answers_are_generated_and_lightnings_checkpoints_keep_exact_values(small_parts, tmp_path):
    stage = make_stage(small_parts, "align", stores_bfloat16=True)
    fit, data = make_trainer(), make_data(stage)
    fit.fit(stage, data)
    with fit.precision_plugin.forward_context():
        assert generate(stage.model, make_batch(stage), max_new_tokens=4)
    assert fit.predict(stage, data)
    fit.save_checkpoint(tmp_path / "stage.ckpt")
    loaded = AlignStage.load_from_checkpoint(tmp_path / "stage.ckpt", weights_only=True)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    exact = build_model(blueprint_of(small_parts)).get_parameter(name)
    assert torch.equal(loaded.model.get_parameter(name), exact)
    assert not torch.equal(stage.model.get_parameter(name).float(), exact)
    (again,) = make_trainer().validate(loaded, make_data(stage), verbose=False)
    (before,) = make_trainer().validate(stage, make_data(stage), verbose=False)
    assert again["val/loss"] == before["val/loss"]


def test_another_precision_is_refused(small_parts):
    stage = make_stage(small_parts, "align", stores_bfloat16=True)
    with pytest.raises(UserError, match="holds frozen weights in bfloat16, and the trainer's precision is 32-true"):
        make_trainer("32-true").fit(stage, make_data(stage))


def test_weights_that_cannot_be_read_again_stay_in_float32(small_parts, tmp_path):
    """The cases are a folder without safetensors and a prebuilt model."""
    folder = tmp_path / "language"
    make_language_model(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    prebuilt = AlignStage(build_model(blueprint_of(small_parts)), frozen_dtype="bfloat16")
    prebuilt.configure_model()
    for stage in (make_stage((small_parts[0], str(folder)), "align", stores_bfloat16=True), prebuilt):
        assert {p.dtype for p in stage.model.parameters()} == {torch.float32}
        assert not any(p.is_meta for p in stage.model.parameters())
