"""Comparison of the reward `math`: math-verify's, with words and units read as such.

math-verify reads an answer as LaTeX, in which a bare word is a product of its letters: `72 clips`
is not 72, and `listen` equals `silent`. Here words are compared as words, and a word after a number
is its unit, which one side may omit.

Symbols for numbers that are too large to be written out, such as powers of powers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import inf, log2
from typing import Any

MAX_BITS = 14_000
"""Most bits of a number that is computed: Python writes no more than 4300 digits."""

MAX_DEPTH = 60
"""Deepest nesting of brackets; a deeper number counts as too large."""

_TOKEN = re.compile(
    r"(?P<number>\d+(?:(?:,|\{,\}|\\[,!])\d{3})*(?:\.\d+)?)|(?P<power>\*\*|\^)|"
    r"(?P<skipped>\\[,;:! {}])|(?P<opened>(?:\\left\s*)?[{(\[])|"
    r"(?P<closed>(?:\\right\s*)?[})\]])|(?P<symbol>\\[A-Za-z]+|[^\W\d_])"
)


def without_huge(text: str) -> str:
    """Replace every power of more than `MAX_BITS` bits by a symbol, equal powers by the same one.

    Sizes are upper bounds: a sum, a difference or a fraction counts as the product of its numbers.
    """
    if "^" not in text and "**" not in text:
        return text
    scan = _Scan(text)
    while scan.at < len(scan.tokens):
        scan.group(0)
        scan.at += 1  # a bracket that nothing opened
    parts, end = [], 0
    for first, last in sorted(scan.spans, key=lambda span: (span[0], -span[1])):
        if first >= end:
            parts += [text[end:first], _symbol(text[first:last])]
            end = last
    return "".join([*parts, text[end:]])


def _symbol(text: str) -> str:
    bare = re.sub(r"[\s{}()\[\]]|\\left|\\right", "", text.replace("**", "^"))
    return f"\\Xi_{{{int(blake2b(bare.encode(), digest_size=4).hexdigest(), 16)}}}"


class _Scan:
    """Reader of a text's numbers and powers; `spans` are those that are too large."""

    def __init__(self, text: str) -> None:
        found = _TOKEN.finditer(text)
        self.tokens = [match for match in found if match.lastgroup != "skipped"]
        self.at = 0
        self.spans: list[tuple[int, int]] = []

    def group(self, depth: int) -> float:
        """Bits of all factors up to a closing bracket, which is not consumed."""
        bits = 0.0
        while self.at < len(self.tokens) and self.tokens[self.at].lastgroup != "closed":
            bits += self.factor(depth)
        return bits

    def factor(self, depth: int) -> float:
        """Bits of a number, a bracket or a symbol with its powers, read from the right."""
        start = self.tokens[self.at].start()
        bits = self.atom(depth)
        while self.at < len(self.tokens) and self.tokens[self.at].lastgroup == "power":
            self.at += 1
            bits = max(bits, 1.0) * 2.0 ** min(self.exponent(depth), 64.0)
            if bits > MAX_BITS:
                self.spans.append((start, self.tokens[self.at - 1].end()))
        return bits

    def exponent(self, depth: int) -> float:
        is_there = self.at < len(self.tokens) and self.tokens[self.at].lastgroup != "closed"
        if not is_there:
            return 0.0
        return inf if depth >= MAX_DEPTH else self.factor(depth + 1)

    def atom(self, depth: int) -> float:
        token = self.tokens[self.at]
        self.at += 1
        if token.lastgroup == "number":
            digits = re.sub(r"\D", "", token.group().partition(".")[0]).lstrip("0")
            return log2(int(digits)) if 0 < len(digits) < 300 else log2(10) * len(digits)
        if token.lastgroup != "opened":
            return 0.0
        if depth >= MAX_DEPTH:
            return inf
        bits = self.group(depth + 1)
        self.at += 1  # its end, if there is one
        return bits


