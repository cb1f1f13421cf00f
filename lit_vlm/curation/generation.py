"""Reading of a model's replies as training turns. A reply is used whole or not at all; the status says why not."""

from __future__ import annotations

import json
import re
import unicodedata
from enum import StrEnum
from typing import Any

from lit_vlm.config.choices import GenerationKind
from lit_vlm.curation.generation_prompts import (
    FIND_MARK,
    MAX_TURNS,
    OWN_TURN_KINDS,
    MarkedTurn,
    choose_question,
    collect_facts,
    mark_turns,
)
from lit_vlm.data.markup import format_box, parse_markup, parse_mentions
from lit_vlm.evaluation.judge import is_refusal_reply, remove_thoughts
from lit_vlm.evaluation.reply_ledger import EndpointReply
from lit_vlm.types import (
    SPECIAL_TOKENS,
    ContentPart,
    ControlToken,
    ImagePlaceholder,
    Language,
    Message,
    Role,
    Sample,
    SampleKind,
)

MIN_SHARES = {
    Language.ko: 0.3,
    Language.en: 0.9,
}  # of a language's letters among all; Korean texts hold more foreign words
_MARKUP = re.compile(r"\[\[\d+\]\]|</?(?:obj|char)>|<bbox>[^<]*(?:<delim>[^<]*)*</bbox>")


class ReplyStatus(StrEnum):
    """Status of a record and kind: its reply is used, or the reason why not."""

    accepted = "accepted"
    unsuitable = "unsuitable"  # not asked: the record does not have what the kind needs
    refused = "refused"  # the model or the endpoint's filter declined
    cut = "cut"  # generate.max_new_tokens ended the reply
    unreadable = "unreadable"  # not the JSON that was asked for
    language = "language"  # another language than the one that was asked for
    boxes = "boxes"  # a box that was not given, or control tokens outside of a mention
    marks = "marks"  # a mark that stands for a picture or a box is lost, repeated or out of place
    numbers = "numbers"  # a number of the old answer is not in the new one
    failed = "failed"  # no reply, after all retries


