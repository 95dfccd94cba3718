"""Fetches from room to room in the gateway: who waits for whom, and what ends a wait (S30)."""

import itertools
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.calls import Calls, Waits
from broker.gateway.forward import Forward
from broker.gateway.quarantine import Quarantine
from hibernation import wire


def test_circles_of_any_length_are_seen() -> None:
    waits = Waits()
    assert waits.circle("a", "a") == ["a", "a"]
    waits.add("a", "b")
    assert waits.circle("b", "a") == ["b", "a", "b"]
    waits.add("b", "c")
    assert waits.circle("c", "a") == ["c", "a", "b", "c"]
    assert waits.circle("a", "c") is None
    assert waits.circle("c", "d") is None
    assert waits.chain("a") == ["b", "c"]
    waits.remove("a", "b")
    assert waits.circle("c", "a") is None
    waits.remove("b", "c")
    assert not len(waits)


def test_a_room_may_wait_for_one_twice() -> None:
    waits = Waits()
    waits.add("a", "b")
    waits.add("a", "b")
    waits.remove("a", "b")
    assert waits.circle("b", "a") == ["b", "a", "b"]
    waits.remove("a", "b")
    assert waits.circle("b", "a") is None


ROOMS = st.sampled_from("abcdef")


@given(st.lists(st.tuples(ROOMS, ROOMS)))
def test_a_circle_is_found_exactly_when_there_is_one(wishes: list[tuple[str, str]]) -> None:
    """Against the model: some way leads from the callee to the caller."""
    waits, edges = Waits(), set[tuple[str, str]]()
    for caller, callee in wishes:
        reached, new = {callee}, {callee}
        while new:
            new = {to for of, to in edges if of in new} - reached
            reached |= new
        circle = waits.circle(caller, callee)
        assert (circle is not None) == (caller in reached)
        if circle is None:
            waits.add(caller, callee)
            edges.add((caller, callee))
        else:
            assert circle[0] == circle[-1] == caller
            assert circle[1] == callee
            assert all(pair in edges for pair in itertools.pairwise(circle[1:]))


class FakeHost:
    """What a host is told."""

    synced = True

    def __init__(self, shards: tuple[int, ...] = (0,)) -> None:
        self.items: list[list[Any]] = []
        self.shards = shards
        self.retiring = False

    def put(self, item: list[Any]) -> None:
        self.items.append(item)

    def said(self, kind: int) -> list[list[Any]]:
        return [item for item in self.items if item[0] == kind]


class Gateway:
    """Calls with one host that has everything."""

    def __init__(self) -> None:
        self.host = FakeHost()
        links: Any = SimpleNamespace(by_shard=[self.host], shard_count=1)
        self.forward = Forward(links, lambda: None, Quarantine())
        party: Any = SimpleNamespace(name="main", cors=None, wants_request=True, wants_fetch=False)
        deaf: Any = SimpleNamespace(name="deaf", cors=None, wants_request=False, wants_fetch=False)
        self.forward.parties = {"main": party, "deaf": deaf}
        self.calls = Calls(self.forward, lambda: None)

    async def call(
        self, caller: str, callee: str, number: int, *, serial: bool = True, limit: int = 100
    ) -> None:
        fields = {"party": callee.partition("/")[0], "caller": caller}
        item: list[Any] = [wire.CALL, number, caller, serial, callee, fields, limit]
        host: Any = self.host
        self.calls.called(host, item)
        await trio.testing.wait_all_tasks_blocked()

    def replies(self) -> dict[int, Any]:
        return {number: answer for _, number, answer in self.host.said(wire.REPLY)}

    def requests(self) -> list[int]:
        return [item[2] for item in self.host.said(wire.REQUEST)]


def serving(test: Callable[[Gateway], Awaitable[None]]) -> Gateway:
    gateway = Gateway()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.calls.run)
            await test(gateway)
            nursery.cancel_scope.cancel()

    trio.run(run)
    return gateway


def test_an_answer_goes_back_to_who_asked() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "main/b", 7)
        [number] = gateway.requests()
        gateway.forward.respond(number, 201, [["x-a", "1"]], b"body")
        await trio.testing.wait_all_tasks_blocked()
        assert gateway.replies() == {7: ["response", 201, [("x-a", "1")], b"body"]}
        assert not len(gateway.calls.waits)

    serving(test)


