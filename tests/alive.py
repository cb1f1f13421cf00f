"""How much memory tensors take, counted exactly."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Most bytes that tensors made inside held at once. Files that are mapped into memory take none.

    Attributes:
        most: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._counted: set[int] = set()
        self._others: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._leave_out(storage)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage, mapped=function is torch.ops.aten.set_.source_Storage)
        return result

    def _leave_out(self, storage: torch.UntypedStorage) -> None:
        """Of something that was there before, or that lies in a file."""
        where = storage.data_ptr()
        if where not in self._counted and where not in self._others:
            self._others.add(where)
            weakref.finalize(storage, self._others.discard, where)

    def _count(self, storage: torch.UntypedStorage, mapped: bool) -> None:
        where, size = storage.data_ptr(), storage.nbytes()
        if mapped:
            self._leave_out(storage)
        if not size or where in self._counted or where in self._others:
            return
        self._counted.add(where)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, where, size)

    def _freed(self, where: int, size: int) -> None:
        self._counted.discard(where)
        self.now -= size


def _storages(values) -> list[torch.UntypedStorage]:
    """On the CPU; of a DTensor this rank's part."""
    tensors = [getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
