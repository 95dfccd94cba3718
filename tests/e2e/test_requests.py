"""HTTP to rooms of the running broker: methods, bodies, streams, refusals, clients and hosts that leave
(S9, S26).
"""

import contextlib
import http.client
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient

pytestmark = pytest.mark.e2e

BODY_BYTES = 64 * 1024

APP = """
    import os
    import sys
    from pathlib import Path

    import trio
    from broker import Refuse, Request, Response, Server
    from quart import abort

    FOLDER = Path(__file__).parent

    async def gone(name):
        while (FOLDER / name).exists():
            await trio.sleep(0.01)

    class Main(Server):
        async def on_request(self, request):
            return {
                "method": request.method, "rest": request.rest, "path": request.path,
                "query": request.args.to_dict(flat=False), "room": self.room.id,
                "body": (await request.get_data()).decode("latin-1"),
                "type": request.headers.get("content-type"),
                "ours": [name for name, _ in request.headers if name.lower().startswith("x-broker")],
            }

        @staticmethod
        async def on_fetch(request, lobby):
            if request.path == "/raise":
                raise ValueError("secret of on_fetch")
            if request.path == "/nothing":
                return None
            if request.path == "/hold":
                await gone("hold-fetch")
            if request.path == "/stream":
                return stream()
            return f"{request.method} {request.path} {lobby.id} {lobby.party}"

    async def stream():
        yield "a"
        await trio.sleep(0.01)
        yield b"b"

    class Answers(Server):
        '''Answers as its sub-path says.'''

        async def on_request(self, request):
            self.room.storage.put("last", request.rest)
            match request.rest[1:]:
                case "json":
                    data = await request.get_json()
                    return {"got": data}
                case "tuple":
                    return "made", 201, {"X-Made": "yes"}
                case "status":
                    return "", 204
                case "response":
                    return Response(b"bytes", status=202, headers={"X-A": "1"})
                case "none":
                    return None
                case "abort":
                    self.room.broadcast("discarded")
                    abort(404)
                case "refuse":
                    raise Refuse(402, "pay first")
                case "raise":
                    self.room.broadcast("discarded")
                    raise ValueError("a secret")
                case "exit":
                    sys.exit(1)
                case "last":
                    return await self.room.storage.get("before", "nothing")
                case "bad-header":
                    return "x", 200, {"X-Bad": "\\u4f60"}
                case "bad-status":
                    return "x", 42
                case "number":
                    return 5
                case "empty":
                    return ""
                case "large":
                    return b"x" * 5_000_000

        def on_error(self, connection, error):
            assert connection is None
            self.room.storage.put("before", type(error).__name__)

    class Streams(Server):
        '''Answers in pieces.'''

        async def on_request(self, request):
            self.room.storage.put("began", 1)
            self.room.broadcast("turn " + request.rest)
            match request.rest[1:]:
                case "async":
                    return self.pieces(5)
                case "sync":
                    return (f"{number} " for number in range(5))
                case "large":
                    return self.large()
                case "endless":
                    return self.endless()
                case "raises":
                    return self.raises(ValueError("a secret"))
                case "exits":
                    return self.raises(SystemExit(3))
                case "raises-first":
                    return self.raises_first()
                case "wrong":
                    return self.wrong()
                case "empty":
                    return self.pieces(0)
                case "empty-pieces":
                    return (piece for piece in ["", "a", b"", "b", ""])
                case "closes-badly":
                    return self.closes_badly()
                case "looks":
                    return self.looks()
                case "headers":
                    return self.pieces(1), 203, {"X-Stream": "yes", "Content-Type": "text/event-stream"}

        async def pieces(self, count):
            for number in range(count):
                await trio.sleep(0.005)
                yield f"{number} "

        async def large(self):
            for number in range(400):
                yield bytes([number % 256]) * 50_000

        async def endless(self):
            try:
                (FOLDER / "streaming").touch()
                while True:
                    yield b"x" * 10_000
                    await trio.sleep(0.005)
            finally:
                (FOLDER / "streaming").unlink()

        async def raises(self, error):
            yield "first "
            await trio.sleep(0.01)
            raise error

        async def raises_first(self):
            raise ValueError("a secret")
            yield

        async def wrong(self):
            yield 5

        async def looks(self):
            '''What is to be seen while another turn is under way.'''
            await gone("hold-look")
            found = await self.room.storage.list()
            yield str([found, await self.room.storage.get("staged")])
            try:
                self.room.broadcast("from nowhere")
            except Exception as error:
                yield type(error).__name__

        async def closes_badly(self):
            try:
                yield "all"
            finally:
                raise SystemExit(3)

        async def on_message(self, message, sender):
            if message == "stage":
                self.room.storage.delete_all()
                self.room.storage.put("staged", 1)
                (FOLDER / "staged").touch()
                await gone("hold-stage")
                raise ValueError("discarded")
            sender.send(message)

        def on_error(self, connection, error):
            self.room.broadcast("discarded")

    class Holding(Server):
        '''Turns that last until they may end.'''

        turn_timeout = 20

        async def on_request(self, request):
            self.room.storage.put("seen", await self.room.storage.get("seen", 0) + 1)
            name = f"hold-{self.room.id}"
            (FOLDER / f"in-{self.room.id}").touch()
            try:
                await gone(name)
            finally:
                (FOLDER / f"in-{self.room.id}").unlink()
            self.room.broadcast("done")
            return str(await self.room.storage.get("seen"))

        def on_message(self, message, sender):
            sender.send(message)

        def on_error(self, connection, error):
            self.room.broadcast("on_error")

    class Before(Server):
        '''Hooks before the room.'''

        @staticmethod
        async def on_before_request(request, lobby):
            match request.rest[1:]:
                case "refuse":
                    raise Refuse(401, "who are you?")
                case "return":
                    return "instead", 418
                case "response":
                    return Response("no", status=403, headers={"X-Why": "because"})
                case "stream":
                    return stream()
                case "raise":
                    raise ValueError("a secret")
                case "exit":
                    sys.exit(1)
                case "abort":
                    abort(410)
                case "change":
                    request.headers["X-User"] = "ann"
                    request.headers["X-Broker-User"] = "trusted"
                case "changed":
                    request.headers["X-User"] = "bob"
                    return request
                case "unsendable":
                    request.headers["X-User"] = "\\u4f60"
                case "forever":
                    await trio.sleep_forever()
                case "wait":
                    await trio.sleep(0.05)
                case "wrong":
                    return object()
                case "body":
                    request.headers["X-Size"] = str(len(await request.get_data()))
                case "hold":
                    await gone("hold-before")
                case "lobby":
                    return [lobby.id, lobby.party, "HOME" in lobby.env]

        async def on_request(self, request):
            return dict(request.headers) | {"body": (await request.get_data()).decode(), "rest": request.rest}

    class BeforeInHaste(Before):
        turn_timeout = 0.5

    class BeforeUpgrade(Server):
        @staticmethod
        def on_before_connect(request, lobby):
            match request.rest[1:]:
                case "stream":
                    return stream()
                case "raising-stream":
                    return raising()
                case "unsendable":
                    request.headers["X-User"] = "\\u4f60"

        def on_message(self, message, sender):
            sender.send(message)

    async def raising():
        yield "x"
        raise ValueError("a secret")

    class Both(Server):
        '''One state for both kinds of visitors.'''

        async def on_message(self, message, sender):
            self.room.storage.put("value", message)
            sender.send("stored")

        async def on_request(self, request):
            if request.method == "POST":
                value = (await request.get_data()).decode()
                self.room.storage.put("value", value)
                self.room.broadcast(f"posted {value}")
                return "stored"
            return await self.room.storage.get("value", "none")

    class Deaf(Server):
        '''Answers no requests.'''

        def on_message(self, message, sender):
            sender.send(message)
"""

