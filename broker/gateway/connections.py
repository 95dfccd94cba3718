"""The parked connections: one row of columns each, no object graph.

Owns the columns, the free slots, and the two ways to find a connection: by descriptor, and by room and id.
Must not read or write a socket. Peers: `inbox` and `outbox` move bytes, `rooms` links the rows of one room
into a list.

Columns that a successor needs when this process has died lie in the ledger; the others in plain arrays. A
connection costs, beside its socket object and its card, 8 bytes in each pointer and counter column and less
in the others; everything that only a few connections have at a time (a request in a handshake, a reader of
fragments, an outbox, a state) lives in dictionaries of the module that needs it.

Invariants:
    C1  `number[slot]` is never used twice; 0 means that the slot is free
    C2  `consumed[slot] <= parsed[slot]`: what lies between is dispatched or answered, and still in the kernel
    C3  bytes before `consumed[slot]` belong to turns that were acknowledged (or to control frames, or to a
        spill file)
    C4  a slot that is FREE or CLOSED is in no room's list and in no index
"""

from array import array
from socket import socket
from typing import TYPE_CHECKING, Final

from broker.gateway.ledger import ANSWERS, HIGH, NUMBER, Ledger

if TYPE_CHECKING:
    from broker.gateway.rooms import RoomRecord

# Phases of a connection's life. Before the 101:
FREE: Final = 0
ADMITTING: Final = 1  # the before-hook, or a probe of the connection with the same id, is under way
STORING: Final = 2  # its row is on the way to disk
# After it:
CONNECTING: Final = 3  # its connect turn has not ended; frames wait in the kernel
OPEN: Final = 4
ENDING: Final = 5  # nothing more is read; turns of what was read have not all been acknowledged
CLOSING: Final = 6  # our Close is out; the client's is awaited, what comes before it is thrown away
CLOSED: Final = 7  # the socket has gone; the close turn has not been acknowledged

# Flags.
DEFERRED: Final = (
    1  # there may be unread data that was left for later: look again when something is acknowledged
)
READER: Final = 2  # a reader of fragments or a spill file exists: no fast path
PINGED: Final = 4  # a ping is out and nothing has come since
GONE: Final = 8  # the peer has ended its side: an end follows what is still unread
PARTIAL: Final = 16  # a part of a frame or message is left in the kernel behind what was dispatched

#: Set in the ledger's phase beside the phase itself: the connect turn has ended, or there is none.
INTRODUCED: Final = 0x80

#: Bits of the ledger's phase: the phase itself; and for a client that has agreed to compression (RFC 7692)
#: the size of the window that it lets us use, in bits above 8. So what was agreed on outlives the gateway.
PHASE: Final = 0x07
WINDOW: Final = 0x38
WINDOW_SHIFT: Final = 3

#: Slots of a table that is given no ledger.
CAPACITY: Final = 4096

#: No neighbour in the room's list, no connection of this descriptor.
NONE: Final = 0xFFFFFFFF


