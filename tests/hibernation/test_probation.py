"""Probation and quarantine in the pool: who runs when something may have ended a host (S4, S23).

The pool runs with real turns on a virtual clock, as in `test_pool`.
"""

from typing import Any

import pytest
import trio
import trio.testing
from cbor2 import dumps

import hibernation.pool
import hibernation.probation
from broker import DeadLetter, Server
from hibernation import wire
from hibernation.probation import COMPANY_SECONDS, HEAD_START_SECONDS, Errand, Probation
from hibernation.running import (
    ASKING,
    CLOSING,
    CONNECTING,
    OTHER,
    REPLAY,
    STARTING,
    Mark,
    mark_of,
    mark_of_start,
)
from hibernation.suspects import REMEMBER_SECONDS, Suspect, Suspects
from storage.blame import Letter
from tests.hibernation.test_pool import CARD, House, Log, play, settle


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hibernation.pool, "monotonic", trio.current_time)
    monkeypatch.setattr(hibernation.probation, "monotonic", trio.current_time)
    monkeypatch.setattr("hibernation.pool.random.uniform", lambda low, high: 1.0)
    monkeypatch.setattr("hibernation.turns.log", Log())


class Court(House):
    """A pool whose host has been left these suspects: marks, with their deaths."""

    def __init__(self, cls: type[Server], suspects: dict[Mark, int], **settings: Any) -> None:
        super().__init__(cls, **settings)
        self.suspects = Suspects(self.pool._settings.redelivery_tries)
        for mark, deaths in suspects.items():
            self.suspects.by_mark[mark] = Suspect(mark, deaths, alone=True, reason="it died")
        self.suspects.fresh = frozenset(suspects)
        self.forgotten: list[Mark] = []
        self.buried: list[tuple[str, Mark]] = []
        self.replayed: list[BaseException | None] = []
        self.quarantined: list[tuple[str, str]] = []
        self.pool.suspect(Probation(self.suspects, self.forgotten.extend))
        self.turns.bury = lambda cell, _event, suspect: self.buried.append((cell.key, suspect.mark))
        self.turns.replayed = lambda _cell, _event, failure: self.replayed.append(failure)
        self.pool.on_quarantine = lambda cell, reason: self.quarantined.append((cell.key, reason))

    def say(self, data: str, room: str = "r", number: int = 1, end: int = 0) -> None:
        self._event([wire.MESSAGE, f"main/{room}", number, number, CARD, None, end, data])

    def close(self, room: str = "r", number: int = 1) -> None:
        self._event([wire.CLOSE, f"main/{room}", number, number, CARD, None, 1000, "", True, "client_close"])


class Slow(Server):
    """Notes what runs beside what; a message is how long it takes."""

    log: list[str] = []
    beside: set[tuple[str, str]] = set()
    running: set[str] = set()

    async def on_message(self, message, sender):
        name, _, seconds = message.partition(":")
        for other in self.running:
            self.beside.add((other, name))
        self.log.append(name)
        self.running.add(name)
        try:
            await trio.sleep(float(seconds or 0))
        finally:
            self.running.discard(name)
        sender.send(name)


@pytest.fixture(autouse=True)
def _clear() -> None:
    Slow.log, Slow.beside, Slow.running = [], set(), set()


def test_a_suspect_goes_first_and_nothing_runs_beside_it():
    """B4: not even when it waits; then all others, in their order."""

    async def script(court: Court) -> None:
        court.say("a", "a", 2)
        court.say("b", "b", 3)
        court.say("suspect:5", "s", 1, 10)
        court.say("after", "s", 1, 20)
        await trio.sleep(4)
        court.say("late", "c", 4)
        await trio.sleep(0.5)
        assert Slow.log == ["suspect"]
        await trio.sleep(3)
        assert Slow.log[0] == "suspect"
        assert set(Slow.log[1:]) == {"after", "a", "b", "late"}
        assert Slow.beside.isdisjoint({("suspect", each) for each in Slow.log})
        assert court.forgotten == [(1, 10)]
        assert court.pool.probation is None
        assert court.pool.cells == {}

    play(lambda: Court(Slow, {(1, 10): 1}), script)


