"""DeepSpeed's partitions as slices: each value once per tensor-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import Adapter, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, parse_config, tiny
from spmdrl.models.decoder import Decoder
from spmdrl.models.family import families
from spmdrl.models.flat_pieces import flat_pieces
from spmdrl.models.local_shards import Table
from spmdrl.models.sharding import SCORE, Head, buffer_names, global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.models.zero_layout import (
    Stage,
    ZeroParameter,
    optimizer_groups,
    partition_sizes,
    shard_ranges,
    zero_layout,
    zero_parameters,
    zero_state_layout,
)


def usual(architecture: str, **changes: Any) -> ModelConfig:
    model_type = families()[architecture].model_type
    return parse_config({"architectures": [architecture], "model_type": model_type, **changes})


def some_adapter(model: ModelConfig) -> Adapter:
    is_stacked = model.moe is not None and model.moe.form != "each"
    targets = ["attention"] if is_stacked else ["all"]
    return make_adapter(find_targets(model, targets), rank=3, alpha=6.0)


def small(architecture: str) -> ModelConfig:
    return tiny(usual(architecture, vocab_size=97))


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "Phi3ForCausalLM", "Olmo2ForCausalLM", "GptOssForCausalLM"]
    + ["Qwen3NextForCausalLM", "Glm4MoeForCausalLM"],
)
def test_parameters_are_the_decoder_s(architecture: str) -> None:
    model = small(architecture)
    heads: tuple[Head, ...] = ("lm", "score")
    for head in heads:
        own = dict(Decoder(model, head=head).named_parameters())
        found = {p.name: p for p in zero_parameters(model, head=head)}
        assert set(found) == set(own)
        for name, parameter in own.items():
            assert found[name].shape == tuple(parameter.shape), name
            # the rule of `training.weights.make_leaves`
            decays = parameter.ndim > 1 and not name.endswith("bias")
            assert found[name].decay == decays, name
        fixed = {s.name for p in found.values() if not p.trained for s in p.slices}
        assert fixed == buffer_names(model)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_adapters_come_after_the_model_and_the_head_last(architecture: str) -> None:
    model = small(architecture)
    adapter = some_adapter(model)
    frozen = set(global_shapes(model, "score")) - {SCORE}
    found = zero_parameters(model, head="score", frozen=frozen, adapter=adapter)
    added = AdapterWeights(model, adapter, head=True)
    trained = [p for p in found if p.trained]
    own = {name: tuple(p.shape) for name, p in added.named_parameters()}
    assert {p.name: p.shape for p in trained} == own
    assert found[-len(trained) :] == tuple(trained) and found[-1].name == "head.weight"
    assert all(p.decay for p in trained)
    fixed = {name for name, _ in Decoder(model).named_parameters()} - {"head.weight"}
    assert {p.name for p in found if not p.trained} == fixed


# The layouts, against flat buffers that are made and cut


MODELS = (
    tiny(usual("LlamaForCausalLM", vocab_size=96, tie_word_embeddings=True)),
    tiny(usual("Qwen2ForCausalLM", vocab_size=98)),
    tiny(usual("GptOssForCausalLM", vocab_size=96)),
    tiny(usual("Qwen3MoeForCausalLM", vocab_size=96)),
    tiny(usual("Qwen3NextForCausalLM", vocab_size=96)),
)


def numbered(model: ModelConfig, adapter: Adapter | None) -> dict[str, Tensor]:
    """Tensors of the name space whose values are all different."""
    parameters = zero_parameters(model, adapter=adapter)
    shapes = {s.name: s.shape for p in parameters for s in p.slices}
    found, at = {}, 1
    for name, shape in shapes.items():
        size = math.prod(shape)
        found[name] = torch.arange(at, at + size, dtype=torch.int64).view(shape)
        at += size
    return found


def box(tensors: dict[str, Tensor], held: Slice) -> Tensor:
    place = tuple(slice(a, b) for a, b in zip(held.start, held.stop, strict=True))
    return tensors[held.name][place]


def local(tensors: dict[str, Tensor], shape: Sequence[int], held: Sequence[Slice]) -> Tensor:
    found = torch.zeros(tuple(shape), dtype=torch.int64)
    for piece in held:
        rows = found[piece.offset : piece.offset + piece.rows]
        rows.copy_(box(tensors, piece).reshape(rows.shape))
    return found


def flat_parts(
    values: dict[str, Tensor], groups: Sequence[Sequence[ZeroParameter]], stage: int, count: int
) -> list[list[Tensor]]:
    """Each rank's part of every group, cut as DeepSpeed's sources cut it."""
    found: list[list[Tensor]] = [[] for _ in range(count)]
    for group in groups:
        flats = [values[p.name].flatten() for p in group]
        if stage == 3:
            padded = [torch.cat([f, f.new_zeros(-len(f) % count)]).chunk(count) for f in flats]
            for rank in range(count):
                found[rank].append(torch.cat([parts[rank] for parts in padded]))
            continue
        whole = torch.cat(flats)
        whole = torch.cat([whole, whole.new_zeros(-len(whole) % (2 * count))])
        for rank, part in enumerate(whole.chunk(count)):
            found[rank].append(part)
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, dict[str, int], Stage, Adapter | None, set[str]]:
    model = draw(st.sampled_from(MODELS))
    axes = {axis: draw(st.integers(1, 3)) for axis in ("dp_replicate", "dp_shard", "cp")}
    stage = draw(st.sampled_from((1, 2, 3)))
    tp = draw(st.sampled_from((1, 2)))
    adapter = some_adapter(model) if draw(st.booleans()) else None
    names = sorted(global_shapes(model))
    frozen = set(names) if adapter is not None else set()
    if adapter is None and draw(st.booleans()):
        frozen = {name for name in names if "norm" in name}
    return model, {**axes, "tp": tp}, stage, adapter, frozen


@settings(max_examples=12, deadline=None)
@given(cases())
def test_every_rank_holds_what_its_flat_partitions_hold(
    case: tuple[ModelConfig, dict[str, int], Stage, Adapter | None, set[str]],
) -> None:
    model, degrees, stage, adapter, frozen = case
    tensors = numbered(model, adapter)
    tp = degrees["tp"]
    count = math.prod(degrees[axis] for axis in ("dp_replicate", "dp_shard", "cp"))
    ranks = range(10, 10 + count * tp)
    given = {"frozen": frozen, "adapter": adapter}
    weights = zero_layout(model, ranks, degrees, stage, torch.bfloat16, **given)
    states = zero_state_layout(model, ranks, degrees, stage, **given)
    for tp_rank in range(tp):
        parameters = zero_parameters(model, tp_rank=tp_rank, tp_size=tp, **given)
        values = {p.name: local(tensors, p.shape, p.slices) for p in parameters}
        groups = optimizer_groups(parameters)
        parts = flat_parts(values, groups, stage, count)
        assert partition_sizes(parameters, stage, count) == tuple(len(x) for x in parts[0])
        seen: dict[str, list[Tensor]] = {}
        for shard in range(count):
            rank = ranks[shard * tp + tp_rank]
            state = {n: local(tensors, s.shape, s.slices) for n, s in states[rank].items()}
            held = {n: local(tensors, s.shape, s.slices) for n, s in weights[rank].items()}
            for p in parameters:
                own = joined(p.name, state)
                if p.trained:
                    at = shard_ranges(parameters, stage, shard, count)[p.name]
                    whole = parts[shard][at.group]
                    size = at.stop - at.start
                    assert torch.equal(own, whole[at.offset : at.offset + size]), p.name
                    assert torch.equal(own, values[p.name].flatten()[at.start : at.stop])
                    seen.setdefault(p.name, []).append(own)
                else:
                    assert not own.numel()
                if stage == 3:
                    if p.trained:
                        assert torch.equal(joined(p.name, held), own)
                    else:
                        seen.setdefault(p.name, []).append(joined(p.name, held))
                else:
                    assert torch.equal(held[p.name], values[p.name])
        for name, found in seen.items():
            assert torch.equal(torch.cat(found), values[name].flatten()), name
        dtypes_and_frozen(weights[ranks[tp_rank]], parameters)


def joined(name: str, held: dict[str, Tensor]) -> Tensor:
    """The pieces of a parameter, or the whole one, below one another."""
    own = [tensor.flatten() for local, tensor in held.items() if local.rpartition(":")[0] == name]
    return torch.cat([*own, held[name].flatten()] if name in held else [torch.zeros(0), *own])


def dtypes_and_frozen(table: Table, parameters: Sequence[ZeroParameter]) -> None:
    by_name = {p.name: p for p in parameters}
    for name, held in table.items():
        p = by_name[name.rpartition(":")[0] or name]
        assert held.frozen is not p.trained
        assert held.dtype is (torch.float32 if p.is_buffer else torch.bfloat16)


def test_columns_of_stacked_tensors_are_their_last_dim() -> None:
    """Three experts [2, 4] of a tensor [3, 2, 4] are six local rows of four columns."""
    pieces = [
        Slice(name="w", shape=(3, 2, 4), start=(e, 0, 0), stop=(e + 1, 2, 4), offset=2 * e)
        for e in range(3)
    ]
    given = ZeroParameter(name="w", shape=(6, 4), slices=tuple(pieces), trained=True, decay=True)
    tensors = {"w": torch.arange(24).view(3, 2, 4)}
    for start in range(24):
        for stop in range(start + 1, 25):
            found = [local(tensors, p.shape, p.slices) for p in flat_pieces(given, start, stop)]
            assert torch.cat([x.flatten() for x in found]).tolist() == list(range(start, stop))


def test_only_the_ranks_that_are_asked_for() -> None:
    model = MODELS[0]
    degrees = {"dp_shard": 4}
    whole = zero_state_layout(model, range(4), degrees, 2)
    some = zero_state_layout(model, range(4), degrees, 2, only=[1, 3])
    assert some == {rank: whole[rank] for rank in (1, 3)}
    weights = zero_layout(model, range(4), degrees, 2, torch.float32)
    assert len({id(table) for table in weights.values()}) == 1
