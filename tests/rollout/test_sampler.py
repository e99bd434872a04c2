"""The sampler: frequencies, log-probabilities, truncation as in transformers, margins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from noise import gumbel
from spmdrl.keyed_random import key64, key_tensor
from spmdrl.rollout.native.sampler import Draws, Sampler, truncate
from spmdrl.rollout.protocol import MAX_SUPPORT, SamplingParams

CPU = torch.device("cpu")


def keys(count: int) -> list[int]:
    return [key64(21, i) for i in range(count)]


def draw(logits: Tensor, count: int, **params: Any) -> Draws:
    """`count` draws from one row of logits."""
    rows = logits.expand(count, -1).clone()
    sampler = Sampler(logits.shape[-1], CPU)
    return sampler.sample(rows, [SamplingParams(**params)] * count, keys(count))


def some_logits(rows: int, vocab: int, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4)) * scale


def kept_by_transformers(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Log-probabilities after transformers' warpers, in their order."""
    from transformers import generation

    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    scores = logits / temperature
    if top_k:
        scores = generation.TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = generation.TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = generation.MinPLogitsWarper(min_p)(ids, scores)
    return scores.log_softmax(-1)


CASES = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.3, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_logprobs_are_those_of_the_truncated_softmax(case: dict[str, Any]) -> None:
    logits = some_logits(1, 30)
    count = 20000
    draws = draw(logits, count, **case)
    expected = kept_by_transformers(logits, **case)[0]
    torch.testing.assert_close(draws.logprobs, expected[draws.tokens], rtol=0, atol=2e-6)
    counts = torch.bincount(draws.tokens, minlength=30).double()
    wanted = expected.double().exp() * count
    cells = wanted > 5
    chi2 = float(((counts - wanted)[cells] ** 2 / wanted[cells]).sum())
    dof = int(cells.sum()) - 1
    assert abs(chi2 - dof) < 4.5 * math.sqrt(2 * dof)
    assert bool((expected[draws.tokens] > -torch.inf).all())


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_truncation_looks_beyond_its_first_candidates_where_it_must(scale: float) -> None:
    logits = some_logits(3, 5000, scale)
    params = [
        SamplingParams(top_p=0.95),
        SamplingParams(min_p=0.9, temperature=2.0),
        SamplingParams(top_p=0.5, top_k=2000),
    ]
    draws = Sampler(5000, CPU).sample(logits.clone(), params, keys(3))
    for i, p in enumerate(params):
        case = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p}
        expected = kept_by_transformers(logits[i : i + 1], **case)
        token = draws.tokens[i]
        noise = gumbel(key_tensor(keys(3), CPU)[i : i + 1], 0, 5000)
        assert token == (expected + noise).argmax()
        if int((expected > -torch.inf).sum()) > MAX_SUPPORT:  # the kept mass is added back
            expected = (logits[i : i + 1] / p.temperature).log_softmax(-1)
        assert abs(draws.logprobs[i] - expected[0, token]) < 1e-5


@pytest.mark.parametrize("mine", [{"top_k": 20}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 400}])
@pytest.mark.parametrize("other", [{"top_k": 3000}, {"top_k": 7}, {"top_p": 0.999}, {}])
def test_ties_at_a_limit_do_not_depend_on_neighbours(
    mine: dict[str, Any], other: dict[str, Any]
) -> None:
    """In bfloat16 many logits are equal: the smaller ids are kept, whatever others ask for."""
    logits = some_logits(2, 4000).bfloat16().float()
    own, theirs = SamplingParams(**mine, support=True), SamplingParams(**other)
    rows = logits[:1].expand(200, -1)
    alone = Sampler(4000, CPU).sample(rows.clone(), [own] * 200, keys(200))
    mixed = torch.cat((rows, logits[1:]))
    beside = Sampler(4000, CPU).sample(mixed, [*[own] * 200, theirs], keys(201))
    assert torch.equal(alone.tokens, beside.tokens[:200])
    torch.testing.assert_close(alone.logprobs, beside.logprobs[:200], rtol=0, atol=1e-6)
    order = logits[0].sort(descending=True, stable=True).indices
    assert alone.support is not None
    count = int(alone.support.counts[0])
    if "top_k" in mine:
        assert count == (mine["top_k"] if mine["top_k"] <= MAX_SUPPORT else 0)
        assert set(alone.tokens.tolist()) <= set(order[: mine["top_k"]].tolist())
    if count:
        assert alone.support.values[:count].tolist() == order[:count].tolist()


def test_a_cumulative_probability_that_reaches_top_p_ends_there() -> None:
    """Halves and quarters: how a sum was rounded does not decide."""
    for vocab, top_p, kept in ((4, 0.5, 2), (8, 0.75, 6), (2, 0.5, 1), (64, 0.125, 8)):
        for temperature in (1.0, 0.7):
            found = draw(
                torch.full((1, vocab), 3.3), 300, top_p=top_p, temperature=temperature, support=True
            )
            assert found.tokens.unique().tolist() == list(range(kept))
            assert found.support is not None and found.support.counts.tolist() == [kept] * 300


