"""The kit for tests without async: the same calls, each of which returns when it has been done.

Owns a thread in which trio runs on a virtual clock, and the way of each call there and back. What a method
means is said in `_kit` and `_client`.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import trio
from trio.testing import MockClock

from broker.testing._client import PATIENCE_SECONDS, AsyncClient, Closed
from broker.testing._kit import App, AsyncKit, Errors, Query, RoomView
from broker.testing._response import Response
from broker.testing._time import START
from hibernation.party import MAIN

__all__ = ["Client", "Kit"]

T = TypeVar("T")

Call = Callable[..., Any]


class Kit:
    """Runs an app in memory on a virtual clock, as a context manager.

        def test_counter():
            with Kit(Counter) as kit:
                anna = kit.connect("room", id="anna")
                anna.send("inc")
                anna.expect("1")

    Arguments as of `AsyncKit`. The app runs in a thread of its own. Time stands still, and nothing happens,
    while the test does not call anything.
    """

    def __init__(
        self,
        *app: App,
        evict_between_turns: bool = False,
        seed: int | None = None,
        start: datetime = START,
        env: Mapping[str, str] | None = None,
        dev: bool = False,
        follow_time: bool = True,
        **settings: Any,
    ) -> None:
        self._kit = AsyncKit(
            *app,
            evict_between_turns=evict_between_turns,
            seed=seed,
            start=start,
            env=env,
            dev=dev,
            follow_time=follow_time,
            **settings,
        )
        self._thread = threading.Thread(target=self._run, name="broker.testing", daemon=True)
        self._started = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._end: trio.Event
        self._failure: BaseException | None = None
        self._error: BaseException | None = None

    # --- Start and end ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._main, clock=MockClock())
        except BaseException as error:  # noqa: BLE001 - raised again where the test is
            self._failure = error
        finally:
            self._token = None
            self._started.set()

    async def _main(self) -> None:
        self._end = trio.Event()
        await self._kit.__aenter__()
        try:
            self._token = trio.lowlevel.current_trio_token()
            self._started.set()
            await self._end.wait()
        finally:
            error = self._error
            await self._kit.__aexit__(  # noqa: ASYNC102 - nothing cancels it from outside
                None if error is None else type(error), error, None if error is None else error.__traceback__
            )

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        token = self._token
        if token is not None:
            self._error = error
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._end.set)
        self._thread.join()
        if self._failure is not None and self._failure is not error:
            raise self._failure

    def _call(self, call: Call, *arguments: Any, **named: Any) -> Any:
        """Have something done in the kit's thread."""

        async def work() -> Any:
            return await call(*arguments, **named)

        return trio.from_thread.run(work, trio_token=self._running_token())

    def _look(self, look: Callable[[], T]) -> T:
        """Have something read in the kit's thread."""
        return trio.from_thread.run_sync(look, trio_token=self._running_token())

    def _running_token(self) -> trio.lowlevel.TrioToken:
        token = self._token
        if token is None:
            if self._failure is not None:
                raise self._failure
            raise RuntimeError("the kit is not running: use it in its `with` block")
        return token

    # --- Clients ----------------------------------------------------------------------------------

    def connect(
        self,
        room: str,
        *,
        party: str = MAIN,
        id: str | None = None,  # noqa: A002 - as it is called everywhere
        path: str = "",
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        subprotocols: Sequence[str] = (),
        within: float = PATIENCE_SECONDS,
    ) -> "Client":
        """Open a WebSocket to a room. As `AsyncKit.connect`."""
        client = self._call(
            self._kit.connect,
            room,
            party=party,
            id=id,
            path=path,
            query=query,
            headers=headers,
            subprotocols=subprotocols,
            within=within,
        )
        return Client(self, client)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        data: str | bytes = b"",
        within: float = PATIENCE_SECONDS,
    ) -> Response:
        """Make an HTTP request, and read the answer to its end. As `AsyncKit.request`."""
        answer: Response = self._call(
            self._kit.request,
            method,
            path,
            query=query,
            headers=headers,
            json=json,
            data=data,
            within=within,
        )
        return answer

    def address(self, room: str, party: str = MAIN, path: str = "") -> str:
        """The path of a room: "/party/ID", or "/parties/NAME/ID"."""
        return self._kit.address(room, party, path)

    # --- Time -------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass; what becomes due on the way is run in order, and at its time."""
        self._call(self._kit.advance, seconds)

    def settle(self) -> None:
        """Let happen what happens without time passing."""
        self._call(self._kit.settle)

    @property
    def elapsed(self) -> float:
        """Virtual seconds since the kit was started."""
        return self._kit.elapsed

    def now(self) -> float:
        """The virtual wall clock, in seconds since 1970."""
        return self._kit.now()

    # --- Rooms ------------------------------------------------------------------------------------

    def room(self, room: str, party: str = MAIN) -> RoomView:
        """Look at a room, without waking it."""
        return _PlainRoomView(self, self._kit.room(room, party))

    def evict(self, room: str, party: str = MAIN) -> bool:
        """Have a room's object go. As `AsyncKit.evict`."""
        evicted: bool = self._call(self._kit.evict, room, party)
        return evicted

    def ask(self, command: str, **parameters: Any) -> Any:
        """Give a command as the command line does. As `AsyncKit.ask`."""
        return self._call(self._kit.ask, command, **parameters)

    # --- What goes wrong --------------------------------------------------------------------------

    @contextlib.contextmanager
    def expect_error(
        self, kind: type[BaseException] = Exception, match: str | None = None
    ) -> Iterator[Errors]:
        """Room code raises this in the block, and that does not fail the test. As `AsyncKit.expect_error`."""
        with self._kit.expect_error(kind, match) as errors:
            yield errors
            self.settle()

    def crash_host(self, at: str | None = None) -> None:
        """Kill the process that runs room code. As `AsyncKit.crash_host`."""
        self._call(self._kit.crash_host, at)

    def crash_gateway(self, at: str | int | None = None) -> None:
        """Kill the process that owns the sockets. As `AsyncKit.crash_gateway`."""
        self._call(self._kit.crash_gateway, at)

    def reload(self, *app: App) -> None:
        """Replace the code. As `AsyncKit.reload`."""
        self._call(self._kit.reload, *app)

    @property
    def ordered(self) -> list[str | int]:
        """Points at which a process is still to die."""
        return self._kit.ordered

    def cancel_orders(self) -> None:
        """No process is to die any more at a point that was ordered."""
        self._look(self._kit.cancel_orders)

    @property
    def deaths(self) -> int:
        """How many processes were killed."""
        return self._kit.deaths

    @property
    def seed(self) -> int:
        """What decided what was free."""
        return self._kit.seed

    @property
    def transcript(self) -> str:
        """What has happened so far."""
        return self._kit.transcript


