"""The global random generators of a rank, as tensors.

The project itself never draws from them (its draws are keyed), but users' code may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREFIX = "rng/"


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's generators, by name."""
    _, words, gauss = random.getstate()
    found: dict[str, Any] = np.random.get_state(legacy=False)
    keys, position = found["state"]["key"], found["state"]["pos"]
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, found["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([found["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {PREFIX + key: value for key, value in state.items()}


def restore_rng(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators to what `rng_state` returned."""
    state = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
