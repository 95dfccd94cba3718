"""Ticks of crons: each once, and the last one that was missed (S31)."""

from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import hibernation.wall_clock
from broker import Server
from hibernation.cron import Schedule
from hibernation.crons import FUTURE_MS, Crons, Ticks, main_party, schedule_text
from hibernation.errors import SettingError
from hibernation.party import make_parties
from hibernation.pool import Pool
from hibernation.room import Lobby
from hibernation.settings import Settings
from storage.crons import CronRow
from storage.shards import Shard, ShardBatch

MINUTE = 60_000
HOUR = 60 * MINUTE
#: 1 January 2026, 12:00:30.
NOW = 1_767_268_830_000


def row(text: str, last_ms: int, name: str = "a") -> CronRow:
    return CronRow(name, schedule_text(Schedule.parse(text)), last_ms)


def ticks(text: str, last_ms: int | None, now_ms: int = NOW, late_ms: int = HOUR) -> Ticks:
    stored = {} if last_ms is None else {"a": row(text, last_ms)}
    return Ticks({"a": Schedule.parse(text)}, stored, now_ms, late_ms)


def test_a_tick_is_due_at_its_minute_and_once():
    each = ticks("* * * * *", None)
    assert each.fresh == [row("* * * * *", NOW)]
    assert each.due(NOW) == []
    assert each.next_ms == NOW + 30_000
    assert each.due(NOW + 29_999) == []
    assert each.due(NOW + 30_000) == [row("* * * * *", NOW + 30_000)]
    assert each.due(NOW + 30_000) == []
    assert each.next_ms == NOW + 30_000 + MINUTE


def test_of_what_was_missed_the_last_tick_is_run_if_it_is_not_too_late():
    """At the limit, and beyond it."""
    for down_ms in (0, MINUTE, HOUR, 30 * 24 * HOUR):
        each = ticks("* * * * *", NOW - 30_000 - down_ms)
        expected = [row("* * * * *", NOW - 30_000)] if down_ms else []
        assert each.due(NOW) == expected
        assert each.due(NOW) == []
    noon = NOW - 30_000
    for now_ms, run in ((noon + HOUR - 1, True), (noon + HOUR, True), (noon + HOUR + 1, False)):
        each = ticks("0 12 * * *", noon - 5 * HOUR, now_ms)
        assert each.due(now_ms) == ([row("0 12 * * *", noon)] if run else [])
        assert each.next_ms == noon + 24 * HOUR


def test_one_that_is_new_or_has_another_expression_begins_now():
    schedules = {"a": Schedule.parse("* * * * *"), "b": Schedule.parse("* * * * *")}
    stored = {"a": row("*/2 * * * *", NOW - HOUR), "gone": row("* * * * *", 0, "gone")}
    each = Ticks(schedules, stored, NOW, HOUR)
    assert each.due(NOW) == []
    assert each.fresh == [row("* * * * *", NOW), row("* * * * *", NOW, "b")]


def test_a_clock_that_is_set_back_repeats_no_tick_and_stops_none_for_ever():
    for last_ms, begins_anew in ((NOW + FUTURE_MS, False), (NOW + FUTURE_MS + 1, True)):
        each = ticks("* * * * *", last_ms)
        assert each.due(NOW + MINUTE) == ([row("* * * * *", NOW + MINUTE - 30_000)] if begins_anew else [])
    each = ticks("* * * * *", NOW)
    assert each.due(NOW + MINUTE)
    assert each.due(NOW + MINUTE - FUTURE_MS) == []
    assert each.next_ms == NOW + 30_000 + MINUTE
    assert each.due(NOW - FUTURE_MS - 1) == []
    assert each.next_ms == NOW + 30_000 - FUTURE_MS


# --- The host's side, on a virtual clock, with a real shard ---------------------------------------------


class Disk:
    """Commits as they are asked for, or dies before."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.dies = False
        self.waiting: list[Any] = []

    def claim_tick(self, index: int, claimed: CronRow, action: Any) -> None:
        assert index == 0
        self.waiting.append((claimed, action))

    def flush(self) -> None:
        if self.dies:
            return
        waiting, self.waiting = self.waiting, []
        batch = ShardBatch()
        batch.crons.update({claimed.name: claimed for claimed, _ in waiting})
        self.shard.commit(batch)
        for claimed, action in waiting:
            if action is not None:
                action(claimed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is trio's virtual one, from NOW on."""
    monkeypatch.setattr(hibernation.wall_clock, "now", lambda: NOW / 1000 + trio.current_time() - START[0])


START = [0.0]


def play(tmp_path: Any, cls: type[Server], script: Any, **settings: Any) -> list[str]:
    """Run the crons of a class beside the script."""
    base = Settings(**settings)
    failures: list[str] = []

    async def main() -> None:
        START[0] = trio.current_time()
        shard = Shard(tmp_path, 0, durability="os", reserve_bytes=0)
        disk = Disk(shard)
        none: Any = None
        pool = Pool(base, none, {}, wait=none, receive=none, flush=none, is_full=none, is_deserted=none)
        crons = Crons(
            main_party(make_parties([cls])),
            {0: shard},
            base,
            lambda: Lobby(None, "main", {"NAME": "value"}, none, none),
            pool,
            disk,  # type: ignore[arg-type]
            disk.flush,
            lambda text, _cell, error, **_: failures.append(f"{text}: {error}"),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crons.run)
            await script(crons, disk, pool)
            nursery.cancel_scope.cancel()
        shard.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return failures


