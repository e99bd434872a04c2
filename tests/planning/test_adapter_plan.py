"""Plans of roles with adapters over a shared base: parts, bytes, and how the rollout samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flow_cases import write_config
from spmdrl.config.load import load_config
from spmdrl.models.adapters import adapter_shapes, find_targets, make_adapter
from spmdrl.models.config import parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.placement import place_roles
from spmdrl.planning.adapter_choice import adding_bytes
from spmdrl.planning.plan import RolePlan, plan_roles
from tiny_model import make_tiny_model

MODEL = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
)
ADAPTER = make_adapter(find_targets(MODEL, ["all"]), rank=4, alpha=32)
PPO: dict[str, Any] = {
    "flow": "ppo",
    "roles": {
        "policy": {"adapter": {"rank": 4}},
        "reference": {"base": "policy"},
        "value": {"base": "policy", "adapter": {"rank": 4}, "head": "zero"},
        "rollout": {},
    },
    "algorithm": {"kl_coef": 0.05},
}


def numel(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


BASE = numel(dict(global_shapes(MODEL)))
ADDED = numel(adapter_shapes(MODEL, ADAPTER))


def plan_of(tmp_path: Path, *words: str, ranks: int = 1, device: str = "cpu") -> RolePlan:
    config = load_config(
        write_config(tmp_path / "c.yaml", tmp_path, tmp_path, **PPO), [*words, "device=cpu"]
    )
    placements = place_roles(config, ranks)
    models = dict.fromkeys(config.roles, MODEL)
    return plan_roles(config, placements, models, [device] * ranks)


def test_one_storage_serves_all_roles(tmp_path: Path) -> None:
    """The base is the policy's; the others have only what is theirs alone."""
    plan = plan_of(tmp_path)
    parts = {part.key: part for part in plan.memory[0].plan.parts}
    base, own = ("policy", "base"), ("policy", "weights")
    assert {key: part.num_bytes for key, part in parts.items() if part.num_bytes} == {
        base: 4 * BASE,
        own: 4 * ADDED,
        # float32: the weights are their own masters
        ("policy", "optimizer"): 8 * ADDED,
        ("value", "weights"): 4 * (ADDED + 64),
        ("value", "optimizer"): 8 * (ADDED + 64),
        ("rollout", "kv_cache"): parts["rollout", "kv_cache"].num_bytes,
    }
    assert {key: part.rests_on for key, part in parts.items() if part.rests_on} == {
        own: (base,),
        ("reference", "weights"): (base,),
        ("value", "weights"): (base,),
        ("rollout", "weights"): (base, own),
    }
    frozen = {key for key, part in parts.items() if part.frozen}
    assert frozen == {base, ("reference", "weights")}
    assert plan.syncs["rollout"].moves is False
    assert plan.adapters["rollout"].word == "unmerged"


def test_what_does_not_train_has_no_gradients_and_no_state(tmp_path: Path) -> None:
    whole = plan_of(
        tmp_path,
        *(
            f"roles.{name}.{key}=null"
            for name in ("policy", "value")
            for key in ("adapter", "base")
        ),
        "roles.reference.base=null",
    )
    adapted = plan_of(tmp_path)
    spared = [
        plan.memory[0].working_bytes["policy.update"] for plan in (whole, adapted)
    ]  # its gradients, and those of the head once more
    assert spared[0] - spared[1] > 4 * (BASE - ADDED)


def test_one_adapter_for_all_experts_has_an_eighth_of_their_values(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "moe", "Qwen3MoeForCausalLM")
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path)
    found, costs = {}, {}
    for form in ("each", "shared"):
        adapter = f"{{rank: 4, targets: [experts], experts: {form}}}"
        config = load_config(path, [f"roles.policy.adapter={adapter}", "device=cpu"])
        plan = plan_roles(
            config, place_roles(config, 1), dict.fromkeys(config.roles, model), ["cpu"]
        )
        parts = {part.key: part.num_bytes for part in plan.memory[0].plan.parts}
        working = plan.memory[0].working_bytes["policy.update"]
        found[form] = (parts["policy", "weights"], parts["policy", "optimizer"], working)
        policy, rollout = plan.specs["policy"], plan.specs["rollout"]
        costs[form] = adding_bytes(config, policy, rollout)
    # 2 layers, each with 3 matrices of 16 x 32
    values = 2 * 3 * 4 * (16 + 32)
    assert found["shared"][:2] == (4 * values, 8 * values)
    assert found["each"][:2] == (8 * 4 * values, 8 * 8 * values)
    assert found["each"][2] - found["shared"][2] == 7 * 4 * values, "gradients"
    # a decode step reads A and B; there are 10
    assert costs["each"] - costs["shared"] == 10 * 7 * 4 * values


def test_a_scalar_head_over_the_base_is_the_roles_own(tmp_path: Path) -> None:
    judge = ["roles.reward={base: policy, head: zero}", "rewards=[{role: reward}]"]
    parts = {part.key: part for part in plan_of(tmp_path, *judge).memory[0].plan.parts}
    own = parts["reward", "weights"]
    assert (own.num_bytes, own.rests_on, own.frozen) == (4 * 64, (("policy", "base"),), True)


JUDGE = ["roles.judge={base: policy}", "rewards=[{role: judge}]"]


