"""Values of keys at their limits, and keys that go together badly: refused or warned of by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spmdrl.algorithms.kl import ERROR_LIMIT
from spmdrl.commands.cli import parse
from spmdrl.commands.config_commands import load
from spmdrl.config.amounts import count_of
from spmdrl.config.data import with_home
from spmdrl.config.data_sets import held_out_sets
from spmdrl.config.doubts import doubts
from spmdrl.config.load import load_config
from spmdrl.config.rules import KL_ERROR_LIMIT
from spmdrl.run.inputs import check_stop_tokens

ROOT = Path(__file__).parents[2]

BASE = """
flow: FLOW
steps: 10
run_dir: runs/test
model: {path: models/toy}
roles: {policy: {}, rollout: {}}
data:
  train: {source: "reasoning_gym:chain_sum"}
  prompts_per_step: 4
rewards: [{function: exact}]
"""
PPO = ["roles.reference={}", "roles.value={}", "algorithm.kl_coef=0.1"]
REFILL = ["algorithm.refill_attempts=2"]


FILE = "data.train.source=a.jsonl"
CACHED = ["preference.reference=cache"]
HELD = "evaluation.held_out=4"
SETS = "evaluation.sets={a: {data: {size: 4, split: test}}}"
UNREAD: list[tuple[str, list[str], str]] = [
    ("grpo", ["roles.value={}"], "roles.value: flow=grpo never asks it"),
    ("ppo", ["roles.value={}", "roles.reference={}"], "roles.reference: no effect without"),
    ("grpo", ["limits={updat: 5}"], "limits.updat: no effect"),
    ("sft", ["train.share_prompts=false"], "train.share_prompts=False: no effect"),
    ("ppo", [*PPO, "roles.value.train={head_chunk: 7}"], "roles.value.train.head_chunk=7"),
    ("dpo", [*CACHED, "log.text_samples=1"], "log.text_samples=1: no effect without a flow that"),
    ("grpo", ["checkpoint.keep_every=2"], "checkpoint.keep_every=2: no effect without"),
    (
        "grpo",
        ["checkpoint.export=false", "checkpoint.export_dtype=float16"],
        "checkpoint.export_dtype=float16: no effect without checkpoint.export",
    ),
    ("grpo", ["rollout.engine=vllm", "checkpoint.journal_kv=false"], "journal_kv=False: no effect"),
    ("grpo", ["device=cpu", "rollout.cuda_graphs=false"], "cuda_graphs=False: no effect"),
    ("grpo", ["roles.policy.tp_across_nodes=true"], "tp_across_nodes=True: no effect with"),
    ("sft", [HELD, "evaluation.max_items=2"], "evaluation.max_items=2: no effect on the count"),
    ("sft", [HELD, "evaluation.threshold=0.5"], "evaluation.threshold=0.5: no effect without"),
    ("sft", ["evaluation.sets={a: {data: {size: 4}, k: [1]}}"], "evaluation.sets.a.k=[1]: no"),
    (
        "grpo",
        [FILE, "data.train.columns={response: a}"],
        "data.train.columns.response: no effect on",
    ),
    ("sft", [FILE, "data.train.columns={chosen: a}"], "data.train.columns.chosen: no effect on"),
    (
        "dpo",
        [*CACHED, FILE, "data.train.answer_pattern='(a)'"],
        "answer_pattern=(a): no effect without",
    ),
    ("sft", [FILE, "data.train.answer_column=a"], "data.train.answer_column=a: no effect without"),
    (
        "grpo",
        [FILE, "data.train.columns={messages: m}", "data.train.prompt_column=a"],
        "data.train.prompt_column=a: no effect without questions as well as",
    ),
    ("grpo", ["data.mix=[{split: test}]"], "data.mix.0.split=test: no effect without"),
    ("grpo", [SETS], "evaluation.sets.a.data.split=test: no effect without"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    found = {}
    for flow in ("grpo", "ppo", "sft", "dpo", "reward_model"):
        found[flow] = folder / f"{flow}.yaml"
        found[flow].write_text(BASE.replace("FLOW", flow))
    return found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=.inf", r"train\.lr=inf: .*finite"),
        ("train.lr=.nan", r"train\.lr=nan"),
        ("rollout.kv_cache_gb=0", r"rollout\.kv_cache_gb=0"),
        ("rollout.kv_cache_gb=-1", r"rollout\.kv_cache_gb=-1"),
        ("roles.policy.dp_shard=0", r"roles\.policy\.dp_shard=0"),
        ("sampling.temperature=.inf", r"sampling\.temperature=inf: .*finite"),
        ("sampling.temperature=.nan", r"sampling\.temperature=nan"),
        ("sampling.temperature=5e-4", r"sampling\.temperature=0\.0005: .*at least 0\.001"),
        ("sampling.temperature=1001", r"sampling\.temperature=1001"),
        ("rewards.0.weight=.nan", r"rewards\.0\.weight=nan: .*finite"),
        ("reward_pool.failed_reward=.nan", r"reward_pool\.failed_reward=nan: .*finite"),
        ("reward_pool.failed_reward=-.inf", r"reward_pool\.failed_reward=-inf: .*finite"),
        ("timeout_s=.inf", r"timeout_s=inf: .*finite"),
        ("limits.update=.nan", r"limits\.update=nan: .*finite"),
        ("evaluation.threshold=.nan", r"evaluation\.threshold=nan: .*finite"),
        ("evaluation.sampling={temperature: .inf}", r"sampling\.temperature=inf: .*finite"),
        ("roles.policy.train={lr: .inf}", r"roles\.policy\.train: train\.lr=inf: .*finite"),
        ("train.clip_norm=.nan", r"train\.clip_norm=nan"),
        ("train.betas=[1.5,2]", r"train\.betas\.0=1\.5: .*less than 1"),
        ("train.betas=[0.9,-1]", r"train\.betas\.1=-1: .*greater than or equal to 0"),
        ("seed=99999999999999999999", r"seed=99999999999999999999: "),
        ("seed=9223372036854775808", r"seed=9223372036854775808: .*less than"),
        ("sampling.stop=END", r"sampling\.stop='END': .*list: write sampling\.stop=\[END\]"),
        ("sampling.stop_token_ids=[-1]", r"sampling\.stop_token_ids\.0=-1: .*greater"),
        ("evaluation.k=1", r"evaluation\.k=1: .*list: write evaluation\.k=\[1\]"),
        ("roles.policy.freeze=norm", r"roles\.policy\.freeze='norm': .*\[norm\]"),
        ("evaluation.held_out=-1", r"evaluation\.held_out=-1: .*a count \(128\), or a share"),
        (
            "evaluation.held_out=0.1",
            r"evaluation\.held_out=0\.1: .*a share of what there is \(10%\)",
        ),
        ("evaluation.held_out=101%", r"evaluation\.held_out='101%': .*a share"),
        ("evaluation.held_out=some", r"evaluation\.held_out='some': .*a share"),
        ("evaluation.held_out=true", r"evaluation\.held_out=True: .*a share"),
        ("evaluation.max_items=0", r"evaluation\.max_items=0: .*greater"),
        ("evaluation.sets.a={data: {}, max_items: 0}", r"evaluation\.max_items=0: .*greater"),
        ("data.train.keep_shortest=0%", r"data\.train\.keep_shortest='0%': .*above 0%"),
        ("data.train.keep_shortest=5", r"data\.train\.keep_shortest=5: .*a share"),
        ("run_dir=''", r"run_dir=''"),
        ("run_dir=~nobody-at-all/x", r"run_dir=.*~nobody-at-all has no home directory"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_key(files, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(files["grpo"], [override])


@pytest.mark.parametrize(
    ("text", "value", "of_30"),
    [
        ("0", 0, 0),
        ("7", 7, 7),
        ("'7'", 7, 7),
        ("10%", "10%", 3),
        ("2.50 %", "2.5%", 1),
        ("0%", 0, 0),
    ],
)
def test_what_is_held_out_is_a_count_or_a_share(files, text, value, of_30):
    found = load_config(files["grpo"], [f"evaluation.held_out={text}"]).evaluation.held_out
    assert found == value and type(found) is type(value)
    assert count_of(found, 30) == of_30


def test_sets_are_bounded_alike_unless_they_say_otherwise(files):
    words = [
        "evaluation.max_items=4",
        "evaluation.sets={a: {data: {}, max_items: 9}, b: {data: {}}}",
    ]
    found = held_out_sets(load_config(files["grpo"], [*words, "evaluation.held_out=50%"]))
    bounds = {name: own.max_items for name, own in found.items()}
    assert bounds == {"held_out": 4, "a": 9, "b": 4}


def test_no_clipping_is_a_norm_without_limit(files):
    assert load_config(files["grpo"], ["train.clip_norm=.inf"]).train.clip_norm == float("inf")
    assert load_config(files["grpo"], ["seed=-1"]).seed == -1


def test_a_tilde_is_the_home_directory(files, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        files["grpo"],
        [
            *("run_dir=~/runs/x", "model.path=~/m", "data.train.source=~/d.jsonl"),
            *("rewards.0.function=~/r.py:f", "roles.policy.model=~/p", "roles.policy.tp=1"),
            *("evaluation.against=~/a.jsonl", "data.mix=[{source: ~/e.jsonl}]"),
            "evaluation.sets.a={data: {source: ~/b.jsonl}}",
        ],
    )
    assert "~" not in config.model_dump_json(exclude={"data": {"mix"}, "evaluation": {"sets"}})
    assert config.run_dir == "/home/me/runs/x"
    assert with_home("a~b") == "a~b" and with_home("~") == os.path.expanduser("~")


def test_what_answers_prompts_may_be_greedy(files):
    word = "sampling.temperature=0"
    for command in ("generate", "eval", "report", "train", "plan"):
        words = [command, str(files["grpo"]), word]
        options = parse([*words, "--prompts=a", "--out=b"] if command == "generate" else words)
        if command in ("train", "plan"):
            with pytest.raises(ValueError, match="greedy samples teach nothing"):
                load(options)
        else:
            assert load(options).sampling.temperature == 0


def test_a_stop_token_is_one_of_the_model_s(files):
    config = load_config(files["grpo"], ["sampling.stop_token_ids=[263]"])
    check_stop_tokens(config, 264)
    with pytest.raises(ValueError, match=r"stop_token_ids=\[263\] in sampling: .*0 to 262, so 263"):
        check_stop_tokens(config, 263)
    words = ["evaluation.held_out=2", "evaluation.sampling={stop_token_ids: [999999]}"]
    with pytest.raises(ValueError, match="sampling of evaluation set held_out"):
        check_stop_tokens(load_config(files["grpo"], words), 264)


@pytest.mark.parametrize(
    ("flow", "words", "message"),
    [
        (
            "grpo",
            [*REFILL, "rewards=[]"],
            r"=2 .*rewards=\[\]",
        ),
        (
            "grpo",
            [
                "algorithm.refill_attempts=2",
                "data.group_size=1",
                "algorithm.advantage=reinforce_pp",
            ],
            "refill_attempts=2 with data.group_size=1",
        ),
        ("ppo", [*PPO, *REFILL, "data.group_size=1"], "data.group_size=1"),
        (
            "ppo",
            [*PPO, "algorithm.kl_target=6", "algorithm.kl_horizon=6"],
            r"kl_horizon=6 with 32 samples.*above 6\.4",
        ),
        ("grpo", ["roles.policy.trained=false"], r"policy\.trained=false with flow=grpo"),
        ("ppo", ["roles.value={trained: false}"], r"value\.trained=false with flow=ppo"),
        (
            "reward_model",
            ["roles.reward={}"],
            r"reward\.trained=false with flow=reward_model",
        ),
        ("grpo", ["roles.policy.kind=reference"], r"policy\.kind=reference with flow=grpo"),
        (
            "ppo",
            ["roles.value={}", "algorithm.kl_target=6"],
            r"kl_target=6.0 with algorithm\.kl_coef=0.0: .* never leave 0",
        ),
        (
            "ppo",
            [*PPO, "roles.reference.train={lr: 0.1}"],
            "roles.reference.train.lr=0.1: reference is not trained",
        ),
        ("grpo", ["roles.rollout.train={betas: [0.5, 0.6]}"], r"roles\.rollout\.train\.betas"),
        (
            "grpo",
            ["roles.rollout.train={head_chunk: 9}"],
            r"rollout\.train\.head_chunk=9.*no train",
        ),
        ("sft", ["environment=a:B"], r"environment=a:B with flow=sft, which does not read it"),
        ("sft", ["environment=a:B", "trainer=a:B"], r"environment=a:B with flow=sft"),
        ("grpo", ["data.kind=preferences"], r"data\.kind=preferences with flow=grpo"),
        ("grpo", ["roles.rollout.trained=true"], r"roles\.rollout\.trained=true: .*no train"),
        ("grpo", ["roles.policy.options={a: 1}"], r"roles\.policy\.options=.*only a module:Class"),
    ],
)
def test_keys_that_go_together_badly_are_refused(files, flow, words, message):
    teacher = ["roles.teacher={}", "algorithm.teacher_coef=1"] if "rewards=[]" in words else []
    with pytest.raises(ValueError, match=message):
        load_config(files[flow], [*words, *teacher])


def test_the_least_horizon_is_the_controller_s():
    assert KL_ERROR_LIMIT == ERROR_LIMIT


@pytest.mark.parametrize(
    ("flow", "words", "message"),
    [
        ("grpo", ["algorithm.policy_loss=gspo"], "loss_mean=token_mean, clip_low=0.2"),
        (
            "grpo",
            ["roles.reference={}", "algorithm.kl_coef=0.1", "algorithm.kl_in=reward"],
            "kl_in=reward with algorithm.kl_estimator=k3",
        ),
        ("grpo", ["algorithm.kl_in=reward"], "kl_in=reward: no effect without algorithm.kl_coef"),
        *(
            (
                "grpo",
                [f"algorithm.advantage={name}", "algorithm.advantage_std=false"],
                "advantage_std=False: no effect without advantage=grpo",
            )
            for name in ("rloo", "reinforce_pp", "reinforce_pp_baseline")
        ),
        ("grpo", ["algorithm.overlong_penalty=2"], "no effect without algorithm.overlong_buffer"),
        ("grpo", ["train.min_lr_ratio=0.1"], "min_lr_ratio=0.1 with train.schedule=constant"),
        (
            "grpo",
            ["roles.policy.train={min_lr_ratio: 0.1}"],
            "roles.policy.train.min_lr_ratio=0.1 with",
        ),
        ("grpo", ["train.warmup_steps=11"], "warmup_steps=11: the run has 10 optimizer steps"),
        ("grpo", ["evaluation.every=2"], "evaluation.every: no effect without a held-out set"),
        (
            "grpo",
            ["data.train.split=test"],
            "split=test: no effect without a source hub",
        ),
        ("sft", ["data.group_size=2"], "data.group_size=2: no effect on conversations"),
        ("sft", ["roles={policy: {}}", "sampling.top_p=0.5"], "sampling.top_p: no effect without"),
        ("ppo", [*PPO, "algorithm.kl_horizon=500"], "kl_horizon=500: no effect without"),
        ("dpo", ["preference.reference=cache", "preference.kto_weights=[1,2]"], "loss=kto"),
        ("dpo", ["preference.reference=cache", "preference.pairs=all"], "flow=online_dpo"),
        *UNREAD,
    ],
)
def test_what_is_said_in_vain_is_warned_of(files, flow, words, message):
    roles = ["roles.rollout=null"] if flow == "sft" and "roles={policy: {}}" in words else []
    words = [word for word in words if word != "roles={policy: {}}"]
    found = doubts(load_config(files[flow], [*words, *roles]))
    assert [doubt for doubt in found if message in doubt], found
    assert len(found) == 1, found


@pytest.mark.parametrize("flow", ["grpo", "ppo", "sft", "dpo"])
def test_what_says_nothing_is_not_warned_of(files, flow):
    words = {"ppo": PPO, "dpo": ["preference.reference=cache"]}.get(flow, [])
    assert doubts(load_config(files[flow], words)) == []


def test_shipped_configurations_say_nothing_in_vain():
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    found = {p.name: doubts(load_config(p)) for p in paths if p.parent.name != "methods"}
    assert len(found) > 20 and {name: own for name, own in found.items() if own} == {}
