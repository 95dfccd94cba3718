"""The own databases of a host's rooms: which rooms have one, and which of these are open.

Owns the set of such rooms, in memory and in the shards, the open files, least recently used first, and what
has to be done at a start. Peers: `storage.room_database`, one of them, and `hibernation.commits`, the only
user. All methods are for the loop thread, but `make`.

An open database costs six descriptors, so only some are open at a time. One is closed when nothing of it is
under way and its outbox is empty; that deletes its log, so what has a log is what a start has to look at (Q2
in `room_database`), and not all there is.
"""

import os
import resource
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from time import monotonic
from typing import Final

from storage.database import RESERVE_BYTES, cannot_use, database_version, sync_directory
from storage.errors import BrokerError, DatabaseDamaged, SchemaTooNew
from storage.room_database import (
    DATABASE_BYTES_MAX,
    RoomDatabase,
    database_path,
    databases_folder,
    room_of,
)
from storage.shards import Durability, Row, Shard, ShardBatch

#: Databases that may be open beside those with something under way.
OPEN_MAX: Final = 256
#: Descriptors that one of them takes: two each of the file and its log, one of the log's index and the lock.
DESCRIPTORS_EACH: Final = 6
#: How long one stays open that nobody needs.
IDLE_SECONDS: Final = 10.0
#: Closing one waits for the disk, and commits wait for that; where too many are open it has to be.
CLOSED_AT_ONCE_MAX: Final = 16


