"""Concepts that texts name, and MetaCLIP's rule of balancing them (Xu et al., arXiv 2309.16671, section 3).

A text names a concept if the concept's words follow each other in it. Words of Korean texts are the nouns of kiwipiepy, because
particles change the end of a word: 지하철역에서 names 지하철역. Other words are compared without case. MetaCLIP keeps capitals.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lit_vlm.types import UserError

try:
    from kiwipiepy import Kiwi
except ImportError:  # package of the extra `curate`
    Kiwi = None

_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff]")
_PHRASE = re.compile(r"[^.,;:?!()\[\]{}\"“”\n]+")  # words on both sides of these marks do not follow each other
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_NOUN_TAGS = ("NNG", "NNP", "SL", "SH", "SN")  # common and proper nouns, Latin letters, Chinese characters, digits


def read_concepts(path: Path, setting: str) -> list[str]:
    """Read a list of concepts, one a line; empty lines and repeated ones are left out.

    Raises:
        UserError: the file cannot be read or names none, or Korean concepts need a package that is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text in UTF-8"
        raise UserError(f"{setting}={path}: {reason}. Give a text file with one concept a line.") from None
    concepts = list(dict.fromkeys(" ".join(line.split()) for line in text.split("\n") if line.strip()))
    if not concepts:
        raise UserError(f"{setting}={path}: names no concept. Give a text file with one concept a line.")
    if Kiwi is None and _HANGUL.search(text):
        raise UserError(
            f"{setting}={path}: has Korean concepts, and their nouns are found with kiwipiepy: pip install -e '.[curate]' -c constraints.txt"
        )
    return concepts


@cache
def _load_kiwi() -> Any:
    return Kiwi(num_workers=0)  # no threads of its own, so workers may fork


def list_word_runs(text: str) -> list[list[str]]:
    """List the runs of words of a text that follow each other: nouns of a text with Hangul, else all words."""
    text = unicodedata.normalize("NFC", text)
    if Kiwi is None or not _HANGUL.search(text):
        return [words for phrase in _PHRASE.findall(text.casefold()) if (words := _WORD.findall(phrase))]
    runs, end = list[list[str]](), -1
    for number, token in enumerate(_load_kiwi().tokenize(text)):
        if token.tag in _NOUN_TAGS:
            if number != end:
                runs.append([])
            runs[-1].append(token.form.casefold())
            end = number + 1
    return runs


class ConceptMatcher:
    """Finder of the concepts that a text names.

    Args:
        concepts: texts of the concepts.

    Attributes:
        unusable: concepts without a word that could be found, such as a Korean verb.
    """

    def __init__(self, concepts: Sequence[str]) -> None:
        self._numbers: dict[tuple[str, ...], list[int]] = {}
        self.unusable: list[str] = []
        for number, concept in enumerate(concepts):
            words = tuple(word for run in list_word_runs(concept) for word in run)
            if words:
                self._numbers.setdefault(words, []).append(number)
            else:
                self.unusable.append(concept)
        self._max_words = max(map(len, self._numbers), default=0)

    def match(self, text: str) -> list[int]:
        """Return the numbers of the concepts that a text names, ascending."""
        found = set[int]()
        for run in list_word_runs(text):
            for start in range(len(run)):
                for end in range(start + 1, min(start + self._max_words, len(run)) + 1):
                    found.update(self._numbers.get(tuple(run[start:end]), ()))
        return sorted(found)


def count_concepts(matches: Sequence[Sequence[int]], num_concepts: int) -> np.ndarray:
    """Count the records that name each concept, [C] int64."""
    named = [number for found in matches for number in found]
    return np.bincount(np.array(named, np.int64), minlength=num_concepts)


def is_sampled(key: str, concepts: Sequence[int], probabilities: np.ndarray) -> bool:
    """Return True if any of the concepts of a record is sampled: MetaCLIP's rule.

    Args:
        key: of the record and the seed; each pair of record and concept draws once, whatever the other records are.
        probabilities: t / max(count, t) of each concept, [C].
    """
    return any(draw_uniform(f"{key}\0{concept}") < probabilities[concept] for concept in concepts)


def draw_uniform(key: str) -> float:
    """Draw a number in [0, 1) from a key: the same key gives the same number."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) / 2.0**64
