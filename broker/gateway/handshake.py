"""The strict gate in front of every connection: request heads, WebSocket upgrades, refusals, origins.

Pure: bytes in, facts or a refusal out. Its peer is the accepting side of the gateway, which peeks the bytes
of a new connection (or of the next request on a kept-alive one), asks here what they are, and writes what
is made here. Requests that are no upgrade go on to an HTTP server, with their bytes unread.

One request must mean one thing to every reader of its bytes (a proxy, this gate, the HTTP server behind
it). So whatever RFC 9112 lets a recipient repair is refused here instead: bare line feeds, folded lines,
white space before a colon, repeated or contradicting lengths. A refusal ends the connection, and nothing
after it is parsed: no second answer, no smuggled request.
"""

import re
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import unquote

__all__ = [
    "HEADERS_MAX",
    "HEAD_BYTES_MAX",
    "HTTP2_PREFACE",
    "Head",
    "HeadError",
    "Upgrade",
    "check_upgrade",
    "choose_subprotocol",
    "error_response",
    "is_upgrade",
    "origin_allowed",
    "parse_head",
    "switching_response",
]

HEAD_BYTES_MAX: Final = 16_384  # S37; request line, headers and the empty line
HEADERS_MAX: Final = 100  # browsers behind two proxies send some 30; Python objects cost more than the bytes

# What a client that knows to speak HTTP/2 sends first (RFC 9113 3.4). `parse_head` refuses it with 505.
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 5.6.2
_is_token = re.compile(_TOKEN).fullmatch

# RFC 9112 3. The target is visible ASCII without a fragment, which a client keeps to itself (RFC 9110 7.1).
_request_line = re.compile(rf"({_TOKEN}) ([!\"$-~]+) HTTP/([0-9])\.([0-9])").fullmatch

# RFC 9112 5. A field value holds no control character but the tab; being matched line by line, it holds no CR
# or LF, and a folded line, which begins with a space, has no name.
_FIELD_VALUE = r"[\t -~\x80-\xff]*"
_field_line = re.compile(rf"({_TOKEN}):({_FIELD_VALUE})").fullmatch
_is_field_value = re.compile(_FIELD_VALUE).fullmatch

# RFC 3986 3.2.2 and 3.2.3: a name, an IPv4 or a bracketed IPv6 address, not empty (RFC 9110 4.2.1); a port.
_host = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]+)(?::[0-9]{0,5})?").fullmatch
_absolute_target = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE).fullmatch
_content_length = re.compile(r"[0-9]{1,18}").fullmatch

# RFC 6455 4.1: 16 bytes in base64 are 22 characters and two of padding.
_key = re.compile(r"[+/0-9A-Za-z]{22}==").fullmatch
_ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3

Headers = tuple[tuple[str, str], ...]


class HeadError(Exception):
    """The request is refused with this HTTP status, and the connection closed.

    `reason` is one sentence for the client, free of what it sent; `headers` belong to the status
    (`Allow` to 405, `Sec-WebSocket-Version` to 426). `error_response(*error.args)` is the whole answer.
    """

    def __init__(self, status: int, reason: str, headers: Headers = ()) -> None:
        super().__init__(status, reason, headers)
        self.status = status
        self.reason = reason
        self.headers = headers

    def __str__(self) -> str:
        return f"{self.status} {self.reason}"


