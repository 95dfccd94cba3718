"""Group commit: what leaves when, and what later turns read meanwhile. The writer is a fake that finishes a
job when the test says so; the shards are real.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cbor2 import dumps, loads

import hibernation.commits
from broker import Server
from hibernation.cells import Batch, Cell, Kind
from hibernation.commits import Commits
from hibernation.party import make_parties
from hibernation.room import Room
from hibernation.settings import Settings
from storage.errors import CommitRefused, CommitUnknown
from storage.shards import Shard
from storage.values import decode, encode

SHARDS = 2


class Main(Server):
    def on_message(self, message, sender): ...


class FakeWriter:
    """Jobs wait until `finish`."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], object]] = []
        self._finished: list[tuple[int, BaseException | None]] = []
        self.count = 0

    def submit(self, job: Callable[[], object]) -> int:
        self.jobs.append(job)
        return len(self.jobs)

    def completed(self) -> list[tuple[int, BaseException | None]]:
        finished, self._finished = self._finished, []
        return finished

    def finish(self) -> None:
        (job,) = self.jobs
        self.jobs.clear()
        self.count += 1
        error: BaseException | None = None
        try:
            job()
        except BaseException as raised:
            error = raised
        self._finished.append((self.count, error))


class _Backstage:
    own_databases: frozenset[str] = frozenset()


class Disk:
    """Commits with what is around them, and the rooms of one host."""

    def __init__(self, folder: Path, *, inline: bool = False) -> None:
        self.shards = {
            index: Shard(folder, index, durability="os" if inline else "full") for index in range(SHARDS)
        }
        self.writer = FakeWriter()
        self.released: list[Any] = []
        self.paused: list[str | None] = []
        self.commits = Commits(
            self.shards,
            SHARDS,
            self.writer,  # type: ignore[arg-type]
            inline,
            self._released,
            self.paused.append,
        )
        self.backstage = _Backstage()
        (party,) = make_parties([Main])
        self._kind = Kind(party, Settings())

    def _released(self, batch: Batch) -> None:
        for rows in batch.rows.values():
            for _, items in rows:
                self.released += loads(items)
        self.released += batch.late

    def completed(self) -> None:
        """What the host does when the writer has finished a job."""
        self.commits.completed()
        self.commits.end_round()

    def outbox(self) -> list[Any]:
        """What the outboxes hold, in the order of the commits of each shard."""
        return [loads(items) for shard in self.shards.values() for _, items in shard.rows()]

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()

    def cell(self, room: str) -> Cell:
        cell = Cell(f"main/{room}", self._kind)
        cell.room = Room(self.backstage, cell.key, Settings(), {}, cell.connections, cell.pending)  # type: ignore[arg-type]
        return cell

    def turn(self, cell: Cell, name: str, *, clear: bool = False, **writes: Any) -> None:
        """What the host does at a turn's end."""
        room = cell.room
        assert room is not None
        turn = room._begin()
        if clear:
            room.storage.delete_all()
        for key, value in writes.items():
            if value is None:
                turn.write(key, None)
            else:
                room.storage.put(key, value)
        turn.room = None
        if turn.stored:
            self.commits.stage(cell, turn)
        if cell.gate:
            self.commits.hold(cell, [name], [])
        else:
            self.released.append([name])

    def names(self) -> list[str]:
        return [name for (name,) in self.released]

    def stored(self, cell: Cell, key: str) -> Any:
        blob = self.shards[self.commits.shard_of(cell.key)].get(cell.key, key)
        return None if blob is None else decode(blob)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.close()


def test_a_turn_that_neither_wrote_nor_read_anything_uncommitted_waits_for_nothing(disk):
    """H2: of two rooms, the one that wrote waits for the disk, the other does not."""
    writes, reads = disk.cell("writes"), disk.cell("reads")
    disk.turn(writes, "write", key=1)
    disk.turn(reads, "read")
    disk.commits.end_round()
    assert disk.names() == ["read"]
    disk.writer.finish()
    disk.completed()
    assert disk.names() == ["read", "write"]
    assert disk.stored(writes, "key") == 1


