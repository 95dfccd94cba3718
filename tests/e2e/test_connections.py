"""Coming in, being known, being found: S1, S2, S9 to S13, S17 and S18 against the running broker."""

import contextlib
import itertools
import json
import sqlite3
import time
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually, whole_lines
from tests.e2e.raw_client import CLOSE, PING, PONG, TEXT, RawClient, encode_frame

pytestmark = pytest.mark.e2e

APP = """
    import json
    from pathlib import Path

    import trio

    from broker import Connection, LimitExceeded, Refuse, Response, Server

    LOG = Path(__file__).with_name("events.jsonl")


    def note(server, event, **fields):
        fields = {"party": server.room.party, "room": server.room.id, "event": event, **fields}
        with LOG.open("a") as log:
            log.write(json.dumps(fields) + "\\n")


    class Noted(Server):
        def __init__(self, room):
            self.room = room
            note(self, "constructed")

        def on_close(self, connection, code, reason, was_clean):
            note(self, "closed", id=connection.id, code=code, reason=reason, clean=was_clean,
                 cause=connection.close_cause, state=connection.state, tags=connection.tags)


    # --- before-hooks

    def decide(request):
        match request.args.get("do"):
            case "response":
                return Response("not today", 418, {"X-Why": "tea"})
            case "tuple":
                return {"why": "json"}, 409, {"X-Why": "tuple"}
            case "refuse":
                raise Refuse(401, "who are you?")
            case "bare":
                raise Refuse(403)
            case "raise":
                raise RuntimeError("secret in a traceback")
            case "exit":
                import sys
                sys.exit(3)
            case "garbage":
                return 42
            case "status":
                return "text", 700
            case "informal":
                return "text", 102
            case "headers":
                return "text", 400, {"X Y": "bad name"}
            case "control":
                request.headers["x-user"] = "a\\x01b"
            case "unsendable":
                request.headers["x-user"] = "\\u20ac"
            case "user":
                request.headers["x-user"] = "ann"
            case "returned":
                request.headers["x-user"] = "bob"
                return request


    class Gate(Noted):
        @staticmethod
        async def on_before_connect(request, lobby):
            await trio.sleep(float(request.args.get("wait", "0")))
            while "hold" in request.args and not LOG.with_name("let-in").exists():
                await trio.sleep(0.01)
            return decide(request)

        def on_connect(self, connection, ctx):
            connection.send(ctx.request.headers.get("x-user", "nobody"))

        def on_message(self, message, sender):
            sender.send(f"{message} again")


    class PlainGate(Noted):
        @staticmethod
        def on_before_connect(request):
            return decide(request)

        def on_connect(self, connection, ctx):
            connection.send(ctx.request.headers.get("x-user", "nobody"))


    class Endless(Noted):
        turn_timeout = 0.3

        @staticmethod
        async def on_before_connect(request):
            await trio.sleep_forever()


    # --- connect turns

    class Welcome(Noted):
        def get_connection_tags(self, connection, ctx):
            match ctx.request.args.get("tags"):
                case "many":
                    return [f"t{n}" for n in range(65)]
                case "fit":
                    return [f"t{n}" for n in range(64)] * 2
                case "str":
                    return "oops"
                case "empty":
                    return [""]
                case "none":
                    return None
            return ["guest"]

        async def on_connect(self, connection, ctx):
            do = ctx.request.args.get("do")
            connection.send("first")
            if do == "raise":
                raise RuntimeError("secret in a traceback")
            if do == "close":
                connection.send("second")
                connection.close(4001, "go away")
                return
            await trio.sleep(float(ctx.request.args.get("wait", "0")))
            connection.send([connection.id, connection.uri, list(connection.tags), connection.state])
            me = [each.id async for each in self.room.get_connections()]
            connection.send(me)

        def on_message(self, message, sender):
            sender.send(f"echo {message}")


    # --- everything else by command

    class Main(Noted):
        def get_connection_tags(self, connection, ctx):
            return ctx.request.args.getlist("tag")

        async def on_message(self, message, sender):
            command = json.loads(message)
            do = command.pop("do")
            try:
                result = await getattr(self, "do_" + do)(sender, **command)
            except Exception as error:
                result = [type(error).__name__, str(error)]
            if result is not self:
                sender.send({"result": result})

        async def _all(self, ids):
            if ids is None:
                return [each async for each in self.room.get_connections()]
            return [await self.room.get_connection(each) for each in ids]

        async def do_list(self, sender, **criteria):
            return [each.id async for each in self.room.get_connections(**criteria)]

        async def do_count(self, sender, **criteria):
            return await self.room.count_connections(**criteria)

        async def do_find(self, sender, id):
            found = await self.room.get_connection(id)
            return found and [found.id, list(found.tags), found.state]

        async def do_broadcast(self, sender, **criteria):
            self.room.broadcast("broadcast", **criteria)
            return "done"

        async def do_tag(self, sender, add=(), remove=(), ids=None, then=None, **criteria):
            for each in [sender] if ids is None else await self._all(ids):
                each.add_tags(*add)
                each.remove_tags(*remove)
            if then:
                return await getattr(self, "do_" + then)(sender, **criteria)
            return list(sender.tags)

        async def do_edit_and_list(self, sender, tagged, untagged, closed, tag, id=None):
            for each in await self._all(tagged):
                each.add_tags(tag)
            for each in await self._all(untagged):
                each.remove_tags(tag)
            for each in await self._all(closed):
                each.close(4000, "by list")
            found = [await self.room.get_connection(each) for each in closed]
            return [
                [each.id async for each in self.room.get_connections(tag)],
                await self.room.count_connections(tag),
                await self.room.count_connections(none_of=[tag]),
                [each is None for each in found],
            ]

        async def do_fail_after_edits(self, sender):
            sender.add_tags("never")
            sender.set_state("never")
            sender.close(4000)
            self.room.broadcast("never")
            raise SystemExit("never")

        async def do_state(self, sender, size=None, **value):
            sender.set_state(bytes(size) if size is not None else value["value"])
            return "set"

        async def do_count_up(self, sender):
            sender.set_state(lambda n: (n or 0) + 1)
            sender.set_state(lambda n: n + 1)
            return sender.state

        async def do_bad_state(self, sender):
            sender.set_state({"a": object()})

        async def do_read(self, sender):
            return len(sender.state) if isinstance(sender.state, bytes) else sender.state

        async def do_send_after_close(self, sender):
            sender.send("before")
            sender.close(4002, "closed in turn")
            try:
                sender.send("after")
            except Exception as error:
                note(self, "send after close", error=type(error).__name__)
            return self

        async def do_bad_close(self, sender, code=1000, reason=""):
            sender.close(code, reason)

        async def do_types(self, sender):
            for each in ["text", b"bytes", bytearray(b"array"), {"a": [1, None]}, ["é"], 7, None, True]:
                sender.send(each)

        async def do_send_to(self, sender, id):
            other = await self.room.get_connection(id)
            note(self, "found")
            while not LOG.with_name("gone").exists():
                await trio.sleep(0.01)
            other.send("too late")
            return "sent"


    # --- duplicate ids

    class Probed(Noted):
        probe_seconds = 0.5

        def on_connect(self, connection):
            connection.add_tags("kept")
            connection.set_state("kept")

        async def on_message(self, message, sender):
            found = await self.room.get_connection(sender.id)
            sender.send([found is sender, list(found.tags), found.state, await self.room.count_connections()])


    class PatientlyProbed(Probed):
        probe_seconds = 60.0  # longer than a client of these tests waits


    class Replaced(Probed):
        duplicate_ids = "replace"


    class Refused(Probed):
        duplicate_ids = "refuse"


    # --- hooks left out

    class OnlyMessages(Server):
        def __init__(self, room):
            self.room = room
            note(self, "constructed")

        async def on_start(self):
            await trio.sleep(0.2)
            note(self, "started")

        def on_message(self, message, sender):
            sender.send(message)


    class OnlyCloses(Noted):
        subprotocols = ["v2", "v1"]


    class Nothing(Server):
        def __init__(self, room):
            self.room = room
            note(self, "constructed")


    class Subprotocols(Server):
        subprotocols = ("v2", "v1")
"""


