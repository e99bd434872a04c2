"""Every shipped configuration runs two steps on 1 and on 2 ranks: with a tiny random model, and
folded with small models of its own; folded, it gives what it gives on the ranks that it is for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from adapter_cases import make_peft
from flow_cases import run_configs
from harness import run_ranks
from metrics_page import undocumented
from replay import assert_same_samples
from spmdrl.commands.check import check
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.files.hf import open_checkpoint, open_model
from spmdrl.models.tensors import Slice
from spmdrl.placement import place_roles
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

FILES = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yaml"))
CONFIGS = [path for path in FILES if path.parent.name not in ("methods", "recipes")]
RECIPES = [path for path in FILES if path.parent.name == "recipes"]
SAMPLED = ("grpo", "ppo")
"""Flows that compare the trainer's log-probabilities with the engine's."""
QUESTION = "Tom has {0} apples and buys {1} more. How many apples has he now?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory and a data file that stand in for the real ones."""
    root = tmp_path_factory.mktemp("configs")
    # four key/value heads, so that tp=4 divides them
    make_tiny_model(root / "model", max_position_embeddings=16384, num_key_value_heads=4)
    make_tiny_model(root / "scalar", head="score", max_position_embeddings=16384)
    make_peft(root / "judge", root / "model", head="score")
    experts = ("Qwen3MoeForCausalLM",)
    make_tiny_model(root / "moe", *experts, max_position_embeddings=16384)
    make_tiny_model(root / "moe_scalar", *experts, head="score", max_position_embeddings=16384)
    rows = [
        {
            "question": QUESTION.format(i, i + 1),
            "prompt": QUESTION.format(i, i + 1),
            "answer": f"He adds.\n#### {2 * i + 1}",
            "chosen": f"He has {2 * i + 1}.",
            "rejected": "Many.",
            "messages": [
                {"role": "user", "content": QUESTION.format(i, i + 1)},
                {"role": "assistant", "content": f"{2 * i + 1} apples."},
            ],
        }
        for i in range(300)
    ]
    for name, part in (("data", rows[:280]), ("test", rows[280:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


SCORING = ("reward", "value")
TINY, FOLD = "model.tiny=true", "fold=true"


def overrides_for(path: Path, root: Path, run_dir: Path, switch: str) -> list[str]:
    """Small batches and short answers; placement, algorithm and packing stay as shipped."""
    words = [
        "steps=2",
        f"run_dir={run_dir}",
        f"model.path={root / ('moe' if 'moe' in path.stem else 'model')}",
        switch,
        "data.prompts_per_step=4",
        "data.group_size=4",
        "sampling.max_tokens=8",
        "evaluation.before=false",
        "evaluation.after=false",
        "checkpoint.export=true",
        "train.warmup_steps=0",
        "train.lr=1e-3",
    ]
    shipped = load_config(path)
    flow = shipped.flow
    words += [
        f"roles.{name}.model={root / kind}"
        for name, kind in (("teacher", "model"), ("reward", "scalar"))
        if name in shipped.roles and flow not in ("ppo", "reward_model")
    ]
    for name, given in shipped.evaluation.sets.items():
        key = f"evaluation.sets.{name}"
        words.append(f"{key}.data.source={root / 'test.jsonl'}")
        words += [f"{key}.data.share=all"] if "share" in given["data"] else []
        words += [f"{key}.against=null"] if "against" in given else []
    words += ["evaluation.against=null"] if shipped.evaluation.against else []
    if flow == "grpo":
        words.append("algorithm.overlong_buffer=4")
        reward = Path(__file__).parents[1] / "toy_rewards.py"
        words.append(f"rewards=[{{function: '{reward}:even_length'}}]")
    if flow == "ppo":
        scalar = "moe_scalar" if "moe" in path.stem else "scalar"  # what ep divides
        kinds = {r: scalar if shipped.roles[r].base is None else "model" for r in SCORING}
        words += [f"roles.{role}.model={root / kind}" for role, kind in kinds.items()]
        words.append("algorithm.value_warmup_steps=0")
    adapters = [role.adapter for role in shipped.roles.values() if role.adapter is not None]
    if adapters:
        words.append("checkpoint.export_as=merged")
    if any(adapter.path for adapter in adapters):  # it fits no toy model
        words += [f"roles.reward.adapter.path={root / 'judge'}", "model.tiny=false"]
    if not shipped.data.train.source.startswith("reasoning_gym:"):
        words.append(f"data.train.source={root / 'data.jsonl'}")
    return words


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "switch"),
    [
        (2, TINY),
        (1, TINY),
        (1, FOLD),
        (2, FOLD),
    ],
)
def test_configs_run_on_few_ranks(place, ranks, switch):
    check_runs(place, CONFIGS, ranks, switch)


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "switch"), [(2, TINY), (1, FOLD), (2, FOLD)])
def test_recipes_run_on_few_ranks(place, ranks, switch):
    check_runs(place, RECIPES, ranks, switch)


