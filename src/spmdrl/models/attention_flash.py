"""Attention of spans by the flash-attention packages: version 2, which a site builds, and version 4
(flash-attn-4), whose kernels are compiled when they are first needed.

Version 4 has kernels for compute capabilities 9.0 and 10.0 that differ in what they compute
(4.0.0b36: `flash_attn/cute/interface.py` checks the heads' dims, and with 256 dims the backward of
10.0 refuses windows, sinks and soft caps). No card has run it for this project.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from spmdrl.models.attention_varlen import MOST_WIDTH, Sequences, VarlenKernel
from spmdrl.models.layer_attention import AttentionNeeds
from spmdrl.models.specs import AttentionOptions

Version = Literal[2, 4]
FLASH_NAMES: dict[Version, str] = {2: "flash-attn 2", 4: "flash-attn-4"}

COMPILED_WIDTHS = {(9, 0): (64, 128, 256), (10, 0): (64, 128, 256)}
"""Dims of heads, by compute capability, that version 4 is taken for: the kernels of each are
compiled forward and backward by tests/fake_gpu/test_flash_cuda.py, with all that `flash_lacks`
grants.
"""


def flash_versions() -> tuple[Version, ...]:
    """Return the versions of flash-attention that are installed, without importing them.

    Both are a package `flash_attn`; that of flash-attn-4 has only a folder `cute`.
    """
    package = find_spec("flash_attn")
    if package is None or package.submodule_search_locations is None:
        return ()
    places = list(package.submodule_search_locations)
    modules: tuple[tuple[Version, str], ...] = (
        (2, "flash_attn.flash_attn_interface"),
        (4, "flash_attn.cute"),
    )
    return tuple(version for version, name in modules if PathFinder.find_spec(name, places))


def flash_lacks(version: Version, needs: AttentionNeeds, capability: tuple[int, int]) -> str:
    """Name what a version does not compute of a model's needs on such a GPU; empty: it computes
    all.
    """
    if version == 2:
        wide = f"heads of {needs.width} dims" if needs.width > MOST_WIDTH else ""
        return "sinks" if needs.sinks else wide
    if capability not in COMPILED_WIDTHS:
        return f"GPU (compute capability {capability[0]}.{capability[1]})"
    for width in needs.widths:
        if width not in COMPILED_WIDTHS[capability]:
            return f"heads of {width} dims"
    if capability == (10, 0) and needs.width == 256:
        asked = {"sinks": needs.sinks, "soft cap": needs.softcap, "window": needs.window}
        for name, is_asked in asked.items():
            if is_asked:
                return f"{name} with heads of 256 dims"
    return ""


def flash_kernel(version: Version) -> VarlenKernel:
    """Make a version's varlen kernel, whose causal mask is aligned at the end since 2.1.

    Raises:
        ValueError: the package is installed and cannot be imported, or its function has not the
            arguments that are given here.
    """
    attend = _function_of(version)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Sequences,
        options: AttentionOptions,
        sinks: Tensor | None,
    ) -> Tensor:
        chosen: dict[str, Any] = {}
        if options.window is not None:
            chosen["window_size"] = (options.window - 1, 0)
        if options.softcap is not None:
            chosen["softcap"] = options.softcap
        if sinks is not None:
            assert version == 4, "resolve_attention chose a kernel without sinks"
            chosen["learnable_sink"] = sinks
        # By name: the fourth positional argument differs. Version 4 also returns the normalisers.
        found = attend(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=s.ends_q,
            cu_seqlens_k=s.ends_k,
            max_seqlen_q=s.most_q,
            max_seqlen_k=s.most_k,
            causal=True,
            softmax_scale=options.scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **chosen,
        )
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return VarlenKernel(run)


_GIVEN = {
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("causal", "softmax_scale", "deterministic", "window_size", "softcap"),
}


def _function_of(version: Version) -> Callable[..., Any]:
    otherwise = "mend it (pip install spmdrl[flash]), or set model.attention to varlen or flex"
    try:
        if version == 2:
            from flash_attn.flash_attn_interface import flash_attn_varlen_func
        else:
            from flash_attn.cute import flash_attn_varlen_func
    except Exception as error:  # a package of compiled code fails in many ways
        raise ValueError(
            f"model.attention: {FLASH_NAMES[version]} is installed and cannot be imported "
            f"({type(error).__name__}: {error}): {otherwise}"
        ) from error
    function: Callable[..., Any] = flash_attn_varlen_func
    given = _GIVEN | {"learnable_sink"} if version == 4 else _GIVEN
    if missing := given - inspect.signature(function).parameters.keys():
        raise ValueError(
            f"model.attention: the installed {FLASH_NAMES[version]} takes no "
            f"{', '.join(sorted(missing))}: {otherwise}"
        )
    return function
