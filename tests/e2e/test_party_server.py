"""What the maintainers of `partykit` and `partyserver` would check about their own servers, asked of the
running broker: each test states one behaviour of `Party.Server` in a sentence, and the rule that it follows.

Only what no scenario says already (`tests/scenarios`): HTTP beside WebSockets, rooms that hibernate beside
those that stay, the letters of all the world.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import CLOSE, PING, PONG, TEXT, RawClient

pytestmark = pytest.mark.e2e

APP = """
    import json

    import trio
    from quart import redirect

    from broker import ConnectionClosedError, Refuse, Response, Server


    # --- One that hibernates after every burst, and one that stays while somebody is there

    class Asleep(Server):
        made: dict[str, int] = {}

        def __init__(self, room):
            self.made[room.key] = self.made.get(room.key, 0) + 1
            self.seen = ["init"]

        async def on_start(self):
            await trio.sleep(0.05)
            self.seen.append("start")

        def get_connection_tags(self, connection, ctx):
            self.seen.append("tags")
            return ctx.request.args.getlist("tag")

        async def on_connect(self, connection, ctx):
            self.seen.append("connect")

        async def on_message(self, message, sender):
            self.seen.append("message")
            if message == "seen":
                sender.send([self.made[self.room.key], *self.seen])
            elif isinstance(message, bytes):
                self.room.broadcast(message)
            else:
                code, _, reason = message.partition(" ")
                sender.close(int(code), reason)

        async def on_close(self, connection, code, reason, was_clean):
            facts = [connection.id, code, reason, was_clean, connection.close_cause]
            try:
                connection.send("too late")
            except ConnectionClosedError:
                facts.append("cannot send")
            connection.close(4000, "again")  # does nothing
            facts.append(await self.room.get_connection(connection.id) is None)
            facts.append([each.id async for each in self.room.get_connections()])
            self.room.broadcast(facts)
            if reason == "raise":
                raise ValueError("no goodbye")

        async def on_error(self, connection, error):
            self.room.broadcast(["error", connection.id, str(error)])

        async def on_request(self, request):
            self.seen.append("request")
            return [self.made[self.room.key], *self.seen]


    class Awake(Asleep):
        hibernate = False
        made: dict[str, int] = {}


    class LateStart(Server):
        hibernate = False
        made: dict[str, int] = {}

        def __init__(self, room):
            self.made[room.id] = self.made.get(room.id, 0) + 1

        async def on_start(self):
            await trio.sleep(0.2)
            if "fails" in self.room.id and self.made[self.room.id] < 3:
                raise OSError("not yet")
            self.started = self.made[self.room.id]

        def on_connect(self, connection, ctx):
            connection.send(f"connect {self.started}")

        def on_request(self, request):
            return f"request {self.started}"


    # --- Connections: tags, state, who is there

    class Known(Server):
        def get_connection_tags(self, connection, ctx):
            return ctx.request.args.getlist("tag")

        async def on_message(self, message, sender):
            command = json.loads(message)
            do = command.pop("do")
            if do == "state":
                sender.set_state(command["value"])
            elif do == "count":
                sender.set_state(lambda state: {**(state or {}), "n": (state or {}).get("n", 0) + 1})
            elif do == "in place":
                sender.state["lost"] = True
            elif do == "of":
                other = await self.room.get_connection(command["id"])
                sender.send(other and [other.uri.partition("/parties")[2], *other.tags, other.state])
                return
            elif do == "list":
                sender.send([each.id async for each in self.room.get_connections(**command)])
                return
            elif do == "by-connection":
                others = [each async for each in self.room.get_connections() if each is not sender]
                self.room.broadcast("from a connection", without=[sender, others[0]])
                return
            elif do == "broadcast":
                self.room.broadcast(command.pop("message"), **command)
                return
            sender.send(sender.state)


    # --- Doors

    def door(request, lobby):
        match request.args.get("answer"):
            case "302":
                return redirect("/anmelden?zur%C3%BCck=ja")
            case "403":
                raise Refuse(403, "nicht für dich")
            case "503":
                return Response("später", 503, {"Retry-After": "7", "X-Room": lobby.party})
            case "json":
                return {"why": "ünpaid"}, 402
        user = {"name": request.args.get("name", "nobody"), "room": lobby.id}
        request.headers["X-User"] = json.dumps(user)  # in ASCII


    class Guarded(Server):
        made = 0
        cors = {
            "Access-Control-Allow-Origin": "https://example.com",
            "Access-Control-Allow-Credentials": "true",
        }

        def __init__(self, room):
            Guarded.made += 1

        @staticmethod
        def on_before_connect(request, lobby):
            return door(request, lobby)

        @staticmethod
        async def on_before_request(request, lobby):
            await trio.sleep(0)
            return door(request, lobby)

        def get_connection_tags(self, connection, ctx):
            return [json.loads(ctx.request.headers["X-User"])["name"]]

        def on_connect(self, connection, ctx):
            connection.set_state(json.loads(ctx.request.headers["X-User"]))

        def on_message(self, message, sender):
            sender.send([*sender.tags, sender.state])

        def on_request(self, request):
            return {"made": Guarded.made, "user": json.loads(request.headers["X-User"])}


    class Uncrossed(Server):
        def on_request(self, request):
            return request.method


    # --- Time

    class Cold(Server):
        def __init__(self, room):
            self.names = [room.id, self.room.id]

        async def on_start(self):
            self.names.append(self.room.id)

        async def on_request(self, request):
            if request.method == "POST":
                self.room.storage.set_alarm(0.2, payload=await request.get_json())
            return await self.room.storage.get("rung", "")

        async def on_alarm(self, alarm):
            answer = await self.room.parties["uncrossed"].get("any").fetch(method="PUT")
            told = [*self.names, self.room.id, alarm.payload, await answer.get_data(as_text=True)]
            self.room.storage.put("rung", told)
            self.room.broadcast(told)


    # --- Several parties with one room id

    class RedTeam(Server):
        async def on_message(self, message, sender):
            self.room.storage.put("said", [*await self.room.storage.get("said", []), message])
            self.room.broadcast([self.room.party, self.room.name, self.room.id, self.room.key, message])

        async def on_request(self, request):
            if request.method != "GET":
                return {"no": request.method}, 405, {"Allow": "GET"}
            sockets = [each.id async for each in self.room.get_connections()]
            return {"rest": request.rest, "said": await self.room.storage.get("said"), "here": sockets}


    class BlueTeam(RedTeam):
        pass


    class Main(RedTeam):
        pass


    # --- A door that opens before the room has said anything

    class Slow(Server):
        async def on_connect(self, connection, ctx):
            while not await self.room.storage.get("open"):
                await trio.sleep(0.01)
            connection.send("welcome")

        def on_message(self, message, sender):
            sender.send(message)

        concurrency = "per_connection"

        def on_request(self, request):
            self.room.storage.put("open", True)
            return "opened"
