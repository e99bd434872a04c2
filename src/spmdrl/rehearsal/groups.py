"""`RehearsedGroup`: a process group of torch whose members are threads and meet in `Meetings`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.rehearsal.meetings import Call, Group, Meeting, Meetings, put
from spmdrl.rehearsal.turns import Abandoned

BACKEND = "rehearsal"

_MEETINGS: ContextVar[Meetings] = ContextVar("meetings")


class Pending(dist.Work):
    """The handle of a collective or message that has begun."""

    def __init__(self, meetings: Meetings, meeting: Meeting) -> None:
        super().__init__()
        self._meetings, self._meeting = meetings, meeting

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._meetings.wait(self._meeting)
        return True

    def is_completed(self) -> bool:
        return self._meeting.is_done

    def is_success(self) -> bool:
        return self._meeting.is_done


# torch's stubs give the methods overloads and names of arguments that its own callers do not use
_Base: Any = dist.ProcessGroup


class RehearsedGroup(_Base):  # type: ignore[misc]
    """A group that records and compares the calls of its members, and moves their data.

    It has the methods that `torch.distributed` calls, by torch's names.
    """

    def __init__(self, meetings: Meetings, group: Group, rank: int) -> None:
        super().__init__(rank, len(group.ranks))
        self._meetings, self._group, self._member = meetings, group, rank

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return self._group.name

    def _join(self, call: Call, move: Any) -> Pending:
        meeting = self._meetings.join(self._group, self._member, call, move)
        return Pending(self._meetings, meeting)

    # Collectives of equal parts

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        reduce, name = _reduction(opts)

        def move(calls: Sequence[Call]) -> None:
            for i in range(len(tensors)):
                total = reduce([call.given[i] for call in calls])
                for call in calls:
                    put(call.taken[i], total)

        text = f"all_reduce({name}) of {_shapes(tensors)}"
        return self._join(Call(text=text, given=tensors, taken=tensors), move)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> Pending:
        reduce, name = _reduction(opts)

        def move(calls: Sequence[Call]) -> None:
            put(calls[opts.rootRank].taken[0], reduce([call.given[0] for call in calls]))

        text = f"reduce({name}) to member {opts.rootRank} of {_shapes(tensors)}"
        return self._join(Call(text=text, given=tensors, taken=tensors), move)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            for call in calls:
                for tensor, value in zip(call.taken, calls[opts.rootRank].given, strict=True):
                    put(tensor, value)

        text = f"broadcast from member {opts.rootRank} of {_shapes(tensors)}"
        return self._join(Call(text=text, given=tensors, taken=tensors), move)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            for call in calls:
                for tensor, other in zip(call.taken, calls, strict=True):
                    put(tensor, other.given[0])

        text = f"all_gather of {_shapes(inputs)} into {_shapes(outputs[0])}"
        return self._join(Call(text=text, given=inputs, taken=outputs[0]), move)

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            whole = torch.cat([call.given[0].reshape(-1) for call in calls])
            for call in calls:
                put(call.taken[0], whole)

        text = f"all_gather_single of {_shapes([own])} into {_shapes([output])}"
        return self._join(Call(text=text, given=[own], taken=[output]), move)

    _allgather_base = all_gather_single

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> Pending:
        reduce, name = _reduction(opts)

        def move(calls: Sequence[Call]) -> None:
            totals = [reduce(list(parts)) for parts in zip(*(c.given for c in calls), strict=True)]
            for call, total in zip(calls, totals, strict=True):
                put(call.taken[0], total)

        text = f"reduce_scatter({name}) of {_shapes(inputs[0])} into {_shapes(outputs)}"
        return self._join(Call(text=text, given=inputs[0], taken=outputs), move)

    def reduce_scatter_single(self, output: Tensor, own: Tensor, opts: Any = None) -> Pending:
        reduce, name = _reduction(opts)

        def move(calls: Sequence[Call]) -> None:
            total = reduce([call.given[0].reshape(-1) for call in calls])
            for call, part in zip(calls, total.chunk(len(calls)), strict=True):
                put(call.taken[0], part)

        text = f"reduce_scatter_single({name}) of {_shapes([own])} into {_shapes([output])}"
        return self._join(Call(text=text, given=[own], taken=[output]), move)

    _reduce_scatter_base = reduce_scatter_single

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        works = [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)]
        for work in works[:-1]:
            work.wait()
        return works[-1]

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Pending:
        pairs = zip(outputs, inputs, strict=True)
        works = [self.reduce_scatter_single(*pair, opts) for pair in pairs]
        for work in works[:-1]:
            work.wait()
        return works[-1]

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            for tensor, call in zip(calls[opts.rootRank].taken, calls, strict=True):
                put(tensor, call.given[0])

        text = f"gather at member {opts.rootRank} of {_shapes(inputs)}"
        taken = outputs[0] if outputs else []
        return self._join(Call(text=text, given=inputs, taken=taken), move)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            for call, value in zip(calls, calls[opts.rootRank].given, strict=True):
                put(call.taken[0], value)

        text = f"scatter from member {opts.rootRank} of {_shapes(outputs)}"
        given = inputs[0] if inputs else []
        return self._join(Call(text=text, given=given, taken=outputs), move)

    def barrier(self, opts: Any = None) -> Pending:
        return self._join(Call(text="barrier"), lambda calls: None)

    # Collectives of unequal parts

    def all_to_all_single(
        self,
        output: Tensor,
        own: Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        opts: Any = None,
    ) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            parts = [torch.split(call.given[0], list(call.sent)) for call in calls]
            for member, call in enumerate(calls):
                put(call.taken[0], torch.cat([own[member] for own in parts]))

        size = self.size()
        row = f"{own.dtype} [*{''.join(f', {n}' for n in own.shape[1:])}]"
        call = Call(
            text=f"all_to_all_single of {row}".replace("torch.", ""),
            given=[own],
            taken=[output],
            sent=list(sent) or [own.shape[0] // size] * size,
            received=list(received) or [output.shape[0] // size] * size,
        )
        return self._join(call, move)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        def move(calls: Sequence[Call]) -> None:
            for member, call in enumerate(calls):
                for tensor, other in zip(call.taken, calls, strict=True):
                    put(tensor, other.given[member])

        call = Call(
            text=f"all_to_all of {inputs[0].dtype}".replace("torch.", ""),
            given=inputs,
            taken=outputs,
            sent=[tensor.numel() for tensor in inputs],
            received=[tensor.numel() for tensor in outputs],
        )
        return self._join(call, move)

    # Messages

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Pending:
        call = Call(text=self._message(tensors, self._member, to, tag), given=tensors)
        meeting = self._meetings.send(self._group, self._member, to, tag, call)
        return Pending(self._meetings, meeting)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Pending:
        call = Call(text=self._message(tensors, source, self._member, tag), taken=tensors)
        meeting = self._meetings.receive(self._group, self._member, source, tag, call)
        return Pending(self._meetings, meeting)

    def _message(self, tensors: list[Tensor], source: int, to: int, tag: int) -> str:
        ranks = self._group.ranks
        what = f"{tensors[0].numel()} x {tensors[0].dtype}".replace("torch.", "")
        return f"message from rank {ranks[source]} to rank {ranks[to]} (tag {tag}) of {what}"


def _shapes(tensors: Sequence[Tensor]) -> str:
    """Dtype and shape of each tensor; equal ones are counted."""
    found: dict[str, int] = {}
    for tensor in tensors:
        text = f"{tensor.dtype} {list(tensor.shape)}".replace("torch.", "")
        found[text] = found.get(text, 0) + 1
    return " and ".join(text if n == 1 else f"{n} x {text}" for text, n in found.items())


def _reduction(opts: Any) -> tuple[Any, str]:
    """Function of a list of tensors, and its name."""
    operation: Any = opts.reduceOp
    kind: Any = dist.ReduceOp.RedOpType
    is_wrapped = isinstance(operation, dist.ReduceOp)
    code = operation.op if is_wrapped else operation
    functions = {
        kind.SUM: lambda stacked: stacked.sum(0, dtype=stacked.dtype),
        kind.AVG: lambda stacked: stacked.sum(0, dtype=stacked.dtype) / len(stacked),
        kind.PRODUCT: lambda stacked: stacked.prod(0, dtype=stacked.dtype),
        kind.MIN: lambda stacked: stacked.amin(0),
        kind.MAX: lambda stacked: stacked.amax(0),
    }
    if code not in functions:
        raise NotImplementedError(f"a rehearsal has no reduction {code}")
    name = str(code).rpartition(".")[2].lower()
    return lambda tensors: functions[code](torch.stack(list(tensors))), name


def _create(options: Any, backend_options: Any) -> RehearsedGroup:
    meetings = _MEETINGS.get()
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    group = meetings.group(options.group_id, ranks)
    return RehearsedGroup(meetings, group, options.group_rank)


@contextmanager
def threads_as_ranks() -> Iterator[None]:
    """Give every thread inside a `torch.distributed` of its own."""
    # torch has it for tests of its own; it replaces the module's table of groups
    from torch.testing._internal.distributed import multi_threaded_pg

    threaded: Any = multi_threaded_pg

    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    hook = sys.excepthook  # every rank's start wraps it
    threaded._install_threaded_pg()
    isolate(True)
    try:
        yield
    finally:
        isolate(False)
        threaded._uninstall_threaded_pg()
        sys.excepthook = hook


def join_world(meetings: Meetings, store: Any, rank: int) -> None:
    """Make the default process group of this thread, a rank of the rehearsal.

    Raises:
        Abandoned: the rehearsal has ended, and with it the groups of threads.
    """
    if meetings.turns.is_abandoned:
        raise Abandoned
    _MEETINGS.set(meetings)
    # backward passes of the CPU stay in their thread; so must those that torch would give away
    torch.autograd.set_multithreading_enabled(False)
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=meetings.turns.size)
