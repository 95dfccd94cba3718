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
from here to there. Names are imported when they are first asked for: the gateway and the command line lie in
this package too, and start a fifth of a second sooner without what rooms are made of. `Request` and
`Response` are Quart's, which takes 35 MB, and many apps use them in annotations alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same as below, for whoever reads without running
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
    from hibernation.requests import Request, Response
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

#: Where each public name is from.
_HOMES = {
    "broker.server": "Server",
    "hibernation.auto_responses": "AutoResponse",
    "hibernation.connection": "Connection ConnectionContext",
    "hibernation.crons": "Cron",
    "hibernation.errors": "AppError BrokerError ConnectionClosedError DeadLetter FetchCircle FetchTimeout"
    " HookError LimitExceeded Refuse RoomGone SettingError TurnTimeout UnknownParty",
    "hibernation.mounted": "mount",
    "hibernation.neighbours": "OtherRoom Parties PartyRooms",
    "hibernation.requests": "Request Response",
    "hibernation.room": "Lobby Room",
    "hibernation.room_alarms": "Alarm",
    "hibernation.room_storage": "Storage",
    "hibernation.sse": "sse",
    "storage.errors": "DataDirectoryError SchemaTooNew SqlError StorageLimitError ValueEncodingError",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


if not TYPE_CHECKING:  # a type checker that sees it takes every name for a public one

    def __getattr__(name: str) -> object:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
