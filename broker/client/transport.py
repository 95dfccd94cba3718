"""One connection: dialled, shaken hands on, spoken over, ended. On trio-websocket.

Owns the stream, the handshake with its deadline, the two pumps, the pings, and the closing handshake. Knows
nothing of attempts and pauses: `hold` returns how a connection ended, or raises ConnectError when there was
none. Its peer is `party_socket`, which it asks for messages to send and gives those that come.

trio-websocket is used with care where it leaves things open: a stream that ends during the handshake leaves
it waiting, a refusal and a broken protocol are raised from its reading task, and a ping that comes after our
Close is such a break. `hold` hears of each, and the stream is closed in every case.
"""

import math
import os
import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

import h11
import trio
import trio_websocket
import wsproto.utilities

from broker.client.addresses import Endpoint
from broker.client.errors import ConnectError, ConnectTimeout, Refused

__all__ = ["Ending", "Owner", "Plan", "dial", "hold"]

#: What the answer to a handshake may have in all, a refusal's body included.
HANDSHAKE_BYTES_MAX: Final = 2**18

_RECEIVE_BYTES: Final = 2**16

#: Pings without a Pong that may be under way: a server may leave some unanswered while it does not read.
_PINGS_MAX: Final = 8

#: Codes that trio-websocket gives without a Close of the server: broken frames, and text that is none.
_OWN_VERDICTS: Final = (1002, 1007)

_BROKEN: Final = (wsproto.utilities.ProtocolError, h11.ProtocolError)


@dataclass(frozen=True, slots=True)
class Ending:
    """How an open connection ended. 1006: without a Close; `reason` then says why in our own words."""

    code: int
    reason: str
    was_clean: bool
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What one attempt needs to know. Times in seconds."""

    url: str
    endpoint: Endpoint
    protocols: Sequence[str]
    headers: Mapping[str, str]
    ssl_context: ssl.SSLContext | None
    connect_timeout: float
    close_timeout: float
    ping_interval: float
    ping_timeout: float
    message_bytes_max: int


class Owner(Protocol):
    """What a connection asks of the socket that it belongs to."""

    def opened(self, url: str, subprotocol: str | None) -> None:
        """The handshake has succeeded."""

    async def deliver(self, message: str | bytes) -> None:
        """Take a message that has come; waits while too many are unread."""

    async def wait_outgoing(self) -> bool:
        """Wait for a message to send; False when there will be none any more for this connection."""

    def take_outgoing(self) -> str | bytes | None:
        """The next message to send; from now on it is nobody's."""

    async def wait_close_order(self) -> tuple[int, str]:
        """Wait until the connection is to be closed; gives code and reason."""


async def dial(endpoint: Endpoint, context: ssl.SSLContext | None) -> trio.abc.Stream:
    """A stream to the endpoint, with TLS if it is secure. Raises ConnectError."""
    try:
        stream: trio.abc.Stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    except OSError as error:
        raise _unreachable(endpoint, error) from error
    if not endpoint.secure:
        return stream
    tls = trio.SSLStream(
        stream,
        context or ssl.create_default_context(),
        server_hostname=endpoint.host,
        https_compatible=True,
    )
    try:
        await tls.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        await trio.aclose_forcefully(tls)
        reason = getattr(error.__cause__ or error, "verify_message", None) or error.__cause__ or error
        raise ConnectError(
            endpoint.shown,
            f"no TLS: {reason}",
            'if there is none on that port, say so by protocol="ws" (or "http")',
        ) from error
    except BaseException:
        await trio.aclose_forcefully(tls)
        raise
    return tls


def _unreachable(endpoint: Endpoint, error: OSError) -> ConnectError:
    """An error of the system in words; trio's own has those of each address tried as a group beneath it."""
    causes = error.__cause__.exceptions if isinstance(error.__cause__, ExceptionGroup) else [error]
    first = causes[0]
    remedy = ""
    if isinstance(first, ConnectionRefusedError):
        remedy = f"does the broker run, and on port {endpoint.port}?"
    if isinstance(first, OSError) and first.errno is not None and not isinstance(first, socket.gaierror):
        reason = os.strerror(first.errno)  # trio's own text repeats the address
    else:
        reason = getattr(first, "strerror", None) or str(first)
    return ConnectError(endpoint.shown, f"cannot connect to {endpoint.authority}: {reason}", remedy)


