"""Results of turns: what hosts order, carried out.

Owns the meaning of every result and effect of `hibernation.wire` on the gateway's side, in the order in which
they come. Must not decide anything: a turn that is here has been committed.

The ledger's cursor stands on what is being done, so that a successor can go on there: its upper part counts
the items of all hosts' messages, its lower part the steps of one item, which are its effects and its end. All
that may be done again does no harm when it is: an effect that sends looks at the place in the stream
(`outbox`), all others set what they set, and the end of a turn consumes up to an offset. Peers: `lifecycle`,
`inbox`, `outbox`, `forward`.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from cbor2 import dumps, loads

from broker.gateway.answers import RoomRules
from broker.gateway.connections import CLOSED, CLOSING, CONNECTING, ENDING, OPEN, Connections
from broker.gateway.deflate import window_for
from broker.gateway.doors import Doors
from broker.gateway.forward import Forward
from broker.gateway.frames import encode_compressed, encode_message, payload_bytes
from broker.gateway.inbox import Inbox
from broker.gateway.ledger import CURSOR, ENCODED, HOSTS_MAX, STEP_BITS
from broker.gateway.lifecycle import Lifecycle
from broker.gateway.links import HostLink, Links
from broker.gateway.outbox import Sender
from broker.gateway.rooms import RoomRecord, Rooms
from hibernation import wire
from hibernation.logs import get_logger
from storage.errors import BrokerError

#: Rows of one answer to `get_connections`; the slots and numbers of the others go along, to be asked for.
PAGE_ROWS: Final = 256
#: Results that end with a list of effects.
WITH_EFFECTS: Final = frozenset({wire.TURN, wire.CONNECTED, wire.CLOSED, wire.EFFECTS})
NO_EFFECTS: Final[list[Any]] = []
_PAIR: Final = struct.Struct("<IQ")

log = get_logger("effects")


class Effects:
    """See the module."""

    def __init__(
        self,
        connections: Connections,
        rooms: Rooms,
        links: Links,
        inbox: Inbox,
        sender: Sender,
        lifecycle: Lifecycle,
        doors: Doors,
        forward: Forward,
        rules: RoomRules,
    ) -> None:
        self._links = links
        self._connections = connections
        self._ledger = connections.ledger
        self._header = connections.ledger.header
        self._rooms = rooms
        self._inbox = inbox
        self._sender = sender
        self._lifecycle = lifecycle
        self._doors = doors
        self._forward = forward
        self._rules = rules
        #: The effect that a former gateway may have begun; and by bits of the window, the frames that it
        #: sends compressed, as that gateway had made them.
        self._in_doubt = 0
        self._encoded: dict[int, bytes] = {}
        self.on_answer: Callable[[int, Any], None]
        self.on_retire: Callable[[HostLink], None]
        self.on_quarantine: Callable[[str, str | None, float], None]
        self.on_call: Callable[[HostLink | None, list[Any]], None]
        self.waits_for: Callable[[str], list[str]]
        self.turns = 0
        self.broadcasts = 0
        self.deliveries = 0
        self.missed = 0
        #: What the end of a result means.
        self._ends: dict[int, Callable[[Any, list[Any]], None]] = {
            wire.TURN: self._turned,
            wire.CONNECTED: self._connected,
            wire.CLOSED: self._closed,
            wire.EFFECTS: lambda _host, _item: None,
            wire.BEGUN: lambda _, item: self._forward.begun(item[1]),
            wire.ADMIT: lambda _, item: self._doors.answered(
                item[1], item[2], [tuple(h) for h in item[3]], item[4]
            ),
            wire.CHUNK: lambda _, item: self._forward.chunk(item[1], item[2]),
            wire.FINISH: lambda _, item: self._forward.finish(item[1], item[2]),
            wire.WANT: lambda _, item: self._forward.want(item[1], item[2], item[3]),
            wire.QUERY: self._query,
            wire.CALL: lambda host, item: self.on_call(host, item),  # noqa: PLW0108 - it is set later
            wire.ANSWER: lambda _, item: self.on_answer(item[1], item[2]),
            wire.RETIRE: lambda host, _: self.on_retire(host) if host is not None else None,
            wire.SYNCED: lambda host, item: self._links.synced(host, item[1]) if host is not None else None,
            wire.PAUSED: self._paused,
            wire.QUARANTINE: lambda _, item: self.on_quarantine(item[1], item[2], item[3]),
        }

    # --- Messages ---------------------------------------------------------------------------------

    def carry_out(self, host: HostLink, sequence: int, encoded: bytes | bytearray, items: list[Any]) -> None:
        """Carry out a message of a host: `encoded` is all of it, as `resume` wants it."""
        self._ledger.begin(host.index, sequence, encoded)
        self._items(host, items)
        self._ledger.end()

    def order(self, effects: list[list[Any]]) -> None:
        """Carry out effects that come from no room."""
        items = [[wire.EFFECTS, effects]]
        self._ledger.begin(HOSTS_MAX, 0, dumps([0, 0, items]))
        self._items(None, items)
        self._ledger.end()

    def restore_rules(self, rules: Mapping[str, bytes | None]) -> None:
        """What rooms have set, as a former gateway had it, may not have got to the registry."""
        self._rules.unsaved.update(rules)
        self._lifecycle.batch.auto_responses.update(rules)

    def resume(self, frames: Mapping[tuple[int, int], bytes]) -> None:
        """Finish the message that a former gateway was carrying out, from the step in doubt on. `frames` are
        those that it had compressed, by effect and bits of the window.
        """
        self._in_doubt = doubt = self._ledger.in_doubt
        self._encoded = {bits: frame for (effect, bits), frame in frames.items() if effect == doubt}
        encoded, items_done, steps_done = self._ledger.unfinished()
        if encoded:
            self._items(None, loads(encoded)[2], items_done, steps_done)
            self._ledger.end()
        self._encoded.clear()

    def _items(
        self, host: HostLink | None, items: list[Any], skip_items: int = 0, skip_steps: int = 0
    ) -> None:
        for number, item in enumerate(items, self._ledger.next_item):
            if skip_items:
                skip_items -= 1
                continue
            self._sender.effect = number << STEP_BITS
            try:
                if item[0] == wire.ROW:
                    self._row(host, item, skip_steps)
                else:
                    self._result(host, item, skip_steps)
            except Exception:
                # A fault of ours costs this one result, not those that came with it.
                log.exception("a result could not be carried out", kind=item[0])
            skip_steps = 0

    def _row(self, host: HostLink | None, item: list[Any], skip: int) -> None:
        """A row of a shard's outbox: it may have been here before."""
        _, shard, sequence, encoded = item
        if sequence <= self._ledger.done(shard):
            return
        for result in loads(encoded):
            steps = len(result[-1]) + 1 if result[0] in WITH_EFFECTS else 1
            if skip >= steps:
                skip -= steps
                self._sender.effect += steps
                continue
            try:
                self._result(host, result, skip)
            except Exception:
                log.exception("a result could not be carried out", kind=result[0])
            skip = 0
        self._header[CURSOR] = self._sender.effect = self._sender.effect + 1
        self._ledger.note_done(shard, sequence)

    def _result(self, host: HostLink | None, item: list[Any], skip: int) -> None:
        """Carry out one result: its effects, each of them a step, and as the last step its end."""
        kind = item[0]
        effects = item[-1] if kind in WITH_EFFECTS else NO_EFFECTS
        sender = self._sender
        end = sender.effect + len(effects) + 1
        if skip:
            sender.effect += skip
            effects = effects[skip:]
        try:
            if effects:
                self._execute(effects)
        finally:  # a fault of ours in an effect must not leave the message, and its room, in flight for ever
            self._header[CURSOR] = sender.effect = end
            self._ends[kind](host, item)

    def _execute(self, effects: list[list[Any]]) -> None:
        """Carry out the effects of one turn, in their order."""
        table, sender, header, lifecycle = self._connections, self._sender, self._header, self._lifecycle
        for effect in effects:
            header[CURSOR] = sender.effect = sender.effect + 1
            kind = effect[0]
            if kind == wire.SEND:
                _, slot, number, data = effect
                if table.holds(slot, number) and (
                    (table.phase[slot] <= OPEN and not (lifecycle.reopened and lifecycle.has_ended(slot)))
                    or (table.phase[slot] == ENDING and self._rooms.is_linked(slot))
                ):
                    frame = encode_message(data)
                    if table.compressed:
                        frame = self._compressed(slot, frame)
                    sender.send(slot, frame)
                else:
                    self.missed += 1
            elif kind == wire.BROADCAST:
                self._broadcast(effect)
            elif kind == wire.RESPOND:
                self._forward.respond(effect[1], effect[2], effect[3], effect[4])
            elif kind == wire.AUTO:
                _, key, request, reply, prefix, most = effect
                try:
                    rules = self._rules.change(
                        self._rooms.by_key.get(key), key, request, reply, prefix=prefix, most=most
                    )
                except BrokerError as error:  # the rest of the turn is committed, too
                    log.error("an automatic response cannot be set", room=key, error=str(error))
                else:
                    self._lifecycle.keep_rules(key, rules)
            elif table.holds(effect[1], effect[2]):
                self._change(kind, effect)

    def _change(self, kind: int, effect: list[Any]) -> None:
        slot = effect[1]
        table = self._connections
        if kind == wire.SHUT:
            self._lifecycle.close(slot, effect[3], effect[4], "server_close")
            return
        if table.phase[slot] == CLOSED:
            return
        if kind == wire.STATE:
            self._lifecycle.keep_state(slot, effect[3])
        elif kind == wire.TAGS:
            self._lifecycle.keep_tags(slot, effect[3])

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
        frame = encode_message(data)
        if self._connections.compressed and self._is_worth(room, frame):
            slots = self._broadcast_compressed(slots, frame)
        self._sender.send_to_many(slots, frame)

    # --- Compression (RFC 7692) -------------------------------------------------------------------
    #
    # A frame that was sent in part has to be finished with the bytes that it began with, and what zlib makes
    # of a message is another thing in another version of it. So a compressed frame is in the ledger's log
    # before any of it is sent; and of an effect that is in doubt nothing else is sent compressed.

    def _is_worth(self, room: RoomRecord, frame: bytes) -> bool:
        settings = room.party.settings
        return settings.compression == "deflate" and payload_bytes(frame) >= settings.compression_bytes_min

    def _compressed(self, slot: int, frame: bytes) -> bytes:
        """The frame as it goes to this connection."""
        table = self._connections
        window_bits, room = table.window_bits(slot), table.room[slot]
        assert room is not None
        if not window_bits or not self._is_worth(room, frame):
            return frame
        return self._encode(frame, window_for(payload_bytes(frame), window_bits))

    def _broadcast_compressed(self, slots: list[int], frame: bytes) -> list[int]:
        """Send it to those that have agreed to compression, compressed once for each window; gives the
        others.
        """
        table = self._connections
        size = payload_bytes(frame)
        others: list[int] = []
        groups: dict[int, list[int]] = {}
        for slot in slots:
            window_bits = table.window_bits(slot)
            if window_bits:
                groups.setdefault(window_for(size, window_bits), []).append(slot)
            else:
                others.append(slot)
        for bits, group in groups.items():
            self._sender.send_to_many(group, self._encode(frame, bits))
        return others

    def _encode(self, frame: bytes, bits: int) -> bytes:
        effect = self._sender.effect
        if effect == self._in_doubt:
            return self._encoded.get(bits, frame)
        compressed = encode_compressed(frame, bits)
        self._ledger.add(ENCODED, bits, 0, effect, compressed)
        self._ledger.commit()
        return compressed

    def _paused(self, host: HostLink | None, item: list[Any]) -> None:
        if host is not None:
            host.paused = item[1]

    # What is said before a host is synced, or again after a gateway's death, is of turns that are not in
    # flight.

    def _turned(self, host: HostLink | None, item: list[Any]) -> None:
        _, slot, number, end, _ = item
        self.turns += 1
        table = self._connections
        if not table.holds(slot, number):
            return
        if host is None or not host.synced:
            self._inbox.settle(slot, end)
            return
        self._inbox.acknowledge(slot, end)
        if table.phase[slot] != OPEN or self._lifecycle.reopened:
            self._lifecycle.message_acknowledged(slot)

    def _connected(self, host: HostLink | None, item: list[Any]) -> None:
        _, slot, number, failed, _ = item
        self.turns += 1
        self._lifecycle.connected(slot, number, failed, counted=host is not None and host.synced)

    def _closed(self, host: HostLink | None, item: list[Any]) -> None:
        _, slot, number, _ = item
        self.turns += 1
        self._lifecycle.close_turn_ended(slot, number, counted=host is not None and host.synced)

    # --- Questions about connections --------------------------------------------------------------

    def _query(self, host: HostLink | None, item: list[Any]) -> None:
        _, question, key, what, argument = item
        if host is not None:
            value = self.waits_for(key) if what == "waits for" else self.ask(key, what, argument)
            host.put([wire.REPLY, question, value])

    def ask(self, key: str, what: str, argument: Any) -> Any:
        """Answer a question about a room's open connections, from memory: no socket is touched, no room
        wakes.
        """
        table, rooms = self._connections, self._rooms
        room = rooms.by_key.get(key)
        if what == "more":
            return self._page(argument)
        if what == "answered":
            slot, number = argument
            return (self._ledger.answered[slot] or None) if table.holds(slot, number) else None
        if room is None:
            return {"find": None, "list": [[], b""], "count": 0}[what]
        if what == "find":
            slot = table.find(room, argument)
            if slot is None or not (CONNECTING <= table.phase[slot] < CLOSING and rooms.is_linked(slot)):
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
            if table.number[slot] == number
            and CONNECTING <= table.phase[slot] < CLOSING
            and self._rooms.is_linked(slot)
        ]
        return [rows, rest[cut:]]
