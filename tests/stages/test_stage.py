"""Trainable parts, the scale of the loss, and a stage as an ordinary LightningModule."""

import copy

import lightning as L
import pytest
import torch
from support import blueprint_of, builtin

from lit_vlm.anyres import Tiling
from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import LearningRateSchedule
from lit_vlm.config.schema import STAGE_CONFIGS, DPOStageConfig, LoraConfig, PartConfig, PartsConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.datamodule import DataModule, TrainMicroBatches
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.generate import generate
from lit_vlm.model.parts import UNUSED_PARAMETERS, get_part
from lit_vlm.stages import STAGES, AlignStage, DPOStage, HighresStage, SFTStage
from lit_vlm.types import Language, ModelPart, Sample, UserError

KINDS = ("caption", "number", "grounding", "text", "multi_image")


def make_trainer(**options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)


def make_module(processor, *kinds, **options) -> DataModule:
    sources = builtin(*(kinds or KINDS), n=24) + builtin("caption", n=24, language=Language.en)
    return DataModule(processor, sources, 0.1, **{"global_batch_size": 16, "max_steps": 3, **options})


def copy_weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model, processor, *, steps=3, tokens=100_000, optimizer="sgd", stage_class=SFTStage, **options):
    """Train a copy; return its weights, the trainer and the data module. SGD shows a wrong loss scale that Adam hides."""
    stage = stage_class(copy.deepcopy(model), learning_rate=0.05, warmup=0.0, schedule="constant", **options)
    if optimizer == "sgd":
        stage.configure_optimizers = lambda: torch.optim.SGD(
            [p for p in stage.model.parameters() if p.requires_grad], lr=0.05
        )
    module = make_module(processor, max_steps=steps, tokens_per_micro_batch=tokens, tiles_per_micro_batch=10_000)
    fit = make_trainer(gradient_clip_val=1.0)
    fit.fit(stage, module)
    return copy_weights(stage.model), fit, module


def test_k_micro_batches_equal_one_batch_of_k(model, processor):
    one, _, _ = train(model, processor)
    many, fit, module = train(model, processor, tokens=400)
    assert fit.accumulate_grad_batches == module.plan.accumulate_grad_batches > 2
    assert fit.global_step == 3
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-6, rtol=1e-5)


def test_the_logged_loss_is_the_mean_over_the_steps_supervised_tokens(model, processor):
    stage = SFTStage(copy.deepcopy(model), learning_rate=1e-9)
    module = make_module(processor, max_steps=1, tokens_per_micro_batch=400)
    fit = make_trainer()
    fit.fit(stage, module)
    reader = TrainMicroBatches(processor, module.plan, 0)
    with torch.no_grad():
        losses = torch.cat(
            [stage.compute_token_losses(reader[micro]) for micro in range(module.plan.accumulate_grad_batches)]
        )
    assert len(losses) == module.plan.get_step(0).num_supervised
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("stage_class", "trainable"),
    [
        (AlignStage, {ModelPart.projector}),
        (SFTStage, set(ModelPart)),
        (HighresStage, set(ModelPart)),
        (AlignStage, {ModelPart.projector, ModelPart.vision_tower}),
        (SFTStage, {ModelPart.language_model}),
    ],
)
def test_exactly_the_parts_that_a_stage_names_change(model, processor, stage_class, trainable):
    before = copy_weights(model)
    options = {} if trainable == set(stage_class.default_trainable) else {"trainable": sorted(trainable)}
    after, _, _ = train(model, processor, stage_class=stage_class, optimizer="adam", **options)
    for name, old in before.items():
        changed = not torch.equal(old, after[name])
        assert changed == (get_part(name) in trainable and not UNUSED_PARAMETERS.match(name)), name


def test_the_gradient_audit_stops_a_run_that_would_train_something_else(model, processor):
    stage = SFTStage(copy.deepcopy(model))
    stage.configure_model()
    stage.model.model.encode_tiles = lambda tiles: torch.zeros(len(tiles), 16, 32)  # detached from the loss
    with pytest.raises(UserError, match=r"without a gradient \['model\.vision_tower"):
        make_trainer().fit(stage, make_module(processor, max_steps=1))


def test_the_gradient_audit_of_a_text_only_stage_runs_once(model, processor, monkeypatch):
    stage, calls = SFTStage(copy.deepcopy(model), trainable=["language_model"]), []
    monkeypatch.setattr(stage, "check_gradients", lambda **options: calls.append(options))
    make_trainer().fit(stage, DataModule(processor, builtin("text", n=24), 0.1, global_batch_size=4, max_steps=3))
    assert calls == [{"with_images": False}]


