"""GRPO on a mixture of experts, with routing replay and a balance loss, on 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flow_cases import run_layouts, write_config
from harness import run_ranks
from replay import assert_same_samples, read_samples
from spmdrl.batch import from_rows
from spmdrl.config.load import load_config
from spmdrl.distributed.reduce import gather_objects
from spmdrl.flows.policy_terms import policy_loss
from spmdrl.models.blocks.moe import Experts
from spmdrl.models.routing import EXPERT_CHOICES, unpack_choices
from spmdrl.roles.handles import Generation, Policy, Rollout, Update
from spmdrl.rollout.protocol import SamplingParams
from spmdrl.run.assembly.assembly import assemble, open_models, plan_models
from spmdrl.world import World
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

LAYOUTS = {
    1: {"one": []},
    2: {
        "ep2 over dp2": ["roles.policy.ep=2"],
        "ep2 over shard2, rollout tp2": [
            "roles.policy.dp_shard=2",
            "roles.policy.ep=2",
            "roles.rollout.tp=2",
        ],
        "ep2 over tp2": [
            "roles.policy.tp=2",
            "roles.policy.ep=2",
            "roles.rollout.tp=2",
            "roles.rollout.ep=2",
        ],
    },
    4: {
        "ep4 over shard2 x tp2, rollout dp4": [
            "roles.policy.tp=2",
            "roles.policy.dp_shard=2",
            "roles.policy.ep=4",
        ],
        "ep2 over dp4, rollout ep2": [
            "roles.policy.ep=2",
            "roles.rollout.tp=2",
            "roles.rollout.ep=2",
        ],
        "disjoint": [
            "roles.policy.ranks=0-1",
            "roles.policy.ep=2",
            "roles.rollout.ranks=2-3",
            "roles.rollout.tp=2",
            "roles.rollout.ep=2",
        ],
    },
}
SETTINGS: dict[str, Any] = {
    "environment": "replay:ReplayEnvironment",
    "roles": {"policy": {}, "reference": {}, "rollout": {}},
    "algorithm": {"kl_coef": 0.1, "importance_cap": 2.0, "routing_replay": True},
    "train": {
        "lr": 1e-3,
        "microbatch_tokens": 300,
        "num_minibatches": 2,
        "balance_coef": 0.01,
        "recompute": "layer",
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("moe")
    make_tiny_model(root / "model", "Qwen3MoeForCausalLM")
    make_tiny_model(root / "dense")
    return root


@pytest.fixture(scope="module")
def runs(request, root):
    """Layout name -> metrics of three steps."""
    return run_layouts(root, only(LAYOUTS, asked(request, "name")), **SETTINGS)


# experts over each other axis, and engines that have them whole and divided
BRIEF = ("ep2 over tp2", "ep4 over shard2 x tp2, rollout dp4")
NAMES = swept([name for size, own in LAYOUTS.items() if size > 1 for name in own], BRIEF)
COMPARED = (
    "loss",
    "grad_norm",
    "ref_kl",
    "entropy",
    "reward",
    "expert_load",
    "expert_load_max",
    "experts_idle",
    "balance_loss",
)


@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_loads_equal_one_rank(runs, name):
    one, other = runs["one"], runs[name]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in COMPARED:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step
    # after an update the policy would take other experts for some tokens
    assert 0 < one[2]["replay_changed"] < 0.5
    assert one[0]["balance_loss"] > 0 and one[0]["expert_load_max"] > 1


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_experts_of_the_first_step_equal_one_rank(runs, root, name):
    assert_same_samples(root, name)
    one, other = (read_samples(root, run, 0) for run in ("one", name))
    for key, row in one.items():
        if torch.equal(row["tokens"], other[key]["tokens"]):
            assert torch.equal(row[EXPERT_CHOICES], other[key][EXPERT_CHOICES]), key


def updated(world: World, path: str, overrides: list[str]) -> tuple[Any, Any]:
    """What the rollout recorded on all ranks, and what the policy's experts were given here:
    choices by the tokens up to the one that has them.
    """
    config = load_config(path, overrides)
    models = open_models(config)
    assembly = assemble(config, world, models, None)
    policy, rollout = assembly.roles["policy"], assembly.roles["rollout"]
    assert isinstance(policy, Policy) and isinstance(rollout, Rollout)
    assembly.syncs["policy", "rollout"].run()
    generator = torch.Generator().manual_seed(world.rank)
    lengths = [5, 9] if world.rank == 0 else [7]

    prompts = from_rows(
        [torch.randint(2, 200, (n,), generator=generator).tolist() for n in lengths],
        rows={"prompt_ids": torch.arange(len(lengths)) + 10 * world.rank},
    )
    sampling = SamplingParams(max_tokens=12, experts=True, ignore_eos=True)
    batch = rollout.generate(prompts, Generation(seed=1, step=0, group_size=3, sampling=sampling))
    recorded: dict[tuple[int, ...], list[Any]] = {}
    chosen = unpack_choices(batch[EXPERT_CHOICES])
    for row, start in enumerate(batch.offsets()[:-1].tolist()):
        tokens = batch["tokens"][start : start + int(batch.lengths[row])].tolist()
        for i in range(len(tokens) - 1):
            recorded[tuple(tokens[: i + 1])] = chosen[start + i].tolist()
    passes: list[Any] = []
    if policy.backend is not None:
        decoder = policy.backend._decoder  # type: ignore[attr-defined]
        decoder.register_forward_pre_hook(
            lambda _, given: passes.append((given[0].tolist(), given[1].tolist(), []))
        )
        for module in decoder.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(
                    lambda _, given: passes[-1][2].append(given[1].tolist())
                )
    weights = batch["loss_mask"].float()
    batch = batch.with_columns(
        tokens={"advantages": weights.clone(), "loss_weights": weights},
        rows={"loss_share": batch["response_lengths"].double()},
    )
    update = Update(seed=1, step=0, columns=("advantages", "loss_weights", "rollout_logprobs"))
    policy.update(batch, policy_loss(config.algorithm), update)
    used: dict[tuple[int, ...], list[Any]] = {}
    for tokens, positions, layers in passes:
        sequence: list[int] = []
        for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            sequence = [*sequence, token] if position else [token]
            used[tuple(sequence)] = [layer[i] for layer in layers]
    return {k: v for part in gather_objects(recorded) for k, v in part.items()}, used


@pytest.mark.parametrize(
    "overrides",
    [
        ["roles.policy.ep=2", "roles.rollout.tp=2", "roles.rollout.ep=2"],
        ["roles.policy.ranks=0", "roles.rollout.ranks=1"],
    ],
    ids=["ep2", "disjoint"],
)
def test_the_update_takes_the_rollouts_experts_token_for_token(root, tmp_path, overrides):
    """Every stream token of the update, in every layer, as the rollout recorded it."""
    path = write_config(
        tmp_path / "config.yaml",
        root / "model",
        tmp_path / "run",
        algorithm={"routing_replay": True},
        train={"share_prompts": False},
    )
    results = run_ranks(updated, 2, str(path), overrides)
    recorded = results[0][0]
    used = {k: v for _, part in results for k, v in part.items() if k in recorded}
    assert used.keys() == recorded.keys()
    assert used == recorded


REFUSED = {
    "ep of a dense model": (
        ["roles.policy.ep=2", "model.path={root}/dense"],
        "roles.policy: ep=2, but LlamaForCausalLM has no experts",
    ),
    "ep": (["roles.reference.ep=2", "roles.reference.dp_replicate=1", "roles.reference.ranks=0"],
           "roles.reference.ep=2 with tp=1 leaves 2 parts"),
    "experts": (["model.path={root}/three", "roles.policy.ep=2"], "num_experts=3"),
    "rollout": (
        ["roles.rollout.ep=2", "rollout.engine=vllm"],
        "roles.rollout.ep=2 with roles.rollout.tp=1: vLLM's replicas",
    ),
    "replay": (
        ["algorithm.routing_replay=true", "model.path={root}/dense"],
        "algorithm.routing_replay=true, but the model of roles.policy (LlamaForCausalLM) has no",
    ),
    "balance": (
        ["train.balance_coef=0.1", "model.path={root}/dense"],
        "train.balance_coef=0.1, but the model of roles.policy",
    ),
    "balance of a reward": (
        ["train.balance_coef=0.1", "roles.judge.kind=reward", "roles.judge.trained=true"],
        "train.balance_coef=0.1 for the reward model roles.judge",
    ),
}  # fmt: skip


def refusals(world: World, path: str, cases: list[list[str]]) -> list[str]:
    messages = []
    for words in cases:
        try:
            config = load_config(path, words)
            plan_models(config, world, open_models(config))
            messages.append("nothing was refused")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_experts_cannot_do_is_refused(root, tmp_path):
    make_tiny_model(root / "three", "Qwen3MoeForCausalLM", num_experts=3)
    roles = {"policy": {}, "reference": {}, "rollout": {}}
    path = write_config(
        tmp_path / "config.yaml",
        root / "model",
        tmp_path / "run",
        roles=roles,
        algorithm={"kl_coef": 0.1},
    )
    cases = [[word.format(root=root) for word in words] for words, _ in REFUSED.values()]
    for messages in run_ranks(refusals, 2, str(path), cases):
        for message, (name, (_, wanted)) in zip(messages, REFUSED.items(), strict=True):
            assert wanted in message, (name, message)
