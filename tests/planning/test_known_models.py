"""Known models: their shapes add up to the published numbers of parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from spmdrl.models.config import read_config
from spmdrl.models.sharding import global_shapes
from spmdrl.planning.known_models import TABLE, known_model, known_models

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", known_models())
def test_shapes_add_up_to_the_published_number(name: str) -> None:
    row = yaml.safe_load(TABLE.read_text(encoding="utf-8"))[name]
    model = known_model(name)
    assert sum(map(math.prod, global_shapes(model).values())) == row["parameters"]
    others = [*row.get("aliases", ()), row.get("repository", name)]
    assert all(known_model(other) == model for other in others)


def test_other_names_and_directories(tmp_path: Path) -> None:
    assert known_model("llama-70b").hidden_size == 8192
    source = {"architectures": ["LlamaForCausalLM"], "vocab_size": 77}
    (tmp_path / "config.json").write_text(json.dumps(source))
    assert known_model(str(tmp_path)).vocab_size == 77
    with pytest.raises(ValueError, match="'llama-70': did you mean llama-70b"):
        known_model("llama-70")


def test_the_shipped_model_is_the_known_one() -> None:
    own, known = read_config(MODELS / "SmolLM2-135M-Instruct"), known_model("smollm2-135m")
    assert global_shapes(own) == global_shapes(known)
    assert (own.attention.num_heads, own.attention.num_kv_heads, own.attention.head_dim) == (
        9,
        3,
        64,
    )
    assert (known.attention.num_heads, known.attention.num_kv_heads, known.attention.head_dim) == (
        9,
        3,
        64,
    )
