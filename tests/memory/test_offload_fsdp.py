"""Sharded training, offloaded between the steps, gives the same bits as never offloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from harness import run_ranks
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.storages import is_resident, live_bytes, local_part
from spmdrl.world import World

WEIGHTS, OPTIMIZER = ("policy", "weights"), ("policy", "optimizer")


def train(world: World, *, offload: bool) -> tuple[list[float], list[Tensor]]:
    """Losses of six steps on two ranks' own data, and this rank's parts of weights and moments."""
    torch.manual_seed(0)
    # rows that two ranks do not divide evenly, and a single row that one rank lacks
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 1))
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    memory = DeviceParts(world.device, staging_bytes=4096)
    weights = list(model.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    data = torch.Generator().manual_seed(world.rank)
    losses = []
    for step in range(6):
        inputs = torch.randn(5, 7, generator=data)
        loss = model(inputs).square().mean() + inputs.mean()
        loss.backward()
        for module in (model[0], model[2], model):
            module.reshard()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        state = [t for held in optimizer.state.values() for t in held.values()]
        if not offload:
            continue
        if step == 0:
            memory.registry.register(*WEIGHTS, tensors=weights, residency="host")
            memory.registry.register(*OPTIMIZER, tensors=state, residency="host")
        assert memory.registry.resident_bytes() == live_bytes([*weights, *state]) > 0
        memory.settle()
        freed = [not is_resident(weight) for weight in weights]
        assert freed == [local_part(weight).numel() > 0 for weight in weights]
        alive = live_bytes([*weights, *state])
        assert alive == 0
        memory.prepare([WEIGHTS])
        with torch.no_grad():
            model(inputs)
        for module in (model[0], model[2], model):
            module.reshard()
        memory.prepare([WEIGHTS, OPTIMIZER])
    tensors = [*weights, *(t for held in optimizer.state.values() for t in held.values())]
    return losses, [local_part(tensor).detach().clone() for tensor in tensors]


def both(world: World) -> tuple[list[float], list[float], bool, int]:
    plain_losses, plain = train(world, offload=False)
    losses, moved = train(world, offload=True)
    same = all(map(torch.equal, plain, moved)) and len(plain) == len(moved) == 16
    return plain_losses, losses, same, sum(tensor.numel() for tensor in plain)


def test_offloaded_between_steps_is_bit_equal():
    for plain_losses, losses, same, count in run_ranks(both, 2):
        assert losses == plain_losses
        assert len(set(losses)) == 6 and count > 0
        assert same
