"""`scripts/gpu_check.sh`: stages, budgets, missing wheels, failures, and predictions' ground."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from first_minutes.attention import exact, make_pages  # noqa: E402
from first_minutes.cards import Card, Ceilings, card_of, total  # noqa: E402
from first_minutes.cases import Case, Outcome  # noqa: E402
from first_minutes.driver import Check, main, run_stages  # noqa: E402
from first_minutes.measure import line_of, run_cases  # noqa: E402
from first_minutes.operations import (  # noqa: E402
    Operation,
    device_s,
    moved_bytes,
    slower_s,
    written_by,
)
from first_minutes.shapes import (  # noqa: E402
    cache_per_token,
    model_of,
    parameters,
    read_per_step,
)
from first_minutes.stages import (  # noqa: E402
    STAGES,
    Stage,
    install_command,
    missing_modules,
    select,
    within,
)
from first_minutes.training import Shape  # noqa: E402

NAMES = [stage.name for stage in STAGES]


def test_stages_are_in_order_of_worth() -> None:
    order = "ceilings exactness attention decode training moves sampling tests flow"
    assert order.split() == NAMES
    assert [stage.name for stage in select("flow,decode")] == ["decode", "flow"]
    with pytest.raises(ValueError, match="--stages: 'decoder' is unknown; stages are ceilings,"):
        select("decoder")


@pytest.mark.parametrize(
    ("budget", "count"), [(None, len(STAGES)), (10_000, len(STAGES)), (24, 0), (25, 1), (80, 3)]
)
def test_a_budget_drops_the_last_stages(budget: float | None, count: int) -> None:
    assert within(budget, STAGES) == STAGES[:count]


def test_a_budget_never_skips_a_stage_to_keep_a_later_one() -> None:
    stages = [Stage(name=str(n), module="", seconds=n) for n in (10, 50, 5)]
    assert [stage.name for stage in within(20, stages)] == ["10"]


def run(check: Check, stages: Sequence[Stage]) -> tuple[int, list[dict[str, Any]]]:
    """Run stages; returns the exit status and the lines."""
    out = io.StringIO()
    check.files = (out,)
    status = run_stages(check, stages)
    return status, [json.loads(line) for line in out.getvalue().splitlines()]


def stage(name: str, tmp_path: Path, program: str) -> Stage:
    """Write a stage whose process is a program of this text."""
    (tmp_path / f"{name}_program.py").write_text(program)
    return Stage(name=name, module="none", seconds=1, needs=(), program=f"{name}_program")


def test_dropped_stages_are_named_and_are_no_failure() -> None:
    status, lines = run(Check(small=True, budget=5, files=()), STAGES)
    assert status == 0 and lines[0]["dropped"] == NAMES
    assert lines[1:] == [{"stage": "end", "at_s": lines[1]["at_s"], "failed": []}]


def test_missing_wheels_are_named_with_the_command_that_brings_them() -> None:
    absent = Stage(name="decode", module="", seconds=1, needs=("torch", "no_such_wheel"))
    assert missing_modules(absent) == ("no_such_wheel",)
    status, lines = run(Check(small=True, budget=None, files=()), [absent])
    assert status == 1 and lines[-1]["failed"] == ["decode"]
    assert lines[1]["error"] == "not installed: no_such_wheel"
    assert lines[1]["install"] == f"{sys.executable} -m pip install no_such_wheel"


def test_the_command_has_the_versions_of_the_requirements(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("pydantic==2.14.3\nPyYAML==6.0.3\n")
    (tmp_path / "b.txt").write_text("-r a.txt\npytest==9.2.0\n# a word\n")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    command = install_command("python3", ["pydantic", "yaml", "pytest", "torch"], files)
    assert command == "python3 -m pip install pydantic==2.14.3 PyYAML==6.0.3 pytest==9.2.0 torch"


def test_a_stage_that_fails_does_not_end_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    says = "import json; print(json.dumps({'stage': '%s', 'measured': {'x': 1.0}%s}), flush=True)\n"
    stages = [
        stage("dies", tmp_path, says % ("dies", "") + "import os; os._exit(3)"),
        stage("errs", tmp_path, says % ("errs", ", 'error': 'bad'") + "raise SystemExit(1)"),
        stage("ceilings", tmp_path, says % ("ceilings", "")),
        stage("last", tmp_path, "import sys; assert '--ceilings' in sys.argv, sys.argv"),
    ]
    check = Check(small=True, budget=None, files=())
    status, lines = run(check, stages)
    assert status == 1 and check.ceilings == {"x": 1.0}
    assert [line["stage"] for line in lines] == ["plan", "dies", "dies", "errs", "ceilings", "end"]
    assert lines[2]["error"] == "its process ended with code 3" and lines[3]["error"] == "bad"
    assert lines[-1]["failed"] == ["dies", "errs"]


def test_a_stage_that_hangs_is_ended_and_the_rest_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hangs = stage("hangs", tmp_path, "import time; time.sleep(60)")
    status, lines = run(Check(small=True, budget=2.0, files=()), [hangs, replace(hangs, name="b")])
    assert status == 1 and lines[1]["error"].startswith("ended after")
    assert lines[2]["dropped"] == ["b"] and lines[-1]["failed"] == ["hangs"]


def test_an_unknown_stage_is_an_error_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--stages", "all"])
    assert "--stages: 'all' is unknown" in capsys.readouterr().err


def test_a_case_that_fails_does_not_end_the_next() -> None:
    def bad() -> Outcome:
        raise RuntimeError("out of something")

    good = Outcome(measured={"ms": 3.00001}, predicted={"ms": 2.0, "gb": None})
    out = io.StringIO()
    assert run_cases("moves", [Case(name="a", run=bad), Case(name="b", run=lambda: good)], out) == 1
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert first["error"] == "RuntimeError: out of something" and first["case"] == "a"
    assert second == {
        "stage": "moves",
        "case": "b",
        "predicted": {"ms": 2.0},
        "measured": {"ms": 3.0},
        "measured_to_predicted": {"ms": 1.5},
    }
    assert line_of("moves", "c", Outcome(skipped="no pages"))["skipped"] == "no pages"


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA H200", 4.8),
        ("NVIDIA A100-SXM4-80GB", 2.039),
        ("NVIDIA A100-SXM4-40GB", 1.555),
        ("Tesla T4", None),
    ],
)
def test_published_figures_by_the_name_of_the_device(name: str, terabytes: float | None) -> None:
    card = card_of(name)
    assert (card and card.memory_tb_s) == terabytes
    assert card is None or card.source.startswith("https://www.nvidia.com/")


def test_measured_ceilings_replace_published_ones() -> None:
    card = card_of("NVIDIA H100 80GB HBM3")
    assert isinstance(card, Card)
    found = Ceilings.of({"copy_tb_s": 3.0, "node_us": 1.5}, card)
    assert found.read_s(3e12) == 1.0 and found.node_us == 1.5
    assert found.product_s(989e12) == pytest.approx(1.0) and found.launch_us is None
    nothing = Ceilings.of({}, None)
    assert nothing.read_s(1) is None and total(1.0, nothing.read_s(1)) is None


def test_an_operation_takes_its_slowest_part() -> None:
    ceilings = Ceilings(copy_tb_s=2.0, bf16_tflops=500, fp32_tflops=50, node_us=2, launch_us=10)
    reads = Operation(name="add", num_bytes=8_000_000, flops=0, wide=False)
    product = Operation(name="mm", num_bytes=0, flops=5 * 10**9, wide=False)
    wide = replace(product, wide=True)
    empty = Operation(name="fill_", num_bytes=4, flops=0, wide=False)
    seconds = [device_s([o], ceilings) for o in (reads, product, wide, empty)]
    assert seconds == pytest.approx([4e-6, 1e-5, 1e-4, 2e-6])
    # the host launches two in 20 us, in which the device does the first and waits
    assert slower_s([reads, empty], ceilings) == pytest.approx(2e-5)
    assert slower_s([wide, empty], ceilings) == pytest.approx(1.02e-4)


def test_rows_of_a_large_tensor_count_as_rows() -> None:
    table, rows = torch.zeros(1000, 8, dtype=torch.bfloat16), torch.zeros(3, 8).bfloat16()
    assert moved_bytes("embedding", [table], [rows]) == 2 * 3 * 8 * 2
    assert moved_bytes("index_copy_", [table, rows], [table]) == 2 * 3 * 8 * 2


def test_an_operation_without_results_writes_its_arguments() -> None:
    schema = torch.ops.aten._foreach_add_.List._schema
    targets, values = [torch.zeros(2)], [torch.ones(2)]
    assert written_by(schema, (targets, values), {}) == [targets]
    assert written_by(torch.ops.aten.add.Tensor._schema, (targets[0], values[0]), {}) == []


def test_bytes_of_the_shapes_that_are_measured() -> None:
    small, large = model_of("1.5B", small=False), model_of("8B", small=False)
    assert read_per_step(small) == pytest.approx(3.09e9, rel=2e-3)
    assert read_per_step(large) == pytest.approx(15.0e9, rel=2e-3)
    assert (cache_per_token(small), cache_per_token(large)) == (28_672, 131_072)
    assert sum(parameters(large).values()) == pytest.approx(8.03e9, rel=1e-3)


def test_a_microbatch_has_a_shared_prompt_once() -> None:
    shape = Shape(rows=8, prompt=512, response=896)
    assert shape.tokens == 7680 and len(shape.sequences()) == 9
    assert shape.sequences()[-1] == (896, 1408)


def test_the_reference_of_the_paged_kernel_is_attention() -> None:
    pages = make_pages(torch.device("cpu"), 4, 2, 2, 300)
    used = int(pages.used[1])
    keys, values = (
        x[pages.table[1].long()].flatten(0, 1)[:used].float() for x in (pages.keys, pages.values)
    )
    query = pages.query[1].float().view(2, 2, 1, -1)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys.transpose(0, 1)[:, None], values.transpose(0, 1)[:, None]
    )
    assert torch.allclose(exact(pages)[1], wanted.reshape(4, -1), atol=1e-5)


@pytest.mark.fakegpu
def test_the_whole_check_is_rehearsed_on_the_stand_in_device(tmp_path: Path) -> None:
    words = ["scripts/gpu_check.sh", "--small", "--out", str(tmp_path / "lines.jsonl")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if "error" in line] == [], done.stderr[-3000:]
    assert done.returncode == 0 and lines[-1] == {**lines[-1], "stage": "end", "failed": []}
    assert list(dict.fromkeys(line["stage"] for line in lines[1:-1])) == NAMES
    measured = [line for line in lines[1:-1] if line.get("measured")]
    assert {line["stage"] for line in measured} == set(NAMES)
    for line in measured:
        assert set(line["measured_to_predicted"]) <= set(line["predicted"]), line
    fits = {line["case"]: line["measured"].get("fits") for line in measured}
    assert fits["expandable segments off"] == 0 and fits["expandable segments on"] == 1
    saved = (tmp_path / "lines.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in saved] == lines
