"""Rendering of some samples as the model gets them: tokens by kind, image tiles, and boxes."""

from __future__ import annotations

import base64
import io
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw

from lit_vlm.data.index.columns import Index
from lit_vlm.data.processor import Processor
from lit_vlm.data.template import Encoded
from lit_vlm.engine.preflight.facts import BadExample, Picture, Piece, ShownSample
from lit_vlm.evaluation.drawing import ASKED, REFERENCE, draw_boxes, marks_of
from lit_vlm.types import Message, PreferencePair, Record, RecordError, Role, counted

PICTURE_PX = 520  # longest side of an image on the page
MOST_PICTURES = 4  # of one sample
LINE = "#e5484d"  # lines between tiles
MOST_PNG = 60_000  # a larger image is embedded as JPEG


def show_samples(index: Index, processor: Processor, count: int) -> list[ShownSample]:
    """Prepare samples for the page, spread over the sources and over the lengths in each. A sample that became unreadable is skipped."""
    shown = []
    for sample in _chosen(index, count):
        try:
            shown.append(show(index.record(sample), processor))
        except RecordError:
            continue
    return shown


def show(record: Record, processor: Processor) -> ShownSample:
    """Prepare one sample for the page.

    Raises:
        RecordError: one of its images cannot be read any more.
    """
    sequences = processor.sequences(record)
    titles = ("chosen", "rejected") if len(sequences) == 2 else ("",)
    boxed_images, marked = _boxed(record)
    return ShownSample(
        source=record.source,
        origin=record.origin,
        kind=str(record.kind),
        language=str(record.language),
        tokens=sum(sequence.num_tokens for sequence in sequences),
        supervised=sum(sequence.num_supervised for sequence in sequences),
        tiles=sum(layout.num_tiles for layout in processor.layouts(record)),
        segments=[(title, pieces_of(s, processor)) for title, s in zip(titles, sequences, strict=True)],
        pictures=[*boxed_images, *_cut(record, processor)],
        marked=marked,
    )


def pieces_of(encoded: Encoded, processor: Processor) -> list[Piece]:
    """Split a token sequence into pieces of one kind. Their joined texts equal the decoded sequence.

    A piece never ends inside a character: the template encodes supervised and unsupervised text separately.
    """
    controls = set(processor.template.control_ids.values())

    def kind_of(place: int) -> tuple[str, bool]:
        token = int(encoded.input_ids[place])
        kind = "image" if token == processor.image_token_id else "control" if token in controls else "text"
        return kind, bool(encoded.supervised[place])

    pieces: list[Piece] = []
    for (kind, supervised), places in groupby(range(encoded.num_tokens), key=kind_of):
        ids = [int(encoded.input_ids[place]) for place in places]
        runs = [[token] for token in ids] if kind == "control" else [ids]  # one piece for each control token
        pieces += [Piece(_decoded(run, processor), kind, supervised, len(run)) for run in runs]
    return pieces


def bad_examples(errors: list[tuple[str, RecordError]]) -> list[BadExample]:
    """Collect the first record of each fault and source, with the number of such records."""
    first: dict[tuple[str, str], RecordError] = {}
    origins: dict[tuple[str, str], set[str]] = {}
    for source, error in errors:
        key = (source, str(error.fault))
        first.setdefault(key, error)
        origins.setdefault(key, set()).add(error.origin)
    return [
        BadExample(source, fault, len(origins[source, fault]), error.origin, error.reason)
        for (source, fault), error in first.items()
    ]


def _chosen(index: Index, count: int) -> list[int]:
    """Select samples from the sources in turn, spread over the lengths of each, median first."""
    by_source = []
    for number in range(len(index.sources)):
        samples = index.of_source(number)
        if len(samples):
            order = samples[np.argsort(index.tokens[samples], kind="stable")]
            places = dict.fromkeys(int(share * (len(order) - 1)) for share in (0.5, 0.95, 0.2, 0.8, 0.05, 1.0, 0.0))
            by_source.append([int(order[place]) for place in places])
    if len(by_source) > count > 0:  # more sources than samples: spread over the sources
        by_source = [by_source[place] for place in np.linspace(0, len(by_source) - 1, count).astype(int)]
    ordered = [
        samples[round_number] for round_number in range(7) for samples in by_source if round_number < len(samples)
    ]
    return ordered[:count]


