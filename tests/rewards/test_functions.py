"""The built-in reward functions and the loading of a user's own."""

from fractions import Fraction

import pytest

from spmdrl.rewards.functions import BUILT_IN, RewardSpec, load
from spmdrl.rewards.texts import last_value


def score(function, response, answer=None, entry=None, **parameters):
    spec = RewardSpec(name="x", function=function, options=parameters)
    return load(spec)("prompt", response, answer, entry or {})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("no number", None),
        ("5 - 9 = -4.", "-4"),
        ("10-4", "4"),
        ("(3)-4", "4"),
        ("5 − 9 = −4", "-4"),
        ("$1,234.50!", "1234.5"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        (".5", "0.5"),
        ("2e3", "2000"),
        ("007", "7"),
        ("the answer is 4.0", "4"),
    ],
)
def test_last_value(text, number):
    assert last_value(text) == (None if number is None else Fraction(number))


def test_number():
    assert score("number", "4 + 3 = 7", "7") == 1.0
    assert score("number", "7 or 8", "7") == 0.0
    assert score("number", "seven", "7") == 0.0
    assert score("number", "1,000.0", "1000") == 1.0
    with pytest.raises(ValueError, match="no answer"):
        score("number", "7")
    with pytest.raises(ValueError, match="holds no number"):
        score("number", "7", "seven")


def test_exact():
    assert score("exact", "  The  Cat.\n", "the cat") == 1.0
    assert score("exact", "a cat", "the cat") == 0.0
    assert score("exact", "Cat", "cat", ignore_case=False) == 0.0
    assert score("exact", "cat.", "cat", ignore_punctuation=False) == 0.0


def test_format():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    assert score("format", "<think>a\nb</think>\n<answer>4</answer>", pattern=pattern) == 1.0
    assert score("format", "x <think></think><answer></answer>", pattern=pattern) == 1.0
    assert score("format", "x <think></think><answer></answer>", pattern=pattern, whole=True) == 0
    assert score("format", "4", pattern=pattern) == 0.0


def test_math():
    assert score("math", r"so it is $\boxed{\frac{1}{2}}$", "0.5") == 1.0
    assert score("math", r"$x = \frac{2}{4}$", r"\frac{1}{2}") == 1.0
    assert score("math", "The answer is 71", "72") == 0.0
    assert score("math", "I do not know", "72") == 0.0


def test_reasoning_gym():
    entry = {
        "answer": "4",
        "metadata": {},
        "reasoning_gym": {"task": "chain_sum", "parameters": {"min_terms": 2}},
    }
    assert score("reasoning_gym", "4", "4", entry) == 1.0
    assert score("reasoning_gym", "<answer>4</answer>", "4", entry) == 1.0
    assert score("reasoning_gym", "it is 14", "4", entry, extract="number") == 0.5
    assert score("reasoning_gym", "it is 14", "4", entry, extract="number", binary=True) == 0.0
    assert score("reasoning_gym", "it is four", "4", entry, extract="number") == 0.0
    with pytest.raises(ValueError, match="reasoning_gym source"):
        score("reasoning_gym", "4", "4", {})


def test_a_file_with_parameters_and_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompt, response, answer, entry, *, scale=1.0):\n"
        "    return scale * len(response)\n"
    )
    assert score(f"{file}:length", "abc") == 3.0
    assert score(f"{file}:length", "abc", scale=2.0) == 6.0
    assert load(RewardSpec(name="x", function="operator:call")) is not None


@pytest.mark.parametrize(
    ("function", "parameters", "message"),
    [
        ("nonsense", {}, "nonsense.*neither built in.*exact.*nor 'module:function'"),
        ("no_such_module:f", {}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ("/no/such/file.py:f", {}, "there is no file /no/such/file.py"),
        ("json:no_such_function", {}, "json has no 'no_such_function'"),
        ("json:JSONDecodeErro", {}, "json has no .*; did you mean 'JSONDecodeError'"),
        ("math:pi", {}, "is a float: name a function"),
        ("number", {"n": 1}, "unexpected keyword argument 'n'"),
        ("format", {"pattern": "("}, "unterminated"),
        ("reasoning_gym", {"extract": "all"}, "tag, number or whole"),
    ],
)
def test_what_cannot_be_loaded_is_named(function, parameters, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(RewardSpec(name="mine", function=function, options=parameters))
    assert "'mine'" in str(caught.value)


def test_built_in_names():
    assert sorted(BUILT_IN) == ["code", "exact", "format", "math", "number", "reasoning_gym"]
