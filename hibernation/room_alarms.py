"""Alarms as room code sees them: `Alarm`, and the methods of `room.storage` that set, read and delete them.

Owns what a point in time may be written as, and the bounds of an alarm. Stages in the running turn; what is
read is this turn's own changes over what the host knows, which are those of earlier turns over what is on
disk. Peers: `hibernation.room_storage`, whose `Storage` these methods are part of, and `hibernation.alarms`,
which runs what is due.
"""

from datetime import UTC, datetime, timedelta
from math import isfinite
from random import getrandbits
from typing import TYPE_CHECKING, Any, Final, Protocol

from hibernation.done import Done
from hibernation.errors import LimitExceeded
from hibernation.wall_clock import from_now_ms
from storage.alarms import AlarmRow, alarm_name_bytes
from storage.values import decode, encode

if TYPE_CHECKING:
    from hibernation.room import Room
    from hibernation.staging import Turn

__all__ = ["DEFAULT_NAME", "Alarm", "AlarmMethods", "AlarmSource", "when_ms"]

DEFAULT_NAME: Final = "default"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
#: The first and the last moment that a datetime can say.
_FIRST_MS: Final = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MILLISECOND
_LAST_MS: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MILLISECOND


class AlarmSource(Protocol):
    """What the host knows of alarms: what is on disk, under what earlier turns have changed."""

    def check_alarms(self, key: str) -> None:
        """HookError if the room has no hook for alarms."""

    def read_alarm(self, key: str, name: str) -> AlarmRow | None:
        """One alarm of a room."""

    def read_alarms(self, key: str) -> dict[str, AlarmRow]:
        """All alarms of a room."""

    def count_alarms(self, key: str) -> int:
        """How many these are, or more."""


class Alarm:
    """One alarm of a room: what `on_alarm` is given, and what `get_alarm` and `list_alarms` tell."""

    __slots__ = ("_payload", "_row", "attempt", "due_at", "failed", "name", "reason", "scheduled_at")

    #: Its name: one room has one alarm of a name.
    name: str
    #: When it was set for, UTC.
    scheduled_at: datetime
    #: When it is run next, UTC: later than `scheduled_at` if it is tried again.
    due_at: datetime
    #: Which run this is, or the next one: 1 for the first, one more after each that failed.
    attempt: int
    #: It has failed as often as alarm_tries allows, and is not run again by itself.
    failed: bool
    #: The text of its last failure; "": none of its runs has failed.
    reason: str

    def __init__(self, row: AlarmRow) -> None:
        self._row = row
        self._payload: Any = self  # not decoded
        self.name = row.name
        self.scheduled_at = _moment(row.scheduled_ms)
        self.due_at = _moment(row.due_ms)
        self.failed = bool(row.failed)
        self.attempt = row.attempt + (not row.failed)
        self.reason = row.reason

    def __repr__(self) -> str:
        return f"<Alarm {self.name!r} at {self.scheduled_at.isoformat()}, attempt {self.attempt}>"

    @property
    def payload(self) -> Any:
        """The value that it was set with; None if there was none."""
        if self._payload is self:
            blob = self._row.payload
            self._payload = None if blob is None else decode(blob)
        return self._payload


