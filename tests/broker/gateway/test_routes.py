"""Paths and connection ids (S1, S10; FAULTS row 53)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.handshake import HeadError
from broker.gateway.routes import Route, connection_id, parse_route


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/party/lobby", Route("main", "lobby", "")),
        ("/party/lobby/", Route("main", "lobby", "/")),
        ("/party/lobby/a/b/c/", Route("main", "lobby", "/a/b/c/")),
        ("/party/lobby//x", Route("main", "lobby", "//x")),
        ("/party/lobby/a%20b%2Fc", Route("main", "lobby", "/a b/c")),
        ("/party/parties", Route("main", "parties", "")),
        ("/parties/chat-room/lobby", Route("chat-room", "lobby", "")),
        ("/parties/chat-room/lobby/", Route("chat-room", "lobby", "/")),
        ("/parties/chat/lobby/a/b/c", Route("chat", "lobby", "/a/b/c")),
        ("/parties/main/lobby", Route("main", "lobby", "")),
        ("/parties/%63hat/lobby", Route("chat", "lobby", "")),
        # Such parties do not exist, which is for the caller to say (404).
        ("/parties/CHAT/lobby", Route("CHAT", "lobby", "")),
        ("/parties/%ff/lobby", Route("%ff", "lobby", "")),
        ("/parties/../lobby", Route("..", "lobby", "")),
    ],
)
def test_paths_that_lead_to_a_room(path, route):
    assert parse_route(path) == route


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "*", "/party", "/party/", "/party//", "/party//x", "/parties", "/parties/", "/parties/chat",
        "/parties/chat/", "/parties/chat//x", "/parties//lobby", "/Party/lobby", "/%70arty/lobby",
        "/x/party/lobby", "party/lobby", "//party/lobby", "/partyx/lobby", "/_broker/health",
    ],
)  # fmt: skip
def test_paths_that_lead_to_no_room(path):
    """An empty room id is no room; these are on_fetch's."""
    assert parse_route(path) is None


@pytest.mark.parametrize(
    ("segment", "room"),
    [
        ("a%2Fb", "a/b"),
        ("..", ".."),
        ("%2e%2e", ".."),
        (".", "."),
        ("a+b", "a+b"),
        ("a%2Bb", "a+b"),
        ("a%25b", "a%b"),
        ("%F0%9F%8E%89", "🎉"),
        ("caf%C3%A9", "caf\u00e9"),
        ("cafe%CC%81", "cafe\u0301"),
        ("Lobby", "Lobby"),
        ("a:b;c,d@e'", "a:b;c,d@e'"),
        ("%20", " "),
        ("café", "café"),
    ],
)
def test_a_room_id_is_one_decoded_segment(segment, room):
    """S1. Nothing is folded: upper and lower case, composed and decomposed characters are other rooms."""
    assert parse_route(f"/party/{segment}") == Route("main", room, "")
    assert parse_route(f"/parties/x/{segment}/y") == Route("x", room, "/y")


@pytest.mark.parametrize(
    "segment",
    [
        "%00", "a%00b", "%0a", "%0D", "%1f", "%7F", "%C2%80", "%C2%9f", "a\tb",  # control characters
        "%ff", "%C3", "%c0%af", "%ED%A0%80", "%ed%b0%80", "%f4%90%80%80", "\udc80",  # no UTF-8
        "%", "a%", "%4", "%zz", "%%41", "%u0041", "% 41",  # no escapes
    ],
)  # fmt: skip
def test_a_bad_room_id_is_400(segment):
    """S1."""
    for path in (f"/party/{segment}", f"/parties/chat/{segment}/rest", f"/parties/none/{segment}"):
        with pytest.raises(HeadError) as caught:
            parse_route(path)
        assert caught.value.status == 400


