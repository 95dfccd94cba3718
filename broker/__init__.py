"""What users import, the gateway and the command line.

    server.py     Server, the class that users subclass
    app.py        loading the user's app, room.env
    host.py       the process that runs room code
    gateway/      the process that owns sockets
    cli/          the command line
    client/       the Python client, which is imported as `broker.client` alone
    demo/         the app of `broker demo`
    testing/      the kit that users test their rooms with

The life of rooms is in the package `hibernation`, what is kept on disk in `storage`; imports run one way,
from here to there. `Request` and `Response` are Quart's, and are imported when they are first asked for:
Quart takes 35 MB, and many apps use it in annotations alone.
"""

from typing import TYPE_CHECKING

from broker.server import Server
from hibernation.auto_responses import AutoResponse
from hibernation.connection import Connection, ConnectionContext
from hibernation.crons import Cron
from hibernation.errors import (
    AppError,
    BrokerError,
    ConnectionClosedError,
    DeadLetter,
    FetchCircle,
    FetchTimeout,
    HookError,
    LimitExceeded,
    Refuse,
    RoomGone,
    SettingError,
    TurnTimeout,
    UnknownParty,
)
from hibernation.mounted import mount
from hibernation.neighbours import OtherRoom, Parties, PartyRooms
from hibernation.room import Lobby, Room
from hibernation.room_alarms import Alarm
from hibernation.room_storage import Storage
from hibernation.sse import sse
from storage.errors import (
    DataDirectoryError,
    SchemaTooNew,
    SqlError,
    StorageLimitError,
    ValueEncodingError,
)

if TYPE_CHECKING:
    from hibernation.requests import Request, Response

__all__ = [
    # what rooms are made of
    "Server",
    "Room",
    "Connection",
    "ConnectionContext",
    "Lobby",
    "Storage",
    "Alarm",
    "Cron",
    "AutoResponse",
    "Parties",
    "PartyRooms",
    "OtherRoom",
    "Request",
    "Response",
    "Refuse",
    "mount",
    "sse",
    # errors
    "BrokerError",
    "AppError",
    "HookError",
    "SettingError",
    "LimitExceeded",
    "ConnectionClosedError",
    "RoomGone",
    "TurnTimeout",
    "DeadLetter",
    "UnknownParty",
    "FetchTimeout",
    "FetchCircle",
    "DataDirectoryError",
    "SchemaTooNew",
    "StorageLimitError",
    "SqlError",
    "ValueEncodingError",
]


if not TYPE_CHECKING:  # a type checker that sees it takes every name for a public one

    def __getattr__(name: str) -> object:
        if name not in ("Request", "Response"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from hibernation import requests

        globals().update(Request=requests.Request, Response=requests.Response)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
