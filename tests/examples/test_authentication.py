"""docs/examples/authentication: nobody comes in unsigned, and nobody is somebody else."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.browser import Browser
from tests.e2e.raw_client import Answer, RawClient
from tests.examples.conftest import ExampleFactory, http, module_named

pytestmark = pytest.mark.e2e

KEY = "0123456789abcdef"
app: Any = module_named("authentication")


@pytest.fixture(scope="module")
def house(example: ExampleFactory) -> BrokerProcess:
    return example("authentication", "--var", f"SESSION_KEY={KEY}", "--var", "MEMBERS=ana:sesame,ben:tulip")


def sign_in(house: BrokerProcess, name: str, password: str) -> dict[str, str]:
    """The header that a browser would send from now on."""
    answer = http("POST", house.url("/sign-in"), data={"name": name, "password": password})
    assert answer.json() == {"you": name}
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(answer.headers["set-cookie"].split("; "))
    return {"cookie": f"session={answer.cookies['session']}"}


def come(house: BrokerProcess, path: str, headers: dict[str, str], name: str) -> RawClient:
    client = house.connect(path, headers=headers)
    assert receive(client) == {"you": name}
    return client


def receive(client: RawClient) -> Any:
    return json.loads(client.receive())


def refused(house: BrokerProcess, path: str, headers: dict[str, str], status: int) -> Answer:
    with RawClient(house.port) as client:
        return client.handshake(path, headers, expect=status)


def test_whoever_has_signed_in_is_who_they_are(house: BrokerProcess, room: str) -> None:
    """S9, S39: also when they claim to be another."""
    path = f"/party/{room}"
    ana, ben = sign_in(house, "ana", "sesame"), sign_in(house, "ben", "tulip")
    assert http("GET", house.url(path), headers={**ana, "X-Broker-User": "ben"}).json()["you"] == "ana"
    one = come(house, path, {**ana, "x-broker-user": "ben"}, "ana")
    two = come(house, path, ana, "ana")
    his = come(house, path, ben, "ben")
    with one, two, his:
        assert http("GET", house.url(path), headers=ben).json() == {"you": "ben", "here": ["ana", "ben"]}
        one.send("hello")
        for client in (one, two, his):
            assert receive(client) == {"from": "ana", "text": "hello"}
        his.send("@ana psst")
        for client in (one, two, his):
            assert receive(client) == {"from": "ben", "text": "@ana psst"}
        two.send("@ana note to myself")
        one.send("bye")
        assert receive(his) == {"from": "ana", "text": "bye"}


def forged(name: str) -> str:
    future, past = int(time.time()) + 1000, int(time.time()) - 1
    good = app.sign(f"ana.{future}", KEY)
    tokens: dict[str, str] = {
        "empty": "",
        "no seal": "ana",
        "dots": "..",
        "over": app.sign(f"ana.{past}", KEY),
        "another key": app.sign(f"ana.{future}", "another key"),
        "empty seal": f"ana.{future}.",
        "another name": f"ben{good[3:]}",
        "another end": good.replace(str(future), str(future + 1)),
        "short": good[:-1],
        "other case": good.upper(),
        "long": "9" * 8000,
        "not ascii": "ä.1.ö",
    }
    return tokens[name]


FORGED = ["empty", "no seal", "dots", "over", "another key", "empty seal", "another name", "another end"]


@pytest.mark.parametrize("name", [*FORGED, "short", "other case", "long", "not ascii"])
def test_no_other_token_opens(house: BrokerProcess, room: str, name: str) -> None:
    cookie = f"session={forged(name)}"
    assert refused(house, f"/party/{room}", {"cookie": cookie}, 401).body == b"sign in first\n"
    answer = http("GET", house.url(f"/party/{room}"), headers={b"cookie": cookie.encode()})
    assert (answer.status_code, answer.text) == (401, "sign in first\n")


def test_a_good_token_does_open(house: BrokerProcess, room: str) -> None:
    """So that the refusals above are the tokens'."""
    token = app.sign(f"ana.{int(time.time()) + 1000}", KEY)
    come(house, f"/party/{room}", {"cookie": f"session={token}"}, "ana").close()


def test_an_own_room_is_closed_to_others(house: BrokerProcess) -> None:
    ana, ben = sign_in(house, "ana", "sesame"), sign_in(house, "ben", "tulip")
    come(house, "/party/~ana", ana, "ana").close()
    assert refused(house, "/party/~ana", ben, 403).body == b"this is somebody's own room\n"
    assert refused(house, "/party/%7Eana", ben, 403).status == 403
    assert http("GET", house.url("/party/~ana"), headers=ben).status_code == 403


@pytest.mark.parametrize(("name", "password"), [("ana", "tulip"), ("ana", ""), ("eve", ""), ("", "")])
def test_a_wrong_password_signs_nobody_in(house: BrokerProcess, name: str, password: str) -> None:
    answer = http("POST", house.url("/sign-in"), data={"name": name, "password": password})
    assert (answer.status_code, answer.text) == (403, "wrong name or password\n")
    assert "set-cookie" not in answer.headers


def test_names_outlive_the_host(house: BrokerProcess, room: str) -> None:
    """S13, S34; and the next host knows the old tokens, since the key is not in its memory."""
    ana = sign_in(house, "ana", "sesame")
    with come(house, f"/party/{room}", ana, "ana") as one:
        house.kill_host(wait_for_next=False)
        one.send("still me")
        assert receive(one) == {"from": "ana", "text": "still me"}
        come(house, f"/party/{room}", ana, "ana").close()


def test_its_page(house: BrokerProcess, room: str, browser: Browser) -> None:
    tab = browser.open(house.url(f"/#{room}"), locale="en")
    tab.do("fill", "[name=name]", "ana")
    tab.do("fill", "[name=password]", "tulip")
    tab.do("click", "text=Sign in")
    tab.wait_for("#note:text('wrong name or password')")
    tab.do("fill", "[name=password]", "sesame")
    tab.do("click", "text=Sign in")
    tab.wait_for("#note:text('You are ana.')")
    with come(house, f"/party/{room}", sign_in(house, "ben", "tulip"), "ben") as ben:
        tab.do("fill", "[name=text]", "@ben hello")
        tab.do("press", "[name=text]", "Enter")
        assert receive(ben) == {"from": "ana", "text": "@ben hello"}
        ben.send("oh")
        tab.wait_for("#heard >> text=ben: oh")
    # The cookie is out of scripts' reach.
    assert tab.value("document.cookie") == ""
    tab.do("reload")
    tab.wait_for("#note:text('You are ana.')")
    tab.close()
    eventually(lambda: not house.connections(room=room), "its end")


def test_its_docs_are_true(house: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(house, "authentication") == 4


def test_no_secret_is_logged(house: BrokerProcess) -> None:
    """S39."""
    assert not re.search(rf"{KEY}|sesame|tulip|[0-9a-f]{{64}}", house.log)