class Instance:
    """A broker with the app above."""

    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker
        self.hosts = broker.host_pids()

    def events(self, room: str, event: str | None = None) -> list[dict]:
        """What the rooms with this id have noted."""
        log = self.broker.folder / "events.jsonl"
        noted = [json.loads(line) for line in whole_lines(log)]
        return [each for each in noted if each["room"] == room and event in (None, each["event"])]

    def closed(self, room: str, count: int = 1) -> list[dict]:
        """The close turns of a room, once there are so many."""
        eventually(lambda: len(self.events(room, "closed")) >= count, f"{count} close turns")
        found = self.events(room, "closed")
        assert len(found) == count
        return found

    def constructed(self, room: str) -> int:
        return len(self.events(room, "constructed"))

    def connect(self, path: str, **options) -> RawClient:
        return self.broker.connect(path, **options)

    def refused(self, path: str, **options):
        with RawClient(self.broker.port) as client:
            client.send_handshake(path, **options)
            answer = client.receive_answer()
            assert answer.status != 101
            assert answer.headers["connection"] == "close"
            assert client.at_eof()
            return answer

    def unharmed(self) -> None:
        """No process has died."""
        assert self.broker.host_pids() == self.hosts


@pytest.fixture(scope="module")
def instance(module_broker):
    """Nobody here is so slow that a deadline would come first."""
    instance = Instance(module_broker(APP, close_timeout_seconds=60, ping_interval_seconds=600))
    yield instance
    instance.unharmed()


