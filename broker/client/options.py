"""What a socket can be told: names, types, defaults and bounds of all its options.

Owns the check of each; the classes that take them add nothing. Pure. `Options` has the defaults,
`SocketOptions` names the same options for type checkers, and a test holds the two together.
"""

import re
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, TypedDict
from uuid import uuid4

from broker.client.addresses import Address, Parameters, Value, parameters_of, whole_url
from broker.client.errors import AddressError, ConnectError, Refused
from broker.client.lifecycle import Backoff
from hibernation.errors import SettingError

__all__ = [
    "MIB",
    "AddressOptions",
    "Options",
    "Protocols",
    "Query",
    "SocketOptions",
    "reconnect_after_every_close",
    "retry_by_default",
]

MIB: Final = 2**20

Query = Parameters | Callable[[], Parameters | Awaitable[Parameters | None] | None]
"""Parameters, or a function that gives them, asked before each attempt; it may be async."""

Protocols = (
    str | Iterable[str] | Callable[[], str | Iterable[str] | Awaitable[str | Iterable[str] | None] | None]
)
"""Subprotocols to offer, best first, or a function that gives them, asked before each attempt."""

ID_CHARACTERS_MAX: Final = 128

#: Statuses that speak of the moment: what was refused with another one below 500 will be refused again.
_PASSING: Final = frozenset({408, 425, 429})


def reconnect_after_every_close(code: int, reason: str) -> bool:  # noqa: ARG001 - the shape of a predicate
    """The default of `should_reconnect`, as in the npm package: only our own close is for good."""
    return True


def retry_by_default(error: ConnectError) -> bool:
    """The default of `should_retry`: again, unless the server refused with a status that is for good.

    That is every status below 500 but 408, 425 and 429.
    """
    return not isinstance(error, Refused) or error.status >= 500 or error.status in _PASSING


class AddressOptions(TypedDict, total=False):
    """What `update_properties` can change: where to connect, and what is said there."""

    party: str | None
    path: str | None
    base_path: str | None
    prefix: str | None
    protocol: Literal["ws", "wss"] | None
    id: str | None
    query: Query | None
    protocols: Protocols | None
    headers: Mapping[str, str] | None


class SocketOptions(AddressOptions, total=False):
    """Every option beside host and room."""

    ssl_context: ssl.SSLContext | None
    start_closed: bool
    should_reconnect: Callable[[int, str], bool]
    should_retry: Callable[[ConnectError], bool]
    delay_min_seconds: float
    delay_max_seconds: float
    delay_growth: float
    delay_jitter: float
    retries_max: int | None
    uptime_min_seconds: float
    connect_timeout_seconds: float
    close_timeout_seconds: float
    ping_interval_seconds: float
    ping_timeout_seconds: float
    buffer_messages_max: int
    buffer_bytes_max: int
    inbox_messages_max: int
    inbox_bytes_max: int
    message_bytes_max: int


_header_name = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_header_value = re.compile(r"([\x21-\x7e\x80-\xff]([\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?").fullmatch

