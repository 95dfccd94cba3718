"""The host's records: a kind of room, one room's place in its host, what commits together, one task of the
pool.

Owns no behaviour beyond making them. Peers: `hibernation.host`, which runs turns by them, and the modules it
is made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import trio

from hibernation.party import Party
from hibernation.settings import RoomSettings, Settings
from storage.alarms import AlarmRow
from storage.shards import Row, ShardBatch

if TYPE_CHECKING:
    from hibernation.background import Work
    from hibernation.connection import Connection
    from hibernation.overlap import Overlap
    from hibernation.room import Room
    from storage.room_database import RoomDatabase

#: What commits by itself: a shard, by its index, or a room's own database, by the room's key.
Store = int | str

#: An event of the link: its kind, its room's key, and what `hibernation.wire` says of that kind.
Event = list[Any]

#: Where `Server` is, whose own `__init__` does nothing; it cannot be imported from here.
SERVER_MODULE = "broker.server"


class Kind:
    """A party with everything about it that does not change while the host runs."""

    __slots__ = (
        "cls",
        "evicts_at_once",
        "hibernate",
        "hooks",
        "idle_seconds",
        "interleaves",
        "message_parameters",
        "name",
        "notes_start",
        "overlaps",
        "parameters",
        "settings",
        "starts",
        "static",
    )

    def __init__(self, party: Party, base: Settings) -> None:
        self.name = party.name
        self.cls = party.cls
        self.hooks = party.hooks
        self.settings: RoomSettings = party.settings(base)
        self.hibernate = party.hibernate
        #: The folder of files for requests that belong to no room.
        self.static = party.static
        self.idle_seconds = self.settings.idle_seconds
        self.evicts_at_once = self.hibernate and not self.idle_seconds
        #: Turns of one room may overlap, and those of one connection too.
        self.overlaps = party.concurrency != "serial"
        self.interleaves = party.concurrency == "interleave"
        self.starts = party.has_on_start
        #: Whether the start of a room runs code of the app's, which may end the host.
        self.notes_start = self.starts or getattr(party.cls.__init__, "__module__", "") != SERVER_MODULE
        #: How many arguments each hook takes.
        self.parameters = {name: spec.parameters for name, spec in party.specs.items()}
        self.message_parameters = party.on_message_parameters


class Cell:
    """One room's place in its host: what waits for it, what it has in memory, what of it is not yet on disk.

    Made for nearly every message, since rooms hibernate: what most cells never need is a class attribute
    until it is set.
    """

    #: Connections of this burst with values that the gateway has not acknowledged; they outlive the burst.
    edited = 0
    #: Number of the batch that holds the newest uncommitted writes; 0: all is on disk.
    gate = 0
    #: Where those writes go: a shard, or the room's own database, by the room's key; -1: not known yet.
    shard: Store = -1
    #: Everything stored before `pending` and `pending_alarms` is to be deleted.
    pending_cleared = False
    #: Alarms set or deleted, not yet committed: name to row, None for deleted.
    pending_alarms: "dict[str, AlarmRow | None] | None" = None
    #: Attempts to start that failed, since when, and when to try again; 0: at once; infinity: in quarantine.
    failures = 0
    failing_since = 0.0
    retry_at = 0.0
    #: What keeps the object in memory beside turns: streamed responses that are still being made, and pieces
    #: of background work that have not ended; and these themselves.
    streams = 0
    background: "Sequence[Work]" = ()
    #: When its last turn ended, for rooms that stay a while.
    used_at = 0.0
    #: For those that stay while they have connections: when to ask for them again, and since when it is known
    #: that there are none; 0: there are.
    ask_at = 0.0
    deserted_at = 0.0
    #: Of a room that stays: connections of its earlier bursts, as long as its code holds them. Nobody tells
    #: which of them have gone.
    met: "WeakValueDictionary[int, Connection] | None" = None
    server: Any = None
    room: "Room | None" = None
    #: `on_start` has run, or there is none.
    started = False
    running = False
    #: Which of its turns are under way, if they may overlap.
    overlap: "Overlap | None" = None
    #: It may not run before the disk takes what it has written.
    held = False
    #: Its turn waits for a room of this host, which starts no more turns: the next host runs it again.
    abandoned = False

    def __init__(self, key: str, kind: Kind) -> None:
        self.key = key
        self.kind = kind
        #: A list, though it is a queue: it is short (S24), and an empty deque is twelve times as large.
        self.events: list[Event] = []
        self.scheduled = True
        #: Connections that this burst has met, by number.
        self.connections: dict[int, Connection] = {}
        #: Written, not yet committed: key to value, None for deleted.
        self.pending: dict[str, bytes | None] = {}


@dataclass(slots=True)
class Batch:
    """What commits together, and the results that leave when it has."""

    number: int
    shards: dict[Store, ShardBatch] = field(default_factory=dict)
    #: By store: what its outbox gets. Encoded, it goes to the rows; those of rooms' own databases join those
    #: of their shards, whose numbers they have, when the batch is on disk.
    results: dict[Store, list[Any]] = field(default_factory=dict)
    rows: dict[int, list[Row]] = field(default_factory=dict)
    own_rows: dict[str, list[Row]] = field(default_factory=dict)
    #: Results of turns that wrote nothing, and ended when the batch was on its way to disk already.
    late: list[Any] = field(default_factory=list)
    edits: "list[tuple[Cell, Connection]]" = field(default_factory=list)
    cells: set[Cell] = field(default_factory=set)
    after: list[Callable[[], None]] = field(default_factory=list)
    #: The same, and not for anybody who goes with the gateway.
    lasting: list[Callable[[], None]] = field(default_factory=list)
    #: What its turns have staged, about.
    bytes: int = 0
    #: By store: rows up to there have been executed, and leave the outbox with this commit.
    executed: dict[Store, int] = field(default_factory=dict)
    #: Stores in which it is not yet committed, the next one last.
    left: list[Store] = field(default_factory=list)
    #: Whether there are rooms' own databases among its stores; and those that are closed with it.
    has_own: bool = False
    #: By shard: the alarms of such rooms, of which their shards are told when all the others have committed.
    behind: dict[int, ShardBatch] = field(default_factory=dict)
    closing: "list[RoomDatabase]" = field(default_factory=list)


class Worker:
    """One task of the pool, and the turn it is in."""

    __slots__ = (
        "cancelled",
        "cell",
        "event",
        "hook",
        "note",
        "running",
        "scope",
        "started",
        "task",
        "waiting",
    )

    def __init__(self, note: memoryview) -> None:
        self.task: trio.lowlevel.Task | None = None
        #: What it does now, as `hibernation.running` has it, for whoever comes after this host's death; and
        #: of that the one word that says whether the turn waits.
        self.note = note
        self.waiting = note[2:3]
        #: The coroutine of the hook that waits, for `explain`.
        self.running: Any = None
        self.scope = trio.CancelScope()
        #: The scope is cancelled, for the sake of one turn: no other may begin in it.
        self.cancelled = False
        #: None between bursts.
        self.cell: Cell | None = None
        #: Empty while the room is being started.
        self.event: Event = []
        self.hook = ""
        self.started = 0.0

    def cancel(self) -> None:
        """Cancel the turn that is under way."""
        self.cancelled = True
        self.scope.cancel()
