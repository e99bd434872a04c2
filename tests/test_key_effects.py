"""Each key of the configuration has an effect, or is refused, or is warned of.

`ROWS` has a line for every key of `known_keys()`: a configuration where it matters, the words that
change it, and where the effect is looked for. A new key needs a new line: the test that fails says
how to write one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flow_cases import write_config
from harness import run_ranks
from spmdrl.assemble import train_options
from spmdrl.config import Config
from spmdrl.config_doubts import doubts
from spmdrl.config_files import load_config
from spmdrl.config_keys import known_keys
from spmdrl.config_sets import held_out_sets, train_sources
from spmdrl.engines import _native_options
from spmdrl.explain import explain
from spmdrl.flows.inputs import prompt_source, reward_specs, training_sampling
from spmdrl.flows.preference_terms import preference_settings
from spmdrl.flows.start import train
from spmdrl.launch import World
from spmdrl.models.config import read_config
from spmdrl.rewards.server import start_reward_server
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclasses.dataclass(frozen=True)
class Row:
    """Args:
    base: a configuration of `BASES`.
    words: what changes in it; the key's own is the last.
    where: `plan` (what is derived from the configuration, without a run), `run` (metrics, files or
        error of a tiny run: marked `full`), `refused` or `doubt` (a message that names the key), or
        `FILE::TEST` that holds the effect.
    """

    base: str
    words: tuple[str, ...]
    where: str


def row(base: str, where: str, *words: str) -> Row:
    return Row(base, words, where)


KL = ("roles.reference={}", "algorithm.kl_coef=0.1")
HELD = "evaluation.held_out=4"
SAVED = ("steps=3", "checkpoint.every=1", "checkpoint.keep_last=1")
NANS = f"rewards.0.function={Path(__file__).parent / 'bad_rewards.py'}:sometimes_nan"

ROWS: dict[str, Row] = {
    "flow": row("grpo", "plan", "flow=sft"),
    "environment": row("grpo", "run", "environment=nowhere:Environment"),
    "trainer": row("grpo", "run", "trainer=nowhere:Trainer"),
    "seed": row("grpo", "run", "seed=4"),
    "steps": row("grpo", "plan", "steps=9"),
    "run_dir": row("grpo", "run", "run_dir=/dev/null/x"),
    "lag": row("grpo", "run", "algorithm.importance_cap=2.0", "lag=1"),
    "device": row("grpo", "tests/test_launch.py", "device=cuda"),
    "memory_gb": row("grpo", "run", "memory_gb=1e-6"),
    "timeout_s": row("grpo", "tests/test_launch.py", "timeout_s=5"),
    "limits": row("grpo", "tests/flows/test_endings.py", "limits={update: 5}"),
    "model.path": row("grpo", "run", "model.path=nowhere"),
    "model.tiny": row("grpo", "run", "model.tiny=true"),
    "model.dtype": row("grpo", "plan", "model.dtype=bfloat16"),
    "model.attention": row("grpo", "plan", "model.attention=sdpa"),
    "roles.NAME.kind": row("grpo", "plan", "roles.policy.kind=reference"),
    "roles.NAME.model": row("grpo", "run", "roles.policy.model=nowhere"),
    "roles.NAME.head": row("grpo", "refused", "roles.policy.head=zero"),
    "roles.NAME.trained": row("grpo", "plan", "roles.policy.trained=false"),
    "roles.NAME.train": row("grpo", "plan", "roles.policy.train={lr: 0.5}"),
    "roles.NAME.freeze": row("grpo", "plan", "roles.policy.freeze=['*norm*']"),
    "roles.NAME.memory": row("grpo", "plan", "roles.rollout.memory={weights: drop}"),
    "roles.NAME.retokenize": row("grpo", "refused", "roles.policy.retokenize=true"),
    "roles.NAME.options": row("grpo", "tests/test_custom_role.py", "roles.policy.options={a: 1}"),
    "roles.NAME.ranks": row("grpo", "plan", "roles.rollout.ranks=0"),
    "roles.NAME.device": row("grpo", "tests/test_placement.py", "roles.policy.device=cpu"),
    "roles.NAME.dp_replicate": row("grpo", "plan", "roles.policy.dp_replicate=3"),
    "roles.NAME.dp_shard": row("grpo", "plan", "roles.policy.dp_shard=2"),
    "roles.NAME.cp": row("grpo", "plan", "roles.policy.cp=2"),
    "roles.NAME.tp": row("grpo", "plan", "roles.policy.tp=2"),
    "roles.NAME.ep": row("grpo", "plan", "roles.policy.ep=2"),
    "roles.NAME.pp": row("grpo", "refused", "roles.policy.pp=2"),
    "roles.NAME.megatron": row("grpo", "refused", "roles.policy.megatron={sp: true}"),
    "roles.NAME.tp_across_nodes": row("grpo", "tests/test_placement.py", "roles.policy.tp=2"),
    "train.backend": row("grpo", "run", "train.backend=megatron"),
    "train.epochs": row("grpo", "plan", "train.epochs=2"),
    "train.num_minibatches": row("grpo", "plan", "train.num_minibatches=2"),
    "train.microbatch_tokens": row("grpo", "plan", "train.microbatch_tokens=64"),
    "train.share_prompts": row("grpo", "plan", "train.share_prompts=false"),
    "train.recompute": row("grpo", "plan", "train.recompute=layer"),
    "train.lr": row("grpo", "plan", "train.lr=0.5"),
    "train.schedule": row("grpo", "plan", "train.schedule=linear"),
    "train.warmup_steps": row("grpo", "plan", "train.warmup_steps=2"),
    "train.min_lr_ratio": row("grpo", "doubt", "train.min_lr_ratio=0.5"),
    "train.betas": row("grpo", "plan", "train.betas=[0.5,0.6]"),
    "train.eps": row("grpo", "plan", "train.eps=0.1"),
    "train.weight_decay": row("grpo", "plan", "train.weight_decay=0.1"),
    "train.clip_norm": row("grpo", "plan", "train.clip_norm=0.1"),
    "train.head_chunk": row("grpo", "plan", "train.head_chunk=7"),
    "train.balance_coef": row("grpo", "plan", "train.balance_coef=0.1"),
    "rollout.engine": row("grpo", "run", "rollout.engine=vllm"),
    "rollout.kv_cache_gb": row("grpo", "plan", "rollout.kv_cache_gb=0.5"),
    "rollout.block_size": row("grpo", "plan", "rollout.block_size=16"),
    "rollout.max_running": row("grpo", "plan", "rollout.max_running=2"),
    "rollout.prefill_tokens": row("grpo", "plan", "rollout.prefill_tokens=64"),
    "rollout.cuda_graphs": row("grpo", "plan", "rollout.cuda_graphs=false"),
    "rollout.sync_bucket_mb": row("grpo", "tests/test_sharing.py", "rollout.sync_bucket_mb=1"),
    "rollout.sync_check_every": row("grpo", "tests/flows/test_canary.py", "sync_check_every=1"),
    "sampling.temperature": row("grpo", "plan", "sampling.temperature=0.5"),
    "sampling.top_p": row("grpo", "plan", "sampling.top_p=0.5"),
    "sampling.top_k": row("grpo", "plan", "sampling.top_k=5"),
    "sampling.min_p": row("grpo", "plan", "sampling.min_p=0.1"),
    "sampling.max_tokens": row("grpo", "plan", "sampling.max_tokens=5"),
    "sampling.stop": row("grpo", "plan", "sampling.stop=[a]"),
    "sampling.stop_token_ids": row("grpo", "plan", "sampling.stop_token_ids=[9]"),
    "algorithm.advantage": row("grpo", "run", "algorithm.advantage=rloo"),
    "algorithm.advantage_std": row("grpo", "run", "algorithm.advantage_std=false"),
    "algorithm.policy_loss": row("grpo", "run", "train.epochs=2", "algorithm.policy_loss=gspo"),
    "algorithm.teacher_coef": row("grpo", "refused", "algorithm.teacher_coef=1"),
    "algorithm.loss_mean": row("grpo", "run", "algorithm.loss_mean=fixed_length"),
    "algorithm.clip_low": row("grpo", "run", "train.epochs=4", "algorithm.clip_low=0.001"),
    "algorithm.clip_high": row("grpo", "run", "train.epochs=4", "algorithm.clip_high=0.001"),
    "algorithm.dual_clip": row("grpo", "run", "train.epochs=4", "algorithm.dual_clip=1.001"),
    "algorithm.kl_coef": row("grpo", "run", *KL, "algorithm.kl_coef=0.5"),
    "algorithm.kl_estimator": row("grpo", "run", *KL, "algorithm.kl_estimator=k1"),
    "algorithm.kl_in": row("grpo", "doubt", *KL, "algorithm.kl_in=reward"),
    "algorithm.kl_target": row("ppo", "tests/flows/test_value_warmup.py", "algorithm.kl_target=5"),
    "algorithm.kl_horizon": row("ppo", "doubt", "algorithm.kl_horizon=500"),
    "algorithm.old_logprobs": row("grpo", "run", "algorithm.old_logprobs=rollout"),
    "algorithm.gamma": row("ppo", "tests/algorithms/test_gae.py", "gamma=0.5"),
    "algorithm.gae_lambda": row("ppo", "tests/algorithms/test_gae.py", "lam=0.5"),
    "algorithm.whiten_advantages": row("ppo", "run", "algorithm.whiten_advantages=false"),
    "algorithm.value_clip": row("ppo", "run", "train.epochs=4", "algorithm.value_clip=0.001"),
    "algorithm.value_warmup_steps": row("ppo", "plan", "algorithm.value_warmup_steps=1"),
    "algorithm.score_scaling": row("ppo", "run", "algorithm.score_scaling=whiten"),
    "algorithm.score_clip": row("ppo", "run", "algorithm.score_clip=0.1"),
    "algorithm.cut_penalty": row("ppo", "run", "algorithm.cut_penalty=0.5"),
    "algorithm.entropy_coef": row("grpo", "run", "algorithm.entropy_coef=0.1"),
    "algorithm.centre_coef": row("grpo", "refused", "algorithm.centre_coef=0.1"),
    "algorithm.routing_replay": row("grpo", "plan", "algorithm.routing_replay=true"),
    "algorithm.importance_cap": row("grpo", "run", "algorithm.importance_cap=0.5"),
    "algorithm.refill_attempts": row("grpo", "plan", "algorithm.refill_attempts=2"),
    "algorithm.overlong_buffer": row("grpo", "run", "algorithm.overlong_buffer=5"),
    "algorithm.overlong_penalty": row("grpo", "doubt", "algorithm.overlong_penalty=5"),
    "preference.loss": row("dpo", "plan", "preference.loss=ipo"),
    "preference.beta": row("dpo", "plan", "preference.beta=0.5"),
    "preference.label_smoothing": row("dpo", "plan", "preference.label_smoothing=0.1"),
    "preference.margin": row("dpo", "refused", "preference.margin=0.1"),
    "preference.nll_coef": row("dpo", "plan", "preference.nll_coef=0.1"),
    "preference.length_normalise": row("dpo", "plan", "preference.length_normalise=true"),
    "preference.kto_weights": row("dpo", "doubt", "preference.kto_weights=[1,2]"),
    "preference.reference": row("dpo", "refused", "preference.reference=step"),
    "preference.pairs": row("dpo", "doubt", "preference.pairs=all"),
    "data.kind": row("grpo", "plan", "data.kind=conversations"),
    "data.train.source": row("grpo", "plan", "data.train.source=other.jsonl"),
    "data.train.task": row("grpo", "plan", "data.train.task={min_terms: 3}"),
    "data.train.size": row("grpo", "plan", "data.train.size=30"),
    "data.train.split": row("grpo", "doubt", "data.train.split=test"),
    "data.train.seed": row("grpo", "plan", "data.train.seed=5"),
    "data.train.prompt_column": row("grpo", "doubt", "data.train.prompt_column=other"),
    "data.train.answer_column": row("grpo", "doubt", "data.train.answer_column=other"),
    "data.train.answer_pattern": row("grpo", "doubt", "data.train.answer_pattern='(a)'"),
    "data.train.template": row("grpo", "plan", "data.train.template='{prompt}!'"),
    "data.train.system": row("grpo", "plan", "data.train.system=short"),
    "data.train.chat": row("grpo", "plan", "data.train.chat=false"),
    "data.train.columns": row("grpo", "doubt", "data.train.columns={response: r}"),
    "data.train.part": row("grpo", "plan", "data.train.part=1/2"),
    "data.train.unique": row("grpo", "plan", "data.train.unique=true"),
    "data.train.max_tokens": row("grpo", "plan", "data.train.max_tokens=50"),
    "data.train.on_bad_row": row("grpo", "plan", "data.train.on_bad_row=skip"),
    "data.mix": row("grpo", "plan", "data.mix=[{source: other.jsonl}]"),
    "data.prompts_per_step": row("grpo", "plan", "data.prompts_per_step=3"),
    "data.group_size": row("grpo", "plan", "data.group_size=2"),
    "rewards.0.function": row("grpo", "plan", "rewards.0.function=exact"),
    "rewards.0.role": row("grpo", "refused", "rewards.0.role=none"),
    "rewards.0.weight": row("grpo", "plan", "rewards.0.weight=2"),
    "rewards.0.options": row("grpo", "plan", "rewards.0.options={a: 1}"),
    "reward_pool.num_workers": row("grpo", "tests/rewards/test_pool.py", "num_workers=2"),
    "reward_pool.timeout_s": row("grpo", "tests/rewards/test_pool.py", "timeout_s=1"),
    "reward_pool.memory_gb": row("grpo", "run", "reward_pool.memory_gb=1e-9"),
    "reward_pool.failed_reward": row("grpo", "run", NANS, "reward_pool.failed_reward=0.5"),
    "reward_pool.max_failed_share": row("grpo", "tests/rewards/test_pool.py", "max_failed=0.5"),
    "reward_pool.environment": row("grpo", "tests/rewards/test_pool.py", "environment=[A]"),
    "evaluation.held_out": row("grpo", "plan", "evaluation.held_out=4"),
    "evaluation.sets": row("grpo", "plan", "evaluation.sets={a: {data: {seed: 9}}}"),
    "evaluation.threshold": row("grpo", "plan", HELD, "evaluation.threshold=0.5"),
    "evaluation.every": row("grpo", "run", HELD, "evaluation.every=1"),
    "evaluation.before": row("grpo", "run", HELD, "evaluation.before=false"),
    "evaluation.after": row("grpo", "run", HELD, "evaluation.after=false"),
    "evaluation.num_samples": row("grpo", "plan", HELD, "evaluation.num_samples=2"),
    "evaluation.k": row("grpo", "plan", HELD, "evaluation.num_samples=2", "evaluation.k=[2]"),
    "evaluation.sampling": row("grpo", "plan", HELD, "evaluation.sampling={top_k: 2}"),
    "evaluation.against": row("grpo", "plan", HELD, "evaluation.against=start"),
    "checkpoint.every": row("grpo", "run", "checkpoint.every=1"),
    "checkpoint.keep_last": row("grpo", "run", "checkpoint.every=1", "checkpoint.keep_last=1"),
    "checkpoint.keep_every": row("grpo", "run", *SAVED, "checkpoint.keep_every=1"),
    "checkpoint.resume": row("grpo", "tests/flows/test_saving.py", "checkpoint.resume=false"),
    "checkpoint.export": row("grpo", "run", "checkpoint.export=true"),
    "checkpoint.export_dtype": row(
        "grpo", "run", "checkpoint.export=true", "checkpoint.export_dtype=bfloat16"
    ),
    "checkpoint.journal_kv": row("grpo", "plan", "checkpoint.journal_kv=false"),
    "log.tensorboard": row("grpo", "run", "log.tensorboard=true"),
    "log.text_samples": row("grpo", "run", "log.tensorboard=true", "log.text_samples=1"),
    "log.progress": row("grpo", "tests/flows/test_progress.py", "log.progress=true"),
}

HOW = (
    "write a line of ROWS in tests/test_key_effects.py: a base, where the effect is to be seen "
    "(plan, run, refused, doubt, or the file of the test that holds it), and the words that set "
    "the key to another value than its default where it matters"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("effects")
    make_tiny_model(root / "model")
    found = {}
    ppo: dict[str, Any] = {
        "flow": "ppo",
        "roles": {"policy": {}, "rollout": {}, "value": {"head": "zero"}},
    }
    dpo: dict[str, Any] = {"flow": "dpo", "preference": {"reference": "cache"}}
    for name, sections in (("grpo", {}), ("ppo", ppo), ("dpo", dpo)):
        found[name] = write_config(
            root / f"{name}.yaml", root / "model", root / name, steps=2, **sections
        )
    return found


def test_every_key_has_a_line() -> None:
    keys = set(known_keys())
    assert sorted(keys - ROWS.keys()) == [], HOW
    assert sorted(ROWS.keys() - keys) == [], "of keys that are no more"


def last_key(given: Row) -> str:
    return given.words[-1].split("=")[0]


def plan_of(config: Config) -> dict[str, str]:
    """What is derived from a configuration without a run, as texts."""
    device = torch.device("cpu")
    shape = read_config(config.model.path)
    texts = {
        "explain": explain(config, 4).split("# derived", 1)[1],
        "roles": repr({name: config.role_kind(name) for name in config.roles}),
        "kind": config.data_kind(),
        "engine": repr(_native_options(config, device)),
        "sampling": repr(training_sampling(config)),
        "sources": repr([prompt_source(source, NOW) for source in train_sources(config)]),
        "shares": repr([source.weight for source in train_sources(config)]),
        "sets": repr(held_out_sets(config)),
        "rewards": repr(reward_specs(config.rewards)),
        "preference": repr(preference_settings(config.preference)),
    }
    for name in config.roles:
        if config.is_trained(name):
            texts[f"training {name}"] = repr(train_options(config, name, device, shape, 1))
    return texts


def outcome(path: Path, words: tuple[str, ...] | list[str]) -> dict[str, str] | str:
    """The plan, or the message of what is refused."""
    try:
        return plan_of(load_config(path, list(words)))
    except ValueError as error:
        return str(error)


PLANNED = [key for key, given in ROWS.items() if given.where == "plan"]


@pytest.mark.parametrize("key", PLANNED)
def test_the_plan_differs(bases: dict[str, Path], key: str) -> None:
    given = ROWS[key]
    before = outcome(bases[given.base], given.words[:-1])
    after = outcome(bases[given.base], given.words)
    assert isinstance(before, dict), before
    assert after != before, f"{key}: {given.words[-1]} changes nothing"


@pytest.mark.parametrize("key", [k for k, given in ROWS.items() if given.where == "refused"])
def test_what_would_have_no_effect_is_refused(bases: dict[str, Path], key: str) -> None:
    given = ROWS[key]
    load_config(bases[given.base], list(given.words[:-1]))
    with pytest.raises(ValueError) as caught:
        load_config(bases[given.base], list(given.words))
    parts = last_key(given).replace("roles.policy", "roles").split(".")
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("key", [k for k, given in ROWS.items() if given.where == "doubt"])
def test_what_has_no_effect_is_warned_of(bases: dict[str, Path], key: str) -> None:
    given = ROWS[key]
    before = doubts(load_config(bases[given.base], list(given.words[:-1])))
    found = doubts(load_config(bases[given.base], list(given.words)))
    assert [doubt for doubt in found if doubt not in before and last_key(given) in doubt], found


@pytest.mark.parametrize("key", [k for k, given in ROWS.items() if given.where.endswith(".py")])
def test_another_test_holds_the_effect(key: str) -> None:
    file = ROOT / ROWS[key].where
    assert file.is_file(), f"{key}: {file} is gone: {HOW}"
    name = ROWS[key].words[-1].split("=")[0].split(".")[-1]
    assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{key}: {file}: {HOW}"


NOISE = ("seconds/", "tokens_per_s/", "memory/", "wall_time", "moved/", "mfu", "gb_per_s")


def run_cases(world: World, cases: list[tuple[str, list[str]]]) -> list[str]:
    """What each configuration's run leaves: metrics but for times, and its files; or its error."""
    found = []
    with start_reward_server() as server:
        for path, words in cases:
            try:
                config = load_config(path, words)
                train(config, world, server)
            except Exception as error:  # whatever it is, it is told
                found.append(f"{type(error).__name__}: {error}")
                continue
            directory = Path(config.run_dir)
            with (directory / "metrics.jsonl").open() as lines:
                records = [json.loads(line) for line in lines]
            kept = [
                {k: v for k, v in record.items() if not k.startswith(NOISE)} for record in records
            ]
            files = sorted(
                re.sub(r"events\..*|attempt_.*", "", str(file.relative_to(directory)))
                + (f" {file.stat().st_size}" if file.suffix == ".safetensors" else "")
                for file in directory.rglob("*")
            )
            events = sum(f.stat().st_size for f in directory.rglob("events*"))
            found.append(json.dumps([kept, files, events // 200], sort_keys=True))
    return found


RUNS = [key for key, given in ROWS.items() if given.where == "run"]
SAMPLE = ("algorithm.loss_mean", "evaluation.every", "checkpoint.every", "model.path")


def check_runs(bases: dict[str, Path], keys: list[str]) -> None:
    cases: list[tuple[str, list[str]]] = []
    for number, key in enumerate(keys):
        given = ROWS[key]
        content = yaml.safe_load(bases[given.base].read_text())
        for suffix, words in (("without", given.words[:-1]), ("with", given.words)):
            place = f"run_dir={Path(content['run_dir']).parent / f'{number}_{suffix}'}"
            cases.append((str(bases[given.base]), [place, *words]))
    found = run_ranks(run_cases, 1, cases, timeout_s=1200)[0]
    same = [k for i, k in enumerate(keys) if found[2 * i] == found[2 * i + 1]]
    assert same == [], "these keys change nothing in a run"
    broken = [(k, found[2 * i]) for i, k in enumerate(keys) if not found[2 * i].startswith("[")]
    assert broken == []


def test_runs_differ_in_a_sample(bases: dict[str, Path]) -> None:
    check_runs(bases, list(SAMPLE))


@pytest.mark.full
def test_runs_differ(bases: dict[str, Path]) -> None:
    check_runs(bases, [key for key in RUNS if key not in SAMPLE])
