"""HTTP requests on their way to a host and back.

Owns the numbers of requests in progress, what is needed to ask again, and the flow of streamed answers. Must
not parse HTTP. Peers: `http` (clients' side), `links` (hosts' side), `hibernation.host`.

A request whose turn has not begun when its host goes is answered 503, one whose turn has begun 502: it may
have taken effect (S26). While a host retires, or is not there yet, a request waits [WAIT_SECONDS] for the
next one.
"""

import math
import secrets
from collections.abc import Callable
from typing import Any, Final

import trio

from broker.gateway.http import HttpReply, HttpRequest, RequestRefused
from broker.gateway.links import HostLink, Links
from broker.gateway.parties import PartyView
from broker.gateway.quarantine import RETRY_AFTER as QUARANTINED_RETRY_AFTER
from broker.gateway.quarantine import Quarantine
from hibernation import wire

#: How long a request waits for a host that is being replaced.
WAIT_SECONDS: Final = 10.0
RETRY_AFTER: Final = (("retry-after", "1"),)


class Pending:
    """One request in progress."""

    __slots__ = ("answered", "begun", "chunks", "host", "item", "refused", "reply", "shard", "whole")

    def __init__(self, item: list[Any], shard: int) -> None:
        self.item = item
        self.shard = shard
        self.host: HostLink | None = None
        self.begun = False
        self.answered = trio.Event()
        self.reply: HttpReply | None = None
        self.refused: RequestRefused | None = None
        self.chunks: trio.MemorySendChannel[bytes] | None = None
        self.whole = False


