"""docs/examples/ai_chat: an answer has every bit once, however often its process dies under it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.browser import Browser
from tests.e2e.raw_client import TEXT, RawClient, encode_frame
from tests.examples.conftest import ExampleFactory

pytestmark = pytest.mark.e2e

ANSWER = "You said: tell me more - and I have been thinking about it. "

#: What takes the model some seconds to answer, so that much can happen meanwhile.
LONG_QUESTION = " ".join(["why?"] * 30)
LONG_ANSWER = f"You said: {LONG_QUESTION} - and I have been thinking about it. "


@pytest.fixture(scope="module")
def chat(example: ExampleFactory) -> BrokerProcess:
    return example("ai_chat")


def come(chat: BrokerProcess, room: str, name: str) -> tuple[RawClient, dict[str, Any]]:
    client = chat.connect(f"/party/{room}?name={name}")
    return client, receive(client)["lines"]


def receive(client: RawClient) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(client.receive())
    return found


def begun(client: RawClient) -> tuple[str, str]:
    """A new line: who begins it, and its key."""
    [(key, line)] = receive(client)["lines"].items()
    return line["from"], key


class Reading:
    """What one client sees of one line: each bit once, and in order, or it fails."""

    def __init__(self, client: RawClient, key: str, bits: list[str]) -> None:
        self.client, self.key, self.bits = client, key, bits
        self.others: list[dict[str, Any]] = []

    def read(self, until: Callable[[], bool]) -> None:
        while not until():
            message = receive(self.client)
            if message.get("key") == self.key:
                assert message["number"] == len(self.bits)
                self.bits.append(message["bit"])
            else:
                self.others.append(message)

    def to_the_end(self, answer: str = ANSWER) -> None:
        self.read(lambda: "".join(self.bits) == answer)


def test_the_chat_goes_on_while_the_model_answers(chat: BrokerProcess, room: str) -> None:
    ana, lines = come(chat, room, "Ana")
    assert lines == {}
    with ana:
        ana.send(f"@ai {LONG_QUESTION}")
        assert begun(ana)[0] == "Ana"
        name, key = begun(ana)
        assert name == "ai"
        reading = Reading(ana, key, [])
        reading.read(lambda: len(reading.bits) == 2)
        ana.send("quickly")
        reading.read(lambda: bool(reading.others))
        assert len(reading.bits) < len(LONG_ANSWER.split())
        # Whoever comes now has what was said, and goes on from there.
        ben, lines = come(chat, room, "Ben")
        with ben:
            texts = ["".join(line["bits"]) for line in lines.values()]
            assert [line["from"] for line in lines.values()] == ["Ana", "ai", "Ana"]
            assert (texts[0], texts[2]) == (f"@ai {LONG_QUESTION}", "quickly")
            assert 0 < len(texts[1]) < len(LONG_ANSWER) and LONG_ANSWER.startswith(texts[1])
            late = Reading(ben, key, lines[key]["bits"])
            late.to_the_end(LONG_ANSWER)
            reading.to_the_end(LONG_ANSWER)


def test_the_answer_goes_on_when_its_process_dies(chat: BrokerProcess, room: str) -> None:
    """S22, S29: killed twice in the middle, with nobody who says anything; each bit is seen once."""
    ana, _ = come(chat, room, "Ana")
    with ana:
        ana.send("@ai tell me more")
        begun(ana)
        _, key = begun(ana)
        reading = Reading(ana, key, [])
        for count in (2, 5):
            reading.read(lambda count=count: len(reading.bits) == count)  # type: ignore[misc]
            chat.kill_host(wait_for_next=False)
        reading.to_the_end()
        assert reading.others == []
        eventually(lambda: not chat.stats()["awake"], "sleep")
        ana.send("thanks")
        assert begun(ana)[0] == "Ana"  # nothing came after the end
        ben, lines = come(chat, room, "Ben")
        ben.close()
        assert "".join(lines[key]["bits"]) == ANSWER
    eventually(lambda: not chat.stats()["alarms"], "the heart stops when there is nothing to do")


def test_two_answers_at_once(chat: BrokerProcess, room: str) -> None:
    ana, _ = come(chat, room, "Ana")
    with ana:
        ana.send_bytes(2 * encode_frame(TEXT, b"@ai tell me more"))  # at once, in one piece
        keys: list[str] = []
        early: list[dict[str, Any]] = []
        while len(keys) < 4:
            message = receive(ana)
            if "lines" in message:
                keys += message["lines"]
            else:
                early.append(message)
        keys = keys[1::2]
        # Before the second answer begins, the first may have said something.
        assert [(each["key"], each["number"]) for each in early] == [(keys[0], n) for n in range(len(early))]
        first = Reading(ana, keys[0], [each["bit"] for each in early])
        first.to_the_end()
        seen = [message for message in first.others if message.get("key") == keys[1]]
        second = Reading(ana, keys[1], [message["bit"] for message in seen])
        assert [message["number"] for message in seen] == list(range(len(seen)))
        assert seen, "they take turns"
        second.to_the_end()


def test_a_model_that_fails_says_so_once(chat: BrokerProcess, room: str) -> None:
    ana, _ = come(chat, room, "Ana")
    with ana:
        ana.send("@ai fail")
        begun(ana)
        _, key = begun(ana)
        assert receive(ana) == {"key": key, "number": 0, "bit": "(no answer today)"}
        eventually(lambda: not chat.stats()["alarms"], "no heartbeat")
        ana.send("oh")
        assert begun(ana)[0] == "Ana"


def test_its_page(chat: BrokerProcess, room: str, browser: Browser) -> None:
    tab = browser.open(chat.url(f"/?name=Ana#{room}"))
    eventually(tab.received, "what was said before")
    tab.do("fill", "[name=text]", "@ai tell me more")
    tab.do("press", "[name=text]", "Enter")
    tab.wait_for("#lines >> text=You said: tell")
    other = browser.open(chat.url(f"/?name=Ben#{room}"))
    for each in (tab, other):
        each.wait_for(f"#lines >> text={ANSWER.strip()}")
        assert each.texts("#lines dd") == ["@ai tell me more", ANSWER.strip()]
        assert each.record()["problems"] == []
    for each in (tab, other):
        each.close()


def test_its_docs_are_true(chat: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(chat, "ai_chat") == 1
