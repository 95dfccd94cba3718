"""The gateway's HTTP side, for everything that is no WebSocket upgrade.

Owns the connections that speak HTTP: takes a socket whose next request is still unread in the kernel, serves
it by hypercorn and quart-trio, asks the gateway for each answer, and gives the socket back when its next
request is an upgrade. Must not know rooms, hosts or links: those lie behind `GatewayPort`, its peer.

Hypercorn, quart and what they bring cost 35 MB and 0.4 s, so `broker.gateway.http_server`, which uses them,
is imported when the first request comes, on a thread: the gateway's loop goes on meanwhile.
"""

import importlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trio

from broker.gateway.bodies import SpilledBody, StreamedBody
from broker.gateway.forwarding import Proxies
from broker.gateway.http_stream import RequestStream, StreamLimits
from hibernation.logs import get_logger
from hibernation.settings import Settings

if TYPE_CHECKING:
    from broker.gateway.http_server import HttpServer

__all__ = [
    "GatewayPort",
    "HttpFront",
    "HttpReply",
    "HttpRequest",
    "HttpStatistics",
    "RequestRefused",
]

_log = get_logger("broker.gateway.http")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One HTTP request as the gateway sends it to a room (or to `on_fetch`)."""

    party: str | None
    """The party's name in the path, or None: the request belongs to no room."""
    room: str | None
    rest: str
    """The path below the room, "" or "/…"."""
    method: str
    scheme: str
    path: str
    """The whole path, percent-decoded."""
    raw_path: str
    """The whole path as it was sent, ASCII, without the query."""
    query: bytes
    headers: list[tuple[str, str]]
    """Lower-case names; values decoded as Latin-1. Our own namespace, and what untrusted peers forward, are
    gone."""
    body: bytes | SpilledBody | StreamedBody
    """Complete, but for a streamed one."""
    client: tuple[str, int]
    http_version: str

    def fields(self) -> dict[str, Any]:
        """The request as plain values for the link; `hibernation.requests.build_request` takes them."""
        return {
            "party": self.party,
            "room": self.room,
            "method": self.method,
            "scheme": self.scheme,
            "path": self.path,
            "raw_path": self.raw_path,
            "query": self.query,
            "headers": self.headers,
            "body": self.body if isinstance(self.body, bytes) else b"",
            "client": self.client,
            "http_version": self.http_version,
            "rest": self.rest,
            **({} if isinstance(self.body, bytes) else {"pieces": _KINDS[type(self.body)]}),
        }


