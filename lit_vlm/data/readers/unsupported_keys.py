"""Keys of other trainers' formats that change what is trained.

They were collected from ms-swift, LLaMA-Factory, axolotl, TRL, OpenAI's fine-tuning, and from the data of LLaVA, Qwen-VL,
InternVL and MiniCPM-V. A reader uses such a key, or the record is refused with an error that names the key. All other
unused keys are counted (`RecordContext.unread`). docs/formats.md has the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cache
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.context import RecordContext, is_object
from lit_vlm.data.readers.splits import is_same_split, normalize_split
from lit_vlm.types import RecordError, Role

_TOOLS_REASON = "calls of tools are not read"
_PREFERENCE_REASON = (
    "it makes the record a preference pair, which is read from prompt, chosen and rejected (format=preference)"
)
_REASONING_REASON = "thoughts beside an answer are not read; write them into the answer, or take them out"
_TOKEN_MASK_REASON = "the tokens to train on are chosen by the chat template; masks and token ids are not read"
_TURN_IMAGES_REASON = "pictures are read from the record's 'images' and from image parts of the content"

# Keys of a record with which other trainers train differently -> reason to refuse a record in which they are not empty.
_REFUSED_RECORD_KEYS = {
    **dict.fromkeys(("tools", "functions", "function_call", "function_calls", "tool_calls"), _TOOLS_REASON),
    **dict.fromkeys(("videos", "video"), "video is not read"),
    **dict.fromkeys(("audios", "audio"), "sound is not read"),
    "objects": "its boxes (ms-swift) are not read; write them as <obj> and <bbox>, or use format=mapped",
    **dict.fromkeys(("rejected_response", "rejected_messages", "rejected_answer"), _PREFERENCE_REASON),
    **dict.fromkeys(("chosen", "rejected", "chosen_response"), _PREFERENCE_REASON),
    **dict.fromkeys(("rejected_images", "rejected_image"), _PREFERENCE_REASON),
    **dict.fromkeys(("positive_messages", "negative_messages"), "lists of other conversations are not read"),
    "history": "earlier turns are read from the conversation itself; put them there",
    "reasoning_content": _REASONING_REASON,
    "chat_template_kwargs": "settings of the chat template are not read from records",
    **dict.fromkeys(
        ("input_ids", "attention_mask", "loss_mask", "assistant_masks", "completion_mask"), _TOKEN_MASK_REASON
    ),
}
# The same for keys of a turn, apart from its role and its text.
_REFUSED_TURN_KEYS = {
    **dict.fromkeys(("tool_calls", "tool_call", "function_call", "tool_call_id", "tools"), _TOOLS_REASON),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING_REASON),
    **dict.fromkeys(("images", "image", "image_url"), _TURN_IMAGES_REASON),
    **dict.fromkeys(("videos", "video"), "video is not read"),
    **dict.fromkeys(("audios", "audio"), "sound is not read"),
    "objects": _REFUSED_RECORD_KEYS["objects"],
    **dict.fromkeys(
        ("train_detail", "training_detail", "mask", "loss_mask", "input_ids", "labels"), _TOKEN_MASK_REASON
    ),
    "prefix": "the beginning of an answer is not read",
}
# Keys that switch the loss of a turn on or off: ms-swift's `loss`, OpenAI's `weight`, axolotl's `train` and `training`.
_LOSS_KEYS = ("loss", "weight", "train", "training", "loss_scale", "loss_weight")
# Keys of token masks: lists with a number for each token that switch its loss on or off.
_TOKEN_MASK_KEYS = ("labels", "mask", "loss_mask", "loss_weights", "prompt_mask", "token_weights")
# Keys that would give a part a second content, besides the one that its type names.
_CONTENT_KEYS = ("text", "image", "path", "url", "image_url", "bytes", "data", "base64", "source", "file_id")
SYSTEM_KEYS = ("system", "system_prompt")


@cache
def unite_keys(*groups: Collection[str]) -> frozenset[str]:
    """Return the union of the groups. A reader has few different ones, so each is made once and not for each record."""
    return frozenset().union(*groups)


def check_record(row: Mapping[str, Any], context: RecordContext, read_keys: AbstractSet[str]) -> None:
    """Check the keys that the reader does not use: refuse those that change what is trained, count all others.

    A record may declare itself that marks in its texts are text, with `"marks": "text"`, as those of `task=prefer` do.

    Args:
        read_keys: the keys that the reader uses.

    Raises:
        RecordError: names the refused key.
    """
    if row.keys() <= read_keys:
        return
    if row.get("marks") == "text":
        context.settings, read_keys = replace(context.settings, marks_are_text=True), {*read_keys, "marks"}
    for key in [key for key in row if key not in read_keys and not _is_empty(row[key])]:
        value = row[key]
        if key in _REFUSED_RECORD_KEYS and value is not False and not _is_harmless(key, value):
            raise context.make_error(f"it has {key!r}: {_REFUSED_RECORD_KEYS[key]}")
        if key in _TOKEN_MASK_KEYS and _is_number_list(value):
            raise context.make_error(f"it has {key!r}, a list of numbers: {_TOKEN_MASK_REASON}")
        if key.lower() in _LOSS_KEYS and not _is_one(value):
            raise context.make_error(
                f"{key!r} is {format_untrusted(value, 40)}: a record counts once; repeat it, or take the key out"
            )
        if key == "kto_tag" or (key == "label" and isinstance(value, bool)):
            raise context.make_error(
                f"{key!r} is {format_untrusted(value, 40)}: answers that are judged one by one (KTO) are not read"
            )
        if key.lower() == "split" or (key.lower() == "phase" and isinstance(value, str)):
            _check_split(key, value, context)
        context.mark_unread(key)


def check_turn(
    turn: Mapping[str, Any], role: Role, context: RecordContext, location: str, read_keys: AbstractSet[str]
) -> bool:
    """Check a turn's keys as `check_record` does, and return whether they let the turn count in the loss."""
    if turn.keys() <= read_keys:
        return True
    trained = True
    for key in [key for key in turn if key not in read_keys and not _is_empty(turn[key])]:
        value = turn[key]
        if key.lower() in _LOSS_KEYS:
            trained = _read_loss_flag(value, role, context, f"{location}.{key}") and trained
        elif key in _REFUSED_TURN_KEYS and value is not False:
            raise context.make_error(f"{location} has {key!r}: {_REFUSED_TURN_KEYS[key]}")
        else:
            context.mark_unread(f"{location.partition('[')[0]}[].{key}")
    return trained


