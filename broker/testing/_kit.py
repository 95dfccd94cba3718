"""The kit: an app running in memory on a virtual clock, for tests on trio.

Owns the test's view of it all: who connects, what time it is, what dies, what room code has raised, and the
transcript. Peers: `_machine` (the processes), `_client`, `_time`; `_plain` has the same without async.
"""

import contextlib
import functools
import json as json_module
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar
from urllib.parse import quote, urlencode

import trio
from trio.testing import MockClock

from broker.app import app_folder, load_app, read_env
from broker.server import Server
from broker.testing._client import PATIENCE_SECONDS, AsyncClient, fetch
from broker.testing._machine import Machine
from broker.testing._response import Response
from broker.testing._time import START, Time, clock_of_this_run, seeded
from broker.testing._transcript import Transcript
from broker.testing.errors import HookFailed, Refused
from hibernation.cells import Cell
from hibernation.party import MAIN, Party, make_parties
from hibernation.settings import Settings
from hibernation.wire import read_card
from storage.values import decode

__all__ = ["App", "AsyncKit", "Errors", "Query", "RoomView", "virtual"]

#: What a kit is made of: classes, or what the command line takes.
App = type[Server] | str | os.PathLike[str]

#: Parameters of an address: by name, of several values in their order, or as they stand behind the "?".
Query = Mapping[str, str | Sequence[str]] | str

HOST = "broker.test"
#: What a start, or a death with its recovery, may take on the virtual clock.
RECOVERY_SECONDS = 60.0

P = ParamSpec("P")
T = TypeVar("T")


class Errors(list[BaseException]):
    """What room code has raised in a block of `expect_error`."""

    @property
    def only(self) -> BaseException:
        """The one that there is.

        Raises:
            AssertionError: There are none, or several.
        """
        assert len(self) == 1, f"{len(self)} errors: {list(self)}"
        return self[0]


class RoomView:
    """A room as a test sees it: looking at it wakes nothing."""

    def __init__(self, machine: Machine, key: str) -> None:
        self._machine = machine
        self.key = key

    @property
    def awake(self) -> bool:
        """Whether there is an object of it now."""
        cell = self._machine.host._pool.cells.get(self.key)
        return cell is not None and cell.server is not None

    @property
    def constructions(self) -> int:
        """How many objects there have been of it, since the kit was started."""
        return self._machine.constructions(self.key)

    @property
    def server(self) -> Any:
        """The object that there is now, or None. To look at fields, not to call hooks."""
        cell = self._machine.host._pool.cells.get(self.key)
        return None if cell is None else cell.server

    @property
    def connections(self) -> list[str]:
        """Ids of the open connections, in the order in which they were accepted."""
        rows, _ = self._machine.gateway.effects.ask(self.key, "list", [[], [], []])
        return [_id_of(row) for row in rows]

    @property
    def storage(self) -> dict[str, Any]:
        """What is committed of its storage, by key."""
        found = self._machine.host.read_range(
            self.key, start=None, start_after=None, end=None, prefix=None, reverse=False, limit=None
        )
        return {name: decode(blob) for name, blob in found}


