"""What a former gateway has left, read from its ledger and from the kernel.

Owns the reading of the log (`Remains`, pure) and the questions to the kernel about a socket's streams
(`position`). Must not change anything: `lifecycle` and `core` act on what is found here. Peer: `ledger`,
whose records these are.
"""

import fcntl
import socket
import struct
import termios
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from cbor2 import loads

from broker.gateway.connections import CLOSED
from broker.gateway.ledger import (
    ANSWER_HEAD,
    ANSWERED,
    CLEARED,
    DROPPED,
    ENCODED,
    ENDING,
    FORGOTTEN,
    FRAME,
    KEPT,
    KEPT_HEAD,
    NEWCOMER,
    PARTIES,
    RULES,
    STATE,
    TAGS,
    Record,
)

#: Where the counters are in struct tcp_info (tcp(7), linux/tcp.h): tcpi_bytes_acked, tcpi_bytes_received.
_COUNTERS: Final = struct.Struct("<120xQQ")
_INFO_BYTES: Final = 136
#: States in which the peer's FIN has been received; it counts as a byte (linux/tcp_states.h: TIME_WAIT,
#: CLOSE_WAIT, LAST_ACK, CLOSING).
_FIN_RECEIVED: Final = frozenset({6, 8, 9, 11})
_CLOSED: Final = 7
#: ioctl: bytes sent that the peer's TCP has not acknowledged (tcp(7)).
_SIOCOUTQ: Final = 0x5411
#: getsockopt: the kernel's name of a socket, never given twice while it runs (socket(7)).
_SO_COOKIE: Final = 57


class CountedSocket(socket.socket):
    """A stream that is no TCP connection, and counts for itself what the kernel counts for those."""

    def position(self) -> "Position":
        """As the function of this name gives it."""
        raise NotImplementedError


class Position(NamedTuple):
    """How far a socket's two streams have come, in bytes since its connection was made."""

    taken: int
    """Received, and read by us or somebody before us."""
    unread: int
    """Received, and waiting to be read."""
    written: int
    """Given to the kernel."""
    ended: bool
    """The peer's side has ended, or the connection has failed."""


def position(sock: socket.socket, expected: int = -1) -> Position:
    """Ask the kernel how far a socket's streams have come. Only between the calls that move them.

    Args:
        sock: The socket, of a connection that others made: the kernel counts from its handshake on.
        expected: What `taken` is if nothing was taken unnoticed; it saves a question.
    """
    if isinstance(sock, CountedSocket):
        return sock.position()
    descriptor = sock.fileno()
    while True:
        unacknowledged = _number(descriptor, _SIOCOUTQ)
        unread = _number(descriptor, termios.FIONREAD)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        acknowledged, received = _COUNTERS.unpack_from(info)
        ended = info[0] in _FIN_RECEIVED
        here = Position(
            received - ended - unread, unread, acknowledged + unacknowledged, ended or info[0] == _CLOSED
        )
        # The peer goes on meanwhile. With nothing on its way out, and as much taken as was noted, these
        # counts belong together; otherwise they do if both queues are as long after the others as before.
        if not unacknowledged and here.taken == expected:
            return here
        if (
            _number(descriptor, _SIOCOUTQ) == unacknowledged
            and _number(descriptor, termios.FIONREAD) == unread
        ):
            return here


def _number(descriptor: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(descriptor, request, b"\0\0\0\0"), "little")