_rooms = itertools.count()


@pytest.fixture
def room() -> str:
    """The id of a room that nobody else uses."""
    return f"room-{next(_rooms)}"


def ask(client: RawClient, do: str, **command):
    """Have a command carried out by a Main room; broadcasts that come before the answer are passed over."""
    client.send(json.dumps({"do": do, **command}))
    while True:
        message = json.loads(str(client.receive()).replace("broadcast", '{"broadcast": 1}'))
        if "result" in message:
            return message["result"]


# --- Addresses (S1) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/parties/unknown/x", 404),
        ("/parties/Gate/x", 404),
        ("/party/%00", 400),
        ("/party/%0a", 400),
        ("/party/%ff", 400),
        ("/party/%ED%A0%80", 400),
        ("/party/%zz", 400),
        ("/party/" + "a" * 513, 400),
        ("/party/" + "%C3%A9" * 257, 400),
        ("/party/", 404),
        ("/", 404),
        ("/party/x?_pk=", 400),
        ("/party/x?_pk=" + "a" * 129, 400),
        ("/party/x?_pk=a&_pk=a", 400),
        ("/party/x?_pk=%07", 400),
    ],
)
def test_addresses_that_are_none(instance, path, status):
    """S1, S10: 404 for an unknown party, 400 for a bad room or connection id."""
    assert instance.refused(path).status == status


@pytest.mark.parametrize(
    "name", ["a" * 512, "%C3%A9" * 256, "..", "%2e%2e%2f", "%2F", "a%20b", "';%20--", "%E2%82%AC", "%41"]
)
def test_room_ids_are_any_text(instance, name):
    """S1: 1 to 512 bytes of UTF-8; slashes and dots in it are nothing special."""
    from urllib.parse import unquote

    with instance.connect(f"/party/{name}?_pk=x") as client:
        assert ask(client, "list") == ["x"]
        assert unquote(name) in {each["room"] for each in instance.broker.connections(party="main")}


# --- Before-hooks (S9) ------------------------------------------------------------------------------


@pytest.mark.parametrize("party", ["gate", "plain-gate"])
@pytest.mark.parametrize(
    ("do", "status", "body"),
    [
        ("response", 418, b"not today"),
        ("tuple", 409, b'{"why":"json"}\n'),
        ("refuse", 401, b"who are you?\n"),
        ("bare", 403, b""),
        ("raise", 500, b"internal server error\n"),
        ("exit", 500, b"internal server error\n"),
        ("garbage", 500, b"internal server error\n"),
        ("status", 500, b"internal server error\n"),
        ("informal", 500, b"internal server error\n"),
        ("headers", 500, b"internal server error\n"),
        ("control", 500, b"internal server error\n"),
    ],
)
def test_a_before_hook_refuses(instance, room, party, do, status, body):
    """S9: with its own answer; any other exception is 500 without details; nothing is constructed (S2)."""
    answer = instance.refused(f"/parties/{party}/{room}?do={do}")
    assert (answer.status, answer.body.replace(b" ", b"")) == (status, body.replace(b" ", b""))
    if do in ("response", "tuple"):
        assert answer.headers["x-why"]
    assert not instance.constructed(room)
    assert not instance.broker.connections(party=party, room=room)
    with instance.connect(f"/parties/{party}/{room}") as client:
        assert client.receive() == "nobody"
    instance.unharmed()


def test_a_failing_before_hook_is_logged_with_its_traceback(instance, room):
    """S9: in the log, not to the client."""
    answer = instance.refused(f"/parties/gate/{room}?do=raise")
    assert b"secret" not in answer.body
    eventually(
        lambda: any(
            room in json.dumps(each) and "secret in a traceback" in json.dumps(each)
            for each in instance.broker.log_events()
        ),
        "traceback in the log",
    )


@pytest.mark.parametrize("party", ["gate", "plain-gate"])
@pytest.mark.parametrize(("do", "seen"), [("user", "ann"), ("returned", "bob"), ("nothing", "nobody")])
def test_headers_that_a_before_hook_adds_are_seen_in_the_connect_turn(instance, room, party, do, seen):
    """S9: whether the request is returned or nothing."""
    with instance.connect(f"/parties/{party}/{room}?do={do}") as client:
        assert client.receive() == seen


def test_a_before_hook_that_never_answers_ends_with_the_turn_timeout(instance, room):
    """S9, S20: 500, and the next client is not concerned."""
    assert instance.refused(f"/parties/endless/{room}").status == 500