class AlarmMethods:
    """Part of `hibernation.room_storage.Storage`."""

    __slots__ = ()

    _room: "Room"

    def set_alarm(
        self, when: datetime | timedelta | float, name: str = DEFAULT_NAME, payload: Any = None
    ) -> Done:
        """Have `on_alarm` called at a point in time, which wakes the room. Replaces an alarm of that name.

        Args:
            when: A datetime with a time zone; or a timedelta, or seconds, from now. What is past is due at
                once. Kept in milliseconds, rounded up.
            name: 1 to 256 bytes of UTF-8.
            payload: Any value that storage takes, up to alarm_payload_bytes_max [64 KiB] encoded.

        Raises:
            HookError: The room's class has no `on_alarm`.
            ValueError, TypeError: `when` is a datetime without a time zone, or no time.
            LimitExceeded: More than alarms_max [1,000] alarms of the room, or the turn stages too much.
            StorageLimitError, ValueEncodingError: The name or the payload is too large, or cannot be stored.
                Whatever is raised, nothing has changed.
        """
        room = self._room
        turn = room._staging()
        room._host.check_alarms(room.key)
        size = alarm_name_bytes(name)
        due_ms = when_ms(when)
        settings = room._settings
        blob = None
        if payload is not None:
            blob = encode(payload, bytes_max=settings.alarm_payload_bytes_max, what="alarm payload")
            size += len(blob)
        self._require_place(turn, name)
        room._count(turn, size)
        turn.set_alarm(name, AlarmRow(name, getrandbits(63), due_ms, due_ms, blob))
        return Done()

    def delete_alarm(self, name: str = DEFAULT_NAME) -> Done:
        """Delete an alarm, also one that has failed. Awaited, it tells whether there was one."""
        room = self._room
        turn = room._staging()
        room._count(turn, alarm_name_bytes(name))
        existed = self._look_alarm(name) is not None
        turn.set_alarm(name, None)
        return Done(existed)

    async def get_alarm(self, name: str = DEFAULT_NAME) -> Alarm | None:
        """The alarm of this name, or None. The one that `on_alarm` runs for is no more, unless it was set
        again; one that has failed is still there.
        """
        alarm_name_bytes(name)
        row = self._look_alarm(name)
        return None if row is None else Alarm(row)

    async def list_alarms(self) -> list[Alarm]:
        """All alarms of the room, in the order in which they are due; those that have failed come last."""
        rows = self._all_alarms().values()
        return [Alarm(row) for row in sorted(rows, key=lambda row: (row.failed, row.due_ms, row.name))]

    def _look_alarm(self, name: str) -> AlarmRow | None:
        turn = self._room._own_turn()
        if turn is not None:
            if turn.alarms is not None and name in turn.alarms:
                return turn.alarms[name]
            if turn.cleared:
                return None
        return self._room._host.read_alarm(self._room.key, name)

    def _all_alarms(self) -> dict[str, AlarmRow]:
        turn = self._room._own_turn()
        rows: dict[str, AlarmRow] = {}
        if turn is None or not turn.cleared:
            rows.update(self._room._host.read_alarms(self._room.key))
        if turn is not None:
            for name, row in (turn.alarms or {}).items():
                if row is None:
                    rows.pop(name, None)
                else:
                    rows[name] = row
        return rows

    def _require_place(self, turn: "Turn", name: str) -> None:
        """LimitExceeded if one more alarm of this name is one too many."""
        limit = self._room._settings.alarms_max
        stored = 0 if turn.cleared else self._room._host.count_alarms(self._room.key)
        if stored + len(turn.alarms or ()) < limit:
            return  # certainly: some of these may be the same, or deleted
        names = self._all_alarms().keys() | {name}
        if len(names) > limit:
            raise LimitExceeded(
                "the room's alarms",
                len(names),
                limit,
                "alarms",
                remedy="delete some, set one again under its name, or raise `alarms_max`",
            )


def when_ms(when: object) -> int:
    """A point in time as whole milliseconds since 1970, rounded up, so that it is never early.

    Raises:
        TypeError: It is no time.
        ValueError: It is a datetime without a time zone, no finite number, or outside of the years 1 to 9999.
    """
    if isinstance(when, datetime):
        if when.utcoffset() is None:
            raise ValueError(
                f"{when!r} has no time zone, so it is no point in time: use datetime.now(UTC), "
                "or give seconds from now"
            )
        due_ms = -((_EPOCH - when) // _MILLISECOND)
    elif isinstance(when, timedelta):
        due_ms = from_now_ms(when / _MILLISECOND)
    elif isinstance(when, int | float) and not isinstance(when, bool):
        if not isfinite(when):
            raise ValueError(f"{when} seconds from now is no point in time: give a finite number")
        due_ms = from_now_ms(when * 1000)
    else:
        raise TypeError(
            "when is a datetime with a time zone, a timedelta or a number of seconds, "
            f"not {type(when).__name__}: {when!r}"
        )
    if not _FIRST_MS <= due_ms <= _LAST_MS:
        raise ValueError(f"{when!r} is not within the years 1 to 9999: give a time that is")
    return due_ms


def _moment(milliseconds: int) -> datetime:
    return _EPOCH + milliseconds * _MILLISECOND