def test_answers_have_their_limit() -> None:
    """One below, at, and one above; whole and in pieces."""

    async def test(gateway: Gateway) -> None:
        for size in (99, 100, 101):
            await gateway.call("main/a", "main/b", size)
            gateway.forward.respond(gateway.requests()[-1], 200, [], b"x" * size)
            await gateway.call("main/a", "main/b", 1000 + size)
            number = gateway.requests()[-1]
            gateway.forward.respond(number, 200, [], None)
            gateway.forward.chunk(number, b"x" * 50)
            gateway.forward.chunk(number, b"x" * (size - 50))
            gateway.forward.finish(number, True)
            await trio.testing.wait_all_tasks_blocked()
        found = {number: answer[0] for number, answer in gateway.replies().items()}
        assert found == {
            99: "response",
            100: "response",
            101: "too large",
            1099: "response",
            1100: "response",
            1101: "too large",
        }

    serving(test)


def test_a_circle_is_refused_and_asks_nobody() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "main/b", 1)
        await gateway.call("main/b", "main/a", 2)
        assert gateway.replies() == {2: ["circle", ["main/b", "main/a", "main/b"]]}
        assert len(gateway.requests()) == 1

    serving(test)


def test_rooms_whose_turns_overlap_make_no_circle() -> None:
    """S19: they answer while they wait."""

    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "main/b", 1, serial=False)
        await gateway.call("main/b", "main/a", 2)
        await gateway.call("main/a", "main/a", 3, serial=False)
        assert not gateway.replies()
        assert len(gateway.requests()) == 3

    serving(test)


def test_who_does_not_wait_any_more_cancels() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "main/b", 1)
        host: Any = gateway.host
        gateway.calls.called(host, [wire.CALL, 1])
        gateway.calls.called(host, [wire.CALL, 99])
        await trio.testing.wait_all_tasks_blocked()
        assert [item[1] for item in gateway.host.said(wire.CANCEL)] == gateway.requests()
        assert not gateway.replies()
        assert not len(gateway.calls.waits)

    serving(test)


def test_what_does_not_exist_is_a_status() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "nobody/b", 1)
        await gateway.call("main/a", "deaf/b", 2)
        assert {number: answer[1] for number, answer in gateway.replies().items()} == {1: 404, 2: 404}

    serving(test)


def test_the_end_of_a_host_is_a_status_to_others_and_ends_its_own() -> None:
    """S26: 503 before the turn, 502 after it began; nobody answers a turn that has ended with its host."""

    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "main/b", 1)
        await gateway.call("main/a", "main/c", 2)
        gateway.forward.begun(gateway.requests()[1])
        gone: Any = gateway.host
        gateway.forward.host_gone(gone)
        await trio.testing.wait_all_tasks_blocked()
        assert {number: answer[1] for number, answer in gateway.replies().items()} == {1: 503, 2: 502}
        await gateway.call("main/a", "main/b", 3)
        gateway.calls.host_gone(gone)
        await trio.testing.wait_all_tasks_blocked()
        assert 3 not in gateway.replies()
        assert not len(gateway.calls.waits)

    serving(test)


def test_a_host_that_retires_is_told_which_turns_cannot_end() -> None:
    """S32: those that wait for a turn of its own that has not begun."""

    async def test(gateway: Gateway) -> None:
        await gateway.call("main/a", "main/b", 1)
        await gateway.call("main/a", "main/c", 2)
        gateway.forward.begun(gateway.requests()[1])
        gateway.host.retiring = True
        host: Any = gateway.host
        gateway.calls.host_retires(host)
        await gateway.call("main/d", "main/e", 3)
        assert gateway.replies() == {1: ["retiring"], 3: ["retiring"]}

    serving(test)


def test_what_was_meant_for_a_former_gateway_is_left() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.host.synced = False
        await gateway.call("main/a", "main/b", 1)
        gateway.calls.called(None, [wire.CALL, 1])
        assert not gateway.host.items

    serving(test)