SAMPLE = (*("gsm8k_tp", "distill", "online_dpo", "ppo"),)
"""Configurations with axes, a teacher, pairs; experts and adapters are among the folded."""


def test_a_sample_of_the_configs_runs_on_two_ranks(place):
    paths = [
        path
        for path in CONFIGS
        if path.stem in SAMPLE and path.parent.name not in ("preferences", "tools")
    ]
    assert len(paths) == len(SAMPLE)
    check_runs(place, paths, 2, TINY)


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(CONFIGS[::4], id="sample"),
        pytest.param(CONFIGS, id="all", marks=pytest.mark.full),
    ],
)
def test_every_config_would_start_on_two_ranks(place, tmp_path, paths):
    for path in paths:
        check(load_config(path, overrides_for(path, place, tmp_path / path.stem, TINY)), 2)


def test_a_sample_of_the_configs_is_folded(place):
    names = ("gsm8k_disjoint", "gsm8k_moe", "ppo_lora")
    check_runs(place, [path for path in CONFIGS if path.stem in names], 1, FOLD)


def check_runs(place: Path, paths: list[Path], ranks: int, switch: str) -> None:
    """That each configuration completes two steps, learns, and is cut as far as the ranks allow."""
    runs = []
    for path in paths:
        run_dir = place / f"{path.parent.name}_{path.stem}_{ranks}_{switch}"
        runs.append((str(path), overrides_for(path, place, run_dir, switch)))
    results = run_ranks(run_configs, ranks, runs, str(place), timeout_s=300)[0]
    for (path, words), records in zip(runs, results, strict=True):
        assert len(records) == 2, path
        assert undocumented(records) == [], "docs/metrics.md lacks a row of these"
        for record in records:
            assert math.isfinite(record["loss"]), path
            if load_config(path, words).flow in SAMPLED:
                assert record["rollout_gap_max"] < 1e-4, path
        assert max(r["grad_norm"] for r in records) > 0, path
        config = load_config(path, words)
        if ranks == 2 and uses_more_than_data_parallelism(config):
            spread = [p.degrees for p in place_roles(config, 2).values() if len(p.ranks) > 1]
            kept = [max(d["tp"], d["cp"], d["dp_shard"]) for d in spread]
            assert not kept or max(kept) > 1, path
        assert weights_changed(config), path


SHARED = ["algorithm.importance_cap=2.0", "environment=replay:ReplayEnvironment"]
UNFOLDED: dict[str, list[str]] = {
    "gsm8k_tp": [],
    "long_context": [],
    "gsm8k_disjoint": ["roles.policy.ranks=0-1", "roles.reference.ranks=2-3"],  # of 16 ranks
}
"""Configuration -> what makes it one for 4 ranks."""


