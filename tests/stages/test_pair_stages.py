"""The first stage of BLIP-2 under Lightning: its data, resumed fits, two ranks, saved folders, and what it learns."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from float64 import Float64
from lightning.pytorch.callbacks import ModelCheckpoint
from support import blueprint_of
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    BlipVisionConfig,
    T5Config,
)
from waiting import PATIENCE

from lit_vlm.data.caption_pairs import CaptionDataModule, CaptionPairs, DistinctCaptions, PairCollator, StepBatches
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.evaluation.retrieval import compute_recalls, evaluate_retrieval
from lit_vlm.model.blip import build_blip
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.qformer.build import build_blip2, load_blip2, load_caption_tokenizer, save_blip2, tokenize_captions
from lit_vlm.model.qformer.generation import (
    build_blip2_generator,
    generate_captions,
    make_caption_labels,
    save_blip2_generator,
    tokenize_prompted,
    tokenize_start,
)
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining
from lit_vlm.model.tiny import make_language_model, make_text_encoder, make_vision_tower
from lit_vlm.stages.caption_pairs import BlipStage, GenerateStage, RepresentStage
from lit_vlm.types import Language, RecordError, UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
from rank_runs import run_ranks

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
SIZE, STEPS = 28, 4


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    make_text_encoder(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return str(folder)


def build(text_encoder: str, seed: int = 0, **options):
    """Build a small model; its vision tower trains, because it is new."""
    vision = Blip2VisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    options = {"num_queries": 3, "feature_width": 8, "freeze_vision_tower": False, "seed": seed} | options
    return build_blip2(text_encoder, vision, **options)


def make_source(language: str = "ko", num_samples: int = 40, **options) -> BuiltinSource:
    return BuiltinSource("captions", "caption", language=Language(language), num_samples=num_samples, **options)


def make_data(tokenizer, **options) -> CaptionDataModule:
    tokenize = functools.partial(tokenize_captions, tokenizer, max_tokens=16)
    options = {"image_size": SIZE, "global_batch_size": 8, "num_steps": STEPS} | options
    return CaptionDataModule([make_source()], [make_source(num_samples=12, held_out=True)], tokenize, **options)


def fit(stage, data, max_steps: int = STEPS, checkpoint: str | None = None, **options) -> L.Trainer:
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False} | QUIET | options
    trainer = L.Trainer(max_steps=max_steps, **options)
    trainer.fit(stage, data, ckpt_path=checkpoint)
    return trainer


# ---- pairs


def test_a_step_has_the_same_pairs_on_any_number_of_ranks(text_encoder):
    tokenizer = load_caption_tokenizer(text_encoder)
    collate = PairCollator(functools.partial(tokenize_captions, tokenizer, max_tokens=16))
    pairs = CaptionPairs([make_source(), make_source("en", 24)], SIZE)
    options = {"global_batch_size": 12, "num_steps": 9, "seed": 3}
    whole = StepBatches(pairs, collate, **options)
    ranks = [StepBatches(pairs, collate, **options, rank=rank, world_size=3) for rank in range(3)]
    ids = []
    for step in range(9):
        parts = [batches[step] for batches in ranks]
        for name in ("pixel_values", "input_ids", "attention_mask", "pair_ids"):
            value = getattr(whole[step], name)
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value)
        ids += whole[step].pair_ids[:, 0].tolist()
    assert len(set(ids[: len(pairs)])) == len(pairs)  # an epoch reads each pair once
    with pytest.raises(UserError, match="global_batch_size=12 cannot be divided among 5 ranks"):
        StepBatches(pairs, collate, **options, world_size=5)


def test_pairs_are_the_pixels_and_tokens_of_transformers(text_encoder, tmp_path):
    model, tokenizer = build(text_encoder)
    save_blip2(model, tokenizer, tmp_path / "saved")
    source = make_source()
    batch = PairCollator(functools.partial(tokenize_captions, tokenizer, max_tokens=16))(
        [CaptionPairs([source], SIZE)[number] for number in range(4)]
    )
    processor = BlipImageProcessorPil.from_pretrained(tmp_path / "saved")
    pixels = processor([source[number].images[0].load() for number in range(4)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch.pixel_values, pixels, rtol=0, atol=1e-5)  # one float32 rounding of values below 3
    texts = [source[number].messages[-1].text for number in range(4)]
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved").batch_decode(batch.input_ids, skip_special_tokens=True)
        == texts
    )


def test_a_record_without_one_image_is_no_pair():
    with pytest.raises(RecordError, match="it has 0 images; a caption belongs to one"):
        CaptionPairs([BuiltinSource("t", "text", language=Language.ko, num_samples=4)], SIZE)[0]
    with pytest.raises(RecordError, match="preference pair"):
        CaptionPairs([BuiltinSource("t", "preference", language=Language.ko, num_samples=4)], SIZE)[0]


def test_distinct_captions_all_differ():
    source = DistinctCaptions(make_source("en", 200, hard=True), 50)
    texts = [source[number].messages[-1].text for number in range(len(source))]
    assert len(set(texts)) == len(texts) == 50
    with pytest.raises(UserError, match="different captions in 20 records, and 50 are needed"):
        DistinctCaptions(make_source("en", 20, hard=True), 50)


# ---- the model and its folder


def test_the_text_side_starts_as_the_text_encoder(text_encoder):
    model, tokenizer = build(text_encoder)
    model.eval()
    bert = BertForMaskedLM.from_pretrained(text_encoder).eval()
    bert.bert.embeddings.token_type_embeddings.weight.data.zero_()  # the Q-Former has none
    ids, mask = tokenize_captions(tokenizer, ["빨간 원", "a red circle"], max_tokens=12)
    with torch.no_grad():
        expected = bert.bert(ids, attention_mask=mask).last_hidden_state
        embeddings = model.retrieval.embeddings(input_ids=ids)
        ours = model.retrieval.qformer(query_embeds=embeddings, query_length=0, attention_mask=mask).last_hidden_state
        table = model.retrieval.embeddings.word_embeddings.weight
        logits, expected_logits = model.text_head(ours, table), bert(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    size = expected_logits.shape[-1]
    torch.testing.assert_close(logits[mask.bool()][:, :size], expected_logits[mask.bool()], rtol=0, atol=1e-5)
    for part in (model.retrieval.vision_projection, model.retrieval.text_projection, model.retrieval.itm_head):
        bound = part.in_features**-0.5  # PyTorch's initialisation is uniform within it, as LAVIS's new layers
        assert part.bias.any() and 0.8 * bound < float(part.weight.detach().abs().max()) <= bound
    layer = model.retrieval.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(layer.output_query.LayerNorm.weight, layer.output.LayerNorm.weight)


def test_the_caption_token_is_added_once(text_encoder, tmp_path):
    model, tokenizer = build(text_encoder)
    assert tokenizer.bos_token == "[DEC]" and model.bos_token_id == len(tokenizer) - 1
    save_blip2(model, tokenizer, tmp_path / "saved")
    again = load_caption_tokenizer(str(tmp_path / "saved"))
    assert len(again) == len(tokenizer) and again.bos_token_id == tokenizer.bos_token_id


def test_a_saved_folder_has_the_same_scores_in_transformers_and_continues(text_encoder, tmp_path):
    model, tokenizer = build(text_encoder)
    model.eval()
    with torch.no_grad():
        model.temperature.fill_(0.05)
        model.text_head.bias.normal_()
    save_blip2(model, tokenizer, tmp_path / "saved")
    batch = next(iter(make_data(tokenizer).train_dataloader()))
    library = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "saved").eval()
    inputs = {"pixel_values": batch.pixel_values, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        image = model.encode_images(batch.pixel_values)
        similarities = torch.einsum(
            "iqe,je->ijq",
            model.compute_image_features(image),
            model.compute_text_features(batch.input_ids, batch.attention_mask),
        ).amax(-1)
        matching = model.match(image, batch.input_ids, batch.attention_mask)
        scores = [library(**inputs, use_image_text_matching_head=head).logits_per_image for head in (False, True)]
    torch.testing.assert_close(scores[0], similarities, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[1], matching, rtol=0, atol=1e-6)
    continued, _ = load_blip2(tmp_path / "saved", freeze_vision_tower=False)
    assert continued.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, continued.state_dict()[name]) for name, value in model.state_dict().items())


def test_only_the_last_norm_of_a_frozen_tower_trains(text_encoder):
    model, _ = build(text_encoder, freeze_vision_tower=True)
    names = [name for name, p in model.retrieval.vision_model.named_parameters() if p.requires_grad]
    assert names == ["post_layernorm.weight", "post_layernorm.bias"]
    assert not model.train().retrieval.vision_model.training and model.retrieval.qformer.training


def test_what_cannot_be_a_first_stage_is_refused_with_the_reason(text_encoder, tmp_path):
    make_language_model(tmp_path / "qwen")
    with pytest.raises(UserError, match="its tokenizer has no cls_token, sep_token"):
        load_caption_tokenizer(str(tmp_path / "qwen"))
    with pytest.raises(UserError, match="no pretraining_heads.safetensors"):
        load_blip2(tmp_path / "qwen")
    model, tokenizer = build(text_encoder)
    with pytest.raises(UserError, match="bos_token_id=9999 is not among"):
        Blip2ForPretraining(model.retrieval, 9999)
    model.retrieval.config.qformer_config.use_qformer_text_input = False
    with pytest.raises(UserError, match="The Q-Former has no weights for texts"):
        Blip2ForPretraining(model.retrieval, tokenizer.bos_token_id)
    with pytest.raises(
        UserError, match="its model type is bert, and the exported class has the vision tower of BLIP-2"
    ):
        build_blip2(text_encoder, text_encoder)


# ---- training


def test_a_resumed_fit_has_the_weights_of_an_uninterrupted_one_bit_for_bit(text_encoder, tmp_path):
    whole, tokenizer = build(text_encoder)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [saver]}
    fit(RepresentStage(whole, warmup_steps=2), make_data(tokenizer), **options)
    resumed, _ = build(text_encoder, seed=1)
    trainer = fit(
        RepresentStage(resumed, warmup_steps=2), make_data(tokenizer), checkpoint=str(tmp_path / "step=2.ckpt")
    )
    assert trainer.global_step == STEPS
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    changed = 0
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        changed += not torch.equal(saved[f"model.{name}"], value)
    assert changed > 20


def test_gradient_accumulation_is_refused_by_name(text_encoder):
    model, tokenizer = build(text_encoder)
    with pytest.raises(UserError, match="accumulate_grad_batches=2: a contrastive loss compares each pair"):
        fit(RepresentStage(model), make_data(tokenizer), accumulate_grad_batches=2)


@pytest.mark.slow
def test_two_ranks_train_alike_and_gather_the_recalls(text_encoder, tmp_path):
    worker = Path(__file__).with_name("pair_stage_worker.py")
    results = run_ranks(worker, [str(tmp_path), text_encoder], ["fit", "blip"], tmp_path, 2, PATIENCE)
    first, second = (result["fit"] for result in results)
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["recalls"] == second["recalls"] and len(first["recalls"]) == 6
    model, tokenizer = build(text_encoder)
    model.double().load_state_dict(first["weights"])
    trainer = L.Trainer(accelerator="cpu", enable_checkpointing=False, precision="64-true", **QUIET)
    (alone,) = trainer.validate(RepresentStage(model), make_data(tokenizer), verbose=False)
    assert first["recalls"] == pytest.approx(alone)  # each held-out pair counts once, on one rank and on two
    blip, other = (result["blip"] for result in results)  # with the momentum encoders and the queue
    assert {"queue.images", "queue.position", "momentum.text_proj.weight"} <= blip.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in blip.items())


@pytest.mark.parametrize("family", ["blip2", "blip"])
def test_reranked_recalls_are_those_of_features_and_matching_together(text_encoder, family):
    model, tokenizer = build(text_encoder) if family == "blip2" else build_blip_stage(text_encoder)
    model = (model if family == "blip2" else model.model).eval()
    source = DistinctCaptions(make_source("en", 200, hard=True), 12)
    tokenize = functools.partial(tokenize_captions, tokenizer, max_tokens=20)
    data = CaptionDataModule([source], [source], tokenize, image_size=SIZE, global_batch_size=8, num_steps=1)
    with Float64(), torch.no_grad():  # without training, scores of different images differ by little more than rounding
        model.double()
        values = evaluate_retrieval(model, data.val_dataloader(), num_candidates=12, pairs_per_pass=5)
        batch = PairCollator(tokenize)([data.held_out[number] for number in range(12)])
        embeds = model.encode_images(batch.pixel_values)
        images = model.compute_image_features(embeds).reshape(12, -1, 8)
        similarities = (images @ model.compute_text_features(batch.input_ids, batch.attention_mask).T).amax(1)
        rows = [embeds[number].expand(12, -1, -1) for number in range(12)]
        scores = torch.stack([model.match(row, batch.input_ids, batch.attention_mask)[:, 1] for row in rows])
    own = torch.eye(12).bool()
    expected = compute_recalls(similarities, own) | {
        f"reranked_{name}": value for name, value in compute_recalls(similarities + scores, own).items()
    }
    assert values == pytest.approx({name: float(value) for name, value in expected.items()})


# ---- the second stage


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("language") / "model"
    make_language_model(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return str(folder)


def build_generator(text_encoder: str, language_model: str):
    """Build the second stage's model and its data."""
    first, _ = build(text_encoder)
    model, tokenizer = build_blip2_generator(first, language_model)
    tokenize = functools.partial(tokenize_prompted, tokenizer, num_queries=first.num_queries, max_tokens=16)
    options = {"image_size": SIZE, "global_batch_size": 8, "num_steps": STEPS}
    return (
        first,
        model,
        tokenizer,
        CaptionDataModule([make_source()], [make_source(num_samples=12)], tokenize, **options),
    )


