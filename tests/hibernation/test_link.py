"""The link's numbering over a transport that drops, repeats and reorders; and the cutting of its stream."""

import random
from typing import Any

import pytest
from cbor2 import dumps
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import hibernation.link
from hibernation.link import LENGTH_BYTES, Link, LinkError, StreamDecoder, encode


def decoded(data: bytes) -> list[Any]:
    decoder = StreamDecoder()
    decoder.feed(data)
    return list(decoder)


class End:
    """A link with the shell that the processes have, without their sockets: what it says goes to `wire`."""

    def __init__(self) -> None:
        self.link = Link()
        self.packed: list[int] = []
        self.taken: list[int] = []
        #: What the peer has on its way here, as decoded messages.
        self.inbound: list[Any] = []
        self.peer: End

    def say(self, data: bytes) -> None:
        self.peer.inbound += decoded(data)

    def pack(self, count: int, behind: int = 0) -> None:
        items = list(range(len(self.packed), len(self.packed) + count))
        self.packed += items
        self.say(self.link.pack(items, max(0, self.link.received - behind)))

    def arrive(self, message: Any) -> None:
        link = self.link
        before = link.received, link.acknowledged
        if link.is_gap(message):
            self.say(link.repetition_request())
        if link.wants_repetition(message):
            self.say(b"".join(link.unacknowledged()))
        self.taken += link.take(message)
        # L1, L3
        assert self.taken == self.peer.packed[: len(self.taken)]
        assert link.received >= before[0]
        assert before[1] <= link.acknowledged <= link.sent
        # L2
        assert len(link.unacknowledged()) == link.sent - link.acknowledged


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["pack", "pack", "deliver", "deliver", "deliver", "drop", "repeat", "acknowledge", "ask"]
        ),
        st.booleans(),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(steps)
@settings(max_examples=300)
def test_nothing_is_lost_doubled_or_reordered(steps):
    """S22's ground: each item leaves the other end once, in order, whatever the transport does; and when the
    transport behaves again, all of them do.
    """
    ends = End(), End()
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    for what, which, number in steps:
        end = ends[which]
        inbound = end.inbound
        if what == "pack":
            end.pack(number, behind=number)
        elif what == "acknowledge":
            end.say(end.link.acknowledgement() or b"")
        elif what == "ask":
            end.say(end.link.repetition_request())
        elif inbound:
            index = number % len(inbound)
            if what == "deliver":
                end.arrive(inbound.pop(index))
            elif what == "drop":
                inbound.pop(index)
            else:
                inbound.append(inbound[index])
    for _ in range(4):
        for end in ends:
            end.say(end.link.repetition_request())
        for end in ends:
            while end.inbound:
                end.arrive(end.inbound.pop(0))
    for end in ends:
        assert end.taken == end.peer.packed
        assert not end.link.unacknowledged()


def test_each_is_taken_once_and_in_order_over_a_bad_transport_for_long():
    """The same with hundreds of messages, half of them lost, doubled or overtaken."""
    chance = random.Random(1)
    ends = End(), End()
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    for _ in range(300):
        end = ends[chance.random() < 0.5]
        end.pack(chance.randrange(4))
        for each in ends:
            while each.inbound and chance.random() < 0.8:
                message = each.inbound.pop(chance.randrange(min(3, len(each.inbound))))
                for _ in range(chance.choice([0, 1, 1, 1, 2])):
                    each.arrive(message)
                del each.inbound[200:]
    for _ in range(4):
        for end in ends:
            end.say(end.link.repetition_request())
            while end.inbound:
                end.arrive(end.inbound.pop(0))
    for end in ends:
        assert len(end.packed) > 150
        assert end.taken == end.peer.packed