numbers = itertools.count()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Instance:
    """The broker, with what these tests ask it."""

    def __init__(self, process: BrokerProcess) -> None:
        self.process = process
        self._closing = contextlib.ExitStack()

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=40)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def later(self, method: str, path: str) -> "Later":
        return Later(self, method, path)

    def open(self, path: str) -> socket.socket:
        """Send a GET and leave the answer to the test."""
        sock = socket.create_connection(("127.0.0.1", self.process.port), 20)
        self._closing.callback(sock.close)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.process.port}\r\n\r\n".encode())
        return sock

    def leave(self, sock: socket.socket) -> None:
        """Hang up, and wait until the gateway has done so too: it tells the host before."""
        here, there = f":{self.process.port:04X}", f":{sock.getsockname()[1]:04X}"
        sock.close()

        def is_held() -> bool:
            table = Path("/proc/net/tcp").read_text().splitlines()[1:]
            ends = [line.split()[1:3] for line in table if here in line and there in line]
            return any(local.endswith(here) and remote.endswith(there) for local, remote in ends)

        eventually(lambda: not is_held(), "the gateway's end of the connection")

    def connect(self, party: str, room: str) -> RawClient:
        client = self.process.connect(f"/parties/{party}/{room}")
        self._closing.callback(client.close)
        return client

    def file(self, name: str) -> Any:
        return self.process.folder / name

    def hold(self, name: str) -> None:
        self.file(name).touch()
        self._closing.callback(self.release, name)

    def release(self, name: str) -> None:
        self.file(name).unlink(missing_ok=True)

    def end(self) -> None:
        self._closing.close()


