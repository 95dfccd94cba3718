"""HTTP in the host: requests for rooms, the static hooks before them, and streamed answers (S9, S26).

Owns the requests in progress and the credit of their streams. Must not parse HTTP. Peers:
`broker.gateway.forward` over the link, `hibernation.turns`, and `hibernation.requests`, which is imported
with the first request: Quart costs 35 MB.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from cbor2 import dumps, loads

from hibernation import wire
from hibernation.cells import Cell, Event, Kind, Worker
from hibernation.commits import Commits
from hibernation.errors import Refuse
from hibernation.feeds import Feed, Sealed
from hibernation.logs import get_logger
from hibernation.mounted import Application, Mounted
from hibernation.neighbours import Parties, Switchboard
from hibernation.pool import Pool
from hibernation.probation import Errand
from hibernation.replies import Reply
from hibernation.room import Lobby, Room
from hibernation.running import ASKING, OTHER, Mark
from hibernation.settings import Settings
from hibernation.staging import Turn, leave_turn
from hibernation.suspects import Verdict
from hibernation.suspension import watched
from hibernation.turns import Turns

if TYPE_CHECKING:
    from hibernation.requests import Request

log = get_logger("host")

#: Chunks of one streamed answer that may be on their way to its client.
STREAM_CHUNKS: Final = 8
#: What the `aclose` of a stream may take.
CLEAN_UP_SECONDS: Final = 1.0

#: What is being done for a request: None while it waits, then the worker of its turn, or the scope of its
#: task.
Doing = Worker | trio.CancelScope | None


class Exchanges:
    """See the module.

    Args:
        board: What carries to other rooms.
        put: Adds an item to what leaves next.
        finish: Takes over a turn and its result: cell, turn, result.
        flush: Lets leave what has been put.
        spawn_for_life: Starts a task that ends with the host.
    """

    def __init__(
        self,
        settings: Settings,
        env: dict[str, str],
        kinds: dict[str, Kind],
        turns: Turns,
        pool: Pool,
        commits: Commits,
        board: Switchboard,
        put: Callable[[list[Any]], None],
        finish: Callable[[Cell, Turn, list[Any]], None],
        flush: Callable[[], None],
        spawn_for_life: Callable[..., None],
    ) -> None:
        self._settings = settings
        self._env = env
        self._kinds = kinds
        self._turns = turns
        self._pool = pool
        self._commits = commits
        self._board = board
        self._put = put
        self._finish = finish
        self._flush = flush
        self._spawn_for_life = spawn_for_life
        self._mounted: dict[int, Mounted] = {}
        self._doing: dict[int, Doing] = {}
        self._credits: dict[int, trio.Semaphore] = {}
        #: Bodies that come in pieces.
        self._feeds: dict[int, Feed] = {}

    @property
    def busy(self) -> bool:
        """Whether a static hook runs for a request, or an answer is being streamed."""
        return bool(self._credits) or any(isinstance(each, trio.CancelScope) for each in self._doing.values())

    def forget(self) -> None:
        """The gateway has gone, and with it every client that waits for an answer."""
        self._doing.clear()
        self._credits.clear()
        self._feeds.clear()

    # --- From the link ----------------------------------------------------------------------------

    def requested(self, event: Event) -> None:
        """A request for a room: the before-hook first, if there is one, then the room's turn."""
        _, key, number, _ = event
        self._doing[number] = None
        if "pieces" in event[3]:
            self._feeds[number] = Feed(partial(self._want, number))
        kind = self._kinds[key.split("/", 1)[0]]
        if "on_before_request" in kind.hooks and "caller" not in event[3]:
            self._pool.spawn(self._noted, _OTHER, self._before_request, kind, event)
        else:
            self._to_room(kind, event)

    def _to_room(self, kind: Kind, event: Event) -> None:
        if event[1] in self._pool.quarantined:
            self.refuse([event])
        else:
            self._pool.deliver(event[1], kind, event)

    def refuse(self, events: list[Event]) -> None:
        """Answer requests whose room is in quarantine (S4)."""
        for event in events:
            number = event[2]
            if number in self._doing:
                self._end(number)
                answer = [wire.RESPOND, number, 503, [*_TEXT, ("retry-after", "30")], _QUARANTINED]
                self._put([wire.EFFECTS, [answer]])

    def asked_before(self, event: Event) -> None:
        """May this upgrade go on?"""
        probation, mark = self._pool.probation, (ASKING, event[2])
        verdict = Verdict.RUN if probation is None else probation.suspects.judge(mark)
        if probation is None or verdict is Verdict.RUN:
            self._pool.spawn(self._noted, mark, self._before_connect, event)
        elif verdict is Verdict.ALONE:
            probation.errand(Errand(self._noted, (mark, self._before_connect, event)))
            self._pool.look_on()
        else:
            log.error("a before-hook has ended its host again and again: 500", room=event[1])
            probation.ended(None, mark)
            self._put([wire.ADMIT, event[2], 500, _TEXT, b"internal server error\n"])

    async def _noted(self, mark: Mark, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run something beside the rooms, and have it noted that it runs."""
        leave_turn()
        note = self._pool.running.enter(*mark)
        try:
            await function(*arguments)
        finally:
            self._pool.running.leave(note)
            if self._pool.probation is not None:
                self._pool.probation.ended(None, mark)
                self._pool.look_on()

    def fetched(self, event: Event) -> None:
        """A request that belongs to no room."""
        number = event[2]
        self._doing[number] = None
        if "pieces" in event[3]:
            self._feeds[number] = Feed(partial(self._want, number))
        self._pool.spawn(self._noted, _OTHER, self._fetch, event)

    def _want(self, number: int, pieces: int, reading: int) -> None:
        self._put([wire.WANT, number, pieces, reading])
        self._flush()

    def body(self, number: int, data: bytes | None, last: bool, reading: int) -> None:
        """A piece of a request's body."""
        feed = self._feeds.get(number)
        if feed is not None:
            feed.put(data, last, reading)

    def credit(self, number: int, chunks: int) -> None:
        """The client of a stream has taken chunks."""
        credit = self._credits.get(number)
        if credit is not None:
            for _ in range(chunks):
                credit.release()

    def cancel(self, number: int) -> None:
        """The client of a request has left: its turn is cancelled, its stream ends (S26)."""
        doing = self._end(number)
        if doing is not None:
            doing.cancel()

    def _end(self, number: int) -> Doing:
        """Nothing is done for this request any more."""
        if self._feeds:
            self._feeds.pop(number, None)
        return self._doing.pop(number, None)

    def runs_for_a_turn(self, event: Event) -> bool:
        """Whether a turn of this host has asked for this request, and waits for it: what it does, that turn
        does.
        """
        caller = event[3].get("caller")
        if caller is None:
            return False
        cell = self._pool.cells.get(caller)
        return cell is not None and cell.running

    def is_waiting(self, number: int) -> bool:
        """Whether a client still waits for this request's answer."""
        return number in self._doing

    # --- Rooms ------------------------------------------------------------------------------------

    async def turn(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        """Run `on_request`, and let its answer leave with the rest of the turn."""
        from hibernation.requests import build_request, error_reply, provide_app, to_reply

        number = event[2]
        if number not in self._doing:
            room._discard()  # its client left while it waited
            return
        self._doing[number] = worker
        self._put([wire.BEGUN, number])
        self._flush()  # before anything of the turn can be on disk, or the hook can block the loop (S26)
        worker.hook = "on_request"
        provide_app()
        request = build_request(event[3], self._feeds.get(number) if self._feeds else None)
        reply: Reply | None
        try:
            value = await self._turns.call(cell.kind, worker, cell.server, request)
            reply = await watched(to_reply(value), self._pool.suspended, worker.waiting)
            if turn.inner is not None:
                await self._turns.settle(worker, turn)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            reply = error_reply(error)
            if reply is None:
                turn = await self._turns.fail(cell, room, worker, None, error)
                self.fail(number, turn.effects, error)
                self._finish(cell, turn, [wire.EFFECTS, turn.effects])
                return
            room._discard()  # an answer by exception is still the end of a turn that did not go through
            turn = room._begin()
        if isinstance(reply.body, bytes):
            self._end(number)
            turn.effects.append([wire.RESPOND, number, reply.status, reply.headers, reply.body])
            self._finish(cell, turn, [wire.EFFECTS, turn.effects])
            return
        turn.effects.append([wire.RESPOND, number, reply.status, reply.headers, None])
        body = reply.body
        self._doing[number] = None
        cell.streams += 1
        self._finish(cell, turn, [wire.EFFECTS, turn.effects])
        self._commits.after(
            cell, lambda: self._pool.spawn(self._noted, _OTHER, self._stream, cell, number, body)
        )

    def fail(self, number: int, effects: list[Any], error: BaseException) -> None:
        """Add the answer to a request whose turn has failed."""
        self._end(number)
        effects.append([wire.RESPOND, number, 500, _TEXT, self._turns.blame(error)])

    # --- Static hooks -----------------------------------------------------------------------------

    def lobby(self, kind: Kind, room: str | None) -> Lobby:
        """What a static hook of this party is told."""
        # No room asks: one of this name may be in a turn, to which what the hook fetches does not belong.
        parties = Parties(self._board, f"{kind.name}/", kind.settings, self._send_now, _no_turn)
        return Lobby(room, kind.name, self._env, parties, self._serve)

    async def _static(
        self, kind: Kind, hook: str, fields: dict[str, Any], feed: Feed | None = None
    ) -> tuple[Reply | None, Any]:
        """Call a static hook. Gives the answer, if it is one, and the request with what the hook changed."""
        from hibernation.requests import (
            Request,
            build_request,
            error_reply,
            provide_app,
            refusal,
            request_fields,
            to_reply,
        )

        request = build_request(fields, feed)
        provide_app()
        room = fields.get("room")
        lobby = self.lobby(kind, room)
        try:
            with trio.fail_after(kind.settings.turn_timeout):
                value = getattr(kind.cls, hook)(*(request, lobby)[: kind.parameters[hook]])
                if isinstance(value, Awaitable):
                    value = await value
                if isinstance(value, Request):
                    request, value = value, None
                if value is None:
                    request_fields(request)  # whatever headers were given, they have to be sent
                    return None, request
                answer = await to_reply(value)
                if hook == "on_before_connect":
                    answer = replace(answer, body=await _whole(answer.body))
                return answer, request
        except Refuse as refused:
            return refusal(refused), request
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - the app's code may raise anything
            reply = error_reply(error)
            if reply is None:
                self._turns.log_failure(f"{hook} failed", None, error, party=kind.name, room=room)
                reply = Reply(500, _TEXT, self._turns.blame(error))
            return reply, request

    async def _serve(self, app: Application, request: "Request", lobby: Lobby) -> Reply:
        mounted = self._mounted.get(id(app))
        if mounted is None:
            mounted = self._mounted[id(app)] = Mounted(app, self._pool.spawn_along, self._spawn_for_life)
        return await mounted.answer(request, lobby)

    async def end(self) -> None:
        """The host ends: let mounted applications do what they do then."""
        for mounted in self._mounted.values():
            await mounted.end()

    def _send_now(self, effect: list[Any], _size: int) -> None:
        """Carry out an effect of a static hook, which has no turn whose end it could wait for."""
        self._put([wire.EFFECTS, [effect]])
        self._flush()

    async def _before_connect(self, event: Event) -> None:
        from hibernation.requests import request_fields

        _, key, number, encoded = event
        kind = self._kinds[key.split("/", 1)[0]]
        fields = loads(encoded)
        refused, request = await self._static(kind, "on_before_connect", fields)
        if refused is None:
            self._put([wire.ADMIT, number, 0, [], dumps({**fields, **request_fields(request)})])
        else:
            self._put([wire.ADMIT, number, refused.status, refused.headers, refused.body])
        self._flush()

    async def _before_request(self, kind: Kind, event: Event) -> None:
        from hibernation.requests import request_fields

        _, key, number, fields = event
        with trio.CancelScope() as scope:
            self._doing[number] = scope
            feed = self._feeds.get(number)
            if feed is not None and fields["pieces"] == "once":
                refused, request = await self._static(kind, "on_before_request", fields, Sealed(feed.want))
            else:
                refused, request = await self._static(kind, "on_before_request", fields, feed)
            if refused is not None:
                await self._answer(number, refused)
                return
        if number not in self._doing:
            return  # its client has left
        self._doing[number] = None
        if feed is not None and feed.begun:  # the room reads it from the beginning
            self._feeds[number] = Feed(feed.want, feed.reading + 1)
        self._to_room(kind, [wire.REQUEST, key, number, {**fields, **request_fields(request)}])
        self._pool.activate()

    async def _fetch(self, event: Event) -> None:
        _, _, number, fields = event
        kind = self._kinds["main"]
        with trio.CancelScope() as scope:
            self._doing[number] = scope
            self._put([wire.BEGUN, number])
            reply = None if kind.static is None else self._file(kind, fields)
            if reply is None and "on_fetch" in kind.hooks:
                reply, _ = await self._static(kind, "on_fetch", fields, self._feeds.get(number))
            await self._answer(number, reply or Reply(404, _TEXT, b"not found\n"))
        self._end(number)

    def _file(self, kind: Kind, fields: dict[str, Any]) -> Reply | None:
        """The answer of the app's folder of files; None where it has none, and for what is the hook's."""
        from hibernation.static_files import StaticFiles

        if fields["method"] not in ("GET", "HEAD") and "on_fetch" in kind.hooks:
            return None
        assert kind.static is not None
        try:
            return StaticFiles(kind.static).answer(
                fields["method"], fields["path"], fields["raw_path"], fields["query"], fields["headers"]
            )
        except OSError as error:
            log.error("a file cannot be read", path=fields["path"], exc_info=error)
            return Reply(500, _TEXT, b"internal server error\n")

    async def _answer(self, number: int, reply: Reply) -> None:
        """Answer a request with which no turn has to do."""
        whole = reply.body if isinstance(reply.body, bytes) else None
        self._put([wire.EFFECTS, [[wire.RESPOND, number, reply.status, reply.headers, whole]]])
        self._flush()
        if not isinstance(reply.body, bytes):
            await self._stream(None, number, reply.body)
        self._end(number)

    # --- Streams ----------------------------------------------------------------------------------

    async def _stream(self, cell: Cell | None, number: int, body: Any) -> None:
        """Send an answer piece by piece, outside of any turn, as fast as its client takes it."""
        credit = self._credits[number] = trio.Semaphore(STREAM_CHUNKS)
        whole = False
        try:
            with trio.CancelScope() as scope:
                if number not in self._doing:
                    scope.cancel()  # its client left before the first piece
                elif cell is not None:
                    self._doing[number] = scope
                async for chunk in body:
                    await credit.acquire()
                    self._put([wire.CHUNK, number, bytes(chunk)])
                    self._flush()
                whole = True
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            self._turns.log_failure("streaming a response failed", cell, error)
        finally:
            with trio.move_on_after(CLEAN_UP_SECONDS, shield=True):
                await self._end_body(cell, body)
            self._credits.pop(number, None)
            self._end(number)
            self._put([wire.FINISH, number, whole])
            self._flush()
            if cell is not None:
                self._pool.stream_ended(cell)

    async def _end_body(self, cell: Cell | None, body: Any) -> None:
        """Let the room's code clean up behind its stream."""
        if not hasattr(body, "aclose"):
            return
        try:
            await body.aclose()
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            self._turns.log_failure("ending a streamed response failed", cell, error)


_TEXT: Final = [("content-type", "text/plain; charset=utf-8")]
_QUARANTINED: Final = b"this room does not start at the moment\n"
#: What is noted of things that are given to no other host.
_OTHER: Final = (OTHER, 0)


def _no_turn() -> bool:
    return False


async def _whole(body: Any) -> bytes:
    """A body as bytes, also if it comes in pieces."""
    if isinstance(body, bytes):
        return body
    try:
        return b"".join([bytes(chunk) async for chunk in body])
    finally:
        if hasattr(body, "aclose"):
            with trio.move_on_after(CLEAN_UP_SECONDS, shield=True):
                await body.aclose()
