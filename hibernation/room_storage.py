"""A room's own keys, values, alarms and tables: `room.storage`.

Owns what a turn reads: its own writes, those of turns on their way to disk, and the disk. Does no I/O of its
own: that is the `Backstage`, which the host provides. Peers: `hibernation.staging`, where writes lie until
the turn's end; `hibernation.room_alarms`, the part about alarms; `hibernation.commits`.
"""

import builtins
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, overload

from hibernation.done import Done
from hibernation.errors import LimitExceeded, RoomGone
from hibernation.room_alarms import AlarmMethods
from hibernation.staging import UNREAD, Beside, Inner, Turn, current_turn
from storage.shards import key_bytes
from storage.sql_guard import bind
from storage.values import decode, encode

if TYPE_CHECKING:
    from hibernation.room import Room
    from storage.room_database import RoomDatabase
    from storage.sql_guard import Value

#: Transactions of one turn that may be open, one in another.
TRANSACTIONS_MAX: Final = 64

_DONE: Final = Done()


class Storage(AlarmMethods):
    """The room's own keys and values, and its alarms, kept on disk.

    Writes take effect at the call, for this turn's and later turns' reads, and are durable when the turn's
    effects leave; a turn that fails leaves nothing of them. What they return may be awaited, and need not be.
    """

    __slots__ = ("_room",)

    def __init__(self, room: "Room") -> None:
        own = room._host.own_databases
        if own and room.key in own:
            room._host.open_database(
                room.key
            )  # what is wrong with it is told here, and not at the turn's end
        self._room = room

    @overload
    async def get(self, key: str, default: Any = None) -> Any: ...
    @overload
    async def get(self, key: list[str]) -> dict[str, Any]: ...
    async def get(self, key: str | list[str], default: Any = None) -> Any:
        """Read one value, or several at once.

        Args:
            key: A key, or a list of keys.
            default: What a missing single key gives.

        Returns:
            The value; for a list a dict of those that exist.
        """
        if isinstance(key, str):
            blob = self._look(key)
            return default if blob is None else decode(blob)
        return {name: decode(blob) for name, blob in self._look_up(key).items() if blob is not None}

    @overload
    def put(self, key: str, value: Any) -> Done: ...
    @overload
    def put(self, key: Mapping[str, Any]) -> Done: ...
    def put(self, key: str | Mapping[str, Any], value: Any = UNREAD) -> Done:
        """Write one value, or several at once from a mapping.

        Args:
            key: 1 to 2,048 bytes of UTF-8; or a mapping of such keys to values.
            value: Anything CBOR holds, up to 2 MiB encoded.

        Raises:
            LimitExceeded: A key or a value is too large, or the turn stages more than turn_bytes_max.
                Nothing is written. ValueEncodingError: The value cannot be stored. Nothing is written.
        """
        room = self._room
        turn = room._staging()
        if isinstance(key, str):
            if value is UNREAD:
                raise TypeError("put(key, value) or put({key: value, …})")
            size = check_key(key)
            blob = encode(value)
            room._count(turn, size + len(blob))
            turn.write(key, blob)
            return _DONE
        staged = {name: encode(each) for name, each in key.items()}
        size = 0
        for name, blob in staged.items():
            size += check_key(name) + len(blob)
        room._count(turn, size)
        for name, blob in staged.items():
            turn.write(name, blob)
        return _DONE

    def delete(self, key: str | list[str]) -> Done:
        """Remove one key or several. Awaited, it tells whether the key existed, or how many did."""
        room = self._room
        turn = room._staging()
        if isinstance(key, str):
            room._count(turn, check_key(key))
            existed = self._look(key) is not None
            turn.write(key, None)
            return Done(existed)
        room._count(turn, sum([check_key(name) for name in key]))
        found = self._look_up(key)
        for name in found:
            turn.write(name, None)
        return Done(sum([blob is not None for blob in found.values()]))

    def delete_all(self) -> Done:
        """Remove everything that the room has stored, tables and alarms included, in one step.

        That is what is there when the turn ends, or flushes: where turns overlap, also what others have
        stored since the call. In a room with tables that end waits as `sql` does.

        Raises:
            SqlError: The turn has called `sql`, and tables cannot be removed, or not in sql_timeout [2 s].
                Nothing is removed. In a turn that has not, its end, or flush, raises it.
        """
        turn = self._room._staging()
        inner = turn.inner
        if inner is None:
            inner = turn.inner = Inner()  # so that `settle` is called
        inner.dropped = False
        if inner.database is not None:
            inner.database.drop_tables(inner.depth, self._room._settings.sql_timeout)
            inner.dropped = True
        turn.writes = turn.alarms = None
        turn.cleared = turn.stored = True
        return _DONE

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Make what is stored in the block one thing: an exception that leaves it undoes what was stored in
        it, by puts, deletes, alarms and statements, and goes on to the caller.

            async with room.storage.transaction():
                ...

        A turn as a whole is a transaction without this; so it serves those that catch such an exception and
        go on. They nest. Only storage is undone: messages, tags, state and closes of the turn stay.

        Raises:
            RoomGone: Used outside of a turn, or beyond its end.
            RuntimeError: It ends while one that was begun later, by another task, is still open.
        """
        room = self._room
        turn = room._staging()
        inner = turn.inner
        if inner is None:
            inner = turn.inner = Inner()
        if inner.depth >= TRANSACTIONS_MAX:
            raise LimitExceeded(
                "transactions in one another",
                inner.depth + 1,
                TRANSACTIONS_MAX,
                "deep",
                remedy="use a loop in one of them",
            )
        before = (
            None if turn.writes is None else dict(turn.writes),
            None if turn.alarms is None else dict(turn.alarms),
            turn.cleared,
            turn.stored,
            inner.dropped,
        )
        depth = inner.depth = inner.depth + 1
        keep = False
        try:
            yield
            keep = True
        finally:
            if turn.room is not room:
                if keep:
                    raise RoomGone(room.key)
            elif inner.depth != depth:
                raise RuntimeError(
                    "transactions of one turn have to end in the opposite order of their beginning"
                )
            else:
                inner.depth -= 1
                if inner.database is not None:
                    inner.database.leave(depth, keep=keep)
                if not keep:
                    turn.writes, turn.alarms, turn.cleared, turn.stored, inner.dropped = before
                    turn.stored = turn.stored or inner.database is not None
                self._let_go(turn, inner)

    async def sql(self, query: str, *parameters: "Value") -> "builtins.list[dict[str, Value]]":
        """Run one statement in the room's own SQLite database, as a part of the turn like all that it stores.

        The first statement of a room makes the database, and moves all its keys and values there. Other turns
        of the room that call this wait until what this turn has stored is on disk; and with `concurrency`
        "interleave" it waits for the earlier messages of its connection to end. Background work has the
        database from a statement that changes something until it flushes, or ends: flush right behind it.

        Args:
            query: One statement of SQL, of at most 100,000 bytes. Not BEGIN, COMMIT, SAVEPOINT, ATTACH, and
                PRAGMA only where it asks about tables.
            parameters: What each "?" in it stands for: None, int of 64 bits, float, str or bytes, up to
                2 MiB each.

        Returns:
            The rows of the result, each a dict from column to value; [] if there is none. Of columns of one
            name the last counts.

        Raises:
            SqlError: The statement is refused, fails, or takes longer than sql_timeout [2 s]; nothing of it
                is left, and the turn may go on. In background work also: what it has executed and not
                flushed is undone, since the gateway has gone; then the work fails.
            StorageLimitError: The statement, a parameter, its result (turn_bytes_max) or the database
                (room_database_bytes_max) is too large; likewise.
            LimitExceeded: The turn stages more than turn_bytes_max.
            DataDirectoryError: The database cannot be made or used.
        """
        room = self._room
        turn = room._staging()
        values = bind(query, parameters)
        room._count(turn, len(query) + sum([len(v) for v in values if type(v) is str or type(v) is bytes]))
        turn.check()
        inner = turn.inner
        database = None if inner is None else inner.database
        if inner is None or database is None:
            database = await room._host.own_database(room.key, turn)
            inner = _enter(turn, room, database)
        _drop_tables(turn, inner)
        settings = room._settings
        rows = database.execute(
            query,
            values,
            depth=inner.depth,
            bytes_max=settings.turn_bytes_max,
            seconds=settings.sql_timeout,
        )
        self._let_go(turn, inner)
        return rows

    def _let_go(self, turn: Turn, inner: Inner) -> None:
        """Background work that only asks keeps nobody from the database: it may go on for ever."""
        database = inner.database
        if isinstance(turn, Beside) and database is not None and not inner.depth and database.end_unchanged():
            inner.database = None
            inner.dropped = False

    async def list(
        self,
        *,
        start: str | None = None,
        start_after: str | None = None,
        end: str | None = None,
        prefix: str | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Keys and values in the byte order of the keys' UTF-8.

        Args:
            start: First key that counts; start_after: the key after which to begin.
            end: First key that no longer counts.
            prefix: Only keys that begin so.
            reverse: From the last to the first.
            limit: At most so many.

        Returns:
            A dict in that order.
        """
        if start is not None and start_after is not None:
            raise ValueError("list takes start or start_after, not both")
        if limit is not None and limit < 0:
            raise ValueError(f"list takes a limit of 0 or more, not {limit}")
        room = self._room
        turn = current_turn.get()
        own = turn.room is room  # and no stream of an earlier turn that reads meanwhile
        cleared = own and turn.cleared
        overlay = {} if cleared else dict(room._pending)
        if own and turn.writes:
            overlay.update(turn.writes)
        hidden = cleared or room._pending_cleared
        found: dict[str, bytes] = {}
        if not hidden:
            found.update(
                room._host.read_range(
                    room.key,
                    start=start,
                    start_after=start_after,
                    end=end,
                    prefix=prefix,
                    reverse=reverse,
                    limit=None if limit is None else limit + len(overlay),
                )
            )
        low, after, high, head = [
            None if bound is None else bound.encode() for bound in (start, start_after, end, prefix)
        ]
        for name, blob in overlay.items():
            raw = name.encode()
            if (
                (low is None or raw >= low)
                and (after is None or raw > after)
                and (high is None or raw < high)
                and (head is None or raw.startswith(head))
            ):
                if blob is None:
                    found.pop(name, None)
                else:
                    found[name] = blob
        names = sorted(found, key=str.encode, reverse=reverse)
        return {name: decode(found[name]) for name in names[:limit]}

    def _look_up(self, keys: Iterable[str]) -> dict[str, bytes | None]:
        """The newest value of each key, as `_look` gives it, with as few questions to the disk as can be."""
        room = self._room
        turn = current_turn.get()
        own = turn.stored and turn.room is room
        writes = (turn.writes if own else None) or {}
        pending = {} if own and turn.cleared else room._pending
        hidden = room._pending_cleared or (own and turn.cleared)
        found: dict[str, bytes | None] = {}
        asked = []
        for key in keys:
            check_key(key)
            if key in writes:
                found[key] = writes[key]
            elif key in pending or hidden:
                found[key] = pending.get(key)
            elif key not in found:
                found[key] = None
                asked.append(key)
        if asked:
            found.update(room._host.read_many(room.key, asked))
        return found

    def _look(self, key: str) -> bytes | None:
        """The newest value: of this turn, of an earlier turn on its way to disk, or from disk."""
        room = self._room
        turn = current_turn.get()
        if turn.stored and turn.room is room:
            writes = turn.writes
            if writes is not None and key in writes:
                return writes[key]
            if turn.cleared:
                return None
        pending = room._pending
        if key in pending:
            return pending[key]
        if room._pending_cleared:
            return None
        check_key(key)
        return room._host.read(room.key, key)


