"""Group commit: the turns of a round that wrote commit together, and nothing of them leaves before.

Owns the batch that is being formed, the one that is on its way to disk, the results that wait for either, and
the outbox: with a batch's writes go the results that it releases, as a row in each shard concerned. So
whether a turn has happened is the same question as whether its result is in the outbox (S22). Must not know
links or rooms' code. Peers: `storage` below, the host above, which takes what `released` hands out and says
what has been `executed`.

A commit that the disk refuses is kept and tried again, as it is, for as long as it takes (S36): `paused` says
why. What was committed on one shard is not committed again when another shard of the batch refuses. One whose
outcome is unknown ends the process: the next one finds in the outbox what was committed.

Invariants:
    H2  no result is released before all that its turn wrote, or could have read, is committed
    H3  results of a room are released in the order in which its turns ended
    H6  a result that its turn's commit releases is in the outbox from that commit until it is executed
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, Final

from cbor2 import dumps

from hibernation import wire
from hibernation.cells import Batch, Cell
from hibernation.logs import get_logger
from hibernation.room import Connection, Turn
from storage.blame import BlameBatch
from storage.errors import CommitRefused
from storage.shards import Row, Shard, ShardBatch
from storage.writer import Writer

#: A row of the outbox is cut in two above this, if it holds several results: each link message holds whole
#: rows, and SQLite takes no more than a thousand million bytes at once.
ROW_BYTES_MAX: Final = 16 * 1024 * 1024

log = get_logger("commits")


class Commits:
    """See the module.

    Args:
        shards: The open shards of this host, by index.
        shard_count: How many the instance has.
        writer: The thread for commits.
        inline: Commit on this thread, which `durability` "os" makes cheap (S21).
        released: Given each batch whose results may leave.
        paused: Called when the disk refuses a commit, with the reason, and with None when it takes it.
        ready: Whether a batch may be committed now; if not, `end_round` is called again.
    """

    def __init__(
        self,
        shards: dict[int, Shard],
        shard_count: int,
        writer: Writer,
        inline: bool,
        released: Callable[[Batch], None],
        paused: Callable[[str | None], None] = lambda _: None,
        ready: Callable[[Batch], bool] = lambda _: True,
    ) -> None:
        self._shards = shards
        self._shard_count = shard_count
        self._writer = writer
        self._inline = inline
        self._released = released
        self._on_paused = paused
        self._ready = ready
        self._forming = Batch(1)
        self._committing: Batch | None = None
        self._retry_wanted = False
        #: By shard: the newest row that has been executed, and the newest that has been deleted.
        self._executed: dict[int, int] = {}
        self._deleted: dict[int, int] = {}
        self.count = 0
        #: Why the disk refuses what is to be committed; None: it does not.
        self.paused: str | None = None
        # Set by the host: says that what runs has nothing to do with the end that comes.
        self.absolve: Callable[[], None] = lambda: None

    @property
    def idle(self) -> bool:
        """Whether nothing waits for the disk."""
        return self._committing is None and not (self._forming.results or self._forming.after)

    @property
    def writing(self) -> bool:
        """Whether a commit is under way."""
        return self._committing is not None

    @property
    def waiting_bytes(self) -> int:
        """What turns have staged that is not yet on disk, about."""
        committing = self._committing
        return self._forming.bytes + (committing.bytes if committing is not None else 0)

    def stage(self, cell: Cell, turn: Turn) -> None:
        """Take over the writes of a turn that has ended well: later turns of the room read them from here."""
        forming = self._forming
        index = cell.shard
        if index < 0:
            index = cell.shard = self.shard_of(cell.key)
        batch = forming.shards.get(index)
        if batch is None:
            batch = forming.shards[index] = ShardBatch()
        if turn.cleared:
            batch.clear(cell.key)
            cell.pending.clear()
            cell.pending_cleared = True
            assert cell.room is not None
            cell.room._pending_cleared = True
        writes = turn.writes
        if writes is not None:
            for name, blob in writes.items():
                if blob is None:
                    batch.delete(cell.key, name)
                else:
                    batch.put(cell.key, name, blob)
            cell.pending.update(writes)
        cell.gate = forming.number
        forming.cells.add(cell)

    def hold(
        self, cell: Cell, result: list[Any], edits: list[tuple[Cell, Connection]], size_bytes: int = 0
    ) -> None:
        """Keep a result until the newest writes of its room are on disk. `size_bytes`: of all its turn
        staged, about.
        """
        batch = self._batch_of(cell)
        batch.bytes += size_bytes
        if batch is not self._forming:
            batch.late.append(result)
        elif (results := batch.results.get(cell.shard)) is not None:
            results.append(result)
        else:
            batch.results[cell.shard] = [result]
        if edits:
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
        """Start the next commit, if there is something to commit and none is under way.

        A row on disk says that its connections have come so far. What they did before without writing must
        not be lost with this process: so a batch waits until the gateway has that (`ready`).
        """
        if self._committing is not None or not (self._forming.results or self._forming.after):
            return
        batch = self._forming
        if not self._ready(batch):
            return
        self._forming = Batch(batch.number + 1)
        self._seal(batch)
        self.count += 1
        if not self._inline:
            self._start(batch)
            return
        try:
            self._write(batch)
        except CommitRefused as error:
            self._refused(batch, error)
            return
        except BaseException as error:  # noqa: BLE001 - whatever it is, the outcome is unknown
            self._die(error)
        self._release(batch)
        due = [self._shards[index] for index in batch.shards if self._shards[index].checkpoint_due]
        if due:
            # Long enough to be the writer thread's matter; commits wait for its end, behind an empty batch.
            self._committing = Batch(0)
            self._writer.submit(lambda: _checkpoint(due))

    def _seal(self, batch: Batch) -> None:
        """Nothing is added to what the batch commits: number and encode its rows."""
        for index in batch.shards:
            rows = batch.rows[index] = []
            if results := batch.results.get(index):
                self._encode(self._shards[index], results, rows)
            executed = self._executed.get(index, 0)
            if executed > self._deleted.get(index, 0):
                batch.executed[index] = executed
        batch.results.clear()
        batch.left = list(batch.shards)

    def _encode(self, shard: Shard, results: list[Any], rows: list[Row]) -> None:
        encoded = dumps(results)
        if len(encoded) > ROW_BYTES_MAX and len(results) > 1:
            half = len(results) // 2
            self._encode(shard, results[:half], rows)
            self._encode(shard, results[half:], rows)
        else:
            rows.append((shard.next_row(), encoded))

    def _start(self, batch: Batch) -> None:
        self._committing = batch
        self._writer.submit(lambda: self._write(batch))

    def completed(self) -> None:
        """The writer thread has finished a commit, or a checkpoint. Let what it released leave, and then
        `end_round`.
        """
        for _, error in self._writer.completed():
            batch = self._committing
            assert batch is not None
            if isinstance(error, CommitRefused):
                if batch.number:
                    self._refused(batch, error)
                    continue
                batch.executed.clear()  # it was only the outbox; there is time
            elif error is not None:
                self._die(error)
            self._committing = None
            self._release(batch)

    # --- A disk that takes nothing ----------------------------------------------------------------

    def _refused(self, batch: Batch, error: CommitRefused) -> None:
        """Nothing was written on some shard: the batch stays, and `retry` is to be called."""
        self._committing = batch
        self._retry_wanted = True
        reason = f"{error.reason}. {error.remedy}."
        if self.paused is None:
            log.error("the disk refuses a commit: rooms that wait for it pause", error=str(error))
        if self.paused != reason:
            self.paused = reason
            self._on_paused(reason)

    def retry(self) -> None:
        """Try the refused commit again, on the writer thread."""
        if self._retry_wanted:
            self._retry_wanted = False
            assert self._committing is not None
            self._start(self._committing)

    def _resume(self) -> None:
        self.paused = None
        log.info("the disk takes commits again: rooms go on")
        self._on_paused(None)

    # --- The outbox -------------------------------------------------------------------------------

    def executed(self, shard: int, row: int) -> None:
        """Rows up to this one have been executed: the next commit takes them out of the outbox."""
        if row > self._executed.get(shard, 0):
            self._executed[shard] = row

    @property
    def untidy(self) -> bool:
        """Whether executed rows are still in the outbox."""
        deleted = self._deleted
        return any(row > deleted.get(shard, 0) for shard, row in self._executed.items())

    def tidy(self) -> None:
        """Take executed rows out of the outbox, if no commit is under way that does it."""
        if self._committing is not None or self._forming.results or not self.untidy:
            return
        batch = Batch(0)
        for shard, row in self._executed.items():
            if row > self._deleted.get(shard, 0):
                batch.executed[shard] = row
                batch.shards[shard] = ShardBatch()
        batch.left = list(batch.shards)
        self._start(batch)

    def close(self) -> None:
        """At a clean end, when the writer has ended: take executed rows out of the outbox, if the disk lets
        us.
        """
        for shard, row in self._executed.items():
            if row > self._deleted.get(shard, 0):
                with contextlib.suppress(CommitRefused):
                    self._shards[shard].commit(ShardBatch(), (), row)

    # --- What ended hosts -------------------------------------------------------------------------

    def blaming(self, index: int) -> BlameBatch:
        """The changes of suspects, dead letters and quarantine that the next commit of this shard takes."""
        forming = self._forming
        batch = forming.shards.get(index)
        if batch is None:
            batch = forming.shards[index] = ShardBatch()
        return batch.blaming

    def blaming_of(self, cell: Cell) -> BlameBatch:
        """The same for this room: results of it wait for that commit."""
        if cell.shard < 0:
            cell.shard = self.shard_of(cell.key)
        blaming = self.blaming(cell.shard)
        cell.gate = self._forming.number
        self._forming.cells.add(cell)
        return blaming

    def when_stored(self, action: Callable[[], None]) -> None:
        """Call `action` when all that has been staged is on disk; the commit begins with the next round."""
        self._forming.after.append(action)

    def forget(self) -> None:
        """The gateway has gone. Results stay, and leave when they are on disk; nobody waits for anything
        else.
        """
        for batch in (self._forming, self._committing):
            if batch is not None:
                batch.edits.clear()
                batch.after.clear()

    def abandon(self) -> None:
        """The turns whose commit has not begun have not been: their events are given out again. Only when no
        room is in memory, which could have read what they wrote.
        """
        self._forming = Batch(self._forming.number + 1)

    def shard_of(self, key: str) -> int:
        """The shard that holds a room's storage."""
        return wire.partition_of(key) % self._shard_count

    def _write(self, batch: Batch) -> None:
        left = batch.left
        while left:
            index = left[-1]
            self._shards[index].commit(
                batch.shards[index], batch.rows.get(index, ()), batch.executed.get(index, 0)
            )
            left.pop()

    def _release(self, batch: Batch) -> None:
        self._deleted.update(batch.executed)
        if self.paused is not None and batch.number:
            self._resume()
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

    def _die(self, error: BaseException) -> None:
        """End this host: the outcome is unknown, so nothing may leave. The next one reads the outbox:
        what is in it was committed, and every other event that was not acknowledged is delivered to it again.
        No turn is to blame (S23).
        """
        self.absolve()
        log.critical("commit failed: this host ends, its events are delivered again", error=repr(error))
        os._exit(os.EX_IOERR)


def _checkpoint(shards: list[Shard]) -> None:
    for shard in shards:
        shard.checkpoint()
