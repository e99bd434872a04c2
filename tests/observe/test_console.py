"""Console lines, progress bars and logging."""

import io
import logging
import re

import pytest

from spmdrl.observe.console import Console, make_layout, number
from spmdrl.observe.log import ALIKE, RankHandler, Relay, phase_bar, set_up_logging

RECORD = {
    "step": 7,
    "reward": 0.51234,
    "response_length": 123.4,
    "kl": 3.2e-5,
    "entropy": 1.25,
    "clip_fraction": 0.0123,
    "tokens_per_s/rollout": 1234.4,
    "tokens_per_s/update": 56789.0,
    "seconds/rollout": 12.3,
    "seconds/reward": 0.04,
    "seconds/update": 8.06,
    "seconds/other": 0.2,
    "seconds/step": 20.6,
    "memory/peak_gb": 2.345,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_shows_everything_under_its_title():
    layout = make_layout(RECORD, 120)
    above, titles = layout.header().splitlines()
    line = layout.line(RECORD)
    assert len(line) == len(titles) <= 120
    shown = "7/120 | 0.512 123.4 3.2e-05 1.250 1.23 | 1234 56789 | 20.6 12.3 0.0 8.1 0.2 | 2.35"
    assert " ".join(line.split()) == shown
    assert [i for i, c in enumerate(line) if c == "|"] == [
        i for i, c in enumerate(titles) if c == "|"
    ]
    assert above.index("seconds") < titles.index("update") < titles.index("peak")


def test_a_flow_without_a_policy_loss_shows_its_own():
    missing = ("kl", "entropy", "clip_fraction")
    own = {name: value for name, value in RECORD.items() if name not in missing}
    titles = make_layout({**own, "loss": 1.5, "grad_norm": 0.2}, 120).header().splitlines()[1]
    assert titles.split("|")[1].split() == ["reward", "length", "loss", "grad"]
    # before the first update, which will bring them
    titles = make_layout(own, 120).header().splitlines()[1]
    assert titles.split("|")[1].split() == ["reward", "length", "kl", "entropy", "clip%"]


def test_columns_stay_where_they_are():
    layout = make_layout(RECORD, 120)
    wild = {name: value * 1e5 for name, value in RECORD.items()} | {"step": 120}
    gone = {"step": 1}
    nan = dict.fromkeys(RECORD, float("-inf")) | {"step": 3}
    assert {len(layout.line(r)) for r in (RECORD, wild, gone, nan)} == {len(layout.line(RECORD))}
    assert layout.line(gone).count("-") >= 10


def test_the_shortest_phases_fold_into_other_when_the_line_is_full():
    phases = {f"seconds/phase{i}": float(i) for i in range(12)}
    record = {"step": 1, **phases, "seconds/other": 0.5, "seconds/step": 66.5, "ref_kl": 0.1}
    layout = make_layout(record, 100_000)
    header, line = layout.header().splitlines()[1], layout.line(record)
    assert len(line) == len(header) <= 120
    shown = [int(i) for i in re.findall(r"phase(\d+)", header)]
    assert 11 in shown and shown == sorted(shown) and 0 not in shown
    folded = sum(range(12)) - sum(shown) + 0.5
    assert line.split("|")[3].split()[-1] == f"{folded:.1f}"
    assert "ref_kl" in header


@pytest.mark.parametrize(
    ("value", "width", "decimals", "shown"),
    [
        (0.0, 8, 4, "0.0000"),
        (0.5, 8, 4, "0.5000"),
        (-0.00012, 8, 4, "-1.2e-04"),
        (123.456, 7, 3, "123.456"),
        (12345.6, 7, 3, "12345.6"),
        (99999.6, 5, 0, "100k"),
        (1234567.0, 5, 0, "1235k"),
        (-98765432.0, 5, 1, "-99M"),
        (float("nan"), 5, 1, "nan"),
    ],
)
def test_numbers_fit(value, width, decimals, shown):
    assert number(value, width, decimals) == shown
    assert len(shown) <= width


def test_only_the_first_rank_prints_and_repeats_its_header():
    out, silent = io.StringIO(), io.StringIO()
    console = Console(is_first=True, num_steps=60, stream=out)
    other = Console(is_first=False, num_steps=60, stream=silent)
    for step in range(1, 27):
        console.step({**RECORD, "step": step})
        other.step({**RECORD, "step": step})
    lines = out.getvalue().splitlines()
    assert len(lines) == 26 + 2 * 2
    assert sum("entropy" in line for line in lines) == 2
    assert silent.getvalue() == ""


def test_bars_move_on_a_terminal():
    stream = Terminal()
    with phase_bar("rollout", is_first=True, stream=stream) as phase:
        phase(3, 8)
        phase(8, 8)
    text = stream.getvalue()
    assert "rollout" in text


@pytest.mark.parametrize(("is_first", "stream"), [(True, io.StringIO()), (False, Terminal())])
def test_bars_are_silent_elsewhere(is_first, stream):
    with phase_bar("rollout", is_first=is_first, stream=stream) as phase:
        phase(1, 2)
    assert stream.getvalue() == ""


@pytest.fixture
def restored_logging():
    root, package = logging.getLogger(), logging.getLogger("spmdrl")
    levels = root.level, package.level
    yield
    for handler in [h for h in root.handlers if isinstance(h, RankHandler)]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    package.setLevel(levels[1])


@pytest.mark.usefixtures("restored_logging")
def test_ranks_log_by_their_place():
    def lines_of(rank: int) -> list[str]:
        stream = io.StringIO()
        set_up_logging(rank, stream=io.StringIO())  # replaced by the next call
        set_up_logging(rank, stream=stream)
        for name in ("spmdrl.flows", "some_library"):
            logging.getLogger(name).info("%s says", name)
            logging.getLogger(name).warning("%s warns", name)
        return stream.getvalue().splitlines()

    first = lines_of(0)
    assert [line.split(" ", 1)[1] for line in first] == [
        "INFO spmdrl.flows says",
        "WARNING spmdrl.flows warns",
        "WARNING some_library warns",
    ]
    third = lines_of(3)
    assert len(third) == 2 and all(line.startswith("[rank 3] ") for line in third)


def test_a_flow_that_samples_nothing_shows_its_loss() -> None:
    record = {"step": 1.0, "loss": 0.6931, "accuracy": 0.5, "grad_norm": 2.0, "seconds/step": 3.0}
    layout = make_layout(record, 10)
    header = layout.header().splitlines()[1]
    for title in ("loss", "accuracy", "grad", "train"):
        assert title in header
    for title in ("reward", "entropy", "nll", "rollout"):
        assert title not in header
    assert "0.6931" in layout.line(record)


def test_a_phase_tells_a_log_how_far_it_is(caplog, monkeypatch):
    """A log is no terminal: work of more than a minute says so now and then, on rank 0."""
    now = [0.0]
    monkeypatch.setattr("spmdrl.observe.log.time.monotonic", lambda: now[0])
    for is_first in (True, False):
        relay = Relay(is_first=is_first)
        with caplog.at_level(logging.INFO), relay.bar("evaluation"):
            for second in range(100):
                now[0] += 1
                relay.report(second, 200)
            with relay.bar("reward"):
                now[0] += 40
                relay.report(1, 2)
            relay.report(150, 200)
    assert [record.getMessage() for record in caplog.records] == [
        *("evaluation: 29 of 200 rows, 30 s", "evaluation: 59 of 200 rows, 60 s"),
        *("evaluation: 89 of 200 rows, 90 s", "reward: 1 of 2 rows, 40 s"),
        "evaluation: 150 of 200 rows, 140 s",
    ]


def test_what_all_ranks_read_alike_is_told_once():
    for rank, shown in ((0, True), (1, False)):
        stream = io.StringIO()
        logger = set_up_logging(rank, stream=stream)
        logger.warning("9 rows", extra=ALIKE)
        logger.warning("rank's own")
        assert ("9 rows" in stream.getvalue()) is shown and "rank's own" in stream.getvalue()
