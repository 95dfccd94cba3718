"""Turns of one room that overlap: which may begin, in which order they end, and that each message has its
effect once, whoever dies in between (S19, S22).

The pool runs with real turns, on a virtual clock, between a fake link and a fake disk; a model says after
each step what must be in progress and what must have left.
"""

from collections import defaultdict
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

import hibernation.pool
from broker import Server
from hibernation import wire
from hibernation.cells import Cell, Event
from hibernation.overlap import Overlap
from hibernation.running import FAILED
from tests.hibernation.test_pool import CARD, House, Log, settle

MODES = ["serial", "per_connection", "interleave"]


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hibernation.pool, "monotonic", trio.current_time)
    monkeypatch.setattr("hibernation.turns.log", Log())


# --- The model ------------------------------------------------------------------------------------


class World:
    """A gateway that gives out what is not acknowledged, and hosts that come one after the other.

    Each handler waits until it is told to go on. What each connection has sent is a list of kinds; an event
    is (connection, its place in that list), and the place is also where the message ends in the stream.
    """

    def __init__(self, mode: str, nursery: trio.Nursery) -> None:
        self.mode = mode
        self.nursery = nursery
        self.sent: dict[int, list[str]] = defaultdict(list)
        #: How many of a connection's events are acknowledged; and what their effects were, in order.
        self.consumed: dict[int, int] = defaultdict(int)
        self.effects: list[tuple[int, int]] = []
        self.open: dict[tuple[int, int], trio.Event] = {}
        self.begun: dict[int, list[int]] = defaultdict(list)
        #: What began and should not have.
        self.faults: list[str] = []
        self.seen = 0
        self.scope = trio.CancelScope()
        self.house: House
        self._start()

    def _start(self) -> None:
        world = self

        async def handle(connection: Any, place: int) -> None:
            number = connection._number
            if not world.may_begin(number, place):
                world.faults.append(f"{number} {place} beside {world.begun} {sorted(world.open)}")
            world.begun[number].append(place)
            event = world.open[number, place] = trio.Event()
            connection.send(f"{number} {place}")
            try:
                await event.wait()
            finally:
                del world.open[number, place]

        class Main(Server):
            concurrency = world.mode  # type: ignore[assignment]
            turn_timeout = 3600.0

            async def on_connect(self, connection):
                await handle(connection, 0)

            async def on_message(self, message, sender):
                await handle(sender, int(message))

            async def on_close(self, connection, code):
                connection._closed = False  # so that it can tell us
                await handle(connection, code)

        self.house = House(Main)
        self.seen = 0
        self.begun.clear()
        self.scope = trio.CancelScope()
        self.nursery.start_soon(self._run, self.house, self.scope)

    async def _run(self, house: House, scope: trio.CancelScope) -> None:
        with scope:
            await house.pool.run()

    def may_begin(self, number: int, place: int) -> bool:
        """T1, T2, H1."""
        self.take()
        kinds, begun = self.sent[number], self.begun[number]
        beside = [other for other in begun if other >= self.consumed[number]]
        if place != (begun[-1] + 1 if begun else self.consumed[number]):
            return False
        if self.mode == "serial":
            return not self.open
        if self.mode == "per_connection":
            return not beside
        return not beside or {kinds[each] for each in [*beside, place]} == {"message"}

    def arrive(self, number: int, kind: str) -> None:
        kinds = self.sent[number]
        if kinds and kinds[-1] == "close":
            return
        kinds.append(kind if kinds else "connect")
        self.give_out(number, len(kinds) - 1)

    def give_out(self, number: int, place: int) -> None:
        kind = self.sent[number][place]
        event: Event
        if kind == "connect":
            event = [wire.CONNECT, "main/r", number, number, CARD, None, {}]
        elif kind == "message":
            event = [wire.MESSAGE, "main/r", number, number, CARD, None, place, str(place)]
        else:
            event = [wire.CLOSE, "main/r", number, number, CARD, None, place, "", True, "client_close"]
        self.house._event(event)

    def take(self) -> None:
        """The gateway reads what has left."""
        results = self.house.results[self.seen :]
        self.seen = len(self.house.results)
        for _, result in results:
            number = result[2]
            kind = result[0]
            place = {wire.CONNECTED: 0, wire.CLOSED: len(self.sent[number]) - 1}.get(kind, result[3])
            assert place == self.consumed[number]  # T3: nothing is acknowledged by what came later
            self.consumed[number] = place + 1
            for effect in result[-1]:
                told, at = effect[3].split()
                self.effects.append((int(told), int(at)))

    def in_progress(self) -> set[tuple[int, int]]:
        """What must have begun, with all that may."""
        found = set()
        for number, kinds in self.sent.items():
            first = self.consumed[number]
            for place in range(first, len(kinds)):
                if place > first and not (
                    self.mode == "interleave" and {kinds[place], kinds[first]} == {"message"}
                ):
                    break
                found.add((number, place))
        return found

    def check(self) -> None:
        self.take()
        assert not self.faults
        begun = {(number, place) for number, places in self.begun.items() for place in places}
        pending = {each for each in begun if each[1] >= self.consumed[each[0]]}
        if self.mode == "serial":
            assert len(pending) == bool(self.in_progress())
        else:
            assert pending == self.in_progress()
        assert set(self.open) <= pending
        expected = sum(self.consumed.values())
        assert len(self.effects) == len(set(self.effects)) == expected
        for number in self.sent:
            places = [place for told, place in self.effects if told == number]
            assert places == list(range(self.consumed[number]))
        assert self.house.pool.awake == bool(pending)

    async def host_dies(self) -> None:
        self.scope.cancel()
        await settle()
        assert not self.open
        self._start()
        await settle()
        self.give_out_again()

    async def gateway_dies(self) -> None:
        """What had left is said to the next one; turns under way are not."""
        house = self.house
        house.pool.forget()
        await settle()
        self.take()
        self.begun.clear()
        self.scope = trio.CancelScope()
        self.nursery.start_soon(self._run, house, self.scope)
        await settle()
        self.give_out_again()

    def give_out_again(self) -> None:
        for number, kinds in self.sent.items():
            for place in range(self.consumed[number], len(kinds)):
                self.give_out(number, place)

    def go_on(self, which: int) -> None:
        if self.open:
            waiting = sorted(self.open)
            self.open[waiting[which % len(waiting)]].set()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 3), st.sampled_from(["message"] * 5 + ["close"])),
        st.tuples(st.just("go on"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["host dies", "gateway dies"])),
    ),
    max_size=30,
)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60)
@given(steps=steps)
def test_each_event_begins_when_it_may_and_has_its_effect_once_and_in_order(mode, steps):
    """S19, S22, H1, T1, T2, T3: whoever dies at which step."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(mode, nursery)
            await settle()
            for step in steps:
                match step:
                    case ("arrive", number, kind):
                        world.arrive(number, kind)
                    case ("go on", which):
                        world.go_on(which)
                    case ("host dies",):
                        await world.host_dies()
                    case ("gateway dies",):
                        await world.gateway_dies()
                await settle()
                world.check()
            while world.open:
                world.go_on(0)
                await settle()
                world.check()
            assert dict(world.consumed) == {number: len(kinds) for number, kinds in world.sent.items()}
            assert (world.house.pool.cells, world.house.pool.awake) == ({}, 0)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("mode", MODES)
def test_a_room_that_was_evicted_before_its_writes_were_on_disk_wakes_again(mode):
    """S3, H4: it is constructed and started anew, and nothing runs beside that."""
    made: list[str] = []

    class Main(Server):
        concurrency = mode

        def __init__(self, room):
            made.append("made")

        async def on_start(self):
            await trio.sleep(1)
            made.append("started")

        async def on_message(self, message, sender):
            made.append(message)
            await trio.sleep(1)

    async def main() -> None:
        house = House(Main)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.pool.run)
            cell = house.pool.cells["main/r"] = Cell("main/r", house.kind)
            cell.gate, cell.started, cell.scheduled = 7, True, False
            for number in (1, 2):
                house.message(f"{number}", number=number)
                await trio.sleep(0.1)
            assert made == ["made"]
            await trio.sleep(1.5)
            assert made[:3] == ["made", "started", "1"]
            assert len(made) == (3 if mode == "serial" else 4)
            await trio.sleep(3)
            assert made == ["made", "started", "1", "2"]
            assert (house.pool.awake, cell.running, cell.scheduled) == (0, False, False)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("mode", ["per_connection", "interleave"])
def test_a_room_is_evicted_when_nothing_of_it_runs(mode):
    """S6, S8: not while another turn waits, whoever has asked for it."""

    class Main(Server):
        concurrency = mode
        hibernate = False

        async def on_message(self, message, sender):
            if message == "go":
                self.room.hibernate()
            await trio.sleep(int(message == "wait") * 3)

    async def main() -> None:
        house = House(Main)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.pool.run)
            await settle()
            house.message("wait", number=1)
            house.message("go", number=2)
            await trio.sleep(1)
            assert (len(house.left), house.pool.awake) == (1, 1)
            house.message("more", number=2)
            await trio.sleep(1)
            assert (len(house.left), house.pool.awake, house.pool.wakes) == (2, 1, 1)
            await trio.sleep(2)
            assert (len(house.left), house.pool.awake, house.pool.cells) == (3, 0, {})
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


# --- Decisions ------------------------------------------------------------------------------------


def message(number: int, end: int) -> Event:
    return [wire.MESSAGE, "main/r", number, number, CARD, None, end, ""]


def test_what_belongs_to_no_connection_waits_for_nobody():
    """S19: requests and the room's own events; but not beside `on_start`."""
    overlap = Overlap(interleaves=False)
    request: Event = [wire.REQUEST, "main/r", 1, {}]
    failed: Event = [FAILED, "main/r", ValueError()]
    events = [message(1, 1), message(1, 2), request, failed]
    overlap.starting = True
    assert not overlap.may_take(events)
    overlap.starting = False
    assert overlap.take(events) == message(1, 1)
    assert overlap.take(events) is request
    assert overlap.take(events) is failed
    assert overlap.take(events) is None
    assert events == [message(1, 2)]


def test_what_ends_early_is_held_for_the_earlier_ones_of_its_connection():
    """T3: and for nobody else's."""
    overlap = Overlap(interleaves=True)
    events = [message(1, 1), message(1, 2), message(2, 1), message(1, 3)]
    first, second, other, third = list(events)
    assert [overlap.take(events) for _ in range(5)] == [first, second, other, third, None]
    assert overlap.ended(second, "second") == []
    assert overlap.ended(other, "other") == ["other"]
    assert overlap.ended(first, "first") == ["first", "second"]
    assert overlap.ended(third, "third") == ["third"]
