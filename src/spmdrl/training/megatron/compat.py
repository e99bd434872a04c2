"""Support for megatron-core 0.16.1 without CUDA: its modules are told that "cuda" is the CPU.

Nothing is done if CUDA is available. Only names inside megatron's modules are replaced, so that
roles on the torch backend see the ordinary torch. `MODULES` says what would fail otherwise.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import nn

MODULES = {
    "pipeline_parallel.schedules": "token counters are made with device='cuda'",
    "pipeline_parallel.p2p_communication": "receive buffers; synchronize() after batched messages",
    "tensor_parallel.layers": "sequence parallelism: the gradient's reduce-scatter buffer",
    "tensor_parallel.mappings": "buffers of gathers and reduce-scatters",
    "utils": "the scratch buffer of sequence parallelism",
    "distributed.param_and_grad_buffer": "the flat parameter and gradient buffers",
    "distributed.distributed_data_parallel": "a stream, where optimizer instances are replicated",
    "optimizer.optimizer": "scale and overflow flags are made with device='cuda'",
    "transformer.moe.token_dispatcher": "counts are copied to the host on a stream of its own",
}
"""Modules whose global name `torch` is replaced, and their use of CUDA."""


def apply() -> None:
    """Replace the names in this process; calling it again changes nothing."""
    if torch.cuda.is_available():
        return
    for name in MODULES:
        vars(import_module(f"megatron.core.{name}"))["torch"] = _CPU_TORCH
    # Activation checkpointing saves and restores the CUDA generator. None exists, and with all
    # dropouts 0 nothing draws from it: an empty state takes its place.
    random = vars(import_module("megatron.core.tensor_parallel.random"))
    random["_get_cuda_rng_state"] = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random["_set_cuda_rng_state"] = lambda *_, **__: None
    # Counts of the token exchange become numpy arrays only if they come from a GPU, and
    # all_to_all_single refuses tensors.
    dispatcher = vars(import_module("megatron.core.transformer.moe.token_dispatcher"))
    dispatcher["maybe_move_tensor_to_cpu"] = _as_on_host


@contextmanager
def named_as_on_cuda(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Make `parameter.type()` return 'torch.cuda.FloatTensor' inside the `with` block.

    `DistributedOptimizer.__init__` tells dtypes apart by that name and refuses all others.
    """
    if torch.cuda.is_available():
        yield
        return
    for parameter in parameters:
        name = parameter.type().replace("torch.", "torch.cuda.", 1)
        vars(parameter)["type"] = lambda name=name: name
    yield
    for parameter in parameters:
        del vars(parameter)["type"]


def _as_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


class _Stream:
    """A stream, and an event, of a device on which all work is already done."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


class _Cuda(types.ModuleType):
    """`torch.cuda` with the host as its only device."""

    Stream = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def current_stream(device: Any = None) -> _Stream:
        return _Stream()

    @staticmethod
    def stream(stream: Any) -> AbstractContextManager[None]:
        return nullcontext()


class _CpuTorch(types.ModuleType):
    """`torch` whose factories put tensors on the host when asked to put them on "cuda"."""

    cuda = _Cuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=_on_host(device), **options)

    @staticmethod
    def tensor(data: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.tensor(data, device=_on_host(device), **options)


def _on_host(device: Any) -> Any:
    return "cpu" if device == "cuda" else device


_CPU_TORCH = _CpuTorch("torch")
