"""SQL where turns of a room overlap, or run beside background work (S7, S19, S28): a host in the kit."""

from typing import Any, ClassVar

import pytest
import trio

from broker import Server, SqlError
from broker.testing import AsyncKit, virtual

CREATE = "CREATE TABLE IF NOT EXISTS t (name TEXT)"
INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) AS n FROM t"


class Rows(Server):
    """Notes each message in a table; background work notes more there."""

    def on_start(self) -> None:
        self.go_on = trio.Event()

    async def count(self) -> Any:
        return (await self.room.storage.sql(COUNT))[0]["n"]

    async def on_message(self, message: str, sender: Any) -> None:
        storage, what = self.room.storage, message.partition(" ")[0]
        if what == "work":
            await storage.sql(CREATE)
            self.room.start_soon(self.work, 5)
        elif what == "ask":
            self.room.start_soon(self.ask)
        elif what == "look":
            self.room.start_soon(self.look)
        elif what == "hold":
            self.room.start_soon(self.hold)
        elif what == "break":
            self.room.start_soon(self.break_off)
        elif what == "create":
            await storage.sql(CREATE)
        elif what == "go":
            self.go_on.set()
        elif what == "wait":
            await self.go_on.wait()
            await storage.sql(INSERT, message)
            sender.send(f"waited, {await self.count()}")
        elif what == "note":
            await storage.sql(INSERT, message)
            sender.send(f"noted, {await self.count()}")
        elif what == "put":
            storage.put("key", message)
            sender.send(message)
        elif what == "clear":
            storage.delete_all()
            sender.send("cleared")
        elif what == "flush":
            async with storage.transaction():
                with pytest.raises(RuntimeError, match=r"room\.flush\(\) inside of storage\.transaction"):
                    await self.room.flush()
            await storage.sql(INSERT, "flushed")
            await self.room.flush()
            await storage.sql(INSERT, "lost")
            raise ValueError(message)
        else:
            sender.send(f"{await self.count()} {await storage.get('key')}")

    async def work(self, times: int) -> None:
        for number in range(times):
            await self.room.storage.sql(INSERT, f"work {number}")
            await trio.sleep(0.01)  # other turns want the database now
            before = await self.count()
            await self.room.storage.sql(INSERT, f"more work {number}")
            assert await self.count() == before + 1
            self.room.broadcast(f"work {number}")
            await self.room.flush()
            await trio.sleep(0.01)
        self.room.broadcast("work ends")

    async def ask(self) -> None:
        for _ in range(3):
            count = await self.count()
            async with self.room.storage.transaction():
                assert await self.count() == count
            await self.go_on.wait()
        self.room.broadcast(f"asked, {await self.count()}")

    async def look(self) -> None:
        async with self.room.storage.transaction():
            await self.count()
            await trio.sleep(0.5)
        await self.go_on.wait()

    async def hold(self) -> None:
        await self.room.storage.sql(CREATE)
        await self.room.storage.sql(INSERT, "held")
        await trio.sleep(1)
        self.room.broadcast(f"held, {await self.count()}")

    async def break_off(self) -> None:
        await self.room.storage.sql(INSERT, "lost")
        await trio.sleep(0.5)
        raise ValueError("broken off")


class Waking(Server):
    """Its alarm notes itself in a table, tells everybody, and sets the next one."""

    async def on_message(self, message: str, sender: Any) -> None:
        await self.room.storage.sql(CREATE)
        self.room.storage.set_alarm(1)

    async def on_alarm(self, alarm: Any) -> None:
        await self.room.storage.sql(INSERT, alarm.name)
        rows: Any = await self.room.storage.sql(COUNT)
        self.room.broadcast(f"alarm {rows[0]['n']}")
        try:
            async with self.room.storage.transaction():
                self.room.storage.set_alarm(0, "undone")
                raise KeyError
        except KeyError:
            self.room.storage.set_alarm(1)


