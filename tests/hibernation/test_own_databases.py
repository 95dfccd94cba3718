"""Rooms with a database of their own in group commit (S22, S27, S28): what leaves when, what a death leaves.

The writer is a fake that finishes a job when the test says so; shards and databases are real.
"""

import shutil
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from cbor2 import loads
from hypothesis import given, settings
from hypothesis import strategies as st

import hibernation.commits
import storage.database
import storage.room_databases
from hibernation import wire
from hibernation.cells import Batch, Cell, Kind
from hibernation.commits import Commits
from hibernation.errors import LimitExceeded, RoomGone
from hibernation.party import make_parties
from hibernation.room import Room
from hibernation.room_storage import TRANSACTIONS_MAX, Storage, settle
from hibernation.settings import Settings
from hibernation.staging import Beside, Turn
from storage.alarms import BEFORE_ALL, AlarmRow, AlarmTable
from storage.errors import (
    BrokerError,
    CommitRefused,
    CommitUnknown,
    DatabaseDamaged,
    DataDirectoryError,
    GenerationPassed,
    SqlError,
)
from storage.room_database import RoomDatabase, database_path
from storage.room_databases import RoomDatabases
from storage.shards import Shard, ShardBatch
from tests.hibernation.test_commits import FakeWriter, Main
from tests.hibernation.test_room import select

SHARDS = 2
CREATE = "CREATE TABLE IF NOT EXISTS t (name TEXT)"
INSERT = "INSERT INTO t VALUES (?)"
NAMES = "SELECT name FROM t ORDER BY rowid"

Steps = Callable[[Storage], Awaitable[Any]]


class World:
    """What a host has of it: shards, databases, commits, rooms. It is their backstage, too."""

    def __init__(
        self, folder: Path, *, inline: bool = False, open_max: int | None = None, reads: bool = True
    ):
        durability: Any = "os" if inline else "full"
        self.folder = folder
        self.shards = {index: Shard(folder, index, durability=durability) for index in range(SHARDS)}
        self.databases = RoomDatabases(
            folder,
            self.shards,
            lambda key: wire.partition_of(key) % SHARDS,
            durability=durability,
            open_max=open_max,
        )
        self.writer = FakeWriter()
        #: Numbers of the rows that have left, and the results in them.
        self.left: list[tuple[int, int]] = []
        self.names: list[str] = []
        self.damaged: list[Path] = []
        self.commits = Commits(
            self.shards,
            SHARDS,
            self.writer,  # type: ignore[arg-type]
            inline,
            self._released,
            databases=self.databases,
        )
        self.own_databases = self.databases.own
        (party,) = make_parties([Main])
        self._kind = Kind(party, Settings())
        self.cells: dict[str, Cell] = {}
        for index, rows in self.databases.recover(lambda path, _: self.damaged.append(path)).items():
            for number, items in rows:
                self._row(index, number, items)

    def _row(self, shard: int, number: int, items: bytes) -> None:
        self.left.append((shard, number))
        self.names += [name for _, name, *_ in loads(items)]

    def _released(self, batch: Batch) -> None:
        for shard, rows in batch.rows.items():
            for number, items in rows:
                self._row(shard, number, items)
        self.names += [name for _, name, *_ in batch.late]

    # --- As a backstage

    def read(self, key: str, name: str) -> bytes | None:
        return self.commits.file_of(key).get(key, name)

    def read_many(self, key: str, names: Any) -> dict[str, bytes]:
        return self.commits.file_of(key).get_many(key, names)

    def read_range(self, key: str, **bounds: Any) -> Any:
        return self.commits.file_of(key).list(key, **bounds)

    def open_database(self, key: str) -> None:
        self.databases.get(key)

    async def own_database(self, key: str, turn: Turn) -> RoomDatabase:
        return await self.commits.own_database(self.cells[key], turn)

    async def database_to_clear(self, key: str, turn: Turn) -> RoomDatabase | None:
        return await self.commits.database_to_clear(self.cells[key], turn)

    # --- As a host

    def cell(self, room: str) -> Cell:
        key = f"main/{room}"
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell(key, self._kind)
        backstage: Any = self
        cell.room = Room(backstage, key, Settings(), {}, cell.connections, cell.pending)
        cell.room._pending_cleared = cell.pending_cleared
        return cell

    async def turn(self, room: str, name: str, steps: Steps) -> Any:
        """One turn, from its beginning to its end; what an exception in it leaves is nothing."""
        cell = self.cell(room)
        assert cell.room is not None
        turn = cell.room._begin()
        try:
            result = await steps(cell.room.storage)
            await settle(turn)
        except BaseException:
            cell.room._discard()
            raise
        self.finish(cell, turn, name)
        return result

    def finish(self, cell: Cell, turn: Turn, name: str) -> None:
        turn.room = None
        if turn.stored:
            self.commits.stage(cell, turn)
        if cell.gate:
            self.commits.hold(cell, [wire.EFFECTS, name, []], [])
        else:
            self.names.append(name)

    def do(self, room: str, name: str, steps: Steps) -> Any:
        """A turn, and its commit."""

        async def main() -> Any:
            with trio.fail_after(20):
                return await self.turn(room, name, steps)

        result = trio.run(main)
        self.settle()
        return result

    def settle(self) -> None:
        """Commit until nothing is left to be committed."""
        self.commits.end_round()
        while self.writer.jobs:
            self.writer.finish()
            self.commits.completed()
            self.commits.end_round()

    def executed(self) -> None:
        """The gateway has executed whatever has left."""
        for shard, number in self.left:
            self.commits.executed(shard, number)

    def tidy(self) -> None:
        self.commits.tidy()
        while self.writer.jobs:
            self.writer.finish()
            self.commits.completed()

    def stored(self, room: str) -> tuple[dict[str, Any], list[str]]:
        """The room's keys and values, and the names in its table."""

        async def look(storage: Storage) -> Any:
            keys = await storage.list()
            if f"main/{room}" not in self.databases.own:
                return keys, []
            there = await storage.sql("SELECT 1 AS yes FROM sqlite_schema WHERE name = 't'")
            return keys, [row["name"] for row in await storage.sql(NAMES)] if there else []

        found: tuple[dict[str, Any], list[str]] = self.do(room, "look", look)
        self.names.remove("look")
        return found

    def close(self) -> None:
        self.databases.close()
        for shard in self.shards.values():
            shard.close()


