"""AdamW over the leaves' float32 masters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spmdrl.models.local_shards import LocalTensors
from spmdrl.training.options import TrainOptions
from spmdrl.training.weights import Leaf

MOMENTS = ("exp_avg", "exp_avg_sq")


def fresh_state(master: Tensor) -> dict[str, Tensor]:
    """Make AdamW's state of a tensor before its first step, all of it on the tensor's device: fused
    kernels accept `step` on no other device (pytorch issue 124133).
    """
    step = torch.zeros((), dtype=torch.float32, device=master.device)
    return {"step": step, **{name: torch.zeros_like(master) for name in MOMENTS}}


class Optimizer:
    """torch's AdamW, whose state exists from the start so that a checkpoint can be read into it."""

    def __init__(self, leaves: Sequence[Leaf], options: TrainOptions) -> None:
        self._leaves = tuple(leaves)
        # A shard without rows has nothing to update, and fused kernels do not accept it.
        self._live = [leaf for leaf in self._leaves if leaf.master.numel()]
        decayed = [leaf.master for leaf in self._live if leaf.decay]
        plain = [leaf.master for leaf in self._live if not leaf.decay]
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        # A rank may hold nothing that is trained; AdamW accepts one group without parameters.
        groups = [group for group in groups if group["params"]] or groups[:1]
        self._adamw = torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True
        )
        self._start()

    def _start(self) -> None:
        for group in self._adamw.param_groups:
            for master in group["params"]:
                self._adamw.state[master] = fresh_state(master)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Update the masters with `gradients`: by leaf name, float32, shaped like the masters."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for leaf in self._live:
            leaf.master.grad = gradients[leaf.name]
        self._adamw.step()
        for leaf in self._live:
            leaf.master.grad = None

    def tensors(self) -> LocalTensors:
        """Return `exp_avg/NAME` and `exp_avg_sq/NAME` of every leaf."""
        found: LocalTensors = {}
        for moment in MOMENTS:
            for leaf in self._leaves:
                held = self._adamw.state.get(leaf.master)
                tensor = held[moment] if held else torch.zeros_like(leaf.master)
                found[f"{moment}/{leaf.name}"] = (tensor, leaf.slices)
        return found

    def set_step_count(self, count: int) -> None:
        """Tell AdamW's bias correction how many updates the moments have seen."""
        for leaf in self._live:
            self._adamw.state[leaf.master]["step"].fill_(count)
