"""The data directory: what makes it ours, who is using it, and where things lie in it.

Owns the directory itself, `meta.json` (format and number of shards, fixed when it is made), `token`, and
`broker.lock`, which the supervisor holds (flock) for as long as the instance runs; its text says who that is.
Must not open a database: it only reads the version in each one's first page, so that an instance which cannot
    start says so before it starts
anything.

    DIR/meta.json  broker.lock  token  gateway.sock  registry.db  shards/0.db 1.db …
"""

import errno
import fcntl
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from storage.database import cannot_use, database_version, write_private_file
from storage.errors import DataDirectoryError, DataDirectoryInUse, SchemaTooNew
from storage.migrations import REGISTRY, SHARD
from storage.registry import registry_path
from storage.shards import shard_path

FORMAT = 1
"""Version of the directory's own layout."""

SHARD_COUNT_DEFAULT = 4
"""More shards mean more fsyncs a second for the same work."""

SHARD_COUNT_MAX = 1024
"""There are 1024 partitions, and a shard is at least one of them."""

SOCKET_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket, in bytes: `sun_path` has 108, the last one a NUL (unix(7))."""

LOCK_WAIT_SECONDS = 0.25
"""How long a start waits for the lock: `read_holder` takes it for a moment to see whether it is free."""

_OURS_AT_BIRTH = frozenset({"broker.lock", "token", "token.new", "meta.json.new"})


@dataclass(frozen=True, slots=True)
class Holder:
    """The supervisor that runs on a data directory."""

    pid: int
    address: tuple[str, int] | None
    """Where its listener is bound; None while it is starting."""


class DataDirectory:
    """A data directory, held for this process alone: made if need be, locked, checked.

    Modes are 0700 for directories and 0600 for files, whatever the umask. A directory that exists is taken
    only if it is one of ours or empty.

    Args:
        path: the directory; parents that are missing are made.
        shard_count: number of shards if it is made now; one that exists keeps its own.

    Raises:
        DataDirectoryInUse: another instance runs on it; names its process.
        SchemaTooNew: a newer broker wrote it; untouched.
        DataDirectoryError: it cannot be made, read or written, or is no data directory.
    """

    def __init__(self, path: str | os.PathLike[str], *, shard_count: int = SHARD_COUNT_DEFAULT) -> None:
        if not 1 <= shard_count <= SHARD_COUNT_MAX:
            raise ValueError(f"shard_count is 1 to {SHARD_COUNT_MAX}, not {shard_count}")
        self.path = Path(os.path.abspath(path))
        self._descriptor = -1
        try:
            self._make()
            self._take_lock()
            try:
                self.shard_count = self._read_meta(shard_count)
                self._require_known_schemas()
                self._write_holder(None)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise cannot_use(error.filename or self.path, error) from error

    @property
    def token(self) -> str:
        """The token that opens the admin pages, made at first start."""
        return read_token(self.path)

    def announce(self, host: str, port: int) -> None:
        """Write into the lock file where this instance listens."""
        self._write_holder((host, port))

    def close(self) -> None:
        """Release the directory. The lock file stays, empty: removing it could remove a successor's.
        Idempotent.
        """
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        path = self.path
        for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
            try:
                os.mkdir(missing, 0o700)
                os.chmod(missing, 0o700)
            except FileExistsError:
                pass
        if not path.is_dir():
            raise DataDirectoryError(path, "it is not a directory", "Choose another --data")
        owner = path.stat().st_uid
        if owner not in (os.geteuid(), 0) and os.geteuid() != 0:
            raise DataDirectoryError(
                path, f"it belongs to another user (uid {owner})", "Choose another --data"
            )
        names = set(os.listdir(path))
        if "meta.json" not in names and (foreign := sorted(names - _OURS_AT_BIRTH)):
            raise DataDirectoryError(
                path,
                f"it is no data directory of the broker, and not empty (it holds {foreign[0]!r})",
                "Choose an empty or a new directory with --data",
            )
        os.chmod(path, 0o700)

    def _take_lock(self) -> None:
        name = self.path / "broker.lock"
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        try:
            os.fchmod(descriptor, 0o600)
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno != errno.EWOULDBLOCK:
                        raise
                    holder = _parse_holder(os.pread(descriptor, 4096, 0))
                    if time.monotonic() >= deadline:
                        raise DataDirectoryInUse(
                            self.path, "the data directory", holder.pid if holder else None
                        ) from None
                time.sleep(0.01)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _read_meta(self, shard_count: int) -> int:
        path = self.path / "meta.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            # Last of all, so that a directory with this file is complete.
            write_private_file(self.path / "token", secrets.token_urlsafe(32).encode() + b"\n")
            meta = {"format": FORMAT, "shard_count": shard_count}
            write_private_file(path, json.dumps(meta).encode() + b"\n")
            return shard_count
        return _parse_meta(path, content)

    def _require_known_schemas(self) -> None:
        for schema, path in [
            (REGISTRY, registry_path(self.path)),
            *((SHARD, shard_path(self.path, index)) for index in range(self.shard_count)),
        ]:
            found = database_version(path, writable=True)
            if found is not None and found > schema.version:
                raise SchemaTooNew(found, schema.version, path)

    def _write_holder(self, address: tuple[str, int] | None) -> None:
        text = json.dumps({"pid": os.getpid(), "address": address}).encode() + b"\n"
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))


def read_holder(path: str | os.PathLike[str]) -> Holder | None:
    """Give who runs on the data directory `path`, or None: nobody, or there is no such directory.

    Raises:
        DataDirectoryError: the lock file cannot be read; or it is held and does not say by whom.
    """
    name = Path(path) / "broker.lock"
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise cannot_use(name, error) from error
    try:
        # Shared: two that ask at once do not see each other. It goes with the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while (holder := _parse_holder(os.pread(descriptor, 4096, 0))) is None:
            # It has been taken a moment ago, and is about to be written.
            if time.monotonic() >= deadline:
                raise DataDirectoryError(
                    name, "it is held, and does not say by whom", "Find the process with fuser or lsof"
                ) from None
            time.sleep(0.01)
        return holder
    else:
        return None
    finally:
        os.close(descriptor)


def read_shard_count(path: str | os.PathLike[str]) -> int:
    """Give the number of shards that the data directory was made with."""
    name = Path(path) / "meta.json"
    try:
        return _parse_meta(name, name.read_bytes())
    except OSError as error:
        raise cannot_use(name, error) from error


def read_token(path: str | os.PathLike[str]) -> str:
    """Give the token of the data directory `path`. Only its owner can read it."""
    name = Path(path) / "token"
    try:
        return name.read_text("ascii").strip()
    except OSError as error:
        raise cannot_use(name, error) from error


def socket_path(path: str | os.PathLike[str]) -> Path:
    """Where the gateway's Unix socket lies in the data directory `path`.

    Raises:
        DataDirectoryError: the path is longer than a Unix socket's may be.
    """
    name = Path(os.path.abspath(path)) / "gateway.sock"
    size = len(os.fsencode(name))
    if size > SOCKET_PATH_BYTES_MAX:
        raise DataDirectoryError(
            name,
            f"its path has {size} bytes, and a Unix socket's may have {SOCKET_PATH_BYTES_MAX}",
            "Choose a shorter --data",
        )
    return name


def _parse_holder(content: bytes) -> Holder | None:
    try:
        fields = json.loads(content)
        address = fields["address"]
        return Holder(int(fields["pid"]), (str(address[0]), int(address[1])) if address else None)
    except (ValueError, TypeError, KeyError, IndexError):
        return None


def _parse_meta(path: Path, content: bytes) -> int:
    try:
        meta = json.loads(content)
        version, shard_count = int(meta["format"]), int(meta["shard_count"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataDirectoryError(
            path,
            f"it is damaged ({type(error).__name__})",
            'It reads {"format": 1, "shard_count": 4}: restore it',
        ) from None
    if version > FORMAT:
        raise SchemaTooNew(version, FORMAT, path)
    if not 1 <= shard_count <= SHARD_COUNT_MAX:
        raise DataDirectoryError(
            path,
            f"it names {shard_count} shards",
            f"Restore the number it was made with, 1 to {SHARD_COUNT_MAX}",
        )
    return shard_count
