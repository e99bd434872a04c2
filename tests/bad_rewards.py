"""Reward functions that go wrong."""

import time


def raises(prompt, response, answer, entry):
    raise RuntimeError("no such luck")


def hangs_sometimes(prompt, response, answer, entry):
    if len(response) % 3 == 0:
        time.sleep(60)
    return 1.0


def sometimes_nan(prompt, response, answer, entry):
    return float("nan") if len(response) % 2 else 1.0
