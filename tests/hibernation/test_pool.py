"""The life of rooms in their host: when they are made, how they take turns, what a turn may do to others.

The pool runs with real turns, on a virtual clock, between a fake link and a fake disk.
"""

import itertools
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import trio
from trio.testing import MockClock

import hibernation.pool
from broker import Server
from hibernation import wire
from hibernation.cells import Cell, Event, Kind, Worker
from hibernation.errors import TurnTimeout
from hibernation.party import make_parties
from hibernation.pool import PARKED_MAX, Pool
from hibernation.room import Room
from hibernation.settings import Settings
from hibernation.staging import Turn
from hibernation.turns import Turns

CARD = wire.make_card("c1", "ws://h/party/r", b"")

H = TypeVar("H", bound="House")


class NoExchanges:
    """No HTTP here."""

    async def turn(self, cell: Cell, room: Room, worker: Worker, event: Event, turn: Turn) -> None:
        raise AssertionError

    def runs_for_a_turn(self, event: Event) -> bool:
        return False

    def is_waiting(self, number: int) -> bool:
        return False

    def fail(self, number: int, effects: list[Any], error: BaseException) -> None:
        raise AssertionError


class House:
    """A pool with what it needs around it."""

    def __init__(self, cls: type[Server], **settings: Any) -> None:
        base = Settings(**settings)
        (party,) = make_parties([cls])
        self.kind = Kind(party, base)
        self.inbox: list[tuple[str, Event]] = []
        self.arrived = trio.Event()
        #: What left: key of the room, result.
        self.results: list[tuple[str, list[Any]]] = []
        self.left: list[tuple[str, list[Any]]] = []
        self.full = False
        self.deserted: set[str] = set()
        self.asked = 0
        self.pool = Pool(
            base,
            self,  # type: ignore[arg-type]
            {},
            wait=self._wait,
            receive=self._receive,
            flush=self._flush,
            is_full=lambda: self.full,
            is_deserted=self._is_deserted,
        )
        self.turns = Turns(self._finish, self.pool.suspended, dev=False)
        self.pool.turns = self.turns
        self.turns.exchanges = NoExchanges()

    async def _wait(self) -> None:
        await self.arrived.wait()

    def _receive(self) -> None:
        self.arrived = trio.Event()
        inbox, self.inbox = self.inbox, []
        for key, event in inbox:
            self.pool.deliver(key, self.kind, event)

    def _flush(self) -> None:
        self.left += self.results[len(self.left) :]

    async def _is_deserted(self, key: str) -> bool:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        return key in self.deserted

    def _finish(self, cell: Cell, turn: Turn, result: list[Any]) -> None:
        assert cell.room is not None
        cell.room._evict |= turn.evict
        turn.room = None
        for connection, edit in (turn.edits or {}).items():
            connection._apply(edit)
            connection._edits -= 1
        self.results.append((cell.key, result))

    def message(self, data: Any, room: str = "r", number: int = 1) -> None:
        self._event([wire.MESSAGE, f"main/{room}", number, number, CARD, None, 0, data])

    def connect(self, room: str = "r", number: int = 1) -> None:
        self._event([wire.CONNECT, f"main/{room}", number, number, CARD, None, {}])

    def _event(self, event: Event) -> None:
        self.inbox.append((event[1], event))
        self.arrived.set()

    def sent(self, room: str | None = None) -> list[Any]:
        """What was sent to clients, in order."""
        return [
            effect[3]
            for key, result in self.left
            for effect in result[-1]
            if effect[0] == wire.SEND and room in (None, key.partition("/")[2])
        ]

    @property
    def cell(self) -> Cell:
        (cell,) = self.pool.cells.values()
        return cell


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hibernation.pool, "monotonic", trio.current_time)
    monkeypatch.setattr("hibernation.pool.random.uniform", lambda low, high: 1.0)
    monkeypatch.setattr("hibernation.turns.log", Log())


