"""Sending: frames go straight to the socket; what the kernel does not take waits in a bounded outbox.

Owns the outboxes and their policy (S25), and the length of each connection's outgoing stream. Frames are
immutable bytes and shared: a broadcast is one object however many outboxes it waits in. Must not decide when
a connection ends; it reports a slow consumer or a broken socket to `on_fault`.

A successor has to know of each frame whether it was sent, to the byte. What the kernel has taken it asks the
kernel; what waits is in the ledger's log before anything else happens. Of the frame in between, its effect
and its place in the stream are in the ledger's columns before it is sent. Control frames and automatic
responses belong to no effect: they are in the log first.

Invariants:
    O1  a connection without an outbox has nothing waiting: what is sent to it goes to the kernel at once
    O2  once a byte of a frame is in the kernel the rest of it is never dropped
    O3  `total_bytes` is the sum over all outboxes, each frame counted once for each outbox that it waits in
    O4  the frames of an outbox, and no others of its connection that are not wholly in the kernel, are in the
    log
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from broker.gateway.connections import Connections
from broker.gateway.frames import encode_close
from broker.gateway.ledger import (
    ANSWER_HEAD,
    ANSWERED,
    CLEARED,
    DROPPED,
    FRAME,
    KEPT,
    KEPT_HEAD,
    Record,
)
from hibernation.settings import Settings

#: Why `on_fault` is called.
SLOW: Final = "slow_consumer"
BROKEN: Final = "client_gone"
#: What a client gets that reads too slowly, behind the frame that has begun (RFC 6455, section 7.4.1).
SLOW_CLOSE: Final = encode_close(1013, "")
#: The bit of the first byte that tells control frames from messages (RFC 6455, section 5.2).
CONTROL: Final = 0x08
#: Bytes of a frame in doubt that is known to be in the outbox, or out, as a whole.
SETTLED: Final = 1 << 62


class Outbox:
    """What waits for one connection, each frame with its ordinal. `offset` bytes of the first are in the
    kernel.
    """

    __slots__ = ("bytes", "frames", "offset", "owed", "shut")

    def __init__(self) -> None:
        self.frames: deque[tuple[int, bytes]] = deque()
        self.offset = 0
        self.bytes = 0
        #: Nothing more may be added: the connection is ending, and its stream may be torn.
        self.shut = False
        #: Of the next frame, so many bytes were sent by a gateway that died; -1: nothing is in doubt.
        self.owed = -1


class Sender:
    """Sends frames to connections, by slot."""

    def __init__(
        self, connections: Connections, settings: Settings, on_fault: Callable[[int, str], None]
    ) -> None:
        self._connections = connections
        self._ledger = connections.ledger
        self._on_fault = on_fault
        #: Of the few connections that have one, by slot.
        self.outboxes: dict[int, Outbox] = {}
        self._total_bytes_max = settings.outbox_total_bytes_max
        self._ordinal = 0
        self._shared: tuple[int, bytes] = (0, b"")
        #: The effect that is being carried out, as the ledger's cursor counts them.
        self.effect = 0
        self.total_bytes = 0
        self.sent = 0
        self.dropped = 0

    def send(self, slot: int, frame: bytes) -> None:
        """Send one frame of the present effect, or keep it until the kernel has room."""
        if self.outboxes and slot in self.outboxes:
            self._keep(slot, frame)
            return
        table, ledger = self._connections, self._ledger
        ledger.before[slot] = before = table.written[slot]
        ledger.mark[slot] = self.effect
        try:
            count = table.sockets[slot].send(frame)  # type: ignore[union-attr]
        except BlockingIOError:
            count = 0
        except OSError:
            self._broken(slot)
            return
        self.sent += 1
        table.written[slot] = before + count
        if count != len(frame):
            self._left(slot, frame, count)

    def send_to_many(self, slots: list[int], frame: bytes) -> None:
        """The same frame to many connections: the loop of a broadcast."""
        table, ledger = self._connections, self._ledger
        sockets, written = table.sockets, table.written
        befores, marks, effect = ledger.before, ledger.mark, self.effect
        outboxes = self.outboxes
        size = len(frame)
        for slot in slots:
            if slot in outboxes:
                self._keep(slot, frame, shared=True)
                continue
            befores[slot] = before = written[slot]
            marks[slot] = effect
            try:
                count = sockets[slot].send(frame)  # type: ignore[union-attr]
            except BlockingIOError:
                count = 0
            except OSError:
                self._broken(slot)
                continue
            written[slot] = before + count
            if count != size:
                self._left(slot, frame, count, shared=True)
        self.sent += len(slots)

    def say(self, slot: int, frame: bytes, answered: int = 0) -> None:
        """Send a frame that belongs to no effect: it is committed to the log with what was added before.

        `answered`: it is an automatic response, to the message that ends there. The record of the frame is
        also what tells a successor that this message is done with.
        """
        table = self._connections
        before = table.written[slot]
        outbox = self.outboxes.get(slot)
        if outbox is not None:
            if outbox.shut:
                self._ledger.commit()
                self.dropped += 1
                return
            self._add(slot, outbox, frame, answered=answered)
            self._bound(slot)
            self._ledger.commit()
            return
        self._ordinal += 1
        self._log(slot, before, self._ordinal, 0, frame, answered=answered)
        self._ledger.commit()
        try:
            count = table.sockets[slot].send(frame)  # type: ignore[union-attr]
        except BlockingIOError:
            count = 0
        except OSError:
            self._broken(slot)
            return
        self.sent += 1
        table.written[slot] = before + count
        if count != len(frame):
            outbox = self.outboxes[slot] = Outbox()
            outbox.frames.append((self._ordinal, frame))
            outbox.offset = count
            self._count(outbox, len(frame) - count)

    def writable(self, slot: int) -> bool:
        """The kernel has room again: write on. True when nothing waits any more."""
        outbox = self.outboxes.get(slot)
        if outbox is None:
            return True
        shut = outbox.shut
        table = self._connections
        sock = table.sockets[slot]
        frames = outbox.frames
        while frames:
            _, first = frames[0]
            try:
                count = sock.send(memoryview(first)[outbox.offset :])  # type: ignore[union-attr]
            except BlockingIOError:
                return False
            except OSError:
                self._broken(slot)
                return False
            table.written[slot] += count
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
        self._silence(slot, last)
        self._ledger.commit()

    def _silence(self, slot: int, last: bytes) -> None:
        outbox = self.outboxes.get(slot)
        if outbox is None:
            outbox = self.outboxes[slot] = Outbox()
        begun = outbox.frames.popleft() if last and outbox.offset else None
        self.dropped += len(outbox.frames)
        outbox.frames.clear()
        self._ledger.add(CLEARED, slot, self._connections.number[slot], 1)
        self._count(outbox, -outbox.bytes)
        offset, outbox.offset = outbox.offset, 0
        if begun is not None:
            ordinal, frame = begun
            outbox.frames.append(begun)
            outbox.offset = offset
            self._log(slot, self._connections.written[slot] - offset, ordinal, 0, frame)
            self._count(outbox, len(frame) - offset)
        if last:
            self._add(slot, outbox, last)
        outbox.shut = True

    def drop(self, slot: int) -> None:
        """Forget what waits: the connection has ended."""
        outbox = self.outboxes.pop(slot, None)
        if outbox is not None:
            self.dropped += len(outbox.frames)
            self.total_bytes -= outbox.bytes

    # --- A former gateway's -----------------------------------------------------------------------

    def restore(self, slot: int, frames: list[tuple[int, bytes]], offset: int, *, shut: bool) -> None:
        """Wait again for what a former gateway left; `offset` bytes of the first frame are in the kernel."""
        outbox = self.outboxes[slot] = Outbox()
        outbox.frames.extend(frames)
        outbox.offset = offset
        outbox.shut = shut
        self._count(outbox, sum([len(frame) for _, frame in frames]) - offset)
        self._ordinal = max([self._ordinal, *(ordinal for ordinal, _ in frames)])

    def doubt(self, slot: int, sent_bytes: int) -> None:
        """The next frame to this connection has gone out already, so far."""
        outbox = self.outboxes.get(slot)
        if outbox is None:
            outbox = self.outboxes[slot] = Outbox()
        outbox.owed = sent_bytes

    def settle(self) -> list[int]:
        """The effect in doubt has been carried out: gives the slots whose torn frame nobody could finish."""
        torn = []
        for slot, outbox in list(self.outboxes.items()):
            if 0 < outbox.owed < SETTLED:
                torn.append(slot)
            outbox.owed = -1
            if not outbox.frames and not outbox.shut:
                del self.outboxes[slot]
        return torn

    def records(self) -> Iterator[Record]:
        """What a successor has to know of the outboxes. Between two effects only: these frames are of
        none.
        """
        shared: dict[int, int] = {}
        table = self._connections
        for slot, outbox in self.outboxes.items():
            number = table.number[slot]
            if outbox.shut:
                yield Record(CLEARED, slot, number, 1, b"")
            position = table.written[slot] - outbox.offset
            for ordinal, frame in outbox.frames:
                if id(frame) not in shared:
                    shared[id(frame)] = ordinal
                    yield Record(FRAME, 0, 0, ordinal, frame)
                yield Record(KEPT, slot, number, position, KEPT_HEAD.pack(ordinal, 0, shared[id(frame)]))
                position += len(frame)
        self._shared = (0, b"")

    # --- Parts ------------------------------------------------------------------------------------

    def _broken(self, slot: int) -> None:
        self.silence(slot)
        self._on_fault(slot, BROKEN)

    def _left(self, slot: int, frame: bytes, count: int, *, shared: bool = False) -> None:
        """The kernel took only `count` bytes of the present effect's frame: keep the rest."""
        outbox = self.outboxes[slot] = Outbox()
        self._add(slot, outbox, frame, self.effect, count, shared=shared)
        self._bound(slot)
        self._ledger.commit()

    def _keep(self, slot: int, frame: bytes, *, shared: bool = False) -> None:
        outbox = self.outboxes[slot]
        if outbox.owed >= 0:
            self._go_on(slot, outbox, frame)
            return
        if outbox.shut:
            self.dropped += 1
            return
        self._add(slot, outbox, frame, self.effect, shared=shared)
        self._bound(slot)
        self._ledger.commit()

    def _go_on(self, slot: int, outbox: Outbox, frame: bytes) -> None:
        """A former gateway has sent a part of this frame, or all of it: send the rest."""
        sent, outbox.owed = outbox.owed, -1
        if sent < len(frame) and not outbox.shut:
            # Nothing else waits: the frame that was being sent was the last one.
            self._add(slot, outbox, frame, self.effect, sent)
            self._ledger.commit()
        if not outbox.frames and not outbox.shut:
            del self.outboxes[slot]

    def _add(
        self,
        slot: int,
        outbox: Outbox,
        frame: bytes,
        effect: int = 0,
        sent: int = 0,
        *,
        shared: bool = False,
        answered: int = 0,
    ) -> None:
        """Put a frame into the outbox and the log; of the first one `sent` bytes are in the kernel."""
        self._ordinal = ordinal = self._ordinal + 1
        position = self._connections.written[slot] + outbox.bytes - sent
        self._log(slot, position, ordinal, effect, frame, shared=shared, answered=answered)
        outbox.frames.append((ordinal, frame))
        if sent:
            outbox.offset = sent
        self._count(outbox, len(frame) - sent)

    def _log(
        self,
        slot: int,
        position: int,
        ordinal: int,
        effect: int,
        frame: bytes,
        *,
        shared: bool = False,
        answered: int = 0,
    ) -> None:
        ledger = self._ledger
        number = self._connections.number[slot]
        if answered:
            ledger.add(ANSWERED, slot, number, position, ANSWER_HEAD.pack(ordinal, answered) + frame)
            return
        if not shared:
            ledger.add(KEPT, slot, number, position, KEPT_HEAD.pack(ordinal, effect, 0) + frame)
            return
        if self._shared[1] is not frame:
            self._shared = (ordinal, frame)
            ledger.add(FRAME, 0, 0, ordinal, frame)
        ledger.add(KEPT, slot, number, position, KEPT_HEAD.pack(ordinal, effect, self._shared[0]))

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
                self._silence(slot, SLOW_CLOSE)
                self._on_fault(slot, SLOW)
                return
            self._drop_some(
                slot, outbox, settings.outbox_bytes_max, newest=settings.slow_consumer == "drop_newest"
            )
        while self.total_bytes > self._total_bytes_max:
            fullest = max(self.outboxes, key=lambda each: self.outboxes[each].bytes)
            self._silence(fullest, b"")
            self._on_fault(fullest, SLOW)

    def _drop_some(self, slot: int, outbox: Outbox, bytes_max: int, *, newest: bool) -> None:
        """Drop whole messages until the rest is within the bound; never a frame that has begun (O2), nor a
        control frame, which are few and small.
        """
        number = self._connections.number[slot]
        frames = outbox.frames
        kept: list[tuple[int, bytes]] = []
        first = frames.popleft() if outbox.offset else None
        while outbox.bytes > bytes_max and frames:
            ordinal, frame = frames.pop() if newest else frames.popleft()
            if frame[0] & CONTROL:
                kept.append((ordinal, frame))
                continue
            self.dropped += 1
            self._ledger.add(DROPPED, slot, number, ordinal)
            self._count(outbox, -len(frame))
        if newest:
            frames.extend(reversed(kept))
        else:
            frames.extendleft(reversed(kept))
        if first is not None:
            frames.appendleft(first)
