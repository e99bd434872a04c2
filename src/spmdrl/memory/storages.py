"""Storages behind tensors: the bytes that are alive, and whether a tensor's storage is freed.

Parts of roles that share a device in turns have their storages freed between their calls (see
`spmdrl.memory`). The tensors stay: their shapes, views and owners are unaffected. Code that
computes with them asks here first, because reading a freed storage is an illegal access.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor unchanged."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def distinct_storages(tensors: Iterable[Tensor]) -> tuple[torch.UntypedStorage, ...]:
    """Every storage once, in order of first appearance: views and tied tensors share one."""
    storages = (local_part(tensor).untyped_storage() for tensor in tensors)
    return tuple({storage_key(storage): storage for storage in storages}.values())


def storage_key(storage: torch.UntypedStorage) -> int:
    """Identity of a storage, freed or not, while it lives: equal only for one and the same storage.

    The address of the data would not do: it is 0 for all freed storages.
    """
    key: int = storage._cdata
    return key


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors that are not freed."""
    return sum(storage.nbytes() for storage in distinct_storages(tensors))


def is_resident(tensor: Tensor) -> bool:
    """Whether the tensor's storage is not freed (a tensor without values needs none)."""
    local = local_part(tensor)
    return local.numel() == 0 or local.untyped_storage().nbytes() > 0


def require_resident(
    role: str, part: str, tensors: Iterable[Tensor], *, is_away: bool = False
) -> None:
    """Refuse to continue without a part.

    Args:
        is_away: the tensors keep their addresses, and lack the memory there.

    Raises:
        ValueError: a tensor's storage is freed; the role and the part are named.
    """
    freed = [tensor for tensor in tensors if is_away or not is_resident(tensor)]
    if freed:
        raise ValueError(
            f"role {role!r}: its {part} are not on the device ({len(freed)} tensors are freed, the "
            f"first of shape {tuple(freed[0].shape)}): hold it with resident({role!r}, {part!r})"
        )
