"""The HTTP front over real loopback sockets, with a gateway that is a few lines long."""

import array
import contextlib
import fcntl
import functools
import importlib
import json
import select
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from broker.gateway.bodies import PIECE_BYTES, SpilledBody, StreamedBody
from broker.gateway.handshake import HeadError
from broker.gateway.http import HttpFront, HttpReply, HttpRequest, RequestRefused
from broker.gateway.http_stream import ChunkFollower
from broker.gateway.spill import Spills
from hibernation.settings import Settings

Handler = Callable[[HttpRequest], Awaitable[HttpReply]]

UPGRADE = (
    b"GET /party/x HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
FRAME = b"\x81\x83\x00\x00\x00\x00abc"


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in trio, for a minute at most."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            with trio.fail_after(60):
                await test(*args, **kwargs)

        trio.run(limited)

    return run


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in trio, where time passes in `passes` alone."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        trio.run(functools.partial(test, *args, **kwargs), clock=MockClock())

    return run


async def passes(seconds: float) -> None:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    await trio.testing.wait_all_tasks_blocked(0.02)  # what is on its way through the kernel arrives before
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.02)


class Gateway:
    """A `GatewayPort` with a listener before it; `handler` makes the answers."""

    dev = False
    token = "s3cret"

    def __init__(self, spilled_bytes_max: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.spills = Spills(Path(self._folder.name, "spill"), spilled_bytes_max)
        self.handler: Handler = self.hello
        self.requests: list[HttpRequest] = []
        self.admin_calls: list[tuple[str, str, bytes]] = []
        self.is_ready = True
        self._back_in, self._back = trio.open_memory_channel[socket.socket](10)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.front: HttpFront

    def close(self) -> None:
        self.listener.close()
        self._folder.cleanup()

    async def hello(self, request: HttpRequest) -> HttpReply:
        return HttpReply(200, [("content-type", "text/plain")], b"hello " + (request.room or "-").encode())

    def paused(self) -> str | None:
        return None

    def ready(self) -> bool:
        return self.is_ready

    def give_back(self, sock: socket.socket, client: tuple[str, int]) -> None:
        assert client == sock.getpeername()
        self._back_in.send_nowait(sock)

    def streams(self, party: str | None) -> bool:
        return party == "streams"

    def spill(self) -> SpilledBody:
        return SpilledBody(self.spills)

    async def request(self, request: HttpRequest) -> HttpReply:
        self.requests.append(request)
        return await self.handler(request)

    async def admin(self, method: str, path: str, query: bytes) -> Any:
        self.admin_calls.append((method, path, query))
        if path == "/nothing":
            raise RequestRefused(404, "no such thing")
        return {"rooms": ["ä"]}

    async def given_back(self) -> socket.socket:
        return await self._back.receive()

    def none_given_back(self) -> bool:
        return self._back.statistics().current_buffer_used == 0

    async def accept(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.listener)
            sock, client = self.listener.accept()
            sock.setblocking(False)
            self.front.take(sock, client)


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Gateway]:
    """A front that serves until the end of the block; some limits are not settings."""
    own = {name: settings.pop(name) for name in ("idle_seconds", "stall_seconds") if name in settings}
    gateway = Gateway(settings.pop("spilled_bytes_max", 1 << 30))
    gateway.front = HttpFront(gateway, Settings(**settings))
    gateway.front._limits = replace(gateway.front._limits, **own)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.front.run)
            nursery.start_soon(gateway.accept)
            yield gateway
            nursery.cancel_scope.cancel()
    finally:
        gateway.close()


class Client:
    """A socket with the few lines of HTTP that a test can trust."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            await self.stream.send_all(part)

    async def response(self, *, bodiless: bool = False) -> tuple[int, dict[str, str], bytes]:
        """The next response; its body by Content-Length or by chunks."""
        while b"\r\n\r\n" not in self.data:
            assert await self.more(), f"closed after {self.data!r}"
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        body = b""
        if headers.get("transfer-encoding") == "chunked" and not bodiless:
            while True:
                while b"\r\n" not in self.data:
                    assert await self.more()
                size, _, self.data = self.data.partition(b"\r\n")
                count = int(size, 16)
                while len(self.data) < count + 2:
                    assert await self.more()
                body += self.data[:count]
                self.data = self.data[count + 2 :]
                if not count:
                    break
        elif not bodiless:
            while len(self.data) < int(headers.get("content-length", 0)):
                assert await self.more()
            count = int(headers.get("content-length", 0))
            body, self.data = self.data[:count], self.data[count:]
        return int(lines[0].split()[1]), headers, body

    async def more(self) -> bool:
        received = bytes(await self.stream.receive_some(65536))
        self.data += received
        return bool(received)

    async def rest(self) -> bytes:
        """Everything up to the server's end."""
        while await self.more():
            pass
        data, self.data = self.data, b""
        return data


@contextlib.asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream(*gateway.address) as stream:
        yield Client(stream)


