"""What leaves a room before a turn ends, or after it: `flush` and `start_soon` (S20)."""

import trio

from broker import LimitExceeded, Server
from tests.scenarios.driver import Stage


class Talking(Server):
    """A chat with one who thinks while it goes on."""

    background_max = 2

    async def on_message(self, message, sender):
        verb, _, rest = message.partition(" ")
        if verb == "ask":
            self.room.start_soon(self.answer, rest.split())
        elif verb == "many":
            for _ in range(int(rest)):
                self.room.start_soon(self.answer, [])
        elif verb == "broken":
            self.room.start_soon(self.break_off)
        elif verb == "undone":
            self.room.start_soon(self.answer, ["never"])
            raise ValueError("not begun")
        elif verb == "flush":
            sender.send("on its way")
            self.room.storage.put("flushed", True)
            await self.room.flush()
            sender.send("never seen")
            self.room.storage.put("never", True)
            raise ValueError("too late")
        elif verb == "look":
            sender.send(await self.room.storage.list())
            return
        self.room.storage.put("heard", message)
        self.room.broadcast(f"chat {message}")

    async def answer(self, words):
        for word in words:
            # Each word waits for a message: so the chat goes on between any two.
            while await self.room.storage.get("heard") != f"want {word}":
                await trio.sleep(0.01)
            self.room.broadcast(f"answer {word}")
            await self.room.flush()
        self.room.storage.put("heard", "all")
        self.room.broadcast("answered")

    async def break_off(self):
        self.room.storage.put("begun", True)
        self.room.broadcast("begun")
        await self.room.flush()
        self.room.storage.put("lost", True)
        self.room.broadcast("never seen")
        raise KeyError("broken")

    def on_error(self, connection, error):
        self.room.broadcast(f"{connection and connection.id}: {type(error).__name__}")


def scenario_an_answer_is_streamed_while_the_chat_goes_on(stage: Stage):  # S20
    anna = stage.connect(Talking, "anna")
    bob = stage.connect(Talking, "bob")
    anna.send("ask a b")
    anna.expect("chat ask a b")
    bob.expect("chat ask a b")
    for word in ("a", "b"):
        bob.send("say more")
        bob.expect("chat say more")
        bob.send(f"want {word}")
        bob.expect(f"chat want {word}", f"answer {word}")
        anna.expect("chat say more", f"chat want {word}", f"answer {word}")
    anna.expect("answered")
    bob.expect("answered")
    assert stage.asleep(Talking) == 1  # it has kept the object, and then let it go
    anna.send("look")
    anna.expect({"heard": "all"})


def scenario_background_work_that_fails_loses_what_it_has_not_flushed(stage: Stage):  # S20
    anna = stage.connect(Talking, "anna")
    with stage.errors(KeyError):
        anna.send("broken")
        anna.expect("chat broken", "begun", "None: KeyError")
    anna.send("look")
    anna.expect({"heard": "broken", "begun": True})


def scenario_background_work_of_a_turn_that_fails_does_not_begin(stage: Stage):  # S20
    anna = stage.connect(Talking, "anna")
    with stage.errors(ValueError):
        anna.send("undone")
        anna.expect("anna: ValueError")
    anna.send("want never")
    anna.expect("chat want never")
    anna.expect_nothing()
    stage.asleep(Talking)


def scenario_what_was_flushed_is_done(stage: Stage):  # S20
    anna = stage.connect(Talking, "anna")
    with stage.errors(ValueError):
        anna.send("flush")
        anna.expect("on its way", "anna: ValueError")
    anna.send("look")
    anna.expect({"flushed": True})


def scenario_a_room_has_so_many_pieces_of_background_work(stage: Stage):  # S7
    anna = stage.connect(Talking, "anna")
    anna.send("many 1")
    anna.expect("chat many 1", "answered")
    anna.send("many 2")
    anna.expect("chat many 2", "answered", "answered")
    with stage.errors(LimitExceeded):
        anna.send("many 3")
        anna.expect("anna: LimitExceeded")
