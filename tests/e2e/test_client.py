"""`broker.client` against the real command, and against servers that do what a broker never would."""

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket
import wsproto.utilities

import broker.client
from broker.client import (
    Closed,
    ConnectError,
    ConnectTimeout,
    Opened,
    PartySocket,
    QueryFailed,
    Refused,
    ResponseTooLarge,
    RetriesExhausted,
    SendBufferFull,
    SocketClosed,
    State,
)
from tests.broker.client.cases import DIFFERENT, JS_NAMES, REQUESTS, THROWN, WEBSOCKETS
from tests.e2e.broker_process import DEADLINE_SECONDS, ROOT, BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.test_partysocket import Driver
from tests.tools import program

pytestmark = pytest.mark.e2e

APP = """
import json

from broker import Refuse, Response, Server


class Main(Server):
    subprotocols = ("chat.v2", "chat.v1")

    @staticmethod
    async def on_before_connect(request, lobby):
        status = request.args.get("refuse")
        if status == "503":
            return Response("later", 503, headers={"Retry-After": "2"})
        if status:
            raise Refuse(int(status), "not you, möglich")

    async def on_connect(self, connection, ctx):
        request = ctx.request
        connection.send({
            "hello": connection.id,
            "room": self.room.id,
            "rest": request.rest,
            "args": request.args.to_dict(),
            "color": request.headers.get("X-Color"),
        })

    async def on_message(self, message, sender):
        if isinstance(message, str) and message.startswith("close "):
            _, code, reason = message.split(" ", 2)
            sender.close(int(code), reason)
        elif isinstance(message, str) and message.startswith("burst "):
            for number in range(int(message.split()[1])):
                sender.send(str(number))
        else:
            sender.send(message)

    async def on_close(self, connection, code, reason, was_clean):
        closes = await self.room.storage.get("closes", [])
        self.room.storage.put("closes", [*closes, [connection.id, code, reason, connection.close_cause]])

    async def on_request(self, request):
        if request.rest == "/closes":
            return await self.room.storage.get("closes", [])
        if request.rest == "/large":
            return "x" * 1000
        return {
            "method": request.method,
            "room": self.room.id,
            "rest": request.rest,
            "args": request.args.to_dict(),
            "body": (await request.get_data()).decode(),
            "color": request.headers.get("X-Color"),
            "type": request.headers.get("Content-Type"),
        }
"""

#: So that tests need not wait a second for each reconnection.
FAST: dict[str, Any] = {"delay_min_seconds": 0.02, "delay_max_seconds": 0.1}


@pytest.fixture(scope="module")
def app(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP)


def run(function: Callable[[], Awaitable[None]], seconds: float = DEADLINE_SECONDS) -> None:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await function()
        left = trio.lowlevel.current_root_task().child_nurseries[0].child_tasks  # type: ignore[union-attr]
        assert len(left) == 1, left

    trio.run(bounded)


def to(app: BrokerProcess, room: str = "room", **options: Any) -> PartySocket:
    return PartySocket(f"127.0.0.1:{app.port}", room, **{**FAST, **options})


async def hello(socket: PartySocket) -> Any:
    return json.loads(await socket.receive())


async def closes_of(app: BrokerProcess, room: str, count: int) -> list[list[Any]]:
    while True:
        answer = await broker.client.fetch(f"127.0.0.1:{app.port}", room, path="closes")
        if len(found := answer.json()) >= count:
            assert len(found) == count
            return found  # type: ignore[no-any-return]
        await trio.sleep(0.02)


# --- The npm package goes to the same addresses


@pytest.fixture(scope="module")
def javascript() -> Iterator[Driver]:
    driver = Driver(0)
    yield driver
    driver.close()


def in_javascript(options: dict[str, Any]) -> dict[str, Any]:
    return {"id": "ID", **{JS_NAMES.get(name, name): value for name, value in options.items()}}


@pytest.mark.parametrize("name", WEBSOCKETS)
def test_the_package_goes_where_we_go(javascript: Driver, name: str) -> None:
    options, url = WEBSOCKETS[name]
    assert javascript.ask(do="address", options=in_javascript(options))["url"] == url


@pytest.mark.parametrize("name", REQUESTS)
def test_the_package_asks_where_we_ask(javascript: Driver, name: str) -> None:
    options, url = REQUESTS[name]
    found = javascript.ask(do="fetch address", options=in_javascript(options))["url"]
    assert found.removesuffix("?") == url


@pytest.mark.parametrize("name", THROWN)
def test_the_package_throws_where_we_raise(javascript: Driver, name: str) -> None:
    with pytest.raises(AssertionError, match=r"path must not start with a slash|nowhere"):
        javascript.ask(do="address", options=in_javascript(THROWN[name]))


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_package_goes_elsewhere_where_we_raise(javascript: Driver, name: str) -> None:
    options, _, url = DIFFERENT[name]
    assert javascript.ask(do="address", options=in_javascript(options))["url"] == url


# --- Messages


def test_a_conversation(app: BrokerProcess) -> None:
    """S10: `_pk` is the connection's id. What is sent before it is open arrives in order."""

    async def main() -> None:
        async with to(
            app, "röom 日本", query={"ü": "é&="}, headers={"X-Color": "blue"}, path="a/b"
        ) as socket:
            assert socket.state == "connecting"
            await socket.send("early")
            socket.send_nowait(b"\x00\xff")
            await socket.send({"json": ["ü", None]})
            greeting = await hello(socket)
            assert socket.state == "open"
            assert greeting == {
                "hello": socket.id,
                "room": "röom 日本",
                "rest": "/a/b",
                "args": {"_pk": socket.id, "ü": "é&="},
                "color": "blue",
            }
            received = [await socket.receive() for _ in range(3)]
            assert received == ["early", b"\x00\xff", '{"json":["ü",null]}']
            [row] = app.connections(room="röom 日本")
            assert (row["id"], row["uri"]) == (socket.id, socket.url.replace("ws:", "http:"))

    run(main)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 1_048_576])
