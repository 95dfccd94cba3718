"""The link: an ordered, numbered, acknowledged stream of messages between one gateway and one host.

Owns the numbering, what is kept until the peer acknowledges it, and the decision whether an arriving message
is next, a repetition, or ahead of a gap. Must not touch a socket, a clock or the meaning of an item: the
shells on both sides (`broker.gateway.links` and `hibernation.host`) move the bytes. Peer: another `Link`.

A message is `[sequence, acknowledged, items]`. `sequence` counts from 1; `acknowledged` says that everything
up to and including that number has been taken. Three short forms carry no items and no number of their own:
`[0, n, None]` only acknowledges, `[0, n, True]` asks for everything after `n` once more, `[0, n, False]` asks
for an acknowledgement at once.

What is kept is the encoded items, not the message: a repetition may go to another peer than the one whose
messages its first sending acknowledged, so it acknowledges nothing. A `Link` may outlive its peer: `resume`
goes on with the next one, which knows how much the one before it has taken and begins its own numbering anew.

Invariants, in every state:
    L1  items leave `take` in the order in which they entered the peer's `pack`, each exactly once
    L2  a message is kept from its `pack` until an acknowledgement covers it, whichever peer gives it
    L3  while the peer is the same `received` never falls; `acknowledged` never does, and never exceeds `sent`
"""

import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from cbor2 import dumps, loads

from storage.errors import BrokerError

Message = list[Any]

#: Bytes in front of each message on a stream: its length, big-endian.
LENGTH_BYTES = 4
#: Items that are larger than this together go in several messages, if they are several.
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
#: The head of a message: its length, then as CBOR an array of three and two 8-byte numbers (RFC 8949, 3.1).
_HEAD: Final = struct.Struct(">IBBQBQ")
_ARRAY_OF_3: Final = 0x83
_UINT64: Final = 0x1B
_HEAD_BYTES: Final = _HEAD.size - LENGTH_BYTES


class LinkError(BrokerError):
    """The peer broke the protocol of the link: its version differs, or its memory is damaged."""


