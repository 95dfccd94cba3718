"""The host: the process that runs room code. Owns the link to the gateway and the open shards; owns no
client's socket.

How a message becomes an effect:

    link ─▶ pool (cells, workers) ─▶ turns (hooks) ─▶ finish ─┬─────────────────────────▶ link
                                       └▶ exchanges (HTTP)    └─ commits ─(on disk)──────▶ link

The worker that waits on the link reads it and puts each event into its room's cell; ready rooms have their
turns; each result joins what leaves next, or, if anything of its room is not yet on disk, the batch whose
commit it must wait for. At the end of a round the results go to the gateway, as one message, and then the
batch to the writer thread.

The numbering of the link, and what of it is not acknowledged, live as long as this process. When the gateway
goes, turns that run are cancelled, and events that wait are forgotten: the next one gives them out again. But
a turn that has ended has ended: its result is kept, goes to disk if it has to, and is said to the next
gateway before that gives out anything. What has to wait for the acknowledgement of others (H8) is said when
these are; only then are we *synced*. Background work goes on all the while, and its rooms stay.

Invariants:
    H7  until a gateway has acknowledged it, the result of a turn that has ended is in what leaves next, in a
        batch, or in what the link keeps; after this process has died, if the turn wrote, in the outbox
    H8  no row is committed before a gateway has acknowledged what its connections did before without writing:
        the row consumes their input up to its own, and what was only in memory would be lost with it
"""

import gc
import math
import os
import secrets
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from select import EPOLLIN, EPOLLOUT, epoll
from typing import Any, Final

import trio
from outcome import Value

from hibernation import wire
from hibernation.alarms import Alarms
from hibernation.background import CLEAN_UP_SECONDS, Background
from hibernation.blame import Blame
from hibernation.cells import Batch, Cell, Kind
from hibernation.code import code_of
from hibernation.commits import Commits
from hibernation.configuration import HostConfig, report
from hibernation.connection import Connection
from hibernation.crons import Crons, main_party
from hibernation.errors import RoomGone, UnknownParty
from hibernation.exchanges import Exchanges
from hibernation.link import Link, LinkError, StreamDecoder, encode
from hibernation.logs import get_logger
from hibernation.party import Party
from hibernation.pool import Pool
from hibernation.settings import Settings
from hibernation.staging import Edit, Turn, running_turn
from hibernation.turns import Turns
from hibernation.waiting import named
from hibernation.watchdog import Watchdog
from storage.errors import BrokerError
from storage.room_database import RoomDatabase
from storage.room_databases import RoomDatabases
from storage.shards import Shard
from storage.writer import Writer

#: Read from the link at once.
READ_BYTES: Final = 256 * 1024
#: With so much on its way to the gateway that this has not acknowledged, a flush waits.
FLUSH_BYTES_MAX: Final = 1024 * 1024
#: Results beyond this that the gateway has not read stop the host from running turns.
OUTGOING_BYTES_MAX: Final = 8 * 1024 * 1024
#: The same of what turns have staged that is not on disk.
STAGED_BYTES_MAX: Final = 64 * 1024 * 1024
#: Delays between attempts to commit what the disk has refused (S36).
RETRY_FIRST_SECONDS: Final = 0.5
RETRY_LAST_SECONDS: Final = 5.0
#: How long executed rows stay in the outbox when no commit comes that takes them along.
TIDY_SECONDS: Final = 1.0
#: The gateway's answer to a greeting is not larger.
WELCOME_BYTES_MAX: Final = 64 * 1024
#: What is said to the next gateway of what was put for a former one: the rest means nothing to it.
_RESULTS: Final = frozenset({wire.TURN, wire.CONNECTED, wire.CLOSED, wire.EFFECTS, wire.ROW, wire.PAUSED})
#: Results that say how far a connection has come.
_OF_CONNECTIONS: Final = frozenset({wire.TURN, wire.CONNECTED, wire.CLOSED})
#: Pause between attempts to reach a gateway that is not there.
RECONNECT_SECONDS: Final = 0.02
#: When a host that is told to end has had no gateway for so long the whole instance stops: what needs one
#: will not come about any more.
ALONE_SECONDS: Final = 2.0
#: Between two signs of life for the supervisor.
BEAT_SECONDS: Final = 1.0
#: What turns under way have at least when background work has taken all of `drain`.
LAST_TURNS_SECONDS: Final = 3.0
#: What the release of cancelled turns may take when the host ends.
LAST_WORDS_SECONDS: Final = 5.0
#: The same when it has been told a second time to end, after that; and all that it does then. What is left of
#: `Timing.hurry_seconds` is for the databases to close.
HURRIED_WORDS_SECONDS: Final = 1.0
HURRIED_SECONDS: Final = 4.0
#: A round makes thousands of short-lived lists that no cycle holds: look for cycles less often than by
#: default.
GC_THRESHOLDS: Final = (20_000, 20, 50)

