"""Requirements of the Megatron backend, checked without importing megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from spmdrl.distributed.mesh import expert_degrees
from spmdrl.models.adapters import Adapter, is_expert_target
from spmdrl.models.config import ModelConfig
from spmdrl.models.degrees import check_ep, heads_fix
from spmdrl.models.megatron_chunks import Cut, counts_ends
from spmdrl.models.specs import (
    DenseMlp,
    GatedDelta,
    LatentAttention,
    LayerSpec,
    MoeMlp,
    SoftmaxAttention,
)

SUPPORTED = "0.16.1"
"""The only version that is supported and tested, since the backend reads private names."""


@dataclass(frozen=True, kw_only=True)
class MegatronOptions:
    """Args:
    vpp: number of runs of layers on each pipeline rank (interleaved schedule).
    sp: whether norms and residuals are split over the tp ranks (sequence parallelism).
    """

    vpp: int = 1
    sp: bool = False


def check_installed(role: str) -> None:
    """Raise ValueError unless the supported megatron-core is installed."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        found = None
    if found == SUPPORTED:
        return
    state = "is not installed" if found is None else f"is installed as {found}"
    raise ValueError(
        f"roles.{role}: train.backend=megatron needs megatron-core {SUPPORTED}, which {state}: "
        "install spmdrl[megatron], or set train.backend=torch"
    )


def plain_model(role: str, model: ModelConfig) -> SoftmaxAttention:
    """Return the attention that all layers have, but for windows, scales and soft caps, which are
    those of the project's own attention.

    Raises:
        ValueError: the model has something that Megatron's GPT model is not asked for here; the
            message names it and its layer.
    """
    mixers = (spec.mixer for spec in model.layers)
    first = next((mixer for mixer in mixers if isinstance(mixer, SoftmaxAttention)), None)
    found = ((f"layer {i} of ", _lacks(spec, first)) for i, spec in enumerate(model.layers))
    where, lacks = next(((where, lacks) for where, lacks in found if lacks), ("", ""))
    if not lacks:
        lacks = _body_lacks(model)
    if lacks:
        raise ValueError(
            f"roles.{role}.train.backend=megatron: {where}{model.architecture} has {lacks}, which "
            f"this backend does not compute: set roles.{role}.train.backend=torch"
        )
    assert first is not None, model.architecture
    return first


def _lacks(spec: LayerSpec, first: SoftmaxAttention | None) -> str:
    """Name what Megatron's layer is not asked for here; empty if there is nothing."""
    mixer, mlp = spec.mixer, spec.mlp
    if isinstance(mixer, GatedDelta):
        return "gated DeltaNet"
    if isinstance(mixer, LatentAttention):
        return "latent attention"
    special = {
        "attention sinks": mixer.sinks,
        "a gate of attention": mixer.gate,
        "a bias of attention's output": mixer.out_bias,
        "a norm of all heads together": mixer.qk_norm == "all",
        "no rope": mixer.rope is None,
        "other heads or rope than an earlier layer": first is not None
        and replace(mixer, options=first.options) != first,
        f"norms that lie {spec.norms} its halves": spec.norms != "before",
        f"residual_multiplier={spec.residual_scale}": spec.residual_scale != 1.0,
        f"the activation {mlp.activation}": mlp.activation not in ("silu", "swish"),
        "biases in its MLP": isinstance(mlp, DenseMlp) and mlp.bias,
    }
    if isinstance(mlp, MoeMlp):
        special |= {
            "a shared expert": mlp.shared is not None,
            "experts that are chosen by sigmoids": mlp.scores != "softmax",
            "experts of another kind": mlp != plain_experts(mlp),
        }
    return next((words for words, has in special.items() if has), "")


def _body_lacks(model: ModelConfig) -> str:
    special = {
        "scaled embeddings": model.embedding_scale != 1.0,
        "scaled logits": model.logit_scale != 1.0,
        "a soft cap of its logits": model.logit_softcap is not None,
        "norms by 1 + w": model.norm.one_plus,
    }
    return next((words for words, has in special.items() if has), "")


def plain_experts(moe: MoeMlp) -> MoeMlp:
    """Return the experts of the same sizes as Megatron computes them here."""
    return MoeMlp(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        width=moe.width,
        activation=moe.activation,
        normalise=moe.normalise,
    )


