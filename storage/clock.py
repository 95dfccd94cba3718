"""The time of day and the monotonic clock, from one place, so that a test can own them.

Owns the two names that the other modules import from here: `monotonic` for durations, `now` for the wall
clock. Must not cost anything: they are the functions of `time` themselves, and modules bind them at import.
Its peer is `broker.testing`, which puts other functions in their place with `replaced`: in this module, and
in every module of ours that holds them under whatever name. Durations that trio counts follow trio's clock.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["monotonic", "now", "replaced"]

monotonic: Callable[[], float] = time.monotonic
"""Seconds that only grow, from an unknown origin."""

now: Callable[[], float] = time.time
"""Seconds of the wall clock since 1970, which somebody may set."""

PACKAGES: Final = ("broker", "hibernation", "storage")
"""Whose modules take part."""

_owned = threading.Lock()


class ClockInUse(RuntimeError):
    """Somebody else has replaced the clock of this process."""


@contextlib.contextmanager
def replaced(other_monotonic: Callable[[], float], other_now: Callable[[], float]) -> Iterator[None]:
    """Have other functions in the places of `monotonic` and `now`, in every module of ours, for a while.

    Raises:
        ClockInUse: they are replaced already.
    """
    if not _owned.acquire(blocking=False):
        raise ClockInUse("the clock of this process is replaced already: end that first")
    try:
        usual_monotonic, usual_now = monotonic, now
        _rebind(usual_monotonic, other_monotonic)
        _rebind(usual_now, other_now)
        try:
            yield
        finally:
            _rebind(other_monotonic, usual_monotonic)
            _rebind(other_now, usual_now)
    finally:
        _owned.release()


def _rebind(before: Callable[[], float], after: Callable[[], float]) -> None:
    """Put one function in the other's place, wherever a module of ours has it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in PACKAGES:
            continue
        names = vars(module)
        for attribute in [each for each, value in names.items() if value is before]:
            names[attribute] = after
