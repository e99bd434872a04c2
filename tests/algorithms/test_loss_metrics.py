"""How metric sums combine."""

import pytest

from spmdrl.algorithms.metrics import combine, is_max, token_means


def test_combine_adds_sums_and_keeps_maxima():
    total = combine([{"kl": 1.0, "gap_max": 0.5}, {"kl": 2.0, "gap_max": 0.25, "tokens": 3.0}])
    assert total == {"kl": 3.0, "gap_max": 0.5, "tokens": 3.0}
    assert is_max("gap_max") and not is_max("max_gap")
    assert combine([]) == {}


def test_token_means():
    sums = {"kl": 3.0, "gap_max": 0.5, "tokens": 6.0, "loss": -1.0}
    assert token_means(sums) == {"kl": 0.5, "gap_max": 0.5, "tokens": 6.0, "loss": -1.0}
    with pytest.raises(ValueError, match="kl"):
        token_means({"kl": 3.0})
