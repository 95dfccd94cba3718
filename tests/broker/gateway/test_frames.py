"""The frame codec against RFC 6455, against wsproto, and against streams cut anywhere (S14, S24, S40)."""

import struct
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, ParseFailed

from broker.gateway.frames import (
    FRAGMENT_MAX,
    Close,
    Event,
    Header,
    Message,
    MessageReader,
    Ping,
    Pong,
    Violation,
    close_reply,
    encode_close,
    encode_message,
    encode_ping,
    encode_pong,
    frame_header,
    sendable,
    take_message,
)

KEY = b"\x37\xfa\x21\x3d"  # the masking key of the examples in RFC 6455 5.7
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
LIMIT = 1 << 20


def header_bytes(opcode, length, *, fin=True, rsv=0, masked=True, form=None):
    """A header as a client may write it, wrong ones too; `form` forces the length into 0, 2 or 8 bytes."""
    if form is None:
        form = 0 if length < 126 else 2 if length < 65536 else 8
    mask_bit = 0x80 if masked else 0
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    match form:
        case 0:
            return struct.pack("!BB", first, mask_bit | length)
        case 2:
            return struct.pack("!BBH", first, mask_bit | 126, length)
        case _:
            return struct.pack("!BBQ", first, mask_bit | 127, length)


def client_frame(opcode, payload=b"", *, key=KEY, **header):
    masked = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    return header_bytes(opcode, len(payload), **header) + key + masked


def read_stream(pieces, limit=LIMIT, fragment_max=FRAGMENT_MAX):
    """Read a stream that arrives in `pieces` as the gateway does: events, and the code of a violation."""
    buffer = bytearray()
    pos = 0
    reader: MessageReader | None = None
    events: list[Event] = []
    try:
        for piece in pieces:
            buffer += piece
            while True:
                if reader is None:
                    taken = take_message(buffer, pos, len(buffer), limit)
                    if taken is not None:
                        events.append(Message(taken[0]))
                        pos = taken[1]
                        continue
                header = frame_header(buffer, pos, len(buffer))
                if header is None:
                    break
                reader = reader or MessageReader(limit, fragment_max)
                reader.check_header(header)
                after = pos + header.header_bytes + header.length
                if after > len(buffer):
                    if reader.idle:
                        reader = None
                    break
                events += reader.feed(buffer[pos:after])
                pos = after
                if reader.idle:
                    reader = None
    except Violation as violation:
        return events, violation.code
    return events, None


