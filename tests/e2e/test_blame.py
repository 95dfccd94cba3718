"""Events that end their host, and rooms that do not start: given up after their tries, while everything else
goes on and no socket closes (S4, S23).

Rooms write what they do into the file `journal`, before they do it, so that tests know what was tried, and
how often.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hibernation.admin import AdminError
from tests.e2e.broker_process import ROOT, BrokerProcess, eventually, whole_lines
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import PING, PONG, RawClient

pytestmark = pytest.mark.e2e

APP = """
import ctypes
import os
import signal
from pathlib import Path

import trio

from broker import DeadLetter, Server

FOLDER = Path(__file__).parent
STARTS = 1


def note(*words):
    file = os.open(FOLDER / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, (" ".join(map(str, words)) + "\\n").encode())
    os.close(file)


def obey(word):
    if word == "exit":
        os._exit(3)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "hang":
        while True:
            pass


class Main(Server):
    def __init__(self, room):
        if room.id.startswith("start-"):
            note("start", room.id)
            if not (FOLDER / "mended").exists():
                obey(room.id.removeprefix("start-"))

    def get_connection_tags(self, connection, ctx):
        if connection.id.startswith("connect-"):
            note("connect", connection.id)
            obey(connection.id.removeprefix("connect-"))
        return []

    async def on_message(self, message, sender):
        note("message", sender.id, message)
        if not (FOLDER / "mended").exists():
            obey(message)
        if message == "wait":
            await trio.sleep(0.3)
        await self.room.storage.put("last", message)
        sender.send(message)

    def on_close(self, connection, code, reason, was_clean):
        note("close", connection.id)
        if connection.id.startswith("close-"):
            obey(connection.id.removeprefix("close-"))

    def on_error(self, connection, error):
        note("error", connection.id, type(error).__name__, isinstance(error, DeadLetter) and error.tries)
        connection.send("given up")

    async def on_request(self, request):
        return "here"
