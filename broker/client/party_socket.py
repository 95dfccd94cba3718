"""`PartySocket`: a WebSocket to a room that comes back by itself.

Owns the running of it: one task per socket, in a nursery of its own inside `async with`, that does what the
`Lifecycle` says, and the waiting of everybody else. Its peers are the pure parts (`options`, `lifecycle`,
`buffers`) and `transport`, which is one connection.

Where the state changes: methods of the user change it at once and then break off what the task waits for, by
its cancel scope or by the close order; the task alone changes it for what happens on the network. After every
wait the task looks at the state anew.
"""

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, Self, Unpack

import trio

from broker.client.addresses import endpoint_of, parameters_of, url_of
from broker.client.asking import checked_close, resolve_protocols, resolve_query
from broker.client.buffers import Closed, Event, Inbox, Opened, SendBuffer
from broker.client.errors import ConnectError, Refused, RetriesExhausted, SocketClosed
from broker.client.http import RESPONSE_BYTES_MAX, TIMEOUT_SECONDS, FetchResponse, fetch
from broker.client.lifecycle import Lifecycle, State
from broker.client.options import AddressOptions, Options, SocketOptions
from broker.client.transport import Ending, Plan, hold
from hibernation.outgoing import frame_data

__all__ = ["PartySocket"]

log: Final = logging.getLogger("broker.client")


_HTTP: Final[dict[str, Literal["http", "https"]]] = {"ws": "http", "wss": "https"}