class Careless(Server):
    """Goes on where what its turn has executed is lost, in each of its hooks."""

    #: Of all hosts.
    seen: ClassVar[list[str]] = []

    async def lose(self, what: str) -> None:
        """A statement that undoes all comes behind one that gave something random."""
        self.room.storage.put("lost", what)
        self.seen.append(what)
        await self.room.storage.sql(CREATE)
        await self.room.storage.sql("INSERT INTO t VALUES (hex(randomblob(16))) RETURNING name")
        with pytest.raises(SqlError):
            await self.room.storage.sql("INSERT OR ROLLBACK INTO once VALUES (1)")
        with pytest.raises(SqlError, match="cannot be repeated"):
            await self.room.storage.sql(COUNT)

    async def on_connect(self, connection: Any, context: Any) -> None:
        await self.room.storage.sql("CREATE TABLE IF NOT EXISTS once (a UNIQUE)")
        await self.room.storage.sql("INSERT OR IGNORE INTO once VALUES (1)")

    async def on_message(self, message: str, sender: Any) -> None:
        if message == "alarm":
            self.room.storage.set_alarm(1)
        elif message == "work":
            self.room.start_soon(self.lose, "work")
        elif message == "look":
            sender.send(f"{await self.room.storage.get('lost')}")
        else:
            await self.lose("on_message")
            sender.send("never")

    async def on_alarm(self, alarm: Any) -> None:
        if "on_alarm" not in self.seen:
            await self.lose("on_alarm")

    async def on_close(self, connection: Any, code: int, reason: str, clean: bool) -> None:
        await self.lose("on_close")

    async def on_request(self, request: Any) -> str:
        await self.lose("on_request")
        return "never"

    async def on_error(self, connection: Any, error: BaseException) -> None:
        await self.lose("on_error")


class Overlapping(Rows):
    hibernate = False
    concurrency = "per_connection"


class Interleaving(Rows):
    hibernate = False
    concurrency = "interleave"


class Twofold(Overlapping):
    """Its background work waits for the database in one task, and flushes in another."""

    async def on_message(self, message: str, sender: Any) -> None:
        what, _, flushes = message.partition(" ")
        if what == "both":
            self.room.start_soon(self.both, flushes)
        elif what == "before":
            self.room.start_soon(self.before)
        else:
            await super().on_message(message, sender)

    async def before(self) -> None:
        await self.go_on.wait()
        with trio.move_on_after(0.3):
            await self.room.storage.sql(INSERT, "never")

    async def both(self, flushes: str) -> None:
        await self.go_on.wait()
        await trio.sleep(0.1)  # "before" comes before
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.room.storage.sql, INSERT, "both")
            await trio.sleep(0.1)  # it waits for the database now, and others wait for that
            if flushes == "put":
                self.room.storage.put("key", "both")
            elif flushes == "task":
                self.room.start_soon(self.begun)
            else:
                self.room.broadcast("said")
            await self.room.flush()
        self.room.broadcast("both end")

    async def begun(self) -> None:
        self.room.broadcast("begun")


async def until(kit: AsyncKit, client: Any, message: str) -> list[Any]:
    """Take messages up to this one."""
    await kit.wait(lambda: message in client.received, 30)
    assert message in client.received, list(client.received)
    came = [client.received.popleft()]
    while came[-1] != message:
        came.append(client.received.popleft())
    return came


@pytest.mark.parametrize("kind", [Rows, Overlapping, Interleaving])
def test_background_work_and_turns_take_turns_with_the_database(kind: type[Server]) -> None:
    """S7, S28: each flush is one commit, and lets go of the database; nothing of anybody gets lost."""

    @virtual
    async def main() -> None:
        async with AsyncKit(kind) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("work")
            for number in range(10):
                anna.send(f"note a{number}")
                bert.send(f"note b{number}")
                bert.send(f"put {number}")
            came = await until(kit, anna, "work ends")
            await kit.settle()
            came += anna.received
            assert [text for text in came if text.startswith("work")] == [
                *[f"work {number}" for number in range(5)],
                "work ends",
            ]
            noted = [text for text in [*came, *map(str, bert.received)] if text.startswith("noted")]
            counts = [int(text.partition(", ")[2]) for text in noted]
            assert (len(set(counts)), max(counts) <= 30) == (20, True)
            anna.received.clear()
            anna.send("how many")
            await anna.expect("30 put 9")

    main()


