"""The WebSocket frame codec: bytes in, messages and events out, and back.

Pure: no socket, no clock, no connection. Its peer is the gateway's connection code, which holds the
received bytes and decides what to read and when to consume it.

Three doors, from cheap to thorough:

* `take_message` reads what nearly every message is: one whole, unfragmented, masked data frame. It
  never raises; None means "not that", and the next two say what it is instead.
* `frame_header` reads one header and refuses what the header alone shows to be wrong, so that a lie
  about the length costs nothing.
* `MessageReader` reads everything else, one whole frame at a time: fragments, control frames, and the
  frames that `take_message` would not have. It exists only while a connection needs it.

Invariants:

1. `take_message` returns a message only if `frame_header` and a fresh `MessageReader` with the same limit
   would give the same one.
2. No payload byte is copied before its frame's header has passed every limit.
3. What is returned never refers to the receive buffer that it came from.
"""

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from wsproto.frame_protocol import FrameProtocol, ParseFailed

from broker.gateway.deflate import (
    COMPRESSED_BYTES_MAX,
    CorruptDeflate,
    InflatedTooLarge,
    deflate,
    inflate,
    wire_bytes_max,
)

__all__ = [
    "Close",
    "Event",
    "FRAGMENT_MAX",
    "Header",
    "Message",
    "MessageReader",
    "Ping",
    "Pong",
    "Violation",
    "close_reply",
    "encode_close",
    "encode_compressed",
    "encode_message",
    "encode_ping",
    "encode_pong",
    "frame_header",
    "sendable",
    "take_message",
]

Bytes = bytes | bytearray | memoryview  # the receive buffer: it will be written over, so slices are copied

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

#: Of a frame's first byte: the message is compressed (RFC 7692 6).
COMPRESSED: Final = 0x40

# Opcodes that RFC 6455 11.8 defines; the others are reserved and fail the connection (5.2).
_OPCODES: Final = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG})

# Close codes. They are those that a Close frame may carry, in either direction: RFC 6455 7.4.1 and the
# IANA registry (1012 to 1014), and the ranges of 7.4.2 that belong to libraries and applications.
# 1004 has no meaning; 1005, 1006 and 1015 say what happened locally and never go on the wire.
NORMAL: Final = 1000
PROTOCOL_ERROR: Final = 1002
NO_CODE: Final = 1005
BAD_DATA: Final = 1007
POLICY: Final = 1008
TOO_BIG: Final = 1009
_CLOSE_CODES: Final = frozenset({*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)})

CONTROL_BYTES_MAX: Final = 125  # RFC 6455 5.5
CLOSE_REASON_BYTES_MAX: Final = CONTROL_BYTES_MAX - 2  # the code takes two

# How many frames one message may be cut into. Each costs some 10 µs and its own piece of memory, whatever
# its length, so the limit on bytes does not bound them. 1 MiB in pieces of 64 bytes still passes.
FRAGMENT_MAX: Final = 16_384