class Connections:
    """See the module. Columns are public: the hot path indexes them directly."""

    __slots__ = (
        "_by_descriptor",
        "_free",
        "_index",
        "_index_mask",
        "_index_used",
        "address",
        "card",
        "compressed",
        "consumed",
        "count",
        "flags",
        "last_end",
        "ledger",
        "next",
        "number",
        "parsed",
        "phase",
        "previous",
        "room",
        "seen",
        "sockets",
        "written",
    )

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = ledger = ledger or Ledger.create(CAPACITY)
        self.sockets: list[socket | None] = []
        self.card: list[bytes] = []
        self.room: list[RoomRecord | None] = []
        self.number = ledger.number
        #: Offsets in the byte stream after the handshake.
        self.consumed = ledger.consumed
        self.parsed = array("Q")
        #: End of the newest message that was dispatched.
        self.last_end = array("Q")
        #: Bytes that the kernel has taken of what was sent, from the beginning of the TCP connection on.
        self.written = array("Q")
        #: Where it comes from, as a number of `addresses.Addresses`.
        self.address = array("I")
        #: When a byte last came, in whole seconds of the gateway's clock.
        self.seen = array("I")
        self.next = array("I")
        self.previous = array("I")
        self.phase = bytearray()  # `set_phase` keeps the ledger's the same
        self.flags = bytearray()
        self.count = 0
        #: Connections that have agreed to compression.
        self.compressed = 0
        self._free: array[int] = array("I")
        self._by_descriptor = array("I")
        self._index = array("I", [NONE]) * 64
        self._index_mask = 63
        self._index_used = 0

    def __len__(self) -> int:
        """How many rows the columns have, free ones included."""
        return len(self.phase)

    @property
    def is_full(self) -> bool:
        """Whether the ledger has no slot left."""
        return not self._free and len(self.phase) == self.ledger.capacity

    def set_phase(self, slot: int, phase: int) -> None:
        """Move a connection on."""
        self.phase[slot] = phase
        column = self.ledger.phase
        column[slot] = column[slot] & ~PHASE | phase

    def agree(self, slot: int, window_bits: int) -> None:
        """Compression is agreed on, with a window of 9 to 15 bits for what we send."""
        self.ledger.phase[slot] |= window_bits - 8 << WINDOW_SHIFT
        self.compressed += 1

    def window_bits(self, slot: int) -> int:
        """The window for what we send to this connection; 0: nothing is compressed, in either direction."""
        window = self.ledger.phase[slot] & WINDOW
        return 8 + (window >> WINDOW_SHIFT) if window else 0

    def allocate(self, number: int, sock: socket | None, room: "RoomRecord", card: bytes, now: int) -> int:
        """Take a slot for a new connection, in phase ADMITTING."""
        if self._free:
            slot = self._free.pop()
            self.sockets[slot] = sock
            self.card[slot] = card
            self.room[slot] = room
            self.parsed[slot] = self.last_end[slot] = self.written[slot] = 0
            self.address[slot] = 0
            self.seen[slot] = now
            self.next[slot] = self.previous[slot] = NONE
            self.phase[slot] = ADMITTING
            self.flags[slot] = 0
        else:
            slot = len(self.phase)
            self.sockets.append(sock)
            self.card.append(card)
            self.room.append(room)
            self.parsed.append(0)
            self.last_end.append(0)
            self.written.append(0)
            self.address.append(0)
            self.seen.append(now)
            self.next.append(NONE)
            self.previous.append(NONE)
            self.phase.append(ADMITTING)
            self.flags.append(0)
            self.ledger.header[HIGH] = slot + 1
        ledger = self.ledger
        ledger.consumed[slot] = ledger.base[slot] = ledger.cookie[slot] = ledger.mark[slot] = 0
        if ledger.header[ANSWERS]:
            ledger.answered[slot] = 0
        ledger.phase[slot] = ADMITTING
        ledger.number[slot] = number
        ledger.header[NUMBER] = max(ledger.header[NUMBER], number)
        self.count += 1
        room.held += 1
        return slot

    def restore(self) -> None:
        """Make as many slots as a former gateway had in use, all of them free until they are taken over."""
        count = self.ledger.header[HIGH]
        self.sockets = [None] * count
        self.card = [b""] * count
        self.room = [None] * count
        for name in ("parsed", "last_end", "written"):
            setattr(self, name, array("Q", bytes(8 * count)))
        for name in ("address", "seen"):
            setattr(self, name, array("I", bytes(4 * count)))
        self.next = array("I", [NONE]) * count
        self.previous = array("I", [NONE]) * count
        self.phase = bytearray(count)
        self.flags = bytearray(count)
        self._free.extend([slot for slot in range(count) if not self.number[slot]])
        size = 64
        while 2 * size <= 3 * count:
            size *= 2
        self._index = array("I", [NONE]) * size
        self._index_mask = size - 1

    def take_over(self, slot: int, sock: socket | None, room: "RoomRecord", card: bytes, now: int) -> None:
        """A connection of a former gateway goes on in its slot; its ledger columns stay as they are."""
        self.sockets[slot] = sock
        self.card[slot] = card
        self.room[slot] = room
        self.seen[slot] = now
        self.phase[slot] = ADMITTING
        self.count += 1
        self.compressed += self.ledger.phase[slot] & WINDOW != 0
        room.held += 1
        if sock is not None:
            self.watch(sock.fileno(), slot)

    def abandon(self, slot: int) -> None:
        """A slot of a former gateway that nothing goes on in."""
        self.number[slot] = 0
        self.ledger.phase[slot] = FREE
        self._free.append(slot)

    def release(self, slot: int) -> None:
        """Give the slot back; the socket must be closed, the row unlinked."""
        room = self.room[slot]
        assert room is not None
        room.held -= 1
        self.sockets[slot] = None
        self.card[slot] = b""
        self.room[slot] = None
        self.number[slot] = 0
        self.compressed -= self.ledger.phase[slot] & WINDOW != 0
        self.ledger.phase[slot] = self.phase[slot] = FREE
        self.flags[slot] = 0
        self.count -= 1
        self._free.append(slot)

    def watch(self, descriptor: int, slot: int) -> None:
        """Remember which connection a descriptor belongs to."""
        table = self._by_descriptor
        if descriptor >= len(table):
            table.extend([NONE] * (descriptor + 1 - len(table) + len(table) // 8))
        table[descriptor] = slot

    def unwatch(self, descriptor: int) -> None:
        """The descriptor belongs to no connection any more."""
        self._by_descriptor[descriptor] = NONE

    def by_descriptor(self, descriptor: int) -> int:
        """The slot of a descriptor, or NONE."""
        table = self._by_descriptor
        return table[descriptor] if descriptor < len(table) else NONE

    def holds(self, slot: int, number: int) -> bool:
        """Whether the slot still holds the connection with this number."""
        return slot < len(self.phase) and self.number[slot] == number

    # The index by room and id is a hash table in one array: 4 bytes an entry where a dict takes 100. A
    # deleted entry leaves no mark: the run behind it moves up (Knuth, volume 3, 6.4, algorithm R).

    def index(self, slot: int, connection_id: str) -> None:
        """Make the connection findable by room and id."""
        table = self._index
        if 3 * self._index_used >= 2 * len(table):
            self._grow()
            table = self._index
        mask = self._index_mask
        position = hash((id(self.room[slot]), connection_id)) & mask
        while table[position] != NONE:
            position = (position + 1) & mask
        table[position] = slot
        self._index_used += 1

    def find(self, room: "RoomRecord", connection_id: str) -> int | None:
        """The slot of the room's connection with this id."""
        table, mask = self._index, self._index_mask
        start = connection_id.encode() + b"\xfe"
        position = hash((id(room), connection_id)) & mask
        while (slot := table[position]) != NONE:
            if self.room[slot] is room and self.card[slot].startswith(start):
                return slot
            position = (position + 1) & mask
        return None

    def unindex(self, slot: int) -> None:
        """Take the connection out of the index; nothing happens if it is not in it."""
        table, mask = self._index, self._index_mask
        position = self._home(slot)
        while table[position] != slot:
            if table[position] == NONE:
                return
            position = (position + 1) & mask
        self._index_used -= 1
        hole = position
        while True:
            position = (position + 1) & mask
            follower = table[position]
            if follower == NONE:
                break
            home = self._home(follower)
            # The follower may fill the hole unless its home lies cyclically behind the hole.
            if (position - home) & mask >= (position - hole) & mask:
                table[hole] = follower
                hole = position
        table[hole] = NONE

    def _home(self, slot: int) -> int:
        connection_id, _, _ = self.card[slot].partition(b"\xfe")
        return hash((id(self.room[slot]), connection_id.decode())) & self._index_mask

    def _grow(self) -> None:
        old = self._index
        self._index = table = array("I", [NONE]) * (2 * len(old))
        self._index_mask = mask = len(table) - 1
        for slot in old:
            if slot != NONE:
                position = self._home(slot)
                while table[position] != NONE:
                    position = (position + 1) & mask
                table[position] = slot
