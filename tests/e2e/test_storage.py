"""`room.storage` in the running broker: what is read, what is kept, and through what (S20, S21, S27)."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient

pytestmark = pytest.mark.e2e

APP = """
    import datetime
    import json

    import trio
    from broker import Server

    VALUES = {
        "none": None, "true": True, "int": -(2**63), "big": 2**100, "float": 1.5, "infinite": float("inf"),
        "text": "ä\\U0001f600\\x00", "bytes": b"\\x00\\xff", "list": [1, [2, [3]]], "empty": {},
        "dict": {"a": {1: [b"x"]}, 2: None}, "set": {1, 2},
        "date": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
    }
    BAD = {
        "object": object(), "surrogate": "\\ud800", "function": print, "class": Server,
        "nested": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]],
    }

    class Main(Server):
        '''Carries out steps: ["put", key, value], ["get", key], …; answers with what they gave.'''

        async def on_message(self, message, sender):
            storage = self.room.storage
            results = []
            for step in json.loads(message):
                match step:
                    case ["put", key, value]:
                        results.append(await storage.put(key, value))
                    case ["put", many]:
                        results.append(storage.put(many) and None)
                    case ["get", key]:
                        results.append(await storage.get(key, "missing"))
                    case ["delete", key]:
                        results.append(await storage.delete(key))
                    case ["list", bounds]:
                        results.append(list((await storage.list(**bounds)).items()))
                    case ["clear"]:
                        storage.delete_all()
                        results.append(None)
                    case ["wait"]:
                        await trio.sleep(0.002)
                        results.append(None)
                    case ["hibernate"]:
                        self.room.hibernate()
                        results.append(None)
                    case ["fail"]:
                        raise ValueError("as asked")
                    case ["try", size_of_key, size_of_value]:
                        try:
                            storage.put("k" * size_of_key, b"x" * size_of_value)
                            results.append("fits")
                        except Exception as error:
                            results.append(type(error).__name__)
            sender.send(results)

        def on_error(self, connection, error):
            connection.send(["failed", type(error).__name__])

    class Resident(Main):
        '''The same, without hibernation between its turns.'''

        idle_seconds = 1000

    class Values(Server):
        async def on_message(self, message, sender):
            storage = self.room.storage
            if message == "put":
                storage.put(VALUES)
            elif message == "bad":
                for name, value in BAD.items():
                    try:
                        storage.put(name, value)
                    except Exception as error:
                        sender.send(f"{name} {type(error).__name__}")
                sender.send(await storage.list())
                return
            found = await storage.list()
            same = found.keys() == VALUES.keys() and all(
                found[name] == value and type(found[name]) is type(value) for name, value in VALUES.items()
            )
            sender.send([len(found), same, await storage.get(list(VALUES)) == VALUES])

    class Counter(Server):
        '''Counts on disk, and tells everybody.'''

        async def on_message(self, message, sender):
            count = await self.room.storage.get("count", 0)
            if message == "read":
                sender.send(str(count))
                return
            if int(message) % 3 == 0:
                await trio.sleep(0)
            self.room.storage.put({"count": count + 1, f"log-{count:06}": message})
            self.room.broadcast(f"{count + 1} {message}")