class Violation(Exception):
    """The client broke the protocol or a limit; the connection ends with this close code.

    `code` is 1002, 1007, 1008 or 1009 (RFC 6455 7.4.1); `reason` is English for the Close frame, within
    123 bytes and free of what the client sent.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code} {self.reason}"


class Header(NamedTuple):
    """One frame's header (RFC 6455 5.2), already found to be well-formed.

    `length` is that of the payload in bytes; `header_bytes` counts the masking key in. So the frame ends
    `header_bytes + length` after it began.
    """

    opcode: int
    fin: bool
    rsv: int
    masked: bool
    length: int
    header_bytes: int


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message: str if its frames were text, else bytes.

    `inflated_bytes` is its size if it came compressed: then it may be far more than that of its frames.
    """

    data: str | bytes
    inflated_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping, to be answered with a pong of the same payload (RFC 6455 5.5.2)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """A pong, asked for or not (RFC 6455 5.5.3)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """The client's Close frame; `code` is 1005 if it held none (RFC 6455 7.1.5).

    Whatever follows it on the connection is not for this module: the caller discards it (RFC 6455 1.4).
    """

    code: int
    reason: str


Event = Message | Ping | Pong | Close


# --- the fast path --------------------------------------------------------------------------------

# By payload length, for the short form of it (RFC 6455 5.2): how to read masking key and payload in one
# call; the factor that repeats a 32-bit key over the payload; and what cuts the last repetition to size.
# An exclusive or of two long integers is the fastest one that Python has for a short payload.
_KEY_AND_PAYLOAD: Final = [struct.Struct(f"<I{n}s").unpack_from for n in range(126)]
_REPEAT: Final = [sum(1 << 32 * i for i in range((n + 3) // 4)) for n in range(126)]
_CUT: Final = [(1 << 8 * n) - 1 for n in range(126)]

# For long payloads: a translation table for each value of a key byte, used on every fourth byte. From
# about 1 KiB on it is faster than integers, whose conversion costs more than the exclusive or.
_XOR: Final = [bytes(a ^ b for a in range(256)) for b in range(256)]
_INTEGER_BYTES_MAX: Final = 1024

_from_bytes = int.from_bytes


def take_message(data: Bytes, pos: int, end: int, limit_bytes: int) -> tuple[str | bytes, int] | None:
    """Take the message at `pos` if it is one whole, unfragmented, masked, well-formed data frame.

    `data` holds received bytes up to `end`; `limit_bytes` bounds the payload. It may be used only where a
    message begins, not between the fragments of one. Gives the message (a copy) and the position after its
    frame, or None: more bytes are needed, or `frame_header` and a `MessageReader` must look at it.
    """
    if end - pos < 6:
        return None
    length = data[pos + 1] - 0x80  # negative if the mask bit is off
    if 0 <= length < 126:
        after = pos + 6 + length
        if after > end or length > limit_bytes:
            return None
        key, payload = _KEY_AND_PAYLOAD[length](data, pos + 2)
        payload = ((_from_bytes(payload, "little") ^ key * _REPEAT[length]) & _CUT[length]).to_bytes(
            length, "little"
        )
        first = data[pos]
        if first == 0x81:
            try:
                return payload.decode(), after
            except UnicodeDecodeError:
                return None
        if first == 0x82:
            return payload, after
        return None
    return _take_long_message(data, pos, end, limit_bytes)


def _take_long_message(data: Bytes, pos: int, end: int, limit_bytes: int) -> tuple[str | bytes, int] | None:
    """The same for a payload of 126 bytes or more, whose length follows in 2 or 8 bytes."""
    first = data[pos]
    if first not in {0x81, 0x82}:
        return None
    form = data[pos + 1]
    if form == 0xFE:
        length = _from_bytes(data[pos + 2 : pos + 4], "big")
        if length < 126:
            return None
        start = pos + 8
    elif form == 0xFF and end - pos >= 10:
        length = _from_bytes(data[pos + 2 : pos + 10], "big")
        if length < 0x10000:
            return None
        start = pos + 14
    else:
        return None
    after = start + length
    if length > limit_bytes or after > end:
        return None
    payload = _unmask(data, start, after)
    if first == 0x82:
        return bytes(payload), after
    try:
        return payload.decode(), after
    except UnicodeDecodeError:
        return None


def _unmask(data: Bytes, start: int, end: int) -> bytes | bytearray:
    """A copy of the payload from `start` to `end` without its mask (RFC 6455 5.3); the key is before it."""
    length = end - start
    key = bytes(data[start - 4 : start])
    if length <= _INTEGER_BYTES_MAX:
        mask = (key * (length // 4 + 1))[:length]
        value = _from_bytes(data[start:end], "little") ^ _from_bytes(mask, "little")
        return value.to_bytes(length, "little")
    with memoryview(data) as view:
        payload = bytearray(view[start:end])
    for i in range(4):
        payload[i::4] = payload[i::4].translate(_XOR[key[i]])
    return payload


# --- headers --------------------------------------------------------------------------------------


def frame_header(data: Bytes, pos: int, end: int, *, compressed: bool = False) -> Header | None:
    """Read the header of the client's frame that begins at `pos`, where `data` is received up to `end`.

    Gives None while the length is not known yet. The masking key need not have arrived: a caller that has
    a length can refuse it at once. Raises Violation(1002) as soon as a byte shows a reserved bit or opcode,
    a control frame in fragments or over 125 bytes, no mask, or a length that is not in its shortest form
    or has bit 63 set (RFC 6455 5.1, 5.2, 5.5). `compressed`: compression was agreed on, so the first frame of
    a message, and no other, may have the bit that says so (RFC 7692 6).
    """
    if pos >= end:
        return None
    first = data[pos]
    opcode = first & 0x0F
    fin = first >= 0x80
    if first & 0x70 and (first & 0x70 != COMPRESSED or not compressed or opcode not in (TEXT, BINARY)):
        raise Violation(PROTOCOL_ERROR, "a reserved bit is set")
    if opcode not in _OPCODES:
        raise Violation(PROTOCOL_ERROR, "reserved opcode")
    if opcode >= CLOSE and not fin:
        raise Violation(PROTOCOL_ERROR, "a control frame must not be fragmented")
    if end - pos < 2:
        return None
    second = data[pos + 1]
    if second < 0x80:
        raise Violation(PROTOCOL_ERROR, "a client must mask its frames")
    length = second - 0x80
    header_bytes = 6
    if length > CONTROL_BYTES_MAX:
        if opcode >= CLOSE:
            raise Violation(PROTOCOL_ERROR, "a control frame holds at most 125 bytes")
        if length == 126:
            if end - pos < 4:
                return None
            length = _from_bytes(data[pos + 2 : pos + 4], "big")
            shortest = length >= 126
            header_bytes = 8
        else:
            if end - pos < 10:
                return None
            length = _from_bytes(data[pos + 2 : pos + 10], "big")
            if length >> 63:
                raise Violation(PROTOCOL_ERROR, "bit 63 of the length is set")
            shortest = length >= 0x10000
            header_bytes = 14
        if not shortest:
            raise Violation(PROTOCOL_ERROR, "the length is not in its shortest form")
    return Header(opcode, fin, first >> 4 & 7, True, length, header_bytes)


# --- everything else ------------------------------------------------------------------------------


class MessageReader:
    """Reads whole frames of one connection in order, and puts the fragments of a message together.

    `limit_bytes` bounds a message's payload, all fragments together; `fragment_max` the number of its frames.
    Made when `take_message` gives None for a frame that is all there; may be dropped whenever `idle`.
    wsproto checks the UTF-8 across fragments; it has no limits of its own, so it never sees a frame that
    has not passed them here. Control frames hold no state and do not go through it: the registry of close
    codes has one (1014) that it refuses. Nor do compressed messages, which are kept as they come until they
    are whole: what they grow to, and whether it is text, shows only then.

    `compressed`: compression was agreed on.
    """

    def __init__(
        self, limit_bytes: int, fragment_max: int = FRAGMENT_MAX, *, compressed: bool = False
    ) -> None:
        self._limit_bytes = limit_bytes
        self._fragment_max = fragment_max
        self._compressed = compressed
        # Opcode of the compressed message that has begun and not ended; 0: there is none.
        self._inflating = 0
        # Of the message that has begun and not ended: its payload bytes, its frames, and its decoded pieces,
        # which are all str or all bytes.
        self._bytes = 0
        self._fragments = 0
        self._pieces: list[str | bytes] = []
        self._protocol: FrameProtocol | None = None  # made for the first data frame

    @property
    def idle(self) -> bool:
        """No message has begun without ending: dropping the reader now loses nothing."""
        return not self._fragments

    def check_header(self, header: Header) -> None:
        """Refuse a frame by its header, before its payload is waited for. Changes nothing.

        Raises Violation: 1002 for a continuation of nothing, or for a new message inside another (RFC 6455
        5.4); 1009 if the message would be over `limit_bytes`, or, compressed, over what that can take; 1008
        if it comes in too many fragments.
        """
        if header.opcode >= CLOSE:
            return
        if header.opcode == CONTINUATION:
            if not self._fragments:
                raise Violation(PROTOCOL_ERROR, "a continuation without a message to continue")
        elif self._fragments:
            raise Violation(PROTOCOL_ERROR, "a new message began inside a fragmented one")
        limit = self._limit_bytes
        if self._inflating or header.rsv:
            limit = wire_bytes_max(limit)
        if self._bytes + header.length > limit:
            raise Violation(TOO_BIG, f"a message holds at most {self._limit_bytes} bytes")
        if self._fragments >= self._fragment_max:
            raise Violation(POLICY, f"a message comes in at most {self._fragment_max} fragments")

    def feed(self, frame: Bytes) -> list[Event]:
        """Read exactly one whole frame, header and masking key included.

        Gives no event for a fragment that does not end its message, else one. Raises Violation as
        `frame_header` and `check_header` do, 1007 for text that is not UTF-8 (RFC 6455 8.1; told at the first
        wrong byte, of a compressed message at its end) and for what cannot be decompressed, 1009 for what is
        too large when it is, 1002 for a Close frame of one byte or with a code
        that must not be sent (7.4); the reader is of no use after it. Raises ValueError, a fault of the
        caller, for anything but one whole frame.
        """
        header = frame_header(frame, 0, len(frame), compressed=self._compressed)
        if header is None or header.header_bytes + header.length != len(frame):
            raise ValueError("feed() takes exactly one whole frame")
        self.check_header(header)
        if header.opcode >= CLOSE:
            return [_control_event(header.opcode, bytes(_unmask(frame, 6, len(frame))))]

        self._bytes += header.length
        self._fragments += 1
        if self._inflating or header.rsv:
            return self._feed_compressed(header, frame)
        if self._protocol is None:
            self._protocol = FrameProtocol(client=False, extensions=[])
        self._protocol.receive_bytes(bytes(frame))
        try:
            for piece in self._protocol.received_frames():
                assert isinstance(piece.payload, str | bytes)
                self._pieces.append(piece.payload)
        except ParseFailed as error:
            # The order of frames was checked above: what is left to find is text that is not UTF-8.
            raise Violation(int(error.code), "the text is not valid UTF-8") from error
        if not header.fin:
            return []
        pieces, self._pieces = self._pieces, []
        self._bytes = 0
        self._fragments = 0
        if isinstance(pieces[0], str):
            return [Message("".join(cast("list[str]", pieces)))]
        return [Message(b"".join(cast("list[bytes]", pieces)))]

    def _feed_compressed(self, header: Header, frame: Bytes) -> list[Event]:
        self._inflating = self._inflating or header.opcode
        self._pieces.append(bytes(_unmask(frame, header.header_bytes, len(frame))))
        if not header.fin:
            return []
        opcode, pieces = self._inflating, cast("list[bytes]", self._pieces)
        self._inflating = self._bytes = self._fragments = 0
        self._pieces = []
        try:
            data = inflate(pieces, self._limit_bytes)
            return [Message(data.decode() if opcode == TEXT else data, len(data))]
        except InflatedTooLarge:
            raise Violation(TOO_BIG, f"a message holds at most {self._limit_bytes} bytes") from None
        except CorruptDeflate:
            raise Violation(BAD_DATA, "the message cannot be decompressed") from None
        except UnicodeDecodeError:
            raise Violation(BAD_DATA, "the text is not valid UTF-8") from None


def _control_event(opcode: int, payload: bytes) -> Ping | Pong | Close:
    if opcode == PING:
        return Ping(payload)
    if opcode == PONG:
        return Pong(payload)
    if not payload:
        return Close(NO_CODE, "")
    if len(payload) == 1:
        raise Violation(PROTOCOL_ERROR, "a close code has two bytes")
    code = _from_bytes(payload[:2], "big")
    if code not in _CLOSE_CODES:
        raise Violation(PROTOCOL_ERROR, "this close code must not be sent")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError as error:
        raise Violation(BAD_DATA, "the close reason is not valid UTF-8") from error


# --- sending --------------------------------------------------------------------------------------

# The header of a server's frame with a short payload, by its length. A server never masks (RFC 6455 5.1).
_TEXT_HEADERS: Final = [bytes((0x80 | TEXT, n)) for n in range(126)]
_BINARY_HEADERS: Final = [bytes((0x80 | BINARY, n)) for n in range(126)]


def encode_message(message: str | bytes) -> bytes:
    """One unmasked frame that holds the whole message: text for str, binary for bytes.

    Raises UnicodeEncodeError, which is a ValueError, for a str with lone surrogates: it has no UTF-8.
    """
    if isinstance(message, str):
        payload = message.encode()
        length = len(payload)
        if length < 126:
            return _TEXT_HEADERS[length] + payload
        first = 0x80 | TEXT
    else:
        payload = message
        length = len(payload)
        if length < 126:
            return _BINARY_HEADERS[length] + payload
        first = 0x80 | BINARY
    return _long_header(first, length) + payload


def _long_header(first: int, length: int) -> bytes:
    """The header of a server's frame with 126 bytes or more."""
    if length < 0x10000:
        return struct.pack("!BBH", first, 126, length)
    return struct.pack("!BBQ", first, 127, length)


