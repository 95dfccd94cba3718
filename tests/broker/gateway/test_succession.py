"""A gateway is killed between any two of its steps, and another one goes on (S22, S34).

The parts are the real ones, on real TCP connections. What is not real is the kill: every store to the ledger
and every call that moves a socket's stream is a step, and before one of them, whichever the test wants, the
gateway stops for good. The next one gets what a keeper would have: duplicates of the sockets, and the memory.
What must hold then is what clients and host see: each frame once, whole and in order; each message's turn, or
its automatic response, once; each 101 whole.

Every gateway compresses in another way than the one before it, as one with another zlib would, so a frame
that two of them had made would show.
"""

import os
import random
import select
import socket
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cbor2 import loads
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.gateway import deflate
from broker.gateway.answers import RoomRules
from broker.gateway.connections import CLOSED, CONNECTING, FREE, OPEN, Connections
from broker.gateway.effects import Effects
from broker.gateway.frames import encode_message, encode_ping
from broker.gateway.hub import ENDED, EPOLLIN, EPOLLOUT
from broker.gateway.inbox import Inbox
from broker.gateway.ledger import HIGH, NAMES, Ledger
from broker.gateway.lifecycle import Lifecycle, Newcomer
from broker.gateway.links import HostLink
from broker.gateway.outbox import Sender
from broker.gateway.parties import PartyView
from broker.gateway.recovery import Remains, position
from broker.gateway.rooms import RoomRecord, Rooms
from broker.gateway.succession import Succession
from hibernation import wire
from hibernation.link import Link, StreamDecoder
from hibernation.settings import Settings
from storage.registry import Closing, RegistryBatch, Row
from tests.e2e.raw_client import CLOSE, CONTINUATION, TEXT, encode_frame

HEAD = b"GET /party/room HTTP/1.1\r\n\r\n"
ANSWER = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
INCARNATION = 77
ROOM = "main/room"
#: What the party answers by itself: to "?", and to whatever begins with "?long".
REPLIES = {"?": "!", "?long": "!" * 2000}
#: Clients of these numbers have agreed to compression, with a window of so many bits.
WINDOWS = {1: 15, 3: 10}


class Killed(BaseException):
    """The gateway was killed here."""


class Kill:
    """Counts steps, and kills before the one that is wanted; then nothing happens any more."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.at and self.steps >= self.at:
            raise Killed


class Column:
    """Memory of the ledger, each store a step."""

    def __init__(self, memory: Any, kill: Kill) -> None:
        self._memory = memory
        self._kill = kill

    def __getitem__(self, index: int) -> int:
        return int(self._memory[index])

    def __setitem__(self, index: int | slice, value: Any) -> None:
        self._kill.step()
        self._memory[index] = value


class Socket(socket.socket):
    """A real socket, each call that moves its streams a step; so is its coming back."""

    kill: Kill

    def send(self, data: Any, *flags: Any) -> int:
        self.kill.step()
        sent = super().send(data, *flags)
        self.kill.step()
        return sent

    def recv(self, size: int, *flags: Any) -> bytes:
        self.kill.step()
        data = super().recv(size, *flags)
        self.kill.step()
        return data

    def recv_into(self, buffer: Any, *arguments: Any) -> int:
        self.kill.step()
        size = super().recv_into(buffer, *arguments)
        self.kill.step()
        return size

    def shutdown(self, how: int) -> None:
        self.kill.step()
        super().shutdown(how)


class Hub:
    """Keeps what is due, until a test has it done."""

    now = 0.0
    second = 0

    def __init__(self) -> None:
        self.due: list[tuple[Any, ...]] = []

    def after(self, _seconds: float, action: Any, *arguments: Any) -> None:
        self.due.append((action, *arguments))

    def watch(self, *_: Any) -> None:
        pass

    park = unpark = unwatch = rewatch = watch


class Host(HostLink):
    """The link to a host, as the gateway's parts see it."""

    def __init__(self, settings: Settings) -> None:
        nothing: Any = None
        super().__init__(nothing, nothing, {"index": 0, "shards": [0]}, settings)
        self.events: deque[list[Any]] = deque()

    def put(self, item: list[Any]) -> None:
        self.events.append(item)