class PartySocket:
    """A WebSocket to a room, which reconnects by itself and keeps its id meanwhile.

        async with PartySocket("127.0.0.1:1999", "lobby", query={"team": "red"}) as socket:
            await socket.send("hello")
            async for message in socket:
                print(message)

    `host` is a name or address with its port, or a whole URL (`ws://HOST/party/ROOM`), which then stands for
    the room too. The options are listed in the reference (docs/reference/client.md).

    Entering starts to connect and does not wait for it; what is sent meanwhile is kept, up to bounds. Leaving
    closes, with 1000 if nothing else was said before. All methods belong to the trio run that entered it.

    Raises AddressError, SettingError or TypeError for arguments that are wrong.
    """

    def __init__(self, host: str = "", room: str | None = None, **options: Unpack[SocketOptions]) -> None:
        self._options = Options.of(host, room, options)
        self._life = Lifecycle(self._options.backoff, start_closed=self._options.start_closed)
        self._outgoing = SendBuffer(self._options.buffer_messages_max, self._options.buffer_bytes_max)
        self._inbox = Inbox(self._options.inbox_messages_max, self._options.inbox_bytes_max)
        self._nursery_manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._left = False
        #: What the task waits in, so that an order can break it off.
        self._round = trio.CancelScope()
        #: Code and reason for the open connection, and up to where what was sent before belongs to it.
        self._close_order: tuple[int, str] | None = None
        self._seal: int | None = None
        self._due = 0.0
        self._over: Exception | None = None
        self._last_error: ConnectError | None = None
        self._last_close: Closed | None = None
        self._url = ""
        self._subprotocol: str | None = None
        # Who waits: for any change of state; for something in the inbox; for room in it; for something to
        # send; for room in the send buffer.
        self._changed = trio.lowlevel.ParkingLot()
        self._arrived = trio.lowlevel.ParkingLot()
        self._read = trio.lowlevel.ParkingLot()
        self._added = trio.lowlevel.ParkingLot()
        self._taken = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        where = self._options.room_url if self._options.can_connect else "nowhere yet"
        return f"<PartySocket {self.id!r} to {where}, {self.state}>"

    # --- Facts

    @property
    def id(self) -> str:
        """The connection's id, sent as `_pk`: the same at every reconnect."""
        assert self._options.id is not None
        return self._options.id

    @property
    def room(self) -> str | None:
        """The room's id as it was given; None with a URL or base_path."""
        return self._options.room

    @property
    def host(self) -> str:
        """The host as it was given."""
        return self._options.host

    @property
    def room_url(self) -> str:
        """The address of the room, without a query. Raises AddressError if host or room are missing."""
        return self._options.room_url

    @property
    def url(self) -> str:
        """The address that was connected to last, query included; "" before there was a connection."""
        return self._url

    @property
    def subprotocol(self) -> str | None:
        """What the server chose of `protocols`, at the last connection."""
        return self._subprotocol

    @property
    def state(self) -> State:
        """What it does: State.CONNECTING, OPEN, WAITING (for the next attempt), CLOSING, CLOSED."""
        return self._life.state

    @property
    def retries(self) -> int:
        """Attempts since the last stable connection, the first one not counted."""
        return self._life.retries

    @property
    def unsent(self) -> int:
        """How many messages no connection has been given yet."""
        return len(self._outgoing)

    @property
    def last_error(self) -> ConnectError | None:
        """Why the last attempt failed; None after one that did not."""
        return self._last_error

    @property
    def last_close(self) -> Closed | None:
        """How the last open connection ended; None while there was none."""
        return self._last_close

    # --- Start and end

    async def __aenter__(self) -> Self:
        if self._nursery_manager is not None:
            raise RuntimeError("a PartySocket is entered once; make another one")
        if self._is(State.CONNECTING):
            self._options.room_url  # noqa: B018 - raises if there is nowhere to go
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        self._nursery.start_soon(self._run, name=f"PartySocket {self.id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._nursery is not None
        try:
            if not isinstance(error, trio.Cancelled):
                await self.close()  # noqa: ASYNC102 - it has a deadline, and is to be cancelled
        except trio.Cancelled:
            if error is None:
                raise
            # What the block has raised goes on, a group with a cancellation in it perhaps.
        finally:
            self._left = True
            self._finish(SocketClosed(1000, ""))
            self._nursery.cancel_scope.cancel()
            # The block's error goes on by itself: given to the nursery it would come back in a group. The
            # task raises what is no Exception alone, and its cancellation where that comes from outside.
            try:
                await self._nursery_manager.__aexit__(None, None, None)  # noqa: ASYNC102 - it is cancelled
            except BaseException as raised:
                if error is None or not _is_cancellation(raised):
                    raise

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close for good. If it is open, what was sent before goes out first.

        Returns when the other side has answered, or `close_timeout_seconds` have passed. Does nothing to a
        socket that is closed. Messages that have come by then can still be received, and what was not sent
        can be had by `take_unsent`. `reconnect` opens it again.

        Args:
            code: 1000 to 1003, 1007 to 1014, or 3000 to 4999.
            reason: At most 123 bytes of UTF-8.

        Raises ValueError for a code or reason that cannot be sent.

        Cancellation ends the connection at once; the server sees 1006.
        """
        order = checked_close(code, reason)
        self._check_entered()
        if self._is(State.CLOSED):
            await trio.lowlevel.checkpoint()
            return
        self._life.close()
        self._obey(order)
        if self._is(State.CLOSED):
            self._finish(SocketClosed(code, reason))
        await self._until_closed()

    async def _until_closed(self) -> None:
        try:
            await trio.lowlevel.checkpoint()
            while self._is(State.CLOSING):
                await self._changed.park()
        except BaseException:
            if self._is(State.CLOSING):
                self._round.cancel()
            raise

    def reconnect(self, code: int = 1000, reason: str = "") -> None:
        """Connect anew, at once, with the properties as they are now; the count of attempts begins anew.

        An open connection is closed first, with `code` and `reason`, after what was sent before this call;
        what is sent after it goes to the next one. Returns before any of that has happened.

        Raises AddressError if host or room are missing, ValueError as `close` does.
        """
        order = checked_close(code, reason)
        self._check_entered(still=True)
        self._options.room_url  # noqa: B018 - raises if there is nowhere to go
        self._life.reconnect()
        self._over = None
        self._obey(order)

    def _obey(self, order: tuple[int, str]) -> None:
        """Make the task look at what has been asked of it."""
        if self._is(State.CLOSING):
            if self._close_order is None:
                self._close_order = order
                self._seal = self._outgoing.end
        else:
            self._round.cancel()
        self._tell()

    def update_properties(
        self, host: str | None = None, room: str | None = None, **changes: Unpack[AddressOptions]
    ) -> None:
        """Change where the next connection goes, and what it says: call `reconnect` for it to be now.

        What is not given stays, the id too. What waits to be sent goes to the next connection, wherever that
        leads. Raises as the constructor does; then nothing has changed.
        """
        self._options = self._options.updated(host, room, changes)

    async def wait_open(self) -> None:
        """Wait until it is open. Raises what `receive` raises when there is no way to that any more."""
        self._check_entered()
        await trio.lowlevel.checkpoint()
        while not self._is(State.OPEN):
            self._raise_if_over()
            await self._changed.park()

    # --- Messages

    async def send(self, message: Any) -> None:
        """Send text (str), bytes, or anything else as JSON. Returns when the message is in the send buffer.

        While it is open and the buffer is full this waits for room: so a sender is as slow as the network.
        While it is not open a full buffer is an error. Each message is given to one connection, once: when
        that breaks, what it was given may or may not have arrived, and is not sent again.

        Raises:
            SendBufferFull: It is not open and the buffer is full, or the message could never fit.
            SocketClosed: It has been closed, or is closing.
            ConnectError, RetriesExhausted: It has failed for good.
            TypeError, ValueError: Nothing that can be sent.

        Cancellation: the message has not been sent, and never will be.
        """
        data = frame_data(message)
        await trio.lowlevel.checkpoint_if_cancelled()
        while (
            self._is(State.OPEN) and not self._outgoing.has_room(data) and self._outgoing.can_ever_hold(data)
        ):
            await self._taken.park()
        self._add(data)
        await trio.lowlevel.cancel_shielded_checkpoint()

    def send_nowait(self, message: Any) -> None:
        """The same without ever waiting: a full buffer raises SendBufferFull, also while it is open."""
        self._add(frame_data(message))

    def _add(self, data: str | bytes) -> None:
        self._check_entered()
        self._raise_if_over()
        if self._is(State.CLOSING) and not self._life.again:
            raise SocketClosed(*(self._close_order or (1000, "")))
        self._outgoing.append(data)
        self._added.unpark_all()

    def take_unsent(self) -> list[str | bytes]:
        """Take back everything that no connection has been given yet, in order."""
        found = self._outgoing.take_all()
        self._taken.unpark_all()
        return found

    async def receive(self) -> str | bytes:
        """The next message, over any number of reconnects. Events that come before it are dropped.

        Raises:
            SocketClosed: It has been closed, and everything that had come was received.
            ConnectError, RetriesExhausted: It has failed for good.

        Cancellation loses nothing.
        """
        while True:
            event = await self._next()
            if isinstance(event, str | bytes):
                return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | bytes:
        try:
            return await self.receive()
        except SocketClosed:
            raise StopAsyncIteration from None

    def events(self) -> AsyncIterator[Event]:
        """Messages, and Opened and Closed between them, in the order of what happened.

        `async for message in socket` is the same without the events. Both end when the socket has been
        closed, and raise as `receive` does when it has failed. Of unread events the last 64 are kept.
        """
        return _Events(self._next)

    async def _next(self) -> Event:
        self._check_entered()
        await trio.lowlevel.checkpoint()
        while (event := self._inbox.take()) is None:
            self._raise_if_over()
            await self._arrived.park()
        self._read.unpark_all()
        return event

    # --- HTTP

    async def fetch(
        self,
        path: str = "",
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        query: Any = None,
        json: Any = None,
        data: str | bytes | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
    ) -> FetchResponse:
        """Ask the same room by HTTP: the socket's host, room, query and headers, and `path` below the room.

        The socket's `path` does not count here, `_pk` is not sent, and it need not be open. Otherwise as
        `broker.client.fetch`.
        """
        options = self._options
        own = await resolve_query(options)
        return await fetch(
            options.host,
            options.room,
            party=options.party,
            path=path,
            base_path=options.base_path,
            prefix=options.prefix,
            protocol=None if options.protocol is None else _HTTP[options.protocol],
            query=[*own, *parameters_of(query)],
            method=method,
            headers={**(options.headers or {}), **(headers or {})},
            json=json,
            data=data,
            timeout_seconds=timeout_seconds,
            response_bytes_max=response_bytes_max,
            ssl_context=options.ssl_context,
        )

    # --- The task

    async def _run(self) -> None:
        """Do what the state says, for as long as the nursery lasts."""
        try:
            while True:
                with trio.CancelScope() as self._round:
                    state = self._life.state
                    if state is State.CLOSED:
                        await self._changed.park()
                    elif state is State.WAITING:
                        await trio.sleep_until(self._due)
                        await trio.lowlevel.checkpoint_if_cancelled()
                        self._life.due()
                        self._tell()
                    else:
                        await self._attempt()
                if self._is(State.CLOSING):
                    # Our own closing was broken off, by the cancellation of who waited for it.
                    self._closed(Ending(*(self._close_order or (1000, "")), was_clean=False, ours=True))
        finally:
            self._life.give_up()
            self._finish(SocketClosed(1006, "cancelled"))

    async def _attempt(self) -> None:
        """One connection, from the question for its query to its end."""
        outcome: Ending | Exception
        try:
            outcome = await hold(await self._plan(), _Owner(self))
        except Exception as error:  # noqa: BLE001 - told to whoever uses the socket, and not to the nursery
            outcome = error
        # An order may have come while the stream was being closed: then it decides, and not the outcome.
        await trio.lowlevel.checkpoint_if_cancelled()
        if isinstance(outcome, Ending):
            self._closed(outcome)
        elif isinstance(outcome, ConnectError) and self._is(State.CONNECTING):
            self._failed(outcome)
        else:
            self._life.give_up()
            self._finish(outcome)

    async def _plan(self) -> Plan:
        """What the next attempt needs, with functions asked."""
        options = self._options
        query = await resolve_query(options)
        url = url_of(options.room_url, [("_pk", self.id), *query])
        return Plan(
            url=url,
            endpoint=endpoint_of(url),
            protocols=await resolve_protocols(options),
            headers=dict(options.headers or {}),
            ssl_context=options.ssl_context,
            connect_timeout=options.connect_timeout_seconds,
            close_timeout=options.close_timeout_seconds,
            ping_interval=options.ping_interval_seconds,
            ping_timeout=options.ping_timeout_seconds,
            message_bytes_max=options.message_bytes_max,
        )

    def _opened(self, url: str, subprotocol: str | None) -> None:
        retries = self._life.retries
        self._life.opened(trio.current_time())
        if self._last_error is not None:
            log.info("%s: open again", self._options.room_url)
        self._last_error = None
        self._url = url
        self._subprotocol = subprotocol
        self._inbox.put(Opened(url, subprotocol, retries))
        self._tell()

    def _failed(self, error: ConnectError) -> None:
        first = self._last_error is None
        self._last_error = error
        retry = self._judge(self._options.should_retry, error)
        if retry is None:
            return
        retries = self._life.retries
        after = error.retry_after_seconds if isinstance(error, Refused) else 0.0
        pause = self._life.failed(random.random(), retry=retry, retry_after=after)
        if pause is not None:
            self._due = trio.current_time() + pause
            # A warning once for each time that it is gone: that is news, and how often it was tried is not.
            log.log(logging.WARNING if first else logging.INFO, "%s; trying again in %.1f s", error, pause)
            self._tell()
        elif retry:
            self._finish(RetriesExhausted(retries + 1, error), error)
        else:
            self._finish(error)

    def _closed(self, ending: Ending) -> None:
        self._close_order = self._seal = None
        pause: float | None
        if self._is(State.CLOSING):
            self._life.over()
            pause = 0.0 if self._is(State.CONNECTING) else None
            failure: Exception = SocketClosed(ending.code, ending.reason)
        else:
            retry = self._judge(self._options.should_reconnect, ending.code, ending.reason)
            if retry is None:
                self._record(ending, None)
                return
            tries = self._life.retries + 1
            pause = self._life.ended(trio.current_time(), random.random(), retry=retry)
            text = f"closed with {ending.code} {ending.reason}".rstrip()
            failure = RetriesExhausted(tries, text) if retry else SocketClosed(ending.code, ending.reason)
            if pause is not None:
                self._due = trio.current_time() + pause
                log.info("%s: %s; trying again in %.1f s", self._options.room_url, text, pause)
        self._record(ending, pause)
        if pause is None:
            self._finish(failure)
        else:
            self._tell()

    def _record(self, ending: Ending, pause: float | None) -> None:
        self._last_close = Closed(ending.code, ending.reason, ending.was_clean, pause)
        self._inbox.put(self._last_close)

    def _judge(self, predicate: Callable[..., bool], *arguments: Any) -> bool | None:
        """What a predicate of the user says; None if it raised, which ends the socket."""
        try:
            return bool(predicate(*arguments))
        except Exception as error:  # noqa: BLE001 - told to whoever uses the socket
            self._life.give_up()
            self._finish(error)
            return None

    def _finish(self, error: Exception, cause: BaseException | None = None) -> None:
        """There will be no further attempt; from now on everybody who waits is told why."""
        if cause is not None:
            error.__cause__ = cause
        if self._over is None:
            self._over = error
        self._tell()

    def _raise_if_over(self) -> None:
        if self._over is not None:
            # The same error may be raised many times; it is to show where it was met, not where before.
            raise self._over.with_traceback(None)

    def _is(self, state: State) -> bool:
        """Whether it is in that state now; what a method has found out before may have changed since."""
        return self._life.state is state

    def _check_entered(self, *, still: bool = False) -> None:
        if self._nursery is None or (still and self._left):
            raise RuntimeError("a PartySocket is used inside of `async with PartySocket(...) as socket:`")

    async def _wait_begun(self) -> None:
        """Wait until a socket that is over has been told to reconnect."""
        while self._over is not None:
            await self._changed.park()

    def _tell(self) -> None:
        """Wake everybody: the state is another one."""
        for lot in (self._changed, self._arrived, self._read, self._added, self._taken):
            lot.unpark_all()


def _is_cancellation(error: BaseException) -> bool:
    """Whether it is a Cancelled, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


class _Events(AsyncIterator[Event]):
    """What `PartySocket.events` gives. No generator, so that a loop may be left early without cleaning up."""

    def __init__(self, following: Callable[[], Awaitable[Event]]) -> None:
        self._following = following

    async def __anext__(self) -> Event:
        try:
            return await self._following()
        except SocketClosed:
            raise StopAsyncIteration from None


class _Owner:
    """What a connection sees of its socket: `transport.Owner`."""

    def __init__(self, socket: PartySocket) -> None:
        self._socket = socket

    def opened(self, url: str, subprotocol: str | None) -> None:
        self._socket._opened(url, subprotocol)

    async def deliver(self, message: str | bytes) -> None:
        if self._socket._inbox.closed:
            return
        while self._socket._inbox.full:
            await self._socket._read.park()
        self._socket._inbox.put(message)
        self._socket._arrived.unpark_all()

    async def wait_outgoing(self) -> bool:
        socket = self._socket
        while True:
            if socket._seal is not None and socket._outgoing.taken >= socket._seal:
                return False
            if len(socket._outgoing):
                return True
            await socket._added.park()

    def take_outgoing(self) -> str | bytes | None:
        message = self._socket._outgoing.take(self._socket._seal)
        self._socket._taken.unpark_all()
        return message

    async def wait_close_order(self) -> tuple[int, str]:
        while self._socket._close_order is None:
            await self._socket._changed.park()
        return self._socket._close_order
