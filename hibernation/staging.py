"""What a turn has staged: every effect and every write, of which nothing leaves before its end.

Owns `Turn` and how the running one is found. Does no I/O, and does not know what the effects mean. Peers:
`hibernation.room`, `connection` and `room_storage`, which stage; `hibernation.host`, which takes what was
staged or throws it away.

A turn is found through a context variable, so that turns of one room may overlap and each task stages into
its own. What it has staged is seen by itself alone; at its end its writes go to `pending`, and its changes of
connections onto these, where they are counted in `_edits` until the gateway knows them: so later turns of the
room read them, and not the older ones that an event may still carry.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hibernation.connection import Connection
    from hibernation.room import Room
    from storage.alarms import AlarmRow
    from storage.errors import SqlError
    from storage.room_database import RoomDatabase

#: What has not been read, or not been changed.
UNREAD: Final[Any] = object()

#: A stored value, encoded; None: deleted.
Blob = bytes | None

#: What `start_soon` was given: a function and its arguments.
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class Turn:
    """What one turn has staged. Made for every message."""

    __slots__ = (
        "alarm",
        "alarms",
        "bytes",
        "cleared",
        "edits",
        "effects",
        "evict",
        "inner",
        "room",
        "stored",
        "tasks",
        "writes",
    )

    def __init__(self, room: "Room | None") -> None:
        #: None: it has ended, and nothing may be staged any more.
        self.room = room
        self.effects: list[Any] = []
        #: About how many bytes.
        self.bytes = 0
        #: There is something for the disk: whoever stages such a thing says so here.
        self.stored = False
        #: By key: None means deleted. What was stored before is to be deleted first if `cleared`.
        self.writes: dict[str, Blob] | None = None
        self.cleared = False
        #: What few turns have: inner transactions, and the room's own database.
        self.inner: Inner | None = None
        #: Alarms, by name: None means deleted.
        self.alarms: dict[str, AlarmRow | None] | None = None
        #: The name of the alarm that it runs.
        self.alarm: str | None = None
        #: What is to become of connections.
        self.edits: dict[Connection, Edit] | None = None
        #: The room is to be evicted.
        self.evict = False
        #: Background work to be begun.
        self.tasks: list[Task] | None = None

    @property
    def used(self) -> bool:
        """Whether anything is staged."""
        return bool(self.effects or self.stored or self.edits or self.evict or self.tasks)

    def split(self) -> "Turn":
        """Give what has been staged so far as a turn of its own; this one goes on with nothing."""
        part = Turn(self.room)
        for name in Turn.__slots__:
            mine = getattr(self, name)
            setattr(self, name, getattr(part, name))
            setattr(part, name, mine)
        running = self.alarm = part.alarm
        if running is not None and part.alarms is not None and part.alarms.get(running, self) is None:
            # The alarm that runs goes with the end of its turn, and not before.
            del part.alarms[running]
            self.set_alarm(running, None)
        return part

    def check(self) -> None:
        """Raise what keeps the turn from ending well, if there is such a thing."""
        inner = self.inner
        if inner is None:
            return
        if inner.lost is not None:
            raise inner.lost
        if inner.database is not None:
            inner.database.require_whole()

    def set_alarm(self, name: str, row: "AlarmRow | None") -> None:
        """Stage one alarm; None deletes."""
        alarms = self.alarms
        if alarms is None:
            alarms = self.alarms = {}
            self.stored = True
        alarms[name] = row

    def write(self, key: str, blob: "Blob") -> None:
        """Stage one write; None deletes."""
        writes = self.writes
        if writes is None:
            writes = self.writes = {}
            self.stored = True
        writes[key] = blob


class Beside(Turn):
    """What background work has staged: no other turn waits for it."""

    __slots__ = ()


class Inner:
    """What a turn has that uses `storage.transaction` or `storage.sql`."""

    __slots__ = ("database", "depth", "dropped", "lost")

    def __init__(self) -> None:
        #: Inner transactions that are open, one in another.
        self.depth = 0
        #: The room's own database, which this turn has to itself.
        self.database: RoomDatabase | None = None
        #: What `delete_all` takes from there, it has taken.
        self.dropped = False
        #: Why what it has executed is undone, of a turn that goes on.
        self.lost: SqlError | None = None

    def lose(self, error: "SqlError") -> None:
        """What the turn has executed is undone, and the turn cannot end well any more."""
        self.database = None
        self.lost = error


class Edit:
    """What one turn has changed of a connection."""

    __slots__ = ("card", "closed", "state", "value")

    def __init__(self) -> None:
        #: None: as it was.
        self.card: bytes | None = None
        self.closed = False
        #: Encoded, and as it was read from that.
        self.state: bytes | None = UNREAD
        self.value: Any = UNREAD


#: The turn that the running task belongs to: what outlives a turn may not stage into the next one.
current_turn: ContextVar[Turn] = ContextVar("turn", default=Turn(None))  # noqa: B039 - it has ended, and stays so


def running_turn() -> Turn:
    """The turn that the running task belongs to, or belonged to."""
    return current_turn.get()


def leave_turn() -> None:
    """The running task belongs to no turn, whatever its parent was doing when it was started."""
    current_turn.set(Turn(None))
