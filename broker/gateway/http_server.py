"""Hypercorn and quart-trio, driven for one connection at a time.

Owns what lies between a request's bytes and the gateway's answer: hypercorn's protocols over our stream, the
one catch-all of the quart-trio application, the pages of our own (/_broker/health, /_broker/api) and their
lock, the form of every error. Must not be imported before the first HTTP request (35 MB, 0.4 s). Its peers
are `broker.gateway.http`, which imports it, and `broker.gateway.http_stream`, which feeds it.

Of hypercorn's `TCPServer` reading and locking are kept. Replaced are: its idle timer (the stream has the
deadlines; a task for each pause between requests would cost more than the request), its choice of protocol
(the stream has seen the preface; h2c upgrades and Extended CONNECT are not offered), and the shield around
writes (a client that leaves must not hold the room's iterator).
"""

import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast
from urllib.parse import unquote

import h2.errors
import h2.events
import h2.settings
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import TrioSingleTask, WorkerContext
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ConnectionState, HTTPScope, Scope
from quart.wrappers import Request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers.request import TrioBody, TrioRequest
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

from broker.gateway.bodies import BodyLost, SpilledBody, StreamedBody
from broker.gateway.forwarding import Proxies, is_loopback, is_loopback_host, says_forwarded
from broker.gateway.handshake import HeadError
from broker.gateway.http import GatewayPort, HttpReply, HttpRequest, RequestRefused
from broker.gateway.http_stream import MIB, RequestStream, StreamLimits
from broker.gateway.routes import parse_route
from hibernation.logs import get_logger

__all__ = ["HttpServer"]

_log = get_logger("broker.gateway.http")

KEEP_ALIVE_REQUESTS = 10_000
"""After so many requests a connection is closed, so that none lives for ever on one parser's state."""

CLEAN_UP_SECONDS = 1.0
"""How long an iterator may take to end once its client has left."""

BODY_BYTES_HIGH = 256 * 1024
"""What may have come of a body and not been taken; then its client waits."""

LOOK_SECONDS = 1.0
"""How often it is looked whether a client that waits is still there."""

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
"""What is said to the next hop only (RFC 9110, 7.6.1): hypercorn's to say, not a room's."""

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class HttpServer:
    """Serves connections with one application."""

    def __init__(self, port: GatewayPort, proxies: Proxies, limits: StreamLimits) -> None:
        self._application = Application(port, proxies, limits)
        self._context = WorkerContext(None)
        self._config = Config()
        self._config.accesslog = None
        self._config.errorlog = logging.getLogger("broker.gateway.hypercorn")
        self._config.include_server_header = False
        self._config.keep_alive_max_requests = KEEP_ALIVE_REQUESTS
        self._config.h11_max_incomplete_size = 64 * 1024  # heads come whole and were measured before

    async def serve(self, stream: RequestStream, client: tuple[str, int], *, http2: bool) -> None:
        """Answer the requests of one connection until it ends, or its next request is not ours."""
        await _Connection(self._respond, self._config, self._context, stream, client, http2=http2)

    async def stop_keeping_alive(self) -> None:
        """Let every connection end with the response that it waits for."""
        await self._context.terminated.set()

    async def _respond(
        self,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        _sync_spawn: Callable[..., Any],
        _call_soon: Callable[..., Any],
    ) -> None:
        if scope["type"] == "http":
            await self._application(scope, receive, send)
        else:
            await send(
                {"type": "websocket.close", "code": 1000, "reason": None}
            )  # an upgrade is never hypercorn's


class _Idle(TrioSingleTask):
    """Tells the stream what hypercorn would start and stop a timer for."""

    def __init__(self, stream: RequestStream) -> None:
        super().__init__()
        self._stream = stream

    async def restart(self, _task_group: Any, _action: Any) -> None:
        """No request is being answered (any more)."""
        self._stream.response_is_out()

    async def stop(self) -> None:
        """A request has come."""
        self._stream.request_begins()


