"""Rooms as the gateway sees them: which connections refer to a record, and how long it is kept."""

from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from broker.gateway.connections import Connections
from broker.gateway.ledger import Ledger
from broker.gateway.rooms import SCANNED_MAX, RoomRecord, Rooms
from hibernation import wire


def record(key: str) -> RoomRecord:
    party: Any = SimpleNamespace(answers=None)
    return RoomRecord(key, party, 0)


def test_a_newcomer_keeps_the_record_of_its_room() -> None:
    """A connection whose row is being written is no member yet, and must find its room when it is one."""
    table = Connections()
    rooms = Rooms(table)
    room = rooms.by_key["main/x"] = record("main/x")
    member = table.allocate(1, None, room, b"a\xfeu\xfe", 0)
    rooms.link(member)
    newcomer = table.allocate(2, None, room, b"b\xfeu\xfe", 0)
    rooms.unlink(member)
    table.release(member)
    rooms.forget_if_empty(room)
    assert rooms.by_key == {"main/x": room}
    rooms.link(newcomer)
    assert list(rooms.members(rooms.by_key["main/x"])) == [newcomer]
    rooms.unlink(newcomer)
    table.release(newcomer)
    rooms.forget_if_empty(room)
    assert not rooms.by_key


TAGS = ["a", "b", "ab", "é", "a b"]
SOME_TAGS = st.lists(st.sampled_from(TAGS), max_size=3, unique=True)


class Members(RuleBasedStateMachine):
    """Lists of members and filters of two rooms, against plain lists. These rooms are small and scanned."""

    slots = Bundle("slots")
    scanned_max = SCANNED_MAX

    def __init__(self) -> None:
        super().__init__()
        self.table = Connections()
        self.rooms = Rooms(self.table, self.scanned_max)
        self.records = [record("main/x"), record("main/y")]
        self.members: list[list[int]] = [[], []]
        self.tags: dict[int, list[str]] = {}
        self.number = 0

    @rule(target=slots, room=st.integers(0, 1), tags=SOME_TAGS)
    def come(self, room, tags):
        self.number += 1
        card = wire.make_card(f"id-{self.number}", "ws://a/b", wire.tags_blob(tags))
        slot = self.table.allocate(self.number, None, self.records[room], card, 0)
        self.rooms.link(slot)
        self.members[room].append(slot)
        self.tags[slot] = tags
        return slot

    @rule(slot=slots, tags=SOME_TAGS)
    def retag(self, slot, tags):
        if slot in self.tags:
            self.rooms.retag(slot, wire.tags_blob(tags))
            self.tags[slot] = tags

    @rule(slot=slots)
    def unlink(self, slot):
        """Once or twice: what has left already is passed over."""
        self.rooms.unlink(slot)
        for members in self.members:
            if slot in members:
                members.remove(slot)

    @rule(slot=consumes(slots))
    def go(self, slot):
        self.unlink(slot)
        self.table.release(slot)
        del self.tags[slot]

    @rule(all_of=SOME_TAGS, any_of=SOME_TAGS, none_of=SOME_TAGS)
    def select(self, all_of, any_of, none_of):
        for room, members in zip(self.records, self.members, strict=True):
            expected = [
                slot
                for slot in members
                if set(all_of) <= set(self.tags[slot])
                and (not any_of or set(any_of) & set(self.tags[slot]))
                and not set(none_of) & set(self.tags[slot])
            ]
            assert self.rooms.select(room, [all_of, any_of, none_of]) == expected

    @invariant()
    def in_the_order_of_acceptance(self):
        for room, members in zip(self.records, self.members, strict=True):
            assert list(self.rooms.members(room)) == members
            assert room.count == len(members)
        for slot in self.tags:
            assert self.rooms.is_linked(slot) == any(slot in members for members in self.members)


Members.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_members = Members.TestCase


class IndexedMembers(Members):
    """The same with rooms that count as large from their second member on, and become small again."""

    scanned_max = 1


IndexedMembers.TestCase.settings = Members.TestCase.settings
test_indexed_members = IndexedMembers.TestCase


def test_members_of_a_tag_are_not_those_of_its_beginning() -> None:
    """S11, S12: a filter matches whole tags, whatever stands beside them in id and uri."""
    table = Connections()
    rooms = Rooms(table)
    room = record("main/x")
    for number, (name, tags) in enumerate(
        [("de", ["den"]), ("x", ["de"]), ("den", []), ("y", ["a", "de", "b"])]
    ):
        rooms.link(
            table.allocate(number + 1, None, room, wire.make_card(name, "de", wire.tags_blob(tags)), 0)
        )
    assert rooms.select(room, [["de"], [], []]) == [1, 3]
    assert rooms.select(room, [[], [], ["de"]]) == [0, 2]


class CountedCards(list[bytes]):
    """Cards, and how many of them are looked at one by one."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


def test_a_filter_in_a_room_of_5000_costs_what_it_finds() -> None:
    """S12: matches in the order of acceptance, whichever slots they are in; the first question makes the
    index.
    """
    table = Connections(Ledger.create(6000))
    rooms = Rooms(table)
    room = rooms.by_key["main/x"] = record("main/x")
    wanted: dict[str, list[int]] = {"all": [], "rare": [], "odd": []}

    def come(number: int) -> None:
        tags = ["all", *(["rare"] if number % 700 == 0 else []), *(["odd"] if number % 2 else [])]
        slot = table.allocate(number, None, room, wire.make_card(f"c{number}", "", wire.tags_blob(tags)), 0)
        rooms.link(slot)
        for tag in tags:
            wanted[tag].append(slot)

    for number in range(1, 2001):
        come(number)
    for slot in range(0, 1000, 3):  # later ones get slots that lie before those of earlier ones
        rooms.unlink(slot)
        table.release(slot)
        for slots in wanted.values():
            if slot in slots:
                slots.remove(slot)
    for number in range(2001, 5335):
        come(number)
    assert room.count == 5000
    rare = wanted["rare"]
    assert rare != sorted(rare)
    assert rooms.select(room, [["rare"], [], []]) == rare
    table.card = cards = CountedCards(table.card)
    odd = set(wanted["odd"])
    for criteria, found, most in [
        ([["rare"], [], []], rare, len(rare)),
        ([["all", "rare"], [], []], rare, 2 * len(rare)),
        ([[], ["rare", "nobody"], []], rare, len(rare)),
        ([["rare"], [], ["odd"]], [slot for slot in rare if slot not in odd], 2 * len(rare)),
        ([["rare", "odd"], ["all"], []], [slot for slot in rare if slot in odd], 3 * len(rare)),
        ([["nobody"], [], []], [], 0),
        ([["all"], [], []], wanted["all"], 5000),
        ([[], [], ["odd"]], [slot for slot in wanted["all"] if slot not in odd], 5000),
    ]:
        cards.looks = 0
        assert rooms.select(room, criteria) == found
        assert cards.looks <= most, criteria
