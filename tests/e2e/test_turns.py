"""Turns in the running broker: one after another, all or nothing, fair to other rooms (S19, S20, S24)."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import PING, PONG, RawClient

pytestmark = pytest.mark.e2e

TURN_BYTES = 16 * 1024

APP = """
    import json
    import sys
    from pathlib import Path

    import trio
    from broker import Server

    FOLDER = Path(__file__).parent

    async def gone(name, seconds=0.01):
        while (FOLDER / name).exists():
            await trio.sleep(seconds)

    class Waiting(Server):
        '''Waits in every handler, in every way that trio has.'''

        async def on_message(self, message, sender):
            order, inside = await self.room.storage.get("order", []), await self.room.storage.get("inside", 0)
            assert inside == 0
            self.room.storage.put("inside", 1)
            how, _, number = message.partition(" ")
            match how:
                case "sleep":
                    await trio.sleep(0.001)
                case "checkpoint":
                    await trio.lowlevel.checkpoint()
                case "thread":
                    await trio.to_thread.run_sync(int)
                case "nursery":
                    async with trio.open_nursery() as nursery:
                        for _ in range(3):
                            nursery.start_soon(trio.sleep, 0.001)
                case "limit":
                    with trio.move_on_after(0.001):
                        await trio.sleep_forever()
                case "fail_after":
                    try:
                        with trio.fail_after(0.001):
                            await trio.sleep_forever()
                    except trio.TooSlowError:
                        pass
                case "connections":
                    assert await self.room.count_connections() >= 1
                    assert [each async for each in self.room.get_connections()]
                    assert await self.room.get_connection(sender.id) is not None
                case "event":
                    event = trio.Event()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(event.wait)
                        nursery.start_soon(self.set_later, event)
                case "hold":
                    await gone("hold-" + number)
            order = [*order, f"{sender.id} {number}"]
            self.room.storage.put({"order": order, "inside": 0})
            sender.send(number)
            if how == "tell":
                sender.send(order)

        async def set_later(self, event):
            await trio.sleep(0)
            event.set()

    class Atomic(Server):
        '''Does everything that a turn can, and then what the message says.'''

        def get_connection_tags(self, connection, ctx):
            return ["start"]

        async def on_message(self, message, sender):
            if message == "look":
                sender.send([
                    await self.room.storage.list(), sender.state, list(sender.tags),
                    [each.id async for each in self.room.get_connections("changed")],
                    await self.room.count_connections(),
                ])
                return
            self.room.storage.put("key", message)
            self.room.storage.delete("gone")
            if message.startswith("clear"):
                self.room.storage.delete_all()
                self.room.storage.put("after", message)
            sender.set_state(message)
            sender.add_tags("changed")
            sender.remove_tags("start")
            sender.send(f"sent {message}")
            self.room.broadcast(f"broadcast {message}")
            other = await self.room.get_connection("victim")
            if other is not None:
                other.close(4000, message)
            match message:
                case "raise":
                    raise ValueError("as asked")
                case "exit":
                    sys.exit(1)
                case "wait":
                    await trio.sleep_forever()
                case "group":
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self.fail)
                        nursery.start_soon(trio.sleep_forever)
                case "clear and raise" | "both":
                    raise KeyError(message)

        async def fail(self):
            raise LookupError("in a child")

        def on_error(self, connection, error):
            if "both" in str(error):
                connection.send("discarded too")
                self.room.storage.put("on_error", "discarded too")
                raise RuntimeError("on_error itself")
            inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            connection.send(f"{connection.id} {type(inner).__name__}")
            self.room.storage.put("on_error", type(inner).__name__)

    class Brief(Atomic):
        '''The same, in haste.'''

        turn_timeout = 0.5

    class Order(Server):
        '''Effects in an order.'''

        def on_message(self, message, sender):
            for number in range(3):
                sender.send(f"send {number}")
                self.room.broadcast(f"broadcast {number}")
                sender.send(b"binary")
            sender.close(4001, "end")

    class Staging(Server):
        turn_bytes_max = TURN_BYTES

        async def on_message(self, message, sender):
            what, size, then = json.loads(message)
            text = "x" * size
            try:
                match what:
                    case "send":
                        sender.send(text)
                    case "broadcast":
                        self.room.broadcast(text)
                    case "put":
                        self.room.storage.put("k", text)
                    case "parts":
                        for _ in range(size // 1024):
                            sender.send("x" * 1024)
                        if size % 1024:
                            sender.send("x" * (size % 1024))
            except Exception as error:
                if then != "catch":
                    raise
                sender.send(type(error).__name__)
                self.room.storage.put("caught", 1)
                return
            sender.send("")

        def on_error(self, connection, error):
            connection.send(f"on_error {type(error).__name__}")

    class Many(Server):
        '''Answers with the order in which its host took its messages.'''

        turn_timeout = 100

        async def on_message(self, message, sender):
            if message.startswith("wait"):
                await trio.sleep(float(message.split()[1]))
            if message == "hold":
                await gone("hold-many", 0.5)  # very many look at once
            sender.send(message)

    class Burst(Server):
        '''Each turn costs the host a while; says when it ran.'''

        turns = []

        async def on_message(self, message, sender):
            Burst.turns.append(self.room.id)
            if message == "hold":
                await gone("hold-burst")
            elif message == "tell":
                sender.send(Burst.turns)
                Burst.turns.clear()
""".replace("TURN_BYTES", str(TURN_BYTES))

numbers = itertools.count()


class Instance:
    """The broker, with what these tests ask it."""

    def __init__(self, process: BrokerProcess) -> None:
        self.process = process
        self._clients: list[RawClient] = []

    def connect(self, party: str, room: str, query: str = "") -> RawClient:
        client = self.process.connect(f"/parties/{party}/{room}{query}")
        self._clients.append(client)
        return client

    def hold(self, name: str) -> None:
        (self.process.folder / name).touch()

    def release(self, name: str) -> None:
        (self.process.folder / name).unlink(missing_ok=True)

    def facts(self, party: str, room: str) -> dict[str, Any]:
        (row,) = self.process.ask("rooms", party=party, room=room)["rooms"]
        return dict(row)

    def logged(self, event: str, room: str) -> list[dict[str, Any]]:
        """What the log says of a room, as soon as it says something."""

        def lines() -> list[dict[str, Any]]:
            return [each for each in self.process.log_events(event) if each.get("room") == room]

        return eventually(lines, event)

    def end(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture(scope="module")
def process(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP)


@pytest.fixture
def instance(process: BrokerProcess) -> Iterator[Instance]:
    made = Instance(process)
    yield made
    made.end()


@pytest.fixture
def room() -> str:
    return f"room-{next(numbers)}"


WAYS = ["none", "sleep", "checkpoint", "thread", "nursery", "limit", "fail_after", "connections", "event"]


# --- One after another ----------------------------------------------------------------------------


def test_turns_are_serial_and_in_order_however_they_wait(instance, room):
    """S19: of three connections, each one's messages in order, never two turns at a time."""
    clients = [instance.connect("waiting", room, f"?_pk=c{number}") for number in range(3)]
    for number in range(40):
        for shift, client in enumerate(clients):
            client.send(f"{WAYS[(number + shift) % len(WAYS)]} {number}")
    for client in clients:
        assert [client.receive() for _ in range(40)] == [str(number) for number in range(40)]
    clients[0].send("tell end")
    assert clients[0].receive() == "end"
    order = json.loads(clients[0].receive())
    assert len(order) == 121
    for number in range(3):
        mine = [each.split()[1] for each in order if each.startswith(f"c{number} ")]
        assert mine[:40] == [str(each) for each in range(40)]


def test_a_turn_that_waits_holds_up_its_room_and_no_other(instance, room):
    """S19."""
    instance.hold(f"hold-{room}")
    first, second = instance.connect("waiting", room), instance.connect("waiting", room)
    other = instance.connect("waiting", f"{room}-other")
    first.send(f"hold {room}")
    eventually(lambda: instance.facts("waiting", room)["awake"])
    second.send("none second")
    for number in range(20):
        other.send(f"sleep {number}")
        assert other.receive() == str(number)
    assert second.is_silent()
    instance.release(f"hold-{room}")
    assert first.receive() == room
    assert second.receive() == "second"


# --- All or nothing -------------------------------------------------------------------------------


def test_a_turn_that_ends_well_does_all_of_it(instance, room):
    """S20: what the failing turns below discard, so that they prove something."""
    client = instance.connect("atomic", room, "?_pk=me")
    client.send("ok")
    assert [client.receive(), client.receive()] == ["sent ok", "broadcast ok"]
    client.send("look")
    assert json.loads(client.receive()) == [{"key": "ok"}, "ok", ["changed"], ["me"], 1]


@pytest.mark.parametrize(
    ("message", "error", "stored"),
    [
        ("raise", "ValueError", "ValueError"),
        ("exit", "SystemExit", "SystemExit"),
        ("group", "LookupError", "LookupError"),
        ("wait", "TurnTimeout", "TurnTimeout"),
        ("clear and raise", "KeyError", "KeyError"),
        ("both", None, None),
    ],
)
def test_a_turn_that_fails_leaves_only_what_on_error_does(instance, room, message, error, stored):
    """S20: puts, deletes, sends, broadcasts, closes, tags and state are discarded; `on_error` is a part of
    the same event, whose own exception is only logged; the sockets stay.
    """
    party = "brief" if message == "wait" else "atomic"
    instance.connect(party, room, "?_pk=victim")
    client = instance.connect(party, room, "?_pk=me")
    other = instance.connect(party, f"{room}-quiet")
    failed = instance.process.stats()["failed_turns"]
    client.send(message)
    if error:
        assert client.receive() == f"me {error}"
    client.send("look")
    found = json.loads(client.receive())
    assert found == [{"on_error": stored} if stored else {}, None, ["start"], [], 2]
    assert instance.process.stats()["failed_turns"] == failed + 1
    (event,) = instance.logged("on_message failed", room)
    assert (event["party"], event["connection"]) == (party, "me")
    assert "Traceback" in json.dumps(event) or "exception" in event
    if message == "both":
        assert instance.logged("on_error failed", room)
    other.send("look")
    assert json.loads(other.receive())[0] == {}


def test_no_part_of_a_failed_turn_stays_in_memory_between_others(instance, room):
    """S20: well, ill, well, ill, while the first ones are still on their way to disk."""
    client = instance.connect("atomic", room, "?_pk=me")
    for message in ["one", "raise", "two", "clear and raise", "look", "clear", "raise", "look"]:
        client.send(message)
    answers = [client.receive() for _ in range(2 + 1 + 2 + 1 + 1 + 2 + 1 + 1)]
    assert json.loads(answers[6])[:3] == [{"key": "two", "on_error": "KeyError"}, "two", ["changed"]]
    assert json.loads(answers[-1])[:3] == [
        {"after": "clear", "on_error": "ValueError"},
        "clear",
        ["changed"],
    ]


def test_effects_leave_in_the_order_of_the_calls(instance, room):
    """S20: sends and broadcasts are interleaved as they were made; the close comes last."""
    client, other = instance.connect("order", room), instance.connect("order", room)
    client.send("go")
    expected: list[Any] = [
        part for number in range(3) for part in (f"send {number}", f"broadcast {number}", b"binary")
    ]
    assert [client.receive() for _ in range(9)] == expected
    assert client.expect_close() == (4001, "end")
    assert [other.receive() for _ in range(3)] == [f"broadcast {number}" for number in range(3)]


@pytest.mark.parametrize("what", ["send", "broadcast", "put", "parts"])
def test_a_turn_stages_so_many_bytes_and_no_more(instance, room, what):
    """S20: at one below, at, and one above turn_bytes_max; there it fails, unless it catches that."""
    client = instance.connect("staging", room)
    # A key of one byte and a CBOR text of this length, whose head is three.
    most = TURN_BYTES - (4 if what == "put" else 0)
    for size in (most - 1, most):
        client.send(json.dumps([what, size, ""]))
        received = 0
        while message := client.receive():
            received += len(message)
        assert received == (0 if what == "put" else size)
    client.send(json.dumps([what, most + 1, ""]))
    assert client.receive() == "on_error LimitExceeded"
    if what != "parts":
        client.send(json.dumps([what, most + 1, "catch"]))
        assert client.receive() == "LimitExceeded"


# --- Fairness -------------------------------------------------------------------------------------


def test_a_room_gets_64_turns_in_a_row(instance, room):
    """S24: then the next room."""
    busy = [instance.connect("burst", f"{room}-busy") for _ in range(2)]
    late = instance.connect("burst", f"{room}-late")
    instance.hold("hold-burst")
    busy[0].send("hold")
    eventually(lambda: instance.facts("burst", f"{room}-busy")["awake"])
    for _ in range(99):
        busy[0].send("x")
        busy[1].send("x")
    eventually(lambda: instance.facts("burst", f"{room}-busy")["in_flight"] >= 199)
    late.send("x")
    eventually(lambda: instance.facts("burst", f"{room}-late")["wakes"] == 1)
    instance.release("hold-burst")
    busy[0].send("tell")
    turns = json.loads(busy[0].receive())
    runs = [(name, len(list(group))) for name, group in itertools.groupby(turns)]
    assert sum(count for name, count in runs if name.endswith("busy")) == 200
    # The room that holds up nobody was not behind it.
    assert turns.index(f"{room}-late") <= 64


def test_500_rooms_that_wait_at_once_hold_up_nobody(instance, room):
    """S19, S24: a message to another room is answered while they wait, and each goes on when it may."""
    instance.hold("hold-many")
    clients = [instance.connect("many", f"{room}-{number}") for number in range(500)]
    for client in clients:
        client.send("hold")
    eventually(lambda: instance.process.stats()["awake"] >= 500)
    other = instance.connect("many", f"{room}-other")
    for number in range(100):  # behind the others it would never be answered: they wait on
        other.send(f"{number}")
        assert other.receive() == f"{number}"
    for client in clients[::50]:
        client.send_frame(PING, b"p")
        frame = client.receive_frame()
        while frame == (PING, b""):  # whoever had to wait long for the others has been asked
            frame = client.receive_frame()
        assert frame == (PONG, b"p")
    instance.release("hold-many")
    for client in clients:
        assert client.receive() == "hold"
    eventually(lambda: instance.process.stats()["awake"] == 0)


def test_messages_of_many_rooms_that_wait_now_and_then_come_in_order(instance, room):
    """S19: two thousand turns, a fifth of which wait; every room's answers in its order."""
    clients = [instance.connect("many", f"{room}-{number}") for number in range(50)]
    script = ["wait 0.005" if number % 5 == 0 else f"{number}" for number in range(40)]
    for message in script:
        for client in clients:
            client.send(message)
    for client in clients:
        assert [client.receive() for _ in script] == script