@pytest.fixture(params=[False, True], ids=["full", "os"])
def inline(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def world(tmp_path: Path, inline: bool) -> Iterator[World]:
    hibernation.commits.log.disabled = True  # type: ignore[attr-defined]
    made = World(tmp_path, inline=inline)
    yield made
    made.close()


def add(*names: str, **entries: Any) -> Steps:
    """Add names to the table, and write entries."""

    async def steps(storage: Storage) -> None:
        await storage.sql(CREATE)
        for name in names:
            await storage.sql(INSERT, name)
        for key, value in entries.items():
            storage.put(key, value)

    return steps


def put(**entries: Any) -> Steps:
    async def steps(storage: Storage) -> None:
        storage.put(entries)

    return steps


# What leaves when


def test_rows_of_one_shard_leave_in_the_order_of_their_numbers(world: World) -> None:
    """S22, H3: whichever files they are in; and each room's in the order of its turns."""
    rooms = [f"r{number}" for number in range(12)]
    for room in rooms[::2]:
        world.do(room, f"{room} moves", add("first"))

    async def main() -> None:
        for number in range(2):
            for room in rooms[:8]:
                await world.turn(room, f"{room} {number}", put(key=number))
        for room in rooms[4:]:
            if not world.cell(room).gate:
                await world.turn(room, f"{room} sql", add("second"))

    trio.run(main)
    world.settle()
    for shard in range(SHARDS):
        numbers = [number for of, number in world.left if of == shard]
        assert numbers == sorted(set(numbers))
    for room in rooms[:8:2]:
        assert [name for name in world.names if name.startswith(f"{room} ")] == [
            f"{room} moves",
            f"{room} 0",
            f"{room} 1",
        ]
    assert world.stored("r0") == ({"key": 1}, ["first"])
    assert world.stored("r10") == ({}, ["first", "second"])


def test_the_next_turn_with_statements_waits_until_the_former_is_on_disk(world: World) -> None:
    """S22: and one without does not."""

    async def main() -> None:
        with trio.fail_after(20):
            await world.turn("r", "one", add("a"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.turn, "r", "two", add("b"))
                await trio.testing.wait_all_tasks_blocked()
                assert (world.names, world.cells["main/r"].gate != 0) == ([], True)
                await world.turn("other", "other", put(key=1))
                world.settle()
                assert sorted(world.names) == ["one", "other"]
        world.settle()

    trio.run(main)
    assert world.names[-1] == "two"
    assert world.stored("r") == ({}, ["a", "b"])


def test_turns_without_statements_that_end_while_another_has_the_database_are_put_off(world: World) -> None:
    """S20, H3: nothing of a turn that is under way is committed with them, and nothing of them is lost."""
    world.do("r", "moves", add("first"))

    async def main(fails: bool) -> None:
        cell = world.cell("r")
        room = cell.room
        assert room is not None
        turn = room._begin()
        await room.storage.sql(INSERT, f"long {fails}")
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - its turn is another task's
            nursery.start_soon(world.turn, "r", f"short {fails}", put(key=fails))
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - its turn is another task's
            nursery.start_soon(world.turn, "r", f"reads {fails}", lambda storage: storage.get("key"))
        seen: list[Any] = []
        world.commits.after(cell, lambda: seen.append(world.names[-1]))
        world.settle()
        assert (f"short {fails}" in world.names, seen) == (False, [])
        cell.room = room
        if fails:
            room._discard()
        else:
            world.finish(cell, turn, f"long {fails}")
        world.settle()
        assert len(seen) == 1

    trio.run(main, False)
    assert world.names == ["moves", "short False", "reads False", "long False"]
    assert world.stored("r") == ({"key": False}, ["first", "long False"])
    trio.run(main, True)
    assert world.names[4:] == ["short True", "reads True"]
    assert world.stored("r") == ({"key": True}, ["first", "long False"])


def test_a_turn_that_only_asks_waits_for_no_commit(world: World) -> None:
    """S20: nor does one whose statements change nothing, before or after the room has moved."""

    async def ask(storage: Storage) -> Any:
        return await storage.sql("SELECT 1 AS one")

    async def change_nothing(storage: Storage) -> None:
        await storage.sql(CREATE)
        await storage.sql("DELETE FROM t WHERE name = 'nobody'")

    assert world.do("r", "asks", ask) == [{"one": 1}]
    assert not world.databases.own
    world.do("r", "moves", add("a"))
    commits = world.commits.count
    assert world.do("r", "asks", ask) == [{"one": 1}]
    world.do("r", "changes nothing", change_nothing)
    assert world.commits.count == commits
    assert world.names == ["asks", "moves", "asks", "changes nothing"]


def test_what_could_not_be_committed_before_a_gateway_went_is_kept(world: World) -> None:
    """S22, H8: an object in memory may know what it did; of turns under way nothing has been."""
    world.do("r", "moves", add("a"))
    world.commits._ready = lambda _: False

    async def main() -> None:
        await world.turn("r", "waits", add("b", key=1))
        cell = world.cell("other")
        assert cell.room is not None
        cell.room._begin()
        await cell.room.storage.sql(CREATE)

    trio.run(main)
    world.commits.abandon_turns()
    world.commits.forget()
    unsaid = world.commits.newest
    world.settle()
    assert (world.names, world.commits.has_ended(unsaid)) == (["moves"], False)
    world.commits._ready = lambda _: True
    world.settle()
    assert (world.names, world.commits.has_ended(unsaid)) == (["moves", "waits"], True)
    assert world.stored("r") == ({"key": 1}, ["a", "b"])
    world.do("other", "again", add("c"))
    assert world.stored("other") == ({}, ["c"])


def test_background_work_keeps_the_database_when_the_gateway_goes(world: World) -> None:
    """S22: unless a turn that has ended waits for that, of which the next gateway has to be told first."""
    world.do("r", "moves", add("first"))
    outcomes: list[str] = []

    async def main(beside: str) -> None:
        room = world.cell("r").room
        assert room is not None
        work = room._begin(Beside)
        await room.storage.sql(INSERT, f"work {beside}")
        if beside:
            async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - its turn is another task's
                nursery.start_soon(world.turn, "r", beside, put(key=beside))
        world.commits.after(world.cells["main/r"], lambda: outcomes.append("not lasting"))
        world.commits.after(world.cells["main/r"], lambda: outcomes.append("lasting"), lasting=True)
        outcomes.clear()
        world.commits.forget()
        world.commits.abandon_turns()
        world.settle()
        world.cells["main/r"].room = room
        if beside:
            assert (world.names[-1], outcomes) == (beside, ["lasting"])
            for step in (room.flush, lambda: room.storage.sql(INSERT, "more")):
                with pytest.raises(SqlError, match="the gateway has gone"):
                    await step()
            with pytest.raises(SqlError, match="the gateway has gone"):
                work.check()
            room._discard()
        else:
            work.check()
            world.finish(world.cells["main/r"], work, "work ends")
        world.settle()

    trio.run(main, "")
    assert world.stored("r") == ({}, ["first", "work "])
    trio.run(main, "turn")
    assert world.stored("r") == ({"key": "turn"}, ["first", "work "])


def test_a_turn_that_must_be_stored_does_not_commit_what_another_one_has_executed(world: World) -> None:
    """S7, S23: one that begins background work, or gives up a message, and has written nothing."""
    world.do("r", "moves", add("first"))
    begun: list[str] = []

    async def main() -> None:
        cell = world.cell("r")
        room = cell.room
        assert room is not None
        turn = room._begin()
        await room.storage.sql(INSERT, "half")
        world.commits.must_store(cell)
        world.commits.hold(cell, [wire.EFFECTS, "asks for work", []], [])
        world.commits.after(cell, lambda: begun.append("work"), lasting=True)
        world.commits.blaming_of(cell).release(["main/r"])
        world.commits.hold(cell, [wire.EFFECTS, "gives up", []], [])
        world.settle()
        assert (world.names, begun) == (["moves"], [])
        assert world.databases.get("main/r")._file.read("SELECT name FROM t") == [("first",)]
        world.finish(cell, turn, "ends")
        world.settle()

    trio.run(main)
    assert (world.names, begun) == (["moves", "asks for work", "gives up", "ends"], ["work"])
    assert world.stored("r") == ({}, ["first", "half"])


def test_only_the_turn_that_has_the_database_waits_for_nothing_that_waits_for_it(world: World) -> None:
    world.do("r", "moves", add("first"))

    async def main() -> None:
        cell = world.cell("r")
        room = cell.room
        assert room is not None
        turn = room._begin()
        await room.storage.sql(INSERT, "long")
        assert not world.commits.holds_up(cell, turn)
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - its turn is another task's
            nursery.start_soon(world.turn, "r", "short", put(key=1))
        assert world.commits.holds_up(cell, turn)
        assert not world.commits.holds_up(cell, Turn(room))
        room._discard()
        assert not world.commits.holds_up(cell, turn)

    trio.run(main)


def test_a_clean_end_takes_executed_rows_and_nothing_of_a_turn_that_was_cancelled(world: World) -> None:
    """S22, S32: that one runs again, elsewhere."""
    world.do("r", "moves", add("a"))
    world.executed()

    async def main() -> None:
        cell = world.cell("r")
        assert cell.room is not None
        cell.room._begin()
        await cell.room.storage.sql(INSERT, "half done")

    trio.run(main)
    world.commits.close()
    database = world.databases.get("main/r")
    assert database.rows() == []
    assert database._file.read("SELECT name FROM t") == [("a",)]


def test_a_clean_end_leaves_what_nobody_has_executed_to_the_next_start(tmp_path: Path) -> None:
    """S22, Q2: the next host finds the row, and that the shard is to be told of the room."""
    world = World(tmp_path)
    world.do("r", "moves", add("a", key=1))
    world.close()
    world = World(tmp_path)
    assert world.names == ["moves"]
    world.names.clear()
    assert (world.stored("r"), world.shards[world.commits.shard_of("main/r")].get("main/r", "key")) == (
        ({"key": 1}, ["a"]),
        None,
    )
    world.executed()
    world.tidy()
    world.close()
    assert not list(database_path(tmp_path, 0, "main/r").parent.parent.rglob("*-wal"))
    world = World(tmp_path)
    assert world.names == []
    world.close()


def alarm(name: str, due_ms: int | None) -> Steps:
    """Set an alarm, or delete it, beside a statement."""

    async def steps(storage: Storage) -> None:
        await storage.sql(CREATE)
        row = None if due_ms is None else AlarmRow(name, 1, due_ms, due_ms, b"payload")
        storage._room._staging().set_alarm(name, row)

    return steps


def test_alarms_of_a_room_with_its_own_database_are_in_its_shard(world: World) -> None:
    """S29: with the commit of their turn; and who follows them is told when they are there."""
    told: list[Any] = []
    index = world.commits.shard_of("main/r")
    table = AlarmTable(world.shards[index].read)
    world.commits.alarms_stored = lambda shard, due_ms: told.append(
        (shard, due_ms, table.count_of_room("main/r"))
    )
    world.do("r", "moves", add("a"))
    world.do("r", "sets", alarm("first", 5))
    world.do("r", "sets", alarm("second", 3))
    assert told == [(index, 5, 1), (index, 3, 2)]
    world.do("r", "deletes", alarm("first", None))
    assert [row.name for row in table.due_after(BEFORE_ALL, 9)] == ["second"]

    async def clear(storage: Storage) -> None:
        storage.delete_all()
        storage._room._staging().set_alarm("third", AlarmRow("third", 1, 7, 7, None))

    world.do("r", "clears", clear)
    assert list(table.of_room("main/r")) == ["third"]


@pytest.mark.parametrize("moves", [False, True])
def test_a_host_dies_between_a_rooms_commit_and_its_alarms(tmp_path: Path, moves: bool) -> None:
    """S22, S29, Q5: the next one brings the alarms to the shard, and lets the effects leave."""
    world = World(tmp_path)
    if not moves:
        world.do("r", "moves", alarm("done", 4))
    index = world.commits.shard_of("main/r")
    commit = world.shards[index].commit

    def refuse(batch: ShardBatch, *rest: Any) -> None:
        if batch.alarms:
            raise CommitRefused(world.shards[index].path, "no", "Wait")
        commit(batch, *rest)

    world.shards[index].commit = refuse  # type: ignore[method-assign, assignment]

    async def runs(storage: Storage) -> None:
        await storage.sql(CREATE)
        await storage.sql(INSERT, "ran")
        storage._room._staging().set_alarm("done", None)
        storage._room._staging().set_alarm("next", AlarmRow("next", 2, 9, 9, b"x", 1, 0, "why"))

    world.do("r", "runs", runs)
    assert "runs" not in world.names
    assert "next" not in AlarmTable(world.shards[index].read).of_room("main/r")
    world.close()
    world = World(tmp_path)
    assert world.names[-1] == "runs"
    assert AlarmTable(world.shards[index].read).of_room("main/r") == {
        "next": AlarmRow("next", 2, 9, 9, b"x", 1, 0, "why")
    }
    assert world.stored("r") == ({}, ["ran"])
    world.do("r", "deletes", alarm("next", None))
    world.close()
    world = World(tmp_path)
    assert not AlarmTable(world.shards[index].read).of_room("main/r")
    world.close()


# Disks


@pytest.mark.parametrize("when", ["before the start", "while it is closed"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_room_whose_file_cannot_be_opened_costs_nobody_else_anything(
    tmp_path: Path, inline: bool, when: str, how: str, monkeypatch: Any
) -> None:
    """S29, S36: its alarms end and what it says leaves, with the commits of all others."""
    world = World(tmp_path, inline=inline)
    world.do("r", "moves", add("a", key=1))
    alarm = AlarmRow("wake", 1, 1000, 1000, b"")

    async def stage_alarm(row: AlarmRow | None, name: str, **entries: Any) -> None:
        cell = world.cell("r")
        assert cell.room is not None
        turn = cell.room._begin()
        turn.set_alarm("wake", row)
        for key, value in entries.items():
            turn.write(key, value)
        await world.turn("other", f"other {name}", put(name=name))
        world.finish(cell, turn, name)

    trio.run(stage_alarm, alarm, "sets")
    world.settle()
    path = world.databases.get("main/r").path
    world.executed()
    world.tidy()
    if when == "before the start":
        world.close()
    else:
        monkeypatch.setattr(storage.room_databases, "IDLE_SECONDS", 0.0)
        world.tidy()
        world.tidy()
    assert not world.databases.are_open()
    content = path.read_bytes()
    path.unlink()
    if how == "damaged":
        path.write_bytes(bytes(100) + content[100:])
    if when == "before the start":
        world = World(tmp_path, inline=inline)
    shard = world.shards[world.commits.shard_of("main/r")]
    table = AlarmTable(shard.read)
    assert list(table.of_room("main/r")) == ["wake"]
    world.names.clear()
    trio.run(stage_alarm, None, "ends")
    world.commits.must_store(world.cell("r"))
    world.commits.hold(world.cell("r"), [wire.EFFECTS, "says", []], [])
    world.settle()
    assert sorted(world.names) == ["ends", "other ends", "says"]
    assert not table.of_room("main/r")
    # Entries never go to the shard, not even of a turn that could still open the file when it wrote them.
    with pytest.raises(DataDirectoryError, match=str(path)):
        trio.run(partial(stage_alarm, None, "writes", key=b"2"))
    world.settle()
    assert shard.list("main/r") == []
    # When the file is back all of it is there, and goes on there.
    path.write_bytes(content)
    world.do("r", "again", put(more=3))
    assert world.stored("r") == ({"key": 1, "more": 3}, ["a"])
    assert shard.list("main/r") == []
    # It does not bring back the alarm that it has noted.
    batch = ShardBatch()
    world.databases.get("main/r").tell_alarms(batch)
    assert not batch.alarms
    world.close()


def test_a_file_that_comes_back_while_the_shard_has_results_of_its_room(
    world: World, monkeypatch: Any
) -> None:
    """H2, H3: what only asks it then leaves behind them, and with the same commit."""
    monkeypatch.setattr(storage.room_databases, "IDLE_SECONDS", 0.0)
    world.do("r", "moves", add("a", key=1))
    path = world.databases.get("main/r").path
    world.executed()
    for _ in range(3):
        world.tidy()
    assert not world.databases.are_open()
    aside = path.with_suffix(".aside")
    path.rename(aside)
    cell = world.cell("r")
    world.commits.must_store(cell)
    world.commits.hold(cell, [wire.EFFECTS, "says", []], [])
    aside.rename(path)

    async def main() -> None:
        with trio.fail_after(20):
            await world.turn("r", "asks", lambda storage: storage.sql(NAMES))
            await world.turn("r", "asks again", lambda storage: storage.get("key"))

    trio.run(main)
    assert world.names == ["moves"]
    world.settle()
    assert world.names == ["moves", "says", "asks", "asks again"]
    assert [number for _, number in world.left] == sorted({number for _, number in world.left})
    assert world.stored("r") == ({"key": 1}, ["a"])


@pytest.mark.parametrize("undone", [False, True])
def test_a_refused_commit_is_kept_and_tried_again(world: World, monkeypatch: Any, undone: bool) -> None:
    """S36: nothing of it leaves meanwhile; where SQLite has undone the statements they are executed again."""
    world.do("r", "moves", add("a", before=1))
    database = world.databases.get("main/r")

    async def main() -> None:
        await world.turn("r", "waits", add("b", large="x" * 1_000_000))
        await world.turn("r", "reads", lambda storage: storage.get("large"))

    with monkeypatch.context() as patch:
        if undone:
            pages = database._file.read("PRAGMA page_count")[0][0]
            patch.setattr(
                database,
                "_allow_pages",
                lambda _: database._file.writer.execute(f"PRAGMA max_page_count = {pages}").fetchall(),
            )
        else:
            patch.setattr(database._file, "reserve_bytes", 1 << 60)
        trio.run(main)
        world.settle()
        for _ in range(2):
            assert world.commits.paused is not None
            assert world.names == ["moves"]
            world.commits.retry()
            world.settle()
        assert database._file.writer.in_transaction is not undone
    world.commits.retry()
    world.settle()
    assert (world.commits.paused, world.names) == (None, ["moves", "waits", "reads"])
    keys, names = world.stored("r")
    assert (sorted(keys), names) == (["before", "large"], ["a", "b"])


def test_statements_that_give_something_else_the_second_time_are_not_committed(world: World) -> None:
    """S22: room code may have told others what they gave; whoever runs the turn again does it anew."""
    world.do("r", "moves", add("a"))
    database = world.databases.get("main/r")

    async def steps(storage: Storage) -> None:
        await storage.sql("INSERT INTO t VALUES (hex(randomblob(8))) RETURNING name")

    async def main() -> None:
        await world.turn("r", "random", steps)

    trio.run(main)
    database._file.writer.execute("ROLLBACK")
    with pytest.raises(CommitUnknown, match="another result"):
        database.commit(ShardBatch())
    database.undo()
    assert database._file.read("SELECT name FROM t") == [("a",)]


def test_a_host_that_was_replaced_commits_nothing(world: World) -> None:
    """S5: neither when its shard has been opened again, nor when the file has been written by another."""
    world.do("r", "moves", add("a"))
    database = world.databases.get("main/r")
    shard = database.shard
    shard.generation -= 1
    with pytest.raises(GenerationPassed):
        database.commit(ShardBatch(), [(shard.next_row(), b"")])
    shard.require_generation = lambda: None  # type: ignore[method-assign]
    with pytest.raises(GenerationPassed):
        database.commit(ShardBatch(), [(shard.next_row(), b"")])
    assert len(database.rows()) == 1


@pytest.mark.parametrize("error", [CommitRefused, DataDirectoryError, CommitUnknown])
def test_what_cannot_be_looked_at_now_ends_the_start(tmp_path: Path, monkeypatch: Any, error: Any) -> None:
    """S22, S36: what it has committed has happened, and is not passed over as if it were damaged."""
    world = World(tmp_path)
    world.do("r", "moves", add("a"))
    path = world.databases.get("main/r").path
    left = list(world.left)
    world.close()  # nobody has executed its row: the log stays
    shards = {index: Shard(tmp_path, index, durability="full") for index in range(SHARDS)}
    databases = RoomDatabases(
        tmp_path, shards, lambda key: wire.partition_of(key) % SHARDS, durability="full"
    )
    with monkeypatch.context() as patch:
        remedy = () if error is CommitUnknown else ("Wait",)

        def fails(_: object) -> None:
            raise error(path, "not now", *remedy)

        patch.setattr(storage.room_databases, "room_of", fails)
        with pytest.raises(error, match="not now"):
            databases.recover(lambda *_: None)
    databases.close()
    for shard in shards.values():
        shard.close()
    world = World(tmp_path)
    assert (world.left, world.damaged) == (left, [])
    world.close()


def test_a_start_does_not_wait_for_the_reserve_of_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """S36: a room's rows and its move are known to its shard also where the disk is nearly full."""
    world = World(tmp_path)
    world.do("r", "moves", add("a"))
    left = list(world.left)
    world.close()
    with monkeypatch.context() as patch:
        patch.setattr(storage.database.DatabaseFile, "free_bytes", lambda _: 4096)
        world = World(tmp_path)
        assert (world.left, world.damaged, world.databases.own) == (left, [], {"main/r"})
    world.close()


def test_a_file_in_the_place_of_another_is_damaged_and_no_end_of_the_start(tmp_path: Path) -> None:
    """S36, FAULTS 13: and its rows do not leave from there."""
    world = World(tmp_path)
    world.do("r", "moves", add("a"))
    path = world.databases.get("main/r").path
    world.close()
    other = path.with_name(f"{'0' * 40}.db")
    for end in ("", "-wal"):
        shutil.copyfile(f"{path}{end}", f"{other}{end}")
    world = World(tmp_path)
    assert world.damaged == [other]
    assert world.stored("r") == ({}, ["a"])
    world.close()


# What is open


def test_one_that_nobody_needs_is_closed_and_opened_again(world: World, monkeypatch: Any) -> None:
    """Q2: with its rows executed, and only then; its log goes with it."""
    world.do("r", "moves", add("a", key=1))
    path = world.databases.get("main/r").path
    log = path.with_name(path.name + "-wal")
    monkeypatch.setattr(storage.room_databases, "IDLE_SECONDS", 0.0)
    world.tidy()
    assert world.databases.are_open()
    assert log.exists()
    world.executed()
    world.tidy()
    world.tidy()
    assert not world.databases.are_open()
    assert not log.exists()
    assert world.stored("r") == ({"key": 1}, ["a"])
    assert world.databases.are_open()


def test_one_that_is_wanted_while_it_is_closed_stays_open_or_is_opened_again(
    world: World, monkeypatch: Any
) -> None:
    world.do("r", "moves", add("a"))
    world.executed()
    world.tidy()
    monkeypatch.setattr(storage.room_databases, "IDLE_SECONDS", 0.0)
    for late in (False, True):
        world.commits.tidy()
        before = world.databases.opened("main/r")
        assert before is not None
        assert before.closing
        if late:
            world.writer.finish()
        found = world.databases.get("main/r")
        assert (found is before) is not late
        assert found.list("main/r") == []
        if not late:
            world.writer.finish()
        world.commits.completed()
        assert world.databases.opened("main/r") is found
    assert world.stored("r") == ({}, ["a"])


def test_no_more_are_open_than_should_be(tmp_path: Path, inline: bool) -> None:
    """At the bound all stay; above it those go that nobody needs, and what has rows to be executed stays."""
    world = World(tmp_path, inline=inline, open_max=3)
    for number in range(3):
        world.do(f"r{number}", "moves", add("a"))
    world.executed()
    world.tidy()
    assert len(list(world.databases.all_open())) == 3
    world.do("r3", "moves", add("a"))
    world.tidy()
    assert len(list(world.databases.all_open())) == 3
    for number in range(4, 8):
        world.do(f"r{number}", "moves", add("a"))
    assert len(list(world.databases.all_open())) >= 5  # whose rows are not executed
    world.executed()
    world.tidy()
    world.tidy()
    assert len(list(world.databases.all_open())) == 3
    world.close()
    # A start opens only what has a log.
    world = World(tmp_path, inline=inline, open_max=3)
    assert not world.databases.are_open()
    assert len(world.databases.own) == 8
    for number in range(8):
        assert world.read(f"main/r{number}", "none") is None
    # What is only read has no log to carry over, and is closed at once.
    assert len(list(world.databases.all_open())) == 3
    world.close()


def test_however_many_are_too_many_they_are_closed_at_once(world: World, monkeypatch: Any) -> None:
    """FAULTS: a commit opens any number of them, and each is six descriptors."""
    monkeypatch.setattr(storage.room_databases, "CLOSED_AT_ONCE_MAX", 2)
    monkeypatch.setattr(world.databases, "_open_max", 1)
    rooms = [f"r{number}" for number in range(6)]
    for room in rooms:
        world.do(room, "moves", add("a"))
    assert len(list(world.databases.all_open())) == 6
    world.executed()
    world.tidy()  # their rows go
    world.tidy()
    assert [database.key for database in world.databases.all_open()] == ["main/r5"]
    for room in rooms:
        assert world.stored(room) == ({}, ["a"])


def test_a_missing_empty_or_damaged_file_is_told_to_its_room_alone(tmp_path: Path) -> None:
    """S36, FAULTS 13: it is not made anew, and not written to."""
    world = World(tmp_path)
    for room in ("missing", "empty", "damaged", "well"):
        world.do(room, "moves", add("a", key=1))
    world.executed()
    world.tidy()
    paths = {room: database_path(tmp_path, wire.partition_of(f"main/{room}") % SHARDS, f"main/{room}")
             for room in ("missing", "empty", "damaged")}  # fmt: skip
    world.close()
    paths["missing"].unlink()
    paths["empty"].write_bytes(b"")
    content = bytearray(paths["damaged"].read_bytes())
    content[:16] = bytes(16)
    paths["damaged"].write_bytes(content)
    world = World(tmp_path)
    for room, path in paths.items():
        for steps in (put(key=2), add("b"), lambda storage: storage.get("key")):
            with pytest.raises(DataDirectoryError) as caught:
                world.do(room, "fails", steps)
            assert str(path) in str(caught.value)
            assert isinstance(caught.value, DatabaseDamaged) is (room != "missing")
    assert not paths["missing"].exists()
    assert paths["empty"].read_bytes() == b""
    assert paths["damaged"].read_bytes() == content
    assert world.stored("well") == ({"key": 1}, ["a"])
    world.close()


# Death


def test_a_death_at_any_statement_leaves_what_some_of_the_turns_have_done(
    tmp_path: Path, inline: bool
) -> None:
    """S22, S28: of the first statement, the move, what follows it, and executed rows; the outbox says which
    turns have been, and nothing else is there.
    """
    folder = tmp_path / "data"
    folder.mkdir()
    copies = tmp_path / "copies"
    copies.mkdir()
    world = World(folder, inline=inline)
    world.do("r", "1", put(a=1, b=1))
    states: list[tuple[dict[str, Any], list[str]]] = [({}, []), ({"a": 1, "b": 1}, [])]
    taken: list[Path] = []

    def copy(_: str = "") -> None:
        """As kill -9 would leave it: before each statement."""
        target = copies / f"{len(taken)}"
        shutil.copytree(world.folder, target, ignore=shutil.ignore_patterns("*.lock"))
        taken.append(target)

    for shard in world.shards.values():
        shard._file.writer.set_trace_callback(copy)

    async def second(storage: Storage) -> None:
        storage.delete("a")
        await add("x", c=2)(storage)

    async def main() -> None:
        cell = world.cell("r")
        turn = Turn(None)
        database = await world.commits.own_database(cell, turn)
        database.undo()
        database._file.writer.set_trace_callback(copy)

    trio.run(main)
    world.do("r", "2", second)
    states.append(({"b": 1, "c": 2}, ["x"]))
    world.do("r", "3", add("y", b=3))
    states.append(({"b": 3, "c": 2}, ["x", "y"]))
    copy()
    executed = len(taken)
    world.executed()
    world.tidy()
    copy()
    world.close()
    assert len(taken) > 30
    seen = set()
    for number, path in enumerate(taken):
        found = World(path, inline=inline)
        assert not found.damaged
        if number < executed:
            turns = int(found.names[-1])
            assert found.names == [f"{each}" for each in range(1, turns + 1)]
            assert ("main/r" in found.databases.own) is (turns >= 2)
        else:
            turns = 3
        assert [number for _, number in found.left] == sorted({number for _, number in found.left})
        assert found.stored("r") == states[turns]
        index = wire.partition_of("main/r") % SHARDS
        found.settle()
        found.tidy()
        assert (found.shards[index].list("main/r") == []) is (turns >= 2)
        # It goes on from there, and what comes has higher numbers.
        before = max(found.left, default=(0, 0))
        found.do("r", "next", add("z"))
        assert max(found.left) > before
        assert found.stored("r") == (states[turns][0], [*states[turns][1], "z"])
        found.close()
        seen.add(turns)
    assert seen == {1, 2, 3}


# delete_all


def delete_all(**entries: Any) -> Steps:
    """Delete all, and write entries behind that."""

    async def steps(storage: Storage) -> None:
        storage.delete_all()
        if entries:
            storage.put(entries)

    return steps


async def _waits_until(world: World, steps: Callable[[], None], *turns: Any) -> None:
    """Begin turns, each in a task of its own and behind the one before; take the steps when all wait; commit
    until all have ended.
    """
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for turn in turns:
                nursery.start_soon(world.turn, *turn)
                await trio.testing.wait_all_tasks_blocked()
            steps()
            while nursery.child_tasks:
                world.settle()
                await trio.testing.wait_all_tasks_blocked()
    world.settle()


@pytest.mark.parametrize("fails", [False, True])
def test_delete_all_takes_keys_and_tables_as_its_turn_s_end_finds_them(world: World, fails: bool) -> None:
    """S27: where another turn has the database meanwhile; what turns store that end later stays."""
    world.do("r", "moves", add("first", old=1))

    async def main() -> None:
        cell = world.cell("r")
        room = cell.room
        assert room is not None
        turn = room._begin()
        await add("long", long=1)(room.storage)

        def end() -> None:
            assert world.names == ["moves"]
            cell.room = room
            if fails:
                room._discard()
            else:
                world.finish(cell, turn, "long")

        await _waits_until(
            world,
            end,
            ("r", "deletes", delete_all(new=1)),
            ("r", "short", put(short=1)),
            ("r", "sql", add("b")),
        )

    trio.run(main)
    # "short" has ended before "deletes" has.
    left = world.names[1:]
    assert left == (["short", "deletes", "sql"] if fails else ["short", "long", "deletes", "sql"])
    assert world.stored("r") == ({"new": 1}, ["b"])


def test_delete_all_leaves_the_first_tables_to_the_turn_that_makes_them(world: World) -> None:
    """S27: it ends later, so they come later; its keys do, too."""
    world.do("r", "puts", put(old=1))

    async def main() -> None:
        cell = world.cell("r")
        room = cell.room
        assert room is not None
        turn = room._begin()
        await add("a", long=1)(room.storage)
        await _waits_until(world, lambda: None, ("r", "deletes", delete_all(new=1)))
        cell.room = room
        world.finish(cell, turn, "moves")
        world.settle()

    trio.run(main)
    assert world.names == ["puts", "deletes", "moves"]
    assert world.stored("r") == ({"long": 1, "new": 1}, ["a"])


def test_delete_all_behind_the_first_tables_that_are_on_their_way_to_disk(world: World) -> None:
    """S27: they are not on disk when its turn ends, and go."""

    async def main() -> None:
        await world.turn("r", "moves", add("a", key=1))
        await _waits_until(world, lambda: None, ("r", "deletes", delete_all(new=1)))

    trio.run(main)
    assert world.names == ["moves", "deletes"]
    assert world.stored("r") == ({"new": 1}, [])


def test_delete_all_waits_for_earlier_turns_of_its_connection(world: World) -> None:
    """S19, S27: which may make tables until they end."""
    world.do("r", "puts", put(old=1))
    may_end = False

    async def main() -> None:
        cell = world.cell("r")
        turn = Turn(cell.room)
        got: list[RoomDatabase | None] = []

        async def clear() -> None:
            got.append(await world.commits.database_to_clear(cell, turn, lambda: may_end))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clear)
                await trio.testing.wait_all_tasks_blocked()
                await world.turn("r", "moves", add("a"))
                world.settle()
                world.commits.look_again("main/r")
                await trio.testing.wait_all_tasks_blocked()
                assert not got
                nonlocal may_end
                may_end = True
                world.commits.look_again("main/r")
        [database] = got
        assert database is not None
        assert database is world.databases.opened("main/r")
        database.undo()

    trio.run(main)
    assert world.stored("r") == ({"old": 1}, ["a"])


def test_delete_all_that_is_undone_or_flushed_leaves_what_it_should(world: World) -> None:
    """S27, S28: with statements inside of the transaction that is undone; and a part that is flushed."""
    world.do("r", "moves", add("first", old=1))

    async def undone(storage: Storage) -> None:
        with pytest.raises(Undo):
            async with storage.transaction():
                storage.delete_all()
                await add("gone")(storage)
                raise Undo
        storage.put("key", 1)

    async def inner_undone(storage: Storage) -> None:
        storage.delete_all()
        with pytest.raises(Undo):
            async with storage.transaction():
                await add("gone")(storage)
                raise Undo

    world.do("r", "undone", undone)
    assert world.stored("r") == ({"key": 1, "old": 1}, ["first"])
    world.do("r", "inner undone", inner_undone)
    assert world.stored("r") == ({}, [])


@pytest.mark.parametrize("when", ["at the end", "behind statements", "before statements"])
def test_delete_all_that_takes_too_long_fails_its_turn(world: World, when: str) -> None:
    """S27, S28: the loop waits for it no longer than for a statement; nothing is gone."""

    async def fill(storage: Storage) -> None:
        await add("first", key=1)(storage)
        await storage.sql("CREATE TABLE ring (id INTEGER PRIMARY KEY, next REFERENCES ring)")
        await storage.sql(
            "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
            "INSERT INTO ring (id) SELECT x FROM c LIMIT 20000"
        )

    async def clear(storage: Storage) -> None:
        storage._room._settings = Settings(sql_timeout=0.01)
        if when == "behind statements":
            await storage.sql(INSERT, "never")
        storage.delete_all()
        if when == "before statements":
            await storage.sql(INSERT, "never")

    world.do("r", "fills", fill)
    with pytest.raises(SqlError, match=r"longer than 0\.01 s"):
        world.do("r", "clears", clear)
    world.settle()
    assert world.names == ["fills"]
    assert world.stored("r") == ({"key": 1}, ["first"])
    assert world.databases.get("main/r")._file.read("SELECT count(*) FROM ring") == [(20000,)]


# Whose turn it is


def test_a_turn_with_statements_is_not_kept_waiting_by_those_that_write(world: World) -> None:
    """S28: in a room that never stops writing; and two of them have the database in their order."""
    world.do("r", "moves", add("first"))
    rounds = 8

    async def main() -> None:
        with trio.fail_after(20):
            await world.turn("r", "write", put(key=-1))
            async with trio.open_nursery() as nursery:
                for name in ("one", "two"):
                    nursery.start_soon(world.turn, "r", name, add(name))
                    await trio.testing.wait_all_tasks_blocked()
                for number in range(rounds):
                    world.commits.end_round()
                    # While the former commit is under way, so that something always waits for the next one.
                    async with trio.open_nursery() as writing:  # noqa: ASYNC112 - its turn is another task's
                        writing.start_soon(world.turn, "r", f"write {number}", put(key=number))
                    if world.writer.jobs:
                        world.writer.finish()
                        world.commits.completed()
                    await trio.testing.wait_all_tasks_blocked()
            world.settle()

    trio.run(main)
    names = [name for name in world.names if name.startswith("write ")]
    assert names == [f"write {number}" for number in range(rounds)]
    assert "one" in world.names[:6]
    assert world.names.index("one") < world.names.index("two") < len(world.names) - 1
    assert world.stored("r") == ({"key": rounds - 1}, ["first", "one", "two"])


@pytest.mark.parametrize("other", [False, True])
def test_what_is_put_off_for_a_turn_that_waits_goes_on_when_that_is_cancelled(
    world: World, other: bool
) -> None:
    """S20, H3: with nobody behind it, and with another one that waits."""
    world.do("r", "moves", add("first"))

    async def main() -> None:
        with trio.fail_after(20):
            await world.turn("r", "1", put(key=1))
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def waits() -> None:
                    with scope:
                        await world.turn("r", "never", add("never"))

                nursery.start_soon(waits)
                await trio.testing.wait_all_tasks_blocked()
                if other:
                    nursery.start_soon(world.turn, "r", "other", add("other"))
                    await trio.testing.wait_all_tasks_blocked()
                async with trio.open_nursery() as writing:  # noqa: ASYNC112 - its turn is another task's
                    writing.start_soon(world.turn, "r", "2", put(key=2))
                scope.cancel()
                while nursery.child_tasks:
                    await trio.testing.wait_all_tasks_blocked()
                    world.settle()
            world.settle()

    trio.run(main)
    assert world.names == ["moves", "1", "2", *(["other"] if other else [])]
    assert world.stored("r") == ({"key": 2}, ["first", *(["other"] if other else [])])
    assert not world.commits._put_off
    assert not world.commits._wanting


@pytest.mark.parametrize("gives_up", [False, True])
def test_what_waited_for_work_that_goes_on_is_committed_soon(world: World, gives_up: bool) -> None:
    """S20, S28: behind a statement that only asks, and behind one that the work gives up."""
    world.do("r", "moves", add("first"))
    asked_for: list[list[str]] = []
    world.commits.flush_soon = lambda: asked_for.append(list(world.names))

    async def main() -> None:
        with trio.fail_after(20):
            await world.turn("r", "1", put(key=1))
            room = world.cell("r").room
            assert room is not None
            scope = trio.CancelScope()

            async def work() -> None:
                room._begin(Beside)
                with scope:
                    await room.storage.sql(NAMES)
                await room.storage.sql(NAMES)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(work)
                await trio.testing.wait_all_tasks_blocked()
                async with trio.open_nursery() as writing:  # noqa: ASYNC112 - its turn is another task's
                    writing.start_soon(world.turn, "r", "2", put(key=2))
                assert not asked_for
                if gives_up:
                    scope.cancel()
                else:
                    world.settle()
                await trio.testing.wait_all_tasks_blocked()
                assert asked_for == [["moves"] if gives_up else ["moves", "1"]]
                assert nursery.child_tasks
                world.settle()
                assert world.names == ["moves", "1", "2"]

    trio.run(main)
    assert len(asked_for) == 1
    assert world.stored("r") == ({"key": 2}, ["first"])


def test_a_gateway_goes_while_background_work_waits_for_the_database(world: World) -> None:
    """S22: what was put off for it is kept for the next gateway, and it goes on."""
    world.do("r", "moves", add("first"))
    world.commits._ready = lambda _: False

    async def main() -> None:
        with trio.fail_after(20):
            await world.turn("r", "1", put(key=1))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.turn, "r", "work", add("work"))
                await trio.testing.wait_all_tasks_blocked()
                async with trio.open_nursery() as writing:  # noqa: ASYNC112 - its turn is another task's
                    writing.start_soon(world.turn, "r", "2", put(key=2))
                world.commits.abandon_turns()
                world.commits.forget()
                unsaid = world.commits.newest
                world.commits._ready = lambda _: True
                world.settle()
                assert (world.names, world.commits.has_ended(unsaid)) == (["moves", "1", "2"], True)
            world.settle()

    trio.run(main)
    assert world.names[3:] == ["work"]
    assert world.stored("r") == ({"key": 2}, ["first", "work"])


# Transactions, values and lists, against a model


KEYS = st.sampled_from(["a", "a\0", "ab", "b", "é", "\U00010000", "\uffff"])
STEP: Any = st.deferred(
    lambda: st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 9)),
        st.tuples(st.just("delete"), st.lists(KEYS, max_size=3)),
        st.tuples(st.just("clear")),
        st.tuples(st.just("insert"), st.integers(0, 9)),
        st.tuples(st.just("get"), st.lists(KEYS, max_size=4)),
        st.tuples(
            st.just("list"),
            st.fixed_dictionaries(
                {},
                optional={
                    "start": KEYS,
                    "end": KEYS,
                    "prefix": KEYS,
                    "reverse": st.booleans(),
                    "limit": st.integers(0, 4),
                },
            ),
        ),
        st.tuples(st.sampled_from(["keep", "undo"]), st.lists(STEP, max_size=5)),
    )
)


