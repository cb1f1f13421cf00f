"""What stands between records and batches: a tokenizer with its template, and the image settings. Needs no weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings, Layout
from lit_vlm.data.template import Encoded, Template
from lit_vlm.data.tiles import tiles_from
from lit_vlm.types import (
    Fault,
    ImageSlot,
    Message,
    PreferencePair,
    Record,
    RecordError,
    Role,
    Sample,
    UserError,
    counted,
)

_COUNTING = 2  # raise it when the same records come to other counts; it is part of the digest


@dataclass(frozen=True, slots=True)
class Cost:
    """What one record costs, known without decoding a pixel. For a pair, both answers and their prompt together."""

    lengths: tuple[int, ...]  # tokens of each segment
    num_supervised: int
    squares: int  # attention's work: twice the number of (token, token that it sees or is)
    longest: int  # most tokens that one segment sees, its prefix with it
    num_tiles: int
    num_images: int = 0
    num_image_tokens: int = 0  # placeholders, in all segments
    num_chosen: int = 0  # supervised tokens of a pair's chosen answer
    size: tuple[int, int] = (0, 0)  # (height, width) of the first image in pixels

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


class Processor:
    """Turns records into token ids and tiles.

    Args:
        tokenizer: with a chat template that writes one placeholder per image.
        images: tile size, grid, normalisation; from the model's folder.
        scaled_decode: decode JPEGs no larger than their tiles need; pixels then differ slightly.
        share_prompts: a pair's prompt stands once in the row; False: before each of its answers, to compare the two.
        day: that a chat template which writes today's is given; None: this one's. It stays the same from then on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        images: ImageSettings,
        *,
        scaled_decode: bool = False,
        share_prompts: bool = True,
        day: date | None = None,
    ) -> None:
        self.tokenizer, self.images, self.scaled_decode = tokenizer, images, scaled_decode
        self.share_prompts = share_prompts
        self.template = Template(tokenizer, day=day)
        self.image_token_id = self.template.image_token_id

    @cached_property
    def digest(self) -> str:
        """Changes when the tokenizer, its template or the image settings change what a record costs."""
        tokenizer = self.tokenizer
        text = [self.template.ordinary.to_str(), tokenizer.chat_template, self.template.control_ids]
        state = [
            _COUNTING,
            self.share_prompts,
            *text,
            tokenizer.special_tokens_map,
            self.image_token_id,
            asdict(self.images),
            *([self.template.day.isoformat()] if self.template.writes_day else []),
        ]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()

    def sequences(self, record: Record, layouts: list[Layout] | None = None) -> list[Encoded]:
        """One sequence for a sample; the chosen and the rejected one for a pair.

        Args:
            layouts: the record's, where they are known; else its images' headers are read.
        """
        layouts = self.layouts(record) if layouts is None else layouts
        if isinstance(record, Sample):
            return [self._encode(record, record.messages, layouts)]
        shown = layouts[: record.num_shown], layouts[-record.num_shown :] if record.num_shown else []
        return [self._answer(record, *each) for each in zip((record.chosen, record.rejected), shown, strict=True)]

    def segments(self, record: Record, layouts: list[Layout] | None = None) -> list[Encoded]:
        """How the record lies in the row: a sample as one segment; a pair as its prompt without the last token, and two
        answers that begin with that token. Where its answers were given to different pictures, as its two sequences."""
        sequences = self.sequences(record, layouts)
        shared = 0
        # of different pictures the placeholders are alike, and what stands in their places is not
        if isinstance(record, PreferencePair) and self.share_prompts and not record.rejected_images:
            shared = _shared(*sequences)
        return [sequences[0].part(0, shared), *(each.part(shared) for each in sequences)] if shared else sequences

    def prompt(self, record: Record) -> Encoded:
        """The conversation up to the last answer, with the generation prompt: what the model is asked."""
        messages = record.prompt if isinstance(record, PreferencePair) else record.messages[:-1]
        shown = self.layouts(record)
        if isinstance(record, PreferencePair):
            shown = shown[: record.num_shown]
        return self._encode(record, messages, shown, prompt=True)

    def cost(self, record: Record) -> Cost:
        """Raises RecordError when an image's header cannot be read, or nothing in the record is supervised."""
        sizes = [image.size for image in record.images]  # each header is read once
        layouts = self._layouts(record, sizes)
        segments = self.segments(record, layouts)
        answers = segments[-2:] if isinstance(record, PreferencePair) else segments
        if not all(answer.num_supervised for answer in answers):
            reason = "no supervised token: its answer is empty"
            raise RecordError(record.origin, reason, "Give it an answer", Fault.no_answer)
        lengths = [segment.num_tokens for segment in segments]
        before = [0, *lengths[:1] * 2] if len(segments) == 3 else [0] * len(segments)
        return Cost(
            lengths=tuple(lengths),
            num_supervised=sum(segment.num_supervised for segment in segments),
            squares=sum(own * own + 2 * own * prefix for own, prefix in zip(lengths, before, strict=True)),
            longest=max(map(sum, zip(lengths, before, strict=True))),
            num_tiles=sum(layout.num_tiles for layout in layouts),
            num_images=len(layouts),
            num_image_tokens=sum(int((segment.input_ids == self.image_token_id).sum()) for segment in segments),
            num_chosen=answers[0].num_supervised if isinstance(record, PreferencePair) else 0,
            size=sizes[0] if sizes else (0, 0),
        )

    def layouts(self, record: Record) -> list[Layout]:
        """Of each image, from its header alone."""
        return self._layouts(record, [image.size for image in record.images])

    def tiles(self, record: Record) -> list[np.ndarray]:
        """[N, 3, H, W] uint8 for each image of the record."""
        options = {"alone": _num_shown(record) == 1, "scaled_decode": self.scaled_decode}
        return [tiles_from(image, self.images, most_tiles=record.max_tiles, **options) for image in record.images]

    def decode(self, ids: list[int]) -> str:
        """Text with its control tokens spelled out, the end of turn and padding left out."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for token in (self.tokenizer.eos_token, self.tokenizer.pad_token):
            text = text.replace(token, "") if token else text
        return text.strip()

    def _answer(self, pair: PreferencePair, answer: Message, layouts: list[Layout]) -> Encoded:
        prompt = self._encode(pair, pair.prompt, layouts, prompt=True).num_tokens
        encoded = self._encode(pair, (*pair.prompt, answer), layouts)
        encoded.supervised[:prompt] = False  # earlier answers belong to the prompt
        return encoded

    def _layouts(self, record: Record, sizes: list[tuple[int, int]]) -> list[Layout]:
        alone = _num_shown(record) == 1
        return [self.images.layout(*size, alone=alone, most_tiles=record.max_tiles) for size in sizes]

    def _encode(
        self, record: Record, messages: tuple[Message, ...], layouts: list[Layout], *, prompt: bool = False
    ) -> Encoded:
        slots = [piece.index for message in messages for piece in message.content if isinstance(piece, ImageSlot)]
        if sorted(slots) != list(range(len(layouts))):
            raise RecordError(
                record.origin,
                f"{counted(len(slots), 'image placeholder')} but {counted(len(layouts), 'image')}; each image needs exactly one",
                fault=Fault.placeholders,
            )
        return self.template.encode(messages, [layouts[slot].num_tokens for slot in slots], prompt=prompt)


def _num_shown(record: Record) -> int:
    return record.num_shown if isinstance(record, PreferencePair) else len(record.images)


def _shared(chosen: Encoded, rejected: Encoded) -> int:
    """Tokens that both sequences begin with and neither is supervised on, the last of them left out: it predicts the
    answers' first tokens, and a segment's first token is predicted by none."""
    before = min(int(np.argmax(each.supervised)) for each in (chosen, rejected))
    differ = chosen.input_ids[:before] != rejected.input_ids[:before]
    alike = int(np.argmax(differ)) if differ.any() else before
    return max(0, alike - 1)


def check_vocabulary(processor: Processor) -> None:
    """The pieces must tokenise to what the whole tokenises to, else answers are learnt in tokens that nobody will generate.

    Raises:
        UserError: for tokenizers that put a space before every piece (old SentencePiece conversions).
    """
    messages = (
        Message(Role.user, ("What is this? \uc774\uac83\uc740 \ubb34\uc5c7\uc778\uac00\uc694?",)),
        Message(Role.assistant, ("A red circle. \ube68\uac04 \uc6d0\uc785\ub2c8\ub2e4.",)),
    )
    ours = processor.template.encode(messages, [])
    plain = [{"role": message.role.value, "content": [{"type": "text", "text": message.text}]} for message in messages]
    text = processor.template.render(plain)
    theirs = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(ours.input_ids) != list(theirs):
        raise UserError(
            f"The tokenizer of {processor.tokenizer.name_or_path or 'the language model'} gives other tokens for a text in pieces than for "
            "the whole, so its answers cannot be told from its questions exactly. Choose a model with a byte-level tokenizer "
            "(Qwen2.5, Qwen3, Llama 3, ...)."
        )
