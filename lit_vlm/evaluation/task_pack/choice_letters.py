"""Letter of a multiple-choice answer, read from whole sentences in Korean and English.

Published rules differ: a first-letter rule does not read "정답은 A입니다", and others choose at random when they read nothing.
`read_choice_letter` reads more than they do and never guesses. The tasks of this pack report it beside the published rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

_QUOTES = " \t\r\n\"'`*_.,:;!?()[]{}<>~-"
# A letter stands alone if no Latin letter or digit is beside it: "A입니다" and "(A)" do, "CAT" and "A4" do not.
_BEFORE, _AFTER = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
# "A man" and "A 3D model" begin with an article; "A 입니다" and "A and B" do not.
_NO_ARTICLE = r"(?!\s+(?!and\b|or\b)[a-z0-9])"
_KOREAN_PHRASE = r"(?:정답|답변|답|선택지?|보기|옵션)(?:은|는|이|:|\s)+"
_ENGLISH_PHRASE = r"(?:answer|choice|option)(?:\s+is|\s*:|\s)+"
# Words between two letters that are both chosen: "A 또는 B", "A와 B", "A, B"
_AND = r"[\"'`*)\]]*\s*(?:,|/|&|와|과|이나|나|또는|혹은|및|하고|or\b|and\b)\s*[\"'`*(\[]*"
# "B가 아니라 A", "B는 아닙니다", "not B": the letter is not chosen
_DENIED_AFTER, _DENIED_BEFORE = r"(?!(?:가|이|은|는)?\s*아니|(?:가|이|은|는)?\s*아닙)", r"(?<!\bnot )"
# Words after a phrase up to its letter: "the answer is option (B)", "정답은 **B**"
_FILLERS = r"(?:[\s\"'`*(\[:]|option\b|choice\b|옵션|보기|선택지)*"


def read_choice_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Read the one option that an answer chooses; None if it chooses none, or several.

    Full-width letters count as letters. In this order: a letter alone; the letter after the last "정답은", "답:",
    "Answer:" or "answer is"; a letter at the start with its own punctuation ("B. ...", "(B) ..."); the only letter that
    stands alone (an English article "A" is none, nor the B of "B가 아니라"); the only option whose text the answer holds.

    Args:
        answer: text of the model.
        options: letter -> text of the option.
    """
    text = unicodedata.normalize("NFKC", answer)
    alone = text.strip(_QUOTES).upper()
    if alone in options:
        return alone
    letters = "".join(options)
    phrase = re.compile(
        rf"(?:{_KOREAN_PHRASE}|{_ENGLISH_PHRASE}){_FILLERS}([{letters}]){_AFTER}{_NO_ARTICLE}", re.IGNORECASE
    )
    if chosen := [match for match in phrase.finditer(text) if match[1].isupper()]:
        several = re.match(rf"{_AND}[{letters}]{_AFTER}", text[chosen[-1].end() :])
        return None if several else chosen[-1][1]
    if match := re.match(rf"\s*[\"'`*(\[]*([{letters}])\s*[.):\]]", text):
        others = set(_find_single_letters(text[match.end() :], letters)) - {match[1]}
        return None if others else match[1]
    singles = set(_find_single_letters(text, letters))
    if singles:
        return singles.pop() if len(singles) == 1 else None
    return _find_option_text(text, options)


def _find_single_letters(text: str, letters: str) -> list[str]:
    chosen = rf"{_BEFORE}{_DENIED_BEFORE}([{letters}]){_AFTER}{_DENIED_AFTER}"
    found = re.finditer(rf"{chosen}(?:(?<!A)|{_NO_ARTICLE})", text)
    return [match[1] for match in found]


def _find_option_text(text: str, options: Mapping[str, str]) -> str | None:
    """Find the only option whose text is in the answer; of options that contain each other, the longest."""
    folded = _fold(text)
    inside = {letter: _fold(option) for letter, option in options.items() if _fold(option) and _fold(option) in folded}
    longest = [
        letter
        for letter, option in inside.items()
        if not any(option != other and option in other for other in inside.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _fold(text: str) -> str:
    """Fold a text for comparison: NFKC, lower case, single spaces, no final period."""
    return " ".join(unicodedata.normalize("NFKC", str(text)).lower().split()).strip(" .")
