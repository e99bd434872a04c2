"""Operations that code issues to the device, one by one, and the seconds that it needs at best.

Predictions made from them follow the code: an operation that is added or fused away changes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from first_minutes.cards import Ceilings

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
"""Operations that only allocate or point elsewhere."""

_READS_ROWS = {"embedding", "gather", "index", "index_select", "take"}
"""Operations that read from a large tensor only what they return."""

_WRITES_ROWS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}
"""Operations that write into a large tensor only what they are given last."""

_ATTENTION = ("varlen_attn", "scaled_dot_product", "flash_attn")
"""Parts of names of attention, whose work depends on lengths: its bytes and operations come from
shapes instead."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation on the device.

    Args:
        num_bytes: bytes that it reads and writes.
        flops: floating-point operations of a product, else 0.
        wide: whether these are in float32.
    """

    name: str
    num_bytes: int
    flops: int
    wide: bool

    def seconds(self, ceilings: Ceilings, least: float) -> float | None:
        """Return the seconds at the ceilings, at least those of an empty node."""
        read = ceilings.read_s(self.num_bytes)
        rate = ceilings.fp32_tflops if self.wide else ceilings.bf16_tflops
        if read is None or rate is None:
            return None
        return max(least, read, self.flops / rate / 1e12)


class OperationCount(TorchDispatchMode):
    """Lists the operations that run while it is active, autograd's included."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func.is_view and func._can_decompose():
            # `to` or `reshape` in inference mode, which arrive whole and may copy
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        given = tensors_of((args, kwargs))
        made = tensors_of(result) or tensors_of(written_by(func._schema, args, kwargs))
        if func.is_view or name in _FREE or not any(t.is_cuda for t in (*given, *made)):
            return result
        flops = 0
        if func._overloadpacket in flop_registry and not is_attention(name):
            flops = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
        self.operations.append(
            Operation(
                name=name,
                num_bytes=0 if is_attention(name) else moved_bytes(name, given, made),
                flops=flops,
                wide=bool(given) and given[0].dtype == torch.float32,
            )
        )
        return result


def written_by(
    schema: torch._C.FunctionSchema, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return the arguments that an operation without results writes, as `_foreach_mul_` does."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    given |= kwargs
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [given[name] for name in written if name in given]


def is_attention(name: str) -> bool:
    return any(part in name for part in _ATTENTION)


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def bytes_of(tensor: Tensor) -> int:
    """Bytes that a full read of the tensor moves: an expanded one has less memory than values."""
    memory = tensor.untyped_storage().nbytes()
    return min(tensor.numel() * tensor.element_size(), memory)


def moved_bytes(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    if name in _READS_ROWS:
        return 2 * sum(map(bytes_of, made))
    if name in _WRITES_ROWS:
        return 2 * bytes_of(given[-1])
    return sum(bytes_of(t) for t in (*given, *made) if t.is_cuda)


def device_s(operations: Sequence[Operation], ceilings: Ceilings) -> float | None:
    """Seconds of the device for operations one after another."""
    least = (ceilings.node_us or 0.0) / 1e6
    times = [operation.seconds(ceilings, least) for operation in operations]
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if len(known) == len(times) else None


def host_s(operations: Sequence[Operation], ceilings: Ceilings) -> float | None:
    """Seconds of the host to launch operations outside a graph."""
    return None if ceilings.launch_us is None else len(operations) * ceilings.launch_us / 1e6


def slower_s(operations: Sequence[Operation], ceilings: Ceilings) -> float | None:
    """Seconds of operations outside a graph: those of the device or of the host, which overlap."""
    device, host = device_s(operations, ceilings), host_s(operations, ceilings)
    return device if device is None or host is None else max(device, host)
