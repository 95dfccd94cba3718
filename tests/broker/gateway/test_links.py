"""The gateway's ends of its links: one host takes the place of another, or comes back (S5, S22, S32)."""

import socket
from typing import Any

import pytest

from broker.gateway.ledger import Ledger
from broker.gateway.links import HostLink, Links
from hibernation import wire
from hibernation.link import Link, StreamDecoder
from hibernation.settings import Settings


class FakeHub:
    """Nothing happens by itself; what would be called when a descriptor is ready is kept."""

    def __init__(self) -> None:
        self.ready: dict[int, Any] = {}

    def watch(self, descriptor: int, handler: Any, *_: Any) -> None:
        self.ready[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        self.ready.pop(descriptor, None)


def description(incarnation: int = 1, generation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "version": wire.VERSION,
        "shard_count": 1,
        "shards": [0],
        "generations": {0: generation},
        "index": 0,
        "incarnation": incarnation,
        "acknowledged": 0,
        "parties": [],
        **more,
    }


class Gateway:
    """Links, what they say, and the sockets of hosts that have knocked."""

    def __init__(self) -> None:
        self.hub = FakeHub()
        self.ledger = Ledger.create(8)
        self.links = Links(self.hub, Settings(), 1, self.ledger)  # type: ignore[arg-type]
        self.happened: list[Any] = []
        self.links.on_host = lambda host: self.happened.append(("came", host.incarnation))
        self.links.on_host_gone = lambda host: self.happened.append(("gone", host.incarnation))
        self.links.on_message = self._message

    def _message(self, host: HostLink, sequence: int, encoded: bytes | bytearray, items: list[Any]) -> None:
        self.ledger.begin(host.index, sequence, encoded)
        for item in items:
            self._result(host, item)
        self.ledger.end()

    def _result(self, host: HostLink, item: list[Any]) -> None:
        if item[0] == wire.SYNCED:
            self.links.synced(host, item[1])
        elif item[0] == wire.RETIRE:
            host.retiring = True
        else:
            self.happened.append(item[1])

    def knocks(self, described: dict[str, Any]) -> "Knocker":
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.links.greeted(ours, described)
        return Knocker(self, ours, theirs)


class Knocker:
    """A host's end of a link."""

    def __init__(self, gateway: Gateway, ours: socket.socket, theirs: socket.socket) -> None:
        self._gateway = gateway
        self._descriptor = ours.fileno()
        self.socket = theirs
        theirs.settimeout(20)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._decoder = StreamDecoder()

    def heard(self) -> Any:
        """The next value from the gateway."""
        while (value := next(self._decoder, None)) is None:
            data = self.socket.recv(65536)
            assert data, "the gateway has closed the link"
            self._decoder.feed(data)
        return value

    def says(self, data: bytes) -> None:
        self.socket.sendall(data)
        self._gateway.hub.ready[self._descriptor](1)


def test_what_a_host_has_said_counts_before_its_successor_is_heard() -> None:
    """S32: a host that has retired and ended may have said more than was read when the next one knocks."""
    gateway = Gateway()
    host = gateway.knocks(description())
    numbers = Link()
    host.says(numbers.pack([[wire.SYNCED, host.heard()["token"]]]))
    for number in range(3):
        host.socket.sendall(numbers.pack([[wire.EFFECTS, bytes([number]) * 50_000]]))
    host.socket.close()
    gateway.links.by_shard[0] = None  # as when it says that it retires
    successor = gateway.knocks(description(2, 2))
    assert gateway.happened == [
        *(("came", 1), *(bytes([number]) * 50_000 for number in range(3)), ("gone", 1))
    ]
    assert gateway.links.by_shard == [None]
    successor.says(Link().pack([[wire.SYNCED, successor.heard()["token"]]]))
    assert gateway.happened[-1] == ("came", 2)
    assert gateway.links.hosts == gateway.links.by_shard
    gateway.links.close()
    successor.socket.close()


def test_a_host_that_comes_back_says_what_was_not_executed_and_nothing_twice() -> None:
    """S22: the answer to the greeting counts what its former link still holds; numbers go on."""
    gateway = Gateway()
    host, numbers = gateway.knocks(description()), Link()
    host.says(numbers.pack([["", 1]]) + numbers.pack([[wire.SYNCED, host.heard()["token"]]]))
    host.socket.sendall(numbers.pack([["", 2]]))  # not read when it comes back
    numbers.pack([["", 3]])
    again = gateway.knocks(description())
    welcome = again.heard()
    assert welcome["received"] == 3
    numbers.resume(welcome["received"])
    again.says(b"".join(numbers.unacknowledged()))
    assert gateway.happened == [1, ("came", 1), 2, ("gone", 1), 3]
    again.says(numbers.pack([["", 4], [wire.SYNCED, welcome["token"]]]))
    assert gateway.happened[5:] == [4, ("came", 1)]
    for each in (host, again):
        each.socket.close()
    gateway.links.close()


def test_a_gateway_without_memory_begins_where_the_one_before_it_ended() -> None:
    """S22: what a gateway has acknowledged its host has no more, and cannot say again."""
    numbers = Link()
    for number in range(5):
        numbers.pack([["", number]])
    numbers.take([0, 3, None])
    gateway = Gateway()
    host = gateway.knocks(description(acknowledged=numbers.acknowledged))
    welcome = host.heard()
    assert welcome["received"] == 3
    numbers.resume(welcome["received"])
    host.says(b"".join(numbers.unacknowledged()))
    assert gateway.happened == [3, 4]
    host.socket.close()
    gateway.links.close()


def test_nothing_is_given_out_before_the_host_has_said_all_that_ended() -> None:
    """S22: also when it says again what it said to a former gateway, that this was all."""
    gateway = Gateway()
    host, numbers = gateway.knocks(description()), Link()
    token = host.heard()["token"]
    host.says(numbers.pack([["", 1], [wire.SYNCED, token ^ 1]]))
    assert (gateway.links.ready, gateway.happened) == (False, [1])
    host.says(numbers.pack([["", 2], [wire.SYNCED, token]]))
    assert (gateway.links.ready, gateway.happened) == (True, [1, 2, ("came", 1)])
    host.says(numbers.pack([[wire.SYNCED, token]]))
    assert gateway.happened == [1, 2, ("came", 1)]
    host.socket.close()
    gateway.links.close()


def test_a_host_that_retires_is_given_nothing_and_hears_at_once_what_was_executed() -> None:
    """S32: it waits for that, so that its outbox is empty when it ends."""
    gateway = Gateway()
    host, numbers = gateway.knocks(description()), Link()
    token = host.heard()["token"]
    host.says(numbers.pack([[wire.RETIRE], [wire.SYNCED, token]]))
    assert host.heard() == [0, 1, None]
    assert (gateway.links.ready, gateway.happened) == (False, [])
    host.socket.close()
    gateway.links.close()


@pytest.mark.parametrize("generation", [6, 7, 8])
def test_a_host_whose_shard_another_one_has_opened_since_is_refused(
    generation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """S5: by name, and by both numbers."""
    gateway = Gateway()
    first = gateway.knocks(description(1, 7))
    assert "received" in first.heard()
    second = gateway.knocks(description(2, generation))
    answer = second.heard()
    if generation < 7:
        assert "generation 6 of shard 0" in answer["error"]
        assert "generation 7" in answer["error"]
        assert second.socket.recv(1) == b""
        assert [host.incarnation for host in gateway.links.hosts] == [1]
    else:
        assert "received" in answer
        assert [host.incarnation for host in gateway.links.hosts] == [2]
    for each in (first, second):
        each.socket.close()
    gateway.links.close()


@pytest.mark.parametrize("more", [{"version": wire.VERSION - 1}, {"shard_count": 2}])
def test_a_host_of_another_version_or_with_other_shards_is_refused(more: dict[str, Any]) -> None:
    """It is told why, so that it ends and is started anew."""
    gateway = Gateway()
    host = gateway.knocks(description(**more))
    assert "restart both" in host.heard()["error"]
    assert not gateway.links.hosts
    host.socket.close()


def test_the_ledger_remembers_the_host_that_serves() -> None:
    """What was executed of a host is forgotten when another one has its place."""
    ledger = Ledger.create(8)
    assert ledger.meet_host(0, 1, 0) == 0
    ledger.begin(0, 5, b"message")
    ledger.end()
    assert ledger.meet_host(0, 1, 3) == 5
    assert ledger.meet_host(0, 1, 6) == 6  # it was told so
    assert ledger.meet_host(0, 2, 0) == 0
    assert ledger.meet_host(0, 1, 6) == 6


def test_what_is_older_than_an_acknowledgement_goes_before_it() -> None:
    """S13: an event that was made before a result arrived carries older values than that."""
    gateway, numbers = Gateway(), Link()
    host = gateway.knocks(description())
    token = host.heard()["token"]
    host.says(numbers.pack([[wire.SYNCED, token]]))
    [link] = gateway.links.hosts
    link.put(["made before"])
    host.says(numbers.pack([[wire.EFFECTS, "arrives after"]]) + numbers.acknowledgement_request())
    assert host.heard() == [1, 1, [["made before"]]]
    assert host.heard() == [0, 2, None]
    gateway.links.close()
    host.socket.close()
