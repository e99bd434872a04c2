"""Keyed randomness: fixed values, independence of the layout, and the statistics of the noise."""

from __future__ import annotations

import math

import torch

from noise import gumbel
from spmdrl.keyed_random import (
    Noise,
    bits_at,
    chain,
    chain_all,
    exponential_at,
    key64,
    key_tensor,
    token_hash,
)

CPU = torch.device("cpu")


def keys(count: int, *prefix: int) -> torch.Tensor:
    return key_tensor((key64(*prefix, i) for i in range(count)), CPU)


def chi_square(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    """Standard normal for many cells: (chi2 - dof) / sqrt(2 dof)."""
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    dof = counts.numel() - 1
    return (chi2 - dof) / math.sqrt(2 * dof)


def test_keys_are_fixed_for_ever() -> None:
    # A change of these numbers changes every run's samples and data order.
    assert key64(0) == -6411193824288604561
    assert key64(1, 2, 3) == -8634215444751041720
    assert key64(-1) == 6755974106381971767
    assert token_hash(torch.arange(3)).tolist() == [-1832243442, -1767835285, -1270735941]
    expected = torch.tensor([[0.5133, 1.0111, -0.9879, 2.1269]])
    found = gumbel(key_tensor([key64(1, 2, 3)], CPU), 0, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len({key64(a, b) for a in range(-20, 20) for b in range(-20, 20)}) == 1600


def test_a_key_can_be_extended() -> None:
    assert chain(key64(7, 8), 9, -10) == key64(7, 8, 9, -10)
    assert key64(1, 2) != key64(2, 1)
    assert -(2**63) <= min(key64(i) for i in range(100)) < 0 < max(key64(i) for i in range(100))


def test_many_keys_are_extended_as_one_is() -> None:
    given = [key64(i) for i in range(50)] + [0, -1, 2**63 - 1, -(2**63)]
    parts = list(range(-27, 27))
    by_tensor = chain_all(key_tensor(given, CPU), key_tensor(parts, CPU))
    assert by_tensor.tolist() == [chain(k, p) for k, p in zip(given, parts, strict=True)]
    for part in (0, -5, 2**63 - 1, -(2**63)):
        assert chain_all(key_tensor(given, CPU), part).tolist() == [chain(k, part) for k in given]


def test_bits_are_uniform_and_independent() -> None:
    """Shares below a threshold: of rows, of columns, and of pairs of neighbours."""
    rate, count, width = 0.3, 2000, 500
    least = round(rate * 2**32) - 2**31
    hashes = token_hash(torch.arange(width))
    low = (bits_at(chain_all(keys(count, 4), 9), hashes) < least).double()
    for shares, number in ((low.mean(0), count), (low.mean(1), width)):
        z = (shares - rate) / math.sqrt(rate * (1 - rate) / number)
        assert z.abs().max() < 4.6 and abs(float(z.square().mean()) - 1) < 0.25
    other = (bits_at(chain_all(keys(count, 4), 10), hashes) < least).double()
    for a, b in ((low[:-1], low[1:]), (low[:, :-1], low[:, 1:]), (low, other)):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(a.numel())


def test_noise_depends_on_key_and_token_alone() -> None:
    k = keys(6, 1)
    whole = gumbel(k, 0, 1000)
    assert torch.equal(gumbel(k, 300, 200), whole[:, 300:500])
    assert torch.equal(gumbel(k[2:3], 0, 1000), whole[2:3])
    noise = Noise(0, 1000, CPU)
    noise.exponential(keys(3, 2))  # the buffers are used again
    found = noise.exponential(k)
    torch.testing.assert_close(-found.log(), whole, rtol=0, atol=0)
    tokens = torch.tensor([[5, 999, 0]]).expand(6, 3)
    chosen = exponential_at(k, token_hash(tokens))
    assert torch.equal(chosen, found[:, [5, 999, 0]])


def test_no_two_tokens_have_one_hash() -> None:
    """Else the less likely of the two could never be drawn."""
    hashes = token_hash(torch.arange(1 << 18))
    assert len(hashes.unique()) == 1 << 18
    last = token_hash(torch.tensor([(1 << 32) - 1, (1 << 31), (1 << 31) - 1, 1 << 18]))
    assert len(last.unique()) == 4


def test_tokens_of_a_large_vocabulary_share_a_draw_by_their_probabilities() -> None:
    """Pairs that had one 32-bit hash, in vocabularies of 128,256 and 151,936."""
    k = keys(2000, 3)
    for pair in ((64794, 120504), (50673, 117623), (116760, 125186), (18498, 102490)):
        noise = exponential_at(k, token_hash(torch.tensor([pair]).expand(2000, 2)))
        second = float((torch.tensor([0.51, 0.49]) / noise).argmax(1).double().mean())
        assert abs(second - 0.49) < 4.5 * math.sqrt(0.25 / 2000), pair


def test_noise_is_exponential() -> None:
    e = Noise(0, 8192, CPU).exponential(keys(128, 11))
    assert bool((e > 0).all()) and e.isfinite().all()
    u = (-e).exp()
    assert abs(chi_square(torch.histc(u, 512, 0, 1), u.numel() / 512)) < 4.5
    # also in the tail that decides draws
    tail = e[e < 1e-3] / 1e-3
    assert abs(chi_square(torch.histc(tail, 20, 0, 1), tail.numel() / 20)) < 4.5
    for rows in (u, u.T):
        cells = torch.stack([torch.histc(row, 8, 0, 1) for row in rows[:256]])
        scores = ((cells - rows.shape[1] / 8) ** 2 / (rows.shape[1] / 8)).sum(1)
        assert abs(float(scores.mean()) - 7) < 4.5 * math.sqrt(14 / len(cells))


def test_noise_of_keys_and_tokens_is_uncorrelated() -> None:
    u = (-Noise(0, 2048, CPU).exponential(keys(512, 12))).exp()
    z = (u - 0.5) * math.sqrt(12)
    for rows in (z, z.T[:512]):
        correlation = rows @ rows.T / math.sqrt(rows.shape[1])
        others = correlation[~torch.eye(len(rows), dtype=torch.bool)]
        assert abs(float(others.std()) - 1) < 0.02
        assert float(others.abs().max()) < 6


def test_the_largest_gumbel_follows_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5])
    count = 20000
    winners = (logits + gumbel(keys(count, 13), 40, 6)).argmax(-1)
    counts = torch.bincount(winners, minlength=6).float()
    assert abs(chi_square(counts, logits.softmax(-1) * count)) < 4
