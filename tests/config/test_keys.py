"""Keys: each has a group, a level and a description; the basic ones are those that users read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from spmdrl.commands.cli import main
from spmdrl.config.key_table import basic_keys, group_of, key_fields, key_table, known_keys
from spmdrl.config.load import substitute

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "configs" / "methods"
RECIPES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent != METHODS]
PAGES = [ROOT / "README.md", *sorted((ROOT / "scripts").glob("quickstart*"))]
PAGES += sorted(p for p in (ROOT / "scripts" / "examples").iterdir() if p.is_file())

VERBS = (
    r"Add|Adapt|Allow|Answer|Apply|Ask|Assume|Average|Bound|Cap|Change|Clip|Compare|"
    r"Compute|Count|Credit|Cut|Decay|Decide|Decode|Derive|Discount|Divide|Draw|End|Estimate|"
    r"Evaluate|Export|Give|Hold|Keep|Leave|Let|Log|Lower|Make|Multiply|Name|Override|"
    r"Pass|Place|Plan|Process|Put|Read|Recompute|Replace|Replay|Report|Reserve|"
    r"Resume|Run|Sample|Save|Score|Send|Set|Shard|Share|Show|Split|Store|Take|Train|"
    r"Treat|Use|Warm|Weight|Whiten|Write"
)
"""Verbs that a description may open with; add yours."""

UNITS = {"_s": "second", "_gb": "GB", "_mb": "MB", "tokens": "token", "steps": "step"}
"""End of a key's name -> the unit that its description names."""


def given(values: Any, prefix: str) -> Iterator[str]:
    """Keys of `known_keys` that a mapping sets, with those that its own keys stand for."""
    known = known_keys()
    if prefix in known:
        yield prefix
    if isinstance(values, dict):
        for name, value in values.items():
            yield from given(value, stands_for(f"{prefix}.{name}" if prefix else str(name)))
    elif isinstance(values, list):
        for value in values:
            yield from given(value, stands_for(f"{prefix}.0"))
    elif values is None and prefix == "roles.NAME":
        return  # it is taken away
    elif prefix not in known and not any(prefix.startswith(f"{key}.") for key in known):
        raise AssertionError(f"no key {prefix!r}")


def stands_for(key: str) -> str:
    """The key of which a section's own key is a change, as `roles.NAME.train.lr` of `train.lr`."""
    key = re.sub(r"^roles\.[^.]+", "roles.NAME", key)
    for pattern, other in (
        (r"roles\.NAME\.train\.(.+)", r"train.\1"),
        (r"data\.mix\.0\.(?!weight)(.+)", r"data.train.\1"),
        (r"evaluation\.sets\.[^.]+\.data\.(.+)", r"data.train.\1"),
        (r"evaluation\.(?:sets\.[^.]+\.)?sampling\.(.+)", r"sampling.\1"),
        (r"evaluation\.sets\.[^.]+\.rewards\.0\.(.+)", r"rewards.0.\1"),
        (r"evaluation\.sets\.[^.]+\.(?!data|sampling|rewards|kind)(.+)", r"evaluation.\1"),
    ):
        key = re.sub(f"^{pattern}$", other, key)
    return key


def keys_of_page(text: str) -> set[str]:
    """Keys that a page or script names: `key=value` anywhere, `key: value` in backticks."""
    found = re.findall(r"(?<![\w.$/-])([a-z_]+(?:\.\w+)*)=", text)
    found += re.findall(r"`([a-z_]+(?:\.\w+)*): [^`]*`", text)
    return {stands_for(key) for key in found} & set(known_keys())


BACKENDS = {
    "megatron": {"train.backend", "roles.NAME.pp", "roles.NAME.megatron"},
    "deepspeed": {"train.backend", "train.deepspeed.stage"},
}
"""Backend at the end of a recipe's name -> the advanced keys that such a recipe is about."""


def test_what_users_read_sets_basic_keys_only() -> None:
    basic = set(basic_keys())
    assert len(basic) <= 60 and len(RECIPES) > 25
    for path in RECIPES:
        text = substitute(path.read_text(encoding="utf-8"), str(path))
        content = yaml.safe_load(re.sub(r"\$\{[^}]*\}", "x", text))
        content.pop("includes", None)
        allowed = basic | BACKENDS.get(path.stem.rpartition("_")[2], set())
        if content.get("rollout", {}).get("turns"):  # what such a configuration is about
            allowed |= {key for key in known_keys() if key.startswith("rollout.turns.")}
        assert sorted(set(given(content, "")) - allowed) == [], path
    for path in PAGES:
        assert sorted(keys_of_page(path.read_text(encoding="utf-8")) - basic) == [], path


