"""A writer that commits at once, on the thread of the loop: what it does takes no time that a test could see.

Owns nothing but the order; its peer is whoever has a `storage.writer.Writer`.
"""

import os
from collections import deque
from collections.abc import Callable

from storage.writer import Completion, Writer

__all__ = ["InlineWriter"]


class InlineWriter(Writer):
    """As `Writer`, without the thread. `submit` returns when the job has been done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._done: deque[Completion] = deque()
        self._number = 0
        self._closed = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], object]) -> int:
        """Do `job`."""
        if self._closed:
            raise RuntimeError("the writer is closed")
        self._number += 1
        error: BaseException | None = None
        try:
            job()
        except BaseException as raised:  # noqa: BLE001 - the owner decides, as of the thread
            error = raised
        self._done.append((self._number, error))
        os.eventfd_write(self.fd, 1)
        return self._number

    def completed(self) -> list[Completion]:
        """Take what has been done since the last call."""
        if self.fd >= 0:
            try:
                os.eventfd_read(self.fd)
            except BlockingIOError:
                pass
        done, self._done = list(self._done), deque()
        return done

    @property
    def pending(self) -> int:
        """Nothing ever is."""
        return 0

    def close(self) -> None:
        """Close `fd`. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self.fd)
            self.fd = -1
