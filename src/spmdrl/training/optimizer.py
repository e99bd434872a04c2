"""AdamW over the leaves' float32 masters.

Sums and norms of gradients over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.local_shards import LocalTensors
from spmdrl.training.options import TrainOptions
from spmdrl.training.weights import Leaf, refresh_weights

MOMENTS = ("exp_avg", "exp_avg_sq")


def fresh_state(master: Tensor) -> dict[str, Tensor]:
    """Make AdamW's state of a tensor before its first step, all of it on the tensor's device: fused
    kernels accept `step` on no other device (pytorch issue 124133).
    """
    step = torch.zeros((), dtype=torch.float32, device=master.device)
    return {"step": step, **{name: torch.zeros_like(master) for name in MOMENTS}}


class LeafOptimizer(Protocol):
    """An optimizer of a backend's leaves, wherever its state is."""

    def step(self, gradients: Mapping[str, Tensor], lr: float, norm: Tensor) -> None:
        """See `Optimizer.step`."""

    def tensors(self) -> LocalTensors:
        """See `Optimizer.tensors`."""

    def set_step_count(self, count: int) -> None:
        """See `Optimizer.set_step_count`."""

    def resident(self) -> list[Tensor]:
        """Return what of its state is on the device between steps."""


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
        self._clip_norm = options.clip_norm
        self._adamw = torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True
        )
        self._start()

    def _start(self) -> None:
        for group in self._adamw.param_groups:
            for master in group["params"]:
                self._adamw.state[master] = fresh_state(master)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float, norm: Tensor) -> None:
        """Update masters and weights by `gradients`: by leaf name, float32, of the masters' shapes.

        The gradients may be clipped in place, and nothing is updated without a gradient, see
        `prepare_step`.

        Args:
            norm: the norm of the whole gradient, see `gradient_norm`.
        """
        own = [gradients[leaf.name] for leaf in self._live]
        if not prepare_step([self._adamw], own, norm, self._clip_norm):
            return
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for leaf, gradient in zip(self._live, own, strict=True):
            leaf.master.grad = gradient
        self._adamw.step()
        for leaf in self._live:
            leaf.master.grad = None
        refresh_weights(self._live)

    def tensors(self) -> LocalTensors:
        """Return `exp_avg/NAME` and `exp_avg_sq/NAME` of every leaf."""
        found: LocalTensors = {}
        for moment in MOMENTS:
            for leaf in self._leaves:
                held = self._adamw.state.get(leaf.master)
                tensor = held[moment] if held else torch.zeros_like(leaf.master)
                found[f"{moment}/{leaf.name}"] = (tensor, leaf.slices)
        return found

    def resident(self) -> list[Tensor]:
        """Return the masters that are not the weights themselves, and the moments."""
        masters = [leaf.master for leaf in self._leaves if leaf.has_own_master]
        return [*masters, *(tensor for tensor, _ in self.tensors().values())]

    def set_step_count(self, count: int) -> None:
        """Tell AdamW's bias correction how many updates the moments have seen."""
        for leaf in self._live:
            self._adamw.state[leaf.master]["step"].fill_(count)


def prepare_step(
    adamws: Sequence[torch.optim.AdamW],
    gradients: list[Tensor],
    norm: Tensor,  # [] float64
    clip_norm: float,
) -> bool:
    """Make the next step of fused AdamW clip the gradients to `clip_norm`, and change nothing if
    their norm is 0 or not finite; returns whether to call it.

    On CUDA the kernels read both from the device, as they do for gradient scaling, so the host does
    not wait for the norm. On a CPU the gradients are scaled here.
    """
    if norm.is_cuda:
        found = device_factors(norm, clip_norm)
        for adamw in adamws:
            vars(adamw).update(found)
        return True
    value = norm.item()
    if value == 0 or not math.isfinite(value):
        return False
    if value > clip_norm and gradients:
        torch._foreach_mul_(gradients, clip_norm / value)
    return True


def device_factors(norm: Tensor, clip_norm: float) -> dict[str, Tensor]:
    """Make what fused AdamW reads from the device: the divisor of the gradients, and whether it
    changes nothing, float32 [] each.

    Args:
        norm: [] float64, on the device.
    """
    return {
        "grad_scale": (norm / clip_norm).clamp(min=1.0).float(),
        "found_inf": (norm.isfinite().logical_not() | (norm == 0)).float(),
    }


SMALL_BYTES = 1 << 20
"""Tensors below this size are reduced together in one flat buffer, larger ones in place."""


def all_reduce_gradients(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum every gradient over the group, in place; they must be contiguous and of one dtype."""
    if group is None:
        return
    small = [g for g in gradients if g.numel() * g.element_size() < SMALL_BYTES]
    large = [g for g in gradients if g.numel() * g.element_size() >= SMALL_BYTES]
    flat = [torch.cat([g.flatten() for g in small])] if small else []
    # Start all of them at once: on gloo one transfer then runs while another is summed.
    pending = [dist.all_reduce(t, group=group, async_op=True) for t in (*large, *flat)]
    for work in pending:
        work.wait()
    if small:
        parts = torch.split(flat[0], [g.numel() for g in small])
        torch._foreach_copy_(small, [p.view_as(g) for g, p in zip(small, parts, strict=True)])


def average_gradients(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Average the gradients over the ranks of the group, in place.

    This is for parameters that every rank of a tensor-parallel group holds. Their gradients differ
    only in the order of sums, which atomics on CUDA do not fix. Copies that step by different
    gradients would drift apart for good.
    """
    if group is None or not gradients:
        return
    all_reduce_gradients(gradients, group)
    torch._foreach_div_(gradients, dist.get_world_size(group))


def gradient_norm(
    counted: Iterable[Tensor],
    groups: Sequence[dist.ProcessGroup | None],
    device: torch.device,
) -> Tensor:  # [] float64, on the device
    """Compute the norm of the whole gradient, which is spread over `groups`.

    Squares are summed in float64, so that the layout changes the norm only by rounding.

    Args:
        counted: the gradients that this rank counts; exactly one rank counts each element.
        groups: the groups to sum over, in turn; None is a group of one rank.
    """
    own = list(counted)
    total = torch.zeros((), dtype=torch.float64, device=device)
    if device.type != "cuda" and own:
        total = torch.stack([_sum_of_squares(gradient) for gradient in own]).sum()
    elif live := [gradient for gradient in own if gradient.numel()]:
        # all tensors in few kernels, which add in float64
        total = torch.stack(torch._foreach_norm(live, dtype=torch.float64)).square().sum()
    for group in groups:
        if group is not None:
            dist.all_reduce(total, group=group)
    return total.sqrt()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum squares in float32 over runs of 1024, then in float64. On CPUs this is ten times faster
    than float64 throughout and as good to 1e-9; float32 throughout loses the third digit.
    """
    flat = gradient.flatten()
    whole = len(flat) // 1024 * 1024
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    total: Tensor = runs.square().sum() + rest.square()
    return total


class HostNumber:
    """A number on its way from its device to the host; work that is queued later does not delay it.

    Args:
        number: a tensor of one element.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if number.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def value(self) -> float:
        """Wait for the number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)
