"""Bytes that operations and kernels of a microbatch touch on the device, by operation."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE_OF_BYTES = (
    *("view", "t", "transpose", "split", "detach", "expand", "slice", "select", "unsqueeze"),
    *("squeeze", "as_strided", "permute", "alias", "_unsafe_view", "empty", "empty_like"),
    *("new_empty", "split_with_sizes", "reshape", "narrow", "lift_fresh", "_reshape_alias"),
    *("empty_strided", "new_empty_strided", "set_", "unbind", "chunk"),
)


BY_ROWS = ("embedding", "index_select", "index_add_", "index_put_", "_index_put_impl_")
"""Operations that touch rows of their first argument, and nothing else of it."""

PRODUCTS = ("mm", "addmm", "spmdrl::summed_linear", "spmdrl::add_product")


def gigabytes(num_bytes: float) -> float:
    return round(num_bytes / 1e9, 3)


def training_kernels() -> dict[Any, tuple[str, ...]]:
    """Calls of kernels by a microbatch, by module; none where Triton is missing."""
    if find_spec("triton") is None:
        return {}
    from spmdrl.models.kernels.cuda import laid_out, logprobs, rows

    return {
        rows: (
            *("add_rms_norm", "add_rms_norm_backward", "swiglu", "swiglu_backward"),
            *("rotate", "rotate_backward"),
        ),
        laid_out: ("lay_out", "lay_out_backward"),
        logprobs: ("reduce_logits", "logit_factors"),
    }


class Bytes(TorchDispatchMode):
    """Bytes of the arguments and results of every operation on the device, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.of_kernels: Counter[str] = Counter()
        for module, names in training_kernels().items():
            for name in names:
                self._count_calls(module, name)
        self._count_compiled()

    def _count_calls(self, module: Any, name: str) -> None:
        """Count what a kernel's call is given and returns: no dispatcher sees its launch."""
        inner = getattr(module, name)

        def outer(*arguments: Any, **words: Any) -> Any:
            found = inner(*arguments, **words)
            self.of_kernels[name] += bytes_of((arguments, words, found))
            return found

        setattr(module, name, outer)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run in this mode."""
        return True

    def _count_compiled(self) -> None:
        """Count what kernels of torch's compiler are given; what they change in place, twice."""
        if find_spec("triton") is None:
            return
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        inner = CachingAutotuner.run

        def outer(kernel: Any, *arguments: Any, **words: Any) -> Any:
            names = kernel.fn.arg_names
            changed = [
                value
                for name, value in zip(names, arguments, strict=False)
                if name.startswith("in_out_ptr")
            ]
            self.of_kernels["compiled"] += bytes_of((arguments, words, changed))
            return inner(kernel, *arguments, **words)

        CachingAutotuner.run = outer  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), words: Any = None
    ) -> Any:
        result = function(*arguments, **(words or {}))
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in BY_ROWS:
            # what is selected is read and written; what is added, read twice and written once
            rows = [
                bytes_of(v) for v in (*arguments[1:], *([] if name.endswith("_") else [result]))
            ]
            self.by_name[name] += sum(rows) + (2 if name.endswith("_") else 1) * max(rows)
        elif name not in FREE_OF_BYTES:
            self.by_name[name] += bytes_of((arguments, words or {}, result))
        return result


def bytes_of(values: Any) -> int:
    """Bytes of all tensors on the device among values."""
    return sum(v.nbytes for v in tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_cuda)


def elementwise(moved: Bytes) -> dict[str, float]:
    """Bytes of attention, and of all else but products, of torch and of the kernels."""
    attention = sum(n for name, n in moved.by_name.items() if "attention" in name or "attn" in name)
    products = sum(moved.by_name[name] for name in PRODUCTS)
    others = sum((moved.by_name + moved.of_kernels).values()) - products - attention
    return {"attention_gb": gigabytes(attention), "elementwise_gb": gigabytes(others)}