class Pieces:
    """The body of a streamed answer: an iterator that must be closed.

    No generator: closing one that was never asked for a piece, as for HEAD, does nothing.

    Args:
        pending: Of which request.
        receive: Where the pieces come from.
        taken: Called when a piece has been sent on.
        left: Called when no more is wanted.
    """

    def __init__(
        self,
        pending: Pending,
        receive: trio.MemoryReceiveChannel[bytes],
        *,
        taken: Callable[[], None],
        left: Callable[[], None],
    ) -> None:
        self._pending = pending
        self._receive = receive
        self._taken = taken
        self._left = left
        self._begun = False

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> bytes:
        """Give the next piece.

        Raises:
            RuntimeError: The answer has broken off.
        """
        if self._begun:
            self._taken()
        self._begun = True
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if not self._pending.whole:
                raise RuntimeError("the room's code, or its host, ended before the answer did") from None
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Say that no more is wanted."""
        self._receive.close()
        self._left()


class Forward:
    """See the module."""

    def __init__(self, links: Links, flush: Any, quarantine: Quarantine) -> None:
        self._links = links
        self._quarantine = quarantine
        self._flush = flush
        # A host may still say what was meant for a former gateway: its numbers are none of ours.
        self._number = secrets.randbits(52)
        self._pending: dict[int, Pending] = {}
        self.parties: dict[str, PartyView] = {}
        self.requests = 0

    @property
    def in_progress(self) -> int:
        """Requests that are not answered yet."""
        return len(self._pending)

    @property
    def numbers(self) -> frozenset[int]:
        """The requests that are not answered yet."""
        return frozenset(self._pending)

    async def request(self, request: HttpRequest) -> HttpReply:
        """Have a room, or `on_fetch`, answer.

        Raises:
            RequestRefused: 404 for what does not exist, 503 or 502 when the host is not there any more.
        Cancellation: the client has left; so the turn is cancelled, if it still runs.
        """
        self.requests += 1
        if not self.parties:
            raise RequestRefused(503, "not ready", RETRY_AFTER)
        if request.room is None:
            party = self.parties.get("main")
            if party is None or not party.wants_fetch:
                raise RequestRefused(404, "not found")
            key, kind, shard = "", wire.FETCH, 0
        else:
            party = self.parties.get(request.party or "")
            if party is None:
                raise RequestRefused(404, "unknown party")
            if party.cors is not None and request.method == "OPTIONS" and _is_preflight(request.headers):
                return HttpReply(204, list(party.cors))
            if not party.wants_request:
                raise RequestRefused(404, "this party answers no requests")
            key, kind = f"{party.name}/{request.room}", wire.REQUEST
            shard = wire.partition_of(key) % self._links.shard_count
            if key in self._quarantine:
                raise RequestRefused(503, "this room does not start at the moment", QUARANTINED_RETRY_AFTER)
        self._number = number = self._number + 1
        fields = request.fields()
        fields["party"] = party.name
        pending = Pending([kind, key, number, fields], shard)
        self._pending[number] = pending
        try:
            self._ask(pending)
            await self._wait(pending)
        except BaseException:
            self._pending.pop(number, None)
            if pending.host is not None:
                pending.host.put([wire.CANCEL, number])
                self._flush()
            raise
        if pending.refused is not None:
            raise pending.refused
        reply = pending.reply
        assert reply is not None
        if party.cors is not None:
            given = {name.lower() for name, _ in reply.headers}
            more = [(name, value) for name, value in party.cors if name.lower() not in given]
            reply = HttpReply(reply.status, [*reply.headers, *more], reply.body)
        return reply

    async def _wait(self, pending: Pending) -> None:
        """Wait for the answer; but for a host to ask only WAIT_SECONDS."""
        while not pending.answered.is_set():
            with trio.move_on_after(WAIT_SECONDS):
                await pending.answered.wait()
            if pending.host is None and not pending.answered.is_set():
                raise RequestRefused(503, "the room's host is not there", RETRY_AFTER)

    def _ask(self, pending: Pending) -> None:
        host = self._links.by_shard[pending.shard]
        if host is None or host.retiring:
            return  # asked when the next one is there
        pending.host = host
        host.put(pending.item)
        self._flush()

    # --- What hosts say ---------------------------------------------------------------------------

    def begun(self, number: int) -> None:
        """The turn runs."""
        pending = self._pending.get(number)
        if pending is not None:
            pending.begun = True

    def respond(self, number: int, status: int, headers: list[Any], body: bytes | None) -> None:
        """The head of the answer, and its body unless that comes in chunks."""
        pending = self._pending.get(number)
        if pending is None or pending.reply is not None:
            return
        pairs = [(name, value) for name, value in headers]
        if body is None:
            send, receive = trio.open_memory_channel[bytes](
                math.inf
            )  # bounded by the credit that the host has
            pending.chunks = send
            pending.reply = HttpReply(
                status,
                pairs,
                Pieces(
                    pending,
                    receive,
                    taken=lambda: self._taken(number, pending),
                    left=lambda: self._left(number, pending),
                ),
            )
        else:
            del self._pending[number]
            pending.reply = HttpReply(status, pairs, body)
        pending.answered.set()

    def chunk(self, number: int, data: bytes) -> None:
        """A piece of a streamed answer."""
        pending = self._pending.get(number)
        if pending is not None and pending.chunks is not None:
            pending.chunks.send_nowait(data)

    def finish(self, number: int, whole: bool) -> None:
        """A streamed answer has ended, well or not."""
        pending = self._pending.pop(number, None)
        if pending is not None and pending.chunks is not None:
            pending.whole = whole
            pending.chunks.close()

    def _taken(self, number: int, pending: Pending) -> None:
        """The client has taken a piece of a streamed answer: its host may send one more."""
        if pending.host is not None:
            pending.host.put([wire.CREDIT, number, 1])
            self._flush()

    def _left(self, number: int, pending: Pending) -> None:
        """A streamed answer is wanted no more: if its host has not ended it, it may."""
        if self._pending.pop(number, None) is not None and pending.host is not None:
            pending.host.put([wire.CANCEL, number])
            self._flush()

    # --- Hosts come and go ------------------------------------------------------------------------

    def host_gone(self, host: HostLink) -> None:
        """Its turns are lost, and requests are not redelivered."""
        for number, pending in list(self._pending.items()):
            if pending.host is not host:
                continue
            pending.host = None
            if pending.chunks is not None:
                self.finish(number, False)
            elif pending.begun:
                del self._pending[number]
                pending.refused = RequestRefused(502, "the room's host has died")
                pending.answered.set()
            elif not host.retiring:
                del self._pending[number]
                pending.refused = RequestRefused(503, "the room's host has died", RETRY_AFTER)
                pending.answered.set()

    def host_came(self, host: HostLink) -> None:
        """Ask what waited for a host."""
        for number, pending in list(self._pending.items()):
            if pending.host is None and pending.shard in host.shards and pending.reply is None:
                kind, name = pending.item[0], pending.item[3]["party"]
                party = self.parties.get(name)
                if party is None or not (party.wants_fetch if kind == wire.FETCH else party.wants_request):
                    # The code before this one had the hook.
                    del self._pending[number]
                    pending.refused = RequestRefused(404, "not found")
                    pending.answered.set()
                    continue
                pending.host = host
                host.put(pending.item)


def _is_preflight(headers: list[tuple[str, str]]) -> bool:
    names = {name for name, _ in headers}
    return "origin" in names and "access-control-request-method" in names
