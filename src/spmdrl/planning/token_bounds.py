"""Amount of data in a step, from the configuration: bounds for plans, numbers for `plan`.

The bounds hold for the shipped flows with their own environments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from spmdrl.config.data_sets import held_out_sets, longest_prompt, response_tokens
from spmdrl.config.sections import Config
from spmdrl.config.training import TrainSection
from spmdrl.role_spec import RoleSpec
from spmdrl.training.packing import first_fit
from spmdrl.training.readout import Places


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """A step's items (prompts with samples, conversations or pairs), and bounds of their tokens.

    Args:
        items: number of items in a step.
        item_rows: number of rows in an item.
        prompt_tokens: tokens of a row that all rows of the item have in common.
        row_tokens: tokens of a row, including the prompt's.
        whole: an update never separates the rows of an item, even if they exceed a microbatch.
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
        """Packed tokens of `rows` rows of one item."""
        again = rows if not share_prompts else 1
        return again * self.prompt_tokens + rows * (self.row_tokens - self.prompt_tokens)

    def item_tokens(self, *, share_prompts: bool) -> int:
        return self.packed_tokens(self.item_rows, share_prompts=share_prompts)


def step_sizes(config: Config) -> StepSizes:
    """The sizes of the configured flow's step."""
    data, kind = config.data, config.data_kind()
    longest = longest_prompt(config)
    if kind == "prompts":
        return StepSizes(
            items=data.prompts_per_step,
            item_rows=data.group_size,
            prompt_tokens=longest,
            row_tokens=longest + response_tokens(config),
            whole=False,
        )
    # prompt and response of a conversation or a pair are within max_tokens together
    return StepSizes(
        items=data.prompts_per_step,
        item_rows=2 if kind == "preferences" else 1,
        prompt_tokens=0,
        row_tokens=longest,
        whole=kind == "preferences",
    )


def update_sizes(config: Config) -> StepSizes:
    """The sizes of the part of a step that an update uses."""
    sizes = step_sizes(config)
    if not config.flow_row.pairs_samples:
        return sizes
    compared = 2 if config.preference.pairs == "best_worst" else sizes.item_rows
    return replace(sizes, item_rows=compared, whole=True)


def microbatch_tokens(config: Config, spec: RoleSpec, *, update: bool) -> int:
    """The most packed tokens that a replica of the role computes at once.

    Args:
        update: whether for an update; else for reading columns.
    """
    train = spec.train
    sizes = update_sizes(config) if update else step_sizes(config)
    atom = sizes.row_tokens
    if update and sizes.whole:
        atom = sizes.item_tokens(share_prompts=train.share_prompts)
    budget = max(train.microbatch_tokens, atom)
    if spec.section.retokenize or (not update and _reads_more(config, spec)):
        return budget
    items = -(-sizes.items // train.num_minibatches) if update else sizes.items
    own = -(-items // spec.placement.num_replicas)
    return min(budget, own * sizes.item_tokens(share_prompts=train.share_prompts))


@dataclass(frozen=True, kw_only=True)
class MicrobatchCounts:
    """Microbatch counts of the most heavily loaded replica.

    Args:
        full: count if every row has its maximal length.
        most: bound for any lengths; short rows may end up on fewer replicas than long ones.
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
    """Microbatches of one pass over the items, as `plan_exchange` assigns and `pack` packs them.

    Args:
        items: number of items in a minibatch, or of all that a call reads.
        whole: the rows of an item are never separated.
    """
    budget, share = train.microbatch_tokens, train.share_prompts
    # Graham's bound on the tokens of the replica with most, in the measure that is balanced
    tokens = sizes.item_rows * sizes.row_tokens * (items + num_replicas - 1) // num_replicas
    if places == "loss_tokens":  # a row's last token predicts nothing
        sizes = replace(sizes, row_tokens=sizes.row_tokens - 1)
    units = [sizes.item_tokens(share_prompts=share)]  # parts of an item that are packed as one
    if not whole and (not share or units[0] > budget):
        response = max(1, sizes.row_tokens - sizes.prompt_tokens)
        room = max(1, (budget - sizes.prompt_tokens) // response) if share else 1
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


def _reads_more(config: Config, spec: RoleSpec) -> bool:
    """Whether the role also reads held-out rows, or a whole set of conversations or pairs."""
    held_out = held_out_sets(config).values()
    scoring = {reward.role for described in held_out for reward in described.rewards}
    return spec.name in scoring or config.data_kind() != "prompts"
