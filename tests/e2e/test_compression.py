"""permessage-deflate against the running command, with clients that others wrote, and with one that cheats
(S22, S24, S25, S40; RFC 7692).
"""

import random
import struct
import zlib
from collections.abc import Iterator

import pytest
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import connect as connect_websockets

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.browser import Browser
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import BINARY, CONTINUATION, PING, TEXT, RawClient
from tests.e2e.test_partysocket import Driver

pytestmark = pytest.mark.e2e

APP = """
import random

from broker import Server


class Main(Server):
    compression = "deflate"
    auto_responses = {"ping": "pong"}
    message_bytes_max = 1024 * 1024
    outbox_bytes_max = 64 * 1024 * 1024  # all that a test asks for, before it reads any of it

    async def on_message(self, message, sender):
        if message == "all":
            self.room.broadcast("everybody " * 1000)
        elif isinstance(message, str) and message.startswith("large "):
            sender.send(random.Random(message).randbytes(100_000).hex())
        else:
            sender.send(message)

    @staticmethod
    async def on_fetch(request, lobby):
        return "<!doctype html><title>page</title>"


class Plain(Server):
    async def on_message(self, message, sender):
        sender.send(message)


class Deaf(Server):
    compression = "deflate"
    message_bytes_max = 1000
"""

OFFER = {"sec-websocket-extensions": "permessage-deflate; client_max_window_bits"}
AGREED = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
SIZES = [1, 125, 126, 1023, 1024, 1025, 65_535, 65_536, 262_144, 262_145, 1_048_576]
MIB = 1 << 20


@pytest.fixture(scope="module")
def instance(module_broker: BrokerFactory) -> Iterator[BrokerProcess]:
    started = module_broker(APP)
    yield started
    assert "a handler of the gateway failed" not in started.log
    assert "a torn frame could not be mended" not in started.log


def compressed(message: str | bytes, level: int = 6) -> bytes:
    """A message's payload as a client that takes nothing over compresses it."""
    data = message.encode() if isinstance(message, str) else message
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def agreed(broker: BrokerProcess, path: str = "/party/room", offer: str = "permessage-deflate") -> RawClient:
    client = RawClient(broker.port)
    answer = client.handshake(path, {"sec-websocket-extensions": offer})
    assert answer.headers["sec-websocket-extensions"].startswith(AGREED)
    return client


