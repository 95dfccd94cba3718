"""The gateway: the process that owns the sockets. Runs no user code, ever.

Owns nothing but the wiring: it makes the parts, leads what happens from one to the other, and ends each tick.
The parts, in the order in which a message meets them:

    hub ─▶ doors ─▶ lifecycle ─▶ inbox ─▶ links ══ host ══▶ links ─▶ effects ─▶ outbox
             │                                                          │
             └─▶ http ─▶ forward ─▶ links                               └─▶ registry, once a tick
"""

import gc
import os
import resource
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, cast

import trio
from cbor2 import dumps

from broker.gateway.admin import Admin
from broker.gateway.answers import RoomRules
from broker.gateway.bodies import SpilledBody
from broker.gateway.calls import Calls
from broker.gateway.connections import CLOSED, NONE, Connections
from broker.gateway.doors import RETRY_AFTER, Doors
from broker.gateway.duplicates import Duplicates
from broker.gateway.effects import Effects
from broker.gateway.forward import Forward
from broker.gateway.handshake import error_response
from broker.gateway.http import HttpFront, HttpReply, HttpRequest
from broker.gateway.hub import Hub
from broker.gateway.inbox import Inbox
from broker.gateway.ledger import (
    EPOCH,
    FORGOTTEN,
    NAMES,
    NUMBER,
    PARTIES,
    STATE,
    TAGS,
    Ledger,
    Record,
    rules_record,
)
from broker.gateway.lifecycle import Lifecycle
from broker.gateway.links import HostLink, Links
from broker.gateway.outbox import Sender
from broker.gateway.parties import PartyView, read_parties
from broker.gateway.quarantine import Quarantine
from broker.gateway.recovery import Remains
from broker.gateway.rooms import RoomRecord, Rooms
from broker.gateway.succession import Succession
from hibernation import wire
from hibernation.configuration import GatewayConfig, report
from hibernation.keeper_messages import SLOTS_MAX
from hibernation.keeping import KeeperClient, KeeperGone, Kept
from hibernation.logs import get_logger
from hibernation.memory import Trimmer
from hibernation.waiting import named
from storage.clock import monotonic
from storage.directory import read_token
from storage.errors import BrokerError, CommitRefused, DataDirectoryInUse
from storage.registry import Registry, RegistryBatch, Row
from storage.writer import Writer

#: Connections closed at once while draining, and the pause between: their clients come back elsewhere, spread
#: in time.
DRAIN_GROUP = 500
DRAIN_PAUSE_SECONDS = 0.05
#: When rooms have had no host for so long while draining, none comes any more: their close turns are the next
#: start's.
HOSTLESS_SECONDS = 2.0
#: How long a gateway looks for its keeper before it gives up, and how long the keeper has to hand out what it
#: holds.
KEEPER_SECONDS = 10.0
#: When nobody is let in any more a successor waits so long for requests under way to be answered, and then
#: for turns under way to end; the turns that have not are run again, the requests are lost (S34).
REQUESTS_SECONDS = 1.0
TURNS_SECONDS = 0.1
#: And so long for rows and sockets to be stored, first while everything goes on, then while nothing does.
SETTLE_SECONDS = 3.0
FREEZE_SECONDS = 0.5
#: Slots beyond those that sockets can be in: connections whose close turn has not ended.
SLOTS_BESIDE = 4096
#: Where the number of files is not limited, this bounds connections; the keeper needs slots beyond them for
#: those whose request has not been decided.
LEDGER_SLOTS_MAX = SLOTS_MAX // 2
#: A tick makes thousands of short-lived lists that no cycle holds: look for cycles less often than by
#: default.
GC_THRESHOLDS = (20_000, 20, 50)

log = get_logger("gateway")


class HandoverRefused(BrokerError):
    """This gateway cannot be succeeded now; it goes on. The text says why."""


def _take_from_keeper(data: Path) -> tuple[KeeperClient, Kept]:
    """A session with the keeper, and all that it holds; it may just be starting."""
    deadline = monotonic() + KEEPER_SECONDS
    while True:
        try:
            keeper = KeeperClient.connect(data)
            return keeper, keeper.take(KEEPER_SECONDS)
        except KeeperGone:
            if monotonic() >= deadline:
                raise
            sleep(0.01)