"""

MODES = pytest.mark.parametrize("party", ["asleep", "awake"])

#: Letters of one to four bytes, combined ones, one that is written from right to left.
LETTERS = "aé☃𝄞 e\u0301 שלום 👩‍👩‍👧"


class Instance:
    """A broker with the app above, and what clients do with it."""

    def __init__(self, broker: BrokerProcess, http: httpx.Client, stack: ExitStack) -> None:
        self.broker = broker
        self.http = http
        self._stack = stack

    def connect(self, party: str, room: str, query: str = "", **options: Any) -> RawClient:
        client = self.broker.connect(f"/parties/{party}/{quote(room, safe='')}?{query}", **options)
        return self._stack.enter_context(client)

    def refused(self, party: str, room: str, query: str) -> tuple[int, dict[str, str], bytes]:
        with RawClient(self.broker.port) as client:
            client.send_handshake(f"/parties/{party}/{quote(room, safe='')}?{query}")
            answer = client.receive_answer()
            return answer.status, answer.headers, answer.body

    def request(self, method: str, party: str, room: str, rest: str = "", **options: Any) -> httpx.Response:
        return self.http.request(method, f"/parties/{party}/{quote(room, safe='')}{rest}", **options)

    def sleeping(self, party: str, room: str) -> bool:
        [row] = self.broker.ask("rooms", party=party, room=room)["rooms"]
        return not row["awake"] and not row["in_flight"]

    def evicted(self, party: str, room: str) -> None:
        eventually(lambda: self.sleeping(party, room), f"sleep of {party}/{room}")


def told(client: RawClient) -> Any:
    """The next message, which is JSON."""
    return json.loads(client.receive())


def asked(client: RawClient, do: str, **command: Any) -> Any:
    client.send(json.dumps({"do": do, **command}))
    return told(client)


def silent(client: RawClient) -> bool:
    """Nothing has come, and what has been sent is read."""
    client.send_frame(PING, b"?")
    return client.receive_frame() == (PONG, b"?")


@pytest.fixture(scope="module")
def process(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, close_timeout_seconds=20)


@pytest.fixture
def site(process: BrokerProcess) -> Iterator[Instance]:
    hosts = process.host_pids()
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{process.port}", timeout=DEADLINE_SECONDS) as http,
        ExitStack() as stack,
    ):
        yield Instance(process, http, stack)
    assert process.host_pids() == hosts


_numbers = itertools.count()


@pytest.fixture
def room() -> str:
    """The id of a room that nobody else uses."""
    return f"räum/{next(_numbers)}"


# --- Life -------------------------------------------------------------------------------------------


def test_hooks_come_in_the_order_of_a_life_that_a_request_began(site, room):
    """S3, S6: constructor, start, then what woke the room; with hibernation each burst has its own object,
    without it a socket keeps one for all that follows.
    """
    assert site.request("GET", "asleep", room).json() == [1, "init", "start", "request"]
    site.evicted("asleep", room)
    client = site.connect("asleep", room)
    site.evicted("asleep", room)
    client.send("seen")
    assert told(client) == [3, "init", "start", "message"]

    client = site.connect("awake", room)
    client.send("seen")
    assert told(client) == [1, "init", "start", "tags", "connect", "message"]
    wanted = [1, "init", "start", "tags", "connect", "message", "request"]
    assert site.request("GET", "awake", room).json() == wanted
    client.send("seen")
    assert told(client) == [*wanted, "message"]


def test_a_cold_room_starts_once_for_requests_and_sockets_at_once(site, room):
    """S3: whoever comes while `on_start` waits is served by the one object that it makes."""
    answers: list[str] = []

    def get() -> None:
        path = f"http://127.0.0.1:{site.broker.port}/parties/late-start/{quote(room, safe='')}"
        answers.append(httpx.get(path, timeout=DEADLINE_SECONDS).text)

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    clients = [site.connect("late-start", room) for _ in range(4)]
    assert {client.receive() for client in clients} == {"connect 1"}
    for thread in threads:
        thread.join()
    assert answers == ["request 1"] * 4


def test_a_start_that_fails_is_tried_again_and_nobody_is_told(site):
    """S4: a socket stays open and a request waits, until the third try has a room for them."""
    client = site.connect("late-start", "fails é")
    assert site.request("GET", "late-start", "fails é").text == "request 3"
    assert client.receive() == "connect 3"


def test_a_socket_is_open_before_on_connect_has_ended(site, room):
    """S9: the 101 does not wait for `on_connect`, and the messages of this client do."""
    client = site.connect("slow", room)  # the 101 is here, and the room waits for the request below
    client.send("hello")
    assert site.request("POST", "slow", room).text == "opened"
    assert (client.receive(), client.receive()) == ("welcome", "hello")


def test_an_alarm_starts_a_cold_room_that_knows_itself(site, room):
    """S29, S30: its object is gone, so it is made and started before; its id is there from the first line on,
    and other parties are.
    """
    watcher = site.connect("cold", room)  # has no hook for it, so it wakes nobody
    site.request("POST", "cold", room, json={"für": LETTERS})
    wanted = [room, room, room, room, {"für": LETTERS}, "PUT"]
    assert told(watcher) == wanted
    site.evicted("cold", room)
    assert site.request("GET", "cold", room).json() == wanted


# --- Ends -------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("code", [1000, 1001, 1007, 3999, 4999])
def test_codes_and_reasons_arrive_on_both_sides_whoever_closes(site, room, party, code):
    """S14: with and without hibernation alike; the reason has up to 123 bytes of UTF-8."""
    reason = LETTERS[:3] + "ü" * 58 + "."
    watcher = site.connect(party, room, "_pk=watcher")
    anna = site.connect(party, room, "_pk=anna")
    anna.send_close(code, reason)
    assert anna.expect_close()[0] == code
    end = ["cannot send", True, ["watcher"]]
    assert told(watcher) == ["anna", code, reason, True, "client_close", *end]

    bob = site.connect(party, room, "_pk=bob")
    bob.send(f"{code} {reason}")
    assert bob.expect_close() == (code, reason)
    bob.send_close(code)
    assert told(watcher) == ["bob", code, reason, True, "server_close", *end]


@MODES
def test_an_end_without_a_code_and_one_without_a_word(site, room, party):
    """S14: 1005 and 1006, as in a browser's CloseEvent, and neither is ever sent."""
    watcher = site.connect(party, room, "_pk=watcher")
    anna = site.connect(party, room, "_pk=anna")
    anna.send_close(None)
    assert anna.receive_frame()[0] == CLOSE
    assert told(watcher)[:5] == ["anna", 1005, "", True, "client_close"]
    site.connect(party, room, "_pk=bob").close()
    assert told(watcher)[:5] == ["bob", 1006, "", False, "client_gone"]