# --- the fast path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 124, 125, 126, 127, 1023, 1024, 1025, 65535, 65536, 65537])
def test_take_message_at_each_bound_of_the_length_forms(kind, length):
    """RFC 6455 5.2: 7 bits, 16 bits, 64 bits; ours: two ways to unmask."""
    payload = bytes(i * 7 % 256 for i in range(length))
    stream = b"xyz" + client_frame(BINARY, payload) + b"rest"
    assert take_message(kind(stream), 3, len(stream), length) == (payload, len(stream) - 4)

    text = ("añ" * length)[: length // 2] + "z" * (length % 2)
    stream = client_frame(TEXT, text.encode())
    assert take_message(kind(stream), 0, len(stream), LIMIT) == (text, len(stream))


def test_the_masked_text_of_the_rfc():
    """RFC 6455 5.7."""
    frame = bytes.fromhex("818537fa213d7f9f4d5158")
    assert take_message(frame, 0, len(frame), 5) == ("Hello", 11)


@pytest.mark.parametrize("length", [5, 200, 3000])
def test_what_was_taken_does_not_change_with_the_buffer(length):
    """The receive buffer is written over."""
    buffer = bytearray(client_frame(BINARY, b"a" * length))
    taken = take_message(buffer, 0, len(buffer), LIMIT)
    buffer[:] = bytes(len(buffer))
    buffer += b"and it can still grow"
    assert taken is not None
    assert type(taken[0]) is bytes
    assert taken[0] == b"a" * length


@pytest.mark.parametrize("length", [0, 5, 125, 126, 3000, 65536])
def test_take_message_wants_the_whole_frame(length):
    """`end` counts, not the length of the buffer, which holds old bytes behind it."""
    frame = client_frame(TEXT, b"a" * length)
    step = max(1, length // 50)
    for end in [*range(0, len(frame), step), len(frame) - 1]:
        assert take_message(frame, 0, end, LIMIT) is None
    assert take_message(frame, 0, len(frame), LIMIT) is not None


@pytest.mark.parametrize("length", [1, 125, 126, 65535, 65536])
def test_take_message_at_the_limit(length):
    """S24: the limit passes whole; one more is not taken (and the header says 1009, below)."""
    frame = client_frame(TEXT, b"a" * length)
    assert take_message(frame, 0, len(frame), length + 1) is not None
    assert take_message(frame, 0, len(frame), length) is not None
    assert take_message(frame, 0, len(frame), length - 1) is None


@pytest.mark.parametrize("length", [2, 200, 3000])
@pytest.mark.parametrize(
    "change",
    [
        {"fin": False},
        {"rsv": 4},
        {"rsv": 2},
        {"rsv": 1},
        {"masked": False},
        *({"opcode": opcode} for opcode in range(16) if opcode not in {TEXT, BINARY}),
    ],
)
def test_take_message_leaves_everything_else(length, change):
    arguments = {"opcode": TEXT, "payload": b"\x03\xe8" + b"a" * (length - 2)} | change
    if not (arguments["opcode"] >= 8 and length > 125):
        frame = client_frame(**arguments)
        assert take_message(frame, 0, len(frame), LIMIT) is None


@pytest.mark.parametrize(("length", "form"), [(5, 2), (125, 2), (5, 8), (126, 8), (65535, 8)])
def test_take_message_leaves_a_length_that_is_not_in_its_shortest_form(length, form):
    """RFC 6455 5.2: the minimal number of bytes MUST be used."""
    frame = client_frame(TEXT, b"a" * length, form=form)
    assert take_message(frame, 0, len(frame), LIMIT) is None


def test_take_message_leaves_text_that_is_not_utf8():
    for text in (b"\xff", b"a" * 200 + b"\xc3", b"a" * 3000 + b"\xed\xa0\x80"):
        frame = client_frame(TEXT, text)
        assert take_message(frame, 0, len(frame), LIMIT) is None
        assert read_stream([frame]) == ([], 1007)


# --- headers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG])
@pytest.mark.parametrize("length", [0, 125, 126, 65535, 65536, 1 << 62, (1 << 63) - 1])
def test_frame_header_reads_each_form(opcode, length):
    if opcode >= CLOSE and length > 125:
        return
    size = 6 if length < 126 else 8 if length < 65536 else 14
    frame = header_bytes(opcode, length) + KEY
    assert frame_header(b"?" + frame, 1, 1 + len(frame)) == Header(opcode, True, 0, True, length, size)
    # The masking key is not waited for; a byte less and the length is not known.
    assert frame_header(frame, 0, size - 4) is not None
    for end in range(size - 4):
        assert frame_header(frame, 0, end) is None


@pytest.mark.parametrize(
    ("frame", "end"),
    [
        *(
            pytest.param(client_frame(TEXT, rsv=rsv), 1, id=f"RSV {rsv:03b}, RFC 6455 5.2")
            for rsv in range(1, 8)
        ),
        *(
            pytest.param(client_frame(opcode), 1, id=f"reserved opcode {opcode:X}, RFC 6455 5.2")
            for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
        ),
        *(
            pytest.param(
                client_frame(opcode, fin=False), 1, id=f"fragmented control {opcode:X}, RFC 6455 5.5"
            )
            for opcode in (CLOSE, PING, PONG)
        ),
        *(
            pytest.param(client_frame(opcode, b"a" * 126), 2, id=f"long control {opcode:X}, RFC 6455 5.5")
            for opcode in (CLOSE, PING, PONG)
        ),
        pytest.param(client_frame(TEXT, b"hello", masked=False), 2, id="unmasked, RFC 6455 5.1"),
        pytest.param(client_frame(PING, b"", masked=False), 2, id="unmasked ping, RFC 6455 5.1"),
        pytest.param(client_frame(TEXT, b"a" * 125, form=2), 4, id="2 bytes for 125, RFC 6455 5.2"),
        pytest.param(client_frame(TEXT, b"", form=8), 10, id="8 bytes for 0, RFC 6455 5.2"),
        pytest.param(header_bytes(TEXT, 65535, form=8), 10, id="8 bytes for 65535, RFC 6455 5.2"),
        pytest.param(header_bytes(TEXT, 1 << 63), 10, id="bit 63, RFC 6455 5.2"),
        pytest.param(header_bytes(TEXT, (1 << 64) - 1), 10, id="all bits, RFC 6455 5.2"),
    ],
)
def test_what_the_header_alone_shows_to_be_wrong_is_1002(frame, end):
    """Told by the very byte that shows it, not one before it and not waiting for more."""
    with pytest.raises(Violation) as caught:
        frame_header(frame, 0, end)
    assert caught.value.code == 1002
    assert frame_header(frame, 0, end - 1) is None
    assert take_message(frame, 0, len(frame), LIMIT) is None
    assert read_stream([frame]) == ([], 1002)


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_message_over_the_limit_is_1009_from_its_header(opcode):
    """S24, FAULTS rows 29 and 30: before a byte of payload has come."""
    for length in (1 << 62, 1001):
        assert read_stream([header_bytes(opcode, length)], limit=1000) == ([], 1009)
    assert read_stream([header_bytes(opcode, 1000)], limit=1000) == ([], None)


def test_fragments_over_the_limit_are_1009_from_the_header_that_goes_over():
    begin = client_frame(TEXT, b"a" * 600, fin=False)
    assert read_stream([begin, header_bytes(CONTINUATION, 401)], limit=1000) == ([], 1009)
    assert read_stream([begin, header_bytes(CONTINUATION, 400)], limit=1000) == ([], None)


def test_a_reader_counts_anew_for_each_message():
    reader = MessageReader(limit_bytes=10, fragment_max=2)
    for _ in range(3):
        assert reader.feed(client_frame(TEXT, b"a" * 6, fin=False)) == []
        assert reader.feed(client_frame(CONTINUATION, b"b" * 4)) == [Message("aaaaaabbbb")]


def test_control_frames_do_not_count_against_the_limit():
    reader = MessageReader(limit_bytes=3)
    assert reader.feed(client_frame(TEXT, b"ab", fin=False)) == []
    assert reader.feed(client_frame(PING, b"p" * 125)) == [Ping(b"p" * 125)]
    assert reader.feed(client_frame(CONTINUATION, b"c")) == [Message("abc")]


def test_check_header_changes_nothing():
    reader = MessageReader(limit_bytes=3, fragment_max=1)
    header = frame_header(header_bytes(TEXT, 3), 0, 2)
    assert header is not None
    for _ in range(5):
        reader.check_header(header)
    assert reader.idle
    assert reader.feed(client_frame(TEXT, b"abc")) == [Message("abc")]


def test_a_message_in_too_many_fragments_is_1008():
    """FAULTS row 31: they cost more than their bytes."""
    for count, expected in ((4, None), (5, None), (6, 1008)):
        fragments = [client_frame(TEXT, fin=False), *[client_frame(CONTINUATION, fin=False)] * (count - 2)]
        events, code = read_stream([*fragments, client_frame(CONTINUATION, b"x")], fragment_max=5)
        assert (events, code) == ([Message("x")] if expected is None else [], expected)


def test_a_flood_of_empty_fragments_ends_at_the_default_cap():
    reader = MessageReader(LIMIT)
    reader.feed(client_frame(BINARY, fin=False))
    frame = client_frame(CONTINUATION, fin=False)
    for _ in range(FRAGMENT_MAX - 1):
        reader.feed(frame)
    with pytest.raises(Violation) as caught:
        reader.feed(frame)
    assert caught.value.code == 1008


# --- messages in fragments, and control frames ------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([client_frame(CONTINUATION, b"a")], id="continuation of nothing"),
        pytest.param(
            [client_frame(TEXT, b"a"), client_frame(CONTINUATION, b"a")], id="continuation of a whole"
        ),
        pytest.param([client_frame(TEXT, b"a", fin=False), client_frame(TEXT, b"a")], id="text inside text"),
        pytest.param([client_frame(TEXT, b"a", fin=False), client_frame(BINARY)], id="binary inside text"),
        pytest.param([client_frame(BINARY, fin=False), client_frame(BINARY, fin=False)], id="begin twice"),
    ],
)
def test_frames_out_of_sequence_are_1002(frames):
    """RFC 6455 5.4."""
    events, code = read_stream(frames)
    assert code == 1002
    # The last frame's header is enough, even if a payload is yet to come.
    header = header_bytes(frames[-1][0] & 0x0F, 5, fin=frames[-1][0] >= 0x80)
    assert read_stream([*frames[:-1], header]) == (events, 1002)
    assert len(events) == sum(frame[0] & 0x80 > 0 for frame in frames[:-1])