#: What a fetch outside of a turn is told by a host that starts no more turns.
_RETIRING: Final = [
    "response",
    503,
    [("content-type", "text/plain; charset=utf-8"), ("retry-after", "1")],
    b"this host is being replaced\n",
]

log = get_logger("host")


class Host:
    """See the module; `serve` runs one. It is also what rooms reach the world through (`room.Backstage`)."""

    def __init__(
        self,
        config: HostConfig,
        parties: list[Party],
        env: dict[str, str],
        writer: Callable[[str], Writer] = Writer,
    ) -> None:
        settings = config.settings
        self.config = config
        self._descriptions = [party.describe() for party in parties]
        self._kinds: dict[str, Kind] = {}
        for party in parties:
            kind = Kind(party, settings)
            for name in (party.name, *party.aliases):
                self._kinds[name] = kind
        self._shards: dict[int, Shard] = {}
        for index in config.shards:
            self._shards[index] = Shard(config.data, index, durability=settings.durability)
        self._blame = Blame(config, self._shards, code_of(parties))
        self._writer = writer("shards")
        self._epoll = epoll()
        self._epoll.register(self._writer.fd, EPOLLIN)
        self._socket: socket.socket | None = None
        self._incarnation = secrets.randbits(63)
        self._link = Link()
        self._decoder = StreamDecoder()
        #: What the gateway's answer to our greeting asks for, behind all that it does not know.
        self._token = 0
        #: Decoded, and next to be taken.
        self._message: list[Any] | None = None
        self._outgoing = bytearray()
        self._out: list[list[Any]] = []
        self._out_edits: list[tuple[Cell, Connection]] = []
        #: Shard and number of the rows among `_out`.
        self._out_rows: list[tuple[int, int]] = []
        #: By connection: the message with its newest result that is in no row; and the newest message whose
        #: acknowledgement was asked for.
        self._said: dict[int, int] = {}
        self._asked = 0
        #: Rows that the gateway has been sent and has not acknowledged, with the number of their message.
        self._sent_rows: deque[tuple[int, int, int]] = deque()
        #: Values that the gateway has been sent and has not acknowledged, with the number of their message.
        self._sent_edits: deque[tuple[int, Cell, Connection]] = deque()
        #: The gateway has been told all that ended before; and the batch that has to be on disk for that.
        self._synced = False
        self._unsaid = 0
        #: Waits for an answer, to which question.
        self._questions: dict[int, tuple[trio.lowlevel.Task, list[Any]]] = {}
        #: Set when the link may have room, for flushes that wait for it.
        self._room_wanted: trio.Event | None = None
        self._question = 0
        self.turn_count = 0
        inline = settings.durability == "os"
        self._databases = RoomDatabases(
            config.data,
            self._shards,
            lambda key: wire.partition_of(key) % config.shard_count,
            durability=settings.durability,
            bytes_max=settings.room_database_bytes_max,
        )
        #: What rooms look at, see `room.Backstage`.
        self.own_databases = self._databases.own
        self._commits = Commits(
            self._shards,
            config.shard_count,
            self._writer,
            inline,
            self._released,
            self._paused,
            self._ready,
            self._databases,
        )
        self._nursery: trio.Nursery
        self._retrying = False
        #: When it was told a second time to end, by trio's clock, and what bounds its end from then on.
        self._hurried_at = math.inf
        self._retirement = trio.CancelScope()
        self._executed = trio.Event()
        self._pool = Pool(
            settings,
            self,
            env,
            wait=self._wait,
            receive=self._receive,
            flush=self._flush,
            is_full=self._is_full,
            is_deserted=self._is_deserted,
            running=self._blame.running,
        )
        self._turns = Turns(self._finish, self._pool.suspended, dev=config.dev)
        self._pool.turns = self._turns
        self._turns.line_has_moved = self._commits.look_again
        self._background = Background(self._pool, self._finish, self._flush, self._turns.log_failure)
        self._exchanges = Exchanges(
            settings,
            env,
            self._kinds,
            self._turns,
            self._pool,
            self._commits,
            self,
            self._out_put,
            self._finish,
            self._flush,
            self._spawn_for_life,
        )
        self._turns.exchanges = self._exchanges
        self._blame.attach(
            self._pool, self._turns, self._commits, self._kinds, self._out_put, self._exchanges.refuse
        )
        self._commits.absolve = self._blame.running.absolve
        self._commits.flush_soon = lambda: self._spawn_for_life(self._flush_later)
        self._alarms = Alarms(
            self._shards, self._kinds, self._pool, self._commits, settings.alarms_in_flight_max
        )
        self._crons = Crons(
            main_party(parties),
            self._shards,
            settings,
            lambda: self._exchanges.lobby(self._kinds["main"], None),
            self._pool,
            self._commits,
            self._flush,
            self._turns.log_failure,
        )
        self._turns.alarms = self._blame.alarms = self._alarms
        self._commits.alarms_stored = self._alarms.stored
        # What rooms ask of alarms (`room_alarms.AlarmSource`).
        self.check_alarms = self._alarms.check_alarms
        self.read_alarm = self._alarms.read_alarm
        self.read_alarms = self._alarms.read_alarms
        self.count_alarms = self._alarms.count_alarms
        for index, rows in self._databases.recover(_damaged).items():
            for row, items in rows:
                self._put_row(index, row, items)
        self._databases.on_open = self._tidy_soon

    # --- Life of the process ----------------------------------------------------------------------

    def begin(self, nursery: trio.Nursery) -> None:
        """Serve whatever gateway there is, in tasks of this nursery."""
        self._nursery = self._background.nursery = nursery
        nursery.start_soon(self._serve_gateways)
        nursery.start_soon(self._tidy)
        nursery.start_soon(self._alarms.run)
        nursery.start_soon(self._crons.run)

    async def run(self) -> None:
        """Serve until SIGTERM; then end the turns under way, release their effects, and return. A second one
        says that there is no time left for turns and crons to end by themselves.
        """
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await self._run(signals)  # all of it: no signal ends the process while databases are being closed

    async def _run(self, signals: AsyncIterator[int]) -> None:
        watchdog = Watchdog(
            lambda: self._pool.active, trio.lowlevel.current_trio_token(), self._blame.running.blocked
        )
        watchdog.start()
        ended_well = False
        try:
            async with trio.open_nursery() as nursery:
                self.begin(nursery)
                nursery.start_soon(self._beat)
                await anext(signals)
                nursery.start_soon(self._hurry, signals)
                with self._retirement:
                    await self._retire()
                ended_well = True
                nursery.cancel_scope.cancel()
            self._writer.close()
            self._commits.close()
        finally:
            watchdog.stop()
            if ended_well:
                self._blame.running.close()
            self._writer.close()
            self._databases.close()
            for shard in self._shards.values():
                shard.close()

    async def _beat(self) -> None:
        """Show the supervisor that the loop goes round: it kills a host that does not (S23)."""
        os.set_blocking(self.config.status_fd, False)  # a supervisor that does not read costs nothing here
        while True:
            report(self.config.status_fd, "beat")
            await trio.sleep(BEAT_SECONDS)

    async def _serve_gateways(self) -> None:
        """Find the gateway, serve it, and find the next one when it has gone."""
        while True:
            link = await self._connect()
            if link is not None:
                self._serve(link)
                self._alarms.open()
                self._crons.open()
                await self._pool.run()
                self._commits.abandon_turns()
                self._forget()  # also what was still said while tasks came to their end
                await self._finish_commits()
            await trio.sleep(RECONNECT_SECONDS)

    async def _connect(self) -> socket.socket | None:
        """Greet a gateway and take its answer. None: there is none, or it has gone again."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        greeting = memoryview(
            encode(
                {
                    "role": "host",
                    "version": wire.VERSION,
                    "index": self.config.index,
                    "pid": os.getpid(),
                    "incarnation": self._incarnation,
                    "acknowledged": self._link.acknowledged,
                    "shards": list(self.config.shards),
                    "generations": {index: shard.generation for index, shard in self._shards.items()},
                    "shard_count": self.config.shard_count,
                    "parties": self._descriptions,
                }
            )
        )
        decoder = StreamDecoder(WELCOME_BYTES_MAX)
        try:
            link.connect(os.fspath(self.config.data / "gateway.sock"))
            while greeting:
                await trio.lowlevel.wait_writable(link)
                greeting = greeting[link.send(greeting) :]
            while (welcome := next(decoder, None)) is None:
                await trio.lowlevel.wait_readable(link)
                data = link.recv(WELCOME_BYTES_MAX)
                if not data:
                    raise ConnectionResetError
                decoder.feed(data)
        except OSError:
            link.close()
            return None
        except BaseException:
            link.close()
            raise
        if "error" in welcome:
            link.close()
            log.critical("the gateway turns this host away", reason=welcome["error"])
            raise LinkError(welcome["error"])
        self._decoder = decoder.rest()
        self._message = None
        self._link.resume(welcome["received"])
        self._acknowledged()
        self._token = welcome["token"]
        return link

    def _serve(self, link: socket.socket) -> None:
        """Say again what the gateway does not know, then that this was all (H7)."""
        self._socket = link
        self._asked = 0
        self._epoll.register(link.fileno(), EPOLLIN)
        for data in self._link.unacknowledged():
            self._write(data)
        if self._pool.retiring:
            self._out_put([wire.RETIRE])
        self._unsaid = self._commits.newest
        self._flush()

    def _sync(self) -> None:
        """Say that this was all, as soon as what ended before this link is on disk and said."""
        if not self._commits.has_ended(self._unsaid):
            return
        self._synced = True
        self._out_put([wire.SYNCED, self._token])
        self._blame.greet()  # behind that, where the gateway forgets what a former host has said
        for _, question in self._questions.values():
            self._out_put(question)
        self._send()
        self._look_for_room()

    def _disconnected(self) -> None:
        """The gateway has gone: the next one delivers again what was not acknowledged."""
        link, self._socket = self._socket, None
        if link is None:
            return
        self._epoll.unregister(link.fileno())
        link.close()
        self._synced = False
        self._forget()
        self._pool.forget()

    def _forget(self) -> None:
        """Of what was meant for a former gateway only the results of turns are said to the next, whose
        numbers mean other things; and it knows all values that they leave with it. Questions that somebody
        still waits for, it is asked again.
        """
        self._alarms.close()
        self._crons.close()
        self._outgoing.clear()
        self._out = [item for item in self._out if item[0] in _RESULTS]
        self._out_edits.clear()
        self._sent_edits.clear()
        self._commits.forget()
        self._exchanges.forget()

    async def _finish_commits(self) -> None:
        """Let the results of the turns that have ended become ready to leave, however long the disk takes;
        but not those before which the next gateway has to be told something.
        """
        self._commits.end_round()
        while self._commits.writing:
            with trio.move_on_after(RECONNECT_SECONDS):  # `_take_commits` may have been there first
                await trio.lowlevel.wait_readable(self._writer.fd)
            self._commits.completed()
            self._commits.end_round()

    async def _hurry(self, signals: AsyncIterator[int]) -> None:
        """Told a second time to end: give up what is waited for, while there is time to end in order."""
        await anext(signals)
        cut_short = {name: value for name, value in self._waits_for().items() if value}
        log.warning("stopping: no time is left, what runs is cut short", **cut_short)
        self._hurried_at = trio.current_time()
        self._retirement.deadline = self._hurried_at + HURRIED_SECONDS

    async def _retire(self) -> None:
        """Let background work and crons end within `drain`, while rooms go on. Then start no more turns, let
        those under way end in what is left of it, and let their effects leave. What has not ended by then is
        cancelled with the process; turns are delivered again to the next one (S32).

        When the whole instance stops the gateway has gone before: then crons alone are waited for, which need
        none. It may have taken most of the time there is, which nobody but the supervisor knows: `_hurry`.
        """
        drain = self.config.settings.drain
        began = trio.current_time()
        async with named(log, "stopping: this host waits", self._waits_for):
            await self._until(lambda: not (self._background.busy or self._crons.busy), drain)
            await self._end_background()
            self._out_put([wire.RETIRE])
            self._pool.retire()
            self._flush()
            left = began + drain - trio.current_time()
            await self._until(self._is_at_rest, max(left, min(drain, LAST_TURNS_SECONDS)))
            await self._end_background()
            await self._until(
                lambda: self._commits.idle and not self._has_words_left(), LAST_WORDS_SECONDS, flush=True
            )
            while self._commits.writing:
                self._take_commits()
                await trio.sleep(RECONNECT_SECONDS)
            await self._exchanges.end()

    async def _until(self, done: Callable[[], bool], seconds: float, *, flush: bool = False) -> None:
        """Wait for that, but no longer than `seconds`; and no longer than ALONE_SECONDS without a gateway,
        unless a cron runs; and hardly any longer in a hurry.
        """
        hurried_seconds = HURRIED_WORDS_SECONDS if flush else 0.0
        alone_since: float | None = None
        with trio.move_on_after(seconds):
            while not done():
                if flush:
                    self._flush()
                self._take_commits()
                now = trio.current_time()
                if now >= self._hurried_at + hurried_seconds:
                    return
                if self._socket is not None:
                    alone_since = None
                elif alone_since is None:
                    alone_since = now
                elif now - alone_since >= ALONE_SECONDS and not self._crons.busy:
                    return
                await trio.sleep(RECONNECT_SECONDS)

    def _is_at_rest(self) -> bool:
        """Whether nothing runs, and all of what has ended is on disk."""
        return self._commits.idle and not (
            self._pool.busy or self._exchanges.busy or self._background.busy or self._crons.busy
        )

    def _take_commits(self) -> None:
        """Take what the writer has done. Workers do that as long as there is a gateway, and without one
        nobody: a commit that begins then, such as that of `_tidy`, would never be seen to end.
        """
        if self._commits.writing:
            self._commits.completed()
            self._flush()

    def _waits_for(self) -> dict[str, object]:
        """What is not over yet, for the log."""
        return {
            "rooms": self._pool.rooms_at_work(),
            "requests": self._exchanges.busy,
            "background": self._background.busy,
            "crons": self._crons.busy,
            "commits": not self._commits.idle,
            "paused": self._commits.paused,
            "unacknowledged": self._has_words_left(),
            "gateway": "there" if self._socket is not None else "gone",
        }

    async def _end_background(self) -> None:
        """Cancel the background work that there is, and let it clean up."""
        if self._background.busy:
            self._background.cancel()
            with trio.move_on_after(CLEAN_UP_SECONDS):
                await self._background.all_ended()

    def _has_words_left(self) -> bool:
        """Whether something waits to be sent or acknowledged, and there is a gateway for it."""
        return self._socket is not None and bool(self._out or self._outgoing or self._sent_rows)

    def _is_full(self) -> bool:
        return len(self._outgoing) > OUTGOING_BYTES_MAX or self._commits.waiting_bytes > STAGED_BYTES_MAX

    # --- The outbox, and a disk that takes nothing ------------------------------------------------

    def _tidy_soon(self) -> None:
        self._executed.set()

    async def _tidy(self) -> None:
        """Keep no executed rows in the outbox when no commit comes that takes them out."""
        while True:
            await self._executed.wait()
            self._executed = trio.Event()
            while self._commits.untidy:
                count = self._commits.count
                await trio.sleep(TIDY_SECONDS)
                if count == self._commits.count:
                    self._commits.tidy()
                else:
                    self._commits.tidy_with_next()

    def _paused(self, reason: str | None) -> None:
        """The disk refuses a commit, or takes it again (S36)."""
        self._out_put([wire.PAUSED, reason])
        if reason is None:
            self._pool.go_on()
            return
        self._pool.paused = True
        if not self._retrying:
            self._retrying = True
            self._nursery.start_soon(self._retry)

    async def _retry(self) -> None:
        """Try to commit until the disk takes it."""
        delay = RETRY_FIRST_SECONDS
        while self._commits.paused is not None:
            await trio.sleep(delay)
            delay = min(2 * delay, RETRY_LAST_SECONDS)
            self._commits.retry()
        self._retrying = False

    # --- What turns produce -----------------------------------------------------------------------

    def _spawn_for_life(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run something until this process ends, whatever becomes of the gateway."""
        self._nursery.start_soon(function)

    def _out_put(self, item: list[Any]) -> None:
        self._out.append(item)

    def _finish(self, cell: Cell, turn: Turn, result: list[Any], whole: Turn | None = None) -> None:
        """A turn has ended well, or a part of this whole one: stage its writes, and let its result leave, or
        wait for the commit.
        """
        self.turn_count += 1
        turn.room = None
        if turn.stored:
            self._commits.stage(cell, turn, whole)
        if turn.evict or turn.tasks:
            self._carry_on(cell, turn, whole)
        edits = turn.edits
        if not cell.gate:
            self._out.append(result)
            if result[0] != wire.EFFECTS:
                self._said[result[2]] = self._link.sent + 1
            if edits:
                self._out_edits.extend(self._edits(cell, edits))
        else:
            self._commits.hold(cell, result, self._edits(cell, edits) if edits else [], turn.bytes)

    def _carry_on(self, cell: Cell, turn: Turn, whole: Turn | None) -> None:
        """What a turn has asked of its room: to go, or to work on."""
        room = cell.room
        assert room is not None
        room._evict = room._evict or turn.evict
        if turn.tasks:
            # On disk with its turn, so that no other host runs that again, and begins it a second time.
            self._commits.must_store(cell, whole)
            begin = self._background.planned(cell, room, turn.tasks)
            self._commits.after(cell, begin, lasting=True)

    def _ready(self, batch: Batch) -> bool:
        """Whether the gateway has what the connections of a batch did before without writing (H8)."""
        said = self._said
        if not said:
            return True
        known = self._link.acknowledged
        if known == self._link.sent and not self._out:
            said.clear()
            return True
        for results in batch.results.values():
            for result in results:
                if result[0] in _OF_CONNECTIONS and said.get(result[2], 0) > known:
                    self._ask_acknowledgement()
                    return False
        return True

    def _edits(self, cell: Cell, edits: dict[Connection, Edit]) -> list[tuple[Cell, Connection]]:
        """The connections that a turn has changed: their values here are the newest until the gateway says
        so.
        """
        for connection, edit in edits.items():
            connection._apply(edit)
        cell.edited += len(edits)
        return [(cell, connection) for connection in edits]

    def _released(self, batch: Batch) -> None:
        """A batch is on disk: its results leave."""
        for shard, rows in batch.rows.items():
            for row, items in rows:
                self._put_row(shard, row, items)
        self._out.extend(batch.late)
        for result in batch.late:
            if result[0] in _OF_CONNECTIONS:
                self._said[result[2]] = self._link.sent + 1
        self._out_edits.extend(batch.edits)
        for cell in batch.cells:
            self._pool.forget_if_idle(cell)

    def _put_row(self, shard: int, row: int, items: bytes) -> None:
        self._out.append([wire.ROW, shard, row, items])
        self._out_rows.append((shard, row))

    def _flush(self) -> None:
        """End of a round: send what may leave, and start the commit of what was staged."""
        self._send()
        self._commits.end_round()
        self._send()
        if not self._synced and self._socket is not None:
            self._sync()

    async def _flush_later(self) -> None:
        """End a round where no worker does: they may all be waiting for the link."""
        await trio.lowlevel.checkpoint()
        self._flush()

    def _send(self) -> None:
        """Send what may leave, as one message."""
        if not self._out or self._socket is None:
            return
        items, self._out = self._out, []
        first = self._link.sent + 1
        data = self._link.pack(items)
        sequence = self._link.sent
        if sequence != first:  # it went in several messages
            self._said.update((who, sequence) for who, number in self._said.items() if number == first)
        if self._out_edits:
            self._sent_edits.extend((sequence, cell, connection) for cell, connection in self._out_edits)
            self._out_edits.clear()
        if self._out_rows:
            self._sent_rows.extend((sequence, shard, row) for shard, row in self._out_rows)
            self._out_rows.clear()
        self._write(data)

    # --- The link ---------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        link = self._socket
        if link is None:
            return
        if self._outgoing:
            self._outgoing += data
            return
        try:
            sent = link.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # its end is noticed where it is read
        if sent < len(data):
            self._outgoing += memoryview(data)[sent:]
            self._epoll.modify(link.fileno(), EPOLLIN | EPOLLOUT)

    def _write_on(self) -> None:
        """Go on with what an earlier write left."""
        link, outgoing = self._socket, self._outgoing
        assert link is not None
        try:
            while outgoing:
                del outgoing[: link.send(outgoing)]
        except BlockingIOError:
            self._epoll.modify(link.fileno(), EPOLLIN | EPOLLOUT)
        except OSError:
            outgoing.clear()
        else:
            self._epoll.modify(link.fileno(), EPOLLIN)
            self._look_for_room()

    async def _wait(self) -> None:
        """Return when there is something to take."""
        if self._message is None:
            self._message = next(self._decoder, None)
        if self._message is None:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
        else:
            await trio.lowlevel.checkpoint()

    def _receive(self) -> None:
        """Take what has come: the end of a commit, room on the link, one message. The others stay bytes."""
        for descriptor, happened in self._epoll.poll(0):
            if descriptor == self._writer.fd:
                self._commits.completed()
                self._flush()
                continue
            if happened & EPOLLOUT:
                self._write_on()
                self._flush()
            if happened & ~EPOLLOUT and self._message is None and not self._read():
                return
        message, self._message = self._message or next(self._decoder, None), None
        if message is None:
            return
        numbers = self._link
        if numbers.is_gap(message):
            self._write(numbers.repetition_request())
        if numbers.wants_repetition(message):
            self._write(b"".join(numbers.unacknowledged()))
        for item in numbers.take(message):
            self._arrived(item)
        if self._sent_edits or self._sent_rows:
            self._acknowledged()
        if self._room_wanted is not None:
            self._look_for_room()

    def _read(self) -> bool:
        """Read from the link. False: the gateway has gone."""
        link = self._socket
        assert link is not None
        try:
            data = link.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self._disconnected()
            return False
        self._decoder.feed(data)
        return True

    def _acknowledged(self) -> None:
        """The gateway has executed results up to here, so they need no row; and what it says of connections
        from now on is the newest again.
        """
        newest, rows = self._link.acknowledged, self._sent_rows
        if rows and rows[0][0] <= newest:
            while rows and rows[0][0] <= newest:
                _, shard, row = rows.popleft()
                self._commits.executed(shard, row)
            self._executed.set()
        sent = self._sent_edits
        while sent and sent[0][0] <= newest:
            _, cell, connection = sent.popleft()
            cell.edited -= 1
            connection._edits -= 1
            # Events that wait here may be older than the acknowledgement: they still need what is known here.
            if not connection._edits and cell.room is None and not cell.events:
                cell.connections.pop(connection._number, None)
                self._pool.forget_if_idle(cell)

    def _arrived(self, item: list[Any]) -> None:
        kind = item[0]
        if kind <= wire.CLOSE:
            key = item[1]
            of_room = self._kinds.get(key.split("/", 1)[0])
            if of_room is not None:  # else another host has newer code already: this one's successor gets it
                self._pool.deliver(key, of_room, item)
        elif kind == wire.REQUEST:
            self._exchanges.requested(item)
        elif kind == wire.REPLY:
            asked = self._questions.pop(item[1], None)
            if asked is not None:
                trio.lowlevel.reschedule(asked[0], Value(item[2]))
        elif kind == wire.BEFORE:
            self._exchanges.asked_before(item)
        elif kind == wire.FETCH:
            self._exchanges.fetched(item)
        elif kind == wire.CREDIT:
            self._exchanges.credit(item[1], item[2])
        elif kind == wire.BODY:
            self._exchanges.body(item[1], item[2], item[3], item[4])
        elif kind == wire.CANCEL:
            self._exchanges.cancel(item[1])
        elif kind == wire.ASK:
            number = item[1]
            if not self._blame.answer(
                item[2], item[3], lambda value: self._out.append([wire.ANSWER, number, value])
            ):
                self._out.append([wire.ANSWER, number, self._answer(item[2], item[3])])

    def _answer(self, question: str, argument: Any) -> Any:
        """Answer a question of the admin commands; wakes no room."""
        pool = self._pool
        if question == "rooms":
            return pool.describe(argument)
        return {
            "pid": os.getpid(),
            "index": self.config.index,
            "awake": pool.awake,
            "wakes": pool.wakes,
            "evictions": pool.evictions,
            "turns": self.turn_count,
            "failed_turns": self._turns.failed,
            "commits": self._commits.count,
            "paused": self._commits.paused,
            **self._blame.counts(),
            **self._alarms.counts(),
            **self._crons.counts(),
        }

    # --- What `room.Backstage` promises -----------------------------------------------------------

    def read(self, key: str, name: str) -> bytes | None:
        """The committed value of one storage key."""
        own = self.own_databases
        if own and key in own:
            return self._commits.file_of(key).get(key, name)
        return self._shards[self._commits.shard_of(key)].get(key, name)

    def read_many(self, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """The committed values of those of these storage keys that exist."""
        return self._commits.file_of(key).get_many(key, names)

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
        """Committed keys and values in byte order."""
        return self._commits.file_of(key).list(key, start, start_after, end, prefix, reverse, limit)

    def open_database(self, key: str) -> None:
        """Have the room's own database open; raises DataDirectoryError if it cannot be used."""
        self._databases.get(key)

    async def own_database(self, key: str, turn: Turn) -> RoomDatabase:
        """The room's own database, for this turn alone until its end."""
        cell = self._cell_of(key, turn)
        return await self._commits.own_database(cell, turn, self._pool.is_first(cell))

    async def database_to_clear(self, key: str, turn: Turn) -> RoomDatabase | None:
        """The same for a turn that is about to end and deletes all; None: there are no tables."""
        cell = self._cell_of(key, turn)
        return await self._commits.database_to_clear(cell, turn, self._pool.is_first(cell))

    def _cell_of(self, key: str, turn: Turn) -> Cell:
        cell = self._pool.cells.get(key)
        if cell is None or cell.room is not turn.room:
            raise RoomGone(key)  # the gateway has gone, and this turn is cancelled
        return cell

    async def ask_gateway(self, key: str, what: str, argument: Any) -> Any:
        """Put a question about connections to the room's gateway."""
        self._question = number = self._question + 1
        return await self._ask([wire.QUERY, number, key, what, argument])

    async def _ask(self, item: list[Any]) -> Any:
        """Put a question to the gateway; one that comes while there is none, or a new one, is asked then."""
        number = item[1]
        self._questions[number] = trio.lowlevel.current_task(), item
        if self._synced:
            self._out.append(item)

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._questions.pop(number, None)
            return trio.lowlevel.Abort.SUCCEEDED

        self._flush()
        return await trio.lowlevel.wait_task_rescheduled(abort)

    async def flush(self, turn: Turn) -> None:
        """Let leave what the turn has staged so far; return when that is on disk, and the link has room."""
        room = turn.room
        assert room is not None
        cell = self._cell_of(room.key, turn)
        part = turn.split()
        self._commits.let_by(cell, turn)
        if part.used:
            try:
                self._finish(cell, part, [wire.EFFECTS, part.effects], turn)
            except BaseException:
                turn.inner = part.inner  # which is undone with the turn
                raise
        stored = trio.Event()
        self._commits.after(cell, stored.set, lasting=True)
        self._flush()
        await stored.wait()
        while not self._has_room():
            if self._room_wanted is None:
                self._room_wanted = trio.Event()
            await self._room_wanted.wait()

    def _has_room(self) -> bool:
        """Whether a flush may go on; else the gateway is asked what it has taken."""
        if self._socket is None or not self._synced or self._outgoing:
            return False
        if self._link.kept_bytes <= FLUSH_BYTES_MAX:
            return True
        self._ask_acknowledgement()
        return False

    def _ask_acknowledgement(self) -> None:
        if self._asked < self._link.sent and self._socket is not None:
            self._asked = self._link.sent
            self._write(self._link.acknowledgement_request())

    def _look_for_room(self) -> None:
        wanted = self._room_wanted
        if wanted is not None and self._has_room():
            self._room_wanted = None
            wanted.set()

    # --- What `neighbours.Switchboard` promises ---------------------------------------------------

    @property
    def switchboard(self) -> "Host":
        """What carries to other rooms."""
        return self

    def party_names(self) -> Iterable[str]:
        """The names under which parties can be reached."""
        return list(self._kinds)

    def party_name(self, name: str) -> str:
        """The one name of a party."""
        kind = self._kinds.get(name)
        if kind is None:
            raise UnknownParty(name, self._kinds)
        return kind.name

    async def waits_for(self, key: str) -> list[str]:
        """The rooms that a room waits for, each for the next."""
        found: list[str] = await self.ask_gateway(key, "waits for", None)
        return found

    async def call_room(
        self, caller: str, key: str, fields: dict[str, Any], *, in_turn: bool, settings: Settings
    ) -> list[Any]:
        """Have another room answer. Cancelled: its turn is cancelled, too."""
        cell = self._pool.cells.get(caller)
        kind = self._kinds[caller.partition("/")[0]]
        serial = in_turn and getattr(kind.cls, "concurrency", "serial") == "serial"
        answer = ["late"]
        with trio.move_on_after(settings.fetch_timeout):
            if cell is not None and cell.gate and not self._commits.holds_up(cell, running_turn()):
                # What earlier turns wrote, and who asks may have read, must not be told before it is on disk
                # (H2); that holds for a stream, too. What waits for who asks, it cannot wait for.
                stored = trio.Event()
                self._commits.after(cell, stored.set, lasting=True)  # background work outlives the gateway
                self._flush()
                await stored.wait()
            if self._pool.retiring:
                answer = ["retiring"]
            else:
                self._question = number = self._question + 1
                try:
                    answer = await self._ask(
                        [wire.CALL, number, caller, serial, key, fields, settings.fetch_bytes_max]
                    )
                except trio.Cancelled:
                    self._out.append([wire.CALL, number])
                    self._flush()
                    raise
        if answer[0] == "retiring":
            if not in_turn:
                return _RETIRING  # nobody runs it again
            if cell is not None:
                cell.abandoned = True  # the turn is not waited for, and the next host runs it again
            await trio.sleep_forever()
        return answer

    async def _is_deserted(self, key: str) -> bool:
        return not await self.ask_gateway(key, "count", [[], [], []])


def _damaged(path: Path, error: BrokerError) -> None:
    log.critical("the database of a room cannot be used", path=os.fspath(path), error=str(error))


async def serve(config: HostConfig, parties: list[Party], env: dict[str, str]) -> None:
    """Run a host until it is told to stop.

    Args:
        config: Which shards, which gateway, which settings.
        parties: The app's parties, checked.
        env: What rooms see as `room.env`.
    """
    sys.setswitchinterval(0.001)
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()  # what is loaded by now stays: no collection has to walk through it
    await Host(config, parties, env).run()
