"""GPTModel chunks of a rank, built from a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import ModelConfig
from spmdrl.models.megatron_chunks import (
    Cut,
    Parameter,
    chunk_layers,
    counts_ends,
    padded_vocab,
    rank_chunks,
)
from spmdrl.models.sharding import Head
from spmdrl.models.specs import MoeMlp
from spmdrl.training.megatron.adapted import AdaptableColumn, AdaptableRow
from spmdrl.training.megatron.checks import MegatronOptions, uses_transformer_engine
from spmdrl.training.megatron.modules import (
    MegatronHead,
    MegatronNorm,
    MegatronRouter,
    SpanAttention,
)
from spmdrl.training.options import TrainOptions


def transformer_config(
    mesh: Mesh,
    model: ModelConfig,
    options: TrainOptions,
    megatron: MegatronOptions,
    device: torch.device,
    *,
    is_plain: bool = False,
) -> TransformerConfig:
    """Describe the model and its parallel layout for megatron-core.

    Layers are recomputed while a chunk is in training mode.

    Args:
        is_plain: see `model_cut`.
    """
    given = _model_settings(model, options.param_dtype)
    given |= _layout_settings(mesh, model, megatron, device) | _kernel_settings(device)
    if model.moe is not None:
        is_grouped = uses_transformer_engine(device) and not is_plain
        given |= _expert_settings(model.moe, model, mesh, is_grouped)
    return TransformerConfig(**given)


def _model_settings(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.dense_width or model.hidden_size,
        "num_attention_heads": model.attention.num_heads,
        "num_query_groups": model.attention.num_kv_heads,
        "kv_channels": model.attention.head_dim,
        "add_qkv_bias": model.attention.qkv_bias,
        "qk_layernorm": model.attention.qk_norm != "none",
        "layernorm_epsilon": model.norm.eps,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _layout_settings(
    mesh: Mesh, model: ModelConfig, megatron: MegatronOptions, device: torch.device
) -> dict[str, Any]:
    interleaved = megatron.vpp > 1
    ends = counts_ends(model.num_layers, mesh.size("pp") * megatron.vpp)
    return {
        "tensor_model_parallel_size": mesh.size("tp"),
        "pipeline_model_parallel_size": mesh.size("pp"),
        "context_parallel_size": mesh.size("cp"),
        "virtual_pipeline_model_parallel_size": megatron.vpp if interleaved else None,
        "account_for_embedding_in_pipeline_split": ends,
        "account_for_loss_in_pipeline_split": ends,
        "sequence_parallel": megatron.sp,
        # gradients are sums: losses are already divided by the global count
        "calculate_per_token_loss": True,
        # Interleaved stages on two ranks have one peer for both directions. Messages sent in one
        # batch would pair up wrongly there, so they are sent one by one, and overlap.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        # gloo may still be reading a message when the schedule would free it
        "deallocate_pipeline_outputs": device.type == "cuda",
    }


def _kernel_settings(device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    return {
        # weights are filled from the checkpoint
        "perform_initialization": False,
        "use_cpu_initialization": not on_cuda,
        # needs apex; TransformerEngine has its own
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": on_cuda,
        "apply_rope_fusion": False,
        # the default is deprecated and warns
        "cuda_graph_scope": [],
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelChunks:
    """A rank's chunks, and the parameters of each, with the layout's names and in its order."""

    chunks: list[GPTModel]
    named: list[list[tuple[Parameter, nn.Parameter]]]


def build_chunks(
    settings: TransformerConfig,
    model: ModelConfig,
    cut: Cut,
    groups: ProcessGroupCollection,
    mesh: Mesh,
    device: torch.device,
    head: Head,
    *,
    with_score: bool = True,
) -> ModelChunks:
    """Build the chunks of this rank of `mesh`; their parameters are not filled yet.

    Args:
        with_score: whether the last one holds the scalar head, if `head` is that.
    """
    tp_rank, pp_rank, ep_rank = (mesh.coordinate(axis) for axis in ("tp", "pp", "ep"))
    table = rank_chunks(model, cut, tp_rank, pp_rank, head, ep_rank=ep_rank, with_score=with_score)
    embd, groups.embd = groups.embd, None  # see groups: weights are loaded, not all-reduced
    chunks = [
        build_chunk(settings, model, cut, groups, number, device, head) for number in range(cut.vpp)
    ]
    groups.embd = embd
    named = []
    for chunk, expected in zip(chunks, table, strict=True):
        replace_head(chunk, model, head, with_score=with_score)
        named.append(list(zip(expected, name_parameters(chunk, expected), strict=True)))
    return ModelChunks(chunks=chunks, named=named)


def build_chunk(
    settings: TransformerConfig,
    model: ModelConfig,
    cut: Cut,
    groups: ProcessGroupCollection,
    chunk: int,
    device: torch.device,
    head: Head,
) -> GPTModel:
    """Build one chunk with megatron-core's own output layer; parameters are not filled yet."""
    pp_rank = groups.pp.rank()
    is_first = pp_rank == 0 and chunk == 0
    is_last = pp_rank == cut.pp - 1 and chunk == cut.vpp - 1
    norm = ModuleSpec(module=MegatronNorm, params={"device": device})
    layers = [
        _layer_spec(model, layer, cut, norm, device)
        for layer in chunk_layers(model, cut, pp_rank, chunk)
    ]
    chunk_model = GPTModel(
        settings,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
        vocab_size=padded_vocab(model, cut.tp),
        max_sequence_length=model.max_position,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=model.tie_embeddings and head == "lm",
        # the attention module applies rope
        position_embedding_type="none",
        pg_collection=groups,
        vp_stage=chunk if cut.vpp > 1 else None,
    )
    for made in chunk_model.decoder.layers:
        if isinstance(made.mlp, MoELayer):
            made.mlp.router.attention = (made.self_attention.core_attention,)
    return chunk_model


