"""The doors: who comes in. Accepts, peeks at the head of the first request, and decides.

Owns the listener and the connections whose head has not come yet. An upgrade goes through the strict gate and
every limit of S37 and S38, and becomes a connection of `lifecycle`; any other request is passed, unread, to
the HTTP side. Must not read a byte beyond what it decides on. Peers: `handshake`, `routes` (pure), `http`,
`lifecycle`.
"""

import errno
import resource
import secrets
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from cbor2 import dumps

from broker.gateway.connections import ADMITTING, CLOSING, CONNECTING, ENDING, Connections
from broker.gateway.deflate import choose_deflate
from broker.gateway.forwarding import Proxies
from broker.gateway.handshake import (
    Head,
    HeadError,
    Upgrade,
    check_upgrade,
    choose_subprotocol,
    error_response,
    is_upgrade,
    origin_allowed,
    parse_head,
    switching_response,
)
from broker.gateway.hub import EPOLLET, EPOLLIN, Hub
from broker.gateway.lifecycle import Lifecycle, Newcomer
from broker.gateway.links import HostLink, Links
from broker.gateway.parties import PartyView
from broker.gateway.quarantine import RETRY_AFTER as QUARANTINED_RETRY_AFTER
from broker.gateway.quarantine import Quarantine
from broker.gateway.rooms import RoomRecord, Rooms
from broker.gateway.routes import Route, connection_id, parse_route
from hibernation import wire
from hibernation.logs import get_logger
from hibernation.settings import Settings

#: Accepted in one go, so that parked connections are served in between.
ACCEPTS_PER_TICK: Final = 128
#: Rows on their way to disk beyond which nobody is accepted: the others wait in the listener's backlog.
STORING_MAX: Final = 256
#: Descriptors kept for files, links, hosts and HTTP.
DESCRIPTORS_RESERVED: Final = 512
#: Pause after the kernel refused a descriptor; and the least time between two log lines about it.
EXHAUSTED_PAUSE_SECONDS: Final = 0.2
EXHAUSTED_LOG_SECONDS: Final = 10.0
RETRY_AFTER: Final = ("Retry-After", "1")

log = get_logger("doors")

Address = tuple[str, int]


