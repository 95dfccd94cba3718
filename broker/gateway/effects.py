"""Results of turns: what hosts order, carried out.

Owns the meaning of every result and effect of `hibernation.wire` on the gateway's side, in the order in which
they come. Must not decide anything: a turn that is here has been committed. Peers: `lifecycle`, `inbox`,
`outbox`, `forward`.
"""

import struct
from collections.abc import Callable
from typing import Any, Final

from broker.gateway.connections import CLOSED, CLOSING, CONNECTING, ENDING, OPEN, Connections
from broker.gateway.doors import Doors
from broker.gateway.forward import Forward
from broker.gateway.frames import encode_message
from broker.gateway.inbox import Inbox
from broker.gateway.lifecycle import Lifecycle
from broker.gateway.links import HostLink
from broker.gateway.outbox import Sender
from broker.gateway.rooms import Rooms
from hibernation import wire

#: Rows of one answer to `get_connections`; the slots and numbers of the others go along, to be asked for.
PAGE_ROWS: Final = 256
_PAIR: Final = struct.Struct("<IQ")


class Effects:
    """See the module."""

    def __init__(
        self,
        connections: Connections,
        rooms: Rooms,
        inbox: Inbox,
        sender: Sender,
        lifecycle: Lifecycle,
        doors: Doors,
        forward: Forward,
    ) -> None:
        self._connections = connections
        self._rooms = rooms
        self._inbox = inbox
        self._sender = sender
        self._lifecycle = lifecycle
        self._doors = doors
        self._forward = forward
        self.on_answer: Callable[[int, Any], None]
        self.on_retire: Callable[[HostLink], None]
        self.turns = 0
        self.broadcasts = 0
        self.deliveries = 0
        self.missed = 0
        self._kinds: dict[int, Callable[[HostLink, list[Any]], None]] = {
            wire.CONNECTED: self._connected,
            wire.CLOSED: self._closed,
            wire.EFFECTS: lambda _, item: self.execute(item[1]),
            wire.BEGUN: lambda _, item: self._forward.begun(item[1]),
            wire.ADMIT: lambda _, item: self._doors.answered(
                item[1], item[2], [tuple(h) for h in item[3]], item[4]
            ),
            wire.CHUNK: lambda _, item: self._forward.chunk(item[1], item[2]),
            wire.FINISH: lambda _, item: self._forward.finish(item[1], item[2]),
            wire.QUERY: self._query,
            wire.ANSWER: lambda _, item: self.on_answer(item[1], item[2]),
            wire.RETIRE: lambda host, _: self.on_retire(host),
        }

    def result(self, host: HostLink, item: list[Any]) -> None:
        """Carry out one result."""
        if item[0] != wire.TURN:
            self._kinds[item[0]](host, item)
            return
        _, slot, number, end, effects = item
        self.turns += 1
        table = self._connections
        try:
            if effects:
                self.execute(effects)
        finally:  # a fault of ours in an effect must not leave the message, and its room, in flight for ever
            if table.number[slot] == number:
                self._inbox.acknowledge(slot, end)
                if table.phase[slot] != OPEN or self._lifecycle.reopened:
                    self._lifecycle.message_acknowledged(slot)

    def execute(self, effects: list[list[Any]]) -> None:
        """Carry out the effects of one turn, in their order."""
        table = self._connections
        for effect in effects:
            kind = effect[0]
            if kind == wire.SEND:
                _, slot, number, data = effect
                if table.number[slot] == number and (
                    table.phase[slot] <= OPEN or (table.phase[slot] == ENDING and self._rooms.is_linked(slot))
                ):
                    self._sender.send(slot, encode_message(data))
                else:
                    self.missed += 1
            elif kind == wire.BROADCAST:
                self._broadcast(effect)
            elif kind == wire.RESPOND:
                self._forward.respond(effect[1], effect[2], effect[3], effect[4])
            elif table.number[effect[1]] == effect[2]:
                self._change(kind, effect)

    def _change(self, kind: int, effect: list[Any]) -> None:
        slot, number = effect[1], effect[2]
        table = self._connections
        if kind == wire.SHUT:
            self._lifecycle.close(slot, effect[3], effect[4], "server_close")
            return
        if table.phase[slot] == CLOSED:
            return
        if kind == wire.STATE:
            blob = effect[3]
            if blob is None:
                self._inbox.states.pop(slot, None)
            else:
                self._inbox.states[slot] = blob
            self._lifecycle.batch.state(number, blob)
        elif kind == wire.TAGS:
            room = table.room[slot]
            assert room is not None
            self._rooms.retag(slot, effect[3])
            party, _, room_id = room.key.partition("/")
            self._lifecycle.batch.tags(number, party, room_id, wire.blob_tags(effect[3]))

    def _broadcast(self, effect: list[Any]) -> None:
        _, key, data, without, all_of, any_of, none_of = effect
        room = self._rooms.by_key.get(key)
        if room is None or not room.count:
            return
        slots = self._rooms.select(room, [all_of, any_of, none_of])
        if without:
            hidden = {self._connections.find(room, each) for each in without}
            slots = [slot for slot in slots if slot not in hidden]
        self.broadcasts += 1
        self.deliveries += len(slots)
        self._sender.send_to_many(slots, encode_message(data))

    def _connected(self, _: HostLink, item: list[Any]) -> None:
        _, slot, number, failed, effects = item
        self.turns += 1
        self.execute(effects)
        self._lifecycle.connected(slot, number, failed)

    def _closed(self, _: HostLink, item: list[Any]) -> None:
        _, slot, number, effects = item
        self.turns += 1
        self.execute(effects)
        self._lifecycle.close_turn_ended(slot, number)

    # --- Questions about connections --------------------------------------------------------------

    def _query(self, host: HostLink, item: list[Any]) -> None:
        _, question, key, what, argument = item
        host.put([wire.REPLY, question, self.ask(key, what, argument)])

    def ask(self, key: str, what: str, argument: Any) -> Any:
        """Answer a question about a room's open connections, from memory: no socket is touched, no room
        wakes.
        """
        table, rooms = self._connections, self._rooms
        room = rooms.by_key.get(key)
        if what == "more":
            return self._page(argument)
        if room is None:
            return {"find": None, "list": [[], b""], "count": 0}[what]
        if what == "find":
            slot = table.find(room, argument)
            if slot is None or not CONNECTING <= table.phase[slot] < CLOSING:
                return None
            return rooms.row(slot, self._inbox.states.get(slot))
        if what == "count":
            return len(rooms.select(room, argument)) if any(argument) else room.count
        found = rooms.select(room, argument)
        rest = b"".join([_PAIR.pack(slot, table.number[slot]) for slot in found[PAGE_ROWS:]])
        return [[rooms.row(slot, self._inbox.states.get(slot)) for slot in found[:PAGE_ROWS]], rest]

    def _page(self, rest: bytes) -> list[Any]:
        """The next rows of a listing: of those that were open at its instant, those that still are."""
        table = self._connections
        cut = PAGE_ROWS * _PAIR.size
        rows = [
            self._rooms.row(slot, self._inbox.states.get(slot))
            for slot, number in _PAIR.iter_unpack(rest[:cut])
            if table.number[slot] == number and CONNECTING <= table.phase[slot] < CLOSING
        ]
        return [rows, rest[cut:]]
