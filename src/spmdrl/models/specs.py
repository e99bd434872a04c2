"""`LayerSpec`: one decoder layer as values, from which modules, tensors, caches and costs follow.

A family (`models/families/`) says what its `config.json` means as one `LayerSpec` for each layer;
`models/blocks/` has a file for each kind of block that computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spmdrl.models.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Scores of softmax attention and which keys they are computed for.

    A query at position i scores keys j in (i - window, i]: softcap * tanh(s / softcap) with
    s = scale * q k^T, or s itself without a cap.

    Args:
        window: number of keys that a query sees, its own included; None: all before it.
        softcap: limit of a score's magnitude (Gemma 2: https://arxiv.org/abs/2408.00118,
            section 2); None: none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """Root-mean-square norms (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Args:
        one_plus: whether a weight w multiplies by 1 + w (Gemma).
    """

    eps: float
    one_plus: bool = False


@dataclass(frozen=True, kw_only=True)
class SoftmaxAttention:
    """Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

    Args:
        rope: None: the layer knows no positions.
        options: see `AttentionOptions`.
        qkv_bias, out_bias: whether these projections have biases.
        qk_norm: the norm of queries and keys before rope: of each head by itself, or of all heads
            of the projection together (OLMo 2).
        sinks: whether every head has one more score, a parameter, whose probability is dropped
            (gpt-oss).
        gate: whether `q_proj` also gives, behind each head's query, a gate whose sigmoid multiplies
            that head's output (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    options: AttentionOptions
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "heads", "all"] = "none"
    sinks: bool = False
    gate: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

    Args:
        q_rank: width of the queries' latent vector; None: queries are projected at once.
        kv_rank: width of the latent vector that all keys and values are made of.
        nope_dim, rope_dim: dims of a head's query and key without and with rope; all heads share
            the part of the key with rope.
        v_dim: dims of a head's value.
        norm_eps: that of the latent vectors' norms, which are not the model's other ones.
        bias: whether the projections to the latent vectors and the output have biases.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope: RopeConfig
    options: AttentionOptions
    norm_eps: float = 1e-6
    bias: bool = False

    @property
    def head_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class GatedDelta:
    """Linear attention by the gated delta rule (https://arxiv.org/abs/2412.06464, section 3) behind
    a short causal convolution of queries, keys and values.

    Args:
        num_heads: heads of queries and keys.
        num_v_heads: heads of values, each of which has a state [head_dim, v_dim]; a multiple.
        conv_size: width of the convolution, in tokens.
        activation: that of the convolution's result.
        fused: whether the files hold q, k, v and the output's gate in one matrix, head by head
            (Qwen3-Next), or q, k, v in one, the gate and both factors in one each (Qwen3.5).
    """

    num_heads: int
    num_v_heads: int
    head_dim: int
    v_dim: int
    conv_size: int
    activation: str = "silu"
    fused: bool = True


Mixer = SoftmaxAttention | LatentAttention | GatedDelta


@dataclass(frozen=True, kw_only=True)
class DenseMlp:
    """activation(gate) * up, projected down.

    Args:
        activation: one of `transformers`' names (ACT2FN).
        bias: whether all three projections have biases.
    """

    width: int
    activation: str = "silu"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """The activation of gpt-oss: gate * sigmoid(alpha * gate) * (up + 1), where gate is at most
    `limit`, and up within `limit` of 0.
    """

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class SharedExperts:
    """An MLP that every token takes in addition to its experts.

    Args:
        gate: whether a linear gate's sigmoid multiplies its output (Qwen2-MoE).
    """

    width: int
    gate: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeMlp:
    """A router and experts; every token goes to `top_k` of them.

    A router's scores are the softmax or the sigmoid of its logits. Experts are chosen by the scores
    plus the correction, if there is one, among the `top_groups` groups (of `groups` equal ones)
    whose two best scores sum highest (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section
    2.1.2). The weights are the chosen experts' scores without the correction.

    Args:
        width: that of one expert.
        activation: see `DenseMlp`, or gpt-oss's own.
        normalise: whether the weights are divided by their sum.
        scale: factor of the weights.
        correction: whether the router has a bias that only the choice uses, and that no gradient
            changes.
        router_bias, expert_bias: whether the router's logits and the experts' matrices have biases.
        form: how files hold the matrices: "each" expert's gate, up and down; "stacked": all of a
            layer as [E, 2 width, hidden] and [E, hidden, width]; "transposed": all of a layer as
            [E, hidden, 2 width], gate and up alternating, and [E, width, hidden].
    """

    num_experts: int
    top_k: int
    width: int
    activation: str | ClampedSwiglu = "silu"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    correction: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    shared: SharedExperts | None = None
    form: Literal["each", "stacked", "transposed"] = "each"


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: x + out(mixer(in(x))), then the same with the MLP.

    Args:
        norms: which of in and out are norms: "before": in; "after": out (OLMo 2); "around": both
            (Gemma 2).
        residual_scale: factor of what each half adds (Granite).
    """

    mixer: Mixer
    mlp: DenseMlp | MoeMlp
    norms: Literal["before", "after", "around"] = "before"
    residual_scale: float = 1.0
