"""Clients at the other end of the lines: one WebSocket each, or one HTTP request.

Owns the client's side of the protocols (wsproto, h11), what has come and has not been looked at, and the
answer to pings and Close frames, as a browser gives it. Must not know rooms. Peers: `_sockets`, `_kit`.
"""

import json
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import h11
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from broker.testing._response import Response
from broker.testing._transcript import brief
from broker.testing.errors import ConnectionOver, Expectation, NothingCame

__all__ = ["PATIENCE_SECONDS", "AsyncClient", "Closed", "Stage", "fetch"]

READ_BYTES: Final = 256 * 1024
#: Says that a Close frame has no code (RFC 6455, section 7.1.5); and such a frame, whose mask is all zeros.
NO_CODE: Final = 1005
EMPTY_CLOSE: Final = b"\x88\x80\0\0\0\0"
#: How long, on the virtual clock, a test waits for something by default.
PATIENCE_SECONDS: Final = 1.0


class Stage(Protocol):
    """What a client needs of the kit."""

    def note(self, text: str) -> None:
        """Add a line to the transcript."""

    def spawn(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run something beside the test."""

    async def wait(self, condition: Callable[[], bool], within: float) -> bool:
        """Let time go on until the condition is true, for so many virtual seconds at most."""

    def failure(self, text: str) -> str:
        """The text of a failure, with the transcript."""


@dataclass(frozen=True, slots=True)
class Closed:
    """How a connection has ended, as its client saw it."""

    code: int
    """Of the Close frame that came; 1005: it had none; 1006: none came."""
    reason: str
    clean: bool
    """Both sides have sent a Close frame."""


class _End:
    """A client's end of a line: what is sent goes out as the line takes it."""

    def __init__(self, sock: socket.socket, stage: Stage) -> None:
        self.socket = sock
        self._stage = stage
        self._outgoing = bytearray()
        self.reads = True
        self._go_on = trio.Event()

    def write(self, data: bytes) -> None:
        """Send, now or as soon as there is room."""
        if self._outgoing:
            self._outgoing += data
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # its end is noticed where it is read
        if sent < len(data):
            self._outgoing += memoryview(data)[sent:]
            self._stage.spawn(self._write_on)

    async def _write_on(self) -> None:
        try:
            while self._outgoing:
                await trio.lowlevel.wait_writable(self.socket)
                del self._outgoing[: self.socket.send(self._outgoing)]
        except (OSError, trio.ClosedResourceError):
            self._outgoing.clear()

    async def read(self) -> bytes:
        """What comes next; empty at the end."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self.socket)
                if self.reads:
                    return self.socket.recv(READ_BYTES)
                self._go_on = trio.Event()
                await self._go_on.wait()
        except (OSError, trio.ClosedResourceError):
            return b""

    def rest(self, reads: bool) -> None:
        """Read nothing more for now, or again."""
        self.reads = reads
        self._go_on.set()

    def close(self) -> None:
        """Close it, without a word."""
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        self._go_on.set()


class AsyncClient:
    """One WebSocket of a test; made by `AsyncKit.connect`.

    What has come waits in `received` until `receive` or `expect` takes it. Pings and the room's Close frame
    are answered as a browser answers them.
    """

    def __init__(self, stage: Stage, sock: socket.socket, name: str) -> None:
        self._stage = stage
        self._end = _End(sock, stage)
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self.name = name
        """What it is called in the transcript."""
        self.id = ""
        """The connection's id, if it was given one."""
        self.subprotocol: str | None = None
        """What was agreed on."""
        self.received: deque[str | bytes] = deque()
        """Messages that have come and that nobody has taken."""
        self.closed: Closed | None = None
        """How it has ended; None while it is open."""
        self._answer: Response | None = None
        self._opened = False
        self._said_close = False
        self._parts: list[Any] = []
        self._refusal: tuple[int, list[tuple[str, str]]] | None = None
        self._body = bytearray()

    def __repr__(self) -> str:
        return f"<client {self.name}: {'open' if self.closed is None else self.closed}>"

    # --- Opening ----------------------------------------------------------------------------------

    async def _open(
        self, host: str, target: str, headers: list[tuple[str, str]], subprotocols: list[str], within: float
    ) -> Response | None:
        """Ask for the upgrade. Gives the answer if it is another than 101."""
        extra = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        request = Request(host=host, target=target, extra_headers=extra, subprotocols=subprotocols)
        self._end.write(self._protocol.send(request))
        self._stage.spawn(self._read)
        came = await self._stage.wait(
            lambda: self._opened or self._answer is not None or self.closed is not None, within
        )
        if not came:
            raise NothingCame(
                self._stage.failure(f"no answer to the upgrade of {self.name} within {within:g} s")
            )
        return self._answer

    async def _read(self) -> None:
        try:
            await self._listen()
        finally:
            self._end.close()

    async def _listen(self) -> None:
        while self.closed is None and self._answer is None:
            data = await self._end.read()
            if not data:
                break
            try:
                self._protocol.receive_data(data)
                for event in self._protocol.events():
                    self._happened(event)
            except RemoteProtocolError as error:
                self._stage.note(f"{self.name} ✗ the gateway broke the protocol: {error}")
                break
        if self._refusal is not None and self._answer is None:
            self._refused()
        if self.closed is None and self._answer is None:
            self._over(Closed(1006, "", False))

    def _happened(self, event: Any) -> None:
        if isinstance(event, Message):
            self._parts.append(event.data)
            if event.message_finished:
                parts, self._parts = self._parts, []
                message = "".join(parts) if isinstance(event, TextMessage) else b"".join(parts)
                self.received.append(message)
                self._stage.note(f"{self.name} ◀ {brief(message)}")
        elif isinstance(event, AcceptConnection):
            self._opened = True
            self.subprotocol = event.subprotocol
        elif isinstance(event, Ping):
            self._end.write(self._protocol.send(event.response()))
        elif isinstance(event, CloseConnection):
            if not self._said_close:
                self._end.write(self._protocol.send(event.response()))
            self._over(Closed(int(event.code), event.reason or "", True))
        elif isinstance(event, RejectConnection):
            named = [(bytes(n).decode().lower(), bytes(v).decode("latin-1")) for n, v in event.headers]
            self._refusal = (event.status_code, named)
            if not event.has_body:
                self._refused()
        elif isinstance(event, RejectData):
            self._body += event.data
            if event.body_finished:
                self._refused()

    def _refused(self) -> None:
        assert self._refusal is not None
        status, headers = self._refusal
        self._answer = Response(status, tuple(headers), bytes(self._body))

    def _over(self, closed: Closed) -> None:
        self.closed = closed
        self._stage.note(f"{self.name} ◀ closed: {closed.code} {closed.reason}".rstrip())

    # --- What a test does -------------------------------------------------------------------------

    def send(self, message: str | bytes | Any) -> None:
        """Send a message: text, bytes, or anything else as JSON. Returns at once.

        Raises:
            ConnectionOver: The connection is closed.
        """
        self._require_open()
        if not isinstance(message, str | bytes | bytearray | memoryview):
            message = json.dumps(message)
        self._stage.note(f"{self.name} ▶ {brief(message)}")
        event = TextMessage(message) if isinstance(message, str) else BytesMessage(bytes(message))
        self._end.write(self._protocol.send(event))

    async def receive(self, within: float = PATIENCE_SECONDS) -> str | bytes:
        """Give the next message, waiting for it up to `within` virtual seconds.

        Raises:
            NothingCame: Nothing has come until then.
            ConnectionOver: The connection was closed before.
        """
        await self._stage.wait(lambda: bool(self.received or self.closed), within)
        if self.received:
            return self.received.popleft()
        self._require_open()
        raise NothingCame(
            self._stage.failure(f"{self.name} waits for a message, and none came within {within:g} s")
        )

    async def receive_json(self, within: float = PATIENCE_SECONDS) -> Any:
        """Give the next message, read as JSON. As `receive`."""
        return json.loads(await self.receive(within))

    async def expect(self, *messages: Any, within: float = PATIENCE_SECONDS) -> None:
        """Take as many messages as are given here, and see that they are these.

        One that is neither text nor bytes is compared with what came as JSON.

        Raises:
            Expectation: Another message has come, or none.
        """
        for message in messages:
            await self._stage.wait(lambda: bool(self.received or self.closed), within)
            if not self.received:
                text = f"{self.name} expects {brief(message)}, and "
                if self.closed is not None:
                    text += f"was closed with {self.closed.code} {self.closed.reason}".rstrip()
                    raise ConnectionOver(self._stage.failure(text), self.closed.code, self.closed.reason)
                raise NothingCame(self._stage.failure(f"{text}nothing came within {within:g} s"))
            came = self.received.popleft()
            if not _same(message, came):
                raise Expectation(
                    self._stage.failure(f"{self.name} expects {brief(message)}, and {brief(came)} came")
                )

    async def expect_nothing(self, seconds: float = 0.0) -> None:
        """See that no message comes, now or within so many virtual seconds, and that it stays open.

        Raises:
            Expectation: Something has come.
        """
        await self._stage.wait(lambda: bool(self.received or self.closed), seconds)
        if self.received:
            raise Expectation(
                self._stage.failure(f"{self.name} expects nothing, and {brief(self.received[0])} came")
            )
        self._require_open()

    async def expect_close(
        self, code: int | None = None, reason: str | None = None, within: float = PATIENCE_SECONDS
    ) -> Closed:
        """Wait until the connection is closed; with this code and reason, if they are given.

        Raises:
            Expectation: It is open, was closed with another code, or there are messages that nobody took.
        """
        await self._stage.wait(lambda: self.closed is not None, within)
        if self.closed is None:
            raise NothingCame(
                self._stage.failure(f"{self.name} is to be closed, and is open after {within:g} s")
            )
        if self.received:
            raise Expectation(
                self._stage.failure(f"{self.name} is closed, and nobody took {brief(self.received[0])}")
            )
        if (code is not None and code != self.closed.code) or (
            reason is not None and reason != self.closed.reason
        ):
            expected = " ".join(str(each) for each in (code, reason) if each is not None)
            raise Expectation(
                self._stage.failure(
                    f"{self.name} expects to be closed with {expected}, and it was with"
                    f" {self.closed.code} {self.closed.reason}".rstrip()
                )
            )
        return self.closed

    async def close(
        self, code: int = 1000, reason: str = "", within: float = PATIENCE_SECONDS
    ) -> Closed | None:
        """Send a Close frame, and wait for the room's. Gives what came; None: nothing within the time.

        1005 sends a frame without a code.
        """
        if self.closed is None:
            self._stage.note(f"{self.name} ▶ close: {code} {reason}".rstrip())
            self._said_close = True
            if code == NO_CODE:
                self._end.write(EMPTY_CLOSE)
            else:
                try:
                    self._end.write(self._protocol.send(CloseConnection(code, reason)))
                except LocalProtocolError:
                    pass  # the room's came meanwhile
        await self._stage.wait(lambda: self.closed is not None, within)
        return self.closed

    async def drop(self) -> None:
        """Vanish without a word, as a client does whose machine is switched off and whose TCP says so."""
        if self.closed is None:
            self.closed = Closed(1006, "", False)
            self._stage.note(f"{self.name} ▶ is gone")
        self._end.close()
        await self._stage.wait(lambda: True, 0)

    def stop_reading(self) -> None:
        """Read nothing more, and so answer nothing, until `read_on`."""
        self._stage.note(f"{self.name} ▶ stops reading")
        self._end.rest(False)

    def read_on(self) -> None:
        """Read again."""
        self._stage.note(f"{self.name} ▶ reads on")
        self._end.rest(True)

    def _require_open(self) -> None:
        if self.closed is not None:
            text = f"{self.name} was closed with {self.closed.code} {self.closed.reason}".rstrip()
            raise ConnectionOver(self._stage.failure(text), self.closed.code, self.closed.reason)


def _same(expected: Any, came: str | bytes) -> bool:
    if isinstance(expected, str | bytes):
        return expected == came
    try:
        return bool(json.loads(came) == expected)
    except ValueError:
        return False


async def fetch(
    stage: Stage,
    sock: socket.socket,
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]],
    body: bytes,
    within: float,
) -> Response:
    """Make one HTTP request on a line of its own, and read the answer to its end."""
    end = _End(sock, stage)
    protocol = h11.Connection(h11.CLIENT)
    given = [(name, value) for name, value in headers]
    data = protocol.send(h11.Request(method=method, target=target, headers=given)) or b""
    data += (protocol.send(h11.Data(body)) or b"") if body else b""
    data += protocol.send(h11.EndOfMessage()) or b""
    end.write(data)
    done = False
    status = 0
    named: list[tuple[str, str]] = []
    parts = bytearray()
    problem = ""

    async def read() -> None:
        nonlocal done, status, problem
        try:
            while not done:
                event = protocol.next_event()
                if event is h11.NEED_DATA:
                    protocol.receive_data(await end.read())
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    named.extend((n.decode().lower(), v.decode("latin-1")) for n, v in event.headers)
                elif isinstance(event, h11.Data):
                    parts.extend(event.data)
                elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    done = True
        except h11.RemoteProtocolError as error:
            problem = str(error)
            done = True

    stage.spawn(read)
    try:
        await stage.wait(lambda: done, within)
    finally:
        end.close()
    if not done or problem or not status:
        why = problem or ("the connection ended" if done else f"none came within {within:g} s")
        raise NothingCame(stage.failure(f"{method} {target} has no whole answer: {why}"))
    return Response(status, tuple(named), bytes(parts))


def header_list(headers: Mapping[str, str] | None) -> list[tuple[str, str]]:
    """Headers as pairs."""
    return list((headers or {}).items())
