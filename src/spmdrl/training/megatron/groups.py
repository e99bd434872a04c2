"""A role's process groups in Megatron's form, and the state that Megatron has once per process.

Every role has its own `ProcessGroupCollection`, made of its mesh's groups; `parallel_state` is
never initialised, so roles with different layouts coexist. megatron-core 0.16.1 still reaches for
other state in five places, and each has its remedy:

- `get_megatron_optimizer` gathers objects over the whole world: the backend makes the
  `DistributedOptimizer` itself (`optimizer.py`).
- DDP makes a one-rank group by a call over the whole world if `expt_dp` is missing: it is given.
- Tied embeddings are all-reduced over `embd` when a model is built: the model is built without that
  group (weights are loaded on both stages), and the schedules are given it.
- Sequence parallelism takes a scratch buffer from `parallel_state`, and a state of the generator
  that dropouts would use: neither depends on a layout, and they are made once (`prepare_process`).
- Two pipeline ranks that overlap their messages use the world's group for one direction: nothing
  else sends messages on it while a role computes.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as rng

from spmdrl.distributed.mesh import Mesh, coordinates, expert_place, group_backend
from spmdrl.training.megatron import compat


def prepare_process(device: torch.device) -> None:
    """Make the state that all Megatron roles of a process share, unless it is made already."""
    compat.apply()
    # torch 2.13 renamed collectives that megatron-core calls by their old names
    old = "reduce_scatter_tensor|all_gather_into_tensor"
    warnings.filterwarnings("ignore", f".*({old}).* is deprecated", FutureWarning)
    # every expert that is whole on its rank gives this warning
    warnings.filterwarnings("ignore", "`sequence_parallel` is set to `True`, but tensor model")
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    tracker, name = rng.get_cuda_rng_tracker(), rng._MODEL_PARALLEL_RNG_TRACKER_NAME
    if name not in tracker.get_states():
        state = torch.empty(0, dtype=torch.uint8)
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
        tracker.set_states({**tracker.get_states(), name: state})


class _Members:
    """This rank's groups along axes of a mesh; a group of this rank only for axes of degree 1."""

    def __init__(self, mesh: Mesh, backend: str | None) -> None:
        self._mesh, self._backend = mesh, backend
        self.solo = self.own([dist.get_rank()])

    def own(self, ranks: list[int]) -> dist.ProcessGroup:
        """Make a new group. Only its members do: ranks outside the role know nothing of it."""
        group: dist.ProcessGroup = dist.new_group(
            ranks, backend=self._backend, use_local_synchronization=True
        )
        return group

    def along(self, axis: str) -> dist.ProcessGroup:
        """Return the mesh's group of an axis."""
        group = self._mesh.group(axis)
        return self.solo if group is None else group

    def alike(self, *axes: str) -> dist.ProcessGroup:
        """Return the group of ranks with this rank's place along these (mesh or expert) axes."""
        degrees, members = self._mesh.degrees, self._mesh.ranks
        places = [{**p, **expert_place(degrees, p)} for p in coordinates(degrees)]
        mine = places[members.index(dist.get_rank())]
        ranks = [
            rank
            for rank, place in zip(members, places, strict=True)
            if all(place[axis] == mine[axis] for axis in axes)
        ]
        return self.solo if len(ranks) == 1 else self.own(ranks)

    def ends(self) -> dist.ProcessGroup | None:
        """Return the group of the first and the last pipeline stage; None outside of these."""
        pipeline = self._mesh.group("pp")
        if pipeline is None:
            return None
        stages = dist.get_process_group_ranks(pipeline)
        ends = [stages[0], stages[-1]]
        if dist.get_rank() not in ends:
            return None
        return pipeline if len(stages) == 2 else self.own(ends)


def make_groups(
    mesh: Mesh, device: torch.device, *, tied: bool, has_experts: bool
) -> ProcessGroupCollection:
    """Make this rank's groups. Only the ranks of the mesh call it.

    Args:
        tied: whether the last pipeline stage's head is the first one's embedding.
    """
    members = _Members(mesh, group_backend(device.type, dist.get_backend_config()))
    experts = dict.fromkeys(("expt_dp", "intra_expt_dp", "tp_ep"), members.solo)
    if has_experts:
        experts = {
            "expt_dp": members.along("edp"),
            "intra_expt_dp": members.alike("pp", "dp_replicate", "ep", "etp"),
            "tp_ep": members.alike("pp", "edp"),
        }
    return ProcessGroupCollection(
        tp=members.along("tp"),
        pp=members.along("pp"),
        cp=members.along("cp"),
        dp=members.along("dp"),
        dp_cp=members.along("reduce"),
        intra_dp_cp=members.along("shard"),
        inter_dist_opt=members.along("dp_replicate"),
        ep=members.along("ep"),
        expt_tp=members.along("etp"),
        **experts,
        embd=members.ends() if tied else None,
        pos_embd=None,
    )
