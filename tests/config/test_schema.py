"""The JSON Schema of configurations: it takes every shipped file, and refuses wrong keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from spmdrl.commands.cli import main
from spmdrl.config.key_table import key_fields
from spmdrl.config.schema import config_schema

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def places(errors: Iterator[Any]) -> list[str]:
    """Dotted places of the innermost errors."""
    found = []
    for error in errors:
        best = jsonschema.exceptions.best_match([error])
        found.append(".".join(map(str, best.absolute_path)))
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_file_is_valid_as_it_is_written(validator, path):
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("trian: {lr: 1}", ""),
        ("train: {lrr: 1}", "train"),
        ("train: {lr: fast}", "train.lr"),
        ("train: {lr: 0}", "train.lr"),
        ("train: {betas: [0.9]}", "train.betas"),
        ("roles: {policy: {tpp: 2}}", "roles.policy"),
        ("roles: {policy: {train: {lrr: 1}}}", "roles.policy.train"),
        ("roles: {policy: {megatron: {vp: 2}}}", "roles.policy.megatron"),
        ("rewards: [{funktion: math}]", "rewards.0"),
        ("data: {mix: [{source: a.jsonl, weigth: 2}]}", "data.mix.0"),
        ("evaluation: {sets: {a: {data: {sorce: a}}}}", "evaluation.sets.a.data"),
        ("evaluation: {sampling: {temprature: 0}}", "evaluation.sampling"),
        ("lag: 2", "lag"),
        ("steps: 1.5", "steps"),
        ("includes: base.yaml", "includes"),
    ],
)
def test_a_wrong_key_or_value_is_refused_where_it_is(validator, text, place):
    found = places(validator.iter_errors(yaml.safe_load(text)))
    assert found == [place]


@pytest.mark.parametrize(
    "text",
    [
        "{steps: '${STEPS:3}', seed: '${steps}', train: '${other}'}",
        "{sampling: {stop: ['${END}']}, train: {betas: [0.9, '${BETA:0.99}']}}",
        "{roles: {reference: null, policy: {ranks: 0, dp_shard: all}}, lag: 1}",
        "{evaluation: {sets: {a: null, b: {data: {size: 3}, sampling: {top_p: 0.5}}}}}",
        "{data: {mix: [{source: a.jsonl, weight: 2}], train: {task: {any: [thing]}}}}",
    ],
)
def test_interpolations_and_parts_of_a_configuration_are_valid(validator, text):
    validator.validate(yaml.safe_load(text))


def test_the_command_prints_it_with_every_description(capsys):
    assert main(["schema"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text) == config_schema()
    for key, field in key_fields():
        assert json.dumps(field.description) in text, key
