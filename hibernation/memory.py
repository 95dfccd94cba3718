"""Gives memory that a burst has left free back to the system, when the burst is over.

Owns the decision when that is worth a few milliseconds. The C library keeps what was freed below the top of
its heap, so without this a process stays as large as its largest moment. Does nothing where the library has
no `malloc_trim`.
"""

import ctypes
from typing import Final

#: Units of work after which freed memory is worth looking for.
BURST: Final = 2_000
#: Units of work in one second up to which a process counts as quiet.
QUIET: Final = 100

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # malloc_trim(3), glibc


class Trimmer:
    """Call `each_second` about once a second with a count of the work done so far: messages, turns,
    connections.
    """

    __slots__ = ("_at_trim", "_before")

    def __init__(self) -> None:
        self._at_trim = 0
        self._before = 0

    def each_second(self, work: int) -> bool:
        """Give memory back, if much has been done since the last time and little in the last second.

        Returns:
            Whether it was time to.
        """
        quiet = work - self._before <= QUIET
        self._before = work
        if not quiet or work - self._at_trim < BURST:
            return False
        self._at_trim = work
        if _trim is not None:
            _trim(0)
        return True
