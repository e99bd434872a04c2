"""Checksums of the models under adapters notice another model, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmdrl.models.files.hf import open_checkpoint, open_model
from spmdrl.run.base_sums import check_bases, checksum
from tiny_model import make_tiny_model


def test_a_checksum_is_of_the_weights_and_not_of_their_place_or_head(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        make_tiny_model(tmp_path / name, seed=seed)
    found = {name: checksum(open_model(tmp_path / name)[1]) for name in ("a", "b", "other")}
    assert found["a"] == found["b"] != found["other"]
    _, with_head = open_model(tmp_path / "a", head="score", head_init="normal")
    assert checksum(with_head) == found["a"]


@pytest.mark.parametrize("change", ["values", "dtype"])
def test_a_checksum_notices_every_tensor(tmp_path: Path, change: str) -> None:
    make_tiny_model(tmp_path / "model")
    before = checksum(open_model(tmp_path / "model")[1])
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    changed = tensors[name] * 1.001 if change == "values" else tensors[name].bfloat16()
    save_file({**tensors, name: changed}, file, metadata={"format": "pt"})
    assert checksum(open_model(tmp_path / "model")[1]) != before


def test_rows_within_stacked_tensors_count(tmp_path: Path) -> None:
    stack = torch.randn(2, 5, 3)
    save_file({"x": stack}, tmp_path / "model.safetensors")
    before = checksum(open_checkpoint(tmp_path))
    stack[0, 3] += 1  # the second of the four rows that count
    save_file({"x": stack}, tmp_path / "model.safetensors")
    assert checksum(open_checkpoint(tmp_path)) != before


def test_another_base_is_refused_and_a_moved_one_is_not() -> None:
    saved = {"policy": {"path": "/models/one", "xxh3": "aa"}}
    check_bases(saved, {"policy": {"path": "/elsewhere/one", "xxh3": "aa"}}, "step_00000001")
    check_bases({}, {"policy": {"path": "/models/one", "xxh3": "aa"}}, "step_00000001")
    now = {"policy": {"path": "/models/two", "xxh3": "bb"}}
    with pytest.raises(ValueError, match=r"roles.policy: step_1 holds an adapter of /models/one"):
        check_bases(saved, now, "step_1")
