"""When to connect, how long to wait, when to give up."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.client.errors import Refused
from broker.client.lifecycle import RETRY_AFTER_SECONDS_MAX, Backoff, Lifecycle, State
from broker.client.options import Options


def backoff(**changes: Any) -> Backoff:
    values: dict[str, Any] = {
        "delay_min": 1.0,
        "delay_max": 10.0,
        "growth": 2.0,
        "jitter": 0.0,
        "uptime_min": 5.0,
        "retries_max": None,
    }
    return Backoff(**{**values, **changes})


def pauses(life: Lifecycle, count: int, chance: float = 0.0) -> list[float | None]:
    found = []
    for _ in range(count):
        found.append(life.failed(chance, retry=True))
        if life.state is State.WAITING:
            life.due()
    return found


def test_pauses_grow_up_to_the_longest() -> None:
    assert pauses(Lifecycle(backoff()), 6) == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_jitter_shortens_a_pause() -> None:
    assert pauses(Lifecycle(backoff(jitter=0.5)), 2, chance=1.0) == [0.5, 1.0]
    assert pauses(Lifecycle(backoff(jitter=0.5)), 2, chance=0.5) == [0.75, 1.5]


def test_pauses_after_very_many_attempts() -> None:
    """As a power the base would have overflowed."""
    assert pauses(Lifecycle(backoff(growth=100.0)), 3_000)[-1] == 10.0


@pytest.mark.parametrize(("limit", "expected"), [(0, [None]), (1, [1.0, None]), (3, [1.0, 2.0, 4.0, None])])
def test_attempts_are_bounded(limit: int, expected: list[float | None]) -> None:
    life = Lifecycle(backoff(retries_max=limit))
    assert pauses(life, limit + 1) == expected
    assert life.state is State.CLOSED


def test_what_is_not_to_be_retried_is_not() -> None:
    life = Lifecycle(backoff())
    assert life.failed(0.0, retry=False) is None
    assert life.state is State.CLOSED


@pytest.mark.parametrize(
    ("retry_after", "pause"),
    [(0.5, 1.0), (1.0, 1.0), (7.0, 7.0), (3600.0, 3600.0), (3601.0, 3600.0), (1e9, 3600.0)],
)
def test_the_server_says_when(retry_after: float, pause: float) -> None:
    assert Lifecycle(backoff()).failed(0.0, retry=True, retry_after=retry_after) == pause


def test_clients_that_were_sent_away_together_do_not_come_back_together() -> None:
    life = Lifecycle(backoff(jitter=0.5))
    assert life.failed(1.0, retry=True, retry_after=10.0) == 15.0


@pytest.mark.parametrize(("uptime", "pause"), [(4.9, 4.0), (5.0, 1.0), (6.0, 1.0)])
def test_a_connection_counts_when_it_was_stable(uptime: float, pause: float) -> None:
    life = Lifecycle(backoff())
    pauses(life, 2)
    life.opened(100.0)
    assert life.ended(100.0 + uptime, 0.0, retry=True) == pause


@pytest.mark.parametrize("state", ["connecting", "waiting", "open", "closing", "closed"])
@pytest.mark.parametrize("order", ["close", "reconnect"])
def test_every_order_in_every_state(state: str, order: str) -> None:
    life = Lifecycle(backoff(), start_closed=state == "closed")
    if state == "waiting":
        life.failed(0.0, retry=True)
    if state in ("open", "closing"):
        life.opened(0.0)
    if state == "closing":
        life.close()
    assert life.state == state
    getattr(life, order)()
    final = {"close": State.CLOSED, "reconnect": State.CONNECTING}[order]
    if state in ("open", "closing"):
        assert life.state is State.CLOSING
        life.over()
    assert life.state is final


class LifecycleMachine(RuleBasedStateMachine):
    """P1, P2, P3: any order of orders and happenings."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.backoff = backoff(jitter=0.5, retries_max=3)
        self.life = Lifecycle(self.backoff)
        self.wanted = True
        self.retries = 0
        self.opened_at = 0.0

    def saw_pause(self, pause: float | None, retry: bool, retry_after: float = 0.0) -> None:
        if pause is None:
            assert not retry or self.retries == 3
            self.wanted = False
            return
        assert retry
        self.retries += 1
        asked = min(retry_after, RETRY_AFTER_SECONDS_MAX)
        assert asked <= pause <= max(asked * 1.5, 10.0)
        assert pause >= 0.5

    @rule()
    def close(self) -> None:
        self.life.close()
        self.wanted = False

    @rule()
    def reconnect(self) -> None:
        self.life.reconnect()
        self.wanted, self.retries = True, 0

    @precondition(lambda self: self.life.state is State.CONNECTING)
    @rule()
    def opens(self) -> None:
        self.opened_at = self.now
        self.life.opened(self.now)

    @precondition(lambda self: self.life.state is State.CONNECTING)
    @rule(chance=st.floats(0, 1), retry=st.booleans(), after=st.sampled_from([0.0, 1.0, 30.0, 1e6]))
    def fails(self, chance: float, retry: bool, after: float) -> None:
        self.saw_pause(self.life.failed(chance, retry=retry, retry_after=after), retry, after)

    @precondition(lambda self: self.life.state is State.OPEN)
    @rule(chance=st.floats(0, 1), retry=st.booleans())
    def ends(self, chance: float, retry: bool) -> None:
        if self.now - self.opened_at >= 5.0:
            self.retries = 0
        self.saw_pause(self.life.ended(self.now, chance, retry=retry), retry)

    @precondition(lambda self: self.life.state is State.CLOSING)
    @rule()
    def is_over(self) -> None:
        self.life.over()

    @precondition(lambda self: self.life.state is State.WAITING)
    @rule()
    def falls_due(self) -> None:
        self.life.due()

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def it_connects_exactly_while_that_is_wanted(self) -> None:
        if self.life.state is State.CLOSING:
            assert self.life.again is self.wanted
        else:
            assert (self.life.state is not State.CLOSED) is self.wanted
        assert self.life.retries <= 3


TestLifecycle = LifecycleMachine.TestCase
TestLifecycle.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize(
    ("status", "again"),
    [
        *[(status, False) for status in (301, 400, 401, 403, 404, 409, 426, 499)],
        *[(status, True) for status in (408, 425, 429, 500, 502, 503, 599)],
    ],
)
def test_which_refusals_are_for_good(status: int, again: bool) -> None:
    assert Options().should_retry(Refused("ws://h/x", status)) is again


def test_every_close_of_the_server_is_passing() -> None:
    assert all(Options().should_reconnect(code, "") for code in (1000, 1001, 1006, 1008, 1012, 4000, 4409))
