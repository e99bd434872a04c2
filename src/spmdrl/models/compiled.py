"""`CompiledPieces`: what a decoder layer computes before and after attention, by torch's compiler.

Attention and experts stay outside: their shapes and their kernels differ from microbatch to
microbatch. What lies between them is two graphs of a layer, without a break. A graph has no number
of a layer and no number of tokens in it, so that one serves all layers of a kind and all
microbatches, as where torchtitan (https://github.com/pytorch/torchtitan) compiles block by block.
"""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from spmdrl.models.blocks.dense_mlp import Mlp
from spmdrl.models.blocks.projections import Norm
from spmdrl.models.blocks.softmax_attention import Attention, Heads
from spmdrl.models.fused import add
from spmdrl.models.low_rank import Added
from spmdrl.models.rope import Rope
from spmdrl.models.specs import LayerSpec, SoftmaxAttention

COMPILER = "inductor"
"""Name of what makes code of a graph, see `torch.compile`."""

COMPILERS = {"C": ("gcc", "clang"), "C++": ("g++",)}
"""Compilers that torch's looks for on the path, by language."""

MOST_COMPILED = 64
"""Most graphs of one function: those of a model with several kinds of layers are some ten."""


def enter(
    spec: LayerSpec,
    norm: Norm | None,
    attention: Attention,
    x: Tensor,  # [T, D]
    out: Tensor | None,  # [T, D]
    rope: Rope | None,
    to_qkv: Added,
) -> tuple[Tensor, Heads]:
    """Compute the residual stream [T, D] with what the layer before has to add, and the heads."""
    if out is not None:
        x = add(x, out, spec.residual_scale)
    return x, attention.opened(normed(norm, x), rope, to_qkv)


def leave(
    spec: LayerSpec,
    norms: tuple[Norm | None, Norm | None],
    attention: Attention,
    x: Tensor,  # [T, D]
    attended: Tensor,  # [T, H_local, d]
    gate: Tensor | None,
    to_out: Added,
) -> tuple[Tensor, Tensor]:  # [T, D] each
    """Compute the residual stream after attention, and what the MLP is given.

    Args:
        norms: that of attention's output, and that before the MLP.
    """
    out = normed(norms[0], attention.closed(attended, gate, to_out))
    x = add(x, out, spec.residual_scale)
    return x, normed(norms[1], x)


def finish(
    spec: LayerSpec,
    norms: tuple[Norm | None, Norm | None, Norm | None],
    attention: Attention,
    x: Tensor,  # [T, D]
    attended: Tensor,  # [T, H_local, d]
    gate: Tensor | None,
    mlp: Mlp,
    added: tuple[Added, Added, Added],
) -> tuple[Tensor, Tensor]:  # [T, D] each
    """Compute the residual stream after attention, and what a dense MLP adds to it.

    Args:
        norms: those of `leave`, and that of the MLP's output.
        added: the additions to attention's output, to gate and up, and to down.
    """
    x, given = leave(spec, norms[:2], attention, x, attended, gate, added[0])
    return x, normed(norms[2], mlp.of(given, added[1], added[2]))


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """Return the norm of x; x itself, where there is none."""
    return x if norm is None else cast(Tensor, norm(x))


def is_compiled(spec: LayerSpec) -> bool:
    """Whether a layer of this kind can be compiled."""
    return isinstance(spec.mixer, SoftmaxAttention)


def check_compiler(device: torch.device) -> None:
    """Refuse `train.compile=blocks` where nothing makes code for the device.

    Raises:
        ValueError: torch is too old, or a compiler is missing; the key and the fix are named.
    """
    key = "train.compile=blocks"
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise ValueError(
            f"{key} needs torch 2.13, not {torch.__version__}: install it, or set the key to none"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(
            f"{key} needs Triton on a GPU, which is not installed: install triton, or set the key "
            "to none"
        )
    # Triton's launchers are C, Inductor's code for CPUs is C++
    name, language = ("CC", "C") if device.type == "cuda" else ("CXX", "C++")
    known = [*filter(None, [os.environ.get(name)]), *COMPILERS[language]]
    if not any(shutil.which(shlex.split(each)[0]) for each in known):
        raise ValueError(
            f"{key} needs a {language} compiler, and there is none of {', '.join(known)}: install "
            f"g++, or name one in the environment variable {name}, or set the key to none"
        )


class CompiledPieces:
    """The compiled functions of one decoder, which its layers share."""

    def __init__(self) -> None:
        given: dict[str, Any] = {
            "backend": COMPILER,
            "fullgraph": True,  # a break is an error
            "dynamic": True,
            "isolate_recompiles": True,  # other roles' models have graphs of their own
            "recompile_limit": MOST_COMPILED,
        }
        self.enter = torch.compile(enter, **given)
        self.leave = torch.compile(leave, **given)
        self.finish = torch.compile(finish, **given)