def replace_head(chunk: GPTModel, model: ModelConfig, head: Head, *, with_score: bool) -> None:
    """Make the last chunk return hidden states, and give it a scalar head if `head` asks for it.

    Args:
        with_score: see `build_chunks`.
    """
    if not chunk.post_process:
        return
    weight: nn.Parameter | None = chunk.output_layer.weight
    if head == "score":
        like = chunk.decoder.final_layernorm.weight
        row = torch.empty(1, model.hidden_size, dtype=like.dtype, device=like.device)
        weight = nn.Parameter(row) if with_score else None
    chunk.output_layer = MegatronHead(weight)


def name_parameters(chunk: GPTModel, expected: tuple[Parameter, ...]) -> list[nn.Parameter]:
    """Return the chunk's parameters, which must be the layout's, in its order."""
    found = dict(chunk.named_parameters())
    named = {p.module_name: p.shape for p in expected}
    held = {name: tuple(parameter.shape) for name, parameter in found.items()}
    assert list(held.items()) == list(named.items()), (held, named)
    return list(found.values())


def _expert_settings(
    moe: MoeMlp, model: ModelConfig, mesh: Mesh, is_grouped: bool
) -> dict[str, Any]:
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.width,
        "moe_layer_freq": [int(layer in model.moe_layers) for layer in range(model.num_layers)],
        "expert_model_parallel_size": mesh.size("ep"),
        "expert_tensor_parallel_size": mesh.size("etp"),
        # the project's own router replaces Megatron's
        "moe_router_load_balancing_type": "none",
        # all-gathers would need equally many tokens on all ranks
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": is_grouped,
    }


def _layer_spec(
    model: ModelConfig, layer: int, cut: Cut, norm: ModuleSpec, device: torch.device
) -> ModuleSpec:
    moe = model.moe if model.moe is not None and layer in model.moe_layers else None
    num_experts = None if moe is None else moe.num_experts
    has_qk_norm = model.attention.qk_norm != "none"
    if cut.fused_norms:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=num_experts is not None,
            qk_layernorm=has_qk_norm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=num_experts, qk_layernorm=has_qk_norm, normalization="RMSNorm"
        )
        spec.submodules.input_layernorm = norm
        linear = spec.submodules.self_attention.submodules
        linear.linear_qkv, linear.linear_proj = AdaptableColumn, AdaptableRow
        if moe is None:
            linear = spec.submodules.mlp.submodules
            linear.linear_fc1, linear.linear_fc2 = AdaptableColumn, AdaptableRow
    if moe is not None:
        spec.submodules.mlp.submodules.router = partial(MegatronRouter, moe, layer, device)
    if moe is not None or not cut.fused_norms:
        spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SpanAttention
    if has_qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return spec
