"""Room storage on disk: what rooms put, get and list, and their alarms.

Owns one database of room storage per shard. Keys and values are opaque here: a key is text, a value the bytes
that `storage.values` made. Its peer is a host, which opens each of its shards once, reads on its loop thread,
and stages the writes of a tick in one `ShardBatch` per shard. Must not know rooms, turns or what waits for a
commit.

A shard's generation is raised each time it is opened, and every commit proves that it is still the same: a
host that was thought dead, and has been replaced, can write nothing any more (S5).

Beside the entries lies the outbox: what a commit releases, as opaque as the values, in the same transaction.
Whoever opens the shard next reads it and knows what has been committed (S22).

Invariants:
    R1  a row is in the outbox if and only if its commit is on disk and nobody has said that it is executed
    R2  row numbers of a shard rise for ever, in the order of the commits: generation << 32 | counter
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from storage.alarms import AlarmBatch, clear_alarms
from storage.blame import BlameBatch
from storage.crons import CronRow, write_crons
from storage.database import (
    CHECKPOINT_PAGES,
    RESERVE_BYTES,
    DatabaseFile,
    RowStatement,
    cannot_use,
    translate,
)
from storage.errors import GenerationPassed, StorageLimitError, ValueEncodingError
from storage.migrations import SHARD
from storage.values import VALUE_BYTES_MAX

Durability = Literal["full", "os"]

Row = tuple[int, bytes]
"""One row of the outbox: its number, and what `hibernation.commits` has encoded."""

Entries = list[tuple[str, bytes]]
"""Keys and values, in the order of the keys."""

KEY_BYTES_MAX = 2048
"""Largest key, in bytes of UTF-8 (S27)."""

CACHE_KIB = 512
"""Page cache of each of a shard's two connections."""

INLINE_CHECKPOINT_BYTES = 4 * 1024 * 1024
"""Size of the log at which a shard of durability "os" wants `checkpoint` called on the writer thread."""

INLINE_WAL_BYTES_MAX = 4 * INLINE_CHECKPOINT_BYTES
"""Size at which it no longer waits for that, and checkpoints in a commit."""

_CHECK_GENERATION = "SELECT generation FROM generations"
_CLEAR = RowStatement("DELETE FROM entries WHERE room IN (", "?", ")")
_DELETE = RowStatement("DELETE FROM entries WHERE room = ? AND key IN (", "?", ")")
_PUT = RowStatement("REPLACE INTO entries (room, key, value) VALUES", "(?, ?, ?)")
_FORGET_ROWS = "DELETE FROM outbox WHERE seq <= ?"
_ADD_ROW = "INSERT INTO outbox (seq, items) VALUES (?, ?)"
_ROWS = "SELECT seq, items FROM outbox ORDER BY seq"
_GET = "SELECT value FROM entries WHERE room = ? AND key = ?"
_ADOPT = RowStatement("INSERT OR IGNORE INTO own_databases (room) VALUES", "(?)")
_OWN_DATABASES = "SELECT room FROM own_databases"
_ALL_OF_ROOM = "SELECT key, value FROM entries WHERE room = ?"
_BYTES_OF_ROOM = "SELECT total(length(key) + length(value)) FROM entries WHERE room = ?"

#: Keys that one query looks up.
KEYS_PER_QUERY_MAX = 128
#: Rows that are in memory at once while a room's entries are carried over.
ROWS_AT_ONCE = 64


