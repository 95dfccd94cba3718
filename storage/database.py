"""Opening SQLite the one way it is opened here.

Owns the pragmas, the file modes, the translation of `sqlite3` errors, and `DatabaseFile`: the pair of
connections that every kind of store is built on. Knows no table.

Invariants:
    D1  A file has one writing and checkpointing connection on the whole machine (the WAL-reset bug of SQLite
        before 3.51.3 needs two). A record lock on `<file>.lock` sees to it: unlike flock it is not inherited
        by a process that room code forks, so such a child cannot keep a dead host's shard locked.
    D2  A second connection of the same process, `mode=ro`, serves reads. Rows are always fetched to the end,
        so no open cursor keeps the write-ahead log from being reset.
    D3  Every transaction begins IMMEDIATE: it waits for the write lock, up to a bound, before it has read
        anything.
    D4  A file with its final name is complete: it is made under another name, synchronised and renamed. So an
        empty file is a damaged one, never a new one.
    D5  After an I/O error the file takes no more transactions in this process: the outcome of the failed one
        is unknown, and on Linux a later fsync that succeeds proves nothing about earlier writes.
    D6  Nobody but SQLite opens and closes the main file while this process has a connection to it: closing
        any other descriptor of a file drops all record locks of the process on it (fcntl(2)).
    D7  Of a file whose last writer ended by such an error nothing is used before all of it has been read
        (`quick_check`). The mark for that is text in the lock file: it takes no new file on a failing disk.

Sources: sqlite.org/wal.html, sqlite.org/pragma.html, sqlite.org/fileformat.html section 1.3.
"""

import contextlib
import errno
import fcntl
import os
import sqlite3
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from storage.errors import (
    CommitRefused,
    CommitUnknown,
    DatabaseDamaged,
    DataDirectoryError,
    DataDirectoryInUse,
    SchemaTooNew,
)
from storage.migrations import Schema

Synchronous = Literal["full", "normal"]

BUSY_TIMEOUT_SECONDS = 5.0
"""How long a transaction waits for the write lock. By D1 nobody holds it but a tool that somebody runs by
hand.
"""

CHECKPOINT_PAGES = 1000
"""Pages in the write-ahead log after which a commit carries them over into the file: 4 MiB, SQLite's own
default.
"""

WAL_BYTES_KEPT = 8 * 1024 * 1024
"""To this size the log is cut back when it is reset after having grown larger."""

RESERVE_BYTES = 8 * 1024 * 1024
"""Free space that no transaction may use: a full disk stops checkpoints too, and then the log, which a
checkpoint would cut back, keeps the disk full. As large as the log usually is.
"""

ROWS_PER_STATEMENT_MAX = 128
"""Rows of one multi-row statement. Larger ones are hardly faster, and their compiled form stays in memory."""

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_USER_VERSION = struct.Struct(">60xI")


def open_database(
    path: str | os.PathLike[str],
    *,
    synchronous: Synchronous,
    cache_kib: int,
    read_only: bool = False,
    schema: Schema | None = None,
) -> sqlite3.Connection:
    """Open, and if need be create, a database: write-ahead log, mode 0600 whatever the umask, no implicit
    transactions.

    A writing connection is given only to the holder of the file's lock (D1); `DatabaseFile` does both.

    Args:
        path: the file; its directory exists.
        synchronous: "full" makes a commit survive a power cut (an fsync each), "normal" the death of any
            process.
        cache_kib: bound of the page cache, in KiB.
        read_only: refuse writes; the file exists and is open for writing elsewhere in this process.
        schema: tables to create or to bring up to date; None leaves the file's content alone.

    Raises:
        SchemaTooNew: a newer broker wrote the file; untouched.
        DatabaseDamaged: not a database, or empty; untouched.
        DataDirectoryError: it cannot be created or written.
    """
    path = Path(path)
    if read_only:
        return _connect(path, "ro", synchronous, cache_kib)
    found = database_version(path, writable=True)
    if found is None:
        _create(path, schema)
    elif schema is not None:
        # The newest version may stand in the log only, and a writing connection would carry it over when it
        # closes.
        if _size(f"{path}-wal"):
            found = _version_in_log(path)
        if found > schema.version:
            raise SchemaTooNew(found, schema.version, path)
    os.chmod(path, 0o600)
    connection = _connect(path, "rw", synchronous, cache_kib)
    try:
        mode = connection.execute("PRAGMA journal_mode = wal").fetchone()[0]
        if mode != "wal":
            raise DataDirectoryError(
                path,
                f"its file system does not support a write-ahead log (SQLite stays in mode {mode!r})",
                "Put the data directory on a local disk with --data",
            )
        if schema is not None and found is not None and found < schema.version:
            schema.upgrade(connection)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as error:
        connection.close()
        raise translate(error, path, opening=True) from error
    except BaseException:
        connection.close()
        raise
    return connection


