"""Alarms through the real command: rooms are woken when one is due, whatever has died in between (S29, S22).
And crons: each tick once, whoever has died (S31).

Rooms write what their alarms do into the file `journal`, so that tests know what was run, and in which order.
"""

import sqlite3
import time
from contextlib import closing
from typing import Any

import pytest

from hibernation import wire
from hibernation.admin import AdminError
from tests.e2e.broker_process import BrokerProcess, eventually, whole_lines
from tests.e2e.conftest import BrokerFactory

pytestmark = pytest.mark.e2e

APP = """
import json
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import trio

from broker import DeadLetter, Server

FOLDER = Path(__file__).parent


def note(*words):
    file = os.open(FOLDER / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, (" ".join(map(str, words)) + "\\n").encode())
    os.close(file)


class Main(Server):
    alarm_tries = 2
    crons = {"each": "* * * * *"}

    @staticmethod
    async def on_cron(cron, lobby):
        note("cron", cron.name, cron.scheduled_at.isoformat())

    async def on_message(self, message, sender):
        order = json.loads(message)
        storage = self.room.storage
        for name, seconds in order.get("set", {}).items():
            storage.set_alarm(seconds, name, order.get("payload"))
        for name, seconds in order.get("at", {}).items():
            storage.set_alarm(datetime.fromtimestamp(seconds, UTC), name)
        for name in order.get("delete", []):
            storage.delete_alarm(name)
        if order.get("raise"):
            raise ValueError("as ordered")
        sender.send([alarm.name for alarm in await storage.list_alarms()])

    async def on_alarm(self, alarm):
        early = alarm.scheduled_at.timestamp() > time.time()
        todo = alarm.payload
        while todo == "fail" and alarm.attempt > 1 and not (FOLDER / "again").exists():
            await trio.sleep(0.01)
        note("alarm", self.room.id, alarm.name, alarm.attempt)
        if todo == "fail":
            self.room.broadcast("never")
            raise ValueError("as ordered")
        if todo == "tick":
            count = await self.room.storage.get("count", 0) + 1
            self.room.storage.put("count", count)
            if count < 5:
                self.room.storage.set_alarm(0.05, alarm.name, "tick")
            self.room.broadcast(f"tick {count}")
            return
        if todo == "kill" and not (FOLDER / "mended").exists():
            self.room.storage.put("never", True)
            os.kill(os.getpid(), signal.SIGKILL)
        if todo == "kill once" and not (FOLDER / "once").exists():
            self.room.storage.put("never", True)
            (FOLDER / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while todo == "wait" and not (FOLDER / "go").exists():
            await trio.sleep(0.01)
        runs = await self.room.storage.get("runs", 0) + 1
        self.room.storage.put("runs", runs)
        self.room.broadcast({"alarm": alarm.name, "early": early, "payload": todo, "runs": runs})

    def on_error(self, connection, error):
        note("error", self.room.id, connection, type(error).__name__, isinstance(error, DeadLetter))
"""


@pytest.fixture(scope="module")
def site(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP)


def journal(broker: BrokerProcess, *words: str) -> list[str]:
    """The lines that begin with these words, without them."""
    file = broker.folder / "journal"
    lines = whole_lines(file)
    start = " ".join(words) + " "
    return [line.removeprefix(start) for line in lines if line.startswith(start)]


def test_an_alarm_wakes_a_cold_room_and_sends_to_its_connections(site):
    with site.connect("/party/cold") as client:
        client.send('{"set": {"a": 0.2}, "payload": {"x": [1, 2]}}')
        assert client.receive() == '["a"]'
        assert client.receive() == '{"alarm":"a","early":false,"payload":{"x":[1,2]},"runs":1}'
        client.send("{}")
        assert client.receive() == "[]"


def test_alarms_of_a_turn_that_fails_are_not_set(site):
    """S20: nor deleted."""
    with site.connect("/party/atomic") as client:
        client.send('{"set": {"kept": 1000}}')
        assert client.receive() == '["kept"]'
        client.send('{"set": {"never": 0}, "delete": ["kept"], "raise": true}')
        client.send("{}")
        assert client.receive() == '["kept"]'
        client.send('{"delete": ["kept"]}')
        assert client.receive() == "[]"
    assert journal(site, "alarm", "atomic") == []


def test_an_alarm_that_sets_itself_again_goes_on(site):
    """Its deletion at the end of the turn does not take the new one away; each tick is once."""
    with site.connect("/party/ticking") as client:
        client.send('{"set": {"t": 0}, "payload": "tick"}')
        assert client.receive() == '["t"]'
        assert [client.receive() for _ in range(5)] == [f"tick {number}" for number in range(1, 6)]
        client.send("{}")
        assert client.receive() == "[]"
    assert journal(site, "alarm", "ticking") == ["t 1"] * 5


def test_an_alarm_that_fails_is_tried_again_and_then_kept_as_failed(site):
    """S29: nothing of its turns leaves; it is shown, and can be set anew or deleted."""

    def shown() -> dict[str, Any]:
        [alarm] = site.ask("explain", room="failing")["alarms"]
        return dict(alarm)

    with site.connect("/party/failing") as client:
        client.send('{"set": {"f": 0}, "payload": "fail"}')
        assert client.receive() == '["f"]'
        eventually(lambda: shown()["failures"], "the first failure")
        alarm = shown()
        assert not alarm["failed"]  # the second run, whether it has begun or not, does not end yet
        assert 1.4 < alarm["due_at"] - alarm["scheduled_at"] < 20
        site.kill_host()  # what is known of attempts is on disk
        (site.folder / "again").touch()
        eventually(lambda: site.stats()["failed_alarms"] == 1, "the last failure")
        assert journal(site, "alarm", "failing") == ["f 1", "f 2"]
        told = ["None ValueError False"] * 2
        eventually(lambda: journal(site, "error", "failing") == told, "on_error, twice")
        status, said = site.command("explain", "failing")
        assert status == 0 and "f: failed after 2 runs: ValueError: as ordered" in said, said
        client.send('{"set": {"f": 0}, "payload": "well"}')
        assert client.receive() == '["f"]'
        assert client.receive() == '{"alarm":"f","early":false,"payload":"well","runs":1}'
        eventually(lambda: site.stats()["failed_alarms"] == 0, "no failed alarm")