class ShardBatch:
    """Writes to one shard, staged in order and coalesced: of several to one key, the last counts. Touches no
    disk.

    A batch belongs to the thread that fills it until it is handed to `Shard.commit`, and is not filled after.
    """

    __slots__ = (
        "adopted",
        "alarms",
        "blame",
        "bytes",
        "cleared",
        "crons",
        "rooms",
    )

    def __init__(self) -> None:
        self.alarms: AlarmBatch | None = None
        """Alarms; see `alarming`."""
        self.crons: dict[str, CronRow] = {}
        """Ticks that are about to be run."""
        self.blame: BlameBatch | None = None
        """Suspects, dead letters, quarantine; see `blaming`."""
        self.rooms: dict[str, dict[str, bytes | None]] = {}
        """Per room: key to value, None for a deleted one."""
        self.cleared: set[str] = set()
        """Rooms whose stored entries and alarms all go, before what is in `rooms` and `alarms` is written."""
        self.bytes = 0
        """Bytes of keys and values taken by `put` and `delete`, also of what was replaced since."""
        self.adopted: set[str] | None = None
        """Rooms whose entries are all in a database of their own by now: here they go."""

    def put(self, room_key: str, key: str, value: bytes) -> None:
        """Set one entry.

        Raises:
            StorageLimitError: the key is over 2 KiB of UTF-8, or the value over 2 MiB; nothing is staged.
            ValueEncodingError: the key is no text that UTF-8 can hold; nothing is staged.
        """
        size = key_bytes(key) + len(value)
        if len(value) > VALUE_BYTES_MAX:
            raise StorageLimitError(
                "the value (bytes)", len(value), VALUE_BYTES_MAX, "Split it over several keys"
            )
        try:
            self.rooms[room_key][key] = value
        except KeyError:
            self.rooms[room_key] = {key: value}
        self.bytes += size

    def delete(self, room_key: str, key: str) -> None:
        """Remove one entry; it need not exist. Raises as `put`."""
        size = key_bytes(key)
        self.rooms.setdefault(room_key, {})[key] = None
        self.bytes += size

    def clear(self, room_key: str) -> None:
        """Remove every entry and alarm of a room, also those staged before in this batch."""
        self.rooms.pop(room_key, None)
        if self.alarms is not None:
            self.alarms.clear(room_key)
        self.cleared.add(room_key)

    def adopt(self, room_key: str) -> None:
        """Note that a room has a database of its own, which holds all its entries: those here go."""
        if self.adopted is None:
            self.adopted = set()
        self.adopted.add(room_key)

    @property
    def alarming(self) -> AlarmBatch:
        """The changes of alarms, to be added to."""
        if self.alarms is None:
            self.alarms = AlarmBatch()
        return self.alarms

    @property
    def blaming(self) -> BlameBatch:
        """The changes of suspects, dead letters and quarantine, to be added to."""
        if self.blame is None:
            self.blame = BlameBatch()
        return self.blame

    def __bool__(self) -> bool:
        return bool(self.rooms or self.cleared or self.alarms or self.blame or self.crons or self.adopted)


def key_bytes(key: str) -> int:
    """Give the size of a key in bytes of UTF-8; raises as `ShardBatch.put` if it cannot be one."""
    if key.isascii():
        size = len(key)
    else:
        try:
            size = len(key.encode())
        except UnicodeEncodeError:
            raise ValueEncodingError(
                f"the key {key!r} holds a lone surrogate, which UTF-8 cannot hold", "Use another key"
            ) from None
    if size > KEY_BYTES_MAX:
        raise StorageLimitError("the key (bytes)", size, KEY_BYTES_MAX, "Use a shorter key, or a hash of it")
    return size


