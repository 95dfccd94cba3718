"""Which tick of each cron has been run last, so that none is run twice (S31).

Owns the statements on the table `crons`, which only the first shard of an instance uses. Writes ride in a
`ShardBatch`. Its peer is `hibernation.crons`.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

__all__ = ["CronRow", "read_crons", "write_crons"]


class CronRow(NamedTuple):
    """One cron: the text of its schedule, and its last tick, in milliseconds since 1970."""

    name: str
    schedule: str
    last_ms: int


def read_crons(read: Callable[[str, Sequence[Any]], list[Any]]) -> dict[str, CronRow]:
    """All that are stored, by name. `read` runs a question, such as `Shard.read`."""
    return {row[0]: CronRow(*row) for row in read("SELECT name, schedule, last_ms FROM crons", ())}


def write_crons(writer: sqlite3.Connection, rows: Iterable[CronRow]) -> None:
    """Store rows over what was stored under their names, within the caller's transaction."""
    writer.executemany("REPLACE INTO crons (name, schedule, last_ms) VALUES (?, ?, ?)", list(rows))
