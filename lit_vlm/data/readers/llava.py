"""Reader of LLaVA and ShareGPT conversations, two variants of one format.

LLaVA: {id, image, conversations: [{from: human, value}, {from: gpt, value}]}, docs/Finetune_Custom_Data.md of
haotian-liu/LLaVA. ShareGPT as LLaMA-Factory has it (its data/README.md): a column `system`, a list `images`, and the
roles `user` and `assistant` too. '<image>' in a human's text marks the image's position. `dialects.py` handles other
keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_vlm.data.images import shown
from lit_vlm.data.readers.dialects import SYSTEM, check_record, check_turn
from lit_vlm.data.readers.place import Place, new_slots, type_name
from lit_vlm.data.readers.record import check_slots, make_sample, slots_in
from lit_vlm.types import Message, Role, Sample

_ROLES = {
    "system": Role.system,
    "human": Role.user,
    "user": Role.user,
    "gpt": Role.assistant,
    "assistant": Role.assistant,
}
_TOOLS = ("function_call", "function_response", "observation", "function", "tool", "tool_call")
_READ = ("id", "image", "images", "conversations", *SYSTEM)


def read_llava(row: Mapping[str, Any], place: Place) -> Sample:
    """Read a LLaVA or ShareGPT record; raise a RecordError if it cannot be used."""
    place.need(row, "conversations")
    check_record(row, place, _READ)
    slots = new_slots()
    turns = place.items(row["conversations"], "conversations")
    messages = [_message(turn, f"conversations[{number}]", slots, place) for number, turn in enumerate(turns)]
    images = place.images(row)
    check_slots(slots_in(messages), len(images), place)
    return make_sample(row, messages, images, place)


def _message(turn: Any, where: str, slots: Iterator[int], place: Place) -> Message:
    if not isinstance(turn, Mapping):
        raise place.fault(f"{where} is {type_name(turn)}; it must be an object with 'from' and 'value'")
    if "role" in turn and "from" not in turn:
        raise place.fault(
            f"{where} has 'role' and 'content', and conversations 'from' and 'value'; call them 'messages'"
        )
    speaker = place.text(turn.get("from"), f"{where}.from")
    role = _ROLES.get(speaker)
    if role is None:
        found = f"{where}.from is {shown(speaker)}"
        if speaker in _TOOLS:
            raise place.fault(f"{found}: calls of tools are not read")
        raise place.fault(f"{found}; it must be 'human', 'gpt' or 'system' ('user' and 'assistant' do too)")
    text = place.text(turn.get("value"), f"{where}.value")
    trained = check_turn(turn, role, place, where, ("from", "value"))
    return Message(role, place.marked(text, slots) if role is Role.user else place.pieces(text), trained)