def test_the_walk_finds_keys_where_they_are() -> None:
    content = {
        "roles": {"a": {"train": {"lr": 1}, "tp": 2}},
        "rewards": [{"weight": 1}],
        "evaluation": {"sets": {"x": {"data": {"size": 1}, "rewards": [{"role": "a"}], "k": [1]}}},
    }
    keys = {"roles.NAME.train", "train.lr", "roles.NAME.tp", "rewards.0.weight", "evaluation.sets"}
    assert set(given(content, "")) == keys | {"data.train.size", "rewards.0.role", "evaluation.k"}
    page = "run `lag: 1` with roles.policy.tp=2 and $other=3, x/steps=3 --seed=4"
    assert keys_of_page(page) == {"lag", "roles.NAME.tp"}
    with pytest.raises(AssertionError, match=r"train\.lrr"):
        list(given({"train": {"lrr": 1}}, ""))


def test_methods_set_keys_that_exist_and_are_each_part_of_a_recipe() -> None:
    included = "".join(path.read_text(encoding="utf-8") for path in RECIPES)
    for path in METHODS.iterdir():
        assert set(given(yaml.safe_load(path.read_text(encoding="utf-8")), ""))
        assert f"methods/{path.name}" in included, path


def test_every_key_has_a_group_and_a_level(capsys: pytest.CaptureFixture[str]) -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    for key in ("roles.NAME.dp_shard", "rewards.0.weight", "evaluation.sets"):
        assert key in keys
    groups = {
        "seed": "run",
        "roles.NAME.kind": "roles",
        "roles.NAME.tp": "placement",
        "reward_pool.timeout_s": "rewards",
        "data.train.size": "data",
    }
    assert {key: group_of(key) for key in groups} == groups
    names = list(dict.fromkeys(map(group_of, keys)))
    assert 10 < len(names) < 20
    table = key_table()
    assert re.findall(r"^### (\w+)$", table, re.M) == names
    assert len(re.findall(r"^\| `\S+` \| (?:basic|advanced) \|", table, re.M)) == len(keys)
    assert main(["keys", "--group", "rollout", "--basic"]) == 0
    assert "rollout." not in capsys.readouterr().out
    assert main(["keys", "--group", "placement"]) == 0
    rows = re.findall(r"^\| `(\S+)` \|", capsys.readouterr().out, re.M)
    assert rows == [key for key in keys if group_of(key) == "placement"] and len(rows) == 10
    assert main(["keys", "--group", "nope"]) == 2
    assert "--group=nope: there is no such group: give one of run, model" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "field"), list(key_fields()), ids=lambda own: str(own)[:40])
def test_a_description_is_a_sentence_with_unit_and_range(key: str, field: FieldInfo) -> None:
    text = field.description or ""
    assert re.match(rf"(?:{VERBS})\b", text), "it opens with a verb"
    assert text.endswith(".") and not re.search(r"[a-z]\. [A-Z]", text), "it is one sentence"
    for end, unit in UNITS.items():
        assert not key.endswith(end) or unit in text, f"it names its unit, {unit}"
    for limit in (m for m in field.metadata if isinstance(m, Ge | Gt | Le | Lt)):
        value = next(iter(vars_of(limit)))
        if abs(value) >= 2**62:
            assert "64 bits" in text
            continue
        words = {Ge: r"(?:at least |)", Gt: "above ", Le: r"(?:at most |to )", Lt: "below "}
        assert re.search(rf"\b{words[type(limit)]}{value:g}\b", text), f"it names its limit {value}"
    numbers = {int, float} & {field.annotation, *get_args(field.annotation)}
    if numbers and bool not in get_args(field.annotation) and str not in get_args(field.annotation):
        assert re.search(r"at least|above|to|any", text), "it names its range"


def vars_of(limit: Ge | Gt | Le | Lt) -> list[float]:
    return [getattr(limit, name) for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)]
