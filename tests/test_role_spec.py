"""Roles as planned: their kinds and backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_cases import write_config
from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.models.config import read_config
from tiny_model import make_tiny_model


def test_an_unknown_kind_is_refused_and_the_nearest_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    model = read_config(tmp_path / "model")
    specs = specs_of(load_config(path), model)
    assert {name: spec.backend for name, spec in specs.items()} == {
        "policy": "torch",
        "rollout": "native",
    }
    config = load_config(path, ["roles.critic={kind: polcy}"])
    with pytest.raises(ValueError, match=r"roles\.critic\.kind=polcy: .*did you mean policy\?"):
        specs_of(config, model)
