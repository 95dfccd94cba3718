"""The gateway's side of the keeper: whose sockets it holds, and what it has acknowledged.

Owns the session with the keeper, and its renewal when the keeper has died: a new one is given all that the
old one held. Must not decide which sockets are kept; `lifecycle` says when one comes and when one ends.
Peers: `hibernation.keeping` (the session), `hibernation.keeper` (the process).
"""

import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import trio

from broker.gateway.connections import STORING, Connections
from broker.gateway.hub import EPOLLIN, EPOLLOUT, Hub
from hibernation.keeper_messages import BATCH_MAX
from hibernation.keeping import KeeperClient, KeeperError, KeeperGone, KeeperRefused
from hibernation.logs import get_logger

#: Pause between attempts to reach a keeper that is not there.
AGAIN_SECONDS: Final = 0.05
#: How often it is looked whether everything is held, when a successor waits for that.
PASS_ON_POLL_SECONDS: Final = 0.001

log = get_logger("keeper")

Slots = list[tuple[int, int]]


class Duplicates:
    """See the module.

    Args:
        client: A session with the keeper.
        named: Descriptors that it holds beside the sockets, by name.
        held: Called with slots and numbers when the keeper has acknowledged what `hold` was given.
        refused: Called with those that it could not hold.
    """

    def __init__(
        self,
        hub: Hub,
        data: Path,
        connections: Connections,
        client: KeeperClient,
        named: Mapping[str, int],
        held: Callable[[Slots], None],
        refused: Callable[[Slots], None],
    ) -> None:
        self._hub = hub
        self._data = data
        self._connections = connections
        self._named = dict(named)
        self._held = held
        self._refused = refused
        self._client: KeeperClient | None = None
        self._descriptor = -1
        #: What was given, and with which message.
        self._waiting: deque[tuple[int, Slots]] = deque()
        self._ended: list[int] = []
        self._asks_to_write = False
        self.sessions = 0
        self._begin(client)

    @property
    def is_there(self) -> bool:
        """Whether there is a keeper, and it has all that it was given."""
        client = self._client
        return client is not None and client.acknowledged == client.sent and not self._ended

    def hold(self, slots: Slots) -> None:
        """Have the sockets in these slots held; `held` follows, or `refused`."""
        client = self._client
        if client is not None:
            self._drop(client)
        for start in range(0, len(slots), BATCH_MAX):
            part = slots[start : start + BATCH_MAX]
            self._waiting.append((0 if client is None else self._put(client, part), part))

    def ended(self, slot: int) -> None:
        """The socket in this slot has ended."""
        self._ended.append(slot)

    def flush(self) -> None:
        """End of a tick."""
        client = self._client
        if client is None:
            self._ended.clear()
            return
        if self._ended:
            self._drop(client)
        self._flush(client)

    async def pass_on(self, loose: list[socket.socket]) -> None:
        """Have these held beside the connections, for a successor; returns when everything is held.

        Raises:
            KeeperGone: There is no keeper now.
        """
        client = self._client
        if client is None:
            raise KeeperGone("the keeper is not there; it is started again: try once more")
        first = self._connections.ledger.capacity
        if loose:
            client.put(range(first, first + len(loose)), [sock.fileno() for sock in loose])
        while client.acknowledged < client.sent:
            self._flush(client)
            await trio.sleep(PASS_ON_POLL_SECONDS)
            if self._client is not client:
                raise KeeperGone("the keeper has died meanwhile; it is started again: try once more")

    def go_on(self) -> None:
        """Begin a session again."""
        self._again()

    def leave(self) -> None:
        """End the session; the keeper goes on holding."""
        if self._client is not None:
            self._hub.forget(self._descriptor)
            self._client.close()
            self._client = None

    # --- Parts ------------------------------------------------------------------------------------

    def _put(self, client: KeeperClient, slots: Slots) -> int:
        sockets = self._connections.sockets
        descriptors = [sockets[slot].fileno() for slot, _ in slots]  # type: ignore[union-attr]
        return client.put([slot for slot, _ in slots], descriptors)

    def _drop(self, client: KeeperClient) -> None:
        ended, self._ended = self._ended, []
        if ended:
            client.drop(ended)

    def _flush(self, client: KeeperClient) -> None:
        """Send what may go now. The rest goes when the keeper has acknowledged some, or has room."""
        while True:
            try:
                client.flush()
            except OSError:
                continue  # a socket has ended before the keeper had it: that one is left out
            break
        if client.wants_write != self._asks_to_write:
            self._asks_to_write = client.wants_write
            self._hub.rewatch(self._descriptor, EPOLLIN | EPOLLOUT if self._asks_to_write else EPOLLIN)

    def _begin(self, client: KeeperClient) -> None:
        self._client = client
        self.sessions += 1
        self._asks_to_write = False
        self._descriptor = client.fd
        self._hub.watch(client.fd, self._ready)

    def _ready(self, _events: int) -> None:
        client = self._client
        assert client is not None
        refused: tuple[int, ...] = ()
        try:
            client.receive()
        except KeeperRefused as error:
            if error.ended:
                self._lost(error)
                return
            log.error("the keeper cannot hold a socket: its client gets 503", error=str(error))
            refused = error.numbers
        except KeeperGone as error:
            self._lost(error)
            return
        except OSError:
            pass  # as in `_flush`
        self._flush(client)
        waiting = self._waiting
        while waiting and waiting[0][0] <= client.acknowledged:
            number, slots = waiting.popleft()
            (self._refused if number in refused else self._held)(slots)

    def _lost(self, error: Exception) -> None:
        """The keeper has gone: newcomers wait until another one has everything."""
        if self._client is None:
            return
        log.error("the keeper has gone: sockets stay here, newcomers wait for the next one", error=str(error))
        self.leave()
        self._ended.clear()
        self._hub.after(AGAIN_SECONDS, self._again)

    def _again(self) -> None:
        """Give a new keeper all that the former one had."""
        try:
            client = KeeperClient.connect(self._data)
        except KeeperError:
            self._hub.after(AGAIN_SECONDS, self._again)
            return
        self._begin(client)
        table = self._connections
        slots = [
            (slot, table.number[slot])
            for slot in range(len(table))
            if table.sockets[slot] is not None and table.phase[slot] >= STORING
        ]
        for name, descriptor in self._named.items():
            client.pin(name, descriptor)
        if slots:
            self._put(client, slots)
        self._waiting = deque((client.sent, waiting) for _, waiting in self._waiting)
        self._flush(client)
        log.info("a new keeper holds the sockets", sockets=len(slots))
