"""Whatever a client sends: S38, S39 and S40 against the running broker.

The answer is the status or close code that the RFC names, what came before it is handled, and the process
goes on.
"""

import contextlib
import itertools
import json
import os
import random
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.broker_process import eventually, whole_lines
from tests.e2e.raw_client import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, RawClient, encode_frame

pytestmark = pytest.mark.e2e

APP = """
    import json
    from pathlib import Path

    from broker import Server

    LOG = Path(__file__).with_name("events.jsonl")


    class Main(Server):
        def on_message(self, message, sender):
            sender.send(message)

        def on_close(self, connection, code, reason, was_clean):
            event = {"room": self.room.id, "code": code, "cause": connection.close_cause}
            with LOG.open("a") as log:
                log.write(json.dumps(event) + "\\n")


    class Listed(Main):
        origins = ["https://example.com", "http://example.org:8080", "null"]

        @staticmethod
        def on_before_connect(request, lobby):
            with LOG.open("a") as log:
                log.write(json.dumps({"room": lobby.id, "before": True}) + "\\n")


    class Open(Main):
        origins = "*"


    class Headers(Server):
        def on_connect(self, connection, ctx):
            names = {name.lower() for name, _ in ctx.request.headers.items()}
            connection.send(sorted(name for name in names if name.startswith("x-")))
"""


class Instance:
    def __init__(self, broker) -> None:
        self.broker = broker
        self.pids = [broker.gateway_pid(), *broker.host_pids()]

    def events(self, room: str) -> list[dict]:
        log = self.broker.folder / "events.jsonl"
        noted = [json.loads(line) for line in whole_lines(log)]
        return [each for each in noted if each["room"] == room]

    def closed(self, room: str) -> tuple[int, str]:
        [event] = eventually(lambda: self.events(room), "the close turn")
        return event["code"], event["cause"]

    def goes_on(self) -> None:
        with self.broker.connect("/party/goes-on") as client:
            client.send("hello")
            assert client.receive() == "hello"
        assert [self.broker.gateway_pid(), *self.broker.host_pids()] == self.pids


@pytest.fixture(scope="module")
def instance(module_broker):
    instance = Instance(module_broker(APP, close_timeout_seconds=20))
    yield instance
    instance.goes_on()
    text = instance.broker.log
    assert "Traceback" not in text
    assert "could not be" not in text


_rooms = itertools.count()


@pytest.fixture
def room() -> str:
    return f"room-{next(_rooms)}"


# --- Frames (S40, RFC 6455) -------------------------------------------------------------------------


def header(first: int, second: int, rest: bytes = b"") -> bytes:
    return bytes([first, second]) + rest


