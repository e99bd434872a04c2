"""Attention of spans by the flash-attention packages: version 2, which a site builds, and version 4
(flash-attn-4), whose kernels are compiled when they are first needed.

Version 4 has kernels for compute capabilities 9.0 and 10.0 that differ in what they compute
(4.0.0b36: `flash_attn/cute/interface.py` checks the heads' dims, and with 256 dims the backward of
10.0 refuses windows, sinks and soft caps). No card has run it for this project.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.attention_stream import BlockLists, SeenKeys, seen_keys
from spmdrl.models.attention_varlen import MOST_WIDTH, Sequences, VarlenAttention, VarlenKernel
from spmdrl.models.layer_attention import AttentionNeeds
from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions

Version = Literal[2, 4]
FLASH_NAMES: dict[Version, str] = {2: "flash-attn 2", 4: "flash-attn-4"}

COMPILED_WIDTHS = {(9, 0): (64, 128, 256), (10, 0): (64, 128, 256)}
"""Dims of heads, by compute capability, that version 4 is taken for: the kernels of each are
compiled forward and backward by scripts/test_cuda.sh -k flash, with all that `flash_lacks`
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
        assert sinks is None or version == 4, "resolve_attention chose a kernel without sinks"
        chosen = _chosen(options, sinks)
        if options.window is not None:
            chosen["window_size"] = (options.window - 1, 0)
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
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **chosen,
        )
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return VarlenKernel(run)


def _chosen(options: AttentionOptions, sinks: Tensor | None) -> dict[str, Any]:
    chosen: dict[str, Any] = {"softmax_scale": options.scale}
    if options.softcap is not None:
        chosen["softcap"] = options.softcap
    if sinks is not None:
        chosen["learnable_sink"] = sinks
    return chosen


class StreamKernel:
    """flash-attn-4 over a stream in one call where its sequences share prompts, with a mask of the
    keys that each row sees: nothing is laid out a second time. Other streams are computed sequence
    by sequence, and so are all where deterministic algorithms are asked for: the order of the
    blocks' sums would have to be listed too.

    Args:
        block: rows and keys of a block, see `stream_block`.
    """

    def __init__(self, block: tuple[int, int]) -> None:
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        self._sequences = flash_kernel(4)
        self._attend, self._lists = flash_attn_func, BlockSparseTensorsTorch
        self._block, self._mask = block, _mask()

    def prepare(
        self,
        spans: Sequence[Span],
        options: AttentionOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> VarlenAttention:
        exact = torch.are_deterministic_algorithms_enabled()
        found = None if exact else seen_keys(spans, options.window, self._block)
        if found is None:
            return self._sequences.prepare(spans, options, dtype=dtype, device=device)
        *moved, ends = to_device(
            [*found.tensors(), torch.tensor([0, spans[-1].q_stop], dtype=torch.int32)], device
        )
        seen, rows = SeenKeys.of_tensors(moved), spans[-1].q_stop
        stream = Sequences(key_rows=None, ends_q=ends, ends_k=ends, most_q=rows, most_k=rows)
        return VarlenAttention(partial(self._run, seen), stream, options)

    def _run(
        self,
        seen: SeenKeys,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Sequences,
        options: AttentionOptions,
        sinks: Tensor | None,
    ) -> Tensor:
        found = self._attend(
            q=q[None],
            k=k[None],
            v=v[None],
            mask_mod=self._mask,
            aux_tensors=[seen.first, seen.stop, seen.own],
            block_sparse_tensors=self._as_lists(seen.by_rows),
            block_sparse_tensors_bwd=self._as_lists(seen.by_keys),
            **_chosen(options, sinks),
        )
        out: Tensor = found[0].squeeze(0)  # whose gradient is a view, and an index's a copy
        return out

    def _as_lists(self, lists: BlockLists) -> Any:
        return self._lists(
            mask_block_cnt=lists.part_count,
            mask_block_idx=lists.part,
            full_block_cnt=lists.whole_count,
            full_block_idx=lists.whole,
            block_size=self._block,
        )


def stream_block(needs: AttentionNeeds, capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return rows and keys of a block that all of version 4's kernels of a model can use; None:
    there is none, or it is not known to compile.
    """
    if needs.width > 128 or not needs.widths:
        return None
    return {(9, 0): (128, 128), (10, 0): (256, 128)}.get(capability)


def _mask() -> Any:
    """Make the function that tells the package's kernels which keys of `SeenKeys` a row sees."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def sees(batch, head, row, key, lengths, tensors):  # type: ignore[no-untyped-def]
        first = scalar_to_ssa(tensors[0][row[0]], cutlass.Int32)
        stop = scalar_to_ssa(tensors[1][row[0]], cutlass.Int32)
        own = scalar_to_ssa(tensors[2][row[0]], cutlass.Int32)
        return ((key >= first) & (key < stop)) | ((key >= own) & (key <= row))

    return sees


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
