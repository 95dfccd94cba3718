"""Bodies of requests that come in pieces, on the room's side (S26).

Owns the pieces that have come and are not read, and what is wanted of the gateway: no piece comes unasked.
Peers: `hibernation.exchanges`, which brings the pieces, and `hibernation.requests`, whose `Request` reads
them; `broker.gateway.bodies` at the other end.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

import trio

__all__ = ["WINDOW_PIECES", "Feed"]

#: Pieces that may be on their way to one request, or wait there; the gateway makes them 64 KiB large.
WINDOW_PIECES: Final = 4


class Feed:
    """One body, read once.

    Args:
        want: Called with a number of pieces that may come.
        reading: Tells the pieces of this reading from those of an earlier one.
    """

    __slots__ = ("_arrived", "_ended", "_lost", "_pieces", "begun", "reading", "want")

    def __init__(self, want: Callable[[int, int], None], reading: int = 0) -> None:
        self.want = want
        self.reading = reading
        self._pieces: deque[bytes] = deque()
        self._ended = False
        self._lost = False
        self._arrived = trio.Event()
        #: Something of it has been asked for.
        self.begun = False

    def put(self, data: bytes | None, last: bool, reading: int) -> None:
        """A piece has come; None: the rest is lost."""
        if reading != self.reading:
            return
        if data is None:
            self._lost = True
        elif data:
            self._pieces.append(data)
        self._ended |= last
        self._arrived.set()

    async def receive(self) -> bytes:
        """Wait for the next piece; b"" at the end.

        Raises:
            OSError: The rest is lost: it is too large, or the disk of the gateway has failed.
        """
        if not self.begun:
            self.begun = True
            self.want(WINDOW_PIECES, self.reading)
        while not self._pieces:
            if self._lost:
                raise OSError("the rest of the body does not come: it is too large, or was lost on the way")
            if self._ended:
                return b""
            self._arrived = trio.Event()
            await self._arrived.wait()
        piece = self._pieces.popleft()
        if not self._ended:
            self.want(1, self.reading)
        return piece


class Sealed(Feed):
    """The body of a request that comes as a stream, before its room has it: nobody else may read it."""

    async def receive(self) -> bytes:
        """Raises RuntimeError, which says why."""
        raise RuntimeError(
            "the body of a request to a party with `stream_requests` is for on_request alone: look at the"
            " headers here"
        )
