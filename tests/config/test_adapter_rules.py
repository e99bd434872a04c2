"""Rules on adapters and shared bases: what is refused, with the key and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_cases import write_config
from role_specs import specs_of
from spmdrl.config.doubts import doubts
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import parse_config
from spmdrl.planning.frozen import frozen_names

MODEL = parse_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
PPO: dict[str, Any] = {
    "flow": "ppo",
    "roles": {
        "policy": {"adapter": {"rank": 4}},
        "reference": {"base": "policy"},
        "value": {"base": "policy", "adapter": {}, "head": "zero"},
        "reward": {"base": "policy", "adapter": {"path": "judge"}},
        "rollout": {},
        "mine": {"kind": "my_roles:Mine"},
    },
    "rewards": [{"role": "reward"}],
    "algorithm": {"kl_coef": 0.05},
}


def config_of(tmp_path: Path, *words: str) -> Config:
    return load_config(write_config(tmp_path / "c.yaml", tmp_path, tmp_path, **PPO), list(words))


@pytest.mark.parametrize("backend", ["torch", "megatron"])
def test_four_roles_over_one_base_are_a_configuration(tmp_path: Path, backend: str) -> None:
    config = config_of(tmp_path, f"train.backend={backend}")
    trained = [name for name in config.roles if config.is_trained(name)]
    assert trained == ["policy", "value"]
    assert not [doubt for doubt in doubts(config) if "adapter" in doubt or "export_as" in doubt]


NO_ADAPTER = "roles.policy.adapter=null"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # the role that `base` names
        (["roles.value.base=critic"], r"roles.value.base=critic is no role: name one of \['mine'"),
        (["roles.value.base=value"], r"roles.value.base=value is the role itself: name one of"),
        (
            ["roles.value.base=reference"],
            r"base=reference, which shares .* roles.value.base=policy",
        ),
        (
            ["roles.value.base=rollout"],
            r"rollout is a rollout, and only a model on a train backend",
        ),
        (["roles.value.base=mine"], r"mine is a my_roles:Mine, and only a model on a train"),
        ([NO_ADAPTER], r"base=policy, which trains its weights, .*\(roles.policy.adapter: \{\}\)"),
        (
            ["roles.reward.base=null", "roles.reference.base=reward"],
            r"roles.reference.base=reward: reward is a reward, whose model has a scalar head",
        ),
        # one model in one place
        (["roles.value.model=other"], r"roles.value.base=policy with the models other and"),
        (["roles.value.device=cpu"], r"roles.value.device=cpu with .*, whose device is auto: set"),
        # roles without an adapter or a base
        (["roles.rollout.adapter={}"], r"roles.rollout.adapter: rollout is a rollout, which"),
        (["roles.rollout.base=policy"], r"roles.rollout.base=policy: rollout is a rollout, which"),
        (["roles.mine.adapter={}"], r"roles.mine.adapter: mine is a my_roles:Mine, and only"),
        (["roles.mine.base=policy"], r"roles.mine.base=policy: mine is a my_roles:Mine, and only"),
        # what would train a base that others share, or add nothing
        (
            ["roles.value.adapter=null"],
            r"roles.value.base=policy without an adapter: .* add roles.value.adapter: ",
        ),
        (
            ["roles.reference.trained=true"],
            r"roles.reference.base=policy without an adapter: .* add roles.reference.adapter: \{\}",
        ),
        (["roles.reference.adapter={}"], r"a new adapter adds nothing: set .*adapter.path, or"),
        # keys that have nothing to decide
        (["roles.policy.freeze=['*norm*']"], r"roles.policy.freeze=.* with roles.policy.adapter: "),
        (
            ["roles.reference.freeze=['*norm*']"],
            r"roles.reference.freeze=.* with roles.reference.base=policy: the model's weights",
        ),
        (
            ["roles.value.residency={base: host}"],
            r"value shares the base of policy: set roles.policy.residency.base instead",
        ),
        (
            ["roles.reference.residency={weights: host}"],
            r"reference has no weights but the base of policy: set roles.policy.residency.base",
        ),
        (["roles.rollout.residency={base: host}"], r"base=host: rollout has no adapter, so that"),
        (["roles.policy.residency={base: drop}"], r"residency.base=drop: nothing would bring them"),
        # engines and backends
        (
            ["rollout.engine=vllm", "rollout.adapters=unmerged"],
            r"rollout.adapters=unmerged with rollout.engine=vllm, which samples with",
        ),
        (
            ["train.backend=megatron", "roles.policy.megatron={sp: true}"],
            r"roles.reference.megatron=\{\} with roles.reference.base=policy, where it is "
            r"\{sp: true\}: .* set roles.reference.megatron=\{sp: true\}",
        ),
        (
            ["roles.reference.train={backend: megatron}"],
            r"train.backend=megatron for reference and torch for policy: set",
        ),
    ],
)
def test_what_no_run_could_do_is_refused_with_its_fix(
    tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["roles.value.ranks=0-1"], r"roles.value.ranks='0-1' with roles.value.base=policy: they"),
        (["roles.reference.tp=2"], r"roles.reference.tp=2 with .*, where it is 1: .*tp=1"),
        (["roles.policy.adapter.targets=[mpl]"], r"roles.policy.adapter.targets: 'mpl' selects no"),
    ],
)
def test_places_and_targets_that_do_not_fit_are_refused(
    tmp_path: Path, words: list[str], said: str
) -> None:
    own = ["roles.reward=null", "rewards=[{function: math}]", "roles.mine=null"]
    with pytest.raises(ValueError, match=said):
        specs_of(config_of(tmp_path, *own, *words), MODEL, 4)


def test_all_but_adapters_and_scalar_heads_is_fixed(tmp_path: Path) -> None:
    own = ["roles.reward.adapter=null", "roles.mine=null"]
    specs = specs_of(config_of(tmp_path, *own), MODEL)
    assert all(specs[name].has_fixed_base for name in specs)
    body = frozen_names(specs["policy"]) - {"lm_head.weight"}
    assert "model.norm.weight" in body
    for name in ("value", "reward"):
        assert frozen_names(specs[name]) == body, name
    assert frozen_names(specs["reference"]) == body | {"lm_head.weight"}
    assert not frozen_names(specs["rollout"])


@pytest.mark.parametrize(
    ("words", "doubtful"),
    [
        (["rollout.adapters=merged"], "rollout.adapters=merged: no effect without roles.policy.ad"),
        (["checkpoint.export_as=both"], "checkpoint.export_as=both: no effect without a role that"),
        (
            ["roles.reward.adapter={path: judge, dropout: 0.1}"],
            "roles.reward.adapter.dropout=0.1: no effect without training it",
        ),
    ],
)
def test_keys_without_an_adapter_are_doubtful(
    tmp_path: Path, words: list[str], doubtful: str
) -> None:
    none = [f"roles.{name}.{key}=null" for name in ("policy", "value", "reference", "reward")
            for key in ("adapter", "base")]  # fmt: skip
    found = doubts(config_of(tmp_path, *none, *words))
    assert [doubt for doubt in found if doubt.startswith(doubtful)], found


@pytest.mark.parametrize("other", ["adapter", "value_adapter"])
def test_an_adapters_directory_is_no_other_roles(tmp_path: Path, other: str) -> None:
    words = [
        "checkpoint.export=true",
        "checkpoint.export_as=both",
        f"roles.{other}={{kind: value, trained: true, head: zero}}",
    ]
    with pytest.raises(ValueError, match=rf"roles\.{other} with checkpoint\.export_as=both"):
        config_of(tmp_path, *words)
    words[1] = "checkpoint.export_as=merged"
    assert config_of(tmp_path, *words).is_trained(other)
