"""docs/examples/rate_limits: buckets that no sleep or death fills, and alarms that end what they began."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.browser import Browser
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient
from tests.examples.conftest import EXAMPLES, ExampleFactory, module_named

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def lounge(example: ExampleFactory) -> BrokerProcess:
    return example("rate_limits")


@pytest.fixture(scope="module")
def strict(module_broker: BrokerFactory) -> BrokerProcess:
    """The same, muting for so long that there is time to look at it, and to die meanwhile."""
    source = (EXAMPLES / "rate_limits.py").read_text()
    assert "MUTED_SECONDS = 2\n" in source
    return module_broker(source.replace("MUTED_SECONDS = 2\n", "MUTED_SECONDS = 6\n"))


@pytest.fixture(scope="module")
def app() -> Any:
    return module_named("rate_limits")


#: Has a page keep each text of its note.
NOTES = """(() => {
    const note = document.querySelector("#note");
    window.notes = [];
    new MutationObserver(() => window.notes.push(note.textContent)).observe(note, { childList: true });
})()"""


def receive(client: RawClient) -> Any:
    return json.loads(client.receive())


def test_who_says_too_much_is_muted_and_told_when_it_is_over(strict: BrokerProcess, room: str) -> None:
    """S13, S29: also when the host dies while the bucket is half empty, and while they are muted."""
    begin = time.monotonic()
    with strict.connect(f"/party/{room}?_pk=loud") as loud, strict.connect(f"/party/{room}") as calm:
        loud.send("0")
        loud.send("1")
        assert [receive(loud), receive(loud)] == [{"said": "0"}, {"said": "1"}]
        strict.kill_host()
        for number in range(2, 40):
            loud.send(str(number))
        passed = 2
        while (message := receive(loud)) != {"muted": 6}:
            assert message == {"said": str(passed)}
            passed += 1
        assert 5 <= passed <= 5 + (time.monotonic() - begin) / 2
        [row] = eventually(lambda: strict.connections(room=room, tag="muted"), "the tag")
        assert row["id"] == "loud"
        # Others are not concerned, and the room, though it has slept, still knows.
        strict.kill_host()
        calm.send("hello")
        for number in range(passed):
            assert receive(calm) == {"said": str(number)}
        assert receive(calm) == {"said": "hello"}
        told = [receive(loud), receive(loud)]
        assert {"said": "hello"} in told and {"muted": 0} in told
        # The command line asks the registry, which has what is in memory a moment later.
        eventually(lambda: not strict.connections(room=room, tag="muted"), "end of the tag")
        loud.send("sorry")
        assert receive(loud) == {"said": "sorry"}
        assert receive(calm) == {"said": "sorry"}


def test_a_room_in_which_all_speak_takes_a_breath(lounge: BrokerProcess, room: str) -> None:
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(lounge.connect(f"/party/{room}")) for _ in range(20)]
        for client in clients:
            for _ in range(4):
                client.send("all at once")
        first, *others = clients
        passed = 0
        while (message := receive(first)) == {"said": "all at once"}:
            passed += 1
        assert message == {"paused": 2}
        assert 20 <= passed <= 20 + 5 * (time.monotonic() - begin)
        while (message := receive(first)) != {"paused": 0}:
            pass  # what came so late that the breath was over is said, until the next one
        for client in others:
            assert [receive(client) for _ in range(passed)] == [{"said": "all at once"}] * passed
            assert receive(client) == {"paused": 2}


def test_who_leaves_leaves_no_alarm(strict: BrokerProcess, room: str) -> None:
    with strict.connect(f"/party/{room}?_pk=loud") as loud:
        for number in range(40):
            loud.send(str(number))
        while receive(loud) != {"muted": 6}:
            pass
        assert strict.stats()["alarms"] >= 1
        loud.reset()
    eventually(lambda: strict.stats()["alarms"] == 0, "no alarm")


def test_its_page(lounge: BrokerProcess, room: str, browser: Browser) -> None:
    tab = browser.open(lounge.url(f"/#{room}"))
    eventually(lambda: lounge.connections(room=room), "its connection")
    lounge.ask("broadcast", room=room, message='{"said": "welcome"}')
    tab.wait_for("#heard >> text=welcome")  # so it is open for the page, too
    # What it says while it must wait may be gone before anybody looks, so the page takes it down.
    tab.value(NOTES)
    tab.do("click", "#shout")
    tab.wait_for("#note:text('Go on!')")
    assert tab.value("window.notes") == ["Slowly, please. Go on in 2 seconds.", "Go on!"]
    assert tab.texts("#heard li")[:6] == ["welcome", *["hello"] * 5]
    assert tab.record()["problems"] == []
    tab.close()


def test_its_docs_are_true(lounge: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(lounge, "rate_limits") == 1


@pytest.mark.parametrize(
    ("bucket", "left"),
    [
        (None, 4),
        ([5, 100.0], 4),
        ([1, 100.0], 0),
        ([0.99, 100.0], None),
        ([0, 98.0], 0),
        ([0, 98.1], None),
        ([0, 0.0], 4),
        ([0, 200.0], None),  # the clock was set back
        ([3, 200.0], 2),
    ],
)
def test_a_bucket_fills_by_itself(
    app: Any, monkeypatch: pytest.MonkeyPatch, bucket: Any, left: float | None
) -> None:
    monkeypatch.setattr(app, "time", lambda: 100.0)
    assert app.take(bucket, 5, 0.5) == (None if left is None else [left, 100.0])
