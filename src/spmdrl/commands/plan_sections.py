"""Sections of `spmdrl plan`: the derivation of each quantity, roles, weights and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from spmdrl.config.data import DataKind
from spmdrl.config.data_sets import held_out_sets, rows_read, train_sources
from spmdrl.config.doubts import doubts
from spmdrl.config.judges import JudgeSection
from spmdrl.config.sections import Config
from spmdrl.config.user_objects import load_object
from spmdrl.placement import DeviceType, fold_text, place_roles, placement_table
from spmdrl.planning.adapter_lines import Line, adapter_lines
from spmdrl.planning.engines import samples_per_replica
from spmdrl.planning.memory import memory_texts, schedules
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.questions import questions_of
from spmdrl.planning.token_bounds import (
    MicrobatchCounts,
    StepSizes,
    num_microbatches,
    step_sizes,
    update_sizes,
)
from spmdrl.role_spec import RoleSpec
from spmdrl.training.readout import Places

ITEMS: Mapping[DataKind, str] = {
    "prompts": "prompts",
    "conversations": "conversations",
    "preferences": "pairs",
}
"""Kind of data -> the items that `data.prompts_per_step` counts."""

SKIPPED = "less what has nothing to learn from"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of what `spmdrl plan` prints.

    Args:
        rows: cells of a table, its head first; none for a section of lines.
        lines: lines of text; after the table, if there is one.
    """

    title: str
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()

    def text(self) -> str:
        return "\n".join([f"# {self.title}", *aligned_rows(self.rows), *self.lines])

    def markdown(self) -> str:
        """The section with its table as Markdown has them, other lines as they are."""
        found = [f"## {self.title}"]
        if self.rows:
            head, *rest = ([cell.replace("|", "\\|") for cell in row] for row in self.rows)
            rows = [head, ["---"] * len(head), *rest]
            found += ["", *(f"| {' | '.join(row)} |" for row in rows)]
        if self.lines:
            found += ["", "```text", *self.lines, "```"]
        return "\n".join(found)


def plan_sections(
    config: Config, plan: RolePlan, world_size: int, node_size: int, *, resolved: bool = False
) -> list[Section]:
    """Sections of a plan without a machine: quantities, roles, weights and memory.

    Args:
        resolved: add the configuration with all its keys, after what is derived from it.
    """
    count = world_size // node_size
    nodes = f"{count} nodes of {node_size}" if node_size < world_size else "1 node"
    lines = _aligned(_derived(config))
    for name, spec in plan.specs.items():
        if own := [*_of_role(config, spec), *adapter_lines(plan, spec)]:
            lines += ["", f"{name}:", *_aligned(own)]
    placements = place_roles(config, world_size, node_size)
    table = placement_table(placements, memory_texts(plan.memory)).split("\n")
    folded = fold_text(config, placements, world_size)
    table = [*([] if folded is None else [folded]), *table]
    found = [
        Section(title=f"derived, on {world_size} ranks ({nodes})", lines=lines),
        Section(title="roles", lines=table),
        Section(title="weights", lines=_weights(plan)),
        Section(title="memory", lines="\n".join(schedules(plan.memory)).split("\n")),
    ]
    if doubted := doubts(config):
        found.append(Section(title="doubtful", lines=doubted))
    if missing := list(_missing(config)):
        found.append(Section(title="not found from here", lines=missing))
    if resolved:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
        found.append(Section(title="resolved configuration", lines=text.rstrip().split("\n")))
    return found


def aligned_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, numbers to the right."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    number = [
        all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows[1:])
        for i in range(len(widths))
    ]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, number, strict=True)
        ).rstrip()
        for row in rows
    ]


def node_size(num_ranks: int, ranks_per_node: int | None) -> int:
    """Number of ranks on each node; None: all are on one. ValueError: nodes would differ."""
    if ranks_per_node is not None and num_ranks % ranks_per_node:
        raise ValueError(
            f"--ranks {num_ranks} with --ranks-per-node {ranks_per_node}: nodes have as many ranks "
            "each"
        )
    return ranks_per_node or num_ranks


def world_device(config: Config) -> DeviceType:
    """Device of the ranks of a run on this host."""
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return "cuda" if on_cuda else "cpu"


