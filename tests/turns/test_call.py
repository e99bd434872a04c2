"""Environments of samples in worker processes: answers, failures, limits, resumption, and what is
left afterwards.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_turns import Numbers, Play, play, requests_of, rows_of, settings

from spmdrl.rewards.server import RewardServer, start_reward_server
from spmdrl.rollout.protocol import Ending
from spmdrl.sandbox.processes import descendants
from spmdrl.supervision.pulse import lives
from spmdrl.turns.call import EnvironmentTurns


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with start_reward_server() as server:
        yield server


def source(server: RewardServer, kind: str = "Counting", **values: Any) -> EnvironmentTurns:
    return EnvironmentTurns(server, Numbers(), settings(kind, **values))


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split("\n")[:-1]


def below(server: RewardServer) -> list[int]:
    return descendants(server._process.pid)


def test_rewards_and_tokens_are_the_environments(server: RewardServer) -> None:
    with source(server, max_turns=8) as turns:
        openings = turns.openings(rows_of(3))
        assert [o.messages for o in openings] == [
            [{"role": "user", "content": str(30 + i)}] for i in range(3)
        ]
        assert openings[1].tools == [{"type": "function", "function": {"name": "tool 31"}}]
        found = play(turns, rows_of(3))
        assert set(found.endings.values()) == {Ending.DONE}
        assert turns.counts()["done"] == 6
        assert turns.metrics()["turns"] == 18
    for (place, _), (tokens, given, rewards, _) in found.result().items():
        assert len(rewards) == 3 and len(given) == 2
        text, start = "", 0
        for number, (first, last) in enumerate([*given, (len(tokens), len(tokens))]):
            turn = tokens[start:first]
            text += Numbers().text(turn, special=False)
            digits = sum(map(ord, text)) + 30 + place
            assert rewards[number] == pytest.approx(number + digits / 7)
            if first < last:
                own = [(digits + 13 * k) % 100 + 6 for k in range(1 + digits % 5)]
                head = [3] if turn[-1] == 2 else [2, 3]
                assert list(tokens[first:last]) == [*head, *own]
            start = last


def test_results_do_not_depend_on_the_workers(server: RewardServer) -> None:
    found = []
    for workers in (1, 3, 12):
        with source(server, workers=workers) as turns:
            found.append(play(turns, rows_of(4), samples=3).result())
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 12


FAILURES = {
    "raise": "RuntimeError: the level is lost",
    "exit": "SystemExit: 3",
    "kill": "exit code -9",
    "hang": "no reply in 0.6 s",
    "spin": "in 0.6 s",
    "memory": "memory limit",
    "nan": "the reward nan",
    "word": "the reward '1.0'",
    "metric": "the metric 'calls': '2'",
    "infinite": "the metric 'calls': inf: it must be finite",
    "text": "return an Observation",
    "assistant": "the model alone writes those",
    "no role": "it has no role",
    "no json": "no JSON",
    "surrogate": "no JSON",
    "long": "the limit is",
}


@pytest.mark.parametrize("trouble", FAILURES)
def test_a_failure_ends_its_sample_alone(
    trouble: str, server: RewardServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two samples fail in their second turn; those that share their workers continue."""
    rows = rows_of(4)
    rows[1] |= {"trouble": trouble, "at": 1}
    with source(server) as turns:
        wanted = play(turns, rows_of(4)).result()
    options = {"folder": str(tmp_path)}
    before = below(server)
    with source(server, workers=2, timeout_s=0.6, failed_reward=-2.5, options=options) as turns:
        with caplog.at_level(logging.WARNING):
            found = play(turns, rows)
        counts = turns.counts()
    assert below(server) == before
    for where, result in found.result().items():
        if where[0] != 1:
            assert result == wanted[where]
            continue
        tokens, given, rewards, ending = result
        assert ending is Ending.FAILED and rewards[1:] == [-2.5]
        assert rewards[0] == wanted[where][2][0]
        assert tokens == wanted[where][0][: len(tokens)] and len(given) == 1
    assert (counts["failed"], counts["done"], counts["restarted"]) == (2, 6, 0)
    [told] = [record.getMessage() for record in caplog.records]
    assert "2 samples ended with a turn" in told and FAILURES[trouble] in told
    children = [int(line.split()[2]) for line in calls(tmp_path) if " child " in line]
    assert all(not Path(f"/proc/{pid}").exists() for pid in children)
    assert bool(children) == (trouble == "hang")


