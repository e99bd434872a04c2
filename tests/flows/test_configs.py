"""Every shipped configuration runs two steps on 1 and on 2 ranks with a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from adapter_cases import make_peft
from flow_cases import run_configs
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.files.hf import open_checkpoint, open_model
from spmdrl.models.sharding import Slice
from spmdrl.placement import place_roles
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

FILES = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yaml"))
CONFIGS = [path for path in FILES if path.parent.name != "methods"]
SAMPLED = ("grpo", "ppo")
"""Flows that compare the trainer's log-probabilities with the engine's."""
QUESTION = "Tom has {0} apples and buys {1} more. How many apples has he now?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory and a data file that stand in for the real ones."""
    root = tmp_path_factory.mktemp("configs")
    make_tiny_model(root / "model", max_position_embeddings=16384)
    make_peft(root / "judge", root / "model", head="score")
    make_tiny_model(root / "moe", "Qwen3MoeForCausalLM", max_position_embeddings=16384)
    rows = [
        {
            "question": QUESTION.format(i, i + 1),
            "prompt": QUESTION.format(i, i + 1),
            "answer": f"He adds.\n#### {2 * i + 1}",
            "chosen": f"He has {2 * i + 1}.",
            "rejected": "Many.",
        }
        for i in range(300)
    ]
    for name, part in (("data", rows[:280]), ("test", rows[280:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def overrides_for(path: Path, root: Path, run_dir: Path) -> list[str]:
    """Small batches and short answers; placement, algorithm and packing stay as shipped."""
    words = [
        "steps=2",
        f"run_dir={run_dir}",
        f"model.path={root / ('moe' if 'moe' in path.stem else 'model')}",
        "model.tiny=true",
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
        f"roles.{name}.model={root / 'model'}"
        for name in ("teacher", "judge")
        if name in shipped.roles
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
        words += [f"roles.{role}.model={root / 'model'}" for role in ("reward", "value")]
        words.append("algorithm.value_warmup_steps=0")
    adapters = [role.adapter for role in shipped.roles.values() if role.adapter is not None]
    if adapters:
        words.append("checkpoint.export_as=merged")
    if any(adapter.path for adapter in adapters):  # it fits no toy model
        words += [f"roles.reward.adapter.path={root / 'judge'}", "model.tiny=false"]
    if not shipped.data.train.source.startswith("reasoning_gym:"):
        words.append(f"data.train.source={root / 'data.jsonl'}")
    return words


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_configs_run_on_few_ranks(place, ranks):
    runs = []
    for path in CONFIGS:
        run_dir = place / f"{path.parent.name}_{path.stem}_{ranks}"
        runs.append((str(path), overrides_for(path, place, run_dir)))
    results = run_ranks(run_configs, ranks, runs, str(place), timeout_s=300)[0]
    for (path, words), records in zip(runs, results, strict=True):
        assert len(records) == 2, path
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
