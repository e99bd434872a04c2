"""Contents of reports: what is read from a run's directory, and the summary's last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, record, write_rollouts

from spmdrl.commands.cli import main
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.report.contents import read_run
from spmdrl.observe.report.curves import grouped, is_constant, series_of, smooth, thinned
from spmdrl.observe.report.samples import MOST_LETTERS, read_samples
from spmdrl.observe.report.sections import facts_of
from spmdrl.observe.report.starts import differences
from spmdrl.observe.report.summary import compare, labels_of, report

OLD_RUN = Path(__file__).parents[1] / "run" / "of_0_1"


def test_facts_are_those_of_the_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with MetricsWriter(run, is_first=True) as metrics:
        metrics.write(0, {"eval/a/accuracy": 0.1})
        for step, reward, seconds in ((1, 0.25, 100.0), (2, float("nan"), 20.0), (3, 0.75, 6.0)):
            values = {"reward": reward, "seconds/step": seconds, "memory/peak_gb": float(step)}
            metrics.write(step, values)
    facts = facts_of(read_run(run, model="tiny"))
    assert facts["steps"] == "3" and facts["time"] == "2 min 06 s (42.0 s per step)"
    assert facts["reward"] == "0.25 → 0.75" and facts["peak memory"] == "3 GB per rank"
    assert facts["model"] == "tiny" and "commit" not in facts


def test_a_directory_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no directory of a run" in capsys.readouterr().err
    assert main(["report", str(make_run(tmp_path / "run", 2)), "steps=3"]) == 2
    assert "takes no key=value: steps=3" in capsys.readouterr().err
    assert not list(tmp_path.rglob("report.html"))


def test_a_run_of_0_1_has_a_page_that_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is given by its directory, or by its configuration, as 0.1 took it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((OLD_RUN / "run" / "metrics.jsonl").read_bytes())
    assert main(["report", str(run), "--seconds", "7"]) == 0
    told = capsys.readouterr()
    last = json.loads(told.out.splitlines()[-1])
    assert last["seconds"] == 7 and last["report"] == str(run / "report.html") and not told.err
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "configuration, command, commit, versions and hardware: runs of spmdrl 0.1" in text
    assert "samples: log.rollouts=N writes those" in text and 'id="starts"' not in text
    (run / "report.html").unlink()
    config = tmp_path / "config.yaml"
    config.write_bytes((OLD_RUN / "config.yaml").read_bytes())
    assert main(["migrate", str(config)]) == 0 and capsys.readouterr()
    words = [str(config), f"run_dir={run}", "model.path=my/own", "--seconds=7"]
    assert main(["report", *words]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1]) == last
    assert f"spmdrl report {run}" in told.err
    assert "my/own" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0)
    contents = read_run(run)
    assert contents.records == [] and "metrics: no step has been recorded yet" in contents.missing
    assert report(run)["steps"] == 0


def test_a_resumed_run_has_its_starts(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"started": "2026-01-01T00:00:00+0000", "config": {"steps": 4, "train": {"lr": 0.1}}},
        {"started": "2026-01-01T01:00:00+0000", "config": {"steps": 9, "train": {"lr": 0.1}}},
        {"started": "2026-01-01T09:00:00+0000", "config": {"steps": 9}},
    ]
    run = make_run(tmp_path / "run", 8, starts=entries, seconds_per_step=900.0)
    contents = read_run(run)
    assert contents.resumes == [4], "the last start has not finished a step"
    assert [start.config["steps"] for start in contents.starts] == ["4", "9", "9"]
    assert differences([start.config for start in contents.starts]) == {
        "steps": ["4", "9", "9"],
        "train.lr": ["0.1", "0.1", None],
    }
    (run / "run.json").write_text("{")
    assert any("has no list of starts" in text for text in read_run(run).missing)


def row(prompt: int, sample: int, reward: float, **more: Any) -> dict[str, Any]:
    told = {"response": f"{prompt}.{sample}", "prompt": "?", "answer": None, "finish": "stop"}
    numbers = {"prompt_id": prompt, "sample": sample, "reward": reward, "response_tokens": 3}
    return {**numbers, **told, **more}


def test_samples_are_the_best_and_worst_of_the_last_step(tmp_path: Path) -> None:
    assert read_samples(tmp_path, 2) is None
    write_rollouts(tmp_path, 1, [row(0, 0, 9.0)])
    nan = float("nan")
    rows = [row(0, 0, 1.0, response="x" * 9000), row(0, 1, 0.9), row(1, 0, 0.8), row(2, 0, nan)]
    write_rollouts(tmp_path, 2, [*rows, row(3, 0, 0.1, advantage=-0.5)])
    found = read_samples(tmp_path, 2)
    assert found is not None and (found.origin, found.count) == ("step 2", 5)
    assert [s.facts["reward"] for s in found.best] == ["1", "0.8"], "one sample of a prompt"
    assert [s.facts["reward"] for s in found.worst] == ["nan", "0.1"]
    assert found.worst[1].facts["advantage"] == "-0.5"
    assert found.worst[1].command == f"spmdrl show {tmp_path} --step 2 --sample 4"
    assert (
        found.best[0].texts[1][1] == "x" * MOST_LETTERS + f" [{9000 - MOST_LETTERS} more letters]"
    )
    (tmp_path / "rollouts" / "step_000002" / "rank_0000.jsonl.zst").write_bytes(b"half")
    again = read_samples(tmp_path, 2)
    assert again is not None and again.origin == "step 1"


def test_samples_of_turns_show_the_turns(tmp_path: Path) -> None:
    turns = [{"text": "a", "given": "b", "reward": 0.5}, {"text": "c", "given": "", "reward": 1}]
    write_rollouts(tmp_path, 1, [row(0, 0, 1.5, turns=turns)])
    found = read_samples(tmp_path, 2)
    assert found is not None
    assert found.best[0].texts[1:] == [
        ("turn 1, reward 0.5", "a"),
        ("given", "b"),
        ("turn 2, reward 1", "c"),
    ]


def test_without_rollouts_the_samples_are_those_of_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    for name, step, reward in (("held_out", 0, 0.0), ("held_out", 3, 0.7), ("a", 3, 0.5)):
        file = run / "evaluation" / f"{name}_{step:08d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(row(0, 0, reward)) + "\n", encoding="utf-8")
    found = read_samples(run, 2)
    assert found is not None and found.origin == "the held-out set held_out after 3 steps"
    assert found.best[0].facts["reward"] == "0.7" and found.worst == []


def test_runs_are_named_by_the_ends_of_their_paths() -> None:
    assert labels_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels_of([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]


def test_a_comparison_tells_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ({"train": {"lr": 0.1}, "steps": 3}, {"train": {"lr": 0.2}, "steps": 3, "seed": 1})
    runs = [
        make_run(tmp_path / name, 3, starts=[{"config": config}])
        for name, config in zip("ab", configs, strict=True)
    ]
    out = tmp_path / "new" / "page.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train.lr: 0.1 | 0.2", "seed: default | 1", f"comparison:   {out}"]
    for wrong in (runs[:1], [runs[0], runs[0]], [*runs] * 5):
        with pytest.raises(ValueError, match="compare takes 2 to 8 runs, each once"):
            compare(wrong, out)


def test_metrics_are_grouped_by_their_names() -> None:
    names = ["mine", "reward_std", "kl_per_response", "reward", "rollout_tokens", "reward/a", "lr"]
    assert grouped([*names, "rollout_gap_max", "rewarding", "value/loss", "eval/a/mean"]) == {
        "Rewards": ["reward_std", "reward", "reward/a"],
        "Policy": ["kl_per_response", "rollout_gap_max"],
        "Loss and optimizer": ["lr"],
        "Lengths": ["rollout_tokens"],
        "Value model": ["value/loss"],
        "Held-out sets": ["eval/a/mean"],
        "Other metrics": ["mine", "rewarding"],
    }


def test_smoothing_keeps_constants_and_length() -> None:
    assert smooth([2.0] * 50) == [2.0] * 50
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
    zigzag = [0.0, 1.0] * 40
    assert max(smooth(zigzag)) - min(smooth(zigzag)) < 0.3


def test_thinning_keeps_peaks_ends_and_gaps() -> None:
    values = [1.0] * 5000
    values[1234], values[4321], values[3000] = 9.0, -9.0, float("nan")
    kept = thinned(values, 100)
    assert {0, 1234, 3000, 4321, 4999} <= set(kept) and len(kept) <= 103
    assert thinned(values[:100], 100) == list(range(100))


def test_a_constant_metric_is_one_in_all_runs() -> None:
    one = series_of([{"step": 1.0, "a": 2.0, "b": float("nan")}], "a")
    other = series_of([{"step": 1.0, "a": 3.0}], "a", 1)
    none = series_of([{"step": 1.0, "b": float("nan")}], "b")
    assert one is not None and other is not None and none is not None
    assert is_constant([one]) and not is_constant([one, other]) and not is_constant([none])


def test_the_last_line_is_json_with_every_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN (one prompt has no standard error) is null, and no set hides another."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    def last_line(run: Path) -> dict[str, Any]:
        assert main(["report", str(run)]) == 0
        text = capsys.readouterr().out.splitlines()[-1]
        found: dict[str, Any] = json.loads(text, parse_constant=refuse)
        return found

    nan = float("nan")
    with MetricsWriter(tmp_path / "run", is_first=True) as metrics:
        for step in (0, 2):
            values = {"eval/a/accuracy": 0.1 + step, "eval/a/standard_error": nan}
            values |= {"eval/b/accuracy": 0.25, "eval/b/standard_error": 0.5, "eval/c/nll": 3.0}
            values |= {"memory/peak_sum_gb": 2.5 + step}
            metrics.write(step, {**(record(step, 2) if step else {}), **values})
    last = last_line(tmp_path / "run")
    assert last["sets"] == {
        "a": {"accuracy_before": 0.1, "accuracy_after": 2.1, "standard_error": None},
        "b": {"accuracy_before": 0.25, "accuracy_after": 0.25, "standard_error": 0.5},
        "c": {"nll_before": 3.0, "nll_after": 3.0, "nll_error": 0.0},
    }
    assert last["peak_gb"] == 4.5, "the last value"
    last = last_line(make_run(tmp_path / "one", 2, evaluated={0: {"sums": 0.1}, 2: {"sums": 0.9}}))
    told = [last[name] for name in ("accuracy_before", "accuracy_after", "standard_error")]
    assert told == [0.1, 0.9, 0.02]
    assert "sets" not in last and last["peak_gb"] is None
    # nothing was measured after the first step
    last = last_line(make_run(tmp_path / "early", 2, evaluated={0: {"sums": 0.1}}))
    assert last["accuracy_before"] == 0.1 and "accuracy_after" not in last
    last = last_line(make_run(tmp_path / "late", 2, evaluated={2: {"sums": 0.9}}))
    assert last["accuracy_after"] == 0.9 and "accuracy_before" not in last