class _Connection(TCPServer):
    """One client's connection, from its first request to its last."""

    def __init__(
        self,
        app: Any,
        config: Config,
        context: WorkerContext,
        stream: RequestStream,
        client: tuple[str, int],
        *,
        http2: bool,
    ) -> None:
        state = ConnectionState({"stream": stream})
        super().__init__(app, config, context, cast(Any, state), cast(Any, stream))
        self.idle_task = _Idle(stream)
        self._client = client
        self._http2 = http2

    async def run(self) -> None:
        protocol = _Http2 if self._http2 else H11Protocol
        try:
            async with TaskGroup() as task_group:
                self._task_group = task_group
                self.protocol = cast(
                    Any,
                    protocol(
                        self.app,
                        self.config,
                        cast(Any, self.context),
                        cast(Any, task_group),
                        cast(Any, self.state),
                        False,
                        self._client,
                        None,
                        self.protocol_send,
                    ),
                )
                await self.protocol.initiate()
                await self._read_data()
        finally:
            await self.stream.aclose()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            try:
                async with self.send_lock:
                    await self.stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self.protocol.handle(Closed())
        else:
            await super().protocol_send(event)


class _Http2(H2Protocol):
    """HTTP/2 without Extended CONNECT (RFC 8441), and steady where a client is not."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        del self.connection.local_settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL]

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, RawData) and not self.closed:
            # The engine looks at a frame's length when the whole frame is in: up to 16 MiB of memory for
            # nothing.
            begun = self.connection.incoming_buffer._data[:3]
            if len(begun) == 3 and int.from_bytes(begun, "big") > self.connection.max_inbound_frame_size:
                self.connection.close_connection(h2.errors.ErrorCodes.FRAME_SIZE_ERROR)
                await self._flush()
                await self.send(Closed())

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                # Answered before its body was in (a 413): the rest is dropped, and the window kept open.
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                await self._flush()
            elif isinstance(event, h2.events.RequestReceived) and not _is_sound(event.headers):
                self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.PROTOCOL_ERROR)
                await self._flush()
            else:
                await super()._handle_events([event])

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, StreamClosed):
            buffer = self.stream_buffers.get(event.stream_id)
            if buffer is not None and not buffer._complete and not self.closed:
                # The body broke off. Without a reset the client would wait for its end for ever.
                await buffer.close()
                try:
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                except h2.exceptions.ProtocolError:
                    pass  # the client was first
                await self._flush()
        await super().stream_send(event)


def _is_sound(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request on HTTP/2 is one that hypercorn can turn into a scope."""
    pseudo = {name: value for name, value in headers if name.startswith(b":")}
    path = pseudo.get(b":path", b"")
    return (
        pseudo.get(b":method", b"CONNECT") != b"CONNECT" and path.startswith((b"/", b"*")) and path.isascii()
    )


class _Body(TrioBody):
    """What has come of a request's body and is not taken. Its client waits while that is much."""

    def __init__(self, expected_content_length: int | None, _: int | None) -> None:
        super().__init__(expected_content_length, None)  # the limit is looked at where it is read
        self._room = trio.Event()
        self._unwanted = False
        self.streamed: StreamedBody | None = None
        self.spilled: SpilledBody | None = None

    def append(self, data: bytes) -> None:
        if self._unwanted:
            return
        if self.streamed is None:
            super().append(data)
        else:
            self.streamed.append(data)

    def set_complete(self) -> None:
        super().set_complete()
        if self.streamed is not None:
            self.streamed.end()

    @property
    def is_complete(self) -> bool:
        """Whether all of it has come."""
        return self._complete.is_set()

    async def __anext__(self) -> bytes:
        data = await super().__anext__()
        self._room.set()
        return data

    def stream(self, bytes_max: int) -> StreamedBody:
        """Let it go through from now on, what has come included."""
        self.streamed = StreamedBody(bytes_max)
        if self._data:
            self.streamed.append(bytes(self._data))
            self._data.clear()
        if self.is_complete:
            self.streamed.end()
        self._room.set()
        return self.streamed

    def unwanted(self) -> None:
        """Nobody takes any more of it: what still comes is dropped."""
        self._unwanted = True
        self._room.set()
        if self.streamed is not None:
            self.streamed.drop()

    def close(self) -> None:
        """Its request is over."""
        if self.spilled is not None:
            self.spilled.close()

    async def has_room(self) -> None:
        """Wait until more of it can be taken."""
        while not self._unwanted:
            if self.streamed is not None:
                await self.streamed.has_room()
                return
            if len(self._data) < BODY_BYTES_HIGH:
                return
            self._room = trio.Event()
            await self._room.wait()


