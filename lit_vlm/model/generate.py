"""Generation from a flat micro-batch: each segment is cut before its last answer, and the model generates its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from lit_vlm.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

# Shapes: B prompts, N answers of each, L longest prompt, D width of the language model, V vocabulary size.


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters for sampling answers from the model's distribution; without them decoding is greedy.

    Each answer has its own random generator, so that it does not depend on the other answers of the batch (except where
    rounding, which does depend on them, decides between two tokens).
    """

    seeds: Sequence[Sequence[int]]  # [B][N], 64 bits each
    temperature: float = 1.0  # above 0
    top_p: float = 1.0  # nucleus sampling: the likeliest tokens that together have this probability (arXiv 1904.09751)


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    batch: Batch,
    max_new_tokens: int = 64,
    eos_token_id: int | None = None,
    sampling: SamplingParams | None = None,
) -> list[list[int]]:
    """Generate answers: the token ids of each, the end token included if it was generated.

    The two answers of a preference pair share one prompt in the batch; each of the two gives one answer.

    Args:
        batch: with or without answers; a segment without supervised tokens is used as a prompt unchanged.
        sampling: N answers of the first segment, then of the next; each image is encoded once. None: one answer each,
            by greedy decoding.
    """
    with use_eval_mode(model):
        embeddings = model(batch=batch, embeddings_only=True)
        prompts, mask = _pad_left(embeddings, find_prompt_positions(batch))
        processors = None
        if sampling is not None:
            count, processors = len(sampling.seeds[0]), make_logits_processors(sampling, prompts.device)
            prompts, mask = prompts.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
        stop = eos_token_id if eos_token_id is not None else model.generation_config.eos_token_id
        stop_ids = {stop} if isinstance(stop, int) else set(stop or ())
        output = model.generate(
            inputs_embeds=prompts,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,  # sampling is done in the scores: transformers has one random generator for the whole batch
            logits_processor=processors,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=min(stop_ids, default=0),
            use_cache=True,
            # under ZeRO-3 all ranks generate until the last rank's answer ends; transformers detects FSDP2 itself
            synced_gpus=hasattr(next(model.parameters()), "ds_id") or None,
        )
    return [_crop_after_stop(ids, stop_ids) for ids in output.tolist()]


@contextmanager
def use_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode inside the context; afterwards each module has its former mode."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


class GumbelLogitsProcessor(LogitsProcessor):
    """Logits processor that samples by the Gumbel-max trick: the largest log-probability plus Gumbel noise is a sample.

    One random generator per row (arXiv 1411.0030).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to scores [B * N, V]; returns float32."""
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


def make_logits_processors(sampling: SamplingParams, device: torch.device) -> LogitsProcessorList:
    """Make the processors that turn logits into scores whose argmax is a sample."""
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1.0:
        chain.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList(
        [*chain, GumbelLogitsProcessor([seed for row in sampling.seeds for seed in row], device)]
    )


def find_prompt_positions(batch: Batch) -> list[list[int]]:
    """Find the row positions of each prompt: its prefix, then the segment up to its last run of supervised tokens.

    A segment that others continue is a part of their prompts, and no prompt itself.
    """
    supervised = (batch.labels != IGNORE_INDEX).tolist()
    spans: list[tuple[int, int]] = []
    start = 0
    for length in batch.segment_lengths:
        end = start + length
        last = end
        while last > start and not supervised[last - 1]:
            last -= 1
        first = last
        while first > start and supervised[first - 1]:
            first -= 1
        spans.append((start, first if first > start else end))
        start = end
    return [
        [*(range(*spans[prefix]) if prefix >= 0 else ()), *range(*spans[number])]
        for number, prefix in enumerate(batch.prefix_segments)
        if number not in batch.prefix_segments
    ]


def _pad_left(embeddings: Tensor, prompt_positions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left to [B, L, D], with their mask [B, L]."""
    longest = max(map(len, prompt_positions))
    prompts = embeddings.new_zeros(len(prompt_positions), longest, embeddings.shape[-1])
    mask = torch.zeros(len(prompt_positions), longest, dtype=torch.long, device=embeddings.device)
    for row, positions in enumerate(prompt_positions):
        prompts[row, longest - len(positions) :] = embeddings[positions]
        mask[row, longest - len(positions) :] = 1
    return prompts, mask


def _crop_after_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    """Crop token ids after the first stop token."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids
