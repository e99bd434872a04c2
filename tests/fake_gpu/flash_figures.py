"""flash-attn-4's kernels for the cases that `auto` gives it, compiled for an architecture without a
GPU, forward and backward, by the calls that a trainer makes.

Runs in the environment of scripts/dev/flash_env.sh: `python flash_figures.py sm_90 128` compiles
the cases of heads of 128 dims, and those after a third word alone whose names contain it. It prints
one JSON line for each as it ends: [case, what failed or nothing, seconds of this process]. Tensors
are fake: nothing is launched. `python flash_figures.py sm_90 signature` prints the names and
defaults of the package's functions.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

CAPABILITIES = {"sm_90": (9, 0), "sm_100": (10, 0)}
PROCESSORS = {"sm_90": 132, "sm_100": 148}
"""Streaming multiprocessors of an H100 and a B200."""

ARCHITECTURE = sys.argv[1]
# the package's own way to compile without a GPU: kernels, their target, and the card's processors
os.environ |= {
    "FLASH_ATTENTION_ARCH": ARCHITECTURE,
    "CUTE_DSL_ARCH": ARCHITECTURE + "a",
    "FLASH_ATTENTION_NUM_SMS": str(PROCESSORS[ARCHITECTURE]),
}

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from spmdrl.models.attention_flash import (  # noqa: E402
    StreamKernel,
    flash_kernel,
    flash_lacks,
    flash_versions,
    stream_block,
)
from spmdrl.models.attention_stream import SeenKeys, seen_keys  # noqa: E402
from spmdrl.models.attention_varlen import Sequences  # noqa: E402
from spmdrl.models.layer_attention import AttentionNeeds  # noqa: E402
from spmdrl.models.spans import Span  # noqa: E402
from spmdrl.models.specs import AttentionOptions  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call: heads' properties, and sequences with their longest, which choose kernels too.

    Args:
        shared: whether the first sequence is a prompt of the others.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    deterministic: bool = False
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 8
    longest: int = 2048
    shared: bool = False

    def needs(self, width: int) -> AttentionNeeds:
        return AttentionNeeds(
            widths=(width,),
            softcap=self.softcap is not None,
            sinks=self.sinks,
            window=self.window is not None,
        )


HEADS = 12
PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "deterministic": replace(PLAIN, deterministic=True),
    "window": replace(PLAIN, window=512),
    "sinks": replace(PLAIN, sinks=True),
    "soft cap": replace(PLAIN, softcap=50.0),
    "all": Case(window=512, sinks=True, softcap=50.0, deterministic=True),
    "a kv head each": replace(PLAIN, kv_heads=HEADS),
    "four heads to one": replace(PLAIN, kv_heads=HEADS // 4),
    "float16": replace(PLAIN, dtype=torch.float16),
    "short": replace(PLAIN, longest=48),
    "many": replace(PLAIN, sequences=300, longest=300),
    "shared prompt": replace(PLAIN, shared=True),
    "shared prompt, all": Case(shared=True, window=512, sinks=True, softcap=50.0),
    "shared prompt, a kv head each": replace(PLAIN, shared=True, kv_heads=HEADS),
    "shared prompt, four heads to one": replace(PLAIN, shared=True, kv_heads=HEADS // 4),
}


class Context:
    """Stand for autograd's context in the package's own backward."""

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


class Card:
    """Answer for the card's driver, in place of cutlass's `HardwareInfo`."""

    def __init__(self, device_id: int = 0) -> None:
        pass

    def get_device_multiprocessor_count(self) -> int:
        return PROCESSORS[ARCHITECTURE]

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return PROCESSORS[ARCHITECTURE] // cluster_size


@contextmanager
def without_a_card() -> Iterator[None]:
    """Answer the few questions that compiling asks of a driver."""
    import cutlass.utils
    from flash_attn.cute import tile_scheduler

    with (
        mock.patch.object(cutlass.utils, "HardwareInfo", Card),
        mock.patch.object(tile_scheduler, "HardwareInfo", Card),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        yield


def kernel_of(width: int, case: Case) -> tuple[Any, Callable[..., Any]]:
    """Return the package's autograd function, and ours of q, k, v, options and sinks, which calls
    it with tensors that are made when it is called.
    """
    from flash_attn.cute import interface

    def fake(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="cuda")

    if not case.shared:
        attend = flash_kernel(4)._function

        def by_sequences(q: Any, k: Any, v: Any, *rest: Any) -> Any:
            ends, most = fake(case.sequences + 1), case.longest
            sequences = Sequences(key_rows=None, ends_q=ends, ends_k=ends, most_q=most, most_k=most)
            return attend(q, k, v, sequences, *rest)

        return interface.FlashAttnVarlenFunc, by_sequences
    block = stream_block(case.needs(width), CAPABILITIES[ARCHITECTURE])
    assert block is not None
    spans = [
        Span(
            q_start=i * case.longest,
            q_stop=(i + 1) * case.longest,
            own=(i * case.longest, (i + 1) * case.longest),
            prefix=((0, case.longest),) if i else (),
        )
        for i in range(case.sequences)
    ]
    seen, kernel = seen_keys(spans, case.window, block), StreamKernel(block)
    assert seen is not None
    shapes = [tensor.shape for tensor in seen.tensors()]

    def by_stream(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        tensors = SeenKeys.of_tensors([fake(*shape) for shape in shapes])
        return kernel._run(tensors, q, k, v, None, *rest)

    return interface.FlashAttnFunc, by_stream


def compile_case(width: int, case: Case) -> None:
    given: dict[str, Any] = {}
    function, attend = kernel_of(width, case)

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=case.dtype, device="cuda")

    def apply(*arguments: Any) -> Any:
        """Run without autograd, which a fake tensor's device does not have here."""
        context = Context()
        out, lse = function.forward(context, *arguments)
        given.update(context=context, out=out)
        return out, lse

    torch.use_deterministic_algorithms(case.deterministic)
    with FakeTensorMode(), without_a_card(), mock.patch.object(function, "apply", apply):
        options = AttentionOptions(scale=0.1, window=case.window, softcap=case.softcap)
        rows = case.sequences * case.longest
        q = half(rows, HEADS, width)
        k, v = half(rows, case.kv_heads, width), half(rows, case.kv_heads, width)
        for x in (q, k, v):
            x.requires_grad_()  # so that the normalisers are kept
        out = attend(q, k, v, options, half(HEADS) if case.sinks else None)
        assert out.shape == q.shape
        grads = function.backward(given["context"], half(*given["out"].shape), None)
        names = list(inspect.signature(function.forward).parameters)[1:]
        found = {name: x.shape[-3:] for name, x in zip(names, grads, strict=False) if x is not None}
        expected = {"q": q.shape, "k": k.shape, "v": v.shape}
        assert found == expected | ({"learnable_sink": (HEADS,)} if case.sinks else {}), found


def print_signatures() -> None:
    from flash_attn import cute

    for function in (cute.flash_attn_varlen_func, cute.flash_attn_func):
        for each in inspect.signature(function).parameters.values():
            print(json.dumps([function.__name__, each.name, repr(each.default)]))


def main() -> None:
    assert flash_versions() == (4,)
    if sys.argv[2] == "signature":
        print_signatures()
        return
    width, only = int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
    for name, case in CASES.items():
        asked = case.needs(width), CAPABILITIES[ARCHITECTURE]
        is_out = case.shared and stream_block(*asked) is None
        if only not in name or is_out or flash_lacks(4, *asked):
            continue
        began, why = time.perf_counter(), ""
        try:
            compile_case(width, case)
        except Exception:
            why = traceback.format_exc()[-1500:]
        print(json.dumps([name, why, round(time.perf_counter() - began, 1)]), flush=True)


if __name__ == "__main__":
    main()
