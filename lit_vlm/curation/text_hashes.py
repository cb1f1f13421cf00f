"""Hashes of texts: equal after normalisation, and nearly equal by MinHash over Korean character n-grams and English words.

Korean spacing varies and particles change the end of a word, so Hangul is cut into n-grams of characters without its spaces.
Other scripts are cut into words and pairs of words, and CJK characters and kana into n-grams, too.

Shapes: N texts, P permutations of a signature.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import xxhash

from lit_vlm.types import Message, PreferencePair, Record

TEXT_VERSION = 1  # increase it when a text gets another digest or signature
NUM_PERMUTATIONS = 128
CHARACTER_GRAM = 3
_CHARACTERS = "\u1100-\u11ff\u3040-\u30ff\u3131-\u318e\u3400-\u9fff\ua960-\ua97f\uac00-\ud7ff"  # Hangul, kana, CJK
_TOKEN = re.compile(f"([{_CHARACTERS}]+)|([^\\W{_CHARACTERS}]+)")
_NUMBER = re.compile(r"\d+")
_RANDOM = np.random.default_rng(20250101)
_FACTORS = _RANDOM.integers(0, 1 << 63, NUM_PERMUTATIONS, np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 1 << 63, NUM_PERMUTATIONS, np.uint64)
_BATCH_SHINGLES = 1 << 14  # 16 MB of hashes at a time


def list_messages(record: Record) -> tuple[Message, ...]:
    """List all messages of a record; of a preference pair the prompt and both answers."""
    if isinstance(record, PreferencePair):
        return (*record.prompt, record.chosen, record.rejected)
    return record.messages


def normalise_text(text: str) -> str:
    """Normalise a text: Unicode NFC, and one space for any white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def join_turns(messages: Iterable[Message]) -> str:
    """Join the normalised texts of messages, each after its role; images are left out."""
    return "\0".join(f"{message.role}\1{normalise_text(message.text)}" for message in messages)


def hash_text(text: str) -> int:
    """Hash a text to 64 bits."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def hash_numbers(text: str) -> int:
    """Hash the numbers of a text, in their order: texts that differ in a number alone are no duplicates."""
    return hash_text("\0".join(_NUMBER.findall(text)))


def iterate_shingles(text: str, gram: int = CHARACTER_GRAM, word_runs: Sequence[int] = (1, 2)) -> Iterator[str]:
    """Iterate over the shingles of a text: n-grams of Hangul, kana and CJK characters, and runs of other words.

    Args:
        gram: characters of an n-gram; a shorter run of characters is one shingle.
        word_runs: numbers of words of a run; fewer words than the smallest of them are one shingle.
    """
    words: list[str] = []
    run = ""
    for characters, word in _TOKEN.findall(unicodedata.normalize("NFC", text).casefold()):
        if characters:
            yield from _list_word_runs(words, word_runs)
            words = []
            run += characters
        else:
            yield from _list_grams(run, gram)
            run = ""
            words.append(word)
    yield from _list_word_runs(words, word_runs)
    yield from _list_grams(run, gram)


def _list_grams(run: str, gram: int) -> Sequence[str]:
    if len(run) <= gram:
        return [run] if run else []
    return [run[start : start + gram] for start in range(len(run) - gram + 1)]


def _list_word_runs(words: list[str], lengths: Sequence[int]) -> list[str]:
    if 0 < len(words) < min(lengths):
        return [" ".join(words)]
    return [" ".join(words[start : start + length]) for length in lengths for start in range(len(words) - length + 1)]


def hash_shingles(shingles: Iterable[str]) -> np.ndarray:
    """Hash the distinct shingles of a text: [n] uint64, ascending."""
    hashes = {xxhash.xxh3_64_intdigest(shingle.encode("utf-8", "surrogatepass")) for shingle in shingles}
    return np.array(sorted(hashes), np.uint64)


def compute_signatures(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the MinHash signatures of texts from their shingle hashes: [N, P] uint32. A text without shingles has zeros."""
    signatures = np.zeros((len(texts), NUM_PERMUTATIONS), np.uint32)
    batch: list[int] = []
    size = 0
    for number, hashes in enumerate(texts):
        if len(hashes):
            batch.append(number)
            size += len(hashes)
        if batch and (size >= _BATCH_SHINGLES or number == len(texts) - 1):
            signatures[batch] = _minimise([texts[one] for one in batch])
            batch, size = [], 0
    if batch:
        signatures[batch] = _minimise([texts[one] for one in batch])
    return signatures


def _minimise(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the minimum of each permutation: multiply-add modulo 2^64, of which the upper half is uniform."""
    starts = np.cumsum([0, *map(len, texts)][:-1])
    joined = np.concatenate(texts)
    result = np.empty((len(texts), NUM_PERMUTATIONS), np.uint32)
    for number in range(NUM_PERMUTATIONS):
        permuted = (joined * _FACTORS[number] + _OFFSETS[number]) >> np.uint64(32)
        result[:, number] = np.minimum.reduceat(permuted, starts)
    return result


def estimate_similarities(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimate the Jaccard similarities of texts from two [N, P] signatures: [N], standard error at most 0.044."""
    return (first == second).mean(1)
