"""A role's process groups as Megatron takes them, and what Megatron has once in a process.

Every role has a `ProcessGroupCollection` of its own, made of its mesh's groups; `parallel_state` is
never initialised, so roles of different layouts live side by side. What megatron-core 0.16.1 still
takes from elsewhere, and what is done about it:

- `get_megatron_optimizer` gathers objects over the whole world: the backend makes the
  `DistributedOptimizer` itself (`optimizer.py`).
- DDP makes a one-rank group by a call over the whole world where `expt_dp` is missing: it is given.
- Tied embeddings are all-reduced over `embd` when a model is built: it is built without that group
  (weights are loaded on both stages), and the schedules are given it.
- Sequence parallelism takes a scratch buffer from `parallel_state`, and a state of the generator
  that dropouts would use: neither knows of a layout, and they are made once (`prepare_process`).
- Two pipeline ranks that overlap their messages use the world's group for one direction: messages
  have no other users while a role computes.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as rng

from spmdrl.distributed.expert_axes import expert_place
from spmdrl.distributed.mesh import Mesh, coordinates, group_backend
from spmdrl.training.megatron import compat


def prepare_process(device: torch.device) -> None:
    """Make what all Megatron roles of a process share; the first of them does."""
    compat.apply()
    # torch 2.13 has new names for what megatron-core calls by the old ones
    old = "reduce_scatter_tensor|all_gather_into_tensor"
    warnings.filterwarnings("ignore", f".*({old}).* is deprecated", FutureWarning)
    # an expert that is whole on its rank: each of them says so
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
    """This rank's groups along axes of a mesh; a group of one rank, made once, where there is
    nothing along them.
    """

    def __init__(self, mesh: Mesh, backend: str | None) -> None:
        self._mesh, self._backend = mesh, backend
        self.solo = self.own([dist.get_rank()])

    def own(self, ranks: list[int]) -> dist.ProcessGroup:
        """A new group. Only its members make it: ranks outside of the role know nothing of it."""
        group: dist.ProcessGroup = dist.new_group(
            ranks, backend=self._backend, use_local_synchronization=True
        )
        return group

    def along(self, axis: str) -> dist.ProcessGroup:
        """The mesh's group of an axis."""
        group = self._mesh.group(axis)
        return self.solo if group is None else group

    def alike(self, *axes: str) -> dist.ProcessGroup:
        """The ranks that agree with this one in these axes, of the mesh's and of the experts'."""
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
        """The first and the last pipeline stage; None on stages between, and without a pipeline."""
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
    """The groups of this rank. Only the ranks of the mesh call it.

    Args:
        tied: the last pipeline stage's head is the first one's embedding.
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
