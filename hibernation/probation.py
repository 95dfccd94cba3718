"""Probation: after a host's death, what may have ended it runs with nothing else beside it (S23).

Owns the order in which cells may run while there are suspects, and who runs alone. Decides nothing about
guilt: that is `hibernation.suspects`, which is pure. Peers: `hibernation.pool`, which asks it before each
burst and each turn, and is not slowed by it when there is none.

Suspects go first: for a short time after the link is there nothing else begins, so that nobody has to wait
for turns that wait themselves. One that comes later is run when those under way have ended, and nothing new
begins before it. Those that have not come after `probation_seconds` are forgotten, but for the blamed.

Invariants:
    B4  while something runs alone, no other turn and no static hook begins but what rooms fetch from each
        other, which is what it may wait for, and none is under way but a streamed answer that did not end
        within COMPANY_SECONDS
"""

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from hibernation import wire
from hibernation.cells import Cell, Event
from hibernation.running import Mark, mark_of, mark_of_start
from hibernation.suspects import Suspect, Suspects, Verdict
from storage.clock import monotonic

__all__ = ["Errand", "Probation"]

#: How long, after the link is there, only suspects run.
HEAD_START_SECONDS: Final = 0.25
#: How long a suspect waits for streamed answers and static hooks to end.
COMPANY_SECONDS: Final = 10.0


@dataclass(eq=False, slots=True)
class Errand:
    """Something beside the rooms that is to be run alone, or later."""

    function: Callable[..., Awaitable[Any]]
    arguments: tuple[Any, ...]


class Probation:
    """See the module.

    Args:
        suspects: What the host knows.
        forgotten: Called with marks of which nothing is known any more.
    """

    def __init__(self, suspects: Suspects, forgotten: Callable[[list[Mark]], None]) -> None:
        self.suspects = suspects
        self._forgotten = forgotten
        #: Who has a suspect that has come: which ones. In the order in which they are to run.
        self._accused: dict[Cell, set[Mark]] = {}
        self._errands: deque[Errand] = deque()
        #: Who runs alone.
        self.alone: Cell | Errand | None = None
        self._head_start_until = 0.0
        self._waits_since = 0.0

    def begin(self) -> None:
        """The link is there."""
        self._accused.clear()
        self._errands.clear()
        self.alone = None
        self._waits_since = 0.0
        self._head_start_until = monotonic() + HEAD_START_SECONDS

    # --- What comes -------------------------------------------------------------------------------

    def arrived(self, cell: Cell, event: Event) -> None:
        """An event has been put into its cell."""
        mark = mark_of(event)
        if mark is None:
            marks = []
        else:
            marks = [mark] if self.suspects.judge(mark) is not Verdict.RUN else []
        if not cell.started:
            start = mark_of_start(cell.key)
            if self.suspects.judge(start) is not Verdict.RUN:
                marks.append(start)
        if marks:
            self._accused.setdefault(cell, set()).update(marks)

    def accuse(self, cell: Cell, mark: Mark) -> None:
        """Have an event run alone that no death is known of."""
        self.suspects.by_mark[mark] = Suspect(mark, alone=True, since=float("inf"))
        self._accused.setdefault(cell, set()).add(mark)

    def errand(self, errand: Errand) -> None:
        """Something beside the rooms is a suspect."""
        self._errands.append(errand)

    # --- What may run -----------------------------------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether nothing else may begin: somebody runs alone, or waits for it."""
        return self.alone is not None or self._next() is not None

    @property
    def has_errands(self) -> bool:
        """Whether something beside the rooms waits to run alone."""
        return bool(self._errands)

    def _next(self) -> Cell | Errand | None:
        if self._errands:
            return self._errands[0]
        # Others are under way, wait until their room is tried again, or have lost their events.
        return next((cell for cell in self._accused if cell.scheduled and not cell.held), None)

    def pick(self, ready: deque[Cell], busy: Callable[[], bool], others: int) -> Cell | None:
        """Give the cell that may run next, if any may.

        Args:
            ready: Cells that are scheduled; the one that is given is taken out.
            busy: Whether a turn is under way.
            others: How many static hooks and streamed answers are.
        """
        if self.alone is not None:
            asked_for = next((cell for cell in ready if _is_fetch(cell.events[0])), None)
            if asked_for is not None:
                ready.remove(asked_for)
            return asked_for
        chosen = self._next()
        if chosen is None:
            self._waits_since = 0.0
            if not ready or (monotonic() < self._head_start_until and self.suspects.expected):
                return None
            return ready.popleft()
        if isinstance(chosen, Errand) or self._has_company(busy, others):
            return None
        self.alone = chosen
        ready.remove(chosen)
        return chosen

    def take_errand(self, busy: Callable[[], bool], others: int) -> Errand | None:
        """Give what is to be run alone beside the rooms, if it may now. Arguments as of `pick`."""
        if self.alone is not None or not self._errands or self._has_company(busy, others):
            return None
        self.alone = errand = self._errands.popleft()
        return errand

    def _has_company(self, busy: Callable[[], bool], others: int) -> bool:
        now = monotonic()
        if not self._waits_since:
            self._waits_since = now
        if busy() or (others and now - self._waits_since < COMPANY_SECONDS):
            return True
        self._waits_since = 0.0
        return False

    def may_begin(self, cell: Cell) -> bool:
        """Whether a burst that is under way may begin one more turn."""
        if self.alone is cell:
            return cell in self._accused  # the rest of its events run as those of any room
        if self.alone is not None:
            return _is_fetch(cell.events[0])
        return cell not in self._accused and self._next() is None

    def judge(self, event: Event) -> Verdict:
        """What is to become of an event whose turn is next."""
        mark = mark_of(event)
        return Verdict.RUN if mark is None else self.suspects.judge(mark)

    def judge_start(self, cell: Cell) -> Verdict:
        """What is to become of the start of a room."""
        return self.suspects.judge(mark_of_start(cell.key))

    # --- What ends --------------------------------------------------------------------------------

    def ended(self, cell: Cell | None, mark: Mark | None) -> None:
        """A turn, or a start, has come to its end, well or not: it has not ended the host."""
        if mark is None:
            return
        if self.suspects.acquit(mark):
            self._forgotten([mark])
        if cell is not None and cell in self._accused:
            marks = self._accused[cell]
            marks.discard(mark)
            if not marks:
                del self._accused[cell]

    def close_came(self, number: int) -> None:
        """The close turn of a connection has come: its messages do not come again."""
        marks = self.suspects.gone(number)
        if marks:
            self._forgotten(marks)

    def rested(self, who: Cell | Errand) -> bool:
        """A burst is over. True: it was alone, and others may begin now."""
        if self.alone is not who:
            return False
        self.alone = None
        return True

    def expire(self, *, blamed: bool = False) -> None:
        """Those that were to come had time enough; also those that have been `blamed`?"""
        here = [mark for marks in self._accused.values() for mark in marks]
        marks = self.suspects.expire(here, blamed=blamed)
        if marks:
            self._forgotten(marks)

    @property
    def over(self) -> bool:
        """Whether nothing is left to be judged."""
        return not self.suspects.by_mark and not self._errands and self.alone is None


def _is_fetch(event: Event) -> bool:
    """Whether another room has asked for this, and its turn may wait for it (S30)."""
    return event[0] == wire.REQUEST and "caller" in event[3]
