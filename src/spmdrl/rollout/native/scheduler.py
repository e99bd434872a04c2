"""`Scheduler`: decides the tokens of the next engine step, and the blocks of their keys and values.

Continuous batching: every running sample decodes one token per step; prompts are computed in
chunks in the same steps, up to a token budget. Decisions are pure Python on the host and depend
only on the requests and the tokens, so that tensor-parallel ranks take the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens `[start, stop)` of a sequence, whose keys and values are not in the cache yet."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the next token is drawn from the chunk's last row."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One engine step.

    Args:
        copies: (source, target) of shared blocks that a sample is about to write in, and its own
            copy; done before anything else, and all are read before any is written.
        decodes: samples that compute their newest token.
        chunks: parts of prompts (or of preempted samples) to compute.
    """

    copies: list[tuple[int, int]]
    decodes: list[Sequence]
    chunks: list[Chunk]


class Scheduler:
    """Queues of samples over one block pool.

    Args:
        sequences: first samples of the requests (the others are their followers), served in this
            order. Each must fit into the pool on its own.
        prefix: number of tokens with which all prompts begin; the first sample computes them once,
            and they are shared.
        max_running: most samples that hold blocks of their own at a time.
        prefill_tokens: most prompt tokens per step.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        pool: BlockPool,
        *,
        block_size: int,
        max_running: int,
        prefill_tokens: int,
        prefix: int = 0,
    ) -> None:
        self.pool = pool
        self.running: list[Sequence] = []  # oldest first
        self._ready: deque[Sequence] = deque()  # prompt computed and shared, first token drawn
        self._waiting: deque[Sequence] = deque(sequences)  # to be computed from their first token
        self._block_size = block_size
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self._prefix = prefix
        self._prefix_owner = self._waiting[0] if prefix else None
        self._prefix_blocks: list[int] = []
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._ready or self._waiting)

    def plan(self) -> StepPlan:
        """Plan the next step. Its chunks and decodes count as cached from now on."""
        copies: dict[Sequence, tuple[int, int]] = {}
        decodes = self._plan_decodes(copies)
        budget = self._prefill_tokens
        chunks: list[Chunk] = []
        for sequence in self.running:
            if budget and not sequence.decodes:
                budget -= self._take(sequence, budget, chunks)
        self._start_ready(decodes, copies)
        while budget and self._waiting and not self._ready and self._has_room():
            if self._prefix_owner in self.running:
                break  # until the prefix is computed
            if not self._admit(self._waiting[0], copies):
                break
            budget -= self._take(self._waiting.popleft(), budget, chunks)
        assert decodes or chunks, "the scheduler found nothing to do"
        for chunk in chunks:
            chunk.sequence.cached = chunk.stop
        for sequence in decodes:
            sequence.cached += 1
        self._keep_prefix()
        return StepPlan(copies=list(copies.values()), decodes=decodes, chunks=chunks)

    def fork(self, leader: Sequence) -> list[Sequence]:
        """Share the blocks of `leader`, whose prompt was computed, with its followers.

        Returns these; each must be given its first token (or be finished) before the next plan.
        """
        followers, leader.followers = leader.followers, []
        for follower in followers:
            for block in leader.blocks:
                self.pool.share(block)
            follower.blocks = list(leader.blocks)
            follower.cached = leader.cached
            follower.rows = list(leader.rows)
        self._ready.extend(followers)
        return followers

    def finish(self, sequence: Sequence) -> None:
        """Remove a complete sample and release its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._ready.remove(sequence)
        self._release(sequence)

    def state(self, number: Mapping[Sequence, int]) -> dict[str, Any]:
        """Return JSON values from which `restore` makes an equal scheduler; samples by `number`."""
        owner = self._prefix_owner
        return {
            "pool": self.pool.state(),
            "running": [number[s] for s in self.running],
            "ready": [number[s] for s in self._ready],
            "waiting": [number[s] for s in self._waiting],
            "prefix": self._prefix,
            "prefix_owner": None if owner is None else number[owner],
            "prefix_blocks": self._prefix_blocks,
            "num_preempted": self.num_preempted,
        }

    def restore(self, state: Mapping[str, Any], sequences: Items[Sequence]) -> None:
        """Adopt the `state()` of another scheduler."""
        self.pool.restore(state["pool"])
        self.running = [sequences[i] for i in state["running"]]
        self._ready = deque(sequences[i] for i in state["ready"])
        self._waiting = deque(sequences[i] for i in state["waiting"])
        self._prefix = state["prefix"]
        owner = state["prefix_owner"]
        self._prefix_owner = None if owner is None else sequences[owner]
        self._prefix_blocks = list(state["prefix_blocks"])
        self.num_preempted = state["num_preempted"]

    def _has_room(self) -> bool:
        return len(self.running) < self._max_running

    def _plan_decodes(self, copies: dict[Sequence, tuple[int, int]]) -> list[Sequence]:
        """Reserve a slot for the newest token of every decoding sample, oldest first."""
        decodes = []
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            i += 1
            if not sequence.decodes:
                continue
            while not self._reserve(sequence, copies):
                victim = self._preempt(copies)
                if victim is sequence:
                    break
            else:
                decodes.append(sequence)
        return decodes

    def _start_ready(
        self, decodes: list[Sequence], copies: dict[Sequence, tuple[int, int]]
    ) -> None:
        while self._ready and self._has_room():
            sequence = self._ready.popleft()
            while not self._reserve(sequence, copies):
                if self._drop_prefix():
                    continue
                if self.running or not self._ready:
                    self._ready.appendleft(sequence)
                    return
                self._preempt(copies)
            self.running.append(sequence)
            decodes.append(sequence)

    def _reserve(self, sequence: Sequence, copies: dict[Sequence, tuple[int, int]]) -> bool:
        """Give the sample a block of its own for the token at `cached`; False if none is free."""
        number = sequence.cached // self._block_size
        if number < len(sequence.blocks):
            block = sequence.blocks[number]
            if not self.pool.is_shared(block):
                return True
        if not self.pool.num_free:
            return False
        fresh = self.pool.allocate()
        if number == len(sequence.blocks):
            sequence.blocks.append(fresh)
            return True
        copies[sequence] = (block, fresh)
        self.pool.release(block)
        sequence.blocks[number] = fresh
        return True

    def _preempt(self, copies: dict[Sequence, tuple[int, int]]) -> Sequence | None:
        """Take the blocks of the youngest sample; it is computed again later.

        Returns None if the kept prefix was dropped instead.
        """
        if self._drop_prefix():
            return None
        victim = self._ready.pop() if self._ready else self.running.pop()
        copies.pop(victim, None)
        self._release(victim)
        self._waiting.appendleft(victim)
        self.num_preempted += 1
        return victim

    def _release(self, sequence: Sequence) -> None:
        for block in sequence.blocks:
            self.pool.release(block)
        sequence.blocks, sequence.cached = [], 0

    def _admit(self, sequence: Sequence, copies: dict[Sequence, tuple[int, int]]) -> bool:
        """Give a waiting sample blocks for all its tokens; False if it must keep waiting."""
        size = self._block_size
        source, cached, rows = self._find_prefix(sequence)
        full = cached // size
        needed = -(-len(sequence.tokens) // size) - full
        # Keep room for its first tokens, or it would be preempted at once.
        spare = 1 + len(sequence.followers) if self.running else 0
        if needed + spare > self.pool.num_free:
            return not self.running and self._drop_prefix() and self._admit(sequence, copies)
        for block in source[:full]:
            self.pool.share(block)
        sequence.blocks = source[:full] + [self.pool.allocate() for _ in range(needed)]
        if cached % size:
            copies[sequence] = (source[full], sequence.blocks[full])
        sequence.cached = cached
        sequence.rows += rows[len(sequence.rows) : cached]
        self.running.append(sequence)
        return True

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], int, list[int]]:
        """Find first tokens of a sample that were computed before: their blocks, their number, and
        their `rows` if another sample of the request computed them.

        A preempted sample may find the prompt's full blocks with another sample of its request;
        fresh requests find the common prefix of all prompts.
        """
        # At least one prompt token is computed, because the last one's row is needed.
        tokens = (sequence.prompt_length - 1) // self._block_size * self._block_size
        kept = self._prefix if self._prefix_blocks else 0
        for other in self.running if tokens > kept else ():
            if other.index == sequence.index and other.cached >= tokens:
                return other.blocks, tokens, other.rows
        return self._prefix_blocks, kept, []

    def _keep_prefix(self) -> None:
        """Hold the common prefix from the step that computes it, while samples may need it."""
        owner = self._prefix_owner
        if owner is not None and owner.cached >= self._prefix:
            self._prefix_owner = None
            self._prefix_blocks = owner.blocks[: -(-self._prefix // self._block_size)]
            for block in self._prefix_blocks:
                self.pool.share(block)
        if not self._waiting:
            self._drop_prefix()

    def _drop_prefix(self) -> bool:
        """Drop the prefix; return whether it was held."""
        held, self._prefix_blocks = self._prefix_blocks, []
        for block in held:
            self.pool.release(block)
        return bool(held)

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        stop = min(len(sequence.tokens), sequence.cached + budget)
        chunks.append(Chunk(sequence=sequence, start=sequence.cached, stop=stop))
        return stop - sequence.cached


def sampled(plan: StepPlan, scheduler: Scheduler) -> tuple[list[Sequence], list[int]]:
    """List the samples that get a token from this step, and the row of logits of each.

    A prompt's last row serves its sample and the followers, which share its blocks from now on.
    """
    samples = list(plan.decodes)
    rows = list(range(len(samples)))
    row = len(samples)
    for chunk in plan.chunks:
        if not chunk.is_last:
            continue
        group = [chunk.sequence, *scheduler.fork(chunk.sequence)]
        samples += group
        rows += [row] * len(group)
        row += 1
    return samples, rows
