"""`spmdrl check`: find out in one process whether a run would start, without starting it.

It refuses what `spmdrl train` refuses before computing: bad keys, roles that do not fit the
ranks, models that cannot be read or do not fit each other, data without enough rows, columns or
room, and environments of turns, trainers and reward functions of the user's own that cannot be
used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

from spmdrl.atomic_files import finite_json
from spmdrl.commands.plan_sections import node_size
from spmdrl.commands.train import checked_flow
from spmdrl.config.doubts import doubts
from spmdrl.config.faults import Fault, collect
from spmdrl.config.sections import Config
from spmdrl.data.load_report import ROWS_READ
from spmdrl.observe.log import TimedLines
from spmdrl.placement import fold_text, place_roles
from spmdrl.planning.engines import check_installed
from spmdrl.planning.plan import plan_roles
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembly.assembly import open_models
from spmdrl.run.assembly.factories import make_stream
from spmdrl.run.assembly.role_weights import adapter_notes
from spmdrl.run.inputs import Inputs, check_models, read_inputs
from spmdrl.run.reward_pools import check_rewards
from spmdrl.run.turns import check_environments

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

    def lines(self) -> Iterator[str]:
        """Yield a line of JSON with the size of the training data, and of each held-out set."""
        items, tokens = len(self.inputs.train), round(self.mean_tokens, 1)
        yield finite_json({"key": "data", "items": items, "mean_tokens": tokens})
        for name, own in self.inputs.held_out.items():
            yield finite_json({"key": f"evaluation.sets.{name}", "items": len(own)})


def check(config: Config, num_ranks: int, ranks_per_node: int | None = None) -> Checked:
    """Read everything but the weights that a run on `num_ranks` ranks would read.

    Args:
        ranks_per_node: number of ranks on each node; None: all are on one node.

    Raises:
        ConfigError: such a run would refuse the configuration or its inputs; it has all faults.
    """
    specs: dict[str, RoleSpec] = {}
    found: list[Checked] = []

    def plan() -> None:
        specs.update(check_plan(config, num_ranks, ranks_per_node))

    def data() -> None:
        found.append(check_inputs(config, specs))

    collect((partial(checked_flow, config), plan, data))
    return found[0]


def check_without_data(config: Config, num_ranks: int, ranks_per_node: int | None = None) -> None:
    """Check as `check` does, but read no data."""
    plan = partial(check_plan, config, num_ranks, ranks_per_node)
    collect((partial(checked_flow, config), plan))


def check_plan(
    config: Config, num_ranks: int, ranks_per_node: int | None = None
) -> Mapping[str, RoleSpec]:
    """Check roles, their models' shapes and the plan on these ranks; return the roles with models.

    Raises:
        ValueError: roles or models do not fit the ranks, the devices or each other.
    """
    size = node_size(num_ranks, ranks_per_node)
    placements = place_roles(config, num_ranks, size)
    models = {name: opened.model for name, opened in open_models(config).items()}
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    ranks = ["cuda" if on_cuda else "cpu"] * num_ranks
    specs = plan_roles(config, placements, models, ranks, size).specs
    for spec in specs.values():
        check_installed(spec)
    if folded := fold_text(config, placements, num_ranks):
        log.info("%s", folded)
    for doubt in (*doubts(config), *adapter_notes(specs.values())):
        log.warning("%s", doubt)
    return specs


def check_inputs(config: Config, specs: Mapping[str, RoleSpec]) -> Checked:
    """Read all data, and check that models can use them. ValueError: they cannot.

    Args:
        specs: roles with models; none: only the data are checked.
    """
    inputs = read_inputs(config, config.data_kind(), TimedLines("the data"))
    check_models(config, inputs, specs)
    make_stream(config, inputs)
    check_rewards(config, inputs)
    check_environments(config, inputs)
    return Checked(config=config, inputs=inputs)


def fault_line(fault: Fault) -> str:
    """A fault as one line of JSON: key, value, message, fix."""
    return finite_json(asdict(fault))


@contextmanager
def sources_read() -> Iterator[list[str]]:
    """Yield a list that grows by a line of JSON for each data source that is read inside: the
    section's key, and its counts.
    """
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if ROWS_READ in vars(record):
                found.append(finite_json(vars(record)[ROWS_READ]))

    listener, logger = Listener(), logging.getLogger("spmdrl")
    logger.addHandler(listener)
    try:
        yield found
    finally:
        logger.removeHandler(listener)
