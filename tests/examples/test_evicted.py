"""Every example means the same whether its object serves many turns or each turn has one of its own, and
whether its host lives or dies between them (S8, S43): in memory, on a virtual clock.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.testing import Client, Kit
from tests.examples.conftest import EXAMPLES

#: What comes between two steps of a test: nothing, the end of the object, the death of its host.
Between = Callable[[], None]


@pytest.fixture(params=["kept", "evicted", "crashed"])
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., tuple[Kit, Between]]]:
    """Start an example: `kit, between = start("poll")`."""
    kits: list[Kit] = []

    def begin(name: str, **options: Any) -> tuple[Kit, Between]:
        app = str(EXAMPLES / f"{name}.py")
        kit = Kit(app, evict_between_turns=request.param == "evicted", idle_seconds=3600, **options)
        kits.append(kit.__enter__())
        return kit, kit.crash_host if request.param == "crashed" else lambda: None

    yield begin
    for kit in kits:
        kit.__exit__(None, None, None)


Start = Callable[..., tuple[Kit, Between]]


def test_announcements(start: Start) -> None:
    kit, between = start("announcements")
    red = kit.connect("central", query={"topic": "red line"})
    blue = kit.connect("central")
    blue.expect({"topics": []})
    red.expect({"topics": ["red line"]})
    between()
    blue.send('["blue line"]')
    blue.expect({"topics": ["blue line"]})
    between()
    for line in ("red line", "blue line"):
        answer = kit.request("POST", kit.address("central"), json={"text": line, "all_of": [line]})
        assert answer.json() == {"listeners": 1}
    red.expect({"text": "red line"})
    blue.expect({"text": "blue line"})


def test_presence(start: Start) -> None:
    kit, between = start("presence")
    ana = kit.connect("lobby", query={"name": "Ana"})
    ana.expect({"you": 1, "people": [{"number": 1, "name": "Ana", "at": None}]})
    ana.send(struct.pack(">HH", 1, 2))
    between()
    ben = kit.connect("lobby", query={"name": "Ben"})
    people = ben.receive_json()["people"]
    assert [person["at"] for person in people] == [[1, 2], None]
    ana.expect({"joined": people[1]})
    for number in range(50):
        ben.send(struct.pack(">HH", number, 0))
        if number == 20:
            between()
    ana.expect(*[struct.pack(">IHH", 2, number, 0) for number in range(40)])
    kit.advance(1)
    between()
    ben.send(struct.pack(">HH", 50, 0))
    ana.expect(struct.pack(">IHH", 2, 50, 0))
    ben.drop()
    ana.expect({"left": 2})


def test_poll(start: Start) -> None:
    kit, between = start("poll")
    path = kit.address("lunch")
    kit.request("PUT", path, json={"question": "?", "options": ["Tea", "Coffee"]})
    ana, ben = kit.connect("lunch"), kit.connect("lunch")
    for client in (ana, ben):
        client.expect({"question": "?", "votes": {"Tea": 0, "Coffee": 0}, "mine": None})
    between()
    ana.send("Tea")
    between()
    ben.send("Coffee")
    ana.send("Coffee")
    after = [{"question": "?", "votes": {"Tea": 1, "Coffee": coffee}} for coffee in (0, 1)]
    ana.expect(after[0], {"mine": "Tea"}, after[1], {"error": "you have voted already"})
    ben.expect(*after, {"mine": "Coffee"})
    assert kit.request("GET", path).json() == {**after[1], "mine": None}


def test_authentication(start: Start) -> None:
    kit, between = start("authentication", env={"SESSION_KEY": "key", "MEMBERS": "ana:sesame,ben:tulip"})

    def enter(name: str, password: str) -> Client:
        form = f"name={name}&password={password}".encode()
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = kit.request("POST", "/sign-in", data=form, headers=kind)
        between()
        cookie = answer.headers["set-cookie"].partition(";")[0]
        client = kit.connect("hall", headers={"Cookie": cookie, "X-Broker-User": "eve"})
        client.expect({"you": name})
        return client

    ana, ben = enter("ana", "sesame"), enter("ben", "tulip")
    between()
    ana.send("@ben psst")
    ana.expect({"from": "ana", "text": "@ben psst"})
    ben.expect({"from": "ana", "text": "@ben psst"})


def test_shared_document(start: Start) -> None:
    kit, between = start("shared_document")
    ana = kit.connect("notes")
    ana.expect(b"\0\0\1\0")
    ana.send(b"\0\0\1\0")
    ana.expect(b"\0\1\2\0\0")
    for number in range(500):
        ana.send(b"\0\2\2" + b"%02x" % (number % 256))
        if number % 100 == 0:
            between()
    ana.expect(b"\0\0\1\0")
    between()
    ana.send(b"\0\1\5early")
    ana.send(b"\0\1\5whole")
    between()
    ben = kit.connect("notes")
    ben.expect(b"\0\0\1\0")
    ben.send(b"\0\0\1\0")
    ben.expect(b"\0\2\5whole", b"\0\2\5early", b"\0\1\2\0\0")


def test_rate_limits(start: Start) -> None:
    kit, between = start("rate_limits")
    ana = kit.connect("lounge", id="ana")
    for number in range(8):
        ana.send(str(number))
        if number in (2, 4, 5):
            ana.expect(*[{"said": str(each)} for each in ({2: [0, 1, 2], 4: [3, 4]}.get(number, []))])
            between()
    ana.expect({"muted": 2})
    between()
    ana.expect_nothing(1.9)
    between()
    ana.expect({"muted": 0}, within=0.2)
    ana.send("again")
    ana.expect({"said": "again"})
    assert kit.room("lounge").storage.keys() == {"bucket"}


def test_ai_chat(start: Start) -> None:
    kit, between = start("ai_chat")
    ana = kit.connect("lobby", query={"name": "Ana"})
    ana.expect({"lines": {}})
    ana.send("@ai hello")
    people, answer = ana.receive_json()["lines"], ana.receive_json()["lines"]
    assert [line["from"] for line in (*people.values(), *answer.values())] == ["Ana", "ai"]
    [key] = answer
    text = "You said: hello - and I have been thinking about it. "
    words = text.replace(" ", " |").split("|")[:-1]
    for number, word in enumerate(words):
        ana.expect({"key": key, "number": number, "bit": word}, within=3)
        if number in (0, 4, len(words) - 1):
            between()
    ana.expect_nothing(60)
    assert kit.room("lobby").storage.keys() == {"lines", "line 000000001", key}
