"""DeepSpeed's ZeRO optimizers behind one interface: where each keeps what it updates, and how a sum
of gradients reaches it.

Which class DeepSpeed makes depends on the stage and the dtype. ZeRO 1 and 2 lay the parameters of
each of AdamW's groups into one flat buffer; they become views of it, and every rank updates an
equal part. Bfloat16 under ZeRO 1 has a class of its own, which sums gradients in float32 buffers of
full size. ZeRO 3 divides each parameter by itself and gathers it while a module needs it. In all of
them a part's float32 copy is the one parameter of AdamW's group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spmdrl.models.zero_layout import FlatRange

Gradient = tuple[nn.Parameter, Tensor]
"""A parameter, and this rank's part of its gradient: float32, the storage that will be used."""

Ranges = Sequence[tuple[nn.Parameter, FlatRange]]
"""Trained parameters, and the part of each that this rank updates."""


class ZeroOptimizer(Protocol):
    """One of DeepSpeed's optimizers."""

    @property
    def masters(self) -> list[Tensor]:
        """The float32 part of each of AdamW's groups, flat."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""

    def hold(self) -> None:
        """Allocate buffers of gradients, all zero, unless they are allocated already."""

    def complete(self) -> None:
        """Prepare the parameters for the reduction."""

    def reduced(self) -> None:
        """Finish the reduction, so that `gradients` are sums over ranks."""

    def gradients(self) -> list[Gradient]:
        """Return this rank's parts of the summed gradient."""

    def discard(self) -> None:
        """Throw the gradient away, as DeepSpeed does with one that overflows."""

    def clear(self) -> None:
        """Free what is left of the gradient."""

    def refresh_masters(self) -> None:
        """Take the masters over from the weights."""

    def refresh_weights(self) -> None:
        """Round the masters into the weights."""


def adapted(optimizer: Any, ranges: Ranges) -> ZeroOptimizer:
    """Return the optimizer behind the interface."""
    names = vars(optimizer)
    if "fp32_partitioned_groups_flat" in names:
        return Sharded(optimizer, ranges)
    return WholeSums(optimizer, ranges) if "bf16_groups" in names else Flat(optimizer, ranges)


def _parts(flats: Sequence[Tensor], ranges: Ranges) -> list[Gradient]:
    """Cut flat parts of AdamW's groups into those of the parameters."""
    return [
        (parameter, flats[held.group][held.offset : held.offset + held.stop - held.start])
        for parameter, held in ranges
        if held.start < held.stop
    ]


def _free(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _hold(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(tensor.numel() * tensor.element_size())
            tensor.zero_()


class Flat:
    """`DeepSpeedZeroOptimizer`: ZeRO 2, and ZeRO 1 in float32 or with its state on the host."""

    def __init__(self, optimizer: Any, ranges: Ranges) -> None:
        self._zero, self._ranges = optimizer, ranges
        self.masters: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.dtype: torch.dtype = optimizer.dtype

    def hold(self) -> None:
        pass

    def complete(self) -> None:
        """Give every parameter a gradient: ZeRO 1 reduces only those that have one, and ranks that
        differ in that would meet in different sums.
        """
        if self._zero.partition_gradients:
            return
        for parameter, _ in self._ranges:
            if self._zero.use_grad_accum_attribute:
                if vars(parameter)["grad_accum"] is None:
                    vars(parameter)["grad_accum"] = torch.zeros_like(parameter, dtype=torch.float32)
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def reduced(self) -> None:
        pass

    def gradients(self) -> list[Gradient]:
        zero = self._zero
        if zero.cpu_offload:
            return _parts([self._own(master) for master in self.masters], self._ranges)
        found = []
        for number, parameters in enumerate(zero.params_in_partition):
            # the last of a group's gradients may be padding
            found += list(zip(parameters, zero.averaged_gradients[number], strict=False))
        return found

    def discard(self) -> None:
        zero = self._zero
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = None
            zero.all_grad_tensors[number] = None
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()

    def clear(self) -> None:
        if self._zero.cpu_offload:
            # a parameter without a gradient in the next step would keep this one's
            for master in self.masters:
                self._own(master).zero_()

    def refresh_masters(self) -> None:
        self._zero.refresh_fp32_params()

    def refresh_weights(self) -> None:
        self._zero.update_lp_params()

    @staticmethod
    def _own(master: Tensor) -> Tensor:
        assert master.grad is not None
        return master.grad


class WholeSums:
    """`BF16_Optimizer`: ZeRO 1 in bfloat16. Its buffers are freed between steps."""

    dtype = torch.bfloat16

    def __init__(self, optimizer: Any, ranges: Ranges) -> None:
        self._zero, self._ranges = optimizer, ranges
        self.masters: list[Tensor] = list(optimizer.fp32_groups_flat_partition)
        self.clear()

    def hold(self) -> None:
        _hold(self._zero.fp32_groups_gradients_flat)

    def complete(self) -> None:
        pass

    def reduced(self) -> None:
        pass

    def gradients(self) -> list[Gradient]:
        return _parts(self._zero.fp32_groups_gradient_flat_partition, self._ranges)

    def discard(self) -> None:
        pass

    def clear(self) -> None:
        _free(self._zero.fp32_groups_gradients_flat)

    def refresh_masters(self) -> None:
        self._zero.refresh_fp32_params()

    def refresh_weights(self) -> None:
        self._zero.update_lp_params()


class Sharded:
    """`DeepSpeedZeroOptimizer_Stage3`. Its buffers are freed between steps.

    It always averages over ranks: sums are made of its averages.
    """

    def __init__(self, optimizer: Any, ranges: Ranges) -> None:
        self._zero, self._ranges = optimizer, ranges
        self.masters: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        self.dtype: torch.dtype = optimizer.dtype
        self.clear()

    def _buffers(self) -> list[Tensor]:
        """Return the sums of this rank's parts, and what gradients are reduced in."""
        zero = self._zero
        sums = [] if zero.offload_optimizer else [zero.grad_partitions_flat_buffer]
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        return [*sums, *(buffer for buffer in buckets if buffer is not None)]

    def hold(self) -> None:
        _hold(self._buffers())

    def complete(self) -> None:
        pass

    def reduced(self) -> None:
        count = self._zero.partition_count
        if count > 1:
            torch._foreach_mul_([own for _, own in self.gradients()], float(count))

    def gradients(self) -> list[Gradient]:
        zero = self._zero
        if zero.offload_optimizer:
            return _parts([Flat._own(master) for master in self.masters], self._ranges)
        held: dict[int, Tensor] = {}
        for number, parameters in enumerate(zero.fp16_groups):
            for parameter, own in zip(parameters, zero.averaged_gradients[number], strict=True):
                held[id(parameter)] = own
        # the last ranks have padding at the end of their parts
        return [
            (parameter, held[id(parameter)][: part.stop - part.start])
            for parameter, part in self._ranges
            if part.start < part.stop
        ]

    def discard(self) -> None:
        self._zero.averaged_gradients = {}
        if self._zero.offload_optimizer:
            self._zero.reset_cpu_buffers()
            self._zero._offload_boundary_param_ids = set()

    def clear(self) -> None:
        zero = self._zero
        if zero.offload_optimizer:
            # a parameter without a gradient in the next step would keep this one's
            for master in self.masters:
                Flat._own(master).zero_()
            zero.grad_partitions_flat_buffer.zero_()
        _free(self._buffers())

    def refresh_masters(self) -> None:
        self._zero.refresh_fp32_params()

    def refresh_weights(self) -> None:
        for number in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
