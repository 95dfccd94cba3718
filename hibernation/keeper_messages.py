"""What a keeper and its clients say to one another: the layout of the messages, and how one is sent.

A keeper holds duplicates of descriptors, so that what they stand for outlives the process that uses them:
clients' sockets under the numbers of their slots, and a few others (the listener, a gateway's memory) under
names. Owns the layout and what both ends need to speak it. Must import nothing heavy, since the keeper does
not either. Its peers are `hibernation.keeper`, and `hibernation.keeping` for everybody else.

A message is one record of a SOCK_SEQPACKET socket: whole or not at all. It begins with `HEADER`: layout,
kind, count, number. What follows depends on the kind; descriptors ride along (unix(7), SCM_RIGHTS).

    to the keeper    PUT     count slots, and as many descriptors
                     DROP    count slots
                     PIN     a name, and one descriptor
                     UNPIN   a name
                     TAKE    a name, or nothing for everything
                     TOOK    number: batches up to it have arrived
    from the keeper  ACK     number: messages up to it are carried out; counts of what is held
                     REFUSED number: this message was not carried out; the text says why
                     ERROR   the text says why the session ends
                     COMING  counts of what a TAKE will send; it is batch 0
                     NAMED   number of the batch; count names, and as many descriptors
                     SLOTS   number of the batch; count slots, and as many descriptors
                     DONE    counts of what was sent

All to the keeper but TOOK are numbered, from 1 in each session.
"""

import os
import socket
import struct
from array import array
from collections.abc import Iterable

from storage.errors import BrokerError

SOCKET_NAME = "keeper.sock"

SOCKET_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket, in bytes (unix(7)); also in `storage.directory`, which is heavy."""

LAYOUT = 1
"""Raised with each change of what messages mean: a keeper is older than a gateway after an upgrade."""

HEADER = struct.Struct("<BBHQ")
COUNTS = struct.Struct("<II")
"""How many named descriptors, how many slots."""

PUT, DROP, PIN, UNPIN, TAKE, TOOK = range(1, 7)
ACK, REFUSED, ERROR, COMING, NAMED, SLOTS, DONE = range(17, 24)

BATCH_MAX = 200
"""Slots, and so descriptors, of one message. The kernel takes 253 and no more (SCM_MAX_FD)."""

CONTROL_BYTES = socket.CMSG_SPACE(4 * 253)
"""Room for whatever the kernel would pass, so that a message with too many is seen as just that."""

MESSAGE_BYTES_MAX = 4096

SLOTS_MAX = 1 << 23
"""Slots are below this: eight times as many descriptors as a process can have by default (fs.nr_open)."""

NAMES_MAX = 32
NAME_BYTES_MAX = 64
"""All names fit into one message."""


class KeeperError(BrokerError):
    """Something went wrong between this process and the keeper; the text ends with the remedy."""


class Malformed(Exception):
    """A message that its receiver does not take; the text is for whoever sent it."""


class Message:
    """One message. The descriptors of one that came are its receiver's, to be kept or closed; those of one
    to be sent stay the sender's.
    """

    __slots__ = ("body", "count", "fds", "kind", "number")

    def __init__(
        self, kind: int, number: int, count: int = 0, body: bytes = b"", fds: "array[int] | None" = None
    ) -> None:
        self.kind = kind
        self.number = number
        self.count = count
        self.body = body
        self.fds: array[int] = array("i") if fds is None else fds

    def slots(self) -> "array[int]":
        """Give the slots, as many as `count` says; raises Malformed when the body is not just these."""
        if len(self.body) != 4 * self.count or self.count > BATCH_MAX:
            raise Malformed(f"{self.count} slots in {len(self.body)} bytes, and at most {BATCH_MAX} slots")
        slots = array("i", self.body)
        if self.count and not 0 <= min(slots) <= max(slots) < SLOTS_MAX:
            raise Malformed(f"a slot outside of 0 to {SLOTS_MAX - 1}")
        return slots

    def names(self) -> list[str]:
        """Give the names, as many as `count` says; raises Malformed otherwise."""
        names = self.text().split("\0") if self.count else []
        if len(names) != self.count or len(names) > NAMES_MAX:
            raise Malformed(f"{len(names)} names where {self.count} were announced")
        return names

    def name(self) -> str:
        """Give the one name that is the body; raises Malformed when it cannot be one."""
        name = self.text()
        if not name or "\0" in name or len(self.body) > NAME_BYTES_MAX:
            raise Malformed(f"a name has 1 to {NAME_BYTES_MAX} bytes, none of them zero")
        return name

    def text(self) -> str:
        """Give the body as text; raises Malformed when it is not UTF-8."""
        try:
            return self.body.decode()
        except UnicodeDecodeError:
            raise Malformed("a text that is not UTF-8") from None

    def counts(self) -> tuple[int, int]:
        """Give the two counts that are the body; raises Malformed otherwise."""
        if len(self.body) != COUNTS.size:
            raise Malformed("counts of the wrong size")
        named, slots = COUNTS.unpack(self.body)
        return named, slots


def send_message(to: socket.socket, message: Message) -> None:
    """Send a message whole; or raise what `sendmsg` raises, BlockingIOError among it, with nothing sent."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, message.fds)] if message.fds else []
    header = HEADER.pack(LAYOUT, message.kind, message.count, message.number)
    to.sendmsg([header, message.body], rights, socket.MSG_DONTWAIT)


