"""The host: the process that runs room code. Owns the rooms that are awake and the turns in progress; owns no
socket of a client. Peers: the gateway at the other end of the link, and the shards in `storage`.

How a message becomes an effect. The worker that waits on the link reads it and puts each event into its
room's cell; ready cells are run one after the other, in the same task, as long as no turn really waits
(`hibernation.suspension`); when one does, another worker of the pool goes on. A turn's result joins `_out`,
or, if anything of its room is not yet on disk, the batch whose commit it must wait for. At the end of the
round the batch goes to the writer thread and `_out` to the gateway, as one message each.

Invariants:
    H1  at most one turn of a room runs at a time, and events of a room start in the order of their arrival
    H2  nothing of a turn is in `_out` before all that the turn wrote, or could have read, is committed
    H3  results of a room leave in the order in which its turns ended
    H4  a cell is in `_cells` while it has events, a running turn, an object in memory, uncommitted writes,
        or connection values that the gateway has not acknowledged; and in `_ready` at most once
    H5  either some worker waits for the link, or one is running, or one has been woken
"""

import os
import random
import socket
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from select import EPOLLIN, EPOLLOUT, epoll
from time import monotonic
from types import CoroutineType
from typing import Any

import trio
from outcome import Value

from hibernation import wire
from hibernation.configuration import HostConfig
from hibernation.errors import TurnTimeout
from hibernation.link import Link, StreamDecoder, encode
from hibernation.logs import get_logger
from hibernation.party import Party
from hibernation.room import Connection, ConnectionContext, Lobby, Room, check_tags
from hibernation.settings import Settings
from hibernation.suspension import watched
from hibernation.watchdog import Watchdog
from storage.shards import Shard, ShardBatch
from storage.writer import Writer

#: Read from the link at once.
READ_BYTES = 256 * 1024
#: Results beyond this, unread by the gateway, stop the host from starting turns.
OUTGOING_BYTES_MAX = 8 * 1024 * 1024
#: Rooms whose last waking is remembered for `broker rooms` and the admin pages.
RECENT_ROOMS = 1024
#: Delays between attempts to start a room whose `__init__` or `on_start` failed (S4).
RETRY_FIRST_SECONDS, RETRY_LAST_SECONDS = 0.1, 10.0
#: Chunks of a streamed response that may be on their way to one client.
STREAM_CHUNKS = 8

log = get_logger("host")


class Kind:
    """A party with everything about it that does not change while the host runs."""

    __slots__ = (
        "cls",
        "evicts_at_once",
        "hibernate",
        "hooks",
        "idle_seconds",
        "message_parameters",
        "name",
        "parameters",
        "settings",
        "starts",
    )

    def __init__(self, party: Party, base: Settings) -> None:
        self.name = party.name
        self.cls = party.cls
        self.hooks = party.hooks
        self.settings = party.settings(base)
        self.hibernate = party.hibernate
        self.idle_seconds = self.settings.idle_seconds
        self.evicts_at_once = self.hibernate and not self.idle_seconds
        self.starts = party.has_on_start
        #: How many arguments each hook takes.
        self.parameters = {name: spec.parameters for name, spec in party.specs.items()}
        self.message_parameters = party.on_message_parameters


class Cell:
    """One room's place in its host: what waits for it, what it has in memory, what of it is not yet on
    disk.
    """

    __slots__ = (
        "connections",
        "edited",
        "events",
        "failures",
        "gate",
        "key",
        "kind",
        "pending",
        "pending_cleared",
        "retry_at",
        "room",
        "running",
        "scheduled",
        "server",
        "shard",
        "streams",
        "used_at",
    )

    def __init__(self, key: str, kind: Kind, shard: int) -> None:
        self.key = key
        self.kind = kind
        self.shard = shard
        self.events: deque[list[Any]] = deque()
        self.running = False
        self.scheduled = False
        self.server: Any = None
        self.room: Room | None = None
        #: Connections that this burst has met, by number; those with staged values outlive the burst.
        self.connections: dict[int, Connection] = {}
        self.edited = 0
        #: Written, not yet committed: key to value, None for deleted.
        self.pending: dict[str, bytes | None] = {}
        self.pending_cleared = False
        #: Number of the batch that holds the newest of them; 0: all is on disk.
        self.gate = 0
        self.failures = 0
        self.retry_at = 0.0
        self.streams = 0
        self.used_at = 0.0


@dataclass(slots=True)
class Batch:
    """What commits together, and the results that leave when it has."""

    number: int
    shards: dict[int, ShardBatch] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    edits: list[tuple[Cell, Connection]] = field(default_factory=list)
    cells: set[Cell] = field(default_factory=set)
    after: list[Callable[[], None]] = field(default_factory=list)


class Worker:
    """One task of the pool."""

    __slots__ = ("cell", "event", "hook", "request", "scope", "started", "task")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.scope = trio.CancelScope()
        self.cell: Cell | None = None
        self.event: list[Any] = []
        self.hook = ""
        self.started = 0.0
        self.request = 0