def check_megatron(
    role: str, model: ModelConfig, degrees: Mapping[str, int], options: MegatronOptions
) -> None:
    """Refuse degrees by which Megatron cannot cut the model.

    Raises:
        ValueError: a degree does not fit; the message names the keys and the numbers.
    """
    tp, pp, vpp = degrees["tp"], degrees["pp"], options.vpp
    plain = plain_model(role, model)
    sizes = {
        "num_attention_heads": plain.num_heads,
        "num_key_value_heads": plain.num_kv_heads,
        **({} if model.dense_width is None else {"intermediate_size": model.dense_width}),
    }
    bad = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if bad:
        raise ValueError(
            f"roles.{role}.tp={tp} does not divide the model's {', '.join(bad)}"
            f"{heads_fix(model, tp, bad)}"
        )
    if vpp > 1 and pp == 1:
        raise ValueError(
            f"roles.{role}.megatron.vpp={vpp} with roles.{role}.pp=1: there is no pipeline whose "
            "stages could be interleaved; set vpp: 1"
        )
    layers = model.num_layers
    if layers % (pp * vpp) and not counts_ends(layers, pp * vpp):
        shown = f"roles.{role}.pp={pp}" + (f" x roles.{role}.megatron.vpp={vpp}" if vpp > 1 else "")
        raise ValueError(
            f"{shown} does not divide the model's num_hidden_layers={layers}, nor {layers + 2}, "
            "where embedding and head count as a layer each"
        )
    if options.sp and tp == 1:
        raise ValueError(
            f"roles.{role}.megatron.sp=true with roles.{role}.tp=1: sequence parallelism splits "
            "over the tensor-parallel ranks; set sp: false, or a larger tp"
        )
    _check_experts(role, model, degrees, options)


def check_adapter(
    role: str, adapter: Adapter, *, plain_base: str | None, device: torch.device
) -> None:
    """Refuse an adapter over layers that take none.

    Args:
        plain_base: the role without an adapter whose base it shares, if it shares one.

    Raises:
        ValueError: it adds to experts, or the base has TransformerEngine's layers.
    """
    if any(map(is_expert_target, adapter.targets)):
        raise ValueError(
            f"roles.{role}.adapter has experts as targets with train.backend=megatron, whose "
            f"experts take no additions: set roles.{role}.adapter.targets to attention, or "
            f"roles.{role}.train.backend=torch"
        )
    if plain_base is not None and uses_transformer_engine(device):
        raise ValueError(
            f"roles.{role}.base={plain_base} with roles.{role}.adapter and train.backend=megatron: "
            f"{plain_base} has no adapter and so TransformerEngine's layers, which take no "
            f"additions: let {plain_base} share the base of {role} instead"
        )


def _check_experts(
    role: str, model: ModelConfig, degrees: Mapping[str, int], options: MegatronOptions
) -> None:
    tp, ep = degrees["tp"], degrees["ep"]
    try:
        check_ep(model, tp, ep)
    except ValueError as error:
        raise ValueError(f"roles.{role}: {error}") from None
    if model.moe is None:
        return
    if tp > 1 and not options.sp:
        raise ValueError(
            f"roles.{role}.tp={tp} with roles.{role}.megatron.sp=false: Megatron divides the "
            "tokens of layers with experts over the tensor-parallel ranks; set sp: true"
        )
    exchange, room = expert_degrees(degrees)["exchange"], degrees["dp_shard"] * degrees["cp"]
    if room % exchange:
        raise ValueError(
            f"roles.{role}.ep={ep} with tp={tp} leaves {exchange} parts of the experts to the "
            f"ranks of dp_shard x cp, which are {room}: with train.backend=megatron these exchange "
            f"tokens and share the optimizer's state; raise roles.{role}.dp_shard"
        )


def model_cut(
    degrees: Mapping[str, int],
    options: MegatronOptions,
    device: torch.device,
    *,
    is_plain: bool = False,
) -> Cut:
    """Return the cut of the role's model on `device`.

    Args:
        is_plain: whether its layers are megatron-core's own, which can have an adapter.
    """
    return Cut(
        tp=degrees["tp"],
        pp=degrees["pp"],
        vpp=options.vpp,
        ep=degrees["ep"],
        fused_norms=uses_transformer_engine(device) and not is_plain,
    )


def uses_transformer_engine(device: torch.device) -> bool:
    """Whether to use TransformerEngine's linear layers and norms: on CUDA, if it is installed."""
    return device.type == "cuda" and find_spec("transformer_engine") is not None
