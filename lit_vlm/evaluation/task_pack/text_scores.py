"""Scores of Korean and English text that count syllables, 0 to 1.

The usual settings fail on Korean: rouge-score drops all letters outside of a-z0-9, so two equal Korean sentences score 0,
and BLEU-4 of a perfect answer of three words is 0. chrF2 counts characters, and ROUGE-L here counts Hangul syllables.
All functions get texts from `normalize_answer`: in NFC a Hangul syllable is one character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_END = re.compile(r"(?:\s|<\|im_end\|>)+$")
# One token: a Hangul syllable or letter, a Chinese character or kana alone, or a word of letters and digits of another script
_SYLLABLE = "\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e\u4e00-\u9fff\u3400-\u4dbf\u3041-\u30ff"
_TOKEN = re.compile(rf"[{_SYLLABLE}]|[^\W_{_SYLLABLE}]+")


def normalize_answer(text: str) -> str:
    """Normalise a text to NFC, without surrounding white space and trailing `<|im_end|>`."""
    return _END.sub("", unicodedata.normalize("NFC", text)).strip()


def take_best(compute_one: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """Make a metric of several references from a function of one: the best reference counts; 0 without references."""
    return lambda answer, references: max((compute_one(answer, reference) for reference in references), default=0.0)


def compute_chrf(answer: str, references: Sequence[str]) -> float:
    """Compute chrF2 of a sentence with sacrebleu's defaults: F-score (beta 2) of the character n-grams up to n = 6.

    White space does not count, case does. Orders that a short text does not have are left out (sacrebleu's "effective
    order"), so a perfect answer of one syllable scores 1. The best of several references counts.
    """
    if answer in references:
        return 1.0  # also if both are empty
    return float(_load_chrf().sentence_score(answer, list(references)).score) / 100 if references else 0.0


@cache
def _load_chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def compute_rouge_l(answer: str, reference: str) -> float:
    """Compute ROUGE-L: F1 (beta 1) of the longest common subsequence of tokens (`split_tokens`).

    A text without tokens, such as "!", matches only itself.
    """
    from rapidfuzz.distance import LCSseq

    found, expected = split_tokens(answer), split_tokens(reference)
    if not found or not expected:
        return float(answer == reference)
    return 2 * LCSseq.similarity(found, expected) / (len(found) + len(expected))


def split_tokens(text: str) -> list[str]:
    """Split a text into tokens for ROUGE-L, in lower case.

    A Hangul syllable is a token, so that a changed particle or space costs little: "원이" and "원은" share one of two tokens.
    So is a Chinese character. In other scripts a token is a word of letters and digits, as in the original ROUGE-L.
    Punctuation is dropped.
    """
    return _TOKEN.findall(text.lower())