@pytest.mark.parametrize("stage_class", [SFTStage, DPOStage])
def test_training_and_validation_run_in_pure_bfloat16(small_parts, processor, stage_class):
    kinds = ("preference",) if stage_class is DPOStage else ("caption", "text")
    module = make_module(processor, *kinds, max_steps=2) if stage_class is SFTStage else None
    module = module or DataModule(processor, builtin(*kinds, n=24), 0.2, global_batch_size=8, max_steps=2)
    fit = make_trainer(precision="bf16-true")
    fit.fit(stage_class(build_model(blueprint_of(small_parts)), learning_rate=1e-3), module)
    assert module.held_out and 0 < float(fit.callback_metrics["val/loss"]) < 20


def test_a_first_step_without_images_is_accepted_and_data_without_images_is_refused(model, processor):
    module = make_module(processor, "text", "caption", global_batch_size=1, max_steps=6, tokens_per_micro_batch=400)
    make_trainer().fit(SFTStage(copy.deepcopy(model)), module)
    assert module.plan.get_step(0).num_tiles == 0
    text_only = DataModule(processor, builtin("text", n=24), 0.1, global_batch_size=4, max_steps=1)
    with pytest.raises(UserError, match=r"No sample has an image.*vision_tower.*stage\.trainable=\[language_model\]"):
        make_trainer().fit(SFTStage(copy.deepcopy(model)), text_only)
    make_trainer().fit(SFTStage(copy.deepcopy(model), trainable=["language_model"]), text_only)


def test_new_token_rows_train_while_the_language_model_is_frozen(small_parts, processor):
    blueprint = blueprint_of(small_parts)
    stage = AlignStage(blueprint, learning_rate=1e-2, warmup=0.0)
    module = make_module(Processor(blueprint.tokenizer, blueprint.images), "grounding", max_steps=2)
    stage.configure_model()
    before = copy_weights(stage.model)
    make_trainer().fit(stage, module)
    rows = stage.model.new_tokens
    known = {token: i for i, token in enumerate(blueprint.new_tokens)}
    changes = (rows.embedding - before["new_tokens.embedding"]).abs().sum(1)
    assert changes[known["<bbox>"]] > 0
    assert torch.equal(stage.model.get_input_embeddings().weight, before["model.language_model.embed_tokens.weight"])
    assert {row.part: row.how for row in stage.part_summary}["language_model"] == f"rows of {len(known)} tokens"


def test_lora_trains_only_the_adapters_of_its_part(model, processor):
    lora = {"language_model": {"lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}}}
    before = copy_weights(model)
    after, _, _ = train(model, processor, optimizer="adam", parts=lora)
    for name, old in before.items():
        mine = after.get(name, after.get(name.replace("_proj.", "_proj.base_layer.")))
        if get_part(name) is ModelPart.language_model:
            assert torch.equal(mine, old), name
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in after.items())


def test_control_token_rows_train_under_lora_in_any_stage(small_parts, tmp_path):
    """`align` sees captions only, so the rows of <bbox> would never be trained if all later stages used LoRA."""
    blueprint = blueprint_of(small_parts)
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "hf")
    lora = {"language_model": {"lora": {"rank": 2}}}
    stage = SFTStage(tmp_path / "hf", parts=lora, learning_rate=1e-2, warmup=0.0)
    stage.configure_model()
    assert {row.part: row.how for row in stage.part_summary}["language_model"] == "LoRA rank 2, rows of 9 tokens"
    before = stage.model.new_tokens.embedding.detach().clone()
    make_trainer().fit(stage, make_module(Processor(blueprint.tokenizer, blueprint.images), "grounding", max_steps=2))
    assert (
        (stage.model.new_tokens.embedding - before).abs().sum(1) > 0
    ).sum() >= 5  # <gro>, <obj>, </obj>, <bbox>, </bbox>


def test_predicting_on_pairs_answers_their_prompts(model, processor):
    module = DataModule(processor, builtin("preference", n=16), 0.25, global_batch_size=4, max_steps=1)
    predictions = {
        answer["sample_id"]: answer["ids"]
        for batch in make_trainer().predict(DPOStage(model), module)
        for answer in batch
    }
    for number in range(len(module.held_out)):
        record = module.held_out.get_record(number)
        prompt_sample = Sample(
            record.id, "s", "s:1", record.kind, record.language, (*record.prompt, record.chosen), record.images
        )
        assert predictions[f"{record.source}/{record.id}"] == generate(model, collate(processor, [prompt_sample]))[0]


