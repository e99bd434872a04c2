"""`Scheduler`: decides the tokens of the next engine step, and the blocks of their keys and values.

Continuous batching: every running sample decodes one token per step; prompts are computed in
chunks in the same steps, up to a token budget. Decisions are pure Python on the host and depend
only on the requests and the tokens, so that tensor-parallel ranks take the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.shared_prefix import SharedPrefix


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
        decodes: samples that compute their newest token.
        chunks: parts of prompts (or of preempted samples) to compute.
    """

    copies: list[tuple[int, int]]
    decodes: list[Sample]
    chunks: list[Chunk]


class Scheduler:
    """Queues of samples over one block pool.

    Args:
        samples: first samples of the requests (the others are their followers), served in this
            order. Each must fit into the pool on its own.
        prefix: number of tokens with which all prompts begin; the first sample computes them once,
            and they are shared.
        max_running: most samples that hold blocks of their own at a time.
        prefill_tokens: most prompt tokens per step.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        pool: BlockPool,
        *,
        block_size: int,
        max_running: int,
        prefill_tokens: int,
        prefix: int = 0,
    ) -> None:
        self.pool = pool
        self.running: list[Sample] = []  # oldest first
        self._ready: deque[Sample] = deque()  # prompt computed and shared, first token drawn
        self._waiting: deque[Sample] = deque(samples)  # to be computed from their first token
        self._block_size = block_size
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        owner = next(iter(self._waiting), None)
        self._prefix = SharedPrefix(prefix, owner, pool, block_size)
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._ready or self._waiting)

    def plan(self) -> StepPlan:
        """Plan the next step. Its chunks and decodes count as cached from now on."""
        copies: dict[Sample, tuple[int, int]] = {}
        decodes = self._plan_decodes(copies)
        budget = self._prefill_tokens
        chunks: list[Chunk] = []
        for sample in self.running:
            if budget and not sample.is_decoding:
                budget -= self._take(sample, budget, chunks)
        self._start_ready(decodes, copies)
        while budget and self._waiting and not self._ready and self._has_room():
            if self._prefix.owner in self.running:
                break  # until the prefix is computed
            if not self._admit(self._waiting[0], copies):
                break
            budget -= self._take(self._waiting.popleft(), budget, chunks)
        assert decodes or chunks, "the scheduler found nothing to do"
        for chunk in chunks:
            chunk.sample.cached = chunk.stop
        for sample in decodes:
            sample.cached += 1
        self._prefix.keep()
        if not self._waiting:
            self._prefix.drop()
        return StepPlan(copies=list(copies.values()), decodes=decodes, chunks=chunks)

    def fork(self, leader: Sample) -> list[Sample]:
        """Share the blocks of `leader`, whose prompt was computed, with its followers.

        Returns these; each must be given its first token (or be finished) before the next plan.
        """
        followers, leader.followers = leader.followers, []
        for follower in followers:
            self.pool.share(*leader.blocks)
            follower.blocks = list(leader.blocks)
            follower.cached = leader.cached
            follower.expert_rows = list(leader.expert_rows)
        self._ready.extend(followers)
        return followers

    def finish(self, sample: Sample) -> None:
        """Remove a complete sample and release its blocks."""
        if sample in self.running:
            self.running.remove(sample)
        else:
            self._ready.remove(sample)
        self._release(sample)

    def state(self, number: Mapping[Sample, int]) -> dict[str, Any]:
        """Return JSON values from which `restore` makes an equal scheduler; samples by `number`."""
        return {
            "pool": self.pool.state(),
            "running": [number[s] for s in self.running],
            "ready": [number[s] for s in self._ready],
            "waiting": [number[s] for s in self._waiting],
            **self._prefix.state(number),
            "num_preempted": self.num_preempted,
        }

    def restore(self, state: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """Adopt the `state()` of another scheduler."""
        self.pool.restore(state["pool"])
        self.running = [samples[i] for i in state["running"]]
        self._ready = deque(samples[i] for i in state["ready"])
        self._waiting = deque(samples[i] for i in state["waiting"])
        self._prefix.restore(state, samples)
        self.num_preempted = state["num_preempted"]

    def _has_room(self) -> bool:
        return len(self.running) < self._max_running

    def _plan_decodes(self, copies: dict[Sample, tuple[int, int]]) -> list[Sample]:
        """Reserve a slot for the newest token of every decoding sample, oldest first."""
        decodes = []
        i = 0
        while i < len(self.running):
            sample = self.running[i]
            i += 1
            if not sample.is_decoding:
                continue
            while not self._reserve(sample, copies):
                victim = self._preempt(copies)
                if victim is sample:
                    break
            else:
                decodes.append(sample)
        return decodes

    def _start_ready(self, decodes: list[Sample], copies: dict[Sample, tuple[int, int]]) -> None:
        while self._ready and self._has_room():
            sample = self._ready.popleft()
            while not self._reserve(sample, copies):
                if self._prefix.drop():
                    continue
                if self.running or not self._ready:
                    self._ready.appendleft(sample)
                    return
                self._preempt(copies)
            self.running.append(sample)
            decodes.append(sample)

    def _reserve(self, sample: Sample, copies: dict[Sample, tuple[int, int]]) -> bool:
        """Give the sample a block of its own for the token at `cached`; False if none is free."""
        number = sample.cached // self._block_size
        if number < len(sample.blocks):
            block = sample.blocks[number]
            if not self.pool.is_shared(block):
                return True
        if not self.pool.num_free:
            return False
        fresh = self.pool.allocate()
        if number == len(sample.blocks):
            sample.blocks.append(fresh)
            return True
        copies[sample] = (block, fresh)
        self.pool.release(block)
        sample.blocks[number] = fresh
        return True

    def _preempt(self, copies: dict[Sample, tuple[int, int]]) -> Sample | None:
        """Take the blocks of the youngest sample; it is computed again later.

        Returns None if the kept prefix was dropped instead.
        """
        if self._prefix.drop():
            return None
        victim = self._ready.pop() if self._ready else self.running.pop()
        copies.pop(victim, None)
        self._release(victim)
        self._waiting.appendleft(victim)
        self.num_preempted += 1
        return victim

    def _release(self, sample: Sample) -> None:
        self.pool.release(*sample.blocks)
        sample.blocks, sample.cached = [], 0

    def _admit(self, sample: Sample, copies: dict[Sample, tuple[int, int]]) -> bool:
        """Give a waiting sample blocks for all its tokens; False if it must keep waiting."""
        size = self._block_size
        source, cached, rows = self._find_prefix(sample)
        full = cached // size
        needed = -(-len(sample.tokens) // size) - full
        # Keep room for its first tokens, or it would be preempted at once.
        spare = 1 + len(sample.followers) if self.running else 0
        if needed + spare > self.pool.num_free:
            return not self.running and self._prefix.drop() and self._admit(sample, copies)
        self.pool.share(*source[:full])
        sample.blocks = source[:full] + [self.pool.allocate() for _ in range(needed)]
        if cached % size:
            copies[sample] = (source[full], sample.blocks[full])
        sample.cached = cached
        sample.expert_rows += rows[len(sample.expert_rows) : cached]
        self.running.append(sample)
        return True

    def _find_prefix(self, sample: Sample) -> tuple[list[int], int, list[int]]:
        """Find first tokens of a sample that were computed before: their blocks, their number, and
        their `rows` if another sample of the request computed them.

        A preempted sample may find the prompt's full blocks with another sample of its request;
        fresh requests find the common prefix of all prompts.
        """
        # At least one prompt token is computed, because the last one's row is needed.
        tokens = (sample.prompt_length - 1) // self._block_size * self._block_size
        for other in self.running if tokens > self._prefix.cached else ():
            if other.index == sample.index and other.cached >= tokens:
                return other.blocks, tokens, other.expert_rows
        return self._prefix.blocks, self._prefix.cached, []

    def _take(self, sample: Sample, budget: int, chunks: list[Chunk]) -> int:
        stop = min(len(sample.tokens), sample.cached + budget)
        chunks.append(Chunk(sample=sample, start=sample.cached, stop=stop))
        return stop - sample.cached


def sampled(plan: StepPlan, scheduler: Scheduler) -> tuple[list[Sample], list[int]]:
    """List the samples that get a token from this step, and the row of logits of each.

    A prompt's last row serves its sample and the followers, which share its blocks from now on.
    """
    samples = list(plan.decodes)
    rows = list(range(len(samples)))
    row = len(samples)
    for chunk in plan.chunks:
        if not chunk.is_last:
            continue
        group = [chunk.sample, *scheduler.fork(chunk.sample)]
        samples += group
        rows += [row] * len(group)
        row += 1
    return samples, rows
