"""Continuous batching: generation in which prompts join and leave the batch between two decoding steps.

New prompts are prefilled together as one packed row, without padding. Decoding steps run over all active sequences, each
with its own number of keys. A sequence that ends frees its slot for the next prompt at once.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from lit_vlm.model.generate import SamplingParams, find_prompt_positions, make_logits_processors
from lit_vlm.model.packed_attention import Segments
from lit_vlm.types import Batch

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

# Shapes: B active sequences, S slots, H key heads, C capacity in tokens, D head width, T tokens of a packed row,
# K longest sequence in the batch, V vocabulary size.


@dataclass(frozen=True, slots=True)
class DecodingParams:
    """Decoding of one prompt: the length limit, and greedy decoding or sampling."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True, eq=False)
class GeneratedSequence:
    """One prompt and the tokens generated for it so far.

    Attributes:
        ids: generated token ids, the stop token included.
        finish_reason: "stop" (stop token) or "length"; None while it is generated.
        is_cancelled: set by the caller to free the slot before the next step.
    """

    num_prompt_tokens: int
    params: DecodingParams
    group: PromptGroup
    positions: list[int]  # of its prompt in the row of the group
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_cancelled: bool = False
    processors: LogitsProcessorList | None = None

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of prompt and answer."""
        return self.num_prompt_tokens + self.params.max_new_tokens


@dataclass(slots=True, eq=False)
class PromptGroup:
    """Prompts of one flat batch. Their images are encoded together, when the first of them is prefilled."""

    batch: Batch
    num_waiting: int
    embeddings: Tensor | None = None  # [T, width of the language model]


class PromptCache:
    """Cache of one prefill pass in the form that transformers' layers call: it keeps the keys and values of the row."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep [1, H, T, D] of a layer, and return the same."""
        self.layers[layer] = (keys, values)
        return keys, values


class SlotCache:
    """Keys and values of all active sequences: for each layer two tensors [S, H, C, D].

    Sequence b is in slot b, from position 0 on. Slots and capacity grow by doubling, as long as S * C stays within
    `max_tokens`; above it, the tensors get the size that is needed now. So many short sequences and then a long one do not
    make a cache that is as wide as the first and as long as the second.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths: list[int] = []  # cached tokens of each active sequence
        self._shape = (0, 0)  # S, C
        self._rows = self._positions = torch.empty(0, dtype=torch.int64)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that there is room for."""
        return self._shape[0] * self._shape[1]

    def append(self, prompt: PromptCache, start: int, stop: int) -> None:
        """Append a sequence: the keys of positions `start` to `stop` - 1 of a prefilled row."""
        slot, length = len(self.lengths), stop - start
        for number, (keys, values) in prompt.layers.items():
            if number not in self.layers:
                self.layers[number] = (keys[:0, :, :0], values[:0, :, :0])
        self._reserve(slot + 1, max([*self.lengths, length]) + 1)
        for number, states in prompt.layers.items():
            for stored, state in zip(self.layers[number], states, strict=True):
                stored[slot, :, :length] = state[0, :, start:stop]
        self.lengths.append(length)

    def remove(self, slot: int) -> None:
        """Remove the sequence of a slot. The last sequence moves to its slot."""
        last = len(self.lengths) - 1
        if slot != last:
            length = self.lengths[last]
            for pair in self.layers.values():
                for stored in pair:
                    stored[slot, :, :length] = stored[last, :, :length]
            self.lengths[slot] = length
        self.lengths.pop()

    def begin_step(self, device: torch.device) -> Tensor:
        """Reserve a position for the next token of each sequence; return these positions [B]."""
        self._reserve(len(self.lengths), max(self.lengths) + 1)
        self._positions = torch.tensor(self.lengths, device=device)
        self._rows = torch.arange(len(self.lengths), device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return self._positions

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, 1, D] of the newest tokens of a layer; return all keys and values, [B, H, K, D]."""
        for stored, state in zip(self.layers[layer], (keys, values), strict=True):
            stored[self._rows, :, self._positions] = state[:, :, 0]
        longest = max(self.lengths)
        all_keys, all_values = (stored[: len(self.lengths), :, :longest] for stored in self.layers[layer])
        return all_keys, all_values

    def _reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` sequences of `capacity` tokens; the keys of the active sequences are kept."""
        needed, have = (slots, capacity), self._shape
        if slots <= have[0] and capacity <= have[1]:
            return
        shape = tuple(now if need <= now else max(need, 2 * now) for need, now in zip(needed, have, strict=True))
        self._shape = (shape[0], shape[1]) if shape[0] * shape[1] <= self.max_tokens else needed
        used, longest = len(self.lengths), max(self.lengths, default=0)
        for number, pair in self.layers.items():
            keys, values = (
                stored.new_zeros(self._shape[0], stored.shape[1], self._shape[1], stored.shape[3]) for stored in pair
            )
            for grown, stored in zip((keys, values), pair, strict=True):
                grown[:used, :, :longest] = stored[:used, :, :longest]
            self.layers[number] = (keys, values)


