"""Directories of all families against transformers: equal logits, or refused with a reason."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import Variant, all_variants

from spmdrl.models.attention import PackedAttention, make_kernel
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import open_model
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.spans import Span
from tiny_model import load_into

EACH = 17
"""Of so many variants the quick run takes one."""


def ours(directory: Path, tokens: Tensor) -> Tensor:
    config, weights = open_model(directory)
    decoder = Decoder(config, device="cpu")
    load_into(decoder, weights)
    attend = PackedAttention(
        [Span(q_start=0, q_stop=len(tokens), own=(0, len(tokens)))],
        make_kernel("blocked"),
        options=attention_options(config),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        hidden = decoder(tokens, torch.arange(len(tokens)), attend)
        logits: Tensor = hidden @ decoder.head_weight().T
    return logits


def theirs(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens[None]).logits[0]
    return logits


def outcome(variant: Variant, directory: Path) -> str:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        variant.write(directory)
    # a model that transformers does not make either
    except Exception as error:
        return f"not made: {error}"[:80]
    tokens = torch.randint(50, (100,), generator=torch.Generator().manual_seed(2))
    try:
        want = theirs(directory, tokens)
    # its refusals are of any kind
    except Exception:
        want = None
    try:
        found = ours(directory, tokens)
    except ValueError as error:
        text = str(error)
        named = "config.json" in text or ".safetensors" in text or str(directory) in text
        if "\n" in text or not named:
            return f"WRONG: {text}"
        return "refused by both" if want is None else f"refused by us: {text}"
    if want is None:
        return "read by us alone"
    gap = (found - want).abs().max().item()
    return "equal" if gap <= 1e-4 else f"WRONG: logits differ by {gap:.3g} of {want.abs().max()}"


def sweep(variants: list[Variant], directory: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    wrong = []
    for variant in variants:
        found = outcome(variant, directory)
        kind = found.partition(":")[0]
        counts[kind] += 1
        text = f"{variant.family}, {variant.name}: {found.replace(str(directory), '')}"
        print(text)
        if kind == "WRONG":
            wrong.append(text)
    print(f"{len(variants)} variants: {dict(counts)}")
    assert wrong == [], "\n".join(wrong)
    return counts


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_variants_has_the_logits_of_transformers(tmp_path: Path) -> None:
    variants = all_variants()[::EACH]
    counts = sweep(variants, tmp_path / "m")
    assert counts["equal"] > len(variants) / 3


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_all_variants_have_the_logits_of_transformers(tmp_path: Path) -> None:
    variants = all_variants()
    assert len(variants) > 300
    counts = sweep(variants, tmp_path / "m")
    assert counts["equal"] > len(variants) / 3
