"""Connections: who comes in, under which id, with which tags and state, who sees them (S9 to S13, S17)."""

from typing import Any

from quart import redirect

from broker import LimitExceeded, Refuse, Response, Server, StorageLimitError
from tests.scenarios.driver import Stage


class Remembered(Server):
    def get_connection_tags(self, connection, ctx):
        return [*ctx.request.args.getlist("tag"), "all", "all"]

    async def on_message(self, message, sender):
        verb, _, rest = message.partition(" ")
        if verb == "set":
            sender.set_state(rest)
        elif verb == "count":
            sender.set_state(lambda before: (before or 0) + 1)
        elif verb == "forget":
            sender.set_state(None)
        elif verb == "tag":
            sender.add_tags(*rest.split())
        elif verb == "untag":
            sender.remove_tags(*rest.split())
        sender.send([sender.id, sender.uri.partition("//")[2].partition("/")[2], *sender.tags, sender.state])

    async def on_close(self, connection):
        self.room.broadcast([connection.id, *connection.tags, connection.state])


def scenario_tags_and_uri_are_there_after_an_eviction(stage: Stage):  # S11, S13
    anna = stage.connect(Remembered, "anna", rest="/deep/er", query="tag=a&tag=b")
    uri = f"parties/remembered/{stage.room()}/deep/er?_pk=anna&tag=a&tag=b"
    assert stage.asleep(Remembered) == 1
    anna.send("look")
    anna.expect(["anna", uri, "a", "b", "all", None])
    stage.asleep(Remembered)
    anna.send("tag c a", "untag b all")
    anna.expect(["anna", uri, "a", "b", "all", "c", None], ["anna", uri, "a", "c", None])
    stage.asleep(Remembered)
    anna.send("look")
    anna.expect(["anna", uri, "a", "c", None])


def scenario_state_is_there_after_an_eviction_and_in_on_close(stage: Stage):  # S13
    watcher = stage.connect(Remembered, "watcher")
    anna = stage.connect(Remembered, "anna")
    for message in ("count", "count", "count"):
        anna.send(message)
    stage.asleep(Remembered)
    anna.send("look")
    assert [anna.receive_json()[-1] for _ in range(4)] == [1, 2, 3, 3]
    anna.send("set hällo", "forget", "look", "count")
    assert [anna.receive_json()[-1] for _ in range(4)] == ["hällo", None, None, 1]
    stage.asleep(Remembered)
    anna.close()
    watcher.expect(["anna", "all", 1])


class Bounded(Server):
    state_bytes_max = 1000
    tags_max = 3
    tag_bytes_max = 4

    def get_connection_tags(self, connection, ctx):
        return ctx.request.args.getlist("tag")

    def on_message(self, message, sender):
        what, _, count = message.partition(" ")
        try:
            if what == "state":
                sender.set_state("s" * int(count))
            elif what == "tags":
                sender.add_tags(*[str(number) for number in range(int(count))])
            else:
                sender.add_tags("t" * int(count))
        except (LimitExceeded, StorageLimitError) as error:
            sender.send(f"{len(sender.tags)} tags, state {len(sender.state or '')}: {error}")
        else:
            sender.send(f"{len(sender.tags)} tags, state {len(sender.state or '')}")
            sender.remove_tags(*sender.tags)


def scenario_bounds_of_state_and_tags(stage: Stage):  # S11, S13
    anna = stage.connect(Bounded, "anna")
    anna.send("state 996", "state 997", "state 998")
    anna.expect("0 tags, state 996", "0 tags, state 997")
    assert str(anna.receive()).startswith("0 tags, state 997: ")
    anna.send("tags 2", "tags 3", "tags 4")
    anna.expect("2 tags, state 997", "3 tags, state 997")
    assert str(anna.receive()).startswith("0 tags, state 997: ")
    anna.send("tag 3", "tag 4", "tag 5")
    anna.expect("1 tags, state 997", "1 tags, state 997")
    assert str(anna.receive()).startswith("0 tags, state 997: ")
    with stage.errors(LimitExceeded):
        bob = stage.connect(Bounded, "bob", query="tag=a&tag=b&tag=c&tag=d")
        bob.expect_close(1011, "")


