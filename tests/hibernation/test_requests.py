"""HTTP as room code sees it: the request it is given, and what may be returned."""

import datetime as dt
import io
import uuid
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import quart
import trio
import werkzeug.exceptions
from werkzeug.datastructures import Headers
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, NotFound, RequestEntityTooLarge
from werkzeug.wrappers import Response as WerkzeugResponse

from hibernation.errors import Refuse
from hibernation.requests import (
    Reply,
    Request,
    Response,
    build_request,
    error_reply,
    refusal,
    request_fields,
    to_reply,
)


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "party": "chat",
        "room": "x",
        "method": "POST",
        "scheme": "https",
        "path": "/parties/chat/é/sub",
        "raw_path": "/parties/chat/%C3%A9/sub",
        "query": b"a=1&a=2&b=%20",
        "headers": [["host", "example.com"], ["cookie", "k=v"], ["x-twice", "1"], ["x-twice", "2"]],
        "body": b"",
        "client": ["9.9.9.9", 1234],
        "http_version": "1.1",
        "rest": "/sub",
        **changes,
    }


def reply_to(value: Any) -> Reply:
    return trio.run(to_reply, value)


def whole(value: Any) -> tuple[int, dict[str, str], bytes]:
    """The reply with its body read to its end."""

    async def read() -> tuple[int, dict[str, str], bytes]:
        reply = await to_reply(value)
        headers = {name.lower(): text for name, text in reply.headers}
        if isinstance(reply.body, bytes):
            return reply.status, headers, reply.body
        return reply.status, headers, b"".join([chunk async for chunk in reply.body])

    return trio.run(read)


# -- requests ----------------------------------------------------------------------------------------------


def test_a_request_is_quarts_with_rest() -> None:
    request = build_request(fields())
    assert isinstance(request, quart.Request)
    assert request.rest == "/sub"
    assert request.path == "/parties/chat/é/sub"
    assert request.method == "POST"
    assert request.scheme == "https"
    assert request.url.startswith("https://example.com/parties/chat/")
    assert request.args.getlist("a") == ["1", "2"]
    assert request.args["b"] == " "
    assert request.query_string == b"a=1&a=2&b=%20"
    assert request.headers["X-Twice"] == "1"
    assert request.headers.getlist("x-twice") == ["1", "2"]
    assert dict(request.cookies) == {"k": "v"}
    assert request.remote_addr == "9.9.9.9"
    assert request.host == "example.com"


def test_a_request_of_few_fields_is_enough() -> None:
    request = build_request({"method": "GET", "scheme": "http", "path": "/", "query": b"", "headers": []})
    assert (request.rest, request.remote_addr) == ("", None)
    assert trio.run(request.get_data) == b""


def test_bodies_are_there_in_all_their_forms() -> None:
    async def main() -> None:
        request = build_request(fields(body=b"text"))
        assert await request.get_data() == b"text"
        assert await request.get_data(as_text=True) == "text"
        assert await request.body == b"text"
        json = [["content-type", "application/json"]]
        assert await build_request(fields(headers=json, body=b'{"a": 1}')).get_json() == {"a": 1}
        assert await build_request(fields(headers=json, body=b'{"a": 1}')).json == {"a": 1}
        form = [["content-type", "application/x-www-form-urlencoded"]]
        assert dict(await build_request(fields(headers=form, body=b"a=1&b=%C3%A9")).form) == {
            "a": "1",
            "b": "é",
        }
        async for chunk in build_request(fields(body=b"text")).body:
            assert chunk == b"text"

    trio.run(main)


def test_files_of_a_form_are_there() -> None:
    body = (
        b'--X\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\n'
        + b"x" * 600_000
        + b"\r\n--X--\r\n"
    )

    async def main() -> None:
        headers = [["content-type", "multipart/form-data; boundary=X"], ["content-length", str(len(body))]]
        request = build_request(fields(headers=headers, body=body))
        files = await request.files
        assert files["f"].filename == "a.txt"
        assert files["f"].read() == b"x" * 600_000
        await request.close()

    trio.run(main)


def test_json_that_is_none_is_a_bad_request() -> None:
    request = build_request(fields(headers=[["content-type", "application/json"]], body=b"{"))
    with pytest.raises(BadRequest) as caught:
        trio.run(request.get_json)
    reply = error_reply(caught.value)
    assert reply is not None
    assert reply.status == 400