"""

numbers = itertools.count()


class Instance:
    """The broker, with what these tests ask it."""

    def __init__(self, process: BrokerProcess) -> None:
        self.process = process
        self._clients: list[RawClient] = []

    def connect(self, party: str, room: str) -> RawClient:
        client = self.process.connect(f"/parties/{party}/{room}")
        self._clients.append(client)
        return client

    def end(self) -> None:
        for client in self._clients:
            client.close()


def do(client: RawClient, *steps: list[Any]) -> Any:
    client.send(json.dumps(steps))
    return json.loads(client.receive())


@pytest.fixture(scope="module", params=["full", "os"])
def process(request: pytest.FixtureRequest, module_broker: BrokerFactory) -> BrokerProcess:
    made = module_broker(APP, durability=request.param)
    assert made.stats()["durability"] == request.param
    return made


@pytest.fixture
def instance(process: BrokerProcess) -> Iterator[Instance]:
    made = Instance(process)
    yield made
    made.end()


@pytest.fixture
def room() -> str:
    return f"room-{next(numbers)}"


# --- Reading and writing --------------------------------------------------------------------------


@pytest.mark.parametrize("party", ["main", "resident"])
def test_what_was_put_is_read_by_its_own_turn_and_by_later_ones(instance, room, party):
    """S27: whether the room has slept in between or not."""
    client = instance.connect(party, room)
    assert do(client, ["get", "a"], ["put", "a", 1], ["get", "a"], ["put", {"b": 2, "c": 3}]) == [
        "missing", None, 1, None,
    ]  # fmt: skip
    assert do(client, ["get", ["a", "b", "x"]], ["delete", "b"], ["delete", "b"], ["get", "b"]) == [
        {"a": 1, "b": 2}, True, False, "missing",
    ]  # fmt: skip
    assert do(client, ["delete", ["a", "c", "x", "a"]], ["list", {}]) == [2, []]
    assert do(client, ["list", {}]) == [[]]


def test_list_is_in_byte_order_between_its_bounds(instance, room):
    """S27: of what is on disk and of what is not yet, as one."""
    client = instance.connect("resident", room)
    names = ["a", "a0", "b", "é", "z", "\U0001f600", "￿", "A", "a\x00"]
    do(client, ["put", {name: name for name in names[:5]}])
    ordered = sorted(names, key=str.encode)

    def listed(**bounds: Any) -> list[str]:
        (_, _, found) = do(client, ["put", {name: name for name in names[5:]}], ["wait"], ["list", bounds])
        assert all(key == value for key, value in found)
        return [key for key, _ in found]

    assert listed() == ordered
    assert listed(reverse=True) == ordered[::-1]
    assert listed(limit=3) == ordered[:3]
    assert listed(limit=0) == []
    assert listed(reverse=True, limit=3) == ordered[:-4:-1]
    assert listed(start="a0") == ordered[ordered.index("a0") :]
    assert listed(start_after="a0") == ordered[ordered.index("a0") + 1 :]
    assert listed(end="é") == ordered[: ordered.index("é")]
    assert listed(prefix="a") == ["a", "a\x00", "a0"]
    assert listed(prefix="a", start_after="a", end="b", reverse=True, limit=1) == ["a0"]


def test_delete_all_takes_what_is_on_disk_and_what_is_not(instance, room):
    """S27: and nothing of what comes after it."""
    client = instance.connect("resident", room)
    do(client, ["put", {f"k{number}": number for number in range(300)}])
    assert do(client, ["put", "new", 1], ["clear"], ["get", "k7"], ["list", {}], ["put", "last", 2]) == [
        None, None, "missing", [], None,
    ]  # fmt: skip
    assert do(client, ["list", {}]) == [[["last", 2]]]
    assert do(client, ["put", "x", 1], ["clear"], ["fail"]) == ["failed", "ValueError"]
    assert do(client, ["list", {}]) == [[["last", 2]]]


def test_rooms_do_not_see_each_other_s_keys(instance, room):
    """S27: of the same party and of another."""
    clients = [instance.connect(*each) for each in (("main", room), ("main", room + "2"), ("resident", room))]
    for number, client in enumerate(clients):
        do(client, ["put", "key", number])
    assert [do(client, ["list", {}]) for client in clients] == [[[["key", each]]] for each in range(3)]
    do(clients[0], ["clear"])
    assert [do(client, ["get", "key"]) for client in clients] == [["missing"], [1], [2]]


def test_values_come_back_as_they_were(instance, room):
    """S27: of every kind that CBOR holds; after the room has slept, too."""
    client = instance.connect("values", room)
    client.send("put")
    (count, *same) = json.loads(client.receive())
    assert (count, same) == (13, [True, True])
    eventually(lambda: not instance.process.ask("rooms", party="values", room=room)["rooms"][0]["awake"])
    client.send("look")
    assert json.loads(client.receive()) == [13, True, True]


def test_values_that_cannot_be_stored_are_refused_one_by_one(instance, room):
    """S27, FAULTS 55: an error at the call, and nothing of it is written."""
    client = instance.connect("values", room)
    client.send("bad")
    for name in ("object", "surrogate", "function", "class", "nested"):
        assert client.receive() == f"{name} ValueEncodingError"
    assert json.loads(client.receive()) == {}


def test_keys_and_values_have_their_limits(instance, room):
    """S27: 2 KiB of key and 2 MiB of value, five bytes of which are its head: one below, at, one above."""
    client = instance.connect("main", room)
    largest = 2 * 1024 * 1024 - 5
    steps = [["try", 2048 + over, 1] for over in (-1, 0, 1)] + [
        ["try", 1, largest + over] for over in (-1, 0, 1)
    ]
    assert do(client, *steps) == ["fits", "fits", "StorageLimitError"] * 2
    assert do(client, ["try", 0, 1]) == ["ValueError"]


# --- Under load -----------------------------------------------------------------------------------


@pytest.mark.parametrize("party", ["main", "resident"])
def test_turns_read_what_earlier_ones_have_not_yet_committed(instance, room, party):
    """S19, S27: hundreds of turns in flight against a model, some fail, some wait, some send the room to
    sleep.
    """
    chance = random.Random(room)
    client = instance.connect(party, room)
    kept: dict[str, int] = {}
    expected: list[Any] = []
    for number in range(300):
        present = dict(kept)
        steps: list[list[Any]] = []
        results: list[Any] = []
        for _ in range(chance.randrange(1, 5)):
            key = f"k{chance.randrange(6)}"
            what = chance.choice(["put", "put", "get", "delete", "list", "clear", "wait", "hibernate"])
            match what:
                case "put":
                    steps.append(["put", key, number])
                    results.append(None)
                    present[key] = number
                case "get":
                    steps.append(["get", key])
                    results.append(present.get(key, "missing"))
                case "delete":
                    steps.append(["delete", key])
                    results.append(present.pop(key, None) is not None)
                case "list":
                    steps.append(["list", {"limit": 3, "reverse": True}])
                    results.append([list(each) for each in sorted(present.items(), reverse=True)[:3]])
                case "clear" if chance.random() < 0.3:
                    steps.append(["clear"])
                    results.append(None)
                    present = {}
                case _:
                    steps.append(["hibernate" if what == "hibernate" else "wait"])
                    results.append(None)
        if chance.random() < 0.1:
            steps.append(["fail"])
            results = ["failed", "ValueError"]
        else:
            kept = present
        expected.append(results)
        client.send(json.dumps(steps))
    assert [json.loads(client.receive()) for _ in expected] == expected


def test_a_counter_on_disk_is_right_whoever_counts(instance, room):
    """S19: four clients, five hundred turns, each broadcast once and in order."""
    clients = [instance.connect("counter", room) for _ in range(4)]
    for number in range(125):
        for client in clients:
            client.send(f"{number}")
    for client in clients:
        counts = [int(str(client.receive()).split()[0]) for _ in range(500)]
        assert counts == list(range(1, 501))


# --- Through kill -9 ------------------------------------------------------------------------------


def test_what_a_client_has_seen_is_on_disk(instance):
    """S20, S21: effects are never visible before their commit. The host is killed the moment that an answer
    has come, in the middle of many more.
    """
    process = instance.process
    seen = 0
    for turn in range(3):
        rooms = [instance.connect("counter", f"r{number}") for number in range(20)]
        for client in rooms:
            for number in range(30):
                client.send(f"{number}")
        for _ in range(10 * (turn + 1)):
            seen = int(str(rooms[0].receive()).split()[0])
        process.kill_host()
        for client in rooms:
            client.close()
        eventually(lambda: process.stats()["connections"] == 0)
        reader = instance.connect("counter", "r0")
        reader.send("read")
        # Turns of those who have left may still be running.
        while " " in (answer := str(reader.receive())):
            pass
        assert int(answer) >= seen
        reader.close()


@pytest.mark.parametrize("durability", ["full", "os"])
def test_a_single_put_is_there_after_kill_9_right_behind_its_answer(broker, durability):
    """S20, S21. On a broker of its own: the more a host has died the later comes the next."""
    process = broker(APP, durability=durability)
    with process.connect("/party/r") as client:
        client.timeout_seconds = 60
        for number in range(4):
            assert do(client, ["put", f"k{number}", number], ["clear"], ["put", "last", number]) == [None] * 3
            process.kill_host(wait_for_next=False)
            assert do(client, ["list", {}]) == [[["last", number]]]


def test_storage_outlives_the_whole_instance(broker):
    """S21: a stop and a start on the same data."""
    process = broker(APP)
    with process.connect("/party/r") as client:
        assert do(client, ["put", "key", "value"]) == [None]
    process.stop()
    process.start()
    with process.connect("/party/r") as again:
        assert do(again, ["get", "key"]) == ["value"]
