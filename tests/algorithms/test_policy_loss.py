"""The policy loss: by hand, against a float64 loop, signs of gradients, any cut the same sum."""

import math

import pytest
import torch
from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.algorithms.policy_loss import (
    clipped_policy_loss,
    loss_shares,
    loss_weights,
)
from spmdrl.config.algorithms import AlgorithmSection


def one_token(ratio: float, advantage: float, config: AlgorithmSection) -> tuple[float, float]:
    """Loss and its gradient by the logprob of a single token of weight 1."""
    logprobs = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    columns = {
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "old_logprobs": torch.tensor([-1.0], dtype=torch.float64),
    }
    loss, _ = clipped_policy_loss(logprobs, torch.zeros(1), columns, torch.ones(1), config)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside: descent raises a good token's logprob
        (1.0, -2.0, 2.0, 2.0),  # and lowers a bad one's
        (1.25, 2.0, -2.5, -2.5),  # below clip_high
        (1.5, 2.0, -2.56, 0.0),  # clipped at 1.28
        (1.5, -2.0, 3.0, 3.0),  # a bad token that grew is never clipped
        (0.7, -2.0, 1.6, 0.0),  # clipped at 0.8
        (0.7, 2.0, -1.4, -1.4),  # a good token that shrank is never clipped
        (5.0, -2.0, 6.0, 0.0),  # dual clip at 3 |A|
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, gradient):
    config = AlgorithmSection(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    value, slope = one_token(ratio, advantage, config)
    assert value == pytest.approx(loss)
    assert slope == pytest.approx(gradient)


def make_columns(size: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Logprobs, entropy, columns and weights (some 0), float32."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(size, generator=generator)

    logprobs = -2 * torch.rand(size, generator=generator)
    columns = {
        "advantages": noise(1.0),
        "old_logprobs": logprobs + noise(0.3),
        "ref_logprobs": logprobs + noise(0.5),
        "rollout_logprobs": logprobs + noise(0.6),
    }
    weights = torch.rand(size, generator=generator)
    weights[::5] = 0
    return logprobs, 1 + noise(0.1), columns, weights


FULL = AlgorithmSection(
    clip_low=0.1,
    clip_high=0.2,
    dual_clip=1.3,
    kl_coef=0.05,
    kl_estimator="k3",
    importance_cap=1.5,
    entropy_coef=0.01,
)


def reference_loss(logprobs, entropy, columns, weights, config):
    """An independent loop over tokens, in Python floats."""
    loss, sums = 0.0, dict.fromkeys(
        ("tokens", "clip_fraction", "dual_clip_fraction", "kl", "ref_kl", "entropy", "ratio"), 0.0
    )  # fmt: skip
    sums |= dict.fromkeys(("rollout_gap", "rollout_gap_max", "tis_weight", "tis_truncated"), 0.0)
    edges = [0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0]
    bins = [*(f"rollout_ratio/to_{edge:g}" for edge in edges), "rollout_ratio/above"]
    sums |= dict.fromkeys(bins, 0.0)
    names = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    for row in zip(logprobs, entropy, weights, *(columns[n] for n in names), strict=True):
        new, bonus, weight, advantage, old, ref, rollout = (float(x) for x in row)
        if weight == 0:
            continue
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        gain = min(ratio * advantage, bounded * advantage)
        sums["clip_fraction"] += ratio * advantage > bounded * advantage
        if advantage < 0 and gain < config.dual_clip * advantage:
            gain = config.dual_clip * advantage
            sums["dual_clip_fraction"] += 1
        tis = math.exp(old - rollout)
        sums["tis_truncated"] += tis > config.importance_cap
        sums[bins[sum(tis > edge for edge in edges)]] += 1
        tis = min(tis, config.importance_cap)
        ref_kl = math.exp(ref - new) - 1 - (ref - new)
        term = -tis * gain + config.kl_coef * ref_kl - config.entropy_coef * bonus
        loss += weight * term
        sums["tokens"] += 1
        sums["kl"] += ratio - 1 - math.log(ratio)
        sums["ref_kl"] += ref_kl
        sums["entropy"] += bonus
        sums["ratio"] += ratio
        sums["tis_weight"] += tis
        sums["rollout_gap"] += abs(old - rollout)
        sums["rollout_gap_max"] = max(sums["rollout_gap_max"], abs(old - rollout))
    return loss, sums


def test_agrees_with_a_float64_loop():
    logprobs, entropy, columns, weights = make_columns(400, 0)
    loss, sums = clipped_policy_loss(
        logprobs, entropy.clone().requires_grad_(), columns, weights, FULL
    )
    expected, expected_sums = reference_loss(logprobs, entropy, columns, weights, FULL)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert sums.keys() == expected_sums.keys()
    for name, value in sums.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        assert value.item() == pytest.approx(expected_sums[name], rel=1e-6, abs=1e-5), name
    assert sums["dual_clip_fraction"] > 0


def test_gradient_agrees_with_finite_differences():
    logprobs, entropy, columns, weights = make_columns(30, 1)
    columns = {name: column.double() for name, column in columns.items()}

    def loss_of(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return clipped_policy_loss(logprobs, entropy, columns, weights.double(), FULL)[0]

    inputs = logprobs.double().requires_grad_(), entropy.double().requires_grad_()
    assert torch.autograd.gradcheck(loss_of, inputs)


def test_any_cut_and_order_gives_the_same_sums():
    logprobs, entropy, columns, weights = make_columns(200, 2)
    config = AlgorithmSection(importance_cap=2.0, kl_coef=0.1)
    whole, whole_sums = clipped_policy_loss(logprobs, entropy, columns, weights, config)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    total, parts = 0.0, []
    for index in (order[:0], order[:150], order[150:]):  # one part has no tokens
        part, sums = clipped_policy_loss(
            logprobs[index],
            entropy[index],
            {name: column[index] for name, column in columns.items()},
            weights[index],
            config,
        )
        total += part.item()
        parts.append({name: value.item() for name, value in sums.items()})
    assert total == pytest.approx(whole.item(), rel=1e-5)
    combined = combine(parts)
    assert combined.keys() == whole_sums.keys()
    for name, value in whole_sums.items():
        assert combined[name] == pytest.approx(value.item(), rel=1e-9), name


def test_on_policy_without_old_logprobs_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([3.0, -0.5])
    loss, sums = clipped_policy_loss(
        logprobs, torch.zeros(2), {"advantages": advantages}, torch.ones(2), AlgorithmSection()
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages)
    assert sums["kl"] == 0 and sums["clip_fraction"] == 0 and sums["ratio"] == 2
    assert sums.keys() == {"tokens", "clip_fraction", "kl", "ratio", "entropy"}


def test_tis_scales_the_policy_term_without_a_gradient_of_its_own():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    columns = {
        "advantages": torch.ones(2),
        "rollout_logprobs": torch.tensor([-1.0 + math.log(2), -1.0 - math.log(8)]),
    }
    loss, sums = clipped_policy_loss(
        logprobs, torch.zeros(2), columns, torch.ones(2), AlgorithmSection(importance_cap=2.0)
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -torch.tensor([0.5, 2.0]))
    assert sums["tis_truncated"] == 1
    assert sums["tis_weight"].item() == pytest.approx(2.5)
    assert sums["rollout_gap_max"].item() == pytest.approx(math.log(8))


def test_entropy_bonus_raises_entropy():
    entropy = torch.tensor([0.5], requires_grad=True)
    columns = {"advantages": torch.zeros(1)}
    config = AlgorithmSection(entropy_coef=0.1)
    loss, _ = clipped_policy_loss(torch.zeros(1), entropy, columns, torch.ones(1), config)
    (gradient,) = torch.autograd.grad(loss, entropy)
    assert gradient.item() == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="entropy_coef"):
        clipped_policy_loss(torch.zeros(1), entropy.detach(), columns, torch.ones(1), config)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, "advantages"),
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"importance_cap": 2.0}, "rollout_logprobs"),
    ],
)
def test_a_missing_column_is_named(settings, missing):
    columns = {"advantages": torch.zeros(1)} if settings else {}
    with pytest.raises(ValueError, match=missing):
        clipped_policy_loss(
            torch.zeros(1), torch.zeros(1), columns, torch.ones(1), AlgorithmSection(**settings)
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"dual_clip": 1.0},
        {"kl_coef": -1.0},
        {"kl_estimator": "k9"},
        {"importance_cap": 0.0},
        {"policy_loss": "grpo"},
        {"dual_clip": 3.0, "policy_loss": "cispo"},
    ],
)
def test_settings_are_checked(settings):
    name, *_ = settings
    with pytest.raises(ValueError, match=name):
        AlgorithmSection(**settings)


