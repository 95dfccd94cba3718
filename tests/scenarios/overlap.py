"""Turns of one room that overlap: which may, and in what order they begin and end (S19)."""

from collections.abc import Awaitable, Callable

import trio

from broker import Server
from tests.scenarios.driver import Stage


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait, letting other turns run, until something is so that only they can bring about."""
    while not await condition():
        await trio.sleep(0.01)


class Meeting(Server):
    """Two turns that meet: each waits for what the other one does while it runs."""

    concurrency = "per_connection"

    async def on_message(self, message, sender):
        storage = self.room.storage
        if message == "wait":
            storage.put("waiting", True)
            await self.room.flush()
            await until(lambda: storage.get("gone"))
        elif message == "go":
            await until(lambda: storage.get("waiting"))
            storage.put("gone", True)
        said = [*await storage.get(f"said by {sender.id}", []), message]
        storage.put(f"said by {sender.id}", said)
        sender.send(said)

    async def on_request(self, request):
        await until(lambda: self.room.storage.get("waiting"))
        self.room.storage.put("gone", True)
        return "gone"

    async def on_close(self, connection, code, reason, was_clean):
        self.room.broadcast(["left", connection.id, *await self.room.storage.get(f"said by {connection.id}")])


def scenario_turns_of_different_connections_overlap(stage: Stage):  # S19
    anna = stage.connect(Meeting, "anna")
    bob = stage.connect(Meeting, "bob")
    anna.send("wait", "a", "b")
    bob.send("go", "c")
    bob.expect(["go"], ["go", "c"])
    anna.expect(["wait"], ["wait", "a"], ["wait", "a", "b"])  # one after the other within a connection


def scenario_a_close_turn_is_behind_all_messages_of_its_connection(stage: Stage):  # S14, S19
    anna = stage.connect(Meeting, "anna")
    bob = stage.connect(Meeting, "bob")
    anna.send("wait", "a")
    bob.send("go")
    bob.expect(["go"])
    anna.expect(["wait"], ["wait", "a"])
    anna.close()
    bob.expect(["left", "anna", "wait", "a"])


def scenario_a_request_is_answered_while_a_message_waits(stage: Stage):  # S19, S26
    anna = stage.connect(Meeting, "anna")
    anna.send("wait")
    assert stage.request("GET", stage.path(Meeting)).text == "gone"
    anna.expect(["wait"])


class Mixing(Server):
    """Later messages of one connection may be done before an earlier one is."""

    concurrency = "interleave"

    def __init__(self, room):
        self.gone = trio.Event()

    async def on_message(self, message, sender):
        if message == "wait":
            await self.gone.wait()
        elif message == "go":
            self.gone.set()
        elif message == "fail":
            raise ValueError("not this one")
        sender.send(message)

    def on_error(self, connection, error):
        connection.send(f"{error}")


def scenario_turns_of_one_connection_overlap_and_end_in_order(stage: Stage):  # S19
    anna = stage.connect(Mixing, "anna")
    anna.send("wait", "a", "go", "b")
    anna.expect("wait", "a", "go", "b")


def scenario_a_turn_that_fails_keeps_its_place_among_those_that_overlap(stage: Stage):  # S19, S20
    anna = stage.connect(Mixing, "anna")
    with stage.errors(ValueError):
        anna.send("wait", "fail", "a", "go")
        anna.expect("wait", "not this one", "a", "go")
