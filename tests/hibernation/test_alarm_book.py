"""The order in which alarms are run, against a model: each once for every time that it is due, in the order
of due times, whatever is set, deleted, held, released, or forgotten by a death meanwhile (S29).
"""

import sqlite3
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hibernation.alarm_book import PAGE_ROWS, SCAN_ROWS_MAX, AlarmBook
from storage.alarms import AlarmBatch, AlarmRow, AlarmTable, DueRow
from storage.migrations import SHARD

ROOMS = ["chat/a", "chat/b", "plain/d"]
#: By the last letter of the room.
SHARDS = 2


class Files:
    """Databases with alarms, and the book that reads them."""

    def __init__(self, in_flight_max: int = 256) -> None:
        self.connections = [sqlite3.connect(":memory:", isolation_level=None) for _ in range(SHARDS)]
        for connection in self.connections:
            SHARD.upgrade(connection)
        self.tables = [AlarmTable(self._reading(connection)) for connection in self.connections]
        self.held: set[str] = set()
        self.reads = 0
        self.book = AlarmBook(
            range(SHARDS),
            self.shard_of,
            self._page,
            lambda room, limit: self.tables[self.shard_of(room)].due_of_room(room, limit),
            is_wanted=lambda room: room.startswith("chat/"),
            is_held=lambda room: room in self.held,
            in_flight_max=in_flight_max,
        )

    def _page(self, shard: int, place: tuple[int, int], limit: int) -> list[DueRow]:
        self.reads += 1
        return self.tables[shard].due_after(place, limit)

    @staticmethod
    def _reading(connection: sqlite3.Connection) -> Callable[..., list]:
        return lambda sql, parameters: connection.execute(sql, parameters).fetchall()

    @staticmethod
    def shard_of(room: str) -> int:
        return ord(room[-1]) % SHARDS

    def write(self, room: str, changes: dict[str, AlarmRow | None]) -> None:
        """A commit; the book is told of what it sets."""
        batch = AlarmBatch()
        batch.stage(room, changes)
        batch.write(self.connections[self.shard_of(room)])
        dues = [row.due_ms for row in changes.values() if row is not None and not row.failed]
        if dues:
            self.book.stored(self.shard_of(room), min(dues))

    def set(self, room: str, name: str, number: int, due_ms: int, failed: int = 0) -> None:
        self.write(room, {name: AlarmRow(name, number, due_ms, due_ms, None, failed=failed)})

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


class Machine(RuleBasedStateMachine):
    """The model: what is on disk, what was given out, what of that has run."""

    @initialize(in_flight_max=st.integers(1, 4))
    def begin(self, in_flight_max: int) -> None:
        self.files = Files(in_flight_max)
        self.in_flight_max = in_flight_max
        self.disk: dict[tuple[str, str], AlarmRow] = {}
        self.in_flight: dict[int, DueRow] = {}
        self.ran: set[int] = set()
        self.now = 1000
        self.number = 0

    def teardown(self) -> None:
        if hasattr(self, "files"):
            self.files.close()

    def is_waiting(self, room: str, row: AlarmRow) -> bool:
        return (
            room.startswith("chat/")
            and room not in self.files.held
            and not row.failed
            and row.number not in self.in_flight
        )

    def busy(self) -> set[str]:
        """Rooms that have one to run."""
        return {row.room for number, row in self.in_flight.items() if number not in self.ran}

    @rule(
        room=st.sampled_from(ROOMS),
        in_ms=st.dictionaries(st.sampled_from("xyz"), st.integers(-50, 50) | st.none(), min_size=1),
        failed=st.integers(0, 5).map(lambda n: int(n == 0)),
    )
    def change(self, room: str, in_ms: dict[str, int | None], failed: int) -> None:
        """Alarms are set, or deleted where there is None."""
        changes: dict[str, AlarmRow | None] = {}
        for name, delay in in_ms.items():
            if delay is None:
                self.disk.pop((room, name), None)
                changes[name] = None
            else:
                self.number += 1
                row = AlarmRow(name, self.number, self.now + delay, self.now, None, failed=failed)
                self.disk[room, name] = changes[name] = row
        self.files.write(room, changes)
        self.take()

    @rule(by_ms=st.integers(-20, 60))
    def clock(self, by_ms: int) -> None:
        self.now += by_ms
        self.take()

    def take(self) -> None:
        taken = self.files.book.take(self.now)
        waiting = sorted(
            (row.due_ms, row.number, room)
            for (room, _), row in self.disk.items()
            if self.is_waiting(room, row) and row.due_ms <= self.now
        )
        expected: list[tuple[int, int, str]] = []
        rooms = self.busy()
        for due_ms, number, room in waiting:
            if len(self.in_flight) + len(expected) < self.in_flight_max and room not in rooms:
                expected.append((due_ms, number, room))
                rooms.add(room)
        assert [row[:3] for row in taken] == expected
        for row in taken:
            self.in_flight[row.number] = row
        later = [
            row.due_ms
            for (room, _), row in self.disk.items()
            if row.due_ms > self.now and self.is_waiting(room, row) and room not in self.busy()
        ]
        next_ms = self.files.book.next_ms
        if later and len(self.in_flight) < self.in_flight_max:
            assert next_ms is not None and next_ms <= min(later)
        if next_ms is not None and len(self.in_flight) < self.in_flight_max:
            assert next_ms > self.now

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), way=st.sampled_from(["ran", "done", "again", "retry"]))
    def go_on(self, data: st.DataObject, way: str) -> None:
        """One that was given out has run; or that is on disk, too; or it was found not to be what it was."""
        number = data.draw(st.sampled_from(sorted(self.in_flight)))
        if way == "ran":
            self.ran.add(number)
            self.files.book.ran(number)
            self.take()
            return
        row = self.in_flight.pop(number)
        self.ran.discard(number)
        stored = self.disk.get((row.room, row.name))
        if way != "again" and stored is not None and stored.number == number:
            if way == "done":
                del self.disk[row.room, row.name]
                self.files.write(row.room, {row.name: None})
            else:
                again = stored._replace(due_ms=self.now + 10, attempt=1)
                self.disk[row.room, row.name] = again
                self.files.write(row.room, {row.name: again})
        self.files.book.settled(number, again=way == "again")
        self.take()

    @rule(room=st.sampled_from(ROOMS), what=st.sampled_from(["hold", "release", "release", "die"]))
    def trouble(self, room: str, what: str) -> None:
        """A room does not start, or does again; the gateway has gone, or the host."""
        if what == "die":
            self.in_flight.clear()
            self.ran.clear()
            self.files.book.forget()
        elif what == "release":
            self.files.held.discard(room)
            self.files.book.released(room)
        else:
            self.files.held.add(room)
            self.files.book.held(room)
            for number, row in list(self.in_flight.items()):
                if row.room == room and number not in self.ran:
                    del self.in_flight[number]
        self.take()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "files"):
            assert self.files.book.in_flight == len(self.in_flight) <= self.in_flight_max


