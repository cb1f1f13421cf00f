"""Exact count of the memory that tensors take."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Mode that measures how many bytes tensors created inside it hold. Memory-mapped files count as zero.

    Attributes:
        now: bytes held at present.
        most: peak of the bytes held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._counted: set[int] = set()
        self._excluded: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _collect_storages((args, kwargs)):
            self._exclude(storage)
        result = function(*args, **(kwargs or {}))
        for storage in _collect_storages(result):
            self._count(storage, mapped=function is torch.ops.aten.set_.source_Storage)
        return result

    def _exclude(self, storage: torch.UntypedStorage) -> None:
        """Exclude a storage that existed before or that lies in a file."""
        address = storage.data_ptr()
        if address not in self._counted and address not in self._excluded:
            self._excluded.add(address)
            weakref.finalize(storage, self._excluded.discard, address)

    def _count(self, storage: torch.UntypedStorage, mapped: bool) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if mapped:
            self._exclude(storage)
        if not size or address in self._counted or address in self._excluded:
            return
        self._counted.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size


def _collect_storages(values) -> list[torch.UntypedStorage]:
    """Collect the storages on the CPU; for a DTensor, that of this rank's part."""
    tensors = [getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
