"""`spmdrl check`: find out in one process whether a run would start, without starting it.

It refuses what `spmdrl train` refuses before computing: bad keys, roles that do not fit the
ranks, models that cannot be read or do not fit each other, data without enough rows, columns or
room, and environments, trainers and reward functions of the user's own that cannot be used.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from spmdrl.commands.train import checked_flow
from spmdrl.config.doubts import doubts
from spmdrl.config.sections import Config
from spmdrl.observe.progress import TimedLines
from spmdrl.placement import place_roles
from spmdrl.planning.engines import check_installed
from spmdrl.planning.plan import plan_roles
from spmdrl.run.assembly.assembly import open_models
from spmdrl.run.assembly.factories import make_stream
from spmdrl.run.inputs import Inputs, check_models, read_inputs
from spmdrl.run.reward_pools import check_rewards

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration with which a run would start, and the inputs that it would read."""

    config: Config
    inputs: Inputs

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a training item: prompt, conversation or pair (its prompt counts once)."""
        train = self.inputs.train
        return sum(len(ids) for ids in train.ids()) / len(train)

    def describe(self) -> str:
        """Describe in one line the items, how many a step draws, and the held-out sets."""
        data, train = self.config.data, self.inputs.train
        text = (
            f"{len(train)} {self.config.data_kind()} of {self.mean_tokens:.0f} tokens on average, "
            f"data.prompts_per_step={data.prompts_per_step}, steps={self.config.steps}"
        )
        held_out = ", ".join(f"{len(own)} in {name}" for name, own in self.inputs.held_out.items())
        return f"{text}; held out: {held_out or 'nothing'}"


def check(config: Config, num_ranks: int) -> Checked:
    """Read everything but the weights that a run on `num_ranks` ranks of one machine would read.

    Raises:
        ValueError: such a run would refuse the configuration or its inputs.
    """
    checked_flow(config)
    placements = place_roles(config, num_ranks, num_ranks)
    models = {name: model.config for name, model in open_models(config).items()}
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    ranks = ["cuda" if on_cuda else "cpu"] * num_ranks
    specs = plan_roles(config, placements, models, ranks, num_ranks).specs
    for spec in specs.values():
        check_installed(spec)
    inputs = read_inputs(config, config.data_kind(), TimedLines("the data"))
    check_models(config, inputs, specs)
    make_stream(config, inputs)
    check_rewards(config, inputs)
    for doubt in doubts(config):
        log.warning("%s", doubt)
    return Checked(config=config, inputs=inputs)