@pytest.mark.parametrize("kind", [Rows, Overlapping, Interleaving])
def test_what_a_turn_has_flushed_stays_when_it_fails(kind: type[Server]) -> None:
    """S20, S28: and a flush inside of a transaction is refused."""

    @virtual
    async def main() -> None:
        async with AsyncKit(kind) as kit:
            anna = await kit.connect("r", id="anna")
            anna.send("work")
            await until(kit, anna, "work ends")
            with kit.expect_error(ValueError):
                anna.send("flush")
                anna.send("how many")
                await anna.expect("11 None")

    main()


def test_background_work_that_only_asks_keeps_nobody_from_the_database() -> None:
    """S28: it may go on for ever."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Overlapping) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("create")
            anna.send("ask")
            await kit.settle()
            bert.send("note this")
            bert.send("put that")
            await bert.expect("noted, 1", "put that")
            anna.send("go")
            await anna.expect("asked, 1")

    main()


@pytest.mark.parametrize("at", [None, "before_commit", "after_commit"])
def test_an_alarm_with_statements_runs_once_whenever_its_host_dies(at: str | None) -> None:
    """S22, S29: the alarm is in the shard, its statements and effects in the room's own database."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Waking) as kit:
            anna = await kit.connect("r", id="anna", party="waking")
            anna.send("begin")
            await anna.expect("alarm 1")
            await kit.crash_host(at)
            for number in range(2, 6):
                await anna.expect(f"alarm {number}")
            assert not anna.received

    main()


def test_a_turn_that_goes_on_where_its_statements_are_lost_fails() -> None:
    """S20, S28: in every hook as by an exception, and its host stays."""

    @virtual
    async def main() -> None:
        Careless.seen.clear()
        async with AsyncKit(Careless) as kit:
            anna = await kit.connect("r", id="anna", party="careless")
            with kit.expect_error(SqlError, match="cannot be repeated") as errors:
                anna.send("lose")
                anna.send("work")
                await kit.settle()
                anna.send("alarm")
                await kit.advance(5)
                bert = await kit.connect("r", id="bert", party="careless")
                await bert.close()
                await kit.settle()
                answer = await kit.request("GET", kit.address("r", "careless"))
                assert answer.status == 500
            anna.send("look")
            failing = ("on_message", "work", "on_alarm", "on_close", "on_request")
            hooks = [hook for each in failing for hook in (each, "on_error")]
            await anna.expect("None")
            assert (Careless.seen, len(errors)) == (hooks, len(hooks))

    main()


def test_a_message_with_statements_waits_for_the_earlier_ones_of_its_connection() -> None:
    """S19, T3: it could not end before these do, and would keep the database from them for ever."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Interleaving) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("work")
            await until(kit, anna, "work ends")
            await until(kit, bert, "work ends")
            anna.send("wait here")
            anna.send("note this")
            await kit.settle()
            bert.send("note beside")
            await bert.expect("noted, 11")
            assert not anna.received
            bert.send("go")
            await anna.expect("waited, 12", "noted, 13")

    main()


def test_what_was_put_off_for_background_work_leaves_when_that_fails() -> None:
    """S7, S20: though nothing comes behind that, and nobody is told."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Rows) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("create")
            anna.send("break")
            await kit.advance(0.1)
            bert.send("put this")
            await kit.advance(0.1)
            assert not bert.received
            with kit.expect_error(ValueError):
                await kit.advance(0.4)  # to behind its end, and before anything that comes each second
            assert list(bert.received) == ["put this"]
            bert.send("how many")
            await bert.expect("put this", "0 put this")

    main()


