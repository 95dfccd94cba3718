"""From the upgrade to the close turn: the life of each connection, as transitions of its phase.

Owns every change of `phase`, the registry's rows, and the few facts that only connections in transition have.
Must not parse frames or look at effects. Peers: `doors` (who may come in), `inbox` and `outbox` (bytes),
`links` (connect and close turns), `storage.registry`.

    ADMITTING ──▶ STORING ──row committed, 101──▶ CONNECTING ──connect turn──▶ OPEN
                                                                               │ the peer's end,
                                                                               │ or our verdict
    FREE ◀──close turn acknowledged── CLOSED ◀──────── ENDING ◀────────────────┤ (turns awaited)
                                         ▲                                     │
                                         └───────────── CLOSING ◀──our Close───┘ (peer's Close awaited)

Invariants:
    F1  a client that has read its 101 has a committed row
    F2  each connection whose 101 went out, and whose party wants it, has exactly one close turn, after its
        last message's
    F3  the socket is open as long as a turn of one of its messages may have to be run again
    F4  how a connection ends is in the ledger's log before a Close of ours is sent, and before anything is
        kept from it because its client has gone: so no successor sends again, behind a gap
"""

import contextlib
import fcntl
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, cast

from cbor2 import dumps

from broker.gateway.addresses import Addresses
from broker.gateway.connections import (
    ADMITTING,
    CLOSED,
    CLOSING,
    CONNECTING,
    DEFERRED,
    ENDING,
    FREE,
    GONE,
    INTRODUCED,
    OPEN,
    PHASE,
    PINGED,
    READER,
    STORING,
    Connections,
)
from broker.gateway.frames import encode_close, encode_ping, encode_pong
from broker.gateway.hub import ENDED, EPOLLIN, EPOLLOUT, EPOLLPRI, Hub
from broker.gateway.inbox import Inbox
from broker.gateway.ledger import ANSWERS, FORGOTTEN, NEWCOMER, STATE, TAGS, Record, rules_record
from broker.gateway.ledger import ENDING as ENDING_RECORD
from broker.gateway.links import HostLink, Links
from broker.gateway.outbox import SLOW, Sender
from broker.gateway.recovery import Position, Remains, cookie, position
from broker.gateway.rooms import RoomRecord, Rooms
from hibernation import wire
from hibernation.logs import get_logger
from hibernation.settings import Settings
from storage.clock import now
from storage.registry import RegistryBatch, Row

#: Causes of an end after which nothing reaches the client.
UNREACHABLE: Final = frozenset({"client_gone", "ping_timeout"})
#: Why a connection has ended that we have closed with these codes; with others it is a fault of protocol.
_CAUSES: Final = {1008: "limit", 1009: "too_big"}
#: Each connection is looked at once in so many seconds, in so many parts a second, unless they are few.
SWEEP_SECONDS: Final = 5
SWEEP_PARTS: Final = 10
SWEEP_AT_ONCE: Final = 500
#: ioctl: bytes sent that the peer's TCP has not acknowledged (tcp(7)).
SIOCOUTQ: Final = 0x5411
#: Sockets of ended connections that wait for their peers' end; of further ones the peer may see a reset. They
#: are within `doors.DESCRIPTORS_RESERVED`.
LINGERING_MAX: Final = 256

log = get_logger("lifecycle")


@dataclass(slots=True)
class Newcomer:
    """What is known of a connection until its connect turn has ended."""

    head: bytes
    head_bytes: int
    #: The upgrade request, encoded, for whoever asks to see it.
    request: bytes
    connection_id: str
    uri: str
    address: str

    def encode(self) -> bytes:
        """What a successor needs to go on."""
        return dumps((self.head, self.head_bytes, self.request))


@dataclass(slots=True)
class Ending:
    """How a connection ends. `answered`: our Close frame is out, or must never be."""

    code: int
    reason: str
    clean: bool
    cause: str
    answered: bool = False

    def encode(self) -> bytes:
        """What a successor needs to end the connection in the same way."""
        return dumps((self.code, self.reason, self.clean, self.cause))


@dataclass(slots=True)
class Probe:
    """A ping to a live connection whose id somebody else brings, and who waits for what comes of it."""

    newcomers: list[tuple[int, int]] = field(default_factory=list)


