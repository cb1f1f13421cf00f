"""Reader of Hugging Face messages: {messages: [{role, content}], images}. A content is text or a list of parts.

An image part `{"type": "image"}` stands for the next of the row's `images`, unless it names its own image (`image`,
`path`, `url`, or OpenAI's `image_url`) or gives the number of one of them (`index`). OpenAI's newer spellings
`input_text`, `output_text` and `input_image` mean the same. Without image parts, '<image>' in a user's text marks the
position of an image, as in ms-swift and LLaMA-Factory. A part `{"type": "control", "token": "<gro>"}` is a control
token, whatever the source's markup setting: it comes from the structure, never from text (`task=prefer` writes such
parts).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.context import RecordContext, describe_type, find_surrogate, is_object
from lit_vlm.data.readers.conversation import check_num_images, make_sample
from lit_vlm.data.readers.unsupported_keys import SYSTEM_KEYS, check_part, check_record, check_turn
from lit_vlm.formatting import format_count
from lit_vlm.types import (
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    ContentPart,
    ControlToken,
    Fault,
    ImagePlaceholder,
    LazyImage,
    Message,
    RecordError,
    Role,
    Sample,
)

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_CONTROL_TYPE = "control"
_PART_TYPES = "'text', 'image', 'image_url' or 'control'"
_IMAGE_KEYS = ("image", "path", "url")  # keys that name the image in a part of type image
_READ_KEYS = frozenset(("id", "image", "images", "messages", *SYSTEM_KEYS))
_TURN_KEYS = frozenset(("role", "content"))
_TEXT_KEYS, _CONTROL_KEYS = frozenset(("type", "text")), frozenset(("type", "token"))
_URL_KEYS, _IMAGE_PART_KEYS = frozenset(("type", "image_url", "detail")), frozenset(("type", "index", *_IMAGE_KEYS))
_ROLES = dict(Role.__members__)

# an image that the part names itself, the index of one of the column `images`, or None: the next one of that column
ImageReference = LazyImage | int | None


def read_messages(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a record of messages; raise a RecordError if it cannot be used."""
    context.require_keys(row, "messages")
    check_record(row, context, _READ_KEYS)
    messages, images = read_turns(row["messages"], context.collect_images(row), context, "messages")
    return make_sample(row, messages, images, context)


def read_turns(
    turns: Any, image_column: Sequence[LazyImage], context: RecordContext, location: str
) -> tuple[tuple[Message, ...], tuple[LazyImage, ...]]:
    """Read the turns as messages, and the record's images in the order of their slots.

    If no image part and no '<image>' gives the position, the images go before the text of the first user message, as in
    TRL's `prepare_multimodal_messages`. This holds for plain texts only.

    Args:
        image_column: the images of the row's own column.
        location: path of the turns within the record, for error messages.
    """
    turns = context.require_list(turns, location)
    has_parts = any(map(_has_image_parts, turns))
    has_markers = not has_parts and not context.settings.marks_are_text
    images: list[ImageReference] = []
    messages = [
        _read_plain_message(turn, images, has_markers, context)
        or _read_message(turn, images, has_markers, context, f"{location}[{number}]")
        for number, turn in enumerate(turns)
    ]
    if image_column and not images and all(isinstance(turn["content"], str) for turn in turns):
        messages, images = _put_images_first(messages, len(image_column)), [None] * len(image_column)
    return tuple(messages), _resolve_images(images, image_column, context, has_parts)


_SPEAKERS = {
    "system": Role.system,
    "human": Role.user,
    "user": Role.user,
    "gpt": Role.assistant,
    "assistant": Role.assistant,
}
_CONVERTED_KEYS = ("from", "value", "role", "content")
_TOOL_ROLES = ("function_call", "function_response", "observation", "function", "tool", "tool_call")


def read_speaker(speaker: Any, location: str, context: RecordContext) -> Role:
    """Read the `from` of a LLaVA or ShareGPT turn."""
    speaker = context.require_text(speaker, location)
    role = _SPEAKERS.get(speaker)
    if role is None:
        found = f"{location} is {format_untrusted(speaker)}"
        if speaker in _TOOL_ROLES:
            raise context.make_error(f"{found}: calls of tools are not read")
        raise context.make_error(f"{found}; it must be 'human', 'gpt' or 'system' ('user' and 'assistant' do too)")
    return role


def convert_turns(turns: Any, location: str, context: RecordContext) -> list[Any]:
    """Convert turns, or one turn, with `from` and `value` to `role` and `content`; others are left as they are."""
    turns = [turns] if is_object(turns) else context.require_list(turns, location)
    return [_convert_turn(turn, f"{location}[{number}]", context) for number, turn in enumerate(turns)]