def test_messages_of_every_size(app: BrokerProcess, size: int) -> None:
    async def main() -> None:
        async with to(app) as socket:
            await hello(socket)
            for message in (os.urandom(size), "ü" * (size // 2)):
                await socket.send(message)
                assert await socket.receive() == message

    run(main)


def test_a_reader_that_is_slow_gets_everything(app: BrokerProcess) -> None:
    """What is not read stays in the network, and then in the gateway (S25)."""

    async def main() -> None:
        async with to(
            app, inbox_messages_max=1, ping_interval_seconds=0.1, ping_timeout_seconds=3.0
        ) as socket:
            await hello(socket)
            await socket.send("burst 3000")
            await trio.sleep(3.5)  # longer than a dead connection would have
            assert [await socket.receive() for _ in range(3000)] == [str(n) for n in range(3000)]
            assert socket.last_close is None

    run(main)


def test_a_program_that_only_sends(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app, inbox_messages_max=0) as socket:
            await socket.send("burst 3000")
            await socket.send("close 4000 enough")
            kinds = []
            async for event in socket.events():
                kinds.append(type(event))
                if len(kinds) == 3:
                    break
            assert kinds == [Opened, Closed, Opened]

    run(main)


def test_a_sender_is_as_slow_as_the_network(app: BrokerProcess) -> None:
    """`send` waits for room while the socket is open, and nothing is lost or doubled."""

    async def main() -> None:
        async with to(app, buffer_messages_max=2) as socket, trio.open_nursery() as nursery:
            await hello(socket)

            async def talk(name: str) -> None:
                for number in range(200):
                    await socket.send(f"{name} {number}")

            nursery.start_soon(talk, "a")
            nursery.start_soon(talk, "b")
            received = [await socket.receive() for _ in range(400)]
            for name in "ab":
                assert [m for m in received if str(m)[0] == name] == [f"{name} {n}" for n in range(200)]

    run(main)


def test_subprotocols(app: BrokerProcess) -> None:
    """S17."""

    async def main() -> None:
        async def ask() -> list[str]:
            return ["chat.v1", "chat.v2"]

        for offered, chosen in (
            ("chat.v1", "chat.v1"),
            (["chat.v1", "chat.v2"], "chat.v2"),
            (ask, "chat.v2"),
        ):
            async with to(app, protocols=offered) as socket:
                await socket.wait_open()
                assert socket.subprotocol == chosen

    run(main)


# --- Closes and reconnects


@pytest.mark.parametrize(
    ("code", "reason"), [(1000, ""), (1001, "gone"), (3000, "ü" * 61 + "!"), (4999, "x")]
)
def test_our_close(app: BrokerProcess, code: int, reason: str) -> None:
    """S14. What was sent before goes out first."""

    async def main() -> None:
        room = f"ours-{code}"
        async with to(app, room, id="ann") as socket:
            await hello(socket)
            await socket.send("last words")
            await socket.close(code, reason)
            assert socket.state == "closed"
            assert socket.last_close == Closed(code, reason, True, None)
            assert [message async for message in socket] in ([], ["last words"])
            for _ in range(2):
                with pytest.raises(SocketClosed) as raised:
                    await socket.receive()
                assert (raised.value.code, raised.value.reason) == (code, reason)
            with pytest.raises(SocketClosed):
                await socket.send("too late")
            await socket.close()
        assert await closes_of(app, room, 1) == [["ann", code, reason, "client_close"]]

    run(main)


@pytest.mark.parametrize(
    ("code", "reason"), [(999, ""), (1005, ""), (1006, ""), (1015, ""), (2999, ""), (5000, "")]
)
def test_closes_that_cannot_be_sent(app: BrokerProcess, code: int, reason: str) -> None:
    async def main() -> None:
        async with to(app) as socket:
            with pytest.raises(ValueError, match="a close code is"):
                await socket.close(code, reason)
            with pytest.raises(ValueError, match="at most 123 bytes"):
                await socket.close(1000, "ü" * 62)

    run(main)


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 3000, 4000])
def test_the_servers_close(app: BrokerProcess, code: int) -> None:
    """It comes back under its id; what is sent meanwhile arrives."""

    async def main() -> None:
        async with to(app, f"theirs-{code}", id="ann") as socket:
            events = socket.events()
            assert isinstance(await anext(events), Opened)
            assert json.loads(await anext(events))["hello"] == "ann"  # type: ignore[arg-type]
            await socket.send(f"close {code} as you wish")
            closed = await anext(events)
            assert isinstance(closed, Closed)
            assert (closed.code, closed.reason, closed.was_clean) == (code, "as you wish", True)
            assert closed.retry_in_seconds is not None
            await socket.send("still me")
            opened = await anext(events)
            assert isinstance(opened, Opened)
            assert opened.retries == 1
            assert json.loads(await anext(events))["hello"] == "ann"  # type: ignore[arg-type]
            assert await anext(events) == "still me"

    run(main)


