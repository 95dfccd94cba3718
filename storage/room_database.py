"""The own database of a room that uses SQL: its entries, its outbox rows, and the tables of its code.

Owns one file, `rooms/<shard>/<hash of the room's key>.db`, made when the room's code calls `storage.sql` for
the first time. From then on everything of the room is here and nothing in its shard, since SQLite is atomic
per file. To whoever commits it looks like a `Shard`: the same `get`, `list`, `rows` and `commit`. Rows take
their numbers from the shard, so that those of all its rooms stay one series. Peers: `storage.shards`, and
`hibernation.commits`, which says who may use it when. Must not know turns beyond that.

The writing connection is used by one at a time: by the turn that has it (`begin` to `end` or `undo`), on the
loop thread, whose statements stay in an open transaction; then by `commit`, on the thread that commits, which
adds entries and rows and ends that transaction. Reads of entries go over the reading connection, at any time.

What a turn has executed is noted until it is committed. SQLite sometimes undoes a whole transaction where one
statement has failed (lang_transaction.html, "Response To Errors Within A Transaction"), and always when a
COMMIT fails: then it is executed again, and must give what it gave before.

Invariants:
    Q1  a room's entries and rows are in its own file if and only if `_broker_facts` there names the room
    Q2  what Q1 says of a file that is not open, and has no log (`-wal`), the shard says too, in
        `own_databases`; and its outbox is empty
    Q3  `commit` and a turn never use the writing connection at once
    Q4  the open transaction holds what `_noted` lists, and nothing else
    Q5  what `_broker_facts` notes of alarms, the shard has been told before the next commit here, and before
        the file is closed
    Q6  no foreign key waits for the COMMIT, which could tell nobody of what it finds: none is INITIALLY
        DEFERRED
"""

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import Any, Final

from cbor2 import dumps, loads

from storage.alarms import AlarmRow
from storage.database import (
    CHECKPOINT_PAGES,
    RESERVE_BYTES,
    DatabaseFile,
    RowStatement,
    open_database,
    translate,
)
from storage.errors import (
    CommitRefused,
    CommitUnknown,
    DatabaseDamaged,
    DataDirectoryError,
    GenerationPassed,
    SqlError,
    StorageLimitError,
)
from storage.migrations import ROOM
from storage.shards import (
    INLINE_CHECKPOINT_BYTES,
    INLINE_WAL_BYTES_MAX,
    Durability,
    Entries,
    Row,
    Shard,
    ShardBatch,
    select_many,
    select_range,
)
from storage.sql_guard import CELL_BYTES_MAX, INTERNAL, STATEMENT_BYTES_MAX, Guard, Value, at_once, bind

#: Size that a room's tables may grow to by its statements, unless something else is said.
DATABASE_BYTES_MAX: Final = 1024 * 1024 * 1024
#: What a result takes in memory, about, beside its texts and blobs.
ROW_OVERHEAD_BYTES: Final = 64
VALUE_OVERHEAD_BYTES: Final = 16

#: Page caches of the two connections.
WRITER_CACHE_KIB: Final = 1024
READER_CACHE_KIB: Final = 128
#: A row of the outbox may be larger than what rooms may store.
_LENGTH_MAX: Final = 1_000_000_000
_PAGE_BYTES: Final = 4096
_PAGES_MAX: Final = 1_073_741_823
#: Steps of SQLite's virtual machine between two looks at the clock.
_STEPS: Final = 10_000
#: Statements of which it is remembered that they only read.
_KNOWN_MAX: Final = 512

_FACTS = "SELECT room, generation FROM _broker_facts"
_ALARMS = "SELECT alarms FROM _broker_facts"
_NOTE_ALARMS = "UPDATE _broker_facts SET alarms = ?"
_OWN = "UPDATE _broker_facts SET room = ?, generation = ?"
_ROWS = "SELECT seq, items FROM _broker_outbox ORDER BY seq"
_GET = "SELECT value FROM _broker_entries WHERE key = ?"
_DEFINITIONS = "SELECT rowid, sql FROM sqlite_schema WHERE type = 'table' AND sql LIKE '%initially%'"
_DEFINE = "UPDATE sqlite_schema SET sql = ? WHERE rowid = ?"
_FOREIGN_KEYS = """
    SELECT child.name, reference."table"
    FROM sqlite_schema AS child JOIN pragma_foreign_key_list(child.name) AS reference
    WHERE child.type = 'table'
"""
_FORGET_ROWS = "DELETE FROM _broker_outbox WHERE seq <= ?"
_ADD_ROW = "INSERT INTO _broker_outbox (seq, items) VALUES (?, ?)"
_DELETE = RowStatement("DELETE FROM _broker_entries WHERE key IN (", "?", ")")
_PUT = RowStatement("REPLACE INTO _broker_entries (key, value) VALUES", "(?, ?)")