@pytest.mark.full
@pytest.mark.parametrize("name", UNFOLDED)
def test_folded_and_unfolded_runs_give_the_same_tokens_and_losses(place, tmp_path, name):
    path = next(path for path in CONFIGS if path.stem == name)
    found = {}
    for ranks, run in ((4, "unfolded"), (1, "folded")):
        words = [*overrides_for(path, place, tmp_path / run, FOLD), *SHARED, *UNFOLDED[name]]
        words += [] if ranks == 1 else ["fold=false"]
        (found[run],) = run_ranks(run_configs, ranks, [(str(path), words)], str(tmp_path))[0]
    for step, (a, b) in enumerate(zip(found["unfolded"], found["folded"], strict=True)):
        for metric in ("loss", "grad_norm", "ref_kl", "entropy", "reward"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert_same_samples(tmp_path, "folded", step)
    assert found["folded"][1]["ref_kl"] > 0 and len(found["folded"]) == 2


def uses_more_than_data_parallelism(config: Config) -> bool:
    return any(r.tp > 1 or r.cp > 1 or r.dp_shard != 1 for r in config.roles.values())


def weights_changed(config: Config) -> bool:
    """Whether the exported model differs from the random one that the run began with."""
    _, begun = open_model(config.model.path, use_tiny=config.model.tiny, seed=config.seed)
    exported = open_checkpoint(Path(config.run_dir) / "model")
    for name in begun.names & exported.names:
        shape = begun.shape(name)
        whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        if not torch.equal(begun.read(whole), exported.read(whole)):
            return True
    return False


PAPERS: dict[str, dict[str, object]] = {
    # DeepSeekMath 2402.03300; the recipe's KL is smaller than the paper's 0.04
    "gsm8k": {"advantage": "grpo", "advantage_std": True, "kl_in": "loss", "kl_estimator": "k3"},
    # 2503.20783, section 3.2 and table 6: neither deviation nor length nor KL
    "dr_grpo": {"advantage_std": False, "loss_mean": "fixed_length", "kl_coef": 0, "clip_low": 0.2},
    # 2503.14476, eqs. 8 and 12
    "dapo": {"loss_mean": "token_mean", "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0},
    # 2507.18071, eqs. 5 and 7 and section 5.1
    "gspo": {"loss_mean": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0},
    # 2506.13585, section 3.1: no bound from below, a mean over tokens
    "cispo": {"policy_loss": "cispo", "clip_low": 1, "loss_mean": "token_mean", "kl_coef": 0},
    # 2402.14740: the KL of a response in its reward, a sum over its tokens
    "rloo": {"advantage": "rloo", "kl_in": "reward", "kl_estimator": "k1"},
    # 2501.03262: the KL of a token in its reward (k1); with baseline a loss of its own (k2)
    "reinforce_pp": {"advantage": "reinforce_pp", "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_pp_baseline": {"kl_in": "loss", "kl_estimator": "k2", "loss_mean": "token_mean"},
}


@pytest.mark.parametrize("name", PAPERS)
def test_an_algorithm_is_as_its_paper_has_it(name):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    found = {key: getattr(config.algorithm, key) for key in PAPERS[name]}
    assert found == PAPERS[name]
    assert ("reference" in config.roles) == (config.algorithm.kl_coef > 0)
    # without clipping (RLOO) there is one update of what was sampled
    assert name != "rloo" or config.train.num_minibatches * config.train.epochs == 1


def test_preference_losses_are_as_their_papers_have_them():
    root = Path(__file__).parents[2] / "configs"
    found = {n: load_config(root / f"{n}.yaml").preference for n in ("dpo", "kto", "orpo", "simpo")}
    # 2305.18290 (appendix B), 2402.01306 (section 4.2), 2403.07691 (section 5.1)
    assert [found[n].beta for n in ("dpo", "kto", "orpo")] == [0.1] * 3
    assert found["kto"].kto_weights == (1.0, 1.0)
    # 2405.14734, table 8: beta 2 to 2.5, gamma half of it
    assert (found["simpo"].beta, found["simpo"].margin) == (2.0, 1.0)
