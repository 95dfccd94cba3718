"""The inbox on real TCP connections, with hosts that acknowledge when they like, and die when they like.

What must hold after every step, and what at the end (S5, S14, S24): a connection's messages are handled in
the order in which they were sent, none lost and none doubled; no byte of a message leaves the kernel, but for
a spill file, before the message is acknowledged; and the counts of what is in flight are true.
"""

import errno
import os
import socket
import struct
from collections import deque
from itertools import pairwise
from pathlib import Path
from select import EPOLLIN, epoll
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.gateway.answers import Answers
from broker.gateway.connections import CLOSED, ENDING, GONE, OPEN, Connections
from broker.gateway.deflate import deflate
from broker.gateway.frames import encode_message
from broker.gateway.hub import ENDED, PARKED_EVENTS
from broker.gateway.inbox import ANSWERS_PER_PASS, Inbox
from broker.gateway.links import HostLink
from broker.gateway.rooms import RoomRecord
from hibernation import wire
from hibernation.settings import Settings
from tests.e2e.raw_client import BINARY, CLOSE, CONTINUATION, PING, TEXT, encode_frame

KEY = b"\x01\x02\x03\x04"
#: What is answered, text or bytes, by the gateway itself.
RULES = Answers([("?", "!", True), (b"?", "!", True)])
ANSWER = encode_message("!")


class FakeHost(HostLink):
    """What the inbox sees of a host."""

    def __init__(self, settings: Settings) -> None:
        hub: Any = None
        sock: Any = None
        super().__init__(hub, sock, {"index": 0, "shards": [0]}, settings)
        self.items: deque[list[Any]] = deque()

    def put(self, item: list[Any]) -> None:
        assert item[0] == wire.MESSAGE
        self.items.append(item)


