"""Texts that are tokenised word by word: the ids are those of the whole text, or the whole text is tokenised."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from lit_vlm.data import word_tokens
from lit_vlm.data.word_tokens import SPLIT_PATTERNS, WordTokenizer
from lit_vlm.model.tiny import make_tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# letters, marks, digits and white space of several scripts, some of which Unicode has classified anew; spaces are frequent
CHARACTERS = [*"abcXYZ가나다한글'stre0123.,!?()/-_\n\t\r", *[" "] * 12] + [
    *map(chr, (0x85, 0xA0, 0x180E, 0x200B, 0x2028, 0x202F, 0x2060, 0x3000, 0xFEFF, 0x1C, 0x1F)),
    *map(chr, (0x301, 0x1161, 0x11A8, 0xB2, 0x2167, 0x93F, 0x1F600)),
]


@pytest.fixture(scope="module")
def state():
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    return state | {"added_tokens": [], "post_processor": None}


def make_split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def build(state, *steps, **changes):
    pre_tokenizer = {"type": "Sequence", "pretokenizers": list(steps)}
    return Tokenizer.from_str(json.dumps(state | {"pre_tokenizer": pre_tokenizer} | changes))


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "steps",
    [(GPT2,), (DIGITS, GPT2), *((make_split(pattern), BYTES) for pattern in sorted(SPLIT_PATTERNS))],
    ids=lambda steps: steps[0].get("pattern", {}).get("Regex", "gpt2")[:24],
)
def test_word_by_word_gives_the_ids_of_the_whole_text(steps, state, monkeypatch):
    monkeypatch.setattr(word_tokens, "MAX_WORDS", 50)  # the cache is emptied now and then
    tokenizer = build(state, *steps)
    words, rng = WordTokenizer(tokenizer), random.Random(0)
    assert words.splits_words
    for _ in range(600):
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(0, 30)))
        for _ in range(2):  # from the tokenizer, then from the cache
            assert np.frombuffer(words.encode(text), np.int32).tolist() == encode(tokenizer, text), repr(text)


def test_a_tokenizer_of_another_kind_gets_the_whole_text(state):
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    others = [
        build(state, metaspace),
        build(state, GPT2 | {"add_prefix_space": True}),
        build(state, BYTES),  # splits nothing
        build(state, make_split(r"\w+ \w+"), BYTES),
        build(state, GPT2, normalizer={"type": "Prepend", "prepend": "▁"}),
    ]
    for tokenizer in others:
        words = WordTokenizer(tokenizer)
        assert not words.splits_words
        assert np.frombuffer(words.encode("하늘은 blue."), np.int32).tolist() == encode(tokenizer, "하늘은 blue.")


def test_words_are_tokenised_once(state):
    tokenizer = build(state, GPT2)
    words = WordTokenizer(tokenizer)
    words.encode("the sky is blue")
    words._tokenizer = None  # a call would fail
    assert np.frombuffer(words.encode("the blue sky is blue"), np.int32).tolist() == encode(
        tokenizer, "the blue sky is blue"
    )
