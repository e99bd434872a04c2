"""Long work before the first step: the log says how far it is."""

from __future__ import annotations

import logging

import pytest

from spmdrl.observe.log import TimedLines


def test_long_work_beats_always_and_says_how_far_it_is_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, beats = [0.0], []
    monkeypatch.setattr("spmdrl.observe.log.time.monotonic", lambda: clock[0])
    report = TimedLines("the data", lambda: beats.append(clock[0]), every_s=30)
    with caplog.at_level(logging.INFO, "spmdrl"):
        for clock[0], done, total in ((1, 256, 0), (31, 512, 0), (32, 0, 900), (62, 800, 900)):
            report(done, total)
    assert beats == [1, 31, 32, 62]
    assert caplog.messages == ["reading the data: row 512", "reading the data: row 800 of 900"]
