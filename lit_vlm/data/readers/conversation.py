"""Checks that every conversation must pass, and its inferred properties: kind, language, the missing question."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lit_vlm.data.lazy_images import FileImage
from lit_vlm.data.readers.context import ReaderSettings, RecordContext, describe_type, iter_slot_indices
from lit_vlm.data.readers.unsupported_keys import read_system_text
from lit_vlm.formatting import format_count
from lit_vlm.types import (
    IMAGE_TOKEN,
    ContentPart,
    ControlToken,
    Fault,
    ImagePlaceholder,
    Language,
    LazyImage,
    Message,
    Role,
    Sample,
    SampleKind,
)

__all__ = ["ReaderSettings", "RecordContext", "describe_type", "iter_slot_indices", "make_sample"]

_TURN_ORDER = (Role.user, Role.assistant)
_HANGUL = re.compile(r"[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")


_KIND_BY_TOKEN = {"<ocr>": SampleKind.ocr, "<gro>": SampleKind.grounding, "<bbox>": SampleKind.referring}


def make_sample(
    row: Mapping[str, Any], messages: Sequence[Message], images: Sequence[LazyImage], context: RecordContext
) -> Sample:
    """Check a conversation and make a `Sample` of it.

    The caller has already checked that the image slots match the images.

    Raises:
        RecordError: the turns are out of order, or no answer is trained on.
    """
    messages = add_system_message(row, messages, context)
    check_turns(messages, context)
    messages, images = keep_first_messages(messages, images, find_last_trained_turn(messages, context))
    completed = add_missing_questions(row, messages, images, context)
    return Sample(
        id=get_record_id(row, context),
        source=context.settings.source,
        origin=context.origin,
        kind=_infer_sample_kind(completed is not messages, completed, len(images), context.settings),
        language=detect_language(completed, context.settings),
        messages=tuple(completed),
        images=tuple(images),
        max_tiles=context.settings.max_tiles,
        nfc_changed=context.normalised,
        unused_keys=tuple(context.unread),
    )


def add_system_message(
    row: Mapping[str, Any], messages: Sequence[Message], context: RecordContext
) -> Sequence[Message]:
    """Return the messages with the text of the record's system column before them, if it has one."""
    text = read_system_text(row, context)
    if text is None:
        return messages
    if messages[0].role is Role.system:
        raise context.make_error("both a 'system' column and a system turn are given; one of them must go")
    return [Message(Role.system, context.parse_text(text)), *messages]


def find_last_trained_turn(messages: Sequence[Message], context: RecordContext) -> int:
    """Return the number of messages up to the last answer that is trained on.

    The messages after it have no part in the loss. They are counted as unread.

    Raises:
        RecordError: no answer is trained on.
    """
    if messages[-1].role is Role.assistant and messages[-1].supervised:
        return len(messages)
    answers = [number for number, message in enumerate(messages, 1) if message.role is Role.assistant]
    trained = [number for number in answers if messages[number - 1].supervised]
    if not trained:
        raise context.make_error(
            "every answer says that it is not trained on; nothing is left for the loss", Fault.no_answer
        )
    if trained[-1] < answers[-1]:
        context.mark_unread("turns behind the last answer that is trained on")
    return trained[-1]


def keep_first_turns(sample: Sample, num_messages: int) -> Sample:
    """Return the sample with its first `num_messages` messages and the images that these show."""
    messages, images = keep_first_messages(sample.messages, sample.images, num_messages)
    return replace(sample, messages=messages, images=images)


def keep_first_messages(
    messages: Sequence[Message], images: Sequence[LazyImage], num_messages: int
) -> tuple[tuple[Message, ...], tuple[LazyImage, ...]]:
    """Return the first `num_messages` messages and the images that these show, with image slots renumbered."""
    if num_messages == len(messages):
        return tuple(messages), tuple(images)
    messages = messages[:num_messages]
    image_indices = sorted(
        {piece.index for message in messages for piece in message.content if isinstance(piece, ImagePlaceholder)}
    )
    new_slot = {old: ImagePlaceholder(new) for new, old in enumerate(image_indices)}
    kept_messages = tuple(
        replace(m, content=tuple(new_slot[p.index] if isinstance(p, ImagePlaceholder) else p for p in m.content))
        for m in messages
    )
    return kept_messages, tuple(images[old] for old in image_indices)


def get_record_id(row: Mapping[str, Any], context: RecordContext) -> str:
    """Return the record's own id, or its position if it has none."""
    value = row.get("id")
    if value is None or value == "":
        return context.origin
    return context.require_text(str(value) if isinstance(value, int | float) else value, "id")


