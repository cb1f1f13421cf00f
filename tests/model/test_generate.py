"""Sampled answers: from the model's distribution, each with a random generator of its own."""

import pytest
import torch
from support import sample

from lit_vlm.data.collate import collate
from lit_vlm.model.generate import GumbelLogitsProcessor, SamplingParams, generate

SEEDS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def make_samples():
    return [
        sample("안녕하세요?", "네", seed=1),
        sample("무엇이 보이나요?", "원", (56, 56), seed=2),
        sample("What do you see in the picture?", "a star", (60, 90), seed=3),
    ]


def test_sampling_follows_the_probabilities():
    scores = torch.tensor([2.0, 1.0, 0.0, -float("inf")])
    sampler = GumbelLogitsProcessor(list(range(4000)), torch.device("cpu"))
    frequencies = sampler(None, scores.expand(4000, -1)).argmax(1).bincount(minlength=4) / 4000
    assert frequencies[3] == 0
    assert torch.allclose(frequencies, scores.softmax(0), atol=0.03)


def test_an_answer_does_not_depend_on_the_other_answers_of_its_batch(model, processor):
    together = generate(model, collate(processor, make_samples()), 8, sampling=SamplingParams(SEEDS))
    assert len(together) == 9 and len({tuple(ids) for ids in together[:3]}) == 3
    for number, one in enumerate(make_samples()):
        batch = collate(processor, [one])
        alone = generate(model, batch, 8, sampling=SamplingParams([SEEDS[number]]))
        assert alone == together[3 * number : 3 * number + 3]
        assert generate(model, batch, 8, sampling=SamplingParams([SEEDS[number][1:]])) == alone[1:]


def test_near_zero_temperature_and_a_small_top_p_are_greedy(model, processor):
    batch = collate(processor, make_samples())
    greedy = [ids for ids in generate(model, batch, 6) for _ in range(3)]
    assert generate(model, batch, 6, sampling=SamplingParams(SEEDS, temperature=1e-4)) == greedy
    assert generate(model, batch, 6, sampling=SamplingParams(SEEDS, top_p=1e-6)) == greedy
    assert generate(model, batch, 6, sampling=SamplingParams(SEEDS)) != greedy


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_temperature_scales_the_scores(temperature):
    from lit_vlm.model.generate import make_logits_processors

    scores = torch.tensor([[1.0, 0.0, -1.0]])
    chain = make_logits_processors(SamplingParams([[s] for s in range(3000)], temperature), torch.device("cpu"))
    frequencies = chain(None, scores.expand(3000, -1)).argmax(1).bincount(minlength=3) / 3000
    assert torch.allclose(frequencies, (scores[0] / temperature).softmax(0), atol=0.03)
