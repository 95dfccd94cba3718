"""Group commit: the turns of a round that wrote commit together, and nothing of them leaves before.

Owns the batch that is being formed, the one that is on its way to disk, the results that wait for either, and
the outbox: with a batch's writes go the results that it releases, as a row in each store concerned: a shard,
or the own database of a room that uses SQL. So whether a turn has happened is the same question as whether
its result is in the outbox (S22). Must not know links or rooms' code. Peers: `storage` below, the host above,
which takes what `released` hands out and says what has been `executed`.

A commit that the disk refuses is kept and tried again, as it is, for as long as it takes (S36): `paused` says
why. What was committed in one store is not committed again when another store of the batch refuses. One whose
outcome is unknown ends the process: the next one finds in the outbox what was committed.

Rows of a room's own database are numbered by its shard. Nothing of a batch leaves before all its stores have
committed, and then each shard's rows leave in the order of their numbers: so whatever part of a batch is on
disk when this process ends, no row of it is older than one that has left. Alarms of these rooms are in the
shard like all others: it is told of changes behind the room's own commit, which notes them for the next host.
A room whose database cannot be opened has its results and alarms in the shard alone, so that it costs nobody
but the room: its entries are refused where they are written, and never go there.

One turn at a time has a room's own database: from its first statement until the batch that it ends up in is
on disk, since its statements are in the one transaction that this commits. The next such turn waits. Turns of
the room that end meanwhile and have not executed any (in rooms where turns overlap, or have background work)
are put off until the former has ended; then all go into one batch. So are those that end while a turn waits
that may have the database next: else a room that never stops writing would never give it away. What that turn
flushes meanwhile, in another of its tasks, is not put off, and all before it goes with it: else it would wait
for itself. Those that wait have it in the order in which they came. Background work has the database from a
statement that changes something until it flushes. When the gateway goes, and with it all turns under way,
what is put off for the sake of background work must not wait any longer, since the next gateway has to be
told of it first: the work that has the database loses the statements that it has not flushed, and is told so.

Invariants:
    H2  no result is released before all that its turn wrote, or could have read, is committed
    H3  results of a room are released in the order in which its turns ended
    H6  a result that its turn's commit releases is in the outbox from that commit until it is executed
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import trio
from cbor2 import dumps

from hibernation import wire
from hibernation.cells import Batch, Cell, Store
from hibernation.connection import Connection
from hibernation.logs import get_logger
from hibernation.staging import Beside, Turn
from storage.blame import BlameBatch
from storage.crons import CronRow
from storage.errors import BrokerError, CommitRefused, SqlError
from storage.room_database import RoomDatabase
from storage.room_databases import RoomDatabases
from storage.shards import Row, Shard, ShardBatch
from storage.writer import Writer

#: A row of the outbox is cut in two above this, if it holds several results: each link message holds whole
#: rows, and SQLite takes no more than a thousand million bytes at once.
ROW_BYTES_MAX: Final = 16 * 1024 * 1024

#: The gate of a cell whose writes are put off.
PUT_OFF: Final = -1

log = get_logger("commits")


class PutOff:
    """What turns that have ended leave to be done when another one has let go of the room's database."""

    __slots__ = ("after", "cell", "edits", "lasting", "results", "turns")

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        #: Whose writes are to be staged.
        self.turns: list[Turn] = []
        #: What leaves then, and about how many bytes its turn has staged.
        self.results: list[tuple[list[Any], int]] = []
        #: As in `Batch`.
        self.edits: list[tuple[Cell, Connection]] = []
        self.after: list[Callable[[], None]] = []
        self.lasting: list[Callable[[], None]] = []


