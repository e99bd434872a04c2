"""Reward functions tried on a row of the data, before there is a model to write responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spmdrl.data.prompts import Prompt
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import Failure, RewardJob
from spmdrl.rewards.pool import RewardPool

NO_ANSWER = "I do not know."
"""The first response tried where the row has no answer."""

LONG = """<think>
Let me see.
</think>
<answer>
{answer}
</answer>
The final answer is \\boxed{{{answer}}}
#### {answer}"""
"""The second: the answer in the forms that functions look for."""

AT_ONCE = ("signature", "returned")
"""Reasons that no other response would mend."""

MENDS = {
    "returned": "return a number, or a dict of numbers with 'score'",
    "timeout": "make it faster, or raise reward_pool.timeout_s",
    "memory": "make it smaller, or raise reward_pool.memory_gb",
    "nan": "return finite numbers",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Args:
    problem: why the functions cannot serve; None: they can.
    notes: of functions that failed for one of the responses.
    """

    problem: str | None
    notes: tuple[str, ...] = ()


def try_out(pool: RewardPool, specs: Sequence[RewardSpec], prompt: Prompt, where: str) -> Trial:
    """Score two responses to a prompt: its answer, and a longer text around it.

    Args:
        specs: the pool's.
        where: the prompt comes from, in messages.
    """
    answer = prompt.answer or NO_ANSWER
    jobs = [
        RewardJob(prompt=prompt.text, response=text, answer=prompt.answer, entry=prompt.entry)
        for text in (answer, LONG.format(answer=answer))
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
    """What happened, what mends it, and where, in the user's code."""
    first, line, rest = failure.message.strip().partition("\n")
    mend = MENDS.get(failure.reason)
    return f"{first}{'' if mend is None else f' ({mend})'}{line}{rest}"