@MODES
def test_an_on_close_that_raises_is_told_to_on_error_and_comes_once(site, room, party):
    """S14, S20: what it has sent is dropped, the others stay, and the id is free again."""
    watcher = site.connect(party, room, "_pk=watcher")
    for _ in range(2):
        anna = site.connect(party, room, "_pk=anna")
        anna.send_close(4000, "raise")
        anna.expect_close()
        assert told(watcher) == ["error", "anna", "no goodbye"]
    assert silent(watcher)


# --- Connections ------------------------------------------------------------------------------------


def test_uri_tags_and_state_are_read_from_another_turn_after_an_eviction(site, room):
    """S11, S12, S13: by whoever has the id, as they were given, in whatever letters."""
    query = f"_pk={quote('änna')}&tag={quote(LETTERS)}&tag=b&tag=b"
    anna = site.connect("known", room, query)
    anna.send(json.dumps({"do": "state", "value": {LETTERS: [LETTERS, None, 1.5, {"deep": []}]}}))
    anna.receive()
    bob = site.connect("known", room, "_pk=bob")
    site.evicted("known", room)
    found = asked(bob, "of", id="änna")
    address = f"/known/{quote(room, safe='')}?{query}"
    assert found == [address, LETTERS, "b", {LETTERS: [LETTERS, None, 1.5, {"deep": []}]}]
    assert asked(bob, "list", tag=LETTERS) == ["änna"]
    assert asked(bob, "of", id="nobody") is None


