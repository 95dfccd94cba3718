"""A client's WebSocket, as room code holds it: `Connection`, and what `on_connect` is told beside it.

Owns what a room knows of a connection, and the staging of what becomes of it. Asks the gateway through the
room. Peers: `hibernation.staging`, where the changes of a turn lie until its end; `hibernation.host`, which
applies them.
"""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cbor2 import loads

from hibernation import wire
from hibernation.errors import ConnectionClosedError
from hibernation.outgoing import Message, check_close, check_tags, frame_data, size_of
from hibernation.staging import UNREAD, Edit, Turn, current_turn
from storage.values import decode, encode

if TYPE_CHECKING:
    from hibernation.requests import Request
    from hibernation.room import Room


class Connection:
    """One client's WebSocket, as room code sees it.

    Valid for the turns of its room while that room is awake; keep the `id` across turns, not the object.
    Every method is an effect: it takes hold when the turn ends well, and not at all when the turn fails.
    """

    __slots__ = (
        "__weakref__",
        "_card",
        "_closed",
        "_edits",
        "_number",
        "_parts",
        "_room",
        "_slot",
        "_state",
        "_state_blob",
        "close_cause",
    )

    #: Why the connection ended, in `on_close`: client_close, client_gone, ping_timeout, slow_consumer,
    #: too_big, protocol_error, server_close, replaced, limit or gateway_lost. None while it is open.
    close_cause: str | None

    def __init__(self, room: "Room", slot: int, number: int, card: bytes, state: bytes | None) -> None:
        self._room = room
        self._slot = slot
        self._number = number
        self._card = card
        self._state_blob = state
        self._state: Any = UNREAD
        self._parts: tuple[str, str, bytes] | None = None
        self._closed = False
        #: Turns that have ended, have changed something here, and are not acknowledged by the gateway.
        self._edits = 0
        self.close_cause = None

    def __repr__(self) -> str:
        return f"<Connection {self.id!r} of {self._room.key!r}>"

    def _read(self) -> tuple[str, str, bytes]:
        parts = self._parts
        if parts is None:
            parts = self._parts = wire.read_card(self._card)
        return parts

    @property
    def id(self) -> str:
        """The id that names this connection within its room: `?_pk=` or a fresh one."""
        return self._read()[0]

    @property
    def uri(self) -> str:
        """The address that the client asked for, query included."""
        return self._read()[1]

    @property
    def tags(self) -> tuple[str, ...]:
        """The connection's tags, in the order in which they were given."""
        edit = self._edit()
        if edit is None or edit.card is None:
            return wire.blob_tags(self._read()[2])
        return wire.blob_tags(wire.read_card(edit.card)[2])

    @property
    def state(self) -> Any:
        """The value last given to `set_state`; None at first. Changing it in place changes nothing: call
        `set_state`.
        """
        edit = self._edit()
        if edit is not None and edit.state is not UNREAD:
            if edit.value is UNREAD:
                edit.value = None if edit.state is None else decode(edit.state)
            return edit.value
        value = self._state
        if value is UNREAD:
            blob = self._state_blob
            value = self._state = None if blob is None else decode(blob)
        return value

    def set_state(self, value: Any) -> None:
        """Keep a value with the connection: over hibernation, host death and new code, until it has closed.

        Args:
            value: Anything CBOR holds, up to state_bytes_max [16 KiB] encoded; or a function of the
                present value.

        Raises:
            StorageLimitError: Too large; the old value stays.
            ValueEncodingError: Not a value that can be stored; the old value stays.
        """
        room = self._room
        turn = room._staging()
        if callable(value):
            value = value(self.state)
        limit = room._settings.state_bytes_max
        blob = None if value is None else encode(value, bytes_max=limit, what="connection state")
        room._count(turn, len(blob) if blob else 0)
        edit = self._change(turn)
        edit.state = blob
        edit.value = UNREAD
        turn.effects.append([wire.STATE, self._slot, self._number, blob])

    def add_tags(self, *tags: str) -> None:
        """Give the connection more tags; those it has already stay where they are.

        Raises:
            LimitExceeded: More than tags_max [64], or one of more than tag_bytes_max [256] bytes; nothing
                is changed.
        """
        self._retag((*self.tags, *tags))

    def remove_tags(self, *tags: str) -> None:
        """Take tags away; those that it has not are passed over."""
        self._retag(tuple([tag for tag in self.tags if tag not in tags]))

    def _retag(self, tags: tuple[str, ...]) -> None:
        turn = self._room._staging()
        blob = wire.tags_blob(check_tags(tags, self._room._settings))
        if blob == wire.tags_blob(self.tags):
            return
        self._room._count(turn, len(blob))
        self._change(turn).card = wire.retag_card(self._card, blob)
        turn.effects.append([wire.TAGS, self._slot, self._number, blob])

    def send(self, message: Message) -> None:
        """Send text, bytes, or anything else as JSON, to this client alone.

        A client that has gone meanwhile does not get it; that is counted, not raised.

        Raises:
            ConnectionClosedError: This connection was closed in this turn or an earlier one of this room.
            LimitExceeded: The turn stages more than turn_bytes_max.
        """
        room = self._room
        turn = room._staging()
        if self._closed or (turn.edits is not None and self._is_closed()):
            raise ConnectionClosedError(self.id)
        if type(message) is str and message.isascii():
            data: str | bytes = message
            total = turn.bytes + len(message)
        else:
            data = frame_data(message)
            total = turn.bytes + size_of(data)
        if total > room._bytes_max:
            room._refuse(total)
        turn.bytes = total
        turn.effects.append([wire.SEND, self._slot, self._number, data])

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection, after everything sent to it before. Closing twice does nothing.

        Args:
            code: 1000, 1001, 1003, 1007..1014 or 3000..4999 (RFC 6455, section 7.4).
            reason: At most 123 bytes of UTF-8 (RFC 6455, section 5.5).

        Raises:
            ValueError: A code that may not be sent, or a reason that is too long.
        """
        turn = self._room._staging()
        code, reason = check_close(code, reason)
        if self._is_closed():
            return
        self._change(turn).closed = True
        turn.effects.append([wire.SHUT, self._slot, self._number, code, reason])

    async def auto_response_at(self) -> datetime | None:
        """When the gateway last answered this client by itself, in UTC; None: never. Asks the gateway."""
        answered_ms = await self._room._host.ask_gateway(
            self._room.key, "answered", [self._slot, self._number]
        )
        return None if answered_ms is None else datetime.fromtimestamp(answered_ms / 1000, UTC)

    def _edit(self) -> Edit | None:
        """What the running turn has changed here."""
        turn = current_turn.get()
        edits = turn.edits
        return edits.get(self) if edits is not None and turn.room is self._room else None

    def _is_closed(self) -> bool:
        """Whether it was closed by this turn, or one that has ended."""
        edit = self._edit()
        return self._closed or (edit is not None and edit.closed)

    def _change(self, turn: Turn) -> Edit:
        edits = turn.edits
        if edits is None:
            edits = turn.edits = {}
        edit = edits.get(self)
        if edit is None:
            edit = edits[self] = Edit()
        return edit

    def _apply(self, edit: Edit) -> None:
        """The turn that has changed something here has ended: it is the newest until the gateway says so."""
        if edit.card is not None:
            self._card, self._parts = edit.card, None
        if edit.state is not UNREAD:
            self._state_blob, self._state = edit.state, UNREAD
        self._closed = self._closed or edit.closed
        self._edits += 1

    def _refresh(self, card: bytes, state: bytes | None) -> None:
        """Take over what the gateway says now, unless something staged here is newer."""
        if not self._edits:
            if card != self._card:
                self._card, self._parts = card, None
            if state != self._state_blob:
                self._state_blob, self._state = state, UNREAD


class ConnectionContext:
    """What `on_connect` and `get_connection_tags` are told beside the connection.

    Attributes:
        request: The upgrade request, as Quart's `Request`, with what `on_before_connect` added to its
            headers.
    """

    __slots__ = ("_encoded", "_request")

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        self._request: Request | None = None

    @property
    def request(self) -> "Request":
        """The upgrade request, as Quart's `Request`, with what `on_before_connect` added to its headers."""
        if self._request is None:
            from hibernation.requests import build_request  # Quart costs 35 MB: only for who looks

            self._request = build_request(loads(self._encoded))
        return self._request
