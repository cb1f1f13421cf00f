"""Look-up of a mapping's paths and templates in one record."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_vlm.config.mapping import REGIONS, parts_of
from lit_vlm.data.images import shown
from lit_vlm.data.readers.catalogue import FileName
from lit_vlm.data.readers.place import Place, type_name
from lit_vlm.types import Content, UserError

Template = Sequence[tuple[str, str | None]]


def template(text: str, setting: str) -> Template:
    """Parse a template into (literal, path) pairs; raise a UserError that names the setting if it is malformed."""
    try:
        return parts_of(text)
    except ValueError as error:
        raise UserError(f"{setting}: {error}.") from None


@dataclass(frozen=True, slots=True)
class Scope:
    """Scope in which paths are looked up: an item of a list, then the record around it.

    All errors are RecordErrors of `context`.
    """

    values: Any
    file: FileName
    place: Place
    name: str = "the record"
    record: Scope | None = None

    def item(self, value: Any, name: str) -> Scope:
        """Make the scope of one item, inside of this one."""
        return Scope(value, self.file, self.place, name, self)

    def items(self, path: str) -> list[Scope]:
        """Return a scope for each item of the list at `path`, which must not be empty."""
        values = self.place.items(self.value(path), path)
        return [self.item(value, f"{path}[{number}]") for number, value in enumerate(values)]

    def value(self, path: str) -> Any:
        """Return the value at a path, e.g. `annotations.0.text`.

        If the first key is missing here, the whole path is looked up in the record around this item.

        Raises:
            RecordError: names the path and the keys that were found instead.
        """
        if path.startswith("@"):
            return getattr(self.file, path[1:])
        value, parts = self.values, path.split(".")
        for number, part in enumerate(parts):
            key = _key(value, part)
            if key is None:
                if number == 0 and self.record is not None:
                    return self.record.value(path)
                parent_path = ".".join(parts[:number]) or self.name
                raise self.place.fault(f"there is no {path!r}: {parent_path} {_found(value)}")
            value = value[key]
        return value

    def text(self, template: Template) -> str:
        """Render the template as text; numbers are written as text."""
        return "".join(literal + ("" if path is None else self._written(path)) for literal, path in template)

    def content(self, template: Template, regions: Sequence[Content] = ()) -> tuple[Content, ...]:
        """Render the template as content pieces, with `regions` in place of {@regions}."""
        content: tuple[Content, ...] = ()
        text = ""
        for literal, path in template:
            text += literal
            if path == REGIONS:
                content += (*self.place.pieces(text), *regions)
                text = ""
            elif path is not None:
                text += self._written(path)
        return content + self.place.pieces(text)

    def number(self, path: str) -> float:
        """Return the finite number at a path."""
        return number(self.value(path), path, self.place)

    def _written(self, path: str) -> str:
        value = self.value(path)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return self.place.text(value, path)


def number(value: Any, path: str, place: Place) -> float:
    """Parse a finite number, or raise a RecordError. Some labels write numbers as text."""
    try:
        parsed = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        parsed = None
    if parsed is None or parsed - parsed != 0:  # infinity and nan
        raise place.fault(f"{path} is {shown(value, 40)}; it must be a number")
    return parsed


def _key(value: Any, word: str) -> str | int | None:
    """Find the key or index that a path's part names. Keys of labels may be in another Unicode normal form."""
    if isinstance(value, Mapping):
        if word in value:
            return word
        wanted = unicodedata.normalize("NFC", word)
        return next((key for key in value if unicodedata.normalize("NFC", key) == wanted), None)
    if isinstance(value, list) and word.isdecimal() and int(word) < len(value):
        return int(word)
    return None


def _found(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(shown(key, 40) for key in list(value)[:12]) + (", ..." if len(value) > 12 else "")
        return f"has the keys {keys}" if value else "has no keys"
    return f"has {len(value)} items" if isinstance(value, list) else f"is {type_name(value)}"
