"""Automatic responses: what the gateway answers by itself, when, and by whose rules (S16)."""

from broker import AutoResponse, LimitExceeded, Server
from tests.scenarios.driver import Stage


class Beating(Server):
    """Has rules of its party; each room may have its own."""

    auto_responses_max = 3
    auto_responses = [
        AutoResponse("ping", "pong"),
        AutoResponse("beat ", "alive ☃", prefix=True),
        AutoResponse(b"\x09", b"\x0a"),
    ]

    async def on_message(self, message, sender):
        verb, _, rest = (message if isinstance(message, str) else "").partition(" ")
        request, _, reply = rest.partition("=")
        if verb == "rule":
            self.room.set_auto_response(request, reply or None)
        elif verb == "prefix":
            self.room.set_auto_response(request, reply or None, prefix=True)
        elif verb == "fail":
            self.room.set_auto_response(request, reply)
            raise ValueError("undone")
        elif verb == "many":
            for number in range(int(rest)):
                self.room.set_auto_response(f"m{number}", "yes")
        elif verb == "long":
            self.room.set_auto_response("r" * int(rest), "r" * int(rest))
        if verb == "when":
            sender.send("never" if await sender.auto_response_at() is None else "once")
        else:
            sender.send(f"heard {message!r}")

    def on_error(self, connection, error):
        connection.send(type(error).__name__)


def scenario_beats_are_answered_and_wake_nobody(stage: Stage):  # S2, S16
    anna = stage.connect(Beating, "anna")
    anna.send("ping", "beat 1", b"\x09", "beat ", "ping")
    anna.expect("pong", "alive ☃", b"\x0a", "alive ☃", "pong")
    assert stage.asleep(Beating) == 0
    anna.send(b"ping", "\x09", "ping ", "beat")  # almost, and so the room's
    anna.expect("heard b'ping'", "heard '\\t'", "heard 'ping '", "heard 'beat'")


def scenario_automatic_responses_keep_their_place(stage: Stage):  # S16
    anna = stage.connect(Beating, "anna")
    anna.send("one", "ping", "two", "beat", "ping", "ping", "three")
    anna.expect("heard 'one'", "pong", "heard 'two'", "heard 'beat'", "pong", "pong", "heard 'three'")


def scenario_a_room_has_rules_of_its_own(stage: Stage):  # S16
    anna = stage.connect(Beating, "anna")
    bob = stage.connect(Beating, "bob")
    other = stage.connect(Beating, "anna+2", room="other")
    anna.send("rule ping=mine", "ping", "prefix beat =mine too", "beat 1", "prefix be=short", "beat 1", "bee")
    anna.expect("heard 'rule ping=mine'", "mine", "heard 'prefix beat =mine too'", "mine too")
    anna.expect("heard 'prefix be=short'", "mine too", "short")  # the longest goes first
    stage.asleep(Beating)
    bob.send("ping")  # for every connection of the room, and for no other room
    bob.expect("mine")
    other.send("ping")
    other.expect("pong")
    anna.send("rule ping=", "ping", "prefix be=", "bee", "prefix beat =", "beat 1")
    anna.expect("heard 'rule ping='", "pong", "heard 'prefix be='", "heard 'bee'")
    anna.expect("heard 'prefix beat ='", "alive ☃")


def scenario_a_rule_is_an_effect_of_its_turn(stage: Stage):  # S16, S20
    anna = stage.connect(Beating, "anna")
    with stage.errors(ValueError):
        anna.send("fail hello=hi", "hello")
        anna.expect("ValueError", "heard 'hello'")


def scenario_bounds_of_automatic_responses(stage: Stage):  # S16
    anna = stage.connect(Beating, "anna")
    for count in (2, 3):
        anna.send(f"many {count}")
        anna.expect(f"heard 'many {count}'")
        anna.send(f"m{count - 1}")
        anna.expect("yes")
    with stage.errors(LimitExceeded):
        anna.send("many 4")
        anna.expect("LimitExceeded")
    anna.send("m3")
    anna.expect("heard 'm3'")
    for size in (2047, 2048):
        anna.send(f"long {size}")
        anna.expect(f"heard 'long {size}'")
        anna.send("r" * size)
        anna.expect("r" * size)
    with stage.errors(LimitExceeded):
        anna.send("long 2049")
        anna.expect("LimitExceeded")


def scenario_the_time_of_the_last_automatic_response_is_known(stage: Stage):  # S16
    anna = stage.connect(Beating, "anna")
    bob = stage.connect(Beating, "bob")
    anna.send("when", "ping", "when")
    anna.expect("never", "pong", "once")
    bob.send("when")
    bob.expect("never")


def scenario_rules_outlive_both_processes(stage: Stage):  # S16, S34
    anna = stage.connect(Beating, "anna")
    anna.send("rule hello=hi")
    anna.expect("heard 'rule hello=hi'")
    for crash in (stage.crash_gateway, stage.crash_host):
        crash()
        anna.send("hello", "ping")
        anna.expect("hi", "pong")
