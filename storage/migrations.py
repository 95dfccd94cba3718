"""The schemas of all kinds of database, as append-only lists of steps.

Owns every table definition. A step that has been released is never edited: a change is a new step at the end.
The version of a file is the number of steps applied, kept in `PRAGMA user_version` (which SQLite stores in
the first page, so that it can be read without opening the file) and set in the same transaction as the step;
sqlite-utils keeps its own record beside it. sqlite-utils is imported only when a step is due: it costs a
tenth of a second and megabytes.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database

Step = Callable[["Database"], None]


@dataclass(frozen=True)
class Schema:
    """One kind of database: its name and its steps, oldest first. `version` is the newest that this code
    knows.
    """

    name: str
    steps: tuple[Step, ...]

    @property
    def version(self) -> int:
        """The newest version that this code knows: the number of steps."""
        return len(self.steps)

    def upgrade(self, connection: sqlite3.Connection) -> None:
        """Apply the steps that `connection`'s database lacks, each in a transaction of its own."""
        from sqlite_utils import Database
        from sqlite_utils.migrations import Migrations

        database = Database(connection, execute_plugins=False)
        migrations = Migrations(self.name)
        for version, step in enumerate(self.steps, start=1):
            migrations(name=step.__name__)(_numbered(step, version))
        migrations.apply(database)


def _numbered(step: Step, version: int) -> Step:
    def apply(database: "Database") -> None:
        step(database)
        database.execute(f"PRAGMA user_version = {version:d}")

    return apply


def registry_1_connections_and_tags(database: "Database") -> None:
    """Connections by number, their tags, and the highest number ever given out.

    `room_hash` stands for (party, room) in every index: eight bytes instead of two texts keep the trees
    small, and queries compare party and room as well, so that two rooms of one hash do no harm. `tags` is
    clustered by number, so that a connection's tags are written and deleted side by side; `tags_by_room`
    finds a room's matches in order.
    """
    database.execute(
        """
        CREATE TABLE connections (
            number INTEGER PRIMARY KEY,
            room_hash INTEGER NOT NULL,
            party TEXT NOT NULL,
            room TEXT NOT NULL,
            id TEXT NOT NULL,
            uri TEXT NOT NULL,
            accepted_at REAL NOT NULL,
            tags BLOB NOT NULL,
            state BLOB,
            close_code INTEGER,
            close_reason TEXT,
            close_clean INTEGER,
            close_cause TEXT
        ) STRICT
        """
    )
    database.execute("CREATE INDEX connections_by_room ON connections (room_hash)")
    database.execute("CREATE INDEX connections_by_id ON connections (room_hash, id)")
    database.execute(
        """
        CREATE TABLE tags (
            number INTEGER NOT NULL,
            tag TEXT NOT NULL,
            room_hash INTEGER NOT NULL,
            PRIMARY KEY (number, tag)
        ) STRICT, WITHOUT ROWID
        """
    )
    database.execute("CREATE INDEX tags_by_room ON tags (room_hash, tag)")
    database.execute("CREATE TABLE numbers (highest INTEGER NOT NULL) STRICT")
    database.execute("INSERT INTO numbers (highest) VALUES (0)")


def registry_2_addresses(database: "Database") -> None:
    """Where a connection comes from: a gateway that takes it over counts it again."""
    database.execute("ALTER TABLE connections ADD COLUMN address TEXT NOT NULL DEFAULT ''")


def registry_3_auto_responses(database: "Database") -> None:
    """What rooms have told the gateway to answer by itself, by room ("party/id"): a list of rules as CBOR."""
    database.execute(
        "CREATE TABLE auto_responses (room TEXT PRIMARY KEY, rules BLOB NOT NULL) STRICT, WITHOUT ROWID"
    )


def shard_1_entries(database: "Database") -> None:
    """Room storage, clustered by room and key; and the generation, raised each time a host opens the file."""
    database.execute(
        """
        CREATE TABLE entries (
            room TEXT NOT NULL,
            key TEXT NOT NULL,
            value BLOB NOT NULL,
            PRIMARY KEY (room, key)
        ) STRICT, WITHOUT ROWID
        """
    )
    database.execute("CREATE TABLE generations (generation INTEGER NOT NULL) STRICT")
    database.execute("INSERT INTO generations (generation) VALUES (0)")