class Gateway:
    """The parts of one gateway, on the memory of those before it."""

    def __init__(self, world: "World", kill: Kill) -> None:
        self.world = world
        self.kill = kill
        deflate._LEVEL = 9 if world.deaths % 2 else 1
        self.opened: list[Socket] = []
        settings = world.settings
        ledger = Ledger({name: os.dup(world.memory[name]) for name in NAMES})
        for name in ("header", "number", "cookie", "base", "consumed", "before", "mark", "answered", "phase"):
            setattr(ledger, name, Column(getattr(ledger, name), kill))
        self.ledger = ledger
        hub: Any = Hub()
        self.hub = hub
        self.connections = Connections(ledger)
        self.rules = RoomRules(world.rules.get)
        self.rooms = Rooms(self.connections, rules=self.rules)
        links: Any = SimpleNamespace(by_shard=[None])
        self.links = links
        self.inbox = Inbox(self.connections, self.links, settings, world.folder / "spill")
        self.inbox.later = self.hub.after
        self.lifecycle: Lifecycle
        self.sender = Sender(
            self.connections, settings, lambda slot, cause: self.lifecycle.failed(slot, cause)
        )
        self.lifecycle = Lifecycle(
            hub, self.connections, self.rooms, self.links, self.inbox, self.sender, settings
        )
        self.lifecycle.on_ended = self._ended
        forward: Any = SimpleNamespace()
        self.effects = Effects(
            self.connections,
            self.rooms,
            self.links,
            self.inbox,
            self.sender,
            self.lifecycle,
            forward,
            forward,
            self.rules,
        )
        self.host: Host | None = None
        succession = Succession(
            self.connections,
            self.inbox,
            self.sender,
            self.lifecycle,
            self.effects,
            Remains(ledger.records()),
            self.room_of,
        )
        left = succession.take_over(list(world.rows.values()), self._kept())
        assert left == []

    def _kept(self) -> dict[int, socket.socket]:
        return {slot: self.socket(os.dup(kept.fileno())) for slot, kept in self.world.kept.items()}

    def socket(self, descriptor: int) -> Socket:
        sock = Socket(fileno=descriptor)
        sock.kill = self.kill
        sock.setblocking(False)
        self.opened.append(sock)
        return sock

    def _ended(self, slot: int) -> None:
        self.kill.step()
        kept = self.world.kept.pop(slot, None)
        if kept is not None:
            kept.close()

    def room_of(self, row: Row) -> RoomRecord:
        key = f"{row.party}/{row.room}"
        return self.rooms.record(key, self.world.party, 0)

    def link(self) -> int:
        """A host has come. Gives the number of its newest message that is executed."""
        self.host = Host(self.world.settings)
        return self.ledger.meet_host(0, INCARNATION, 0)

    def begin(self) -> None:
        """The host has said what it had to: events may come."""
        assert self.host is not None
        self.host.synced = True
        self.links.by_shard[0] = self.host
        self.lifecycle.host_came(self.host)

    def look(self) -> None:
        """As epoll would have it: look at every connection."""
        table = self.connections
        for slot in range(len(table)):
            sock = table.sockets[slot]
            if sock is not None and table.phase[slot] >= CONNECTING:
                events = EPOLLIN | EPOLLOUT | (ENDED if position(sock).ended else 0)
                self.lifecycle.ready(slot, events)

    def commit(self) -> None:
        """What was staged for the registry is in it."""
        batch, self.lifecycle.batch = self.lifecycle.batch, RegistryBatch()
        self.world.commit(batch)

    def end(self) -> None:
        """The process has gone: its descriptors are closed, its duplicates' sockets stay."""
        for sock in self.opened:
            sock.close()


