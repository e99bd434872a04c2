"""The reference's log-probabilities kept on disk, and bad input of the preference flows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_dpo_layouts import CLOCKS, write_dpo
from test_sft_and_reward_model import write_pairs

from flow_cases import run_configs
from harness import run_ranks
from spmdrl.commands.train import FlowError, train
from spmdrl.config.load import load_config
from spmdrl.flows import reference_sums
from spmdrl.flows.reference_sums import CachedSums, decode, encode
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dpo")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=1)
    write_pairs(root / "pairs.jsonl")
    return root


def records(run_dir: Path) -> list[dict[str, float]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(CLOCKS)} for r in found]


def assert_equal(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_kept_log_probabilities_give_the_same_run(root):
    """With a reference role, and with the policy before its first step for the reference."""
    words = {
        "asked": ["preference.reference=step"],
        "kept": ["preference.reference=cache"],
        "asked own": ["preference.reference=step", f"roles.reference.model={root / 'model'}"],
        "kept own": ["preference.reference=cache", "roles.reference=null"],
        "kept kto": ["preference.reference=cache", "preference.loss=kto"],
        "asked kto": ["preference.reference=step", "preference.loss=kto"],
    }
    plain = ["preference.label_smoothing=0"]
    configs = [
        (str(write_dpo(root, name.replace(" ", "_"), "dpo")), [*plain, *overrides])
        for name, overrides in words.items()
    ]
    run_ranks(run_configs, 2, configs, str(root), timeout_s=300)
    found = {name: records(root / name.replace(" ", "_")) for name in words}
    assert_equal(found["asked"], found["kept"])
    assert_equal(found["asked own"], found["kept own"])
    assert_equal(found["asked kto"], found["kept kto"])
    assert found["asked"] != found["asked own"]
    # the reference is the policy before its first step: not a bit of a gap
    before = found["kept own"][0]
    assert before["eval/held_out/accuracy"] == 0.5 and before["eval/held_out/margin"] == 0


@pytest.mark.full
def test_a_resumed_run_reads_them(root):
    words = ["preference.reference=cache", "roles.reference=null", "checkpoint.every=1"]
    whole, parts = write_dpo(root, "whole", "dpo"), write_dpo(root, "parts", "dpo")
    stop = f"trainer={HERE / 'stopping.py'}:StopDpoAfterTwo"
    run_ranks(run_configs, 2, [(str(whole), words)], str(root))
    run_ranks(run_configs, 1, [(str(parts), [*words, stop]), (str(parts), words)], str(root))
    assert_equal(records(root / "whole"), records(root / "parts"))


def refusals(world: World, cases: list[tuple[str, list[str]]]) -> list[str]:
    messages = []
    with start_reward_server() as server:
        for path, words in cases:
            try:
                train(load_config(path, words), world, server)
                messages.append("nothing was refused")
            except (ValueError, FlowError) as error:
                messages.append(str(error))
    return messages


BAD: dict[str, tuple[list[str], list[str]]] = {
    "no reference": (
        ["roles.reference=null"],
        ["preference.loss=dpo", "add roles.reference", "preference.reference=cache"],
    ),
    "unused reference": (
        ["preference={loss: simpo, label_smoothing: 0}"],
        ["roles.reference is configured but unused", "preference.loss=simpo"],
    ),
    "smoothing": (["preference.loss=ipo"], ["preference.label_smoothing=0.1", "ipo"]),
    "margin": (["preference.margin=1"], ["preference.margin=1", "dpo"]),
    "no policy": (["roles.policy=null"], ["flow=dpo needs roles.policy"]),
    "one sample": (
        ["flow=online_dpo", "roles.rollout={}", "rewards=[{function: math}]", "data.group_size=1"],
        ["flow=online_dpo", "data.group_size=1", "at least 2"],
    ),
    "online loss": (
        [
            "flow=online_dpo",
            "rewards=[{function: math}]",
            "preference={loss: kto, label_smoothing: 0}",
        ],
        ["flow=online_dpo", "preference.loss=kto"],
    ),
    "no judge": (["flow=online_dpo"], ["rewards=[] with flow=online_dpo"]),
    "column": (
        ["data.train.columns={chosen: better}"],
        ["no column 'better'", "'chosen', 'prompt', 'rejected'"],
    ),
    "empty answers": (
        ["data.train.source={root}/empty.jsonl"],
        ["leaves no example of 3 rows", "1 with an empty response", "1 with equal responses"],
    ),
    "no room": (["data.train.max_tokens=10"], ["60 whose prompt leaves no room"]),
    "too long": (["data.train.max_tokens=600"], ["data.train.max_tokens=600", "512 positions"]),
    "kto of one prompt": (
        ["preference={loss: kto, label_smoothing: 0}", "data.train.source={root}/one.jsonl",
         "evaluation.held_out=0", "data.prompts_per_step=2"],
        ["2 pairs have one prompt"],
    ),
    "another reference": (
        ["preference.reference=cache", "run_dir={root}/known"],
        ["holds log-probabilities of", "remove the file"],
    ),
    "rows missing": (
        ["preference.reference=cache", "roles.reference=null", "run_dir={root}/longer", "steps=4"],
        ["lacks rows of the data", "has made 3 steps since"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def messages(root) -> dict[str, list[str]]:
    good = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    rows = [{**good, "rejected": "yes"}, {**good, "chosen": " "}, {**good, "chosen": "y" * 200}]
    (root / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = [good, {**good, "chosen": "oh yes"}]
    (root / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one))
    (root / "known").mkdir()
    (root / "known" / "reference.safetensors").write_bytes(encode({b"0" * 16: 1.0}, "a model"))
    path = str(write_dpo(root, "bad", "dpo"))
    kept = ["preference.reference=cache", "roles.reference=null", f"run_dir={root / 'longer'}"]
    run_ranks(run_configs, 1, [(path, kept)], str(root))
    cases = [(path, [word.format(root=root) if "{root}" in word else word for word in words])
             for words, _ in BAD.values()]  # fmt: skip
    answers = run_ranks(refusals, 2, cases, timeout_s=200)
    return dict(zip(BAD, map(list, zip(*answers, strict=True)), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_every_rank(messages, name):
    for message in messages[name]:
        for part in BAD[name][1]:
            assert part in message, message


def test_kept_sums_survive_the_file():
    sums = {bytes([i]) * 16: -1.5 * i for i in range(5)}
    content = encode(sums, "a model (12)")
    assert decode(content, "a model (12)") == sums
    assert decode(content, "another") == "holds log-probabilities of a model (12)"


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", bytes(50), b"\xff" * 40, b"\x05\0\0\0\0\0\0\0[1,2]"]
)
def test_a_damaged_file_of_sums_is_named(tmp_path, content):
    sums = object.__new__(CachedSums)
    sums._path, sums._made_by = tmp_path / "reference.safetensors", "a model (12)"
    sums._path.write_bytes(content)
    assert str(sums._decoded()).startswith("cannot be read (")


def share_sums(world: World, directory: Path) -> tuple[list[int], list[int], bool]:
    """Count the sums that this rank sends and then has, when nobody has computed one and when
    rank 1 has; tell whether the file holds them all.
    """
    sent: list[int] = []
    gather = reference_sums.gather_objects

    def counting(value: Any) -> list[Any]:
        sent.append(len(value))
        return gather(value)

    reference_sums.gather_objects = counting
    known = {bytes([i]) * 16: -1.0 * i for i in range(50)}
    sums = object.__new__(CachedSums)
    sums._run = SimpleNamespace(world=world)
    sums._path, sums._made_by = directory / "reference.safetensors", "a model (12)"
    sums._sums, counts = dict(known), []
    for computed in ({}, {b"x" * 16: 5.0} if world.rank == 1 else {}):
        sums._sums |= computed
        sums._share(frozenset(known))
        counts.append(len(sums._sums))
    return sent, counts, decode(sums._path.read_bytes(), sums._made_by) == sums._sums


def test_ranks_send_what_they_have_computed_alone(tmp_path):
    assert run_ranks(share_sums, 2, tmp_path) == [([0], [50, 51], True), ([1], [50, 51], True)]
