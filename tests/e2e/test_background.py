"""Background work in the running broker: a participant that streams its answer while the chat goes on, and
what becomes of it when processes are replaced or die (S7, S20, S32).
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient

pytestmark = pytest.mark.e2e

APP = """
    import trio
    from pathlib import Path
    from broker import Server

    FOLDER = Path(__file__).parent

    async def gone(name):
        while (FOLDER / name).exists():
            await trio.sleep(0.01)

    class Main(Server):
        '''A chat with a stand-in for a model, which says a word each time somebody nods.'''

        outbox_bytes_max = 16 << 20  # more than a whole flood: the slow one is the gateway, not the client

        def __init__(self, room):
            self.nods = trio.Semaphore(0)

        async def on_message(self, message, sender):
            what, _, rest = message.partition(" ")
            match what:
                case "ask":
                    asked = await self.room.storage.get("asked", 0) + 1
                    self.room.storage.put("asked", asked)
                    self.room.start_soon(self.answer, rest.split(), asked)
                    sender.send(f"asked {asked}")
                case "nod":
                    self.nods.release()
                case "say":
                    self.room.broadcast(rest)
                case "flood":
                    self.room.start_soon(self.flood, int(rest))
                case "fail":
                    self.room.start_soon(self.fail, sender.id)
                case "fail-plain":
                    self.room.start_soon(self.fail_at_once)
                case "refused":
                    self.room.start_soon(self.answer, ["never"], 0)
                    raise RuntimeError("this turn fails")
                case "part":
                    sender.send("first")
                    self.room.storage.put("part", 1)
                    await self.room.flush()
                    sender.send("second")
                    self.room.storage.put("part", 2)
                    await gone("hold")
                    raise RuntimeError("so only the first part counts")
                case "stored":
                    sender.send(await self.room.storage.list())
                case "sleep":
                    self.room.start_soon(self.never_ending)

        async def answer(self, words, number):
            for word in words:
                await self.nods.acquire()
                self.room.broadcast(f"model: {word}")
                self.room.storage.put(f"answer {number}", word)
                await self.room.flush()
            count = await self.room.count_connections()
            self.room.broadcast(f"model: that was all, for {count}")

        async def flood(self, count):
            (FOLDER / "flooded").touch()
            await gone("hold")
            for number in range(count):
                self.room.broadcast(f"{number} " + "x" * 200_000)
                await self.room.flush()
                with open(FOLDER / "flooded", "a") as flooded:
                    flooded.write(".")  # one for each flush

        async def fail(self, name):
            self.room.storage.put("fail", "flushed")
            await self.room.flush()
            self.room.storage.put("fail", "not flushed")
            connection = await self.room.get_connection(name)
            connection.send("not sent")
            await trio.sleep(0)
            raise RuntimeError("work fails")

        def fail_at_once(self):
            raise RuntimeError("plain work fails")

        async def never_ending(self):
            try:
                self.room.storage.put("sleep", "flushed")
                self.room.broadcast("asleep")
                await self.room.flush()
                self.room.storage.put("sleep", "not flushed")
                await trio.sleep_forever()
            finally:
                (FOLDER / "cleaned").write_text("yes")

        def on_error(self, connection, error):
            self.room.broadcast(f"error {connection} {error}")
