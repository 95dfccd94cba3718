"""Unmodified Python clients, `websockets` and `trio-websocket`, against the real command."""

import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio
import trio_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websockets

from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import BINARY, CLOSE, PING, PONG, RawClient, encode_frame

APP = """
import json

from broker import Server


class Main(Server):
    '''Echoes; text that begins with "close" closes; those who watch are told what becomes of others.'''

    def get_connection_tags(self, connection, ctx):
        return ["watcher"] if "watch" in ctx.request.args else []

    async def on_connect(self, connection, ctx):
        if "hello" in ctx.request.args:
            request = ctx.request
            connection.send({
                "id": connection.id,
                "room": self.room.id,
                "party": self.room.party,
                "uri": connection.uri,
                "path": request.path,
                "rest": request.rest,
                "args": request.args.to_dict(flat=False),
                "color": request.headers.get("X-Color"),
                "agent": request.headers.get("User-Agent"),
                "cookies": dict(request.cookies),
                "client": request.remote_addr,
                "method": request.method,
            })

    async def on_message(self, message, sender):
        if isinstance(message, str) and message.startswith("close "):
            _, code, reason = message.split(" ", 2)
            sender.send("last words")
            sender.close(int(code), reason)
        else:
            sender.send(message)

    async def on_close(self, connection, code, reason, was_clean):
        self.room.broadcast(
            {"closed": connection.id, "code": code, "reason": reason, "clean": was_clean,
             "cause": connection.close_cause},
            tag="watcher",
        )


class Picky(Server):
    subprotocols = ("chat.v2", "chat.v1")

    async def on_message(self, message, sender):
        sender.send(message)


class Counter(Server):
    async def on_message(self, message, sender):
        self.room.broadcast(f"{sender.id}: {message}")
"""

SIZES = [1, 2, 125, 126, 127, 4095, 65_535, 65_536, 98_304, 98_305, 131_072, 524_288, 1_048_575, 1_048_576]
CLOSE_CODES = [1000, 1001, 1003, 1008, 1011, 3000, 4000, 4999]
REASONS = ["", "enough", "ü" * 61 + "!"]  # the last has 123 bytes, the most there may be


@pytest.fixture(scope="module")
def app(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, close_timeout_seconds=20)


_rooms = itertools.count(1)


@pytest.fixture
def room() -> str:
    """The path of a room that nobody else has been in, who may be leaving it still."""
    return f"/party/room-{next(_rooms)}"


def connect(app: BrokerProcess, path: str, **options: Any) -> ClientConnection:
    options = {
        "max_size": 2**21,
        "open_timeout": DEADLINE_SECONDS,
        "close_timeout": DEADLINE_SECONDS,
        **options,
    }
    websocket: ClientConnection = connect_websockets(app.ws_url(path), proxy=None, **options)
    return websocket


def receive_json(websocket: ClientConnection) -> Any:
    return json.loads(websocket.recv(DEADLINE_SECONDS))


