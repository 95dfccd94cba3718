"""What a room keeps: keys, values and tables, all or nothing with its turn (S27, S28)."""

from datetime import UTC, date, datetime

from broker import Server, SqlError, StorageLimitError
from tests.scenarios.driver import Stage

VALUES = {
    "none": None,
    "int": -(2**70),
    "float": 0.1,
    "text": "ä\0☃",
    "bytes": b"\0\xff",
    "when": datetime(2030, 1, 2, 3, 4, 5, 678900, tzinfo=UTC),
    "day": date(2030, 1, 2),
    "set": {1, "a", (2, 3)},
    "deep": {"list": [1, [2, [3, {}]]], 4: "four"},
}


class Keeping(Server):
    async def on_message(self, message, sender):
        storage = self.room.storage
        if message == "values":
            storage.put(VALUES)
            assert await storage.get(list(VALUES)) == VALUES
        elif message == "same":
            sender.send(await storage.get([*VALUES, "missing"]) == VALUES)
        elif message == "fill":
            storage.put({f"k{number}": number for number in range(5)})
            storage.put("ä", "last")
        elif message == "lists":
            for options in (
                {},
                {"start": "k1", "end": "k3"},
                {"start_after": "k1", "limit": 2},
                {"prefix": "k", "reverse": True, "limit": 2},
                {"start": "zz"},
            ):
                sender.send([*(await storage.list(**options)).items()])
        elif message == "delete":
            storage.put("new", 1)
            sender.send([await storage.delete("k0"), await storage.delete("k0"), await storage.delete("new")])
            sender.send(await storage.delete(["k1", "k2", "missing"]))
            sender.send([*await storage.list(prefix="k")])
        elif message == "clear":
            storage.delete_all()
            storage.put("after", True)
            sender.send([*await storage.list()])
        elif message == "fail":
            storage.delete_all()
            storage.put("wrong", True)
            raise ValueError("undone")
        else:
            sender.send([*(await storage.list()).items()])


def scenario_values_come_back_as_they_were(stage: Stage):  # S27
    anna = stage.connect(Keeping, "anna")
    anna.send("values", "same")
    anna.expect(True)
    stage.asleep(Keeping)
    anna.send("same")
    anna.expect(True)


def scenario_keys_are_listed_in_the_order_of_their_bytes(stage: Stage):  # S27
    anna = stage.connect(Keeping, "anna")
    anna.send("fill", "lists")
    every = [["k0", 0], ["k1", 1], ["k2", 2], ["k3", 3], ["k4", 4], ["ä", "last"]]
    anna.expect(every, every[1:3], every[2:4], [every[4], every[3]], every[5:])
    anna.send("delete", "look")
    anna.expect([True, False, True], 2, ["k3", "k4"], every[3:])


def scenario_a_turn_that_fails_has_stored_nothing(stage: Stage):  # S20, S27
    anna = stage.connect(Keeping, "anna")
    anna.send("fill")
    with stage.errors(ValueError):
        anna.send("fail", "look")
        assert len(anna.receive_json()) == 6
    anna.send("clear", "look")
    anna.expect(["after"], [["after", True]])


def scenario_rooms_have_storage_of_their_own(stage: Stage):  # S1, S27
    anna = stage.connect(Keeping, "anna", room="one")
    bob = stage.connect(Keeping, "anna+2", room="two")
    anna.send("fill")
    bob.send("look")
    bob.expect([])
    anna.send("look")
    assert len(anna.receive_json()) == 6


class Bounds(Server):
    async def on_message(self, message, sender):
        what, _, size = message.partition(" ")
        try:
            if what == "key":
                self.room.storage.put("k" * int(size), 1)
            else:
                self.room.storage.put("value", b"v" * (int(size) - 5))
        except StorageLimitError as error:
            sender.send(f"no: {error}"[:2])
        else:
            sender.send("yes")


def scenario_bounds_of_keys_and_values(stage: Stage):  # S27
    anna = stage.connect(Bounds, "anna")
    for message, answer in (
        ("key 2047", "yes"),
        ("key 2048", "yes"),
        ("key 2049", "no"),
        ("value 2097151", "yes"),
        ("value 2097152", "yes"),
        ("value 2097153", "no"),
    ):
        anna.send(message)
        anna.expect(answer)


class Tables(Server):
    """Points in a table of its own, beside a key that counts them."""

    async def on_message(self, message, sender):
        verb, _, rest = message.partition(" ")
        storage = self.room.storage
        await storage.sql("CREATE TABLE IF NOT EXISTS points (name TEXT PRIMARY KEY, best INTEGER)")
        if verb == "add":
            name, points = rest.split()
            await storage.sql(
                "INSERT INTO points VALUES (?1, ?2) ON CONFLICT DO UPDATE SET best = max(best, ?2)",
                name,
                int(points),
            )
            storage.put("added", 1 + await storage.get("added", 0))
        elif verb == "fail":
            await storage.sql("DELETE FROM points")
            storage.put("added", -1)
            raise ValueError("undone")
        elif verb == "inner":
            try:
                async with storage.transaction():
                    await storage.sql("DELETE FROM points")
                    storage.put("added", -1)
                    async with storage.transaction():
                        storage.put("inner", True)
                    raise KeyError("only this")
            except KeyError:
                storage.put("caught", True)
        elif verb == "wrong":
            try:
                await storage.sql(rest)
            except SqlError:
                sender.send("refused")
        rows = await storage.sql("SELECT name, best FROM points ORDER BY best DESC")
        sender.send([rows, await storage.list()])


def scenario_a_room_has_tables_of_its_own(stage: Stage):  # S28
    anna = stage.connect(Tables, "anna")
    anna.send("add ä 5", "add b 7", "add ä 6")
    rows = [{"name": "b", "best": 7}, {"name": "ä", "best": 6}]
    anna.expect([[{"name": "ä", "best": 5}], {"added": 1}])
    anna.expect([[{"name": "b", "best": 7}, {"name": "ä", "best": 5}], {"added": 2}])
    anna.expect([rows, {"added": 3}])
    stage.asleep(Tables)
    other = stage.connect(Tables, "anna+2", room="other")
    other.send("look")
    other.expect([[], {}])
    anna.send("look")
    anna.expect([rows, {"added": 3}])


def scenario_statements_are_undone_with_their_turn_or_their_transaction(stage: Stage):  # S20, S28
    anna = stage.connect(Tables, "anna")
    anna.send("add a 1")
    anna.expect([[{"name": "a", "best": 1}], {"added": 1}])
    with stage.errors(ValueError):
        anna.send("fail", "look")
        anna.expect([[{"name": "a", "best": 1}], {"added": 1}])
    anna.send("inner")
    anna.expect([[{"name": "a", "best": 1}], {"added": 1, "caught": True}])
    for statement in ("SELECT nonsense", "COMMIT", "ATTACH 'x' AS y", "SELECT 1; SELECT 2"):
        anna.send(f"wrong {statement}")
        anna.expect("refused", [[{"name": "a", "best": 1}], {"added": 1, "caught": True}])