def test_several_suspects_run_one_after_the_other():
    """S23."""

    async def script(court: Court) -> None:
        for number in range(1, 6):
            court.say(f"s{number}:1", f"r{number}", number, 10)
            court.say("x", f"r{number}", number, 20)
        await trio.sleep(4.5)
        assert Slow.log == ["s1", "s2", "s3", "s4", "s5"]
        await trio.sleep(2)
        assert len(Slow.log) == 10
        assert not {name for pair in Slow.beside for name in pair if name.startswith("s")}

    play(lambda: Court(Slow, {(number, 10): 0 for number in range(1, 6)}), script)


def test_a_suspect_behind_others_of_its_room_keeps_its_place():
    """H1."""

    async def script(court: Court) -> None:
        court.say("one:1", "r", 2, 10)
        court.say("two:1", "r", 3, 10)
        court.say("suspect:1", "r", 1, 10)
        court.say("three", "r", 2, 20)
        court.say("elsewhere", "other", 5)
        await trio.sleep(5)
        assert Slow.log[:3] == ["one", "two", "suspect"]
        assert not {name for pair in Slow.beside for name in pair} & {"one", "two", "suspect"}
        assert sorted(Slow.log[3:]) == ["elsewhere", "three"]

    play(lambda: Court(Slow, {(1, 10): 2}), script)


def test_one_that_comes_late_waits_for_those_under_way_and_nobody_begins_before_it():
    """S23."""

    async def script(court: Court) -> None:
        court.say("early:5", "a", 2)
        await trio.sleep(HEAD_START_SECONDS - 0.1)
        assert Slow.log == []
        await trio.sleep(0.2)
        assert Slow.log == ["early"]
        await trio.sleep(1)
        court.say("suspect:1", "s", 1, 10)
        court.say("behind", "a", 2, 20)
        court.say("later", "b", 3)
        await trio.sleep(3)
        assert Slow.log == ["early"]
        await trio.sleep(1)
        assert Slow.log == ["early", "suspect"]
        await trio.sleep(2)
        assert sorted(Slow.log[2:]) == ["behind", "later"]
        assert not {name for pair in Slow.beside for name in pair} & {"early", "suspect"}

    play(lambda: Court(Slow, {(1, 10): 1}), script)


def test_those_that_do_not_come_are_forgotten_and_life_is_normal():
    """S23: after probation_seconds, at which the blamed are still known."""

    async def script(court: Court) -> None:
        court.say("a", "a", 3)
        await trio.sleep(1)
        assert Slow.log == ["a"]
        await trio.sleep(8.5)
        assert court.pool.probation is not None
        assert court.forgotten == []
        await trio.sleep(1.5)
        assert court.forgotten == [(2, 10)]
        assert court.pool.probation is not None  # for (1, 10), which has been blamed
        before = len(court.pool._workers)
        for number in range(20):
            court.say(f"n{number}", f"n{number}", 10 + number)
            await settle()
        assert len(court.pool._workers) == before  # it wakes nobody for nothing
        court.close("s", 1)
        await trio.sleep(1)
        assert court.forgotten == [(2, 10), (1, 10)]
        assert court.pool.probation is None

    class Closes(Slow):
        def on_close(self, connection):
            pass

    play(lambda: Court(Closes, {(1, 10): 1, (2, 10): 0}, probation_seconds=10), script)


def test_who_was_blamed_is_remembered_for_an_hour():
    """S23: its room may be full of others."""

    async def script(court: Court) -> None:
        await trio.sleep(REMEMBER_SECONDS - 60)
        assert court.pool.probation is not None
        await trio.sleep(120)
        assert court.forgotten == [(1, 10)]
        assert court.pool.probation is None

    play(lambda: Court(Slow, {(1, 10): 2}), script)


class Tells(Slow):
    """Says what `on_error` is told."""

    told: list[BaseException] = []
    cause = None

    def on_connect(self, connection):
        raise AssertionError("it is given up")

    def on_close(self, connection):
        raise AssertionError("it is given up")

    def on_error(self, connection, error):
        self.told.append(error)
        type(self).cause = connection.close_cause
        if not connection.close_cause:
            connection.send("given up")