def check_turns(messages: Sequence[Message], context: RecordContext) -> None:
    """Check that user and assistant take turns and that no answer is empty; a system message may come first.

    Raises:
        RecordError: the first message that breaks this.
    """
    first = 1 if messages[0].role is Role.system else 0
    for number, message in enumerate(messages[first:], first):
        expected_role = _TURN_ORDER[(number - first) % 2]
        if message.role is not expected_role:
            raise context.make_error(
                f"message {number + 1} is the {message.role}'s; user and assistant must take turns, user first"
            )
        if expected_role is Role.assistant and not _has_text(message.content):
            reason = f"message {number + 1}, the assistant's, is empty; it leaves the loss without a token"
            raise context.make_error(reason, Fault.no_answer)
    if messages[-1].role is not Role.assistant:
        reason = f"the last message is the {messages[-1].role}'s; it must be the assistant's"
        raise context.make_error(reason, Fault.no_answer)


def check_num_images(num_slots: int, num_images: int, context: RecordContext, marker: str = f"'{IMAGE_TOKEN}'") -> None:
    """Raise a RecordError unless there are as many image placeholders as images."""
    if num_slots != num_images:
        slots, images = format_count(num_slots, "image placeholder"), format_count(num_images, "image")
        raise context.make_error(f"{slots} but {images}; each {marker} needs one", Fault.placeholders)


def count_image_slots(messages: Sequence[Message]) -> int:
    """Return the number of image placeholders in the messages."""
    return sum(isinstance(piece, ImagePlaceholder) for message in messages for piece in message.content)


def add_missing_questions(
    row: Mapping[str, Any], messages: Sequence[Message], images: Sequence[LazyImage], context: RecordContext
) -> Sequence[Message]:
    """Add one of the source's `prompts` to each user message that shows an image and asks nothing.

    The prompt is chosen by a digest of the record's own id, or of its images and answers. So it stays the same when the
    record moves in its file. Returns the same object if nothing is missing.
    """
    prompts = context.settings.prompts
    if not prompts or not images:
        return messages
    without_question = [number for number, message in enumerate(messages) if _is_image_without_question(message)]
    if not without_question:
        return messages
    image_paths = [image.path for image in images if isinstance(image, FileImage)]
    answers = [message.text for message in messages if message.role is Role.assistant]
    seed = repr(row["id"] if row.get("id") is not None else (image_paths, answers))
    digest = hashlib.blake2b(seed.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    question = context.parse_text(prompts[int.from_bytes(digest, "big") % len(prompts)])
    completed = list(messages)
    for number in without_question:
        slots = tuple(piece for piece in completed[number].content if isinstance(piece, ImagePlaceholder))
        completed[number] = replace(completed[number], content=(*slots, *question))
    return completed


def detect_language(messages: Sequence[Message], settings: ReaderSettings) -> Language:
    """Return the source's language; for `auto`, Korean if any message holds Hangul, else English."""
    if settings.language is not Language.auto:
        return settings.language
    for message in messages:
        for piece in message.content:
            if isinstance(piece, str) and not piece.isascii() and _HANGUL.search(piece):
                return Language.ko
    return Language.en


def infer_kind(messages: Sequence[Message], num_images: int, settings: ReaderSettings) -> SampleKind:
    """Return the source's kind; if it has none, infer it from the number of images and the question."""
    if settings.kind is not None:
        return settings.kind
    if num_images == 0:
        return SampleKind.text
    if num_images > 1:
        return SampleKind.multi_image
    pieces = [piece for message in messages if message.role is Role.user for piece in message.content]
    if not _has_text(pieces):
        return SampleKind.image_only
    tokens = {piece.token for piece in pieces if isinstance(piece, ControlToken)}
    return next((kind for token, kind in _KIND_BY_TOKEN.items() if token in tokens), SampleKind.instruction)


def _infer_sample_kind(
    prompted: bool, messages: Sequence[Message], num_images: int, settings: ReaderSettings
) -> SampleKind:
    """Infer the kind; a record whose question came from the source's prompts is a caption."""
    kind = infer_kind(messages, num_images, settings)
    return SampleKind.caption if prompted and settings.kind is None and kind is SampleKind.instruction else kind


def _is_image_without_question(message: Message) -> bool:
    has_image = any(isinstance(piece, ImagePlaceholder) for piece in message.content)
    return message.role is Role.user and has_image and not _has_text(message.content)


def _has_text(content: Sequence[ContentPart]) -> bool:
    """Return True if a content is not blank. A control token is text."""
    for piece in content:
        if isinstance(piece, str):
            if piece and not piece.isspace():
                return True
        elif isinstance(piece, ControlToken):
            return True
    return False
