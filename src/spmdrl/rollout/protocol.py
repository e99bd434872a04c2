"""What rollout engines take and give: requests in, completions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from ..models.sharding import Slice
from ..ragged import Ragged
from .sampling import SamplingParams

Finish = Literal["stop", "length", "aborted"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and the samples wanted of it.

    Args:
        tokens: the prompt, not empty.
        prompt_id: keys the random numbers, with the run's seed, the step and the sample.
        samples: sample indices; the samples of one request share the prompt's computation.
        sampling: how to draw.
        begun: what an aborted call has drawn of each of `samples`; empty: nothing. Samples go on
            after their tokens, those that were complete are returned as they are. An engine that
            cannot go on in the midst of a sample may draw it anew.
    """

    tokens: tuple[int, ...]
    prompt_id: int
    samples: tuple[int, ...]
    sampling: SamplingParams
    begun: tuple[Completion, ...] = ()

    def done(self, place: int) -> Completion | None:
        """What was complete of the sample at `place` before this call."""
        if not self.begun or self.begun[place].finish == "aborted":
            return None
        return self.begun[place]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample.

    Args:
        tokens: what was generated, the token that ended it included.
        logprobs: of each token under the distribution it was drawn from (after temperature and
            truncation, renormalised); for greedy requests under the softmax of the logits. Where
            truncation leaves more than `MAX_SUPPORT` tokens, under the softmax of all of them.
        finish: "stop" (end of text, stop token or stop text), "length", or "aborted".
        margins: by how much each draw's perturbed score won (0 or more, in nats), or the distance
            of a token's log-probability to a truncation boundary if that is smaller. Empty unless
            asked for.
        experts: which experts each token of prompt and answer went to, in every layer that has
            experts: [tokens, L, K] in `models.routing.choices_dtype`, whose largest value stands
            for tokens that were not computed (the last one is not). None unless asked for.
        support: the ids, int32, that each token was drawn from; none where that were all tokens, or
            more than `MAX_SUPPORT`. None unless asked for.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    margins: tuple[float, ...] = ()
    experts: Tensor | None = None
    support: Ragged | None = None


class RolloutEngine(Protocol):
    """Generates with the policy's weights. All ranks of a tensor-parallel group call together."""

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
        """Completions by request and sample, in the order asked.

        A result depends on the request, the weights, `seed` and `step`, not on the other requests
        (up to rounding of the logits).

        Args:
            progress: called with (tokens done, samples done) while it goes on.
            should_stop: asked between engine steps; True ends all open samples as "aborted".
            state: what `aborted_state` returned after a call with the same requests was aborted. If
                it serves here (the same engine, options and weights) the call goes on from there
                bit for bit; if not, by what the requests have `begun`.

        Raises:
            ValueError: a request that can never be served, before anything runs.
        """
        ...

    def aborted_state(self) -> dict[str, Tensor]:
        """What the last `generate` left when it was aborted, for the same rank's next one; to be
        asked at once after it. Empty when it was not aborted, or when there is nothing to keep.
        """
        ...

    def score(
        self, sequences: Sequence[tuple[int, ...]], *, temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probabilities of every token but the first, given those before it, under the softmax
        of logits / temperature: one list for each sequence, a token shorter than it.

        Raises:
            ValueError: a sequence that the cache or the model cannot hold, or a temperature that
                the engine cannot score at.
        """
        ...

    def local_tensors(self) -> dict[str, tuple[Tensor, tuple[Slice, ...]]]:
        """The weights that this rank holds: local name -> (tensor, slices)."""
        ...

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        """Use `tensor` itself as the parameter: no copy, and changes to it are seen."""
        ...

    def allocate(self, local_name: str) -> Tensor:
        """Storage of the engine's own for a parameter, to be filled by a weight sync."""
        ...

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs, which hold addresses of what others
        may move.
        """
        ...

    def cache_bytes(self) -> int:
        """Of the key-value cache, as it is now."""
        ...

    def graph_bytes(self) -> int:
        """Of the graphs, as they are now."""
        ...

    def release_cache(self) -> None:
        """Free the cache; the next call makes it."""
        ...

    def release_graphs(self) -> None:
        """Free the graphs: before what they hold addresses of moves."""
        ...

    def close(self) -> None:
        """The engine is not used any more. Other ranks are not waited for."""
        ...
