"""Write safetensors files one tensor at a time, so that at most one of them is in memory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
MAX_SHARD_SIZE = "5GB"  # transformers' size for splitting a model into files
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """Safetensors file to write: its tensors in order, on `meta`."""

    name: str
    tensors: dict[str, Tensor]

    def write(self, folder: Path, values: Iterable[Tensor]) -> None:
        """Write the file to a folder.

        Args:
            values: values of the tensors, in the same order. They are requested and released one at a time.
        """
        with (folder / self.name).open("wb") as stream:
            stream.write(self._make_header())
            for value in values:
                stream.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _make_header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in self.tensors.items():
            end = offset + tensor.element_size() * math.prod(tensor.shape)
            header[name] = {
                "dtype": DTYPE_CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@contextmanager
def raise_os_errors() -> Iterator[None]:
    """Raise OSError for what the operating system refuses safetensors and tokenizers.

    Their own errors contain the system's error number only in the text.
    """
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def split_into_files(tensors: dict[str, Tensor], max_shard_size: str | int = MAX_SHARD_SIZE) -> list[SafetensorsFile]:
    """Split tensors into files and order them as `save_pretrained` would, given names, shapes and types (on `meta`)."""
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )

    def sort_key(name: str) -> tuple[int, str]:  # safetensors' own order: the widest type first
        return -tensors[name].element_size(), name

    return [
        SafetensorsFile(file, {name: tensors[name] for name in sorted(names, key=sort_key)})
        for file, names in split.filename_to_tensors.items()
    ]


def write_index(folder: Path, files: list[SafetensorsFile], num_parameters: int) -> None:
    """Write the index that tells which of several files holds a tensor; a single file needs none."""
    if len(files) == 1:
        return
    sizes: Iterator[int] = (
        tensor.element_size() * math.prod(tensor.shape) for file in files for tensor in file.tensors.values()
    )
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": sum(sizes)},
        "weight_map": {name: file.name for file in files for name in file.tensors},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