TestBook = Machine.TestCase
TestBook.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_very_many_due_alarms_are_given_out_as_others_are_settled_and_read_once():
    """S29: spread; what is held is what is in flight."""
    files = Files(in_flight_max=10)
    count = 1000
    for number in range(count):
        files.set(f"chat/{number:04}-{number % 2}", "x", number, number)
    order: list[int] = []
    while rows := files.book.take(count):
        assert files.book.in_flight <= 10
        for row in rows:
            order.append(row.number)
            files.write(row.room, {"x": None})
            files.book.settled(row.number)
    assert order == list(range(count))
    assert files.reads < 2 * SHARDS * (count / 10 + 1)
    files.close()


def test_one_room_with_very_many_keeps_nobody_waiting_and_is_not_read_again_for_each():
    files = Files()
    for number in range(300):
        files.set("chat/a", f"{number}", number, number)
    files.set("chat/b", "x", 1000, 1000)
    first = files.book.take(2000)
    assert [row.number for row in first] == [0, 1000]
    files.book.settled(1000)
    files.write("chat/b", {"x": None})
    reads = files.reads
    for number in range(300):
        files.write("chat/a", {f"{number}": None})
        files.book.settled(number)
        taken = files.book.take(2000)
        assert [row.number for row in taken] == ([number + 1] if number < 299 else [])
    assert files.reads - reads <= 2 * SHARDS * 300
    files.close()


def test_a_call_looks_at_so_many_rows_and_no_more():
    """At the bound: rooms that are held are passed over in several calls."""
    for extra, found in ((-1, True), (0, False), (1, False)):
        files = Files()
        files.held.add("chat/a")
        batch = AlarmBatch()
        batch.stage("chat/a", {f"{n}": AlarmRow(f"{n}", n, 0, 0, None) for n in range(SCAN_ROWS_MAX + extra)})
        batch.write(files.connections[files.shard_of("chat/a")])
        files.set("chat/c", "last", 1_000_000, 1)
        assert bool(files.book.take(10)) is found
        if not found:
            assert files.book.next_ms is not None and files.book.next_ms <= 10
            assert [row.room for row in files.book.take(10)] == ["chat/c"]
        files.close()


def test_a_page_that_is_full_is_followed_by_the_next():
    for count in (PAGE_ROWS - 1, PAGE_ROWS, PAGE_ROWS + 1):
        files = Files(in_flight_max=count)
        for number in range(count):
            files.set(f"chat/{number}-a", "x", number, 5)
        assert len(files.book.take(5)) == count
        files.close()
