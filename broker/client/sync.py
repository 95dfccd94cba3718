"""`connect`: the same socket for scripts, threads and the interactive interpreter, without `async`.

Owns one thread per socket, in which trio runs with one PartySocket, and the two ways across: calls go in by
trio's token, what is received comes out through a short queue. A call that is interrupted (Ctrl-C) is
cancelled on the other side, and nothing that had come is lost with it. The thread is a daemon: a program that
ends without closing ends.
"""

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, Unpack, cast

import trio

from broker.client.buffers import Closed, Event
from broker.client.errors import ConnectError, SocketClosed
from broker.client.http import FetchResponse
from broker.client.lifecycle import State
from broker.client.options import AddressOptions, SocketOptions
from broker.client.party_socket import PartySocket

__all__ = ["OPEN_TIMEOUT_SECONDS", "BlockingSocket", "connect"]

OPEN_TIMEOUT_SECONDS: Final = 10.0

#: What waits between the threads, beside the inbox: enough to spare most messages a change of threads.
_QUEUE_MAX: Final = 64

T = TypeVar("T")


def connect(
    host: str,
    room: str | None = None,
    *,
    timeout: float | None = OPEN_TIMEOUT_SECONDS,
    **options: Unpack[SocketOptions],
) -> "BlockingSocket":
    """Connect to a room and wait until that is done, at most `timeout` seconds (None: as long as it takes).

        with broker.client.connect("127.0.0.1:1999", "lobby") as socket:
            socket.send("hello")
            print(socket.receive(timeout=5))

    Takes what PartySocket takes, a whole URL too. The socket reconnects by itself. Use it in a `with` block,
    or close it.

    Raises:
        TimeoutError: It was not open in time; the text says what the last attempt came to.
        ConnectError, RetriesExhausted: It has failed for good.
        RuntimeError: Called in a task of trio, which it would block: use PartySocket there.
        AddressError, SettingError, TypeError: An argument is wrong.
    """
    if trio.lowlevel.in_trio_run() and trio.lowlevel.in_trio_task():
        raise RuntimeError("connect() would block trio's loop: use `async with PartySocket(...)`")
    inner = PartySocket(host, room, **options)
    begins = inner.state is State.CONNECTING
    if begins:
        inner.room_url  # noqa: B018 - raises here, and not in the thread, if there is nowhere to go
    socket = BlockingSocket(inner)
    try:
        if begins:
            socket.wait_open(timeout)
    except BaseException:
        socket.close()
        raise
    return socket


async def _at_once(function: Callable[[], T]) -> T:
    """Something that waits for nothing, as a call that could."""
    await trio.lowlevel.checkpoint_if_cancelled()
    return function()