"""


class Site:
    """A broker with rooms that end their host on demand."""

    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker
        self.clients: list[RawClient] = []

    def journal(self, *start: str) -> list[str]:
        """The lines that begin with these words, without them."""
        file = self.broker.folder / "journal"
        lines = whole_lines(file)
        words = " ".join(start) + " "
        return [line.removeprefix(words) for line in lines if line.startswith(words)]

    def connect(self, name: str, room: str = "r") -> RawClient:
        client = self.broker.connect(f"/party/{room}?_pk={name}")
        self.clients.append(client)
        return client

    def letters(self) -> list[dict[str, Any]]:
        """The dead letters; none while the host is not there."""
        try:
            found: list[dict[str, Any]] = self.broker.ask("dead_letters")["dead_letters"]
        except AdminError:
            return []
        return found

    def tried(self, times: int, *words: str) -> None:
        """Wait until this line stands in the journal so often."""
        eventually(lambda: self.journal(*words[:-1]).count(words[-1]) == times, f"{words}, {times} times")

    def named_by_watchdog(self, times: int) -> None:
        """Wait until the log has named a blocked handler so often. A whole process that gets no time for a
        while is named, too, with another stack.
        """
        event = "a handler blocks its host: all of the host's rooms wait for it"

        def named() -> list[dict[str, Any]]:
            return [each for each in self.broker.log_events(event) if "in obey" in each["stack"]]

        eventually(lambda: len(named()) == times, event)

    def kill_the_hanging(self) -> None:
        """Kill the host, as the supervisor does with one that does not answer, and wait for its end."""
        [pid] = eventually(self.broker.host_pids, "a host")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid not in self.broker.host_pids(), "its end")

    def command(self, *words: str) -> Any:
        """What the command line prints, with --json; asked again for a host that had no time to answer."""
        done = self._run(*words)
        if "the host does not answer" in done.stderr and words[1] not in ("replay", "delete"):
            done = self._run(*words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fails(self, *words: str) -> tuple[int, str]:
        """The status and the words of a command that fails."""
        done = self._run(*words)
        assert done.returncode != 0, done.stdout
        return done.returncode, done.stderr

    def _run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-P", "-m", "broker", *words, "--data", str(self.broker.data), "--json"]
        return subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False
        )


@pytest.fixture
def site(broker: BrokerFactory) -> Iterator[Site]:
    site = Site(broker(APP, hang_timeout=60))  # whoever is slow is not killed for it
    try:
        yield site
    finally:
        for client in site.clients:
            client.close()
    assert "could not be carried out" not in site.broker.log


def said_before(*clients: RawClient) -> None:
    """Their connect turns have ended, so that at a death to come they are not in progress."""
    for client in clients:
        client.send("before")
        assert client.receive() == "before"


def assert_open(client: RawClient) -> None:
    assert client.is_silent()
    client.send_frame(PING, b"open?")
    assert client.receive_frame() == (PONG, b"open?")


@pytest.mark.parametrize("way", ["exit", "kill", "segfault"])
def test_a_message_that_ends_its_host_is_given_up_after_three_tries(site: Site, way: str) -> None:
    """S23: and nothing else is lost, doubled or out of order, of its connection, its room, and others."""
    poison, beside, elsewhere = site.connect("p"), site.connect("b"), site.connect("e", "other")
    clients = {"p": poison, "b": beside, "e": elsewhere}
    said_before(*clients.values())
    for number in range(5):
        for client in clients.values():
            client.send(f"{number}")
    poison.send(way)
    for number in range(5, 10):
        for client in clients.values():
            client.send(f"{number}")
    assert [poison.receive() for _ in range(11)] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "given up",
        *map(str, range(5, 10)),
    ]
    for client in (beside, elsewhere):
        assert [client.receive() for _ in range(10)] == [str(number) for number in range(10)]
    # Once more, where a turn of the other room was in progress at the first death: neither is to blame yet.
    assert 3 <= site.journal("message", "p").count(way) <= 4
    assert site.journal("error", "p") == ["DeadLetter 3"]
    for client in clients.values():
        assert_open(client)
    [letter] = eventually(site.letters, "a dead letter")
    assert (letter["room"], letter["connection"], letter["tries"]) == ("r", "p", 3)
    assert site.broker.stats()["dead_letters"] == 1
    assert site.broker.stats()["closes"] == {}


def test_the_commands_list_show_replay_and_delete_dead_letters(site: Site) -> None:
    """S23: a replayed event runs as a turn of its room, once more."""
    client = site.connect("p")
    client.send("exit")
    assert client.receive() == "given up"
    [letter] = eventually(lambda: site.command("dead-letters", "list"), "a dead letter")
    assert letter["event"] == "message" and letter["party"] == "main"
    shown = site.command("dead-letters", "show", letter["id"])
    assert (shown["data"], shown["connection"]) == ("exit", "p")
    # Run again it ends its host again, and nothing is repeated by itself.
    before = site.broker.stats()["hosts"]
    code, text = site.fails("dead-letters", "replay", letter["id"])
    assert (code, text) == (1, "Error: the host has died meanwhile\n")
    site.broker.wait_for_hosts(1, without=before)
    assert site.journal("message", "p").count("exit") == 4
    client.send("still there")
    assert client.receive() == "still there"
    (site.broker.folder / "mended").touch()
    assert site.command("dead-letters", "replay", letter["id"]) == {"replayed": 1}
    assert client.receive() == "exit"  # it is answered, late
    assert site.letters() == []
    assert "no dead letter" in site.fails("dead-letters", "replay", letter["id"])[1]
    assert "no dead letter" in site.fails("dead-letters", "show", "9.1")[1]
    (site.broker.folder / "mended").unlink()
    client.send("exit")
    assert client.receive() == "given up"
    [second] = eventually(site.letters, "a dead letter")
    client.close()
    eventually(lambda: not site.broker.connections(), "the client's end")
    (site.broker.folder / "mended").touch()
    missed = site.broker.stats()["missed_sends"]
    site.command("dead-letters", "replay", second["id"])
    eventually(lambda: site.broker.stats()["missed_sends"] == missed + 1, "the send to nobody")


def test_a_dead_letter_is_deleted(site: Site) -> None:
    """S23."""
    client = site.connect("p")
    client.send("exit")
    assert client.receive() == "given up"
    [letter] = eventually(site.letters, "a dead letter")
    assert site.command("dead-letters", "delete", letter["id"]) == {"deleted": 1}
    assert site.letters() == []


@pytest.mark.parametrize("where", ["connect", "close"])
def test_connect_and_close_turns_that_end_their_host(site: Site, where: str) -> None:
    """S23: a connect turn fails, with 1011; a close turn counts as done."""
    other = site.connect("o")
    client = site.connect(f"{where}-exit")
    if where == "connect":
        assert client.receive() == "given up"
        assert client.expect_close() == (1011, "")
    client.send_close()
    if where == "close":
        client.expect_close()
        client.close()
    eventually(lambda: len(site.letters()) == 1, "a dead letter")
    eventually(lambda: len(site.broker.connections()) == 1, "the end of the connection")
    assert site.letters()[0]["event"] == where
    assert len(site.journal(where, f"{where}-exit")) == 0
    assert site.journal(where).count(f"{where}-exit") == 3
    other.send("on")
    assert other.receive() == "on"
    site.broker.kill_host()
    assert_open(other)
    assert site.journal(where).count(f"{where}-exit") == 3


def test_several_rooms_are_busy_at_each_death(site: Site) -> None:
    """S23: only the one that was alone is blamed; those that waited beside it are run once more, in order."""
    clients = [site.connect(f"c{number}", f"r{number}") for number in range(6)]
    poison = site.connect("p", "poison")
    for number in range(3):
        for client in clients:
            client.send("wait")
            client.send(f"{number}")
    eventually(lambda: len(site.journal("message")) >= 6, "all rooms are busy")
    poison.send("kill")
    poison.send("after")
    assert [poison.receive(), poison.receive()] == ["given up", "after"]
    for client in clients:
        assert [client.receive() for _ in range(6)] == ["wait", "0", "wait", "1", "wait", "2"]
        assert_open(client)
    [letter] = eventually(site.letters, "a dead letter")
    assert letter["connection"] == "p"
    assert 3 <= site.journal("message", "p").count("kill") <= 4


def test_a_handler_that_never_ends_blocks_its_host_until_it_is_killed(site: Site) -> None:
    """S23: the log names it, and the dead letter says what it did."""
    poison, other = site.connect("p"), site.connect("o", "other")
    said_before(poison, other)
    poison.send("hang")
    other.send("after")
    for tries in (1, 2, 3):
        site.tried(tries, "message", "p", "hang")
        site.named_by_watchdog(tries)
        site.kill_the_hanging()
    assert poison.receive() == "given up"
    assert other.receive() == "after"
    [letter] = eventually(site.letters, "a dead letter")
    assert "blocked" in letter["reason"]


@pytest.mark.parametrize("where", ["message", "close"])
def test_the_supervisor_ends_what_hangs_and_it_is_given_up(broker: BrokerFactory, where: str) -> None:
    """S5, S23: nobody has to do anything."""
    # The watchdog, which says why, looks twice a second.
    site = Site(broker(APP, hang_timeout=3))
    with (
        site.connect("o", "other") as other,
        site.connect("close-hang" if where == "close" else "p") as client,
    ):
        said_before(other, client)
        if where == "message":
            client.send("hang")
            client.send("after")
        else:
            client.send_close()
            client.expect_close()
        other.send("beside")
        eventually(site.letters, "a dead letter", 60)
        assert other.receive() == "beside"
        if where == "message":
            assert [client.receive(), client.receive()] == ["given up", "after"]
        [letter] = eventually(site.letters, "a dead letter")
        assert (letter["event"], letter["tries"]) == (where, 3)
        assert "blocked" in letter["reason"]
        site.tried(3, *(("close", "close-hang") if where == "close" else ("message", "p", "hang")))
        eventually(lambda: len(site.broker.connections()) == (1 if where == "close" else 2), "connections")
        assert_open(other)


# Rooms that do not start


@pytest.mark.parametrize("way", ["exit", "hang"])
def test_a_room_whose_start_ends_its_host_is_quarantined(site: Site, way: str) -> None:
    """S4, S23: its socket stays, its messages wait; others go on; released it handles them."""
    other = site.connect("o", "other")
    said_before(other)
    client = site.connect("c", f"start-{way}")  # its connect turn waits for the start
    client.send("one")
    for tries in (1, 2, 3):
        if way == "hang":
            site.tried(tries, "start", f"start-{way}")
            site.kill_the_hanging()
    eventually(lambda: _quarantined(site) == 1, "quarantine")
    assert len(site.journal("start")) == 3
    other.send("on")
    assert other.receive() == "on"
    facts = site.command("explain", f"start-{way}")
    assert "3 times" in facts["quarantine"]["reason"]
    assert facts["connections"] == 1
    refused = RawClient(site.broker.port)
    site.clients.append(refused)
    answer = refused.handshake(f"/party/start-{way}", expect=503)
    assert answer.headers["retry-after"] == "30"
    # Another host, with the same code, does not try it either.
    site.broker.kill_host()
    eventually(lambda: _quarantined(site) == 1, "quarantine")
    assert len(site.journal("start")) == 3
    assert client.is_silent()
    (site.broker.folder / "mended").touch()
    assert site.command("explain", f"start-{way}", "--release")["released"] == 1
    assert client.receive() == "one"
    eventually(lambda: _quarantined(site) == 0, "the end of quarantine")
    assert_open(client)


def _quarantined(site: Site) -> int:
    found: int = site.broker.stats()["quarantined"]
    return found


FAILING = """
from pathlib import Path

