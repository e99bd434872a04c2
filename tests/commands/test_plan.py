"""`spmdrl plan --gpu`: its figures, what does not fit, its forms, and its former name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from flow_cases import write_config
from spmdrl.commands.cli import main
from spmdrl.planning.margins import CONTEXT_BYTES
from tiny_model import make_tiny_model

ON_ONE = ["--gpu", "rtx4090", "--nodes", "1", "--gpus-per-node", "1"]
SMALL = ["gsm8k", "--model", "smollm2-135m"]
LARGE = ["gsm8k", "--model", "qwen2.5-1.5b", "memory_gb=16", "rollout.max_running=32"]


def run(words: list[str]) -> int:
    """Exit status of a command."""
    try:
        return main(words)
    except SystemExit as end:
        return int(str(end.code))


def planned(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, dict[str, Any]]:
    code = run(["plan", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def test_figures_of_what_fits_agree(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(capsys, [*SMALL, *ON_ONE, "--price-per-gpu-hour", "3.6"])
    assert code == 0 and found["fits"] and "changes" not in found
    phases = found["phases"]
    assert list(phases) == ["sync", "rollout", "logprobs", "update"]
    assert found["seconds_per_step"] == pytest.approx(sum(p["seconds"] for p in phases.values()))
    rate = found["tokens_per_step"] / found["seconds_per_step"]
    assert found["tokens_per_second_per_gpu"] == pytest.approx(rate)
    assert found["cost_per_step"] == pytest.approx(found["seconds_per_step"] / 1000)
    assert 0 < found["mfu"] < 1 and found["idle_share"] == pytest.approx(0, abs=1e-6)
    assert found["joules_per_step"] == pytest.approx(600 * found["seconds_per_step"], rel=1e-3)
    [memory] = found["memory"]
    assert memory["ranks"] == [0]
    assert found["peak_gb"] == max(call["peak_gb"] for call in memory["calls"].values())
    assert memory["calls"]["rollout.generate"]["working_gb"] > 0
    taken = found["taken_gb"]
    assert taken["context"] == CONTEXT_BYTES / 1e9 and taken["nccl"] == 0
    assert found["capacity_gb"] == pytest.approx(25.76 - sum(taken.values()))
    for phase in phases.values():
        for call in phase["calls"]:
            assert call["bound_seconds"][call["bound"]] == max(call["bound_seconds"].values())


def test_shorter_responses_and_more_devices_take_less(capsys: pytest.CaptureFixture[str]) -> None:
    _, full = planned(capsys, [*SMALL, *ON_ONE])
    _, short = planned(capsys, [*SMALL, *ON_ONE, "--response-tokens", "100"])
    assert short["seconds_per_step"] < full["seconds_per_step"]
    assert short["tokens_per_step"] < full["tokens_per_step"]
    assert short["peak_gb"] == full["peak_gb"]
    _, two = planned(capsys, [*SMALL, "--gpu", "rtx4090", "--gpus-per-node", "2"])
    assert two["seconds_per_step"] < full["seconds_per_step"] and two["taken_gb"]["nccl"] > 0


def test_what_does_not_fit_has_changes_that_make_it_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # an optimizer that has to be on the device: otherwise it would step in windows
    given = [*LARGE, *ON_ONE, "roles.policy.residency.optimizer=keep"]
    code, found = planned(capsys, given)
    assert code == 2 and not found["fits"] and found["seconds_per_step"] is None
    assert found["peak_gb"] > found["capacity_gb"] and found["memory"][0]["calls"]
    assert 1 <= len(found["changes"]) <= 3
    change = shlex.split(found["changes"][0])
    assert planned(capsys, [*given, *change])[0] == 0, change
    assert run(["plan", *given]) == 2
    text = capsys.readouterr().out
    table = text.split("# memory of a rank by call\n")[1].split("\n\n")[0]
    assert "policy.update" in table and " !" in table
    assert found["changes"][0] in text.split("# does not fit\n")[1]


def test_markdown_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, *ON_ONE, "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "## seconds of a usual step\n\n| phase | call | ranks |" in text
    assert "\n| update | policy.update | 1 |" in text
    assert text.count("```") % 2 == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json"], "--json is of no use without --gpu"),
        (["--gpu", "h1000"], "--gpu h1000: did you mean h100?"),
        (["--gpu", "h100", "--nodes", "0"], "--nodes 0: give at least 1"),
        (["--gpu", "h100", "--ranks", "12", "--gpus-per-node", "8"], "--ranks 12 with 8 GPUs"),
        (["--gpu", "h100", "--response-tokens", "9999"], "--response-tokens 9999: the config"),
        (["--gpu", "h100", "--model", "smollm2-136m"], "smollm2-136m"),
    ],
)
def test_bad_words_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["plan", "gsm8k", "model.path=smollm2-135m", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_former_name_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "model")
    path = str(write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path))
    assert main(["plan", path, "--ranks", "2"]) == 0
    now = capsys.readouterr()
    assert main(["explain", path, "--ranks", "2"]) == 0
    former = capsys.readouterr()
    assert former.out == now.out and not now.err
    assert former.err == "spmdrl explain: its name is spmdrl plan now\n"


def test_ranks_on_cpus_count_as_the_hosts_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ours.yaml").write_text("base: h100\nkind: cpu\nname: ours\nhost_memory_gb: 4\n")
    words = [*SMALL, "--gpu", str(tmp_path / "ours.yaml"), "--gpus-per-node", "2"]
    code, found = planned(capsys, words)
    assert code == 2 and not found["fits"] and found["taken_gb"] == {}
    assert found["host_gb_per_node"] > 2 * found["peak_gb"] > 0
    assert found["host_capacity_gb_per_node"] == 8