def test_a_close_that_is_for_good(app: BrokerProcess) -> None:
    asked = []

    def should_reconnect(code: int, reason: str) -> bool:
        asked.append((code, reason))
        return code < 4000

    async def main() -> None:
        async with to(app, should_reconnect=should_reconnect) as socket:
            await socket.send("close 3999 once more")
            kinds: list[type] = []
            async for event in socket.events():
                kinds.append(type(event))
                if len(kinds) == 4:
                    await socket.send("close 4000 never")
            assert kinds == [Opened, str, Closed, Opened, str, Closed]
            assert asked == [(3999, "once more"), (4000, "never")]
            assert socket.state == "closed"
            with pytest.raises(SocketClosed, match="4000 never"):
                await socket.wait_open()
            socket.reconnect()  # all the same
            assert (await hello(socket))["hello"] == socket.id

    run(main)


def test_a_predicate_that_fails(app: BrokerProcess) -> None:
    async def main() -> None:
        def should_reconnect(code: int, reason: str) -> bool:
            raise LookupError("which code?")

        async with to(app, should_reconnect=should_reconnect) as socket:
            await socket.send("close 4000 x")
            with pytest.raises(LookupError, match="which code"):
                async for _ in socket:
                    pass
            assert socket.last_close is not None

    run(main)


def test_a_query_is_asked_for_at_every_connection(app: BrokerProcess) -> None:
    async def main() -> None:
        tokens = iter(range(100))

        async def query() -> dict[str, int]:
            await trio.lowlevel.checkpoint()
            return {"token": next(tokens)}

        async with to(app, query=query) as socket:
            for number in range(3):
                assert (await hello(socket))["args"] == {"_pk": socket.id, "token": str(number)}
                if number == 0:
                    await socket.send("close 4000 x")
                else:
                    socket.reconnect()

    run(main)


def test_a_query_that_fails_is_asked_again(app: BrokerProcess) -> None:
    async def main() -> None:
        calls = []

        def query() -> dict[str, str]:
            calls.append(1)
            if len(calls) < 3:
                raise OSError("the token server is away")
            return {"token": "x"}

        async with to(app, query=query) as socket:
            assert (await hello(socket))["args"]["token"] == "x"
            assert len(calls) == 3

        def no_more(error: ConnectError) -> bool:
            return not (isinstance(error, QueryFailed) and isinstance(error.__cause__, PermissionError))

        def logged_out() -> dict[str, str]:
            raise PermissionError("logged out")

        async with to(app, query=logged_out, should_retry=no_more) as socket:
            with pytest.raises(QueryFailed, match="`query` raised PermissionError: logged out") as raised:
                await socket.receive()
            assert isinstance(raised.value.__cause__, PermissionError)
        async with to(app, query=lambda: "a=1") as socket:
            with pytest.raises(TypeError, match="a query is a mapping"):
                await socket.receive()

    run(main)


def test_a_query_that_never_comes(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app, query=trio.sleep_forever, connect_timeout_seconds=0.05, retries_max=1) as socket:
            with pytest.raises(RetriesExhausted) as raised:
                await socket.receive()
            assert raised.value.tries == 2
            assert isinstance(raised.value.last, QueryFailed)

    run(main)


def test_reconnect_by_the_user(app: BrokerProcess) -> None:
    """S10: the successor of a connection that has closed is no duplicate. Each message has its connection."""

    async def main() -> None:
        async with to(app, "again", id="ann") as socket:
            for number in range(5):
                assert (await hello(socket))["hello"] == "ann"
                await socket.send(f"before {number}")
                socket.reconnect(4000, f"once more {number}")
                await socket.send(f"after {number}")
                seen = [await socket.receive()]
                while seen[-1] != f"after {number}":
                    seen.append(await socket.receive())
                # The answer to what was sent just before a close may come after it.
                assert [m for m in seen if not str(m).startswith("{")][-1] == f"after {number}"
                socket.reconnect()
        closes = await closes_of(app, "again", 10)
        assert [close[2] for close in closes if close[1] == 4000] == [f"once more {n}" for n in range(5)]

    run(main)


def test_another_room_at_run_time(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app, "first", query={"a": "1"}) as socket:
            assert (await hello(socket))["room"] == "first"
            socket.update_properties(room="second", query={"b": "2"})
            await socket.send("still the first")
            assert await socket.receive() == "still the first"
            socket.reconnect()
            greeting = await hello(socket)
            assert (greeting["room"], greeting["args"]) == ("second", {"_pk": socket.id, "b": "2"})
            with pytest.raises(broker.client.AddressError):
                socket.update_properties(room="a/b")
            assert socket.room == "second"

    run(main)


def test_a_socket_that_starts_closed(app: BrokerProcess) -> None:
    async def main() -> None:
        async with PartySocket(start_closed=True) as socket:
            assert socket.state == "closed"
            await socket.send("kept")
            with pytest.raises(broker.client.AddressError):
                socket.reconnect()
            socket.update_properties(f"127.0.0.1:{app.port}", "late")
            socket.reconnect()
            assert (await hello(socket))["room"] == "late"
            assert await socket.receive() == "kept"

    run(main)