class Later:
    """A request whose answer is awaited in a thread."""

    def __init__(self, instance: Instance, method: str, path: str) -> None:
        self._reply: Reply | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(instance, method, path))
        self._thread.start()

    def _run(self, instance: Instance, method: str, path: str) -> None:
        try:
            self._reply = instance.ask(method, path)
        except BaseException as error:
            self._reply = error

    def waits(self, seconds: float) -> bool:
        """Whether there is no answer within so many seconds."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def reply(self) -> Reply:
        self._thread.join(60)
        assert isinstance(self._reply, Reply), self._reply
        return self._reply


@pytest.fixture(scope="module")
def process(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, request_bytes_max=BODY_BYTES)


@pytest.fixture
def instance(process: BrokerProcess) -> Iterator[Instance]:
    made = Instance(process)
    pids = process.host_pids()
    yield made
    made.end()
    if process.host_pids() != pids:  # a test that kills it says so by starting its own
        pytest.fail("the host has died")


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


# --- Requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_every_method_reaches_the_room(instance, room, method):
    """S26: with its sub-path, query and body."""
    body = None if method == "GET" else b"a body \xff"
    reply = instance.ask(method, f"/party/{room}/sub/p%C3%A4th%2Fx?a=1&a=2&b=%20", body)
    assert reply.status == 200
    seen = reply.json
    assert (seen["method"], seen["room"]) == (method, room)
    assert seen["path"] == f"/party/{room}/sub/päth/x"
    assert seen["rest"] == "/sub/päth/x"
    assert seen["query"] == {"a": ["1", "2"], "b": [" "]}
    assert seen["body"] == ("a body \xff" if body else "")


def test_head_is_answered_without_a_body(instance, room):
    """RFC 9110, section 9.3.2: the room is asked, whole or in pieces, and its body is left off."""
    for path in (f"/party/{room}", f"/parties/streams/{room}/async"):
        reply = instance.ask("HEAD", path)
        assert (reply.status, reply.body) == (200, b"")


def test_our_own_headers_are_not_a_client_s(instance, room):
    """S39."""
    reply = instance.ask("GET", f"/party/{room}", headers={"X-Broker-User": "root", "x-partykit-a": "b"})
    assert reply.json["ours"] == []


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_have_their_limit(instance, room, over, chunked):
    """S26: 413 beyond it, whether its length was said or not."""
    data = b"x" * (BODY_BYTES + over)
    body: Any = iter([data[:1000], data[1000:]]) if chunked else data
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        reply = instance.ask("POST", f"/party/{room}", body)
        assert reply.status == (413 if over > 0 else 200)
        if over <= 0:
            assert len(reply.json["body"]) == len(data)
        return
    assert over > 0


def test_requests_of_one_connection_are_answered_in_order(instance, room):
    """Kept alive, and pipelined."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", instance.process.port), 20)) as sock:
        for number in range(20):
            path = f"/party/{room}/{number}"
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{instance.process.port}\r\n\r\n".encode())
        received = b""
        while len(rests := re.findall(rb'"rest": ?"/(\d+)"', received)) < 20:
            piece = sock.recv(1 << 16)
            assert piece
            received += piece
    assert rests == [b"%d" % number for number in range(20)]