def cookie(sock: socket.socket) -> int:
    """The kernel's name of a socket."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little")


class Kept:
    """A frame that a former gateway had in an outbox, or was about to send."""

    __slots__ = ("effect", "frame", "ordinal", "position")

    def __init__(self, position: int, ordinal: int, effect: int, frame: bytes) -> None:
        self.position = position
        self.ordinal = ordinal
        self.effect = effect
        self.frame = frame


class Remains:
    """What a log says, by connection number. Pure.

    Args:
        records: Of `Ledger.records`.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.parties: list[dict[str, Any]] = []
        #: Connections of which there is any record.
        self.numbers: set[int] = set()
        #: Head, bytes of the request's head, encoded request.
        self.newcomers: dict[int, tuple[bytes, int, bytes]] = {}
        #: Phase, code, reason, clean, cause.
        self.endings: dict[int, tuple[int, int, str, bool, str]] = {}
        self.kept: dict[int, list[Kept]] = {}
        self.shut: set[int] = set()
        self.states: dict[int, bytes | None] = {}
        self.tags: dict[int, bytes] = {}
        self.forgotten: set[int] = set()
        #: Messages up to there have been answered by a gateway itself.
        self.answered: dict[int, int] = {}
        #: By effect and bits of the window: the frame that it sends compressed.
        self.encoded: dict[tuple[int, int], bytes] = {}
        #: What rooms have set, by the rooms' keys.
        self.rules: dict[str, bytes | None] = {}
        #: The newest effect of each connection that has a frame among the kept.
        self.effects: dict[int, int] = {}
        frames: dict[int, bytes] = {}
        for kind, slot, number, where, payload in records:
            self.numbers.add(number)
            if kind == KEPT:
                self._keep(number, where, payload, frames)
            elif kind == ANSWERED:
                ordinal, self.answered[number] = ANSWER_HEAD.unpack_from(payload)
                kept = Kept(where, ordinal, 0, payload[ANSWER_HEAD.size :])
                self.kept.setdefault(number, []).append(kept)
            elif kind == FRAME:
                frames[where] = payload
            elif kind == STATE:
                self.states[number] = payload if where else None
            elif kind == TAGS:
                self.tags[number] = payload
            elif kind == NEWCOMER:
                head, head_bytes, request = loads(payload)
                self.newcomers[number] = (head, head_bytes, request)
            elif kind == ENDING:
                code, reason, clean, cause = loads(payload)
                self.endings[number] = (where, code, reason, clean, cause)
            elif kind == DROPPED:
                self._drop(number, where)
            elif kind == CLEARED:
                self.kept[number] = []
                if where:
                    self.shut.add(number)
            elif kind == FORGOTTEN:
                self.forgotten.add(number)
            elif kind == ENCODED:
                self.encoded[where, slot] = payload
            elif kind == RULES:
                key, rules = loads(payload)
                self.rules[key] = rules
            elif kind == PARTIES:
                self.parties = loads(payload)

    def _keep(self, number: int, where: int, payload: bytes, frames: dict[int, bytes]) -> None:
        ordinal, effect, shared = KEPT_HEAD.unpack_from(payload)
        frame = frames[shared] if shared else payload[KEPT_HEAD.size :]
        self.kept.setdefault(number, []).append(Kept(where, ordinal, effect, frame))
        if effect:
            self.effects[number] = effect

    def _drop(self, number: int, ordinal: int) -> None:
        """A frame that had not begun was dropped: what is behind it moves up."""
        kept = self.kept[number]
        for index, each in enumerate(kept):
            if each.ordinal == ordinal:
                del kept[index]
                for later in kept[index:]:
                    later.position -= len(each.frame)
                return

    def has_closed(self, number: int) -> bool:
        """Whether this connection's socket was about to be closed, if it was not."""
        found = self.endings.get(number)
        return found is not None and found[0] == CLOSED

    def pending(self, number: int, written: int) -> tuple[list[tuple[int, bytes]], int, bool]:
        """What waits for a connection whose kernel has taken `written` bytes.

        Returns:
            Frames with their ordinals; how much of the first one has been sent; and whether a part of the
            stream before them is missing, so that the connection cannot go on.
        """
        waiting = [each for each in self.kept.get(number, ()) if each.position + len(each.frame) > written]
        if not waiting:
            return [], 0, False
        first = waiting[0].position
        return [(each.ordinal, each.frame) for each in waiting], max(0, written - first), first > written
