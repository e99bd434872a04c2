"""`Enclosure`: limits a library's changes to this process to the time while the library runs.

An engine in the trainer's process replaces functions of torch (on a CPU vLLM makes
`torch.set_num_threads` and `Tensor.pin_memory` do nothing), overwrites environment variables
(LOCAL_WORLD_SIZE with its own group's size), seeds the global random numbers, and sets thread count
and precision. Each would change the trainer's results, or the values that the next library reads.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch

from spmdrl.rollout.vllm_requests import ENVIRONMENT


class Enclosure:
    """Undoes the changes that `package` makes inside `entered`, when that block is left.

    Its own functions and classes in torch's modules, and environment variables, return at the next
    `entered`. Python's, numpy's and torch's random numbers, torch's thread count and matmul
    precision, and objects hidden from the garbage collector are only reset.

    Args:
        package: the library's top-level name.
        environment: variables to set inside; None removes one.
    """

    def __init__(self, package: str, environment: Mapping[str, str | None]) -> None:
        self._package = package
        self._patches: dict[int, dict[str, object]] = {}
        self._environment = dict(environment)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Apply the library's changes for the time of the `with` block."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)  # about its code, not this project's
            stack.enter_context(self._process_values())
            stack.enter_context(self._variables())
            for number, space in enumerate(_spaces()):
                stack.enter_context(self._patched(number, space))
            yield

    @contextmanager
    def _patched(self, number: int, space: Any) -> Iterator[None]:
        before = dict(vars(space))
        for name, value in self._patches.get(number, {}).items():
            setattr(space, name, value)
        try:
            yield
        finally:
            found = {n: v for n, v in vars(space).items() if _is_of(v, self._package)}
            self._patches[number] = found
            for name in found:
                if name in before:
                    setattr(space, name, before[name])
                else:
                    delattr(space, name)

    @contextmanager
    def _variables(self) -> Iterator[None]:
        before = dict(os.environ)
        _change(self._environment)
        try:
            yield
        finally:
            inside = dict(os.environ)
            changed = {name for name, _ in before.items() ^ inside.items()}
            self._environment = {name: inside.get(name) for name in changed}
            _change({name: before.get(name) for name in changed})

    @contextmanager
    def _process_values(self) -> Iterator[None]:
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        set_threads = torch.set_num_threads  # the library may replace it
        python, legacy = random.getstate(), np.random.get_state()
        on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = [torch.cuda.current_device()] if on_cuda else []
        with torch.random.fork_rng(devices=cuda):
            try:
                yield
            finally:
                set_threads(threads)
                torch.set_float32_matmul_precision(precision)
                random.setstate(python)
                np.random.set_state(legacy)
                gc.unfreeze()


@contextmanager
def replaced(space: Any, name: str, value: object) -> Iterator[None]:
    """Replace the value of a module's or a class's `name` for the time of the `with` block.

    Raises:
        ValueError: it has no such name.
    """
    if name not in vars(space):
        raise ValueError(f"{space!r} has no {name!r}: is it of a version that is not supported?")
    before = vars(space)[name]
    setattr(space, name, value)
    try:
        yield
    finally:
        setattr(space, name, before)


@contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """Disable torch.compile on a CPU, where the first log-probabilities would wait 30 s for it."""
    if device.type != "cpu":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _spaces() -> tuple[Any, ...]:
    return (torch, torch.cuda, torch.accelerator, torch.Tensor)


def _is_of(value: object, package: str) -> bool:
    if not isinstance(value, FunctionType | type):
        return False
    return value.__module__.partition(".")[0] == package


def _change(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def vllm_enclosure() -> Enclosure:
    """Return vLLM's, with the variables that it runs under here; it logs errors alone."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # it warns before it has read the variable
    return Enclosure("vllm", {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": level})
