"""K-Viscuit (arXiv 2406.16469, ddehun/k-viscuit): multiple choice on Korean culture. Its questions are in English.

The published rule takes at most three tokens and counts an answer only if it is exactly the letter (`k_viscuit_exact`).
`k_viscuit_read_letter` also reads sentences such as "정답은 A입니다" (`choice_letters.py`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from choice_letters import read_choice_letter
from task_rows import aggregate_percent as aggregate_percent
from task_rows import load_picture

LETTERS = "ABCD"


def load_pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """Load the picture of a row: the column `image`, or the file `image_path` in the folder that K_VISCUIT_IMAGES names.

    The published `annotations.jsonl` has the file, the copy on the hub has the picture.
    """
    if doc.get("image") is not None:
        return [load_picture(doc["image"])]
    return [Image.open(Path(os.environ.get("K_VISCUIT_IMAGES", ".")) / doc["image_path"]).convert("RGB")]


def make_prompt(doc: dict[str, Any]) -> str:
    """Make the published prompt, without the template of the model that its authors ran."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"], strict=True))
    return f"{doc['question']}\n{options}\nAnswer with the option's letter from the given choices directly."


def get_target(doc: dict[str, Any]) -> str:
    """Get the right letter; the column `answer` is its position from 0."""
    return LETTERS[int(doc["answer"])]


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one answer with the published rule and with the reader of whole sentences, 0 or 1."""
    letter = read_choice_letter(results[0], dict(zip(LETTERS, map(str, doc["options"]), strict=True)))
    return {
        "k_viscuit_exact": float(results[0].strip() == get_target(doc)),
        "k_viscuit_read_letter": float(letter == get_target(doc)),
        "k_viscuit_unread": float(letter is None),
    }