async def settle(turn: Turn) -> None:
    """Do what is left to be done in the room's own database before a turn ends well, or flushes.

    What `delete_all` takes from there goes at that end, since other turns may fill tables until then. It is a
    statement of this turn, like any other: nobody else has the database from here until it is on disk, so
    tables and keys go together, and what turns store that end later stays.

    Raises:
        SqlError: What the turn has executed is lost, or tables cannot be removed, or not in sql_timeout.
        DataDirectoryError: The database cannot be used.
    """
    turn.check()
    inner, room = turn.inner, turn.room
    if inner is None or inner.dropped or not turn.cleared or room is None:
        return
    if inner.database is None:
        database = await room._host.database_to_clear(room.key, turn)
        if database is None:
            return
        inner = _enter(turn, room, database)
    _drop_tables(turn, inner)


def _enter(turn: Turn, room: "Room", database: "RoomDatabase") -> Inner:
    """The turn has the room's database from now on. RoomGone: it was given up while it waited for that."""
    if turn.room is not room:
        database.undo()
        raise RoomGone(room.key)
    inner = turn.inner  # another one, if another task of the turn has flushed meanwhile
    if inner is None:
        inner = turn.inner = Inner()
    inner.database = database
    turn.stored = True
    return inner


def _drop_tables(turn: Turn, inner: Inner) -> None:
    """Remove the tables, if `delete_all` was called and they are still there."""
    if turn.cleared and not inner.dropped:
        assert inner.database is not None
        assert turn.room is not None
        inner.database.drop_tables(inner.depth, turn.room._settings.sql_timeout)
        inner.dropped = True


def check_key(key: str) -> int:
    """Size in bytes of a storage key.

    Raises:
        TypeError, ValueError: It is no str, or empty.
        StorageLimitError, ValueEncodingError: See `storage.shards.key_bytes`.
    """
    if not isinstance(key, str):
        raise TypeError(f"a storage key is a str, not {type(key).__name__}")
    if not key:
        raise ValueError("a storage key is not empty")
    return key_bytes(key)
