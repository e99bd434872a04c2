"""Slots of recurrent states: forks, common prefixes, chunks and preemptions of a toy engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from plain_loop import sampled
from torch import Tensor

from spmdrl.models.blocks.delta_layout import Segment
from spmdrl.models.blocks.delta_rule import DeltaInputs
from spmdrl.models.blocks.recurrence import SegmentRecurrence
from spmdrl.models.specs import GatedDelta
from spmdrl.rollout.native.attention import copy_blocks
from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.recurrent import (
    SPARE_SLOTS,
    RecurrentStates,
    StateShape,
    slots_needed,
)
from spmdrl.rollout.native.runner import flatten
from spmdrl.rollout.native.sample import Sample, leaders_of, samples_of
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.protocol import Finish, Request, SamplingParams

SPEC = GatedDelta(num_heads=2, num_v_heads=4, head_dim=8, v_dim=6, conv_size=4)
CHANNELS, VOCAB, BLOCK = 2 * 2 * 8 + 4 * 6, 31, 4


class Toy:
    """One recurrent layer between an embedding and a head, both random."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.mixed, self.weight = normal(VOCAB, CHANNELS), normal(CHANNELS, 4)
        self.decay, self.beta = -F.softplus(normal(VOCAB, 4)) * 0.1, normal(VOCAB, 4).sigmoid()
        self.head = normal(4 * 6, VOCAB)

    def inputs(self, tokens: Sequence[int]) -> DeltaInputs:
        at = torch.tensor(tokens)
        return DeltaInputs(
            mixed=self.mixed[at],
            conv_weight=self.weight,
            decay=self.decay[at],
            beta=self.beta[at],
            num_heads=2,
            head_dim=8,
        )

    def logits(self, out: Tensor) -> Tensor:
        return out.flatten(1) @ self.head

    def continued(self, prompt: Sequence[int], place: int, count: int) -> list[int]:
        """Generate from the whole sequence at each token."""
        tokens = list(prompt)
        for _ in range(count):
            recurrence = SegmentRecurrence([Segment(start=0, stop=len(tokens))])
            out = recurrence.recur(self.inputs(tokens))
            tokens.append(choose(self.logits(out)[-1], place))
        return tokens[len(prompt) :]


def choose(logits: Tensor, place: int) -> int:
    """Choose the token of rank `place`, so that samples of one prompt differ."""
    return int(logits.topk(place + 1).indices[place])


@dataclass
class Engine:
    """Engine steps as `NativeEngine` does them, with slots only."""

    toy: Toy
    num_blocks: int
    num_slots: int
    prefill: int = 7
    max_running: int = 4
    prefix: int = 0
    count: int = 6
    most_used: int = 0
    plans: list[StepPlan] = field(default_factory=list)

    def run(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        groups = [samples_of(r, i, seed=0, step=0) for i, r in enumerate(requests)]
        self.scheduler = Scheduler(
            leaders_of(groups),
            BlockPool(self.num_blocks),
            block_size=BLOCK,
            max_running=self.max_running,
            prefill_tokens=self.prefill,
            prefix=self.prefix,
            slots=BlockPool(self.num_slots),
        )
        shape = StateShape(
            layers={0: SPEC},
            num_slots=self.num_slots,
            tp_size=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.states = RecurrentStates(shape)
        for tensor in self.states.caches():
            tensor.fill_(torch.nan)  # what nobody wrote must not be read
        with torch.inference_mode():
            while self.scheduler.has_work:
                self.step()
        assert self.scheduler.slots is not None
        assert self.scheduler.slots.num_free == self.num_slots
        assert self.scheduler.pool.num_free == self.num_blocks
        return [[s.tokens[s.prompt_length :] for s in group] for group in groups]

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.plans.append(plan)
        samples, rows = sampled(plan, self.scheduler)
        copy_blocks(plan.slot_copies, self.states.caches())
        self.states.prepare(plan, self.states.indices(plan))
        tokens, _, read = flatten(plan)
        logits = self.toy.logits(self.states.recur(0, self.toy.inputs(tokens)))[read]
        assert self.scheduler.slots is not None
        self.most_used = max(self.most_used, self.num_slots - self.scheduler.slots.num_free)
        for sample, row in zip(samples, rows, strict=True):
            sample.tokens.append(choose(logits[row], sample.place))
            if sample.num_generated == self.count:
                sample.finish = Finish.LENGTH
                self.scheduler.finish(sample)


def requests_of(prompts: Sequence[Sequence[int]], samples: int) -> list[Request]:
    params = SamplingParams(max_tokens=6)
    return [
        Request(tokens=tuple(p), prompt_id=i, samples=tuple(range(samples)), sampling=params)
        for i, p in enumerate(prompts)
    ]


PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9] * 20, [3, 1, 4, 1, 5, 9, 2, 6, 5]]


