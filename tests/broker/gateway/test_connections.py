"""The columns of parked connections: slots, and finding a connection by descriptor, or by room and id."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from broker.gateway.connections import FREE, NONE, Connections
from broker.gateway.rooms import RoomRecord
from hibernation import wire


def record(key: str) -> RoomRecord:
    """A room of a party without settings of its own."""
    party: Any = SimpleNamespace(answers=None)
    return RoomRecord(key, party, 0)


def card(connection_id: str, tags: tuple[str, ...] = ()) -> bytes:
    return wire.make_card(connection_id, "ws://host/party/x", wire.tags_blob(tags))


#: Few enough to meet again, and some that are beginnings of others.
IDS = st.sampled_from(["a", "aa", "ab", "b", "é", "ü" * 128, *[f"id-{n}" for n in range(300)]])


class Columns(RuleBasedStateMachine):
    """Every operation against a model of plain dictionaries."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.table = Connections()
        self.rooms = [record("main/x"), record("main/y")]
        self.number = 0
        self.rows: dict[int, tuple[int, RoomRecord, str]] = {}
        self.indexed: dict[tuple[int, str], int] = {}
        self.descriptors: dict[int, int] = {}

    @rule(target=slots, room=st.integers(0, 1), connection_id=IDS)
    def allocate(self, room, connection_id):
        self.number += 1
        slot = self.table.allocate(self.number, None, self.rooms[room], card(connection_id), 7)
        assert slot not in self.rows
        assert self.table.consumed[slot] == self.table.parsed[slot] == self.table.last_end[slot] == 0
        assert self.table.next[slot] == self.table.previous[slot] == NONE
        self.rows[slot] = (self.number, self.rooms[room], connection_id)
        if (room, connection_id) not in self.indexed:
            self.table.index(slot, connection_id)
            self.indexed[room, connection_id] = slot
        return slot

    @rule(target=slots, count=st.integers(20, 120), room=st.integers(0, 1))
    def allocate_many(self, count, room):
        """So that the index grows."""
        return multiple(*[self.allocate(room, f"many-{self.number}") for _ in range(count)])

    @rule(slot=slots)
    def unindex(self, slot):
        self.table.unindex(slot)
        self._unindexed(slot)

    @rule(slot=consumes(slots))
    def release(self, slot):
        self.table.unindex(slot)
        self._unindexed(slot)
        self.table.release(slot)
        del self.rows[slot]

    @rule(slot=slots, tags=st.lists(IDS, max_size=3, unique=True))
    def retag(self, slot, tags):
        """Other tags are another card: the id in it stays findable."""
        self.table.card[slot] = wire.retag_card(self.table.card[slot], wire.tags_blob(tags))

    @rule(slot=slots, descriptor=st.integers(0, 5000))
    def watch(self, slot, descriptor):
        self.table.watch(descriptor, slot)
        self.descriptors[descriptor] = slot

    @rule(descriptor=st.integers(0, 5000))
    def unwatch(self, descriptor):
        if descriptor in self.descriptors:
            self.table.unwatch(descriptor)
            del self.descriptors[descriptor]

    def _unindexed(self, slot: int) -> None:
        self.indexed = {key: each for key, each in self.indexed.items() if each != slot}

    @invariant()
    def finds_what_is_there_and_nothing_else(self):
        for index, room in enumerate(self.rooms):
            for connection_id in {row[2] for row in self.rows.values()} | {"a", "aa", "nobody"}:
                assert self.table.find(room, connection_id) == self.indexed.get((index, connection_id))
        for descriptor in [*self.descriptors, 4999, 100_000]:
            assert self.table.by_descriptor(descriptor) == self.descriptors.get(descriptor, NONE)

    @invariant()
    def holds_what_it_was_given(self):
        table = self.table
        assert table.count == len(self.rows)
        for slot in range(len(table)):
            row = self.rows.get(slot)
            assert table.number[slot] == (row[0] if row else 0)
            assert (table.phase[slot] == FREE) == (row is None)
            assert row is None or (table.holds(slot, row[0]) and table.room[slot] is row[1])
        for index, room in enumerate(self.rooms):
            assert room.held == sum(row[1] is room for row in self.rows.values()), index


Columns.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
test_columns = Columns.TestCase


def test_a_number_that_is_gone_is_held_by_nobody():
    """C1: an effect for a connection that has ended does not reach the next one in its slot."""
    table, room = Connections(), record("main/x")
    first = table.allocate(1, None, room, card("a"), 0)
    table.release(first)
    second = table.allocate(2, None, room, card("a"), 0)
    assert second == first
    assert table.holds(second, 2)
    assert not table.holds(second, 1)
    assert not table.holds(77, 1)


@pytest.mark.parametrize("count", [42, 43, 44, 1000])
def test_the_index_grows_before_it_is_full(count):
    """A search for an id that is not there ends."""
    table, room = Connections(), record("main/x")
    slots = [table.allocate(n + 1, None, room, card(f"id-{n}"), 0) for n in range(count)]
    for n, slot in enumerate(slots):
        table.index(slot, f"id-{n}")
    assert [table.find(room, f"id-{n}") for n in range(count)] == slots
    assert table.find(room, "id") is None
    for slot in slots:
        table.unindex(slot)
        table.unindex(slot)
    assert [table.find(room, f"id-{n}") for n in range(count)] == [None] * count