def check_part(part: Mapping[str, Any], context: RecordContext, location: str, read_keys: AbstractSet[str]) -> None:
    """Check the unused keys of a content part: raise a RecordError for those that change what is trained."""
    for key in [key for key in part if key not in read_keys and not _is_empty(part[key])]:
        value = part[key]
        if key in _CONTENT_KEYS:
            raise context.make_error(
                f"{location} has {key!r}, which a part of type {format_untrusted(part.get('type'), 40)} has not"
            )
        if key in _REFUSED_TURN_KEYS and value is not False:
            raise context.make_error(f"{location} has {key!r}: {_REFUSED_TURN_KEYS[key]}")
        if key.lower() in _LOSS_KEYS and not _is_one(value):
            raise context.make_error(
                f"{location}.{key} is {format_untrusted(value, 40)}: a turn is trained on as a whole"
            )
        context.mark_unread(f"{location.partition('[')[0]}[].content[].{key}")


def read_system_text(row: Mapping[str, Any], context: RecordContext) -> str | None:
    """Return the text of the record's column `system` or `system_prompt`, as in ShareGPT and ms-swift, or None."""
    if row.keys().isdisjoint(SYSTEM_KEYS):
        return None
    given = [key for key in SYSTEM_KEYS if not (row.get(key) is None or row[key] == "")]
    if len(given) > 1:
        raise context.make_error(f"both {given[0]!r} and {given[1]!r} are given; one of them must go")
    return context.require_text(row[given[0]], given[0]) if given else None


def _check_split(key: str, value: Any, context: RecordContext) -> None:
    wanted = context.settings.split
    if wanted is None:
        return
    if not isinstance(value, str):
        raise context.make_error(f"{key!r} is {format_untrusted(value, 40)}; the name of its split must be text")
    if normalize_split(value) and not is_same_split(value, wanted):
        raise RecordError(
            context.origin,
            f"its {key!r} is {format_untrusted(value, 40)}, and the source is read for {wanted!r}",
            f"Put the records of other splits into a file of their own, or say which are meant: "
            f"data.sources.{context.settings.source}.split={value}",
        )


def _read_loss_flag(value: Any, role: Role, context: RecordContext, location: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise context.make_error(
            f"{location} is {format_untrusted(value, 40)}; a turn is trained on (1, true) or not (0, false)"
        )
    if value and role is not Role.assistant and location.rpartition(".")[2] != "weight":
        raise context.make_error(f"{location} is {value} in the {role}'s message; only the assistant's are trained on")
    return bool(value)


def _is_empty(value: Any) -> bool:
    """Return True if the value holds nothing. In columnar files the keys of other records are nulls, nested ones too."""
    stack = [value]  # no recursion: a record may be nested deeper than Python's stack
    while stack:
        value = stack.pop()
        if is_object(value):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif not (value is None or (isinstance(value, str) and value in ("", "[]", "{}", "null"))):
            return False
    return True


def _is_one(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value == 1


def _is_harmless(key: str, value: Any) -> bool:
    """Return True for `objects` that are plain names (not boxes) and a `history` that is no list (not earlier turns)."""
    if key == "history":
        return not isinstance(value, list)
    return key == "objects" and isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, bool | int | float) for item in value)
