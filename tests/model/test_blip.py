"""BLIP's pretraining and fine-tuning beside LAVIS 1.0.2: whole losses with momentum encoders, queue and fixed negatives, in float64."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import Float64
from transformers import BertConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lit_vlm.losses.contrastive import NEGATIVE_FLOOR, NO_ID, compute_alpha
from lit_vlm.model import blip
from lit_vlm.model.blip import (
    BlipForPretraining,
    BlipForRetrieval,
    build_blip,
    make_blip_config,
    make_captioner,
    save_blip,
)
from lit_vlm.model.blip_parts import compute_prompted_loss
from lit_vlm.model.qformer.build import load_caption_tokenizer, tokenize_captions
from lit_vlm.model.tiny import make_text_encoder
from lit_vlm.types import UserError

ORACLE = Path(__file__).resolve().parents[1] / "oracle"
sys.path.append(str(ORACLE))
import made_weights as made

LAVIS = json.loads((ORACLE / "lavis.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-10  # both sides compute in float64; the file has 13 digits


def make_model(world_size: int = 1, kind: type[BlipForPretraining] = BlipForPretraining) -> BlipForPretraining:
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
    model = kind(BlipForImageTextRetrieval(config), made.BOS, made.ENC, **options).double()
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
        model.prepare_step()
        losses = model.compute_losses((image, image), ids, mask, alpha, negatives=negatives)
        losses.total.backward()
    ours = {"loss": losses.total, "loss_itc": losses.itc, "loss_itm": losses.itm, "loss_lm": losses.itg}
    ours = {name: float(value.detach()) for name, value in ours.items()}
    assert ours == pytest.approx(theirs["losses"], abs=TOLERANCE)
    require_gradients(model, theirs["gradients"], 60)
    torch.testing.assert_close(
        model.queue.images, torch.tensor(theirs["queues_after"]["image_queue"]), rtol=0, atol=TOLERANCE
    )
    assert int(model.queue.position) == theirs["position_after"]


def require_gradients(model, theirs: dict[str, float], at_least: int) -> None:
    """Require the gradients of all parameters, each summed times made numbers, of a model whose names are those of LAVIS or ours."""
    parameters, gradients = dict(model.named_parameters()), {}
    for name in theirs:
        place = {"temp": "temperature"}.get(name, name if name.startswith("text_decoder.") else f"retrieval.{name}")
        gradient = parameters[place].grad
        probe = torch.tensor(made.make_array("probe " + name, tuple(gradient.shape)))
        gradients[name] = float((gradient * probe).sum())
    assert len(gradients) > at_least and gradients == pytest.approx(theirs, abs=1e-9)


def compute_retrieval(rank: int, world_size: int) -> tuple[Any, dict[str, float], torch.Tensor, list[torch.Tensor]]:
    """Compute the fine-tuning for retrieval of the made pairs; returns model, losses, ids of the queue and weights of negatives."""
    model, weights = make_model(world_size, BlipForRetrieval), []
    image_ids = torch.tensor(made.make_image_ids(rank))[:, None].expand(-1, 2)
    model.queue.ids.copy_(torch.tensor(made.make_queue_ids())[:, None].expand(-1, 2))
    images = torch.tensor(made.make_images(rank))
    negatives = iter(torch.tensor(columns) for columns in made.make_negatives(rank, world_size))
    alpha = compute_alpha(*(LAVIS["world_1"][0]["blip"][name] for name in ("step", "steps_per_epoch")))
    with Float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip, "sample_negatives", lambda values: (weights.append(values), next(negatives))[1])
        model.prepare_step()
        ids, mask = map(torch.tensor, made.make_texts(rank))
        losses = model.compute_losses((images, images), ids, mask, alpha, image_ids)
        losses.total.backward()
    for parameter in model.parameters():
        if world_size > 1 and parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size
    values = {"loss": losses.total, "loss_itc": losses.itc, "loss_itm": losses.itm}
    return model, {name: float(value.detach()) for name, value in values.items()}, model.queue.ids[:, 0], weights


def require_retrieval(rank: int, world_size: int) -> None:
    """Require LAVIS's losses, gradients, queue and weights of negatives; see `compute_retrieval`."""
    theirs = LAVIS[f"world_{world_size}"][rank]["blip_retrieval"]
    model, losses, ids, weights = compute_retrieval(rank, world_size)
    assert losses == pytest.approx(theirs["losses"], abs=TOLERANCE)
    require_gradients(model, theirs["gradients"], 40)
    assert [-100 if one == NO_ID else one for one in ids.tolist()] == theirs["ids_after"]
    for ours, name in zip(weights, ("image_weights", "text_weights"), strict=True):
        published = torch.tensor(theirs[name])
        # LAVIS adds nothing to the probabilities; the floor is this project's, so that a draw never fails
        expected = torch.where(published > 0, published + NEGATIVE_FLOOR, 0.0)
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def test_the_fine_tuning_for_retrieval_equals_that_of_lavis():
    require_retrieval(0, 1)


def test_the_fine_tuning_for_captions_equals_that_of_lavis():
    captioner, theirs = make_captioner(make_model()).double(), LAVIS["blip_caption"]
    captioner.vision_model = PassedFeatures()  # the made images are encoded already
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():  # by LAVIS's names of a decoder alone
            parameter.copy_(torch.tensor(made.make_weight(name, tuple(parameter.shape))))
    ids, mask = map(torch.tensor, made.make_texts(0))
    ids[:, 0] = made.BOS
    with Float64():
        images = torch.tensor(made.make_images(0))
        loss, num_tokens = compute_prompted_loss(captioner, images, ids, mask, made.PROMPT_TOKENS)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(theirs["loss"], abs=TOLERANCE)
    assert num_tokens == int(mask.sum()) - made.PAIRS * made.PROMPT_TOKENS
    require_gradients(captioner, theirs["gradients"], 40)


class PassedFeatures(torch.nn.Module):
    """Vision tower whose images are features already."""

    def forward(self, pixel_values, **_):
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


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
        model.temperature.fill_(0.7)
    model.prepare_step()
    assert model.temperature.tolist() == [0.5]  # its largest value
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
