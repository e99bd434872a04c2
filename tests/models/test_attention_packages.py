"""The signatures of the kernels that attention of spans is computed by, one test for each version.

Functions of these signatures, which compute on the CPU, stand in their place.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from flash_reference import FLASH_2, FLASH_4, FLASH_4_FILES, causal
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.attention import (
    PackedAttention,
    describe_attention,
    make_kernel,
    resolve_attention,
)
from spmdrl.models.attention_flash import (
    COMPILED_WIDTHS,
    StreamKernel,
    flash_versions,
    stream_block,
)
from spmdrl.models.attention_varlen import VarlenKernel, varlen_kernel
from spmdrl.models.config import read_config
from spmdrl.models.layer_attention import AttentionNeeds
from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions
from spmdrl.training.backend_steps import attention_of
from spmdrl.training.options import TrainOptions
from tiny_model import make_tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPANS = [
    Span(q_start=0, q_stop=5, own=(0, 5)),
    Span(q_start=5, q_stop=9, own=(5, 9), prefix=((0, 5),)),
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable folder, whose packages are forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in installed_modules():
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in installed_modules():
        del sys.modules[name]


def installed_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "cutlass")]


def install(folder: Path, file: str, text: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    attend = inspect.getsource(causal).replace("def causal", "def attend")
    header = "from __future__ import annotations\nimport torch\n"
    (folder / file).write_text(header + attend + text)


def check(kernel: Any, *, softcap: float | None = None, with_sinks: bool = False) -> None:
    """Compare layers with and without options, values as wide as keys and narrower, and their
    gradients.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 9, 2, 8, generator=generator, dtype=torch.float64)
    sinks = torch.randn(4, generator=generator, dtype=torch.float64) if with_sinks else None
    options = [
        AttentionOptions(scale=8**-0.5),
        AttentionOptions(scale=0.5, window=3, softcap=softcap),
    ]
    attend, wanted = (
        PackedAttention(SPANS, kind, options=options, dtype=torch.float64, device=CPU)
        for kind in (kernel, make_kernel("blocked"))
    )
    for layer, values in ((0, v), (1, v), (1, v[..., :5])):
        found = []
        for function in (attend, wanted):
            given = [x.clone().requires_grad_() for x in (q, k, values)]
            own = None if sinks is None else sinks.clone().requires_grad_()
            out = function(layer, *given, own)
            inputs = given if own is None else [*given, own]
            found.append([out, *torch.autograd.grad((out * q[..., : out.shape[2]]).sum(), inputs)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


HOPPER, BLACKWELL, AMPERE = (9, 0), (10, 0), (8, 0)


def taken(capability: tuple[int, int], *widths: int, **needs: bool) -> str:
    own = AttentionNeeds(widths=widths, **needs)
    return resolve_attention("auto", CUDA, torch.bfloat16, own, capability=capability)


def test_flash_attention_2_is_what_auto_takes(packages: Path) -> None:
    install(packages, "flash_attn/flash_attn_interface.py", FLASH_2)
    (packages / "flash_attn" / "__init__.py").write_text("")
    assert flash_versions() == (2,)
    assert taken(AMPERE) == taken(HOPPER) == "flash"
    assert taken(HOPPER, softcap=True) == "flash"
    assert taken(HOPPER, sinks=True) == "flex"
    check(make_kernel("flash"), softcap=0.7)


def test_flash_attention_4_is_taken_where_it_has_a_kernel(packages: Path) -> None:
    install(packages, "flash_attn/cute/__init__.py", FLASH_4)
    assert flash_versions() == (4,)
    all_three = {"softcap": True, "sinks": True, "window": True}
    for card, widths in COMPILED_WIDTHS.items():
        for width in widths:
            assert taken(card, width) == "flash4"
            if (card, width) != (BLACKWELL, 256):
                assert taken(card, width, **all_three) == "flash4"
    assert taken(HOPPER, 72) == taken(BLACKWELL, 192) == "varlen"
    assert taken(HOPPER, 64, 128) == "flash4" and taken(HOPPER, 64, 100) == "varlen"
    assert taken(BLACKWELL, 256, window=True) == "varlen"
    assert taken(BLACKWELL, 256, sinks=True) == taken(BLACKWELL, 256, softcap=True) == "flex"
    for card in (AMPERE, (10, 3), (12, 0), (0, 0)):
        assert taken(card) == "varlen" and taken(card, sinks=True) == "flex"
    check(make_kernel("flash4"), softcap=0.7, with_sinks=True)
    torch.use_deterministic_algorithms(True)
    try:
        check(make_kernel("flash4"))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("card", "needs", "lacking"),
    [
        (AMPERE, AttentionNeeds(), r"compute capability 8\.0"),
        (HOPPER, AttentionNeeds(widths=(20,)), "heads of 20 dims"),
        (BLACKWELL, AttentionNeeds(widths=(256,), window=True), "window with heads of 256 dims"),
    ],
)
def test_flash_that_is_asked_for_says_what_it_lacks(
    packages: Path, card: tuple[int, int], needs: AttentionNeeds, lacking: str
) -> None:
    install(packages, "flash_attn/cute/__init__.py", FLASH_4)
    asked = partial(resolve_attention, "flash", CUDA, torch.bfloat16)
    assert asked(capability=HOPPER) == "flash4"
    with pytest.raises(ValueError, match=rf"model\.attention=flash .*{lacking}"):
        asked(needs, capability=card)


@pytest.mark.parametrize("block", [(4, 4), (8, 4)])
def test_a_stream_that_shares_prompts_is_one_call(
    packages: Path, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's other function is called, with lists of blocks."""
    for file, text in FLASH_4_FILES.items():
        install(packages, file, text)
    kernel = StreamKernel(block)
    monkeypatch.setattr(kernel, "_sequences", None)
    check(kernel, softcap=0.7, with_sinks=True)


def test_shared_prompts_that_do_not_fit_are_laid_out(packages: Path) -> None:
    for file, text in FLASH_4_FILES.items():
        install(packages, file, text)
    kernel = StreamKernel((4, 4))
    prepare = partial(kernel.prepare, dtype=torch.float64, device=CPU)
    plain = AttentionOptions(scale=1.0)
    assert prepare(SPANS, plain)._sequences.key_rows is None
    # two ranges of a prompt, and rows of a context-parallel rank
    for spans in (
        [*SPANS, Span(q_start=9, q_stop=12, own=(9, 12), prefix=((0, 2), (3, 5)))],
        [Span(q_start=0, q_stop=5, own=(5, 10), prefix=((0, 3),))],
    ):
        assert prepare(spans, plain)._sequences.key_rows is not None
    torch.use_deterministic_algorithms(True)
    try:
        assert prepare(SPANS, plain)._sequences.key_rows is not None
        check(kernel)
    finally:
        torch.use_deterministic_algorithms(False)


def test_shared_prompts_are_read_once_where_the_kernels_can(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, text in FLASH_4_FILES.items():
        install(packages, file, text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert isinstance(make_kernel("flash4", AttentionNeeds(widths=(64, 128))), StreamKernel)
    for needs in (AttentionNeeds(widths=(64, 256)), None):
        assert isinstance(make_kernel("flash4", needs), VarlenKernel)
    assert stream_block(AttentionNeeds(widths=(128,)), BLACKWELL) == (256, 128)
    assert stream_block(AttentionNeeds(widths=(128,)), AMPERE) is None


def test_with_both_versions_the_older_has_what_the_newer_lacks(packages: Path) -> None:
    install(packages, "flash_attn/cute/__init__.py", FLASH_4)
    install(packages, "flash_attn/flash_attn_interface.py", FLASH_2)
    (packages / "flash_attn" / "__init__.py").write_text("")
    assert flash_versions() == (2, 4)
    assert taken(HOPPER) == "flash4" and taken(AMPERE) == "flash"
    assert taken(BLACKWELL, 256, softcap=True) == "flash"
    assert taken(HOPPER, sinks=True) == "flash4" and taken(AMPERE, sinks=True) == "flex"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import no_such_library", "cannot be imported .ModuleNotFoundError: .*no_such_library"),
        (FLASH_4.replace("learnable_sink", "sink"), "takes no learnable_sink"),
    ],
)
def test_a_package_that_does_not_fit_is_named(packages: Path, text: str, complaint: str) -> None:
    install(packages, "flash_attn/cute/__init__.py", text)
    with pytest.raises(ValueError, match=rf"flash-attn-4 .*{complaint}.*: mend it"):
        make_kernel("flash4")


def test_a_role_says_its_attention_on_gpus(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path)
    model = read_config(tmp_path)
    caplog.set_level("INFO", "spmdrl")
    options = TrainOptions(attention="varlen", param_dtype=torch.bfloat16)
    for rank in (0, 1):
        place = SimpleNamespace(role="actor", coordinate=lambda axis, rank=rank: rank)
        attention_of(cast("Mesh", place), model, options, CUDA)
        attention_of(cast("Mesh", place), model, TrainOptions(), CPU)
    assert [record.message for record in caplog.records] == [
        "actor: attention by torch's varlen_attn"
    ]
    for kind, name in (("flash4", "flash-attn-4, "), ("flash", "flash-attn 2"), ("flex", "flex_")):
        assert describe_attention(kind).startswith(name)


def test_another_package_of_that_name_is_none(packages: Path) -> None:
    install(packages, "flash_attn/other.py", "")
    assert flash_versions() == ()
    assert taken(HOPPER) == "varlen"
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
