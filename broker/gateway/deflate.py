"""permessage-deflate (RFC 7692), each message for itself: negotiation, compression, decompression.

Pure: texts and bytes in and out. Must not know frames or connections. Its peers are `doors`, which
negotiates, `frames`, which calls this for a message's payload, and `effects`.

No context is taken over in either direction: a connection has no compressor, which would cost some 100 KiB of
it and could not be handed to a successor. What is agreed on is one number, the size of the window that the
client can decompress with.

What a client sends is bounded before it is decompressed (`wire_bytes_max`), while it is (`inflate` stops at
the limit), and in the work that its form causes (`FINAL_BLOCKS_MAX`).
"""

import re
import zlib
from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = [
    "COMPRESSED_BYTES_MAX",
    "Agreement",
    "CorruptDeflate",
    "InflatedTooLarge",
    "choose_deflate",
    "deflate",
    "inflate",
    "window_for",
    "wire_bytes_max",
]

NAME: Final = "permessage-deflate"

#: What a compressed message lacks at its end (RFC 7692 7.2.1): the empty block of a flush, but for its head.
_TAIL: Final = b"\x00\x00\xff\xff"
#: An empty final block: a stream that has come to the end of a block ends with it, any other does not.
_END: Final = b"\x03\x00"
#: Decompressed at once.
_PIECE_BYTES: Final = 64 * 1024
#: Final blocks of one message (RFC 7692 7.2.3.4): behind each a decompressor has to be made anew.
FINAL_BLOCKS_MAX: Final = 16

#: Messages above this size are sent as they are: all of a message is compressed in one go.
COMPRESSED_BYTES_MAX: Final = 256 * 1024
#: Level 6, the usual one, takes three times as long for a tenth less.
_LEVEL = 1

#: RFC 6455 9.1: a token, and perhaps a value, which is a token or a quoted one.
_TOKEN: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_parameter = re.compile(rf"[ \t]*({_TOKEN})(?:[ \t]*=[ \t]*(?:({_TOKEN})|\"({_TOKEN})\"))?[ \t]*").fullmatch
_window_bits = re.compile(r"[89]|1[0-5]").fullmatch


class InflatedTooLarge(Exception):
    """A message is larger than the limit when it is decompressed."""


class CorruptDeflate(Exception):
    """What came is no compressed message."""


class Agreement(NamedTuple):
    """What is answered to an offer: the header's value, and the window for what we send, in bits."""

    answer: str
    window_bits: int


# --- negotiation ----------------------------------------------------------------------------------


def choose_deflate(offers: tuple[str, ...]) -> Agreement | None:
    """Agree to the first acceptable offer of permessage-deflate; None: there is none.

    An offer with a parameter that is unknown, repeated, or has a value that it may not have, is declined, not
    an error (RFC 7692 5.1, 7.1); so is one for a window of 8 bits, which zlib cannot compress with.
    """
    for offer in offers:
        window_bits = _acceptable(offer)
        if window_bits:
            answer = f"{NAME}; server_no_context_takeover; client_no_context_takeover"
            # RFC 7692 7.1.2.1: an offered bound of our window has to be answered.
            if window_bits < 15 or "server_max_window_bits" in offer:
                answer += f"; server_max_window_bits={window_bits}"
            return Agreement(answer, window_bits)
    return None


def _acceptable(offer: str) -> int:
    """The bits of our window that an offer leaves; 0 if it is not acceptable."""
    name, *parts = offer.split(";")
    if name.strip(" \t") != NAME:
        return 0
    window_bits = 15
    seen = set()
    for part in parts:
        match = _parameter(part)
        if match is None:
            return 0
        key, token, quoted = match.groups()
        value = token if quoted is None else quoted
        if key in seen:
            return 0
        seen.add(key)
        if key in ("server_no_context_takeover", "client_no_context_takeover"):
            if value is not None:
                return 0
        elif key == "client_max_window_bits":
            if value is not None and _window_bits(value) is None:
                return 0
        elif key == "server_max_window_bits":
            if value is None or _window_bits(value) is None or value == "8":
                return 0
            window_bits = int(value)
        else:
            return 0
    return window_bits


# --- sending --------------------------------------------------------------------------------------


def window_for(size: int, window_bits: int) -> int:
    """The window to compress so many bytes with, where one of `window_bits` is allowed: no larger than they
    fill. So messages of most sizes come out the same for all connections.
    """
    return max(9, min(window_bits, (size - 1).bit_length()))


def deflate(payload: bytes, window_bits: int) -> bytes:
    """Compress a message's payload, which is not empty (RFC 7692 7.2.1)."""
    # The compressor's tables are made for each message: small ones for a small window.
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -window_bits, max(1, window_bits - 7))
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data[: -len(_TAIL)]


# --- receiving ------------------------------------------------------------------------------------


def wire_bytes_max(limit_bytes: int) -> int:
    """How large a compressed message may be whose content is within `limit_bytes`: what cannot be compressed
    grows, by 5 bytes for each 127 where a client has its compressor use the least memory (RFC 1951 3.2.4).
    """
    return limit_bytes + limit_bytes // 16 + 1024


def inflate(pieces: Iterable[bytes], limit_bytes: int) -> bytes:
    """Decompress a message, given in pieces (RFC 7692 7.2.2).

    Takes no more memory than `limit_bytes` and a piece, whatever the ratio, until it is known to be within
    the limit.

    Raises:
        InflatedTooLarge: It is more than `limit_bytes`.
        CorruptDeflate: It is no deflate stream, or ends in the middle of a block.
    """
    found: list[bytes] = []
    size = finals = 0
    stream = zlib.decompressobj(-15)
    try:
        for piece in (*pieces, _TAIL):
            data = piece
            while True:
                wanted = min(_PIECE_BYTES, limit_bytes + 1 - size)
                made = stream.decompress(data, wanted)
                size += len(made)
                if size > limit_bytes:
                    raise InflatedTooLarge
                if made:
                    found.append(made)
                if stream.eof:
                    data = stream.unused_data
                    finals += 1
                    if finals > FINAL_BLOCKS_MAX:
                        raise CorruptDeflate
                    stream = zlib.decompressobj(-15)
                else:
                    data = stream.unconsumed_tail
                    if len(made) == wanted:
                        continue  # there may be more without more input
                if not data:
                    break
        stream.decompress(_END, 1)
    except zlib.error as error:
        raise CorruptDeflate from error
    if not stream.eof or stream.unused_data:
        raise CorruptDeflate
    return b"".join(found)
