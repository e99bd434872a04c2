"""Modules that replace megatron-core's own in a layer's specification.

megatron-core's plain norm refuses sequence parallelism, and its plain attention refuses packed
sequences and context parallelism. These modules support them with the project's own kernels:
attention over spans (shared prompts included), rope at any position, and log-probabilities without
all logits at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from spmdrl.models.attention import PackedAttention
from spmdrl.models.blocks.moe import choose_experts
from spmdrl.models.dropout import Dropout
from spmdrl.models.fused import rms_norm
from spmdrl.models.rope import Rope
from spmdrl.models.routing import Routing
from spmdrl.models.specs import MoeMlp


@dataclass
class StreamParams(PackedSeqParams):  # type: ignore[misc]
    """Values that a microbatch's attention needs. They pass through the layers as an argument, not
    as state: a pipeline works on several microbatches, and recomputation needs its own values.
    """

    attend: PackedAttention | None = None
    rope: Rope | None = None
    routing: Routing | None = None
    dropout: Dropout | None = None

    def __post_init__(self) -> None:
        self.qkv_format = "thd"


class SpanAttention(nn.Module):
    """Rope, then attention over the spans of a packed stream.

    `params` are those of the last forward pass, and so of the layer's current microbatch, even
    while it is recomputed. They have tables of the microbatch's length: `forget` lets them go.
    """

    def __init__(self, *, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer = layer_number - 1
        self.params = StreamParams()

    def forget(self) -> None:
        """Let the last microbatch go, once its backward pass is over."""
        self.params = StreamParams()

    def forward(
        self,
        query: Tensor,  # [T, H_local, d]
        key: Tensor,  # [T, KVH_local, d]
        value: Tensor,  # [T, KVH_local, d]
        attention_mask: None,
        *,
        packed_seq_params: StreamParams,
        **_: Any,
    ) -> Tensor:  # [T, H_local, d]
        self.params = packed_seq_params
        attend, rope = packed_seq_params.attend, packed_seq_params.rope
        assert attend is not None and rope is not None
        return attend(self.layer, rope.turn(query), rope.turn(key), value)


class MegatronRouter(nn.Module):
    """Top-k of the softmax over all experts, as in the shared decoder; Megatron moves the tokens.

    `attention` is the same layer's attention, which has run before and knows the microbatch.
    """

    def __init__(
        self,
        moe: MoeMlp,
        layer: int,
        device: torch.device,
        *,
        config: Any,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.moe, self.layer = moe, layer
        self.attention: tuple[SpanAttention, ...] = ()
        """One module, in a tuple so that it does not become a submodule of this one too."""
        shape = (moe.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel

    def set_layer_number(self, layer_number: int) -> None:
        """Do nothing; Megatron sets the number for its loggers."""

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # [T, E] float32: the chosen experts' weights; [T, E] bool
        flat = x.reshape(-1, x.shape[-1]).float()
        probabilities = nn.functional.linear(flat, self.weight.float()).softmax(dim=-1)
        routing = self.attention[0].params.routing
        chosen, weights = choose_experts(
            probabilities, probabilities.detach(), self.moe, self.layer, routing
        )
        used = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, chosen, True)
        return torch.zeros_like(probabilities).scatter(1, chosen, weights), used


class MegatronNorm(nn.Module):
    """Root-mean-square norm; Megatron sums its gradient over tp ranks with different tokens."""

    def __init__(
        self, config: Any, hidden_size: int, eps: float, device: torch.device, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=device)
        )
        # an attribute that megatron's `finalize_model_grads` looks for
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MegatronHead(nn.Module):
    """Replacement of the output layer: it holds the weight and returns the hidden states.

    `weight` is None if it is the embedding's.
    """

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        return hidden, None
