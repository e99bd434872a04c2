"""A run that goes on within a step with other data or settings: what was kept is used where it is
what is asked for now, or made anew with one warning; it is never mixed.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from flow_cases import write_config
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.config.user_objects import load_object
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from spmdrl.world import World
from stopping import Wrapped
from sweeps import swept
from tiny_model import make_tiny_model
from torchrun import outcome_of

pytestmark = pytest.mark.slow

STOP = "SPMDRL_TEST_STOP_IN"
"""`CALL STEP N`: the N-th poll in that call of that step sees a request to stop."""

AFTER = "after"
"""In place of the call: when the step is done."""

UNUSED = "was not used"

REWARDS = Path(__file__).parents[1] / "toy_rewards.py"
"""Not in this file: a reward worker would import torch with it."""


class Checks(Wrapped):
    """Stops where it is told, and looks whether every row belongs to its prompt."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.where, self.count = os.environ.get(STOP, ""), 0
        run._life.ledger._should_stop = self.poll

    def poll(self) -> bool:
        watcher = self.run._life.watcher
        call, step, number = self.where.split() if self.where else ("", "0", "0")
        position = watcher.pulse.position
        if call and call in position.call and position.step == int(step):
            self.count += 1
            watcher.stop_asked = watcher.stop_asked or self.count >= int(number)
        return bool(watcher.stop_asked)

    def metrics(self) -> Metrics:
        watcher = self.run._life.watcher
        if self.where == f"{AFTER} {watcher.pulse.position.step} 0":
            watcher.stop_asked = True
        return self.inner.metrics()

    def collect(self, step: int) -> Batch:
        batch = self.inner.collect(step)
        (section,) = self.run.config.rewards
        assert section.function is not None
        function, config = load_object(section.function), self.run.config
        assert batch["response_lengths"].max() <= config.sampling.max_tokens
        for row in batch.split_rows():
            (prompt,), (response,) = row.objects["prompt"], row.objects["response"]
            length = int(row["prompt_lengths"])
            assert tuple(row["tokens"][:length].tolist()) == prompt.tokens
            reward = function(prompt.text, response, prompt.answer, prompt.entry)
            assert float(row["rewards"]) == pytest.approx(section.weight * reward)
        counts = batch["prompt_ids"].unique(return_counts=True)[1].tolist()
        assert set(counts) <= {config.data.group_size}
        return batch


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


FILE = ("rows=", "extra=")
"""How the words begin that change the file."""


