"""The npm package partysocket, unmodified, on ws and Node: what DESIGN promises its users."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.tools import node

DRIVER = Path(__file__).parent / "node" / "partysocket.mjs"

APP = """
import json

from broker import Server


class Main(Server):
    subprotocols = ("chat.v2", "chat.v1")

    async def on_connect(self, connection, ctx):
        request = ctx.request
        connection.send({
            "hello": connection.id,
            "party": self.room.party,
            "room": self.room.id,
            "rest": request.rest,
            "args": request.args.to_dict(),
        })

    async def on_message(self, message, sender):
        if isinstance(message, str) and message.startswith("close "):
            sender.close(int(message.split()[1]), "as you wish")
        else:
            sender.send(message)

    async def on_close(self, connection, code, reason, was_clean):
        closes = await self.room.storage.get("closes", [])
        self.room.storage.put("closes", [*closes, [connection.id, code, connection.close_cause]])

    async def on_request(self, request):
        if request.rest == "/closes":
            return await self.room.storage.get("closes", [])
        return {
            "method": request.method,
            "party": self.room.party,
            "room": self.room.id,
            "rest": request.rest,
            "args": request.args.to_dict(),
            "body": (await request.get_data()).decode(),
            "header": request.headers.get("X-Color"),
        }


class ChatRoom(Server):
    async def on_connect(self, connection, ctx):
        connection.send({"hello": connection.id, "party": self.room.party})

    async def on_message(self, message, sender):
        self.room.broadcast(message)
