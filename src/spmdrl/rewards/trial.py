"""Trial of reward functions on a row of the data, before a model can write responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spmdrl.data.prompts import Prompt
from spmdrl.rewards.conversations import conversation
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import Failure, RewardJob
from spmdrl.rewards.pool import RewardPool

NO_ANSWER = "I do not know."
"""First response of the trial if the row has no answer."""

LONG = """<think>
Let me see.
</think>
<answer>
{answer}
</answer>
The final answer is \\boxed{{{answer}}}
#### {answer}"""
"""Second response: the answer in the forms that functions look for."""

AT_ONCE = ("signature", "returned")
"""Reasons of failures that would occur with any response."""

FIXES = {
    "returned": "return a number, or a dict of numbers with 'score'",
    "timeout": "make it faster, or raise reward_pool.timeout_s",
    "memory": "make it smaller, or raise reward_pool.memory_gb",
    "nan": "return finite numbers",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Result of a trial.

    Args:
        problem: reason why a function cannot be used; None: all can.
        notes: one per function that failed for one of the responses.
    """

    problem: str | None
    notes: tuple[str, ...] = ()


def try_out(pool: RewardPool, specs: Sequence[RewardSpec], prompt: Prompt, where: str) -> Trial:
    """Score two responses to a prompt: its answer, and a longer text around it.

    Args:
        specs: specs of the pool.
        where: source of the prompt, for messages.
    """
    answer = prompt.answer or NO_ANSWER
    jobs = [
        RewardJob(
            prompt=prompt.text,
            response=text,
            answer=prompt.answer,
            entry=entry,
            messages=conversation(prompt, [(text, ())]),
        )
        for text in (answer, LONG.format(answer=answer))
        for entry in [{**prompt.entry, "turns": [text]} if prompt.turns else prompt.entry]
    ]
    results = pool.tried(jobs)
    notes = []
    for spec in specs:
        failures = [f for result in results for f in result.failures if f.component == spec.name]
        what = f"reward {spec.name!r} ({spec.function})"
        at_once = next((failure for failure in failures if failure.reason in AT_ONCE), None)
        if at_once is not None:
            return Trial(problem=f"{what}: {_told(at_once)}")
        if len(failures) == len(jobs):
            return Trial(
                problem=f"{what} fails for the first prompt of {where}, whether the response is "
                f"its answer or a longer text: {_told(failures[0])}"
            )
        if failures:
            text = failures[0].message.partition("\n")[0]
            notes.append(
                f"{what} fails for one of two responses to the first prompt of {where}: {text}"
            )
    return Trial(problem=None, notes=tuple(notes))


def _told(failure: Failure) -> str:
    """Message on a failure: the event, its fix, and the place in the user's code."""
    first, line, rest = failure.message.strip().partition("\n")
    fix = FIXES.get(failure.reason)
    return f"{first}{'' if fix is None else f' ({fix})'}{line}{rest}"
