"""kill -9 of the host: what waits in the kernel's buffers is delivered again, each message once and in order,
and no socket notices (S22, S34).

A room's handlers wait as long as the file `hold` exists, and write what they have finished into the file
`journal`, so that tests know what was handled, and how often, whatever became of its effects.
"""

import contextlib
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually, whole_lines
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import BINARY, CONTINUATION, PING, PONG, TEXT, RawClient, encode_frame

APP = """
import hashlib
import os
from pathlib import Path
from typing import Any

import trio

from broker import Server

FOLDER = Path(__file__).parent


def note(*words):
    file = os.open(FOLDER / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, (" ".join(map(str, words)) + "\\n").encode())
    os.close(file)


async def released(name):
    while (FOLDER / f"hold-{name}").exists():
        await trio.sleep(0.005)


class Main(Server):
    async def on_connect(self, connection, ctx):
        await released("connect")
        note("connect", connection.id)
        connection.send(f"welcome {connection.id}")

    async def on_message(self, message, sender):
        await released("message")
        data = message.encode() if isinstance(message, str) else message
        note("message", sender.id, hashlib.sha1(data).hexdigest())
        sender.send(message)

    async def on_close(self, connection, code, reason, was_clean):
        await released("close")
        note("close", connection.id, code, reason, was_clean, connection.close_cause)


class Counter(Server):
    '''Counts in the connection's state, which is an effect, and tells everybody.'''

    async def on_message(self, message, sender):
        sender.set_state(lambda count: (count or 0) + 1)
        sender.send(f"{sender.state} {message}")
        self.room.broadcast(f"{sender.id} {message}", tag="listener")

    def get_connection_tags(self, connection, ctx):
        return ["listener"] if connection.id == "listener" else []
"""

#: Nobody is pinged, and nothing closed or killed, because a test, or the machine, takes its time.
PATIENCE = {"ping_interval_seconds": 600, "close_timeout_seconds": 30, "hang_timeout": 60}
MESSAGES = 1000
SIZES = [1, 2, 100, 125, 126, 1000, 65_535, 65_536, 98_000, 98_304, 98_305, 200_000, 524_288, 1_048_576]


@dataclass
class Site:
    """A broker whose room can be held, and read."""

    broker: BrokerProcess

    @property
    def folder(self) -> Path:
        return self.broker.folder

    @contextlib.contextmanager
    def hold(self, *hooks: str) -> Iterator[None]:
        """While the block runs, these hooks wait; afterwards they go on."""
        files = [self.folder / f"hold-{hook}" for hook in hooks]
        for file in files:
            file.touch()
        try:
            yield
        finally:
            for file in files:
                file.unlink()

    def journal(self, kind: str, connection: str | None = None) -> list[str]:
        """What was finished, in order: the lines of one kind, without it."""
        file = self.folder / "journal"
        lines = whole_lines(file)
        start = kind + " " + ("" if connection is None else connection + " ")
        return [line.removeprefix(start) for line in lines if (line + " ").startswith(start)]

    def forget(self) -> None:
        (self.folder / "journal").unlink(missing_ok=True)

    def connect(self, path: str, name: str) -> RawClient:
        """A client with this id that has read its welcome."""
        client = self.broker.connect(f"{path}?_pk={name}")
        assert client.receive() == f"welcome {name}"
        return client

    def waits(self, size: int, *clients: RawClient) -> None:
        """Wait until `size` bytes of these clients' frames wait, no more and no less.

        Bytes that are spilled between the two looks of `unconsumed` count twice for that moment.
        """
        eventually(lambda: self.unconsumed(*clients) == size, f"{size} bytes that wait")
        self.broker.stats()  # a round of the gateway's loop has passed since
        eventually(lambda: self.unconsumed(*clients) == size, f"{size} bytes that still wait")

    def arrives(self, size: int, *clients: RawClient) -> None:
        eventually(lambda: self.unconsumed(*clients) >= size, f"{size} bytes that wait")

    def unconsumed(self, *clients: RawClient) -> int:
        """Bytes that these clients have sent and that wait: unread in the kernel, or spilled by anybody."""
        return sum(self.broker.unread_bytes(client.local_port) for client in clients) + self.spilled()

    def spilled(self) -> int:
        """Bytes in all spill files."""
        total = 0
        for file in (self.broker.data / "spill").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has been used up since
                total += file.stat().st_size
        return total