def test_control_frames_come_between_fragments():
    """RFC 6455 5.4: they MAY be injected in the middle of a fragmented message."""
    frames = [
        client_frame(TEXT, b"one ", fin=False),
        client_frame(PING, b"1"),
        client_frame(CONTINUATION, b"two", fin=False),
        client_frame(PONG, b""),
        client_frame(CONTINUATION, b""),
        client_frame(CLOSE, b"\x03\xe8bye"),
    ]
    assert read_stream(frames) == ([Ping(b"1"), Pong(b""), Message("one two"), Close(1000, "bye")], None)


def test_empty_messages_in_fragments_keep_their_kind():
    for opcode, empty in ((TEXT, ""), (BINARY, b"")):
        frames = [client_frame(opcode, fin=False), client_frame(CONTINUATION)]
        assert read_stream(frames) == ([Message(empty)], None)


def test_a_reader_is_idle_but_inside_a_message():
    reader = MessageReader(LIMIT)
    states = [reader.idle]
    for frame in (
        client_frame(PING),
        client_frame(TEXT, fin=False),
        client_frame(PING),
        client_frame(CONTINUATION, fin=False),
        client_frame(CONTINUATION),
        client_frame(BINARY, b"x"),
    ):
        reader.feed(frame)
        states.append(reader.idle)
    assert states == [True, True, False, False, False, True, True]


