"""Spill files: where a message too large for the kernel's buffer is kept, as it came, until its turn is
acknowledged.

Owns the files below `<data>/spill` and the sum of their sizes. The name of a file tells connection and stream
offset, so that what is in it can be told from what is still in the kernel.
"""

import os
from pathlib import Path


class SpillFile:
    """A piece of one connection's byte stream, from `start` on."""

    __slots__ = ("_descriptor", "_path", "size", "start")

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.start = start
        self.size = 0

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
        for left in directory.iterdir():
            left.unlink()

    @property
    def has_room(self) -> bool:
        """Whether one more message may begin to spill."""
        return self.bytes < self._bytes_max

    def create(self, number: int, start: int) -> SpillFile:
        """A new file for the connection with this number, its stream from `start` on."""
        return SpillFile(self._directory / f"{number}-{start}", start)

    def grew(self, size: int) -> None:
        """A file has become larger."""
        self.bytes += size

    def shrank(self, size: int) -> None:
        """A file of this size has gone."""
        self.bytes -= size
