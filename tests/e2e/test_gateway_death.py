"""kill -9 of the gateway, of the keeper, and of both: what becomes of sockets, and of what was on its way
(S14, S22, S34).
"""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import BINARY, CONTINUATION, PING, PONG, TEXT, RawClient, encode_frame

APP = """
import hashlib
import secrets

from broker import Server


class Main(Server):
    '''Counts what each connection sends, in storage where the connection wants it, and answers.'''

    def get_connection_tags(self, connection, ctx):
        return [ctx.request.args.get("tag", "none")]

    async def on_connect(self, connection, ctx):
        connection.send(f"welcome {connection.id}")

    async def on_message(self, message, sender):
        count = (sender.state or 0) + 1
        sender.set_state(count)
        if isinstance(message, bytes):
            sender.send(f"{count} {hashlib.sha1(message).hexdigest()}")
            return
        what, _, rest = message.partition(" ")
        if what == "keep":
            kept = await self.room.storage.get(sender.id, 0) + 1
            await self.room.storage.put(sender.id, kept)
            sender.send(f"{count} {kept} {rest}")
        elif what == "all":
            self.room.broadcast(f"{sender.id} {rest} {secrets.token_hex(8)}", tag="listener")
            sender.send(f"{count} {rest}")
        elif what == "tag":
            sender.add_tags(rest)
            sender.send(f"{count} {' '.join(sender.tags)}")
        elif what == "large":
            sender.send("x" * int(rest))
        elif what == "bye":
            sender.close(4000, rest)
        else:
            sender.send(f"{count} {rest}")

    async def on_close(self, connection, code, reason, was_clean):
        ended = await self.room.storage.get("ended", [])
        ended.append([connection.id, code, connection.close_cause, connection.state])
        await self.room.storage.put("ended", ended)

    async def on_request(self, request):
        return {"ended": await self.room.storage.get("ended", [])}
"""


@pytest.fixture
def broker_(broker: BrokerFactory) -> Iterator[BrokerProcess]:
    # Nobody is pinged, and no answer to a Close is missed, because a test, or the machine, takes its time.
    started = broker(APP, ping_interval_seconds=600, close_timeout_seconds=30)
    yield started
    assert "a handler of the gateway failed" not in started.log
    assert "a torn frame could not be mended" not in started.log


def connect(broker: BrokerProcess, name: str, path: str = "/party/room", **query: str) -> RawClient:
    """A client with this id that has read its welcome."""
    more = "".join(f"&{key}={value}" for key, value in query.items())
    client = broker.connect(f"{path}?_pk={name}{more}")
    assert client.receive() == f"welcome {name}"
    return client


def ended(broker: BrokerProcess, room: str = "room") -> list[list[object]]:
    """What the room's `on_close` has been told."""
    with urllib.request.urlopen(broker.url(f"/party/{room}"), timeout=DEADLINE_SECONDS) as answer:
        found: list[list[object]] = json.load(answer)["ended"]
    return found


def assert_open(client: RawClient) -> None:
    """Nothing waits to be read, and the gateway answers."""
    assert client.is_silent()
    client.send_frame(PING, b"open?")
    assert client.receive_frame() == (PONG, b"open?")


def test_a_socket_outlives_its_gateway(broker_: BrokerProcess) -> None:
    """S34: again and again; state and tags are there, and messages meanwhile are handled."""
    with connect(broker_, "one") as client, connect(broker_, "two", tag="listener") as listener:
        client.send("tag red")
        assert client.receive() == "1 none red"
        for number in range(3):
            [pid] = broker_.kill("gateway")
            client.send(f"all {number}")  # while there is none
            assert client.receive() == f"{number + 2} {number}"
            word, said, _ = str(listener.receive()).split()
            assert (word, said) == ("one", str(number))
            broker_.wait_for_gateway(without=pid)
        listed = {row["id"]: row["tags"] for row in broker_.connections()}
        assert listed == {"one": ["none", "red"], "two": ["listener"]}
        assert_open(client)
        assert_open(listener)
        client.send_close(1000, "")
        assert client.expect_close() == (1000, "")
        assert client.at_eof()
    eventually(lambda: ["one", 1000, "client_close", 4] in ended(broker_), "on_close")


