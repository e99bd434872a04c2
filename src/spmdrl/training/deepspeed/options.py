"""Options of the DeepSpeed backend, and requirements that are checked without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Head, buffer_names
from spmdrl.models.zero_layout import Stage

SUPPORTED = "0.19.8"
"""The only version that is supported and tested, since the backend reads private names."""

Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True, kw_only=True)
class DeepspeedOptions:
    """Args:
    stage: what ZeRO divides: the optimizer's state (1), gradients too (2), weights too (3).
    offload: what DeepSpeed keeps on the host: nothing, the optimizer's state, or (stage 3) the
        weights as well.
    config: path of a user's own DeepSpeed JSON, or None.
    """

    stage: Stage = 2
    offload: Offload = "none"
    config: str | None = None


def check_installed(role: str) -> None:
    """Raise ValueError unless the supported deepspeed is installed."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = None
    if found == SUPPORTED:
        return
    state = "is not installed" if found is None else f"is installed as {found}"
    raise ValueError(
        f"roles.{role}: train.backend=deepspeed needs deepspeed {SUPPORTED}, which {state}: "
        "install spmdrl[deepspeed], or set train.backend=torch"
    )


def check_role(
    role: str,
    degrees: Mapping[str, int],
    options: DeepspeedOptions,
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    trainable: bool,
    head: Head,
    adapter: Adapter | None,
    borrows: bool,
) -> None:
    """Refuse what this backend does not do with a role.

    Args:
        dtype: dtype that the role computes in.
        trainable: whether the role trains.
        borrows: whether it shares another role's base.

    Raises:
        ValueError: a key of the role asks for it; key and fix are named.
    """
    key, other = f"roles.{role}", f"roles.{role}.train.backend=torch"
    stage = f"train.deepspeed.stage={options.stage}"
    for axis in ("pp", "ep"):
        if degrees.get(axis, 1) > 1:
            raise ValueError(
                f"{key}.{axis}={degrees[axis]}: train.backend=deepspeed has no {axis}: set it to "
                f"1, or {other}"
            )
    tp = degrees.get("tp", 1)
    if tp > 1 and adapter is not None and trainable:
        raise ValueError(
            f"{key}.tp={tp} with an adapter: train.backend=deepspeed does not sum the shares of "
            f"its gradients over tp: set it to 1, or {other}"
        )
    if options.offload == "all" and options.stage < 3:
        raise ValueError(
            f"{key}: train.deepspeed.offload=all needs stage 3, and {stage}: set offload=optimizer"
        )
    if options.stage < 3:
        return
    lower = f"set train.deepspeed.stage=2, or {other}"
    if borrows and (trainable or adapter is not None or head == "score"):
        raise ValueError(
            f"{key}.base: {stage} has one engine for a base that roles share, so another role can "
            f"only read it as it is: {lower}"
        )
    if buffer_names(model) and dtype != torch.float32:
        raise ValueError(
            f"{key}: {stage} would round the float32 buffers of {model.architecture}: {lower}"
        )
