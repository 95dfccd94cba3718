"""How connections end: codes and reasons in both directions, and what `on_close` is told (S14)."""

from broker import ConnectionClosedError, Server
from tests.scenarios.driver import Stage


class Telling(Server):
    """Tells those who stay how the others have left; closes whom it is told to."""

    async def on_message(self, message, sender):
        verb, _, rest = message.partition(" ")
        if verb == "close":
            code, _, reason = rest.partition(" ")
            sender.send("last words")
            sender.close(int(code), reason)
            sender.close(4999, "a second time")
            try:
                sender.send("too late")
            except ConnectionClosedError:
                await self.room.storage.put("refused", True)
        elif verb == "others":
            self.room.broadcast("you go", without=[sender])
            async for each in self.room.get_connections():
                if each is not sender:
                    each.close(4002, rest)
        elif verb == "bad":
            refused = []
            for code, reason in (
                (1005, ""),
                (1006, ""),
                (1015, ""),
                (999, ""),
                (5000, ""),
                (1000, "x" * 124),
            ):
                try:
                    sender.close(code, reason)
                except Exception as error:
                    refused.append(type(error).__name__)
            sender.close(1000, "ä" * 61 + "x")
            await self.room.storage.put("bad", refused)
        else:
            sender.send([await self.room.storage.get("refused"), await self.room.storage.get("bad")])

    def on_close(self, connection, code, reason, was_clean):
        self.room.broadcast([connection.id, code, reason, was_clean, connection.close_cause])


def scenario_a_clients_close_comes_back_and_is_told_once(stage: Stage):  # S14
    watcher = stage.connect(Telling, "watcher")
    for code, reason in ((1000, "done"), (1001, ""), (3000, "lib"), (4999, "ende ä")):
        client = stage.connect(Telling, f"c{code}")
        client.close(code, reason)
        watcher.expect([f"c{code}", code, reason, True, "client_close"])
    bare = stage.connect(Telling, "bare")
    bare.close(1005)
    watcher.expect(["bare", 1005, "", True, "client_close"])


def scenario_a_client_that_vanishes_is_told(stage: Stage):  # S14
    watcher = stage.connect(Telling, "watcher")
    anna = stage.connect(Telling, "anna")
    anna.drop()
    watcher.expect(["anna", 1006, "", False, "client_gone"])


def scenario_a_rooms_close_comes_behind_what_it_has_sent(stage: Stage):  # S14, S18
    watcher = stage.connect(Telling, "watcher")
    for code in (1000, 1001, 3000, 4000):
        anna = stage.connect(Telling, f"c{code}")
        anna.send(f"close {code} because")
        anna.expect("last words")
        anna.expect_close(code, "because")
        watcher.expect([f"c{code}", code, "because", True, "server_close"])
    watcher.send("look")
    watcher.expect([True, None])


def scenario_a_room_closes_others(stage: Stage):  # S14
    watcher = stage.connect(Telling, "watcher")
    clients = [stage.connect(Telling, f"c{number}") for number in range(3)]
    watcher.send("others go now")
    for client in clients:
        client.expect("you go")
        client.expect_close(4002, "go now")
    watcher.expect_in_any_order(
        *[[f"c{number}", 4002, "go now", True, "server_close"] for number in range(3)]
    )


def scenario_codes_that_must_not_be_sent_are_errors_where_they_are_made(stage: Stage):  # S14
    watcher = stage.connect(Telling, "watcher")
    anna = stage.connect(Telling, "anna")
    anna.send("bad")
    anna.expect_close(1000, "ä" * 61 + "x")
    watcher.expect(["anna", 1000, "ä" * 61 + "x", True, "server_close"])
    watcher.send("look")
    assert len(watcher.receive_json()[1]) == 6


class BadClose(Server):
    """`on_close` raises, or closes everybody."""

    def on_message(self, message, sender):
        sender.send(message)

    async def on_close(self, connection, code, reason, was_clean):
        self.room.broadcast("undone")
        self.room.storage.put("left", connection.id)
        if reason == "raise":
            raise ValueError("no goodbye")
        async for each in self.room.get_connections():
            each.close(4000, f"{connection.id} left")

    async def on_error(self, connection, error):
        left = await self.room.storage.get("left", "nobody")
        self.room.broadcast(f"{connection.id}: {error}; {left} left")


def scenario_an_on_close_that_raises_is_undone_and_over(stage: Stage):  # S14, S20
    watcher = stage.connect(BadClose, "watcher")
    anna = stage.connect(BadClose, "anna")
    with stage.errors(ValueError):
        anna.close(1000, "raise")
        watcher.expect("anna: no goodbye; nobody left")
    watcher.send("still here")
    watcher.expect("still here")
    again = stage.connect(BadClose, "anna+2")
    again.send("me too")
    again.expect("me too")


def scenario_an_on_close_that_closes_the_others(stage: Stage):  # S14
    watcher = stage.connect(BadClose, "watcher")
    anna = stage.connect(BadClose, "anna")
    anna.close(1000, "bye")
    watcher.expect("undone")
    watcher.expect_close(4000, "anna left")