# --- What a room answers --------------------------------------------------------------------------


def test_answers_are_what_a_quart_view_may_return(instance, room):
    """S26."""
    base = f"/parties/answers/{room}"
    reply = instance.ask("POST", f"{base}/json", b'{"a": [1]}', {"Content-Type": "application/json"})
    assert (reply.status, reply.json) == (200, {"got": {"a": [1]}})
    assert reply.headers["content-type"] == "application/json"
    reply = instance.get(f"{base}/tuple")
    assert (reply.status, reply.text, reply.headers["x-made"]) == (201, "made", "yes")
    assert instance.get(f"{base}/status").status == 204
    reply = instance.get(f"{base}/response")
    assert (reply.status, reply.text, reply.headers["x-a"]) == (202, "bytes", "1")
    reply = instance.get(f"{base}/empty")
    assert (reply.status, reply.body) == (200, b"")
    assert len(instance.get(f"{base}/large").body) == 5_000_000


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("abort", None, 404, None),
        ("refuse", None, 402, None),
        ("json", b"{", 400, None),
        ("raise", None, 500, "ValueError"),
        ("exit", None, 500, "SystemExit"),
        ("none", None, 500, "TypeError"),
        ("number", None, 500, "TypeError"),
        ("bad-header", None, 500, "ValueError"),
        ("bad-status", None, 500, "ValueError"),
    ],
)
def test_a_request_that_fails_gets_a_status_and_no_details(instance, room, path, body, status, error):
    """S20, S26, S39: its turn is undone; only a failure is told to `on_error`, without a connection."""
    client = instance.connect("answers", room)
    headers = {"Content-Type": "application/json"} if body else {}
    reply = instance.ask("POST" if body else "GET", f"/parties/answers/{room}/{path}", body, headers)
    assert reply.status == status
    if path == "refuse":
        assert reply.text == "pay first\n"
    for secret in (b"secret", b"Traceback", b"app.py", b".venv", b"quart"):
        assert secret not in reply.body.lower()
    assert "server" not in reply.headers
    assert instance.get(f"/parties/answers/{room}/last").text == (error or "nothing")
    assert client.is_silent()


def test_dev_shows_the_traceback(own):
    """S9, S39: to whoever develops."""
    instance = own(command="dev")
    reply = instance.get("/parties/answers/r/raise")
    assert reply.status == 500
    assert b"a secret" in reply.body
    assert b"Traceback" in reply.body
    reply = instance.get("/parties/before/r/raise")
    assert reply.status == 500
    assert b"a secret" in reply.body


def test_what_answers_no_requests_is_not_found(instance, room):
    """A party without `on_request`, and none at all."""
    assert instance.get(f"/parties/deaf/{room}").status == 404
    assert instance.get(f"/parties/nobody/{room}").status == 404


