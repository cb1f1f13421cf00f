"""Settings of `format=mapped`, which convert labels of another structure to conversations.

A *path* leads into a record: `image.identifier`, `regions.0.class`. A *template* is text with paths in braces:
`{@folder}/{image.identifier}`. Variables with @ describe the label file: {@name} (a.json), {@stem} (a), {@folder} (its folder)
and {@path} (from the root of the zip file or the source). Inside turns and regions a path is resolved in the item first; if
the item has no such key, in the record. Examples are in `conf/data/source/aihub_*.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from string import Formatter

from lit_vlm.formatting import end_sentence
from lit_vlm.types import find_nearest, format_suggestion


class BoxFormat(Enum):
    xyxy = "xyxy"  # left, top, right, bottom; swapped corners are sorted
    xywh = "xywh"  # left, top, width, height
    polygon = "polygon"  # [[x, y], ...], [{x, y}, ...] or [x, y, x, y, ...]; or two paths, to all x and to all y


class BoxUnit(Enum):
    pixels = "pixels"  # pixels of the image, whose size comes from `size` or its header
    fractions = "fractions"  # fractions of the image's width and height, 0 to 1


class BoxFrame(Enum):
    """Orientation in which boxes are measured if EXIF rotates an image."""

    auto = "auto"  # derived from `size`; the record is rejected if that is ambiguous
    upright = "upright"  # the image after rotation, as it is displayed
    stored = "stored"  # the pixels in the file, before rotation


class RegionTask(Enum):
    ocr = "ocr"  # the question has <ocr>, the answer every text with its box, one per line (VARCO-VISION)
    grounding = "grounding"  # the question has <gro>, the answer has boxes: <obj>phrase</obj> with its boxes
    referring = "referring"  # the question has boxes, the answer is text


@dataclass(kw_only=True, slots=True)
class MappingConfig:
    """Location of records, images, questions, answers and boxes in a label file."""

    labels: str | None = "*.json"  # name pattern of label files, in folders or zips; null: each image is a record
    records: str | None = None  # path of the list of records in a label file, "." if it is a list; null: one record
    join: str | None = None  # path of a second list (COCO's annotations); its items are joined to their records
    join_item: str = "image_id"  # key of an item that refers to its record
    join_record: str = "id"  # key of the record that join_item refers to
    id: str | None = None  # template of the record's id; null: its position
    image: str | None = None  # template of the image's path or name; null: the label file's, with an image extension
    turns: str | None = None  # path of the list of questions and answers; null: one question and one answer
    questions: list[str] = field(default_factory=list)  # templates; one is chosen by digest; empty: source prompts
    answer: str | None = None  # template; {@regions} is replaced by the regions
    regions: str | None = None  # path of the list of boxes
    task: RegionTask = RegionTask.ocr  # use of the regions
    text: str | None = None  # template of a region's text or phrase
    box: list[str] = field(default_factory=list)  # path of a region's box, or paths of its four numbers
    box_format: BoxFormat = BoxFormat.xyxy
    box_unit: BoxUnit = BoxUnit.pixels
    box_frame: BoxFrame = BoxFrame.auto  # orientation in which boxes are measured if EXIF rotates an image
    size: list[str] = field(default_factory=list)  # paths of the image's width and height; empty: from its header
    keep: list[str] = field(default_factory=list)  # path=value, e.g. attributes.class=word: keep only these regions
    skip: list[str] = field(default_factory=list)  # path=value: leave out these regions


FILE_VARIABLES = ("@path", "@name", "@stem", "@folder")
REGIONS_VARIABLE = "@regions"


def split_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs (text, path after the text or None).

    Raises:
        ValueError: an open brace, or an unknown variable with @.
    """
    parts = []
    for text, path, format_spec, conversion in Formatter().parse(template):
        if format_spec or conversion or path == "":
            raise ValueError("a path alone belongs between braces; braces of the text are doubled: {{ }}")
        if path is not None and path.startswith("@") and path not in (*FILE_VARIABLES, REGIONS_VARIABLE):
            known = (*FILE_VARIABLES, REGIONS_VARIABLE)
            nearest = find_nearest(path, known)
            hint = format_suggestion(nearest and f"{{{nearest}}}")
            raise ValueError(f"there is no {{{path}}}. There are {', '.join(known)}.{hint}")
        parts.append((text, path))
    return parts


def find_mapping_errors(key: str, mapping: MappingConfig) -> Iterator[str]:
    """Yield the errors of a mapping that no label file can satisfy, each with its setting.

    Args:
        key: key of the mapping.
    """
    single_templates = {name: getattr(mapping, name) for name in ("id", "image", "answer", "text")}
    templates = {**single_templates, **{f"questions[{number}]": text for number, text in enumerate(mapping.questions)}}
    names_with_regions = []
    for name, template in templates.items():
        try:
            paths = [path for _, path in split_template(template or "")]
        except ValueError as error:
            yield f"{key}.{name}: {end_sentence(str(error))}"
            continue
        if REGIONS_VARIABLE in paths:
            names_with_regions.append(name.partition("[")[0])
            if name in ("id", "image", "text"):
                yield f"{key}.{name}: {{{REGIONS_VARIABLE}}} stands in questions and answer only."
    if names_with_regions and mapping.regions is None:
        yield f"{key}.regions is not set, and {names_with_regions[0]} has {{{REGIONS_VARIABLE}}}: give the path of the list of boxes."
    if mapping.answer is None and (mapping.regions is None or mapping.task is RegionTask.referring):
        yield f"{key}.answer is not set: give its template, e.g. '{{answer}}'."
    if mapping.labels is None and (mapping.records is not None or mapping.image is not None):
        yield f"{key}: with labels=null each picture is a record; records and image must go."
    if mapping.join is not None and mapping.records is None:
        yield f"{key}.records is not set: join={mapping.join} needs the list of records (COCO: images)."
    if len(mapping.size) not in (0, 2):
        yield f"{key}.size: two paths are needed, of width and height, or none; found {len(mapping.size)}."
    if mapping.regions is not None:
        yield from _find_region_errors(key, mapping, names_with_regions)


def _find_region_errors(key: str, mapping: MappingConfig, names_with_regions: list[str]) -> Iterator[str]:
    allowed = (1, 2) if mapping.box_format is BoxFormat.polygon else (1, 4)
    if len(mapping.box) not in allowed:
        needed = f"{allowed[0]} or {allowed[1]} paths are needed for box_format={mapping.box_format.value}"
        yield f"{key}.box: {needed}, found {len(mapping.box)}."
    for name in ("keep", "skip"):
        for condition in getattr(mapping, name):
            if not all(condition.partition("=")[::2]):
                yield f"{key}.{name}: {condition!r} is no path=value, e.g. attributes.class=word."
    if mapping.text is None:
        yield f"{key}.text is not set: give the template of a region's text, e.g. '{{text}}'."
    template_name = "questions" if mapping.task is RegionTask.referring else "answer"
    if template_name not in names_with_regions and getattr(mapping, template_name):
        yield f"{key}.{template_name}: with task={mapping.task.value} {{{REGIONS_VARIABLE}}} must stand in it, where the regions go."
    if mapping.task is RegionTask.referring and not mapping.questions:
        yield f"{key}.questions is not set: task=referring needs questions with {{{REGIONS_VARIABLE}}}."