def test_only_qformer_projection_and_norm_learn_soft_prompts(text_encoder, language_model, tmp_path):
    first, model, tokenizer, data = build_generator(text_encoder, language_model)
    queries = first.retrieval.query_tokens
    assert torch.equal(model.query_tokens, queries) and not hasattr(model.qformer.encoder.layer[0], "intermediate")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = GenerateStage(model, tokenizer, learning_rate=1e-2, warmup_steps=1)
    trainer = fit(stage, data)
    assert float(trainer.callback_metrics["val/loss"]) > 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    tops = {"query_tokens", "qformer", "language_projection", "vision_model.post_layernorm"}
    assert {name.partition(".")[0] if "post" not in name else "vision_model.post_layernorm" for name in changed} == tops
    save_blip2_generator(model, tokenizer, tmp_path / "saved")
    library = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    batch = next(iter(data.val_dataloader()))
    inputs = {"pixel_values": batch.pixel_values, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        ours, theirs = model.eval()(**inputs).logits, library(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    captions = generate_captions(model, tokenizer, batch.pixel_values)
    assert captions == generate_captions(library, AutoTokenizer.from_pretrained(tmp_path / "saved"), batch.pixel_values)
    assert captions == stage.predict_step(batch, 0) and len(captions) == len(batch.pixel_values)


def test_a_caption_follows_its_soft_prompts_and_ends_with_a_line_break(language_model, text_encoder):
    _, model, tokenizer, _ = build_generator(text_encoder, language_model)
    ids, mask = tokenize_prompted(tokenizer, ["a red circle", "빨간 원과 파란 별"], num_queries=3, max_tokens=32)
    image = model.config.image_token_index
    assert (ids[:, :3] == image).all() and not (ids[:, 3:] == image).any()
    for row, text in enumerate(["a red circle", "빨간 원과 파란 별"]):
        assert tokenizer.decode(ids[row, 3:][mask[row, 3:].bool()]) == text + "\n"
    labels = make_caption_labels(ids, mask, image)
    assert (labels[:, :3] == -100).all() and torch.equal(labels != -100, mask.bool() & (ids != image))
    assert tokenize_start(tokenizer, 3) == [image] * 3


def test_a_language_model_with_an_encoder_is_refused_by_name(text_encoder, tmp_path):
    T5Config(vocab_size=20, d_model=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="t5 has an encoder and a decoder.*Flan-T5 models are not supported"):
        build_blip2_generator(build(text_encoder)[0], str(tmp_path))


def test_the_second_stage_refuses_gradient_accumulation_by_name(text_encoder, language_model):
    _, model, tokenizer, data = build_generator(text_encoder, language_model)
    with pytest.raises(UserError, match="accumulate_grad_batches=2: the loss is the mean over the tokens of a batch"):
        fit(GenerateStage(model, tokenizer), data, accumulate_grad_batches=2)


# ---- BLIP


def build_blip_stage(text_encoder: str, seed: int = 0):
    vision = BlipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    options = {"global_batch_size": 8, "queue_size": 16, "feature_width": 8, "seed": seed}
    model, tokenizer = build_blip(text_encoder, vision, **options)
    return BlipStage(model, steps_per_epoch=2, learning_rate=1e-3, warmup_steps=1), tokenizer


def test_blip_resumes_bit_for_bit_with_momentum_and_queue(text_encoder, tmp_path):
    whole, tokenizer = build_blip_stage(text_encoder)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(whole, make_data(tokenizer), enable_checkpointing=True, callbacks=[saver])
    assert int(whole.model.queue.position) == 0 and len(whole.model.queue.images) == 16  # four steps of eight pairs
    resumed, _ = build_blip_stage(text_encoder, seed=1)
    trainer = fit(resumed, make_data(tokenizer), checkpoint=str(tmp_path / "step=2.ckpt"))
    assert trainer.global_step == STEPS
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert {"train/itc", "train/itm", "train/itg", "val/text_to_image_r1"} <= trainer.callback_metrics.keys()


def test_blips_learning_rate_falls_with_each_epoch(text_encoder):
    stage, _ = build_blip_stage(text_encoder)
    rates = [stage.compute_learning_rate_factor(step) for step in range(6)]
    assert rates == pytest.approx([1e-3, 1.0, 0.9, 0.9, 0.81, 0.81])


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_of_a_llava_writes_its_logits_behind_soft_prompts(text_encoder, tmp_path, tied):
    make_vision_tower(tmp_path / "tower", hidden_size=32, intermediate_size=48, num_attention_heads=2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    make_language_model(tmp_path / "language", **sizes)
    spec = blueprint_of((str(tmp_path / "tower"), str(tmp_path / "language")))
    llava = build_model(spec).eval()
    with torch.no_grad():  # as after training: other weights than those of its parts
        for parameter in llava.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    export_model(llava, spec.tokenizer, spec.images, tmp_path / "llava")
    first_stage, _ = build(text_encoder)
    model, tokenizer = build_blip2_generator(first_stage, str(tmp_path / "llava"))
    ids = tokenizer("a red circle\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = model.language_model(input_ids=ids).logits
        torch.testing.assert_close(ours, llava.eval()(input_ids=ids).logits[..., : ours.shape[-1]], rtol=0, atol=1e-5)
    assert not any(one.requires_grad for one in model.language_model.parameters())
