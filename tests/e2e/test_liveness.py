"""Signs of life (S15) against the running broker, and handlers that give none (S20) and disturb nobody."""

import contextlib
import itertools
import json
import os
import socket
import struct
import threading
import time

import pytest

from tests.e2e.broker_process import eventually, whole_lines
from tests.e2e.raw_client import CLOSE, PING, PONG, TEXT, encode_frame

pytestmark = pytest.mark.e2e

APP = """
    import json
    import sys
    import time
    from pathlib import Path

    import trio

    from broker import Server

    FOLDER = Path(__file__).parent
    LOG = FOLDER / "events.jsonl"
    WAITING = set()


    def spin(released):
        while not released.exists():
            pass


    class Main(Server):
        turn_timeout = 0.5

        def __init__(self, room):
            self.room = room
            self.note("constructed")

        def note(self, event, **fields):
            with LOG.open("a") as log:
                log.write(json.dumps({"room": self.room.id, "event": event, **fields}) + "\\n")

        async def on_message(self, message, sender):
            word, _, rest = message.partition(" ")
            match word:
                case "forever":
                    sender.send("never")
                    WAITING.add(self.room.id)
                    try:
                        await trio.sleep_forever()
                    finally:
                        WAITING.discard(self.room.id)
                case "waiting":
                    sender.send("yes" if rest in WAITING else "no")
                    return
                case "stubborn":
                    with trio.CancelScope(shield=True):
                        await trio.sleep(float(rest))
                case "swallow":
                    try:
                        await trio.sleep_forever()
                    except BaseException:
                        sender.send("swallowed")
                        return
                case "block":
                    (FOLDER / rest).read_text()
                case "spin":
                    spin(FOLDER / rest)
                case "exit":
                    sys.exit(3)
                case "interrupt":
                    raise KeyboardInterrupt
                case "generator":
                    raise GeneratorExit
                case "stop":
                    raise StopAsyncIteration
                case "nursery":
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(trio.sleep_forever)
                        raise ValueError("in a nursery")
                case "cancelled":
                    with trio.CancelScope() as scope:
                        scope.cancel()
                        await trio.sleep_forever()
                    sender.send("went on")
                case "slow":
                    await trio.sleep(float(rest))
                case "brief":
                    began = time.monotonic()
                    try:
                        await trio.sleep(0.05)
                    finally:
                        self.note("brief", seconds=time.monotonic() - began)
            sender.send(f"did {word}")

        async def on_close(self, connection, code, reason, was_clean):
            self.note("closed", id=connection.id, code=code, cause=connection.close_cause)


    class Patient(Main):
        turn_timeout = 60


    class Tells(Main):
        async def on_error(self, connection, error):
            connection.send(f"{type(error).__name__}")


    class Hangs(Main):
        async def on_error(self, connection, error):
            await trio.sleep_forever()


    class Starts(Main):
        start_timeout = 0.3
        tries = 0

        async def on_start(self):
            type(self).tries += 1
            if self.tries < 3:
                self.note("start")
                if self.tries == 1:
                    await trio.sleep_forever()
                sys.exit("no start")
"""


class Instance:
    def __init__(self, broker) -> None:
        self.broker = broker
        self.hosts = broker.host_pids()

    def connect(self, room: str, name: str = "x", party: str = "main"):
        return self.broker.connect(f"/parties/{party}/{room}?_pk={name}")

    def events(self, room: str, event: str | None = None) -> list[dict]:
        log = self.broker.folder / "events.jsonl"
        noted = [json.loads(line) for line in whole_lines(log)]
        return [each for each in noted if each["room"] == room and event in (None, each["event"])]


@pytest.fixture(scope="module")
def pinging(module_broker):
    """A broker that pings after a second of silence and gives three more seconds."""
    return Instance(
        module_broker(APP, ping_interval_seconds=1, ping_timeout_seconds=3, turns_per_room_burst=1)
    )


@pytest.fixture(scope="module")
def instance(module_broker):
    instance = Instance(module_broker(APP, hang_timeout=60))
    yield instance
    assert instance.broker.host_pids() == instance.hosts


_rooms = itertools.count()


@pytest.fixture
def room() -> str:
    return f"room-{next(_rooms)}"


# --- Pings (S15) ------------------------------------------------------------------------------------


