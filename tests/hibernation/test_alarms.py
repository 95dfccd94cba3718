"""Alarms in the host: what a turn makes of them, and what becomes of those that fail (S29, S20).

The pool runs with real turns, real commits and a real shard, on a virtual clock that is the wall clock too.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import hibernation.pool
import hibernation.wall_clock
from broker import Alarm, HookError, LimitExceeded, RoomGone, Server, StorageLimitError, ValueEncodingError
from hibernation import wire
from hibernation.alarms import Alarms
from hibernation.cells import Batch, Cell, Kind
from hibernation.commits import Commits
from hibernation.party import make_parties
from hibernation.pool import Pool
from hibernation.room import Room
from hibernation.room_alarms import when_ms
from hibernation.settings import Settings
from hibernation.staging import Turn
from hibernation.turns import Turns
from storage.alarms import AlarmRow
from storage.shards import Shard

#: 1 January 2026, 12:00.
NOW = 1_767_268_800.0
CARD = wire.make_card("c1", "ws://h/party/r", b"")


class House:
    """A host without a link and without processes."""

    #: No room uses SQL.
    own_databases: frozenset[str] = frozenset()

    def __init__(self, folder: Path, *classes: type[Server], **settings: Any) -> None:
        base = Settings(durability="os", **settings)
        self.kinds = {party.name: Kind(party, base) for party in make_parties(classes)}
        self.shard = Shard(folder, 0, durability="os", reserve_bytes=0)
        shards = {0: self.shard}
        none: Any = None
        self.inbox: list[list[Any]] = []
        self.arrived = trio.Event()
        self.sent: list[Any] = []
        self.commits = Commits(shards, 1, none, True, self._released)
        self.pool = Pool(
            base,
            self,  # type: ignore[arg-type]
            {},
            wait=self._wait,
            receive=self._receive,
            flush=self.commits.end_round,
            is_full=lambda: False,
            is_deserted=none,
        )
        self.turns = Turns(self._finish, self.pool.suspended, dev=False)
        self.pool.turns = self.turns
        self.alarms = Alarms(shards, self.kinds, self.pool, self.commits, base.alarms_in_flight_max)
        self.turns.alarms = self.alarms
        self.commits.alarms_stored = self.alarms.stored
        self.check_alarms = self.alarms.check_alarms
        self.read_alarm = self.alarms.read_alarm
        self.read_alarms = self.alarms.read_alarms
        self.count_alarms = self.alarms.count_alarms

    async def _wait(self) -> None:
        await self.arrived.wait()

    def _receive(self) -> None:
        self.arrived = trio.Event()
        inbox, self.inbox = self.inbox, []
        for event in inbox:
            self.pool.deliver(event[1], self.kinds[event[1].partition("/")[0]], event)

    def _released(self, batch: Batch) -> None:
        for cell in batch.cells:
            self.pool.forget_if_idle(cell)

    def _finish(self, cell: Cell, turn: Turn, result: list[Any]) -> None:
        turn.room = None
        if turn.stored:
            self.commits.stage(cell, turn)
            self.commits.hold(cell, result, [])
        self.sent += [effect[2] for effect in result[-1] if effect[0] == wire.BROADCAST]

    def read(self, key: str, name: str) -> bytes | None:
        return self.shard.get(key, name)

    async def database_to_clear(self, _key: str, _turn: Turn) -> None:
        """There are no tables."""

    async def tell(self, data: Any, room: str = "main/r") -> None:
        """A message for a room; returns when its turn has ended."""
        self.inbox.append([wire.MESSAGE, room, 1, 1, CARD, None, 0, data])
        self.arrived.set()
        await trio.sleep(0.001)


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    class Log:
        def error(self, text: str, **_: Any) -> None:
            lines.append(text)

        warning = error

    monkeypatch.setattr(hibernation.pool, "monotonic", trio.current_time)
    monkeypatch.setattr("hibernation.alarms.uniform", lambda low, high: 1.0)
    monkeypatch.setattr("hibernation.turns.log", Log())
    monkeypatch.setattr("hibernation.alarms.log", Log())
    monkeypatch.setattr(hibernation.wall_clock, "now", lambda: NOW + trio.current_time() - zero[0] + jump[0])
    jump[0] = 0.0
    return lines


zero = [0.0]
#: How far the wall clock was set forward.
jump = [0.0]


def wall() -> float:
    """What the wall clock shows."""
    return hibernation.wall_clock.from_now_ms(0) / 1000


def now() -> float:
    """Seconds since the beginning, by the wall clock."""
    return round(wall() - NOW, 2)


def play(
    folder: Path, script: Callable[[House], Awaitable[None]], *classes: type[Server], **settings: Any
) -> None:
    async def main() -> None:
        zero[0] = trio.current_time()
        house = House(folder, *classes, **settings)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.pool.run)
            nursery.start_soon(house.alarms.run)
            house.alarms.open()
            await trio.sleep(0.001)
            await script(house)
            nursery.cancel_scope.cancel()
        house.shard.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_an_alarm_comes_at_its_time_and_wakes_its_room_for_that(tmp_path):
    """S2: and a future one keeps nobody awake (S7)."""
    runs = []

    class Main(Server):
        def on_message(self, message):
            self.room.storage.set_alarm(100, "a", {"n": message})

        def on_alarm(self, alarm):
            late = wall() - alarm.scheduled_at.timestamp()
            runs.append((late, alarm.name, alarm.attempt, alarm.payload, alarm.scheduled_at.tzinfo))

    async def script(house: House) -> None:
        await house.tell(1)
        assert (house.pool.wakes, house.pool.awake, house.pool.cells) == (1, 0, {})
        await trio.sleep(99)
        assert (runs, house.pool.wakes) == ([], 1)
        await trio.sleep(2)
        [(late, *rest)] = runs
        assert 0 <= late < 0.01
        assert rest == ["a", 1, {"n": 1}, UTC]
        assert (house.pool.wakes, house.pool.cells) == (2, {})
        assert house.alarms.counts() == {
            "alarms": 0,
            "failed_alarms": 0,
            "alarm_runs": 1,
            "alarm_failures": 0,
        }

    play(tmp_path, script, Main)


def test_one_that_fails_is_tried_again_later_each_time_and_then_kept(tmp_path, log):
    """S29: 2 s doubling; what its turns staged is discarded, what `on_error` stages leaves."""
    runs = []

    class Main(Server):
        def on_message(self, message):
            self.room.storage.set_alarm(0, "a")

        async def on_alarm(self, alarm):
            runs.append((round(now()), alarm.attempt, alarm.reason))
            self.room.storage.put("never", 1)
            self.room.broadcast("never")
            raise ValueError("no \ud800")  # what cannot be stored as it is

        def on_error(self, connection, error):
            self.room.broadcast(f"{connection} {type(error).__name__}")

    async def script(house: House) -> None:
        await house.tell(1)
        await trio.sleep(61.9)
        assert [at for at, *_ in runs] == [0, 2, 6, 14, 30]
        assert (house.alarms.counts()["alarms"], house.alarms.counts()["failed_alarms"]) == (1, 0)
        await trio.sleep(1000)
        assert [at for at, *_ in runs] == [0, 2, 6, 14, 30, 62]
        assert [attempt for _, attempt, _ in runs] == [1, 2, 3, 4, 5, 6]
        assert {reason for _, _, reason in runs} == {"", "ValueError: no ?"}
        assert house.sent == ["None ValueError"] * 6
        assert house.read("main/r", "never") is None
        assert (house.alarms.counts()["alarms"], house.alarms.counts()["failed_alarms"]) == (0, 1)
        [shown] = house.alarms.explain("main/r")["alarms"]
        assert (shown["failed"], shown["failures"], shown["reason"]) == (True, 6, "ValueError: no ?")
        assert log[-1] == "an alarm has failed for good"

    play(tmp_path, script, Main)


@pytest.mark.parametrize("what", ["set", "delete", "delete_all", "raise"])
def test_what_on_error_makes_of_the_alarm_counts(tmp_path, what):
    runs = []

    class Main(Server):
        def on_message(self, message):
            self.room.storage.set_alarm(0)

        def on_alarm(self, alarm):
            runs.append((round(now()), alarm.attempt))
            if len(runs) < 3:
                raise ValueError("no")

        async def on_error(self, connection, error):
            if what == "set":
                self.room.storage.set_alarm(10)
            elif what == "delete":
                assert await self.room.storage.delete_alarm()
            elif what == "delete_all":
                self.room.storage.delete_all()
            else:
                self.room.storage.delete_alarm()
                raise KeyError("no, too")

    async def script(house: House) -> None:
        await house.tell(1)
        await trio.sleep(100)
        expected = {"set": [(0, 1), (10, 1), (20, 1)], "raise": [(0, 1), (2, 2), (6, 3)]}
        assert runs == expected.get(what, [(0, 1)])
        assert house.alarms.counts()["alarms"] == 0

    play(tmp_path, script, Main)


def test_one_that_takes_too_long_counts_as_failed(tmp_path):
    """S20."""
    runs = []

    class Main(Server):
        turn_timeout = 5
        alarm_tries = 2

        def on_message(self, message):
            self.room.storage.set_alarm(0)

        async def on_alarm(self, alarm):
            runs.append(round(now()))
            await trio.sleep_forever()

    async def script(house: House) -> None:
        await house.tell(1)
        await trio.sleep(100)
        assert runs == [0, 7]
        [alarm] = house.alarms.explain("main/r")["alarms"]
        assert alarm["failed"] and "on_alarm took longer than 5 s" in alarm["reason"]

    play(tmp_path, script, Main)


def test_in_its_turn_it_is_no_more_and_what_is_set_again_stays(tmp_path):
    seen: list[Any] = []

    class Main(Server):
        def on_message(self, message):
            self.room.storage.set_alarm(1, "a", 1)
            self.room.storage.set_alarm(5, "b")

        async def on_alarm(self, alarm):
            storage = self.room.storage
            seen.append(
                (await storage.get_alarm(alarm.name), [each.name for each in await storage.list_alarms()])
            )
            if alarm.payload == 1:
                storage.set_alarm(1, "a", 2)
                again = await storage.get_alarm("a")
                assert again is not None
                seen.append((again.payload, again.attempt, await storage.delete_alarm("never")))

    async def script(house: House) -> None:
        await house.tell(1)
        await trio.sleep(10)
        assert seen == [(None, ["b"]), (2, 1, False), (None, ["b"]), (None, [])]

    play(tmp_path, script, Main)


@pytest.mark.parametrize("is_on_disk", [True, False])
def test_what_another_turn_has_set_anew_meanwhile_outlives_the_alarm_s_end(tmp_path, is_on_disk):
    """S29: whether that is on disk or not when the alarm's turn ends."""
    runs = []

    class Main(Server):
        concurrency = "interleave"

        def on_message(self, message):
            self.room.storage.set_alarm(message, "a", message)

        async def on_alarm(self, alarm):
            runs.append((alarm.payload, round(now())))
            await trio.sleep(5)

    async def script(house: House) -> None:
        await house.tell(1)
        await trio.sleep(3)
        assert runs == [(1, 1)]
        end_round = house.commits.end_round
        if not is_on_disk:
            house.pool._flush = lambda: None
        await house.tell(20)
        assert (house.pool.cells["main/r"].gate == 0) is is_on_disk
        await trio.sleep(5)
        house.pool._flush = end_round
        house.commits.end_round()
        await trio.sleep(100)
        assert runs == [(1, 1), (20, 23)]
        assert house.alarms.counts()["alarms"] == 0

    play(tmp_path, script, Main)


