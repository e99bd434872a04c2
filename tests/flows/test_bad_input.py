"""Bad input: one clear error naming the key or file, before anything is computed, on every rank."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.commands.train import FlowError, train
from spmdrl.config.load import load_config
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    make_tiny_model(root / "model")
    make_tiny_model(root / "small", vocab_size=200)
    make_tiny_model(root / "gone")
    next((root / "gone").glob("*.safetensors")).unlink()
    good = '{"question": "What is 1 + 1?", "answer": "2"}\n'
    (root / "malformed.jsonl").write_text(good + '{"question": \n')
    (root / "empty.jsonl").write_text(good + "\n")
    (root / "other.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    (root / "long.jsonl").write_text(good.replace("What", "What " * 100))
    return root


CASES = {
    "missing model": (["model.path={root}/nowhere"], ["nowhere", "config.json"]),
    "missing weights": (["model.path={root}/gone"], ["gone", "safetensors"]),
    "tokenizer": (["model.path={root}/small"], ["tokenizer", "200"]),
    "degrees": (["roles.policy.tp=3"], ["roles.policy", "3", "2"]),
    "tp": (["roles.policy.tp=2", "model.path={root}/odd"], ["tp=2", "num_key_value_heads=1"]),
    "ranks": (["roles.policy.ranks=0-5"], ["roles.policy.ranks", "0-1"]),
    "malformed row": (["data.train.source={root}/malformed.jsonl"], ["malformed.jsonl:2"]),
    "empty row": (["data.train.source={root}/empty.jsonl"], ["empty.jsonl:2"]),
    "column": (["data.train.source={root}/other.jsonl"], ["question", "problem"]),
    "missing file": (["data.train.source={root}/none.jsonl"], ["none.jsonl"]),
    "long prompts": (["data.train.source={root}/long.jsonl"], ["96"]),
    "few prompts": (["data.train.size=3"], ["data.prompts_per_step=5", "3"]),
    "reward": (["rewards=[{{function: nowhere:f}}]"], ["nowhere"]),
    "no reward": (["rewards=[]"], ["rewards"]),
    "flow": (["flow=grop"], ["flow=", "grpo"]),
    "environment": (["environment=nowhere:Class"], ["nowhere"]),
    "temperature near 0": (["sampling.temperature=1e-38"], ["sampling.temperature", "0.001"]),
    "greedy": (["sampling.temperature=0"], ["flow=grpo", "sampling.temperature=0"]),
    "clip": (["algorithm.clip_low=1.5"], ["algorithm.clip_low=1.5"]),
    "two policies": (["roles.other.kind=policy"], ["2 policies"]),
    "unused reference": (["roles.reference.tp=1"], ["roles.reference", "algorithm.kl_coef=0"]),
    "evaluation positions": (
        ["evaluation.held_out=4", "evaluation.sampling={{max_tokens: 500}}"],
        ["evaluation.sampling.max_tokens=500", "512"],
    ),
    "positions": (["sampling.max_tokens=600"], ["sampling.max_tokens=600", "512"]),
    "lag": (["lag=1"], ["lag=1", "algorithm.importance_cap=null"]),
    "reward of two": (
        ["rewards=[{{function: math, role: policy}}]"],
        ["rewards.0", "function='math'", "role='policy'"],
    ),
    "reward of no role": (["rewards=[{{role: judge}}]"], ["rewards.0.role='judge'", "policy"]),
    "reward of a policy": (["rewards=[{{role: policy}}]"], ["rewards.0.role='policy'", "a policy"]),
    "no head": (
        ["roles.judge.kind=reward", "rewards=[{{role: judge}}]"],
        ["model has no tensor 'score.weight'", "roles.NAME.head=normal"],
    ),
    "head of a policy": (["roles.policy.head=zero"], ["roles.policy.head=zero", "policy"]),
    "memory of no rollout": (
        ["roles.policy.residency.kv_cache=drop"],
        ["roles.policy.residency.kv_cache=drop", "only an engine has a kv_cache"],
    ),
    "memory lost": (
        ["roles.policy.residency.weights=drop"],
        ["policy.residency.weights=drop", "host"],
    ),
    "memory too small": (["memory_gb=0.0001"], ["policy.update", "the device has 0.10 MB"]),
    "own train key": (["roles.policy.train.lrr=1"], ["roles.policy.train", "train.lr"]),
    "no value": (["flow=ppo"], ["flow=ppo needs roles.value"]),
    "custom role": (["roles.judge.kind=nowhere:Class"], ["nowhere"]),
    "all rewards fail": (
        ["rewards=[{{function: '{here}/bad_rewards.py:raises'}}]"],
        ["no such luck"],
    ),
}


def refusals(world: World, config: str, cases: list[list[str]]) -> list[str]:
    """The error of each case on this rank."""
    messages = []
    with start_reward_server() as server:
        for words in cases:
            try:
                train(load_config(config, words), world, server)
                messages.append("nothing was refused")
            except (ValueError, FlowError) as error:
                messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def messages(root):
    make_tiny_model(root / "odd", num_key_value_heads=1)
    config = write_config(root / "config.yaml", root / "model", root / "run")
    places = {"root": root, "here": HERE}
    words = [[word.format(**places) for word in case[0]] for case in CASES.values()]
    answers = run_ranks(refusals, 2, str(config), words, timeout_s=200)
    return dict(zip(CASES, zip(*answers, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_on_every_rank(messages, name):
    for message in messages[name]:
        for part in CASES[name][1]:
            assert part in message, message


def test_hanging_and_nan_rewards_are_counted_and_skipped(root):
    config = write_config(
        root / "flaky.yaml",
        root / "model",
        root / "flaky",
        steps=1,
        data={"group_size": 2},
        reward_pool={"timeout_s": 0.2, "num_workers": 4},
    )
    runs = [
        (str(config), [f"rewards=[{{function: '{HERE}/bad_rewards.py:{name}'}}]", f"run_dir={run}"])
        for name, run in (("hangs_sometimes", root / "a"), ("sometimes_nan", root / "b"))
    ]
    for records in run_ranks(run_configs, 2, runs, str(root), timeout_s=200)[0]:
        assert 0 < records[0]["reward_failed"] < 1
        assert records[0]["reward"] == pytest.approx(1 - records[0]["reward_failed"])


def save_with_a_full_disk(world: World, config: str) -> str:
    with start_reward_server() as server:
        train(load_config(config), world, server)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            train(load_config(config, ["steps=2"]), world, server)
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return "nothing happened"


def test_a_full_disk_damages_nothing(root):
    config = write_config(root / "full.yaml", root / "model", root / "full", steps=1)
    for message in run_ranks(save_with_a_full_disk, 2, str(config), timeout_s=200):
        assert "could not be written" in message and "step_00000002" in message
    assert (root / "full" / "checkpoints" / "latest").read_text() == "step_00000001"
    more = run_ranks(run_configs, 1, [(str(config), ["steps=2"])], str(root))[0][0]
    assert [r["step"] for r in more] == [1, 2]


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "spmdrl", "train", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_torchrun_ends_with_one_clear_error(root):
    config = write_config(root / "cli.yaml", root / "model", root / "cli")
    done = launch(str(config), "train.lrr=1")
    assert done.returncode != 0
    assert "unknown key 'train.lrr'" in done.stderr and "train.lr" in done.stderr
    assert 'File "' not in done.stderr.split("error:")[1].splitlines()[0]


def test_the_toy_tokenizer_is_sane(root):
    tokenizer = load_tokenizer(root / "model")
    assert tokenizer.decode(tokenizer("a b 12").input_ids) == "a b 12"
