"""Functions as tools: what the model is told of each call, and of what is wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Literal

import pytest

from spmdrl.sandbox.run import unusable
from spmdrl.turns.arithmetic import evaluate
from spmdrl.turns.kinds import KINDS, environment_kind
from spmdrl.turns.schemas import schema_of
from spmdrl.turns.tool_calls import ToolCall, ToolCalls
from spmdrl.turns.tools import ToolEnvironment

ROW = {"messages": [{"role": "user", "content": "3 * 4?"}], "answer": "12"}


def lookup(key: str, many: list[int], how: Literal["up", "down"] = "up", *, most: int = 3) -> Any:
    """Look something up.

    Args:
        key: what to
            look up
        many: numbers
        how: the direction
        most: how many
    """
    if key == "leave":
        raise SystemExit(3)
    return {"key": key, "many": many[:most], "how": how}


def dashes(text: str) -> ToolCalls:
    """Read calls of a format of one's own: `- name {...}`."""
    if not text.startswith("- "):
        return ToolCalls(text=text)
    name, arguments = text.removeprefix("- ").split(" ", 1)
    return ToolCalls(text="", calls=(ToolCall(name=name, arguments=json.loads(arguments)),))


HERE = f"{__file__}:"


def called(name: str, **arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def environment(*functions: Any, **options: Any) -> ToolEnvironment:
    return ToolEnvironment(list(functions), **{"format": "hermes", **options})


def test_calls_of_a_turn_run_in_their_order_and_the_turn_without_one_ends_the_sample():
    tools = environment("calculator", f"{HERE}lookup")
    assert tools.start(ROW) == ROW["messages"]
    found = tools.step(
        "I ask. "
        + called("lookup", key="a", many=[1, 2, 3], most=2)
        + called("calculator", expression="3 * 4")
    )
    assert [(m["role"], m["name"], m["content"]) for m in found.messages] == [
        ("tool", "lookup", '{"key": "a", "many": [1, 2], "how": "up"}'),
        ("tool", "calculator", "12"),
    ]
    assert [m["tool_call_id"] for m in found.messages] == ["call00001", "call00002"]
    assert (found.done, found.metrics) == (False, {"tool_calls": 2, "valid_calls": 2})
    resumed = environment("calculator")
    resumed.load(tools.save())
    again = resumed.step(called("calculator", expression="1"))
    assert again.messages[0]["tool_call_id"] == "call00003"
    assert tools.step("It is 12.").done


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("<tool_call>{'name'}</tool_call>", "the tool call is no JSON"),
        (called("nothing"), "error: no tool 'nothing': there is calculator, lookup"),
        (called("calculator"), "argument 'expression': Field required"),
        (called("lookup", key="a", many="b"), "argument 'many'"),
        (called("lookup", key="a", many=[], how="left"), "Input should be 'up' or 'down'"),
        (called("lookup", key="a", many=[], far=1), "argument 'far'"),
        (called("lookup", key="leave", many=[]), "error: SystemExit: 3"),
        (called("calculator", expression="1 / 0"), "division by zero"),
    ],
)
def test_what_is_wrong_with_a_call_is_told_and_counted(turn: str, said: str) -> None:
    found = environment("calculator", f"{HERE}lookup").step(turn)
    (message,) = found.messages
    assert said in message["content"] and message["role"] == "tool"
    assert (found.done, found.metrics) == (False, {"tool_calls": 1, "valid_calls": 0})
    assert found.reward == 0
    charged = environment("calculator", f"{HERE}lookup", invalid_call_reward=-0.25)
    right = called("calculator", expression="1")
    assert charged.step(turn).reward == -0.25 and charged.step(right).reward == 0


def test_a_long_result_is_cut_and_says_so():
    tools = environment(f"{HERE}lookup", max_result_chars=20)
    found = tools.step(called("lookup", key="x" * 50, many=[]))
    assert found.messages[0]["content"] == '{"key": "xxxxxxxxxxx ... (66 characters more)'


def test_a_parser_of_ones_own_reads_the_calls():
    tools = environment("calculator", format=f"{HERE}dashes")
    assert tools.step('- calculator {"expression": "2+2"}').messages[0]["content"] == "4"
    assert tools.step("4").done


