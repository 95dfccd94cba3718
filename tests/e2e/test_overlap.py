"""Turns of one room that overlap, in the running broker (S19), and what becomes of them when their host or
their gateway is killed (S22).
"""

import json
import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient

pytestmark = pytest.mark.e2e

APP = """
    import random
    import trio
    from broker import Server

    class Main(Server):
        pass

    class _Room(Server):
        def __init__(self, room):
            self.events = {}
            self.made = random.random()

        async def on_message(self, message, sender):
            what, _, rest = message.partition(" ")
            if what == "wait":
                self.room.storage.put("seen", rest)
                await self.events.setdefault(rest, trio.Event()).wait()
            elif what == "wake":
                self.events[rest].set()
            elif what == "seen":
                sender.send(str(await self.room.storage.get("seen")))
                return
            elif what == "late":
                try:
                    await trio.sleep_forever()
                finally:
                    self.room.storage.put("never", 1)
            elif what == "count":
                done = await self.room.storage.get(f"{sender.id} {rest}", 0)
                self.room.storage.put(f"{sender.id} {rest}", done + 1)
                await trio.sleep(random.random() / 20)
                if random.random() < 0.5:
                    await trio.sleep(0.002)
                sender.send(f"{rest} {done}")
                return
            sender.send(f"{message} {self.made}")

        async def on_request(self, request):
            if request.rest == "/counts":
                return await self.room.storage.list()
            return "answered"

        def on_error(self, connection, error):
            connection.send(type(error).__name__)

    class PerConnection(_Room):
        concurrency = "per_connection"

    class Interleave(_Room):
        concurrency = "interleave"

    class Short(_Room):
        concurrency = "interleave"
        turn_timeout = 0.5

    class Counted(_Room):
        concurrency = "interleave"

    class CountedPer(_Room):
        concurrency = "per_connection"
"""


@pytest.fixture(scope="module")
def site(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP)


def reasons(site: BrokerProcess) -> list[str]:
    """Why the room waits, without how long."""
    found = site.ask("explain", party="per-connection", room="r")["reasons"]
    return [" ".join(reason.split()[:5]) for reason in found]


def told(client: RawClient) -> str:
    return str(client.receive()).rpartition(" ")[0]


def test_turns_of_different_connections_overlap(site: BrokerProcess) -> None:
    """S19: each connection's own are serial; a request waits for nobody; all run in one object."""
    with site.connect("/parties/per-connection/r") as one, site.connect("/parties/per-connection/r") as two:
        one.send("wait a")
        one.send("second")
        two.send("hello")
        assert told(two) == "hello"
        with urllib.request.urlopen(site.url("/parties/per-connection/r")) as answer:
            assert answer.read() == b"answered"
        eventually(lambda: reasons(site) == ["on_message has been running for"], "no other turn")
        assert one.is_silent()
        two.send("wake a")
        made = {str(client.receive()).rpartition(" ")[2] for client in (two, one, one)}
        assert len(made) == 1
        eventually(lambda: site.stats()["awake"] == 0, "the room to go")


def test_turns_of_one_connection_overlap_and_end_in_order(site: BrokerProcess) -> None:
    """S19, S20: what a turn has staged shows at its end; the one behind it ends with it."""
    with site.connect("/parties/interleave/r") as one, site.connect("/parties/interleave/r") as two:
        one.send("wait a")
        two.send("seen")
        assert two.receive() == "None"
        one.send("wake a")
        assert [told(one), told(one)] == ["wait a", "wake a"]
        two.send("seen")
        assert two.receive() == "a"


def test_a_turn_that_takes_too_long_is_cancelled_alone(site: BrokerProcess) -> None:
    """S20: its neighbours go on."""
    with site.connect("/parties/short/t") as one, site.connect("/parties/short/t") as two:
        one.send("late")
        one.send("behind")
        for _ in range(10):
            two.send("hello")
            assert told(two) == "hello"
        assert one.receive() == "TurnTimeout"
        assert told(one) == "behind"


def test_each_message_has_its_effect_once_whoever_is_killed(broker: BrokerFactory) -> None:
    """S22: with several turns of each connection in progress at each death; answers come in order."""
    site = broker(APP)
    parties = ["counted", "counted-per"]
    clients = [site.connect(f"/parties/{party}/r?_pk=c{number}") for party in parties for number in range(2)]
    stop = threading.Event()
    counts = [0] * len(clients)
    heard: list[list[str]] = [[] for _ in clients]

    def send(index: int) -> None:
        while not stop.is_set():
            clients[index].send(f"count {counts[index]}")
            counts[index] += 1
            time.sleep(0.05)  # not for a condition: several are to be in progress at each death

    def listen(index: int) -> None:
        while not heard[index] or not heard[index][-1].startswith("last"):
            heard[index].append(str(clients[index].receive()))

    chance = random.Random(19)
    with ThreadPoolExecutor(2 * len(clients)) as pool:
        sending = [pool.submit(send, index) for index in range(len(clients))]
        listening = [pool.submit(listen, index) for index in range(len(clients))]
        try:
            for kill in range(3):
                time.sleep(chance.random() / 3)  # not for a condition: the moment of death is to be any
                if kill == 1:
                    site.kill_gateway()
                    continue
                site.kill_host(wait_for_next=False)
                site.reload()
        finally:
            stop.set()
        for each in sending:
            each.result()
        for client in clients:
            client.send("count last")
        for each in listening:
            each.result()
    for index, answers in enumerate(heard):
        expected = [*[str(number) for number in range(counts[index])], "last"]
        assert answers == [f"{number} 0" for number in expected]
    for client in clients:
        client.close()
    for party in parties:
        with urllib.request.urlopen(site.url(f"/parties/{party}/r/counts")) as answer:
            assert set(json.load(answer).values()) == {1}