class _Request(TrioRequest):
    body_class = _Body  # type: ignore[assignment]


class _Exchange(TrioASGIHTTPConnection):
    """One request and its answer. A client that leaves cancels both."""

    async def handle_messages(  # type: ignore[override]
        self, nursery: trio.Nursery, request: Request, receive: ASGIReceiveCallable
    ) -> None:
        body = cast(_Body, request.body)
        stream = self.scope["state"]["stream"]
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            if message["type"] == "http.request":
                body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body.set_complete()
                    continue
                waited = True
                while waited:
                    # Nothing is read meanwhile, so the end of the client is not met by reading.
                    with trio.move_on_after(LOOK_SECONDS) as scope:
                        await body.has_room()
                    waited = scope.cancelled_caught
                    if waited and stream.has_broken_off():
                        nursery.cancel_scope.cancel()
        nursery.cancel_scope.cancel()

    async def handle_request(  # type: ignore[override]
        self, nursery: trio.Nursery, request: Request, send: ASGISendCallable
    ) -> None:
        application = cast(Application, self.app)
        body = cast(_Body, request.body)
        try:
            reply = await application.answer(request)
            if self.scope["state"]["stream"].body_is_left:
                # What comes of it has no reader any more, unless the answer reads while it is sent; the next
                # request would have to wait for its end.
                self.scope["state"]["close"] = True
            if isinstance(reply.body, bytes):
                body.unwanted()
                stream = self.scope["state"]["stream"]
                if self.scope["http_version"] != "2":
                    stream.hold_next()
                await self._start(send, reply, len(reply.body))
                await send({"type": "http.response.body", "body": reply.body, "more_body": False})
            else:
                await self._stream(send, reply, reply.body, body)
        finally:
            body.close()
        nursery.cancel_scope.cancel()

    async def _start(self, send: ASGISendCallable, reply: HttpReply, length: int | None) -> None:
        headers = [
            (name.lower().encode("ascii"), value.encode("latin-1"))
            for name, value in reply.headers
            if name.lower() not in HOP_BY_HOP
        ]
        if length is not None and not _has_no_body(self.scope["method"], reply.status):
            headers = [item for item in headers if item[0] != b"content-length"]
            headers.append((b"content-length", b"%d" % length))
        elif length is not None and reply.status not in {204, 304} and not _has(headers, b"content-length"):
            headers.append((b"content-length", b"%d" % length))
        if self.scope["state"].get("close") and self.scope["http_version"] != "2":
            headers.append((b"connection", b"close"))
        await send(
            {"type": "http.response.start", "status": reply.status, "headers": headers, "trailers": False}
        )

    async def _stream(
        self, send: ASGISendCallable, reply: HttpReply, chunks: AsyncIterator[bytes], body: _Body
    ) -> None:
        try:
            await self._start(send, reply, None)
            if not _has_no_body(self.scope["method"], reply.status):
                async for chunk in chunks:
                    if chunk:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            body.unwanted()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception as error:  # noqa: BLE001 - told to the client by an end that is none
            # The head is out. Hypercorn closes the connection, or resets the stream, as no last chunk was
            # sent.
            _log.error("a streamed response broke off", path=self.scope["path"], exc_info=error)
        finally:
            body.unwanted()
            with trio.move_on_after(CLEAN_UP_SECONDS, shield=True):
                await _end(chunks)