def test_a_client_that_leaves_during_the_before_hook(instance, room):
    """S9, S14: it was never a connection: no turn of it comes."""
    with RawClient(instance.broker.port) as client:
        client.send_handshake(f"/parties/gate/{room}?hold=1")
        port = client.local_port
        eventually(
            lambda: instance.broker.unread_bytes(port) > 0, "the request, which is unread till it is in"
        )
        client.reset()
    with instance.connect(f"/parties/gate/{room}") as client:
        assert client.receive() == "nobody"
        (instance.broker.folder / "let-in").touch()
    assert len(instance.closed(room)) == 1
    assert 1 <= instance.constructed(room) <= 2  # by one connect turn and one close turn


# --- The connect turn (S9) --------------------------------------------------------------------------


def registered(instance, room: str) -> int:
    """How many connections of a room the registry holds, read past the gateway."""
    database = sqlite3.connect(f"file:{instance.broker.data / 'registry.db'}?mode=ro", uri=True)
    try:
        [(count,)] = database.execute("select count(*) from connections where room = ?", (room,))
        return int(count)
    finally:
        database.close()


def test_an_open_client_is_a_stored_client(instance, room):
    """S9: the row is committed when the 101 has come, though the connect turn has not ended."""
    with contextlib.ExitStack() as stack:
        for number in range(1, 10):
            stack.enter_context(instance.connect(f"/parties/welcome/{room}?wait=0.1"))
            assert registered(instance, room) == number
    instance.closed(room, 9)
    eventually(lambda: registered(instance, room) == 0, "an empty registry")


@pytest.mark.parametrize("query", ["do=raise", "tags=many", "tags=str", "tags=empty"])
def test_a_failing_connect_turn_closes_1011(instance, room, query):
    """S9: without details; nothing of the turn is seen; its close turn comes all the same (S14)."""
    with instance.connect(f"/parties/welcome/{room}?{query}") as client:
        assert client.expect_close() == (1011, "")
        client.send_frame(CLOSE, b"\x03\xf3")
        assert client.at_eof()
    [event] = instance.closed(room)
    assert (event["code"], event["cause"]) == (1011, "server_close")


def test_tags_at_the_limit_are_given(instance, room):
    """S11: 64, repetitions folded before they are counted."""
    with instance.connect(f"/parties/welcome/{room}?tags=fit") as client:
        assert client.receive() == "first"
        assert json.loads(client.receive())[2] == [f"t{n}" for n in range(64)]


def test_frames_of_the_connect_turn_come_first(instance, room):
    """S9: frames that were sent right behind the handshake wait for its end, and are not lost."""
    with RawClient(instance.broker.port) as client:
        client.send_bytes(
            f"GET /parties/welcome/{room}?wait=0.3&_pk=me HTTP/1.1\r\nHost: h:{instance.broker.port}\r\n"
            "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
            + encode_frame(TEXT, b"1")
            + encode_frame(PING, b"early")
            + encode_frame(TEXT, b"2")
        )
        assert client.receive_answer().status == 101
        client.send("3")
        assert client.receive() == "first"
        name, uri, tags, state = json.loads(client.receive())
        assert (name, tags, state) == ("me", ["guest"], None)
        assert uri.endswith(f"/parties/welcome/{room}?wait=0.3&_pk=me")
        assert json.loads(client.receive()) == ["me"]  # listed in its own connect turn
        frames = [client.receive_frame() for _ in range(4)]
        assert (PONG, b"early") in frames
        assert [data for opcode, data in frames if opcode == TEXT] == [b"echo 1", b"echo 2", b"echo 3"]


@pytest.mark.parametrize("wait", [0, 0.3])
@pytest.mark.parametrize("party", ["gate", "welcome"])
def test_a_client_that_says_all_at_once_and_leaves(instance, room, party, wait):
    """S9, S14: handshake, message, Close and FIN at once: the message is handled, the close is clean."""
    client = RawClient(instance.broker.port)
    client.send_bytes(
        f"GET /parties/{party}/{room}?wait={wait} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        + encode_frame(TEXT, b"hello")
        + encode_frame(CLOSE, b"\x0f\xa1bye")
    )
    client.shutdown()
    answer = client.receive_answer()
    assert answer.status == 101
    messages = []
    while (frame := client.receive_frame())[0] == TEXT:
        messages.append(frame[1])
    assert messages[-1] == (b"hello again" if party == "gate" else b"echo hello")
    assert frame == (CLOSE, b"\x0f\xa1bye")
    assert client.at_eof()
    client.close()
    [event] = instance.closed(room)
    assert (event["code"], event["reason"], event["clean"], event["cause"]) == (
        4001,
        "bye",
        True,
        "client_close",
    )