#: What the text of every statement of the room's code ends with, and that of none of ours (`sql_guard`).
_THEIRS: Final = "\n--"
_RETURNING: Final = re.compile(r"\breturning\b", re.IGNORECASE)
#: Stands among the statements of a turn for "all tables went".
_DROP: Final = ""
#: What is told to have failed when tables do not go.
_DROPPING: Final = "DROP TABLE"

Noted = tuple[str, tuple[Value, ...], int]
"""A statement that was executed, its parameters, and the hash of what it gave."""


class RoomDatabase:
    """One room's own database, open for this process alone.

    Args:
        directory: the data directory.
        shard: the room's shard, open.
        room_key: "party/id".
        durability: see `storage.shards.Shard`.
        bytes_max: size that the room's statements may let it grow to.
        reserve_bytes: free space below which commits are refused.
        create: make the file if there is none.

    Raises:
        DataDirectoryError: it is missing, or cannot be used.
        DatabaseDamaged: it is no database, or another room's.
        SchemaTooNew, DataDirectoryInUse: see `storage.database.open_database`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        shard: Shard,
        room_key: str,
        *,
        durability: Durability,
        bytes_max: int = DATABASE_BYTES_MAX,
        reserve_bytes: int = RESERVE_BYTES,
        create: bool = False,
    ) -> None:
        self.key = room_key
        self.shard = shard
        self.durability = durability
        self.bytes_max = bytes_max
        path = database_path(directory, shard.index, room_key)
        if not create and not path.exists():
            raise DataDirectoryError(
                path, f"the database of room {room_key!r} is missing", "Restore it from a backup"
            )
        self._file = DatabaseFile(
            path,
            ROOM,
            synchronous="full",
            cache_kib=WRITER_CACHE_KIB,
            read_cache_kib=READER_CACHE_KIB,
            checkpoint_pages=CHECKPOINT_PAGES if durability == "full" else 0,
            reserve_bytes=reserve_bytes,
        )
        #: The turn that has the writing connection; None: no turn has.
        self.holder: object | None = None
        self._freed: Callable[[], None] = _nothing
        #: A turn that had it has ended, and its statements are not committed yet.
        self.staged = False
        #: The thread that commits has it, or is about to.
        self.busy = False
        #: It is about to be closed, on the thread that commits; it was; and it must not be.
        self.closing = self.is_closed = self._wanted = False
        self._gate = threading.Lock()
        #: When something of it was last needed, on the monotonic clock.
        self.used_at = monotonic()
        #: The newest row in the outbox; 0: it is empty.
        self.newest_row = 0
        self._guard = Guard()
        #: What the open transaction has executed, and where in that its inner transactions begin.
        self._noted: list[Noted] = []
        self._inner: list[int] = []
        self._lost: SqlError | None = None
        self._maintains = False
        self._changes = self._version = 0
        self._known_reading: set[str] = set()
        try:
            self._prepare()
        except BaseException:
            self._file.close()
            raise

    def _prepare(self) -> None:
        writer = self._file.writer
        try:
            found = writer.execute(_FACTS).fetchall()
            # Sorting may take more than memory; and foreign keys are what people expect.
            for pragma in ("temp_store = file", "foreign_keys = on"):
                writer.execute(f"PRAGMA {pragma}").fetchall()
        except sqlite3.Error as error:
            raise translate(error, self.path, opening=True) from error
        if len(found) != 1 or found[0][0] not in ("", self.key):
            raise DatabaseDamaged(self.path, f"it is not the database of room {self.key!r}")
        self._look_at_foreign_keys()
        #: Q1. The first commit, which makes it so, is as durable as can be: only behind it do entries leave
        #: the shard.
        self.complete = found[0][0] == self.key
        if self.complete and self.durability == "os":
            self._file.set_synchronous("normal")
        writer.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, CELL_BYTES_MAX)
        writer.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, STATEMENT_BYTES_MAX + len(_THEIRS))
        writer.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        writer.set_authorizer(self._guard.authorize)
        writer.set_progress_handler(self._guard.is_too_late, _STEPS)
        if rows := self.rows():
            self.newest_row = rows[-1][0]

    def _look_at_foreign_keys(self) -> None:
        """See to Q6 in a file from elsewhere: the guard lets no room make such a thing. What changes is in
        the schema alone (lang_altertable.html, section 7): rows are as they were.
        """
        writer = self._file.writer
        try:
            changed = [
                (definition, row)
                for row, found in writer.execute(_DEFINITIONS).fetchall()
                if (definition := at_once(found)) != found
            ]
            if not changed:
                return
            with self._file.transaction(keep_reserve=False):
                [(version,)] = writer.execute("PRAGMA schema_version").fetchall()
                writer.execute("PRAGMA writable_schema = on").fetchall()
                try:
                    writer.executemany(_DEFINE, changed)
                    writer.execute(f"PRAGMA schema_version = {version + 1:d}").fetchall()
                finally:
                    writer.execute("PRAGMA writable_schema = off").fetchall()
            writer.execute("PRAGMA writable_schema = reset").fetchall()  # this connection reads it anew
        except (sqlite3.Error, CommitRefused) as error:
            raise DataDirectoryError(
                self.path,
                f"a foreign key in it is INITIALLY DEFERRED, and that cannot be changed: {error}",
                "Make the table anew without that, or free some space",
            ) from error

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._file.path

    # --- As a shard -------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Give the outbox as it is on disk, in the order of the commits."""
        return self._file.read(_ROWS)

    def tell_alarms(self, batch: ShardBatch) -> None:
        """Add the last changes of the room's alarms to what its shard is told: whoever committed them may not
        have come to that. What the shard knows already, it may be told again.
        """
        [(noted,)] = self._file.read(_ALARMS)
        if noted is not None:
            cleared, changes = loads(noted)
            if cleared:
                batch.clear(self.key)
            rows = {name: None if row is None else AlarmRow(*row) for name, row in changes}
            if rows:
                batch.alarming.stage(self.key, rows)

    def get(self, _room_key: str, key: str) -> bytes | None:
        """Give the committed value of one key, or None."""
        row = self._file.read(_GET, (key,))
        return row[0][0] if row else None

    def get_many(self, _room_key: str, keys: Iterable[str]) -> dict[str, bytes]:
        """Give the committed values of `keys`, in their order, without the missing ones."""
        return select_many(self._file, "SELECT key, value FROM _broker_entries WHERE key IN (", (), keys)

    def commit(self, batch: ShardBatch, rows: Sequence[Row] = (), executed: int = 0) -> None:
        """Write a batch, and what the turn that has ended has executed, in one transaction.

        The first commit takes the room's entries over from the shard. On one thread at a time, and not while
        a turn has the connection (Q3). Args and Raises: as `Shard.commit`.
        """
        writer = self._file.writer
        size = batch.bytes + sum([len(items) for _, items in rows])
        if batch.alarms:
            size += batch.alarms.bytes
        moves = not self.complete
        if moves:
            size += self.shard.bytes_of(self.key)
        self.shard.require_generation()
        begun = writer.in_transaction
        try:
            with self._file.transaction(size, begun=begun):
                # What the room's code may not exceed has been looked at by now.
                writer.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LENGTH_MAX)
                self._allow_pages(_PAGES_MAX)
                if self._noted and not begun:
                    self._execute_again(self._noted, ())
                self._write(writer, batch, rows, executed, moves)
        except DatabaseDamaged as error:
            self._file.suspect(error.reason)
            raise
        finally:
            writer.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, CELL_BYTES_MAX)
        self._forget()
        if rows:
            self.newest_row = rows[-1][0]
        elif executed >= self.newest_row:
            self.newest_row = 0
        if moves:
            self.complete = True
            if self.durability == "os":
                self._file.set_synchronous("normal")
        if self.durability == "os" and self._file.wal_bytes >= INLINE_WAL_BYTES_MAX:
            self._file.checkpoint()

    def _write(
        self, writer: sqlite3.Connection, batch: ShardBatch, rows: Sequence[Row], executed: int, moves: bool
    ) -> None:
        [(_, generation)] = writer.execute(_FACTS).fetchall()
        if generation > self.shard.generation:
            raise GenerationPassed(self.path, self.shard.generation, generation)
        if moves or generation < self.shard.generation:
            writer.execute(_OWN, (self.key, self.shard.generation))
        cleared = self.key in batch.cleared
        if cleared or batch.alarms is not None:
            changes = batch.alarms.rooms.get(self.key, {}) if batch.alarms else {}
            writer.execute(_NOTE_ALARMS, (dumps([cleared, list(changes.items())]),))
        if moves and not cleared:
            for entries in self.shard.all_of(self.key):
                _PUT.run(writer, entries)
        if executed:  # first: what they leave is what the new ones take
            writer.execute(_FORGET_ROWS, (executed,))
        for row in rows:
            writer.execute(_ADD_ROW, row)
        if cleared:
            writer.execute("DELETE FROM _broker_entries")
        written = batch.rooms.get(self.key)
        if written:
            names = sorted(written) if len(written) > 1 else list(written)
            _DELETE.run(writer, [(name,) for name in names if written[name] is None])
            _PUT.run(writer, [(name, value) for name in names if (value := written[name]) is not None])

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log."""
        return self._file.wal_bytes

    @property
    def checkpoint_due(self) -> bool:
        """See `Shard.checkpoint_due`."""
        return self.durability == "os" and self._file.wal_bytes >= INLINE_CHECKPOINT_BYTES

    def checkpoint(self) -> None:
        """Carry the log over into the file. On the thread that commits."""
        self._file.checkpoint()

    def check(self) -> None:
        """Read the whole file; raises DatabaseDamaged if it is inconsistent. Not on a loop thread."""
        self._file.check()

    def close(self, *, keep_log: bool = False) -> None:
        """Close and release the file, and with it its log (Q2), unless that is to be kept. What is not
        committed is lost. Idempotent.
        """
        self.is_closed = True
        self._file.close(keep_log=keep_log)

    def close_unless_wanted(self) -> None:
        """Close it on the thread that commits, unless `reclaim` came before."""
        with self._gate:
            if not self._wanted:
                self.close()
            self._wanted = False

    def reclaim(self) -> bool:
        """On the loop thread: prevent `close_unless_wanted`. False: it has been closed, or is just now."""
        with self._gate:
            self._wanted = not self.is_closed
            return self._wanted

    # --- What a turn does with it -----------------------------------------------------------------

    @property
    def is_free(self) -> bool:
        """Whether a turn may have the writing connection (Q3)."""
        return self.holder is None and not self.staged and not self.busy

    def begin(self, turn: object, freed: Callable[[], None]) -> None:
        """The turn has the writing connection from now on; `freed` is called when it has it no more."""
        assert self.is_free, "Q3"
        self.holder = turn
        self._freed = freed
        self.used_at = monotonic()

    def end(self) -> bool:
        """The turn has ended well. Gives whether it has changed anything here, or makes the room's storage
        move here: then `commit` is due.

        Raises:
            SqlError: see `require_whole`.
        """
        self.require_whole()
        writer = self._file.writer
        self.staged = self._has_changed()
        if not self.staged:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            self._forget()
        self._free()
        return self.staged

    def require_whole(self) -> None:
        """Raise SqlError if what the turn did is lost: it was told so, and went on. It cannot end well."""
        if self._lost is not None:
            raise self._lost

    def end_unchanged(self) -> bool:
        """End the turn's use if it has changed nothing here. False: it has."""
        if self._lost is not None or self._has_changed():
            return False
        self.end()
        return True

    def _free(self) -> None:
        freed, self._freed = self._freed, _nothing
        self.holder = None
        freed()

    def _has_changed(self) -> bool:
        writer = self._file.writer
        return writer.in_transaction and (
            self._maintains
            or writer.total_changes != self._changes
            or self._schema_version() != self._version
        )

    def undo(self) -> None:
        """Nothing of what the turn did here has been, whether it has ended or not."""
        self._lost = None
        self.staged = False
        writer = self._file.writer
        try:
            if not self.is_closed and writer.in_transaction:
                writer.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise self._file.failed(error) from error
        finally:
            self._forget()
            self._free()

    def leave(self, depth: int, *, keep: bool) -> None:
        """The inner transaction at this depth has ended, 1 being the outermost: keep what was done in it, or
        undo it.
        """
        inner = self._inner
        if len(inner) < depth or self._lost is not None:
            return  # nothing was done in it
        writer = self._file.writer
        name = f"_broker_{depth}"
        try:
            if not keep:
                writer.execute(f"ROLLBACK TO {name}")
                del self._noted[inner[-1] :]
            writer.execute(f"RELEASE {name}")
        except sqlite3.Error as error:
            raise self._file.failed(error) from error
        inner.pop()

    def drop_tables(self, depth: int, seconds: float) -> None:
        """Remove whatever the room's code has created, as a part of the turn.

        Args:
            depth: how many inner transactions are open.
            seconds: how long it may take.

        Raises:
            SqlError: something cannot be removed, or it takes too long; all is as it was.
        """
        self._enter(depth)
        writer = self._file.writer
        try:
            writer.execute("SAVEPOINT _broker_statement")
            self._guard.limit(seconds)
            try:
                self._drop_tables()
            finally:
                self._guard.end()
            writer.execute("RELEASE _broker_statement")
        except sqlite3.Error as error:
            if not self._restore_if_lost():
                writer.execute("ROLLBACK TO _broker_statement")
                writer.execute("RELEASE _broker_statement")
            raise self._explain(error, _DROPPING, seconds) from error
        self._noted.append((_DROP, (), 0))

    def execute(
        self, statement: str, parameters: Sequence[Any], *, depth: int, bytes_max: int, seconds: float
    ) -> "list[dict[str, Value]]":
        """Run one statement of the room's code.

        Args:
            statement: one statement of SQL.
            parameters: what its "?" stand for: None, int, float, str or bytes.
            depth: how many inner transactions are open.
            bytes_max: largest result.
            seconds: how long it may take.

        Returns:
            The rows of its result, as dicts. Of two columns with one name the last counts.

        Raises:
            SqlError: it is refused, has failed, or takes too long.
            StorageLimitError: it, a parameter, its result or the database is too large.
            In each case nothing of it is left.
        """
        values = bind(statement, parameters)
        if self._lost is not None:
            raise self._lost
        writer = self._file.writer
        whole = False
        if statement not in self._known_reading:
            self._enter(depth)
            if _RETURNING.search(statement) is not None:
                # Its changes are all made before it gives its first row; and the rows may be too many.
                writer.execute("SAVEPOINT _broker_statement")
                whole = True
        try:
            names, rows = self._run(statement, values, bytes_max, seconds)
        except (sqlite3.Error, sqlite3.Warning) as error:
            if self._restore_if_lost():
                whole = False
            raise self._explain(error, statement, seconds) from error
        except BaseException:
            if whole:
                writer.execute("ROLLBACK TO _broker_statement")
            raise
        finally:
            if whole:
                writer.execute("RELEASE _broker_statement")
        guard = self._guard
        if writer.in_transaction:
            self._noted.append((statement, values, hash(tuple(rows))))
            self._maintains = self._maintains or guard.maintains
        if guard.asked and not guard.writes:
            if len(self._known_reading) >= _KNOWN_MAX:
                self._known_reading.clear()
            self._known_reading.add(statement)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _run(
        self, statement: str, values: tuple[Value, ...], bytes_max: int, seconds: float
    ) -> "tuple[list[str], list[tuple[Value, ...]]]":
        self._guard.begin(statement, seconds)
        try:
            cursor = self._file.writer.execute(statement + _THEIRS, values)
            if cursor.description is None:
                return [], []
            found = []
            size = 0
            for row in cursor:
                size += ROW_OVERHEAD_BYTES + VALUE_OVERHEAD_BYTES * len(row)
                for value in row:
                    if type(value) is str or type(value) is bytes:
                        size += len(value)
                if size > bytes_max:
                    cursor.close()
                    raise StorageLimitError(
                        "the result of a statement (bytes)",
                        size,
                        bytes_max,
                        "Ask for less, with LIMIT; `turn_bytes_max` allows more",
                    )
                found.append(row)
            return [column[0] for column in cursor.description], found
        finally:
            self._guard.end()

    # --- The open transaction ---------------------------------------------------------------------

    def _enter(self, depth: int) -> None:
        """Begin what is not begun: the transaction, and the inner ones."""
        writer = self._file.writer
        try:
            if not writer.in_transaction:
                assert not self._noted, "Q4"
                self._begin()
            while len(self._inner) < depth:
                writer.execute(f"SAVEPOINT _broker_{len(self._inner) + 1}")
                self._inner.append(len(self._noted))
        except sqlite3.Error as error:
            raise self._file.failed(error) from error

    def _begin(self) -> None:
        writer = self._file.writer
        self._allow_pages(self.bytes_max // _PAGE_BYTES)
        writer.execute("BEGIN IMMEDIATE")
        self._maintains = False
        self._changes = writer.total_changes
        self._version = self._schema_version()

    def _restore_if_lost(self) -> bool:
        """If a failed statement has taken the transaction with it, execute again what came before (Q4). Gives
        whether it has.
        """
        if self._is_open():
            return False
        noted, inner = self._noted, self._inner
        if not noted and not inner:
            return True
        maintains = self._maintains
        try:
            self._begin()
            self._execute_again(noted, inner)
        except (sqlite3.Error, CommitUnknown) as error:
            self._lost = SqlError(
                noted[0][0] if noted else "SAVEPOINT",
                f"SQLite has undone what the turn had executed, and it cannot be repeated: {error}",
                "Let the turn fail: nothing of it is stored",
            )
            if self._is_open():
                self._file.writer.execute("ROLLBACK")
        self._maintains = maintains
        return True

    def _is_open(self) -> bool:
        return self._file.writer.in_transaction

    def _execute_again(self, noted: Sequence[Noted], inner: Sequence[int]) -> None:
        """Execute what was executed before; raises CommitUnknown if it does not give what it gave then."""
        writer = self._file.writer
        begun = 0
        for index, (statement, values, result) in enumerate(noted):
            while begun < len(inner) and inner[begun] == index:
                begun += 1
                writer.execute(f"SAVEPOINT _broker_{begun}")
            if statement is _DROP:
                self._drop_tables()
            elif hash(tuple(writer.execute(statement + _THEIRS, values).fetchall())) != result:
                raise CommitUnknown(self.path, "what was executed again had another result")
        while begun < len(inner):
            begun += 1
            writer.execute(f"SAVEPOINT _broker_{begun}")

    def _drop_tables(self) -> None:
        writer = self._file.writer
        writer.execute("PRAGMA defer_foreign_keys = on").fetchall()
        try:
            self._drop_in_order(writer)
        finally:
            # Else it holds until the COMMIT, which is too late for what the turn does next.
            if writer.in_transaction:
                writer.execute("PRAGMA defer_foreign_keys = off").fetchall()

    def _drop_in_order(self, writer: sqlite3.Connection) -> None:
        order = {"trigger": 0, "view": 1, "virtual": 2, "table": 3}
        while True:
            found = writer.execute(
                "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL"
            ).fetchall()
            place = {name: number for number, name in enumerate(_children_first(writer))}
            theirs = sorted(
                [
                    (
                        order["virtual" if sql[:14].upper() == "CREATE VIRTUAL" else kind],
                        place.get(name, len(place)),
                        kind,
                        name,
                    )
                    for kind, name, sql in found
                    if kind != "index" and name not in INTERNAL and not name.startswith("sqlite_")
                ]
            )
            if not theirs:
                return
            dropped = 0
            refusal: sqlite3.Error | None = None
            for _, _, kind, name in theirs:
                quoted = name.replace('"', '""')
                try:
                    writer.execute(f'DROP {kind} IF EXISTS "{quoted}"')
                    dropped += 1
                except sqlite3.Error as error:  # a foreign key that restricts, or a part of a virtual table
                    if not writer.in_transaction:
                        raise  # all is undone, and nothing may be done beside a transaction
                    refusal = error
            if not dropped:
                assert refusal is not None
                raise refusal

    def _forget(self) -> None:
        self._noted.clear()
        self._inner.clear()
        self._maintains = False

    def _allow_pages(self, count: int) -> None:
        self._file.writer.execute(f"PRAGMA max_page_count = {count:d}").fetchall()

    def _schema_version(self) -> int:
        return int(self._file.writer.execute("PRAGMA schema_version").fetchall()[0][0])

    # --- Errors -----------------------------------------------------------------------------------

    def _explain(self, error: sqlite3.Error | sqlite3.Warning, statement: str, seconds: float) -> Exception:
        """Give the error that the room's code is told of a failed statement."""
        if self._guard.refused is not None:
            reason, remedy = self._guard.refused
            return SqlError(statement, reason, remedy)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        name = getattr(error, "sqlite_errorname", "")
        if code == sqlite3.SQLITE_INTERRUPT:
            remedy = "Give it an index or a LIMIT, or split it"
            if statement is _DROPPING:
                remedy = "Give each foreign key an index"
            return SqlError(
                statement,
                f"it took longer than {seconds:g} s, and all rooms of its host had to wait",
                f"{remedy}; `sql_timeout` allows more",
                code=name,
            )
        if code == sqlite3.SQLITE_FULL:
            return self._is_full(statement, name)
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            assert isinstance(error, sqlite3.Error)
            return self._file.failed(error)
        if code == sqlite3.SQLITE_CONSTRAINT:
            remedy = "Catch SqlError, or say ON CONFLICT"
        elif code == sqlite3.SQLITE_TOOBIG:
            remedy = f"A text, a blob and a row have at most {CELL_BYTES_MAX:,} bytes: split it"
        elif isinstance(error, sqlite3.ProgrammingError | sqlite3.Warning):
            remedy = "Give one statement, and one parameter for each ? in it"
        else:
            remedy = "Correct the statement"
        return SqlError(statement, str(error).rstrip("."), remedy, code=name)

    def _is_full(self, statement: str, name: str) -> Exception:
        pages = self._file.writer.execute("PRAGMA page_count").fetchall()[0][0]
        # What did not fit is gone by now: another attempt tells the bound from the disk.
        free = self._file.free_bytes()
        if free > self._file.reserve_bytes:
            return StorageLimitError(
                "the room's database (bytes)",
                (pages + 1) * _PAGE_BYTES,
                self.bytes_max,
                "Delete what is not needed, or spread it over several rooms; "
                "`room_database_bytes_max` allows more",
            )
        return SqlError(statement, f"the disk has {free:,} bytes left", "Free some space", code=name)

    # Last, since the name hides the type of that name in what follows it.

    def list(
        self,
        _room_key: str,
        start: str | None = None,
        start_after: str | None = None,
        end: str | None = None,
        prefix: str | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Entries:
        """Give committed entries, in byte order of their keys; see `Shard.list`."""
        return select_range(
            self._file,
            "SELECT key, value FROM _broker_entries WHERE",
            (),
            start=start,
            start_after=start_after,
            end=end,
            prefix=prefix,
            reverse=reverse,
            limit=limit,
        )


def _nothing() -> None:
    pass


def _children_first(connection: sqlite3.Connection) -> list[str]:
    """Give the tables with foreign keys, each behind those that refer to it: before a table goes SQLite looks
    for whatever refers to its rows, and without an index that is through all of another table for each of
    them. In a ring one has to be first.
    """
    children = set()
    referring: dict[str, list[str]] = {}
    for child, parent in connection.execute(_FOREIGN_KEYS).fetchall():
        children.add(child)
        referring.setdefault(parent.lower(), []).append(child)
    order: list[str] = []
    seen = set()
    stack = [(name, False) for name in sorted(children)]
    while stack:
        name, passed = stack.pop()
        if passed:
            order.append(name)
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack.extend([(each, False) for each in referring.get(name.lower(), ())])
    return order


def room_of(path: Path) -> str:
    """Give the room whose database this is; "" if nothing was committed to it. Only while it is not open."""
    connection = open_database(path, synchronous="full", cache_kib=READER_CACHE_KIB, read_only=True)
    try:
        return str(connection.execute(_FACTS).fetchall()[0][0])
    except (sqlite3.Error, IndexError) as error:
        if isinstance(error, sqlite3.Error):
            raise translate(error, path, opening=True) from error
        raise DatabaseDamaged(path, "it does not say whose it is") from error
    finally:
        connection.close()


def database_path(directory: str | os.PathLike[str], shard_index: int, room_key: str) -> Path:
    """Where a room's own database lies. Named by a hash: never by anything that a client chose."""
    name = blake2b(room_key.encode(), digest_size=20).hexdigest()
    return databases_folder(directory, shard_index) / f"{name}.db"


def databases_folder(directory: str | os.PathLike[str], shard_index: int) -> Path:
    """Where the own databases of a shard's rooms lie."""
    return Path(directory) / "rooms" / f"{shard_index:d}"
