"""Web applications inside a host: `on_fetch = mount(app)`, and `lobby.serve(app, request)` (S26).

Owns the talk with an ASGI application: its scope, its messages, its life from the first request to the end of
the host. Must not know links. Peer: `hibernation.exchanges`, which starts the tasks and sends the answers.

An app runs in a task of its own for each request, so that its answer can go on when the hook that asked for
it has returned; the task ends with the answer, or with the client. Source: ASGI specification 3.0, "HTTP &
WebSocket" and "Lifespan".
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Final

import trio

from hibernation.errors import AppError
from hibernation.logs import get_logger
from hibernation.replies import Reply

if TYPE_CHECKING:
    from hibernation.requests import Request
    from hibernation.room import Lobby

__all__ = ["Application", "Mounted", "mount"]

#: An ASGI application that runs on trio.
Application = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

#: What the start, and the end, of an app may take.
LIFESPAN_SECONDS: Final = 10.0

log = get_logger("mounted")


def mount(app: Application) -> "staticmethod[..., Awaitable[Any]]":
    """Make an `on_fetch` that has a web application answer every request that belongs to no room.

        app = QuartTrio(__name__)

        class Main(Server):
            on_fetch = mount(app)

    Routes, templates, sessions, cookies and static files are the app's. In it the lobby is
    `request.scope["broker.lobby"]`, and by it every room.

    Args:
        app: A `QuartTrio`, or any other ASGI application that runs on trio. It runs in each host.

    Raises:
        AppError: It is no application, or one for asyncio.
    """
    _check(app)

    async def on_fetch(request: "Request", lobby: "Lobby") -> Any:
        return await lobby.serve(app, request)

    return staticmethod(on_fetch)


def _check(app: object) -> None:
    if not callable(app) or isinstance(app, type):
        raise AppError(f"mount takes an application, such as QuartTrio(__name__), not {app!r}")
    quart = sys.modules.get("quart")
    if quart is not None and isinstance(app, quart.Quart):
        from quart_trio import QuartTrio

        if not isinstance(app, QuartTrio):
            raise AppError(
                "this app is a Quart, which runs on asyncio, and hosts run on trio: write"
                " `from quart_trio import QuartTrio` and `app = QuartTrio(__name__)`; the rest of it stays"
            )


class Mounted:
    """One application in this host.

    Args:
        app: The application.
        spawn: Starts a task that ends with what the host serves at the moment.
        spawn_for_life: Starts one that ends with the host.
    """

    def __init__(
        self, app: Application, spawn: Callable[..., None], spawn_for_life: Callable[..., None]
    ) -> None:
        _check(app)
        self._app = app
        self._spawn = spawn
        self._spawn_for_life = spawn_for_life
        self._starting = trio.Lock()
        self._lifespan: _Lifespan | None = None

    async def answer(self, request: "Request", lobby: "Lobby") -> Reply:
        """Have the app answer. Raises what the app raises before its answer has begun."""
        async with self._starting:
            if self._lifespan is None:
                lifespan = _Lifespan(self._app)
                self._spawn_for_life(lifespan.run)
                try:
                    await lifespan.started()
                except BaseException:
                    lifespan.cancel()
                    raise
                self._lifespan = lifespan
        talk = _Talk(self._app, request, lobby)
        self._spawn(talk.run)
        try:
            return await talk.reply()
        except BaseException:
            talk.cancel()
            raise

    async def end(self) -> None:
        """Let the app do what it does at its end."""
        if self._lifespan is not None:
            await self._lifespan.end()


class _Lifespan:
    """The app's start and end."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._scope = trio.CancelScope()
        self._start = trio.Event()
        self._told = False
        self._ends = trio.Event()
        self._ended = trio.Event()
        self._failure = ""

    async def run(self) -> None:
        try:
            with self._scope:
                scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
                await self._app(scope, self._receive, self._send)
        except Exception as error:  # an app need not know the protocol
            if self._start.is_set():
                log.error("an app has failed beside its requests", exc_info=error)
        finally:
            self._start.set()
            self._ended.set()

    async def started(self) -> None:
        """Wait until it has. Raises RuntimeError if it says that it cannot."""
        with trio.fail_after(LIFESPAN_SECONDS):
            await self._start.wait()
        if self._failure:
            raise RuntimeError(f"the app did not start: {self._failure}")

    def cancel(self) -> None:
        """Nobody waits for it any more; whoever comes next begins anew."""
        self._scope.cancel()

    async def end(self) -> None:
        self._ends.set()
        with trio.move_on_after(LIFESPAN_SECONDS):
            await self._ended.wait()
        self._scope.cancel()

    async def _receive(self) -> dict[str, Any]:
        if not self._told:
            self._told = True
            return {"type": "lifespan.startup"}
        await self._ends.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "lifespan.startup.failed":
            self._failure = message.get("message", "") or "it gave no reason"
        if message["type"].startswith("lifespan.startup."):
            self._start.set()
        elif message["type"].startswith("lifespan.shutdown."):
            self._ended.set()


