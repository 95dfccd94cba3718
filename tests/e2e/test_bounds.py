"""What is bounded, and what happens at the bound: S24, S25 and S37 against the running broker."""

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from hashlib import blake2b
from pathlib import Path

import pytest

from tests.e2e.broker_process import eventually, whole_lines
from tests.e2e.raw_client import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, RawClient, encode_frame

pytestmark = pytest.mark.e2e

APP = """
    import json
    from hashlib import blake2b
    from pathlib import Path

    import trio

    from broker import Server

    LOG = Path(__file__).with_name("events.jsonl")


    class Main(Server):
        turn_timeout = 100.0

        def note(self, event, **fields):
            with LOG.open("a") as log:
                log.write(json.dumps({"room": self.room.id, "event": event, **fields}) + "\\n")

        async def on_message(self, message, sender):
            if isinstance(message, bytes):
                sender.send([len(message), blake2b(message).hexdigest()])
                return
            word, *rest = message.split(" ")
            if word == "sleep":
                self.note("sleep")
                await trio.sleep(float(rest[0]))
            elif word == "flood":
                for number in range(int(rest[0])):
                    self.room.broadcast(str(number).rjust(int(rest[1])), without=[sender])
            elif word == "hold":
                self.note("hold")
                while not LOG.with_name("go").exists():
                    await trio.sleep(0.02)
            elif word == "echo":
                sender.send(message)
                return
            sender.send(f"did {word}")

        async def on_close(self, connection, code, reason, was_clean):
            self.note("closed", id=connection.id, code=code, clean=was_clean, cause=connection.close_cause)


    class Small(Main):
        message_bytes_max = 1000


    class Crowd(Main):
        room_connections_max = 3


    class Slow(Main):
        outbox_bytes_max = 200_000


    class Oldest(Slow):
        slow_consumer = "drop_oldest"


    class Newest(Slow):
        slow_consumer = "drop_newest"
"""

MIB = 1 << 20


class Instance:
    def __init__(self, broker) -> None:
        self.broker = broker
        self.port = broker.port
        self.opened: list[RawClient] = []

    def connect(self, room: str, name: str = "x", party: str = "main"):
        return self.broker.connect(f"/parties/{party}/{room}?_pk={name}")

    def answer(self, path: str, *, source: str = "127.0.0.1", headers=None):
        """Shake hands from a source address; gives the answer and the client, which stays open."""
        client = RawClient(self.port)
        client.sock.close()
        client.sock = socket.create_connection(("127.0.0.1", self.port), 10, source_address=(source, 0))
        self.opened.append(client)
        client.send_handshake(path, headers)
        return client.receive_answer(), client

    def close_all(self) -> None:
        """Close what `answer` has opened."""
        while self.opened:
            self.opened.pop().close()

    def is_refused(self, path: str) -> bool:
        """Whether a further client gets 503 with Retry-After, and the end of its connection."""
        answer, client = self.answer(path)
        with client:
            if answer.status == 101:
                return False
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.headers["connection"] == "close"
            assert client.at_eof()
            return True

    def events(self, room: str, event: str | None = None) -> list[dict]:
        log = self.broker.folder / "events.jsonl"
        noted = [json.loads(line) for line in whole_lines(log)]
        return [each for each in noted if each["room"] == room and event in (None, each["event"])]


@pytest.fixture(scope="module")
def instance(module_broker):
    """Nobody here is so slow that a deadline would come first."""
    instance = Instance(module_broker(APP, close_timeout_seconds=60, ping_interval_seconds=600))
    hosts = instance.broker.host_pids()
    yield instance
    assert instance.broker.host_pids() == hosts


@pytest.fixture(scope="module")
def hasty(module_broker):
    """An instance that waits a second for a Close, and keeps little for those who do not read."""
    return Instance(module_broker(APP, close_timeout_seconds=1, outbox_total_bytes_max=MIB))


_rooms = itertools.count()


@pytest.fixture
def room() -> str:
    return f"room-{next(_rooms)}"


