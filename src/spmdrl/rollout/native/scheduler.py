"""`Scheduler`: decides the tokens of the next engine step, and the blocks of their keys and values.

Continuous batching: every running sample decodes one token per step; prompts are computed in
chunks in the same steps, up to a token budget. Decisions are pure Python on the host and depend
only on the requests and the tokens, so that tensor-parallel ranks take the same ones.

A step looks at the decoding samples that need another block, and at those that begin or end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.running import Running
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.shared_prefix import SharedPrefix
from spmdrl.rollout.native.step_plan import Chunk, StepPlan


class Scheduler:
    """Queues of samples over one block pool.

    Args:
        samples: first samples of the requests (the others are their followers), served in this
            order. Each must fit into the pool on its own.
        prefix: number of tokens with which all prompts begin; the first sample computes them once,
            and they are shared.
        max_running: most samples that hold blocks of their own at a time.
        prefill_tokens: most prompt tokens per step.
        slots: slots of recurrent layers' states, if the model has any. Shared ones are copied
            before they are written, as blocks are.
        settle: function that is told of a sample which decodes no longer, before anything reads
            its tokens.
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
        slots: BlockPool | None = None,
        settle: Callable[[Sample], None] = lambda sample: None,
    ) -> None:
        self.pool, self.slots = pool, slots
        self.running = Running(block_size, settle)
        self._ready: deque[Sample] = deque()  # prompt computed and shared, first token drawn
        self._waiting: deque[Sample] = deque(samples)  # to be computed from their first token
        self._parked: list[Sample] = []  # wait for the answers to their turns
        self._answered: deque[Sample] = deque()  # have tokens that follow those in their blocks
        self._block_size = block_size
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        owner = next(iter(self._waiting), None)
        self._prefix = SharedPrefix(prefix, owner, pool, block_size, slots)
        self._slot_copies: dict[Sample, tuple[int, int]] = {}
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        return self.has_step or bool(self._parked)

    @property
    def has_step(self) -> bool:
        """Whether some sample does not wait for an answer."""
        return bool(self.running or self._ready or self._waiting or self._answered)

    @property
    def prefix(self) -> int:
        """Number of tokens with which all prompts begin and which are computed once."""
        return self._prefix.length

    @property
    def parked(self) -> Sequence[Sample]:
        """Samples that wait for the answers to their turns."""
        return self._parked

    def plan(self) -> StepPlan:
        """Plan the next step. Its chunks and decodes count as cached from now on."""
        copies: dict[Sample, tuple[int, int]] = {}
        self._slot_copies = {}
        self._plan_decodes(copies)
        budget = self._prefill_tokens
        chunks: list[Chunk] = []
        for sample in self.running.computing:
            if budget and self._own_slot(sample):
                budget -= self._take(sample, budget, chunks)
        decodes = self._start_ready(copies)
        budget = self._start_answered(budget, chunks, copies)
        while budget and self._waiting and not self._ready and self._has_room():
            if self._prefix.owner in self.running.samples:
                break  # until the prefix is computed
            if not self._admit(self._waiting[0], copies):
                if decodes or chunks or not self._evict():
                    break
                continue
            budget -= self._take(self._waiting.popleft(), budget, chunks)
        assert decodes or chunks, "the scheduler found nothing to do"
        for chunk in chunks:
            chunk.sample.cached = chunk.stop
        self.running.clock.steps += 1
        self._prefix.keep()
        if not self._waiting:
            self._prefix.drop()
        return StepPlan(
            copies=list(copies.values()),
            decodes=decodes,
            chunks=chunks,
            slot_copies=list(self._slot_copies.values()),
            moved=self.running.moved,
        )

    def fork(self, leader: Sample) -> list[Sample]:
        """Share the blocks of `leader`, whose prompt was computed, with its followers.

        Returns these; each must be given its first token (or be finished) before the next plan.
        """
        followers, leader.followers = leader.followers, []
        for follower in followers:
            self.pool.share(*leader.blocks)
            follower.blocks = list(leader.blocks)
            if self.slots is not None and leader.slot is not None:
                self.slots.share(leader.slot)
                follower.slot = leader.slot
            follower.cached = leader.cached
            follower.expert_rows = list(leader.expert_rows)
        self._ready.extend(followers)
        return followers

    def finish(self, sample: Sample) -> None:
        """Remove a complete sample and release its blocks."""
        self._remove(sample)
        self._release(sample)

    def park(self, sample: Sample) -> None:
        """Set a sample aside that waits for an answer; it keeps its blocks while nobody needs them.

        It may be one that was waiting before the first step, and has none.
        """
        self._remove(sample)
        self._parked.append(sample)

    def resume(self, sample: Sample) -> None:
        """Let a parked sample continue with the tokens that it was given."""
        self._parked.remove(sample)
        if sample.blocks:
            self._answered.append(sample)
        else:  # they were needed: it is computed again
            self._waiting.appendleft(sample)

    def restart(self, sample: Sample) -> None:
        """Compute a parked sample again, whose tokens have changed."""
        self._release(sample)
        self.resume(sample)

    def _remove(self, sample: Sample) -> None:
        if sample.order >= 0:
            self.running.leave(sample)
            return
        for queue in (self._ready, self._parked):
            if sample in queue:
                queue.remove(sample)
                return

    def state(self, number: Mapping[Sample, int]) -> dict[str, Any]:
        """Return JSON values from which `restore` makes an equal scheduler; samples by `number`."""
        return {
            "pool": self.pool.state(),
            "slots": None if self.slots is None else self.slots.state(),
            "running": [number[s] for s in self.running.samples],
            "ready": [number[s] for s in self._ready],
            "waiting": [number[s] for s in self._waiting],
            "parked": [number[s] for s in self._parked],
            "answered": [number[s] for s in self._answered],
            **self._prefix.state(number),
            "num_preempted": self.num_preempted,
        }

    def restore(self, state: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """Adopt the `state()` of another scheduler."""
        self.pool.restore(state["pool"])
        if self.slots is not None:
            self.slots.restore(state["slots"])
        for i in state["running"]:
            self.running.enter(samples[i])
        self._ready = deque(samples[i] for i in state["ready"])
        self._waiting = deque(samples[i] for i in state["waiting"])
        # which checkpoints of 0.2 and before lack
        self._parked = [samples[i] for i in state.get("parked", ())]
        self._answered = deque(samples[i] for i in state.get("answered", ()))
        self._prefix.restore(state, samples)
        self.num_preempted = state["num_preempted"]

    def _has_room(self) -> bool:
        return len(self.running) < self._max_running

    def _plan_decodes(self, copies: dict[Sample, tuple[int, int]]) -> None:
        """Reserve a slot for the newest token of every decoding sample, oldest first."""
        for sample in self.running.due():
            if sample.order < 0:
                continue  # it was preempted for an older one
            while not self._reserve(sample, copies):
                victim = self._preempt(copies)
                if victim is sample:
                    break
            else:
                self.running.decode(sample)

    def _start_ready(self, copies: dict[Sample, tuple[int, int]]) -> list[Sample]:
        """Let samples decode whose prompt was computed; returns all samples that decode."""
        while self._ready and self._has_room():
            sample = self._ready.popleft()
            if self._reserve(sample, copies):
                self.running.enter(sample)
                self.running.decode(sample)
            elif self._prefix.drop():
                self._ready.appendleft(sample)
            elif self.running or not self._ready:
                self._ready.appendleft(sample)
                break
            else:
                self._preempt(copies)
                self._ready.appendleft(sample)
        return self.running.seated()

    def _start_answered(
        self, budget: int, chunks: list[Chunk], copies: dict[Sample, tuple[int, int]]
    ) -> int:
        """Compute the tokens that answered samples were given; returns what is left of `budget`."""
        while budget and self._answered and self._has_room():
            sample = self._answered[0]
            if not self._extend(sample, copies):
                if self._prefix.drop() or self._evict():
                    continue
                if self.running or chunks:
                    break
                self._release(sample)  # it is computed again, with as many blocks as there are
                self._waiting.appendleft(self._answered.popleft())
                continue
            self.running.enter(self._answered.popleft())
            budget -= self._take(sample, budget, chunks)
        return budget

    def _extend(self, sample: Sample, copies: dict[Sample, tuple[int, int]]) -> bool:
        """Give a sample blocks for all its tokens after those that it has; False if too few are
        free.
        """
        size, number = self._block_size, sample.cached // self._block_size
        needed = -(-len(sample.tokens) // size) - len(sample.blocks)
        is_shared = number < len(sample.blocks) and self.pool.is_shared(sample.blocks[number])
        spare = 1 if self.running else 0
        if needed + is_shared + spare > self.pool.num_free or not self._own_slot(sample):
            return False
        if is_shared:
            fresh = self.pool.allocate()
            copies[sample] = (sample.blocks[number], fresh)
            self.pool.release(sample.blocks[number])
            sample.blocks[number] = fresh
        sample.blocks += [self.pool.allocate() for _ in range(needed)]
        return True

    def _evict(self) -> bool:
        """Take the blocks of the sample that was parked last; False if none has any."""
        for sample in reversed(self._parked):
            if sample.blocks:
                self._release(sample)
                self.num_preempted += 1
                return True
        return False

    def _reserve(self, sample: Sample, copies: dict[Sample, tuple[int, int]]) -> bool:
        """Give the sample a block for the token at `cached`, and a slot, both its own; False
        if none is free.
        """
        if not self._own_slot(sample):
            return False
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

    def _own_slot(self, sample: Sample) -> bool:
        """Give the sample a slot that no other has, with the same states; False if none is free."""
        if self.slots is None or (
            sample.slot is not None and not self.slots.is_shared(sample.slot)
        ):
            return True
        if not self.slots.num_free:
            return False
        fresh = self.slots.allocate()
        if sample.slot is not None:
            self._slot_copies[sample] = (sample.slot, fresh)
            self.slots.release(sample.slot)
        sample.slot = fresh
        return True

    def _preempt(self, copies: dict[Sample, tuple[int, int]]) -> Sample | None:
        """Take the blocks of the youngest sample; it is computed again later.

        Returns None if the kept prefix was dropped, or a parked sample's blocks, instead.
        """
        if self._prefix.drop() or self._evict():
            return None
        if self._ready:
            victim = self._ready.pop()
        else:
            victim = self.running.samples[-1]
            self.running.leave(victim)
        copies.pop(victim, None)
        self._slot_copies.pop(victim, None)
        self._release(victim)
        self._waiting.appendleft(victim)
        self.num_preempted += 1
        return victim

    def _release(self, sample: Sample) -> None:
        self.pool.release(*sample.blocks)
        sample.blocks, sample.cached = [], 0
        if self.slots is not None and sample.slot is not None:
            self.slots.release(sample.slot)
            sample.slot = None

    def _admit(self, sample: Sample, copies: dict[Sample, tuple[int, int]]) -> bool:
        """Give a waiting sample blocks for all its tokens; False if it must keep waiting."""
        size = self._block_size
        source, cached, rows = self._find_prefix(sample)
        full = cached // size
        needed = -(-len(sample.tokens) // size) - full
        # Keep room for its first tokens, or it would be preempted at once.
        spare = 1 + len(sample.followers) if self.running else 0
        if needed + spare > self.pool.num_free or not self._has_slots(sample):
            return not self.running and self._prefix.drop() and self._admit(sample, copies)
        self.pool.share(*source[:full])
        sample.blocks = source[:full] + [self.pool.allocate() for _ in range(needed)]
        if cached % size:
            copies[sample] = (source[full], sample.blocks[full])
        sample.cached = cached
        if self.slots is not None:
            if cached and self._prefix.slot is not None:
                self.slots.share(self._prefix.slot)
                sample.slot = self._prefix.slot
            self._own_slot(sample)
        sample.expert_rows += rows[len(sample.expert_rows) : cached]
        self.running.enter(sample)
        return True

    def _has_slots(self, sample: Sample) -> bool:
        """Whether a slot is free for a waiting sample, and for each running sample that will write
        to its own while others have it: those of its prompt, or the common prefix.
        """
        if self.slots is None:
            return True
        computing = [*self.running.computing, sample]
        shared = sum(bool(s.followers) + (s is self._prefix.owner) for s in computing)
        return self.slots.num_free > shared

    def _find_prefix(self, sample: Sample) -> tuple[list[int], int, list[int]]:
        """Find first tokens of a sample that were computed before: their blocks, their number, and
        their `rows` if another sample of the request computed them.

        A preempted sample may find the prompt's full blocks with another sample of its request, but
        not the states of recurrent layers after them; fresh requests find the common prefix of all
        prompts. A part that does not begin with the prompt is computed from its first token.
        """
        if sample.parts:
            return [], 0, []
        if self.slots is not None:
            return self._prefix.blocks, self._prefix.cached, []
        # At least one prompt token is computed, because the last one's row is needed.
        tokens = (sample.prompt_length - 1) // self._block_size * self._block_size
        for other in self.running.samples if tokens > self._prefix.cached else ():
            if other.index == sample.index and other.cached >= tokens and not other.parts:
                return other.blocks, tokens, other.expert_rows
        return self._prefix.blocks, self._prefix.cached, []

    def _take(self, sample: Sample, budget: int, chunks: list[Chunk]) -> int:
        stop = min(len(sample.tokens), sample.cached + budget)
        stop = self._prefix.stop_of(sample, stop)
        chunks.append(Chunk(sample=sample, start=sample.cached, stop=stop))
        return stop - sample.cached
