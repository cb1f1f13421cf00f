"""What a model says to a sample: for the held-out samples of a run, a conversation, and pairs of answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.data.collate import collate
from lit_vlm.data.index.columns import Index
from lit_vlm.data.processor import Processor
from lit_vlm.model.generate import Sampling, generate
from lit_vlm.types import SPECIAL_TOKENS, Content, Control, ImageSlot, Message, Role, Sample

MOST_PROMPTS = 256  # of one generation


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as the model gave it: its control tokens apart from text that looks like them.

    `ended`: it closed itself; else the limit cut it.
    """

    content: tuple[Content, ...]
    ended: bool

    @property
    def text(self) -> str:
        """Control tokens spelled out."""
        return Message(Role.assistant, self.content).text


def ask(
    model: LlavaOnevisionForConditionalGeneration, processor: Processor, samples: Sequence[Sample], max_new_tokens: int
) -> list[str]:
    """The model's own last answer of each conversation, greedily, control tokens spelled out.

    The samples are one generation: the caller keeps them within the memory. What their last messages say is not read.
    """
    batch = collate(processor, list(samples)).to(next(model.parameters()).device)
    stop = end_of_answer(processor)
    outputs = generate(model, batch, max_new_tokens, eos_token_id=stop)
    return [processor.decode([token for token in ids if token != stop]) for ids in outputs]


def draw(
    model: LlavaOnevisionForConditionalGeneration,
    processor: Processor,
    samples: Sequence[Sample],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[list[Said]]:
    """Several answers of the model's own to each conversation, in place of its last one. One generation, as `ask`."""
    batch = collate(processor, list(samples)).to(next(model.parameters()).device)
    stop = end_of_answer(processor)
    outputs = generate(model, batch, max_new_tokens, eos_token_id=stop, sampling=sampling)
    said = [Said(_content(processor, ids, stop), ids[-1:] == [stop]) for ids in outputs]
    count = len(sampling.seeds[0])
    return [said[start : start + count] for start in range(0, len(said), count)]


def _content(processor: Processor, ids: list[int], stop: int) -> tuple[Content, ...]:
    """The nine control tokens as such and all else as text, in NFC, without white space around it."""
    tokenizer, vocabulary = processor.tokenizer, processor.template.control_ids
    known = {vocabulary[token]: Control(token) for token in SPECIAL_TOKENS if token in vocabulary}
    silent = (stop, tokenizer.eos_token_id, tokenizer.pad_token_id)
    pieces: list[Content] = []
    for control, run in groupby((token for token in ids if token not in silent), known.get):
        tokens = list(run)
        text = unicodedata.normalize("NFC", tokenizer.decode(tokens, skip_special_tokens=False))
        pieces += [control] * len(tokens) if control else [text]
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return tuple(piece for piece in pieces if piece != "")


def reference_lengths(index: Index) -> np.ndarray:
    """Tokens of each reference; of several answers, all together."""
    return np.where(index.chosen > 0, index.chosen, index.supervised)


def alike(
    index: Index, numbers: Sequence[int], *, most_tokens: int, most_tiles: int, new_tokens: int = 0
) -> Iterator[list[int]]:
    """Samples that are generated together: references, then prompts, of like length, so that little is padded and no
    answer waits for a long one.

    Args:
        new_tokens: room for so many beside each sample's own tokens.
    """
    references = reference_lengths(index)
    batch: list[int] = []
    longest = tiles = 0
    for number in sorted(numbers, key=lambda i: (int(references[i]), int(index.tokens[i]))):
        length, more = int(index.tokens[number]) + new_tokens, int(index.tiles[number])
        longest, tiles = max(longest, length), tiles + more
        full = len(batch) == MOST_PROMPTS or longest * (len(batch) + 1) > most_tokens or tiles > most_tiles
        if batch and full:
            yield batch
            batch, longest, tiles = [], length, more
        batch.append(number)
    if batch:
        yield batch


def end_of_answer(processor: Processor) -> int:
    """The token that closes an answer in this template: what training teaches, whatever the tokenizer calls its end."""
    turn = processor.template.encode((Message(Role.user, ("?",)), Message(Role.assistant, ("!",))), [])
    return int(turn.input_ids[turn.supervised][-1])


def readable_prompt(messages: Sequence[Message]) -> str:
    """What the model is asked, as a person reads it; of several turns, each with its role."""
    texts = ["".join(_spelled(piece) for piece in message.content).strip() for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message.role}: {text}" for message, text in zip(messages, texts, strict=True))


def _spelled(piece: Content) -> str:
    if isinstance(piece, ImageSlot):
        return "<image> "
    return piece if isinstance(piece, str) else piece.token