@pytest.mark.parametrize(
    "frame", [b"", b"\x81", b"\x81\x85", client_frame(TEXT, b"ab")[:-1], client_frame(TEXT) + b"x"]
)
def test_feed_takes_exactly_one_frame(frame):
    with pytest.raises(ValueError, match="one whole frame"):
        MessageReader(LIMIT).feed(frame)


UTF8 = "κόσμε a\u00e9\u20ac\ud7ff\ue000\uffff\U00010000\U0010ffff".encode()


def test_text_may_be_cut_inside_a_character():
    """RFC 6455 5.6, 8.1: it is the whole message that is UTF-8."""
    cuts = range(len(UTF8) + 1)
    for first, second in combinations(cuts, 2):
        frames = [
            client_frame(TEXT, UTF8[:first], fin=False),
            client_frame(CONTINUATION, UTF8[first:second], fin=False),
            client_frame(CONTINUATION, UTF8[second:]),
        ]
        assert read_stream(frames) == ([Message(UTF8.decode())], None)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"\x80", id="stray continuation byte"),
        pytest.param(b"\xff", id="no such byte"),
        pytest.param(b"\xc0\xaf", id="overlong slash"),
        pytest.param(b"\xe0\x80\xaf", id="overlong in three"),
        pytest.param(b"\xed\xa0\x80", id="surrogate"),
        pytest.param(b"\xf4\x90\x80\x80", id="above U+10FFFF"),
        pytest.param(b"\xe2\x82", id="unfinished"),
    ],
)
def test_text_that_is_not_utf8_is_1007_wherever_it_is_cut(bad):
    """RFC 6455 8.1, S40."""
    for text in (b"ok" + bad, b"ok" + bad + b"ok"):
        for cut in range(len(text) + 1):
            frames = [client_frame(TEXT, text[:cut], fin=False), client_frame(CONTINUATION, text[cut:])]
            assert read_stream(frames) == ([], 1007)
        assert read_stream([client_frame(TEXT, text)]) == ([], 1007)
        # The same bytes as binary are nobody's business.
        assert read_stream([client_frame(BINARY, text)]) == ([Message(text)], None)


