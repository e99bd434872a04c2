"""Every variant of every family against transformers, by the lines of `spmdrl verify-model`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from family_variants import FAMILIES
from spmdrl.commands.cli import main
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.check import check_directory
from spmdrl.models.files.hf import TensorSource, open_model
from spmdrl.verification import verify as verification
from spmdrl.verification.card import Verified, card
from spmdrl.verification.lines import Line, worst_gradient
from spmdrl.verification.verify import verify
from sweeps import swept

REFUSED: dict[str, frozenset[str]] = {
    "gemma2": frozenset({"bidirectional"}),
    "gemma3_text": frozenset({"bidirectional"}),
}
"""Variants that are refused today; a family without names is refused as a whole."""

QUICK = [(f, v) for f, family in FAMILIES.items() for v in family.quick]
UNLIKE = ("qwen2", "gemma2", "olmo3", "qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3")
"""Families of which each has a kind of block that the others lack."""
BRIEF = [(family, FAMILIES[family].quick[0]) for family in UNLIKE]
ALL = [(f, v) for f, family in FAMILIES.items() for v in family.variants]


def is_refused(family: str, variant: str) -> bool:
    return family in REFUSED and (not REFUSED[family] or variant in REFUSED[family])


def check(directory: Path, family: str, variant: str, *, ranks: bool) -> None:
    FAMILIES[family].write(variant, directory)
    if is_refused(family, variant):
        assert check_directory(directory).errors, "it loads: take it out of REFUSED"
        return
    assert not check_directory(directory).errors
    lines = list(verify(directory, ranks=ranks))
    print("\n".join(line.text for line in lines))
    assert not [line.text for line in lines if not line.holds]
    assert len(lines) == (12 if ranks else 8)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("family", "variant"), swept(QUICK, BRIEF))
def test_two_variants_of_a_family_are_computed_as_transformers_does(
    tmp_path: Path, family: str, variant: str
) -> None:
    check(tmp_path / variant, family, variant, ranks=False)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "variant"), ALL)
def test_every_variant_is_computed_as_transformers_does_in_every_layout(
    tmp_path: Path, family: str, variant: str
) -> None:
    check(tmp_path / variant, family, variant, ranks=True)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_model_ends_with_1_and_its_card_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: our weights of one norm differ from those in the files."""

    class Wrong:
        def __init__(self, source: TensorSource) -> None:
            self._source, self.names, self.shape = source, source.names, source.shape

        def read(self, part: object) -> torch.Tensor:
            values = self._source.read(part)  # type: ignore[arg-type]
            return values * 1.001 if part.name == "model.norm.weight" else values  # type: ignore[attr-defined]

    def open_wrong(path: Path) -> tuple[ModelConfig, TensorSource]:
        model, source = open_model(path)
        return model, Wrong(source)

    FAMILIES["llama"].write("plain", tmp_path / "v" / "plain")
    monkeypatch.setattr(verification, "open_model", open_wrong)
    words = ["verify-model", str(tmp_path / "v"), "--one-process", "--tokens", "16"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--layers", "1", "--card", str(tmp_path / "cards" / "llama.md")])
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "the model is loaded" in shown and "logits" in shown
    assert "DOES NOT HOLD" in shown.split("logits")[1].split("\n")[0]
    table = (tmp_path / "cards" / "llama.md").read_text()
    assert table.startswith("# llama\n") and "| plain | **1.0e-03** |" in table


def test_a_card_tells_variants_by_their_keys() -> None:
    line = Line(name="logits", figure=2e-6, limit=1e-4)
    absent = Line(name="ep2", figure=None, limit=1e-4, note="no experts")
    models = [
        Verified(name="a", source={"model_type": "llama", "x": 1}, lines=(line, absent)),
        Verified(name="b", source={"model_type": "llama"}, refused="key x: 1 | 2"),
    ]
    text = card("llama", models)
    assert "| variant | logits | ep2 |" in text
    assert "| a: `llama` | 2.0e-06 | not offered |" in text
    assert "| b: `x`=absent | refused: key x: 1 / 2 |  |" in text


def test_a_gradient_that_is_missing_or_only_ours_is_seen() -> None:
    one, zero = torch.ones(3), torch.zeros(3)
    assert worst_gradient({"a": one}, {"a": one, "vision": zero}) == (0.0, "")
    assert worst_gradient({"a": one}, {"a": one, "b": one})[1] == "b"
    assert worst_gradient({"a": one, "c": one}, {"a": one})[1] == "c"
    assert worst_gradient({"a": one * float("nan")}, {"a": one})[1] == "a"