class Undo(Exception):
    pass


class Model:
    """A room's storage as two values."""

    def __init__(self, keys: dict[str, int], table: list[int] | None) -> None:
        self.keys, self.table = keys, table

    async def check(self, storage: Storage, steps: list[Any], uses_sql: bool) -> None:
        for step in steps:
            what = step[0]
            if what == "put":
                storage.put(step[1], step[2])
                self.keys[step[1]] = step[2]
            elif what == "delete":
                assert await storage.delete(step[1]) == len({key for key in step[1] if key in self.keys})
                for key in step[1]:
                    self.keys.pop(key, None)
            elif what == "clear":
                storage.delete_all()
                self.keys.clear()
                self.table = None
            elif what == "insert" and uses_sql:
                await storage.sql("CREATE TABLE IF NOT EXISTS n (n INTEGER)")
                await storage.sql("INSERT INTO n VALUES (?)", step[1])
                self.table = [*(self.table or []), step[1]]
                rows = await storage.sql("SELECT n FROM n ORDER BY rowid")
                assert [row["n"] for row in rows] == self.table
            elif what == "get":
                assert await storage.get(step[1]) == {k: self.keys[k] for k in step[1] if k in self.keys}
            elif what == "list":
                names = select(self.keys, **step[1])
                assert list((await storage.list(**step[1])).items()) == [(k, self.keys[k]) for k in names]
            elif what == "keep":
                async with storage.transaction():
                    await self.check(storage, step[1], uses_sql)
            elif what == "undo":
                before = (dict(self.keys), self.table)
                with pytest.raises(Undo):
                    async with storage.transaction():
                        await self.check(storage, step[1], uses_sql)
                        raise Undo
                self.keys, self.table = before


