"""Receiving: the kernel's receive buffer is the inbox. Frames are peeked, dispatched, and consumed when
acknowledged.

Owns the offsets of every connection (`parsed`, `consumed`, `last_end`), the readers of fragmented messages,
and the spill files of messages too large to stay in the kernel. Must not end connections or know rooms' code;
it reports to `Lifecycle`. Peers: `frames` (pure), `links` (where messages go), `spill`.

A pass over one connection (`pump`): peek everything that is there; skip what is parsed already; give each
whole message to the room's host; note how far it got. Nothing is consumed by that. An acknowledgement
(`acknowledge`) consumes up to the end of its message, and looks again only if the last pass had to leave
something (the flag DEFERRED): with edge-triggered epoll everything that came since the last peek has caused
an event of its own.

A message that would not fit into the kernel's buffer [inbox_bytes_max] is moved, as it comes and as it came,
into a spill file; what is in the file counts as consumed. That begins only when every earlier message is
acknowledged, and never takes a byte beyond the end of the frame at hand, so file and kernel together are
always one unbroken stream.

How much the kernel's buffer holds depends on how the bytes were cut into segments, and may be less than that
limit by far: then the peer's window is closed and no event will ever come. So a message that stays unfinished
for STALL_SECONDS without growing is spilled, whatever its size.
"""

import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker.gateway.answers import Answers
from broker.gateway.connections import (
    CLOSED,
    CLOSING,
    DEFERRED,
    ENDING,
    GONE,
    OPEN,
    PARTIAL,
    READER,
    WINDOW,
    Connections,
)
from broker.gateway.deflate import wire_bytes_max
from broker.gateway.frames import CLOSE as CLOSE_FRAME
from broker.gateway.frames import (
    FRAGMENT_MAX,
    Close,
    Header,
    Message,
    MessageReader,
    Ping,
    Violation,
    frame_header,
    take_message,
)
from broker.gateway.links import HostLink, Links
from broker.gateway.rooms import RoomRecord
from broker.gateway.spill import SpillFile, Spills
from hibernation import wire
from hibernation.logs import get_logger
from hibernation.settings import Settings

#: Where turns of a room overlap a connection may have this part of the room's events in flight.
SHARE: Final = 8
#: Peeked at once: more than the kernel keeps with SO_RCVBUF at its default setting.
PEEK_BYTES: Final = 512 * 1024
#: Unfinished messages of so many bytes in the kernel are looked at again after so long.
STALL_BYTES: Final = 4096
#: Most that a client's frame has in front of its payload (RFC 6455, section 5.2).
HEADER_BYTES_MAX: Final = 14
#: sock_diag(7): the memory that a socket's queue occupies, and its bound, are the first two numbers. The
#: kernel frees whole pieces of its queue only: a few bytes may keep one of 200 KiB, which shuts the window.
SO_MEMINFO: Final = 55
STALL_SECONDS: Final = 0.1
#: In a spill file beside the message: the headers of its fragments, and control frames between them.
SPILL_EXTRA_BYTES_MAX: Final = 14 * FRAGMENT_MAX + 64 * 1024
#: What the disk has refused is tried again after so long.
SPILL_AGAIN_SECONDS: Final = 1.0
#: Automatic responses in one pass, so that a client that asks for many holds up no others.
ANSWERS_PER_PASS: Final = 64
#: What `_answer` says: the message is the room's; it has its answer; it has to wait.
#: So much of compressed messages costs as much time as an automatic response, or more.
INFLATED_PER_ANSWER: Final = 16 * 1024
NO_ANSWER: Final = 0
ANSWERED: Final = 1
WAITS: Final = 2
MSG_PEEK: Final = socket.MSG_PEEK
MSG_TRUNC: Final = socket.MSG_TRUNC
MESSAGE: Final = wire.MESSAGE

log = get_logger("inbox")


class Reading:
    """A message in the making that is more than one whole frame in the kernel."""

    __slots__ = (
        "complete",
        "dispatched_bytes",
        "file",
        "frame_end",
        "frame_start",
        "frames",
        "reader",
        "start",
    )

    def __init__(self, start: int, limit_bytes: int, *, compressed: bool) -> None:
        self.reader = MessageReader(limit_bytes, compressed=compressed)
        #: Where its first frame begins.
        self.start = start
        self.file: SpillFile | None = None
        #: While spilling: the frame that is being moved; its end is 0 until its header has come.
        self.frame_start = start
        self.frame_end = 0
        #: The frames that the reader has been fed. Once there is a file they are in it.
        self.frames: list[tuple[int, int]] = []
        #: The whole message is in the file.
        self.complete = False
        #: Its size while it is with the host; 0 before.
        self.dispatched_bytes = 0


