"""Products of float32 matrices in bfloat16, where the processor has instructions for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.models import cpu_products
from spmdrl.models.cpu_products import check_cpu_products, set_cpu_products
from spmdrl.models.linear import linear
from spmdrl.world import World
from tiny_model import make_tiny_model


def refused(world: World, path: str) -> str:
    # one node of several has an older processor
    cpu_products._has_bfloat16 = lambda: world.rank == 0  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model\.cpu_products=bfloat16: this processor") as error:
        run_configs(world, [(path, ["model.cpu_products=bfloat16"])], "")
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    return str(error.value)


def test_a_processor_without_them_is_named(tmp_path: Path) -> None:
    """On every rank, also those whose own processor has them."""
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    for error in run_ranks(refused, 2, str(path)):
        assert "leave the key out" in error


def trained(world: World, path: str) -> str:
    cpu_products._has_bfloat16 = lambda: True  # type: ignore[assignment]
    (records,) = run_configs(world, [(path, ["model.cpu_products=bfloat16", "steps=1"])], "")
    assert len(records) == 1
    return str(torch.backends.mkldnn.matmul.fp32_precision)


def test_a_run_sets_what_it_is_asked(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    assert run_ranks(trained, 1, str(path)) == ["bf16"]


def test_products_are_those_of_rounded_factors_or_exact() -> None:
    """Without the instructions oneDNN multiplies in float32 whatever it is told."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 96, generator=generator) for n in (40, 64))
    exact = x @ weight.T
    set_cpu_products("bfloat16")
    try:
        found = linear(x, weight)
    finally:
        set_cpu_products("float32")
    try:
        check_cpu_products("bfloat16")
    except ValueError:
        wanted = exact
    else:
        wanted = x.bfloat16().float() @ weight.bfloat16().float().T
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear(x, weight), exact, rtol=1e-5, atol=1e-4)
