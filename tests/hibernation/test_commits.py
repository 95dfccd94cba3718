"""Group commit: what leaves when, and what later turns read meanwhile. The writer is a fake that finishes a
job when the test says so; the shards are real.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hibernation.commits
from broker import Server
from hibernation.cells import Cell, Kind
from hibernation.commits import Commits
from hibernation.party import make_parties
from hibernation.room import Room
from hibernation.settings import Settings
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


class Disk:
    """Commits with what is around them, and the rooms of one host."""

    def __init__(self, folder: Path, *, inline: bool = False) -> None:
        self.shards = {
            index: Shard(folder, index, durability="os" if inline else "full") for index in range(SHARDS)
        }
        self.writer = FakeWriter()
        self.released: list[Any] = []
        self.commits = Commits(
            self.shards,
            SHARDS,
            self.writer,  # type: ignore[arg-type]
            inline,
            lambda batch: self.released.extend(batch.results),
        )
        (party,) = make_parties([Main])
        self._kind = Kind(party, Settings())

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()

    def cell(self, room: str) -> Cell:
        cell = Cell(f"main/{room}", self._kind)
        cell.room = Room(None, cell.key, Settings(), {}, cell.connections, cell.pending)  # type: ignore[arg-type]
        return cell

    def turn(self, cell: Cell, name: str, *, clear: bool = False, **writes: Any) -> None:
        """What the host does at a turn's end."""
        room = cell.room
        assert room is not None
        room._begin()
        if clear:
            room.storage.delete_all()
        for key, value in writes.items():
            if value is None:
                room.storage._writes[key] = None
            else:
                room.storage.put(key, value)
        room._effects = None
        if room.storage._writes or room.storage._cleared:
            self.commits.stage(cell, room)
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
    disk.commits.completed()
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
    disk.commits.completed()
    assert disk.names() == ["write 1", "read 1", "read 2"]
    assert cell.pending  # the newer value is not on disk
    disk.writer.finish()
    disk.commits.completed()
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
    disk.commits.completed()
    assert disk.names() == [f"{number}" for number in range(50)]
    assert [disk.stored(cell, "key") for cell in cells] == list(range(50))
    assert disk.commits.count == 1


def test_delete_all_hides_what_is_on_disk_until_it_is_gone(disk):
    """S27: and what was written before it in the same batch."""
    cell = disk.cell("r")
    disk.turn(cell, "a", old=1, older=2)
    disk.commits.end_round()
    disk.writer.finish()
    disk.commits.completed()
    disk.turn(cell, "b", mid=1)
    disk.turn(cell, "c", clear=True, new=1)
    assert (cell.pending, cell.pending_cleared) == ({"new": encode(1)}, True)
    disk.turn(cell, "d", newer=2, new=None)
    disk.commits.end_round()
    disk.turn(cell, "e", last=3)
    disk.writer.finish()
    disk.commits.completed()
    assert [disk.stored(cell, key) for key in ("old", "older", "mid", "new", "newer")] == [None] * 4 + [2]
    disk.writer.finish()
    disk.commits.completed()
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
    disk.commits.completed()
    assert seen == ["at once", ["a"]]


def test_nobody_waits_for_results_once_they_are_forgotten(disk):
    """S34: the gateway has gone; what is on its way to disk gets there, what is not has not happened."""
    cell, other = disk.cell("r"), disk.cell("other")
    disk.turn(cell, "a", key=1)
    disk.commits.after(cell, lambda: pytest.fail("nobody waits"))
    disk.commits.end_round()
    disk.turn(other, "b", key=1)
    disk.commits.forget()
    disk.writer.finish()
    disk.commits.completed()
    assert (disk.names(), disk.stored(cell, "key"), disk.stored(other, "key")) == ([], 1, None)
    assert disk.commits.idle
    again = disk.cell("r")
    disk.turn(again, "c", key=2)
    disk.commits.end_round()
    disk.writer.finish()
    disk.commits.completed()
    assert (disk.names(), disk.stored(again, "key")) == (["c"], 2)


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
    disk.commits.completed()
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

    def fail(batch: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "_exit", die)
    for shard in disk.shards.values():
        monkeypatch.setattr(shard, "commit", fail)
    monkeypatch.setattr(hibernation.commits, "log", _Quiet())
    disk.turn(disk.cell("r"), "a", key=1)
    with pytest.raises(Died):
        disk.commits.end_round()
        disk.writer.finish()
        disk.commits.completed()
    assert statuses == [os.EX_IOERR]
    assert disk.names() == []
    disk.close()


class _Quiet:
    def critical(self, *_: Any, **__: Any) -> None:
        pass
