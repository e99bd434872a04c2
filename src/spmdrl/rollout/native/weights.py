"""`EngineWeights`: the parameters of the native engine's decoder, and of its adapter, that this
rank holds.

A copy of the decoder's weights in the layout that CPU kernels read fastest, for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spmdrl.memory.mapped import MappedArena
from spmdrl.memory.storages import require_resident
from spmdrl.models.adapter_weights import AdapterWeights, merged
from spmdrl.models.blocks.projections import Embedding, Projection
from spmdrl.models.decoder import Decoder
from spmdrl.models.linear import in_blocks, serves
from spmdrl.models.local_shards import LocalShard, LocalTensors


class EngineWeights:
    """Parameters of a decoder that is made without storage, and what becomes of them.

    Args:
        changed: callback after a parameter's storage was replaced by another.
        adapter: the adapter of the decoder, if it has one, also made without storage.
        memory: memory for what is allocated; by default torch's allocator has it.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        changed: Callable[[], None],
        adapter: AdapterWeights | None = None,
        memory: MappedArena | None = None,
    ) -> None:
        self.memory = memory
        roots: list[nn.Module] = [decoder, *([] if adapter is None else [adapter])]
        self._root_of = {name: root for root in roots for name, _ in root.named_parameters()}
        self._roots, self._device, self._changed = roots, device, changed
        slices = decoder.slices() | ({} if adapter is None else adapter.tables())
        self._table = {
            name: LocalShard(shape=tuple(p.shape), dtype=p.dtype, slices=slices[name])
            for name, p in self._parameters()
        }

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for root in self._roots:
            yield from root.named_parameters()

    def table(self) -> Mapping[str, LocalShard]:
        """Return the parameters that this rank needs to hold, by local name."""
        return self._table

    def local_tensors(self) -> LocalTensors:
        """Return the weights that this rank holds so far."""
        found = self._parameters()
        return {name: (p.data, self._table[name].slices) for name, p in found if not p.is_meta}

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        """Use `tensor`'s storage as the parameter.

        Raises:
            ValueError: shape, dtype or device differ from the parameter's.
        """
        wanted = self._table[local_name]
        found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        if found != (wanted.shape, wanted.dtype, self._device.type):
            raise ValueError(
                f"{local_name}: the engine cannot use a tensor of {found} in place of "
                f"{(wanted.shape, wanted.dtype, self._device.type)}"
            )
        module_name, _, leaf = local_name.rpartition(".")
        parameter = nn.Parameter(tensor.detach(), requires_grad=False)
        setattr(self._root_of[local_name].get_submodule(module_name), leaf, parameter)
        self._changed()

    def allocate(self, local_name: str) -> Tensor:
        """Allocate the engine's own storage for the parameter, not yet filled."""
        wanted = self._table[local_name]
        if self.memory is None:
            tensor = torch.empty(wanted.shape, dtype=wanted.dtype, device=self._device)
        else:
            tensor = self.memory.take(wanted.shape, wanted.dtype)
        self.adopt(local_name, tensor)
        return tensor

    def check(self) -> None:
        """Raise ValueError if a parameter was never loaded, or is not on the device now."""
        missing = [name for name, p in self._parameters() if p.is_meta]
        if missing:
            raise ValueError(f"the engine has no weights yet: {missing[0]} was never loaded")
        is_away = self.memory is not None and not self.memory.is_mapped
        held = [p for _, p in self._parameters()]
        require_resident("rollout", "weights", held, is_away=is_away)


MIN_STEPS = 24
"""Decode steps after which the copy pays off: laying out SmolLM2-135M takes 0.2 to 0.3 s on two
cores and saves at least 10 ms per step of 32 samples."""


@contextmanager
def blocked_weights(
    decoder: Decoder, num_steps: int, adapter: AdapterWeights | None = None
) -> Iterator[bool]:
    """Let products inside use a copy of the weights in blocks, if that pays for `num_steps` steps.

    The copy is as large as the weights. Every call makes a new one and drops it afterwards, so that
    it is never older than the weights, whose storage may be the trainer's.

    Args:
        adapter: an adapter to merge into the copy. Experts are not in the copy.

    Yields: whether there is a copy; the adapter must then be applied to experts only.
    """
    holders: dict[Projection | Embedding, str] = {decoder.head_holder: ""}
    holders |= {m: n for n, m in decoder.named_modules() if isinstance(m, Projection)}
    if num_steps < MIN_STEPS or not all(serves(h.weight, h.weight) for h in holders):
        yield False
        return
    slices = decoder.slices()
    tables = {} if adapter is None else adapter.tables()
    try:
        for holder, name in holders.items():
            weight: Tensor = holder.weight
            if adapter is not None and (addition := adapter.addition(name)) is not None:
                own = addition.named_parameters(prefix=name)
                tensors = {local: (p.data, tables[local]) for local, p in own}
                weight = merged(weight, slices[f"{name}.weight"], adapter.adapter, tensors)
            holder.blocked = in_blocks(weight)
        yield True
    finally:
        for holder in holders:
            holder.blocked = None
