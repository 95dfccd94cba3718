"""Every setting of the broker: its name, type, unit, default, bounds, meaning, and who may set it.

Owns one table, the fields of `Settings`. The options of the command line, the `BROKER_*` variables, the
attributes that a `Server` subclass may carry and the reference in the docs are all made from it; no default
and no bound is written anywhere else. Must not read the environment, files or the clock by itself: values are
passed in. Its peers are `broker.cli` (options), `hibernation.party` (class attributes) and every process
(configuration).

A `Settings` that exists is valid: its constructor checks each value and the few rules between two of them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from ipaddress import ip_network
from typing import Any, Literal
from urllib.parse import urlsplit

from hibernation.errors import SettingError

__all__ = [
    "ROOM_SETTINGS",
    "SETTINGS",
    "VARIABLE_PREFIX",
    "RoomSettings",
    "Scope",
    "Setting",
    "Settings",
    "nearest",
]

VARIABLE_PREFIX = "BROKER_"

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

Scope = Literal["instance", "room"]
"""`room`: may also be set on a `Server` subclass, for its rooms alone. `instance`: for all rooms only."""

Kind = Literal["int", "float", "choice", "origins", "networks"]

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_SIZES = {"kib": KIB, "mib": MIB, "gib": GIB, "k": KIB, "m": MIB, "g": GIB, "b": 1}


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table: what a setting is called, may be, and does.

    `minimum` and `maximum` are inclusive. `none_means` says in words what None does, and is "" where None is
    not allowed. `rules` are those of the semantics that the setting belongs to ("S6").
    """

    name: str
    kind: Kind
    default: object
    doc: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    none_means: str = ""
    scope: Scope = "instance"
    rules: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """The flag of the command line, such as "--idle-seconds"."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, such as "BROKER_IDLE_SECONDS"."""
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        """The default, for people: "64 KiB", "30 seconds", "none: same origin only"."""
        return self.text_of(self.default)

    @property
    def allowed_text(self) -> str:
        """What may be given, for people: "a whole number of bytes from 1 KiB to 32 MiB"."""
        match self.kind:
            case "choice":
                text = " or ".join(f'"{choice}"' for choice in self.choices)
            case "origins":
                text = 'origins such as "https://example.com" (no path), or "*" for any'
            case "networks":
                text = 'addresses or networks such as "10.0.0.0/8" or "::1"'
            case "int" | "float":
                text = "a whole number" if self.kind == "int" else "a number"
                text += f" of {self.unit}" if self.unit else ""
                text += f" from {self._number_text(self.minimum)} to {self._number_text(self.maximum)}"
        return f"{text}, or none ({self.none_means})" if self.none_means else text

    def text_of(self, value: object) -> str:
        """A value of this setting, for people."""
        if value is None:
            return f"none: {self.none_means}"
        if isinstance(value, tuple):
            return ", ".join(str(item) for item in value) or "empty"
        if isinstance(value, int | float):
            text = self._number_text(value)
            return f"{text} {self.unit}" if self.unit and self.unit != "bytes" else text
        return str(value)

    def _number_text(self, value: float | None) -> str:
        if value is None:
            return "any"
        if self.unit == "bytes":
            for size, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
                if value >= size and value % size == 0:
                    return f"{int(value) // size} {name}"
            return f"{int(value)} byte{'' if value == 1 else 's'}"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"

    def parse(self, text: str, source: str) -> Any:
        """Reads the value from a flag or a variable.

        "none" is None where that is allowed; lists are separated by commas; bytes may be written "64KiB" or
        "1MiB".
        Raises SettingError, which names `source`.
        """
        text = text.strip()
        if self.none_means and text.lower() == "none":
            return None
        match self.kind:
            case "int" | "float":
                return self.check(self._parse_number(text, source), source)
            case "origins" | "networks":
                items = tuple(item.strip() for item in text.split(",") if item.strip())
                return self.check("*" if self.kind == "origins" and items == ("*",) else items, source)
            case "choice":
                return self.check(text, source)

    def _parse_number(self, text: str, source: str) -> float:
        digits, factor = text, 1
        if self.unit == "bytes":
            digits = text.rstrip("KMGiBkmgb ")
            suffix = text[len(digits) :].strip().lower()
            if suffix not in _SIZES and suffix:
                raise SettingError(source, f"give {self.allowed_text}", given=text)
            factor = _SIZES.get(suffix, 1)
        try:
            return int(digits) * factor if self.kind == "int" else float(digits)
        except ValueError:
            raise SettingError(source, f"give {self.allowed_text}", given=text) from None

    def check(self, value: object, source: str) -> Any:
        """Returns the value in its one stored form: a tuple for a list, origins as browsers write them.

        Raises SettingError, which names `source`, the value, and what is allowed.
        """
        refused = SettingError(source, f"give {self.allowed_text}", given=value)
        if value is None:
            if self.none_means:
                return None
            raise SettingError(source, f"give {self.allowed_text}", given="None")
        match self.kind:
            case "int" | "float":
                wanted: Any = int if self.kind == "int" else (int, float)
                if not isinstance(value, wanted) or isinstance(value, bool):
                    raise refused
                assert isinstance(value, int | float)
                assert self.minimum is not None
                assert self.maximum is not None
                if not (math.isfinite(value) and self.minimum <= value <= self.maximum):
                    raise refused
                return value if self.kind == "int" else float(value)
            case "choice":
                if not isinstance(value, str) or value not in self.choices:
                    raise refused
                return value
            case "origins":
                if value == "*":
                    return "*"
                return tuple(_origin(item, source, refused) for item in _items(value, refused))
            case "networks":
                return tuple(_network(item, refused) for item in _items(value, refused))


