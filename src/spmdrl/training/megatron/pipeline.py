"""Megatron's schedules for microbatches: one rank, or 1F1B and interleaved pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spmdrl.distributed.mesh import Mesh
from spmdrl.training.packing import Microbatch, empty_microbatch, pad_microbatch

ReadOutput = Callable[[Any, Tensor], tuple[Tensor, Any]]
"""Function (item, output of the last chunk) -> (loss, the item's result in `run`)."""


class Pipeline:
    """The pipeline stages of a role's replica.

    Args:
        chunks: this rank's chunks, in the order in which a microbatch passes through them.
    """

    def __init__(
        self,
        mesh: Mesh,
        settings: TransformerConfig,
        groups: ProcessGroupCollection,
        chunks: Sequence[Any],
    ) -> None:
        self._mesh, self._settings, self._groups = mesh, settings, groups
        self._chunks = list(chunks)
        self._num_stages = mesh.size("pp")
        self._messages = P2PCommunicator(groups.pp, settings) if self._num_stages > 1 else None
        self._function = get_forward_backward_func(
            pp_size=self._num_stages, vp_size=len(chunks) if len(chunks) > 1 else None
        )

    @property
    def unit(self) -> int:
        """Number that every stream's length is a multiple of, so that cp and tp parts are equal."""
        cp, tp = self._mesh.size("cp"), self._mesh.size("tp")
        return (2 * cp if cp > 1 else 1) * (tp if self._settings.sequence_parallel else 1)

    def fit(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Fit microbatches to the schedule: at least one, each padded. In a pipeline all are
        equally long, and interleaved stages have a multiple of the stages.

        All ranks of a replica have the same rows, and so get the same result. Replicas that
        exchange tokens between experts get equally many: each exchange is a collective.
        """
        count = self._most(max(1, len(microbatches)))
        if len(self._chunks) > 1:
            count = -(-count // self._num_stages) * self._num_stages
        microbatches = microbatches + [empty_microbatch()] * (count - len(microbatches))
        lengths = [-(-len(m.tokens) // self.unit) * self.unit for m in microbatches]
        if self._num_stages > 1:
            lengths = [max(lengths)] * count
        return [pad_microbatch(m, n) for m, n in zip(microbatches, lengths, strict=True)]

    def _most(self, count: int) -> int:
        group = self._mesh.group("reduce")
        if self._mesh.size("exchange") == 1 or group is None:
            return count
        most = torch.tensor(count)  # on the host: the device may have work left
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return int(most)

    def run(
        self,
        items: Sequence[Any],
        length: int,
        forward: Callable[[Any, Any], Tensor],
        finish: ReadOutput,
        *,
        backward: bool,
    ) -> list[Any]:
        """Run items through all chunks (and back); return `finish`'s results, on the last stage.

        Args:
            length: length of every stream; it matters only in a pipeline.
            forward: function (chunk, item) -> the chunk's output.
        """

        def step(iterator: Any, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            item = next(iterator)

            def end(output: Tensor, non_loss_data: bool = False) -> Any:
                loss, result = finish(item, output)
                return result if non_loss_data else (loss, _ONE, result)

            return forward(chunk, item), end

        interleaved = len(self._chunks) > 1
        iterators = [iter(items) for _ in self._chunks]
        found: list[Any] = self._function(
            forward_step_func=step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self._chunks if interleaved else self._chunks[0],
            num_microbatches=len(items),
            seq_length=length,
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
            p2p_communicator=self._messages,
            pg_collection=self._groups,
        )
        return found

    def from_last(self, tensors: Sequence[Tensor]) -> None:
        """Give the tensors of the last stage to all stages, in place."""
        group = self._mesh.group("pp")
        if group is not None:
            source = dist.get_process_group_ranks(group)[-1]
            for tensor in tensors:
                dist.broadcast(tensor, src=source, group=group)

    def object_from_last(self, value: Any) -> Any:
        """Return the last stage's object on all stages."""
        group = self._mesh.group("pp")
        if group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[-1], group=group)
        return box[0]


_ONE = torch.tensor(1, dtype=torch.int)
"""Token count for the schedule; nothing is divided by it."""
