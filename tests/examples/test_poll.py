"""docs/examples/poll: one state for HTTP and WebSocket, and each vote counted once."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess
from tests.e2e.browser import Browser
from tests.e2e.raw_client import RawClient
from tests.examples.conftest import ExampleFactory, http

pytestmark = pytest.mark.e2e

QUESTION = {"question": "Drinks?", "options": ["Tea", "Coffee"]}


@pytest.fixture(scope="module")
def poll(example: ExampleFactory) -> BrokerProcess:
    return example("poll")


@pytest.fixture
def path(poll: BrokerProcess, room: str) -> str:
    """A room with a poll in it."""
    answer = http("PUT", poll.url(f"/party/{room}"), json=QUESTION)
    assert answer.json() == {"question": "Drinks?", "votes": {"Tea": 0, "Coffee": 0}, "mine": None}
    return f"/party/{room}"


@contextlib.contextmanager
def visitor(poll: BrokerProcess) -> Iterator[httpx.Client]:
    """A browser that has seen the page, and so has its cookie."""
    with httpx.Client(base_url=poll.url(), timeout=DEADLINE_SECONDS) as client:
        assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        cookie = client.cookies["voter"]
        client.get("/")
        assert client.cookies["voter"] == cookie
        yield client


def receive(client: RawClient) -> Any:
    return json.loads(client.receive())


def test_http_and_websocket_see_one_state(poll: BrokerProcess, path: str) -> None:
    with poll.connect(path) as ana, visitor(poll) as ben:
        assert receive(ana) == {"question": "Drinks?", "votes": {"Tea": 0, "Coffee": 0}, "mine": None}
        assert ben.post(path, json={"vote": "Tea"}).json()["mine"] == "Tea"
        assert receive(ana) == {"question": "Drinks?", "votes": {"Tea": 1, "Coffee": 0}}
        ana.send("Coffee")
        assert receive(ana)["votes"] == {"Tea": 1, "Coffee": 1}
        assert receive(ana) == {"mine": "Coffee"}
        assert ben.get(path).json() == {
            "question": "Drinks?",
            "votes": {"Tea": 1, "Coffee": 1},
            "mine": "Tea",
        }


def test_a_voter_votes_once_by_cookie_or_connection(poll: BrokerProcess, path: str) -> None:
    with visitor(poll) as ben:
        assert ben.post(path, json={"vote": "Tea"}).status_code == 200
        again = ben.post(path, json={"vote": "Coffee"})
        assert (again.status_code, again.text) == (409, "you have voted already\n")
        # With the cookie of the same browser, the WebSocket is the same voter.
        with poll.connect(path, headers={"cookie": f"voter={ben.cookies['voter']}"}) as tab:
            assert receive(tab)["mine"] == "Tea"
            tab.send("Coffee")
            assert receive(tab) == {"error": "you have voted already"}
    # Without one, it is its connection, also when that comes back under its id.
    with poll.connect(f"{path}?_pk=script") as script:
        assert receive(script)["mine"] is None
        script.send("Coffee")
        assert [receive(script), receive(script)][1] == {"mine": "Coffee"}
        script.send_close()
        assert script.expect_close() == (1000, "")
    with poll.connect(f"{path}?_pk=script") as script:
        assert receive(script)["mine"] == "Coffee"
        script.send("Tea")
        assert receive(script) == {"error": "you have voted already"}
    # A cookie that is none of ours does not name anybody.
    with poll.connect(path, headers={"cookie": "voter=connection script"}) as forger:
        assert receive(forger) == {"question": "Drinks?", "votes": {"Tea": 1, "Coffee": 1}, "mine": None}


def test_every_vote_counts_once_though_the_host_dies_among_them(poll: BrokerProcess, path: str) -> None:
    """S22, and S19 for read and write without a lock."""
    with contextlib.ExitStack() as stack:
        voters = [stack.enter_context(poll.connect(path)) for _ in range(20)]
        for voter in voters:
            receive(voter)
        for number, voter in enumerate(voters):
            voter.send("Tea")
            voter.send("Coffee")
            if number == 9:
                poll.kill_host(wait_for_next=False)
        for voter in voters:
            kinds = [next(iter(receive(voter))) for _ in range(22)]
            # Everybody sees every vote; their own is confirmed, and their second refused, once.
            assert (kinds.count("question"), kinds.count("mine"), kinds.count("error")) == (20, 1, 1)
            assert kinds.index("mine") < kinds.index("error")
        assert http("GET", poll.url(path)).json()["votes"] == {"Tea": 20, "Coffee": 0}
        assert all(voter.is_silent() for voter in voters)


@pytest.mark.parametrize(
    ("method", "body", "status"),
    [
        ("PUT", QUESTION, 409),
        ("PUT", {"question": "One?", "options": ["only"]}, 400),
        ("POST", {"vote": "Milk"}, 400),
        ("POST", {"vote": ["Tea"]}, 400),
        ("POST", "{", 400),
        ("DELETE", None, 400),
    ],
)
def test_what_is_no_vote_changes_nothing(
    poll: BrokerProcess, path: str, method: str, body: Any, status: int
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    assert http(method, poll.url(path), content=content).status_code == status
    assert http("GET", poll.url(path)).json()["votes"] == {"Tea": 0, "Coffee": 0}
    with poll.connect(path) as client:
        receive(client)
        for message in ("Milk", b"Tea", ""):
            client.send(message)
            assert receive(client) == {"error": "vote for one of the options"}


def test_where_there_is_no_poll(poll: BrokerProcess, room: str) -> None:
    path = f"/party/{room}"
    assert http("GET", poll.url(path)).status_code == 404
    with poll.connect(path) as client:
        client.send("Tea")
        assert receive(client) == {"error": "there is no such poll"}
        http("PUT", poll.url(path), json=QUESTION)
        assert receive(client) == {"question": "Drinks?", "votes": {"Tea": 0, "Coffee": 0}, "mine": None}


def test_its_page(poll: BrokerProcess, room: str, browser: Browser) -> None:
    tab = browser.open(poll.url(f"/#{room}"))
    tab.do("fill", "[name=question]", "Where to?")
    tab.do("fill", "[name=option] >> nth=0", "Sea")
    tab.do("fill", "[name=option] >> nth=1", "Hills")
    tab.do("click", "text=Ask")
    other = browser.open(poll.url(f"/#{room}"))
    stranger = browser.open(poll.url(f"/#{room}"), locale="en")  # a browser context of its own
    for each in (tab, other, stranger):
        each.wait_for("text=Hills: 0")
    tab.do("click", "text=Hills: 0")
    for each in (tab, other, stranger):
        each.wait_for("text=Hills: 1")
    stranger.do("click", "text=Sea: 0")
    tab.wait_for("text=Sea: 1")
    # Another tab of the same browser has not been told whose vote that was; the room knows.
    other.do("click", "text=Sea: 1")
    other.wait_for("#note:text('you have voted already')")
    assert tab.texts("#options button") == ["Sea: 1", "Hills: 1"]
    for each in (tab, other, stranger):
        each.close()


def test_its_docs_are_true(poll: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(poll, "poll") == 6