def get(path: str = "/party/x", *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def unread(sock: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


async def eventually(condition: Callable[[], object]) -> None:
    while True:
        if condition():
            return
        await trio.sleep(0.005)


async def arrived(sock: socket.socket, count: int) -> None:
    await eventually(lambda: unread(sock) >= count)


# -- requests as they reach the gateway --------------------------------------------------------------------


def test_importing_the_front_imports_neither_quart_nor_hypercorn() -> None:
    code = (
        "import sys, broker.gateway.http; "
        "print([name for name in ('quart', 'hypercorn', 'h11', 'h2', 'werkzeug') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@in_trio
async def test_a_request_reaches_the_gateway_with_all_its_facts() -> None:
    async with serving() as gateway, connected(gateway) as client:
        assert not gateway.front.statistics().loaded
        await client.send(
            get("/parties/chat/a%2Fb/sub/%C3%A9?q=1&r=%20", "X-Thing: \xe9", "X-Thing: 2", "Cookie: a=b")
        )
        status, headers, body = await client.response()
        assert (status, body) == (200, b"hello a/b")
        assert headers["content-length"] == "9"
        assert "date" in headers
        [request] = gateway.requests
        assert (request.party, request.room, request.rest) == ("chat", "a/b", "/sub/é")
        assert request.path == "/parties/chat/a/b/sub/é"
        assert request.raw_path == "/parties/chat/a%2Fb/sub/%C3%A9"
        assert request.query == b"q=1&r=%20"
        assert request.headers == [
            ("host", "localhost"),
            ("x-thing", "\xe9"),
            ("x-thing", "2"),
            ("cookie", "a=b"),
        ]
        assert (request.method, request.scheme, request.http_version) == ("GET", "http", "1.1")
        assert request.body == b""
        assert request.client == client.stream.socket.getsockname()
        assert request.fields()["rest"] == "/sub/é"
        assert gateway.front.statistics().loaded


@in_trio
async def test_a_path_of_no_room_is_a_request_without_room() -> None:
    async with serving() as gateway, connected(gateway) as client:
        for path in ("/", "/index.html", "/party/", "/parties/chat", "//party/x"):
            await client.send(get(path))
            assert (await client.response())[2] == b"hello -"
        assert all(request.party is None and request.room is None for request in gateway.requests)


@in_trio
async def test_a_bad_room_id_is_400_and_reaches_nobody() -> None:
    """S1."""
    async with serving() as gateway, connected(gateway) as client:
        for path in ("/party/%00", "/party/%ff", "/party/" + "a" * 513):
            await client.send(get(path))
            assert (await client.response())[0] == 400
        await client.send(get("/party/" + "a" * 512))
        assert (await client.response())[0] == 200
        assert len(gateway.requests) == 1


@in_trio
async def test_our_namespace_and_untrusted_forwarding_headers_are_stripped() -> None:
    """S39, and row 52."""
    forged = ("X-Broker-User: root", "x-partykit-id: 1", "X-Forwarded-For: 6.6.6.6", "Forwarded: for=6.6.6.6")
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get("/party/x", *forged, "X-Forwarded-Proto: https", "X-Real: 1"))
        await client.response()
        [request] = gateway.requests
        assert request.headers == [("host", "localhost"), ("x-real", "1")]
        assert request.client[0] == "127.0.0.1"
        assert request.scheme == "http"


@in_trio
async def test_a_trusted_proxy_names_its_client() -> None:
    """S37: read from the near end, so a client cannot choose its address."""
    async with serving(trusted_proxies=("127.0.0.0/8",)) as gateway, connected(gateway) as client:
        await client.send(get("/party/x", "X-Forwarded-For: 6.6.6.6, 9.9.9.9", "X-Forwarded-Proto: https"))
        await client.response()
        [request] = gateway.requests
        assert (request.client, request.scheme) == (("9.9.9.9", 0), "https")


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "DELETE", "PROPFIND"])
@in_trio
async def test_every_method_reaches_the_room(method: str) -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get(method=method))
        assert (await client.response())[2] == b"hello x"
        assert gateway.requests[0].method == method


@in_trio
async def test_head_has_the_length_of_get_and_no_body() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get(method="HEAD"), get())
        status, headers, _ = await client.response(bodiless=True)
        assert (status, headers["content-length"]) == (200, "7")
        assert (await client.response())[2] == b"hello x"


@in_trio
async def test_options_of_the_whole_server_is_answered_without_a_room() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get("*", method="OPTIONS"))
        assert (await client.response())[0] == 204
        assert gateway.requests == []


@in_trio
async def test_an_absolute_target_is_its_path() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get("http://localhost/party/y?z"))
        assert (await client.response())[2] == b"hello y"
        assert (gateway.requests[0].raw_path, gateway.requests[0].query) == ("/party/y", b"z")


# -- one connection, many requests -------------------------------------------------------------------------


@in_trio
async def test_a_connection_is_kept_alive() -> None:
    async with serving() as gateway, connected(gateway) as client:
        for number in range(5):
            await client.send(get(f"/party/{number}"))
            assert (await client.response())[2] == f"hello {number}".encode()
        assert gateway.front.statistics().accepted == 1
        assert gateway.front.statistics().requests == 5


@in_trio
async def test_connection_close_and_http_1_0_close_after_the_response() -> None:
    async with serving() as gateway:
        for request in (get("/party/x", "Connection: close"), b"GET /party/x HTTP/1.0\r\n\r\n"):
            async with connected(gateway) as client:
                await client.send(request)
                assert (await client.rest()).endswith(b"\r\n\r\nhello x")


@in_trio
async def test_pipelined_requests_are_taken_one_at_a_time() -> None:
    async with serving() as gateway, connected(gateway) as client:
        go = trio.Semaphore(0)

        async def slow(request: HttpRequest) -> HttpReply:
            await go.acquire()
            return await gateway.hello(request)

        gateway.handler = slow
        await client.send(
            get("/party/1") + get("/party/2", "Content-Length: 3", body=b"abc") + get("/party/3")
        )
        for number in (1, 2, 3):
            await eventually(lambda: gateway.requests)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert [request.room for request in gateway.requests] == [str(number)]
            assert gateway.requests.pop().body == (b"abc" if number == 2 else b"")
            assert not select.select([client.stream.socket], [], [], 0)[0]
            go.release()
            assert (await client.response())[2] == f"hello {number}".encode()


