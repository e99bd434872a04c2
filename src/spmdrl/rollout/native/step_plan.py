"""`StepPlan`: the tokens that one engine step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from spmdrl.rollout.native.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens `[start, stop)` of a sample, whose keys and values are not in the cache yet."""

    sample: Sample
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the next token is drawn from the chunk's last row."""
        return self.stop == len(self.sample.tokens)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One engine step.

    Args:
        copies: (source, target) of shared blocks that a sample is about to write in, and its own
            copy; done before anything else, and all are read before any is written.
        slot_copies: the same of slots.
        decodes: samples that compute their newest token; the same list as in the plan before if
            the same samples do.
        chunks: parts of prompts (or of preempted samples) to compute.
        moved: decoding samples that have another block than before, and its place in `blocks`.
    """

    copies: list[tuple[int, int]]
    decodes: list[Sample]
    chunks: list[Chunk]
    slot_copies: list[tuple[int, int]] = field(default_factory=list)
    moved: list[tuple[Sample, int]] = field(default_factory=list)
