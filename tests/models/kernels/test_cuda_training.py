"""Gradients of tiny models with Triton's kernels, interpreted on the CPU, equal torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_proofs import launched

Run = Callable[..., Any]

SOURCE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "sliding_window": None,
}
KERNELS = {
    *("add_norm_row", "add_norm_backward_rows", "swiglu_block", "swiglu_backward_block"),
    *("rotate_heads", "lay_out_heads", "collect_heads", "reduce_row", "factor_block"),
}
"""Those of a microbatch of a plain model."""

LAID_OUT = {"lay_out_heads", "collect_heads"}


def attend(
    q: Tensor, k: Tensor, v: Tensor, s: Any, options: Any, sinks: Tensor | None = None
) -> Tensor:
    """Attention of a `VarlenKernel`, by explicit scores."""
    assert sinks is None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for i in range(len(s.ends_q) - 1):
        rows, keys = (slice(*ends[i : i + 2].tolist()) for ends in (s.ends_q, s.ends_k))
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * options.scale
        count, length = scores.shape[1:]
        hidden = torch.ones(count, length).tril(length - count) == 0
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[keys]))
    return torch.cat(parts)


def gradients(config: Any, recompute: str, serves: bool) -> dict[str, Tensor]:
    """Log-probabilities of two responses of one prompt, and the gradients of their sum."""
    from spmdrl.models.attention import PackedAttention
    from spmdrl.models.attention_varlen import VarlenKernel
    from spmdrl.models.decoder import Decoder
    from spmdrl.models.kernels import gpu
    from spmdrl.models.layer_attention import attention_options
    from spmdrl.models.spans import Span
    from spmdrl.training.logprobs import token_logprobs

    gpu.runs_on = lambda device: serves
    random = torch.Generator().manual_seed(0)
    decoder = Decoder(config, device="cpu")
    for name, parameter in decoder.named_parameters():
        drawn = torch.randn(parameter.shape, generator=random) * 0.3
        parameter.data.copy_(1 + drawn if "norm" in name else drawn)
    spans = [
        Span(q_start=0, q_stop=3, own=(0, 3)),
        Span(q_start=3, q_stop=8, own=(3, 8), prefix=((0, 3),)),
        Span(q_start=8, q_stop=10, own=(8, 10), prefix=((0, 3),)),
    ]
    packed = PackedAttention(
        spans,
        VarlenKernel(attend),
        options=attention_options(config),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tokens = torch.randint(config.vocab_size, (10,), generator=random)
    targets = torch.randint(config.vocab_size, (7,), generator=random)
    factors = torch.randn(2, 7, generator=random)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 4])

    def finish(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return token_logprobs(hidden[3:], weight, targets, temperature=0.8, chunk=4)

    found = decoder(tokens, positions, packed, finish, recompute=recompute)
    sum((x * f).sum() for x, f in zip(found, factors, strict=True)).backward()
    own = {name: p.grad for name, p in decoder.named_parameters()}
    return own | {"logprobs": found[0].detach(), "entropy": found[1].detach()}


def trained_alike(
    architecture: str, changes: Mapping[str, Any], recompute: str, lacking: set[str]
) -> None:
    """Compare both ways, and which kernels were launched."""
    from spmdrl.models.config import parse_config
    from spmdrl.models.family import family_of

    torch.set_num_threads(1)
    kind = {"architectures": [architecture], "model_type": family_of(architecture).model_type}
    config = parse_config({**SOURCE, **kind, **changes})
    names: set[str] = set()
    launched(names)
    expected = gradients(config, recompute, False)
    assert not names
    found = gradients(config, recompute, True)
    assert names == KERNELS - lacking, names ^ KERNELS
    for name, wanted in expected.items():
        most = 3e-5 * float(wanted.abs().max())
        torch.testing.assert_close(
            *(found[name], wanted), rtol=1e-3, atol=most, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_model_is_trained_alike(interpreted: Run) -> None:
    interpreted(trained_alike, "Qwen2ForCausalLM", {}, "none", set())


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize(
    "architecture, changes, lacking",
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": False}, set()),
        # a residual scale
        (
            "GraniteForCausalLM",
            {
                "residual_multiplier": 0.4,
                "embedding_multiplier": 2.0,
                "attention_multiplier": 0.3,
                "logits_scaling": 3.0,
                "attention_bias": False,
                "mlp_bias": False,
            },
            set(),
        ),
        # norms of single heads come before rope
        ("Qwen3ForCausalLM", {}, LAID_OUT),
        # norms behind blocks alone, and of all heads together
        ("Olmo2ForCausalLM", {}, LAID_OUT),
    ],
)
def test_models_are_trained_alike(
    interpreted: Run, architecture: str, changes: dict[str, Any], lacking: set[str], recompute: str
) -> None:
    interpreted(partial(trained_alike, architecture, changes, recompute, lacking))
