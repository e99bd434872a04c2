"""How much data a step has, from the configuration alone: bounds for plans, numbers for `explain`.

The bounds hold for the shipped flows with their own environments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from spmdrl.config import Config, TrainSection
from spmdrl.config_sets import held_out_sets, train_sources
from spmdrl.placement import Placement
from spmdrl.training.packing import first_fit
from spmdrl.training.readout import Places


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """A step's items (prompts with their samples, conversations, pairs), and their tokens at most.

    Args:
        items: of a step.
        item_rows: rows of an item.
        prompt_tokens: of a row, those that all rows of the item have.
        row_tokens: of a row, the prompt's too.
        whole: an update never parts the rows of an item, even where they exceed a microbatch.
    """

    items: int
    item_rows: int
    prompt_tokens: int
    row_tokens: int
    whole: bool

    @property
    def rows(self) -> int:
        return self.items * self.item_rows

    def packed_tokens(self, rows: int, *, share_prompts: bool) -> int:
        """Of so many rows of one item."""
        again = rows if not share_prompts else 1
        return again * self.prompt_tokens + rows * (self.row_tokens - self.prompt_tokens)

    def item_tokens(self, *, share_prompts: bool) -> int:
        return self.packed_tokens(self.item_rows, share_prompts=share_prompts)


def step_sizes(config: Config) -> StepSizes:
    """The sizes of the configured flow's step."""
    data, kind = config.data, config.data_kind()
    longest = max(source.max_tokens for source in train_sources(config))
    if kind == "prompts":
        return StepSizes(
            items=data.prompts_per_step,
            item_rows=data.group_size,
            prompt_tokens=longest,
            row_tokens=longest + config.sampling.max_tokens,
            whole=False,
        )
    # of a conversation or a pair, prompt and answer are within max_tokens together
    return StepSizes(
        items=data.prompts_per_step,
        item_rows=2 if kind == "preferences" else 1,
        prompt_tokens=0,
        row_tokens=longest,
        whole=kind == "preferences",
    )


def update_sizes(config: Config) -> StepSizes:
    """What of them an update has."""
    sizes = step_sizes(config)
    if config.flow != "online_dpo":
        return sizes
    compared = 2 if config.preference.pairs == "best_worst" else sizes.item_rows
    return replace(sizes, item_rows=compared, whole=True)


def microbatch_tokens(config: Config, name: str, placement: Placement, *, update: bool) -> int:
    """The most packed tokens that a replica of the role computes at once.

    Args:
        update: in an update; else where it reads columns.
    """
    train = config.train_section(name)
    sizes = update_sizes(config) if update else step_sizes(config)
    atom = sizes.row_tokens
    if update and sizes.whole:
        atom = sizes.item_tokens(share_prompts=train.share_prompts)
    budget = max(train.microbatch_tokens, atom)
    if config.roles[name].retokenize or (not update and _reads_more(config, name)):
        return budget
    items = -(-sizes.items // train.num_minibatches) if update else sizes.items
    own = -(-items // placement.num_replicas)
    return min(budget, own * sizes.item_tokens(share_prompts=train.share_prompts))


@dataclass(frozen=True, kw_only=True)
class MicrobatchCounts:
    """Of the replica that has most.

    Args:
        full: where every row is as long as it may be.
        most: whatever their lengths; short rows may come to be on fewer replicas than long ones.
    """

    full: int
    most: int


def num_microbatches(
    sizes: StepSizes,
    train: TrainSection,
    places: Places,
    *,
    items: int,
    num_replicas: int,
    whole: bool,
) -> MicrobatchCounts:
    """Of one pass over so many items, as `plan_exchange` spreads them and `pack` packs them.

    Args:
        items: of a minibatch, or all that a call reads.
        whole: the rows of an item are never parted.
    """
    budget, share = train.microbatch_tokens, train.share_prompts
    # Graham's bound of what the replica with most has, counted as it is balanced
    tokens = sizes.item_rows * sizes.row_tokens * (items + num_replicas - 1) // num_replicas
    if places == "loss_tokens":  # nothing comes after a row's last token that it would predict
        sizes = replace(sizes, row_tokens=sizes.row_tokens - 1)
    units = [sizes.item_tokens(share_prompts=share)]  # of an item, what is packed as one
    if not whole and (not share or units[0] > budget):
        answer = max(1, sizes.row_tokens - sizes.prompt_tokens)
        room = max(1, (budget - sizes.prompt_tokens) // answer) if share else 1
        full, rest = divmod(sizes.item_rows, room)
        units = [sizes.packed_tokens(n, share_prompts=True) for n in [room] * full + [rest] if n]
    usual = -(-items // num_replicas)
    packed = first_fit(sorted(usual * units, reverse=True), budget)
    # of two microbatches the later one's first unit had no room in the earlier one
    most = min(len(units) * max(1, items - num_replicas + 1), max(1, (2 * tokens - 1) // budget))
    largest = units[0] if len(units) == 1 or not share else budget
    if largest <= budget:
        most = min(most, (tokens - 1) // (budget - largest + 1) + 1)
    return MicrobatchCounts(full=len(packed), most=most)


def _reads_more(config: Config, name: str) -> bool:
    """Whether the role reads other rows than those of a step: held-out ones, or a whole data set's
    (of conversations and pairs).
    """
    held_out = held_out_sets(config).values()
    scoring = {reward.role for described in held_out for reward in described.rewards}
    return name in scoring or config.data_kind() != "prompts"
