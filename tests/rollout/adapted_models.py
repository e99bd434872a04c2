"""Adapters of the tiny models, and the models with one merged into their weights."""

from __future__ import annotations

from typing import Any

import torch
from rollout_models import StateDict, make_engine
from torch import Tensor

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.adapters import Adapter, LowRank, adapter_shapes, find_targets
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import fill
from spmdrl.models.local_shards import LocalTensors
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions

RANKS = {"q_proj": 3, "v_proj": 4, "o_proj": 5, "gate_proj": 2, "down_proj": 3}


def uneven(model: ModelConfig) -> Adapter:
    """Targets of unlike ranks and scales; `k_proj` and `up_proj` are none."""
    return Adapter(
        targets={
            name: LowRank(rank=RANKS[part], scale=0.5 + RANKS[part] / 4)
            for name in find_targets(model, ["all"])
            if (part := name.split(".")[-2]) in RANKS
        }
    )


def values_of(model: ModelConfig, adapter: Adapter, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(model, adapter)
    return {n: torch.randn(shape, generator=generator) * 0.2 for n, shape in shapes.items()}


def merged_source(source: StateDict, adapter: Adapter, values: dict[str, Tensor]) -> StateDict:
    """The weights with W + scale B A in place of W."""
    tensors = {name: source.tensor(name) for name in source.names}
    for name, own in adapter.targets.items():
        a, b = (values[each] for each in adapter.factors(name))
        tensors[name] = tensors[name] + own.scale * (b @ a)
    return StateDict(tensors)


def fill_held(held: LocalTensors, values: dict[str, Tensor]) -> None:
    fill(((tensor, slices) for tensor, slices in held.values()), StateDict(values))


def add_filled(
    engine: NativeEngine, name: str, adapter: Adapter, values: dict[str, Tensor]
) -> None:
    """Add an adapter with these values to an engine."""
    weights = engine.new_adapter(name, adapter)
    tables = weights.tables()
    fill_held({n: (p.data, tables[n]) for n, p in weights.named_parameters()}, values)
    engine.add_adapter(name, weights)


def adapted_engine(
    model: ModelConfig,
    source: StateDict,
    adapter: Adapter,
    values: dict[str, Tensor],
    tp: Parallel | None = None,
    **options: Any,
) -> NativeEngine:
    """An engine that holds base and adapter apart."""
    engine = NativeEngine(
        model, tp=tp, options=NativeOptions(**{"block_size": 8, **options}), adapter=adapter
    )
    everything = StateDict({name: source.tensor(name) for name in source.names} | values)
    table = engine.weights.table()
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), everything)
    return engine


def merged_engine(
    model: ModelConfig, source: StateDict, adapter: Adapter, values: dict[str, Tensor]
) -> NativeEngine:
    return make_engine(model, merged_source(source, adapter, values))
