"""Parties: what a `Server` subclass declares, checked and turned into plain facts.

Owns the settings that stand on a class, the names of parties, and `Party`, the record that a host runs by and
describes to its gateways. Must not construct a room object, call a hook, or import the user's code: classes
are passed in. Its peers are `broker.server`, which checks each class as it is made, and `broker.app`, which
loads them.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from hibernation.auto_responses import AutoResponse, read_rules, to_plain
from hibernation.cron import CronError, Schedule
from hibernation.errors import AppError, HookError, LimitExceeded, SettingError
from hibernation.hooks import HOOKS, HookSpec, check_hooks, find, location, owners, where
from hibernation.settings import ROOM_SETTINGS, SETTINGS, RoomSettings, Settings, nearest

__all__ = ["HOOKS", "MAIN", "HookSpec", "Party", "check_class", "kebab", "make_parties"]

Concurrency = Literal["serial", "per_connection", "interleave"]
"""How turns of one room may overlap (S19)."""

MAIN: Final = "main"
"""The party of `/party/ID`: the only one, or the one called Main."""

_ROOM_NAMES: Final = {setting.name: setting for setting in ROOM_SETTINGS}
_INSTANCE_NAMES: Final = {setting.name: setting for setting in SETTINGS if setting.scope == "instance"}
_CLASS_NAMES: Final = (
    *_ROOM_NAMES,
    "hibernate",
    "concurrency",
    "subprotocols",
    "auto_responses",
    "cors",
    "stream_requests",
    "static",
    "crons",
    "cron_timezone",
)
_PLAIN: Final = (bool, int, float, str, bytes, tuple, list, set, frozenset, dict)

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]*")

_CORS_HEADERS: Final = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
    ("Access-Control-Allow-Headers", "*"),
    ("Access-Control-Max-Age", "86400"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Party:
    """A kind of room: one `Server` subclass under its kebab-case name.

    `aliases` is ("main",) where `/party/ID` leads here under another name. `hooks` are the names of the hooks
    that it defines, `specs` how each is called; `has_on_start` and `on_message_parameters` repeat what every
    wake and every message asks of them. `auto_responses` are answered without its rooms. `cors` are the
    headers for its answers, or None. `overrides` are the settings that stand on the class. `stream_requests`:
    a request's turn begins before its body is there. `static`: the folder whose files answer requests that
    belong to no room. `crons` are its schedules, by name.
    """

    name: str
    cls: type[Any]
    aliases: tuple[str, ...] = ()
    specs: Mapping[str, HookSpec] = field(default_factory=dict)
    hooks: frozenset[str] = frozenset()
    has_on_start: bool = False
    on_message_parameters: int = 0
    hibernate: bool = True
    concurrency: Concurrency = "serial"
    subprotocols: tuple[str, ...] = ()
    auto_responses: tuple[AutoResponse, ...] = ()
    cors: tuple[tuple[str, str], ...] | None = None
    stream_requests: bool = False
    static: Path | None = None
    crons: Mapping[str, Schedule] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_class(cls, server: type[Any], *, aliases: tuple[str, ...] = ()) -> "Party":
        """Reads a `Server` subclass.

        Raises HookError and SettingError, which name the class, the attribute, the line and the remedy, and
        AppError for a class name that leaves no party name.
        """
        specs = check_class(server)
        name = kebab(server.__name__)
        if not name:
            raise AppError(f"class {server.__name__}{where(server)} leaves no party name: use letters in it")
        return cls(
            name=name,
            cls=server,
            aliases=aliases,
            specs=specs,
            hooks=frozenset(specs),
            has_on_start="on_start" in specs,
            on_message_parameters=specs["on_message"].parameters if "on_message" in specs else 0,
            hibernate=_flag(server, "hibernate"),
            concurrency=_concurrency(server),
            subprotocols=_subprotocols(server),
            auto_responses=_auto_responses(server),
            cors=_cors(server),
            stream_requests=_flag(server, "stream_requests"),
            static=_static_folder(server),
            crons=_crons(server),
            overrides=_overrides(server),
        )

    def settings(self, base: Settings) -> RoomSettings:
        """The settings of this party's rooms: those on the class over those of the instance.

        Raises SettingError where a value on the class contradicts one of the instance.
        """
        values: dict[str, Any] = {setting.name: getattr(base, setting.name) for setting in SETTINGS}
        values |= self.overrides
        if values["idle_seconds"] is None:
            values["idle_seconds"] = 0.0 if self.hibernate else 10.0  # S6
        count, most = len(self.auto_responses), values["auto_responses_max"]
        if count > most:
            raise SettingError(
                f"{self.cls.__name__}.auto_responses{where(self.cls)}",
                f"{count} rules, and at most {most} are allowed; leave some to on_message, or raise"
                " auto_responses_max",
            )
        try:
            return RoomSettings(hibernate=self.hibernate, **values)
        except SettingError as error:
            source = f"{self.cls.__name__}{where(self.cls)}: {error.source}"
            raise SettingError(source, error.allowed, given=error.given) from None

    @property
    def notices(self) -> tuple[str, ...]:
        """What its author should hear when the app is loaded, one sentence each."""
        name = self.cls.__name__
        if "on_cron" in self.hooks and not self.crons:
            return (f'{name}.on_cron is never called: give the class crons = {{"name": "*/5 * * * *"}}',)
        if self.crons and "on_cron" not in self.hooks:
            return (f"{name}.crons are never run: the class has no on_cron",)
        return ()

    def describe(self) -> dict[str, Any]:
        """What a gateway must know of the party, as plain values for the link."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "hooks": sorted(self.hooks),
            "hibernate": self.hibernate,
            "concurrency": self.concurrency,
            "subprotocols": list(self.subprotocols),
            "auto_responses": to_plain(self.auto_responses),
            "stream_requests": self.stream_requests,
            "static": self.static is not None,
            "cors": None if self.cors is None else [list(header) for header in self.cors],
            "settings": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.overrides.items()
            },
        }