def test_headers_that_a_hook_changes_go_on() -> None:
    """S9."""
    request = build_request(fields())
    request.headers["X-User"] = "ann"
    request.headers.add("X-Twice", "3")
    del request.headers["Cookie"]
    changed = request_fields(request)
    assert changed == {
        "headers": [
            ("host", "example.com"),
            ("x-twice", "1"),
            ("x-twice", "2"),
            ("x-user", "ann"),
            ("x-twice", "3"),
        ]
    }
    assert build_request({**fields(), **changed}).headers["x-user"] == "ann"


def test_headers_unchanged_are_as_they_came() -> None:
    sent = fields()["headers"]
    assert [list(pair) for pair in request_fields(build_request(fields()))["headers"]] == sent


@pytest.mark.parametrize(("name", "value"), [("x y", "a"), ("", "a"), ("x", "\u20ac"), ("x", "a\x00")])
def test_a_header_that_cannot_be_sent_is_named(name: str, value: str) -> None:
    """Row 51."""
    request = build_request(fields())
    request.headers[name] = value
    with pytest.raises(ValueError, match="cannot be sent"):
        request_fields(request)


# -- replies -----------------------------------------------------------------------------------------------

HTML = "text/html; charset=utf-8"


@pytest.mark.parametrize(
    ("value", "status", "kind", "body"),
    [
        ("té", 200, HTML, "té".encode()),
        ("", 200, HTML, b""),
        (b"\xff", 200, HTML, b"\xff"),
        (bytearray(b"a"), 200, HTML, b"a"),
        ({"a": "é"}, 200, "application/json", b'{"a": "\\u00e9"}\n'),
        ([1, None], 200, "application/json", b"[1, null]\n"),
        (("made", 201), 201, HTML, b"made"),
        (("made", HTTPStatus.CREATED), 201, HTML, b"made"),
        (("made", "201"), 201, HTML, b"made"),
        (("made", None), 200, HTML, b"made"),
        (({"a": 1}, 202), 202, "application/json", b'{"a": 1}\n'),
        (("a", {"Content-Type": "text/plain"}), 200, "text/plain", b"a"),
        (("a", 418, [("Content-Type", "text/plain")]), 418, "text/plain", b"a"),
        (("a", 418, Headers({"Content-Type": "text/plain"})), 418, "text/plain", b"a"),
        (Response("r", 203, {"X": "y"}), 203, HTML, b"r"),
        ((Response("r", 203), 204), 204, HTML, b"r"),
        (quart.Response("r"), 200, HTML, b"r"),
        (WerkzeugResponse("w", 206), 206, "text/plain; charset=utf-8", b"w"),
        (NotFound(), 404, "text/plain; charset=utf-8", None),
        (Refuse(403, "no"), 403, "text/plain; charset=utf-8", b"no\n"),
    ],
)
def test_whatever_a_view_may_return_is_a_reply(
    value: Any, status: int, kind: str, body: bytes | None
) -> None:
    reply = reply_to(value)
    headers = {name.lower(): text for name, text in reply.headers}
    assert (reply.status, headers["content-type"]) == (status, kind)
    assert isinstance(reply.body, bytes)
    assert body is None or reply.body == body


def test_json_knows_dates_and_ids() -> None:
    day, number = dt.date(2026, 1, 2), uuid.UUID(int=1)
    _, _, body = whole({"day": day, "id": number})
    assert b"Fri, 02 Jan 2026" in body
    assert str(number).encode() in body


def test_headers_are_kept_as_often_as_they_were_set() -> None:
    response = Response("a")
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    reply = reply_to((response, {"X": "y"}))
    assert [name for name, _ in reply.headers].count("Set-Cookie") == 2
    assert ("X", "y") in reply.headers


class Letters:
    """An asynchronous iterator that is no generator, and knows its end."""

    def __init__(self) -> None:
        self.left = iter("abc")
        self.closed = False

    def __aiter__(self) -> "Letters":
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        for letter in self.left:
            return letter
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.closed = True


async def letters() -> AsyncIterator[str | bytes]:
    for letter in ("a", b"b", "c"):
        await trio.lowlevel.checkpoint()
        yield letter


def plain_letters() -> Iterator[str]:
    yield from "abc"


@pytest.mark.parametrize(
    "make", [letters, plain_letters, Letters, lambda: Response(letters()), lambda: Response(["a", "bc"])]
)
def test_what_is_made_piece_by_piece_is_an_iterator(make: Any) -> None:
    """S26."""
    assert not isinstance(reply_to(make()).body, bytes)
    status, headers, body = whole((make(), 201, {"Content-Type": "text/event-stream"}))
    assert (status, headers["content-type"], body) == (201, "text/event-stream", b"abc")
    assert "content-length" not in headers


