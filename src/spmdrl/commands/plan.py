"""`spmdrl plan`: what a run will need and how long it will take, before it is queued.

Without `--gpu`: quantities, roles, weights and memory on any number of ranks. With it, also the
seconds, energy and cost of a step on such GPUs, from shapes alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spmdrl.commands.local_models import with_local_models
from spmdrl.commands.plan_sections import Section, node_size, plan_sections, world_device
from spmdrl.commands.plan_tables import (
    lack_section,
    machine_section,
    memory_section,
    seconds_section,
    step_section,
)
from spmdrl.commands.plan_words import DEFAULT_NODE
from spmdrl.config.load import config_reader, load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.placement import DeviceType
from spmdrl.planning.forecast.forecast import full_lengths
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.planning.forecast.step import Lengths
from spmdrl.planning.from_shapes import plan_from_shapes, read_models
from spmdrl.planning.host_memory import host_memory
from spmdrl.planning.nearest import Change, lacking_bytes, nearest_changes
from spmdrl.planning.outlook import Outlook, as_json, make_outlook
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.suggest.suggest import suggest, suggestion_lines, trial_json

NEEDS_GPU = (
    *("nodes", "gpus_per_node", "network_gb_s", "price_per_gpu_hour", "json"),
    *("prompt_tokens", "response_tokens", "suggest"),
)
"""Options that mean nothing without a machine."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Ranks that a plan is for.

    Args:
        machine: None: ranks of this host's kind of device.
    """

    size: int
    node_size: int
    device_type: DeviceType
    machine: Machine | None = None

    def scaled(self, nodes: int) -> World:
        """The same nodes, so many times as many."""
        if nodes == 1:
            return self
        machine = self.machine
        if machine is not None:
            machine = Machine(**{**vars(machine), "num_nodes": machine.num_nodes * nodes})
        return World(
            size=self.size * nodes,
            node_size=self.node_size,
            device_type=self.device_type,
            machine=machine,
        )

    def plan(
        self,
        config: Config,
        models: Mapping[str, ModelConfig] | None = None,
        *,
        refuses: bool = False,
    ) -> RolePlan:
        """Plan the roles on these ranks."""
        size = None if self.machine is None else self.machine.device.memory_bytes
        return plan_from_shapes(
            config,
            self.size,
            self.node_size,
            device_type=self.device_type,
            device_bytes=size,
            models=models,
            refuses=refuses,
        )


def plan_text(
    config: Config, world_size: int, ranks_per_node: int | None = None, *, resolved: bool = False
) -> str:
    """The text that `spmdrl plan CONFIG --ranks N` prints of what fits.

    Args:
        ranks_per_node: number of ranks on each node; None: all are on one node.
        resolved: add the configuration with all its keys, after what is derived from it.

    Raises:
        ValueError: roles that do not fit the world or its devices, or a model that cannot be read.
    """
    size = node_size(world_size, ranks_per_node)
    world = World(size=world_size, node_size=size, device_type=world_device(config))
    plan = world.plan(config, refuses=True)
    return _text(plan_sections(config, plan, world_size, size, resolved=resolved))


def run_plan(options: argparse.Namespace) -> bool:
    """Print a plan; return whether it fits.

    Raises:
        ValueError: the configuration, its models, the machine or the options are refused.
    """
    overrides = [*options.overrides, *["fold=true"] * options.fold]
    if options.model is not None:
        overrides.append(f"model.path={options.model}")
    config = with_local_models(load_config(options.config, overrides), download=False)
    world = _world(config, options)
    models = read_models(config)
    if options.suggest:
        return _suggest(config, world, options, overrides)
    plan = world.plan(config, models)
    fits = all(own.plan.fits for own in plan.memory.values())
    outlook = None
    if world.machine is not None:
        lengths = _lengths(config, options.prompt_tokens, options.response_tokens)
        price = options.price_per_gpu_hour
        outlook = make_outlook(config, plan, world.machine, lengths, price)
        fits = outlook.fits
    changes: list[str] = []
    if not fits:
        changes = _changes(config, plan, world, options.config, overrides)
    if options.json:
        assert outlook is not None  # _world refuses --json without a machine
        found = as_json(outlook) | ({} if fits else {"changes": changes})
        print(json.dumps(found, indent=1), flush=True)
        return fits
    sections = plan_sections(config, plan, world.size, world.node_size, resolved=options.resolved)
    sections += _machine_sections(plan, outlook)
    if not fits:
        sections.append(lack_section(plan, _host_lack(outlook), changes))
    text = _text(sections)
    if options.markdown:
        text = "\n\n".join(section.markdown() for section in sections)
    print(text, flush=True)
    return fits


def _suggest(
    config: Config, world: World, options: argparse.Namespace, overrides: Sequence[str]
) -> bool:
    """Print the fastest layouts that fit; return whether there is one."""
    machine = world.machine
    assert machine is not None  # _world refuses --suggest without one
    lengths = _lengths(config, options.prompt_tokens, options.response_tokens)

    read = config_reader(options.config)

    def configure(words: Sequence[str]) -> Config:
        return with_local_models(read([*overrides, *words]), download=False)

    models = read_models(config)
    found = suggest(configure, models, machine, lengths)
    if options.json:
        print(
            json.dumps([trial_json(trial, machine) for trial in found.fitting[:3]], indent=1),
            flush=True,
        )
    else:
        print("\n".join(suggestion_lines(found, machine)), flush=True)
    return bool(found.fitting)


def _text(sections: Sequence[Section]) -> str:
    return "\n\n".join(section.text() for section in sections)


def _world(config: Config, options: argparse.Namespace) -> World:
    if options.gpu is None:
        for name in NEEDS_GPU:
            if vars(options)[name]:
                raise ValueError(f"--{name.replace('_', '-')} is of no use without --gpu")
        size = node_size(options.ranks or 1, options.ranks_per_node)
        return World(size=options.ranks or 1, node_size=size, device_type=world_device(config))
    nodes, ranks, per_node = options.nodes, options.ranks, options.gpus_per_node
    for name, count in (("--nodes", nodes), ("--gpus-per-node", per_node), ("--ranks", ranks)):
        if count is not None and count < 1:
            raise ValueError(f"{name} {count}: give at least 1")
    per_node = per_node or options.ranks_per_node
    if ranks is not None:
        per_node = per_node or min(ranks, DEFAULT_NODE)
        if ranks != (nodes or ranks // per_node) * per_node:
            raise ValueError(
                f"--ranks {ranks} with {per_node} GPUs per node"
                + ("" if nodes is None else f" and --nodes {nodes}")
                + ": these are not as many ranks"
            )
        nodes = ranks // per_node
    machine = load_machine(
        options.gpu,
        num_nodes=nodes or 1,
        devices_per_node=per_node or DEFAULT_NODE,
        network_gb_s=options.network_gb_s,
    )
    return World(
        size=machine.num_ranks,
        node_size=machine.devices_per_node,
        device_type=machine.device.kind,
        machine=machine,
    )


def _lengths(config: Config, prompt: float | None, response: float | None) -> Lengths:
    """Mean tokens of rows as given, else the most; some response is as long as it may be."""
    full = full_lengths(config)
    for name, value, most in (
        ("--prompt-tokens", prompt, full.prompt),
        ("--response-tokens", response, full.response),
    ):
        if value is not None and not 0 < value <= most:
            raise ValueError(f"{name} {value:g}: the configuration allows up to {most:g}")
    return Lengths(
        prompt=full.prompt if prompt is None else prompt,
        response=full.response if response is None else response,
        longest=full.longest,
    )


def _machine_sections(plan: RolePlan, outlook: Outlook | None) -> list[Section]:
    if outlook is None:
        return []
    found = [machine_section(outlook), memory_section(plan)]
    if outlook.forecast is not None:
        found.append(seconds_section(outlook))
    return [*found, step_section(outlook)]


def _host_lack(outlook: Outlook | None) -> str | None:
    if outlook is None or outlook.host.total <= outlook.machine.host_bytes:
        return None
    total, most = outlook.host.total / 1e9, outlook.machine.host_bytes / 1e9
    return f"hosts: a node needs {total:,.0f} GB, its host has {most:,.0f} GB"


def _changes(
    config: Config, plan: RolePlan, world: World, path: str, overrides: Sequence[str]
) -> list[str]:
    def lack(change: Change) -> int | None:
        try:
            changed = load_config(path, [*overrides, *change.words])
            changed = with_local_models(changed, download=False)
            scaled = world.scaled(change.nodes)
            made = scaled.plan(changed, read_models(changed))
        except ValueError:
            return None
        size = lacking_bytes(made)
        if scaled.machine is not None:
            host = host_memory(changed, made, scaled.size, scaled.node_size)
            size += max(0, host.total - scaled.machine.host_bytes)
        return size

    nodes = 1 if world.machine is None else world.machine.num_nodes
    found = nearest_changes(config, plan, world.node_size, lack)
    return [change.describe(nodes) for change in found]