def test_a_later_turn_reads_what_is_not_on_disk_and_an_earlier_one_may_take_it_back(tmp_path):
    """An alarm that was given out and then deleted, or set anew, by the turn before is not run."""
    seen: list[Any] = []

    class Main(Server):
        async def on_message(self, message):
            storage = self.room.storage
            if message == "set":
                for name in "abc":
                    storage.set_alarm(10, name, 1)
            elif message == "read":
                seen.append([(each.name, each.payload) for each in await storage.list_alarms()])
            elif message == "busy":
                await trio.sleep(10)
                storage.delete_alarm("a")
                storage.set_alarm(5, "b", 2)

        def on_alarm(self, alarm):
            seen.append((alarm.name, alarm.payload, round(now())))

    async def script(house: House) -> None:
        end_round, house.commits.end_round = house.commits.end_round, lambda: None  # type: ignore[method-assign]
        house.pool._flush = house.commits.end_round
        await house.tell("set")
        await house.tell("read")
        assert seen.pop() == [("a", 1), ("b", 1), ("c", 1)]
        house.commits.end_round = house.pool._flush = end_round  # type: ignore[method-assign]
        await trio.sleep(5)
        await house.tell("busy")
        await trio.sleep(100)
        assert seen == [("c", 1, 15), ("b", 2, 20)]

    play(tmp_path, script, Main)


