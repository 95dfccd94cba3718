"""Virtual time: it stands still while anything runs, and goes on when a test says so.

Owns the clock of a kit and the order in which what becomes due on the way is run. Trio's deadlines, the
monotonic clock and the wall clock of the broker's modules all follow it (`storage.clock`). Must not wait in
real time, except for threads that room code has started.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, Final

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from storage import clock

__all__ = ["START", "Time", "seeded"]

#: The wall clock when a kit starts, unless it is told otherwise.
START: Final = datetime(2030, 1, 1, tzinfo=UTC)
#: The monotonic clock then: far from 0, which some fields use for "never".
ORIGIN_SECONDS: Final = 100_000.0
#: How long a thread of room code is left alone before it is looked at again, in real seconds.
THREAD_SECONDS: Final = 0.002
#: How often the loops of gateway and host look whether something is due, or has to be seen to; and how often
#: at most during one `advance`. What has a deadline of its own is done at its time in any case.
LOOKS: Final = (
    ("broker.gateway.hub", "CLOCK_SECONDS"),
    ("broker.gateway.hub", "REST_SECONDS"),
    ("hibernation.pool", "CLOCK_SECONDS"),
    ("hibernation.pool", "REST_SECONDS"),
    ("hibernation.wall_clock", "LOOK_SECONDS"),
)
LOOKS_MAX: Final = 1_000
#: Deadlines nearer than this are the same moment.
MOMENT_SECONDS: Final = 1e-9


class Time:
    """See the module.

    Args:
        mock: The clock of the trio run that the kit is in.
        start: What the wall clock shows at first.
    """

    def __init__(self, mock: MockClock, start: datetime) -> None:
        self._mock = mock
        self._began = mock.current_time()
        self._start = start.timestamp()

    @property
    def elapsed(self) -> float:
        """Seconds since the kit was started."""
        return self._mock.current_time() - self._began

    def monotonic(self) -> float:
        """In the place of `time.monotonic`."""
        return ORIGIN_SECONDS + self._mock.current_time()

    def now(self) -> float:
        """In the place of `time.time`."""
        return self._start + self.elapsed

    async def settle(self) -> None:
        """Return when nothing happens any more without time going on."""
        limiter = trio.to_thread.current_default_thread_limiter()
        while True:
            await wait_all_tasks_blocked()
            if not limiter.borrowed_tokens:
                return
            await wait_all_tasks_blocked(THREAD_SECONDS)  # a thread is at work: in real time

    async def advance(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let time go on, and run everything that becomes due on the way, in order.

        Args:
            seconds: How long at most; 0 runs what happens without time going on.
            until: Asked whenever nothing happens any more; time stops where it is true.

        Returns:
            What `until` said last.
        """
        with _coarsely(seconds):
            return await self._advance(seconds, until)

    async def _advance(self, seconds: float, until: Callable[[], bool]) -> bool:
        end = self._mock.current_time() + seconds
        while True:
            await self.settle()
            if until():
                return True
            left = end - self._mock.current_time()
            if left <= 0:
                return False
            due = trio.lowlevel.current_statistics().seconds_to_next_deadline
            self._mock.jump(min(left, max(due, MOMENT_SECONDS)))

    @contextlib.contextmanager
    def in_force(self, modules: Sequence[ModuleType] = ()) -> Iterator[None]:
        """Have the broker's modules, and these, follow this time."""
        monotonic, now = self.monotonic, self.now
        with clock.replaced(monotonic, now), contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(_followed(module, monotonic, now))
            yield


@contextlib.contextmanager
def _coarsely(seconds: float) -> Iterator[None]:
    """Have what the broker's loops look at now and then be looked at less often during a long time: they
    would be most of what is done in it.
    """
    usual = [
        (module, name, getattr(module, name))
        for module, name in ((sys.modules.get(module), name) for module, name in LOOKS)
        if hasattr(module, name)
    ]
    try:
        for module, name, value in usual:
            setattr(module, name, max(value, seconds / LOOKS_MAX))
        yield
    finally:
        for module, name, value in usual:
            setattr(module, name, value)


@contextlib.contextmanager
def _followed(module: ModuleType, monotonic: Callable[[], float], now: Callable[[], float]) -> Iterator[None]:
    """Have a module of the app follow: its names for `time`, `time.time` and `time.monotonic`."""
    import time

    others: dict[int, Any] = {
        id(time.monotonic): monotonic,
        id(time.time): now,
        id(time): _TimeModule(monotonic, now),
    }
    names = vars(module)
    before = {name: value for name, value in names.items() if id(value) in others}
    names.update({name: others[id(value)] for name, value in before.items()})
    try:
        yield
    finally:
        names.update(before)


class _TimeModule:
    """What a module that has said `import time` finds there."""

    def __init__(self, monotonic: Callable[[], float], now: Callable[[], float]) -> None:
        self.monotonic = monotonic
        self.time = now

    def __getattr__(self, name: str) -> Any:
        import time

        return getattr(time, name)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have chance follow from a seed: that of the module `random`, and trio's choice among ready tasks."""
    mine = random.getstate()
    choices = getattr(trio._core._run, "_r", None)
    theirs = choices.getstate() if isinstance(choices, random.Random) else None
    random.seed(seed)
    if isinstance(choices, random.Random):
        choices.seed(seed)
    try:
        yield
    finally:
        random.setstate(mine)
        if isinstance(choices, random.Random) and theirs is not None:
            choices.setstate(theirs)


def clock_of_this_run() -> MockClock:
    """The virtual clock that this trio run has.

    Raises:
        RuntimeError: It has none.
    """
    found = trio.lowlevel.current_clock()
    if not isinstance(found, MockClock):
        raise RuntimeError(
            "an AsyncKit needs a virtual clock: decorate the test with @broker.testing.virtual, or run it"
            " with trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))"
        )
    return found
