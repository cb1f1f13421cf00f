"""What all formats share: a record's place, its texts and images, and the checks that every conversation must pass."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.data.images import REMEDY, BytesImage, FileImage, refuse_url, shown
from lit_vlm.types import (
    IMAGE_TOKEN,
    Content,
    Control,
    ImageSlot,
    ImageSource,
    Kind,
    Language,
    Message,
    RecordError,
    Role,
    Sample,
)

_MARKER = re.compile(rf"\r?\n{IMAGE_TOKEN}|{IMAGE_TOKEN}(?:\r?\n)?")  # one line break beside it belongs to the marker
_HANGUL = re.compile(r"[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Settings:
    """How the records of one source are read."""

    source: str
    format: str
    image_root: Path
    max_pixels: int
    language: Language
    kind: Kind | None  # None: found from the record
    markup: bool


@dataclass(frozen=True, slots=True)
class Place:
    """One record: where a person finds it, and how its source is read."""

    origin: str
    settings: Settings

    def fault(self, reason: str) -> RecordError:
        return RecordError(self.origin, reason, REMEDY)

    def need(self, row: Mapping[str, Any], *keys: str) -> None:
        """RecordError unless the row has all keys; in columns a missing key is a null."""
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            found = [key for key, value in row.items() if value is not None]
            raise self.fault(
                f"missing {_quoted(missing)}; found {_quoted(found)}, "
                f"format={self.settings.format} needs {_quoted(keys)}"
            )

    def items(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fault(f"{where} is {type_name(value)}; it must be a list")
        if not value:
            raise self.fault(f"{where} is empty")
        return value

    def text(self, value: Any, where: str) -> str:
        """The value, which must be text that UTF-8 can write; a tokenizer would fail on a lone surrogate."""
        if not isinstance(value, str):
            raise self.fault(f"{where} is {type_name(value)}; it must be text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = ascii(value[error.start])
            raise self.fault(f"{where} holds {found}, half of a surrogate pair, which is no text") from None
        return value

    def pieces(self, text: str) -> tuple[Content, ...]:
        """Text in NFC, so that one word has one spelling; with markup on, its control tokens apart."""
        text = unicodedata.normalize("NFC", text)
        if not self.settings.markup:
            return (text,) if text else ()
        from lit_vlm.data.markup import parse_markup

        return parse_markup(text)

    def marked(self, text: str, slots: Iterator[int]) -> tuple[Content, ...]:
        """Text in which each '<image>' is the next of the slots."""
        head, *rest = _MARKER.split(text)
        content = self.pieces(head)
        for piece in rest:
            content += (ImageSlot(next(slots)), *self.pieces(piece))
        return content

    def image(self, value: Any) -> ImageSource:
        """A path, a data URL, encoded bytes, or the {bytes, path} of a Hugging Face image column."""
        cap = self.settings.max_pixels
        if isinstance(value, Mapping):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return BytesImage(value, self.origin, cap)
        if not isinstance(value, str):
            raise self.fault(f"an image is {type_name(value)}; it must be a path, encoded bytes or {{bytes, path}}")
        if value.startswith("data:"):
            return BytesImage(self._data_url(value), self.origin, cap)
        refuse_url(value, self.origin)
        return FileImage(value, self.settings.image_root, self.origin, cap)

    def images(self, row: Mapping[str, Any]) -> tuple[ImageSource, ...]:
        """The column `images` or `image`, which may hold a list or one image."""
        columns = [key for key in ("images", "image") if row.get(key) is not None]
        if len(columns) > 1:
            raise self.fault("both 'images' and 'image' are given; one of them must go")
        value = row[columns[0]] if columns else []
        return tuple(self.image(item) for item in (value if isinstance(value, list) else [value]))

    def _data_url(self, url: str) -> bytes:
        head, _, payload = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise self.fault(f"data URL {shown(head, 40)} is not base64")
            return base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            if isinstance(error, RecordError):
                raise
            raise self.fault(f"data URL {shown(head, 40)} is not base64: {error}") from None


def type_name(value: Any) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), f"of type {type(value).__name__}")


def new_slots() -> Iterator[int]:
    """Numbers for the image slots of one record, in the order of the text."""
    return itertools.count()


def record_id(row: Mapping[str, Any], place: Place) -> str:
    """The record's own id, else its position."""
    own = row.get("id")
    if own is None or own == "":
        return place.origin
    return place.text(str(own) if isinstance(own, int | float) else own, "id")


def check_turns(messages: Sequence[Message], place: Place) -> None:
    """RecordError unless user and assistant take turns, a system message before them or not, and no answer is empty."""
    first = 1 if messages[0].role is Role.system else 0
    for number, message in enumerate(messages[first:], first):
        needed = (Role.user, Role.assistant)[(number - first) % 2]
        if message.role is not needed:
            raise place.fault(
                f"message {number + 1} is the {message.role}'s; user and assistant must take turns, user first"
            )
        if message.role is Role.assistant and not message.text.strip():
            raise place.fault(f"message {number + 1}, the assistant's, is empty; it leaves the loss without a token")
    if messages[-1].role is not Role.assistant:
        raise place.fault(f"the last message is the {messages[-1].role}'s; it must be the assistant's")


def check_slots(num_slots: int, num_images: int, place: Place, marker: str = f"'{IMAGE_TOKEN}'") -> None:
    if num_slots != num_images:
        slots, images = _count(num_slots, "image placeholder"), _count(num_images, "image")
        raise place.fault(f"{slots} but {images}; each {marker} needs one")


def slots_in(messages: Sequence[Message]) -> int:
    return sum(isinstance(piece, ImageSlot) for message in messages for piece in message.content)


def found_language(messages: Sequence[Message], settings: Settings) -> Language:
    if settings.language is not Language.auto:
        return settings.language
    return Language.ko if any(_HANGUL.search(message.text) for message in messages) else Language.en


def found_kind(messages: Sequence[Message], num_images: int, settings: Settings) -> Kind:
    """The source's kind, or what images and question tell."""
    asked = [message for message in messages if message.role is Role.user]
    tokens = {piece.token for message in asked for piece in message.content if isinstance(piece, Control)}
    by_token = {"<ocr>": Kind.ocr, "<gro>": Kind.grounding, "<bbox>": Kind.referring}
    if settings.kind is not None:
        return settings.kind
    if num_images == 0:
        return Kind.text
    if num_images > 1:
        return Kind.multi_image
    if not any(message.text.strip() for message in asked):
        return Kind.image_only
    return next((kind for token, kind in by_token.items() if token in tokens), Kind.instruction)


def make_sample(
    row: Mapping[str, Any], messages: Sequence[Message], images: Sequence[ImageSource], place: Place
) -> Sample:
    """A checked conversation as a sample; its image slots are already known to match the images."""
    check_turns(messages, place)
    return Sample(
        id=record_id(row, place),
        source=place.settings.source,
        origin=place.origin,
        kind=found_kind(messages, len(images), place.settings),
        language=found_language(messages, place.settings),
        messages=tuple(messages),
        images=tuple(images),
    )


def _quoted(keys: Sequence[str]) -> str:
    names = [shown(key, 40) for key in keys[:12]]
    return ", ".join(names) + (", ..." if len(keys) > 12 else "") if names else "nothing"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
