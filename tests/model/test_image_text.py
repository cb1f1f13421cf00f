"""Tests of models that match pictures with texts: scores equal those of transformers' own calls, and other folders are refused."""

import pytest
import torch
from PIL import Image
from small_matchers import make_blip, make_dual_encoder
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BlipForImageTextRetrieval,
    CLIPModel,
    SiglipModel,
)

from lit_vlm.model.image_text import GumbelNoise, load_blip_matcher, load_captioner, load_picture_encoder, load_scorer
from lit_vlm.types import UserError

TEXTS = ["a red circle", "빨간 원과 파란 별이 있다"]
IMAGES = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (31, 50), "blue")]


@pytest.fixture(scope="module")
def dual_encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    for name in ("siglip", "clip"):
        make_dual_encoder(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("blip"))


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_scores_of_dual_encoders_are_the_cosines_that_transformers_computes(dual_encoders, name):
    scorer = load_scorer(dual_encoders / name, "curate.model")
    model = {"siglip": SiglipModel, "clip": CLIPModel}[name].from_pretrained(dual_encoders / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(dual_encoders / name)
    padding = {"siglip": "max_length", "clip": True}[name]
    inputs = tokenizer(TEXTS, padding=padding, max_length=16, truncation=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(dual_encoders / name)(images=IMAGES, return_tensors="pt")[
        "pixel_values"
    ]
    mask = {"attention_mask": inputs["attention_mask"]} if name == "clip" else {}
    with torch.no_grad():
        outputs = model(input_ids=inputs["input_ids"], pixel_values=pixels, **mask)
    expected = (outputs.image_embeds * outputs.text_embeds).sum(1)
    torch.testing.assert_close(scorer.score(IMAGES, TEXTS), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scorer.embed_images(IMAGES), outputs.image_embeds, rtol=0, atol=1e-5)


def test_scores_of_blip_are_the_probabilities_of_transformers_with_the_matching_token(blip):
    scorer = load_scorer(blip / "retrieval", "curate.model")
    model = BlipForImageTextRetrieval.from_pretrained(blip / "retrieval").eval()
    tokenizer = AutoTokenizer.from_pretrained(blip / "retrieval")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs["input_ids"][:, 0] = tokenizer.convert_tokens_to_ids("[ENC]")
    pixels = AutoImageProcessor.from_pretrained(blip / "retrieval")(images=IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(inputs["input_ids"], pixels, attention_mask=inputs["attention_mask"]).itm_score
    torch.testing.assert_close(scorer.score(IMAGES, TEXTS), logits.softmax(-1)[:, 1], rtol=0, atol=1e-5)


def test_the_folder_of_a_run_holds_filter_and_captioner(blip):
    texts = (load_blip_matcher(folder, "x").score(IMAGES, TEXTS) for folder in (blip / "hf", blip / "retrieval"))
    torch.testing.assert_close(*texts, rtol=0, atol=0)
    captions = (
        load_captioner(folder, "x").caption(IMAGES, [1, 2]) for folder in (blip / "hf" / "captions", blip / "captions")
    )
    assert next(captions) == next(captions)


def test_a_caption_depends_on_the_picture_and_the_seed_alone(blip):
    captioner = load_captioner(blip / "captions", "curate.capfilt.captioner")
    first = [captioner.caption([IMAGES[0]], [seed])[0] for seed in (1, 2, 3)]
    state = torch.random.get_rng_state()
    together = captioner.caption([IMAGES[1], *[IMAGES[0]] * 3], [1, 1, 2, 3])
    assert together[1:] == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(first)) == 3 and all(first)


def test_noise_of_gumbel_draws_from_the_softmax():
    logits, num_draws = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 4000
    noise = GumbelNoise([7])
    drawn = [int(noise(torch.zeros(1, 1), logits).argmax()) for _ in range(num_draws)]
    for token, probability in enumerate(logits[0].softmax(-1).tolist()):
        deviation = (num_draws * probability * (1 - probability)) ** 0.5
        assert abs(drawn.count(token) - num_draws * probability) < 4 * deviation


def test_folders_of_other_models_are_refused_with_what_they_hold(blip, dual_encoders, tmp_path):
    with pytest.raises(
        UserError, match=r"curate.model=.*captions: its model type is blip \(BlipForConditionalGeneration\)"
    ):
        load_scorer(blip / "captions", "curate.model")
    with pytest.raises(UserError, match="model type is siglip.*BlipForConditionalGeneration"):
        load_captioner(dual_encoders / "siglip", "x")
    with pytest.raises(UserError, match="a BlipForImageTextRetrieval"):
        load_blip_matcher(blip / "captions", "x")
    with pytest.raises(UserError, match="SigLIP, SigLIP 2, CLIP, one of their vision"):
        load_picture_encoder(blip / "retrieval", "x")
    with pytest.raises(UserError, match="no config.json"):
        load_scorer(tmp_path, "x")
    tower = SiglipModel.from_pretrained(dual_encoders / "siglip").vision_model
    tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(UserError, match="siglip_vision_model"):
        load_scorer(tmp_path / "tower", "x")
