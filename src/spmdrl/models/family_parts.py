"""Readings of config.json that several families share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spmdrl.models.fields import Fields
from spmdrl.models.rope import RopeConfig, parse_rope, rope_parameters
from spmdrl.models.specs import (
    AttentionOptions,
    DenseMlp,
    GatedDelta,
    LayerSpec,
    MoeMlp,
    NormSpec,
    SharedExperts,
    SoftmaxAttention,
)

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

SHARED_EXPERT_NAMES = {
    f"mlp.shared.{part}": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")
}
"""Names in files of a layer's only shared expert."""

TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
TINY_DELTA = {
    "layer_types": [LINEAR, FULL],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Keys that make a model tiny: of experts, of experts in every layer, of gated DeltaNet."""


def heads_of(fields: Fields) -> tuple[int, int, int]:
    """Read the numbers of query heads and key-value heads, and a head's dims.

    Raises:
        ValueError: they do not divide each other, or a head has an odd number of dims.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = heads
    if not fields.is_null("num_key_value_heads"):
        kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        absent = "" if "num_key_value_heads" in fields else ", the default of this model type"
        raise ValueError(
            f"{fields.origin}: num_attention_heads={heads} is no multiple of "
            f"num_key_value_heads={kv_heads}{absent}"
        )
    is_given = fields.knows("head_dim") and not fields.is_null("head_dim")
    head_dim = fields.integer("head_dim") if is_given else hidden // heads
    if head_dim % 2 or head_dim == 0:
        raise ValueError(
            f"{fields.origin}: head_dim={head_dim} (hidden_size={hidden}, "
            f"num_attention_heads={heads}) is not even: rotary embedding turns pairs"
        )
    return heads, kv_heads, head_dim


def rope_of(fields: Fields, *, partial: bool = False, interleaved: bool = False) -> RopeConfig:
    """Read the rope of a model whose layers have one kind.

    Args:
        partial: whether the family reads `partial_rotary_factor`.
        interleaved: whether the family pairs neighbouring dims.
    """
    [rope] = ropes_of(fields, None, partial=partial, interleaved=interleaved).values()
    assert rope is not None, "a rope for all layers is an object"
    return rope


def ropes_of(
    fields: Fields, *kinds: str | None, partial: bool = False, interleaved: bool = False
) -> dict[str | None, RopeConfig | None]:
    """Read the rope of each kind of layer, see `rope.rope_parameters`."""
    most, (_, _, head_dim) = fields.integer("max_position_embeddings"), heads_of(fields)
    how: dict[str, Any] = {"partial": partial, "interleaved": interleaved}
    return {
        kind: None
        if given is None
        else parse_rope(given, max_position=most, head_dim=head_dim, **how)
        for kind, given in rope_parameters(fields, kinds).items()
    }


def layer_kinds(fields: Fields, *known: str) -> tuple[str, ...]:
    """Read the kind of each layer's mixer, `layer_types`.

    Raises:
        ValueError: there is not one for each layer, or one is not among `known`.
    """
    kinds, count = fields.value("layer_types"), fields.integer("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != count:
        raise fields.wrong("layer_types", f"a list with one text for each of {count} layers")
    strange = [kind for kind in kinds if kind not in known]
    if strange:
        raise ValueError(f"{fields.origin}: layer_types has {strange[0]!r}, which is not supported")
    return tuple(kinds)


def plain_attention(
    fields: Fields,
    rope: RopeConfig | None,
    *,
    window: int | None = None,
    bias: bool | None = None,
) -> SoftmaxAttention:
    """Read grouped-query attention as most families have it.

    Args:
        bias: whether q, k, v and the output have biases; None: as `attention_bias` says.
    """
    heads, kv_heads, head_dim = heads_of(fields)
    has_bias = fields.flag("attention_bias") if bias is None else bias
    return SoftmaxAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        options=AttentionOptions(scale=head_dim**-0.5, window=window),
        qkv_bias=has_bias,
        out_bias=has_bias,
    )


def delta_mixers(fields: Fields, *, fused: bool) -> list[SoftmaxAttention | GatedDelta]:
    """Read layers of gated DeltaNet among layers of gated attention.

    Args:
        fused: see `GatedDelta`.

    Raises:
        ValueError: heads of keys do not divide those of values.
    """
    attention = plain_attention(fields, rope_of(fields, partial=True))
    attention = replace(attention, qk_norm="heads", gate=True)
    delta = GatedDelta(
        num_heads=fields.integer("linear_num_key_heads"),
        num_v_heads=fields.integer("linear_num_value_heads"),
        head_dim=fields.integer("linear_key_head_dim"),
        v_dim=fields.integer("linear_value_head_dim"),
        conv_size=fields.integer("linear_conv_kernel_dim"),
        activation=fields.text("hidden_act"),
        fused=fused,
    )
    if delta.num_v_heads % delta.num_heads:
        raise ValueError(
            f"{fields.origin}: linear_num_value_heads={delta.num_v_heads} is no multiple of "
            f"linear_num_key_heads={delta.num_heads}"
        )
    return [attention if kind == FULL else delta for kind in layer_kinds(fields, FULL, LINEAR)]


def dense_mlp(fields: Fields, *, bias: bool = False, width: str = "intermediate_size") -> DenseMlp:
    """Read a gated MLP, whose width has the key `width`."""
    return DenseMlp(width=fields.integer(width), activation=fields.text("hidden_act"), bias=bias)


def norm_of(fields: Fields, *, one_plus: bool = False) -> NormSpec:
    """Read the norms' epsilon."""
    return NormSpec(eps=fields.number("rms_norm_eps", least=0.0), one_plus=one_plus)


def windows_of(fields: Fields) -> list[int | None]:
    """Read each layer's window: `sliding_window` where `layer_types` says so.

    Raises:
        ValueError: a layer has a window, and there is no `sliding_window`.
    """
    kinds = layer_kinds(fields, FULL, SLIDING)
    if SLIDING in kinds and fields.is_null("sliding_window"):
        raise ValueError(
            f"{fields.origin}: layer_types has {SLIDING!r}, but there is no sliding_window: set "
            f"all layer_types to {FULL!r}"
        )
    return [fields.integer("sliding_window") if kind == SLIDING else None for kind in kinds]


def alike(count: int, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """Return `count` times the same layer."""
    return (layer,) * count


MOST_EXPERTS = 65_536


def num_experts_of(fields: Fields, least: int = 0) -> int:
    """Read the number of experts under either name; `transformers` writes num_local_experts.

    Raises:
        ValueError: the two contradict each other.
    """
    names = ("num_local_experts", "num_experts")
    given = [key for key in names if key in fields and not fields.is_null(key)]
    found = {fields.integer(key, least, MOST_EXPERTS) for key in given}
    if len(found) > 1:
        raise ValueError(
            f"{fields.origin}: num_local_experts={fields.value('num_local_experts')} and "
            f"num_experts={fields.value('num_experts')} contradict each other"
        )
    if found:
        return found.pop()
    return fields.integer(next(key for key in names if fields.knows(key)), least, MOST_EXPERTS)


def mlps_by_step(fields: Fields, *, has_shared: bool = False) -> list[DenseMlp | MoeMlp]:
    """Read each layer's MLP where every `decoder_sparse_step`-th one has experts, except
    `mlp_only_layers`.

    Args:
        has_shared: whether layers with experts have a gated shared expert as well.
    """
    every, dense = fields.integer("decoder_sparse_step"), fields.integers("mlp_only_layers")
    count, num_experts = fields.integer("num_hidden_layers"), num_experts_of(fields)
    sparse = [num_experts > 0 and i not in dense and (i + 1) % every == 0 for i in range(count)]
    if not any(sparse):
        return [dense_mlp(fields)] * count
    experts = replace(
        softmax_experts(fields, num_experts, has_shared=has_shared),
        normalise=fields.flag("norm_topk_prob"),
    )
    return [experts if is_sparse else dense_mlp(fields) for is_sparse in sparse]


def softmax_experts(fields: Fields, num_experts: int, *, has_shared: bool) -> MoeMlp:
    """Read experts that a softmax chooses, with weights that sum to 1.

    Args:
        has_shared: whether there is a gated shared expert as well.
    """
    shared = None
    if has_shared:
        width = fields.integer("shared_expert_intermediate_size")
        shared = SharedExperts(width=width, gate=True)
    return MoeMlp(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", most=num_experts),
        width=fields.integer("moe_intermediate_size"),
        activation=fields.text("hidden_act"),
        shared=shared,
    )


def mlps_in_groups(fields: Fields) -> list[DenseMlp | MoeMlp]:
    """Read each layer's MLP where all but the first `first_k_dense_replace` have shared experts,
    and experts that are chosen by groups, from sigmoids with a correction.

    Raises:
        ValueError: the groups do not divide the experts, or have too few for the choice.
    """
    layers, count = fields.integer("num_hidden_layers"), fields.integer("n_routed_experts")
    num_dense = min(fields.integer("first_k_dense_replace", least=0), layers)
    mlps: list[DenseMlp | MoeMlp] = [dense_mlp(fields)] * num_dense
    if num_dense == layers:
        return mlps
    groups, width = fields.integer("n_group"), fields.integer("moe_intermediate_size")
    top_groups = fields.integer("topk_group", most=groups)
    if count % groups or count < 2 * groups:
        raise ValueError(
            f"{fields.origin}: n_routed_experts={count} is not n_group={groups} groups of at least "
            "2 experts"
        )
    experts = MoeMlp(
        num_experts=count,
        top_k=fields.integer("num_experts_per_tok", most=count // groups * top_groups),
        width=width,
        activation=fields.text("hidden_act"),
        scores="sigmoid",
        normalise=fields.flag("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor"),
        groups=groups,
        top_groups=top_groups,
        correction=True,
        shared=SharedExperts(width=width * fields.integer("n_shared_experts")),
    )
    return [*mlps, *[experts] * (layers - num_dense)]
