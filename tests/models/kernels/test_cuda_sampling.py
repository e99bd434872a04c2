"""Sampling in Triton: its noise is the sampler's, its tokens are those of float64, and its compiled
code reads wide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_proofs as proofs
from spmdrl.keyed_random import Noise, exponential_at, key64, key_tensor, token_hash

pytestmark = pytest.mark.full  # the engine's own test runs them in every suite

MODULE = "spmdrl.models.kernels.cuda.sampling"
CPU = torch.device("cpu")
ONE = torch.ones(())
Run = Callable[..., Any]


def compare_noise() -> None:
    from kernel_noise import noise

    for key in (key64(1, 2, 3), 0, -1, 2**63 - 1, -(2**63), 1 << 32, 0xFFFFFFFF):
        for start in (0, 1 << 20):
            found = noise(key_tensor([key], CPU), start, 1 << 15)
            own = Noise(start, 1 << 15, CPU).exponential(key_tensor([key], CPU))[0]
            # the same bits; log1p to a few units in the last place
            torch.testing.assert_close(found, own, rtol=4e-7, atol=0)


def compare_logs() -> None:
    from kernel_noise import logs

    by_size = torch.logspace(-9.4, 0, 1 << 14, dtype=torch.float64).float().clamp(max=1)
    by_place = torch.linspace(0, 1, 1 << 14)
    edges = torch.tensor([0, 2.0**-31, 2.0**-25, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0])
    near = 1 - 0.5 ** (torch.arange(25) / 2)  # where the reduction changes
    edges = torch.cat([edges, near, near.nextafter(ONE), near.nextafter(-ONE)])
    for u in (by_size, by_place, torch.nn.functional.pad(edges, (0, 128 - len(edges)))):
        u = u.clamp(0, 1)
        # what is sampled are multiples of 2^-31
        expected = -torch.log1p(-u.double())
        torch.testing.assert_close(logs(u).double(), expected, rtol=4e-7, atol=1e-40)


def test_the_noise_is_the_samplers(interpreted: Run) -> None:
    interpreted(compare_noise)
    interpreted(compare_logs)


def reference(
    logits: Tensor, keys: Tensor, temperatures: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and margins in float64, from the noise in float32."""
    greedy = temperatures == 0
    tempered = logits[rows.long()].float() / torch.where(greedy, 1, temperatures)[:, None]
    whole = tempered.double()
    noise = exponential_at(keys, token_hash(torch.arange(logits.shape[1]))[None])
    scores = whole - torch.where(greedy[:, None], 0, noise.double().log())
    tokens = (scores == scores.amax(1, keepdim=True)).int().argmax(1)
    logprobs = whole.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    if logits.shape[1] == 1:
        return tokens, logprobs, torch.full_like(logprobs, torch.inf)
    best = scores.topk(2, dim=1).values
    return tokens, logprobs, best[:, 0] - best[:, 1]


