"""What a process that is told to stop still waits for, said in its log: nobody has to guess why a stop takes
long.

Owns when that is said, and that what is zero or empty is left out. Must not bound anything: each wait has a
bound of its own.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import trio
from structlog.typing import FilteringBoundLogger

__all__ = ["SAY_SECONDS", "named"]

SAY_SECONDS = 1.0
"""A wait that is over before is not worth a line; each further line comes after twice the time."""


@asynccontextmanager
async def named(
    log: FilteringBoundLogger, text: str, what: Callable[[], Mapping[str, object]]
) -> AsyncIterator[None]:
    """While the block runs, log `text` with what is waited for after a second, 3 s, 7 s and so on."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_say, log, text, what)
        yield
        nursery.cancel_scope.cancel()


async def _say(log: FilteringBoundLogger, text: str, what: Callable[[], Mapping[str, object]]) -> None:
    seconds = SAY_SECONDS
    while True:
        await trio.sleep(seconds)
        log.info(text, **{name: value for name, value in what().items() if value})
        seconds *= 2
