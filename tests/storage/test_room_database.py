"""What a room's statements may do, and what is left of those that fail (S28)."""

import datetime as dt
import decimal
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.room_database
from storage.errors import (
    CommitRefused,
    DatabaseDamaged,
    DataDirectoryError,
    SchemaTooNew,
    SqlError,
    StorageLimitError,
)
from storage.room_database import (
    ROW_OVERHEAD_BYTES,
    VALUE_OVERHEAD_BYTES,
    RoomDatabase,
    database_path,
)
from storage.shards import KEY_BYTES_MAX, Shard, ShardBatch
from storage.sql_guard import CELL_BYTES_MAX, STATEMENT_BYTES_MAX, at_once
from storage.values import VALUE_BYTES_MAX

ENDLESS = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
MIB = 1024 * 1024


class Room:
    """A room's database in the hands of a turn."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.shard = Shard(folder, 0, durability="full")
        (folder / "rooms" / "0").mkdir(parents=True)
        self.database = RoomDatabase(folder, self.shard, "main/a", durability="full", create=True, **options)
        self.database.begin(self, lambda: None)

    def run(self, statement: str, *parameters: Any, depth: int = 0, **options: Any) -> Any:
        options = {"bytes_max": 16 * MIB, "seconds": 20.0, **options}
        return self.database.execute(statement, parameters, depth=depth, **options)

    def commit(self, batch: ShardBatch | None = None) -> None:
        self.database.end()
        self.database.commit(batch or ShardBatch(), [(self.shard.next_row(), b"row")])
        self.database.staged = False
        self.database.begin(self, lambda: None)

    def close(self) -> None:
        self.database.close()
        self.shard.close()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    yield made
    made.close()


def test_rows_are_dicts_of_what_sqlite_holds(room: Room) -> None:
    room.run("CREATE TABLE t (a, b, c, d, e)")
    values = (None, -(2**63), 1.5, "ä\0", b"\0\xff")
    assert room.run("INSERT INTO t VALUES (?, ?, ?, ?, ?) RETURNING *", *values) == [
        dict(zip("abcde", values, strict=True))
    ]
    assert room.run("SELECT a, 1 AS a, ? AS b FROM t", True) == [{"a": 1, "b": 1}]
    assert room.run("SELECT * FROM t WHERE b = 0") == []
    assert room.run("PRAGMA table_info(t)")[0]["name"] == "a"


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("BEGIN", "storage.transaction"),
        ("  commit ;", "storage.transaction"),
        ("ROLLBACK", "storage.transaction"),
        ("BEGIN IMMEDIATE", "storage.transaction"),
        ("SAVEPOINT x", "storage.transaction"),
        ("RELEASE _broker_1", "storage.transaction"),
        ("ROLLBACK TO _broker_1", "storage.transaction"),
        ("ATTACH 'other.db' AS other", "tables of this room"),
        ("DETACH main", "tables of this room"),
        ("VACUUM", "VACUUM"),
        ("VACUUM INTO '/tmp/copy.db'", "VACUUM"),
        ("PRAGMA journal_mode = delete", "PRAGMA journal_mode is not allowed"),
        ("PRAGMA user_version = 9", "PRAGMA user_version is not allowed"),
        ("PRAGMA writable_schema = on", "PRAGMA writable_schema is not allowed"),
        ("PRAGMA max_page_count = 1", "PRAGMA max_page_count is not allowed"),
        ("PRAGMA defer_foreign_keys = on", "referred to first"),
        ("PRAGMA main.defer_foreign_keys(1)", "referred to first"),
        ("CREATE TABLE x (y REFERENCES t DEFERRABLE INITIALLY DEFERRED)", "Leave out INITIALLY DEFERRED"),
        ("CREATE TABLE x (y, FOREIGN KEY (y) REFERENCES t deferrable/**/initially--\ndeferred)", "Leave out"),
        ("ALTER TABLE t ADD COLUMN y REFERENCES t DEFERRABLE INITIALLY DEFERRED", "Leave out INITIALLY"),
        ("SELECT load_extension('x')", "load_extension"),
        ("SELECT fts3_tokenizer('x')", "fts3_tokenizer"),
        ("CREATE TEMP TABLE x (y)", "Create a plain one"),
        ("CREATE TEMP VIEW x AS SELECT 1", "Create a plain one"),
        ("CREATE VIRTUAL TABLE x USING dbstat", "virtual tables of dbstat"),
        ("SELECT * FROM dbstat", "dbstat"),
        ("SELECT * FROM sqlite_stmt", "sqlite_stmt"),
        ("SELECT * FROM _broker_entries", "get, put, delete and list"),
        ('SELECT * FROM "_BROKER_entries"', "get, put, delete and list"),
        ("DELETE FROM _broker_entries", "get, put, delete and list"),
        ("SELECT room, generation FROM _broker_facts", "get, put, delete and list"),
        ("INSERT INTO _broker_outbox VALUES (1, x'')", "get, put, delete and list"),
        ("CREATE VIEW v AS SELECT * FROM _broker_facts", None),
        ("DROP TABLE _broker_outbox", "another name"),
        ("ALTER TABLE _broker_outbox RENAME TO mine", "another name"),
        ("CREATE INDEX i ON _broker_outbox (items)", "another name"),
        ("CREATE TRIGGER g AFTER INSERT ON _broker_outbox BEGIN SELECT 1; END", "another name"),
        ("CREATE TABLE _broker_mine (x)", "another name"),
        ("UPDATE sqlite_master SET sql = ''", "may not be modified"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT ?", "one parameter for each"),
        ("SELEC 1", "Correct the statement"),
        ("SELECT * FROM nowhere", "no such table"),
    ],
)
def test_what_is_not_for_rooms_is_refused_and_leaves_what_was(
    room: Room, statement: str, says: str | None
) -> None:
    """S28: told what and what instead; also the second time, and when one of ours has the same text."""
    room.run("CREATE TABLE t (a)")
    room.run("INSERT INTO t VALUES (1)", depth=1)
    for _ in range(2):
        if says is None:
            room.run(statement)
            says = "get, put, delete and list"
            statement = "SELECT * FROM v"
        with pytest.raises(SqlError) as caught:
            room.run(statement, depth=1)
        assert says in str(caught.value)
        assert statement.split()[0] in str(caught.value)
    assert room.run("SELECT * FROM t", depth=1) == [{"a": 1}]
    room.commit()
    assert room.run("SELECT * FROM t") == [{"a": 1}]
    assert not Path("/tmp/copy.db").exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (2**63, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        ("\ud800", "lone surrogate"),
        (decimal.Decimal(1), "str(x)"),
        (dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "isoformat"),
        (dt.date(2024, 1, 1), "isoformat"),
        (uuid.UUID(int=1), "str(x)"),
        (bytearray(b"x"), "bytes(x)"),
        ([1, 2], "one after another"),
        ((1, 2), "one after another"),
        ({"a": 1}, "json.dumps"),
        (NotImplemented, "None, int, float, str or bytes"),
    ],
    ids=repr,
)
def test_a_parameter_that_sqlite_does_not_hold_says_what_to_give(room: Room, value: Any, says: str) -> None:
    with pytest.raises(SqlError) as caught:
        room.run("SELECT ?, ?", 1, value)
    assert "parameter 2" in str(caught.value)
    assert says in caught.value.remedy or says in caught.value.reason
    assert room.run("SELECT ? AS x", 2**63 - 1) == [{"x": 2**63 - 1}]


def test_a_statement_is_text(room: Room) -> None:
    with pytest.raises(TypeError, match="not bytes"):
        room.run(b"SELECT 1")  # type: ignore[arg-type]
    with pytest.raises(SqlError, match="lone surrogate"):
        room.run("SELECT '\ud800'")
    assert room.run("") == []


def test_sizes_below_at_and_above_their_bounds(room: Room) -> None:
    """S28: statements, parameters, cells, results."""
    text = "SELECT 1 AS x -- é"
    for size in (STATEMENT_BYTES_MAX - 1, STATEMENT_BYTES_MAX):
        assert room.run(text + "x" * (size - len(text.encode()))) == [{"x": 1}]
    with pytest.raises(StorageLimitError) as caught:
        room.run(text + "x" * (STATEMENT_BYTES_MAX + 1 - len(text.encode())))
    assert (caught.value.given, caught.value.limit) == (STATEMENT_BYTES_MAX + 1, STATEMENT_BYTES_MAX)

    for value in (b"x", "x"):
        for size in (CELL_BYTES_MAX - 1, CELL_BYTES_MAX):
            assert room.run("SELECT length(?) AS x", value * size) == [{"x": size}]
        with pytest.raises(StorageLimitError) as caught:
            room.run("SELECT length(?) AS x", value * (CELL_BYTES_MAX + 1))
        assert (caught.value.given, caught.value.limit) == (CELL_BYTES_MAX + 1, CELL_BYTES_MAX)
    assert room.run("SELECT length(zeroblob(?)) AS x", CELL_BYTES_MAX) == [{"x": CELL_BYTES_MAX}]
    with pytest.raises(SqlError, match="2,097,152"):
        room.run("SELECT hex(zeroblob(?))", CELL_BYTES_MAX // 2 + 1)

    room.run("CREATE TABLE t (a)")
    row = ROW_OVERHEAD_BYTES + VALUE_OVERHEAD_BYTES + 10
    for count in (9, 10):
        made = room.run(
            f"INSERT INTO t VALUES {', '.join(['(?)'] * count)} RETURNING a",
            *["x" * 10] * count,
            bytes_max=10 * row,
        )
        assert len(made) == count
    with pytest.raises(StorageLimitError) as caught:
        room.run(
            f"INSERT INTO t VALUES {', '.join(['(?)'] * 11)} RETURNING a",
            *["x" * 10] * 11,
            bytes_max=10 * row,
        )
    assert (caught.value.given, caught.value.limit) == (11 * row, 10 * row)
    with pytest.raises(StorageLimitError, match="LIMIT"):
        room.run("SELECT a FROM t", bytes_max=10 * row)
    assert room.run("SELECT count(*) AS n FROM t") == [{"n": 19}]


def test_a_database_grows_to_its_bound_by_statements_and_keys_still_fit(tmp_path: Path) -> None:
    """S28: the statement that does not fit leaves nothing; what went before it in the turn stays."""
    room = Room(tmp_path, bytes_max=MIB)
    room.run("CREATE TABLE t (a)")
    count = 0
    with pytest.raises(StorageLimitError) as caught:
        while True:
            room.run("INSERT INTO t VALUES (zeroblob(50000))")
            count += 1
    assert caught.value.limit == MIB
    assert 15 <= count <= 20
    assert room.run("SELECT count(*) AS n FROM t") == [{"n": count}]
    batch = ShardBatch()
    batch.put("main/a", "k" * KEY_BYTES_MAX, b"x" * VALUE_BYTES_MAX)
    room.commit(batch)
    assert room.database.get("main/a", "k" * KEY_BYTES_MAX) == b"x" * VALUE_BYTES_MAX
    assert room.run("SELECT count(*) AS n FROM t") == [{"n": count}]
    room.close()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(
    "failing",
    [
        ENDLESS + "SELECT count(*) FROM c",
        ENDLESS + "INSERT INTO t SELECT -x FROM c",
        ENDLESS + "INSERT INTO t SELECT -x FROM c RETURNING a",
        "INSERT OR ROLLBACK INTO t VALUES (1)",
        "INSERT OR FAIL INTO t VALUES (1)",
        "INSERT INTO t VALUES (2), (1)",
        "INSERT INTO r VALUES (1)",
    ],
)
def test_a_statement_that_fails_takes_nothing_along(room: Room, failing: str, depth: int) -> None:
    """S28: also those with which SQLite undoes the whole transaction."""
    room.run("CREATE TABLE t (a UNIQUE)")
    room.run("CREATE TABLE r (a CHECK (a > 1))", depth=depth)
    room.run("INSERT INTO t VALUES (1)", depth=depth)
    for _ in range(2):
        with pytest.raises(SqlError) as caught:
            room.run(failing, depth=depth, seconds=0.05)
        assert caught.value.code
    assert room.run("SELECT * FROM t", depth=depth) == [{"a": 1}]
    if depth:
        room.database.leave(2, keep=False)
        room.database.leave(1, keep=True)
        assert room.run("SELECT name FROM sqlite_schema WHERE name IN ('r', 't')") == [{"name": "t"}]
    room.commit()
    assert room.run("SELECT * FROM t") == ([] if depth else [{"a": 1}])


def test_what_cannot_be_executed_again_fails_the_turn(room: Room) -> None:
    """S28: a turn that has been told something random cannot go on behind it; it leaves nothing."""
    room.run("CREATE TABLE t (a UNIQUE)")
    room.run("INSERT INTO t VALUES (random()) RETURNING a")
    with pytest.raises(SqlError, match="longer"):
        room.run(ENDLESS + "INSERT INTO t SELECT x FROM c", seconds=0.05)
    for attempt in (lambda: room.run("SELECT 1"), room.database.end):
        with pytest.raises(SqlError, match="cannot be repeated"):
            attempt()
    room.database.undo()
    room.database.begin(room, lambda: None)
    assert room.run("SELECT count(*) AS n FROM sqlite_schema WHERE name = 't'") == [{"n": 0}]


def test_tables_go_whatever_refers_to_what(room: Room) -> None:
    """S27: foreign keys that restrict, triggers, views, indexes, full-text search."""
    for statement in (
        "CREATE TABLE parent (id INTEGER PRIMARY KEY AUTOINCREMENT)",
        "CREATE TABLE child (id REFERENCES parent ON DELETE RESTRICT)",
        "CREATE TABLE ring (id INTEGER PRIMARY KEY, next REFERENCES ring)",
        'CREATE TABLE "odd "" name" (x)',
        "INSERT INTO parent VALUES (1)",
        "INSERT INTO child VALUES (1)",
        "INSERT INTO ring VALUES (1, 2), (2, 1)",
        "CREATE VIEW v AS SELECT * FROM parent",
        "CREATE TRIGGER g AFTER INSERT ON parent BEGIN INSERT INTO child VALUES (new.id); END",
        "CREATE INDEX i ON child (id)",
        "CREATE VIRTUAL TABLE f USING fts5 (text)",
        "INSERT INTO f VALUES ('some text')",
    ):
        room.run(statement)
    assert room.run("SELECT * FROM f WHERE f MATCH 'text'") == [{"text": "some text"}]
    room.commit()
    room.database.drop_tables(0, 20.0)
    room.commit()
    left = "SELECT name FROM sqlite_schema WHERE name NOT GLOB '*_broker_*' AND name NOT GLOB '*_sqlite_*'"
    assert {row["name"] for row in room.run(left)} <= {"sqlite_sequence"}
    room.database.check()


def test_tables_go_before_those_that_they_refer_to(room: Room) -> None:
    """S27: else SQLite reads all of the one for each row of the other; whatever their names are."""
    for statement in (
        "CREATE TABLE a (id INTEGER PRIMARY KEY)",
        "CREATE TABLE b (id INTEGER PRIMARY KEY, a REFERENCES A)",
        "CREATE TABLE c (b REFERENCES b, ring REFERENCES c, a REFERENCES a)",
        "CREATE TABLE d (id INTEGER PRIMARY KEY, e REFERENCES e)",
        "CREATE TABLE e (id INTEGER PRIMARY KEY, d REFERENCES d)",
        "CREATE TABLE f (e REFERENCES e, nowhere REFERENCES nowhere)",
    ):
        room.run(statement)
    for into in ("a (id)", "b (a)"):
        room.run(f"{ENDLESS}INSERT INTO {into} SELECT x FROM c LIMIT 2000")
    room.commit()
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1000

    room.database._file.writer.set_progress_handler(count, 1000)
    room.database.drop_tables(0, 20.0)
    assert steps < 100_000
    room.commit()
    assert room.run("SELECT name FROM sqlite_schema WHERE length(name) = 1") == []


@pytest.mark.parametrize("depth", [0, 2])
def test_tables_that_take_too_long_to_go_stay_with_all_that_was_there(room: Room, depth: int) -> None:
    """S27, S28: a ring without an index, which no order helps."""
    room.run("CREATE TABLE ring (id INTEGER PRIMARY KEY, next REFERENCES ring)")
    room.run(f"{ENDLESS}INSERT INTO ring (id) SELECT x FROM c LIMIT 500")
    room.run("CREATE TABLE other (a)")
    room.commit()
    room.run("INSERT INTO other VALUES (1)", depth=depth)
    with pytest.raises(SqlError, match="no such table"):
        room.run("SELECT * FROM nowhere", depth=depth)
    with pytest.raises(SqlError, match=r"took longer than 0 s.*Give each foreign key an index") as caught:
        room.database.drop_tables(depth, 0.0)
    assert caught.value.code == "SQLITE_INTERRUPT"
    assert room.run("SELECT a, (SELECT count(*) FROM ring) AS n FROM other", depth=depth) == [
        {"a": 1, "n": 500}
    ]
    for inner in range(depth, 0, -1):
        room.database.leave(inner, keep=True)
    room.commit()
    assert room.run("SELECT a, (SELECT count(*) FROM ring) AS n FROM other") == [{"a": 1, "n": 500}]
    room.database.drop_tables(0, 20.0)
    room.commit()
    assert room.run("SELECT name FROM sqlite_schema WHERE name IN ('ring', 'other')") == []


def test_where_one_table_cannot_go_all_stay(tmp_path: Path) -> None:
    """S27, S28: and the error is that of the table."""
    room = Room(tmp_path)
    room.run("CREATE TABLE t (a)")
    room.commit()
    room.database.undo()
    path = room.database.path
    room.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = on")
    connection.execute(
        "INSERT INTO sqlite_schema VALUES ('table', 'odd', 'odd', 0, ?)",
        ("CREATE VIRTUAL TABLE odd USING nowhere",),
    )
    connection.commit()
    connection.close()
    shard = Shard(tmp_path, 0, durability="full")
    database = RoomDatabase(tmp_path, shard, "main/a", durability="full")
    database.begin(shard, lambda: None)

    def run(statement: str) -> Any:
        return database.execute(statement, (), depth=0, bytes_max=MIB, seconds=20.0)

    run("INSERT INTO t VALUES (1)")
    with pytest.raises(SqlError, match="VACUUM"):
        run("VACUUM")
    with pytest.raises(SqlError, match="no such module: nowhere"):
        database.drop_tables(0, 20.0)
    assert run("SELECT * FROM t") == [{"a": 1}]
    assert database.end()
    database.commit(ShardBatch(), [(shard.next_row(), b"row")])
    assert database._file.read("SELECT a FROM t") == [(1,)]
    database.close()
    shard.close()


def test_a_foreign_key_is_never_left_to_the_commit(room: Room) -> None:
    """S28: it would refuse the turn when nobody can be told; also behind `delete_all`."""
    room.run("CREATE TABLE old (a)")
    room.commit()
    room.database.drop_tables(0, 20.0)
    room.run("CREATE TABLE p (id INTEGER PRIMARY KEY)")
    room.run("CREATE TABLE c (p REFERENCES p DEFERRABLE, note DEFAULT 'INITIALLY DEFERRED') -- or not")
    with pytest.raises(SqlError, match="FOREIGN KEY"):
        room.run("INSERT INTO c (p) VALUES (1)")
    room.run("INSERT INTO p VALUES (1)")
    room.run("INSERT INTO c (p) VALUES (1)")
    room.commit()
    assert room.run("SELECT * FROM c") == [{"p": 1, "note": "INITIALLY DEFERRED"}]


def test_a_definition_has_other_words_between_comments() -> None:
    """Q6: what is no INITIALLY DEFERRED stays, however many comments are there to look through."""
    for definition in (
        "CREATE TABLE c (initially /* one */, /* two */ deferred)",
        f"CREATE TABLE c (initially {'/**/' * 10_000} INTEGER)",
    ):
        assert at_once(definition) == definition
    apart = "/**/ -- and\n" * 1_000
    assert at_once(f"REFERENCES p INITIALLY {apart}DEFERRED") == f"REFERENCES p INITIALLY {apart}IMMEDIATE"


@pytest.mark.parametrize("closed_well", [True, False])
def test_a_foreign_key_of_a_file_from_elsewhere_is_not_left_to_the_commit(
    tmp_path: Path, closed_well: bool
) -> None:
    """Q6, S28: the statement is told, and not the host; what the definition says besides stays."""
    room = Room(tmp_path)
    room.run("CREATE TABLE p (id INTEGER PRIMARY KEY)")
    room.run("INSERT INTO p VALUES (1)")
    room.commit()
    room.database.undo()
    definition = (
        "CREATE TABLE c (p REFERENCES p DEFERRABLE Initially /* initially deferred */\n  deferred,"
        " note DEFAULT 'INITIALLY DEFERRED',"
        ' "initially deferred" REFERENCES p DEFERRABLE INITIALLY DEFERRED)'
    )
    path = room.database.path
    if closed_well:
        room.close()
    connection = sqlite3.connect(path)
    connection.execute(definition)
    connection.execute("INSERT INTO c (p) VALUES (1)")
    connection.commit()
    if not closed_well:
        room.database.close(keep_log=True)
        room.shard.close()
    connection.close()
    shard = Shard(tmp_path, 0, durability="full")
    for _ in range(2):
        database = RoomDatabase(tmp_path, shard, "main/a", durability="full")
        database.begin(shard, lambda: None)

        def run(statement: str, database: RoomDatabase = database) -> Any:
            return database.execute(statement, (), depth=0, bytes_max=MIB, seconds=20.0)

        for statement in (
            "INSERT INTO c (p) VALUES (9)",
            'UPDATE c SET "initially deferred" = 9',
            "DELETE FROM p",
            "UPDATE c SET p = 9",
        ):
            with pytest.raises(SqlError, match="FOREIGN KEY"):
                run(statement)
        [made] = run("SELECT sql FROM sqlite_schema WHERE name = 'c'")
        assert made["sql"] == definition.replace("\n  deferred", "\n  IMMEDIATE").replace(
            "INITIALLY DEFERRED)", "INITIALLY IMMEDIATE)"
        )
        run("INSERT INTO p VALUES (NULL)")
        assert database.end()
        database.commit(ShardBatch(), [(shard.next_row(), b"row")])
        database.check()
        database.close()
    shard.close()


def test_a_foreign_key_that_cannot_be_changed_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q6, S36: and says what to do."""
    room = Room(tmp_path)
    room.run("CREATE TABLE p (id INTEGER PRIMARY KEY)")
    room.commit()
    room.database.undo()
    path = room.database.path
    room.close()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE c (p REFERENCES p DEFERRABLE INITIALLY DEFERRED)")
    connection.close()
    shard = Shard(tmp_path, 0, durability="full")
    monkeypatch.setattr(storage.room_database, "_DEFINE", "UPDATE nowhere SET sql = ? WHERE rowid = ?")
    with pytest.raises(DataDirectoryError, match=r"INITIALLY DEFERRED.*Make the table anew"):
        RoomDatabase(tmp_path, shard, "main/a", durability="full")
    monkeypatch.undo()
    RoomDatabase(tmp_path, shard, "main/a", durability="full").close()
    shard.close()