class Log:
    """What went wrong, in one word each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def error(self, text: str, **_: Any) -> None:
        self.lines.append(text)


def play(house: H | Callable[[], H], script: Callable[[H], Awaitable[None]]) -> H:
    """Run the pool beside the script, until the script ends."""
    made: list[H] = []

    async def main() -> None:
        each = house if isinstance(house, House) else house()
        made.append(each)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(each.pool.run)
            await settle()
            await script(each)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return made[0]


async def settle(seconds: float = 0.001) -> None:
    """Let everything happen that needs no time."""
    await trio.sleep(seconds)


# --- Waking and sleeping --------------------------------------------------------------------------


def test_a_room_is_made_for_its_work_and_leaves_nothing_behind():
    """S6, H4: by default it goes as soon as its mailbox is empty."""

    class Main(Server):
        def on_message(self, message, sender):
            sender.send(message)

    async def script(house: House) -> None:
        for number in range(3):
            house.message(f"{number}")
            house.message(f"{number}")
            await settle()
        assert house.sent() == ["0", "0", "1", "1", "2", "2"]
        assert (house.pool.wakes, house.pool.evictions, house.pool.awake) == (3, 3, 0)
        assert house.pool.cells == {}

    play(lambda: House(Main), script)


def test_on_start_comes_before_any_turn_and_first_events_wait_for_it():
    """S3."""
    made = []

    class Main(Server):
        def __init__(self, room):
            super().__init__(room)
            made.append("init")

        async def on_start(self):
            made.append("start")
            await trio.sleep(5)
            made.append("started")

        def on_connect(self, connection):
            made.append("connect")

        def on_message(self, message, sender):
            made.append(message)

    async def script(house: House) -> None:
        house.connect(number=2)
        house.message("one")
        await trio.sleep(1)
        house.message("two")
        await trio.sleep(1)
        assert made == ["init", "start"]
        await trio.sleep(5)
        assert made == ["init", "start", "started", "connect", "one", "two"]
        assert house.left[0][1][0] == wire.EFFECTS  # on_start is a turn of its own

    play(lambda: House(Main), script)


@pytest.mark.parametrize("where", ["__init__", "on_start", "on_start late", "on_start never"])
def test_a_room_that_does_not_start_is_tried_again_later_each_time(where):
    """S4: its events wait, in order; 0.1 s doubling to 10 s."""
    tries: list[float] = []

    def fail() -> None:
        tries.append(trio.current_time())
        if len(tries) <= 10:
            raise SystemExit("not yet")

    class Main(Server):
        def __init__(self, room):
            super().__init__(room)
            if where == "__init__":
                fail()

        async def on_start(self):
            if where == "on_start":
                fail()
            if where == "on_start late":
                await trio.sleep(1)
                fail()
            if where == "on_start never":
                tries.append(trio.current_time())
                if len(tries) <= 10:
                    self.room.broadcast("discarded")
                    await trio.sleep_forever()

        def on_message(self, message, sender):
            sender.send(message)

    async def script(house: House) -> None:
        house.message("a")
        await trio.sleep(2)
        house.message("b")
        await trio.sleep(200)
        assert house.sent() == ["a", "b"]
        least = {"on_start late": 1, "on_start never": 2}.get(where, 0)
        pauses = [after - before - least for before, after in itertools.pairwise(tries)]
        assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10], abs=0.06)
        assert not any(effect[0] == wire.BROADCAST for _, result in house.left for effect in result[-1])
        assert (house.pool.awake, house.pool.cells) == (0, {})

    play(lambda: House(Main, start_timeout=2, start_tries=100, start_seconds=1000), script)


def test_idle_seconds_keep_a_room_awake_between_messages():
    """S6: fields survive as long as it is."""

    class Main(Server):
        idle_seconds = 2
        count = 0

        def on_message(self, message, sender):
            self.count += 1
            sender.send(str(self.count))

    async def script(house: House) -> None:
        for pause in (0.1, 1.8, 1.8, 2.2, 0.1):
            house.message("x")
            await trio.sleep(pause)
        assert house.sent() == ["1", "2", "3", "4", "1"]
        await trio.sleep(3)
        assert (house.pool.awake, house.pool.cells) == (0, {})

    play(lambda: House(Main), script)


def test_a_room_that_does_not_hibernate_stays_while_it_has_a_connection_and_idle_seconds_longer():
    """S6: counted from when the last one has gone."""

    class Main(Server):
        hibernate = False
        idle_seconds = 10

        def on_message(self, message, sender):
            pass

    async def script(house: House) -> None:
        house.message("x")
        await trio.sleep(100)
        assert house.pool.awake == 1
        assert house.asked <= 100 / 2.5 + 2
        house.deserted.add("main/r")
        await trio.sleep(9.5)
        assert house.pool.awake == 1
        await trio.sleep(3.5)
        assert (house.pool.awake, house.pool.cells) == (0, {})

    play(lambda: House(Main), script)


def test_a_connection_that_comes_back_in_time_keeps_the_room():
    """S6."""

    class Main(Server):
        hibernate = False
        idle_seconds = 10

        def on_message(self, message, sender):
            pass

    async def script(house: House) -> None:
        house.message("x")
        await settle()
        for _ in range(5):
            house.deserted.add("main/r")
            await trio.sleep(7)
            house.deserted.clear()
            await trio.sleep(7)
        assert (house.pool.awake, house.pool.wakes) == (1, 1)

    play(lambda: House(Main), script)


def test_beyond_max_awake_rooms_the_least_recently_used_go():
    """S6: those that may hibernate, and no others."""

    class Main(Server):
        idle_seconds = 1000

        def on_message(self, message, sender):
            pass

    async def script(house: House) -> None:
        for room in "abca":
            house.message("x", room)
            await settle()
        house.message("x", "d")
        await settle()
        assert sorted(house.pool.cells) == ["main/a", "main/c", "main/d"]
        assert house.pool.awake == 3

    play(lambda: House(Main, max_awake_rooms=3), script)


def test_above_the_memory_mark_every_idle_room_goes(monkeypatch):
    """S6: also where `hibernate` is False; and one in a turn stays."""
    monkeypatch.setattr(hibernation.pool, "memory_bytes", lambda: 1 << 40, raising=False)

    class Main(Server):
        hibernate = False

        async def on_message(self, message, sender):
            await trio.sleep(float(message))

    async def script(house: House) -> None:
        house.message("0", "idle")
        house.message("5", "busy")
        await trio.sleep(3)
        assert list(house.pool.cells) == ["main/busy"]

    play(lambda: House(Main), script)


def test_hibernate_takes_hold_at_the_end_of_its_turn():
    """S8: also when more messages wait, and where the room would stay; fields do not survive it."""

    class Main(Server):
        idle_seconds = 1000
        count = 0

        def on_message(self, message, sender):
            self.count += 1
            sender.send(f"{message}{self.count}")
            if message == "sleep":
                self.room.hibernate()
            if message == "fail":
                self.room.hibernate()
                raise ValueError

    async def script(house: House) -> None:
        for message in ("a", "b", "sleep", "c", "fail", "d", "sleep"):
            house.message(message)
        await settle()
        assert house.sent() == ["a1", "b2", "sleep3", "c1", "d3", "sleep4"]
        assert (house.pool.wakes, house.pool.awake, house.pool.cells) == (2, 0, {})

    play(lambda: House(Main), script)


def test_a_room_that_stays_forgets_connections_that_its_code_does_not_hold():
    """Nobody tells a room without `on_close` who has gone; it must not remember everybody."""

    class Main(Server):
        hibernate = False

        def __init__(self, room):
            super().__init__(room)
            self.kept = {}

        def on_message(self, message, sender):
            if message == "keep":
                self.kept[sender.id] = sender
            sender.send(str(self.kept.get(sender.id) is sender))

    async def script(house: House) -> None:
        house.message("keep", number=1)
        for number in range(2, 100):
            house.message("x", number=number)
        await settle()
        assert not house.cell.connections
        assert list(house.cell.met or ()) == [1]
        house.message("x", number=1)
        await settle()
        assert house.sent()[-1] == "True"

    play(lambda: House(Main), script)


# --- Turns ----------------------------------------------------------------------------------------


def test_turns_of_a_room_are_serial_in_order_and_others_go_on_meanwhile():
    """S19, H1: also when a handler waits."""
    running: set[str] = set()

    class Main(Server):
        async def on_message(self, message, sender):
            assert self.room.id not in running
            running.add(self.room.id)
            await trio.sleep(1)
            running.discard(self.room.id)
            sender.send(f"{self.room.id}{message}")

    async def script(house: House) -> None:
        for number in range(5):
            for room in "abc":
                house.message(str(number), room)
        await trio.sleep(5.5)
        for room in "abc":
            assert house.sent(room) == [f"{room}{number}" for number in range(5)]

    play(lambda: House(Main), script)


def test_a_room_gets_64_turns_and_then_the_next_room():
    """S24."""

    class Main(Server):
        def on_message(self, message, sender):
            sender.send(f"{self.room.id}{message}")

    async def script(house: House) -> None:
        for number in range(130):
            house.message(str(number), "a")
        house.message("0", "b")
        house.message("0", "c")
        await settle()
        sent = house.sent()
        assert (sent.index("b0"), sent.index("c0")) == (64, 65)
        assert house.sent("a") == [f"a{number}" for number in range(130)]
        assert len(sent) == 132

    play(lambda: House(Main), script)


def test_a_thousand_rooms_wait_at_once_and_their_workers_do_not_stay():
    """S24: as many tasks as turns that really wait; afterwards no more than are needed."""

    class Main(Server):
        async def on_message(self, message, sender):
            await trio.sleep(10)
            sender.send(message)

    async def script(house: House) -> None:
        for number in range(1000):
            house.message("slow", f"r{number}")
        await trio.sleep(1)
        assert house.sent() == []
        assert len(house.pool._workers) > 1000
        await trio.sleep(10)
        assert len(house.sent()) == 1000
        assert house.pool.cells == {}
        assert len(house.pool._workers) <= PARKED_MAX + 1

    play(lambda: House(Main), script)


def test_nurseries_time_limits_and_their_errors_work_in_handlers():
    """S19: a handler is an ordinary trio coroutine."""

    class Main(Server):
        async def on_message(self, message, sender):
            async def child(seconds: float) -> None:
                await trio.sleep(seconds)
                sender.send(f"child {seconds}")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, 2)
                nursery.start_soon(child, 1)
            with trio.move_on_after(1):
                await trio.sleep_forever()
            try:
                with trio.fail_after(1):
                    await trio.sleep_forever()
            except trio.TooSlowError:
                sender.send("too slow")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, 100)
                nursery.cancel_scope.cancel()
            await trio.to_thread.run_sync(lambda: None)
            sender.send("end")

    async def script(house: House) -> None:
        house.message("x")
        await trio.sleep(5)
        with trio.fail_after(100):
            while not house.left:
                await trio.sleep(0.1)
        assert house.sent() == ["child 1", "child 2", "too slow", "end"]

    play(lambda: House(Main), script)


# --- Turns that fail ------------------------------------------------------------------------------


class Sour(Server):
    """Fails in the way that the message names; `on_error` says what it was told."""

    turn_timeout = 5

    async def on_message(self, message, sender):
        sender.send("discarded")
        sender.set_state(message)
        match message:
            case "raise":
                raise ValueError("room's own")
            case "exit":
                sys.exit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "forever":
                await trio.sleep_forever()
            case "nursery":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    nursery.start_soon(trio.sleep_forever)
            case "nursery fails":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.fails_when_cancelled)
                    nursery.start_soon(trio.sleep_forever)
            case "translates":
                try:
                    await trio.sleep_forever()
                except BaseException:
                    raise LookupError from None
            case "stubborn":
                with trio.CancelScope(shield=True):
                    await trio.sleep(7)
                await trio.sleep_forever()
            case "on_error waits" | "on_error raises" | "on_error never ends":
                raise ValueError(message)
            case _:
                sender.send(message)

    async def fails_when_cancelled(self):
        try:
            await trio.sleep_forever()
        finally:
            raise LookupError

    async def on_error(self, connection, error):
        connection.send(f"{type(error).__name__} {connection.state}")
        match str(error):
            case "on_error waits":
                await trio.sleep(1)
            case "on_error raises":
                raise KeyError
            case "on_error never ends":
                await trio.sleep_forever()


@pytest.mark.parametrize(
    ("message", "told", "seconds"),
    [
        ("raise", "ValueError before", 0),
        ("exit", "SystemExit before", 0),
        ("interrupt", "KeyboardInterrupt before", 0),
        ("forever", "TurnTimeout before", 5),
        ("nursery", "TurnTimeout before", 5),
        ("nursery fails", "TurnTimeout before", 5),
        ("translates", "TurnTimeout before", 5),
        ("stubborn", "TurnTimeout before", 7),
        ("on_error waits", "ValueError before", 1),
        ("on_error raises", None, 0),
        ("on_error never ends", None, 5),
    ],
)
def test_a_turn_that_fails_is_as_if_it_had_not_been_and_the_next_goes_on(message, told, seconds):
    """S20: effects and state are discarded, `on_error` is told once, its effects leave; the room goes on, in
    order, and so do the others.
    """

    async def script(house: House) -> None:
        house.message("before")
        house.message(message)
        house.message("after")
        house.message("other", "other")
        await trio.sleep(1.5 if seconds > 1 else 0.1)
        assert house.sent("other") == ["discarded", "other"]
        await trio.sleep(seconds + 1.5)
        expected = ["discarded", "before", *([told] if told else []), "discarded", "after"]
        assert house.sent("r") == expected
        assert len(house.left) == 4
        assert house.turns.failed == 1
        assert (house.pool.awake, house.pool.cells) == (0, {})

    play(lambda: House(Sour), script)


def test_what_is_cancelled_is_one_turn_and_never_the_next():
    """S20: a turn that ends just as its time is up, or does not care, costs the next one nothing."""

    class Main(Server):
        turn_timeout = 5

        async def on_message(self, message, sender):
            if message == "careless":
                try:
                    await trio.sleep_forever()
                except BaseException:
                    return
            if message == "just":
                with trio.CancelScope(shield=True):
                    await trio.sleep(7)
            await trio.sleep(1)
            sender.send(message)

    for first in ("careless", "just"):

        async def script(house: House, first: str = first) -> None:
            house.message(first)
            house.message("one")
            house.message("two")
            house.message("three", "other")
            await trio.sleep(12)
            assert house.sent("r")[-2:] == ["one", "two"]
            assert house.sent("other") == ["three"]
            assert house.turns.failed <= 1
            assert house.pool.cells == {}

        play(lambda: House(Main), script)


def test_a_handler_that_ends_with_a_scope_left_open_harms_its_own_turn_only():
    """A plain error of room code; the worker goes on."""

    class Main(Server):
        async def on_message(self, message, sender):
            await trio.sleep(1)
            raise ExceptionGroup("several", [ValueError(), KeyError()])

        def on_error(self, connection, error):
            connection.send(type(error).__name__)

    async def script(house: House) -> None:
        house.message("x")
        house.message("x")
        await trio.sleep(3)
        assert house.sent() == ["ExceptionGroup", "ExceptionGroup"]

    play(lambda: House(Main), script)


def test_a_failed_connect_turn_is_told_and_is_reported_as_failed():
    """S9."""

    class Main(Server):
        turn_timeout = 1

        async def on_connect(self, connection):
            await trio.sleep_forever()

        def on_error(self, connection, error):
            assert isinstance(error, TurnTimeout)
            connection.send("sorry")

    async def script(house: House) -> None:
        house.connect()
        await trio.sleep(3)
        ((_, (kind, _, _, failed, effects)),) = house.left
        assert (kind, failed, effects[0][3]) == (wire.CONNECTED, True, "sorry")

    play(lambda: House(Main), script)


# --- The end --------------------------------------------------------------------------------------


def test_a_host_that_retires_begins_no_more_turns_and_ends_those_under_way():
    """S32."""

    class Main(Server):
        async def on_message(self, message, sender):
            await trio.sleep(2)
            sender.send(message)

    async def script(house: House) -> None:
        for number in range(3):
            house.message(str(number))
        house.message("b", "b")
        await trio.sleep(1)
        house.pool.retire()
        house.message("late", "c")
        await trio.sleep(10)
        assert not house.pool.busy
        assert sorted(house.sent()) == ["0", "b"]

    play(lambda: House(Main), script)


def test_a_full_link_stops_turns_until_it_has_room():
    """S24, S25: what is produced has to leave first."""

    class Main(Server):
        def on_message(self, message, sender):
            sender.send(message)

    async def script(house: House) -> None:
        house.full = True
        house.message("a")
        house.message("b", "b")
        await settle()
        assert house.results == []
        house.full = False
        house.arrived.set()
        await settle()
        assert house.sent() == ["a", "b"]

    play(lambda: House(Main), script)


def test_a_gateway_that_goes_takes_everything_with_it():
    """S34: the next one delivers again what was not acknowledged; the pool runs anew."""

    class Main(Server):
        async def on_message(self, message, sender):
            if message == "slow":
                try:
                    await trio.sleep_forever()
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(2)
            sender.send(message)

    async def main() -> None:
        house = House(Main)
        async with trio.open_nursery() as nursery:

            async def run_twice() -> None:
                await house.pool.run()
                await house.pool.run()

            nursery.start_soon(run_twice)
            await settle()
            house.message("a")
            house.message("slow", "b")
            await settle()
            house.pool.forget()
            await trio.sleep(3)
            assert (house.pool.awake, house.pool.cells, house.pool.busy) == (0, {}, False)
            house.message("again", "b")
            await settle()
            assert house.sent()[-1] == "again"
            assert (house.pool.awake, house.pool.cells) == (0, {})
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
