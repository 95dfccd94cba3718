"""The order in which alarms are run: what is on disk in, whom to wake out (S29).

Owns the policy and nothing else: no clock, no task, no database. It reads what is due through functions that
it is given, in pages and in the order of due times, and remembers what it has given out until that has been
settled on disk. So it holds as much as may be in flight, however many alarms there are. Peers:
`storage.alarms`, whose rows it reads, and `hibernation.alarms`, which carries out.

In each shard it has a place in the order of due times. What it passes over there, because the room has an
alarm to run already, or does not start, it finds again by the room, when that can be woken for it. A commit
that sets an alarm before the place sends it back there.

Invariants:
    A1  every alarm on disk before the place of its shard is in flight, or its room is in `_passed`, or its
        party has no hook for it
    A2  what has been given out is not given out again before it has been settled
    A3  at most `in_flight_max` alarms are in flight, and one of a room is to be run, or runs
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from typing import Final

from storage.alarms import BEFORE_ALL, DueRow

__all__ = ["AlarmBook"]

#: Rows that are read from a shard at once.
PAGE_ROWS: Final = 64
#: Rows that one call may look at.
SCAN_ROWS_MAX: Final = 4096

ReadShard = Callable[[int, tuple[int, int], int], list[DueRow]]
"""Given a shard, a place and a limit: see `storage.alarms.AlarmTable.due_after`."""

ReadRoom = Callable[[str, int], list[DueRow]]
"""Given a room and a limit: see `storage.alarms.AlarmTable.due_of_room`."""


class AlarmBook:
    """See the module.

    Args:
        shards: Those of this host.
        shard_of: The shard of the room with this key.
        read_shard: Gives the alarms of a shard behind a place.
        read_room: Gives the first alarms of a room.
        is_wanted: Whether the room has a hook for alarms.
        is_held: Whether it is not started at the moment.
        in_flight_max: Alarms that may be in flight.
    """

    def __init__(
        self,
        shards: Iterable[int],
        shard_of: Callable[[str], int],
        read_shard: ReadShard,
        read_room: ReadRoom,
        *,
        is_wanted: Callable[[str], bool],
        is_held: Callable[[str], bool],
        in_flight_max: int,
    ) -> None:
        self._shard_of = shard_of
        self._read_shard = read_shard
        self._read_room = read_room
        self._is_wanted = is_wanted
        self._is_held = is_held
        self._in_flight_max = in_flight_max
        self._place = dict.fromkeys(shards, BEFORE_ALL)
        #: By number.
        self._in_flight: dict[int, DueRow] = {}
        #: How many of these each room has, and by room the one that has not been run.
        self._of_room: Counter[str] = Counter()
        self._to_run: dict[str, int] = {}
        #: Rooms that have alarms which were passed over; and those of them that may be looked at again.
        self._passed: set[str] = set()
        self._again: dict[str, None] = {}
        #: When the next one is due; None: none is known that does not wait for one that is in flight.
        self.next_ms: int | None = None

    @property
    def in_flight(self) -> int:
        """How many have been given out and are not settled."""
        return len(self._in_flight)

    def forget(self) -> None:
        """Whatever has been given out is void: begin from what is on disk."""
        self._place = dict.fromkeys(self._place, BEFORE_ALL)
        self._in_flight.clear()
        self._of_room.clear()
        self._to_run.clear()
        self._passed.clear()
        self._again.clear()
        self.next_ms = None

    def take(self, now_ms: int) -> list[DueRow]:
        """Give what is to be run now, in the order of due times; from then on it is in flight. Sets
        `next_ms`.
        """
        taken: list[DueRow] = []
        self.next_ms = None
        if len(self._in_flight) >= self._in_flight_max:
            return taken  # it goes on when one is settled
        passed_over = self._rows_passed_over(now_ms)
        rows = merge(((None, row) for row in passed_over), *map(self._rows, self._place), key=_order)
        for looked_at, (shard, row) in enumerate(rows):
            if row.due_ms > now_ms or looked_at >= SCAN_ROWS_MAX:
                self.next_ms = row.due_ms
                break
            if row.number in self._in_flight or not self._is_wanted(row.room):
                pass
            elif row.room in self._to_run or self._is_held(row.room):
                self._passed.add(row.room)
            elif len(self._in_flight) >= self._in_flight_max:
                break
            else:
                self._in_flight[row.number] = row
                self._of_room[row.room] += 1
                self._to_run[row.room] = row.number
                taken.append(row)
            if shard is None:
                del self._again[row.room]
            else:
                self._place[shard] = (row.due_ms, row.number)
        return taken

    def _rows(self, shard: int) -> Iterator[tuple[int | None, DueRow]]:
        """What lies behind the place of a shard, in pages. The place itself is moved by who takes."""
        place = self._place[shard]
        while rows := self._read_shard(shard, place, PAGE_ROWS):
            for row in rows:
                yield shard, row
            if len(rows) < PAGE_ROWS:
                return
            place = (rows[-1].due_ms, rows[-1].number)

    def _rows_passed_over(self, now_ms: int) -> list[DueRow]:
        """The next alarm of each room that is to be looked at again, in the order of due times."""
        found = []
        for room in list(self._again):
            # Those that are in flight may still be on disk.
            rows = self._read_room(room, self._of_room[room] + 1)
            row = next((row for row in rows if row.number not in self._in_flight), None)
            if row is not None and row.due_ms <= now_ms:
                found.append(row)
                continue
            self._passed.discard(room)
            del self._again[room]
            if row is not None:  # it was due before the clock was set back, perhaps
                self._go_back(self._shard_of(room), row.due_ms)
        return sorted(found)

    def ran(self, number: int) -> None:
        """The turn of one that was in flight is over: its room may have the next one."""
        row = self._in_flight.get(number)
        if row is not None and self._to_run.get(row.room) == number:
            del self._to_run[row.room]
            self.released(row.room)

    def settled(self, number: int, *, again: bool = False) -> None:
        """What has become of one that was in flight is on disk; or, `again`, it has not been run, and stays
        what it was.
        """
        self.ran(number)
        row = self._in_flight.pop(number, None)
        if row is None:
            return
        self._of_room[row.room] -= 1
        if not self._of_room[row.room]:
            del self._of_room[row.room]
        if again:
            self._go_back(self._shard_of(row.room), row.due_ms)

    def stored(self, shard: int, due_ms: int) -> bool:
        """A commit has set an alarm. True: it is the next one now."""
        self._go_back(shard, due_ms)
        if self.next_ms is not None and due_ms >= self.next_ms:
            return False
        self.next_ms = due_ms
        return True

    def released(self, room: str) -> None:
        """This room may be woken again, or for its next alarm."""
        if room in self._passed:
            self._again[room] = None

    def held(self, room: str) -> None:
        """This room is not started any more: what it was to be woken for is not in flight."""
        number = self._to_run.get(room)
        if number is not None:
            self.settled(number, again=True)

    def _go_back(self, shard: int, due_ms: int) -> None:
        self._place[shard] = min(self._place[shard], (due_ms, -1))


def _order(item: tuple[int | None, DueRow]) -> tuple[int, int]:
    return item[1].due_ms, item[1].number
