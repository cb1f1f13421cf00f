"""Processor: turns records into token ids and image tiles, with a tokenizer, its chat template and image settings.

It needs no model weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings, TileLayout
from lit_vlm.data.chat_template import ChatTemplate, TokenSequence
from lit_vlm.data.tiling import load_tiles
from lit_vlm.formatting import format_count
from lit_vlm.types import Fault, ImagePlaceholder, Message, PreferencePair, Record, RecordError, Role, Sample, UserError

_LATER_FIELDS = ("model_class", "token_side", "pad_to_square")  # of ImageSettings, see `Processor.digest`
_COST_VERSION = 2  # increase it when the same records get other counts; it is part of the digest


@dataclass(frozen=True, slots=True)
class RecordCost:
    """Cost of one record in tokens and tiles, computed without decoding pixels. For a pair: prompt and both answers."""

    lengths: tuple[int, ...]  # tokens of each segment
    num_supervised: int
    squares: int  # attention cost: twice the number of pairs (token, token that it attends to), itself included
    max_context_tokens: int  # maximum tokens that one segment attends to, its prefix included
    num_tiles: int
    num_images: int = 0
    num_image_tokens: int = 0  # image placeholders in all segments
    num_chosen: int = 0  # supervised tokens of a pair's chosen answer
    size: tuple[int, int] = (0, 0)  # (height, width) of the first image in pixels

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


class Processor:
    """Processor of records: token ids, supervision mask, and image tiles.

    Args:
        tokenizer: with a chat template that writes one placeholder per image.
        images: tile size, grid and normalisation, from the model's folder.
        scaled_decode: decode JPEGs no larger than their tiles require; pixels then differ slightly.
        share_prompts: the prompt of a pair is in the batch once; False: before each of its answers, for comparison.
        day: date for a date-dependent chat template; None: today. It stays the same for the life of the object.
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
        self.template = ChatTemplate(tokenizer, day=day)
        self.image_token_id = self.template.image_token_id

    @cached_property
    def digest(self) -> str:
        """Digest of all that determines a record's cost: tokenizer, chat template and image settings."""
        tokenizer = self.tokenizer
        text = [self.template.plain_tokenizer.to_str(), tokenizer.chat_template, self.template.control_ids]
        state = [
            _COST_VERSION,
            self.share_prompts,
            *text,
            tokenizer.special_tokens_map,
            self.image_token_id,
            self._describe_images(),
            *([self.template.day.isoformat()] if self.template.is_date_dependent else []),
        ]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()

    def _describe_images(self) -> dict[str, Any]:
        """Describe the image settings; the fields that OneVision lacks only where they are set, so that digests stay."""
        values = asdict(self.images)
        defaults = {field.name: field.default for field in fields(ImageSettings) if field.name in _LATER_FIELDS}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    def encode_sequences(self, record: Record, layouts: list[TileLayout] | None = None) -> list[TokenSequence]:
        """Encode a record: one sequence for a sample, the chosen and the rejected one for a pair.

        Args:
            layouts: layouts of the record's images, if known; else the image headers are read.
        """
        layouts = self.compute_layouts(record) if layouts is None else layouts
        if isinstance(record, Sample):
            return [self._encode(record, record.messages, layouts)]
        shown = (
            layouts[: record.num_prompt_images],
            layouts[-record.num_prompt_images :] if record.num_prompt_images else [],
        )
        return [
            self._encode_answer(record, *each) for each in zip((record.chosen, record.rejected), shown, strict=True)
        ]

    def encode_segments(self, record: Record, layouts: list[TileLayout] | None = None) -> list[TokenSequence]:
        """Encode a record as segments of the flat batch.

        A sample is one segment. A pair is its prompt without the last token, and two answers that begin with that token.
        A pair whose answers belong to different images is its two sequences.
        """
        sequences = self.encode_sequences(record, layouts)
        shared = 0
        # prompts with different images have equal placeholders but different image features
        if isinstance(record, PreferencePair) and self.share_prompts and not record.has_rejected_images:
            shared = _count_shared_tokens(*sequences)
        return [sequences[0].slice(0, shared), *(each.slice(shared) for each in sequences)] if shared else sequences

    def encode_prompt(self, record: Record) -> TokenSequence:
        """Encode the prompt: the conversation before the last answer, with the generation prompt."""
        messages = record.prompt if isinstance(record, PreferencePair) else record.messages[:-1]
        shown = self.compute_layouts(record)
        if isinstance(record, PreferencePair):
            shown = shown[: record.num_prompt_images]
        return self._encode(record, messages, shown, prompt=True)

    def compute_cost(self, record: Record) -> RecordCost:
        """Compute the cost. Raises RecordError if an image header cannot be read, or no token is supervised."""
        sizes = [image.size for image in record.images]  # each header is read once
        layouts = self._compute_layouts(record, sizes)
        segments = self.encode_segments(record, layouts)
        answers = segments[-2:] if isinstance(record, PreferencePair) else segments
        if not all(answer.num_supervised for answer in answers):
            reason = "no supervised token: its answer is empty"
            raise RecordError(record.origin, reason, "Give it an answer", Fault.no_answer)
        lengths = [segment.num_tokens for segment in segments]
        prefix_lengths = [0, *lengths[:1] * 2] if len(segments) == 3 else [0] * len(segments)
        return RecordCost(
            lengths=tuple(lengths),
            num_supervised=sum(segment.num_supervised for segment in segments),
            squares=sum(
                length * length + 2 * length * prefix for length, prefix in zip(lengths, prefix_lengths, strict=True)
            ),
            max_context_tokens=max(map(sum, zip(lengths, prefix_lengths, strict=True))),
            num_tiles=sum(layout.num_tiles for layout in layouts),
            num_images=len(layouts),
            num_image_tokens=sum(
                int(np.count_nonzero(segment.input_ids == self.image_token_id)) for segment in segments
            ),
            num_chosen=answers[0].num_supervised if isinstance(record, PreferencePair) else 0,
            size=sizes[0] if sizes else (0, 0),
        )

    def compute_layouts(self, record: Record) -> list[TileLayout]:
        """Compute the layout of each image from its header alone."""
        return self._compute_layouts(record, [image.size for image in record.images])

    def load_tiles(self, record: Record) -> list[np.ndarray]:
        """Load the tiles of each image of the record: [N, 3, H, W] uint8."""
        options = {"single_image": _count_prompt_images(record) == 1, "scaled_decode": self.scaled_decode}
        return [load_tiles(image, self.images, max_tiles=record.max_tiles, **options) for image in record.images]

    def decode(self, ids: list[int]) -> str:
        """Decode token ids to text with control tokens, without end-of-turn and padding tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for token in (self.tokenizer.eos_token, self.tokenizer.pad_token):
            text = text.replace(token, "") if token else text
        return text.strip()

    def _encode_answer(self, pair: PreferencePair, answer: Message, layouts: list[TileLayout]) -> TokenSequence:
        """Encode the prompt and one answer of a pair; only the answer is supervised."""
        earlier = tuple(replace(message, supervised=False) for message in pair.prompt)  # they are part of the prompt
        prompt = self._encode(pair, earlier, layouts, prompt=True).num_tokens
        encoded = self._encode(pair, (*earlier, answer), layouts)
        encoded.supervised[:prompt] = False
        return encoded

    def _compute_layouts(self, record: Record, sizes: list[tuple[int, int]]) -> list[TileLayout]:
        alone = _count_prompt_images(record) == 1
        return [self.images.compute_layout(*size, single_image=alone, max_tiles=record.max_tiles) for size in sizes]

    def _encode(
        self, record: Record, messages: tuple[Message, ...], layouts: list[TileLayout], *, prompt: bool = False
    ) -> TokenSequence:
        slots = [
            piece.index for message in messages for piece in message.content if isinstance(piece, ImagePlaceholder)
        ]
        if sorted(slots) != list(range(len(layouts))):
            raise RecordError(
                record.origin,
                f"{format_count(len(slots), 'image placeholder')} but {format_count(len(layouts), 'image')}; each image needs exactly one",
                fault=Fault.placeholders,
            )
        if any(map(self.template.holds_thoughts, messages)):
            raise RecordError(
                record.origin,
                "an answer begins with <think>, which as text is not the token of that name; the chat template writes thoughts itself",
                "Take the thoughts out of the answers",
            )
        return self.template.encode(messages, [layouts[slot].num_tokens for slot in slots], prompt=prompt)


def _count_prompt_images(record: Record) -> int:
    """Count the images of one prompt."""
    return record.num_prompt_images if isinstance(record, PreferencePair) else len(record.images)


def _count_shared_tokens(chosen: TokenSequence, rejected: TokenSequence) -> int:
    """Count the unsupervised tokens with which both sequences begin, without the last one.

    The last one predicts the first tokens of the answers, so it must be in the segments of the answers: the first token
    of a segment is never predicted.
    """
    before = min(int(np.argmax(sequence.supervised)) for sequence in (chosen, rejected))
    differ = chosen.input_ids[:before] != rejected.input_ids[:before]
    num_equal = int(np.argmax(differ)) if differ.any() else before
    return max(0, num_equal - 1)


def check_vocabulary(processor: Processor) -> None:
    """Check that a text in pieces gives the same tokens as the whole text.

    Otherwise the model would learn answers in tokens that it never generates.

    Raises:
        UserError: for tokenizers that add a space before every piece (old SentencePiece conversions).
    """
    messages = (
        Message(Role.user, ("What is this? \uc774\uac83\uc740 \ubb34\uc5c7\uc778\uac00\uc694?",)),
        Message(Role.assistant, ("A red circle. \ube68\uac04 \uc6d0\uc785\ub2c8\ub2e4.",)),
    )
    pieces = processor.template.encode(messages, [])
    plain = [{"role": message.role.value, "content": [{"type": "text", "text": message.text}]} for message in messages]
    text = processor.template.render(plain)
    whole = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(pieces.input_ids) != list(whole):
        raise UserError(
            f"The tokenizer of {processor.tokenizer.name_or_path or 'the language model'} gives other tokens for a text in pieces than for "
            "the whole, so its answers cannot be told from its questions exactly. Choose a model with a byte-level tokenizer "
            "(Qwen2.5, Qwen3, Llama 3, ...)."
        )
