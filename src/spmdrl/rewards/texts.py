"""Texts for the reward functions `exact` and `number`: decoration is removed, meaning is kept.

Punctuation within a word or before digits has a meaning (a sign, a point, a fraction, `C++`). Marks
that end a sentence, enclose a word or a text, or show emphasis may be removed.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_PAIRS = (
    *(('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("「", "」"), ("『", "』")),
    *(("《", "》"), ("*", "*"), ("`", "`")),
)
_INNER = r"(?=\S)([^\n]{1,300}?)(?<=\S)"
_ENCLOSED = re.compile(
    rf"(?<![\w*])\*\*{_INNER}\*\*(?![\w*])|"
    + "|".join(rf"(?<!\w){re.escape(a)}{_INNER}{re.escape(b)}(?!\w)" for a, b in _PAIRS)
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_CJK = re.compile(r"(?<!\d)[。，、；：！？]|[。，、；：！？](?!\d)")
_ACRONYM = re.compile(r"(?<![\w.])(?:[^\W\d_]\.){2,}")


def plain_words(text: str, *, ignore_case: bool, ignore_punctuation: bool) -> str:
    """Normalise white space, and remove case and decoration if they are to be ignored.

    A text of only punctuation keeps it.
    """
    text = unicodedata.normalize("NFC", text)
    text = text.casefold() if ignore_case else text
    if ignore_punctuation:
        text = _ACRONYM.sub(lambda match: match.group().replace(".", ""), text)
        text = _without_pairs(_CJK.sub(" ", text))
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
        words = [_bare(word) for word in text.split()]
        text = " ".join(words) if any(words) else text
    return " ".join(text.split())


def _without_pairs(text: str) -> str:
    """Remove quotes and emphasis around words, pair by pair, nested ones too."""
    while (bare := _ENCLOSED.sub(lambda match: next(g for g in match.groups() if g), text)) != text:
        text = bare
    return text


def _bare(word: str) -> str:
    """Remove the marks that end or enclose a word; empty if it consists only of them."""
    word = word.lstrip("¿¡").replace("…", "")
    while word and word[-1] in ".,;:?!":
        # 5! is a factorial
        if word[-1] == "!" and not re.search(r"[^\W\d_]{2}!+$", word):
            break
        word = word[:-1]
    if match := re.fullmatch(r"\(([\w'’.,%$-]+)\)|(\w+)\)|[\[<{]([^\W\d_]{2,})[\]>}]", word):
        word = next(group for group in match.groups() if group)
    return "" if word in ("—", "–") else word


_NUMERAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\w)\.\d+)"
_NUMBER = re.compile(
    # an exponent or an index is not a number by itself
    r"(?P<power>(?<=[^\W_]|[)}\]|])[\^_]\s*\{?\s*[+-]?\d+(?:\.\d+)?)"
    # a sign does not count if it is a subtraction ("10-4" ends in 4)
    rf"|(?P<sign>(?<![\d.)])-)?(?P<number>{_NUMERAL})"
    r"(?P<exponent>[eE][+-]?\d{1,4})?"
    # two numbers that make one: a fraction, a time or ratio, a power
    rf"(?P<rest>(?:/{_NUMERAL})++|(?::\d+)+|(?:\*\*|\^)\{{?[+-]?\d+\}}?)?"
)
_DASH = re.compile(r"(?:(?<=^)|(?<=[\s=(\[{:,$]))[\u2012\u2013\uff0d\ufe63](?=[\d.])")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")

Value = Fraction | str
"""A number, or the text of a time, ratio or power ("10:30", "2^10")."""


def last_value(text: str) -> Value | None:
    """The last number in a text; None if there is none.

    Commas between thousands are allowed; `1/2` is a fraction; exponents and indices are not numbers
    by themselves; a time, a ratio or a power is compared as a whole.
    """
    numeral = last_numeral(text)
    if not re.search(r"\d", numeral):
        return None
    try:
        return Fraction(*map(_fraction, numeral.split("/")))
    except (InvalidOperation, TypeError, ZeroDivisionError):  # more than a number or a fraction
        return numeral


def last_numeral(text: str) -> str:
    """The last number in a text as it is written, without commas; empty if there is none."""
    text = _DASH.sub("-", text.replace("\u2212", "-"))
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",", text)
    text = _FRACTION.sub(r"\1/\2", text)
    found = [match for match in _NUMBER.finditer(text) if match["power"] is None]
    if not found:
        return ""
    # "Q1:72" is not a ratio
    whole, before = found[-1].group(), text[: found[-1].start()][-1:]
    whole = whole.rsplit(":", 1)[-1] if before.isalpha() else whole
    return whole.replace(",", "").replace("**", "^").replace("{", "").replace("}", "")


def _fraction(numeral: str) -> Fraction:
    return Fraction(Decimal(numeral))