def test_results_of_a_room_leave_in_the_order_of_its_turns(disk):
    """H3: a turn that only read waits for the writes before it, in whichever batch they are."""
    cell = disk.cell("r")
    disk.turn(cell, "write 1", key=1)
    disk.turn(cell, "read 1")
    disk.commits.end_round()
    disk.turn(cell, "read 2")
    assert disk.names() == []
    disk.turn(cell, "write 2", key=2)
    disk.turn(cell, "read 3")
    disk.commits.end_round()  # the first commit is still under way
    assert len(disk.writer.jobs) == 1
    disk.writer.finish()
    disk.completed()
    assert disk.names() == ["write 1", "read 1", "read 2"]
    assert cell.pending  # the newer value is not on disk
    disk.writer.finish()
    disk.completed()
    assert disk.names() == ["write 1", "read 1", "read 2", "write 2", "read 3"]
    assert (cell.pending, cell.gate, disk.commits.idle) == ({}, 0, True)
    disk.turn(cell, "read 4")
    assert disk.names()[-1] == "read 4"
    assert disk.commits.count == 2


def test_the_turns_of_a_round_commit_together(disk):
    """One commit, however many rooms and shards."""
    cells = [disk.cell(f"r{number}") for number in range(50)]
    assert {disk.commits.shard_of(cell.key) for cell in cells} == {0, 1}
    for number, cell in enumerate(cells):
        disk.turn(cell, f"{number}", key=number)
    disk.commits.end_round()
    disk.writer.finish()
    disk.completed()
    assert sorted(disk.names(), key=int) == [f"{number}" for number in range(50)]
    assert [disk.stored(cell, "key") for cell in cells] == list(range(50))
    assert disk.commits.count == 1


def test_delete_all_hides_what_is_on_disk_until_it_is_gone(disk):
    """S27: and what was written before it in the same batch."""
    cell = disk.cell("r")
    disk.turn(cell, "a", old=1, older=2)
    disk.commits.end_round()
    disk.writer.finish()
    disk.completed()
    disk.turn(cell, "b", mid=1)
    disk.turn(cell, "c", clear=True, new=1)
    assert (cell.pending, cell.pending_cleared) == ({"new": encode(1)}, True)
    disk.turn(cell, "d", newer=2, new=None)
    disk.commits.end_round()
    disk.turn(cell, "e", last=3)
    disk.writer.finish()
    disk.completed()
    assert [disk.stored(cell, key) for key in ("old", "older", "mid", "new", "newer")] == [None] * 4 + [2]
    disk.writer.finish()
    disk.completed()
    assert cell.room is not None
    assert (cell.pending, cell.pending_cleared, cell.room._pending_cleared) == ({}, False, False)
    assert disk.stored(cell, "last") == 3


def test_what_waits_for_the_disk_is_done_after_the_results_have_left(disk):
    """S26: a stream begins behind its status line."""
    cell = disk.cell("r")
    seen: list[Any] = []
    disk.commits.after(cell, lambda: seen.append("at once"))
    disk.turn(cell, "a", key=1)
    disk.commits.after(cell, lambda: seen.append(disk.names()))
    disk.commits.end_round()
    assert seen == ["at once"]
    disk.writer.finish()
    disk.completed()
    assert seen == ["at once", ["a"]]


def test_results_outlive_their_gateway_and_nothing_else_does(disk):
    """S22, S34: a turn that has ended has ended, whether its batch is on its way to disk or still forms."""
    cell, other = disk.cell("r"), disk.cell("other")
    disk.turn(cell, "a", key=1)
    disk.commits.after(cell, lambda: pytest.fail("nobody waits"))
    disk.commits.end_round()
    disk.turn(other, "b", key=1)
    disk.commits.forget()
    disk.writer.finish()
    disk.completed()
    assert (disk.names(), disk.stored(cell, "key"), disk.stored(other, "key")) == (["a"], 1, None)
    disk.writer.finish()
    disk.completed()
    assert (disk.names(), disk.stored(other, "key")) == (["a", "b"], 1)
    assert disk.commits.idle


def test_inline_commits_are_done_at_the_end_of_the_round(tmp_path):
    """S21: durability os."""
    disk = Disk(tmp_path, inline=True)
    cell = disk.cell("r")
    disk.turn(cell, "a", key=1)
    assert disk.names() == []
    disk.commits.end_round()
    assert (disk.names(), disk.stored(cell, "key"), disk.writer.jobs) == (["a"], 1, [])
    disk.close()


def test_a_commit_waits_for_a_checkpoint_that_the_writer_makes(tmp_path, monkeypatch):
    """S21: with durability os the writer thread carries a long log over, and no commit meets it there."""
    disk = Disk(tmp_path, inline=True)
    cell = disk.cell("r")
    monkeypatch.setattr(Shard, "checkpoint_due", True)
    disk.turn(cell, "a", key=1)
    disk.commits.end_round()
    assert disk.names() == ["a"]
    disk.turn(cell, "b", key=2)
    disk.commits.end_round()
    assert disk.names() == ["a"]
    monkeypatch.setattr(Shard, "checkpoint_due", False)
    disk.writer.finish()
    disk.completed()
    assert disk.names() == ["a", "b"]
    assert disk.commits.idle
    disk.close()


