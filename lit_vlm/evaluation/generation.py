"""Generation of answers: for the held-out samples of a run, for chat, and for preference pairs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lit_vlm.data.collate import collate
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.processor import Processor
from lit_vlm.model.continuous_batching import ContinuousBatcher, DecodingParams, GeneratedSequence
from lit_vlm.model.generate import SamplingParams, generate
from lit_vlm.types import (
    SPECIAL_TOKENS,
    ContentPart,
    ControlToken,
    ImagePlaceholder,
    Language,
    LazyImage,
    Message,
    Role,
    Sample,
    SampleKind,
)

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

MAX_PROMPTS = 256  # in one generation batch
MAX_GROUP = 64  # prompts that join a continuous batch together


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated answer. Its control tokens are separate from text that looks like them.

    Attributes:
        content: text and control tokens, in order.
        is_complete: the model generated the end token; else the length limit cut the answer.
    """

    content: tuple[ContentPart, ...]
    is_complete: bool

    @property
    def text(self) -> str:
        """The answer as text, with control tokens spelled out."""
        return Message(Role.assistant, self.content).text


def make_prompt_sample(messages: Sequence[Message], images: Sequence[LazyImage]) -> Sample:
    """Make the sample of a conversation that ends with a question; its answer is at the place where the model generates."""
    answer = Message(Role.assistant, ("",))  # its text is not read
    earlier = (replace(message, supervised=False) for message in messages)  # a template may rewrite earlier answers
    return Sample("", "chat", "chat", SampleKind.other, Language.auto, (*earlier, answer), tuple(images))


def generate_answers(
    model: VisionLanguageModel,
    processor: Processor,
    samples: Sequence[Sample],
    max_new_tokens: int | Sequence[int],
) -> list[str]:
    """Generate the last answer of each conversation with greedy decoding. Returns texts with control tokens spelled out.

    All samples are one generation batch: the caller keeps it within the memory. The samples' own last messages are not read.

    Args:
        max_new_tokens: maximum number of tokens of each answer, or one number for all.
    """
    limits = [max_new_tokens] * len(samples) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    batch = collate(processor, list(samples)).to(next(model.parameters()).device)
    stop_id = get_end_of_answer_id(processor)
    outputs = generate(model, batch, max(limits), eos_token_id=stop_id)
    cropped = [ids[:limit] for ids, limit in zip(outputs, limits, strict=True)]
    return [processor.decode([token for token in ids if token != stop_id]) for ids in cropped]


def generate_answers_continuously(
    model: VisionLanguageModel,
    processor: Processor,
    samples: Sequence[Sample],
    max_new_tokens: Sequence[int],
    *,
    max_tokens: int,
    max_tiles: int,
) -> Iterator[tuple[int, str]]:
    """Generate the last answer of each conversation with greedy decoding and continuous batching.

    Args:
        model: in eval mode, with all its weights on one device.
        samples: their own last messages are not read.
        max_new_tokens: maximum number of tokens of each answer.
        max_tokens: limit of the key cache, and of the prompts whose images are encoded together.
        max_tiles: limit of the tiles that are encoded together.

    Yields:
        Number of the sample and its answer, with control tokens spelled out, in the order in which the answers end.
    """
    stop_id = get_end_of_answer_id(processor)
    costs = [processor.compute_cost(sample) for sample in samples]
    pairs = zip(costs, max_new_tokens, strict=True)
    longest = max((cost.num_tokens + limit for cost, limit in pairs), default=0)
    batcher = ContinuousBatcher(model, {stop_id}, max_cache_tokens=max(max_tokens, longest), max_sequences=MAX_PROMPTS)
    sizes = [(cost.num_tokens, cost.num_tiles) for cost in costs]
    groups = group_in_order(sizes, max_tokens=max_tokens, max_tiles=max_tiles)
    numbers: dict[GeneratedSequence, int] = {}
    while True:
        while len(batcher.waiting) < MAX_PROMPTS and (group := next(groups, None)) is not None:
            batch = collate(processor, [samples[number] for number in group])
            params = [DecodingParams(max_new_tokens=max_new_tokens[number]) for number in group]
            numbers |= zip(batcher.add(batch, params), group, strict=True)
        if not batcher.has_work:
            return
        for sequence in batcher.step():
            if sequence.finish_reason:
                yield numbers.pop(sequence), processor.decode([token for token in sequence.ids if token != stop_id])


def count_answer_tokens(processor: Processor, sample: Sample) -> int:
    """Count the tokens of a sample's last answer, with all that follows it."""
    (sequence,) = processor.encode_sequences(sample)
    starts = np.flatnonzero(np.diff(sequence.supervised.astype(np.int8)) == 1)  # the token before an answer
    return sequence.num_tokens - int(starts[-1]) - 1