def test_a_judge_over_a_base_needs_no_second_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, *JUDGE).memory[0].plan
    own = {part.key: part for part in plan.parts}["judge", "weights"]
    assert (own.num_bytes, own.rests_on, own.frozen) == (0, (("policy", "base"),), True)
    (call,) = [call for call in plan.calls if call.name == "judge.generate"]
    assert ("policy", "base") in call.resident


def test_a_judge_must_find_a_base_as_its_engine_needs_it(tmp_path: Path) -> None:
    sharded = [f"roles.{name}.dp_shard=2" for name in ("policy", "reference", "value")]
    cut = [*sharded, "roles.rollout.tp=2"]
    with pytest.raises(ValueError, match=r"judge.base=policy: rank 0 does not hold .*tp=1"):
        plan_of(tmp_path, *JUDGE, *cut, ranks=2)
    plan = plan_of(tmp_path, *JUDGE, *cut, "roles.judge.tp=2", ranks=2)
    assert {p.key: p.num_bytes for p in plan.memory[1].plan.parts}["judge", "weights"] == 0
    with pytest.raises(ValueError, match=r"roles.judge.ranks=0 with roles.judge.base=policy"):
        plan_of(tmp_path, *JUDGE, "roles.judge.ranks=0", ranks=2)


def test_the_base_moves_as_its_owner_says_and_comes_with_every_role(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "roles.policy.residency={base: host}")
    own = plan.memory[0].plan
    assert own.residencies["policy", "base"] == "host"
    assert all(("policy", "base") in call.resident for call in own.calls)
    # it never changes, so that nothing is copied back
    assert sum(call.bytes_out for call in own.calls) == 0


def test_a_reference_can_own_what_the_policy_adapts(tmp_path: Path) -> None:
    words = [
        "roles.reference.base=null",
        "roles.policy.base=reference",
        "roles.value.base=reference",
    ]
    parts = {part.key: part for part in plan_of(tmp_path, *words).memory[0].plan.parts}
    base = ("reference", "weights")
    assert parts[base].num_bytes == 4 * BASE and ("policy", "base") not in parts
    assert parts["policy", "weights"].num_bytes == 4 * ADDED
    assert parts["rollout", "weights"].rests_on == (base, ("policy", "weights"))
    assert parts["rollout", "weights"].num_bytes == 0


def test_all_roles_of_a_base_are_cut_like_the_engine(tmp_path: Path) -> None:
    """FSDP's shards are the engine's tensors, whichever role of the base owns them."""
    words = [f"roles.{name}.dp_shard=2" for name in ("policy", "reference", "value")]
    words += ["roles.rollout.tp=2"]
    plan = plan_of(tmp_path, *words, ranks=2)
    assert plan.blocks == {"policy": 2, "reference": 2, "value": 2, "rollout": 1}
    assert plan.syncs["rollout"].gathered_bytes == 0
    assert plan.adapters["rollout"].word == "unmerged"
    for rank in (0, 1):
        base = plan.layouts["policy"][rank]
        for name in ("reference", "value"):
            table = plan.layouts[name][rank]
            shared = [local for local in table if local in base and "lora" not in local]
            assert len(shared) == len(table) - (name == "value") * (1 + 2 * 11)
            assert all(base[local].is_like(table[local]) for local in shared)


APART = ["roles.rollout.ranks=1", *(f"roles.{n}.ranks=0" for n in ("policy", "reference", "value"))]


def test_an_engine_with_weights_of_its_own_has_the_adapter_merged(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, *APART, "sampling.max_tokens=100", ranks=2)
    use = plan.adapters["rollout"]
    assert use.merged and "its weights are its own" in use.why
    assert plan.specs["rollout"].adapter is None
    targets = set(ADAPTER.targets)
    assert {cells.name for one in plan.syncs["rollout"].rounds for cells in one} == targets
    parts = {part.key: part.num_bytes for part in plan.memory[1].plan.parts}
    assert parts["rollout", "weights"] == 4 * BASE
    # the largest matrix in float32, as it is sent, and the one before it
    [sync] = [call for call in plan.memory[0].plan.calls if call.name == "sync"]
    assert {("policy", "base"), ("policy", "weights")} <= set(sync.resident)
    merging = plan.memory[0].working_bytes["sync"] - plan.memory[1].working_bytes["sync"]
    assert merging == (4 + 2 * 4) * 256 * 64


@pytest.mark.parametrize(
    ("words", "word", "why"),
    [
        (["rollout.adapters=unmerged"], "unmerged", "rollout.adapters=unmerged"),
        (["rollout.adapters=merged"], "merged", "rollout.adapters=merged"),
        # a few tokens are decoded sooner than the matrices are merged and sent
        (
            ["sampling.max_tokens=1", "data.prompts_per_step=1"],
            "unmerged",
            "its weights are its own",
        ),
    ],
)
def test_what_is_set_is_done_and_few_tokens_do_not_pay_a_merge(
    tmp_path: Path, words: list[str], word: str, why: str
) -> None:
    use = plan_of(tmp_path, *APART, *words, ranks=2).adapters["rollout"]
    assert (use.word, use.why.split(":")[0]) == (word, why)


def test_vllm_samples_with_merged_weights(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "rollout.engine=vllm")
    assert plan.adapters["rollout"].merged
    assert plan.specs["rollout"].adapter is None
    targets = set(ADAPTER.targets)
    assert {cells.name for one in plan.syncs["rollout"].rounds for cells in one} == targets
