"""Rooms among rooms, as code sees them: `room.parties["chat"].get("lobby")`, and `lobby.parties` (S30).

Owns what can be asked of another room, and the form of a request that no client has sent. Must not know who
carries it. Peers: `hibernation.room` and `hibernation.exchanges`, which hand out `Parties`; the host, which
carries a fetch to the gateway; `broker.gateway.calls`, which finds the room.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from json import dumps as dump_json
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote, unquote, urlencode

from hibernation.errors import FetchCircle, FetchTimeout, LimitExceeded
from hibernation.outgoing import Message, broadcast_of
from hibernation.settings import Settings

if TYPE_CHECKING:
    from hibernation.requests import Response

__all__ = ["OtherRoom", "Parties", "PartyRooms", "Switchboard", "check_room_id", "request_of"]

ROOM_ID_BYTES_MAX: Final = 512  # of UTF-8 (S1)

#: Pairs of names and values, in either form.
Pairs = Mapping[str, Any] | Iterable[tuple[str, Any]]

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_control = re.compile(r"[\x00-\x1f\x7f-\x9f]").search
#: What stays as it is in the path of a fetch: it is written as in an address (RFC 3986, 3.3).
_IN_PATH: Final = "/%:@!$&'()*+,;=-._~"


class Switchboard(Protocol):
    """What carries to other rooms; the host."""

    def party_names(self) -> Iterable[str]:
        """The names under which parties can be reached."""

    def party_name(self, name: str) -> str:
        """The one name of a party.

        Raises:
            UnknownParty: There is none of this name.
        """

    async def call_room(
        self, caller: str, key: str, fields: dict[str, Any], *, in_turn: bool, settings: Settings
    ) -> list[Any]:
        """Have another room answer: what kind of answer, and what belongs to it. See `answer_of`."""

    async def waits_for(self, key: str) -> list[str]:
        """The rooms that a room waits for, each for the next."""


class Parties(Mapping[str, "PartyRooms"]):
    """The parties of the app, by name: `room.parties["chat"]`.

    Args:
        board: What carries.
        caller: Who asks: "party/id", or "party/" where there is no room.
        settings: Of the caller.
        stage: Takes an effect and its size in bytes.
        in_turn: Whether the caller is in a turn.
    """

    __slots__ = ("_board", "_caller", "_in_turn", "_settings", "_stage")

    def __init__(
        self,
        board: Switchboard,
        caller: str,
        settings: Settings,
        stage: Callable[[list[Any], int], None],
        in_turn: Callable[[], bool],
    ) -> None:
        self._board = board
        self._caller = caller
        self._settings = settings
        self._stage = stage
        self._in_turn = in_turn

    def __getitem__(self, name: str) -> "PartyRooms":
        """The rooms of one party.

        Raises:
            UnknownParty: There is none of this name; a KeyError that says which there are.
        """
        return PartyRooms(self, self._board.party_name(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._board.party_names())

    def __len__(self) -> int:
        return len(list(self._board.party_names()))


class PartyRooms:
    """The rooms of one party.

    Attributes:
        name: The party's name.
    """

    __slots__ = ("_parties", "name")

    def __init__(self, parties: Parties, name: str) -> None:
        self._parties = parties
        self.name = name

    def __repr__(self) -> str:
        return f"<PartyRooms {self.name!r}>"

    def get(self, room_id: str) -> "OtherRoom":
        """The room with this id. Asks nobody, wakes nobody: a room exists by its name.

        Raises:
            ValueError: It is not 1 to 512 bytes of UTF-8 without control characters.
        """
        return OtherRoom(self._parties, self.name, check_room_id(room_id))


class OtherRoom:
    """Another room, to be asked and to be told something; see `PartyRooms.get`.

    Attributes:
        party: Its party's name.
        id: Its id.
    """

    __slots__ = ("_parties", "id", "party")

    def __init__(self, parties: Parties, party: str, room_id: str) -> None:
        self._parties = parties
        self.party = party
        self.id = room_id

    def __repr__(self) -> str:
        return f"<OtherRoom {self.key!r}>"

    @property
    def key(self) -> str:
        """Party and id as one text, `party/id`."""
        return f"{self.party}/{self.id}"

    async def fetch(
        self,
        path: str = "",
        *,
        method: str = "GET",
        headers: Pairs | None = None,
        query: Pairs | str | None = None,
        json: Any = None,
        data: str | bytes | Mapping[str, Any] | None = None,
    ) -> "Response":
        """Have the room's `on_request` answer a request, and give its answer.

        The other room has a turn of its own, which commits by itself, whatever becomes of this one. When this
        turn is cancelled, so is that one. A turn that is run again fetches again.

        Args:
            path: Below the room, as in an address: "" or "/…", with or without a query.
            method: Any method; a body does not change it.
            headers: Their names and values.
            query: Added to the path's: names and values, or text as it stands in an address.
            json: A value that is sent as JSON.
            data: Text or bytes, sent as they are; or a mapping, sent as a form.

        Returns:
            Quart's `Response`, whole, of whatever status: 404 if the party has no `on_request`, 500 if the
            hook has failed, 502 or 503 if its host has died or the room does not start.

        Raises:
            FetchTimeout: It took longer than `fetch_timeout` [20 s].
            FetchCircle: It would never end: the room waits, over others perhaps, for this one.
            LimitExceeded: The body, or that of the answer, is larger than `fetch_bytes_max` [1 MiB].
        """
        parties = self._parties
        settings = parties._settings
        fields = request_of(
            self.party, self.id, path, method=method, headers=headers, query=query, json=json, data=data
        )
        size, limit = len(fields["body"]), settings.fetch_bytes_max
        if size > limit:
            raise LimitExceeded("the body of a fetch", size, limit, remedy="`fetch_bytes_max` allows more")
        fields["caller"] = parties._caller
        answer = await parties._board.call_room(
            parties._caller, self.key, fields, in_turn=parties._in_turn(), settings=settings
        )
        if answer[0] == "late":
            raise FetchTimeout(
                self.key, settings.fetch_timeout, await parties._board.waits_for(self.key)
            ) from None
        return answer_of(self.key, answer, limit)

    def broadcast(
        self,
        message: Message,
        without: Iterable[str] = (),
        tag: str | None = None,
        *,
        all_of: Iterable[str] = (),
        any_of: Iterable[str] = (),
        none_of: Iterable[str] = (),
    ) -> None:
        """Send to the room's open connections, or to those whose tags match, without waking it.

        In a turn it is an effect like any other: it leaves when the turn has ended well, once. In a static
        hook, which has no turn, it leaves at once.

        Args:
            message: Text, bytes, or anything else as JSON.
            without: Ids of connections that do not get it.
            tag: Only connections with this tag; all_of, any_of, none_of: the same with several, together.

        Raises:
            LimitExceeded: The turn stages more than turn_bytes_max.
        """
        ids = (without,) if isinstance(without, str) else without
        self._parties._stage(*broadcast_of(self.key, message, ids, tag, all_of, any_of, none_of))


def check_room_id(room_id: str) -> str:
    """A room's id as S1 allows it.

    Raises:
        TypeError: It is no str.
        ValueError: It is not 1 to 512 bytes of UTF-8 without control characters.
    """
    if not isinstance(room_id, str):
        raise TypeError(f"a room id is a str, not {type(room_id).__name__}: {room_id!r}")
    try:
        size = len(room_id.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= ROOM_ID_BYTES_MAX or _control(room_id):
        shown = repr(room_id) if len(room_id) <= 80 else f"{room_id[:77]!r}…"
        raise ValueError(
            f"a room id is 1 to {ROOM_ID_BYTES_MAX} bytes of UTF-8 without control characters, not {shown}"
        )
    return room_id


def request_of(
    party: str,
    room: str,
    path: str,
    *,
    method: str = "GET",
    headers: Pairs | None = None,
    query: Pairs | str | None = None,
    json: Any = None,
    data: str | bytes | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of a request as the gateway makes them of a client's; arguments as of `OtherRoom.fetch`.

    Raises:
        TypeError, ValueError: Something cannot be sent.
    """
    if not _TOKEN.fullmatch(method):
        raise ValueError(f"{method!r} is no method: write GET, POST or the like")
    below, mark, text = path.partition("?")
    if below and not below.startswith("/"):
        raise ValueError(f'a path below a room is "" or begins with a slash: write {"/" + path!r}')
    below = quote(below, safe=_IN_PATH)
    queries = [quote(text, safe=_IN_PATH + "?")] if mark else []
    if query is not None:
        queries.append(
            quote(query, safe=_IN_PATH + "?")
            if isinstance(query, str)
            else urlencode(_pairs(query), doseq=True)
        )
    pairs = [_header(name, value) for name, value in _pairs(headers or ())]
    body, kind = _body_of(json, data)
    names = {name for name, _ in pairs}
    if kind and "content-type" not in names:
        pairs.append(("content-type", kind))
    if body and "content-length" not in names:
        pairs.append(("content-length", str(len(body))))
    if "host" not in names:
        pairs.append(("host", "localhost"))
    raw_path = f"/parties/{quote(party, safe='')}/{quote(room, safe='')}{below}"
    return {
        "party": party,
        "room": room,
        "method": method.upper(),
        "scheme": "http",
        "path": unquote(raw_path),
        "raw_path": raw_path,
        "query": "&".join([each for each in queries if each]).encode("ascii"),
        "headers": pairs,
        "body": body,
        "client": None,
        "http_version": "1.1",
        "rest": unquote(below),
    }


