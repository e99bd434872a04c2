"""flash-attn-4 compiled for sm_90 and sm_100 by the calls that a trainer makes, without a GPU."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_reference import FLASH_4
from spmdrl.models.attention_flash import COMPILED_WIDTHS

ROOT = Path(__file__).parents[2]
SECONDS = 1500
"""Of one process: 70 to 200 on a machine that does nothing else, more where others compute too."""

pytestmark = [
    pytest.mark.fakegpu,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="compiled with the newest torch alone"),
]


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of scripts/dev/flash_env.sh."""
    made = subprocess.run(
        [ROOT / "scripts" / "dev" / "flash_env.sh"], capture_output=True, text=True, check=False
    )
    if made.returncode == 3:
        pytest.skip(made.stderr.strip().splitlines()[-1])
    assert made.returncode == 0, made.stderr
    return f"{made.stdout.strip()}/bin/python"


def figures(python: str, *words: str) -> list[list[Any]]:
    """Return the lines of flash_figures.py, read from JSON."""
    # not on the stand-in device: the package compiles for a GPU that it does not see
    environment = {n: v for n, v in os.environ.items() if n not in ("LD_PRELOAD", "FAKE_GPU_BUILD")}
    answer = subprocess.run(
        [python, Path(__file__).parent / "flash_figures.py", *words],
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    return [json.loads(line) for line in answer.stdout.splitlines()]


HEADS = ["a kv head each", "four heads to one"]
FEW = ["plain", "deterministic", *HEADS, "float16", "short", "many"]
ALL = ["plain", "deterministic", "window", "sinks", "soft cap", "all", *FEW[2:]]
SHARED = ["shared prompt", *(f"shared prompt, {name}" for name in ("all", *HEADS))]
BARE = ("sm_100", 256)
"""The kernels whose backward has no options."""


@pytest.mark.parametrize(
    ("architecture", "width"),
    [
        (f"sm_{major}{minor}", width)
        for (major, minor), widths in COMPILED_WIDTHS.items()
        for width in widths
    ],
)
def test_every_case_that_auto_takes_is_compiled(python: str, architecture: str, width: int) -> None:
    found = figures(python, architecture, str(width))
    print(found)
    assert {name: why for name, why, _ in found if why} == {}
    cases = FEW if (architecture, width) == BARE else ALL
    assert [name for name, *_ in found] == [*cases, *(SHARED if width <= 128 else [])]


def test_the_references_have_the_packages_signatures(python: str) -> None:
    """Values are compared through them (tests/models/test_attention_packages.py)."""
    names: dict[str, Any] = {}
    exec(FLASH_4, names)
    expected = [
        [name, each.name, repr(each.default)]
        for name in ("flash_attn_varlen_func", "flash_attn_func")
        for each in inspect.signature(names[name]).parameters.values()
    ]
    assert figures(python, "sm_90", "signature") == expected