class Resumed(RuleBasedStateMachine):
    """One end outlives its peers; what each peer has executed is known to the next, or not.

    The model is a list of all that was packed and a number: how much of it was executed. Each peer begins its
    own numbering anew, at the place that the one before it reached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host = Link()
        self.packed: list[int] = []
        self.executed: list[int] = []
        #: What was executed, as the gateway's memory has it; and what the host has been told of that.
        self.known = 0
        self.told = 0
        self.gateway: Link | None = None
        self.to_gateway: list[Any] = []
        self.to_host: list[Any] = []
        self.said: list[int] = []
        self.heard: list[int] = []

    @rule(count=st.integers(1, 3))
    def host_packs(self, count: int) -> None:
        items = list(range(len(self.packed), len(self.packed) + count))
        self.packed += items
        data = self.host.pack(items)
        if self.gateway is not None:
            self.to_gateway += decoded(data)

    @precondition(lambda self: self.gateway is None)
    @rule()
    def gateway_comes(self) -> None:
        received = max(self.known, self.host.acknowledged)
        self.gateway = Link(received)
        self.said, self.heard = [], []
        self.host.resume(received)
        again = [message for data in self.host.unacknowledged() for message in decoded(data)]
        assert [message[0] for message in again] == list(range(received + 1, self.host.sent + 1))
        assert all(message[1] == 0 for message in again), "it acknowledges what the new peer never said"
        self.to_gateway += again

    @precondition(lambda self: self.gateway is not None)
    @rule(count=st.integers(1, 3), lag=st.integers(0, 2))
    def gateway_packs(self, count: int, lag: int) -> None:
        assert self.gateway is not None
        items = list(range(len(self.said), len(self.said) + count))
        self.said += items
        self.to_host += decoded(self.gateway.pack(items, max(0, self.gateway.received - lag)))

    @precondition(lambda self: self.gateway is not None)
    @rule()
    def gateway_acknowledges(self) -> None:
        assert self.gateway is not None
        self.to_host += decoded(self.gateway.acknowledgement() or b"")

    @precondition(lambda self: self.to_gateway)
    @rule()
    def gateway_takes(self) -> None:
        assert self.gateway is not None
        self.executed += self.gateway.take(self.to_gateway.pop(0))
        self.known = self.gateway.received

    @precondition(lambda self: self.to_host)
    @rule()
    def host_takes(self) -> None:
        self.heard += self.host.take(self.to_host.pop(0))

    @precondition(lambda self: self.gateway is not None)
    @rule()
    def gateway_goes(self) -> None:
        """With all that is on its way; its successor knows what it executed."""
        self.gateway = None
        self.to_gateway.clear()
        self.to_host.clear()

    @invariant()
    def each_is_executed_once_and_in_order(self) -> None:
        assert self.executed == self.packed[: len(self.executed)]
        assert self.heard == self.said[: len(self.heard)]
        assert self.host.acknowledged <= self.known <= self.host.sent
        assert len(self.host.unacknowledged()) == self.host.sent - self.host.acknowledged

    def teardown(self) -> None:
        if self.gateway is None:
            self.gateway_comes()
        while self.to_gateway:
            self.gateway_takes()
        self.gateway_acknowledges()
        while self.to_host:
            self.host_takes()
        assert self.executed == self.packed
        assert not self.host.unacknowledged()


TestResumed = Resumed.TestCase
TestResumed.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_peer_that_knows_more_than_was_said_breaks_the_link():
    """L3: its memory is of somebody else."""
    link = Link()
    link.pack(["a"])
    with pytest.raises(LinkError):
        link.resume(2)


def test_what_a_repetition_no_longer_acknowledges_is_owed():
    """Otherwise the peer would keep what its first sending, which may be lost, acknowledged."""
    link = Link()
    link.take([1, 0, ["a"]])
    link.pack(["b"])
    assert link.acknowledgement() is None
    assert [message for data in link.unacknowledged() for message in decoded(data)] == [[1, 0, ["b"]]]
    assert link.acknowledgement() == encode([0, 1, None])


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_items_too_large_for_one_message_go_in_several(monkeypatch, over):
    """A message is decoded whole: what many turns have produced must not become one of a gigabyte."""
    items = ["a" * 50, "b" * 50, "c" * 50, "d" * 500]
    monkeypatch.setattr(hibernation.link, "MESSAGE_BYTES_MAX", len(dumps(items)) - over)
    link, peer = Link(), Link()
    messages = decoded(link.pack(items))
    assert len(messages) == (1 if over <= 0 else 2)
    assert [item for message in messages for item in peer.take(message)] == items
    assert link.sent == len(messages)
    assert len(link.unacknowledged()) == len(messages)


def test_an_acknowledgement_is_owed_only_once():
    """Short acknowledgements are for what no message of one's own has acknowledged."""
    link = Link()
    assert link.acknowledgement() is None
    assert link.take([1, 0, ["a"]]) == ["a"]
    assert link.acknowledgement() == encode([0, 1, None])
    assert link.acknowledgement() is None
    link.take([2, 0, ["b"]])
    assert decoded(link.pack(["c"])) == [[1, 2, ["c"]]]
    assert link.acknowledgement() is None


def test_what_is_not_acknowledged_yet_on_purpose_stays_owed():
    """Items that were made before the newest arrivals were looked at must not claim to know them."""
    link = Link()
    link.take([1, 0, []])
    link.take([2, 0, []])
    assert decoded(link.pack(["x"], 1)) == [[1, 1, ["x"]]]
    assert link.acknowledgement() == encode([0, 2, None])


def test_acknowledging_what_was_never_sent_breaks_the_link():
    """L3."""
    link = Link()
    link.pack(["a"])
    with pytest.raises(LinkError):
        link.take([1, 2, []])


@pytest.mark.parametrize("message", [5, [1, 2], [1, 2, 3, 4], None])
def test_what_is_no_link_message_breaks_the_link(message):
    """A peer of another version, or damaged memory."""
    with pytest.raises(LinkError):
        Link().take(message)


@given(
    st.lists(st.recursive(st.integers() | st.binary() | st.text(), st.lists, max_leaves=4), max_size=8),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_a_stream_is_cut_into_its_values_wherever_it_is_broken(values, cuts):
    """Frames of the stream: 4 bytes of length, and CBOR."""
    data = b"".join(map(encode, values))
    decoder = StreamDecoder()
    found = []
    before = 0
    for cut in [*sorted(cuts), len(data)]:
        decoder.feed(data[before:cut])
        found += list(decoder)
        before = max(before, cut)
    assert found == values


def test_values_are_given_one_at_a_time_while_more_comes():
    """What is not asked for stays bytes; what comes meanwhile goes behind it."""
    decoder = StreamDecoder()
    decoder.feed(encode(1) + encode(2) + encode(3)[:2])
    assert next(decoder) == 1
    decoder.feed(encode(3)[2:] + encode(4))
    assert list(decoder) == [2, 3, 4]


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_length_beyond_the_limit_is_refused_before_its_bytes_are_there(over):
    """Whoever is at the other end cannot make this one wait for 4 GiB."""
    decoder = StreamDecoder(100)
    decoder.feed((100 + over).to_bytes(LENGTH_BYTES, "big"))
    if over <= 0:
        assert next(decoder, None) is None
    else:
        with pytest.raises(LinkError):
            next(decoder)


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x81", dumps(1)[:0] + b"\x1c"])
def test_bytes_that_are_no_cbor_are_refused(body):
    """One kind of error for all that a damaged link can hold."""
    decoder = StreamDecoder()
    decoder.feed(len(body).to_bytes(LENGTH_BYTES, "big") + body)
    with pytest.raises(LinkError):
        next(decoder)
