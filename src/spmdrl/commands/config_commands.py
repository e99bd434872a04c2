"""Commands that read a configuration and start no run: check, check-collectives, plan, keys,
backends, configs, migrate, schema.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmdrl.commands.plan_words import add_plan_words

if TYPE_CHECKING:
    from spmdrl.commands.check import Checked
    from spmdrl.config.sections import Config

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""Adds a command: its name, its function and what it does."""


DOWNLOADING = ("train", "eval", "generate", "export")
"""Commands that need models' files."""


def add_config_commands(add: Add) -> None:
    """Add the commands, with their words."""
    command = add("check", check, "Say whether a run would start, without starting it; 2 if not.")
    add_config(command)
    add_ranks(command)
    command.add_argument("--data", action="store_true", help="read the data as well")
    command.add_argument("--json", action="store_true", help="print a line of JSON for each fault")
    command = add(
        "check-collectives",
        check_collectives,
        "Run the start and two small steps of all ranks here, and compare their collectives; 2 if "
        "ranks part.",
    )
    add_config(command)
    add_ranks(command)
    texts = {
        "plan": "Print how quantities come about, and the plan; with --gpu also its seconds.",
        "explain": "The former name of plan.",
    }
    for name, text in texts.items():
        command = add(name, plan, text)
        add_config(command, needed=False)
        add_ranks(command, default=None)
        add_plan_words(command)
    command = add("keys", keys, "Print the configuration's keys as Markdown tables.")
    command.add_argument("--group", help="of keys: a section, `run` or `placement`; default: all")
    command.add_argument("--basic", action="store_true", help="leave out advanced keys")
    add("backends", backends, "Print what each train backend and engine takes, as Markdown tables.")
    command = add("configs", configs, "List the shipped configurations, or print one of them.")
    command.add_argument("config_name", nargs="?", metavar="NAME", help="one of those listed")
    command = add("migrate", migrate, "Rename the keys in a file that have another name now.")
    command.add_argument("config", help="a YAML file; those that it includes are read as well")
    add("schema", schema, "Print a JSON Schema of configuration files, for editors.")


def add_config(command: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """Add the words that name a configuration; without `needed` it may be left out."""
    count: dict[str, Any] = {} if needed else {"nargs": "?"}
    command.add_argument(
        "config",
        help="a YAML file, a shipped configuration by name, or the directory of a run",
        **count,
    )
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument(
        "--fold", action="store_true", help="run on the ranks that there are: fold=true"
    )


def add_ranks(command: argparse.ArgumentParser, default: int | None = 1) -> None:
    """Add the words that give the size of a world."""
    command.add_argument("--ranks", type=int, default=default, help="number of ranks of the run")
    command.add_argument("--ranks-per-node", type=int, help="default: all on one node")


def load(options: argparse.Namespace) -> Config:
    """Load the configuration that a command names, with its overrides.

    Models that are named by their names on the Hugging Face hub become directories.
    """
    from spmdrl.commands.local_models import with_local_models
    from spmdrl.config.load import load_config

    trains = options.name in ("train", "plan", "explain", "check", "check-collectives")
    overrides = [*options.overrides, *["fold=true"] * ("fold" in options and options.fold)]
    config = load_config(options.config, overrides, trains=trains)
    if options.name == "report":
        return config
    return with_local_models(config, download=options.name in DOWNLOADING)


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


def check_collectives(options: argparse.Namespace) -> None:
    from spmdrl.commands.check_collectives import check_collectives

    found = check_collectives(load(options), options.ranks, options.ranks_per_node)
    print(found.describe(), flush=True)
    if found.findings:
        raise SystemExit(2)


def plan(options: argparse.Namespace) -> None:
    if options.name == "explain":
        print("spmdrl explain: its name is spmdrl plan now", file=sys.stderr, flush=True)
    if options.calibrate is not None:
        from spmdrl.commands.plan_calibration import calibrate

        to = None if options.to is None else Path(options.to)
        print(calibrate(Path(options.calibrate), to), flush=True)
        return
    if options.config is None:
        raise ValueError("plan: name a configuration, or a run with --calibrate RUN")
    from spmdrl.commands.plan import run_plan

    if not run_plan(options):
        raise SystemExit(2)


def keys(options: argparse.Namespace) -> None:
    from spmdrl.config.key_table import key_table

    print(key_table(options.group, basic=options.basic))


def backends(options: argparse.Namespace) -> None:
    """Print the tables of features and families by backend."""
    from spmdrl.planning.support import support_tables

    print(support_tables())


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