class Commits:
    """See the module.

    Args:
        shards: The open shards of this host, by index.
        shard_count: How many the instance has.
        writer: The thread for commits.
        inline: Commit on this thread, which `durability` "os" makes cheap (S21).
        released: Given each batch whose results may leave.
        paused: Called when the disk refuses a commit, with the reason, and with None when it takes it.
        ready: Whether a batch may be committed now; if not, `end_round` is called again.
        databases: The own databases of rooms; None: no room can have one.
    """

    def __init__(
        self,
        shards: dict[int, Shard],
        shard_count: int,
        writer: Writer,
        inline: bool,
        released: Callable[[Batch], None],
        paused: Callable[[str | None], None] = lambda _: None,
        ready: Callable[[Batch], bool] = lambda _: True,
        databases: RoomDatabases | None = None,
    ) -> None:
        self._shards = shards
        self._shard_count = shard_count
        self._writer = writer
        self._inline = inline
        self._released = released
        self._on_paused = paused
        self._ready = ready
        self._forming = Batch(1)
        self._committing: Batch | None = None
        self._retry_wanted = False
        #: By shard: the newest row that has been executed, and the newest that has been deleted.
        self._executed: dict[int, int] = {}
        self._deleted: dict[int, int] = {}
        if databases is None:
            databases = RoomDatabases(os.curdir, {}, self.shard_of, durability="full")
        self._databases = databases
        self._databases.is_needed = lambda key: key in self._forming.shards or key in self._put_off
        self._databases.on_crowd = self.tidy_with_next
        #: By room: tasks that wait for its database; the turns of those that may have it, the next one first;
        #: what is put off until the turn that has it, or is the next one, has ended.
        self._waiting: dict[str, trio.lowlevel.ParkingLot] = {}
        self._wanting: dict[str, list[object]] = {}
        self._put_off: dict[str, PutOff] = {}
        self._making: set[str] = set()
        #: Rooms whose alarms have changed while their databases, which note older ones, could not be opened.
        self._outdated: set[str] = set()
        #: Rooms' databases want to be looked after with the next batch.
        self._tidy_due = False
        self.count = 0
        #: Why the disk refuses what is to be committed; None: it does not.
        self.paused: str | None = None
        # Set by the host: says that what runs has nothing to do with the end that comes; has the round end
        # soon, though no turn has ended, and not at the call; told of each commit that sets alarms, with its
        # shard and the first of their due times.
        self.absolve: Callable[[], None] = lambda: None
        self.flush_soon: Callable[[], None] = lambda: None
        self.alarms_stored: Callable[[int, int], None] = lambda _shard, _due_ms: None

    @property
    def idle(self) -> bool:
        """Whether nothing waits for the disk."""
        forming = self._forming
        return self._committing is None and not (forming.results or forming.after or forming.lasting)

    @property
    def newest(self) -> int:
        """Number of the newest batch that anything waits for; 0: nothing waits."""
        forming = self._forming
        if forming.results or forming.after or forming.lasting:
            return forming.number
        committing = self._committing
        return 0 if committing is None else committing.number

    def has_ended(self, number: int) -> bool:
        """Whether the batch with this number, and all before it, are on disk."""
        committing = self._committing
        return self._forming.number > number and (committing is None or committing.number > number)

    @property
    def writing(self) -> bool:
        """Whether a commit is under way."""
        return self._committing is not None

    @property
    def waiting_bytes(self) -> int:
        """What turns have staged that is not yet on disk, about."""
        committing = self._committing
        return self._forming.bytes + (committing.bytes if committing is not None else 0)

    def stage(self, cell: Cell, turn: Turn, whole: Turn | None = None) -> None:
        """Take over the writes of a turn that has ended well: later turns of the room read them from here.

        Args:
            whole: The turn that flushes this as a part of it, and goes on; see `let_by`.
        """
        index = cell.shard
        if index == -1 or cell.key in self._databases.own:
            index = self._find_store(cell, turn.cleared or turn.writes is not None)
        inner = turn.inner
        if inner is not None and inner.database is not None:
            if not self._stage_statements(cell, turn, inner.database):
                return
            self._stage(cell, turn, cell.shard)
        elif index == cell.key and self._is_held(cell.key, whole):
            self._put_off_to(cell).turns.append(turn)
        else:
            self._stage(cell, turn, index)
        if turn.cleared:
            cell.pending.clear()
            cell.pending_cleared = True
            cell.pending_alarms = None
            assert cell.room is not None
            cell.room._pending_cleared = True
        if turn.writes is not None:
            cell.pending.update(turn.writes)
        if turn.alarms:
            if cell.pending_alarms is None:
                cell.pending_alarms = {}
            cell.pending_alarms.update(turn.alarms)

    def _find_store(self, cell: Cell, stores_entries: bool = False) -> Store:
        """Where the room's next results go. Its own database is open then, and stays open until the batch has
        been committed, since it is needed.
        """
        if stores_entries:
            self.file_of(cell.key)  # it could be opened when they were written
        store = cell.shard = self.store_of(cell.key)
        return store

    def _stage(self, cell: Cell, turn: Turn, store: Store) -> None:
        batch = self._join(cell, store)
        assert (
            type(store) is str or cell.key not in self._databases.own or not (turn.writes or turn.cleared)
        ), "Q1"
        if turn.cleared:
            batch.clear(cell.key)
            if type(store) is str:
                assert turn.inner is not None, "see `room_storage.settle`"
                assert turn.inner.dropped, "see `room_storage.settle`"
                self._behind(cell.key).clear(cell.key)
        writes = turn.writes
        if writes is not None:
            for name, blob in writes.items():
                if blob is None:
                    batch.delete(cell.key, name)
                else:
                    batch.put(cell.key, name, blob)
        if turn.alarms:
            batch.alarming.stage(cell.key, turn.alarms)
            if type(store) is str:
                self._behind(cell.key).alarming.stage(cell.key, turn.alarms)
            elif cell.key in self._databases.own:
                self._outdated.add(cell.key)
            dues = [row.due_ms for row in turn.alarms.values() if row is not None and not row.failed]
            if dues:
                # Lasting: the batch may be kept when the gateway goes, and alarms are looked for before it is
                # on disk.
                stored = partial(self.alarms_stored, self.shard_of(cell.key), min(dues))
                self._forming.lasting.append(stored)

    def _behind(self, key: str) -> ShardBatch:
        """What the shard of a room with a database of its own is told when that has committed."""
        return self._forming.behind.setdefault(self.shard_of(key), ShardBatch())

    def _join(self, cell: Cell, store: Store) -> ShardBatch:
        """What the room does next is released by the commit that is being formed, in this store."""
        forming = self._forming
        batch = forming.shards.get(store)
        if batch is None:
            batch = forming.shards[store] = ShardBatch()
            if type(store) is str:
                forming.has_own = True
                if store in self._outdated:
                    self._outdated.discard(store)
                    _ = batch.alarming  # is noted there, empty as it is
        cell.gate = forming.number
        forming.cells.add(cell)
        return batch

    def _put_off_to(self, cell: Cell) -> PutOff:
        """What the room does next is released when another turn has had its database."""
        cell.gate = PUT_OFF
        put_off = self._put_off.get(cell.key)
        if put_off is None:
            put_off = self._put_off[cell.key] = PutOff(cell)
        return put_off

    def hold(
        self, cell: Cell, result: list[Any], edits: list[tuple[Cell, Connection]], size_bytes: int = 0
    ) -> None:
        """Keep a result until the newest writes of its room are on disk. `size_bytes`: of all its turn
        staged, about.
        """
        if cell.gate == PUT_OFF:
            put_off = self._put_off[cell.key]
            put_off.results.append((result, size_bytes))
            put_off.edits += edits
            return
        batch = self._batch_of(cell)
        batch.bytes += size_bytes
        if batch is not self._forming:
            batch.late.append(result)
        elif (results := batch.results.get(cell.shard)) is not None:
            results.append(result)
        else:
            if cell.shard not in batch.shards:
                # A turn that only asked its room's database, which could not be opened when the writes that
                # it waits for were staged: those are in the shard.
                self._join(cell, cell.shard)
            batch.results[cell.shard] = [result]
        if edits:
            batch.edits.extend(edits)

    def must_store(self, cell: Cell, whole: Turn | None = None) -> None:
        """The result that the room holds next is to be on disk before it leaves, whether or not its turn
        wrote. `whole`: see `stage`.
        """
        if cell.gate in (PUT_OFF, self._forming.number):
            return
        if cell.shard == -1 or cell.key in self._databases.own:
            self._find_store(cell)
        if cell.shard == cell.key and self._is_held(cell.key, whole):
            self._put_off_to(cell)
        else:
            self._join(cell, cell.shard)

    def after(self, cell: Cell, action: Callable[[], None], *, lasting: bool = False) -> None:
        """Call `action` when the newest writes of the room are on disk; now, if they are. Not, if the gateway
        goes before, unless it is `lasting`.
        """
        if cell.gate:
            batch = self._put_off[cell.key] if cell.gate == PUT_OFF else self._batch_of(cell)
            (batch.lasting if lasting else batch.after).append(action)
        else:
            action()

    def _batch_of(self, cell: Cell) -> Batch:
        committing = self._committing
        return committing if committing is not None and committing.number == cell.gate else self._forming

    def end_round(self) -> None:
        """Start the next commit, if there is something to commit and none is under way.

        A row on disk says that its connections have come so far. What they did before without writing must
        not be lost with this process: so a batch waits until the gateway has that (`ready`).
        """
        batch = self._forming
        if self._committing is not None or not (batch.results or batch.after or batch.lasting):
            return
        if not self._ready(batch):
            return
        self._forming = Batch(batch.number + 1)
        self._seal(batch)
        self.count += 1
        if not self._inline or (batch.has_own and self._takes_long(batch)):
            self._start(batch)
            return
        try:
            self._write(batch)
        except CommitRefused as error:
            self._refused(batch, error)
            return
        except BaseException as error:  # noqa: BLE001 - whatever it is, the outcome is unknown
            self._die(error)
        self._release(batch)
        due = {store: file for store in batch.shards if (file := self._file(store)).checkpoint_due}
        if due:
            # Long enough to be the writer thread's matter; commits wait for its end, behind an empty batch.
            self._committing = empty = Batch(0)
            if batch.has_own:
                empty.has_own = True
                for store, file in due.items():
                    if isinstance(file, RoomDatabase):
                        empty.shards[store] = ShardBatch()
                        file.busy = True
            self._writer.submit(lambda: _checkpoint(list(due.values())))

    def _seal(self, batch: Batch) -> None:
        """Nothing is added to what the batch commits: number and encode its rows."""
        databases = self._databases
        if self._tidy_due or databases.unadopted:
            self._look_after(batch)
        stores: list[Store] = list(batch.shards)
        if batch.has_own:
            # What a room did in its shard comes before what it did in its own database.
            stores.sort(key=lambda store: isinstance(store, str))
        for store in stores:
            rows: list[Row] = []
            if isinstance(store, int):
                shard = self._shards[store]
                batch.rows[store] = rows
                executed = self._executed.get(store, 0)
                if executed > self._deleted.get(store, 0):
                    batch.executed[store] = executed
            else:
                database = databases.get(store)
                database.busy = True
                shard = database.shard
                batch.own_rows[store] = rows
                if database.newest_row and (executed := self._executed.get(shard.index, 0)):
                    batch.executed[store] = executed
            if results := batch.results.get(store):
                self._encode(shard, results, rows)
        batch.results.clear()
        stores.reverse()
        batch.left = stores

    def _encode(self, shard: Shard, results: list[Any], rows: list[Row]) -> None:
        encoded = dumps(results)
        if len(encoded) > ROW_BYTES_MAX and len(results) > 1:
            half = len(results) // 2
            self._encode(shard, results[:half], rows)
            self._encode(shard, results[half:], rows)
        else:
            rows.append((shard.next_row(), encoded))

    def _takes_long(self, batch: Batch) -> bool:
        """Whether a database is to be closed, or to be filled from its shard."""
        return bool(batch.closing) or any(
            not database.complete
            for store in batch.shards
            if type(store) is str and (database := self._databases.opened(store)) is not None
        )

    def _file(self, store: Store) -> Shard | RoomDatabase:
        return self._shards[store] if isinstance(store, int) else self._databases.get(store)

    def _start(self, batch: Batch) -> None:
        self._committing = batch
        self._writer.submit(lambda: self._write(batch))

    def completed(self) -> None:
        """The writer thread has finished a commit, or a checkpoint. Let what it released leave, and then
        `end_round`.
        """
        for _, error in self._writer.completed():
            batch = self._committing
            assert batch is not None
            if isinstance(error, CommitRefused):
                if batch.number:
                    self._refused(batch, error)
                    continue
                batch.executed.clear()  # it was only the outbox, or what a shard is told; there is time
                for each in batch.shards.values():
                    each.adopted = None
            elif error is not None:
                self._die(error)
            self._committing = None
            self._release(batch)

    # --- A disk that takes nothing ----------------------------------------------------------------

    def _refused(self, batch: Batch, error: CommitRefused) -> None:
        """Nothing was written on some shard: the batch stays, and `retry` is to be called."""
        self._committing = batch
        self._retry_wanted = True
        reason = f"{error.reason}. {error.remedy}."
        if self.paused is None:
            log.error("the disk refuses a commit: rooms that wait for it pause", error=str(error))
        if self.paused != reason:
            self.paused = reason
            self._on_paused(reason)

    def retry(self) -> None:
        """Try the refused commit again, on the writer thread."""
        if self._retry_wanted:
            self._retry_wanted = False
            assert self._committing is not None
            self._start(self._committing)

    def _resume(self) -> None:
        self.paused = None
        log.info("the disk takes commits again: rooms go on")
        self._on_paused(None)

    # --- The outbox -------------------------------------------------------------------------------

    def executed(self, shard: int, row: int) -> None:
        """Rows up to this one have been executed: the next commit takes them out of the outbox."""
        if row > self._executed.get(shard, 0):
            self._executed[shard] = row

    @property
    def untidy(self) -> bool:
        """Whether executed rows are still in the outbox, or a room's database is open that need not be."""
        deleted = self._deleted
        return (
            any(row > deleted.get(shard, 0) for shard, row in self._executed.items())
            or self._databases.are_open()
            or bool(self._databases.unadopted)
        )

    def tidy(self) -> None:
        """Take executed rows out of the outbox, if no commit is under way that does it; and look after the
        own databases of rooms.
        """
        if self._committing is not None or self._forming.results:
            self.tidy_with_next()
            return
        if not self.untidy:
            return
        batch = Batch(0)
        for shard, row in self._executed.items():
            if row > self._deleted.get(shard, 0):
                batch.executed[shard] = row
                batch.shards[shard] = ShardBatch()
        self._look_after(batch)
        if batch.shards or batch.closing:
            batch.left = list(batch.shards)
            self._start(batch)

    def tidy_with_next(self) -> None:
        """Look after the own databases of rooms with the next commit."""
        self._tidy_due = self._databases.are_open()

    def _look_after(self, batch: Batch) -> None:
        """Add to a batch what the own databases of rooms want: that their shards know of them, that executed
        rows go, that those nobody needs are closed.
        """
        self._tidy_due = False
        databases = self._databases
        for key in databases.unadopted:
            batch.shards.setdefault(self.shard_of(key), ShardBatch()).adopt(key)
        forming = self._forming.shards
        for database in databases.all_open():
            key = database.key
            executed = self._executed.get(database.shard.index, 0)
            if 0 < database.newest_row <= executed and database.is_free and key not in forming:
                database.busy = batch.has_own = True
                batch.shards.setdefault(key, ShardBatch())
                batch.executed[key] = executed
        batch.closing = databases.closable([*forming, *batch.shards])
        batch.has_own = batch.has_own or bool(batch.closing)

    def close(self) -> None:
        """At a clean end, when the writer has ended: take executed rows out of the outbox, if the disk lets
        us.
        """
        for shard, row in self._executed.items():
            if row > self._deleted.get(shard, 0):
                with contextlib.suppress(CommitRefused):
                    self._shards[shard].commit(ShardBatch(), (), row)
        # What was cancelled with this process must not be committed with them, nor what was put off for it.
        self._put_off.clear()
        self._databases.abandon_turns()
        for database in self._databases.all_open():
            executed = self._executed.get(database.shard.index, 0)
            if 0 < database.newest_row <= executed and database.is_free:
                with contextlib.suppress(CommitRefused):
                    database.commit(ShardBatch(), (), executed)

    # --- Own databases of rooms -------------------------------------------------------------------

    def store_of(self, key: str) -> Store:
        """Where what a room leaves is stored: the index of its shard, or its key, if it has a database of its
        own, and that can be opened.
        """
        databases = self._databases
        if key in databases.own:
            try:
                databases.get(key)
            except BrokerError:  # which the room is told when it uses its storage
                return self.shard_of(key)
            return key
        return self.shard_of(key)

    def file_of(self, key: str) -> Shard | RoomDatabase:
        """What to read a room's committed entries from.

        Raises:
            DataDirectoryError: the room's own database cannot be used.
        """
        own = self._databases.own
        if own and key in own:
            return self._databases.get(key)
        return self._shards[self.shard_of(key)]

    async def own_database(
        self, cell: Cell, turn: object, may_have: Callable[[], bool] = lambda: True
    ) -> RoomDatabase:
        """The room's own database, made if it has none, for this turn alone until that has ended. Waits until
        what turns before it have staged there is on disk, and for whoever else has the database, or came
        before.

        Args:
            may_have: Whether the turn may have it now; if not, `look_again` has to be called some time.

        Raises:
            DataDirectoryError: it cannot be made, or used.
        Cancellation:
            Leaves nothing behind but perhaps an empty file.
        """
        key = cell.key
        databases = self._databases
        in_line = False
        try:
            while True:
                database = databases.get(key) if key in databases.own else databases.opened(key)
                if database is not None and database.holder is turn:
                    return database
                if not in_line and may_have():
                    in_line = True
                    self._wanting.setdefault(key, []).append(turn)
                if in_line and self._wanting[key][0] is turn and key not in self._making:
                    if database is None:
                        await self._make(key)
                        continue
                    if database.is_free and key not in self._forming.shards:
                        database.begin(turn, lambda: self._freed(cell))
                        return database
                await self._park(key)
        finally:
            if in_line:
                self._leave_line(cell, turn)

    def _leave_line(self, cell: Cell, turn: object) -> None:
        """A turn has got the room's database, or does not want it any more."""
        line = self._wanting[cell.key]
        line.pop(next(place for place, each in enumerate(line) if each is turn))
        if not line:
            del self._wanting[cell.key]
        database = self._databases.opened(cell.key)
        if database is not None and database.holder is not None:
            self.look_again(cell.key)
        else:
            self._freed(cell)  # not for the next one in line: who flushes may be waiting in it, see `let_by`

    async def database_to_clear(
        self, cell: Cell, turn: object, may_have: Callable[[], bool] = lambda: True
    ) -> RoomDatabase | None:
        """As `own_database`, for a turn that deletes all and is about to end: behind those that have to end
        before it. None: turns that have ended have left no tables. Those of one that is under way, and makes
        the first ones, come later.
        """
        while not may_have():
            await self._park(cell.key)
        if cell.key in self._databases.own or cell.shard == cell.key:
            return await self.own_database(cell, turn)
        return None

    async def _park(self, key: str) -> None:
        await self._waiting.setdefault(key, trio.lowlevel.ParkingLot()).park()

    async def _make(self, key: str) -> None:
        self._making.add(key)
        try:
            self._databases.add(await trio.to_thread.run_sync(self._databases.make, key))
        finally:
            self._making.discard(key)
            self.look_again(key)

    def _stage_statements(self, cell: Cell, turn: Turn, database: RoomDatabase) -> bool:
        """The turn that has executed statements has ended. False: nothing of it has to be committed."""
        changed = database.end()
        if changed:
            cell.shard = cell.key  # from now on, whether it was before or not
        return changed or bool(turn.writes) or bool(turn.alarms) or turn.cleared

    def _is_held(self, key: str, turn: object) -> bool:
        """Whether another turn than this one has the room's database, or is the next to have it."""
        database = self._databases.opened(key)
        if database is not None and database.holder is not None:
            return True
        line = self._wanting.get(key)
        return line is not None and line[0] is not turn

    def _is_next(self, key: str, turn: object) -> bool:
        """Whether no turn has the room's database, and this one is the next to have it."""
        return key in self._wanting and not self._is_held(key, turn)

    def let_by(self, cell: Cell, turn: Turn) -> None:
        """A turn is about to flush a part. If it is the next to have the room's database, as another of its
        tasks waits for that, nothing stays put off until then: the part has to leave behind what is, and
        before the turn can let go of the database.
        """
        if cell.gate == PUT_OFF and self._is_next(cell.key, turn):
            self._freed(cell)

    def _freed(self, cell: Cell) -> None:
        """The turn that had the room's database, or was to have it, has ended, well or not: what was put off
        goes on.
        """
        put_off = self._put_off.pop(cell.key, None)
        if put_off is not None:
            forming = self._forming
            self._join(cell, cell.shard)
            for turn in put_off.turns:
                self._stage(cell, turn, cell.shard)
            for result, size_bytes in put_off.results:
                self.hold(cell, result, [], size_bytes)
            forming.edits += put_off.edits
            forming.after += put_off.after
            forming.lasting += put_off.lasting
            # Whoever has let go may go on for long, and wait for the commit of this with its next statement.
            self.flush_soon()
        self.look_again(cell.key)

    def look_again(self, key: str) -> None:
        """Let those who wait for a room's database look again."""
        if self._waiting and (lot := self._waiting.pop(key, None)) is not None:
            lot.unpark_all()

    def _release_own(self, batch: Batch) -> None:
        """What a batch did in own databases of rooms is on disk."""
        databases = self._databases
        for store in batch.shards:
            if isinstance(store, str):
                database = databases.get(store)
                database.busy = database.staged = False
                if store not in databases.own:
                    databases.has_moved(store)
                if rows := batch.own_rows.get(store):
                    batch.rows.setdefault(database.shard.index, []).extend(rows)
        for rows in batch.rows.values():
            rows.sort()

    def abandon_turns(self) -> None:
        """The gateway has gone, and with it all turns under way, but no background work. What turns that have
        ended did stays: their statements with the batch that they are in, and what is put off goes into the
        one that is being formed, which the next gateway waits for.
        """
        for database in list(self._databases.all_open()):
            holder = database.holder
            if isinstance(holder, Beside):
                if database.key in self._put_off:
                    assert holder.inner is not None
                    holder.inner.lose(_lost())
                    database.undo()
            elif holder is not None:
                database.undo()
        for put_off in list(self._put_off.values()):
            self._freed(put_off.cell)  # only background work is left of those that wait for a database

    def holds_up(self, cell: Cell, turn: object) -> bool:
        """Whether what the room waits for is put off until this turn has had the room's database."""
        if cell.gate != PUT_OFF:
            return False
        database = self._databases.opened(cell.key)
        if database is not None and database.holder is not None:
            return database.holder is turn
        return self._is_next(cell.key, turn)

    # --- What ended hosts -------------------------------------------------------------------------

    def blaming(self, index: int) -> BlameBatch:
        """The changes of suspects, dead letters and quarantine that the next commit of this shard takes."""
        forming = self._forming
        batch = forming.shards.get(index)
        if batch is None:
            batch = forming.shards[index] = ShardBatch()
        return batch.blaming

    def blaming_of(self, cell: Cell) -> BlameBatch:
        """The same for this room: results of it wait for that commit."""
        blaming = self.blaming(self.shard_of(cell.key))
        self.must_store(cell)
        return blaming

    def claim_tick(self, index: int, row: CronRow, action: Callable[[CronRow], None] | None) -> None:
        """Have the next commit of this shard say that a tick of a cron is run; then call `action`, if there
        is one, also when the gateway has gone meanwhile.
        """
        forming = self._forming
        batch = forming.shards.get(index)
        if batch is None:
            batch = forming.shards[index] = ShardBatch()
        batch.crons[row.name] = row
        if action is None:
            forming.after.append(_nothing)
        else:
            forming.lasting.append(partial(action, row))

    def when_stored(self, action: Callable[[], None]) -> None:
        """Call `action` when all that has been staged is on disk; the commit begins with the next round."""
        self._forming.after.append(action)

    def forget(self) -> None:
        """The gateway has gone. Results stay, and leave when they are on disk; nobody waits for anything
        else.
        """
        for batch in (self._forming, self._committing):
            if batch is not None:
                batch.edits.clear()
                batch.after.clear()
        for put_off in self._put_off.values():
            put_off.edits.clear()
            put_off.after.clear()

    def shard_of(self, key: str) -> int:
        """The shard that holds a room's storage."""
        return wire.partition_of(key) % self._shard_count

    def _write(self, batch: Batch) -> None:
        left = batch.left
        while left:
            store = left[-1]
            rows = batch.rows.get(store) if isinstance(store, int) else batch.own_rows.get(store)
            self._file(store).commit(batch.shards[store], rows or (), batch.executed.get(store, 0))
            left.pop()
        for index in list(batch.behind):
            self._shards[index].commit(batch.behind[index])
            del batch.behind[index]
        for database in batch.closing:
            database.close_unless_wanted()

    def _release(self, batch: Batch) -> None:
        for store, row in batch.executed.items():
            if isinstance(store, int):
                self._deleted[store] = row
        if self.paused is not None and batch.number:
            self._resume()
        for cell in batch.cells:
            if cell.gate == batch.number:
                cell.gate = 0
                cell.pending.clear()
                cell.pending_cleared = False
                cell.pending_alarms = None
                if cell.room is not None:
                    cell.room._pending_cleared = False
        if batch.has_own:
            self._release_own(batch)
        if self._databases.unadopted:
            for each in batch.shards.values():
                self._databases.unadopted -= each.adopted or set()
        self._released(batch)
        for action in (*batch.lasting, *batch.after):
            action()
        if batch.closing:
            for database in batch.closing:
                self._databases.close_has_ended(database)
                self.look_again(database.key)
        if self._waiting:
            for cell in batch.cells:
                self.look_again(cell.key)
            for store in batch.shards:
                if type(store) is str:
                    self.look_again(store)

    def _die(self, error: BaseException) -> None:
        """End this host: the outcome is unknown, so nothing may leave. The next one reads the outbox:
        what is in it was committed, and every other event that was not acknowledged is delivered to it again.
        No turn is to blame (S23).
        """
        self.absolve()
        log.critical("commit failed: this host ends, its events are delivered again", error=repr(error))
        os._exit(os.EX_IOERR)


def _nothing() -> None:
    """What is to be done when something has been stored for whoever comes next."""


def _lost() -> SqlError:
    return SqlError(
        "",
        "the gateway has gone while background work had the room's database and turns waited for that: "
        "its statements are undone",
        "Flush right behind statements, and run them again after this error",
    )


def _checkpoint(shards: list[Shard | RoomDatabase]) -> None:
    for shard in shards:
        shard.checkpoint()