@pytest.mark.parametrize("kind", [Rows, Overlapping, Interleaving])
def test_what_was_put_off_for_background_work_leaves_when_that_lets_go(kind: type[Server]) -> None:
    """S20, S28: though that goes on, has changed nothing, and nothing comes behind."""

    @virtual
    async def main() -> None:
        async with AsyncKit(kind) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("create")
            anna.send("look")
            await kit.advance(0.1)
            bert.send("put this")
            await kit.advance(0.1)
            assert not bert.received
            await kit.advance(0.4)  # to behind the transaction, and before anything that comes each second
            assert list(bert.received) == ["put this"]

    main()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("flushes", ["put", "task", "word"])
def test_who_waits_for_the_database_and_flushes_does_not_wait_for_itself(
    flushes: str, beside: bool, before: bool
) -> None:
    """S20, S28, H3: nor behind another one that gives up waiting; what was put off for it goes first."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Twofold) as kit:
            anna, bert = [await kit.connect("r", id=name, party="twofold") for name in ("anna", "bert")]
            anna.send("create")
            anna.send(f"both {flushes}")
            if before:
                anna.send("before")
            await kit.settle()
            commits = kit._machine.host._commits
            commits._ready = lambda _: False
            anna.send("put 1")
            anna.send("go")
            await kit.advance(0.15)
            if beside:
                bert.send("put 2")
            await kit.advance(1)
            assert not bert.received
            commits._ready = lambda _: True
            bert.send("put 3")  # and with it all that waits
            await until(kit, anna, "both end")
            await kit.settle()
            heard = list(bert.received)
            if flushes == "task":
                heard.remove("begun")  # work of its own
            said = ["said"] if flushes == "word" else []
            assert heard == [*(["put 2"] if beside else []), *said, "put 3", "both end"]
            bert.send("how many")
            await kit.wait(lambda: "1 put 3" in bert.received, 30)
            assert bert.received[-1] == "1 put 3"

    main()


@pytest.mark.parametrize("kind", [Rows, Overlapping, Interleaving])
def test_delete_all_goes_behind_the_work_that_has_the_database(kind: type[Server]) -> None:
    """S7, S27: it takes what that has stored, in tables and keys alike."""

    @virtual
    async def main() -> None:
        async with AsyncKit(kind) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("create")
            anna.send("hold")
            await kit.advance(0.1)
            bert.send("clear")
            await kit.advance(0.1)
            assert not bert.received
            await bert.expect("held, 1", "cleared")
            bert.send("create")
            bert.send("how many")
            await bert.expect("0 None")

    main()


def test_delete_all_waits_for_the_earlier_messages_of_its_connection() -> None:
    """S19, S27: it ends behind them, so it takes what they have stored."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Interleaving) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("create")
            anna.send("wait here")
            anna.send("clear")
            await kit.settle()
            bert.send("note beside")
            await bert.expect("noted, 1")
            bert.send("put this")
            await bert.expect("put this")
            bert.send("go")
            await anna.expect("waited, 2", "cleared")
            anna.send("create")
            anna.send("how many")
            await anna.expect("0 None")

    main()


@pytest.mark.parametrize("beside", ["nothing", "put 1"])
def test_a_gateway_dies_while_background_work_has_the_database(beside: str) -> None:
    """S7, S22: the work goes on; unless the next gateway has to be told what waits for it."""

    @virtual
    async def main() -> None:
        async with AsyncKit(Overlapping) as kit:
            anna, bert = await kit.connect("r", id="anna"), await kit.connect("r", id="bert")
            anna.send("create")
            anna.send("hold")
            await kit.advance(0.1)
            if beside == "nothing":
                await kit.crash_gateway()
                await bert.expect("held, 1")
                return
            bert.send(beside)
            await kit.settle()
            assert not bert.received
            with kit.expect_error(SqlError, match="the gateway has gone"):
                await kit.crash_gateway()
                await bert.expect(beside)
                await kit.advance(2)
            bert.send("how many")
            await bert.expect("0 put 1")

    main()