def test_a_close_in_the_connect_turn(instance, room):
    """S14, S18: what was sent before it arrives before it."""
    with instance.connect(f"/parties/welcome/{room}?do=close") as client:
        client.send("for nobody")
        assert client.receive() == "first"
        assert client.receive() == "second"
        assert client.expect_close() == (4001, "go away")
        client.send_frame(CLOSE, b"\x0f\xa1")
        assert client.at_eof()
    [event] = instance.closed(room)
    assert (event["code"], event["reason"], event["clean"], event["cause"]) == (
        4001,
        "go away",
        True,
        "server_close",
    )


# --- Ids (S10) --------------------------------------------------------------------------------------


def test_ids_are_given_or_fresh(instance, room):
    """S10: up to 128 printable characters; else one of 128 bits."""
    longest = "%C3%A9" * 128
    with (
        instance.connect(f"/party/{room}?_pk={longest}") as first,
        instance.connect(f"/party/{room}") as second,
        instance.connect(f"/party/{room}") as third,
    ):
        names = ask(first, "list")
        assert names[0] == "é" * 128
        assert len({*names}) == 3
        assert all(len(name) >= 22 for name in names[1:])
        assert ask(second, "find", id=names[0])[0] == "é" * 128
        assert ask(third, "find", id="nobody") is None


def test_one_id_in_two_rooms(instance, room):
    """S10: ids name connections within a room."""
    with instance.connect(f"/party/{room}?_pk=x") as one, instance.connect(f"/party/{room}-b?_pk=x") as other:
        assert ask(one, "list") == ask(other, "list") == ["x"]


@pytest.mark.parametrize("life", ["pong", "message"])
def test_a_newcomer_with_the_id_of_a_living_one_is_closed_4409(instance, room, life):
    """S10: the first is pinged; any sign of life of it counts."""
    with instance.connect(f"/parties/patiently-probed/{room}?_pk=x") as first:
        with RawClient(instance.broker.port) as second:
            second.send_handshake(f"/parties/patiently-probed/{room}?_pk=x")
            opcode, payload = first.receive_frame()
            assert opcode == PING
            assert second.is_silent(0.1)
            if life == "pong":
                first.send_frame(PONG, payload)
            else:
                first.send("alive")
                first.receive()
            assert second.receive_answer().status == 101
            code, _ = second.expect_close()
            assert code == 4409
            second.send_frame(CLOSE, b"\x11\x39")
            assert second.at_eof()
        first.send("still here")
        assert json.loads(first.receive()) == [True, ["kept"], "kept", 1]
    assert len(instance.closed(room)) == 1


def test_a_newcomer_replaces_one_that_does_not_answer(instance, room):
    """S10: after probe_seconds; the first's own close turn comes once and takes nothing from the newcomer."""
    with instance.connect(f"/parties/probed/{room}?_pk=x") as first:
        started = time.monotonic()
        with instance.connect(f"/parties/probed/{room}?_pk=x") as second:
            assert time.monotonic() - started >= 0.4
            assert first.receive_frame()[0] == PING
            assert first.expect_close()[0] == 4409
            assert first.at_eof()
            [event] = instance.closed(room)
            assert (event["id"], event["cause"], event["code"]) == ("x", "replaced", 4409)
            assert (event["tags"], event["state"]) == (["kept"], "kept")
            second.send("?")
            assert json.loads(second.receive()) == [True, ["kept"], "kept", 1]
    assert len(instance.closed(room, 2)) == 2


@pytest.mark.parametrize("end", ["close", "reset", "frame"])
def test_a_probed_connection_that_ends_makes_room_at_once(instance, room, end):
    """S10: its end is no sign of life, and nobody waits for the deadline."""
    first = instance.connect(f"/parties/patiently-probed/{room}?_pk=x")
    with RawClient(instance.broker.port) as second:
        second.send_handshake(f"/parties/patiently-probed/{room}?_pk=x")
        assert first.receive_frame()[0] == PING
        if end == "frame":
            # A frame is a sign of life, and this one says that it is the last.
            first.send_frame(CLOSE, b"\x03\xe8")
            assert second.receive_answer().status == 101
            first.close()
            return
        first.reset() if end == "reset" else first.close()
        assert second.receive_answer().status == 101
        second.send("?")
        assert json.loads(second.receive()) == [True, ["kept"], "kept", 1]
    assert len(instance.closed(room, 2)) == 2


def test_a_client_that_comes_back_at_once(instance, room):
    """S10: as partysocket does; the old socket's end may be seen before or after the new request."""
    client = instance.connect(f"/parties/patiently-probed/{room}?_pk=x")
    for number in range(30):
        client.reset() if number % 2 else client.close()
        client = instance.connect(f"/parties/patiently-probed/{room}?_pk=x")
    client.send("?")
    assert json.loads(client.receive()) == [True, ["kept"], "kept", 1]
    client.close()
    instance.closed(room, 31)