class _Talk:
    """One request to the app and its answer; as an iterator the pieces of the answer's body."""

    def __init__(self, app: Application, request: "Request", lobby: "Lobby") -> None:
        self._app = app
        self._request = request
        self._asgi_scope = _scope_of(request, lobby)
        self._scope = trio.CancelScope()
        self._whole = False
        self._head: tuple[int, list[tuple[str, str]]] | None = None
        self._failure: Exception | None = None
        self._send_piece, self._pieces = trio.open_memory_channel[tuple[bytes, bool]](0)
        self._first: bytes | None = None
        self._ended = False

    async def run(self) -> None:
        try:
            with self._scope:
                await self._app(self._asgi_scope, self._receive, self._send)
        except Exception as error:
            self._failure = error
            if self._ended:
                log.error("an app has failed behind its answer", exc_info=error)
        finally:
            self._send_piece.close()

    def cancel(self) -> None:
        """No more is wanted."""
        self._scope.cancel()
        self._pieces.close()

    async def reply(self) -> Reply:
        """Wait for the head of the answer, and for all of it if it comes at once."""
        piece, more = await self._next()
        assert self._head is not None
        status, headers = self._head
        if not more:
            self._ended = True
            return Reply(status, headers, piece)
        self._first = piece
        return Reply(status, headers, self)

    async def _next(self) -> tuple[bytes, bool]:
        try:
            return await self._pieces.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            raise RuntimeError("the app has ended before its answer did") from None

    def __aiter__(self) -> "_Talk":
        return self

    async def __anext__(self) -> bytes:
        if self._first is not None:
            piece, self._first = self._first, None
            return piece
        if self._ended:
            raise StopAsyncIteration
        piece, more = await self._next()
        self._ended = not more
        return piece

    async def aclose(self) -> None:
        """The client has all, or has left."""
        await trio.lowlevel.checkpoint()
        if not self._ended:
            self.cancel()

    # --- What the app calls -----------------------------------------------------------------------

    async def _receive(self) -> dict[str, Any]:
        if self._whole:
            await trio.sleep_forever()  # a client that leaves cancels the app
        try:
            piece = await anext(self._request.body)
        except StopAsyncIteration:
            self._whole = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": piece, "more_body": True}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            headers = [
                (bytes(name).decode("latin-1"), bytes(value).decode("latin-1"))
                for name, value in message.get("headers", ())
            ]
            self._head = (message["status"], headers)
            await trio.lowlevel.checkpoint()
        elif kind == "http.response.body":
            if self._head is None:
                raise RuntimeError("the body of an answer came before its head")
            piece = (bytes(message.get("body", b"")), bool(message.get("more_body", False)))
            try:
                await self._send_piece.send(piece)
            except trio.BrokenResourceError:
                await trio.sleep_forever()  # nobody wants it; the cancellation is on its way


def _scope_of(request: "Request", lobby: "Lobby") -> dict[str, Any]:
    return {
        **request.scope,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in request.headers.items()
        ],
        "state": {},
        "broker.lobby": lobby,
    }
