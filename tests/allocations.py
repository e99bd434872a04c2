"""The most bytes that operations had allocated at once, counted by distinct storages."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Within the `with`: `peak` bytes of all storages that operations made and that still lived.

    What a kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._made:
                self._watch(storage)
        # not a counter: FSDP2 resizes storages behind this mode's back
        alive = [ref() for ref in self._made.values()]
        self.peak = max(self.peak, sum(s.nbytes() for s in alive if s is not None))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._made[key] = weakref.ref(storage, lambda _: self._made.pop(key))


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
