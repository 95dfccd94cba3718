"""The life of connections, without hosts: what belongs to which, and what ends when."""

import socket
from collections.abc import Iterator
from select import EPOLLIN, EPOLLPRI, EPOLLRDHUP
from types import SimpleNamespace
from typing import Any

import pytest

import broker.gateway.lifecycle
from broker.gateway.connections import ADMITTING, CLOSED, CLOSING, CONNECTING, OPEN, STORING, Connections
from broker.gateway.lifecycle import Lifecycle
from broker.gateway.rooms import RoomRecord, Rooms
from hibernation.settings import Settings


class FakeHub:
    """Notes what is watched."""

    now = 0.0
    second = 0

    def __init__(self) -> None:
        self.watched: set[int] = set()

    def watch(self, descriptor: int, *_: Any) -> None:
        self.watched.add(descriptor)

    def unwatch(self, descriptor: int) -> None:
        self.watched.remove(descriptor)

    def after(self, *_: Any) -> None:
        pass


def lifecycle(table: Connections) -> Lifecycle:
    links: Any = SimpleNamespace(by_shard=[None])
    inbox: Any = SimpleNamespace(states={})
    sender: Any = SimpleNamespace(outboxes={})
    hub: Any = FakeHub()
    return Lifecycle(hub, table, Rooms(table), links, inbox, sender, Settings())


@pytest.mark.parametrize("phase", [ADMITTING, STORING])
@pytest.mark.parametrize("events", [EPOLLIN | EPOLLRDHUP, EPOLLPRI])
def test_what_epoll_says_of_a_descriptors_former_owner_is_not_the_new_ones(phase: int, events: int) -> None:
    """One poll may name a descriptor that is closed, and given to a newcomer, before its turn comes."""
    table = Connections()
    room = RoomRecord("main/r", SimpleNamespace(settings=Settings(), answers=None), 0)  # type: ignore[arg-type]
    slot = table.allocate(1, None, room, b"id\xfeuri\xfe", 0)
    table.phase[slot] = phase
    lifecycle(table).ready(slot, events)
    assert (table.phase[slot], table.flags[slot], table.seen[slot]) == (phase, 0, 0)


@pytest.mark.parametrize(
    ("phase", "counted", "needs_turn"),
    [
        (ADMITTING, 0, False),
        (STORING, 0, False),
        (CONNECTING, 1, True),
        (OPEN, 1, True),
        (CLOSING, 1, False),
        (CLOSED, 1, True),
    ],
)
def test_only_those_who_are_counted_at_the_end_can_be_given_up(
    phase: int, counted: int, needs_turn: bool
) -> None:
    """Else the end would come while turns of others are under way."""
    table = Connections()
    room = RoomRecord("main/r", SimpleNamespace(settings=Settings(), answers=None), 0)  # type: ignore[arg-type]
    slot = table.allocate(1, None, room, b"id\xfeuri\xfe", 0)
    table.phase[slot] = phase
    life = lifecycle(table)
    assert (life.closing_count, life.needs_turn(slot)) == (counted, needs_turn)


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(4)]
    for ours, _ in made:
        ours.setblocking(False)
    yield made
    for ours, theirs in made:
        ours.close()
        theirs.close()


def test_refused_clients_hold_a_bounded_number_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    """S37: those who are answered and do not leave may not use up what the gateway itself needs."""
    monkeypatch.setattr(broker.gateway.lifecycle, "LINGERING_MAX", 3)
    life = lifecycle(Connections())
    for ours, theirs in pairs:
        life.say_goodbye(ours, b"no")
        assert theirs.recv(10) == b"no"
    assert [ours.fileno() >= 0 for ours, _ in pairs] == [True, True, True, False]
