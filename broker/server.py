"""`Server`: the class that users subclass, one subclass for each kind of room.

Owns nothing but the base: the room reference, and the check of a subclass at the moment it is made. Must not
declare hooks: a hook that the base lacks may be a plain function or a coroutine, and take fewer parameters,
and still type-checks. Its peers are `hibernation.party`, which knows the hooks, and `hibernation.host`, which
calls them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from hibernation.auto_responses import AutoResponse
from hibernation.party import check_class
from hibernation.room import Room

__all__ = ["Server"]


class Server:
    """A room's code. Subclass it and define the hooks that you need:

        class Chat(Server):
            async def on_connect(self, connection, ctx):
                connection.send("welcome")

            async def on_message(self, message, sender):
                self.room.broadcast(message, without=[sender.id])

    Every subclass that an app defines is a party under its kebab-case name (`ChatRoom` is reached at
    `/parties/chat-room/ID`); the only one, or the one called `Main`, also at `/party/ID`. A name that begins
    with an underscore makes a base class for others, and no party.

    One object serves one room id, and only while there is something for it to do: between bursts of work the
    room hibernates, its sockets stay open, and the object is gone. What must last goes into
    `self.room.storage`, or into a connection's state or tags.

    Hooks, each a plain function or a coroutine, trailing parameters optional:

        on_start(self)                                            before the first turn after waking
        get_connection_tags(self, connection, ctx)                returns a list of str
        on_connect(self, connection, ctx)
        on_message(self, message, sender)                         message: str or bytes
        on_close(self, connection, code, reason, was_clean)       exactly once per connection
        on_error(self, connection, error)                         connection is None for requests and alarms
        on_request(self, request)                                 returns what a Quart view may return
        on_alarm(self, alarm)                                     an alarm that the room has set is due

    and static methods, which run before there is a room:

        on_before_connect(request, lobby)                         go on, or refuse
        on_before_request(request, lobby)
        on_fetch(request, lobby)                                  main party: requests that belong to no room
        on_cron(cron, lobby)                                      main party: one of `crons` is due

    Raises HookError or SettingError where a subclass is made whose hooks or settings cannot work.
    """

    room: Room
    """This room: its id, storage, connections. Set before `__init__`, whether or not a subclass has one."""

    hibernate: ClassVar[bool] = True
    """Whether the object may go while connections are open. False: it stays until the last one has left
    (S6)."""
    concurrency: ClassVar[Literal["serial", "per_connection", "interleave"]] = "serial"
    """How turns of one room may overlap where one waits: not at all; those of different connections, and
    requests; or all. Messages of one connection always begin, and take effect, in their order (S19)."""
    subprotocols: ClassVar[tuple[str, ...] | list[str]] = ()
    """WebSocket subprotocols, best first; () echoes the first that a client offers (S17)."""
    auto_responses: ClassVar[Mapping[Any, str | bytes] | Sequence[AutoResponse]] = ()
    """Messages that the gateway answers without waking a room, such as {"ping": "pong"} (S16)."""
    crons: ClassVar[Mapping[str, str]] = {}
    """Main party: when `on_cron` is called, by names of one's own: five fields as in crontab(5) (S31)."""
    cron_timezone: ClassVar[str] = "UTC"
    """The time zone that `crons` are meant in, such as "Europe/Berlin"."""
    cors: ClassVar[bool | Mapping[str, str]] = False
    """Headers that let other origins' pages read this party's answers; True for a set that lets everybody."""
    stream_requests: ClassVar[bool] = False
    """Whether `on_request` is given a body while it comes: `async for piece in request.body` (S26)."""
    static: ClassVar[str | None] = None
    """Main party: a folder beside this file whose files answer requests that belong to no room (S26)."""

    # Settings of the instance that a class may set for its own rooms; bounds: hibernation/settings.py.
    start_timeout: ClassVar[float]
    start_tries: ClassVar[int]
    start_seconds: ClassVar[float]
    idle_seconds: ClassVar[float | None]
    duplicate_ids: ClassVar[Literal["probe", "replace", "refuse"]]
    probe_seconds: ClassVar[float]
    tags_max: ClassVar[int]
    tag_bytes_max: ClassVar[int]
    state_bytes_max: ClassVar[int]
    auto_responses_max: ClassVar[int]
    turn_timeout: ClassVar[float]
    turn_bytes_max: ClassVar[int]
    alarms_max: ClassVar[int]
    alarm_payload_bytes_max: ClassVar[int]
    alarm_tries: ClassVar[int]
    background_max: ClassVar[int]
    sql_timeout: ClassVar[float]
    fetch_timeout: ClassVar[float]
    fetch_bytes_max: ClassVar[int]
    message_bytes_max: ClassVar[int]
    outbox_bytes_max: ClassVar[int]
    slow_consumer: ClassVar[Literal["close", "drop_oldest", "drop_newest"]]
    compression: ClassVar[Literal["off", "deflate"]]
    compression_bytes_min: ClassVar[int]
    room_connections_max: ClassVar[int]
    origins: ClassVar[Literal["*"] | tuple[str, ...] | list[str] | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls)

    def __new__(cls, room: Room) -> Self:
        """Sets `room` before `__init__`, so that a subclass's own can use it and need not call this one's."""
        self = super().__new__(cls)
        self.room = room
        return self

    def __init__(self, room: Room) -> None:
        """Prepares the fields of a fresh object; waits for nothing, which is what `on_start` is for."""
