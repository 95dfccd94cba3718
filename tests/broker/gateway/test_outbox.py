"""The sender on real sockets that are read slowly, or not at all (S25)."""

import socket
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.gateway.connections import Connections
from broker.gateway.frames import encode_close, encode_message
from broker.gateway.outbox import BROKEN, SLOW, SLOW_CLOSE, Sender
from broker.gateway.recovery import Remains
from broker.gateway.rooms import RoomRecord
from hibernation import wire
from hibernation.settings import Settings


class Rig:
    """A sender and the clients at the other ends."""

    def __init__(self, **options: Any) -> None:
        self.settings = Settings(**options)
        self.table = Connections()
        party: Any = SimpleNamespace(settings=self.settings, answers=None)
        self.room = RoomRecord("main/x", party, 0)
        self.faults: list[tuple[int, str]] = []
        self.sender = Sender(self.table, self.settings, lambda slot, cause: self.faults.append((slot, cause)))
        self.clients: list[socket.socket] = []

    def connect(self) -> int:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            end.setblocking(False)
        self.clients.append(theirs)
        number = len(self.clients)
        return self.table.allocate(number, ours, self.room, wire.make_card(f"{number}", "", b""), 0)

    def read(self, slot: int, size: int = 1 << 20) -> bytes:
        try:
            return self.clients[slot].recv(size)
        except BlockingIOError:
            return b""

    def read_all(self, slot: int) -> bytes:
        """Read, and let the sender write on, until nothing comes any more."""
        data = b""
        while True:
            piece = self.read(slot)
            data += piece
            self.sender.writable(slot)
            if not piece and not self.sender.waiting_bytes(slot):
                return data

    def true(self) -> None:
        """O3, each outbox's own sum, and O4: the log tells a successor of every outbox, to the byte."""
        outboxes = self.sender.outboxes
        assert self.sender.total_bytes == sum(each.bytes for each in outboxes.values())
        remains = Remains(self.table.ledger.records())
        for slot in range(len(self.table)):
            number = self.table.number[slot]
            frames, offset, torn = remains.pending(number, self.table.written[slot])
            assert not torn
            each = outboxes.get(slot)
            if each is None:
                assert frames == []
                continue
            assert each.bytes == sum([len(frame) for _, frame in each.frames]) - each.offset
            assert (frames, offset) == (list(each.frames), each.offset)
            assert (number in remains.shut) == each.shut

    def end(self) -> None:
        for sock in [*self.clients, *self.table.sockets]:
            if sock is not None:
                sock.close()


@pytest.fixture
def rig():
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(**options))
        return made[-1]

    yield make
    for each in made:
        each.end()


def frames(data: bytes) -> list[bytes]:
    """The frames of a stream, each whole."""
    found = []
    while data:
        size, head = data[1], 2
        if size == 126:
            size, head = struct.unpack(">H", data[2:4])[0], 4
        assert len(data) >= head + size, "a torn frame"
        found.append(data[: head + size])
        data = data[head + size :]
    return found


def numbered(number: int, size: int = 1000) -> bytes:
    return encode_message(str(number).rjust(size))


@pytest.mark.parametrize("policy", ["close", "drop_oldest", "drop_newest"])
def test_what_fits_arrives_whole_and_in_order(rig, policy):
    """O1, O2: below the bound nothing is dropped."""
    rig = rig(slow_consumer=policy, outbox_bytes_max=20_000)
    slot = rig.connect()
    sent = [numbered(n) for n in range(15)]
    for frame in sent:
        rig.sender.send(slot, frame)
        rig.true()
    assert 0 < rig.sender.waiting_bytes(slot) <= 20_000
    assert frames(rig.read_all(slot)) == sent
    assert not rig.faults
    assert rig.sender.dropped == 0
    rig.true()


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_bound_counts_what_waits(rig, beyond):
    """S25: at the bound all is well, one byte more is too much."""
    rig = rig(outbox_bytes_max=5000)
    slot = rig.connect()
    while not rig.sender.waiting_bytes(slot):
        rig.sender.send(slot, numbered(0))
    missing = 5000 + beyond - rig.sender.waiting_bytes(slot)
    rig.sender.send(slot, encode_message("x" * (missing - 4)))
    assert rig.faults == ([(slot, SLOW)] if beyond > 0 else [])