def test_many_newcomers_for_one_dead_id(instance, room):
    """S10: one of them gets it, whichever the gateway saw first."""
    with instance.connect(f"/parties/probed/{room}?_pk=x"), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(instance.broker.port)) for _ in range(5)]
        for client in clients:
            client.send_handshake(f"/parties/probed/{room}?_pk=x")
        winners = []
        for client in clients:
            assert client.receive_answer().status == 101
            client.send("?")
            opcode, payload = client.receive_frame()
            if opcode == PING:  # somebody else has asked for it meanwhile
                opcode, payload = client.receive_frame()
            if opcode == TEXT:
                winners.append(json.loads(payload))
            else:
                assert (opcode, payload[:2]) == (CLOSE, b"\x11\x39")
        assert winners == [[True, ["kept"], "kept", 1]]
    instance.closed(room, 2)


def test_the_policies_replace_and_refuse(instance, room):
    """S10: without asking."""
    with instance.connect(f"/parties/replaced/{room}?_pk=x") as first:
        with instance.connect(f"/parties/replaced/{room}?_pk=x") as second:
            assert first.expect_close()[0] == 4409
            second.send("?")
            assert json.loads(second.receive()) == [True, ["kept"], "kept", 1]
            assert instance.closed(room)[0]["cause"] == "replaced"
    with instance.connect(f"/parties/refused/{room}-r?_pk=x") as first:
        with instance.connect(f"/parties/refused/{room}-r?_pk=x") as second:
            assert second.expect_close()[0] == 4409
        first.send("?")
        assert json.loads(first.receive()) == [True, ["kept"], "kept", 1]


# --- Tags (S11) -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fits"), [(63, True), (64, True), (65, False)])
def test_the_number_of_tags(instance, room, count, fits):
    """S11: one below the limit, at it, above it; above it nothing is changed."""
    tags = [f"t{n}" for n in range(count)]
    with instance.connect(f"/party/{room}") as client:
        result = ask(client, "tag", add=tags + tags)
        if fits:
            assert result == tags
        else:
            assert result[0] == "LimitExceeded"
            assert ask(client, "tag") == []


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("a" * 255, True),
        ("a" * 256, True),
        ("a" * 257, False),
        ("é" * 128, True),
        ("é" * 128 + "a", False),
        ("", False),
    ],
)
def test_the_size_of_a_tag(instance, room, tag, fits):
    """S11: 1 to 256 bytes of UTF-8."""
    with instance.connect(f"/party/{room}") as client:
        result = ask(client, "tag", add=[tag])
        assert (result == [tag]) is fits
        assert ask(client, "tag") == ([tag] if fits else [])
        assert ask(client, "count", tag=tag or "x") == int(fits)


def test_tags_come_and_go(instance, room):
    """S11: in their order; what is there already stays where it is; what is not there cannot go."""
    with instance.connect(f"/party/{room}?tag=a&tag=b&tag=a") as client:
        assert ask(client, "tag", add=["c", "a"]) == ["a", "b", "c"]
        assert ask(client, "tag", remove=["b", "x"]) == ["a", "c"]
        assert ask(client, "tag", add=["'; drop table tags --", "%", "_"]) == [
            "a",
            "c",
            "'; drop table tags --",
            "%",
            "_",
        ]
        assert ask(client, "count", tag="%") == 1
        assert ask(client, "count", tag="x") == 0


def test_filters(instance, room):
    """S11, S12: a tag, all_of, any_of, none_of, together, for lists, counts and broadcasts alike."""
    tags = [(), ("a",), ("b",), ("a", "b"), ("a", "b", "c"), ("c",)]
    clients = []
    for number, each in enumerate(tags):
        query = "&".join([f"_pk={number}", *[f"tag={tag}" for tag in each]])
        clients.append(instance.connect(f"/party/{room}?{query}"))
    asker = clients[0]
    filters: list[dict[str, Any]] = [
        {},
        {"tag": "a"},
        {"all_of": ["a", "b"]},
        {"any_of": ["a", "c"]},
        {"none_of": ["a"]},
    ]
    filters += [{"tag": "a", "none_of": ["b"]}, {"all_of": ["a"], "any_of": ["b", "c"], "none_of": ["c"]}]
    filters += [{"any_of": []}, {"tag": "x"}, {"none_of": ["x"]}, {"all_of": "c"}]
    for criteria in filters:
        wanted = {*criteria.get("all_of", ()), *([criteria["tag"]] if "tag" in criteria else [])}
        expected = [
            str(number)
            for number, each in enumerate(tags)
            if wanted <= {*each}
            and (not criteria.get("any_of") or {*criteria["any_of"]} & {*each})
            and not {*criteria.get("none_of", ())} & {*each}
        ]
        assert ask(asker, "list", **criteria) == expected
        assert ask(asker, "count", **criteria) == len(expected)
        assert ask(asker, "broadcast", without=["4"], **criteria) == "done"
        for number, client in enumerate(clients[1:], 1):
            client.send(json.dumps({"do": "count"}))
            message = client.receive()
            got = message == "broadcast"
            if got:
                message = client.receive()
            assert json.loads(message) == {"result": 6}
            assert got == (str(number) in expected and number != 4), criteria
    for client in clients:
        client.close()