def test_state_is_replaced_computed_and_taken_away_but_not_changed_in_place(site, room):
    """S13: `set_state` takes a value or a function of the present one; what is not set is not kept."""
    anna = site.connect("known", room, "_pk=anna")
    bob = site.connect("known", room, "_pk=bob")
    assert asked(anna, "count") == {"n": 1}
    assert asked(anna, "count") == {"n": 2}
    asked(anna, "in place")
    site.evicted("known", room)
    assert asked(anna, "count") == {"n": 3}
    assert asked(bob, "count") == {"n": 1}  # of each connection by itself
    assert asked(anna, "state", value=None) is None
    assert asked(anna, "state", value=0) == 0


def test_ids_are_given_or_fresh_and_are_no_tags(site, room):
    """S10, S11: two clients without an id have two; an id finds its connection, and a tag of the same name
    only those who have the tag.
    """
    anna = site.connect("known", room, "_pk=anna")
    site.connect("known", room, "tag=anna&_pk=bob")
    site.connect("known", room)
    site.connect("known", room)
    ids = asked(anna, "list")
    assert ids[:2] == ["anna", "bob"]
    assert len(set(ids)) == 4
    assert asked(anna, "list", tag="anna") == ["bob"]


def test_lists_by_one_tag_and_by_several(site, room):
    """S11, S12: in the order in which the connections came."""
    for number in range(8):
        tags = "".join(f"&tag={letter}" for bit, letter in enumerate("äbc") if number & 1 << bit)
        client = site.connect("known", room, f"_pk={number}{quote(tags, safe='&=')}")
    assert asked(client, "list", tag="ä") == ["1", "3", "5", "7"]
    assert asked(client, "list", all_of=["ä", "b"]) == ["3", "7"]
    assert asked(client, "list", any_of=["ä", "b"], none_of=["c"]) == ["1", "2", "3"]
    assert asked(client, "list", tag="c", any_of=["ä", "b"]) == ["5", "6", "7"]
    assert asked(client, "list", tag="d") == []


