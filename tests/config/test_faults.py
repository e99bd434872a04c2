"""Each rule's fault names its key, value and fix; all faults are found at once."""

from __future__ import annotations

import ast
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import spmdrl.config.flow_rules as flow_rules
import spmdrl.config.rules as rules
import spmdrl.config.turn_rules as turn_rules
from spmdrl.config.faults import ConfigError, Fault, read_fault
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config

BASE: dict[str, Any] = {
    "steps": 10,
    "run_dir": "runs/test",
    "model": {"path": "models/toy"},
    "roles": {"policy": {}, "rollout": {}},
    "data": {"train": {"source": "reasoning_gym:chain_sum"}, "prompts_per_step": 4},
    "rewards": [{"function": "exact"}],
}
PPO = ("flow=ppo", "roles.value={}", "roles.reference={}", "algorithm.kl_coef=0.1")
ONLINE = ("flow=online_dpo", "roles.reference={}")
JUDGED = ("evaluation.sets.x={data: {}, against: a.jsonl}", "rewards=[]", "flow=my.py:f")
SET = "evaluation.sets.x={data: {size: 2}}"

TURNS = "rollout.turns={kind: my_module:Environment}"
JUDGE = ("roles.judge={}", "rewards=[{role: judge}]")
PAIRED = ("roles.judge={}", "preference.judge=judge")