def make_parties(classes: Sequence[type[Any]]) -> list[Party]:
    """The parties of an app, in the order of its classes. The only one, or the one called Main, is `main`.

    Raises AppError for two classes with one party name, HookError for a hook that only the main party may
    have, and what `Party.from_class` raises.
    """
    mains = [server for server in classes if len(classes) == 1 or kebab(server.__name__) == MAIN]
    parties: dict[str, Party] = {}
    for server in classes:
        aliases = (MAIN,) if server in mains and kebab(server.__name__) != MAIN else ()
        party = Party.from_class(server, aliases=aliases)
        if party.name in parties:
            other = parties[party.name].cls
            raise AppError(
                f"{other.__name__}{where(other)} and {server.__name__}{where(server)}"
                f' would both be the party "{party.name}": rename one of them'
            )
        if party.static is not None:
            owner, value = find(server, "static")
            if not any(issubclass(main, owner) for main in mains):
                raise SettingError(
                    _source(owner, "static", value),
                    f'set it on the main party: this is the party "{party.name}" of several',
                )
        for name in sorted(party.hooks):
            owner, value = find(server, name)
            # A base that the main party shares may define it for that one.
            if HOOKS[name].main_only and not any(issubclass(main, owner) for main in mains):
                raise HookError(
                    owner.__name__,
                    name,
                    f'it is called on the main party only, and this is the party "{party.name}" of several',
                    location=location(owner, name, value),
                    remedy="class Main(Server): ...   (and move the hook there)",
                )
        owner, value = find(server, "crons")
        if party.crons and not any(issubclass(main, owner) for main in mains):
            raise SettingError(
                _source(owner, "crons", value),
                f'only the main party has crons, and this is the party "{party.name}" of several: '
                "move them to class Main(Server)",
            )
        parties[party.name] = party
    return list(parties.values())