class Host:
    """See the module. `serve` runs one."""

    def __init__(self, config: HostConfig, parties: list[Party], env: dict[str, str]) -> None:
        self.config = config
        self.settings: Settings = config.settings
        self.env = env
        self._kinds: dict[str, Kind] = {}
        for party in parties:
            kind = Kind(party, config.settings)
            for name in (party.name, *party.aliases):
                self._kinds[name] = kind
        self._parties_described = [party.describe() for party in parties]
        self._shards: dict[int, Shard] = {}
        self._writer: Writer | None = None
        self._socket: socket.socket | None = None
        self._epoll = epoll()
        self._link = Link()
        self._decoder = StreamDecoder()
        self._outgoing = bytearray()
        self._cells: dict[str, Cell] = {}
        self._ready: deque[Cell] = deque()
        self._out: list[Any] = []
        self._out_edits: list[tuple[Cell, Connection]] = []
        self._sent_edits: deque[tuple[int, Cell, Connection]] = deque()
        self._forming = Batch(1)
        self._committing: Batch | None = None
        self._parked: list[Worker] = []
        self._busy: set[Worker] = set()
        self._waiting = False
        self._retiring = False
        self._nursery: trio.Nursery
        self._idle: dict[Cell, None] = {}
        self._retries: set[Cell] = set()
        self._clock_wanted = trio.Event()
        self._questions: dict[int, trio.lowlevel.Task] = {}
        self._question = 0
        self._requests: dict[int, trio.CancelScope | Worker | None] = {}
        self._credits: dict[int, trio.Semaphore] = {}
        self._awake = 0
        self._running_streams = 0
        self.active: Cell | None = None
        self.counters = {
            "wakes": 0,
            "turns": 0,
            "failed_turns": 0,
            "commits": 0,
            "evictions": 0,
        }
        self._recent: dict[str, list[float]] = {}
        self._inline = config.settings.durability == "os"

    # --- Life of the process
    # -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGTERM, or until `retire`; then end every turn, release its effects, and return."""
        for index in self.config.shards:
            self._shards[index] = Shard(self.config.data, index, durability=self.settings.durability)
        self._writer = Writer("shards")
        self._epoll.register(self._writer.fd, EPOLLIN)
        watchdog = Watchdog(self, trio.lowlevel.current_trio_token())
        watchdog.start()
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._watch_signals)
                self._nursery.start_soon(self._keep_connected)
        finally:
            watchdog.stop()
            self._writer.close()
            for shard in self._shards.values():
                shard.close()

    async def _watch_signals(self) -> None:
        import signal

        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                if self._retiring:
                    os._exit(1)
                self._nursery.start_soon(self._retire)

    async def _keep_connected(self) -> None:
        """Find the gateway, serve it, and find the next one if it goes."""
        while not self._retiring:
            if not await self._connect():
                await trio.sleep(0.02)
                continue
            async with trio.open_nursery() as self._turns:
                self._turns.start_soon(self._clock)
                self._turns.start_soon(self._work, Worker())
        self._nursery.cancel_scope.cancel()

    async def _connect(self) -> bool:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        try:
            link.connect(os.fspath(self.config.data / "gateway.sock"))
        except OSError:
            link.close()
            return False
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        hello = encode(
            {
                "role": "host",
                "version": wire.VERSION,
                "index": self.config.index,
                "pid": os.getpid(),
                "incarnation": random.getrandbits(63),
                "shards": list(self.config.shards),
                "shard_count": self.config.shard_count,
                "parties": self._parties_described,
            }
        )
        self._socket = link
        self._link = Link()
        self._decoder = StreamDecoder()
        self._outgoing = bytearray(hello)
        self._epoll.register(link.fileno(), EPOLLIN)
        self._send()
        return True

    def _disconnected(self) -> None:
        """The gateway has gone, and with it whatever waited here: the next one delivers again what was not
        acknowledged.
        """
        if self._socket is None:
            return
        self._epoll.unregister(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._turns.cancel_scope.cancel()
        for cell in list(self._cells.values()):
            cell.events.clear()
        self._cells.clear()
        self._ready.clear()
        self._idle.clear()
        self._retries.clear()
        self._out.clear()
        self._out_edits.clear()
        self._sent_edits.clear()
        self._forming = Batch(self._forming.number)
        self._parked.clear()
        self._busy.clear()
        self._requests.clear()
        self._credits.clear()
        self._questions.clear()
        self._awake = 0
        self._running_streams = 0

    async def _retire(self) -> None:
        """Start no more turns, let those in progress end, release what they staged, and go."""
        self._retiring = True
        self._out.append([wire.RETIRE])
        for cell in self._cells.values():
            if not cell.running:
                cell.events.clear()
        self._ready.clear()
        self._flush()
        with trio.move_on_after(self.settings.drain):
            while self._busy or self._running_streams or self._forming.results or self._committing:
                await trio.sleep(0.01)
        for worker in list(self._busy):
            worker.scope.cancel()
        with trio.move_on_after(5):
            while self._busy or self._committing or self._outgoing or self._out:
                self._flush()
                await trio.sleep(0.005)
        self._nursery.cancel_scope.cancel()

    # --- The pool
    # ----------------------------------------------------------------------------------------------

    async def _work(self, worker: Worker) -> None:
        worker.task = trio.lowlevel.current_task()
        while True:
            with trio.CancelScope() as worker.scope:
                await self._rounds(worker)
                return
            # Only a turn that took too long, or whose client has left, is cancelled from inside (H1: the cell
            # is ours).
            with trio.CancelScope() as worker.scope:
                await self._cancelled(worker)

    async def _rounds(self, worker: Worker) -> None:
        """Run ready rooms; between them be the one that waits for the link, or park while another does."""
        ready = self._ready
        while True:
            while ready and len(self._outgoing) < OUTGOING_BYTES_MAX:
                await self._run(ready.popleft(), worker)
            self._flush()
            if self._waiting:
                self._parked.append(worker)
                try:
                    await trio.lowlevel.wait_task_rescheduled(self._unpark(worker))
                except trio.Cancelled:
                    return
                continue
            self._waiting = True
            try:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            finally:
                self._waiting = False
            self._receive()

    def _unpark(self, worker: Worker) -> Callable[[Any], trio.lowlevel.Abort]:
        def abort(_: Any) -> trio.lowlevel.Abort:
            if worker in self._parked:
                self._parked.remove(worker)
            return trio.lowlevel.Abort.SUCCEEDED

        return abort

    def _activate(self) -> None:
        """Bring one more worker to work."""
        if self._parked:
            worker = self._parked.pop()
            assert worker.task is not None
            trio.lowlevel.reschedule(worker.task)
        else:
            self._turns.start_soon(self._work, Worker())

    def _suspended(self) -> None:
        """A turn begins to wait: somebody else goes on with what is ready, and what has ended leaves now
        (H5).
        """
        if self._ready or not self._waiting:
            self._activate()
        else:
            self._flush()

    def _schedule(self, cell: Cell) -> None:
        if not cell.running and not cell.scheduled and not self._retiring:
            cell.scheduled = True
            self._ready.append(cell)

    # --- One room
    # ----------------------------------------------------------------------------------------------

    async def _run(self, cell: Cell, worker: Worker) -> None:
        """Give a room its turns: construct it if need be, drain its events, let it go."""
        cell.scheduled = False
        cell.running = True
        worker.cell = cell
        self._busy.add(worker)
        if cell.server is not None or await self._wake(cell, worker):
            events = cell.events
            budget = self.settings.turns_per_room_burst
            while events and budget:
                budget -= 1
                event = events.popleft()
                worker.event = event
                worker.started = monotonic()
                await self._TURNS[event[0]](self, cell, worker, event)
        self._rest(cell, worker)

    def _rest(self, cell: Cell, worker: Worker) -> None:
        """The room's burst is over, or its share of it: schedule it again, keep it, or evict it."""
        cell.running = False
        worker.cell = None
        self._busy.discard(worker)
        if cell.retry_at:
            return
        if cell.events and not self._retiring:
            self._schedule(cell)
            return
        server = cell.server
        if server is None:
            self._forget_if_idle(cell)
            return
        room = cell.room
        assert room is not None
        if not cell.streams and (room._evict or cell.kind.evicts_at_once):
            self._evict(cell)
        else:
            cell.used_at = monotonic()
            self._idle.pop(cell, None)
            self._idle[cell] = None
            if not self._clock_wanted.is_set():
                self._clock_wanted.set()
            if self._awake > self.settings.max_awake_rooms:
                self._make_room()

    def _make_room(self) -> None:
        """Evict the least recently used rooms beyond max_awake_rooms (S6)."""
        for cell in list(self._idle):
            if self._awake <= self.settings.max_awake_rooms:
                return
            if cell.kind.hibernate and not cell.running and not cell.streams:
                self._evict(cell)

    def _evict(self, cell: Cell) -> None:
        cell.server = None
        cell.room = None
        self._awake -= 1
        self.counters["evictions"] += 1
        self._idle.pop(cell, None)
        recent = self._recent.get(cell.key)
        if recent is not None:
            recent[2] = monotonic()
        if cell.edited:
            cell.connections = {each._number: each for each in cell.connections.values() if each._edited}
        else:
            cell.connections.clear()
        self._forget_if_idle(cell)

    def _forget_if_idle(self, cell: Cell) -> None:
        if (
            cell.server is None
            and not cell.gate
            and not cell.edited
            and not cell.running
            and not cell.events
            and not cell.retry_at
        ):
            self._cells.pop(cell.key, None)

    async def _wake(self, cell: Cell, worker: Worker) -> bool:
        """Construct the room's object and run `on_start`. False: it failed, and is tried again later (S4)."""
        room = Room(self, cell.key, cell.kind.settings, cell.connections, cell.pending)
        for connection in cell.connections.values():
            connection._room = room
        room.env = self.env
        room._pending_cleared = cell.pending_cleared
        cell.room = room
        self._remember(cell.key)
        worker.event = []
        worker.hook = "__init__"
        worker.started = monotonic()
        try:
            server = cell.kind.cls(room)
            server.room = room
            if cell.kind.starts:
                worker.hook = "on_start"
                effects = room._begin()
                result = server.on_start()
                if type(result) is CoroutineType:
                    with trio.fail_after(self.settings.start_timeout):
                        await watched(result, self._suspended)
                if effects or room.storage._writes or room.storage._cleared:
                    self._finish(cell, room, [wire.EFFECTS, effects])
                else:
                    room._effects = None
        except trio.Cancelled:
            raise
        except BaseException as error:
            self._start_failed(cell, error)
            return False
        cell.server = server
        cell.failures = 0
        self._awake += 1
        self.counters["wakes"] += 1
        return True

    def _remember(self, key: str) -> None:
        recent = self._recent.pop(key, None)
        if recent is None:
            recent = [0, 0.0, 0.0]
            if len(self._recent) >= RECENT_ROOMS:
                del self._recent[next(iter(self._recent))]
        recent[0] += 1
        recent[1] = monotonic()
        self._recent[key] = recent

    def _start_failed(self, cell: Cell, error: BaseException) -> None:
        """Events wait in their sockets; the room is tried again, later each time."""
        assert cell.room is not None
        cell.room._discard()
        cell.room = None
        cell.failures += 1
        delay = min(RETRY_FIRST_SECONDS * 2 ** (cell.failures - 1), RETRY_LAST_SECONDS)
        delay *= 0.75 + random.random() / 2
        cell.retry_at = monotonic() + delay
        self._retries.add(cell)
        self._clock_wanted.set()
        self._log_failure("room does not start", cell, None, error, retry_seconds=round(delay, 2))

    # --- Turns
    # -------------------------------------------------------------------------------------------------

    async def _turn_message(self, cell: Cell, worker: Worker, event: list[Any]) -> None:
        _, _, slot, number, card, state, end, data = event
        room = cell.room
        assert room is not None
        connection = cell.connections.get(number)
        if connection is None:
            connection = cell.connections[number] = Connection(room, slot, number, card, state)
        else:
            connection._refresh(card, state)
        effects = room._begin()
        self.active = cell
        worker.hook = "on_message"
        try:
            result = cell.server.on_message(*(data, connection)[: cell.kind.message_parameters])
            if type(result) is CoroutineType:
                await watched(result, self._suspended)
        except trio.Cancelled:
            raise
        except BaseException as error:
            effects = await self._failed(cell, worker, connection, error)
        self._finish(cell, room, [wire.TURN, slot, number, end, effects])

    async def _turn_connect(self, cell: Cell, worker: Worker, event: list[Any]) -> None:
        _, _, slot, number, card, state, fields = event
        room = cell.room
        assert room is not None
        kind, server = cell.kind, cell.server
        connection = Connection(room, slot, number, card, state)
        cell.connections[number] = connection
        context = ConnectionContext(fields)
        effects = room._begin()
        self.active = cell
        failed = False
        try:
            if "get_connection_tags" in kind.hooks:
                worker.hook = "get_connection_tags"
                tags = await self._call(kind, "get_connection_tags", server, connection, context)
                tags = check_tags(tags or (), kind.settings)
                if tags:
                    connection._retag(tags)
            if "on_connect" in kind.hooks:
                worker.hook = "on_connect"
                await self._call(kind, "on_connect", server, connection, context)
        except trio.Cancelled:
            raise
        except BaseException as error:
            effects = await self._failed(cell, worker, connection, error)
            failed = True
        self._finish(cell, room, [wire.CONNECTED, slot, number, failed, effects])

    async def _turn_close(self, cell: Cell, worker: Worker, event: list[Any]) -> None:
        _, _, slot, number, card, state, code, reason, clean, cause = event
        room = cell.room
        assert room is not None
        connection = cell.connections.get(number)
        if connection is None:
            connection = cell.connections[number] = Connection(room, slot, number, card, state)
        connection.close_cause = cause
        connection._closed = True
        effects = room._begin()
        self.active = cell
        worker.hook = "on_close"
        try:
            await self._call(cell.kind, "on_close", cell.server, connection, code, reason, clean)
        except trio.Cancelled:
            raise
        except BaseException as error:
            effects = await self._failed(cell, worker, connection, error)
        self._finish(cell, room, [wire.CLOSED, slot, number, effects])
        if not connection._edited:
            cell.connections.pop(number, None)

    async def _turn_request(self, cell: Cell, worker: Worker, event: list[Any]) -> None:
        from hibernation.requests import Reply, build_request, to_reply

        _, _, number, fields = event
        room = cell.room
        assert room is not None
        if number not in self._requests:
            return  # its client has left
        self._requests[number] = worker
        self._out.append([wire.BEGUN, number])
        effects = room._begin()
        self.active = cell
        worker.hook = "on_request"
        try:
            request = build_request(fields)
            value = await self._call(cell.kind, "on_request", cell.server, request)
            reply = await watched(to_reply(value), self._suspended)
        except trio.Cancelled:
            raise
        except BaseException as error:
            effects = await self._failed(cell, worker, None, error)
            reply = Reply(500, [("content-type", "text/plain; charset=utf-8")], self._blame(error))
        if isinstance(reply.body, bytes):
            effects.append([wire.RESPOND, number, reply.status, reply.headers, reply.body])
            self._requests.pop(number, None)
            self._finish(cell, room, [wire.EFFECTS, effects])
        else:
            effects.append([wire.RESPOND, number, reply.status, reply.headers, None])
            cell.streams += 1
            self._finish(cell, room, [wire.EFFECTS, effects])
            self._start_stream(cell, number, reply.body)

    _TURNS = {
        wire.MESSAGE: _turn_message,
        wire.CONNECT: _turn_connect,
        wire.CLOSE: _turn_close,
        wire.REQUEST: _turn_request,
    }

    async def _call(self, kind: Kind, hook: str, owner: Any, *arguments: Any) -> Any:
        """Call a hook with as many arguments as it takes; await it if it has to be."""
        result = getattr(owner, hook)(*arguments[: kind.parameters[hook]])
        if type(result) is CoroutineType:
            return await watched(result, self._suspended)
        return result

    async def _failed(
        self, cell: Cell, worker: Worker, connection: Connection | None, error: BaseException
    ) -> list[Any]:
        """A turn has failed (S20): undo it, log it, tell `on_error`; return the effects of that hook."""
        room = cell.room
        assert room is not None
        room._discard()
        self.counters["failed_turns"] += 1
        self._log_failure(f"{worker.hook} failed", cell, connection, error)
        effects = room._begin()
        if "on_error" in cell.kind.hooks:
            worker.hook = "on_error"
            try:
                await self._call(cell.kind, "on_error", cell.server, connection, error)
            except trio.Cancelled:
                raise
            except BaseException as second:
                room._discard()
                self._log_failure("on_error failed", cell, connection, second)
                effects = room._begin()
        return effects

    async def _cancelled(self, worker: Worker) -> None:
        """A turn was cancelled from inside: end it as failed, and go on with the room."""
        cell, event = worker.cell, worker.event
        if cell is None:
            return
        room = cell.room
        assert room is not None
        if not event:
            self._start_failed(cell, TurnTimeout("on_start", self.settings.start_timeout, "start_timeout"))
            self._rest(cell, worker)
            return
        worker.started = monotonic()
        connection = cell.connections.get(event[3]) if event[0] != wire.REQUEST else None
        if event[0] == wire.REQUEST and event[2] not in self._requests:
            room._discard()  # the client has left: nobody waits for an answer, and nothing of the turn is kept
        else:
            seconds = cell.kind.settings.turn_timeout
            effects = await self._failed(cell, worker, connection, TurnTimeout(worker.hook, seconds))
            self._finish(cell, room, self._failed_result(event, effects))
        self._rest(cell, worker)

    def _failed_result(self, event: list[Any], effects: list[Any]) -> list[Any]:
        kind = event[0]
        if kind == wire.MESSAGE:
            return [wire.TURN, event[2], event[3], event[6], effects]
        if kind == wire.CONNECT:
            return [wire.CONNECTED, event[2], event[3], True, effects]
        if kind == wire.CLOSE:
            return [wire.CLOSED, event[2], event[3], effects]
        self._requests.pop(event[2], None)
        headers = [("content-type", "text/plain; charset=utf-8")]
        effects.append([wire.RESPOND, event[2], 500, headers, b"the request took too long\n"])
        return [wire.EFFECTS, effects]

    def _finish(self, cell: Cell, room: Room, result: list[Any]) -> None:
        """A turn has ended well: stage its writes, and let its result leave, or wait for the commit (H2,
        H3).
        """
        self.counters["turns"] += 1
        room._effects = None
        undo = room._undo
        storage = room.storage
        if storage._writes or storage._cleared:
            forming = self._forming
            batch = forming.shards.get(cell.shard)
            if batch is None:
                batch = forming.shards[cell.shard] = ShardBatch()
            if storage._cleared:
                batch.clear(cell.key)
                cell.pending.clear()
                cell.pending_cleared = room._pending_cleared = True
                storage._cleared = False
            for name, blob in storage._writes.items():
                if blob is None:
                    batch.delete(cell.key, name)
                else:
                    batch.put(cell.key, name, blob)
            cell.pending.update(storage._writes)
            storage._writes.clear()
            cell.gate = forming.number
            forming.cells.add(cell)
        if not cell.gate:
            self._out.append(result)
            if undo:
                self._out_edits.extend(self._edits(cell, undo))
            return
        committing = self._committing
        waits_for = committing if committing is not None and committing.number == cell.gate else self._forming
        waits_for.results.append(result)
        if undo:
            waits_for.edits.extend(self._edits(cell, undo))

    def _edits(self, cell: Cell, undo: list[Any]) -> list[tuple[Cell, Connection]]:
        """The connections that a turn has changed: their values here are the newest until the gateway says
        so.
        """
        edits = [(cell, connection) for connection in {each[0]: None for each in undo}]
        undo.clear()
        cell.edited += len(edits)
        return edits

    # --- Commits
    # -----------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """End of a round: start the commit of what it staged, and send what may leave."""
        if self._forming.results and self._committing is None:
            self._commit()
        if self._out:
            self._send_results()

    def _commit(self) -> None:
        batch = self._forming
        self._forming = Batch(batch.number + 1)
        if not batch.shards:
            self._release(batch)
            return
        self._committing = batch
        self.counters["commits"] += 1
        if self._inline:
            try:
                self._commit_shards(batch)
            except BaseException as error:
                self._commit_failed(error)
            self._committing = None
            self._release(batch)
        else:
            assert self._writer is not None
            self._writer.submit(lambda: self._commit_shards(batch))

    def _commit_shards(self, batch: Batch) -> None:
        for index, changes in batch.shards.items():
            self._shards[index].commit(changes)

    def _commit_failed(self, error: BaseException) -> None:
        """The outcome is unknown: nothing may leave. The next host reads what is on disk, and gets every
        event again.
        """
        log.critical("commit failed: this host ends, its events are delivered again", error=repr(error))
        os._exit(74)

    def _committed(self) -> None:
        """The writer thread has something to say."""
        assert self._writer is not None
        for _, error in self._writer.completed():
            if error is not None:
                self._commit_failed(error)
            batch, self._committing = self._committing, None
            assert batch is not None
            self._release(batch)
        if self._forming.results and self._committing is None:
            self._commit()

    def _release(self, batch: Batch) -> None:
        """A batch is on disk: its results may leave, and reads of its rooms may go to disk again."""
        self._out.extend(batch.results)
        self._out_edits.extend(batch.edits)
        for cell in batch.cells:
            if cell.gate == batch.number:
                cell.gate = 0
                cell.pending.clear()
                cell.pending_cleared = False
                if cell.room is not None:
                    cell.room._pending_cleared = False
                else:
                    self._forget_if_idle(cell)
        for action in batch.after:
            action()

    # --- The link
    # ----------------------------------------------------------------------------------------------

    def _send_results(self) -> None:
        items, self._out = self._out, []
        data = self._link.pack(items)
        if self._out_edits:
            sequence = self._link.sent
            for cell, connection in self._out_edits:
                connection._edit_sequence = sequence
                self._sent_edits.append((sequence, cell, connection))
            self._out_edits.clear()
        if self._outgoing:
            self._outgoing += data
        else:
            link = self._socket
            if link is None:
                return
            try:
                sent = link.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._disconnected()
                return
            if sent < len(data):
                self._outgoing += data[sent:]
                self._epoll.modify(link.fileno(), EPOLLIN | EPOLLOUT)

    def _send(self) -> None:
        """Write on what an earlier send left."""
        link, outgoing = self._socket, self._outgoing
        if link is None:
            return
        try:
            while outgoing:
                del outgoing[: link.send(outgoing)]
        except BlockingIOError:
            self._epoll.modify(link.fileno(), EPOLLIN | EPOLLOUT)
            return
        except OSError:
            self._disconnected()
            return
        self._epoll.modify(link.fileno(), EPOLLIN)

    def _receive(self) -> None:
        """Whatever the epoll set has: results of commits, room on the link, events."""
        link, writer = self._socket, self._writer
        assert link is not None and writer is not None
        for descriptor, happened in self._epoll.poll(0):
            if descriptor == writer.fd:
                self._committed()
                continue
            if happened & EPOLLOUT:
                self._send()
            if happened & ~EPOLLOUT and self._socket is not None:
                try:
                    data = link.recv(READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    self._disconnected()
                    return
                for message in self._decoder.feed(data):
                    if self._link.is_gap(message):
                        self._outgoing += self._link.repetition_request()
                        self._send()
                    if self._link.wants_repetition(message):
                        self._outgoing += b"".join(self._link.unacknowledged())
                        self._send()
                    for item in self._link.take(message):
                        self._arrived(item)
        self._acknowledged()

    def _acknowledged(self) -> None:
        sent, newest = self._sent_edits, self._link.acknowledged
        while sent and sent[0][0] <= newest:
            sequence, cell, connection = sent.popleft()
            cell.edited -= 1
            if connection._edit_sequence == sequence:
                connection._edited = False
                if cell.room is None:
                    cell.connections.pop(connection._number, None)
                    self._forget_if_idle(cell)

    def _arrived(self, item: list[Any]) -> None:
        kind = item[0]
        if kind <= wire.REQUEST:
            if kind == wire.REQUEST:
                self._requests[item[2]] = None
                kind_of_room = self._kinds[item[1].split("/", 1)[0]]
                if "on_before_request" in kind_of_room.hooks:
                    self._turns.start_soon(self._before_request, kind_of_room, item)
                    return
            self._deliver(item)
        elif kind == wire.REPLY:
            task = self._questions.pop(item[1], None)
            if task is not None:
                trio.lowlevel.reschedule(task, Value(item[2]))
        elif kind == wire.BEFORE:
            self._turns.start_soon(self._before_connect, item)
        elif kind == wire.FETCH:
            self._requests[item[2]] = None
            self._turns.start_soon(self._fetch, item)
        elif kind == wire.CREDIT:
            credit = self._credits.get(item[1])
            if credit is not None:
                for _ in range(item[2]):
                    credit.release()
        elif kind == wire.CANCEL:
            self._cancel(item[1])
        elif kind == wire.ASK:
            self._out.append([wire.ANSWER, item[1], self._answer(item[2], item[3])])

    def _deliver(self, event: list[Any]) -> None:
        """Put an event into its room's cell, and the cell among the ready."""
        key = event[1]
        cell = self._cells.get(key)
        if cell is None:
            kind = self._kinds[key.split("/", 1)[0]]
            shard = wire.partition_of(key) % self.config.shard_count
            cell = self._cells[key] = Cell(key, kind, shard)
        cell.events.append(event)
        if not cell.running and not cell.scheduled and not cell.retry_at and not self._retiring:
            cell.scheduled = True
            self._ready.append(cell)

    # --- Requests
    # ----------------------------------------------------------------------------------------------

    async def _static(self, kind: Kind, hook: str, fields: dict[str, Any]) -> tuple[Any, Any]:
        """Call a before-hook; give the refusal, if any, and the request with what the hook changed."""
        from hibernation.errors import Refuse
        from hibernation.requests import Request, build_request, refusal, to_reply

        request = build_request(fields)
        room = fields.get("room")
        lobby = Lobby(room, kind.name, self.env)
        try:
            with trio.fail_after(self.settings.turn_timeout):
                value = await self._call_static(kind, hook, request, lobby)
        except Refuse as refused:
            return refusal(refused), request
        except trio.Cancelled:
            raise
        except BaseException as error:
            self._log_failure(f"{hook} failed", None, None, error, party=kind.name, room=room)
            from hibernation.requests import Reply

            text = self._blame(error)
            return Reply(500, [("content-type", "text/plain; charset=utf-8")], text), request
        if value is None:
            return None, request
        if isinstance(value, Request):
            return None, value
        return await to_reply(value), request

    async def _call_static(self, kind: Kind, hook: str, *arguments: Any) -> Any:
        result = getattr(kind.cls, hook)(*arguments[: kind.parameters[hook]])
        if isinstance(result, Awaitable):
            return await result
        return result

    async def _before_connect(self, item: list[Any]) -> None:
        from hibernation.requests import request_fields

        _, key, number, fields = item
        kind = self._kinds[key.split("/", 1)[0]]
        refused, request = await self._static(kind, "on_before_connect", fields)
        if refused is None:
            self._out.append([wire.ADMIT, number, 0, request_fields(request)["headers"], b""])
        else:
            body = await _whole(refused.body)
            self._out.append([wire.ADMIT, number, refused.status, refused.headers, body])
        self._flush()

    async def _before_request(self, kind: Kind, item: list[Any]) -> None:
        from hibernation.requests import request_fields

        _, key, number, fields = item
        with trio.CancelScope() as scope:
            self._requests[number] = scope
            refused, request = await self._static(kind, "on_before_request", fields)
        if scope.cancelled_caught:
            return
        self._requests[number] = None
        if refused is None:
            self._deliver([wire.REQUEST, key, number, {**fields, **request_fields(request)}])
            self._activate()
        else:
            await self._answer_outside(number, refused)

    async def _fetch(self, item: list[Any]) -> None:
        _, _, number, fields = item
        kind = self._kinds["main"]
        with trio.CancelScope() as scope:
            self._requests[number] = scope
            self._out.append([wire.BEGUN, number])
            refused, _ = await self._static(kind, "on_fetch", fields)
            if refused is None:
                from hibernation.requests import Reply

                refused = Reply(404, [("content-type", "text/plain; charset=utf-8")], b"not found\n")
            await self._answer_outside(number, refused)
        self._requests.pop(number, None)

    async def _answer_outside(self, number: int, reply: Any) -> None:
        """Answer a request with which no turn has to do."""
        if isinstance(reply.body, bytes):
            self._requests.pop(number, None)
            self._out.append(
                [wire.EFFECTS, [[wire.RESPOND, number, reply.status, reply.headers, reply.body]]]
            )
            self._flush()
        else:
            self._out.append([wire.EFFECTS, [[wire.RESPOND, number, reply.status, reply.headers, None]]])
            self._flush()
            await self._stream(None, number, reply.body)

    def _start_stream(self, cell: Cell, number: int, body: Any) -> None:
        """Stream a response once the turn that made it is on disk, outside of any turn."""
        self._requests[number] = None

        def start() -> None:
            self._turns.start_soon(self._stream, cell, number, body)

        committing = self._committing
        if not cell.gate:
            start()
        elif committing is not None and committing.number == cell.gate:
            committing.after.append(start)
        else:
            self._forming.after.append(start)

    async def _stream(self, cell: Cell | None, number: int, body: Any) -> None:
        credit = self._credits[number] = trio.Semaphore(STREAM_CHUNKS)
        self._running_streams += 1
        whole = False
        try:
            with trio.CancelScope() as scope:
                if number not in self._requests and cell is not None:
                    scope.cancel()  # its client left before the first chunk
                self._requests[number] = scope
                async for chunk in body:
                    await credit.acquire()
                    self._out.append([wire.CHUNK, number, bytes(chunk)])
                    self._flush()
                whole = True
        except Exception as error:
            self._log_failure("streaming a response failed", cell, None, error)
        finally:
            self._running_streams -= 1
            self._credits.pop(number, None)
            self._requests.pop(number, None)
            if hasattr(body, "aclose"):
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await body.aclose()
            self._out.append([wire.FINISH, number, whole])
            self._flush()
            if cell is not None:
                cell.streams -= 1
                if not cell.running and not cell.scheduled and cell.server is not None:
                    self._rest_idle(cell)

    def _rest_idle(self, cell: Cell) -> None:
        if not cell.streams and cell.kind.evicts_at_once:
            self._evict(cell)

    def _cancel(self, number: int) -> None:
        """The client of a request has left (S26)."""
        doing = self._requests.pop(number, None)
        if isinstance(doing, Worker):
            if doing.event and doing.event[0] == wire.REQUEST and doing.event[2] == number:
                doing.scope.cancel()
        elif doing is not None:
            doing.cancel()

    # --- For rooms: what `Backstage` promises
    # --------------------------------------------------------------------

    def read(self, key: str, name: str) -> bytes | None:
        return self._shards[wire.partition_of(key) % self.config.shard_count].get(key, name)

    def read_range(
        self,
        key: str,
        *,
        start: str | None,
        start_after: str | None,
        end: str | None,
        prefix: str | None,
        reverse: bool,
        limit: int | None,
    ) -> list[tuple[str, bytes]]:
        return self._shards[wire.partition_of(key) % self.config.shard_count].list(
            key, start=start, start_after=start_after, end=end, prefix=prefix, reverse=reverse, limit=limit
        )

    async def ask_gateway(self, key: str, what: str, argument: Any) -> Any:
        self._question = number = self._question + 1
        self._questions[number] = trio.lowlevel.current_task()
        self._out.append([wire.QUERY, number, key, what, argument])

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._questions.pop(number, None)
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    # --- Time, sight, errors
    # -------------------------------------------------------------------------------------

    async def _clock(self) -> None:
        """Everything that is due: idle rooms, turns that take too long, rooms to start again."""
        while True:
            with trio.move_on_after(1):
                await self._clock_wanted.wait()
            now = monotonic()
            for cell in list(self._idle):
                if cell.running or cell.streams:
                    continue
                if now - cell.used_at >= cell.kind.idle_seconds:
                    if cell.kind.hibernate:
                        self._evict(cell)
                    else:
                        cell.used_at = now
                        self._turns.start_soon(self._evict_if_deserted, cell)
            for cell in list(self._retries):
                if now >= cell.retry_at:
                    cell.retry_at = 0.0
                    self._retries.discard(cell)
                    self._schedule(cell)
                    self._activate()
            for worker in list(self._busy):
                cell_now = worker.cell
                if cell_now is None:
                    continue
                limit = cell_now.kind.settings.turn_timeout
                if worker.event and now - worker.started >= limit:
                    worker.scope.cancel()
            if not self._idle and not self._retries and not self._busy:
                self._clock_wanted = trio.Event()
            await trio.sleep(0.05)

    async def _evict_if_deserted(self, cell: Cell) -> None:
        """A room with `hibernate = False` stays while it has a connection (S6)."""
        count = await self.ask_gateway_now(cell.key, "count", [[], [], []])
        if (
            not count
            and not cell.running
            and not cell.events
            and not cell.streams
            and cell.server is not None
        ):
            self._evict(cell)

    async def ask_gateway_now(self, key: str, what: str, argument: Any) -> Any:
        """`ask_gateway` from outside the pool of workers, which therefore sends the question itself."""
        result: Any = None

        async def ask() -> None:
            nonlocal result
            result = await watched(self.ask_gateway(key, what, argument), self._flush)  # type: ignore[arg-type]

        await ask()
        return result

    def _answer(self, question: str, argument: Any) -> Any:
        if question == "stats":
            return {"pid": os.getpid(), "index": self.config.index, "awake": self._awake, **self.counters}
        if question == "rooms":
            now = monotonic()
            return {
                key: {
                    "awake": key in self._cells and self._cells[key].server is not None,
                    "wakes": int(recent[0]),
                    "woke_seconds_ago": round(now - recent[1], 3),
                    "slept_seconds_ago": round(now - recent[2], 3) if recent[2] >= recent[1] else None,
                }
                for key in argument
                if (recent := self._recent.get(key)) is not None
            }
        return None

    def _blame(self, error: BaseException) -> bytes:
        """What a client is told: the traceback in dev, nothing of it elsewhere (S39)."""
        if self.config.dev:
            return "".join(traceback.format_exception(error)).encode()
        return b"internal server error\n"

    def _log_failure(
        self, text: str, cell: Cell | None, connection: Connection | None, error: BaseException, **more: Any
    ) -> None:
        if cell is not None:
            party, _, room = cell.key.partition("/")
            more = {"party": party, "room": room, **more}
        if connection is not None:
            more["connection"] = connection.id
        log.error(text, exc_info=(type(error), error, error.__traceback__), **more)

    def describe_active(self) -> str:
        """For the watchdog: the room whose turn began last."""
        return "no room" if self.active is None else self.active.key


async def _whole(body: Any) -> bytes:
    """A body as bytes, also if it comes in pieces."""
    if isinstance(body, bytes):
        return body
    return b"".join([bytes(chunk) async for chunk in body])


async def serve(config: HostConfig, parties: list[Party], env: dict[str, str]) -> None:
    """Run a host until it is told to stop.

    Args:
        config: Which shards, which gateway, which settings.
        parties: The app's parties, checked.
        env: What rooms see as `room.env`.
    """
    sys.setswitchinterval(0.001)
    await Host(config, parties, env).run()
