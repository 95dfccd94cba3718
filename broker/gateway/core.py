"""The gateway: the process that owns the sockets. Runs no user code, ever.

Owns nothing but the wiring: it makes the parts, leads what happens from one to the other, and ends each tick.
The parts, in the order in which a message meets them:

    hub ─▶ doors ─▶ lifecycle ─▶ inbox ─▶ links ══ host ══▶ links ─▶ effects ─▶ outbox
             │                                                          │
             └─▶ http ─▶ forward ─▶ links                               └─▶ registry, once a tick
"""

import gc
import os
import signal
import socket
import sys
from collections import deque
from typing import Any

import trio

from broker.gateway.admin import Admin
from broker.gateway.connections import NONE, Connections
from broker.gateway.doors import Doors
from broker.gateway.effects import Effects
from broker.gateway.forward import Forward
from broker.gateway.handshake import error_response
from broker.gateway.http import HttpFront, HttpReply, HttpRequest
from broker.gateway.hub import Hub
from broker.gateway.inbox import Inbox
from broker.gateway.lifecycle import Lifecycle
from broker.gateway.links import HostLink, Links
from broker.gateway.outbox import Sender
from broker.gateway.parties import PartyView, read_parties
from broker.gateway.rooms import RoomRecord, Rooms
from hibernation import wire
from hibernation.configuration import GatewayConfig, report
from hibernation.logs import get_logger
from hibernation.memory import Trimmer
from storage.directory import read_token
from storage.errors import CommitRefused
from storage.registry import Registry, RegistryBatch
from storage.writer import Writer

#: Connections closed at once while draining, and the pause between: their clients come back elsewhere, spread
#: in time.
DRAIN_GROUP = 500
DRAIN_PAUSE_SECONDS = 0.05
#: A tick makes thousands of short-lived lists that no cycle holds: look for cycles less often than by
#: default.
GC_THRESHOLDS = (20_000, 20, 50)

log = get_logger("gateway")


