"""Rules on samples that take turns (`rollout.turns`)."""

from __future__ import annotations

from collections.abc import Iterator

from spmdrl.config.data import PromptsSection
from spmdrl.config.data_sets import held_out_sets, takes_turns, train_sections, turns_of
from spmdrl.config.sections import Config
from spmdrl.config.turns import TurnsSection


def turn_sources(config: Config) -> Iterator[tuple[str, PromptsSection, TurnsSection]]:
    """Sources whose rows have turns: key, section, and the turns."""
    own, *mixed = train_sections(config)
    sources = {"data.train": own} | {f"data.mix.{i}": each for i, each in enumerate(mixed)}
    for name, described in held_out_sets(config).items():
        if described.data is not None:
            sources[f"evaluation.sets.{name}.data"] = described.data
    for key, source in sources.items():
        turns = turns_of(config, source)
        if turns is not None:
            yield key, source, turns


def check_turns(config: Config) -> None:
    """ValueError: turns without what they need, or with what reads one response alone."""
    algorithm = config.algorithm
    if algorithm.credit == "turn" and not takes_turns(config):
        raise ValueError(
            "algorithm.credit=turn without turns: samples of one turn have one reward: set "
            "rollout.turns, or leave the key out"
        )
    for key, source, turns in turn_sources(config):
        if not source.chat:
            raise ValueError(
                f"{key}.chat=false with rollout.turns.kind={turns.kind}: the messages of turns go "
                "through the chat template: leave the key out"
            )
        if turns.history == "rendered" and algorithm.routing_replay:
            raise ValueError(
                f"algorithm.routing_replay=true with rollout.turns.history=rendered in {key}: what "
                "is rendered anew has experts of its own, which engines do not record: set "
                "history to kept, or leave routing_replay out"
            )
        for name, role in config.roles.items():
            if role.retokenize:
                raise ValueError(
                    f"roles.{name}.retokenize=true with rollout.turns.kind={turns.kind}: it reads "
                    "the text of a prompt and one response: use a reward model of the policy's "
                    "tokenizer"
                )