def database_version(path: str | os.PathLike[str], *, writable: bool = False) -> int | None:
    """Give the schema version in a file's first page, read without SQLite; None when there is no file.

    Only while this process has no connection to the file (D6).

    Raises:
        DatabaseDamaged: the file is empty, or no SQLite database.
        DataDirectoryError: it cannot be opened; or, with `writable`, neither it nor its directory can be
            written.
    """
    path = Path(path)
    try:
        with open(path, "r+b" if writable else "rb", buffering=0) as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_use(path, error) from error
    if writable and not os.access(path.parent, os.W_OK | os.X_OK):
        raise cannot_use(path.parent, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if not header:
        raise DatabaseDamaged(path, "the file is empty, where a database was")
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise DatabaseDamaged(path, "the file is not a SQLite database")
    return int(_USER_VERSION.unpack_from(header)[0])


def quick_check(connection: sqlite3.Connection, path: str | os.PathLike[str]) -> None:
    """Read the whole file and raise DatabaseDamaged at the first inconsistency. Cost grows with the file."""
    try:
        text = connection.execute("PRAGMA quick_check(1)").fetchall()[0][0]
    except sqlite3.Error as error:
        raise translate(error, path) from error
    if text != "ok":
        raise DatabaseDamaged(path, f"SQLite finds it inconsistent: {text}")


def translate(error: sqlite3.Error, path: str | os.PathLike[str], *, opening: bool = False) -> Exception:
    """Give the error of this package for one of `sqlite3`; the same one back when it shows a mistake of our
    own.
    """
    code = getattr(error, "sqlite_errorcode", None)
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    reason = f"{error} ({name})"
    primary = None if code is None else code & 0xFF
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DatabaseDamaged(path, reason)
    if primary == sqlite3.SQLITE_IOERR:
        return CommitUnknown(path, reason)
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        if opening:
            return DataDirectoryInUse(path, "the database", None)
        return CommitRefused(path, reason, "Close the other program that has the file open")
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        if opening:
            return DataDirectoryError(path, reason, "Make it and its directory writable for this user")
        return CommitRefused(path, reason, "Make the file and its directory writable for this user")
    if primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM):
        return CommitRefused(path, reason, "Free some space; it is tried again")
    return error