def _header(name: str, value: Any) -> tuple[str, str]:
    """A header as the gateway would have let it in (RFC 9110, 5.5 and 5.6.2)."""
    text = str(value)
    if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(text):
        raise ValueError(
            f"header {name!r} cannot be sent: names are tokens, values Latin-1 without line breaks"
        )
    return name.lower(), text


def _pairs(given: Pairs) -> list[tuple[str, Any]]:
    items = given.items() if isinstance(given, Mapping) else given
    return [(name, value) for name, value in items]


def _body_of(json: Any, data: str | bytes | Mapping[str, Any] | None) -> tuple[bytes, str]:
    """The body and its type, "" where none is known."""
    if json is not None and data is not None:
        raise ValueError("a fetch has one body: give json or data")
    if json is not None:
        return dump_json(json, separators=(",", ":"), ensure_ascii=False).encode(), "application/json"
    if data is None:
        return b"", ""
    if isinstance(data, str):
        return data.encode(), "text/plain; charset=utf-8"
    if isinstance(data, Mapping):
        return urlencode(_pairs(data), doseq=True).encode(), "application/x-www-form-urlencoded"
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data), ""
    raise TypeError(f"data is text, bytes or a mapping, not {type(data).__name__}: give other values as json")


def answer_of(key: str, answer: list[Any], limit: int) -> "Response":
    """What the gateway has answered to a fetch, as a response or an error.

    That is `["response", status, headers, body]`, `["circle", keys]` or `["too large", bytes]`.
    """
    from werkzeug.datastructures import Headers

    from hibernation.requests import Response  # Quart costs 35 MB: only for who fetches

    kind, *rest = answer
    if kind == "circle":
        raise FetchCircle(rest[0])
    if kind == "too large":
        raise LimitExceeded(
            f"the answer of {key!r}", rest[0], limit, remedy="answer less, or raise `fetch_bytes_max`"
        )
    status, pairs, body = rest
    headers = Headers([(name, value) for name, value in pairs])
    typed = "content-type" in headers
    response = Response(body, status=status, headers=headers)
    if not typed:
        del response.headers["content-type"]  # Quart's default is none that the room has chosen
    return response
