"""The life of a room: when its object is made, what precedes what, what outlives it (S2, S3, S4, S6, S8)."""

import trio

from broker import Server
from tests.scenarios.driver import Stage


class Lifecycle(Server):
    """Says what happens to it, to whoever is called "watcher"."""

    def __init__(self, room):
        self.seen = ["init"]

    def on_start(self):
        self.seen.append("start")

    def get_connection_tags(self, connection, ctx):
        self.seen.append(f"tags {connection.id}")
        return ["t"]

    async def on_connect(self, connection, ctx):
        self.seen.append(f"connect {connection.id}")
        await self.tell()

    async def on_message(self, message, sender):
        self.seen.append(f"message {message}")
        await self.tell()

    async def on_close(self, connection, code, reason, was_clean):
        self.seen.append(f"close {connection.id} {code} {reason} {was_clean} {connection.close_cause}")
        await self.tell()

    async def tell(self):
        watcher = await self.room.get_connection("watcher")
        if watcher is not None:
            watcher.send(self.seen)


def scenario_hooks_come_in_order_on_one_object_for_each_burst(stage: Stage):  # S3, S6
    watcher = stage.connect(Lifecycle, "watcher")
    watcher.expect(["init", "start", "tags watcher", "connect watcher"])
    stage.asleep(Lifecycle)
    anna = stage.connect(Lifecycle, "anna")
    watcher.expect(["init", "start", "tags anna", "connect anna"])
    stage.asleep(Lifecycle)
    anna.send("hello")
    watcher.expect(["init", "start", "message hello"])
    stage.asleep(Lifecycle)
    anna.close(4001, "enough")
    watcher.expect(["init", "start", "close anna 4001 enough True client_close"])
    assert stage.asleep(Lifecycle) == 4


class LateStart(Server):
    hibernate = False

    def __init__(self, room):
        self.starts = 0
        self.connects = 0

    async def on_start(self):
        await trio.sleep(0.1)
        self.starts += 1

    def on_connect(self, connection, ctx):
        self.connects += 1
        connection.send(f"started {self.starts} times, you are number {self.connects}")

    def on_message(self, message, sender):
        sender.send(f"{message} {self.starts}")


def scenario_a_room_starts_once_for_all_who_come_meanwhile(stage: Stage):  # S3
    clients = [stage.connect(LateStart, f"c{number}") for number in range(1, 6)]
    for client in clients:
        client.send("hello")
    for number, client in enumerate(clients, 1):
        client.expect(f"started 1 times, you are number {number}", "hello 1")
    for client in clients:
        client.close()


class BadStart(Server):
    """Fails to start twice, in each room, and then does."""

    tries: dict[str, int] = {}

    def __init__(self, room):
        tries = self.tries[room.id] = self.tries.get(room.id, 0) + 1
        if tries == 1:
            raise LookupError("no object")

    async def on_start(self):
        if self.tries[self.room.id] == 2:
            self.room.storage.put("half", True)
            raise OSError("no start")
        self.half = await self.room.storage.get("half")

    def on_message(self, message, sender):
        sender.send(f"{message}: {self.tries[self.room.id]} tries, half is {self.half}")


def scenario_a_start_that_fails_costs_no_socket_and_no_message(stage: Stage):  # S4
    BadStart.tries.clear()  # where the host is this process: a scenario may be played in it twice
    anna = stage.connect(BadStart, "anna")
    with stage.errors(LookupError, OSError):
        anna.send("hello")
        anna.expect("hello: 3 tries, half is None")
    anna.send("again")
    anna.receive()


class Field(Server):
    """A field beside the storage; it stays in memory unless it is told to go."""

    hibernate = False

    async def on_start(self):
        self.field = 0
        self.stored = await self.room.storage.get("stored", 0)

    def on_message(self, message, sender):
        self.field += 1
        self.stored += 1
        self.room.storage.put("stored", self.stored)
        sender.send([self.field, self.stored])
        if message == "go":
            self.room.hibernate()


def scenario_fields_stay_until_the_room_goes_and_storage_stays_for_ever(stage: Stage):  # S6, S8
    anna = stage.connect(Field, "anna")
    anna.send("a", "b")
    anna.expect([1, 1], [2, 2])
    anna.send("go")
    anna.expect([3, 3])
    assert stage.asleep(Field) == 1
    anna.send("c", "go")
    anna.expect([1, 4], [2, 5])
    assert stage.asleep(Field) == 2
    anna.close()


class Quiet(Server):
    """Has a hook for messages alone."""

    def on_message(self, message, sender):
        sender.send(f"heard {message}")


def scenario_what_no_hook_is_there_for_makes_no_object(stage: Stage):  # S2
    anna = stage.connect(Quiet, "anna")
    bob = stage.connect(Quiet, "bob")
    party, room = "quiet", stage.room()
    assert stage.ask("broadcast", party=party, room=room, message="to all")["sent"] == 2
    assert stage.ask("send", party=party, room=room, id="bob", message="to you")["sent"] == 1
    anna.expect("to all")
    bob.expect("to all", "to you")
    bob.close(1000, "bye")
    assert stage.asleep(Quiet) == 0
    anna.send("one")
    anna.expect("heard one")
    assert stage.asleep(Quiet) == 1


class Deaf(Server):
    """Has no hook for messages."""

    def on_connect(self, connection, ctx):
        connection.send("welcome")


def scenario_messages_that_no_hook_wants_are_taken_and_wake_nobody(stage: Stage):  # S2
    anna = stage.connect(Deaf, "anna")
    anna.expect("welcome")
    anna.send("a", b"b", "c" * 70_000)
    anna.expect_nothing()
    assert stage.asleep(Deaf) == 1
    anna.close(3000, "done")