class _Call(Generic[T]):
    """One call from outside, under way in the thread of trio."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self._function = function
        self._scope = trio.CancelScope()
        self._done = threading.Event()
        self._value: T | None = None
        self._error: Exception | None = None

    async def run(self) -> None:
        try:
            with self._scope:
                self._value = await self._function()
                self._done.set()
            self.fail(TimeoutError("not done in time"))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            self.fail(error)
        finally:
            self.fail(SocketClosed(1000, ""))

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if not self._done.is_set():
            self._error = error
            self._done.set()

    def cancel(self) -> None:
        self._scope.cancel()

    def wait(self, timeout: float | None) -> bool:
        return self._done.wait(timeout)

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast(T, self._value)


class BlockingSocket:
    """A PartySocket whose methods block, made by `connect`. Any thread may use it, several at once too.

    What its methods do, and raise, is what those of PartySocket do. `timeout` is in seconds everywhere, None
    without end; TimeoutError says that it has passed, and then nothing has been done.
    """

    def __init__(self, socket: PartySocket) -> None:
        self._socket = socket
        self._lock = threading.Condition()
        self._queue: deque[Event] = deque()
        self._end: Exception | None = None
        self._calls: set[_Call[Any]] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._taken = trio.Event()
        self._stop = trio.Event()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._thread_main, args=(started,), name=f"broker.client {socket.id}", daemon=True
        )
        self._thread.start()
        started.wait()

    def __repr__(self) -> str:
        return repr(self._socket).replace("PartySocket", "BlockingSocket", 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Facts

    @property
    def id(self) -> str:
        """As PartySocket.id."""
        return self._socket.id

    @property
    def room_url(self) -> str:
        """As PartySocket.room_url."""
        return self._socket.room_url

    @property
    def url(self) -> str:
        """As PartySocket.url."""
        return self._socket.url

    @property
    def subprotocol(self) -> str | None:
        """As PartySocket.subprotocol."""
        return self._socket.subprotocol

    @property
    def state(self) -> State:
        """As PartySocket.state."""
        return self._socket.state

    @property
    def unsent(self) -> int:
        """As PartySocket.unsent."""
        return self._socket.unsent

    @property
    def last_error(self) -> ConnectError | None:
        """As PartySocket.last_error."""
        return self._socket.last_error

    @property
    def last_close(self) -> Closed | None:
        """As PartySocket.last_close."""
        return self._socket.last_close

    # --- What it does

    def send(self, message: Any, timeout: float | None = None) -> None:
        """Send text, bytes, or anything else as JSON; waits while the send buffer is full and it is open."""
        self._call(lambda: self._socket.send(message), timeout)

    def receive(self, timeout: float | None = None) -> str | bytes:
        """The next message; events before it are dropped."""
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            event = self._next(deadline)
            if isinstance(event, str | bytes):
                return event

    def __iter__(self) -> Iterator[str | bytes]:
        for event in self.events():
            if isinstance(event, str | bytes):
                yield event

    def events(self) -> Iterator[Event]:
        """Messages, and Opened and Closed between them."""
        while True:
            try:
                event = self._next(None)
            except SocketClosed:
                return
            yield event

    def wait_open(self, timeout: float | None = None) -> None:
        """Wait until it is open."""
        try:
            self._call(self._socket.wait_open, timeout)
        except TimeoutError:
            last = self._socket.last_error
            raise TimeoutError(
                f"not open within {timeout:g} s: {last or f'{self._socket.room_url} has not answered'}"
            ) from last

    def reconnect(self, code: int = 1000, reason: str = "") -> None:
        """Connect anew, at once."""

        def order() -> None:
            self._socket.reconnect(code, reason)
            with self._lock:
                self._end = None

        self._call(partial(_at_once, order), None)

    def update_properties(
        self, host: str | None = None, room: str | None = None, **changes: Unpack[AddressOptions]
    ) -> None:
        """Change where the next connection goes."""

        def change() -> None:
            self._socket.update_properties(host, room, **changes)

        self._call(partial(_at_once, change), None)

    def take_unsent(self) -> list[str | bytes]:
        """Take back what no connection has been given yet."""
        return self._call(partial(_at_once, self._socket.take_unsent), None)

    def fetch(self, path: str = "", **options: Any) -> FetchResponse:
        """Ask the same room by HTTP, with the arguments of PartySocket.fetch."""
        return self._call(lambda: self._socket.fetch(path, **options), None)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close it for good and end its thread. What had come can still be received. Twice does nothing."""
        with self._lock:
            alive = self._token is not None
        if alive:
            try:
                self._call(lambda: self._socket.close(code, reason), None)
            except SocketClosed:
                pass  # the thread has just ended
            finally:
                self._in_trio(self._stop.set)
            self._thread.join()

    # --- The way in

    def _call(self, function: Callable[[], Awaitable[T]], timeout: float | None) -> T:
        call = _Call(function)
        with self._lock:
            if self._token is None:
                raise SocketClosed(1000, "")
            self._calls.add(call)
        try:
            self._in_trio(self._start, call)
            if not call.wait(timeout):
                self._in_trio(call.cancel)
                call.wait(None)  # it may have come to its end just now
        except BaseException:
            self._in_trio(call.cancel)
            raise
        finally:
            with self._lock:
                self._calls.discard(call)
        return call.result()

    def _in_trio(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            if self._token is not None:
                self._token.run_sync_soon(function, *arguments)
        except trio.RunFinishedError:
            pass  # whoever waits has been told

    def _start(self, call: _Call[Any]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(call.run)

    # --- The way out

    def _next(self, deadline: float | None) -> Event:
        with self._lock:
            while not self._queue:
                if self._end is not None:
                    raise self._end.with_traceback(None)
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("nothing has come in time")
                self._lock.wait(left)
            event = self._queue.popleft()
            if len(self._queue) == _QUEUE_MAX - 1:
                self._in_trio(self._wake)
            return event

    def _wake(self) -> None:
        self._taken.set()

    async def _pump(self) -> None:
        """Bring what has come to where other threads can take it."""
        while True:
            with self._lock:
                full = len(self._queue) >= _QUEUE_MAX
                if full:
                    self._taken = trio.Event()
            if full:
                await self._taken.wait()
                continue
            try:
                event = await self._socket._next()
            except Exception as error:  # noqa: BLE001 - told to whoever receives
                with self._lock:
                    self._end = error
                    self._lock.notify_all()
                await self._socket._wait_begun()
                continue
            with self._lock:
                self._queue.append(event)
                self._lock.notify_all()

    # --- The thread

    def _thread_main(self, started: threading.Event) -> None:
        try:
            trio.run(self._main, started)
        finally:
            with self._lock:
                self._token = None
                calls = list(self._calls)
                self._end = self._end or SocketClosed(1000, "")
                self._lock.notify_all()
            for call in calls:
                call.fail(SocketClosed(1000, ""))
            started.set()

    async def _main(self, started: threading.Event) -> None:
        async with self._socket, trio.open_nursery() as nursery:
            self._nursery = nursery
            self._token = trio.lowlevel.current_trio_token()
            started.set()
            nursery.start_soon(self._pump)
            await self._stop.wait()
            nursery.cancel_scope.cancel()
        with self._lock:  # what has not come across yet: it can still be received
            while (event := self._socket._inbox.take()) is not None:
                self._queue.append(event)