def kebab(name: str) -> str:
    """The party name of a class: ChatRoom is chat-room, HTTPServer is http-server."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1-\2", name)
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", name)
    return re.sub(r"[-_]+", "-", name).strip("-").lower()


def check_class(server: type[Any]) -> dict[str, HookSpec]:
    """Checks a `Server` subclass: its hooks and its settings.

    Returns how each of its hooks is called. Raises HookError and SettingError.
    """
    specs = check_hooks(server)
    _check_names(server)
    _flag(server, "hibernate")
    _flag(server, "stream_requests")
    _static_name(server)
    _concurrency(server)
    _subprotocols(server)
    _auto_responses(server)
    _cors(server)
    _crons(server)
    _overrides(server)
    return specs


def _check_names(server: type[Any]) -> None:
    """Refuses names that look like settings and are none, and settings that a class cannot have."""
    for owner in owners(server):
        for name, value in vars(owner).items():
            if not name.startswith("_") and isinstance(value, _PLAIN):
                _check_name(owner, name, value)


def _check_name(owner: type[Any], name: str, value: object) -> None:
    if name in _INSTANCE_NAMES:
        option = _INSTANCE_NAMES[name].option
        raise SettingError(
            _source(owner, name, value),
            f"this setting is the whole broker's: give {option} on the command line",
        )
    if name in _CLASS_NAMES:
        return
    near = nearest(name, _CLASS_NAMES, 0.88)
    if near is not None:
        raise SettingError(
            _source(owner, name, value),
            f"there is no such setting; the nearest is {near} (begin the name with _ if it is your own)",
        )


def _flag(server: type[Any], name: str) -> bool:
    owner, value = find(server, name)
    if isinstance(value, bool):
        return value
    raise SettingError(_source(owner, name, value), "give True or False", given=value)


def _concurrency(server: type[Any]) -> Concurrency:
    owner, value = find(server, "concurrency")
    for allowed in get_args(Concurrency):
        if value == allowed:
            return cast(Concurrency, allowed)
    raise SettingError(
        _source(owner, "concurrency", value), 'give "serial", "per_connection" or "interleave"', given=value
    )


def _static_name(server: type[Any]) -> str | None:
    owner, value = find(server, "static")
    if value is None or (isinstance(value, str) and value):
        return value
    raise SettingError(
        _source(owner, "static", value),
        'give the name of a folder beside the file of the class, such as "public", or None',
        given=value,
    )


def _static_folder(server: type[Any]) -> Path | None:
    """The folder of `static`, beside the file of the class that says it."""
    name = _static_name(server)
    if name is None:
        return None
    owner, _ = find(server, "static")
    file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    folder = Path(file).resolve().parent / name if file else Path(name).resolve()
    if not folder.is_dir():
        raise SettingError(_source(owner, "static", name), f"make the folder {folder}: there is none")
    return folder


def _subprotocols(server: type[Any]) -> tuple[str, ...]:
    owner, value = find(server, "subprotocols")
    if isinstance(value, tuple | list) and all(isinstance(v, str) and _TOKEN.fullmatch(v) for v in value):
        return tuple(dict.fromkeys(value))
    raise SettingError(
        _source(owner, "subprotocols", value),
        'give a tuple or list of names without spaces and commas, such as ("chat.v2", "chat.v1")',
        given=value,
    )


def _auto_responses(server: type[Any]) -> tuple[AutoResponse, ...]:
    owner, value = find(server, "auto_responses")
    if owner is object:
        return ()
    try:
        return read_rules(value)
    except (TypeError, ValueError, LimitExceeded) as error:
        raise SettingError(f"{owner.__name__}.auto_responses{where(owner)}", str(error)) from None


def _cors(server: type[Any]) -> tuple[tuple[str, str], ...] | None:
    owner, value = find(server, "cors")
    if isinstance(value, bool):
        return _CORS_HEADERS if value else None
    if isinstance(value, Mapping) and all(_is_header(name, text) for name, text in value.items()):
        return tuple(value.items())
    raise SettingError(
        _source(owner, "cors", value),
        'give True, False, or headers such as {"Access-Control-Allow-Origin": "https://example.com"}',
        given=value,
    )


def _crons(server: type[Any]) -> dict[str, Schedule]:
    owner, value = find(server, "cron_timezone")
    if not isinstance(value, str):
        raise SettingError(
            _source(owner, "cron_timezone", value), 'give a name such as "Europe/Berlin"', given=value
        )
    try:
        timezone = UTC if value == "UTC" else ZoneInfo(value)
    except (ValueError, OSError, ZoneInfoNotFoundError):
        raise SettingError(
            _source(owner, "cron_timezone", value),
            'give the name of a time zone that this machine knows, such as "Europe/Berlin"',
            given=value,
        ) from None
    owner, value = find(server, "crons")
    source = _source(owner, "crons", value)
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and name and isinstance(text, str) for name, text in value.items()
    ):
        raise SettingError(source, 'give names and expressions, such as {"tidy": "*/5 * * * *"}', given=value)
    schedules = {}
    for name, text in value.items():
        try:
            schedules[name] = Schedule.parse(text, timezone)
        except CronError as error:
            raise SettingError(f"{source}: {name!r}", str(error)) from None
    return schedules


def _overrides(server: type[Any]) -> dict[str, Any]:
    """The settings on the class and its bases, each in its stored form."""
    overrides = {}
    for name, setting in _ROOM_NAMES.items():
        owner, value = find(server, name)
        if owner is not object:
            overrides[name] = setting.check(value, _source(owner, name, value))
    return overrides


def _is_header(name: object, text: object) -> bool:
    """A header that cannot end its line early (RFC 9110, 5.5)."""
    if not isinstance(name, str) or not isinstance(text, str):
        return False
    return _TOKEN.fullmatch(name) is not None and _HEADER_VALUE.fullmatch(text) is not None


def _source(owner: type[Any], name: str, value: object) -> str:
    return f"{owner.__name__}.{name}{where(owner, name, value)}"