@pytest.mark.parametrize("asked", [0, 1])
def test_an_iterator_that_is_closed_closes_the_rooms(asked: int) -> None:
    """What a room opened is closed when the client leaves; a generator that never began has opened
    nothing."""
    ended = []

    async def own() -> AsyncIterator[bytes]:
        try:
            while True:
                await trio.lowlevel.checkpoint()
                yield b"a"
        finally:
            ended.append("own")

    def plain() -> Iterator[bytes]:
        try:
            while True:
                yield b"a"
        finally:
            ended.append("plain")

    async def main() -> None:
        other = Letters()
        for value in (own(), plain(), other):
            reply = await to_reply(value)
            assert not isinstance(reply.body, bytes)
            for _ in range(asked):
                await anext(reply.body)
            await reply.body.aclose()  # type: ignore[attr-defined]
        assert ended == ["own", "plain"][: 2 * asked]
        assert other.closed == bool(asked)

    trio.run(main)


def test_a_plain_generator_runs_on_the_rooms_thread() -> None:
    """Room code is never in two places at once."""
    seen = []

    def steps() -> Iterator[str]:
        seen.append(trio.lowlevel.current_task())
        yield "a"

    async def main() -> None:
        reply = await to_reply(steps())
        assert not isinstance(reply.body, bytes)
        assert [chunk async for chunk in reply.body] == [b"a"]
        assert seen == [trio.lowlevel.current_task()]

    trio.run(main)


def test_files_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 20_000)
    assert whole(Response(Response.file_body_class(path)))[2] == b"x" * 20_000
    assert whole(Response(Response.io_body_class(io.BytesIO(b"abc"))))[2] == b"abc"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, 'returned nothing.*return ""'),
        (7, "returned int: return text"),
        (object(), "returned object"),
        ((None, 200), "returned nothing"),
        (("a",), "tuple of 1"),
        (("a", 200, {}, 1), "tuple of 4"),
        (("a", "no number"), "a status is a number"),
        (("a", object()), "a status is a number"),
    ],
)
def test_what_is_no_answer_is_an_error_that_names_the_remedy(value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        reply_to(value)


def test_a_coroutine_is_to_be_awaited() -> None:
    async def helper() -> str:
        await trio.lowlevel.checkpoint()
        return "a"

    coroutine = helper()
    with pytest.raises(TypeError, match="await it"):
        reply_to(coroutine)
    coroutine.close()


@pytest.mark.parametrize(
    "value",
    [
        ("a", 199),
        ("a", 600),
        ("a", 101),
        ("a", {"x y": "1"}),
        ("a", {"X": "\u20ac"}),
        (letters(), {"": "1"}),
    ],
)
def test_what_cannot_be_sent_is_an_error_of_the_room(value: Any) -> None:
    """Row 51."""
    with pytest.raises(ValueError, match=r"status|cannot be sent"):
        reply_to(value)


def test_a_line_break_in_a_header_is_an_error_where_it_is_made() -> None:
    """Row 51."""
    with pytest.raises(ValueError, match="newline"):
        reply_to(("a", {"X": "a\r\nSet-Cookie: b"}))


def test_refusals_are_plain_text() -> None:
    """S9."""
    assert refusal(Refuse(403, "members only")) == Reply(
        403, [("content-type", "text/plain; charset=utf-8")], b"members only\n"
    )
    assert refusal(Refuse(404)).body == b""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Refuse(451, "gone"), 451),
        (Forbidden("<b>"), 403),
        (RequestEntityTooLarge(), 413),
        (HTTPException(response=WerkzeugResponse("own", 402)), 402),
        (HTTPException("no code"), None),
        (ValueError(), None),
    ],
)
def test_exceptions_that_are_answers(error: Exception, status: int | None) -> None:
    reply = error_reply(error)
    assert (reply.status if reply else None) == status
    if isinstance(error, Forbidden):
        assert reply is not None
        assert reply.headers == [("content-type", "text/plain; charset=utf-8")]


def test_aborts_redirects_keep_their_place() -> None:
    with pytest.raises(HTTPException) as caught:
        werkzeug.exceptions.abort(quart.redirect("/elsewhere"))
    reply = error_reply(caught.value)
    assert reply is not None
    assert (reply.status, dict(reply.headers)["Location"]) == (302, "/elsewhere")


def test_request_and_response_are_the_classes_that_users_import() -> None:
    assert issubclass(Request, quart.Request)
    assert issubclass(Response, quart.Response)
