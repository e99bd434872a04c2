"""Words of `spmdrl plan`, apart from what it does: a command line is parsed without torch."""

from __future__ import annotations

import argparse

DEFAULT_NODE = 8
"""GPUs of a node where their number is not given."""


def add_plan_words(command: argparse.ArgumentParser) -> None:
    """Add the words of `spmdrl plan` but for those that name a configuration and its ranks."""
    command.add_argument("--resolved", action="store_true", help="print the configuration as well")
    command.add_argument(
        "--gpu", metavar="NAME|FILE", help="plan for these GPUs: h100, a100-80, ..., or a YAML file"
    )
    command.add_argument("--nodes", type=int, help="nodes with these GPUs (default: 1)")
    command.add_argument("--gpus-per-node", type=int, help=f"default: {DEFAULT_NODE}")
    command.add_argument(
        "--network-gb-s",
        type=float,
        metavar="GB/S",
        help="bytes that a GPU sends to other nodes (default: those of the maker's server)",
    )
    command.add_argument(
        "--model", metavar="NAME", help="model.path=NAME: a directory, or a known model's shapes"
    )
    for name in ("prompt", "response"):
        command.add_argument(
            f"--{name}-tokens",
            type=float,
            metavar="MEAN",
            help=f"mean tokens of a {name} (default: the most that the configuration allows)",
        )
    command.add_argument(
        "--price-per-gpu-hour", type=float, metavar="X", help="add what a step costs"
    )
    command.add_argument(
        "--suggest", action="store_true", help="search the fastest layouts that fit, with --gpu"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    command.add_argument(
        "--calibrate", metavar="RUN", help="make a machine file of a run's figures, for --gpu"
    )
    command.add_argument("--to", metavar="FILE", help="with --calibrate; default: RUN/machine.yaml")
