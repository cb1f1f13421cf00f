"""Regions of a label: a text or phrase each, with its box as fractions of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_vlm.config.mapping import BoxFormat, BoxUnit, MappingConfig, RegionTask
from lit_vlm.data.markup import char, obj
from lit_vlm.data.readers.fields import Scope, Template, number
from lit_vlm.types import Box, Content, Fault, ImageSource

_LEAST_INSIDE = 0.5  # share of a box that must lie in the picture; what runs over an edge is cut off there


def read_regions(scope: Scope, mapping: MappingConfig, text: Template, image: ImageSource) -> tuple[Content, ...]:
    """The regions as an answer writes them: for ocr every text a line, else the phrases with their boxes.

    Raises:
        RecordError: no region is left, one has no text, or its box is none or lies outside of the picture.
    """
    assert mapping.regions is not None
    every = [] if scope.value(mapping.regions) == [] else scope.items(mapping.regions)
    chosen = [item for item in every if _wanted(item, mapping)]
    if not chosen:
        left = "is left after mapping.keep and mapping.skip" if every else "is there"
        raise scope.place.fault(f"no item of {mapping.regions} {left}, so nothing would be answered", Fault.no_answer)
    size = _size(scope, mapping, image)
    found = [(_phrase(item, text), _box(item, mapping, size)) for item in chosen]
    if mapping.task is RegionTask.ocr:
        lines = [char(phrase, box) for phrase, box in found]
        return tuple(piece for number, line in enumerate(lines) for piece in (*(("\n",) if number else ()), *line))
    boxes: dict[str, list[Box]] = {}
    for phrase, box in found:
        boxes.setdefault(phrase, []).append(box)
    mentions = [obj(phrase, places) for phrase, places in boxes.items()]
    return tuple(piece for number, line in enumerate(mentions) for piece in (*((", ",) if number else ()), *line))


def _wanted(item: Scope, mapping: MappingConfig) -> bool:
    """A path of `keep` has one of the values that it is named with, and none of `skip` has its own."""
    kept: dict[str, set[str]] = {}
    for condition in mapping.keep:
        path, _, value = condition.partition("=")
        kept.setdefault(path, set()).add(value)
    skipped = [condition.partition("=")[::2] for condition in mapping.skip]
    if any(str(item.value(path)) == value for path, value in skipped):
        return False
    return all(str(item.value(path)) in values for path, values in kept.items())


def _phrase(item: Scope, text: Template) -> str:
    pieces = item.place.pieces(item.text(text).strip())
    if not pieces:
        raise item.place.fault(f"{item.name} has no text")
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _size(scope: Scope, mapping: MappingConfig, image: ImageSource) -> tuple[float, float]:
    """(width, height) that boxes are measured in."""
    if mapping.box_unit is BoxUnit.fractions:
        return 1.0, 1.0
    if not mapping.size:
        pixels = image.size
        return float(pixels[1]), float(pixels[0])
    width, height = (scope.number(path) for path in mapping.size)
    if width <= 0 or height <= 0:
        raise scope.place.fault(f"{', '.join(mapping.size)} are {width:g}, {height:g}; a picture is larger")
    return width, height


def _box(item: Scope, mapping: MappingConfig, size: tuple[float, float]) -> Box:
    x1, y1, x2, y2 = corners = _corners(item, mapping)
    width, height = size
    left, right, top, bottom = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    inside = Box(max(left, 0) / width, max(top, 0) / height, min(right, width) / width, min(bottom, height) / height)
    area = (inside.x2 - inside.x1) * width * (inside.y2 - inside.y1) * height if inside.x2 > inside.x1 else 0.0
    if not area > 0 or area < _LEAST_INSIDE * (right - left) * (bottom - top) or inside.y2 <= inside.y1:
        found = ", ".join(f"{value:g}" for value in corners)
        reason = f"{item.name} has the corners {found}, which are no box inside of {width:g} x {height:g}"
        raise item.place.fault(reason)
    return inside


def _corners(item: Scope, mapping: MappingConfig) -> tuple[float, float, float, float]:
    path, place = ", ".join(mapping.box), item.place
    if mapping.box_format is BoxFormat.polygon:
        xs, ys = _points(item, mapping.box)
        return min(xs), min(ys), max(xs), max(ys)
    values = [item.value(path) for path in mapping.box] if len(mapping.box) == 4 else item.value(path)
    numbers = _numbers(values, path, item)
    if len(numbers) == 4:
        x, y, a, b = numbers
        return (x, y, x + a, y + b) if mapping.box_format is BoxFormat.xywh else (x, y, a, b)
    raise place.fault(f"{path} of {item.name} has {len(numbers)} numbers; a box has 4", Fault.malformed)


def _points(item: Scope, paths: Sequence[str]) -> tuple[list[float], list[float]]:
    """x and y of each corner."""
    if len(paths) == 2:
        xs, ys = (_numbers(item.value(path), path, item) for path in paths)
    else:
        values = item.place.items(item.value(paths[0]), paths[0])
        if isinstance(values[0], dict):
            values = [[_of(value, axis, paths[0], item) for axis in "xy"] for value in values]
        flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
        numbers = _numbers(flat, paths[0], item)
        xs, ys = numbers[::2], numbers[1::2]
    if len(xs) != len(ys) or len(xs) < 2:
        raise item.place.fault(f"{', '.join(paths)} of {item.name} has {len(xs)} x and {len(ys)} y; corners have both")
    return xs, ys


def _of(value: Any, axis: str, path: str, item: Scope) -> Any:
    if not isinstance(value, dict) or axis not in value:
        raise item.place.fault(f"a corner in {path} of {item.name} has no {axis!r}")
    return value[axis]


def _numbers(values: Any, path: str, item: Scope) -> list[float]:
    return [number(value, path, item.place) for value in item.place.items(values, f"{path} of {item.name}")]
