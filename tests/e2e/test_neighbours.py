"""Rooms that fetch and tell each other, in the running broker (S30)."""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient
from tests.e2e.test_requests import Instance

pytestmark = pytest.mark.e2e

BYTES_MAX = 10_000

APP = """
    import os
    from pathlib import Path

    import trio
    from broker import Refuse, Request, Response, Server

    FOLDER = Path(__file__).parent

    async def gone(name):
        while (FOLDER / name).exists():
            await trio.sleep(0.01)

    class Main(Server):
        '''Does for whoever asks what a message, or a path, says: a command and the room that it is for.'''

        fetch_bytes_max = 10_000
        fetch_timeout = 20

        async def do(self, words):
            match words:
                case ["fetch", party, room, path, *rest]:
                    answer = await self.room.parties[party].get(room).fetch(path, **options(rest))
                    return [answer.status_code, await answer.get_data(as_text=True), answer.content_type]
                case ["tell", party, room, text]:
                    self.room.storage.put("told", text)
                    self.room.parties[party].get(room).broadcast(text, tag="listens")
                    return ["told"]
                case ["tell-and-fail", party, room, text]:
                    self.room.parties[party].get(room).broadcast(text)
                    raise ValueError("not told")
                case ["fetch-and-fail", party, room, path]:
                    self.room.storage.put("mine", 1)
                    await self.room.parties[party].get(room).fetch(path)
                    raise ValueError("after the fetch")
                case ["both", party, first, second]:
                    found = []
                    async def one(room):
                        answer = await self.room.parties[party].get(room).fetch("/plain")
                        found.append(await answer.get_data(as_text=True))
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(one, first)
                        nursery.start_soon(one, second)
                    return sorted(found)
                case ["give-up", party, room]:
                    with trio.move_on_after(0.2):
                        await self.room.parties[party].get(room).fetch("/hold")
                        return ["answered"]
                    return ["given up"]
                case ["large", party, room, size]:
                    answer = await self.room.parties[party].get(room).fetch("/size", method="POST",
                                                                          data=b"x" * int(size))
                    return [await answer.get_data(as_text=True)]
                case ["pid"]:
                    return [os.getpid()]
                case ["ask-myself"]:
                    self.room.storage.put("mine", 7)
                    return self.asks_itself()
                case ["mine"]:
                    return [await self.room.storage.get("mine", 0)]

        async def on_message(self, message, sender):
            try:
                sender.send(await self.do(message.split(" ")))
            except Exception as error:
                sender.send([type(error).__name__, str(error)])
                if "fail" in message:
                    raise

        async def on_request(self, request):
            '''The rest of the path is what to do: rooms in a row pass it on.'''
            words = request.rest[1:].split(" ")
            return await self.do(words)

        async def asks_itself(self):
            answer = await self.room.parties["main"].get(self.room.id).fetch("/mine")
            yield await answer.get_data()

        @staticmethod
        async def on_fetch(request, lobby):
            other = lobby.parties["other"].get(request.args["room"])
            if request.path == "/tell":
                other.broadcast("from the lobby")
                return "told"
            answer = await other.fetch("/plain", query={"x": "ä"})
            return f"{answer.status_code} {await answer.get_data(as_text=True)}"

    def options(words):
        match words:
            case []:
                return {}
            case ["json", text]:
                return {"method": "POST", "json": {"text": text}, "headers": {"X-Own": "ä"}}
            case ["query", text]:
                return {"query": {"q": [text, "2"]}}

    class Other(Server):
        fetch_bytes_max = 10_000

        def get_connection_tags(self, connection, ctx):
            return ["listens"]

        @staticmethod
        def on_before_request(request, lobby):
            raise Refuse(403, "not for clients")

        async def on_request(self, request):
            count = await self.room.storage.get("count", 0) + 1
            self.room.storage.put("count", count)
            self.room.broadcast(f"{count} {request.caller}")
            match request.rest:
                case "/plain":
                    return f"{self.room.id} {count} {request.caller}"
                case "/seen":
                    return {
                        "method": request.method, "path": request.path, "rest": request.rest,
                        "args": request.args.to_dict(flat=False), "own": request.headers.get("x-own"),
                        "json": await request.get_json(), "caller": request.caller,
                    }
                case "/raise":
                    raise ValueError("a secret")
                case "/abort":
                    return "no", 410
                case "/stream":
                    return pieces(3)
                case "/endless":
                    return pieces(10_000)
                case "/breaks":
                    return pieces(-1)
                case "/hold":
                    self.room.storage.put("held", 1)
                    (FOLDER / f"in-{self.room.id}").touch()
                    try:
                        await gone(f"hold-{self.room.id}")
                    finally:
                        (FOLDER / f"in-{self.room.id}").unlink()
                    return "released"
                case "/pid":
                    return str(os.getpid())
                case "/held":
                    return str(await self.room.storage.get("held", 0))
                case "/size":
                    return b"y" * (len(await request.get_data()))
                case "/exit":
                    (FOLDER / "exits").open("a").write("x")
                    os._exit(1)

        def on_message(self, message, sender):
            sender.send(message)

    async def pieces(count):
        for number in range(abs(count)):
            yield f"{number} " * (1 if count < 1000 else 100)
        if count < 0:
            raise ValueError("a secret")

    class Deaf(Server):
        def on_message(self, message, sender):
            sender.send(message)

    class Short(Main):
        fetch_timeout = 0.3
"""

