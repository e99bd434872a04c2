"""The signatures of the kernels that attention of spans is computed by, one test for each version.

Functions of these signatures, which compute on the CPU, stand in their place.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spmdrl.models.attention import PackedAttention, make_kernel, resolve_attention
from spmdrl.models.attention_varlen import VarlenKernel, installed_flash, varlen_kernel
from spmdrl.models.layer_attention import AttentionNeeds
from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPANS = [
    Span(q_start=0, q_stop=5, own=(0, 5)),
    Span(q_start=5, q_stop=9, own=(5, 9), prefix=((0, 5),)),
]


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    scale: float,
    left: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of sequences, the mask aligned at their ends; heads may be grouped. A row
    sees `left` keys before its own (-1: all), and scores are capped if `softcap` is not 0.
    """
    assert k.shape[2] == v.shape[2], "these kernels take one width"
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
        count, length = rows.stop - rows.start, keys.stop - keys.start
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        seen = torch.ones(count, length).tril(length - count)
        if left >= 0:
            seen = seen.triu(length - count - left)
        weights = scores.masked_fill(seen == 0, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[keys]))
    return torch.cat(parts)


FLASH_2 = """
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):
    assert causal and window_size in ((-1, -1), (2, 0))
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap)
"""

FLASH_4 = """
def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, **later,
):
    assert causal and qv is None and not softcap
    left = -1 if window_size[0] is None else window_size[0]
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left), None
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable folder, whose packages are forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def install(folder: Path, file: str, text: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    attend = inspect.getsource(causal).replace("def causal", "def attend")
    header = "from __future__ import annotations\nimport torch\n"
    (folder / file).write_text(header + attend + text)


def check(kernel: Any, *, softcap: float | None = None) -> None:
    """Compare layers with and without options, values as wide as keys and narrower."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 9, 2, 8, generator=generator, dtype=torch.float64)
    options = [
        AttentionOptions(scale=8**-0.5),
        AttentionOptions(scale=0.5, window=3, softcap=softcap),
    ]
    attend, wanted = (
        PackedAttention(SPANS, kind, options=options, dtype=torch.float64, device=CPU)
        for kind in (kernel, make_kernel("blocked"))
    )
    for layer, values in ((0, v), (1, v), (1, v[..., :5])):
        expected = wanted(layer, q, k, values)
        torch.testing.assert_close(attend(layer, q, k, values), expected, rtol=1e-9, atol=1e-9)


def test_flash_attention_2_is_what_auto_takes(packages: Path) -> None:
    install(packages, "flash_attn/flash_attn_interface.py", FLASH_2)
    (packages / "flash_attn" / "__init__.py").write_text("")
    assert installed_flash() == 2
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "flash"
    capped = AttentionNeeds(softcap=True)
    assert resolve_attention("auto", CUDA, torch.bfloat16, capped) == "flash"
    sinks = AttentionNeeds(sinks=True)
    assert resolve_attention("auto", CUDA, torch.bfloat16, sinks) == "flex"
    check(make_kernel("flash"), softcap=0.7)


def test_flash_attention_4_is_taken_only_if_asked_for(packages: Path) -> None:
    install(packages, "flash_attn/cute/__init__.py", FLASH_4)
    assert installed_flash() == 4
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "varlen"
    assert resolve_attention("flash", CUDA, torch.bfloat16) == "flash"
    with pytest.raises(ValueError, match=r"model\.attention=flash .*soft cap"):
        resolve_attention("flash", CUDA, torch.bfloat16, AttentionNeeds(softcap=True))
    check(make_kernel("flash"))


def test_another_package_of_that_name_is_none(packages: Path) -> None:
    install(packages, "flash_attn/other.py", "")
    assert installed_flash() is None
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "varlen"
    with pytest.raises(ValueError, match=r"model\.attention=flash needs the flash-attn package"):
        resolve_attention("flash", CUDA, torch.bfloat16)


def checks_heads(q: Tensor, k: Tensor, enable_gqa: bool) -> None:
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")


def varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert window_size in ((-1, 0), (2, 0)) and key.shape[1] == 2, "keys are repeated"
    assert scale is not None
    return causal(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def varlen_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert window_size in ((-1, 0), (2, 0)) and cu_seq_k is not None and scale is not None
    checks_heads(query, key, enable_gqa)
    return causal(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


@pytest.mark.parametrize("function", [varlen_2_11, varlen_2_13])
def test_torchs_kernel_takes_grouped_heads_unrepeated(function: Any) -> None:
    kernel = varlen_kernel(function)
    assert isinstance(kernel, VarlenKernel)
    check(kernel)


def test_the_signature_of_the_installed_torch_is_one_of_them() -> None:
    from torch.nn.attention.varlen import varlen_attn

    known = [list(inspect.signature(f).parameters) for f in (varlen_2_11, varlen_2_13)]
    assert list(inspect.signature(varlen_attn).parameters) in known
