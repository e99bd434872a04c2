"""The engine on mixtures of experts: tokens of naive decoding, and the experts that it records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rollout_models import EOS, VOCAB, assert_same, dense, naive, prompts_of, request
from torch import Tensor

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import RandomCheckpoint, fill
from spmdrl.models.routing import Routing, unpack_choices
from spmdrl.models.tensors import Slice
from spmdrl.models.widths import cached_values
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Completion, Finish, Request
from spmdrl.world import World
from sweeps import swept
from tiny_model import load_into

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "eos_token_id": EOS,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


class Lively:
    """Random weights eight times as large as usual: sharp choices."""

    def __init__(self, model: ModelConfig) -> None:
        self._plain = RandomCheckpoint(model, 0)
        self.names, self.shape = self._plain.names, self._plain.shape

    def read(self, part: Slice) -> Tensor:
        values = self._plain.read(part)
        return values if part.name.endswith("norm.weight") else values * 8


def model(name: str) -> tuple[ModelConfig, Lively]:
    config = parse_config({**SIZES, **MODELS[name], "architectures": [f"{name}ForCausalLM"]})
    return config, Lively(config)


def engine_of(
    name: str, tp: Parallel | None = None, ep: Parallel | None = None, **options: Any
) -> NativeEngine:
    config, source = model(name)
    engine = NativeEngine(
        config, tp=tp, ep=ep, options=NativeOptions(**{"block_size": 8, **options})
    )
    table = engine.weights.table()
    fill(((engine.allocate(local), held.slices) for local, held in table.items()), source)
    return engine


def naive_experts(name: str, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """[tokens, L, K], and by how much each choice won over the first that was not chosen."""
    config, source = model(name)
    assert config.moe is not None
    decoder = Decoder(config, device="cpu")
    load_into(decoder, source)
    routing = Margins(config)
    with torch.no_grad():
        decoder(torch.tensor(tokens), torch.arange(len(tokens)), dense, routing=routing)
    return routing.chosen(), torch.stack(routing.margins, dim=1)


class Margins(Routing):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.margins: list[Tensor] = []

    def choose(self, layer: int, probabilities: Tensor) -> Tensor:
        chosen = super().choose(layer, probabilities)
        best = probabilities.topk(chosen.shape[1] + 1).values
        self.margins.append(best[:, -2] - best[:, -1])
        return chosen


def check(name: str, asked: list[Request], found: list[list[Completion]], *, seed: int) -> None:
    config, source = model(name)
    for i, one in enumerate(asked):
        for sample in one.samples:
            completion = found[i][sample]
            want = naive(config, source, one, sample, seed=seed, step=1)
            assert_same(completion, want, f"{name}, prompt {i}, sample {sample}")
            experts = completion.experts
            assert experts is not None and experts.dtype == torch.uint8
            tokens = [*one.tokens, *completion.tokens]
            chosen, margins = naive_experts(name, tokens)
            recorded = unpack_choices(experts)
            assert (recorded[-1] == -1).all() and recorded.shape == chosen.shape
            differs = (recorded[:-1].sort(-1).values != chosen[:-1].sort(-1).values).any(-1)
            assert not (differs & (margins[:-1] > 1e-5)).any(), (name, i, sample)


def load(margins: bool = True) -> list[Request]:
    prompts = prompts_of(9, 20, 33)
    settings: list[dict[str, Any]] = [{}, {"temperature": 0}, {"temperature": 0.8}]
    return [
        request(prompts[i], i, 1 + i, max_tokens=20, margins=margins, experts=True, **settings[i])
        for i in range(3)
    ]


@pytest.mark.parametrize("name", swept(MODELS, ["Qwen3Moe"]))
def test_tokens_and_experts_are_those_of_naive_decoding(name: str) -> None:
    """Prompts in chunks, shared by samples, and samples that are preempted."""
    config, _ = model(name)
    block = cached_values(config, 1) * 4 * 8
    engine = engine_of(name, prefill_tokens=24, max_running=4, kv_cache_gb=14.5 * block / 1e9)
    asked = load()
    check(name, asked, engine.generate(asked, seed=5, step=1), seed=5)
    assert engine.num_preempted > 0


def test_a_common_prefix_has_the_experts_of_the_sample_that_computed_it() -> None:
    (prefix, *ends) = prompts_of(300, 4, 7, 5)
    asked = [
        request(prefix + end, i, 2, max_tokens=4, experts=True, margins=True)
        for i, end in enumerate(ends)
    ]
    engine = engine_of("Qwen3Moe", prefill_tokens=128)
    found = engine.generate(asked, seed=1, step=1)
    check("Qwen3Moe", asked, found, seed=1)
    first, other = found[0][0].experts, found[2][1].experts
    assert first is not None and other is not None
    assert torch.equal(first[:300], other[:300])


@pytest.mark.parametrize("stop_after", [1, 2, 4, 9])
@pytest.mark.parametrize("max_running", [2, 8])
def test_experts_of_a_stopped_call_are_complete_when_it_goes_on_without_its_state(
    stop_after: int, max_running: int
) -> None:
    """Prompts that were not reached, or half computed, and samples amidst their answers."""
    options = {"prefill_tokens": 8, "max_running": max_running}
    asked = load(margins=False)
    whole = engine_of("Qwen3Moe", **options).generate(asked, seed=5, step=1)
    engine, steps = engine_of("Qwen3Moe", **options), 0

    def stops() -> bool:
        nonlocal steps
        steps += 1
        return steps >= stop_after

    left = engine.generate(asked, seed=5, step=1, should_stop=stops)
    assert any(c.finish == Finish.ABORTED for found in left for c in found)
    again = [replace(r, begun=tuple(found)) for r, found in zip(asked, left, strict=True)]
    resumed = engine.generate(again, seed=5, step=1)
    missing = torch.iinfo(torch.uint8).max
    for before, after in zip(whole, resumed, strict=True):
        for one, other in zip(before, after, strict=True):
            assert one.tokens == other.tokens
            assert one.experts is not None and other.experts is not None
            lacking = (other.experts == missing).flatten(1).any(1).nonzero().flatten().tolist()
            assert lacking == [len(one.experts) - 1]
            assert torch.equal(one.experts, other.experts)


def test_a_sample_that_goes_on_without_its_experts_has_those_of_its_own_prompt() -> None:
    """It finds the prompt with another sample of its request, not with the first of all."""
    asked = [request(p, i, 2, max_tokens=8, experts=True) for i, p in enumerate(prompts_of(20, 33))]
    engine = engine_of("Qwen3Moe", prefill_tokens=16, max_running=1)
    whole = engine.generate(asked, seed=5, step=1)
    cut = [
        replace(
            one,
            begun=tuple(
                replace(
                    c,
                    tokens=c.tokens[:3],
                    logprobs=c.logprobs[:3],
                    finish=Finish.ABORTED,
                    experts=None,
                )
                for c in found
            ),
        )
        for one, found in zip(asked, whole, strict=True)
    ]
    engine = engine_of("Qwen3Moe", prefill_tokens=16, max_running=4)
    resumed = engine.generate(cut, seed=5, step=1)
    for before, after in zip(whole, resumed, strict=True):
        for one, other in zip(before, after, strict=True):
            assert one.tokens == other.tokens
            assert one.experts is not None and other.experts is not None
            assert torch.equal(one.experts, other.experts)


def test_experts_of_a_dense_model_are_refused() -> None:
    config = parse_config({**SIZES, "architectures": ["LlamaForCausalLM"]})
    engine = NativeEngine(config)
    fill(
        ((engine.allocate(n), held.slices) for n, held in engine.weights.table().items()),
        RandomCheckpoint(config, 0),
    )
    with pytest.raises(ValueError, match="asks for its experts, but LlamaForCausalLM has none"):
        engine.generate(load(), seed=0, step=0)


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 4}])
def test_a_mixture_whose_layers_are_all_dense_draws_the_tokens_of_naive_decoding(
    change: dict[str, Any],
) -> None:
    described = {**SIZES, **MODELS["Qwen3Moe"], "architectures": ["Qwen3MoeForCausalLM"], **change}
    config = parse_config(described)
    source = Lively(config)
    engine = NativeEngine(config)
    table = engine.weights.table()
    fill(((engine.allocate(local), held.slices) for local, held in table.items()), source)
    asked = [request(prompts_of(9)[0], 0, 2, max_tokens=8, margins=True)]
    found = engine.generate(asked, seed=5, step=1)
    for sample in asked[0].samples:
        want = naive(config, source, asked[0], sample, seed=5, step=1)
        assert_same(found[0][sample], want, f"sample {sample}")


def on_ranks(world: World, degrees: dict[str, int]) -> list[list[list[Completion]]]:
    mesh = Mesh("rollout", range(world.size), degrees, "cpu")
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    ep = Parallel(rank=mesh.coordinate("ep"), size=mesh.size("ep"))
    return [
        engine_of(name, tp, ep, max_running=4).generate(load(), seed=5, step=1) for name in MODELS
    ]


@pytest.mark.parametrize(
    "degrees",
    [pytest.param({"tp": 2}, marks=pytest.mark.full), {"tp": 2, "ep": 2}],
    ids=["tp2", "tp2_ep2"],
)
def test_two_ranks_draw_the_tokens_and_experts_of_one(degrees: dict[str, int]) -> None:
    first, second = run_ranks(on_ranks, 2, degrees)
    for i, name in enumerate(MODELS):
        check(name, load(), first[i], seed=5)
        for one, two in zip(first[i], second[i], strict=True):
            assert [c.tokens for c in one] == [c.tokens for c in two]
            assert all(
                a.experts is not None
                and b.experts is not None
                and torch.equal(a.experts, b.experts)
                for a, b in zip(one, two, strict=True)
            )


UNEVEN = ([0, 1], [2], [], [0, 2])
"""The requests of `load` that each replica has: some are done before others, one has none."""


def on_replicas(
    world: World, degrees: dict[str, int], stop_after: int
) -> tuple[list[int], list[list[Completion]], list[list[float]], bool]:
    """The replica's requests, its completions and scores, and whether it has only some experts."""
    mesh = Mesh("rollout", range(world.size), degrees, "cpu")
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    ep = Parallel(group=mesh.group("exchange"), rank=mesh.coordinate("ep"), size=mesh.size("ep"))
    engine, steps = engine_of("Qwen3Moe", tp, ep, max_running=4), 0
    own = UNEVEN[mesh.coordinate("dp")]
    asked = [load()[i] for i in own]

    def stops() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_after and mesh.coordinate("dp") == 1

    found = engine.generate(asked, seed=5, step=1, should_stop=stops)
    scores = engine.score([request.tokens for request in asked])
    again = engine.generate(asked, seed=5, step=1, should_stop=stops)
    if not stop_after:
        assert [[c.tokens for c in group] for group in again] == [
            [c.tokens for c in group] for group in found
        ]
    whole = model("Qwen3Moe")[0].moe
    assert whole is not None
    rows = engine.weights.table()["layers.0.mlp.experts.gate_up"].shape[0]
    held = rows / (2 * whole.width)
    return own, found, scores, held == whole.num_experts / degrees["ep"]


@pytest.mark.parametrize(
    "degrees",
    [
        pytest.param({"dp_replicate": 4, "ep": 4}, marks=pytest.mark.full),
        {"dp_replicate": 2, "tp": 2, "ep": 4},
    ],
)
def test_replicas_that_share_experts_draw_the_tokens_of_one_rank(degrees: dict[str, int]) -> None:
    single = engine_of("Qwen3Moe", max_running=4)
    for own, found, scores, is_part in run_ranks(on_replicas, 4, degrees, 0):
        assert is_part
        asked = [load()[i] for i in own]
        check("Qwen3Moe", asked, found, seed=5)
        expected = single.score([request.tokens for request in asked])
        for one, other in zip(scores, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_stop_of_one_replica_stops_those_that_share_its_experts() -> None:
    results = run_ranks(on_replicas, 4, {"dp_replicate": 4, "ep": 4}, 5)
    lengths = [len(c.tokens) for _, found, _, _ in results for group in found for c in group]
    assert max(lengths) <= 5
    assert all(
        c.finish == Finish.ABORTED or c.finish == Finish.STOP
        for _, found, _, _ in results
        for group in found
        for c in group
    )
