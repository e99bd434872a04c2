"""Folds of random layouts: relations stay, and degrees divide what they divided before."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from spmdrl.distributed.folding import TINY_LIMITS, fold_degrees, fold_ranks
from spmdrl.distributed.mesh import AXES, check_ranks, expert_degrees
from spmdrl.models.config import parse_config, tiny

Degrees = dict[str, int]


def random_degrees(draw: random.Random) -> Degrees:
    """Degrees of a layout that is allowed."""
    while True:
        degrees = {axis: draw.choice((1, 1, 2, 3, 4, 6, 8)) for axis in (*AXES, "ep")}
        num_ranks = math.prod(degrees[axis] for axis in AXES)
        try:
            check_ranks("policy", range(num_ranks), degrees, num_ranks)
        except ValueError:
            continue
        return degrees


@pytest.mark.parametrize("seed", range(200))
def test_degrees_of_a_fold_are_allowed_and_divide_what_they_did(seed: int) -> None:
    draw = random.Random(seed)
    degrees = random_degrees(draw)
    num_ranks = math.prod(degrees[axis] for axis in AXES)
    assert fold_degrees(degrees, num_ranks, limits={}) == degrees
    before = expert_degrees(degrees)
    in_shards = degrees["dp_shard"] * degrees["cp"] % before["exchange"] == 0
    for count in {1, 2, draw.randint(1, num_ranks)}:
        folded = fold_degrees(degrees, count, limits={})
        check_ranks("policy", range(count), folded, count)
        assert all(degrees[axis] % folded[axis] == 0 for axis in ("tp", "pp", "cp", "ep")), folded
        after = expert_degrees(folded)
        # each expert's width is divided no further, and experts are spread over no other axis
        assert before["etp"] % after["etp"] == 0
        assert before["exchange"] > 1 or after["exchange"] == 1
        # Megatron exchanges tokens within the shards only
        assert not in_shards or folded["dp_shard"] * folded["cp"] % after["exchange"] == 0
        assert degrees["dp_shard"] > 1 or folded["dp_shard"] == 1
        assert (
            degrees["dp_replicate"] > 1 or degrees["dp_shard"] == 1 or folded["dp_replicate"] == 1
        )


@pytest.mark.parametrize("seed", range(200))
def test_ranks_of_a_fold_keep_their_relations(seed: int) -> None:
    draw = random.Random(seed)
    world = draw.randint(2, 24)
    names = "abcd"[: draw.randint(1, 4)]
    placements = {}
    for name in names:
        same = draw.choice([*placements, None])
        chosen = draw.sample(range(world), draw.randint(1, world))
        placements[name] = placements[same] if same is not None else sorted(chosen)
    cells = {
        frozenset(name for name in names if rank in placements[name])
        for rank in {rank for ranks in placements.values() for rank in ranks}
    }
    for size in range(1, world + 1):
        folded = fold_ranks(placements, size)
        for name, ranks in folded.items():
            assert ranks and list(ranks) == sorted(set(ranks)) and ranks[-1] < size
            assert len(ranks) <= len(placements[name]) or len(cells) > size
        for one, other in combinations(names, 2):
            before, after = (
                [set(kind[name]) for name in (one, other)] for kind in (placements, folded)
            )
            if before[0] == before[1]:
                assert after[0] == after[1]
            elif before[0] & before[1]:
                assert after[0] & after[1]
            if len(cells) > size:
                continue  # some must share ranks
            assert bool(before[0] & before[1]) == bool(after[0] & after[1])
            assert (before[0] <= before[1]) == (after[0] <= after[1])


def test_a_tiny_model_can_be_cut_by_its_limits() -> None:
    source = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 512,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-6,
    }
    model = tiny(parse_config(source))
    assert model.moe is not None
    limits = {
        "tp": model.attention.num_kv_heads,
        "pp": model.num_layers,
        "ep": model.moe.num_experts,
    }
    assert limits == TINY_LIMITS
    degrees = {"pp": 4, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 8, "ep": 32}
    assert fold_degrees(degrees, 128, limits=TINY_LIMITS) == {
        "pp": 2,
        "dp_replicate": 1,
        "dp_shard": 32,
        "cp": 1,
        "tp": 2,
        "ep": 8,
    }
