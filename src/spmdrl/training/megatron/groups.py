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


def make_groups(
    mesh: Mesh, device: torch.device, *, tied: bool, has_experts: bool
) -> ProcessGroupCollection:
    """The groups of this rank. Only the ranks of the mesh call it.

    Args:
        tied: the last pipeline stage's head is the first one's embedding.
    """
    backend = group_backend(device.type, dist.get_backend_config())

    def own(ranks: list[int]) -> dist.ProcessGroup:
        # only its members make it: ranks outside of the role know nothing of it
        group: dist.ProcessGroup = dist.new_group(
            ranks, backend=backend, use_local_synchronization=True
        )
        return group

    solo = own([dist.get_rank()])

    def along(axis: str) -> dist.ProcessGroup:
        group = mesh.group(axis)
        return solo if group is None else group

    def alike(*axes: str) -> dist.ProcessGroup:
        """The ranks that agree with this one in these axes, of the mesh's and of the experts'."""
        places = [{**p, **expert_place(mesh.degrees, p)} for p in coordinates(mesh.degrees)]
        mine = places[mesh.ranks.index(dist.get_rank())]
        ranks = [
            rank
            for rank, place in zip(mesh.ranks, places, strict=True)
            if all(place[axis] == mine[axis] for axis in axes)
        ]
        return solo if len(ranks) == 1 else own(ranks)

    experts = {"expt_dp": solo, "intra_expt_dp": solo, "tp_ep": solo}
    if has_experts:
        experts = {
            "expt_dp": along("edp"),
            "intra_expt_dp": alike("pp", "dp_replicate", "ep", "etp"),
            "tp_ep": alike("pp", "edp"),
        }
    groups = ProcessGroupCollection(
        tp=along("tp"),
        pp=along("pp"),
        cp=along("cp"),
        dp=along("dp"),
        dp_cp=along("reduce"),
        intra_dp_cp=along("shard"),
        inter_dist_opt=along("dp_replicate"),
        ep=along("ep"),
        expt_tp=along("etp"),
        **experts,
        embd=None,
        pos_embd=None,
    )
    pipeline = mesh.group("pp")
    if tied and pipeline is not None:
        stages = dist.get_process_group_ranks(pipeline)
        ends = [stages[0], stages[-1]]
        if dist.get_rank() in ends:
            groups.embd = pipeline if len(stages) == 2 else own(ends)
    return groups
