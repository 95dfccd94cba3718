"""Automatic responses against the running command (S16): what they wake, their place, what they outlive."""

import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.e2e.broker_process import BrokerProcess
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import CONTINUATION, TEXT, RawClient

pytestmark = pytest.mark.e2e

APP = """
import trio

from broker import AutoResponse, Server


class Main(Server):
    auto_responses = [
        AutoResponse("ping", "pong"),
        AutoResponse(b"\\x09", b"\\x0a"),
        AutoResponse("beat ", "alive", prefix=True),
    ]

    async def on_message(self, message, sender):
        word, _, rest = message.partition(" ")
        if word == "sleep":
            await trio.sleep(float(rest))
            sender.send("slept")
        elif word == "set":
            request, reply = rest.split("=")
            self.room.set_auto_response(request, reply or None)
            sender.send("set")
        elif word == "fail":
            self.room.set_auto_response("never", "set")
            raise ValueError("a turn that fails")
        elif word == "when":
            at = await sender.auto_response_at()
            sender.send({"at": None if at is None else at.isoformat()})
        else:
            sender.send(f"room: {message}")

    async def on_request(self, request):
        self.room.set_auto_response("http", "set without a connection")
        return "done"


class Deaf(Server):
    auto_responses = {"ping": "pong"}
"""


@pytest.fixture(scope="module")
def instance(module_broker: BrokerFactory) -> Iterator[BrokerProcess]:
    started = module_broker(APP)
    yield started
    assert "a handler of the gateway failed" not in started.log
    assert "a result could not be carried out" not in started.log


def said(client: RawClient, message: str | bytes) -> str | bytes:
    client.send(message)
    return client.receive()


def test_they_wake_nothing(instance: BrokerProcess) -> None:
    """S2, S16: text and bytes, whole and prefix, in one frame and in fragments; also without `on_message`."""
    before = instance.stats()
    with instance.connect("/party/quiet") as client, instance.connect("/parties/deaf/quiet") as deaf:
        assert said(client, "ping") == "pong"
        assert said(client, b"\x09") == b"\x0a"
        assert said(client, "beat 17") == "alive"
        assert said(client, "beat " + "x" * 200_000) == "alive"  # by way of a spill file
        client.send_frame(TEXT, b"pi", fin=False)
        client.send_frame(CONTINUATION, b"ng")
        assert client.receive() == "pong"
        for _ in range(1000):
            deaf.send("ping")
        assert [deaf.receive() for _ in range(1000)] == ["pong"] * 1000
        after = instance.stats()
        assert after["auto_responses"] - before["auto_responses"] == 1005
        assert (after["wakes"], after["turns"], after["messages"]) == (
            before["wakes"],
            before["turns"],
            before["messages"],
        )
        assert said(client, "Ping") == "room: Ping"
        assert instance.stats()["wakes"] == before["wakes"] + 1


def test_they_keep_their_place(instance: BrokerProcess) -> None:
    """S16: neither before the turns of earlier messages, nor after those of later ones."""
    with instance.connect("/party/order") as client:
        for message in ("sleep 0.2", "ping", "a", "beat", "beat 1", "b", "ping"):
            client.send(message)
        found = [client.receive() for _ in range(7)]
        assert found == ["slept", "pong", "room: a", "room: beat", "alive", "room: b", "pong"]
        client.send("ping")
        client.send_close(1000)
        assert client.receive() == "pong"
        assert client.expect_close() == (1000, "")


def test_the_time_of_the_last_one(instance: BrokerProcess) -> None:
    with instance.connect("/party/time") as client:
        assert said(client, "when") == '{"at":null}'
        began = time.time()
        assert said(client, "ping") == "pong"
        answer = said(client, "when")
        assert isinstance(answer, str)
        at = datetime.fromisoformat(answer[7:-2])
        assert at.utcoffset() is not None
        assert began - 0.002 <= at.timestamp() <= time.time()


def test_rules_of_a_room(instance: BrokerProcess) -> None:
    """S20: they are effects like all others; of this room alone; before those of the party."""
    with instance.connect("/party/own") as client, instance.connect("/party/other") as other:
        assert said(client, "set a=1") == "set"
        assert said(client, "a") == "1"
        assert said(other, "a") == "room: a"
        assert said(client, "set ping=mine") == "set"
        assert said(client, "ping") == "mine"
        assert said(other, "ping") == "pong"
        assert said(client, "set ping=") == "set"
        assert said(client, "ping") == "pong"
        client.send("fail")
        assert said(client, "never") == "room: never"


def test_what_they_outlive(instance: BrokerProcess) -> None:
    """S16, S22: the death of host, gateway, and all with the keeper; set without a connection."""
    with urllib.request.urlopen(instance.url("/party/kept")) as answer:
        assert answer.read() == b"done"
    with instance.connect("/party/kept") as client:
        assert said(client, "http") == "set without a connection"
        at = said(client, "when")
        instance.kill_host()
        assert said(client, "http") == "set without a connection"
        assert said(client, "set later=yes") == "set"
        instance.kill_gateway()
        assert said(client, "later") == "yes"
        assert said(client, "ping") == "pong"
        assert said(client, "when") > at  # type: ignore[operator]
        instance.kill_gateway()
        assert said(client, "when") > at  # type: ignore[operator]
        # The registry has it by now, whatever dies.
        gateway = instance.gateway_pid()
        instance.kill("gateway", "keeper", "host")
        assert client.at_eof()
    instance.wait_for_gateway(without=gateway)
    with instance.connect("/party/kept") as client:
        assert said(client, "later") == "yes"
        assert said(client, "http") == "set without a connection"