def sequence_columns(seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Tokens of rows of 1 to 9 tokens in a random order: logprobs, columns, row, weights."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (30,), generator=generator)
    row = torch.arange(30).repeat_interleave(lengths)
    row = row[torch.randperm(len(row), generator=generator)]
    logprobs = -2 * torch.rand(len(row), generator=generator)
    columns = {
        "advantages": torch.randn(30, generator=generator)[row],
        "old_logprobs": logprobs + 0.3 * torch.randn(len(row), generator=generator),
    }
    return logprobs, columns, row, (1 / lengths)[row]


OBJECTIVES = {
    "gspo": AlgorithmSection(policy_loss="gspo", clip_low=0.05, clip_high=0.08),
    "cispo": AlgorithmSection(policy_loss="cispo", clip_low=1.0, clip_high=0.2),
    "cispo from below": AlgorithmSection(policy_loss="cispo", clip_low=0.2, clip_high=0.2),
}


def reference_objective(logprobs, columns, row, weights, config) -> tuple[float, float, float]:
    """GSPO over rows, CISPO over tokens, in Python floats: loss, clipped tokens, sum of ratios."""
    tokens = list(
        zip(
            *(x.tolist() for x in (logprobs, columns["old_logprobs"], columns["advantages"])),
            row.tolist(),
            weights.tolist(),
            strict=True,
        )
    )
    low, high = 1 - config.clip_low, 1 + config.clip_high
    loss = clipped = ratios = 0.0
    if config.policy_loss == "cispo":
        for new, old, advantage, _, weight in tokens:
            bounded = min(max(math.exp(new - old), low), high)
            loss -= weight * bounded * advantage * new
            clipped += bounded != math.exp(new - old)
            ratios += math.exp(new - old)
        return loss, clipped, ratios
    for number in set(row.tolist()):
        own = [t for t in tokens if t[3] == number]
        ratio = math.exp(sum(new - old for new, old, *_ in own) / len(own))
        advantage, bounded = own[0][2], min(max(ratio, low), high)
        loss -= min(ratio * advantage, bounded * advantage) * sum(t[4] for t in own)
        clipped += len(own) * (ratio * advantage > bounded * advantage)
        ratios += len(own) * ratio
    return loss, clipped, ratios


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_agree_with_a_float64_loop(name):
    config = OBJECTIVES[name]
    logprobs, columns, row, weights = sequence_columns(7)
    loss, sums = clipped_policy_loss(
        logprobs, torch.zeros_like(logprobs), columns, weights, config, row
    )
    expected, clipped, ratios = reference_objective(logprobs, columns, row, weights, config)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert sums["clip_fraction"] == clipped > 0
    assert sums["ratio"].item() == pytest.approx(ratios, rel=1e-6)


def test_gspos_gradient_is_the_papers():
    """Of an unclipped row: -s A / |y| of each of its tokens (arXiv 2507.18071, section 4.2)."""
    logprobs, columns, row, weights = sequence_columns(8)
    wide = {name: column.double() for name, column in columns.items()}
    x = logprobs.double().requires_grad_()
    config = AlgorithmSection(policy_loss="gspo", clip_low=1.0, clip_high=10.0)

    def loss_of(x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        return clipped_policy_loss(x, zeros, wide, weights.double(), config, row)[0]

    assert torch.autograd.gradcheck(loss_of, (x,))
    (gradient,) = torch.autograd.grad(loss_of(x), x)
    for number in range(30):
        mine = row == number
        size = int(mine.sum())
        ratio = (logprobs - columns["old_logprobs"]).double()[mine].mean().exp()
        expected = -ratio * wide["advantages"][mine] / size
        torch.testing.assert_close(gradient[mine], expected, rtol=1e-6, atol=1e-9)


def test_cispos_clipped_tokens_keep_their_gradient():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    columns = {
        "advantages": torch.tensor([2.0, 2.0]),
        "old_logprobs": torch.tensor([-1.0 - math.log(3), -1.0]),
    }
    config = AlgorithmSection(policy_loss="cispo", clip_low=1.0, clip_high=0.5)
    loss, _ = clipped_policy_loss(logprobs, torch.zeros(2), columns, torch.ones(2), config)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == pytest.approx([-1.5 * 2.0, -2.0])  # PPO's would be [0, -2]


def test_objectives_do_not_see_how_rows_are_cut():
    for config in OBJECTIVES.values():
        logprobs, columns, row, weights = sequence_columns(9)
        zeros = torch.zeros_like(logprobs)
        whole, _ = clipped_policy_loss(logprobs, zeros, columns, weights, config, row)
        total = 0.0
        for part in (row < 11, row >= 11, row < 0):
            cut = {name: column[part] for name, column in columns.items()}
            own = row[part] - 11 * bool((row[part] >= 11).any())
            total += clipped_policy_loss(
                logprobs[part], zeros[part], cut, weights[part], config, own
            )[0].item()
        assert total == pytest.approx(whole.item(), rel=1e-5)


def test_gspo_needs_rows():
    with pytest.raises(ValueError, match="needs the row of every token"):
        clipped_policy_loss(
            torch.zeros(1),
            torch.zeros(1),
            {"advantages": torch.zeros(1)},
            torch.ones(1),
            OBJECTIVES["gspo"],
        )


LENGTHS = torch.tensor([4, 3, 2])
MASK = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 0]).bool()  # 3, 1 and 0 response tokens