@pytest.fixture(autouse=True)
def _clear_told() -> None:
    Tells.told, Tells.cause = [], None


def test_a_message_that_had_its_tries_is_a_dead_letter_and_the_next_goes_on():
    """S23: its hook is not called, `on_error` is, once; its turn is acknowledged."""

    async def script(court: Court) -> None:
        court.say("poison", end=10)
        court.say("after", end=20)
        await trio.sleep(1)
        assert Slow.log == ["after"]
        [error] = Tells.told
        assert isinstance(error, DeadLetter)
        assert (error.event, error.tries, error.reason) == ("message", 3, "it died")
        assert court.sent() == ["given up", "after"]
        assert [result[:4] for _, result in court.left] == [
            [wire.TURN, 1, 1, 10],
            [wire.TURN, 1, 1, 20],
        ]
        assert court.buried == [("main/r", (1, 10))]
        assert court.forgotten == [(1, 10)]

    play(lambda: Court(Tells, {(1, 10): 3}), script)


@pytest.mark.parametrize(("deaths", "runs", "told"), [(2, 1, 0), (3, 0, 1), (4, 0, 0)])
def test_one_below_the_tries_at_them_and_above(deaths, runs, told):
    """S23: when giving it up ended its host, too, nothing is called any more."""

    async def script(court: Court) -> None:
        court.say("message", end=10)
        await trio.sleep(1)
        assert (len(Slow.log), len(Tells.told)) == (runs, told)
        assert [result[:4] for _, result in court.left] == [[wire.TURN, 1, 1, 10]]
        assert len(court.buried) == 1 - runs

    play(lambda: Court(Tells, {(1, 10): deaths}), script)


def test_on_error_of_a_dead_letter_that_fails_or_never_ends_still_ends_it():
    """S20, S23."""

    class Fails(Slow):
        turn_timeout = 2

        async def on_error(self, connection, error):
            if connection._number == 1:
                raise ValueError
            await trio.sleep_forever()

    async def script(court: Court) -> None:
        court.say("poison", "a", 1, 10)
        court.say("poison", "b", 2, 10)
        court.say("after", "b", 2, 20)
        await trio.sleep(4)
        assert [result[:4] for _, result in court.left] == [
            [wire.TURN, 1, 1, 10],
            [wire.TURN, 2, 2, 10],
            [wire.TURN, 2, 2, 20],
        ]
        assert len(court.buried) == 2
        assert court.pool.probation is None

    play(lambda: Court(Fails, {(1, 10): 3, (2, 10): 3}), script)


def test_connect_and_close_turns_that_had_their_tries():
    """S23: the connect turn has failed, the close turn is done."""

    async def script(court: Court) -> None:
        court.connect(number=1)
        await trio.sleep(1)
        court.close(number=2)
        await trio.sleep(1)
        assert [result[:-1] for _, result in court.left] == [
            [wire.CONNECTED, 1, 1, True],
            [wire.CLOSED, 2, 2],
        ]
        assert [getattr(error, "event", None) for error in Tells.told] == ["connect", "close"]
        assert Tells.cause == "client_close"

    play(lambda: Court(Tells, {(1, CONNECTING): 3, (2, CLOSING): 3}), script)


def test_static_hooks_do_not_begin_beside_a_suspect_and_streams_are_not_awaited_for_ever():
    """B4."""
    began: list[float] = []

    async def hook() -> None:
        began.append(trio.current_time())

    async def script(court: Court) -> None:
        stream = court.pool.running.enter()
        court.say("suspect:5", "s", 1, 10)
        await trio.sleep(1)
        court.pool.spawn(hook)
        await trio.sleep(COMPANY_SECONDS - 2)
        assert (Slow.log, began) == ([], [])
        await trio.sleep(2)
        assert (Slow.log, began) == (["suspect"], [])
        await trio.sleep(5)
        assert len(began) == 1
        court.pool.running.leave(stream)

    play(lambda: Court(Slow, {(1, 10): 1}), script)


