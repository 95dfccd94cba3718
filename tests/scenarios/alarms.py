"""Alarms: rooms that are woken by time (S29)."""

from broker import HookError, LimitExceeded, Server
from tests.scenarios.driver import Stage


class Alarming(Server):
    alarms_max = 3
    alarm_tries = 2

    def shown(self, alarm):
        return alarm and [alarm.name, alarm.payload, alarm.attempt, alarm.failed]

    async def on_message(self, message, sender):
        """Carry out orders, and say each time which alarms there are then."""
        for order in message.split("; "):
            await self.carry_out(order, sender)

    async def carry_out(self, order, sender):
        verb, _, rest = order.partition(" ")
        storage = self.room.storage
        if verb == "set":
            name, seconds, *payload = rest.split(" ", 2)
            storage.set_alarm(float(seconds), name, payload=payload)
        elif verb == "undone":
            storage.set_alarm(0, "undone")
            raise ValueError("undone")
        elif verb == "delete":
            sender.send([await storage.delete_alarm(rest), await storage.delete_alarm(rest)])
        elif verb == "clear":
            storage.delete_all()
        sender.send([self.shown(each) for each in await storage.list_alarms()])

    async def on_alarm(self, alarm):
        if alarm.name.startswith("fail"):
            self.room.storage.put("lost", True)
            raise OSError(f"{alarm.name} {alarm.attempt}")
        runs = 1 + await self.room.storage.get(f"runs of {alarm.name}", 0)
        self.room.storage.put(f"runs of {alarm.name}", runs)
        if alarm.name.startswith("tick") and runs < 3:
            self.room.storage.set_alarm(0.05, alarm.name, payload=alarm.payload)
        self.room.broadcast(["alarm", *self.shown(alarm), runs, await self.room.storage.get("lost")])

    def on_error(self, connection, error):
        self.room.broadcast([connection and connection.id, str(error)])


def scenario_an_alarm_wakes_a_cold_room(stage: Stage):  # S2, S29
    anna = stage.connect(Alarming, "anna")
    anna.send("set wäcker 0.5 über morgen")
    anna.expect([["wäcker", ["über morgen"], 1, False]])
    assert stage.asleep(Alarming) >= 1
    anna.expect(["alarm", "wäcker", ["über morgen"], 1, False, 1, None])
    stage.asleep(Alarming)
    anna.send("look")
    anna.expect([])


def scenario_alarms_have_names_and_come_in_the_order_of_their_times(stage: Stage):  # S29
    anna = stage.connect(Alarming, "anna")
    # In one turn: so none of them is due before all are set, however long that takes.
    anna.send("set b 0.4 later; set a 900 first; set c 900; set a 0.2 sooner; delete c")
    anna.expect([["b", ["later"], 1, False]])
    assert [len(anna.receive_json()) for _ in range(3)] == [2, 3, 3]
    anna.expect([True, False])
    anna.receive()
    anna.expect(["alarm", "a", ["sooner"], 1, False, 1, None], ["alarm", "b", ["later"], 1, False, 1, None])


def scenario_an_alarm_that_sets_itself_again_ticks(stage: Stage):  # S29
    anna = stage.connect(Alarming, "anna")
    anna.send("set tick 0.05 tock")
    anna.receive()
    for run in (1, 2, 3):
        anna.expect(["alarm", "tick", ["tock"], 1, False, run, None])
    anna.send("look")
    anna.expect([])


def scenario_a_turn_that_fails_sets_no_alarm(stage: Stage):  # S20, S29
    anna = stage.connect(Alarming, "anna")
    with stage.errors(ValueError):
        anna.send("undone")
        anna.expect(["anna", "undone"])
    anna.send("look")
    anna.expect([])


def scenario_an_alarm_that_fails_is_run_again_and_then_kept(stage: Stage):  # S29
    anna = stage.connect(Alarming, "anna")
    with stage.errors(OSError, OSError):
        anna.send("set fail 0")
        anna.expect([["fail", [], 1, False]], [None, "fail 1"], [None, "fail 2"])
    anna.send("look", "set ok 0")
    anna.expect([["fail", [], 2, True]])
    assert len(anna.receive_json()) == 2
    anna.expect(["alarm", "ok", [], 1, False, 1, None])  # and nothing of the failed turns is there


def scenario_a_room_has_so_many_alarms(stage: Stage):  # S27, S29
    anna = stage.connect(Alarming, "anna")
    anna.send("set a 900", "set b 900", "set c 900", "set b 901")
    assert [len(anna.receive_json()) for _ in range(4)] == [1, 2, 3, 3]
    with stage.errors(LimitExceeded):
        anna.send("set d 900")
        assert anna.receive_json()[0] == "anna"
    anna.send("clear")
    anna.expect([])


class Alarmless(Server):
    def on_message(self, message, sender):
        try:
            self.room.storage.set_alarm(1)
        except HookError as error:
            sender.send("on_alarm" in str(error))


def scenario_who_has_no_hook_for_alarms_sets_none(stage: Stage):  # S29
    anna = stage.connect(Alarmless, "anna")
    anna.send("set")
    anna.expect(True)
