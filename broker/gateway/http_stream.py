"""One client's byte stream as hypercorn sees it: exactly the requests that are hypercorn's to answer, one at
a time.

Owns a socket while its client speaks HTTP: the look at each request head before hypercorn reads it, the end
of each request body, the deadlines, the refusal of what is malformed. Must not decide what a request is
answered with. Its peers are `broker.gateway.handshake`, which knows what a head may look like, and
`broker.gateway.http_server`.

How it works. A kept-alive connection can turn into a WebSocket at any request, and the gateway that takes it
must find the upgrade's head, and the frames behind it, unread in the kernel. So a head is *peeked*; only a
head that is hypercorn's is consumed, and of the bytes behind it no more than its body (by Content-Length, or
by following the chunks). The next request, pipelined or not, is looked at when the response to this one is
out.

States, and what is true in each:

| state | `_pending` | `_body` | a read means |
| --- | --- | --- | --- |
| idle | False | None | the next head: consume it, give the socket back, or refuse |
| body | True | set | bytes of this request's body |
| pending | True | None | nothing is consumed; only the peer's leaving ends the wait |
| raw | any | None | every byte: HTTP/2 owns the connection to its end |

Peeked bytes keep a socket readable. To wait for *more* than the n unread ones SO_RCVLOWAT is raised to n + 1;
the kernel still reports a FIN or an error at once. It may also report too early (receive buffer nearly full,
memory pressure), so a wait that brought nothing is followed by a short sleep instead of a spin.
"""

import fcntl
import re
import select
import socket
import sys
import termios
from dataclasses import dataclass
from math import inf
from typing import Final, NoReturn

import trio

from broker.gateway.handshake import (
    HEAD_BYTES_MAX,
    HTTP2_PREFACE,
    Head,
    HeadError,
    Headers,
    error_response,
    is_upgrade,
    parse_head,
)

__all__ = ["ChunkFollower", "RequestStream", "StreamLimits"]

READ_BYTES: Final = 64 * 1024
MIB: Final = 1024 * 1024

LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 64 * 1024 * 1024
"""After the last response what still arrives is read and dropped, up to these: closing a socket that holds
unread bytes sends RST, and an RST makes the client's kernel throw away a response that it has not read (RFC
9112, 9.6)."""

REFUSAL_SECONDS: Final = 1.0
"""How long a refusal may wait for room in the send buffer."""

PAUSE_SECONDS: Final = 0.05
"""The sleep after a wait for more bytes that brought none."""

ANY_BYTES: Final = 1 << 30
"""A low-water mark that data alone does not reach (the kernel caps it at half the receive buffer)."""

_GONE_EVENTS: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How long and how much a client may take; seconds and bytes."""

    head_seconds: float = 10.0
    """From the first byte of a head (the first head: from the start) to its end."""
    idle_seconds: float = 75.0
    """From a response's end to the first byte of the next request."""
    body_seconds: float = 60.0
    """From a head's end to the end of the body, and more for each MiB of it; of a streamed one from one piece
    to the next."""
    stall_seconds: float = 60.0
    """How long a response may wait for a client that reads nothing."""
    body_bytes: int = 1024 * 1024
    """A longer announced body is refused with 413 before a byte of it is read."""
    memory_bytes: int = 1024 * 1024
    """What of a body is kept in memory."""
    head_bytes: int = HEAD_BYTES_MAX
    """A head is complete within it, or refused with 431 (414 for the request line)."""


class ChunkFollower:
    """Finds the end of a chunked body without keeping it (RFC 9112, 7.1).

    Strict: lines end in CRLF, sizes have at most 16 hex digits, trailers look like headers.
    """

    _SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
    _TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")
    LINE_BYTES_MAX: Final = 1024
    TRAILER_BYTES_MAX: Final = 8 * 1024

    def __init__(self) -> None:
        self.done = False
        """The last byte fed ended the body."""
        self._data_left = 0
        self._expects = "size"
        """What the current line must be: "size", "end" (the CRLF behind a chunk's data) or "trailer"."""
        self._line = bytearray()
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> int:
        """Tell how many of the next bytes belong to the body; all of them unless its end is among them.

        Raises HeadError (400) where they stop being a chunked body.
        """
        position = 0
        while position < len(data) and not self.done:
            if self._data_left:
                step = min(self._data_left, len(data) - position)
                self._data_left -= step
                position += step
                continue
            end = data.find(b"\n", position) + 1 or len(data)
            self._line += data[position:end]
            position = end
            if len(self._line) > self.LINE_BYTES_MAX:
                raise HeadError(400, "a line of the chunked body is too long")
            if self._line.endswith(b"\n"):
                line = bytes(self._line)
                self._line.clear()
                self._end_line(line)
        return position

    def _end_line(self, line: bytes) -> None:
        if self._expects == "size":
            found = self._SIZE.fullmatch(line)
            if found is None:
                raise HeadError(400, "malformed chunk size")
            self._data_left = int(found[1], 16)
            self._expects = "end" if self._data_left else "trailer"
        elif self._expects == "end":
            if line != b"\r\n":
                raise HeadError(400, "a chunk is longer than its size")
            self._expects = "size"
        elif line == b"\r\n":
            self.done = True
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > self.TRAILER_BYTES_MAX or self._TRAILER.fullmatch(line) is None:
                raise HeadError(400, "malformed trailer")