@dataclass(frozen=True, slots=True)
class HttpReply:
    """The answer to a request.

    `body` is bytes, or an iterator that is asked for its next chunk when the client has room for it. An
    iterator's `aclose`, if it has one, is called once at the end, also when the client has left; it has a
    second to run.
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | AsyncIterator[bytes] = b""


_KINDS = {SpilledBody: "kept", StreamedBody: "once"}
"""How the body may be read that comes in pieces."""


class RequestRefused(Exception):
    """Raised by `GatewayPort.request` and `.admin`: answer with this status and plain text."""

    def __init__(self, status: int, text: str = "", headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
        self.headers = tuple(headers)


class GatewayPort(Protocol):
    """What the HTTP side asks of its gateway."""

    @property
    def dev(self) -> bool:
        """Admin requests of loopback peers need no token."""

    @property
    def token(self) -> str:
        """The token of the admin interface."""

    def ready(self) -> bool:
        """Tell whether rooms can be reached, for /_broker/health."""

    def paused(self) -> str | None:
        """Tell why rooms that write wait for the disk, for /_broker/health; None: they do not."""

    def give_back(self, sock: socket.socket, client: tuple[str, int]) -> None:
        """Take a socket whose next request, wholly unread, is an upgrade."""

    def streams(self, party: str | None) -> bool:
        """Tell whether requests to this party (None: to no room) are passed on before their body is there."""

    def spill(self) -> SpilledBody:
        """Give a place for a body that is too large for memory. Raises BodyLost."""

    async def request(self, request: HttpRequest) -> HttpReply:
        """Have a request answered.

        Raises RequestRefused. Cancellation: the client has left.
        """

    async def admin(self, method: str, path: str, query: bytes) -> Any:
        """Answer an authorised request below /_broker/api with a value for JSON; `path` begins behind that.

        Raises RequestRefused (404 for a path that does not exist).
        """


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """What the HTTP side is doing, and has done since its start."""

    connections: int
    """Open now, those that are being closed included."""
    accepted: int
    requests: int
    given_back: int
    loaded: bool
    """The HTTP packages are in memory."""


class HttpFront:
    """Serves HTTP on sockets that it is given.

    `run` must be running before `take` is called.
    """

    def __init__(self, port: GatewayPort, settings: Settings) -> None:
        self._port = port
        self._limits = StreamLimits(
            head_seconds=settings.handshake_timeout_seconds,
            idle_seconds=settings.http_idle_seconds,
            body_seconds=settings.request_timeout_seconds,
            body_bytes=settings.request_bytes_max,
            memory_bytes=min(settings.request_memory_bytes, settings.request_bytes_max),
            head_bytes=settings.head_bytes_max,
        )
        self._proxies = Proxies(settings.trusted_proxies)
        self._nursery: trio.Nursery | None = None
        self._streams: set[RequestStream] = set()
        self._server: HttpServer | None = None
        self._loading = trio.Lock()
        self._accepted = 0
        self._requests = 0
        self._given_back = 0
        self._draining = False
        self._emptied: trio.Event | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the tasks of all connections.

        Cancellation: every connection is closed at once.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def take(self, sock: socket.socket, client: tuple[str, int]) -> None:
        """Serve a connected, non-blocking TCP socket from now on; returns at once.

        Nothing of its next request has been consumed. `client` is the peer's address.
        """
        if self._nursery is None:
            sock.close()
            return
        self._accepted += 1
        self._nursery.start_soon(self._serve, sock, client, name="http")

    def open_count(self) -> int:
        """Tell how many connections there are, those that are being closed included."""
        return len(self._streams)

    async def drain(self, seconds: float) -> None:
        """Close connections as soon as they owe no response, and return when none is left, or after
        `seconds`.
        """
        self._draining = True
        if self._server is not None:
            await self._server.stop_keeping_alive()
        for stream in list(self._streams):
            stream.end_if_idle()
        if self._streams:
            self._emptied = trio.Event()
            with trio.move_on_after(seconds):
                await self._emptied.wait()

    def statistics(self) -> HttpStatistics:
        """What is going on."""
        return HttpStatistics(
            connections=len(self._streams),
            accepted=self._accepted,
            requests=self._requests + sum([stream.requests for stream in self._streams]),
            given_back=self._given_back,
            loaded=self._server is not None,
        )

    async def _serve(self, sock: socket.socket, client: tuple[str, int]) -> None:
        stream = RequestStream(sock, self._limits)
        self._streams.add(stream)
        try:
            try:
                server = await self._load()
                http2 = await stream.speaks_http2()
                await server.serve(stream, client, http2=http2)
            except Exception as error:  # noqa: BLE001 - one client's connection, never the process
                _log.warning("an HTTP connection broke off", client=client[0], exc_info=error)
            if stream.upgrade_waits and not self._draining:
                self._given_back += 1
                self._port.give_back(stream.detach(), client)
            else:
                await stream.linger()
        finally:
            stream.close()
            self._requests += stream.requests
            self._streams.discard(stream)
            if self._emptied is not None and not self._streams:
                self._emptied.set()

    async def _load(self) -> "HttpServer":
        if self._server is None:
            async with self._loading:
                if self._server is None:
                    module = await trio.to_thread.run_sync(
                        importlib.import_module, "broker.gateway.http_server"
                    )
                    self._server = module.HttpServer(self._port, self._proxies, self._limits)
                    if self._draining:  # it has begun while the first request waited for this
                        await self._server.stop_keeping_alive()
        return self._server