def cannot_use(path: str | os.PathLike[str], error: OSError) -> DataDirectoryError:
    """The error for a file or directory that the system refuses, with the remedy that fits its reason."""
    remedy = {
        errno.EROFS: "Its file system is read-only: choose a writable directory with --data",
        errno.ENOSPC: "The disk is full: free some space",
        errno.EDQUOT: "The quota is used up: free some space",
        errno.ENOTDIR: "A part of the path is not a directory: choose another --data",
        errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    }.get(error.errno or 0, "Give this user read and write access to it, or choose another --data")
    return DataDirectoryError(path, error.strerror or str(error), remedy)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private_file(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all, mode 0600, and make it survive a power cut."""
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(fresh, path)
    sync_directory(path.parent)


class RowStatement:
    """A statement over many rows of bound parameters, run in as few steps as possible.

    `executemany` takes and drops the interpreter lock for each row, which costs a busy loop thread most of
    its time; here rows go in powers of two up to `ROWS_PER_STATEMENT_MAX`, so a statement runs many rows
    without the lock, and at most eight forms of it are compiled and cached.

    Args:
        before: the text in front of the rows.
        row: one row with its parameters, such as "(?, ?)".
        after: the text behind them.
    """

    def __init__(self, before: str, row: str, after: str = "") -> None:
        self._texts: dict[int, str] = {}
        size = ROWS_PER_STATEMENT_MAX
        while size:
            self._texts[size] = f"{before} {', '.join([row] * size)} {after}"
            size >>= 1

    def run(
        self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]], leading: Sequence[Any] = ()
    ) -> None:
        """Run it over `rows`, in order; `leading` are the parameters in the text in front of them.

        int, float, str and bytearray are bound at once; for None and bytes sqlite3 looks for an adapter,
        which takes three times as long.
        """
        total = len(rows)
        start = 0
        while start < total:
            size = min(ROWS_PER_STATEMENT_MAX, 1 << ((total - start).bit_length() - 1))
            parameters = list(leading)
            for row in rows[start : start + size]:
                parameters += row
            connection.execute(self._texts[size], parameters)
            start += size


class DatabaseFile:
    """One database with its two connections: `transaction` for the one thread that commits, `read` for the
    loop.

    Args:
        path: the file; its directory exists.
        schema: its tables.
        synchronous: see `open_database`.
        cache_kib: bound of the page cache of the writing connection, in KiB.
        read_cache_kib: the same of the reading one.
        checkpoint_pages: log pages after which a commit checkpoints; 0 leaves that to `checkpoint`.
        reserve_bytes: free space on the disk below which transactions are refused.

    Raises:
        DataDirectoryInUse: another process, or another object of this one, has it open for writing.
        As `open_database`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Schema,
        *,
        synchronous: Synchronous,
        cache_kib: int,
        read_cache_kib: int,
        checkpoint_pages: int = CHECKPOINT_PAGES,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self.path = Path(path)
        self.reserve_bytes = reserve_bytes
        self._failure: str | None = None
        # Commits and checkpoints of one file may come from two threads (never at once, if speed matters).
        self._turn = threading.Lock()
        self._lock = WriteLock(self.path)
        try:
            self._writer = open_database(
                self.path, synchronous=synchronous, cache_kib=cache_kib, schema=schema
            )
            try:
                self._writer.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages:d}").fetchall()
                self._reader = open_database(
                    self.path, synchronous=synchronous, cache_kib=read_cache_kib, read_only=True
                )
                try:
                    if self._lock.marked:
                        self.check()
                        self._lock.unmark()
                except BaseException:
                    self._reader.close()
                    raise
            except BaseException:
                self._writer.close()
                raise
        except BaseException:
            self._lock.release()
            raise

    @contextmanager
    def transaction(
        self, size_bytes: int = 0, *, keep_reserve: bool = True, begun: bool = False
    ) -> Iterator[sqlite3.Connection]:
        """BEGIN IMMEDIATE … COMMIT around the block; any error rolls back.

        Args:
            size_bytes: about how much it writes. It needs that much twice: in the log, and in the file.
            keep_reserve: leave `reserve_bytes` of the disk free.
            begun: it has been begun on `writer`; for want of space it is left open.

        Raises:
            CommitRefused: nothing was written; it may be tried again.
            CommitUnknown: it may or may not be on disk; every later call raises this too (D5).
            DatabaseDamaged: the file is inconsistent.
        """
        with self._turn:
            if self._failure is not None:
                raise CommitUnknown(self.path, f"an earlier write failed: {self._failure}")
            if keep_reserve:
                self._require_space(2 * size_bytes)
            writer = self._writer
            try:
                if not begun:
                    writer.execute("BEGIN IMMEDIATE")
                yield writer
                writer.execute("COMMIT")
            except BaseException as error:
                self._roll_back()
                if not isinstance(error, sqlite3.Error):
                    raise
                raise self._failed(error) from error

    @property
    def reader(self) -> sqlite3.Connection:
        """The reading connection, for hot statements. Whoever uses it fetches all rows (D2) and translates
        errors.
        """
        return self._reader

    @property
    def writer(self) -> sqlite3.Connection:
        """The writing connection, for whoever builds a transaction in several steps; see `transaction`."""
        return self._writer

    @property
    def failure(self) -> str | None:
        """The error after which nothing more is written (D5)."""
        return self._failure

    def ask(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query on the writing connection, on the thread that commits, and fetch all its rows."""
        with self._turn:
            try:
                return self._writer.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                raise translate(error, self.path) from error

    def failed(self, error: sqlite3.Error) -> Exception:
        """Give the error for one that SQLite raised on `writer`, outside of `transaction`; after an I/O error
        nothing more is written (D5), and what is damaged is read as a whole before it is used again (D7).
        """
        translated = self._failed(error)
        if isinstance(translated, DatabaseDamaged):
            self.suspect(translated.reason)
        return translated

    def suspect(self, reason: str) -> None:
        """After this process nothing of the file is used before all of it has been read (D7)."""
        self._lock.mark(reason)

    def set_synchronous(self, synchronous: Synchronous) -> None:
        """Change what commits survive from now on; see `open_database`."""
        self._writer.execute(f"PRAGMA synchronous = {synchronous}").fetchall()

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query on the reading connection and fetch all its rows: what has been committed by now."""
        try:
            return self._reader.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise translate(error, self.path) from error

    def checkpoint(self) -> None:
        """Carry the log over into the file and empty it. Not on a loop thread: it waits for the disk."""
        with self._turn:
            if self._failure is None:
                self._carry_over()

    def _carry_over(self) -> None:
        try:
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            translated = self._failed(error)
            # A reader in the middle of a query, or a full disk, is no failure: the next call does it.
            if not isinstance(translated, CommitRefused):
                raise translated from error

    def check(self) -> None:
        """Read the whole file, and raise DatabaseDamaged if it is inconsistent. Not on a loop thread."""
        quick_check(self._reader, self.path)

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log. It stays near 4 MiB; more means that something holds a read open."""
        return _size(f"{self.path}-wal")

    def close(self, *, keep_log: bool = False) -> None:
        """Close both connections, which checkpoints, and release the file. Idempotent.

        Args:
            keep_log: leave the log as it is, as if this process had been killed.

        After a failed write (D5) nothing more is written: file and lock stay with this process until it ends.
        """
        if self._failure is not None:
            _abandoned.append(self)
            return
        # The last connection to close carries the log over and deletes it, unless it only reads.
        connections = [self._writer, self._reader] if keep_log else [self._reader, self._writer]
        for connection in connections:
            connection.close()
        self._lock.release()

    def _require_space(self, needed_bytes: int) -> None:
        if not self.reserve_bytes or self.free_bytes() >= self.reserve_bytes + needed_bytes:
            return
        # What the log holds is on the disk twice, or will be: this is what the reserve is for.
        if self.wal_bytes:
            self._carry_over()
        free = self.free_bytes()
        if free < self.reserve_bytes + needed_bytes:
            wanted = f" for {needed_bytes:,} more" if needed_bytes > free - self.reserve_bytes > 0 else ""
            raise CommitRefused(
                self.path,
                f"the disk has {free:,} bytes left, too few{wanted} above the reserve of "
                f"{self.reserve_bytes:,}",
                "Free some space; it is tried again",
            )

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        try:
            disk = os.statvfs(self.path.parent)
        except OSError as error:
            raise CommitRefused(self.path, str(error), "Bring the data directory back") from error
        return disk.f_bavail * disk.f_frsize

    def _roll_back(self) -> None:
        if self._writer.in_transaction:
            try:
                self._writer.execute("ROLLBACK")
            except sqlite3.Error as error:
                self._failure = f"{error} (in ROLLBACK)"
                self._lock.mark(self._failure)

    def _failed(self, error: sqlite3.Error) -> Exception:
        translated = translate(error, self.path)
        if isinstance(translated, CommitUnknown):
            self._failure = translated.reason
            self._lock.mark(translated.reason)
        return translated


# Kept from being collected: that would close the connection, and closing checkpoints.
_abandoned: list[DatabaseFile] = []


class WriteLock:
    """The right to open a file for writing (D1): a record lock on `<file>.lock`, which ends with its process.

    Raises:
        DataDirectoryInUse: somebody else has it; names the process.
        DataDirectoryError: the lock file cannot be made.
    """

    # Record locks do not tell two owners in one process apart, so this does: lock files held here.
    _held: ClassVar[set[str]] = set()

    def __init__(self, path: Path) -> None:
        self._path = os.path.realpath(f"{path}.lock")
        if self._path in WriteLock._held:
            raise DataDirectoryInUse(path, "the database", os.getpid())
        try:
            self._descriptor = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise cannot_use(self._path, error) from error
        try:
            os.fchmod(self._descriptor, 0o600)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            os.close(self._descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DataDirectoryInUse(path, "the database", holder) from None
            raise cannot_use(self._path, error) from error
        WriteLock._held.add(self._path)

    def mark(self, reason: str) -> None:
        """Tell whoever has it next that the file's last write had an unknown outcome (D7)."""
        with contextlib.suppress(OSError):  # the disk that fails may be this one
            os.pwrite(self._descriptor, reason.encode()[:4096], 0)

    def unmark(self) -> None:
        """The file has been found whole."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)

    @property
    def marked(self) -> bool:
        """Whether the last one who had it ended with a mark."""
        return os.fstat(self._descriptor).st_size > 0

    def release(self) -> None:
        """Give it up. Idempotent."""
        if self._descriptor >= 0:
            WriteLock._held.discard(self._path)
            os.close(self._descriptor)
            self._descriptor = -1

    def _holder(self) -> int | None:
        # struct flock of 64-bit Linux: type, whence, start, length, pid (fcntl(2)).
        layout = "hhqqi4x"
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            answer = struct.unpack(layout, fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        except (OSError, struct.error):
            return None
        return int(answer[4]) if answer[0] != fcntl.F_UNLCK else None


def _connect(path: Path, mode: str, synchronous: Synchronous, cache_kib: int) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            f"file:{quote(os.fspath(path))}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise translate(error, path, opening=True) from error
    try:
        for pragma in (
            f"synchronous = {'full' if synchronous == 'full' else 'normal'}",
            f"cache_size = -{cache_kib:d}",
            "mmap_size = 0",
            "temp_store = memory",
            "trusted_schema = off",
            f"journal_size_limit = {WAL_BYTES_KEPT:d}",
            f"query_only = {'on' if mode == 'ro' else 'off'}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("SELECT 1 FROM sqlite_schema").fetchall()
    except sqlite3.Error as error:
        connection.close()
        raise translate(error, path, opening=True) from error
    return connection


def _create(path: Path, schema: Schema | None) -> None:
    fresh = path.with_name(path.name + ".new")
    try:
        for leftover in (fresh, Path(f"{fresh}-journal")):
            leftover.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        connection = _connect(fresh, "rw", "full", 256)
        try:
            if schema is not None:
                schema.upgrade(connection)
            else:
                # Writes the first page; otherwise the file would stay empty.
                connection.execute("PRAGMA user_version = 0")
                connection.execute("VACUUM")
        finally:
            connection.close()
        os.rename(fresh, path)
        sync_directory(path.parent)
    except sqlite3.Error as error:
        raise translate(error, path, opening=True) from error
    except OSError as error:
        raise cannot_use(path, error) from error


def _version_in_log(path: Path) -> int:
    connection = _connect(path, "ro", "normal", 64)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error as error:
        raise translate(error, path, opening=True) from error
    finally:
        connection.close()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


__all__ = [
    "BUSY_TIMEOUT_SECONDS",
    "CHECKPOINT_PAGES",
    "RESERVE_BYTES",
    "ROWS_PER_STATEMENT_MAX",
    "WAL_BYTES_KEPT",
    "DatabaseFile",
    "RowStatement",
    "Synchronous",
    "WriteLock",
    "cannot_use",
    "database_version",
    "open_database",
    "quick_check",
    "sync_directory",
    "translate",
    "write_private_file",
]