class RoomDatabases:
    """See the module.

    Args:
        directory: the data directory.
        shards: the open shards of this host, by index.
        shard_of: the shard of a room, by its key.
        durability: see `storage.shards.Shard`.
        bytes_max: size that a room's statements may let its database grow to.
        open_max: databases that stay open; None: as many as the limit of open files makes reasonable.
        reserve_bytes: free space below which commits are refused.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        shards: dict[int, Shard],
        shard_of: Callable[[str], int],
        *,
        durability: Durability,
        bytes_max: int = DATABASE_BYTES_MAX,
        open_max: int | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self._directory = Path(directory)
        self._shards = shards
        self._shard_of = shard_of
        self._durability = durability
        self._bytes_max = bytes_max
        self._reserve_bytes = reserve_bytes
        self._open_max = open_max or min(OPEN_MAX, _descriptors_max() // (DESCRIPTORS_EACH * 4))
        #: Rooms with a database of their own.
        self.own: set[str] = set()
        #: Of these, those that their shard does not know yet.
        self.unadopted: set[str] = set()
        self._open: dict[str, RoomDatabase] = {}
        # Set by the user: whether a room's database has something to commit; who is told that one has been
        # opened, and that more are open than should be.
        self.is_needed: Callable[[str], bool] = lambda _: True
        self.on_open: Callable[[], None] = lambda: None
        self.on_crowd: Callable[[], None] = lambda: None
        for shard in shards.values():
            self.own |= shard.own_databases()

    # --- At a start -------------------------------------------------------------------------------

    def recover(self, damaged: Callable[[Path, BrokerError], None]) -> dict[int, list[Row]]:
        """Look at every database that has a log: finish what its host could not, and give what is in the
        outboxes of each shard and of its rooms, in the order of the commits.

        Args:
            damaged: told of each that cannot be used; its room is, when it wakes.

        Raises:
            BrokerError: one may be whole and cannot be looked at now: too few open files, an error of the
                disk. What it has committed must not be passed over, since it would be done again.
        """
        found: dict[int, list[Row]] = {}
        for index, shard in self._shards.items():
            rows = shard.rows()
            for path in self._with_log(index):
                try:
                    rows += self._recover(shard, path)
                except (DatabaseDamaged, SchemaTooNew) as error:
                    if error.path != os.fspath(path):
                        raise  # the shard's own
                    damaged(path, error)
            found[index] = sorted(rows)
        return found

    def _with_log(self, index: int) -> list[Path]:
        folder = databases_folder(self._directory, index)
        try:
            with os.scandir(folder) as entries:
                names = sorted([entry.name for entry in entries if entry.name.endswith(".db-wal")])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise cannot_use(folder, error) from error
        return [folder / name.removesuffix("-wal") for name in names]

    def _recover(self, shard: Shard, path: Path) -> list[Row]:
        if database_version(path) is None:
            raise DatabaseDamaged(path, "its log is there, and the file is not")
        key = room_of(path)
        if not key:
            return []  # nothing was ever committed to it
        if database_path(self._directory, shard.index, key) != path:
            raise DatabaseDamaged(path, f"it is the database of room {key!r}, and not in its place")
        database = self._add(key)
        batch = ShardBatch()
        if key not in self.own:
            batch.adopt(key)
        database.tell_alarms(batch)
        # Also into the reserve: with less to do, nothing would come up on a disk that is nearly full.
        shard.commit(batch, keep_reserve=False)
        self.own.add(key)
        rows = database.rows()
        if not rows:
            self._drop(key)
        return rows

    # --- While it runs ----------------------------------------------------------------------------

    def get(self, key: str) -> RoomDatabase:
        """Give a room's database, opened if need be.

        Raises:
            DataDirectoryError: it is missing, damaged, or cannot be used.
        """
        database = self._open.get(key)
        if database is None or (database.closing and not database.reclaim()):
            return self._add(key)
        database.used_at = monotonic()
        return database

    def opened(self, key: str) -> RoomDatabase | None:
        """Give a room's database if it is open."""
        return self._open.get(key)

    def make(self, key: str) -> RoomDatabase:
        """Make a room's database, which has none; on any thread. `add` it then.

        Raises:
            DataDirectoryError: the file cannot be made, or is there and says that it is in use.
        """
        _make_folder(databases_folder(self._directory, self._shard_of(key)))
        database = self._opened(key, create=True)
        if database.complete:
            database.close()
            raise DatabaseDamaged(
                database.path, "it holds the room's storage, and the shard does not know of that"
            )
        return database

    def add(self, database: RoomDatabase) -> None:
        """One that was made is open from now on."""
        self._open[database.key] = database
        self.on_open()
        if len(self._open) > self._open_max:
            self._make_room(database)

    def _add(self, key: str) -> RoomDatabase:
        database = self._opened(key, create=False)
        if not database.complete:
            database.close()
            raise DatabaseDamaged(database.path, "it is empty, where the room's storage was")
        self.add(database)
        return database

    def _opened(self, key: str, *, create: bool) -> RoomDatabase:
        return RoomDatabase(
            self._directory,
            self._shards[self._shard_of(key)],
            key,
            durability=self._durability,
            bytes_max=self._bytes_max,
            reserve_bytes=self._reserve_bytes,
            create=create,
        )

    def has_moved(self, key: str) -> None:
        """The first commit of the room's own database is on disk: its shard has to be told."""
        self.own.add(key)
        self.unadopted.add(key)

    def all_open(self) -> Iterable[RoomDatabase]:
        """Give those that are open."""
        return self._open.values()

    def are_open(self) -> bool:
        """Whether any is open."""
        return bool(self._open)

    def _make_room(self, newest: RoomDatabase) -> None:
        """Too many are open: close at once those that have nothing to write, and soon the others."""
        for database in sorted(self._open.values(), key=lambda each: each.used_at):
            if len(self._open) <= self._open_max:
                return
            if database is not newest and self._may_close(database) and not database.wal_bytes:
                self._drop(database.key)
        self.on_crowd()

    def _may_close(self, database: RoomDatabase) -> bool:
        key = database.key
        return (
            database.is_free
            and not database.newest_row
            and key not in self.unadopted
            and not self.is_needed(key)
        )

    def closable(self, needed: Collection[object]) -> list[RoomDatabase]:
        """Give those to be closed now: some that are idle for long, or the least recently used where too many
        are open. `RoomDatabase.close_unless_wanted` does it, and `close_has_ended` has to follow.

        Args:
            needed: keys of rooms whose databases have something to commit.
        """
        idle_since = monotonic() - IDLE_SECONDS
        excess = len(self._open) - self._open_max
        most = max(CLOSED_AT_ONCE_MAX, excess)  # what is opened faster than it is closed would end the host
        found: list[RoomDatabase] = []
        for database in sorted(self._open.values(), key=lambda each: each.used_at):
            if (database.used_at > idle_since and excess <= 0) or len(found) >= most:
                break
            if self._may_close(database) and database.key not in needed:
                database.busy = database.closing = True
                found.append(database)
                excess -= 1
        return found

    def close_has_ended(self, database: RoomDatabase) -> None:
        """It has been closed, or was wanted again."""
        database.busy = database.closing = False
        if database.is_closed and self._open.get(database.key) is database:
            del self._open[database.key]

    def _drop(self, key: str) -> None:
        self._open.pop(key).close()

    def abandon_turns(self) -> None:
        """All turns under way have been cancelled: nothing of them has been."""
        for database in self._open.values():
            if database.holder is not None:
                database.undo()

    def close(self) -> None:
        """Close all. Those of which the next start has to know keep their log (Q2). Idempotent."""
        while self._open:
            _, database = self._open.popitem()
            database.close(keep_log=not self._may_close(database))


def _descriptors_max() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def _make_folder(folder: Path) -> None:
    try:
        for each in (folder.parent, folder):
            if not each.is_dir():
                each.mkdir(mode=0o700, exist_ok=True)
                os.chmod(each, 0o700)
                sync_directory(each.parent)
    except OSError as error:
        raise cannot_use(folder, error) from error