@pytest.mark.parametrize(("unit", "unit_bytes"), [("a", 1), ("%C3%A9", 2), ("%F0%9F%8E%89", 4), ("é", 2)])
def test_a_room_id_at_its_bound(unit, unit_bytes):
    """S1: 512 bytes of UTF-8 after decoding, however they are written."""
    longest = 512 // unit_bytes
    for length in (1, longest - 1, longest):
        assert parse_route("/party/" + unit * length) is not None
    for extra in ("a", unit):
        with pytest.raises(HeadError) as caught:
            parse_route("/party/" + unit * longest + extra)
        assert caught.value.status == 400


def test_the_rest_is_nobodys_business():
    """Bad escapes below the room are the room's to read."""
    assert parse_route("/party/a/%ff/%zz/%00") == Route("main", "a", "/\ufffd/%zz/\0")


@given(st.text(min_size=1, max_size=40))
def test_every_id_survives_the_way_a_browser_writes_it(room):
    """encodeURIComponent() is UTF-8 in escapes; distinct ids stay distinct."""
    try:
        encoded = "".join(f"%{byte:02x}" for byte in room.encode())
    except UnicodeEncodeError:
        return
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in room):
        with pytest.raises(HeadError):
            parse_route(f"/party/{encoded}")
    else:
        assert parse_route(f"/party/{encoded}") == Route("main", room, "")


@given(st.text(alphabet=st.sampled_from("/%partyiesc%0aF9+.é\0\ud800"), max_size=30), st.booleans())
def test_no_path_raises_anything_but_400(path, prefixed):
    try:
        route = parse_route("/party/" + path if prefixed else path)
    except HeadError as error:
        assert error.status == 400
    else:
        assert route is None or 1 <= len(route.room.encode()) <= 512


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", None),
        ("a=b", None),
        ("pk=1", None),
        ("x_pk=1&_pkx=2&_PK=3", None),
        ("a=_pk", None),
        ("_pk=abc", "abc"),
        ("a=1&_pk=6a7d0b5e-7b19-4cdc-9f57-0a2c0c4c5b3e&b=2", "6a7d0b5e-7b19-4cdc-9f57-0a2c0c4c5b3e"),
        ("%5Fpk=abc", "abc"),
        ("%5f%70%6b=abc", "abc"),
        ("_pk=a+b%2Bc", "a b+c"),
        ("_pk=a=b", "a=b"),
        ("_pk=%C3%A9%F0%9F%8E%89", "é🎉"),
        ("%zz&&=&_pk=x", "x"),
    ],
)
def test_the_connection_id_is_pk(query, expected):
    """S10; written as URLSearchParams writes it."""
    assert connection_id(query) == expected


@pytest.mark.parametrize(
    "query",
    [
        "_pk", "_pk=", "a=1&_pk=", "_pk=a&_pk=b", "_pk=a&_pk=a", "_pk=a&%5Fpk=a", "_pk=%00", "_pk=a%0Ab",
        "_pk=%7f", "_pk=%C2%85", "_pk=%E2%80%AE", "_pk=%E2%80%A8", "_pk=%EF%BF%BE", "_pk=%ff",
        "_pk=%ED%A0%80", "_pk=%", "_pk=%4", "_pk=%zz",
    ],
)  # fmt: skip
def test_a_bad_connection_id_is_400(query):
    """S10: 1..128 printable characters, once."""
    with pytest.raises(HeadError) as caught:
        connection_id(query)
    assert caught.value.status == 400


@pytest.mark.parametrize("unit", ["a", "+", "%C3%A9", "%F0%9F%8E%89"])
def test_a_connection_id_at_its_bound(unit):
    """S10: characters count, not bytes."""
    for length in (1, 127, 128):
        found = connection_id("_pk=" + unit * length)
        assert found is not None
        assert len(found) == length
    with pytest.raises(HeadError) as caught:
        connection_id("_pk=" + unit * 129)
    assert caught.value.status == 400


@given(st.text(alphabet=st.sampled_from("_pk=&%5F0a+é\ud800"), max_size=30))
def test_no_query_raises_anything_but_400(query):
    try:
        found = connection_id(query)
    except HeadError as error:
        assert error.status == 400
    else:
        assert found is None or 1 <= len(found) <= 128
