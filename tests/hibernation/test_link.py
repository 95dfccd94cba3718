"""The link's numbering over a transport that drops, repeats and reorders; and the cutting of its stream."""

import random
from typing import Any

import pytest
from cbor2 import dumps
from hypothesis import given, settings
from hypothesis import strategies as st

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
