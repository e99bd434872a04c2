"""RLOO, REINFORCE++, GSPO, CISPO and distillation: what they compute, the same on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.flows.advantage_terms import token_advantages
from spmdrl.world import World
from sweeps import asked, swept
from tiny_model import make_tiny_model

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rloo": {
        "advantage": "rloo",
        "loss_mean": "fixed_length",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.1,
    },
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.1,
    },
    "reinforce_pp_baseline": {
        "advantage": "reinforce_pp_baseline",
        "kl_estimator": "k2",
        "kl_coef": 0.1,
    },
    "gspo": {
        "policy_loss": "gspo",
        "loss_mean": "sequence_mean",
        "clip_low": 3e-3,
        "clip_high": 4e-3,
    },
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 0.1},
    "distilled": {"teacher_coef": 1.0},
}
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {
        "dp2": ["train.microbatch_tokens=60"],
        "tp2": ["roles.policy.tp=2", "roles.rollout.tp=2"],
    },
}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """(case, layout) -> the metrics of a step of four optimizer steps."""
    root = tmp_path_factory.mktemp("family")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=1)
    found, wanted = {}, asked(request, "name", "layout")
    for size, layouts in LAYOUTS.items():
        configs, keys = [], []
        for name, algorithm in CASES.items():
            roles: dict[str, Any] = {"policy": {}, "rollout": {}}
            if algorithm.get("kl_coef"):
                roles["reference"] = {"model": str(root / "other")}
            settings: dict[str, Any] = {"roles": roles, "algorithm": algorithm}
            if name == "distilled":
                settings |= {"rewards": [], "data": {"group_size": 1}}
                roles["teacher"] = {"model": str(root / "other")}
            for layout, words in layouts.items():
                if (name, layout) not in wanted and layout != "one":
                    continue
                path = write_config(
                    root / f"{name}_{layout}.yaml",
                    root / "model",
                    root / f"{name}_{layout}",
                    steps=1,
                    train={"lr": 1e-3, "microbatch_tokens": 300, "epochs": 2, "num_minibatches": 2},
                    **settings,
                )
                configs.append((str(path), words))
                keys.append((name, layout))
        if not configs:
            continue
        answers = run_ranks(run_configs, size, configs, str(root), timeout_s=300)
        found |= {key: records[0] for key, records in zip(keys, answers[0], strict=True)}
    return found


# what is summed over the world, each way; tensor-parallel ranks sum nothing of an algorithm's own
BRIEF = [("reinforce_pp", "dp2"), ("rloo", "dp2"), ("distilled", "tp2")]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "layout"), swept([(n, layout) for n in CASES for layout in LAYOUTS[2]], BRIEF)
)
def test_metrics_equal_one_rank(runs, name, layout):
    one, other = runs[name, "one"], runs[name, layout]
    for metric in ("loss", "grad_norm", "entropy", "kl", "ratio", "clip_fraction", "reward"):
        assert other[metric] == pytest.approx(one[metric], rel=2e-4, abs=2e-5), metric
    assert one["grad_norm"] > 0
    if name == "distilled":
        assert other["teacher_kl"] == pytest.approx(one["teacher_kl"], rel=1e-4)


@pytest.mark.full
def test_each_is_an_algorithm_of_its_own(runs):
    losses = {name: runs[name, "one"]["loss"] for name in CASES}
    assert len({round(loss, 9) for loss in losses.values()}) == len(losses), losses
    assert runs["distilled", "one"]["teacher_kl"] > 0.1


def rows() -> Batch:
    """Five groups of three responses, with log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (15,), generator=generator).tolist()
    batch = from_rows(
        [[1, 2] + [3] * length for length in lengths],
        rows={
            "prompt_ids": torch.arange(5).repeat_interleave(3),
            "rewards": torch.randn(15, generator=generator),
            "response_lengths": torch.tensor(lengths),
        },
    )
    count = batch.num_tokens
    mask = torch.cat([torch.tensor([False] * 2 + [True] * length) for length in lengths])
    names = ("old_logprobs", "ref_logprobs", "teacher_logprobs")
    columns = {name: -torch.rand(count, generator=generator) for name in names}
    return batch.with_columns(tokens={"loss_mask": mask, **columns})


def advantages_of(world: World, algorithm: dict[str, Any]) -> torch.Tensor:
    batch = rows()
    mine = batch["prompt_ids"] % world.size == world.rank
    own = batch.select(mine.nonzero().flatten())
    return token_advantages(own, AlgorithmSection.model_validate(algorithm), max_tokens=10)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_is_over_the_world(name, ranks):
    settings = {"advantage": name, "kl_in": "reward", "kl_coef": 0.3, "kl_estimator": "k1"}
    if name == "reinforce_pp_baseline":
        settings["kl_in"] = "loss"
    batch = rows()
    expected: list[list[float]] = []
    for row in batch.split_rows():
        group = batch["rewards"][batch["prompt_ids"] == row["prompt_ids"]].double()
        size = int(row["response_lengths"])
        gaps = (row["old_logprobs"] - row["ref_logprobs"]).double().tolist()[2:]
        score = float(row["rewards"])
        if name == "reinforce_pp":
            expected.append([score - 0.3 * sum(gaps[t:]) for t in range(size)])
        else:
            expected.append([score - group.mean().item()] * size)
    flat = torch.tensor([value for values in expected for value in values]).double()
    flat = (flat - flat.mean()) / flat.std(correction=0)
    parts = run_ranks(advantages_of, ranks, settings)
    for rank, found in enumerate(parts):
        mine = batch["prompt_ids"] % ranks == rank
        tokens = mine.repeat_interleave(batch.lengths)
        wanted = torch.zeros(batch.num_tokens).double()
        wanted[batch["loss_mask"]] = flat
        torch.testing.assert_close(found.double(), wanted[tokens], rtol=1e-5, atol=1e-6)


def flat_advantages(world: World) -> float:
    batch = rows().with_columns(rows={"rewards": torch.full((15,), 0.1)})
    algorithm = AlgorithmSection(advantage="reinforce_pp")
    return float(token_advantages(batch, algorithm, max_tokens=10).abs().max())


def test_equal_rewards_give_exactly_no_advantage():
    assert run_ranks(flat_advantages, 1) == [0.0]


def test_the_teachers_share_is_the_reverse_kl_of_each_token():
    batch = rows()
    (alone,) = run_ranks(advantages_of, 1, {"advantage_std": False})
    (both,) = run_ranks(advantages_of, 1, {"advantage_std": False, "teacher_coef": 0.5})
    gap = (batch["teacher_logprobs"] - batch["old_logprobs"]) * batch["loss_mask"]
    torch.testing.assert_close(both - alone, 0.5 * gap, rtol=1e-4, atol=1e-6)


def test_group_size_1_is_enough_where_nothing_is_compared(tmp_path: Path):
    make_tiny_model(tmp_path / "model")
    config = write_config(
        tmp_path / "c.yaml",
        tmp_path / "model",
        tmp_path / "run",
        steps=1,
        data={"group_size": 1, "prompts_per_step": 8},
        algorithm={"advantage": "reinforce_pp"},
    )
    (records,) = run_ranks(run_configs, 1, [(str(config), [])], str(tmp_path))[0]
    assert records[0]["grad_norm"] > 0