def encode_compressed(frame: bytes, window_bits: int) -> bytes:
    """The frame of `encode_message` with its payload compressed (RFC 7692 7.2.1); the same frame if that
    would not make it smaller, or it is over COMPRESSED_BYTES_MAX.

    The bytes depend on the version of zlib: whoever has sent some of them must keep the rest.
    """
    form = frame[1]
    payload = frame[2 if form < 126 else 4 if form == 126 else 10 :]
    if not 0 < len(payload) <= COMPRESSED_BYTES_MAX:
        return frame
    small = deflate(payload, window_bits)
    length = len(small)
    first = frame[0] | COMPRESSED
    header = bytes((first, length)) if length < 126 else _long_header(first, length)
    return header + small if len(header) + length < len(frame) else frame


def payload_bytes(frame: bytes) -> int:
    """Size of the payload of a server's frame."""
    form = frame[1]
    return len(frame) - (2 if form < 126 else 4 if form == 126 else 10)


def sendable(code: int) -> bool:
    """Whether a Close frame may carry this code: never 1005, 1006 or 1015 (RFC 6455 7.4, S14)."""
    return code in _CLOSE_CODES


def encode_close(code: int | None, reason: str = "") -> bytes:
    """A Close frame; None makes an empty one (RFC 6455 5.5.1).

    Raises ValueError if the code is not `sendable`, if the reason takes more than 123 bytes of UTF-8 or
    has none (lone surrogates), or if there is a reason without a code.
    """
    if code is None:
        if reason:
            raise ValueError("a close reason needs a close code")
        return b"\x88\x00"
    if code not in _CLOSE_CODES:
        raise ValueError(f"close code {code} must not be sent; use 1000 or one from 3000 to 4999")
    text = reason.encode()
    if len(text) > CLOSE_REASON_BYTES_MAX:
        raise ValueError(f"a close reason holds at most {CLOSE_REASON_BYTES_MAX} bytes, not {len(text)}")
    return struct.pack("!BBH", 0x80 | CLOSE, 2 + len(text), code) + text


def close_reply(close: Close) -> bytes:
    """The Close frame that answers a client's: the same code, or none if it had none (RFC 6455 5.5.1)."""
    return encode_close(None if close.code == NO_CODE else close.code)


def encode_ping(payload: bytes = b"") -> bytes:
    """A ping of at most 125 bytes, else ValueError (RFC 6455 5.5.2)."""
    return _encode_control(PING, payload)


def encode_pong(payload: bytes = b"") -> bytes:
    """A pong of at most 125 bytes, else ValueError (RFC 6455 5.5.3)."""
    return _encode_control(PONG, payload)


def _encode_control(opcode: int, payload: bytes) -> bytes:
    if len(payload) > CONTROL_BYTES_MAX:
        raise ValueError(f"a control frame holds at most {CONTROL_BYTES_MAX} bytes, not {len(payload)}")
    return bytes((0x80 | opcode, len(payload))) + payload