def test_a_clock_that_is_set_forward_fires_and_one_that_is_set_back_never_does_early(tmp_path):
    """S29: once each."""
    runs = []

    class Main(Server):
        async def on_message(self, message):
            if message == "busy":
                await trio.sleep(3)
            else:
                self.room.storage.set_alarm(message, f"{message}")

        def on_alarm(self, alarm):
            runs.append(alarm.name)
            assert wall() >= alarm.scheduled_at.timestamp()

    async def script(house: House) -> None:
        await house.tell(1000)
        await house.tell(5000)
        await trio.sleep(1)
        jump[0] = 2000.0
        await trio.sleep(1.1)
        assert runs == ["1000"]
        jump[0] = -2000.0
        await trio.sleep(3000)
        assert runs == ["1000"]
        # Given out, and not due any more when its turn comes.
        await house.tell(10)
        await trio.sleep(9)
        await house.tell("busy")
        await trio.sleep(2)
        jump[0] -= 100
        await trio.sleep(50)
        assert runs == ["1000"]
        await trio.sleep(60)
        assert runs == ["1000", "10"]
        assert house.alarms.counts()["alarms"] == 1

    play(tmp_path, script, Main)


def test_a_room_that_does_not_start_keeps_its_alarms(tmp_path):
    """S4: others go on; it is released, and they run."""
    runs: list[tuple[str, str]] = []
    broken = [True]

    class Main(Server):
        start_tries = 2

        def on_start(self):
            if self.room.id == "bad" and broken[0] and runs:
                raise ValueError("no")

        def on_message(self, message):
            self.room.storage.set_alarm(10, "a")
            self.room.storage.set_alarm(11, "b")

        def on_alarm(self, alarm):
            runs.append((self.room.id, alarm.name))

    async def script(house: House) -> None:
        house.pool.on_quarantine = lambda cell, _reason: house.alarms.held(cell)
        await house.tell(1, "main/bad")
        runs.append(("", ""))
        await trio.sleep(5)
        await house.tell(1, "main/good")
        await trio.sleep(100)
        assert runs[1:] == [("good", "a"), ("good", "b")]
        assert list(house.pool.quarantined) == ["main/bad"]
        broken[0] = False
        house.pool.release("main/bad")
        house.alarms.released("main/bad")
        await trio.sleep(1)
        assert runs[3:] == [("bad", "a"), ("bad", "b")]

    play(tmp_path, script, Main)


