"""Rendering of some samples as the model gets them: tokens by kind, image tiles, and boxes."""

from __future__ import annotations

import base64
import io
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw

from lit_vlm.data.chat_template import TokenSequence
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.box_drawing import ASKED, REFERENCE, draw_boxes, parse_box_marks
from lit_vlm.formatting import format_count
from lit_vlm.reports.preflight.facts import BadRecordExample, PromptPiece, SampleImage, ShownSample
from lit_vlm.types import Message, PreferencePair, Record, RecordError, Role

IMAGE_PX = 520  # longest side of an image on the page
MAX_IMAGES = 4  # of one sample
GRID_COLOUR = "#e5484d"  # lines between tiles
MAX_PNG_BYTES = 60_000  # a larger image is embedded as JPEG


def prepare_samples(index: SampleIndex, processor: Processor, count: int) -> list[ShownSample]:
    """Prepare samples for the page, spread over the sources and over the lengths in each. A sample that became unreadable is skipped."""
    shown = []
    for sample in _select_samples(index, count):
        try:
            shown.append(prepare_sample(index.get_record(sample), processor))
        except RecordError:
            continue
    return shown


def prepare_sample(record: Record, processor: Processor) -> ShownSample:
    """Prepare one sample for the page.

    Raises:
        RecordError: one of its images cannot be read any more.
    """
    sequences = processor.encode_sequences(record)
    titles = ("chosen", "rejected") if len(sequences) == 2 else ("",)
    boxed_images, marked = _draw_boxed_image(record)
    return ShownSample(
        source=record.source,
        origin=record.origin,
        kind=str(record.kind),
        language=str(record.language),
        tokens=sum(sequence.num_tokens for sequence in sequences),
        supervised=sum(sequence.num_supervised for sequence in sequences),
        tiles=sum(layout.num_tiles for layout in processor.compute_layouts(record)),
        segments=[(title, split_prompt(s, processor)) for title, s in zip(titles, sequences, strict=True)],
        pictures=[*boxed_images, *_draw_tiles(record, processor)],
        marked=marked,
    )


def split_prompt(encoded: TokenSequence, processor: Processor) -> list[PromptPiece]:
    """Split a token sequence into pieces of one kind. Their joined texts equal the decoded sequence.

    A piece never ends inside a character: the template encodes supervised and unsupervised text separately.
    """
    controls = set(processor.template.control_ids.values())

    def get_kind(place: int) -> tuple[str, bool]:
        token = int(encoded.input_ids[place])
        kind = "image" if token == processor.image_token_id else "control" if token in controls else "text"
        return kind, bool(encoded.supervised[place])

    pieces: list[PromptPiece] = []
    for (kind, supervised), places in groupby(range(encoded.num_tokens), key=get_kind):
        ids = [int(encoded.input_ids[place]) for place in places]
        runs = [[token] for token in ids] if kind == "control" else [ids]  # one piece for each control token
        pieces += [PromptPiece(_decode(run, processor), kind, supervised, len(run)) for run in runs]
    return pieces


def collect_bad_examples(errors: list[tuple[str, RecordError]]) -> list[BadRecordExample]:
    """Collect the first record of each fault and source, with the number of such records."""
    first: dict[tuple[str, str], RecordError] = {}
    origins: dict[tuple[str, str], set[str]] = {}
    for source, error in errors:
        key = (source, str(error.fault))
        first.setdefault(key, error)
        origins.setdefault(key, set()).add(error.origin)
    return [
        BadRecordExample(source, fault, len(origins[source, fault]), error.origin, error.reason)
        for (source, fault), error in first.items()
    ]


def _select_samples(index: SampleIndex, count: int) -> list[int]:
    """Select samples from the sources in turn, spread over the lengths of each, median first."""
    by_source = []
    for number in range(len(index.sources)):
        samples = index.find_source_samples(number)
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


def _decode(ids: list[int], processor: Processor) -> str:
    text = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _get_messages(record: Record) -> tuple[Message, ...]:
    return (*record.prompt, record.chosen) if isinstance(record, PreferencePair) else record.messages


def _draw_boxed_image(record: Record) -> tuple[list[SampleImage], bool]:
    """Draw the first image with all boxes of questions and answers. Returns the images, none if there is no box, and whether there is one."""
    marks = [
        mark
        for message in _get_messages(record)
        for mark in parse_box_marks(message.text, REFERENCE if message.role is Role.assistant else ASKED)
    ]
    if not marks or not record.images:
        return [], False
    picture = draw_boxes(record.images[0].load(), marks)
    return [SampleImage(format_count(len(marks), "box", "boxes"), encode_data_url(picture))], True


def _draw_tiles(record: Record, processor: Processor) -> list[SampleImage]:
    """Draw each image as the vision tower gets it: the base view, and the grid of tiles."""
    pictures = []
    layouts, stacks = processor.compute_layouts(record), processor.load_tiles(record)
    num_shared = record.num_prompt_images if isinstance(record, PreferencePair) else len(record.images)
    items = zip(range(len(stacks)), record.images, layouts, stacks, strict=True)
    for number, image, layout, tiles in list(items)[:MAX_IMAGES]:
        height, width = image.size
        prefix = "of the rejected answer: " if number >= num_shared else ""
        description = f"{prefix}{width:,} \u00d7 {height:,} pixels, {layout.num_tokens:,} tokens"
        base = Image.fromarray(tiles[0].transpose(1, 2, 0))
        if not layout.rows:
            pictures.append(SampleImage(f"base view of {description}", encode_data_url(base)))
            continue
        grid = _draw_grid(tiles[1:], layout.rows, layout.columns)
        shape = f"{layout.columns} \u00d7 {layout.rows} tile{'s' if layout.rows * layout.columns > 1 else ''}"
        pictures.append(SampleImage("base view", encode_data_url(base)))
        pictures.append(SampleImage(f"{shape} of {description}", encode_data_url(grid)))
    return pictures


def _draw_grid(tiles: np.ndarray, rows: int, columns: int) -> Image.Image:
    """Draw tiles, [N, 3, H, W], as one image with lines between them."""
    side = tiles.shape[2]
    canvas = Image.new("RGB", (columns * side, rows * side))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        canvas.paste(Image.fromarray(tile.transpose(1, 2, 0)), (column * side, row * side))
    canvas = _resize_image(canvas)
    pen = ImageDraw.Draw(canvas)
    for column in range(1, columns):
        x = round(column * canvas.width / columns)
        pen.line((x, 0, x, canvas.height), fill=GRID_COLOUR, width=2)
    for row in range(1, rows):
        y = round(row * canvas.height / rows)
        pen.line((0, y, canvas.width, y), fill=GRID_COLOUR, width=2)
    return canvas


def _resize_image(image: Image.Image) -> Image.Image:
    """Resize to a longest side of about `IMAGE_PX`; small images grow by integer factors, so that they stay sharp."""
    longest = max(image.size)
    if longest > IMAGE_PX:
        image = image.copy()
        image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
        return image
    factor = max(1, IMAGE_PX // 2 // longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def encode_data_url(image: Image.Image) -> str:
    """Encode an image as a data: URL, PNG or, above `MAX_PNG_BYTES`, JPEG."""
    image, kind, stream = _resize_image(image.convert("RGB")), "png", io.BytesIO()
    image.save(stream, "PNG")
    if stream.tell() > MAX_PNG_BYTES:
        kind, stream = "jpeg", io.BytesIO()
        image.save(stream, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
