"""PEFT directories written atomically, for causal language models and scalar heads."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmdrl.atomic_files import atomic_directory
from spmdrl.models.adapters import (
    Adapter,
    adapter_shapes,
    is_expert_target,
    part_name,
    possible_targets,
)
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.export import cast, checked, copy_tokenizer, write_json
from spmdrl.models.files.padding import set_padding
from spmdrl.models.files.peft import peft_name
from spmdrl.models.files.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spmdrl.models.files.safetensors_writer import write_shards
from spmdrl.models.sharding import SCORE, Head, global_shapes

_WEIGHT = ".weight"


def write_adapter(
    tensors: Iterable[tuple[str, Tensor]],
    model: ModelConfig,
    adapter: Adapter,
    directory: str | Path,
    *,
    base: str | Path,
    head: Head = "lm",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a directory that PEFT loads onto the base; no tensor is kept once the next has arrived.

    The tokenizer of the base is copied. With a scalar head the directory is one of sequence
    classification with one label, and the padding token is one with which no row ends. An A and B
    that all experts of a layer share are written once for each expert: PEFT has no other form.

    Args:
        tensors: A and B of every target, and the scalar head, once each, by our names.
        base: directory of the base, which the configuration names.
        head: `score` if a scalar head belongs to the adapter.
        dtype: dtype of the values in the file; None keeps that of `tensors`.

    Raises:
        OSError: a file could not be written; an older `directory` is then unchanged.
        ValueError: a tensor is missing, unknown, given twice, or of another shape, or has values
            that `dtype` cannot hold.
    """
    shapes = dict(adapter_shapes(model, replace(adapter, shares_experts=False)))
    if head == "score":
        shapes[SCORE] = (1, model.hidden_size)
    named = {peft_name(name): shape for name, shape in shapes.items()}
    with atomic_directory(directory) as fresh:
        every = checked(_copied(tensors, adapter), shapes)
        write_shards(_named(every, dtype), named, fresh, sys.maxsize)
        (fresh / "0.part").rename(fresh / ADAPTER_WEIGHTS)
        write_json(fresh / ADAPTER_CONFIG, describe(model, adapter, base=base, head=head))
        copy_tokenizer(Path(base), fresh)
        if head == "score":
            set_padding(fresh, model, model.eos_ids)


def _copied(
    tensors: Iterable[tuple[str, Tensor]], adapter: Adapter
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor by its names in files."""
    copies = adapter.copies
    for name, tensor in tensors:
        for in_files in copies.get(name, [name]):
            yield in_files, tensor


def _named(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield peft_name(name), cast(name, tensor, dtype)


def describe(
    model: ModelConfig, adapter: Adapter, *, base: str | Path, head: Head = "lm"
) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    ranks = {name: own.rank for name, own in adapter.targets.items()}
    alphas, is_rslora = _alphas(adapter)
    # PEFT stacks experts as it loads them, with twice the usual rank and alpha for gate and up
    experts = [name for name in ranks if is_expert_target(name)]
    usual = [name for name in experts if not _is_down(name)] or experts or list(ranks)
    rank = _most_common(ranks[name] for name in usual)
    alpha = _most_common(alphas[name] for name in usual)
    is_scalar = head == "score"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": is_rslora,
        "rank_pattern": _others(ranks, rank),
        "alpha_pattern": _others(alphas, alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": _target_modules(model, adapter),
        "modules_to_save": ["score"] if is_scalar else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _alphas(adapter: Adapter) -> tuple[dict[str, float], bool]:
    """Return each target's alpha, and whether its scale is alpha over the rank's root.

    Whichever gives whole numbers is chosen; otherwise, and for experts, scale is alpha over rank.
    """
    has_experts = any(map(is_expert_target, adapter.targets))
    for is_rslora in (False,) if has_experts else (False, True):
        found = {
            name: _alpha(own.scale, math.sqrt(own.rank) if is_rslora else own.rank)
            for name, own in adapter.targets.items()
        }
        if all(isinstance(alpha, int) for alpha in found.values()):
            return found, is_rslora
    return {name: _alpha(own.scale, own.rank) for name, own in adapter.targets.items()}, False


def _alpha(scale: float, divisor: float) -> float:
    """Return the alpha with alpha / divisor = scale, whole if there is a whole one."""
    near = scale * divisor
    if round(near) / divisor == scale:
        return round(near)
    around = (near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((alpha for alpha in around if alpha / divisor == scale), near)


def _most_common(values: Iterable[float]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _is_down(name: str) -> bool:
    """Whether an expert's weight is its second matrix."""
    return part_name(name) in ("down_proj", "w2")


def _others(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Map the modules with another value than the usual one to theirs, as PEFT's patterns do."""
    others = {name.removesuffix(_WEIGHT): value for name, value in values.items() if value != usual}
    down = [name for name in values if is_expert_target(name) and _is_down(name)]
    value, *unlike = {values[name] for name in down} or {usual}
    if value != usual and not unlike:
        # one pattern for all experts, which also matches their stacked parameter
        for name in down:
            del others[name.removesuffix(_WEIGHT)]
        others[rf"experts\.(\d+\.{part_name(down[0])}|down_proj)"] = value
    return others


def _target_modules(model: ModelConfig, adapter: Adapter) -> list[str]:
    """Name the targets by the last parts of their modules if these select no other module."""
    short = {part_name(name) for name in adapter.targets}
    known = {*possible_targets(model), *global_shapes(model)}
    alike = {name for name in known if name.endswith(_WEIGHT) and part_name(name) in short}
    if alike == adapter.targets.keys():
        return sorted(short)
    return [name.removesuffix(_WEIGHT) for name in adapter.targets]