def test_a_before_hook_that_is_suspected_runs_alone():
    """S23."""
    log: list[str] = []

    async def errand() -> None:
        log.append("begins")
        await trio.sleep(2)
        assert court_of[0].pool.probation is not None
        court_of[0].pool.probation.ended(None, (ASKING, 7))
        log.append(f"ends beside {len(Slow.log)}")

    court_of: list[Court] = []

    async def script(court: Court) -> None:
        court_of.append(court)
        court.say("early:1", "a", 2)
        await trio.sleep(HEAD_START_SECONDS + 0.1)
        assert court.pool.probation is not None
        court.pool.probation.errand(Errand(errand, ()))
        court.pool.look_on()
        court.say("late", "b", 3)
        await trio.sleep(5)
        assert log == ["begins", "ends beside 1"]
        assert Slow.log == ["early", "late"]
        assert court.pool.probation is None

    play(lambda: Court(Slow, {(ASKING, 7): 1}), script)


# --- Rooms that do not start ----------------------------------------------------------------------


class Starts(Slow):
    fails = True

    def __init__(self, room):
        self.log.append(f"start {room.id}")
        if self.fails:
            raise RuntimeError("no database")


@pytest.fixture(autouse=True)
def _starts_fail() -> None:
    Starts.fails = True


@pytest.mark.parametrize("deaths", [2, 3])
def test_a_room_whose_start_had_its_tries_is_quarantined(deaths):
    """S4, S23."""
    Starts.fails = False

    async def script(court: Court) -> None:
        court.say("one", end=10)
        court.say("elsewhere", "other", 2)
        await trio.sleep(1)
        if deaths < 3:
            assert "start r" in Slow.log
            assert court.quarantined == []
            return
        assert "start r" not in Slow.log
        [(key, reason)] = court.quarantined
        assert key == "main/r"
        assert "3 times" in reason
        assert "elsewhere" in Slow.log
        court.say("two", end=20)
        await trio.sleep(100)
        assert court.sent("r") == []
        assert court.pool.release("main/r")
        await trio.sleep(1)
        assert court.sent("r") == ["one", "two"]
        assert not court.pool.release("main/r")
        assert court.pool.cells == {}

    play(lambda: Court(Starts, {mark_of_start("main/r"): deaths}), script)


def test_failed_starts_are_counted_to_start_tries():
    """S4: one below is tried again, and there is no more at it."""

    async def script(court: Court) -> None:
        court.say("one")
        await trio.sleep(0.1 + 0.05)
        assert (Slow.log.count("start r"), court.quarantined) == (2, [])
        await trio.sleep(100)
        assert Slow.log.count("start r") == 3
        assert court.quarantined == [("main/r", "it failed to start 3 times: RuntimeError: no database")]
        assert court.pool.cells["main/r"].events

    play(lambda: Court(Starts, {}, start_tries=3), script)


def test_failed_starts_are_timed_to_start_seconds():
    """S4: tries at 0, 0.1, 0.3, 0.7, 1.5, 3.1 s and so on."""

    async def script(court: Court) -> None:
        court.say("one")
        await trio.sleep(1.45)
        assert (Slow.log.count("start r"), court.quarantined) == (4, [])
        await trio.sleep(100)
        assert Slow.log.count("start r") == 5
        assert len(court.quarantined) == 1

    play(lambda: Court(Starts, {}, start_tries=100, start_seconds=1.4), script)


def test_a_room_that_is_known_not_to_start_is_not_tried():
    """S4: another host of the same code has found out."""

    async def script(court: Court) -> None:
        court.pool.quarantined["main/r"] = "known"
        court.say("one")
        court.say("two")
        await trio.sleep(10)
        assert Slow.log == []
        assert len(court.pool.cells["main/r"].events) == 2
        Starts.fails = False
        court.pool.release("main/r")
        await trio.sleep(1)
        assert court.sent() == ["one", "two"]

    play(lambda: Court(Starts, {}), script)


def test_a_released_room_has_all_its_tries_again():
    """S4."""

    async def script(court: Court) -> None:
        court.say("one")
        await trio.sleep(10)
        assert Slow.log.count("start r") == 2
        court.pool.release("main/r")
        await trio.sleep(10)
        assert Slow.log.count("start r") == 4
        assert len(court.quarantined) == 2

    play(lambda: Court(Starts, {}, start_tries=2), script)


# --- Replay ---------------------------------------------------------------------------------------


