"""Length policy: shorten or quarantine samples that exceed the limits of a micro-batch. Image tokens are never cut."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_vlm.config.choices import OnOverlong
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.index.shard_cache import get_origin
from lit_vlm.data.processor import Processor
from lit_vlm.data.readers.conversation import keep_first_turns
from lit_vlm.types import Fault, RecordError, Role, Sample

ColumnChanges = dict[str, Any]  # column -> value of the shortened sample


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Limits of a sample."""

    max_tokens: int  # of all segments together
    max_tiles: int
    max_length: int  # of the tokens that one segment attends to

    def is_within(self, tokens: Any, longest: Any, tiles: Any) -> Any:
        """Return True if the values, numbers or columns, are within the limits."""
        return (tokens <= self.max_tokens) & (longest <= self.max_length) & (tiles <= self.max_tiles)


def apply_length_policy(
    index: SampleIndex,
    processor: Processor,
    *,
    policy: OnOverlong,
    max_tokens: int,
    max_tiles: int,
    max_length: int | None = None,
) -> SampleIndex:
    """Apply the length policy: return an index in which every sample is within the limits.

    Its columns describe the shortened samples. Samples that the policy cannot shorten enough go to `errors`.
    `length_policy_counts` counts both, by source and action.

    Args:
        index: all usable samples.
        policy: `data.on_overlong`.
        max_tokens: of a sample; of a pair with its prompt and both answers.
        max_tiles: of a sample.
        max_length: maximum tokens of a sample, or of one answer of a pair with the prompt; None: no additional limit.
    """
    limits = LengthLimits(max_tokens, max_tiles, max_length or max_tokens)
    overlong = np.flatnonzero(~limits.is_within(index.tokens, index.longest, index.tiles))
    if not len(overlong):
        return index
    errors, fitted = list(index.errors), index.length_policy_counts.copy()
    changes: dict[int, ColumnChanges] = {}
    for sample in overlong.tolist():
        name = index.sources[index.source_ids[sample]].name
        try:
            changes[sample] = _apply_policy(index, sample, processor, policy, limits)
            fitted[name, policy.value] += 1
        except RecordError as error:
            errors.append((name, error))
            fitted[name, OnOverlong.quarantine.value] += 1
    is_kept = np.ones(len(index), dtype=bool)
    is_kept[overlong] = False
    is_kept[list(changes)] = True
    selected = np.flatnonzero(is_kept)
    result = index.select(selected)
    result.errors, result.length_policy_counts = errors, fitted
    for row, change in zip(np.searchsorted(selected, list(changes)).tolist(), changes.values(), strict=True):
        for column, value in change.items():
            result.columns[column][row] = value
    return result


def _apply_policy(
    index: SampleIndex, sample: int, processor: Processor, policy: OnOverlong, limits: LengthLimits
) -> ColumnChanges:
    """Apply the policy to one sample. Raises RecordError if it still exceeds the limits."""
    change = None
    if policy is OnOverlong.fewer_tiles:
        change = _drop_tiles(index, sample, processor, limits)
    elif policy is OnOverlong.cut_turn:
        change = _drop_turns(index, sample, processor, limits)
    if change is None:
        raise _build_overlong_error(index, sample, policy, limits)
    return change


def _drop_tiles(index: SampleIndex, sample: int, processor: Processor, limits: LengthLimits) -> ColumnChanges | None:
    """Drop tiles until the sample fits; None if it does not.

    It needs only the image size in the index, which is that of the first image, so samples with several stay as they are.
    """
    if index.images[sample] != 1 or (index.chosen[sample] and not processor.share_prompts):
        return None
    row = {name: int(index.columns[name][sample]) for name in ("tokens", "image_tokens", "squares", "longest", "tiles")}
    size = int(index.height[sample]), int(index.width[sample])
    for max_tiles in range(row["tiles"] - 2, -1, -1):  # the base view is one of the tiles
        layout = processor.images.compute_layout(*size, max_tiles=max_tiles)
        added_tokens = layout.num_tokens - row["image_tokens"]  # usually negative
        tokens, longest = row["tokens"] + added_tokens, row["longest"] + added_tokens
        if limits.is_within(tokens, longest, layout.num_tiles):
            return {
                "most_tiles": max_tiles,
                "tokens": tokens,
                "image_tokens": layout.num_tokens,
                "squares": row["squares"]
                + 2 * added_tokens * row["tokens"]
                + added_tokens * added_tokens,  # all tokens attend to it
                "longest": longest,
                "tiles": layout.num_tiles,
            }
    return None


def _drop_turns(index: SampleIndex, sample: int, processor: Processor, limits: LengthLimits) -> ColumnChanges | None:
    """Drop the last turns until the sample fits, each with its question and images; None if it does not. Reads the record."""
    record = index.get_record(sample)
    if not isinstance(record, Sample):
        return None
    answers = [
        number
        for number, message in enumerate(record.messages, 1)
        if message.role is Role.assistant and message.supervised
    ]

    def is_too_long(turns: int) -> bool:
        cost = processor.compute_cost(keep_first_turns(record, turns))
        return not limits.is_within(cost.num_tokens, cost.num_tokens, cost.num_tiles)

    num_fitting = bisect_left(answers[:-1], True, key=is_too_long)  # every turn adds tokens
    if not num_fitting:
        return None
    turns = answers[num_fitting - 1]
    cost = processor.compute_cost(keep_first_turns(record, turns))
    return {
        "turns": turns,
        "tokens": cost.num_tokens,
        "image_tokens": cost.num_image_tokens,
        "supervised": cost.num_supervised,
        "squares": cost.squares,
        "longest": cost.max_context_tokens,
        "tiles": cost.num_tiles,
        "images": cost.num_images,
        "height": cost.size[0],
        "width": cost.size[1],
    }


def _build_overlong_error(index: SampleIndex, sample: int, policy: OnOverlong, limits: LengthLimits) -> RecordError:
    """Build the error of an overlong sample, with the exceeded limits and the remedies."""
    tokens, tiles, images = (int(index.columns[name][sample]) for name in ("tokens", "tiles", "image_tokens"))
    needs, remedies = [], []
    longest = int(index.longest[sample])
    if tokens > limits.max_tokens:
        limit = f"data.tokens_per_micro_batch allows {limits.max_tokens:,}"
        needs.append(f"{tokens:,} tokens ({images:,} of them for images) and {limit}")
        remedies.append("Raise data.tokens_per_micro_batch")
    elif longest > limits.max_length:
        limit = f"data.max_length, or what the language model has positions for, allows {limits.max_length:,}"
        needs.append(f"{longest:,} tokens in a row and {limit}")
        remedies.append("Raise data.max_length where it is set")
    if tiles > limits.max_tiles:
        needs.append(f"{tiles:,} image tiles and data.tiles_per_micro_batch allows {limits.max_tiles:,}")
        remedies.append("Raise data.tiles_per_micro_batch")
    tried = {
        OnOverlong.quarantine: "",
        OnOverlong.fewer_tiles: "; fewer tiles cannot mend it",
        OnOverlong.cut_turn: "; leaving out turns cannot mend it",
    }
    others = [f"data.on_overlong={other.value}" for other in OnOverlong if other not in (OnOverlong.quarantine, policy)]
    source = index.sources[index.source_ids[sample]]
    return RecordError(
        get_origin(source, int(index.position[sample])),
        f"needs {'; '.join(needs)}{tried[policy]}",
        f"{', '.join(remedies)}; or try {' or '.join(others)}, or shorten the record",
        Fault.overlong,
    )
