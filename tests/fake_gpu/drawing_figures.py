"""Launches, waits and bytes of the draws of one decode step, by torch or by the kernel.

Runs under the stand-in, without values: `python drawing_figures.py` prints one JSON line. Logits
are those of a vocabulary of 151,936.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from figures import LARGE, LAUNCHES, SYNCS, Bytes, counted, gigabytes, total
from torch import Tensor

from spmdrl.rollout.native.sampler import Sampler
from spmdrl.rollout.protocol import SamplingParams


def drawing(rows: int) -> dict[str, Any]:
    vocabulary, device = LARGE["vocab_size"], torch.device("cuda", 0)
    assert isinstance(vocabulary, int)
    sampler = Sampler(vocabulary, device)
    logits = torch.empty(rows, vocabulary, device=device)
    keys = torch.zeros(rows, dtype=torch.int64, device=device)
    asked = sampler.ask([SamplingParams()] * rows, None, rows)
    draw = partial(sampler.draw, logits, asked, keys)
    draw()  # makes buffers, and compiles
    step = counted(draw)
    with Bytes() as by_torch, kernel_bytes() as by_kernels:
        draw()
    return {
        "launches": total(step, LAUNCHES),
        "syncs": total(step, SYNCS),
        "gb": gigabytes(sum(by_torch.by_name.values()) + sum(by_kernels)),
    }


@contextmanager
def kernel_bytes() -> Iterator[list[int]]:
    """Collect the bytes of every tensor that is given to a kernel in Triton."""
    found: list[int] = []
    if find_spec("triton") is None:
        yield found
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def counted_run(kernel: Any, *arguments: Any, **words: Any) -> Any:
        found.extend(x.nbytes for x in arguments if isinstance(x, Tensor))
        return run(kernel, *arguments, **words)

    JITFunction.run = counted_run
    try:
        yield found
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    print(json.dumps({str(rows): drawing(rows) for rows in (64, 256)}))
