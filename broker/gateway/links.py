"""The gateway's ends of the links to its hosts: sockets, numbering, and what is on its way.

Owns the Unix socket `gateway.sock`, the greeting of whoever connects to it (a host, or the command line with
an admin question), and for each host the outgoing batch of the present tick. Must not know what an item
means; messages go to `on_message`. Peers: `hibernation.link` (pure numbering), `hibernation.host` at the
other end.

A host comes with results that no gateway is known to have carried out: of turns that ended before this link,
or before this host. They are carried out first. Only when it has said that this was all (`synced`) is it
given events: what is given out before would be turns that have ended already.
"""

import contextlib
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from broker.gateway.hub import EPOLLIN, EPOLLOUT, Hub
from broker.gateway.ledger import Ledger
from hibernation import wire
from hibernation.link import Link, LinkError, StreamDecoder, encode
from hibernation.logs import get_logger
from hibernation.settings import Settings

#: Read from a host at once: below what malloc(3) maps and unmaps anew each time.
READ_BYTES: Final = 64 * 1024
#: Items of one link message. A burst of thousands goes in several: as bytes they cost a tenth of what they
#: cost as objects, on both sides.
ITEMS_MAX: Final = 128
GREETING_BYTES_MAX: Final = 1024 * 1024

log = get_logger("links")