class World:
    """What outlives gateways: clients, registry, keeper, memory, and one host."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.settings = Settings(**options)
        self.party = PartyView.from_description(
            {
                "name": "main",
                "hooks": ["on_connect", "on_message", "on_close"],
                "cors": None,
                "settings": {"compression": "deflate", "compression_bytes_min": 126},
                "auto_responses": [[True, "?", True, "!", False], [True, "?long", True, "!" * 2000, True]],
                "hibernate": True,
                "subprotocols": [],
            },
            self.settings,
        )
        ledger = Ledger.create(64)
        self.memory = {name: os.dup(descriptor) for name, descriptor in ledger.descriptors.items()}
        self.rows: dict[int, Row] = {}
        self.rules: dict[str, bytes] = {}
        self.kept: dict[int, socket.socket] = {}
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts inherits it
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.clients: dict[int, socket.socket] = {}
        self.sent_bytes: dict[int, int] = {}
        self.received: dict[int, bytearray] = {}
        self.expected: dict[int, list[bytes]] = {}
        self.tags: dict[int, set[str]] = {}
        self.slots: dict[int, int] = {}
        self.closing: set[int] = set()
        self.link = Link()
        self.kept_messages: deque[tuple[int, bytes, list[Any]]] = deque()
        self.ended_turns: set[tuple[Any, ...]] = set()
        #: By client: messages, by where they end, that have not had their turn, and the frames that wait for
        #: that.
        self.asked: dict[int, deque[int | bytes]] = {}
        #: What the room has set, the newest last.
        self.own_rules: dict[str, str] = {}
        self.kill = Kill()
        self.deaths = 0
        self.gateway = Gateway(self, self.kill)
        self.relink()

    # --- What outlives ----------------------------------------------------------------------------

    def commit(self, batch: RegistryBatch) -> None:
        for key, blob in batch.auto_responses.items():
            if blob is None:
                self.rules.pop(key, None)
            else:
                self.rules[key] = blob
        self.gateway.rules.saved(batch.auto_responses)
        for number, opened in batch._opened.items():
            _, name, _, party, room, uri, accepted, address = opened
            self.rows[number] = Row(number, party, room, name, uri, accepted, (), None, None, address)
        for what, number, blob in batch.changes():
            if what == "forgotten":
                self.rows.pop(number, None)
            elif number in self.rows and what == "state":
                self.rows[number] = self.rows[number]._replace(state=blob)
            elif number in self.rows:
                self.rows[number] = self.rows[number]._replace(tags=wire.blob_tags(blob or b""))
        for number, closing in batch._closings.items():
            if number in self.rows:
                self.rows[number] = self.rows[number]._replace(closing=Closing(*closing))

    # --- Deaths -----------------------------------------------------------------------------------

    def run(self, action: Any, *arguments: Any) -> bool:
        """Do something in the gateway. False: it was killed in it, and its successor is there."""
        try:
            action(*arguments)
        except Killed:
            self.succeed()
            return False
        return True

    def succeed(self, kills: tuple[int, ...] = ()) -> None:
        """The gateway has died: the next one takes over, however many of them die in that."""
        pending = list(kills or self.next_kills)
        self.next_kills = ()
        while True:
            self.gateway.end()
            self.deaths += 1
            self.kill = Kill(pending.pop(0) if pending else 0)
            gateway = Gateway.__new__(Gateway)
            self.gateway = gateway
            try:
                gateway.__init__(self, self.kill)  # type: ignore[misc]
                self.relink()
            except Killed:
                continue
            return

    next_kills: tuple[int, ...] = ()

    def hand_over(self) -> None:
        """A gateway that rests ends, and the next one takes over; steps are counted on."""
        before = self.kill
        self.succeed(((before.at - before.steps), *self.next_kills) if before.at else ())
        self.deaths -= 1
        self.kill.steps += before.steps
        if self.kill.at:
            self.kill.at += before.steps

    # --- The host ---------------------------------------------------------------------------------

    def relink(self) -> None:
        """The host finds the gateway, says again what that does not know, and is given events."""
        executed = self.gateway.link()
        while self.kept_messages and self.kept_messages[0][0] <= executed:
            self.kept_messages.popleft()
        host = self.gateway.host
        assert host is not None
        for sequence, encoded, items in self.kept_messages:
            self.gateway.effects.carry_out(host, sequence, encoded, items)
        self.kept_messages.clear()
        self.gateway.begin()

    def say(self, items: list[Any]) -> None:
        """The host sends results."""
        sequence = self.link.sent + 1
        decoder = StreamDecoder()
        decoder.feed(self.link.pack(items))
        next(decoder)
        encoded = bytes(decoder.raw)
        self.kept_messages.append((sequence, encoded, items))
        gateway = self.gateway
        assert gateway.host is not None
        if self.run(gateway.effects.carry_out, gateway.host, sequence, encoded, items):
            self.kept_messages.clear()

    def turns(self, effects: list[list[Any]]) -> None:
        """The host has run the turns of all that it was given; the effects are those of the first one."""
        host = self.gateway.host
        assert host is not None
        results = []
        while host.events:
            event = host.events.popleft()
            kind, number = event[0], event[3]
            slot = event[2]
            turn = (kind, number, event[6] if kind == wire.MESSAGE else 0)
            assert turn not in self.ended_turns, "a turn that had ended was asked for again"
            self.ended_turns.add(turn)
            mine, effects = effects, []
            if kind == wire.MESSAGE:
                results.append([wire.TURN, slot, number, event[6], mine])
            elif kind == wire.CONNECT:
                results.append([wire.CONNECTED, slot, number, False, mine])
            else:
                assert kind == wire.CLOSE
                results.append([wire.CLOSED, slot, number, mine])
        if effects:
            results.append([wire.EFFECTS, effects])
        if results:
            self.say(results)
        for number in self.asked:
            self.answer(number)

    def answer(self, number: int) -> None:
        """A client may expect the automatic responses that wait for no turn any more."""
        asked = self.asked[number]
        while asked and (wire.CONNECT, number, 0) in self.ended_turns:
            first = asked[0]
            if isinstance(first, bytes):
                self.expected[number].append(first)
            elif (wire.MESSAGE, number, first) not in self.ended_turns:
                return
            asked.popleft()

    # --- What happens -----------------------------------------------------------------------------

    def connect(self) -> None:
        """A client comes in; if the gateway dies before its row is stored, it does not."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4608)
        client.connect(self.listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(HEAD)
        accepted, _ = self.listener.accept()
        gateway = self.gateway
        sock = gateway.socket(accepted.detach())
        number = 1 + max(self.clients, default=0)
        table = gateway.connections

        def store() -> None:
            room = gateway.rooms.record(ROOM, self.party, 0)
            slot = table.allocate(number, sock, room, wire.make_card(f"c{number}", "", b""), 0)
            if number in WINDOWS:
                table.agree(slot, WINDOWS[number])
            table.watch(sock.fileno(), slot)
            table.index(slot, f"c{number}")
            gateway.lifecycle.introduce(slot, Newcomer(ANSWER, len(HEAD), b"", f"c{number}", "", ""))
            gateway.lifecycle.store(slot)
            self.slots[number] = slot

        if not self.run(store):
            client.close()
            return
        slot = self.slots[number]
        self.kept[slot] = socket.socket(fileno=os.dup(sock.fileno()))
        gateway.commit()
        client.setblocking(False)
        self.clients[number] = client
        self.sent_bytes[number] = 0
        self.received[number] = bytearray()
        self.expected[number] = [ANSWER]
        self.tags[number] = set()
        self.asked[number] = deque()
        self.run(gateway.lifecycle.committed, [(slot, number)])

    def open(self) -> list[int]:
        """Connections that get what is sent, in the order of their numbers."""
        return [number for number in self.clients if number not in self.closing]

    def message(self, number: int, size: int) -> None:
        """A client sends a message."""
        payload, rsv = b"m" * size, 0
        if number in WINDOWS:
            payload, rsv = deflate.deflate(payload, 15), 4
        self.transmit(number, encode_frame(TEXT, payload, rsv=rsv))
        self.asked[number].append(self.sent_bytes[number])
        self.run(self.gateway.look)

    def ask(self, number: int, size: int) -> None:
        """A client sends what is answered automatically."""
        what = "?" if size < 100 else "?long"
        if what == "?long":
            self.transmit(number, encode_frame(TEXT, what.ljust(size, "z").encode()))
        elif number % 2:
            self.transmit(number, encode_frame(TEXT, b"?", fin=False) + encode_frame(CONTINUATION))
        else:
            self.transmit(number, encode_frame(TEXT, b"?"))
        self.asked[number].append(encode_message(REPLIES[what]))
        self.answer(number)
        self.run(self.gateway.look)

    def transmit(self, number: int, data: bytes) -> None:
        assert self.clients[number].send(data) == len(data)
        self.sent_bytes[number] += len(data)

    def leave(self, number: int, how: str) -> None:
        """A client ends its connection."""
        if (wire.CONNECT, number, 0) not in self.ended_turns:
            return
        self.closing.add(number)
        if how == "close":
            self.asked[number].append(b"\x88\x02\x03\xe8")
            self.answer(number)
            self.clients[number].send(encode_frame(CLOSE, b"\x03\xe8"))
        else:
            if not any(isinstance(each, bytes) for each in self.asked[number]):
                self.asked[number].clear()  # else the end is not read before what has to be answered
            self.clients[number].shutdown(socket.SHUT_WR)
        self.run(self.gateway.look)

    def effect(self, kind: str, number: int, size: int, tag: str) -> list[Any]:
        """An effect, with what it lets clients expect."""
        slot = self.slots[number]
        text = f"{kind} {self.link.sent} {number} ".ljust(size, "x")
        if size >= 3000:
            text = (text[:40] + random.Random(size + self.link.sent).randbytes(size).hex())[:size]
        if kind == "send":
            if number in self.open():
                self.expected[number].append(encode_message(text))
            return [wire.SEND, slot, number, text]
        if kind == "broadcast":
            # One whose Close waits for turns is still a member.
            leaving = [each for each in self.closing if self.asked[each]]
            for each in [*self.open(), *leaving]:
                if not tag or tag in self.tags[each]:
                    self.expected[each].append(encode_message(text))
            return [wire.BROADCAST, ROOM, text, [], [tag] if tag else [], [], []]
        if kind == "tag":
            if number in self.open():
                self.tags[number] = {tag} if tag else set()
            return [wire.TAGS, slot, number, wire.tags_blob([tag] if tag else [])]
        if kind == "state":
            return [wire.STATE, slot, number, text.encode()]
        if kind == "rule":
            self.own_rules.pop(tag, None)
            if size > 20:
                self.own_rules[tag] = text[:40]
            return [wire.AUTO, ROOM, f"#{tag}", self.own_rules.get(tag), False, 16]
        assert kind == "shut"
        if number in self.open():
            self.closing.add(number)
            self.asked[number].clear()
            self.expected[number].append(b"\x88\x04\x0f\xa0ok")
        return [wire.SHUT, slot, number, 4000, "ok"]

    def read(self, number: int) -> None:
        """A client reads what is there."""
        client, got = self.clients[number], self.received[number]
        try:
            while data := client.recv(65536):
                got += data
        except BlockingIOError:
            return
        except ConnectionResetError:
            return

    def flow(self) -> None:
        """Clients read, the gateway writes on, until nothing moves."""
        for _ in range(200):
            before = sum(map(len, self.received.values()))
            for number in self.clients:
                self.read(number)
            self.run(self.gateway.look)
            if sum(map(len, self.received.values())) == before and not self.gateway.sender.total_bytes:
                if not self.is_behind():
                    return
                select.select(list(self.clients.values()), [], [], 0.25)  # a window opens in the end

    def is_behind(self) -> bool:
        """Whether the kernel still has something for a client."""
        numbers = self.gateway.connections.number
        return any(
            numbers[slot] in self.received and position(sock).written > len(self.received[numbers[slot]])
            for slot, sock in self.kept.items()
        )

    def check(self) -> None:
        """Each client has got what it had to, once, whole and in order; each row and slot is accounted
        for."""
        for number, frames in self.expected.items():
            wanted, got = b"".join(frames), bytes(self.received[number])
            if number in WINDOWS:
                wanted, got = plain(wanted), plain(got)
            if got != wanted:
                at = next(
                    (
                        index
                        for index, pair in enumerate(zip(got, wanted, strict=False))
                        if pair[0] != pair[1]
                    ),
                    min(len(got), len(wanted)),
                )
                raise AssertionError(
                    f"client {number}, from byte {at}: {got[at : at + 80]!r} in place of"
                    f" {wanted[at : at + 80]!r} ({len(got)} bytes of {len(wanted)})"
                )
        self.gateway.commit()
        kept = loads(self.rules[ROOM]) if ROOM in self.rules else []
        assert kept == [[f"#{tag}", reply, False] for tag, reply in self.own_rules.items()]
        table = self.gateway.connections
        held = {table.number[slot] for slot in range(len(table)) if table.phase[slot] != FREE}
        still = {number for number in self.clients if (wire.CLOSE, number, 0) not in self.ended_turns}
        assert held == still
        assert self.gateway.ledger.header[HIGH] >= len(held)
        for slot in range(len(table)):
            if table.phase[slot] == OPEN:
                assert (
                    set(wire.blob_tags(wire.read_card(table.card[slot])[2])) == self.tags[table.number[slot]]
                )

    def end(self) -> None:
        deflate._LEVEL = 1
        self.gateway.end()
        for each in (*self.clients.values(), *self.kept.values(), self.listener):
            each.close()
        for descriptor in self.memory.values():
            os.close(descriptor)


def plain(stream: bytes) -> bytes:
    """What a server has sent behind its 101, with every frame as it would be without compression."""
    head, rest = stream[: len(ANSWER)], stream[len(ANSWER) :]
    frames = [head]
    while rest:
        form = rest[1] if len(rest) > 1 else 0
        header = 2 if form < 126 else 4 if form == 126 else 10
        size = form if form < 126 else int.from_bytes(rest[2:header], "big")
        frame, rest = rest[: header + size], rest[header + size :]
        if frame[0] & 0x40 and len(frame) == header + size:
            text = deflate.inflate([frame[header:]], 1 << 20)
            frame = encode_message(text.decode() if frame[0] & 1 else text)
        frames.append(frame)
    return b"".join(frames)


Step = tuple[str, int, int, str]
steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "connect",
                "send",
                "send",
                "broadcast",
                "broadcast",
                "tag",
                "state",
                "rule",
                "shut",
                "message",
                "message",
                "ask",
                "ask",
                "leave",
                "commit",
                "read",
                "turns",
                "turns",
                "rewrite",
                "rest",
            ]
        ),
        st.integers(0, 5),
        st.sampled_from([1, 20, 125, 126, 3000, 20_000]),
        st.sampled_from(["", "a", "b"]),
    ),
    min_size=1,
    max_size=30,
)

