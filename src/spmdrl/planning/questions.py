"""Questions that a step asks a judge: how many, how long, and how long their answers may be."""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.config.data_sets import held_out_sets, is_rewarded, rows_read
from spmdrl.config.judges import JudgeSection, question_template
from spmdrl.config.sections import Config
from spmdrl.planning.token_bounds import step_sizes

_TOKEN_BYTES = 4
"""Bytes of a template's token, on average: what a forecast counts with; a bound takes 1."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions to a judge in a training step, over all its replicas.

    Args:
        scores: questions for the score of one response.
        pairs: questions for the better of two responses, both orders counted.
        samples: answers to each.
        template_tokens: tokens of the longest template, as a forecast counts them.
        prompt_tokens: most tokens of a question.
        answer_tokens: most tokens of an answer.
        evaluated: most questions of a call of an evaluation; None: unknown.
    """

    scores: int
    pairs: int
    samples: int
    template_tokens: float
    prompt_tokens: int
    answer_tokens: int
    evaluated: int | None

    @property
    def count(self) -> int:
        return self.scores + self.pairs

    @property
    def largest_call(self) -> int:
        """Answers of the call that asks most; it has those of an evaluation if they are known."""
        return max(self.scores, self.pairs, self.evaluated or 0, 1) * self.samples


def judge_section(config: Config, judge: str) -> JudgeSection:
    """The judge's section; the defaults if it is left out."""
    own = config.roles[judge].judge
    return JudgeSection() if own is None else own


def questions_of(config: Config, judge: str, max_position: int) -> Questions:
    """Count the questions of a judge.

    Args:
        max_position: positions of its model.

    Raises:
        ValueError: a template's file cannot be read, or an answer leaves no room for a question.
    """
    section, sizes = judge_section(config, judge), step_sizes(config)
    on_samples = config.data_kind() == "prompts"
    scores = sizes.rows if on_samples and judge in {r.role for r in config.rewards} else 0
    asked = asked_templates(config, judge)
    templates = {key: question_template(judge, section, key) for key in asked}
    room = max_position - section.max_tokens
    if room < 1:
        raise ValueError(
            f"roles.{judge}.judge.max_tokens={section.max_tokens}: the judge's model has "
            f"{max_position} positions, which leaves none for a question: lower the first"
        )
    bound = section.max_prompt_tokens
    if bound is None:
        bound = max((_longest(config, key, text) for key, text in templates.items()), default=1)
    return Questions(
        scores=scores,
        pairs=2 * sizes.items * compared_pairs(config) if "pair_template" in asked else 0,
        samples=section.num_samples,
        template_tokens=max((len(t.encode()) for t in templates.values()), default=0)
        / _TOKEN_BYTES,
        prompt_tokens=min(bound, room),
        answer_tokens=section.max_tokens,
        evaluated=_evaluated(config, judge),
    )


def asked_templates(config: Config, judge: str) -> list[str]:
    """The keys of the templates that a run asks the judge with."""
    lists = (config.rewards, *(described.rewards for described in held_out_sets(config).values()))
    found = ["template"] * any(r.role == judge for rewards in lists for r in rewards)
    return found + ["pair_template"] * (config.preference.judge == judge)


def compared_pairs(config: Config) -> int:
    """Most pairs of a prompt's samples that a judge compares."""
    size = config.data.group_size
    few = is_rewarded(config) and config.preference.pairs == "best_worst"
    return 1 if few else size * (size - 1) // 2


def _longest(config: Config, key: str, template: str) -> int:
    """Bound a question's tokens: a byte of the template is at most one, texts are as long as the
    policy's tokenizer makes them.
    """
    rows = [own for own in rows_read(config) if own.sampling is not None]
    longest = max((own.longest for own in rows), default=0)
    answer = max((own.longest - own.data_tokens for own in rows), default=0)
    more = ("{answer}" in template) + (key == "pair_template")
    return len(template.encode()) + longest + more * answer


def _evaluated(config: Config, judge: str) -> int | None:
    """Most responses of a held-out set that the judge scores; None: their number is unknown."""
    most = 0
    for described in held_out_sets(config).values():
        if judge not in {reward.role for reward in described.rewards}:
            continue
        items = described.max_items
        if items is None:
            return None
        most = max(most, items * described.num_samples)
    return most