def test_a_thousand_pipelined_messages(broker_: BrokerProcess) -> None:
    """S22: each once and in order, those that only send as well as those that store."""
    client = connect(broker_, "client")
    total = 1000

    def write() -> None:
        for number in range(total):
            client.send(f"{'keep' if number % 2 else 'echo'} {number}")
            if number % 50 == 0:
                time.sleep(0.01)

    chance = random.Random(11)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        got = []
        for number in range(total):
            if number in (100, 400, 401, 800):
                broker_.kill("gateway")
                time.sleep(chance.uniform(0, 0.05))
            got.append(client.receive())
        writing.result()
    wanted = [
        f"{number + 1} {number // 2 + 1} {number}" if number % 2 else f"{number + 1} {number}"
        for number in range(total)
    ]
    assert got == wanted
    assert_open(client)
    client.close()


def test_broadcasts_reach_each_listener_once(broker_: BrokerProcess) -> None:
    """S22: a broadcast that was half done goes on at the next recipient; its random payload shows a second
    run."""
    listeners = [connect(broker_, f"l{number}", tag="listener") for number in range(40)]
    speakers = [connect(broker_, f"s{number}") for number in range(4)]
    rounds = 150
    chance = random.Random(12)
    for number in range(rounds):
        for speaker in speakers:
            speaker.send(f"all {number}")
        if number % 30 == 10:
            broker_.kill("gateway")
            time.sleep(chance.uniform(0, 0.1))
    for speaker in speakers:
        assert [speaker.receive() for _ in range(rounds)] == [f"{n + 1} {n}" for n in range(rounds)]
    first = None
    for listener in listeners:
        got = [str(listener.receive()) for _ in range(rounds * len(speakers))]
        first = first or got
        assert got == first, "not the same broadcasts in the same order for everybody"
        counts = Counter(line.rsplit(" ", 1)[0] for line in got)
        assert counts == {f"s{s} {n}": 1 for s in range(len(speakers)) for n in range(rounds)}
        assert_open(listener)
    for client in listeners + speakers:
        client.close()


def test_what_waits_in_an_outbox_survives(broker_: BrokerProcess) -> None:
    """S25: a client that reads slowly gets the rest from the next gateway, to the byte."""
    client = RawClient(broker_.port)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.handshake("/party/room?_pk=slow")
    assert client.receive() == "welcome slow"
    sizes = [700_000, 10, 200_000, 1]
    for size in sizes:
        client.send(f"large {size}")
    eventually(lambda: broker_.stats()["outbox_bytes"] > 500_000, "a full outbox")
    broker_.kill_gateway()
    assert broker_.stats()["outbox_bytes"] > 500_000
    for size in sizes[:2]:
        assert len(client.receive()) == size
    broker_.kill_gateway()
    for size in sizes[2:]:
        assert len(client.receive()) == size
    assert_open(client)
    client.close()


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_large_message_that_has_half_arrived(broker_: BrokerProcess, pieces: int) -> None:
    """S24: what was moved into a spill file and what is still in the kernel are one stream for the next
    gateway."""
    client = connect(broker_, "large")
    message = random.Random(13).randbytes(900_000)
    size = len(message) // pieces + 1
    raw = b"".join(
        encode_frame(
            CONTINUATION if start else BINARY, message[start : start + size], fin=start + size >= len(message)
        )
        for start in range(0, len(message), size)
    )
    import hashlib

    for part in range(0, len(raw), 120_000):
        client.send_bytes(raw[part : part + 120_000])
        if part in (120_000, 480_000):
            eventually(lambda: list((broker_.data / "spill").iterdir()), "a spill file")
            broker_.kill_gateway()
    assert client.receive() == f"1 {hashlib.sha1(message).hexdigest()}"
    assert_open(client)
    eventually(lambda: not list((broker_.data / "spill").iterdir()), "no spill file")
    client.close()


