"""The native engine with adapters: the tokens of naive decoding with the merged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapted_models import (
    adapted_engine,
    add_filled,
    fill_held,
    merged_engine,
    merged_source,
    uneven,
    values_of,
)
from rollout_models import (
    StateDict,
    assert_same,
    make_engine,
    naive,
    prompts_of,
    request,
    tiny_model,
)
from test_engine_moe import MODELS, SIZES, Lively

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import ExpertsForm, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.rollout.native import weights as engine_weights
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import OWN, Completion, Request
from spmdrl.world import World

JUDGE = "judge"


def load(length: int, **changes: Any) -> list[Request]:
    """Two prompts; `length` tokens, which decides whether the weights are laid out in blocks."""
    first, second = prompts_of(9, 20)
    asked = [
        request(first, 0, 2, max_tokens=length, margins=True),
        request(second, 1, 1, max_tokens=length, margins=True, temperature=0),
    ]
    return [Request(**{**vars(one), **changes}) for one in asked]


def generate(engine: NativeEngine, asked: list[Request]) -> list[list[Completion]]:
    return engine.generate(asked, seed=5, step=1)


def assert_alike(found: list[list[Completion]], wanted: list[list[Completion]], name: str) -> None:
    for i, (group, others) in enumerate(zip(found, wanted, strict=True)):
        for sample, (one, other) in enumerate(zip(group, others, strict=True)):
            assert_same(one, other, f"{name}, prompt {i}, sample {sample}")


@pytest.mark.parametrize("length", [8, 24], ids=["additions", "merged copy"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_tokens_are_those_of_the_merged_model(name: str, length: int) -> None:
    model, source = tiny_model(name)
    adapter = uneven(model)
    values = values_of(model, adapter)
    dense = merged_source(source, adapter, values)
    assert (length >= engine_weights.MIN_STEPS) == (length == 24)
    found = generate(adapted_engine(model, source, adapter, values), load(length))
    plain = generate(make_engine(model, source), load(length))
    assert [c.tokens for g in found for c in g] != [c.tokens for g in plain for c in g]
    for i, asked in enumerate(load(length)):
        for sample in asked.samples:
            want = naive(model, dense, asked, sample, seed=5, step=1)
            assert_same(found[i][sample], want, f"{name}, prompt {i}, sample {sample}")


def test_scores_are_those_of_the_merged_model() -> None:
    model, source = tiny_model()
    adapter = uneven(model)
    values = values_of(model, adapter)
    sequences = prompts_of(5, 33, 16)
    found = adapted_engine(model, source, adapter, values).score(sequences)
    wanted = merged_engine(model, source, adapter, values).score(sequences)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=0)


def test_a_call_sees_the_values_that_the_adapter_has_then() -> None:
    """The merged copy in blocks lasts for one call."""
    model, source = tiny_model()
    adapter = uneven(model)
    values, later = values_of(model, adapter), values_of(model, adapter, seed=6)
    engine = adapted_engine(model, source, adapter, values)
    generate(engine, load(24))
    held = {n: own for n, own in engine.local_tensors().items() if "lora" in n}
    fill_held(held, later)
    wanted = merged_engine(model, source, adapter, later)
    assert_alike(generate(engine, load(24)), generate(wanted, load(24)), "later")


def test_the_engine_needs_the_adapters_tensors() -> None:
    model, _ = tiny_model()
    adapter = uneven(model)
    engine = NativeEngine(model, adapter=adapter)
    names = {n for n in engine.weights.table() if "lora" in n}
    own = AdapterWeights(model, adapter)
    assert names == {name for name, _ in own.named_parameters()}
    for name in engine.weights.table():
        if name not in names:
            engine.allocate(name)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.qkv\.lora_A was never loaded"):
        generate(engine, load(8))


def adapted_ranks(world: World, name: str, length: int) -> list[list[Completion]]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    model, source = tiny_model(name)
    adapter = uneven(model)
    engine = adapted_engine(model, source, adapter, values_of(model, adapter), tp)
    return generate(engine, load(length))


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_two_ranks_draw_the_tokens_of_the_merged_model(name: str) -> None:
    model, source = tiny_model(name)
    adapter = uneven(model)
    wanted = merged_engine(model, source, adapter, values_of(model, adapter))
    for length in (8, 24):
        for found in run_ranks(adapted_ranks, 2, name, length):
            assert_alike(found, generate(wanted, load(length)), f"{name} {length}")


@pytest.mark.parametrize("length", [8, 24])
def test_samples_of_one_call_have_their_own_adapters(length: int) -> None:
    """The policy's, a judge's and none: each as in a call of its own. The prompts are alike, and
    their keys and values are not shared between adapters.
    """
    model, source = tiny_model()
    adapter, judge = uneven(model), uneven(model)
    values, judges = values_of(model, adapter), values_of(model, judge, seed=6)
    engine = adapted_engine(model, source, adapter, values)
    add_filled(engine, JUDGE, judge, judges)
    names = (OWN, None, JUDGE)
    [prompt] = prompts_of(150)
    asked = [
        request(prompt, number, 2, max_tokens=length, margins=True, temperature=number % 2)
        for number in range(6)
    ]
    mixed = [Request(**{**vars(r), "adapter": names[i % 3]}) for i, r in enumerate(asked)]
    found = generate(engine, mixed)
    engines = {
        OWN: merged_engine(model, source, adapter, values),
        None: make_engine(model, source),
        JUDGE: merged_engine(model, source, judge, judges),
    }
    for name in names:
        own = [i for i, one in enumerate(mixed) if one.adapter == name]
        alone = generate(engine, [mixed[i] for i in own])
        assert_alike([found[i] for i in own], alone, f"{name} alone")
        wanted = generate(engines[name], [asked[i] for i in own])
        assert_alike(alone, wanted, f"{name} merged")
    assert len({found[i][0].tokens for i in (1, 3, 5)}) == 3


def test_sequences_of_one_call_are_scored_with_their_own_adapters() -> None:
    model, source = tiny_model()
    adapter, judge = uneven(model), uneven(model)
    engine = adapted_engine(model, source, adapter, values_of(model, adapter))
    add_filled(engine, JUDGE, judge, values_of(model, judge, seed=6))
    sequences, names = prompts_of(5, 33, 16, 20), [None, JUDGE, OWN, JUDGE]
    mixed = engine.score(sequences, adapters=names)
    for sequence, name, found in zip(sequences, names, mixed, strict=True):
        [alone] = engine.score([sequence], adapters=[name])
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), atol=1e-4, rtol=0)
    apart = [engine.score(sequences[:1], adapters=[name])[0] for name in (None, JUDGE, OWN)]
    assert apart[0] != apart[1] != apart[2] != apart[0]


def test_adapters_that_the_engine_lacks_are_refused() -> None:
    model, source = tiny_model()
    adapter = uneven(model)
    engine = adapted_engine(model, source, adapter, values_of(model, adapter))
    engine.add_adapter(JUDGE, engine.new_adapter(JUDGE, adapter))
    engine.remove_adapter(JUDGE)
    with pytest.raises(ValueError, match="asks for adapter 'judge'"):
        generate(engine, load(8, adapter=JUDGE))
    plain = make_engine(model, source)
    with pytest.raises(ValueError, match="asks for the base alone"):
        generate(plain, load(8, adapter=None))
    assert generate(plain, load(8))


def experts_model(name: str) -> tuple[ModelConfig, StateDict]:
    model = parse_config({**SIZES, "architectures": [f"{name}ForCausalLM"], **MODELS[name]})
    lively = Lively(model)
    parts = [
        Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        for name, shape in global_shapes(model).items()
    ]
    return model, StateDict({part.name: lively.read(part) for part in parts})


@pytest.mark.parametrize("length", [8, 24], ids=["additions", "merged copy"])
@pytest.mark.parametrize(
    ("name", "form"), [("Qwen3Moe", "each"), ("Qwen3Moe", "shared"), ("Mixtral", "shared")]
)
def test_experts_have_their_adapters(name: str, form: ExpertsForm, length: int) -> None:
    """A merged copy has the other matrices' adapters; those of experts are added in every step."""
    model, source = experts_model(name)
    targets = find_targets(model, ["experts", "v_proj"])
    adapter = make_adapter(targets, rank=3, alpha=4, experts=form)
    values = values_of(model, adapter)
    found = generate(adapted_engine(model, source, adapter, values), load(length))
    plain = generate(make_engine(model, source), load(length))
    assert [c.tokens for g in found for c in g] != [c.tokens for g in plain for c in g]
    wanted = merged_engine(model, source, adapter, values)
    assert_alike(found, generate(wanted, load(length)), f"{name} {length}")

    judge = make_adapter(find_targets(model, ["experts"]), rank=2, alpha=4)
    judges = values_of(model, judge, seed=6)
    engine = adapted_engine(model, source, adapter, values)
    add_filled(engine, JUDGE, judge, judges)
    asked = [Request(**{**vars(one), "adapter": JUDGE}) for one in load(length)]
    mixed = generate(engine, [load(length)[0], asked[1]])
    wanted = merged_engine(model, source, judge, judges)
    assert_alike([mixed[1]], [generate(wanted, load(length))[1]], f"{name} judge")
    assert_alike([mixed[0]], [found[0]], f"{name} own")