def expected(toy: Toy, prompts: Sequence[Sequence[int]], samples: int) -> list[list[list[int]]]:
    return [[toy.continued(p, place, 6) for place in range(samples)] for p in prompts]


def test_steps_with_slots_generate_what_whole_sequences_do() -> None:
    toy = Toy()
    engine = Engine(toy, num_blocks=64, num_slots=slots_needed(12, 4))
    assert engine.run(requests_of(PROMPTS, 3)) == expected(toy, PROMPTS, 3)
    assert engine.scheduler.num_preempted == 0
    assert any(plan.slot_copies for plan in engine.plans)  # siblings forked
    assert any(chunk.start for plan in engine.plans for chunk in plan.chunks)


def test_few_slots_make_samples_wait() -> None:
    toy = Toy()
    for running in (1, 2):
        engine = Engine(toy, num_blocks=64, num_slots=running + SPARE_SLOTS, max_running=running)
        assert engine.run(requests_of(PROMPTS, 3)) == expected(toy, PROMPTS, 3)
        assert engine.most_used <= running + SPARE_SLOTS


def test_preempted_samples_compute_their_states_again() -> None:
    toy = Toy()
    engine = Engine(toy, num_blocks=9, num_slots=slots_needed(12, 4))
    assert engine.run(requests_of(PROMPTS, 3)) == expected(toy, PROMPTS, 3)
    assert engine.scheduler.num_preempted > 0


def test_prompts_continue_the_state_after_their_common_prefix() -> None:
    toy = Toy()
    prompts = [[5, 6, 7, 8, 9, 10, *prompt] for prompt in PROMPTS]
    for length in (6, 5, 4):
        engine = Engine(toy, num_blocks=64, num_slots=slots_needed(8, 4), prefix=length, prefill=50)
        assert engine.run(requests_of(prompts, 2)) == expected(toy, prompts, 2)
        first = engine.plans[0].chunks[0]
        assert (first.start, first.stop) == (0, length)
        starts = [chunk.start for plan in engine.plans for chunk in plan.chunks]
        assert starts.count(length) == len(prompts)  # nobody computed the prefix again


def test_padded_decodes_write_to_no_samples_slot() -> None:
    toy = Toy()
    [group] = [samples_of(requests_of([[1, 2]], 1)[0], 0, seed=0, step=0)]
    sample: Sample = group[0]
    sample.tokens, sample.cached, sample.slot = [1, 2, 3], 3, 1
    shape = StateShape(
        layers={0: SPEC},
        num_slots=2,
        tp_size=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    states = RecurrentStates(shape)
    plan = StepPlan(copies=[], decodes=[sample], chunks=[])
    states.prepare(plan, states.indices(plan, pad_to=3))
    states.recur(0, toy.inputs([3, 0, 0]))
    held = [tensor.flatten(1).abs().sum(1) > 0 for tensor in states.caches()]
    assert [slots.tolist() for slots in held] == [[False, True, True]] * 2
    assert shape.num_bytes == sum(tensor.nbytes for tensor in states.caches())