def test_alarms_wait_for_code_that_has_the_hook(tmp_path, log):
    """S2: the room is not made for them; and without the hook none is set."""
    done: list[str] = []

    def main(*, has_hook: bool) -> type[Server]:
        class Main(Server):
            async def on_message(self, message):
                if has_hook:
                    self.room.storage.set_alarm(5, "a")
                    return
                with pytest.raises(HookError, match=r"Main.on_alarm: set_alarm was called"):
                    self.room.storage.set_alarm(1)
                done.append(f"{[each.name for each in await self.room.storage.list_alarms()]}")

            if has_hook:

                def on_alarm(self, alarm):
                    done.append(alarm.name)

        return Main

    async def sets(house: House) -> None:
        await house.tell(1)

    async def waits(house: House) -> None:
        await trio.sleep(100)
        assert house.pool.wakes == 0
        assert log == ["alarms are due and wait for code that has the hook"]
        await house.tell(1)

    async def runs(house: House) -> None:
        jump[0] += 100
        await trio.sleep(2)

    play(tmp_path, sets, main(has_hook=True))
    play(tmp_path, waits, main(has_hook=False))
    play(tmp_path, runs, main(has_hook=True))
    assert done == ["['a']", "a"]


def test_limits_stand_where_they_are_said(tmp_path):
    """At one below, at, one above: how many, the name, the payload. Nothing changes at a refusal."""
    done = []

    class Main(Server):
        alarms_max = 3
        alarm_payload_bytes_max = 20

        async def on_message(self, message):
            storage = self.room.storage
            if message == 1:
                storage.set_alarm(1000, "a")
                storage.set_alarm(1000, "b", "x" * 18)  # 19 bytes of CBOR
                storage.set_alarm(1000, "b", "x" * 19)
                with pytest.raises(StorageLimitError, match="alarm payload"):
                    storage.set_alarm(1, "b", "x" * 20)
                with pytest.raises(StorageLimitError, match="alarm's name"):
                    storage.set_alarm(1, "n" * 257)
                with pytest.raises(ValueEncodingError, match="alarm payload"):
                    storage.set_alarm(1, "b", object())
                kept = await storage.get_alarm("b")
                assert kept is not None and kept.payload == "x" * 19
            storage.set_alarm(1000, "n" * 256)
            storage.set_alarm(1000, "a", "again")
            with pytest.raises(
                LimitExceeded, match="the room's alarms: 4 alarms, and at most 3 are allowed; delete"
            ):
                storage.set_alarm(1000, "d")
            assert {each.name for each in await storage.list_alarms()} == {"a", "b", "n" * 256}
            if message == 2:
                storage.delete_alarm("b")
                storage.set_alarm(1000, "d")
                storage.delete_all()
                assert await storage.list_alarms() == []
                for name in "xyz":
                    storage.set_alarm(1000, name)
                with pytest.raises(LimitExceeded):
                    storage.set_alarm(1000, "w")
            done.append(message)

        def on_alarm(self): ...

    async def script(house: House) -> None:
        await house.tell(1)
        await house.tell(2)
        assert done == [1, 2]
        assert sorted(house.read_alarms("main/r")) == ["x", "y", "z"]

    play(tmp_path, script, Main)


