"""Which turns of a room may overlap, and in which order they end (S19): events in, decisions out.

Owns what is in progress in one room whose class says `concurrency = "per_connection"` or `"interleave"`; a
serial room has none of this. No task, no clock, no I/O. Peers: `hibernation.pool`, which begins what may
begin, and `hibernation.turns`, which ends what may end.

A gateway takes the end of a message's turn for the end of all that the connection has sent before. So a turn
whose hook has returned while an earlier one of its connection is still in progress has not ended: what it has
staged is held, seen by nobody, and gone with this process like that of any turn under way. When the earlier
one ends, it does too. Turns of different connections, and requests, never wait for each other.

Invariants:
    T1  messages of one connection begin in the order in which they came
    T2  `per_connection`: at most one turn of a connection is in progress. `interleave`: several, if all of
        them are of messages; a connect turn and a close turn have none of their connection beside them
    T3  turns of one connection end in the order in which they began
"""

from typing import Any

from hibernation import wire
from hibernation.cells import Event

__all__ = ["Overlap"]


class Overlap:
    """See the module.

    Args:
        interleaves: Messages of one connection may overlap, too.
    """

    __slots__ = ("_interleaves", "_lines", "starting", "workers")

    def __init__(self, interleaves: bool) -> None:
        self._interleaves = interleaves
        #: By connection: what is in progress, in the order of its beginning, each with what is held of it.
        self._lines: dict[int, list[tuple[Event, Any]]] = {}
        #: `on_start` is running: nothing may begin.
        self.starting = False
        #: How many tasks of the pool are at work on this room.
        self.workers = 0

    def _find(self, events: list[Event]) -> int:
        """Index of the first event that may begin; -1: none may."""
        if self.starting:
            return -1
        lines = self._lines
        passed: set[int] = set()
        for index, event in enumerate(events):
            kind = event[0]
            if kind > wire.CLOSE:
                return index
            number = event[3]
            if number in passed:
                continue
            line = lines.get(number)
            if line is None or (
                self._interleaves
                and kind == wire.MESSAGE
                and all(other[0] == wire.MESSAGE for other, _ in line)
            ):
                return index
            passed.add(number)
        return -1

    def is_first(self, event: Event) -> bool:
        """Whether nothing that is in progress has to end before this."""
        line = None if event[0] > wire.CLOSE else self._lines.get(event[3])
        return not line or line[0][0] is event

    def may_take(self, events: list[Event]) -> bool:
        """Whether one of these events may begin."""
        return bool(events) and self._find(events) >= 0

    def take(self, events: list[Event]) -> Event | None:
        """Take out the first event that may begin; it has begun."""
        index = self._find(events) if events else -1
        if index < 0:
            return None
        event = events.pop(index)
        if event[0] <= wire.CLOSE:
            self._lines.setdefault(event[3], []).append((event, None))
        return event

    def ended(self, event: Event, outcome: Any) -> list[Any]:
        """The hook of a connection's event has done all it will. Gives the outcomes that are due: this one
        and those that were held for it, or none.
        """
        number = event[3]
        line = self._lines[number]
        place = next(index for index, (other, _) in enumerate(line) if other is event)
        line[place] = event, outcome
        due = []
        while line and line[0][1] is not None:
            due.append(line.pop(0)[1])
        if not line:
            del self._lines[number]
        return due
