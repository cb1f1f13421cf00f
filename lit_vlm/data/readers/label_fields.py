"""Look-up of a mapping's paths and templates in one record."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_vlm.config.mapping import (
    REGIONS_VARIABLE,
    BoxFormat,
    BoxFrame,
    BoxUnit,
    MappingConfig,
    RegionTask,
    split_template,
)
from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.markup import build_object_mention, build_text_mention
from lit_vlm.data.readers.context import RecordContext, describe_type
from lit_vlm.data.readers.file_catalogue import FileName
from lit_vlm.formatting import end_sentence
from lit_vlm.types import Box, ContentPart, Fault, LazyImage, UserError

Template = Sequence[tuple[str, str | None]]


def parse_template(text: str, setting: str) -> Template:
    """Parse a template into (literal, path) pairs; raise a UserError that names the setting if it is malformed."""
    try:
        return split_template(text)
    except ValueError as error:
        raise UserError(f"{setting}: {end_sentence(str(error))}") from None


@dataclass(frozen=True, slots=True)
class FieldScope:
    """Scope in which paths are looked up: an item of a list, then the record around it.

    All errors are RecordErrors of `context`.
    """

    values: Any
    file: FileName
    context: RecordContext
    name: str = "the record"
    record: FieldScope | None = None

    def make_item_scope(self, value: Any, name: str) -> FieldScope:
        """Make the scope of one item, inside of this one."""
        return FieldScope(value, self.file, self.context, name, self)

    def get_items(self, path: str) -> list[FieldScope]:
        """Return a scope for each item of the list at `path`, which must not be empty."""
        values = self.context.require_list(self.get_value(path), path)
        return [self.make_item_scope(value, f"{path}[{number}]") for number, value in enumerate(values)]

    def get_value(self, path: str) -> Any:
        """Return the value at a path, e.g. `annotations.0.text`.

        If the first key is missing here, the whole path is looked up in the record around this item.

        Raises:
            RecordError: names the path and the keys that were found instead.
        """
        if path.startswith("@"):
            return getattr(self.file, path[1:])
        value, parts = self.values, path.split(".")
        for number, part in enumerate(parts):
            key = _find_key(value, part)
            if key is None:
                if number == 0 and self.record is not None:
                    return self.record.get_value(path)
                parent_path = ".".join(parts[:number]) or self.name
                raise self.context.make_error(f"there is no {path!r}: {parent_path} {_describe_keys(value)}")
            value = value[key]
        return value

    def render_text(self, template: Template) -> str:
        """Render the template as text; numbers are written as text."""
        return "".join(literal + ("" if path is None else self._format_value(path)) for literal, path in template)

    def render_content(self, template: Template, regions: Sequence[ContentPart] = ()) -> tuple[ContentPart, ...]:
        """Render the template as content pieces, with `regions` in place of {@regions}."""
        content: tuple[ContentPart, ...] = ()
        text = ""
        for literal, path in template:
            text += literal
            if path == REGIONS_VARIABLE:
                content += (*self.context.parse_text(text), *regions)
                text = ""
            elif path is not None:
                text += self._format_value(path)
        return content + self.context.parse_text(text)

    def get_number(self, path: str) -> float:
        """Return the finite number at a path."""
        return parse_number(self.get_value(path), path, self.context)

    def _format_value(self, path: str) -> str:
        value = self.get_value(path)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return self.context.require_text(value, path)


def parse_number(value: Any, path: str, context: RecordContext) -> float:
    """Parse a finite number, or raise a RecordError. Some labels write numbers as text."""
    try:
        parsed = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        parsed = None
    if parsed is None or parsed - parsed != 0:  # infinity and nan
        raise context.make_error(f"{path} is {format_untrusted(value, 40)}; it must be a number")
    return parsed


def _find_key(value: Any, part: str) -> str | int | None:
    """Find the key or index that a path's part names. Keys of labels may be in another Unicode normal form."""
    if isinstance(value, Mapping):
        if part in value:
            return part
        wanted = unicodedata.normalize("NFC", part)
        return next((key for key in value if unicodedata.normalize("NFC", key) == wanted), None)
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return int(part)
    return None


