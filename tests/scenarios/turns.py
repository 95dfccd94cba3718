"""Turns: one after the other, whole or not at all, what they send in order (S18, S19, S20)."""

import trio

from broker import LimitExceeded, Server, TurnTimeout
from tests.scenarios.driver import Stage


class Sending(Server):
    async def on_message(self, message, sender):
        if message == "kinds":
            for each in ("text ä", b"\x00\xff", {"a": [1, None, True]}, [1.5], 7, None):
                sender.send(each)
        elif message == "order":
            for number in range(3):
                sender.send(f"to you {number}")
                self.room.broadcast(f"to all {number}")
                self.room.broadcast(f"to others {number}", without=[sender.id])
        else:
            sender.send(message)


def scenario_text_bytes_and_the_rest_as_json(stage: Stage):  # S18
    anna = stage.connect(Sending, "anna")
    anna.send("kinds")
    anna.expect("text ä", b"\x00\xff", {"a": [1, None, True]}, [1.5], 7, None)
    for message in ("", "ä" * 40_000, b"", b"\x00" * 80_000, b"\xff" * 300_000):
        anna.send(message)
        anna.expect(message)


def scenario_effects_leave_in_the_order_of_the_calls(stage: Stage):  # S20
    anna = stage.connect(Sending, "anna")
    bob = stage.connect(Sending, "bob")
    anna.send("order")
    for number in range(3):
        anna.expect(f"to you {number}", f"to all {number}")
        bob.expect(f"to all {number}", f"to others {number}")


class Failing(Server):
    turn_bytes_max = 100_000

    def get_connection_tags(self, connection, ctx):
        return ["tag"]

    async def on_message(self, message, sender):
        count = await self.room.storage.get("count", 0)
        self.room.storage.put("count", count + 1)
        if message == "bad":
            sender.send("never seen")
            self.room.broadcast("nor this")
            sender.set_state("lost")
            sender.add_tags("lost")
            sender.close(4000, "nor that")
            raise ValueError("no")
        if message == "big":
            sender.send("x" * 99_000)
            self.room.broadcast("y" * 1_000)
        sender.send([count, sender.state, *sender.tags])

    def on_error(self, connection, error):
        connection.send(f"{type(error).__name__}: {connection.state} {len(connection.tags)}")


def scenario_a_turn_that_fails_leaves_nothing_behind(stage: Stage):  # S20
    anna = stage.connect(Failing, "anna")
    anna.send("good")
    anna.expect([0, None, "tag"])
    with stage.errors(ValueError):
        anna.send("bad")
        anna.expect("ValueError: None 1")
    anna.send("good")
    anna.expect([1, None, "tag"])
    with stage.errors(LimitExceeded):
        anna.send("big")
        anna.expect("LimitExceeded: None 1")
    anna.send("good")
    anna.expect([2, None, "tag"])


class BadError(Server):
    def on_message(self, message, sender):
        if message == "fail":
            raise ValueError("first")
        sender.send(message)

    def on_error(self, connection, error):
        connection.send("never seen")
        raise KeyError("second")


def scenario_an_on_error_that_fails_is_only_logged(stage: Stage):  # S20
    anna = stage.connect(BadError, "anna")
    with stage.errors(ValueError, KeyError):
        anna.send("fail", "go on")
        anna.expect("go on")


class Patient(Server):
    """Waits in its turns; each sees all that the one before has done."""

    def __init__(self, room):
        self.inside = 0

    async def on_message(self, message, sender):
        self.inside += 1
        assert self.inside == 1
        seconds, _, text = message.partition(" ")
        said = [*await self.room.storage.get("said", []), text]
        await trio.sleep(float(seconds))
        self.room.storage.put("said", said)
        self.inside -= 1
        sender.send(said)

    def on_error(self, connection, error):
        self.inside = 0
        connection.send(type(error).__name__)


class Impatient(Patient):
    turn_timeout = 0.5


def scenario_turns_of_a_room_come_one_after_the_other(stage: Stage):  # S19
    anna = stage.connect(Patient, "anna")
    anna.send("0.1 a", "0 b", "0.05 c", "0 d")
    anna.expect(["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"])


def scenario_rooms_do_not_wait_for_each_other(stage: Stage):  # S19
    slow = stage.connect(Patient, "anna", room="slow")
    quick = stage.connect(Patient, "anna+2", room="quick")
    slow.send("0.5 a")
    quick.send("0 b")
    quick.expect(["b"])
    slow.expect(["a"])


def scenario_a_turn_that_takes_too_long_is_ended(stage: Stage):  # S20
    anna = stage.connect(Impatient, "anna")
    with stage.errors(TurnTimeout):
        anna.send("100 never", "0 next")
        anna.expect("TurnTimeout", ["next"])