class Application(QuartTrio):
    """The quart-trio application: every request has the same one handler, so routes, sessions and contexts
    are left out.
    """

    asgi_http_class = _Exchange
    request_class = _Request

    def __init__(self, port: GatewayPort, proxies: Proxies, limits: StreamLimits) -> None:
        super().__init__("broker", static_folder=None, template_folder=None)
        self._limits = limits
        self._port = port
        self._proxies = proxies

    async def answer(self, request: Request) -> HttpReply:
        """Give the answer to a request, whatever goes wrong."""
        try:
            reply = await self._answer(request)
            problem = _problem(reply)
            if problem:
                _log.error("a room's answer cannot be sent", path=request.path, problem=problem)
                await _end(reply.body)
                return _page(request, 500, "internal error")
            return reply
        except RequestRefused as refused:
            return _page(request, refused.status, refused.text, refused.headers)
        except HeadError as error:
            return _page(request, error.status, error.reason, error.headers)
        except RequestEntityTooLarge:
            limit = self._limits.body_bytes
            return _page(request, 413, f"a request body may have {limit} bytes", close=True)
        except RequestTimeout:
            return _page(request, 408, "the request body took too long", close=True)
        except BodyLost as lost:
            _log.error("a request body cannot be kept", path=request.path, reason=str(lost))
            return _page(request, 503, "no room for the request body", [("retry-after", "5")], close=True)
        except Exception as error:  # noqa: BLE001 - told to the log, and to the client without details (S39)
            _log.error("a request could not be answered", path=request.path, exc_info=error)
            return _page(request, 500, "internal error")

    async def _answer(self, request: Request) -> HttpReply:
        scope = cast(HTTPScope, request.scope)
        raw_path = _path_of(scope["raw_path"])
        headers = [
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        peer = cast(tuple[str, int], scope["client"])
        if raw_path == "/_broker" or raw_path.startswith("/_broker/"):
            return await self._own_page(request, raw_path[len("/_broker") :], headers, peer)
        if raw_path == "*":
            return HttpReply(204)  # OPTIONS * asks whether we are there (RFC 9110, 9.3.7)
        route = parse_route(raw_path)
        incoming = cast(_Body, request.body)
        body: bytes | SpilledBody | StreamedBody
        if not incoming.is_complete and self._port.streams(None if route is None else route.party):
            scope["state"]["stream"].body_is_streamed()
            body = incoming.stream(self._limits.body_bytes)
        else:
            body = await self._gather(incoming)
        client, scheme = self._proxies.client(peer, headers, scope["scheme"])
        return await self._requested(
            body,
            HttpRequest(
                party=None if route is None else route.party,
                room=None if route is None else route.room,
                rest="" if route is None else route.rest,
                method=scope["method"],
                scheme=scheme,
                path=unquote(raw_path),
                raw_path=raw_path,
                query=scope["query_string"],
                headers=self._proxies.clean(peer, headers),
                body=body,
                client=client,
                http_version=scope["http_version"],
            ),
        )

    async def _requested(self, body: bytes | SpilledBody | StreamedBody, request: HttpRequest) -> HttpReply:
        """Ask for the answer; of a streamed body that is too large, no longer than until that is seen."""
        if not isinstance(body, StreamedBody):
            return await self._port.request(request)
        reply: HttpReply | None = None
        failure: Exception = RequestEntityTooLarge()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await body.too_large.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                reply = await self._port.request(request)
            except Exception as error:  # noqa: BLE001 - raised below, where no nursery wraps it
                failure = error
            nursery.cancel_scope.cancel()
        if reply is None:
            raise failure
        return reply

    async def _gather(self, incoming: _Body) -> bytes | SpilledBody:
        """Wait for a body: in memory, or in a file once it is large."""
        limits = self._limits
        data = bytearray()
        spilled: SpilledBody | None = None
        size = 0
        with trio.move_on_after(limits.body_seconds) as scope:
            async for piece in incoming:
                size += len(piece)
                if size > limits.body_bytes:
                    raise RequestEntityTooLarge
                scope.deadline += limits.body_seconds * len(piece) / MIB
                if spilled is not None:
                    spilled.append(piece)
                elif size <= limits.memory_bytes:
                    data += piece
                else:
                    spilled = incoming.spilled = self._port.spill()
                    spilled.append(data)
                    spilled.append(piece)
                    data.clear()
        if scope.cancelled_caught:
            raise RequestTimeout
        return bytes(data) if spilled is None else spilled

    async def _own_page(
        self, request: Request, path: str, headers: list[tuple[str, str]], peer: tuple[str, int]
    ) -> HttpReply:
        if path == "/health":
            paused = self._port.paused()
            if paused is not None:
                return _page(request, 503, f"paused: {paused}", [("retry-after", "1")])
            if self._port.ready():
                return _page(request, 200, "ready")
            return _page(request, 503, "not ready", [("retry-after", "1")])
        if not self._may_administer(headers, peer):
            return _page(request, 401, "the admin token is needed", [("www-authenticate", "Bearer")])
        if path == "/api" or path.startswith("/api/"):
            answer = await self._port.admin(request.method, path[len("/api") :], request.query_string)
            text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
            return HttpReply(
                200,
                [("content-type", "application/json"), ("cache-control", "no-store")],
                text.encode() + b"\n",
            )
        return _page(request, 404, "no such page")

    def _may_administer(self, headers: list[tuple[str, str]], peer: tuple[str, int]) -> bool:
        """Whether the token is there; in `dev` a loopback peer needs none, if nothing speaks for somebody
        behind it.
        """
        given = [value for name, value in headers if name == "authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        expected = self._port.token.encode()
        # Always compared, so that a request without a token takes as long as one with a wrong one.
        same = hmac.compare_digest(token.strip().encode("latin-1"), expected)
        if same and expected and scheme.lower() == "bearer":
            return True
        if not self._port.dev or not is_loopback(peer[0]) or says_forwarded(headers):
            return False
        hosts = [value for name, value in headers if name == "host"]
        origins = [value for name, value in headers if name == "origin"]
        return (
            len(hosts) == 1
            and is_loopback_host(hosts[0])
            and all(is_loopback_host(origin.partition("://")[2]) for origin in origins)
        )


async def _end(body: bytes | AsyncIterator[bytes]) -> None:
    """Close an iterator that will not be asked any more."""
    close = getattr(body, "aclose", None)
    if close is not None:
        await close()


def _path_of(target: bytes) -> str:
    """The path of a request target, also of one in absolute form (RFC 9112, 3.2.2)."""
    path = target.decode("ascii")
    if path.startswith("/") or path == "*":
        return path
    scheme, mark, rest = path.partition("://")
    if mark and scheme.lower() in {"http", "https"}:
        return "/" + rest.partition("/")[2]
    raise HeadError(400, "malformed request target")


def _has_no_body(method: str, status: int) -> bool:
    return method == "HEAD" or status in {204, 304}


def _has(headers: list[tuple[bytes, bytes]], name: bytes) -> bool:
    return any(item[0] == name for item in headers)


def _page(
    request: Request, status: int, text: str, headers: Iterable[tuple[str, str]] = (), *, close: bool = False
) -> HttpReply:
    """An answer of our own: plain text, one line."""
    fields = [("content-type", "text/plain; charset=utf-8"), ("x-content-type-options", "nosniff"), *headers]
    if close:
        cast(HTTPScope, request.scope)["state"]["close"] = True
    return HttpReply(status, fields, f"{text}\n".encode() if text else b"")


def _problem(reply: HttpReply) -> str:
    """Why a reply cannot be sent as HTTP, whatever host sent it; "" if it can."""
    if not 200 <= reply.status <= 599:
        return f"{reply.status} is no status of a final response"
    for name, value in reply.headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            return f"header {name!r} is malformed"
    return ""
