"""Training systems by name: what a backend lacks is refused with the role's key, and a user's own
class is checked when the plan is made.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_cases import write_config
from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.models.config import parse_config
from spmdrl.planning.layouts import check_model, role_layout
from spmdrl.planning.systems.registry import SYSTEMS

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

PLAIN = """
from spmdrl.planning.systems.torch_native import TorchSystem

class Plain(TorchSystem):
    axes = frozenset({"dp_replicate"})
    freezes = has_adapters = aligns_shards = False

    def __init__(self, size=1):
        self.size = size

class Lazy(Plain):
    traffic = None

class Bare:
    axes = frozenset()
"""


def check(tmp_path: Path, *words: str, size: int = 1) -> None:
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path, flow="grpo")
    specs = specs_of(load_config(path, list(words)), MODEL, size)
    check_model(specs["policy"], specs, replays_routing=False)
    assert set(role_layout(specs["policy"])) == set(range(size))


def test_every_backend_of_the_package_plans_a_role(tmp_path: Path) -> None:
    for name in SYSTEMS:
        check(tmp_path, f"train.backend={name}", size=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roles.policy.freeze=[lm_head.weight]", "train.backend=megatron"], r"policy\.freeze="),
        (["roles.policy.dp_shard=2"], r"policy\.dp_shard=2 with .*divides nothing over dp_shard"),
        (["roles.policy.adapter={}"], r"policy\.adapter with train\.backend=\S+: this backend has"),
        (["roles.policy.freeze=[lm_head.weight]"], r"policy\.freeze=.*train\.backend=torch"),
        (["train.backend_options={sise: 1}"], r"backend_options=.*unexpected keyword argument"),
    ],
)
def test_what_a_backend_lacks_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "mine.py").write_text(PLAIN)
    own = [] if "train.backend=megatron" in words else [f"train.backend={tmp_path}/mine.py:Plain"]
    with pytest.raises(ValueError, match=message):
        check(tmp_path, *own, *words, size=2)


def test_a_users_backend_is_planned_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLAIN)
    check(tmp_path, f"train.backend={tmp_path}/mine.py:Plain", "train.backend_options={size: 2}")
    for name, message in (("Bare", "has no 'freezes'"), ("Lazy", "'traffic'")):
        with pytest.raises(ValueError, match=message):
            check(tmp_path, f"train.backend={tmp_path}/mine.py:{name}")