def test_the_broker_goes_and_comes_back(broker: BrokerFactory, caplog: pytest.LogCaptureFixture) -> None:
    """S34: nobody notices the death of a gateway. After a stop (1012), and after the death of gateway and
    keeper together, everybody is back under their ids, with what was said meanwhile.
    """
    app = broker(APP)
    caplog.set_level(logging.INFO, "broker.client")

    async def main() -> None:
        async with to(app, id="ann") as ann, to(app, id="ben") as ben:
            await hello(ann)
            await hello(ben)
            await trio.to_thread.run_sync(app.kill_gateway)
            await ann.send("still here")
            assert await ann.receive() == "still here"
            assert ann.last_close is None
            await trio.to_thread.run_sync(app.stop)
            for socket in (ann, ben):
                while socket.state is State.OPEN:
                    await trio.sleep(0.01)
                await socket.send("while nobody is there")
            await trio.to_thread.run_sync(app.start)
            for socket in (ann, ben):
                assert socket.last_close is not None and socket.last_close.code == 1012
                assert (await hello(socket))["hello"] == socket.id
                assert await socket.receive() == "while nobody is there"
            await trio.to_thread.run_sync(lambda: app.kill("gateway", "keeper"))
            closed = await anext(ann.events())
            assert isinstance(closed, Closed)
            assert (closed.code, closed.was_clean) == (1006, False)
            for socket in (ann, ben):
                await socket.send("and again")
                while await socket.receive() != "and again":
                    pass
        seen = await closes_of(app, "room", 6)
        assert sorted(close[1:] for close in seen if close[0] == "ann") == [
            [1000, "", "client_close"],
            [1006, "", "gateway_lost"],
            [1012, "service restart", "server_close"],
        ]

    run(main, 5 * DEADLINE_SECONDS)  # a stop, a start and two deaths, each of which may take its own
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(warnings) <= 4  # one for each of the two and each absence, however often they tried
    assert not any("_pk" in text for text in warnings)
    assert any("open again" in record.getMessage() for record in caplog.records)


# --- Refusals and failures


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 418])
def test_refusals_that_are_for_good(app: BrokerProcess, status: int) -> None:
    async def main() -> None:
        async with to(app, query={"refuse": status}) as socket:
            for wait in (socket.receive, socket.wait_open, lambda: socket.send("x"), lambda: anext(socket)):
                with pytest.raises(Refused) as raised:
                    await wait()
                assert raised.value.status == status
            assert raised.value.body.decode().strip() == "not you, möglich"
            assert "refuse=" not in str(raised.value)
            assert socket.state == "closed"
            socket.update_properties(query=None)
            socket.reconnect()
            assert (await hello(socket))["hello"] == socket.id

    run(main)


def test_an_unknown_party(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app, party="nobody") as socket:
            with pytest.raises(Refused, match=r"404 Not Found: .*check party, room and prefix"):
                await socket.wait_open()

    run(main)


def test_a_refusal_that_passes(app: BrokerProcess) -> None:
    """503 with Retry-After: the pause is as long as that says."""

    async def main() -> None:
        refusals = iter(["503"])
        errors: list[ConnectError] = []

        def should_retry(error: ConnectError) -> bool:
            errors.append(error)
            return True

        query = lambda: {"refuse": next(refusals, None)}  # noqa: E731
        began = trio.current_time()
        async with to(app, query=query, should_retry=should_retry) as socket:
            await socket.wait_open()
            assert trio.current_time() - began >= 2.0
            [error] = errors
            assert isinstance(error, Refused)
            assert error.retry_after_seconds == 2.0
            assert socket.last_error is None

    run(main)