class AsyncKit:
    """Runs an app in memory on a virtual clock, as an async context manager on trio.

        @virtual
        async def test_counter():
            async with AsyncKit(Counter) as kit:
                anna = await kit.connect("room", id="anna")
                anna.send("inc")
                await anna.expect("1")

    Args:
        app: `Server` subclasses, or one `module`, `module:Class` or `path/to/file.py`.
        evict_between_turns: Give each turn an object of its own, so that what hides in fields shows itself.
        seed: Decides what is free: the order of tasks, and `random`. None: another one each time; it is shown
            with each failure.
        start: What the wall clock shows at first; aware.
        env: For `room.env`, over the environment of the process.
        dev: As `broker dev` runs an app: tracebacks go to clients.
        follow_time: Have the modules of the app follow the virtual clock, where they use `time.time` and
            `time.monotonic`.
        settings: Of the instance, as keywords: `turn_timeout=5`.
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
        if start.tzinfo is None:
            raise ValueError("start is a time without a zone: give datetime(..., tzinfo=UTC)")
        parties, environment = _load(app, env or {})
        self._seed = secrets.randbits(32) if seed is None else seed
        self._transcript = Transcript(self._seed)
        self._start = start
        self._names = {name: party.name for party in parties for name in (party.name, *party.aliases)}
        self._modules = [sys.modules[party.cls.__module__] for party in parties] if follow_time else []
        self._machine = Machine(
            parties,
            environment,
            Settings(**{"durability": "os", **settings}),
            dev=dev,
            failed=self._failed,
            evict_between_turns=evict_between_turns,
        )
        self._errors: list[tuple[str, BaseException]] = []
        self._expected: list[tuple[type[BaseException], str | None, Errors]] = []
        self._clients = 0
        self._nursery: trio.Nursery
        self._time: Time
        self._context: contextlib.AbstractAsyncContextManager[Self] | None = None

    # --- Start and end ----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[Self]:
        self._time = Time(clock_of_this_run(), self._start)
        with self._time.in_force(self._modules), seeded(self._seed):
            async with trio.open_nursery() as self._nursery:
                try:
                    await self._nursery.start(self._machine.run)
                    await self._until_ready("start")
                    yield self
                finally:
                    self._nursery.cancel_scope.cancel()

    async def __aenter__(self) -> Self:
        self._context = self._running()
        return await self._context.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._context is not None
        mine: BaseException | None = None
        if error is None:
            try:
                await self._time.settle()  # noqa: ASYNC102 - it takes no time
                self._raise_errors()
                self._require_deaths()
            except BaseException as failed:  # noqa: BLE001 - raised below, when everything has ended
                kind, error, trace = type(failed), failed, failed.__traceback__
                mine = failed
        elif isinstance(error, Exception) and self.transcript not in str(error):
            error.add_note(self.transcript)
        try:
            swallowed = await self._context.__aexit__(kind, error, trace)  # noqa: ASYNC102 - as above
        except BaseExceptionGroup as group:
            if group.exceptions != (error,):
                raise
            if mine is None:
                return False  # as the test has raised it, without the nursery's wrapping
        else:
            if mine is None:
                return swallowed
        raise mine

    def _require_deaths(self) -> None:
        """A death that was ordered and did not come has tested nothing."""
        for point in self._machine.ordered:
            raise AssertionError(
                self.failure(f"nothing has come to the point {point!r}: no process died there")
            )

    async def _until_ready(self, what: str) -> None:
        if not await self._time.advance(RECOVERY_SECONDS, lambda: self._machine.ready):
            raise AssertionError(self.failure(f"no {what} within {RECOVERY_SECONDS:g} s"))

    # --- What goes wrong --------------------------------------------------------------------------

    def _failed(self, text: str, cell: Cell | None, error: BaseException, more: Mapping[str, Any]) -> None:
        if cell is not None:
            where = cell.key
        else:
            where = f"{more.get('party', '')}/{more.get('room', '')}"
        self.note(f"{where} ✗ {text}: {type(error).__name__}: {error}")
        for kind, pattern, errors in reversed(self._expected):
            if isinstance(error, kind) and (pattern is None or re.search(pattern, str(error))):
                errors.append(error)
                return
        self._errors.append((f"{where}: {text}", error))

    def _raise_errors(self) -> None:
        """Raise what room code has raised and the test does not expect."""
        if not self._errors:
            return
        failures, self._errors = self._errors, []
        text = "\n".join(f"{where}: {type(error).__name__}: {error}" for where, error in failures)
        raise HookFailed(self.failure(text), [error for _, error in failures]) from failures[0][1]

    @contextlib.contextmanager
    def expect_error(
        self, kind: type[BaseException] = Exception, match: str | None = None
    ) -> Iterator[Errors]:
        """Room code raises this in the block, and that does not fail the test. What has been raised is in
        the list that this gives.

        Args:
            kind: The exception's class.
            match: A regular expression that its text has to match somewhere.

        Raises:
            AssertionError: Nothing of the kind was raised in the block.
        """
        errors = Errors()
        entry = (kind, match, errors)
        self._expected.append(entry)
        try:
            yield errors
        finally:
            self._expected.remove(entry)
        if not errors:
            raise AssertionError(self.failure(f"no hook has raised {kind.__name__} in this block"))

    # --- What clients need (`_client.Stage`) ------------------------------------------------------

    def note(self, text: str) -> None:
        """Add a line to the transcript."""
        self._transcript.add(self._time.elapsed, text)

    def spawn(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run something beside the test, for as long as the kit runs."""
        self._nursery.start_soon(function, *arguments)

    async def wait(self, condition: Callable[[], bool], within: float) -> bool:
        """Let time go on until the condition is true, for so many virtual seconds at most."""
        result = await self._time.advance(within, lambda: condition() or bool(self._errors))
        self._raise_errors()
        return result

    def failure(self, text: str) -> str:
        """The text of a failure, with the transcript."""
        under_way = self._under_way()
        return "\n".join([text, *under_way, "", self._transcript.show()])

    def _under_way(self) -> list[str]:
        """What rooms are doing, in words: why something may not have come."""
        return [
            f"{worker.cell.key} is still in {worker.hook}, which waits for something"
            for worker in self._machine.host._pool._workers
            if worker.cell is not None and worker.running is not None
        ]

    # --- Clients ----------------------------------------------------------------------------------

    async def connect(
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
    ) -> AsyncClient:
        """Open a WebSocket to a room. When this returns the handshake is done, and so is all that followed
        from it at once.

        Args:
            room: The room's id.
            party: Which kind of room.
            id: The connection's id, sent as `_pk`; without it the broker gives one.
            path: Below the room, beginning with "/".
            query: Further parameters of the address.
            headers: Further headers of the upgrade.
            subprotocols: What the client offers.
            within: How long the answer may take, in virtual seconds.

        Raises:
            Refused: The answer is another than 101.
        """
        address, key = self.address(room, party, path), self._key(room, party)
        self._clients += 1
        client = AsyncClient(self, self._machine.backlog.dial(), id or f"client {self._clients}")
        client.id = id or ""
        self.note(f"{client.name} ▶ connects to {key}{path}")
        parts = [] if id is None else [urlencode({"_pk": id}, quote_via=quote)]
        target = _with_query(address, *parts, _encoded(query))
        answer = await client._open(HOST, target, list((headers or {}).items()), list(subprotocols), within)
        if answer is not None:
            self.note(f"{client.name} ◀ refused: {answer.status}")
            raise Refused(answer)
        return client

    async def request(
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
        """Make an HTTP request, and read the answer to its end.

        Args:
            method: "GET", "POST", …
            path: The whole path: `kit.address("room")`, or "/party/room".
            query: Parameters of the address.
            headers: Further headers.
            json: Sent as JSON, if it is given.
            data: The body otherwise.
            within: How long the answer may take, in virtual seconds.

        Raises:
            NothingCame: There is no whole answer.
        """
        given = dict(headers or {})
        body = data.encode() if isinstance(data, str) else data
        if json is not None:
            body = json_module.dumps(json).encode()
            given.setdefault("content-type", "application/json")
        fields = {"host": HOST, "connection": "close", **given}
        if body or method in ("POST", "PUT", "PATCH"):
            fields["content-length"] = str(len(body))
        target = _with_query(path, _encoded(query))
        self.note(f"{method} {target} ▶")
        answer = await fetch(self, self._machine.backlog.dial(), method, target, fields.items(), body, within)
        self.note(f"{method} {target} ◀ {answer.status}")
        return answer

    def address(self, room: str, party: str = MAIN, path: str = "") -> str:
        """The path of a room: "/party/ID", or "/parties/NAME/ID"."""
        self._key(room, party)
        base = "/party/" if party == MAIN else f"/parties/{quote(party, safe='')}/"
        return base + quote(room, safe="") + path

    def _key(self, room: str, party: str) -> str:
        if party not in self._names:
            raise ValueError(f'there is no party "{party}"; there are {", ".join(sorted(self._names))}')
        return f"{self._names[party]}/{room}"

    # --- Time -------------------------------------------------------------------------------------

    async def advance(self, seconds: float) -> None:
        """Let so many seconds pass; what becomes due on the way is run in order, and at its time."""
        await self.wait(lambda: False, seconds)

    async def settle(self) -> None:
        """Let happen what happens without time passing."""
        await self.wait(lambda: True, 0)

    @property
    def elapsed(self) -> float:
        """Virtual seconds since the kit was started."""
        return self._time.elapsed

    def now(self) -> float:
        """The virtual wall clock, in seconds since 1970."""
        return self._time.now()

    # --- Rooms ------------------------------------------------------------------------------------

    def room(self, room: str, party: str = MAIN) -> RoomView:
        """Look at a room, without waking it."""
        return RoomView(self._machine, self._key(room, party))

    async def evict(self, room: str, party: str = MAIN) -> bool:
        """Have a room's object go, as memory that runs short would have it (S6). False: there was none.

        Raises:
            RuntimeError: The room is in a turn, or streams an answer.
        """
        await self.settle()
        pool, key = self._machine.host._pool, self._key(room, party)
        cell = pool.cells.get(key)
        if cell is None or cell.server is None:
            return False
        if cell.running or cell.scheduled or cell.streams:
            raise RuntimeError(self.failure(f"{key} cannot be evicted: it has something to do"))
        pool._evict(cell)
        self.note(f"{key} is evicted")
        return True

    async def ask(self, command: str, **parameters: Any) -> Any:
        """Give a command as the command line does: "broadcast", "send", "kick", "connections", "rooms",
        "stats", "explain"… with its parameters by name. None of them wakes a room.

        Raises:
            Exception: The command cannot be carried out; the text says why.
        """
        await self.settle()
        answer = await self._machine.gateway._admin.command({"command": command, **parameters})
        self._machine.gateway._end_of_tick()
        await self.settle()
        return answer

    # --- Deaths -----------------------------------------------------------------------------------

    async def crash_host(self, at: str | None = None) -> None:
        """Kill the process that runs room code, as kill -9 does; another takes its place.

        Args:
            at: None: here and now, and when this returns the next host serves. "before_commit",
                "after_commit": when a turn next commits, before it or after it, and before its effects leave.
        """
        await self.settle()
        if at is None:
            self.note("the host is killed")
            self._machine.kill_host()
            await self._recovered()
        else:
            self._machine.kill_host_at(at)
            self.note(f"the host will be killed: {at}")

    async def crash_gateway(self, at: str | int | None = None) -> None:
        """Kill the process that owns the sockets, as kill -9 does; another takes its place. WebSockets stay.

        Args:
            at: None: here and now, and when this returns the next gateway serves. Otherwise when it next
                carries out effects: "before_effects"; after so many of them (0, 1, …), before the next;
                "mid_frame", with half of the first frame sent; "after_effects", before the host is told.
        """
        await self.settle()
        if at is None:
            self.note("the gateway is killed")
            self._machine.kill_gateway()
            await self._recovered()
        else:
            self._machine.kill_gateway_at(at)
            self.note(f"the gateway will be killed: {at}")

    async def reload(self, *app: App) -> None:
        """Replace the code, as `broker reload` does: turns end within `drain`, sockets stay.

        Args:
            app: As for the kit; nothing: the same code, on new objects.
        """
        await self.settle()
        parties = self._machine.parties
        if app:
            parties, _ = _load(app, {})
        self.note("the code is replaced")
        self._machine.replace_host(parties)
        self._names = {name: party.name for party in parties for name in (party.name, *party.aliases)}
        await self._recovered()

    async def _recovered(self) -> None:
        await self._time.settle()
        await self._until_ready("recovery")
        await self.settle()

    @property
    def ordered(self) -> list[str | int]:
        """Points at which a process is still to die."""
        return self._machine.ordered

    def cancel_orders(self) -> None:
        """No process is to die any more at a point that was ordered."""
        self._machine.cancel_orders()

    @property
    def deaths(self) -> int:
        """How many processes were killed."""
        return self._machine.deaths

    @property
    def seed(self) -> int:
        """What decided what was free."""
        return self._seed

    @property
    def transcript(self) -> str:
        """What has happened so far."""
        return self._transcript.show()


def virtual(test: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """Makes a plain test of an async one: it runs on trio, on a virtual clock, with no plug-in."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return trio.run(functools.partial(test, *args, **kwargs), clock=MockClock(autojump_threshold=0))

    return run


def _load(app: Sequence[App], env: Mapping[str, str]) -> tuple[list[Party], dict[str, str]]:
    """The parties of an app, and what its rooms see as `env`."""
    classes = [each for each in app if isinstance(each, type)]
    named = [os.fspath(each) for each in app if not isinstance(each, type)]
    if len(named) == 1 and not classes:
        return load_app(named[0]), read_env(app_folder(named[0]), env, os.environ)
    if named or not classes:
        raise TypeError("a kit takes Server subclasses, or one module, module:Class or path/to/file.py")
    return make_parties(classes), {**os.environ, **env}


def _encoded(query: Query | None) -> str:
    if query is None or isinstance(query, str):
        return query or ""
    return urlencode(query, doseq=True, quote_via=quote)


def _with_query(path: str, *parts: str) -> str:
    query = "&".join(part for part in parts if part)
    return f"{path}?{query}" if query else path


def _id_of(row: Sequence[Any]) -> str:
    return read_card(row[2])[0]