def test_silence_is_pinged_and_the_dead_are_closed(pinging, room):
    """S15: who answers stays, and who sends, be it the bytes of one message, one by one; who does not is
    closed, and listed no more; nobody is woken by pings.
    """
    started = time.monotonic()
    alive, dead = pinging.connect(room, "alive"), pinging.connect(room, "dead")
    talking, writing = pinging.connect(room, "talking"), pinging.connect(room, "writing")
    staying = {"alive", "talking", "writing"}
    pings = 0
    frame = encode_frame(TEXT, b"x" * 10_000)
    written = 0

    def dead_is_closed() -> bool:
        nonlocal pings, written
        if not alive.is_silent(0.05):
            opcode, payload = alive.receive_frame()
            assert opcode == PING
            alive.send_frame(PONG, payload)
            pings += 1
        talking.send_bytes(encode_frame(PONG, b"any byte counts"))
        writing.send_bytes(frame[written : written + 1])
        written += 1
        return bool(pinging.events(room, "closed"))

    eventually(dead_is_closed)
    assert time.monotonic() - started > 3.5, "it had its time"
    assert pings >= 1
    [event] = pinging.events(room, "closed")
    assert (event["id"], event["code"], event["cause"]) == ("dead", 1006, "ping_timeout")
    eventually(lambda: {each["id"] for each in pinging.broker.connections(room=room)} == staying)
    assert len(pinging.events(room, "constructed")) == 1  # for the close turn alone
    assert dead.receive_frame()[0] == PING
    assert dead.at_eof()
    alive.send("hello")
    assert alive.receive() == "did hello"
    writing.send_bytes(frame[written:])
    assert writing.receive().startswith("did xxxx")
    for client in (alive, dead, talking, writing):
        client.close()


def test_a_client_whose_room_is_slow_is_not_dead(pinging, room):
    """S15: its pong waits behind what is not read; the peer's TCP that takes our ping is a sign of life."""
    with pinging.connect(room) as client:
        stop = threading.Event()
        thread = threading.Thread(target=_fill, args=(client, stop))
        thread.start()
        try:
            started = time.monotonic()
            while time.monotonic() - started < 6:
                if not client.is_silent(0.1):
                    client.receive_frame()
                assert not pinging.events(room, "closed")
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_RDWR)
            thread.join()


def _fill(client, stop: threading.Event) -> None:
    """Send more than is read: each turn takes 0.4 s."""
    try:
        while not stop.is_set():
            client.send_frame(TEXT, b"slow 0.4 " + b" " * 30_000)
    except OSError:
        pass


def test_pongs_come_without_the_room(instance, room):
    """S15: a client's pings are answered, in their order, and wake nobody."""
    with instance.connect(room) as client:
        client.send_bytes(b"".join(encode_frame(PING, b"%d" % n) for n in range(1000)))
        for n in range(1000):
            assert client.receive_frame() == (PONG, b"%d" % n)
        client.send_frame(PING, b"x" * 125)
        assert client.receive_frame() == (PONG, b"x" * 125)
        assert not instance.events(room)
        eventually(lambda: instance.broker.unread_bytes(client.local_port) == 0, "the pings to be consumed")


def test_a_flood_of_pings_that_are_not_read(instance, room):
    """S15, S40: pongs that do not get out soon are not sent at all; the flood costs bounded memory."""
    with instance.connect(room) as client:
        for _ in range(100):
            client.send_bytes(encode_frame(PING, b"x" * 125) * 100)
        eventually(lambda: instance.broker.stats()["outbox_bytes"] > 64_000, "pongs that wait")
        assert instance.broker.stats()["outbox_bytes"] < 66_000
        sender = threading.Thread(target=client.send, args=("hello",))
        sender.start()
        pongs = 0
        while (frame := client.receive_frame())[0] == PONG:
            pongs += 1
        sender.join()
        assert frame == (TEXT, b"did hello")
        assert 500 < pongs < 10_000


# --- Handlers that take too long (S20) --------------------------------------------------------------


def test_a_handler_that_waits_for_ever(instance, room):
    """S20: it ends with the turn timeout, its effects are discarded, the next message goes on."""
    with instance.connect(room) as client, instance.connect(f"{room}-other") as other:

        def is_served_meanwhile() -> bool:
            client.send("forever")
            for _ in range(5):
                other.send(f"waiting {room}")
                if other.receive() == "yes":
                    return True
            return False

        eventually(is_served_meanwhile, "an answer of another room while this one waits")
        client.send("next")
        assert client.receive() == "did next"
    eventually(
        lambda: any(
            "TurnTimeout" in json.dumps(each) and each.get("room") == room
            for each in instance.broker.log_events()
        ),
        "a line of the log",
    )


