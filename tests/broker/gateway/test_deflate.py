"""permessage-deflate (RFC 7692) on its own: what is agreed to, what comes out, what a client may not do."""

import random
import tracemalloc
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.deflate import (
    COMPRESSED_BYTES_MAX,
    FINAL_BLOCKS_MAX,
    Agreement,
    CorruptDeflate,
    InflatedTooLarge,
    choose_deflate,
    deflate,
    inflate,
    window_for,
    wire_bytes_max,
)
from broker.gateway.frames import (
    Message,
    MessageReader,
    Violation,
    encode_compressed,
    encode_message,
    frame_header,
    take_message,
)
from tests.e2e.raw_client import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, encode_frame

BOTH = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
MIB = 1 << 20


# --- What is agreed to ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offer", "window_bits", "answered"),
    [
        ("permessage-deflate", 15, ""),
        ("permessage-deflate; client_max_window_bits", 15, ""),  # browsers, ws
        ("permessage-deflate; client_max_window_bits=8", 15, ""),
        ("permessage-deflate;client_max_window_bits=15", 15, ""),
        ("permessage-deflate ; server_no_context_takeover ;client_no_context_takeover", 15, ""),
        ("permessage-deflate; server_max_window_bits=9", 9, "; server_max_window_bits=9"),
        ("permessage-deflate; server_max_window_bits=15", 15, "; server_max_window_bits=15"),
        ('permessage-deflate; server_max_window_bits="10"', 10, "; server_max_window_bits=10"),
        (
            "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",
            12,
            "; server_max_window_bits=12",
        ),  # the websockets package
    ],
)
def test_an_acceptable_offer(offer: str, window_bits: int, answered: str) -> None:
    assert choose_deflate((offer,)) == Agreement(BOTH + answered, window_bits)


@pytest.mark.parametrize(
    "offer",
    [
        "permessage-bzip2",
        "x-webkit-deflate-frame",
        "Permessage-Deflate",
        "permessage-deflate; server_max_window_bits=8",  # zlib cannot
        "permessage-deflate; server_max_window_bits=7",
        "permessage-deflate; server_max_window_bits=16",
        "permessage-deflate; server_max_window_bits=010",
        "permessage-deflate; server_max_window_bits=+9",
        "permessage-deflate; server_max_window_bits=1_0",
        "permessage-deflate; server_max_window_bits=",
        "permessage-deflate; server_max_window_bits",
        "permessage-deflate; client_max_window_bits=7",
        "permessage-deflate; client_max_window_bits=16",
        "permessage-deflate; client_max_window_bits=\u0661\u0660",
        'permessage-deflate; client_max_window_bits=""',
        "permessage-deflate; server_no_context_takeover=1",
        "permessage-deflate; client_no_context_takeover=true",
        "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
        "permessage-deflate; client_max_window_bits; client_max_window_bits=10",
        "permessage-deflate; unknown",
        "permessage-deflate; unknown=1",
        "permessage-deflate;",
        "permessage-deflate; ; client_max_window_bits",
        "permessage-deflate; client_max_window_bits=10 11",
        "permessage-deflate client_max_window_bits",
        'permessage-deflate; client_max_window_bits="10',
    ],
)
def test_an_offer_that_is_declined(offer: str) -> None:
    """RFC 7692 5.1: it is as if it had not been made, and the next one counts."""
    assert choose_deflate((offer,)) is None
    assert choose_deflate((offer, "permessage-deflate")) == Agreement(BOTH, 15)


def test_the_first_acceptable_offer_is_taken() -> None:
    offers = ("x", "permessage-deflate; server_max_window_bits=11", "permessage-deflate")
    assert choose_deflate(offers) == Agreement(BOTH + "; server_max_window_bits=11", 11)
    assert choose_deflate(()) is None


