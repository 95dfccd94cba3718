"""What a keeper holds, what each message does to it, and what a taker is sent next. Pure.

Owns the table, and how far each session and its take have got. Knows descriptors as numbers: gives those that
are to be closed, and closes none. Must do no I/O, and import nothing heavy. Its peer is `hibernation.keeper`,
which moves the messages.
"""

from array import array
from collections.abc import Iterable

from hibernation.keeper_messages import (
    BATCH_MAX,
    COMING,
    COUNTS,
    DONE,
    DROP,
    NAMED,
    NAMES_MAX,
    PIN,
    PUT,
    SLOTS,
    TAKE,
    TOOK,
    UNPIN,
    Malformed,
    Message,
)

__all__ = ["Progress", "Table", "Take"]

WAY_BATCHES_MAX = 4
"""Batches that one taker has not acknowledged: few descriptors in flight, and no waiting for each."""


class Take:
    """How far one TAKE has got."""

    __slots__ = ("named", "names", "next_slot", "sent", "slots", "taken")

    def __init__(self, names: list[str], next_slot: int | None) -> None:
        self.names = names
        """Those still to be sent."""
        self.next_slot = next_slot
        """Slots from here on are still to be sent; None when this take is not about slots."""
        self.sent = 0
        """Batches sent, COMING among them."""
        self.taken = 0
        """Batches acknowledged."""
        self.named = 0
        """Named descriptors sent."""
        self.slots = 0
        """Slots sent."""

    def advance(self, message: Message) -> None:
        """Note that the message which `Table.offer` gave has been sent."""
        self.sent += 1
        if message.kind == NAMED:
            self.names = []
            self.named = message.count
        elif message.kind == SLOTS:
            self.next_slot = message.slots()[-1] + 1
            self.slots += message.count


class Progress:
    """How far one session has got."""

    __slots__ = ("received", "take")

    def __init__(self) -> None:
        self.received = 0
        """Number of its last message."""
        self.take: Take | None = None
        """The one under way."""

    def count(self, number: int) -> None:
        """Count a message; raises Malformed unless its number is next."""
        if number != self.received + 1:
            raise Malformed(f"message {number} came where {self.received + 1} was next")
        self.received = number


class Table:
    """What is held, under which slot or name."""

    def __init__(self) -> None:
        self._slots: array[int] = array("i")
        self.named: dict[str, int] = {}
        self.slot_count = 0
        """Slots that hold something."""

    def __len__(self) -> int:
        return self.slot_count + len(self.named)

    def counts(self) -> bytes:
        """Give the counts of what is held, as messages have them."""
        return COUNTS.pack(len(self.named), self.slot_count)

    def carry_out(self, progress: Progress, message: Message) -> list[int]:
        """Do what a message of a session says, and give the descriptors that nothing holds any more.

        Raises Malformed with nothing changed; the message's descriptors are then still its receiver's.
        """
        kind, count = message.kind, len(message.fds)
        expected = {PUT: message.count, PIN: 1}.get(kind, 0)
        if count != expected:
            raise Malformed(f"{count} descriptors came with a message that has {expected}")
        take = progress.take
        if kind == TOOK:
            if take is None or not take.taken <= message.number < take.sent:
                raise Malformed(f"batch {message.number} was acknowledged, and is not on its way")
            take.taken = message.number + 1
            return []
        if take is not None:
            raise Malformed(f"kind {kind} came while a take is under way")
        if kind in (PUT, DROP):
            slots = message.slots()
            progress.count(message.number)
            if kind == DROP:
                return _held(self._set(slot, -1) for slot in slots)
            return _held(self._set(slot, fd) for slot, fd in zip(slots, message.fds, strict=True))
        if kind not in (PIN, UNPIN, TAKE):
            raise Malformed(f"kind {kind} is unknown to this keeper")
        name = message.name() if message.body or kind != TAKE else ""
        if kind == PIN and name not in self.named and len(self.named) >= NAMES_MAX:
            raise Malformed(f"{NAMES_MAX} names are held already; unpin one")
        progress.count(message.number)
        if kind == TAKE:
            names = [each for each in self.named if name in ("", each)]
            progress.take = Take(names, None if name else 0)
            return []
        former = self.named.pop(name, -1)
        if kind == PIN:
            self.named[name] = message.fds[0]
        return _held([former])

    def offer(self, take: Take) -> Message | None:
        """Give the message that a take sends next; None while it has to wait for its taker.

        After it has been sent: `Take.advance`; but DONE ends the take.
        """
        if take.sent == 0:
            slot_count = 0 if take.next_slot is None else self.slot_count
            return Message(COMING, 0, body=COUNTS.pack(len(take.names), slot_count))
        if take.taken == 0 or take.sent - take.taken >= WAY_BATCHES_MAX:
            return None
        # What was ended since the take began is not sent, and what came since may be: DONE has the counts.
        names = [name for name in take.names if name in self.named]
        if names:
            fds = array("i", [self.named[name] for name in names])
            return Message(NAMED, take.sent, len(names), "\0".join(names).encode(), fds)
        slots, fds = self._slots_from(take.next_slot)
        if slots:
            return Message(SLOTS, take.sent, len(slots), slots.tobytes(), fds)
        if take.taken == take.sent:
            return Message(DONE, take.sent, body=COUNTS.pack(take.named, take.slots))
        return None

    def _set(self, slot: int, fd: int) -> int:
        """Hold `fd` under the slot, nothing when it is -1, and give what was held there or -1."""
        if slot >= len(self._slots):
            if fd < 0:
                return -1
            self._slots.extend(array("i", [-1]) * (slot + 1 - len(self._slots)))
        former = self._slots[slot]
        self._slots[slot] = fd
        self.slot_count += (fd >= 0) - (former >= 0)
        return former

    def _slots_from(self, start: int | None) -> "tuple[array[int], array[int]]":
        """Give the first slots from `start` on that hold something, a batch of them, and what they hold."""
        slots: array[int] = array("i")
        fds: array[int] = array("i")
        for slot in range(len(self._slots) if start is None else start, len(self._slots)):
            if self._slots[slot] >= 0:
                slots.append(slot)
                fds.append(self._slots[slot])
                if len(slots) == BATCH_MAX:
                    break
        return slots, fds


def _held(formers: Iterable[int]) -> list[int]:
    return [fd for fd in formers if fd >= 0]
