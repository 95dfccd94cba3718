"""What room code holds in its hands: `Room`, `Connection`, `Storage`, `ConnectionContext`, `Lobby`.

Owns the staging of turns: every effect and every write is written down in a `Turn`, and nothing leaves it
before the turn has ended. Does no I/O of its own: reads and questions go through the `Backstage` that the
host provides. Peer: `hibernation.host`, which opens a turn, runs the hook, and takes what was staged or
throws it away.

A turn is found through a context variable, so that turns of one room may overlap and each task stages into
its own. What it has staged is seen by itself alone; at its end its writes go to `pending`, and its changes of
connections onto these, where they are counted in `_edits` until the gateway knows them: so later turns of the
room read them, and not the older ones that an event may still carry.
"""

import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from json import dumps as dump_json
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, overload

from cbor2 import loads

from hibernation import wire
from hibernation.auto_responses import AutoResponse
from hibernation.done import Done as _Done
from hibernation.errors import ConnectionClosedError, LimitExceeded, RoomGone
from hibernation.room_alarms import AlarmMethods, AlarmSource
from hibernation.settings import Settings
from storage.alarms import AlarmRow
from storage.shards import key_bytes
from storage.sql_guard import bind
from storage.values import decode, encode

if TYPE_CHECKING:
    from hibernation.mounted import Application
    from hibernation.neighbours import Parties, Switchboard
    from hibernation.replies import Reply
    from hibernation.requests import Request
    from storage.errors import SqlError
    from storage.room_database import RoomDatabase
    from storage.sql_guard import Value

#: What a message may be: text, bytes, or anything else that JSON can hold.
Message = Any

_UNREAD: Final[Any] = object()

#: Transactions of one turn that may be open, one in another.
TRANSACTIONS_MAX: Final = 64

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
        self.state: bytes | None = _UNREAD
        self.value: Any = _UNREAD


#: The turn that the running task belongs to: what outlives a turn may not stage into the next one.
_turn: ContextVar[Turn] = ContextVar("turn", default=Turn(None))  # noqa: B039 - it has ended, and stays so


def running_turn() -> Turn:
    """The turn that the running task belongs to, or belonged to."""
    return _turn.get()


def leave_turn() -> None:
    """The running task belongs to no turn, whatever its parent was doing when it was started."""
    _turn.set(Turn(None))


