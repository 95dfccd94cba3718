"""Turns: what each event means to a room, from the hook's call to the result that leaves (S9, S14, S19, S20).

Owns the calling of hooks and what becomes of their failures. Must not know the link or the disk: results go
to `finish` of the host. Peers: `hibernation.pool`, which gives each room one turn at a time, and
`hibernation.staging`, where a turn is staged.
"""

import traceback
from collections.abc import Callable
from types import CoroutineType
from typing import Any, Final, Protocol

import trio
from cbor2 import loads

from hibernation import wire
from hibernation.cells import Cell, Event, Kind, Worker
from hibernation.connection import Connection, ConnectionContext
from hibernation.errors import DeadLetter, TurnTimeout
from hibernation.logs import get_logger
from hibernation.outgoing import check_tags
from hibernation.room import Room
from hibernation.room_alarms import Alarm
from hibernation.room_storage import settle
from hibernation.running import (
    ALARM,
    ALARMING,
    CLOSING,
    CONNECTING,
    FAILED,
    OTHER,
    REPLAY,
    REPLAYING,
    mark_of,
)
from hibernation.staging import Turn
from hibernation.suspects import Suspect
from hibernation.suspension import carry_on, watched
from storage.alarms import AlarmRow
from storage.blame import Letter

log = get_logger("host")

#: What an event is called, and the hook that it is for.
_NAMES: Final = {
    wire.CONNECT: ("connect", "on_connect"),
    wire.MESSAGE: ("message", "on_message"),
    wire.CLOSE: ("close", "on_close"),
    ALARM: ("alarm", "on_alarm"),
}


