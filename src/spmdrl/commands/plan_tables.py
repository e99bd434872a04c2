"""Sections of `spmdrl plan --gpu`: memory by call, seconds, the step, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from spmdrl.commands.plan_sections import Section
from spmdrl.distributed.mesh import format_ranks
from spmdrl.memory.parts import dotted
from spmdrl.memory.plan import MemoryPlan
from spmdrl.planning.forecast.work import Link
from spmdrl.planning.outlook import GB, Outlook, StepCost, step_cost
from spmdrl.planning.plan import RolePlan

LINKS: Mapping[Link, str] = {"node": "node", "network": "network", "host": "PCIe", "copy": "host"}
"""Ways of bytes as the table's columns call them; `node` is NVLink where a card has it."""


def machine_section(outlook: Outlook) -> Section:
    """The machine, and what of a device is not for roles."""
    machine, device = outlook.machine, outlook.machine.device
    taken, capacity = outlook.taken_bytes, outlook.capacity
    count = len(outlook.plan.margin.communicators)
    lines = [f"{machine.num_nodes} x {machine.devices_per_node} {device.name}"]
    if taken:
        room = "" if capacity is None else f"; {_gb(capacity)} GB are for roles"
        lines.append(
            f"of {_gb(device.memory_bytes)} GB each: CUDA context {_gb(taken['context'])}, "
            f"{count} NCCL communicators {_gb(taken['nccl'])}, workspaces "
            f"{_gb(taken['workspaces'])}, fragments {_gb(taken['fragments'])}{room}"
        )
    rows = [("communicator", "ranks", "GB")]
    rows += [
        (_short(own.use), str(own.size), _gb(own.num_bytes))
        for own in outlook.plan.margin.communicators
    ]
    return Section(title="machine", rows=rows if count and taken else (), lines=lines)


def _short(use: str, most: int = 4) -> str:
    """The first uses of a communicator, and how many others it has."""
    uses = use.split(", ")
    return ", ".join([*uses[:most], *([f"{len(uses) - most} more"] if uses[most:] else [])])


def memory_section(plan: RolePlan) -> Section:
    """Parts and working memory of every call, once for all ranks with the same plan."""
    head = ("ranks", "call", "parts GB", "working GB", "peak GB", "in GB", "out GB")
    ranks: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    texts: dict[int, tuple[tuple[str, ...], ...]] = {}
    for rank, own in plan.memory.items():
        if id(own) not in texts:
            texts[id(own)] = tuple(_call_rows(own.plan))
        ranks.setdefault(texts[id(own)], []).append(rank)
    rows = [(format_ranks(own), *row) for calls, own in ranks.items() for row in calls]
    return Section(title="memory of a rank by call", rows=[head, *rows])


def _call_rows(plan: MemoryPlan) -> Iterator[tuple[str, ...]]:
    sizes = {part.key: part.num_bytes for part in plan.parts}
    for call in plan.calls:
        parts = sum(sizes[key] for key in call.resident)
        yield (
            call.name,
            _gb(parts),
            _gb(call.peak_bytes - parts),
            _gb(call.peak_bytes) + ("" if _within(call.peak_bytes, plan.capacity) else " !"),
            _gb(call.bytes_in),
            _gb(call.bytes_out),
        )


def _within(size: int, capacity: int | None) -> bool:
    return capacity is None or size <= capacity


def seconds_section(outlook: Outlook) -> Section:
    """Each call's seconds with the bound that holds, and its work on the rank with most."""
    forecast = outlook.forecast
    assert forecast is not None
    rows = [
        (
            *("phase", "call", "ranks", "seconds", "bound", "TFLOP", "MFU %", "HBM GB"),
            *(f"{name} GB" for name in LINKS.values()),
        )
    ]
    for call in forecast.calls:
        used = outlook.utilisation(call)
        rows.append(
            (
                call.phase,
                f"{call.role}.{call.call}",
                str(len(call.ranks)),
                f"{call.timed.seconds:.3g}",
                call.timed.bound,
                f"{call.work.total_flops / 1e12:,.4g}" if call.work.total_flops else "",
                f"{100 * used:.1f}" if used else "",
                _gb(call.work.memory_bytes, ""),
                *(_gb(call.work.link_bytes.get(link, 0.0), "") for link in LINKS),
            )
        )
    spans = [f"{phase} {seconds:.3g} s" for phase, seconds in forecast.phase_seconds.items()]
    lengths = outlook.lengths
    lines = [
        "per rank; by phase: " + ", ".join(spans),
        f"prompts of {lengths.prompt:g} tokens, responses of {lengths.response:g}, the longest "
        f"{lengths.longest:g}",
    ]
    return Section(title="seconds of a usual step", rows=rows, lines=lines)