def test_a_killed_worker_is_not_seen_by_the_model(server: RewardServer, tmp_path: Path) -> None:
    """Somebody kills the idle workers between two turns: objects replay, or load their states."""
    with source(server) as turns:
        wanted = play(turns, rows_of(3)).result()
    for kind in ("Counting", "Saving"):
        folder = tmp_path / kind
        folder.mkdir()
        before = below(server)
        with source(server, kind, workers=2, options={"folder": str(folder)}) as turns:
            openings = turns.openings(rows_of(3))
            requests = requests_of(openings)
            with turns.open(requests, [o.entry for o in openings]) as call:
                game = Play(requests, call)
                game.run(most=5)
                asked = sum(map(len, game.given.values())) + len(game.tokens)
                while sum(line.endswith("step") for line in calls(folder)) < asked:
                    time.sleep(0.01)
                time.sleep(0.3)  # they send what they have noted
                own = [pid for pid in below(server) if pid not in before]
                assert len(own) == 2
                for pid in own:
                    os.kill(pid, signal.SIGKILL)
                while any(lives(pid) for pid in own):
                    time.sleep(0.01)
                while game.waits:
                    for answer in call.answers(0.2):
                        game._answered(answer)
        assert game.result() == wanted and not game.restarted
        counts = turns.counts()
        assert counts["done"] == 6 and counts["failed"] + counts["restarted"] == 0, counts
        assert counts["remade"] > 0
        loaded = sum(line.endswith(" load") for line in calls(folder))
        assert (loaded > 0) == (kind == "Saving")


def test_limits_say_why(server: RewardServer) -> None:
    with source(server, max_turns=2) as turns:
        found = play(turns, rows_of(2, turns=9))
        assert set(found.endings.values()) == {Ending.TURNS}
        assert all(len(rewards) == 2 for rewards in found.rewards.values())
    with source(server) as turns:
        found = play(turns, rows_of(4, turns=9), room=24)
        assert set(found.endings.values()) == {Ending.ROOM}
        assert turns.counts()["room"] == 8
        assert all(len(tokens) <= 24 for tokens in found.tokens.values())
    with source(server, seconds=0.2, options={"sleep_s": 0.15}, workers=8) as turns:
        found = play(turns, rows_of(3, turns=9))
        assert set(found.endings.values()) == {Ending.SECONDS}
        assert Ending.SECONDS.finish.text == "length"
    with source(server) as turns:
        found = play(turns, rows_of(1, trouble="end", at=1))
        assert set(found.endings.values()) == {Ending.DONE}
        assert all(rewards[1] == 5.0 for rewards in found.rewards.values())


@pytest.mark.parametrize("kind", ["Counting", "Saving"])
def test_a_stopped_call_resumes(kind: str, server: RewardServer, tmp_path: Path) -> None:
    with source(server) as turns:
        wanted = play(turns, rows_of(3)).result()
    for most in (2, 7):
        folder = tmp_path / str(most)
        folder.mkdir()
        with source(server, kind, workers=2, options={"folder": str(folder)}) as turns:
            openings = turns.openings(rows_of(3))
            requests, entries = requests_of(openings), [o.entry for o in openings]
            with turns.open(requests, entries) as call:
                part = Play(requests, call).run(most)
                states = call.states()
        done = part.result()
        (folder / "calls").unlink()
        with source(server, kind, options={"folder": str(folder)}) as turns:
            with turns.open(part.begun(), entries, states) as call:
                rest = Play(part.begun(), call).run()
            counts = turns.counts()
        assert {**done, **rest.result()} == wanted
        assert counts["restarted"] == 0 and counts["done"] == 6 - len(done)
        if kind == "Saving":
            begun = [given for where, given in part.given.items() if where not in done]
            assert len(states) == sum(bool(given) for given in begun)
            assert sum(line.endswith("load") for line in calls(folder)) == len(states)
        else:
            assert not states


