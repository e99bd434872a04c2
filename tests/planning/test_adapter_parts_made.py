"""Parts as planned and as the roles of a run register them: the same bytes, and the same owners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flow_cases import write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.run.assembly.assembly import assemble, open_models, plan_models
from spmdrl.world import World
from tiny_model import make_tiny_model

FOUR = {
    "policy": {"adapter": {"rank": 3}},
    "reference": {"base": "policy"},
    "reward": {"base": "policy", "head": "zero"},
    "value": {"base": "policy", "adapter": {"rank": 2, "targets": ["mlp"]}, "head": "zero"},
    "rollout": {},
}
LENT = {  # the reference owns the base
    "policy": {"base": "reference", "adapter": {"rank": 3}},
    "reference": {},
    "reward": {"head": "zero"},
    "value": {"base": "reference", "adapter": {}, "head": "zero"},
    "rollout": {},
}
SHARDED = [f"roles.{name}.dp_shard=2" for name in FOUR if name != "rollout"]


def compare(world: World, cases: list[tuple[str, list[str]]]) -> list[dict[str, list[object]]]:
    """Parts whose plan differs from what was registered, by case: planned and made."""
    found = []
    for path, words in cases:
        config = load_config(path, words)
        models = open_models(config)
        plan = plan_models(config, world, models)
        assembly = assemble(config, world, models, None, plan)
        for sync in assembly.syncs.values():
            sync.run()
        made = {part.key: part for part in assembly.parts.registry.parts()}
        differing = {}
        for part in plan.memory[world.rank].plan.parts:
            own = made.pop(part.key)
            facts = [
                (each.num_bytes * (not each.droppable), set(each.rests_on), each.frozen)
                for each in (part, own)
            ]
            if facts[0] != facts[1]:
                differing[".".join(part.key)] = [repr(fact) for fact in facts]
        assert not made, f"not planned: {sorted(made)}"
        found.append(differing)
        assembly.close()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_is_planned_is_made(tmp_path: Path, num_ranks: int) -> None:
    make_tiny_model(tmp_path / "model")
    shared = {"flow": "ppo", "rewards": [{"role": "reward"}], "algorithm": {"kl_coef": 0.1}}
    cases: list[tuple[str, list[str]]] = []
    for name, roles in (("four", FOUR), ("lent", LENT)):
        path = tmp_path / f"{name}.yaml"
        write_config(path, tmp_path / "model", tmp_path, roles=roles, **shared)
        cases += [(str(path), []), (str(path), ["rollout.adapters=merged"])]
        if num_ranks == 2:
            cases += [(str(path), ["roles.rollout.tp=2", *SHARDED])]
    for differing in run_ranks(compare, num_ranks, cases):
        assert differing == [{}] * len(cases), json.dumps(differing, indent=1)
