"""docs/examples/presence: who is here and where, after sleep and death as before."""

import contextlib
import json
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.browser import Browser
from tests.e2e.raw_client import CLOSE, RawClient
from tests.examples.conftest import ExampleFactory

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def presence(example: ExampleFactory) -> BrokerProcess:
    return example("presence")


def come(broker: BrokerProcess, room: str, name: str) -> tuple[RawClient, dict[str, Any]]:
    client = broker.connect(f"/party/{room}?name={name}")
    return client, told(client)


def told(client: RawClient) -> dict[str, Any]:
    message = client.receive()
    assert isinstance(message, str)
    found: dict[str, Any] = json.loads(message)
    return found


def move(client: RawClient, x: int, y: int) -> None:
    client.send(struct.pack(">HH", x, y))


def moved(client: RawClient) -> tuple[int, ...]:
    message = client.receive()
    assert isinstance(message, bytes)
    return struct.unpack(">IHH", message)


def test_all_see_who_is_here_and_where(presence: BrokerProcess, room: str) -> None:
    ana, welcome = come(presence, room, "Ana")
    assert welcome == {"you": 1, "people": [{"number": 1, "name": "Ana", "at": None}]}
    move(ana, 10, 65535)
    ben, welcome = come(presence, room, "")
    with ana, ben:
        assert welcome["you"] == 2
        assert welcome["people"] == [
            {"number": 1, "name": "Ana", "at": [10, 65535]},
            {"number": 2, "name": "Guest 2", "at": None},
        ]
        assert told(ana) == {"joined": welcome["people"][1]}
        move(ben, 1, 2)
        assert moved(ana) == (2, 1, 2)
        move(ana, 3, 4)
        assert moved(ben) == (1, 3, 4)
        ana.reset()
        assert told(ben) == {"left": 1}
        # Numbers are not given again.
        late, welcome = come(presence, room, "Late")
        with late:
            assert [person["number"] for person in welcome["people"]] == [2, 3]


def test_places_outlive_the_host_and_each_end_is_told_once(presence: BrokerProcess, room: str) -> None:
    """S13, S14, S34: with somebody who goes and somebody who moves while there is no host."""
    ana, _ = come(presence, room, "Ana")
    ben, _ = come(presence, room, "Ben")
    eve, _ = come(presence, room, "Eve")
    with ana, ben, eve:
        assert [told(ana), told(ana)][-1]["joined"]["name"] == "Eve"
        move(ana, 5, 6)
        assert told(ben)["joined"]["name"] == "Eve"
        assert moved(ben) == (1, 5, 6)
        presence.kill_host(wait_for_next=False)
        eve.reset()
        move(ben, 7, 8)
        assert {ana.receive(), ana.receive()} == {'{"left":3}', struct.pack(">IHH", 2, 7, 8)}
        late, welcome = come(presence, room, "Late")
        with late:
            assert [[person["name"], person["at"]] for person in welcome["people"]] == [
                ["Ana", [5, 6]],
                ["Ben", [7, 8]],
                ["Late", None],
            ]
        assert told(ana)["joined"]["number"] == 4
        assert told(ana) == {"left": 4}


def test_a_flood_is_thinned_and_its_last_place_kept(presence: BrokerProcess, room: str) -> None:
    """The count is in the connection's state: the room sleeps between moves here, and counts all the same."""
    ana, _ = come(presence, room, "Ana")
    ben, _ = come(presence, room, "Ben")
    with ana, ben:
        assert told(ana)["joined"]["name"] == "Ben"
        wakes, begin = presence.stats()["wakes"], int(time.time())
        for number in range(600):
            move(ben, number, 0)
            if number % 100 == 99:
                eventually(lambda: not presence.unread_bytes() and not presence.stats()["awake"], "sleep")
        assert presence.stats()["wakes"] >= wakes + 6
        late, welcome = come(presence, room, "Late")
        late.close()
        assert welcome["people"][1]["at"] == [599, 0]
        seconds = int(time.time()) - begin + 1
        passed = 0
        while isinstance(ana.receive(), bytes):
            passed += 1
        assert 40 <= passed <= 40 * seconds


def test_nonsense_closes(presence: BrokerProcess, room: str) -> None:
    for message in ("text", b"", b"12345"):
        client, _ = come(presence, room, "Ana")
        with client:
            client.send(message)
            while (frame := client.receive_frame())[0] != CLOSE:
                pass  # the one before may just be leaving
            assert frame[1] == (1003).to_bytes(2, "big") + b"four bytes, please"
    client, _ = come(presence, room, "Ana")
    with client, contextlib.suppress(ConnectionError):
        client.send(b"x" * 65)
        while (frame := client.receive_frame())[0] != CLOSE:
            pass
        assert frame[1][:2] == (1009).to_bytes(2, "big")


def test_its_page(presence: BrokerProcess, room: str, browser: Browser) -> None:
    first = browser.open(presence.url(f"/?name=Ana#{room}"))
    first.wait_for("#people >> text=Ana (you)")
    second = browser.open(presence.url(f"/?name=Ben#{room}"))
    second.wait_for("#people >> text=Ben (you)")
    first.wait_for("#people >> text=Ben")
    client, _ = come(presence, room, "Eve")
    with client:
        second.wait_for("#people >> text=Eve")
        move(client, 32768, 16384)
        second.wait_for(".pointer >> text=Eve")
        place = "[...document.querySelectorAll('.pointer')].map(p => [p.style.left, p.style.top])"
        [[left, top]] = second.value(place)
        assert (float(left.rstrip("%")), float(top.rstrip("%"))) == pytest.approx((50, 25), abs=0.1)
        second.do("hover", "#people >> text=Ben")
        client.receive()  # who joined, if that was Ben; or the move
        first.wait_for(".pointer >> text=Ben")
    eventually(lambda: second.texts("#people li") == ["Ana", "Ben (you)"], "Eve's end")
    for tab in (first, second):
        assert tab.record()["problems"] == []
        tab.close()


def test_its_docs_are_true(presence: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(presence, "presence") == 1
