"""Whom to blame: the policy, and hosts that die in every way against a model (S23)."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hibernation.running import ASKING, CLOSING, OTHER, STARTING, Left
from hibernation.suspects import REMEMBER_SECONDS, Suspect, Suspects, Verdict

MESSAGE, OTHERS = (1, 100), [(number, 100) for number in range(2, 6)]


def after(*lefts: Left, at: float = 0.0, code: int = 0) -> Suspects:
    """What is known after hosts have left these, one after the other."""
    suspects = Suspects(3)
    for left in lefts:
        suspects = Suspects.at_start(suspects.by_mark.values(), left, tries=3, at=at, code=code)
    return suspects


def alone(mark: tuple[int, int] = MESSAGE, **more: object) -> Left:
    return Left(((mark, False),), **more)  # type: ignore[arg-type]


def test_what_is_alone_at_a_death_is_blamed_and_given_up_after_its_tries():
    """B1, B3: at one below, at, and one above."""
    verdicts = [after(*[alone()] * deaths).judge(MESSAGE) for deaths in range(5)]
    assert verdicts == [
        Verdict.RUN,
        Verdict.ALONE,
        Verdict.ALONE,
        Verdict.GIVE_UP,
        Verdict.GIVE_UP_SILENTLY,
    ]


def test_of_several_the_one_on_the_processor_is_run_alone_and_not_blamed():
    left = Left(((MESSAGE, False), *((other, True) for other in OTHERS)))
    suspects = after(left)
    assert suspects.judge(MESSAGE) is Verdict.ALONE
    assert suspects.by_mark[MESSAGE].deaths == 0
    assert [suspects.judge(other) for other in OTHERS] == [Verdict.RUN] * 4
    assert after(left, alone(), alone(), alone()).judge(MESSAGE) is Verdict.GIVE_UP


def test_those_that_waited_twice_are_run_alone():
    left = Left(tuple((mark, True) for mark in (MESSAGE, *OTHERS)))
    assert after(left).judge(MESSAGE) is Verdict.RUN
    assert not after(left).expected
    assert [after(left, left).judge(mark) for mark in (MESSAGE, *OTHERS)] == [Verdict.ALONE] * 5


def test_a_static_hook_or_a_stream_is_company():
    """Then nobody was alone."""
    left = Left(((MESSAGE, True), ((OTHER, 0), True)))
    assert after(left, left, left).by_mark[MESSAGE].deaths == 0
    assert (OTHER, 0) not in after(left).by_mark


def test_a_host_that_was_told_to_end_accuses_nobody():
    assert after(Left(clean=True)).by_mark == {}
    assert after(Left()).by_mark == {}
    # What was suspected before stays so, but rooms may start again.
    start = (STARTING, 5)
    suspects = after(alone(), alone(start), Left(clean=True))
    assert suspects.judge(MESSAGE) is Verdict.ALONE
    assert suspects.judge(start) is Verdict.RUN


@pytest.mark.parametrize("mark", [MESSAGE, (1, CLOSING), (STARTING, 9), (ASKING, 9)])
def test_new_code_has_its_own_tries(mark):
    suspects = after(*[alone(mark)] * 3)
    fresh = Suspects.at_start(suspects.by_mark.values(), Left(clean=False), tries=3, at=0, code=8)
    assert fresh.judge(mark) is Verdict.ALONE
    assert fresh.by_mark[mark].deaths == 0
    # Also if the host with the old code had to be killed.
    killed = Suspects.at_start(fresh.by_mark.values(), alone(mark, code=0), tries=3, at=0, code=8)
    assert killed.by_mark[mark].deaths == 0


def test_what_ends_is_acquitted():
    """B2."""
    suspects = after(alone(), alone())
    assert suspects.acquit(MESSAGE)
    assert not suspects.acquit(MESSAGE)
    assert suspects.judge(MESSAGE) is Verdict.RUN


def test_the_close_turn_of_a_connection_ends_the_suspicion_against_its_messages():
    suspects = after(alone(), alone((1, CLOSING)), alone(OTHERS[0]))
    assert suspects.gone(1) == [MESSAGE]
    assert set(suspects.by_mark) == {(1, CLOSING), OTHERS[0]}


def test_those_that_do_not_come_are_forgotten_but_for_the_blamed():
    many = Left(((OTHERS[0], False), (OTHERS[1], True), (OTHERS[2], True)))
    suspects = after(alone(), many)
    assert set(suspects.expire([OTHERS[0]])) == {OTHERS[1], OTHERS[2]}
    assert set(suspects.by_mark) == {MESSAGE, OTHERS[0]}
    later = Suspects.at_start(suspects.by_mark.values(), Left(), tries=3, at=REMEMBER_SECONDS + 1, code=0)
    assert later.by_mark == {}


def test_only_those_of_the_last_death_are_waited_for():
    """Or else hosts that die soon would never do anything but wait."""
    assert after(alone()).expected
    assert not after(alone(), Left()).expected
    assert after(alone(), Left()).judge(MESSAGE) is Verdict.ALONE
    suspects = after(alone(), alone(OTHERS[0]))
    assert suspects.expected
    suspects.acquit(OTHERS[0])
    assert not suspects.expected


def test_the_reason_says_how_the_host_ended():
    assert "died" in after(alone()).by_mark[MESSAGE].reason
    assert "blocked" in after(alone(blocked=True)).by_mark[MESSAGE].reason


class Hosts(RuleBasedStateMachine):
    """Hosts that run events one after the other and beside each other, and die at any moment. Some events end
    their host each time their code runs; the model knows which, and counts.
    """

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.suspects = Suspects(3)
        self.running: dict[tuple[int, int], bool] = {}
        self.number = 0
        self.poison: set[tuple[int, int]] = set()
        self.alone_at_death: Counter[tuple[int, int]] = Counter()
        self.deaths = 0
        self.runs: Counter[tuple[int, int]] = Counter()
        self.given_up: set[tuple[int, int]] = set()
        self.at = 0.0

    def die(self, blocked: bool = False) -> None:
        left = Left(tuple((mark, waits) for mark, waits in self.running.items()), blocked=blocked)
        if len(self.running) == 1:
            self.alone_at_death.update(list(self.running))
        self.deaths += 1
        self.running.clear()
        self.at += 1
        stored = [
            Suspect(**{name: getattr(each, name) for name in Suspect.__slots__})
            for each in self.suspects.by_mark.values()
        ]
        self.suspects = Suspects.at_start(stored, left, tries=3, at=self.at, code=0)

    @rule(target=waiting, poison=st.booleans())
    def comes(self, poison: bool) -> tuple[int, int]:
        self.number += 1
        mark = (self.number, 10)
        if poison:
            self.poison.add(mark)
        return mark

    @rule(target=waiting, mark=consumes(waiting), then_waits=st.booleans())
    def begins(self, mark: tuple[int, int], then_waits: bool) -> tuple[int, int]:
        """As the pool does it: alone if the verdict is so, and not while somebody is."""
        if mark in self.running or mark in self.given_up:
            return mark
        someone_alone = any(self.suspects.judge(each) is not Verdict.RUN for each in self.running)
        verdict = self.suspects.judge(mark)
        if someone_alone or (verdict is not Verdict.RUN and self.running):
            return mark
        if verdict in (Verdict.GIVE_UP, Verdict.GIVE_UP_SILENTLY):
            assert mark in self.poison or self.alone_at_death[mark] >= 3
            self.given_up.add(mark)
            self.suspects.acquit(mark)
            return mark
        self.runs[mark] += 1
        self.running[mark] = False
        if mark in self.poison:
            self.die()
        else:
            self.running[mark] = then_waits
            if not then_waits:
                self.ends(mark)
        return mark

    @rule(mark=waiting)
    def ends(self, mark: tuple[int, int]) -> None:
        if mark in self.running and mark not in self.poison:
            del self.running[mark]
            self.alone_at_death[mark] = 0
            self.suspects.acquit(mark)

    @rule(blocked=st.booleans())
    def is_killed_from_outside(self, blocked: bool) -> None:
        self.die(blocked)

    @invariant()
    def nobody_is_blamed_for_more_than_he_was_alone_at(self) -> None:
        """B1, B2."""
        for mark, suspect in self.suspects.by_mark.items():
            assert suspect.deaths == self.alone_at_death[mark]

    @invariant()
    def what_ends_hosts_is_given_up_in_time(self) -> None:
        """Once beside others, then three times alone; a kill from outside adds none of its own."""
        for mark in self.poison:
            assert self.runs[mark] <= 4

    @invariant()
    def only_who_was_blamed_is_given_up(self) -> None:
        """B3."""
        for mark in self.given_up:
            assert self.alone_at_death[mark] >= 3


Hosts.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestHosts = Hosts.TestCase
