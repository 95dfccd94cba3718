"""The gateway's ends of its links: one host takes the place of another (S32)."""

import socket
from typing import Any

from broker.gateway.links import HostLink, Links
from hibernation import wire
from hibernation.link import Link
from hibernation.settings import Settings


class FakeHub:
    """Nothing happens by itself."""

    def watch(self, *_: Any) -> None:
        pass

    def unwatch(self, _: int) -> None:
        pass


def description() -> dict[str, Any]:
    return {"version": wire.VERSION, "shard_count": 1, "shards": [0], "parties": []}


def test_what_a_host_has_said_counts_before_its_successor_is_heard() -> None:
    """S32: a host that has retired and ended may have said more than was read when the next one knocks."""
    hub: Any = FakeHub()
    links = Links(hub, Settings(), 1)
    happened: list[Any] = []
    links.on_host = lambda host: happened.append(host)
    links.on_host_gone = lambda host: happened.append(("gone", host))
    links.on_result = lambda host, item: happened.append(item[1])
    ends = []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ends.append((ours, theirs))
    (first, host), (second, successor) = ends
    links.greeted(first, description())
    (former,) = happened
    assert isinstance(former, HostLink)
    numbers = Link()
    for number in range(3):
        host.sendall(numbers.pack([[wire.EFFECTS, bytes([number]) * 50_000]]))
    host.close()
    links.by_shard[0] = None  # as when it says that it retires
    links.greeted(second, description())
    assert happened[1:4] == [bytes([number]) * 50_000 for number in range(3)]
    assert happened[4] == ("gone", former)
    assert links.hosts == [happened[5]] == links.by_shard
    links.close()
    successor.close()