def test_on_error_hears_of_the_timeout(instance, room):
    """S20."""
    with instance.connect(room, party="tells") as client:
        client.send("forever")
        client.send("next")
        assert client.receive() == "TurnTimeout"
        assert client.receive() == "did next"


def test_an_on_error_that_waits_for_ever(instance, room):
    """S20: it ends, too, and the room goes on."""
    with instance.connect(room, party="hangs") as client:
        for _ in range(2):
            client.send("forever")
            client.send("exit")
            client.send("next")
            assert client.receive() == "did next"


@pytest.mark.parametrize("word", ["swallow", "stubborn 1.2"])
def test_a_handler_that_resists_its_end(instance, room, word):
    """S20: it disturbs nobody else, and its room goes on afterwards."""
    other = instance.connect(f"{room}-other", party="patient")
    with instance.connect(room) as client, other:
        client.send(word)
        client.send("next")
        for _ in range(10):
            other.send("slow 0.1")
            assert other.receive() == "did slow"
        messages = [client.receive()]
        while messages[-1] != "did next":
            messages.append(client.receive())


def test_turns_that_end_when_they_are_cancelled(instance, room):
    """S20: a turn that ends just at its timeout never takes the next turn with it."""
    clients = [instance.connect(f"{room}-{number}") for number in range(20)]
    for round_ in range(3):
        for number, client in enumerate(clients):
            client.send(f"slow {0.45 + number * 0.008:.3f}")
            client.send("brief")
            client.send("next")
        for number, client in enumerate(clients):
            messages = [client.receive()]
            while messages[-1] != "did next":
                messages.append(client.receive())
            answered = [word for word in ("did slow", "did brief") if word in messages]
            assert messages == [*answered, "did next"], round_
            [*_, brief] = instance.events(f"{room}-{number}", "brief")
            # Cancelled it may be, on a machine that stands still, but not before its own time is over.
            assert "did brief" in messages or brief["seconds"] > 0.4, round_
    for client in clients:
        client.close()


@pytest.mark.parametrize("word", ["exit", "interrupt", "generator", "stop", "nursery"])
def test_a_handler_that_raises_whatever_there_is(instance, room, word):
    """S20: room code ends neither its host nor its socket."""
    with instance.connect(room) as client, instance.connect(f"{room}-other") as other:
        client.send(word)
        client.send("next")
        assert client.receive() == "did next"
        other.send("hello")
        assert other.receive() == "did hello"
    assert instance.broker.host_pids() == instance.hosts


def test_a_handler_may_cancel_its_own_work(instance, room):
    """S20: that is no timeout."""
    with instance.connect(room) as client:
        client.send("cancelled")
        assert client.receive() == "went on"
        assert client.receive() == "did cancelled"


@pytest.mark.parametrize("word", ["block", "spin"])
def test_a_handler_that_blocks_the_loop_is_named(instance, room, word):
    """While it does the log names the room, and shows where its code stands."""
    released = instance.broker.folder / room
    if word == "block":
        os.mkfifo(released)  # whoever opens it to read waits for somebody who writes
    with instance.connect(room) as client:
        client.send(f"{word} {room}")
        client.send_frame(PING, b"the gateway lives")
        assert client.receive_frame() == (PONG, b"the gateway lives")
        events = instance.broker.log_events
        [event] = eventually(
            lambda: [each for each in events() if "stack" in each and each["room"] == f"main/{room}"],
            "a stack",
        )
        assert "on_message" in event["stack"]
        assert ("read_text" if word == "block" else "in spin") in event["stack"]
        assert client.is_silent()
        released.write_text("go on")
        assert client.receive() == f"did {word}"


def test_a_start_that_fails_costs_no_socket(instance, room):
    """S3, S4: events wait, the start is tried again, later each time; then all messages come."""
    with instance.connect(room, party="starts") as client:
        client.send("1")
        client.send("2")
        assert client.receive() == "did 1"
        assert client.receive() == "did 2"
    assert len(instance.events(room, "start")) == 2


def test_pings_go_to_no_connection_that_has_closed(pinging, room):
    """RFC 6455, section 5.5.1: nothing follows our Close."""
    with pinging.connect(room) as client:
        client.send_frame(CLOSE, struct.pack(">H", 1000))
        frame = client.receive_frame()
        while frame[0] == PING:  # it has been silent before
            frame = client.receive_frame()
        assert frame[0] == CLOSE
        assert frame[1][:2] == struct.pack(">H", 1000)
        assert client.at_eof()
