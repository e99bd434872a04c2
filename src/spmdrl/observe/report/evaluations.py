"""Results of held-out sets over the steps, with their standard errors."""

from __future__ import annotations

from spmdrl.observe import names
from spmdrl.observe.report.curves import Records, Series

QUANTITIES = {
    "accuracy": names.ACCURACY,
    "win rate": names.WIN_RATE,
    "reward": "/reward",
    "nll": "/nll",
    "margin": "/margin",
}
"""Quantities that a summary tells -> the ends of their metrics' names."""


def set_and_quantity(metric: str) -> tuple[str, str] | None:
    """Split `eval/NAME/...` into the set's name and the rest; None: it is another metric, or a
    standard error.
    """
    if not metric.startswith(names.EVAL) or metric.endswith(names.STANDARD_ERROR):
        return None
    name, slash, quantity = metric.removeprefix(names.EVAL).partition("/")
    return (name, quantity) if slash else None


def error_name(metric: str) -> str:
    """Name of the standard error of a held-out metric; that of the accuracy is the set's own."""
    return metric.removesuffix(names.ACCURACY) + names.STANDARD_ERROR


def with_errors(records: Records, metric: str, run: int = 0) -> Series | None:
    """Make the series of a held-out metric; None: it was not recorded."""
    found = [record for record in records if metric in record]
    if not found:
        return None
    return Series(
        run=run,
        steps=[record["step"] for record in found],
        values=[record[metric] for record in found],
        errors=[record.get(error_name(metric), 0.0) for record in found],
    )


def results(records: Records) -> dict[str, dict[str, Series]]:
    """Find the results of every held-out set: set -> metric's name after the set's -> series.

    They are those that have standard errors, and those of `QUANTITIES`.
    """
    metrics = dict.fromkeys(name for record in records for name in record)
    known = [suffix.removeprefix("/") for suffix in QUANTITIES.values()]
    found: dict[str, dict[str, Series]] = {}
    for metric in metrics:
        split = set_and_quantity(metric)
        if split is None:
            continue
        name, quantity = split
        series = with_errors(records, metric)
        if series is not None and (quantity in known or error_name(metric) in metrics):
            found.setdefault(name, {})[quantity] = series
    return found
