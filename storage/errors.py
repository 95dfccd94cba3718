"""The root of the broker's error tree, and the errors of everything kept on disk.

Owns the exception types that storage raises; foreign errors (`sqlite3.Error`, `OSError`, `cbor2.CBORError`)
are translated into these where they enter. Every error keeps its facts as fields and builds its text from
them, and every text ends with what the reader can do about it. Must not import anything of the project.
"""

import os


class BrokerError(Exception):
    """Root of every error that the broker raises on purpose."""


class DataDirectoryError(BrokerError):
    """The data directory, or a file in it, cannot be used: the instance does not start.

    Args:
        path: the file or directory that is in the way.
        reason: what is wrong with it, as a clause.
        remedy: what the operator can do, as a sentence without its full stop.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{self.path}: {reason}. {remedy}.")


class DataDirectoryInUse(DataDirectoryError):
    """Another process holds the file; `holder` is its process id, or None when it left no trace of it."""

    def __init__(self, path: str | os.PathLike[str], what: str, holder: int | None) -> None:
        self.holder = holder
        by = f"process {holder}" if holder is not None else "another process"
        super().__init__(path, f"{what} is in use by {by}", "Stop that process, or choose another --data")


class DatabaseDamaged(DataDirectoryError):
    """The file is not a SQLite database, or its content is inconsistent. It is left as it was found."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason, "The file was not touched; restore it from a backup or move it away")


class SchemaTooNew(DataDirectoryError):
    """The file was written by a newer version of the broker; it is left as it was found.

    Args:
        found: schema version in the file.
        known: newest schema version that this code can read.
        path: the file.
    """

    def __init__(self, found: int, known: int, path: str | os.PathLike[str]) -> None:
        self.found = found
        self.known = known
        super().__init__(
            path,
            f"its schema is version {found}, and this broker knows versions up to {known}",
            "The file was not touched; run the newer broker that wrote it, or choose another --data",
        )


class StorageLimitError(BrokerError):
    """Something is larger than its bound; raised where it is handed over, before anything has changed.

    Args:
        what: the thing with its unit, such as "the key (bytes)".
        given: its size in that unit.
        limit: the largest size that passes.
        remedy: what to do instead, as a sentence without its full stop.
    """

    def __init__(self, what: str, given: int, limit: int, remedy: str) -> None:
        self.what = what
        self.given = given
        self.limit = limit
        self.remedy = remedy
        super().__init__(f"{what}: {given:,} is over the limit of {limit:,}. {remedy}.")


class ValueEncodingError(BrokerError):
    """A value cannot be stored, or stored bytes are no value; raised before anything has changed.

    Args:
        reason: what is wrong, as a clause.
        remedy: what to do instead, as a sentence without its full stop.
        where: the path inside the value, such as "value['users'][3]"; empty when there is none.
        type_name: the Python type in question; empty when there is none.
    """

    def __init__(self, reason: str, remedy: str, *, where: str = "", type_name: str = "") -> None:
        self.reason = reason
        self.remedy = remedy
        self.where = where
        self.type_name = type_name
        super().__init__(f"{where}: {reason}. {remedy}." if where else f"{reason}. {remedy}.")


class SqlError(BrokerError):
    """A statement given to `storage.sql` was not carried out; nothing of it is left.

    Args:
        statement: the statement, as it was given; "" where it is not about one.
        reason: what is wrong, as a clause.
        remedy: what to do instead, as a sentence without its full stop.
        code: SQLite's name of the error, such as "SQLITE_CONSTRAINT_UNIQUE"; "" when it is not SQLite's.
    """

    def __init__(self, statement: str, reason: str, remedy: str, *, code: str = "") -> None:
        self.statement = statement
        self.reason = reason
        self.remedy = remedy
        self.code = code
        shown = " ".join(statement.split())
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        shown = f" The statement: {shown}" if shown else ""
        super().__init__(f"{reason}{f' ({code})' if code else ''}. {remedy}.{shown}")


class CommitRefused(BrokerError):
    """A transaction did not happen and nothing of it is on disk: it may be tried again as it is.

    The disk is full or nearly full, or another process holds the file's write lock.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{self.path}: nothing was written: {reason}. {remedy}.")


class CommitUnknown(BrokerError):
    """The system reported an I/O error: the transaction may or may not be on disk.

    A later fsync that succeeds proves nothing on Linux, so the file takes no further commit in this process:
        the
    process must end, and whoever opens the file next looks at what is there.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(
            f"{self.path}: the outcome of a write is unknown: {reason}. "
            "End this process; a new one reads what is on disk."
        )


class GenerationPassed(BrokerError):
    """Another process has opened this shard since; nothing was written, and nothing more may be.

    Args:
        path: the shard's file.
        own: generation that this process raised the shard to.
        current: generation found in the file.
    """

    def __init__(self, path: str | os.PathLike[str], own: int, current: int) -> None:
        self.path = os.fspath(path)
        self.own = own
        self.current = current
        super().__init__(
            f"{self.path}: opened as generation {own}, now owned by generation {current}. "
            "Nothing was written; end this process."
        )