class Link:
    """One end of a link.

    Args:
        received: What this end, or one whose place it takes, has taken of the peer's messages already.

    Attributes:
        sent: Number of the newest message packed here.
        received: Number of the newest message taken from the peer, in order.
        acknowledged: Number of the newest of our messages that the peer has taken.
    """

    __slots__ = ("_kept", "_owed", "acknowledged", "kept_bytes", "received", "sent")

    def __init__(self, received: int = 0) -> None:
        self.sent = 0
        self.received = received
        self.acknowledged = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        #: Of what is not acknowledged.
        self.kept_bytes = 0
        self._owed = 0

    def pack(self, items: list[Any], acknowledge: int | None = None) -> bytes:
        """Number `items`, keep them until acknowledged, and return the encoded message, length in front.

        Args:
            items: CBOR values; their meaning is `hibernation.wire`.
            acknowledge: What to acknowledge, when that is less than everything received: items that were
                made before
                the newest arrivals were looked at must not claim to know them.
        """
        body = dumps(items)
        if len(body) > MESSAGE_BYTES_MAX and len(items) > 1:
            half = len(items) // 2
            return self.pack(items[:half], acknowledge) + self.pack(items[half:], acknowledge)
        self.sent = sequence = self.sent + 1
        if acknowledge is None:
            acknowledge = self.received
        self._owed = self.received - acknowledge
        self._kept.append((sequence, body))
        self.kept_bytes += len(body)
        return _message(sequence, acknowledge, body)

    def take(self, message: Message) -> list[Any]:
        """Take one decoded message from the peer; return its items, or none if they were had before or come
        too early.

        Raises:
            LinkError: The message acknowledges what was never sent, or has not the form of one.
        """
        try:
            sequence, acknowledged, items = message
        except (TypeError, ValueError):
            raise LinkError("a link message has not three parts") from None
        if acknowledged > self.acknowledged:
            self._forget(acknowledged)
        if sequence == self.received + 1:
            self.received = sequence
            self._owed += 1
            return items  # type: ignore[no-any-return]
        return []

    def _forget(self, acknowledged: int) -> None:
        if acknowledged > self.sent:
            raise LinkError(f"the peer acknowledges message {acknowledged} of {self.sent}")
        self.acknowledged = acknowledged
        kept = self._kept
        while kept and kept[0][0] <= acknowledged:
            self.kept_bytes -= len(kept.popleft()[1])

    def resume(self, executed: int) -> None:
        """Go on with another peer, which begins at number 1 and needs nothing up to `executed` of ours.

        What it does need is `unacknowledged`, to be sent first.

        Raises:
            LinkError: It claims to know what was never sent.
        """
        if executed > self.acknowledged:
            self._forget(executed)
        self.received = 0
        self._owed = 0

    def is_gap(self, message: Message) -> bool:
        """Whether `message` is ahead of one that is missing, or asks for a repetition itself. Ask before
        `take`.
        """
        return bool(message[0] > self.received + 1)

    def wants_repetition(self, message: Message) -> bool:
        """Whether the peer asks with `message` for everything that it has not acknowledged."""
        return message[0] == 0 and message[2] is True

    def wants_acknowledgement(self, message: Message) -> bool:
        """Whether the peer asks with `message` what has been taken. Answer after what came before it."""
        return message[0] == 0 and message[2] is False

    def acknowledgement_request(self) -> bytes:
        """The short message that asks the peer what it has taken."""
        self._owed = 0
        return encode([0, self.received, False])

    def acknowledgement(self) -> bytes | None:
        """The short acknowledging message, if any message has been taken since the last one packed."""
        if not self._owed:
            return None
        self._owed = 0
        return encode([0, self.received, None])

    def repetition_request(self) -> bytes:
        """The short message that asks the peer for all that is missing here."""
        return encode([0, self.received, True])

    def unacknowledged(self) -> list[bytes]:
        """Everything packed and not acknowledged, in order, for a repetition or a new peer. It acknowledges
        nothing; what its first sending did may have been lost with it, and is owed again.
        """
        if self._kept and self.received:
            self._owed = max(self._owed, 1)
        return [_message(sequence, 0, body) for sequence, body in self._kept]


def _message(sequence: int, acknowledged: int, body: bytes) -> bytes:
    return _HEAD.pack(_HEAD_BYTES + len(body), _ARRAY_OF_3, _UINT64, sequence, _UINT64, acknowledged) + body


def encode(value: Any) -> bytes:
    """One CBOR value with its length in front, as it goes over a stream socket."""
    data = dumps(value)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


class StreamDecoder:
    """Cuts a byte stream into length-prefixed CBOR values, one at a time.

    What has come and is not asked for yet stays bytes: as objects it would be ten times as large.
    """

    __slots__ = ("_buffer", "_limit_bytes", "_position", "raw")

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self._buffer = bytearray()
        self._position = 0
        self._limit_bytes = limit_bytes
        #: The value given last, encoded.
        self.raw: bytes | bytearray = b""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add what came."""
        if self._position:
            del self._buffer[: self._position]
            self._position = 0
        self._buffer += data

    def rest(self) -> "StreamDecoder":
        """A decoder, of the usual limit, for what has come and has not been asked for."""
        decoder = StreamDecoder()
        decoder.feed(self._buffer[self._position :])
        return decoder

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Give the next whole value; StopIteration if there is none yet.

        Raises:
            LinkError: A length above `limit_bytes`, or bytes that are no CBOR.
        """
        buffer, position = self._buffer, self._position
        start = position + LENGTH_BYTES
        if start > len(buffer):
            raise StopIteration
        length = int.from_bytes(buffer[position:start], "big")
        if length > self._limit_bytes:
            raise LinkError(f"a link message of {length} bytes, {self._limit_bytes} allowed")
        stop = start + length
        if stop > len(buffer):
            raise StopIteration
        try:
            self.raw = raw = buffer[start:stop]
            value = loads(raw)
        except Exception as error:
            raise LinkError("a link message is no CBOR") from error
        self._position = stop
        return value
