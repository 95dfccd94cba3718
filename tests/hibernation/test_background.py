"""Background work beside the turns of its room: what it keeps awake, what it stages, how it ends (S7, S20).

The pool runs with real turns, on a virtual clock, between a fake link and a fake disk, which takes everything
at once.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import hibernation.background
import hibernation.pool
from broker import RoomGone, Server
from hibernation import wire
from hibernation.background import Background
from hibernation.cells import Cell
from hibernation.explanation import explain
from hibernation.probation import Probation
from hibernation.staging import Turn
from hibernation.suspects import Suspects
from tests.hibernation.test_pool import House, Log, settle


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hibernation.pool, hibernation.background):
        monkeypatch.setattr(module, "monotonic", trio.current_time)
    monkeypatch.setattr("hibernation.explanation.monotonic", trio.current_time)
    monkeypatch.setattr("hibernation.turns.log", Log())


class Site(House):
    """A house whose rooms may work in the background."""

    def __init__(self, cls: type[Server], nursery: trio.Nursery, **settings: Any) -> None:
        super().__init__(cls, **settings)
        self.background = Background(self.pool, self._finish, self._flush, self.turns.log_failure)
        self.background.nursery = nursery
        self.may_flush = trio.Event()
        self.may_flush.set()

    def _finish(self, cell: Cell, turn: Turn, result: list[Any]) -> None:
        super()._finish(cell, turn, result)
        if turn.tasks:
            assert cell.room is not None
            self.background.planned(cell, cell.room, turn.tasks)()

    async def flush(self, turn: Turn) -> None:
        part = turn.split()
        assert turn.room is not None
        self._finish(self.pool.cells[turn.room.key], part, [wire.EFFECTS, part.effects])
        self._flush()
        await self.may_flush.wait()

    async def run(self) -> None:
        while True:
            await self.pool.run()

    def broadcasts(self) -> list[str]:
        return [effect[2] for _, result in self.left for effect in result[-1] if effect[0] == wire.BROADCAST]


def play(cls: type[Server], script: Callable[[Site], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            site = Site(cls, nursery, **settings)
            nursery.start_soon(site.run)
            await settle()
            await script(site)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


class Worker(Server):
    """Counts in a field, beside whatever it is sent."""

    def __init__(self, room):
        self.count = 0

    async def on_message(self, message, sender):
        self.count += 1
        if message == "work":
            self.room.start_soon(self.work, 3)
        elif message == "slow":
            await trio.sleep(5)
        elif message == "fail":
            self.room.start_soon(self.work, 3)
            raise RuntimeError("no work")
        sender.send(str(self.count))

    async def work(self, seconds):
        for _ in range(seconds):
            await trio.sleep(1)
            self.count += 10
            self.room.broadcast(f"flushed {self.count}")
            await self.room.flush()
        self.room.broadcast(f"end {self.count}")


def test_it_keeps_its_room_awake_until_it_ends():
    """S7, W1: turns run beside it, in the same object; then the room goes as ever."""

    async def script(site: Site) -> None:
        site.message("work")
        await trio.sleep(1.5)
        assert (site.pool.awake, site.background.busy) == (1, True)
        site.message("beside")
        await settle()
        assert site.sent() == ["1", "12"]
        (reason,) = explain(site.pool, "main/r")["reasons"]
        assert reason.startswith("background work Worker.work has been running for 1.5 s at ")
        await trio.sleep(2)
        assert site.broadcasts() == ["flushed 11", "flushed 22", "flushed 32", "end 32"]
        assert (site.pool.awake, site.pool.cells, site.background.busy) == (0, {}, False)
        site.message("again")
        await settle()
        assert site.sent()[-1] == "1"

    play(Worker, script)


@pytest.mark.parametrize("stays", [{"idle_seconds": 10.0}, {"hibernate": False}])
def test_a_room_that_stays_is_evicted_after_it_and_not_before(stays):
    """S6, S7: idle_seconds begin at its end."""

    class Main(Worker):
        pass

    for name, value in stays.items():
        setattr(Main, name, value)

    async def script(site: Site) -> None:
        site.deserted.add("main/r")
        site.message("work")
        await trio.sleep(12)
        assert (site.background.busy, site.pool.awake) == (False, 1)
        await trio.sleep(5)
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Main, script)


def test_it_may_ask_for_the_eviction_of_its_room():
    """S8: at its end."""

    class Main(Server):
        hibernate = False

        def on_message(self, message, sender):
            self.room.start_soon(self.work)

        async def work(self):
            self.room.hibernate()
            await self.room.flush()
            await trio.sleep(1)

    async def script(site: Site) -> None:
        site.message("go")
        await trio.sleep(0.5)
        assert site.pool.awake == 1
        await trio.sleep(1)
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Main, script)


def test_a_turn_that_fails_begins_none():
    """S20."""

    async def script(site: Site) -> None:
        site.message("fail")
        await trio.sleep(5)
        assert (site.broadcasts(), site.background.busy, site.pool.cells) == ([], False, {})

    play(Worker, script)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_it_raises_is_given_to_on_error_and_drops_what_is_not_flushed(at_once):
    """S20, W3: as a turn of its own, which waits for the one under way."""
    told: list[Any] = []

    class Main(Server):
        async def on_message(self, message, sender):
            self.room.start_soon(self.at_once if at_once else self.later)
            await self.room.flush()
            await trio.sleep(2)
            told.append("turn ended")

        def at_once(self):
            self.room.broadcast("dropped")
            raise SystemExit("at once")

        async def later(self):
            self.room.broadcast("kept")
            await self.room.flush()
            self.room.broadcast("dropped")
            await trio.sleep(1)
            raise SystemExit("later")

        def on_error(self, connection, error):
            told.append((connection, str(error)))
            self.room.broadcast("told")

    async def script(site: Site) -> None:
        site.message("go")
        await trio.sleep(5)
        assert told == ["turn ended", (None, "at once" if at_once else "later")]
        assert site.broadcasts() == (["told"] if at_once else ["kept", "told"])
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Main, script)


def test_an_on_error_that_fails_or_takes_too_long_is_only_logged(monkeypatch):
    """S20."""
    log = Log()
    monkeypatch.setattr("hibernation.turns.log", log)

    class Main(Server):
        turn_timeout = 1.0

        def on_message(self, message, sender):
            self.room.start_soon(self.work, message)

        def work(self, message):
            raise RuntimeError(message)

        async def on_error(self, connection, error):
            self.room.broadcast("dropped")
            if str(error) == "slow":
                await trio.sleep_forever()
            raise RuntimeError("again")

    async def script(site: Site) -> None:
        for message in ("quick", "slow"):
            site.message(message)
            await trio.sleep(3)
        assert [line.rpartition(".")[2] for line in log.lines] == ["work", "on_error failed"] * 2
        assert site.broadcasts() == []
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Main, script)


def test_when_the_gateway_goes_it_goes_on_in_the_same_object():
    """S34, W1: turns under way are cancelled and come again; rooms without work begin anew."""

    async def script(site: Site) -> None:
        site.message("work")
        site.message("slow", "other", number=2)
        await trio.sleep(0.5)
        site.message("slow")
        await trio.sleep(1)
        site.pool.forget()
        await settle()
        assert (list(site.pool.cells), site.pool.awake, site.pool.busy) == (["main/r"], 1, False)
        assert site.sent() == ["1"]
        site.message("again")
        site.message("again", "other", number=2)
        await settle()
        assert (site.sent("r"), site.sent("other")) == (["1", "13"], ["1"])
        await trio.sleep(3)
        assert site.broadcasts() == ["flushed 12", "flushed 23", "flushed 33", "end 33"]
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Worker, script)


def test_a_stream_that_the_gateway_has_taken_along_keeps_nobody_awake():
    """S6, S34: one that was to begin when its turn is on disk, and does not begin any more."""

    async def script(site: Site) -> None:
        site.message("work")
        await settle()
        site.cell.streams += 1
        site.pool.forget()
        await trio.sleep(2)
        assert (site.pool.awake, site.cell.streams) == (1, 1)
        await trio.sleep(5)
        assert site.broadcasts()[-1] == "end 31"
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Worker, script)


@pytest.mark.parametrize("ends_by", ["gateway", "timeout"])
def test_what_a_cancelled_turn_has_started_in_it_is_no_part_of_it_any_more(ends_by):
    """S20, S34: its effects would leave, and those of the turn that is run again, too."""
    raised: list[type[BaseException]] = []

    class Main(Server):
        turn_timeout = 1.0

        async def on_message(self, message, sender):
            if message == "work":
                self.room.start_soon(self.work)
            else:
                self.nursery.start_soon(self.part)
                await trio.sleep_forever()

        async def work(self):
            async with trio.open_nursery() as self.nursery:
                await trio.sleep(10)
            self.room.broadcast("end")

        async def part(self):
            self.room.broadcast("never")
            await trio.sleep(3)
            try:
                self.room.broadcast("never")
                await self.room.flush()
            except RoomGone as error:
                raised.append(type(error))

    async def script(site: Site) -> None:
        site.message("work")
        await settle()
        site.message("turn")
        await settle()
        if ends_by == "gateway":
            site.pool.forget()
        await trio.sleep(20)
        assert (raised, site.broadcasts()) == ([RoomGone], ["end"])
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Main, script)


def test_when_the_gateway_goes_what_is_not_on_disk_stays_known():
    """H4: the room's object goes, and the next one reads what the former has written."""

    class Main(Server):
        def on_message(self, message, sender):
            self.room.storage.put("k", message)

    async def script(site: Site) -> None:
        site.message("a")
        await settle()
        cell = site.pool.cells["main/r"] = Cell("main/r", site.kind)
        cell.gate, cell.pending = 7, {"k": b"\x61a"}
        cell.scheduled = False
        site.pool.forget()
        await settle()
        assert site.pool.cells == {"main/r": cell}
        assert (cell.server, cell.gate, cell.pending) == (None, 7, {"k": b"\x61a"})

    play(Main, script)


