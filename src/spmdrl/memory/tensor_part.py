"""`TensorPart`: a part's own storages, and the place of their content.

`ForeignPart`: a part in the memory of another allocator, which frees it and brings it back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spmdrl.memory.arena import HostArena, layout_arena
from spmdrl.memory.mapped import MappedArena
from spmdrl.memory.mover import Mover, Ticket, allocate, free
from spmdrl.memory.storages import storage_key


class TensorPart:
    """Storages that are on the device, coming (their copy runs), or away, all together.

    Leaving takes two calls, `start_leaving` and `leave`, so that the copies of several parts run
    before the host waits for any of them.

    Args:
        storages: distinct storages, not freed, with defined content.
        memory: theirs, if they keep their addresses; by default torch's allocator has it.
    """

    def __init__(
        self,
        storages: Sequence[torch.UntypedStorage],
        mover: Mover,
        memory: MappedArena | None = None,
    ) -> None:
        self._storages, self._mover, self._memory = tuple(storages), mover, memory
        self._layout = layout_arena([s.nbytes() for s in storages], mover.staging_bytes)
        self.num_bytes = sum(self._layout.sizes)
        self.is_away = False
        self.is_filled = True
        """Whether the content is defined, wherever it is."""
        self._arena: HostArena | None = None
        self._host_is_current = False
        self._coming: Ticket | None = None

    @property
    def mapped_bytes(self) -> int:
        """Bytes on the device of which torch's allocator does not know."""
        return 0 if self._memory is None or self.is_away else self.num_bytes

    def start_leaving(self) -> Ticket | None:
        """Start copying the content that the host lacks; None if it lacks nothing."""
        assert not self.is_away
        if self._coming is not None:  # it came and was never used
            self._coming.finish()
        if self._host_is_current or not self.is_filled or not self._storages:
            return None
        if self._arena is None:
            self._arena = HostArena(self._layout.num_bytes, pinned=self._mover.on_cuda)
        self._host_is_current = True
        return self._mover.to_host(self._storages, self._layout, self._arena)

    def leave(self) -> None:
        """Free the storages; the copy must be done."""
        if self._memory is None:
            free(self._storages)
        else:
            self._memory.unmap()
        self.is_away, self._coming = True, None

    def lose(self) -> None:
        """Free the storages; the content is lost."""
        if self._coming is not None:
            self._coming.finish()
        self.leave()
        self._host_is_current = False
        self.is_filled = not self._storages

    def bring(self, *, empty: bool = False) -> Ticket | None:
        """Allocate the storages, and start filling them if they have content.

        Args:
            empty: leave the content behind, as the next call overwrites all of it.
        """
        assert self.is_away
        if self._memory is None:
            allocate(self._storages, self._layout.sizes)
        else:
            self._memory.map()
        self.is_away = False
        if empty:
            self._host_is_current, self.is_filled = False, not self._storages
        if not self.is_filled or not self._storages:
            return None
        assert self._arena is not None and self._host_is_current
        self._coming = self._mover.to_device(self._storages, self._layout, self._arena)
        return self._coming

    def hand_out(self, *, read_only: bool, stays: bool) -> None:
        """Let the current stream use the storages.

        Args:
            read_only: if False, the host's copy is outdated from now on.
            stays: the part is kept; the arena, needed only at start-up, is freed.
        """
        assert not self.is_away
        if self._coming is not None:
            self._mover.let_compute_wait(self._coming)
            if stays:
                self._coming.finish()
            self._coming = None
        if stays:
            self._arena = None
        self._host_is_current &= read_only and not stays

    def host_view(self, tensor: Tensor) -> Tensor:
        """The same values in the arena, while the part is away; values written there come back.

        Args:
            tensor: tensor over one of the storages.
        """
        assert self.is_away and self._arena is not None and self._host_is_current
        keys = [storage_key(storage) for storage in self._storages]
        at = keys.index(storage_key(tensor.untyped_storage()))
        offset = self._layout.offsets[at] // tensor.element_size() + tensor.storage_offset()
        typed = self._arena.bytes.view(tensor.dtype)
        return typed.as_strided(tensor.size(), tensor.stride(), offset)

    def filled(self) -> None:
        """Note that the whole content was written."""
        assert not self.is_away
        self.is_filled, self._host_is_current = True, False


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
        self.mapped_bytes = 0
        """None: the other allocator is torch's too."""

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

    def bring(self, *, empty: bool = False) -> Ticket | None:
        """Make the memory usable again, with its content if that was kept.

        Args:
            empty: the next call overwrites the content, which is undefined until then.
        """
        assert self.is_away
        self._bring()
        self.is_away, self.is_filled = False, self.is_filled and not empty
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
