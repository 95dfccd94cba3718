"""Alarms in the host: rooms are woken when one is due, and what becomes of it is stored with the turn (S29).

Owns the task that follows the wall clock, the deletion of an alarm at the beginning of its turn, and the rule
for those that fail. Which alarm comes next is decided by `hibernation.alarm_book`, which is pure. Peers:
`hibernation.turns` (runs them), `hibernation.commits` (stores what they change), `hibernation.room_alarms`
(what room code sees), `storage.alarms`.

An alarm's turn begins by staging its deletion, so that setting it again within the turn wins, and the
deletion commits together with the effects. Whoever dies before that commit leaves the alarm on disk, where
the next host finds it; whoever dies after it has left its effects in the outbox, and no alarm.
"""

from collections.abc import Mapping
from random import uniform
from typing import Any, Final

import trio

from hibernation.alarm_book import AlarmBook
from hibernation.cells import Cell, Event, Kind
from hibernation.commits import Commits
from hibernation.errors import HookError
from hibernation.hooks import HOOKS
from hibernation.logs import get_logger
from hibernation.pool import Pool
from hibernation.room import Room
from hibernation.room_alarms import Alarm
from hibernation.running import ALARM
from hibernation.staging import Turn
from hibernation.wall_clock import from_now_ms, now_ms, wait_until_ms
from storage.alarms import AlarmRow, AlarmTable, DueRow
from storage.shards import Shard

__all__ = ["Alarms"]

#: Delays between attempts to run an alarm whose hook has failed (S29), before jitter.
RETRY_FIRST_SECONDS: Final = 2.0
RETRY_LAST_SECONDS: Final = 3600.0
#: How far a delay is from these, at most, as a part of it.
JITTER: Final = 0.25
#: Characters of the reason that is kept of a failure.
REASON_MAX: Final = 500
#: Alarms of a room that `broker explain` shows.
SHOWN_MAX: Final = 20

log = get_logger("alarms")