def _missing(config: Config) -> Iterator[str]:
    """Objects and files that the configuration names and that do not exist here."""
    objects = {"flow": config.flow, "environment": config.environment, "trainer": config.trainer}
    objects |= {f"rewards.{i}.function": r.function for i, r in enumerate(config.rewards)}
    objects |= {f"roles.{name}.kind": config.role_kind(name) for name in config.roles}
    for key, where in objects.items():
        if where is not None and ":" in where:
            try:
                load_object(where, key)
            except Exception as error:  # the user's file is run, and may raise anything
                yield str(error)
    keys = ("data.train", *(f"data.mix.{i}" for i in range(len(config.data.mix))))
    sources = {k: data.source for k, data in zip(keys, train_sources(config), strict=True)}
    for name, described in held_out_sets(config).items():
        if described.data is not None:
            sources[f"evaluation.sets.{name}.data"] = described.data.source
    for key, source in sources.items():
        if ":" not in source and not Path(source).is_file():
            yield f"{key}.source={source}: there is no file {Path(source).absolute()}"


def _aligned(lines: Iterable[Line]) -> list[str]:
    return [f"{name:<28} {value:>12}   {how}" for name, value, how in lines]


def _derived(config: Config) -> Iterator[Line]:
    """Quantities of a step that do not depend on a role."""
    data, kind, sizes = config.data, config.data_kind(), step_sizes(config)
    item, rows = (
        ITEMS[kind],
        {"prompts": "samples", "preferences": "responses"}.get(kind, ITEMS[kind]),
    )
    own = [key for key in ("flow", "environment", "trainer") if ":" in (getattr(config, key) or "")]
    if own:
        how = f"{', '.join(own)} of your own: they may use other numbers than these"
        yield "data", kind, how
    yield f"{item} per step", f"{sizes.items:,}", "data.prompts_per_step"
    sources = train_sources(config)
    longest = max(range(len(sources)), key=lambda i: sources[i].max_tokens)
    where = "data.train" if longest == 0 else f"data.mix.{longest - 1}"
    row = f"{where}.max_tokens={sources[longest].max_tokens}"
    if kind == "prompts":
        how = f"{sizes.items} prompts x data.group_size={data.group_size}"
        yield "samples per step", f"{sizes.rows:,}", how
        if (refills := config.algorithm.refill_attempts) > 0:
            how = f"where no group has signal: 1 + algorithm.refill_attempts={refills} draws"
            yield "most samples drawn per step", f"{(1 + refills) * sizes.rows:,}", how
        asked = rows_read(config)[0]
        row = f"({asked.data_key}.max_tokens={asked.data_tokens} + {asked.describe_responses()})"
    elif kind == "preferences":
        yield "responses per step", f"{sizes.rows:,}", "a chosen and a rejected one each"
        row += ", prompts included"
    tokens = sizes.rows * sizes.row_tokens
    yield "most tokens per step", f"{tokens:,}", f"{sizes.rows} {rows} x {row}"
    yield f"{item} in all", f"{config.steps * sizes.items:,}", f"steps={config.steps} x these"