def body(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


def told(client: RawClient, size: int) -> None:
    """The room has had a message of so many bytes, and it was the right one."""
    assert json.loads(client.receive()) == [size, blake2b(body(size)).hexdigest()]


# --- The size of a message (S24) --------------------------------------------------------------------

SIZES = [0, 1, 125, 126, 65_535, 65_536, 98_290, 98_304, 98_305, 131_072, 262_144, MIB - 1, MIB]


@pytest.mark.parametrize("size", SIZES)
def test_messages_up_to_the_limit(instance, room, size):
    """S24: in one frame; those too large for the kernel's buffer come through the spill file."""
    with instance.connect(room) as client:
        client.send_frame(BINARY, body(size))
        client.send("echo behind it")
        told(client, size)
        assert client.receive() == "echo behind it"
        eventually(lambda: instance.broker.unread_bytes(client.local_port) == 0, "all consumed")
    eventually(lambda: not list((instance.broker.data / "spill").iterdir()), "no spill file")


@pytest.mark.parametrize("size", [2, 126, 98_304, 131_072, MIB])
@pytest.mark.parametrize("pieces", [2, 7, 300])
def test_messages_in_fragments_up_to_the_limit(instance, room, size, pieces):
    """S24, S40: with pings among the fragments."""
    data, step = body(size), max(size // pieces, 1)
    with instance.connect(room) as client:
        starts = list(range(0, size, step))
        for start in starts:
            client.send_frame(
                CONTINUATION if start else BINARY, data[start : start + step], fin=start == starts[-1]
            )
            if start == starts[len(starts) // 2]:
                client.send_frame(PING, b"among them")
        client.send("echo behind it")
        frames = [client.receive_frame() for _ in range(3)]
        if starts[-1]:
            assert (PONG, b"among them") in frames
        messages = [payload for opcode, payload in frames if opcode == TEXT]
        assert json.loads(messages[0]) == [size, blake2b(data).hexdigest()]
        assert messages[1] == b"echo behind it"


@pytest.mark.parametrize(("party", "limit"), [("small", 1000), ("main", MIB)])
@pytest.mark.parametrize("fragments", [False, True])
def test_one_byte_too_many(instance, room, party, limit, fragments):
    """S24: 1009 from the header alone: not a byte of the payload has come; cause too_big."""
    with instance.connect(room, party=party) as client:
        client.send_frame(BINARY, body(limit))
        told(client, limit)
        if fragments:
            client.send_frame(BINARY, body(limit - 10), fin=False)
            client.send_bytes(encode_frame(CONTINUATION, body(11))[:6])
        else:
            client.send_bytes(encode_frame(BINARY, body(limit + 1))[: 8 if limit < 65_536 else 14])
        code, reason = client.expect_close()
        assert code == 1009
        assert str(limit) in reason
        assert client.at_eof()
    [event] = eventually(lambda: instance.events(room, "closed"), "the close turn")
    assert (event["code"], event["clean"], event["cause"]) == (1009, False, "too_big")


# --- Rooms that do not finish (S24) -----------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_room_that_does_not_finish_fills_nothing(instance, room):
    """S24: its client's data stays in the kernel's buffers and in the client; all comes in the end."""
    broker = instance.broker
    go = broker.folder / "go"
    go.unlink(missing_ok=True)
    with instance.connect(room) as client, instance.connect(f"{room}-other") as other:
        client.send("hold")
        eventually(lambda: instance.events(room, "hold"), "the turn")
        [host], gateway = broker.host_pids(), broker.gateway_pid()
        before = resident_bytes(host), resident_bytes(gateway)
        message = encode_frame(BINARY, body(10_000))
        total, sent = 3000, 0
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        client.sock.setblocking(False)
        data = message * total
        view = memoryview(data)
        idle = 0
        while idle < 20:
            try:
                sent += client.sock.send(view[sent:])
                idle = 0
            except BlockingIOError:
                idle += 1
                time.sleep(0.02)
        assert sent < 3_000_000
        for _ in range(20):
            other.send("echo")
            assert other.receive() == "echo"
        assert resident_bytes(host) - before[0] < 4_000_000
        assert resident_bytes(gateway) - before[1] < 4_000_000
        go.touch()
        client.sock.settimeout(100)
        rest = threading.Thread(target=client.sock.sendall, args=(view[sent:],))
        rest.start()
        assert client.receive() == "did hold"
        for _ in range(total):
            told(client, 10_000)
        rest.join()


def test_many_clients_of_a_room_that_does_not_finish(instance, room):
    """S24: 256 events of the room at most are with the host; the order within each connection stays."""
    broker = instance.broker
    go = broker.folder / "go"
    go.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(instance.connect(room, str(number))) for number in range(20)]
        clients[0].send("hold")
        eventually(lambda: instance.events(room, "hold"), "the turn")
        for client in clients[1:]:
            client.send_bytes(b"".join(encode_frame(TEXT, b"echo %d" % n) for n in range(100)))
        [row] = eventually(
            lambda: [each for each in broker.ask("rooms", room=room)["rooms"] if each["in_flight"] >= 200],
            "the bound",
        )
        assert row["in_flight"] <= 256
        go.touch()
        for client in clients[1:]:
            assert [client.receive() for _ in range(100)] == [f"echo {n}" for n in range(100)]


@pytest.fixture(scope="module")
def narrow(module_broker):
    """Bounds that hardly let anything pass."""
    return Instance(
        module_broker(
            APP,
            connection_inflight_bytes_max=1024,
            room_inflight_events_max=1,
            room_inflight_bytes_max=1024,
            link_inflight_bytes_max=65_536,
            inbox_bytes_max=4096,
            receive_buffer_bytes=8192,
            send_buffer_bytes=4096,
        )
    )


@pytest.mark.parametrize("size", [0, 1023, 1024, 5000, 70_000, MIB])
def test_one_message_always_passes(narrow, room, size):
    """S24: however large it is beside the bounds; alone and among others."""
    with narrow.connect(room, "a") as first, narrow.connect(room, "b") as second:
        for client in (first, second):
            thread = threading.Thread(
                target=lambda client=client: [client.send_frame(BINARY, body(size)) for _ in range(5)]
            )
            thread.start()
            for _ in range(5):
                told(client, size)
            thread.join()


def test_pipelined_messages_through_narrow_bounds(narrow, room):
    """S24: nothing is lost or reordered where every message has to wait."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(narrow.connect(room, str(number))) for number in range(8)]
        for client in clients:
            data = b"".join(encode_frame(TEXT, b"echo %d" % n) for n in range(200))
            threading.Thread(target=client.send_bytes, args=(data,)).start()
        for client in clients:
            assert [client.receive() for _ in range(200)] == [f"echo {n}" for n in range(200)]


# --- Clients that do not read (S25) -----------------------------------------------------------------


def read_numbers(client: RawClient) -> tuple[list[int], tuple[int, bytes] | None]:
    """The numbers of a flood as far as they came, and what ended them."""
    numbers: list[int] = []
    while True:
        try:
            opcode, payload = client.receive_frame()
        except (EOFError, ConnectionResetError):
            return numbers, None
        if opcode == TEXT and payload.strip().isdigit():
            numbers.append(int(payload))
        else:
            return numbers, (opcode, payload)


def small_window(instance, room: str, name: str, party: str) -> RawClient:
    """A client whose kernel takes little, and that has not read anything yet."""
    client = RawClient(instance.port)
    client.sock.close()
    client.sock = socket.socket()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.sock.connect(("127.0.0.1", instance.port))
    client.handshake(f"/parties/{party}/{room}?_pk={name}")
    return client


def test_the_policy_close(instance, room):
    """S25: at its bound a client that does not read is closed, 1013; the others get everything."""
    with instance.connect(room, "asker", "slow") as asker, instance.connect(room, "reader", "slow") as reader:
        client = small_window(instance, room, "slow", "slow")
        for _ in range(12):
            asker.send("flood 100 1000")
            assert [int(reader.receive()) for _ in range(100)] == list(range(100))
            assert asker.receive() == "did flood"
        got, last = read_numbers(client)
        assert [number % 100 for number in range(len(got))] == got
        assert last == (CLOSE, struct.pack(">H", 1013))
        client.close()
        [event] = eventually(lambda: instance.events(room, "closed"), "the close turn")
        assert (event["id"], event["code"], event["clean"], event["cause"]) == (
            "slow",
            1013,
            False,
            "slow_consumer",
        )


def test_one_that_never_reads_again(hasty, room):
    """S25, S14: it is over after the close timeout, and keeps nothing."""
    with hasty.connect(room, "asker", "slow") as asker:
        client = small_window(hasty, room, "slow", "slow")
        asker.send("flood 1000 1000")
        assert asker.receive() == "did flood"
        [event] = eventually(lambda: hasty.events(room, "closed"), "the close turn")
        assert event["cause"] == "slow_consumer"
        eventually(lambda: hasty.broker.stats()["outbox_bytes"] == 0, "an empty outbox")
        client.close()


@pytest.mark.parametrize("party", ["oldest", "newest"])
def test_the_policies_that_drop(instance, room, party):
    """S25: the connection stays, whole messages are missing, and the order is kept."""
    before = instance.broker.stats()["dropped_frames"]
    with instance.connect(room, "asker", party) as asker:
        client = small_window(instance, room, "slow", party)
        asker.send("flood 1000 1000")
        assert asker.receive() == "did flood"
        client.send("echo end")
        numbers, last = read_numbers(client)
        assert last == (TEXT, b"echo end")
        assert numbers == sorted(set(numbers))
        assert 100 < len(numbers) < 1000
        assert instance.broker.stats()["dropped_frames"] - before == 1000 - len(numbers)
        assert (numbers[-1] == 999) == (party == "oldest")
        assert numbers[0] == 0
        asker.send("flood 10 10")
        assert read_ten(client) == list(range(10))
        client.close()


def read_ten(client: RawClient) -> list[int]:
    return [int(client.receive()) for _ in range(10)]


def test_all_outboxes_together(hasty, room):
    """S25: over outbox_total_bytes_max the fullest is closed first."""
    with hasty.connect(room, "asker") as asker, contextlib.ExitStack() as stack:
        full = small_window(hasty, room, "full", "main")
        asker.send("flood 5 100000")
        assert asker.receive() == "did flood"
        others = [stack.enter_context(small_window(hasty, room, str(n), "main")) for n in range(3)]
        asker.send("flood 9 30000")
        assert asker.receive() == "did flood"
        [event] = eventually(lambda: hasty.events(room, "closed"), "the close turn")
        assert (event["id"], event["code"], event["cause"]) == ("full", 1013, "slow_consumer")
        for client in others:
            assert [int(client.receive()) for _ in range(9)] == list(range(9))
        full.close()


# --- Doors (S37) ------------------------------------------------------------------------------------


def test_the_connections_of_a_room(instance, room):
    """S37: below the limit, at it, above it: 503 with Retry-After; who leaves makes room."""
    clients = [instance.connect(room, str(n), "crowd") for n in range(3)]
    assert instance.is_refused(f"/parties/crowd/{room}")
    instance.connect(f"{room}-other", party="crowd").close()
    clients[0].close()
    eventually(lambda: len(instance.broker.connections(room=room)) == 2, "the leaving")
    with instance.connect(room, "again", "crowd"):
        assert instance.is_refused(f"/parties/crowd/{room}")
    for client in clients:
        client.close()


def test_the_limit_holds_for_those_who_come_at_once(instance, room):
    """S37: counted from the request on, not from its answer."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(instance.port)) for _ in range(12)]
        for client in clients:
            client.send_handshake(f"/parties/crowd/{room}")
        statuses = [client.receive_answer().status for client in clients]
        assert sorted(statuses) == [101] * 3 + [503] * 9


@pytest.fixture(scope="module")
def guarded(module_broker):
    """Few connections, little time."""
    return Instance(
        module_broker(
            APP,
            connections_max=6,
            address_connections_max=3,
            handshake_timeout_seconds=5,
            head_bytes_max=2048,
        )
    )


@pytest.fixture
def empty(guarded):
    """The guarded instance without connections."""
    guarded.close_all()
    eventually(
        lambda: guarded.broker.stats()["connections"] + guarded.broker.stats()["half_open"] == 0, "nobody"
    )
    yield guarded
    guarded.close_all()


def test_the_connections_of_an_address(empty, room):
    """S37: another address may come in."""
    opened = [empty.answer(f"/party/{room}", source="127.0.0.2") for _ in range(4)]
    assert [answer.status for answer, _ in opened] == [101, 101, 101, 503]
    assert opened[-1][0].headers["retry-after"] == "1"
    other = empty.answer(f"/party/{room}", source="127.0.0.3")
    assert other[0].status == 101
    opened[0][1].close()
    eventually(lambda: empty.broker.stats()["connections"] == 3, "the leaving")
    again = empty.answer(f"/party/{room}", source="127.0.0.2")
    assert again[0].status == 101
    for _, client in [*opened, other, again]:
        client.close()


def test_an_address_at_once(empty, room):
    """S37: counted from the request on."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(empty.port)) for _ in range(6)]
        for client in clients:
            client.send_handshake(f"/party/{room}")
        assert sorted(client.receive_answer().status for client in clients) == [101] * 3 + [503] * 3


def test_all_connections(empty, room):
    """S37: in all; whoever is beyond gets 503, at once."""
    opened = [empty.answer(f"/party/{room}", source=f"127.0.0.{2 + n // 3}") for n in range(6)]
    assert [answer.status for answer, _ in opened] == [101] * 6
    beyond = empty.answer(f"/party/{room}", source="127.0.0.9")
    assert (beyond[0].status, beyond[0].headers["retry-after"]) == (503, "1")
    for _, client in [*opened, beyond]:
        client.close()


def test_a_forwarded_address_from_nobody_s_proxy(empty, room):
    """S37: who is not trusted speaks for itself alone."""
    opened = [empty.answer(f"/party/{room}", headers={"x-forwarded-for": f"10.0.0.{n}"}) for n in range(4)]
    assert [answer.status for answer, _ in opened] == [101, 101, 101, 503]
    for _, client in opened:
        client.close()


def test_addresses_behind_a_trusted_proxy(broker):
    """S37: those that it reports count; it does not count itself."""
    instance = Instance(broker(APP, address_connections_max=2, trusted_proxies="127.0.0.1"))
    opened = [instance.answer("/party/r", headers={"x-forwarded-for": f"10.0.0.{n % 2}"}) for n in range(6)]
    assert sorted(answer.status for answer, _ in opened) == [101] * 4 + [503] * 2
    opened += [instance.answer("/party/r") for _ in range(5)]
    assert [answer.status for answer, _ in opened[6:]] == [101] * 5
    for _, client in opened:
        client.close()


@pytest.fixture(scope="module")
def hurried(module_broker):
    """An instance that waits for no handshake longer than a second."""
    return Instance(module_broker(APP, handshake_timeout_seconds=1))


@pytest.mark.parametrize(
    "start",
    [b"", b"G", b"GET /party/x HTTP/1.1\r\n", b"GET /party/x HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"],
)
def test_half_a_handshake(hurried, start):
    """S37: closed at the deadline."""
    started = time.monotonic()
    with RawClient(hurried.port) as client:
        if start:
            client.send_bytes(start)
        assert client.receive_answer().status == 408
        assert client.at_eof()
    assert time.monotonic() - started > 0.9


def test_a_head_that_comes_byte_by_byte(hurried):
    """S37: each byte wins no time: the answer comes long before the last of them."""
    with RawClient(hurried.port) as client:
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /party/x HTTP/1.1\r\nHost: " + b"x" * 1000:
                if not client.is_silent(0.05):
                    break
                client.send_bytes(bytes([byte]))
            else:
                pytest.fail("nobody has ended it")
        assert client.receive_answer().status == 408


def test_half_open_connections_count(empty, room):
    """S37: those that say nothing take places, for as long as they may; parked ones are not concerned."""
    parked = [empty.answer(f"/party/{room}", source="127.0.0.2")[1] for _ in range(2)]
    silent = []
    for n in range(4):
        client = socket.create_connection(
            ("127.0.0.1", empty.port), 10, source_address=(f"127.0.0.{3 + n}", 0)
        )
        silent.append(client)
    eventually(lambda: empty.broker.stats()["half_open"] == 4, "four that say nothing")
    beyond = empty.answer(f"/party/{room}", source="127.0.0.9")
    assert beyond[0].status == 503
    parked[0].send("echo alive")
    assert parked[0].receive() == "echo alive"
    eventually(lambda: empty.broker.stats()["half_open"] == 0, "the deadline")
    late = empty.answer(f"/party/{room}", source="127.0.0.9")
    assert late[0].status == 101
    for client in [*parked, *silent, beyond[1], late[1]]:
        client.close()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /party/" + b"x" * 3000, 414),
        (b"GET /party/x HTTP/1.1\r\nHost: x\r\n" + b"X-Y: " + b"z" * 3000, 431),
        (b"GET /party/x HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 500, 431),
    ],
)
def test_heads_that_are_too_large(empty, head, status):
    """S37: refused as soon as they are, and closed."""
    with RawClient(empty.port) as client:
        client.send_bytes(head)
        assert client.receive_answer().status == status
        assert client.at_eof()


def test_a_storm_of_connections(empty, room):
    """S37: most are refused, nothing is left of them, and the parked ones are served meanwhile."""
    parked = empty.answer(f"/party/{room}", source="127.0.0.2")[1]
    for _ in range(5):
        clients = []
        for _ in range(100):
            client = socket.create_connection(("127.0.0.1", empty.port), 10, source_address=("127.0.0.4", 0))
            clients.append(client)
        parked.send("echo alive")
        assert parked.receive() == "echo alive"
        for client in clients:
            client.close()
    eventually(lambda: empty.broker.stats()["half_open"] == 0, "nobody")
    descriptors = Path(f"/proc/{empty.broker.gateway_pid()}/fd")
    eventually(lambda: len(list(descriptors.iterdir())) < 40, "closed descriptors")
    parked.close()
