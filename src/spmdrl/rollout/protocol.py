"""The interface of rollout engines: requests in, completions out.

`SamplingParams`: the options by which one request's tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from spmdrl.batch import Ragged
from spmdrl.config.sections import SamplingSection
from spmdrl.models.tensors import Slice

MAX_SUPPORT = 256
"""Most tokens that truncation may leave if their ids are to be recorded, and a log-probability is
to be that of the softmax over them. If more are left, the softmax is that over all tokens."""

OWN = "own"
"""Name of the adapter that comes with an engine's weights."""


class SamplingParams(SamplingSection):
    """Options of truncated sampling, conditions that end a completion, and what to report of it.

    The truncations apply in the order of `transformers`: temperature, top-k, top-p (on the
    distribution that top-k leaves), min-p; the rest is renormalised. A stop text may end within the
    last token. A token of `stop_token_ids` that ends a completion is part of it and has a
    log-probability.

    Args:
        ignore_eos: do not end at the model's ends of text.
        margins: also report how close every draw was to a different result.
        experts: also report the experts that every token was routed to.
        support: also report the tokens that each token was drawn from, if truncation leaves at
            most `MAX_SUPPORT` of them.
    """

    ignore_eos: bool = False
    margins: bool = False
    experts: bool = False
    support: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens with a probability above 0 cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


Progress = Callable[[int, int], None]


class Finish(IntEnum):
    """Reasons why a sample ended, and their codes in the column `finish`."""

    STOP = 0  # an end of text, a stop token or a stop text
    LENGTH = 1
    ABORTED = 2

    @property
    def text(self) -> str:
        return self.name.lower()


class Ending(IntEnum):
    """Reasons why a sample that takes turns ended, and their codes in the column `turn_end`."""

    DONE = 0  # whoever answers its turns says so
    TURNS = 1  # it had as many turns as it may have
    ROOM = 2  # no room for the answer and one more token
    SECONDS = 3  # its limit of wall-clock time
    FAILED = 4  # its turn could not be answered

    @property
    def text(self) -> str:
        return self.name.lower()

    @property
    def finish(self) -> Finish:
        """Whether the sample ended by itself or was cut."""
        return Finish.STOP if self in (Ending.DONE, Ending.FAILED) else Finish.LENGTH


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and the samples to draw for it.

    Args:
        tokens: the prompt, not empty.
        prompt_id: key of the random numbers, with the run's seed, the step and the sample.
        samples: sample indices; the samples of one request share the prompt's computation.
        sampling: options of the draws.
        begun: results of an aborted call for each of `samples`, or empty. Samples continue after
            their tokens; those that were complete are returned unchanged. An engine that cannot
            continue a sample may draw it again from the start.
        adapter: name of the adapter to apply: `OWN` if the engine has one of its own, one that
            was added to it, or None for the base alone.
        room: most tokens of a completion whose samples take turns, answers included;
            `sampling.max_tokens` is then that of the first turn. 0: there are no turns.
    """

    tokens: tuple[int, ...]
    prompt_id: int
    samples: tuple[int, ...]
    sampling: SamplingParams
    begun: tuple[Completion, ...] = ()
    adapter: str | None = OWN
    room: int = 0

    @property
    def longest(self) -> int:
        """The most tokens that a completion can have."""
        return self.room or self.sampling.max_tokens

    def done(self, place: int) -> Completion | None:
        """Return the sample at `place` if it was complete before this call."""
        if not self.begun or self.begun[place].finish is Finish.ABORTED:
            return None
        return self.begun[place]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample.

    Args:
        tokens: the generated tokens, including the one that ended it.
        logprobs: log-probability of each token under the distribution it was drawn from (after
            temperature and truncation, renormalised); for greedy requests under the softmax of the
            logits. If truncation leaves more than `MAX_SUPPORT` tokens, under that of all tokens.
        finish: reason of its end.
        margins: lead of each draw's perturbed score (0 or more, in nats), or the distance of a
            token's log-probability to a truncation boundary if that is smaller. Empty unless asked
            for.
        experts: experts that each token of prompt and response was routed to, in every layer with
            experts: [tokens, L, K] in `models.routing.choices_dtype`, whose largest value marks
            tokens that were not computed (the last one never is). None unless asked for.
        support: int32 ids that each token was drawn from; empty if from all tokens, or from more
            than `MAX_SUPPORT`. None unless asked for.
        given: ranges of `tokens` that were given in answer to a turn and not drawn, ascending; they
            have a log-probability of 0, and no support.
        parts: places in `tokens` at which a part begins, ascending: starts of ranges of `given`. A
            part's tokens were drawn after those of the part alone.
        waits: reason of the end of its turn, if an aborted sample had ended one and waited for the
            answer.
        turn_limit: most tokens of an aborted sample's turn, if an answer gave them.
        rewards: rewards of its turns, in their order, for those that were answered.
        ending: reason why its turns ended; None if it takes none, or was aborted.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    margins: tuple[float, ...] = ()
    experts: Tensor | None = None
    support: Ragged | None = None
    given: tuple[tuple[int, int], ...] = ()
    parts: tuple[int, ...] = ()
    waits: Finish | None = None
    turn_limit: int | None = None
    rewards: tuple[float, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn that a sample has ended, and now waits for the answer.

    Args:
        request: place of the sample's request in the call.
        sample: its sample index, of `Request.samples`.
        number: number of turns that it ended before.
        tokens: tokens that were drawn in the turn, with the one that ended it.
        finish: STOP, or LENGTH where the turn was cut.
    """

    request: int
    sample: int
    number: int
    tokens: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a turn.

    Args:
        request, sample: those of the turn.
        tokens: tokens that the context goes on with; they are given, and not drawn. At least one,
            unless the sample ends.
        max_tokens: most tokens of the next turn; 0 ends the sample.
        ending: reason of the sample's end.
        reward: reward of the turn.
        restarts: whether the sample starts again after its prompt, because its turns cannot be
            continued; all that it has drawn is dropped.
        begins_part: whether the tokens are a whole context, with which a part begins: what is drawn
            next follows them alone, and neither the prompt nor what was drawn or given before.
    """

    request: int
    sample: int
    tokens: tuple[int, ...] = ()
    max_tokens: int = 0
    ending: Ending = Ending.DONE
    reward: float = 0.0
    restarts: bool = False
    begins_part: bool = False


class Turns(Protocol):
    """Answers to the turns of one call, where a sample would end: it may continue. The requests of
    the call have `room`, and only the first rank of a replica asks for answers.
    """

    def ended(self, turn: Turn) -> None:
        """Take a turn, which is answered later; it is told again if a stopped call resumes."""

    def answers(self, wait_s: float) -> Sequence[Answer]:
        """Return the answers that have arrived since the last call, in any order; if there are
        none, wait up to `wait_s` seconds for one.
        """

    def states(self) -> Mapping[tuple[int, int], bytes]:
        """Return what is kept of samples that an aborted call has left open, for the `open` of the
        call that resumes it: (prompt id, sample) -> bytes. Samples without one may resume too.
        """

    def heard(self) -> Mapping[tuple[int, int], Mapping[int, str]]:
        """Return the messages of this call's answers, which are given as tokens: (prompt id,
        sample) -> number of the turn -> JSON. Those of a sample that started again are its new
        ones.
        """


class TurnSource(Protocol):
    """Maker of the turns of a rollout's calls, on every rank of its mesh."""

    def open(
        self,
        requests: Sequence[Request],
        entries: Sequence[str],
        states: Mapping[tuple[int, int], bytes] = MappingProxyType({}),
    ) -> AbstractContextManager[Turns]:
        """Open the turns of one call, whose samples begin or resume.

        Args:
            requests: those of the call; what their samples have `begun` is answered again.
            entries: each request's row of the data, as JSON.
            states: `Turns.states()` of the aborted call.
        """


