"""Which prompts a step draws."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdrl.data.order import MixedStream, PromptStream, permutation, seats


@st.composite
def streams(draw):
    num_prompts = draw(st.integers(1, 60))
    return PromptStream(
        seed=draw(st.integers(-(2**63), 2**63)),
        num_prompts=num_prompts,
        prompts_per_step=draw(st.integers(1, num_prompts)),
        shuffle=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(0, 5))
def test_an_epoch_repeats_nothing(stream, epoch):
    first = epoch * stream.steps_per_epoch
    steps = range(first, first + stream.steps_per_epoch)
    drawn = [stream.indices(step) for step in steps]
    flat = [i for indices in drawn for i in indices]
    assert all(len(indices) == stream.prompts_per_step for indices in drawn)
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(stream.num_prompts))
    assert stream.num_prompts - len(flat) < stream.prompts_per_step
    assert {stream.epoch(step) for step in steps} == {epoch}


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(0, 100))
def test_refills_draw_every_other_prompt_once(stream, step):
    drawn = list(stream.indices(step))
    attempt = 0
    while refill := stream.indices(step, attempt := attempt + 1):
        drawn += refill
    assert sorted(drawn) == list(range(stream.num_prompts))
    assert stream.indices(step, attempt + 1) == []


@settings(max_examples=30, deadline=None)
@given(streams(), st.integers(0, 100), st.integers(0, 3))
def test_a_resumed_stream_draws_the_same(stream, step, attempt):
    again = PromptStream(**vars(stream))
    assert again.indices(step, attempt) == stream.indices(step, attempt)


def test_epochs_seeds_and_leftovers_differ():
    stream = PromptStream(seed=0, num_prompts=100, prompts_per_step=8)
    assert stream.steps_per_epoch == 12
    epochs = [[i for s in range(12) for i in stream.indices(12 * e + s)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(epochs[0]) != set(epochs[1])
    other = PromptStream(seed=1, num_prompts=100, prompts_per_step=8)
    assert other.indices(0) != stream.indices(0)
    plain = PromptStream(seed=0, num_prompts=100, prompts_per_step=8, shuffle=False)
    assert plain.indices(13) == list(range(8, 16))


def test_the_order_is_fixed_for_good():
    """A resume with another version of numpy must draw the same."""
    assert permutation(10, 7, 0, 3).tolist() == [7, 5, 3, 6, 0, 8, 9, 2, 4, 1]


def test_permutations_are_even():
    """Each of 10 items comes first in a tenth of 5,000 permutations (sigma is 21)."""
    firsts = np.bincount([permutation(10, 0, 0, e)[0] for e in range(5000)], minlength=10)
    assert abs(firsts - 500).max() < 100


@pytest.mark.parametrize("per_step", [0, 6])
def test_a_step_larger_than_the_data_is_refused(per_step):
    with pytest.raises(ValueError, match=f"a step draws {per_step} prompts, the data have 5"):
        PromptStream(seed=0, num_prompts=5, prompts_per_step=per_step)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 400), st.integers(1, 9)
)
def test_seats_are_shared_by_weight_and_never_lost(weights, total, more):
    counts, later = seats(weights, total), seats(weights, total + more)
    assert sum(counts) == total and sum(later) == total + more
    assert all(a <= b for a, b in zip(counts, later, strict=True))
    # one by one, the definition of the method
    slow = [0] * len(weights)
    shares = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    for _ in range(total):
        priorities = [s / (2 * c + 1) for s, c in zip(shares, slow, strict=True)]
        slow[priorities.index(max(priorities))] += 1
    assert counts == slow


def test_a_mix_keeps_shares_and_epochs_of_each_source():
    stream = MixedStream(seed=5, sizes=(30, 12), weights=(3.0, 1.0), prompts_per_step=6)
    drawn = [stream.indices(step) for step in range(40)]
    assert all(len(indices) == 6 for indices in drawn)
    flat = [i for indices in drawn for i in indices]
    first, second = [i for i in flat if i < 30], [i - 30 for i in flat if i >= 30]
    assert len(first) == 180 and len(second) == 60
    for sequence, size in ((first, 30), (second, 12)):
        epochs = [sequence[at : at + size] for at in range(0, len(sequence), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    # a step's draw is a function of the step alone
    assert MixedStream(**vars(stream)).indices(23) == drawn[23]
    assert MixedStream(**{**vars(stream), "seed": 6}).indices(23) != drawn[23]


def test_a_mix_refills_from_what_the_step_left():
    stream = MixedStream(seed=1, sizes=(10, 8), weights=(1.0, 1.0), prompts_per_step=4)
    drawn = [stream.indices(7, attempt) for attempt in range(6)]
    flat = [i for indices in drawn for i in indices]
    assert len(set(flat)) == len(flat) == 18
    assert [sum(i < 10 for i in indices) for indices in drawn[:4]] == [2, 2, 2, 2]


def test_some_of_a_refill_are_of_every_source_by_its_weight():
    """As flows use it: the first items of a refill replace the groups without signal."""
    stream = MixedStream(
        seed=5, sizes=(400, 400, 300), weights=(2.0, 1.0, 1.0), prompts_per_step=64
    )
    refills = [stream.indices(step, 1)[:20] for step in range(60)]
    flat = np.array([i for indices in refills for i in indices])
    shares = [(flat < 400).mean(), ((flat >= 400) & (flat < 800)).mean(), (flat >= 800).mean()]
    assert np.allclose(shares, [0.5, 0.25, 0.25], atol=0.04)
    single = np.array([stream.indices(step, 2)[0] for step in range(200)])
    assert 0.35 < (single < 400).mean() < 0.65
    assert MixedStream(**vars(stream)).indices(7, 1) == stream.indices(7, 1)
    assert stream.indices(7, 1) != sorted(stream.indices(7, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, 0.0)}, "weights="),
        ({"weights": (1.0,)}, "2 sources with 1 weights"),
        ({"sizes": (10, 2)}, "source 1 has 2 items"),
    ],
)
def test_a_bad_mix_is_refused(changes, message):
    good = {"seed": 0, "sizes": (10, 10), "weights": (1.0, 1.0), "prompts_per_step": 4}
    with pytest.raises(ValueError, match=message):
        MixedStream(**{**good, **changes})
