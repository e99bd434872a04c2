"""Rewards that show what their pool is told: workers, time, environment, and options."""

from __future__ import annotations

import itertools
import os
import time

TOKEN = "SPMDRL_TEST_JUDGE"

_calls = itertools.count(1)


def calls(prompt, response, answer, entry):
    """How many calls this worker has had; each lasts long enough for another worker's."""
    time.sleep(0.05)
    return float(next(_calls))


def sees(prompt, response, answer, entry):
    return float(TOKEN in os.environ) + float(len(response) % 2)


def scaled(prompt, response, answer, entry, scale=1.0):
    return scale * float(len(response) % 2)


def slow(prompt, response, answer, entry):
    time.sleep(0.1)
    return float(len(response) % 2)


def half_right(prompt, response, answer, entry):
    return float("nan") if len(response) % 2 else 1.0


def hungry(prompt, response, answer, entry):
    size = 300 << 20 if len(response) % 2 else 1
    return float(len(bytearray(size)) > 0)
