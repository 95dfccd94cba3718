"""What can be asked of other rooms, and how it looks on its way (S30)."""

from typing import Any

import pytest
import trio

from hibernation import wire
from hibernation.errors import FetchCircle, FetchTimeout, LimitExceeded, UnknownParty
from hibernation.neighbours import Parties, answer_of, check_room_id, request_of
from hibernation.settings import Settings


class Board:
    """A switchboard on which every call is answered with what was put there."""

    def __init__(self, answer: list[Any] | None = None) -> None:
        self.answer = answer or ["response", 200, [], b"hello"]
        self.calls: list[tuple[Any, ...]] = []

    def party_names(self) -> list[str]:
        return ["main", "chat"]

    def party_name(self, name: str) -> str:
        if name not in ("main", "chat"):
            raise UnknownParty(name, self.party_names())
        return "chat"

    async def call_room(
        self, caller: str, key: str, fields: dict[str, Any], *, in_turn: bool, settings: Settings
    ) -> list[Any]:
        self.calls.append((caller, key, fields, in_turn))
        await trio.lowlevel.checkpoint()
        return self.answer

    async def waits_for(self, key: str) -> list[str]:
        return ["chat/c"]


def parties(board: Board, staged: list[Any] | None = None, **settings: Any) -> Parties:
    taken = [] if staged is None else staged
    return Parties(
        board, "main/a", Settings(**settings), lambda effect, size: taken.append((effect, size)), lambda: True
    )


def fetch(board: Board, *arguments: Any, **keywords: Any) -> Any:
    settings = keywords.pop("settings", {})

    async def run() -> Any:
        return await parties(board, **settings)["chat"].get("b").fetch(*arguments, **keywords)

    return trio.run(run)


def test_parties_are_a_mapping_of_names() -> None:
    found = parties(Board())
    assert list(found) == ["main", "chat"]
    assert len(found) == 2
    assert "chat" in found and "nobody" not in found
    assert found["main"].name == "chat"  # the one that has it as its other name
    with pytest.raises(KeyError, match=r"no party 'nobody': there are main, chat"):
        found["nobody"]
    other = found["chat"].get("lobby")
    assert (other.party, other.id, other.key) == ("chat", "lobby", "chat/lobby")


@pytest.mark.parametrize("room", ["a", "ä" * 256, "a/b", "..", " "])
def test_room_ids_that_are_some(room: str) -> None:
    assert check_room_id(room) == room


@pytest.mark.parametrize("room", ["", "a\n", "\x7f", "ä" * 256 + "a", "\ud800"])
def test_room_ids_that_are_none(room: str) -> None:
    """S1: 1 to 512 bytes of UTF-8 without control characters."""
    with pytest.raises(ValueError, match="512"):
        parties(Board())["chat"].get(room)
    with pytest.raises(TypeError):
        check_room_id(5)  # type: ignore[arg-type]


def test_a_path_is_that_of_an_address() -> None:
    fields = request_of("chat", "a/ä", "/x y/%41/ü?q=1&r=ß", query={"s": ["2", "3"], "t": "ü"})
    assert fields["raw_path"] == "/parties/chat/a%2F%C3%A4/x%20y/%41/%C3%BC"
    assert fields["path"] == "/parties/chat/a/ä/x y/A/ü"
    assert fields["rest"] == "/x y/A/ü"
    assert fields["query"] == b"q=1&r=%C3%9F&s=2&s=3&t=%C3%BC"
    assert request_of("chat", "a", "?x=1", query="y=ü")["query"] == b"x=1&y=%C3%BC"
    assert request_of("chat", "a", "")["rest"] == ""
    with pytest.raises(ValueError, match="begins with a slash"):
        request_of("chat", "a", "x")
    with pytest.raises(ValueError, match="no method"):
        request_of("chat", "a", "", method="G T")