class Exchanges(Protocol):
    """What turns need of the HTTP side; see `hibernation.exchanges`."""

    async def turn(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        """Run `on_request`."""

    def runs_for_a_turn(self, event: Event) -> bool:
        """Whether a turn of this host has asked for this request, and waits for it."""

    def is_waiting(self, number: int) -> bool:
        """Whether a client still waits for this request's answer."""

    def fail(self, number: int, effects: list[Any], error: BaseException) -> None:
        """Add the answer to a request whose turn has failed."""


class Alarms(Protocol):
    """What turns need of alarms; see `hibernation.alarms`."""

    def begin(self, turn: Turn, event: Event) -> Alarm | None:
        """Stage the end of an alarm; None if there is nothing to run."""

    def end(self, turn: Turn, event: Event) -> None:
        """Its turn ends well."""

    def fail(self, room: Room, turn: Turn, event: Event, error: BaseException) -> None:
        """Stage another attempt."""

    def letter(self, event: Event) -> Event | None:
        """The event as a dead letter keeps it; None if there is nothing to give up."""

    def drop(self, turn: Turn, event: Event) -> None:
        """Stage the end of an alarm that is given up."""

    def ended(self, cell: Cell, event: Event, *, again: bool = False) -> None:
        """Its turn is over; `again`: it was not run."""


class Turns:
    """See the module.

    Args:
        finish: Takes over a turn and its result: cell, turn, result.
        suspended: Called when a hook begins to wait.
        dev: Tracebacks may be shown to clients.
    """

    def __init__(
        self, finish: Callable[[Cell, Turn, list[Any]], None], suspended: Callable[[], None], *, dev: bool
    ) -> None:
        self._finish = finish
        self._suspended = suspended
        self.dev = dev
        self.exchanges: Exchanges
        self.alarms: Alarms
        self.failed = 0
        #: Told of what room code has raised, in the place of the log.
        self.on_failure: Callable[[str, Cell | None, BaseException, dict[str, Any]], None] | None = None
        # Set by the host: turns of a room have ended that others of their connection may have waited for.
        self.line_has_moved: Callable[[str], None] = lambda _: None
        # Set by the host: an event becomes a dead letter; the turn of a replayed one has ended, or failed.
        self.bury: Callable[[Cell, Event, Suspect], None]
        self.replayed: Callable[[Cell, Event, BaseException | None], None]

    async def run(self, cell: Cell, worker: Worker, event: Event) -> None:
        """Run one event's turn to its end, well or not. Cancelled: `cancelled` has to end it."""
        room = cell.room
        assert room is not None
        turn = room._begin()
        kind = event[0]
        if kind == wire.MESSAGE:
            _, _, slot, number, card, state, end, data = event
            connections = cell.connections
            connection = connections.get(number)
            if connection is None:
                # One that the burst has met already is at least as new as what the event carries: nobody but
                # the room changes it, and the event may have waited here while it did.
                connection = connections[number] = Connection(room, slot, number, card, state)
            worker.hook = "on_message"
            note = worker.note
            note[1] = end
            note[0] = number
            try:
                result = cell.server.on_message(*(data, connection)[: cell.kind.message_parameters])
                if type(result) is CoroutineType:
                    try:
                        trap = result.send(None)
                    except StopIteration:
                        pass
                    else:
                        self._suspended()
                        worker.running = result
                        await carry_on(result, trap, worker.waiting)
                if turn.inner is not None:
                    await self.settle(worker, turn)
            except trio.Cancelled:
                raise
            except BaseException as error:  # noqa: BLE001 - room code may raise anything
                turn = await self.fail(cell, room, worker, connection, error)
            if cell.overlap is None:
                self._finish(cell, turn, [wire.TURN, slot, number, end, turn.effects])
            else:
                self._end(cell, turn, event, [wire.TURN, slot, number, end, turn.effects])
        elif kind == wire.CONNECT:
            await self._connect(cell, room, worker, event, turn)
        elif kind == wire.CLOSE:
            await self._close(cell, room, worker, event, turn)
        elif kind == REPLAY:
            await self._replay(cell, room, worker, event, turn)
        elif kind == ALARM:
            await self._alarm(cell, room, worker, event, turn)
        elif kind == FAILED:
            await self._failed(cell, room, worker, event, turn)
        else:
            worker.note[1] = 0
            # If it ends the host, it is the turn that asked for it that is to blame (S23).
            worker.note[0] = 0 if self.exchanges.runs_for_a_turn(event) else OTHER
            await self.exchanges.turn(cell, room, worker, event, turn)

    def _end(self, cell: Cell, turn: Turn, event: Event, result: list[Any]) -> None:
        """End the turn of a connection's event, as soon as those have ended that it may not overtake (T3)."""
        overlap = cell.overlap
        if overlap is None:
            self._finish(cell, turn, result)
            return
        turn.room = None  # nothing is added while it is held
        due = overlap.ended(event, (turn, result))
        for each in due:
            self._finish(cell, *each)
        if due:
            self.line_has_moved(cell.key)

    async def _connect(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        _, _, slot, number, card, state, request = event
        worker.note[1] = CONNECTING
        worker.note[0] = number
        kind = cell.kind
        connection = cell.connections[number] = Connection(room, slot, number, card, state)
        context = ConnectionContext(request)
        failed = False
        try:
            if "get_connection_tags" in kind.hooks:
                worker.hook = "get_connection_tags"
                tags = await self.call(kind, worker, cell.server, connection, context)
                tags = check_tags(tags or (), kind.settings)
                if tags:
                    connection._retag(tags)
            if "on_connect" in kind.hooks:
                worker.hook = "on_connect"
                await self.call(kind, worker, cell.server, connection, context)
            if turn.inner is not None:
                await self.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            turn = await self.fail(cell, room, worker, connection, error)
            failed = True
        self._end(cell, turn, event, [wire.CONNECTED, slot, number, failed, turn.effects])

    async def _close(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        _, _, slot, number, card, state, code, reason, clean, cause = event
        worker.note[1] = CLOSING
        worker.note[0] = number
        connection = cell.connections.get(number)
        if connection is None:
            connection = cell.connections[number] = Connection(room, slot, number, card, state)
        connection.close_cause = cause
        connection._closed = True
        worker.hook = "on_close"
        try:
            await self.call(cell.kind, worker, cell.server, connection, code, reason, clean)
            if turn.inner is not None:
                await self.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            turn = await self.fail(cell, room, worker, connection, error)
        self._end(cell, turn, event, [wire.CLOSED, slot, number, turn.effects])
        if not connection._edits:
            cell.connections.pop(number, None)

    async def _alarm(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        alarm = self.alarms.begin(turn, event)
        if alarm is None:
            room._discard()
            self.alarms.ended(cell, event, again=True)
            return
        worker.note[1] = event[3]
        worker.note[0] = ALARMING
        worker.hook = "on_alarm"
        try:
            await self.call(cell.kind, worker, cell.server, alarm)
            if turn.inner is not None:
                await self.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            await self._end_failed_alarm(cell, room, worker, event, error)
            return
        self.alarms.end(turn, event)
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])
        self.alarms.ended(cell, event)

    async def _end_failed_alarm(
        self, cell: Cell, room: Room, worker: Worker, event: Event, error: BaseException
    ) -> None:
        turn = await self.fail(cell, room, worker, None, error)
        self.alarms.fail(room, turn, event, error)  # behind `on_error`: what that makes of the alarm counts
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])
        self.alarms.ended(cell, event)

    async def give_up(
        self, cell: Cell, worker: Worker, event: Event, suspect: Suspect, *, silent: bool
    ) -> None:
        """End an event that has ended its host too often (S23): a dead letter, `on_error` once unless
        `silent`, and the result of a turn that has failed.
        """
        room = cell.room
        assert room is not None
        if event[0] == ALARM:
            await self._give_up_alarm(cell, room, worker, event, suspect, silent=silent)
            return
        self.bury(cell, event, suspect)
        turn = room._begin()
        kind, _, slot, number, card, state = event[:6]
        worker.note[1], worker.note[0] = suspect.mark[1], number
        connection = cell.connections.get(number)
        if connection is None:
            connection = cell.connections[number] = Connection(room, slot, number, card, state)
        if kind == wire.CLOSE:
            connection.close_cause = event[9]
            connection._closed = True
        name, worker.hook = _NAMES[kind]
        error = DeadLetter(name, suspect.deaths, suspect.reason)
        if silent:
            self.failed += 1
            self.log_failure(f"a {name} is given up", cell, error, connection=connection)
        else:
            turn = await self.fail(cell, room, worker, connection, error)
        self._end_failed(cell, turn, event)

    async def _give_up_alarm(
        self, cell: Cell, room: Room, worker: Worker, event: Event, suspect: Suspect, *, silent: bool
    ) -> None:
        letter = self.alarms.letter(event)
        if letter is None:
            self.alarms.ended(cell, event, again=True)
            return
        self.bury(cell, letter, suspect)
        turn = room._begin()
        worker.note[1], worker.note[0] = suspect.mark[1], ALARMING
        worker.hook = "on_alarm"
        error = DeadLetter("alarm", suspect.deaths, suspect.reason)
        if silent:
            self.failed += 1
            self.log_failure("an alarm is given up", cell, error)
        else:
            turn = await self.fail(cell, room, worker, None, error)
        self.alarms.drop(turn, event)
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])
        self.alarms.ended(cell, event)

    def _end_failed(self, cell: Cell, turn: Turn, event: Event) -> None:
        """The result of a connection's turn that did not go through."""
        kind, slot, number = event[0], event[2], event[3]
        if kind == wire.MESSAGE:
            self._end(cell, turn, event, [wire.TURN, slot, number, event[6], turn.effects])
        elif kind == wire.CONNECT:
            self._end(cell, turn, event, [wire.CONNECTED, slot, number, True, turn.effects])
        else:
            self._end(cell, turn, event, [wire.CLOSED, slot, number, turn.effects])

    async def _replay(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        """Run a dead letter's event again. Nobody waits for its acknowledgement, and its connection may have
        gone.
        """
        letter: Letter = event[2]
        worker.note[1] = mark_of(event)[1]  # type: ignore[index]
        worker.note[0] = REPLAYING
        kind, *fields = loads(letter.event)
        _, worker.hook = _NAMES[kind]
        connection, arguments = self._as_it_was(cell, room, kind, fields)
        failure: BaseException | None = None
        try:
            if worker.hook in cell.kind.hooks:
                await self.call(cell.kind, worker, cell.server, *arguments)
                if turn.inner is not None:
                    await self.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            failure = error
            turn = await self.fail(cell, room, worker, connection, error)
        self.replayed(cell, event, failure)
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])

    async def _failed(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        """Tell `on_error` of what background work has raised."""
        worker.note[1] = 0
        worker.note[0] = OTHER
        worker.hook = "on_error"
        try:
            await self.call(cell.kind, worker, cell.server, None, event[2])
            if turn.inner is not None:
                await self.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            turn = await self.fail(cell, room, worker, None, error)
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])

    def _as_it_was(
        self, cell: Cell, room: Room, kind: int, fields: list[Any]
    ) -> tuple[Connection | None, tuple[Any, ...]]:
        """The connection of a dead letter's event, if it has one, and what its hook is given."""
        if kind == ALARM:
            _, name, number, scheduled_ms, attempt, payload = fields
            return None, (Alarm(AlarmRow(name, number, scheduled_ms, scheduled_ms, payload, attempt)),)
        _, slot, number, card, state, *rest = fields
        connection = cell.connections.get(number)
        if connection is None:
            connection = Connection(room, slot, number, card, state)
        if kind == wire.MESSAGE:
            return connection, (rest[1], connection)
        if kind == wire.CONNECT:
            return connection, (connection, ConnectionContext(rest[0]))
        connection.close_cause, connection._closed = rest[3], True
        return connection, (connection, *rest[:3])

    async def cancelled(self, cell: Cell, worker: Worker, event: Event) -> None:
        """End a turn that was cancelled from inside: it took too long, or the client of its request has
        left.
        """
        room = cell.room
        assert room is not None
        kind = event[0]
        error = TurnTimeout(worker.hook, cell.kind.settings.turn_timeout)
        if kind == wire.REQUEST:
            number = event[2]
            if not self.exchanges.is_waiting(number):
                room._discard()  # nobody waits for an answer, and nothing of the turn is kept (S26)
                return
            turn = await self.fail(cell, room, worker, None, error)
            self.exchanges.fail(number, turn.effects, error)
            self._finish(cell, turn, [wire.EFFECTS, turn.effects])
            return
        if kind == REPLAY:
            turn = await self.fail(cell, room, worker, None, error)
            self.replayed(cell, event, error)
            self._finish(cell, turn, [wire.EFFECTS, turn.effects])
            return
        if kind == FAILED:
            turn = await self.fail(cell, room, worker, None, error)
            self._finish(cell, turn, [wire.EFFECTS, turn.effects])
            return
        if kind == ALARM:
            await self._end_failed_alarm(cell, room, worker, event, error)
            return
        slot, number, card, state = event[2:6]
        connection = cell.connections.get(number)
        if connection is None:
            connection = Connection(room, slot, number, card, state)
        turn = await self.fail(cell, room, worker, connection, error)
        self._end_failed(cell, turn, event)

    def finish_start(self, cell: Cell, turn: Turn) -> None:
        """`on_start` is a turn of its own: its effects leave when its writes are on disk."""
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])

    async def call(self, kind: Kind, worker: Worker, owner: Any, *arguments: Any) -> Any:
        """Call the worker's hook with as many arguments as it takes; await it if it has to be."""
        hook = worker.hook
        result = getattr(owner, hook)(*arguments[: kind.parameters[hook]])
        if type(result) is CoroutineType:
            worker.running = result
            return await watched(result, self._suspended, worker.waiting)
        return result

    async def settle(self, worker: Worker, turn: Turn) -> None:
        """The hook has returned: do what is left to be done before its turn ends well."""
        worker.running = settling = settle(turn)
        await watched(settling, self._suspended, worker.waiting)

    async def fail(
        self, cell: Cell, room: Room, worker: Worker, connection: Connection | None, error: BaseException
    ) -> Turn:
        """A turn has failed (S20): undo it, log it, tell `on_error`; return the turn of that hook."""
        # Whatever room code made of its cancellation, the turn ends as a cancelled one.
        await trio.lowlevel.checkpoint_if_cancelled()
        room._discard()
        self.log_failure(f"{worker.hook} failed", cell, error, connection=connection)
        turn = room._begin()
        if worker.hook == "on_error":
            return turn
        self.failed += 1
        if "on_error" not in cell.kind.hooks:
            return turn
        worker.hook = "on_error"
        try:
            await self.call(cell.kind, worker, cell.server, connection, error)
            if turn.inner is not None:
                await self.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as second:  # noqa: BLE001 - room code may raise anything
            room._discard()
            self.log_failure("on_error failed", cell, second, connection=connection)
            turn = room._begin()
        return turn

    def blame(self, error: BaseException) -> bytes:
        """What the client of a failed request is told: the traceback in dev, nothing of it elsewhere
        (S39).
        """
        if self.dev:
            return "".join(traceback.format_exception(error)).encode()
        return b"internal server error\n"

    def log_failure(
        self,
        text: str,
        cell: Cell | None,
        error: BaseException,
        *,
        connection: Connection | None = None,
        **more: Any,
    ) -> None:
        """Say in the log what went wrong, and where: party, room, connection and traceback."""
        if self.on_failure is not None:
            self.on_failure(text, cell, error, more)
            return
        if cell is not None:
            more["party"], _, more["room"] = cell.key.partition("/")
        if connection is not None:
            more["connection"] = connection.id
        log.error(text, exc_info=(type(error), error, error.__traceback__), **more)
