"""Commands and code of docs/adapters.md run as they are written, with a toy model in place of the
one that they name.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spmdrl.observe.metrics import read_metrics
from test_docs import ROOT, blocks
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.slow]

PAGE = ROOT / "docs" / "adapters.md"
REWARD = f"rewards=[{{function: '{ROOT / 'tests' / 'toy_rewards.py'}:even_length'}}]"
SMALL = ("data.prompts_per_step=4", "data.group_size=4", "sampling.max_tokens=6", "train.lr=0.01")
HELD = ("evaluation.held_out=4", "evaluation.num_samples=1")
WORDS: dict[str, tuple[str, ...]] = {
    "./scripts/quickstart.sh adapter": ("steps=2", *SMALL, REWARD, "evaluation.held_out=4"),
    "spmdrl launch": ("steps=2", *SMALL, *HELD, REWARD, "--fold"),
    "spmdrl eval": (*HELD, "sampling.max_tokens=6", "run_dir=runs/eval"),
    "spmdrl convert": (),
    "spmdrl check-model": (),
}
"""Beginning of a line -> words that make it small."""

ELSEWHERE = ("MODEL=", "vllm serve")
"""Lines that do not run here: a plan (tests/planning/test_adapters_of_70b.py), and a server."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a checkout, with a toy model and data."""
    root = tmp_path_factory.mktemp("checkout")
    make_tiny_model(root / "models" / "SmolLM2-135M-Instruct", max_position_embeddings=2048)
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(80)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "configs").symlink_to(ROOT / "configs")
    (root / ".venv").symlink_to(sys.prefix)
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", root / "scripts")
    for name in ("setup.sh", "get_model.sh"):  # what they install and download exists already
        (root / "scripts" / name).write_text("#!/bin/sh\n")
        (root / "scripts" / name).chmod(0o755)
    return root


def run(root: Path, script: str) -> str:
    """Run a shell script in the directory; what it prints."""
    command = f'spmdrl() {{ {shlex.quote(sys.executable)} -m spmdrl "$@"; }}\n{script}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


LOGITS = """
import torch
ids = torch.arange(9, 25)[None]
merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
plain = AutoModelForCausalLM.from_pretrained("models/SmolLM2-135M-Instruct")
again = AutoPeftModelForCausalLM.from_pretrained("runs/gsm8k_lora/model")
with torch.no_grad():
    found = [each(ids).logits for each in (model, again, merged, plain)]
size = min(each.shape[-1] for each in found)
expected, *others, before = [each[..., :size] for each in found]
for other in others:
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
assert (expected - before).abs().max() > 1e-3, "the adapter changes nothing"
"""


def test_commands_and_code_run_as_written(checkout: Path) -> None:
    lines = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]
    lines = [line.split(" #")[0].rstrip() for line in lines if not line.startswith(" ")]
    ran = []
    for line in (line for line in lines if not line.startswith(ELSEWHERE)):
        (start,) = [start for start in WORDS if line.startswith(start)]
        # two ranks, on which it is folded
        line = line.replace("--nproc-per-node 8", "--nproc-per-node 2")
        said = run(checkout, f"{line} {shlex.join(WORDS[start])}")
        ran.append(start)
        if start == "spmdrl eval":
            assert "held_out" in said, said
    assert sorted(ran) == sorted(WORDS)
    assert len(lines) == len(ran) + len(ELSEWHERE)
    for directory in (*checkout.glob("runs/quickstart-adapter-*"), checkout / "runs/gsm8k_lora"):
        records = [r for r in read_metrics(directory / "metrics.jsonl") if "loss" in r]
        assert len(records) == 2 and max(r["grad_norm"] for r in records) > 0, directory
        assert (directory / "model" / "adapter_model.safetensors").is_file()
    (code,) = blocks(PAGE, "python")
    (checkout / "load.py").write_text(code + LOGITS)
    run(checkout, f"{shlex.quote(sys.executable)} load.py")