def test_what_is_cancelled_cleans_up_and_loses_what_is_not_flushed():
    """S32: and may still take its time, which the host bounds."""
    ended = []

    class Main(Server):
        def on_message(self, message, sender):
            self.room.start_soon(self.work)

        async def work(self):
            self.room.broadcast("kept")
            await self.room.flush()
            self.room.broadcast("lost")
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(2)
                ended.append(trio.current_time())

    async def script(site: Site) -> None:
        site.message("go")
        await trio.sleep(1)
        site.background.cancel()
        with trio.move_on_after(1):
            await site.background.all_ended()
        assert site.background.busy
        await site.background.all_ended()
        assert len(ended) == 1
        assert site.broadcasts() == ["kept"]
        assert (site.pool.awake, site.pool.cells) == (0, {})

    play(Main, script)


def test_a_flush_waits_and_the_rest_of_the_room_does_not():
    """S20."""

    async def script(site: Site) -> None:
        site.may_flush = trio.Event()
        site.message("work")
        await trio.sleep(3)
        assert site.broadcasts() == ["flushed 11"]
        site.message("beside")
        await settle()
        assert site.sent() == ["1", "12"]
        site.may_flush.set()
        await trio.sleep(3)
        assert site.broadcasts() == ["flushed 11", "flushed 22", "flushed 32", "end 32"]

    play(Worker, script)


def test_it_does_not_begin_while_something_runs_alone():
    """B4."""

    async def script(site: Site) -> None:
        site.message("work")
        probation = Probation(Suspects(3), lambda _: None)
        site.pool.probation = probation
        probation.alone = Cell("main/other", site.kind)
        await trio.sleep(2)
        assert site.sent() == []  # nor does its turn
        probation.alone = None
        site.pool.activate()
        await settle()
        assert site.sent() == ["1"]
        probation.alone = Cell("main/other", site.kind)
        await trio.sleep(5)
        running = site.pool.running.others
        probation.alone = None
        await trio.sleep(5)
        assert (running, site.background.busy) in ((0, False), (1, False))
        assert site.broadcasts()[-1] == "end 31"

    play(Worker, script)