# --- Before the room, and beside it ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("refuse", 401, b"who are you?\n"),
        ("return", 418, b"instead"),
        ("response", 403, b"no"),
        ("stream", 200, b"ab"),
        ("abort", 410, None),
        ("raise", 500, None),
        ("exit", 500, None),
        ("unsendable", 500, None),
        ("wrong", 500, None),
        ("forever", 500, None),
    ],
)
def test_a_before_hook_may_answer(instance, room, path, status, body):
    """S9: by what it returns or raises; anything unforeseen is 500 without details, and costs nobody else."""
    party = "before-in-haste" if path == "forever" else "before"
    reply = instance.get(f"/parties/{party}/{room}/{path}")
    assert reply.status == status
    assert body is None or reply.body == body
    assert b"secret" not in reply.body
    if path == "response":
        assert reply.headers["x-why"] == "because"
    assert instance.process.ask("rooms", party=party, room=room)["rooms"][0]["wakes"] == 0


def test_a_before_hook_may_change_the_headers(instance, room):
    """S9: also when nothing is returned; the body stays for the room."""
    base = f"/parties/before/{room}"
    seen = instance.ask("POST", f"{base}/change", b"body", {"X-Broker-User": "mallory"}).json
    assert (seen["x-user"], seen["x-broker-user"], seen["body"]) == ("ann", "trusted", "body")
    assert instance.get(f"{base}/changed").json["x-user"] == "bob"
    for path in ("other", "wait"):
        assert "x-user" not in instance.get(f"{base}/{path}").json
    seen = instance.ask("POST", f"{base}/body", b"12345").json
    assert (seen["x-size"], seen["body"], seen["rest"]) == ("5", "12345", "/body")
    assert instance.get(f"{base}/lobby").json == [room, "before", True]


@pytest.mark.parametrize(("path", "status"), [("stream", 200), ("raising-stream", 500), ("unsendable", 500)])
def test_a_before_hook_of_upgrades_that_answers_oddly(instance, room, path, status):
    """S9: whatever it is, the client gets an answer and the host goes on."""
    with RawClient(instance.process.port) as client:
        answer = client.handshake(f"/parties/before-upgrade/{room}/{path}", expect=status)
        assert answer.body == (b"ab" if status == 200 else b"internal server error\n")
    assert instance.connect("before-upgrade", room).is_silent()


def test_on_fetch_gets_what_belongs_to_no_room(instance):
    """S26: other paths; its errors are 500, nothing is 404."""
    assert instance.ask("PUT", "/some/where?x=1").text == "PUT /some/where None main"
    assert instance.get("/").text == "GET / None main"
    assert instance.get("/nothing").status == 404
    reply = instance.get("/raise")
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert instance.get("/stream").body == b"ab"
    assert instance.get("/party/").status == 200  # an empty room id is no room


# --- Streams --------------------------------------------------------------------------------------


def test_streamed_answers(instance, room):
    """S26: asynchronous and plain generators, headers, empty pieces; the turn's effects leave with the
    status line, and other turns go on while it streams.
    """
    client = instance.connect("streams", room)
    base = f"/parties/streams/{room}"
    assert instance.get(f"{base}/async").text == "0 1 2 3 4 "
    assert client.receive() == "turn /async"
    assert instance.get(f"{base}/sync").text == "0 1 2 3 4 "
    assert instance.get(f"{base}/empty").body == b""
    assert instance.get(f"{base}/empty-pieces").body == b"ab"
    reply = instance.get(f"{base}/headers")
    assert (reply.status, reply.headers["x-stream"]) == (203, "yes")
    assert reply.headers["content-type"] == "text/event-stream"
    large = instance.get(f"{base}/large").body
    assert large == b"".join(bytes([number % 256]) * 50_000 for number in range(400))


