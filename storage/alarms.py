"""Alarms on disk: which room is to be woken when, under which name, and with what.

Owns the statements on the table `alarms`. They work on any connection whose database has that table, so a
shard's and a room's own alike; a payload is opaque, the bytes that `storage.values` made. Writes ride in the
caller's transaction; reads go through a function of the caller's. Decides nothing: which alarm is run, and
what becomes of one that fails, is `hibernation.alarms`.

`number` names one setting of an alarm: setting it again under its name gives another number, trying it again
does not. So whoever holds a number can tell whether what is stored is still what it was given.
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from storage.database import RowStatement
from storage.errors import StorageLimitError, ValueEncodingError

__all__ = [
    "ALARM_NAME_BYTES_MAX",
    "BEFORE_ALL",
    "AlarmBatch",
    "AlarmRow",
    "AlarmTable",
    "DueRow",
    "alarm_name_bytes",
    "clear_alarms",
]

ALARM_NAME_BYTES_MAX: Final = 256
"""Largest name of an alarm, in bytes of UTF-8 (S29)."""

BEFORE_ALL: Final = (-(1 << 62), -1)
"""A place in the order of due times before that of any alarm."""

_COLUMNS: Final = "name, number, due_ms, scheduled_ms, payload, attempt, failed, reason"
_SET: Final = f"REPLACE INTO alarms (room, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_DELETE: Final = "DELETE FROM alarms WHERE room = ? AND name = ?"
_CLEAR: Final = RowStatement("DELETE FROM alarms WHERE room IN (", "?", ")")
_ONE: Final = f"SELECT {_COLUMNS} FROM alarms WHERE room = ? AND name = ?"
_OF_ROOM: Final = f"SELECT {_COLUMNS} FROM alarms WHERE room = ? ORDER BY name"
_COUNT_OF_ROOM: Final = "SELECT count(*) FROM alarms WHERE room = ?"
_DUE: Final = (
    "SELECT due_ms, number, room, name FROM alarms WHERE failed = 0 AND (due_ms, number) > (?, ?)"
    " ORDER BY due_ms, number LIMIT ?"
)
_DUE_OF_ROOM: Final = (
    "SELECT due_ms, number, room, name FROM alarms WHERE failed = 0 AND room = ?"
    " ORDER BY due_ms, number LIMIT ?"
)
_COUNT_WAITING: Final = "SELECT count(*) FROM alarms WHERE failed = 0"
_COUNT_FAILED: Final = "SELECT count(*) FROM alarms WHERE failed = 1"

Read = Callable[[str, Sequence[Any]], list[Any]]
"""Runs a question and gives its rows, all of them."""


class AlarmRow(NamedTuple):
    """One alarm of a room.

    Times are milliseconds since 1970, UTC. `scheduled_ms` is what the room has asked for, `due_ms` when it
    is run next: they differ once it is tried again. `attempt` counts the runs that have failed, `reason` is
    the text of the last failure. One that has `failed` is not run any more.
    """

    name: str
    number: int
    due_ms: int
    scheduled_ms: int
    payload: bytes | None
    attempt: int = 0
    failed: int = 0
    reason: str = ""


class DueRow(NamedTuple):
    """What is known of an alarm that is to be run at some time: enough to wake its room."""

    due_ms: int
    number: int
    room: str
    name: str


class AlarmBatch:
    """Changes of alarms, by room and name; of several of one name the last counts. Touches no disk. Threads:
    as `storage.shards.ShardBatch`.
    """

    __slots__ = ("bytes", "rooms")

    def __init__(self) -> None:
        self.rooms: dict[str, dict[str, AlarmRow | None]] = {}
        """Per room: name to row, None for a deleted one."""
        self.bytes = 0
        """About how much it writes."""

    def stage(self, room: str, changes: Mapping[str, AlarmRow | None]) -> None:
        """Set alarms of a room, or delete them where there is None."""
        self.rooms.setdefault(room, {}).update(changes)
        for row in changes.values():
            self.bytes += len(row.payload or b"") if row is not None else 0

    def clear(self, room: str) -> None:
        """Forget what was staged of a room's alarms; those on disk go by `clear_alarms`."""
        self.rooms.pop(room, None)

    def write(self, writer: sqlite3.Connection) -> None:
        """Make the changes, within the caller's transaction."""
        changes = [(room, name, row) for room, rows in self.rooms.items() for name, row in rows.items()]
        writer.executemany(_DELETE, [(room, name) for room, name, row in changes if row is None])
        writer.executemany(_SET, [(room, *row) for room, _, row in changes if row is not None])

    def __bool__(self) -> bool:
        return bool(self.rooms)


def clear_alarms(writer: sqlite3.Connection, rooms: Iterable[str]) -> None:
    """Delete every alarm of these rooms, within the caller's transaction."""
    _CLEAR.run(writer, [(room,) for room in rooms])


class AlarmTable:
    """The alarms of one database, to be read. What was staged and is not committed does not show.

    Args:
        read: Runs a question, such as `Shard.read`.
    """

    def __init__(self, read: Read) -> None:
        self._read = read

    def one(self, room: str, name: str) -> AlarmRow | None:
        """One alarm, or None."""
        rows = self._read(_ONE, (room, name))
        return AlarmRow(*rows[0]) if rows else None

    def of_room(self, room: str) -> dict[str, AlarmRow]:
        """All alarms of a room, by name."""
        return {row[0]: AlarmRow(*row) for row in self._read(_OF_ROOM, (room,))}

    def count_of_room(self, room: str) -> int:
        """How many alarms a room has, those that have failed included. Costs by their number."""
        return int(self._read(_COUNT_OF_ROOM, (room,))[0][0])

    def due_after(self, place: tuple[int, int], limit: int) -> list[DueRow]:
        """Alarms that are to be run, whenever that is, in the order of their due times.

        Args:
            place: Due time and number of the one after which to begin; `BEFORE_ALL` for the first.
            limit: At most so many.
        """
        return [DueRow(*row) for row in self._read(_DUE, (*place, limit))]

    def due_of_room(self, room: str, limit: int) -> list[DueRow]:
        """The same for one room, from its first on."""
        return [DueRow(*row) for row in self._read(_DUE_OF_ROOM, (room, limit))]

    def counts(self) -> tuple[int, int]:
        """How many are to be run, and how many have failed. Costs by their number."""
        return int(self._read(_COUNT_WAITING, ())[0][0]), int(self._read(_COUNT_FAILED, ())[0][0])


def alarm_name_bytes(name: str) -> int:
    """Size in bytes of an alarm's name.

    Raises:
        TypeError, ValueError: It is no str, or empty.
        StorageLimitError: It is over 256 bytes of UTF-8.
        ValueEncodingError: It holds a lone surrogate.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an alarm is a str, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError('the name of an alarm is not empty; leave it off for "default"')
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueEncodingError(
            f"the alarm's name {name!r} holds a lone surrogate, which UTF-8 cannot hold", "Use another name"
        ) from None
    if size > ALARM_NAME_BYTES_MAX:
        raise StorageLimitError(
            "the alarm's name (bytes)", size, ALARM_NAME_BYTES_MAX, "Use a shorter one, or a hash of it"
        )
    return size
