"""A checkpoint knows its data: what a run that goes on with others is told, and what it draws."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from flow_cases import write_config
from harness import run_ranks
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.data.order import MixedStream, PromptStream
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.data_identity import data_identity
from spmdrl.run.inputs import read_inputs
from spmdrl.world import World
from tiny_model import CHAT_TEMPLATE, make_tiny_model

STEPS = 2


def rows(count, start=0, word="What is"):
    return "".join(
        json.dumps({"question": f"{word} {i} + {i}?", "answer": str(2 * i)}) + "\n"
        for i in range(start, start + count)
    )


def set_template(model: Path, template: str) -> None:
    file = model / "tokenizer_config.json"
    content = json.loads(file.read_text()) | {"chat_template": template}
    file.write_text(json.dumps(content))


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def begin(root: Path, **sections: Any) -> Path:
    make_tiny_model(root / "model")
    (root / "a.jsonl").write_text(rows(24))
    (root / "held.jsonl").write_text(rows(4, 100))
    return write_config(
        root / "c.yaml",
        root / "model",
        root / "run",
        steps=STEPS,
        data={
            "prompts_per_step": 4,
            "group_size": 2,
            "train": {"source": str(root / "a.jsonl"), "max_tokens": 96},
        },
        sampling={"max_tokens": 4},
        evaluation={"sets": {"own": {"data": {"source": str(root / "held.jsonl")}}}},
        checkpoint={"every": 1},
        **sections,
    )


CHANGES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "nothing": ([], ()),
    "grown": (
        [],
        ("a.jsonl) had 24 rows and has 36", "of the 28 prompts left in this pass come again"),
    ),
    "edited": (
        [],
        ("a.jsonl) holds other rows: it had 24 and has 24", "come again is not known"),
    ),
    "fewer_a_step": (
        ["data.prompts_per_step=2"],
        ("data.prompts_per_step: 4 of the 20 prompts left in this pass come again",),
    ),
    "more_a_step": (["data.prompts_per_step=8"], ("8 are passed over",)),
    "mixed": (
        ["data.mix=[{source: b.jsonl}]"],
        ("prompts left in this pass come again",),
    ),
    "template": ([], ("the chat template is another than the checkpoint's",)),
    "held_out": ([], ("the held-out set 'own' holds other rows",)),
    "old_noise": ([], ("version 1 of the noise",)),
}


def change(root: Path, name: str) -> None:
    if name == "grown":
        (root / "a.jsonl").write_text(rows(36))
    elif name == "edited":
        (root / "a.jsonl").write_text(rows(24, word="How much is"))
    elif name == "template":
        set_template(root / "model", CHAT_TEMPLATE + " ")
    elif name == "held_out":
        (root / "held.jsonl").write_text(rows(5, 100))
    elif name == "old_noise":
        checkpoint = root / "run" / "checkpoints" / f"step_{STEPS:08d}" / "checkpoint.json"
        content = json.loads(checkpoint.read_text())
        del content["state"]["noise"]
        checkpoint.write_text(json.dumps(content))
    (root / "b.jsonl").write_text(rows(24, 200))


def resumes(world: World, root: Path) -> dict[str, list[str]]:
    """A run, then a second start of a copy of it after each change: what that says."""
    found = {}
    whole = root / "whole"
    with start_reward_server() as server:
        train(load_config(str(whole / "c.yaml"), []), world, server)
        for name, (overrides, _) in CHANGES.items():
            copy = root / name
            if world.is_first:
                shutil.copytree(whole, copy)
                change(copy, name)
                text = (whole / "c.yaml").read_text().replace(str(whole), str(copy))
                (copy / "c.yaml").write_text(text)
            world.store.set(f"ready {name}", "") if world.is_first else None
            world.store.wait([f"ready {name}"])
            heard = Heard()
            logging.getLogger("spmdrl").addHandler(heard)
            words = [word.replace("b.jsonl", str(copy / "b.jsonl")) for word in overrides]
            train(load_config(str(copy / "c.yaml"), ["steps=3", *words]), world, server)
            logging.getLogger("spmdrl").removeHandler(heard)
            found[name] = [
                line
                for line in heard.lines
                if line.startswith("WARNING")
                and "other values" not in line
                and "docs/detectors.md" not in line
            ]
            steps = [r["step"] for r in read_metrics(copy / "run/metrics.jsonl") if "samples" in r]
            assert steps == [1, 2, 3], (name, steps)
    return found


def test_a_resume_says_what_is_other_about_its_data(tmp_path):
    """A public report: the file grew between two starts, and prompts came again in silence."""
    (tmp_path / "whole").mkdir()
    begin(tmp_path / "whole")
    answers = run_ranks(resumes, 2, tmp_path, timeout_s=400)
    for name, (_, expected) in CHANGES.items():
        said = "\n".join(answers[0][name])
        for part in expected:
            assert part in said, (name, said)
        assert ("other data" in said) == (name not in ("nothing", "old_noise")), (name, said)
    assert answers[0]["nothing"] == []


DATED = "Today: {{ strftime_now('%d %b %Y %H:%M:%S') }}. " + CHAT_TEMPLATE


def dated(world: World, root: Path) -> list[list[int]]:
    """The first prompt's tokens after two starts, ranks in unlike time zones, the second after a
    while; and in a run that starts afresh.
    """
    import time

    from spmdrl.run.data_identity import first_start

    found = []
    with start_reward_server() as server:
        for number, words in enumerate((["steps=1"], ["steps=2"], ["checkpoint.resume=false"])):
            zone = world.rank + 5 * number
            os.environ["TZ"] = f"Etc/GMT+{zone}"
            time.tzset()
            config = load_config(str(root / "c.yaml"), words)
            if number < 2:
                train(config, world, server)
            inputs = read_inputs(
                config, clock=lambda c=config: first_start(c, root / "run" / "checkpoints")
            )
            found.append(list(inputs.train[0].tokens))
    return found


@pytest.mark.full
def test_a_date_in_the_prompts_is_that_of_the_first_start(tmp_path):
    """A public report: prompts changed over midnight, and with the time zone of a node."""
    begin(tmp_path)
    set_template(tmp_path / "model", DATED)
    answers = run_ranks(dated, 2, tmp_path, timeout_s=300)
    tokenizer = load_tokenizer(tmp_path / "model")
    (one, two, afresh), (other_one, other_two, other_afresh) = answers
    text = tokenizer.decode(one, skip_special_tokens=True)
    assert text.startswith("Today: ") and "What is" in text
    assert one == other_one == two == other_two
    assert afresh == other_afresh != one


def misread(world: World, root: Path) -> str:
    config = load_config(
        str(root / "c.yaml"), [f"data.train.source={root / f'{world.rank}.jsonl'}"]
    )
    with pytest.raises(ValueError, match="all ranks must see the same files") as raised:
        data_identity(config, read_inputs(config))
    return str(raised.value)


def test_ranks_that_read_different_files_are_told_so(tmp_path):
    begin(tmp_path)
    (tmp_path / "0.jsonl").write_text(rows(24))
    (tmp_path / "1.jsonl").write_text(rows(23) + rows(1, 30))
    for message in run_ranks(misread, 2, tmp_path):
        assert message.startswith("rank 1 has read another train than rank 0")


@pytest.mark.parametrize("step", range(14))
def test_what_a_pass_gave_and_gives(step):
    plain = PromptStream(seed=1, num_prompts=23, prompts_per_step=4)
    mixed = MixedStream(seed=1, sizes=(13, 8), weights=(2.0, 1.0), prompts_per_step=4)
    for stream, count in ((plain, 20), (mixed, 21)):
        passed, following = stream.passed(step), stream.following(step)
        assert len({*passed, *following}) == len(passed) + len(following) == count
        assert set(stream.indices(step)) & set(following)
    first = step - step % plain.steps_per_epoch
    assert plain.passed(step) == [i for s in range(first, step) for i in plain.indices(s)]
    assert plain.following(step)[:4] == plain.indices(step)
    again = [i for s in range(step) for i in mixed.indices(s) if i < 13]
    assert [i for i in mixed.passed(step) if i < 13] == again[len(again) // 13 * 13 :]