def receive(client: RawClient) -> tuple[str | bytes, bool]:
    """The next message, and whether it came compressed."""
    while True:
        first, length = client.receive_bytes(2)
        if length == 126:
            (length,) = struct.unpack(">H", client.receive_bytes(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", client.receive_bytes(8))
        data = client.receive_bytes(length)
        assert first & 0x80
        if first & 0x0F == PING:
            continue
        assert first & 0x0F in (TEXT, BINARY), (first, data)
        if first & 0x40:
            stream = zlib.decompressobj(-15)
            data = stream.decompress(data + b"\0\0\xff\xff")
        return data.decode() if first & 0x0F == TEXT else data, bool(first & 0x40)


# --- What is agreed to ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "offer", "answer"),
    [
        ("/party/room", "permessage-deflate; client_max_window_bits", AGREED),
        ("/party/room", "permessage-deflate; server_max_window_bits=8, permessage-deflate", AGREED),
        ("/party/room", "permessage-deflate; x, x-other", None),
        (
            "/party/room",
            "permessage-deflate; server_max_window_bits=10",
            AGREED + "; server_max_window_bits=10",
        ),
        ("/parties/plain/room", "permessage-deflate", None),
    ],
)
def test_what_is_answered_to_an_offer(
    instance: BrokerProcess, path: str, offer: str, answer: str | None
) -> None:
    with RawClient(instance.port) as client:
        found = client.handshake(path, {"sec-websocket-extensions": offer})
        assert found.headers.get("sec-websocket-extensions") == answer


def test_the_count_of_those_that_have_agreed(instance: BrokerProcess) -> None:
    eventually(lambda: instance.stats()["compressed"] == 0, "nobody")
    with agreed(instance, "/party/count"), agreed(instance, "/party/count"), instance.connect("/party/count"):
        eventually(lambda: instance.stats()["compressed"] == 2, "two")
    eventually(lambda: instance.stats()["compressed"] == 0, "nobody")


# --- Messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_either_end_may_compress_or_not(instance: BrokerProcess, size: int) -> None:
    """From 1 KiB to 256 KiB what gets smaller comes back compressed."""
    text = "abc\u00e4" * (size // 4) + "x" * (size % 4)
    data = random.Random(size).randbytes(size)
    with agreed(instance, f"/party/sizes-{size}") as client:
        for message in (text[: max(1, size * 4 // 5)], data):
            raw = message.encode() if isinstance(message, str) else message
            opcode = TEXT if isinstance(message, str) else BINARY
            client.send_frame(opcode, raw)
            once = receive(client)
            client.send_frame(opcode, compressed(message, 1), rsv=4)
            assert receive(client) == once
            smaller = isinstance(message, str) and 1024 <= len(raw) <= 262_144
            assert once == (message, smaller)


def test_fragments_controls_and_automatic_responses(instance: BrokerProcess) -> None:
    with agreed(instance, "/party/fragments") as client:
        whole = compressed("x" * 300_000 + "end", 0)  # too large for the inbox: by way of a spill file
        parts = [whole[start : start + 50_000] for start in range(0, len(whole), 50_000)]
        client.send_frame(TEXT, parts[0], rsv=4, fin=False)
        for part in parts[1:]:
            client.send_frame(CONTINUATION, part, fin=False)
            client.send_frame(0xA, b"unasked")
        client.send_frame(CONTINUATION, b"")
        assert receive(client) == ("x" * 300_000 + "end", False)
        client.send_frame(TEXT, compressed("ping"), rsv=4)
        assert receive(client) == ("pong", False)
        client.send_frame(TEXT, b"plain")
        assert receive(client) == ("plain", False)


def test_a_broadcast_is_compressed_for_those_who_agreed(instance: BrokerProcess) -> None:
    with (
        agreed(instance, "/party/all") as one,
        agreed(instance, "/party/all", "permessage-deflate; server_max_window_bits=9") as small,
        instance.connect("/party/all") as plain,
    ):
        plain.send("all")
        assert plain.receive() == "everybody " * 1000
        assert receive(one) == receive(small) == ("everybody " * 1000, True)


# --- What a client must not do --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "opcode", "payload", "rsv", "code"),
    [
        ("/parties/deaf/room", TEXT, compressed("a" * 1001), 4, 1009),
        ("/parties/deaf/room", BINARY, compressed(bytes(100 * MIB)), 4, 1009),
        ("/party/room", BINARY, compressed(bytes(MIB + 1)), 4, 1009),
        ("/party/room", TEXT, b"\xff\xff\xff\xff", 4, 1007),
        ("/party/room", TEXT, compressed("x" * 5000)[:8], 4, 1007),
        ("/party/room", TEXT, compressed(b"\xc3\x28"), 4, 1007),
        ("/party/room", TEXT, b"\x03\x00" * 50_000, 4, 1007),
        ("/party/room", PING, b"", 4, 1002),
        ("/party/room", CONTINUATION, b"", 4, 1002),
        ("/party/room", TEXT, b"", 2, 1002),
        ("/parties/plain/room", TEXT, compressed("x"), 4, 1002),
    ],
)
def test_what_ends_the_connection(
    instance: BrokerProcess, path: str, opcode: int, payload: bytes, rsv: int, code: int
) -> None:
    with RawClient(instance.port) as client:
        client.handshake(path, OFFER)
        client.send_frame(opcode, payload, rsv=rsv)
        assert client.expect_close()[0] == code


def test_a_full_message_passes_and_one_byte_more_does_not(instance: BrokerProcess) -> None:
    with agreed(instance, "/parties/deaf/room") as client:
        for size in (999, 1000):
            client.send_frame(BINARY, compressed(bytes(size)), rsv=4)
        client.send_frame(PING, b"?")
        assert client.receive_frame()[1] == b"?"
        client.send_frame(BINARY, compressed(bytes(1001)), rsv=4)
        assert client.expect_close()[0] == 1009


def test_many_bombs_within_the_limit(instance: BrokerProcess) -> None:
    """S24: what is in flight counts as what it is for the host; each is handled, in order."""
    with agreed(instance, "/party/bombs") as client:
        bomb = compressed(bytes(MIB))
        for number in range(40):
            client.send_frame(BINARY, bomb, rsv=4)
            client.send(str(number))
        for number in range(40):
            assert receive(client)[0] == bytes(MIB)
            assert receive(client) == (str(number), False)


# --- Clients that others wrote --------------------------------------------------------------------


def messages() -> list[str | bytes]:
    chance = random.Random(7)
    return [
        "a",
        b"\0",
        "short \u00fc",
        "long " * 5000,
        bytes(100_000),
        chance.randbytes(2000),
        chance.randbytes(200_000),
        chance.randbytes(100_000).hex(),
        "\u20ac" * 340_000,
    ]


@pytest.mark.parametrize("window_bits", [None, 12])
def test_websockets(instance: BrokerProcess, window_bits: int | None) -> None:
    wanted = ClientPerMessageDeflateFactory(server_max_window_bits=window_bits)
    with connect_websockets(
        instance.ws_url("/party/python"), max_size=None, proxy=None, extensions=[wanted], compression=None
    ) as client:
        assert client.response is not None
        answer = client.response.headers["Sec-WebSocket-Extensions"]
        assert answer == AGREED + (f"; server_max_window_bits={window_bits}" if window_bits else "")
        for message in messages():
            client.send(message)
            assert client.recv() == message
        for message in messages():
            client.send(message)
        assert [client.recv() for _ in messages()] == messages()


def test_ws_under_partysocket(instance: BrokerProcess) -> None:
    driver = Driver(instance.port)
    try:
        eventually(lambda: instance.stats()["compressed"] == 0, "nobody")
        socket = driver.open(room="node")
        socket.wait_for("open", 1)
        eventually(lambda: instance.stats()["compressed"] == 1, "one")
        socket.send(*messages())
        assert socket.messages(len(messages())) == messages()
    finally:
        driver.close()


def test_chromium(instance: BrokerProcess) -> None:
    echo = """async (url) => {
        const socket = new WebSocket(url);
        await new Promise((resolve, reject) => { socket.onopen = resolve; socket.onerror = reject; });
        const sizes = [1, 1000, 5000, 200000, 1000000];
        for (const size of sizes) {
            const sent = "zip\\u00fc".repeat(size / 5 + 1);
            const got = new Promise((resolve) => { socket.onmessage = (event) => resolve(event.data); });
            socket.send(sent);
            if (await got !== sent) return `wrong at ${size}`;
        }
        return socket.extensions;
    }"""
    with Browser() as browser:
        tab = browser.open(instance.url("/"))
        url = instance.ws_url("/party/browser")
        assert tab.do("evaluate", f"({echo})({url!r})") == AGREED


# --- Deaths ---------------------------------------------------------------------------------------


def large(word: str) -> str:
    """What the room answers."""
    return random.Random(word).randbytes(100_000).hex()


def test_frames_that_a_dying_gateway_has_begun(instance: BrokerProcess) -> None:
    """S22, S34: compression and half a frame outlive it; so does what waits in an outbox. Only the frame that
    it was about to compress comes as it is.
    """
    chance = random.Random(3)
    with agreed(instance, "/party/death") as client:
        for _ in range(3):
            words = [f"large {chance.randbytes(4).hex()}" for _ in range(30)]
            for word in words:
                client.send_frame(TEXT, compressed(word), rsv=4)
            assert receive(client) == (large(words[0]), True)
            small = "small " + chance.randbytes(600).hex()
            client.send_frame(TEXT, compressed(small), rsv=4)
            instance.kill_gateway()
            found = [receive(client) for _ in words]
            assert [message for message, _ in found] == [*map(large, words[1:]), small]
            assert sum(not was_compressed for _, was_compressed in found) <= 1


def test_an_upgrade_keeps_what_was_agreed_on(instance: BrokerProcess) -> None:
    """S33."""
    with agreed(instance, "/party/upgrade", "permessage-deflate; server_max_window_bits=9") as client:
        status, said = instance.command("upgrade")
        assert status == 0, said
        eventually(lambda: instance.stats()["compressed"] == 1, "one")
        text = random.Random(1).randbytes(5000).hex()
        client.send_frame(TEXT, compressed(text), rsv=4)
        assert receive(client) == (text, True)
