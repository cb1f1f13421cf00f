"""Records become one flat micro-batch: a row of tokens without padding and a stack of tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from lit_vlm.anyres import Layout
from lit_vlm.data.decoding import REMEDY
from lit_vlm.data.processor import Processor
from lit_vlm.data.template import Encoded
from lit_vlm.types import IGNORE_INDEX, Batch, Fault, ImageSlot, PreferencePair, Record, RecordError, Sample


def collate(
    processor: Processor,
    records: list[Record],
    *,
    step: int = 0,
    step_supervised_tokens: int = 0,
    step_tiles: int = 0,
    step_pairs: int = 0,
    step_chosen_tokens: int = 0,
    pixels: bool = True,
) -> Batch:
    """One micro-batch; a blank one when there are no records, which teaches nothing and keeps the ranks in step.

    Samples give one segment each. Pairs give first their prompts, each once, then the chosen answers, then the rejected
    ones (see `Processor.segments`); each image is encoded once.

    Args:
        pixels: False: tiles [N, 3, 0, 0], for somebody who knows already what is seen in them; no image is decoded.
    """
    layouts = [processor.layouts(record) for record in records]
    laid = [processor.segments(record, layouts[i]) for i, record in enumerate(records)]
    pairs = sum(isinstance(record, PreferencePair) for record in records)
    assert pairs in (0, len(records)), "samples and pairs in one micro-batch"
    order = _order(laid, answers=2 if pairs else 1)
    first_image = np.cumsum([0, *(len(record.images) for record in records)])
    images = [int(first_image[i]) + n for i, j in order for n in _images_in(records[i], len(laid[i]), j)]
    return Batch(
        **_row([laid[i][j] for i, j in order], _prefixes(laid, order), processor),
        owners=[i for i, _ in order] or [0],
        tiles=_tiles(processor, records, layouts) if pixels else _empty(sum(map(_count, layouts)), 3, 0, 0),
        layouts=[layout for of_record in layouts for layout in of_record],
        tiles_of_records=[_count(of_record) for of_record in layouts],
        image_index=images,
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


def _order(laid: list[list[Encoded]], answers: int) -> list[tuple[int, int]]:
    """(record, its segment) along the row: what is shared first, then the first answers, then the second ones."""
    shared = [(i, 0) for i, segments in enumerate(laid) if len(segments) > answers]
    return shared + [(i, len(segments) - answers + k) for k in range(answers) for i, segments in enumerate(laid)]


def _prefixes(laid: list[list[Encoded]], order: list[tuple[int, int]]) -> list[int]:
    """The place along the row of the segment that each one continues; -1: none."""
    place = {segment: number for number, segment in enumerate(order)}
    return [place[i, 0] if j and len(laid[i]) == 3 else -1 for i, j in order] or [-1]


def _images_in(record: Record, num_segments: int, segment: int) -> list[int]:
    """Numbers of the record's images that stand in one of its segments, in the order of the text."""
    if num_segments == 3 and segment > 0:
        return []  # in its prompt
    if isinstance(record, Sample):
        return [piece.index for message in record.messages for piece in message.content if isinstance(piece, ImageSlot)]
    first = record.num_shown if record.rejected_images and segment == 1 else 0
    return [
        first + piece.index for message in record.prompt for piece in message.content if isinstance(piece, ImageSlot)
    ]


def _row(segments: list[Encoded], prefixes: list[int], processor: Processor) -> dict[str, Any]:
    if not segments:  # one token that predicts nothing
        pad = processor.tokenizer.pad_token_id or 0
        segments = [Encoded(np.array([pad], dtype=np.int32), np.array([False]))]
    lengths = [segment.num_tokens for segment in segments]
    starts = np.cumsum([0, *lengths])
    input_ids = torch.from_numpy(np.concatenate([segment.input_ids for segment in segments]).astype(np.int64))
    supervised = np.concatenate([segment.supervised for segment in segments])
    supervised[starts[:-1]] = False  # nothing stands before a segment's first token to predict it from
    before = [lengths[prefix] if prefix >= 0 else 0 for prefix in prefixes]
    rows = np.flatnonzero(supervised) - 1
    bounds = np.searchsorted(rows, starts)
    firsts = [
        int(rows[first]) if first < last else int(stop)
        for first, last, stop in zip(bounds[:-1], bounds[1:], starts[1:], strict=True)
    ]
    return {
        "input_ids": input_ids,
        "labels": torch.where(torch.from_numpy(supervised), input_ids, IGNORE_INDEX),
        "rows": torch.from_numpy(rows),
        "position_ids": torch.from_numpy(
            np.concatenate([np.arange(first, first + n) for first, n in zip(before, lengths, strict=True)])
        ),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "lengths": lengths,
        "prefixes": prefixes,
        "supervised": np.diff(bounds).tolist(),
        "tails": [int(stop) - first for first, stop in zip(firsts, starts[1:], strict=True)],
    }


def _tiles(processor: Processor, records: list[Record], layouts: list[list[Layout]]) -> torch.Tensor:
    """[N, 3, H, W] uint8, filled record by record: beside the micro-batch only one record's tiles are ever held.

    Raises:
        RecordError: an image has changed between its header and its pixels.
    """
    side = processor.images.tile_size
    counts = [_count(images) for images in layouts]
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


def _count(layouts: list[Layout]) -> int:
    return sum(layout.num_tiles for layout in layouts)


def _empty(*shape: int) -> torch.Tensor:
    """uint8, in a loader's worker in the memory that it shares with the trainer, which saves a copy of the batch."""
    if get_worker_info() is None or not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
