"""Judges: scores by generated answers, on ranks of their own or on the policy's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_cases import make_peft
from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from heard import Heard
from spmdrl.batch import Batch
from spmdrl.config.load import load_config
from spmdrl.data.order import home_rows
from spmdrl.distributed.reduce import gather_tables
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.asking import PairJudge
from spmdrl.roles.generation_rows import Generation
from spmdrl.roles.handles import Policy, Rollout
from spmdrl.roles.judge import Judge
from spmdrl.rollout.protocol import SamplingParams
from spmdrl.run.assembled import Assembly
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.run.assembly.factories import make_scorer
from spmdrl.run.inputs import read_inputs
from spmdrl.world import World
from tiny_model import make_tiny_model

READERS = Path(__file__).parents[1] / "judging.py"
JUDGE: dict[str, Any] = {
    "template": "{prompt}|{response}",
    "pair_template": "{prompt}|{response_a}|{response_b}",
    "parse": f"{READERS}:weight",
    "pair_parse": f"{READERS}:winner",
    "max_tokens": 12,
    "failed": -1.0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judge")
    make_tiny_model(root / "model")
    make_tiny_model(root / "judge", "Qwen2ForCausalLM", seed=5, num_hidden_layers=1)
    questions(root / "questions.jsonl")
    return root


def write(root: Path, name: str, /, judge: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A run in which a judge with a model of its own gives the only reward."""
    own = {"kind": "judge", "model": str(root / "judge"), "judge": {**JUDGE, **(judge or {})}}
    given: dict[str, Any] = {
        "roles": {"policy": {}, "rollout": {}, "judge": own},
        "rewards": [{"role": "judge", "weight": 0.5}],
        "data": {
            "prompts_per_step": 4,
            "group_size": 2,
            "train": {"source": str(root / "questions.jsonl"), "max_tokens": 96},
        },
        **sections,
    }
    return write_config(root / f"{name}.yaml", root / "model", root / name, **given)


def made(world: World, path: str, words: list[str]) -> tuple[Any, Any, Assembly]:
    config = load_config(path, words)
    inputs = read_inputs(config)
    models = open_models(config)
    assembly = assemble(config, world, models, inputs.texts, judges=inputs.judge_texts)
    return config, inputs, assembly


def sampled(world: World, inputs: Any, assembly: Assembly) -> Batch:
    rollout = assembly.roles["rollout"]
    assert isinstance(rollout, Rollout)
    assembly.syncs["policy", "rollout"].run()
    generation = Generation(
        seed=0, step=0, group_size=2, sampling=SamplingParams(temperature=1.0, max_tokens=8)
    )
    return rollout.generate(home_rows(world, inputs.train.subset(range(12))), generation)


def scored(
    world: World,
    path: str,
    words: list[str],
    between: Callable[[Assembly], None] = lambda assembly: None,
) -> torch.Tensor:
    """Table of the world's scores: prompt, sample, score, failed, reward, verdict; asked twice, as
    weights that move come back.

    Args:
        between: called before they are asked again.
    """
    config, inputs, assembly = made(world, path, words)
    assert ("policy", "judge") not in assembly.syncs
    batch = sampled(world, inputs, assembly)
    scorer = make_scorer(config, inputs, assembly, None)
    first = scorer.score(batch)
    between(assembly)
    again = scorer.score(batch)
    names = ("prompt_ids", "sample_index", "reward/judge", "reward/judge_failed", "rewards")
    assert all(torch.equal(first[name], again[name]) for name in names)
    asked = scorer.roles[0].role
    pairs = torch.arange(len(first)).reshape(-1, 2)
    verdicts = PairJudge(asked).verdicts(first, pairs[:, 0], pairs[:, 1])
    own = torch.stack([first[name].double() for name in names], dim=1)
    own = torch.cat([own, verdicts.preferred.repeat_interleave(2).unsqueeze(1)], dim=1)
    table = torch.cat(gather_tables(own))
    return table[torch.argsort(table[:, 0] * 10 + table[:, 1])]


PLACES: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "both ranks": (2, []),
    "a rank of its own": (
        2,
        ["roles.policy.ranks=0", "roles.rollout.ranks=0", "roles.judge.ranks=1"],
    ),
    "split": (2, ["roles.judge.tp=2"]),
    "moved": (1, ["memory_gb=0.05", "roles.judge.residency={weights: host, kv_cache: drop}"]),
}


def test_a_judge_gives_the_same_scores_anywhere(root: Path) -> None:
    path = write(root, "anywhere")
    found = {
        name: run_ranks(scored, size, str(path), words)[0] for name, (size, words) in PLACES.items()
    }
    wanted = found["one rank"]
    assert len(wanted) == 24 and len(wanted[:, 2].unique()) > 4
    failed = wanted[:, 3] == 1
    assert 0 < failed.sum() < 12 and wanted[failed, 2].eq(-1).all(), "failed is their score"
    assert wanted[:, 4].tolist() == (0.5 * wanted[:, 2]).tolist(), "weighted"
    assert len(wanted[:, 5].unique()) > 1
    for name, table in found.items():
        assert torch.equal(table, wanted), name


def opinions(world: World, path: str, places: list[list[str]]) -> list[torch.Tensor]:
    """`scored` at several places; a judge over the policy's base has no tensors but its adapter's,
    and what the policy learns is nothing to it.
    """
    return [scored(world, path, words, changes_policy) for words in places]


