"""The keeper, in memory: it holds duplicates of the gateway's sockets while gateways come and go.

Owns what is held, and a session as `hibernation.keeping` has it, in which everything is acknowledged at once.
Its peer is `broker.gateway.duplicates`, which does not know the difference.
"""

import os
from collections.abc import Sequence

from hibernation.keeping import KeeperClient, Kept

__all__ = ["Keeper"]


class Keeper:
    """What outlives gateways: sockets by slot, other descriptors by name."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.named: dict[str, int] = {}

    def take(self) -> Kept:
        """Duplicates of everything."""
        kept = Kept()
        for slot, descriptor in self.slots.items():
            kept.slots.append(slot)
            kept.fds.append(os.dup(descriptor))
        kept.named.update({name: os.dup(descriptor) for name, descriptor in self.named.items()})
        return kept

    def hold(self, slot: int, descriptor: int) -> None:
        """Hold a duplicate, in the place of what was there."""
        self.drop(slot)
        self.slots[slot] = os.dup(descriptor)

    def drop(self, slot: int) -> None:
        """Close what is held there."""
        held = self.slots.pop(slot, None)
        if held is not None:
            os.close(held)

    def name(self, name: str, descriptor: int) -> None:
        """Hold this descriptor itself under a name."""
        former = self.named.pop(name, None)
        if former is not None:
            os.close(former)
        self.named[name] = descriptor

    def close(self) -> None:
        """Close everything."""
        for descriptor in (*self.slots.values(), *self.named.values()):
            os.close(descriptor)
        self.slots.clear()
        self.named.clear()


class Session(KeeperClient):
    """A gateway's session with the keeper above."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.sent = 0
        self.acknowledged = 0

    @property
    def fd(self) -> int:
        """Readable when something has been acknowledged."""
        return self._events

    @property
    def wants_write(self) -> bool:
        """Nothing ever waits."""
        return False

    def put(self, slots: Sequence[int], fds: Sequence[int]) -> int:
        """Hold duplicates."""
        for slot, descriptor in zip(slots, fds, strict=True):
            self._keeper.hold(slot, descriptor)
        return self._said()

    def drop(self, slots: Sequence[int]) -> int:
        """Close what is held."""
        for slot in slots:
            self._keeper.drop(slot)
        return self._said()

    def pin(self, name: str, fd: int) -> int:
        """Hold a duplicate under a name."""
        self._keeper.name(name, os.dup(fd))
        return self._said()

    def _said(self) -> int:
        self.sent += 1
        os.eventfd_write(self._events, 1)
        return self.sent

    def flush(self) -> bool:
        """Nothing ever waits."""
        return True

    def receive(self) -> None:
        """Take the acknowledgement of everything."""
        try:
            os.eventfd_read(self._events)
        except BlockingIOError:
            return
        self.acknowledged = self.sent

    def close(self) -> None:
        """End the session."""
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
