"""Requests on their way to a host and back, without either (S26)."""

from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from broker.gateway.forward import Forward
from broker.gateway.http import HttpReply, HttpRequest
from broker.gateway.quarantine import Quarantine
from hibernation import wire


class FakeHost:
    """What a host is told."""

    retiring = False
    shards = (0,)

    def __init__(self) -> None:
        self.items: list[list[Any]] = []

    def put(self, item: list[Any]) -> None:
        self.items.append(item)


def request() -> HttpRequest:
    return HttpRequest(
        "main", "r", "", "GET", "http", "/party/r", "/party/r", b"", [], b"", ("::1", 1), "1.1"
    )


def party(name: str = "main") -> Any:
    return SimpleNamespace(name=name, cors=None, wants_request=True, wants_fetch=False)


async def streamed(forward: Forward, host: FakeHost) -> HttpReply:
    """The answer to a request of which the host has sent the head."""
    answers: list[HttpReply] = []

    async def ask() -> None:
        answers.append(await forward.request(request()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        (item,) = host.items
        forward.respond(item[2], 200, [], None)
    host.items.clear()
    return answers[0]


def pair() -> tuple[Forward, FakeHost]:
    host = FakeHost()
    links: Any = SimpleNamespace(by_shard=[host], shard_count=1)
    forward = Forward(links, lambda: None, Quarantine())
    forward.parties = {"main": party()}
    return forward, host


async def _unread() -> None:
    forward, host = pair()
    reply = await streamed(forward, host)
    await reply.body.aclose()  # type: ignore[union-attr]
    assert [item[0] for item in host.items] == [wire.CANCEL]
    assert not forward._pending


def test_a_stream_that_nobody_reads_is_cancelled() -> None:
    """S26: of the answer to HEAD not one piece is asked for; the room's code must end all the same."""
    trio.run(_unread)


async def _read() -> None:
    forward, host = pair()
    reply = await streamed(forward, host)
    (number,) = forward._pending
    forward.chunk(number, b"a")
    forward.chunk(number, b"b")
    forward.finish(number, True)
    assert [piece async for piece in reply.body] == [b"a", b"b"]  # type: ignore[union-attr]
    await reply.body.aclose()  # type: ignore[union-attr]
    assert host.items == [[wire.CREDIT, number, 1], [wire.CREDIT, number, 1]]


def test_each_piece_that_is_taken_gives_credit_for_one_more() -> None:
    """S26: streamed responses have back-pressure, and one that has ended well is not cancelled."""
    trio.run(_read)
