"""The time of day, for what is due at a point in time: alarms and crons.

Owns the one place that reads the wall clock for them, and the wait that follows it. trio's clock is monotonic
and does not notice when the wall clock is set, so nobody sleeps longer than `LOOK_SECONDS` at a time: what is
due is never early by the wall clock, and at most so late when it was set forward.
"""

from math import ceil, inf
from typing import Final

import trio

from storage.clock import now

__all__ = ["LOOK_SECONDS", "from_now_ms", "now_ms", "wait_until_ms"]

#: How often a waiter looks at the wall clock.
LOOK_SECONDS: Final = 1.0


def now_ms() -> int:
    """Whole milliseconds since 1970, UTC."""
    return int(now() * 1000)


def from_now_ms(delay_ms: float) -> int:
    """The time that is so many milliseconds away, rounded up."""
    return ceil(now() * 1000 + delay_ms)


async def wait_until_ms(due_ms: int | None, wanted: trio.Event) -> None:
    """Return when this time may have come, or `wanted` is set; without a time only then. It may be early: ask
    the clock again.
    """
    if due_ms is None:
        seconds = inf
    else:
        seconds = min(max(due_ms - now_ms(), 0) / 1000, LOOK_SECONDS)
    with trio.move_on_after(seconds):
        await wanted.wait()