@pytest.mark.parametrize(
    ("given", "body", "kind"),
    [
        ({"json": {"a": "ä"}}, '{"a":"ä"}'.encode(), "application/json"),
        ({"json": 0}, b"0", "application/json"),
        ({"data": "ä"}, "ä".encode(), "text/plain; charset=utf-8"),
        ({"data": b"\xff"}, b"\xff", None),
        ({"data": {"a": ["1", "ä"]}}, b"a=1&a=%C3%A4", "application/x-www-form-urlencoded"),
        ({"data": "x", "headers": {"Content-Type": "text/csv"}}, b"x", "text/csv"),
        ({"headers": [("X-A", "1"), ("x-a", "2")]}, b"", None),
    ],
)
def test_bodies_have_their_type(given: dict[str, Any], body: bytes, kind: str | None) -> None:
    fields = request_of("chat", "a", "", method="post", **given)
    assert (fields["method"], fields["body"]) == ("POST", body)
    assert dict(fields["headers"]).get("content-type") == kind
    assert all(name == name.lower() for name, _ in fields["headers"])
    if isinstance(given.get("headers"), list):
        assert [value for name, value in fields["headers"] if name == "x-a"] == ["1", "2"]


@pytest.mark.parametrize(
    "headers", [{"X A": "1"}, {"X-A": "1\r\nX-B: 2"}, {"X-A": "\0"}, {"X-A": "你"}, {"": "1"}]
)
def test_headers_that_cannot_be_sent(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        request_of("chat", "a", "", headers=headers)


def test_a_fetch_has_one_body() -> None:
    with pytest.raises(ValueError, match="one body"):
        request_of("chat", "a", "", json=1, data="x")
    with pytest.raises(TypeError, match="json"):
        request_of("chat", "a", "", data=5)  # type: ignore[arg-type]


def test_an_answer_is_a_response_as_it_was_sent() -> None:
    board = Board(["response", 201, [["set-cookie", "a=1"], ["set-cookie", "b=2"]], b"\xff"])
    response = fetch(board, "/x")
    assert response.status_code == 201
    assert response.headers.getlist("set-cookie") == ["a=1", "b=2"]
    assert response.content_type is None
    assert trio.run(response.get_data) == b"\xff"
    [(caller, key, fields, in_turn)] = board.calls
    assert (caller, key, in_turn) == ("main/a", "chat/b", True)
    assert fields["caller"] == "main/a"
    kind = ["content-type", "application/json"]
    assert trio.run(fetch(Board(["response", 200, [kind], b'{"a": 1}'])).get_json) == {"a": 1}


def test_what_is_no_answer_is_an_error() -> None:
    with pytest.raises(FetchCircle, match="main/a → chat/b → main/a") as circle:
        fetch(Board(["circle", ["main/a", "chat/b", "main/a"]]))
    assert circle.value.circle == ("main/a", "chat/b", "main/a")
    with pytest.raises(FetchTimeout, match=r"'chat/b' did not answer within 20 s; it waits for chat/c"):
        fetch(Board(["late"]))
    with pytest.raises(LimitExceeded, match="1,048,577 bytes, and at most 1,048,576"):
        fetch(Board(["too large", 1_048_577]))
    assert answer_of("chat/b", ["response", 404, [], b""], 1).status_code == 404


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_body_of_a_fetch_has_its_limit(over: int) -> None:
    board = Board()
    if over <= 0:
        fetch(board, data=b"x" * (2048 + over), settings={"fetch_bytes_max": 2048})
        assert len(board.calls) == 1
        return
    with pytest.raises(LimitExceeded, match=r"2,049 bytes, and at most 2,048 .*fetch_bytes_max"):
        fetch(board, data=b"x" * 2049, settings={"fetch_bytes_max": 2048})
    assert not board.calls


def test_a_broadcast_elsewhere_is_an_effect() -> None:
    staged: list[Any] = []
    other = parties(Board(), staged)["chat"].get("b")
    other.broadcast({"a": "ä"}, without="me", tag="t", any_of=["u", "v"])
    assert staged == [([wire.BROADCAST, "chat/b", '{"a":"ä"}', ["me"], ["t"], ["u", "v"], []], 10)]
    with pytest.raises(ValueError, match="surrogate"):
        other.broadcast("\ud800")
