"""`EngineWeights`: the parameters of the native engine's decoder that this rank holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spmdrl.memory.storages import require_resident
from spmdrl.models.decoder import Decoder
from spmdrl.models.local_shards import LocalShard, LocalTensors


class EngineWeights:
    """Parameters of a decoder that is made without storage, and what becomes of them.

    Args:
        changed: callback after a parameter's storage was replaced by another.
    """

    def __init__(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        changed: Callable[[], None],
    ) -> None:
        self._decoder, self._dtype, self._device = decoder, dtype, device
        self._changed = changed

    def table(self) -> dict[str, LocalShard]:
        """Return the parameters that this rank needs to hold, by local name."""
        slices = self._decoder.slices()
        return {
            name: LocalShard(shape=tuple(p.shape), dtype=self._dtype, slices=slices[name])
            for name, p in self._decoder.named_parameters()
        }

    def local_tensors(self) -> LocalTensors:
        """Return the weights that this rank holds so far."""
        slices = self._decoder.slices()
        found = self._decoder.named_parameters()
        return {name: (p.data, slices[name]) for name, p in found if not p.is_meta}

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        """Use `tensor`'s storage as the parameter.

        Raises:
            ValueError: shape, dtype or device differ from the parameter's.
        """
        wanted = self.table()[local_name]
        found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        if found != (wanted.shape, wanted.dtype, self._device.type):
            raise ValueError(
                f"{local_name}: the engine cannot use a tensor of {found} in place of "
                f"{(wanted.shape, wanted.dtype, self._device.type)}"
            )
        module_name, _, leaf = local_name.rpartition(".")
        parameter = nn.Parameter(tensor.detach(), requires_grad=False)
        setattr(self._decoder.get_submodule(module_name), leaf, parameter)
        self._changed()

    def allocate(self, local_name: str) -> Tensor:
        """Allocate the engine's own storage for the parameter, not yet filled."""
        wanted = self.table()[local_name]
        tensor = torch.empty(wanted.shape, dtype=wanted.dtype, device=self._device)
        self.adopt(local_name, tensor)
        return tensor

    def check(self) -> None:
        """Raise ValueError if a parameter was never loaded, or is not on the device now."""
        missing = [n for n, p in self._decoder.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(f"the engine has no weights yet: {missing[0]} was never loaded")
        require_resident("rollout", "weights", self._decoder.parameters())
