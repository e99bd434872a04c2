"""The pairwise loss by hand, against a float64 loop over pairs, any order and cut the same sum."""

import math

import pytest
import torch
from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.algorithms.supervised import bradley_terry_loss


def test_worked_by_hand():
    # pair 9 stands first and last: 2 - 1 = 1; pair 4: 0 - 3 = -3; pair 5: 1 - 1 = 0, a tie
    scores = torch.tensor([1.0, 0.0, 3.0, 1.0, 1.0, 2.0], requires_grad=True)
    chosen = torch.tensor([False, True, False, True, False, True])
    pair = torch.tensor([9, 4, 4, 5, 5, 9])
    loss, sums = bradley_terry_loss(scores, chosen, pair)
    # -log sigmoid(x) = log(1 + exp(-x))
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3)) + math.log(2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: value.item() for name, value in sums.items()} == {
        "tokens": 3.0,
        "accuracy": 1.0,
        "margin": -2.0,
        "score_chosen": 3.0,
        "score_rejected": 5.0,
    }
    # d/ds_c = -sigmoid(-x), d/ds_r = +sigmoid(-x): descent parts the two scores
    (gradient,) = torch.autograd.grad(loss, scores)
    easy, hard = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-3))
    torch.testing.assert_close(gradient, torch.tensor([easy, -hard, hard, -0.5, 0.5, -easy]))


def test_margin_weights_and_centre_by_hand():
    scores = torch.tensor([2.0, 1.0, 5.0, -5.0])
    chosen = torch.tensor([True, False, True, False])
    pair = torch.tensor([0, 0, 1, 1])
    margin = torch.tensor([1.0, 1.0, 0.0, 0.0])
    weights = torch.tensor([0.25, 0.25, 0.0, 0.0])
    loss, sums = bradley_terry_loss(scores, chosen, pair, margin=margin, weights=weights)
    assert loss.item() == pytest.approx(0.25 * math.log(2))  # 2 - 1 - 1 = 0
    assert sums["tokens"] == 1 and sums["margin"] == 1
    centred, _ = bradley_terry_loss(
        scores, chosen, pair, margin=margin, weights=weights, centre_coef=0.1
    )
    assert centred.item() == pytest.approx(0.25 * (math.log(2) + 0.1 * 9))