class Guarded(Server):
    @staticmethod
    async def on_before_connect(request, lobby):
        answer = request.args.get("answer")
        if answer == "302":
            return redirect("/elsewhere")
        if answer == "403":
            raise Refuse(403, "not you")
        if answer == "503":
            return Response("later", status=503, headers={"Retry-After": "7", "X-Room": lobby.id})
        if answer == "raise":
            raise KeyError("inner secret")
        request.headers["X-Who"] = f"{request.headers.get('authorization', 'nobody')} of {lobby.party}"
        return None

    def on_connect(self, connection, ctx):
        connection.send(ctx.request.headers["X-Who"])


def scenario_a_before_hook_may_refuse_as_http_does(stage: Stage):  # S9
    assert stage.refused(Guarded, "anna", query="answer=302").headers["location"] == "/elsewhere"
    assert stage.refused(Guarded, "anna", query="answer=403").text == "not you\n"
    answer = stage.refused(Guarded, "anna", query="answer=503")
    assert (answer.status, answer.headers["retry-after"]) == (503, "7")
    assert stage.asleep(Guarded) == 0


def scenario_a_before_hook_that_fails_tells_nothing(stage: Stage):  # S9, S39
    with stage.errors(KeyError):
        answer = stage.refused(Guarded, "anna", query="answer=raise")
    assert answer.status == 500
    assert b"secret" not in answer.body


def scenario_a_before_hook_passes_data_on(stage: Stage):  # S9
    anna = stage.connect(Guarded, "anna", headers={"Authorization": "Jürgen".encode().decode("latin-1")})
    anna.receive()
    bob = stage.connect(Guarded, "bob")
    bob.expect("nobody of guarded")


class Picky(Server):
    def on_connect(self, connection, ctx):
        connection.send("never seen")
        self.room.broadcast("nor this")
        self.room.storage.put("seen", connection.id)
        if connection.id == "bad":
            raise ValueError("not this one")
        self.room.storage.delete("seen")

    async def on_message(self, message, sender):
        sender.send(await self.room.storage.get("seen", "nobody"))

    def on_close(self, connection, code, reason, was_clean):
        self.room.broadcast(f"{connection.id} left: {code} {connection.close_cause}")


def scenario_an_error_in_the_connect_turn_closes_and_undoes_it(stage: Stage):  # S9, S20
    anna = stage.connect(Picky, "anna")
    anna.expect("never seen", "nor this")
    with stage.errors(ValueError):
        bad = stage.connect(Picky, "bad")
        bad.expect_close(1011, "")
    anna.expect("bad left: 1011 server_close")
    anna.send("who")
    anna.expect("nobody")


class FirstWins(Server):
    duplicate_ids = "refuse"

    def on_message(self, message, sender):
        sender.send(f"{sender.id} {message}")


class LastWins(Server):
    duplicate_ids = "replace"

    def on_connect(self, connection, ctx):
        connection.send(f"welcome {ctx.request.args['n']}")

    async def on_message(self, message, sender):
        sender.send(f"{message} of {await self.room.count_connections()}")

    async def on_close(self, connection, code, reason, was_clean):
        # Whether the one who came sees this is free: it may come in before or after.
        watcher = await self.room.get_connection("watcher")
        if watcher is not None:
            watcher.send(f"{connection.id} {code} {connection.close_cause}")


def scenario_an_id_that_is_taken_is_refused(stage: Stage):  # S10
    first = stage.connect(FirstWins, "anna")
    second = stage.connect(FirstWins, "anna+2")
    second.expect_close(4409)
    first.send("still here")
    first.expect("anna still here")
    first.close()
    third = stage.connect(FirstWins, "anna+3")
    third.send("me")
    third.expect("anna me")


def scenario_an_id_that_is_taken_is_taken_over(stage: Stage):  # S10
    watcher = stage.connect(LastWins, "watcher", query="n=0")
    watcher.expect("welcome 0")
    first = stage.connect(LastWins, "anna", query="n=1")
    first.expect("welcome 1")
    second = stage.connect(LastWins, "anna+2", query="n=2")
    first.expect_close(4409, "replaced")
    second.expect("welcome 2")
    watcher.expect("anna 4409 replaced")
    second.send("hello")
    second.expect("hello of 2")


