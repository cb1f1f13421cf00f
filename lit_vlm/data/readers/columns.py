"""Columns of other names: `data.sources.<name>.columns` gives each key of a known format the column that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from lit_vlm.config.schema import ColumnsConfig
from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.rows import Rows
from lit_vlm.types import RecordError, UserError, find_nearest, format_suggestion

_NUM_CHECKED_ROWS = 100  # rows in which a column must be found at least once


def get_columns(config: ColumnsConfig) -> tuple[tuple[str, str], ...]:
    """Return (key, column) for each column that is set."""
    pairs = ((field.name, getattr(config, field.name)) for field in fields(config))
    return tuple((key, column) for key, column in pairs if column is not None)


@cache
def _get_keys_by_column(columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {column: key for key, column in columns}


def rename_columns(row: Mapping[str, Any], columns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the row with the mapped columns under the keys of the known formats.

    A column that has such a key already and is not mapped itself is counted as unread under another name.
    """
    keys = _get_keys_by_column(columns)
    if keys.keys() <= row.keys():
        renamed = {keys.get(name, name): value for name, value in row.items()}
        if len(renamed) == len(row):  # no column has such a key already, as in nearly all rows
            return renamed
    renamed = {key: row.get(column) for key, column in columns}
    for key, value in row.items():
        if key not in keys:
            renamed[f"{key} (another column is mapped to it)" if key in renamed else key] = value
    return renamed


def check_columns(name: str, columns: tuple[tuple[str, str], ...], rows: Rows) -> None:
    """Check that each mapped column is in one of the first rows.

    Raises:
        UserError: names the setting, the column, and the nearest one that exists.
    """
    found: dict[str, None] = {}
    for index in range(min(len(rows), _NUM_CHECKED_ROWS) if columns else 0):
        try:
            found.update(dict.fromkeys(rows[index]))
        except RecordError:
            continue
    for key, column in columns:
        if found and column not in found:
            listed = ", ".join(format_untrusted(name, 40) for name in list(found)[:20])
            nearest = format_suggestion(find_nearest(column, list(found)))
            raise UserError(
                f"data.sources.{name}.columns.{key}={column}: {rows.get_origin(0)} has no such column; "
                f"it has {listed}.{nearest}"
            )
    repeated = sorted({column for _, column in columns if [other for _, other in columns].count(column) > 1})
    if repeated:
        keys = " and ".join(f"columns.{key}" for key, column in columns if column == repeated[0])
        raise UserError(f"data.sources.{name}.{keys}: both name the column {repeated[0]!r}. Give each its own.")