def test_what_was_drawn_from_is_told_where_it_is_few() -> None:
    logits = some_logits(4, 1000)
    params = [
        SamplingParams(top_k=5, support=True),
        SamplingParams(support=True),
        SamplingParams(top_k=256, support=True),
        SamplingParams(top_k=257, support=True),
    ]
    draws = Sampler(1000, CPU).sample(logits.clone(), params, keys(4))
    assert draws.support is not None and draws.support.counts.tolist() == [5, 0, 256, 0]
    table = draws.support.padded(-1)
    for row, count in ((0, 5), (2, 256)):
        assert set(table[row, :count].tolist()) == set(logits[row].topk(count).indices.tolist())
    whole = logits.log_softmax(-1)
    assert abs(draws.logprobs[3] - whole[3, draws.tokens[3]]) < 1e-6


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    vocab = 50_000  # several chunks of rows on the CPU
    logits = some_logits(9, vocab)
    kinds = [{}, {"temperature": 0}, {"top_k": 40}, {"temperature": 0.5}, {"top_p": 0.9}]
    params = [SamplingParams(**kinds[i % len(kinds)]) for i in range(9)]
    together = Sampler(vocab, CPU).sample(logits.clone(), params, keys(9))
    for i in range(9):
        alone = Sampler(vocab, CPU).sample(logits[i : i + 1].clone(), [params[i]], [keys(9)[i]])
        assert alone.tokens[0] == together.tokens[i]
        assert abs(alone.logprobs[0] - together.logprobs[i]) < 1e-6


def test_truncation_that_cuts_nothing_draws_as_none_does() -> None:
    logits = some_logits(64, 400)
    plain = Sampler(400, CPU).sample(logits.clone(), [SamplingParams()] * 64, keys(64))
    wide = Sampler(400, CPU).sample(logits.clone(), [SamplingParams(top_k=400)] * 64, keys(64))
    assert torch.equal(plain.tokens, wide.tokens)
    torch.testing.assert_close(plain.logprobs, wide.logprobs, rtol=0, atol=2e-6)


def test_greedy_takes_the_largest_and_reports_its_softmax() -> None:
    logits = some_logits(5, 100)
    draws = Sampler(100, CPU).sample(
        logits.clone(), [SamplingParams(temperature=0, margins=True)] * 5, keys(5)
    )
    assert torch.equal(draws.tokens, logits.argmax(-1))
    expected = logits.log_softmax(-1).max(-1).values
    torch.testing.assert_close(draws.logprobs, expected, rtol=0, atol=1e-6)
    best = logits.topk(2).values
    torch.testing.assert_close(draws.margins, best[:, 0] - best[:, 1])


def test_margins_say_how_far_another_token_was() -> None:
    logits = some_logits(1, 30)
    draws = draw(logits, 200, margins=True)
    scores = logits + gumbel(key_tensor(keys(200), CPU), 0, 30)
    best = scores.topk(2).values
    torch.testing.assert_close(draws.margins, best[:, 0] - best[:, 1], rtol=1e-4, atol=1e-5)
    assert draw(logits, 1).margins.isinf().all()


def test_distances_to_the_limits() -> None:
    values = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def column(x: float) -> Tensor:
        return torch.tensor([[x]])

    def limits(top_k: int = 4, top_p: float = 1.0, min_p: float = 0.0) -> tuple[list[bool], float]:
        keep, distance = truncate(
            values, column(0.0), torch.tensor([top_k]), column(top_p), column(min_p)
        )
        return keep[0].tolist(), float(distance)

    assert limits() == ([True] * 4, math.inf)
    keep, distance = limits(top_k=2)
    assert keep == [True, True, False, False] and abs(distance - math.log(3 / 2)) < 1e-6
    keep, distance = limits(top_p=0.69)
    assert keep == [True, True, False, False] and abs(distance - 0.01) < 1e-6
    keep, distance = limits(min_p=0.45)
    assert keep == [True, True, True, False]
    assert abs(distance - math.log(0.2 / 0.18)) < 1e-6
    # top-p counts what top-k leaves: 4/7 and 3/7
    assert limits(top_k=2, top_p=0.55)[0] == [True, False, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-38),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.0),
        ("max_tokens", 0),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"SamplingParams\n{name}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("vocab", [1, 2, 64, 300, 1024, 5003])
@pytest.mark.parametrize("margins", [False, True])
def test_compiled_draws_are_torchs_to_the_bit(vocab: int, margins: bool) -> None:
    compiled, plain = Sampler(vocab, CPU), Sampler(vocab, CPU)
    if compiled._compiled is None:
        pytest.skip("no C compiler")
    plain._compiled = None
    logits = some_logits(70, vocab, 6.0)
    logits[3], logits[4, vocab // 2] = -torch.inf, torch.nan
    logits[5, : vocab // 2] = -torch.inf
    params = [SamplingParams(temperature=1 + i % 3, margins=margins) for i in range(70)]
    for seed in range(3):
        asked = keys(70 + seed)[seed:]
        found = [s.sample(logits.clone(), params, asked) for s in (compiled, plain)]
        for name in ("tokens", "logprobs", "margins"):
            one, other = (getattr(draws, name) for draws in found)
            finite = torch.ones(70, dtype=torch.bool)
            finite[3:5] = False
            assert torch.equal(one[finite], other[finite]), name
        for draws in found:
            assert draws.logprobs[3:5].isnan().all()
            assert ((draws.tokens >= 0) & (draws.tokens < vocab)).all()