def _convert_turn(turn: Any, location: str, context: RecordContext) -> Any:
    if not is_object(turn) or turn.get("role") is not None or turn.get("from") is None:
        return turn
    role = read_speaker(turn["from"], f"{location}.from", context)
    rest = {} if len(turn) == 2 else {key: value for key, value in turn.items() if key not in _CONVERTED_KEYS}
    return {**rest, "role": role.value, "content": context.require_text(turn.get("value"), f"{location}.value")}


def place_named_images(turns: list[Any], names: Sequence[str]) -> list[Any]:
    """Replace each name in a user's text by the image part with its number.

    MiniCPM-V's `image` may be an object {"<image_00>": path, ...}, whose names stand in the texts.
    """
    any_name = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"\r?\n({any_name})|({any_name})(?:\r?\n)?")  # one line break next to a name belongs to it

    def place_in_turn(turn: Any) -> Any:
        text = turn.get("content") if isinstance(turn, Mapping) and turn.get("role") == Role.user.value else None
        if not isinstance(text, str) or not pattern.search(text):
            return turn
        parts: list[dict[str, Any]] = []
        position = 0
        for match in pattern.finditer(text):
            parts.append({"type": "text", "text": text[position : match.start()]})
            parts.append({"type": "image", "index": names.index(match[1] or match[2])})
            position = match.end()
        parts.append({"type": "text", "text": text[position:]})
        return {**turn, "content": [part for part in parts if part.get("text") != ""]}

    return [place_in_turn(turn) for turn in turns]


def _has_image_parts(turn: Any) -> bool:
    content = turn.get("content") if is_object(turn) else None
    return (
        not isinstance(content, str)
        and isinstance(content, list)
        and any(isinstance(part, Mapping) and part.get("type") in _IMAGE_TYPES for part in content)
    )


def _resolve_images(
    images: Sequence[ImageReference], image_column: Sequence[LazyImage], context: RecordContext, has_parts: bool
) -> tuple[LazyImage, ...]:
    """Return the image of each slot.

    Raises:
        RecordError: an image of the column is not shown, or slots and images without an index differ in number.
    """
    if not has_parts and len(images) == len(image_column):
        return tuple(image_column)
    indices = [image for image in images if isinstance(image, int)]
    if indices:
        _check_image_indices(indices, images.count(None), len(image_column), context)
        return tuple(image_column[image] if isinstance(image, int) else image for image in images if image is not None)
    if has_parts and image_column and list(images) == list(image_column):
        return tuple(image_column)  # each picture is named twice, in its part and in `images`
    if has_parts and image_column and None not in images:
        reason = f"{format_count(len(image_column), 'image')} in 'images', and each image part already names its own"
        raise context.make_error(f"{reason}; leave one of the two out", Fault.placeholders)
    if has_parts or not images:
        check_num_images(images.count(None), len(image_column), context, "image part without a path")
    elif len(images) != len(image_column):
        slots = format_count(len(images), "image placeholder")
        reason = f"{slots} but {format_count(len(image_column), 'image')}; each '<image>' needs one"
        remedy = f"Fix the record, or say data.sources.{context.settings.source}.marks=text where '<image>' is text"
        raise RecordError(context.origin, reason, remedy, Fault.placeholders)
    remaining = iter(image_column)
    return tuple(next(remaining) if image is None else image for image in images if not isinstance(image, int))


def _check_image_indices(
    indices: Sequence[int], num_without_index: int, num_images: int, context: RecordContext
) -> None:
    if num_without_index:
        reason = f"{format_count(len(indices), 'image part has', 'image parts have')} an index and {num_without_index} without a path has none"
        raise context.make_error(f"{reason}; give all of them one", Fault.placeholders)
    for index in indices:
        if not 0 <= index < num_images:
            reason = f"an image part has the index {index}, and 'images' holds {format_count(num_images, 'image')}"
            raise context.make_error(f"{reason}, counted from 0", Fault.placeholders)
    not_shown = sorted(set(range(num_images)) - set(indices))
    if not_shown:
        reason = f"no image part has the index {not_shown[0]}, so that this one of 'images' would be shown nowhere"
        raise context.make_error(reason, Fault.placeholders)