#: A bit of everything, with clients that do not read for a while.
EVERYTHING: list[Step] = [
    ("connect", 0, 0, ""),
    ("connect", 0, 0, ""),
    ("connect", 0, 0, ""),
    ("turns", 0, 0, ""),
    ("message", 0, 20, ""),
    ("ask", 0, 1, ""),
    ("message", 0, 3000, ""),
    ("ask", 0, 126, ""),
    ("ask", 1, 1, ""),
    ("ask", 1, 3000, ""),
    ("send", 0, 20, ""),
    ("broadcast", 0, 20_000, ""),
    ("tag", 1, 0, "a"),
    ("broadcast", 0, 20_000, "a"),
    ("turns", 0, 0, ""),
    ("read", 1, 0, ""),
    ("ask", 1, 3000, ""),
    ("rule", 0, 126, "a"),
    ("rule", 0, 126, "b"),
    ("send", 1, 3000, ""),
    ("rule", 0, 1, "a"),
    ("state", 2, 20, ""),
    ("tag", 2, 0, "a"),
    ("broadcast", 0, 126, "a"),
    ("turns", 0, 0, ""),
    ("rewrite", 0, 0, ""),
    ("message", 0, 20, ""),
    ("rest", 0, 0, "a"),
    ("turns", 0, 0, ""),
    ("ask", 2, 1, ""),
    ("message", 1, 1, ""),
    ("broadcast", 0, 20_000, ""),
    ("shut", 2, 0, ""),
    ("broadcast", 0, 1, ""),
    ("turns", 0, 0, ""),
    ("leave", 0, 0, "a"),
    ("commit", 0, 0, ""),
    ("leave", 1, 0, ""),
    ("turns", 0, 0, ""),
]