numbers = itertools.count()


@pytest.fixture(scope="module")
def process(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, hosts=2)


@pytest.fixture
def instance(process: BrokerProcess) -> Iterator[Instance]:
    made = Instance(process)
    yield made
    made.end()


@pytest.fixture
def room() -> str:
    return f"room-{next(numbers)}"


def say(client: RawClient, *words: str) -> Any:
    """Have a room do something and give what it says."""
    client.send(" ".join(words))
    return json.loads(client.receive())


def test_a_room_fetches_another(instance, room):
    """S30: on whichever host; without the before-hook; each has its own turn and storage."""
    client = instance.connect("main", room)
    for number in range(8):  # over both hosts
        listener = instance.connect("other", f"{room}-{number}")
        answer = say(client, "fetch", "other", f"{room}-{number}", "/plain")
        assert answer == [200, f"{room}-{number} 1 main/{room}", "text/html; charset=utf-8"]
        assert listener.receive() == f"1 main/{room}"
    assert instance.get(f"/parties/other/{room}-0").status == 403


def test_a_fetch_arrives_as_it_was_meant(instance, room):
    """S30: method, path, query, headers and body, whatever the characters."""
    client = instance.connect("main", room)
    status, text, kind = say(client, "fetch", "other", "rööm", "/seen?a=1&a=ü", "json", "grüße")
    assert (status, kind) == (200, "application/json")
    assert json.loads(text) == {
        "method": "POST",
        "path": "/parties/other/rööm/seen",
        "rest": "/seen",
        "args": {"a": ["1", "ü"]},
        "own": "ä",
        "json": {"text": "grüße"},
        "caller": f"main/{room}",
    }
    _, text, _ = say(client, "fetch", "other", "rööm", "/seen", "query", "ß")
    assert json.loads(text)["args"] == {"q": ["ß", "2"]}


def test_answers_are_those_that_a_client_would_have(instance, room):
    """S30: failures are statuses without details, streams come whole."""
    client = instance.connect("main", room)
    assert say(client, "fetch", "other", room, "/raise")[:2] == [500, "internal server error\n"]
    assert say(client, "fetch", "other", room, "/abort")[:2] == [410, "no"]
    assert say(client, "fetch", "other", room, "/stream")[:2] == [200, "0 1 2 "]
    assert say(client, "fetch", "other", room, "/breaks")[0] == 502
    assert say(client, "fetch", "deaf", room, "/")[0] == 404
    name, text = say(client, "fetch", "othr", room, "/")
    assert name == "UnknownParty"
    assert "there are main, other, deaf, short" in text
    assert say(client, "fetch", "other", "a\x01b", "/")[0] == "ValueError"


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_bodies_between_rooms_have_their_limit(instance, room, over):
    """S30: the error names limit, given and remedy."""
    client = instance.connect("main", room)
    answer = say(client, "large", "other", room, str(BYTES_MAX + over))
    if over <= 0:
        assert len(answer[0]) == BYTES_MAX + over
    else:
        assert answer[0] == "LimitExceeded"
        for part in ("10,001", "10,000", "fetch_bytes_max"):
            assert part in answer[1]
    answer = say(client, "fetch", "other", room, "/endless")
    assert answer[0] == "LimitExceeded"
    assert f"other/{room}" in answer[1]
    assert say(client, "fetch", "other", room, "/plain")[0] == 200