import trio

from broker import Server

FOLDER = Path(__file__).parent


class Main(Server):
    start_tries = 3

    async def on_start(self):
        if self.room.id == "bad":
            raise RuntimeError("no database")

    async def on_message(self, message, sender):
        sender.send(message)

    async def on_request(self, request):
        while (FOLDER / "hold").exists():
            await trio.sleep(0.01)  # here
        return "here"


class Stays(Server):
    hibernate = False

    def on_message(self, message, sender):
        sender.send(message)
"""


def get(broker: BrokerProcess, path: str) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer to a GET."""
    with RawClient(broker.port) as client:
        answer = client.handshake(path, {"upgrade": None, "connection": "close"}, expect=503)
        return answer.status, answer.headers


def test_quarantine_begins_after_start_tries_and_ends_with_new_code(broker: BrokerFactory) -> None:
    """S4: sockets stay and their messages wait; newcomers get 503; the code that is mended handles them."""
    running = broker(FAILING, command="dev")
    with running.connect("/party/bad") as client, running.connect("/party/good") as good:
        client.send("one")
        client.send("two")
        eventually(lambda: running.stats()["quarantined"] == 1, "quarantine")
        assert get(running, "/party/bad")[1]["retry-after"] == "30"
        facts = running.ask("explain", room="bad")
        assert facts["quarantine"]["reason"] == "it failed to start 3 times: RuntimeError: no database"
        assert time.time() - 60 < facts["quarantine"]["since"] <= time.time()
        assert running.ask("explain", room="bad", release=True)["released"] == 1
        # Released with the same code it comes back.
        eventually(lambda: running.stats()["quarantined"] == 1, "quarantine again")
        good.send("on")
        assert good.receive() == "on"
        assert client.is_silent()
        before = running.stats()["hosts"]
        running.write_app(FAILING.replace('"bad"', '"none"'))
        running.wait_for_hosts(1, without=before)
        assert [client.receive(), client.receive()] == ["one", "two"]
        eventually(lambda: running.stats()["quarantined"] == 0, "the end of quarantine")
        assert running.ask("explain", room="bad")["quarantine"] is None


