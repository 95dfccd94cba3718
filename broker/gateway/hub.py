"""The hub: one epoll set for everything the gateway waits on, nested in trio's loop as a single readable
descriptor.

Owns the set, the handlers of descriptors that are not parked connections, and the deadlines. One pass over
what is ready is a tick; at its end the hub calls `end_of_tick`, so that what the tick produced leaves
together. Peers: `core` wires it.

Parked connections are registered edge-triggered: their peeked data stays in the kernel, and a level-triggered
set would report it for ever (epoll(7)). All the others are level-triggered.
"""

import heapq
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, epoll
from typing import Any, Final

import trio

from hibernation.logs import get_logger
from storage.clock import monotonic

#: What a parked connection is asked about. EPOLLERR and EPOLLHUP come unasked.
PARKED_EVENTS: Final = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET
#: The peer has ended its side, or the connection has failed.
ENDED: Final = EPOLLRDHUP | EPOLLHUP | EPOLLERR
#: Descriptors looked at in one poll.
EVENTS_PER_TICK: Final = 1024
#: A tick polls again as long as there is something, so often at most: waking a host costs more than a poll,
#: and what came meanwhile goes with the same message.
POLLS_PER_TICK: Final = 4
#: Nothing of the gateway is timed more finely.
CLOCK_SECONDS: Final = 0.05
#: And nothing more rarely than it is looked at in so long.
REST_SECONDS: Final = 1.0

log = get_logger("hub")

Handler = Callable[[int], None]


class Hub:
    """See the module.

    Args:
        parked: Called with descriptor and events for each parked connection; returns False for a descriptor
            that is none.
        end_of_tick: Called once after each pass.
        each_second: Called about once a second with the hub's time.
    """

    def __init__(
        self,
        parked: Callable[[int, int], bool],
        end_of_tick: Callable[[], None],
        each_second: Callable[[float], None],
    ) -> None:
        self._epoll = epoll()
        self._handlers: dict[int, Handler] = {}
        self._parked = parked
        self._end_of_tick = end_of_tick
        self._each_second = each_second
        self._deadlines: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._clock_wanted = trio.Event()
        #: When the present tick began, in seconds of the monotonic clock; and the same as a whole number.
        self.now = monotonic()
        self.second = int(self.now)
        self.ticks = 0
        self._paused = False

    def park(self, descriptor: int) -> None:
        """Watch a connection's descriptor, edge-triggered."""
        self._epoll.register(descriptor, PARKED_EVENTS)

    def unpark(self, descriptor: int) -> None:
        """Stop watching it. Must come before the descriptor is closed or passed on."""
        self._epoll.unregister(descriptor)

    def watch(self, descriptor: int, handler: Handler, events: int = EPOLLIN) -> None:
        """Call `handler(events)` whenever the descriptor is ready: level-triggered unless `events` holds
        EPOLLET.
        """
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def rewatch(self, descriptor: int, events: int) -> None:
        """Change what a watched descriptor is asked about."""
        self._epoll.modify(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching it. Must come before the descriptor is closed or passed on."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def forget(self, descriptor: int) -> None:
        """As `unwatch`, of a descriptor that may be closed already; nobody else holds its socket."""
        self._handlers.pop(descriptor, None)
        with suppress(OSError):
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action(*arguments)` in a later tick, not before `seconds` have passed."""
        heapq.heappush(self._deadlines, (monotonic() + seconds, next(self._order), action, arguments))
        self._clock_wanted.set()

    def pause(self) -> None:
        """Serve no parked connection and no deadline until `go_on`: they are somebody else's meanwhile."""
        self._paused = True

    def go_on(self) -> None:
        """Serve them again. `repark` each connection: what has happened to it was not looked at."""
        self._paused = False
        self._clock_wanted.set()

    def repark(self, descriptor: int) -> None:
        """Have a parked connection's descriptor reported anew."""
        self._epoll.modify(descriptor, PARKED_EVENTS)

    async def run(self) -> None:
        """Serve for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._clock)
            descriptor = self._epoll.fileno()
            while True:
                await trio.lowlevel.wait_readable(descriptor)
                self._tick()

    def _tick(self) -> None:
        self.now = now = monotonic()
        self.second = int(now)
        self.ticks += 1
        handlers, poll = self._handlers, self._epoll.poll
        parked = self._parked if not self._paused else _pass_over
        for _ in range(POLLS_PER_TICK):
            ready = poll(0, EVENTS_PER_TICK)
            if not ready:
                break
            for descriptor, events in ready:
                try:
                    if not parked(descriptor, events):
                        handler = handlers.get(descriptor)
                        if handler is not None:
                            handler(events)
                except Exception:
                    log.exception("a handler of the gateway failed")
        self._end_of_tick()

    async def _clock(self) -> None:
        second = monotonic()
        while True:
            with trio.move_on_after(REST_SECONDS):
                await self._clock_wanted.wait()
            self.now = now = monotonic()
            self.second = int(now)
            if self._paused:
                await trio.sleep(CLOCK_SECONDS)
                continue
            deadlines = self._deadlines
            while deadlines and deadlines[0][0] <= now:
                _, _, action, arguments = heapq.heappop(deadlines)
                try:
                    action(*arguments)
                except Exception:
                    log.exception("a deadline of the gateway failed")
            if now - second >= 1:
                second = now
                try:
                    self._each_second(now)
                except Exception:
                    log.exception("what the gateway does each second failed")
            self._end_of_tick()
            if not deadlines:
                self._clock_wanted = trio.Event()
            await trio.sleep(
                CLOCK_SECONDS
                if not deadlines
                else min(max(deadlines[0][0] - now, CLOCK_SECONDS), REST_SECONDS)
            )


def _pass_over(_descriptor: int, _events: int) -> bool:
    """In place of `parked` while it is paused: a handler's descriptor is served all the same."""
    return False


__all__ = ["ENDED", "EPOLLET", "EPOLLIN", "EPOLLOUT", "EPOLLPRI", "Handler", "Hub"]