def test_what_is_told_leaves_with_the_turn(instance, room):
    """S20, S30: by the tags of the other room; not at all if the turn fails; the other room stays asleep."""
    client, listener = instance.connect("main", room), instance.connect("other", room)
    eventually(lambda: not instance.process.ask("rooms", party="other", room=room)["rooms"][0]["awake"])
    before = instance.process.ask("rooms", party="other", room=room)["rooms"][0]["wakes"]
    client.send(f"tell-and-fail other {room} no")
    assert say(client, "tell", "other", room, "yes") == ["told"]
    assert listener.receive() == "yes"
    assert instance.process.ask("rooms", party="other", room=room)["rooms"][0]["wakes"] == before


def test_two_rooms_have_two_turns(instance, room):
    """S30: what a fetched room has committed stands when the turn that fetched fails."""
    client, listener = instance.connect("main", room), instance.connect("other", room)
    client.send(f"fetch-and-fail other {room} /plain")
    assert listener.receive() == f"1 main/{room}"
    assert say(client, "mine") == [0]
    assert say(client, "fetch", "other", room, "/plain")[1] == f"{room} 2 main/{room}"


def test_several_rooms_at_once(instance, room):
    """S30: a turn may wait for several, and one room for nobody but those it asks."""
    client = instance.connect("main", room)
    assert say(client, "both", "other", f"{room}-a", f"{room}-b") == [
        f"{room}-a 1 main/{room}",
        f"{room}-b 1 main/{room}",
    ]


def test_who_gives_up_cancels(instance, room):
    """S30: the turn of the room that was fetched is cancelled, and nothing of it is kept."""
    client = instance.connect("main", room)
    instance.hold(f"hold-{room}")
    assert say(client, "give-up", "other", room) == ["given up"]
    eventually(lambda: not instance.file(f"in-{room}").exists())
    assert say(client, "fetch", "other", room, "/held")[1] == "0"


def test_a_client_that_leaves_cancels_all_the_way(instance, room):
    """S26, S30: its room's turn, and that of the room that this one fetched."""
    instance.hold(f"hold-{room}")
    sock = instance.open(f"/party/{room}/fetch%20other%20{room}%20/hold")
    eventually(instance.file(f"in-{room}").exists)
    sock.close()
    eventually(lambda: not instance.file(f"in-{room}").exists())


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_circle_is_named_at_once(instance, room, length):
    """S30: rooms that wait for each other, the smallest being a room that fetches itself."""
    names = [f"{room}-{number}" for number in range(length)]
    client = instance.connect("main", names[0])
    client.send(_nested(names))
    answer = json.loads(client.receive())
    circle = " → ".join([f"main/{name}" for name in [names[-1], *names]])
    if length == 1:
        assert answer[0] == "FetchCircle"
        assert circle in answer[1]
    else:
        assert "500" in json.dumps(answer)
        failures = "on_request failed"
        eventually(
            lambda: any(circle in str(event) for event in instance.process.log_events(failures)),
            "the circle in the log",
        )
    assert say(client, "fetch", "other", room, "/plain")[0] == 200


def _nested(names: list[str]) -> str:
    """The command with which the first of the rooms begins a circle over all of them."""
    command = f"fetch main {names[0]} /x"
    for name in reversed(names[1:]):
        command = f"fetch main {name} /{quote(command, safe='')}"
    return command


def test_a_stream_may_ask_its_own_room(instance, room):
    """S26, S30: it is no turn, so the room can answer it; what its turn wrote is there."""
    assert instance.get(f"/party/{room}/ask-myself").json == [7]


def test_no_circle_where_none_is(instance, room):
    """S30: two rooms may fetch the same one, one after the other and at once, and so may a row of rooms."""
    first, second = instance.connect("main", f"{room}-1"), instance.connect("main", f"{room}-2")
    instance.hold(f"hold-{room}")
    first.send(f"fetch other {room} /hold")
    eventually(instance.file(f"in-{room}").exists)
    second.send(f"fetch other {room} /hold")
    instance.release(f"hold-{room}")
    assert json.loads(first.receive())[1] == "released"
    assert json.loads(second.receive())[1] == "released"


def test_a_room_that_does_not_answer(instance, room):
    """S30: the time limit names the room, and whom it waits for."""
    instance.hold(f"hold-{room}")
    middle = instance.connect("main", room)
    middle.send(f"fetch other {room} /hold")
    eventually(instance.file(f"in-{room}").exists)
    client = instance.connect("short", room)
    name, text = say(client, "fetch", "main", room, "/mine")
    assert name == "FetchTimeout"
    for part in (f"'main/{room}'", "0.3 s", f"it waits for other/{room}", "fetch_timeout"):
        assert part in text
    instance.release(f"hold-{room}")
    assert json.loads(middle.receive())[1] == "released"


