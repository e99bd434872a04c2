"""Shared fixtures; puts `tests/` on the path so that tests import the harness."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

LONG = ("slurm", "vllm", "megatron", "slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take or wait long come first, so that no worker ends with one alone.

    Slurm's are the very first: they mostly wait, beside what computes.
    """
    rank: dict[Path, int] = {}
    for item in items:
        places = [i for i, mark in enumerate(LONG) if item.get_closest_marker(mark)]
        rank[item.path] = min([*places, rank.get(item.path, len(LONG))])
    items.sort(key=lambda item: rank[item.path])
