"""How much data a step has, from the configuration alone: bounds for plans, numbers for `explain`.

The bounds hold for the shipped flows with their own environments.
"""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.config import Config
from spmdrl.config_sets import held_out_sets, train_sources
from spmdrl.placement import Placement


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """A step's items (prompts with their samples, conversations, pairs), and their tokens at most.

    Args:
        items: of a step.
        item_rows: rows of an item.
        row_tokens: of a row.
        packed_tokens: of an item's rows in a role that computes shared prompts once.
        atom_tokens: of what a microbatch holds even where it exceeds the budget.
    """

    items: int
    item_rows: int
    row_tokens: int
    packed_tokens: int
    atom_tokens: int

    @property
    def rows(self) -> int:
        return self.items * self.item_rows

    def item_tokens(self, *, share_prompts: bool) -> int:
        return self.packed_tokens if share_prompts else self.item_rows * self.row_tokens


def step_sizes(config: Config) -> StepSizes:
    """The sizes of the configured flow's step."""
    data, kind = config.data, config.data_kind()
    longest = max(source.max_tokens for source in train_sources(config))
    if kind == "prompts":
        answer = config.sampling.max_tokens
        answers = data.group_size * answer
        return StepSizes(
            items=data.prompts_per_step,
            item_rows=data.group_size,
            row_tokens=longest + answer,
            packed_tokens=longest + answers,
            # online DPO compares samples, which are then in one microbatch
            atom_tokens=longest + (answers if config.flow == "online_dpo" else answer),
        )
    rows = 2 if kind == "preferences" else 1
    return StepSizes(
        items=data.prompts_per_step,
        item_rows=rows,
        row_tokens=longest,
        packed_tokens=rows * longest,
        atom_tokens=rows * longest,
    )


def microbatch_tokens(config: Config, name: str, placement: Placement, *, update: bool) -> int:
    """The most packed tokens that a replica of the role computes at once.

    Args:
        update: in an update; else where it reads columns.
    """
    train, sizes = config.train_section(name), step_sizes(config)
    budget = max(train.microbatch_tokens, sizes.atom_tokens)
    if config.roles[name].retokenize or (not update and _reads_more(config, name)):
        return budget
    items = -(-sizes.items // train.num_minibatches) if update else sizes.items
    own = -(-items // placement.num_replicas)
    return min(budget, own * sizes.item_tokens(share_prompts=train.share_prompts))


def _reads_more(config: Config, name: str) -> bool:
    """Whether the role reads other rows than those of a step: held-out ones, or a whole data set's
    (of conversations and pairs).
    """
    held_out = held_out_sets(config).values()
    scoring = {reward.role for described in held_out for reward in described.rewards}
    return name in scoring or config.data_kind() != "prompts"