@pytest.mark.parametrize("inline", [False, True])
def test_a_failed_commit_ends_the_host_and_nothing_leaves(tmp_path, monkeypatch, inline):
    """S22, S36: the outcome is unknown."""
    disk = Disk(tmp_path, inline=inline)
    statuses: list[int] = []

    class Died(BaseException):
        pass

    def die(status: int) -> None:
        statuses.append(status)
        raise Died

    def fail(*_: Any) -> None:
        raise CommitUnknown("0.db", "fsync failed")

    monkeypatch.setattr(os, "_exit", die)
    for shard in disk.shards.values():
        monkeypatch.setattr(shard, "commit", fail)
    monkeypatch.setattr(hibernation.commits, "log", _Quiet())
    disk.turn(disk.cell("r"), "a", key=1)
    with pytest.raises(Died):
        disk.commits.end_round()
        disk.writer.finish()
        disk.completed()
    assert statuses == [os.EX_IOERR]
    assert disk.names() == []
    disk.close()


# The outbox


def test_what_a_commit_releases_is_on_disk_with_it(disk):
    """S22, H6: in the same transaction; what needed no commit is not, and comes behind it."""
    cell, reader = disk.cell("r"), disk.cell("reader")
    disk.turn(cell, "write 1", key=1)
    disk.turn(cell, "read 1")
    disk.turn(reader, "elsewhere")
    disk.commits.end_round()
    disk.turn(cell, "read 2")  # wrote nothing, and the row is sealed
    assert disk.outbox() == []
    disk.writer.finish()
    assert disk.outbox() == [[["write 1"], ["read 1"]]]
    disk.completed()
    assert disk.names() == ["elsewhere", "write 1", "read 1", "read 2"]
    assert disk.commits.idle
    assert not disk.writer.jobs


def test_rows_leave_the_outbox_with_the_next_commit_or_by_themselves(disk):
    """H6: not before somebody says that they are executed."""
    cell = disk.cell("r")
    shard = disk.commits.shard_of(cell.key)
    for number in range(3):
        disk.turn(cell, f"{number}", key=number)
        disk.commits.end_round()
        disk.writer.finish()
        disk.completed()
    assert disk.outbox() == [[["0"]], [["1"]], [["2"]]]
    first, second, third = [number for number, _ in disk.shards[shard].rows()]
    assert first < second < third
    disk.commits.executed(shard, second)
    assert disk.commits.untidy
    disk.turn(cell, "3", key=3)
    disk.commits.tidy()  # the commit does it
    assert not disk.writer.jobs
    disk.commits.end_round()
    disk.writer.finish()
    disk.completed()
    assert disk.outbox() == [[["2"]], [["3"]]]
    assert not disk.commits.untidy
    disk.commits.executed(shard, third + 1)
    disk.commits.tidy()
    assert not disk.commits.idle
    disk.writer.finish()
    disk.completed()
    assert (disk.outbox(), disk.commits.untidy, disk.commits.idle) == ([], False, True)
    disk.commits.tidy()
    assert not disk.writer.jobs
    assert disk.names() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("over", [0, 1])
def test_large_results_go_in_several_rows_in_their_order(disk, monkeypatch, over):
    """At the limit one row holds them; above, each half has its own, down to a single result, which passes
    whatever its size.
    """
    cell = disk.cell("r")
    for name in ("a" * 30, "b", "c", "d" * 100):
        disk.turn(cell, name, key=name)
    size = len(dumps([["a" * 30], ["b"], ["c"], ["d" * 100]]))
    monkeypatch.setattr(hibernation.commits, "ROW_BYTES_MAX", size - over)
    disk.commits.end_round()
    disk.writer.finish()
    disk.completed()
    assert len(disk.outbox()) == 1 + over
    assert disk.names() == ["a" * 30, "b", "c", "d" * 100]
    numbers = [number for number, _ in disk.shards[disk.commits.shard_of(cell.key)].rows()]
    assert numbers == sorted(set(numbers))


# A disk that takes nothing