def test_bad_text_is_told_before_the_message_ends():
    with pytest.raises(Violation) as caught:
        MessageReader(LIMIT).feed(client_frame(TEXT, b"a\xffb", fin=False))
    assert caught.value.code == 1007


# --- close ------------------------------------------------------------------------------------------------

VALID_CODES = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4409, 4999]
INVALID_CODES = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 1999, 2000, 2999, 5000, 65535]


@pytest.mark.parametrize("code", VALID_CODES)
def test_a_close_code_that_may_be_sent_is_read_and_written(code):
    """RFC 6455 7.4; 1012 to 1014 are from the IANA registry."""
    frame = client_frame(CLOSE, code.to_bytes(2, "big") + "grüß".encode())
    assert read_stream([frame]) == ([Close(code, "grüß")], None)
    assert sendable(code)
    assert encode_close(code, "grüß") == b"\x88\x08" + code.to_bytes(2, "big") + "grüß".encode()
    assert close_reply(Close(code, "grüß")) == b"\x88\x02" + code.to_bytes(2, "big")


@pytest.mark.parametrize("code", INVALID_CODES)
def test_a_close_code_that_must_not_be_sent_is_1002(code):
    """RFC 6455 7.4.1, 7.4.2; S14: 1005, 1006 and 1015 never go on the wire."""
    assert read_stream([client_frame(CLOSE, code.to_bytes(2, "big"))]) == ([], 1002)
    assert not sendable(code)
    with pytest.raises(ValueError, match=str(code)):
        encode_close(code)


def test_a_close_without_a_code_is_1005():
    """RFC 6455 7.1.5; answered in kind."""
    assert read_stream([client_frame(CLOSE)]) == ([Close(1005, "")], None)
    assert close_reply(Close(1005, "")) == encode_close(None) == b"\x88\x00"
    with pytest.raises(ValueError, match="needs a close code"):
        encode_close(None, "because")


def test_half_a_close_code_is_1002():
    """RFC 6455 5.5.1: a body begins with two bytes."""
    with pytest.raises(Violation, match="two bytes") as caught:
        MessageReader(LIMIT).feed(client_frame(CLOSE, b"\x03"))
    assert caught.value.code == 1002


def test_a_close_reason_that_is_not_utf8_is_1007():
    """RFC 6455 5.5.1, 8.1; FAULTS row 33."""
    assert read_stream([client_frame(CLOSE, b"\x03\xe8\xe2\x82")]) == ([], 1007)


def test_a_close_reason_at_its_bound():
    """S14: over 123 bytes is an error where it is made; bytes count, not characters."""
    assert len(encode_close(1000, "x" * 123)) == 127
    assert len(encode_close(1000, "é" * 61)) == 126
    for reason in ("x" * 124, "é" * 62):
        with pytest.raises(ValueError, match="at most 123 bytes, not 124"):
            encode_close(1000, reason)
    with pytest.raises(ValueError, match="surrogates"):
        encode_close(1000, "\ud800")
    assert read_stream([client_frame(CLOSE, b"\x03\xe8" + b"x" * 123)]) == ([Close(1000, "x" * 123)], None)