def text_of(size: int) -> str:
    """So many bytes of UTF-8, characters of two bytes among them."""
    return ("aü" * (size // 3 + 1)).encode()[:size].decode(errors="ignore").ljust(size // 2, "x")


# websockets


@pytest.mark.parametrize("size", SIZES)
def test_websockets_echo_of_every_size(app: BrokerProcess, size: int) -> None:
    with connect(app, "/party/sizes") as websocket:
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        websocket.send(data)
        assert websocket.recv(DEADLINE_SECONDS) == data
        text = text_of(size)
        websocket.send(text)
        assert websocket.recv(DEADLINE_SECONDS) == text


def test_websockets_empty_messages(app: BrokerProcess) -> None:
    with connect(app, "/party/sizes") as websocket:
        for message in ("", b"", "x"):
            websocket.send(message)
            assert websocket.recv(DEADLINE_SECONDS) == message


def test_websockets_too_large_by_one_byte(app: BrokerProcess) -> None:
    """S24: one above the limit is 1009; at the limit see above."""
    with connect(app, "/party/sizes") as websocket:
        with pytest.raises(ConnectionClosed) as raised:
            websocket.send(b"x" * (1_048_576 + 1))
            websocket.recv(DEADLINE_SECONDS)
        assert raised.value.rcvd is not None and raised.value.rcvd.code == 1009


@pytest.mark.parametrize(
    "pieces",
    [
        ["one", "", "two", "ü", ""],
        [b"one", b"", b"\xff\xfe", b"two"],
        ["x"] * 200,
        [b"y" * 40_000] * 3,
        ["ü" * 16_384] * 32,
        [b"z" * 131_072] * 8,
        [b"a" * 131_071, b"b", b"c" * 131_072] * 3,
    ],
    ids=["text", "binary", "many", "3 x 40 kB", "text 32 x 32 KiB", "8 x 128 KiB", "mixed"],
)
def test_websockets_fragments(app: BrokerProcess, pieces: list[Any]) -> None:
    with connect(app, "/party/fragments") as websocket:
        for _ in range(2):
            websocket.send(pieces)
            assert websocket.recv(DEADLINE_SECONDS) == type(pieces[0])().join(pieces)
        websocket.send("after")
        assert websocket.recv(DEADLINE_SECONDS) == "after"


def test_websockets_pings_between_fragments(app: BrokerProcess) -> None:
    """RFC 6455, section 5.4: control frames may stand between the fragments of a message."""
    with connect(app, "/party/fragments") as websocket:
        pongs = []

        def pieces() -> Iterator[bytes]:
            for number in range(4):
                yield bytes([number]) * 50_000
                pongs.append(websocket.ping())

        websocket.send(pieces())
        received = websocket.recv(DEADLINE_SECONDS)
        assert received == b"".join(bytes([number]) * 50_000 for number in range(4))
        assert all(pong.wait(DEADLINE_SECONDS) for pong in pongs)


def test_control_frames_without_end_within_a_message(app: BrokerProcess) -> None:
    """S40: what is kept of an unfinished message is bounded, also where it is not the message that grows."""

    def flood(client: RawClient) -> None:
        ping = encode_frame(PING, bytes(125))
        with contextlib.suppress(OSError):
            for _ in range(100):
                client.send_bytes(ping * 1000)

    with app.connect("/party/fragments") as client, ThreadPoolExecutor(1) as pool:
        client.send_frame(BINARY, bytes(200_000), fin=False)
        flooding = pool.submit(flood, client)
        opcode, payload = client.receive_frame()
        while opcode == PONG:
            opcode, payload = client.receive_frame()
        assert (opcode, payload[:2]) == (CLOSE, (1008).to_bytes(2, "big"))
        assert client.at_eof()
        client.reset()
        flooding.result(DEADLINE_SECONDS)
    eventually(lambda: not list((app.data / "spill").iterdir()), "no spill file")


def test_websockets_pings(app: BrokerProcess) -> None:
    with connect(app, "/party/pings") as websocket:
        for payload in (b"", b"x", b"\x00" * 125):
            assert websocket.ping(payload).wait(DEADLINE_SECONDS)
        websocket.pong(b"nobody asked")
        websocket.send("still here")
        assert websocket.recv(DEADLINE_SECONDS) == "still here"


def test_pings_wake_no_room(app: BrokerProcess) -> None:
    """S2."""

    def wakes() -> int:
        [facts] = app.ask("rooms", party="main", room="asleep")["rooms"]
        return int(facts["wakes"])

    with connect(app, "/party/asleep") as websocket:
        websocket.send("x")
        assert websocket.recv(DEADLINE_SECONDS) == "x"
        before = wakes()
        for _ in range(20):
            assert websocket.ping().wait(DEADLINE_SECONDS)
        assert wakes() == before > 0


@pytest.mark.parametrize("code", CLOSE_CODES)
@pytest.mark.parametrize("reason", REASONS, ids=["none", "short", "longest"])
def test_websockets_close_in_both_directions(app: BrokerProcess, room: str, code: int, reason: str) -> None:
    """S14: code and reason arrive as they were given; each close comes once, with its cause."""
    with connect(app, f"{room}?watch") as watcher:
        with connect(app, f"{room}?_pk=client") as websocket:
            websocket.send("before")
            assert websocket.recv(DEADLINE_SECONDS) == "before"
            websocket.close(code, reason)
            assert websocket.close_code == code
            assert websocket.close_reason == reason
        assert receive_json(watcher) == {
            "closed": "client",
            "code": code,
            "reason": reason,
            "clean": True,
            "cause": "client_close",
        }
        with connect(app, f"{room}?_pk=server") as websocket:
            websocket.send(f"close {code} {reason}")
            assert websocket.recv(DEADLINE_SECONDS) == "last words"
            with pytest.raises(ConnectionClosed) as raised:
                websocket.recv(DEADLINE_SECONDS)
            assert raised.value.rcvd is not None
            assert (raised.value.rcvd.code, raised.value.rcvd.reason) == (code, reason)
            assert raised.value.rcvd_then_sent
        assert receive_json(watcher) == {
            "closed": "server",
            "code": code,
            "reason": reason,
            "clean": True,
            "cause": "server_close",
        }


def test_websockets_message_and_close_at_once(app: BrokerProcess) -> None:
    """S14: a Close takes its place behind the messages, whose answers still go out."""
    with connect(app, "/party/behind") as websocket:
        for number in range(100):
            websocket.send(str(number))
        closer = ThreadPoolExecutor(1)
        closed = closer.submit(websocket.close, 3001, "done")
        received = []
        with pytest.raises(ConnectionClosed) as raised:
            while True:
                received.append(websocket.recv(DEADLINE_SECONDS))
        closed.result(DEADLINE_SECONDS)
        closer.shutdown()
        assert received == [str(number) for number in range(100)]
        assert raised.value.rcvd is not None and raised.value.rcvd.code == 3001


def test_close_without_a_code(app: BrokerProcess, room: str) -> None:
    """S14: 1005 means that there was none, and never goes on the wire."""
    with connect(app, f"{room}?watch") as watcher:
        with app.connect(f"{room}?_pk=silent") as client:
            client.send_close(None)
            assert client.expect_close() == (None, "")
            assert client.at_eof()
        assert receive_json(watcher) == {
            "closed": "silent",
            "code": 1005,
            "reason": "",
            "clean": True,
            "cause": "client_close",
        }


@pytest.mark.parametrize("way", ["close", "shutdown", "reset"])
def test_gone_without_a_close(app: BrokerProcess, room: str, way: str) -> None:
    """S14."""
    with connect(app, f"{room}?watch") as watcher, app.connect(f"{room}?_pk=gone") as client:
        client.send("x")
        assert client.receive() == "x"
        getattr(client, way)()
        assert receive_json(watcher) == {
            "closed": "gone",
            "code": 1006,
            "reason": "",
            "clean": False,
            "cause": "client_gone",
        }


@pytest.mark.parametrize(
    ("party", "offered", "chosen"),
    [
        ("main", None, None),
        ("main", ["a", "b"], "a"),
        ("picky", None, None),
        ("picky", ["chat.v1"], "chat.v1"),
        ("picky", ["chat.v1", "chat.v2"], "chat.v2"),
        ("picky", ["other"], None),
    ],
)
def test_subprotocols(app: BrokerProcess, party: str, offered: list[Any] | None, chosen: str | None) -> None:
    """S17."""
    with connect(app, f"/parties/{party}/protocols", subprotocols=offered) as websocket:
        assert websocket.subprotocol == chosen
        websocket.send("x")
        assert websocket.recv(DEADLINE_SECONDS) == "x"

    async def with_trio() -> None:
        async with trio_client(app, f"/parties/{party}/protocols", subprotocols=offered) as websocket:
            assert websocket.subprotocol == chosen

    run(with_trio)


def test_the_request_is_seen_by_on_connect(app: BrokerProcess) -> None:
    """S9, S10: ctx.request."""
    path = "/party/r%C3%B6om/a/b%20c?hello=1&_pk=me&x=%C3%BC&x=2&empty="
    headers = {"X-Color": "blue", "Cookie": "a=1; b=two"}
    with connect(
        app, path, additional_headers=headers, user_agent_header="probe/1", source_address=("127.0.0.3", 0)
    ) as websocket:
        assert receive_json(websocket) == {
            "id": "me",
            "room": "röom",
            "party": "main",
            "uri": app.url(path),
            "path": "/party/röom/a/b c",
            "rest": "/a/b c",
            "args": {"hello": ["1"], "_pk": ["me"], "x": ["ü", "2"], "empty": [""]},
            "color": "blue",
            "agent": "probe/1",
            "cookies": {"a": "1", "b": "two"},
            "client": "127.0.0.3",
            "method": "GET",
        }
        [row] = app.connections(room="röom")
        assert (row["id"], row["party"], row["uri"]) == ("me", "main", app.url(path))


def test_ids_are_fresh_where_none_is_given(app: BrokerProcess) -> None:
    """S10."""
    ids = set()
    for _ in range(5):
        with connect(app, "/party/ids?hello") as websocket:
            ids.add(receive_json(websocket)["id"])
    assert len(ids) == 5
    assert all(len(each) >= 22 for each in ids)  # 128 bits need 22 characters of base 64


@pytest.mark.parametrize(
    ("path", "status"),
    [("/parties/nobody/x", 404), ("/party/a%00b", 400), ("/party/" + "x" * 513, 400), ("/party/x?_pk=", 400)],
)
def test_refused_upgrades(app: BrokerProcess, path: str, status: int) -> None:
    """S1, S10."""
    with pytest.raises(InvalidStatus) as raised, connect(app, path):
        pass
    assert raised.value.response.status_code == status

    async def with_trio() -> None:
        with pytest.RaisesGroup(trio_websocket.ConnectionRejected) as rejected:
            async with trio_client(app, path):
                pass
        [rejection] = rejected.value.exceptions
        assert isinstance(rejection, trio_websocket.ConnectionRejected)
        assert rejection.status_code == status

    run(with_trio)


def test_many_websockets_clients_at_once(app: BrokerProcess) -> None:
    """Threads, each with a client that pipelines its messages: everybody gets their own, in order."""

    def client(number: int) -> None:
        with connect(app, f"/party/crowd-{number % 5}?_pk=c{number}") as websocket:
            for each in range(50):
                websocket.send(f"{number}:{each}")
            for each in range(50):
                assert websocket.recv(DEADLINE_SECONDS) == f"{number}:{each}"

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(client, range(60)))


# trio-websocket


@contextlib.asynccontextmanager
async def trio_client(
    app: BrokerProcess, path: str, **options: Any
) -> AsyncIterator[trio_websocket.WebSocketConnection]:
    """trio-websocket on a stream of ours, since it leaves its own open when the server closes or refuses."""
    stream = await trio.open_tcp_stream("127.0.0.1", app.port)
    async with stream, trio.open_nursery() as nursery:
        websocket = await trio_websocket.wrap_client_stream(
            nursery, stream, f"127.0.0.1:{app.port}", path, **options
        )
        yield websocket
        await websocket.aclose()


def run(function: Callable[[], Any]) -> None:
    async def bounded() -> None:
        with trio.fail_after(4 * DEADLINE_SECONDS):  # for all that a test does
            await function()

    trio.run(bounded)


@pytest.mark.parametrize("size", SIZES)
def test_trio_websocket_echo_of_every_size(app: BrokerProcess, size: int) -> None:
    async def client() -> None:
        async with trio_client(app, "/party/sizes", max_message_size=2**21) as websocket:
            for message in (b"\xff" * size, text_of(size)):
                await websocket.send_message(message)
                assert await websocket.get_message() == message

    run(client)


def test_trio_websocket_pings(app: BrokerProcess) -> None:
    async def client() -> None:
        async with trio_client(app, "/party/pings") as websocket:
            await websocket.ping(b"x")
            await websocket.ping(b"\xff" * 125)
            await websocket.ping()

    run(client)


@pytest.mark.parametrize("code", CLOSE_CODES)
def test_trio_websocket_close_in_both_directions(app: BrokerProcess, room: str, code: int) -> None:
    """S14."""

    async def client() -> None:
        async with trio_client(app, f"{room}?watch") as watcher:
            async with trio_client(app, f"{room}?_pk=client") as websocket:
                await websocket.aclose(code, "enough")
                assert (websocket.closed.code, websocket.closed.reason) == (code, "enough")  # type: ignore[union-attr]
            told = json.loads(await watcher.get_message())
            assert (told["closed"], told["code"], told["reason"]) == ("client", code, "enough")
            async with trio_client(app, f"{room}?_pk=server") as websocket:
                await websocket.send_message(f"close {code} enough")
                assert await websocket.get_message() == "last words"
                with pytest.raises(trio_websocket.ConnectionClosed):
                    await websocket.get_message()
                assert (websocket.closed.code, websocket.closed.reason) == (code, "enough")  # type: ignore[union-attr]
            told = json.loads(await watcher.get_message())
            assert (told["closed"], told["code"], told["cause"]) == ("server", code, "server_close")

    run(client)


def test_many_trio_websocket_clients_in_one_room(app: BrokerProcess) -> None:
    """Each of 100 says one thing; each hears all, in one order that is the same for all."""
    count = 100
    heard: dict[int, list[str | bytes]] = {}

    async def client(number: int, ready: list[int], everybody: trio.Event) -> None:
        path = f"/parties/counter/hall?_pk=n{number}"
        async with trio_client(app, path, message_queue_size=count) as websocket:
            ready.append(number)
            if len(ready) == count:
                everybody.set()
            await everybody.wait()
            await websocket.send_message("hello")
            heard[number] = [await websocket.get_message() for _ in range(count)]

    async def clients() -> None:
        everybody = trio.Event()
        ready: list[int] = []
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(client, number, ready, everybody)

    run(clients)
    assert len(heard) == count
    assert set(heard[0]) == {f"n{number}: hello" for number in range(count)}
    assert all(each == heard[0] for each in heard.values())
    eventually(lambda: not app.connections(party="counter"), "an empty room")


def test_nothing_is_left(app: BrokerProcess) -> None:
    """All of this module's clients have gone, and so have their rows and sockets."""
    eventually(lambda: app.stats()["connections"] == 0, "no connection")
    eventually(lambda: not app.connections(), "no row")
    assert app.stats()["failed_turns"] == 0
    # A machine that is busy may hold up the host, and that is said.
    assert [
        line for line in app.log_events() if line["level"] == "error" and line["logger"] != "watchdog"
    ] == []