# --- What we send ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window_bits", range(9, 16))
@pytest.mark.parametrize("size", [1, 125, 126, 4096, 65535, 65536, COMPRESSED_BYTES_MAX])
def test_what_is_compressed_can_be_read_with_the_window_agreed_on(window_bits: int, size: int) -> None:
    text = random.Random(size).randbytes(200).hex() * (size // 400 + 1)
    frame = encode_message(text[:size])
    small = encode_compressed(frame, window_for(size, window_bits))
    assert small == frame or len(small) < len(frame)
    if small != frame:
        assert small[0] == 0xC1
        header = 2 if small[1] < 126 else 4 if small[1] == 126 else 10
        stream = zlib.decompressobj(-window_bits)
        assert stream.decompress(small[header:] + b"\0\0\xff\xff").decode() == text[:size]


def test_the_window_is_as_small_as_the_message_allows() -> None:
    """So messages up to 512 bytes come out the same for all, and others for all windows above theirs."""
    assert [window_for(size, 15) for size in (1, 512, 513, 4096, 4097, 32768, MIB)] == [
        9,
        9,
        10,
        12,
        13,
        15,
        15,
    ]
    assert window_for(MIB, 10) == 10


def test_what_cannot_be_made_smaller_goes_out_as_it_is() -> None:
    noise = random.Random(1).randbytes(10_000)
    for message in (noise, b"", "", "x", "a" * (COMPRESSED_BYTES_MAX + 1)):
        frame = encode_message(message)
        assert encode_compressed(frame, 15) is frame
    assert len(encode_compressed(encode_message("a" * COMPRESSED_BYTES_MAX), 15)) < 4000
    assert encode_compressed(encode_message(b"a" * 1000), 9)[0] == 0xC2


# --- What a client sends --------------------------------------------------------------------------


@given(
    data=st.binary(max_size=5000), cuts=st.lists(st.integers(0, 6000), max_size=5), level=st.integers(0, 9)
)
def test_any_message_in_any_pieces(data: bytes, cuts: list[int], level: int) -> None:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
    whole = (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
    bounds = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[a:b] for a, b in pairwise(bounds)]
    assert inflate(pieces, len(data)) == data
    if data:
        with pytest.raises(InflatedTooLarge):
            inflate(pieces, len(data) - 1)


@pytest.mark.parametrize("size", [1000, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, MIB - 1, MIB])
def test_the_limit_counts_what_comes_out(size: int) -> None:
    """S24: at the limit it passes whole, one byte above it does not pass."""
    bomb = deflate(bytes(size), 15)
    assert inflate([bomb], size) == bytes(size)
    with pytest.raises(InflatedTooLarge):
        inflate([bomb], size - 1)


def test_a_bomb_takes_no_memory() -> None:
    """A thousandfold ratio and more: what is kept stays below the limit and a piece."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(bytes(400 * MIB)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < MIB
    tracemalloc.start()
    with pytest.raises(InflatedTooLarge):
        inflate([bomb], MIB)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MIB


def test_the_examples_of_the_rfc() -> None:
    """RFC 7692 7.2.3.1 to 7.2.3.5."""
    hello = bytes.fromhex("f248cdc9c90700")
    assert inflate([hello], 5) == b"Hello"
    assert inflate([bytes.fromhex("000500faff48656c6c6f00")], 5) == b"Hello"  # a block without compression
    assert inflate([bytes.fromhex("f348cdc9c9070000")], 5) == b"Hello"  # a final block
    assert (
        inflate([bytes.fromhex("f248050000 00ffffcac9c90700".replace(" ", ""))], 5) == b"Hello"
    )  # two blocks
    assert inflate([b"\0"], 0) == b""
    with pytest.raises(CorruptDeflate):
        inflate([bytes.fromhex("f200110000")], 100)  # it leans on the message before, which is not kept


def test_final_blocks_are_bounded() -> None:
    """Behind each of them a decompressor is made anew."""
    assert inflate([b"\x03\x00" * (FINAL_BLOCKS_MAX - 1) + b"\0"], 10) == b""
    assert inflate([b"\x03\x00" * FINAL_BLOCKS_MAX + b"\0"], 10) == b""
    with pytest.raises(CorruptDeflate):
        inflate([b"\x03\x00" * (FINAL_BLOCKS_MAX + 1) + b"\0"], 10)
    with pytest.raises(CorruptDeflate):
        inflate([b"\x03\x00" * MIB], 10)


@given(st.binary(min_size=1, max_size=300))
def test_garbage_is_refused_or_read_but_nothing_else(data: bytes) -> None:
    try:
        assert len(inflate([data], 1000)) <= 1000
    except (CorruptDeflate, InflatedTooLarge):
        pass


@pytest.mark.parametrize("left", range(1, 40))
def test_a_message_that_ends_early_is_refused(left: int) -> None:
    whole = deflate(random.Random(3).randbytes(30).hex().encode(), 15)
    with pytest.raises(CorruptDeflate):
        inflate([whole[: min(left, len(whole) - 2)]], 1000)


def test_what_may_be_on_the_wire_is_enough_for_what_cannot_be_compressed() -> None:
    """RFC 1951 3.2.4."""
    for size in (1, 1000, 65_536, MIB):
        noise = random.Random(size).randbytes(size)
        for level in (0, 1, 9):
            for memory in (1, 9):
                compressor = zlib.compressobj(level, zlib.DEFLATED, -9, memory)
                assert len(
                    compressor.compress(noise) + compressor.flush(zlib.Z_SYNC_FLUSH)
                ) <= wire_bytes_max(size)


# --- Frames ---------------------------------------------------------------------------------------


def read(*frames: bytes, limit: int = MIB, compressed: bool = True) -> list[Message]:
    """What a gateway reads of whole frames."""
    reader = MessageReader(limit, compressed=compressed)
    found = []
    for frame in frames:
        header = frame_header(frame, 0, len(frame), compressed=compressed)
        assert header is not None
        reader.check_header(header)
        found += [event for event in reader.feed(frame) if isinstance(event, Message)]
    return found


def code_of(*frames: bytes, limit: int = MIB, compressed: bool = True) -> int:
    with pytest.raises(Violation) as caught:
        read(*frames, limit=limit, compressed=compressed)
    return caught.value.code


HELLO = deflate("hällo".encode(), 15)


def test_messages_with_and_without_compression_in_turn() -> None:
    """RFC 7692 6: each message says for itself."""
    frames = (
        encode_frame(TEXT, HELLO, rsv=4),
        encode_frame(TEXT, b"plain"),
        encode_frame(BINARY, HELLO[:3], rsv=4, fin=False),
        encode_frame(PING, b"between"),
        encode_frame(CONTINUATION, b"", fin=False),
        encode_frame(CONTINUATION, HELLO[3:]),
    )
    assert read(*frames) == [Message("hällo", 6), Message("plain"), Message("hällo".encode(), 6)]
    assert take_message(frames[0], 0, len(frames[0]), MIB) is None


@pytest.mark.parametrize(
    "frames",
    [
        (encode_frame(TEXT, HELLO, rsv=2),),
        (encode_frame(TEXT, HELLO, rsv=1),),
        (encode_frame(TEXT, HELLO, rsv=6),),
        (encode_frame(PING, b"", rsv=4),),
        (encode_frame(PONG, b"", rsv=4),),
        (encode_frame(CLOSE, b"\x03\xe8", rsv=4),),
        (encode_frame(TEXT, HELLO[:2], rsv=4, fin=False), encode_frame(CONTINUATION, HELLO[2:], rsv=4)),
        (encode_frame(TEXT, b"a", fin=False), encode_frame(CONTINUATION, b"b", rsv=4)),
    ],
)
def test_the_bit_where_it_may_not_be(frames: tuple[bytes, ...]) -> None:
    """RFC 7692 6, RFC 6455 5.2: only the first frame of a message may have it, and no other bit."""
    assert code_of(*frames) == 1002


def test_the_bit_without_agreement() -> None:
    assert code_of(encode_frame(TEXT, HELLO, rsv=4), compressed=False) == 1002


def test_what_cannot_be_read_is_1007() -> None:
    assert code_of(encode_frame(TEXT, b"\xff\xff\xff", rsv=4)) == 1007
    assert code_of(encode_frame(TEXT, deflate(b"\xff", 15), rsv=4)) == 1007
    assert read(encode_frame(BINARY, deflate(b"\xff", 15), rsv=4)) == [Message(b"\xff", 1)]


def test_the_limit_of_a_compressed_message() -> None:
    """S24: 1009, from the header if that suffices, otherwise when it has grown too large."""
    for size, passes in ((999, True), (1000, True), (1001, False)):
        frame = encode_frame(BINARY, deflate(bytes(size), 15), rsv=4)
        if passes:
            assert read(frame, limit=1000) == [Message(bytes(size), size)]
        else:
            assert code_of(frame, limit=1000) == 1009
    most = wire_bytes_max(1000)
    reader = MessageReader(1000, compressed=True)
    for size in (most - 1, most):
        header = frame_header(encode_frame(TEXT, bytes(size), rsv=4), 0, 14, compressed=True)
        assert header is not None
        reader.check_header(header)
    header = frame_header(encode_frame(TEXT, bytes(most + 1), rsv=4), 0, 14, compressed=True)
    assert header is not None
    with pytest.raises(Violation) as caught:
        reader.check_header(header)
    assert caught.value.code == 1009
    assert (
        code_of(
            encode_frame(TEXT, bytes(most), rsv=4, fin=False), encode_frame(CONTINUATION, b"x"), limit=1000
        )
        == 1009
    )


def test_an_unfinished_message_holds_no_more_than_what_came() -> None:
    """It is decompressed when it is whole: many clients with half a bomb each cost what they sent."""
    reader = MessageReader(32 * MIB, compressed=True)
    bomb = deflate(bytes(16 * MIB), 15)
    tracemalloc.start()
    assert reader.feed(encode_frame(TEXT, bomb, rsv=4, fin=False)) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(bomb)
