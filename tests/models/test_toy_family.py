"""A family of a user's own, one file in the working directory: every command knows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.commands.cli import main
from spmdrl.commands.plan import plan_text
from spmdrl.config.load import load_config
from spmdrl.models.config import parse_config
from spmdrl.models.family import USERS_PACKAGE, families
from tiny_model import make_tiny_model

TOY = '''
"""Toy: windows and layers without positions in turn, norms around both halves, sinks."""

from dataclasses import replace

from spmdrl.api import (
    Body,
    Family,
    Fields,
    LayerSpec,
    dense_mlp,
    norm_of,
    plain_attention,
    rope_of,
)


def read(fields: Fields) -> Body:
    rope, every = rope_of(fields), fields.integer("toy_every")
    layers = []
    for i in range(fields.integer("num_hidden_layers")):
        is_local = (i + 1) % every != 0
        window = fields.integer("toy_window") if is_local else None
        attention = plain_attention(fields, rope if is_local else None, window=window)
        layers.append(
            LayerSpec(
                mixer=replace(attention, qk_norm="all", sinks=True),
                mlp=dense_mlp(fields),
                norms="around",
                residual_scale=0.5,
            )
        )
    return Body(layers=tuple(layers), norm=norm_of(fields), logit_softcap=20.0)


FAMILY = Family(
    model_type="toy",
    also=("toy_chat",),
    architecture="ToyForCausalLM",
    config="llama",
    read=read,
    names={
        "post_norm": "before_mlp",
        "attention_out_norm": "after_attention",
        "mlp_out_norm": "after_mlp",
        "attention.out": "attention.output",
        "mlp.down": "mlp.output",
    },
    fused={
        "attention.qkv": ("attention.q", "attention.k", "attention.v"),
        "mlp.input": ("mlp.gate", "mlp.up"),
    },
)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a user's families, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = tmp_path / USERS_PACKAGE
    own.mkdir()
    families.cache_clear()
    yield own
    for name in [name for name in sys.modules if name.partition(".")[0] == USERS_PACKAGE]:
        del sys.modules[name]
    families.cache_clear()


def test_a_family_in_one_file_trains_samples_syncs_and_exports(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(TOY.splitlines()) < 60
    (package / "toy.py").write_text(TOY)
    root = package.parent
    keys = {"toy_every": 2, "toy_window": 6, "hidden_act": "gelu", "tie_word_embeddings": False}
    # one head of keys, which both ranks of the engine hold
    make_tiny_model(root / "model", "ToyForCausalLM", num_key_value_heads=1, **keys)
    assert main(["check-model", str(root / "model")]) == 0
    assert "ToyForCausalLM, 2 layers" in capsys.readouterr().out
    config = write_config(
        root / "config.yaml",
        root / "model",
        root / "run",
        steps=2,
        roles={"policy": {"dp_shard": 2}, "rollout": {"tp": 2}},
        data=questions(root / "sums.jsonl"),
        checkpoint={"export": True},
        train={"lr": 0.01},
    )
    assert "rollout.kv_cache" in plan_text(load_config(config), 2)
    [records] = run_ranks(run_configs, 2, [(str(config), [])], str(root), timeout_s=200)[0]
    assert len(records) == 2 and all(record["rollout_gap"] < 1e-4 for record in records)
    assert main(["check-model", str(root / "run" / "model")]) == 0
    before, after = (
        load_file(d / "model.safetensors") for d in (root / "model", root / "run/model")
    )
    assert before.keys() == after.keys()
    name = "model.layers.1.attention.qkv.weight"
    assert before[name].shape == ((4 + 2) * 8, 32) and not torch.equal(before[name], after[name])


def test_another_model_type_of_a_family_is_read_without_architectures(package: Path) -> None:
    (package / "toy.py").write_text(TOY)
    source = {"model_type": "toy_chat", "toy_every": 2, "toy_window": 6}
    model = parse_config({**source, "hidden_act": "gelu"})
    assert model.architecture == "ToyForCausalLM" and model.num_layers == 32
    with pytest.raises(ValueError, match="the key 'toy_window' is missing"):
        parse_config({"model_type": "toy", "toy_every": 2})
    with pytest.raises(ValueError, match="model_type 'llama' is not that of ToyForCausalLM"):
        parse_config({**source, "architectures": ["ToyForCausalLM"], "model_type": "llama"})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_there", "spmdrl_families.toy cannot be imported: ModuleNotFoundError"),
        ("family = 3", "spmdrl_families.toy has no 'FAMILY'"),
        ("FAMILY = 3", "FAMILY must be a Family, not int"),
        (TOY.replace('"toy"', '"llama"'), "another family, LlamaForCausalLM"),
        (TOY.replace('"toy_chat"', '"qwen2"'), "another family, Qwen2ForCausalLM"),
    ],
)
def test_a_family_that_is_none_is_named(package: Path, code: str, message: str) -> None:
    (package / "toy.py").write_text(code)
    with pytest.raises(ValueError, match=message) as error:
        families()
    assert "spmdrl_families.toy" in str(error.value)