class Shard:
    """One shard, open for this process alone.

    Args:
        directory: the data directory.
        index: which shard, from 0.
        durability: "full": a commit survives a power cut; "os": the death of any process (S21).
        reserve_bytes: free space below which commits are refused.

    Raises:
        DataDirectoryInUse: another process has it open.
        SchemaTooNew, DatabaseDamaged, DataDirectoryError: see `storage.database.open_database`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        index: int,
        *,
        durability: Durability,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self.index = index
        self.durability = durability
        path = shard_path(directory, index)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.chmod(path.parent, 0o700)
        except OSError as error:
            raise cannot_use(path.parent, error) from error
        self._file = DatabaseFile(
            path,
            SHARD,
            synchronous="full",
            cache_kib=CACHE_KIB,
            read_cache_kib=CACHE_KIB,
            checkpoint_pages=CHECKPOINT_PAGES if durability == "full" else 0,
            reserve_bytes=reserve_bytes,
        )
        try:
            # Before "os" takes effect: a generation that a power cut took back would be given out twice.
            with self._file.transaction(keep_reserve=False) as writer:
                writer.execute("UPDATE generations SET generation = generation + 1")
                self.generation: int = writer.execute(_CHECK_GENERATION).fetchall()[0][0]
            self._row: int = self.generation << 32
            if durability == "os":
                self._file.set_synchronous("normal")
        except BaseException:
            self._file.close()
            raise

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._file.path

    def next_row(self) -> int:
        """Give the number for the next row of the outbox. Rows are committed in the order of their
        numbers.
        """
        self._row += 1
        return self._row

    def rows(self) -> list[Row]:
        """Give the outbox as it is on disk, in the order of the commits."""
        return self._file.read(_ROWS)

    def commit(
        self, batch: ShardBatch, rows: Sequence[Row] = (), executed: int = 0, *, keep_reserve: bool = True
    ) -> None:
        """Write a batch in one transaction: all of it or nothing. On one thread at a time.

        Args:
            batch: the changes of entries.
            rows: what the outbox gets, numbered by `next_row`.
            executed: rows up to this number leave the outbox; 0: none does.
            keep_reserve: leave the reserve of the disk free.

        Raises:
            GenerationPassed: another host owns the shard now; nothing was written.
            CommitRefused: nothing was written (disk full, say); the same batch may be committed again.
            CommitUnknown: the outcome is not known; the process must end.
        """
        if not batch and not rows and not executed:
            return
        alarm_bytes = batch.alarms.bytes if batch.alarms else 0
        with self._file.transaction(
            batch.bytes + alarm_bytes + sum([len(items) for _, items in rows]), keep_reserve=keep_reserve
        ) as writer:
            current = writer.execute(_CHECK_GENERATION).fetchall()[0][0]
            if current != self.generation:
                raise GenerationPassed(self.path, self.generation, current)
            if executed:  # first: what they leave is what the new ones take
                writer.execute(_FORGET_ROWS, (executed,))
            for row in rows:
                writer.execute(_ADD_ROW, row)
            if batch.cleared:
                _CLEAR.run(writer, [(room,) for room in batch.cleared])
                clear_alarms(writer, batch.cleared)
            if batch.adopted:
                adopted = [(room,) for room in batch.adopted]
                _ADOPT.run(writer, adopted)
                _CLEAR.run(writer, adopted)
            puts: list[tuple[str, str, bytes | bytearray]] = []
            # In order of rooms and keys, so that each page of the tree is visited once.
            for room in sorted(batch.rooms) if len(batch.rooms) > 1 else batch.rooms:
                entries = batch.rooms[room]
                deleted: list[tuple[str]] = []
                for key in sorted(entries) if len(entries) > 1 else entries:
                    value = entries[key]
                    if value is None:
                        deleted.append((key,))
                    else:
                        # sqlite3 looks for an adapter for bytes, and knows bytearray at once: a copy is
                        # cheaper if small.
                        puts.append((room, key, bytearray(value) if len(value) < 4096 else value))
                if deleted:
                    _DELETE.run(writer, deleted, (room,))
            _PUT.run(writer, puts)
            if batch.alarms:
                batch.alarms.write(writer)
            if batch.blame:
                batch.blame.write(writer)
            if batch.crons:
                write_crons(writer, batch.crons.values())
        if self.durability == "os" and (batch.adopted or self._file.wal_bytes >= INLINE_WAL_BYTES_MAX):
            # Where the storage of a room lies must survive the loss of power: older storage would come back.
            self._file.checkpoint()

    def get(self, room_key: str, key: str) -> bytes | None:
        """Give the committed value of one key, or None."""
        try:
            row = self._file.reader.execute(_GET, (room_key, key)).fetchall()
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        return row[0][0] if row else None

    def get_many(self, room_key: str, keys: Iterable[str]) -> dict[str, bytes]:
        """Give the committed values of `keys`, in their order, without the missing ones."""
        return select_many(
            self._file, "SELECT key, value FROM entries WHERE room = ? AND key IN (", (room_key,), keys
        )

    def list(
        self,
        room_key: str,
        start: str | None = None,
        start_after: str | None = None,
        end: str | None = None,
        prefix: str | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Entries:
        """Give a room's committed entries, in byte order of their keys.

        Args:
            room_key: the room.
            start: first key that counts.
            start_after: key after which to begin.
            end: first key that no longer counts.
            prefix: only keys that begin so.
            reverse: from the last to the first.
            limit: at most so many; None for all.
        """
        return select_range(
            self._file,
            "SELECT key, value FROM entries WHERE room = ? AND",
            (room_key,),
            start=start,
            start_after=start_after,
            end=end,
            prefix=prefix,
            reverse=reverse,
            limit=limit,
        )

    def read(self, sql: str, parameters: Sequence[Any]) -> Any:
        """Give the rows of a question to the committed state; for the tables beside the entries."""
        return self._file.read(sql, parameters)

    def own_databases(self) -> set[str]:
        """Give the rooms that have a database of their own."""
        return {room for (room,) in self._file.read(_OWN_DATABASES)}

    def require_generation(self) -> None:
        """Raise GenerationPassed if another host has opened the shard since. On the thread that commits."""
        current = self._file.ask(_CHECK_GENERATION)[0][0]
        if current != self.generation:
            raise GenerationPassed(self.path, self.generation, current)

    def bytes_of(self, room_key: str) -> int:
        """Give the size of a room's committed entries. On the thread that commits."""
        return int(self._file.ask(_BYTES_OF_ROOM, (room_key,))[0][0])

    def all_of(self, room_key: str) -> Iterator[Entries]:
        """Give a room's committed entries, a few at a time. On the thread that commits, which does nothing
        else with the shard meanwhile.
        """
        try:
            cursor = self._file.writer.execute(_ALL_OF_ROOM, (room_key,))
            try:
                while rows := cursor.fetchmany(ROWS_AT_ONCE):
                    yield rows
            finally:
                cursor.close()
        except sqlite3.Error as error:
            raise translate(error, self.path) from error

    @property
    def checkpoint_due(self) -> bool:
        """Whether `checkpoint` should be submitted to the writer thread. Never with durability "full"."""
        return self.durability == "os" and self._file.wal_bytes >= INLINE_CHECKPOINT_BYTES

    def checkpoint(self) -> None:
        """Carry the log over into the file. On the writer thread; a `commit` meanwhile waits for it, so queue
        that behind.
        """
        self._file.checkpoint()

    def check(self) -> None:
        """Read the whole file; raises DatabaseDamaged if it is inconsistent. Not on a loop thread."""
        self._file.check()

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log."""
        return self._file.wal_bytes

    def close(self) -> None:
        """Close and release the shard. Idempotent."""
        self._file.close()


def shard_path(directory: str | os.PathLike[str], index: int) -> Path:
    """Where a shard lies in a data directory. Never named after anything that a client chose."""
    return Path(directory) / "shards" / f"{index:d}.db"


def select_many(
    file: DatabaseFile, before: str, leading: Sequence[Any], keys: Iterable[str]
) -> dict[str, bytes]:
    """Look up many keys: in as few queries as possible, in the order of `keys`, without the missing ones.

    `before` is the query up to and with the opening bracket, `leading` are its parameters.
    """
    wanted = list(dict.fromkeys(keys))
    found: dict[str, bytes] = {}
    for first in range(0, len(wanted), KEYS_PER_QUERY_MAX):
        some = wanted[first : first + KEYS_PER_QUERY_MAX]
        # Few forms of the statement, so that each is compiled once: a power of two, filled up with the last.
        some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
        found.update(file.read(f"{before}{', '.join('?' * len(some))})", (*leading, *some)))
    return {key: found[key] for key in wanted if key in found}


def select_range(
    file: DatabaseFile,
    before: str,
    leading: Sequence[Any],
    *,
    start: str | None,
    start_after: str | None,
    end: str | None,
    prefix: str | None,
    reverse: bool,
    limit: int | None,
) -> Entries:
    """Give the rows between bounds, in byte order of their keys; see `Shard.list`.

    `before` is the query up to its first condition on the key, `leading` are its parameters.
    """
    # The order of UTF-8 bytes is the order of code points, so bounds can be compared here as Python texts.
    low = start or ""
    if start_after is not None:
        low = max(low, start_after + "\0")  # the least key greater than it
    high = end
    if prefix:
        low = max(low, prefix)
        after_prefix = _after_prefix(prefix)
        if after_prefix is not None:
            high = after_prefix if high is None else min(high, after_prefix)
    sql = before + " key >= ?"
    parameters: list[Any] = [*leading, low]
    if high is not None:
        sql += " AND key < ?"
        parameters.append(high)
    sql += f" ORDER BY key {'DESC' if reverse else 'ASC'} LIMIT ?"
    parameters.append(-1 if limit is None else limit)
    for bound in (low, high or ""):
        _require_text(bound)
    return file.read(sql, parameters)


def _after_prefix(prefix: str) -> str | None:
    """The least text greater than every text that begins with `prefix`; None when there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last != 0x10FFFF:
            # Surrogates are no characters: after U+D7FF comes U+E000.
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None


def _require_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueEncodingError(
                f"the bound {text!r} holds a lone surrogate, which UTF-8 cannot hold", "Use another one"
            ) from None
