"""HTTP on the room's side: the `Request` that hooks are given, and the reply made from what they return.

Owns the way from plain fields, as the link carries them, to Quart's objects and back. Must not be imported
before a host has its first request or upgrade to show to room code: Quart costs 35 MB. Its peers are
`hibernation.host`, and the gateway, where `broker.gateway.http` makes the fields.

A room answers with whatever a Quart view may return. The application around it is an empty one, for those of
Quart's helpers that need any (`jsonify`, `send_file`, `make_response`): there are no routes, sessions or
templates here, and no current request.
"""

import os
import re
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from inspect import isasyncgen, isgenerator
from typing import Any, Final, cast

import trio
from quart import json as quart_json
from quart.ctx import AppContext
from quart.globals import _cv_app
from quart.wrappers.response import DataBody, ResponseBody
from quart.wrappers.response import Response as QuartResponse
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest, TrioResponse
from quart_trio.wrappers.request import TrioBody
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from hibernation.errors import Refuse
from hibernation.feeds import Feed
from hibernation.replies import Reply

__all__ = [
    "Reply",
    "Request",
    "Response",
    "build_request",
    "error_reply",
    "provide_app",
    "refusal",
    "request_fields",
    "to_reply",
]

Response = TrioResponse
"""Quart's response class, as `broker.Response`."""

TEXT: Final = ("content-type", "text/plain; charset=utf-8")

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class _NoGlobals:
    """In the place of `g`: one application serves all rooms, so nothing of one may be kept there."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"g.{name}: rooms have no `g`; keep it on self, or in room.storage")


class _RoomsApp(QuartTrio):
    app_ctx_globals_class = _NoGlobals  # type: ignore[assignment]


_context: AppContext | None = None


def provide_app() -> None:
    """Give the running task the application that helpers of Quart look for."""
    global _context
    if _context is None:
        app = _RoomsApp("broker.rooms", static_folder=None, template_folder=None, root_path=os.getcwd())
        _context = AppContext(app)
    _cv_app.set(_context)


class Request(TrioRequest):
    """Quart's request, with the path below the room.

    `rest` is "" or "/…", percent-decoded; `path` is the whole decoded path, `scope["raw_path"]` (bytes) that
    path as it was sent. `caller` is "party/id" of the room that fetches, "party/" of a static hook that does,
    and None for a client. `headers` may be changed in `on_before_connect` and `on_before_request`; hooks that
    run later see it.
    """

    rest: str
    caller: str | None
    max_form_parts = 1000
    max_form_memory_size = None  # the body is in memory already

    def __init__(self, fields: Mapping[str, Any], feed: Feed | None = None) -> None:
        headers = Headers([(name, value) for name, value in fields["headers"]])
        client = fields.get("client") or ("", 0)
        scope: Any = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": fields.get("http_version", "1.1"),
            "method": fields["method"],
            "scheme": fields["scheme"],
            "path": fields["path"],
            "raw_path": fields.get("raw_path", "").encode("ascii", "replace"),
            "query_string": fields["query"],
            "root_path": "",
            "headers": [],
            "client": tuple(client),
            "server": None,
            "extensions": {},
        }
        super().__init__(
            fields["method"],
            fields["scheme"],
            fields["path"],
            fields["query"],
            headers,
            "",
            scope["http_version"],
            scope,
            send_push_promise=_push_nothing,
        )
        self.remote_addr = client[0] or None
        self.rest = fields.get("rest", "")
        self.caller = fields.get("caller")
        if feed is None:
            self.body.set_result(fields.get("body", b""))
        else:
            self.body = _FedBody(feed)


class _FedBody(TrioBody):
    """A body of which the next piece is asked for when it is read."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(None, None)
        self._feed = feed
        self._gathering = trio.Lock()

    async def __anext__(self) -> bytes:
        if self._complete.is_set():
            return await super().__anext__()
        piece = await self._feed.receive()
        if not piece:
            self.set_complete()
            raise StopAsyncIteration
        return piece

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._gather().__await__()

    async def _gather(self) -> bytes:
        async with self._gathering:
            while not self._complete.is_set():
                piece = await self._feed.receive()
                if piece:
                    self._data += piece
                else:
                    self.set_complete()
        return bytes(self._data)


def build_request(fields: Mapping[str, Any], feed: Feed | None = None) -> Request:
    """Make the request that hooks are given from what `broker.gateway.http.HttpRequest.fields` made.

    Needed are method, scheme, path, query (bytes) and headers (pairs, lower-case names); raw_path, rest,
    body, client and http_version may be missing. A body that comes in pieces comes from `feed`.
    """
    return Request(fields, feed)


def request_fields(request: Request) -> dict[str, Any]:
    """Give the fields that a before-hook may have changed: `headers`, in the form that `build_request` takes.

    Raises ValueError for a header that cannot be sent: a name that is no token, a value with control
    characters.
    """
    return {"headers": [(name.lower(), value) for name, value in _checked(request.headers.items())]}


def refusal(refuse: Refuse) -> Reply:
    """Give the answer that `Refuse` asks for: its text as plain text, to a client that leaves it at that
    (S9).
    """
    return Reply(refuse.status, [TEXT], f"{refuse.text}\n".encode() if refuse.text else b"")


