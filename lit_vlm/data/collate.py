"""Records become one flat micro-batch: a row of tokens without padding and a stack of tiles."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.utils.data import get_worker_info

from lit_vlm.anyres import Layout
from lit_vlm.data.decoding import REMEDY
from lit_vlm.data.processor import Processor
from lit_vlm.data.template import Encoded
from lit_vlm.types import IGNORE_INDEX, Batch, Fault, ImageSlot, PreferencePair, Record, RecordError


def collate(
    processor: Processor,
    records: list[Record],
    *,
    step: int = 0,
    step_supervised_tokens: int = 0,
    step_tiles: int = 0,
    step_pairs: int = 0,
    step_chosen_tokens: int = 0,
) -> Batch:
    """One micro-batch; a blank one when there are no records, which teaches nothing and keeps the ranks in step.

    Samples give one segment each. Pairs give the chosen answers' segments first and then the rejected ones', and both
    answers point at the same image, which is encoded once.
    """
    layouts = [processor.layouts(record) for record in records]
    sequences = [processor.sequences(record, layouts[i]) for i, record in enumerate(records)]
    pairs = sum(isinstance(record, PreferencePair) for record in records)
    assert pairs in (0, len(records)), "samples and pairs in one micro-batch"
    segments = [sequence for turn in zip(*sequences, strict=True) for sequence in turn] if records else []
    first_image = np.cumsum([0, *(len(record.images) for record in records)])
    order = [int(first_image[i]) + j for i, record in enumerate(records) for j in _image_order(record)]
    return Batch(
        **_row(segments, processor),
        tiles=_tiles(processor, records, layouts),
        layouts=[layout for images in layouts for layout in images],
        image_index=order * (2 if pairs else 1),
        num_supervised_tokens=sum(segment.num_supervised for segment in segments),
        step_supervised_tokens=step_supervised_tokens,
        step_tiles=step_tiles,
        step=step,
        sample_ids=[f"{record.source}/{record.id}" for record in records],
        kinds=[record.kind for record in records],
        languages=[record.language for record in records],
        num_pairs=pairs,
        step_pairs=step_pairs,
        step_chosen_tokens=step_chosen_tokens,
        blank=not records,
    )


def _image_order(record: Record) -> list[int]:
    """Indices of a record's images in the order in which they stand in its text."""
    messages = record.prompt if isinstance(record, PreferencePair) else record.messages
    return [piece.index for message in messages for piece in message.content if isinstance(piece, ImageSlot)]


def _row(segments: list[Encoded], processor: Processor) -> dict:
    if not segments:  # one token that predicts nothing
        pad = processor.tokenizer.pad_token_id or 0
        segments = [Encoded(np.array([pad], dtype=np.int32), np.array([False]))]
    lengths = [segment.num_tokens for segment in segments]
    input_ids = torch.from_numpy(np.concatenate([segment.input_ids for segment in segments]).astype(np.int64))
    supervised = np.concatenate([segment.supervised for segment in segments])
    starts = np.cumsum([0, *lengths])
    supervised[starts[:-1]] = False  # nothing stands before a segment's first token to predict it from
    return {
        "input_ids": input_ids,
        "labels": torch.where(torch.from_numpy(supervised), input_ids, IGNORE_INDEX),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "lengths": lengths,
    }


def _tiles(processor: Processor, records: list[Record], layouts: list[list[Layout]]) -> torch.Tensor:
    """[N, 3, H, W] uint8, filled record by record: beside the micro-batch only one record's tiles are ever held.

    Raises:
        RecordError: an image has changed between its header and its pixels.
    """
    side = processor.images.tile_size
    counts = [sum(layout.num_tiles for layout in images) for images in layouts]
    tiles = _empty(sum(counts), 3, side, side)
    start = 0
    for record, count in zip(records, counts, strict=True):
        stacks = processor.tiles(record)
        if sum(map(len, stacks)) != count:
            raise RecordError(record.origin, "its image changed while it was read", REMEDY, Fault.changed)
        if stacks:
            np.concatenate(stacks, out=tiles[start : start + count].numpy())
        start += count
    return tiles


def _empty(*shape: int) -> torch.Tensor:
    """uint8, in a loader's worker in the memory that it shares with the trainer, which saves a copy of the batch."""
    if get_worker_info() is None or not shape[0]:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