def test_the_hook_is_called_with_its_tick_and_its_failures_are_counted(tmp_path, clock):
    calls = []

    class Main(Server):
        crons = {"each": "* * * * *", "other": "*/2 * * * *"}

        @staticmethod
        async def on_cron(cron, lobby):
            calls.append((cron.name, cron.scheduled_at.strftime("%H:%M"), lobby.id, lobby.env["NAME"]))
            await trio.sleep(1)
            if len(calls) == 1:
                raise ValueError("as expected")

    async def script(crons, disk, pool):
        crons.open()
        disk.flush()
        await trio.sleep(120)
        assert crons.counts() == {"cron_runs": 3, "cron_failures": 1}
        pool.retiring = True  # those of the next host, from now on
        await trio.sleep(120)

    assert play(tmp_path, Main, script) == ["on_cron failed: as expected"]
    assert sorted(call[:2] for call in calls) == [("each", "12:01"), ("each", "12:02"), ("other", "12:02")]
    assert calls[0][2:] == (None, "value")


def test_a_tick_is_recorded_before_it_is_run_and_not_run_by_the_next_host(tmp_path, clock):
    """Also if that finds a tick that was claimed, and whose commit never came."""
    calls = []

    class Main(Server):
        crons = {"each": "* * * * *"}

        @staticmethod
        def on_cron(cron):
            calls.append(cron.scheduled_at.strftime("%H:%M"))

    async def script(crons, disk, pool):
        crons.open()
        disk.flush()
        await trio.sleep(60)
        assert calls == ["12:01"]
        disk.dies = True
        await trio.sleep(60)
        assert calls == ["12:01"]  # claimed, and not on disk
        crons.close()
        disk.dies, disk.waiting = False, []
        await trio.sleep(10)
        crons.open()
        await trio.sleep(1)
        assert calls == ["12:01", "12:02"]
        crons.close()
        crons.open()
        await trio.sleep(1)
        assert calls == ["12:01", "12:02"]

    play(tmp_path, Main, script)


def test_a_claim_that_waits_for_the_disk_while_gateways_change_is_run_once(tmp_path, clock):
    calls = []

    class Main(Server):
        crons = {"each": "* * * * *"}

        @staticmethod
        def on_cron(cron):
            calls.append(cron.scheduled_at.strftime("%H:%M"))

    async def script(crons, disk, pool):
        crons.open()
        disk.flush()
        disk.dies = True
        await trio.sleep(60)
        crons.close()
        crons.open()
        await trio.sleep(1)
        assert [claimed.last_ms for claimed, _ in disk.waiting] == [NOW + 30_000] * 2
        disk.dies = False
        disk.flush()
        await trio.sleep(1)
        assert calls == ["12:01"]
        await trio.sleep(60)
        assert calls == ["12:01", "12:02"]

    play(tmp_path, Main, script)


def test_a_hook_that_takes_too_long_is_cancelled_and_a_tick_meanwhile_left_out(tmp_path, clock):
    calls = []

    class Main(Server):
        turn_timeout = 90
        crons = {"each": "* * * * *"}

        @staticmethod
        async def on_cron(cron):
            calls.append(cron.scheduled_at.strftime("%H:%M"))
            await trio.sleep_forever()

    async def script(crons, disk, pool):
        crons.open()
        disk.flush()
        await trio.sleep(115)
        assert (calls, crons.busy) == (["12:01"], True)
        await trio.sleep(10)
        assert not crons.busy
        await trio.sleep(30)
        assert calls == ["12:01", "12:03"]

    [failure] = play(tmp_path, Main, script)
    assert "on_cron took longer than 90 s" in failure


# --- On a class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"crons": {"a": "61 * * * *"}}, "'a': '61 * * * *' is no cron expression: its minute '61'"),
        ({"crons": ["* * * * *"]}, "give names and expressions"),
        ({"crons": {"": "* * * * *"}}, "give names and expressions"),
        ({"crons": {"a": 5}}, "give names and expressions"),
        ({"cron_timezone": "Mars/Olympus"}, "give the name of a time zone"),
        ({"cron_timezone": "../etc/passwd"}, "give the name of a time zone"),
        ({"cron_timezone": None}, 'give a name such as "Europe/Berlin"'),
    ],
)
def test_what_cannot_be_run_is_refused_when_the_class_is_made(attributes, text):
    with pytest.raises(SettingError) as caught:
        type("Chat", (Server,), attributes)
    assert text in str(caught.value)
    assert "Chat.cron" in str(caught.value)


def test_crons_belong_to_the_main_party():
    crons = {"a": "* * * * *"}
    base = type("_Base", (Server,), {"crons": crons})
    main = type("Main", (base,), {})
    other = type("Other", (Server,), {"crons": crons})
    with pytest.raises(SettingError, match='only the main party has crons, and this is the party "other"'):
        make_parties([main, other])
    both = make_parties([main, type("Shares", (base,), {})])
    assert main_party(both) is both[0]
    assert both[0].crons["a"].next_after(datetime(2026, 1, 1, tzinfo=UTC)).minute == 1
    assert main_party([]) is None
