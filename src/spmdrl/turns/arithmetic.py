"""Exact arithmetic on what a model writes: numbers, + - * / // % **, brackets, a few functions."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

MAX_LETTERS = 300
MAX_BITS = 4096
"""Most bits of a numerator or denominator: about 1200 digits."""

_DECIMALS = 12
"""Most digits after the point of a result."""

_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }
)
_FUNCTIONS = ("abs", "round", "min", "max")


def evaluate(expression: str) -> str:
    """Compute an arithmetic expression exactly, and write the result as a decimal number.

    `^` is a power; commas between thousands are left out.

    Raises:
        ValueError: it is no arithmetic, divides by zero, or is too long or too large.
    """
    if len(expression) > MAX_LETTERS:
        raise ValueError(f"the expression is longer than {MAX_LETTERS} characters")
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression.translate(_SIGNS).strip())
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    try:
        return written(_value(tree.body, plain))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def written(value: Fraction) -> str:
    """Write a number with at most 12 digits after the point, without zeros at its end."""
    scaled = round(abs(value) * 10**_DECIMALS)
    whole, rest = divmod(scaled, 10**_DECIMALS)
    sign = "-" if value < 0 and scaled else ""
    digits = f"{rest:0{_DECIMALS}d}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def _value(node: ast.expr, text: str) -> Fraction:
    found = _computed(node, text)
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the result is too large")
    return found


def _computed(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=bool() | complex()):
            pass
        case ast.Constant(value=int() | float()):
            # the digits that were written: 0.1 is a tenth
            digits = ast.get_source_segment(text, node) or ""
            exponent = re.search(r"e([+-]?\d+)$", digits, re.IGNORECASE)
            if exponent is not None and abs(int(exponent[1])) > MAX_BITS:
                raise ValueError("the result is too large")
            if not re.match(r"0[xob]", digits, re.IGNORECASE):
                return Fraction(digits.replace("_", ""))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, text)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, text), _value(right, text))
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
            return Fraction(_OPERATORS[type(kind)](_value(left, text), _value(right, text)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _called(name, [_value(argument, text) for argument in args])
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("the exponent of a power must be a whole number")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent.numerator) > 2 * MAX_BITS and base not in (0, 1, -1):
        raise ValueError("the result is too large")
    return base**exponent.numerator


def _called(name: str, arguments: list[Fraction]) -> Fraction:
    match name, arguments:
        case "abs", [number]:
            return abs(number)
        case "round", [number]:
            return Fraction(round(number))
        case "round", [number, digits] if digits.denominator == 1 and abs(digits) <= _DECIMALS:
            return round(number, int(digits))
        case "min", [_, *_]:
            return min(arguments)
        case "max", [_, *_]:
            return max(arguments)
    raise ValueError(f"{name} does not take {len(arguments)} such numbers")
