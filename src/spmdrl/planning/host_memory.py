"""Memory of a node's host: arenas of parts that are away, checkpoints, processes and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spmdrl.config.sections import Config
from spmdrl.models.adapters import adapter_shapes
from spmdrl.models.sharding import global_shapes
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.parts import table_bytes
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.systems.registry import train_system
from spmdrl.planning.token_bounds import step_sizes
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.model_calls import OPTIMIZER, WEIGHTS

PROCESS_BYTES = 3 * 10**9
"""Resident memory of a process with torch, CUDA's libraries and a tokenizer."""

_TOKEN_BYTES = 64
"""Bytes of a token in a home batch: its id, its mask, log-probabilities, values and advantages, as
they are and as they travel.
"""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of the host of the node with most.

    Args:
        computing: parts and working memory of ranks that compute on the host.
        arenas: copies of the parts that are away between their calls.
        offloaded: parts and gradients that training systems keep on the host themselves.
        checkpoint: copies of masters and moments while a thread writes them; each value is copied
            by one of the ranks that hold it.
        processes: the ranks' processes themselves.
        rows: the rows of a step, which lie at home.
    """

    computing: int
    arenas: int
    offloaded: int
    checkpoint: int
    processes: int
    rows: int

    @property
    def total(self) -> int:
        parts = self.computing + self.arenas + self.offloaded
        return parts + self.checkpoint + self.processes + self.rows


def host_memory(config: Config, plan: RolePlan, world_size: int, node_size: int) -> HostMemory:
    """Memory of the host of the fullest node."""
    on_host = set(plan.devices.values()) == {"cpu"}
    computing: dict[int, int] = {}
    arenas: dict[int, int] = {}
    saved: dict[int, int] = {}
    offloaded: dict[int, int] = {}
    shares = {name: saved_bytes(spec) for name, spec in plan.specs.items() if spec.trained}
    for rank, own in plan.memory.items():
        node, parts = rank // node_size, own.plan.parts
        away = [part for part in parts if own.plan.residencies[part.key] == "host"]
        computing[node] = computing.get(node, 0) + (own.plan.peak_bytes if on_host else 0)
        arenas[node] = arenas.get(node, 0) + sum(part.num_bytes for part in away)
        there = _offloaded(plan, rank) + sum(own.windowed.values())
        offloaded[node] = offloaded.get(node, 0) + there
        here = [name for name in shares if rank in plan.layouts[name]]
        saved[node] = saved.get(node, 0) + sum(
            -(-shares[name] // len(plan.layouts[name])) for name in here
        )
    sizes = step_sizes(config)
    rows = sizes.rows * sizes.row_tokens * _TOKEN_BYTES
    return HostMemory(
        computing=max(computing.values(), default=0),
        arenas=max(arenas.values(), default=0),
        offloaded=max(offloaded.values(), default=0),
        checkpoint=max(saved.values(), default=0),
        processes=PROCESS_BYTES * min(node_size, world_size),
        rows=-(-rows * node_size // world_size),
    )


def saved_bytes(spec: RoleSpec) -> int:
    """Bytes of a role that trains in a checkpoint, of which each of its ranks copies about the same
    share: masters and two moments in float32, and without an adapter also what does not train.
    """
    if spec.adapter is not None:
        trained = sum(map(math.prod, adapter_shapes(spec.model, spec.adapter).values()))
        return 12 * trained
    frozen = frozen_names(spec)
    sizes = {name: math.prod(s) for name, s in global_shapes(spec.model, spec.head).items()}
    fixed = sum(size for name, size in sizes.items() if name in frozen)
    return 12 * (sum(sizes.values()) - fixed) + spec.dtype.itemsize * fixed


def _offloaded(plan: RolePlan, rank: int) -> int:
    """Bytes that training systems keep on the host of a rank."""
    every = 0
    for name, spec in plan.specs.items():
        if spec.has_engine or rank not in plan.layouts[name]:
            continue
        weights, states = plan.layouts[name][rank], plan.state_layouts[name][rank]
        held = train_system(spec).memory(spec, weights, states)
        parts = held.optimizer if OPTIMIZER in held.offloads else 0
        parts += table_bytes(weights) if WEIGHTS in held.offloads else 0
        every += parts + held.host
    return every
