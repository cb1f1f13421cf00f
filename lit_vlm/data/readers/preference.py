"""Reader of preference pairs: TRL's columns prompt, chosen, rejected, images, or LLaVA-NeXT's keys (`image`).

A row may have its own images for the rejected answer, `rejected_images` or `rejected_image`, as many as its prompt
shows. The question is then the same and the image another; often the answer is the same too, and wrong for that image.

TRL: "Dataset formats and types" of its documentation. Each of the three is text or messages; without a prompt, chosen
and rejected are conversations with a common beginning. LLaVA-NeXT: `_get_item` in llava/train/train_dpo.py, whose
`answer` takes no part in the loss. A column `kind` with a name of `types.Kind` gives the kind of each pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lit_vlm.data.readers.dialects import SYSTEM, check_record
from lit_vlm.data.readers.messages import read_turns
from lit_vlm.data.readers.place import Place, new_slots, type_name
from lit_vlm.data.readers.record import (
    check_slots,
    check_turns,
    found_language,
    record_id,
    slots_in,
    with_questions,
    with_system,
)
from lit_vlm.types import Fault, ImageSlot, ImageSource, Kind, Message, PreferencePair, Role, counted

_READ = ("id", "image", "images", "rejected_image", "rejected_images", "prompt", "chosen", "rejected", "kind", *SYSTEM)


def read_preference(row: Mapping[str, Any], place: Place) -> PreferencePair:
    """Read a preference pair; raise a RecordError if it cannot be used."""
    place.need(row, "chosen", "rejected")
    check_record(row, place, _READ)
    for key in ("chosen", "rejected"):
        if isinstance(row[key], Mapping):
            reason = f"{key} is an object with the keys {', '.join(map(repr, row[key]))}"
            raise place.fault(f"{reason}; it must be text or a list of messages")
    image_column = place.images(row)
    if row.get("prompt") is None:
        row = _with_prompt(row, place)
    prompt, images = _prompt(row["prompt"], image_column, place)
    prompt = tuple(with_questions(row, with_system(row, prompt, place), images, place))
    chosen, rejected = _answer(row["chosen"], "chosen", place), _answer(row["rejected"], "rejected", place)
    for answer in (chosen, rejected):
        check_turns((*prompt, answer), place)
    rejected_images = place.images(row, "rejected_")
    if rejected_images and len(rejected_images) != len(images):
        raise place.fault(
            f"{counted(len(rejected_images), 'rejected image')} beside {counted(len(images), 'image')}; the prompt shows as many of each"
        )
    if chosen == rejected and (not rejected_images or _names(row, "") == _names(row, "rejected_")):
        raise place.fault("chosen and rejected are equal; there is nothing to prefer")
    return PreferencePair(
        id=record_id(row, place),
        source=place.settings.source,
        origin=place.origin,
        kind=_kind(row, place),
        language=found_language((*prompt, chosen, rejected), place.settings),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        images=(*images, *rejected_images),
        max_tiles=place.settings.max_tiles,
        normalised=place.normalised,
        rejected_images=bool(rejected_images),
        unread=tuple(place.unread),
    )


def _names(row: Mapping[str, Any], of: str) -> list[Any]:
    value: Any = next((row[key] for key in (f"{of}images", f"{of}image") if row.get(key) is not None), [])
    return value if isinstance(value, list) else [value]


def _kind(row: Mapping[str, Any], place: Place) -> Kind:
    """Return the row's own kind, unless the source's settings give one other than `preference`."""
    if place.settings.kind not in (None, Kind.preference):
        return place.settings.kind
    row_kind = row.get("kind")
    return Kind(row_kind) if isinstance(row_kind, str) and row_kind in Kind.__members__ else Kind.preference


def _with_prompt(row: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Extract the implicit prompt, the common beginning of the two conversations, into a key of its own."""
    if isinstance(row["chosen"], str):
        place.need(row, "prompt", "chosen", "rejected")
    chosen, rejected = place.items(row["chosen"], "chosen"), place.items(row["rejected"], "rejected")
    common = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    # Of equal conversations one answer stays outside of the prompt; the later check then reports that they are equal.
    num_common = min(len(common), len(chosen) - 1, len(rejected) - 1)
    if num_common == 0:
        raise place.fault("missing 'prompt', and chosen and rejected begin with different messages")
    return {**row, "prompt": chosen[:num_common], "chosen": chosen[num_common:], "rejected": rejected[num_common:]}


def _prompt(
    value: Any, column: Sequence[ImageSource], place: Place
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    if isinstance(value, list):
        return read_turns(value, column, place, "prompt")
    content = place.marked(place.text(value, "prompt"), new_slots())
    if len(column) == 1 and not any(isinstance(piece, ImageSlot) for piece in content):
        content = (ImageSlot(0), *content)  # LLaVA-NeXT's prompts have no marker; its loader puts the image first
    prompt = (Message(Role.user, content),)
    check_slots(slots_in(prompt), len(column), place)
    return prompt, tuple(column)


def _answer(value: Any, key: str, place: Place) -> Message:
    if isinstance(value, str):
        return Message(Role.assistant, place.pieces(place.text(value, key)))
    if not isinstance(value, list):
        raise place.fault(f"{key} is {type_name(value)}; it must be text or a list of messages")
    if len(value) != 1:
        raise place.fault(f"{key} has {len(value)} messages after the prompt; it must be one answer")
    answer = read_turns(value, (), place, key)[0][0]
    if not answer.trained:
        raise place.fault(f"{key} says that it is not trained on, and a pair trains on both answers", Fault.no_answer)
    return answer
