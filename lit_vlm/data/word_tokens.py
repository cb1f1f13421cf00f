"""Token ids of a text, word by word from a cache, for tokenizers whose words do not depend on each other.

A byte-level BPE tokenizer first splits a text with a regular expression and then encodes each piece alone. In those of
the list below no piece begins in front of white space and goes on behind it. So a text may be cut in front of every space
that follows another character, and its ids are those of the parts. All other tokenizers get the whole text.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLIT_PATTERNS = frozenset(
    {
        # cl100k (Llama 3, Kanana), Qwen2 and Qwen3, Qwen3.5, o200k
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}",
    }
)
MAX_WORDS, MAX_WORD_CHARS = 1 << 16, 64  # of each cache: at most some 15 MB
# A space behind a character that no regular expression takes for white space, whatever its version of Unicode
_CUT = re.compile(" (?<=[^\\s\u180e\u200b\u2060\ufeff] )")


class WordTokenizer:
    """Tokenizer of plain texts that keeps the ids of words.

    Args:
        tokenizer: without added tokens and without a post-processor.

    Attributes:
        splits_words: True if the tokenizer's words do not depend on each other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.splits_words = tokenizer, has_independent_words(tokenizer)
        # ids of the first word of a text; and of words behind a space, which is not part of the key
        self._first_words: dict[str, bytes] = {}
        self._words: dict[str, bytes] = {}

    def encode(self, text: str) -> bytes:
        """Encode a text to token ids: int32 in the byte order of the machine."""
        if not self.splits_words:
            return self._encode_whole(text)
        first, *words = _CUT.split(text)
        parts = [self._first_words.get(first), *map(self._words.get, words)]
        if None in parts:
            parts[0] = self._encode_word(first, "", self._first_words)
            parts[1:] = (self._words.get(word) or self._encode_word(word, " ", self._words) for word in words)
        return b"".join(parts)  # type: ignore[arg-type]

    def _encode_word(self, word: str, before: str, cache: dict[str, bytes]) -> bytes:
        ids = self._encode_whole(before + word)
        if len(word) <= MAX_WORD_CHARS:
            if len(cache) >= MAX_WORDS:
                cache.clear()
            cache[word] = ids
        return ids

    def _encode_whole(self, text: str) -> bytes:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32).tobytes()


def has_independent_words(tokenizer: Tokenizer) -> bool:
    """Return True if a text may be cut in front of a space: byte-level BPE that splits at white space by a known rule."""
    state = json.loads(tokenizer.to_str())
    steps = _list_steps(state["pre_tokenizer"], "pretokenizers")
    return (
        state["model"]["type"] == "BPE"
        and not state["model"].get("dropout")
        and not state["added_tokens"]
        and not state["post_processor"]
        and all(step["type"] == "NFC" for step in _list_steps(state["normalizer"], "normalizers"))
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in ("ByteLevel", "Digits", "Split") for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and all(_is_known_split(step) for step in steps if step["type"] == "Split")
        and any(step["type"] == "Split" or step.get("use_regex") for step in steps)
    )


def _list_steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """List the steps of a normalizer or pre-tokenizer, without sequences."""
    if step is None:
        return []
    return [one for part in step[key] for one in _list_steps(part, key)] if step["type"] == "Sequence" else [step]


def _is_known_split(step: dict[str, Any]) -> bool:
    return step["pattern"].get("Regex") in SPLIT_PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