def receive_message(source: socket.socket) -> Message | None:
    """Receive one message, with descriptors that close on exec; None: the peer has ended and said no more.

    Raises BlockingIOError when there is none, Malformed when it is damaged: then no descriptor is left open.
    """
    try:
        data, control, flags, _ = source.recvmsg(MESSAGE_BYTES_MAX, CONTROL_BYTES, _RECEIVE)
    except ConnectionResetError:
        # The peer ended with something unread. Linux says so once, before what the peer had sent.
        data, control, flags, _ = source.recvmsg(MESSAGE_BYTES_MAX, CONTROL_BYTES, _RECEIVE)
    fds: array[int] = array("i")
    for level, kind, content in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        if flags & socket.MSG_CTRUNC:
            raise Malformed(
                f"of the descriptors of a message only {len(fds)} arrived (MSG_CTRUNC), for its receiver may "
                "not open more: raise the limit of open files (ulimit -n, LimitNOFILE=)"
            )
        if flags & socket.MSG_TRUNC:
            raise Malformed(f"a message of more than {MESSAGE_BYTES_MAX} bytes")
        if not data and not fds:
            return None
        if len(data) < HEADER.size:
            raise Malformed(f"a message of {len(data)} bytes")
        layout, kind, count, number = HEADER.unpack_from(data)
        if layout != LAYOUT:
            raise Malformed(
                f"a message of layout {layout}, where {LAYOUT} is spoken: gateway and keeper are of versions "
                "that do not go together; stop the instance and start it again"
            )
        return Message(kind, number, count, data[HEADER.size :], fds)
    except BaseException:
        close_all(fds)
        raise


_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; an error of the file behind one (close(2), EIO) closes it all the same."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def peer_of(connected: socket.socket) -> tuple[int, int]:
    """Give process id and user id of the other end, as they were when it connected or listened (unix(7))."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


_CREDENTIALS = struct.Struct("3i")


def keeper_path(data: str | os.PathLike[str]) -> str:
    """Where the keeper of the data directory listens; raises KeeperError when that path is too long."""
    path = os.path.join(os.path.abspath(data), SOCKET_NAME)
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES_MAX:
        raise KeeperError(
            f"{path}: the path has {size} bytes, and a Unix socket's may have {SOCKET_PATH_BYTES_MAX}; "
            "choose a shorter --data"
        )
    return path
