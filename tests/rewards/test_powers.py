"""Powers of powers are compared as they are written, not computed."""

from __future__ import annotations

import time

import pytest

from spmdrl.rewards.expressions import without_huge
from spmdrl.rewards.functions import BUILT_IN

HUGE = [
    r"10^{10^{10}}",
    "10^10^10",
    "10**10**10",
    "(10^{10})^{10^{10}}",
    r"\left(10^{5}\right)^{10^{9}}",
    "2^{-10^{9}}",
    "10^{1,000,000}",
    r"2^{3^{4^{5}}}",
    "x^{10^{10}}",
    "7^{99999}",
    "10^{" * 200 + "9" + "}" * 200,
]
SMALL = [
    "2^{100}",
    "x^2 + y^{10}",
    "2^{3^{4}}",
    r"90^\circ",
    "2^",
    "a ** 2",
    "10^{)",
    ")^(10)}",
    "5!",
]


@pytest.mark.parametrize("text", HUGE)
def test_huge_powers_are_symbols(text: str) -> None:
    found = without_huge(f"so {text} = 2^{{3}}.")
    assert r"\Xi_{" in found and found.startswith("so ") and found.endswith("= 2^{3}.")
    assert without_huge(text) != without_huge(f"1{text}")


@pytest.mark.parametrize("text", SMALL)
def test_others_stay(text: str) -> None:
    assert without_huge(text) == text


def test_long_texts_of_brackets_are_read_in_a_moment() -> None:
    began = time.monotonic()
    without_huge("(" * 20_000 + "2^3" + ")" * 20_000)
    without_huge("2^" * 20_000)
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{10^{10^{10}}}", "3", False),
        (r"\boxed{10^{10^{10}}}", r"10^{10^{10}}", True),
        (r"\boxed{10^{10^{10}} + 1}", r"1 + 10^{10^{10}}", True),
        (r"\boxed{10^{10^{11}}}", r"10^{10^{10}}", False),
        (r"10^{10^{10}} is large, so \boxed{5}", "5", True),
        ("The answer is 10^10^10", "10", False),
        (r"\boxed{3}", "10**10**10", False),
        (r"\boxed{2^{10}}", "1024", True),
    ],
)
def test_math_compares_them_in_a_moment(response: str, answer: str, right: bool) -> None:
    """A public report of such answers: a tower of powers held a verifier until it was killed."""
    began = time.monotonic()
    assert BUILT_IN["math"]()("", response, answer, {}) == float(right)
    assert time.monotonic() - began < 10.0