class WatchedStream(trio.abc.Stream):
    """A stream that knows how long its reader has heard nothing, and that the other side has ended.

    Until `handshake_over` it also keeps what has come.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._waiting_since: float | None = None
        self.ended = trio.Event()
        self.head: bytearray | None = bytearray()

    def handshake_over(self) -> None:
        """What came is not needed any more."""
        self.head = None

    def silence(self) -> float:
        """For how many seconds the reader has waited for a byte; 0 while it does not wait."""
        return 0.0 if self._waiting_since is None else trio.current_time() - self._waiting_since

    @property
    def reading(self) -> bool:
        """Whether somebody waits for what comes."""
        return self._waiting_since is not None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        self._waiting_since = trio.current_time()
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            self.ended.set()
            raise
        finally:
            self._waiting_since = None
        if not data:
            self.ended.set()
        elif self.head is not None:
            self.head += data
            if len(self.head) > HANDSHAKE_BYTES_MAX:
                self.ended.set()
                raise trio.BrokenResourceError("the answer to the handshake does not end")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def hold(plan: Plan, owner: Owner) -> Ending:
    """Connect, and be connected until that ends.

    Raises ConnectError if there is no open connection within `connect_timeout`, or at all. Cancellation
    closes the stream without a closing handshake: the server sees 1006.
    """
    with trio.move_on_after(plan.connect_timeout) as handshake:
        stream = WatchedStream(await dial(plan.endpoint, plan.ssl_context))
        try:
            return await _speak(plan, owner, stream, handshake)
        finally:
            # At once: whoever wanted a closing handshake has had it.
            await trio.aclose_forcefully(stream)
    raise ConnectTimeout(plan.endpoint.shown, plan.connect_timeout, "connect_timeout_seconds")


async def _speak(plan: Plan, owner: Owner, stream: WatchedStream, handshake: trio.CancelScope) -> Ending:
    conversation: _Conversation | None = None
    ending: Ending | None = None
    failure: ConnectError | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def give_up_without_answer() -> None:
                await stream.ended.wait()
                if conversation is None:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(give_up_without_answer)
            websocket = await trio_websocket.wrap_client_stream(
                nursery,
                cast("trio.SocketStream", stream),  # it asks for no more than any stream has
                plan.endpoint.authority,
                plan.endpoint.target,
                subprotocols=list(plan.protocols),
                extra_headers=[(n.encode("ascii"), v.encode("latin-1")) for n, v in plan.headers.items()],
                message_queue_size=1,
                max_message_size=plan.message_bytes_max,
                receive_buffer_size=_RECEIVE_BYTES,
            )
            # From here to `opened` nothing yields: what was broken off meanwhile is not opened.
            await trio.lowlevel.checkpoint_if_cancelled()
            conversation = _Conversation(plan, owner, stream, websocket)
            handshake.deadline = math.inf
            ending = await conversation.run()
            nursery.cancel_scope.cancel()
    except* trio_websocket.ConnectionRejected as group:
        rejected = group.exceptions[0]
        assert isinstance(rejected, trio_websocket.ConnectionRejected)
        failure = _refused(plan, rejected.status_code, rejected.headers, rejected.body or b"")
    except* _BROKEN as group:
        # What trio-websocket raises while it tells the other side about a mistake hides the mistake.
        error = group.exceptions[0].__context__ or group.exceptions[0]
        if conversation is None:
            failure = ConnectError(
                plan.endpoint.shown, f"the answer is no WebSocket handshake: {error}", "what listens there?"
            )
        elif ending is None:
            ending = conversation.broken(error)
    if failure is not None:
        raise failure
    if ending is None:
        raise _gone(plan, bytes(stream.head or b""))
    return ending


def _refused(
    plan: Plan, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes | bytearray
) -> Refused:
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    return Refused(plan.endpoint.shown, status, pairs, bytes(body))


def _gone(plan: Plan, head: bytes) -> ConnectError:
    """The other side ended the stream during the handshake: a refusal without a length, or nothing at all."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="GET", target="/", headers=[("Host", "of no interest")]))
    http.send(h11.EndOfMessage())
    status, headers, body = 0, [], bytearray()
    try:
        if head:
            http.receive_data(head)
        http.receive_data(b"")
        while True:
            event = http.next_event()
            if isinstance(event, h11.Response):
                status, headers = event.status_code, list(event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                break
    except h11.RemoteProtocolError:
        pass
    if status:
        return _refused(plan, status, headers, body)
    return ConnectError(
        plan.endpoint.shown,
        "the other side closed the connection during the handshake",
        "what listens there, and does it speak TLS?",
    )


class _Conversation:
    """An open connection: what is said and heard, signs of life, and the end."""

    def __init__(
        self,
        plan: Plan,
        owner: Owner,
        stream: WatchedStream,
        websocket: trio_websocket.WebSocketConnection,
    ) -> None:
        self._plan = plan
        self._owner = owner
        self._stream = stream
        self._websocket = websocket
        self._scope = trio.CancelScope()
        self._drained = trio.Event()
        self._close: tuple[int, str] | None = None
        self._ending: Ending | None = None
        self._heard = 0
        self._lost = False
        self._pings = 0
        self._ponging = False

    async def run(self) -> Ending:
        """Speak until it is over; tells how it ended."""
        self._stream.handshake_over()
        self._owner.opened(self._plan.url, self._websocket.subprotocol)
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear)
                nursery.start_soon(self._say)
                nursery.start_soon(self._keep_alive, nursery)
                nursery.start_soon(self._close_in_order)
        assert self._ending is not None
        return self._ending

    def _end(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
        self._scope.cancel()

    def broken(self, error: BaseException) -> Ending:
        """The ending when the reader has broken off. After our Close that is what became of it."""
        if self._close is not None:
            return Ending(*self._close, was_clean=False, ours=True)
        return Ending(1006, f"broken protocol: {error}", was_clean=False)

    async def _hear(self) -> None:
        try:
            while True:
                await self._owner.deliver(await self._websocket.get_message())
                self._heard += 1
        except trio_websocket.ConnectionClosed:
            pass
        if self._close is not None:
            await trio.sleep_forever()  # our own Close ends the hearing; _close_in_order ends the rest
        closed = self._websocket.closed
        if closed is None or closed.code == 1006:
            self._end(Ending(1006, "the connection was lost", was_clean=False))
            return
        limit = self._plan.message_bytes_max
        reason = closed.reason or ""
        if closed.code == 1009 and reason == f"Exceeded maximum message size: {limit} bytes":
            reason = f"a message was larger than message_bytes_max, {limit:,}"
            self._end(Ending(1009, reason, was_clean=False))
        else:
            self._end(Ending(int(closed.code), reason, was_clean=closed.code not in _OWN_VERDICTS))

    async def _say(self) -> None:
        while await self._owner.wait_outgoing():
            if self._websocket.closed is not None:
                self._lost = True
                return  # what has not been taken stays for the next connection
            message = self._owner.take_outgoing()
            if message is None:
                continue
            try:
                await self._websocket.send_message(message)
            except (trio_websocket.ConnectionClosed, wsproto.utilities.ProtocolError):
                self._lost = True
                return
        self._drained.set()

    async def _close_in_order(self) -> None:
        code, reason = await self._owner.wait_close_order()
        with trio.move_on_after(self._plan.close_timeout) as scope:
            await self._drained.wait()
            self._close = (code, reason)
            await self._websocket.aclose(code, reason or None)
        self._end(Ending(code, reason, was_clean=not scope.cancelled_caught, ours=True))

    async def _keep_alive(self, nursery: trio.Nursery) -> None:
        """Ping after silence, and end the connection after more of it.

        While nobody reads (the inbox is full) silence says nothing about the other side; a Pong then says
        that we are alive, since no ping of the server is answered meanwhile (RFC 6455, section 5.5.3).
        """
        interval = self._plan.ping_interval
        limit = interval + self._plan.ping_timeout
        while True:
            silence, heard = self._stream.silence(), self._heard
            pause = interval - silence
            if not self._stream.reading:
                pause = interval
                if not self._ponging:
                    nursery.start_soon(self._pong)
            elif silence >= limit:
                pause = 0.0
                self._end(Ending(1006, f"no sign of life for {limit:g} s", was_clean=False))
            elif silence >= interval:
                pause = limit - silence
                if self._pings < _PINGS_MAX:
                    nursery.start_soon(self._ping)
            await trio.sleep(pause)
            # Whoever does not read does not hear of the end either, but what is said meets it.
            if self._lost and not self._stream.reading and self._heard == heard:
                self._end(Ending(1006, "the connection was lost", was_clean=False))

    async def _ping(self) -> None:
        self._pings += 1
        try:
            await self._websocket.ping()
        except (trio_websocket.ConnectionClosed, wsproto.utilities.ProtocolError):
            self._lost = True
        finally:
            self._pings -= 1

    async def _pong(self) -> None:
        self._ponging = True
        try:
            await self._websocket.pong()
        except (trio_websocket.ConnectionClosed, wsproto.utilities.ProtocolError):
            self._lost = True
        finally:
            self._ponging = False
