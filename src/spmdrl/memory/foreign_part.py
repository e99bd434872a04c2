"""`ForeignPart`: a part in the memory of another allocator, which frees it and brings it back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spmdrl.memory.mover import Ticket


class ForeignPart:
    """A part that `DeviceParts` treats like a `TensorPart`; its tensors keep their addresses.

    Args:
        num_bytes: size on the device.
        leave: frees the memory; its argument says whether the content must return with `bring`.
        bring: allocates the memory again, at the same addresses.
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
        """Return no ticket: `leave` makes the copy."""
        assert not self.is_away
        return None

    def leave(self) -> None:
        """Free the memory; the content, if there is any, is kept elsewhere."""
        self._leave(self.is_filled)
        self.is_away = True

    def lose(self) -> None:
        """Free the memory; the content is lost."""
        self._leave(False)
        self.is_away, self.is_filled = True, False

    def bring(self) -> Ticket | None:
        """Make the memory usable again, with its content if that was kept."""
        assert self.is_away
        self._bring()
        self.is_away = False
        return None

    def hand_out(self, *, read_only: bool, stays: bool) -> None:
        """Let the current stream use the memory."""
        assert not self.is_away

    def host_view(self, tensor: Tensor) -> Tensor:
        """Raise ValueError: the content cannot be seen while it is away."""
        raise ValueError(f"a tensor of {tuple(tensor.shape)} is away, with an allocator of its own")

    def filled(self) -> None:
        """Note that the whole content was written."""
        assert not self.is_away
        self.is_filled = True
