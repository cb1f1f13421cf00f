"""Reader of preference pairs: TRL's columns prompt, chosen, rejected, images, or LLaVA-NeXT's keys (`image`).

A row may have its own images for the rejected answer, `rejected_images` or `rejected_image`, as many as its prompt
shows. The question is then the same and the image another; often the answer is the same too, and wrong for that image.

TRL: "Dataset formats and types" of its documentation. Each of the three is text or messages; without a prompt, chosen
and rejected are conversations with a common beginning. LLaVA-NeXT: `_get_item` in llava/train/train_dpo.py, whose
`answer` takes no part in the loss. A column `kind` with a name of `types.Kind` gives the kind of each pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lit_vlm.data.readers.context import RecordContext, describe_type, iter_slot_indices
from lit_vlm.data.readers.conversation import (
    add_missing_questions,
    add_system_message,
    check_num_images,
    check_turns,
    count_image_slots,
    detect_language,
    get_record_id,
)
from lit_vlm.data.readers.messages import read_turns
from lit_vlm.data.readers.unsupported_keys import SYSTEM_KEYS, check_record
from lit_vlm.formatting import format_count
from lit_vlm.types import Fault, ImagePlaceholder, LazyImage, Message, PreferencePair, Role, SampleKind

_READ_KEYS = (
    "id",
    "image",
    "images",
    "rejected_image",
    "rejected_images",
    "prompt",
    "chosen",
    "rejected",
    "kind",
    *SYSTEM_KEYS,
)


def read_preference(row: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Read a preference pair; raise a RecordError if it cannot be used."""
    context.require_keys(row, "chosen", "rejected")
    check_record(row, context, _READ_KEYS)
    for key in ("chosen", "rejected"):
        if isinstance(row[key], Mapping):
            reason = f"{key} is an object with the keys {', '.join(map(repr, row[key]))}"
            raise context.make_error(f"{reason}; it must be text or a list of messages")
    image_column = context.collect_images(row)
    if row.get("prompt") is None:
        row = _extract_prompt(row, context)
    prompt, images = _read_prompt(row["prompt"], image_column, context)
    prompt = tuple(add_missing_questions(row, add_system_message(row, prompt, context), images, context))
    chosen, rejected = (
        _read_answer(row["chosen"], "chosen", context),
        _read_answer(row["rejected"], "rejected", context),
    )
    for answer in (chosen, rejected):
        check_turns((*prompt, answer), context)
    rejected_images = context.collect_images(row, "rejected_")
    if rejected_images and len(rejected_images) != len(images):
        raise context.make_error(
            f"{format_count(len(rejected_images), 'rejected image')} beside {format_count(len(images), 'image')}; the prompt shows as many of each"
        )
    if chosen == rejected and (
        not rejected_images or _get_image_values(row, "") == _get_image_values(row, "rejected_")
    ):
        raise context.make_error("chosen and rejected are equal; there is nothing to prefer")
    return PreferencePair(
        id=get_record_id(row, context),
        source=context.settings.source,
        origin=context.origin,
        kind=_get_pair_kind(row, context),
        language=detect_language((*prompt, chosen, rejected), context.settings),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        images=(*images, *rejected_images),
        max_tiles=context.settings.max_tiles,
        nfc_changed=context.normalised,
        has_rejected_images=bool(rejected_images),
        unused_keys=tuple(context.unread),
    )


def _get_image_values(row: Mapping[str, Any], prefix: str) -> list[Any]:
    value: Any = next((row[key] for key in (f"{prefix}images", f"{prefix}image") if row.get(key) is not None), [])
    return value if isinstance(value, list) else [value]


def _get_pair_kind(row: Mapping[str, Any], context: RecordContext) -> SampleKind:
    """Return the row's own kind, unless the source's settings give one other than `preference`."""
    if context.settings.kind not in (None, SampleKind.preference):
        return context.settings.kind
    row_kind = row.get("kind")
    return (
        SampleKind(row_kind)
        if isinstance(row_kind, str) and row_kind in SampleKind.__members__
        else SampleKind.preference
    )


def _extract_prompt(row: Mapping[str, Any], context: RecordContext) -> dict[str, Any]:
    """Extract the implicit prompt, the common beginning of the two conversations, into a key of its own."""
    if isinstance(row["chosen"], str):
        context.require_keys(row, "prompt", "chosen", "rejected")
    chosen, rejected = context.require_list(row["chosen"], "chosen"), context.require_list(row["rejected"], "rejected")
    common = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    # Of equal conversations one answer stays outside of the prompt; the later check then reports that they are equal.
    num_common = min(len(common), len(chosen) - 1, len(rejected) - 1)
    if num_common == 0:
        raise context.make_error("missing 'prompt', and chosen and rejected begin with different messages")
    return {**row, "prompt": chosen[:num_common], "chosen": chosen[num_common:], "rejected": rejected[num_common:]}


def _read_prompt(
    value: Any, image_column: Sequence[LazyImage], context: RecordContext
) -> tuple[tuple[Message, ...], tuple[LazyImage, ...]]:
    if isinstance(value, list):
        return read_turns(value, image_column, context, "prompt")
    content = context.parse_text_with_images(context.require_text(value, "prompt"), iter_slot_indices())
    if len(image_column) == 1 and not any(isinstance(piece, ImagePlaceholder) for piece in content):
        content = (
            ImagePlaceholder(0),
            *content,
        )  # LLaVA-NeXT's prompts have no marker; its loader puts the image first
    prompt = (Message(Role.user, content),)
    check_num_images(count_image_slots(prompt), len(image_column), context)
    return prompt, tuple(image_column)


def _read_answer(value: Any, key: str, context: RecordContext) -> Message:
    if isinstance(value, str):
        return Message(Role.assistant, context.parse_text(context.require_text(value, key)))
    if not isinstance(value, list):
        raise context.make_error(f"{key} is {describe_type(value)}; it must be text or a list of messages")
    if len(value) != 1:
        raise context.make_error(f"{key} has {len(value)} messages after the prompt; it must be one answer")
    answer = read_turns(value, (), context, key)[0][0]
    if not answer.supervised:
        raise context.make_error(
            f"{key} says that it is not trained on, and a pair trains on both answers", Fault.no_answer
        )
    return answer
