"""Commands that read a configuration and run nothing: check, explain, keys, configs, migrate,
schema.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spmdrl.commands.check import Checked
    from spmdrl.config.sections import Config

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""Adds a command: its name, its function and what it does."""


def add_config_commands(add: Add) -> None:
    """Add the commands, with their words."""
    command = add("check", check, "Say whether a run would start, without starting it; 2 if not.")
    add_config(command)
    add_ranks(command)
    command.add_argument("--data", action="store_true", help="read the data as well")
    command.add_argument("--json", action="store_true", help="print a line of JSON for each fault")
    command = add("explain", explain, "Print how quantities come about, and the plan.")
    add_config(command)
    add_ranks(command)
    command.add_argument("--resolved", action="store_true", help="print the configuration as well")
    command = add("keys", keys, "Print the configuration's keys as Markdown tables.")
    command.add_argument("--group", help="of keys: a section, `run` or `placement`; default: all")
    command.add_argument("--basic", action="store_true", help="leave out advanced keys")
    command = add("configs", configs, "List the shipped configurations, or print one of them.")
    command.add_argument("config_name", nargs="?", metavar="NAME", help="one of those listed")
    command = add("migrate", migrate, "Rename the keys in a file that have another name now.")
    command.add_argument("config", help="a YAML file; those that it includes are read as well")
    add("schema", schema, "Print a JSON Schema of configuration files, for editors.")


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the words that name a configuration."""
    command.add_argument("config", help="a YAML file, or a shipped configuration by name")
    command.add_argument("overrides", nargs="*", metavar="key=value")


def add_ranks(command: argparse.ArgumentParser) -> None:
    """Add the words that give the size of a world."""
    command.add_argument("--ranks", type=int, default=1, help="number of ranks of the run")
    command.add_argument("--ranks-per-node", type=int, help="default: all on one node")


def load(options: argparse.Namespace) -> Config:
    """Load the configuration that a command names, with its overrides."""
    from spmdrl.config.load import load_config

    trains = options.name in ("train", "explain", "check")
    return load_config(options.config, options.overrides, trains=trains)


def check(options: argparse.Namespace) -> None:
    from spmdrl.commands.check import fault_line, sources_read
    from spmdrl.config.faults import faults_of
    from spmdrl.observe.log import set_up_logging

    set_up_logging(0)
    if not options.json:
        checked = _checked(options)
        text = "nothing is refused; --data reads the data as well"
        print(text if checked is None else checked.describe(), flush=True)
        return
    faults: list[str] = []
    with sources_read() as lines:
        try:
            if (checked := _checked(options)) is not None:
                lines += checked.lines()
        except (ValueError, OSError) as error:
            faults += map(fault_line, faults_of(error))
    print("".join(f"{line}\n" for line in (*lines, *faults)), end="", flush=True)
    if faults:
        raise SystemExit(2)


def _checked(options: argparse.Namespace) -> Checked | None:
    """Check a configuration, and its data if that is asked for; None: it is not."""
    from spmdrl.commands.check import check, check_without_data

    config, ranks = load(options), (options.ranks, options.ranks_per_node)
    if options.data:
        return check(config, *ranks)
    check_without_data(config, *ranks)
    return None


def explain(options: argparse.Namespace) -> None:
    from spmdrl.commands.explain import explain

    ranks = options.ranks, options.ranks_per_node
    print(explain(load(options), *ranks, resolved=options.resolved))


def keys(options: argparse.Namespace) -> None:
    from spmdrl.config.key_table import key_table

    print(key_table(options.group, basic=options.basic))


def configs(options: argparse.Namespace) -> None:
    from spmdrl.config.load import list_configs, shipped_text

    named = options.config_name
    print(list_configs() if named is None else shipped_text(named), flush=True)


def migrate(options: argparse.Namespace) -> None:
    from spmdrl.commands.migrate import migrate

    changes = list(migrate(Path(options.config)))
    print("\n".join(changes) or f"{options.config}: no key has another name now")


def schema(options: argparse.Namespace) -> None:
    import json

    from spmdrl.config.schema import config_schema

    print(json.dumps(config_schema(), indent=1))
