"""Plans of many ranks: as fast as their classes of ranks are few, and as they were rank by rank."""

from __future__ import annotations

import resource
import time
from dataclasses import replace

import pytest

from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig, resized
from spmdrl.planning import memory
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.known_models import known_model
from spmdrl.planning.plan import RolePlan

TRAINED = ("policy", "reference", "reward", "value")


def configured(layout: str, nodes: int, *, experts: bool = False) -> Config:
    """PPO: `tp` and `shards` have all roles on all ranks, `apart` has none on another's."""
    degrees = {"tp": "tp=8", "shards": "tp=1", "apart": "tp=8"}[layout]
    words = ["device=cuda", "algorithm.kl_horizon=10000", "roles.rollout.tp=8"]
    words += ["data.prompts_per_step=1024", "train.recompute=layer"]
    for name in TRAINED:
        words += [f"roles.{name}.dp_shard=all", f"roles.{name}.{degrees}"]
        words += [f"roles.{name}.ep=8"] * experts
    if layout == "apart":
        size = nodes // 5
        words += [
            f"roles.{name}.ranks=nodes {i * size}-{(i + 1) * size - 1}"
            for i, name in enumerate((*TRAINED, "rollout"))
        ]
    return load_config("rlhf/ppo", words)


def plan(config: Config, model: ModelConfig, ranks: int) -> RolePlan:
    return plan_from_shapes(
        config,
        ranks,
        8,
        device_type="cuda",
        device_bytes=10**12,
        models=dict.fromkeys(config.roles, model),
    )


class RankByRank:
    """A class for every table, as if no two had the same sizes."""

    def number(self, table: object) -> int:
        return id(table)


@pytest.mark.parametrize(("layout", "name"), [("shards", "llama-2-7b"), ("apart", "moe-300b-a26b")])
def test_plans_by_class_are_those_rank_by_rank(
    monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    nodes = 5 if layout == "apart" else 2
    experts = name.endswith("a26b")
    config = configured(layout, nodes, experts=experts)
    model = resized(known_model(name), {"num_hidden_layers": 4})
    found = plan(config, model, 8 * nodes)
    monkeypatch.setattr(memory, "TableClasses", RankByRank)
    single = plan(config, model, 8 * nodes)
    assert {name: sync.digest for name, sync in found.syncs.items()} == {
        name: sync.digest for name, sync in single.syncs.items()
    }
    distinct = len({id(own) for own in found.memory.values()})
    assert distinct < len({id(own) for own in single.memory.values()})
    for rank, own in found.memory.items():
        other = single.memory[rank]
        assert replace(own.plan, rank=0) == replace(other.plan, rank=0), rank
        assert (own.working_bytes, own.syncs_from_host) == (
            other.working_bytes,
            other.syncs_from_host,
        ), rank


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp", "shards", "apart"])
@pytest.mark.parametrize("name", ["llama-3.1-70b", "dense-300b"])
@pytest.mark.parametrize(("ranks", "seconds"), [(512, 15), (4096, 60)])
def test_thousands_of_ranks_are_planned_in_seconds(
    layout: str, name: str, ranks: int, seconds: float
) -> None:
    config, model = configured(layout, ranks // 8), known_model(name)
    begun = time.process_time()
    plan(config, model, ranks)
    assert time.process_time() - begun < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20
