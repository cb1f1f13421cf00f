"""Collate records into a flat batch: one micro-batch as a row of tokens without padding and a stack of tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from lit_vlm.anyres import TileLayout
from lit_vlm.compat.torch import allocate_shared
from lit_vlm.data.chat_template import TokenSequence
from lit_vlm.data.decoding import REMEDY
from lit_vlm.data.processor import Processor
from lit_vlm.types import IGNORE_INDEX, Batch, Fault, ImagePlaceholder, PreferencePair, Record, RecordError, Sample


def collate(
    processor: Processor,
    records: list[Record],
    *,
    step: int = 0,
    step_supervised_tokens: int = 0,
    step_tiles: int = 0,
    step_pairs: int = 0,
    step_chosen_tokens: int = 0,
    with_pixels: bool = True,
) -> Batch:
    """Collate records into one flat micro-batch.

    Each sample is one segment. Preference pairs give first their prompts, each once, then the chosen answers, then the
    rejected ones (see `Processor.encode_segments`). Each image is encoded once. Without records it is a dummy batch: it
    has no loss, and keeps the number of micro-batches equal on all ranks.

    Args:
        records: all samples or all pairs.
        step_supervised_tokens: of the whole optimizer step, over all ranks and micro-batches: the divisor of the loss.
        with_pixels: False: no image is decoded and tiles are [N, 3, 0, 0]; for callers that have the vision features.

    Raises:
        RecordError: an image cannot be read, or has changed between its header and its pixels.
    """
    layouts = [processor.compute_layouts(record) for record in records]
    segments_per_record = [processor.encode_segments(record, layouts[i]) for i, record in enumerate(records)]
    num_pair_records = sum(isinstance(record, PreferencePair) for record in records)
    assert num_pair_records in (0, len(records)), "samples and pairs in one micro-batch"
    segment_order = _sort_segments(segments_per_record, num_answers=2 if num_pair_records else 1)
    first_image = np.cumsum([0, *(len(record.images) for record in records)])
    image_index = [
        int(first_image[i]) + image
        for i, j in segment_order
        for image in _list_images(records[i], len(segments_per_record[i]), j)
    ]
    return Batch(
        **_build_flat_batch(
            [segments_per_record[i][j] for i, j in segment_order],
            _find_prefixes(segments_per_record, segment_order),
            processor,
        ),
        record_ids=[i for i, _ in segment_order] or [0],
        tiles=_load_tiles(processor, records, layouts)
        if with_pixels
        else _allocate(sum(map(_count_tiles, layouts)), 3, 0, 0),
        layouts=[layout for record_layouts in layouts for layout in record_layouts],
        tiles_per_record=[_count_tiles(record_layouts) for record_layouts in layouts],
        image_index=image_index,
        step_supervised_tokens=step_supervised_tokens,
        step_tiles=step_tiles,
        step=step,
        sample_ids=[f"{record.source}/{record.id}" for record in records],
        kinds=[record.kind for record in records],
        languages=[record.language for record in records],
        num_pairs=num_pair_records,
        step_pairs=step_pairs,
        step_chosen_tokens=step_chosen_tokens,
        dummy=not records,
    )


def _sort_segments(segments_per_record: list[list[TokenSequence]], num_answers: int) -> list[tuple[int, int]]:
    """Sort the segments of all records as (record, segment): shared prompts first, then first answers, then second ones."""
    shared = [(i, 0) for i, segments in enumerate(segments_per_record) if len(segments) > num_answers]
    return shared + [
        (i, len(segments) - num_answers + answer)
        for answer in range(num_answers)
        for i, segments in enumerate(segments_per_record)
    ]


def _find_prefixes(segments_per_record: list[list[TokenSequence]], segment_order: list[tuple[int, int]]) -> list[int]:
    """Find for each segment the position of the segment that it continues; -1: none."""
    positions = {segment: position for position, segment in enumerate(segment_order)}
    return [positions[i, 0] if j and len(segments_per_record[i]) == 3 else -1 for i, j in segment_order] or [-1]


def _list_images(record: Record, num_segments: int, segment: int) -> list[int]:
    """List the indices of the record's images in one of its segments, in the order of the text."""
    if num_segments == 3 and segment > 0:
        return []  # in its prompt
    if isinstance(record, Sample):
        return [
            piece.index
            for message in record.messages
            for piece in message.content
            if isinstance(piece, ImagePlaceholder)
        ]
    first = record.num_prompt_images if record.has_rejected_images and segment == 1 else 0
    return [
        first + piece.index
        for message in record.prompt
        for piece in message.content
        if isinstance(piece, ImagePlaceholder)
    ]


def _build_flat_batch(segments: list[TokenSequence], prefixes: list[int], processor: Processor) -> dict[str, Any]:
    """Build the token fields of a `Batch`: segments concatenated without padding, with `cu_seqlens` and loss positions."""
    if not segments:  # dummy batch: one token that predicts nothing
        pad = processor.tokenizer.pad_token_id or 0
        segments = [TokenSequence(np.array([pad], dtype=np.int32), np.array([False]))]
    lengths = [segment.num_tokens for segment in segments]
    starts = np.cumsum([0, *lengths])
    input_ids = torch.from_numpy(np.concatenate([segment.input_ids for segment in segments]).astype(np.int64))
    supervised = np.concatenate([segment.supervised for segment in segments])
    supervised[starts[:-1]] = False  # the first token of a segment has no token before it that could predict it
    first_positions = [lengths[prefix] if prefix >= 0 else 0 for prefix in prefixes]
    loss_positions = np.flatnonzero(supervised) - 1
    bounds = np.searchsorted(loss_positions, starts)
    first_loss_positions = [
        int(loss_positions[first]) if first < last else int(stop)
        for first, last, stop in zip(bounds[:-1], bounds[1:], starts[1:], strict=True)
    ]
    return {
        "input_ids": input_ids,
        "labels": torch.where(torch.from_numpy(supervised), input_ids, IGNORE_INDEX),
        "loss_positions": torch.from_numpy(loss_positions),
        "position_ids": torch.from_numpy(
            np.concatenate([np.arange(first, first + n) for first, n in zip(first_positions, lengths, strict=True)])
        ),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "segment_lengths": lengths,
        "prefix_segments": prefixes,
        "segment_supervised_tokens": np.diff(bounds).tolist(),
        "trailing_tokens": [int(stop) - first for first, stop in zip(first_loss_positions, starts[1:], strict=True)],
    }


def _load_tiles(processor: Processor, records: list[Record], layouts: list[list[TileLayout]]) -> torch.Tensor:
    """Load all tiles: [N, 3, H, W] uint8.

    They are filled record by record, so that memory holds the tiles of only one record in addition to the batch.

    Raises:
        RecordError: an image has changed between its header and its pixels.
    """
    side = processor.images.tile_size
    counts = [_count_tiles(images) for images in layouts]
    tiles = _allocate(sum(counts), 3, side, side)
    start = 0
    for record, count in zip(records, counts, strict=True):
        stacks = processor.load_tiles(record)
        if sum(map(len, stacks)) != count:
            raise RecordError(record.origin, "its image changed while it was read", REMEDY, Fault.changed)
        if stacks:
            np.concatenate(stacks, out=tiles[start : start + count].numpy())
        start += count
    return tiles


def _count_tiles(layouts: list[TileLayout]) -> int:
    return sum(layout.num_tiles for layout in layouts)


def _allocate(*shape: int) -> torch.Tensor:
    """Allocate a uint8 tensor; in a DataLoader worker in memory shared with the trainer, which saves a copy of the batch."""
    if get_worker_info() is None or not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    storage = allocate_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