def _decoded(ids: list[int], processor: Processor) -> str:
    text = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _messages(record: Record) -> tuple[Message, ...]:
    return (*record.prompt, record.chosen) if isinstance(record, PreferencePair) else record.messages


def _boxed(record: Record) -> tuple[list[Picture], bool]:
    """Draw the first image with all boxes of questions and answers. Returns the images, none if there is no box, and whether there is one."""
    marks = [
        mark
        for message in _messages(record)
        for mark in marks_of(message.text, REFERENCE if message.role is Role.assistant else ASKED)
    ]
    if not marks or not record.images:
        return [], False
    picture = draw_boxes(record.images[0].load(), marks)
    return [Picture(counted(len(marks), "box", "boxes"), inline(picture))], True


def _cut(record: Record, processor: Processor) -> list[Picture]:
    """Draw each image as the vision tower gets it: the base view, and the grid of tiles."""
    pictures = []
    layouts, stacks = processor.layouts(record), processor.tiles(record)
    num_shared = record.num_shown if isinstance(record, PreferencePair) else len(record.images)
    items = zip(range(len(stacks)), record.images, layouts, stacks, strict=True)
    for number, image, layout, tiles in list(items)[:MOST_PICTURES]:
        height, width = image.size
        prefix = "of the rejected answer: " if number >= num_shared else ""
        description = f"{prefix}{width:,} \u00d7 {height:,} pixels, {layout.num_tokens:,} tokens"
        base = Image.fromarray(tiles[0].transpose(1, 2, 0))
        if not layout.rows:
            pictures.append(Picture(f"base view of {description}", inline(base)))
            continue
        grid = _grid(tiles[1:], layout.rows, layout.columns)
        shape = f"{layout.columns} \u00d7 {layout.rows} tile{'s' if layout.rows * layout.columns > 1 else ''}"
        pictures.append(Picture("base view", inline(base)))
        pictures.append(Picture(f"{shape} of {description}", inline(grid)))
    return pictures


def _grid(tiles: np.ndarray, rows: int, columns: int) -> Image.Image:
    """Draw tiles, [N, 3, H, W], as one image with lines between them."""
    side = tiles.shape[2]
    canvas = Image.new("RGB", (columns * side, rows * side))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        canvas.paste(Image.fromarray(tile.transpose(1, 2, 0)), (column * side, row * side))
    canvas = _fitted(canvas)
    pen = ImageDraw.Draw(canvas)
    for column in range(1, columns):
        x = round(column * canvas.width / columns)
        pen.line((x, 0, x, canvas.height), fill=LINE, width=2)
    for row in range(1, rows):
        y = round(row * canvas.height / rows)
        pen.line((0, y, canvas.width, y), fill=LINE, width=2)
    return canvas


def _fitted(picture: Image.Image) -> Image.Image:
    """Resize to a longest side of about `IMAGE_PX`; small images grow by integer factors, so that they stay sharp."""
    longest = max(picture.size)
    if longest > PICTURE_PX:
        picture = picture.copy()
        picture.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
        return picture
    factor = max(1, PICTURE_PX // 2 // longest)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def inline(picture: Image.Image) -> str:
    """Encode an image as a data: URL, PNG or, above `MAX_PNG_BYTES`, JPEG."""
    picture, kind, stream = _fitted(picture.convert("RGB")), "png", io.BytesIO()
    picture.save(stream, "PNG")
    if stream.tell() > MOST_PNG:
        kind, stream = "jpeg", io.BytesIO()
        picture.save(stream, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