def _of_role(config: Config, spec: RoleSpec) -> Iterator[Line]:
    """Quantities of the role's work in a step of a shipped flow."""
    on_prompts = config.data_kind() == "prompts"
    scores = on_prompts and spec.name in {reward.role for reward in config.rewards}
    if spec.trained and not spec.has_engine:
        yield from _updates(config, spec)
    elif spec.kind in ("reference", "teacher") or (spec.kind == "reward" and scores):
        yield _reading(config, spec)
    elif spec.is_judge:
        yield from _questions(config, spec)
    elif spec.is_rollout and on_prompts:
        sizes, replicas = step_sizes(config), spec.placement.num_replicas
        own = -(-sizes.rows // replicas)
        how = f"{sizes.rows} samples on {replicas} replicas, balanced by tokens"
        if sizes.items >= replicas:
            own = -(-sizes.items // replicas) * sizes.item_rows
            how += ", groups whole"
        yield "samples per replica", f"about {own:,}", how
        running = config.rollout.max_running
        how = f"of these at most rollout.max_running={running}"
        yield "decoded together", f"{min(own, running):,}", how


def _questions(config: Config, spec: RoleSpec) -> Iterator[Line]:
    """A judge's questions in a step, and their sizes."""
    asked = questions_of(config, spec.name, spec.model.max_position)
    key = f"roles.{spec.name}.judge"
    if asked.scores:
        yield "responses judged per step", f"{asked.scores:,}", "one question each"
    if asked.pairs:
        how = f"{asked.pairs // 2:,} pairs, each in both orders"
        yield "questions on pairs per step", f"{asked.pairs:,}", how
    most = "max_prompt_tokens" in (spec.section.judge or JudgeSection()).model_fields_set
    how = f"{key}.max_prompt_tokens" if most else "the template's bytes, and the texts in it"
    yield "most tokens of a question", f"{asked.prompt_tokens:,}", how
    yield "most tokens of an answer", f"{asked.answer_tokens:,}", f"{key}.max_tokens"
    running = min(config.rollout.max_running, samples_per_replica(config, spec))
    yield "answered together", f"{running:,}", "at most rollout.max_running, on each replica"


def _reading(config: Config, spec: RoleSpec) -> Line:
    if spec.section.retokenize:
        how = (
            f"roles.{spec.name}.retokenize=true: texts are as long as its own tokenizer makes them"
        )
        return "microbatches per reading", "unknown", how
    # a reward model scores all samples; other roles read only those that updates use
    train, replicas = spec.train, spec.placement.num_replicas
    sizes = (step_sizes if spec.kind == "reward" else update_sizes)(config)
    counts = num_microbatches(
        sizes, train, _places(spec), items=sizes.items, num_replicas=replicas, whole=False
    )
    how = _packed_text(spec, counts)
    return "microbatches per reading", f"{counts.full:,}", how


def _updates(config: Config, spec: RoleSpec) -> Iterator[Line]:
    """Minibatches and microbatches of the role's update over the rows of a step."""
    train, sizes = spec.train, update_sizes(config)
    updates, replicas = train.epochs * train.num_minibatches, spec.placement.num_replicas
    minibatches = spec.key("num_minibatches")
    how = f"{spec.key('epochs')} x {minibatches}"
    yield "optimizer steps per step", f"{updates:,}", how
    warmup, shown = config.value_warmup(spec.name), f"steps={config.steps}"
    shown = f"({shown} - algorithm.value_warmup_steps={warmup})" if warmup else shown
    in_all = config.num_optimizer_steps(spec.name)
    yield "most optimizer steps in all", f"{in_all:,}", f"{shown} x {updates}, {SKIPPED}"
    most, left = -(-sizes.items // train.num_minibatches), sizes.items % train.num_minibatches
    size = f"{most - 1:,} or {most:,}" if left else f"{most:,}"
    how = f"data.prompts_per_step={sizes.items} / {minibatches}"
    yield f"{ITEMS[config.data_kind()]} per minibatch", size, how
    tokens = most * sizes.item_tokens(share_prompts=train.share_prompts)
    yield "most tokens per minibatch", f"{tokens:,}", _tokens_text(config, spec, sizes, most)
    counts = num_microbatches(
        sizes, train, _places(spec), items=most, num_replicas=replicas, whole=sizes.whole
    )
    how = _packed_text(spec, counts)
    yield "microbatches per minibatch", f"{counts.full:,}", how


def _tokens_text(config: Config, spec: RoleSpec, sizes: StepSizes, items: int) -> str:
    """Derivation of the number of tokens of so many items."""
    tokens, prompt = sizes.row_tokens - sizes.prompt_tokens, sizes.prompt_tokens
    kind, share = config.data_kind(), spec.train.share_prompts
    if kind == "conversations":
        return f"{items} x {tokens}"
    if kind == "preferences":
        once = f", less where {spec.key('share_prompts')} computes a prompt once"
        return f"{items} x {sizes.item_rows} x {tokens}" + once * share
    each = f"{prompt} + {sizes.item_rows} x {tokens}"
    if not share:
        each = f"{sizes.item_rows} x ({prompt} + {tokens})"
    return f"{items} x ({each}), {spec.key('share_prompts')}"


def _places(spec: RoleSpec) -> Places:
    return "rows" if spec.kind == "reward" else "loss_tokens"


def _packed_text(spec: RoleSpec, counts: MicrobatchCounts) -> str:
    return (
        f"on each of {spec.placement.num_replicas} replicas, {spec.key('microbatch_tokens')}, all "
        f"rows of full length; never more than {counts.most:,}"
    )


def _weights(plan: RolePlan) -> list[str]:
    """Dtype and device of each role; the tensors that a rollout shares, copies and gathers."""
    specs = plan.specs.values()
    lines = []
    for device, dtype in dict.fromkeys((spec.device_type, spec.dtype) for spec in specs):
        names = [spec.name for spec in specs if spec.device_type == device]
        lines.append(f"{dtype} on {device}: {', '.join(names)}")
    policy = next((spec.name for spec in specs if spec.kind == "policy"), None)
    for spec in (s for s in specs if s.has_engine):
        if spec.base is not None:
            lines.append(f"{spec.name}: computes with the base of {spec.base}")
            continue
        if spec.name not in plan.syncs:
            lines.append(f"{spec.name}: read from {spec.path}")
            continue
        sync = plan.syncs[spec.name]
        lines.append(f"{policy} -> {spec.name}: {sync.describe()}")
        lines += [f"  {line}" for line in sync.tensor_lines(plan.layouts[spec.name])]
    return lines
