"""Turns at a run's start: variables of their source's chat template, and a trial of each source."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flow_cases import questions, write_config
from harness import run_ranks
from heard import Heard
from spmdrl.commands.check import check
from spmdrl.config.faults import ConfigError
from spmdrl.config.load import load_config
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.inputs import read_inputs
from spmdrl.run.turns import make_turns
from spmdrl.world import World
from tiny_model import make_tiny_model

PLACE = Path(__file__).parents[1] / "turn_environments.py"
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{{ mood | default('') }}{% endif %}"
)
"""It leaves out what tools answer."""


FORGETS = (
    "{% for m in messages %}{% set text = m.content %}{% if not loop.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}{{ m.role }}: {{ text }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""It leaves out the thinking of earlier turns."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(tmp_path_factory.mktemp("turn_rendering") / "model", TEMPLATE)


def model_with(model: Path, template: str) -> Path:
    make_tiny_model(model)
    described = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").unlink(missing_ok=True)
    described["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(described))
    return model


def config_of(root: Path, model: Path, turns: dict[str, Any], **source: Any) -> str:
    data = questions(root / "q.jsonl", 12)
    (root / "run").mkdir()
    return str(
        write_config(
            root / "run.yaml",
            model,
            root / "run",
            data={"train": {**data["train"], **source}},
            rollout={"turns": turns},
            rewards=[],
        )
    )


def begin(world: World, path: str) -> str:
    """Render what the environment of the first row begins with."""
    config = load_config(path)
    inputs = read_inputs(config)
    prompt: Any = next(iter(inputs.train))
    with start_reward_server() as server, make_turns(config, server, inputs, world) as turns:
        (opened,) = turns[prompt.turns].opens([prompt.entry])
        return str(inputs.tokenizer.decode(opened.tokens))


@pytest.mark.parametrize("mood", [None, " gently"])
def test_a_source_s_variables_reach_its_turns(
    model: Path, tmp_path: Path, mood: str | None
) -> None:
    options = {} if mood is None else {"chat_template_kwargs": {"mood": mood}}
    path = config_of(tmp_path, model, {"kind": f"{PLACE}:Counting"}, **options)
    (text,) = run_ranks(begin, 1, path)
    assert text.startswith("user: Count: What is 0 +")
    assert text.endswith(f"assistant:{mood or ''}")


def test_tools_whose_results_the_template_leaves_out(model: Path, tmp_path: Path) -> None:
    turns = {"kind": "tools", "options": {"functions": ["calculator"], "format": "hermes"}}
    with pytest.raises(Exception, match="does not write messages of the role tool: use a model"):
        run_ranks(begin, 1, config_of(tmp_path, model, turns))


def said(world: World, path: str, other: str) -> tuple[int, list[str]]:
    """Count the lines that the first one's turns say at their start; and the lines of both."""
    heard = Heard()
    logging.getLogger("spmdrl.run.turns").addHandler(heard)
    logging.getLogger("spmdrl.run.turns").setLevel(logging.INFO)
    begin(world, path)
    silent = len(heard.lines)
    begin(world, other)
    return silent, heard.lines


def test_a_template_that_rewrites_history_is_told(model: Path, tmp_path: Path) -> None:
    forgetful = model_with(tmp_path / "forgetful", FORGETS)
    paths = []
    for name, path in (("keeps", model), ("forgets", forgetful)):
        (tmp_path / name).mkdir()
        paths.append(config_of(tmp_path / name, path, {"kind": f"{PLACE}:Counting"}))
    ((count, (line,)),) = run_ranks(said, 1, *paths)
    assert count == 0
    assert "writes the thinking of earlier turns otherwise" in line
    assert "a sample keeps the tokens that were there" in line


def test_rendered_histories_are_told(model: Path, tmp_path: Path) -> None:
    forgetful = model_with(tmp_path / "forgetful", FORGETS)
    paths = []
    for name, path in (("keeps", model), ("forgets", forgetful)):
        (tmp_path / name).mkdir()
        turns = {"kind": f"{PLACE}:Counting", "history": "rendered"}
        paths.append(config_of(tmp_path / name, path, turns))
    ((count, (first, second)),) = run_ranks(said, 1, *paths)
    assert count == 1 and "writes nothing that was tried otherwise" in first
    assert "writes the thinking of earlier turns otherwise" in second
    assert "continues with the conversation as it is rendered, as another part" in second


def made(world: World, path: str) -> int:
    config = load_config(path)
    inputs = read_inputs(config)
    with start_reward_server() as server, make_turns(config, server, inputs, world) as turns:
        return len(turns)


def test_calls_that_are_written_otherwise_than_their_text_are_refused(tmp_path: Path) -> None:
    calls = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}"
        "[{{ m.tool_calls[0].function.name }}]{% elif m.role == 'assistant' %}.{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = model_with(tmp_path / "brackets", calls)
    turns = {"kind": "tools", "options": {"functions": ["calculator"], "format": "hermes"}}
    assert run_ranks(made, 1, config_of(tmp_path, model, turns)) == [1]
    (tmp_path / "other").mkdir()
    path = config_of(tmp_path / "other", model, {**turns, "history": "rendered"})
    with pytest.raises(Exception, match="history=rendered: conversations are rendered from the"):
        run_ranks(made, 1, path)


FAULTS = {
    "the row": ({"kind": f"{PLACE}:Picky"}, {}, "planted: What is 0"),
    "too long": (
        {"kind": f"{PLACE}:Counting"},
        {"max_tokens": 33},
        "max_tokens=33: the environment",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_environments_are_tried_before_a_step(model: Path, tmp_path: Path, fault: str) -> None:
    turns, source, words = FAULTS[fault]
    config = load_config(config_of(tmp_path, model, turns, **source))
    with pytest.raises(ConfigError, match=words):
        check(config, 1)
    with pytest.raises(Exception, match=words):
        run_ranks(begin, 1, str(tmp_path / "run.yaml"))