@in_trio
async def test_an_upgrade_on_a_kept_alive_connection_is_given_back_unread() -> None:
    """Its head and the frame behind it are still in the kernel, and no option of the socket has changed."""
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get())
        assert (await client.response())[2] == b"hello x"
        await client.send(UPGRADE + FRAME)
        with contextlib.closing(await gateway.given_back()) as sock:
            await arrived(sock, len(UPGRADE + FRAME))
            assert unread(sock) == len(UPGRADE + FRAME)
            assert not sock.getblocking()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
            sock.send(b"still open")
            assert bytes(await client.stream.receive_some(100)) == b"still open"
            assert sock.recv(4096) == UPGRADE + FRAME
        await eventually(lambda: gateway.front.statistics().connections == 0)
        assert gateway.front.statistics().given_back == 1


@in_trio
async def test_an_upgrade_that_comes_in_pieces_is_given_back_when_it_is_whole() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get())
        await client.response()
        for cut in range(0, len(UPGRADE) - 1, 10):
            await client.send(UPGRADE[cut : cut + 10])
            await trio.sleep(0.002)
            assert gateway.none_given_back() or cut + 10 >= len(UPGRADE)
        await client.send(UPGRADE[cut + 10 :])
        with contextlib.closing(await gateway.given_back()) as sock:
            await arrived(sock, len(UPGRADE))
            assert sock.recv(4096) == UPGRADE
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


@in_trio
async def test_a_pipelined_upgrade_waits_for_the_response_before_it() -> None:
    async with serving() as gateway, connected(gateway) as client:
        go = trio.Event()

        async def slow(request: HttpRequest) -> HttpReply:
            await go.wait()
            return HttpReply(200, [], b"x" * 300_000)

        gateway.handler = slow
        await client.send(get() + UPGRADE + FRAME)
        await eventually(lambda: gateway.requests)
        await trio.sleep(0.05)
        assert gateway.none_given_back()
        go.set()
        assert len((await client.response())[2]) == 300_000
        with contextlib.closing(await gateway.given_back()) as sock:
            assert sock.recv(4096) == UPGRADE + FRAME
        assert len(gateway.requests) == 1


@in_trio
async def test_an_upgrade_behind_a_closing_response_is_never_taken() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get("/party/x", "Connection: close") + UPGRADE)
        assert (await client.rest()).endswith(b"hello x")
        await client.stream.aclose()
        await eventually(lambda: gateway.front.statistics().connections == 0)
        assert gateway.none_given_back()


@in_trio
async def test_an_upgrade_to_something_unknown_is_declined_by_an_answer() -> None:
    """RFC 9110, 7.8: an offer may be ignored."""
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get("/party/x", "Connection: Upgrade, keep-alive", "Upgrade: TLS/1.0"))
        assert (await client.response())[2] == b"hello x"
        assert "upgrade" not in dict(gateway.requests[0].headers)
        await client.send(get())
        assert (await client.response())[2] == b"hello x"


# -- bodies ------------------------------------------------------------------------------------------------


async def echo(request: HttpRequest) -> HttpReply:
    await trio.lowlevel.checkpoint()
    body = request.body
    if isinstance(body, SpilledBody):
        pieces = [body.read(offset) for offset in range(0, body.size, PIECE_BYTES)]
        return HttpReply(200, [("x-spilled", str(body.size))], b"".join(pieces))
    assert isinstance(body, bytes)
    return HttpReply(200, [], body)


CHUNKS = b"3;ext=1\r\nabc\r\n00a \r\n0123456789\r\n0\r\nX-Trailer: 1\r\n\r\n"


def test_the_end_of_a_chunked_body_is_found_wherever_it_is_cut() -> None:
    for cut in range(len(CHUNKS)):
        follower = ChunkFollower()
        assert follower.feed(CHUNKS[:cut]) == cut
        assert not follower.done
        assert follower.feed(CHUNKS[cut:] + b"GET / HTTP/1.1\r\n") == len(CHUNKS) - cut
        assert follower.done


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"0x3\r\nabc",
        b" 3\r\nabc",
        b"3\nabc\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3;\x00\r\nabc",
        b"3;a\rb\r\nabc",
        b"11111111111111111\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\nX : 1\r\n\r\n",
        b"0\r\n\n",
        b"3;" + b"x" * 1024,
        b"0\r\n" + b"X: 123456789\r\n" * 700,
    ],
)
def test_what_is_no_chunked_body_is_refused(data: bytes) -> None:
    """Row 46: what two readers might end differently ends nothing here."""
    with pytest.raises(HeadError) as caught:
        ChunkFollower().feed(data)
    assert caught.value.status == 400


@in_trio
async def test_a_chunked_body_is_joined_and_the_request_behind_it_served() -> None:
    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = echo
        request = get("/party/1", "Transfer-Encoding: chunked", method="POST", body=CHUNKS)
        await client.send(request + get("/party/2", "Content-Length: 2", body=b"hi"))
        assert (await client.response())[2] == b"abc0123456789"
        assert (await client.response())[2] == b"hi"
        for cut in (len(request) - 30, len(request) - 1):
            await client.send(request[:cut])
            await trio.sleep(0.01)
            await client.send(request[cut:])
            assert (await client.response())[2] == b"abc0123456789"


@in_trio
async def test_a_malformed_chunk_is_400_and_nothing_behind_it_is_served() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(
            get("/party/1", "Transfer-Encoding: chunked", body=b"3\r\nabcd\r\n0\r\n\r\n" + get())
        )
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"Connection: close") == 1
        assert gateway.requests == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("over", [-1, 0, 1])