def test_static_hooks_reach_rooms(instance, room):
    """S30: they fetch, and what they tell leaves at once."""
    listener = instance.connect("other", room)
    assert instance.get(f"/ask?room={room}").text == f"200 {room} 1 main/"
    assert listener.receive() == "1 main/"
    assert instance.get(f"/tell?room={room}").text == "told"
    assert listener.receive() == "from the lobby"


def test_a_room_that_ends_its_host_is_the_fault_of_who_asked(broker):
    """S23, S30: what a turn fetches from a room of its own host is part of what it does: it is given up
    after its tries, and the host lives on.
    """
    instance = Instance(broker(APP, redelivery_tries=2))
    with contextlib.closing(instance.connect("main", "r")) as client:
        client.timeout_seconds = 60
        client.send("fetch other r /exit")
        client.send("mine")
        assert json.loads(client.receive()) == [0]
        assert len(instance.file("exits").read_text()) == 2
        letters = instance.process.ask("dead_letters")
        assert letters
    instance.end()


def test_death_of_the_other_room_s_host(broker):
    """S26, S30: 502, as a client would have it; the room that asked goes on."""
    instance = Instance(broker(APP, hosts=2))
    client = instance.connect("main", "r")
    [own] = say(client, "pid")
    rooms = (f"r{number}" for number in itertools.count())
    other = next(name for name in rooms if say(client, "fetch", "other", name, "/pid")[1] != str(own))
    assert say(client, "fetch", "other", other, "/exit")[0] == 502
    assert say(client, "pid") == [own]
    assert say(client, "fetch", "other", other, "/plain")[1] == f"{other} 2 main/r"
    client.close()
    instance.end()


def test_what_is_told_is_told_once_whoever_dies(broker):
    """S22, S30: each of a row of turns tells another room something once, in their order, though the host
    that runs them is killed among them, and then the gateway.
    """
    instance = Instance(broker(APP, hosts=1))
    listener, client = instance.connect("other", "r"), instance.connect("main", "a")
    for number in range(40):
        client.send(f"tell other r {number}")
    assert listener.receive() == "0"
    instance.process.kill_host()
    for number in range(40, 60):
        client.send(f"tell other r {number}")
    assert [listener.receive() for _ in range(30)] == [str(number) for number in range(1, 31)]
    instance.process.kill_gateway()
    assert [listener.receive() for _ in range(29)] == [str(number) for number in range(31, 60)]
    assert listener.is_silent(0.3)
    instance.end()


def test_a_fetch_is_made_again_when_its_turn_is(broker):
    """S30, S34: the gateway is killed while a room waits for another: both turns run again, and the client
    has one answer.
    """
    instance = Instance(broker(APP, hosts=2))
    instance.hold("hold-r")
    client = instance.connect("main", "a")
    client.send("fetch other r /hold")
    eventually(instance.file("in-r").exists)
    instance.process.kill_gateway()
    instance.release("hold-r")
    assert json.loads(client.receive())[:2] == [200, "released"]
    assert say(client, "fetch", "other", "r", "/held")[1] == "1"
    instance.end()


def test_new_code_while_rooms_wait_for_each_other(broker):
    """S30, S32: a turn that has fetched a room of its own host, whose turn the old code does not begin any
    more, is run again by the new one.
    """
    instance = Instance(broker(APP, hosts=1))
    instance.hold("hold-r")
    first, second = instance.connect("main", "a"), instance.connect("main", "b")
    first.send("fetch other r /hold")
    eventually(instance.file("in-r").exists)
    before = instance.process.stats()["turns"]
    second.send("fetch other r /plain")
    second.send("pid")
    [old] = instance.process.host_pids()
    # While it waits nothing else of its room is done, and the fetch is behind the one that holds.
    probe = instance.connect("main", "c")
    assert say(probe, "pid") == [old]
    assert instance.process.stats()["turns"] >= before
    reload = threading.Thread(target=instance.process.command, args=("reload",))
    reload.start()
    eventually(lambda: not instance.process.stats()["ready"], "a host that is about to leave")
    # It begins no more turns: that of this message waits for the new one.
    probe.send("pid")
    assert probe.is_silent(0.3)
    instance.release("hold-r")
    assert json.loads(first.receive())[1] == "released"
    assert json.loads(second.receive())[1] == "r 2 main/b"
    assert json.loads(second.receive()) != [old]
    reload.join(30)
    assert not reload.is_alive()
    instance.end()