VIOLATIONS = {
    "unmasked text": (encode_frame(TEXT, b"x", mask=False), 1002),
    "unmasked close": (encode_frame(CLOSE, b"\x03\xe8", mask=False), 1002),
    "first reserved bit": (encode_frame(TEXT, b"x", rsv=4), 1002),
    "second reserved bit": (encode_frame(TEXT, b"x", rsv=2), 1002),
    "third reserved bit": (encode_frame(PING, b"x", rsv=1), 1002),
    "opcode 3": (encode_frame(3, b"x"), 1002),
    "opcode 7": (encode_frame(7, b"x"), 1002),
    "opcode 11": (encode_frame(11, b"x"), 1002),
    "opcode 15": (encode_frame(15, b"x"), 1002),
    "ping in fragments": (encode_frame(PING, b"x", fin=False), 1002),
    "close in fragments": (encode_frame(CLOSE, b"\x03\xe8", fin=False), 1002),
    "ping of 126 bytes": (encode_frame(PING, b"x" * 126), 1002),
    "pong of 70,000 bytes": (encode_frame(PONG, b"x" * 70_000)[:20], 1002),
    "close of 126 bytes": (encode_frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
    "continuation of nothing": (encode_frame(CONTINUATION, b"x"), 1002),
    "last continuation of nothing": (encode_frame(CONTINUATION, b"x", fin=False), 1002),
    "message in a message": (encode_frame(TEXT, b"x", fin=False) + encode_frame(TEXT, b"x"), 1002),
    "length in 2 bytes, too long": (header(0x82, 0xFE, struct.pack(">H", 125)) + bytes(4), 1002),
    "length in 8 bytes, too long": (header(0x82, 0xFF, struct.pack(">Q", 65_535)) + bytes(4), 1002),
    "bit 63": (header(0x82, 0xFF, struct.pack(">Q", 1 << 63)), 1002),
    "all ones": (header(0x82, 0xFF, b"\xff" * 8), 1002),
    "2^62": (header(0x82, 0xFF, struct.pack(">Q", 1 << 62)), 1009),
    "4 GiB": (header(0x81, 0xFF, struct.pack(">Q", 1 << 32)), 1009),
    "close of one byte": (encode_frame(CLOSE, b"\x03"), 1002),
    "close reason that is no UTF-8": (encode_frame(CLOSE, b"\x03\xe8\xff"), 1007),
    **{
        f"close code {code}": (encode_frame(CLOSE, struct.pack(">H", code)), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535)
    },
    "text that is no UTF-8": (encode_frame(TEXT, b"ab\xff"), 1007),
    "overlong text": (encode_frame(TEXT, b"\xc0\x80"), 1007),
    "surrogate": (encode_frame(TEXT, b"\xed\xa0\x80"), 1007),
    "beyond Unicode": (encode_frame(TEXT, b"\xf4\x90\x80\x80"), 1007),
    "half a character": (encode_frame(TEXT, "é".encode()[:1]), 1007),
    "half a character at the end of fragments": (
        encode_frame(TEXT, b"a", fin=False) + encode_frame(CONTINUATION, "é".encode()[:1]),
        1007,
    ),
    "wrong in the middle of fragments": (encode_frame(TEXT, b"a\xffb", fin=False), 1007),
    "a second upgrade": (b"GET /party/x HTTP/1.1\r\nHost: x\r\n\r\n", 1002),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_frames_that_break_the_rules(instance, room, name):
    """S40: what came before is handled, then the code, then the end; on_close once, with its cause."""
    data, code = VIOLATIONS[name]
    with instance.broker.connect(f"/party/{room}") as client:
        client.send("before")
        assert client.receive() == "before"  # the Close of a violation does not wait for turns
        client.send_bytes(data)
        told, reason = client.expect_close()
        assert told == code
        assert reason.isascii()
        with contextlib.suppress(ConnectionError):  # it may have gone already
            client.send_bytes(os.urandom(1000))
        assert client.at_eof()
    assert instance.closed(room) == (code, "too_big" if code == 1009 else "protocol_error")


@pytest.mark.parametrize("name", ["unmasked text", "text that is no UTF-8", "2^62"])
def test_messages_before_a_violation_are_handled(instance, room, name):
    """S40, S14: in the same packet; on_close comes after their turns."""
    data, code = VIOLATIONS[name]
    with instance.broker.connect(f"/party/{room}") as client:
        client.send_bytes(b"".join(encode_frame(TEXT, b"%d" % n) for n in range(20)) + data)
        while (frame := client.receive_frame())[0] == TEXT:
            pass
        assert frame[1][:2] == struct.pack(">H", code)
    assert instance.closed(room)[0] == code


@pytest.mark.parametrize("text", ["häßlich", "€uro", "𝄞 clef"])
def test_characters_cut_anywhere(instance, room, text):
    """S40: UTF-8 is checked over fragments, not in each."""
    data = text.encode()
    with instance.broker.connect(f"/party/{room}") as client:
        for cut in range(len(data) + 1):
            client.send_frame(TEXT, data[:cut], fin=False)
            client.send_frame(PING, b"between")
            client.send_frame(CONTINUATION, data[cut:])
            assert client.receive_frame() == (PONG, b"between")
            assert client.receive() == text


def test_a_stream_cut_at_every_byte(instance, room):
    """S40: wherever TCP cuts, the frames are the same."""
    stream = (
        encode_frame(TEXT, "é".encode())
        + encode_frame(PING, b"p")
        + encode_frame(BINARY, b"x" * 130, fin=False)
        + encode_frame(CONTINUATION, b"y" * 3)
        + encode_frame(TEXT, b"end")
    )
    expected = [(PONG, b"p"), (TEXT, "é".encode()), (BINARY, b"x" * 130 + b"yyy"), (TEXT, b"end")]
    with instance.broker.connect(f"/party/{room}") as client:
        for cut in range(1, len(stream)):
            client.send_bytes(stream[:cut])
            time.sleep(0.001)
            client.send_bytes(stream[cut:])
            assert sorted(client.receive_frame() for _ in range(4)) == sorted(expected)


def memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("size", [0, 1])
def test_a_million_fragments(instance, room, size):
    """S40: 1008 at the cap, in bounded time and memory; the others are served meanwhile."""
    before = memory_bytes(instance.pids[0])
    with (
        instance.broker.connect(f"/party/{room}") as client,
        instance.broker.connect("/party/other") as other,
    ):
        data = (
            encode_frame(BINARY, fin=False) + encode_frame(CONTINUATION, b"x" * size, fin=False) * 1_000_000
        )

        def send() -> None:
            with contextlib.suppress(OSError):
                client.sock.sendall(data)

        thread = threading.Thread(target=send)
        started = time.monotonic()
        thread.start()
        while client.is_silent(0.0):
            other.send("hello")
            assert other.receive() == "hello"
            assert time.monotonic() - started < 60
        assert client.expect_close()[0] == 1008
        with contextlib.suppress(OSError):  # it may have gone already
            client.sock.shutdown(2)
        thread.join()
    assert instance.closed(room) == (1008, "limit")
    assert memory_bytes(instance.pids[0]) - before < 8 * 1024 * 1024


def test_fragments_without_end(instance, room):
    """S24, S40: many clients that never end their message take nothing of anybody's bounds."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(instance.broker.connect(f"/party/{room}"))
            client.send_frame(BINARY, b"x" * 80_000, fin=False)
        last = stack.enter_context(instance.broker.connect(f"/party/{room}"))
        for _ in range(10):
            last.send("hello")
            assert last.receive() == "hello"
    eventually(lambda: len(instance.events(room)) == 101, "101 close turns")
    assert {each["cause"] for each in instance.events(room)} == {"client_gone"}


def test_control_frames_without_end_within_a_message(instance, room):
    """S40: they are answered as long as somebody reads, and cost bounded memory."""
    before = memory_bytes(instance.pids[0])
    with instance.broker.connect(f"/party/{room}") as client:
        client.send_frame(TEXT, b"begun", fin=False)
        ended = False
        for _ in range(100):
            client.send_bytes(encode_frame(PING, b"x" * 100) * 100)
            for _ in range(100):
                opcode, _ = client.receive_frame()
                if opcode == CLOSE:  # so many that they are refused
                    ended = True
                    break
            if ended:
                break
        else:
            client.send_frame(CONTINUATION, b" and ended")
            assert client.receive() == "begun and ended"
    assert memory_bytes(instance.pids[0]) - before < 4 * 1024 * 1024


def test_bytes_after_a_close_are_ignored(instance, room):
    """RFC 6455, section 1.4: whatever they are."""
    with instance.broker.connect(f"/party/{room}") as client:
        client.send_bytes(encode_frame(CLOSE, b"\x03\xe8") + os.urandom(50_000))
        assert client.expect_close() == (1000, "")
        assert client.at_eof()
    assert instance.closed(room) == (1000, "client_close")


def test_urgent_data(instance, room):
    """S40: TCP's urgent byte would be cut out of the stream: the connection ends."""
    import socket

    with instance.broker.connect(f"/party/{room}") as client:
        client.sock.send(b"!", socket.MSG_OOB)
        assert client.expect_close()[0] == 1002
        assert client.at_eof()
    assert instance.closed(room) == (1002, "protocol_error")


def test_noise(instance, room):
    """S40: random bytes and mutilated frames, by a fixed seed: some code, some end, and nobody dies."""
    noise = random.Random(20)
    whole = encode_frame(TEXT, b"hello", mask=b"abcd") + encode_frame(PING, b"x", mask=b"abcd")
    whole += encode_frame(BINARY, b"z" * 300, fin=False, mask=b"abcd") + encode_frame(
        CONTINUATION, b"y", mask=b"abcd"
    )
    for number in range(150):
        data = bytearray(whole if number % 2 else noise.randbytes(noise.randrange(1, 400)))
        for _ in range(noise.randrange(1, 4)):
            data[noise.randrange(len(data))] = noise.randrange(256)
        with instance.broker.connect(f"/party/{room}-{number % 5}") as client:
            client.send_bytes(bytes(data))
            with contextlib.suppress(OSError):  # it may have gone already
                client.shutdown()
            with contextlib.suppress(EOFError, ConnectionResetError):
                while True:
                    opcode, payload = client.receive_frame()
                    if opcode == CLOSE and payload:
                        assert (
                            struct.unpack(">H", payload[:2])[0] in (1002, 1007, 1008, 1009)
                            or len(payload) >= 2
                        )
    eventually(lambda: not instance.broker.connections(), "nobody left")
    events = [each for number in range(5) for each in instance.events(f"{room}-{number}")]
    assert len(events) == 150
    instance.goes_on()


# --- Requests (S37, S40) ----------------------------------------------------------------------------

KEY = "AAAAAAAAAAAAAAAAAAAAAA=="


def request(
    *lines: str, drop: str = "", method: str = "GET", target: str = "/party/x", version: str = "1.1"
) -> bytes:
    """An upgrade with more lines, without the headers named in `drop`."""
    usual = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
    }
    head = [
        f"{method} {target} HTTP/{version}",
        *[f"{n}: {v}" for n, v in usual.items() if n not in drop.split()],
    ]
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1")


REQUESTS = {
    "two Host": (request("Host: localhost"), 400),
    "no Host": (request(drop="Host"), 400),
    "two keys": (request(f"Sec-WebSocket-Key: {KEY}"), 400),
    "no key": (request(drop="Sec-WebSocket-Key"), 400),
    "short key": (request("Sec-WebSocket-Key: AAAA", drop="Sec-WebSocket-Key"), 400),
    "key that is no base64": (
        request("Sec-WebSocket-Key: !!!!!!!!!!!!!!!!!!!!!!==", drop="Sec-WebSocket-Key"),
        400,
    ),
    "two versions": (request("Sec-WebSocket-Version: 13"), 400),
    "no version": (request(drop="Sec-WebSocket-Version"), 400),
    "version 8": (request("Sec-WebSocket-Version: 8", drop="Sec-WebSocket-Version"), 426),
    "two Upgrade": (request("Upgrade: websocket"), 400),
    "no Connection": (request(drop="Connection"), 400),
    "h2c": (request("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", drop="Upgrade"), 400),
    "HTTP/1.0": (request(version="1.0"), 505),
    "HTTP/3.0": (request(version="3.0"), 505),
    "POST": (request(method="POST"), 405),
    "absolute target": (request(target="http://localhost/party/x"), 400),
    "body": (request("Content-Length: 5") + b"hello", 400),
    "chunked": (request("Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "length and chunked": (request("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    "two lengths": (request("Content-Length: 0", "Content-Length: 5"), 400),
    "obs-fold": (request("X-Y: a\r\n b"), 400),
    "space before colon": (request("X-Y : a"), 400),
    "bare LF": (request().replace(b"\r\n", b"\n"), 400),
    "one bare LF": (request("X-Y: a\nX-Z: b"), 400),
    "bare CR": (request("X-Y: a\rb"), 400),
    "NUL": (request("X-Y: a\0b"), 400),
    "no colon": (request("X-Y"), 400),
    "empty name": (request(": x"), 400),
    "space in target": (request(target="/party/x y"), 400),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32), 400),
    "nothing but lines": (b"\r\n\r\n\r\n", 400),
    "unknown party": (request(target="/parties/nobody/x"), 404),
    "no room": (request(target="/elsewhere"), 404),
    "bad room": (request(target="/party/%00"), 400),
    "room of 513 bytes": (request(target="/party/" + "x" * 513), 400),
    "two Origin": (request("Origin: http://localhost", "Origin: http://localhost"), 400),
    "evil origin": (request("Origin: http://evil.example"), 403),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("pipelined", [False, True])
def test_requests_that_break_the_rules(instance, name, pipelined):
    """S40: the status, `Connection: close`, the end; nothing behind it is parsed, no detail is told (S39)."""
    data, status = REQUESTS[name]
    with RawClient(instance.broker.port) as client:
        client.send_bytes(data + (request(target="/party/smuggled") if pipelined else b""))
        answer = client.receive_answer()
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert client.at_eof()
        if status == 426:
            assert answer.headers["sec-websocket-version"] == "13"
        told = f"{answer.headers} {answer.body!r}".lower()
        for secret in ("traceback", "python", "hypercorn", "/work", "quart", "broker/"):
            assert secret not in told
    assert not instance.broker.connections(room="smuggled")


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
def test_a_head_cut_anywhere(instance, room, step):
    """S40: wherever TCP cuts the request, its answer is the same; so is the frame behind it."""
    data = request("X-Padding: " + "x" * 100, target=f"/party/{room}") + encode_frame(TEXT, b"early")
    with RawClient(instance.broker.port) as client:
        for start in range(0, len(data), step):
            client.send_bytes(data[start : start + step])
        assert client.receive_answer().status == 101
        assert client.receive() == "early"


def test_extensions_are_declined(instance, room):
    """No permessage-deflate: nothing is said of it, and a compressed frame is a reserved bit."""
    with RawClient(instance.broker.port) as client:
        answer = client.handshake(
            f"/party/{room}", {"sec-websocket-extensions": "permessage-deflate; client_max_window_bits"}
        )
        assert "sec-websocket-extensions" not in answer.headers
        client.send_frame(TEXT, b"\xcaH\xcd\xc9\xc9\x07\x00", rsv=4)
        assert client.expect_close()[0] == 1002


# --- Origins (S38) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("party", "origin", "host", "status"),
    [
        ("main", None, "a.example", 101),
        ("main", "http://a.example", "a.example", 101),
        ("main", "https://a.example", "a.example", 101),
        ("main", "HTTP://A.Example", "a.example", 101),
        ("main", "http://a.example:80", "a.example", 101),
        ("main", "http://a.example:8080", "a.example:8080", 101),
        ("main", "http://a.example:8081", "a.example:8080", 403),
        ("main", "http://a.example", "a.example:8080", 403),
        ("main", "http://a.example.evil.example", "a.example", 403),
        ("main", "http://sub.a.example", "a.example", 403),
        ("main", "http://evil-a.example", "a.example", 403),
        ("main", "http://a.example@evil.example", "a.example", 403),
        ("main", "http://a.example/", "a.example", 403),
        ("main", "null", "a.example", 403),
        ("main", "", "a.example", 403),
        ("main", "file://", "a.example", 403),
        ("main", "http://localhost", "127.0.0.1", 403),
        ("listed", "https://example.com", "a.example", 101),
        ("listed", "https://example.com:443", "a.example", 101),
        ("listed", "http://example.com", "a.example", 403),
        ("listed", "http://example.org:8080", "a.example", 101),
        ("listed", "http://example.org", "a.example", 403),
        ("listed", "http://a.example", "a.example", 403),
        ("listed", "null", "a.example", 101),
        ("listed", None, "a.example", 101),
        ("open", "http://evil.example", "a.example", 101),
        ("open", "null", "a.example", 101),
    ],
)
def test_origins(instance, room, party, origin, host, status):
    """S38: exact match of scheme, host and port; 403 before any code of the room runs."""
    with RawClient(instance.broker.port) as client:
        client.send_handshake(f"/parties/{party}/{room}", {"host": host, "origin": origin})
        assert client.receive_answer().status == status
        if status == 403:
            assert client.at_eof()
            assert not instance.events(room)


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:5173", 101), ("http://127.0.0.1", 101), ("http://evil.example", 403), ("null", 403)],
)
def test_loopback_origins_in_dev(dev, room, origin, status):
    """S38: a page that a developer's other server sends may connect, others may not."""
    with RawClient(dev.port) as client:
        client.send_handshake(f"/party/{room}", {"origin": origin})
        assert client.receive_answer().status == status


@pytest.fixture(scope="module")
def dev(module_broker):
    return module_broker(APP, command="dev")


# --- Headers of our own (S39) -----------------------------------------------------------------------


def test_headers_of_our_namespace_are_stripped(instance):
    """S39: nobody outside speaks in our name."""
    headers = {"x-broker-token": "1", "X-PartyKit-Id": "2", "x-other": "3", "x-forwarded-for": "4.4.4.4"}
    with instance.broker.connect("/parties/headers/x", headers=headers) as client:
        assert json.loads(client.receive()) == ["x-other"]
