"""Attention over a packed stream of tokens, described by spans.

A kernel turns a list of `spans.Span` and a layer's `AttentionOptions` into a function of q, k, v
and sinks:

- `blocked`: explicit products of small tiles; fastest on CPUs; float32 and float64.
- `sdpa`: `scaled_dot_product_attention` per tile; any device and dtype.
- `varlen`: `torch.nn.attention.varlen`; CUDA, half precision; no soft caps, no sinks.
- `flash` and `flash4`: the packages flash-attn (2) and flash-attn-4; CUDA, half precision; what
  they compute is in `attention_flash`. The configuration names both `flash`.
- `flex`: `flex_attention` with a block mask, compiled on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.parallel import gather_sum_grad
from spmdrl.models.attention_flash import (
    FLASH_NAMES,
    StreamKernel,
    flash_kernel,
    flash_lacks,
    flash_versions,
    stream_block,
)
from spmdrl.models.attention_flex import FlexKernel
from spmdrl.models.attention_tiles import TiledKernel
from spmdrl.models.attention_varlen import MOST_WIDTH, VarlenAttention, varlen_kernel
from spmdrl.models.blocks.delta_rule import DeltaInputs
from spmdrl.models.blocks.recurrence import PackedRecurrence
from spmdrl.models.kernels import gpu
from spmdrl.models.layer_attention import AttentionNeeds
from spmdrl.models.rope import Rope
from spmdrl.models.spans import AttentionFunction, Span, covers_rows
from spmdrl.models.specs import AttentionOptions

AttentionKind = Literal["blocked", "sdpa", "varlen", "flash", "flash4", "flex"]
KINDS: tuple[AttentionKind, ...] = ("blocked", "sdpa", "varlen", "flash", "flex")
"""Those that the configuration names."""


class AttentionKernel(Protocol):
    """Method to compute attention; made once by `make_kernel` and used for many lists of spans."""

    def prepare(
        self,
        spans: Sequence[Span],
        options: AttentionOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AttentionFunction:
        """Make the differentiable function for spans whose rows cover all of q."""


class PackedAttention:
    """The decoder's `Attend` for one packed stream.

    Args:
        spans: spans in order, covering every row of q; with context parallelism rows of q are this
            rank's and key ranges are places in the gathered stream.
        kernel: a kernel of `make_kernel`.
        options: those of each layer; None where a layer has no softmax attention.
        dtype, device: dtype and device of q, k and v.
        cp_group: ranks whose equal parts of keys and values are gathered (and gradients summed).
    """

    takes_latents = False

    def __init__(
        self,
        spans: Sequence[Span],
        kernel: AttentionKernel,
        *,
        options: Sequence[AttentionOptions | None],
        dtype: torch.dtype,
        device: torch.device,
        cp_group: dist.ProcessGroup | None = None,
    ) -> None:
        assert covers_rows(spans), spans
        self._options, self._spans = options, spans
        self._recurrence: PackedRecurrence | None = None
        self._functions = {
            each: kernel.prepare(spans, each, dtype=dtype, device=device)
            for each in dict.fromkeys(options)
            if each is not None
        }
        self._cp_group = cp_group

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [Tq, H_local, d]
        k: Tensor,  # [Tk, KVH_local, d]
        v: Tensor,  # [Tk, KVH_local, e]
        sinks: Tensor | None = None,  # [H_local]
    ) -> Tensor:  # [Tq, H_local, e]
        if self._cp_group is not None:
            # One collective for both: latency matters more than bytes here.
            parts = [k.flatten(1), v.flatten(1)]
            both = gather_sum_grad(torch.cat(parts, dim=1), self._cp_group)
            keys, values = torch.split(both, [part.shape[1] for part in parts], dim=1)
            k, v = keys.view(-1, *k.shape[1:]), values.view(-1, *v.shape[1:])
        options = self._options[layer]
        assert options is not None, f"layer {layer} has no softmax attention"
        return self._functions[options](q, k, v, sinks)

    def attend_turned(
        self,
        layer: int,
        qkv: Tensor,  # [T, H_local + 2 KVH_local, d]
        kv_heads: int,
        rope: Rope,
    ) -> Tensor | None:  # [T, H_local, d]
        """See `AttendTurned`."""
        options = self._options[layer]
        function = None if options is None else self._functions[options]
        # gathered keys are another tensor than the projection's
        is_here = self._cp_group is None and isinstance(function, VarlenAttention)
        if not is_here or not gpu.serves(qkv, rope.cos, rope.sin):
            return None
        assert isinstance(function, VarlenAttention)
        return function.projected(qkv, kv_heads, rope)

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:  # [T, HV_local, v_dim]
        """Compute a recurrent layer; rows that share a prompt continue the state at its end."""
        assert self._cp_group is None, f"layer {layer}: a state crosses no rank"
        if self._recurrence is None:
            self._recurrence = PackedRecurrence(self._spans)
        return self._recurrence.recur(inputs)


def resolve_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    needs: AttentionNeeds | None = None,
    *,
    capability: tuple[int, int] | None = None,
) -> AttentionKind:
    """Resolve `model.attention` to a kind for this device.

    Args:
        needs: what the model's layers need; None: nothing but plain attention.
        capability: the GPU's compute capability; by default the device is asked.

    Raises:
        ValueError: the name is unknown, or this device, dtype or installation cannot run the kind,
            or the kind does not compute what the model needs.
    """
    needs = AttentionNeeds() if needs is None else needs
    half = dtype in (torch.bfloat16, torch.float16)
    on_cuda = device.type == "cuda"
    if name == "auto":
        if not on_cuda:
            return "sdpa" if half else "blocked"
        if not half:
            return "sdpa"
        return _fastest(needs, _capability(device, capability))
    if name not in KINDS:
        raise ValueError(f"model.attention={name!r}: it must be auto or one of {', '.join(KINDS)}")
    if name in ("varlen", "flash") and not (on_cuda and half):
        raise ValueError(
            f"model.attention={name} needs CUDA and bfloat16 or float16, not {device.type} and "
            f"{dtype}: set it to auto"
        )
    if name == "flash" and not flash_versions():
        raise ValueError(
            "model.attention=flash needs the flash-attn package, which is not installed: "
            "install spmdrl[flash], or set it to auto"
        )
    if name == "blocked" and half:
        raise ValueError(f"model.attention=blocked computes in float32, not {dtype}: use sdpa")
    found, lacking = _kind_of(name, needs, _capability(device, capability))
    if lacking:
        raise ValueError(
            f"model.attention={name} does not compute this model's {lacking}: set it to auto, flex "
            "or sdpa"
        )
    return found


def _capability(device: torch.device, given: tuple[int, int] | None) -> tuple[int, int]:
    """Return the GPU's compute capability; (0, 0) where there is none."""
    if given is not None:
        return given
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if is_there else (0, 0)


