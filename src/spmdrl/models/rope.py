"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), and `RopeConfig`:
what config.json says of it, and its frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmdrl.models.fields import Fields
from spmdrl.models.kernels.cpu import rows_for


def rope_tables(
    positions: Tensor,  # [T] int64
    frequencies: Tensor,  # [d / 2] float32, of `inverse_frequencies`
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for `rotate`, each [T, 1, d] float32, times `factor`."""
    angles = positions[:, None, None].float() * frequencies  # [T, 1, d / 2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Tensor,  # [T, H, d]
    cos: Tensor,  # [T, 1, d]
    sin: Tensor,  # [T, 1, d], the first half negated
) -> Tensor:
    """Apply rotary embedding (Su et al. 2021) to all heads, pairing dim i with i + d / 2.

    The result is x cos + swap(x) sin, in float32; `sin` holds the sign of the half-rotation.
    """
    if rows := rows_for(x, cos, sin):
        return rows.rotate(x, cos, sin)
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields after `factor` are for `llama3` or `yarn` only."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def parse_rope(fields: Fields, max_position: int) -> RopeConfig:
    """Parse config.json's `rope_scaling`, or, if that is empty, `rope_parameters`.

    If a key is given twice, the choice is that of `transformers` (`convert_rope_params_to_dict`,
    `standardize_rope_params`): `rope_scaling` before `rope_parameters`, `rope_theta` inside before
    outside, `original_max_position_embeddings` outside before inside.

    Raises:
        ValueError: the kind of rope is not supported, a key that it needs is missing, or a value
            is not valid.
    """
    name = "rope_scaling" if fields.section("rope_scaling") else "rope_parameters"
    values = fields.section(name)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{fields.origin}: rope type {kind!r} is not supported; supported are "
            f"{', '.join(ROPE_TYPES)}"
        )
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{fields.origin}: {name}.{nested[0]} is an object: rope of several kinds is not "
            "supported"
        )
    given = Fields(
        values=values,
        origin=f"{fields.origin}: {name}",
        defaults={"rope_theta": fields.value("rope_theta")},
    )
    _refuse_partial(fields, given)
    theta = given.number("rope_theta", above=0.0)
    if kind == "default":
        return RopeConfig(theta=theta, original_max_position=max_position)
    if kind == "linear":
        factor = given.number("factor", above=0.0)
        return RopeConfig(theta=theta, kind=kind, factor=factor, original_max_position=max_position)
    outside = fields if "original_max_position_embeddings" in fields else given
    original = max_position
    if "original_max_position_embeddings" in outside:
        original = outside.integer("original_max_position_embeddings")
    if kind == "llama3":
        return _llama3(given, theta, original)
    return _yarn(given, theta, original, max_position)


def _refuse_partial(fields: Fields, given: Fields) -> None:
    for where in (given, fields):
        if "partial_rotary_factor" in where and not where.is_null("partial_rotary_factor"):
            partial = where.number("partial_rotary_factor")
            if partial != 1.0:
                raise ValueError(
                    f"{where.origin}: partial_rotary_factor={partial} is not supported (only 1.0)"
                )


def _llama3(given: Fields, theta: float, original: int) -> RopeConfig:
    low = given.number("low_freq_factor", above=0.0)
    high = given.number("high_freq_factor", above=0.0)
    if low == high:
        raise given.wrong("high_freq_factor", "another number than low_freq_factor")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=given.number("factor", above=0.0),
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(given: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    if theta == 1.0:
        raise given.wrong("rope_theta", "another number than 1 for yarn")
    # the key must exist, though it may be null
    is_null = given.is_null("factor")
    factor = max_position / original if is_null else given.number("factor", above=0.0)

    def beta(key: str, default: float) -> float:
        return given.number(key, least=0.0) or default if given.values.get(key) else default

    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=beta("beta_fast", 32.0),
        beta_slow=beta("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(given, factor),
        truncate=given.flag("truncate") if "truncate" in given else True,
    )


def _yarn_attention_factor(given: Fields, factor: float) -> float:
    """Compute the factor of cos and sin: YaRN's equation 22, 0.1 ln(s) + 1."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    values: Mapping[str, Any] = given.values
    if values.get("attention_factor") is not None:
        return given.number("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        below = scale(given.number("mscale_all_dim"))
        if below == 0:
            raise given.wrong("mscale_all_dim", "a number that does not scale to 0")
        return scale(given.number("mscale")) / below
    return scale(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    """Compute the head_dim / 2 angular frequencies, in radians per position.

    `llama3` is Llama 3.1's rule (by wavelength), `yarn` is Peng et al. 2023
    (https://arxiv.org/abs/2309.00071), section 3.2.
    """
    plain = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    if rope.kind == "llama3":
        return [_llama3_frequency(f, rope) for f in plain]
    if rope.kind == "yarn":
        low, high = _yarn_range(rope, head_dim)
        ramps = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(head_dim // 2)]
        return [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramps, strict=True)]
    return plain


def _llama3_frequency(frequency: float, rope: RopeConfig) -> float:
    turns = rope.original_max_position * frequency / (2 * math.pi)
    if turns > rope.high_freq_factor:
        return frequency
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Compute the first and last dim of YaRN's ramp between extrapolation and interpolation."""

    def dimension(turns: float) -> float:
        length = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Equal ends would divide by zero; the reference implementation adds the same gap.
    return low, high + 0.001 if low == high else high
