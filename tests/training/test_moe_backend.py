"""A mixture of experts on the train backend: layouts against one rank, replay, balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_runs import compare, make_backend, rows_of_step, run_layouts
from torch import Tensor
from training_cases import LivelyCheckpoint, dense, loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.models.blocks.moe import Experts
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.routing import EXPERT_CHOICES, pack_choices, unpack_choices
from spmdrl.training.readout import next_token
from spmdrl.world import World
from tiny_model import load_into

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COEFFICIENT = 0.3


def moe_config() -> ModelConfig:
    return tiny_config("Qwen3MoeForCausalLM", **EXPERTS, norm_topk_prob=True)


Case = tuple[dict[str, int], dict[str, Any]]
TWO: list[Case] = [
    ({"dp_replicate": 2, "ep": 2}, {"microbatch_tokens": 30}),
    ({"dp_shard": 2, "ep": 2}, {"recompute": "layer", "microbatch_tokens": 40}),
    ({"cp": 2, "ep": 2}, {"recompute": "layer"}),
    ({"tp": 2, "ep": 2}, {"recompute": "layer"}),
    ({"tp": 2}, {}),
    ({"dp_shard": 2}, {}),
]
FOUR: list[Case] = [
    ({"dp_replicate": 2, "tp": 2, "ep": 2}, {}),
    ({"dp_shard": 2, "tp": 2, "ep": 4}, {"recompute": "layer"}),
    ({"dp_shard": 4, "ep": 2}, {"recompute": "layer", "microbatch_tokens": 30}),
    ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {"share_prompts": False}),
    ({"dp_shard": 2, "cp": 2, "ep": 4}, {}),
]
CASES = {1: [({}, {"microbatch_tokens": 100})], 2: TWO, 4: FOUR}


def with_choices(rows: Batch) -> Batch:
    """Recorded choices: a function of token and position, none for every fifth position."""
    starts = rows.offsets()[:-1].repeat_interleave(rows.lengths)
    place = torch.arange(rows.num_tokens) - starts
    first = (rows["tokens"] * 7 + place)[:, None] + torch.tensor([0, 3])  # two layers
    chosen = torch.stack((first % 8, (first + 1 + rows["tokens"][:, None] % 7) % 8), dim=-1)
    chosen = chosen.masked_fill((place % 5 == 0)[:, None, None], -1)
    return rows.with_columns(tokens={EXPERT_CHOICES: pack_choices(chosen, 8)})


def recorded_rows(step: int, num_replicas: int, replica: int) -> Batch:
    """With shares of the loss; the experts of the second step are recorded."""
    rows = rows_of_step(step, num_replicas, replica)
    rows = rows.with_columns(rows={"loss_share": (rows["sample_index"] + 1).double()})
    return with_choices(rows) if step == 1 else rows


def on_ranks(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    balanced = [(degrees, {"balance_coef": COEFFICIENT, **given}) for degrees, given in cases]
    return run_layouts(world, moe_config(), balanced, recorded_rows)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(on_ranks, 1, CASES[1])[0][0]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.full), 4])
def test_layouts_train_as_one_rank_does(one: dict[str, Any], size: int) -> None:
    """With balance loss and replay: metrics, gradients, weights and moments of three steps."""
    results = run_ranks(on_ranks, size, CASES[size], timeout_s=200)
    for number, (degrees, _) in enumerate(CASES[size]):
        print(degrees)
        compare([result[number] for result in results], one, moe_config())


def test_metrics_say_how_experts_are_used(one: dict[str, Any]) -> None:
    first, second, _ = (sums for sums, _ in one["steps"])
    assert 1 < first["expert_load"] <= first["expert_load_max"] <= 4
    assert 0 <= first["experts_idle"] < 1
    assert first["balance_loss"] > 0
    assert "replay_changed" not in first
    # four of five tokens have choices that are no better than chance
    assert 0.4 < second["replay_changed"] / second["tokens"] < 0.8


def replayed(world: World) -> list[Any]:
    """The experts of every stream token and layer, as an update hands them to its experts."""
    backend = make_backend(world, options(microbatch_tokens=60), moe_config())
    seen: list[Tensor] = []
    for module in backend._decoder.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[1].clone()))
    streams = []
    backend._decoder.register_forward_pre_hook(lambda _, given: streams.append(given[0].clone()))
    rows = with_choices(make_rows([6, 3, 9, 4], 3))
    backend.forward_backward(rows, loss_fn, next_token(), normaliser=1.0)
    return [streams, seen]


def test_an_update_takes_the_recorded_experts_token_for_token() -> None:
    [[streams, seen]] = run_ranks(replayed, 1)
    assert len(streams) > 1 and len(seen) == 2 * len(streams)
    rows = with_choices(make_rows([6, 3, 9, 4], 3))
    recorded = unpack_choices(rows[EXPERT_CHOICES])
    # a token of a stream by itself and the one before it; the rows' prompts are in there once
    known: dict[tuple[int, int], set[Any]] = {}
    for part in torch.split(torch.arange(rows.num_tokens), rows.lengths.tolist()):
        for before, here in zip(part[:-1].tolist(), part[1:].tolist(), strict=True):
            pair = (int(rows["tokens"][before]), int(rows["tokens"][here]))
            known.setdefault(pair, set()).add(str(recorded[here].tolist()))
    checked = 0
    for number, stream in enumerate(streams):
        layers = torch.stack(seen[2 * number : 2 * number + 2], dim=1)
        for before, here in enumerate(range(1, len(stream))):
            wanted = known.get((int(stream[before]), int(stream[here])))
            if wanted is None or any("-1" in choice for choice in wanted):
                continue  # the first token of a piece, or one without a record
            assert str(layers[here].tolist()) in wanted
            checked += 1
    assert checked > 60


def naive_gradient(rows: Batch, name: str) -> Tensor:
    """Of the loss and of the balance losses, row by row and from the formula."""
    config = moe_config()
    decoder = Decoder(config, device="cpu")
    load_into(decoder, LivelyCheckpoint(config))
    probabilities: list[Tensor] = []
    for layer in decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, out: probabilities.append(out))
    total = torch.zeros(())
    starts = rows.offsets().tolist()
    for row, tokens in enumerate(torch.split(rows["tokens"], rows.lengths.tolist())):
        probabilities.clear()
        decoder(tokens, torch.arange(len(tokens)), dense)
        mask = rows["loss_mask"][starts[row] : starts[row + 1]]
        read = mask.nonzero().flatten() - 1
        for p in probabilities:
            chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
            f = chosen[read].mean(0) * 8 / 2
            balance = (f * p[read].mean(0)).sum()
            total = total + COEFFICIENT * rows["loss_share"][row].float() * balance
    total.backward()
    gradient = dict(decoder.named_parameters())[name].grad
    assert gradient is not None
    return gradient / 50


def balanced(world: World, rows: Batch, name: str) -> Tensor:
    """What the balance loss adds to a gradient."""
    found = []
    for coefficient in (0.0, COEFFICIENT):
        given = options(microbatch_tokens=60, balance_coef=coefficient, recompute="layer")
        backend = make_backend(world, given, moe_config())
        backend.forward_backward(rows, loss_fn, next_token(), normaliser=50.0)
        [leaf] = [leaf for leaf in backend._leaves if leaf.name == name]
        gradient = leaf.gradient()
        assert gradient is not None
        found.append(gradient)
    return found[1] - found[0]


@pytest.mark.parametrize("name", ["layers.1.mlp.router.weight", "layers.0.attention.qkv.weight"])
def test_the_balance_loss_is_that_of_each_sequence(name: str) -> None:
    rows = make_rows([6, 3, 9], 3, seconds=True)
    rows = rows.with_columns(rows={"loss_share": (rows["sample_index"] + 1).double()})
    [found] = run_ranks(balanced, 1, rows, name)
    expected = naive_gradient(rows, name)
    assert expected.abs().max() > 1e-4
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def refused(world: World) -> str:
    rows = make_rows([4], 2)
    wrong = torch.zeros(rows.num_tokens, 1, 2, dtype=torch.uint8)
    backend = make_backend(world, options(), moe_config())
    with pytest.raises(ValueError) as caught:
        backend.forward(rows.with_columns(tokens={EXPERT_CHOICES: wrong}), next_token())
    return str(caught.value)


def test_choices_of_another_model_are_refused() -> None:
    [message] = run_ranks(refused, 1)
    assert "'expert_choices' has (1, 2) choices for a token, the model has (2, 2)" in message
