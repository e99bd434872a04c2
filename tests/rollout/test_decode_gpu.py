"""Decode steps of the native engine on CUDA: waits, captures, memory. Needs one GPU."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from spmdrl.memory.host_copies import Arriving, to_device, to_host
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.linear import wide_linear
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.graphs import DecodeGraphs, buckets
from spmdrl.rollout.native.varlen import varlen_is_usable
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Request, SamplingParams
from spmdrl.training.logprobs import token_logprobs

HAS_CUDA = torch.cuda.is_available()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device"),
]

needs_graphs = pytest.mark.skipif(
    not HAS_CUDA or not varlen_is_usable(torch.bfloat16, 16, torch.device("cuda", 0)),
    reason=f"torch {torch.__version__} has no paged attention, so no step is captured",
)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Memory is freed by the last reference, without Python's collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def model() -> ModelConfig:
    return parse_config(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "eos_token_id": 1,
            "bos_token_id": 2,
        }
    )


def make_engine(device: torch.device, dtype: torch.dtype, **options: Any) -> NativeEngine:
    engine = NativeEngine(
        model(), options=NativeOptions(max_running=64, **options), device=device, dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    for name, held in engine.weights.table().items():
        engine.allocate(name).copy_(torch.randn(held.shape, generator=generator) * 0.1)
    return engine


def requests(count: int, prompt: int, length: int, **sampling: Any) -> list[Request]:
    asked = SamplingParams(max_tokens=length, ignore_eos=True, **sampling)
    tokens = [5 + j % 500 for j in range(1, prompt)]
    return [
        Request(tokens=(3 + i, *tokens), prompt_id=i, samples=(0, 1), sampling=asked)
        for i in range(count)
    ]


PLAIN: dict[str, Any] = {"temperature": 0.7}


@pytest.mark.parametrize(
    ("dtype", "sampling", "most"),
    [
        (torch.bfloat16, {}, 0),
        (torch.bfloat16, PLAIN, 0),
        (torch.bfloat16, {"temperature": 0}, 0),
        (torch.bfloat16, {"top_k": 20}, 1),
        (torch.float32, PLAIN, 0),
    ],
    ids=str,
)
def test_the_host_waits_for_a_decode_step_once(
    device: torch.device,
    dtype: torch.dtype,
    sampling: dict[str, Any],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for the results of the step before, and at most so often for anything else."""
    engine = make_engine(device, dtype)
    counts: list[int] = []
    digested: list[int] = []
    arrivals: list[Arriving] = []
    wait = Arriving.wait

    def counted(arriving: Arriving) -> list[Tensor]:
        arrivals.append(arriving)
        return wait(arriving)

    def note(*_: int) -> None:
        counts.append(len(caught))
        digested.append(len(arrivals))

    monkeypatch.setattr(Arriving, "wait", counted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.generate(
                requests(4, 20, 12, **sampling),
                seed=0,
                step=0,
                progress=note,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    others = [b - a for a, b in pairwise(counts)]
    # nothing is there to wait for when the first step is given to the device
    assert digested[0] == 0 and {b - a for a, b in pairwise(digested)} == {1}, digested
    # the first decode steps copy a shared block, and capture
    assert max(others[3:]) <= most, (others, {str(w.message) for w in caught})


def in_use() -> int:
    """Bytes of the device that anyone has, apart from what torch's allocator caches."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


@needs_graphs
def test_releasing_the_cache_frees_it_at_once(device: torch.device, uncollected: None) -> None:
    engine = make_engine(device, torch.bfloat16)
    assert engine.captures_graphs
    for _ in range(2):  # the sampler's buffers and cuBLAS's workspaces stay
        engine.generate(requests(4, 20, 8), seed=0, step=0)
        assert engine.cache_bytes() and engine.graph_bytes()
        engine.release_cache()
        torch.cuda.synchronize()
    start, used = torch.cuda.memory_allocated(), in_use()
    engine.generate(requests(4, 20, 8), seed=0, step=0)
    cache, keeps = engine.cache_bytes(), engine.keeps_cache_address
    assert in_use() - used >= cache
    engine.release_cache()
    assert engine.cache_bytes() == 0 and bool(engine.graph_bytes()) == keeps
    assert torch.cuda.memory_allocated() == start and in_use() == used
    engine.close()
    assert engine.graph_bytes() == 0
    assert in_use() < used if keeps else in_use() == used


@needs_graphs
def test_a_cache_with_room_for_the_longest_row_is_made_once(device: torch.device) -> None:
    engine = make_engine(device, torch.bfloat16, samples=16, longest=1000)
    sizes = []
    for prompt in (20, 500, 900):
        engine.generate(requests(8, prompt, 6), seed=0, step=0)
        sizes.append((engine.cache_bytes(), engine.graph_bytes()))
    assert len(set(sizes)) == 1
    per_token = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, values, bytes
    assert sizes[0][0] == 16 * 1024 * per_token  # pages of 256


@needs_graphs
def test_a_cache_that_must_grow_grows_by_more_than_it_must(device: torch.device) -> None:
    engine = make_engine(device, torch.bfloat16)
    sizes = []
    for count in range(9, 17):
        engine.generate(requests(count, 300, 2), seed=0, step=0)
        sizes.append(engine.cache_bytes())
    assert sizes == sorted(sizes) and len(set(sizes)) <= 4


@needs_graphs
def test_a_few_sizes_are_captured_and_logits_are_not_in_their_pool(device: torch.device) -> None:
    engine = make_engine(device, torch.bfloat16)
    asked = [
        Request(
            tokens=(3 + i, 4),
            prompt_id=i,
            samples=(0,),
            sampling=SamplingParams(max_tokens=2 + i, ignore_eos=True),
        )
        for i in range(40)
    ]
    torch.cuda.empty_cache()
    engine.generate(asked, seed=0, step=0)
    graphs = engine._workspace._graphs
    assert graphs is not None
    captured = [size for size, _ in graphs._captured]
    assert captured == sorted(captured, reverse=True), "the largest fills the pool, if it is first"
    assert set(captured) == {n for n in buckets(64) if n < 64} | {64}
    outputs = [tensor for held in graphs._captured.values() for tensor in held.results]
    assert all(tensor.shape[1] == 64 for tensor in outputs), "hidden states"


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, seen: list[bool]) -> None:
        self.own, self.seen = self, seen

    def __del__(self) -> None:
        self.seen.append(torch.cuda.is_current_stream_capturing())


def test_no_garbage_is_collected_during_a_capture(device: torch.device) -> None:
    seen: list[bool] = []

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(100):
            Cycle(seen)
        return (x + 1,)

    def idle() -> list[Tensor]:
        return [torch.zeros_like(held)]

    graphs, held = DecodeGraphs(8, device), torch.arange(4, device=device)
    thresholds = gc.get_threshold()
    gc.set_threshold(10)
    results = []
    try:
        with torch.inference_mode():
            for _ in range(3):
                results.append(graphs.run(4, [held], forward, idle=idle)[0].tolist())
                held.add_(1)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert results == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert len(seen) == 200 and not any(seen)
    assert gc.isenabled()


def test_states_advance_once_in_a_step_that_is_captured(device: torch.device) -> None:
    states = torch.zeros(3, device=device)

    def forward(places: Tensor) -> tuple[Tensor, ...]:
        states.index_copy_(0, places, states.index_select(0, places) + 1)
        return (states.index_select(0, places),)

    graphs = DecodeGraphs(8, device)
    held, trash = (torch.tensor([place], device=device) for place in (0, 2))
    with torch.inference_mode():
        for step in range(1, 4):
            for place in (0, 1):
                held.fill_(place)
                [found] = graphs.run(1, [held], forward, idle=lambda: [trash])
                assert found.tolist() == [step]
    assert states.tolist()[:2] == [3, 3]


def test_logits_are_not_rounded_to_half_precision(device: torch.device) -> None:
    """The engine's and the trainer's products: their log-probabilities are compared."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).bfloat16()
    hidden = torch.randn(32, 64, generator=generator).bfloat16()
    targets = torch.randint(512, (32,), generator=generator)
    exact = hidden.double() @ weight.double().t()
    wide = wide_linear(hidden.to(device), weight.to(device))
    assert wide.dtype == torch.float32 and exact.abs().max() > 16
    assert (wide.cpu() - exact).abs().max() < 1e-4

    on_device = [x.to(device) for x in (hidden, weight, targets)]
    logprobs, _ = token_logprobs(*on_device, temperature=1.0, chunk=10)
    expected = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (logprobs.cpu() - expected).abs().max() < 1e-4

    engine = make_engine(device, torch.bfloat16)
    runner = engine._workspace.prepare(4).runner
    with torch.inference_mode():
        logits = runner._project(hidden.to(device)).cpu()
        head = engine.local_tensors()["embed_tokens.weight"][0].cpu()
    assert (logits - hidden.double() @ head.double().t()).abs().max() < 1e-4


def test_tensors_are_copied_together(device: torch.device) -> None:
    host = [
        torch.tensor([2**60, -3]),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([[1.5], [-2.0]]),
        torch.arange(6, dtype=torch.int32).view(2, 3).T,
        torch.tensor([True, False, True]),
    ]
    found = to_device(host, device)
    assert all(tensor.is_cuda for tensor in found)
    for tensor, back, expected in zip(found, to_host(found), host, strict=True):
        assert torch.equal(tensor.cpu(), expected) and torch.equal(back, expected)
        assert back.dtype == expected.dtype
