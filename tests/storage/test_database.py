"""Opening, refusing and failing (S36, S39)."""

import errno
import multiprocessing
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path

import pytest
import sqlite_utils  # noqa: F401 - a process that has given up its rights could not import it

import storage.database
from storage.database import (
    ROWS_PER_STATEMENT_MAX,
    DatabaseFile,
    RowStatement,
    WriteLock,
    cannot_use,
    database_version,
    open_database,
    quick_check,
    translate,
)
from storage.errors import (
    BrokerError,
    CommitRefused,
    CommitUnknown,
    DatabaseDamaged,
    DataDirectoryError,
    DataDirectoryInUse,
    SchemaTooNew,
)
from storage.migrations import REGISTRY, SHARD, Schema


def opened(path, **given):
    return open_database(path, **{"synchronous": "full", "cache_kib": 64, "schema": SHARD, **given})


def file_of(path, **given):
    options = {"synchronous": "normal", "cache_kib": 64, "read_cache_kib": 64, "reserve_bytes": 0}
    return DatabaseFile(path, SHARD, **{**options, **given})


def put(file, key, value=b"v"):
    with file.transaction() as writer:
        writer.execute("REPLACE INTO entries VALUES ('r', ?, ?)", (key, value))


def keys(file):
    return [key for (key,) in file.read("SELECT key FROM entries ORDER BY key")]


def pragma(connection, name):
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def snapshot(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith((".lock", "-shm"))
    }


# --- Opening ---


def test_pragmas(tmp_path):
    for synchronous, level in (("full", 2), ("normal", 1)):
        connection = opened(tmp_path / f"{synchronous}.db", synchronous=synchronous, cache_kib=100)
        assert pragma(connection, "journal_mode") == "wal"
        assert pragma(connection, "synchronous") == level
        assert pragma(connection, "cache_size") == -100
        assert pragma(connection, "mmap_size") == 0
        assert pragma(connection, "temp_store") == 2
        assert connection.isolation_level is None
        connection.close()


def test_a_file_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    """D4: whatever stops its making, the name is free, and the next start succeeds."""
    path = tmp_path / "a.db"

    def broken(*_):
        raise sqlite3.OperationalError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Schema, "upgrade", broken)
        with pytest.raises(sqlite3.OperationalError):
            opened(path)
    assert not path.exists()
    (tmp_path / "a.db.new").write_bytes(b"rubbish of a killed process")
    connection = opened(path)
    assert pragma(connection, "user_version") == SHARD.version
    connection.close()
    assert sorted(os.listdir(tmp_path)) == ["a.db"]


@pytest.mark.parametrize("mask", [0, 0o777])
def test_modes_are_0600_whatever_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        file = file_of(tmp_path / "a.db")
        put(file, "k")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["a.db", "a.db-wal", "a.db-shm", "a.db.lock"], 0o600)
    file.close()


def test_a_mode_that_was_opened_up_is_tightened(tmp_path):
    opened(tmp_path / "a.db").close()
    os.chmod(tmp_path / "a.db", 0o666)
    opened(tmp_path / "a.db").close()
    assert stat.S_IMODE((tmp_path / "a.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["with space?&.db", "per%20cent#.db", "é'\".db"])
def test_any_file_name_is_taken_literally(tmp_path, name):
    file = file_of(tmp_path / name)
    put(file, "k")
    assert keys(file) == ["k"]
    file.close()
    assert sorted(os.listdir(tmp_path)) == sorted([name, name + ".lock"])


def test_the_reading_connection_cannot_write(tmp_path):
    file = file_of(tmp_path / "a.db")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        file.reader.execute("DELETE FROM entries")
    file.close()


def test_a_plain_database_without_schema(tmp_path):
    connection = opened(tmp_path / "a.db", schema=None)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    assert database_version(tmp_path / "a.db") == 0


# --- Refusing ---


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 4096, b"SQLite format 3\0", b"x" * 4096])
def test_what_is_no_database_is_named_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "a.db"
    path.write_bytes(content)
    with pytest.raises(DatabaseDamaged) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert ("empty" if not content else "not a SQLite database") in caught.value.reason
    assert "backup" in caught.value.remedy
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.db"]


