"""Storages behind tensors: how many bytes are alive, and whether a tensor's storage is there.

Parts of roles that share a device in turns have their storages freed between their calls (see
`spmdrl.memory`). The tensors stay: their shapes, views and owners know nothing of it. Whoever
computes with them asks here first, because reading a freed storage is an illegal access.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor itself."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def distinct_storages(tensors: Iterable[Tensor]) -> tuple[torch.UntypedStorage, ...]:
    """Every storage once, in order of first appearance: views and tied tensors share one."""
    storages = (local_part(tensor).untyped_storage() for tensor in tensors)
    return tuple({storage_key(storage): storage for storage in storages}.values())


def storage_key(storage: torch.UntypedStorage) -> int:
    """What two storages have in common if and only if they are one, freed or not, while it lives.

    The address of the data is no such thing: it is 0 for all that are freed.
    """
    key: int = storage._cdata
    return key


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors that are not freed."""
    return sum(storage.nbytes() for storage in distinct_storages(tensors))


def is_resident(tensor: Tensor) -> bool:
    """Whether the tensor's storage is not freed (one without values needs none)."""
    local = local_part(tensor)
    return local.numel() == 0 or local.untyped_storage().nbytes() > 0


def require_resident(role: str, part: str, tensors: Iterable[Tensor]) -> None:
    """Refuse to go on without a part.

    Raises:
        ValueError: a tensor's storage is freed, naming the role and the part.
    """
    freed = [tensor for tensor in tensors if not is_resident(tensor)]
    if freed:
        raise ValueError(
            f"role {role!r}: its {part} are not on the device ({len(freed)} tensors are freed, the "
            f"first of shape {tuple(freed[0].shape)}): hold it with resident({role!r}, {part!r})"
        )


def json_tensor(content: object) -> Tensor:
    """JSON values as a tensor of bytes, for files that hold tensors: uint8 `[bytes]`."""
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def tensor_json(tensor: Tensor) -> Any:  # uint8 [bytes]
    """What `json_tensor` was given (lists for tuples)."""
    return json.loads(tensor.numpy().tobytes())


def json_values(value: Any, where: str) -> Any:
    """A copy of what JSON keeps as it is: numbers (those of tensors and NumPy as Python's), texts,
    truth values, None, and lists and dicts of them.

    Args:
        where: the name of `value`, for the error.

    Raises:
        ValueError: anything else, and keys that are no texts, by name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(
                    f"{where} has the key {key!r}: a checkpoint keeps texts as keys, such as "
                    f"{str(key)!r}"
                )
        return {key: json_values(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return json_values(value.item(), where)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which a checkpoint's index cannot keep: make it "
        "numbers, texts, or lists and dicts of them"
    )
