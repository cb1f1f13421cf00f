"""Files of tensors that are on the disk when a function returns, with their digests; folders that go whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from lit_vlm.engine.checkpoint.layout import StoredFile

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}  # safetensors' names
BLOCK = 1 << 24  # bytes that are written and hashed at a time, without Python's lock


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> StoredFile:
    """A safetensors file of flat tensors, written and hashed in one pass.

    Args:
        tensors: key and values [n]; those of other devices are brought to the host one by one.
    """
    hasher, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for block in _blocks(tensors):
            hasher.update(block)
            stream.write(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(path.name, size, hasher.hexdigest())


def _blocks(tensors: list[tuple[str, Tensor]]) -> Iterator[Any]:
    yield _header(tensors)
    for _, values in tensors:
        content: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]


def _header(tensors: list[tuple[str, Tensor]]) -> bytes:
    """8 bytes of its length, then JSON: dtype, shape and place of each tensor; padded, so that the numbers are aligned."""
    described, end = {}, 0
    for key, values in tensors:
        begin, end = end, end + values.numel() * values.element_size()
        described[key] = {"dtype": DTYPES[values.dtype], "shape": [values.numel()], "data_offsets": [begin, end]}
    text = json.dumps(described, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_folder(path: Path) -> None:
    """First out of sight by one rename: half a folder is never found under a checkpoint's name."""
    gone = path.with_name(f".gone-{path.name.lstrip('.')}-{uuid4().hex}")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)  # a file that somebody reads stays on some systems until the next sweep
