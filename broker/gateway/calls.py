"""Fetches from room to room: who asks whom, and that nobody waits for ever (S30).

Owns the fetches under way, one task each, and the graph of rooms that wait. Must not know HTTP's other side:
no client is concerned. Peers: `forward`, which brings a request to its room as it does a client's; the hosts,
whose CALL this carries out.

A room whose turns do not overlap answers nobody while its turn waits. So when such rooms wait for each other
in a circle none of them ever gets its answer: the fetch that would close the circle is refused at once. Every
other fetch ends by its own time limit, or with its turn's.
"""

from collections import Counter, deque
from typing import Any, Final

import trio

from broker.gateway.forward import Forward, Pending
from broker.gateway.http import HttpReply, RequestRefused
from broker.gateway.links import HostLink
from hibernation import wire
from hibernation.logs import get_logger

__all__ = ["Calls", "Waits"]

log = get_logger("calls")

_TEXT: Final = (("content-type", "text/plain; charset=utf-8"),)


class Waits:
    """Which room waits for which: the graph, pure."""

    def __init__(self) -> None:
        self._of: dict[str, Counter[str]] = {}

    def circle(self, caller: str, callee: str) -> list[str] | None:
        """The circle that would be closed if `caller` waited for `callee`, from `caller` back to itself."""
        if caller == callee:
            return [caller, caller]
        before: dict[str, str] = {callee: caller}
        queue = deque([callee])
        while queue:
            room = queue.popleft()
            for other in self._of.get(room, ()):
                if other == caller:
                    path = [caller, room]
                    while room != callee:
                        room = before[room]
                        path.append(room)
                    return [*path, caller][::-1]
                if other not in before:
                    before[other] = room
                    queue.append(other)
        return None

    def add(self, caller: str, callee: str) -> None:
        """`caller` waits for `callee` from now on."""
        self._of.setdefault(caller, Counter())[callee] += 1

    def remove(self, caller: str, callee: str) -> None:
        """Once less."""
        rooms = self._of[caller]
        rooms[callee] -= 1
        if not rooms[callee]:
            del rooms[callee]
            if not rooms:
                del self._of[caller]

    def chain(self, room: str) -> list[str]:
        """The rooms that `room` waits for, each for the next, the longest waited for first."""
        chain: list[str] = []
        while (rooms := self._of.get(room)) and len(chain) < CHAIN_MAX:
            room = next(iter(rooms))
            chain.append(room)
        return chain

    def __len__(self) -> int:
        return len(self._of)


CHAIN_MAX: Final = 16
"""Rooms of a chain that are named."""


class Call:
    """One fetch under way."""

    __slots__ = ("callee", "caller", "fields", "host", "limit", "pending", "question", "scope", "serial")

    def __init__(self, host: HostLink, item: list[Any]) -> None:
        _, self.question, self.caller, self.serial, self.callee, self.fields, self.limit = item
        self.host = host
        self.scope = trio.CancelScope()
        #: Its request, as soon as it is on its way.
        self.pending: Pending | None = None


class Calls:
    """See the module. `run` must be running before the first call."""

    def __init__(self, forward: Forward, flush: Any) -> None:
        self._forward = forward
        self._flush = flush
        self._nursery: trio.Nursery
        self._calls: dict[tuple[HostLink, int], Call] = {}
        self.waits = Waits()
        self.count = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the tasks of all calls."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def called(self, host: HostLink | None, item: list[Any]) -> None:
        """A room fetches another one, or waits for it no more."""
        if host is None or not host.synced:
            return  # meant for a former gateway: the turn has ended with it
        if len(item) == 2:
            gone = self._calls.get((host, item[1]))
            if gone is not None:
                gone.scope.cancel()
            return
        call = Call(host, item)
        self.count += 1
        if call.serial:
            circle = self.waits.circle(call.caller, call.callee)
            if circle is not None:
                host.put([wire.REPLY, call.question, ["circle", circle]])
                return
            self.waits.add(call.caller, call.callee)
        self._calls[host, call.question] = call
        self._nursery.start_soon(self._carry, call)

    async def _carry(self, call: Call) -> None:
        answer = None
        try:
            with call.scope:
                answer = await self._answer(call)
        finally:
            del self._calls[call.host, call.question]
            if call.serial:
                self.waits.remove(call.caller, call.callee)
        if answer is not None:
            call.host.put([wire.REPLY, call.question, answer])
            self._flush()

    async def _answer(self, call: Call) -> list[Any]:
        """Have the room answer; `hibernation.neighbours.answer_of` reads what comes out."""
        if self._is_hopeless(call):
            return ["retiring"]
        try:
            reply = await self._forward.call(call)
            body = reply.body
            if not isinstance(body, bytes):
                body = await _whole(reply, call.limit)
        except RequestRefused as refused:
            text = f"{refused.text}\n".encode()
            return ["response", refused.status, [*_TEXT, *refused.headers], text]
        except _BrokenOff:
            return ["response", 502, _TEXT, b"the answer broke off\n"]
        except Exception:
            # A fault of ours costs this one fetch (S40).
            log.exception("a fetch could not be carried out", caller=call.caller, room=call.callee)
            return ["response", 500, _TEXT, b"internal error\n"]
        if len(body) > call.limit:
            return ["too large", len(body)]
        return ["response", reply.status, reply.headers, body]

    def waits_for(self, key: str) -> list[str]:
        """The rooms that a room waits for, each for the next."""
        return self.waits.chain(key)

    # --- Hosts come and go ------------------------------------------------------------------------

    def host_gone(self, host: HostLink) -> None:
        """Its turns have ended with it."""
        for call in list(self._calls.values()):
            if call.host is host:
                call.scope.cancel()

    def host_retires(self, host: HostLink) -> None:
        """It starts no more turns. One of its turns that waits for another would wait for the next host,
        which waits for this one's end.
        """
        for call in list(self._calls.values()):
            if self._is_hopeless(call):
                host.put([wire.REPLY, call.question, ["retiring"]])
                call.scope.cancel()

    def _is_hopeless(self, call: Call) -> bool:
        host, pending = call.host, call.pending
        return (
            host.retiring
            and self._forward.shard_of(call.callee) in host.shards
            and (pending is None or not pending.begun)
        )


class _BrokenOff(Exception):
    """A streamed answer has ended before its end."""


async def _whole(reply: HttpReply, limit: int) -> bytes:
    """The body of a streamed answer; of one that is too large only so much that it is seen."""
    pieces: Any = reply.body
    body = bytearray()
    try:
        async for piece in pieces:
            body += piece
            if len(body) > limit:
                break
    except RuntimeError:
        raise _BrokenOff from None
    finally:
        await pieces.aclose()
    return bytes(body)
