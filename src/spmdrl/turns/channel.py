"""`Channel`: messages to and from a worker, without waiting for it."""

from __future__ import annotations

import socket
import struct

_HEADER = struct.Struct("!I")
_PIECE, _PIECES = 1 << 20, 64
MAX_MESSAGE = 1 << 28
"""Most bytes of a message, so that no worker can fill the rank's memory."""


class Broken(ConnectionError):
    """The worker has closed its end, or sent what is no message."""


class Channel:
    """Messages over a socket, each with its length before it, as `rewards.process.send` writes.

    Args:
        end: the rank's end of the socket.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.socket = end
        self._out, self._in = bytearray(), bytearray()

    @property
    def has_unsent(self) -> bool:
        """Whether a part of a message waits until the worker has read what was sent before."""
        return bool(self._out)

    def put(self, payload: bytes) -> None:
        """Send a message, or as much of it as can be sent now. Broken: the worker has ended."""
        self._out += _HEADER.pack(len(payload)) + payload
        self.flush()

    def flush(self) -> None:
        """Send what has not been sent, as much as can be now. Broken: the worker has ended."""
        while self._out:
            try:
                count = self.socket.send(bytes(self._out[:_PIECE]))
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                raise Broken from None
            del self._out[:count]

    def take(self) -> tuple[list[bytes], bool]:
        """Return the messages that have arrived, and whether more may come: not from a worker that
        has ended, or whose messages are too long.
        """
        is_open = True
        for _ in range(_PIECES):  # a worker may send faster than this reads
            try:
                piece = self.socket.recv(_PIECE)
            except BlockingIOError:
                break
            except ConnectionResetError:
                piece = b""
            self._in += piece
            is_open = bool(piece) and self._length() <= MAX_MESSAGE
            if not is_open:
                break
        found = []
        while len(self._in) >= _HEADER.size + self._length():
            end = _HEADER.size + self._length()
            found.append(bytes(self._in[_HEADER.size : end]))
            del self._in[:end]
        return found, is_open

    def _length(self) -> int:
        """Return the bytes of the message that is arriving."""
        if len(self._in) < _HEADER.size:
            return 0
        return int(_HEADER.unpack_from(self._in)[0])

    def close(self) -> None:
        self.socket.close()