def test_broadcasts_leave_out_whom_they_are_told_to(site, room):
    """S18: by id or by connection, one or several; ids that are nobody's change nothing."""
    anna, bob, carol = (site.connect("known", room, f"_pk={name}&tag=t") for name in ("anna", "bob", "carol"))

    def broadcast(**command: Any) -> None:
        anna.send(json.dumps({"do": "broadcast", **command}))

    broadcast(message="all")
    broadcast(message="not anna", without=["anna", "nobody"])
    broadcast(message="carol", without=["anna", "bob"])
    broadcast(message="tagged, not bob", without=["bob"], tag="t")
    broadcast(message={"nobody": LETTERS}, tag="u")
    broadcast(message={"end": LETTERS})
    end = json.dumps({"end": LETTERS}, ensure_ascii=False, separators=(",", ":"))

    def until_end(client: RawClient) -> list[str]:
        found: list[str] = []
        while not found or json.loads(end) != _json(found[-1]):
            found.append(str(client.receive()))
        return found[:-1]

    assert until_end(anna) == ["all", "tagged, not bob"]
    assert until_end(bob) == ["all", "not anna"]
    assert until_end(carol) == ["all", "not anna", "carol", "tagged, not bob"]
    anna.send(json.dumps({"do": "by-connection"}))
    assert carol.receive() == "from a connection"
    assert silent(anna) and silent(bob)


