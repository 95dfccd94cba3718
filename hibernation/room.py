"""What a `Server` object reaches the world with: `Room`, and for static hooks `Lobby`.

Does no I/O of its own: reads and questions go through the `Backstage` that the host provides. Peers:
`hibernation.connection` and `room_storage`, which it hands out; `hibernation.staging`, where a turn is
written down; `hibernation.host`, which opens a turn, runs the hook, and takes what was staged or throws it
away.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from hibernation import wire
from hibernation.auto_responses import AutoResponse
from hibernation.connection import Connection
from hibernation.errors import LimitExceeded, RoomGone
from hibernation.outgoing import Message, broadcast_of, criteria_of, size_of, text
from hibernation.room_alarms import AlarmSource
from hibernation.room_storage import Storage, settle
from hibernation.settings import Settings
from hibernation.staging import Turn, current_turn

if TYPE_CHECKING:
    from hibernation.mounted import Application
    from hibernation.neighbours import Parties, Switchboard
    from hibernation.replies import Reply
    from hibernation.requests import Request
    from storage.room_database import RoomDatabase


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

    async def database_to_clear(self, key: str, turn: Turn) -> "RoomDatabase | None":
        """The same for a turn that is about to end and deletes all; None: turns that have ended have left no
        tables.
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
        if isinstance(without, str | Connection):
            without = (without,)
        ids = [each.id if isinstance(each, Connection) else each for each in without]
        effect, size = broadcast_of(self.key, message, ids, tag, all_of, any_of, none_of)
        self._count(turn, size)
        turn.effects.append(effect)

    async def get_connection(self, connection_id: str) -> Connection | None:
        """The open connection with this id, or None. Asks the gateway; touches no socket."""
        connection_id = text(connection_id, "an id")
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
        criteria = criteria_of(tag, all_of, any_of, none_of)
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
        criteria = criteria_of(tag, all_of, any_of, none_of)
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
        if turn.inner is not None:
            turn.check()
            if turn.inner.depth:
                raise RuntimeError(
                    "room.flush() inside of storage.transaction(): flush before it, or behind it"
                )
            await settle(turn)
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
        self._count(turn, size_of(rule.request) + size_of(rule.reply))
        effects.append(effect)

    def hibernate(self) -> None:
        """Ask to be evicted at the end of this turn, whatever idle_seconds says; while background work runs,
        at its end.
        """
        self._staging().evict = True

    def _newer(self) -> list[Connection]:
        """The connections of which something is known here and not yet to the gateway."""
        turn = current_turn.get()
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
        turn = current_turn.get()
        if turn.room is not self:
            raise RoomGone(self.key)
        return turn

    def _is_in_turn(self) -> bool:
        """Whether the running task is in a turn of the room, and not in what runs beside turns."""
        turn = current_turn.get()
        return turn.room is self and type(turn) is Turn

    def _stage(self, effect: list[Any], size: int) -> None:
        """Add an effect to the turn."""
        turn = self._staging()
        self._count(turn, size)
        turn.effects.append(effect)

    def _own_turn(self) -> Turn | None:
        """The running turn, if it is one of this room, and nothing that an earlier one has left."""
        turn = current_turn.get()
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
        current_turn.set(turn)
        return turn

    def _discard(self) -> None:
        """End the running turn, which has failed: as if it had never been."""
        turn = current_turn.get()
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