class Backstage(AlarmSource, Protocol):
    """What a room needs of its host."""

    #: Rooms whose storage is in a database of their own.
    own_databases: set[str]

    def open_database(self, key: str) -> None:
        """Have such a room's database open; raises DataDirectoryError if it cannot be used."""

    async def own_database(self, key: str, turn: Turn) -> "RoomDatabase":
        """The room's own database, made if there is none, for this turn alone until its end. Waits for those
        who have it.
        """

    def read_many(self, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """The committed values of those of these storage keys that exist."""

    def read(self, key: str, name: str) -> bytes | None:
        """The committed value of one storage key."""

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

    async def ask_gateway(self, key: str, what: str, argument: Any) -> Any:
        """Put a question about connections to the room's gateway."""

    async def flush(self, turn: Turn) -> None:
        """Let leave what the turn has staged so far."""

    @property
    def switchboard(self) -> "Switchboard":
        """What carries to other rooms."""


_DONE: Final = _Done()


def _names(tags: Iterable[str] | str) -> tuple[str, ...]:
    return (tags,) if isinstance(tags, str) else tuple(tags)


def _criteria(
    tag: str | None, all_of: Iterable[str] | str, any_of: Iterable[str] | str, none_of: Iterable[str] | str
) -> list[list[str]]:
    """One form for all filters: three lists of tags. A plain `tag` is one more that must be there."""
    wanted = list(_names(all_of))
    if tag is not None:
        wanted.append(tag)
    criteria = [wanted, list(_names(any_of)), list(_names(none_of))]
    return [[_text(name, "a tag") for name in names] for names in criteria]


def _text(value: object, what: str) -> str:
    """A text that the link can carry."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a str, not {type(value).__name__}: {value!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds a lone surrogate, which is no character: {value!r}") from None
    return str.__str__(value)  # of a subclass, an enumeration say, the text itself


def frame_data(message: Message) -> str | bytes:
    """A message as it goes out: text and bytes as they are, anything else as JSON text.

    Raises:
        ValueError: Text with a lone surrogate, which no UTF-8 can hold.
        TypeError: Neither text nor bytes nor a value for JSON.
    """
    if type(message) is bytes:
        return message
    if isinstance(message, bytearray | memoryview | bytes):
        return bytes(message)
    if not isinstance(message, str):
        message = dump_json(message, separators=(",", ":"), ensure_ascii=False)
    return _text(message, "the message")


def _size(data: str | bytes) -> int:
    """Bytes of a message on the wire, its head aside."""
    return len(data) if type(data) is bytes or data.isascii() else len(data.encode())  # type: ignore[union-attr]


class Connection:
    """One client's WebSocket, as room code sees it.

    Valid for the turns of its room while that room is awake; keep the `id` across turns, not the object.
    Every method is an effect: it takes hold when the turn ends well, and not at all when the turn fails.
    """

    __slots__ = (
        "__weakref__",
        "_card",
        "_closed",
        "_edits",
        "_number",
        "_parts",
        "_room",
        "_slot",
        "_state",
        "_state_blob",
        "close_cause",
    )

    #: Why the connection ended, in `on_close`: client_close, client_gone, ping_timeout, slow_consumer,
    #: too_big, protocol_error, server_close, replaced, limit or gateway_lost. None while it is open.
    close_cause: str | None

    def __init__(self, room: "Room", slot: int, number: int, card: bytes, state: bytes | None) -> None:
        self._room = room
        self._slot = slot
        self._number = number
        self._card = card
        self._state_blob = state
        self._state: Any = _UNREAD
        self._parts: tuple[str, str, bytes] | None = None
        self._closed = False
        #: Turns that have ended, have changed something here, and are not acknowledged by the gateway.
        self._edits = 0
        self.close_cause = None

    def __repr__(self) -> str:
        return f"<Connection {self.id!r} of {self._room.key!r}>"

    def _read(self) -> tuple[str, str, bytes]:
        parts = self._parts
        if parts is None:
            parts = self._parts = wire.read_card(self._card)
        return parts

    @property
    def id(self) -> str:
        """The id that names this connection within its room: `?_pk=` or a fresh one."""
        return self._read()[0]

    @property
    def uri(self) -> str:
        """The address that the client asked for, query included."""
        return self._read()[1]

    @property
    def tags(self) -> tuple[str, ...]:
        """The connection's tags, in the order in which they were given."""
        edit = self._edit()
        if edit is None or edit.card is None:
            return wire.blob_tags(self._read()[2])
        return wire.blob_tags(wire.read_card(edit.card)[2])

    @property
    def state(self) -> Any:
        """The value last given to `set_state`; None at first. Changing it in place changes nothing: call
        `set_state`.
        """
        edit = self._edit()
        if edit is not None and edit.state is not _UNREAD:
            if edit.value is _UNREAD:
                edit.value = None if edit.state is None else decode(edit.state)
            return edit.value
        value = self._state
        if value is _UNREAD:
            blob = self._state_blob
            value = self._state = None if blob is None else decode(blob)
        return value

    def set_state(self, value: Any) -> None:
        """Keep a value with the connection: over hibernation, host death and new code, until it has closed.

        Args:
            value: Anything CBOR holds, up to state_bytes_max [16 KiB] encoded; or a function of the
                present value.

        Raises:
            StorageLimitError: Too large; the old value stays.
            ValueEncodingError: Not a value that can be stored; the old value stays.
        """
        room = self._room
        turn = room._staging()
        if callable(value):
            value = value(self.state)
        limit = room._settings.state_bytes_max
        blob = None if value is None else encode(value, bytes_max=limit, what="connection state")
        room._count(turn, len(blob) if blob else 0)
        edit = self._change(turn)
        edit.state = blob
        edit.value = _UNREAD
        turn.effects.append([wire.STATE, self._slot, self._number, blob])

    def add_tags(self, *tags: str) -> None:
        """Give the connection more tags; those it has already stay where they are.

        Raises:
            LimitExceeded: More than tags_max [64], or one of more than tag_bytes_max [256] bytes; nothing
                is changed.
        """
        self._retag((*self.tags, *tags))

    def remove_tags(self, *tags: str) -> None:
        """Take tags away; those that it has not are passed over."""
        self._retag(tuple([tag for tag in self.tags if tag not in tags]))

    def _retag(self, tags: tuple[str, ...]) -> None:
        turn = self._room._staging()
        blob = wire.tags_blob(check_tags(tags, self._room._settings))
        if blob == wire.tags_blob(self.tags):
            return
        self._room._count(turn, len(blob))
        self._change(turn).card = wire.retag_card(self._card, blob)
        turn.effects.append([wire.TAGS, self._slot, self._number, blob])

    def send(self, message: Message) -> None:
        """Send text, bytes, or anything else as JSON, to this client alone.

        A client that has gone meanwhile does not get it; that is counted, not raised.

        Raises:
            ConnectionClosedError: This connection was closed in this turn or an earlier one of this room.
            LimitExceeded: The turn stages more than turn_bytes_max.
        """
        room = self._room
        turn = room._staging()
        if self._closed or (turn.edits is not None and self._is_closed()):
            raise ConnectionClosedError(self.id)
        if type(message) is str and message.isascii():
            data: str | bytes = message
            total = turn.bytes + len(message)
        else:
            data = frame_data(message)
            total = turn.bytes + _size(data)
        if total > room._bytes_max:
            room._refuse(total)
        turn.bytes = total
        turn.effects.append([wire.SEND, self._slot, self._number, data])

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection, after everything sent to it before. Closing twice does nothing.

        Args:
            code: 1000, 1001, 1003, 1007..1014 or 3000..4999 (RFC 6455, section 7.4).
            reason: At most 123 bytes of UTF-8 (RFC 6455, section 5.5).

        Raises:
            ValueError: A code that may not be sent, or a reason that is too long.
        """
        turn = self._room._staging()
        code, reason = check_close(code, reason)
        if self._is_closed():
            return
        self._change(turn).closed = True
        turn.effects.append([wire.SHUT, self._slot, self._number, code, reason])

    async def auto_response_at(self) -> datetime | None:
        """When the gateway last answered this client by itself, in UTC; None: never. Asks the gateway."""
        answered_ms = await self._room._host.ask_gateway(
            self._room.key, "answered", [self._slot, self._number]
        )
        return None if answered_ms is None else datetime.fromtimestamp(answered_ms / 1000, UTC)

    def _edit(self) -> Edit | None:
        """What the running turn has changed here."""
        turn = _turn.get()
        edits = turn.edits
        return edits.get(self) if edits is not None and turn.room is self._room else None

    def _is_closed(self) -> bool:
        """Whether it was closed by this turn, or one that has ended."""
        edit = self._edit()
        return self._closed or (edit is not None and edit.closed)

    def _change(self, turn: Turn) -> Edit:
        edits = turn.edits
        if edits is None:
            edits = turn.edits = {}
        edit = edits.get(self)
        if edit is None:
            edit = edits[self] = Edit()
        return edit

    def _apply(self, edit: Edit) -> None:
        """The turn that has changed something here has ended: it is the newest until the gateway says so."""
        if edit.card is not None:
            self._card, self._parts = edit.card, None
        if edit.state is not _UNREAD:
            self._state_blob, self._state = edit.state, _UNREAD
        self._closed = self._closed or edit.closed
        self._edits += 1

    def _refresh(self, card: bytes, state: bytes | None) -> None:
        """Take over what the gateway says now, unless something staged here is newer."""
        if not self._edits:
            if card != self._card:
                self._card, self._parts = card, None
            if state != self._state_blob:
                self._state_blob, self._state = state, _UNREAD


def check_tags(tags: Iterable[str], settings: Settings) -> tuple[str, ...]:
    """Tags without repetitions, in their order, within the limits of S11.

    Raises:
        TypeError: Something that is not a str, or one str where several are meant.
        ValueError: An empty tag, or one that is no valid Unicode.
        LimitExceeded: Too many, or one too long.
    """
    if isinstance(tags, str):
        raise TypeError(f"tags are a list of str, not one str: [{tags!r}]")
    unique = tuple(dict.fromkeys(tags))
    for tag in unique:
        if not isinstance(tag, str):
            raise TypeError(f"a tag is a str, not {type(tag).__name__}: {tag!r}")
        if not tag:
            raise ValueError("a tag is not empty")
        try:
            size = len(tag.encode())
        except UnicodeEncodeError:
            raise ValueError(f"the tag {tag!r} holds a lone surrogate, which is no character") from None
        if size > settings.tag_bytes_max:
            raise LimitExceeded("a tag", size, settings.tag_bytes_max, remedy="use a shorter tag")
    if len(unique) > settings.tags_max:
        raise LimitExceeded("a connection's tags", len(unique), settings.tags_max, "tags", remedy="use fewer")
    return unique


def check_close(code: int, reason: str) -> tuple[int, str]:
    """Give a code and a reason that may stand in a Close frame (RFC 6455, sections 5.5 and 7.4).

    Raises ValueError, or TypeError, for others.
    """
    if not isinstance(code, int):
        raise TypeError(f"a close code is an int, not {type(code).__name__}")
    if not (code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ValueError(
            f"{code} may not be sent as a close code: use 1000, or one of your own from 4000 to 4999"
        )
    reason = _text(reason, "a close reason")
    size = len(reason.encode())
    if size > 123:
        raise ValueError(f"the close reason has {size} bytes of UTF-8, 123 are allowed: shorten it")
    return int(code), reason


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
    def put(self, key: str, value: Any) -> _Done: ...
    @overload
    def put(self, key: Mapping[str, Any]) -> _Done: ...
    def put(self, key: str | Mapping[str, Any], value: Any = _UNREAD) -> _Done:
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
            if value is _UNREAD:
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

    def delete(self, key: str | list[str]) -> _Done:
        """Remove one key or several. Awaited, it tells whether the key existed, or how many did."""
        room = self._room
        turn = room._staging()
        if isinstance(key, str):
            room._count(turn, check_key(key))
            existed = self._look(key) is not None
            turn.write(key, None)
            return _Done(existed)
        room._count(turn, sum([check_key(name) for name in key]))
        found = self._look_up(key)
        for name in found:
            turn.write(name, None)
        return _Done(sum([blob is not None for blob in found.values()]))

    def delete_all(self) -> _Done:
        """Remove everything that the room has stored, tables and alarms included, in one step."""
        turn = self._room._staging()
        inner = turn.inner
        if inner is not None:
            inner.dropped = False
            if inner.database is not None:
                inner.database.drop_tables(inner.depth)
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
            if turn.room is not room:  # it was given up meanwhile
                database.undo()
                raise RoomGone(room.key)
            inner = turn.inner  # another one, if another task of the turn has flushed meanwhile
            if inner is None:
                inner = turn.inner = Inner()
            inner.database = database
            turn.stored = True
        if turn.cleared and not inner.dropped:
            database.drop_tables(inner.depth)
            inner.dropped = True
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
        turn = _turn.get()
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
        turn = _turn.get()
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
        turn = _turn.get()
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


class Room:
    """What a `Server` object reaches the world with: `self.room`."""

    __slots__ = (
        "_bytes_max",
        "_connections",
        "_env",
        "_evict",
        "_host",
        "_pending",
        "_pending_cleared",
        "_settings",
        "_storage",
        "_tasks",
        "key",
    )

    def __init__(
        self,
        host: Backstage,
        key: str,
        settings: Settings,
        env: Mapping[str, str],
        connections: dict[int, Connection],
        pending: dict[str, bytes | None],
    ) -> None:
        self._host = host
        self.key = key
        self._settings = settings
        self._env = env
        self._connections = connections
        self._pending = pending
        self._pending_cleared = False
        self._storage: Storage | None = None
        self._bytes_max = settings.turn_bytes_max
        #: A turn that has ended has asked for eviction.
        self._evict = False
        #: Pieces of background work that have not ended.
        self._tasks = 0

    def __repr__(self) -> str:
        return f"<Room {self.key!r}>"

    @property
    def id(self) -> str:
        """The room's id, as it stands in the address, percent-decoded."""
        return self.key.partition("/")[2]

    @property
    def party(self) -> str:
        """The party's name, in kebab-case."""
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        """Same as `party`."""
        return self.party

    @property
    def env(self) -> Mapping[str, str]:
        """The process environment, under `.env` beside the app, under `--var NAME=VALUE`."""
        return self._env

    @property
    def storage(self) -> Storage:
        """The room's keys and values, and its alarms."""
        storage = self._storage
        if storage is None:
            storage = self._storage = Storage(self)
        return storage

    @property
    def parties(self) -> "Parties":
        """The parties of the app, for `room.parties["chat"].get("lobby")`: other rooms (S30)."""
        from hibernation.neighbours import Parties  # it needs what is defined here

        return Parties(self._host.switchboard, self.key, self._settings, self._stage, self._is_in_turn)

    def broadcast(
        self,
        message: Message,
        without: Iterable["str | Connection"] = (),
        tag: str | None = None,
        *,
        all_of: Iterable[str] = (),
        any_of: Iterable[str] = (),
        none_of: Iterable[str] = (),
    ) -> None:
        """Send to every open connection of the room, or to those whose tags match. Wakes nobody, waits for
        nobody.

        Args:
            message: Text, bytes, or anything else as JSON.
            without: Ids or connections that do not get it.
            tag: Only connections with this tag; all_of, any_of, none_of: the same with several, together.

        Raises:
            LimitExceeded: The turn stages more than turn_bytes_max.
        """
        turn = self._staging()
        data = frame_data(message)
        if isinstance(without, str | Connection):
            without = (without,)
        ids = [each.id if isinstance(each, Connection) else _text(each, "an id") for each in without]
        criteria = _criteria(tag, all_of, any_of, none_of)
        self._count(turn, _size(data))
        turn.effects.append([wire.BROADCAST, self.key, data, ids, *criteria])

    async def get_connection(self, connection_id: str) -> Connection | None:
        """The open connection with this id, or None. Asks the gateway; touches no socket."""
        connection_id = _text(connection_id, "an id")
        for connection in self._newer():
            # One that is closed may have a successor with its id.
            if not connection._is_closed() and connection.id == connection_id:
                return connection
        row = await self._host.ask_gateway(self.key, "find", connection_id)
        if row is None:
            return None
        connection = self._known(row)
        return None if connection._is_closed() else connection

    async def get_connections(
        self,
        tag: str | None = None,
        *,
        all_of: Iterable[str] = (),
        any_of: Iterable[str] = (),
        none_of: Iterable[str] = (),
    ) -> AsyncIterator[Connection]:
        """The open connections whose tags match, in the order in which they were accepted, as of one instant.

        Sees what this turn and earlier ones have staged. A connection that closes meanwhile is skipped. Costs
        by the matches, in pages; touches no socket.
        """
        criteria = _criteria(tag, all_of, any_of, none_of)
        rows, rest = await self._host.ask_gateway(self.key, "list", criteria)
        staged = sorted(self._newer(), key=lambda each: each._number)
        edited = {each._number for each in staged}
        extra = [each for each in staged if not each._is_closed() and _matches(each.tags, criteria)]
        while True:
            for row in rows:
                number = row[1]
                while extra and extra[0]._number < number:
                    yield extra.pop(0)
                if number in edited:
                    continue
                connection = self._known(row)
                if not connection._is_closed():
                    yield connection
            if not rest:
                break
            rows, rest = await self._host.ask_gateway(self.key, "more", rest)
        for connection in extra:
            yield connection

    async def count_connections(
        self,
        tag: str | None = None,
        *,
        all_of: Iterable[str] = (),
        any_of: Iterable[str] = (),
        none_of: Iterable[str] = (),
    ) -> int:
        """How many open connections match; see `get_connections`."""
        criteria = _criteria(tag, all_of, any_of, none_of)
        if self._newer():
            count = 0
            async for _ in self.get_connections(all_of=criteria[0], any_of=criteria[1], none_of=criteria[2]):
                count += 1
            return count
        return int(await self._host.ask_gateway(self.key, "count", criteria))

    def start_soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin background work when this turn has ended well and is on disk; a turn that fails begins none.

        The work keeps the room in memory, may take as long as it likes, and runs beside the turns of the
        room. It reads, stages and asks as a turn does; `await room.flush()` lets that leave, and so does its
        end. An exception drops what is not flushed, is logged, and is given to `on_error(None, error)`.

        The work ends with its host: it is not begun again by the next one. When the host is told to end, as
        for new code, it has `drain` seconds, is then cancelled, and what is not flushed is lost.

        Args:
            function: A coroutine function, called with the arguments.

        Raises:
            LimitExceeded: background_max [64] pieces of work of this room have not ended.
            TypeError: It cannot be called.
        """
        turn = self._staging()
        if not callable(function):
            raise TypeError(f"start_soon(function, *arguments): {function!r} cannot be called")
        tasks = turn.tasks or []
        count, most = self._tasks + len(tasks) + 1, self._settings.background_max
        if count > most:
            raise LimitExceeded(
                "a room's background work",
                count,
                most,
                "pieces",
                remedy="let some of it end, or raise background_max",
            )
        turn.tasks = [*tasks, (function, arguments)]

    async def flush(self) -> None:
        """Let leave what has been staged so far; return when it is on disk and the link to the gateway has
        room for more.

        What is flushed is in effect, whatever becomes of the rest. In a turn it is a part that is done before
        the end: when the host dies between them, the message comes again, and its turn runs again from its
        beginning. While there is no gateway it waits for the next.

        Raises:
            RuntimeError: A `storage.transaction` of this turn is open.
            SqlError: Background work whose statements are undone, see `storage.sql`.
        """
        turn = self._staging()
        turn.check()
        if turn.inner is not None and turn.inner.depth:
            raise RuntimeError("room.flush() inside of storage.transaction(): flush before it, or behind it")
        await self._host.flush(turn)

    def set_auto_response(
        self, request: str | bytes, reply: str | bytes | None, *, prefix: bool = False
    ) -> None:
        """Have the gateway answer a message by itself from now on, for every connection of this room: no
        room wakes, and no hook sees the message.

        Kept for ever, over hibernation, new code and restarts, until it is taken away. It goes before the
        party's own `auto_responses`. Of more than auto_responses_max [16], set in several turns, the one that
        was set first goes.

        Args:
            request: What is answered: str or bytes, at most 2,048 bytes.
            reply: What with: str or bytes, at most 2,048 bytes. None takes the rule away.
            prefix: Whether a message may go on behind the request, which must not be empty then.

        Raises:
            TypeError, ValueError: No such request or reply.
            LimitExceeded: One of more than 2,048 bytes, or more rules in this turn than auto_responses_max.
        """
        turn = self._staging()
        effects = turn.effects
        rule = AutoResponse(request, "" if reply is None else reply, prefix)
        kept, most = None if reply is None else rule.reply, self._settings.auto_responses_max
        effect = [wire.AUTO, self.key, rule.request, kept, rule.prefix, most]
        standing = set()
        for each in [*effects, effect]:
            if each[0] == wire.AUTO:
                name = (type(each[2]), each[2], each[4])
                if each[3] is None:
                    standing.discard(name)
                else:
                    standing.add(name)
        if len(standing) > most:
            raise LimitExceeded(
                "automatic responses of a room",
                len(standing),
                most,
                "rules",
                remedy="set fewer, or raise auto_responses_max",
            )
        self._count(turn, _size(rule.request) + _size(rule.reply))
        effects.append(effect)

    def hibernate(self) -> None:
        """Ask to be evicted at the end of this turn, whatever idle_seconds says; while background work runs,
        at its end.
        """
        self._staging().evict = True

    def _newer(self) -> list[Connection]:
        """The connections of which something is known here and not yet to the gateway."""
        turn = _turn.get()
        own = turn.edits if turn.room is self else None
        if own is None:
            return [each for each in self._connections.values() if each._edits]
        return list(dict.fromkeys([*own, *[each for each in self._connections.values() if each._edits]]))

    def _known(self, row: list[Any]) -> Connection:
        """The one object for the connection of a gateway's row."""
        slot, number, card, state = row
        connection = self._connections.get(number)
        if connection is None:
            connection = self._connections[number] = Connection(self, slot, number, card, state)
        else:
            connection._refresh(card, state)
        return connection

    def _staging(self) -> Turn:
        """The running turn; RoomGone outside of it, also while another turn of the room is under way."""
        turn = _turn.get()
        if turn.room is not self:
            raise RoomGone(self.key)
        return turn

    def _is_in_turn(self) -> bool:
        """Whether the running task is in a turn of the room, and not in what runs beside turns."""
        turn = _turn.get()
        return turn.room is self and type(turn) is Turn

    def _stage(self, effect: list[Any], size: int) -> None:
        """Add an effect to the turn."""
        turn = self._staging()
        self._count(turn, size)
        turn.effects.append(effect)

    def _own_turn(self) -> Turn | None:
        """The running turn, if it is one of this room, and nothing that an earlier one has left."""
        turn = _turn.get()
        return turn if turn.room is self else None

    def _count(self, turn: Turn, size: int) -> None:
        """Add to what the turn stages; LimitExceeded beyond turn_bytes_max."""
        total = turn.bytes + size
        if total > self._bytes_max:
            self._refuse(total)
        turn.bytes = total

    def _refuse(self, total: int) -> NoReturn:
        raise LimitExceeded(
            "a turn", total, self._bytes_max, "bytes staged", remedy="send and store less in one turn"
        )

    def _begin(self, kind: type[Turn] = Turn) -> Turn:
        """Open a turn, and make it that of the running task."""
        turn = kind(self)
        _turn.set(turn)
        return turn

    def _discard(self) -> None:
        """End the running turn, which has failed: as if it had never been."""
        turn = _turn.get()
        if turn.room is self:
            turn.room = None
            if turn.inner is not None and turn.inner.database is not None:
                turn.inner.database.undo()


def _matches(tags: tuple[str, ...], criteria: list[list[str]]) -> bool:
    all_of, any_of, none_of = criteria
    return (
        all(tag in tags for tag in all_of)
        and (not any_of or any(tag in tags for tag in any_of))
        and not any(tag in tags for tag in none_of)
    )


class ConnectionContext:
    """What `on_connect` and `get_connection_tags` are told beside the connection.

    Attributes:
        request: The upgrade request, as Quart's `Request`, with what `on_before_connect` added to its
            headers.
    """

    __slots__ = ("_encoded", "_request")

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        self._request: Request | None = None

    @property
    def request(self) -> "Request":
        """The upgrade request, as Quart's `Request`, with what `on_before_connect` added to its headers."""
        if self._request is None:
            from hibernation.requests import build_request  # Quart costs 35 MB: only for who looks

            self._request = build_request(loads(self._encoded))
        return self._request


class Lobby:
    """What the static hooks are told: where a request wants to go, before any room is concerned.

    Attributes:
        id: The room's id; None where there is none (`on_fetch`, `on_cron`).
        party: The party's name.
        env: As `Room.env`.
        parties: As `Room.parties`; but there is no turn, so a broadcast leaves at once.
    """

    __slots__ = ("_serve", "env", "id", "parties", "party")

    def __init__(
        self,
        room: str | None,
        party: str,
        env: Mapping[str, str],
        parties: "Parties",
        serve: Callable[["Application", "Request", "Lobby"], Awaitable["Reply"]],
    ) -> None:
        self.id = room
        self.party = party
        self.env = env
        self.parties = parties
        self._serve = serve

    async def serve(self, app: "Application", request: "Request") -> Any:
        """Have a web application answer a request; return what this gives. See `broker.mount`.

        Args:
            app: A `QuartTrio`, or any other ASGI application that runs on trio.
            request: The one that the hook was given. What the app reads of its body the hook cannot.

        Raises:
            AppError: It is no application, or one for asyncio. And what the app raises.
        """
        return await self._serve(app, request, self)
