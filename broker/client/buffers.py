"""What waits in a socket: messages to be sent, and what has come and was not read yet.

Owns the order and the bounds of both. Pure: who waits for room, or for something to be there, is the business
of `party_socket`.

Invariants:

    P4  A message is given out by a buffer once, or handed back by `take_all`, in the order of the calls.
    P5  A send buffer never holds more than its bounds; an inbox by at most the one message that overstepped.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from broker.client.errors import SendBufferFull

__all__ = ["EVENTS_MAX", "Closed", "Event", "Inbox", "Opened", "SendBuffer", "size_of"]

#: Unread Opened and Closed that an inbox keeps. A program that only sends reads none, for weeks.
EVENTS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection is open: the first one, or a later one.

    `url` is what it was opened with, query included; `subprotocol` is what the server chose, or None;
    `retries` is how many attempts had failed before, since the last stable connection.
    """

    url: str
    subprotocol: str | None
    retries: int


@dataclass(frozen=True, slots=True)
class Closed:
    """An open connection has ended.

    `code` and `reason` are those of the Close that ended it; 1006 where there was none, and then `reason` is
    the client's own explanation. `was_clean`: a Close went both ways; False with 1002 and 1007 too, which the
    client gives itself when it hears what is no WebSocket frame or no text. `retry_in_seconds` is the pause
    before the next attempt, 0.0 for a reconnect that was asked for, None if there is no next one.
    """

    code: int
    reason: str
    was_clean: bool
    retry_in_seconds: float | None


Event = str | bytes | Opened | Closed
"""What an inbox holds: messages, and what became of connections between them."""


def size_of(message: str | bytes) -> int:
    """Bytes of a message on the wire, its head aside."""
    return len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())


class SendBuffer:
    """Messages that no connection has been given yet."""

    __slots__ = ("_bytes", "_bytes_max", "_messages", "_messages_max", "_taken")

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._messages: deque[str | bytes] = deque()
        self._bytes = 0
        self._taken = 0
        self._messages_max = messages_max
        self._bytes_max = bytes_max

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def taken(self) -> int:
        """How many messages have left, of all that there ever were."""
        return self._taken

    @property
    def end(self) -> int:
        """The position behind the last message, counted from the first that there ever was."""
        return self._taken + len(self._messages)

    def has_room(self, message: str | bytes) -> bool:
        """Whether `append` would take it."""
        return len(self._messages) < self._messages_max and self._bytes + size_of(message) <= self._bytes_max

    def can_ever_hold(self, message: str | bytes) -> bool:
        """Whether `append` would take it if nothing else were there."""
        return size_of(message) <= self._bytes_max

    def append(self, message: str | bytes) -> None:
        """Add a message. Raises SendBufferFull at the bounds."""
        size = size_of(message)
        if len(self._messages) >= self._messages_max:
            raise SendBufferFull(
                "messages that wait to be sent",
                len(self._messages) + 1,
                self._messages_max,
                "messages",
                remedy="await wait_open(), send less, or raise `buffer_messages_max`",
            )
        if self._bytes + size > self._bytes_max:
            raise SendBufferFull(
                "messages that wait to be sent",
                size if size > self._bytes_max else self._bytes + size,
                self._bytes_max,
                remedy="await wait_open(), send less, or raise `buffer_bytes_max`",
            )
        self._messages.append(message)
        self._bytes += size

    def take(self, until: int | None = None) -> str | bytes | None:
        """The next message, which is not in the buffer any more; None if there is none before `until`."""
        if not self._messages or (until is not None and self._taken >= until):
            return None
        message = self._messages.popleft()
        self._bytes -= size_of(message)
        self._taken += 1
        return message

    def take_all(self) -> list[str | bytes]:
        """Everything, which is not in the buffer any more."""
        found = list(self._messages)
        self._taken += len(found)
        self._messages.clear()
        self._bytes = 0
        return found


class Inbox:
    """What has come and was not read, messages and events in their order."""

    __slots__ = ("_bytes", "_bytes_max", "_events", "_items", "_messages_max")

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._items: deque[Event] = deque()
        self._events = 0
        self._bytes = 0
        self._messages_max = messages_max
        self._bytes_max = bytes_max

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        """Whether messages are not wanted at all: its owner only sends."""
        return self._messages_max == 0

    @property
    def full(self) -> bool:
        """Whether no message should be read from the network before one is taken here."""
        return len(self._items) - self._events >= self._messages_max or self._bytes >= self._bytes_max

    def put(self, item: Event) -> None:
        """Add something. Of more events than EVENTS_MAX the oldest is dropped; messages never are."""
        self._items.append(item)
        if isinstance(item, str | bytes):
            self._bytes += size_of(item)
            return
        self._events += 1
        if self._events > EVENTS_MAX:
            oldest = next(n for n, each in enumerate(self._items) if isinstance(each, Opened | Closed))
            del self._items[oldest]
            self._events -= 1

    def take(self) -> Event | None:
        """The oldest, which is not in the inbox any more; None if there is none."""
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, str | bytes):
            self._bytes -= size_of(item)
        else:
            self._events -= 1
        return item
