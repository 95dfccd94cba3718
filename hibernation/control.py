"""The supervisor's door: `supervisor.sock` in the data directory, for `broker reload`, `upgrade` and `drain`.

Owns the Unix socket, who may knock, and that one order is carried out at a time: whoever comes second is told
what is under way. An order that has begun goes on when its client leaves. What an order does is the
supervisor's. Peer: `hibernation.admin`, as for `gateway.sock`: 4 bytes of length and one CBOR map each way.
"""

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hibernation.admin import SOCKET_NAME
from hibernation.link import LinkError, StreamDecoder, encode
from hibernation.logs import get_logger
from storage.directory import SOCKET_PATH_BYTES_MAX

__all__ = ["Control", "OrderRefused"]

log = get_logger("supervisor")

CLIENTS_MAX = 32
ORDER_BYTES_MAX = 64 * 1024
READ_BYTES = 64 * 1024
LAST_WORDS_SECONDS = 1.0
"""For an answer to reach a client that reads, when the supervisor ends."""

_PEER_CREDENTIALS = struct.Struct("3i")

Order = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


class OrderRefused(Exception):
    """An order was not, or not wholly, carried out; the text says why."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Control:
    """The door. `serve` runs once."""

    def __init__(self, data: Path, orders: Mapping[str, Order]) -> None:
        """`orders` are the supervisor's, by name; each raises OrderRefused."""
        self._data = data
        self._orders = orders
        self._under_way: str | None = None
        self._since = 0.0
        self._free = trio.Event()
        self._free.set()

    @property
    def under_way(self) -> str | None:
        """What holds the right to change something."""
        return self._under_way

    @asynccontextmanager
    async def turn(self, name: str, *, wait: bool) -> AsyncIterator[None]:
        """Hold the right to change something. With `wait` until it is free, else OrderRefused says what holds
        it.
        """
        while self._under_way is not None:
            if not wait:
                seconds = trio.current_time() - self._since
                raise OrderRefused(
                    f"{self._under_way} is under way, for {seconds:.1f} s; try again when it has ended"
                )
            await self._free.wait()
        self._under_way, self._since, self._free = name, trio.current_time(), trio.Event()
        try:
            yield
        finally:
            self._under_way = None
            self._free.set()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; the caller holds the data directory, so what lies there is stale."""
        path = self._data / SOCKET_NAME
        listener = _listen(path)
        try:
            with contextlib.closing(listener):
                task_status.started()
                async with trio.open_nursery() as nursery:
                    clients = trio.CapacityLimiter(CLIENTS_MAX)
                    while True:
                        connected, _ = await listener.accept()
                        if clients.available_tokens < 1:
                            connected.close()
                        else:
                            nursery.start_soon(self._attend, trio.SocketStream(connected), clients, nursery)
        finally:
            path.unlink(missing_ok=True)

    async def _attend(
        self, stream: trio.SocketStream, clients: trio.CapacityLimiter, nursery: trio.Nursery
    ) -> None:
        """Answer one client's orders until it hangs up."""
        packed = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, uid, _ = _PEER_CREDENTIALS.unpack(packed)
        decoder = StreamDecoder(ORDER_BYTES_MAX)
        async with clients, stream:
            if uid not in (os.geteuid(), 0):
                return
            try:
                while data := await stream.receive_some(READ_BYTES):
                    decoder.feed(data)
                    for order in decoder:
                        if not isinstance(order, dict):
                            return
                        if "command" in order:  # else it is the greeting, which says no more than its uid
                            await self._answer(stream, order, nursery)
            except (OSError, LinkError, trio.BrokenResourceError):
                return

    async def _answer(self, stream: trio.SocketStream, order: dict[str, Any], nursery: trio.Nursery) -> None:
        answer: dict[str, Any] = {"error": "the instance is being stopped"}
        done = trio.Event()

        async def carry_out() -> None:
            nonlocal answer
            try:
                answer = {"result": await self._carry_out(order)}
            except OrderRefused as refused:
                answer = {"error": refused.text}
            except Exception as error:
                # A fault of ours costs this order, not the instance.
                log.exception("order failed", order=order["command"])
                answer = {"error": f"the supervisor failed: {type(error).__name__}: {error}"}
            finally:
                done.set()

        nursery.start_soon(carry_out)  # not a task of this client's
        try:
            with trio.CancelScope(shield=True):
                await done.wait()
        finally:
            with trio.move_on_after(LAST_WORDS_SECONDS, shield=True):
                await stream.send_all(encode(answer))

    async def _carry_out(self, order: dict[str, Any]) -> dict[str, Any]:
        name = order["command"]
        handler = self._orders.get(name) if isinstance(name, str) else None
        if handler is None:
            raise OrderRefused(f"unknown command {name!r}; there are: {', '.join(self._orders)}")
        async with self.turn(name, wait=False):
            log.info("order begins", order=name)
            began = trio.current_time()
            try:
                result = await handler(order)
            except OrderRefused as refused:
                log.error("order failed", order=name, reason=refused.text)
                raise
            log.info("order done", order=name, seconds=round(trio.current_time() - began, 3))
            return result


def _listen(path: Path) -> trio.socket.SocketType:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
            listener.bind(os.fspath(path))
        else:
            # Three letters longer than `gateway.sock`, for which there was room.
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
        path.chmod(0o600)
        listener.listen(CLIENTS_MAX)
    except BaseException:
        listener.close()
        raise
    return trio.socket.from_stdlib_socket(listener)
