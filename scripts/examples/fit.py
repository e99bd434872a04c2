"""Checks every stage of an example, configuration and data, before the first one trains.

What is wrong becomes one line. Sizes are fitted to the file: a stage draws fewer items a step where
the file has few, and on CPUs where they are long, so that the time does not depend on the file.
Standard output has a line for each stage: its name and the keys that differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spmdrl.commands.check import Checked, check
from spmdrl.config.data_sets import HELD_OUT, held_out_sets, rows_read
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import read_config
from spmdrl.observe.log import set_up_logging

CONFIGS = Path(__file__).parents[2] / "configs"
FEWEST = 2
"""Items of a step: losses compare them."""
ITEMS = "data.prompts_per_step"
EVALUATED, FEWEST_EVALUATED = 24_000, 16
"""Approximate tokens of a held-out set that two CPU cores evaluate in half a minute, and the fewest
items: shares of fewer say nothing."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Args:
    config: under configs.
    tokens: approximate tokens of a step on two CPU cores, including samples.
    stand_ins: keys that name models which earlier stages make: MODEL is what they begin with.
    """

    config: str
    tokens: int
    stand_ins: tuple[str, ...] = ()


REWARD = ("roles.reward.model=MODEL", "roles.reward.head=zero")
EXAMPLES = {
    "rlhf": (
        Stage(config="rlhf/sft", tokens=1400),
        Stage(config="rlhf/reward_model", tokens=1600),
        Stage(
            config="rlhf/ppo",
            tokens=1000,
            stand_ins=(
                *("roles.reward.model=MODEL", "roles.reward.head=zero"),
                "roles.value.model=MODEL",
            ),
        ),
    ),
    "dpo": (
        Stage(config="preferences/judge", tokens=1600),
        Stage(config="preferences/dpo", tokens=1600, stand_ins=REWARD),
    ),
    "online_dpo": (
        Stage(config="preferences/judge", tokens=1600),
        Stage(config="preferences/online_dpo", tokens=2400, stand_ins=REWARD),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--judge", help="a reward model that is there")
    parser.add_argument("--judge-words", default="", help="keys of the judge's stage")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the last stage")
    given = parser.parse_intermixed_args()
    set_up_logging(0)
    stages = EXAMPLES[given.example]
    if given.judge:
        stages = (replace(stages[-1], stand_ins=(f"roles.reward.model={given.judge}",)),)
    for stage in stages:
        name = Path(stage.config).name
        words = [f"model.path={given.model}"]
        words += [word.replace("MODEL", given.model) for word in stage.stand_ins]
        own = given.words if stage is stages[-1] else given.judge_words.split()
        try:
            fitted = fit(stage, words, own, given.ranks)
        except (ValueError, OSError) as error:
            print(f"{given.example}.sh: stage {name}: error: {error}", file=sys.stderr)
            return 2
        print(" ".join([name, *fitted]))
    return 0


def fit(stage: Stage, words: Sequence[str], own: Sequence[str], num_ranks: int) -> list[str]:
    """The keys that differ for this file.

    Args:
        words: keys of the example.
        own: the user's, which hold.

    Raises:
        ValueError: the stage could not begin.
    """
    path = CONFIGS / f"{stage.config}.yaml"
    limits = context_limits(load_config(path, [*words, *own]))
    asked = load_config(path, [*words, *limits, *own])
    chosen = any(word.startswith(f"{ITEMS}=") for word in own)
    fewest = max(FEWEST, asked.train.num_minibatches)
    few = [] if chosen else [f"{ITEMS}={min(fewest, asked.data.prompts_per_step)}"]
    checked = check(load_config(path, [*words, *limits, *few, *own]), num_ranks)
    items = asked.data.prompts_per_step
    if not chosen:
        items = min(items, len(checked.inputs.train))
        if not torch.cuda.is_available():
            items = min(items, max(fewest, round(stage.tokens / step_tokens(asked, checked))))
    evaluated = [] if torch.cuda.is_available() else fewer_evaluated(asked, checked)
    print(" ".join([f"{path.stem}: {described(checked, items)}", *evaluated]), file=sys.stderr)
    sized = [] if items == asked.data.prompts_per_step else [f"{ITEMS}={items}"]
    return [*limits, *sized, *evaluated]


def context_limits(config: Config) -> list[str]:
    """Rows are no longer than the context of the model, samples included."""
    context = read_config(config.model.path).max_position
    rooms: dict[str, int] = {}
    for rows in rows_read(config):
        room = context - (rows.longest - rows.data_tokens)
        if 0 < room < rows.data_tokens:
            rooms[rows.data_key] = min(room, rooms.get(rows.data_key, room))
    return [f"{key}.max_tokens={room}" for key, room in rooms.items()]


def step_tokens(config: Config, checked: Checked) -> float:
    """Approximate tokens of an item, including the samples drawn for it."""
    samples = config.data.group_size if config.data_kind() == "prompts" else 0
    return checked.mean_tokens + samples * config.sampling.max_tokens


def fewer_evaluated(config: Config, checked: Checked) -> list[str]:
    """Limits of the held-out sets whose items are long."""
    words = []
    for name, held_out in held_out_sets(config).items():
        items = checked.inputs.held_out[name]
        is_sampled = (held_out.kind or config.data_kind()) == "prompts"
        samples = held_out.num_samples * held_out.sampling.max_tokens if is_sampled else 0
        tokens = sum(map(len, items.ids())) / len(items) + samples
        most = max(FEWEST_EVALUATED, round(EVALUATED / tokens))
        if len(items) > most:
            key = "evaluation" if name == HELD_OUT else f"evaluation.sets.{name}"
            words.append(f"{key}.max_items={most}")
    return words


def described(checked: Checked, items: int) -> str:
    data = checked.config.data.model_copy(update={"prompts_per_step": items})
    config = checked.config.model_copy(update={"data": data})
    return replace(checked, config=config).describe()


if __name__ == "__main__":
    sys.exit(main())
