"""Reader of LLaVA and ShareGPT conversations, two variants of one format.

LLaVA: {id, image, conversations: [{from: human, value}, {from: gpt, value}]}, docs/Finetune_Custom_Data.md of
haotian-liu/LLaVA. ShareGPT as LLaMA-Factory has it (its data/README.md): a column `system`, a list `images`, and the
roles `user` and `assistant` too. '<image>' in a human's text marks the image's position. `dialects.py` handles other
keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_vlm.data.images import format_untrusted
from lit_vlm.data.readers.dialects import SYSTEM_KEYS, check_record, check_turn
from lit_vlm.data.readers.place import RecordContext, describe_type, iter_slot_indices
from lit_vlm.data.readers.record import check_num_images, count_image_slots, make_sample
from lit_vlm.types import Message, Role, Sample

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