@pytest.mark.parametrize("path", ["raises", "exits", "raises-first", "wrong"])
def test_a_stream_that_fails_is_broken_off(instance, room, path):
    """S26, S39: the client sees that it is not whole, and nothing of the error; the host goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", instance.process.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", f"/parties/streams/{room}/{path}")
        body = b""
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            answer = connection.getresponse()
            while piece := answer.read1(1000):
                body += piece
    assert body == (b"first " if path in ("raises", "exits") else b"")
    client = instance.connect("streams", room)
    client.send("alive")
    assert client.receive() == "alive"
    eventually(lambda: not instance.process.ask("rooms", party="streams", room=room)["rooms"][0]["awake"])


def test_a_stream_whose_clean_up_fails(instance, room):
    """S26: its answer was whole; the host goes on."""
    with contextlib.suppress(http.client.HTTPException, ConnectionError):
        assert instance.get(f"/parties/streams/{room}/closes-badly").text == "all"
    client = instance.connect("streams", room)
    client.send("alive")
    assert client.receive() == "alive"


def test_a_stream_has_no_part_in_the_turns_that_run_beside_it(instance, room):
    """S20, S26: it reads what earlier turns have written, nothing that a turn may still discard, and stages
    nothing into it.
    """
    client = instance.connect("streams", room)
    instance.hold("hold-look")
    instance.hold("hold-stage")
    reply = instance.later("GET", f"/parties/streams/{room}/looks")
    assert client.receive() == "turn /looks"
    client.send("stage")
    eventually(instance.file("staged").exists)
    instance.release("hold-look")
    assert reply.reply().text == "[{'began': 1}, None]RoomGone"
    instance.release("hold-stage")
    assert client.receive() == "discarded"
    assert client.is_silent()


def test_a_client_that_leaves_ends_the_stream(instance, room):
    """S26: its clean-up runs, the room is let go; other turns of the room went on meanwhile (S7)."""
    client = instance.connect("streams", room)
    sock = instance.open(f"/parties/streams/{room}/endless")
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert client.receive() == "turn /endless"
    eventually(instance.file("streaming").exists)
    client.send("meanwhile")
    assert client.receive() == "meanwhile"
    assert instance.process.ask("rooms", party="streams", room=room)["rooms"][0]["awake"]
    sock.close()
    eventually(lambda: not instance.file("streaming").exists())
    eventually(lambda: not instance.process.ask("rooms", party="streams", room=room)["rooms"][0]["awake"])


def test_a_client_that_reads_slowly_holds_the_stream_back(instance, room):
    """S26: the room's code waits for it; the broker does not hold what it makes."""
    sock = instance.open(f"/parties/streams/{room}/large")
    before = _memory(instance)
    time.sleep(0.3)
    assert _memory(instance) - before < 15_000_000
    received = 0
    while received < 20_000_000:
        received += len(sock.recv(1 << 20))


def _memory(instance: Instance) -> int:
    total = 0
    for pid in [*instance.process.host_pids(), *instance.process.stats()["gateways"]]:
        with open(f"/proc/{pid}/statm") as file:
            total += int(file.read().split()[1]) * 4096
    return total


# --- Clients and hosts that leave -----------------------------------------------------------------


def test_a_client_that_leaves_cancels_its_turn(instance, room):
    """S26: nothing of the turn is kept, nobody is told an error; the room goes on at once."""
    client = instance.connect("holding", room)
    instance.hold(f"hold-{room}")
    sock = instance.open(f"/parties/holding/{room}")
    eventually(instance.file(f"in-{room}").exists)
    client.send("waits")
    sock.close()
    assert client.receive() == "waits"
    assert not instance.file(f"in-{room}").exists()
    instance.release(f"hold-{room}")
    assert instance.get(f"/parties/holding/{room}").text == "1"
    assert client.receive() == "done"


def test_a_client_that_leaves_before_its_turn_has_none(instance, room):
    """S26: its request waited behind another."""
    instance.hold(f"hold-{room}")
    first = instance.later("GET", f"/parties/holding/{room}")
    eventually(instance.file(f"in-{room}").exists)
    before = instance.process.stats()["requests"]
    sock = instance.open(f"/parties/holding/{room}")
    eventually(lambda: instance.process.stats()["requests"] > before)
    instance.leave(sock)
    last = instance.later("GET", f"/parties/holding/{room}")
    eventually(lambda: instance.process.stats()["requests"] > before + 1)
    instance.release(f"hold-{room}")
    assert [first.reply().text, last.reply().text] == ["1", "2"]