class Gateway:
    """See the module. `serve` runs one. It is also what the HTTP side asks (`http.GatewayPort`)."""

    def __init__(self, config: GatewayConfig) -> None:
        settings = config.settings
        self.config = config
        self.dev = config.dev
        self.token = read_token(config.data)
        self.registry = Registry(config.data, durability=settings.durability)
        self._writer = Writer("registry")
        self._storing: tuple[list[tuple[int, int]], RegistryBatch] | None = None
        self._registry_failed = False
        self._trimmer = Trimmer()
        self.connections = Connections()
        self.rooms = Rooms(self.connections)
        self.hub = Hub(self._parked, self._end_of_tick, self._each_second)
        self.links = Links(self.hub, settings, config.shard_count)
        self.inbox = Inbox(self.connections, self.links, settings, config.data / "spill")
        self.inbox.later = self.hub.after
        self.lifecycle: Lifecycle
        self.sender = Sender(self.connections, settings, self._send_failed)
        self.lifecycle = Lifecycle(
            self.hub, self.connections, self.rooms, self.links, self.inbox, self.sender, settings
        )
        self.http = HttpFront(self, settings)
        self.listener = socket.socket(fileno=config.listener_fd)
        self.doors = Doors(
            self.hub,
            self.listener,
            self.connections,
            self.rooms,
            self.links,
            self.lifecycle,
            settings,
            dev=config.dev,
            next_number=self.registry.next_number(),
            take_http=self.http.take,
            http_count=self.http.open_count,
        )
        self.forward = Forward(self.links, self.links.flush)
        self.effects = Effects(
            self.connections, self.rooms, self.inbox, self.sender, self.lifecycle, self.doors, self.forward
        )
        self._admin = Admin(self)
        self.parties: dict[str, PartyView] = {}
        self.descriptions: list[dict[str, Any]] = []
        self._survivors = deque(self.registry.surviving())
        self._ready_reported = False
        self._drained = trio.Event()
        self._leaving: deque[tuple[int, int]] = deque()
        self.links.on_host = self._host_came
        self.links.on_host_gone = self._host_gone
        self.links.on_result = self.effects.result
        self.links.on_admin = self._admin.serve_socket
        self.effects.on_retire = self._host_retires
        self.effects.on_answer = self._admin.answered

    async def run(self) -> None:
        """Serve until SIGTERM; then close every connection with 1012, have the close turns run, and
        return.
        """
        self.links.listen(self.config.data / "gateway.sock")
        self.hub.watch(self._writer.fd, self._stored)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.hub.run)
                await nursery.start(self.http.run)
                with trio.open_signal_receiver(signal.SIGTERM) as signals:
                    async for _ in signals:
                        break
                await self._drain()
                nursery.cancel_scope.cancel()
        finally:
            self.links.close()
            self._writer.close()
            if self.lifecycle.batch:
                self.registry.commit(self.lifecycle.batch)
            self.registry.close()

    # --- Ticks ------------------------------------------------------------------------------------

    def _parked(self, descriptor: int, events: int) -> bool:
        slot = self.connections.by_descriptor(descriptor)
        if slot == NONE:
            return False
        try:
            self.lifecycle.ready(slot, events)
        except Exception:
            # A fault of ours costs this one connection, not the others (S40).
            log.exception("a connection could not be served", number=self.connections.number[slot])
            self.lifecycle.violated(slot, 1011, "")
        return True

    def _end_of_tick(self) -> None:
        if self._storing is None and not self._registry_failed:
            batch = self.lifecycle.batch
            if batch:
                self._store(batch)
        self.links.flush()

    def _each_second(self, now: float) -> None:
        self.doors.each_second(now)
        self.lifecycle.sweep()
        self.links.acknowledge()
        self._trimmer.each_second(self.inbox.messages + self.lifecycle.accepted)
        if self._registry_failed:
            self._registry_failed = False

    def _store(self, batch: RegistryBatch) -> None:
        """Give what the ticks have gathered to the writer thread, as one transaction."""
        stored, self.lifecycle.storing = self.lifecycle.storing, []
        self.lifecycle.batch = RegistryBatch()
        self._storing = (stored, batch)
        self._writer.submit(lambda: self.registry.commit(batch))

    def _stored(self, _: int) -> None:
        for _number, error in self._writer.completed():
            assert self._storing is not None
            stored, batch = self._storing
            self._storing = None
            if error is None:
                self.lifecycle.committed(stored)
                self.doors.resume()
                continue
            if not isinstance(error, CommitRefused):
                # Nobody knows what is on disk: whoever starts next reads it (S36).
                log.critical("the registry failed: this gateway ends", error=repr(error))
                os._exit(os.EX_IOERR)
            log.error("the registry cannot be written: new connections get 503", error=str(error))
            self._registry_failed = True  # tried again in a second
            self.doors.resume()
            for _, refused in stored:
                batch.forget(refused)
            self.lifecycle.not_committed(
                stored, error_response(503, "the broker cannot store connections at the moment")
            )
            batch.merge(self.lifecycle.batch)
            self.lifecycle.batch = batch

    def _send_failed(self, slot: int, cause: str) -> None:
        self.lifecycle.failed(slot, cause)

    # --- Hosts ------------------------------------------------------------------------------------

    def _host_came(self, host: HostLink) -> None:
        descriptions = host.description["parties"]
        if descriptions != self.descriptions:
            self.descriptions = descriptions
            self.parties = read_parties(descriptions, self.config.settings)
            self.doors.parties = self.forward.parties = self.parties
            for room in self.rooms.by_key.values():
                room.party = self.parties.get(room.party.name) or room.party.without_hooks()
        self._admit_survivors()
        self.lifecycle.host_came(host)
        self.doors.host_came(host)
        self.forward.host_came(host)
        if self.links.ready and not self._ready_reported:
            self._ready_reported = True
            self.doors.open()
            report(self.config.status_fd, "ready")

    def _admit_survivors(self) -> None:
        """Rows of a former gateway get their close turns, once the parties are known."""
        while self._survivors:
            row = self._survivors.popleft()
            party = self.parties.get(row.party)
            if party is None or not party.wants_close:
                self.lifecycle.batch.forget(row.number)
                continue
            key = f"{party.name}/{row.room}"
            room = self.rooms.by_key.get(key)
            if room is None:
                shard = wire.partition_of(key) % self.links.shard_count
                room = self.rooms.by_key[key] = RoomRecord(key, party, shard)
            self.lifecycle.survived(row, room)

    def _host_gone(self, host: HostLink) -> None:
        self.lifecycle.host_gone(host)
        self.forward.host_gone(host)

    def _host_retires(self, host: HostLink) -> None:
        """It starts no more turns: keep what comes for the next one."""
        host.retiring = True
        for shard in host.shards:
            if self.links.by_shard[shard] is host:
                self.links.by_shard[shard] = None

    # --- The end ----------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Close every connection with 1012, spread in time, and let the close turns end (S37)."""
        if self._ready_reported:
            self.doors.shut()
        leaving = self.lifecycle.drain()
        with trio.move_on_after(self.config.settings.drain):
            while leaving:
                for _ in range(min(DRAIN_GROUP, len(leaving))):
                    slot, number = leaving.popleft()
                    if self.connections.holds(slot, number):
                        self.lifecycle.close(slot, 1012, "service restart", "server_close")
                self._end_of_tick()
                await trio.sleep(DRAIN_PAUSE_SECONDS)
            await self.http.drain(self.config.settings.drain)
            while self.lifecycle.closing_count or self._storing is not None:
                self._end_of_tick()
                await trio.sleep(0.01)

    # --- What the HTTP side asks ------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether every shard has its host."""
        return self.links.ready and not self.lifecycle.draining

    def give_back(self, sock: socket.socket, client: tuple[str, int]) -> None:
        """An upgrade on a kept-alive connection."""
        self.doors.give_back(sock, client)
        self._end_of_tick()

    async def request(self, request: HttpRequest) -> HttpReply:
        """A request for a room, or for `on_fetch`."""
        return await self.forward.request(request)

    async def admin(self, method: str, path: str, query: bytes) -> Any:
        """A question to the admin pages' interface."""
        return await self._admin.http(method, path, query)


async def serve(config: GatewayConfig) -> None:
    """Run a gateway until it is told to stop."""
    os.umask(0o077)
    sys.setswitchinterval(0.001)
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()  # what is loaded by now stays: no collection has to walk through it
    await Gateway(config).run()
