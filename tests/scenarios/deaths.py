"""Deaths and successors of processes: what rooms and clients notice of them, which is nothing (S22, S23, S32,
S34).
"""

import trio

from broker import Server
from tests.scenarios.driver import Stage


class Ledger(Server):
    """Counts in a field, in its storage and in the sender's state; the last two outlive its host."""

    hibernate = False

    def __init__(self, room):
        self.field = 0

    def get_connection_tags(self, connection, ctx):
        return [f"tag of {connection.id}"]

    async def on_message(self, message, sender):
        self.field += 1
        count = 1 + await self.room.storage.get("count", 0)
        self.room.storage.put("count", count)
        sender.set_state(lambda before: (before or 0) + 1)
        sender.send([message, self.field, count, sender.state, *sender.tags])
        self.room.broadcast(f"{sender.id} said {message}", without=[sender])

    def on_close(self, connection, code, reason, was_clean):
        self.room.broadcast(f"{connection.id} left: {code} {connection.state}")


def scenario_a_room_goes_on_after_the_death_of_its_host(stage: Stage):  # S22
    anna = stage.connect(Ledger, "anna")
    bob = stage.connect(Ledger, "bob")
    anna.send("one")
    anna.expect(["one", 1, 1, 1, "tag of anna"])
    bob.expect("anna said one")
    stage.crash_host()
    bob.send("two")
    bob.expect(["two", 1, 2, 1, "tag of bob"])
    anna.expect("bob said two")
    anna.send("three")
    anna.expect(["three", 2, 3, 2, "tag of anna"])
    bob.expect("anna said three")
    anna.close(4000)
    bob.expect("anna left: 4000 2")


def scenario_sockets_go_on_after_the_death_of_their_gateway(stage: Stage):  # S34
    anna = stage.connect(Ledger, "anna")
    bob = stage.connect(Ledger, "bob")
    anna.send("one")
    anna.expect(["one", 1, 1, 1, "tag of anna"])
    bob.expect("anna said one")
    stage.crash_gateway()
    anna.send("two")
    assert anna.receive_json()[2:] == [2, 2, "tag of anna"]
    bob.expect("anna said two")
    carol = stage.connect(Ledger, "carol")
    carol.send("three")
    assert carol.receive_json()[2:] == [3, 1, "tag of carol"]
    anna.expect("carol said three")
    bob.expect("carol said three")
    bob.close(4000)
    anna.expect("bob left: 4000 None")
    carol.expect("bob left: 4000 None")


class Dying(Server):
    """Waits in the middle of a turn, for a death."""

    async def on_message(self, message, sender):
        sender.send(f"begun {message}")
        before = await self.room.storage.get("begun", 0)
        self.room.storage.put("begun", before + 1)
        if message.startswith("wait"):
            await trio.sleep(float(message.split()[1]))
        sender.send([message, before])


def scenario_a_turn_is_run_again_that_its_host_did_not_survive(stage: Stage):  # S22, S23
    anna = stage.connect(Dying, "anna")
    anna.send("wait 0.5")
    stage.crash_host()
    anna.expect("begun wait 0.5", ["wait 0.5", 0])
    stage.asleep(Dying)
    anna.send("next")
    anna.expect("begun next", ["next", 1])


def scenario_a_turn_is_run_again_that_its_gateway_did_not_survive(stage: Stage):  # S22, S34
    anna = stage.connect(Dying, "anna")
    anna.send("wait 0.5")
    stage.crash_gateway()
    anna.expect("begun wait 0.5", ["wait 0.5", 0])
    stage.asleep(Dying)
    anna.send("next")
    anna.expect("begun next", ["next", 1])


def scenario_new_code_waits_for_turns_and_closes_no_socket(stage: Stage):  # S32
    anna = stage.connect(Dying, "anna")
    bob = stage.connect(Ledger, "bob", room="other")
    bob.send("one")
    bob.expect(["one", 1, 1, 1, "tag of bob"])
    anna.send("wait 0.5", "next")
    stage.reload()
    anna.expect("begun wait 0.5", ["wait 0.5", 0], "begun next", ["next", 1])
    bob.send("two")
    bob.expect(["two", 1, 2, 2, "tag of bob"])


def scenario_messages_that_came_while_nobody_was_there_are_not_lost(stage: Stage):  # S22
    anna = stage.connect(Ledger, "anna")
    for number in range(1, 4):
        anna.send(f"m{number}")
    for number in range(1, 4):
        assert anna.receive_json()[2] == number
    stage.crash_host()
    stage.crash_gateway()
    for number in range(4, 7):
        anna.send(f"m{number}")
    for number in range(4, 7):
        assert anna.receive_json()[2] == number
