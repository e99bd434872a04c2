"""The reward pool: order, weights, and functions that raise, hang, return NaN, eat memory, die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmdrl.config.sections import RewardPoolSection, RewardSection
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import RewardError, RewardJob
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.reward_pools import pool_key, reward_specs

USER = '''
import os, subprocess, sys, time

def naughty(prompt, response, answer, entry):
    """Does what the response says."""
    print("noise", response)
    if response == "raise":
        raise KeyError("from the reward")
    if response == "exit":
        sys.exit(3)
    if response == "hang":
        time.sleep(60)
    if response == "hang with child":
        child = subprocess.Popen(["sleep", "60"])
        open(entry["pid_file"], "w").write(f"{os.getpid()} {child.pid}")
        child.wait()
    if response == "nan":
        return float("nan")
    if response == "inf":
        return float("inf")
    if response == "huge":
        return 1e39
    if response == "none":
        return None
    if response == "memory":
        return float(len(bytearray(2**31)))
    if response == "die":
        os._exit(7)
    if response == "escape":
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        if os.fork() == 0:  # a daemon: its parent is gone
            os.setsid()
            daemon = subprocess.Popen(["sleep", "61"])
            open(entry["pid_file"], "w").write(f"{child.pid} {daemon.pid}")
            os._exit(0)
        os.wait()
    return float(response)

def parts(prompt, response, answer, entry):
    return {"score": float(response), "length": len(response)}

def mixed(prompt, response, answer, entry):
    return {"score": 1.0, "acc": True, "pred": "[INVALID]", "note": None, "digits": "12"}

def bad_score(prompt, response, answer, entry):
    return {"score": "[INVALID]", "acc": True}

def sees(prompt, response, answer, entry):
    return float(response in os.environ)

def no_score(prompt, response, answer, entry):
    return {"length": 1.0}

def torch_free(prompt, response, answer, entry):
    return float("torch" not in sys.modules)
'''


@pytest.fixture(scope="module")
def server():
    with start_reward_server() as server:
        yield server


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    file = tmp_path_factory.mktemp("user") / "mine.py"
    file.write_text(USER)
    return str(file)


def jobs(*responses, **entry):
    return [RewardJob(prompt="p", response=r, answer="5", entry=entry) for r in responses]


def naughty(server, user, **settings):
    spec = RewardSpec(name="naughty", function=f"{user}:naughty")
    settings = {"timeout_s": 0.5, "memory_mb": 256} | settings
    return RewardPool(server, [spec], **settings)


def gone(pid, within_s=5.0):
    """Whether a process ends (or is a zombie) within some seconds."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_order_weights_and_columns(server, user):
    specs = [
        RewardSpec(name="right", function="number", weight=2.0),
        RewardSpec(name="parts", function=f"{user}:parts", weight=0.5),
    ]
    with RewardPool(server, specs, num_workers=3) as pool:
        seen = []
        results = pool.score(
            jobs(*[str(i) for i in range(20)]), progress=lambda done, total: seen.append(done)
        )
        assert pool.score([]) == []
    assert [r.score for r in results] == [2.0 * (i == 5) + 0.5 * i for i in range(20)]
    assert results[5].components == {"right": 1.0, "parts": 5.0, "parts/length": 1.0}
    assert results[12].components == {"right": 0.0, "parts": 12.0, "parts/length": 2.0}
    assert not any(r.failures for r in results)
    assert seen[-1] == 40 and seen == sorted(seen)


def test_each_kind_of_failure_costs_one_call(server, user, caplog):
    bad = ["raise", "exit", "hang", "nan", "inf", "huge", "none", "memory", "die"]
    with naughty(server, user, failed=-1.0) as pool:
        responses = [r for word in bad for r in (word, "1")]
        results = pool.score(jobs(*responses))
        assert [r.score for r in results] == [-1.0, 1.0] * len(bad)
        reasons = [r.failures[0].reason for r in results[::2]]
        assert reasons == [
            *(
                "exception",
                "exception",
                "timeout",
                "nan",
                "nan",
                "nan",
                "returned",
                "memory",
                "died",
            )
        ]
        assert "KeyError: 'from the reward'" in results[0].failures[0].message
        assert "exit code 7" in results[-2].failures[0].message
        assert not any(r.failures for r in results[1::2])
        assert [r.score for r in pool.score(jobs("2", "3"))] == [2.0, 3.0]
    assert "9 of 18 calls failed" in caplog.text and "'timeout': 1" in caplog.text