class Rig:
    """An inbox with what stands around it, without hub and lifecycle."""

    def __init__(
        self,
        folder: Path,
        *,
        rooms: int = 2,
        wants_message: bool = True,
        overlaps: bool = False,
        answers: Answers | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("message_bytes_max", 64 * 1024)
        self.settings = Settings(**options)
        self.table = Connections()
        self.links = SimpleNamespace(by_shard=[None])
        self.inbox = Inbox(self.table, self.links, self.settings, folder)  # type: ignore[arg-type]
        party: Any = SimpleNamespace(
            settings=self.settings,
            message_bytes_max=self.settings.message_bytes_max,
            inflight_events_max=self.settings.room_inflight_events_max,
            inflight_bytes_max=self.settings.room_inflight_bytes_max,
            wants_message=wants_message,
            overlaps=overlaps,
            answers=answers,
        )
        self.rooms = [RoomRecord(f"main/{number}", party, 0) for number in range(rooms)]
        self.epoll = epoll()
        self.clients: list[socket.socket] = []
        self.handled: list[list[str | bytes]] = []
        self.ends: list[int] = []
        self.pings: list[tuple[int, bytes]] = []
        self.closes: list[tuple[int, int, str]] = []
        self.violations: list[tuple[int, int]] = []
        self.gone: list[int] = []
        self.due: list[tuple[Any, ...]] = []
        #: Turns of a dead host that were committed, and of which its successor will tell.
        self.ended: list[list[Any]] = []
        self.inbox.later = lambda _, action, *arguments: self.due.append((action, *arguments))
        self.inbox.on_answer = self._answer
        self.inbox.on_ping = lambda slot, payload: self.pings.append((slot, payload))
        self.inbox.on_close_frame = self._close
        self.inbox.on_violation = self._violation
        self.inbox.on_gone = self._gone
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()

    def _answer(self, slot: int, frame: bytes, end: int) -> None:
        assert end > self.ends[slot]
        self.ends[slot] = end
        self.handled[slot].append(frame)

    def _close(self, slot: int, code: int, reason: str) -> None:
        self.closes.append((slot, code, reason))
        self.table.phase[slot] = ENDING

    def _violation(self, slot: int, code: int, reason: str) -> None:
        self.violations.append((slot, code))
        self.table.phase[slot] = ENDING

    def _gone(self, slot: int) -> None:
        self.gone.append(slot)
        self.table.phase[slot] = ENDING

    def end(self) -> None:
        for slot in range(len(self.table)):
            self.drop(slot)
        for client in self.clients:
            client.close()
        self.listener.close()
        self.epoll.close()

    def drop(self, slot: int) -> None:
        """The connection has ended."""
        sock = self.table.sockets[slot]
        if sock is not None:
            self.epoll.unregister(sock.fileno())
            sock.close()
            self.table.sockets[slot] = None
            self.table.phase[slot] = CLOSED
            self.inbox.drop(slot)

    @property
    def host(self) -> FakeHost:
        host: FakeHost | None = self.links.by_shard[0]
        assert host is not None
        return host

    def connect(self, room: int = 0) -> int:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        client.connect(self.listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setblocking(False)
        sock, _ = self.listener.accept()
        sock.setblocking(False)
        number = len(self.clients) + 1
        slot = self.table.allocate(number, sock, self.rooms[room], wire.make_card(f"{number}", "", b""), 0)
        assert slot == len(self.clients)
        self.table.phase[slot] = OPEN
        self.table.watch(sock.fileno(), slot)
        self.epoll.register(sock.fileno(), PARKED_EVENTS)
        self.clients.append(client)
        self.handled.append([])
        self.ends.append(0)
        return slot

    def send(self, slot: int, data: bytes) -> int:
        """As much as the kernel takes; waits until it has arrived."""
        try:
            sent = self.clients[slot].send(data)
        except BlockingIOError:
            return 0
        return sent

    def poll(self, seconds: float = 0.0) -> bool:
        """What the hub does with what epoll says."""
        due, self.due = self.due, []
        for action, *arguments in due:
            action(*arguments)
        happened = self.epoll.poll(seconds)
        for descriptor, events in happened:
            slot = self.table.by_descriptor(descriptor)
            if events & ENDED:
                self.table.flags[slot] |= GONE
            if events & (EPOLLIN | ENDED):
                self.inbox.pump(slot)
        return bool(happened or due)

    def host_comes(self) -> None:
        assert self.links.by_shard[0] is None
        ended, self.ended = self.ended, []
        for _, _, slot, _, _, _, end, data in ended:
            self.ends[slot] = end
            self.handled[slot].append(data)
            self.inbox.settle(slot, end)
            assert [(room.inflight_events, room.inflight_bytes) for room in self.rooms] == [(0, 0)] * len(
                self.rooms
            )
        self.links.by_shard[0] = FakeHost(self.settings)
        for slot in range(len(self.table)):
            if self.table.phase[slot] == OPEN:
                self.inbox.look_again(slot)

    def host_dies(self, ended: int = 0) -> None:
        """So many turns, in the order of their messages, had ended, and nobody was told."""
        self.ended = list(self.host.items)[:ended]
        self.links.by_shard[0] = None
        for room in self.rooms:
            room.inflight_events = room.inflight_bytes = 0
            room.waiting = room.shares = None
        for slot in range(len(self.table)):
            if self.table.phase[slot] == OPEN:
                self.inbox.forget_in_flight(slot)

    def handle(self, count: int = 1) -> None:
        """The host handles so many messages, and acknowledges each."""
        for _ in range(min(count, len(self.host.items))):
            _, _, slot, number, _, _, end, data = self.host.items.popleft()
            assert self.table.number[slot] == number
            assert end > self.ends[slot]
            self.ends[slot] = end
            self.handled[slot].append(data)
            self.inbox.acknowledge(slot, end)

    def unread(self, slot: int) -> int:
        import fcntl

        sock = self.table.sockets[slot]
        assert sock is not None
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), 0x541B, bytes(4)))[0])  # FIONREAD

    def settle(self) -> None:
        """Handle everything that has come."""
        while True:
            self.handle(1000)
            if not self.poll(0.02) and not self.host.items:
                return

    def send_all(self, slot: int, data: bytes) -> None:
        """Everything, handling on the way."""
        deadline = monotonic() + 30
        while data:
            assert monotonic() < deadline, "it does not go on"
            data = data[self.send(slot, data) :]
            self.poll()
            self.handle(1000)
        self.settle()

    def counts_are_true(self) -> None:
        """What is said to be in flight is what was dispatched and not acknowledged (S24)."""
        if self.links.by_shard[0] is None:
            return
        table = self.table
        assert sum(room.inflight_events for room in self.rooms) == len(self.host.items)
        for room in self.rooms:
            if room.shares is not None:
                assert sum(room.shares.values()) == room.inflight_events
        for room in self.rooms:
            slots = [slot for slot in range(len(table)) if table.room[slot] is room]
            assert room.inflight_bytes == sum(
                max(0, table.last_end[slot] - table.consumed[slot])
                for slot in slots
                if table.phase[slot] != CLOSED
            ) + sum(
                max(reading.file.size, reading.dispatched_bytes)
                for slot, reading in self.inbox._readings.items()
                if slot in slots and reading.complete and reading.file is not None
            ) + sum(size for slot in slots for _, size in self.inbox._inflated.get(slot, ()))
        assert self.host.inflight_bytes == sum(room.inflight_bytes for room in self.rooms)


