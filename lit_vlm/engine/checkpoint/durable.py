"""Durable files: safetensors files that are synced to disk and hashed while they are written, and atomic removal of folders."""

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

SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}  # safetensors' names
BLOCK_BYTES = 1 << 24  # bytes that are written and hashed in one call, which releases Python's global lock


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> StoredFile:
    """Write a safetensors file of flat tensors and hash it in the same pass. It is on the disk when this returns.

    Args:
        tensors: key and values [n]. Values on another device are copied to the host one by one.

    Returns:
        name, size in bytes and SHA-256 of the file.
    """
    hasher, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for block in _iter_blocks(tensors):
            hasher.update(block)
            stream.write(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(path.name, size, hasher.hexdigest())


def _iter_blocks(tensors: list[tuple[str, Tensor]]) -> Iterator[Any]:
    yield _build_header(tensors)
    for _, values in tensors:
        data: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]


def _build_header(tensors: list[tuple[str, Tensor]]) -> bytes:
    """Build the safetensors header: 8 bytes of length, then JSON with dtype, shape and byte offsets of each tensor.

    The JSON is padded to a multiple of 8 bytes, so that the values are aligned.
    """
    entries, end = {}, 0
    for key, values in tensors:
        begin, end = end, end + values.numel() * values.element_size()
        entries[key] = {
            "dtype": SAFETENSORS_DTYPES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def compute_file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: rename it first, so that no incomplete folder ever has the name of a checkpoint."""
    hidden_path = path.with_name(f".gone-{path.name.lstrip('.')}-{uuid4().hex}")
    os.rename(path, hidden_path)
    shutil.rmtree(hidden_path, ignore_errors=True)  # on some systems an open file stays; `clean_before_run` removes it
