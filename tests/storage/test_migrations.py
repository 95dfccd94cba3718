"""Schemas: append-only, each step once, the version where it can be read without SQLite."""

import hashlib
import sqlite3
import subprocess
import sys

import pytest

from storage.database import database_version, open_database
from storage.migrations import REGISTRY, ROOM, SHARD, Schema


def add_note(database):
    database.execute("ALTER TABLE entries ADD COLUMN note TEXT")


def fail(database):
    database.execute("CREATE TABLE half (x)")
    raise sqlite3.OperationalError("no")


def opened(path, schema):
    return open_database(path, synchronous="full", cache_kib=64, schema=schema)


@pytest.mark.parametrize(
    ("schema", "digests"),
    [
        (REGISTRY, ["a69af6f34ba3", "8a87fcc4baa2", "187ba97f7345"]),
        (SHARD, ["e99bc0fa614e", "4fca09787485", "14676b657e4e", "44bc3307ca34", "a8cd70f13b88"]),
        (ROOM, ["5d0eb30c4cdd"]),
    ],
)
def test_released_steps_are_never_edited(tmp_path, schema, digests):
    """A change to a table is a new step at the end, with a line here; the digests before it stay."""
    found = []
    for version in range(1, schema.version + 1):
        connection = opened(tmp_path / f"{version}.db", Schema(schema.name, schema.steps[:version]))
        tables = connection.execute(
            "SELECT sql FROM sqlite_schema"
            " WHERE sql IS NOT NULL AND tbl_name NOT GLOB '_sqlite_*' ORDER BY name"
        ).fetchall()
        connection.close()
        found.append(hashlib.sha256(repr(tables).encode()).hexdigest()[:12])
    assert found == digests


def test_a_file_of_an_older_broker_is_brought_up_to_date_and_keeps_its_rows(tmp_path):
    path = tmp_path / "a.db"
    connection = opened(path, SHARD)
    connection.execute("INSERT INTO entries VALUES ('r', 'k', x'01')")
    connection.close()
    newer = Schema("shard", (*SHARD.steps, add_note))
    connection = opened(path, newer)
    assert connection.execute("SELECT room, key, value, note FROM entries").fetchall() == [
        ("r", "k", b"\1", None)
    ]
    # At once in the file's first page, not in the log alone.
    other = path.with_name("copy.db")
    other.write_bytes(path.read_bytes())
    assert database_version(other) == newer.version
    connection.close()
    opened(path, newer).close()


def test_a_step_that_fails_leaves_the_version_and_the_tables_as_they_were(tmp_path):
    path = tmp_path / "a.db"
    opened(path, SHARD).close()
    with pytest.raises(sqlite3.OperationalError, match="no"):
        opened(path, Schema("shard", (*SHARD.steps, add_note, fail)))
    assert database_version(path) == SHARD.version + 1
    connection = opened(path, Schema("shard", (*SHARD.steps, add_note)))
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'half'").fetchone() == (0,)
    connection.close()


def test_sqlite_utils_is_loaded_only_when_a_step_is_due(tmp_path):
    """It costs a tenth of a second and megabytes in every gateway and host."""
    opened(tmp_path / "a.db", SHARD).close()
    code = (
        "import sys\n"
        "from storage.database import open_database\n"
        "from storage.migrations import SHARD\n"
        "open_database(sys.argv[1], synchronous='full', cache_kib=64, schema=SHARD).close()\n"
        "print('sqlite_utils' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.db"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "False\n"
