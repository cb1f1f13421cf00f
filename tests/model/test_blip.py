"""BLIP's pretraining beside LAVIS 1.0.2: the whole loss with momentum encoders, queue and fixed negatives, in float64."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from float64 import Float64
from transformers import BertConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipVisionConfig

from lit_vlm.losses.contrastive import compute_alpha
from lit_vlm.model.blip import BlipForPretraining, build_blip, make_blip_config, save_blip
from lit_vlm.model.qformer.build import load_caption_tokenizer, tokenize_captions
from lit_vlm.model.tiny import make_text_encoder
from lit_vlm.types import UserError

ORACLE = Path(__file__).resolve().parents[1] / "oracle"
sys.path.append(str(ORACLE))
import made_weights as made

LAVIS = json.loads((ORACLE / "lavis.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-10  # both sides compute in float64; the file has 13 digits


def make_model(world_size: int = 1) -> BlipForPretraining:
    """Make the model with the made weights, momentum encoders and queue."""
    torch.set_default_dtype(torch.float64)
    vision = BlipVisionConfig(
        hidden_size=made.VISION_WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    text = BertConfig(
        vocab_size=made.VOCAB,
        hidden_size=made.HIDDEN,
        num_hidden_layers=made.LAYERS,
        num_attention_heads=made.HEADS,
        intermediate_size=made.INTERMEDIATE,
        max_position_embeddings=made.POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=made.PAD,
    )
    config = make_blip_config(vision, text, feature_width=made.FEATURES)
    options = {"queue_size": made.QUEUE_SIZE, "global_batch_size": world_size * made.PAIRS}
    model = BlipForPretraining(BlipForImageTextRetrieval(config), made.BOS, made.ENC, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("retrieval.", "text_decoder.")) and ".vision_model." not in name:
                lavis = name.removeprefix("retrieval.")
                parameter.copy_(torch.tensor(made.make_weight(lavis, tuple(parameter.shape))))
        for part, module in model.momentum.items():
            source = getattr(model.retrieval, part)
            for (name, slow), fast in zip(module.named_parameters(), source.parameters(), strict=True):
                change = made.make_array(f"momentum {part}.{name}", tuple(slow.shape), 0.05)
                slow.copy_(fast + torch.tensor(change))
        queues = LAVIS[f"world_{world_size}"][0]["blip"]["queues"]
        model.queue.images.copy_(torch.tensor(queues["image_queue"]))
        model.queue.texts.copy_(torch.tensor(queues["text_queue"]))
        model.temperature.fill_(0.07)
    return model


def test_blips_losses_gradients_and_queue_equal_those_of_lavis():
    model, theirs = make_model(), LAVIS["world_1"][0]["blip"]
    ids, mask = map(torch.tensor, made.make_texts(0))
    image = torch.tensor(made.make_images(0))
    negatives = tuple(torch.tensor(columns) for columns in made.make_negatives(0, 1))
    alpha = compute_alpha(theirs["step"], theirs["steps_per_epoch"])
    with Float64():
        model.update_momentum()
        losses = model.compute_losses((image, image), ids, mask, alpha, negatives=negatives)
        losses.total.backward()
    ours = {"loss": losses.total, "loss_itc": losses.itc, "loss_itm": losses.itm, "loss_lm": losses.itg}
    ours = {name: float(value.detach()) for name, value in ours.items()}
    assert ours == pytest.approx(theirs["losses"], abs=TOLERANCE)
    parameters, gradients = dict(model.named_parameters()), {}
    for name in theirs["gradients"]:
        place = {"temp": "temperature"}.get(name, name if name.startswith("text_decoder.") else f"retrieval.{name}")
        gradient = parameters[place].grad
        probe = torch.tensor(made.make_array("probe " + name, tuple(gradient.shape)))
        gradients[name] = float((gradient * probe).sum())
    assert len(gradients) > 60 and gradients == pytest.approx(theirs["gradients"], abs=1e-9)
    torch.testing.assert_close(
        model.queue.images, torch.tensor(theirs["queues_after"]["image_queue"]), rtol=0, atol=TOLERANCE
    )
    assert int(model.queue.position) == theirs["position_after"]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    make_text_encoder(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return str(folder)


def build(text_encoder: str, **options):
    vision = BlipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return build_blip(text_encoder, vision, **{"global_batch_size": 4, "queue_size": 8, "feature_width": 8} | options)


def test_only_self_attention_differs_between_encoder_and_decoder(text_encoder):
    model, _ = build(text_encoder)
    names = [name for name, _ in model.text_decoder.named_parameters()]
    shared = {id(parameter) for parameter in model.retrieval.text_encoder.parameters()}
    own = [name for name, parameter in model.text_decoder.named_parameters() if id(parameter) not in shared]
    assert all(".attention." in name or name.startswith("cls.predictions.") for name in own)
    assert sum(".attention." in name for name in own) == 2 * 10  # two layers with ten tensors of self-attention
    assert "bert.embeddings.word_embeddings.weight" in names and "cls.predictions.decoder.weight" not in own


def test_saved_folders_have_the_same_scores_in_transformers(text_encoder, tmp_path):
    model, tokenizer = build(text_encoder)
    model.eval()
    save_blip(model, tokenizer, tmp_path)
    again = load_caption_tokenizer(str(tmp_path / "retrieval"))
    assert len(again) == len(tokenizer) and again.convert_tokens_to_ids("[ENC]") == model.enc_token_id
    ids, mask = tokenize_captions(tokenizer, ["빨간 원", "a red circle", "a star"], max_tokens=10)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    retrieval = BlipForImageTextRetrieval.from_pretrained(tmp_path / "retrieval").eval()
    captions = BlipForConditionalGeneration.from_pretrained(tmp_path / "captions").eval()
    marked = ids.clone()
    marked[:, 0] = model.enc_token_id
    with torch.no_grad():
        embeds = model.retrieval.vision_model(pixel_values=pixels).last_hidden_state
        similarities = model.compute_image_features(embeds) @ model.compute_text_features(ids, mask).T
        compare = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6)
        compare(retrieval(ids, pixels, use_itm_head=False, attention_mask=mask).itm_score, similarities)
        compare(retrieval(marked, pixels, attention_mask=mask).itm_score, model.match(embeds, ids, mask))
        marked[:, 0] = model.bos_token_id
        ours = model.text_decoder(marked, attention_mask=mask, encoder_hidden_states=embeds).logits
        compare(captions(pixels, marked, attention_mask=mask).logits, ours)


def test_momentum_and_queue_move_once_per_step_and_resume(text_encoder):
    model, tokenizer = build(text_encoder)
    ids, mask = tokenize_captions(tokenizer, ["빨간 원", "a red circle", "a star", "파란 별"], max_tokens=10)
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    before = model.momentum["text_proj"].weight.clone()
    with torch.no_grad():
        model.retrieval.text_proj.weight.add_(1.0)
    losses = model(pixels, ids, mask, alpha=0.4)
    losses.total.backward()
    torch.testing.assert_close(model.momentum["text_proj"].weight, before + 0.005, rtol=0, atol=1e-6)
    assert int(model.queue.position) == 4
    assert not any(parameter.grad is not None for parameter in model.momentum.parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    other, _ = build(text_encoder, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.queue.images, model.queue.images) and int(other.queue.position) == 4


def test_a_queue_that_the_batch_does_not_divide_is_refused(text_encoder):
    with pytest.raises(UserError, match="9 entries and a step adds 4 pairs"):
        build(text_encoder, queue_size=9)


def test_the_published_size_has_the_parameters_of_lavis():
    """LAVIS's classes have as many with ViT-B: tower, text encoder, tied decoder, heads and temperature."""
    with torch.device("meta"):
        config = make_blip_config(BlipVisionConfig(image_size=224), BertConfig(vocab_size=30524))
        options = {"bos_token_id": 30522, "enc_token_id": 30523, "global_batch_size": 2400}
        model = BlipForPretraining(BlipForImageTextRetrieval(config), **options)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 252_441_919
    assert sum(parameter.numel() for parameter in model.retrieval.text_encoder.parameters()) == 137_258_496