class Lifecycle:
    """See the module."""

    def __init__(
        self,
        hub: Hub,
        connections: Connections,
        rooms: Rooms,
        links: Links,
        inbox: Inbox,
        sender: Sender,
        settings: Settings,
    ) -> None:
        self._hub = hub
        self._connections = connections
        self._ledger = connections.ledger
        self._rooms = rooms
        self._links = links
        self._inbox = inbox
        self._sender = sender
        #: Given the slot of each socket that has ended: nobody else holds it any longer.
        self.on_ended: Callable[[int], None] = lambda _slot: None
        self._close_seconds = settings.close_timeout_seconds
        self._ping_interval = round(settings.ping_interval_seconds)
        self._ping_timeout = round(settings.ping_timeout_seconds)
        self.batch = RegistryBatch()
        #: Slot and number of those whose rows the next commit writes; and how many there are in all.
        self.storing: list[tuple[int, int]] = []
        self.storing_count = 0
        self._newcomers: dict[int, Newcomer] = {}
        self._endings: dict[int, Ending] = {}
        self._probes: dict[int, Probe] = {}
        self._lingering: dict[int, socket.socket] = {}
        self._sweep = 0
        self.addresses = Addresses()
        #: Some connection is being read again up to where it ended before its host died.
        self.reopened = False
        self.draining = False
        self.accepted = 0
        #: Automatic responses that were given.
        self.answers = 0
        self._going_in: list[tuple[int, Position]] = []
        #: Connections whose outgoing stream nobody could mend after a gateway's death.
        self.torn = 0
        self.closes: dict[str, int] = {}
        # Set by the doors: what becomes of a newcomer whose id was taken, when the other lives or is dead.
        self.on_duplicate: Callable[[int], None]
        self.on_vacant: Callable[[int], None]
        inbox.on_answer = self.answer
        inbox.on_ping = self.ping_came
        inbox.on_close_frame = self.close_frame_came
        inbox.on_violation = self.violated
        inbox.on_gone = self.gone

    # --- Coming in --------------------------------------------------------------------------------

    def store(self, slot: int) -> None:
        """Everybody agrees: write the row. The 101 follows its commit."""
        table = self._connections
        newcomer = self._newcomers[slot]
        room = table.room[slot]
        assert room is not None
        table.set_phase(slot, STORING)
        number = table.number[slot]
        party, _, room_id = room.key.partition("/")
        self.batch.open(
            number, party, room_id, newcomer.connection_id, newcomer.uri, now(), address=newcomer.address
        )
        sock, ledger = table.sockets[slot], self._ledger
        assert sock is not None
        here = position(sock)  # behind a proxy there may have been requests before this one
        ledger.cookie[slot] = cookie(sock)
        ledger.base[slot] = here.taken + newcomer.head_bytes
        ledger.before[slot] = table.written[slot] = here.written
        ledger.add(NEWCOMER, slot, number, 0, newcomer.encode())
        ledger.commit()
        self.storing.append((slot, number))
        self.storing_count += 1

    def introduce(self, slot: int, newcomer: Newcomer) -> None:
        """A slot has been allocated for an upgrade that is not yet decided."""
        self._newcomers[slot] = newcomer
        table = self._connections
        table.address[slot] = self.addresses.enter(newcomer.address)
        room = table.room[slot]
        assert room is not None
        room.arriving += 1

    def newcomer(self, slot: int) -> Newcomer:
        """What is known of a connection in phase ADMITTING."""
        return self._newcomers[slot]

    def turn_away(self, slot: int, answer: bytes) -> None:
        """An upgrade is refused after all: answer in HTTP and forget it."""
        sock = self._forget(slot)
        self.say_goodbye(sock, answer)

    def turn_away_open(self, slot: int, answer: bytes, code: int, reason: str) -> None:
        """An upgrade is refused with a close code, which only an open client can read."""
        newcomer = self._newcomers[slot]
        sock = self._forget(slot)
        with contextlib.suppress(OSError):
            sock.recv(newcomer.head_bytes)
        self.say_goodbye(sock, answer + encode_close(code, reason))

    def _forget(self, slot: int) -> socket.socket:
        table = self._connections
        sock, room = table.sockets[slot], table.room[slot]
        assert room is not None
        assert sock is not None
        self._newcomers.pop(slot, None)
        self.addresses.leave(table.address[slot])
        room.arriving -= 1
        table.unindex(slot)
        table.unwatch(sock.fileno())
        table.release(slot)
        self._rooms.forget_if_empty(room)
        self.on_ended(slot)
        return sock

    def give_up(self) -> list[socket.socket]:
        """Let go of those who are not let in yet: their requests are unread."""
        table = self._connections
        self._probes.clear()
        return [self._forget(slot) for slot in list(self._newcomers) if table.phase[slot] == ADMITTING]

    def forget_row(self, number: int) -> None:
        """The row of a connection has to go."""
        self.batch.forget(number)
        self._ledger.add(FORGOTTEN, number=number)
        self._ledger.commit()

    def keep_state(self, slot: int, blob: bytes | None) -> None:
        """A turn has given the connection another state; None: none."""
        number = self._connections.number[slot]
        if blob is None:
            self._inbox.states.pop(slot, None)
        else:
            self._inbox.states[slot] = blob
        self._ledger.add(STATE, slot, number, blob is not None, blob or b"")
        self._ledger.commit()
        self.batch.state(number, blob)

    def keep_tags(self, slot: int, blob: bytes) -> None:
        """A turn has given the connection other tags: a blob of `wire.tags_blob`."""
        table = self._connections
        number, room = table.number[slot], table.room[slot]
        assert room is not None
        self._rooms.retag(slot, blob)
        self._ledger.add(TAGS, slot, number, 0, blob)
        self._ledger.commit()
        party, _, room_id = room.key.partition("/")
        self.batch.tags(number, party, room_id, wire.blob_tags(blob))

    def keep_rules(self, key: str, rules: bytes | None) -> None:
        """A room has changed its automatic responses; as the registry has them, None: none are left."""
        self._ledger.add(*rules_record(key, rules))
        self._ledger.commit()
        self.batch.auto_responses[key] = rules

    def committed(self, stored: list[tuple[int, int]]) -> None:
        """Rows are on disk: answer 101, and let the connect turns begin."""
        table = self._connections
        self.storing_count -= len(stored)
        for slot, number in stored:
            if not table.holds(slot, number):
                continue
            room, sock = table.room[slot], table.sockets[slot]
            assert room is not None
            assert sock is not None
            newcomer = self._newcomers[slot]
            if self.draining:
                self.forget_row(number)
                self.turn_away(
                    slot,
                    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
                )
                continue
            try:
                if newcomer.head_bytes:
                    sock.recv(newcomer.head_bytes)
                sent = sock.send(newcomer.head) if newcomer.head else 0
            except OSError:
                sent = -1
            if sent != len(newcomer.head):
                # The client left before it was one.
                self.forget_row(number)
                self._forget(slot)
                end_socket(sock)
                continue
            table.written[slot] += sent
            table.sockets[slot] = sock = plain(sock)
            self.accepted += 1
            room.arriving -= 1
            self._rooms.link(slot)
            table.seen[slot] = self._hub.second
            if room.party.wants_connect:
                table.set_phase(slot, CONNECTING)
                self._ask_connect(slot, room)
            else:
                table.set_phase(slot, OPEN)
                self._ledger.phase[slot] |= INTRODUCED
                del self._newcomers[slot]
            self._hub.park(sock.fileno())

    def not_committed(self, stored: list[tuple[int, int]], answer: bytes) -> None:
        """The registry could not be written: nobody of these comes in."""
        self.storing_count -= len(stored)
        for slot, number in stored:
            if self._connections.holds(slot, number):
                self.turn_away(slot, answer)

    def _ask_connect(self, slot: int, room: RoomRecord) -> None:
        table = self._connections
        link = self._links.by_shard[room.shard]
        if link is None:
            return  # asked when the host is there
        room.inflight_events += 1
        state = self._inbox.states.get(slot)
        request = self._newcomers[slot].request
        link.put([wire.CONNECT, room.key, slot, table.number[slot], table.card[slot], state, request])

    def connected(self, slot: int, number: int, failed: bool, *, counted: bool = True) -> None:
        """The connect turn has ended: frames may come, unless it failed (S9). `counted`: it is in flight."""
        table = self._connections
        if not table.holds(slot, number):
            return
        room = table.room[slot]
        assert room is not None
        if counted:
            room.inflight_events -= 1
            if room.waiting:
                self._inbox.resume_waiting(room)
        self._introduced(slot, failed=failed)

    def _introduced(self, slot: int, *, failed: bool) -> None:
        """There is no connect turn any more to wait for."""
        table = self._connections
        self._newcomers.pop(slot, None)
        phase = table.phase[slot]
        self._ledger.phase[slot] |= INTRODUCED
        if phase == CONNECTING:
            table.set_phase(slot, OPEN)
            if failed:
                self.close(slot, 1011, "", "server_close")
            else:
                self.resume(slot)
        elif phase in (ENDING, CLOSING):
            self._finish_if_done(slot)

    def resume(self, slot: int) -> None:
        """Look at what came while nothing could be read."""
        flags = self._connections.flags
        if flags[slot] & DEFERRED:
            flags[slot] &= ~DEFERRED
            self._inbox.pump(slot)

    # --- What epoll says --------------------------------------------------------------------------

    def ready(self, slot: int, events: int) -> None:
        """A parked connection's descriptor has something to say."""
        table = self._connections
        phase = table.phase[slot]
        if phase < CONNECTING:
            return  # said of a connection that the same poll has closed, whose descriptor this one has now
        if events & EPOLLOUT and slot in self._sender.outboxes and self._sender.writable(slot):
            ending = self._endings.get(slot)
            if ending is not None and ending.answered and table.phase[slot] == ENDING:
                self._finish_if_done(slot)
                return
        if not events & (EPOLLIN | ENDED | EPOLLPRI):
            return
        if events & EPOLLIN and not events & ENDED:  # its end is no sign of life
            table.seen[slot] = self._hub.second
            if table.flags[slot] & PINGED:
                table.flags[slot] &= ~PINGED
                if slot in self._probes:
                    self._alive(slot)
        if events & EPOLLPRI:
            # Urgent data has no place in WebSocket and would be cut out of the stream.
            self.violated(slot, 1002, "urgent data")
            return
        if events & ENDED:
            table.flags[slot] |= GONE
        if phase == OPEN:
            self._inbox.pump(slot)
        elif phase == CLOSING:
            self._discard(slot)
        else:
            table.flags[slot] |= DEFERRED  # also its end: what came before that is handled first

    def _discard(self, slot: int) -> None:
        """Our Close is out: what comes before the peer's is not for the room any more."""
        closed, ended = self._inbox.discard(slot)
        ending = self._endings[slot]
        if closed or ended or self._connections.flags[slot] & GONE:
            ending.clean = closed
            ending.answered = True
            self._end(slot, ending)

    # --- Control frames ---------------------------------------------------------------------------

    def ping_came(self, slot: int, payload: bytes) -> None:
        """Answer a ping (RFC 6455, section 5.5.3); one that cannot be answered soon is not answered at
        all.
        """
        if self._sender.waiting_bytes(slot) < 64 * 1024:
            self._sender.say(slot, encode_pong(payload))

    def answer(self, slot: int, frame: bytes, end: int) -> None:
        """Send the automatic response to the message that ends at `end`; nothing before it is in flight
        (S16).
        """
        self.answers += 1
        ledger = self._ledger
        ledger.header[ANSWERS] = 1
        ledger.answered[slot] = int(now() * 1000)
        self._sender.say(slot, frame, end)

    def close_frame_came(self, slot: int, code: int, reason: str) -> None:
        """The peer's Close: answered when the turns before it are acknowledged (S14)."""
        self._end(slot, Ending(code, reason, True, "client_close"))

    def violated(self, slot: int, code: int, reason: str) -> None:
        """The peer broke the protocol, or sent too much: say so at once, and end (RFC 6455, section
        7.1.7).
        """
        cause = _CAUSES.get(code, "protocol_error")
        phase = self._connections.phase[slot]
        if phase in (FREE, CLOSED):
            return
        if phase == CLOSING:
            self._end(slot, Ending(code, reason, False, cause, answered=True))
            return
        if slot not in self._endings:
            ending = Ending(code, reason, False, cause, answered=True)
            self._say_close(slot, ending, ENDING)
            self._end(slot, ending)
        elif not (phase == OPEN and self._connections.flags[slot] & DEFERRED):  # else there are messages
            self._end(slot, self._endings[slot])

    def gone(self, slot: int) -> None:
        """The peer has ended its side without a Close, or the connection has failed."""
        if self._connections.phase[slot] in (OPEN, CONNECTING):
            self._lost(slot, "client_gone")
        elif self._connections.phase[slot] == CLOSING:
            self._end(slot, self._endings[slot])

    def _lost(self, slot: int, cause: str) -> None:
        """From here on nothing is sent to the connection (F4)."""
        table = self._connections
        ending = self._endings.get(slot) or Ending(1006, "", False, cause)
        ending.answered = True
        self._ledger.add(ENDING_RECORD, slot, table.number[slot], ENDING, ending.encode())
        self._ledger.commit()
        if table.phase[slot] == OPEN and table.flags[slot] & DEFERRED:
            # What it had sent before, and what waits for its room, is no less a message (S22).
            self._endings[slot] = ending
            self._rooms.unlink(slot)
            self.reopened = True
        else:
            self._end(slot, ending)

    def failed(self, slot: int, cause: str) -> None:
        """Sending does not work: the client has gone, or reads too slowly (S25).

        Whoever sends may be in the middle of something with this or another connection: so nothing is closed
        here and now, only in the next round of deadlines.
        """
        table = self._connections
        if cause == SLOW and table.phase[slot] in (OPEN, CONNECTING, CLOSING):
            self._rooms.unlink(slot)
            table.set_phase(slot, ENDING)
            ending = self._endings[slot] = Ending(1013, "", False, cause, answered=True)
            self._ledger.add(ENDING_RECORD, slot, table.number[slot], ENDING, ending.encode())
            self._ledger.commit()
            self._hub.after(self._close_seconds, self._close_timeout, slot, table.number[slot])
        self._hub.after(0, self._failed, slot, table.number[slot])

    def _failed(self, slot: int, number: int) -> None:
        table = self._connections
        if not table.holds(slot, number):
            return
        phase = table.phase[slot]
        if phase == OPEN:
            table.flags[slot] |= GONE
            self._inbox.pump(slot)  # what came before the end
            if table.phase[slot] == OPEN and not table.flags[slot] & DEFERRED:
                self.gone(slot)
        elif phase == CLOSING:
            self._discard(slot)
        elif phase == CONNECTING:
            table.flags[slot] |= DEFERRED | GONE
        else:
            self._finish_if_done(slot)

    # --- Closing ----------------------------------------------------------------------------------

    def close(self, slot: int, code: int, reason: str, cause: str) -> None:
        """Close from our side: send Close, wait for the peer's, for close_timeout_seconds at most."""
        table = self._connections
        if table.phase[slot] not in (OPEN, CONNECTING) or self.has_ended(slot):
            return
        table.set_phase(slot, CLOSING)
        self._rooms.unlink(slot)
        ending = self._endings[slot] = Ending(code, reason, False, cause, answered=True)
        self._say_close(slot, ending, CLOSING)
        if table.phase[slot] == CLOSING:
            self._hub.after(self._close_seconds, self._close_timeout, slot, table.number[slot])
            if table.flags[slot] & (DEFERRED | GONE):
                table.flags[slot] &= ~DEFERRED
                self._discard(slot)

    def _say_close(self, slot: int, ending: Ending, phase: int) -> None:
        """Send the connection's Close (F4). `phase` is what a successor finds it in."""
        table = self._connections
        self._ledger.add(ENDING_RECORD, slot, table.number[slot], phase, ending.encode())
        code = None if ending.code == 1005 else ending.code
        self._sender.say(slot, encode_close(code, ending.reason if code is not None else ""))

    def _close_timeout(self, slot: int, number: int) -> None:
        table = self._connections
        if not table.holds(slot, number):
            return
        ending = self._endings.get(slot)
        if ending is None:
            return
        if table.phase[slot] == CLOSING:
            self._sender.silence(slot)
            self._end(slot, ending)
        elif table.phase[slot] == ENDING and not ending.answered:
            self._answer(slot, ending)
            self._hub.after(self._close_seconds, self._close_timeout, slot, number)
        elif table.phase[slot] == ENDING:
            self._sender.silence(slot)  # it had time enough to read
            self._finish_if_done(slot)

    def _end(self, slot: int, ending: Ending) -> None:
        """Nothing more is read; the socket stays until no turn of it can have to be run again (F3)."""
        table = self._connections
        phase = table.phase[slot]
        if phase in (FREE, ENDING, CLOSED):
            return
        ending = self._endings.setdefault(slot, ending)
        table.set_phase(slot, ENDING)
        if ending.answered:
            self._rooms.unlink(slot)  # nothing more may be sent to it
        if phase != CLOSING and (not ending.answered or self._sender.waiting_bytes(slot)):
            self._hub.after(self._close_seconds, self._close_timeout, slot, table.number[slot])
        self._finish_if_done(slot)

    def _answer(self, slot: int, ending: Ending) -> None:
        ending.answered = True
        self._rooms.unlink(slot)
        self._say_close(slot, ending, ENDING)

    def _finish_if_done(self, slot: int) -> None:
        """Every turn of what was read is acknowledged: answer, close the socket, have the close turn run."""
        table = self._connections
        if table.phase[slot] != ENDING or self._inbox.in_flight(slot) or slot in self._newcomers:
            return
        ending = self._endings[slot]
        if not ending.answered:
            self._answer(slot, ending)
        if self._sender.waiting_bytes(slot) and ending.cause not in UNREACHABLE:
            return  # what was sent before the Close must get out first; epoll or the deadline comes back here
        self._finish(slot, ending)

    def _finish(self, slot: int, ending: Ending) -> None:
        table = self._connections
        room, sock = table.room[slot], table.sockets[slot]
        assert room is not None
        assert sock is not None
        number = table.number[slot]
        self._rooms.unlink(slot)
        self._sender.drop(slot)
        self.closes[ending.cause] = self.closes.get(ending.cause, 0) + 1
        self.addresses.leave(table.address[slot])
        table.unindex(slot)
        descriptor = sock.fileno()
        self._hub.unpark(descriptor)
        table.unwatch(descriptor)
        self._ledger.add(ENDING_RECORD, slot, number, CLOSED, ending.encode())
        self._ledger.commit()
        table.set_phase(slot, CLOSED)
        if ending.cause in UNREACHABLE:
            end_socket(sock)
        else:
            self._linger(sock)
        table.sockets[slot] = None
        self.on_ended(slot)
        if room.party.wants_close:
            self.batch.closing(number, ending.code, ending.reason, ending.clean, ending.cause)
            self._ask_close(slot, room, ending)
        else:
            self.closed(slot, number)
        probe = self._probes.pop(slot, None)
        if probe is not None:
            self._vacated(probe)

    def _ask_close(self, slot: int, room: RoomRecord, ending: Ending) -> None:
        table = self._connections
        link = self._links.by_shard[room.shard]
        if link is None:
            return
        room.inflight_events += 1
        link.put(
            [
                wire.CLOSE,
                room.key,
                slot,
                table.number[slot],
                table.card[slot],
                self._inbox.states.get(slot),
                ending.code,
                ending.reason,
                ending.clean,
                ending.cause,
            ]
        )

    def close_turn_ended(self, slot: int, number: int, *, counted: bool = True) -> None:
        """The close turn is acknowledged: nothing is left of the connection. `counted`: it is in flight."""
        table = self._connections
        if table.holds(slot, number) and table.phase[slot] == CLOSED:
            room = table.room[slot]
            assert room is not None
            if counted:
                room.inflight_events -= 1
                if room.waiting:
                    self._inbox.resume_waiting(room)
            self.closed(slot, number)

    def closed(self, slot: int, number: int) -> None:
        """Forget the connection."""
        table = self._connections
        room = table.room[slot]
        assert room is not None
        self.forget_row(number)
        self._inbox.drop(slot)
        self._endings.pop(slot, None)
        table.release(slot)
        self._rooms.forget_if_empty(room)

    def message_acknowledged(self, slot: int) -> None:
        """A message's turn has ended while the connection is ending."""
        if self._connections.phase[slot] == ENDING:
            self._finish_if_done(slot)
        else:
            self._end_again(slot)

    def has_ended(self, slot: int) -> bool:
        """Whether nothing may be sent to the connection any more, though its turns may have to run again."""
        ending = self._endings.get(slot)
        return ending is not None and ending.answered

    def _end_again(self, slot: int) -> None:
        """A connection that was ending when its host died has been read again up to there."""
        table = self._connections
        if table.phase[slot] == OPEN and slot in self._endings and not table.flags[slot] & DEFERRED:
            self._end(slot, self._endings[slot])
            self.reopened = any(table.phase[each] == OPEN for each in self._endings)

    # --- Goodbye to sockets -----------------------------------------------------------------------

    def say_goodbye(self, sock: socket.socket, answer: bytes) -> None:
        """Send a last answer on a socket that is nobody's, and close it so that the answer is read."""
        with contextlib.suppress(OSError):
            sock.send(answer)
        self._linger(sock)

    def _linger(self, sock: socket.socket) -> None:
        """Close without destroying what the peer has not read: data unread on our side would turn the close
        into a RST.
        """
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            sock.close()
            return
        if self._drained(sock) or len(self._lingering) >= LINGERING_MAX:
            sock.close()
            return
        descriptor = sock.fileno()
        self._lingering[descriptor] = sock
        self._hub.watch(descriptor, lambda _events: self._lingered(sock), EPOLLIN)
        self._hub.after(self._close_seconds, self._stop_lingering, sock)

    @staticmethod
    def _drained(sock: socket.socket) -> bool:
        """Throw away what has come; True if the peer has ended its side."""
        try:
            for _ in range(16):
                if not sock.recv(65536):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False

    def _lingered(self, sock: socket.socket) -> None:
        if self._drained(sock):
            self._stop_lingering(sock)

    def _stop_lingering(self, sock: socket.socket) -> None:
        descriptor = sock.fileno()
        if descriptor >= 0 and self._lingering.get(descriptor) is sock:
            del self._lingering[descriptor]
            self._hub.unwatch(descriptor)
            sock.close()

    # --- Hosts come and go ------------------------------------------------------------------------

    def host_gone(self, host: HostLink) -> None:
        """What its turns had not acknowledged is as if it had never been dispatched."""
        table = self._connections
        shards = set(host.shards)
        for room in list(self._rooms.by_key.values()):
            if room.shard in shards:
                room.inflight_events = 0
                room.inflight_bytes = 0
                room.shares = None
                room.waiting = None
        parsed, consumed, flags = table.parsed, table.consumed, table.flags
        for slot in range(len(table)):
            if parsed[slot] == consumed[slot] and not flags[slot] & READER:
                continue  # nothing of it was dispatched, as of nearly all
            room_of_slot = table.room[slot]
            if room_of_slot is None or room_of_slot.shard not in shards:
                continue
            phase = table.phase[slot]
            if phase in (OPEN, ENDING, CLOSING):
                in_flight = self._inbox.in_flight(slot)
                self._inbox.forget_in_flight(slot)
                if phase == ENDING and in_flight:
                    table.set_phase(slot, OPEN)  # read again up to where it ended: the ending is kept
                    self.reopened = True

    def host_came(self, host: HostLink) -> None:
        """Deliver what waits for the rooms of this host."""
        table, endings = self._connections, self._endings
        phases, flags = table.phase, table.flags
        shards = set(host.shards)
        for slot in range(len(table)):
            if phases[slot] == OPEN and not flags[slot] & DEFERRED and slot not in endings:
                continue  # nothing of it waits, as of nearly all
            room = table.room[slot]
            if room is None or room.shard not in shards:
                continue
            try:
                self._host_came(slot, room)
            except Exception:
                # A fault of ours costs this one connection, not the others (S40).
                log.exception("a connection could not be served", number=table.number[slot])
                self.violated(slot, 1011, "")

    def _host_came(self, slot: int, room: RoomRecord) -> None:
        table = self._connections
        phase = table.phase[slot]
        if phase == CONNECTING or (slot in self._newcomers and phase in (ENDING, CLOSING)):
            if room.party.wants_connect:
                self._ask_connect(slot, room)
            else:  # the code before this one had the hook
                self._introduced(slot, failed=False)
        elif phase == OPEN:
            self._inbox.look_again(slot)
            self._end_again(slot)
        elif phase == CLOSED:
            if room.party.wants_close:
                self._ask_close(slot, room, self._endings[slot])
            else:
                self.closed(slot, table.number[slot])

    # --- Liveness ---------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Once a second: have a part of all connections looked at, so that each is every few seconds (S15).

        Many are looked at in small parts, a tenth of a second apart, and pinged after silences of different
        lengths: thousands of clients that came together would otherwise answer together, and messages wait.
        """
        if self._ping_interval < SWEEP_SECONDS or len(self._connections) < SWEEP_AT_ONCE:
            self._look(1 if self._ping_interval < SWEEP_SECONDS else SWEEP_SECONDS)
            return
        for part in range(SWEEP_PARTS):
            self._hub.after(part / SWEEP_PARTS, self._look, SWEEP_SECONDS * SWEEP_PARTS)

    def _look(self, every: int) -> None:
        """Look at one connection in `every`; at the next ones the next time."""
        table = self._connections
        now = self._hub.second
        phases, seen, flags = table.phase, table.seen, table.flags
        self._sweep = (self._sweep + 1) % every
        silent, dead = self._ping_interval, self._ping_interval + self._ping_timeout
        spread = silent // 2 if every > SWEEP_SECONDS else 0
        for slot in range(self._sweep, len(phases), every):
            if phases[slot] != OPEN:
                continue
            age = now - seen[slot]
            if age < silent - (slot * 7 % spread if spread else 0):
                continue
            if slot in self._endings:
                self._end_again(slot)
                continue
            if not flags[slot] & PINGED:
                flags[slot] |= PINGED
                self._sender.say(slot, encode_ping())
            elif (flags[slot] & DEFERRED or self._inbox.in_flight(slot)) and self._has_acknowledged(slot):
                # Its pong may be among what we do not read, or behind the window that we keep shut.
                seen[slot] = now
                if slot not in self._probes:
                    flags[slot] &= ~PINGED
            elif age >= dead:
                self._lost(slot, "ping_timeout")

    def _has_acknowledged(self, slot: int) -> bool:
        """Whether the peer's TCP has taken all that we sent, our ping included."""
        sock = self._connections.sockets[slot]
        assert sock is not None
        waiting = fcntl.ioctl(sock.fileno(), SIOCOUTQ, bytes(4))
        return bool(struct.unpack("i", waiting)[0] == 0 and not self._sender.waiting_bytes(slot))

    def probe(self, slot: int, newcomer: int, seconds: float) -> None:
        """Somebody else brings this connection's id: ask it whether it lives (S10)."""
        table = self._connections
        probe = self._probes.get(slot)
        entry = (newcomer, table.number[newcomer])
        if probe is not None:
            probe.newcomers.append(entry)
            return
        self._probes[slot] = Probe([entry])
        table.flags[slot] |= PINGED
        self._hub.after(seconds, self._probe_timeout, slot, table.number[slot])
        self._sender.say(slot, encode_ping(b"probe"))

    def _alive(self, slot: int) -> None:
        probe = self._probes.pop(slot)
        for newcomer, number in probe.newcomers:
            if self._connections.holds(newcomer, number):
                self.on_duplicate(newcomer)

    def _probe_timeout(self, slot: int, number: int) -> None:
        probe = self._probes.pop(slot, None)
        if probe is None:
            return
        if self._connections.holds(slot, number):
            self.replace(slot)
        self._vacated(probe)

    def _vacated(self, probe: Probe) -> None:
        """The id that these newcomers bring is free, for the first of them."""
        for newcomer, number in probe.newcomers:
            if self._connections.holds(newcomer, number):
                self.on_vacant(newcomer)

    def replace(self, slot: int) -> None:
        """A newcomer with the same id takes this connection's place; its own close turn still comes (S10)."""
        table = self._connections
        if table.phase[slot] in (OPEN, CONNECTING):
            table.unindex(slot)
            if self.has_ended(slot):
                return
            ending = Ending(4409, "replaced", False, "replaced", answered=True)
            self._say_close(slot, ending, ENDING)
            self._end(slot, ending)

    # --- Left by the gateway before ---------------------------------------------------------------

    def adopt(self, slot: int, sock: socket.socket, remains: Remains, row: Row, room: RoomRecord) -> None:
        """Take over a connection as a former gateway left it: its row, its socket, its columns."""
        table, ledger = self._connections, self._ledger
        number = row.number
        here = position(sock, ledger.base[slot] + ledger.consumed[slot])
        blob = remains.tags.get(number)
        card = wire.make_card(row.id, row.uri, wire.tags_blob(row.tags) if blob is None else blob)
        phase, introduced = ledger.phase[slot] & PHASE, ledger.phase[slot] & INTRODUCED
        table.take_over(slot, sock, room, card, self._hub.second)
        table.written[slot] = here.written
        self._take_position(slot, here)
        state = remains.states.get(number, row.state)
        if state is not None:
            self._inbox.states[slot] = state
        table.index(slot, row.id)
        table.address[slot] = self.addresses.enter(row.address)
        table.flags[slot] = (DEFERRED if here.unread else 0) | (GONE if here.ended else 0)
        if phase == OPEN and introduced and number not in remains.numbers:  # as nearly all are
            table.phase[slot] = OPEN
            self._rooms.link(slot)
            self._inbox.adopt_spill(slot)
            self._hub.park(sock.fileno())
            return
        self._stage_again(row, remains)
        newcomer = None if introduced else remains.newcomers.get(number)
        if newcomer is not None:
            head, head_bytes, request = newcomer
            self._newcomers[slot] = Newcomer(head, head_bytes, request, row.id, row.uri, row.address)
        if phase == STORING:
            table.set_phase(slot, STORING)
            self._going_in.append((slot, here))
            return
        self._rooms.link(slot)
        self._inbox.adopt_spill(slot)
        answered = remains.answered.get(number)
        if answered is not None:
            self._inbox.settle_answered(slot, answered)
        self._hub.park(sock.fileno())
        frames, offset, torn = remains.pending(number, here.written)
        if frames or number in remains.shut:
            self._sender.restore(slot, frames, offset, shut=number in remains.shut)
        found = remains.endings.get(number)
        if torn:
            self.torn += 1
            self._sender.silence(slot)
            found = (ENDING, 1006, "", False, "gateway_lost")
        if found is None:
            table.set_phase(slot, CONNECTING if newcomer is not None else OPEN)
            if number in remains.shut:
                self.failed(slot, "client_gone")  # sending had failed; what came before that is a message
            return
        phase, code, reason, clean, cause = found
        self._endings[slot] = Ending(code, reason, clean, cause, answered=True)
        self._rooms.unlink(slot)
        table.set_phase(slot, phase)
        if phase == ENDING and here.unread and newcomer is None:
            table.set_phase(slot, OPEN)  # turns of what is unread may have to be run again
            self.reopened = True
        self._hub.after(self._close_seconds, self._close_timeout, slot, number)
        if phase != OPEN:
            self._hub.after(0, self._failed, slot, number)

    def adopt_resting(
        self, resting: Iterable[tuple[int, socket.socket, Row]], room_of: Callable[[Row], RoomRecord]
    ) -> None:
        """Take over open connections of a gateway that rests (G7), and of which the log says nothing. What is
        unread, and whether the peer has ended, is reported when a socket is parked.

        All clients wait for the last of them meanwhile, so everything is looked up once.
        """
        table, ledger, inbox = self._connections, self._ledger, self._inbox
        take_over, index, link = table.take_over, table.index, self._rooms.link
        enter, park, second = self.addresses.enter, self._hub.park, self._hub.second
        written, parsed, last_end, phases = table.written, table.parsed, table.last_end, table.phase
        before, consumed, addresses, states = ledger.before, ledger.consumed, table.address, inbox.states
        for slot, sock, row in resting:
            card = wire.make_card(row.id, row.uri, wire.tags_blob(row.tags))
            take_over(slot, sock, room_of(row), card, second)
            written[slot] = before[slot]
            parsed[slot] = last_end[slot] = consumed[slot]
            if row.state is not None:
                states[slot] = row.state
            index(slot, row.id)
            addresses[slot] = enter(row.address)
            phases[slot] = OPEN
            link(slot)
            inbox.adopt_spill(slot)
            park(sock.fileno())

    def _take_position(self, slot: int, here: Position) -> None:
        """Where the turns of the connection's messages have come to, as the kernel tells."""
        table, ledger = self._connections, self._ledger
        consumed = here.taken - ledger.base[slot]
        if consumed == ledger.consumed[slot] + 1:
            consumed -= 1  # a connection that has failed does not tell that the peer's FIN is among the bytes
        table.consumed[slot] = table.parsed[slot] = table.last_end[slot] = max(consumed, 0)

    def let_in(self) -> None:
        """Finish the handshakes that a former gateway has begun: their rows are on disk."""
        table, ledger = self._connections, self._ledger
        for slot, here in self._going_in:
            newcomer, room = self._newcomers[slot], table.room[slot]
            assert room is not None
            room.arriving += 1
            newcomer.head_bytes = max(ledger.base[slot] - here.taken, 0)
            newcomer.head = newcomer.head[here.written - ledger.before[slot] :]
        self.storing_count += len(self._going_in)
        self.committed([(slot, table.number[slot]) for slot, _ in self._going_in])
        self._going_in.clear()

    def survived(self, row: Row, room: RoomRecord, remains: Remains, slot: int | None = None) -> None:
        """A row without a socket: its client was cut off when the gateway before this one died (S35), or had
        gone before; then it has its `slot` still. What is left of it is its close turn.
        """
        table = self._connections
        number = row.number
        blob = remains.tags.get(number)
        card = wire.make_card(row.id, row.uri, wire.tags_blob(row.tags) if blob is None else blob)
        if slot is None:
            slot = table.allocate(number, None, room, card, self._hub.second)
        else:
            table.take_over(slot, None, room, card, self._hub.second)
        table.set_phase(slot, CLOSED)
        state = remains.states.get(number, row.state)
        if state is not None:
            self._inbox.states[slot] = state
        found = remains.endings.get(number)
        if found is not None:
            _, code, reason, clean, cause = found
        elif row.closing is not None:
            code, reason, clean, cause = row.closing
        else:
            code, reason, clean, cause = 1006, "", False, "gateway_lost"
        self._endings[slot] = Ending(code, reason, clean, cause, answered=True)
        self._stage_again(row, remains)
        if row.closing is None:
            self.batch.closing(number, code, reason, clean, cause)

    def _stage_again(self, row: Row, remains: Remains) -> None:
        """What a former gateway had staged for the registry may not have got there."""
        number = row.number
        if number in remains.states and remains.states[number] != row.state:
            self.batch.state(number, remains.states[number])
        blob = remains.tags.get(number)
        if blob is not None and wire.blob_tags(blob) != row.tags:
            self.batch.tags(number, row.party, row.room, wire.blob_tags(blob))

    def records(self) -> Iterator[Record]:
        """What a successor has to know beside columns, outboxes and registry."""
        table = self._connections
        for slot, newcomer in self._newcomers.items():
            if table.phase[slot] >= STORING:
                yield Record(NEWCOMER, slot, table.number[slot], 0, newcomer.encode())
        for slot, ending in self._endings.items():
            if ending.answered:
                phase = ENDING if table.phase[slot] == OPEN else table.phase[slot]
                yield Record(ENDING_RECORD, slot, table.number[slot], phase, ending.encode())

    # --- The end of the gateway -------------------------------------------------------------------

    def look_everywhere(self) -> None:
        """Nothing was looked at for a while: have every socket reported anew."""
        table = self._connections
        for slot in range(len(table)):
            sock = table.sockets[slot]
            if sock is not None and table.phase[slot] >= CONNECTING:
                self._hub.repark(sock.fileno())

    def drain(self) -> "deque[tuple[int, int]]":
        """Nobody comes in any more; returns who has to leave."""
        self.draining = True
        table = self._connections
        return deque(
            (slot, table.number[slot])
            for slot in range(len(table))
            if table.phase[slot] in (CONNECTING, OPEN, CLOSING, ENDING)
        )

    @property
    def closing_count(self) -> int:
        """Connections whose close turn has not been acknowledged, or that are on their way to it."""
        phases = self._connections.phase
        return sum(phases.count(phase) for phase in (CONNECTING, OPEN, ENDING, CLOSING, CLOSED))

    def leave_endings(self) -> None:
        """This gateway ends, and with it the sockets: clients that wait for an answer to their Close get it,
        and how connections end whose turns have not all ended is kept for their close turns.
        """
        table = self._connections
        for slot, ending in list(self._endings.items()):
            if table.phase[slot] == CLOSED:
                continue  # its row says it
            if not ending.answered:
                self._answer(slot, ending)
            self.batch.closing(table.number[slot], ending.code, ending.reason, ending.clean, ending.cause)

    def needs_turn(self, slot: int) -> bool:
        """Whether this is one of those, and neither its client nor a deadline brings it further, but only the
        end of a turn.
        """
        phase = self._connections.phase[slot]
        if phase != ENDING:
            return phase in (CONNECTING, OPEN, CLOSED)
        ending = self._endings[slot]
        if ending.cause in UNREACHABLE:
            return True
        return ending.answered and not self._sender.waiting_bytes(slot)


def plain(sock: socket.socket) -> socket.socket:
    """The socket of a connection that is to be parked, as the type beneath the library's: it can all that is
    asked of such a one, and takes 48 bytes instead of 104.
    """
    if type(sock) is not socket.socket:
        return sock
    family, kind = sock.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    return cast("socket.socket", socket.SocketType(family, kind, 0, sock.detach()))


def end_socket(sock: socket.socket) -> None:
    """Close a socket, also for those who hold a duplicate: the peer sees its end at once."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