def test_weights_of_every_mode():
    def weights(mode: str) -> list[float]:
        return loss_weights(LENGTHS, MASK, mode, max_tokens=8).tolist()

    third = pytest.approx(1 / 3)
    assert weights("token_mean") == [0, 1, 1, 1, 0, 0, 1, 0, 0]
    assert weights("sequence_mean") == [0, third, third, third, 0, 0, 1, 0, 0]
    assert weights("fixed_length") == [0, 0.125, 0.125, 0.125, 0, 0, 0.125, 0, 0]
    with pytest.raises(ValueError, match="sum"):
        loss_weights(LENGTHS, MASK, "sum", max_tokens=8)
    with pytest.raises(ValueError, match="max_tokens=0"):
        loss_weights(LENGTHS, MASK, "fixed_length", max_tokens=0)


def test_weights_and_normaliser_give_the_papers_means():
    values = torch.tensor([9.0, 1.0, 2.0, 6.0, 9.0, 9.0, 4.0, 9.0, 9.0])

    def mean(mode: str) -> float:
        weights = loss_weights(LENGTHS, MASK, mode, max_tokens=8)
        count = loss_shares(LENGTHS, MASK, mode).sum().item()
        return (weights * values).sum().item() / count

    assert mean("token_mean") == pytest.approx((1 + 2 + 6 + 4) / 4)
    # the third row has no token in the mask: it is no response of the mean
    assert mean("sequence_mean") == pytest.approx((9 / 3 + 4) / 2)
    assert mean("fixed_length") == pytest.approx((1 + 2 + 6 + 4) / 8 / 2)
    with pytest.raises(ValueError, match="sum"):
        loss_shares(LENGTHS, MASK, "sum")


def test_the_gap_to_a_rollout_that_is_the_old_policy_is_that_of_the_new_one():
    logprobs, entropy, columns, weights = make_columns(50, 3)
    columns["old_logprobs"] = columns["rollout_logprobs"]
    config = AlgorithmSection(old_logprobs="rollout")
    _, sums = clipped_policy_loss(logprobs, entropy, columns, weights, config)
    live = weights != 0
    gap = (logprobs.detach() - columns["rollout_logprobs"])[live].abs()
    assert sums["rollout_gap"].item() == pytest.approx(gap.double().sum().item(), rel=1e-6)
    assert sums["rollout_gap_max"].item() == pytest.approx(gap.max().item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"old_logprobs=rollout with importance_cap=2\.0"):
        AlgorithmSection(old_logprobs="rollout", importance_cap=2.0)