# --- Listing (S12) ----------------------------------------------------------------------------------


def test_listing_more_than_one_page(instance, room):
    """S12: in the order of acceptance, over pages, with the turn's own and earlier staged changes."""
    names = [f"{number * 7919 % 1000:03}" for number in range(600)]
    clients = {
        name: instance.connect(f"/party/{room}?_pk={name}" + ("&tag=even" if int(name) % 2 == 0 else ""))
        for name in names
    }
    try:
        asker = clients[names[0]]
        assert ask(asker, "list") == names
        even = [name for name in names if int(name) % 2 == 0]
        assert ask(asker, "list", tag="even") == even
        odd = [name for name in names if int(name) % 2]
        tagged, untagged, closed = odd[10:60:7], even[::50], [even[5], odd[11], odd[10]]
        listed, count, others, gone = ask(
            asker, "edit_and_list", tagged=tagged, untagged=untagged, closed=closed, tag="even"
        )
        now = [
            name
            for name in names
            if name not in closed and (name in tagged or (name in even and name not in untagged))
        ]
        assert listed == now
        assert count == len(now)
        assert others == len(names) - len(closed) - len(now)
        assert gone == [True] * 3
        for name in closed:
            assert clients[name].expect_close() == (4000, "by list")
            clients.pop(name).close()
        assert ask(asker, "list", tag="even") == now
        assert ask(asker, "count") == 597
        instance.closed(room, 3)
        gone_names = [clients.pop(name) for name in names[100:110] if name in clients]
        for client in gone_names:
            client.close()
        eventually(lambda: ask(asker, "count") == 597 - len(gone_names), "the end of those that left")
        assert ask(asker, "list") == [name for name in names if name in clients]
    finally:
        for client in clients.values():
            client.close()


def test_a_failed_turn_changes_nothing(instance, room):
    """S20: tags, state, close and broadcast of a turn that raises, even SystemExit."""
    with instance.connect(f"/party/{room}?_pk=x&tag=t") as client:
        client.send(json.dumps({"do": "fail_after_edits"}))
        assert ask(client, "find", id="x") == ["x", ["t"], None]
    instance.unharmed()


# --- State (S13) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fits"), [(16 * 1024 - 4, True), (16 * 1024 - 3, True), (16 * 1024 - 2, False)]
)
def test_the_size_of_a_state(instance, room, size, fits):
    """S13: checked before it changes anything. A CBOR byte string of this size takes three bytes more."""
    with instance.connect(f"/party/{room}") as client:
        assert ask(client, "state", value="old") == "set"
        result = ask(client, "state", size=size)
        assert (result == "set") is fits
        assert ask(client, "read") == (size if fits else "old")


def test_a_state_lives_as_long_as_its_connection(instance, room):
    """S8, S13: over hibernation; readable in the close turn, and gone after it."""
    with instance.connect(f"/party/{room}?_pk=x") as client:
        assert ask(client, "read") is None
        assert ask(client, "count_up") == 2
        assert ask(client, "count_up") == 4
        assert ask(client, "bad_state")[0] == "ValueEncodingError"
        assert ask(client, "read") == 4
    assert instance.constructed(room) >= 4  # each message woke it anew
    [event] = instance.closed(room)
    assert event["state"] == 4
    with instance.connect(f"/party/{room}?_pk=x") as client:
        assert ask(client, "read") is None


# --- Sending and subprotocols (S17, S18) ------------------------------------------------------------


def test_what_send_takes(instance, room):
    """S18: text, bytes, or anything else as JSON."""
    with instance.connect(f"/party/{room}") as client:
        client.send(json.dumps({"do": "types"}))
        got = [client.receive() for _ in range(8)]
        assert got == ["text", b"bytes", b"array", '{"a":[1,null]}', '["é"]', "7", "null", "true"]


def test_sending_after_the_own_close_raises(instance, room):
    """S18: and what was sent before arrives."""
    with instance.connect(f"/party/{room}") as client:
        client.send(json.dumps({"do": "send_after_close"}))
        assert client.receive() == "before"
        assert client.expect_close() == (4002, "closed in turn")
    eventually(lambda: instance.events(room, "send after close"), "the error")
    assert instance.events(room, "send after close")[0]["error"] == "ConnectionClosedError"


