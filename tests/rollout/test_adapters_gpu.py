"""Adapters of the native engine on CUDA: graphs, rows with different adapters. Needs one GPU."""

from __future__ import annotations

import pytest
import torch
from test_decode_gpu import model, needs_graphs, requests

from spmdrl.models.adapters import find_targets, make_adapter
from spmdrl.models.local_shards import LocalTensors
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import OWN, Completion, Request

JUDGE = "judge"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def fill(tensors: LocalTensors, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor, _ in tensors.values():
        if tensor.dim() == 1:
            tensor.fill_(1)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)


def make_engine(dtype: torch.dtype) -> NativeEngine:
    """An engine with an adapter of its own, and one that is added."""
    adapter = make_adapter(find_targets(model(), ["all"]), rank=8, alpha=16)
    device = torch.device("cuda", torch.cuda.current_device())
    engine = NativeEngine(
        model(),
        options=NativeOptions(max_running=64),
        device=device,
        dtype=dtype,
        adapter=adapter,
    )
    for name in engine.weights.table():
        engine.allocate(name)
    fill(engine.local_tensors(), 0)
    weights = engine.new_adapter(JUDGE, adapter)
    tables = weights.tables()
    fill({name: (p.data, tables[name]) for name, p in weights.named_parameters()}, 1)
    engine.add_adapter(JUDGE, weights)
    return engine


def distance(engine: NativeEngine, asked: list[Request], found: list[Completion], shift: int):
    """Mean distance of the drawn tokens' log-probabilities from those that the engine scores."""
    names = [request.adapter for request in asked]
    names = names[shift:] + names[:shift]
    rows = [(*r.tokens, *c.tokens) for r, c in zip(asked, found, strict=True)]
    scores = engine.score(rows, adapters=names)
    gaps = [
        torch.tensor(own[-len(c.tokens) :]) - torch.tensor(c.logprobs)
        for own, c in zip(scores, found, strict=True)
    ]
    return float(torch.cat(gaps).abs().mean())


@pytest.mark.parametrize(
    "names", [(OWN,), (None,), (OWN, None, JUDGE)], ids=["own", "base", "by row"]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_graphs)], ids=str
)
def test_a_row_is_drawn_with_its_adapter(names: tuple[str | None, ...], dtype: torch.dtype) -> None:
    engine = make_engine(dtype)
    asked = [
        Request(**{**vars(one), "adapter": names[i % len(names)], "samples": (0,)})
        for i, one in enumerate(requests(6, 20, 16))
    ]
    found = [group[0] for group in engine.generate(asked, seed=3, step=0)]
    assert engine.captures_graphs == (dtype == torch.bfloat16) == bool(engine.graph_bytes())
    assert distance(engine, asked, found, 0) < (1e-3 if dtype == torch.float32 else 0.1)
    if len(names) > 1:
        assert distance(engine, asked, found, 1) > 0.5


@needs_graphs
def test_graphs_follow_the_adapters_values_and_their_set() -> None:
    engine = make_engine(torch.bfloat16)
    asked = [Request(**{**vars(one), "samples": (0,)}) for one in requests(4, 20, 12)]
    engine.generate(asked, seed=3, step=0)
    fill({n: own for n, own in engine.local_tensors().items() if "lora" in n}, 2)
    found = [group[0] for group in engine.generate(asked, seed=3, step=0)]
    assert distance(engine, asked, found, 0) < 0.1
    judged = [Request(**{**vars(one), "adapter": JUDGE}) for one in asked]
    found = [group[0] for group in engine.generate(judged, seed=3, step=0)]
    assert distance(engine, judged, found, 0) < 0.1
    assert engine.graph_bytes()
    engine.remove_adapter(JUDGE)
    assert not engine.graph_bytes()