def case(
    vocabulary: int, size: float = 3.0, dtype: torch.dtype = torch.float32, rows: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw logits, and two draws from each row but the last: one at its temperature, one greedy."""
    random = torch.Generator().manual_seed(vocabulary)
    wide = torch.randn(rows, vocabulary + 16, generator=random) * size
    logits = wide.to(dtype)[:, :vocabulary]  # the next row's logits lie close behind
    row = torch.arange(rows).repeat(2)[:-1].to(torch.int32)
    temperatures = torch.tensor([1.0, 0.7, 1.0, 1.3, 0.1, 5.0])[row.long() % 6]
    temperatures[rows:] = 0
    return logits, key_tensor((key64(i) for i in range(len(row))), CPU), temperatures, row


def compare(arguments: tuple[Tensor, ...], tolerance: float = 4e-6, draw: Any = None) -> None:
    if draw is None:
        from spmdrl.models.kernels.cuda.sampling import draw_tokens as draw
    before = arguments[0].clone()
    tokens, logprobs, margins = draw(*arguments)
    assert tokens.dtype == torch.int64 and logprobs.dtype == margins.dtype == torch.float32
    assert torch.equal(arguments[0], before)
    own = reference(*arguments)
    clear = own[2] > 1e-5
    assert clear.sum() >= len(tokens) - 1, own[2]  # at most a greedy tie
    assert torch.equal(tokens[clear], own[0][clear]), (tokens, own)
    torch.testing.assert_close(logprobs[clear].double(), own[1][clear], rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(margins.double(), own[2], rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("vocabulary", [1, 2, 16, 1000, 4096, 4097, 20000])
def test_vocabularies(interpreted: Run, vocabulary: int) -> None:
    interpreted(compare, case(vocabulary))
    interpreted(compare, case(vocabulary, rows=1))


def test_halves(interpreted: Run) -> None:
    # bfloat16 logits of this size are often equal; greedy ties are told by their ids
    interpreted(compare_ties, case(5000, size=8.0, dtype=torch.bfloat16))
    interpreted(compare_ties, case(5000, size=8.0, dtype=torch.float16))


def compare_ties(arguments: tuple[Tensor, ...]) -> None:
    from spmdrl.models.kernels.cuda.sampling import draw_tokens

    tokens, _, margins = draw_tokens(*arguments)
    own = reference(*arguments)
    exact = (own[2] > 1e-5) | (arguments[2] == 0)
    assert torch.equal(tokens[exact], own[0][exact]), (tokens, own)
    torch.testing.assert_close(margins.double(), own[2], rtol=1e-6, atol=4e-6)


def test_large_logits(interpreted: Run) -> None:
    """Logits of 1e4 and 1e30 keep their differences; some are left out by -inf."""
    logits, *rest = case(6000, size=1e4)
    interpreted(compare, (logits, *rest), 1e-3)
    logits, *rest = case(6000)
    interpreted(compare_ties, (logits + 1e5, *rest))
    logits[:, 100:5000] = -torch.inf
    logits[0, 0] = -torch.inf
    interpreted(compare, (logits, *rest))
    only = torch.full_like(logits, -torch.inf)
    only[:, 5500] = logits[:, 5500]
    interpreted(compare_only, (only, *rest))


def compare_only(arguments: tuple[Tensor, ...]) -> None:
    """One token has a logit: it is drawn, with a probability of 1."""
    from spmdrl.models.kernels.cuda.sampling import draw_tokens

    tokens, logprobs, margins = draw_tokens(*arguments)
    assert (tokens == 5500).all() and (logprobs.abs() < 1e-6).all() and margins.isinf().all()


def not_finite(arguments: tuple[Tensor, ...]) -> None:
    from spmdrl.models.kernels.cuda.sampling import draw_tokens

    logits, *rest = arguments
    for value in (torch.nan, torch.inf):
        bad = logits.clone()
        bad[1, 4200] = value
        found = draw_tokens(bad, *rest)
        assert found[1][rest[2] == 1].isfinite().tolist().count(False) <= 2
        assert found[1][rest[-1] == 1].isnan().all() and found[1][rest[-1] != 1].isfinite().all()
        assert ((found[0] >= 0) & (found[0] < logits.shape[1])).all()
    bad = logits.clone()
    bad[1] = -torch.inf
    assert draw_tokens(bad, *rest)[1][rest[-1] == 1].isnan().all()
    assert not len(draw_tokens(logits, *(x[:0] for x in rest))[0])


def test_what_is_not_finite_stays_seen(interpreted: Run) -> None:
    interpreted(not_finite, case(5000))


def compare_with_sampler() -> None:
    """Hold tokens, log-probabilities and margins to the engine's sampler in torch.

    Tokens are equal, but where the sampler's own lead is within its rounding: it orders quotients
    of probabilities, the kernel sums of logarithms. Log-probabilities and leads of some nats are
    within 2e-5: a few units in the last place of logits of up to 130, over a temperature of 0.1.
    """
    from spmdrl.models.kernels.cuda.sampling import draw_tokens
    from spmdrl.rollout.native.sampler import Sampler
    from spmdrl.rollout.protocol import SamplingParams

    logits, keys, temperatures, rows = case(8192, rows=40)
    before = logits.clone()
    tokens, logprobs, margins = draw_tokens(logits, keys, temperatures, rows)
    assert torch.equal(logits, before)
    sampler = Sampler(8192, CPU)
    parts = []
    for own in (slice(40), slice(40, None)):  # sampled rows, and greedy ones of the same logits
        params = [SamplingParams(temperature=t, margins=True) for t in temperatures.tolist()[own]]
        parts.append(sampler.sample(before.clone(), params, keys[own].tolist(), rows[own].tolist()))
    lead = torch.cat([p.margins for p in parts])
    clear = lead > 1e-4
    assert clear.sum() >= len(clear) - 2, lead
    expected = torch.cat([p.tokens for p in parts])
    assert torch.equal(tokens[clear], expected[clear]), (tokens, expected, lead)
    own_logprobs = torch.cat([p.logprobs for p in parts])
    torch.testing.assert_close(logprobs[clear], own_logprobs[clear], rtol=0, atol=2e-5)
    torch.testing.assert_close(margins[clear], lead[clear], rtol=1e-5, atol=2e-5)


def test_the_engines_sampler_draws_the_same(interpreted: Run) -> None:
    interpreted(compare_with_sampler)


def at_fault(old: str, new: str, directory: Path, arguments: tuple[Tensor, ...]) -> None:
    draw = proofs.planted(MODULE, old, new, directory).draw_tokens
    with pytest.raises(AssertionError):
        compare(arguments, draw=draw)


@pytest.mark.parametrize(
    "old, new",
    [
        ("row * row_stride", "(row + 1) % 6 * row_stride"),  # the neighbour's logits
        ("own = token < vocabulary", "own = token < vocabulary + 1"),
        (">> 32).to(tl.int32) | 1", ">> 32).to(tl.int32)"),
        ("best + behind", "best"),
        ("total * tl.exp(behind)", "total"),
        ("tl.max(tl.where(mine, nothing, best), 0)", "nothing"),
    ],
)
def test_planted_faults(interpreted: Run, tmp_path: Path, old: str, new: str) -> None:
    logits, *rest = case(8000)
    wide = torch.nn.functional.pad(logits, (0, 16), value=50.0)[:, :8000]
    interpreted(at_fault, old, new, tmp_path, (wide, *rest))


def slice_figures(architecture: int, dtype: str, module: Any = None) -> proofs.Figures:
    from spmdrl.models.kernels.cuda import sampling

    tensors = {
        "logits": dtype,
        "keys": "*i64",
        "temperatures": "*fp32",
        **dict.fromkeys(("rows", "ids"), "*i32"),
        "found": "*fp32",
        **dict.fromkeys(("row_stride", "vocabulary"), "i32"),
    }
    return proofs.compiled(
        (module or sampling).draw_slice,
        architecture,
        tensors,
        {"SLICE": sampling.SLICE},
        num_warps=sampling.SLICE_WARPS,
    )


def check_slice(found: proofs.Figures) -> None:
    # the key (8 bytes), the temperature and the row's number are single numbers
    proofs.check(found, most_scalar=2)


def test_compiled_sampling() -> None:
    check_slice(slice_figures(90, "*fp32"))


@pytest.mark.full
@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
def test_compiled_sampling_of_all_architectures(architecture: int) -> None:
    from spmdrl.models.kernels.cuda import sampling

    for dtype in ("*bf16", "*fp32"):
        check_slice(slice_figures(architecture, dtype))
    tensors = {
        **dict.fromkeys(("found", "logprobs", "margins"), "*fp32"),
        "ids": "*i32",
        "tokens": "*i64",
        "slices": "i32",
    }
    found = proofs.compiled(
        sampling.combine_slices, architecture, tensors, {"WIDE": 64}, odd=("slices",), num_warps=1
    )
    # five numbers and an id of each slice: 48 KB for 64 rows
    proofs.check(found, most_scalar=12, least_wide=0)


def test_planted_scalar_loads(tmp_path: Path) -> None:
    old = "row * row_stride + token,"
    module = proofs.planted(MODULE, old, "row * row_stride + token * 3,", tmp_path)
    with pytest.raises(AssertionError, match="no wide loads"):
        check_slice(slice_figures(90, "*fp32", module))
