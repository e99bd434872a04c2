"""Commands that read the directories of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spmdrl.commands.config_commands import Add, add_config, load


def add_run_commands(add: Add) -> None:
    """Add the commands, with their words."""
    command = add(
        "show", _show, "Print a sample of a run's rollouts (log.rollouts), or their table."
    )
    command.add_argument("run_dir")
    command.add_argument("--step", type=int, help="default: the last one written")
    command.add_argument("--sample", type=int, help="place in the step, from 0; default: the table")
    command = add(
        "export", _export, "Write a role of a checkpoint as transformers or PEFT loads it."
    )
    command.add_argument("config", metavar="RUN", help="directory of a run")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument("--step", type=int, help="steps done; default: the newest checkpoint")
    command.add_argument("--role", help="a role that trains; default: the policy")
    command.add_argument(
        "--to", metavar="DIR", help="default: RUN/model_step_NNNNNNNN, with _ROLE for other roles"
    )
    command = add("sync", _sync, "Send a run's metrics to trackers that do not have them yet.")
    command.add_argument("run_dir")
    command.add_argument(
        "--to", required=True, nargs="+", metavar="NAME", help="as log.trackers names them"
    )
    command = add(
        "report", _report, "Write RUN/report.html, and print a summary: name the run's directory."
    )
    add_config(command)
    command.add_argument("--seconds", type=float, help="the run's wall time")
    command = add("compare", _compare, "Write a page on several runs side by side.")
    command.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    command.add_argument("--out", default="compare.html", help="default: compare.html")
    command = add("runs", _runs, "Print a table of the runs below a directory.")
    command.add_argument("directory", nargs="?", default="runs", help="default: runs")


def _show(options: argparse.Namespace) -> None:
    from spmdrl.commands.show import show

    print(show(Path(options.run_dir), options.step, options.sample), flush=True)


def _export(options: argparse.Namespace) -> None:
    from spmdrl.config.load import last_start

    start = last_start(Path(options.config).expanduser())
    config = load(options)
    from spmdrl.commands.export import Choice, export
    from spmdrl.observe.log import set_up_logging

    set_up_logging(0)
    to = None if options.to is None else Path(options.to).expanduser()
    done = export(config, start, Choice(step=options.step, role=options.role, directory=to))
    for directory in done.directories:
        print(f"{done.role} of {done.checkpoint}: {directory}", flush=True)


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


def _report(options: argparse.Namespace) -> None:
    from spmdrl.observe.report.summary import report

    run_dir = Path(options.config).expanduser()
    if run_dir.is_dir():
        if options.overrides:
            raise ValueError(f"report {run_dir} takes no key=value: {' '.join(options.overrides)}")
        report(run_dir, seconds=options.seconds)
        return
    config = load(options)
    print(
        f"spmdrl report: a configuration is not needed any more: spmdrl report {config.run_dir}",
        file=sys.stderr,
        flush=True,
    )
    report(Path(config.run_dir), model=config.model.path, seconds=options.seconds)


def _compare(options: argparse.Namespace) -> None:
    from spmdrl.observe.report.summary import compare

    compare([Path(run).expanduser() for run in options.runs], Path(options.out))