def test_the_policy_close_ends_behind_the_frame_that_has_begun(rig):
    """S25, O2: the client that reads on finds whole frames, then 1013, and nothing after it."""
    rig = rig(outbox_bytes_max=5000)
    slot = rig.connect()
    sent = [numbered(n) for n in range(40)]
    for frame in sent:
        rig.sender.send(slot, frame)
        rig.true()
    assert rig.faults == [(slot, SLOW)]
    *whole, last = frames(rig.read_all(slot))
    assert last == SLOW_CLOSE == encode_close(1013, "")
    assert whole == sent[: len(whole)]
    rig.sender.send(slot, sent[0])
    rig.sender.send_to_many([slot], sent[0])
    assert rig.read(slot) == b""


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_the_policies_that_drop_keep_frames_whole_and_the_close(rig, policy):
    """S25, O2: which ones are missing is the policy; control frames never are."""
    rig = rig(slow_consumer=policy, outbox_bytes_max=5000)
    slot = rig.connect()
    sent = [numbered(n) for n in range(60)]
    close = encode_close(1000, "bye")
    for frame in sent[:40]:
        rig.sender.send(slot, frame)
        rig.true()
        assert rig.sender.waiting_bytes(slot) <= 5000
    rig.sender.send(slot, close)
    for frame in sent[40:]:
        rig.sender.send_to_many([slot], frame)
        rig.true()
    got = frames(rig.read_all(slot))
    assert got.count(close) == 1
    got.remove(close)
    assert rig.sender.dropped == len(sent) - len(got) > 0
    assert got == [frame for frame in sent if frame in got]
    if policy == "drop_oldest":
        assert got[-1] == sent[-1]
    else:
        assert sent[-1] not in got
    assert not rig.faults


def test_a_frame_larger_than_the_bound(rig):
    """S25: it is dropped whole, or closes the connection, unless the kernel has a part of it."""
    rig = rig(slow_consumer="drop_newest", outbox_bytes_max=2000)
    slot = rig.connect()
    while not rig.sender.waiting_bytes(slot):
        rig.sender.send(slot, numbered(0))
    rig.sender.send(slot, numbered(1, 60_000))
    rig.true()
    assert numbered(1, 60_000) not in rig.read_all(slot)
    rig.sender.send(slot, numbered(2))
    assert rig.read_all(slot) == numbered(2)


def test_over_the_total_the_fullest_goes_first(rig):
    """S25: the others, and the rest of the broadcast, are not concerned."""
    rig = rig(outbox_bytes_max=1 << 20, outbox_total_bytes_max=1 << 20)
    slots = [rig.connect() for _ in range(4)]
    rig.sender.send(slots[0], encode_message("x" * 60_000))
    while not rig.faults:
        rig.sender.send_to_many(slots, encode_message("y" * 50_000))
        rig.true()
        assert rig.sender.total_bytes <= 1 << 20
    assert rig.faults == [(slots[0], SLOW)]
    assert rig.sender.waiting_bytes(slots[0]) == 0
    assert all(rig.sender.waiting_bytes(slot) for slot in slots[1:])


def test_a_broken_socket_is_told_and_silent(rig):
    """The others of a broadcast get theirs."""
    rig = rig()
    broken, well = rig.connect(), rig.connect()
    rig.clients[broken].close()
    rig.sender.send_to_many([broken, well], numbered(1))
    rig.sender.send(broken, numbered(2))
    assert rig.faults == [(broken, BROKEN)]
    assert rig.read_all(well) == numbered(1)
    rig.sender.drop(broken)
    rig.true()
    assert not rig.sender.outboxes


@given(
    policy=st.sampled_from(["close", "drop_oldest", "drop_newest"]),
    steps=st.lists(
        st.tuples(st.sampled_from(["send", "send", "many", "close", "read", "write"]), st.integers(1, 9000)),
        max_size=60,
    ),
)
@settings(max_examples=150)
def test_whatever_happens_frames_are_whole_and_in_order(policy, steps):
    """O1 to O3, for every policy."""
    rig = Rig(slow_consumer=policy, outbox_bytes_max=10_000, outbox_total_bytes_max=1 << 20)
    try:
        slot = rig.connect()
        sent: list[bytes] = []
        data = b""
        for step, size in steps:
            if step in ("send", "many"):
                frame = encode_message(f"{len(sent)}".rjust(size))
                sent.append(frame)
                if step == "send":
                    rig.sender.send(slot, frame)
                else:
                    rig.sender.send_to_many([slot], frame)
            elif step == "close":
                sent.append(encode_close(4000, str(len(sent))))
                rig.sender.send(slot, sent[-1])
            elif step == "read":
                data += rig.read(slot, size)
            else:
                rig.sender.writable(slot)
            rig.true()
            assert rig.sender.waiting_bytes(slot) <= 10_000 + 200 * len(sent) or rig.faults
        got = frames(data + rig.read_all(slot))
        if rig.faults:
            assert got[-1] == SLOW_CLOSE
            got.pop()
            assert got == sent[: len(got)]
        else:
            assert got == [frame for frame in sent if frame in got]
            assert len(got) + rig.sender.dropped == len(sent)
            assert all(frame in got for frame in sent if frame[0] & 8)
    finally:
        rig.end()