def _describe_keys(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(format_untrusted(key, 40) for key in list(value)[:12]) + (", ..." if len(value) > 12 else "")
        return f"has the keys {keys}" if value else "has no keys"
    return f"has {len(value)} items" if isinstance(value, list) else f"is {describe_type(value)}"


_MIN_INSIDE_SHARE = 0.5  # share of a box's area that must lie inside the image; the part outside is clipped


def read_regions(
    scope: FieldScope, mapping: MappingConfig, text: Template, image: LazyImage
) -> tuple[ContentPart, ...]:
    """Read the regions as content pieces of an answer: for ocr one text a line, else the phrases with their boxes.

    Raises:
        RecordError: no region is left, one has no text, or its box is empty or lies outside of the image.
    """
    assert mapping.regions is not None
    all_items = [] if scope.get_value(mapping.regions) == [] else scope.get_items(mapping.regions)
    items = [item for item in all_items if _should_keep(item, mapping)]
    if not items:
        state = "is left after mapping.keep and mapping.skip" if all_items else "is there"
        raise scope.context.make_error(
            f"no item of {mapping.regions} {state}, so nothing would be answered", Fault.no_answer
        )
    frame = _resolve_frame(scope, mapping, image)
    regions = [(_get_phrase(item, text), _read_box(item, mapping, frame)) for item in items]
    if mapping.task is RegionTask.ocr:
        lines = [build_text_mention(phrase, box) for phrase, box in regions]
        return tuple(piece for number, line in enumerate(lines) for piece in (*(("\n",) if number else ()), *line))
    boxes: dict[str, list[Box]] = {}
    for phrase, box in regions:
        boxes.setdefault(phrase, []).append(box)
    mentions = [build_object_mention(phrase, phrase_boxes) for phrase, phrase_boxes in boxes.items()]
    return tuple(piece for number, line in enumerate(mentions) for piece in (*((", ",) if number else ()), *line))


def _should_keep(item: FieldScope, mapping: MappingConfig) -> bool:
    """Return True if the item matches `mapping.keep` and no condition of `mapping.skip`.

    For each path in `keep`, the item must have one of the values given for it.
    """
    allowed: dict[str, set[str]] = {}
    for condition in mapping.keep:
        path, _, value = condition.partition("=")
        allowed.setdefault(path, set()).add(value)
    excluded = [condition.partition("=")[::2] for condition in mapping.skip]
    if any(str(item.get_value(path)) == value for path, value in excluded):
        return False
    return all(str(item.get_value(path)) in values for path, values in allowed.items())


def _get_phrase(item: FieldScope, text: Template) -> str:
    pieces = item.context.parse_text(item.render_text(text).strip())
    if not pieces:
        raise item.context.make_error(f"{item.name} has no text")
    return "".join(piece for piece in pieces if isinstance(piece, str))


@dataclass(frozen=True, slots=True)
class CoordinateFrame:
    """Coordinate frame of the boxes: width and height, and the EXIF orientation if boxes refer to the stored pixels."""

    width: float
    height: float
    orientation: int = 1

    def to_upright(self, box: Box) -> Box:
        """Convert a box from fractions of this frame to fractions of the upright image."""
        transform = _TO_UPRIGHT[self.orientation]
        (x1, y1), (x2, y2) = transform(box.x1, box.y1), transform(box.x2, box.y2)
        return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


# EXIF orientation -> function from a point (x, y) of the stored pixels to the upright image, both as fractions.
_TO_UPRIGHT: dict[int, Callable[[float, float], tuple[float, float]]] = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x),
}


def _resolve_frame(scope: FieldScope, mapping: MappingConfig, image: LazyImage) -> CoordinateFrame:
    """Resolve the frame in which the boxes are measured.

    Raises:
        RecordError: the label's size does not fit the image, or EXIF rotates the image and nothing shows whether the
            boxes are rotated too.
    """
    height, width = image.size
    orientation = int(getattr(image, "orientation", 1))
    is_rotated = orientation in (5, 6, 7, 8)
    stored = (height, width) if is_rotated else (width, height)
    label_size = tuple(scope.get_number(path) for path in mapping.size)
    if label_size and min(label_size) <= 0:
        raise scope.context.make_error(
            f"{', '.join(mapping.size)} are {label_size[0]:g}, {label_size[1]:g}; a picture is larger"
        )
    fits = {BoxFrame.upright: not label_size or _is_same_up_to_scale(label_size, (width, height))}
    fits[BoxFrame.stored] = not label_size or _is_same_up_to_scale(label_size, stored)
    frame = mapping.box_frame
    if frame is BoxFrame.auto:
        frame = BoxFrame.upright if orientation == 1 or not fits[BoxFrame.stored] else BoxFrame.stored
        if orientation != 1 and all(fits.values()):
            reason = f"EXIF turns the picture (orientation {orientation}), and nothing tells whether the boxes are turned too"
            raise scope.context.make_error(
                f"{reason}; set mapping.box_frame=upright, or stored for those of the file's pixels"
            )
    if not fits[frame]:
        found = (
            f"the label says {label_size[0]:g} x {label_size[1]:g} pixels, and the picture has {width:,} x {height:,}"
        )
        exif_note = f", turned by EXIF from {stored[0]:,} x {stored[1]:,}" if orientation != 1 else ""
        raise scope.context.make_error(f"{found}{exif_note}: its boxes are of another picture")
    frame_orientation = orientation if frame is BoxFrame.stored else 1
    if mapping.box_unit is BoxUnit.fractions:
        return CoordinateFrame(1.0, 1.0, frame_orientation)
    size = label_size or (stored if frame is BoxFrame.stored else (width, height))
    return CoordinateFrame(float(size[0]), float(size[1]), frame_orientation)


