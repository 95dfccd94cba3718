"""What waits to be sent, and to be read."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.client.buffers import EVENTS_MAX, Closed, Inbox, Opened, SendBuffer, size_of
from broker.client.errors import SendBufferFull

MESSAGES = st.one_of(st.text(max_size=6), st.binary(max_size=6))


@pytest.mark.parametrize(("count", "fits"), [(2, True), (3, True), (4, False)])
def test_messages_are_counted(count: int, fits: bool) -> None:
    buffer = SendBuffer(3, 100)
    for _ in range(count - 1):
        buffer.append("x")
    assert buffer.has_room("x") is fits
    if fits:
        buffer.append("x")
        return
    with pytest.raises(
        SendBufferFull, match=r"4 messages, and at most 3 are allowed; .*`buffer_messages_max`"
    ):
        buffer.append("x")
    assert len(buffer) == 3


@pytest.mark.parametrize(("size", "fits"), [(9, True), (10, True), (11, False)])
def test_bytes_are_counted(size: int, fits: bool) -> None:
    buffer = SendBuffer(100, 10)
    message = "ü" + "x" * (size - 2)
    assert buffer.has_room(message) is buffer.can_ever_hold(message) is fits
    if fits:
        buffer.append(message)
        return
    with pytest.raises(SendBufferFull, match=r"11 bytes, and at most 10 are allowed; .*`buffer_bytes_max`"):
        buffer.append(message)
    assert len(buffer) == 0


def test_room_comes_back() -> None:
    buffer = SendBuffer(1, 3)
    for message in ("abc", b"abc", "ü", ""):
        buffer.append(message)
        assert not buffer.has_room("")
        assert buffer.take() == message
    assert buffer.take() is None


def test_up_to_a_position() -> None:
    """What was sent before a reconnect goes to the old connection, and nothing else does."""
    buffer = SendBuffer(10, 10)
    buffer.append("old")
    position = buffer.end
    buffer.append("new")
    assert buffer.take(position) == "old"
    assert buffer.take(position) is None
    assert buffer.take_all() == ["new"]
    assert buffer.taken == buffer.end == 2


class SendBufferMachine(RuleBasedStateMachine):
    """P4, P5 against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = SendBuffer(4, 12)
        self.model: list[str | bytes] = []

    @rule(message=MESSAGES)
    def append(self, message: str | bytes) -> None:
        fits = len(self.model) < 4 and sum(map(size_of, self.model)) + size_of(message) <= 12
        assert self.buffer.has_room(message) is fits
        try:
            self.buffer.append(message)
        except SendBufferFull:
            assert not fits
        else:
            assert fits
            self.model.append(message)

    @rule()
    def take(self) -> None:
        assert self.buffer.take() == (self.model.pop(0) if self.model else None)

    @rule()
    def take_all(self) -> None:
        assert self.buffer.take_all() == self.model
        self.model = []

    @invariant()
    def as_many(self) -> None:
        assert len(self.buffer) == len(self.model) == self.buffer.end - self.buffer.taken


TestSendBuffer = SendBufferMachine.TestCase
TestSendBuffer.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize(("count", "full"), [(2, False), (3, True), (4, True)])
def test_an_inbox_is_full_of_messages(count: int, full: bool) -> None:
    inbox = Inbox(3, 100)
    for _ in range(count):
        inbox.put("x")
        inbox.put(Opened("", None, 0))
    assert inbox.full is full


@pytest.mark.parametrize(("size", "full"), [(9, False), (10, True), (11, True)])
def test_an_inbox_is_full_of_bytes(size: int, full: bool) -> None:
    inbox = Inbox(100, 10)
    inbox.put(b"x" * size)
    assert inbox.full is full
    inbox.take()
    assert not inbox.full


@pytest.mark.parametrize("count", [EVENTS_MAX - 1, EVENTS_MAX, EVENTS_MAX + 1, 3 * EVENTS_MAX])
def test_old_events_are_dropped_and_messages_are_not(count: int) -> None:
    inbox = Inbox(1_000, 10_000)
    put: list[object] = []
    for number in range(count):
        for item in (f"message {number}", Closed(1006, str(number), False, None)):
            inbox.put(item)
            put.append(item)
    found: list[object] = []
    while (taken := inbox.take()) is not None:
        found.append(taken)
    assert [item for item in found if isinstance(item, str)] == [
        f"message {number}" for number in range(count)
    ]
    events = [item for item in put if isinstance(item, Closed)][-EVENTS_MAX:]
    assert found == [item for item in put if isinstance(item, str) or item in events]
    assert len(inbox) == 0
    assert not inbox.full


@pytest.mark.parametrize(
    ("message", "size"), [("", 0), (b"", 0), ("abc", 3), ("ü", 2), ("😀", 4), (b"\xff", 1)]
)
def test_sizes(message: str | bytes, size: int) -> None:
    assert size_of(message) == size