Compare = Callable[[str, str], bool]
"""(answer, response) -> whether the response's final expression is equal to the answer."""

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|operatorname|mbox|hbox|emph)\*?"
    r"\s*\{([^{}]*)\}"
)
_SPACE = re.compile(
    r"\\(?:begin|end)\s*\{\w+\*?\}(?:\{[clr|]+\})?|\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\s+"
)
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]+(?:['’-][^\W\d_]+)*|(?<=\d)[^\W\d_]+")
_LABEL = re.compile(
    r"(?:(?:the )?(?:final |correct |right )?answer(?: is)?\s*[:=]?\s*|"
    r"(?:about|approximately|approx\.?|roughly|around|exactly)\s+)+(?=\S)",
    re.IGNORECASE,
)
_MIXED = re.compile(r"(?<![\d./])(\d+) +(\d+)/(\d+)(?![\d/])")
_UNIT = re.compile(
    r"(?P<head>.*?[\d})%!])[\s-]*"
    r"(?P<unit>[^\W\d_]+\.?(?:(?:\s*[/·*]\s*|\s+|-)[^\W\d_]+\.?|\s*\^\s*\{?-?\d\}?|[²³])*)"
)

_NAMES = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt cbrt abs
sgn min max sup inf lim gcd lcm mod det dim ker rank deg re im floor ceil sum prod int pi phi
psi chi tau eta rho mu nu xi theta alpha beta gamma delta epsilon zeta kappa lambda sigma omega
iota infinity infty oo and or pm mp cdot times div frac dfrac tfrac percent percentage pct choose
cis arg li erf"""
_MATHS = frozenset(_NAMES.split())
"""Words that LaTeX readers know, or that join expressions."""

_SCALES = {
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "dozen": "12",
}

_MEASURES = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|
km kilometer kilometre|in inch|ft foot feet|yd yard|mi mile|mg milligram|g gram gramme|
kg kilogram kilo|lb pound|oz ounce|t ton tonne|ms millisecond|s sec second|min minute|
h hr hour|day|week|month|yr year|ml milliliter millilitre|l liter litre|gal gallon|cup|
dollar usd|cent|euro eur|yen|degree deg|rad radian|w watt|kw kilowatt|j joule|kj kilojoule|
n newton|v volt|hz hertz|khz kilohertz|mph|kmh kph"""
_UNITS = {name: names.split()[0] for names in _MEASURES.split("|") for name in names.split()}
"""Name of a unit -> its canonical name; units with different ones cannot replace each other."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Interpretation of a short text.

    Args:
        text: the text without markup.
        words, bare: it has words of a language, anywhere or outside of `\\text{...}`.
        head, unit: a number and its unit; None: the text is not such a pair.
    """

    text: str
    words: bool
    bare: bool
    head: str | None = None
    unit: str | None = None


def make_comparison() -> Compare:
    """Make a comparison by math-verify that also reads words and units.

    The comparison raises ValueError if nothing can be read in the answer.
    """
    from math_verify import parse, verify

    # the pool's own limit ends a call that hangs, so math-verify's alarms are off
    def parsed(text: str) -> list[Any]:
        return list(parse(without_huge(text), parsing_timeout=None))

    def as_latex(text: str) -> list[Any]:
        return parsed(f"${text}$") or parsed(text)

    def same(wanted: list[Any], found: list[Any]) -> bool:
        return bool(verify(wanted, found, timeout_seconds=None))

    def compare(answer: str, response: str) -> bool:
        found = parsed(response)
        claim = _claim(response, found)
        if "\\boxed" not in answer:
            answer = _LABEL.sub("", answer.strip(), count=1)
        wanted = read("" if "\\boxed" in answer else answer)
        if not answer.strip():
            raise ValueError(f"math-verify reads nothing in the answer {answer!r}")
        if wanted.unit is not None and claim.unit is not None and _differ(wanted.unit, claim.unit):
            return False
        heads = [] if claim.head is None else [as_latex(claim.head)]
        if _MIXED.search(claim.text):
            found = as_latex(_mixed(claim.text))
        if wanted.head is not None:
            return any(same(as_latex(wanted.head), other) for other in (found, *heads))
        if wanted.words:
            if _folded(wanted.text) == _folded(claim.text):
                return True
            if wanted.bare and claim.bare:
                return False
        value = parsed(answer) if "\\boxed" in answer else as_latex(_mixed(answer))
        if not value and not wanted.words:
            raise ValueError(f"math-verify reads nothing in the answer {answer!r}")
        values = [value]
        if re.fullmatch(r"-?\d+,\d+", answer.strip()):
            values.append(parsed(answer))  # a list as LaTeX, a decimal comma as plain text
        return any(same(value, other) for value in values for other in (found, *heads))

    return compare


def read(text: str) -> Reading:
    """Read a short text, LaTeX or plain: an expression, a number with a unit, or words."""
    inner = _stripped(text)
    plain = " ".join(_SPACE.sub(" ", _TEXT.sub(r" \1 ", inner)).split()).rstrip(".")
    plain = plain.replace("\\$", "$").replace("\\%", "%").strip()
    words = has_words(plain)
    if "$" in plain.strip("$"):
        return Reading(text=plain, words=False, bare=False)
    outside = _SPACE.sub(" ", _TEXT.sub(" ", inner))
    reading = Reading(text=plain, words=words, bare="\\" not in outside and has_words(outside))
    match = _UNIT.fullmatch(plain)
    if match is None or has_words(match["head"]) or not re.search(r"\d", match["head"]):
        return reading
    head, unit = match["head"].strip(), match["unit"]
    names = _WORD.findall(unit)
    # a letter after a number is a factor, except for the metre's
    known = [name for name in names if (len(name) > 1 or unit == "m") and _unit_name(name)]
    if not known and not has_words(unit):
        return reading
    if any(name.casefold() in _MATHS for name in names):
        return reading
    scale = _SCALES.get(names[0].casefold().rstrip("s")) if names else None
    head = f"{head.lstrip('$')}*{scale}" if scale else head
    unit = re.sub(r"^[^\W\d_]+\s*", "", unit) if scale else unit
    return Reading(text=plain, words=words, bare=reading.bare, head=_mixed(head), unit=unit)


def has_words(text: str) -> bool:
    """Whether a text holds words that are neither mathematics nor a product of letters."""
    return any(is_word(word) for word in _WORD.findall(text))


def is_word(word: str) -> bool:
    """Whether letters are a word: neither the name of a function nor a product.

    `xy`, `abc`, `mgh` and `ABD` may be products, or sets of choices: short, and without vowels or
    in alphabetical order. In doubt it is a product: equal words are equal either way.
    """
    lower = word.casefold()
    if len(word) < 2 or lower in _MATHS:
        return False
    if len(word) > 3:
        steps = [ord(b) - ord(a) for a, b in pairwise(lower)]
        chosen = word.isupper() and set(lower) <= set("abcdefgh") and min(steps) > 0
        return not (chosen or set(steps) == {1})
    if set(lower) & set("eiol"):
        return not (word.isupper() and set(lower) <= set("abcdefgh") and lower[0] < lower[-1])
    if len(word) == 2 or not set(lower) & set("aeiou"):
        return False
    return not (list(lower) == sorted(lower) and set(lower) <= set("abcdkmnpqxyz"))


def _claim(response: str, found: list[Any]) -> Reading:
    """The response's final expression: its last box, or else math-verify's last find."""
    boxed = last_boxed(response)
    if boxed is not None:
        return read(boxed)
    last = found[-1] if found else ""
    return read(last if isinstance(last, str) else "")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` of a text; None if none is closed."""
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # where the content of a box begins; None for other braces
    for match in re.finditer(r"\\f?boxed\s*\{|[{}]", text):
        if match.group() != "}":
            opened.append(match.end() if match.group() != "{" else None)
        elif opened and (start := opened.pop()) is not None and (last is None or start > last[0]):
            last = (start, match.start())
    return None if last is None else text[slice(*last)]


def _stripped(text: str) -> str:
    """Remove the dollars or the box around a whole text."""
    text = text.strip()
    boxed = last_boxed(text)
    if boxed is not None and re.sub(r"[\s$.]", "", text) == re.sub(
        r"[\s$.]", "", f"\\boxed{{{boxed}}}"
    ):
        return _stripped(boxed)
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start + end):
            return text[len(start) : -len(end)].strip()
    return text


def _mixed(text: str) -> str:
    r"""Write mixed numbers as LaTeX: `3 1/2` becomes `3\frac{1}{2}`."""
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text)


def _folded(text: str) -> str:
    return " ".join(re.sub(r"[“”\"`*]", " ", text).casefold().split()).strip(" .,;:!?'")


def _unit_name(word: str) -> str | None:
    lower = word.casefold().rstrip(".")
    forms = (lower, lower.removesuffix("s"), lower.removesuffix("es"))
    return next((_UNITS[form] for form in forms if form in _UNITS), None)


def _differ(unit: str, other: str) -> bool:
    """Whether both are known units, and different ones."""
    names = [_unit_name(text) for text in (unit, other)]
    return None not in names and names[0] != names[1]
