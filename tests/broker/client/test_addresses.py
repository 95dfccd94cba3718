"""URL rules. tests/e2e/test_client.py runs the same cases through the npm package."""

from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.client.addresses import Address, endpoint_of, is_private, parameters_of, url_of, whole_url
from broker.client.errors import AddressError
from broker.client.options import Options
from broker.gateway.routes import connection_id, parse_route
from tests.broker.client.cases import DIFFERENT, REQUESTS, THROWN, WEBSOCKETS


def websocket_url(options: dict[str, Any]) -> str:
    built = Options(**{"id": "ID", **options})
    return url_of(built.room_url, [("_pk", built.id or ""), *parameters_of(built.query)])


def request_url(options: dict[str, Any]) -> str:
    query = parameters_of(options.get("query"))
    address = Address(**{name: value for name, value in options.items() if name != "query"})
    return url_of(address.room_url("http"), query)


@pytest.mark.parametrize("name", WEBSOCKETS)
def test_where_a_socket_goes(name: str) -> None:
    options, url = WEBSOCKETS[name]
    assert websocket_url(options) == url


@pytest.mark.parametrize("name", REQUESTS)
def test_where_a_request_goes(name: str) -> None:
    options, url = REQUESTS[name]
    assert request_url(options) == url


@pytest.mark.parametrize("name", THROWN)
def test_what_is_no_address(name: str) -> None:
    with pytest.raises(AddressError):
        websocket_url(THROWN[name])


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_would_be_another_address(name: str) -> None:
    options, what, _ = DIFFERENT[name]
    with pytest.raises(AddressError) as raised:
        websocket_url(options)
    assert raised.value.what == what
    assert raised.value.remedy


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "a:b",
        "a:0",
        "a:65536",
        "[::1",
        "::1",
        ":1999",
        "a@b",
        "a?b",
        "a#b",
        "a\\b",
        "x\ny",
        "x" * 64,
        "[]",
    ],
)
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(AddressError) as raised:
        Address(host, room="x").room_url("ws")
    assert raised.value.what == "host"


@pytest.mark.parametrize("port", [1, 65535])
def test_ports_at_their_bounds(port: int) -> None:
    assert Address(f"localhost:{port}", room="x").room_url("ws") == f"ws://localhost:{port}/parties/main/x"


@pytest.mark.parametrize("protocol", ["http", "tcp", "WS"])
def test_protocols_are_those_of_what_is_done(protocol: str) -> None:
    with pytest.raises(AddressError, match="write ws or wss"):
        Address("localhost:1", room="x", protocol=protocol).room_url("ws")


def test_a_public_address_is_not_taken_for_a_private_one() -> None:
    """The package compares numbers as text; there these are reached without TLS."""
    assert [is_private(f"172.{n}.0.1") for n in (2, 3, 16, 31)] == [False, False, True, True]


ROOM_IDS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)


@given(ROOM_IDS.filter(lambda room: room not in (".", "..")))
def test_the_gateway_finds_every_room_whose_id_is_quoted(room: str) -> None:
    """S1."""
    url = Options(host="localhost:1", room=quote(room, safe=""), id="x", path="a/b").room_url
    route = parse_route(endpoint_of(url).target)
    assert route is not None
    assert (route.party, route.room, route.rest) == ("main", room, "/a/b")


@given(ROOM_IDS)
def test_an_id_that_is_not_quoted_is_that_room_or_an_error(room: str) -> None:
    """S1: but for escapes that are in it, nobody ends up in another room."""
    try:
        url = Options(host="localhost:1", room=room, id="x").room_url
    except AddressError:
        assert set(room) & set("/?#\\%") or room in (".", "..")
        return
    route = parse_route(endpoint_of(url).target)
    assert route is not None
    assert route.room == (unquote(room) if "%" in room else room)


@given(
    st.text(st.characters(exclude_categories=["Cs"])).filter(str.isprintable).filter(bool),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda n: n != "_pk"),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
)
def test_the_gateway_reads_the_query_that_was_written(connection: str, query: dict[str, str]) -> None:
    """S10."""
    url = url_of("ws://localhost:1/parties/main/x", [("_pk", connection[:128]), *parameters_of(query)])
    text = url.partition("?")[2]
    assert text.isascii()
    assert connection_id(text) == connection[:128]
    assert dict(parse_qsl(text, keep_blank_values=True)) == {"_pk": connection[:128], **query}


@pytest.mark.parametrize("room", ["a\ud800", "a%"])
def test_what_no_utf_8_or_escape_can_hold(room: str) -> None:
    with pytest.raises(AddressError):
        Options(host="localhost:1", room=room)


@pytest.mark.parametrize("given_query", ["a=1", b"a", 3, {"a": 1.5}, {"a": b"x"}, {1: "x"}, [("a",)], ["ab"]])
def test_what_is_no_query(given_query: object) -> None:
    with pytest.raises(TypeError):
        parameters_of(given_query)


@pytest.mark.parametrize("query", [{"token": b"hush"}, b"hush", ["hush"], {"token": "hush\ud800"}])
def test_no_error_tells_what_is_in_a_query(query: object) -> None:
    with pytest.raises((TypeError, AddressError)) as raised:
        url_of("", parameters_of(query))
    assert "hush" not in str(raised.value)


def test_pairs_may_repeat_a_name() -> None:
    assert parameters_of([("a", 1), ("a", None), ("a", "2")]) == [("a", "1"), ("a", "2")]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("ws://127.0.0.1:1999/party/lobby", "ws://127.0.0.1:1999/party/lobby?_pk=ID"),
        ("wss://example.com/parties/chat/x/rest?a=1&a=%C3%BC&b", "wss://example.com/parties/chat/x/rest?_pk=ID&a=1&a=%C3%BC&b="),
        ("http://example.com/party/x", "ws://example.com/party/x?_pk=ID"),
        ("https://localhost:1/party/x", "wss://localhost:1/party/x?_pk=ID"),
        ("ws://h/party/r%C3%B6 ö", "ws://h/party/r%C3%B6%20%C3%B6?_pk=ID"),
    ],
)  # fmt: skip
def test_a_whole_url(text: str, url: str) -> None:
    built = Options.of(text, None, {"id": "ID"})
    assert url_of(built.room_url, [("_pk", "ID"), *parameters_of(built.query)]) == url


@pytest.mark.parametrize("text", ["127.0.0.1:1999", "ws://127.0.0.1:1999", "wss://example.com/", "h/party/x"])
def test_what_is_but_a_host(text: str) -> None:
    assert whole_url(text) is None


@pytest.mark.parametrize(
    "text", ["ws://h/party/x#y", "ws://h/../x", "ws://[::1/party/x", "ws://h/party/x?_pk=a"]
)
def test_whole_urls_that_lead_nowhere(text: str) -> None:
    with pytest.raises(AddressError):
        Options.of(text, None, {})


def test_a_url_and_options_do_not_contradict_each_other() -> None:
    with pytest.raises(AddressError, match="protocol"):
        Options.of("ws://h/party/x", None, {"protocol": "wss"})
    with pytest.raises(AddressError, match="query"):
        Options.of("ws://h/party/x?a=1", None, {"query": {"b": "2"}})


def test_an_endpoint() -> None:
    endpoint = endpoint_of("wss://example.com/party/x?token=secret")
    assert endpoint[:5] == ("example.com", 443, True, "example.com", "/party/x?token=secret")
    assert endpoint.shown == "wss://example.com/party/x"
    assert endpoint_of("ws://[::1]:5/x")[:4] == ("::1", 5, False, "[::1]:5")
