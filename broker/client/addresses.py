"""Where a socket or a request goes: the URL rules of the npm package partysocket.

Owns the way from host, room, party, path and query to a URL, and from there to what is dialled. Pure. Its
peer is the package itself: one table of cases runs through both (`tests/broker/client/cases.py`).

Equal to the package: the scheme before a host is cut off and does not count; the protocol follows from the
host; `/PREFIX/PARTY/ROOM/PATH` or `/BASE_PATH/PATH`; what is no ASCII is percent-encoded, escapes that are
there already are left alone; `_pk` comes first in the query, and None leaves a parameter out. So a room id
with a character that means something in a URL has to be encoded by the caller, there as here.

Different where the package goes to another address than it was told, without a word: a `?`, `#`, backslash,
dot segment, control character or incomplete escape, and a slash in a room or party, raise AddressError. And
172.2.x.x is no private address here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from broker.client.errors import AddressError

__all__ = [
    "DEFAULT_PORTS",
    "Address",
    "Endpoint",
    "Parameters",
    "Value",
    "endpoint_of",
    "parameters_of",
    "url_of",
    "whole_url",
]

#: What a parameter of a query may be; None leaves it out.
Value = str | int | None

#: The parameters of a query, in order.
Parameters = Mapping[str, Value] | Iterable[tuple[str, Value]]

DEFAULT_PORTS: Final = {"ws": 80, "http": 80, "wss": 443, "https": 443}

# WHATWG URL, "path percent-encode set": these printable characters and all that are not ASCII are escaped.
_PATH_SAFE: Final = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"#<>?^`{}')

_scheme = re.compile(r"^(https?|wss?)://")
_bad_escape = re.compile(r"%(?![0-9A-Fa-f]{2})").search
_control = re.compile(r"[\x00-\x1f\x7f]").search
_authority = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::(\d{0,5}))?").fullmatch
_DOTS: Final = frozenset({".", "..", "%2e", ".%2e", "%2e.", "%2e%2e"})


@dataclass(frozen=True, slots=True)
class Address:
    """Where a room is. Text as it was given; `protocol` is "", or one of those in DEFAULT_PORTS."""

    host: str
    room: str = ""
    party: str = "main"
    path: str = ""
    base_path: str = ""
    prefix: str = "parties"
    protocol: str = ""

    def room_url(self, plain: str) -> str:
        """The address without a query, for the protocol `plain` ("ws" or "http") or its secure form.

        Raises AddressError.
        """
        authority, _, below = _bare(self.host).partition("/")
        name, port = _host_of(authority, self.host)
        protocol = self.protocol or (plain if is_private(authority) else f"{plain}s")
        if protocol not in (plain, f"{plain}s"):
            raise AddressError(
                "protocol", self.protocol, "there is no such one here", f"write {plain} or {plain}s"
            )
        shown = name if port in (None, DEFAULT_PORTS[protocol]) else f"{name}:{port}"
        segments = [_encode("host", below)] if below else []
        if self.base_path:
            segments.append(_encode("base_path", self.base_path))
        elif not self.room:
            raise AddressError(
                "room", self.room, "neither room nor base_path says where to go", "give one, or a whole URL"
            )
        else:
            segments += [
                _encode("prefix", self.prefix or "parties"),
                _segment("party", self.party),
                _segment("room", self.room),
            ]
        if self.path:
            segments.append(_encode("path", self.path))
        return f"{protocol}://{shown}/{'/'.join(segments)}"


def whole_url(text: str) -> tuple[Address, list[tuple[str, Value]]] | None:
    """The address and query of a whole URL, `ws://HOST/…` with a path; None if the text is but a host.

    http and https stand for ws and wss. Raises AddressError for a fragment.
    """
    if not _scheme.match(text):
        return None
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise AddressError("host", _without_query(text), f"it is no URL ({error})", "mend it") from None
    if not parts.path.strip("/"):
        return None
    if parts.fragment:
        raise AddressError(
            "host", _without_query(text), "a fragment goes nowhere", "leave off what follows #"
        )
    protocol = parts.scheme.replace("http", "ws")
    query: list[tuple[str, Value]] = list(parse_qsl(parts.query, keep_blank_values=True))
    return Address(parts.netloc, base_path=parts.path[1:], protocol=protocol), query


def is_private(host: str) -> bool:
    """Whether a host is taken for one without TLS: the loopback by name and port, and private IPv4 ranges."""
    if host.startswith(("localhost:", "127.0.0.1:", "192.168.", "10.", "[::ffff:7f00:1]:")):
        return True
    if host.startswith("172."):
        # The package compares text here, so that 172.2 and 172.3 count; no token goes out in the clear for
        # that.
        second = host.split(".")[1]
        return second.isascii() and second.isdigit() and 16 <= int(second) <= 31
    return False


def parameters_of(given: object) -> list[tuple[str, str]]:
    """The parameters as text, without those that are None.

    Raises TypeError for what is no mapping or pairs of str to str, int, bool or None, and AddressError for
    `_pk`, which is the socket's own.
    """
    pairs: Iterable[object]
    if given is None:
        return []
    if isinstance(given, Mapping):
        pairs = given.items()
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes):
        pairs = given
    else:
        raise TypeError(
            f"a query is a mapping, pairs, or a function that gives such, not {type(given).__name__}"
        )
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError("a parameter of a query is a pair of a name (str) and a value")
        name, value = pair
        if value is None:
            continue
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int):
            value = str(value)
        elif not isinstance(value, str):
            kind = type(value).__name__  # and not the value itself: it may be a secret
            raise TypeError(f"the value of {name!r} in a query is str, int, bool or None, not {kind}")
        if name == "_pk":
            raise AddressError(
                "query", "_pk", "the connection's id has its own argument", "give id=… instead"
            )
        found.append((name, value))
    return found


def url_of(room_url: str, parameters: Iterable[tuple[str, str]]) -> str:
    """The whole URL: parameters as URLSearchParams writes them, and no `?` where there are none."""
    query = "&".join(f"{_form(name)}={_form(value)}" for name, value in parameters)
    return f"{room_url}?{query}" if query else room_url


class Endpoint(NamedTuple):
    """What is dialled, and what is asked for there.

    `host` and `port` are the TCP peer's, `authority` is the value of the Host header, `target` that of the
    request line, and `shown` the URL without its query, for errors and logs.
    """

    host: str
    port: int
    secure: bool
    authority: str
    target: str
    shown: str


def endpoint_of(url: str) -> Endpoint:
    """Take a URL apart that `url_of` has made."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    return Endpoint(
        host=parts.hostname,
        port=parts.port or DEFAULT_PORTS[parts.scheme],
        secure=parts.scheme in ("wss", "https"),
        authority=parts.netloc,
        target=parts.path + (f"?{parts.query}" if parts.query else ""),
        shown=_without_query(url),
    )


