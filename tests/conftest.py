"""Shared fixtures; puts `tests/` on the path so that tests import the harness."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

LONG = ("slurm", "vllm", "megatron", "slow")

ON_STAND_IN = "FAKE_GPU_BUILD" in os.environ
"""Whether this process runs on the stand-in CUDA (tests/fake_gpu)."""

NO_STAND_IN = os.environ.get("SPMDRL_NO_STAND_IN") or "scripts/test_cuda.sh runs them"
"""Why it does not; scripts/test.sh says so where the environment cannot be made."""


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands that a test runs in its process set up logging to a stream that ends with the test;
    the next tests log as before.
    """
    root, package = logging.getLogger(), logging.getLogger("spmdrl")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    # pytest's own handlers come and go during a test
    for handler in [
        h for h in root.handlers if h not in handlers and "spmdrl" in type(h).__module__
    ]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    package.setLevel(levels[1])


@pytest.fixture(autouse=True)
def no_world_left() -> Iterator[None]:
    """A process group that a test leaves in this process would make a rank of the next tests."""
    yield
    dist = sys.modules.get("torch.distributed")
    assert dist is None or not dist.is_available() or not dist.is_initialized()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the marker `fakegpu` run on the stand-in CUDA only, and those of `gpu` there too.

    Files with tests that take or wait long come first, so that no worker ends with one alone.
    Slurm's are the very first: they mostly wait, beside what computes.
    """
    for item in items:
        if ON_STAND_IN and item.get_closest_marker("gpu"):
            item.add_marker("fakegpu")
        elif not ON_STAND_IN and item.get_closest_marker("fakegpu"):
            item.add_marker(pytest.mark.skip(reason=f"stand-in CUDA: {NO_STAND_IN}"))
    rank: dict[Path, int] = {}
    for item in items:
        places = [i for i, mark in enumerate(LONG) if item.get_closest_marker(mark)]
        rank[item.path] = min([*places, rank.get(item.path, len(LONG))])
    items.sort(key=lambda item: rank[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line on the tests that need the stand-in CUDA, where they were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("fakegpu" in report.keywords for report in skipped)
    if count and not ON_STAND_IN:
        terminalreporter.write_line(f"stand-in CUDA: {count} tests not run: {NO_STAND_IN}")
