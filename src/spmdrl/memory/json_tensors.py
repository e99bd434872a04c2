"""JSON values as tensors of bytes, for files that hold tensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def json_tensor(content: object) -> Tensor:
    """JSON values as a tensor of bytes, for files of tensors: uint8 `[bytes]`."""
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def tensor_json(tensor: Tensor) -> Any:  # uint8 [bytes]
    """The values that `json_tensor` was given (tuples become lists)."""
    return json.loads(tensor.numpy().tobytes())


def json_values(value: Any, where: str) -> Any:
    """A copy in types that JSON keeps unchanged: numbers (those of tensors and NumPy as Python's),
    texts, truth values, None, and lists and dicts of them.

    Args:
        where: the name of `value`, for the error.

    Raises:
        ValueError: any other value, or a key that is not a text; it is named.
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
