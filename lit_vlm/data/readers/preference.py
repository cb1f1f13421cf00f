"""Reader of preference pairs: prompt, chosen, rejected, and images, in the columns of several trainers.

A row may have its own images for the rejected answer, `rejected_images` or `rejected_image`, as many as its prompt
shows. The question is then the same and the image another; often the answer is the same too, and wrong for that image.

TRL: "Dataset formats and types" of its documentation. Each of the three is text or messages; without a prompt, chosen
and rejected are conversations with a common beginning. LLaVA-NeXT: `_get_item` in llava/train/train_dpo.py, whose
`answer` takes no part in the loss. LLaMA-Factory: data/README.md; `conversations` (or instruction, input, history) and two
answers. ms-swift: "Custom dataset"; `messages` (or query, response, history) end with the chosen answer, and
`rejected_response`, `rejected_messages` or `rejected_images` say what the rejected one has instead. A column `kind` with a
name of `types.Kind` gives the kind of each pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lit_vlm.data.readers.context import RecordContext, describe_type, find_image_keys, iter_slot_indices
from lit_vlm.data.readers.conversation import (
    add_missing_questions,
    add_system_message,
    check_num_images,
    check_turns,
    count_image_slots,
    detect_language,
    get_record_id,
)
from lit_vlm.data.readers.messages import convert_turns, read_turns
from lit_vlm.data.readers.single_turn import make_turn, read_alpaca_prompt, read_history
from lit_vlm.data.readers.unsupported_keys import SYSTEM_KEYS, check_record, unite_keys
from lit_vlm.formatting import format_count
from lit_vlm.types import Fault, ImagePlaceholder, LazyImage, Message, PreferencePair, Role, SampleKind

_SWIFT_KEYS = ("rejected_messages", "rejected_response")
_PROMPT_KEYS = ("conversations", "messages", "instruction", "question", "query")  # one of them, if there is no `prompt`
_KEYS_BESIDE_PROMPT = {"instruction": ("input", "history"), "question": ("history",), "query": ("history",)}
_READ_KEYS = frozenset(("id", "image", "images", "rejected_image", "rejected_images", "kind", *SYSTEM_KEYS))


def read_preference(row: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Read a preference pair; raise a RecordError if it cannot be used."""
    row, read_keys = _convert_row(row, context)
    image_keys = find_image_keys(row)
    check_record(row, context, unite_keys(_READ_KEYS, read_keys, image_keys))
    row = {**row, **{key: _convert_answer(row[key], key, context) for key in ("chosen", "rejected")}}
    image_column = context.collect_images(row, other_keys=image_keys)
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


def _convert_row(row: Mapping[str, Any], context: RecordContext) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Convert a row of another trainer to the keys prompt, chosen and rejected; return it with the keys that were used."""
    has_own_answers = row.get("chosen") is not None or row.get("rejected") is not None
    if any(_has_value(row, key) for key in (*_SWIFT_KEYS, *(() if has_own_answers else ("rejected_images",)))):
        return _convert_swift_row(row, context)
    context.require_keys(row, "chosen", "rejected")
    read_keys: tuple[str, ...] = ("prompt", "chosen", "rejected")
    chosen = row["chosen"]
    if row.get("prompt") is not None or (isinstance(chosen, list) and len(chosen) > 1):
        return row, read_keys
    prompts = [key for key in _PROMPT_KEYS if row.get(key) is not None]
    if len(prompts) > 1:
        raise context.make_error(f"both {prompts[0]!r} and {prompts[1]!r} are given; one of them must go")
    if not prompts:
        return row, read_keys
    used_keys = (prompts[0], *_KEYS_BESIDE_PROMPT.get(prompts[0], ()))
    return {**row, "prompt": _convert_prompt(row, prompts[0], context)}, (*read_keys, *used_keys)


def _convert_prompt(row: Mapping[str, Any], key: str, context: RecordContext) -> Any:
    if key in ("conversations", "messages"):
        return convert_turns(row[key], key, context)
    if key == "instruction":
        return read_alpaca_prompt(row, context)
    history = read_history(row, context)
    return [*history, make_turn(Role.user, row[key], key, context)] if history else row[key]


def _convert_swift_row(row: Mapping[str, Any], context: RecordContext) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert a row of ms-swift, whose conversation ends with the chosen answer."""
    rejected_keys = [key for key in ("rejected_messages", "rejected_response") if _has_value(row, key)]
    if len(rejected_keys) > 1:
        raise context.make_error(f"both {rejected_keys[0]!r} and {rejected_keys[1]!r} are given; one of them must go")
    read_keys: tuple[str, ...]
    conversation = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
    if conversation:
        turns, read_keys = convert_turns(row[conversation], conversation, context), (conversation,)
    else:
        context.require_keys(row, "query", "response")
        read_keys = ("query", "response", "history")
        turns = [*read_history(row, context), make_turn(Role.user, row["query"], "query", context)]
        turns.append(make_turn(Role.assistant, row["response"], "response", context))
    if len(turns) < 2:
        raise context.make_error(f"{read_keys[0]} has no question before its answer")
    pair: dict[str, Any] = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": turns[-1:]}
    if rejected_keys == ["rejected_response"]:
        pair["rejected"] = row["rejected_response"]
    elif rejected_keys:
        rejected = convert_turns(row["rejected_messages"], "rejected_messages", context)
        pair = {"prompt": None, "chosen": turns, "rejected": rejected}
    converted = {**row, **pair}
    if _get_image_values(row, "rejected_") == _get_image_values(row, ""):  # the same pictures twice
        converted = {key: value for key, value in converted.items() if key not in ("rejected_images", "rejected_image")}
    return converted, (*read_keys, *rejected_keys, *pair)


def _has_value(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) not in (None, "", [])


def _convert_answer(value: Any, key: str, context: RecordContext) -> Any:
    """Convert an answer that is one object, {from, value} or {role, content}, to a list with one message."""
    if isinstance(value, Mapping) and not {"from", "role"} & value.keys():
        reason = f"{key} is an object with the keys {', '.join(map(repr, value))}"
        raise context.make_error(f"{reason}; it must be text, a message or a list of messages")
    return (
        convert_turns(value, key, context)
        if isinstance(value, Mapping) or (isinstance(value, list) and value)
        else value
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