def test_a_newer_schema_is_refused_and_the_file_untouched(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.run("CREATE TABLE t (a)")
    room.commit()
    room.database.undo()
    path = room.database.path
    room.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    shard = Shard(tmp_path, 0, durability="full")
    with pytest.raises(SchemaTooNew):
        RoomDatabase(tmp_path, shard, "main/a", durability="full")
    assert path.read_bytes() == content
    shard.close()


def test_another_room_s_file_is_not_taken(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.run("CREATE TABLE t (a)")
    room.commit()
    path = room.database.path
    room.close()
    path.rename(database_path(tmp_path, 0, "main/b"))
    shard = Shard(tmp_path, 0, durability="full")
    with pytest.raises(DatabaseDamaged, match="main/b"):
        RoomDatabase(tmp_path, shard, "main/b", durability="full")
    shard.close()


def test_a_full_disk_refuses_the_commit_and_keeps_the_turn(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S36."""
    room.run("CREATE TABLE t (a)")
    assert room.database.end()
    monkeypatch.setattr(room.database._file, "reserve_bytes", 1 << 60)
    for _ in range(2):
        with pytest.raises(CommitRefused):
            room.database.commit(ShardBatch(), [(room.shard.next_row(), b"row")])
    assert not room.database.complete
    monkeypatch.undo()
    room.database.commit(ShardBatch(), [(room.shard.next_row(), b"row")])
    assert room.database.complete
    assert len(room.database.rows()) == 1