def _items(value: object, refused: SettingError) -> list[str]:
    """The texts of a list. One bare text is refused: it is a list of letters to Python, and rarely meant."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise refused
    if not all(isinstance(item, str) for item in value):
        raise refused
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _origin(text: str, source: str, refused: SettingError) -> str:
    """An origin as a browser sends it: lower case, no default port, no path (RFC 6454, 6.2).

    "null", which sandboxed pages send, may be listed.
    """
    if text == "null":
        return text
    try:
        parts = urlsplit(text.lower())
        port = parts.port
    except ValueError:
        raise refused from None
    if not parts.scheme or not parts.hostname or parts.username is not None:
        raise refused
    if "*" in text:
        raise SettingError(source, 'list each origin in full, or give "*" alone for any', given=text)
    if parts.path not in ("", "/") or parts.query or parts.fragment or any(ord(c) <= 32 for c in text):
        raise refused
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown_port = "" if port is None or port == _DEFAULT_PORTS.get(parts.scheme) else f":{port}"
    return f"{parts.scheme}://{host}{shown_port}"


def _network(text: str, refused: SettingError) -> str:
    try:
        return str(ip_network(text))
    except ValueError:
        raise refused from None


def _setting(default: Any, doc: str, **facts: Any) -> Any:
    """A field of `Settings` that carries its line of the table; the name is the field's own."""
    return field(default=default, metadata={"doc": doc, **facts})


def _bytes(default: int, minimum: int, maximum: int, doc: str, **facts: Any) -> Any:
    return _setting(default, doc, kind="int", unit="bytes", minimum=minimum, maximum=maximum, **facts)


def _count(default: int | None, minimum: int, maximum: int, doc: str, **facts: Any) -> Any:
    return _setting(default, doc, kind="int", minimum=minimum, maximum=maximum, **facts)


def _seconds(default: float | None, minimum: float, maximum: float, doc: str, **facts: Any) -> Any:
    return _setting(default, doc, kind="float", unit="seconds", minimum=minimum, maximum=maximum, **facts)


