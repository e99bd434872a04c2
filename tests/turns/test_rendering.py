"""The tokens of an observation are those that the template writes after a turn, and no others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES, Family, byte_tokenizer, space_tokenizer
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.turns.rendering import TurnRenderer

NOW = datetime(2024, 2, 29)
MODEL = Path(
    os.environ.get(
        "SPMDRL_TEST_MODEL", Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
    )
)
USER = {"role": "user", "content": "wrong, again"}
TOOL = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "call12345"}
MAKERS = (byte_tokenizer, space_tokenizer)


def spelled(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False))


EXPECTED: Mapping[tuple[str, str], str] = {
    ("chatml", "user"): "<|im_end|>|\n<|im_start|>user\nwrong, again<|im_end|>\n"
    "<|im_start|>assistant\n",
    ("chatml", "tool"): "<|im_end|>|\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n",
    ("hermes", "tool"): "<|im_end|>|\n<|im_start|>user\n<tool_response>\n4\n</tool_response>"
    "<|im_end|>\n<|im_start|>assistant\n",
    ("thinking", "user"): "<|im_end|>|\n<|im_start|>user\nwrong, again<|im_end|>\n"
    "<|im_start|>assistant\n",
    ("thinking", "tool"): "<|im_end|>|\n<|im_start|>user\n<tool_response>\n4\n</tool_response>"
    "<|im_end|>\n<|im_start|>assistant\n",
    ("headers", "user"): "<|eot|>|<|start_header|>user<|end_header|>\n\nwrong, again<|eot|>"
    "<|start_header|>assistant<|end_header|>\n\n",
    ("headers", "tool"): '<|eot|>|<|start_header|>ipython<|end_header|>\n\n"4"<|eot|>'
    "<|start_header|>assistant<|end_header|>\n\n",
    ("brackets", "user"): "</s>|[INST] wrong, again[/INST]",
    ("brackets", "tool"): '</s>|[RESULTS]{"content": "4", "id": "call12345"}[/RESULTS]',
    ("model", "user"): "<end_turn>|\n<turn>user\nwrong, again<end_turn>\n<turn>model\n",
    ("channels", "user"): "<|end|>|<|start|>user<|message|>wrong, again<|end|><|start|>assistant",
    ("channels", "tool"): "<|call|>|<|start|>functions.add to=assistant<|channel|>commentary"
    '<|message|>"4"<|end|><|start|>assistant',
    ("roles", "user"): "|\nuser: wrong, again\nassistant: ",
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("name", "role"), EXPECTED)
def test_what_follows_a_turn(name: str, role: str, make: Any) -> None:
    """`|` stands between the end of the turn and the rest."""
    renderer = TurnRenderer(make(FAMILIES[name]), NOW)
    end, rest = _parts(EXPECTED[name, role])
    message = USER if role == "user" else TOOL
    after = renderer.observation([message], ended=True)
    assert spelled(renderer.tokenizer, after) == rest
    cut = renderer.observation([message], ended=False)
    assert spelled(renderer.tokenizer, cut) == end + rest
    if end:
        assert cut[1:] == after and cut[0] in renderer.end_ids


def _parts(text: str) -> tuple[str, str]:
    place = max(text.find(">|") + 1, 0)
    return text[:place], text[place + 1 :]


def test_several_results_share_what_the_template_lets_them_share() -> None:
    renderer = TurnRenderer(byte_tokenizer(FAMILIES["hermes"]), NOW)
    after = renderer.observation([TOOL, {**TOOL, "content": "5"}], ended=True)
    assert spelled(renderer.tokenizer, after) == (
        "\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_environment_writes_is_text(name: str, make: Any) -> None:
    """Its tokens are those of the template, and letters."""
    family = FAMILIES[name]
    renderer = TurnRenderer(make(family), NOW)
    tokenizer = renderer.tokenizer
    added = set(tokenizer.added_tokens_decoder)
    written = " ".join(["fine", *family.special, *family.words, "<s>", "x"])
    harmless = renderer.observation([{**USER, "content": "fine x"}], ended=False)
    hostile = renderer.observation([{**USER, "content": written}], ended=False)
    assert [i for i in hostile if i in added] == [i for i in harmless if i in added]
    assert written in spelled(tokenizer, hostile)
    asked = renderer.opening([{**USER, "content": written}])
    assert [i for i in asked if i in added] == [i for i in renderer.opening([USER]) if i in added]
    assert written in spelled(tokenizer, asked)


def test_an_observation_is_the_same_at_any_time() -> None:
    tokenizer = byte_tokenizer(FAMILIES["headers"])
    early, late = TurnRenderer(tokenizer, NOW), TurnRenderer(tokenizer, datetime(2031, 1, 1))
    assert early.observation([TOOL], ended=False) == late.observation([TOOL], ended=False)
    assert early.opening([USER]) != late.opening([USER])


def test_variables_of_the_template() -> None:
    tokenizer = byte_tokenizer(FAMILIES["thinking"])
    renderer = TurnRenderer(tokenizer, NOW, {"enable_thinking": False})
    head = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert spelled(tokenizer, renderer.observation([TOOL], ended=True)).endswith(head)
    assert spelled(tokenizer, renderer.opening([USER])).endswith(head)


def test_the_tools_of_an_opening_are_text_too() -> None:
    tokenizer = byte_tokenizer(FAMILIES["hermes"])
    tool = {"type": "function", "function": {"name": "add", "description": "ends <|im_end|>"}}
    ids = TurnRenderer(tokenizer, NOW).opening([USER], [tool])
    assert '"description": "ends <|im_end|>"' in spelled(tokenizer, ids)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize(
    ("name", "role", "problem"),
    [
        ("model", "tool", "role tool after a turn: .*roles must be user and assistant in turn"),
        ("model", "system", "role system after a turn: .*roles must be user and assistant"),
        ("brackets", "system", "role system after a turn: .*only user, tool and assistant"),
    ],
)
def test_a_role_that_the_template_refuses(name: str, role: str, problem: str) -> None:
    renderer = TurnRenderer(byte_tokenizer(FAMILIES[name]), NOW)
    renderer.check(["user"])
    with pytest.raises(ValueError, match=problem):
        renderer.check(["user", role])


def test_a_role_that_the_template_leaves_out() -> None:
    silent = "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
    silent += "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    renderer = TurnRenderer(byte_tokenizer(Family(template=silent, special=("<|im_end|>",))), NOW)
    with pytest.raises(ValueError, match="does not write messages of the role tool"):
        renderer.check(["tool"])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "without one the sample ends"),
        ([{"role": "assistant", "content": "a"}], "of any role but assistant"),
        ([{"role": "user", "content": 4}], "has a role and a text as content, unlike"),
        (["again"], "has a role and a text as content, unlike 'again'"),
    ],
)
def test_messages_that_cannot_be(messages: Any, problem: str) -> None:
    renderer = TurnRenderer(byte_tokenizer(FAMILIES["chatml"]), NOW)
    with pytest.raises(ValueError, match=problem):
        renderer.observation(messages, ended=True)


def test_the_text_of_a_turn() -> None:
    tokenizer = byte_tokenizer(FAMILIES["channels"])
    renderer = TurnRenderer(tokenizer, NOW)
    written = "<|channel|>final<|message|>four"
    for end in ("", "<|return|>", "<|call|>", "<|end|>"):
        turn = tokenizer(written + end, add_special_tokens=False)["input_ids"]
        assert renderer.text(turn, special=True) == written
        assert renderer.text(turn, special=False) == "finalfour"


def test_a_tokenizer_without_a_template() -> None:
    tokenizer = byte_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"rollout\.turns.*no chat template"):
        TurnRenderer(tokenizer, NOW)


@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"{MODEL} is missing")
def test_a_real_template() -> None:
    """Prompt, turn and observation lie as the template writes the whole."""
    tokenizer = load_tokenizer(MODEL)
    renderer = TurnRenderer(tokenizer, NOW)
    talk = [USER, {"role": "assistant", "content": "Is it 4?"}, {**USER, "content": "No.\n"}]
    turn = tokenizer("Is it 4?<|im_end|>", add_special_tokens=False)["input_ids"]
    whole = [*renderer.opening(talk[:1]), *turn, *renderer.observation(talk[2:], ended=True)]
    assert whole == tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    assert renderer.text(turn, special=False) == "Is it 4?"


@pytest.mark.parametrize(
    ("name", "rewritten"),
    [
        ("chatml", ()),
        ("hermes", ()),
        ("thinking", ("turns", "thinking", "tools")),
        ("headers", ()),
        ("brackets", ("tools",)),
        ("model", ()),
        ("channels", ()),
        ("roles", ()),
    ],
)
def test_what_a_template_rewrites(name: str, rewritten: tuple[str, ...]) -> None:
    """Thoughts, also empty ones, are left out once a question follows; tools move to the last."""
    assert TurnRenderer(byte_tokenizer(FAMILIES[name]), NOW).rewritten == rewritten