def test_hanging_calls_run_out_side_by_side(server, user):
    with naughty(server, user, num_workers=4) as pool:
        start = time.monotonic()
        results = pool.score(jobs("hang", "1", "hang", "2", "hang", "3", "hang", "4"))
        assert time.monotonic() - start < 1.9  # one after the other: 2.0
    assert [r.score for r in results[1::2]] == [1.0, 2.0, 3.0, 4.0]


def test_what_a_hanging_function_started_is_killed_too(server, user, tmp_path):
    pid_file = tmp_path / "pids"
    with naughty(server, user) as pool:
        assert pool.score(jobs("hang with child", pid_file=str(pid_file)))[0].failures
    assert all(gone(int(pid)) for pid in pid_file.read_text().split())


def test_a_batch_that_fails_throughout_is_an_error_with_the_traceback(server, user):
    with naughty(server, user) as pool:
        assert pool.score(jobs(*["raise"] * 4))[0].failures  # too few calls to say
        with pytest.raises(RewardError, match=r"(?s)'naughty'.*8 of 8 calls.*KeyError"):
            pool.score(jobs(*["raise"] * 4))
    with naughty(server, user, max_failed=0.25) as pool:
        pool.score(jobs(*["raise", *["1"] * 7]))
        with pytest.raises(RewardError, match="2 of 8 calls"):
            pool.score(jobs(*["raise", "raise", *["1"] * 6]))


def test_a_function_that_never_works_is_given_up_early(server, user):
    with naughty(server, user, timeout_s=0.05, num_workers=4) as pool:
        start = time.monotonic()
        with pytest.raises(RewardError, match="16 of 16 calls"):
            pool.score(jobs(*["hang"] * 1000))
        assert time.monotonic() - start < 10  # all of them: 12.5


def test_a_function_that_nearly_always_fails_ends_the_run(server, user):
    """With the share that `reward_pool.max_failed_share` has by default."""
    config = RewardPoolSection()
    with naughty(server, user, max_failed=config.max_failed_share, num_workers=2) as pool:
        pool.score(jobs(*["raise"] * 7, "1"))
        with pytest.raises(RewardError, match=r"(?s)99 of 100 calls.*max_failed_share=0.95"):
            pool.score(jobs(*["1", *["raise"] * 99]))


def test_what_float32_cannot_hold_is_a_failure(server, user):
    spec = RewardSpec(name="x", function=f"{user}:naughty", weight=1e30)
    with RewardPool(server, [spec]) as pool:
        good, bad = pool.score(jobs("1", "1e10"))
        assert good.score == 1e30 and not good.failures
        assert bad.score == 0.0 and "1e+30 x the reward" in bad.failures[0].message
    twice = [RewardSpec(name=name, function=f"{user}:naughty") for name in "ab"]
    with RewardPool(server, twice) as pool:
        assert len(pool.score(jobs("3e38"))[0].failures) == 2  # their sum is no float32
    for settings in ({"failed": float("nan")}, {"failed": 1e39}):
        with pytest.raises(ValueError, match=r"failed=.*finite"):
            RewardPool(server, [spec], **settings)


def test_entries_that_are_no_numbers_are_left_out_with_one_warning(server, user, caplog):
    """As verl's functions return them (agentica rllm, verl: {"score", "acc", "pred"})."""
    with RewardPool(server, [RewardSpec(name="x", function=f"{user}:mixed")]) as pool:
        results = [*pool.score(jobs("1", "2")), *pool.score(jobs("3"))]
    assert [dict(r.components) for r in results] == [{"x": 1.0, "x/acc": 1.0}] * 3
    assert not any(r.failures for r in results)
    for key in ("pred", "note", "digits"):
        assert caplog.text.count(f"reward x: the entry '{key}'") == 1
    with RewardPool(server, [RewardSpec(name="x", function=f"{user}:bad_score")]) as pool:
        failure = pool.score(jobs("1"))[0].failures[0]
    assert "'score' is no number: '[INVALID]'" in failure.message


