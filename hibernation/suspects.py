"""Whom to blame when a host has died: suspects in, decisions out (S23).

Owns the policy and nothing else: no clock, no disk, no task. A host gives it what its predecessors have left,
and asks of each event whether it may run, must run alone, or has had its tries. Peers: `hibernation.running`
(what was in progress), `storage.blame` (where suspects are kept), `hibernation.trial` (who carries out).

What is known at a death is what was in progress, and of each whether it waited or its code was on the
processor. It follows:

    one thing in progress            it is blamed: one more death
    several, one on the processor    that one becomes a suspect: it is run alone next time
    several, all of which waited     all become witnesses

A witness of two deaths is a suspect. So one kill from outside, with a thousand turns that wait for something,
does not make a thousand turns run one after the other, and what kills its host while it waits (by its memory,
or by a thread) is found two deaths later. Whoever is run alone and ends is acquitted; whoever is alone at a
death is blamed; who has been blamed `tries` times is given up.

Invariants:
    B1  only what was alone in progress at a death is blamed for it
    B2  whatever ends is forgotten: no later death counts against it what it was suspected of before
    B3  what is given up has been blamed `tries` times, or more
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Self

from hibernation.running import ALARMING, ASKING, STARTING, Left, Mark

__all__ = ["REMEMBER_SECONDS", "Suspect", "Suspects", "Verdict"]

#: How long what has been blamed is remembered, if it does not come again: its room may be full of others.
REMEMBER_SECONDS: Final = 3600.0


class Verdict(Enum):
    """What is to become of an event, or of the start of a room."""

    RUN = "run"
    """Nothing is known against it."""
    ALONE = "alone"
    """It may have ended a host: nothing may run beside it."""
    GIVE_UP = "give up"
    """It has had its tries: `on_error`, or quarantine, alone."""
    GIVE_UP_SILENTLY = "give up silently"
    """Giving it up has ended a host, too: call nothing."""


@dataclass(slots=True)
class Suspect:
    """One event, or the start of one room.

    Attributes:
        mark: Which one.
        deaths: How many hosts have died while it alone was in progress.
        seen: How many have died while it waited beside others, since it last was a suspect.
        alone: It must run alone: it is no mere witness.
        since: Time of the last of these deaths.
        reason: How that host ended, in words.
        code: Names the code that it ran with.
    """

    mark: Mark
    deaths: int = 0
    seen: int = 0
    alone: bool = False
    since: float = 0.0
    reason: str = ""
    code: int = 0


@dataclass(slots=True)
class Suspects:
    """Those that are known to one host.

    Attributes:
        tries: Deaths after which an event is given up.
        by_mark: All of them. Empty most of the time: then nobody has to be asked.
        fresh: Those of the last death, which come again at once if they come.
    """

    tries: int
    by_mark: dict[Mark, Suspect] = field(default_factory=dict)
    fresh: frozenset[Mark] = frozenset()

    @classmethod
    def at_start(cls, known: Iterable[Suspect], left: Left, *, tries: int, at: float, code: int) -> Self:
        """What a host knows when it begins.

        Args:
            known: What the host before it knew.
            left: What that one was doing when it ended.
            tries: Deaths after which an event is given up.
            at: The time.
            code: Names the code that the host runs. What was blamed with another one is suspected, no more:
                new code has its own tries.
        """
        suspects = cls(tries)
        for each in known:
            if at - each.since <= REMEMBER_SECONDS and not (left.clean and each.mark[0] == STARTING):
                suspects.by_mark[each.mark] = each
        suspects._add(left, at)
        suspects.fresh = frozenset(mark for mark, _ in left.marks)
        for each in suspects.by_mark.values():
            if each.code != code:
                each.deaths, each.code = 0, code
        return suspects

    def _add(self, left: Left, at: float) -> None:
        reason = "it blocked its host, which was killed" if left.blocked else "its host died while it ran"
        active = [mark for mark, waited in left.marks if not waited]
        for mark, waited in left.marks:
            if mark[0] <= 0 and mark[0] not in (STARTING, ASKING, ALARMING):
                continue
            suspect = self.by_mark.get(mark)
            if suspect is None:
                suspect = self.by_mark[mark] = Suspect(mark)
            elif suspect.code != left.code:
                suspect.deaths = 0
            suspect.since, suspect.reason, suspect.code = at, reason, left.code
            if len(left.marks) == 1:
                suspect.deaths += 1
                suspect.alone = True
            elif not waited and len(active) == 1:
                suspect.alone = True
            else:
                suspect.seen += 1
                suspect.alone = suspect.alone or suspect.seen > 1

    def judge(self, mark: Mark) -> Verdict:
        """What is to become of this event."""
        suspect = self.by_mark.get(mark)
        if suspect is None or not suspect.alone:
            return Verdict.RUN
        if suspect.deaths < self.tries:
            return Verdict.ALONE
        return Verdict.GIVE_UP if suspect.deaths == self.tries else Verdict.GIVE_UP_SILENTLY

    def acquit(self, mark: Mark) -> bool:
        """It has ended. True: something was known of it, which is to be forgotten on disk too."""
        return self.by_mark.pop(mark, None) is not None

    def gone(self, number: int) -> list[Mark]:
        """The close turn of this connection has come: no message of it comes after that. Gives who is
        forgotten.
        """
        marks = [mark for mark in self.by_mark if mark[0] == number and mark[1] >= 0]
        for mark in marks:
            del self.by_mark[mark]
        return marks

    def expire(self, here: Sequence[Mark], *, blamed: bool = False) -> list[Mark]:
        """They had time enough to come: forget all but those that are `here`, and those that have been blamed
        unless that was long ago. Gives who is forgotten.
        """
        kept = set(here)
        marks = [
            mark for mark, each in self.by_mark.items() if (blamed or not each.deaths) and mark not in kept
        ]
        for mark in marks:
            del self.by_mark[mark]
        return marks

    @property
    def expected(self) -> bool:
        """Whether something of the last death is to be run alone, and has not been.

        What an earlier host has waited for is not waited for again: hosts that die soon, one after the other,
        would do nothing else.
        """
        return any(mark in self.fresh and suspect.alone for mark, suspect in self.by_mark.items())
