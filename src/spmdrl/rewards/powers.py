"""Symbols for numbers that are too large to be written out, such as powers of powers."""

from __future__ import annotations

import re
from hashlib import blake2b
from math import inf, log2

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