def step_section(outlook: Outlook) -> Section:
    """Rates, host memory, energy and cost of the step."""
    return Section(title="step", lines=list(_step_lines(outlook)))


def _step_lines(outlook: Outlook) -> Iterator[str]:
    forecast, cost, machine = outlook.forecast, step_cost(outlook), outlook.machine
    if forecast is not None and cost is not None:
        yield from _cost_lines(outlook, cost)
        if forecast.lag_saves > 0.001 * forecast.seconds:
            share = 100 * forecast.lag_saves / forecast.seconds
            yield f"lag: 1 would save {forecast.lag_saves:.3g} s ({share:.0f} %)"
    host = outlook.host
    yield (
        f"host memory of a node: {_gb(host.total)} of {_gb(machine.host_bytes)} GB ("
        + (f"computing {_gb(host.computing)}, " if host.computing else "")
        + (f"kept by backends {_gb(host.offloaded)}, " if host.offloaded else "")
        + f"parts that are away {_gb(host.arenas)}, a checkpoint {_gb(host.checkpoint)}, processes "
        f"{_gb(host.processes)}, rows {_gb(host.rows)})"
    )


def _cost_lines(outlook: Outlook, cost: StepCost) -> Iterator[str]:
    forecast = outlook.forecast
    assert forecast is not None
    yield (
        f"{forecast.seconds:.4g} s, {forecast.tokens:,.0f} tokens, {cost.tokens_per_second:,.0f} "
        f"tokens/s/GPU, {100 * cost.utilisation:.1f} % MFU"
    )
    yield f"devices wait for others {100 * cost.idle_share:.1f} % of it"
    price = "" if cost.cost is None else f"; costs {cost.cost:,.2f} a step"
    price += "" if cost.cost is None else f", {cost.cost * outlook.config.steps:,.0f} the run"
    yield f"{cost.joules / 1e6:,.3g} MJ ({cost.joules / 3.6e6:,.2f} kWh) a step{price}"


def lack_section(plan: RolePlan, host_lack: str | None, changes: Sequence[str]) -> Section:
    """Calls that do not fit, and the nearest changes with which they do."""
    lines = list(_lacks(plan))
    lines += [] if host_lack is None else [host_lack]
    if changes:
        lines += ["fits with one of:", *(f"  {change}" for change in changes)]
    else:
        lines.append("no change was found with which it fits: take more or larger devices")
    return Section(title="does not fit", lines=lines)


def _lacks(plan: RolePlan) -> Iterator[str]:
    """The fullest call of ranks on which one does not fit, with the sizes of its parts."""
    ranks: dict[str, list[int]] = {}
    for rank, memory in plan.memory.items():
        if not memory.plan.fits:
            ranks.setdefault(_lack(memory.plan), []).append(rank)
    for lack, own in ranks.items():
        yield f"rank{'s' * (len(own) > 1)} {format_ranks(own)}: {lack}"


def _lack(plan: MemoryPlan) -> str:
    assert plan.capacity is not None
    call = max(plan.calls, key=lambda call: call.peak_bytes)
    sizes = {part.key: part.num_bytes for part in plan.parts}
    parts = [f"{dotted(key)} {_gb(sizes[key])}" for key in call.resident if sizes[key]]
    work = call.peak_bytes - sum(sizes[key] for key in call.resident)
    return (
        f"{call.name} needs {_gb(call.peak_bytes)} GB, {_gb(plan.capacity)} GB are for roles: "
        f"{', '.join([*parts, f'working memory {_gb(work)}'])}"
    )


def _gb(size: float, zero: str = "0") -> str:
    if not size:
        return zero
    return f"{size / GB:,.2f}" if size >= GB / 100 else f"{size / GB:.2g}"
