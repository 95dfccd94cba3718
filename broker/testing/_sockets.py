"""Connections without a network: what a gateway finds in place of its listener and of clients' TCP sockets.

Owns socket pairs whose one end behaves towards `broker.gateway` as a TCP socket does: bytes can be taken
without being read, the kernel's counters go on over the death of a gateway, and the listener hands out what a
client has brought. Nothing is bound to any port. Must not know frames or requests. Peers: `broker.gateway`,
which does not know the difference, and `_client` at the other end.
"""

import fcntl
import os
import select
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from broker.gateway.recovery import CountedSocket, Position

__all__ = ["Backlog", "Killed", "Line", "Listener", "Process", "ServerEnd"]

#: Where clients of the kit seem to come from; each has a port of its own.
ADDRESS: Final = "127.0.0.1"
FIRST_PORT: Final = 40_000
#: Room for what a client has sent and the gateway has not read.
BUFFER_BYTES: Final = 4 * 1024 * 1024


class Killed(BaseException):
    """The process that runs this has been killed; nothing that follows happens any more."""


class Process:
    """Whether a process that the kit runs is alive, and which sockets are open in it."""

    def __init__(self) -> None:
        self.dead = False
        self._open: list[socket.socket] = []
        #: Called when half of the next frame is out; kills.
        self.tear: Callable[[], None] | None = None

    def check(self) -> None:
        """Raise `Killed` in a process that is dead: it does not reach the outside any more."""
        if self.dead:
            raise Killed

    def opened(self, sock: socket.socket) -> None:
        """A socket is open in this process."""
        self._open = [each for each in self._open if each.fileno() >= 0]
        self._open.append(sock)

    def end(self) -> None:
        """The process has gone: its descriptors are closed, which duplicates elsewhere outlive."""
        self.dead = True
        for sock in self._open:
            sock.close()
        self._open.clear()


class Line:
    """One connection, as the kernel knows it: it outlives the gateway's process."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.taken = 0
        self.written = 0


class ServerEnd(CountedSocket):
    """The gateway's end of a line."""

    process: Process
    line: Line

    @classmethod
    def of(cls, descriptor: int, line: Line, process: Process) -> "ServerEnd":
        """Take over a descriptor, in this process."""
        sock = cls(fileno=descriptor)
        sock.line = line
        sock.process = process
        sock.setblocking(False)
        process.opened(sock)
        return sock

    # What moves the streams.

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """As of any socket."""
        self.process.check()
        data = super().recv(size, flags)
        if not flags & socket.MSG_PEEK:
            self.line.taken += len(data)
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As of a TCP socket: with MSG_TRUNC bytes go without being read (tcp(7))."""
        self.process.check()
        if flags & socket.MSG_TRUNC:
            return len(self.recv(nbytes))
        size = super().recv_into(buffer, nbytes, flags)
        if not flags & socket.MSG_PEEK:
            self.line.taken += size
        return size

    def send(self, data: Any, flags: int = 0, /) -> int:
        """As of any socket."""
        process = self.process
        process.check()
        if process.tear is not None:
            data = memoryview(data)[: max(1, len(data) // 2)]
        size = super().send(data, flags)
        self.line.written += size
        if process.tear is not None:
            process.tear()
        return size

    def shutdown(self, how: int, /) -> None:
        """As of any socket."""
        self.process.check()
        super().shutdown(how)

    # What is asked about them.

    def position(self) -> Position:
        """What the kernel tells of a TCP socket."""
        unread = struct.unpack("i", fcntl.ioctl(self.fileno(), termios.FIONREAD, bytes(4)))[0]
        poll = select.poll()
        poll.register(self, select.POLLRDHUP)
        return Position(self.line.taken, unread, self.line.written, bool(poll.poll(0)))

    def getpeername(self) -> tuple[str, int]:
        """Where the client seems to be."""
        return (ADDRESS, self.line.port)

    def setsockopt(self, level: int, *arguments: Any) -> None:
        """As of any socket; options of TCP mean nothing here."""
        if level != socket.IPPROTO_TCP:
            super().setsockopt(level, *arguments)


class Listener(socket.socket):
    """What a gateway accepts from. The lines that wait in it outlive the gateway."""

    process: Process
    backlog: "Backlog"

    @classmethod
    def of(cls, backlog: "Backlog", process: Process) -> "Listener":
        """Make one for this process."""
        sock = cls(fileno=os.dup(backlog.descriptor))
        sock.backlog = backlog
        sock.process = process
        process.opened(sock)
        return sock

    def accept(self) -> "tuple[socket.socket, Any]":
        """Hand out the next line, or raise BlockingIOError."""
        self.process.check()
        if not self.backlog.waiting:
            raise BlockingIOError
        os.read(self.backlog.descriptor, 1)
        end, line = self.backlog.waiting.popleft()
        sock = ServerEnd.of(end.detach(), line, self.process)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.backlog.send_buffer_bytes)
        return sock, (ADDRESS, line.port)

    def setsockopt(self, level: int, option: int, value: Any = None, *_: Any) -> None:
        """Note what accepted sockets inherit."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF):
            self.backlog.send_buffer_bytes = value


class Backlog:
    """Lines that no gateway has accepted yet, and all that have been."""

    def __init__(self) -> None:
        self.descriptor, self._knock = socket_pair_descriptors()
        self.waiting: deque[tuple[socket.socket, Line]] = deque()
        self.send_buffer_bytes = 64 * 1024
        self.lines: dict[int, Line] = {}

    def dial(self) -> socket.socket:
        """Connect; returns the client's end."""
        client, server = socket.socketpair()
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        line = Line(FIRST_PORT + len(self.lines) % 20_000)
        self.lines[os.fstat(server.fileno()).st_ino] = line
        self.waiting.append((server, line))
        os.write(self._knock, b"\0")
        return client

    def adopt(self, descriptor: int, process: Process) -> ServerEnd:
        """The gateway's end of a line, as the keeper has it."""
        return ServerEnd.of(descriptor, self.lines[os.fstat(descriptor).st_ino], process)

    def close(self) -> None:
        """Close everything that waits."""
        for end, _ in self.waiting:
            end.close()
        os.close(self.descriptor)
        os.close(self._knock)


def socket_pair_descriptors() -> tuple[int, int]:
    """Two ends of a pipe-like pair, not blocking."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    return reading.detach(), writing.detach()
