"""The search finds the fastest layouts: on made-up costs, and on plans against all choices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.local_shards import LayerKinds
from spmdrl.planning.forecast.forecast import full_lengths
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.planning.forecast.step import StepForecast
from spmdrl.planning.known_models import known_model
from spmdrl.planning.sketch import KeptLayouts
from spmdrl.planning.suggest.search import Planner, Planners, Trial, search
from spmdrl.planning.suggest.space import Space, Words, make_space
from spmdrl.planning.suggest.suggest import suggest, suggestion_lines, try_words
from spmdrl.planning.suggest.workers import Workers

SPACE = Space(
    blocks={
        name: tuple((f"{name}={i}",) for i in range(9)) for name in ("placement", "a", "b", "c")
    }
)


def made_up(words: Words, *, skew: float = 0.0, most: int = 9) -> Trial:
    """A trial whose seconds are a sum of squares; values above `most` lack memory."""
    values = [int(word.rpartition("=")[2]) for word in words]
    seconds = sum((value - 4 + skew * i) ** 2 for i, value in enumerate(values)) + 1.0
    forecast = StepForecast(
        calls=(), phase_seconds={}, seconds=seconds, tokens=1.0, idle_share={}, lag_saves=0.0
    )
    lacking = sum(max(0, value - most) for value in values)
    return Trial(words=words, lacking_bytes=lacking, peak_bytes=0, forecast=forecast)


def each(planner: Planner) -> Planners:
    return lambda words: list(map(planner, words))


@pytest.mark.parametrize(("skew", "most"), [(0.0, 9), (0.3, 9), (-0.4, 3)])
def test_few_exact_plans_find_the_best_of_thousands(skew: float, most: int) -> None:
    exact = partial(made_up, skew=skew, most=most)
    found = search(SPACE, each(partial(made_up, most=most)), each(exact), most_exact=40).fitting
    best = min(
        (exact(SPACE.words(choice)) for choice in SPACE.choices()), key=lambda trial: trial.key
    )
    assert found[0].key == best.key
    assert len(found) <= 40 < SPACE.size


def test_a_choice_that_is_refused_is_never_suggested() -> None:
    def planner(words: Words) -> Trial:
        trial = made_up(words)
        refused = "a=4" in words
        return Trial(
            words=words,
            lacking_bytes=0,
            peak_bytes=0,
            forecast=None if refused else trial.forecast,
        )

    found = search(SPACE, each(planner), each(planner), most_exact=40).fitting
    assert found and not any("a=4" in trial.words for trial in found)
    assert found[0].key == (0, 2.0)


def test_the_best_placements_are_searched_too() -> None:
    def planner(words: Words) -> Trial:
        there, trial = "placement=5" in words, made_up(words)
        forecast = trial.forecast
        assert forecast is not None
        # blocks change nothing at the start's placement
        return replace(
            trial,
            lacking_bytes=0,
            forecast=replace(forecast, seconds=forecast.seconds if there else 100.0),
        )

    [best, *_] = search(SPACE, each(planner), each(planner), most_exact=2).fitting
    assert set(best.words) == {"placement=5", "a=4", "b=4", "c=4"}


def by_process(words: Words) -> Trial:
    return replace(made_up(words), peak_bytes=os.getpid())


def test_processes_find_what_one_finds() -> None:
    planners = {"sketch": partial(made_up, skew=0.3), "exact": made_up}
    found = []
    for count in (1, 2):
        with Workers(planners, count) as workers:
            plan = partial(workers.plan, "sketch"), partial(workers.plan, "exact")
            found.append(search(SPACE, *plan, most_exact=20))
    assert found[0] == found[1] and len(found[0].fitting) > 3
    with Workers({"exact": by_process}, 2) as workers:
        trials = workers.plan("exact", list(map(SPACE.words, SPACE.choices()))[:50])
    assert os.getpid() not in {trial.peak_bytes for trial in trials}


def ends(words: Words) -> Trial:
    os._exit(words == SPACE.words(SPACE.start))


def test_a_process_that_ends_is_told_of() -> None:
    with (
        pytest.raises(RuntimeError, match="ended before its plan was made"),
        Workers({"exact": ends}, 2) as workers,
    ):
        workers.plan("exact", [SPACE.words(choice) for choice in SPACE.choices()][:2])


def configured(path: str, *overrides: str) -> Callable[[Words], Config]:
    return lambda words: load_config(path, [*overrides, *words])


def choices_of(space: Space, **kept: int) -> Space:
    """The first options of the blocks, so many of each that is named."""
    return Space(blocks={name: space.blocks[name][:count] for name, count in kept.items()})


BATCH = ("data.prompts_per_step=64", "data.group_size=4", "device=cuda")
CASES = {
    "dense": (
        "gsm8k",
        "qwen2.5-7b",
        BATCH,
        {"placement": 3, "policy": 8, "rollout": 4, "recompute": 2},
    ),
    "experts": (
        "gsm8k",
        "qwen3-30b-a3b",
        (*BATCH, "train.microbatch_tokens=4096"),
        {"policy": 14, "rollout": 6, "microbatch": 2},
    ),
    "four_roles": (
        "rlhf/ppo",
        "llama-3.1-8b",
        (
            "device=cuda",
            "algorithm.kl_horizon=10000",
            "data.prompts_per_step=256",
            "sampling.max_tokens=512",
            "roles.policy.dp_shard=all",
            "roles.value.dp_shard=all",
            "train.recompute=layer",
        ),
        {"policy": 6, "value": 6, "rollout": 3, "offload": 2},
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_the_suggestion_is_the_best_of_all_choices_on_16_ranks(name: str) -> None:
    path, model, overrides, kept = CASES[name]
    machine = load_machine("h100", num_nodes=2, devices_per_node=8)
    configure = configured(path, *overrides)
    config = configure(())
    models = dict.fromkeys(config.roles, known_model(model))
    lengths = full_lengths(config)
    space = choices_of(make_space(config, models, machine), **kept)
    found = suggest(configure, models, machine, lengths, space).fitting
    every = [
        try_words(configure, models, machine, lengths, space.words(choice))
        for choice in space.choices()
    ]
    best = min((trial for trial in every if trial.fits), key=lambda trial: trial.key)
    assert found[0].key == pytest.approx(best.key, rel=1e-9), (found[0].words, best.words)


def policy_options(backend: str) -> list[dict[str, str]]:
    machine = load_machine("h100", num_nodes=2, devices_per_node=8)
    config = configured("gsm8k", f"train.backend={backend}", "roles.policy.dp_shard=4")(())
    models = dict.fromkeys(config.roles, known_model("qwen2.5-7b"))
    options = make_space(config, models, machine).blocks["policy"]
    return [dict(word.rpartition(".")[2].split("=") for word in words) for words in options]


def test_shards_of_zero_are_tried_once() -> None:
    """ZeRO divides over all ranks with other rows, whatever `dp_shard` is."""
    found, torch = policy_options("deepspeed"), policy_options("torch")
    degrees = [(own.get("tp"), own.get("cp")) for own in found]
    assert len(set(degrees)) == len(found) > 2
    assert {own["dp_shard"] for own in torch if "tp" not in own and own} == {"1", "8", "all"}


def test_a_configuration_that_does_not_fit_gets_one_that_does() -> None:
    machine = load_machine("h100", num_nodes=1, devices_per_node=8)
    # its optimizer, which otherwise would step in windows, has no room at all
    whole = ["roles.policy.dp_shard=1", "roles.policy.residency.optimizer=keep"]
    configure = configured("gsm8k", *BATCH, *whole)
    config = configure(())
    models = dict.fromkeys(config.roles, known_model("qwen2.5-7b"))
    lengths = full_lengths(config)
    space = choices_of(make_space(config, models, machine), policy=4, rollout=2, recompute=1)
    found = suggest(configure, models, machine, lengths, space)
    assert not found.start.fits and found.fitting[0].fits
    lines = suggestion_lines(found, machine)
    assert "as it is, it does not fit" in lines[0]
    assert any("roles.policy." in line for line in lines)
    # what is printed can be pasted
    words = [word.strip('"') for word in lines[2].split()]
    assert try_words(configure, models, machine, lengths, tuple(words)).key == found.fitting[0].key


@pytest.mark.parametrize("backend", ["torch", "megatron"])
def test_a_sketch_lists_no_layers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of 94 layers' 128 experts took most of a search for a large model."""

    def refused(kinds: LayerKinds) -> None:
        raise AssertionError("names of all layers were listed")

    monkeypatch.setattr(LayerKinds, "listed", property(refused))
    machine = load_machine("h100", num_nodes=2, devices_per_node=8)
    configure = configured("gsm8k", *BATCH, f"train.backend={backend}", "roles.policy.dp_shard=8")
    models = dict.fromkeys(configure(()).roles, known_model("qwen3-30b-a3b"))
    words = ("roles.policy.ep=4", "roles.rollout.tp=2", "roles.rollout.ep=2")
    found = try_words(
        configure,
        models,
        machine,
        full_lengths(configure(())),
        words,
        kept=KeptLayouts(sketches=True),
    )
    assert found.forecast is not None