def make_pairs(num_pairs: int, seed: int) -> dict[str, Tensor]:
    """Columns of 2 num_pairs rows in a random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * num_pairs, generator=generator)
    ids = torch.randperm(num_pairs, generator=generator) * 2**40 - 7
    margin, weights = torch.rand(2, num_pairs, generator=generator)
    weights[::4] = 0
    return {
        "scores": 2 * torch.randn(2 * num_pairs, generator=generator),
        "chosen": (order % 2).bool(),
        "pair": ids[order // 2],
        "margin": margin[order // 2],
        "weights": weights[order // 2],
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_a_float64_loop(seed):
    columns = make_pairs(60, seed)
    table = [
        dict(zip(columns, row, strict=True))
        for row in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    loss, sums = 0.0, dict.fromkeys(
        ("tokens", "accuracy", "margin", "score_chosen", "score_rejected"), 0.0
    )  # fmt: skip
    for good in table:
        for bad in table:
            if good["pair"] != bad["pair"] or not good["chosen"] or bad["chosen"]:
                continue
            if good["weights"] == 0:
                continue
            gap = good["scores"] - bad["scores"]
            probability = 1 / (1 + math.exp(-(gap - good["margin"])))
            centre = (good["scores"] + bad["scores"]) ** 2
            loss += good["weights"] * (-math.log(probability) + 0.05 * centre)
            sums["tokens"] += 1
            sums["accuracy"] += gap > 0
            sums["margin"] += gap
            sums["score_chosen"] += good["scores"]
            sums["score_rejected"] += bad["scores"]
    assert sums["tokens"] == 45
    found, found_sums = bradley_terry_loss(**columns, centre_coef=0.05)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert found_sums.keys() == sums.keys()
    for name, value in found_sums.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        assert value.item() == pytest.approx(sums[name], rel=1e-6, abs=1e-5), name


def test_gradient_agrees_with_finite_differences():
    columns = {
        name: column.double() if column.is_floating_point() else column
        for name, column in make_pairs(12, 3).items()
    }

    def loss_of(scores: Tensor) -> Tensor:
        return bradley_terry_loss(**{**columns, "scores": scores}, centre_coef=0.3)[0]

    assert torch.autograd.gradcheck(loss_of, (columns["scores"].requires_grad_(),))


def test_any_order_and_cut_between_pairs_gives_the_same_sums():
    columns = make_pairs(40, 4)
    whole, whole_sums = bradley_terry_loss(**columns, centre_coef=0.1)
    first = columns["pair"] < columns["pair"].median()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(5))
    total, parts = 0.0, []
    for index in (order[first[order]], order[~first[order]], order[:0]):
        cut = {name: column[index] for name, column in columns.items()}
        part, sums = bradley_terry_loss(**cut, centre_coef=0.1)
        total += part.item()
        parts.append({name: value.item() for name, value in sums.items()})
    assert parts[0]["tokens"] > 0 and parts[1]["tokens"] > 0
    assert total == pytest.approx(whole.item(), rel=1e-5)
    combined = combine(parts)
    assert combined.keys() == whole_sums.keys()
    for name, value in whole_sums.items():
        assert combined[name] == pytest.approx(value.item(), rel=1e-9, abs=1e-9), name


def test_only_centring_sees_a_shift_of_the_scores():
    columns = make_pairs(20, 6)
    shifted = {**columns, "scores": columns["scores"] + 3.0}
    plain, moved = (bradley_terry_loss(**c)[0].item() for c in (columns, shifted))
    assert moved == pytest.approx(plain, rel=1e-5)
    scores = torch.tensor([4.0, 3.0], requires_grad=True)
    loss, _ = bradley_terry_loss(
        scores, torch.tensor([True, False]), torch.zeros(2, dtype=torch.int64), centre_coef=10.0
    )
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient > 0).all()  # descent lowers both


@pytest.mark.parametrize(("gap", "loss", "slope"), [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)])
def test_extreme_scores_stay_finite(gap, loss, slope):
    scores = torch.tensor([gap, 0.0], requires_grad=True)
    found, _ = bradley_terry_loss(scores, torch.tensor([True, False]), torch.tensor([3, 3]))
    (gradient,) = torch.autograd.grad(found, scores)
    assert found.item() == loss and gradient.tolist() == [slope, -slope]
    half = scores.detach().bfloat16()
    wide, _ = bradley_terry_loss(half, torch.tensor([True, False]), torch.tensor([3, 3]))
    assert wide.dtype == torch.float32


@pytest.mark.parametrize(
    ("chosen", "pair", "named"),
    [
        ([True, False, True], [1, 1, 2], r"pairs \[2\]"),  # one row is missing
        ([True, False, False], [1, 1, 1], r"pairs \[1\]"),  # one too many
        ([True, True], [5, 5], r"pairs \[5\]"),
        ([False, False], [5, 5], r"pairs \[5\]"),
        ([True, True, True, False], [5, 6, 5, 6], r"pairs \[5\]"),
    ],
)
def test_incomplete_pairs_are_named(chosen, pair, named):
    with pytest.raises(ValueError, match=named):
        bradley_terry_loss(torch.zeros(len(pair)), torch.tensor(chosen), torch.tensor(pair))


def test_other_bad_input_is_named():
    scores, chosen = torch.zeros(2), torch.tensor([True, False])
    pair, uneven = torch.tensor([8, 8]), torch.tensor([1.0, 2.0])
    for name in ("margin", "weights"):
        with pytest.raises(ValueError, match=rf"{name} differs.*\[8\]"):
            bradley_terry_loss(scores, chosen, pair, **{name: uneven})
        with pytest.raises(ValueError, match=rf"{name} \(1,\) and scores \(2,\)"):
            bradley_terry_loss(scores, chosen, pair, **{name: uneven[:1]})
    with pytest.raises(ValueError, match="chosen is"):
        bradley_terry_loss(scores, chosen.long(), pair)
    with pytest.raises(ValueError, match="centre_coef=-1"):
        bradley_terry_loss(scores, chosen, pair, centre_coef=-1.0)