RULES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("algorithm.overlong_buffer", 64, ("algorithm.overlong_buffer=64", "sampling.max_tokens=64")),
    ("roles.policy.readout", "last", ("roles.policy.readout=last",)),
    ("data.prompts_per_step", 1, ("data.prompts_per_step=1", "data.group_size=1")),
    ("data.group_size", 1, ("data.group_size=1",)),
    ("sampling.temperature", 0.0, ("sampling.temperature=0",)),
    (
        "algorithm.refill_attempts",
        2,
        (*PPO, "algorithm.refill_attempts=2", "data.group_size=1"),
    ),
    (
        "algorithm.kl_target",
        6.0,
        ("flow=ppo", "roles.value={}", "algorithm.kl_target=6"),
    ),
    ("algorithm.kl_horizon", 6, (*PPO, "algorithm.kl_target=6", "algorithm.kl_horizon=6")),
    (
        "evaluation.held_out",
        4,
        ("evaluation.held_out=4", "evaluation.sets.held_out={data: {}}"),
    ),
    ("evaluation.sets.x", None, ("evaluation.sets={x y: {data: {}}}",)),
    ("evaluation.sets.x", None, ("evaluation.sets.x={}",)),
    ("evaluation.k", [1, 8], ("evaluation.k=[1,8]",)),
    ("evaluation.sets.x.against", "a.jsonl", JUDGED),
    (
        "evaluation.sets.x.against",
        "start",
        ("evaluation.sets.x={data: {}, against: start}", "evaluation.before=false"),
    ),
    ("evaluation.stop_after", 2, ("evaluation.stop_after=2",)),
    ("checkpoint.keep_best", "reward", (SET, "checkpoint.keep_best=reward")),
    (
        "checkpoint.keep_best",
        "-eval/x/nll",
        (SET, "checkpoint.keep_best=-eval/x/nll", "checkpoint.every=2", "evaluation.every=3"),
    ),
    ("roles.policy.head", "zero", ("roles.policy.head=zero",)),
    ("roles", ["other", "policy", "rollout"], ("roles.other.kind=policy",)),
    ("algorithm.kl_coef", 0.1, ("algorithm.kl_coef=0.1",)),
    ("roles.reference", None, ("roles.reference={}",)),
    ("algorithm.teacher_coef", 1.0, ("algorithm.teacher_coef=1",)),
    (
        "algorithm.policy_loss",
        "cispo",
        ("algorithm.policy_loss=cispo", "algorithm.dual_clip=3"),
    ),
    (
        "roles.reference.freeze",
        ["a"],
        ("algorithm.kl_coef=1", "roles.reference={freeze: [a]}"),
    ),
    ("train.backend", "apex", ("train.backend=apex",)),
    ("train.backend_options", {"x": 1}, ("train.backend_options={x: 1}",)),
    ("train.deepspeed.stage", 3, ("train.deepspeed.stage=3",)),
    ("train.compile", "blocks", ("train.compile=blocks", "train.backend=deepspeed")),
    ("roles.policy.pp", 2, ("roles.policy.pp=2",)),
    ("roles.policy.pp", 2, ("roles.policy.pp=2", "train.backend=deepspeed")),
    ("roles.rollout.pp", 2, ("roles.rollout.pp=2",)),
    (
        "preference.label_smoothing",
        0.1,
        ("flow=dpo", "preference={loss: ipo, label_smoothing: 0.1, reference: cache}"),
    ),
    ("preference.margin", 1.0, ("flow=dpo", "preference={margin: 1, reference: cache}")),
    ("preference.loss", "dpo", ("flow=dpo",)),
    ("roles.reference", None, ("flow=dpo", "roles.reference={}", "preference.loss=simpo")),
    ("preference.loss", "kto", (*ONLINE, "preference.loss=kto")),
    ("data.group_size", 1, (*ONLINE, "data.group_size=1")),
    (
        "train.balance_coef",
        0.1,
        (
            *("flow=reward_model", "roles={policy: null, rollout: null, reward: {trained: true}}"),
            *("rewards=[]", "train.balance_coef=0.1"),
        ),
    ),
    ("rewards", [], ("rewards=[]",)),
    ("roles.policy.retokenize", True, ("roles.policy.retokenize=true",)),
    ("rewards.0.function", None, ("rewards=[{weight: 2}]",)),
    ("rewards.0.role", "judge", ("rewards=[{role: judge}]",)),
    ("rewards.0.role", "policy", ("rewards=[{role: policy}]",)),
    ("roles.policy.residency.kv_cache", "drop", ("roles.policy.residency.kv_cache=drop",)),
    (
        "roles.reference.residency.optimizer",
        "host",
        ("algorithm.kl_coef=1", "roles.reference={residency: {optimizer: host}}"),
    ),
    ("roles.policy.residency.weights", "drop", ("roles.policy.residency.weights=drop",)),
    (
        "roles.policy.residency.weights",
        "stream",
        ("roles.policy.residency.weights=stream",),
    ),
    (
        "roles.reference.train.lr",
        0.1,
        ("algorithm.kl_coef=1", "roles.reference={train: {lr: 0.1}}"),
    ),
    ("train.num_minibatches", 9, ("train.num_minibatches=9",)),
    (
        "algorithm.old_logprobs",
        "rollout",
        ("algorithm.old_logprobs=rollout", "algorithm.importance_cap=2"),
    ),
    ("lag", 1, ("lag=1",)),
    ("algorithm.credit", "turn", ("algorithm.credit=turn",)),
    (
        "algorithm.routing_replay",
        True,
        (TURNS, "rollout.turns.history=rendered", "algorithm.routing_replay=true"),
    ),
    ("data.train.chat", False, (TURNS, "data.train.chat=false")),
    (
        "roles.reward.retokenize",
        True,
        (TURNS, "roles.reward={retokenize: true}", "rewards=[{role: reward}]"),
    ),
    ("flow", "ppo", ("flow=ppo",)),
    ("roles.policy.kind", "reference", ("roles.policy.kind=reference",)),
    ("roles.policy.trained", False, ("roles.policy.trained=false",)),
    ("data.kind", "preferences", ("data.kind=preferences",)),
    ("algorithm.gamma", 0.9, ("algorithm.gamma=0.9",)),
    ("environment", "a:B", ("flow=sft", "rewards=[]", "environment=a:B")),
    ("roles.policy.options", {"a": 1}, ("roles.policy.options={a: 1}",)),
    ("roles.rollout.trained", True, ("roles.rollout.trained=true",)),
    ("roles.policy.judge", {"max_tokens": 4}, ("roles.policy.judge={max_tokens: 4}",)),
    ("roles.judge.trained", True, (*JUDGE, "roles.judge.trained=true")),
    ("roles.judge.train.lr", 1.0, (*JUDGE, "roles.judge.train={lr: 1.0}")),
    ("roles.judge.pp", 2, (*JUDGE, "roles.judge.pp=2")),
    ("roles.judge.residency.base", "host", (*JUDGE, "roles.judge.residency={base: host}")),
    ("roles.judge.residency.weights", "drop", (*JUDGE, "roles.judge.residency={weights: drop}")),
    ("roles.judge.base", "policy", (*JUDGE, "roles.judge.base=policy")),
    ("roles.policy.base", "judge", (*JUDGE, "roles.policy.base=judge")),
    ("roles.judge.adapter", None, (*JUDGE, "roles.judge.adapter={}")),
    ("preference.judge", "judge", ("flow=dpo", "preference={judge: judge, reference: cache}")),
    ("preference.judge", "policy", (*ONLINE, "preference.judge=policy")),
    ("preference.judge", "other", (*ONLINE, "preference.judge=other")),
    ("preference.ties", "reward", (*ONLINE, *PAIRED, "rewards=[]", "preference.ties=reward")),
    ("rewards", [], (*ONLINE, "rewards=[]")),
    ("roles.rollout.train.head_chunk", 9, ("roles.rollout.train={head_chunk: 9}",)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "base.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return path


def faults(base: Path, *words: str) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(base, words)
    assert str(caught.value).count("\n") == len(caught.value.faults) - 1
    return caught.value.faults


@pytest.mark.parametrize(("key", "value", "words"), RULES, ids=lambda own: str(own)[:50])
def test_a_rule_s_fault_has_key_value_and_fix(base, key, value, words):
    found = {fault.key: fault for fault in faults(base, *words)}
    assert key in found, list(found)
    assert found[key].value == value and type(found[key].value) is type(value)
    assert len(found[key].fix.split()) >= 2 and found[key].fix in found[key].message


def test_every_rule_has_a_line_above(base, monkeypatch):
    """Each `raise` of the rules is reached by some line."""
    reached: set[tuple[str, int]] = set()
    every = (*rules.RULES, *rules.TRAINING_RULES)

    def note(config: Config, *, trains: bool) -> None:
        for rule in every:
            try:
                rule(config)
            except ValueError as error:
                entry = error.__traceback__
                while entry is not None and entry.tb_next is not None:
                    entry = entry.tb_next
                assert entry is not None
                reached.add((entry.tb_frame.f_code.co_filename, entry.tb_lineno))

    monkeypatch.setattr("spmdrl.config.load.check_rules", note)
    for _, _, words in RULES:
        with suppress(ConfigError):  # sections have rules of their own
            load_config(base, words)
    for module in (rules, flow_rules, turn_rules):
        path = str(module.__file__)
        raises = [
            n for n in ast.walk(ast.parse(Path(path).read_text())) if isinstance(n, ast.Raise)
        ]
        missed = [n.lineno for n in raises if (path, n.lineno) not in reached]
        assert raises and missed == [], path


@pytest.mark.parametrize(
    ("word", "key", "value", "fix"),
    [
        ("train.lrr=1", "train.lrr", 1, "did you mean 'train.lr'?"),
        ("train.lr=-1", "train.lr", -1, "Input should be greater than 0"),
        ("sampling.stop=END", "sampling.stop", "END", "write sampling.stop=[END]"),
        ("data.train={source: null}", "data.train.source", None, "Input should be a valid string"),
        ("roles.policy.train={lrr: 1}", "roles.policy.train.lrr", 1, "did you mean 'train.lr'?"),
        ("data.mix=[{weight: 0}]", "data.mix.0.weight", 0, "Input should be greater than 0"),
        ("evaluation.sampling={top_p: 2}", "evaluation.sampling.top_p", 2, "or equal to 1"),
        (
            "evaluation.sets.x={data: {sorce: a}}",
            "evaluation.sets.x.data.sorce",
            "a",
            "did you mean 'data.train.source'?",
        ),
        (
            "evaluation.sets.x={data: {}, sampling: {top_p: 2}}",
            "evaluation.sets.x.sampling.top_p",
            2,
            "or equal to 1",
        ),
        (
            "evaluation.sets.x={data: {}, num_sample: 2}",
            "evaluation.sets.x.num_sample",
            2,
            "did you mean 'evaluation.num_samples'?",
        ),
        (
            "data.mix=[{turns: {kind: a:B, max_turn: 2}}]",
            "data.mix.0.turns.max_turn",
            2,
            "did you mean 'rollout.turns.max_turns'?",
        ),
        (
            "data.train.turns={max_turns: 2}",
            "data.train.turns.kind",
            None,
            "add rollout.turns.kind",
        ),
        ("evaluation.sets.x={data: a}", "evaluation.sets.x.data", "a", "give keys"),
    ],
)
def test_a_key_s_fault_is_where_it_stands(base, word, key, value, fix):
    (fault,) = faults(base, word)
    assert (fault.key, fault.value) == (key, value) and fix in fault.fix


def test_a_required_key_is_a_fault_of_its_own(tmp_path):
    (tmp_path / "c.yaml").write_text("roles: {}\nmodel: {path: a}\nsteps: 1\nrun_dir: b\n")
    found = faults(tmp_path / "c.yaml")
    assert [(f.key, f.value, f.fix) for f in found] == [("data", None, "add data")]


def test_all_faults_are_found_at_once(base):
    words = ("train.lr=-1", "sampling.top_q=1", "steps=x", "data.group_size=0")
    keys = {fault.key for fault in faults(base, *words)}
    assert keys == {"train.lr", "sampling.top_q", "steps", "data.group_size"}
    words = ("roles.policy.train={lrr: 1}", "data.mix=[{weight: 0}]", f"{SET[:-1]}, kk: 1}}")
    keys = {fault.key for fault in faults(base, *words)}
    assert keys == {"roles.policy.train.lrr", "data.mix.0.weight", "evaluation.sets.x.kk"}
    words = ("lag=1", "algorithm.gamma=0.9", "train.num_minibatches=9", "rewards=[]")
    keys = {fault.key for fault in faults(base, *words)}
    assert keys == {"lag", "algorithm.gamma", "train.num_minibatches", "rewards"}


@pytest.mark.parametrize(
    ("message", "key", "value", "fix"),
    [
        ("/tmp/a.jsonl:3: no answer (on_bad_row: skip leaves it out)", "", None, "no answer"),
        ("there is no config file a.yaml", "", None, ""),
        ("source 'a' has no 'b' (data.train.c=b); it has ['x']: name", "data.train.c", "b", "name"),
        ("a.yaml: includes=5 must be a list of files", "includes", 5, "includes=5 must be a list"),
        ("flow=x:y with steps=1: why: set roles.a.pp: 2 (steps: 3)", "flow", "x:y", "set roles.a"),
        ("roles.a.pp=2: add roles.b: {c: d}", "roles.a.pp", 2, "add roles.b: {c: d}"),
    ],
)
def test_a_message_is_read(message, key, value, fix):
    fault = read_fault(message)
    assert (fault.key, fault.value) == (key, value)
    assert fault.fix.startswith(fix) and bool(fault.fix) == bool(fix)
