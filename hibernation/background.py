"""Background work: what rooms have begun beside their turns with `room.start_soon` (S7, S20).

Owns the pieces of work and their tasks, from the end of the turn that asked for them to their own. Must not
run hooks: what goes wrong here becomes an event of the room, whose turn calls `on_error`. Peers:
`hibernation.host`, which takes what a piece has staged, and `hibernation.pool`, whose rooms stay in memory
for it.

A piece of work begins when the turn that asked for it is on disk, so it is never begun twice; and it is not
begun again by a host that comes after this one's death. Its task belongs to the host, not to the link: it
goes on when the gateway is replaced, and what it flushes waits for the next one.

Invariants:
    W1  a room with work that has not ended has its object in memory
    W2  work begins when the turn that asked for it is on disk, and only in the host that ran that turn
    W3  what a piece has staged leaves whole, by one flush or its end, or not at all
"""

from collections.abc import Callable
from time import monotonic
from types import CoroutineType
from typing import Any, Final

import trio

from hibernation import wire
from hibernation.cells import Cell
from hibernation.pool import LOOK_SECONDS, Pool
from hibernation.room import Room
from hibernation.room_storage import settle
from hibernation.running import FAILED
from hibernation.staging import Beside, Task, Turn
from hibernation.suspension import watched

__all__ = ["CLEAN_UP_SECONDS", "Background", "Work"]

#: What a piece of work may take to clean up when it is cancelled.
CLEAN_UP_SECONDS: Final = 1.0


class Work:
    """One piece of work."""

    __slots__ = ("arguments", "cell", "function", "running", "scope", "started_at")

    def __init__(self, cell: Cell, task: Task) -> None:
        self.cell = cell
        self.function, self.arguments = task
        self.scope = trio.CancelScope()
        self.started_at = monotonic()
        #: Its coroutine, for `explain`.
        self.running: Any = None

    @property
    def name(self) -> str:
        """What the function is called."""
        return str(getattr(self.function, "__qualname__", None) or type(self.function).__qualname__)


class Background:
    """See the module.

    Args:
        pool: Whose rooms stay for it.
        finish: Takes over what a piece has staged: cell, turn, result.
        flush: Lets leave what may.
        log_failure: Says in the log what went wrong in a room.
    """

    def __init__(
        self,
        pool: Pool,
        finish: Callable[[Cell, Turn, list[Any]], None],
        flush: Callable[[], None],
        log_failure: Callable[..., None],
    ) -> None:
        self._pool = pool
        self._finish = finish
        self._flush = flush
        self._log_failure = log_failure
        #: Where the tasks live; set when the host runs.
        self.nursery: trio.Nursery
        self._count = 0
        self._ended = trio.Event()

    @property
    def busy(self) -> bool:
        """Whether there is any work."""
        return self._count > 0

    def planned(self, cell: Cell, room: Room, tasks: list[Task]) -> Callable[[], None]:
        """A turn that has ended well has asked for this work: the room stays for it. Call what is returned
        when the turn is on disk.
        """
        work = [Work(cell, task) for task in tasks]
        cell.background = [*cell.background, *work]
        cell.streams += len(work)
        room._tasks += len(work)
        self._count += len(work)
        return lambda: self._begin(work)

    def _begin(self, work: list[Work]) -> None:
        for each in work:
            each.started_at = monotonic()
            self.nursery.start_soon(self._run, each)

    def cancel(self) -> None:
        """Cancel all that runs: what it has staged and not flushed is lost."""
        for cell in self._pool.cells.values():
            for work in cell.background:
                work.scope.cancel()

    async def all_ended(self) -> None:
        """Return when there is no work any more."""
        while self._count:
            await self._ended.wait()

    async def _run(self, work: Work) -> None:
        cell, pool = work.cell, self._pool
        room = cell.room
        assert room is not None
        error: BaseException | None = None
        note = None
        try:
            with work.scope:
                await trio.lowlevel.checkpoint_if_cancelled()  # before it has begun
                while pool.probation is not None and pool.probation.holds:  # noqa: ASYNC110
                    await trio.sleep(LOOK_SECONDS)
                note = pool.running.enter()
                error = await self._call(cell, room, work)
        finally:
            if note is not None:
                pool.running.leave(note)
                if pool.probation is not None:
                    pool.look_on()
            self._has_ended(cell, room, work, error)

    async def _call(self, cell: Cell, room: Room, work: Work) -> BaseException | None:
        """Run the user's function; give what it raised, after dropping what it has staged."""
        turn = room._begin(Beside)
        try:
            result = work.function(*work.arguments)
            if type(result) is CoroutineType:
                work.running = result
                await watched(result, _nothing, [0])
            await settle(turn)
        except trio.Cancelled:
            room._discard()
            raise
        except BaseException as failure:  # noqa: BLE001 - room code may raise anything
            room._discard()
            self._flush()  # what had to wait for it
            await trio.lowlevel.checkpoint_if_cancelled()
            return failure
        if turn.used:
            self._finish(cell, turn, [wire.EFFECTS, turn.effects])
            self._flush()
        else:
            room._discard()
        return None

    def _has_ended(self, cell: Cell, room: Room, work: Work, error: BaseException | None) -> None:
        pool = self._pool
        cell.background = [each for each in cell.background if each is not work]
        room._tasks -= 1
        if error is not None:
            self._log_failure(f"background work failed: {work.name}", cell, error)
            if "on_error" in cell.kind.hooks and not pool.retiring:
                pool.deliver(cell.key, cell.kind, [FAILED, cell.key, error])
                pool.activate()
        pool.stream_ended(cell)
        self._count -= 1
        if not self._count:
            ended, self._ended = self._ended, trio.Event()
            ended.set()


def _nothing() -> None:
    """No other worker has to be brought in: this task is none of the pool's."""
