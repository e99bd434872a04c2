"""Bytes of distinct storages, and what is refused when they are freed."""

from __future__ import annotations

import re

import pytest
import torch

from spmdrl.memory.storages import distinct_storages, is_resident, live_bytes, require_resident


def test_views_and_tied_tensors_count_once():
    base = torch.zeros(6, 4)
    other = torch.zeros(5, dtype=torch.bfloat16)
    tensors = [base, base.t(), base[2:], torch.nn.Parameter(base), other, base.view(-1)]
    assert len(distinct_storages(tensors)) == 2
    assert live_bytes(tensors) == 6 * 4 * 4 + 5 * 2
    assert live_bytes([base[5:]]) == 6 * 4 * 4  # a view keeps its whole storage alive
    assert live_bytes([]) == 0


def test_two_freed_storages_stay_two():
    tensors = [torch.zeros(3), torch.zeros(3)]
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
    assert len(distinct_storages(tensors)) == 2
    assert live_bytes(tensors) == 0


def test_a_freed_tensor_is_not_resident_and_an_empty_one_is():
    base = torch.zeros(4)
    view = base[1:]
    assert is_resident(view)
    base.untyped_storage().resize_(0)
    assert not is_resident(view)
    assert is_resident(base[4:])
    assert is_resident(torch.zeros(0, 7))


def test_require_resident_names_the_role_the_part_and_the_fix():
    good, bad = torch.zeros(2), torch.zeros(3, 5)
    require_resident("policy", "weights", [good, bad])
    bad.untyped_storage().resize_(0)
    expected = (
        "role 'policy': its weights are not on the device (1 tensors are freed, the first of shape "
        "(3, 5)): hold it with resident('policy', 'weights')"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        require_resident("policy", "weights", [good, bad])