class RolloutEngine(Protocol):
    """Engine that generates with the policy's weights. All ranks of a tp group call it together."""

    def generate(
        self,
        requests: Sequence[Request],
        *,
        seed: int,
        step: int,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> list[list[Completion]]:
        """Generate completions by request and sample, in the order of the requests.

        A result depends on the request, the weights, `seed` and `step`, not on the other requests
        (up to rounding of the logits).

        Args:
            progress: callback with (tokens done, samples done) during the call.
            should_stop: callback between engine steps; True aborts all open samples.
            state: result of `aborted_state` after a call with the same requests was aborted. If it
                is usable here (same engine, options and weights) the call resumes from it bit for
                bit; otherwise from what the requests have `begun`.

        Raises:
            ValueError: a request can never be served; raised before anything runs.
        """

    def aborted_state(self) -> dict[str, Tensor]:
        """Return the state of the last `generate` if it was aborted, for the same rank's next call.
        Call it directly after `generate`. Empty if nothing was aborted or nothing is kept.
        """

    def score(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        temperature: float = 1.0,
        adapters: Sequence[str | None] | None = None,
    ) -> list[list[float]]:
        """Compute log-probabilities of every token but the first, given those before it, under the
        softmax of logits / temperature: one list per sequence, one shorter than the sequence.

        Args:
            adapters: each sequence's, see `Request.adapter`; None: `OWN` for all.

        Raises:
            ValueError: the cache or the model cannot hold a sequence, or the engine cannot score
                at the temperature.
        """

    def local_tensors(self) -> dict[str, tuple[Tensor, tuple[Slice, ...]]]:
        """Return the weights that this rank holds: local name -> (tensor, slices)."""

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        """Use `tensor` itself as the parameter: it is not copied, and changes to it take effect."""

    def allocate(self, local_name: str) -> Tensor:
        """Allocate the engine's own storage for a parameter, to be filled by a weight sync."""

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs, which hold addresses of tensors that
        others may move.
        """

    def cache_bytes(self) -> int:
        """Return the current bytes of the key-value cache."""

    def graph_bytes(self) -> int:
        """Return the current bytes of the graphs."""

    def release_cache(self) -> None:
        """Free the cache; the next call makes it again."""

    def release_graphs(self) -> None:
        """Free the graphs, before tensors move whose addresses they hold."""

    def close(self) -> None:
        """Free the engine, which is not used again, without waiting for other ranks."""
