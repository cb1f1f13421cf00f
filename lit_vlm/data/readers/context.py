"""Context of one record (origin and reader settings), with the helpers for texts and images that all formats share."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_vlm.data.lazy_images import REMEDY, BytesImage, FileImage, format_untrusted, validate_image_path
from lit_vlm.data.staging import resolve_original_path
from lit_vlm.types import (
    IMAGE_TOKEN,
    ContentPart,
    Fault,
    ImagePlaceholder,
    Language,
    LazyImage,
    RecordError,
    SampleKind,
    escape_control_characters,
)

_MAX_KEY_CHARS = 60  # characters of a key in the counts of unread keys
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
# Placeholder marks that stand for something else in other formats -> the thing they stand for.
_MARK_PATTERNS = {
    r"<image>|<image[ _]?\d+>|<\|image(?:_\d+)?\|>|<image_placeholder>|<ImageHere>|<start_of_image>": "a picture",
    r"<\|(?:image|vision|media)_(?:pad|start|end|bos|eos|soft_token)\|>|<image_soft_token>|<IMG_CONTEXT>": "a picture",
    r"<\|(?:begin|end)_of_image\|>|<im_patch>|<fake_token_around_image>|<img>[^<>\n]*</img>": "a picture",
    r"<video>|<video[ _]?\d+>|<\|video(?:_\w+)?\|>|<VID_CONTEXT>": "a video",
    r"<audio>|<audio[ _]?\d+>|<\|audio(?:_\w+)?\|>|<\|AUDIO\|>|<\|audio_(?:bos|eos)\|>": "a sound",
    r"<ref-object>|<\|object_ref_(?:start|end)\|>|<\|/?(?:ref|grounding)\|>": "an object",
    r"<bbox>(?!\s*-?[\d.])|<\|(?:box|quad|point)_(?:start|end)\|>|<(?:box|quad)>\s*[\[(<]*\s*\d|<loc_?\d+>|<\|/?det\|>": "a box",
}
_ANY_MARK = re.compile("|".join(f"({marks})" for marks in _MARK_PATTERNS))


# Keys that hold the image in rows of tables and image folders, if there is no `image` and no `images`: those of Hugging
# Face's imagefolder, of usual CSV files, and of img2dataset's parquet (the bytes, named by the image format).
IMAGE_KEYS = (
    *("file_name", "file_names", "image_path", "image_file", "img_path", "img", "filepath", "file_path", "filename"),
    *("path", "jpg", "png", "webp"),
)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff")
_IMAGE_COLUMNS = {prefix: (f"{prefix}images", f"{prefix}image") for prefix in ("", "rejected_")}
_ADDED_SETTINGS = ("more_image_roots", "columns")  # at their defaults they are no part of a digest


@dataclass(frozen=True, slots=True)
class ReaderSettings:
    """Settings for reading the records of one source."""

    source: str
    format: str
    image_root: Path
    max_pixels: int
    language: Language
    kind: SampleKind | None  # None: inferred from the record
    markup: bool
    max_tiles: int | None = None
    prompts: tuple[str, ...] = ()  # questions for images without one
    split: str | None = None  # the split that its records may name; None: any
    counts_markup: bool = False  # count texts that look like markup: the source's markup setting is auto
    marks_are_text: bool = False  # placeholder marks of other formats are plain text; no record is refused for them
    more_image_roots: tuple[Path, ...] = ()  # further folders of images, after `image_root`
    columns: tuple[tuple[str, str], ...] = ()  # (key of a known format, column that holds it) of data.sources.x.columns

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide how a row is read, for a digest. The source's name does not.

        A setting that was added later is left out at its default, so that indexes made before stay valid.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "source"}
        values["image_root"] = resolve_original_path(self.image_root)
        values["more_image_roots"] = tuple(map(resolve_original_path, self.more_image_roots))
        return {key: value for key, value in values.items() if value or key not in _ADDED_SETTINGS}


class EmbeddedImage:
    """Base class of an image that is a part of an archive; a row carries it instead of a path."""

    __slots__ = ()

    def make_image(self, origin: str, max_pixels: int) -> LazyImage:
        """Make the image source of this member; nothing is decoded yet."""
        raise NotImplementedError


@dataclass(slots=True)
class RecordContext:
    """Context of one record: its origin, for error messages, and the settings of its source."""

    origin: str
    settings: ReaderSettings
    normalised: bool = False  # NFC changed one of the texts read so far
    unread: dict[str, None] = field(default_factory=dict)  # keys that the reader does not use, in their order

    def mark_unread(self, what: str) -> None:
        """Mark a key or a part of the record as unread. It does not change what is trained; it is counted."""
        what = escape_control_characters(what)
        self.unread[what if len(what) <= _MAX_KEY_CHARS else f"{what[:_MAX_KEY_CHARS]}..."] = None

    def make_error(self, reason: str, fault: Fault = Fault.malformed) -> RecordError:
        """Make the RecordError of this record, for the caller to raise."""
        return RecordError(self.origin, reason, REMEDY, fault)

    def require_keys(self, row: Mapping[str, Any], *keys: str) -> None:
        """Raise a RecordError unless the row has all keys. In columnar files a missing key is a null."""
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            found = [key for key, value in row.items() if value is not None]
            raise self.make_error(
                f"missing {_format_keys(missing)}; found {_format_keys(found)}, "
                f"format={self.settings.format} needs {_format_keys(keys)}"
            )

    def require_list(self, value: Any, location: str) -> list[Any]:
        """Return the value, which must be a list with at least one item, or raise a RecordError."""
        if not isinstance(value, list):
            raise self.make_error(f"{location} is {describe_type(value)}; it must be a list")
        if not value:
            raise self.make_error(f"{location} is empty")
        return value

    def require_text(self, value: Any, location: str) -> str:
        """Return the value, which must be text that UTF-8 can encode, or raise a RecordError.

        A tokenizer would fail on a lone surrogate.
        """
        if not isinstance(value, str):
            raise self.make_error(f"{location} is {describe_type(value)}; it must be text")
        if (place := find_surrogate(value)) is not None:
            found = ascii(value[place])
            raise self.make_error(f"{location} holds {found}, half of a surrogate pair, which is no text")
        return value

    def parse_text(self, text: str) -> tuple[ContentPart, ...]:
        """Parse a text into content pieces: NFC text, and with `markup` also control tokens.

        NFC gives each word one spelling.

        Raises:
            RecordError: the text holds a placeholder mark of another format, and `marks_are_text` is off.
        """
        if "<" in text and not self.settings.marks_are_text and (mark := find_mark(text)):
            mark_text, meaning = mark
            raise RecordError(
                self.origin,
                f"{format_untrusted(mark_text, 40)} in a text stands for {meaning} in other forms, and nothing stands there in this one",
                f"Take it out, or say data.sources.{self.settings.source}.marks=text where such words are text",
                Fault.placeholders,
            )
        if not text.isascii() and not unicodedata.is_normalized("NFC", text):
            text, self.normalised = unicodedata.normalize("NFC", text), True
        if not self.settings.markup:
            if self.settings.counts_markup and "</bbox>" in text:
                self.mark_unread("boxes written in texts, which markup=on would read")
            return (text,) if text else ()
        from lit_vlm.data.markup import parse_markup

        return parse_markup(text)

    def parse_text_with_images(self, text: str, slots: Iterator[int]) -> tuple[ContentPart, ...]:
        """Parse a text in which each '<image>' becomes an `ImageSlot` with the next index of `slots`."""
        if IMAGE_TOKEN not in text:
            return self.parse_text(text)
        head, *rest = split_at_markers(text)
        content = self.parse_text(head) if head else ()
        for piece in rest:
            content += (ImagePlaceholder(next(slots)), *(self.parse_text(piece) if piece else ()))
        return content

    def make_image(self, value: Any) -> LazyImage:
        """Make an image source of a value of the record.

        The value is a path, a data URL, encoded bytes, the {bytes, path} of a Hugging Face image column, or an
        `EmbeddedImage` of an archive. Nothing is decoded yet.
        """
        max_pixels = self.settings.max_pixels
        if not isinstance(value, str) and isinstance(value, Mapping):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return BytesImage(value, self.origin, max_pixels)
        if isinstance(value, str):
            if value.startswith("data:"):
                return BytesImage(self._decode_data_url(value), self.origin, max_pixels)
            validate_image_path(value, self.origin)
            settings = self.settings
            return FileImage(value, settings.image_root, self.origin, max_pixels, settings.more_image_roots)
        if isinstance(value, EmbeddedImage):
            return value.make_image(self.origin, max_pixels)
        raise self.make_error(
            f"an image is {describe_type(value)}; it must be a path, encoded bytes or {{bytes, path}}"
        )

    def collect_images(
        self, row: Mapping[str, Any], prefix: str = "", other_keys: Sequence[str] = ()
    ) -> tuple[LazyImage, ...]:
        """Return the images of the column `images` or `image`, which holds a list or one image.

        Args:
            prefix: goes before the column's name: empty, or `rejected_`.
            other_keys: columns that may hold the images instead, as `find_image_keys` returns them.
        """
        columns = [key for key in _IMAGE_COLUMNS[prefix] if row.get(key) is not None] or list(other_keys)
        if len(columns) > 1:
            remedy = f"or say which with data.sources.{self.settings.source}.columns.image" if other_keys else ""
            must_go = f"both '{columns[0]}' and '{columns[1]}' are given; one of them must go"
            raise self.make_error(f"{must_go}, {remedy}" if remedy else must_go)
        if not columns:
            return ()
        value = row[columns[0]]
        return tuple(map(self.make_image, value)) if isinstance(value, list) else (self.make_image(value),)

    def _decode_data_url(self, url: str) -> bytes:
        head, _, payload = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise self.make_error(f"data URL {format_untrusted(head, 40)} is not base64")
            return base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            if isinstance(error, RecordError):
                raise
            raise self.make_error(f"data URL {format_untrusted(head, 40)} is not base64: {error}") from None


def find_image_keys(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the columns that hold images in a row without `image` and `images`.

    A text counts only if it ends like the name of an image file.
    """
    if row.get("image") is not None or row.get("images") is not None:
        return ()
    return tuple(key for key in IMAGE_KEYS if row.get(key) is not None and _is_image_value(row[key]))


