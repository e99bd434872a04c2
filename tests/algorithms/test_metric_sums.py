"""Sums of metrics over live tokens."""

import torch

from spmdrl.algorithms.packed import metric_sums


def test_sums_maxima_and_what_is_not_live():
    values = {
        "gap": torch.tensor([0.5, float("nan"), 0.25], requires_grad=True),
        "gap_max": torch.tensor([0.5, 7.0, 0.25]),
        "hit": torch.tensor([True, True, False]),
    }
    sums = metric_sums(values, torch.tensor([True, False, True]))
    assert {name: value.item() for name, value in sums.items()} == {
        "tokens": 2.0,
        "gap": 0.75,
        "gap_max": 0.5,
        "hit": 1.0,
    }
    for value in sums.values():
        assert value.dtype == torch.float64 and not value.requires_grad
    none = metric_sums({"gap_max": torch.zeros(0)}, torch.zeros(0, dtype=torch.bool))
    assert none["tokens"] == 0 and none["gap_max"] == 0