class Probed(Server):
    probe_seconds = 0.3

    def on_message(self, message, sender):
        sender.send(message)


def scenario_a_client_that_does_not_answer_loses_its_id(stage: Stage):  # S10
    first = stage.connect(Probed, "anna")
    first.send("here")
    first.expect("here")
    first.hang()
    second = stage.connect(Probed, "anna+2")
    second.send("me")
    second.expect("me")
    first.wake()
    first.expect_close(4409, "replaced")


class Agreeing(Server):
    subprotocols = ("v2", "v1")

    def on_connect(self, connection, ctx):
        connection.send(ctx.request.headers.get("sec-websocket-protocol", "none"))


def scenario_the_best_subprotocol_is_taken(stage: Stage):  # S17
    stage.connect(Agreeing, "anna", subprotocols=("v1", "v2")).expect("v1, v2")
    stage.connect(Agreeing, "bob").expect("none")


def scenario_names_may_be_anything(stage: Stage):  # S1, S10
    anna = stage.connect(Remembered, "ännä ☃ & co", room="räume/1 ?#%&+", query="tag=%F0%9F%90%AC")
    anna.send("look")
    found = anna.receive_json()
    assert found[0] == "ännä ☃ & co"
    assert found[2:] == ["🐬", "all", None]
    anna.send("set 日本語")
    assert anna.receive_json()[-1] == "日本語"
    assert stage.asleep(Remembered, "räume/1 ?#%&+") == 3


class Filtered(Server):
    def get_connection_tags(self, connection, ctx):
        return list(connection.id)

    async def on_message(self, message, sender):
        given: dict[str, Any] = {}
        for part in message.split():
            name, _, letters = part.partition("=")
            given[name] = list(letters)
        if "without" in given:
            given["without"] = ["".join(given["without"])]
        ids = []
        if "without" not in given:
            ids = [each.id async for each in self.room.get_connections(**given)]
            assert await self.room.count_connections(**given) == len(ids)
        self.room.broadcast(message, **given)
        sender.send(["listed", *ids])


def scenario_broadcasts_and_lists_by_tags(stage: Stage):  # S11, S12
    names = ("ab", "bc", "abc", "d")
    clients = {name: stage.connect(Filtered, name) for name in names}
    asks = clients["d"]
    for question, found in {
        "all_of=ab": ["ab", "abc"],
        "any_of=ad": ["ab", "abc", "d"],
        "none_of=a": ["bc", "d"],
        "all_of=b none_of=c": ["ab"],
        "all_of=b any_of=ac none_of=d": ["ab", "bc", "abc"],
        "all_of=x": [],
        "none_of=abcd": [],
    }.items():
        asks.send(question)
        if "d" in found:
            asks.expect(question)
        asks.expect(["listed", *found])
        for name in found:
            if name != "d":
                clients[name].expect(question)
    asks.send("without=abc")
    asks.expect("without=abc", ["listed"])
    clients["ab"].expect("without=abc")
    clients["bc"].expect("without=abc")
    clients["abc"].expect_nothing()


class Looking(Server):
    def get_connection_tags(self, connection, ctx):
        return ["new"]

    async def on_connect(self, connection, ctx):
        connection.send(["at connect", *[each.id async for each in self.room.get_connections("new")]])

    async def on_message(self, message, sender):
        me = await self.room.get_connection(sender.id)
        assert me is not None
        me.remove_tags("new")
        me.add_tags("old")
        me.set_state(message)
        other = await self.room.get_connection("bob")
        assert other is not None
        other.close(4000, "by another")
        listed = [[each.id, list(each.tags), each.state] async for each in self.room.get_connections()]
        counts = [await self.room.count_connections(tag) for tag in ("new", "old")]
        sender.send([listed, counts, await self.room.get_connection("bob") is None])


def scenario_a_turn_sees_what_it_has_staged(stage: Stage):  # S12
    anna = stage.connect(Looking, "anna")
    anna.expect(["at connect", "anna"])
    bob = stage.connect(Looking, "bob")
    bob.expect(["at connect", "anna", "bob"])
    anna.send("here")
    anna.expect([[["anna", ["old"], "here"]], [0, 1], True])
    bob.expect_close(4000, "by another")