"""


@pytest.fixture(scope="module")
def site(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, drain=4, hang_timeout=60)


def heard(client: RawClient, *texts: str) -> None:
    for text in texts:
        assert client.receive() == text


def stored(client: RawClient) -> dict[str, object]:
    client.send("stored")
    found: dict[str, object] = json.loads(client.receive())
    return found


def test_a_participant_streams_its_answer_while_the_chat_goes_on(site: BrokerProcess) -> None:
    """S7, S19: turns run beside it, in the same object, which is there until the work has ended."""

    def reasons() -> list[str]:
        return list(site.ask("explain", party="main", room="chat")["reasons"])

    with site.connect("/party/chat") as one, site.connect("/party/chat") as two:
        one.send("ask streamed word")
        heard(one, "asked 1")
        two.send("say meanwhile")
        for client in (one, two):
            heard(client, "meanwhile")
        facts = site.ask("explain", party="main", room="chat")
        assert facts["awake"] is True
        # Its turn may still be ending when what that has sent is here.
        eventually(lambda: len(reasons()) == 1, "no reason but the background work")
        [reason] = reasons()
        assert "background work Main.answer has been running for" in reason
        assert f"{site.app_file}:" in reason
        two.send("nod")
        for client in (one, two):
            heard(client, "model: streamed")
        one.send("say on")
        for client in (one, two):
            heard(client, "on")
        two.send("nod")
        for client in (one, two):
            heard(client, "model: word", "model: that was all, for 2")
        eventually(lambda: site.stats()["awake"] == 0, "the room to go")
        assert stored(one) == {"asked": 1, "answer 1": "word"}


def test_it_survives_the_death_of_the_gateway_and_an_upgrade(site: BrokerProcess) -> None:
    """S7, S33, S34: its flushes wait for the next gateway; every word comes once, in order."""
    with site.connect("/party/survives") as client:
        client.send("ask before between after last")
        heard(client, "asked 1")
        client.send("nod")
        heard(client, "model: before")
        [pid] = site.kill("gateway")
        client.send("nod")
        heard(client, "model: between")
        site.wait_for_gateway(without=pid)
        [pid] = site.kill("gateway")
        client.send("say chat goes on")
        heard(client, "chat goes on")
        site.wait_for_gateway(without=pid)
        status, said = site.command("upgrade")
        assert status == 0, said
        client.send("nod")
        heard(client, "model: after")
        client.send("nod")
        heard(client, "model: last", "model: that was all, for 1")
        assert stored(client) == {"asked": 1, "answer 1": "last"}
        eventually(lambda: site.stats()["awake"] == 0, "the room to go")


def test_it_ends_with_its_host_and_is_not_begun_again(site: BrokerProcess) -> None:
    """S22: the turn that began it is on disk, so no other host runs it again."""
    with site.connect("/party/dies") as client:
        client.send("ask one two")
        heard(client, "asked 1")
        client.send("nod")
        heard(client, "model: one")
        site.kill_host()
        client.send("nod")
        assert stored(client) == {"asked": 1, "answer 1": "one"}
        eventually(lambda: site.stats()["awake"] == 0, "the room to go")
        assert client.is_silent()


def test_a_reload_lets_it_end_within_drain_and_cancels_what_does_not(site: BrokerProcess) -> None:
    """S32: meanwhile the rooms go on; what is not flushed is lost."""
    with site.connect("/party/reload") as client, site.connect("/party/other") as other:
        client.send("sleep")
        heard(client, "asleep")
        other.send("ask short")
        heard(other, "asked 1")
        before = site.host_pids()
        site.write_app(APP + "    # new\n")
        other.send("nod")
        status, said = site.command("reload")
        assert status == 0, said
        heard(other, "model: short", "model: that was all, for 1")
        cleaned = site.folder / "cleaned"
        eventually(lambda: cleaned.exists() and cleaned.read_text() == "yes", "its clean-up")
        assert site.host_pids() != before
        assert stored(client) == {"sleep": "flushed"}


def test_what_fails_is_dropped_and_told_to_on_error(site: BrokerProcess) -> None:
    """S20, S7: but for what was flushed; and a turn that fails begins nothing."""
    with site.connect("/party/fails") as client:
        client.send("fail")
        heard(client, "error None work fails")
        client.send("fail-plain")
        heard(client, "error None plain work fails")
        client.send("refused")
        assert str(client.receive()).endswith("this turn fails")
        client.send("nod")
        assert stored(client) == {"fail": "flushed"}
        assert client.is_silent()
    eventually(lambda: site.log_events("background work failed: Main.fail"), "it in the log")


def test_a_turn_that_flushes_has_done_that_part_and_runs_again_as_a_whole(site: BrokerProcess) -> None:
    """S20: what was flushed stays when the rest fails; and when the host dies before the end, it comes
    again.
    """
    hold = site.folder / "hold"
    hold.touch()
    with site.connect("/party/parts") as client:
        client.send("part")
        heard(client, "first")
        site.kill_host()
        heard(client, "first")
        hold.unlink()
        assert str(client.receive()).endswith("so only the first part counts")
        assert stored(client) == {"part": 1}


def test_a_flush_waits_for_a_gateway_that_does_not_read(site: BrokerProcess) -> None:
    """S20: at most about a mebibyte is on its way; then all of it comes, in order."""
    count = 30
    flooded: Path = site.folder / "flooded"
    hold = site.folder / "hold"
    hold.touch()
    with site.connect("/party/flood") as client:
        client.send("say here")
        heard(client, "here")
        gateway = site.gateway_pid()
        client.send(f"flood {count}")
        eventually(lambda: flooded.exists(), "the flood")
        os.kill(gateway, signal.SIGSTOP)
        try:
            hold.unlink()
            eventually(lambda: flooded.stat().st_size and _settled(flooded), "the flood to wait")
            assert flooded.stat().st_size < count
        finally:
            os.kill(gateway, signal.SIGCONT)
        numbers = [int(str(client.receive()).split()[0]) for _ in range(count)]
        assert numbers == list(range(count))


def _settled(path: Path) -> bool:
    """Whether a file has not been written for a second."""
    return time.time() - path.stat().st_mtime > 1