def test_closes_come_once(broker_: BrokerProcess) -> None:
    """S14: whichever side closes, and whenever the gateway dies: one answer, one `on_close`."""
    chance = random.Random(14)
    clients = []
    for number in range(60):
        client = connect(broker_, f"c{number}")
        if number % 3 == 0:
            client.send_close(1000, "x")
        elif number % 3 == 1:
            client.send("bye now")
        else:
            client.reset()
        clients.append(client)
        if number % 12 == 11:
            time.sleep(chance.uniform(0, 0.02))
            broker_.kill("gateway")
    for number, client in enumerate(clients):
        if number % 3 == 0:
            assert client.expect_close() == (1000, "x")
            assert client.at_eof()
        elif number % 3 == 1:
            assert client.expect_close() == (4000, "now")
            client.send_close(4000)
            assert client.at_eof()
        client.close()
    eventually(lambda: len(ended(broker_)) >= 60, "60 closes")
    told = ended(broker_)
    assert Counter(name for name, *_ in told) == {f"c{number}": 1 for number in range(60)}
    causes = {str(name): cause for name, _, cause, _ in told}
    assert {causes[f"c{number}"] for number in range(0, 60, 3)} == {"client_close"}
    assert {causes[f"c{number}"] for number in range(1, 60, 3)} == {"server_close"}
    assert {causes[f"c{number}"] for number in range(2, 60, 3)} == {"client_gone"}
    eventually(lambda: not broker_.connections(), "no row left")


def test_who_comes_in_meanwhile(broker_: BrokerProcess) -> None:
    """S9: whoever has read the 101 is connected, whenever the gateway dies; the others may try again."""
    done = threading.Event()
    chance = random.Random(9)
    opened: list[RawClient] = []

    def come(part: int) -> None:
        for number in itertools.count(1):
            if done.is_set():
                return
            # Refused, reset, or ended before there was an answer.
            with contextlib.suppress(OSError, EOFError, AssertionError):
                opened.append(broker_.connect(f"/party/room?_pk=n{part}-{number}"))

    def have_come_in(count: int) -> None:
        eventually(lambda: len(opened) >= count, "somebody who comes in", 60)

    with ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(come, part) for part in range(2)]
        try:
            for _ in range(6):
                have_come_in(len(opened) + 10)
                time.sleep(chance.uniform(0, 0.1))  # not for a condition: the moment of death is to be any
                broker_.kill("gateway")
        finally:
            done.set()
        for each in coming:
            each.result()
    assert len(opened) > 50
    for client in opened:
        assert str(client.receive()).startswith("welcome n")
    for client in opened:
        client.send("echo x")
    for client in opened:
        assert client.receive() == "1 x"
        assert_open(client)
    eventually(lambda: len(broker_.connections()) == len(opened), "a row for each, and no other")
    for client in opened:
        client.close()


def test_a_keeper_that_dies_is_filled_again(broker_: BrokerProcess) -> None:
    """S34: the sockets are with the gateway meanwhile, and with the new keeper soon after; newcomers wait."""
    clients = [connect(broker_, f"c{number}") for number in range(20)]
    [before] = broker_.kill("keeper")
    clients.append(connect(broker_, "late"))  # its 101 comes when a keeper has it
    eventually(lambda: broker_.log_events("a new keeper holds the sockets"), "a keeper that is filled")
    assert broker_.keeper_pid() != before
    broker_.kill_gateway()
    for client in clients:
        client.send("echo still")
        assert client.receive() == "1 still"
        client.close()


def test_both_die(broker_: BrokerProcess) -> None:
    """S35: clients see the end at once; each gets its `on_close`, with the cause."""
    with connect(broker_, "one") as client, connect(broker_, "two") as other:
        client.send("echo x")
        assert client.receive() == "1 x"
        eventually(lambda: any(row["state_bytes"] for row in broker_.connections()), "its state, stored")
        broker_.kill("gateway", "keeper")
        assert client.at_eof()
        assert other.at_eof()
    eventually(lambda: len(ended(broker_)) == 2, "both closes")
    assert sorted(ended(broker_)) == [["one", 1006, "gateway_lost", 1], ["two", 1006, "gateway_lost", None]]
    with connect(broker_, "one") as again:
        assert_open(again)


def test_liveness_goes_on(broker: BrokerFactory) -> None:
    """S15: a peer that is dead is found by the next gateway too; one that answers is not."""
    site = broker(APP, ping_interval_seconds=0.3, ping_timeout_seconds=0.6)
    silent = connect(site, "silent")
    site.kill_gateway()
    opcode, _ = silent.receive_frame()
    assert opcode == PING  # and no answer
    eventually(lambda: any(row[0] == "silent" for row in ended(site)), "its end")
    assert ended(site)[0][2] == "ping_timeout"
    silent.close()


