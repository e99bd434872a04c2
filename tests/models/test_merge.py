"""`spmdrl convert --merge` writes the base with an adapter added; `check-model` reads adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft_dirs import make_peft, our_logits, their_logits, theirs
from safetensors.torch import load_file, save_file

from spmdrl.commands.cli import main
from spmdrl.models.files.merge import merge_adapter
from spmdrl.models.files.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spmdrl.models.files.weight_files import SINGLE
from tiny_model import make_tiny_model

ALL = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}
Q = "model.layers.1.self_attn.q_proj"


def halve(directory: Path) -> None:
    """Write the weights in bfloat16."""
    weights = load_file(directory / SINGLE)
    save_file({name: w.bfloat16() for name, w in weights.items()}, directory / SINGLE)


def shrink(directory: Path, factor: float) -> None:
    """Make an adapter's B small."""
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    small = {name: t * factor if "lora_B" in name else t for name, t in tensors.items()}
    save_file(small, directory / ADAPTER_WEIGHTS)


def status(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_has_the_adapters_logits(tmp_path: Path, tied: bool) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_tiny_model(base, tie_word_embeddings=tied)
    expected = make_peft(base, adapter, **ALL)
    report = merge_adapter(base, adapter, out)
    torch.testing.assert_close(their_logits(theirs(out)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_logits(out, None), expected, atol=1e-5, rtol=1e-5)
    assert report.matrices == 14
    assert 0.99 * report.moved < report.kept <= report.moved
    before, after = load_file(base / SINGLE), load_file(out / SINGLE)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 14
    assert all("_proj." in name for name in changed), "embeddings, head and norms stay"
    assert (out / "tokenizer.json").is_file()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_experts_are_merged(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_tiny_model(base, "Qwen3MoeForCausalLM")
    modules = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = make_peft(base, adapter, target_modules=modules)
    report = merge_adapter(base, adapter, out)
    assert report.matrices == 2 * (1 + 3 * 8)
    torch.testing.assert_close(our_logits(out, None), expected, atol=1e-5, rtol=1e-5)


def test_a_merge_is_rounded_once_and_counts_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_tiny_model(base)
    make_peft(base, adapter, **ALL)
    halve(base)
    shrink(adapter, 1e-3)
    assert status("convert", str(base), str(out), "--merge", str(adapter)) == 0
    printed, said = capsys.readouterr()
    assert printed.strip() == str(out)
    found = re.search(r"14 matrices merged: (\d+) of (\d+) elements .* differ in bfloat16", said)
    assert found is not None
    kept, moved = int(found[1]), int(found[2])
    assert 0 < kept < moved / 2
    assert "lost to rounding: write --dtype float32" in said

    weights, merged = load_file(base / SINGLE), load_file(out / SINGLE)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    a, b = (tensors[f"base_model.model.{Q}.lora_{factor}.weight"] for factor in "AB")
    exact = weights[f"{Q}.weight"].float() + 1.5 * (b @ a)
    torch.testing.assert_close(merged[f"{Q}.weight"], exact.bfloat16(), atol=0, rtol=2**-7)
    assert (merged[f"{Q}.weight"] != exact.bfloat16()).float().mean() < 0.01
    lost = sum(int((merged[name] == weights[name]).sum()) for name in weights if "_proj." in name)
    total = sum(w.numel() for name, w in weights.items() if "_proj." in name)
    assert total - lost == kept

    words = ("convert", str(base), str(out), "--merge", str(adapter), "--dtype", "float32")
    assert status(*words) == 0
    assert "lost to rounding" not in capsys.readouterr().err
    wide = load_file(out / SINGLE)
    assert {w.dtype for w in wide.values()} == {torch.float32}
    torch.testing.assert_close(wide[f"{Q}.weight"], exact, atol=1e-6, rtol=0)
    shrink(adapter, 0)
    assert status("convert", str(base), str(out), "--merge", str(adapter)) == 0
    assert "none changed: the adapter adds nothing" in capsys.readouterr().err


def test_a_merged_head_makes_a_scalar_model(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_tiny_model(base)
    expected = make_peft(base, adapter, head="score", **ALL)
    merge_adapter(base, adapter, out)
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    torch.testing.assert_close(our_logits(out, None, "score"), expected, atol=1e-5, rtol=1e-5)


def test_a_merge_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_tiny_model(base)
    make_peft(base, adapter, **ALL)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    for words, message in (
        ((str(base), str(base), "--merge", str(adapter)), "is read for the merge"),
        ((str(base), str(adapter), "--merge", str(adapter)), "is read for the merge"),
        ((str(base), str(tmp_path / "o"), "--merge", str(base)), "adapter_config.json does not"),
        ((str(adapter), str(tmp_path / "o"), "--merge", str(adapter)), "holds an adapter and no"),
        ((str(base), str(tmp_path / "o"), "--dtype", "float32"), "of no use without --merge"),
        (
            (str(base), str(tmp_path / "o"), "--merge", str(adapter), "--dtype", "int8"),
            "must be one of float32, bfloat16, float16",
        ),
        ((str(base), str(tmp_path / "o")), "give --pad-heads-to or --merge"),
    ):
        assert status("convert", *words) == 2
        assert message in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in base.iterdir()}
    assert not (tmp_path / "o").exists()


def test_check_model_reads_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_tiny_model(base)
    make_peft(base, adapter, rank_pattern={"v_proj": 2})
    assert status("check-model", str(adapter)) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == (
        f"{adapter}: adapter of {base}, rank 2, 4, scale 2, 4, 4 matrices, 8 tensors (F32)"
    )
    assert last == "the adapter is loaded"

    shrink(adapter, 0)
    file = adapter / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "o/m"}))
    assert status("check-model", str(adapter)) == 2
    assert "its base (o/m) is no directory here: give one with --base" in capsys.readouterr().out
    assert status("check-model", str(adapter), "--base", str(base)) == 0
    out = capsys.readouterr().out
    assert "every B is zero: the adapter adds nothing" in out
    assert "base_model_name_or_path is 'o/m'" in out

    shrink(adapter, float("nan"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    assert status("check-model", str(adapter), "--base", str(base)) == 2
    assert "use_dora is true: DoRA also trains" in capsys.readouterr().out
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": False}))
    assert status("check-model", str(adapter), "--base", str(base)) == 2
    out = capsys.readouterr().out
    assert out.count("has nan at") == 4, "every damaged tensor"
    assert out.splitlines()[-1] == "the adapter is refused"


def test_sums_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_tiny_model(base)
    make_peft(base, adapter, **ALL)
    shrink(adapter, 1e6)
    with pytest.raises(ValueError, match=r"q_proj.*float16 cannot hold: write bfloat16"):
        merge_adapter(base, adapter, out, "float16")
    assert not out.exists()
    merge_adapter(base, adapter, out, "bfloat16")


def test_a_merge_keeps_each_tensors_own_dtype(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_tiny_model(base)
    make_peft(base, adapter, **ALL)
    weights = load_file(base / SINGLE)
    wide = {name: w if "v_proj" in name else w.bfloat16() for name, w in weights.items()}
    save_file(wide, base / SINGLE)
    report = merge_adapter(base, adapter, out)
    found = load_file(out / SINGLE)
    assert {name: w.dtype for name, w in found.items()} == {n: w.dtype for n, w in wide.items()}
    assert "differ in bfloat16, float32" in report.lines[-1]