class Inbox:
    """See the module."""

    def __init__(
        self, connections: Connections, links: Links, settings: Settings, spill_directory: Path
    ) -> None:
        self._connections = connections
        self._links = links
        self._inflight_bytes_max = settings.connection_inflight_bytes_max
        self._inbox_bytes_max = settings.inbox_bytes_max
        self._buffer = bytearray(PEEK_BYTES)
        self._readings: dict[int, Reading] = {}
        self._spills = Spills(spill_directory, settings.spill_bytes_max)
        self._spill_waiting: list[int] = []
        #: Slots of messages that the disk did not take.
        self._refused: set[int] = set()
        self._unfinished: set[int] = set()
        #: By slot: where compressed messages end that are in flight, and how large they are for the host.
        self._inflated: dict[int, deque[tuple[int, int]]] = {}
        #: State of the few connections that have one.
        self.states: dict[int, bytes] = {}
        self.messages = 0
        # What happens beside messages; set by the lifecycle, which is made after the inbox.
        self.on_answer: Callable[[int, bytes, int], None]
        self.on_ping: Callable[[int, bytes], None]
        self.on_close_frame: Callable[[int, int, str], None]
        self.on_violation: Callable[[int, int, str], None]
        self.on_gone: Callable[[int], None]
        #: Calls a function after some seconds; the hub's, set by the core.
        self.later: Callable[..., None] = lambda *_: None

    # --- Reading ----------------------------------------------------------------------------------

    def pump(self, slot: int, spill_over_bytes: int | None = None) -> None:
        """Look at what the kernel holds for a connection and dispatch what is whole, within the bounds of
        S24; spill a message that is not whole and larger than `spill_over_bytes` [inbox_bytes_max].
        """
        table = self._connections
        flags = table.flags
        if table.phase[slot] != OPEN:
            flags[slot] |= DEFERRED
            return
        room = table.room[slot]
        assert room is not None
        party = room.party
        link = self._links.by_shard[room.shard]
        consumed = table.consumed[slot]
        position = table.parsed[slot] - consumed
        last_end = table.last_end[slot]
        inflight = last_end - consumed if last_end > consumed else 0
        events_max = party.inflight_events_max
        if party.overlaps:
            events_max = self._share(slot, room)
        if (
            link is None
            or inflight >= self._inflight_bytes_max
            or room.inflight_events >= events_max
            or room.inflight_bytes >= party.inflight_bytes_max
            or link.inflight_bytes >= link.bytes_max
        ):
            self._defer(slot, room, link)
            return
        reading = self._readings.get(slot) if flags[slot] & READER else None
        if reading is not None and reading.file is not None:
            self._spill(slot, reading, room, link)
            return
        buffer = self._buffer
        try:
            end = table.sockets[slot].recv_into(buffer, PEEK_BYTES, MSG_PEEK)  # type: ignore[union-attr]
        except BlockingIOError:
            return
        except OSError:
            self.on_gone(slot)
            return
        limit = party.message_bytes_max
        wants = party.wants_message
        answers = room.answers
        answered = 0
        most = self._inbox_bytes_max if spill_over_bytes is None else spill_over_bytes
        spill: Reading | None = None
        deferred = False
        while position < end:
            taken = take_message(buffer, position, end, limit) if reading is None else None
            if taken is not None:
                data, after = taken
                if answers is not None:
                    verdict = self._answer(slot, room, link, answers, data, consumed + after)
                    if verdict == WAITS:
                        deferred = True
                        break
                    if verdict == ANSWERED:
                        position = after
                        answered += 1
                        if table.phase[slot] != OPEN or answered >= ANSWERS_PER_PASS:
                            break
                        continue
                position = after
                if wants:
                    self._dispatch(slot, room, link, consumed + position, data)
                    if position >= self._inflight_bytes_max or room.inflight_events >= events_max:
                        deferred = position < end
                        break
                continue
            try:
                compressed = table.ledger.phase[slot] & WINDOW != 0
                header = frame_header(buffer, position, end, compressed=compressed)
                if header is None:
                    break
                if reading is None:
                    reading = Reading(consumed + position, limit, compressed=compressed)
                reading.reader.check_header(header)
                size = header.header_bytes + header.length
                if position + size > end:
                    if consumed + position + size - reading.start > most:
                        reading.frame_start = consumed + position
                        reading.frame_end = reading.frame_start + size
                        spill = reading
                    elif reading.reader.idle:
                        reading = None
                    break
                if header.rsv and slot in self._inflated and self._is_inflated_full(slot):
                    deferred = True
                    if reading.reader.idle:
                        reading = None
                    break
                events = reading.reader.feed(bytes(buffer[position : position + size]))
            except Violation as violation:
                self._note(slot, table, room, link, inflight, consumed + position, reading)
                self.on_violation(slot, violation.code, violation.reason)
                return
            reading.frames.append((consumed + position, consumed + position + size))
            position += size
            closed = waits = False
            for event in events:
                if type(event) is Message:
                    verdict = NO_ANSWER
                    if answers is not None:
                        verdict = self._answer(slot, room, link, answers, event.data, consumed + position)
                    if verdict == ANSWERED:
                        answered += 1
                    elif verdict == WAITS:
                        waits = True
                    elif wants:
                        self._dispatch(slot, room, link, consumed + position, event.data)
                        if event.inflated_bytes:
                            self._note_inflated(slot, room, link, consumed + position, event.inflated_bytes)
                    answered += event.inflated_bytes // INFLATED_PER_ANSWER
                elif type(event) is Ping:
                    self.on_ping(slot, event.payload)
                elif type(event) is Close:
                    closed = True
                    self._note(slot, table, room, link, inflight, consumed + position, reading)
                    self.on_close_frame(slot, event.code, event.reason)
            if closed:
                return
            if waits:
                # All of the message is read again then, and pings between its fragments are answered again.
                position, reading, deferred = reading.start - consumed, None, True
                break
            if answered and (table.phase[slot] != OPEN or answered >= ANSWERS_PER_PASS):
                if reading.reader.idle:
                    reading = None
                break
            if reading.reader.idle:
                reading = None
                if table.last_end[slot] == consumed + position and (
                    position >= self._inflight_bytes_max or room.inflight_events >= events_max
                ):
                    deferred = position < end
                    break
            elif consumed + position - reading.start > most:
                reading.frame_start, reading.frame_end = consumed + position, 0
                spill = reading
                break
        if reading is not None and spill is None and consumed + position - reading.start > most:
            reading.frame_start, reading.frame_end = consumed + position, 0
            spill = reading
        self._note(slot, table, room, link, inflight, consumed + position, reading)
        if answered and (table.phase[slot] != OPEN or answered >= ANSWERS_PER_PASS):
            flags[slot] |= DEFERRED
            self.later(0.0, self._resume_numbered, slot, table.number[slot])
        elif spill is not None:
            self._begin_spill(slot, spill, room, link)
        elif deferred or end == PEEK_BYTES:
            flags[slot] |= DEFERRED
        elif flags[slot] & GONE:
            self.on_gone(slot)
        elif position < end or reading is not None:
            self._leave(slot, reading, room, link, consumed + end)

    def _answer(
        self, slot: int, room: RoomRecord, link: HostLink, answers: Answers, data: str | bytes, end: int
    ) -> int:
        """Answer a message that ends at `end`, if there is a rule for it, and take it out of the kernel; but
        not before everything in front of it is acknowledged (S16). What comes behind it waits, too.
        """
        frame = answers.match(data)
        if frame is None:
            return NO_ANSWER
        table = self._connections
        if table.last_end[slot] > table.consumed[slot]:
            return WAITS
        self.on_answer(slot, frame, end)
        if end > table.consumed[slot]:
            table.parsed[slot] = end
            self._consume(slot, end, room, link)
        return ANSWERED

    # Compressed messages are counted as what they are in the kernel, like all others, and also as what they
    # are for the host, which may be a thousand times as much (S24).

    def _note_inflated(self, slot: int, room: RoomRecord, link: HostLink, end: int, size: int) -> None:
        room.inflight_bytes += size
        link.inflight_bytes += size
        self._inflated.setdefault(slot, deque()).append((end, size))

    def _is_inflated_full(self, slot: int) -> bool:
        size: int = sum([each for _, each in self._inflated[slot]])
        return size >= self._inflight_bytes_max

    def _forget_inflated(self, slot: int, end: int, room: RoomRecord, link: HostLink | None) -> None:
        """The turns of messages that end up to there are over."""
        messages = self._inflated.get(slot)
        if messages is None:
            return
        while messages and messages[0][0] <= end:
            _, size = messages.popleft()
            room.inflight_bytes -= size
            if link is not None:
                link.inflight_bytes -= size
        if not messages:
            del self._inflated[slot]

    def _leave(
        self, slot: int, reading: Reading | None, room: RoomRecord, link: HostLink, received: int
    ) -> None:
        """The stream ends, for now, at offset `received` in the middle of a frame or message. See to it that
        the rest can come.
        """
        table = self._connections
        parsed = table.parsed[slot]
        if table.last_end[slot] > table.consumed[slot]:
            table.flags[slot] |= PARTIAL  # when that is acknowledged
            return
        if self._is_clogged(slot):
            if reading is None:
                reading = self._readings[slot] = self._new_reading(slot, parsed, room)
                table.flags[slot] |= READER
            reading.frame_start, reading.frame_end = parsed, 0
            self._begin_spill(slot, reading, room, link)
            return
        begun = parsed if reading is None else reading.start
        if received - begun >= STALL_BYTES and slot not in self._unfinished:
            self._unfinished.add(slot)
            self.later(STALL_SECONDS, self._look_at_unfinished, slot, table.number[slot], received)

    def _is_clogged(self, slot: int) -> bool:
        """Whether what is in the kernel takes so much memory that little or nothing may follow it."""
        sock = self._connections.sockets[slot]
        assert sock is not None
        held, most = struct.unpack("2I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 8))
        return bool(2 * held > most)

    def _look_at_unfinished(self, slot: int, number: int, received: int) -> None:
        """A message was unfinished a while ago, when the kernel had `received` the stream up to there."""
        self._unfinished.discard(slot)
        table = self._connections
        if not table.holds(slot, number) or table.phase[slot] != OPEN:
            return
        sock = table.sockets[slot]
        assert sock is not None
        (unread,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))
        stalled = table.consumed[slot] + unread == received
        self.pump(slot, 0 if stalled else None)

    def _note(
        self,
        slot: int,
        table: Connections,
        room: RoomRecord,
        link: HostLink,
        inflight: int,
        parsed: int,
        reading: Reading | None,
    ) -> None:
        """End of a pass: remember how far it got, count what it dispatched beyond `inflight`, and consume
        what waits for nobody.
        """
        base = table.consumed[slot]
        table.parsed[slot] = parsed
        if reading is None:
            if table.flags[slot] & READER:
                table.flags[slot] &= ~READER
                del self._readings[slot]
        else:
            table.flags[slot] |= READER
            self._readings[slot] = reading
        dispatched = table.last_end[slot] - base
        if dispatched > 0:
            room.inflight_bytes += dispatched - inflight
            link.inflight_bytes += dispatched - inflight
        elif parsed > base:
            # Nothing is in flight: control frames, and messages that no hook wants, go at once.
            self._consume(slot, parsed if reading is None else reading.start, room, link)

    def _dispatch(self, slot: int, room: RoomRecord, link: HostLink, end: int, data: str | bytes) -> None:
        table = self._connections
        room.inflight_events += 1
        if room.shares is not None:
            room.shares[slot] = room.shares.get(slot, 0) + 1
        self.messages += 1
        table.last_end[slot] = end
        states = self.states
        link.put(
            [
                MESSAGE,
                room.key,
                slot,
                table.number[slot],
                table.card[slot],
                states.get(slot) if states else None,
                end,
                data,
            ]
        )

    def _share(self, slot: int, room: RoomRecord) -> int:
        """Events of the room in flight up to which this connection may add to them."""
        shares = room.shares
        if shares is None:
            shares = room.shares = {}
        most = room.party.inflight_events_max
        left = max(most // SHARE, 1) - shares.get(slot, 0)
        return min(most, room.inflight_events + left)

    def _defer(self, slot: int, room: RoomRecord, link: HostLink | None) -> None:
        """Leave a connection's data for later: until its own, its room's or its link's next
        acknowledgement.
        """
        flags = self._connections.flags
        if flags[slot] & DEFERRED:
            return
        flags[slot] |= DEFERRED
        if link is None:
            return  # when the host is back every connection of its shards is looked at
        if room.is_full:
            room.wait(slot)
        elif link.is_full:
            link.waiting.append(slot)

    # --- Acknowledgements -------------------------------------------------------------------------

    def acknowledge(self, slot: int, end: int) -> None:
        """The turn of the message that ends at `end` is over: consume it, and go on with what was left."""
        table = self._connections
        room = table.room[slot]
        assert room is not None
        link = self._links.by_shard[room.shard]
        room.inflight_events -= 1
        if self._inflated:
            self._forget_inflated(slot, end, room, link)
        flags = table.flags
        if room.shares is not None:
            left = room.shares.pop(slot, 1) - 1
            if left > 0:
                room.shares[slot] = left
        if end >= table.last_end[slot]:
            target = table.parsed[slot]
            if flags[slot] & PARTIAL:
                flags[slot] = flags[slot] & ~PARTIAL | DEFERRED
            if flags[slot] & READER:
                reading = self._readings[slot]
                if reading.complete:
                    self._drop_reading(slot)
                elif reading.file is None:
                    target = reading.start
        else:
            target = end
        if target > table.consumed[slot]:
            self._consume(slot, target, room, link)
        if flags[slot] & DEFERRED:
            if room.waiting and room.shares is not None:
                room.wait(slot)  # behind those that wait already
            else:
                flags[slot] &= ~DEFERRED
                self.pump(slot)
        if room.waiting:
            self.resume_waiting(room)
        if link is not None and link.waiting:
            while link.waiting and not link.is_full:
                self._resume(link.waiting.popleft())

    def resume_waiting(self, room: RoomRecord) -> None:
        """An event of the room is acknowledged: go on with what had to wait for that."""
        waiting = room.waiting
        while waiting and not room.is_full:
            self._resume(waiting.popleft())

    def _resume(self, slot: int) -> None:
        flags = self._connections.flags
        if flags[slot] & DEFERRED:
            flags[slot] &= ~DEFERRED
            self.pump(slot)

    def in_flight(self, slot: int) -> bool:
        """Whether a message of this connection is with its host."""
        table = self._connections
        if table.last_end[slot] > table.consumed[slot]:
            return True
        reading = self._readings.get(slot) if table.flags[slot] & READER else None
        return reading is not None and reading.dispatched_bytes > 0

    def _consume(self, slot: int, target: int, room: RoomRecord, link: HostLink | None) -> None:
        """Take everything before `target` out of the kernel."""
        table = self._connections
        consumed = table.consumed[slot]
        count = target - consumed
        if count <= 0:
            return
        acknowledged = min(target, table.last_end[slot]) - consumed
        if acknowledged > 0:
            room.inflight_bytes -= acknowledged
            if link is not None:
                link.inflight_bytes -= acknowledged
        table.consumed[slot] = target
        if table.phase[slot] == CLOSED:
            return  # the socket, and what was left in it, has gone
        sock = table.sockets[slot]
        try:
            while count:
                taken = sock.recv_into(self._buffer, min(count, PEEK_BYTES), MSG_TRUNC)  # type: ignore[union-attr]
                if not taken:
                    return
                count -= taken
        except OSError:
            return  # the end is noticed where it is looked for

    # --- A former gateway's -----------------------------------------------------------------------

    def adopt_spill(self, slot: int) -> None:
        """Go on with the large message of which a former gateway has moved a part, or all, into a file."""
        if not self._spills.has_left:
            return
        table = self._connections
        room = table.room[slot]
        assert room is not None
        try:
            file = self._spills.take_left(table.number[slot])
        except OSError as error:
            log.error("a large message is lost: its spill file cannot be read", error=str(error))
            return
        if file is None:
            return
        try:
            self._read_on(slot, file, room)
        except (OSError, Violation) as error:
            log.error("a large message is lost: its spill file cannot be read", error=str(error))
            code = error.code if isinstance(error, Violation) else 1011
            self.later(0.0, self._spoilt, slot, table.number[slot], code)

    def _spoilt(self, slot: int, number: int, code: int) -> None:
        if self._connections.holds(slot, number):
            self.on_violation(slot, code, "")

    def _read_on(self, slot: int, file: SpillFile, room: RoomRecord) -> None:
        """Go on with what a spill file holds."""
        table = self._connections
        size = table.consumed[slot] - file.start
        if not 0 < size <= file.size:
            file.delete()  # nothing of it had been taken out of the kernel, or its message is acknowledged
            return
        file.cut(size)
        self._spills.grew(size)
        reading = self._readings[slot] = self._new_reading(slot, file.start, room)
        reading.file = file
        table.flags[slot] |= READER
        position, end = file.start, file.start + size
        while position < end and not reading.complete:
            head = file.read(position, min(end, position + HEADER_BYTES_MAX))
            header = self._header(slot, head)
            reading.frame_start, reading.frame_end = position, 0
            if header is None:
                return
            reading.reader.check_header(header)
            reading.frame_end = position + header.header_bytes + header.length
            if reading.frame_end > end:
                return
            events = reading.reader.feed(file.read(position, reading.frame_end))
            reading.frames.append((position, reading.frame_end))
            position = reading.frame_end
            reading.frame_start, reading.frame_end = position, 0
            for event in events:
                if type(event) is Close:
                    self.later(0.0, self._close_found, slot, table.number[slot], event)
            reading.complete = any(type(event) is Message for event in events)

    def _new_reading(self, slot: int, start: int, room: RoomRecord) -> Reading:
        compressed = self._connections.ledger.phase[slot] & WINDOW != 0
        return Reading(start, room.party.message_bytes_max, compressed=compressed)

    def _header(self, slot: int, head: bytes) -> Header | None:
        compressed = self._connections.ledger.phase[slot] & WINDOW != 0
        return frame_header(head, 0, len(head), compressed=compressed)

    def _close_found(self, slot: int, number: int, close: Close) -> None:
        if self._connections.holds(slot, number):
            self.on_close_frame(slot, close.code, close.reason)

    @property
    def spills(self) -> Spills:
        """All spill files of this gateway."""
        return self._spills

    def forget_spills(self) -> None:
        """Remove the spill files of connections that have gone."""
        self._spills.forget_left()

    # --- The host has died ------------------------------------------------------------------------

    def settle(self, slot: int, end: int) -> None:
        """A turn has ended that was given out in a former life, of the message that ends at `end`: take
        everything up to there out of the kernel. Nothing of it is in flight, and nothing is looked at before
        the host has said that it has named all of these.
        """
        table = self._connections
        if table.phase[slot] in (OPEN, ENDING, CLOSING):
            self.settle_answered(slot, end)

    def settle_answered(self, slot: int, end: int) -> None:
        """The same of a message that a former gateway has answered by itself."""
        table = self._connections
        room = table.room[slot]
        assert room is not None
        reading = self._readings.get(slot) if table.flags[slot] & READER else None
        if reading is not None:
            # Of a message in a file, all of it; of one that is looked at in the kernel, whatever it has read.
            whole = reading.complete and end >= reading.frames[-1][1]
            if whole or (reading.file is None and end > reading.start):
                self._drop_reading(slot)
        if end > table.consumed[slot]:
            self._consume(slot, end, room, None)
            table.parsed[slot] = max(table.parsed[slot], end)
        table.flags[slot] |= DEFERRED

    def forget_in_flight(self, slot: int) -> None:
        """Nothing that was dispatched has been acknowledged: look at it all again when the next host is
        there.
        """
        table = self._connections
        self._inflated.pop(slot, None)
        reading = self._readings.get(slot)
        if reading is not None:
            if reading.file is None:
                self._drop_reading(slot)
            else:
                reading.dispatched_bytes = 0
        table.parsed[slot] = table.last_end[slot] = table.consumed[slot]
        table.flags[slot] |= DEFERRED

    def look_again(self, slot: int) -> None:
        """A host is there (again): dispatch what waits."""
        table = self._connections
        if table.flags[slot] & DEFERRED:
            table.flags[slot] &= ~DEFERRED
            self.pump(slot)

    def drop(self, slot: int) -> None:
        """The connection has ended."""
        room = self._connections.room[slot]
        if room is not None and room.shares is not None:
            room.shares.pop(slot, None)
        self._drop_reading(slot)
        self._inflated.pop(slot, None)
        self.states.pop(slot, None)

    def discard(self, slot: int) -> tuple[bool, bool]:
        """In phase CLOSING: throw data away up to the peer's Close frame. Returns (closed, ended)."""
        table = self._connections
        buffer = self._buffer
        reading = self._readings.get(slot) if table.flags[slot] & READER else None
        if reading is not None and reading.file is not None and not reading.complete:
            # Half a message is in its file: go on behind the frame that was being moved.
            if not reading.frame_end and table.consumed[slot] > reading.frame_start:
                return False, True  # half a header is: what comes next cannot be told
            table.parsed[slot] = max(table.parsed[slot], reading.frame_end or reading.frame_start)
            self._drop_reading(slot)
        while True:
            try:
                end = table.sockets[slot].recv_into(buffer, PEEK_BYTES, MSG_PEEK)  # type: ignore[union-attr]
            except BlockingIOError:
                return False, False
            except OSError:
                return False, True
            if not end:
                return False, True
            waits = table.last_end[slot] > table.consumed[slot]
            position = table.parsed[slot] - table.consumed[slot]
            while position < end:
                try:
                    compressed = table.ledger.phase[slot] & WINDOW != 0
                    header = frame_header(buffer, position, end, compressed=compressed)
                except Violation:
                    return False, True
                if header is None:
                    break
                if header.opcode == CLOSE_FRAME:
                    return True, False
                position += header.header_bytes + header.length
            table.parsed[slot] = table.consumed[slot] + position
            if waits or position < end:
                return False, False
            # Nobody waits for any of this: take it out as it comes.
            table.consumed[slot] += table.sockets[slot].recv_into(buffer, end)  # type: ignore[union-attr]

    # --- Messages too large for the kernel's buffer -----------------------------------------------

    def _begin_spill(self, slot: int, reading: Reading, room: RoomRecord, link: HostLink) -> None:
        table = self._connections
        if table.last_end[slot] > table.consumed[slot]:
            table.flags[slot] |= DEFERRED  # earlier messages first
            return
        if not self._spills.has_room:
            self._spill_waiting.append(slot)
            table.flags[slot] |= DEFERRED
            return
        try:
            reading.file = self._spills.create(table.number[slot], reading.start)
        except OSError as error:
            self._spill_refused(slot, error)
            return
        self._spill(slot, reading, room, link)

    def _spill_refused(self, slot: int, error: OSError) -> None:
        """The disk takes nothing now: the message waits in the kernel, and is tried again (S36)."""
        table = self._connections
        table.flags[slot] |= DEFERRED
        if slot in self._refused:
            return
        if not self._refused:
            log.error("a large message cannot be spilled: it waits", error=str(error))
        self._refused.add(slot)
        self.later(SPILL_AGAIN_SECONDS, self._spill_again, slot)

    def _spill_again(self, slot: int) -> None:
        self._refused.discard(slot)
        self._resume(slot)

    def _spill(self, slot: int, reading: Reading, room: RoomRecord, link: HostLink) -> None:
        """Move what has come into the file, frame by frame, until the message is whole or there is no
        more.
        """
        table = self._connections
        file, buffer, sock = reading.file, self._buffer, table.sockets[slot]
        assert file is not None
        assert sock is not None
        if reading.complete:
            if reading.dispatched_bytes:
                table.flags[slot] |= DEFERRED  # the next message waits until this one is acknowledged
            else:
                self._deliver_spilled(slot, reading, room, link)
            return
        while True:
            try:
                count = sock.recv_into(buffer, PEEK_BYTES, MSG_PEEK)
            except BlockingIOError:
                return
            except OSError:
                count = 0
            if not count:
                self.on_gone(slot)
                return
            consumed = table.consumed[slot]
            try:
                limit = reading.frame_end or reading.frame_start
                if not reading.frame_end and consumed >= limit:
                    head = file.read(limit, consumed) + bytes(buffer[: min(count, HEADER_BYTES_MAX)])
                    header = self._header(slot, head)
                    if header is None:
                        limit = consumed + count  # the rest of the header is to come
                    else:
                        reading.reader.check_header(header)
                        reading.frame_end = limit = limit + header.header_bytes + header.length
                count = min(count, limit - consumed)
                most = wire_bytes_max(room.party.message_bytes_max) + SPILL_EXTRA_BYTES_MAX
                if file.size + count > most:
                    raise Violation(1008, "too many control frames within one message")
                try:
                    file.append(memoryview(buffer)[:count])
                except OSError as error:
                    self._spill_refused(slot, error)
                    return
                self._spills.grew(count)
                self._take(slot, sock, count)
                if table.consumed[slot] == reading.frame_end and self._frame_spilled(
                    slot, reading, room, link
                ):
                    return
            except Violation as violation:
                self.on_violation(slot, violation.code, violation.reason)
                return

    def _take(self, slot: int, sock: socket.socket, count: int) -> None:
        table = self._connections
        left = count
        while left:
            left -= sock.recv_into(self._buffer, left, MSG_TRUNC)
        table.consumed[slot] += count
        table.parsed[slot] = max(table.parsed[slot], table.consumed[slot])

    def _frame_spilled(self, slot: int, reading: Reading, room: RoomRecord, link: HostLink) -> bool:
        """A frame is whole in the file. True: so is the message, or the connection has ended."""
        assert reading.file is not None
        start, end = reading.frame_start, reading.frame_end
        frame = reading.file.read(start, end)
        reading.frames.append((start, end))
        reading.frame_start, reading.frame_end = end, 0
        for event in reading.reader.feed(frame):
            if type(event) is Message:
                reading.complete = True
                self._message_spilled(slot, reading, room, link, event)
                return True
            if type(event) is Ping:
                self.on_ping(slot, event.payload)
            elif type(event) is Close:
                self.on_close_frame(slot, event.code, event.reason)
                return True
        if reading.reader.idle:
            self._leave_file(slot)  # it was a control frame, and no message has begun
            return True
        return False

    def _message_spilled(
        self, slot: int, reading: Reading, room: RoomRecord, link: HostLink, message: Message
    ) -> None:
        """A message is whole in its file, and nothing before it is in flight: give it to whom it is for."""
        answers, end = room.answers, reading.frames[-1][1]
        if answers is not None and self._answer(slot, room, link, answers, message.data, end):
            self._leave_file(slot)
        elif room.party.wants_message:
            self._dispatch_spilled(slot, reading, room, link, message)
        else:
            self._leave_file(slot)

    def _leave_file(self, slot: int) -> None:
        """What is in the file is done with, and nobody acknowledges it: go on in the kernel, in a later round
        so that one client does not take them all.
        """
        self._drop_reading(slot)
        self._connections.flags[slot] |= DEFERRED
        self.later(0.0, self._resume_numbered, slot, self._connections.number[slot])

    def _resume_numbered(self, slot: int, number: int) -> None:
        if self._connections.holds(slot, number):
            self._resume(slot)

    def _dispatch_spilled(
        self, slot: int, reading: Reading, room: RoomRecord, link: HostLink, message: Message
    ) -> None:
        table = self._connections
        # What is behind the message has been announced by epoll, and is looked at after its acknowledgement.
        table.flags[slot] |= DEFERRED
        size = max(table.consumed[slot] - reading.start, message.inflated_bytes)
        reading.dispatched_bytes = size
        room.inflight_bytes += size
        link.inflight_bytes += size
        self._dispatch(slot, room, link, reading.frames[-1][1], message.data)

    def _deliver_spilled(self, slot: int, reading: Reading, room: RoomRecord, link: HostLink) -> None:
        """To the next host, once more: the message is read from its file."""
        assert reading.file is not None
        reader = self._new_reading(slot, reading.start, room).reader
        for start, end in reading.frames:
            for event in reader.feed(reading.file.read(start, end)):
                if type(event) is Message:
                    self._message_spilled(slot, reading, room, link, event)

    def _drop_reading(self, slot: int) -> None:
        flags = self._connections.flags
        if not flags[slot] & READER:
            return
        flags[slot] &= ~READER
        reading = self._readings.pop(slot)
        if reading.dispatched_bytes:
            room = self._connections.room[slot]
            assert room is not None
            link = self._links.by_shard[room.shard]
            room.inflight_bytes -= reading.dispatched_bytes
            if link is not None:
                link.inflight_bytes -= reading.dispatched_bytes
        if reading.file is not None:
            self._spills.shrank(reading.file.size)
            reading.file.delete()
            if self._spill_waiting:
                waiting, self._spill_waiting = self._spill_waiting, []
                for other in waiting:
                    if flags[other] & DEFERRED and other != slot:
                        flags[other] &= ~DEFERRED
                        self.pump(other)
