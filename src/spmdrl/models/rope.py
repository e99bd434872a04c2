"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), and `RopeConfig`:
what config.json says of it, and its frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spmdrl.models.fields import Fields
from spmdrl.models.kernels import gpu
from spmdrl.models.kernels.cpu import rows_for


def rope_tables(
    positions: Tensor,  # [T] int64
    frequencies: Tensor,  # [r / 2] float32, of `inverse_frequencies`
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for `rotate`, each [T, 1, r] float32, times `factor`."""
    angles = positions[:, None, None].float() * frequencies  # [T, 1, r / 2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Tensor,  # [T, H, d]
    cos: Tensor,  # [T, 1, r]
    sin: Tensor,  # [T, 1, r], the first half negated
    interleaved: bool = False,
) -> Tensor:  # [T, H, d]
    """Apply rotary embedding (Su et al. 2021) to the first r dims of all heads; the rest passes.

    Dim i is paired with i + r / 2, or, `interleaved`, dim 2 i with 2 i + 1, and the result holds
    all first dims of the pairs before all second ones: the same permutation of queries and keys,
    which their products do not see.

    The result is x cos + swap(x) sin, in float32; `sin` holds the sign of the half-rotation.
    """
    if rows := rows_for(x, cos, sin):
        return rows.rotate(x, cos, sin, interleaved)
    turned = cos.shape[-1]
    if gpu.serves(x, cos, sin) and turned % 2 == 0:
        return gpu.rotate(x, cos, sin, interleaved)
    part = x if turned == x.shape[-1] else x[..., :turned]
    if interleaved:
        part = part.reshape(*part.shape[:-1], turned // 2, 2).transpose(-1, -2).flatten(-2)
    swapped = part.roll(turned // 2, -1)
    out = torch.addcmul(part * cos, swapped, sin).to(x.dtype)
    return out if turned == x.shape[-1] else torch.cat((out, x[..., turned:]), dim=-1)


ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    Args:
        kind: one of `ROPE_TYPES`.
        original_max_position: positions of the training before the context was extended; where
            the kind extends nothing, the model's most positions.
        low_freq_factor, high_freq_factor: only for `llama3`.
        beta_fast, beta_slow, truncate: only for `yarn`.
        attention_factor: factor of cos and sin.
        partial: the part of a head's dims that is turned: the first int(d partial).
        interleaved: whether neighbouring dims are paired, see `rotate`.
        factors: divisor of each frequency within the original length, for `longrope` only.
    """

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
    partial: float = 1.0
    interleaved: bool = False
    factors: tuple[float, ...] = ()

    def dims(self, head_dim: int) -> int:
        """Return the number of a head's dims that are turned."""
        return int(head_dim * self.partial)

    @property
    def limit(self) -> int | None:
        """Positions beyond which the frequencies would depend on a sequence's length; None: they
        never do.

        A token's key would change when the sequence grows, so that nothing cached or packed stays
        true: a longer sequence must be refused.
        """
        return self.original_max_position if self.kind in ("dynamic", "longrope") else None

    def describe_limit(self) -> str:
        """Name the key and the fix in a message about a sequence that is longer than `limit`."""
        original = "original_" if self.kind == "longrope" else ""
        return (
            f"rope_type {self.kind!r} in its config.json changes the positions of sequences longer "
            f"than {original}max_position_embeddings={self.limit}, which is not supported: lower "
            "the tokens of prompt or response"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rope:
    """The rotary embedding of the tokens of one pass.

    Args:
        cos, sin, interleaved: see `rotate`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def turn(self, x: Tensor) -> Tensor:  # [T, H, d]
        """Compute `rotate`."""
        return rotate(x, self.cos, self.sin, self.interleaved)


def make_rope(
    positions: Tensor,  # [T] int64
    frequencies: Tensor,  # of `inverse_frequencies`
    rope: RopeConfig,
) -> Rope:
    """Make the tables of one kind of rope."""
    cos, sin = rope_tables(positions, frequencies, rope.attention_factor)
    return Rope(cos=cos, sin=sin, interleaved=rope.interleaved)


def rope_parameters(
    fields: Fields, kinds: Sequence[str | None] = (None,)
) -> dict[str | None, Fields | None]:
    """Collect the rope parameters of each kind of layer; None for a kind without positions.

    They come from `rope_scaling`, or, if that is empty, from `rope_parameters`, which may hold an
    object for each of `kinds` (config.json's `layer_types`). If a key is given twice, the choice is
    that of `transformers` (`convert_rope_params_to_dict`, `standardize_rope_params`): `rope_theta`
    and `partial_rotary_factor` inside before outside, `original_max_position_embeddings` outside
    before inside unless there are several kinds.

    Args:
        fields: config.json, or its values as `transformers` resolves them.
        kinds: kinds of layers; (None,) for one rope.

    Raises:
        ValueError: the parameters are no object, or lack one of the kinds.
    """
    name = "rope_parameters"
    if fields.knows("rope_scaling") and fields.section("rope_scaling"):
        name = "rope_scaling"
    values = fields.section(name) if fields.knows(name) else {}
    outside = ("rope_theta", "partial_rotary_factor")
    defaults = {key: fields.value(key) for key in outside if fields.knows(key)}
    if not any(kind in values for kind in kinds):
        original = "original_max_position_embeddings"
        if original in fields and _kind(values) in ("llama3", "yarn", "longrope"):
            values = {**values, original: fields.integer(original)}
        flat = Fields(values=values, origin=f"{fields.origin}: {name}", defaults=defaults)
        return dict.fromkeys(kinds, flat)
    nested = Fields(values=values, origin=f"{fields.origin}: {name}")
    found: dict[str | None, Fields | None] = {}
    for kind in kinds:
        key = str(kind)
        one = Fields(values=nested.section(key), origin=f"{nested.origin}.{key}", defaults=defaults)
        found[kind] = None if nested.is_null(key) else one
    return found


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type", values.get("type", "default"))


def parse_rope(
    given: Fields,
    *,
    max_position: int,
    head_dim: int,
    partial: bool = False,
    interleaved: bool = False,
) -> RopeConfig:
    """Parse one of the values of `rope_parameters`.

    Args:
        max_position: config.json's `max_position_embeddings`.
        head_dim: dims of a head that rope gets, turned or not.
        partial: whether the family reads `partial_rotary_factor`.
        interleaved: whether the family pairs neighbouring dims.

    Raises:
        ValueError: the kind of rope is not supported, a key that it needs is missing, or a value
            is not valid.
    """
    kind = _kind(given.values)
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{given.origin}: rope type {kind!r} is not supported; supported are "
            f"{', '.join(ROPE_TYPES)}"
        )
    nested = [key for key, value in given.values.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{given.origin}.{nested[0]} is an object: rope of several kinds is not supported for "
            "this architecture"
        )
    plain = RopeConfig(
        theta=given.number("rope_theta", above=0.0),
        kind=kind,
        original_max_position=max_position,
        partial=_partial(given, partial, head_dim),
        interleaved=interleaved,
    )
    if kind == "default":
        return plain
    if kind in ("linear", "dynamic"):
        return replace(plain, factor=given.number("factor", above=0.0))
    if "original_max_position_embeddings" in given:
        original = given.integer("original_max_position_embeddings")
        plain = replace(plain, original_max_position=original)
    if kind == "llama3":
        return _llama3(given, plain)
    if kind == "longrope":
        return _longrope(given, plain, max_position, head_dim)
    return _yarn(given, plain, max_position)


def _partial(given: Fields, reads: bool, head_dim: int) -> float:
    key = "partial_rotary_factor"
    if not given.knows(key) or given.is_null(key):
        return 1.0
    partial = given.number(key, above=0.0)
    if partial == 1.0:
        return partial
    if not reads:
        raise ValueError(
            f"{given.origin}: {key}={partial} is not supported for this architecture (only 1.0)"
        )
    if partial > 1 or int(head_dim * partial) < 2:
        raise given.wrong(key, f"at most 1 and give at least 2 of a head's {head_dim} dims")
    return partial


def _llama3(given: Fields, plain: RopeConfig) -> RopeConfig:
    low = given.number("low_freq_factor", above=0.0)
    high = given.number("high_freq_factor", above=0.0)
    if low == high:
        raise given.wrong("high_freq_factor", "another number than low_freq_factor")
    factor = given.number("factor", above=0.0)
    return replace(plain, factor=factor, low_freq_factor=low, high_freq_factor=high)


def _longrope(given: Fields, plain: RopeConfig, max_position: int, head_dim: int) -> RopeConfig:
    """Read LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753) for sequences within the
    original length; `long_factor` counts for longer ones only, which `RopeConfig.limit` excludes.
    """
    original, key = plain.original_max_position, "short_factor"
    count = (plain.dims(head_dim) + 1) // 2
    factors = given.numbers(key, above=0.0)
    if len(factors) != count:
        raise ValueError(
            f"{given.origin}: {key} has {len(factors)} numbers, but a head has {count} frequencies"
        )
    if given.knows("factor") and not given.is_null("factor"):
        factor = given.number("factor", above=0.0)
    else:
        factor = max_position / original
    if given.values.get("attention_factor") is not None:
        scale = given.number("attention_factor")
    elif factor <= 1:
        scale = 1.0
    elif original == 1:
        raise given.wrong("original_max_position_embeddings", "above 1")
    else:
        scale = math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(plain, factor=factor, factors=factors, attention_factor=scale)


def _yarn(given: Fields, plain: RopeConfig, max_position: int) -> RopeConfig:
    if plain.theta == 1.0:
        raise given.wrong("rope_theta", "another number than 1 for yarn")
    # the key must exist, though it may be null
    is_null = given.is_null("factor")
    factor = max_position / plain.original_max_position
    factor = factor if is_null else given.number("factor", above=0.0)

    def beta(key: str, default: float) -> float:
        return given.number(key, least=0.0) or default if given.values.get(key) else default

    return replace(
        plain,
        factor=factor,
        beta_fast=beta("beta_fast", 32.0),
        beta_slow=beta("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(given, factor),
        truncate=given.flag("truncate") if "truncate" in given else True,
    )


def _yarn_attention_factor(given: Fields, factor: float) -> float:
    """Compute the factor of cos and sin: YaRN's equation 22, 0.1 ln(s) + 1."""
    values: Mapping[str, Any] = given.values
    if values.get("attention_factor") is not None:
        return given.number("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        below = _mscale(factor, given.number("mscale_all_dim"))
        if below == 0:
            raise given.wrong("mscale_all_dim", "a number that does not scale to 0")
        return _mscale(factor, given.number("mscale")) / below
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_factor(given: Fields) -> float:
    """Compute the factor of latent attention's scores that a rope with `mscale_all_dim` brings
    (DeepSeek-V3's `yarn_get_mscale`, squared, for queries and keys).

    Args:
        given: one of the values of `rope_parameters`.
    """
    if _kind(given.values) == "default" or not given.values.get("mscale_all_dim"):
        return 1.0
    return _mscale(given.number("factor"), given.number("mscale_all_dim")) ** 2


def tiny_rope(source: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Fit LongRoPE's lists in a config.json to heads of `head_dim`: the changes of `source`."""
    changed: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        section = source.get(name)
        if isinstance(section, dict) and _kind(section) == "longrope":
            key = "partial_rotary_factor"
            partial = section.get(key, source.get(key))
            count = (int(head_dim * (1.0 if partial is None else partial)) + 1) // 2
            lists = {key: section[key] for key in ("short_factor", "long_factor") if key in section}
            fitted = {
                key: [factors[min(i, len(factors) - 1)] for i in range(count)]
                for key, factors in lists.items()
            }
            changed[name] = {**section, **fitted}
    return changed


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    """Compute the r / 2 angular frequencies of the r dims that are turned, in radians per position.

    `llama3` is Llama 3.1's rule (by wavelength), `yarn` is Peng et al. 2023
    (https://arxiv.org/abs/2309.00071), section 3.2.
    """
    dims = rope.dims(head_dim)
    plain = [rope.theta ** (-2 * i / dims) for i in range((dims + 1) // 2)]
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    if rope.kind == "llama3":
        return [_llama3_frequency(f, rope) for f in plain]
    if rope.kind == "longrope":
        return [f / factor for f, factor in zip(plain, rope.factors, strict=True)]
    if rope.kind == "yarn":
        low, high = _yarn_range(rope, dims)
        ramps = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
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


def _yarn_range(rope: RopeConfig, dims: int) -> tuple[float, float]:
    """Compute the first and last dim of YaRN's ramp between extrapolation and interpolation."""

    def dimension(turns: float) -> float:
        length = rope.original_max_position / (turns * 2 * math.pi)
        return dims * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    # Equal ends would divide by zero; the reference implementation adds the same gap.
    return low, high + 0.001 if low == high else high
