"""Continuous batching: prompts that join and leave between two steps have the answers of transformers' generate."""

import random

import pytest
from support import blueprint_of, sample
from test_language_model_families import FAMILIES, WITH_EXPERTS, make_family_folder

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.continuous_batching import ContinuousBatcher, DecodingParams
from lit_vlm.model.generate import generate

QUESTIONS = [
    ("안녕하세요?", ()),
    ("무엇이 보이나요?", (56, 56)),
    ("What do you see in the picture? Answer in one word.", (60, 90)),
    ("<ocr>", (112, 56)),
    ("두 그림을 비교해 주세요.", (30, 40)),
    ("?", ()),
    ("Describe it in all detail, from the left to the right.", (140, 140)),
]


def make_samples(copies=1):
    return [
        sample(f"{text} {copy}", "네", *([size] if size else []), seed=number + 10 * copy)
        for copy in range(copies)
        for number, (text, size) in enumerate(QUESTIONS)
    ]


def answer_alone(model, processor, samples, max_new_tokens, stop_id=None):
    return [generate(model, collate(processor, [one]), max_new_tokens, eos_token_id=stop_id)[0] for one in samples]


def answer_together(model, processor, samples, params, stop_ids=frozenset(), groups=None, steps_between=0, **limits):
    batcher = ContinuousBatcher(model, set(stop_ids), **limits)
    sequences = []
    for group in groups or [[one] for one in samples]:
        sequences += batcher.add(collate(processor, group), [params] * len(group))
        for _ in range(steps_between):
            batcher.step()
    batcher.run()
    return sequences


def find_stop_id(answers):
    """Find a token that ends some answers early, and not all."""
    tokens = [token for ids in answers for token in ids[1:-1]]
    return next(token for token in tokens if 0 < sum(token in ids for ids in answers) < len(answers))


@pytest.mark.parametrize("steps_between", [0, 1, 5])
def test_greedy_answers_equal_those_of_generate_whenever_prompts_join(model, processor, steps_between):
    samples = make_samples()
    expected = answer_alone(model, processor, samples, 12)
    found = answer_together(model, processor, samples, DecodingParams(12), steps_between=steps_between)
    assert [sequence.ids for sequence in found] == expected
    assert {sequence.finish_reason for sequence in found} == {"length"}


def test_a_sequence_that_stops_gives_its_place_to_the_next_prompt(model, processor):
    samples = make_samples(copies=3)
    random.Random(1).shuffle(samples)
    stop_id = find_stop_id(answer_alone(model, processor, samples, 12))
    expected = answer_alone(model, processor, samples, 12, stop_id)
    found = answer_together(model, processor, samples, DecodingParams(12), {stop_id}, max_sequences=4)
    assert [sequence.ids for sequence in found] == expected
    assert {sequence.finish_reason for sequence in found} == {"stop", "length"}


def test_prompts_of_one_group_share_the_pass_of_the_vision_tower(model, processor):
    samples, calls = make_samples(), []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    found = answer_together(model, processor, samples, DecodingParams(6), groups=[samples], max_sequences=3)
    handle.remove()
    assert len(calls) == 1
    assert [sequence.ids for sequence in found] == answer_alone(model, processor, samples, 6)


def test_the_order_of_arrival_changes_no_sampled_answer(model, processor):
    samples = make_samples(copies=2)

    def answer(order):
        batcher = ContinuousBatcher(model, set(), max_sequences=5)
        found = {}
        for number in order:
            params = DecodingParams(8, temperature=0.8, top_p=0.9, seed=number)
            (found[number],) = batcher.add(collate(processor, [samples[number]]), [params])
            batcher.step()
        batcher.run()
        return [found[number].ids for number in range(len(samples))]

    order = list(range(len(samples)))
    first = answer(order)
    assert answer(order[::-1]) == first
    assert len({tuple(ids) for ids in first}) > len(samples) // 2


def test_a_cancelled_sequence_frees_its_place_and_changes_no_other_answer(model, processor):
    samples = make_samples()
    batcher = ContinuousBatcher(model, set(), max_sequences=3)
    sequences = [batcher.add(collate(processor, [one]), [DecodingParams(10)])[0] for one in samples]
    for _ in range(3):
        batcher.step()
    sequences[1].is_cancelled = sequences[-1].is_cancelled = True  # an active one and a waiting one
    batcher.step()
    assert sequences[1] not in batcher.active and sequences[3] in batcher.active
    batcher.run()
    expected = answer_alone(model, processor, samples, 10)
    kept = [number for number in range(len(samples)) if number not in (1, len(samples) - 1)]
    assert [sequences[number].ids for number in kept] == [expected[number] for number in kept]
    assert len(sequences[1].ids) < 10 and not sequences[-1].ids


def test_the_key_cache_stays_within_its_limit(model, processor):
    samples = make_samples(copies=2)
    longest = max(collate(processor, [one]).num_tokens for one in samples) + 6
    limit = 3 * longest
    batcher = ContinuousBatcher(model, set(), max_cache_tokens=limit)
    sequences = [batcher.add(collate(processor, [one]), [DecodingParams(6)])[0] for one in samples]
    while batcher.has_work:
        batcher.step()
        assert len(batcher.active) * max((one.max_tokens for one in batcher.active), default=0) <= limit
        assert batcher._cache.num_tokens <= limit
    assert all(len(sequence.ids) == 6 for sequence in sequences)
    with pytest.raises(ValueError, match="the key cache holds"):
        batcher.add(collate(processor, [samples[0]]), [DecodingParams(limit)])


def test_many_short_sequences_and_then_a_long_one_stay_within_the_limit_of_the_key_cache(model, processor):
    limit = 400
    batcher = ContinuousBatcher(model, set(), max_cache_tokens=limit)
    short = [sample("?", "네", seed=number) for number in range(12)]
    long = sample("긴 글입니다. " * 9, "네")
    expected = answer_alone(model, processor, short, 6) + answer_alone(model, processor, [long], 150)
    sequences = [batcher.add(collate(processor, [one]), [DecodingParams(6)])[0] for one in short]
    sequences += batcher.add(collate(processor, [long]), [DecodingParams(150)])
    while batcher.has_work:
        batcher.step()
        assert batcher._cache.num_tokens <= limit
    assert [sequence.ids for sequence in sequences] == expected


FAST = ("qwen3", "mistral", "hyperclovax", "exaone4", "gemma3")  # each way of windows, positions and scales


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family in FAST else pytest.mark.slow) for family in [*FAMILIES, *WITH_EXPERTS]],
)
def test_other_families_have_the_answers_of_generate_too(family, small_parts, tmp_path):
    folder = make_family_folder(tmp_path / "language", family)
    blueprint = blueprint_of((small_parts[0], folder))
    model, processor = build_model(blueprint).eval(), Processor(blueprint.tokenizer, blueprint.images)
    samples = make_samples()
    expected = answer_alone(model, processor, samples, 12)
    found = answer_together(model, processor, samples, DecodingParams(12), steps_between=2)
    assert [sequence.ids for sequence in found] == expected
