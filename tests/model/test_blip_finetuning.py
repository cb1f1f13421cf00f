"""BLIP's fine-tuning: its losses against those of the pretraining, of transformers and of plain loops; retrieval of images."""

from pathlib import Path

import pytest
import torch
from transformers import BlipForImageTextRetrieval, BlipVisionConfig

from lit_vlm.data.caption_pairs import PairBatch
from lit_vlm.evaluation.retrieval import PairRetrieval
from lit_vlm.losses.contrastive import FeatureQueue, compute_soft_targets, find_queue_matches
from lit_vlm.model.blip import BlipForPretraining, build_blip, save_blip_run
from lit_vlm.model.blip_parts import (
    build_blip_retrieval,
    compute_prompted_loss,
    count_prompt_tokens,
    load_captioner,
    tokenize_with_prompt,
)
from lit_vlm.model.tiny import make_text_encoder

BATCH, TOKENS, SIZE = 4, 12, 28


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Folder of a small pretrained BLIP without dropout."""
    root = tmp_path_factory.mktemp("blip")
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    make_text_encoder(root / "text", **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    vision = BlipVisionConfig(**shape, image_size=SIZE, patch_size=14)
    model, tokenizer = build_blip(str(root / "text"), vision, global_batch_size=BATCH, queue_size=8, feature_width=8)
    save_blip_run(model, tokenizer, root / "hf")
    return root / "hf"


def make_batch(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return torch.randn(len(texts), 3, SIZE, SIZE), tokens["input_ids"], tokens["attention_mask"]


def test_pairs_that_all_differ_have_the_contrast_and_matching_of_the_pretraining(pretrained):
    model, tokenizer = build_blip_retrieval(str(pretrained), global_batch_size=BATCH, queue_size=8)
    retrieval = BlipForImageTextRetrieval.from_pretrained(pretrained)
    tokens = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    other = BlipForPretraining(retrieval, *tokens, queue_size=8, global_batch_size=BATCH)
    batch = make_batch(tokenizer, ["빨간 원", "a blue star", "a red circle", "초록색 별"])
    negatives = (torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]))
    ids = torch.arange(2 * BATCH).view(BATCH, 2)
    with torch.no_grad():
        ours, theirs = (one.eval()(*batch, 0.3, ids, negatives) for one in (model, other))
    assert torch.equal(ours.itc, theirs.itc) and torch.equal(ours.itm, theirs.itm) and ours.itg == 0
    assert torch.equal(model.queue.images, other.queue.images) and torch.equal(model.queue.ids[:BATCH], ids)


def test_equal_texts_and_images_share_the_target_in_the_batch_and_in_the_queue():
    queue = FeatureQueue(4, 3, 2, num_ids=2)
    queue.push(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[7, 1], [8, 2]]))
    ids = torch.tensor([[7, 3], [9, 2]])  # the image of the first pair in the queue, and the text of the second
    matches = find_queue_matches(ids, queue)
    assert matches.tolist() == [[True, False, True, False, False, False], [False, True, False, True, False, False]]
    logits = torch.randn(2, 6, dtype=torch.float64)
    targets = compute_soft_targets(logits, 0.4, matches)
    for row in range(2):
        exponentials = logits[row].exp()
        for column in range(6):
            share = 0.5 if matches[row, column] else 0.0
            expected = 0.4 * exponentials[column] / exponentials.sum() + 0.6 * share
            assert float(targets[row, column]) == pytest.approx(float(expected), abs=1e-12)


def test_equal_texts_are_no_negatives(pretrained):
    model, tokenizer = build_blip_retrieval(str(pretrained), global_batch_size=BATCH, queue_size=8)
    batch = make_batch(tokenizer, ["a red circle"] * 3 + ["a blue star"])
    ids = torch.tensor([[1, 5], [2, 5], [3, 5], [4, 6]])
    seen = []
    model.match = lambda embeds, texts, mask: (seen.append(texts), torch.zeros(len(texts), 2))[1]
    for _ in range(5):
        model(*batch, 0.0, ids)
    blue = batch[1][3]
    assert all(torch.equal(row, blue) for texts in seen for row in texts[2 * BATCH : 2 * BATCH + 3])


def test_the_loss_of_captions_is_that_of_transformers_without_the_prompt(pretrained):
    model, tokenizer = load_captioner(str(pretrained / "captions"))
    assert model.text_decoder.label_smoothing == 0.1
    prompt = "a picture of "
    ids, mask = tokenize_with_prompt(tokenizer, ["a red circle", "빨간 원"], prompt, max_tokens=TOKENS)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    length = count_prompt_tokens(tokenizer, prompt)
    assert tokenizer.decode(ids[0, :length]) == "[DEC] a picture of"
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :length] = -100
    with torch.no_grad():
        loss, num_tokens = compute_prompted_loss(model.eval(), pixels, ids, mask, length)
        expected = model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-5) and num_tokens == int((labels != -100).sum())


def test_a_model_of_another_image_size_sees_the_same_positions_resized(pretrained):
    model, _ = build_blip_retrieval(str(pretrained), global_batch_size=BATCH, queue_size=8, image_size=56)
    assert model.encode_images(torch.randn(1, 3, 56, 56)).shape == (1, 17, 24)
    assert model.momentum["vision_model"].embeddings.position_embedding.shape == (1, 17, 24)


class Lookup:
    """Model whose features are given: the image of a pair is its number, and so is the text."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features

    def encode_images(self, pixels):
        return pixels[:, 0, 0, :1].long()

    def compute_image_features(self, embeds):
        return self.features[embeds[:, 0]]

    def compute_text_features(self, ids, mask):
        return self.features[ids[:, 0]]

    def match(self, embeds, ids, mask):
        return torch.stack([torch.zeros(len(ids)), (embeds[:, 0] == ids[:, 0]).float()], dim=1)


def test_an_image_with_several_texts_is_one_candidate_and_each_text_is_right():
    features = torch.eye(4)
    features[1] = features[0]  # images 0 and 1 have equal features, so only matching tells them apart
    images, texts = (
        torch.tensor([0, 0, 1, 2, 3]),
        torch.tensor([0, 2, 1, 2, 3]),
    )  # image 0 has two texts, one of them as image 2
    batch = PairBatch(
        images.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        texts[:, None],
        torch.ones(5, 1, dtype=torch.int64),
        torch.stack([images, texts], dim=1),
    )
    retrieval = PairRetrieval(num_candidates=4)
    retrieval.update(Lookup(features), batch)
    found = {name: float(value) for name, value in retrieval.compute().items()}
    assert found["image_to_text_r1"] == pytest.approx(3 / 4 - 1 / 4)  # ties count as wrong: images 0 and 1
    assert found["text_to_image_r1"] == pytest.approx(3 / 5)  # texts 0 and 1 tie; both texts 2 have a right image
    reranked = {name: float(value) for name, value in retrieval.rerank(Lookup(features)).items()}
    assert reranked["reranked_image_to_text_r1"] == reranked["reranked_text_to_image_r1"] == 1.0
    retrieval.reset()
    assert not retrieval.embeds and not retrieval.image_ids
