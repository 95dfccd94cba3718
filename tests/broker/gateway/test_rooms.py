"""Rooms as the gateway sees them: which connections refer to a record, and how long it is kept."""

from types import SimpleNamespace
from typing import Any

from broker.gateway.connections import Connections
from broker.gateway.rooms import RoomRecord, Rooms


def record(key: str) -> RoomRecord:
    settings = SimpleNamespace(room_inflight_events_max=256, room_inflight_bytes_max=4 << 20)
    party: Any = SimpleNamespace(settings=settings)
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
