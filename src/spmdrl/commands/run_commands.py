"""Commands that read the directories of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from spmdrl.commands.config_commands import Add


def add_run_commands(add: Add) -> None:
    """Add the commands, with their words."""
    command = add(
        "show", _show, "Print a sample of a run's rollouts (log.rollouts), or their table."
    )
    command.add_argument("run_dir")
    command.add_argument("--step", type=int, help="default: the last one written")
    command.add_argument("--sample", type=int, help="place in the step, from 0; default: the table")
    command = add("sync", _sync, "Send a run's metrics to trackers that do not have them yet.")
    command.add_argument("run_dir")
    command.add_argument(
        "--to", required=True, nargs="+", metavar="NAME", help="as log.trackers names them"
    )
    command = add("runs", _runs, "Print a table of the runs below a directory.")
    command.add_argument("directory", nargs="?", default="runs", help="default: runs")


def _show(options: argparse.Namespace) -> None:
    from spmdrl.commands.show import show

    print(show(Path(options.run_dir), options.step, options.sample), flush=True)


def _sync(options: argparse.Namespace) -> None:
    from spmdrl.config.load import RUN_FILE, run_values
    from spmdrl.observe.trackers.registry import send_metrics

    run_dir = Path(options.run_dir)
    given = run_values(run_dir) if (run_dir / RUN_FILE).is_file() else {}
    for name, count in send_metrics(run_dir, options.to, given).items():
        print(f"{name}: {count} lines of metrics.jsonl sent", flush=True)


def _runs(options: argparse.Namespace) -> None:
    from spmdrl.commands.runs import runs_text

    print(runs_text(Path(options.directory)), flush=True)