def test_explain_says_what_keeps_a_room_awake(broker: BrokerFactory) -> None:
    """S7: with the hook, its age and its line."""
    running = broker(FAILING)
    assert running.ask("explain", room="r") == {
        "party": "main",
        "room": "r",
        "connections": 0,
        "in_flight": 0,
        "awake": False,
        "alarm_count": 0,
        "alarms": [],
        "waiting": 0,
        "reasons": [],
        "turn": None,
        "quarantine": None,
    }
    hold = running.folder / "hold"
    hold.touch()
    with RawClient(running.port) as request:
        request.send_handshake("/party/r", {"upgrade": None, "connection": "close"})
        turn = eventually(lambda: running.ask("explain", room="r")["turn"], "a turn")
        line = FAILING.splitlines().index("            await trio.sleep(0.01)  # here") + 1
        assert (turn["hook"], turn["waits"]) == ("on_request", True)
        assert turn["line"] == f"{running.app_file}:{line}"
        [reason] = running.ask("explain", room="r")["reasons"]
        assert reason.startswith("on_request has been running for ")
        hold.unlink()
        assert request.receive_answer().status == 200
    with running.connect("/parties/stays/s") as client:
        client.send("hello")
        assert client.receive() == "hello"
        kept = ["hibernate is False: it stays while it has a connection"]
        # Its turn may still be ending when its answer is here.
        eventually(lambda: running.ask("explain", party="stays", room="s")["reasons"] == kept, "one reason")
        facts = running.ask("explain", party="stays", room="s")
        assert (facts["awake"], facts["connections"]) == (True, 1)