def test_answers_that_differ_restart_the_sample(
    server: RewardServer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(2, trouble="differs", turns=6)
    with source(server) as turns:
        openings = turns.openings(rows)
        requests, entries = requests_of(openings), [o.entry for o in openings]
        with turns.open(requests, entries) as call:
            part = Play(requests, call).run(turns=1)
        with turns.open(part.begun(), entries) as call, caplog.at_level(logging.WARNING):
            rest = Play(part.begun(), call).run()
        assert turns.counts()["restarted"] == len(rest.restarted) == len(part.waits) > 0
        assert turns.counts()["done"] == len(part.waits)
    assert f"{len(part.waits)} samples started again" in caplog.text
    with source(server, "Saving") as turns:
        with turns.open(requests, entries) as call:
            part = Play(requests, call).run(turns=1)
            states = call.states()
        with turns.open(part.begun(), entries, states) as call:
            rest = Play(part.begun(), call).run()
        assert turns.counts()["restarted"] == 0 and not rest.restarted
        old = {key: value[4:] for key, value in states.items()}
        bad = {key: b"\x09\0\0\0" + value for key, value in old.items()}
        with turns.open(part.begun(), entries, bad) as call:  # not the state of these turns
            Play(part.begun(), call).run()
        assert turns.counts()["restarted"] == len(part.waits)
        bad = {key: states[key][:4] + b"what is this" for key in states}
        with turns.open(part.begun(), entries, bad) as call:
            Play(part.begun(), call).run()
        assert turns.counts()["restarted"] == len(part.waits)


def test_a_start_that_fails_is_an_error(server: RewardServer, tmp_path: Path) -> None:
    rows = rows_of(3)
    rows[1] |= {"trouble": "start"}
    options = {"folder": str(tmp_path)}
    with source(server, workers=2, options=options) as turns:
        with pytest.raises(ValueError, match=r'"number": 31.*start failed: KeyError') as caught:
            turns.openings(rows)
        assert "no such level" in str(caught.value) and "Counting" in str(caught.value)
        with pytest.raises(ValueError, match=r"row 1 of the prompts.*not JSON"):
            turns.openings([{"number": 1}, {"number": object()}])
        good = turns.openings(rows_of(3))
        entries = [o.entry for o in good]
        entries[2] = entries[2].replace('"number": 32', '"number": 32, "trouble": "start"')
        requests = requests_of(good)
        with (
            pytest.raises(ValueError, match=r'"number": 32.*start failed'),
            turns.open(requests, entries) as call,
        ):
            Play(requests, call).run()
        openings = turns.openings(rows_of(1, trouble="other start"))
        with (
            pytest.raises(ValueError, match="depend on the row alone"),
            turns.open(requests_of(openings), [o.entry for o in openings]) as call,
        ):
            Play(requests_of(openings), call).run()


def test_a_class_that_cannot_be_used_is_refused(server: RewardServer) -> None:
    cases = {
        "Nothing": "has no 'Nothing'",
        "Stateless": "has no 'step': add step",
        "Half": "only one of 'save' and 'load'",
        "TIME": "no 'TIME'",
    }
    for kind, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            source(server, kind)
        assert "rollout.turns.kind" in str(caught.value)
    with pytest.raises(ValueError, match=r"rollout\.turns\.options.*'colour'"):
        source(server, options={"colour": "red"})
    with pytest.raises(ValueError, match="workers=0"):
        source(server, workers=0)
    assert below(server) == []


def test_objects_are_closed_and_nothing_is_left(server: RewardServer, tmp_path: Path) -> None:
    options = {"folder": str(tmp_path)}
    with source(server, workers=3, options=options) as turns:
        openings = turns.openings(rows_of(3))
        requests, entries = requests_of(openings), [o.entry for o in openings]
        with pytest.raises(ZeroDivisionError), turns.open(requests, entries) as call:
            Play(requests, call).run(4)
            used = below(server)
            raise ZeroDivisionError
        lines = calls(tmp_path)
        assert sum(line.endswith("close") for line in lines) == 3 + 6
        assert not set(below(server)) & set(used)
        fresh = below(server)
        assert len(fresh) == len(used) == 3
        # the next call uses those that were started meanwhile
        with turns.open(requests, entries) as call:
            Play(requests, call).run()
            assert below(server) == fresh
    assert below(server) == []


def test_steps_run_side_by_side_and_nobody_waits(server: RewardServer) -> None:
    rows = [{"number": 30 + i, "sleep_s": 0.4, "turns": 1} for i in range(6)]
    with source(server, "Waiting", workers=6) as turns:
        openings = turns.openings(rows)
        requests = requests_of(openings, samples=1)
        with turns.open(requests, [o.entry for o in openings]) as call:
            game = Play(requests, call)
            began = time.monotonic()
            game.run(most=0)
            assert call.answers(0.0) == []
            assert time.monotonic() - began < 0.3
            while game.waits:
                for answer in call.answers(1.0):
                    game._answered(answer)
            assert time.monotonic() - began < 1.6  # in turn they would take 2.4 s
    assert set(game.endings.values()) == {Ending.DONE}


def test_special_tokens_are_given_to_those_who_ask(server: RewardServer) -> None:
    with source(server) as plain, source(server, "Special") as special:
        assert play(plain, rows_of(2)).result() != play(special, rows_of(2)).result()


def test_output_goes_to_its_file_or_nowhere(
    server: RewardServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talks.py"
    file.write_text(
        "from spmdrl.turns.environment import Observation\n"
        "class Talks:\n"
        "    def start(self, row):\n"
        "        print('started', row['number'])\n"
        "        return [{'role': 'user', 'content': '7'}]\n"
        "    def step(self, response):\n"
        "        return Observation()\n"
    )
    for output in (None, tmp_path / "output.log"):
        chosen = settings(output=output)
        chosen = type(chosen)(**{**vars(chosen), "kind": f"{file}:Talks"})
        with EnvironmentTurns(server, Numbers(), chosen) as turns:
            play(turns, [{"number": 4}])
    assert (tmp_path / "output.log").read_text() == "started 4\n" * 3
    assert capfd.readouterr() == ("", "")
