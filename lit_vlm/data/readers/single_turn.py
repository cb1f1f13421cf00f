"""Readers of rows whose turns are columns, without a list of messages.

- question_answer: `question`, `answer` (CSV, parquet and the hub's visual question answering).
- alpaca: `instruction`, `input`, `output`, `history`. LLaMA-Factory, data/README.md: instruction and input are joined by a
  line break, and the answers of the history are trained on too.
- query_response: `query`, `response`, `history`. ms-swift, "Custom dataset".
- prompt_completion: TRL, "Dataset formats and types"; each is text or messages, and only the completion is trained on.
- cauldron: `texts` with {user, assistant} (The Cauldron, FineVision), or ms-swift's `conversation` with {human, assistant}.

All become messages of plain text, so `<image>` marks the position of an image, and without it the images come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.context import RecordContext, describe_type, find_image_keys, is_object
from lit_vlm.data.readers.conversation import make_sample
from lit_vlm.data.readers.messages import convert_turns, read_turns
from lit_vlm.data.readers.unsupported_keys import SYSTEM_KEYS, check_record, unite_keys
from lit_vlm.types import Role, Sample

Turn = dict[str, Any]  # {role, content}

_COMMON_KEYS = frozenset(("id", "image", "images", *SYSTEM_KEYS))
# Columns that hold a part of the question -> what they are.
_PARTS_OF_A_QUESTION = {
    **dict.fromkeys(("choices", "options", "candidates"), "the options of a question"),
    **dict.fromkeys(("context", "passage"), "a text to which the question refers"),
}


def read_question_answer(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a row with a question and its answer."""
    context.require_keys(row, "question", "answer")
    for key, what in () if row.keys().isdisjoint(_PARTS_OF_A_QUESTION) else _PARTS_OF_A_QUESTION.items():
        if row.get(key) not in (None, "", [], {}):
            raise context.make_error(f"it has {key!r}, {what}, which is not read; write it into the question")
    answer = _require_one_text(row["answer"], "answer", context)
    turns = [*read_history(row, context), make_turn(Role.user, row["question"], "question", context)]
    turns.append(make_turn(Role.assistant, answer, "answer", context))
    return _read_sample(row, turns, ("question", "answer", "history"), context)


def read_alpaca(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a row of Alpaca's columns."""
    context.require_keys(row, "instruction", "output")
    turns = [*read_alpaca_prompt(row, context), make_turn(Role.assistant, row["output"], "output", context)]
    return _read_sample(row, turns, ("instruction", "input", "output", "history"), context)


def read_query_response(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a row of ms-swift's query and response."""
    context.require_keys(row, "query", "response")
    turns = [*read_history(row, context), make_turn(Role.user, row["query"], "query", context)]
    turns.append(make_turn(Role.assistant, row["response"], "response", context))
    return _read_sample(row, turns, ("query", "response", "history"), context)


def read_prompt_completion(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a row of TRL's prompt and completion. Answers inside of the prompt are context: they are not trained on."""
    context.require_keys(row, "prompt", "completion")
    prompt, completion = row["prompt"], row["completion"]
    prompt = [make_turn(Role.user, prompt, "prompt", context)] if isinstance(prompt, str) else prompt
    turns = [
        {**turn, "loss": False} if is_object(turn) and turn.get("role") == "assistant" else turn
        for turn in convert_turns(prompt, "prompt", context)
    ]
    if isinstance(completion, str):
        turns.append(make_turn(Role.assistant, completion, "completion", context))
    else:
        answers = convert_turns(completion, "completion", context)
        if len(answers) != 1:
            raise context.make_error(f"completion has {len(answers)} messages; it must be one answer")
        turns += answers
    return _read_sample(row, turns, ("prompt", "completion"), context)


def read_cauldron(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a row whose turns are pairs: `texts` of {user, assistant}, or `conversation` of {human, assistant}."""
    key, speaker = ("texts", "user") if row.get("texts") is not None else ("conversation", "human")
    context.require_keys(row, key)
    turns: list[Turn] = []
    for number, pair in enumerate(context.require_list(row[key], key)):
        where = f"{key}[{number}]"
        if not is_object(pair):
            found = describe_type(pair)
            raise context.make_error(f"{where} is {found}; it must be an object with {speaker!r} and 'assistant'")
        for name in (name for name in pair if name not in (speaker, "assistant")):
            context.mark_unread(f"{key}[].{name}")
        turns.append(make_turn(Role.user, pair.get(speaker), f"{where}.{speaker}", context))
        turns.append(make_turn(Role.assistant, pair.get("assistant"), f"{where}.assistant", context))
    return _read_sample(row, turns, (key,), context)


def make_turn(role: Role, text: Any, location: str, context: RecordContext) -> Turn:
    """Make a message of a text; raise a RecordError that names the column if it is none."""
    return {"role": role.value, "content": context.require_text(text, location)}


def read_alpaca_prompt(row: Mapping[str, Any], context: RecordContext) -> list[Turn]:
    """Read history, instruction and input as the turns before the answer."""
    parts = [context.require_text(row["instruction"], "instruction")]
    if row.get("input") not in (None, ""):
        parts.append(context.require_text(row["input"], "input"))
    return [
        *read_history(row, context),
        {"role": Role.user.value, "content": "\n".join(part for part in parts if part)},
    ]


def read_history(row: Mapping[str, Any], context: RecordContext) -> list[Turn]:
    """Read the column `history`, a list of [question, answer], as turns."""
    history = row.get("history")
    if history is None or history in ("", []):
        return []
    turns: list[Turn] = []
    for number, pair in enumerate(context.require_list(history, "history")):
        where = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) else describe_type(pair)
            raise context.make_error(f"{where} is {found}; it must be a list of a question and its answer")
        turns.append(make_turn(Role.user, pair[0], f"{where}[0]", context))
        turns.append(make_turn(Role.assistant, pair[1], f"{where}[1]", context))
    return turns


def _read_sample(
    row: Mapping[str, Any], turns: list[Turn], used_keys: tuple[str, ...], context: RecordContext
) -> Sample:
    image_keys = find_image_keys(row)
    check_record(row, context, unite_keys(_COMMON_KEYS, image_keys, used_keys))
    images = context.collect_images(row, other_keys=image_keys)
    messages, images = read_turns(turns, images, context, used_keys[0])
    return make_sample(row, messages, images, context)


def _require_one_text(value: Any, key: str, context: RecordContext) -> Any:
    """Return the value; of a list of equal texts (answers of several people) the one text."""
    if not isinstance(value, list):
        return value
    texts = list(dict.fromkeys(context.require_text(item, f"{key}[{number}]") for number, item in enumerate(value)))
    if len(texts) != 1:
        found = ", ".join(format_untrusted(text, 20) for text in texts[:3])
        raise context.make_error(f"{key} is a list of {len(texts)} different texts ({found}); it must be one answer")
    return texts[0]
