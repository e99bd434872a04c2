"""Each key of the configuration has an effect, or is refused, or is warned of.

`key_rows.ROWS` has a line for every key of `known_keys()`: a configuration where it matters, the
words that change it, and what shows the change. The quick tests make plans and a few runs; the
sweep of all runs is marked `full`.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from flow_cases import questions, write_config
from harness import run_ranks
from key_rewards import TOKEN
from key_rows import ROWS, Row
from role_specs import specs_of
from saved_runs import CLOCKS
from spmdrl.commands.plan import plan_text
from spmdrl.commands.train import train
from spmdrl.config.data_sets import held_out_sets, train_sources
from spmdrl.config.doubts import doubts
from spmdrl.config.key_table import known_keys
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import read_config
from spmdrl.placement import role_device_type
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.assembly.make_backend import train_options
from spmdrl.run.assembly.make_engine import _native_options
from spmdrl.run.inputs import data_source, training_sampling
from spmdrl.run.reward_pools import reward_specs
from spmdrl.world import World
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 1, tzinfo=UTC)

HOW = (
    "write a line of ROWS in tests/key_rows.py: a base, what shows the effect, and the words that "
    "set the key to another value than its default where it matters"
)

ROLES: dict[str, dict[str, Any]] = {
    "grpo": {"policy": {}, "rollout": {}},
    "ppo": {"policy": {}, "rollout": {}, "value": {"head": "zero"}},
    "online_dpo": {"policy": {}, "rollout": {}, "reference": {}},
    "sft": {"policy": {}},
    "dpo": {"policy": {}},
    "reward_model": {"reward": {"head": "normal", "trained": True}},
}
OFFLINE = ("sft", "dpo", "reward_model")


def write_pairs(path: Path) -> dict[str, Any]:
    rows = [
        {"prompt": f"Name {i}", "chosen": f"yes {7 * i}", "rejected": f"no, {i}"} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": {"source": str(path), "prompt_column": "prompt", "max_tokens": 96}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("effects")
    make_tiny_model(root / "model")
    make_tiny_model(root / "experts", "Qwen3MoeForCausalLM")
    asked = questions(root / "questions.jsonl", 20)
    lines = (root / "questions.jsonl").read_text().splitlines()
    lines += lines[:5]  # asked again
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (root / "BAD.jsonl").write_text("\n".join([*lines, '{"question": 5, "answer": "5"}']) + "\n")
    pairs = write_pairs(root / "pairs.jsonl")
    found = {}
    for name in (*ROLES, "moe", "task"):
        flow = name if name in ROLES else "grpo"
        model = root / ("experts" if name == "moe" else "model")
        path = found[name] = write_config(root / f"{name}.yaml", model, root / name, steps=2)
        content = yaml.safe_load(path.read_text())
        content |= {"flow": flow, "roles": ROLES[flow]}
        if name != "task":
            own = pairs if flow in OFFLINE else asked
            content["data"] = {"prompts_per_step": 4, "group_size": 4, **own}
        if flow in OFFLINE:
            content = {k: v for k, v in content.items() if k not in ("rewards", "sampling")}
            content["data"] = {k: v for k, v in content["data"].items() if k != "group_size"}
        if flow == "sft":
            train = {**pairs["train"], "columns": {"response": "chosen"}}
            content["data"] = {**content["data"], "train": train}
        if flow == "dpo":
            content["preference"] = {"reference": "cache"}
        path.write_text(yaml.safe_dump(content))
    return found


def words_of(bases: dict[str, Path], words: tuple[str, ...]) -> list[str]:
    """With the place of the file that has a bad row."""
    return [word.replace("BAD.jsonl", str(bases["grpo"].parent / "BAD.jsonl")) for word in words]


def keys_shown(by: str) -> list[str]:
    return [key for key, given in ROWS.items() if by in given.shown]


def test_every_key_has_a_line() -> None:
    keys = set(known_keys())
    assert sorted(keys - ROWS.keys()) == [], HOW
    assert sorted(ROWS.keys() - keys) == [], "of keys that are no more"
    kinds = ("plan", "refused", "doubt", "metrics", "files", "error")
    for key, given in ROWS.items():
        assert given.shown, f"{key}: {HOW}"
        for by in given.shown:
            assert by in kinds or "::" in by, f"{key}: {by!r}: {HOW}"
        if given.words:
            assert key.split(".")[-1] in given.words[-1], f"{key}: {HOW}"
        else:
            assert "::" in given.shown[0], f"{key}: {HOW}"


def plan_of(config: Config) -> dict[str, str]:
    """What is derived from a configuration without a run, as texts."""
    specs = specs_of(config, read_config(config.model.path), 4)
    texts = {
        "plan": plan_text(config, 4).split("# derived", 1)[1],
        "roles": repr({name: config.role_kind(name) for name in config.roles}),
        "kind": config.data_kind(),
        "sampling": repr(training_sampling(config)),
        "shares": repr([source.weight for source in train_sources(config)]),
        "sets": repr(held_out_sets(config)),
        "rewards": repr(reward_specs(config.rewards)),
        "preference": repr(config.preference),
        "adapters": repr({name: spec.adapter for name, spec in specs.items()}),
    }
    texts["devices"] = repr(
        [
            role_device_type(name, role.device, (0,), ("cuda",))
            for name, role in config.roles.items()
        ]
    )
    made = [data_source(s, NOW) for s in train_sources(config)]
    texts["sources"] = repr(made)
    for name, spec in specs.items():
        if config.role_kind(name) == "rollout":
            texts[f"engine {name}"] = repr(_native_options(config, spec, None))
        if spec.trained:
            texts[f"training {name}"] = repr(train_options(config, spec, 1))
    return texts


def names_key(key: str, given: Row, message: str) -> bool:
    """Whether it names the key, or the value that it was given."""
    last, value = key.split(".")[-1], given.words[-1].split("=", 1)[1]
    return re.search(rf"\b{last}\b", message) is not None or value.split(":")[0] in message


@pytest.mark.parametrize("key", keys_shown("plan"))
def test_the_plan_differs(bases: dict[str, Path], key: str) -> None:
    given = ROWS[key]
    words = words_of(bases, given.words)
    before = plan_of(load_config(bases[given.base], words[:-1]))
    after = plan_of(load_config(bases[given.base], words))
    assert after != before, f"{key}: {given.words[-1]} changes nothing"


@pytest.mark.parametrize("key", keys_shown("refused"))
def test_what_would_have_no_effect_is_refused(bases: dict[str, Path], key: str) -> None:
    given = ROWS[key]
    plan_of(load_config(bases[given.base], list(given.words[:-1])))
    with pytest.raises(ValueError) as caught:
        plan_of(load_config(bases[given.base], list(given.words)))
    assert re.search(rf"\b{key.split('.')[-1]}\b", str(caught.value)), caught.value


@pytest.mark.parametrize("key", keys_shown("doubt"))
def test_what_has_no_effect_is_warned_of(bases: dict[str, Path], key: str) -> None:
    given = ROWS[key]
    before = doubts(load_config(bases[given.base], list(given.words[:-1])))
    found = doubts(load_config(bases[given.base], list(given.words)))
    own = given.words[-1].split("=")[0]
    assert [doubt for doubt in found if doubt not in before and own in doubt], found


def reached(tree: ast.Module, name: str) -> Iterator[str]:
    """The source of a test, and of what it names of its own module."""
    own: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            own[node.name] = node
        elif isinstance(node, ast.Assign):
            own |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    waiting, seen = [name], set[str]()
    while waiting:
        if (here := waiting.pop()) in seen or here not in own:
            continue
        seen.add(here)
        text = ast.unparse(own[here])
        yield text
        waiting += re.findall(r"\w+", text)


@pytest.mark.parametrize("key", [k for k, given in ROWS.items() if "::" in given.shown[0]])
def test_the_named_test_sets_the_key(key: str) -> None:
    file, name = ROWS[key].shown[0].split("::")
    texts = list(reached(ast.parse((ROOT / file).read_text(encoding="utf-8")), name))
    assert texts, f"{key}: {file} has no {name}: {HOW}"
    last = key.split(".")[-1]
    pattern = re.compile(rf"\b{last}['\"]?\s*[:=.]")  # as a keyword, an override or in a mapping
    assert [text for text in texts if pattern.search(text)], f"{key}: {file}::{name}: {HOW}"


NOISE = (*CLOCKS, "moved/", "gb_per_s")


def run_cases(world: World, cases: list[tuple[str, list[str]]]) -> list[dict[str, str]]:
    """What each configuration's run leaves: `metrics` but for times, and `files`; or `error`."""
    os.environ[TOKEN] = "1"
    found = []
    with start_reward_server() as server:
        for path, words in cases:
            try:
                config = load_config(path, words)
                train(config, world, server)
            except Exception as error:  # whatever it is, it is told
                found.append({"error": f"{type(error).__name__}: {error}"})
                continue
            found.append(left_by(Path(config.run_dir)))
    return found