def _kind_of(
    name: AttentionKind, needs: AttentionNeeds, capability: tuple[int, int]
) -> tuple[AttentionKind, str]:
    """Return the kind of a name, and what it does not compute of a model's needs, if anything."""
    if name == "varlen":
        wide = f"heads of more than {MOST_WIDTH} dims" if needs.width > MOST_WIDTH else ""
        return name, "sinks" if needs.sinks else "soft cap" if needs.softcap else wide
    if name != "flash":
        return name, ""
    # the newest that computes it; else what the newest lacks
    versions = sorted(flash_versions(), reverse=True)
    lacks = {version: flash_lacks(version, needs, capability) for version in versions}
    chosen = next((version for version in versions if not lacks[version]), versions[0])
    return "flash4" if chosen == 4 else "flash", lacks[chosen]


def _fastest(needs: AttentionNeeds, capability: tuple[int, int]) -> AttentionKind:
    """Return the kind that `auto` takes on a GPU in half precision."""
    names: list[AttentionKind] = ["flash", "varlen"] if flash_versions() else ["varlen"]
    for name in names:
        kind, lacking = _kind_of(name, needs, capability)
        if not lacking:
            return kind
    return "flex"


def describe_attention(kind: AttentionKind) -> str:
    """Name a resolved kind to a user."""
    names = {
        "flash": FLASH_NAMES[2],
        "flash4": f"{FLASH_NAMES[4]}, which compiles each kernel when it is first needed",
        "varlen": "torch's varlen_attn",
        "flex": "flex_attention",
        "sdpa": "scaled_dot_product_attention",
    }
    return names.get(kind, kind)


def make_kernel(kind: AttentionKind, needs: AttentionNeeds | None = None) -> AttentionKernel:
    """Make the kernel of a resolved kind.

    Args:
        needs: what the model's layers need, by which `flash4` chooses how it reads shared prompts.

    Raises:
        ValueError: a package cannot be used, see `flash_kernel`.
    """
    if kind in ("blocked", "sdpa"):
        return TiledKernel(explicit=kind == "blocked")
    if kind == "flex":
        return FlexKernel()
    if kind == "varlen":
        return varlen_kernel()
    if kind == "flash":
        return flash_kernel(2)
    block = stream_block(needs or AttentionNeeds(), _capability(torch.device("cuda"), None))
    return flash_kernel(4) if block is None else StreamKernel(block)
