"""KRETA (arXiv 2508.19944, tabtoyou/KRETA): Korean multiple choice about pictures with much text, System 1 and System 2.

The published rule reads the letter after the last "Answer:", else "(A)", "A " or "A." anywhere, else the text of an option
in an answer of more than five words, and otherwise chooses a letter at random. Here nothing is random: `kreta_acc` counts an
unread answer as wrong, and `kreta_acc_guess` as 1/4, the expectation of the published rule. `kreta_read_letter` reads whole
sentences such as "정답은 A입니다" (`choice_letters.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from choice_letters import read_choice_letter
from task_rows import aggregate_percent as aggregate_percent
from task_rows import load_pictures as load_pictures

LETTERS = "ABCD"


def make_prompt(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """Make the published prompt; `post_prompt` of the YAML is its setting `default` or `direct`."""
    options = "\n".join(f"{letter}. {doc[letter]}" for letter in LETTERS)
    return (
        f"Question: {doc['question']}\nOptions:\n{options}\n{(lmms_eval_specific_kwargs or {}).get('post_prompt', '')}"
    )


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float | None]:
    """Score one answer with the published rule and with the reader of whole sentences, 0 or 1."""
    options = {letter: "" if doc[letter] is None else str(doc[letter]) for letter in LETTERS}
    answer = str(doc["answer"]).strip()
    letter = read_published_letter(results[0], options)
    hit = float(letter == answer)
    system = doc.get("topic_difficulty")
    return {
        "kreta_acc": hit,
        "kreta_acc_guess": 1 / len(LETTERS) if letter is None else hit,
        "kreta_read_letter": float(read_choice_letter(results[0], options) == answer),
        "kreta_unread": float(letter is None),
        "kreta_system1": hit if system == "System1" else None,
        "kreta_system2": hit if system == "System2" else None,
    }


def read_published_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Read a letter by the published rule; None where it would choose one at random."""
    _, marker, after = answer.rpartition("Answer:")
    if marker and len(after_marker := [letter for letter in options if letter in after.strip()]) == 1:
        return after_marker[0]
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    # Of several letters the last one counts. Letters that only end a word, such as the A of "DNA ", have no such place.
    for found, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if letters := [letter for letter in options if found.format(letter) in answer]:
            return max(letters, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) > 5:
        lower = answer.lower()
        if letters := [letter for letter, option in options.items() if option and option.lower() in lower]:
            return max(letters, key=lambda letter: lower.rfind(options[letter].lower()))
    return None