def test_an_unknown_lora_target_is_reported_with_the_right_names(model):
    stage = SFTStage(model, parts={"language_model": {"lora": {"rank": 4, "targets": ["qproj"]}}})
    with pytest.raises(UserError, match="qproj is no linear layer.*q_proj"):
        stage.configure_model()


def test_each_part_has_its_own_learning_rate_weight_decay_and_warmup(model, processor):
    parts = {
        "vision_tower": {"learning_rate": 1e-4, "weight_decay": 0.1, "warmup": 0.5},
        "projector": {"learning_rate": 3e-3},
    }
    stage = SFTStage(copy.deepcopy(model), learning_rate=1e-3, parts=parts, warmup=0.0)
    module = make_module(processor, max_steps=10)
    rates = []

    class RateRecorder(L.Callback):
        def on_train_batch_start(self, make_trainer, *_):
            rates.append({group["part"]: group["lr"] for group in make_trainer.optimizers[0].param_groups})

    make_trainer(callbacks=[RateRecorder()]).fit(stage, module)
    assert rates[0]["language_model"] == pytest.approx(1e-3)
    assert rates[0]["projector"] == pytest.approx(3e-3)
    assert rates[0]["vision_tower"] == pytest.approx(1e-4 / 6)
    assert max(rate["vision_tower"] for rate in rates) == pytest.approx(1e-4)
    assert rates[-1]["language_model"] < 1e-4
    decays = {(g["part"], g["params"][0].ndim > 1): g["weight_decay"] for g in stage.trainer.optimizers[0].param_groups}
    assert decays["vision_tower", True] == 0.1
    assert decays["vision_tower", False] == decays["language_model", True] == 0.0


@pytest.mark.parametrize("level", ["selective", True])
@pytest.mark.parametrize("stage_class", [SFTStage, AlignStage])
def test_activation_checkpointing_recomputes_and_changes_no_number(model, processor, stage_class, level):
    calls = []
    plain, _, _ = train(model, processor, stage_class=stage_class)
    layer = type(model.model.language_model.layers[0].mlp)
    forward = layer.forward
    layer.forward = lambda self, *a: (calls.append(torch.is_grad_enabled()), forward(self, *a))[1]
    try:
        checkpointed, _, _ = train(model, processor, stage_class=stage_class, activation_checkpointing=level)
        assert len(calls) == 2 * 2 * 3 + 2 * 1  # two layers, computed twice, three steps, and one validation batch
    finally:
        layer.forward = forward
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-5)


def test_frozen_parts_are_in_eval_mode_and_trainable_ones_in_train_mode(model):
    stage = AlignStage(model)
    stage.configure_model()
    inner = stage.model.model
    assert not inner.vision_tower.training
    assert not inner.language_model.training
    assert inner.multi_modal_projector.training


def test_a_frozen_tower_runs_without_autograd(model, processor):
    stage = AlignStage(model)
    stage.configure_model()
    batch = collate(processor, [builtin("caption")[0][0]])
    assert not stage.model.model.encode_tiles(batch.tiles).requires_grad