class RequestStream:
    """A client's socket, for hypercorn's eyes (it needs `receive_some`, `send_all`, `send_eof` and `aclose`).

    `sock` is a connected, non-blocking TCP socket; the stream owns it until `detach` or `close`. One task
    reads, and sends do not overlap (hypercorn's lock sees to that).
    """

    def __init__(self, sock: socket.socket, limits: StreamLimits) -> None:
        self.socket = sock
        self.requests = 0
        """Heads that hypercorn was given."""
        self.upgrade_waits = False
        """The next request is an upgrade, unread: give the socket back."""
        self._limits = limits
        self._closed = False
        self._detached = False
        self._peer_left = False
        self._raw = False
        self._pending = False
        self._body: ChunkFollower | int | None = None
        self._body_deadline = inf
        self._body_is_streamed = False
        self._deadline = trio.current_time() + limits.head_seconds
        """When the current wait ends for good: idle, head or body. Never while a response is awaited."""
        self._wait_scope: trio.CancelScope | None = None
        self._low_water = 1
        self._fruitless: int | None = None
        self._response_begun = False
        self._hold_next = False
        self._held = b""

    # -- what the front does with it -----------------------------------------------------------------------

    async def speaks_http2(self) -> bool:
        """Wait for enough bytes to tell whether the client begins with HTTP/2's preface; then every read is
        raw.

        A client that leaves, or takes too long, is left for the first `receive_some` to notice.
        """
        while True:
            try:
                seen = self._peek(len(HTTP2_PREFACE))
            except trio.BrokenResourceError:
                return False
            if seen == HTTP2_PREFACE:
                self._raw = True
                return True
            if seen is not None and (not seen or not HTTP2_PREFACE.startswith(seen) or self._has_hung_up()):
                return False
            if trio.current_time() >= self._deadline:
                return False
            await self._wait(len(seen) if seen else 0)

    def request_begins(self) -> None:
        """Take note that a request is being answered: no idle deadline runs (HTTP/2 calls it for its
        streams).
        """
        if self._raw:
            self._set_deadline(inf)

    @property
    def body_is_left(self) -> bool:
        """Whether some of the present request's body has not been read."""
        return self._body is not None and not self._raw

    def body_is_streamed(self) -> None:
        """Take note that the body of this request is read as its room wants it: no deadline for the whole."""
        self._body_is_streamed = True

    def has_broken_off(self) -> bool:
        """Tell whether the client has left before the end of the body, though not all of it has been read.

        Not seen of one that has only ended its sending, within a chunked body.
        """
        if self._raw or self._closed or self._body is None:
            return False
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        events = sum(each for _, each in poll.poll(0))
        if events & (select.POLLHUP | select.POLLERR):
            return True
        if not events & select.POLLRDHUP or not isinstance(self._body, int):
            return False
        unread = bytearray(4)
        fcntl.ioctl(self.socket, termios.FIONREAD, unread)
        return int.from_bytes(unread, sys.byteorder) < self._body

    def response_is_out(self) -> None:
        """Take note that the last response is in the kernel's hands: the next head may be looked at."""
        self._pending = False
        self._response_begun = False
        self._set_deadline(trio.current_time() + self._limits.idle_seconds)
        if self._wait_scope is not None and self._low_water == ANY_BYTES:
            self._wait_scope.cancel()  # it waits past a pipelined request, whose turn has come

    def end_if_idle(self) -> None:
        """Close unless a request is being read or answered; used when the gateway drains."""
        if self._deadline != inf if self._raw else not self._pending:
            self._set_deadline(-inf)

    def hold_next(self) -> None:
        """Keep the bytes of the next send and put them before those of the one after: head and body in one
        packet.
        """
        self._hold_next = not self._raw

    def detach(self) -> socket.socket:
        """Give up the socket, as it was taken: nothing of the next request consumed, no option changed."""
        self._closed = True
        self._set_low_water(1)
        self._detached = True
        return self.socket

    async def linger(self) -> None:
        """Say the end, and wait for the client to read what was sent and say its own, for a short time."""
        self._closed = True
        if self._peer_left:
            return
        try:
            self.socket.shutdown(socket.SHUT_WR)
            self._set_low_water(1)
            with trio.move_on_after(LINGER_SECONDS):
                left = LINGER_BYTES
                while True:
                    await trio.lowlevel.wait_readable(self.socket)
                    data = self.socket.recv(READ_BYTES)
                    left -= len(data)
                    if not data or left <= 0:
                        return
        except OSError:
            return  # it is gone already

    def close(self) -> None:
        """Close the socket now, unless it was given up."""
        self._closed = True
        if not self._detached:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()

    # -- what hypercorn does with it -----------------------------------------------------------------------

    async def receive_some(self, max_bytes: int = READ_BYTES) -> bytes:
        """Give the next bytes of the current request, or wait for the next one; b"" when the client has left.

        Raises trio.ClosedResourceError when nothing more is to be answered here (an upgrade waits, the client
        was refused, the stream was closed), trio.BrokenResourceError after a reset.
        """
        if self._raw:
            return await self._receive_raw(max_bytes)
        if self._body is not None:
            return await self._receive_body(max_bytes)
        if self._pending:
            await self._wait_until_response_is_out()
            if self._peer_left:
                return b""
        return await self._receive_head()

    async def send_all(self, data: bytes) -> None:
        """Write all of `data`, waiting for a client that reads slowly, up to the stall limit.

        Raises trio.BrokenResourceError when the client has left or reads nothing, trio.ClosedResourceError
        after `aclose`. Cancellation: part of `data` may be out, so the stream is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError
        if self._hold_next:
            self._hold_next = False
            self._held = data
            return
        if self._held:
            data, self._held = self._held + data, b""
        if not data:
            return
        if not data.startswith(b"HTTP/1.1 100 "):
            self._response_begun = True
        try:
            await self._write(data, self._limits.stall_seconds)
        except BaseException:
            await self.aclose()
            raise

    async def send_eof(self) -> None:
        """Do nothing: `linger` says the end, after the client could read."""

    async def aclose(self) -> None:
        """End reading and writing; the socket itself is the front's to close. Never waits."""
        self._closed = True
        if self._wait_scope is not None:
            self._wait_scope.cancel()

    # -- reading -------------------------------------------------------------------------------------------

    async def _receive_head(self) -> bytes:
        seen_bytes = 0
        while True:
            seen = self._peek(self._limits.head_bytes)
            if seen == b"":
                self._peer_left = True
                return b""
            if seen:
                if not seen_bytes and self.requests:
                    self._deadline = trio.current_time() + self._limits.head_seconds
                seen_bytes = len(seen)
                head = await self._examine(seen)
                if head is not None:
                    return self._begin(head)
                if self._has_hung_up():
                    self._peer_left = True  # half a head is all there will be
                    return b""
            if trio.current_time() >= self._deadline:
                if seen_bytes:
                    await self._refuse(408, "the request head took too long")
                await self.aclose()
                raise trio.ClosedResourceError
            await self._wait(seen_bytes)

    async def _examine(self, seen: bytes) -> Head | None:
        """Judge a peeked head; None while it is incomplete."""
        try:
            head = parse_head(seen, self._limits.head_bytes)
        except HeadError as error:
            await self._refuse(*error.args)
        if head is None:
            return None
        if is_upgrade(head):
            self.upgrade_waits = True
            await self.aclose()
            raise trio.ClosedResourceError
        if head.content_length > self._limits.body_bytes:
            await self._refuse(413, f"a request body may have {self._limits.body_bytes} bytes")
        return head

    def _begin(self, head: Head) -> bytes:
        """Consume a head and turn to its body."""
        data = self._consume(head.length)
        self.requests += 1
        self._pending = True
        self._response_begun = False
        self._deadline = inf
        self._body = ChunkFollower() if head.chunked else head.content_length or None
        if self._body is not None:
            self._body_deadline = trio.current_time() + self._limits.body_seconds
            self._body_is_streamed = False
        for name, _ in head.headers:
            if name == "upgrade":
                return _without_upgrade(head)
        return data

    async def _receive_body(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()  # a client that never pauses must not keep the loop to itself
        if self._body_is_streamed:  # its time was ours as long as nobody read
            self._body_deadline = trio.current_time() + self._limits.body_seconds
        while True:
            try:
                data = self._next_of_body(max_bytes)
            except HeadError as error:
                await self._refuse(*error.args)
            if data is not None:
                self._body_deadline += self._limits.body_seconds * len(data) / MIB
                return data
            if trio.current_time() >= self._body_deadline:
                await self._refuse(408, "the request body took too long")
            self._deadline = self._body_deadline
            try:
                await self._wait(0)
            finally:
                self._deadline = inf

    def _next_of_body(self, max_bytes: int) -> bytes | None:
        """Body bytes that are there, b"" when the client has left before its end, None when there are none
        yet.
        """
        body = self._body
        if isinstance(body, ChunkFollower):
            seen = self._peek(max_bytes)
            if not seen:
                self._peer_left = seen == b""
                return seen
            data = self._consume(body.feed(seen))
            self._body = None if body.done else body
        else:
            assert body is not None
            received = self._receive(min(max_bytes, body))
            if not received:
                self._peer_left = received == b""
                return received
            data = received
            self._body = body - len(data) or None
        return data

    async def _receive_raw(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            seen = self._receive(max_bytes)
            if seen is not None:
                self._peer_left = not seen
                return seen
            if trio.current_time() >= self._deadline:
                await self.aclose()
                raise trio.ClosedResourceError
            await self._wait(0)

    async def _wait_until_response_is_out(self) -> None:
        """Return when the response is out, or the client has left (`_peer_left`); what it pipelines stays
        unread.
        """
        unread = 0
        while True:
            await self._wait(unread)
            if not self._awaits_response():
                return
            seen = self._peek(1)
            if seen == b"" or (seen and self._has_hung_up()):
                self._peer_left = True
                return
            unread = ANY_BYTES - 1 if seen else 0

    def _awaits_response(self) -> bool:
        return self._pending

    async def _wait(self, beyond: int) -> None:
        """Wait for more than `beyond` unread bytes, the peer's end, the deadline, or to be told otherwise."""
        if self._closed:
            raise trio.ClosedResourceError
        self._set_low_water(beyond + 1)
        try:
            with trio.CancelScope(deadline=self._deadline) as self._wait_scope:
                if beyond and self._fruitless == beyond:
                    await trio.sleep(PAUSE_SECONDS)
                self._fruitless = beyond
                await trio.lowlevel.wait_readable(self.socket)
        finally:
            self._wait_scope = None
        if self._closed:
            raise trio.ClosedResourceError

    def _peek(self, count: int) -> bytes | None:
        return self._receive(count, socket.MSG_PEEK)

    def _receive(self, count: int, flags: int = 0) -> bytes | None:
        """Read without waiting: bytes, b"" at the end, None when there is nothing yet."""
        if self._closed:
            raise trio.ClosedResourceError
        try:
            return self.socket.recv(count, flags)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self._peer_left = True
            raise trio.BrokenResourceError(str(error)) from error

    def _consume(self, count: int) -> bytes:
        """Read `count` bytes that were seen, so they are there."""
        self._fruitless = None
        self._set_low_water(1)
        data = self._receive(count)
        assert data is not None
        assert len(data) == count
        return data

    def _has_hung_up(self) -> bool:
        """Tell whether the peer's FIN or RST is in, though unread bytes lie before it."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return any(events & _GONE_EVENTS for _, events in poll.poll(0))

    def _set_low_water(self, count: int) -> None:
        if count != self._low_water:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._low_water = count

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline
        if self._wait_scope is not None:
            self._wait_scope.deadline = deadline

    # -- writing -------------------------------------------------------------------------------------------

    async def _write(self, data: bytes, stall_seconds: float) -> None:
        rest = memoryview(data)
        while True:
            try:
                rest = rest[self.socket.send(rest) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._peer_left = True
                raise trio.BrokenResourceError(str(error)) from error
            if not rest:
                return
            with trio.move_on_after(stall_seconds) as scope:
                await trio.lowlevel.wait_writable(self.socket)
            if scope.cancelled_caught:
                raise trio.BrokenResourceError("the client reads nothing")

    async def _refuse(self, status: int, text: str, headers: Headers = ()) -> NoReturn:
        """Answer what cannot be served, unless an answer has begun, and read nothing more."""
        await self.aclose()
        if not self._response_begun:
            try:
                await self._write(error_response(status, f"{text}\n", headers), REFUSAL_SECONDS)
            except trio.BrokenResourceError:
                pass
        raise trio.ClosedResourceError


def _without_upgrade(head: Head) -> bytes:
    """The head anew, without an offer to speak another protocol, which is thereby declined (RFC 9110, 7.8).

    Left in, h11 would hold the connection in suspense, and hypercorn would take up h2c.
    """
    lines = [f"{head.method} {head.target} HTTP/{head.version[0]}.{head.version[1]}"]
    for name, value in head.headers:
        if name == "connection":
            kept = [
                token.strip()
                for token in value.split(",")
                if token.strip().lower() in {"close", "keep-alive"}
            ]
            if kept:
                lines.append(f"connection: {', '.join(kept)}")
        elif name not in {"upgrade", "http2-settings"}:
            lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