@in_trio
async def test_a_body_over_the_limit_is_413(over: int, chunked: bool) -> None:
    """S26, at one below, at, and one above; the client can read the answer though it has sent everything."""
    limit = 100_000
    async with serving(request_bytes_max=limit) as gateway, connected(gateway) as client:
        gateway.handler = echo
        body = b"x" * (limit + over)
        if chunked:
            await client.send(get("/party/x", "Transfer-Encoding: chunked", method="POST"))
            await client.send(b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n")
        else:
            await client.send(get("/party/x", f"Content-Length: {len(body)}", method="POST"), body)
        status, headers, answer = await client.response()
        if over <= 0:
            assert (status, answer) == (200, body)
        else:
            assert status == 413
            assert headers["connection"] == "close"
            assert await client.rest() == b""
            assert gateway.requests == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("over", [-1, 0, 1])
@in_trio
async def test_a_body_over_what_memory_may_hold_is_in_a_file(over: int, chunked: bool) -> None:
    """S26, at one below, at, and one above; nothing of it is left."""
    limit = 300_000
    async with serving(request_memory_bytes=limit) as gateway, connected(gateway) as client:
        gateway.handler = echo
        body = bytes(range(251)) * 1200
        body = body[: limit + over] + b"x" * (limit + over - len(body))
        if chunked:
            await client.send(get("/party/x", "Transfer-Encoding: chunked", method="POST"))
            await client.send(b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n")
        else:
            await client.send(get("/party/x", f"Content-Length: {len(body)}", method="POST"), body)
        status, headers, answer = await client.response()
        assert (status, answer) == (200, body)
        assert headers.get("x-spilled") == (str(len(body)) if over > 0 else None)
        await client.send(get())
        assert (await client.response())[0] == 200
        await eventually(lambda: not gateway.spills.bytes)


@in_trio
async def test_a_body_that_finds_no_room_is_503() -> None:
    """S24, S26: all spill files together are bounded."""
    async with serving(spilled_bytes_max=1_000_000, request_memory_bytes=1000) as gateway:
        gateway.handler = echo
        for size, status in ((1_000_000, 200), (1_000_001, 503)):
            async with connected(gateway) as client:
                await client.send(get("/party/x", f"Content-Length: {size}", method="POST"), b"x" * size)
                assert (await client.response())[0] == status
        await eventually(lambda: not gateway.spills.bytes)


class Reader:
    """Takes a streamed body as a host does."""

    def __init__(self, request: HttpRequest) -> None:
        assert isinstance(request.body, StreamedBody)
        self.body = request.body
        self.pieces: list[bytes | None] = []
        self.ended = trio.Event()

    def want(self, pieces: int) -> None:
        self.body.want(pieces, self._take)

    def _take(self, piece: bytes | None, last: bool) -> None:
        self.pieces.append(piece)
        if last and piece is not None:
            self.ended.set()

    async def whole(self) -> bytes:
        self.want(1_000_000)
        await self.ended.wait()
        return b"".join(piece or b"" for piece in self.pieces)


@pytest.mark.parametrize("chunked", [False, True])
@in_trio
async def test_a_streamed_body_is_passed_on_before_it_is_there(chunked: bool) -> None:
    """S26: and no faster than it is wanted."""
    async with serving() as gateway, connected(gateway) as client:
        heard: list[Reader] = []
        released = trio.Event()

        async def answer(request: HttpRequest) -> HttpReply:
            heard.append(Reader(request))
            await released.wait()
            return HttpReply(200, [], await heard[0].whole())

        gateway.handler = answer
        length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 8000000"
        await client.send(get("/parties/streams/x", length, method="POST"))
        await eventually(lambda: heard)
        piece = b"5\r\nhello\r\n" if chunked else b"hello"
        await client.send(piece)
        heard[0].want(1)
        await eventually(lambda: heard[0].pieces == [b"hello"])
        rest = b"x" * 7_999_995
        async with trio.open_nursery() as nursery:
            sent = trio.Event()

            async def send() -> None:
                await client.send(b"%x\r\n" % len(rest) if chunked else b"", rest)
                await client.send(b"\r\n0\r\n\r\n" if chunked else b"")
                sent.set()

            nursery.start_soon(send)
            with trio.move_on_after(0.3):
                await sent.wait()
            assert not sent.is_set()  # its client waits
            assert len(heard[0].pieces) == 1
            released.set()
            status, _, body = await client.response()
        assert (status, len(body)) == (200, 8_000_000)
        gateway.handler = gateway.hello
        await client.send(get())
        assert (await client.response())[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
@in_trio
async def test_a_client_that_breaks_off_a_streamed_body_cancels(chunked: bool) -> None:
    """S26: also while nobody reads it."""
    async with serving() as gateway:
        left = trio.Event()
        heard: list[Reader] = []

        async def answer(request: HttpRequest) -> HttpReply:
            heard.append(Reader(request))
            try:
                await trio.sleep_forever()
            finally:
                left.set()
            raise AssertionError

        gateway.handler = answer
        gateway.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_000_000)
        sock = socket.create_connection(gateway.address)
        length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 8000000"
        sock.sendall(get("/parties/streams/x", length, method="POST"))
        await eventually(lambda: heard)
        # More than is read ahead, and no more than the kernel takes: else its end would wait behind it.
        sock.sendall((b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n") * 14)
        if chunked:
            # A reset: an end of sending alone may still be within the body.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        await left.wait()


@in_trio
async def test_a_streamed_body_need_not_be_read() -> None:
    """S26: what is left of it ends the connection, and holds up nobody."""
    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = gateway.hello
        await client.send(get("/parties/streams/x", "Content-Length: 8000000", method="POST"), b"x" * 1000)
        status, headers, _ = await client.response()
        assert (status, headers["connection"]) == (200, "close")
        with contextlib.suppress(trio.BrokenResourceError):
            await client.send(b"x" * 1_000_000)


@pytest.mark.parametrize("over", [0, 1])
@in_trio
async def test_a_streamed_body_has_the_same_limit(over: int) -> None:
    """S26: 413, also when it is only seen while it comes; its turn is cancelled."""
    async with serving(request_bytes_max=100_000) as gateway, connected(gateway) as client:
        cancelled: list[bool] = []

        async def answer(request: HttpRequest) -> HttpReply:
            try:
                return HttpReply(200, [], b"%d" % len(await Reader(request).whole()))
            except trio.Cancelled:
                cancelled.append(True)
                raise

        gateway.handler = answer
        await client.send(get("/parties/streams/x", "Transfer-Encoding: chunked", method="POST"))
        await client.send(b"c350\r\n", b"x" * 50_000, b"\r\n")
        await eventually(lambda: gateway.requests)
        await client.send(b"%x\r\n" % (50_000 + over), b"x" * (50_000 + over), b"\r\n0\r\n\r\n")
        status, _, body = await client.response()
        assert (status, cancelled) == ((413, [True]) if over else (200, []))
        assert over or body == b"100000"


@in_trio
async def test_expect_100_continue_is_answered_before_the_body_comes() -> None:
    """RFC 9110, 10.1.1."""
    async with serving(request_bytes_max=10) as gateway:
        gateway.handler = echo
        async with connected(gateway) as client:
            await client.send(get("/party/x", "Expect: 100-continue", "Content-Length: 10", method="PUT"))
            assert (await client.response())[0] == 100
            await client.send(b"0123456789")
            assert (await client.response())[2] == b"0123456789"
        async with connected(gateway) as client:
            await client.send(get("/party/x", "Expect: 100-continue", "Content-Length: 11", method="PUT"))
            assert (await client.response())[0] == 413
            assert await client.rest() == b""


@in_trio
async def test_a_body_that_does_not_come_is_408() -> None:
    async with serving(request_timeout_seconds=0.1) as gateway, connected(gateway) as client:
        await client.send(get("/party/x", "Content-Length: 10", method="PUT", body=b"01234"))
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")
        assert gateway.requests == []


@in_trio
async def test_a_client_that_leaves_within_its_body_reaches_nobody() -> None:
    async with serving() as gateway:
        async with connected(gateway) as client:
            await client.send(get("/party/x", "Content-Length: 10", method="PUT"), b"01234")
        await eventually(lambda: gateway.front.statistics().accepted)
        await eventually(lambda: gateway.front.statistics().connections == 0)
        assert gateway.requests == []


# -- what is refused ---------------------------------------------------------------------------------------

MALFORMED = {
    "CL and TE": (get("/", "Content-Length: 3", "Transfer-Encoding: chunked"), 400),
    "two CL": (get("/", "Content-Length: 3", "Content-Length: 3"), 400),
    "CL list": (get("/", "Content-Length: 3, 3"), 400),
    "signed CL": (get("/", "Content-Length: +3"), 400),
    "TE gzip": (get("/", "Transfer-Encoding: gzip, chunked"), 501),
    "TE last not chunked": (get("/", "Transfer-Encoding: chunked, gzip"), 400),
    "TE in 1.0": (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "obs-fold": (get("/", "X: a\r\n b"), 400),
    "bare LF": (b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n", 400),
    "bare LF in head": (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
    "space before colon": (get("/", "X : a"), 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (get("/", "Host: b"), 400),
    "NUL": (get("/", "X: \x00"), 400),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    "HTTP/2.0 without the preface": (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", 505),
    "CONNECT": (get("a:80", method="CONNECT"), 501),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "long header": (get("/", "X: " + "a" * 17_000), 431),
    "many headers": (get("/", *[f"X{number}: 1" for number in range(1000)]), 431),
    "long path": (get("/" + "a" * 100_000), 414),
}


@pytest.mark.parametrize("name", list(MALFORMED))
@pytest.mark.parametrize("first", [True, False], ids=["first request", "later request"])
@in_trio
async def test_a_malformed_head_gets_one_answer_and_nothing_behind_it_is_parsed(
    name: str, first: bool
) -> None:
    """Rows 45 to 48; S40."""
    data, status = MALFORMED[name]
    async with serving() as gateway, connected(gateway) as client:
        if not first:
            await client.send(get("/party/x"))
            await client.response()
        await client.send(data + get("/party/smuggled"))
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in answer.lower()
        assert answer.count(b"Connection: close") == 1
        assert [request.room for request in gateway.requests] == ([] if first else ["x"])


@pytest.mark.parametrize("sent", [b"", b"GET /party/x HT", b"PRI * HT"])
@in_virtual_time
async def test_a_head_that_does_not_end_is_closed_at_the_deadline(sent: bytes) -> None:
    """Rows 21 and 22; a byte now and then does not move the deadline."""
    async with serving(handshake_timeout_seconds=10) as gateway, connected(gateway) as client:
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert gateway.front.statistics().connections == 1
        if sent:
            await client.send(sent[:-2])
        await passes(5)
        if sent:
            await client.send(sent[-2:])
        await passes(4.9)
        assert not select.select([client.stream.socket], [], [], 0)[0]
        await passes(0.2)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 408 ") if sent else answer == b""


@in_virtual_time
async def test_a_later_head_has_its_own_deadline() -> None:
    async with serving(handshake_timeout_seconds=10) as gateway, connected(gateway) as client:
        await client.send(get())
        await client.response()
        await passes(15)  # longer than a head may take: only the idle time runs between requests
        await client.send(b"GET /par")
        await passes(9.9)
        assert not select.select([client.stream.socket], [], [], 0)[0]
        await passes(0.2)
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


@in_trio
async def test_a_waiting_head_does_not_spin() -> None:
    """Peeked bytes keep a socket readable; waiting for more of them must cost nothing."""
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get())
        await client.response()
        peeks = 0
        [stream] = gateway.front._streams
        peek = stream._peek

        def counted(count: int) -> bytes | None:
            nonlocal peeks
            peeks += 1
            return peek(count)

        stream._peek = counted  # type: ignore[method-assign]
        await client.send(b"GET /party/x HTTP/1.1\r\n")
        await trio.sleep(0.2)
        assert peeks <= 3
        await client.send(b"Host: a\r\n\r\n")
        assert (await client.response())[0] == 200
        assert peeks <= 6


@in_trio
async def test_half_a_head_and_a_leaving_client_end_the_connection() -> None:
    async with serving() as gateway:
        async with connected(gateway) as client:
            await client.send(get()[:20])
            await eventually(lambda: gateway.front.statistics().connections)
        await eventually(lambda: gateway.front.statistics().connections == 0)


@in_trio
async def test_an_idle_connection_is_closed() -> None:
    async with serving(idle_seconds=0.1) as gateway, connected(gateway) as client:
        await client.send(get())
        await client.response()
        assert await client.rest() == b""


# -- answers -----------------------------------------------------------------------------------------------


class Chunks:
    """An iterator that knows how far it was asked, and whether it was closed."""

    def __init__(
        self, chunks: Iterable[bytes], *, then: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        self._chunks = iter(chunks)
        self._then = then
        self.asked = 0
        self.closed = trio.Event()

    def __aiter__(self) -> "Chunks":
        return self

    async def __anext__(self) -> bytes:
        self.asked += 1
        for chunk in self._chunks:
            return chunk
        if self._then is not None:
            await self._then()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await trio.sleep(0.01)  # has time to do so, though its client has left
        self.closed.set()


def answering(reply: HttpReply) -> Handler:
    async def handler(_request: HttpRequest) -> HttpReply:
        await trio.lowlevel.checkpoint()
        return reply

    return handler


@in_trio
async def test_a_streamed_response_comes_as_it_is_made() -> None:
    async with serving() as gateway, connected(gateway) as client:
        go = trio.Event()
        chunks = Chunks([b"one"], then=go.wait)
        gateway.handler = answering(HttpReply(200, [("content-type", "text/event-stream")], chunks))
        await client.send(get())
        while b"one" not in client.data:
            await client.more()
        go.set()
        status, headers, body = await client.response()
        assert (status, body, headers["transfer-encoding"]) == (200, b"one", "chunked")
        await chunks.closed.wait()
        gateway.handler = gateway.hello
        await client.send(get())
        assert (await client.response())[2] == b"hello x"


@in_trio
async def test_a_streamed_response_waits_for_a_client_that_reads_slowly() -> None:
    """S26: back-pressure reaches the iterator."""
    async with serving() as gateway, connected(gateway) as client:
        chunks = Chunks([b"x" * 65_536] * 1000)
        gateway.handler = answering(HttpReply(200, [], chunks))
        await client.send(get("/party/x", "Connection: close"))
        await eventually(lambda: chunks.asked)
        before = -1
        while chunks.asked != before:
            before = chunks.asked
            await trio.sleep(0.1)
        assert chunks.asked < 300
        read = 0
        while received := await client.stream.receive_some(1 << 20):
            read += len(received)
        assert read > 65_536_000
        assert chunks.asked == 1001


@in_trio
async def test_a_client_that_leaves_cancels_the_request() -> None:
    """S26."""
    async with serving() as gateway:
        cancelled = trio.Event()

        async def endless(_request: HttpRequest) -> HttpReply:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        gateway.handler = endless
        for pipelined in (b"", get("/party/behind")):
            cancelled = trio.Event()
            async with connected(gateway) as client:
                await client.send(get() + pipelined)
                await eventually(lambda: gateway.requests)
                assert not cancelled.is_set()
            await cancelled.wait()
            assert [request.room for request in gateway.requests] == ["x"]
            gateway.requests.clear()
        await eventually(lambda: gateway.front.statistics().connections == 0)


@pytest.mark.parametrize("reset", [False, True])
@in_trio
async def test_a_client_that_leaves_ends_the_iterator(reset: bool) -> None:
    """S26: whether the iterator waits for its next chunk, or for the client to read."""
    async with serving() as gateway:
        for chunks in (Chunks([b"one"], then=trio.sleep_forever), Chunks([b"x" * 65_536] * 10_000)):
            gateway.handler = answering(HttpReply(200, [], chunks))
            async with connected(gateway) as client:
                await client.send(get())
                await client.more()
                if reset:
                    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await chunks.closed.wait()
        await eventually(lambda: gateway.front.statistics().connections == 0)


@in_trio
async def test_a_client_that_never_reads_is_given_up() -> None:
    async with serving(stall_seconds=0.2) as gateway, connected(gateway) as client:
        chunks = Chunks([b"x" * 65_536] * 10_000)
        gateway.handler = answering(HttpReply(200, [], chunks))
        await client.send(get())
        await chunks.closed.wait()


@in_trio
async def test_a_stream_that_fails_is_cut_so_that_the_client_knows() -> None:
    """S39: and without saying why."""

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("secret")

    async with serving() as gateway, connected(gateway) as client:
        chunks = Chunks([b"one"], then=fail)
        gateway.handler = answering(HttpReply(200, [], chunks))
        await client.send(get())
        answer = await client.rest()
        assert b"one" in answer
        assert not answer.endswith(b"0\r\n\r\n")
        assert b"secret" not in answer
        assert chunks.closed.is_set()


@in_trio
async def test_an_iterator_that_is_not_needed_is_closed() -> None:
    async with serving() as gateway, connected(gateway) as client:
        for reply in (HttpReply(200), HttpReply(304), HttpReply(200, [("x", "a\r\nb")]), HttpReply(700)):
            chunks = Chunks([b"one"])
            gateway.handler = answering(replace(reply, body=chunks))
            head = reply == HttpReply(200)
            await client.send(get(method="HEAD" if head else "GET"))
            await client.response(bodiless=head)
            await chunks.closed.wait()
            assert chunks.asked == 0


@in_trio
async def test_refusals_have_their_status_text_and_headers() -> None:
    async def refuse(_request: HttpRequest) -> HttpReply:
        await trio.lowlevel.checkpoint()
        raise RequestRefused(503, "starting", [("Retry-After", "1")])

    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = refuse
        await client.send(get())
        status, headers, body = await client.response()
        assert (status, body, headers["retry-after"]) == (503, b"starting\n", "1")
        assert headers["content-type"] == "text/plain; charset=utf-8"


@in_trio
async def test_an_error_shows_nothing_of_us() -> None:
    """S39: no traceback, path or version."""

    async def fail(_request: HttpRequest) -> HttpReply:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("secret")

    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = fail
        await client.send(get())
        status, headers, body = await client.response()
        assert (status, body) == (500, b"internal error\n")
        assert "server" not in headers
        gateway.handler = gateway.hello
        await client.send(get())
        assert "server" not in (await client.response())[1]


@pytest.mark.parametrize(
    "reply",
    [
        HttpReply(200, [("x", "a\r\nSet-Cookie: b=c")]),
        HttpReply(200, [("x y", "a")]),
        HttpReply(200, [("", "a")]),
        HttpReply(200, [("x", "\u20ac")]),
        HttpReply(101),
        HttpReply(0),
    ],
)
@in_trio
async def test_a_reply_that_is_no_http_becomes_500(reply: HttpReply) -> None:
    """Row 51."""
    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = answering(reply)
        await client.send(get())
        status, headers, _ = await client.response()
        assert status == 500
        assert "set-cookie" not in headers


@in_trio
async def test_what_is_for_the_next_hop_is_not_the_rooms_to_say() -> None:
    async with serving() as gateway, connected(gateway) as client:
        headers = [
            ("Connection", "close"),
            ("Transfer-Encoding", "gzip"),
            ("Content-Length", "99"),
            ("X", "\xe9"),
        ]
        gateway.handler = answering(HttpReply(200, headers, b"body"))
        await client.send(get())
        _, got, body = await client.response()
        assert body == b"body"
        assert got["x"] == "\xe9"
        assert "connection" not in got
        assert "transfer-encoding" not in got


@pytest.mark.parametrize("status", [204, 304])
@in_trio
async def test_a_status_without_a_body_has_none(status: int) -> None:
    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = answering(HttpReply(status, [("etag", '"1"')], b"ignored"))
        await client.send(get(), get())
        for _ in range(2):
            assert (await client.response(bodiless=True))[0] == status
        assert client.data == b""


# -- our own pages -----------------------------------------------------------------------------------------


@in_trio
async def test_health_says_ready_or_not_and_nothing_else() -> None:
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get("/_broker/health"))
        assert (await client.response())[::2] == (200, b"ready\n")
        gateway.is_ready = False
        await client.send(get("/_broker/health"))
        status, headers, body = await client.response()
        assert (status, body, headers["retry-after"]) == (503, b"not ready\n", "1")
        assert gateway.requests == []


@in_trio
async def test_the_token_opens_the_admin_pages() -> None:
    async with serving() as gateway, connected(gateway) as client:
        bearer = "Authorization: Bearer s3cret"
        await client.send(get("/_broker/api/rooms?limit=3", bearer))
        status, headers, body = await client.response()
        assert (status, json.loads(body), headers["cache-control"]) == (200, {"rooms": ["ä"]}, "no-store")
        assert gateway.admin_calls == [("GET", "/rooms", b"limit=3")]
        await client.send(get("/_broker/api/nothing", bearer), get("/_broker/else", bearer))
        assert (await client.response())[::2] == (404, b"no such thing\n")
        assert (await client.response())[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer s3cre",),
        ("Authorization: Bearer s3cret1",),
        ("Authorization: Bearer \xe4\xff",),
        ("Authorization: Basic s3cret",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer " + "a" * 15_000,),
        ("Authorization: Bearer s3cret", "Authorization: Bearer x"),
    ],
)
@in_trio
async def test_without_the_token_admin_pages_are_401(headers: tuple[str, ...]) -> None:
    """Row 68."""
    async with serving() as gateway, connected(gateway) as client:
        for path in ("/_broker/api/rooms?token=s3cret", "/_broker/api", "/_broker/", "/_broker/metrics"):
            await client.send(get(path, *headers))
            status, answer, _ = await client.response()
            assert (status, answer["www-authenticate"]) == (401, "Bearer")
        assert gateway.admin_calls == []


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("localhost:1999", (), 200),
        ("127.0.0.1", (), 200),
        ("[::1]:1999", (), 200),
        ("demo.localhost", ("Origin: http://localhost:1999",), 200),
        ("evil.example", (), 401),
        ("localhost.evil.example", (), 401),
        ("localhost", ("X-Forwarded-For: 127.0.0.1",), 401),
        ("localhost", ("Forwarded: for=127.0.0.1",), 401),
        ("localhost", ("Via: 1.1 proxy",), 401),
        ("localhost", ("Origin: http://evil.example",), 401),
        ("localhost", ("Origin: null",), 401),
    ],
)
@in_trio
async def test_dev_opens_admin_pages_to_this_machine_alone(
    host: str, headers: tuple[str, ...], status: int
) -> None:
    async with serving() as gateway, connected(gateway) as client:
        gateway.dev = True
        await client.send(get("/_broker/api/rooms", *headers).replace(b"localhost", host.encode(), 1))
        assert (await client.response())[0] == status


# -- HTTP/2 ------------------------------------------------------------------------------------------------


@in_trio
async def test_http2_with_prior_knowledge() -> None:
    async with serving(request_bytes_max=1000) as gateway:
        gateway.handler = echo
        async with httpx.AsyncClient(http1=False, http2=True, base_url=gateway.url) as client:
            for _ in range(2):
                response = await client.post(
                    "/parties/chat/y/z?q", content=b"body", headers={"X-Broker-A": "1"}
                )
                assert (response.status_code, response.http_version) == (200, "HTTP/2")
                assert response.content == b"body"
                assert "server" not in response.headers
            request = gateway.requests[0]
            assert (request.party, request.room, request.rest) == ("chat", "y", "/z")
            assert (request.http_version, request.query) == ("2", b"q")
            assert dict(request.headers)["host"] == f"127.0.0.1:{gateway.address[1]}"
            assert "x-broker-a" not in dict(request.headers)
            assert (await client.post("/party/x", content=b"x" * 1001)).status_code == 413
            assert (await client.post("/party/x", content=b"x" * 1000)).status_code == 200
            assert (await client.head("/party/x")).status_code == 200
        assert gateway.front.statistics().accepted == 1


class Http2Client:
    def __init__(self, client: Client) -> None:
        self.client = client
        self.engine = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
        self.engine.initiate_connection()

    async def flush(self) -> None:
        await self.client.send(self.engine.data_to_send())

    async def until(self, kind: type[h2.events.Event]) -> Any:
        while True:
            received = await self.client.stream.receive_some(65536)
            assert received, f"closed before {kind.__name__}"
            for event in self.engine.receive_data(bytes(received)):
                if isinstance(event, kind):
                    return event
            await self.flush()

    def request(self, stream_id: int, **pseudo: str) -> None:
        fields = {"method": "GET", "scheme": "http", "authority": "localhost", "path": "/party/x", **pseudo}
        headers = [(f":{name}", value) for name, value in fields.items() if value]
        self.engine.send_headers(stream_id, headers, end_stream=True)


@in_trio
async def test_http2_offers_no_extended_connect() -> None:
    async with serving() as gateway, connected(gateway) as client:
        http2 = Http2Client(client)
        await http2.flush()
        settings = (await http2.until(h2.events.RemoteSettingsChanged)).changed_settings
        assert settings
        assert h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL not in settings
        http2.request(1, method="CONNECT", path="", scheme="")
        await http2.flush()
        assert (await http2.until(h2.events.StreamReset)).stream_id == 1
        http2.request(3)
        await http2.flush()
        assert (await http2.until(h2.events.DataReceived)).data == b"hello x"


@in_trio
async def test_http2_streams_that_break_off_are_reset() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("secret")

    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = answering(HttpReply(200, [], Chunks([b"one"], then=fail)))
        http2 = Http2Client(client)
        http2.request(1)
        await http2.flush()
        assert (await http2.until(h2.events.StreamReset)).stream_id == 1


@in_trio
async def test_http2_client_that_leaves_or_resets_cancels() -> None:
    async with serving() as gateway:
        chunks = [Chunks([b"one"], then=trio.sleep_forever) for _ in range(2)]
        async with connected(gateway) as client:
            http2 = Http2Client(client)
            for stream_id, body in zip((1, 3), chunks, strict=True):
                gateway.handler = answering(HttpReply(200, [], body))
                http2.request(stream_id)
                await http2.flush()
                await http2.until(h2.events.DataReceived)
            http2.engine.reset_stream(1)
            await http2.flush()
            await chunks[0].closed.wait()
            assert not chunks[1].closed.is_set()
        await chunks[1].closed.wait()
        await eventually(lambda: gateway.front.statistics().connections == 0)


@in_virtual_time
async def test_an_idle_http2_connection_is_closed_and_pings_do_not_keep_it() -> None:
    async with (
        serving(idle_seconds=10, handshake_timeout_seconds=10) as gateway,
        connected(gateway) as client,
    ):
        http2 = Http2Client(client)
        http2.request(1)
        await http2.flush()
        await http2.until(h2.events.StreamEnded)
        for seconds in (3, 3, 3.9):
            http2.engine.ping(b"12345678")
            await http2.flush()
            await http2.until(h2.events.PingAckReceived)
            await passes(seconds)
        assert not select.select([client.stream.socket], [], [], 0)[0]
        await passes(0.2)
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await http2.until(h2.events.PingAckReceived)


@in_trio
async def test_garbage_after_the_http2_preface_ends_that_connection_only() -> None:
    """S40. The last is a frame of 16 MiB whose beginning alone has come."""
    async with serving() as gateway:
        for garbage in (b"\0" * 1000, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\xff" * 1000):
            async with connected(gateway) as client:
                await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + garbage)
                assert b"HTTP/1.1" not in await client.rest()
        async with connected(gateway) as client:
            await client.send(get())
            assert (await client.response())[0] == 200


# -- the end -----------------------------------------------------------------------------------------------


@in_trio
async def test_drain_finishes_what_is_owed_and_closes_what_is_idle() -> None:
    async with serving() as gateway, connected(gateway) as idle, connected(gateway) as busy:
        await idle.send(get())
        await idle.response()
        go = trio.Event()

        async def slow(request: HttpRequest) -> HttpReply:
            await go.wait()
            return await gateway.hello(request)

        gateway.handler = slow
        await busy.send(get())
        await eventually(lambda: len(gateway.requests) == 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.front.drain, 60)
            assert await idle.rest() == b""
            await idle.stream.aclose()
            go.set()
            assert (await busy.rest()).endswith(b"hello x")
            await busy.stream.aclose()
        assert gateway.front.statistics().connections == 0


@in_trio
async def test_drain_ends_a_connection_whose_request_is_the_first_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What answers it is still being loaded when the drain begins."""
    begun, go = threading.Event(), threading.Event()
    usual = importlib.import_module

    def slowly(name: str) -> object:
        begun.set()
        assert go.wait(20)
        return usual(name)

    monkeypatch.setattr("broker.gateway.http.importlib.import_module", slowly)
    async with serving() as gateway, connected(gateway) as client:
        await client.send(get())
        await eventually(begun.is_set)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.front.drain, 600)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
            assert (await client.rest()).endswith(b"hello x")
            await client.stream.aclose()
        assert gateway.front.statistics().connections == 0


@in_trio
async def test_the_front_ends_though_clients_stay() -> None:
    async with serving() as gateway, connected(gateway) as client:
        gateway.handler = answering(HttpReply(200, [], Chunks([b"x" * 65_536] * 10_000)))
        await client.send(get())
        await client.more()