@pytest.mark.parametrize("inline", [False, True])
def test_a_refused_commit_is_kept_and_tried_again(tmp_path, monkeypatch, inline):
    """S36: nothing of it leaves; rooms that do not need it go on; what one shard took is not given again."""
    monkeypatch.setattr(hibernation.commits, "log", _Quiet())
    disk = Disk(tmp_path, inline=inline)
    cells = [disk.cell(f"r{number}") for number in range(8)]
    full = disk.shards[0]
    commit, tried = full.commit, []

    def refuse(*arguments: Any) -> None:
        tried.append(arguments)
        raise CommitRefused("0.db", "the disk is full", "Free some space")

    monkeypatch.setattr(full, "commit", refuse)
    for number, cell in enumerate(cells):
        disk.turn(cell, f"{number}", key=number)
    disk.commits.end_round()
    if not inline:
        disk.writer.finish()
        disk.completed()
    for _ in range(3):
        assert disk.paused == ["the disk is full. Free some space."]
        assert (disk.commits.idle, disk.commits.paused) == (False, disk.paused[0])
        assert disk.names() == []
        disk.commits.retry()
        disk.commits.retry()  # one attempt at a time
        disk.writer.finish()
        disk.completed()
    assert len(tried) == 4
    disk.turn(disk.cell("reader"), "read")
    disk.turn(cells[0], "waits", other=1)
    assert disk.names() == ["read"]
    monkeypatch.setattr(full, "commit", commit)
    disk.commits.retry()
    disk.writer.finish()
    disk.completed()
    assert disk.paused == ["the disk is full. Free some space.", None]
    assert disk.commits.paused is None
    if not inline:
        assert sorted(disk.names()) == [*"01234567", "read"]
        disk.writer.finish()
        disk.completed()
    assert sorted(disk.names()) == [*"01234567", "read", "waits"]
    assert [disk.stored(cell, "key") for cell in cells] == list(range(8))
    assert sorted(each for row in disk.outbox() for each in row) == [
        *([each] for each in "01234567"),
        ["waits"],
    ]
    assert disk.commits.idle
    disk.close()


def test_rows_that_cannot_be_deleted_now_are_deleted_later(disk, monkeypatch):
    """S36: a full disk pauses nobody for the sake of old rows."""
    cell = disk.cell("r")
    shard = disk.commits.shard_of(cell.key)
    disk.turn(cell, "a", key=1)
    disk.commits.end_round()
    disk.writer.finish()
    disk.completed()
    ((number, _),) = disk.shards[shard].rows()
    disk.commits.executed(shard, number)

    def refuse(*_: Any) -> None:
        raise CommitRefused("0.db", "the disk is full", "Free some space")

    with monkeypatch.context() as patch:
        patch.setattr(disk.shards[shard], "commit", refuse)
        disk.commits.tidy()
        disk.writer.finish()
        disk.completed()
    assert (disk.paused, disk.commits.untidy, disk.commits.idle) == ([], True, True)
    disk.commits.tidy()
    disk.writer.finish()
    disk.completed()
    assert (disk.outbox(), disk.commits.untidy) == ([], False)


class _Quiet:
    def critical(self, *_: Any, **__: Any) -> None:
        pass

    error = info = critical


def test_what_has_to_wait_for_the_next_gateway_is_committed_then(disk):
    """S22, H8: its turn has ended and does not run again; work that lasts begins behind it, and nobody else
    is told.
    """
    disk.commits._ready = lambda _: False
    cell = disk.cell("r")
    disk.turn(cell, "a", key=1)
    told: list[str] = []
    disk.commits.after(cell, lambda: told.append("left"))
    disk.commits.after(cell, lambda: told.append("lasting"), lasting=True)
    disk.commits.end_round()
    disk.commits.forget()
    newest = disk.commits.newest
    assert (newest, disk.commits.has_ended(newest), disk.commits.has_ended(newest - 1)) == (1, False, True)
    disk.commits._ready = lambda _: True
    disk.commits.end_round()
    assert (disk.commits.newest, disk.commits.has_ended(newest), told) == (1, False, [])
    disk.writer.finish()
    disk.completed()
    assert (disk.commits.newest, disk.commits.has_ended(newest), told) == (0, True, ["lasting"])
    assert (disk.names(), disk.stored(cell, "key")) == (["a"], 1)


def test_a_turn_that_wrote_nothing_can_be_made_to_wait_for_the_disk(disk):
    """S7: what it begins must not be begun again by another host, so it has to be in the outbox."""
    cell = disk.cell("r")
    disk.commits.must_store(cell)
    disk.commits.hold(cell, ["a"], [])
    disk.commits.end_round()
    assert disk.names() == []
    disk.writer.finish()
    disk.completed()
    assert (disk.names(), disk.outbox(), cell.gate) == (["a"], [[["a"]]], 0)
