"""Operations that a forecast counts for calls of a model, against those that torch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from forecast_cases import config_of
from spmdrl.batch import from_rows
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.low_rank import Applied
from spmdrl.planning.forecast.forecast import full_lengths
from spmdrl.planning.forecast.shapes import rank_shapes
from spmdrl.planning.forecast.step import Lengths
from spmdrl.planning.forecast.streams import Stream, make_stream
from spmdrl.planning.forecast.train_work import TrainRank, optimizer_work, read_work, update_work
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.systems.train_memory import optimizer_bytes
from spmdrl.planning.token_bounds import step_sizes
from spmdrl.training.logprobs import token_logprobs
from spmdrl.training.packing import pack
from tiny_model import make_tiny_model

TOKENS = 24
STREAM = Stream(tokens=TOKENS, pairs=0, places=TOKENS, microbatches=1, rows=1)


def policy_rank(model: ModelConfig, policy: dict[str, Any], **train: Any) -> TrainRank:
    config = config_of("grpo", {"policy": policy, "rollout": {}}, train=train, device="cpu")
    models = dict.fromkeys(config.roles, model)
    plan = plan_from_shapes(config, 1, 1, device_type="cpu", models=models)
    spec = plan.specs["policy"]
    return TrainRank(
        spec=spec,
        shapes=rank_shapes(spec.model, spec.placement.degrees, spec.head, spec.adapter),
        table=plan.layouts["policy"][0],
        states=plan.state_layouts["policy"][0],
        node_size=1,
    )


def addmm_flops(_: object, a: tuple[int, int], b: tuple[int, int], **rest: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: addmm_flops}
"""Products that torch's counter does not know, by which adapters are added."""


def counted(rank: TrainRank, *, update: bool) -> int:
    """Operations of matrices that torch counts, without attention's."""
    spec = rank.spec
    decoder = Decoder(spec.model, device="cpu").requires_grad_(spec.adapter is None)
    values, applied = list(decoder.parameters()), []
    if spec.adapter is not None:
        weights = AdapterWeights(spec.model, spec.adapter, device="cpu")
        applied = [Applied(weights=weights)]
        values += weights.parameters()
    for value in values:
        torch.nn.init.normal_(value, std=0.02)
    tokens = torch.arange(TOKENS)
    heads, kv_heads = spec.model.attention.num_heads, spec.model.attention.num_kv_heads

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q + (k + v).repeat_interleave(heads // kv_heads, dim=1)

    def finish(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"temperature": 1.0, "chunk": 1024, "with_entropy": False}
        return token_logprobs(hidden, weight, tokens, **options)[0].sum()

    with (
        torch.backends.mkldnn.flags(enabled=False, allow_tf32=None),
        FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter,
        torch.set_grad_enabled(update),
    ):
        recompute = spec.train.recompute
        loss = decoder(tokens, tokens, attend, finish, recompute=recompute, adapters=applied)
        if update:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("Qwen3ForCausalLM", {"tie_word_embeddings": False}),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    ],
)
@pytest.mark.parametrize("adapter", [None, {"rank": 4, "targets": ["all"]}])
def test_operations_of_matrices_equal_those_that_torch_counts(
    tmp_path: Path,
    architecture: str,
    changes: dict[str, Any],
    adapter: dict[str, Any] | None,
    recompute: str,
) -> None:
    model = make_tiny_model(tmp_path / "model", architecture, **changes)
    rank = policy_rank(model, {} if adapter is None else {"adapter": adapter}, recompute=recompute)
    assert read_work(rank, STREAM).flops["matmul"] == counted(rank, update=False)
    assert update_work(rank, STREAM).flops["matmul"] == counted(rank, update=True)


@pytest.mark.parametrize("budget", [30, 44, 100])
@pytest.mark.parametrize("share", [True, False])
def test_streams_of_equal_rows_are_those_that_packing_makes(share: bool, budget: int) -> None:
    prompt, response, items, group = 10, 6, 3, 4
    config = config_of(
        "grpo",
        {"policy": {}, "rollout": {}},
        data={
            "train": {"source": "none.jsonl", "max_tokens": prompt},
            "prompts_per_step": items,
            "group_size": group,
        },
        sampling={"max_tokens": response},
        train={"microbatch_tokens": budget, "share_prompts": share},
    )
    lengths = full_lengths(config)
    assert lengths == Lengths(prompt=prompt, response=response, longest=response)
    whole: dict[str, Any] = {"items": items, "num_replicas": 1, "whole": False}
    found = make_stream(step_sizes(config), lengths, config.train, "loss_tokens", **whole)
    rows = [[item] * prompt + [99] * response for item in range(items) for _ in range(group)]
    batch = from_rows(
        rows,
        rows={
            "prompt_lengths": torch.full((len(rows),), prompt),
            "prompt_ids": torch.arange(items).repeat_interleave(group),
        },
    )
    packed = pack(batch, budget_tokens=budget, share_prompts=share)
    spans = [span for microbatch in packed for span in microbatch.spans]
    unseen = [span.num_queries * (span.num_queries - 1) // 2 for span in spans]
    pairs = sum(span.num_queries * span.num_keys for span in spans) - sum(unseen)
    assert found.tokens == sum(len(microbatch.tokens) for microbatch in packed)
    assert found.places == sum(len(microbatch.predict) for microbatch in packed)
    assert found.pairs == pairs
    assert found.microbatches == len(packed)


def test_attention_counts_two_products_forward_and_five_backward(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    rank = policy_rank(model, {})
    q, k = ((1, model.attention.num_heads, length, model.attention.head_dim) for length in (7, 5))
    expected = sdpa_flop_count(q, k, k) + sdpa_backward_flop_count(q, q, k, k)
    stream = Stream(tokens=7, pairs=7 * 5, places=1, microbatches=1, rows=1)
    one_layer = update_work(rank, stream).flops["attention"] / model.num_layers
    assert one_layer == expected


def test_an_optimizer_step_reads_and_writes_its_state(tmp_path: Path) -> None:
    rank = policy_rank(make_tiny_model(tmp_path / "model"), {})
    # two moments, and the masters, which are the weights where these are float32, all both ways;
    # gradients once for their norm and once for the step
    moments = optimizer_bytes(rank.table, rank.states)
    values = moments // 8
    assert optimizer_work(rank).memory_bytes == 2 * (moments + 4 * values) + 2 * 4 * values
