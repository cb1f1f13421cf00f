"""Look-up of a mapping's paths and templates in one record."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_vlm.config.mapping import REGIONS_VARIABLE, split_template
from lit_vlm.data.images import format_untrusted
from lit_vlm.data.readers.catalogue import FileName
from lit_vlm.data.readers.place import RecordContext, describe_type
from lit_vlm.types import ContentPart, UserError

Template = Sequence[tuple[str, str | None]]


def parse_template(text: str, setting: str) -> Template:
    """Parse a template into (literal, path) pairs; raise a UserError that names the setting if it is malformed."""
    try:
        return split_template(text)
    except ValueError as error:
        raise UserError(f"{setting}: {error}.") from None


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
