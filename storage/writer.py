"""One long-lived thread that runs commits and checkpoints, so that a loop thread never waits for a disk.

Owns the thread, the queue to it and the list of finished jobs; its peer is an event loop that waits until
`fd` is readable and then calls `completed`. A thread hop per commit through a general pool costs more than
most commits; here the way there is a C queue and the way back one eventfd write per burst. Must not know what
a job does.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Completion = tuple[int, BaseException | None]


class Writer:
    """Runs jobs one after another, in the order of submission, on a thread of its own.

    All methods are for the owner's thread alone. The thread is a daemon: a process that ends without `close`
    ends as with kill -9, which every database here survives.

    Args:
        name: name of the thread, for stacks and logs.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._finished: deque[Completion] = deque()
        self._submitted = 0
        self._ended = 0  # set by the thread
        self._closed = False
        # Set by the thread before it writes to `fd`, reset by the owner after it has drained `fd` and before
        # it empties `_finished`: what is appended after the reset signals again, what came before it is taken
        # now.
        self._signalled = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> int:
        """Queue `job`, whose result is discarded. Returns its number: 1 for the first, then consecutive."""
        if self._closed:
            raise RuntimeError("the writer is closed")
        self._submitted += 1
        self._jobs.put(job)
        return self._submitted

    def completed(self) -> list[Completion]:
        """Take what has finished since the last call: (number, None or the error it raised), in order. Never
        waits.
        """
        if self.fd >= 0:
            try:
                os.eventfd_read(self.fd)
            except BlockingIOError:
                pass
            self._signalled = False
        finished = self._finished
        return [finished.popleft() for _ in range(len(finished))]

    @property
    def pending(self) -> int:
        """How many jobs have been submitted and not yet run to their end."""
        return self._submitted - self._ended

    def close(self) -> None:
        """Finish what is queued, end the thread and close `fd`. What finished last can still be taken.
        Idempotent.
        """
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        os.close(self.fd)
        self.fd = -1

    def _run(self) -> None:
        number = 0
        while (job := self._jobs.get()) is not None:
            number += 1
            error: BaseException | None = None
            try:
                job()
            except BaseException as raised:  # noqa: BLE001 - the owner decides, also about SystemExit
                error = raised
            # Neither the job nor its error may live here until the next one comes.
            del job
            self._finished.append((number, error))
            del error
            self._ended = number
            if not self._signalled:
                self._signalled = True
                os.eventfd_write(self.fd, 1)