def left_by(directory: Path) -> dict[str, str]:
    with (directory / "metrics.jsonl").open() as lines:
        records = [json.loads(line) for line in lines]
    kept = [{k: v for k, v in record.items() if not k.startswith(NOISE)} for record in records]
    files = sorted(
        re.sub(r"events\..*|attempt_.*", "", str(file.relative_to(directory)))
        + (f" {file.stat().st_size}" if file.suffix == ".safetensors" else "")
        for file in directory.rglob("*")
    )
    events = sum(file.stat().st_size for file in directory.rglob("events*"))
    weights = [f.read_bytes().hex() for f in sorted(directory.glob("model/*.safetensors"))]
    return {
        "metrics": json.dumps(kept, sort_keys=True),
        "files": json.dumps([files, events // 200, weights]),
    }


RUN = ("metrics", "files", "error")
SAMPLE = ("algorithm.loss_mean", "evaluation.every", "checkpoint.every", "model.path", "data.kind")


def check_runs(bases: dict[str, Path], keys: list[str]) -> None:
    """That each key's run differs as its line says from the one without its last word."""
    cases: dict[tuple[str, tuple[str, ...]], list[str]] = {("grpo", ("steps=2",)): []}
    for key in keys:
        given = ROWS[key]
        for words in (given.words[:-1], given.words):
            cases[given.base, words] = []
    # twice the same: what differs there is no key's effect
    cases["grpo", ()] = []
    asked = [
        (str(bases[base]), [f"run_dir={bases[base].parent / f'run_{i}'}", *words_of(bases, words)])
        for i, (base, words) in enumerate(cases)
    ]
    found = dict(zip(cases, run_ranks(run_cases, 1, asked, timeout_s=1200)[0], strict=True))
    assert found["grpo", ("steps=2",)] == found["grpo", ()]
    wrong = [text for key in keys for text in check_run(key, found)]
    assert not wrong, "\n".join(wrong)


def check_run(key: str, found: dict[tuple[str, tuple[str, ...]], dict[str, str]]) -> Iterator[str]:
    given = ROWS[key]
    without, run = found[given.base, given.words[:-1]], found[given.base, given.words]
    if "error" in without:
        yield f"{key}: without it: {without['error']}"
    elif "error" in given.shown:
        if not names_key(key, given, run.get("error", "")):
            yield f"{key}: no error that names it: {run.get('error', 'it runs')}"
    elif "error" in run:
        yield f"{key}: {run['error']}"
    else:
        same = [by for by in RUN if by in given.shown and run[by] == without[by]]
        if same:
            yield f"{key}: the same {same}"


def test_runs_differ_in_a_sample(bases: dict[str, Path]) -> None:
    check_runs(bases, list(SAMPLE))


@pytest.mark.full
def test_runs_differ(bases: dict[str, Path]) -> None:
    keys = [key for key, given in ROWS.items() if set(RUN) & set(given.shown)]
    check_runs(bases, [key for key in keys if key not in SAMPLE])