@pytest.fixture
def rig(tmp_path):
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        rig = Rig(tmp_path / f"spill-{len(made)}", **options)
        made.append(rig)
        rig.host_comes()
        return rig

    yield make
    for each in made:
        each.end()


# --- A model of one client's stream -----------------------------------------------------------------------


@st.composite
def messages(draw):
    """The frames of one message, control frames among them, and the message."""
    size = draw(st.sampled_from([0, 1, 20, 125, 126, 1000, 4095, 4097, 8192, 9000, 20_000, 65_000]))
    text = draw(st.booleans())
    seed = draw(st.integers(0, 25))
    payload = bytes([97 + (seed + n) % 26 for n in range(26)]) * (size // 26 + 1)
    payload = payload[:size]
    kind = draw(st.sampled_from(["plain", "plain", "plain", "compressed", "answered", "compressed answered"]))
    if "answered" in kind:
        payload = b"?" + payload[1:]
        size = len(payload)
    expected: Any = payload.decode() if text else payload
    if "answered" in kind:
        expected = ANSWER
    rsv = 0
    if "compressed" in kind:
        payload, rsv = deflate(payload or b"?", 15) if payload else b"\0", 4
        size = len(payload)
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=draw(st.sampled_from([0, 0, 1, 4])))))
    if size > 1000 and draw(st.integers(0, 5)) == 0:
        cuts = list(range(0, size, max(size // 40, 1)))[1:]
    bounds = [0, *cuts, size]
    data = b""
    for index, (start, end) in enumerate(pairwise(bounds)):
        opcode = CONTINUATION if index else TEXT if text else BINARY
        last = end == size and index == len(cuts)
        data += encode_frame(opcode, payload[start:end], fin=last, mask=KEY, rsv=0 if index else rsv)
        if index < len(cuts) and draw(st.integers(0, 4)) == 0:
            data += encode_frame(PING, b"among fragments", mask=KEY)
    if draw(st.integers(0, 4)) == 0:
        data += encode_frame(PING, b"behind", mask=KEY)
    return data, expected


class InboxMachine(RuleBasedStateMachine):
    """Three connections in two rooms of one host."""

    folder: Path
    count = 0
    clogged = False
    overlaps = False

    @initialize()
    def start(self):
        type(self).count += 1
        self.rig = Rig(
            self.folder / f"{self.count}",
            connection_inflight_bytes_max=4096,
            room_inflight_events_max=8,
            room_inflight_bytes_max=16 * 1024,
            link_inflight_bytes_max=64 * 1024,
            inbox_bytes_max=8192,
            overlaps=self.overlaps,
            answers=RULES,
        )
        if self.clogged:
            self.rig.inbox._is_clogged = lambda slot: True  # type: ignore[method-assign]
        self.sent: list[list[str | bytes]] = []
        self.starts: list[list[int]] = []
        self.written: list[int] = []
        self.left: list[bytes] = []
        for room in (0, 0, 1):
            self.rig.table.agree(self.rig.connect(room), 15)
            self.sent.append([])
            self.starts.append([])
            self.written.append(0)
            self.left.append(b"")
        self.rig.host_comes()

    def teardown(self):
        if not hasattr(self, "rig"):
            return
        try:
            self.finish()
        finally:
            self.rig.end()

    @rule(slot=st.integers(0, 2), message=messages())
    def plan(self, slot, message):
        data, payload = message
        self.starts[slot].append(self.written[slot] + len(self.left[slot]))
        self.left[slot] += data
        self.sent[slot].append(payload)

    @rule(slot=st.integers(0, 2), size=st.sampled_from([1, 2, 5, 7, 100, 3000, 5000, 30_000, 1 << 20]))
    def send(self, slot, size):
        count = self.rig.send(slot, self.left[slot][:size])
        self.left[slot] = self.left[slot][count:]
        self.written[slot] += count

    @rule()
    def poll(self):
        self.rig.poll(0.001)

    @precondition(lambda self: self.rig.links.by_shard[0] is not None)
    @rule(count=st.sampled_from([1, 1, 2, 5, 100]))
    def handle(self, count):
        self.rig.handle(count)

    @precondition(lambda self: self.rig.links.by_shard[0] is not None)
    @rule(ended=st.sampled_from([0, 0, 1, 2, 3, 100]))
    def host_dies(self, ended):
        self.rig.host_dies(ended)

    @precondition(lambda self: self.rig.links.by_shard[0] is None)
    @rule()
    def host_comes(self):
        self.rig.host_comes()

    @invariant()
    def nothing_leaves_before_its_acknowledgement(self):
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        assert not rig.violations
        assert not rig.gone
        for slot in range(3):
            handled = rig.handled[slot]
            assert handled == self.sent[slot][: len(handled)]
            if len(handled) < len(self.starts[slot]):
                begin = self.starts[slot][len(handled)]
                reading = rig.inbox._readings.get(slot)
                if reading is not None and reading.file is not None:
                    assert reading.start <= begin  # it may be a control frame in front of it
                    assert reading.file.start + reading.file.size == rig.table.consumed[slot]
                else:
                    assert rig.table.consumed[slot] <= begin
            assert rig.table.consumed[slot] <= rig.table.parsed[slot] <= self.written[slot]
        rig.counts_are_true()
        for room in rig.rooms:
            assert room.inflight_events <= room.party.inflight_events_max

    def finish(self):
        """Everything comes in the end, whatever happened on the way."""
        rig = self.rig
        if rig.links.by_shard[0] is None:
            rig.host_comes()
        deadline = monotonic() + 30
        for slot in range(3):
            while self.left[slot]:
                assert monotonic() < deadline, "it does not go on"
                self.send(slot, 1 << 20)
                rig.poll(0.001)
                rig.handle(1000)
                self.nothing_leaves_before_its_acknowledgement()
        rig.settle()
        while rig.handled != self.sent and monotonic() < deadline:
            rig.settle()
        for slot in range(3):
            assert rig.handled[slot] == self.sent[slot]
            assert rig.unread(slot) == 0
            assert rig.inbox._readings.get(slot) is None
        assert rig.inbox._spills.bytes == 0
        rig.counts_are_true()
        assert rig.host.inflight_bytes == 0


InboxMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, phases=[Phase.explicit, Phase.generate]
)


def test_nothing_is_lost_doubled_or_reordered(tmp_path):
    """S24 and the inbox's invariants: random frames and acknowledgements, hosts that die at any moment."""
    InboxMachine.folder = tmp_path
    InboxMachine.TestCase("runTest").runTest()


class CloggedMachine(InboxMachine):
    """The same where every part of a frame that is left has to go to a spill file, wherever it is cut."""

    clogged = True


CloggedMachine.TestCase.settings = InboxMachine.TestCase.settings


def test_nothing_is_lost_where_every_part_is_spilled(tmp_path):
    """S24: the same from files."""
    CloggedMachine.folder = tmp_path
    CloggedMachine.TestCase("runTest").runTest()


class OverlappingMachine(InboxMachine):
    """The same where turns of a room overlap, so that each connection has a share of what is in flight."""

    overlaps = True


OverlappingMachine.TestCase.settings = InboxMachine.TestCase.settings


def test_nothing_is_lost_where_turns_overlap(tmp_path):
    """S19, S24: the same with shares."""
    OverlappingMachine.folder = tmp_path
    OverlappingMachine.TestCase("runTest").runTest()


@pytest.mark.parametrize("cut", [1, 2])
def test_where_turns_overlap_no_connection_takes_all_that_may_be_in_flight(rig, cut):
    """S19, S24: an eighth of the room's; as its own are acknowledged more of it come."""
    rig = rig(room_inflight_events_max=24, overlaps=True)
    slots = [rig.connect() for _ in range(2)]
    rig.send(slots[0], fragments(cut, 1) * 100)
    while rig.poll(0.05):
        pass
    assert [item[2] for item in rig.host.items] == [slots[0]] * 3
    rig.send(slots[1], fragments(cut, 1) * 2)
    while rig.poll(0.05):
        pass
    assert [item[2] for item in rig.host.items] == [slots[0]] * 3 + [slots[1]] * 2
    rig.handle(1)
    assert [item[2] for item in rig.host.items] == [slots[0]] * 2 + [slots[1]] * 2 + [slots[0]]
    rig.settle()
    assert [len(rig.handled[slot]) for slot in slots] == [100, 2]


def test_a_part_of_a_frame_does_not_shut_the_window(rig):
    """The kernel keeps the whole piece of its queue in which it lies, 200 KiB perhaps: it is moved out."""
    rig = rig()
    slot = rig.connect()
    left = encode_frame(PING, b"x" * 125, mask=KEY) * 20_000
    whole = len(left) // len(encode_frame(PING, b"x" * 125, mask=KEY))
    deadline = monotonic() + 60
    while left:
        assert monotonic() < deadline, f"stuck after {len(rig.pings)} of {whole}"
        while sent := rig.send(slot, left):  # until the queue is full
            left = left[sent:]
        rig.poll(0.01)
    while rig.poll(0.05):
        pass
    assert len(rig.pings) == whole
    assert rig.inbox._spills.bytes == 0


# --- Bounds -----------------------------------------------------------------------------------------------


def fragments(count: int, size: int, *, last: bool = True) -> bytes:
    """A message of so many fragments of so many bytes."""
    data = b""
    for index in range(count):
        opcode = CONTINUATION if index else BINARY
        data += encode_frame(opcode, b"x" * size, fin=last and index == count - 1, mask=KEY)
    return data


def test_an_answer_waits_for_what_is_before_it_and_holds_up_what_is_behind(rig):
    """S16: it takes its place among the messages, and nothing of it is in flight."""
    rig = rig(answers=RULES)
    slot = rig.connect()
    for text in ("a", "b", "?", "?2", "c", "?3"):
        rig.send(slot, encode_frame(TEXT, text.encode(), mask=KEY))
    rig.poll(0.05)
    assert [item[7] for item in rig.host.items] == ["a", "b"]
    rig.handle(1)
    assert rig.handled[slot] == ["a"]
    rig.handle(1)
    assert rig.handled[slot] == ["a", "b", ANSWER, ANSWER]
    assert [item[7] for item in rig.host.items] == ["c"]
    rig.counts_are_true()
    rig.handle(1)
    assert rig.handled[slot] == ["a", "b", ANSWER, ANSWER, "c", ANSWER]
    assert rig.unread(slot) == 0
    assert rig.inbox.messages == 3


def test_an_answer_before_the_end(rig):
    """S16: the client has gone meanwhile, and still everything has its turn."""
    rig = rig(answers=RULES)
    slot = rig.connect()
    for text in ("a", "?", "b"):
        rig.send(slot, encode_frame(TEXT, text.encode(), mask=KEY))
    rig.clients[slot].close()
    rig.poll(0.05)
    rig.settle()
    assert rig.handled[slot] == ["a", ANSWER, "b"]
    assert rig.gone == [slot]


@pytest.mark.parametrize("count", [ANSWERS_PER_PASS - 1, ANSWERS_PER_PASS, ANSWERS_PER_PASS + 1])
def test_answers_in_one_pass_are_bounded(rig, count):
    """S16: the others come in the next round, so nobody else waits for all of them."""
    rig = rig(answers=RULES)
    slot = rig.connect()
    rig.send(slot, encode_frame(TEXT, b"?", mask=KEY) * count)
    while not rig.handled[slot]:
        rig.poll(0.05)
    assert len(rig.handled[slot]) == min(count, ANSWERS_PER_PASS)
    assert bool(rig.due) == (count >= ANSWERS_PER_PASS)
    rig.settle()
    assert len(rig.handled[slot]) == count
    assert rig.unread(slot) == 0


def test_a_host_that_dies_has_no_part_in_answers(rig):
    """S16: what was answered is not answered again, what waited is answered later, and once."""
    rig = rig(answers=RULES)
    slot = rig.connect()
    rig.send(slot, b"".join(encode_frame(TEXT, text, mask=KEY) for text in (b"?", b"a", b"?")))
    while not rig.host.items:
        rig.poll(0.05)
    rig.host_dies()
    assert rig.handled[slot] == [ANSWER]
    rig.host_comes()
    rig.settle()
    assert rig.handled[slot] == [ANSWER, "a", ANSWER]


@pytest.mark.parametrize("inbox_bytes_max", [1024, 96 * 1024])
def test_a_room_that_wants_no_messages_answers_all_the_same(rig, inbox_bytes_max):
    rig = rig(wants_message=False, answers=RULES, inbox_bytes_max=inbox_bytes_max)
    slot = rig.connect()
    for data in (b"?", b"unwanted", b"?" + b"x" * 5000, b"unwanted" * 1000):
        rig.send_all(slot, encode_frame(BINARY, data, mask=KEY))
    assert rig.handled[slot] == [ANSWER, ANSWER]
    assert rig.unread(slot) == 0
    assert rig.inbox._spills.bytes == 0


def test_compressed_messages_in_flight_count_as_what_they_are(rig):
    """S24: some hundred bytes on the wire, and each of 60,000 for the host."""
    rig = rig(room_inflight_bytes_max=250_000)
    slot, other = rig.connect(), rig.connect()
    bomb = encode_frame(BINARY, deflate(bytes(60_000), 15), mask=KEY, rsv=4)
    for each in (slot, other):
        rig.table.agree(each, 15)
        rig.send(each, bomb * 20)
    rig.poll(0.05)
    rig.poll(0.05)
    assert len(rig.host.items) == 4  # two of each: 64 KiB are reached with the second
    rig.counts_are_true()
    while rig.host.items:
        rig.handle(1)
        rig.poll(0.01)
        rig.counts_are_true()
        assert rig.host.inflight_bytes < 250_000 + 2 * 60_000
    rig.settle()
    assert rig.handled[slot] == rig.handled[other] == [bytes(60_000)] * 20
    assert rig.host.inflight_bytes == 0
    assert not rig.inbox._inflated


def test_bombs_that_nobody_wants_hold_up_nobody(rig):
    """S24: a mebibyte of them in one pass."""
    rig = rig(wants_message=False, message_bytes_max=1 << 20)
    slot = rig.connect()
    rig.table.agree(slot, 15)
    rig.send(slot, encode_frame(BINARY, deflate(bytes(1 << 20), 15), mask=KEY, rsv=4) * 3)
    rounds = 0
    while rig.unread(slot) or not rounds:
        rounds += rig.poll(0.05)
    assert rounds >= 3
    assert not rig.violations


@pytest.mark.parametrize("total", [60_000, 66_000, 90_000, 97_000, 99_000, 200_000])
def test_a_message_in_fragments_always_passes(rig, total):
    """S24: one message always passes, also when its fragments are above the bound on what is in flight."""
    rig = rig(message_bytes_max=1 << 20)
    slot = rig.connect()
    data = fragments(total // 1000, 1000)
    for start in range(0, len(data), 700):  # one by one: each is looked at on its own
        piece = data[start : start + 700]
        while piece:
            piece = piece[rig.send(slot, piece) :]
            rig.poll()
    rig.settle()
    assert rig.handled[slot] == [b"x" * total]


def test_fragments_without_end_block_nobody_else(rig):
    """S24: what has no whole message yet is not in flight; the kernel's buffer bounds it."""
    rig = rig(room_inflight_bytes_max=64 * 1024, link_inflight_bytes_max=64 * 1024)
    for _ in range(4):
        rig.send_all(rig.connect(), fragments(40, 1000, last=False))
    other = rig.connect()
    rig.send_all(other, encode_frame(TEXT, b"hello", mask=KEY))
    assert rig.handled[other] == ["hello"]
    rig.counts_are_true()


def test_what_an_ended_connection_left_is_in_flight_no_more(rig):
    """S24: clients that leave in the middle of a message take nothing of the bounds with them."""
    rig = rig(link_inflight_bytes_max=64 * 1024, room_inflight_bytes_max=64 * 1024, inbox_bytes_max=8192)
    for size in (5000, 20_000, 40_000):
        slot = rig.connect()
        rig.send_all(slot, fragments(size // 1000, 1000, last=False))
        rig.drop(slot)
        rig.counts_are_true()
    assert rig.host.inflight_bytes == 0
    assert rig.inbox._spills.bytes == 0


@pytest.mark.parametrize("cut", [1, 2])
def test_a_room_has_a_bounded_number_of_events_in_flight(rig, cut):
    """S24: whole messages and those in fragments alike."""
    rig = rig(room_inflight_events_max=8)
    slots = [rig.connect() for _ in range(3)]
    for slot in slots:
        rig.send(slot, fragments(cut, 1) * 100)
    while rig.poll(0.05):
        assert len(rig.host.items) <= 8
    assert len(rig.host.items) == 8
    rig.settle()
    assert [len(rig.handled[slot]) for slot in slots] == [100] * 3


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_connection_has_bounded_bytes_in_flight(rig, pieces):
    """S24: at the bound the gateway does not look at more; each acknowledgement lets it go on."""
    rig = rig(connection_inflight_bytes_max=4096)
    slot = rig.connect()
    message = fragments(pieces, 500)
    rig.send(slot, message * 40)
    while rig.poll(0.05):
        pass
    in_flight = len(rig.host.items) * len(message)
    assert 4096 <= in_flight < 4096 + len(message)
    rig.handle(1)
    assert len(rig.host.items) * len(message) == in_flight
    rig.settle()
    assert len(rig.handled[slot]) == 40


def test_a_link_has_bounded_bytes_in_flight(rig):
    """S24: over all its rooms; who waits goes on in turn."""
    rig = rig(link_inflight_bytes_max=64 * 1024, rooms=4)
    slots = [rig.connect(room) for room in range(4)]
    for slot in slots:
        rig.send(slot, encode_frame(BINARY, b"x" * 40_000, mask=KEY))
        rig.poll(0.05)
    assert len(rig.host.items) == 2
    rig.settle()
    assert [len(rig.handled[slot]) for slot in slots] == [1] * 4


def test_control_frames_wait_for_nobody(rig):
    """S15: pings are answered and consumed; a message that no hook wants is, too."""
    rig = rig(wants_message=False)
    slot = rig.connect()
    rig.send_all(slot, encode_frame(PING, b"1", mask=KEY) + encode_frame(TEXT, b"unwanted", mask=KEY))
    assert rig.pings == [(slot, b"1")]
    assert not rig.host.items
    assert rig.unread(slot) == 0


def test_what_comes_before_the_end_is_handled(rig):
    """FIN and RST behind whole messages: these are handled, a part of a frame is not, then comes the end."""
    for reset in (False, True):
        each = rig(connection_inflight_bytes_max=1024)
        slot = each.connect()
        each.send(
            slot, encode_frame(TEXT, b"x" * 300, mask=KEY) * 10 + encode_frame(TEXT, b"part", mask=KEY)[:-1]
        )
        if reset:
            each.clients[slot].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        each.clients[slot].close()
        each.poll(0.05)
        each.settle()
        assert each.handled[slot] == ["x" * 300] * 10
        assert each.gone == [slot]


@pytest.mark.parametrize("extra", [b"", b"later"])
def test_a_close_frame_comes_after_the_messages_before_it(rig, extra):
    """S14: once, and nothing behind it is looked at."""
    rig = rig(connection_inflight_bytes_max=1024)
    slot = rig.connect()
    close = encode_frame(CLOSE, b"\x0f\xa0bye", mask=KEY)
    rig.send_all(slot, encode_frame(TEXT, b"x" * 300, mask=KEY) * 10 + close + extra + close)
    assert rig.handled[slot] == ["x" * 300] * 10
    assert rig.closes == [(slot, 4000, "bye")]


@pytest.mark.parametrize("inbox_bytes_max", [1024, 96 * 1024])
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encode_frame(BINARY, b"x" * 2001, mask=KEY), 1009),
        (encode_frame(BINARY, b"x" * 5_000_000, mask=KEY)[:14], 1009),
        (fragments(2, 1000, last=False) + fragments(1, 1), 1002),
        (fragments(2, 1000, last=False) + encode_frame(CONTINUATION, b"x", mask=KEY), 1009),
        (fragments(2, 999, last=False) + encode_frame(TEXT, b"x", mask=False), 1002),
        (encode_frame(TEXT, b"\xff" * 1500, mask=KEY), 1007),
        (
            encode_frame(TEXT, b"x" * 1500, fin=False, mask=KEY)
            + encode_frame(CONTINUATION, b"\xff", mask=KEY),
            1007,
        ),
    ],
)
def test_what_breaks_the_rules_is_reported_once(rig, data, code, inbox_bytes_max):
    """S40: also where a message has begun to move into its spill file; earlier messages come first."""
    rig = rig(message_bytes_max=2000, inbox_bytes_max=inbox_bytes_max)
    slot = rig.connect()
    rig.send_all(slot, encode_frame(TEXT, b"first", mask=KEY) + data)
    assert rig.handled[slot] == ["first"]
    assert rig.violations == [(slot, code)]


def test_a_spilled_message_survives_its_host(rig):
    """S24: it is delivered again from its file, with what follows it behind."""
    rig = rig(inbox_bytes_max=1024, message_bytes_max=1 << 20)
    slot = rig.connect()
    large = encode_frame(BINARY, b"y" * 300_000, mask=KEY) + encode_frame(TEXT, b"after", mask=KEY)
    data = large
    while len(rig.host.items) < 1:
        data = data[rig.send(slot, data) :]
        rig.poll(0.01)
    rig.send(slot, data)
    for _ in range(3):
        rig.poll(0.05)
        rig.host_dies()
        rig.host_comes()
        assert [item[7] for item in rig.host.items] == [b"y" * 300_000]
        rig.counts_are_true()
    rig.settle()
    assert rig.handled[slot] == [b"y" * 300_000, "after"]
    assert rig.inbox._spills.bytes == 0


@pytest.mark.parametrize("size", [10, 60_000])
def test_what_had_ended_before_a_host_died_is_not_given_out_again(rig, size):
    """S22: its successor says so before it is given anything; what it says of later messages comes later."""
    rig = rig(inbox_bytes_max=16 * 1024)
    slot = rig.connect()
    for number in range(3):
        rig.send(slot, encode_frame(PING, b"between", mask=KEY))
        rig.send(slot, encode_frame(BINARY, bytes([number]) * size, mask=KEY))
        rig.poll(0.05)
    dispatched = len(rig.host.items)
    assert dispatched >= (3 if size == 10 else 1)
    rig.host_dies(1)
    rig.host_comes()
    rig.settle()
    assert rig.handled[slot] == [bytes([number]) * size for number in range(3)]
    assert rig.unread(slot) == 0
    rig.counts_are_true()
    rig.inbox.settle(slot, rig.ends[slot])  # said twice
    rig.inbox.settle(slot, 1)
    assert rig.table.consumed[slot] == rig.table.parsed[slot]


def test_spilling_waits_for_room_in_the_spill(rig):
    """S24: beyond spill_bytes_max large messages wait in their clients, and come when there is room."""
    rig = rig(inbox_bytes_max=1024, message_bytes_max=32 << 20, spill_bytes_max=32 << 20)
    rig.inbox._spills._bytes_max = 100_000
    slots = [rig.connect() for _ in range(3)]
    left = {slot: encode_frame(BINARY, b"z" * 150_000, mask=KEY) for slot in slots}
    deadline = monotonic() + 60
    while any(left.values()) or rig.host.items:
        assert monotonic() < deadline
        for slot in slots:
            if left[slot]:
                left[slot] = left[slot][rig.send(slot, left[slot]) :]
        rig.poll(0.001)
        rig.handle(1)
    rig.settle()
    assert [len(rig.handled[slot]) for slot in slots] == [1] * 3
    assert rig.inbox._spills.bytes == 0


@pytest.mark.parametrize("fails", ["open", "pwrite"])
def test_a_message_that_the_disk_refuses_waits_and_comes_later(rig, monkeypatch, fails):
    """S36: no room on the disk costs no connection and loses nothing; it is tried again by itself."""
    rig = rig(inbox_bytes_max=1024, message_bytes_max=1 << 20)
    slot, other = rig.connect(), rig.connect()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    payload = b"x" * 60_000
    frame = encode_frame(BINARY, payload, mask=KEY)
    with monkeypatch.context() as patched:
        patched.setattr(os, fails, full)
        rig.send(slot, frame[:30_000])
        rig.send(other, encode_frame(TEXT, b"small", mask=KEY))
        for _ in range(10):
            rig.poll(0.02)
            rig.handle()
        assert (rig.violations, rig.gone) == ([], [])
        assert rig.handled == [[], ["small"]]
    rig.send(slot, frame[30_000:])
    rig.settle()
    assert rig.handled[slot] == [payload]
    assert rig.inbox._spills.bytes == 0