@dataclass(frozen=True, slots=True)
class Head:
    """One request head, found to be well-formed (RFC 9112 2 to 6).

    `target` is as it was sent; `raw_path` and `query` are its parts without the question mark, `path` is
    `raw_path` percent-decoded, with replacement characters for what is not UTF-8. Header names are
    lower-case, values are Latin-1 without surrounding white space, in their order. `length` counts the
    bytes of the head with its empty line. A body follows if `content_length` is not 0 or `chunked` is true.
    """

    method: str
    target: str
    path: str
    raw_path: str
    query: str
    version: tuple[int, int]
    headers: Headers
    length: int
    content_length: int
    chunked: bool

    def get(self, name: str) -> str | None:
        """The value of the first header of this (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def get_all(self, name: str) -> list[str]:
        """The values of all headers of this (lower-case) name."""
        return [value for key, value in self.headers if key == name]


class Upgrade(NamedTuple):
    """What a checked WebSocket upgrade asks for.

    `protocols` and `extensions` are those offered, in the client's order of preference (RFC 6455 4.1);
    extensions as they were written, with their parameters. `origin` is None if none was sent.
    """

    key: str
    protocols: tuple[str, ...]
    extensions: tuple[str, ...]
    origin: str | None
    host: str


# --- heads ----------------------------------------------------------------------------------------


def parse_head(data: bytes | bytearray, limit: int = HEAD_BYTES_MAX) -> Head | None:
    """Parse the request head that `data` begins with; None while it is incomplete.

    `limit` bounds the head in bytes. Raises HeadError, also for a head that is incomplete but past saving:
    414 or 431 over the limit (RFC 6585 5), 501 for CONNECT and for a transfer coding other than chunked,
    505 for a version other than 1.0 and 1.1, 400 for everything that is malformed or ambiguous. Never looks
    behind the head.
    """
    end = data.find(b"\r\n\r\n", 0, limit)
    if end < 0:
        _check_incomplete(data, limit)
        return None
    lines = str(data[:end], "latin-1").split("\r\n")
    match = _request_line(lines[0])
    if match is None:
        raise HeadError(400, "malformed request line")
    method, target, major, minor = match.groups()
    if major != "1" or minor not in "01":
        raise HeadError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    if len(lines) > HEADERS_MAX + 1:
        raise HeadError(431, f"more than {HEADERS_MAX} header fields")

    headers = []
    names = []
    host = length = coding = None
    for line in lines[1:]:
        match = _field_line(line)
        if match is None:
            raise HeadError(400, "malformed header field")
        name, value = match.groups()
        name = name.lower()
        value = value.strip(" \t")
        names.append(name)
        headers.append((name, value))
        if name == "host":
            host = value
        elif name == "content-length":
            length = value
        elif name == "transfer-encoding":
            coding = value

    # RFC 9112 3.2: exactly one Host, valid; a client of HTTP/1.0 may leave it out.
    if host is None:
        if minor == "1":
            raise HeadError(400, "a Host header is required")
    elif names.count("host") > 1 or _host(host) is None:
        raise HeadError(400, "one valid Host header is required")
    # RFC 9112 6.1 to 6.3: how a body ends must be told once, or the next request begins where someone likes.
    if length is not None and (names.count("content-length") > 1 or _content_length(length) is None):
        raise HeadError(400, "one valid Content-Length is required")
    if coding is not None:
        if length is not None or minor == "0" or names.count("transfer-encoding") > 1:
            raise HeadError(400, "the length of the body is ambiguous")
        if coding.lower() != "chunked":
            if coding.rpartition(",")[2].strip(" \t").lower() == "chunked":
                raise HeadError(501, "the only transfer coding spoken here is chunked")
            raise HeadError(400, "the length of the body is unknown")

    raw_path, _, query = _origin_form(method, target, host).partition("?")
    return Head(
        method,
        target,
        unquote(raw_path) if "%" in raw_path else raw_path,
        raw_path,
        query,
        (1, int(minor)),
        tuple(headers),
        end + 4,
        int(length or 0),
        coding is not None,
    )


def _check_incomplete(data: bytes | bytearray, limit: int) -> None:
    """Refuse what no further bytes can mend. Cheap, since it runs again for each piece of a slow head."""
    if len(data) >= limit:
        if data.find(b"\r\n", 0, limit) < 0:
            raise HeadError(414, f"the request line does not end within {limit} bytes")
        raise HeadError(431, f"the request head does not end within {limit} bytes")
    if data and not _is_token(chr(data[0])):  # a TLS hello, an empty line, a stray body
        raise HeadError(400, "malformed request line")
    if b"\0" in data or data.count(b"\n") != data.count(b"\r\n"):
        raise HeadError(400, "lines end in CR LF")


def _origin_form(method: str, target: str, host: str | None) -> str:
    """The path and query of a request target in any of its forms (RFC 9112 3.2)."""
    if target[0] == "/":
        return target
    if method == "CONNECT":
        raise HeadError(501, "no proxying here")
    if target == "*" and method == "OPTIONS":
        return target
    match = _absolute_target(target)
    # RFC 9112 3.2.2: the target's authority counts and Host must be the same; so a difference is refused.
    if match is None or (host is not None and match[1].lower() != host.lower()):
        raise HeadError(400, "malformed request target")
    rest: str = match[2]
    return rest if rest.startswith("/") else "/" + rest


# --- upgrades -------------------------------------------------------------------------------------


def is_upgrade(head: Head) -> bool:
    """Whether the request names WebSocket or HTTP/2 in an Upgrade header, rightly or not.

    Such a request is `check_upgrade`'s to judge and never reaches the HTTP server, which would be willing to
    switch to h2c. Any other Upgrade is ignored, as RFC 9110 7.8 allows.
    """
    for name, value in head.headers:
        if name == "upgrade":
            value = value.lower()
            if "websocket" in value or "h2c" in value:
                return True
    return False


def check_upgrade(head: Head) -> Upgrade:
    """Check the client's opening handshake (RFC 6455 4.2.1) and give what it asks for.

    Raises HeadError: 505 for HTTP/1.0; 405 for a method other than GET; 426 for a version other than 13
    (RFC 6455 4.2.2, 4.4); 400 for h2c, an absolute target, a body, and any header that is missing, repeated
    or malformed. Whether the origin may is asked of `origin_allowed`.
    """
    # One pass: each header that the handshake is about, in a list, since most of them may come only once.
    connection: list[str] = []
    upgrade: list[str] = []
    versions: list[str] = []
    keys: list[str] = []
    origins: list[str] = []
    protocols: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    host = ""
    offers_protocols = False
    for name, value in head.headers:
        if name == "connection":
            connection += _list_elements(value.lower())
        elif name == "upgrade":
            upgrade.append(value.lower())
        elif name == "host":
            host = value
        elif name == "origin":
            origins.append(value)
        elif name == "sec-websocket-version":
            versions.append(value)
        elif name == "sec-websocket-key":
            keys.append(value)
        elif name == "sec-websocket-protocol":
            offers_protocols = True
            protocols += _list_elements(value)
        elif name == "sec-websocket-extensions":
            extensions += _list_elements(value)

    if head.version != (1, 1):
        raise HeadError(505, "a WebSocket needs HTTP/1.1")
    if "h2c" in ",".join(upgrade):
        raise HeadError(400, "HTTP/2 is spoken with prior knowledge only")
    if head.method != "GET":
        raise HeadError(405, "a WebSocket is opened with GET", (("Allow", "GET"),))
    if head.target[0] != "/":
        raise HeadError(400, "a WebSocket is opened with a path as target")
    if head.content_length or head.chunked:
        raise HeadError(400, "an upgrade has no body")
    if upgrade != ["websocket"]:
        raise HeadError(400, "one Upgrade header that says websocket is required")
    if "upgrade" not in connection:
        raise HeadError(400, "a Connection header that names Upgrade is required")
    if len(versions) != 1:
        raise HeadError(400, "one Sec-WebSocket-Version is required")
    if versions[0] != "13":
        raise HeadError(426, "the WebSocket version spoken here is 13", (("Sec-WebSocket-Version", "13"),))
    if len(keys) != 1 or _key(keys[0]) is None:
        raise HeadError(400, "one Sec-WebSocket-Key of 16 bytes is required")
    if len(origins) > 1:
        raise HeadError(400, "one Origin at most")
    if offers_protocols and not (
        protocols and len(set(protocols)) == len(protocols) and all(map(_is_token, protocols))
    ):
        raise HeadError(400, "malformed Sec-WebSocket-Protocol")
    return Upgrade(keys[0], protocols, extensions, origins[0] if origins else None, host)


def _list_elements(value: str) -> tuple[str, ...]:
    """The elements of a comma-separated header value, without the empty ones (RFC 9110 5.6.1.2)."""
    if "," not in value:
        return (value,) if value else ()
    return tuple(element for piece in value.split(",") if (element := piece.strip(" \t")))


def choose_subprotocol(offered: tuple[str, ...], supported: tuple[str, ...] = ()) -> str | None:
    """The subprotocol to answer with: the first of `supported` that is offered (S17; RFC 6455 4.2.2).

    With none supported, the first offered. None: there is no match, and the answer names no subprotocol.
    """
    if not supported:
        return offered[0] if offered else None
    return next((protocol for protocol in supported if protocol in offered), None)


# --- answers --------------------------------------------------------------------------------------


def switching_response(key: str, subprotocol: str | None = None, extension: str | None = None) -> bytes:
    """The 101 that opens a WebSocket (RFC 6455 4.2.2), for a key that `check_upgrade` gave.

    `extension` is the answer to the one that is agreed on; the others are declined by saying nothing of them.
    Raises ValueError for a subprotocol that is not a
    token, so that no room's code can write headers.
    """
    accept = b64encode(sha1(key.encode("ascii") + _ACCEPT_GUID, usedforsecurity=False).digest())
    response = (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n"
    )
    if subprotocol is not None:
        if not _is_token(subprotocol):
            raise ValueError(f"subprotocol {subprotocol!r} is not a token (RFC 9110 5.6.2)")
        response += b"Sec-WebSocket-Protocol: " + subprotocol.encode("ascii") + b"\r\n"
    if extension is not None:
        response += b"Sec-WebSocket-Extensions: " + extension.encode("ascii") + b"\r\n"
    return response + b"\r\n"


_REASONS: Final = {int(status): status.phrase for status in HTTPStatus}

# `error_response` decides how its answer ends, and that nothing comes after it.
_FRAMING: Final = frozenset({"connection", "content-length", "keep-alive", "transfer-encoding", "upgrade"})


def error_response(status: int, text: str | bytes, headers: Headers | list[tuple[str, str]] = ()) -> bytes:
    """A whole answer in place of an upgrade, after which the connection is closed.

    `text` is the body, plain text unless `headers` have a Content-Type. Headers about the body's length or
    about the connection are left out. Raises ValueError for a status outside 200..599 and for a header that
    would break the head: a name that is no token, a value with control characters or beyond Latin-1.
    """
    if not 200 <= status <= 599:
        raise ValueError(f"status {status} does not end a request; use 200 to 599")
    # RFC 9110 15.3.5, 15.3.6, 15.4.5: these have no body; RFC 9112 6.3: nor a length.
    body = b"" if status in {204, 205, 304} else text.encode() if isinstance(text, str) else text
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}"]
    has_type = False
    for name, value in headers:
        if not _is_token(name) or not _is_field_value(value):
            raise ValueError(f"header {name!r} is malformed")
        lowered = name.lower()
        if lowered not in _FRAMING:
            has_type = has_type or lowered == "content-type"
            lines.append(f"{name}: {value}")
    if body and not has_type:
        lines.append("Content-Type: text/plain; charset=utf-8")
    if status not in {204, 304}:
        lines.append(f"Content-Length: {len(body)}")
    lines.append("Connection: close\r\n\r\n")
    return "\r\n".join(lines).encode("latin-1") + body


# --- origins --------------------------------------------------------------------------------------

_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_origin = re.compile(
    r"([A-Za-z][A-Za-z0-9+.\-]*)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~]+)(?::([0-9]{1,5}))?"
).fullmatch
_loopback = re.compile(r"(?:[a-z0-9\-.]+\.)?localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]").fullmatch


def origin_allowed(
    origin: str | None, host: str, allowed: str | tuple[str, ...] | None, loopback_ok: bool = False
) -> bool:
    """Whether a page of this Origin may open a WebSocket here (S38; RFC 6455 4.2.2, 10.2).

    `host` is the request's Host header. `allowed` None: the same host and port only; "*": any; a tuple: the
    origins it lists ("https://example.com", "null"), compared as scheme, host and port, and no others.
    `loopback_ok` adds pages served from this machine. No origin at all is allowed: it is no browser.
    """
    if origin is None or allowed == "*":
        return True
    if isinstance(allowed, str):
        allowed = (allowed,)
    parsed = _parse_origin(origin)
    if parsed is None:
        return origin == "null" and allowed is not None and "null" in allowed
    scheme, name, _ = parsed
    if loopback_ok and scheme in {"http", "https"} and _loopback(name):
        return True
    if allowed is not None:
        return parsed in _parse_origins(allowed)
    # A proxy may have ended TLS, so our own scheme is unknown: the page's scheme says which port a Host
    # without one means.
    return scheme in {"http", "https"} and _parse_origin(f"{scheme}://{host}") == parsed


@lru_cache(maxsize=256)
def _parse_origins(allowed: tuple[str, ...]) -> frozenset[tuple[str, str, int | None] | None]:
    """The origins of a setting; what clients send is not cached."""
    return frozenset(map(_parse_origin, allowed))


def _parse_origin(origin: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port of an origin (RFC 6454 7), lower-case; None if it is not written as one."""
    match = _origin(origin)
    if match is None:
        return None
    scheme = match[1].lower()
    return scheme, match[2].lower(), int(match[3]) if match[3] else _DEFAULT_PORTS.get(scheme)
