"""The turns of a run's samples: environments in a rank's worker processes, one source of answers
for each `turns` of the configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdrl.config.sections import Config
from spmdrl.config.turn_rules import turn_sources
from spmdrl.config.turns import TurnsSection, turns_key
from spmdrl.data.chat import templates
from spmdrl.distributed.reduce import agreed
from spmdrl.rewards.server import RewardServer
from spmdrl.roles.turn_calls import AllTurns, OpenedPrompt, RolloutTurns
from spmdrl.run.inputs import Inputs
from spmdrl.turns.call import EnvironmentTurns
from spmdrl.turns.environment import Message
from spmdrl.turns.kinds import environment_kind
from spmdrl.turns.rendering import TurnRenderer
from spmdrl.turns.settings import TurnsSettings
from spmdrl.world import World

log = logging.getLogger(__name__)


@contextmanager
def make_turns(
    config: Config, server: RewardServer, inputs: Inputs, world: World
) -> Iterator[AllTurns]:
    """Make the turns that sources of data have, by `turns_key`; none without a rollout. Their
    worker processes end with the block. Every rank of the world calls it.

    Raises:
        AgreedError: a class cannot be loaded, or has no use for the model's chat template, which
            may write no results of tools.
    """
    if "rollout" not in map(config.role_kind, config.roles):
        yield {}
        return
    with ExitStack() as stack:

        def start() -> dict[str, RolloutTurns]:
            found: dict[str, RolloutTurns] = {}
            for key, source, turns in turn_sources(config):
                options = source.chat_template_kwargs
                name = turns_key(turns.model_dump(mode="json"), options)
                known = found.get(name)
                if known is not None and known.longest >= source.max_tokens:
                    continue
                answers = known.source if known is not None else None
                renderer = TurnRenderer(inputs.tokenizer, inputs.now, options)
                if answers is None:
                    if turns.kind == "tools":  # others may answer with other roles
                        renderer.check(["tool"])
                    answers = _environments(
                        config, turns, server, renderer, inputs, world, len(found)
                    )
                    stack.enter_context(answers)
                assert isinstance(answers, EnvironmentTurns)
                found[name] = RolloutTurns(
                    source=answers,
                    opens=_Opens(answers, renderer),
                    section=turns,
                    longest=source.max_tokens,
                    longest_key=f"{key}.max_tokens",
                    described=answers.describe(),
                    counts=answers.counts,
                    metrics=answers.metrics,
                )
            return found

        made = agreed(ValueError, start)
        for own in made.values() if world.is_first else ():
            if own.section.seconds is not None:
                log.warning(
                    "rollout.turns.seconds=%g: which turns a sample takes depends on time, and so "
                    "do all results",
                    own.section.seconds,
                )
        yield made


def _environments(
    config: Config,
    turns: TurnsSection,
    server: RewardServer,
    renderer: TurnRenderer,
    inputs: Inputs,
    world: World,
    number: int,
) -> EnvironmentTurns:
    suffix = f"_{number}" if number else ""
    kind = environment_kind(turns.kind, turns.options, templates(inputs.tokenizer) or "")
    server.preload(["spmdrl.turns.serving", *kind.modules])
    return EnvironmentTurns(
        server,
        _Renderer(renderer),
        TurnsSettings(
            kind=kind.where,
            options=kind.options,
            max_turns=turns.max_turns,
            workers=turns.workers,
            timeout_s=turns.timeout_s,
            memory_mb=round(turns.memory_gb * 1000),
            failed_reward=turns.failed_reward,
            seconds=turns.seconds,
            output=Path(config.run_dir) / f"turns_rank_{world.rank:05d}{suffix}.log",
            environment=config.reward_pool.environment,
        ),
    )


@dataclass(frozen=True)
class _Opens:
    """Maker of prompts from rows of the data."""

    environments: EnvironmentTurns
    renderer: TurnRenderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[OpenedPrompt]:
        return [
            OpenedPrompt(
                tokens=self.renderer.opening(opening.messages, opening.tools), entry=opening.entry
            )
            for opening in self.environments.openings(rows)
        ]


@dataclass(frozen=True)
class _Renderer:
    """Writer of observations and reader of turns for an `EnvironmentTurns`."""

    renderer: TurnRenderer

    def observation(self, messages: Sequence[Message], *, ended: bool) -> list[int]:
        return self.renderer.observation(messages, ended=ended)

    def ends(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] in self.renderer.end_ids

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        return self.renderer.text(tokens, special=special)