class Alarms:
    """See the module.

    Args:
        shards: The open shards of the host, by index.
        kinds: The parties, by every name.
        pool: Gives rooms their turns.
        commits: Takes what is to be stored.
        in_flight_max: Alarms that may be in flight: from when their room is woken until their end is on disk.
    """

    def __init__(
        self,
        shards: Mapping[int, Shard],
        kinds: Mapping[str, Kind],
        pool: Pool,
        commits: Commits,
        in_flight_max: int,
    ) -> None:
        self._tables = {index: AlarmTable(shard.read) for index, shard in shards.items()}
        self._kinds = kinds
        self._pool = pool
        self._commits = commits
        self._book = AlarmBook(
            shards,
            commits.shard_of,
            lambda shard, place, limit: self._tables[shard].due_after(place, limit),
            lambda room, limit: self._table(room).due_of_room(room, limit),
            is_wanted=self._is_wanted,
            is_held=lambda key: key in pool.quarantined,
            in_flight_max=in_flight_max,
        )
        self._wanted = trio.Event()
        self._open = False
        #: Parties whose alarms wait for code that has the hook.
        self._unwanted: set[str] = set()
        self.runs = 0
        self.failures = 0

    # --- When -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wake rooms whose alarms are due, until cancelled."""
        while True:
            self._wanted = trio.Event()
            next_ms = None
            if self._open and not self._pool.retiring:
                due = self._book.take(now_ms())
                for row in due:
                    self._deliver(row)
                if due:
                    self._pool.activate()
                next_ms = self._book.next_ms
            await wait_until_ms(next_ms, self._wanted)

    def open(self) -> None:
        """Rooms can be woken: the pool runs, and all that was staged before is on disk, or void."""
        self._book.forget()
        self._open = True
        self._wanted.set()

    def close(self) -> None:
        """The gateway has gone: turns that ran have not been."""
        self._open = False

    def _deliver(self, row: DueRow) -> None:
        kind = self._kinds[row.room.split("/", 1)[0]]
        self._pool.deliver(row.room, kind, [ALARM, row.room, row.name, row.number])

    def _is_wanted(self, key: str) -> bool:
        party = key.split("/", 1)[0]
        kind = self._kinds.get(party)
        if kind is not None and "on_alarm" in kind.hooks:
            return True
        if party not in self._unwanted:
            self._unwanted.add(party)
            log.warning(
                "alarms are due and wait for code that has the hook", party=party, wanted=f"{party}: on_alarm"
            )
        return False

    def stored(self, shard: int, due_ms: int) -> None:
        """A commit has set an alarm."""
        if self._book.stored(shard, due_ms):
            self._wanted.set()

    def held(self, cell: Cell) -> None:
        """This room does not start: its alarms wait on disk."""
        cell.events[:] = [event for event in cell.events if event[0] != ALARM]
        self._book.held(cell.key)
        self._wanted.set()

    def released(self, key: str) -> None:
        """This room may be started again."""
        self._book.released(key)
        self._wanted.set()

    # --- The turn ---------------------------------------------------------------------------------

    def begin(self, turn: Turn, event: Event) -> Alarm | None:
        """Stage the end of an alarm whose turn begins, and give what its hook is told. None: it has been
        deleted, set anew, or is not due by the clock as it is now.
        """
        row = self._current(event)
        if row is None or row.due_ms > now_ms():
            return None
        turn.alarm = row.name
        turn.set_alarm(row.name, None)
        self.runs += 1
        return Alarm(row)

    def end(self, turn: Turn, event: Event) -> None:
        """The turn of an alarm ends well: its deletion stands, unless another turn, or background work, has
        set it anew meanwhile. Who did so has the last word.
        """
        name = event[2]
        if turn.alarms and turn.alarms.get(name, self) is None and self._current(event) is None:
            del turn.alarms[name]

    def fail(self, room: Room, turn: Turn, event: Event, error: BaseException) -> None:
        """Stage another attempt of an alarm whose turn has failed, or none, if it has had all; unless
        `on_error` has changed it.
        """
        row = self._current(event)
        if row is None or self._is_changed(turn, row.name):
            return
        self.failures += 1
        attempt = row.attempt + 1
        row = row._replace(attempt=attempt, reason=_reason(error))
        if attempt >= room._settings.alarm_tries:
            row = row._replace(failed=1)
            party, _, room_id = room.key.partition("/")
            log.error(
                "an alarm has failed for good", party=party, room=room_id, alarm=row.name, tries=attempt
            )
        else:
            seconds = min(RETRY_FIRST_SECONDS * 2 ** min(attempt - 1, 30), RETRY_LAST_SECONDS)
            row = row._replace(due_ms=from_now_ms(seconds * uniform(1 - JITTER, 1 + JITTER) * 1000))
        turn.set_alarm(row.name, row)

    def letter(self, event: Event) -> Event | None:
        """An alarm that is given up, as a whole event for a dead letter; None: it is no more."""
        row = self._current(event)
        if row is None:
            return None
        return [*event, row.scheduled_ms, row.attempt, row.payload]

    def drop(self, turn: Turn, event: Event) -> None:
        """Stage the end of an alarm that is given up, unless `on_error` has set it again."""
        if self._current(event) is not None and not self._is_changed(turn, event[2]):
            turn.set_alarm(event[2], None)

    def ended(self, cell: Cell, event: Event, *, again: bool = False) -> None:
        """The turn of an alarm is over, and what it has staged is with the commits; `again`: it was not
        run.
        """
        self._book.ran(event[3])
        self._wanted.set()
        self._commits.after(cell, lambda: self._settled(event[3], again))

    def _settled(self, number: int, again: bool) -> None:
        self._book.settled(number, again=again)
        self._wanted.set()

    def _current(self, event: Event) -> AlarmRow | None:
        """The alarm that an event means, if it is still that one."""
        _, key, name, number = event[:4]
        row = self.read_alarm(key, name)
        return row if row is not None and row.number == number and not row.failed else None

    def _is_changed(self, turn: Turn, name: str) -> bool:
        return turn.cleared or (turn.alarms is not None and name in turn.alarms)

    # --- What `room_alarms.AlarmSource` promises --------------------------------------------------

    def check_alarms(self, key: str) -> None:
        """HookError if the room has no hook for alarms."""
        kind = self._kinds[key.split("/", 1)[0]]
        if "on_alarm" not in kind.hooks:
            raise HookError(
                kind.cls.__name__,
                "on_alarm",
                "set_alarm was called, and nothing would be called when the alarm is due",
                remedy=HOOKS["on_alarm"].line(),
            )

    def read_alarm(self, key: str, name: str) -> AlarmRow | None:
        """One alarm of a room: as earlier turns have left it, or as it is on disk."""
        cell = self._pool.cells.get(key)
        if cell is not None:
            pending = cell.pending_alarms
            if pending is not None and name in pending:
                return pending[name]
            if cell.pending_cleared:
                return None
        return self._table(key).one(key, name)

    def read_alarms(self, key: str) -> dict[str, AlarmRow]:
        """All alarms of a room, in the same sense."""
        cell = self._pool.cells.get(key)
        if cell is None:
            return self._table(key).of_room(key)
        rows = {} if cell.pending_cleared else self._table(key).of_room(key)
        for name, row in (cell.pending_alarms or {}).items():
            if row is None:
                rows.pop(name, None)
            else:
                rows[name] = row
        return rows

    def count_alarms(self, key: str) -> int:
        """How many these are, or more."""
        cell = self._pool.cells.get(key)
        if cell is None:
            return self._table(key).count_of_room(key)
        stored = 0 if cell.pending_cleared else self._table(key).count_of_room(key)
        return stored + len(cell.pending_alarms or ())

    def _table(self, key: str) -> AlarmTable:
        return self._tables[self._commits.shard_of(key)]

    # --- Sight ------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """For `stats`."""
        counts = [table.counts() for table in self._tables.values()]
        return {
            "alarms": sum(waiting for waiting, _ in counts),
            "failed_alarms": sum(failed for _, failed in counts),
            "alarm_runs": self.runs,
            "alarm_failures": self.failures,
        }

    def explain(self, key: str) -> dict[str, Any]:
        """For `explain`: how many alarms a room has, and those that are due first; failed ones are last."""
        rows = sorted(self.read_alarms(key).values(), key=lambda row: (row.failed, row.due_ms, row.name))
        shown = rows[:SHOWN_MAX]
        shown += [row for row in rows[SHOWN_MAX:] if row.failed][:SHOWN_MAX]
        return {
            "alarm_count": len(rows),
            "alarms": [
                {
                    "name": row.name,
                    "due_at": row.due_ms / 1000,
                    "scheduled_at": row.scheduled_ms / 1000,
                    "failures": row.attempt,
                    "failed": bool(row.failed),
                    "reason": row.reason,
                }
                for row in shown
            ],
        }


def _reason(error: BaseException) -> str:
    """An error as a text that can be stored, whatever room code has made of it."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its own __str__
        text = type(error).__name__
    return text[:REASON_MAX].encode(errors="replace").decode()