def _listener(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


def _kept_socket(family: int, descriptor: int, parked: bool) -> socket.socket:
    # With its kind given Python need not ask the kernel for it, nor tell it that nothing may block: the
    # former gateway has, and its duplicates share that.
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    if parked:
        return cast("socket.socket", socket.SocketType(family, kind, 0, descriptor))  # as `lifecycle.plain`
    return socket.socket(family, kind, 0, descriptor)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a gateway finds around it, and how it comes to it. `broker.testing` has others."""

    take_from_keeper: Callable[[Path], tuple[KeeperClient, Kept]] = _take_from_keeper
    """A session with the keeper, and all that it holds."""
    listener: Callable[[int], socket.socket] = _listener
    """The listening socket of this descriptor."""
    kept_socket: Callable[[int, int, bool], socket.socket] = _kept_socket
    """The socket of this family and descriptor, which the keeper has held; whether for a connection."""
    writer: Callable[[str], Writer] = Writer
    """Who commits to the registry."""


USUAL = Surroundings()


class Gateway:
    """See the module. `serve` runs one. It is also what the HTTP side asks (`http.GatewayPort`)."""

    def __init__(
        self, config: GatewayConfig, surroundings: Surroundings = USUAL, *, from_rest: bool = False
    ) -> None:
        """`from_rest`: the gateway before this one is at rest, and goes on if this one raises."""
        settings = config.settings
        self.config = config
        self.dev = config.dev
        self.token = read_token(config.data)
        self.registry = Registry(config.data, durability=settings.durability)
        rows = list(self.registry.surviving())
        keeper, kept = surroundings.take_from_keeper(config.data)
        if from_rest and not set(NAMES) <= set(kept.named):
            raise KeeperGone("the keeper has died since the gateway before this one came to rest")
        if set(NAMES) <= set(kept.named):
            ledger = Ledger({name: kept.named[name] for name in NAMES})
        else:
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            ledger = Ledger.create(min(2 * most + len(rows) + SLOTS_BESIDE, LEDGER_SLOTS_MAX))
            for name, descriptor in ledger.descriptors.items():
                keeper.pin(name, descriptor)
        self.ledger = ledger
        self._writer = surroundings.writer("registry")
        self._storing: tuple[list[tuple[int, int]], RegistryBatch] | None = None
        self._registry_failed = False
        self._trimmer = Trimmer()
        self.connections = Connections(ledger)
        self.rules = RoomRules(self._rules_of)
        self.rooms = Rooms(self.connections, rules=self.rules)
        self.hub = Hub(self._parked, self._end_of_tick, self._each_second)
        self.links = Links(self.hub, settings, config.shard_count, ledger)
        self.inbox = Inbox(self.connections, self.links, settings, config.data / "spill")
        self.inbox.later = self.hub.after
        self.lifecycle: Lifecycle
        self.sender = Sender(self.connections, settings, self._send_failed)
        self.lifecycle = Lifecycle(
            self.hub, self.connections, self.rooms, self.links, self.inbox, self.sender, settings
        )
        self.quarantine = Quarantine()
        self.listener = surroundings.listener(config.listener_fd)
        named = {**ledger.descriptors, "listener": config.listener_fd}
        self.duplicates = Duplicates(
            self.hub, config.data, self.connections, keeper, named, self._held, self._not_held
        )
        self.lifecycle.on_ended = self.duplicates.ended
        self.http = HttpFront(self, settings)
        self.doors = Doors(
            self.hub,
            self.listener,
            self.connections,
            self.rooms,
            self.links,
            self.lifecycle,
            settings,
            dev=config.dev,
            next_number=max(self.registry.next_number(), ledger.header[NUMBER] + 1),
            take_http=self.http.take,
            http_count=self.http.open_count,
            quarantine=self.quarantine,
        )
        self.forward = Forward(self.links, self.links.flush, self.quarantine)
        self.calls = Calls(self.forward, self.links.flush)
        self.effects = Effects(
            self.connections,
            self.rooms,
            self.links,
            self.inbox,
            self.sender,
            self.lifecycle,
            self.doors,
            self.forward,
            self.rules,
        )
        self._admin = Admin(self)
        self.parties: dict[str, PartyView] = {}
        self.descriptions: list[dict[str, Any]] = []
        self._remains = Remains(ledger.records())
        self._survivors: deque[Row] = deque()
        self._ready_reported = False
        #: Set when a successor has everything, or when this process must not go on.
        self._left = trio.Event()
        self._frozen = False
        self._loose: list[socket.socket] = []
        ledger.header[EPOCH] += 1
        self._epoch = ledger.header[EPOCH]
        self.links.on_host = self._host_came
        self.links.on_host_gone = self._host_gone
        self.links.on_message = self.effects.carry_out
        self.links.on_admin = self._admin.serve_socket
        self.effects.on_retire = self._host_retires
        self.effects.on_answer = self._admin.answered
        self.effects.on_quarantine = self._quarantined
        self.effects.on_call = self.calls.called
        self.effects.waits_for = self.calls.waits_for
        self._take_over(rows, kept, surroundings)

    # --- What a former gateway has left -----------------------------------------------------------

    def _take_over(self, rows: list[Row], kept: Kept, surroundings: Surroundings) -> None:
        """Go on where a former gateway was killed."""
        began = monotonic()
        self.hub.second = int(began)
        self._know(self._remains.parties)
        succession = Succession(
            self.connections,
            self.inbox,
            self.sender,
            self.lifecycle,
            self.effects,
            self._remains,
            self._room_of,
        )
        left = succession.take_over(rows, self._kept_sockets(kept, surroundings))
        self._survivors.extend(left)
        self._admit_survivors()
        if self.connections.count:
            log.info(
                "connections taken over",
                connections=self.connections.count,
                torn=self.lifecycle.torn,
                in_ms=round(1000 * (monotonic() - began)),
            )

    def _kept_sockets(self, kept: Kept, surroundings: Surroundings) -> dict[int, socket.socket]:
        """What the keeper holds, by slot; those whose request was not decided are set apart."""
        sockets = {}
        family = self.listener.family
        for slot, descriptor in zip(kept.slots, kept.fds, strict=True):
            parked = slot < self.ledger.capacity
            sock = surroundings.kept_socket(family, descriptor, parked)
            if parked:
                sockets[slot] = sock
            else:
                self._loose.append(sock)
                self.duplicates.ended(slot)
        return sockets

    def _room_of(self, row: Row) -> RoomRecord:
        """The record of a row's room, made if need be."""
        key = f"{row.party}/{row.room}"
        room = self.rooms.by_key.get(key)
        if room is None:
            party = self.parties.get(row.party) or PartyView.unknown(row.party, self.config.settings)
            room = self.rooms.record(key, party, wire.partition_of(key) % self.links.shard_count)
        return room

    def _rules_of(self, key: str) -> bytes | None:
        """What the registry holds of a room's automatic responses; it is another one after `resume`."""
        return self.registry.auto_responses(key)

    def _know(self, descriptions: list[dict[str, Any]]) -> None:
        """These are the parties now."""
        self.descriptions = descriptions
        self.parties = read_parties(descriptions, self.config.settings)
        self.doors.parties = self.forward.parties = self.parties
        self.rooms.know(self.parties)

    def _records(self) -> Iterator[Record]:
        """What a successor has to know, and finds neither in columns nor in the registry."""
        yield Record(PARTIES, 0, 0, 0, dumps(self.descriptions))
        batches = (
            [self.lifecycle.batch] if self._storing is None else [self._storing[1], self.lifecycle.batch]
        )
        for batch in batches:
            for key, rules in batch.auto_responses.items():
                yield rules_record(key, rules)
            for what, number, blob in batch.changes():
                if what == "state":
                    yield Record(STATE, 0, number, blob is not None, blob or b"")
                elif what == "tags":
                    yield Record(TAGS, 0, number, 0, blob or b"")
                else:
                    yield Record(FORGOTTEN, 0, number, 0, b"")
        yield from self.lifecycle.records()
        yield from self.sender.records()

    def begin(self) -> None:
        """Open the door for hosts, and hear of what the writer has done; `hub` and `http` do the rest."""
        self.links.listen(self.config.data / "gateway.sock")
        self.hub.watch(self._writer.fd, self._stored)

    async def run(self) -> None:
        """Serve until SIGTERM; then close every connection with 1012, have the close turns run, and
        return.
        """
        self.begin()
        if self.config.handover:
            report(self.config.status_fd, "ready")  # the sockets are here: there is no way back
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.calls.run)
                nursery.start_soon(self.hub.run)
                await nursery.start(self.http.run)
                await self._told_to_end()
                async with named(log, "stopping: the gateway waits", self._waits_for):
                    if self._frozen:
                        await self.http.drain(self.config.settings.drain)
                    else:
                        await self._drain()
                nursery.cancel_scope.cancel()
        finally:
            self._writer.close()
            if not self._frozen:
                self.links.close()
                if self.lifecycle.batch:
                    self.registry.commit(self.lifecycle.batch)
                self.registry.close()

    async def _told_to_end(self) -> None:
        async with trio.open_nursery() as nursery:

            async def signalled() -> None:
                with trio.open_signal_receiver(signal.SIGTERM) as signals:
                    async for _ in signals:
                        break
                nursery.cancel_scope.cancel()

            nursery.start_soon(signalled)
            await self._left.wait()
            nursery.cancel_scope.cancel()

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
        if self.ledger.is_long:
            self.ledger.rewrite(self._records())
        self.duplicates.flush()
        self.links.flush()

    def _each_second(self, now: float) -> None:
        self.doors.each_second(now)
        self.lifecycle.sweep()
        self.links.acknowledge()
        self._trimmer.each_second(self.inbox.messages + self.lifecycle.accepted)
        if self._registry_failed:
            self._registry_failed = False
        report(self.config.status_fd, "beat")

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
                self.rules.saved(batch.auto_responses)
                if stored:
                    self.duplicates.hold(stored)
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
                stored,
                error_response(503, "the broker cannot store connections at the moment", (RETRY_AFTER,)),
            )
            batch.merge(self.lifecycle.batch)
            self.lifecycle.batch = batch

    def _held(self, slots: list[tuple[int, int]]) -> None:
        """The keeper has these newcomers: now they come in."""
        self.lifecycle.committed(slots)
        self.doors.resume()

    def _not_held(self, slots: list[tuple[int, int]]) -> None:
        """The keeper cannot take these newcomers: nobody comes in who would not outlive this process (F1)."""
        for slot, number in slots:
            if self.connections.holds(slot, number):
                self.lifecycle.forget_row(number)
        self.lifecycle.not_committed(slots, error_response(503, "too many connections", (RETRY_AFTER,)))

    def _send_failed(self, slot: int, cause: str) -> None:
        self.lifecycle.failed(slot, cause)

    # --- Hosts ------------------------------------------------------------------------------------

    def _host_came(self, host: HostLink) -> None:
        descriptions = host.description["parties"]
        if descriptions != self.descriptions:
            self._know(descriptions)
            self.ledger.add(PARTIES, payload=dumps(descriptions))
            self.ledger.commit()
        self.quarantine.forget(host.shards)
        self._admit_survivors()
        self.lifecycle.host_came(host)
        self.doors.host_came(host)
        self.forward.host_came(host)
        if self.links.ready and not self._ready_reported:
            self._ready_reported = True
            self.doors.open()
            loose, self._loose = self._loose, []
            for sock in loose:
                self._admit_loose(sock)
            if not self.config.handover:
                report(self.config.status_fd, "ready")

    def _admit_survivors(self) -> None:
        """Rows without a socket get their close turns, once the parties are known."""
        if not self.parties:
            return
        while self._survivors and not self.connections.is_full:
            row = self._survivors.popleft()
            party = self.parties.get(row.party)
            if party is None or not party.wants_close:
                self.lifecycle.batch.forget(row.number)
            else:
                self.lifecycle.survived(row, self._room_of(row), self._remains)

    def _host_gone(self, host: HostLink) -> None:
        self.lifecycle.host_gone(host)
        self.calls.host_gone(host)
        self.forward.host_gone(host)
        self._admin.host_gone(host)

    def _quarantined(self, key: str, reason: str | None, since: float) -> None:
        shard = wire.partition_of(key) % self.links.shard_count
        self.quarantine.put(key, reason, since, shard)

    def _host_retires(self, host: HostLink) -> None:
        """It starts no more turns: keep what comes for the next one."""
        host.retiring = True
        for shard in host.shards:
            if self.links.by_shard[shard] is host:
                self.links.by_shard[shard] = None
        self.calls.host_retires(host)

    # --- The end ----------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Close every connection with 1012, spread in time, and let the close turns end (S37)."""
        if self._ready_reported:
            self.doors.shut()
        with trio.move_on_after(self.config.settings.drain):
            await self._close_all(0.0)
            await self.http.drain(self.config.settings.drain)
            hostless_since: float | None = None
            hostless = False
            while self.lifecycle.closing_count > self._beyond_help(hostless) or self._storing is not None:
                self._end_of_tick()
                await trio.sleep(0.01)
                now = monotonic()
                if self.links.ready:
                    hostless_since = None
                elif hostless_since is None:
                    hostless_since = now
                hostless = hostless_since is not None and now - hostless_since >= HOSTLESS_SECONDS
        self.lifecycle.leave_endings()

    def _waits_for(self) -> dict[str, object]:
        """What is not over yet at the end, for the log."""
        close_turns = self.connections.phase.count(CLOSED)
        return {
            "connections": 0 if self._frozen else self.lifecycle.closing_count - close_turns,
            "close_turns": 0 if self._frozen else close_turns,
            "http_connections": self.http.open_count(),
            "requests": self.forward.in_progress,
            "registry": self._storing is not None,
            "without_host": not self._frozen and not self.links.ready,
        }

    async def _close_all(self, seconds: float) -> int:
        """Close every connection, evenly over `seconds`, and never more than DRAIN_GROUP at once."""
        leaving = self.lifecycle.drain()
        total = len(leaving)
        group = DRAIN_GROUP
        if seconds > 0:
            group = min(group, max(1, round(total * DRAIN_PAUSE_SECONDS / seconds)))
        while leaving:
            for _ in range(min(group, len(leaving))):
                slot, number = leaving.popleft()
                if self.connections.holds(slot, number):
                    self.lifecycle.close(slot, 1012, "service restart", "server_close")
            self._end_of_tick()
            await trio.sleep(DRAIN_PAUSE_SECONDS)
        return total

    # --- A successor ------------------------------------------------------------------------------

    async def freeze(self, patience_seconds: float = 0.0) -> float:
        """Stop at a point from which a successor can go on: nothing is read any more, all that was decided is
        in ledger, registry and keeper. Until `leave` this gateway can `resume`.

        HTTP requests that have begun get `patience_seconds` to be answered while everything goes on as usual;
        those that come meanwhile have REQUESTS_SECONDS.

        Returns:
            When reading stopped, as `time.monotonic` has it.

        Raises:
            HandoverRefused: It is not possible now; everything goes on.
        """
        begun = self.forward.numbers
        with trio.move_on_after(patience_seconds):
            while begun & self.forward.numbers:  # noqa: ASYNC110 - once for each request would cost them all
                await trio.sleep(0.02)
        if self._frozen or not self._ready_reported or self.lifecycle.draining:
            raise HandoverRefused("this gateway is not serving")
        self.doors.rest()
        try:
            # While everything goes on: who is half inside comes in, and requests are answered.
            with trio.move_on_after(REQUESTS_SECONDS):
                while self.forward.in_progress:  # noqa: ASYNC110 - it is polled for a moment
                    await trio.sleep(0.002)
            with trio.fail_after(SETTLE_SECONDS):
                while self.lifecycle.storing_count or not self.duplicates.is_there:  # noqa: ASYNC110
                    await trio.sleep(0.002)
            self.hub.pause()
            paused_at = monotonic()
            self._frozen = True
            with trio.move_on_after(TURNS_SECONDS):
                while any(host.inflight_bytes for host in self.links.hosts):  # noqa: ASYNC110
                    await trio.sleep(0.002)
            with trio.fail_after(FREEZE_SECONDS):
                while not self._is_stored():
                    self._end_of_tick()
                    await trio.sleep(0.001)
                self._loose = self.doors.give_up()
                await self.duplicates.pass_on(self._loose)
        except (trio.TooSlowError, KeeperGone) as error:
            self._go_on()
            raise HandoverRefused(str(error) or "rows or sockets were not stored in time") from error
        self.duplicates.leave()
        self.links.close()
        self.ledger.rewrite(self._records())
        self.ledger.rest(memoryview(self.connections.written))
        self.registry.close()
        (self.config.data / "gateway.sock").unlink(missing_ok=True)
        return paused_at

    def _is_stored(self) -> bool:
        """Whether everything is in the registry."""
        return self._storing is None and not self.lifecycle.storing_count and not self.lifecycle.batch

    def resume(self) -> None:
        """Go on as if nothing had happened; but if a successor has begun, this one ends instead."""
        if not self._frozen or self._left.is_set():
            return
        try:
            self.registry = Registry(self.config.data, durability=self.config.settings.durability)
        except DataDirectoryInUse:
            self.leave()
            return
        if self.ledger.header[EPOCH] != self._epoch:
            self.registry.close()
            self.leave()
            return
        self.ledger.wake()
        self.links.listen(self.config.data / "gateway.sock")
        self.duplicates.go_on()
        self._go_on()
        log.warning("no successor came: this gateway goes on")

    def _go_on(self) -> None:
        self._frozen = False
        self.hub.go_on()
        self.lifecycle.look_everywhere()
        loose, self._loose = self._loose, []
        self.doors.open()
        for index, sock in enumerate(loose):
            self.duplicates.ended(self.ledger.capacity + index)
            self._admit_loose(sock)

    def leave(self) -> None:
        """A successor has everything: end, when the HTTP requests that came here are answered."""
        self._left.set()

    @property
    def frozen(self) -> bool:
        """Whether it waits for a successor."""
        return self._frozen and not self._left.is_set()

    def _admit_loose(self, sock: socket.socket) -> None:
        """A client whose request had not been decided when the gateway changed."""
        try:
            address = sock.getpeername()[:2]
        except OSError:
            sock.close()
            return
        self.doors.give_back(sock, address)

    async def drain(self, seconds: float) -> int:
        """Let nobody in any more, and close every connection with 1012, spread over so many seconds. The
        gateway stays, empty. Gives how many were closed.
        """
        return await self._close_all(seconds)

    def _beyond_help(self, hostless: bool) -> int:
        """Connections that only turns can take further, of rooms that do not start, or, if `hostless`, have
        no host: their close turns come when they do, after this end. Who still owes us its Close, or has not
        read ours, is none of them.
        """
        if not self.quarantine and not hostless:
            return 0
        by_shard, needs_turn = self.links.by_shard, self.lifecycle.needs_turn
        return sum(
            room is not None
            and (room.key in self.quarantine or (hostless and by_shard[room.shard] is None))
            and needs_turn(slot)
            for slot, room in enumerate(self.connections.room)
        )

    # --- What the HTTP side asks ------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether every shard has its host."""
        return self.links.ready and not self.lifecycle.draining

    def paused(self) -> str | None:
        """Why commits wait for the disk on some host (S36); None: they do not."""
        return next((host.paused for host in self.links.hosts if host.paused is not None), None)

    def give_back(self, sock: socket.socket, client: tuple[str, int]) -> None:
        """An upgrade on a kept-alive connection."""
        self.doors.give_back(sock, client)
        self._end_of_tick()

    def streams(self, party: str | None) -> bool:
        """Whether requests to this party are passed on before their body is there."""
        view = self.parties.get("main" if party is None else party)
        return view is not None and view.streams_requests

    def spill(self) -> SpilledBody:
        """A place for a body that is too large for memory."""
        return SpilledBody(self.inbox.spills)

    async def request(self, request: HttpRequest) -> HttpReply:
        """A request for a room, or for `on_fetch`."""
        return await self.forward.request(request)

    async def admin(self, method: str, path: str, query: bytes) -> Any:
        """A question to the admin pages' interface."""
        return await self._admin.http(method, path, query)


async def serve(config: GatewayConfig, from_rest: bool = False) -> None:
    """Run a gateway until it is told to stop; `from_rest` as of `Gateway`."""
    os.umask(0o077)
    sys.setswitchinterval(0.001)
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()  # what is loaded by now stays: no collection has to walk through it
    gc.disable()  # what is taken over stays, too
    gateway = Gateway(config, from_rest=from_rest)
    gc.enable()
    gc.freeze()
    await gateway.run()