class Doors:
    """See the module."""

    def __init__(
        self,
        hub: Hub,
        listener: socket.socket,
        connections: Connections,
        rooms: Rooms,
        links: Links,
        lifecycle: Lifecycle,
        settings: Settings,
        *,
        dev: bool,
        next_number: int,
        take_http: Callable[[socket.socket, Address], None],
        http_count: Callable[[], int],
        quarantine: Quarantine,
    ) -> None:
        self._hub = hub
        self._listener = listener
        self._connections = connections
        self._rooms = rooms
        self._links = links
        self._lifecycle = lifecycle
        self._settings = settings
        self._dev = dev
        self._next_number = next_number
        self._take_http = take_http
        self._http_count = http_count
        self._quarantine = quarantine
        self._proxies = Proxies(settings.trusted_proxies)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max(64, soft - DESCRIPTORS_RESERVED)
        self.connections_max = min(settings.connections_max or most, most)
        #: Connections whose head has not come, by descriptor, the oldest first: socket, address, since when.
        self._waiting: dict[int, tuple[socket.socket, Address, float]] = {}
        self._open = False
        self._resting = False
        self._asked: dict[int, tuple[int, int]] = {}
        # A host may still say what was meant for a former gateway: its numbers are none of ours.
        self._question = secrets.randbits(52)
        self._exhausted_logged = 0.0
        self.parties: dict[str, PartyView] = {}
        self.refused: dict[int, int] = {}
        lifecycle.on_duplicate = self._duplicate
        lifecycle.on_vacant = self._vacant

    def open(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts inherits it
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._settings.send_buffer_bytes)
        self._hub.watch(self._listener.fileno(), self._accept)
        self._open, self._resting = True, False

    def shut(self) -> None:
        """Accept no more; the listener stays open, for whoever comes next."""
        self.rest()
        for sock in self.give_up():
            sock.close()

    def rest(self) -> None:
        """Accept no more for now: who comes waits in the listener."""
        if self._open:
            self._open = False
            self._hub.unwatch(self._listener.fileno())

    def give_up(self) -> list[socket.socket]:
        """Those whose request has not come, or is not decided yet, in all cases unread: they are somebody
        else's.
        """
        waiting = [sock for sock, _, _ in self._waiting.values()]
        for sock in waiting:
            self._stop_waiting(sock)
        self._asked.clear()
        return waiting + self._lifecycle.give_up()

    @property
    def half_open(self) -> int:
        """Connections whose request has not come yet."""
        return len(self._waiting)

    # --- Accepting --------------------------------------------------------------------------------

    def _accept(self, _: int) -> None:
        accept = self._listener.accept
        for _ in range(ACCEPTS_PER_TICK):
            if self._lifecycle.storing_count >= STORING_MAX:
                self._resting = True
                self._hub.rewatch(self._listener.fileno(), 0)
                return
            try:
                sock, address = accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._exhausted(error)
                    return
                continue
            sock.setblocking(False)
            held = self._connections.count + len(self._waiting) + self._http_count()
            if held >= self.connections_max or self._connections.is_full:
                self._refuse(sock, 503, "too many connections", [RETRY_AFTER])
                continue
            self._examine(sock, address[:2], first=True)

    def resume(self) -> None:
        """Rows have reached the disk: accept again, if that was what was waited for."""
        if self._resting and self._open:
            self._resting = False
            self._hub.rewatch(self._listener.fileno(), EPOLLIN)

    def _exhausted(self, error: OSError) -> None:
        """No descriptor is left: rest a moment instead of turning in circles."""
        if self._hub.now - self._exhausted_logged > EXHAUSTED_LOG_SECONDS:
            self._exhausted_logged = self._hub.now
            log.error(
                "cannot accept: raise the limit of open files, or lower connections_max", error=str(error)
            )
        descriptor = self._listener.fileno()
        self._hub.rewatch(descriptor, 0)
        self._hub.after(EXHAUSTED_PAUSE_SECONDS, self._accept_again)

    def _accept_again(self) -> None:
        """Descriptors may be free again."""
        if self._open and not self._resting:
            self._hub.rewatch(self._listener.fileno(), EPOLLIN)

    def _examine(self, sock: socket.socket, address: Address, *, first: bool = False) -> None:
        """Look at what has come of the head, without taking it."""
        try:
            data = sock.recv(self._settings.head_bytes_max + 1, socket.MSG_PEEK)
        except BlockingIOError:
            if first:
                self._wait(sock, address)
            return
        except OSError:
            data = b""
        if not data:
            self._stop_waiting(sock)
            sock.close()
            return
        if data.startswith(b"PRI"):
            self._stop_waiting(sock)
            self._take_http(sock, address)  # HTTP/2 with prior knowledge, RFC 9113, section 3.3
            return
        try:
            head = parse_head(data, self._settings.head_bytes_max)
            if head is None:
                if first:
                    self._wait(sock, address)
                return
            if not first:
                self._stop_waiting(sock)
            if is_upgrade(head):
                self._upgrade(sock, address, head)
            else:
                self._take_http(sock, address)
        except HeadError as error:
            self._stop_waiting(sock)
            self._refuse(sock, error.status, error.reason, error.headers)

    def _wait(self, sock: socket.socket, address: Address) -> None:
        descriptor = sock.fileno()
        self._waiting[descriptor] = (sock, address, self._hub.now)
        # Edge-triggered: a head that is not whole yet is only peeked, and would be reported for ever.
        self._hub.watch(descriptor, partial(self._more_came, sock, address), EPOLLIN | EPOLLET)

    def _more_came(self, sock: socket.socket, address: Address, _events: int) -> None:
        self._examine(sock, address)

    def _stop_waiting(self, sock: socket.socket) -> None:
        descriptor = sock.fileno()
        waiting = self._waiting.get(descriptor)
        if waiting is not None and waiting[0] is sock:
            del self._waiting[descriptor]
            self._hub.unwatch(descriptor)

    def each_second(self, now: float) -> None:
        """Refuse those whose head has not come in time (S37)."""
        latest = now - self._settings.handshake_timeout_seconds
        while self._waiting:
            sock, _, since = next(iter(self._waiting.values()))
            if since > latest:
                return
            self._stop_waiting(sock)
            self._refuse(sock, 408, "the request did not come in time")

    def give_back(self, sock: socket.socket, address: Address) -> None:
        """The HTTP side found an upgrade on a kept-alive connection; its head is still unread."""
        self._examine(sock, address, first=True)

    def _refuse(self, sock: socket.socket, status: int, text: str, headers: Any = ()) -> None:
        self.refused[status] = self.refused.get(status, 0) + 1
        self._lifecycle.say_goodbye(sock, error_response(status, text, headers))

    # --- Upgrades ---------------------------------------------------------------------------------

    def _upgrade(self, sock: socket.socket, address: Address, head: Head) -> None:
        """Every check that needs no waiting; then the slot, and what has to be asked."""
        upgrade = check_upgrade(head)
        route = parse_route(head.raw_path)
        if route is None:
            raise HeadError(404, "no room here: the address is /party/ID or /parties/NAME/ID")
        party = self.parties.get(route.party)
        if party is None:
            if not self.parties:
                raise HeadError(503, "not ready", (RETRY_AFTER,))
            raise HeadError(404, "unknown party")
        settings = party.settings
        if not origin_allowed(upgrade.origin, upgrade.host, settings.origins, self._dev):
            raise HeadError(403, "this origin may not connect")
        if self._lifecycle.draining:
            raise HeadError(503, "shutting down", (RETRY_AFTER,))
        given = connection_id(head.query)
        client, scheme = self._proxies.client(address, head.headers)
        counted = "" if self._proxies.trusts(client[0]) else str(client[0])
        if self._lifecycle.addresses.count(counted) >= self._settings.address_connections_max:
            raise HeadError(503, "too many connections from this address", (RETRY_AFTER,))
        key = f"{party.name}/{route.room}"
        if key in self._quarantine:
            raise HeadError(503, "this room does not start at the moment", QUARANTINED_RETRY_AFTER)
        room = self._rooms.by_key.get(key)
        if room is None:
            shard = wire.partition_of(key) % self._links.shard_count
            room = self._rooms.record(key, party, shard)
        elif room.count + room.arriving >= settings.room_connections_max:
            raise HeadError(503, "too many connections in this room", (RETRY_AFTER,))
        self._admit(sock, address, counted, head, upgrade, route, room, given, client, scheme)

    def _admit(
        self,
        sock: socket.socket,
        address: Address,
        counted: str,
        head: Head,
        upgrade: Upgrade,
        route: Route,
        room: RoomRecord,
        given: str | None,
        client: Address,
        scheme: str,
    ) -> None:
        table = self._connections
        party = room.party
        name = given or secrets.token_urlsafe(16)
        uri = f"{scheme}://{upgrade.host}{head.target}"
        number = self._next_number
        self._next_number += 1
        subprotocol = choose_subprotocol(upgrade.protocols, party.subprotocols)
        request = b""
        if party.wants_before_connect or party.wants_connect:
            fields = {
                "party": party.name,
                "room": route.room,
                "rest": route.rest,
                "method": head.method,
                "scheme": scheme,
                "path": head.path,
                "raw_path": head.raw_path,
                "query": head.query.encode("latin-1"),
                "headers": self._proxies.clean(address, head.headers),
                "client": client,
                "http_version": "1.1",
            }
            request = dumps(fields)  # as bytes it is small, and whoever never looks at it never decodes it
        slot = table.allocate(number, sock, room, wire.make_card(name, uri, b""), int(self._hub.now))
        table.watch(sock.fileno(), slot)
        agreed = choose_deflate(upgrade.extensions) if party.settings.compression == "deflate" else None
        if agreed is not None:
            table.agree(slot, agreed.window_bits)
        answer = switching_response(upgrade.key, subprotocol, None if agreed is None else agreed.answer)
        self._lifecycle.introduce(slot, Newcomer(answer, head.length, request, name, uri, counted))
        if given is not None:
            other = table.find(room, given)
            if other is not None:
                self._settle_duplicate(slot, other, party)
                return
            table.index(slot, name)
        else:
            table.index(slot, name)
        self._ask_before(slot)

    def _settle_duplicate(self, slot: int, other: int, party: PartyView) -> None:
        """Somebody in the room has this id already (S10)."""
        policy = party.settings.duplicate_ids
        phase = self._connections.phase[other]
        if phase in (ENDING, CLOSING) or self._lifecycle.has_ended(other):
            self._connections.unindex(other)  # on its way out: the id is free
            self._vacant(slot)
        elif policy == "refuse" or phase < CONNECTING:
            self._duplicate(slot)
        elif policy == "replace":
            self._lifecycle.replace(other)
            self._vacant(slot)
        else:
            self._lifecycle.probe(other, slot, party.settings.probe_seconds)

    def _duplicate(self, slot: int) -> None:
        newcomer = self._lifecycle.newcomer(slot)
        self._lifecycle.turn_away_open(slot, newcomer.head, 4409, "this id is connected already")

    def _vacant(self, slot: int) -> None:
        table = self._connections
        room = table.room[slot]
        newcomer = self._lifecycle.newcomer(slot)
        assert room is not None
        other = table.find(room, newcomer.connection_id)
        if other is not None and other != slot:
            self._settle_duplicate(slot, other, room.party)  # somebody was quicker
            return
        table.index(slot, newcomer.connection_id)
        self._ask_before(slot)

    # --- The before-hook --------------------------------------------------------------------------

    def _ask_before(self, slot: int) -> None:
        table = self._connections
        room = table.room[slot]
        assert room is not None
        if not room.party.wants_before_connect:
            self._lifecycle.store(slot)
            return
        self._question = number = self._question + 1
        self._asked[number] = (slot, table.number[slot])
        link = self._links.by_shard[room.shard]
        if link is not None:
            link.put([wire.BEFORE, room.key, number, self._lifecycle.newcomer(slot).request])

    def host_came(self, host: HostLink) -> None:
        """Ask again what the host before it did not answer."""
        table = self._connections
        for number, (slot, connection) in list(self._asked.items()):
            room = table.room[slot] if table.holds(slot, connection) else None
            if room is None:
                del self._asked[number]
            elif room.shard not in host.shards:
                continue
            elif room.party.name not in self.parties:
                self.answered(number, 404, [], b"unknown party\n")
            elif not room.party.wants_before_connect:
                del self._asked[number]
                self._lifecycle.store(slot)
            else:
                host.put([wire.BEFORE, room.key, number, self._lifecycle.newcomer(slot).request])

    def answered(self, number: int, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """What the before-hook decided: status 0 lets the client in."""
        slot, connection = self._asked.pop(number, (0, 0))
        if not connection or not self._connections.holds(slot, connection):
            return
        if self._connections.phase[slot] != ADMITTING:
            return
        if status:
            self.refused[status] = self.refused.get(status, 0) + 1
            named = [(name, value) for name, value in headers if name.lower() not in _FRAMING]
            try:
                answer = error_response(status, body, named)
            except ValueError as error:
                log.error("a refusal cannot be sent", error=str(error))
                answer = error_response(500, "internal error")
            self._lifecycle.turn_away(slot, answer)
            return
        self._lifecycle.newcomer(slot).request = body
        self._lifecycle.store(slot)


#: Headers of a refusal that are the gateway's own matter.
_FRAMING: Final = frozenset({"connection", "content-length", "transfer-encoding", "upgrade"})