def test_a_client_that_leaves_during_the_before_hook(instance, room):
    """S26: the room is not woken for it."""
    instance.hold("hold-before")
    before = instance.process.stats()["requests"]
    sock = instance.open(f"/parties/before/{room}/hold")
    eventually(lambda: instance.process.stats()["requests"] > before)
    instance.leave(sock)
    instance.process.stats()  # the host has answered, so it has heard of the end, too
    instance.release("hold-before")
    assert instance.get(f"/parties/before/{room}/refuse").status == 401
    assert instance.process.ask("rooms", party="before", room=room)["rooms"][0]["wakes"] == 0


def test_death_of_the_host_while_requests_are_under_way(own):
    """S26: 502 for the one whose turn had begun, 503 with Retry-After for the one that waited behind it; a
    stream breaks off; committed effects stand, others do not.
    """
    instance = own()
    process = instance.process
    instance.hold("hold-r")
    assert instance.get("/parties/holding/other").text == "1"
    begun = instance.later("GET", "/parties/holding/r")
    eventually(instance.file("in-r").exists)
    waiting = instance.later("GET", "/parties/holding/r")
    stream = instance.open("/parties/streams/s/endless")
    eventually(lambda: process.ask("explain", party="holding", room="r")["waiting"] == 1)
    eventually(instance.file("streaming").exists)
    process.kill_host()
    reply = begun.reply()
    assert (reply.status, "retry-after" in reply.headers) == (502, False)
    reply = waiting.reply()
    assert (reply.status, reply.headers.get("retry-after")) == (503, "1")
    stream.settimeout(20)
    with contextlib.suppress(ConnectionError):
        while stream.recv(1 << 16):
            pass
    instance.release("hold-r")
    assert instance.get("/parties/holding/r").text == "1"
    assert instance.get("/parties/holding/other").text == "2"


def test_new_code_while_requests_wait(own):
    """S26, S32: what is under way is finished by the old code; what waits, and what comes, by the new."""
    instance = own(command="dev")
    process = instance.process
    instance.hold("hold-r")
    instance.hold("hold-fetch")
    under_way = instance.later("GET", "/parties/holding/r")
    eventually(instance.file("in-r").exists)
    before = process.stats()["requests"]
    fetching = instance.later("GET", "/hold")
    behind = instance.later("GET", "/parties/holding/r")
    eventually(lambda: process.stats()["requests"] == before + 2)
    hosts = process.host_pids()
    changed = APP.replace('self.room.broadcast("done")', 'return "new code"').replace(
        "{request.method} {request.path}", "new {request.path}"
    )
    process.write_app(changed)

    def waiting() -> Later | None:
        asked = instance.later("GET", f"/parties/holding/x-{next(numbers)}")
        return asked if asked.waits(2.5) else None

    # Once the old host has been told to go, a request has to wait for the new one.
    last = eventually(waiting)
    assert last is not None
    assert hosts[0] in process.host_pids()
    instance.release("hold-r")
    instance.release("hold-fetch")
    assert under_way.reply().text == "1"
    assert fetching.reply().text.startswith("GET /hold")
    assert [last.reply().text, behind.reply().text] == ["new code", "new code"]
    eventually(lambda: hosts[0] not in process.host_pids())


# --- One room -------------------------------------------------------------------------------------


def test_requests_and_messages_of_a_room_see_one_state(instance, room):
    """S26: each sees what the other has stored, at once."""
    client = instance.connect("both", room)
    for number in range(20):
        client.send(f"ws {number}")
        assert client.receive() == "stored"
        assert instance.get(f"/parties/both/{room}").text == f"ws {number}"
        assert instance.ask("POST", f"/parties/both/{room}", f"http {number}".encode()).text == "stored"
        assert client.receive() == f"posted http {number}"
        assert instance.get(f"/parties/both/{room}").text == f"http {number}"