def shard_2_outbox(database: "Database") -> None:
    """Results of turns, in the order of their commits, from the commit until the gateway has carried them
    out.
    """
    database.execute("CREATE TABLE outbox (seq INTEGER PRIMARY KEY, items BLOB NOT NULL) STRICT")


def shard_3_dead_letters(database: "Database") -> None:
    """What may have ended a host, what did so again and again, and rooms that do not start.

    `who` and `what` name an event as `hibernation.running` does; a dead letter holds all of it, as CBOR.
    """
    database.execute(
        """
        CREATE TABLE suspects (
            who INTEGER NOT NULL,
            what INTEGER NOT NULL,
            deaths INTEGER NOT NULL,
            seen INTEGER NOT NULL,
            alone INTEGER NOT NULL,
            since REAL NOT NULL,
            reason TEXT NOT NULL,
            code INTEGER NOT NULL,
            PRIMARY KEY (who, what)
        ) STRICT, WITHOUT ROWID
        """
    )
    database.execute(
        """
        CREATE TABLE dead_letters (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            room TEXT NOT NULL,
            who INTEGER NOT NULL,
            what INTEGER NOT NULL,
            event BLOB NOT NULL,
            tries INTEGER NOT NULL,
            reason TEXT NOT NULL,
            died_at REAL NOT NULL,
            UNIQUE (who, what)
        ) STRICT
        """
    )
    database.execute(
        """
        CREATE TABLE quarantine (
            room TEXT PRIMARY KEY,
            reason TEXT NOT NULL,
            since REAL NOT NULL,
            code INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """
    )


def shard_4_alarms(database: "Database") -> None:
    """Alarms of rooms, clustered by room and name; and the last tick of each cron.

    Times are milliseconds since 1970. Only what is to be run is in the indexes by due time, which hold all
    that is asked of them: rooms are woken from these alone.
    """
    database.execute(
        """
        CREATE TABLE alarms (
            room TEXT NOT NULL,
            name TEXT NOT NULL,
            number INTEGER NOT NULL,
            due_ms INTEGER NOT NULL,
            scheduled_ms INTEGER NOT NULL,
            payload BLOB,
            attempt INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            reason TEXT NOT NULL,
            PRIMARY KEY (room, name)
        ) STRICT, WITHOUT ROWID
        """
    )
    database.execute("CREATE INDEX alarms_by_due ON alarms (due_ms, number, failed) WHERE failed = 0")
    database.execute("CREATE INDEX alarms_of_room ON alarms (room, due_ms, number, failed) WHERE failed = 0")
    database.execute("CREATE INDEX alarms_failed ON alarms (failed, room) WHERE failed = 1")
    database.execute(
        """
        CREATE TABLE crons (
            name TEXT PRIMARY KEY,
            schedule TEXT NOT NULL,
            last_ms INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """
    )


def shard_5_own_databases(database: "Database") -> None:
    """Rooms whose storage lies in a database of their own, and no longer in `entries`."""
    database.execute("CREATE TABLE own_databases (room TEXT PRIMARY KEY) STRICT, WITHOUT ROWID")


def room_1_entries_and_outbox(database: "Database") -> None:
    """What the shard keeps of other rooms, under names that leave all others to the room's code.

    `_broker_facts` has one row: whose database this is ("" until something was committed), the newest
    generation of the shard that has written, and the last changes of alarms, of which the shard is told next.
    """
    database.execute(
        """
        CREATE TABLE _broker_entries (
            key TEXT PRIMARY KEY,
            value BLOB NOT NULL
        ) STRICT, WITHOUT ROWID
        """
    )
    database.execute("CREATE TABLE _broker_outbox (seq INTEGER PRIMARY KEY, items BLOB NOT NULL) STRICT")
    database.execute(
        """
        CREATE TABLE _broker_facts (
            room TEXT NOT NULL,
            generation INTEGER NOT NULL,
            alarms BLOB
        ) STRICT
        """
    )
    database.execute("INSERT INTO _broker_facts (room, generation) VALUES ('', 0)")


REGISTRY = Schema(
    "registry", (registry_1_connections_and_tags, registry_2_addresses, registry_3_auto_responses)
)
SHARD = Schema(
    "shard", (shard_1_entries, shard_2_outbox, shard_3_dead_letters, shard_4_alarms, shard_5_own_databases)
)
ROOM = Schema("room", (room_1_entries_and_outbox,))
