"""A user's app that has every hook and every member: test_typing.py checks it strictly, and loads it.

It is written as a user would write it: it imports from `broker` alone.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from broker import (
    Alarm,
    Connection,
    ConnectionClosedError,
    ConnectionContext,
    Cron,
    LimitExceeded,
    Lobby,
    Refuse,
    Request,
    Response,
    Room,
    Server,
    mount,
    sse,
)


class Main(Server):
    hibernate = False
    concurrency = "serial"
    subprotocols = ("chat.v2", "chat.v1")
    cors = {"Access-Control-Allow-Origin": "https://example.com"}
    crons = {"tidy": "*/5 * * * *", "report": "0 9 * * mon-fri"}
    cron_timezone = "UTC"
    origins = ["https://example.com"]
    idle_seconds = 2.5
    start_timeout = 5
    turn_timeout = 5
    duplicate_ids = "replace"
    tags_max = 8
    slow_consumer = "drop_oldest"
    message_bytes_max = 65_536

    def __init__(self, room: Room) -> None:
        self.room = room
        self.history: list[str] = []
        self.woken: datetime | None = None

    async def on_start(self) -> None:
        self.history = await self.room.storage.get("history", default=[])
        several: dict[str, Any] = await self.room.storage.get(["history", "title"])
        self.room.storage.put({"title": several.get("title", ""), "starts": 1})
        print(self.room.env.get("HOME"), self.room.party, self.room.name, self.room.id)

    def get_connection_tags(self, connection: Connection, ctx: ConnectionContext) -> list[str]:
        return ["admin"] if ctx.request.args.get("admin") else []

    async def on_connect(self, connection: Connection, ctx: ConnectionContext) -> None:
        connection.set_state({"name": ctx.request.headers.get("X-Name", "")})
        connection.set_state(lambda state: {**state, "seen": 0})
        connection.add_tags("new", "guest")
        connection.remove_tags("guest")
        connection.send({"id": connection.id, "uri": connection.uri, "tags": list(connection.tags)})

    async def on_message(self, message: str | bytes, sender: Connection) -> None:
        if isinstance(message, bytes):
            sender.close(1003, "text only")
            return
        self.history.append(message)
        await self.room.storage.put("history", self.history)
        self.room.broadcast(message, [sender])
        self.room.broadcast(message, without=[sender.id], tag="admin")
        self.room.broadcast({"text": message}, all_of=["a", "b"], any_of=["c"], none_of=["d"])
        other: Connection | None = await self.room.get_connection("alice")
        if other is not None:
            try:
                other.send(b"bytes")
            except (ConnectionClosedError, LimitExceeded):
                pass
        async for connection in self.room.get_connections(tag="admin"):
            connection.send(message)
        count: int = await self.room.count_connections(any_of=["a", "b"])
        listed: dict[str, Any] = await self.room.storage.list(prefix="m", reverse=True, limit=count + 1)
        gone: bool = await self.room.storage.delete("history")
        several: int = await self.room.storage.delete(list(listed))
        if gone or several:
            self.room.storage.delete_all()
        stored: Response = await self.room.parties["plain"].get("lobby").fetch("/x", method="PUT", json=[1])
        if stored.status_code == 200:
            self.room.parties["plain"].get("lobby").broadcast(await stored.get_json(), tag="admin")
        self.room.storage.set_alarm(datetime(2030, 1, 1, tzinfo=UTC), "year", {"by": sender.id})
        self.room.storage.set_alarm(timedelta(minutes=5), "minutes")
        self.room.storage.set_alarm(0.5)
        due: Alarm | None = await self.room.storage.get_alarm()
        all_of_them: list[Alarm] = await self.room.storage.list_alarms()
        there: bool = await self.room.storage.delete_alarm("year")
        print(due, there, [alarm.reason for alarm in all_of_them if alarm.failed])
        self.room.hibernate()

    def on_close(self, connection: Connection, code: int, reason: str, was_clean: bool) -> None:
        self.room.broadcast(
            f"{connection.state['name']} has left: {connection.close_cause} {code} {reason} {was_clean}"
        )

    async def on_error(self, connection: Connection | None, error: Exception) -> None:
        print(connection, error)

    async def on_request(self, request: Request) -> Response | dict[str, Any] | AsyncIterator[bytes]:
        if request.method == "POST":
            body: bytes = await request.get_data(as_text=False, cache=True, parse_form_data=False)
            return Response(body, status=201)
        if request.rest == "/stream":
            return self.stream()
        return {"rest": request.rest, "path": request.path, "json": await request.get_json(silent=True)}

    async def on_alarm(self, alarm: Alarm) -> None:
        late = datetime.now(UTC) - alarm.scheduled_at
        print(alarm.name, alarm.attempt, alarm.due_at, alarm.payload, late.total_seconds())

    async def stream(self) -> AsyncIterator[bytes]:
        for line in self.history:
            yield line.encode()

    @staticmethod
    async def on_before_connect(request: Request, lobby: Lobby) -> Request | Response | None:
        if request.args.get("token") != lobby.env.get("TOKEN"):
            raise Refuse(403, f"not for you: {lobby.party}/{lobby.id}")
        request.headers["X-Name"] = "somebody"
        return request

    @staticmethod
    def on_before_request(request: Request) -> Response | None:
        return Response("no", status=405) if request.method == "PUT" else None

    @staticmethod
    async def on_fetch(request: Request, lobby: Lobby) -> str | Response:
        if request.path == "/site":
            answer: Response = await lobby.serve(site, request)
            return answer
        if request.args.get("room"):
            return await lobby.parties["plain"].get(request.args["room"]).fetch()
        return f"{request.path} belongs to no room of {lobby.party}"

    @staticmethod
    async def on_cron(cron: Cron, lobby: Lobby) -> None:
        print(cron.name, cron.expression, cron.scheduled_at.isoformat(), lobby.env.get("HOME"))


class Plain(Server):
    """Hooks as plain functions, and without their trailing parameters."""

    def on_start(self) -> None: ...

    def get_connection_tags(self) -> list[str]:
        return []

    def on_connect(self, connection: Connection) -> None: ...

    def on_message(self, message: str | bytes) -> None: ...

    def on_close(self) -> None: ...

    def on_error(self) -> None: ...

    def on_request(self) -> str:
        return "hello"

    def on_alarm(self) -> None: ...

    @staticmethod
    def on_before_connect() -> None: ...


async def site(scope: Any, receive: Any, send: Any) -> None:
    """An application without a framework."""


class Uploads(Server):
    """Reads a body while it comes, and answers with events."""

    stream_requests = True
    static = None

    async def on_request(self, request: Request) -> tuple[AsyncIterator[bytes], dict[str, str]]:
        return self.events(request), {"Content-Type": "text/event-stream"}

    async def events(self, request: Request) -> AsyncIterator[bytes]:
        async for piece in request.body:
            yield sse(len(piece), event="piece", id="1", retry=1000)
        yield sse(request.caller, comment="who asked")


class _WithPages(Server):
    """A base for a main party: everything that is no room's is the application's."""

    static = None
    on_fetch = mount(site)