def test_fit_validate_predict_and_load_from_checkpoint_work_as_in_any_lightning_project(small_parts, tmp_path):
    blueprint = blueprint_of(small_parts, Tiling.base)
    processor = Processor(blueprint.tokenizer, blueprint.images)
    stage, module = SFTStage(blueprint, learning_rate=1e-3, tiling="base"), make_module(processor, max_steps=2)
    fit = make_trainer()
    fit.fit(stage, module)
    (before,) = fit.validate(stage, module, verbose=False)
    answers = fit.predict(stage, module)
    assert all({"sample_id", "ids"} == set(answer) for batch in answers for answer in batch)
    fit.save_checkpoint(tmp_path / "stage.ckpt")
    loaded = SFTStage.load_from_checkpoint(tmp_path / "stage.ckpt", weights_only=True)
    (after,) = make_trainer().validate(loaded, make_module(processor), verbose=False)
    assert after["val/loss"] == pytest.approx(before["val/loss"], abs=1e-6)
    for (name, a), (_, b) in zip(stage.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dpo_learns_the_preferences_and_checks_its_first_loss(model, processor):
    module = DataModule(processor, builtin("preference", n=64), 0.1, global_batch_size=16, max_steps=20, overfit=True)
    stage = DPOStage(copy.deepcopy(model), learning_rate=1e-2, beta=0.5, warmup=0.0)
    fit = make_trainer()
    fit.fit(stage, module)
    assert float(fit.callback_metrics["train/rewards/margins"]) > 1
    assert float(fit.callback_metrics["train/rewards/accuracies"]) == 1.0
    assert 0.0 <= float(fit.callback_metrics["val/rewards/accuracies"]) <= 1.0
    other = DPOStage(copy.deepcopy(model))
    other.configure_model()
    with torch.no_grad():
        other.reference.lm_head.weight.add_(1.0 * torch.randn_like(other.reference.lm_head.weight))
    with pytest.raises(UserError, match=r"must be 0\.693147"):
        make_trainer().fit(
            other, DataModule(processor, builtin("preference", n=64), 0.1, global_batch_size=16, max_steps=2)
        )


def test_dpo_with_lora_uses_the_model_without_adapters_as_reference(model, processor):
    module = DataModule(processor, builtin("preference", n=32), 0.1, global_batch_size=8, max_steps=3)
    stage = DPOStage(copy.deepcopy(model), learning_rate=1e-2, parts={"language_model": {"lora": {"rank": 4}}})
    make_trainer().fit(stage, module)
    assert stage.reference is None
    with stage._use_reference() as reference, torch.no_grad():
        batch = collate(processor, [builtin("caption")[0][0]])
        base = reference.model(batch=batch)
    torch.testing.assert_close(base, model.model(batch=batch), atol=1e-6, rtol=0)


def test_losses_that_sort_the_batch_are_refused_in_micro_batches(model, processor):
    module = DataModule(
        processor, builtin("preference", n=32), 0.1, global_batch_size=16, tokens_per_micro_batch=300, max_steps=1
    )
    stage = DPOStage(copy.deepcopy(model), loss_type=["aot"])
    with pytest.raises(UserError, match=r"aot sorts the whole batch.*global_batch_size"):
        make_trainer().fit(stage, module)


def test_a_prebuilt_model_is_accepted_and_a_foreign_one_is_refused(blueprint):
    from transformers import LlavaOnevisionForConditionalGeneration

    stage = SFTStage(build_model(blueprint))
    stage.configure_model()
    assert stage.part_summary
    foreign = SFTStage(LlavaOnevisionForConditionalGeneration(blueprint.config))
    with pytest.raises(UserError, match="Give a model that lit_vlm built"):
        foreign.configure_model()


def test_dpo_with_lora_trains_no_token_rows_because_its_reference_shares_them(small_parts):
    stage = DPOStage(blueprint_of(small_parts), parts={"language_model": {"lora": {"rank": 2}}})  # adds nine tokens
    stage.configure_model()
    assert {row.part: row.how for row in stage.part_summary}["language_model"] == "LoRA rank 2"
    assert not hasattr(stage.model, "new_tokens")


def test_a_stage_takes_its_config_or_keyword_arguments_of_the_same_names(blueprint):
    part = PartConfig(learning_rate=2e-6, lora=LoraConfig(rank=4, targets=["q_proj"]))
    config = DPOStageConfig(
        name=DPOStage.name,
        trainable=[ModelPart.language_model],
        learning_rate=1e-4,
        schedule=LearningRateSchedule.linear,
        activation_checkpointing=Level.full,
        parts=PartsConfig(language_model=part),
        beta=0.3,
        loss_type=["sigmoid", "sft"],
    )
    settings = {
        "trainable": ["language_model"],
        "learning_rate": 1e-4,
        "schedule": "linear",
        "activation_checkpointing": True,
        "parts": {"language_model": {"learning_rate": 2e-6, "lora": {"rank": 4, "targets": ["q_proj"]}}},
        "beta": 0.3,
        "loss_type": ("sigmoid", "sft"),
    }
    stage = DPOStage(blueprint, **settings)
    assert stage.config == config
    assert dict(stage.hparams) == dict(DPOStage(blueprint, config).hparams) == dict(DPOStage(**stage.hparams).hparams)
    assert stage.hparams["schedule"] == "linear" and stage.hparams["trainable"] == ["language_model"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1e-5}, "stage.learning_rat: Key 'learning_rat' not in 'StageConfig'"),
        ({"learning_rate": "fast"}, "stage.learning_rate: Value 'fast' .* could not be converted to Float"),
        ({"parts": {"head": {}}}, "stage.parts.head: Key 'head' not in 'PartsConfig'"),
        ({"trainable": ["projektor"]}, "stage.trainable.*Invalid value 'projektor', expected one of"),
    ],
)
def test_an_unknown_argument_of_a_stage_is_refused_by_name(blueprint, settings, message):
    with pytest.raises(UserError, match=message):
        SFTStage(blueprint, **settings)


def test_each_stage_names_its_config_class():
    assert {name: stage.config_class for name, stage in STAGES.items()} == {
        name.value: config_class for name, config_class in STAGE_CONFIGS.items()
    }