def changes_policy(assembly: Assembly) -> None:
    """Add noise to the policy's adapter; a judge's engine computes with the policy's base."""
    policy, judge = assembly.roles["policy"], assembly.roles["judge"]
    assert isinstance(policy, Policy) and policy.backend is not None
    assert isinstance(judge, Judge) and judge.engine is not None
    there, parts = policy.backend.local_tensors(), assembly.parts
    own = judge.engine.local_tensors()
    added = {name for name in own if "lora" in name}
    shares = assembly.specs["judge"].base is not None
    assert bool(added) == shares
    for name, (tensor, _) in own.items():
        same = name in there and tensor.data_ptr() == there[name][0].data_ptr()
        assert same == (shares and name not in added), name
    if shares:
        assert parts.registry.size(("judge", "weights")) == sum(
            own[name][0].numel() * 4 for name in added
        )
    for name, (tensor, _) in there.items():
        if "lora" in name:
            parts.view(tensor).add_(1.0)


@pytest.mark.full
def test_a_judge_over_the_policys_base_scores_as_its_merged_model_does(root: Path) -> None:
    make_peft(root / "opinion", root / "model", seed=2)
    own = {"kind": "judge", "adapter": {"path": str(root / "opinion")}, "judge": JUDGE}
    roles = {"policy": {"adapter": {"rank": 3}}, "rollout": {}, "judge": own}
    path = str(write(root, "opinions", roles=roles))
    base, moved = ["roles.judge.base=policy"], PLACES["moved"][1]
    merged, alone, away = run_ranks(opinions, 1, path, [[], base, [*base, *moved]], timeout_s=300)[
        0
    ]
    assert len(merged) == 24 and len(merged[:, 2].unique()) > 4
    cut = ["roles.policy.dp_shard=2", "roles.rollout.tp=2", "roles.judge.tp=2"]
    both, split = run_ranks(opinions, 2, path, [base, [*base, *cut]], timeout_s=300)[0]
    for name, table in {"alone": alone, "away": away, "both": both, "split": split}.items():
        assert torch.equal(table, merged), name


def several(world: World, path: str) -> tuple[list[float], list[float], list[str]]:
    """Scores of three drawn answers each, those of single ones, and what was said of failures."""
    heard = Heard()
    logging.getLogger("spmdrl.rewards.asking").addHandler(heard)
    found = []
    words = ["roles.judge.judge.temperature=1"]
    for more in (["roles.judge.judge.num_samples=3"], []):
        config, inputs, assembly = made(world, path, [*words, *more])
        scored = make_scorer(config, inputs, assembly, None).score(sampled(world, inputs, assembly))
        found.append(scored["reward/judge"].tolist())
    return found[0], found[1], heard.lines


def test_several_answers_are_drawn_and_have_a_mean(root: Path) -> None:
    path = write(root, "several", {"parse": rf"{READERS}:weight", "failed": 0.0})
    (three, one, said), (_, _, silent) = run_ranks(several, 2, str(path))
    assert any(abs(10 * score - round(10 * score)) > 0.01 for score in three), "thirds"
    assert all(abs(10 * score - round(10 * score)) < 1e-3 for score in one)
    assert len(set(one)) > 2 and silent == [], "the first rank tells for all"
    assert all("roles.judge: nothing could be read from the answers to" in line for line in said)


def too_long(world: World, path: str) -> tuple[list[float], list[str]]:
    heard = Heard()
    logging.getLogger("spmdrl.rewards.asking").addHandler(heard)
    config, inputs, assembly = made(world, path, ["roles.judge.judge.max_prompt_tokens=8"])
    scored = make_scorer(config, inputs, assembly, None).score(sampled(world, inputs, assembly))
    return scored["reward_failed"].tolist(), heard.lines


def test_questions_that_are_too_long_are_counted_and_told(root: Path) -> None:
    path = write(root, "long")
    ((failed, said),) = run_ranks(too_long, 1, str(path))
    assert failed == [1.0] * 24
    (line,) = said
    assert "24 of 24 questions" in line and "more than 8: raise roles.judge.judge.max_pro" in line


ONLINE: dict[str, Any] = {
    "flow": "online_dpo",
    "steps": 2,
    "preference": {"judge": "judge"},
    "rewards": [],
}


def online(root: Path, name: str, words: list[str], size: int, **sections: Any) -> list[Any]:
    path = write(root, name, **{**ONLINE, **sections})
    words = ["roles.reference={}", *words]
    run_ranks(run_configs, size, [(str(path), words)], str(root))
    return [r for r in read_metrics(root / name / "metrics.jsonl") if "judge/pairs" in r]


def test_online_dpo_with_a_judge_of_pairs_trains(root: Path) -> None:
    """The judge compares all samples of a prompt, or the pairs that a reward has chosen."""
    records = online(root, "pairs", ["roles.judge.ranks=1", "data.group_size=3"], 2)
    assert len(records) == 2
    for record in records:
        # three samples make three pairs, unless some are the same
        assert 6 <= record["judge/pairs"] <= 12 and 0 < record["pairs"] <= 4
        assert 0 <= record["judge/tie_share"] < 1 and -1 <= record["judge/first_bias"] <= 1
        assert record["judge/disagree_share"] <= record["judge/tie_share"]
        assert record["grad_norm"] > 0 and "judge/reversed_share" not in record
    rewards = [{"function": f"{Path(__file__).parents[1] / 'toy_rewards.py'}:even_length"}]
    kept, dropped = (
        online(root, ties, [f"preference.ties={ties}"], 1, rewards=rewards)
        for ties in ("reward", "drop")
    )
    first, other = kept[0], dropped[0]
    left = other.get("pairs", 0.0)  # of a step without pairs there is none
    assert first["judge/pairs"] == other["judge/pairs"] == first["pairs"] > left
    assert first["judge/tie_share"] == pytest.approx(1 - left / other["judge/pairs"])
    assert "judge/reversed_share" in first
