"""Calls of the kernels in Triton on the stand-in device: their launches, eager and captured.

Runs without values, in a process of its own: `python kernel_figures.py` prints one JSON line of
{name: [launches, nodes of its graph, other counts]}. What the kernels compute is the interpreter's
business (`tests/models/kernels`).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from fake_gpu import stand_in
from spmdrl.models.specs import AttentionOptions

ROWS, HEADS, KV_HEADS, DIMS, PAGE, BLOCKS = 8, 32, 8, 128, 16, 64
VOCABULARY, WIDTH = 128256, 4096
Call = Callable[[], object]


def halves(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device="cuda")


def decode(*, together: bool = False) -> Call:
    from spmdrl.models.kernels.paged import DecodeKernels
    from spmdrl.rollout.native.sharing import alone

    q, sinks = halves(ROWS, HEADS + 2 * KV_HEADS, DIMS), torch.zeros(HEADS, device="cuda")
    keys, values = (halves(BLOCKS, PAGE, KV_HEADS, DIMS) for _ in "kv")
    table = torch.zeros(ROWS, 32, dtype=torch.int32, device="cuda")
    lengths = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    options = AttentionOptions(scale=0.1, window=300, softcap=50.0)
    attend = DecodeKernels()
    sharing = torch.from_numpy(alone(ROWS)).cuda() if together else None
    return lambda: attend(q[:, :HEADS], keys, values, table, lengths, options, sinks, sharing)


def cascade() -> Call:
    return decode(together=True)


def projected() -> Call:
    from spmdrl.models.kernels.cuda.projected import turn_and_store

    fused, weight = halves(ROWS, HEADS + 2 * KV_HEADS, DIMS), halves(DIMS)
    keys, values = (halves(BLOCKS, PAGE, KV_HEADS, DIMS) for _ in "kv")
    slots = torch.arange(ROWS, device="cuda")
    tables = {name: torch.ones(ROWS, 1, DIMS, device="cuda") for name in ("cos", "sin")}
    norms = {"q_weight": weight, "k_weight": weight, "eps": 1e-6}
    return lambda: turn_and_store(fused, slots, keys, values, **tables, **norms)


def sampling() -> Call:
    from spmdrl.models.kernels.cuda.sampling import draw_tokens

    logits = torch.zeros(ROWS, VOCABULARY, device="cuda")
    keys = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    temperatures = torch.ones(ROWS, device="cuda")
    rows = torch.arange(ROWS, dtype=torch.int32, device="cuda")
    return lambda: draw_tokens(logits, keys, temperatures, rows)


def norm() -> Call:
    from spmdrl.models.kernels.cuda.rows import add_rms_norm

    x = halves(ROWS, WIDTH)
    return lambda: add_rms_norm(x, x, x[0], 1e-5)


def norm_backward() -> Call:
    from spmdrl.models.kernels.cuda.rows import add_rms_norm_backward

    x = halves(ROWS, WIDTH)
    return lambda: add_rms_norm_backward(x, x[0], x, x, 1e-5)


def products() -> Call:
    from spmdrl.models.kernels.cuda.rows import swiglu

    gate_up = halves(ROWS, 2 * WIDTH)
    return lambda: swiglu(gate_up)


def products_backward() -> Call:
    from spmdrl.models.kernels.cuda.rows import swiglu_backward

    gate_up, grad = halves(ROWS, 2 * WIDTH), halves(ROWS, WIDTH)
    return lambda: swiglu_backward(gate_up, grad)


def rope() -> Call:
    from spmdrl.models.kernels.cuda.rows import rotate

    fused, cos = halves(ROWS, HEADS + KV_HEADS, DIMS), torch.ones(ROWS, 1, DIMS, device="cuda")
    return lambda: rotate(fused[:, :HEADS], cos, cos)


def rope_backward() -> Call:
    from spmdrl.models.kernels.cuda.rows import rotate_backward

    grad, cos = halves(ROWS, HEADS, DIMS), torch.ones(ROWS, 1, DIMS, device="cuda")
    return lambda: rotate_backward(grad, cos, cos, interleaved=True)


def laid_out() -> Call:
    from spmdrl.models.kernels.cuda.laid_out import lay_out

    fused, cos = halves(ROWS, HEADS + 2 * KV_HEADS, DIMS), torch.ones(ROWS, 1, DIMS, device="cuda")
    rows = torch.arange(ROWS, device="cuda")
    return lambda: lay_out(fused, KV_HEADS, cos, cos, False, rows)


def laid_out_backward() -> Call:
    from spmdrl.models.kernels.cuda.laid_out import lay_out_backward

    grads = tuple(halves(ROWS, heads, DIMS) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cos, order = torch.ones(ROWS, 1, DIMS, device="cuda"), torch.arange(ROWS, device="cuda")
    starts = torch.zeros(ROWS + 1, dtype=torch.int32, device="cuda")
    return lambda: lay_out_backward(grads, cos, cos, True, (order, starts))


CALLS = (decode, cascade, projected, sampling, norm, norm_backward, products, products_backward)
CALLS += (rope, rope_backward, laid_out, laid_out_backward)


def figures(make: Callable[[], Call]) -> tuple[int, int, dict[str, int]]:
    """Count a call's launches, its graph's nodes, and everything else that it or a replay asks."""
    call = make()
    call()  # compiles, and the allocator takes its memory
    torch.cuda.synchronize()
    with stand_in.counting() as found:
        call()
    launches = found.pop("kernel")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    with stand_in.counting() as replayed:
        graph.replay()
    nodes = replayed.pop("graph_nodes")
    replayed.pop("graph_launch")
    return launches, nodes, {**found, **replayed}


if __name__ == "__main__":
    print(json.dumps({make.__name__: figures(make) for make in CALLS}))
