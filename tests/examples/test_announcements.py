"""docs/examples/announcements: tags decide who hears, whoever speaks, and whatever dies."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.browser import Browser
from tests.e2e.raw_client import RawClient
from tests.examples.conftest import ExampleFactory, http

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def station(example: ExampleFactory) -> BrokerProcess:
    return example("announcements")


def traveller(broker: BrokerProcess, room: str, *topics: str) -> RawClient:
    query = "&".join(f"topic={topic}" for topic in topics).replace(" ", "+")
    client = broker.connect(f"/party/{room}?{query}")
    assert hears(client) == {"topics": list(topics)}
    return client


def hears(client: RawClient) -> Any:
    return json.loads(client.receive())


def announce(broker: BrokerProcess, room: str, announcement: Any) -> httpx.Response:
    return http("POST", broker.url(f"/party/{room}"), content=json.dumps(announcement))


def test_everybody_hears_what_concerns_them(station: BrokerProcess, room: str) -> None:
    """S11."""
    red = traveller(station, room, "red line")
    bicycle = traveller(station, room, "red line", "bicycles")
    chair = traveller(station, room, "blue line", "step-free")
    with red, bicycle, chair:
        cases: list[tuple[dict[str, Any], list[RawClient]]] = [
            ({"text": "for all"}, [red, bicycle, chair]),
            ({"text": "red", "all_of": ["red line"]}, [red, bicycle]),
            ({"text": "red wheels", "all_of": ["red line", "bicycles"]}, [bicycle]),
            ({"text": "wheels", "any_of": ["step-free", "bicycles"]}, [bicycle, chair]),
            ({"text": "no wheels", "none_of": ["step-free", "bicycles"]}, [red]),
            ({"text": "red feet", "all_of": ["red line"], "none_of": ["bicycles"]}, [red]),
            ({"text": "nobody", "all_of": ["red line", "blue line"]}, []),
        ]
        for announcement, listeners in cases:
            assert announce(station, room, announcement).json() == {"listeners": len(listeners)}
            for client in listeners:
                assert hears(client) == {"text": announcement["text"]}
        # Nothing else came in between.
        announce(station, room, {"text": "last"})
        for client in (red, bicycle, chair):
            assert hears(client) == {"text": "last"}


def test_the_command_line_reaches_those_with_a_tag(station: BrokerProcess, room: str) -> None:
    with traveller(station, room, "red line") as red, traveller(station, room, "blue line") as blue:
        status, said = station.command("broadcast", room, '{"text": "by hand"}', "--tag", "red line")
        assert status == 0, said
        station.command("broadcast", room, '{"text": "to all"}')
        assert [hears(red)["text"], hears(red)["text"]] == ["by hand", "to all"]
        assert hears(blue)["text"] == "to all"


def test_topics_outlive_the_host_and_a_change_waits(station: BrokerProcess, room: str) -> None:
    """S13, S34: what a traveller chose is with the connection; what they say meanwhile waits."""
    with traveller(station, room, "red line") as stays, traveller(station, room, "red line") as changes:
        station.kill_host(wait_for_next=False)
        changes.send('["blue line", "no such topic"]')
        assert hears(changes) == {"topics": ["blue line"]}
        assert announce(station, room, {"text": "red", "all_of": ["red line"]}).json() == {"listeners": 1}
        assert announce(station, room, {"text": "blue", "all_of": ["blue line"]}).json() == {"listeners": 1}
        assert hears(stays)["text"] == "red"
        assert hears(changes)["text"] == "blue"


@pytest.mark.parametrize(
    ("announcement", "why"),
    [
        ({"text": "x", "all_of": ["purple line"]}, "choose from red line, blue line, step-free, bicycles\n"),
        ({"text": "x", "any_of": "red line"}, "choose from red line, blue line, step-free, bicycles\n"),
        ({"any_of": ["red line"]}, "an announcement has a text\n"),
        (["x"], "an announcement has a text\n"),
    ],
)
def test_what_is_no_announcement_reaches_nobody(
    station: BrokerProcess, room: str, announcement: Any, why: str
) -> None:
    with traveller(station, room, "red line") as client:
        answer = announce(station, room, announcement)
        assert (answer.status_code, answer.text) == (400, why)
        announce(station, room, {"text": "next"})
        assert hears(client) == {"text": "next"}
    assert http("GET", station.url(f"/party/{room}")).status_code == 405


def test_its_page(station: BrokerProcess, room: str, browser: Browser) -> None:
    tab = browser.open(station.url(f"/#{room}"))
    eventually(tab.received, "its topics")
    tab.do("check", "text=bicycles")
    eventually(lambda: station.connections(room=room, tag="bicycles"), "the page's choice")
    announce(station, room, {"text": "Red!", "all_of": ["red line"]})
    announce(station, room, {"text": "Pump!", "all_of": ["bicycles"]})
    tab.wait_for("#heard >> text=Pump!")
    assert tab.texts("#heard li") == ["Pump!"]
    assert tab.record()["problems"] == []
    tab.close()


def test_its_docs_are_true(station: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(station, "announcements") == 4
