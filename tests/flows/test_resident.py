"""A flow of the user's own that holds parts on the device over several calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.memory.storages import is_resident
from spmdrl.roles.handles import Policy, Reference
from spmdrl.run.run import Run
from spmdrl.world import World
from tiny_model import make_tiny_model


def back_and_forth(run: Run) -> None:
    """Writes down whether the policy's parts are there after calls of the reference."""
    policy, reference = run.role("policy", Policy), run.role("reference", Reference)
    environment, sync = GroupEnvironment(run), run.weight_sync("policy", "rollout")
    seen: dict[str, list[bool]] = {"held": [], "free": []}

    def note(name: str) -> None:
        if policy.backend is not None:
            parts = policy.backend.parts()
            seen[name] += [all(map(is_resident, parts[p])) for p in ("weights", "optimizer")]

    for step in run.steps():
        sync.run()
        batch = environment.collect(step)
        with run.resident("policy", "weights"):
            policy.logprobs(batch)
            reference.logprobs(batch)
            note("held")
        reference.logprobs(batch)
        note("free")
        run.finish(step, batch, environment.metrics())
    run.conclude()
    file = run.directory / f"seen_{run.world.rank}.json"
    file.write_text(json.dumps(seen))
    for role, parts, message in (
        ("policy", (), "name some of the parts"),
        ("policy", ("wieghts",), r"name some of the parts \('base', 'weights', 'optimizer'"),
        ("critic", ("weights",), "needs roles.critic"),
    ):
        with pytest.raises(ValueError, match=message), run.resident(role, *parts):
            pass


def ran(world: World, path: str) -> None:
    run_configs(world, [(path, [])], "")


def test_parts_that_a_flow_holds_stay_where_their_role_is(tmp_path):
    make_tiny_model(tmp_path / "model")
    on_host = {"residency": {"weights": "host"}}
    path = write_config(
        tmp_path / "c.yaml",
        tmp_path / "model",
        tmp_path / "run",
        flow=f"{Path(__file__)}:back_and_forth",
        steps=2,
        roles={
            "policy": {"ranks": 0, "residency": {"weights": "host", "optimizer": "host"}},
            "rollout": {"ranks": 0, **on_host},
            "reference": {"ranks": "0-1", **on_host},
        },
    )
    run_ranks(ran, 2, str(path), timeout_s=200)
    seen = json.loads((tmp_path / "run" / "seen_0.json").read_text())
    # weights, optimizer: the second is not held, and no call needs it
    assert seen == {"held": [True, False] * 2, "free": [False, False] * 2}
    elsewhere = json.loads((tmp_path / "run" / "seen_1.json").read_text())
    assert elsewhere == {"held": [], "free": []}