@pytest.fixture(scope="module", params=[False, True], ids=["keys", "sql"])
def long_world(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[World, bool]]:
    world = World(tmp_path_factory.mktemp("model"), inline=True)
    yield world, request.param
    world.close()


@given(st.lists(st.tuples(st.lists(STEP, max_size=8), st.booleans(), st.booleans()), max_size=4))
@settings(max_examples=60, deadline=None)
def test_storage_does_what_a_model_does(long_world: tuple[World, bool], turns: list[Any]) -> None:
    """S20, S27, S28: over turns that fail, inner transactions, and commits that are late."""
    world, uses_sql = long_world
    room = f"r{len(world.cells)}"
    model = Model({}, None)

    async def main() -> None:
        for steps, fails, waits in turns:
            before = (dict(model.keys), model.table)

            async def run(storage: Storage, steps: Any = steps, fails: bool = fails) -> None:
                await model.check(storage, steps, uses_sql)
                if fails:
                    raise Undo

            if world.cell(room).gate and uses_sql:
                world.settle()
            try:
                await world.turn(room, "turn", run)
            except Undo:
                model.keys, model.table = before
            if not waits:
                world.settle()

    trio.run(main)
    world.settle()
    assert world.do(room, "look", lambda storage: storage.list()) == dict(
        sorted(model.keys.items(), key=lambda entry: entry[0].encode())
    )
    if f"main/{room}" in world.databases.own:
        found = world.databases.get(f"main/{room}")._file.read(
            "SELECT name FROM sqlite_schema WHERE name = 'n'"
        )
        assert bool(found) is (model.table is not None)