def _read_plain_message(
    turn: Any, images: list[ImageReference], has_markers: bool, context: RecordContext
) -> Message | None:
    """Read a turn that is a role and a text and nothing else, as nearly all are; None: `_read_message` has to read it."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    name, text = turn.get("role"), turn.get("content")
    if not isinstance(name, str) or not isinstance(text, str) or name not in _ROLES or find_surrogate(text) is not None:
        return None
    if has_markers and name == "user" and IMAGE_TOKEN in text:
        return Message(Role.user, context.parse_text_with_images(text, _append_slots(images)))
    return Message(_ROLES[name], context.parse_text(text))


def _read_message(
    turn: Any, images: list[ImageReference], has_markers: bool, context: RecordContext, location: str
) -> Message:
    if not is_object(turn):
        raise context.make_error(f"{location} is {describe_type(turn)}; it must be an object with 'role' and 'content'")
    role = _ROLES.get(context.require_text(turn.get("role"), f"{location}.role"))
    if role is None:
        raise context.make_error(
            f"{location}.role is {format_untrusted(turn['role'])}; it must be 'system', 'user' or 'assistant'"
        )
    trained = check_turn(turn, role, context, location, _TURN_KEYS)
    slots = _append_slots(images) if has_markers and role is Role.user else None
    content, location = turn.get("content"), f"{location}.content"
    if not isinstance(content, list):
        return Message(role, _parse_text(context.require_text(content, location), slots, context), trained)
    pieces: tuple[ContentPart, ...] = ()
    for number, part in enumerate(content):
        pieces += _read_part(part, role, images, slots, context, f"{location}[{number}]")
    return Message(role, pieces, trained)


def _parse_text(text: str, slots: Iterator[int] | None, context: RecordContext) -> tuple[ContentPart, ...]:
    return context.parse_text(text) if slots is None else context.parse_text_with_images(text, slots)


def _append_slots(images: list[ImageReference]) -> Iterator[int]:
    """Append an unnamed slot to `images` on each step, and yield its index."""
    while True:
        images.append(None)
        yield len(images) - 1


def _read_part(
    part: Any,
    role: Role,
    images: list[ImageReference],
    slots: Iterator[int] | None,
    context: RecordContext,
    location: str,
) -> tuple[ContentPart, ...]:
    part_type = part.get("type") if isinstance(part, Mapping) else None
    if part_type in _TEXT_TYPES:
        check_part(part, context, location, _TEXT_KEYS)
        return _parse_text(context.require_text(part.get("text"), f"{location}.text"), slots, context)
    if part_type == _CONTROL_TYPE:
        check_part(part, context, location, _CONTROL_KEYS)
        return (_read_control(part.get("token"), context, location),)
    if part_type not in _IMAGE_TYPES:
        found = f"of type {format_untrusted(part_type, 40)}" if isinstance(part, Mapping) else describe_type(part)
        raise context.make_error(f"{location} is {found}; a part is an object of type {_PART_TYPES}")
    if role is not Role.user:
        raise context.make_error(f"{location} is an image in the {role}'s message; images belong to the user's")
    images.append(_read_image_part(part, context, location))
    return (ImagePlaceholder(len(images) - 1),)


def _read_control(token: Any, context: RecordContext, location: str) -> ControlToken:
    if token not in SPECIAL_TOKENS:
        raise context.make_error(
            f"{location}.token is {format_untrusted(token, 40)}; it must be one of {', '.join(SPECIAL_TOKENS)}"
        )
    return ControlToken(token)


def _read_image_part(part: Mapping[str, Any], context: RecordContext, location: str) -> ImageReference:
    """Read which image a part names. In columnar files the keys that other parts use are nulls."""
    if part["type"] != "image":
        check_part(part, context, location, _URL_KEYS)
        value = part.get("image_url")
        value = value.get("url") if isinstance(value, Mapping) else value
        if value is None:
            raise context.make_error(f"{location} has no image_url.url")
        return context.make_image(value)
    check_part(part, context, location, _IMAGE_PART_KEYS)
    given_keys = [key for key in (*_IMAGE_KEYS, "index") if part.get(key) is not None]
    if len(given_keys) > 1:
        raise context.make_error(f"{location} has both {given_keys[0]!r} and {given_keys[1]!r}; one of them must go")
    if not given_keys:
        return None
    value = part[given_keys[0]]
    if given_keys[0] != "index":
        return context.make_image(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise context.make_error(
            f"{location}.index is {format_untrusted(value, 40)}; it must be the number of one of 'images', from 0"
        )
    return value


def _put_images_first(messages: list[Message], num_images: int) -> list[Message]:
    for number, message in enumerate(messages):
        if message.role is Role.user:
            slots = tuple(map(ImagePlaceholder, range(num_images)))
            with_images = Message(Role.user, slots + message.content, message.supervised)
            return [*messages[:number], with_images, *messages[number + 1 :]]
    return messages  # `check_turns` refuses the roles later, with its own message
