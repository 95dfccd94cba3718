"""The rooms that have connections here, as the gateway sees them: members, filters, and what is in flight.

Owns the list of each room's members (linked through two columns of `Connections`, in the order of acceptance)
and the answers to questions by tag and id. Must not do I/O. Peers: `connections` for the columns,
`hibernation.wire` for cards.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from broker.gateway.connections import NONE, Connections
from broker.gateway.tags import TagIndex
from hibernation.auto_responses import Rule
from hibernation.wire import retag_card, tag_mark

if TYPE_CHECKING:
    from broker.gateway.answers import Answers, RoomRules
    from broker.gateway.parties import PartyView

#: Members up to which a filter scans them all, instead of keeping an index of their tags.
SCANNED_MAX: Final = 64

#: A filter: tags that must all be there, tags of which one must be, tags that must not. Empty lists filter
#: nothing.
Criteria = list[list[str]]


class RoomRecord:
    """One room with connections, or with events on their way."""

    __slots__ = (
        "answers",
        "arriving",
        "count",
        "first",
        "held",
        "inflight_bytes",
        "inflight_events",
        "key",
        "last",
        "own_answers",
        "party",
        "shard",
        "shares",
        "waiting",
    )

    def __init__(self, key: str, party: "PartyView", shard: int) -> None:
        self.key = key
        self.party = party
        self.shard = shard
        #: What is answered without it (S16), None mostly; and of that what the room itself has set, None as
        #: long as nobody has looked.
        self.answers: Answers | None = party.answers
        self.own_answers: Sequence[Rule] | None = None
        self.first = NONE
        self.last = NONE
        self.count = 0
        #: Newcomers that are not members yet: they count against the room's limit (S37).
        self.arriving = 0
        #: Slots that refer to this record: members, and those that are coming or going.
        self.held = 0
        #: Events given to the host and not acknowledged, and the bytes of their frames (S24).
        self.inflight_events = 0
        self.inflight_bytes = 0
        #: By slot: events in flight, in a room whose turns may overlap; there one connection's must not take
        #: all the room that there is.
        self.shares: dict[int, int] | None = None
        #: Slots that have data which had to wait for either; None mostly.
        self.waiting: deque[int] | None = None

    @property
    def is_full(self) -> bool:
        """Whether as many of its events are in flight as may be, or as many bytes (S24)."""
        party = self.party
        return (
            self.inflight_events >= party.inflight_events_max
            or self.inflight_bytes >= party.inflight_bytes_max
        )

    def wait(self, slot: int) -> None:
        """Remember that this connection has data which must wait for an acknowledgement."""
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append(slot)


class Rooms:
    """All of them, by key."""

    __slots__ = ("_by_tag", "_connections", "_rules", "_scanned_max", "by_key")

    def __init__(
        self, connections: Connections, scanned_max: int = SCANNED_MAX, rules: "RoomRules | None" = None
    ) -> None:
        self._connections = connections
        self._rules = rules
        self._scanned_max = scanned_max
        self.by_key: dict[str, RoomRecord] = {}
        #: Of rooms with more than `scanned_max` members, from the first question about tags on.
        self._by_tag: dict[RoomRecord, TagIndex] = {}

    def record(self, key: str, party: "PartyView", shard: int) -> RoomRecord:
        """The record of a room, made if need be."""
        room = self.by_key.get(key)
        if room is None:
            room = self.by_key[key] = RoomRecord(key, party, shard)
            if self._rules is not None:
                self._rules.apply(room)
        return room

    def know(self, parties: "Mapping[str, PartyView]") -> None:
        """These are the parties now."""
        for room in self.by_key.values():
            room.party = parties.get(room.party.name) or room.party.without_hooks()
            if self._rules is not None:
                self._rules.apply(room)
            else:
                room.answers = room.party.answers

    def link(self, slot: int) -> None:
        """Append a connection to its room's members."""
        table = self._connections
        room = table.room[slot]
        assert room is not None
        last = room.last
        table.previous[slot] = last
        table.next[slot] = NONE
        if last == NONE:
            room.first = slot
        else:
            table.next[last] = slot
        room.last = slot
        room.count += 1
        if room in self._by_tag:
            self._by_tag[room].add(slot, table.card[slot])

    def is_linked(self, slot: int) -> bool:
        """Whether the connection is among its room's members."""
        table = self._connections
        room = table.room[slot]
        return room is not None and (table.next[slot] != table.previous[slot] or room.first == slot)

    def unlink(self, slot: int) -> None:
        """Take a connection out of its room's members, if it is among them."""
        if not self.is_linked(slot):
            return
        table = self._connections
        room = table.room[slot]
        assert room is not None
        before, after = table.previous[slot], table.next[slot]
        if before == NONE:
            room.first = after
        else:
            table.next[before] = after
        if after == NONE:
            room.last = before
        else:
            table.previous[after] = before
        table.previous[slot] = table.next[slot] = NONE
        room.count -= 1
        if room in self._by_tag:
            if room.count > self._scanned_max:
                self._by_tag[room].remove(slot, table.card[slot])
            else:
                del self._by_tag[room]

    def retag(self, slot: int, blob: bytes) -> None:
        """Give a connection other tags: a blob of `wire.tags_blob`."""
        table = self._connections
        room = table.room[slot]
        assert room is not None
        card = retag_card(table.card[slot], blob)
        if room in self._by_tag and self.is_linked(slot):
            self._by_tag[room].remove(slot, table.card[slot])
            self._by_tag[room].add(slot, card)
        table.card[slot] = card

    def forget_if_empty(self, room: RoomRecord) -> None:
        """Drop the record of a room that has neither connections, in whatever phase, nor events in flight."""
        if not room.held and not room.inflight_events and not room.waiting:
            self.by_key.pop(room.key, None)

    def members(self, room: RoomRecord) -> Iterator[int]:
        """Slots in the order of acceptance. The list must not change meanwhile."""
        after = self._connections.next
        slot = room.first
        while slot != NONE:
            yield slot
            slot = after[slot]

    def select(self, room: RoomRecord, criteria: Criteria) -> list[int]:
        """Slots of the members that match, in the order of acceptance, as of now.

        A few members are scanned; of many, with a tag that must be there, only the bearers are looked at.
        """
        all_of, any_of, none_of = criteria
        table = self._connections
        cards = table.card
        if room.count > self._scanned_max and (all_of or any_of):
            index = self._by_tag.get(room)
            if index is None:
                index = self._by_tag[room] = TagIndex((slot, cards[slot]) for slot in self.members(room))
            found = sorted(index.candidates(all_of, any_of), key=table.number.__getitem__)
        else:
            found = list(self.members(room))
        for tag in all_of:
            mark = tag_mark(tag)
            found = [slot for slot in found if mark in cards[slot]]
        if any_of:
            marks = [tag_mark(tag) for tag in any_of]
            found = [slot for slot in found if any(mark in cards[slot] for mark in marks)]
        for tag in none_of:
            mark = tag_mark(tag)
            found = [slot for slot in found if mark not in cards[slot]]
        return found

    def row(self, slot: int, state: bytes | None) -> list[Any]:
        """A member as a host gets it: slot, number, card, state."""
        return [slot, self._connections.number[slot], self._connections.card[slot], state]