# Inner transactions


def test_inner_transactions_nest_to_their_bound(world: World) -> None:
    """S28: at one below, at, and one above."""

    async def nested(storage: Storage, depth: int) -> None:
        if depth:
            async with storage.transaction():
                storage.put(f"{depth}", depth)
                await storage.sql(CREATE)
                await nested(storage, depth - 1)

    for depth in (TRANSACTIONS_MAX - 1, TRANSACTIONS_MAX):
        world.do("r", f"{depth}", partial(nested, depth=depth))
    with pytest.raises(LimitExceeded) as caught:
        world.do("r", "too deep", partial(nested, depth=TRANSACTIONS_MAX + 1))
    assert (caught.value.given, caught.value.limit) == (TRANSACTIONS_MAX + 1, TRANSACTIONS_MAX)


def test_an_inner_transaction_that_outlives_its_turn_or_another_says_so(world: World) -> None:
    async def overlapping(storage: Storage) -> None:
        first, second = storage.transaction(), storage.transaction()
        await first.__aenter__()
        await second.__aenter__()
        await first.__aexit__(None, None, None)

    with pytest.raises(RuntimeError, match="opposite order"):
        world.do("r", "overlapping", overlapping)

    async def kept(storage: Storage) -> Any:
        inner = storage.transaction()
        await inner.__aenter__()
        return inner

    async def main() -> None:
        inner = await world.turn("r", "kept", kept)
        with pytest.raises(RoomGone):
            await inner.__aexit__(None, None, None)

    trio.run(main)


def test_outside_of_a_turn_there_are_no_statements(world: World) -> None:
    """S20."""
    storage = world.do("r", "moves", lambda storage: _itself(storage))

    async def later() -> None:
        with pytest.raises(RoomGone):
            await storage.sql("SELECT 1")
        with pytest.raises(RoomGone):
            async with storage.transaction():
                pass

    trio.run(later)


async def _itself(storage: Storage) -> Storage:
    return storage


def test_an_error_of_the_broker_is_one(world: World) -> None:
    async def steps(storage: Storage) -> None:
        with pytest.raises(BrokerError):
            await storage.sql("SELEC")

    world.do("r", "errs", steps)
