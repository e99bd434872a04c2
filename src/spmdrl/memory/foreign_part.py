"""`ForeignPart`: a part whose memory another allocator has, which frees it and brings it back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spmdrl.memory.mover import Ticket


class ForeignPart:
    """To `Residency` what a `TensorPart` is; the tensors keep their addresses.

    Args:
        num_bytes: on the device.
        leave: frees it; its argument says whether the content comes back with `bring`.
        bring: makes room for it again, at the same addresses.
    """

    def __init__(
        self, num_bytes: int, leave: Callable[[bool], None], bring: Callable[[], None]
    ) -> None:
        self.num_bytes = num_bytes
        self._leave, self._bring = leave, bring
        self.is_away = False
        self.is_filled = True
        """Whether the content is defined, wherever it is."""

    def start_leaving(self) -> Ticket | None:
        """None: the copy is made within `leave`."""
        assert not self.is_away
        return None

    def leave(self) -> None:
        """Free the memory; the content is kept elsewhere, if there is any."""
        self._leave(self.is_filled)
        self.is_away = True

    def lose(self) -> None:
        """Free the memory; the content is gone."""
        self._leave(False)
        self.is_away, self.is_filled = True, False

    def bring(self) -> Ticket | None:
        """The memory again, with its content where that was kept."""
        assert self.is_away
        self._bring()
        self.is_away = False
        return None

    def hand_out(self, *, read_only: bool, stays: bool) -> None:
        """Let the current stream use it."""
        assert not self.is_away

    def host_view(self, tensor: Tensor) -> Tensor:
        """Nothing of it can be seen while it is away."""
        raise ValueError(f"a tensor of {tuple(tensor.shape)} is away, with an allocator of its own")

    def filled(self) -> None:
        """The content was written as a whole."""
        assert not self.is_away
        self.is_filled = True
