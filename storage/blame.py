"""What a shard keeps about events that end hosts: suspects, dead letters, rooms in quarantine.

Owns the statements on these three tables. A suspect is opaque here, eight values as `hibernation.suspects`
has them; so is the event of a dead letter. Writes ride in a `ShardBatch`; reads use the shard's reader.
Peers: `storage.shards`, whose transaction this is part of, and `hibernation.blame`.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.shards import Shard

__all__ = ["BlameBatch", "BlameTables", "Letter", "Quarantined"]

SuspectRow = tuple[int, int, int, int, int, float, str, int]
"""who, what, deaths, seen, alone, since, reason, code."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    `id` is None before it is stored. `who` and `what` name the event; a second letter of one event is not
    kept. `died_at` is seconds since 1970.
    """

    id: int | None
    room: str
    who: int
    what: int
    event: bytes
    tries: int
    reason: str
    died_at: float


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One room that does not start."""

    room: str
    reason: str
    since: float
    code: int


class BlameBatch:
    """Changes of these tables, in order. Touches no disk. Threads: as `storage.shards.ShardBatch`."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[str, Sequence[Sequence[Any]]]] = []

    def suspect(self, rows: Iterable[SuspectRow]) -> None:
        """Store suspects, over what was known of them."""
        self._steps.append(("REPLACE INTO suspects VALUES (?, ?, ?, ?, ?, ?, ?, ?)", list(rows)))

    def acquit(self, marks: Iterable[tuple[int, int]]) -> None:
        """Forget suspects."""
        self._steps.append(("DELETE FROM suspects WHERE who = ? AND what = ?", list(marks)))

    def acquit_all(self) -> None:
        """Forget every suspect."""
        self._steps.append(("DELETE FROM suspects", [()]))

    def bury(self, letter: Letter) -> None:
        """Store a dead letter."""
        values = (
            letter.room,
            letter.who,
            letter.what,
            letter.event,
            letter.tries,
            letter.reason,
            letter.died_at,
        )
        sql = (
            "INSERT OR IGNORE INTO dead_letters (room, who, what, event, tries, reason, died_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        self._steps.append((sql, [values]))

    def remove(self, letter_id: int) -> None:
        """Remove a dead letter."""
        self._steps.append(("DELETE FROM dead_letters WHERE id = ?", [(letter_id,)]))

    def quarantine(self, room: Quarantined) -> None:
        """Store that a room does not start."""
        values = (room.room, room.reason, room.since, room.code)
        self._steps.append(("REPLACE INTO quarantine VALUES (?, ?, ?, ?)", [values]))

    def release(self, rooms: Iterable[str]) -> None:
        """Forget that these rooms do not start."""
        self._steps.append(("DELETE FROM quarantine WHERE room = ?", [(room,) for room in rooms]))

    def write(self, writer: sqlite3.Connection) -> None:
        """Make the changes, within the caller's transaction."""
        for sql, rows in self._steps:
            writer.executemany(sql, rows)

    @property
    def size_bytes(self) -> int:
        """About how much it writes."""
        return sum(
            len(value) for _, rows in self._steps for row in rows for value in row if type(value) is bytes
        )

    def __bool__(self) -> bool:
        return bool(self._steps)


class BlameTables:
    """These tables of one shard, to be read. What was staged and is not committed does not show."""

    def __init__(self, shard: "Shard") -> None:
        self._shard = shard

    def suspects(self) -> list[SuspectRow]:
        """All suspects."""
        rows: list[SuspectRow] = self._shard.read("SELECT * FROM suspects", ())
        return rows

    def quarantined(self) -> list[Quarantined]:
        """All rooms in quarantine."""
        return [Quarantined(*row) for row in self._shard.read("SELECT * FROM quarantine", ())]

    def letters(self, after: int, limit: int) -> list[Letter]:
        """Dead letters by id, from the one after `after` on, at most `limit`."""
        rows = self._shard.read("SELECT * FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [Letter(*row) for row in rows]

    def letter(self, letter_id: int) -> Letter | None:
        """One dead letter, or None."""
        rows = self._shard.read("SELECT * FROM dead_letters WHERE id = ?", (letter_id,))
        return Letter(*rows[0]) if rows else None

    def count(self) -> int:
        """How many dead letters there are."""
        return int(self._shard.read("SELECT count(*) FROM dead_letters", ())[0][0])
