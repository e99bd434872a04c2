"""A large allocation among pieces of free memory: `python -m first_minutes.fragments UNIT_BYTES`.

Blocks of one unit are cut from four segments of 14, every other one is freed, and 20 units are
asked for within a limit of 64: only if the allocator can move its pages do they fit.
"""

from __future__ import annotations

import json
import sys
import time

import torch

LIMIT, SEGMENTS, SEGMENT, LARGE = 64, 4, 14, 20


def main(unit: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(LIMIT * unit / total)

    def block(units: int) -> torch.Tensor:
        return torch.empty(units * unit, dtype=torch.uint8, device="cuda")

    held = [block(SEGMENT) for _ in range(SEGMENTS)]
    del held
    pieces = [block(1) for _ in range(SEGMENTS * SEGMENT)]
    del pieces[::2]
    began = time.perf_counter()
    try:
        large = block(LARGE)
    except torch.OutOfMemoryError:
        fits, large = 0, pieces[0]
    else:
        fits = 1
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    graph = torch.cuda.CUDAGraph()  # captures must work over such memory, too
    with torch.cuda.graph(graph):
        large[:1024].add_(1)
    graph.replay()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved() / 1e9
    print(json.dumps({"fits": fits, "ms": seconds * 1e3, "reserved_gb": reserved}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