def group_in_order(sizes: Sequence[tuple[int, int]], *, max_tokens: int, max_tiles: int) -> Iterator[list[int]]:
    """Group samples in their order, under a limit of tokens and of tiles; a larger sample is a group of its own.

    Args:
        sizes: tokens and tiles of each sample.
    """
    group: list[int] = []
    tokens = tiles = 0
    for number, (num_tokens, num_tiles) in enumerate(sizes):
        if group and (tokens + num_tokens > max_tokens or tiles + num_tiles > max_tiles or len(group) == MAX_GROUP):
            yield group
            group, tokens, tiles = [], 0, 0
        group.append(number)
        tokens, tiles = tokens + num_tokens, tiles + num_tiles
    if group:
        yield group


def sample_answers(
    model: VisionLanguageModel,
    processor: Processor,
    samples: Sequence[Sample],
    max_new_tokens: int,
    sampling: SamplingParams,
) -> list[list[Completion]]:
    """Sample several last answers for each conversation. All are one generation batch, as in `generate_answers`.

    Returns:
        For each sample a list of completions, one for each of its seeds.
    """
    batch = collate(processor, list(samples)).to(next(model.parameters()).device)
    stop_id = get_end_of_answer_id(processor)
    outputs = generate(model, batch, max_new_tokens, eos_token_id=stop_id, sampling=sampling)
    completions = [Completion(_decode_content(processor, ids, stop_id), ids[-1:] == [stop_id]) for ids in outputs]
    num_seeds = len(sampling.seeds[0])
    return [completions[start : start + num_seeds] for start in range(0, len(completions), num_seeds)]


def _decode_content(processor: Processor, ids: list[int], stop_id: int) -> tuple[ContentPart, ...]:
    """Decode token ids into control tokens (nine are known) and text, in NFC, without surrounding white space."""
    tokenizer, vocabulary = processor.tokenizer, processor.template.control_ids
    control_by_id = {vocabulary[token]: ControlToken(token) for token in SPECIAL_TOKENS if token in vocabulary}
    skipped_ids = (stop_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    pieces: list[ContentPart] = []
    for control, group in groupby((token for token in ids if token not in skipped_ids), control_by_id.get):
        tokens = list(group)
        text = unicodedata.normalize("NFC", tokenizer.decode(tokens, skip_special_tokens=False))
        pieces += [control] * len(tokens) if control else [text]
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return tuple(piece for piece in pieces if piece != "")


def get_reference_lengths(index: SampleIndex) -> np.ndarray:
    """Return the number of reference tokens of each sample, [samples]; of several answers, their sum."""
    return np.where(index.chosen > 0, index.chosen, index.supervised)


def batch_by_length(
    index: SampleIndex, numbers: Sequence[int], *, max_tokens: int, max_tiles: int, new_tokens: int = 0
) -> Iterator[list[int]]:
    """Group samples of similar length into generation batches, under a token limit and a tile limit.

    Samples are sorted by the length of the reference, then of the prompt. So there is little padding, and no short answer
    waits for a long one.

    Args:
        numbers: samples of the index.
        max_tokens: limit of batch size x longest sequence; a single longer sample is a batch of its own.
        max_tiles: limit of the tiles in a batch.
        new_tokens: reserved for generation, on top of each sample's own tokens.
    """
    references = get_reference_lengths(index)
    batch: list[int] = []
    longest = tiles = 0
    for number in sorted(numbers, key=lambda i: (int(references[i]), int(index.tokens[i]))):
        length, num_tiles = int(index.tokens[number]) + new_tokens, int(index.tiles[number])
        longest, tiles = max(longest, length), tiles + num_tiles
        is_full = len(batch) == MAX_PROMPTS or longest * (len(batch) + 1) > max_tokens or tiles > max_tiles
        if batch and is_full:
            yield batch
            batch, longest, tiles = [], length, num_tiles
        batch.append(number)
    if batch:
        yield batch


def get_end_of_answer_id(processor: Processor) -> int:
    """Return the id of the token that closes an answer in this template: training teaches this one, also where the tokenizer's EOS differs."""
    turn = processor.template.encode((Message(Role.user, ("?",)), Message(Role.assistant, ("!",))), [])
    return int(turn.input_ids[turn.supervised][-1])


def format_prompt(messages: Sequence[Message]) -> str:
    """Format a prompt as readable text; several turns get one line each, with the role."""
    texts = ["".join(_format_piece(piece) for piece in message.content).strip() for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message.role}: {text}" for message, text in zip(messages, texts, strict=True))


def _format_piece(piece: ContentPart) -> str:
    if isinstance(piece, ImagePlaceholder):
        return "<image> "
    return piece if isinstance(piece, str) else piece.token
