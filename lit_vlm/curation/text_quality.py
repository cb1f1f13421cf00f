"""Rules of text quality for captions: few and plain, after Gopher, C4 and DataComp.

Gopher: Rae et al., arXiv 2112.11446, table A1 (repeated n-grams, symbols). DataComp: Gadre et al., arXiv 2304.14108, basic
filtering (short captions). C4: Raffel et al., arXiv 1910.10683 (language).
"""

from __future__ import annotations

import unicodedata

from lit_vlm.config.choices import TextRule
from lit_vlm.types import Language

MIN_LETTERS = 5  # DataComp asks for more than 5 characters; a Hangul syllable has two or three letters and counts as 2
REPEAT_GRAM, MAX_REPEATED = 5, 0.15  # Gopher: characters in words of 5-grams that were there before
MAX_SAME_WORDS = 4  # the same word after each other
MIN_LETTER_SHARE = 0.5  # of the characters without spaces: letters and digits
MIN_HANGUL, MIN_LATIN = 0.3, 0.7  # of the letters of a Korean, and of an English text; of any text both together


def find_text_faults(text: str, language: Language) -> list[TextRule]:
    """Find the rules that a caption breaks, in the order of the rules.

    Args:
        language: that the caption should have; auto: Korean or English.
    """
    text = unicodedata.normalize("NFC", text)
    checks = {
        TextRule.too_short: count_letters(text) < MIN_LETTERS,
        TextRule.repeated: is_repeated(text.split()),
        TextRule.symbols: is_mostly_symbols(text),
        TextRule.wrong_script: is_wrong_script(text, language),
    }
    return [rule for rule, is_broken in checks.items() if is_broken]


def count_letters(text: str) -> int:
    """Count letters and digits; a Hangul syllable counts as two."""
    return sum(1 + is_hangul(letter) for letter in text if letter.isalnum())


def is_hangul(letter: str) -> bool:
    """Return True for a Hangul syllable."""
    return "가" <= letter <= "힣"


def is_repeated(words: list[str]) -> bool:
    """Return True if a word stands `MAX_SAME_WORDS` times in a row, or more than `MAX_REPEATED` of the characters repeat 5-grams."""
    runs = zip(*(words[start:] for start in range(MAX_SAME_WORDS)), strict=False)
    if any(len(set(run)) == 1 for run in runs):
        return True
    seen, is_again = set[tuple[str, ...]](), [False] * len(words)
    for start in range(len(words) - REPEAT_GRAM + 1):
        gram = tuple(words[start : start + REPEAT_GRAM])
        if gram in seen:
            is_again[start : start + REPEAT_GRAM] = [True] * REPEAT_GRAM
        seen.add(gram)
    total = sum(map(len, words))
    return sum(len(word) for word, again in zip(words, is_again, strict=True) if again) > MAX_REPEATED * total


def is_mostly_symbols(text: str) -> bool:
    """Return True if fewer than half of the characters without spaces are letters or digits."""
    shown = [letter for letter in text if not letter.isspace()]
    return sum(letter.isalnum() for letter in shown) < MIN_LETTER_SHARE * len(shown)


def is_wrong_script(text: str, language: Language) -> bool:
    """Return True if too few of the letters are Hangul in a Korean text, Latin in an English one, or either of them in any."""
    letters = [letter for letter in text if letter.isalpha()]
    hangul = sum(map(is_hangul, letters))
    if language is Language.ko:
        return hangul < MIN_HANGUL * len(letters)
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return latin + (hangul if language is Language.auto else 0) < MIN_LATIN * len(letters)
