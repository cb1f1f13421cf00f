"""Reader of Hugging Face messages: {messages: [{role, content}], images}. A content is text or a list of parts.

An image part `{"type": "image"}` stands for the next of the row's `images`, unless it names its own image (`image`,
`path`, `url`, or OpenAI's `image_url`) or gives the number of one of them (`index`). OpenAI's newer spellings
`input_text`, `output_text` and `input_image` mean the same. Without image parts, '<image>' in a user's text marks the
position of an image, as in ms-swift and LLaMA-Factory. A part `{"type": "control", "token": "<gro>"}` is a control
token, whatever the source's markup setting: it comes from the structure, never from text (`task=prefer` writes such
parts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_vlm.data.images import shown
from lit_vlm.data.readers.dialects import SYSTEM, check_part, check_record, check_turn
from lit_vlm.data.readers.place import Place, type_name
from lit_vlm.data.readers.record import check_slots, make_sample
from lit_vlm.types import (
    SPECIAL_TOKENS,
    Content,
    Control,
    Fault,
    ImageSlot,
    ImageSource,
    Message,
    RecordError,
    Role,
    Sample,
    counted,
)

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_CONTROL = "control"
_PART_TYPES = "'text', 'image', 'image_url' or 'control'"
_NAMES = ("image", "path", "url")  # keys that name the image in a part of type image
_READ = ("id", "image", "images", "messages", *SYSTEM)

# an image that the part names itself, the index of one of the column `images`, or None: the next one of that column
Named = ImageSource | int | None


def read_messages(row: Mapping[str, Any], place: Place) -> Sample:
    """Read a record of messages; raise a RecordError if it cannot be used."""
    place.need(row, "messages")
    check_record(row, place, _READ)
    messages, images = read_turns(row["messages"], place.images(row), place, "messages")
    return make_sample(row, messages, images, place)


def read_turns(
    turns: Any, column: Sequence[ImageSource], place: Place, where: str
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """Read the turns as messages, and the record's images in the order of their slots.

    If no image part and no '<image>' gives the position, the images go before the text of the first user message, as in
    TRL's `prepare_multimodal_messages`. This holds for plain texts only.

    Args:
        image_column: the images of the row's own column.
        location: path of the turns within the record, for error messages.
    """
    turns = place.items(turns, where)
    has_parts = any(map(_shows_images, turns))
    has_markers = not has_parts and not place.settings.marks_are_text
    images: list[Named] = []
    messages = [_message(turn, images, has_markers, place, f"{where}[{number}]") for number, turn in enumerate(turns)]
    if column and not images and all(isinstance(turn["content"], str) for turn in turns):
        messages, images = _images_first(messages, len(column)), [None] * len(column)
    return tuple(messages), _resolve_images(images, column, place, has_parts)


def _shows_images(turn: Any) -> bool:
    content = turn.get("content") if isinstance(turn, Mapping) else None
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") in _IMAGES for part in content
    )


def _resolve_images(
    images: Sequence[Named], column: Sequence[ImageSource], place: Place, has_parts: bool
) -> tuple[ImageSource, ...]:
    """Return the image of each slot.

    Raises:
        RecordError: an image of the column is not shown, or slots and images without an index differ in number.
    """
    indices = [image for image in images if isinstance(image, int)]
    if indices:
        _check_numbers(indices, images.count(None), len(column), place)
        return tuple(column[image] if isinstance(image, int) else image for image in images if image is not None)
    if has_parts and column and None not in images:
        reason = f"{counted(len(column), 'image')} in 'images', and each image part already names its own"
        raise place.fault(f"{reason}; leave one of the two out", Fault.placeholders)
    if has_parts or not images:
        check_slots(images.count(None), len(column), place, "image part without a path")
    elif len(images) != len(column):
        slots = counted(len(images), "image placeholder")
        reason = f"{slots} but {counted(len(column), 'image')}; each '<image>' needs one"
        remedy = f"Fix the record, or say data.sources.{place.settings.source}.marks=text where '<image>' is text"
        raise RecordError(place.origin, reason, remedy, Fault.placeholders)
    remaining = iter(column)
    return tuple(next(remaining) if image is None else image for image in images if not isinstance(image, int))


def _check_numbers(numbers: Sequence[int], num_without: int, num_images: int, place: Place) -> None:
    if num_without:
        reason = f"{counted(len(numbers), 'image part has', 'image parts have')} an index and {num_without} without a path has none"
        raise place.fault(f"{reason}; give all of them one", Fault.placeholders)
    for index in numbers:
        if not 0 <= index < num_images:
            reason = f"an image part has the index {index}, and 'images' holds {counted(num_images, 'image')}"
            raise place.fault(f"{reason}, counted from 0", Fault.placeholders)
    not_shown = sorted(set(range(num_images)) - set(numbers))
    if not_shown:
        reason = f"no image part has the index {not_shown[0]}, so that this one of 'images' would be shown nowhere"
        raise place.fault(reason, Fault.placeholders)


def _message(turn: Any, images: list[Named], marked: bool, place: Place, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise place.fault(f"{where} is {type_name(turn)}; it must be an object with 'role' and 'content'")
    role_name = place.text(turn.get("role"), f"{where}.role")
    if role_name not in Role.__members__:
        raise place.fault(f"{where}.role is {shown(role_name)}; it must be 'system', 'user' or 'assistant'")
    role = Role(role_name)
    trained = check_turn(turn, role, place, where, ("role", "content"))
    slots = _next_slots(images) if marked and role is Role.user else None
    content, where = turn.get("content"), f"{where}.content"
    if not isinstance(content, list):
        return Message(role, _words(place.text(content, where), slots, place), trained)
    pieces: tuple[Content, ...] = ()
    for number, part in enumerate(content):
        pieces += _part(part, role, images, slots, place, f"{where}[{number}]")
    return Message(role, pieces, trained)


def _words(text: str, slots: Iterator[int] | None, place: Place) -> tuple[Content, ...]:
    return place.pieces(text) if slots is None else place.marked(text, slots)


def _next_slots(images: list[Named]) -> Iterator[int]:
    """Append an unnamed slot to `images` on each step, and yield its index."""
    while True:
        images.append(None)
        yield len(images) - 1


def _part(
    part: Any, role: Role, images: list[Named], slots: Iterator[int] | None, place: Place, where: str
) -> tuple[Content, ...]:
    part_type = part.get("type") if isinstance(part, Mapping) else None
    if part_type in _TEXTS:
        check_part(part, place, where, ("type", "text"))
        return _words(place.text(part.get("text"), f"{where}.text"), slots, place)
    if part_type == _CONTROL:
        check_part(part, place, where, ("type", "token"))
        return (_control(part.get("token"), place, where),)
    if part_type not in _IMAGES:
        found = f"of type {shown(part_type, 40)}" if isinstance(part, Mapping) else type_name(part)
        raise place.fault(f"{where} is {found}; a part is an object of type {_PART_TYPES}")
    if role is not Role.user:
        raise place.fault(f"{where} is an image in the {role}'s message; images belong to the user's")
    images.append(_named_image(part, place, where))
    return (ImageSlot(len(images) - 1),)


def _control(token: Any, place: Place, where: str) -> Control:
    if token not in SPECIAL_TOKENS:
        raise place.fault(f"{where}.token is {shown(token, 40)}; it must be one of {', '.join(SPECIAL_TOKENS)}")
    return Control(token)


def _named_image(part: Mapping[str, Any], place: Place, where: str) -> Named:
    """Read which image a part names. In columnar files the keys that other parts use are nulls."""
    if part["type"] != "image":
        check_part(part, place, where, ("type", "image_url", "detail"))
        value = part.get("image_url")
        value = value.get("url") if isinstance(value, Mapping) else value
        if value is None:
            raise place.fault(f"{where} has no image_url.url")
        return place.image(value)
    check_part(part, place, where, ("type", "index", *_NAMES))
    given_keys = [key for key in (*_NAMES, "index") if part.get(key) is not None]
    if len(given_keys) > 1:
        raise place.fault(f"{where} has both {given_keys[0]!r} and {given_keys[1]!r}; one of them must go")
    if not given_keys:
        return None
    value = part[given_keys[0]]
    if given_keys[0] != "index":
        return place.image(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.fault(f"{where}.index is {shown(value, 40)}; it must be the number of one of 'images', from 0")
    return value


def _images_first(messages: list[Message], num_images: int) -> list[Message]:
    first = next((number for number, message in enumerate(messages) if message.role is Role.user), None)
    if first is None:  # `check_turns` refuses the roles later, with its own message
        return messages
    slots = tuple(ImageSlot(index) for index in range(num_images))
    with_images = Message(Role.user, slots + messages[first].content, messages[first].trained)
    return [*messages[:first], with_images, *messages[first + 1 :]]
