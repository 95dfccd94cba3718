"""Bodies that come in pieces, on the room's side (S26)."""

from typing import Any

import pytest
import trio
import trio.testing

from hibernation.feeds import WINDOW_PIECES, Feed, Sealed
from hibernation.requests import build_request

FIELDS: dict[str, Any] = {"method": "POST", "scheme": "http", "path": "/", "query": b"", "headers": []}


class Gateway:
    """Gives out what is wanted of a body that it has whole."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.sent = 0
        self.wanted = 0
        self.feed = Feed(self.want)

    def want(self, pieces: int, reading: int) -> None:
        self.wanted += pieces
        assert self.wanted - self.sent <= WINDOW_PIECES

    def give(self) -> None:
        while self.wanted and self.sent < len(self.pieces):
            self.wanted -= 1
            self.sent += 1
            self.feed.put(self.pieces[self.sent - 1], self.sent == len(self.pieces), 0)


def test_nothing_comes_unasked_and_no_more_than_a_window() -> None:
    async def run() -> None:
        gateway = Gateway(*[b"%d" % number for number in range(20)])
        received = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                while piece := await gateway.feed.receive():
                    received.append(piece)

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert gateway.wanted == WINDOW_PIECES
            while gateway.sent < 20:
                gateway.give()
                await trio.testing.wait_all_tasks_blocked()
        assert received == [b"%d" % number for number in range(20)]
        assert await gateway.feed.receive() == b""

    trio.run(run)


@pytest.mark.parametrize("pieces", [[b""], [b"a"], [b"a", b"b", b""]])
def test_a_request_reads_its_body_in_every_form(pieces: list[bytes]) -> None:
    async def run() -> None:
        async def feeding(gateway: Gateway) -> None:
            while gateway.sent < len(pieces):
                await trio.testing.wait_all_tasks_blocked()
                gateway.give()

        whole = b"".join(pieces)
        async with trio.open_nursery() as nursery:
            gateway = Gateway(*pieces)
            nursery.start_soon(feeding, gateway)
            request = build_request(FIELDS, gateway.feed)
            assert await request.get_data() == whole
            assert await request.get_data(as_text=True) == whole.decode()
            assert await request.body == whole
        async with trio.open_nursery() as nursery:
            gateway = Gateway(*pieces)
            nursery.start_soon(feeding, gateway)
            request = build_request(FIELDS, gateway.feed)
            assert b"".join([piece async for piece in request.body]) == whole
            assert [piece async for piece in request.body] == []

    trio.run(run)


def test_the_rest_that_is_lost_is_an_error() -> None:
    async def run() -> None:
        feed = Feed(lambda _pieces, _reading: None)
        feed.put(b"a", False, 0)
        feed.put(None, True, 0)
        assert await feed.receive() == b"a"
        with pytest.raises(OSError, match="does not come"):
            await feed.receive()

    trio.run(run)


def test_pieces_of_an_earlier_reading_are_none_of_a_later_one() -> None:
    async def run() -> None:
        feed = Feed(lambda _pieces, _reading: None, 1)
        feed.put(b"old", True, 0)
        feed.put(b"new", True, 1)
        assert [await feed.receive(), await feed.receive()] == [b"new", b""]

    trio.run(run)


def test_a_sealed_body_says_whose_it_is() -> None:
    request = build_request(FIELDS, Sealed(lambda _pieces, _reading: None))
    with pytest.raises(RuntimeError, match="for on_request alone"):
        trio.run(request.get_data)
