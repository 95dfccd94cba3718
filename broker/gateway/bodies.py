"""Bodies of requests that do not go to a room in one piece (S26).

Owns what of a body is between its client and its host: a file, for one that is larger than memory should
hold, or a few pieces, for a room that takes it as it comes. Must not know HTTP or links. Peers:
`http_server`, which fills them, and `forward`, which hands out piece after piece as the host wants them.
"""

import os
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from broker.gateway.spill import Spills

__all__ = ["PIECE_BYTES", "BodyLost", "SpilledBody", "StreamedBody"]

#: Bytes of one piece on the link.
PIECE_BYTES: Final = 64 * 1024

#: Takes a piece, or None for a rest that will not come, and whether it is the last.
Take = Callable[[bytes | None, bool], None]


class BodyLost(Exception):
    """There is no room for it, or the disk has failed. The text says which."""


class SpilledBody:
    """A body in a file without a name, which goes with its process."""

    def __init__(self, spills: Spills) -> None:
        self._spills = spills
        self.size = 0
        try:
            self._descriptor = spills.open_nameless()
        except OSError as error:
            raise BodyLost(error.strerror or str(error)) from error

    def append(self, data: bytes | bytearray) -> None:
        """Add what comes next.

        Raises:
            BodyLost: All spill files have their fill, or the disk takes nothing.
        """
        if not self._spills.has_room_for(len(data)):
            raise BodyLost("all spill files together have as much as they may")
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, self.size)
                self.size += written
                self._spills.grew(written)
                view = view[written:]
        except OSError as error:
            raise BodyLost(error.strerror or str(error)) from error

    def read(self, offset: int) -> bytes:
        """The piece that begins there.

        Raises:
            BodyLost: It cannot be read.
        """
        try:
            data = os.pread(self._descriptor, PIECE_BYTES, offset)
        except OSError as error:
            raise BodyLost(error.strerror or str(error)) from error
        if not data and offset < self.size:
            raise BodyLost("the file is shorter than it was")
        return data

    def close(self) -> None:
        """It is wanted no more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._spills.shrank(self.size)


class StreamedBody:
    """A body on its way through: what has come waits until it is wanted, and its client with it.

    Args:
        bytes_max: More ends it: `too_large` is set.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._pieces: deque[bytes] = deque()
        self._wanted = 0
        self._ended = False
        self._take: Take | None = None
        self._room = trio.Event()
        self.size = 0
        #: More has come than is allowed.
        self.too_large = trio.Event()

    def append(self, data: bytes | bytearray) -> None:
        """The next bytes have come."""
        self.size += len(data)
        if self.size > self._bytes_max:
            self.too_large.set()
            if self._take is not None:
                self._take(None, True)
            self.drop()
            return
        self._pieces.extend(
            bytes(data[start : start + PIECE_BYTES]) for start in range(0, len(data), PIECE_BYTES)
        )
        self._give()

    def end(self) -> None:
        """All has come."""
        self._ended = True
        self._give()

    def want(self, pieces: int, take: Take) -> None:
        """So many pieces more may go to `take`, now or when they come."""
        self._wanted += pieces
        self._take = take
        self._give()

    def _give(self) -> None:
        take = self._take
        if take is None or self.too_large.is_set():
            return
        while self._wanted and self._pieces:
            self._wanted -= 1
            piece = self._pieces.popleft()
            last = self._ended and not self._pieces
            take(piece, last)
            if last:
                self._take = None
                return
        if self._ended and not self._pieces and self._wanted:
            take(b"", True)
            self._take = None
        if not self._pieces:
            self._room.set()

    def drop(self) -> None:
        """Nobody wants any more of it."""
        self._pieces.clear()
        self._take = None
        self._room.set()

    async def has_room(self) -> None:
        """Wait until what has come has been taken."""
        self._room = trio.Event()
        if self._pieces:
            await self._room.wait()
