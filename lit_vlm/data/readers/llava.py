"""LLaVA's records: {id, image, conversations: [{from: human, value}, {from: gpt, value}]}.

Format: docs/Finetune_Custom_Data.md of haotian-liu/LLaVA. '<image>' in a human's text is where the image stands;
elsewhere it is text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_vlm.data.images import shown
from lit_vlm.data.readers.record import Place, check_slots, make_sample, new_slots, slots_in, type_name
from lit_vlm.types import Message, Role, Sample

_ROLES = {"system": Role.system, "human": Role.user, "gpt": Role.assistant}


def read_llava(row: Mapping[str, Any], place: Place) -> Sample:
    place.need(row, "conversations")
    slots = new_slots()
    turns = place.items(row["conversations"], "conversations")
    messages = [_message(turn, f"conversations[{number}]", slots, place) for number, turn in enumerate(turns)]
    images = place.images(row)
    check_slots(slots_in(messages), len(images), place)
    return make_sample(row, messages, images, place)


def _message(turn: Any, where: str, slots: Iterator[int], place: Place) -> Message:
    if not isinstance(turn, Mapping):
        raise place.fault(f"{where} is {type_name(turn)}; it must be an object with 'from' and 'value'")
    speaker = place.text(turn.get("from"), f"{where}.from")
    if speaker not in _ROLES:
        raise place.fault(f"{where}.from is {shown(speaker)}; it must be 'human', 'gpt' or 'system'")
    text = place.text(turn.get("value"), f"{where}.value")
    role = _ROLES[speaker]
    return Message(role, place.marked(text, slots) if role is Role.user else place.pieces(text))