def play(folder: Path, script: list[Step], kills: tuple[int, ...], **options: Any) -> tuple[int, int]:
    """Act it out with a gateway that is killed at a step, and successors at others; gives steps and
    deaths."""
    world = World(folder, outbox_bytes_max=1 << 20, **options)
    world.kill.at = kills[0] if kills else 0
    world.next_kills = kills[1:]
    effects: list[list[Any]] = []
    steps_taken = 0
    try:
        for what, which, size, tag in script:
            numbers = world.open()
            if what == "connect":
                if len(world.clients) < 6 and not effects:
                    world.connect()
                continue
            if what == "turns":
                taken, effects = effects, []
                world.turns(taken)
                continue
            if what == "commit":
                world.run(world.gateway.commit)
                continue
            if what == "rewrite":
                world.run(rewrite, world)
                continue
            if what == "rest":
                if not effects:
                    if tag:  # nothing waits for a client that does not read
                        world.flow()
                    if world.run(rest, world):
                        world.hand_over()
                continue
            if not numbers:
                continue
            number = numbers[which % len(numbers)]
            if what == "message":
                if not effects:
                    world.message(number, size)
            elif what == "ask":
                if not effects:
                    world.ask(number, size)
            elif what == "leave":
                if not effects:
                    world.flow()
                    world.leave(number, "close" if tag else "end")
            elif what == "read":
                world.read(number)
            else:
                effects.append(world.effect(what, number, size, tag))
        world.turns(effects)
        for _ in range(6):
            world.flow()
            for action, *arguments in drain(world.gateway.hub.due):
                if action.__name__ != "_close_timeout":
                    world.run(action, *arguments)
            for number in world.closing:
                with_close = encode_frame(CLOSE, b"\x0f\xa0")
                try:
                    world.clients[number].send(with_close)
                except OSError:
                    pass
            world.flow()
            world.turns([])
        steps_taken = world.kill.steps
        world.flow()
        world.check()
        return steps_taken, world.deaths
    finally:
        world.end()