# --- sending ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536])
def test_what_is_sent_is_read_by_wsproto(length):
    """RFC 6455 5.2, 5.1: the shortest form of the length, no mask."""
    for message in ("ü" * (length // 2) + "u" * (length % 2), bytes(length)):
        frame = encode_message(message)
        assert len(frame) == length + (2 if length < 126 else 4 if length < 65536 else 10)
        client = FrameProtocol(client=True, extensions=[])
        client.receive_bytes(frame)
        (received,) = client.received_frames()
        assert received.payload == message
        assert type(received.payload) is type(message)
        assert received.message_finished


def test_a_message_without_utf8_cannot_be_sent():
    with pytest.raises(UnicodeEncodeError):
        encode_message("a\udc80")


def test_pings_and_pongs_at_their_bound():
    """RFC 6455 5.5: at most 125 bytes."""
    assert encode_ping() == b"\x89\x00"
    assert encode_pong(b"ab") == b"\x8a\x02ab"
    for encode in (encode_ping, encode_pong):
        assert len(encode(bytes(124))) == 126
        assert len(encode(bytes(125))) == 127
        with pytest.raises(ValueError, match="125 bytes, not 126"):
            encode(bytes(126))


# --- streams ----------------------------------------------------------------------------------------------

keys = st.binary(min_size=4, max_size=4)
payload_sizes = st.sampled_from([0, 1, 2, 5, 32, 124, 125, 126, 127, 300, 1024, 1025, 2000])


@st.composite
def conversations(draw):
    """A stream that a well-behaved client may send, and the events that it means."""
    stream = bytearray()
    events: list[Event] = []

    def control_frames():
        for _ in range(draw(st.integers(0, 1))):
            payload = draw(st.binary(max_size=10))
            ping = draw(st.booleans())
            stream.extend(client_frame(PING if ping else PONG, payload, key=draw(keys)))
            events.append(Ping(payload) if ping else Pong(payload))

    for _ in range(draw(st.integers(1, 4))):
        control_frames()
        data: str | bytes
        if draw(st.booleans()):
            data = text = draw(st.text(max_size=20)) * draw(st.sampled_from([1, 1, 1, 50]))
            payload, opcode = text.encode(), TEXT
        else:
            data = payload = draw(st.binary(max_size=1)) * draw(payload_sizes)
            opcode = BINARY
        cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
        spans = list(pairwise([0, *cuts, len(payload)]))
        for number, (begin, end) in enumerate(spans):
            if number:
                control_frames()
            last = number == len(spans) - 1
            code = CONTINUATION if number else opcode
            stream.extend(client_frame(code, payload[begin:end], fin=last, key=draw(keys)))
        events.append(Message(data))
    if draw(st.booleans()):
        stream.extend(client_frame(CLOSE, b"\x03\xe9", key=draw(keys)))
        events.append(Close(1001, ""))
    return bytes(stream), events


def cut(data, stream):
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=6), label="cuts")
    return [stream[a:b] for a, b in pairwise([0, *sorted(places), len(stream)])]


@given(conversations(), st.data())
def test_any_split_of_a_stream_gives_the_same_events(conversation, data):
    """FAULTS row 36."""
    stream, events = conversation
    assert read_stream(cut(data, stream)) == (events, None)


def test_a_stream_cut_at_every_byte_gives_the_same_events():
    frames = [
        client_frame(TEXT, "é€".encode()),
        client_frame(TEXT, b"\xe2", fin=False),
        client_frame(PING, b"?"),
        client_frame(CONTINUATION, b"\x82\xac"),
        client_frame(BINARY, bytes(130)),
        client_frame(CLOSE, b"\x0f\xa0bye"),
    ]
    stream = b"".join(frames)
    expected = [Message("é€"), Ping(b"?"), Message("€"), Message(bytes(130)), Close(4000, "bye")]
    for place in range(len(stream) + 1):
        assert read_stream([stream[:place], stream[place:]]) == (expected, None)
    assert read_stream([stream[i : i + 1] for i in range(len(stream))]) == (expected, None)


@st.composite
def odd_frames(draw):
    """Frames that may be wrong in any way that keeps their length readable."""
    payload = draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"\x03\xe8", "€".encode(), bytes(126)])))
    return client_frame(
        draw(st.one_of(st.sampled_from([0, 1, 2, 8, 9, 10]), st.integers(0, 15))),
        payload,
        key=draw(keys),
        fin=draw(st.sampled_from([True, True, False])),
        rsv=draw(st.sampled_from([0] * 15 + [1, 2, 4])),
        masked=draw(st.sampled_from([True] * 15 + [False])),
    )


