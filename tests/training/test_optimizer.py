"""AdamW's state lies where its tensors lie, which fused kernels on GPUs insist on."""

from __future__ import annotations

import torch

from spmdrl.training.optimizer import fresh_state


def test_all_state_is_on_the_device_of_the_master() -> None:
    for device in ("meta", "cpu"):
        master = torch.empty(3, 2, device=device)
        state = fresh_state(master)
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {tensor.device for tensor in state.values()} == {master.device}
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert state["step"].shape == ()


def test_it_does_not_follow_the_default_device() -> None:
    master = torch.empty(3)
    with torch.device("meta"):
        state = fresh_state(master)
    assert {tensor.device for tensor in state.values()} == {master.device}
