"""Chat template: encode a conversation to token ids and a supervision mask, with the model's own chat template.

The template is rendered once for each *shape* of a conversation (its roles, and the positions of images and texts), with
sentinels in place of the texts. The texts are then tokenized as plain text and inserted at the sentinels. So a control
token comes only from the template or from a `ControlToken` of the sample, never from a text of the data. The template needs
no `{% generation %}` marks: the supervised span of an assistant turn begins where the generation prompt ends, and ends
with the end token of the turn.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

import jinja2
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lit_vlm.data.template_date import freeze_date, is_date_dependent, validate_determinism
from lit_vlm.data.word_tokens import WordTokenizer
from lit_vlm.formatting import format_count
from lit_vlm.types import IMAGE_TOKEN, ControlToken, ImagePlaceholder, Message, Role, UserError

SENTINEL_START, SENTINEL_END = (
    "\ue000",
    "\ue001",
)  # Unicode private use; they enclose the number of a text in a rendering
SENTINEL = re.compile(f"{SENTINEL_START}(\\d+){SENTINEL_END}")
IMAGE, TEXT = "image", "text"
NUM_RENDERED_TURNS = 8  # the starts of the first answers are found by rendering, one by one
TEMPLATE_REMEDY = "model.chat_template=chatml, or a Jinja file"
THOUGHTS_START, THOUGHTS_END = "<think>", "</think>"
HEADER_CHARS = 24  # characters before an answer that identify its header, such as "<|im_start|>assistant\n"

ConversationShape = tuple[tuple[str, tuple[str, ...]], ...]  # ((role, (part, ...)), ...)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids [S] int32 and supervision mask [S] bool, True for tokens of the loss. Images are runs of placeholders."""

    input_ids: np.ndarray
    supervised: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens; the first token of a sequence is not predicted, so it does not count."""
        return int(np.count_nonzero(self.supervised[1:]))

    def slice(self, start: int, stop: int | None = None) -> TokenSequence:
        """Slice the sequence: tokens `start` to `stop - 1`."""
        return TokenSequence(self.input_ids[start:stop], self.supervised[start:stop])


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """Special token of the template; the image placeholder is one."""

    token_id: int


@dataclass(frozen=True, slots=True)
class TextSlot:
    """Place of a text of the conversation."""

    number: int  # of the text, counted over the conversation


@dataclass(frozen=True, slots=True)
class SupervisionMark:
    """Mark where an answer begins, `on` if it is supervised, or ends."""

    on: bool


TemplatePiece = str | SpecialToken | TextSlot | SupervisionMark


class ChatTemplate:
    """Chat template of one tokenizer, for training.

    Args:
        tokenizer: with `chat_template`; its added tokens are the control tokens.
        image_token: placeholder that the template writes for an image; one token of the vocabulary.
        day: date for a date-dependent template; None: today.

    Attributes:
        is_date_dependent: True if the date is part of the rendered text.

    Raises:
        UserError: no chat template, or one that cannot be used for training; the message names the template and the
            remedy.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, image_token: str = IMAGE_TOKEN, day: date | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the language model'} has no chat template, and training needs one to "
                "tell questions from answers. Choose an instruction-tuned model, or give one: model.chat_template=chatml, or a Jinja file."
            )
        self.tokenizer, self.day = tokenizer, day or date.today()
        self.origin = tokenizer.name_or_path or "the language model"
        validate_determinism(tokenizer.chat_template, self.origin)
        self.is_date_dependent = is_date_dependent(tokenizer.chat_template)
        self._template_text = (
            freeze_date(tokenizer.chat_template, self.day) if self.is_date_dependent else tokenizer.chat_template
        )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.control_ids = tokenizer.get_added_vocab()
        self.plain_tokenizer = _remove_added_tokens(tokenizer)
        literals = sorted(self.control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, literals)))
        self._strips_role = {role: self._detect_stripping(role) for role in (Role.user, Role.assistant)}
        self.get_pieces = lru_cache(maxsize=4096)(self._build_pieces)
        # [tokens] int32 as bytes
        self.tokenize_text = lru_cache(maxsize=8192)(WordTokenizer(self.plain_tokenizer).encode)

    def __reduce__(self):  # pickled for a spawned loader worker, without the caches
        return type(self), (self.tokenizer, self.image_token, self.day)

    def encode(self, messages: tuple[Message, ...], image_tokens: list[int], *, prompt: bool = False) -> TokenSequence:
        """Encode a conversation to token ids and a supervision mask.

        Args:
            messages: the conversation; with `prompt`, it ends with a user message and the generation prompt is added.
            image_tokens: number of placeholders of each image, in the order of the images in the text.
        """
        shape, texts = _extract_shape(messages)
        ids: list[bytes] = []  # int32
        mask: list[bytes] = []  # bool
        images = iter(image_tokens)
        answers = tuple(message.supervised for message in messages if message.role is Role.assistant)
        supervised, pending = False, ""

        def put(new: bytes) -> None:
            ids.append(new)
            mask.append((b"\1" if supervised else b"\0") * (len(new) // 4))

        def flush() -> None:
            nonlocal pending
            if pending:
                put(self.tokenize_text(pending))
                pending = ""

        for piece in self.get_pieces(shape, prompt, None if all(answers) else answers):
            if isinstance(piece, str):
                pending += piece
            elif isinstance(piece, TextSlot):
                for part in self._apply_stripping(*texts[piece.number]):
                    if isinstance(part, str):
                        pending += part
                    else:
                        flush()
                        put(_pack(self._get_control_id(part)))
            elif isinstance(piece, SpecialToken):
                flush()
                put(_pack(piece.token_id) * (next(images) if piece.token_id == self.image_token_id else 1))
            else:
                flush()
                supervised = piece.on
        flush()
        # joined as bytearray, because arrays of bytes would be read-only
        return TokenSequence(
            np.frombuffer(bytearray().join(ids), np.int32), np.frombuffer(bytearray().join(mask), bool)
        )

    def holds_thoughts(self, message: Message) -> bool:
        """Return True if an answer begins with thoughts that the vocabulary has tokens for: as text they would be others."""
        first = message.content[0] if message.role is Role.assistant and message.content else ""
        has_tokens = THOUGHTS_START in self.control_ids and THOUGHTS_END in self.control_ids
        return has_tokens and isinstance(first, str) and first.lstrip().startswith(THOUGHTS_START)

    def _get_control_id(self, control: ControlToken) -> int:
        try:
            return self.control_ids[control.token]
        except KeyError:
            raise UserError(
                f"The data uses the control token {control.token}, which this model's vocabulary lacks. "
                f"Add it with model.special_tokens, or read the source with markup=off."
            ) from None

    def _apply_stripping(self, role: Role, parts: tuple[str | ControlToken, ...]) -> tuple[str | ControlToken, ...]:
        """Strip the parts as the template would: some templates strip the whitespace around a message."""
        if not self._strips_role.get(role) or not parts:
            return parts
        trimmed = list(parts)
        if isinstance(trimmed[0], str):
            trimmed[0] = trimmed[0].lstrip()
        if isinstance(trimmed[-1], str):
            trimmed[-1] = trimmed[-1].rstrip()
        return tuple(trimmed)

    def _detect_stripping(self, role: Role) -> bool:
        """Return True if the template strips the whitespace around a message of this role."""
        padded = f" {SENTINEL_START}0{SENTINEL_END} "
        turns = [("user", "q"), ("assistant", padded)] if role is Role.assistant else [("user", padded)]
        rendered = self.render([{"role": r, "content": [{"type": TEXT, "text": t}]} for r, t in turns])
        return f" {SENTINEL_START}0{SENTINEL_END}" not in rendered

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """Render messages in transformers' format, with the date of this template.

        Raises:
            UserError: the template has a syntax error, or refuses these roles.
        """
        options = {"chat_template": self._template_text, "tokenize": False, "add_generation_prompt": prompt}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template of {self.origin} is not well-formed, line "
                f"{error.lineno - self.is_date_dependent}: {error.message}. Mend it, or give another: {TEMPLATE_REMEDY}."
            ) from error
        except Exception as error:  # a template can raise any exception
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"The chat template of {self.origin} refuses a conversation of roles [{roles}]: {_format_error(error)}. Change the "
                f"records, or the template: {TEMPLATE_REMEDY}."
            ) from error

    def _build_pieces(
        self, shape: ConversationShape, prompt: bool, trained: tuple[bool, ...] | None = None
    ) -> tuple[TemplatePiece, ...]:
        """Build the pieces of a conversation of this shape, including supervision marks.

        Args:
            trained: of each answer, True if it is supervised; None: all are.
        """
        messages = _build_sentinel_messages(shape)
        rendered = self.render(messages, prompt)
        self._validate_rendering(messages, rendered)
        starts = self._find_answer_starts(messages, rendered, trained)
        return tuple(self._split_rendering(rendered, starts))

    def _validate_rendering(self, messages: list[dict], rendered: str) -> None:
        """Validate a rendering: raise UserError if it lacks a text or an image of the conversation, or repeats an answer."""
        counts = Counter(int(match[1]) for match in SENTINEL.finditer(rendered))
        number = -1
        for message in messages:
            for part in message["content"]:
                number += part["type"] == TEXT
                found = counts[number]
                if part["type"] == TEXT and (not found or (found > 1 and message["role"] == "assistant")):
                    what = (
                        f"writes the words of a {message['role']} {found} times"
                        if found
                        else (f"leaves out what the {message['role']} says")
                    )
                    raise UserError(
                        f"The chat template of {self.origin} {what} in a conversation of roles "
                        f"[{', '.join(one['role'] for one in messages)}]. Mend it, or give another: {TEMPLATE_REMEDY}."
                    )
        images = sum(part["type"] == IMAGE for message in messages for part in message["content"])
        shown = rendered.count(self.image_token)
        if shown != images:
            raise UserError(
                f"The chat template of {self.origin} writes {self.image_token} {format_count(shown, 'time')} for "
                f"{format_count(images, 'picture')}. Mend it, or give another: {TEMPLATE_REMEDY}."
            )

    def _find_answer_starts(
        self, messages: list[dict], rendered: str, trained: tuple[bool, ...] | None = None
    ) -> list[tuple[int, bool]]:
        """Find the offset in `rendered` at which each answer of the assistant begins, and whether it is supervised.

        An answer that is not, and that the template rewrites once another turn follows, is left out: no mark is needed.

        The first `NUM_RENDERED_TURNS` answers and the last one are found by rendering the conversation up to each of
        them. An answer between them that follows the same header as the last answer begins where that header ends.
        Rendering up to each of hundreds of turns would take quadratic time.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        slots = {int(match[1]): match.start() for match in SENTINEL.finditer(rendered)}
        first_slot = {
            i: slots[_find_sentinel_number(messages[i])] for i in answers if _find_sentinel_number(messages[i]) in slots
        }
        is_trained = dict(zip(answers, trained or [True] * len(answers), strict=True))

        def find(i: int) -> int | None:
            return self._find_answer_start(messages, rendered, i, may_be_rewritten=not is_trained[i])

        starts = {i: find(i) for i in {*answers[:NUM_RENDERED_TURNS], *answers[-1:]}}
        last_start = starts[answers[-1]] if answers else None
        if last_start is not None and answers[-1] in first_slot:
            last = answers[-1]
            gap = first_slot[last] - last_start
            header = rendered[max(0, first_slot[last] - HEADER_CHARS - gap) : first_slot[last]]
            for i in answers[NUM_RENDERED_TURNS:-1]:
                if i in first_slot and rendered.endswith(header, 0, first_slot[i]):
                    starts[i] = first_slot[i] - gap
        found = [(starts[i] if i in starts else find(i), is_trained[i]) for i in answers]
        return [(start, is_supervised) for start, is_supervised in found if start is not None]

    def _find_answer_start(
        self, messages: list[dict], rendered: str, message_index: int, may_be_rewritten: bool
    ) -> int | None:
        """Find the offset of one answer by rendering the conversation with and without it; None for a rewritten one."""
        turn = self.render(messages[: message_index + 1])
        if not rendered.startswith(turn.rstrip()):
            if may_be_rewritten:
                return None
            raise UserError(
                f"The chat template of {self.origin} rewrites earlier turns (an answer reads "
                "differently once another follows), so a conversation of several turns cannot be trained in one pass. Give a template "
                "that leaves them alone: model.chat_template=chatml, or a Jinja file of your own."
            )
        generation_prompt = self.render(messages[:message_index], prompt=True) if message_index else ""
        sentinel = SENTINEL.search(
            rendered, len(self.render(messages[:message_index]).rstrip()) if message_index else 0
        )
        # llava-hf's template has a header that differs from its generation prompt: there the answer begins at its text
        return (
            len(generation_prompt)
            if message_index and turn.startswith(generation_prompt)
            else sentinel.start()
            if sentinel
            else len(turn)
        )

    def _split_rendering(self, rendered: str, starts: list[tuple[int, bool]]):
        """Split at sentinels, control tokens and answer starts; an answer ends with the first control token after its text."""
        marks = sorted(
            [(m.start(), m.end(), TextSlot(int(m[1]))) for m in SENTINEL.finditer(rendered)]
            + [
                (m.start(), m.end(), SpecialToken(self.control_ids[m[0]]))
                for m in self._control_pattern.finditer(rendered)
            ]
            + [(start, start, SupervisionMark(on)) for start, on in starts],
            key=lambda mark: mark[:2],
        )
        position, in_answer, has_text = 0, False, False
        for start, end, piece in marks:
            if start > position:
                yield rendered[position:start]
            yield piece
            position = max(position, end)
            in_answer, has_text = (
                (True, False)
                if isinstance(piece, SupervisionMark)
                else (in_answer, has_text or isinstance(piece, TextSlot))
            )
            if in_answer and has_text and isinstance(piece, SpecialToken):
                yield SupervisionMark(False)
                in_answer = False
        if in_answer:
            raise UserError(
                f"The chat template of {self.origin} closes an answer without a control token, so "
                "the model would never learn to stop. Give one that does: model.chat_template=chatml, or a Jinja file."
            )
        if position < len(rendered):
            yield rendered[position:]


def _pack(token_id: int) -> bytes:
    return token_id.to_bytes(4, sys.byteorder)


def _format_error(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _extract_shape(
    messages: tuple[Message, ...],
) -> tuple[ConversationShape, list[tuple[Role, tuple[str | ControlToken, ...]]]]:
    """Extract the shape of a conversation and its texts; adjacent strings and control tokens form one text."""
    shape, texts = [], []
    for message in messages:
        parts: list[str] = []
        text: list[str | ControlToken] = []
        for piece in (*message.content, None):
            if piece is not None and not isinstance(piece, ImagePlaceholder):
                text.append(piece)
                continue
            if text:
                parts.append(TEXT)
                texts.append((message.role, tuple(text)))
                text = []
            if piece is not None:
                parts.append(IMAGE)
        shape.append((message.role.value, tuple(parts)))
    return tuple(shape), texts


def _find_sentinel_number(message: dict) -> int:
    """Find the number of the first text sentinel in a message; -1 without one."""
    texts = (SENTINEL.fullmatch(part["text"]) for part in message["content"] if part["type"] == TEXT)
    return next((int(match[1]) for match in texts if match), -1)


def _build_sentinel_messages(shape: ConversationShape) -> list[dict]:
    """Build messages in transformers' format, with a numbered sentinel for each text."""
    number = -1
    messages = []
    for role, parts in shape:
        content = []
        for part in parts:
            if part == TEXT:
                number += 1
            content.append(
                {"type": IMAGE} if part == IMAGE else {"type": TEXT, "text": f"{SENTINEL_START}{number}{SENTINEL_END}"}
            )
        messages.append({"role": role, "content": content})
    return messages


def _remove_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy the tokenizer without its added tokens: it splits `<|im_end|>` like any other text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None  # it would add BOS tokens, which the chat template writes itself
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))