def write_rows(path: Path, count: int, extra: int = 0) -> None:
    rows = [
        {"question": f"What is {i} + {3 * i}?", "answer": str(4 * i), "extra": extra}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


Case = tuple[str, str, list[str], list[str], int]
"""Name, stop, words of both starts, words of the second (`rows=N`, `extra=N` change the file), and
how many warnings come."""


def stop_and_change(world: World, config: str, base: Path, cases: list[Case]) -> list[list[str]]:
    found = []
    with start_reward_server() as server:
        for name, stop, words, changes, _ in cases:
            run_dir, data = base / name, base / f"{name}.jsonl"
            own = [*words, f"run_dir={run_dir}", f"data.train.source={data}"]
            if world.is_first:
                write_rows(data, 12)
            dist.barrier()
            os.environ[STOP] = stop
            train(load_config(config, own), world, server)
            assert outcome_of(run_dir) == "stopped", name
            numbers = {w.split("=")[0]: int(w.split("=")[1]) for w in changes if w.startswith(FILE)}
            if world.is_first and numbers:
                write_rows(data, numbers.get("rows", 12), numbers.get("extra", 0))
            dist.barrier()
            os.environ[STOP] = ""
            handler = Warnings()
            logging.getLogger("spmdrl").addHandler(handler)
            again = [*own, *(w for w in changes if not w.startswith(FILE))]
            train(load_config(config, again), world, server)
            logging.getLogger("spmdrl").removeHandler(handler)
            assert outcome_of(run_dir) == "done", name
            found.append([text for text in handler.texts if UNUSED in text])
    return found


GENERATING, SCORED, UPDATING = "rollout.generate 1 3", "policy.logprobs 1 1", "policy.update 1 2"
PLACES = {"generating": GENERATING, "scored": SCORED, "updating": UPDATING}

CHANGES: dict[str, tuple[list[str], set[str]]] = {
    # what is changed, and the places of the stop after which something kept is of no use
    "nothing": ([], set()),
    "group_size": (["data.group_size=3"], set(PLACES)),
    "prompts": (["data.prompts_per_step=3"], set(PLACES)),
    "fewer_prompts": (["data.prompts_per_step=1", "train.num_minibatches=1"], set(PLACES)),
    "max_tokens": (["sampling.max_tokens=4"], set(PLACES)),
    "more_tokens": (["sampling.max_tokens=9"], set(PLACES)),
    "temperature": (["sampling.temperature=0.8"], set(PLACES)),
    "grown": (["rows=20"], set(PLACES)),
    "answers": (["extra=2"], {"scored", "updating"}),
    "reward": (
        [f"rewards=[{{function: '{REWARDS}:other_than_by_answer'}}]"],
        {"scored", "updating"},
    ),
    "weight": (
        [f"rewards=[{{function: '{REWARDS}:by_answer', weight: 0.5}}]"],
        {"scored", "updating"},
    ),
    "minibatches": (["train.num_minibatches=1"], {"updating"}),
    "epochs": (["train.epochs=1"], {"updating"}),
    "advantage": (["algorithm.advantage=rloo"], {"updating"}),
    "evaluation": (["evaluation.every=1"], set()),
    "held_out": (["evaluation.held_out=7"], set(PLACES)),
    "reference": (["roles.reference={}", "algorithm.kl_coef=0.1"], {"updating"}),
    "lr": (["train.lr=1e-4"], set()),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("changed")
    make_tiny_model(root / "model")
    return root


def check(root: Path, name: str, ranks: int, cases: list[Case]) -> None:
    config = write_config(
        root / f"{name}.yaml",
        root / "model",
        root / name,
        steps=3,
        environment=f"{__file__}:Checks",
        data={
            "prompts_per_step": 2,
            "group_size": 2,
            "train": {"source": "-", "max_tokens": 96},
        },
        rewards=[{"function": f"{REWARDS}:by_answer"}],
        sampling={"max_tokens": 6},
        train={"num_minibatches": 2, "epochs": 2},
        evaluation={"held_out": 2, "before": False, "after": False},
    )
    base = root / name
    base.mkdir()
    results = run_ranks(stop_and_change, ranks, str(config), base, cases, timeout_s=600)
    for (case, *_, count), texts in zip(cases, results[0], strict=True):
        assert len(texts) == count, (case, texts)
        check_metrics(base / case, case)


def check_metrics(run_dir: Path, case: str) -> None:
    steps = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3], case
    assert all(line["skipped"] == 0 for line in steps), case


def cases_of(names: list[str], places: list[str], words: list[str]) -> list[Case]:
    found: list[Case] = []
    for name in names:
        changes, unused = CHANGES[name]
        for place in places:
            found.append((f"{name}_{place}", PLACES[place], words, changes, int(place in unused)))
    return found


def test_a_sample_of_changes_within_a_step(root: Path) -> None:
    names = ["nothing", "group_size", "reward", "minibatches"]
    check(root, "sample", 1, cases_of(names, ["updating"], []))


@pytest.mark.full
def test_changes_on_two_ranks(root: Path) -> None:
    cases = cases_of(["prompts"], ["generating"], []) + cases_of(["answers"], ["updating"], [])
    check(root, "two", 2, cases)


@pytest.mark.full
def test_more_changes_on_two_ranks(root: Path) -> None:
    cases = cases_of(["prompts", "answers"], list(PLACES), [])
    check(root, "more_of_two", 2, cases)


@pytest.mark.full
@pytest.mark.parametrize("place", list(PLACES))
def test_every_change_at_every_place(root: Path, place: str) -> None:
    check(root, f"all_{place}", 1, cases_of(list(CHANGES), [place], []))


LAG = ["lag=1", "algorithm.importance_cap=2.0"]


@pytest.mark.parametrize(
    "change", swept(["nothing", "group_size", "grown", "lag"], ["nothing", "group_size", "lag"])
)
def test_samples_drawn_ahead_are_of_what_is_asked_now(root: Path, change: str) -> None:
    """Stopped between two steps, with the next one's samples drawn."""
    changes = ["lag=0"] if change == "lag" else CHANGES[change][0]
    case: Case = (change, f"{AFTER} 0 0", LAG, changes, int(change != "nothing"))
    check(root, f"ahead_{change}", 1, [case])