def error_reply(error: BaseException) -> Reply | None:
    """Give the answer that an exception stands for, or None for one that is a failure.

    Those are `Refuse`, and what Quart's `abort` and `get_json` raise for a status from 300 to 499.
    """
    if isinstance(error, Refuse):
        return refusal(error)
    if isinstance(error, HTTPException):
        if error.response is not None:
            return _of_werkzeug(cast(WerkzeugResponse, error.response))
        if error.code is not None and 300 <= error.code < 500:
            headers = [(name, value) for name, value in error.get_headers() if name.lower() != "content-type"]
            return Reply(error.code, [*headers, TEXT], f"{error.description or error.name}\n".encode())
    return None


async def to_reply(value: Any) -> Reply:
    """Make a reply from anything that a Quart view may return.

    That is text, bytes, a dict or list (as JSON), a generator, an asynchronous iterator, a `Response`; or one
    of them in a tuple with a status, headers, or both. Quart's defaults hold: text is HTML, unless a header
    says otherwise. A plain generator's steps run on the host's loop, as all room code does.

    Raises TypeError, which names the remedy, for anything else, and ValueError for a status or header that
    cannot be sent.
    """
    if isinstance(value, Reply):
        return value  # of a mounted application
    value, status, headers = _parts(value)
    if isinstance(value, Refuse | HTTPException):
        reply = error_reply(value)
        if reply is None:
            raise value
    elif isinstance(value, WerkzeugResponse):
        reply = _of_werkzeug(value)
    else:
        reply = _of_quart(value if isinstance(value, QuartResponse) else _response(value))
    try:
        merged = Headers(reply.headers)
        if headers is not None:
            merged.update(headers)
        return Reply(
            _status(reply.status if status is None else status), list(_checked(merged.items())), reply.body
        )
    except BaseException:
        if not isinstance(reply.body, bytes):
            await cast(AsyncGenerator[bytes, None], reply.body).aclose()
        raise


def _parts(value: Any) -> tuple[Any, Any, Any]:
    """Body, status and headers of what was returned; None for what it leaves open."""
    if not isinstance(value, tuple):
        return value, None, None
    if len(value) == 3:
        return value
    if len(value) == 2:
        body, second = value
        if isinstance(second, Headers | dict | list):
            return body, None, second
        return body, second, None
    raise TypeError(
        f"a tuple of {len(value)} was returned: write (body, status), (body, headers) or all three"
    )


def _response(value: Any) -> Response:
    """The response for a value that is none yet."""
    if isinstance(value, str | bytes | bytearray):
        return Response(bytes(value) if isinstance(value, bytearray) else value)
    if isinstance(value, dict | list):
        return Response(quart_json.dumps(value) + "\n", content_type="application/json")
    if isgenerator(value):
        return Response(_inline(value))
    if isasyncgen(value):
        return Response(value)
    if hasattr(value, "__aiter__"):
        return Response(_outline(value))
    remedy = "return text, bytes, a dict, a list, an iterator of bytes, or a Response"
    if value is None:
        raise TypeError(f'the hook returned nothing: {remedy}; `return ""` answers with an empty page')
    if hasattr(value, "__await__"):
        raise TypeError(f"the hook returned something that is still to be awaited: await it, then {remedy}")
    raise TypeError(f"the hook returned {type(value).__name__}: {remedy}")


def _of_quart(response: QuartResponse) -> Reply:
    body = response.response
    headers = list(response.headers.items())
    if isinstance(body, DataBody):
        return Reply(response.status_code, headers, bytes(body.data[body.begin : body.end]))
    return Reply(response.status_code, headers, _chunks(body))


def _of_werkzeug(response: WerkzeugResponse) -> Reply:
    return Reply(response.status_code, list(response.headers.items()), response.get_data())


async def _chunks(body: ResponseBody) -> AsyncGenerator[bytes, None]:
    """The pieces of a body; whoever takes a reply calls `aclose`, so its files are closed in time."""
    items = await body.__aenter__()
    try:
        async for item in items:
            if isinstance(item, str):
                yield item.encode()
            elif isinstance(item, bytes | bytearray | memoryview):
                yield bytes(item)
            else:
                raise TypeError(f"an answer's piece is text or bytes, not {type(item).__name__}")
    finally:
        with trio.move_on_after(1, shield=True):
            await body.__aexit__(None, None, None)  # type: ignore[arg-type]


async def _inline(items: Iterable[Any]) -> AsyncGenerator[Any, None]:
    """A plain generator as an asynchronous one, that lets others run between its steps."""
    try:
        for item in items:
            yield item
            await trio.lowlevel.checkpoint()
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


async def _outline(items: Any) -> AsyncGenerator[Any, None]:
    """Any asynchronous iterable as a generator, since Quart takes no other."""
    iterator = aiter(items)
    try:
        async for item in iterator:
            yield item
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            with trio.move_on_after(1, shield=True):
                await close()


def _status(status: Any) -> int:
    """A status as a number; "404" and HTTPStatus.NOT_FOUND are numbers too, as in Quart."""
    try:
        number = int(status)
    except (TypeError, ValueError):
        raise TypeError(f"a status is a number from 200 to 599, not {status!r}") from None
    if not 200 <= number <= 599:
        raise ValueError(f"a status is a number from 200 to 599, not {number}")
    return number


def _checked(headers: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, str]]:
    for name, value in headers:
        text = str(value)
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(text):
            raise ValueError(
                f"header {name!r} cannot be sent: names are tokens, values Latin-1 without line breaks"
            )
        yield name, text


async def _push_nothing(_path: str, _headers: Headers) -> None:
    """Server push is gone from browsers, and a room is not told who speaks HTTP/2."""