@pytest.mark.parametrize("schema", [SHARD, REGISTRY])
def test_a_newer_schema_is_refused_with_both_numbers_and_left_as_it_is(tmp_path, schema):
    path = tmp_path / "a.db"
    opened(path, schema=schema).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA user_version = {schema.version + 1}")
    connection.close()
    before = snapshot(tmp_path)
    with pytest.raises(SchemaTooNew) as caught:
        opened(path, schema=schema)
    assert (caught.value.found, caught.value.known) == (schema.version + 1, schema.version)
    for part in (str(path), str(schema.version + 1), str(schema.version), "newer broker"):
        assert part in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_newer_schema_that_stands_in_the_log_alone_is_refused_too(tmp_path):
    path = tmp_path / "live" / "a.db"
    path.parent.mkdir()
    connection = opened(path)
    connection.execute(f"PRAGMA user_version = {SHARD.version + 1}")
    crashed = tmp_path / "crashed"
    shutil.copytree(path.parent, crashed)
    connection.close()
    (crashed / "a.db-shm").unlink()
    assert database_version(crashed / "a.db") == SHARD.version
    before = snapshot(crashed)
    with pytest.raises(SchemaTooNew):
        opened(crashed / "a.db")
    assert snapshot(crashed) == before


def without_rights(work):
    """Run `work` as a user without rights, in a process of its own; give what it returns, or its error."""

    def child(pipe):
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        try:
            pipe.send(work())
        except BaseException as error:
            pipe.send((type(error), str(error), getattr(error, "path", "")))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert ours.poll()
    return ours.recv()


