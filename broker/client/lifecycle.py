"""When a socket connects, how long it waits before, and when it gives up: a table and a policy.

Owns the state of a socket, whatever its connection is made of, and the count of attempts. Pure: time and
chance come in as arguments. Its peer is `party_socket`, which does what the state says: CONNECTING and OPEN
are one connection from dialling to its end, WAITING is a pause, CLOSED is nothing.

    CLOSED ──reconnect──▶ CONNECTING ──opened──▶ OPEN ──close, reconnect──▶ CLOSING
       ▲                    │  ▲                  │                           │ over
       │◀── refused ────────┤  │ due              │ ended                     ├──▶ CONNECTING (reconnect)
       │                    ▼  │                  ▼                           └──▶ CLOSED
       └◀── given up ──── WAITING ◀───────────────┘

`close` leads to CLOSED from every state, and `reconnect` to CONNECTING, from OPEN both by way of CLOSING.

Invariants:

    P1  After a close there is no attempt before the next reconnect.
    P2  Without a reconnect, at most `retries_max` attempts follow the first one or the last stable
    connection. P3  No pause is shorter than the server's Retry-After (up to RETRY_AFTER_SECONDS_MAX), or
    longer than that
        and `delay_max_seconds`, jitter included.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["RETRY_AFTER_SECONDS_MAX", "Backoff", "Lifecycle", "State"]

#: A Retry-After beyond it is not believed: a client is not sent away for a week by a mistaken header.
RETRY_AFTER_SECONDS_MAX: Final = 3600.0


class State(StrEnum):
    """What a socket does. Its text is the name in lower case."""

    CLOSED = "closed"
    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the n-th retry in a row, and how many there are. Times in seconds."""

    delay_min: float
    delay_max: float
    growth: float
    jitter: float
    uptime_min: float
    retries_max: int | None

    def delay(self, base: float, chance: float, retry_after: float) -> float:
        """A pause between the base less jitter and the base, and not before the server wants it.

        `chance` is from 0 to 1. Jitter on Retry-After lengthens it: clients that were sent away together do
        not come back together.
        """
        asked = min(retry_after, RETRY_AFTER_SECONDS_MAX)
        return max(base * (1 - self.jitter * chance), asked * (1 + self.jitter * chance))


class Lifecycle:
    """The state of one socket."""

    __slots__ = ("_backoff", "_base", "_opened_at", "again", "retries", "state")

    def __init__(self, backoff: Backoff, *, start_closed: bool = False) -> None:
        self._backoff = backoff
        self._base = 0.0
        self._opened_at: float | None = None
        #: In CLOSING: whether to connect again afterwards.
        self.again = False
        #: Attempts since the first one, or since the last stable connection.
        self.retries = 0
        self.state = State.CLOSED if start_closed else State.CONNECTING

    # --- What the user wants

    def reconnect(self) -> None:
        """Connect now, whatever is going on; the count of attempts begins anew."""
        self.retries = 0
        if self.state in (State.OPEN, State.CLOSING):
            self.state = State.CLOSING
            self.again = True
        else:
            self.state = State.CONNECTING

    def close(self) -> None:
        """Connect no more."""
        if self.state in (State.OPEN, State.CLOSING):
            self.state = State.CLOSING
            self.again = False
        else:
            self.state = State.CLOSED

    # --- What happens

    def opened(self, now: float) -> None:
        """The handshake has succeeded."""
        assert self.state is State.CONNECTING
        self.state = State.OPEN
        self._opened_at = now

    def failed(self, chance: float, *, retry: bool, retry_after: float = 0.0) -> float | None:
        """An attempt has come to nothing; gives the pause before the next, or None if there is none."""
        assert self.state is State.CONNECTING
        return self._next(chance, retry, retry_after)

    def ended(self, now: float, chance: float, *, retry: bool) -> float | None:
        """An open connection has ended, and not by us; gives the pause, or None if there is no next one."""
        assert self.state is State.OPEN
        assert self._opened_at is not None
        if now - self._opened_at >= self._backoff.uptime_min:
            self.retries = 0
        return self._next(chance, retry, 0.0)

    def over(self) -> None:
        """What CLOSING was about is done, or has been broken off."""
        assert self.state is State.CLOSING
        self.state = State.CONNECTING if self.again else State.CLOSED
        self.again = False

    def due(self) -> None:
        """The pause has passed."""
        assert self.state is State.WAITING
        self.state = State.CONNECTING

    def give_up(self) -> None:
        """Something that no attempt can mend."""
        self.state = State.CLOSED
        self.again = False

    def _next(self, chance: float, retry: bool, retry_after: float) -> float | None:
        limit = self._backoff.retries_max
        if not retry or (limit is not None and self.retries >= limit):
            self.state = State.CLOSED
            return None
        # The base grows step by step: as a power it would overflow after some hours.
        grown = self._base * self._backoff.growth if self.retries else self._backoff.delay_min
        self._base = min(grown, self._backoff.delay_max)
        self.retries += 1
        self.state = State.WAITING
        return self._backoff.delay(self._base, chance, retry_after)
