"""Tokens per Korean syllable of the training texts, before and after a run adds text tokens (`model.new_tokens_from`)."""

from __future__ import annotations

from typing import Any

from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.formatting import format_count
from lit_vlm.model.new_tokens import compute_tokens_per_syllable
from lit_vlm.tasks.prepare_data import Indexes, StageData
from lit_vlm.types import PreferencePair

MAX_RECORDS = 1000  # that are read to measure; spread over the index


def measure_new_tokens(stage_data: StageData[Any], indexes: Indexes) -> dict[str, dict[str, Any]]:
    """Measure the tokens per Korean syllable before and after, as an entry of the manifest.

    Returns:
        {} if the run adds no text token, or no text has Hangul.
    """
    text_tokens = stage_data.spec.text_tokens
    if text_tokens.before is None:
        return {}
    texts = _list_texts(indexes.training)
    before = compute_tokens_per_syllable(texts, text_tokens.before)
    after = compute_tokens_per_syllable(texts, stage_data.training_data.processor.template.plain_tokenizer)
    entry = {"added": len(text_tokens.pieces), "before": before, "after": after}
    return {} if before is None else {"new_text_tokens": entry}


def format_new_tokens(measured: dict[str, Any]) -> str:
    """Format the measurement as a line for the terminal."""
    added, before, after = measured["added"], measured["before"], measured["after"]
    return f"{format_count(added, 'new text token')}: {before:.2f} tokens per Korean syllable before, {after:.2f} after"


def _list_texts(index: SampleIndex) -> list[str]:
    texts = []
    for sample in range(0, len(index), max(1, len(index) // MAX_RECORDS)):
        record = index.get_record(sample)
        is_pair = isinstance(record, PreferencePair)
        messages = (*record.prompt, record.chosen, record.rejected) if is_pair else record.messages  # type: ignore[union-attr]
        texts += [message.text for message in messages]
    return texts