class ContinuousBatcher:
    """Batch of sequences that are generated together, in the order in which they were added.

    The answers do not depend on the other sequences of the batch, except where rounding, which does depend on them, decides
    between two tokens. A sampled answer has a random generator of its own.

    Args:
        model: with the flat forward pass, in evaluation mode, with all its weights on one device.
        stop_ids: tokens that end an answer.
        max_sequences: maximum number of active sequences.
        max_cache_tokens: maximum of active sequences x longest of them (prompt and longest answer), the size of the key cache.
        max_prefill_tokens: maximum number of prompt tokens that join in one step; a longer prompt joins alone.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        stop_ids: set[int],
        *,
        max_sequences: int = 64,
        max_cache_tokens: int = 262_144,
        max_prefill_tokens: int = 8_192,
    ) -> None:
        self.model, self.stop_ids = model, stop_ids
        self.max_sequences, self.max_cache_tokens = max_sequences, max_cache_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[GeneratedSequence] = deque()
        self.active: list[GeneratedSequence] = []
        self._cache = SlotCache(max_cache_tokens)
        self._device = next(model.parameters()).device

    @property
    def has_work(self) -> bool:
        """True while some sequence is not finished."""
        return bool(self.waiting or self.active)

    def add(self, batch: Batch, params: Sequence[DecodingParams]) -> list[GeneratedSequence]:
        """Add the prompts of a flat batch, one for each of `params`; generation begins at the next step.

        Raises:
            ValueError: a sequence can be longer than `max_cache_tokens`.
        """
        prompts = find_prompt_positions(batch)
        group = PromptGroup(batch, len(prompts))
        sequences = [
            GeneratedSequence(len(positions), params[i], group, positions) for i, positions in enumerate(prompts)
        ]
        for sequence in sequences:
            if sequence.max_tokens > self.max_cache_tokens:
                raise ValueError(f"{sequence.max_tokens} tokens, and the key cache holds {self.max_cache_tokens}")
        self.waiting += sequences
        return sequences

    @torch.inference_mode()
    def step(self) -> list[GeneratedSequence]:
        """Generate one token of each active sequence, then let waiting ones join; return the sequences that got a token."""
        for sequence in [sequence for sequence in self.waiting if sequence.is_cancelled]:
            self.waiting.remove(sequence)
        self._drop(lambda sequence: sequence.is_cancelled)
        advanced = list(self.active)
        if advanced:
            self._decode()
            self._drop_finished(advanced)
        joined = self._admit()
        if joined:
            self._prefill(joined)
            self._drop_finished(joined)
        return advanced + joined

    def run(self, on_finish: Callable[[GeneratedSequence], None] | None = None) -> None:
        """Generate until all sequences are finished."""
        while self.has_work:
            for sequence in self.step():
                if sequence.finish_reason and on_finish:
                    on_finish(sequence)

    def clear(self) -> list[GeneratedSequence]:
        """Remove all sequences, after an error, and return them."""
        removed = [*self.active, *self.waiting]
        self.active, self.waiting, self._cache = [], deque(), SlotCache(self.max_cache_tokens)
        return removed

    def _drop_finished(self, sequences: list[GeneratedSequence]) -> None:
        """Set the finish reason of sequences that have just got a token, and free the slots of finished ones."""
        for sequence in sequences:
            if sequence.ids[-1] in self.stop_ids:
                sequence.finish_reason = "stop"
            elif len(sequence.ids) >= sequence.params.max_new_tokens:
                sequence.finish_reason = "length"
        self._drop(lambda sequence: sequence.finish_reason is not None)

    def _drop(self, should_drop: Callable[[GeneratedSequence], bool]) -> None:
        for slot in range(len(self.active) - 1, -1, -1):
            if should_drop(self.active[slot]):
                self._cache.remove(slot)
                last = self.active.pop()
                if slot < len(self.active):
                    self.active[slot] = last

    def _admit(self) -> list[GeneratedSequence]:
        """Take waiting sequences, in their order, as far as the limits allow."""
        joined: list[GeneratedSequence] = []
        longest = max((sequence.max_tokens for sequence in self.active), default=0)
        num_tokens = 0
        while self.waiting:
            sequence = self.waiting[0]
            longest = max(longest, sequence.max_tokens)
            num_tokens += sequence.num_prompt_tokens
            count = len(self.active) + len(joined) + 1
            is_full = count > self.max_sequences or count * longest > self.max_cache_tokens
            if is_full or (joined and num_tokens > self.max_prefill_tokens):
                break
            joined.append(self.waiting.popleft())
        return joined

    def _prefill(self, sequences: list[GeneratedSequence]) -> None:
        """Prefill prompts as one packed row, put their keys into slots, and generate the first token of each."""
        row = torch.cat([self._compute_embeddings(sequence) for sequence in sequences])
        lengths = [sequence.num_prompt_tokens for sequence in sequences]
        ends = list(itertools.accumulate(lengths))
        cache = PromptCache()
        hidden = self.model.model.language_model(
            inputs_embeds=row[None],
            position_ids=torch.cat([torch.arange(length, device=self._device) for length in lengths])[None],
            # not read, for `segments` say what attends to what; with four dimensions transformers passes it on as it is
            attention_mask=row.new_ones((1, 1, 1, 1), dtype=torch.bool),
            past_key_values=cache,
            use_cache=True,
            segments=Segments(lengths, self._device),
        ).last_hidden_state[0]
        for end, length in zip(ends, lengths, strict=True):
            self._cache.append(cache, end - length, end)
        self.active += sequences
        self._choose_tokens(hidden[torch.tensor(ends, device=self._device) - 1], sequences)

    def _compute_embeddings(self, sequence: GeneratedSequence) -> Tensor:
        """Compute the input embeddings of one prompt, [its tokens, width]; images of its group are encoded once."""
        group = sequence.group
        if group.embeddings is None:
            group.embeddings = self.model(batch=group.batch.to(self._device), embeddings_only=True)
        embeddings = group.embeddings[torch.tensor(sequence.positions, device=self._device)]
        group.num_waiting -= 1
        if not group.num_waiting:
            group.embeddings = None
        return embeddings

    def _decode(self) -> None:
        """Run one decoding step of all active sequences."""
        ids = torch.tensor([[sequence.ids[-1]] for sequence in self.active], device=self._device)
        positions = self._cache.begin_step(self._device)
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(ids),
            position_ids=positions[:, None],
            attention_mask=self._make_masks(positions),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self._choose_tokens(hidden, self.active)

    def _make_masks(self, positions: Tensor) -> Any:
        """Make the attention mask [B, 1, 1, K] of the newest tokens; for a model with windows, one for each type of layer."""
        config = self.model.config.text_config
        keys = torch.arange(max(self._cache.lengths), device=self._device)
        full = (keys <= positions[:, None])[:, None, None]
        window = getattr(config, "sliding_window", None)
        if window is None or not getattr(config, "use_sliding_window", True):
            return full
        windowed = full & (keys > positions[:, None] - window)[:, None, None]
        layer_types = getattr(config, "layer_types", None)
        return windowed if layer_types is None else {"full_attention": full, "sliding_attention": windowed}

    def _choose_tokens(self, hidden: Tensor, sequences: list[GeneratedSequence]) -> None:
        """Choose the next token of each sequence from its last hidden state [B, width]."""
        scores = self.model.lm_head(hidden).float()
        for row, sequence in enumerate(sequences):
            params = sequence.params
            if params.temperature > 0:
                if sequence.processors is None:
                    sampling = SamplingParams([[params.seed]], params.temperature, params.top_p)
                    sequence.processors = make_logits_processors(sampling, self._device)
                scores[row] = sequence.processors(hidden, scores[row : row + 1])[0]
        for sequence, token in zip(sequences, scores.argmax(-1).tolist(), strict=True):
            sequence.ids.append(token)