class ReplyError(Exception):
    """Error of a reply that is not used."""

    def __init__(self, status: ReplyStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def make_messages(
    reply: EndpointReply, sample: Sample, kind: GenerationKind, language: Language
) -> tuple[SampleKind, tuple[Message, ...]]:
    """Make the turns of a new sample from a reply, with the kind of the sample.

    Raises:
        ReplyError: the reply is not used.
    """
    if is_refusal_reply(reply):
        raise ReplyError(ReplyStatus.refused, " ".join(reply.text.split()))
    values = _parse_json(reply)
    if kind in OWN_TURN_KINDS:
        return _rewrite_turns(values, sample, kind, language)
    turns = _read_turns(values, sample, kind, language)
    _require_language(" ".join(text for turn in turns for text in turn), language)
    boxes = collect_facts(sample).boxes
    messages: list[Message] = []
    for question, answer in turns:
        start: list[ContentPart] = [] if messages else [ImagePlaceholder(0)]
        content = _convert_answer(answer, boxes)
        if any(isinstance(part, ControlToken) for part in content):
            start += [ControlToken("<gro>"), "\n"]  # the question asks for boxes, in VARCO's form
        messages.append(Message(Role.user, (*start, *_require_plain(question))))
        messages.append(Message(Role.assistant, content))
    has_boxes = any(isinstance(part, ControlToken) for message in messages for part in message.content)
    plain_kind = SampleKind.instruction if kind in _QUESTION_KINDS else SampleKind.caption
    return SampleKind.grounding if has_boxes else plain_kind, tuple(messages)


_QUESTION_KINDS = (GenerationKind.conversation, GenerationKind.reasoning)


def _parse_json(reply: EndpointReply) -> dict[str, Any]:
    """Parse the JSON object of a reply, also inside a code block or after thoughts."""
    text = remove_thoughts(reply.text)
    try:
        value = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        status = ReplyStatus.cut if reply.finish_reason == "length" else ReplyStatus.unreadable
        raise ReplyError(status, " ".join(text.split())) from None
    return value  # an object: its text begins with a brace


def _read_turns(
    values: dict[str, Any], sample: Sample, kind: GenerationKind, language: Language
) -> list[tuple[str, str]]:
    """Read the questions and answers of a reply."""
    if kind is GenerationKind.conversation:
        rows = values.get("turns")
        if not isinstance(rows, list) or not 0 < len(rows) <= MAX_TURNS:
            raise ReplyError(ReplyStatus.unreadable, f'"turns" is no list of 1 to {MAX_TURNS} turns')
    else:
        rows = [values]
    turns = []
    for row in rows:
        answer = _read_text(row, "answer")
        is_asked = kind in (GenerationKind.description, GenerationKind.caption)
        turns.append((choose_question(sample.id, language) if is_asked else _read_text(row, "question"), answer))
    return turns


def _read_text(row: Any, name: str) -> str:
    text = row.get(name) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ReplyError(ReplyStatus.unreadable, f'a turn has no text "{name}"')
    return unicodedata.normalize("NFC", text.strip())


def _convert_answer(text: str, boxes: frozenset[str]) -> tuple[ContentPart, ...]:
    """Convert an answer with mentions to its parts; each box must be one of those that were given."""
    content = parse_markup(text)
    for part in content:
        if isinstance(part, str):
            _require_plain(part)
        elif isinstance(part, ControlToken) and part.token in ("<gro>", "<ocr>"):
            raise ReplyError(ReplyStatus.boxes, f"{part.token} in an answer")
    unknown = [format_box(box) for _, _, found in parse_mentions(text) for box in found if format_box(box) not in boxes]
    if unknown:
        raise ReplyError(ReplyStatus.boxes, f"the box {unknown[0]} was not given")
    return content


def _require_plain(text: str) -> tuple[str]:
    """Require that a text spells no control token: none would be what it says."""
    if found := [token for token in SPECIAL_TOKENS if token in text]:
        raise ReplyError(ReplyStatus.boxes, f"{found[0]} outside of a mention")
    return (text,)


def _require_language(text: str, language: Language) -> None:
    """Require that most letters of a text are of a language; a text without letters is of any."""
    letters = [letter for letter in _MARKUP.sub("", text) if letter.isalpha()]
    is_own = _is_hangul if language is Language.ko else _is_latin
    if letters and sum(map(is_own, letters)) < MIN_SHARES[language] * len(letters):
        raise ReplyError(ReplyStatus.language, f"not in {language.value}: {' '.join(text.split())}")


def _is_hangul(letter: str) -> bool:
    return "가" <= letter <= "힣" or "ㄱ" <= letter <= "ㆎ"


def _is_latin(letter: str) -> bool:
    return letter < "\u0250"


# ---- a record's own turns


def restore_turn(turn: MarkedTurn, text: str) -> tuple[ContentPart, ...]:
    """Restore the content of a turn from a new text with the same marks.

    Raises:
        ReplyError: a mark is lost, repeated or new, or a phrase is not closed by its own boxes.
    """
    text = unicodedata.normalize("NFC", text)
    numbers = [int(match[1]) for match in FIND_MARK.finditer(text)]
    expected = list(range(turn.first, turn.first + len(turn.marks)))
    if sorted(numbers) != expected:
        raise ReplyError(ReplyStatus.marks, f"marks {numbers} in place of {expected}")
    for place, number in enumerate(numbers):
        if number in turn.opens and numbers[place + 1 : place + 2] != [number + 1]:
            raise ReplyError(ReplyStatus.marks, f"[[{number}]] is not closed by [[{number + 1}]]")
    content, end = list(turn.start), 0
    for match in FIND_MARK.finditer(text):
        content += [text[end : match.start()], *turn.marks[int(match[1]) - turn.first]]
        end = match.end()
    content.append(text[end:])
    for part in content:
        if isinstance(part, str) and part not in _collect_texts(turn):
            _require_plain(part)
    return tuple(part for part in content if part != "")


def _collect_texts(turn: MarkedTurn) -> set[str]:
    return {part for mark in turn.marks for part in mark if isinstance(part, str)}


def _rewrite_turns(
    values: dict[str, Any], sample: Sample, kind: GenerationKind, language: Language
) -> tuple[SampleKind, tuple[Message, ...]]:
    """Put the texts of a reply into the turns of a record."""
    turns = mark_turns(sample.messages)
    is_translation = kind is GenerationKind.translation
    changed = [turn for turn in turns if is_translation or (turn.role is Role.assistant and turn.supervised)]
    texts = values.get("texts")
    if not isinstance(texts, list) or len(texts) != len(changed) or not all(isinstance(text, str) for text in texts):
        raise ReplyError(ReplyStatus.unreadable, f'"texts" is no list of {len(changed)} texts')
    _require_language(" ".join(texts), language)
    new = dict(zip(map(id, changed), texts, strict=True))
    messages = []
    for turn, message in zip(turns, sample.messages, strict=True):
        text = new.get(id(turn))
        if text is None:
            messages.append(message)
            continue
        if turn.text.strip() and not text.strip():
            raise ReplyError(ReplyStatus.unreadable, "a text is empty")
        if not is_translation:
            _require_numbers(turn.text, text)
        messages.append(Message(turn.role, restore_turn(turn, text), turn.supervised))
    # a sentence is no exact match of a word or a number any more
    new_kind = SampleKind.instruction if not is_translation and sample.kind in _EXACT_KINDS else sample.kind
    return new_kind, tuple(messages)


_EXACT_KINDS = (SampleKind.word, SampleKind.number, SampleKind.arithmetic, SampleKind.digit)


def _require_numbers(old: str, new: str) -> None:
    numbers = set(re.findall(r"\d+", FIND_MARK.sub("", old)))
    if missing := numbers - set(re.findall(r"\d+", FIND_MARK.sub("", new))):
        raise ReplyError(ReplyStatus.numbers, f"{min(missing)} is missing")
