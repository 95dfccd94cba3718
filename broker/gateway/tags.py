"""Who has which tag, in one room: so that a filter costs what it finds, not what the room holds (S12).

Owns one set of slots for each tag that a member has. Pure; `rooms` makes one for a room that is asked for
tags and has more members than are scanned as fast, keeps it true, and drops it when the room has become
small.

Cost: some 40 to 70 bytes for each tag of each member, in those rooms alone.
"""

from collections.abc import Iterable

from hibernation.wire import card_tags


class TagIndex:
    """Slots by tag; tags are UTF-8, as they stand in cards."""

    __slots__ = ("_slots",)

    def __init__(self, members: Iterable[tuple[int, bytes]]) -> None:
        self._slots: dict[bytes, set[int]] = {}
        for slot, card in members:
            self.add(slot, card)

    def add(self, slot: int, card: bytes) -> None:
        """A member has this card now."""
        slots = self._slots
        for tag in card_tags(card):
            if tag in slots:
                slots[tag].add(slot)
            else:
                slots[tag] = {slot}

    def remove(self, slot: int, card: bytes) -> None:
        """A member had this card, and has left or has another."""
        slots = self._slots
        for tag in card_tags(card):
            bearers = slots[tag]
            bearers.discard(slot)
            if not bearers:
                del slots[tag]

    def candidates(self, all_of: Iterable[str], any_of: Iterable[str]) -> set[int]:
        """The fewest slots that hold every match of the positive part of a filter, one list of which must
        not be empty: those of its rarest required tag, or else all that have one of the wanted ones.
        """
        slots, none = self._slots, set[int]()
        required = [slots.get(tag.encode(), none) for tag in all_of]
        if required:
            return min(required, key=len)
        return none.union(*[slots.get(tag.encode(), none) for tag in any_of])
