"""Reader of captions: an image and its text, in the column `caption` or `text`, without a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.context import RecordContext, describe_type, iter_slot_indices
from lit_vlm.data.readers.conversation import check_num_images, count_image_slots, make_sample
from lit_vlm.data.readers.messages import read_messages
from lit_vlm.data.readers.preference import read_preference
from lit_vlm.data.readers.unsupported_keys import SYSTEM_KEYS, check_record, check_turn
from lit_vlm.types import Fault, ImagePlaceholder, Message, Record, Role, Sample


def read_caption(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a caption record as one turn: the caption is the answer.

    The images alone are the question, unless the source has `prompts`.
    """
    key = "caption" if row.get("caption") is not None else "text"
    if row.get(key) is None:
        context.require_keys(row, "caption")
    check_record(row, context, ("id", "image", "images", key, *SYSTEM_KEYS))
    images = context.collect_images(row)
    if not images:
        raise context.make_error(f"{key!r} has no image beside it", Fault.placeholders)
    question = Message(Role.user, tuple(ImagePlaceholder(index) for index in range(len(images))))
    answer = Message(Role.assistant, context.parse_text(context.require_text(row[key], key)))
    return make_sample(row, (question, answer), images, context)


_ROLES = {
    "system": Role.system,
    "human": Role.user,
    "user": Role.user,
    "gpt": Role.assistant,
    "assistant": Role.assistant,
}
_TOOL_ROLES = ("function_call", "function_response", "observation", "function", "tool", "tool_call")
_READ_KEYS = ("id", "image", "images", "conversations", *SYSTEM_KEYS)


def read_llava(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a LLaVA or ShareGPT record; raise a RecordError if it cannot be used."""
    context.require_keys(row, "conversations")
    check_record(row, context, _READ_KEYS)
    slots = iter_slot_indices()
    turns = context.require_list(row["conversations"], "conversations")
    messages = [_read_message(turn, f"conversations[{number}]", slots, context) for number, turn in enumerate(turns)]
    images = context.collect_images(row)
    check_num_images(count_image_slots(messages), len(images), context)
    return make_sample(row, messages, images, context)


def _read_message(turn: Any, location: str, slots: Iterator[int], context: RecordContext) -> Message:
    if not isinstance(turn, Mapping):
        raise context.make_error(f"{location} is {describe_type(turn)}; it must be an object with 'from' and 'value'")
    if "role" in turn and "from" not in turn:
        raise context.make_error(
            f"{location} has 'role' and 'content', and conversations 'from' and 'value'; call them 'messages'"
        )
    speaker = context.require_text(turn.get("from"), f"{location}.from")
    role = _ROLES.get(speaker)
    if role is None:
        found = f"{location}.from is {format_untrusted(speaker)}"
        if speaker in _TOOL_ROLES:
            raise context.make_error(f"{found}: calls of tools are not read")
        raise context.make_error(f"{found}; it must be 'human', 'gpt' or 'system' ('user' and 'assistant' do too)")
    text = context.require_text(turn.get("value"), f"{location}.value")
    trained = check_turn(turn, role, context, location, ("from", "value"))
    return Message(
        role, context.parse_text_with_images(text, slots) if role is Role.user else context.parse_text(text), trained
    )


RecordReader = Callable[[Mapping[str, Any], RecordContext], Record]

FORMATS: dict[str, RecordReader] = {
    "llava": read_llava,  # ShareGPT's too
    "messages": read_messages,
    "preference": read_preference,
    "caption": read_caption,
}
NEEDED_KEYS = (
    "Needed: 'conversations' (llava, sharegpt), 'messages' (messages), 'chosen' and 'rejected' (preference), "
    "or 'caption' or 'text' beside an image"
)


def detect_record_format(row: Mapping[str, Any]) -> str | None:
    """Return the record's format as a key of FORMATS, or None if its keys fit none.

    In columnar files a missing key is a null.
    """
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if "conversations" in keys:
        return "llava"
    if "messages" in keys:
        return "messages"
    return "caption" if keys & {"caption", "text"} and keys & {"image", "images"} else None


def format_keys(row: Mapping[str, Any]) -> str:
    """Format the row's first 12 keys for an error message."""
    return ", ".join(format_untrusted(key, 40) for key in list(row)[:12])


def read_any_format(row: Mapping[str, Any], context: RecordContext) -> Record:
    """Read a record in the format that its keys show. Used for archives, whose records may differ in format."""
    record_format = detect_record_format(row)
    if record_format is None:
        raise context.make_error(f"cannot tell the format from the keys {format_keys(row)}. {NEEDED_KEYS}")
    return FORMATS[record_format](row, context)
