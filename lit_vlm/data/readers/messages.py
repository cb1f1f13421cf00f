"""Hugging Face's messages: {messages: [{role, content}], images}, a content being text or a list of parts.

An image part `{"type": "image"}` stands for the next of the row's `images`, unless it names an image itself (`image`,
`path`, `url`, or OpenAI's `image_url`). OpenAI's newer spellings `input_text`, `output_text` and `input_image` mean the
same. A literal '<image>' in a text is text. A part `{"type": "control", "token": "<gro>"}` is a control token, whatever
the source's markup: structure says it, and no text can (`task=prefer` writes them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_vlm.data.images import shown
from lit_vlm.data.readers.place import Place, type_name
from lit_vlm.data.readers.record import check_slots, make_sample
from lit_vlm.types import SPECIAL_TOKENS, Content, Control, ImageSlot, ImageSource, Message, Role, Sample

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_CONTROL = "control"
_PART_TYPES = "'text', 'image', 'image_url' or 'control'"


def read_messages(row: Mapping[str, Any], place: Place) -> Sample:
    place.need(row, "messages")
    messages, images = read_turns(row["messages"], place.images(row), place, "messages")
    return make_sample(row, messages, images, place)


def read_turns(
    turns: Any, column: Sequence[ImageSource], place: Place, where: str
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """The messages, and the record's images in the order of their slots.

    Where all contents are plain text, the images go before the first user message, as in TRL's
    `prepare_multimodal_messages`.
    """
    images: list[ImageSource | None] = []  # None: the next of the column
    messages = [
        _message(turn, images, place, f"{where}[{number}]") for number, turn in enumerate(place.items(turns, where))
    ]
    if column and all(isinstance(turn["content"], str) for turn in turns):
        messages, images = _images_first(messages, len(column)), [None] * len(column)
    check_slots(images.count(None), len(column), place, "image part without a path")
    waiting = iter(column)
    return tuple(messages), tuple(next(waiting) if image is None else image for image in images)


def _message(turn: Any, images: list[ImageSource | None], place: Place, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise place.fault(f"{where} is {type_name(turn)}; it must be an object with 'role' and 'content'")
    role = place.text(turn.get("role"), f"{where}.role")
    if role not in Role.__members__:
        raise place.fault(f"{where}.role is {shown(role)}; it must be 'system', 'user' or 'assistant'")
    content, where = turn.get("content"), f"{where}.content"
    if not isinstance(content, list):
        return Message(Role(role), place.pieces(place.text(content, where)))
    pieces: tuple[Content, ...] = ()
    for number, part in enumerate(content):
        pieces += _part(part, Role(role), images, place, f"{where}[{number}]")
    return Message(Role(role), pieces)


def _part(part: Any, role: Role, images: list[ImageSource | None], place: Place, where: str) -> tuple[Content, ...]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXTS:
        return place.pieces(place.text(part.get("text"), f"{where}.text"))
    if kind == _CONTROL:
        return (_control(part.get("token"), place, where),)
    if kind not in _IMAGES:
        found = f"of type {shown(kind, 40)}" if isinstance(part, Mapping) else type_name(part)
        raise place.fault(f"{where} is {found}; a part is an object of type {_PART_TYPES}")
    if role is not Role.user:
        raise place.fault(f"{where} is an image in the {role}'s message; images belong to the user's")
    value = _own_image(part)
    if value is None and kind != "image":
        raise place.fault(f"{where} has no image_url.url")
    images.append(None if value is None else place.image(value))
    return (ImageSlot(len(images) - 1),)


def _control(token: Any, place: Place, where: str) -> Control:
    if token not in SPECIAL_TOKENS:
        raise place.fault(f"{where}.token is {shown(token, 40)}; it must be one of {', '.join(SPECIAL_TOKENS)}")
    return Control(token)


def _own_image(part: Mapping[str, Any]) -> Any:
    if part["type"] != "image":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, Mapping) else value
    # In columns the keys that other parts use are there as nulls.
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)


def _images_first(messages: list[Message], num_images: int) -> list[Message]:
    first = next((number for number, message in enumerate(messages) if message.role is Role.user), None)
    if first is None:  # the roles are refused later, by their own message
        return messages
    slots = tuple(ImageSlot(index) for index in range(num_images))
    with_images = Message(Role.user, slots + messages[first].content)
    return [*messages[:first], with_images, *messages[first + 1 :]]