def test_functions_see_the_usual_variables_and_those_that_are_named(user, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    spec = RewardSpec(name="x", function=f"{user}:sees")
    names = ("PATH", "JUDGE_TOKEN", "HF_TOKEN", "MASTER_ADDR")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with start_reward_server() as server:
        with RewardPool(server, [spec]) as pool:
            assert [r.score for r in pool.score(jobs(*names))] == [1.0, 0.0, 0.0, 0.0]
        with RewardPool(server, [spec], environment=("JUDGE_*",)) as pool:
            assert [r.score for r in pool.score(jobs(*names))] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("how", ["pool", "server"])
def test_processes_in_other_sessions_end_with_their_worker(user, tmp_path, how):
    pid_file = tmp_path / "pids"
    with start_reward_server() as server:
        pool = naughty(server, user, timeout_s=20.0)
        assert pool.score(jobs("escape", pid_file=str(pid_file)))[0].failures
        pids = [int(pid) for pid in pid_file.read_text().split()]
        assert len(pids) == 2 and not any(gone(pid, within_s=0.05) for pid in pids)
        if how == "pool":
            pool.close()
            assert all(gone(pid) for pid in pids)
    assert all(gone(pid) for pid in pids)
    for worker in pool._workers:
        worker.channel.close()


LIMITED = """
import resource, sys
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import RewardJob
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import start_reward_server
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
with start_reward_server() as server:
    spec = RewardSpec(name="x", function=sys.argv[1] + ":naughty")
    with RewardPool(server, [spec], memory_mb=64 << 10, timeout_s=100.0) as pool:
        print(pool.score([RewardJob(prompt="", response="1", answer=None)])[0].score)
"""


def test_workers_start_below_hard_limits(user):
    """As of `ulimit -v` and `ulimit -t`, for a user who may not raise them."""
    code = "import ctypes; ctypes.CDLL(None).prctl(24, 24, 0, 0, 0)\n"  # drop CAP_SYS_RESOURCE
    done = subprocess.run(
        [sys.executable, "-c", code + LIMITED, user], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("1.0\n", 0), done.stderr


def test_a_function_named_like_a_scoring_role_has_a_column_of_its_own():
    sections = [RewardSection(role="reward"), RewardSection(function="my.py:reward")]
    assert [spec.name for spec in reward_specs(sections)] == ["reward#2"]
    assert pool_key(sections) != pool_key(sections[1:])


def test_a_dict_without_score_is_a_failure(server, user):
    with RewardPool(server, [RewardSpec(name="x", function=f"{user}:no_score")]) as pool:
        failure = pool.score(jobs("1"))[0].failures[0]
    assert failure.reason == "returned" and "must hold 'score'" in failure.message


def test_a_file_that_changes_or_goes_is_known_by_what_was_loaded(server, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def one(prompt, response, answer, entry):\n    return 1.0\n")
    specs = [RewardSpec(name="one", function=f"{file}:one")]
    with RewardPool(server, specs, num_workers=1) as pool:
        before = pool.describe()
        file.write_text("def one(prompt, response, answer, entry):\n    return 2.0\n")
        with RewardPool(server, specs, num_workers=1) as other:
            assert other.describe() != before == pool.describe()
        file.unlink()
        assert pool.describe() == before
        assert [result.score for result in pool.score(jobs("a"))] == [1.0]


def test_workers_do_not_import_torch(server, user):
    with RewardPool(server, [RewardSpec(name="x", function=f"{user}:torch_free")]) as pool:
        assert pool.score(jobs("1"))[0].score == 1.0


def test_output_goes_to_its_file(server, user, tmp_path, capfd):
    with naughty(server, user, output=tmp_path / "out.txt") as pool:
        pool.score(jobs("1"))
    with naughty(server, user) as pool:
        pool.score(jobs("1"))
    assert (tmp_path / "out.txt").read_text() == "noise 1\n"
    assert capfd.readouterr() == ("", "")


def test_small_calls_are_cheap(server):
    with RewardPool(server, [RewardSpec(name="x", function="number")]) as pool:
        pool.score(jobs(*["1"] * 64))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            pool.score(jobs(*["1"] * 64))
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1 / 0", "'mine'.*cannot be imported: ZeroDivisionError"),
        ("def g(): pass", "has no 'f'; it has"),
        ("import os; os._exit(9)", "exit code 9 while it loaded mine"),
        ("import time; time.sleep(60)", "hung while it loaded mine"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named_at_once(server, tmp_path, source, message):
    file = tmp_path / "bad.py"
    file.write_text(source)
    limit = 0.5 if "sleep" in source else 60.0
    with pytest.raises(ValueError, match=message):
        RewardPool(server, [RewardSpec(name="mine", function=f"{file}:f")], load_timeout_s=limit)


def test_a_worker_that_cannot_write_is_told_with_its_own_exit_code(server, tmp_path):
    place = tmp_path / "gone" / "output.log"
    for _ in range(5):  # ended by the rank while it ends by itself, it would be -9
        with pytest.raises(ValueError, match="ended with exit code 1 while"):
            RewardPool(server, [RewardSpec(name="x", function="number")], output=place)


def test_bad_settings_are_refused(server):
    spec = RewardSpec(name="x", function="number")
    with pytest.raises(ValueError, match="one name each"):
        RewardPool(server, [spec, spec])
    with pytest.raises(ValueError, match="one name each"):
        RewardPool(server, [])
    with pytest.raises(ValueError, match="timeout_s=0"):
        RewardPool(server, [spec], timeout_s=0)
    for weight in (float("nan"), float("inf")):
        heavy = RewardSpec(name="x", function="number", weight=weight)
        with pytest.raises(ValueError, match=f"the weight {weight} of reward 'x' must be finite"):
            RewardPool(server, [heavy])


def test_an_interrupted_batch_leaves_nothing_behind(server, user):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with naughty(server, user) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.score(jobs(*["1"] * 8), progress=interrupt)
        assert [r.score for r in pool.score(jobs("2", "3", "4"))] == [2.0, 3.0, 4.0]


def test_a_worker_that_dies_while_idle_is_replaced(server, user):
    with naughty(server, user, num_workers=1) as pool:
        pool.score(jobs("1"))
        os.kill(pool._workers[0].pid, signal.SIGKILL)
        assert gone(pool._workers[0].pid)
        assert [r.score for r in pool.score(jobs("2", "3"))] == [2.0, 3.0]


ORPHAN = """
import os, sys
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import RewardJob
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import start_reward_server
assert "torch" not in sys.modules
server = start_reward_server()
pool = RewardPool(server, [RewardSpec(name="x", function=sys.argv[1] + ":naughty")], timeout_s=60)
entry = {"pid_file": sys.argv[2]}
job = RewardJob(prompt="", response="hang with child", answer=None, entry=entry)
pool.score([job])
"""


def test_workers_outlive_signals_to_the_group_but_not_the_rank(user, tmp_path):
    pid_file = tmp_path / "pids"
    rank = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, user, str(pid_file)], start_new_session=True
    )
    try:
        while not pid_file.exists() or not pid_file.read_text():
            assert rank.poll() is None
            time.sleep(0.02)
        pids = [int(pid) for pid in pid_file.read_text().split()]
        os.kill(pids[0], signal.SIGTERM)
        os.kill(pids[0], signal.SIGINT)
        time.sleep(0.1)
        assert not gone(pids[0], within_s=0.1)
    finally:
        rank.kill()
        rank.wait()
    assert all(gone(pid) for pid in pids)


KILLED = """
import json, os, signal, socket, sys, time
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import RewardJob
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import start_reward_server

server = start_reward_server()
if sys.argv[1] == "unread":
    ours, theirs = socket.socketpair()
    request = json.dumps({"do": "fork", "number": 1}).encode()
    socket.send_fds(server._control, [request], [theirs.fileno()])
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
with RewardPool(server, [RewardSpec(name="x", function=sys.argv[2])]) as pool:
    signal.alarm(1)
    pool.score([RewardJob(prompt="", response="", answer=None, entry={})])
"""


@pytest.mark.parametrize("when", ["unread", "busy"])
def test_a_killed_rank_s_server_and_workers_end_without_a_word(when, tmp_path):
    """Also where an answer lies unread, and where a worker has one for nobody."""
    file = tmp_path / "slow.py"
    file.write_text("import time\ndef f(*given):\n    time.sleep(2)\n    return 1.0\n")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, when, f"{file}:f"],
        capture_output=True,  # until the last process that has the pipe is gone
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr == ""