@pytest.fixture
def public():
    """A directory that another user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="storage-test-"))
    os.chmod(folder, 0o755)
    yield folder
    os.chmod(folder, 0o700)
    shutil.rmtree(folder)


def test_a_read_only_directory_is_named_with_reason_and_remedy(public):
    os.chmod(public, 0o555)
    kind, text, path = without_rights(lambda: opened(public / "a.db"))
    assert kind is DataDirectoryError
    assert path == str(public / "a.db")
    assert "Permission denied" in text
    assert "--data" in text
    assert os.listdir(public) == []


def test_a_database_in_a_read_only_directory_is_refused(public):
    opened(public / "a.db").close()
    os.chmod(public / "a.db", 0o666)
    os.chmod(public, 0o555)
    kind, text, path = without_rights(lambda: opened(public / "a.db"))
    assert kind is DataDirectoryError
    assert path == str(public)
    assert "Permission denied" in text


def test_a_read_only_file_is_refused(public):
    opened(public / "a.db").close()
    os.chmod(public / "a.db", 0o444)
    kind, _, path = without_rights(lambda: opened(public / "a.db"))
    assert kind is DataDirectoryError
    assert path == str(public / "a.db")


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(DataDirectoryError):
        opened(tmp_path / "none" / "a.db")


def test_a_page_of_rubbish_is_found_by_check_and_by_use(tmp_path):
    file = file_of(tmp_path / "a.db")
    with file.transaction() as writer:
        writer.executemany(
            "INSERT INTO entries VALUES ('r', ?, ?)", [(f"{i:05}", b"x" * 500) for i in range(500)]
        )
    file.check()
    file.close()
    with open(tmp_path / "a.db", "r+b") as raw:
        for page in range(4, 40):
            raw.seek(page * 4096)
            raw.write(b"\xa5" * 4096)
    file = file_of(tmp_path / "a.db")
    with pytest.raises(DatabaseDamaged, match=r"a\.db"):
        file.check()
    with pytest.raises(DatabaseDamaged):
        file.read("SELECT * FROM entries")
    file.close()


def test_a_log_cut_anywhere_gives_a_clean_prefix(tmp_path):
    """What is read is what some commit left, never a part of one."""
    live = tmp_path / "live"
    live.mkdir()
    file = file_of(live / "a.db")
    for i in range(12):
        with file.transaction() as writer:
            for key in ("a", "b"):
                writer.execute("REPLACE INTO entries VALUES (?, 'k', ?)", (key, b"%d" % i * 700))
    crashed = tmp_path / "crashed"
    shutil.copytree(live, crashed)
    file.close()
    log = (crashed / "a.db-wal").read_bytes()
    found = []
    for cut in [*range(0, len(log), 1009), len(log)]:
        work = tmp_path / "work"
        shutil.copytree(crashed, work)
        (work / "a.db-shm").unlink()
        (work / "a.db-wal").write_bytes(log[:cut])
        connection = opened(work / "a.db")
        quick_check(connection, "x")
        rows = connection.execute("SELECT value FROM entries").fetchall()
        assert len(rows) in (0, 2)
        assert len(set(rows)) <= 1
        found.append(int(rows[0][0][: len(rows[0][0]) // 700]) if rows else -1)
        connection.close()
        shutil.rmtree(work)
    assert found == sorted(found)
    assert (found[0], found[-1]) == (-1, 11)


# --- One writer (D1) ---


def test_a_second_process_is_told_who_has_the_file(tmp_path):
    file = file_of(tmp_path / "a.db")
    kind, text, _ = without_rights_kept(lambda: file_of(tmp_path / "a.db"))
    assert kind is DataDirectoryInUse
    assert f"process {os.getpid()}" in text
    file.close()
    assert without_rights_kept(lambda: file_of(tmp_path / "a.db").close()) is None


def without_rights_kept(work):
    """Run `work` in a forked process; give what it returns, or its error."""

    def child(pipe):
        WriteLock._held.clear()  # a process of its own would start without
        try:
            pipe.send(work())
        except BaseException as error:
            pipe.send((type(error), str(error), ""))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert ours.poll()
    return ours.recv()


def test_a_child_that_outlives_its_host_does_not_keep_the_file_locked(tmp_path):
    """Room code may fork, and its child live on when the host is killed."""
    reading, writing = os.pipe()
    host = os.fork()
    if host == 0:
        os.close(writing)
        file_of(tmp_path / "a.db")
        if os.fork() == 0:
            os.read(reading, 1)  # until the test closes its end
        os._exit(0)
    os.close(reading)
    assert os.waitpid(host, 0)[1] == 0
    file_of(tmp_path / "a.db").close()
    os.close(writing)


def test_the_lock_is_free_after_a_failed_opening(tmp_path):
    (tmp_path / "a.db").write_bytes(b"rubbish")
    for _ in range(2):
        with pytest.raises(DatabaseDamaged):
            file_of(tmp_path / "a.db")
    (tmp_path / "a.db").unlink()
    file_of(tmp_path / "a.db").close()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("x")
    os.symlink(tmp_path / "victim", tmp_path / "other.lock")
    os.symlink("nowhere", tmp_path / "a.db.lock")
    # realpath leads to a file beside it, never outside by way of an open that follows the last link.
    file = file_of(tmp_path / "a.db")
    file.close()
    assert (tmp_path / "victim").read_text() == "x"


# --- Transactions ---


def test_an_error_inside_rolls_back(tmp_path):
    file = file_of(tmp_path / "a.db")
    put(file, "a")
    with pytest.raises(KeyError), file.transaction() as writer:
        writer.execute("DELETE FROM entries")
        raise KeyError
    with pytest.raises(sqlite3.IntegrityError), file.transaction() as writer:
        writer.execute("DELETE FROM entries")
        writer.execute("INSERT INTO entries VALUES (NULL, NULL, NULL)")
    assert keys(file) == ["a"]
    put(file, "b")
    assert keys(file) == ["a", "b"]
    file.close()


def test_a_transaction_takes_the_write_lock_at_once(tmp_path):
    """D3."""
    file = file_of(tmp_path / "a.db")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=0)
    with file.transaction(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.close()
    file.close()


def test_a_file_locked_by_another_program_is_waited_for_within_a_bound_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.database.BUSY_TIMEOUT_SECONDS", 0.05)
    file = file_of(tmp_path / "a.db")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CommitRefused, match="other program") as caught:
        put(file, "a")
    assert str(tmp_path / "a.db") in str(caught.value)
    other.execute("ROLLBACK")
    put(file, "a")
    assert keys(file) == ["a"]
    other.close()
    file.close()


def test_a_full_disk_refuses_and_service_resumes_by_itself(tmp_path):
    """S36. max_page_count makes SQLite itself say SQLITE_FULL."""
    file = file_of(tmp_path / "a.db")
    put(file, "a")
    pages = file._writer.execute("PRAGMA page_count").fetchone()[0]
    file._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    with pytest.raises(CommitRefused) as caught:
        put(file, "big", b"x" * 100_000)
    assert "SQLITE_FULL" in caught.value.reason
    assert keys(file) == ["a"]
    file._writer.execute("PRAGMA max_page_count = 100000").fetchall()
    put(file, "big", b"x" * 100_000)
    assert keys(file) == ["a", "big"]
    file.close()


def test_a_reserve_of_free_space_is_kept(tmp_path):
    """A disk that is really full stops checkpoints too."""
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    file = file_of(tmp_path / "a.db", reserve_bytes=free // 2)
    put(file, "a")
    file.reserve_bytes = free * 2
    with pytest.raises(CommitRefused, match="above the reserve"):
        put(file, "b")
    file.checkpoint()
    assert file.wal_bytes == 0
    file.reserve_bytes = free // 2
    put(file, "b")
    assert keys(file) == ["a", "b"]
    file.close()


def test_what_a_transaction_needs_does_not_take_the_reserve(tmp_path):
    """Finding: a transaction that fits just so fills the disk with its log, and then no checkpoint passes."""
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    file = file_of(tmp_path / "a.db", reserve_bytes=free // 2)
    with pytest.raises(CommitRefused, match=r"for .* more"), file.transaction(free // 4 + (1 << 30)):
        pytest.fail("it began")
    with file.transaction(1 << 20):
        pass
    file.close()


def test_below_the_reserve_the_log_is_carried_over_before_anything_is_refused(tmp_path, monkeypatch):
    """It may hold what is missing: the reserve is there so that it can be cut back."""
    file = file_of(tmp_path / "a.db", reserve_bytes=1 << 20)
    put(file, "a", b"x" * 100_000)
    assert file.wal_bytes > 100_000
    monkeypatch.setattr(file, "free_bytes", lambda: (1 << 20) - (1 if file.wal_bytes else 0))
    put(file, "b")
    assert keys(file) == ["a", "b"]
    monkeypatch.setattr(file, "free_bytes", lambda: (1 << 20) - 1)
    with pytest.raises(CommitRefused, match="above the reserve"):
        put(file, "c")
    assert file.wal_bytes == 0
    file.close()


class Failing:
    """A connection whose statement fails as SQLite fails when the disk reports an error."""

    def __init__(self, real, statement, code):
        self.real, self.statement, self.code = real, statement, code
        self.statements = []

    def execute(self, sql, *parameters):
        self.statements.append(sql)
        if sql == self.statement:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self.code
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error
        return self.real.execute(sql, *parameters)

    def __getattr__(self, name):
        return getattr(self.real, name)


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "COMMIT", "DELETE FROM entries"])
def test_after_an_io_error_the_outcome_is_unknown_and_the_file_is_finished(tmp_path, statement):
    """D5: no retry, no checkpoint, the file stays with this process until it ends."""
    file = file_of(tmp_path / "a.db")
    put(file, "a")
    real = file._writer
    failing = Failing(real, statement, sqlite3.SQLITE_IOERR_FSYNC)
    file._writer = failing
    with pytest.raises(CommitUnknown, match="IOERR_FSYNC") as caught, file.transaction() as writer:
        writer.execute("DELETE FROM entries")
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    done = len(failing.statements)
    with pytest.raises(CommitUnknown, match="earlier write"):
        put(file, "b")
    file.checkpoint()
    file.close()
    assert len(failing.statements) == done
    assert keys(file) == ["a"]
    with pytest.raises(DataDirectoryInUse):
        file_of(tmp_path / "a.db")
    assert "IOERR_FSYNC" in (tmp_path / "a.db.lock").read_text()
    # For the test's own tidiness only.
    file._failure = None
    file.close()


def test_a_file_whose_last_write_failed_is_read_whole_before_it_is_used(tmp_path, monkeypatch):
    """D7: once, and by whoever opens it next; one that is damaged is refused as long as it is."""
    file_of(tmp_path / "a.db").close()
    lock = tmp_path / "a.db.lock"
    checked = []
    monkeypatch.setattr(storage.database, "quick_check", lambda *_: checked.append(1))
    file_of(tmp_path / "a.db").close()
    assert checked == []
    lock.write_text("disk I/O error (SQLITE_IOERR_FSYNC)")
    file_of(tmp_path / "a.db").close()
    file_of(tmp_path / "a.db").close()
    assert (checked, lock.read_text()) == ([1], "")

    def damaged(_, path):
        raise DatabaseDamaged(path, "SQLite finds it inconsistent")

    lock.write_text("disk I/O error (SQLITE_IOERR_FSYNC)")
    monkeypatch.setattr(storage.database, "quick_check", damaged)
    for _ in range(2):
        with pytest.raises(DatabaseDamaged):
            file_of(tmp_path / "a.db")
    monkeypatch.undo()
    file_of(tmp_path / "a.db").close()
    assert lock.read_text() == ""


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_CORRUPT, DatabaseDamaged),
        (sqlite3.SQLITE_NOTADB, DatabaseDamaged),
        (sqlite3.SQLITE_IOERR_WRITE, CommitUnknown),
        (sqlite3.SQLITE_IOERR_SHORT_READ, CommitUnknown),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, CommitRefused),
        (sqlite3.SQLITE_LOCKED, CommitRefused),
        (sqlite3.SQLITE_FULL, CommitRefused),
        (sqlite3.SQLITE_NOMEM, CommitRefused),
        (sqlite3.SQLITE_READONLY_DBMOVED, CommitRefused),
        (sqlite3.SQLITE_CANTOPEN, CommitRefused),
    ],
)
def test_every_failure_of_the_outside_has_its_error_with_the_path(code, kind):
    error = sqlite3.OperationalError("said")
    error.sqlite_errorcode = code
    translated = translate(error, "/data/a.db")
    assert type(translated) is kind
    assert isinstance(translated, BrokerError)
    assert "/data/a.db" in str(translated)
    assert "said" in str(translated)


def test_a_mistake_of_our_own_stays_what_it_is():
    error = sqlite3.ProgrammingError("no such column")
    assert translate(error, "x") is error


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EIO]
)
def test_every_refusal_of_the_system_has_path_reason_and_remedy(code):
    error = cannot_use("/data", OSError(code, os.strerror(code)))
    assert error.path == "/data"
    assert error.reason == os.strerror(code)
    assert error.remedy
    assert str(error) == f"/data: {error.reason}. {error.remedy}."


def test_commits_and_checkpoints_of_two_threads_take_turns(tmp_path):
    file = file_of(tmp_path / "a.db", checkpoint_pages=0)
    errors = []

    def checkpoints():
        try:
            for _ in range(50):
                file.checkpoint()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=checkpoints)
    thread.start()
    for i in range(200):
        put(file, f"{i:03}")
    thread.join()
    assert errors == []
    assert len(keys(file)) == 200
    file.close()


# --- Rows ---


@pytest.mark.parametrize("total", [0, 1, 2, 3, 127, 128, 129, 255, 256, 300])
def test_a_row_statement_runs_every_row_once_and_in_order(total):
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE t (a, b)")
    ran: list[str] = []
    connection.set_trace_callback(ran.append)
    RowStatement("INSERT INTO t VALUES", "(?, ?)").run(connection, [(i, str(i)) for i in range(total)])
    connection.set_trace_callback(None)
    assert connection.execute("SELECT a, b FROM t ORDER BY rowid").fetchall() == [
        (i, str(i)) for i in range(total)
    ]
    assert len(ran) == total // ROWS_PER_STATEMENT_MAX + (total % ROWS_PER_STATEMENT_MAX).bit_count()
    RowStatement("DELETE FROM t WHERE a > ? AND b IN (", "?", ")").run(
        connection, [(str(i),) for i in range(total)], (1,)
    )
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (min(total, 2),)
    connection.close()