def _choice(default: str, choices: tuple[str, ...], doc: str, **facts: Any) -> Any:
    return _setting(default, doc, kind="choice", choices=choices, **facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of an instance.

    Read as plain attributes; a slot costs what a slot costs. Made by `from_sources`, or by keywords in tests.

    Raises SettingError for a value out of its bounds, and for two values that contradict each other.
    """

    # Life of a room

    start_timeout: float = _seconds(
        30.0,
        0.01,
        3600.0,
        "How long `on_start` may take before it is cancelled and tried again.",
        scope="room",
        rules=("S3",),
    )
    idle_seconds: float | None = _seconds(
        None,
        0.0,
        86_400.0,
        "How long a room with nothing to do stays in memory; where `hibernate` is False, from when its last"
        " connection has ended.",
        none_means="0 where `hibernate` is True, 10 where it is False",
        scope="room",
        rules=("S6",),
    )
    max_awake_rooms: int = _count(
        10_000,
        1,
        10_000_000,
        "Rooms that one host keeps in memory; beyond it the least recently used that may hibernate go.",
        rules=("S6",),
    )
    memory_mark_bytes: int = _bytes(
        2 * GIB,
        64 * MIB,
        1024 * GIB,
        "Memory of one host beyond which any room without work goes, also where `hibernate` is False.",
        rules=("S6",),
    )
    start_tries: int = _count(
        6,
        1,
        1000,
        "Attempts to start a room, all failed, after which it is quarantined.",
        scope="room",
        rules=("S4",),
    )
    start_seconds: float = _seconds(
        90.0,
        0.1,
        86_400.0,
        "How long after its first failed start a room that still does not start is quarantined.",
        scope="room",
        rules=("S4",),
    )
    drain: float = _seconds(
        30.0,
        0.0,
        3600.0,
        "How long a process that is told to stop lets running turns and requests finish.",
        rules=("S32",),
    )

    # Connections and tags

    duplicate_ids: Literal["probe", "replace", "refuse"] = _choice(
        "probe",
        ("probe", "replace", "refuse"),
        "What happens when a second connection brings an id that the room has: ask the first if it lives,"
        " let the newcomer replace it, or refuse the newcomer (4409).",
        scope="room",
        rules=("S10",),
    )
    probe_seconds: float = _seconds(
        2.0,
        0.05,
        60.0,
        "How long the first connection has to answer when another brings its id.",
        scope="room",
        rules=("S10",),
    )
    tags_max: int = _count(64, 0, 1024, "Tags that one connection may have.", scope="room", rules=("S11",))
    tag_bytes_max: int = _bytes(256, 1, 4 * KIB, "UTF-8 bytes of one tag.", scope="room", rules=("S11",))
    state_bytes_max: int = _bytes(
        16 * KIB, 16, MIB, "Bytes of one connection's state, as CBOR.", scope="room", rules=("S13",)
    )
    auto_responses_max: int = _count(
        16,
        0,
        1024,
        "Automatic responses that a party may declare, and that one room may set.",
        scope="room",
        rules=("S16",),
    )
    close_timeout_seconds: float = _seconds(
        5.0,
        0.05,
        300.0,
        "How long a client's Close may wait for the turns before it, and our own Close for its answer.",
        rules=("S14",),
    )
    ping_interval_seconds: float = _seconds(
        25.0, 0.1, 3600.0, "Silence after which a connection is pinged.", rules=("S15",)
    )
    ping_timeout_seconds: float = _seconds(
        20.0, 0.1, 3600.0, "Further silence after which it counts as dead and is closed.", rules=("S15",)
    )

    # Turns

    turn_timeout: float = _seconds(
        30.0,
        0.01,
        3600.0,
        "How long one turn may take before it is cancelled and what it has staged is discarded.",
        scope="room",
        rules=("S20",),
    )
    redelivery_tries: int = _count(
        3,
        1,
        1000,
        "Hosts that an event may end, being alone in progress, before it becomes a dead letter.",
        rules=("S23",),
    )
    probation_seconds: float = _seconds(
        30.0,
        0.5,
        3600.0,
        "How long a new host waits for the events that may have ended the one before it, to run them alone.",
        rules=("S23",),
    )
    hang_timeout: float | None = _seconds(
        10.0,
        2.0,
        3600.0,
        "Silence of a gateway's or a host's loop after which the process is killed and started again.",
        none_means="it is never killed",
        rules=("S5", "S23"),
    )
    turn_bytes_max: int = _bytes(
        16 * MIB,
        4 * KIB,
        256 * MIB,
        "Bytes that one turn may stage: writes, sends, state, tags.",
        scope="room",
        rules=("S20",),
    )
    background_max: int = _count(
        64,
        0,
        100_000,
        "Pieces of background work of one room that have not ended.",
        scope="room",
        rules=("S7",),
    )
    sql_timeout: float = _seconds(
        2.0,
        0.01,
        60.0,
        "How long one SQL statement may run before it is interrupted; all rooms of its host wait meanwhile.",
        scope="room",
        rules=("S28",),
    )
    room_database_bytes_max: int = _bytes(
        GIB,
        MIB,
        1024 * GIB,
        "Size that a room's own database may grow to by its SQL statements.",
        rules=("S28",),
    )
    turns_per_room_burst: int = _count(
        64, 1, 100_000, "Turns that a room gets in a row before the next room's.", rules=("S24",)
    )
    # Alarms and crons

    alarms_max: int = _count(
        1_000,
        1,
        1_000_000,
        "Alarms that one room may have, those that have failed included.",
        scope="room",
        rules=("S29",),
    )
    alarm_payload_bytes_max: int = _bytes(
        64 * KIB, 16, 2 * MIB, "Bytes of one alarm's payload, as CBOR.", scope="room", rules=("S29",)
    )
    alarm_tries: int = _count(
        6,
        1,
        1000,
        "Runs of an alarm, all failed, after which it is not run any more.",
        scope="room",
        rules=("S29",),
    )
    alarms_in_flight_max: int = _count(
        256,
        1,
        100_000,
        "Alarms of one host that are run at once when very many are due.",
        rules=("S29",),
    )
    cron_late_seconds: float = _seconds(
        3600.0,
        0.0,
        604_800.0,
        "How late the last tick of a cron that nobody was there for is still run.",
        rules=("S31",),
    )

    # Storage

    durability: Literal["full", "os"] = _choice(
        "full",
        ("full", "os"),
        "What a commit survives: the loss of power (`full`), or the death of any process (`os`, faster).",
        rules=("S21",),
    )

    # What comes in

    message_bytes_max: int = _bytes(
        MIB,
        1,
        32 * MIB,
        "Bytes of one message from a client; a larger one closes the connection with 1009.",
        scope="room",
        rules=("S24",),
    )
    connection_inflight_bytes_max: int = _bytes(
        64 * KIB,
        KIB,
        32 * MIB,
        "Bytes of one connection that are with its host and not yet handled.",
        rules=("S24",),
    )
    room_inflight_events_max: int = _count(
        256, 1, 100_000, "Events of one room that are with its host and not yet handled.", rules=("S24",)
    )
    room_inflight_bytes_max: int = _bytes(4 * MIB, KIB, GIB, "Bytes of those events.", rules=("S24",))
    link_inflight_bytes_max: int = _bytes(
        64 * MIB,
        64 * KIB,
        4 * GIB,
        "Bytes of all rooms' events between one gateway and one host.",
        rules=("S24",),
    )
    receive_buffer_bytes: int = _bytes(
        128 * KIB,
        8 * KIB,
        4 * MIB,
        "The kernel's receive buffer of one connection: the inbox, where messages wait for their turn.",
        rules=("S24",),
    )
    inbox_bytes_max: int = _bytes(
        96 * KIB,
        KIB,
        4 * MIB,
        "Bytes of a message above which it waits in a spill file, not in the kernel.",
        rules=("S24",),
    )
    spill_bytes_max: int = _bytes(
        GIB, 32 * MIB, 1024 * GIB, "Bytes of all spill files of a gateway.", rules=("S24",)
    )
    request_bytes_max: int = _bytes(
        16 * MIB,
        0,
        1024 * GIB,
        "Bytes of a request's body; a larger one is answered with 413.",
        rules=("S26",),
    )
    request_memory_bytes: int = _bytes(
        MIB,
        0,
        32 * MIB,
        "Bytes of a request's body that are kept in memory; a larger one waits in a spill file.",
        rules=("S26",),
    )
    fetch_timeout: float = _seconds(
        20.0,
        0.01,
        3600.0,
        "How long a room that is fetched by another one, or by a static hook, has for its answer.",
        scope="room",
        rules=("S30",),
    )
    fetch_bytes_max: int = _bytes(
        MIB,
        KIB,
        32 * MIB,
        "Bytes of a body between rooms: of a fetch, and of the answer to it.",
        scope="room",
        rules=("S30",),
    )
    request_timeout_seconds: float = _seconds(
        60.0,
        0.05,
        3600.0,
        "How long a client has for the body of a request, and for each further MiB of a large one.",
        rules=("S26",),
    )

    # What goes out

    send_buffer_bytes: int = _bytes(
        64 * KIB, 4 * KIB, 4 * MIB, "The kernel's send buffer of one connection.", rules=("S25",)
    )
    outbox_bytes_max: int = _bytes(
        MIB,
        KIB,
        256 * MIB,
        "Bytes that may wait for a client that reads slowly; beyond them `slow_consumer` decides.",
        scope="room",
        rules=("S25",),
    )
    outbox_total_bytes_max: int = _bytes(
        256 * MIB,
        MIB,
        64 * GIB,
        "Bytes of all outboxes of one gateway; beyond them the fullest are closed first.",
        rules=("S25",),
    )
    slow_consumer: Literal["close", "drop_oldest", "drop_newest"] = _choice(
        "close",
        ("close", "drop_oldest", "drop_newest"),
        "What happens at a full outbox: the connection is closed (1013), or messages are dropped.",
        scope="room",
        rules=("S25",),
    )

    compression: Literal["off", "deflate"] = _choice(
        "off",
        ("off", "deflate"),
        "Whether permessage-deflate (RFC 7692) is agreed to where a client offers it.",
        scope="room",
        rules=("S40",),
    )
    compression_bytes_min: int = _bytes(
        KIB,
        1,
        32 * MIB,
        "Bytes of a message below which it is sent as it is, also where compression is agreed on.",
        scope="room",
        rules=("S25",),
    )

    # Doors

    handshake_timeout_seconds: float = _seconds(
        10.0, 0.05, 300.0, "How long a client has for its request head.", rules=("S37",)
    )
    http_idle_seconds: float = _seconds(
        75.0, 0.05, 3600.0, "How long a connection may wait for its next request.", rules=("S37",)
    )
    head_bytes_max: int = _bytes(16 * KIB, KIB, 64 * KIB, "Bytes of a request head.", rules=("S37",))
    connections_max: int | None = _count(
        None,
        1,
        10_000_000,
        "Connections of one gateway; the next is answered with 503.",
        none_means="what the limit of open files leaves",
        rules=("S37",),
    )
    room_connections_max: int = _count(
        32_768,
        1,
        10_000_000,
        "Connections of one room; the next is answered with 503.",
        scope="room",
        rules=("S37",),
    )
    address_connections_max: int = _count(
        16_384,
        1,
        10_000_000,
        "Connections from one address; the next is answered with 503. A trusted proxy itself is not counted.",
        rules=("S37",),
    )
    trusted_proxies: tuple[str, ...] = _setting(
        (),
        "Proxies whose X-Forwarded-For, -Proto and -Host are believed.",
        kind="networks",
        rules=("S37", "S39"),
    )
    origins: Literal["*"] | tuple[str, ...] | None = _setting(
        None,
        "Pages that may open WebSockets: their origins; a client that sends no Origin always may.",
        kind="origins",
        none_means="the same host and port only",
        scope="room",
        rules=("S38",),
    )

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            value = getattr(self, setting.name)
            stored = setting.check(value, setting.name)
            if stored is not value:
                object.__setattr__(self, setting.name, stored)
        for smaller, larger in _NOT_LARGER_THAN:
            least, most = getattr(self, smaller), getattr(self, larger)
            if least > most:
                raise SettingError(
                    smaller,
                    f"give at most {_BY_NAME[larger].text_of(most)}, which is `{larger}`",
                    given=least,
                )

    @classmethod
    def from_sources(
        cls, flags: Mapping[str, object], environ: Mapping[str, str], *, other_variables: Iterable[str] = ()
    ) -> "Settings":
        """The settings of an instance: flags over `BROKER_*` variables over defaults.

        `flags` maps names of settings to text or values, None where a flag was not given. Of `environ` only
        names that begin with BROKER_ are looked at, and empty ones count as absent; `other_variables` are
        those of them that something else reads.

        Raises SettingError for an unknown name (and says which one is near) and for a value that is not
        allowed.
        """
        others = {name.removeprefix(VARIABLE_PREFIX).lower(): name for name in other_variables}
        variables = {setting.name: setting.variable for setting in SETTINGS}
        options = {setting.name: setting.option for setting in SETTINGS}
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(VARIABLE_PREFIX) or variable in others.values() or not text.strip():
                continue
            name = variable.removeprefix(VARIABLE_PREFIX).lower()
            if variables.get(name) != variable:
                raise _unknown(variable, name, variables | others)
            values[name] = _BY_NAME[name].parse(text, variable)
        for name, value in flags.items():
            if name not in options:
                raise _unknown("--" + name.replace("_", "-"), name, options)
            if value is not None:
                setting, option = _BY_NAME[name], options[name]
                values[name] = (
                    setting.parse(value, option) if isinstance(value, str) else setting.check(value, option)
                )
        return cls(**values)

    def override(self, values: Mapping[str, object]) -> "Settings":
        """A copy with other values, by name.

        Raises SettingError as the constructor does, and for an unknown name.
        """
        for name in values:
            if name not in _BY_NAME:
                raise _unknown(name, name, {known: known for known in _BY_NAME})
        changes: dict[str, Any] = dict(values)
        return replace(self, **changes) if changes else self

    def to_json(self) -> dict[str, Any]:
        """All of them as plain values that JSON and CBOR can hold; `from_json` is its inverse."""
        return {s.name: list(v) if isinstance(v := getattr(self, s.name), tuple) else v for s in SETTINGS}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Reads what `to_json` made; what is missing has its default.

        Raises SettingError for an unknown name or a value that is not allowed.
        """
        return cls().override(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomSettings(Settings):
    """The settings that hold for the rooms of one party: what stands on the class over those of the instance.

    Made by `Party.settings`. Unlike in `Settings`, `idle_seconds` is always a number here.
    """

    hibernate: bool = True
    idle_seconds: float = 0.0


def nearest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """The known name that somebody meant: the same one with its unit behind it, or one spelt nearly so."""
    known = list(known)
    stem = re.sub(r"_(s|seconds|bytes|max)$", "", name)
    return stem if stem in known else next(iter(get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def _unknown(source: str, name: str, known: Mapping[str, str]) -> SettingError:
    """The error for a name that is none. `known` maps names to how they are written where `source` stands."""
    near = nearest(name, known, 0.6)
    if near is None:
        return SettingError(source, "there is no such setting")
    return SettingError(source, f"there is no such setting; the nearest is {known[near]}")


SETTINGS: tuple[Setting, ...] = tuple(
    Setting(name=item.name, default=item.default, **item.metadata) for item in fields(Settings)
)
"""The table, in the order of the docs."""

ROOM_SETTINGS: tuple[Setting, ...] = tuple(setting for setting in SETTINGS if setting.scope == "room")
"""Those that may also stand on a `Server` subclass."""

_BY_NAME = {setting.name: setting for setting in SETTINGS}

# A message that waits in the kernel must fit into its buffer; one outbox must fit into all of them.
_NOT_LARGER_THAN = (
    ("inbox_bytes_max", "receive_buffer_bytes"),
    ("outbox_bytes_max", "outbox_total_bytes_max"),
)