def test_a_host_that_is_killed_in_an_alarm_runs_it_again_and_its_effects_are_once(site):
    """S22: twice the hook, once the effects."""
    with site.connect("/party/killed") as client:
        client.send('{"set": {"k": 0}, "payload": "kill once"}')
        assert client.receive() == '["k"]'
        assert client.receive() == '{"alarm":"k","early":false,"payload":"kill once","runs":1}'
        client.send("{}")
        assert client.receive() == "[]"
    assert journal(site, "alarm", "killed") == ["k 1"] * 2


def test_an_alarm_that_ends_its_host_each_time_is_a_dead_letter(site):
    """S23: `on_error` is told once, others go on, and it can be run again."""
    with site.connect("/party/deadly") as client:
        client.send('{"set": {"k": 0}, "payload": "kill"}')
        assert client.receive() == '["k"]'
        [letter] = eventually(lambda: letters(site), "a dead letter", 60)
        assert (letter["event"], letter["room"], letter["connection"]) == ("alarm", "deadly", None)
        assert letter["tries"] == 3
        eventually(lambda: journal(site, "error", "deadly") == ["None DeadLetter True"], "on_error")
        assert journal(site, "alarm", "deadly") == ["k 1"] * 3
        client.send('{"set": {"other": 0}, "payload": "well"}')
        assert client.receive() == '["other"]'  # the dead one is no alarm any more
        assert client.receive() == '{"alarm":"other","early":false,"payload":"well","runs":1}'
        shown = site.ask("dead_letter", id=letter["id"])
        assert (shown["name"], shown["attempt"]) == ("k", 1)
        (site.folder / "mended").touch()
        assert site.ask("replay", id=letter["id"]) == {"replayed": 1}
        assert client.receive() == '{"alarm":"k","early":false,"payload":"kill","runs":2}'
        assert letters(site) == []
    (site.folder / "mended").unlink()


def letters(site: BrokerProcess) -> list[dict[str, Any]]:
    """The dead letters; none while the host is not there."""
    try:
        found: list[dict[str, Any]] = site.ask("dead_letters")["dead_letters"]
    except AdminError:
        return []
    return found


def test_an_alarm_that_runs_when_its_gateway_dies_runs_again(site):
    """S22, S34: the turn is cancelled and leaves nothing; the alarm is still there."""
    with site.connect("/party/waiting") as client:
        client.send('{"set": {"w": 0}, "payload": "wait"}')
        assert client.receive() == '["w"]'
        eventually(lambda: journal(site, "alarm", "waiting"), "its beginning")
        site.kill_gateway()
        (site.folder / "go").touch()
        assert client.receive() == '{"alarm":"w","early":false,"payload":"wait","runs":1}'
        client.send("{}")
        assert client.receive() == "[]"
    assert journal(site, "alarm", "waiting") == ["w 1"] * 2


def test_alarms_outlive_a_reload(site):
    """S32: those that have not begun are the next host's."""
    with site.connect("/party/reloaded") as client:
        client.send('{"set": {"x": 0.5}, "payload": "well"}')
        assert client.receive() == '["x"]'
        status, said = site.command("reload")
        assert status == 0, said
        assert client.receive() == '{"alarm":"x","early":false,"payload":"well","runs":1}'
    assert journal(site, "alarm", "reloaded") == ["x 1"]


def neighbours() -> tuple[str, str]:
    """Two rooms of one shard."""
    first, second = [n for n in map(str, range(100)) if wire.partition_of(f"main/{n}") % 4 == 1][:2]
    return first, second


def test_what_was_due_while_nobody_was_there_is_run_after_a_restart(broker):
    """S29, S31, S35: alarms in the order of their times; of crons the last tick, once, by one host of two."""
    site = broker(APP, hosts=2)
    first, second = neighbours()
    due = time.time() + 1000
    with site.connect(f"/party/{first}") as one, site.connect(f"/party/{second}") as other:
        for number in (3, 1, 4, 2, 0):
            client = (one, other)[number % 2]
            client.send(f'{{"at": {{"n{number}": {due + number / 1000}}}}}')
            client.receive()
    site.stop()
    assert journal(site, "alarm") == []
    before = journal(site, "cron", "each")
    # As if it had been stopped two minutes ago, and all became due while nobody was there.
    for shard in (site.data / "shards").glob("*.db"):
        with closing(sqlite3.connect(shard)) as connection, connection:
            connection.execute("UPDATE crons SET last_ms = last_ms - 120000")
            connection.execute(
                "UPDATE alarms SET due_ms = due_ms - 1010000, scheduled_ms = scheduled_ms - 1010000"
            )
    site.start()
    eventually(lambda: len(journal(site, "alarm")) == 5, "five alarms")
    order = [f"{(first, second)[number % 2]} n{number} 1" for number in range(5)]
    assert journal(site, "alarm") == order
    ticks = eventually(lambda: journal(site, "cron", "each")[len(before) :], "a cron")
    site.kill_host()
    ticks = journal(site, "cron", "each")[len(before) :]
    assert len(ticks) == len(set(ticks)) <= 2  # a minute may have passed
    assert site.stats()["cron_failures"] == 0
