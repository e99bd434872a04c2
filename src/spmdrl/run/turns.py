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
from spmdrl.data.prompts import PromptSet
from spmdrl.distributed.reduce import agreed
from spmdrl.rewards.server import RewardServer, start_reward_server
from spmdrl.roles.turn_calls import AllTurns, OpenedPrompt, RolloutTurns, check_opening, row_of
from spmdrl.run.inputs import Inputs
from spmdrl.turns.call import EnvironmentTurns
from spmdrl.turns.environment import Message
from spmdrl.turns.kinds import environment_kind
from spmdrl.turns.rendering import TurnRenderer
from spmdrl.turns.settings import TurnsSettings
from spmdrl.world import World

log = logging.getLogger(__name__)

_REWRITTEN = {
    "turns": "earlier turns",
    "thinking": "the thinking of earlier turns",
    "calls": "calls of tools",
    "tools": "the list of tools",
}
"""Name in `TurnRenderer.rewritten` -> what it is, in words."""


@contextmanager
def make_turns(
    config: Config, server: RewardServer, inputs: Inputs, world: World
) -> Iterator[AllTurns]:
    """Make the turns that sources of data have, by `turns_key`; none without a rollout. Their
    worker processes end with the block. Every rank of the world calls it; the first one begins an
    environment for a row of each source.

    Raises:
        AgreedError: a class cannot be loaded, or has no use for the model's chat template, which
            may write no results of tools; or it fails for the first row of a source.
    """
    with ExitStack() as stack:
        made = agreed(ValueError, lambda: _start(config, server, inputs, world.rank, stack))
        agreed(ValueError, lambda: _try_all(made, inputs) if world.is_first else None)
        for own in made.values() if world.is_first else ():
            if own.section.seconds is not None:
                log.warning(
                    "rollout.turns.seconds=%g: which turns a sample takes depends on time, and so "
                    "do all results",
                    own.section.seconds,
                )
            _tell_history(own)
        yield made


def _tell_history(own: RolloutTurns) -> None:
    """Log what becomes of turns that the chat template writes otherwise afterwards."""
    what = ", ".join(_REWRITTEN[name] for name in own.rewritten)
    if own.section.history == "rendered":
        log.info(
            "rollout.turns.history=rendered: the chat template writes %s otherwise once another "
            "message follows: where it does, a sample continues with the conversation as it is "
            "rendered, as another part of its row (docs/turns.md, metric turns/parts)",
            what or "nothing that was tried",
        )
    elif own.rewritten:
        log.warning(
            "rollout.turns: the chat template writes %s otherwise once another message "
            "follows, and a sample keeps the tokens that were there: so the model reads "
            "more of its earlier turns here than where a conversation is rendered anew; "
            "history: rendered trains on what is rendered (docs/turns.md)",
            what,
        )


def check_environments(config: Config, inputs: Inputs) -> None:
    """Load and begin environments as `make_turns` does, in one process, and end them again.

    Raises:
        ValueError: `make_turns` would refuse one.
    """
    if next(turn_sources(config), None) is None:
        return
    with ExitStack() as stack:
        server = stack.enter_context(start_reward_server())
        _try_all(_start(config, server, inputs, None, stack), inputs)


def _start(
    config: Config, server: RewardServer, inputs: Inputs, rank: int | None, stack: ExitStack
) -> dict[str, RolloutTurns]:
    """Start workers for each `turns_key`. ValueError: see `make_turns`.

    Args:
        rank: rank whose file has what environments print; None: nothing is kept.
    """
    found: dict[str, RolloutTurns] = {}
    if "rollout" not in map(config.role_kind, config.roles):
        return found
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
                if turns.history == "rendered":
                    renderer.check_calls("rollout.turns.history=rendered")
            output = None if rank is None else _output(config, rank, len(found))
            answers = _environments(config, turns, server, renderer, inputs, output)
            stack.enter_context(answers)
        assert isinstance(answers, EnvironmentTurns)
        found[name] = RolloutTurns(
            source=answers,
            opens=_Opens(answers, renderer),
            section=turns,
            longest=source.max_tokens,
            longest_key=f"{key}.max_tokens",
            rewritten=renderer.rewritten,
            described=answers.describe(),
            counts=answers.counts,
            metrics=answers.metrics,
        )
    return found


def _try_all(turns: AllTurns, inputs: Inputs) -> None:
    """Begin an environment for the first row of each source. ValueError: it fails, or begins with
    too long a prompt.
    """
    left = dict(turns)
    for data in (inputs.train, *inputs.held_out.values()):
        for prompt in data if isinstance(data, PromptSet) and left else ():
            own = left.pop(prompt.turns, None)
            if own is not None:
                (opened,) = own.opens([row_of(prompt)])
                check_opening(opened, own, prompt)


def _output(config: Config, rank: int, number: int) -> Path:
    suffix = f"_{number}" if number else ""
    return Path(config.run_dir) / f"turns_rank_{rank:05d}{suffix}.log"


def _environments(
    config: Config,
    turns: TurnsSection,
    server: RewardServer,
    renderer: TurnRenderer,
    inputs: Inputs,
    output: Path | None,
) -> EnvironmentTurns:
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
            renders_history=turns.history == "rendered",
            output=output,
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
                tokens=self.renderer.opening(opening.messages, opening.tools),
                entry=opening.entry,
                messages=opening.messages,
            )
            for opening in self.environments.openings(rows)
        ]


@dataclass(frozen=True)
class _Renderer:
    """Writer of observations and reader of turns for an `EnvironmentTurns`."""

    renderer: TurnRenderer

    def opening(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        return self.renderer.opening(messages, tools)

    def reads_alike(self, tokens: Sequence[int], others: Sequence[int]) -> bool:
        return self.renderer.reads_alike(tokens, others)

    def observation(self, messages: Sequence[Message], *, ended: bool) -> list[int]:
        return self.renderer.observation(messages, ended=ended)

    def ends(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] in self.renderer.end_ids

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        return self.renderer.text(tokens, special=special)