def test_a_port_where_nobody_is(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def main() -> None:
        async with PartySocket(f"127.0.0.1:{port}", "x", query={"token": "s"}, retries_max=2, **FAST) as lost:
            await lost.send("kept")
            with pytest.raises(RetriesExhausted) as raised:
                await lost.receive()
            assert raised.value.tries == 3
            assert isinstance(raised.value.__cause__, ConnectError)
            assert f"does the broker run, and on port {port}?" in str(raised.value)
            assert lost.unsent == 1
            assert lost.take_unsent() == ["kept"]

    run(main)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "Connection refused" in warning
    assert "token" not in warning


@contextlib.asynccontextmanager
async def server(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """Something that listens; gives its address."""

    async def quiet(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                await handler(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, quiet, 0)
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def read_head(stream: trio.abc.ReceiveStream) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        data = await stream.receive_some(1000)
        if not data:
            raise trio.BrokenResourceError("gone")
        head += data
    return head


async def hear_to_the_end(stream: trio.SocketStream) -> None:
    """Read whatever comes, until the client has gone."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some():
            pass


async def mute(stream: trio.SocketStream) -> None:
    """A server that accepts, and says nothing more."""
    await stream.send_all(accepted(await read_head(stream)))
    await hear_to_the_end(stream)


def accepted(head: bytes) -> bytes:
    """A 101 to a handshake."""
    import base64
    import hashlib
    import re

    found = re.search(rb"(?i)sec-websocket-key: (\S+)", head)
    assert found is not None
    digest = hashlib.sha1(found[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
    )


ANSWERS = {
    "nothing": (b"", ConnectError, "closed the connection during the handshake"),
    "half a head": (b"HTTP/1.1 101 Swi", ConnectError, "closed the connection during the handshake"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9\r\n\r\n", ConnectError, "no WebSocket handshake"),
    "a wrong key": (accepted(b"Sec-WebSocket-Key: x\r\n"), ConnectError, "no WebSocket handshake"),
    "a page": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", Refused, "200 OK: hi"),
    "a refusal without a length": (b"HTTP/1.1 403 No\r\n\r\nnot you", Refused, "403 Forbidden: not you"),
    "a refusal without a body": (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", Refused, "401 Un"),
    "a body without end": (b"HTTP/1.1 403 No\r\n\r\n" + b"x" * 300_000, Refused, "403 Forbidden: xxx"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_are_no_handshake(name: str) -> None:
    answer, kind, text = ANSWERS[name]

    async def handler(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(answer)

    async def main() -> None:
        async with server(handler) as host:
            async with PartySocket(host, "x", should_retry=lambda error: False) as lost:
                with pytest.raises(kind, match=text):
                    await lost.wait_open()

    run(main)


def test_a_handshake_that_takes_too_long() -> None:
    attempts = []

    async def handler(stream: trio.SocketStream) -> None:
        attempts.append(await read_head(stream))
        assert await stream.receive_some() == b""

    async def main() -> None:
        async with server(handler) as host:
            async with PartySocket(host, "x", connect_timeout_seconds=0.3, retries_max=2, **FAST) as lost:
                with pytest.raises(RetriesExhausted) as raised:
                    await lost.wait_open()
            assert isinstance(raised.value.last, ConnectTimeout)
            assert "not within 0.3 s; `connect_timeout_seconds`" in str(raised.value)
            assert raised.value.tries == 3
            assert 2 <= len(attempts) <= 3  # one may have been over before its request was out
            assert len({head.split(b"_pk=")[1].split()[0] for head in attempts}) == 1

    run(main)


def test_no_tls_where_it_is_expected(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app, protocol="wss", should_retry=lambda error: False) as socket:
            with pytest.raises(ConnectError, match=r'no TLS: .*protocol="ws"'):
                await socket.wait_open()

    run(main)


def test_tls(tmp_path: Path) -> None:
    """With a certificate that is trusted, and with one that is not; by WebSocket and by HTTP."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    make += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=test"]
    subprocess.run([*make, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def handler(plain: trio.SocketStream) -> None:
        stream = trio.SSLStream(plain, ours, server_side=True, https_compatible=True)
        head = await read_head(stream)
        if b"Upgrade: websocket" in head:
            await stream.send_all(accepted(head) + b"\x81\x02hi")
            await stream.receive_some()
            await stream.send_all(b"\x88\x02\x03\xe8")
        else:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    async def main() -> None:
        async with server(handler) as host:
            async with PartySocket(host, "x", protocol="wss", ssl_context=trusting) as socket:
                assert await socket.receive() == "hi"
            assert socket.last_close == Closed(1000, "", True, None)
            answer = await broker.client.fetch(host, "x", protocol="https", ssl_context=trusting)
            assert answer.text == "hello"
            async with PartySocket(host, "x", protocol="wss", should_retry=lambda error: False) as socket:
                with pytest.raises(ConnectError, match=r"no TLS: self.signed certificate"):
                    await socket.wait_open()
            with pytest.raises(ConnectError, match=r"no TLS: self.signed certificate"):
                await broker.client.fetch(host, "x", protocol="https")

    run(main)


def test_a_network_that_is_dead() -> None:
    """The connection is open and nothing comes any more, no answer to a ping either."""

    async def main() -> None:
        async with server(mute) as host:
            quick = {"ping_interval_seconds": 0.05, "ping_timeout_seconds": 0.1}
            async with PartySocket(host, "x", **quick, **FAST) as lost:  # type: ignore[arg-type]
                kinds = []
                async for event in lost.events():
                    kinds.append(type(event))
                    if isinstance(event, Closed):
                        assert (event.code, event.reason) == (1006, "no sign of life for 0.15 s")
                    if len(kinds) == 4:
                        break
                assert kinds == [Opened, Closed, Opened, Closed]

    run(main)


def test_a_program_that_never_receives() -> None:
    """Its inbox is full, so that it does not read of the end; it hears of it all the same."""

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(accepted(await read_head(stream)) + 5 * b"\x81\x01x")

    async def main() -> None:
        # Long enough that nobody takes it for dead before it has read anything.
        quick: dict[str, Any] = {"ping_interval_seconds": 0.05, "ping_timeout_seconds": 20.0, **FAST}
        async with server(handler) as host, PartySocket(host, "x", inbox_messages_max=1, **quick) as deaf:
            while deaf.last_close is None:
                await trio.sleep(0.01)
            assert (deaf.last_close.code, deaf.last_close.reason) == (1006, "the connection was lost")
            await deaf.wait_open()

    run(main)


def test_a_server_that_does_everything_wrong() -> None:
    """P4: whatever happens and whatever is ordered, no message comes twice or out of order, what was
    cancelled is not sent, and Opened and Closed alternate.
    """
    chance = random.Random(4)
    arrived: list[str] = []

    async def handler(stream: trio.SocketStream) -> None:
        kind = chance.random()
        if kind < 0.1:
            return
        if kind < 0.2:
            await stream.send_all(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
            return
        with trio.move_on_after(chance.random() * 0.2):
            try:
                async with trio.open_nursery() as nursery:
                    request = await trio_websocket.wrap_server_stream(nursery, stream)
                    websocket = await request.accept()
                    for _ in range(chance.randrange(60)):
                        message = await websocket.get_message()
                        arrived.append(str(message))
                        await websocket.send_message(message)
                    await websocket.aclose(4000, "enough")
                    nursery.cancel_scope.cancel()
            except* (trio_websocket.ConnectionClosed, wsproto.utilities.ProtocolError):
                pass

    events: list[Any] = []
    sent: set[str] = set()

    async def use(socket: PartySocket) -> None:
        async def read() -> None:
            while True:
                async for event in socket.events():
                    events.append(event)  # noqa: PERF401 - others look at what has come so far
                await trio.sleep(0.002)  # closed: until somebody reconnects

        async def order() -> None:
            while True:
                await trio.sleep(chance.random() * 0.03)
                if chance.random() < 0.5:
                    with trio.move_on_after(chance.random() * 0.01):
                        await socket.close(4001)
                socket.reconnect()

        async def send(name: str) -> None:
            for number in itertools.count():
                with trio.move_on_after(chance.random() * 0.02), contextlib.suppress(SocketClosed):
                    await socket.send(f"{name} {number}")
                    sent.add(f"{name} {number}")
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(order)
            nursery.start_soon(send, "a")
            nursery.start_soon(send, "b")
            while sum(isinstance(event, Opened) for event in events) < 25 or len(arrived) < 100:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    async def main() -> None:
        quick = {"connect_timeout_seconds": 0.5, "close_timeout_seconds": 0.1}
        async with server(handler) as host:
            async with PartySocket(host, "x", **FAST, **quick) as socket:  # type: ignore[arg-type]
                await use(socket)

    run(main, 3 * DEADLINE_SECONDS)
    assert set(arrived) <= sent
    echoes = [event for event in events if isinstance(event, str)]
    for messages in (arrived, echoes):
        for name in "ab":
            numbers = [int(text[2:]) for text in messages if text[0] == name]
            assert numbers == sorted(set(numbers))
    kinds = [type(event) for event in events if not isinstance(event, str)]
    assert kinds == [(Opened, Closed)[number % 2] for number in range(len(kinds))]


FRAMES = {
    "a frame that must not be": (b"\x83\x00", 1002, "Invalid opcode"),
    "text that is none": (b"\x81\x01\xff", 1007, "decode"),
    "a message too large": (b"\x82\x7e\x03\xe9" + b"x" * 1001, 1009, "larger than message_bytes_max, 1,000"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_a_server_must_not_send(name: str) -> None:
    frame, code, text = FRAMES[name]

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(accepted(await read_head(stream)) + frame)
        await hear_to_the_end(stream)

    async def main() -> None:
        async with server(handler) as host:
            never = lambda code, reason: False  # noqa: E731
            async with PartySocket(host, "x", message_bytes_max=1000, should_reconnect=never) as socket:
                events = [event async for event in socket.events()]
                assert isinstance(events[-1], Closed)
                assert (events[-1].code, events[-1].was_clean) == (code, False)
                assert text in events[-1].reason

    run(main)


def test_a_ping_that_comes_after_our_close() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(accepted(await read_head(stream)))
        await stream.receive_some()
        await stream.send_all(b"\x89\x00")
        await stream.receive_some()

    async def main() -> None:
        async with server(handler) as host, PartySocket(host, "x") as socket:
            await socket.wait_open()
            await socket.close(4000, "bye")
            assert socket.last_close == Closed(4000, "bye", False, None)

    run(main)


def test_a_server_that_does_not_answer_our_close() -> None:
    async def main() -> None:
        async with server(mute) as host, PartySocket(host, "x", close_timeout_seconds=0.1) as socket:
            await socket.wait_open()
            await socket.close()
            assert socket.last_close == Closed(1000, "", False, None)

    run(main)


# --- Bounds


def test_the_bound_of_what_waits(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app, start_closed=True, buffer_messages_max=3) as socket:
            for number in range(3):
                await socket.send(str(number))
            for send in (socket.send, None):
                with pytest.raises(SendBufferFull, match=r"4 messages, and at most 3 are allowed"):
                    await send("3") if send else socket.send_nowait("3")
            socket.reconnect()
            await hello(socket)
            assert [await socket.receive() for _ in range(3)] == ["0", "1", "2"]
            await socket.send("3")
            assert await socket.receive() == "3"
        async with to(app, buffer_bytes_max=10) as socket:
            await hello(socket)
            await socket.send("x" * 10)
            with pytest.raises(SendBufferFull, match=r"11 bytes, and at most 10"):
                await socket.send("x" * 11)

    run(main)


def test_a_message_that_is_none(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app) as socket:
            with pytest.raises(TypeError):
                await socket.send(object())
            with pytest.raises(ValueError, match="surrogate"):
                await socket.send("\ud800")
            assert socket.unsent == 0

    run(main)


def test_use_outside_of_its_block(app: BrokerProcess) -> None:
    async def main() -> None:
        socket = to(app)
        for use in (socket.send("x"), socket.receive(), socket.wait_open(), socket.close()):
            with pytest.raises(RuntimeError, match="async with PartySocket"):
                await use
        async with socket:
            await hello(socket)
        with pytest.raises(SocketClosed):
            await socket.send("x")
        for again in (socket.reconnect, lambda: socket.send_nowait("x")):
            with pytest.raises((RuntimeError, SocketClosed)):
                again()
        with pytest.raises(RuntimeError, match="entered once"):
            async with socket:
                pass
        with pytest.raises(broker.client.AddressError, match="neither room nor base_path"):
            async with PartySocket("localhost:1"):
                pass

    run(main)


# --- Cancellation


@pytest.mark.parametrize("state", ["connecting", "waiting", "open", "closing", "iterating", "asking"])
def test_cancellation_in_every_state(state: str) -> None:
    """It ends at once, leaves no task, and the exception is no group."""

    async def handler(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        if state != "connecting":
            await stream.send_all(accepted(head))
        await hear_to_the_end(stream)

    async def main() -> None:
        options: dict[str, Any] = {"close_timeout_seconds": 3600.0, "delay_min_seconds": 3600.0}
        options["delay_max_seconds"] = 3600.0
        async with server(handler) as host:
            if state == "waiting":
                host = "127.0.0.1:1"
            if state == "asking":
                options["query"] = trio.sleep_forever
            socket = PartySocket(host, "x", connect_timeout_seconds=3600.0, **options)
            with trio.move_on_after(0.2) as scope:
                async with socket:
                    if state == "iterating":
                        async for _ in socket:
                            pass
                    elif state == "closing":
                        await socket.wait_open()
                        await socket.close()
                    else:
                        if state == "open":
                            await socket.wait_open()
                        await trio.sleep_forever()
            assert scope.cancelled_caught
            assert socket.state == "closed"

    run(main)


def test_what_the_block_raises_beside_a_cancellation_is_not_lost(app: BrokerProcess) -> None:
    async def main() -> None:
        with pytest.RaisesGroup(KeyError), trio.CancelScope() as scope:
            async with to(app) as socket:
                await hello(socket)
                async with trio.open_nursery() as nursery:

                    async def fail() -> None:
                        try:
                            await trio.sleep_forever()
                        finally:
                            raise KeyError("mine")

                    nursery.start_soon(fail)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    scope.cancel()

    run(main)


@pytest.mark.parametrize("state", ["connecting", "waiting", "open"])
def test_leaving_in_every_state(state: str) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        if state == "open":
            await stream.send_all(accepted(head))
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some():
                if data[0] == 0x88:
                    await stream.send_all(b"\x88\x02\x03\xe8")

    async def main() -> None:
        async with server(handler) as host:
            if state == "waiting":
                host = "127.0.0.1:1"
            with pytest.raises(KeyError, match="mine"):
                async with PartySocket(host, "x") as socket:
                    while socket.state != state:
                        await trio.sleep(0.01)
                    raise KeyError("mine")
            assert socket.state == "closed"
            if state == "open":
                assert socket.last_close == Closed(1000, "", True, None)

    run(main)


def test_a_close_that_is_cancelled_ends_the_connection(app: BrokerProcess) -> None:
    async def main() -> None:
        async with server(mute) as host:
            async with PartySocket(host, "x", close_timeout_seconds=3600.0) as socket:
                await socket.wait_open()
                with trio.move_on_after(0.05):
                    await socket.close(4000, "bye")
                with pytest.raises(SocketClosed):
                    await socket.receive()
                assert socket.last_close == Closed(4000, "bye", False, None)

    run(main)


def test_a_receive_that_is_cancelled_loses_nothing(app: BrokerProcess) -> None:
    async def main() -> None:
        async with to(app) as socket:
            await hello(socket)
            received: list[str | bytes] = []
            for number in range(200):
                await socket.send(str(number))
                with trio.move_on_after(0.0005):
                    received.append(await socket.receive())
            while len(received) < 200:
                received.append(await socket.receive())
            assert received == [str(number) for number in range(200)]

    run(main)


def test_orders_at_any_moment(app: BrokerProcess) -> None:
    """Whatever is ordered while whatever happens, the last order counts."""

    async def main() -> None:
        async with to(app, "orders", id="ann") as socket:
            for number in range(60):
                await trio.sleep(0.0007 * (number % 20))
                if number % 3:
                    socket.reconnect(4000 + number)
                else:
                    with trio.move_on_after(0.001 * (number % 7)):
                        await socket.close(3000 + number)
            socket.reconnect()
            await socket.wait_open()
            await socket.send("after all")
            while await socket.receive() != "after all":
                pass

    run(main)
    eventually(lambda: not app.connections(room="orders"), "no connection is left")


# --- HTTP


def test_fetch(app: BrokerProcess) -> None:
    async def main() -> None:
        host = f"127.0.0.1:{app.port}"
        answer = await broker.client.fetch(
            host, "ü", path="a/b", query={"x": "ü", "no": None}, method="POST", json={"ö": 1},
            headers={"X-Color": "blue"},
        )  # fmt: skip
        assert answer.ok
        assert answer.header("content-type") == "application/json"
        assert answer.json() == {
            "method": "POST", "room": "ü", "rest": "/a/b", "args": {"x": "ü"}, "body": '{"ö": 1}',
            "color": "blue", "type": "application/json",
        }  # fmt: skip
        assert (await broker.client.fetch(f"http://{host}/party/x", data="hällo", method="PUT")).json()[
            "body"
        ] == "hällo"
        missing = await broker.client.fetch(host, "x", party="nobody")
        assert (missing.status, missing.ok) == (404, False)
        for limit in (999, 1000, 1001):
            large = broker.client.fetch(host, "x", path="large", response_bytes_max=limit)
            if limit < 1000:
                with pytest.raises(ResponseTooLarge, match="`response_bytes_max` allows more"):
                    await large
            else:
                assert len((await large).body) == 1000
        async with to(
            app, "mine", path="not/here", query=lambda: {"token": "t"}, headers={"X-Color": "red"}
        ) as socket:
            found = (await socket.fetch("deep", query={"more": 1})).json()
            assert (found["room"], found["rest"], found["color"]) == ("mine", "/deep", "red")
            assert found["args"] == {"token": "t", "more": "1"}

    run(main)


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal", b"nonsense\r\n\r\n"]
)
def test_a_request_that_breaks_off(answer: bytes) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(answer)

    async def main() -> None:
        async with server(handler) as host:
            with pytest.raises(ConnectError, match="may have been carried out"):
                await broker.client.fetch(host, "x")

    run(main)


def test_a_request_that_takes_too_long() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.receive_some()

    async def main() -> None:
        async with server(handler) as host:
            with pytest.raises(ConnectTimeout, match="`timeout_seconds`"):
                await broker.client.fetch(host, "x", timeout_seconds=0.1)

    run(main)


# --- The synchronous face


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("broker.client")]


def plainly(app: BrokerProcess, room: str = "plain", **options: Any) -> broker.client.BlockingSocket:
    return broker.client.connect(f"127.0.0.1:{app.port}", room, **{**FAST, **options})


def test_a_script(app: BrokerProcess) -> None:
    with broker.client.connect(app.ws_url("/party/script?name=ann")) as socket:
        greeting = json.loads(socket.receive(timeout=DEADLINE_SECONDS))
        assert (greeting["room"], greeting["args"]) == ("script", {"_pk": socket.id, "name": "ann"})
        socket.send("hi")
        socket.send({"a": 1})
        assert socket.receive() == "hi"
        assert socket.receive() == '{"a":1}'
        with pytest.raises(TimeoutError):
            socket.receive(timeout=0.01)
        assert socket.fetch("x").json()["rest"] == "/x"
        socket.send("burst 500")
        for number, message in enumerate(socket):
            assert message == str(number)
            if number == 499:
                break
        assert socket.state == "open"
    assert socket.state == "closed"
    socket.close()
    with pytest.raises(SocketClosed):
        socket.send("x")
    with pytest.raises(SocketClosed):
        socket.receive()
    assert list(socket) == []


def test_a_script_over_a_reconnect(app: BrokerProcess) -> None:
    with plainly(app) as socket:
        first = json.loads(socket.receive(timeout=DEADLINE_SECONDS))
        socket.send("close 4000 x")
        second = json.loads(socket.receive(timeout=DEADLINE_SECONDS))
        assert first["hello"] == second["hello"] == socket.id
        assert socket.last_close is not None and socket.last_close.code == 4000
        socket.update_properties(room="elsewhere")
        socket.reconnect()
        assert json.loads(socket.receive(timeout=DEADLINE_SECONDS))["room"] == "elsewhere"


def test_what_has_come_can_be_received_after_the_end(app: BrokerProcess) -> None:
    with plainly(app, should_reconnect=lambda code, reason: False) as socket:
        socket.send("burst 300")
        socket.send("close 4000 enough")
        received = list(socket)
    assert received[1:] == [str(number) for number in range(300)]
    with plainly(app) as socket:
        socket.send("burst 300")
        socket.wait_open()
        eventually(lambda: len(socket._queue) + len(socket._socket._inbox) >= 301, "all messages")
    assert len(list(socket)) == 301


def test_scripts_that_fail(app: BrokerProcess) -> None:
    with pytest.raises(Refused) as raised:
        plainly(app, party="nobody")
    assert raised.value.status == 404
    with pytest.raises(TimeoutError, match=r"not open within 2.5 s: ws://127.0.0.1:1/.*does the broker run"):
        broker.client.connect("127.0.0.1:1", "x", timeout=2.5)  # there has been an attempt by then
    with pytest.raises(broker.client.AddressError):
        broker.client.connect(f"127.0.0.1:{app.port}")
    eventually(lambda: not own_threads(), "the end of their threads")


def test_a_script_within_trio(app: BrokerProcess) -> None:
    """It would block the loop; in a thread of it it does not."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="async with PartySocket"):
            plainly(app)

        def script() -> str | bytes:
            with plainly(app) as socket:
                return socket.receive(timeout=DEADLINE_SECONDS)

        assert b"hello" in str(await trio.to_thread.run_sync(script)).encode()

    run(main)


def test_several_threads_with_one_socket(app: BrokerProcess) -> None:
    with plainly(app) as socket:
        socket.receive()

        def talk(name: str) -> None:
            for number in range(50):
                socket.send(f"{name} {number}")

        threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        received = [str(socket.receive(timeout=DEADLINE_SECONDS)) for _ in range(150)]
        for thread in threads:
            thread.join()
        for name in "abc":
            assert [m for m in received if m[0] == name] == [f"{name} {number}" for number in range(50)]


SCRIPT = """
import sys
import broker.client

with broker.client.connect(sys.argv[1]) as socket:
    try:
        print(socket.receive(), flush=True)
        for message in socket:
            print(message, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        socket.send("after that")
        print(socket.receive(timeout=20), flush=True)
        raise
"""


def test_ctrl_c(app: BrokerProcess) -> None:
    """It interrupts the wait, the socket can still be used, and the room sees a close."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, app.ws_url("/party/interrupted?x=1")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "hello" in process.stdout.readline()
        time.sleep(0.2)  # until it waits; nothing tells from outside
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=3 * DEADLINE_SECONDS)
    finally:
        process.kill()
    assert out.splitlines() == ["interrupted", "after that"]
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err

    async def main() -> None:
        [close] = await closes_of(app, "interrupted", 1)
        assert close[1:] == [1000, "", "client_close"]

    run(main)


def test_a_program_that_ends_without_closing(app: BrokerProcess) -> None:
    code = "import sys, broker.client; s = broker.client.connect(sys.argv[1]); print(s.receive())"
    done = subprocess.run(
        [sys.executable, "-c", code, app.ws_url("/party/forgotten")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "hello" in done.stdout


def test_nothing_is_left(app: BrokerProcess) -> None:
    eventually(lambda: not app.connections(), "no connection")
    eventually(lambda: not own_threads(), "no thread")