def _is_same_up_to_scale(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return True if two sizes are equal up to a scale factor, within one pixel of the smaller one."""
    small, large = sorted((one, other), key=lambda size: size[0] * size[1])
    scale = max(small[0] / large[0], small[1] / large[1])
    return all(abs(side - scale * reference) <= 1.0 for side, reference in zip(small, large, strict=True))


def _read_box(item: FieldScope, mapping: MappingConfig, frame: CoordinateFrame) -> Box:
    x1, y1, x2, y2 = corners = _read_corners(item, mapping)
    width, height = frame.width, frame.height
    left, right, top, bottom = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    inside = Box(max(left, 0) / width, max(top, 0) / height, min(right, width) / width, min(bottom, height) / height)
    area = (inside.x2 - inside.x1) * width * (inside.y2 - inside.y1) * height if inside.x2 > inside.x1 else 0.0
    if not area > 0 or area < _MIN_INSIDE_SHARE * (right - left) * (bottom - top) or inside.y2 <= inside.y1:
        found = ", ".join(f"{value:g}" for value in corners)
        reason = f"{item.name} has the corners {found}, which are no box inside of {width:g} x {height:g}"
        raise item.context.make_error(reason)
    return frame.to_upright(inside)


def _read_corners(item: FieldScope, mapping: MappingConfig) -> tuple[float, float, float, float]:
    path, context = ", ".join(mapping.box), item.context
    if mapping.box_format is BoxFormat.polygon:
        xs, ys = _read_polygon(item, mapping.box)
        return min(xs), min(ys), max(xs), max(ys)
    values = [item.get_value(path) for path in mapping.box] if len(mapping.box) == 4 else item.get_value(path)
    numbers = _read_numbers(values, path, item)
    if len(numbers) == 4:
        x, y, a, b = numbers
        return (x, y, x + a, y + b) if mapping.box_format is BoxFormat.xywh else (x, y, a, b)
    raise context.make_error(f"{path} of {item.name} has {len(numbers)} numbers; a box has 4", Fault.malformed)


def _read_polygon(item: FieldScope, paths: Sequence[str]) -> tuple[list[float], list[float]]:
    """Read the polygon's corners as a list of x and a list of y."""
    if len(paths) == 2:
        xs, ys = (_read_numbers(item.get_value(path), path, item) for path in paths)
    else:
        values = item.context.require_list(item.get_value(paths[0]), paths[0])
        if isinstance(values[0], dict):
            values = [[_get_coordinate(value, axis, paths[0], item) for axis in "xy"] for value in values]
        flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
        numbers = _read_numbers(flat, paths[0], item)
        xs, ys = numbers[::2], numbers[1::2]
    if len(xs) != len(ys) or len(xs) < 2:
        raise item.context.make_error(
            f"{', '.join(paths)} of {item.name} has {len(xs)} x and {len(ys)} y; corners have both"
        )
    return xs, ys


def _get_coordinate(value: Any, axis: str, path: str, item: FieldScope) -> Any:
    if not isinstance(value, dict) or axis not in value:
        raise item.context.make_error(f"a corner in {path} of {item.name} has no {axis!r}")
    return value[axis]


def _read_numbers(values: Any, path: str, item: FieldScope) -> list[float]:
    return [
        parse_number(value, path, item.context) for value in item.context.require_list(values, f"{path} of {item.name}")
    ]
