"""A user's own class of sources: `data.sources.<name>.format=my_package.MySource`.

The class is called with the source's name and its settings, `MySource(name, config)`; `config` is the `SourceConfig`, with the
path as given. It has `__len__`, `__getitem__` and `digest` (`Source` in `lit_vlm/types.py`). `__getitem__` returns a `Sample`
or a `PreferencePair`, or a row (a dict) of any format that `format=auto` knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lit_vlm.config.schema import SourceConfig
from lit_vlm.config.user_classes import import_class
from lit_vlm.data.readers.columns import rename_columns
from lit_vlm.data.readers.context import ReaderSettings, RecordContext, describe_type
from lit_vlm.data.readers.formats import read_any_format
from lit_vlm.types import PreferencePair, Record, RecordError, Sample, Source, UserError

_NEEDED = "a class of sources, which has __len__, __getitem__ and digest (Source in lit_vlm/types.py)"


class OwnSource:
    """Source of a user's class. What the class raises becomes the error of its source or of its record.

    Args:
        source: object of the user's class.
        settings: reader settings; their `format` is the import path of the class.
        limit: read only the first `limit` records; None: all.
    """

    def __init__(self, source: Any, settings: ReaderSettings, limit: int | None) -> None:
        self.name = settings.source
        self._source, self._settings = source, settings
        num_records = self._call("__len__")
        if isinstance(num_records, bool) or not isinstance(num_records, int) or num_records < 1:
            raise UserError(f"{self._setting}: its __len__ says {num_records!r}; at least 1 record is needed.")
        self._length = num_records if limit is None else min(limit, num_records)
        digest = _get_digest(source, self._setting)
        described = json.dumps(settings.describe(), sort_keys=True, default=str)
        self.digest = hashlib.sha256(repr((digest, described, limit)).encode()).hexdigest()

    @property
    def _setting(self) -> str:
        return f"data.sources.{self.name}.format={self._settings.format}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(index)
        context = RecordContext(self.origin(index), self._settings)
        try:
            record = self._source[index]
        except (RecordError, MemoryError):
            raise
        except Exception as error:  # a user's class may raise anything
            raise context.make_error(f"{self._settings.format} raised {_describe(error)}") from error
        if isinstance(record, Mapping):
            columns = self._settings.columns
            return read_any_format(rename_columns(record, columns) if columns else record, context)
        if not isinstance(record, Sample | PreferencePair):
            found = describe_type(record)
            raise context.make_error(
                f"{self._settings.format} returned what is {found}; a Sample, a PreferencePair or a row (a dict) is needed"
            )
        if record.source != self.name:
            raise context.make_error(
                f"its record has source={record.source!r}; it must be {self.name!r}, the name it was given"
            )
        return record

    def origin(self, index: int) -> str:
        """Return where a person finds the record, as the class says, or its name and position."""
        origin = self._call("origin", index) if hasattr(self._source, "origin") else None
        return origin if isinstance(origin, str) else f"{self.name}[{index}]"

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(type(self._source), method)(self._source, *arguments)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a user's class may raise anything
            raise UserError(f"{self._setting}: its {method} raised {_describe(error)}. Correct the class.") from error


class GrowingOwnSource(OwnSource):
    """Source of a user's class that has `digest_of` too: its index reads only new records when the source grows."""

    def digest_of(self, start: int, stop: int) -> str:
        """Compute the digest of records start to stop - 1 and of the reader settings."""
        digest = self._call("digest_of", start, stop)
        described = json.dumps(self._settings.describe(), sort_keys=True, default=str)
        return hashlib.sha256(repr((digest, described)).encode()).hexdigest()


def open_own_source(name: str, config: SourceConfig, settings: ReaderSettings) -> Source:
    """Open a source of a user's class.

    Raises:
        UserError: the class cannot be imported, is no class of sources, or raises.
    """
    setting = f"data.sources.{name}.format"
    own_class = import_class(setting, config.format, _has_records, _NEEDED, "Give the path of such a class")
    try:
        source = own_class(name, config)
    except (UserError, MemoryError):
        raise
    except TypeError as error:
        raise UserError(
            f"{setting}: {config.format}(name, config) raised {_describe(error)}. "
            f"It is made with the source's name and its settings, and nothing else."
        ) from error
    except Exception as error:  # a user's class may raise anything
        raise UserError(
            f"{setting}: {config.format}(name, config) raised {_describe(error)}. Correct the class."
        ) from error
    wrapper = GrowingOwnSource if hasattr(own_class, "digest_of") else OwnSource
    return wrapper(source, settings, config.num_samples if config.fraction is None else None)


def _has_records(own_class: type) -> bool:
    return hasattr(own_class, "__len__") and hasattr(own_class, "__getitem__")


def _get_digest(source: Any, setting: str) -> str:
    try:
        digest = source.digest
    except Exception as error:  # a user's class may raise anything
        digest = _describe(error)
    else:
        if isinstance(digest, str) and digest:
            return digest
        digest = repr(digest)
    raise UserError(
        f"{setting}: its digest is {digest}; a text is needed that changes when the records change, "
        f"e.g. of the file's size and time."
    )


def _describe(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
