"""Korean captions of Crossmodal-3600 (arXiv 2205.12522), scored by chrF2 and by ROUGE-L on Hangul syllables.

No morphological analyser is needed, and spacing does not count, so "빨간원이있다" equals "빨간 원이 있다". CIDEr and BLEU-4
are not computed: with pycocoevalcap, captions of a few words cannot reach their maximum even if they equal the reference,
and the PTB tokenizer is for English. Each caption is compared with all references, and the best one counts.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from task_rows import aggregate_percent as aggregate_percent
from task_rows import load_pictures as load_pictures
from text_scores import compute_chrf, compute_rouge_l, normalize_answer, take_best

_HANGUL = re.compile("[\uac00-\ud7a3]")


def make_prompt(doc: dict[str, Any]) -> str:
    """Make the prompt; the set has none of its own."""
    return "이 사진을 한 문장으로 설명해 주세요."


def get_target(doc: dict[str, Any]) -> str:
    """Get the references, one a line, for the log of samples."""
    return "\n".join(doc["captions"])


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one caption against its references, 0 to 1; `caption_not_korean` is 1 for an answer without Hangul."""
    answer = normalize_answer(results[0])
    references = [normalize_answer(reference) for reference in doc["captions"]]
    return {
        "caption_chrf": compute_chrf(answer, references),
        "caption_rouge_l": take_best(compute_rouge_l)(answer, references),
        "caption_not_korean": float(not _HANGUL.search(answer)),
    }
