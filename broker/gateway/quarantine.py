"""Rooms that do not start, as their hosts have said (S4): nobody new is let in to them.

Owns the list, by room. Decides nothing: a host puts a room in and takes it out, and another host of its
shard begins with none. Peers: `effects`, which hears of it, `doors` and `forward`, which ask.
"""

from dataclasses import dataclass

__all__ = ["RETRY_AFTER", "Quarantine", "QuarantinedRoom"]

RETRY_AFTER = (("retry-after", "30"),)
"""For those who are turned away: somebody has to do something before it gets better."""


@dataclass(frozen=True, slots=True)
class QuarantinedRoom:
    """Why, and since when, in seconds since 1970; and the shard of the room."""

    reason: str
    since: float
    shard: int


class Quarantine:
    """See the module. Empty, it is false."""

    __slots__ = ("_rooms",)

    def __init__(self) -> None:
        self._rooms: dict[str, QuarantinedRoom] = {}

    def __bool__(self) -> bool:
        return bool(self._rooms)

    def __len__(self) -> int:
        return len(self._rooms)

    def __contains__(self, key: str) -> bool:
        return key in self._rooms

    def get(self, key: str) -> QuarantinedRoom | None:
        """What is known of this room, None if it is not in quarantine."""
        return self._rooms.get(key)

    def put(self, key: str, reason: str | None, since: float, shard: int) -> None:
        """A host has said that a room does not start; with no reason: that it is tried again."""
        if reason is None:
            self._rooms.pop(key, None)
        else:
            self._rooms[key] = QuarantinedRoom(reason, since, shard)

    def forget(self, shards: list[int]) -> None:
        """Another host has these shards, and says what it knows."""
        for key in [key for key, room in self._rooms.items() if room.shard in shards]:
            del self._rooms[key]