#: Options that are numbers: least and greatest value, and the unit.
_FLOATS: Final = {
    "delay_min_seconds": (0.0, 86_400.0, "seconds"),
    "delay_max_seconds": (0.0, 86_400.0, "seconds"),
    "delay_growth": (1.0, 100.0, "times"),
    "delay_jitter": (0.0, 1.0, "of the pause"),
    "uptime_min_seconds": (0.0, 86_400.0, "seconds"),
    "connect_timeout_seconds": (0.01, 3_600.0, "seconds"),
    "close_timeout_seconds": (0.0, 3_600.0, "seconds"),
    "ping_interval_seconds": (0.01, 86_400.0, "seconds"),
    "ping_timeout_seconds": (0.01, 86_400.0, "seconds"),
}
_WHOLE: Final = {
    "buffer_messages_max": (1, 10**9, "messages"),
    "buffer_bytes_max": (1, 2**40, "bytes"),
    "inbox_messages_max": (0, 10**9, "messages"),
    "inbox_bytes_max": (1, 2**40, "bytes"),
    "message_bytes_max": (1, 2**40, "bytes"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All options of a socket, checked. Raises AddressError, SettingError or TypeError where one is wrong."""

    host: str = ""
    room: str | None = None
    party: str | None = None
    path: str | None = None
    base_path: str | None = None
    prefix: str | None = None
    protocol: Literal["ws", "wss"] | None = None
    id: str | None = None
    query: Query | None = None
    protocols: Protocols | None = None
    headers: Mapping[str, str] | None = None
    ssl_context: ssl.SSLContext | None = None
    start_closed: bool = False
    should_reconnect: Callable[[int, str], bool] = reconnect_after_every_close
    should_retry: Callable[[ConnectError], bool] = retry_by_default
    delay_min_seconds: float = 1.0
    delay_max_seconds: float = 10.0
    delay_growth: float = 1.3
    delay_jitter: float = 0.5
    retries_max: int | None = None
    uptime_min_seconds: float = 5.0
    connect_timeout_seconds: float = 10.0
    close_timeout_seconds: float = 5.0
    ping_interval_seconds: float = 25.0
    ping_timeout_seconds: float = 20.0
    buffer_messages_max: int = 10_000
    buffer_bytes_max: int = 16 * MIB
    inbox_messages_max: int = 1_000
    inbox_bytes_max: int = 16 * MIB
    message_bytes_max: int = 32 * MIB

    def __post_init__(self) -> None:
        for name, (least, greatest, unit) in _FLOATS.items():
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not least <= value <= greatest
            ):
                raise SettingError(name, f"a number from {least:g} to {greatest:g} ({unit})", given=value)
        for name, (low, high, unit) in _WHOLE.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise SettingError(name, f"a whole number from {low:,} to {high:,} ({unit})", given=value)
        if self.retries_max is not None and (type(self.retries_max) is not int or self.retries_max < 0):
            raise SettingError(
                "retries_max", "a whole number from 0, or None for no end", given=self.retries_max
            )
        if self.delay_max_seconds < self.delay_min_seconds:
            raise SettingError(
                "delay_max_seconds", f"at least delay_min_seconds, {self.delay_min_seconds:g}",
                given=self.delay_max_seconds,
            )  # fmt: skip
        for name in ("host", "room", "party", "path", "base_path", "prefix", "protocol", "id"):
            text: object = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "host"):
                raise TypeError(f"{name} is a str, not {text!r}")
        if self.id is not None and not (1 <= len(self.id) <= ID_CHARACTERS_MAX and self.id.isprintable()):
            raise AddressError(
                "id", self.id, "it is no connection id", f"give 1 to {ID_CHARACTERS_MAX} printable characters"
            )
        if not callable(self.query):
            parameters_of(self.query)
        check_headers(self.headers or {})
        if self.can_connect:
            self.room_url  # noqa: B018 - the check

    @classmethod
    def of(cls, host: str, room: str | None, given: SocketOptions) -> "Options":
        """Options from the arguments of a constructor, with an id of their own where none is given."""
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise TypeError(f"there is no option {name!r}; there are {', '.join(sorted(known))}")
        named: dict[str, Any] = {**given, "id": given.get("id") or str(uuid4())}
        return cls(**_from_url(host, room, named))

    def updated(self, host: str | None, room: str | None, given: AddressOptions) -> "Options":
        """The same with other properties; what is not given stays."""
        for name in given:
            if name not in AddressOptions.__annotations__:
                raise TypeError(f"{name!r} cannot be changed at run time; give it when the socket is made")
        changed: dict[str, Any] = {**given, "id": given.get("id") or self.id}
        if host is not None:
            changed = _from_url(host, room, changed)
        elif room is not None:
            changed["room"] = room
        if changed.get("room") is not None:
            changed.setdefault("base_path", None)  # a room given anew would not count beside it
        return replace(self, **changed)

    @property
    def can_connect(self) -> bool:
        """Whether host, and room or base_path, are there."""
        return bool(self.host and (self.room or self.base_path))

    @property
    def address(self) -> Address:
        """Where the room is."""
        return Address(
            host=self.host,
            room=self.room or "",
            party="main" if self.party is None else self.party,
            path=self.path or "",
            base_path=self.base_path or "",
            prefix=self.prefix or "",
            protocol=self.protocol or "",
        )

    @property
    def room_url(self) -> str:
        """The address without a query. Raises AddressError."""
        return self.address.room_url("ws")

    @property
    def backoff(self) -> Backoff:
        """The options about reconnection."""
        return Backoff(
            delay_min=self.delay_min_seconds,
            delay_max=self.delay_max_seconds,
            growth=self.delay_growth,
            jitter=self.delay_jitter,
            uptime_min=self.uptime_min_seconds,
            retries_max=self.retries_max,
        )


def check_headers(headers: Mapping[Any, Any]) -> None:
    """Raise SettingError for a header that cannot be sent (RFC 9110, section 5)."""
    for name, value in headers.items():
        if not isinstance(name, str) or not _header_name(name):
            raise SettingError("headers", "a header's name is letters, digits and hyphens", given=name)
        if not isinstance(value, str) or not _header_value(value):
            raise SettingError(
                "headers",
                f"the value of {name} is text of one line, in ASCII or Latin-1, without spaces around",
            )


def _from_url(host: str, room: str | None, named: dict[str, Any]) -> dict[str, Any]:
    """Host and room into options; a whole URL in the place of a host into the options that it stands for."""
    if not isinstance(host, str):
        raise TypeError(f"host is a str, not {host!r}")
    if room is None and named.get("base_path") is None and (found := whole_url(host)):
        address, parameters = found
        if named.get("protocol") not in (None, address.protocol):
            raise AddressError(
                "protocol", named["protocol"], "the URL has another one", "give one of the two"
            )
        if parameters and named.get("query") is not None:
            raise AddressError("query", "…", "the URL has one already", "give one of the two")
        query: list[tuple[str, Value]] | None = parameters or named.get("query")
        return {
            **named, "host": address.host, "base_path": address.base_path, "protocol": address.protocol,
            "query": query,
        }  # fmt: skip
    return {**named, "host": host, **({} if room is None else {"room": room})}
