"""kill -9 of the host at any moment, with rooms that count on disk: each message is counted once, answered
once, in order (S22).
"""

import hashlib
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import BINARY, TEXT, encode_frame
from tests.tracing import injected

APP = """
import hashlib

from broker import Server


class Main(Server):
    '''Counts what it is sent, and tells its sender, and everybody, the count and what it was.'''

    async def on_message(self, message, sender):
        if message == "enough":
            self.room.broadcast("enough")
            return
        if message == "read":
            sender.send(f"read {await self.room.storage.get('count', 0)}")
            return
        count = await self.room.storage.get("count", 0) + 1
        self.room.storage.put("count", count)
        key = f"of {sender.id}"
        own = await self.room.storage.get(key, 0) + 1
        self.room.storage.put(key, own)
        digest = hashlib.sha1(message).hexdigest()
        sender.send(f"own {own} {digest}")
        self.room.broadcast(f"{count} {sender.id} {own} {digest}", tag="listener")

    def get_connection_tags(self, connection, ctx):
        return ["listener"] if connection.id == "listener" else []
"""


#: For each durability.
KILLS = 15


class Teller:
    """A client that sends without waiting for answers until it is told to stop, and keeps what it hears."""

    def __init__(self, site: BrokerProcess, name: str, stop: threading.Event) -> None:
        self.name = name
        self.client = site.connect(f"/party/counted?_pk={name}")
        self.client.timeout_seconds = 60
        self.digests: list[str] = []
        self.expected: list[str] = []
        self.heard: list[str] = []
        self._chance = random.Random(name)
        self._stop = stop

    def send(self) -> None:
        while not self._stop.is_set():
            message = self._chance.randbytes(self._chance.choice([1, 50, 50, 50, 2000, 2000, 100_000]))
            self.digests.append(hashlib.sha1(message).hexdigest())
            raw = encode_frame(BINARY, message)
            self.expected.append(f"own {len(self.digests)} {self.digests[-1]}")
            if len(self.digests) % 5 == 0:
                raw += encode_frame(TEXT, b"read")
                self.expected.append("read")
            self.client.send_bytes(raw)

    def listen(self) -> None:
        while (told := str(self.client.receive())) != "enough":
            self.heard.append("read" if told.startswith("read") else told)


@pytest.mark.parametrize("durability", ["full", "os"])
def test_each_message_is_counted_once_whenever_the_host_is_killed(
    broker: BrokerFactory, durability: str
) -> None:
    """S22: about thirty deaths in all; turns that only read, which are in no outbox, keep their place among
    those that write.
    """
    site: BrokerProcess = broker(APP, durability=durability)
    stop = threading.Event()
    listener = Teller(site, "listener", stop)
    tellers = [Teller(site, f"c{number}", stop) for number in range(4)]
    chance = random.Random(durability)
    with ThreadPoolExecutor(2 * len(tellers) + 1) as pool:
        doing = [pool.submit(each.listen) for each in [listener, *tellers]]
        doing += [pool.submit(each.send) for each in tellers]
        try:
            for _ in range(KILLS):
                time.sleep(chance.random() / 3)  # not for a condition: the moment of death is to be any
                site.kill_host(wait_for_next=False)
                site.reload()
        finally:
            stop.set()
        eventually(lambda: all(len(each.heard) >= len(each.expected) for each in tellers), "all answers", 90)
        listener.client.send("enough")
        for each in doing:
            each.result()
    for teller in tellers:
        assert teller.heard == teller.expected
    counted = [each.split() for each in listener.heard]
    assert [int(total) for total, *_ in counted] == list(range(1, len(counted) + 1))
    assert len(counted) == sum(len(teller.digests) for teller in tellers)
    for teller in tellers:
        told = [(int(own), digest) for _, name, own, digest in counted if name == teller.name]
        assert told == [(number + 1, digest) for number, digest in enumerate(teller.digests)]
        assert len(told) > KILLS
        teller.client.close()
    listener.client.close()
    assert "a handler of the gateway failed" not in site.log
    assert "a result could not be carried out" not in site.log
    eventually(lambda: not site.connections(), "end of all connections")


NOTING = """
import os
from pathlib import Path

from broker import Server

FILE = Path(__file__).with_name("journal")


class Main(Server):
    async def on_message(self, message, sender):
        file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"{message}\\n".encode())
        os.close(file)
        count = await self.room.storage.get("count", 0) + 1
        self.room.storage.put("count", count)
        sender.send(f"{message} {count}")
"""


def test_each_message_is_counted_once_whichever_call_the_host_dies_in(broker: BrokerFactory) -> None:
    """S22: at every write, every sync and the send behind them. What was committed and not sent is not run
    again; what was not committed is.
    """
    site: BrokerProcess = broker(NOTING, durability="full")
    journal = site.folder / "journal"
    with site.connect("/party/room?_pk=a") as client:
        client.timeout_seconds = 60
        client.send("0")
        assert client.receive() == "0 1"
        points = [("pwrite64", when) for when in range(1, 7)]
        points += [("fdatasync", 1), ("sendto", 1), ("sendto", 1), ("fdatasync", 1), ("pwrite64", 1)]
        runs = {}
        for number, (call, when) in enumerate(points, 1):
            [pid] = site.host_pids()
            eventually(lambda: outbox(site) == 0, "an empty outbox, so that each commit writes the same")
            with injected([pid], call, f"signal=KILL:when={when}"):
                client.send(f"{number}")
                client.send(f"{number} again")
                eventually(partial(is_another_host, site, pid), "the death of the host")
            site.reload()
            assert client.receive() == f"{number} {2 * number}"
            assert client.receive() == f"{number} again {2 * number + 1}"
            lines = journal.read_text().splitlines()
            runs[call, when] = lines.count(f"{number}")
            assert 1 <= lines.count(f"{number} again") <= 2
        assert client.is_silent()
    assert runs["sendto", 1] == 1
    assert runs["pwrite64", 1] == 2


def is_another_host(site: BrokerProcess, pid: int) -> bool:
    return site.host_pids() != [pid]


def outbox(site: BrokerProcess) -> int:
    """Rows in all outboxes of an instance that runs, read beside it."""
    total = 0
    for file in (site.data / "shards").glob("*.db"):
        connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=DEADLINE_SECONDS)
        total += connection.execute("SELECT count(*) FROM outbox").fetchone()[0]
        connection.close()
    return total


def test_the_outbox_is_empty_when_nothing_happens_and_after_a_clean_end(broker: BrokerFactory) -> None:
    """S22: what has been executed is not kept: soon after, and when an instance is stopped at once."""
    site: BrokerProcess = broker(NOTING, durability="full")
    with site.connect("/party/room?_pk=a") as client:
        for number in range(20):
            client.send(f"{number}")
            assert client.receive() == f"{number} {number + 1}"
        eventually(lambda: outbox(site) == 0, "an empty outbox")
        client.send("last")
        assert client.receive() == "last 21"
    site.stop()
    assert outbox(site) == 0
