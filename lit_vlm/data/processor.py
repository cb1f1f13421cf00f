"""What stands between records and batches: a tokenizer with its template, and the image settings. Needs no weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings
from lit_vlm.data.template import Encoded, Template
from lit_vlm.data.tiles import tiles_of
from lit_vlm.types import ImageSlot, Message, PreferencePair, Record, RecordError, Role, Sample, UserError


@dataclass(frozen=True, slots=True)
class Cost:
    """What one record costs, known without decoding a pixel. For a pair, both answers with their prompts together."""

    lengths: tuple[int, ...]  # tokens of each segment
    num_supervised: int
    num_tiles: int
    num_chosen: int = 0  # supervised tokens of a pair's chosen answer

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


class Processor:
    """Turns records into token ids and tiles.

    Args:
        tokenizer: with a chat template that writes one placeholder per image.
        images: tile size, grid, normalisation; from the model's folder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, images: ImageSettings) -> None:
        self.tokenizer, self.images = tokenizer, images
        self.template = Template(tokenizer)
        self.image_token_id = self.template.image_token_id

    def sequences(self, record: Record) -> list[Encoded]:
        """One sequence for a sample; the chosen and the rejected one for a pair."""
        if isinstance(record, Sample):
            return [self.template.encode(record.messages, self._image_tokens(record, record.messages))]
        return [self._answer(record, answer) for answer in (record.chosen, record.rejected)]

    def prompt(self, record: Record) -> Encoded:
        """The conversation up to the last answer, with the generation prompt: what the model is asked."""
        messages = record.prompt if isinstance(record, PreferencePair) else record.messages[:-1]
        return self.template.encode(messages, self._image_tokens(record, messages), prompt=True)

    def cost(self, record: Record) -> Cost:
        """Raises RecordError when nothing in the record is supervised."""
        sequences = self.sequences(record)
        for sequence in sequences:
            if not sequence.num_supervised:
                raise RecordError(record.origin, "no supervised token: its answer is empty", "Give it an answer")
        return Cost(
            lengths=tuple(sequence.num_tokens for sequence in sequences),
            num_supervised=sum(sequence.num_supervised for sequence in sequences),
            num_tiles=sum(self._layout(record, i).num_tiles for i in range(len(record.images))),
            num_chosen=sequences[0].num_supervised if len(sequences) == 2 else 0,
        )

    def tiles(self, record: Record) -> list[np.ndarray]:
        """[N, 3, H, W] uint8 for each image of the record."""
        alone = len(record.images) == 1
        return [tiles_of(image.load(), self.images, alone=alone) for image in record.images]

    def decode(self, ids: list[int]) -> str:
        """Text with its control tokens spelled out, the end of turn and padding left out."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for token in (self.tokenizer.eos_token, self.tokenizer.pad_token):
            text = text.replace(token, "") if token else text
        return text.strip()

    def _answer(self, pair: PreferencePair, answer: Message) -> Encoded:
        messages = (*pair.prompt, answer)
        encoded = self.template.encode(messages, self._image_tokens(pair, messages))
        last = self.template.encode(pair.prompt, self._image_tokens(pair, pair.prompt), prompt=True).num_tokens
        supervised = encoded.supervised.copy()
        supervised[:last] = False  # earlier answers belong to the prompt
        return Encoded(encoded.input_ids, supervised)

    def _layout(self, record: Record, index: int):
        return self.images.layout(*record.images[index].size, alone=len(record.images) == 1)

    def _image_tokens(self, record: Record, messages: tuple[Message, ...]) -> list[int]:
        slots = [piece.index for message in messages for piece in message.content if isinstance(piece, ImageSlot)]
        if sorted(set(slots)) != list(range(len(record.images))) or len(slots) != len(record.images):
            raise RecordError(
                record.origin,
                f"{len(slots)} image placeholders but {len(record.images)} images; each image needs exactly one",
            )
        return [self._layout(record, index).num_tokens for index in slots]


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
    text = processor.tokenizer.apply_chat_template(plain, tokenize=False)
    theirs = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(ours.input_ids) != list(theirs):
        raise UserError(
            f"The tokenizer of {processor.tokenizer.name_or_path or 'the language model'} gives other tokens for a text in pieces than for "
            "the whole, so its answers cannot be told from its questions exactly. Choose a model with a byte-level tokenizer "
            "(Qwen2.5, Qwen3, Llama 3, ...)."
        )
