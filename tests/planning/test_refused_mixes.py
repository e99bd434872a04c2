"""Combinations of backends and engines that cannot be: each is refused when the run is planned, by
the keys that make it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_cases import write_config
from spmdrl.config.load import load_config
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.placement import place_roles
from spmdrl.planning.plan import plan_roles
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.contract, pytest.mark.megatron]

MEGATRON, VLLM = "roles.policy.train.backend=megatron", "rollout.engine=vllm"
DEEPSPEED = "roles.policy.train.backend=deepspeed"
ADAPTER = "roles.policy.adapter={rank: 2}"
SHARED = "roles.reference.base=policy"

REFUSED: dict[str, tuple[list[str], str]] = {
    "vllm on some of the ranks": (
        [VLLM, "roles.policy.ranks=0", "roles.rollout.ranks=1"],
        r"rollout\.engine=vllm with roles\.rollout\.ranks=.*set roles\.rollout\.ranks=all",
    ),
    "two vllm rollouts": (
        [VLLM, "roles.second.kind=rollout"],
        r"rollout\.engine=vllm with the rollouts \['rollout', 'second'\]",
    ),
    "vllm with context parallelism": (
        [VLLM, "roles.rollout.cp=2"],
        r"roles\.rollout\.cp=2: .* set roles\.rollout\.tp instead",
    ),
    "vllm beside an adapter": (
        [VLLM, ADAPTER, "rollout.adapters=unmerged"],
        r"rollout\.adapters=unmerged with rollout\.engine=vllm",
    ),
    "one base on two backends": (
        [MEGATRON, ADAPTER, SHARED],
        r"roles\.reference\.base=policy with train\.backend=torch for reference and megatron for "
        r"policy: .*set roles\.reference\.train\.backend=megatron",
    ),
    "a pipeline on torch": (
        ["roles.reference.pp=2", MEGATRON],
        r"roles\.reference\.pp=2 with train\.backend=torch",
    ),
    "megatron's keys on torch": (
        ["roles.reference.megatron={sp: true}", "roles.reference.tp=2", MEGATRON],
        r"roles\.reference\.megatron\.sp=true with train\.backend=torch",
    ),
    "a pipeline of a rollout": (["roles.rollout.pp=2"], r"roles\.rollout\.pp=2: rollout is a"),
    "fixed parameters on megatron": (
        [MEGATRON, "roles.policy.freeze=['*embed_tokens*']"],
        r"roles\.policy\.freeze=.*megatron.*train\.backend=torch",
    ),
    "a pipeline on deepspeed": (
        [DEEPSPEED, "roles.policy.pp=2"],
        r"roles\.policy\.pp=2 with train\.backend=deepspeed",
    ),
    "a base of deepspeed under torch": (
        [DEEPSPEED, ADAPTER, SHARED],
        r"train\.backend=torch for reference and deepspeed for policy",
    ),
    "no such backend": (
        ["train.backend=colossal"],
        r"train\.backend=colossal.*torch, megatron, deepspeed",
    ),
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("mixes") / "model"
    make_tiny_model(directory, head_dim=32)
    return directory, read_config(directory)


def plan(shape: tuple[Path, ModelConfig], words: list[str]) -> None:
    directory, model = shape
    sections: dict[str, Any] = {
        "roles": {"policy": {}, "reference": {}, "rollout": {}},
        "algorithm": {"kl_coef": 0.1},
    }
    path = write_config(directory.parent / "c.yaml", directory, directory.parent, **sections)
    config = load_config(path, words)
    shapes = dict.fromkeys(config.roles, model)
    plan_roles(config, place_roles(config, 2), shapes, ["cpu"] * 2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_combination_that_cannot_be_is_refused(
    shape: tuple[Path, ModelConfig], name: str
) -> None:
    words, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        plan(shape, words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        [MEGATRON],
        [DEEPSPEED],
        [VLLM],
        [MEGATRON, VLLM, "roles.rollout.tp=2"],
        [DEEPSPEED, VLLM],
    ],
    ids=str,
)
def test_the_others_are_planned(shape: tuple[Path, ModelConfig], words: list[str]) -> None:
    plan(shape, words)
