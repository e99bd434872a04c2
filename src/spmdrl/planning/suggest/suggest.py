"""`suggest`: the fastest layouts of a configuration on a machine, as overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.planning.forecast.forecast import forecast_step
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.step import Lengths, StepForecast
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.host_memory import host_memory
from spmdrl.planning.sketch import KeptLayouts
from spmdrl.planning.suggest.search import Found, Trial, search
from spmdrl.planning.suggest.space import Space, Words, make_space
from spmdrl.planning.suggest.workers import Workers, num_processes

EXACT_RANKS = 1024
"""Ranks of all exact plans together that a search makes; small worlds get more of them."""

FEWEST_EXACT, MOST_EXACT = 6, 48

Configure = Callable[[Words], Config]
"""The configuration with overrides; ValueError if they are refused."""


def suggest(
    configure: Configure,
    models: Mapping[str, ModelConfig],
    machine: Machine,
    lengths: Lengths,
    space: Space | None = None,
    processes: int | None = None,
) -> Found:
    """Search the fastest layouts that fit.

    Args:
        models: models of the roles, except users' own.
        lengths: tokens of the rows that the seconds are for.
        space: choices; None: all that `make_space` makes.
        processes: those that plan; None: as `num_processes` finds.
    """
    if space is None:
        space = make_space(configure(()), models, machine)
    planner = partial(try_words, configure, models, machine, lengths)
    count = EXACT_RANKS // machine.num_ranks
    planners = {
        "sketch": partial(planner, kept=KeptLayouts(sketches=True)),
        "exact": partial(planner, kept=KeptLayouts()),
    }
    with Workers(planners, processes or num_processes(machine.num_ranks)) as workers:
        return search(
            space,
            partial(workers.plan, "sketch"),
            partial(workers.plan, "exact"),
            most_exact=max(FEWEST_EXACT, min(count, MOST_EXACT)),
        )


def try_words(
    configure: Configure,
    models: Mapping[str, ModelConfig],
    machine: Machine,
    lengths: Lengths,
    words: Words,
    *,
    kept: KeptLayouts | None = None,
) -> Trial:
    """Plan a configuration with overrides on a machine, and forecast its step.

    Args:
        kept: see `plan_roles`.
    """
    try:
        config = configure(words)
        plan = plan_from_shapes(
            config,
            machine.num_ranks,
            machine.devices_per_node,
            device_type=machine.device.kind,
            device_bytes=machine.device.memory_bytes,
            models=models,
            refuses=False,
            kept=kept,
        )
    except ValueError:
        return Trial(words=words, lacking_bytes=0, peak_bytes=0, forecast=None)
    plans = {id(own): own.plan for own in plan.memory.values()}.values()
    lacking = [own.peak_bytes - own.capacity for own in plans if own.capacity is not None]
    if kept is None or not kept.sketches:
        host = host_memory(config, plan, machine.num_ranks, machine.devices_per_node)
        lacking.append(host.total - machine.host_bytes)
    return Trial(
        words=words,
        lacking_bytes=max(0, *lacking, 0),
        peak_bytes=max((own.peak_bytes for own in plans), default=0),
        forecast=forecast_step(config, plan, machine, lengths),
    )


def suggestion_lines(found: Found, machine: Machine) -> list[str]:
    """Best three layouts, each with its seconds, what limits it, and the overrides to paste."""
    if not found.fitting:
        return ["no layout of those tried fits: give more nodes, or smaller calls"]
    lines = []
    for number, trial in enumerate(found.fitting[:3], start=1):
        assert trial.forecast is not None
        rate = trial.forecast.tokens / trial.forecast.seconds / machine.num_ranks
        lines += [
            f"{number}. {trial.forecast.seconds:,.2f} s a step, {rate:,.0f} tokens/s/GPU, peak "
            f"{trial.peak_bytes / 1e9:,.1f} GB{_against(trial, found.start)}",
            f"   {limits_text(trial.forecast)}",
            f"   {' '.join(map(_quoted, trial.words)) or 'as it is'}",
        ]
    return lines


def trial_json(trial: Trial, machine: Machine) -> dict[str, Any]:
    """A suggestion as plain values."""
    forecast = trial.forecast
    assert forecast is not None, trial.words
    return {
        "overrides": list(trial.words),
        "seconds_per_step": forecast.seconds,
        "tokens_per_second_per_gpu": forecast.tokens / forecast.seconds / machine.num_ranks,
        "peak_gb": trial.peak_bytes / 1e9,
        "phases": dict(forecast.phase_seconds),
    }


def limits_text(forecast: StepForecast) -> str:
    """Seconds and bound of each phase, longest first."""
    slowest = {
        name: max(
            (call for call in forecast.calls if call.phase == name),
            key=lambda call: call.timed.seconds,
            default=None,
        )
        for name in forecast.phase_seconds
    }
    order = sorted(forecast.phase_seconds.items(), key=lambda item: -item[1])
    texts = []
    for name, seconds in order:
        call = slowest[name]
        texts.append(
            f"{name} {seconds:,.2f} s" + ("" if call is None else f" ({call.timed.bound})")
        )
    return ", ".join(texts)


def _against(trial: Trial, start: Trial) -> str:
    if start.forecast is None:
        return ""
    if not start.fits:
        return "; as it is, it does not fit"
    assert trial.forecast is not None
    factor = start.forecast.seconds / trial.forecast.seconds
    return f"; {factor:.2f} times as fast as it is"


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word