def test_outside_of_a_turn_nothing_is_set(tmp_path):
    kept = []

    class Main(Server):
        def on_message(self, message):
            kept.append(self.room.storage)

        def on_alarm(self): ...

    async def script(house: House) -> None:
        await house.tell(1)
        with pytest.raises(RoomGone):
            kept[0].set_alarm(1)
        with pytest.raises(RoomGone):
            kept[0].delete_alarm()

    play(tmp_path, script, Main)


def test_points_in_time(monkeypatch):
    """Never early: fractions of a millisecond are rounded up."""
    monkeypatch.setattr(hibernation.wall_clock, "now", lambda: 1000.0005)
    assert when_ms(0) == 1_000_001
    assert when_ms(1) == 1_001_001
    assert when_ms(0.25) == 1_000_251
    assert when_ms(-1) == 999_001
    assert when_ms(timedelta(seconds=2, microseconds=1)) == 1_002_001
    assert when_ms(datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC)) == 1001
    assert when_ms(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)) == 1000
    assert when_ms(datetime(1, 1, 1, tzinfo=UTC)) == -62_135_596_800_000
    for wrong in (datetime(2026, 1, 1), float("nan"), float("inf"), 1e15, -1e15, timedelta.max):
        with pytest.raises(ValueError, match=r"no time zone|finite number|years 1 to 9999"):
            when_ms(wrong)
    for no_time in (True, "1", None, b"1"):
        with pytest.raises(TypeError, match="when is a datetime with a time zone"):
            when_ms(no_time)


def test_an_alarm_shows_itself():
    alarm = Alarm(AlarmRow("a", 1, 2000, 1000, None, 6, 1, "ValueError: no"))
    assert repr(alarm) == "<Alarm 'a' at 1970-01-01T00:00:01+00:00, attempt 6>"
    assert (alarm.failed, alarm.reason, alarm.payload) == (True, "ValueError: no", None)
    assert alarm.due_at - alarm.scheduled_at == timedelta(seconds=1)


def test_what_a_turn_has_released_early_takes_not_its_alarm_along(tmp_path):
    """S20, S29: the deletion stays with the rest of the turn, unless the alarm was set again before."""
    made: list[Room] = []

    class Main(Server):
        def on_message(self, message):
            made.append(self.room)

        def on_alarm(self): ...

    async def script(house: House) -> None:
        await house.tell(1)
        row = AlarmRow("a", 1, 0, 0, None)
        for again in (None, row):
            turn = Turn(made[0])
            turn.alarm = "a"
            turn.set_alarm("a", again)
            turn.set_alarm("b", None)
            part = turn.split()
            assert part.alarms == ({"b": None} if again is None else {"a": row, "b": None})
            assert turn.alarms == ({"a": None} if again is None else None)
            assert (turn.alarm, turn.stored) == ("a", again is None)

    play(tmp_path, script, Main)
