"""Sending: frames go straight to the socket; what the kernel does not take waits in a bounded outbox.

Owns the outboxes and their policy (S25). Frames are immutable bytes and shared: a broadcast is one object
however many outboxes it waits in. Must not decide when a connection ends; it reports a slow consumer or a
broken socket to `on_fault`.

Invariants:
    O1  a connection without an outbox has nothing waiting: what is sent to it goes to the kernel at once
    O2  once a byte of a frame is in the kernel the rest of it is never dropped
    O3  `total_bytes` is the sum over all outboxes, each frame counted once for each outbox that it waits in
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from broker.gateway.connections import Connections
from broker.gateway.frames import encode_close
from hibernation.settings import Settings

#: Why `on_fault` is called.
SLOW: Final = "slow_consumer"
BROKEN: Final = "client_gone"
#: What a client gets that reads too slowly, behind the frame that has begun (RFC 6455, section 7.4.1).
SLOW_CLOSE: Final = encode_close(1013, "")
#: The bit of the first byte that tells control frames from messages (RFC 6455, section 5.2).
CONTROL: Final = 0x08


class Outbox:
    """What waits for one connection. `offset` bytes of the first frame are in the kernel already."""

    __slots__ = ("bytes", "frames", "offset", "shut")

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.offset = 0
        self.bytes = 0
        #: Nothing more may be added: the connection is ending, and its stream may be torn.
        self.shut = False


class Sender:
    """Sends frames to connections, by slot."""

    def __init__(
        self, connections: Connections, settings: Settings, on_fault: Callable[[int, str], None]
    ) -> None:
        self._connections = connections
        self._on_fault = on_fault
        #: Of the few connections that have one, by slot.
        self.outboxes: dict[int, Outbox] = {}
        self._total_bytes_max = settings.outbox_total_bytes_max
        self.total_bytes = 0
        self.sent = 0
        self.dropped = 0

    def send(self, slot: int, frame: bytes) -> None:
        """Send one frame, or keep it until the kernel has room."""
        if self.outboxes and slot in self.outboxes:
            self._keep(slot, frame)
            return
        sock = self._connections.sockets[slot]
        try:
            count = sock.send(frame)  # type: ignore[union-attr]
        except BlockingIOError:
            count = 0
        except OSError:
            self._broken(slot)
            return
        self.sent += 1
        if count != len(frame):
            outbox = self.outboxes[slot] = Outbox()
            outbox.frames.append(frame)
            outbox.offset = count
            self._count(outbox, len(frame) - count)
            self._bound(slot)

    def send_to_many(self, slots: list[int], frame: bytes) -> None:
        """The same frame to many connections: the loop of a broadcast."""
        sockets = self._connections.sockets
        outboxes = self.outboxes
        size = len(frame)
        for slot in slots:
            if slot in outboxes:
                self._keep(slot, frame)
                continue
            try:
                count = sockets[slot].send(frame)  # type: ignore[union-attr]
            except BlockingIOError:
                count = 0
            except OSError:
                self._broken(slot)
                continue
            if count != size:
                outbox = outboxes[slot] = Outbox()
                outbox.frames.append(frame)
                outbox.offset = count
                self._count(outbox, size - count)
                self._bound(slot)
        self.sent += len(slots)

    def writable(self, slot: int) -> bool:
        """The kernel has room again: write on. True when nothing waits any more."""
        outbox = self.outboxes.get(slot)
        if outbox is None:
            return True
        shut = outbox.shut
        sock = self._connections.sockets[slot]
        frames = outbox.frames
        while frames:
            first = frames[0]
            try:
                count = sock.send(memoryview(first)[outbox.offset :])  # type: ignore[union-attr]
            except BlockingIOError:
                return False
            except OSError:
                self._broken(slot)
                return False
            self._count(outbox, -count)
            if outbox.offset + count < len(first):
                outbox.offset += count
                return False
            frames.popleft()
            outbox.offset = 0
        if not shut:
            del self.outboxes[slot]
        return True

    def waiting_bytes(self, slot: int) -> int:
        """How much waits for this connection."""
        outbox = self.outboxes.get(slot)
        return 0 if outbox is None else outbox.bytes

    def silence(self, slot: int, last: bytes = b"") -> None:
        """Send nothing more to this connection but `last`, behind the frame that has begun; without `last`
        not even the rest of that.
        """
        outbox = self.outboxes.get(slot)
        if outbox is None:
            outbox = self.outboxes[slot] = Outbox()
        begun = outbox.frames.popleft() if last and outbox.offset else b""
        self.dropped += len(outbox.frames)
        outbox.frames.clear()
        outbox.frames.extend([frame for frame in (begun, last) if frame])
        if not begun:
            outbox.offset = 0
        self._count(outbox, len(begun) - outbox.offset + len(last) - outbox.bytes)
        outbox.shut = True

    def drop(self, slot: int) -> None:
        """Forget what waits: the connection has ended."""
        outbox = self.outboxes.pop(slot, None)
        if outbox is not None:
            self.dropped += len(outbox.frames)
            self.total_bytes -= outbox.bytes

    def _broken(self, slot: int) -> None:
        self.silence(slot)
        self._on_fault(slot, BROKEN)

    def _keep(self, slot: int, frame: bytes) -> None:
        outbox = self.outboxes[slot]
        if outbox.shut:
            self.dropped += 1
            return
        outbox.frames.append(frame)
        self._count(outbox, len(frame))
        self._bound(slot)

    def _count(self, outbox: Outbox, size: int) -> None:
        outbox.bytes += size
        self.total_bytes += size

    def _bound(self, slot: int) -> None:
        """Apply the policy to an outbox that has grown (S25)."""
        outbox = self.outboxes[slot]
        room = self._connections.room[slot]
        assert room is not None
        settings = room.party.settings
        if outbox.bytes > settings.outbox_bytes_max:
            if settings.slow_consumer == "close":
                self.silence(slot, SLOW_CLOSE)
                self._on_fault(slot, SLOW)
                return
            self._drop_some(outbox, settings.outbox_bytes_max, newest=settings.slow_consumer == "drop_newest")
        while self.total_bytes > self._total_bytes_max:
            fullest = max(self.outboxes, key=lambda each: self.outboxes[each].bytes)
            self.silence(fullest)
            self._on_fault(fullest, SLOW)

    def _drop_some(self, outbox: Outbox, bytes_max: int, *, newest: bool) -> None:
        """Drop whole messages until the rest is within the bound; never a frame that has begun (O2), nor a
        control frame, which are few and small.
        """
        frames = outbox.frames
        kept: list[bytes] = []
        begun = 1 if outbox.offset else 0
        first = frames.popleft() if begun else None
        while outbox.bytes > bytes_max and frames:
            frame = frames.pop() if newest else frames.popleft()
            if frame[0] & CONTROL:
                kept.append(frame)
                continue
            self.dropped += 1
            self._count(outbox, -len(frame))
        if newest:
            frames.extend(reversed(kept))
        else:
            frames.extendleft(reversed(kept))
        if first is not None:
            frames.appendleft(first)
