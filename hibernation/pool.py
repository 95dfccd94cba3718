"""The pool: workers that give ready rooms their turns, and the life of rooms in memory.

Owns the cells, the queue of ready ones, and the tasks. Must not know what a turn does, or how events come and
results leave. Peers: `hibernation.turns` (what an event means), `hibernation.host` (the link).

Whichever worker finds nothing ready waits for the link; all others park. A turn that never really waits costs
no task switch: the worker runs room after room. When a turn does wait, `suspended` brings in another worker.

Invariants:
    H1  at most one turn of a serial room runs at a time, and its events start in the order of their arrival;
        what may overlap in others, and in which order, is said in `hibernation.overlap`
    H4  a cell is in `cells` while it has events, a running turn, an object in memory, uncommitted writes, or
        connection values that the gateway has not acknowledged; and in `_ready` at most once
    H5  either some worker waits for the link, or one is running, or one has been woken
"""

import random
import resource
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from types import CoroutineType
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import trio

from hibernation import wire
from hibernation.cells import Cell, Event, Kind, Worker
from hibernation.errors import TurnTimeout
from hibernation.memory import Trimmer
from hibernation.overlap import Overlap
from hibernation.probation import HEAD_START_SECONDS, Errand, Probation
from hibernation.room import Backstage, Room
from hibernation.running import STARTING, Running, mark_of, mark_of_start
from hibernation.settings import Settings
from hibernation.staging import Turn
from hibernation.suspects import REMEMBER_SECONDS, Suspect, Verdict
from hibernation.suspension import watched
from storage.clock import monotonic

#: Rooms whose last waking is remembered, for `broker rooms` and the admin pages.
RECENT_ROOMS: Final = 1024
#: Delays between attempts to start a room whose `__init__` or `on_start` failed (S4).
RETRY_FIRST_SECONDS: Final = 0.1
RETRY_LAST_SECONDS: Final = 10.0
#: How often the clock looks while something is due: idle rooms, turns under way, rooms to start again.
CLOCK_SECONDS: Final = 0.05
#: How often it looks while nothing is.
REST_SECONDS: Final = 1.0
#: Workers that wait for something to do; further ones end.
PARKED_MAX: Final = 64
#: How often, at most, a room that stays while it has connections asks whether it has.
DESERTED_SECONDS: Final = 0.5
#: How often it is looked whether what waits during probation may begin.
LOOK_SECONDS: Final = 0.25
#: Characters of the reason why a room is in quarantine.
REASON_MAX: Final = 500
#: Rooms that a line of the log names.
ROOMS_NAMED_MAX: Final = 10
#: How often the memory of the process is looked at.
MEMORY_SECONDS: Final = 1.0


class Turns(Protocol):
    """What the pool needs to know of turns."""

    async def run(self, cell: Cell, worker: Worker, event: Event) -> None:
        """Run one event's turn to its end, well or not."""

    async def cancelled(self, cell: Cell, worker: Worker, event: Event) -> None:
        """End a turn that was cancelled from inside."""

    async def give_up(
        self, cell: Cell, worker: Worker, event: Event, suspect: Suspect, *, silent: bool
    ) -> None:
        """End an event that has had its tries, without its hook."""

    async def settle(self, worker: Worker, turn: Turn) -> None:
        """The hook has returned: do what is left to be done before its turn ends well."""

    def finish_start(self, cell: Cell, turn: Turn) -> None:
        """The effects of `on_start` may leave when its writes are on disk."""

    def log_failure(self, text: str, cell: Cell, error: BaseException, **more: Any) -> None:
        """Say in the log what went wrong in a room."""