def _is_image_value(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_image_value, value))
    if isinstance(value, str):
        return value.lower().endswith(_IMAGE_SUFFIXES)
    return isinstance(value, bytes | EmbeddedImage) or (
        isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path") is not None)
    )


def is_object(value: Any) -> bool:
    """Return True for an object of the record. The type is compared first: it is nearly always dict, and ABCs are slow."""
    return type(value) is dict or isinstance(value, Mapping)


def find_surrogate(text: str) -> int | None:
    """Find the place of the first half of a surrogate pair, which UTF-8 cannot encode; None: there is none."""
    if text.isascii():  # a flag of the string: nothing is searched
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def split_at_markers(text: str) -> list[str]:
    """Split a text at each '<image>'. One line break before the marker belongs to it, or else one behind it."""
    head, *rest = text.split(IMAGE_TOKEN)
    pieces = [head]
    for piece in rest:
        before = pieces[-1]
        if before.endswith("\n"):
            pieces[-1] = before[: -2 if before.endswith("\r\n") else -1]
        elif piece.startswith(("\n", "\r\n")):
            piece = piece[2 if piece.startswith("\r") else 1 :]
        pieces.append(piece)
    return pieces


def describe_type(value: Any) -> str:
    """Describe a value's type in the words of JSON: "an object", "a list", "null"."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), f"of type {type(value).__name__}")


def iter_slot_indices() -> Iterator[int]:
    """Return an iterator of indices for the image slots of one record, in the order of the text: 0, 1, 2, ..."""
    return itertools.count()


def _format_keys(keys: Sequence[str]) -> str:
    names = [format_untrusted(key, 40) for key in keys[:12]]
    return ", ".join(names) + (", ..." if len(keys) > 12 else "") if names else "nothing"


def find_mark(text: str) -> tuple[str, str] | None:
    """Find the first placeholder mark of another format in a text.

    Returns:
        The mark and the thing it stands for, e.g. ("<|image|>", "a picture"); None if there is no mark.
    """
    position = text.find("<")  # every mark begins with it, so a text without one costs nothing
    while position >= 0:
        match = _ANY_MARK.match(text, position)
        if match is not None and match.lastindex is not None:
            return match[0], list(_MARK_PATTERNS.values())[match.lastindex - 1]
        position = text.find("<", position + 1)
    return None