"""


class Socket:
    """One PartySocket in the Node process."""

    def __init__(self, driver: "Driver", name: str, options: dict[str, Any], **more: Any) -> None:
        self._driver = driver
        self._name = name
        self.first_state = driver.ask(do="open", socket=name, options=options, **more)["state"]

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = self._driver.ask(do="record", socket=self._name)
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.record()["events"] if event["type"] == kind]

    def wait_for(self, kind: str, count: int) -> list[dict[str, Any]]:
        """Wait for so many events of a kind, and give them; more is an error."""
        eventually(lambda: len(self.events(kind)) >= count, f"{count} x {kind}: {self.record()}")
        events = self.events(kind)
        assert len(events) == count, events
        return events

    def messages(self, count: int) -> list[str | bytes]:
        return [
            event["text"] if "text" in event else base64.b64decode(event["base64"])
            for event in self.wait_for("message", count)
        ]

    def send(self, *messages: str | bytes) -> None:
        packed = [
            {"text": each} if isinstance(each, str) else {"base64": base64.b64encode(each).decode()}
            for each in messages
        ]
        self._driver.ask(do="send", socket=self._name, messages=packed)

    def do(self, what: str, **more: Any) -> None:
        self._driver.ask(do=what, socket=self._name, **more)


class Driver:
    """The Node process."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._opened = 0
        self._process = subprocess.Popen(
            [node(), str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def open(self, *, room: str = "room", queries: list[Any] | None = None, **options: Any) -> Socket:
        # Reconnections at once, so that tests need not wait three seconds for each.
        options = {
            "host": f"127.0.0.1:{self.port}",
            "room": room,
            "minReconnectionDelay": 20,
            "maxReconnectionDelay": 100,
            **options,
        }
        self._opened += 1
        return Socket(self, f"socket {self._opened}", options, **({"queries": queries} if queries else {}))

    def fetch(self, init: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """PartySocket.fetch."""
        options = {"host": f"127.0.0.1:{self.port}", "room": "room", **options}
        found: dict[str, Any] = self.ask(do="fetch", options=options, init=init or {})
        return found

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"Node has gone, with status {self._process.wait(20)}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def app(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP)


@pytest.fixture
def driver(app: BrokerProcess) -> Iterator[Driver]:
    driver = Driver(app.port)
    yield driver
    driver.close()
    eventually(lambda: not app.connections(), "end of all connections")


def hello(socket: Socket, index: int = 0) -> Any:
    """The greeting of the connection that was opened as the `index`-th."""
    eventually(lambda: len(socket.events("open")) > index, "an open socket")

    def greetings() -> list[Any]:
        texts = [event["text"] for event in socket.events("message") if "text" in event]
        return [json.loads(text) for text in texts if text.startswith('{"hello"')]

    return eventually(lambda: greetings()[index:], "a greeting")[0]


def expect_closes(driver: Driver, closes: list[Any], room: str = "room") -> None:
    """Wait until the room has been told these ends, of whatever order, and no others."""
    eventually(
        lambda: sorted(json.loads(driver.fetch(room=room, path="closes")["text"])) == closes, "close turns"
    )


def test_connect(app: BrokerProcess, driver: Driver) -> None:
    """S10: `_pk` is the connection's id."""
    socket = driver.open(room="lobby")
    record = socket.record()
    assert hello(socket) == {
        "hello": record["id"],
        "party": "main",
        "room": "lobby",
        "rest": "",
        "args": {"_pk": record["id"]},
    }
    [opened] = socket.wait_for("open", 1)
    assert opened["url"] == app.ws_url(f"/parties/main/lobby?_pk={record['id']}")
    [row] = app.connections(room="lobby")
    assert (row["id"], row["party"]) == (record["id"], "main")


def test_an_id_of_ones_own(app: BrokerProcess, driver: Driver) -> None:
    socket = driver.open(id="ann")
    assert hello(socket)["hello"] == "ann"
    assert socket.record()["id"] == "ann"


def test_query_and_query_function(driver: Driver) -> None:
    """The function is asked again for each connection."""
    plain = driver.open(query={"a": "1", "b": None, "c": "ü&="})
    assert hello(plain)["args"] == {"_pk": plain.record()["id"], "a": "1", "c": "ü&="}
    asked = driver.open(queries=[{"token": "first"}, {"token": "second", "none": None}])
    assert hello(asked)["args"] == {"_pk": asked.record()["id"], "token": "first"}
    asked.do("reconnect")
    assert hello(asked, 1)["args"] == {"_pk": asked.record()["id"], "token": "second"}


def test_path_party_and_prefix(driver: Driver) -> None:
    assert hello(driver.open(path="a/b c"))["rest"] == "/a/b c"
    assert hello(driver.open(party="chat-room"))["party"] == "chat-room"
    assert hello(driver.open(room="r/öm".replace("/", "-")))["room"] == "r-öm"
    assert hello(driver.open(basePath="party/based"))["room"] == "based"


def test_subprotocols(driver: Driver) -> None:
    """S17."""
    for offered, chosen in ((["chat.v1", "chat.v2"], "chat.v2"), (["chat.v1"], "chat.v1")):
        [opened] = driver.open(protocols=offered).wait_for("open", 1)
        assert opened["protocol"] == chosen


def test_send_before_open(driver: Driver) -> None:
    """What is sent while it connects is kept by the client and arrives in order."""
    socket = driver.open(startClosed=True)
    messages: list[str | bytes] = [f"early {number}" for number in range(20)]
    messages[7] = b"\x00\xff binary"
    socket.send(*messages)
    assert socket.events("open") == []
    socket.do("reconnect")
    assert socket.messages(21)[1:] == messages


def test_text_and_binary_of_every_size(driver: Driver) -> None:
    socket = driver.open()
    hello(socket)
    sent: list[str | bytes] = ["", b"", "x", b"x"]
    for size in (125, 126, 65_535, 65_536, 100_000, 1_048_576):
        sent += ["ü" * (size // 2), os.urandom(size)]
    for message in sent:  # one at a time: together their echoes are more than may wait for a client (S25)
        before = len(socket.events("message"))
        socket.send(message)
        assert socket.messages(before + 1)[-1] == message


def test_a_broadcast_reaches_everybody(driver: Driver) -> None:
    sockets = [driver.open(party="chat-room", room="all") for _ in range(10)]
    for socket in sockets:
        hello(socket)
    sockets[3].send("to all")
    for socket in sockets:
        assert socket.messages(2)[1] == "to all"


def test_close_by_the_client(app: BrokerProcess, driver: Driver) -> None:
    """S14; a client that has closed does not come back."""
    socket = driver.open(room="leaving", id="ann")
    hello(socket)
    socket.do("close", code=4123, reason="that is all")
    eventually(lambda: not app.connections(room="leaving"), "its end")
    expect_closes(driver, [["ann", 4123, "client_close"]], room="leaving")
    assert len(socket.events("open")) == 1


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1013, 3000, 4000])
def test_reconnect_after_a_close_of_the_server(app: BrokerProcess, driver: Driver, code: int) -> None:
    """The client comes back under its id; what it sends meanwhile arrives."""
    socket = driver.open(room=f"closing-{code}", id="ann")
    hello(socket)
    socket.send(f"close {code}")
    [closed] = socket.wait_for("close", 1)
    assert (closed["code"], closed["reason"]) == (code, "as you wish")
    socket.send("still me")
    assert hello(socket, 1)["hello"] == "ann"
    assert socket.messages(3)[2] == "still me"
    expect_closes(driver, [["ann", code, "server_close"]], room=f"closing-{code}")


def test_reconnect_by_the_client(app: BrokerProcess, driver: Driver) -> None:
    """S10: the successor of a connection that has closed is no duplicate."""
    socket = driver.open(room="again", id="ann")
    for number in range(5):
        assert hello(socket, number)["hello"] == "ann"
        socket.do("reconnect", code=1000, reason="once more")
    assert hello(socket, 5)["hello"] == "ann"
    eventually(lambda: len(app.connections(room="again")) == 1, "one connection")
    assert socket.record()["state"] == 1


def test_the_host_is_killed(app: BrokerProcess, driver: Driver) -> None:
    """S34: nobody reconnects, because nobody is disconnected."""
    sockets = [driver.open(room=f"kept-{number % 3}", id=f"c{number}") for number in range(9)]
    for socket in sockets:
        hello(socket)
    accepted = app.stats()["accepted"]
    app.kill_host(wait_for_next=False)
    for socket in sockets:
        socket.send("while nobody is there", b"\x01" * 200_000)
    for number, socket in enumerate(sockets):
        assert socket.messages(3)[1:] == ["while nobody is there", b"\x01" * 200_000]
        record = socket.record()
        assert record["state"] == 1
        assert {event["type"] for event in record["events"]} == {"open", "message"}
        assert len(socket.events("open")) == 1
        assert record["id"] == f"c{number}"
    assert app.stats()["accepted"] == accepted


def test_a_connection_that_comes_while_there_is_no_host(app: BrokerProcess, driver: Driver) -> None:
    app.kill_host(wait_for_next=False)
    socket = driver.open(room="no-host")
    socket.send("early")
    assert socket.messages(2)[1] == "early"
    assert len(socket.events("open")) == 1
    app.wait_for_hosts()


def test_an_unknown_party(driver: Driver) -> None:
    """The client tries again and again; each time it is refused."""
    socket = driver.open(party="nobody")
    eventually(lambda: socket.record()["retries"] >= 3, "attempts")
    assert socket.events("open") == []
    assert any("404" in event["text"] for event in socket.events("error"))
    socket.do("close")


def test_fetch(app: BrokerProcess, driver: Driver) -> None:
    got = driver.fetch(room="lobby", path="a/b", query={"x": "ü", "none": None})
    assert got["status"] == 200
    assert got["url"].startswith(app.url("/parties/main/lobby/a/b?"))
    assert json.loads(got["text"]) == {
        "method": "GET",
        "party": "main",
        "room": "lobby",
        "rest": "/a/b",
        "args": {"x": "ü"},
        "body": "",
        "header": None,
    }
    posted = driver.fetch({"method": "POST", "body": "hällo", "headers": {"X-Color": "blue"}})
    assert posted["status"] == 200
    answer = json.loads(posted["text"])
    assert (answer["method"], answer["body"], answer["header"]) == ("POST", "hällo", "blue")
    assert driver.fetch(party="nobody")["status"] == 404
    assert driver.fetch(party="chat-room")["status"] == 404  # it has no on_request


def five_sockets(driver: Driver, room: str) -> list[Socket]:
    """Open sockets c0 to c4 that have been greeted."""
    sockets = [driver.open(id=f"c{number}", room=room) for number in range(5)]
    for socket in sockets:
        hello(socket)
    return sockets


def test_the_broker_is_restarted(app: BrokerProcess, driver: Driver) -> None:
    """A stop closes 1012, and clients come back when it runs again, under their ids."""
    sockets = five_sockets(driver, "restarted")
    app.stop()
    for number, socket in enumerate(sockets):
        eventually(lambda socket=socket: socket.events("close"), "a close")  # type: ignore[misc]
        assert socket.events("close")[0]["code"] == 1012
        socket.send(f"after {number}")
    app.start()
    for number, socket in enumerate(sockets):
        assert hello(socket, 1)["hello"] == f"c{number}"
        assert socket.messages(3)[2] == f"after {number}"
    expect_closes(driver, [[f"c{number}", 1012, "server_close"] for number in range(5)], room="restarted")


def test_the_gateway_is_killed(app: BrokerProcess, driver: Driver) -> None:
    """S34: no socket closes, and what was sent meanwhile is answered, in order and once."""
    sockets = five_sockets(driver, "survivors")
    app.kill("gateway")
    for socket in sockets:
        socket.send(*(f"message {number}" for number in range(20)))
    for socket in sockets:
        assert socket.messages(21)[1:] == [f"message {number}" for number in range(20)]
        assert not socket.events("close")
    assert json.loads(driver.fetch(room="survivors", path="closes")["text"]) == []


def test_gateway_and_keeper_are_killed(app: BrokerProcess, driver: Driver) -> None:
    """S35: the sockets die with both; each connection gets its on_close, and the clients come back."""
    sockets = five_sockets(driver, "lost")
    app.kill("keeper", "gateway")
    for number, socket in enumerate(sockets):
        assert hello(socket, 1)["hello"] == f"c{number}"
        assert socket.events("close")[0]["code"] == 1006
    expect_closes(driver, [[f"c{number}", 1006, "gateway_lost"] for number in range(5)], room="lost")
