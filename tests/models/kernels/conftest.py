"""A process for the module's tests in which Triton's kernels are interpreted."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kernel_proofs import interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    pytest.importorskip("triton")
    with interpreter() as run:
        yield run
