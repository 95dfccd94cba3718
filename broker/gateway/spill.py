"""Spill files: where a message too large for the kernel's buffer is kept, as it came, until its turn is
acknowledged.

Owns the files below `<data>/spill` and the sum of their sizes. The name of a file tells connection and stream
offset, so that what is in it can be told from what is still in the kernel.
"""

import os
import secrets
from pathlib import Path


class SpillFile:
    """A piece of one connection's byte stream, from `start` on."""

    __slots__ = ("_descriptor", "_path", "size", "start")

    def __init__(self, path: Path, start: int, *, left: bool = False) -> None:
        """Make the file, or take one that a former gateway has `left`."""
        how = os.O_RDWR | os.O_CLOEXEC | (0 if left else os.O_CREAT | os.O_TRUNC)
        self._path = path
        self._descriptor = os.open(path, how, 0o600)
        self.start = start
        self.size = os.fstat(self._descriptor).st_size if left else 0

    def cut(self, size: int) -> None:
        """Forget what lies beyond: it is still in the kernel."""
        os.ftruncate(self._descriptor, size)
        self.size = size

    def append(self, data: memoryview) -> None:
        """Add what comes next in the stream."""
        offset = self.size
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            offset += written
            data = data[written:]
        self.size = offset

    def read(self, start: int, end: int) -> bytes:
        """The stream's bytes from offset `start` to `end`."""
        data = os.pread(self._descriptor, end - start, start - self.start)
        while len(data) < end - start:
            more = os.pread(self._descriptor, end - start - len(data), start - self.start + len(data))
            if not more:
                raise OSError(f"{self._path} is shorter than it was")
            data += more
        return data

    def delete(self) -> None:
        """The message has been acknowledged, or its connection has ended."""
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)


class Spills:
    """All spill files of a gateway, bounded together by spill_bytes_max."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self.bytes = 0
        directory.mkdir(mode=0o700, exist_ok=True)
        #: Files of a former gateway, by connection number: where in its stream they begin.
        self._left: dict[int, int] = {}
        for path in directory.iterdir():
            number, _, start = path.name.partition("-")
            self._left[int(number)] = int(start)

    @property
    def has_left(self) -> bool:
        """Whether a former gateway has left files that nobody has taken."""
        return bool(self._left)

    def take_left(self, number: int) -> SpillFile | None:
        """The file that a former gateway has left of this connection."""
        start = self._left.pop(number, None)
        if start is None:
            return None
        return SpillFile(self._directory / f"{number}-{start}", start, left=True)

    def forget_left(self) -> None:
        """Remove what nobody has taken."""
        for number, start in self._left.items():
            (self._directory / f"{number}-{start}").unlink(missing_ok=True)
        self._left.clear()

    @property
    def has_room(self) -> bool:
        """Whether one more message may begin to spill."""
        return self.bytes < self._bytes_max

    def has_room_for(self, size: int) -> bool:
        """Whether so many bytes more may be spilled."""
        return self.bytes + size <= self._bytes_max

    def open_nameless(self) -> int:
        """A new file of no connection, for reading and writing, which is gone when it is closed."""
        # A name like the others', should this process end before it is taken away.
        path = self._directory / f"0-{secrets.randbits(63)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        return descriptor

    def create(self, number: int, start: int) -> SpillFile:
        """A new file for the connection with this number, its stream from `start` on."""
        return SpillFile(self._directory / f"{number}-{start}", start)

    def grew(self, size: int) -> None:
        """A file has become larger."""
        self.bytes += size

    def shrank(self, size: int) -> None:
        """A file of this size has gone."""
        self.bytes -= size