def test_sending_to_one_that_has_gone_is_dropped_and_counted(instance, room):
    """S18."""
    with instance.connect(f"/party/{room}?_pk=a") as client:
        other = instance.connect(f"/party/{room}?_pk=b")
        stats = instance.broker.stats
        eventually(lambda: stats()["connections"] == 2, "the end of all that were before")
        before = stats()["missed_sends"]
        client.send(json.dumps({"do": "send_to", "id": "b"}))
        eventually(lambda: instance.events(room, "found"), "the other")
        other.close()
        eventually(lambda: stats()["connections"] == 1, "its end")
        (instance.broker.folder / "gone").touch()
        assert json.loads(client.receive()) == {"result": "sent"}
        eventually(lambda: stats()["missed_sends"] == before + 1, "the send to nobody")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1004, ""),
        (1005, ""),
        (1006, ""),
        (1015, ""),
        (999, ""),
        (5000, ""),
        (1016, ""),
        (2000, ""),
        (4000, "x" * 124),
        (4000, "é" * 62),
    ],
)
def test_closes_that_may_not_be_sent(instance, room, code, reason):
    """S14: an error where it is made."""
    with instance.connect(f"/party/{room}") as client:
        assert ask(client, "bad_close", code=code, reason=reason)[0] == "ValueError"


@pytest.mark.parametrize(
    ("party", "offered", "chosen"),
    [
        ("subprotocols", "v1, v2", "v2"),
        ("subprotocols", "v1", "v1"),
        ("subprotocols", "v3", None),
        ("subprotocols", None, None),
        ("main", "x, y", "x"),
        ("main", None, None),
    ],
)
def test_subprotocols(instance, room, party, offered, chosen):
    """S17: the party's first that is offered; with none set the first offered."""
    with RawClient(instance.broker.port) as client:
        client.send_handshake(f"/parties/{party}/{room}", {"sec-websocket-protocol": offered})
        answer = client.receive_answer()
        assert answer.status == 101
        assert answer.headers.get("sec-websocket-protocol") == chosen


# --- Who is constructed (S2, S3) --------------------------------------------------------------------


def test_only_events_that_have_a_hook_construct_a_room(instance, room):
    """S2: connects, closes, pings and questions wake nobody where no hook wants them."""
    broker = instance.broker
    with instance.connect(f"/parties/only-messages/{room}") as client:
        client.send_frame(PING, b"x")
        assert client.receive_frame() == (PONG, b"x")
        broker.connections(party="only-messages")
        broker.ask("rooms")
        assert instance.constructed(room) == 0
        client.send_bytes(encode_frame(TEXT, b"1") + encode_frame(TEXT, b"2"))
        assert client.receive() == "1"
        assert client.receive() == "2"
        assert instance.constructed(room) == 1  # S3: the second one waited for on_start
        assert len(instance.events(room, "started")) == 1
    eventually(lambda: not broker.connections(party="only-messages", room=room), "its end")
    assert instance.constructed(room) == 1


def test_messages_that_nobody_wants_construct_nothing(instance, room):
    """S2: they are consumed all the same."""
    with instance.connect(f"/parties/only-closes/{room}") as client:
        for _ in range(100):
            client.send(b"x" * 2000)
        client.send_frame(PING, b"all read")
        assert client.receive_frame() == (PONG, b"all read")
        # The pong leaves within the pass at whose end all that was read is consumed.
        eventually(lambda: instance.broker.unread_bytes(client.local_port) == 0, "nothing unread")
        assert instance.constructed(room) == 0
    instance.closed(room)
    assert instance.constructed(room) == 1


def test_a_party_without_hooks(instance, room):
    """S2: connections come and go."""
    with instance.connect(f"/parties/nothing/{room}") as client:
        client.send("hello")
        client.send_frame(CLOSE, b"\x03\xe8")
        assert client.expect_close() == (1000, "")
        assert client.at_eof()
    with RawClient(instance.broker.port) as client:
        client.send_bytes(f"GET /parties/nothing/{room} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert client.receive_answer().status == 404
    assert instance.constructed(room) == 0


def test_tags_and_state_outlive_the_host(broker):
    """S13, S14: kill -9 of the host costs neither; a client that left meanwhile gets its close turn, once."""
    instance = Instance(broker(APP))
    with instance.connect("/party/r?_pk=a&tag=t") as client:
        leaver = instance.connect("/party/r?_pk=b&tag=t")
        assert ask(client, "state", value={"n": 1}) == "set"
        assert ask(leaver, "state", value="left") == "set"
        instance.broker.kill_host(wait_for_next=False)
        leaver.close()
        instance.broker.wait_for_hosts(1, without=instance.hosts)
        assert ask(client, "find", id="a") == ["a", ["t"], {"n": 1}]
        [event] = instance.closed("r")
        assert (event["id"], event["state"], event["tags"], event["cause"]) == (
            "b",
            "left",
            ["t"],
            "client_gone",
        )
        instance.broker.kill_host()
        assert ask(client, "list", tag="t") == ["a"]
    instance.closed("r", 2)