class Pool:
    """See the module.

    Args:
        settings: Of the instance.
        backstage: What rooms reach the world through.
        env: What rooms see as `room.env`.
        wait: Returns when the link has something.
        receive: Takes it, and gives events to `deliver`.
        flush: Lets leave what turns have produced.
        is_full: Whether what has been produced has to leave before more is.
        is_deserted: Whether a room has no connection.
        running: Where turns in progress are noted.
    """

    def __init__(
        self,
        settings: Settings,
        backstage: Backstage,
        env: dict[str, str],
        *,
        wait: Callable[[], Awaitable[None]],
        receive: Callable[[], None],
        flush: Callable[[], None],
        is_full: Callable[[], bool],
        is_deserted: Callable[[str], Awaitable[bool]],
        running: Running | None = None,
    ) -> None:
        self._settings = settings
        self._backstage = backstage
        self._env = env
        self._wait = wait
        self._receive = receive
        self._flush = flush
        self._is_full = is_full
        self._is_deserted = is_deserted
        self.turns: Turns
        self.running = running or Running()
        #: Only while something is suspected of having ended a host.
        self.probation: Probation | None = None
        self._postponed: list[Errand] = []
        #: Rooms that do not start, and why; and who is told.
        self.quarantined: dict[str, str] = {}
        self.on_quarantine: Callable[[Cell, str], None] = lambda _cell, _reason: None
        self.cells: dict[str, Cell] = {}
        self._ready: deque[Cell] = deque()
        self._workers: set[Worker] = set()
        self._by_task: dict[trio.lowlevel.Task, Worker] = {}
        self._parked: list[Worker] = []
        self._waiting = False
        self._nursery: trio.Nursery | None = None
        self._idle: dict[Cell, None] = {}
        self._retries: set[Cell] = set()
        self._clock_wanted = trio.Event()
        self._recent: dict[str, tuple[int, float]] = {}
        self._trimmer = Trimmer()
        #: No turn is started any more.
        self.retiring = False
        #: No turn of a room whose writes are not on disk is started; and the rooms that wait for that.
        self.paused = False
        self._held: list[Cell] = []
        self.awake = 0
        self.wakes = 0
        self.evictions = 0
        #: The room whose turn was begun last, for the watchdog.
        self.active = ""
        #: The same, if its turns may overlap and that one has not waited yet.
        self._overlapping: Cell | None = None

    # --- Tasks ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Give ready rooms their turns, until cancelled, or told to `forget` them."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._clock)
            self._nursery.start_soon(self._work)
            if self.probation is not None:
                self.suspect(self.probation)
        self._clear()

    def spawn(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run something beside the rooms, for as long as the pool runs; nothing, if it does not run."""
        if self._nursery is None:
            return
        if self.probation is not None and self.probation.holds:
            self._postponed.append(Errand(function, arguments))
            return
        self._nursery.start_soon(function, *arguments)

    def spawn_along(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run something that belongs to what runs beside the rooms already, also during probation."""
        if self._nursery is not None:
            self._nursery.start_soon(function, *arguments)

    async def _work(self) -> None:
        worker = Worker(self.running.take())
        task = worker.task = trio.lowlevel.current_task()
        self._workers.add(worker)
        self._by_task[task] = worker
        try:
            while True:
                worker.cancelled = False
                with trio.CancelScope() as worker.scope:
                    # Cancelled from inside: a turn took too long, or its client has left; then perhaps its
                    # `on_error`, too.
                    if worker.cell is not None:
                        await self._end_cancelled(worker.cell, worker, worker.event)
                    if await self._rounds(worker):
                        return
        except Exception:
            # A fault of ours: what this worker ran stays noted, since it is what ends the host.
            self._workers.discard(worker)
            raise
        finally:
            # A turn that is cancelled from outside ends here: what its code has started elsewhere must not
            # go on in it.
            if worker.cell is not None and worker.cell.room is not None:
                worker.cell.room._discard()
            del self._by_task[task]
            if worker in self._workers:
                self._workers.discard(worker)
                self.running.give_back(worker.note)

    async def _rounds(self, worker: Worker) -> bool:
        """Work until cancelled. True: there are workers enough without this one."""
        ready = self._ready
        while True:
            while ready and not self._is_full():
                if self.probation is None:
                    cell = ready.popleft()
                else:
                    chosen = self.probation.pick(ready, self._is_busy, self.running.others)
                    if chosen is None:
                        break
                    cell = chosen
                await self._burst(cell, worker)
                if worker.cancelled:  # by somebody else, while the turn went on
                    return False
            self._flush()
            if self._waiting:
                if len(self._parked) >= PARKED_MAX:
                    return True
                await self._park(worker)
                continue
            self._waiting = True
            try:
                await self._wait()
            finally:
                self._waiting = False
            self._receive()

    async def _park(self, worker: Worker) -> None:
        def abort(_: Any) -> trio.lowlevel.Abort:
            self._parked.remove(worker)
            return trio.lowlevel.Abort.SUCCEEDED

        self._parked.append(worker)
        await trio.lowlevel.wait_task_rescheduled(abort)

    def activate(self) -> None:
        """Bring one more worker to work."""
        if self._parked:
            worker = self._parked.pop()
            assert worker.task is not None
            trio.lowlevel.reschedule(worker.task)
        elif self._nursery is not None:
            self._nursery.start_soon(self._work)

    def suspended(self) -> None:
        """A turn begins to wait: another worker goes on, and what has been produced leaves now (H5)."""
        cell, self._overlapping = self._overlapping, None
        if cell is not None:
            self._schedule(cell)
        if self._ready or not self._waiting:
            self.activate()
        else:
            self._flush()

    @property
    def busy(self) -> bool:
        """Whether a turn is under way."""
        return any(worker.cell is not None and not worker.cell.abandoned for worker in self._workers)

    def rooms_at_work(self) -> list[str]:
        """Rooms whose turns are under way, some of them if they are many."""
        keys = {worker.cell.key for worker in self._workers if worker.cell is not None}
        return sorted(keys)[:ROOMS_NAMED_MAX]

    def retire(self) -> None:
        """Start no more turns; the events that have not begun are somebody else's."""
        self.retiring = True
        self._ready.clear()
        for cell in self.cells.values():
            cell.events.clear()
            cell.scheduled = False

    def forget(self) -> None:
        """The gateway has gone, and the next one will deliver again what was not acknowledged: cancel the
        turns under way, and start from nothing but the background work that goes on.
        """
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        self._nursery = None
        for cell in self.cells.values():  # whatever becomes of its turn, no other begins behind it
            cell.events.clear()
        self._ready.clear()
        self._parked.clear()
        self._waiting = False

    def go_on(self) -> None:
        """The disk takes writes again."""
        self.paused = False
        for cell in self._held:
            cell.held = False
        self._ready.extend(self._held)
        self._held.clear()
        if self._ready:
            self.activate()

    def _clear(self) -> None:
        cells, self.cells = self.cells, {}
        for cell in cells.values():
            self._keep(cell)
        self._ready.clear()
        self._parked.clear()
        self._held.clear()
        self._idle = {cell: None for cell in self._idle if cell.background}
        self._retries.clear()
        self._waiting = False
        self.awake = sum(cell.server is not None for cell in self.cells.values())
        self._postponed.clear()

    def _keep(self, cell: Cell) -> None:
        """Of what was there with a former gateway stay the rooms with background work, and what is not on
        disk. The next one knows all that is known here of connections.
        """
        if not cell.background:
            if not cell.gate:
                return
            cell.server = cell.room = cell.met = None
        # Its streams have ended with the gateway, or never begun.
        cell.streams = len(cell.background)
        cell.events.clear()
        cell.scheduled = cell.running = cell.held = False
        cell.overlap = None
        if cell.retry_at != inf:
            cell.retry_at = 0.0
        cell.edited = 0
        for connection in cell.connections.values():
            connection._edits = 0
        if cell.background:
            self._let_go(cell)
        else:
            cell.connections.clear()
        self.cells[cell.key] = cell

    # --- Probation --------------------------------------------------------------------------------

    def suspect(self, probation: Probation) -> None:
        """Run what is suspected alone, until nothing is left to be judged."""
        self.probation = probation
        if self._nursery is not None:
            probation.begin()
            self._nursery.start_soon(self._watch_probation, probation)

    async def _watch_probation(self, probation: Probation) -> None:
        """Forget what does not come, and wake a worker for what had to wait."""
        await trio.sleep(HEAD_START_SECONDS)
        expires_at = monotonic() + self._settings.probation_seconds - HEAD_START_SECONDS
        forgotten_at = monotonic() + REMEMBER_SECONDS
        while self.probation is probation:
            if monotonic() >= expires_at:
                probation.expire(blamed=monotonic() >= forgotten_at)
            self.look_on()
            await trio.sleep(LOOK_SECONDS)

    def look_on(self) -> None:
        """Something has ended, or come, during probation: let begin what may."""
        probation = self.probation
        if probation is not None and probation.over:
            probation = self.probation = None
        if probation is None or not probation.holds:
            postponed, self._postponed = self._postponed, []
            for errand in postponed:
                self.spawn(errand.function, *errand.arguments)
        else:
            alone = probation.take_errand(self._is_busy, self.running.others)
            if alone is not None:
                assert self._nursery is not None
                self._nursery.start_soon(self._run_alone, probation, alone)
        self.activate()

    async def _run_alone(self, probation: Probation, errand: Errand) -> None:
        await errand.function(*errand.arguments)
        probation.rested(errand)
        self.look_on()

    def _is_busy(self) -> bool:
        return self.busy

    # --- Quarantine -------------------------------------------------------------------------------

    def quarantine(self, cell: Cell, reason: str) -> None:
        """Start this room no more (S4): its events wait."""
        cell.retry_at = inf
        self._retries.discard(cell)
        self.quarantined[cell.key] = reason
        self.on_quarantine(cell, reason)

    def release(self, key: str) -> bool:
        """Try this room again. False: it is not in quarantine."""
        if self.quarantined.pop(key, None) is None:
            return False
        cell = self.cells.get(key)
        if cell is not None:
            cell.failures = 0
            cell.retry_at = 0.0
            if cell.events:
                self._schedule(cell)
                self.activate()
            else:
                self.forget_if_idle(cell)
        return True

    # --- Rooms ------------------------------------------------------------------------------------

    def deliver(self, key: str, kind: Kind, event: Event) -> None:
        """Put an event into its room's cell, and the cell among the ready."""
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell(key, kind)
            cell.events.append(event)
            if self.quarantined and key in self.quarantined:
                cell.retry_at = inf
                cell.scheduled = False
            else:
                self._ready.append(cell)
        else:
            cell.events.append(event)
            self._schedule(cell)
        if self.probation is not None:
            if event[0] == wire.CLOSE:
                self.probation.close_came(event[3])
            self.probation.arrived(cell, event)

    def _schedule(self, cell: Cell) -> None:
        if cell.running and (cell.overlap is None or not cell.overlap.may_take(cell.events)):
            return
        if not cell.scheduled and not cell.retry_at and not self.retiring:
            cell.scheduled = True
            self._ready.append(cell)

    async def _burst(self, cell: Cell, worker: Worker) -> None:
        """Give a room its turns: construct it if need be, drain its events, let it go (S24)."""
        if cell.gate and self.paused:
            cell.held = True
            self._held.append(cell)  # and stays scheduled
            if self.probation is not None:
                self._rested(self.probation, cell)
            return
        cell.scheduled = False
        if self.retiring:
            return
        if cell.kind.overlaps:
            await self._burst_overlapping(cell, worker)
            return
        cell.running = True
        worker.cell = cell
        if cell.server is not None or self._construct(cell, worker):
            if not cell.started and not await self._start(cell, worker):
                self._rest(cell, worker)
                if self.probation is not None:
                    self._rested(self.probation, cell)
                return
            events = cell.events
            budget = self._settings.turns_per_room_burst
            run = self.turns.run
            room = cell.room
            assert room is not None
            if cell.met:
                cell.connections.update(cell.met)
            self.active = cell.key
            while events and budget:
                budget -= 1
                probation = self.probation
                if probation is not None and not probation.may_begin(cell):
                    break
                worker.event = event = events.pop(0)
                worker.started = monotonic()
                if probation is None:
                    await run(cell, worker, event)
                else:
                    await self._run_judged(probation, cell, worker, event)
                if room._evict or worker.cancelled or (cell.gate and self.paused):
                    break
        self._rest(cell, worker)
        if self.probation is not None:
            self._rested(self.probation, cell)

    async def _burst_overlapping(self, cell: Cell, worker: Worker) -> None:
        """One worker's part of a burst whose turns may overlap: begin what may begin, one after the other.
        Where a turn waits, another worker comes in.
        """
        overlap = cell.overlap
        if overlap is None:
            overlap = cell.overlap = Overlap(cell.kind.interleaves)
        overlap.workers += 1
        cell.running = True
        worker.cell = cell
        if overlap.may_take(cell.events) and await self._is_awake(cell, worker, overlap):
            budget = self._settings.turns_per_room_burst
            room = cell.room
            assert room is not None
            if cell.met:
                cell.connections.update(cell.met)
            self.active = cell.key
            while budget:
                budget -= 1
                probation = self.probation
                if probation is not None and not self._may_overlap(probation, cell, overlap):
                    break
                event = overlap.take(cell.events)
                if event is None:
                    break
                worker.event = event
                worker.started = monotonic()
                self._overlapping = cell
                if probation is None:
                    await self.turns.run(cell, worker, event)
                else:
                    await self._run_judged(probation, cell, worker, event)
                self._overlapping = None
                worker.running = None
                if worker.cancelled or (cell.gate and self.paused):
                    break
                if room._evict and overlap.workers == 1:
                    break
        self._rest(cell, worker)
        if self.probation is not None:
            self._rested(self.probation, cell)

    def is_first(self, cell: Cell) -> Callable[[], bool]:
        """A question: whether no turn has to end before that of the running task may."""
        if cell.kind.interleaves:
            task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
            while task is not None:
                worker = self._by_task.get(task)
                if worker is not None:
                    event = worker.event
                    if not event:
                        break
                    return lambda: cell.overlap is None or cell.overlap.is_first(event)
                task = None if task.parent_nursery is None else task.parent_nursery.parent_task
        return lambda: True

    async def _is_awake(self, cell: Cell, worker: Worker, overlap: Overlap) -> bool:
        """Construct and start a room, if it is not awake; nothing of it runs beside that. False: it is tried
        again later.
        """
        if cell.server is not None and cell.started:
            return True
        overlap.starting = True
        try:
            if cell.server is None and not self._construct(cell, worker):
                return False
            return cell.started or await self._start(cell, worker)
        finally:
            overlap.starting = False

    def _may_overlap(self, probation: Probation, cell: Cell, overlap: Overlap) -> bool:
        """Whether a turn may begin during probation: who runs alone is alone in its room, too (B4)."""
        if probation.alone is cell and overlap.workers > 1:
            return False
        return probation.may_begin(cell)

    async def _run_judged(self, probation: Probation, cell: Cell, worker: Worker, event: Event) -> None:
        """Run an event's turn, or end it without if it has had its tries."""
        verdict = probation.judge(event)
        mark = mark_of(event)
        if mark is None or verdict in (Verdict.RUN, Verdict.ALONE):
            await self.turns.run(cell, worker, event)
        else:
            suspect = probation.suspects.by_mark[mark]
            silent = verdict is Verdict.GIVE_UP_SILENTLY
            await self.turns.give_up(cell, worker, event, suspect, silent=silent)
        probation.ended(cell, mark)

    def _may_start(self, cell: Cell) -> bool:
        """Whether a room may be started: not if doing so has ended one host after the other (S23)."""
        if self.probation is None or self.probation.judge_start(cell) in (Verdict.RUN, Verdict.ALONE):
            return True
        mark = mark_of_start(cell.key)
        suspect = self.probation.suspects.by_mark[mark]
        self.probation.ended(cell, mark)
        self.quarantine(cell, f"starting it ended its host {suspect.deaths} times: {suspect.reason}")
        return False

    def _started(self, cell: Cell) -> None:
        """A start has come to its end, well or not."""
        if self.probation is not None:
            self.probation.ended(cell, mark_of_start(cell.key))

    def _construct(self, cell: Cell, worker: Worker) -> bool:
        """Make the room's object. False: its `__init__` failed, and is tried again later (S4)."""
        if self.probation is not None and not self._may_start(cell):
            return False
        worker.event = []
        worker.hook = "__init__"
        kind = cell.kind
        if kind.notes_start:
            note = worker.note
            note[0], note[1] = 0, mark_of_start(cell.key)[1]
            note[0] = STARTING
        room = Room(self._backstage, cell.key, kind.settings, self._env, cell.connections, cell.pending)
        if cell.pending_cleared:
            room._pending_cleared = True
        cell.room = room
        try:
            cell.server = kind.cls(room)
        except BaseException as error:  # noqa: BLE001 - room code may raise anything; nothing is awaited
            self._start_failed(cell, error)
            return False
        for connection in cell.connections.values():
            connection._room = room
        cell.started = not kind.starts
        if cell.started:
            cell.failures = 0
            if self.probation is not None:
                self._started(cell)
        self.awake += 1
        self.wakes += 1
        recent = self._recent
        before = recent.pop(cell.key, None)
        if before is None and len(recent) >= RECENT_ROOMS:
            del recent[next(iter(recent))]
        recent[cell.key] = (1 if before is None else before[0] + 1, monotonic())
        return True

    async def _start(self, cell: Cell, worker: Worker) -> bool:
        """Run `on_start`. False: it failed, and is tried again later (S3, S4)."""
        room = cell.room
        assert room is not None
        worker.hook = "on_start"
        worker.started = monotonic()
        turn = room._begin()
        seconds = cell.kind.settings.start_timeout
        try:
            with trio.move_on_after(seconds) as deadline:  # noqa: ASYNC912 - it is the user's hook that waits
                result = cell.server.on_start()
                if type(result) is CoroutineType:
                    worker.running = result
                    await watched(result, self.suspended, worker.waiting)
                if turn.inner is not None:
                    await self.turns.settle(worker, turn)
            if deadline.cancelled_caught:
                raise TurnTimeout("on_start", seconds, "start_timeout")
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - room code may raise anything
            await trio.lowlevel.checkpoint_if_cancelled()
            self.awake -= 1
            self._start_failed(cell, error)
            return False
        cell.started = True
        cell.failures = 0
        self._started(cell)
        self.turns.finish_start(cell, turn)
        return True

    def _start_failed(self, cell: Cell, error: BaseException) -> None:
        """Events wait; the room is tried again, later each time."""
        assert cell.room is not None
        cell.room._discard()
        cell.room = cell.server = None
        self._started(cell)
        now = monotonic()
        if not cell.failures:
            cell.failing_since = now
        cell.failures += 1
        settings = cell.kind.settings
        failing_seconds = now - cell.failing_since
        if cell.failures >= settings.start_tries or failing_seconds >= settings.start_seconds:
            self.turns.log_failure("room does not start: it is in quarantine", cell, error)
            self.quarantine(
                cell,
                f"it failed to start {cell.failures} times: {type(error).__name__}: {error}"[:REASON_MAX],
            )
            return
        delay = min(RETRY_FIRST_SECONDS * 2 ** (cell.failures - 1), RETRY_LAST_SECONDS)
        delay *= random.uniform(0.75, 1.25)
        cell.retry_at = now + delay
        self._retries.add(cell)
        self._clock_wanted.set()
        self.turns.log_failure("room does not start", cell, error, retry_seconds=round(delay, 2))

    async def _end_cancelled(self, cell: Cell, worker: Worker, event: Event) -> None:
        if event:
            worker.started = monotonic()
            await self.turns.cancelled(cell, worker, event)
            if self.probation is not None:
                self.probation.ended(cell, mark_of(event))
        elif cell.room is not None:
            self.awake -= 1
            self._start_failed(
                cell, TurnTimeout("on_start", cell.kind.settings.start_timeout, "start_timeout")
            )
        self._rest(cell, worker)
        if self.probation is not None:
            self._rested(self.probation, cell)

    def _rested(self, probation: Probation, cell: Cell) -> None:
        """A burst is over during probation."""
        if probation.rested(cell) or probation.has_errands:
            self.look_on()

    def _rest(self, cell: Cell, worker: Worker) -> None:
        """The room's burst is over, or its share of it: schedule it again, keep it, or evict it (S6)."""
        worker.cell = worker.running = None
        worker.note[0] = 0
        overlap = cell.overlap
        if overlap is not None:
            overlap.workers -= 1
            if overlap.workers or cell.scheduled:  # whoever comes last
                cell.running = overlap.workers > 0
                self._schedule(cell)
                return
        cell.running = False
        if cell.retry_at:
            return
        room = cell.room
        if room is not None and room._evict and not cell.streams:
            self._evict(cell)  # also if there is more to do: fields do not survive (S8)
            room = None
        if cell.events and not self.retiring:
            self._schedule(cell)
            return
        if room is None:
            self.forget_if_idle(cell)
        elif cell.kind.evicts_at_once and not cell.streams:
            self._evict(cell)
        else:
            cell.used_at = monotonic()
            if cell.connections:
                self._let_go(cell)
            self._idle.pop(cell, None)
            self._idle[cell] = None
            self._clock_wanted.set()
            if self.awake > self._settings.max_awake_rooms:
                self._make_room()

    def _evict(self, cell: Cell) -> None:
        assert cell.room is not None
        cell.room._storage = None  # the one cycle of references: without it the room is freed at once
        cell.server = cell.room = None
        cell.deserted_at = 0.0
        cell.met = None
        self.awake -= 1
        self.evictions += 1
        if self._idle:
            self._idle.pop(cell, None)
        connections = cell.connections
        if connections and not cell.events:
            if cell.edited:
                for connection in [each for each in connections.values() if not each._edits]:
                    del connections[connection._number]
            else:
                connections.clear()
        self.forget_if_idle(cell)

    def _let_go(self, cell: Cell) -> None:
        """A room that stays remembers connections only as long as its code, or the gateway, may know them."""
        met = cell.met
        if met is None:
            met = cell.met = WeakValueDictionary()
        for connection in [each for each in cell.connections.values() if not each._edits]:
            met[connection._number] = connection
            del cell.connections[connection._number]

    def forget_if_idle(self, cell: Cell) -> None:
        """Drop the cell if nothing is left of it (H4)."""
        if (
            cell.server is None
            and not cell.gate
            and not cell.edited
            and not cell.running
            and not cell.events
            and not cell.retry_at
        ):
            self.cells.pop(cell.key, None)

    def stream_ended(self, cell: Cell) -> None:
        """A response that the room was streaming has come to its end."""
        cell.streams -= 1
        room = cell.room
        if not cell.running and not cell.scheduled and room is not None and not cell.streams:
            if cell.kind.evicts_at_once or room._evict:
                self._evict(cell)
            else:
                cell.used_at = monotonic()

    def _make_room(self) -> None:
        """Evict the least recently used rooms beyond max_awake_rooms (S6)."""
        for cell in list(self._idle):
            if self.awake <= self._settings.max_awake_rooms:
                return
            if cell.kind.hibernate and not cell.running and not cell.scheduled and not cell.streams:
                self._evict(cell)

    # --- Time -------------------------------------------------------------------------------------

    async def _clock(self) -> None:
        look_at_memory = 0.0
        while True:
            with trio.move_on_after(REST_SECONDS):
                await self._clock_wanted.wait()
            now = monotonic()
            self._evict_idle(now)
            if now >= look_at_memory:
                look_at_memory = now + MEMORY_SECONDS
                self._trimmer.each_second(self.wakes)
                if self._idle and memory_bytes() > self._settings.memory_mark_bytes:
                    self._evict_all_idle()
            for cell in list(self._retries):
                if now >= cell.retry_at:
                    cell.retry_at = 0.0
                    self._retries.discard(cell)
                    self._schedule(cell)
                    self.activate()
            for worker in self._workers:
                running = worker.cell
                if running is None or not worker.event or running.abandoned:
                    continue
                if self.paused and running.gate:
                    worker.started = now  # it may be waiting for the disk, and has its time when that goes on
                elif now - worker.started >= running.kind.settings.turn_timeout:
                    worker.cancel()
            if not self._idle and not self._retries:
                self._clock_wanted = trio.Event()
            await trio.sleep(CLOCK_SECONDS)

    def _evict_idle(self, now: float) -> None:
        for cell in list(self._idle):
            if cell.running or cell.scheduled or cell.streams:
                continue
            if not cell.kind.hibernate:
                if now >= cell.ask_at:
                    cell.ask_at = now + max(DESERTED_SECONDS, cell.kind.idle_seconds / 4)
                    self.spawn(self._evict_if_deserted, cell)
            elif now - cell.used_at >= cell.kind.idle_seconds:
                self._evict(cell)

    def _evict_all_idle(self) -> None:
        """Above the memory mark every room without work goes, of whichever kind (S6)."""
        for cell in list(self._idle):
            if not cell.running and not cell.scheduled and not cell.streams:
                self._evict(cell)

    async def _evict_if_deserted(self, cell: Cell) -> None:
        """A room with `hibernate = False` stays while it has a connection, and idle_seconds longer (S6)."""
        if not await self._is_deserted(cell.key):
            cell.deserted_at = 0.0
            return
        now = monotonic()
        if not cell.deserted_at:
            cell.deserted_at = now
        busy = cell.running or cell.scheduled or cell.streams
        since = max(cell.deserted_at, cell.used_at)
        if cell.server is not None and not busy and now - since >= cell.kind.idle_seconds:
            self._evict(cell)

    # --- Sight ------------------------------------------------------------------------------------

    def describe(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """What is known of rooms that were awake not long ago."""
        now = monotonic()
        return {
            key: {
                "awake": (cell := self.cells.get(key)) is not None and cell.server is not None,
                "wakes": recent[0],
                "woke_seconds_ago": round(now - recent[1], 3),
            }
            for key in keys
            if (recent := self._recent.get(key)) is not None
        }


def memory_bytes() -> int:
    """The memory of this process that is in use (resident; proc(5), statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