class _PlainRoomView(RoomView):
    """A room, looked at in the kit's thread."""

    def __init__(self, kit: Kit, view: RoomView) -> None:
        self._kit = kit
        self._view = view
        self.key = view.key

    @property
    def awake(self) -> bool:
        return self._kit._look(lambda: self._view.awake)

    @property
    def constructions(self) -> int:
        return self._kit._look(lambda: self._view.constructions)

    @property
    def server(self) -> Any:
        return self._kit._look(lambda: self._view.server)

    @property
    def connections(self) -> list[str]:
        return self._kit._look(lambda: self._view.connections)

    @property
    def storage(self) -> dict[str, Any]:
        return self._kit._look(lambda: self._view.storage)


class Client:
    """One WebSocket of a test; made by `Kit.connect`. As `AsyncClient`."""

    def __init__(self, kit: Kit, client: AsyncClient) -> None:
        self._kit = kit
        self._client = client

    def __repr__(self) -> str:
        return repr(self._client)

    @property
    def name(self) -> str:
        """What it is called in the transcript."""
        return self._client.name

    @property
    def id(self) -> str:
        """The connection's id, if it was given one."""
        return self._client.id

    @property
    def subprotocol(self) -> str | None:
        """What was agreed on."""
        return self._client.subprotocol

    @property
    def received(self) -> deque[str | bytes]:
        """Messages that have come and that nobody has taken."""
        return self._client.received

    @property
    def closed(self) -> Closed | None:
        """How it has ended; None while it is open."""
        return self._client.closed

    def send(self, message: str | bytes | Any) -> None:
        """Send a message: text, bytes, or anything else as JSON; returns when the room has had its turn, if
        that waits for nothing.
        """

        async def work() -> None:
            self._client.send(message)
            await self._kit._kit.settle()

        self._kit._call(work)

    def receive(self, within: float = PATIENCE_SECONDS) -> str | bytes:
        """Give the next message, waiting for it up to `within` virtual seconds."""
        message: str | bytes = self._kit._call(self._client.receive, within)
        return message

    def receive_json(self, within: float = PATIENCE_SECONDS) -> Any:
        """Give the next message, read as JSON."""
        return self._kit._call(self._client.receive_json, within)

    def expect(self, *messages: Any, within: float = PATIENCE_SECONDS) -> None:
        """Take as many messages as are given here, and see that they are these."""
        self._kit._call(self._client.expect, *messages, within=within)

    def expect_nothing(self, seconds: float = 0.0) -> None:
        """See that no message comes, now or within so many virtual seconds, and that it stays open."""
        self._kit._call(self._client.expect_nothing, seconds)

    def expect_close(
        self, code: int | None = None, reason: str | None = None, within: float = PATIENCE_SECONDS
    ) -> Closed:
        """Wait until the connection is closed; with this code and reason, if they are given."""
        closed: Closed = self._kit._call(self._client.expect_close, code, reason, within)
        return closed

    def close(self, code: int = 1000, reason: str = "", within: float = PATIENCE_SECONDS) -> Closed | None:
        """Send a Close frame, and wait for the room's."""
        closed: Closed | None = self._kit._call(self._client.close, code, reason, within)
        return closed

    def drop(self) -> None:
        """Vanish without a word."""
        self._kit._call(self._client.drop)

    def stop_reading(self) -> None:
        """Read nothing more, and so answer nothing, until `read_on`."""
        self._kit._look(self._client.stop_reading)

    def read_on(self) -> None:
        """Read again."""
        self._kit._look(self._client.read_on)