def _without_query(url: str) -> str:
    return url.partition("?")[0]


def _bare(host: str) -> str:
    """The host without a scheme before it and one slash behind it."""
    return _scheme.sub("", host).removesuffix("/")


def _host_of(authority: str, given: str) -> tuple[str, int | None]:
    """Name and port of an authority, in lower case and ASCII."""
    found = _authority(authority)
    if (
        not found
        or re.search(r"[\s?#@\\%<>^|\x00-\x1f\x7f]", authority)
        or int(found[2] or 1) not in range(1, 65536)
    ):
        raise AddressError(
            "host", _without_query(given), "it names no host", 'write "NAME", "NAME:PORT" or "[IPV6]:PORT"'
        )
    try:
        name = found[1].encode("idna").decode()
    except UnicodeError as error:
        raise AddressError(
            "host", given, "it is no name that the DNS can have", "write it in ASCII"
        ) from error
    return name.lower(), int(found[2]) if found[2] else None


def _segment(what: str, text: str) -> str:
    """A room or a party in a path."""
    if not text:
        raise AddressError(what, text, "it is empty", 'leave it off to mean "main"')
    if "/" in text:
        raise AddressError(
            what,
            text,
            "a slash begins another part of the path",
            _encoded_remedy + ", or give the rest as path=",
        )
    return _encode(what, text)


_encoded_remedy: Final = 'for a name with it write urllib.parse.quote(name, safe="")'


def _encode(what: str, text: str) -> str:
    """A part of a path, percent-encoded; escapes that are there already stay."""
    if text.startswith("/"):
        raise AddressError(what, text, "it begins with a slash", "leave that off")
    if any(character in text for character in "?#\\") or _control(text):
        raise AddressError(what, text, "one of its characters ends or breaks a path", _encoded_remedy)
    if _bad_escape(text):
        raise AddressError(what, text, "a % begins no escape", "a percent sign is written %25")
    if any(segment.lower() in _DOTS for segment in text.split("/")):
        raise AddressError(what, text, "a dot segment leads to another path", "name the path it leads to")
    try:
        return quote(text, safe=_PATH_SAFE)
    except UnicodeEncodeError:
        raise AddressError(
            what, text, "a lone surrogate is no character", "decode it as what it is"
        ) from None


def _form(text: str) -> str:
    """WHATWG URL, "application/x-www-form-urlencoded percent-encode set"."""
    try:
        return quote_plus(text, safe="*").replace("~", "%7E")
    except UnicodeEncodeError:
        raise AddressError(
            "query", "…", "a lone surrogate is no character", "decode it as what it is"
        ) from None
