"""The memory plan of configurations: what is refused, what fits, and the estimates behind it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from flow_cases import write_config
from spmdrl.commands.evaluate import rollout_only
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig, parse_config, read_config, resized
from spmdrl.models.local_shards import KindTable, LocalShard
from spmdrl.models.sharding import global_shapes
from spmdrl.placement import place_roles
from spmdrl.planning.known_models import known_model
from spmdrl.planning.margins import FRAGMENT_SHARE, Margin
from spmdrl.planning.memory import device_bytes
from spmdrl.planning.parts import table_bytes
from spmdrl.planning.plan import RolePlan, plan_roles
from spmdrl.planning.systems.train_memory import optimizer_bytes, trained_bytes
from spmdrl.weights.layout import model_layout
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharing") / "model"
    make_tiny_model(path)
    return path


def plan_of(config: Config, num_ranks: int, model: ModelConfig | None = None) -> RolePlan:
    """Of the models that the configuration names, or of one shape for all roles."""
    placements = place_roles(config, num_ranks)
    shapes = {name: model or read_config(config.model_path(name)) for name in placements}
    return plan_roles(config, placements, shapes, ["cpu"] * num_ranks)


SECOND_SET = "evaluation.sets={b: {data: {source: 'reasoning_gym:chain_sum', size: 4}}}"
PPO = {
    "flow": "ppo",
    # the rollout's weights are its own: on rank 1, beside the reward and the value
    "roles": {
        "policy": {"ranks": 0},
        "reference": {"ranks": 0},
        "reward": {"ranks": "0-1"},
        "value": {"ranks": 1},
        "rollout": {"ranks": 1, "residency": {"weights": "drop"}},
    },
    "rewards": [{"role": "reward"}],
    "algorithm": {"kl_coef": 0.05, "importance_cap": 2.0},
}


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["evaluation.held_out=4"], "evaluation.held_out=4"),
        (["evaluation.held_out=4", "evaluation.before=false", "evaluation.every=2"], "held_out=4"),
        (["evaluation.before=false", "evaluation.held_out=4", SECOND_SET], "evaluation.sets=['b']"),
        (["lag=1"], "lag=1"),
        (["algorithm.refill_attempts=2"], "algorithm.refill_attempts=2"),
    ],
)
def test_weights_that_a_call_between_drops_are_refused(model, tmp_path, words, settings):
    path = write_config(tmp_path / "c.yaml", model, tmp_path, **PPO)
    with pytest.raises(ValueError, match=r"roles.rollout.residency.weights=drop with") as refused:
        plan_of(load_config(path, words), 2)
    message = str(refused.value)
    assert settings in message and "rollout.generate needs rollout.weights" in message
    assert "reward.score drops them" in message and "to host or keep" in message


@pytest.mark.parametrize(
    "words",
    [
        [],
        # only after the last sync: nothing is sampled after it
        ["evaluation.held_out=4", "evaluation.before=false"],
        # rewards by functions: no model's turn comes between
        ["evaluation.held_out=4", "rewards=[{function: math}]", "roles.reward=null"],
        ["algorithm.refill_attempts=2", "rewards=[{function: math}]", "roles.reward=null"],
    ],
)
def test_weights_that_every_sync_fills_in_time_may_be_dropped(model, tmp_path, words):
    path = write_config(tmp_path / "c.yaml", model, tmp_path, **PPO)
    plan = plan_of(load_config(path, words), 2)
    assert plan.memory[1].plan.residencies["rollout", "weights"] == "drop"


def test_an_evaluation_alone_drops_nothing(model, tmp_path):
    path = write_config(tmp_path / "c.yaml", model, tmp_path, **PPO)
    config = rollout_only(load_config(path), scoring=True)
    assert plan_of(config, 2).memory[1].plan.residencies["rollout", "weights"] == "keep"


SMOLLM2 = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
)
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def update_bytes(words: list[str], num_ranks: int = 1) -> int:
    plan = plan_of(load_config(QUICKSTART, words), num_ranks, SMOLLM2)
    return plan.memory[0].working_bytes["policy.update"]


def test_the_quickstart_fits_where_it_fits():
    # at most 12 x (96 + 8 x 12) = 2,304 packed tokens: activations 2.8 GB, gradients 0.6 GB
    assert update_bytes(["memory_gb=6"]) == pytest.approx(3.6e9, rel=0.1)
    # with weights and moments of 1.6 GB the whole of it has 5.2 GB
    for size, windowed in (("6", set()), ("4.2", {"policy"})):
        plan = plan_of(load_config(QUICKSTART, [f"memory_gb={size}"]), 1, SMOLLM2)
        assert set(plan.memory[0].windowed) == windowed, size
    with pytest.raises(ValueError, match=r"policy.update, the device has 3.50 GB"):
        update_bytes(["memory_gb=3.5"])


def test_working_memory_counts_the_tokens_that_a_rank_has_at_once():
    whole = update_bytes([])
    assert update_bytes(["train.microbatch_tokens=1152"]) < 0.62 * whole
    assert update_bytes(["train.num_minibatches=2"]) < 0.62 * whole
    assert update_bytes(["data.prompts_per_step=6"]) < 0.62 * whole
    assert update_bytes([], num_ranks=2) < 0.62 * whole
    assert update_bytes(["roles.policy.cp=2"], num_ranks=2) < 0.7 * whole
    # every sample with a prompt of its own, as far as the budget goes
    assert update_bytes(["train.share_prompts=false"]) > 3 * whole
    # more than a step has is never packed
    assert update_bytes(["train.microbatch_tokens=100000"]) == whole


def test_tensor_parallel_ranks_share_the_mlp_and_sharded_ones_compute_in_their_dtype():
    shape = resized(SMOLLM2, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64})
    found = {}
    for name, words in {
        "dp": [],
        "tp": ["roles.policy.tp=2"],
        "shard": ["roles.policy.dp_shard=2"],
        "narrow shard": ["roles.policy.dp_shard=2", "model.dtype=bfloat16"],
    }.items():
        config = load_config(QUICKSTART, [*words, "data.prompts_per_step=24"])
        plan = plan_of(config, 2, shape)
        found[name] = plan.memory[0].working_bytes["policy.logprobs"]
    # 2,304 tokens each, 4,608 with tp
    assert found["tp"] < 1.4 * found["dp"]
    assert found["narrow shard"] < 0.6 * found["shard"]


def test_a_sync_reads_the_host_where_both_models_do_not_fit_on_the_device():
    """Four ranks share the policy, each has a whole engine: a rank has 0.11 + 0.43 GB."""
    shape = dataclasses.replace(SMOLLM2, vocab_size=1000)
    sharded = ["roles.policy.dp_shard=4", "data.prompts_per_step=4", "data.group_size=2"]
    sharded += ["rollout.sync_bucket_mb=2"]
    small = [*sharded, "data.train.max_tokens=8", "sampling.max_tokens=8", "memory_gb=0.52"]
    roomy = [*sharded, "memory_gb=8"]
    for words, streams in ((small, True), (roomy, False)):
        plan = plan_of(load_config(QUICKSTART, words), 4, shape)
        for rank in plan.memory.values():
            assert rank.syncs_from_host == streams
            sync = next(call for call in rank.plan.calls if call.name == "sync")
            assert (("policy", "weights") in sync.resident) != streams
            assert ("rollout", "weights") in sync.resident
    assert plan_of(load_config(QUICKSTART, small), 4, shape).memory[0].plan.residencies == {
        ("policy", "weights"): "host",
        ("policy", "optimizer"): "host",
        ("rollout", "weights"): "drop",
        ("rollout", "kv_cache"): "drop",
    }


def test_the_smallest_gpu_of_the_world_bounds_every_ranks_plan(model, tmp_path) -> None:
    path = write_config(tmp_path / "c.yaml", model, tmp_path / "run")
    config, given = load_config(path), load_config(path, ["memory_gb=3"])
    margin = Margin(communicators=(), workspace_bytes=10**9, fragment_share=FRAGMENT_SHARE)
    assert device_bytes(given, "cuda", 80_000_000_000, margin) == 3e9
    assert device_bytes(given, "cpu", None, margin) == 3e9
    room = 39_000_000_000 - int(40e9 * FRAGMENT_SHARE)
    assert device_bytes(config, "cuda", 40_000_000_000, margin) == room
    placements = place_roles(config, 2)
    shapes = {name: read_config(config.model_path(name)) for name in placements}
    with pytest.raises(ValueError, match="the device has 0 bytes"):
        plan_roles(config, placements, shapes, ["cuda", "cuda"], gpu_bytes=1000)


def test_a_host_is_not_bounded_by_the_gpus_of_others(model, tmp_path) -> None:
    path = write_config(tmp_path / "c.yaml", model, tmp_path / "run")
    config = load_config(path, ["roles.policy.ranks=0", "roles.rollout.ranks=1"])
    margin = Margin(communicators=(), workspace_bytes=0, fragment_share=0.0)
    assert device_bytes(config, "cpu", 40_000_000_000, margin) is None
    placements = place_roles(config, 2)
    shapes = {name: read_config(config.model_path(name)) for name in placements}
    plan = plan_roles(config, placements, shapes, ["cpu", "cuda"], gpu_bytes=40_000_000_000)
    capacities = [plan.memory[rank].plan.capacity for rank in range(2)]
    assert capacities == [None, plan.margin.room(40_000_000_000)]


def test_ranks_whose_optimizers_hold_unlike_shares_have_plans_of_their_own(model, tmp_path) -> None:
    """Megatron cuts masters and moments into flat ranges; its weights are whole on every rank."""
    words = ["train.backend=megatron", "roles.policy.dp_shard=3"]
    path = write_config(tmp_path / "c.yaml", model, tmp_path / "run")
    plan = plan_of(load_config(path, words), 3)
    held = [
        optimizer_bytes(plan.layouts["policy"][rank], plan.state_layouts["policy"][rank])
        for rank in range(3)
    ]
    planned = [
        part.num_bytes
        for rank in range(3)
        for part in plan.memory[rank].plan.parts
        if part.key == ("policy", "optimizer")
    ]
    assert planned == held and len(set(held)) > 1


def test_sizes_are_added_up_without_the_names_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making them for every layer, part and rank took most of a plan of many experts."""
    model = known_model("qwen3-30b-a3b")
    layout = model_layout(model, range(2), {"dp_replicate": 1, "dp_shard": 2}, torch.float32)
    expected = 2 * sum(map(math.prod, global_shapes(model).values()))  # of two ranks, half each
    read = KindTable.__getitem__
    names: list[str] = []

    def counted(table: KindTable, name: str) -> LocalShard:
        names.append(name)
        return read(table, name)

    monkeypatch.setattr(KindTable, "__getitem__", counted)
    size = table_bytes(layout[0])
    assert expected <= size < 1.001 * expected, "norms are not cut"
    assert trained_bytes(layout[0]) == size
    assert optimizer_bytes(layout[0], layout[0]) == 2 * size
    assert names == []
