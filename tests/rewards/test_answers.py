"""Verdicts of `math`, `number` and `exact` on (answer, response) pairs that are easy to misjudge.

`math_verify_cases.jsonl`: the pairs of math-verify 0.9.0's own tests, with its verdicts; where ours
differ the line says why. `answer_traps.jsonl`: pairs of public reports, and of our own.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from spmdrl.rewards.functions import BUILT_IN
from spmdrl.rewards.texts import plain_words

HERE = Path(__file__).parent


def rows(name):
    with (HERE / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def misjudged(function, cases):
    return [
        (case["answer"], case["response"])
        for case in cases
        if function("", case["response"], case["answer"], {}) != case.get("here", case["verdict"])
    ]


def test_math_gives_the_verdicts_of_math_verify_s_own_tests():
    cases = rows("math_verify_cases.jsonl")
    assert len(cases) == 275
    assert all("why" in case for case in cases if "here" in case)
    assert sum("here" in case for case in cases) == 7
    assert misjudged(BUILT_IN["math"](), cases) == []


@pytest.mark.parametrize("reward", ["math", "number", "exact"])
def test_traps(reward):
    """Of UKGovernmentBEIS/inspect_ai#3916, #4620, #4636, stanford-crfm/helm#4337, verl#5635."""
    cases = [case for case in rows("answer_traps.jsonl") if case["reward"] == reward]
    counts = Counter(case["verdict"] for case in cases)
    assert min(counts[0], counts[1]) >= 20, counts
    assert misjudged(BUILT_IN[reward](), cases) == []


def test_exact_is_symmetric():
    normal = BUILT_IN["exact"]()
    for case in rows("answer_traps.jsonl"):
        one, other = case["answer"], case["response"]
        assert normal("", one, other, {}) == normal("", other, one, {}), case
        assert normal("", one, one, {}) == 1.0


def test_plain_words_keep_punctuation_where_it_is_asked_for():
    text = plain_words(" The «Cat», (1,000) ", ignore_case=False, ignore_punctuation=False)
    assert text == "The «Cat», (1,000)"
    assert plain_words(text, ignore_case=True, ignore_punctuation=True) == "the cat 1000"


def test_an_answer_without_content_is_told():
    with pytest.raises(ValueError, match="reads nothing in the answer"):
        BUILT_IN["math"]()("", "5", " ", {})