def drain(due: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    found = due[:]
    due.clear()
    return found


def rewrite(world: World) -> None:
    """The log has grown: only what is wanted stays."""
    gateway = world.gateway
    gateway.commit()
    gateway.ledger.rewrite([*gateway.lifecycle.records(), *gateway.sender.records()])


def rest(world: World) -> None:
    """The gateway stops on purpose: a successor need not ask the kernel (G7)."""
    gateway = world.gateway
    rewrite(world)
    gateway.ledger.rest(memoryview(gateway.connections.written))


@pytest.mark.timeout(600)  # some hundred worlds
@pytest.mark.parametrize("inbox_bytes_max", [96 * 1024, 1024])
def test_every_step(tmp_path: Path, inbox_bytes_max: int) -> None:
    """S22: kill before each step in turn; with little room in the inbox, larger messages go by a file."""
    options = {"inbox_bytes_max": inbox_bytes_max}
    total, deaths = play(tmp_path, EVERYTHING, (), **options)
    assert deaths == 0
    assert total > 200
    died = 0
    for at in range(1, total + 1):
        try:
            died += play(tmp_path, EVERYTHING, (at,), **options)[1]
        except AssertionError as error:
            raise AssertionError(f"killed before step {at} of {total}: {error}") from error
    assert died > 0.95 * total  # what comes when differs a little from one time to the next


@settings(max_examples=150, deadline=None)
@given(script=steps, kills=st.lists(st.integers(1, 400), min_size=1, max_size=3))
def test_any_script_and_kills(
    tmp_path_factory: pytest.TempPathFactory, script: list[Step], kills: list[int]
) -> None:
    """S22, S34: also when the successor is killed while it takes over."""
    play(tmp_path_factory.mktemp("world"), script, tuple(kills))


@pytest.mark.parametrize("dies", ["gateway", "host"])
def test_nothing_is_sent_behind_a_gap(tmp_path: Path, dies: str) -> None:
    """S22: who has ended his side gets no answers, also from those who run his other messages again."""
    world = World(tmp_path)
    try:
        world.connect()
        world.turns([])
        world.message(1, 20)
        world.message(1, 20)
        world.leave(1, "end")
        world.flow()
        slot = world.slots[1]

        def answer() -> None:
            assert world.gateway.host is not None
            event = world.gateway.host.events.popleft()
            assert event[0] == wire.MESSAGE
            world.say([[wire.TURN, slot, 1, event[6], [[wire.SEND, slot, 1, "an answer"]]]])

        answer()
        if dies == "gateway":
            world.succeed()
        else:
            assert world.gateway.host is not None
            world.gateway.lifecycle.host_gone(world.gateway.host)
            world.relink()
        world.flow()
        answer()
        world.flow()
        assert world.received[1] == ANSWER
        assert world.gateway.host is not None
        [ended] = world.gateway.host.events
        assert (ended[0], ended[9]) == (wire.CLOSE, "client_gone")
    finally:
        world.end()


@pytest.mark.parametrize("what", ["close", "replace", "violated"])
def test_what_has_ended_is_not_ended_again(tmp_path: Path, what: str) -> None:
    """S10, S14, S22: a Close was answered in time, and a host died: its messages are still to be handled."""
    world = World(tmp_path)
    try:
        world.connect()
        world.turns([])
        world.message(1, 20)
        world.leave(1, "close")
        gateway, slot = world.gateway, world.slots[1]
        gateway.lifecycle._close_timeout(slot, 1)
        assert gateway.host is not None
        gateway.lifecycle.host_gone(gateway.host)
        gateway.links.by_shard[0] = None
        if what == "close":
            gateway.lifecycle.close(slot, 4000, "", "server_close")
        elif what == "replace":
            gateway.lifecycle.replace(slot)
        else:
            gateway.lifecycle.violated(slot, 1002, "")
        world.relink()
        [message] = gateway.host.events
        assert message[0] == wire.MESSAGE
        world.turns([])
        [ended] = gateway.host.events
        assert (ended[0], ended[6], ended[9]) == (wire.CLOSE, 1000, "client_close")
        world.flow()
        world.check()
    finally:
        world.end()


def test_a_connection_that_cannot_be_served_holds_up_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    """S40: when a host comes all others are looked at."""
    world = World(tmp_path)
    try:
        for _ in range(3):
            world.connect()
        world.turns([])
        gateway, bad = world.gateway, world.slots[2]
        assert gateway.host is not None
        gateway.lifecycle.host_gone(gateway.host)
        gateway.links.by_shard[0] = None
        for number in (1, 2, 3):
            world.message(number, 20)
        usual = Inbox.look_again

        def look_again(inbox: Inbox, slot: int) -> None:
            if slot == bad:
                raise RuntimeError("a fault of ours")
            usual(inbox, slot)

        monkeypatch.setattr(Inbox, "look_again", look_again)
        world.relink()
        assert {event[3] for event in gateway.host.events if event[0] == wire.MESSAGE} == {1, 3}
    finally:
        world.end()


def test_a_message_outlives_its_client_and_the_wait_for_a_host(tmp_path: Path) -> None:
    """S15, S22: a client that does not answer pings any more is dead, and what it has sent before is not."""
    world = World(tmp_path)
    try:
        world.connect()
        world.turns([])
        gateway, slot = world.gateway, world.slots[1]
        assert gateway.host is not None
        gateway.lifecycle.host_gone(gateway.host)
        gateway.links.by_shard[0] = None
        world.message(1, 20)
        gateway.lifecycle._has_acknowledged = lambda slot: False  # type: ignore[method-assign]
        for _ in range(3):
            gateway.hub.second += 1000
            gateway.lifecycle._look(1)
        world.relink()
        [message] = gateway.host.events
        assert (message[0], len(message[7])) == (wire.MESSAGE, 20)
        world.turns([[wire.SEND, slot, 1, "nobody is there"]])
        [ended] = gateway.host.events
        assert (ended[0], ended[9]) == (wire.CLOSE, "ping_timeout")
        world.read(1)
        assert world.received[1] == ANSWER + encode_ping()
    finally:
        world.end()


def test_several_deaths_in_a_row(tmp_path: Path) -> None:
    """S34: the second successor finds what the first one found, and what that had done."""
    chance = random.Random(5)
    for _ in range(60):
        kills = tuple(chance.randint(1, 250) for _ in range(4))
        try:
            play(tmp_path, EVERYTHING, kills)
        except AssertionError as error:
            raise AssertionError(f"killed before {kills}: {error}") from error


__all__ = ["CLOSED"]