@pytest.fixture
def site(broker: BrokerFactory) -> Iterator[Site]:
    # One for each test: after each death the supervisor waits longer before it starts the next host.
    site = Site(broker(APP, **PATIENCE))
    yield site
    eventually(lambda: not site.broker.connections(), "end of all connections")
    eventually(lambda: not list((site.broker.data / "spill").iterdir()), "no spill file")
    assert "a handler of the gateway failed" not in site.broker.log


def sha1(message: str | bytes) -> str:
    return hashlib.sha1(message.encode() if isinstance(message, str) else message).hexdigest()


def frame(message: str | bytes) -> bytes:
    if isinstance(message, str):
        return encode_frame(TEXT, message.encode())
    return encode_frame(BINARY, message)


def fragments(message: bytes, size: int) -> bytes:
    """A binary message in frames of `size` bytes, with a ping in between."""
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    raw = b""
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        raw += encode_frame(CONTINUATION if number else BINARY, piece, fin=last)
        if number == 0 and not last:
            raw += encode_frame(PING, b"between")
    return raw


def say_goodbye(client: RawClient) -> None:
    client.send_close(1000, "bye")
    assert client.expect_close() == (1000, "bye")
    assert client.at_eof()
    client.close()


def assert_open(client: RawClient) -> None:
    """Nothing waits to be read, and the gateway answers."""
    assert client.is_silent()
    client.send_frame(PING, b"open?")
    assert client.receive_frame() == (PONG, b"open?")


# The host is killed while messages wait


@pytest.mark.parametrize("way", ["the handler waits", "the host stands still"])
def test_a_thousand_pipelined_messages(site: Site, way: str) -> None:
    """S22: not a byte is consumed before its turn has ended; each message is handled once, in order."""
    client = site.connect("/party/thousand", "client")
    before = site.broker.stats()
    with site.hold("message"):
        if way == "the host stands still":
            site.broker.signal_hosts(signal.SIGSTOP)
        raw = b"".join(frame(f"message {number}") for number in range(MESSAGES))
        client.send_bytes(raw)
        site.waits(len(raw), client)
        assert site.journal("message") == []
        site.broker.kill_host(wait_for_next=False)
        site.waits(len(raw), client)
        assert client.is_silent()
        site.broker.wait_for_hosts(1, without=before["hosts"])
    assert [client.receive() for _ in range(MESSAGES)] == [f"message {number}" for number in range(MESSAGES)]
    assert_open(client)
    assert site.journal("message", "client") == [sha1(f"message {number}") for number in range(MESSAGES)]
    assert site.journal("connect") == ["client"]
    eventually(lambda: site.unconsumed(client) == 0, "all consumed")
    after = site.broker.stats()
    assert after["accepted"] == before["accepted"]
    assert after["gateways"] == before["gateways"]
    say_goodbye(client)
    eventually(lambda: site.journal("close") == ["client 1000 bye True client_close"], "its close turn")


def test_messages_of_every_size(site: Site) -> None:
    """S22, S24: what does not fit into the kernel's buffer waits in a spill file, as it came."""
    messages: dict[str, bytes] = {}
    raws: dict[str, bytes] = {}
    for size in SIZES:
        for length in (size, 1000, 60_000, 100_000):
            if size < length or (length != size and size > 100 * length):
                continue
            name = f"{size}-by-{length}"
            messages[name] = random.Random(name).randbytes(size)
            raws[name] = fragments(messages[name], length)
    clients = {name: site.connect(f"/party/{name}", name) for name in messages}
    with site.hold("message"):
        for name, client in clients.items():
            client.send_bytes(raws[name])
        size = sum(len(raw) for raw in raws.values())
        site.waits(size, *clients.values())
        site.broker.kill_host()
        site.waits(size, *clients.values())
        site.broker.kill_host()
    for name, client in clients.items():
        assert receive_message(client) == messages[name], name
        assert_open(client)
        assert site.journal("message", name) == [sha1(messages[name])]
    assert sorted(site.journal("connect")) == sorted(clients)
    eventually(lambda: site.unconsumed(*clients.values()) == 0, "all consumed")
    for client in clients.values():
        say_goodbye(client)