class HostLink:
    """One host that is there."""

    __slots__ = (
        "_hub",
        "_known",
        "_outgoing",
        "_socket",
        "bytes_max",
        "description",
        "executed",
        "incarnation",
        "index",
        "inflight_bytes",
        "link",
        "messages",
        "out",
        "paused",
        "retiring",
        "shards",
        "synced",
        "token",
        "waiting",
    )

    def __init__(
        self,
        hub: Hub,
        sock: socket.socket,
        description: dict[str, Any],
        settings: Settings,
        executed: int = 0,
    ) -> None:
        self._hub = hub
        self._socket = sock
        self.messages = StreamDecoder()
        self._outgoing = bytearray()
        self._known = 0
        #: Newest message of the host whose results have all been carried out.
        self.executed = executed
        self.incarnation: int = description.get("incarnation", 0)
        #: It has said all that ended before this link, and may be given events; until then its results belong
        #: to turns that this gateway, or this link, did not give out.
        self.synced = False
        #: What it has to say for that: one that was kept for a former gateway says another.
        self.token = secrets.randbits(52)
        #: Why its disk refuses commits; None: it does not.
        self.paused: str | None = None
        self.description = description
        self.index: int = description["index"]
        self.shards: list[int] = description["shards"]
        self.link = Link(executed)
        self.out: list[Any] = []
        self.retiring = False
        #: Bytes of frames given to this host and not acknowledged (S24), and who waits for that to shrink.
        self.inflight_bytes = 0
        self.bytes_max = settings.link_inflight_bytes_max
        self.waiting: deque[int] = deque()

    def put(self, item: list[Any]) -> None:
        """Add an item to what leaves at the end of the tick."""
        if not self.out:
            # An item may be older than what arrives while the batch grows, or than the rest of the message
            # that is being carried out: acknowledge no more than what it knows.
            self._known = self.executed
        self.out.append(item)
        if len(self.out) >= ITEMS_MAX:
            self.flush()

    def welcome(self) -> None:
        """Answer its greeting."""
        self._write(encode({"received": self.executed, "token": self.token}))

    @property
    def is_full(self) -> bool:
        """Whether no further message may be given to this host now."""
        return self.inflight_bytes >= self.bytes_max

    def flush(self) -> None:
        """Send what the tick has gathered, as one message."""
        if not self.out:
            return
        items, self.out = self.out, []
        self._write(self.link.pack(items, self._known))

    def acknowledge(self) -> None:
        """Say what has arrived, if nothing else has said it; behind the items that may be older than that."""
        self.flush()
        short = self.link.acknowledgement()
        if short is not None:
            self._write(short)

    def repeat(self) -> None:
        """The host misses something: send everything that it has not acknowledged."""
        for data in self.link.unacknowledged():
            self._write(data)

    def ask_repetition(self) -> None:
        """Something of the host's is missing here."""
        self._write(self.link.repetition_request())

    def _write(self, data: bytes) -> None:
        if self._outgoing:
            self._outgoing += data
            return
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # its end is noticed where it is read
        if sent < len(data):
            self._outgoing += memoryview(data)[sent:]
            self._hub.rewatch(self._socket.fileno(), EPOLLIN | EPOLLOUT)

    def writable(self) -> None:
        """The socket has room again."""
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:
            self._outgoing.clear()
        self._hub.rewatch(self._socket.fileno(), EPOLLIN)

    @property
    def has_more(self) -> bool:
        """Whether something has come that is not read; its end included."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def read(self) -> bool:
        """Read what has come, for `messages`. False: the host has gone."""
        try:
            try:
                data = self._socket.recv(READ_BYTES)
            except ConnectionResetError:
                data = self._socket.recv(
                    READ_BYTES
                )  # it died with unread data; what it has said is still here
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.messages.feed(data)
        return bool(data)

    def close(self) -> None:
        """The host has gone, or must."""
        self._hub.unwatch(self._socket.fileno())
        self._socket.close()


class Links:
    """All hosts, and the door at which they knock."""

    def __init__(self, hub: Hub, settings: Settings, shard_count: int, ledger: Ledger) -> None:
        self._hub = hub
        self._settings = settings
        self._ledger = ledger
        self.shard_count = shard_count
        self.by_shard: list[HostLink | None] = [None] * shard_count
        self.hosts: list[HostLink] = []
        # Set by the core, which is made of things that need the links.
        self.on_host: Callable[[HostLink], None]
        self.on_host_gone: Callable[[HostLink], None]
        self.on_message: Callable[[HostLink, int, bytes | bytearray, list[Any]], None]
        self.on_admin: Callable[[socket.socket], None]
        self._listener: socket.socket | None = None

    def listen(self, path: Path) -> None:
        """Open the door at `path`, for processes of this user alone (S39)."""
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(64)
        self._listener = listener
        self._hub.watch(listener.fileno(), self._accept)

    def close(self) -> None:
        """Close the door and every link: all hosts have gone."""
        if self._listener is not None:
            self._hub.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for host in list(self.hosts):
            host.flush()
            host.acknowledge()
            self._gone(host)

    def flush(self) -> None:
        """End of a tick."""
        for host in self.hosts:
            if host.out:
                host.flush()

    def acknowledge(self) -> None:
        """About once a second: do not let the other side keep what has arrived long ago."""
        for host in self.hosts:
            host.acknowledge()

    @property
    def ready(self) -> bool:
        """Whether every shard has its host."""
        return None not in self.by_shard

    def _accept(self, _: int) -> None:
        assert self._listener is not None
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (os.geteuid(), 0):
            sock.close()
            return
        Greeting(self, self._hub, sock)

    def greeted(self, sock: socket.socket, description: dict[str, Any]) -> None:
        """A host has said who it is."""
        reason = self._objection(description)
        if reason:
            log.error("a host is turned away", pid=description.get("pid"), reason=reason)
            with contextlib.suppress(OSError):
                sock.send(encode({"error": reason}))
            sock.close()
            return
        incarnation, shards = description["incarnation"], set(description["shards"])
        for former in [each for each in self.hosts if not shards.isdisjoint(each.shards)]:
            # It has ended, or else these shards could not be open again. What it has said still counts.
            while former in self.hosts and former.has_more:
                self._ready(former, EPOLLIN)
            self._gone(former)
        for shard, generation in description["generations"].items():
            self._ledger.note_generation(shard, generation)
        # What a gateway has acknowledged the host does not have any more, whether or not this one knows of
        # it.
        executed = self._ledger.meet_host(description["index"], incarnation, description["acknowledged"])
        host = HostLink(self._hub, sock, description, self._settings, executed)
        self.hosts.append(host)
        self._hub.watch(sock.fileno(), lambda events: self._ready(host, events))
        host.welcome()

    def _objection(self, description: dict[str, Any]) -> str:
        """Why this host may not serve; empty: it may."""
        version, shard_count = description["version"], description["shard_count"]
        if version != wire.VERSION:
            return f"it speaks version {version} of the link, and this gateway {wire.VERSION}: restart both"
        if shard_count != self.shard_count:
            return f"it counts {shard_count} shards, and this gateway {self.shard_count}: restart both"
        for shard, generation in description["generations"].items():
            newest = self._ledger.generation(shard)
            if generation < newest:
                return (
                    f"its generation {generation} of shard {shard} has been replaced by generation {newest}"
                )
        return ""

    def synced(self, host: HostLink, token: int) -> None:
        """The host has said all that ended before; from now on it is given events."""
        if token != host.token or host.synced:
            return
        host.synced = True
        if host.retiring:
            return
        for shard in host.shards:
            self.by_shard[shard] = host
        self.on_host(host)

    def _ready(self, host: HostLink, events: int) -> None:
        if events & EPOLLOUT:
            host.writable()
        if not events & ~EPOLLOUT:
            return
        try:
            there = host.read()
            link = host.link
            for message in host.messages:
                if link.is_gap(message):
                    host.ask_repetition()
                if link.wants_repetition(message):
                    host.repeat()
                items = link.take(message)
                if items:
                    self.on_message(host, link.received, host.messages.raw, items)
                host.executed = link.received
                if link.wants_acknowledgement(message):
                    host.acknowledge()
            if host.retiring:
                host.acknowledge()  # it waits for that, to leave nothing behind
            if not there:
                self._gone(host)
        except LinkError as error:
            log.error("a link is broken; its host is turned away", error=str(error))
            self._gone(host)

    def _gone(self, host: HostLink) -> None:
        if host not in self.hosts:
            return
        self.hosts.remove(host)
        host.close()
        for shard, other in enumerate(self.by_shard):
            if other is host:
                self.by_shard[shard] = None
        self.on_host_gone(host)


class Greeting:
    """Somebody has knocked: read the first value, which says who it is, and pass the socket on."""

    def __init__(self, links: Links, hub: Hub, sock: socket.socket) -> None:
        self._links = links
        self._hub = hub
        self._socket = sock
        self._buffer = bytearray()
        hub.watch(sock.fileno(), self._ready)

    def _ready(self, _: int) -> None:
        try:
            # Not a byte behind the greeting may be taken: it belongs to whoever reads next.
            peeked = self._socket.recv(GREETING_BYTES_MAX, socket.MSG_PEEK)
            if len(peeked) < 4:
                missing = not peeked
                size = 0
            else:
                missing = False
                size = 4 + int.from_bytes(peeked[:4], "big")
            if missing or size > GREETING_BYTES_MAX:
                raise LinkError("no greeting")
            if not size or len(peeked) < size:
                return
            data = self._socket.recv(size)
            decoder = StreamDecoder(GREETING_BYTES_MAX)
            decoder.feed(data)
            greeting = next(decoder)
        except BlockingIOError:
            return
        except (OSError, LinkError):
            self._hub.unwatch(self._socket.fileno())
            self._socket.close()
            return
        self._hub.unwatch(self._socket.fileno())
        role = greeting.get("role") if isinstance(greeting, dict) else None
        if role == "host":
            self._links.greeted(self._socket, greeting)
        elif role == "admin":
            self._links.on_admin(self._socket)
        else:
            self._socket.close()


__all__ = ["HostLink", "Links", "encode"]