def test_a_replayed_message_runs_alone_and_acknowledges_nothing():
    """S23: its effects leave; nobody waits for its end."""

    async def script(court: Court) -> None:
        original = [wire.MESSAGE, "main/r", 1, 1, CARD, None, 10, "again:2"]
        letter = Letter(7, "main/r", 1, 10, dumps(original), 3, "it died", 0.0)
        event = [REPLAY, "main/r", letter, None]
        mark = mark_of(event)
        assert mark is not None
        court.pool.suspect(Probation(court.suspects, court.forgotten.extend))
        assert court.pool.probation is not None
        court._event(event)
        court.pool.deliver("main/r", court.kind, event)
        court.inbox.clear()
        court.pool.probation.accuse(court.pool.cells["main/r"], mark)
        court.say("beside", "other", 2)
        await trio.sleep(1)
        assert Slow.log == ["again"]
        await trio.sleep(2)
        assert court.replayed == [None]
        assert [result[0] for key, result in court.left if key == "main/r"] == [wire.EFFECTS]
        assert court.sent("r") == ["again"]
        assert court.pool.probation is None

    play(lambda: Court(Slow, {}), script)


# --- What is noted --------------------------------------------------------------------------------


def noted(court: House) -> set[tuple[int, int, int]]:
    """Who, what, waiting of all slots in use."""
    return {(note[0], note[1], note[2]) for worker in court.pool._workers if (note := worker.note)[0]}


def test_what_is_in_progress_is_noted_until_it_ends():
    """S23: each kind by its own mark, and whether it waits."""
    seen: list[set[tuple[int, int, int]]] = []

    class Looks(Server):
        async def on_start(self):
            seen.append(noted(house_of[0]))
            await trio.sleep(1)

        async def on_message(self, message, sender):
            seen.append(noted(house_of[0]))
            await trio.sleep(1)
            seen.append(noted(house_of[0]))

        def on_connect(self, connection):
            seen.append(noted(house_of[0]))

        def on_close(self, connection):
            seen.append(noted(house_of[0]))

    house_of: list[House] = []

    async def script(court: Court) -> None:
        house_of.append(court)
        start = mark_of_start("main/r")
        court.connect(number=5)
        court.say("x", number=6, end=30)
        court.close(number=7)
        await trio.sleep(0.5)
        assert noted(court) == {(*start, 1)}
        await trio.sleep(1)
        assert noted(court) == {(6, 30, 1)}
        await trio.sleep(2)
        assert noted(court) == set()
        assert seen == [
            {(*start, 0)},
            {(5, CONNECTING, 0)},
            {(6, 30, 0)},
            {(6, 30, 0)},
            {(7, CLOSING, 0)},
        ]
        assert start[0] == STARTING

    play(lambda: Court(Looks, {}), script)


def test_a_turn_that_is_cancelled_is_noted_to_the_end_of_its_on_error():
    """S20, S23."""

    class Looks(Server):
        turn_timeout = 1

        async def on_message(self, message, sender):
            await trio.sleep_forever()

        async def on_error(self, connection, error):
            seen.append(noted(house_of[0]))

    seen: list[set[tuple[int, int, int]]] = []
    house_of: list[House] = []

    async def script(court: Court) -> None:
        house_of.append(court)
        court.say("x", end=30)
        await trio.sleep(4)
        assert seen == [{(1, 30, 0)}]
        assert noted(court) == set()

    play(lambda: Court(Looks, {}), script)


def test_a_room_without_code_in_its_start_is_not_noted_as_starting():
    """It costs nothing where nothing can happen."""
    assert not House(Slow).kind.notes_start
    assert House(Starts).kind.notes_start
    assert OTHER < 0


def test_a_gateway_that_goes_leaves_nobody_noted():
    """S34: what ran is cancelled, and delivered again; no host has died."""

    async def script(court: Court) -> None:
        court.say("x:100")
        await settle()
        workers = list(court.pool._workers)
        assert noted(court)
        court.pool.forget()
        await settle()
        assert all(worker.note[0] == 0 for worker in workers)

    async def main() -> None:
        court = Court(Slow, {})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(court.pool.run)
            await settle()
            await script(court)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