@pytest.mark.parametrize(
    ("functions", "options", "said"),
    [
        ([], {}, "functions=\\[\\]: it must be a list of functions"),
        ("calculator", {}, "it must be a list of functions"),
        (["calculator", "calculator"], {}, "two functions are named 'calculator'"),
        ([f"{HERE}none"], {}, "has no 'none'"),
        ([f"{HERE}ROW"], {}, "is no function"),
        ([f"{HERE}environment"], {}, "functions: parameter 'functions' of environment"),
        ([{"python": {"speed": 1}}], {}, "options of python"),
        (["calculator"], {"format": "latin"}, "format=latin: it must be hermes, llama3"),
        (["calculator"], {"max_result_chars": 0}, "max_result_chars=0: it must be at least 1"),
        (["calculator"], {"invalid_call_reward": float("nan")}, "invalid_call_reward=nan"),
    ],
)
def test_wrong_options_are_refused(functions: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ToolEnvironment(functions, **{"format": "hermes", **options})


def test_the_format_of_calls_is_the_templates():
    found = environment_kind("tools", {"functions": ["calculator"]}, "... <tool_call> ...")
    assert (found.where, found.options["format"]) == (KINDS["tools"], "hermes")
    with pytest.raises(ValueError, match="format=auto: the model's chat template shows no tool"):
        environment_kind("tools", {}, "no calls")
    assert environment_kind("tools", {"format": "llama3"}, "").options == {"format": "llama3"}
    own = environment_kind("my.py:Mine", {"a": 1}, "")
    assert (own.where, own.modules) == ("my.py:Mine", ())
    assert environment_kind("textarena", {"game": "x"}, "").modules == ("textarena",)
    with pytest.raises(ValueError, match="kind=tool: it must be tools, gymnasium"):
        environment_kind("tool", {}, "")


def one(a: int, b: float = 1.5) -> str:
    """Add two numbers.

    Over two lines.

    Args:
        a: the first
        b: the second, which is
            longer (choices: ["1", "2"])

    Returns:
        the sum
    """
    return str(a + b)


def two(
    a: list[str] | None, b: dict[str, int], c: int | str, d: tuple[int, str], e: list[int] | str
) -> None:
    """Do nothing.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
    """


@pytest.mark.parametrize("function", [one, two, lookup], ids=lambda f: f.__name__)
def test_schemas_equal_those_of_transformers(function: Any) -> None:
    from transformers.utils import get_json_schema

    assert schema_of(function) == get_json_schema(function)


def test_schemas_need_types_and_descriptions_and_no_torch():
    def bare(x: int) -> None: ...

    def untold(x: int) -> None:
        """Say nothing of x."""

    with pytest.raises(ValueError, match="the tool bare has no docstring"):
        schema_of(bare)
    with pytest.raises(ValueError, match="its parameter x is not described under Args"):
        schema_of(untold)
    code = (
        "import sys\nfrom spmdrl.turns.tools import ToolEnvironment\n"
        "print(ToolEnvironment(['calculator'], 'hermes').tools()[0]['function']['name'], "
        "'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "calculator False False\n"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("123 * 456", "56088"),
        ("(1,200 + 34) / 4", "308.5"),
        ("2^10 - -1", "1025"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** -2", "0.25"),
        ("round(2.567, 1) + abs(-1) + max(1, 2) + min(3)", "8.6"),
        ("12 × 12 ÷ 2", "72"),
        ("1e3", "1000"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "12 +", "x", "__import__('os')", "(1).real", "9 ** 9 ** 9", "1e999999", "True"),
        *("2 ** 0.5", "1" * 400, "(" * 200, "0x10", "round(1, 99)", "[1]", "1 if 2 else 3", "1j"),
        "12**1000**2",
    ],
)
def test_the_calculator_refuses_what_is_no_arithmetic(expression: str) -> None:
    with pytest.raises(ValueError):
        evaluate(expression)


@pytest.mark.skipif(unusable() is not None, reason=f"no sandbox here: {unusable()}")
def test_programs_run_confined_and_say_how_they_ended():
    tools = environment({"python": {"timeout_s": 1.0}})
    assert [s["function"]["name"] for s in tools.tools()] == ["python"]

    def said(code: str) -> str:
        return str(tools.step(called("python", code=code)).messages[0]["content"])

    assert said("print(6 * 7)") == "42\n"
    assert said("while True: pass") == "error: it took more than 1 s"
    error = said("print(1)\ndef f():\n    raise KeyError('k')\nf()")
    assert error.startswith("1\n\nTraceback") and error.endswith("KeyError: 'k'")
    assert error.count("File") == 2  # those of the program alone
    assert "Error" in said("import socket\nsocket.create_connection(('127.0.0.1', 1))")


def test_the_python_tool_refuses_where_it_cannot_confine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmdrl.turns.shipped_tools.unusable", lambda: "no namespaces")
    with pytest.raises(ValueError, match=r"cannot be confined on this host \(no namespaces\)"):
        environment("python")
    tools = environment({"python": {"sandbox": "none"}})
    assert tools.step(called("python", code="print(1)")).messages[0]["content"] == "1\n"
