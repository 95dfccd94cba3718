"""Taking over what a former gateway has left: its connections go on in their slots, then what it was doing.

Owns the order of that, and what becomes of each combination of row, socket and slot. Must not read the
ledger's log or ask the kernel itself (`recovery`), nor move a connection on (`lifecycle`). It runs once,
before anything else does.

| row | socket | slot in the ledger | what becomes of it |
| --- | --- | --- | --- |
| yes | yes | open, or closing | goes on |
| yes | yes | row just stored | is let in: the rest of its 101 follows |
| yes | no | any | its close turn: gateway_lost, unless its end was known |
| yes | - | closed | its close turn; the socket, if there still is one, ends |
| yes | - | none | its close turn, once there is a slot |
| no | yes | any | the socket ends: its row was never stored, or is to be forgotten |
| no | no | any | the slot is free |
"""

import socket
from collections.abc import Callable, Iterator

from broker.gateway.connections import CLOSED, INTRODUCED, OPEN, PHASE, WINDOW, Connections
from broker.gateway.effects import Effects
from broker.gateway.inbox import Inbox
from broker.gateway.ledger import HIGH
from broker.gateway.lifecycle import Lifecycle, end_socket
from broker.gateway.outbox import SETTLED, Sender
from broker.gateway.recovery import Remains, cookie
from broker.gateway.rooms import RoomRecord
from hibernation.logs import get_logger
from storage.registry import Row

log = get_logger("gateway")


class Succession:
    """See the module. `room_of` gives the record of a row's room, made if need be."""

    def __init__(
        self,
        connections: Connections,
        inbox: Inbox,
        sender: Sender,
        lifecycle: Lifecycle,
        effects: Effects,
        remains: Remains,
        room_of: Callable[[Row], RoomRecord],
    ) -> None:
        self._connections = connections
        self._ledger = connections.ledger
        self._inbox = inbox
        self._sender = sender
        self._lifecycle = lifecycle
        self._effects = effects
        self._remains = remains
        self._room_of = room_of
        self._rested = False
        self._cut_off = 0

    def take_over(self, rows: list[Row], sockets: dict[int, socket.socket]) -> list[Row]:
        """Do all of it.

        Args:
            rows: What the registry holds.
            sockets: What the keeper holds, by slot; every one of them is used or ended here.

        Returns:
            Rows that have no slot: their clients were cut off.
        """
        table, ledger = self._connections, self._ledger
        self._rested = ledger.wake()
        table.restore()
        effect = ledger.in_doubt
        self._effects.restore_rules(self._remains.rules)
        by_number = {row.number: row for row in rows}
        for number in self._remains.forgotten:
            if by_number.pop(number, None) is not None:
                self._lifecycle.batch.forget(number)
        self._lifecycle.adopt_resting(self._go_through(by_number, sockets, effect), self._room_of)
        if self._cut_off:
            log.error("the sockets of connections were in no other process", connections=self._cut_off)
        for slot in list(sockets):
            self._end(slot, sockets)
        self._inbox.forget_spills()
        self._effects.resume(self._remains.encoded)
        for slot in self._sender.settle():
            log.error("a torn frame could not be mended", number=table.number[slot])
            self._lifecycle.torn += 1
            self._lifecycle.violated(slot, 1011, "")
        self._lifecycle.let_in()
        return list(by_number.values())

    def _go_through(
        self, by_number: dict[int, Row], sockets: dict[int, socket.socket], effect: int
    ) -> Iterator[tuple[int, socket.socket, Row]]:
        """Go on with every slot, in their order; give those of which nothing is to be found out (G7). What
        has a slot is taken out of both dictionaries.
        """
        numbers, phases, logged = self._ledger.number, self._ledger.phase, self._remains.numbers
        for slot in range(self._ledger.header[HIGH]):
            number = numbers[slot]
            if not number:
                continue
            row = by_number.pop(number, None)
            if (
                self._rested
                and row is not None
                and slot in sockets
                and phases[slot] & ~WINDOW == OPEN | INTRODUCED
                and number not in logged
            ):
                yield slot, sockets.pop(slot), row
            else:
                self._slot(slot, row, sockets, effect)

    def _slot(self, slot: int, row: Row | None, sockets: dict[int, socket.socket], effect: int) -> None:
        """Go on with one slot; `effect` is the one in doubt, or 0."""
        ledger = self._ledger
        sock = sockets.get(slot)
        if sock is not None and cookie(sock) != ledger.cookie[slot]:
            # The connection that had the slot before: the one that has it now did not get as far as the
            # keeper.
            self._end(slot, sockets)
            sock = None
        if row is None:
            self._connections.abandon(slot)
        elif sock is None or ledger.phase[slot] & PHASE == CLOSED or self._remains.has_closed(row.number):
            self._cut_off += sock is None and ledger.phase[slot] & PHASE != CLOSED
            self._lifecycle.survived(row, self._room_of(row), self._remains, slot)
        else:
            del sockets[slot]
            self._lifecycle.adopt(slot, sock, self._remains, row, self._room_of(row))
            if effect:
                self._doubt(slot, row.number, effect)

    def _end(self, slot: int, sockets: dict[int, socket.socket]) -> None:
        """Nobody knows this socket any more, or its connection has ended."""
        end_socket(sockets.pop(slot))
        self._lifecycle.on_ended(slot)

    def _doubt(self, slot: int, number: int, effect: int) -> None:
        """Whether the effect in doubt has reached this connection, and how far."""
        ledger = self._ledger
        if self._remains.effects.get(number) == effect:
            self._sender.doubt(slot, SETTLED)  # its frame is in the outbox, or was dropped
        elif ledger.mark[slot] == effect:
            self._sender.doubt(slot, self._connections.written[slot] - ledger.before[slot])