def _json(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else None


@MODES
def test_bytes_arrive_as_bytes(site, room, party):
    """S18: every byte, none, and many; text in a binary frame is no text."""
    anna, bob = site.connect(party, room), site.connect(party, room)
    for message in (bytes(range(256)), b"", LETTERS.encode(), b"\xff" * 300_000):
        anna.send(message)
        assert anna.receive() == bob.receive() == message


# --- Doors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["302", "403", "503", "json"])
def test_both_before_hooks_answer_in_the_place_of_the_room(site, answer):
    """S9: status, headers and body as any Quart view gives them; no room is made."""
    before = site.request("GET", "guarded", "counted").json()["made"]
    over_http = site.request("GET", "guarded", f"refused {answer}", f"?answer={answer}")
    status, headers, body = site.refused("guarded", f"refused {answer}", f"answer={answer}")
    assert (status, body) == (over_http.status_code, over_http.content)
    for name in ("location", "retry-after", "x-room", "content-type"):
        assert headers.get(name) == over_http.headers.get(name), name
    match answer:
        case "302":
            assert status == 302
            assert headers["location"] == "/anmelden?zur%C3%BCck=ja"
        case "403":
            assert (status, body.decode()) == (403, "nicht für dich\n")
        case "503":
            assert (status, body.decode(), headers["retry-after"]) == (503, "später", "7")
        case "json":
            assert (status, json.loads(body)) == (402, {"why": "ünpaid"})
    assert site.request("GET", "guarded", "counted").json()["made"] == before + 1


def test_what_a_before_hook_adds_is_there_for_the_room_and_cannot_be_forged(site, room):
    """S9: headers of the request that goes on, over those that the client sent under the same name."""
    forged = {"x-user": '{"name": "root"}'}
    wanted = {"name": LETTERS, "room": room}
    client = site.connect("guarded", room, f"name={quote(LETTERS)}", headers=forged)
    site.evicted("guarded", room)
    client.send("who")
    assert told(client) == [LETTERS, wanted]
    answer = site.request("GET", "guarded", room, f"?name={quote(LETTERS)}", headers=forged)
    assert answer.json()["user"] == wanted


def test_cors_headers_are_on_every_answer_of_a_party_that_asks_for_them(site, room):
    """S26: a mapping with credentials as it stands, on answers and refusals; preflights wake nobody; an
    upgrade has none, and a party that does not ask gets OPTIONS itself.
    """
    page = {"Origin": "https://example.com"}
    before = site.request("GET", "guarded", "counted").json()["made"]
    for query, status in (("", 200), ("?answer=403", 403), ("?answer=302", 302)):
        answer = site.request("GET", "guarded", room, query, headers=page)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://example.com"
        assert answer.headers["access-control-allow-credentials"] == "true"
    preflight = {**page, "Access-Control-Request-Method": "PUT"}
    answer = site.request("OPTIONS", "guarded", f"{room} never", headers=preflight)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-credentials"] == "true"
    # One object for the request above that was let in, and one for this.
    assert site.request("GET", "guarded", "counted").json()["made"] == before + 2

    with RawClient(site.broker.port) as client:
        upgrade = client.handshake(f"/parties/guarded/{quote(room, safe='')}")
        assert not [name for name in upgrade.headers if name.startswith("access-control")]
    answer = site.request("OPTIONS", "uncrossed", room, headers=preflight)
    assert answer.text == "OPTIONS"
    assert "access-control-allow-origin" not in answer.headers


# --- Parties, rooms and letters ---------------------------------------------------------------------


def test_one_id_in_several_parties_is_several_rooms(site, room):
    """S1, S27: each party has its own connections and storage, under its class's name in kebab-case."""
    clients = {party: site.connect(party, room, "_pk=same") for party in ("red-team", "blue-team", "main")}
    for party, client in clients.items():
        client.send(f"to {party} {LETTERS}")
        assert told(client) == [party, party, room, f"{party}/{room}", f"to {party} {LETTERS}"]
    for party in clients:
        answer = site.request("GET", party, room, "/deep/ü?q").json()
        assert answer == {"rest": "/deep/ü", "said": [f"to {party} {LETTERS}"], "here": ["same"]}
    alias = site.http.get(f"/party/{quote(room, safe='')}").json()
    assert alias["said"] == [f"to main {LETTERS}"]
    assert site.refused("redteam", room, "")[0] == 404


@pytest.mark.parametrize("name", [LETTERS, "%2F", "a b+c", "日本語" * 56, "?#&="])
def test_rooms_have_names_in_whatever_letters(site, name):
    """S1: the id is the decoded path segment, the same for sockets, requests and the command line."""
    client = site.connect("red-team", name)
    client.send("x")
    assert told(client) == ["red-team", "red-team", name, f"red-team/{name}", "x"]
    assert site.request("GET", "red-team", name).json()["said"] == ["x"]
    [row] = site.broker.connections(party="red-team", room=name)
    assert row["room"] == name


def test_a_room_answers_each_method_as_it_likes(site, room):
    """S26: `on_request` sees every method; HEAD has no body, an upgrade to a room never comes there."""
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"):
        answer = site.request(method, "red-team", room)
        assert (answer.status_code, answer.headers["allow"], answer.json()) == (405, "GET", {"no": method})
    answer = site.request("HEAD", "red-team", room)
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "GET", b"")
    assert site.request("GET", "slow", "nobody").text == "opened"
    assert site.request("GET", "known", room).status_code == 404  # it has no hook for requests


def test_sockets_and_requests_of_a_room_that_stays_share_its_fields(site, room):
    """S6, S26: it is one object, whichever door they come in by."""
    client = site.connect("awake", room)
    assert site.request("GET", "awake", room).json()[-1] == "request"
    client.send("seen")
    assert told(client) == [1, "init", "start", "tags", "connect", "request", "message"]


def test_text_of_all_the_world_comes_back_as_it_was(site, room):
    """S18: text frames are UTF-8, in one piece or in fragments that cut a letter in two."""
    client = site.connect("red-team", room)
    client.send(LETTERS)
    assert told(client)[-1] == LETTERS
    raw = "𝄞☃".encode()
    client.send_frame(TEXT, raw[:2], fin=False)
    client.send_frame(0, raw[2:5], fin=False)
    client.send_frame(0, raw[5:])
    assert told(client)[-1] == "𝄞☃"
