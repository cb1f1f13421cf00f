"""Table of formats, and the readers of captions and of LLaVA's conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.coco import CAPTIONS, OBJECTS, read_coco
from lit_vlm.data.readers.context import RecordContext, describe_type, find_image_keys, is_object, iter_slot_indices
from lit_vlm.data.readers.conversation import check_num_images, count_image_slots, make_sample
from lit_vlm.data.readers.messages import place_named_images, read_messages, read_speaker, read_turns
from lit_vlm.data.readers.preference import read_preference
from lit_vlm.data.readers.single_turn import (
    read_alpaca,
    read_cauldron,
    read_prompt_completion,
    read_query_response,
    read_question_answer,
)
from lit_vlm.data.readers.unsupported_keys import SYSTEM_KEYS, check_record, check_turn
from lit_vlm.types import Fault, ImagePlaceholder, Message, Record, Role, Sample


def read_caption(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a caption record as one turn: the caption is the answer.

    The images alone are the question, unless the source has `prompts`.
    """
    key = "caption" if row.get("caption") is not None else "text"
    if row.get(key) is None:
        context.require_keys(row, "caption")
    image_keys = find_image_keys(row)
    check_record(row, context, {"id", "image", "images", *image_keys, key, *SYSTEM_KEYS})
    images = context.collect_images(row, other_keys=image_keys)
    if not images:
        raise context.make_error(f"{key!r} has no image beside it", Fault.placeholders)
    question = Message(Role.user, tuple(ImagePlaceholder(index) for index in range(len(images))))
    answer = Message(Role.assistant, context.parse_text(context.require_text(row[key], key)))
    return make_sample(row, (question, answer), images, context)


_READ_KEYS = frozenset(("id", "image", "images", "conversations", *SYSTEM_KEYS))
_TURN_KEYS = frozenset(("from", "value"))


def read_llava(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a LLaVA or ShareGPT record; raise a RecordError if it cannot be used.

    Its turns may have MiniCPM-V's `role` and `content` instead of `from` and `value`.
    """
    context.require_keys(row, "conversations")
    check_record(row, context, _READ_KEYS)
    turns = context.require_list(row["conversations"], "conversations")
    if all(is_object(turn) and turn.get("role") is not None and turn.get("from") is None for turn in turns):
        return _read_minicpm(row, turns, context)
    slots = iter_slot_indices()
    messages = [_read_message(turn, f"conversations[{number}]", slots, context) for number, turn in enumerate(turns)]
    images = context.collect_images(row)
    check_num_images(count_image_slots(messages), len(images), context)
    return make_sample(row, messages, images, context)


def _read_minicpm(row: Mapping[str, Any], turns: list[Any], context: RecordContext) -> Sample:
    """Read turns with role and content. `image` may be an object of names and paths, {"<image_00>": path, ...}."""
    named = row.get("image")
    if isinstance(named, Mapping) and not {"bytes", "path"} & named.keys():
        named = {name: path for name, path in named.items() if path is not None}  # columnar files have all keys
        turns = place_named_images(turns, list(named))
        row = {**row, "image": list(named.values())}
    messages, images = read_turns(turns, context.collect_images(row), context, "conversations")
    return make_sample(row, messages, images, context)


def _read_message(turn: Any, location: str, slots: Iterator[int], context: RecordContext) -> Message:
    if not is_object(turn):
        raise context.make_error(f"{location} is {describe_type(turn)}; it must be an object with 'from' and 'value'")
    if "role" in turn and "from" not in turn:
        raise context.make_error(
            f"{location} has 'role' and 'content', and other turns 'from' and 'value'; use one of the two"
        )
    role = read_speaker(turn.get("from"), f"{location}.from", context)
    text = context.require_text(turn.get("value"), f"{location}.value")
    trained = check_turn(turn, role, context, location, _TURN_KEYS)
    return Message(
        role, context.parse_text_with_images(text, slots) if role is Role.user else context.parse_text(text), trained
    )


RecordReader = Callable[[Mapping[str, Any], RecordContext], Record]

FORMATS: dict[str, RecordReader] = {
    "llava": read_llava,  # ShareGPT's too
    "messages": read_messages,
    "preference": read_preference,
    "caption": read_caption,
    "question_answer": read_question_answer,
    "alpaca": read_alpaca,
    "query_response": read_query_response,
    "prompt_completion": read_prompt_completion,
    "cauldron": read_cauldron,
    "coco": read_coco,
}
# Format -> sets of keys; a row that has all keys of a set is of the format. The first that fits counts.
_FORMAT_KEYS: dict[str, tuple[frozenset[str], ...]] = {
    "coco": (frozenset((CAPTIONS,)), frozenset((OBJECTS,))),
    "preference": tuple(
        map(
            frozenset,
            (("chosen", "rejected"), ("rejected_response",), ("rejected_messages",), ("messages", "rejected_images")),
        )
    ),
    "llava": (frozenset(("conversations",)),),
    "messages": (frozenset(("messages",)),),
    "cauldron": (frozenset(("texts",)), frozenset(("conversation",))),
    "alpaca": (frozenset(("instruction", "output")),),
    "query_response": (frozenset(("query", "response")),),
    "prompt_completion": (frozenset(("prompt", "completion")),),
    "question_answer": (frozenset(("question", "answer")),),
}
NEEDED_KEYS = (
    "Needed: 'conversations' (llava, sharegpt), 'messages' (messages), 'chosen' and 'rejected' (preference), "
    "'question' and 'answer' (question_answer), 'instruction' and 'output' (alpaca), 'query' and 'response' "
    "(query_response), 'prompt' and 'completion' (prompt_completion), 'texts' (cauldron), "
    "or 'caption' or 'text' beside an image; for other names data.sources.<name>.columns.image=, .question=, .answer="
)


def detect_record_format(row: Mapping[str, Any]) -> str | None:
    """Return the record's format as a key of FORMATS, or None if its keys fit none.

    In columnar files a missing key is a null.
    """
    keys = {key for key, value in row.items() if value is not None and (value or not key.startswith("rejected_"))}
    for name, key_sets in _FORMAT_KEYS.items():
        if any(key_set <= keys for key_set in key_sets):
            return name
    has_image = keys & {"image", "images"} or find_image_keys(row)
    return "caption" if keys & {"caption", "text"} and has_image else None


def format_keys(row: Mapping[str, Any]) -> str:
    """Format the row's first 12 keys for an error message."""
    return ", ".join(format_untrusted(key, 40) for key in list(row)[:12])


def read_any_format(row: Mapping[str, Any], context: RecordContext) -> Record:
    """Read a record in the format that its keys show. Used for archives, whose records may differ in format."""
    record_format = detect_record_format(row)
    if record_format is None:
        raise context.make_error(f"cannot tell the format from the keys {format_keys(row)}. {NEEDED_KEYS}")
    return FORMATS[record_format](row, context)
