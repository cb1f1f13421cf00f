"""Rows of folders of images: each image with the `.txt` of the same name, and imagefolder's metadata files in subfolders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lit_vlm.data.decoding import REMEDY
from lit_vlm.data.readers.rows.base import Hasher, Rows, get_file_identity
from lit_vlm.data.readers.rows.tar_headers import IMAGE_SUFFIXES
from lit_vlm.types import Fault, RecordError

MAX_TEXT_BYTES, _TEXT_BLOCK_BYTES = 1 << 24, 1 << 14


class ImageTextRows:
    """Images of a folder and its subfolders with the `.txt` beside each: {id, image, caption}.

    Args:
        folder: the source's folder; names are relative to it.
        names: image files, in order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._last = folder, (-1, "")  # number and name of the last row
        encoded = [
            name.encode("utf-8", "surrogateescape") for name in names
        ]  # one array: pickled fast, 1 byte a letter
        self._ends, self._names = np.cumsum([len(name) for name in encoded], dtype=np.int64), b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def get_origin(self, index: int) -> str:
        return self._get_name(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._get_name(index)
        stem = os.path.splitext(name)[0]
        try:
            data = _read_text_file(f"{self._folder}/{stem}.txt")
            caption = data.decode().removeprefix("\ufeff").strip("\r\n")
        except FileNotFoundError:
            raise RecordError(
                name, f"a picture without a text {os.path.basename(stem)}.txt beside it", REMEDY, Fault.no_answer
            ) from None
        except UnicodeDecodeError as error:
            raise RecordError(
                name, f"{os.path.basename(stem)}.txt is not UTF-8 at byte {error.start + 1}", REMEDY
            ) from None
        except OSError as error:
            raise RecordError(
                name, f"{os.path.basename(stem)}.txt cannot be read: {error.strerror}", REMEDY, Fault.unreadable
            ) from error
        return {"id": stem, "image": name, "caption": caption}

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        """Update the hasher with the name, size and time of each text."""
        for index in range(start, stop):
            name = self._get_name(index)
            text = (self._folder / name).with_suffix(".txt")
            hasher.update(
                repr((name, get_file_identity(text)[1:] if text.is_file() else None)).encode("utf-8", "replace")
            )

    def _get_name(self, index: int) -> str:
        last, name = self._last  # read once: other threads may ask for other rows
        if last != index:
            start = int(self._ends[index - 1]) if index else 0
            name = self._names[start : int(self._ends[index])].decode("utf-8", "surrogateescape")
            self._last = index, name
        return name


def _read_text_file(path: str) -> bytes:
    """Read a file, up to 16 MiB. A buffer of that size is not made for a caption of a few bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = [os.read(descriptor, _TEXT_BLOCK_BYTES)]
        while len(parts[-1]) == _TEXT_BLOCK_BYTES and len(parts) * _TEXT_BLOCK_BYTES < MAX_TEXT_BYTES:
            parts.append(os.read(descriptor, _TEXT_BLOCK_BYTES))
    finally:
        os.close(descriptor)
    return b"".join(parts)


class MetadataRows:
    """Rows of imagefolder's metadata file in a subfolder, whose `file_name` is relative to that subfolder."""

    def __init__(self, rows: Rows, folder: PurePosixPath) -> None:
        self._rows, self._folder = rows, folder

    def __len__(self) -> int:
        return len(self._rows)

    def get_origin(self, index: int) -> str:
        return f"{self._folder}/{self._rows.get_origin(index)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        for key in ("file_name", "file_names"):
            if isinstance(name := row.get(key), str):
                row[key] = str(self._folder / name)
            elif isinstance(name, list):
                row[key] = [str(self._folder / item) if isinstance(item, str) else item for item in name]
        return row

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        self._rows.update_hash(hasher, start, stop)


def is_image_name(name: str) -> bool:
    """Return True if a file's name ends like that of an image that is read from tars and folders."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
