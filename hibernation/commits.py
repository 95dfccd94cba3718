"""Group commit: the turns of a round that wrote commit together, and nothing of them leaves before.

Owns the batch that is being formed, the one that is on its way to disk, and the results that wait for either.
Must not know links or rooms' code. Peers: `storage` below, the host above, which takes what `release` hands
out.

Invariants:
    H2  no result is released before all that its turn wrote, or could have read, is committed
    H3  results of a room are released in the order in which its turns ended
"""

import os
from collections.abc import Callable
from typing import Any

from hibernation import wire
from hibernation.cells import Batch, Cell
from hibernation.logs import get_logger
from hibernation.room import Connection, Room
from storage.shards import Shard, ShardBatch
from storage.writer import Writer

log = get_logger("commits")


class Commits:
    """See the module.

    Args:
        shards: The open shards of this host, by index.
        shard_count: How many the instance has.
        writer: The thread for commits; None: commit on this thread, which `durability` "os" makes cheap
            (S21).
        released: Given each batch whose results may leave.
    """

    def __init__(
        self,
        shards: dict[int, Shard],
        shard_count: int,
        writer: Writer,
        inline: bool,
        released: Callable[[Batch], None],
    ) -> None:
        self._shards = shards
        self._shard_count = shard_count
        self._writer = writer
        self._inline = inline
        self._released = released
        self._forming = Batch(1)
        self._committing: Batch | None = None
        self.count = 0

    @property
    def idle(self) -> bool:
        """Whether nothing waits for the disk."""
        return self._committing is None and not self._forming.results

    def stage(self, cell: Cell, room: Room) -> None:
        """Take over the writes of a turn that has ended well: later turns of the room read them from here."""
        storage = room.storage
        forming = self._forming
        index = self.shard_of(cell.key)
        batch = forming.shards.get(index)
        if batch is None:
            batch = forming.shards[index] = ShardBatch()
        if storage._cleared:
            batch.clear(cell.key)
            cell.pending.clear()
            cell.pending_cleared = room._pending_cleared = True
            storage._cleared = False
        for name, blob in storage._writes.items():
            if blob is None:
                batch.delete(cell.key, name)
            else:
                batch.put(cell.key, name, blob)
        cell.pending.update(storage._writes)
        storage._writes.clear()
        cell.gate = forming.number
        forming.cells.add(cell)

    def hold(self, cell: Cell, result: list[Any], edits: list[tuple[Cell, Connection]]) -> None:
        """Keep a result until the newest writes of its room are on disk."""
        batch = self._batch_of(cell)
        batch.results.append(result)
        batch.edits.extend(edits)

    def after(self, cell: Cell, action: Callable[[], None]) -> None:
        """Call `action` when the newest writes of the room are on disk; now, if they are."""
        if cell.gate:
            self._batch_of(cell).after.append(action)
        else:
            action()

    def _batch_of(self, cell: Cell) -> Batch:
        committing = self._committing
        return committing if committing is not None and committing.number == cell.gate else self._forming

    def end_round(self) -> None:
        """Start the next commit, if there is something to commit and none is under way."""
        if self._committing is not None or not self._forming.results:
            return
        batch = self._forming
        self._forming = Batch(batch.number + 1)
        if not batch.shards:
            self._release(batch)
            return
        self.count += 1
        if not self._inline:
            self._committing = batch
            self._writer.submit(lambda: self._write(batch))
            return
        try:
            self._write(batch)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the outcome is unknown
            _die(error)
        self._release(batch)
        due = [self._shards[index] for index in batch.shards if self._shards[index].checkpoint_due]
        if due:
            # Long enough to be the writer thread's matter; commits wait for its end, behind an empty batch.
            self._committing = Batch(0)
            self._writer.submit(lambda: _checkpoint(due))

    def completed(self) -> None:
        """The writer thread has finished a commit, or a checkpoint."""
        for _, error in self._writer.completed():
            if error is not None:
                _die(error)
            batch, self._committing = self._committing, None
            assert batch is not None
            self._release(batch)
        self.end_round()

    def forget(self) -> None:
        """Nobody waits for results any more; what is on its way to disk goes there."""
        self._forming = Batch(self._forming.number + 1)
        if self._committing is not None:
            committing = self._committing
            committing.cells.clear()
            committing.results.clear()
            committing.edits.clear()
            committing.after.clear()

    def shard_of(self, key: str) -> int:
        """The shard that holds a room's storage."""
        return wire.partition_of(key) % self._shard_count

    def _write(self, batch: Batch) -> None:
        for index, changes in batch.shards.items():
            self._shards[index].commit(changes)

    def _release(self, batch: Batch) -> None:
        for cell in batch.cells:
            if cell.gate == batch.number:
                cell.gate = 0
                cell.pending.clear()
                cell.pending_cleared = False
                if cell.room is not None:
                    cell.room._pending_cleared = False
        self._released(batch)
        for action in batch.after:
            action()


def _checkpoint(shards: list[Shard]) -> None:
    for shard in shards:
        shard.checkpoint()


def _die(error: BaseException) -> None:
    """End this host: the outcome is unknown, so nothing may leave. The next one reads what is on disk, and
    every event that was not acknowledged is delivered to it again.
    """
    log.critical("commit failed: this host ends, its events are delivered again", error=repr(error))
    os._exit(os.EX_IOERR)
