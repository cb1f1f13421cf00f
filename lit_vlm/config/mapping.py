"""How labels of another structure become conversations: the settings of `format=mapped`.

A *path* leads into a record: `image.identifier`, `regions.0.class`. A *template* is text with paths in braces:
`{@folder}/{image.identifier}`. Words with @ are about the label file itself: {@name} (a.json), {@stem} (a), {@folder}
(the folder it is in) and {@path} (from the zip's or the source's root). Within turns and regions a path starts at the
item and, where that has no such key, at the record. `conf/data/source/aihub_*.yaml` show mappings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from string import Formatter


class BoxFormat(Enum):
    xyxy = "xyxy"  # left, top, right, bottom; corners that are swapped are put in order
    xywh = "xywh"  # left, top, width, height
    polygon = "polygon"  # [[x, y], ...], [{x, y}, ...] or [x, y, x, y, ...]; two paths: all x and all y


class BoxUnit(Enum):
    pixels = "pixels"  # of the picture that `size` or its header tells
    fractions = "fractions"  # of the picture's width and height, 0 to 1


class BoxFrame(Enum):
    """What boxes are measured on where EXIF turns a picture."""

    auto = "auto"  # what `size` tells; where it cannot tell, the record is refused
    upright = "upright"  # the picture as it is shown
    stored = "stored"  # the pixels as the file has them, before they are turned


class RegionTask(Enum):
    ocr = "ocr"  # asked with <ocr>, answered with every text and its box, a line each (VARCO-VISION)
    grounding = "grounding"  # asked with <gro>, the answer points: <obj>phrase</obj> with its boxes
    referring = "referring"  # the question points, the answer is text


@dataclass(kw_only=True, slots=True)
class MappingConfig:
    """Where records, pictures, questions, answers and boxes are in a label file."""

    labels: str | None = "*.json"  # names of the label files, in folders or zips; null: none, each picture is a record
    records: str | None = None  # path of a label file's list of records, "." where it is the list; null: it is one
    join: str | None = None  # path of a second list (COCO's annotations); each record gets the items that name it
    join_item: str = "image_id"  # key of those items that names a record ...
    join_record: str = "id"  # ... by this key of it
    id: str | None = None  # template of the record's id; null: its place
    image: str | None = None  # template of the picture's path or name; null: the label file's, with a picture's ending
    turns: str | None = None  # path of the list of questions and answers; null: one of each
    questions: list[str] = field(default_factory=list)  # templates, one is taken by digest; empty: the source's prompts
    answer: str | None = None  # template; {@regions} stands for the regions
    regions: str | None = None  # path of the list of boxes
    task: RegionTask = RegionTask.ocr  # what the regions are for
    text: str | None = None  # template of a region's text or phrase
    box: list[str] = field(default_factory=list)  # path of a region's box, or paths of its four numbers
    box_format: BoxFormat = BoxFormat.xyxy
    box_unit: BoxUnit = BoxUnit.pixels
    box_frame: BoxFrame = BoxFrame.auto  # what boxes are measured on where EXIF turns a picture
    size: list[str] = field(default_factory=list)  # paths of the picture's width and height; empty: by its header
    keep: list[str] = field(default_factory=list)  # path=value, e.g. attributes.class=word: other regions are left out
    skip: list[str] = field(default_factory=list)  # path=value: these regions are left out


FILE_WORDS = ("@path", "@name", "@stem", "@folder")
REGIONS = "@regions"


def parts_of(template: str) -> list[tuple[str, str | None]]:
    """A template as (text, path behind it or None). ValueError for an open brace or an unknown word with @."""
    parts = []
    for text, path, how, conversion in Formatter().parse(template):
        if how or conversion or path == "":
            raise ValueError("a path alone belongs between braces; braces of the text are doubled: {{ }}")
        if path is not None and path.startswith("@") and path not in (*FILE_WORDS, REGIONS):
            close = difflib.get_close_matches(path, [*FILE_WORDS, REGIONS], n=1)
            hint = f"; did you mean {{{close[0]}}}?" if close else ""
            raise ValueError(f"there is no {{{path}}}{hint} There are {', '.join((*FILE_WORDS, REGIONS))}")
        parts.append((text, path))
    return parts


def mistakes_in_mapping(key: str, mapping: MappingConfig) -> Iterator[str]:
    """What no label file could make right, each with its setting. `key` is that of the mapping."""
    singles = {name: getattr(mapping, name) for name in ("id", "image", "answer", "text")}
    templates = {**singles, **{f"questions[{number}]": text for number, text in enumerate(mapping.questions)}}
    pointing = []
    for name, template in templates.items():
        try:
            found = [path for _, path in parts_of(template or "")]
        except ValueError as error:
            yield f"{key}.{name}: {error}."
            continue
        if REGIONS in found:
            pointing.append(name.partition("[")[0])
            if name in ("id", "image", "text"):
                yield f"{key}.{name}: {{{REGIONS}}} stands in questions and answer only."
    if pointing and mapping.regions is None:
        yield f"{key}.regions is not set, and {pointing[0]} has {{{REGIONS}}}: give the path of the list of boxes."
    if mapping.answer is None and (mapping.regions is None or mapping.task is RegionTask.referring):
        yield f"{key}.answer is not set: give its template, e.g. '{{answer}}'."
    if mapping.labels is None and (mapping.records is not None or mapping.image is not None):
        yield f"{key}: with labels=null each picture is a record; records and image must go."
    if mapping.join is not None and mapping.records is None:
        yield f"{key}.records is not set: join={mapping.join} needs the list of records (COCO: images)."
    if len(mapping.size) not in (0, 2):
        yield f"{key}.size: two paths are needed, of width and height, or none; found {len(mapping.size)}."
    if mapping.regions is not None:
        yield from _mistakes_in_regions(key, mapping, pointing)


def _mistakes_in_regions(key: str, mapping: MappingConfig, pointing: list[str]) -> Iterator[str]:
    numbers = (1, 2) if mapping.box_format is BoxFormat.polygon else (1, 4)
    if len(mapping.box) not in numbers:
        found = f"{numbers[0]} or {numbers[1]} paths are needed for box_format={mapping.box_format.value}"
        yield f"{key}.box: {found}, found {len(mapping.box)}."
    for name in ("keep", "skip"):
        for condition in getattr(mapping, name):
            if not all(condition.partition("=")[::2]):
                yield f"{key}.{name}: {condition!r} is no path=value, e.g. attributes.class=word."
    if mapping.text is None:
        yield f"{key}.text is not set: give the template of a region's text, e.g. '{{text}}'."
    place = "questions" if mapping.task is RegionTask.referring else "answer"
    if place not in pointing and getattr(mapping, place):
        yield f"{key}.{place}: with task={mapping.task.value} {{{REGIONS}}} must stand in it, where the regions go."
    if mapping.task is RegionTask.referring and not mapping.questions:
        yield f"{key}.questions is not set: task=referring needs questions with {{{REGIONS}}}."
