"""The life of rooms in the running broker: what wakes them, what does not, how they start and when they go
(S2, S3, S4, S6, S8).

Wakes are counted by the host, each construction once, so that "did not wake" is a fact.
"""

import contextlib
import http.client
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import CLOSE, PING, PONG, RawClient

pytestmark = pytest.mark.e2e

APP = """
    import os
    from pathlib import Path

    import trio
    from broker import Server

    FOLDER = Path(__file__).parent

    async def gone(name):
        while (FOLDER / name).exists():
            await trio.sleep(0.01)

    class Every(Server):
        '''Every hook there is for a room.'''

        def on_connect(self, connection):
            connection.add_tags("tag")

        def on_message(self, message, sender):
            if message == "fail":
                raise ValueError("as asked")
            if message == "sit":
                self.sitting = True
            sender.send(message)

        def on_close(self, connection):
            self.room.broadcast(f"{connection.id} has gone")

        def on_request(self, request):
            return "answer"

        def on_error(self, connection, error):
            connection.send("sorry")

    class OnlyConnect(Server):
        def on_connect(self, connection):
            connection.send("welcome")

    class OnlyMessage(Server):
        def on_message(self, message, sender):
            sender.send(message)

    class OnlyClose(Server):
        def on_close(self, connection):
            self.room.broadcast(f"{connection.id} has gone")

    class OnlyRequest(Server):
        def on_request(self, request):
            self.room.broadcast("asked")
            return "answer"

    class NoHooks(Server):
        pass

    class Static(Server):
        '''Hooks that run before any room is concerned.'''

        @staticmethod
        def on_before_connect(request, lobby):
            if "refuse" in request.args:
                return "no", 403

        @staticmethod
        def on_before_request(request, lobby):
            return "instead"

        def on_request(self, request):
            return "never"

    class Slow(Server):
        '''Starts slowly; tells in which order things happened.'''

        idle_seconds = 100

        def __init__(self, room):
            self.events = ["init"]

        async def on_start(self):
            self.events.append("start")
            await gone("hold-start")
            self.events.append("started")

        def on_connect(self, connection):
            self.events.append("connect " + connection.id)

        def on_message(self, message, sender):
            self.events.append(message)
            self.room.broadcast(self.events)

        def on_request(self, request):
            self.events.append("request")
            return self.events

    class Reluctant(Server):
        '''Starts only if it may, and is not given up.'''

        start_tries = 1000
        start_seconds = 1000

        def __init__(self, room):
            if (FOLDER / "no-init").exists():
                raise RuntimeError("no init")

        async def on_start(self):
            self.room.storage.put("starts", await self.room.storage.get("starts", 0) + 1)
            self.room.broadcast("discarded" if (FOLDER / "no-start").exists() else "started")
            if (FOLDER / "no-start").exists():
                await trio.sleep(0)
                raise RuntimeError("no start")

        async def on_message(self, message, sender):
            sender.send([message, await self.room.storage.get("starts")])

    class Counting(Server):
        '''Counts in a field, which does not survive, and in everything that does.'''

        count = 0

        async def on_message(self, message, sender):
            self.count += 1
            stored = await self.room.storage.get("count", 0) + 1
            self.room.storage.put("count", stored)
            sender.set_state(lambda state: (state or 0) + 1)
            sender.add_tags(f"t{stored}")
            if message == "hibernate":
                self.room.hibernate()
            if message == "hibernate and fail":
                self.room.hibernate()
                raise ValueError("so it stays")
            sender.send([self.count, stored, sender.state, list(sender.tags)])

        def on_error(self, connection, error):
            connection.send("failed")

    class Idle(Counting):
        idle_seconds = 0.3

    class Sticky(Counting):
        hibernate = False
        idle_seconds = 0.5

        def on_request(self, request):
            self.count += 1
            return str(self.count)

    class Stickier(Sticky):
        '''The same, for long.'''

        idle_seconds = 1000

    class StickyForget(Sticky):
        '''The same with a hook for closes.'''

        def on_close(self, connection):
            self.count += 1000

    class LongIdle(Counting):
        idle_seconds = 1000

        def on_request(self, request):
            self.count += 1
            return str(self.count)
"""

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

    def request(self, party: str, room: str, method: str = "GET", headers: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, f"/parties/{party}/{room}", headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def row(self, party: str, room: str) -> dict[str, Any]:
        (row,) = self.process.ask("rooms", party=party, room=room)["rooms"]
        return dict(row)

    def wakes(self, party: str, room: str) -> int:
        return int(self.row(party, room)["wakes"])

    def awake(self, party: str, room: str) -> bool:
        return bool(self.row(party, room)["awake"])

    def hold(self, name: str) -> None:
        (self.process.folder / name).touch()

    def release(self, name: str) -> None:
        (self.process.folder / name).unlink(missing_ok=True)

    def count(self, client: RawClient, message: str = "x") -> Any:
        client.send(message)
        answer = client.receive()
        return answer if answer == "failed" else json.loads(answer)

    def end(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture(scope="module")
def process(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, ping_interval_seconds=1)


@pytest.fixture
def instance(process: BrokerProcess) -> Iterator[Instance]:
    made = Instance(process)
    yield made
    made.end()


@pytest.fixture
def own(broker: BrokerFactory) -> Iterator[Callable[..., Instance]]:
    """Start a broker for one test alone."""
    made: list[Instance] = []

    def start(**options: object) -> Instance:
        made.append(Instance(broker(APP, **options)))
        return made[-1]

    yield start
    for each in made:
        each.end()


@pytest.fixture
def room() -> str:
    return f"room-{next(numbers)}"


# --- What wakes -----------------------------------------------------------------------------------


def test_each_cause_wakes_a_room_once(instance, room):
    """S2: connect, message, close, request, and an error, which belongs to the turn that failed."""

    def woken(times: int) -> None:
        eventually(lambda: not instance.awake("every", room))
        assert instance.wakes("every", room) == times

    client = instance.connect("every", room)
    # The connect turn wakes it; nothing tells the client that it is over.
    eventually(lambda: instance.wakes("every", room) == 1)
    woken(1)
    client.send("hello")
    assert client.receive() == "hello"
    woken(2)
    client.send("fail")
    assert client.receive() == "sorry"
    woken(3)
    assert instance.request("every", room) == (200, "answer")
    woken(4)
    client.send_close()
    eventually(lambda: instance.wakes("every", room) == 5)
    woken(5)


def test_questions_and_orders_from_outside_wake_nothing(instance, room):
    """S2: listings, counts, broadcasts, sends and kicks through the admin commands; pings both ways."""
    process = instance.process
    client = instance.connect("only-message", room, "?_pk=me")
    with instance.connect("only-message", room, "?_pk=other") as other:
        before = process.stats()["wakes"]
        assert process.ask("stats")["ready"]
        assert process.ask("rooms")["rooms"]
        assert process.ask("rooms", party="only-message", room=room)["rooms"][0]["connections"] == 2
        assert len(process.connections(party="only-message", room=room)) == 2
        assert len(process.connections(party="only-message", room=room, id="me")) == 1
        assert process.connections(party="only-message", room=room, tag="nobody") == []
        place = {"party": "only-message", "room": room}
        assert process.ask("broadcast", **place, message="to all") == {"sent": 2}
        assert process.ask("send", **place, id="me", message=b"to one") == {"sent": 1}
        assert [client.receive(), client.receive(), other.receive()] == ["to all", b"to one", "to all"]
        client.send_frame(PING, b"mine")
        frames = {client.receive_frame()[0] for _ in range(2)}  # ours, and the broker's own after a second
        assert frames <= {PING, PONG}
        assert process.ask("kick", **place, id="other", code=4001) == {"kicked": 1}
        while (frame := other.receive_frame())[0] == PING:
            pass
        assert frame[0] == CLOSE
    assert process.stats()["wakes"] == before
    assert instance.wakes("only-message", room) == 0


@pytest.mark.parametrize(
    ("party", "wakes"),
    [("only-connect", 1), ("only-message", 2), ("only-close", 1), ("only-request", 1), ("no-hooks", 0)],
)
def test_events_without_a_hook_wake_nothing(instance, room, party, wakes):
    """S2: a room is made only for what its party defines."""
    before = instance.process.stats()["messages"]
    client = instance.connect(party, room)
    if party == "only-connect":
        assert client.receive() == "welcome"
    status, _ = instance.request(party, room)
    assert status == (200 if party == "only-request" else 404)
    client.send("one")
    if party == "only-message":
        assert client.receive() == "one"
        eventually(lambda: not instance.awake(party, room))
    client.send("two")
    eventually(lambda: instance.process.stats()["messages"] - before in (0, 2))
    client.send_close()
    eventually(lambda: instance.row(party, room)["connections"] == 0)
    eventually(lambda: instance.wakes(party, room) == wakes)
    instance.process.stats()
    assert instance.wakes(party, room) == wakes


def test_hooks_that_belong_to_no_room_make_none(instance, room):
    """S2, S9: before-hooks decide without it."""
    assert instance.request("static", room) == (200, "instead")
    with instance.process.connect(f"/parties/static/{room}?refuse=1", expect=403):
        pass
    instance.connect("static", room)
    assert instance.request("static", room, "OPTIONS") == (200, "instead")
    assert instance.wakes("static", room) == 0


def test_a_restart_of_the_host_wakes_nothing(instance, room):
    """S2: its rooms wake when there is something to do."""
    process = instance.process
    client = instance.connect("only-message", room)
    client.send("a")
    assert client.receive() == "a"
    eventually(lambda: process.stats()["rooms"] == 1, "the end of other tests' rooms")
    process.kill_host()
    assert process.stats()["wakes"] == 0
    client.send("b")
    assert client.receive() == "b"
    assert process.stats()["wakes"] == 1


# --- Starting -------------------------------------------------------------------------------------


def test_on_start_comes_before_any_turn_and_concurrent_first_events_wait(instance, room):
    """S3: connects, messages and requests that come meanwhile, in the order of their coming."""
    instance.hold("hold-start")
    before = instance.process.stats()["requests"]
    one = instance.connect("slow", room, "?_pk=one")
    two = instance.connect("slow", room, "?_pk=two")
    one.send("hello")
    host, port = "127.0.0.1", instance.process.port
    asking = http.client.HTTPConnection(host, port, timeout=20)
    asking.request("GET", f"/parties/slow/{room}")
    eventually(lambda: instance.process.stats()["requests"] > before)
    while not one.is_silent(0.1):
        assert one.receive_frame() == (PING, b"")  # the broker's own, after a second
    instance.release("hold-start")
    with contextlib.closing(asking):
        seen = json.loads(asking.getresponse().read())
    assert seen[:3] == ["init", "start", "started"]
    assert "request" in seen[3:]
    heard = json.loads(two.receive())
    assert heard[:3] == ["init", "start", "started"]
    assert heard.index("connect one") < heard.index("hello")


@pytest.mark.parametrize("how", ["no-init", "no-start"])
def test_a_room_that_does_not_start_keeps_its_sockets_and_recovers(instance, room, how):
    """S4: its events wait; it is tried again; nothing of a failed `on_start` is kept."""
    process = instance.process
    before = len(process.log_events("room does not start"))
    instance.hold(how)
    try:
        client = instance.connect("reluctant", room)
        client.send("a")
        eventually(lambda: len(process.log_events("room does not start")) >= before + 2)
        client.send("b")
        client.send_frame(PING, b"alive")
        while client.receive_frame() != (PONG, b"alive"):
            pass
        assert instance.row("reluctant", room)["connections"] == 1
        eventually(lambda: not instance.awake("reluctant", room))  # between two tries
    finally:
        instance.release(how)
    assert client.receive() == "started"
    assert json.loads(client.receive()) == ["a", 1]
    rest = client.receive()
    if rest == "started":  # "b" came so late that the room slept in between
        rest = client.receive()
    assert json.loads(rest)[0] == "b"
    event = process.log_events("room does not start")[-1]
    assert (event["party"], event["room"]) == ("reluctant", room)
    assert how.replace("-", " ") in json.dumps(event)


# --- Going ----------------------------------------------------------------------------------------


def test_by_default_a_room_goes_at_once_and_only_its_fields_with_it(instance, room):
    """S6, S8: storage, state and tags survive."""
    client = instance.connect("counting", room)
    for number in range(1, 4):
        assert instance.count(client) == [1, number, number, [f"t{each}" for each in range(1, number + 1)]]
        eventually(lambda: not instance.awake("counting", room))
    assert instance.wakes("counting", room) == 3


def test_idle_seconds_keep_it(instance, room):
    """S6: fields survive while it is awake, and it goes when it has been idle for so long."""
    stays = instance.connect("long-idle", room)
    assert [instance.count(stays)[0] for _ in range(3)] == [1, 2, 3]
    assert instance.awake("long-idle", room)
    client = instance.connect("idle", room)
    assert instance.count(client)[:2] == [1, 1]
    eventually(lambda: not instance.awake("idle", room))
    assert instance.count(client)[:2] == [1, 2]
    assert instance.count(stays)[0] == 4


def test_a_room_that_does_not_hibernate_stays_while_it_has_a_connection(instance, room):
    """S6: longer than idle_seconds; then idle_seconds, and a connection that comes in time keeps it."""
    client = instance.connect("sticky", room)
    assert instance.count(client)[0] == 1
    asked = instance.request("sticky", room)
    assert asked == (200, "2")
    # Idle for more than twice its seconds.
    with pytest.raises(AssertionError):
        eventually(lambda: not instance.awake("sticky", room), seconds=1.2)
    assert instance.count(client)[0] == 3
    client.close()
    eventually(lambda: not instance.awake("sticky", room))
    client = instance.connect("sticky", room)
    assert instance.count(client)[:2] == [1, 3]

    client = instance.connect("stickier", room)
    assert instance.count(client)[0] == 1
    client.close()
    eventually(lambda: instance.row("stickier", room)["connections"] == 0)
    client = instance.connect("stickier", room)
    assert instance.count(client)[0] == 2


def test_a_room_that_does_not_hibernate_goes_when_nobody_is_connected(instance, room):
    """S6: a request alone does not keep it for ever."""
    assert instance.request("sticky", room) == (200, "1")
    eventually(lambda: not instance.awake("sticky", room))
    assert instance.request("sticky", room) == (200, "1")
    assert instance.request("stickier", room) == (200, "1")
    assert instance.request("stickier", room) == (200, "2")


def test_close_turns_of_a_room_that_stays(instance, room):
    """S6, S14: the room that stays sees them on the same object."""
    client, other = instance.connect("sticky-forget", room), instance.connect("sticky-forget", room)
    assert instance.count(client)[0] == 1
    other.close()
    eventually(lambda: instance.row("sticky-forget", room)["connections"] == 1)
    eventually(lambda: instance.count(client)[0] > 1000)


@pytest.mark.parametrize("party", ["sticky", "counting", "long-idle"])
def test_hibernate_ends_the_object_with_its_turn(instance, room, party):
    """S8: whatever would have kept it, and however much waits for it."""
    client = instance.connect(party, room)
    for message in ("a", "hibernate", "b", "hibernate and fail", "c"):
        client.send(message)
    answers = [client.receive() for _ in range(5)]
    assert answers.pop(3) == "failed"
    counted = [json.loads(answer)[:3] for answer in answers]
    assert [stored for _, stored, _ in counted] == [1, 2, 3, 4]
    assert [state for _, _, state in counted] == [1, 2, 3, 4]
    assert counted[2][0] == 1  # after hibernate(): a new object
    if party != "counting":
        assert [count for count, _, _ in counted] == [1, 2, 1, 3]
    instance.count(client, "hibernate")
    eventually(lambda: not instance.awake(party, room))


def test_beyond_max_awake_rooms_the_least_recently_used_go(own):
    """S6: those that may hibernate; one that must not stays."""
    instance = own(max_awake_rooms=3)
    process = instance.process
    sticky = instance.connect("sticky", "s")
    assert instance.count(sticky)[0] == 1
    for room in ("a", "b", "a", "c"):
        assert instance.request("long-idle", room)[0] == 200
    eventually(lambda: process.stats()["awake"] == 3)
    assert [instance.awake("long-idle", room) for room in "abc"] == [True, False, True]
    assert instance.awake("sticky", "s")
    assert instance.request("long-idle", "a") == (200, "3")


def test_fields_are_gone_after_a_host_s_death_and_the_rest_is_there(instance, room):
    """S8, S13: storage, state and tags of the connection."""
    client = instance.connect("long-idle", room)
    assert [instance.count(client)[:3] for _ in range(2)] == [[1, 1, 1], [2, 2, 2]]
    instance.process.kill_host()
    assert instance.count(client) == [1, 3, 3, ["t1", "t2", "t3"]]
