"""Which room a request is for, and under which id its connection goes.

Pure: parts of the request target in, names out, or a refusal as HeadError. Whether such a party exists is
not known here. Its peers are the gateway's two doors, the one for upgrades and the one for HTTP.
"""

import re
from typing import Final, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from broker.gateway.handshake import HeadError

__all__ = ["CONNECTION_ID_CHARACTERS_MAX", "ROOM_ID_BYTES_MAX", "Route", "connection_id", "parse_route"]

ROOM_ID_BYTES_MAX: Final = 512  # of UTF-8, after percent-decoding (S1)
CONNECTION_ID_CHARACTERS_MAX: Final = 128  # S10

_MAIN: Final = "main"
_control = re.compile(r"[\x00-\x1f\x7f-\x9f]").search  # Unicode's category Cc
_bad_escape = re.compile(r"%(?![0-9A-Fa-f]{2})").search


class Route(NamedTuple):
    """The room that a path leads to.

    `party` as the client wrote it: it may not exist. `room` is a valid room id. `rest` is what
    follows, percent-decoded: "" or "/...".
    """

    party: str
    room: str
    rest: str


def parse_route(raw_path: str) -> Route | None:
    """The room under `/party/ID` (party main) or `/parties/NAME/ID`, sub-paths included; else None.

    `raw_path` is the target's path before percent-decoding, without the query. The id is decoded as one
    segment, so `%2F` in it is a slash of the id, and "." and ".." mean nothing. An empty id is no room.
    Raises HeadError(400) for an id that is not 1..512 bytes of UTF-8 without control characters (S1).
    """
    pieces = raw_path.split("/", 4)
    # "" "party" ID rest... or "" "parties" NAME ID rest: what is before the first slash must be nothing.
    if len(pieces) < 3 or pieces[0]:
        return None
    if pieces[1] == "party":
        party, segment, below = _MAIN, pieces[2], pieces[3:]
    elif pieces[1] == "parties" and len(pieces) > 3 and pieces[2]:
        party, segment, below = pieces[2], pieces[3], pieces[4:]
    else:
        return None
    if not segment:
        return None
    room = _decode(segment)
    if room is None or _control(room) or len(room.encode()) > ROOM_ID_BYTES_MAX:
        raise HeadError(
            400, f"a room id is 1 to {ROOM_ID_BYTES_MAX} bytes of UTF-8 without control characters"
        )
    rest = "/" + "/".join(below) if below else ""
    return Route(
        (_decode(party) or party) if "%" in party else party, room, unquote(rest) if "%" in rest else rest
    )


def connection_id(query: str) -> str | None:
    """The connection id that the client gives itself in `_pk`, or None if it gives none.

    `query` is the target's query before decoding. Raises HeadError(400) if `_pk` comes twice or is not 1..128
    printable characters (S10).
    """
    if "pk" not in query and "%" not in query:
        return None
    found = None
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if name != "_pk" and ("%" not in name or unquote(name) != "_pk"):
            continue
        decoded = _decode(value.replace("+", " "))  # the form encoding of URLSearchParams
        if (
            found is not None
            or decoded is None
            or not 1 <= len(decoded) <= CONNECTION_ID_CHARACTERS_MAX
            or not decoded.isprintable()
        ):
            raise HeadError(
                400, f"_pk is one connection id of 1 to {CONNECTION_ID_CHARACTERS_MAX} printable characters"
            )
        found = decoded
    return found


def _decode(text: str) -> str | None:
    """Percent-decode; None if an escape is malformed or what comes out is not UTF-8."""
    if "%" not in text and text.isascii():
        return text
    if _bad_escape(text):
        return None
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeError:
        return None