def test_all_sizes_behind_each_other(site: Site) -> None:
    """More than the kernel's buffers hold: TCP makes the client wait, and nothing is lost or mixed up."""
    messages: list[str | bytes] = []
    raws = []
    for number, size in enumerate([*SIZES, *reversed(SIZES), 1, 1_048_576, 1, 1]):
        content = random.Random(number).randbytes(size)
        messages.append(content)
        raws.append(fragments(content, max(size // 3, 1)) if number % 3 == 1 and size > 2 else frame(content))
        messages.append(f"{number} ü")
        raws.append(frame(f"{number} ü"))
    clients = {name: site.connect("/party/behind", name) for name in ("a", "b", "c")}
    with ThreadPoolExecutor(6) as pool:
        with site.hold("message"):
            sent = [pool.submit(client.send_bytes, b"".join(raws)) for client in clients.values()]
            for client in clients.values():
                site.arrives(100_000, client)
            site.broker.kill_host()

        def receive(client: RawClient) -> None:
            for number, message in enumerate(messages):
                received = receive_message(client)
                assert received == message, (number, len(received), len(message))

        for each in [pool.submit(receive, client) for client in clients.values()]:
            each.result()
        for each in sent:
            each.result()
    for name, client in clients.items():
        assert_open(client)
        assert site.journal("message", name) == [sha1(message) for message in messages]
        say_goodbye(client)
    assert sorted(site.journal("connect")) == ["a", "b", "c"]


def receive_message(client: RawClient) -> str | bytes:
    """The next message; pongs, of which there may be several for one ping, are passed over (S22)."""
    while True:
        opcode, payload = client.receive_frame()
        if opcode == TEXT:
            return payload.decode()
        if opcode == BINARY:
            return payload
        assert (opcode, payload) == (PONG, b"between")


def test_unfinished_messages(site: Site) -> None:
    """The host dies between two halves of a message: of one frame, of fragments, of one being spilled."""
    halves = {}
    for size in (10, 50_000, 500_000):
        message = random.Random(size).randbytes(size)
        for kind, raw in (("whole", frame(message)), ("pieces", fragments(message, size // 4))):
            name = f"{kind}-{size}"
            client = site.connect("/party/halves", name)
            halves[name] = (client, message, raw[: len(raw) // 2], raw[len(raw) // 2 :])
    clients = [client for client, *_ in halves.values()]
    for client, _, half, _ in halves.values():
        client.send_bytes(frame("first") + half)
    for client in clients:
        assert receive_message(client) == "first"
    site.waits(sum(len(half) for _, _, half, _ in halves.values()), *clients)
    site.broker.kill_host()
    for client, _, _, half in halves.values():
        client.send_bytes(half + frame("last"))
    for name, (client, message, *_) in halves.items():
        assert receive_message(client) == message
        assert receive_message(client) == "last"
        assert_open(client)
        assert site.journal("message", name) == [sha1(each) for each in (b"first", message, b"last")]
        say_goodbye(client)


def test_many_connections_of_one_room(site: Site) -> None:
    """S24: more events than a room may have in flight, so that most have to wait in the gateway, too."""
    count, each = 20, 50
    clients = [site.connect("/party/many", f"c{number}") for number in range(count)]
    with site.hold("message"):
        for client in clients:
            client.send_bytes(b"".join(frame(f"{number}") for number in range(each)))
        for client in clients:
            site.waits(sum(len(frame(f"{number}")) for number in range(each)), client)
        site.broker.kill_host()
        site.broker.kill_host()
    for number, client in enumerate(clients):
        assert [client.receive() for _ in range(each)] == [f"{each}" for each in range(each)]
        assert site.journal("message", f"c{number}") == [sha1(f"{each}") for each in range(each)]
    for client in clients:
        assert_open(client)
        say_goodbye(client)
    assert len(site.journal("connect")) == count


# The host is killed again and again while it works


def test_killed_at_any_moment(site: Site) -> None:
    """S22: effects leave with the acknowledgement of their turn, so none is lost and none comes twice."""
    count = 4000
    rooms = ["one", "one", "two", "three"]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(site.broker.connect("/parties/counter/one?_pk=listener"))
        clients = [
            stack.enter_context(site.broker.connect(f"/parties/counter/{room}?_pk=c{number}"))
            for number, room in enumerate(rooms)
        ]
        for client in [listener, *clients]:
            client.timeout_seconds = 60  # the supervisor waits longer from death to death
        pool = stack.enter_context(ThreadPoolExecutor(2 * len(clients) + 1))
        raw = b"".join(frame(f"{number}") for number in range(count))
        sending: list[Future[Any]] = [pool.submit(client.send_bytes, raw) for client in clients]

        def receive(client: RawClient, messages: int) -> list[str | bytes]:
            return [client.receive() for _ in range(messages)]

        receiving = [pool.submit(receive, client, count) for client in clients]
        heard = pool.submit(receive, listener, 2 * count)
        chance = random.Random(5)
        kills = 0
        while not all(each.done() for each in receiving):
            time.sleep(chance.random() / 3)  # not for a condition: the moment of death is to be any
            if all(each.done() for each in receiving):
                break
            site.broker.kill_host()
            kills += 1
            assert kills < 100
        for each in sending:
            each.result()
        for each in receiving:
            assert each.result() == [f"{number + 1} {number}" for number in range(count)]
        for name in ("c0", "c1"):
            told = [str(each).split()[1] for each in heard.result() if str(each).startswith(name)]
            assert told == [f"{number}" for number in range(count)]
        assert kills
        for client in [listener, *clients]:
            assert_open(client)
            say_goodbye(client)


# Connect and close turns are in flight


def test_connect_turns_in_flight(site: Site) -> None:
    """S9: an open client whose connect turn died gets it again, before its first message; others do not."""
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(site.connect("/party/doors", "old"))
        with site.hold("connect"):
            clients = {}
            for number in range(30):
                name = f"new{number}"
                client = stack.enter_context(site.broker.connect(f"/party/doors?_pk={name}"))
                client.send_bytes(frame("first") + frame(b"x" * 200_000) + frame("last"))
                clients[name] = client
            before = site.broker.kill_host(wait_for_next=False)
            # While there is no host somebody comes, and somebody goes.
            late = stack.enter_context(site.broker.connect("/party/doors?_pk=late"))
            gone = clients.pop("new7")
            gone.close()
            site.broker.wait_for_hosts(without=before)
            site.broker.kill_host()
        for name, client in clients.items():
            assert client.receive() == f"welcome {name}"
            assert client.receive() == "first"
            assert client.receive() == b"x" * 200_000
            assert client.receive() == "last"
        assert late.receive() == "welcome late"
        for client in [old, late, *clients.values()]:
            assert_open(client)
        names = sorted([*clients, "new7", "old", "late"])
        eventually(lambda: sorted(site.journal("connect")) == names, "one connect turn each")
        eventually(lambda: len(site.journal("close", "new7")) == 1, "the close turn of the one that went")
        for client in [old, late, *clients.values()]:
            say_goodbye(client)


@pytest.mark.parametrize("way", ["close", "shutdown", "reset", "disappear"])
def test_close_turns_in_flight(site: Site, way: str) -> None:
    """S14: exactly one close turn for each, whatever dies while it runs."""
    names = [f"c{number}" for number in range(20)]
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(site.connect("/party/leaving", name)) for name in names}
        with site.hold("close"):
            for client in clients.values():
                leave(client, way)
            eventually(lambda: site.broker.stats()["connections"] == 0, "no open connection")
            site.broker.kill_host()
            assert site.journal("close") == []
            site.broker.kill_host()
        told = "4000 bye True client_close" if way == "close" else "1006  False client_gone"
        expected = sorted(f"{name} {told}" for name in names)
        eventually(lambda: sorted(site.journal("close")) == expected, "one close turn each")
        eventually(lambda: not site.broker.connections(), "no row")
        assert sorted(site.journal("close")) == expected
        assert sorted(site.journal("connect")) == sorted(names)


def leave(client: RawClient, way: str) -> None:
    if way == "close":
        client.send_close(4000, "bye")
        assert client.expect_close() == (4000, "bye")
    elif way == "shutdown":
        client.shutdown()
    elif way == "reset":
        client.reset()
    else:
        client.close()


@pytest.mark.parametrize("way", ["close", "shutdown", "reset", "disappear"])
@pytest.mark.parametrize("size", [10, 300_000])
def test_messages_and_the_end_behind_them(site: Site, way: str, size: int) -> None:
    """S14, S22: the end takes its place behind the messages, also when the host dies before all of them."""
    names = [f"c{number}" for number in range(5)]
    messages = [bytes([number]) * size for number in range(3)]
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(site.connect("/party/ends", name)) for name in names}
        count = 3 if size < 1000 else 1  # only one is spilled at a time, and the others are not read then
        raw = b"".join(frame(message) for message in messages[:count])
        with site.hold("message"):
            for client in clients.values():
                client.send_bytes(raw)
            site.waits(len(raw) * len(clients), *clients.values())
            for client in clients.values():
                if way == "close":
                    client.send_close(4000, "bye")
                else:
                    leave(client, way)
            site.broker.kill_host()
            site.broker.kill_host()
        if way == "close":
            for client in clients.values():
                for message in messages[:count]:
                    assert client.receive() == message
                assert client.expect_close() == (4000, "bye")
                assert client.at_eof()
        told = "4000 bye True client_close" if way == "close" else "1006  False client_gone"
        expected = sorted(f"{name} {told}" for name in names)
        eventually(lambda: sorted(site.journal("close")) == expected, "one close turn each")
        for name in names:
            assert site.journal("message", name) == [sha1(message) for message in messages[:count]]


def test_closes_of_the_server_in_flight(broker: BrokerFactory) -> None:
    """S14: a room that closes a client, and a host that dies before the client's answer."""
    app = """
    from pathlib import Path

    from broker import Server

    class Main(Server):
        async def on_message(self, message, sender):
            sender.close(4001, "go")

        async def on_close(self, connection, code, reason, was_clean):
            with Path(__file__).with_name("journal").open("a") as file:
                print("close", connection.id, code, reason, was_clean, connection.close_cause, file=file)
    """
    site = Site(broker(app))
    with site.broker.connect("/party/x?_pk=slow") as slow, site.broker.connect("/party/x?_pk=mute") as mute:
        for client in (slow, mute):
            client.send("please")
            assert client.expect_close() == (4001, "go")
        site.broker.kill_host(wait_for_next=False)
        slow.send("too late")
        slow.send_close(4001, "go")
        assert slow.at_eof()
        eventually(lambda: site.journal("close", "slow") == ["4001 go True server_close"], "a close turn")
        assert mute.at_eof()  # after close_timeout_seconds
        eventually(lambda: len(site.journal("close")) == 2, "the other's")
        assert site.journal("close", "mute") == ["4001 go False server_close"]


# One of several hosts


def test_the_rooms_of_other_hosts_do_not_notice(broker: BrokerFactory) -> None:
    """S34."""
    site = Site(broker(APP, hosts=2, **PATIENCE))
    clients = [site.connect(f"/party/{number}", "client") for number in range(16)]
    site.forget()
    first, second = site.broker.host_pids()
    os.kill(first, signal.SIGSTOP)
    for client in clients:
        client.send("during")
    eventually(lambda: not all(client.is_silent() for client in clients), "the other host's rooms")
    assert any(client.is_silent(0.2) for client in clients), "the rooms of the host that stands still"
    os.kill(first, signal.SIGKILL)
    for client in clients:
        assert client.receive() == "during"
    assert second in site.broker.host_pids()
    assert len(site.journal("message")) == len(clients)
    assert site.journal("connect") == []
    for client in clients:
        assert_open(client)
        say_goodbye(client)