def test_an_id_stays_taken(broker: BrokerFactory) -> None:
    """S10: the next gateway knows who is there."""
    site = broker(APP, duplicate_ids="refuse")
    with connect(site, "me") as client:
        site.kill_gateway()
        with site.connect("/party/room?_pk=me") as second:
            assert second.expect_close()[0] == 4409
        assert_open(client)


def test_commands_send_once(broker_: BrokerProcess) -> None:
    """S22: what an operator sends goes through the same door."""
    with connect(broker_, "me", tag="red") as client:
        assert broker_.ask("broadcast", room="room", message="to all", tag="red") == {"sent": 1}
        assert broker_.ask("send", room="room", id="me", message=b"to you") == {"sent": 1}
        broker_.kill_gateway()
        assert client.receive() == "to all"
        assert client.receive() == b"to you"
        assert_open(client)
        assert broker_.ask("kick", room="room", id="me", code=4001) == {"kicked": 1}
        assert client.expect_close() == (4001, "")


def test_no_descriptor_is_left_behind(broker_: BrokerProcess) -> None:
    """S34: gateway and keeper hold as many descriptors after many deaths as after one."""

    def count(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    clients = [connect(broker_, f"c{number}") for number in range(10)]
    broker_.kill_gateway()
    eventually(lambda: broker_.stats()["connections"] == 10, "all of them")
    gateway, keeper = count(broker_.gateway_pid()), count(broker_.keeper_pid())
    for _ in range(4):
        broker_.kill_gateway()
    eventually(lambda: count(broker_.gateway_pid()) <= gateway, "the same number in the gateway")
    eventually(lambda: count(broker_.keeper_pid()) <= keeper, "the same number in the keeper")
    for client in clients:
        client.close()
    eventually(lambda: count(broker_.keeper_pid()) <= keeper - 10, "no socket in the keeper")
    eventually(lambda: count(broker_.gateway_pid()) <= gateway - 10, "no socket in the gateway")


def test_hosts_hold_no_sockets(broker_: BrokerProcess) -> None:
    """S39: a host has its link and its files, whatever was handed around."""
    with connect(broker_, "me"):
        broker_.kill_gateway()
        broker_.kill_host()
        [pid] = broker_.host_pids()
        names = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it was open for a moment only
                names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        tcp = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
        assert not [name for name in names if name.startswith("socket:") and name[8:-1] in tcp]
        assert not [name for name in names if "broker-" in name and "memfd" in name]


__all__ = ["TEXT"]


WAITING = """
    import trio
    from pathlib import Path
    from broker import Server

    FOLDER = Path(__file__).parent

    class Main(Server):
        async def on_message(self, message, sender):
            while (FOLDER / "hold").exists():
                await trio.sleep(0.01)
            if message == "write":
                with (FOLDER / "ran").open("a") as file:
                    file.write("x")
                self.room.storage.put("k", await self.room.storage.get("k", 0) + 1)
            sender.send(f"{message} {await self.room.storage.get('k')}")
"""


def test_a_turn_whose_commit_waits_for_the_gateway_has_ended_all_the_same(broker: BrokerFactory) -> None:
    """H7, H8: its connection has said something that nobody has acknowledged, so it is not on disk; it is
    when the next gateway has that, and does not run again.
    """
    site = broker(WAITING, hang_timeout=60)
    hold, ran = site.folder / "hold", site.folder / "ran"
    hold.touch()
    with site.connect() as client:
        client.send("read")
        client.send("write")
        client.send("read")
        eventually(lambda: site.ask("explain", party="main", room="room")["in_flight"] == 3, "them in flight")
        eventually(lambda: site.ask("explain", party="main", room="room")["waiting"] == 2, "them at the host")
        gateway = site.gateway_pid()
        os.kill(gateway, signal.SIGSTOP)
        hold.unlink()
        eventually(ran.exists, "the turn")
        os.kill(gateway, signal.SIGKILL)
        assert [client.receive() for _ in range(3)] == ["read None", "write 1", "read 1"]
        client.send("read")
        assert client.receive() == "read 1"
    assert ran.read_text() == "x"