def read_by_wsproto(stream):
    """The same answer as read_stream() gives, from wsproto alone (limits aside)."""
    server = FrameProtocol(client=False, extensions=[])
    server.receive_bytes(stream)
    events: list[Event] = []
    pieces = []
    try:
        for frame in server.received_frames():
            payload: Any = frame.payload
            match int(frame.opcode):
                case 9:
                    events.append(Ping(payload))
                case 10:
                    events.append(Pong(payload))
                case 8:
                    events.append(Close(int(payload[0]), payload[1]))
                case _:
                    pieces.append(payload)
                    if frame.message_finished:
                        events.append(Message(type(pieces[0])().join(pieces)))
                        pieces = []
    except ParseFailed as error:
        return events, int(error.code)
    return events, None


@given(st.lists(odd_frames(), max_size=6), st.data())
def test_odd_frames_mean_what_they_mean_to_wsproto(frames, data):
    """S40: the same events, then the same close code; and cut anywhere, too."""
    closing = [i for i, frame in enumerate(frames) if frame[0] & 0x0F == CLOSE]
    if closing:  # what follows a Close is the caller's to ignore
        frames = frames[: closing[0] + 1]
    stream = b"".join(frames)
    expected = read_by_wsproto(stream)
    assert read_stream([stream]) == expected
    assert read_stream(cut(data, stream)) == expected


@given(st.binary(max_size=64), st.data())
def test_random_bytes_raise_nothing_but_violations(noise, data):
    """S40: and a split changes neither the events nor the code."""
    expected = read_stream([noise], limit=40)
    assert expected[1] in {None, 1002, 1007, 1008, 1009}
    assert read_stream(cut(data, noise), limit=40) == expected


@given(odd_frames(), st.integers(0, 8))
def test_the_fast_path_agrees_with_the_thorough_one(frame, limit):
    """Invariant 1 of the module."""
    taken = take_message(frame, 0, len(frame), limit)
    if taken is not None:
        assert MessageReader(limit).feed(frame) == [Message(taken[0])]
        assert taken[1] == len(frame)


@given(st.binary(max_size=70), st.integers(0, 70), st.integers(0, 70))
def test_take_message_never_raises(noise, pos, end):
    take_message(noise, min(pos, len(noise)), min(end, len(noise)), LIMIT)


@given(conversations())
def test_what_wsproto_sends_as_a_client_is_read(conversation):
    """A reference client writes the frames, with its own masking keys."""
    _, events = conversation
    client = FrameProtocol(client=True, extensions=[])
    stream = b""
    for event in events:
        match event:
            case Message(data):
                half = len(data) // 2
                stream += client.send_data(data[:half], fin=False) + client.send_data(data[half:], fin=True)
                stream += client.send_data(data, fin=True)
            case Ping(payload):
                stream += client.ping(payload)
            case Pong(payload):
                stream += client.pong(payload)
            case Close(code, reason):
                stream += client.close(code, reason)
    expected: list[Event] = []
    for event in events:
        expected += [event, event] if isinstance(event, Message) else [event]
    assert read_stream([stream]) == (expected, None)


def test_violations_fit_into_a_close_frame():
    for code in (1002, 1007, 1008, 1009):
        for limit in (1, 32 << 20):
            with pytest.raises(Violation) as caught:
                _break(code, limit)
            assert caught.value.code == code
            assert encode_close(caught.value.code, caught.value.reason)
            assert str(caught.value) == f"{code} {caught.value.reason}"


def _break(code, limit):
    reader = MessageReader(limit, fragment_max=0 if code == 1008 else 1)
    match code:
        case 1002:
            reader.feed(client_frame(CONTINUATION))
        case 1007:
            reader.feed(client_frame(TEXT, b"\xff"))
        case 1008:
            reader.feed(client_frame(TEXT))
        case 1009:
            reader.check_header(Header(TEXT, True, 0, True, limit + 1, 6))
