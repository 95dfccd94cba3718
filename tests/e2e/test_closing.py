"""How connections end: S14 and S20 against the running broker, with `close_cause` for every way out."""

import itertools
import json
import struct
import threading
import time

import pytest

from tests.e2e.broker_process import eventually, whole_lines
from tests.e2e.raw_client import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, encode_frame

pytestmark = pytest.mark.e2e

APP = """
    import json
    from pathlib import Path

    import trio

    from broker import Server

    LOG = Path(__file__).with_name("events.jsonl")


    class Main(Server):
        turn_timeout = 10.0

        def note(self, event, **fields):
            with LOG.open("a") as log:
                log.write(json.dumps({"room": self.room.id, "event": event, **fields}) + "\\n")

        async def on_message(self, message, sender):
            word, _, rest = message.partition(" ") if isinstance(message, str) else ("", "", "")
            self.note("message", text=word)
            if word == "sleep":
                await trio.sleep(float(rest))
            elif word == "hold":
                while not LOG.with_name(f"go-{self.room.id}").exists():
                    await trio.sleep(0.01)
            elif word == "big":
                sender.send("x" * int(rest))
            elif word == "close":
                code, _, reason = rest.partition(" ")
                sender.close(int(code), reason)
            elif word == "closebig":
                sender.send("x" * int(rest))
                sender.close(4000, "after the big one")
            elif word == "others":
                async for each in self.room.get_connections():
                    if each.id != sender.id:
                        each.close(4000, "by another")
            elif word == "twice":
                sender.close(4000, "one")
                sender.close(4001, "two")
            elif word == "raise":
                sender.send("never")
                raise ValueError("secret")
            if word not in ("close", "closebig", "twice"):
                sender.send(f"did {word}")

        async def on_close(self, connection, code, reason, was_clean):
            listed = [each.id async for each in self.room.get_connections()]
            self.note("closed", id=connection.id, code=code, reason=reason, clean=was_clean,
                      cause=connection.close_cause, listed=connection.id in listed,
                      found=await self.room.get_connection(connection.id) is not None)
            if connection.id == "fails":
                raise RuntimeError("in on_close")
            if connection.id == "exits":
                raise SystemExit
            self.room.broadcast(f"{connection.id} left")

        def on_error(self, connection, error):
            self.note("error", id=connection.id, error=type(error).__name__)
            connection.send(f"sorry: {type(error).__name__}")


    class Fails(Main):
        def on_error(self, connection, error):
            self.note("error", id=connection.id, error=type(error).__name__)
            raise RuntimeError("in on_error")
"""


class Instance:
    """A broker with the app above."""

    def __init__(self, broker) -> None:
        self.broker = broker
        self.hosts = broker.host_pids()

    def go(self, room: str) -> None:
        """Let the room's turns that are held go on."""
        (self.broker.folder / f"go-{room}").touch()

    def connect(self, room: str, name: str = "x"):
        return self.broker.connect(f"/party/{room}?_pk={name}")

    def events(self, room: str, event: str | None = None) -> list[dict]:
        log = self.broker.folder / "events.jsonl"
        noted = [json.loads(line) for line in whole_lines(log)]
        return [each for each in noted if each["room"] == room and event in (None, each["event"])]

    def closed(self, room: str) -> tuple[int, str, bool, str]:
        """How the one connection of a room ended; its close turn has come once."""
        [event] = eventually(lambda: self.events(room, "closed"), "a close turn")
        assert not event["listed"]
        assert not event["found"]
        eventually(lambda: not self.broker.connections(room=room), "no row")
        assert len(self.events(room, "closed")) == 1
        return event["code"], event["reason"], event["clean"], event["cause"]


@pytest.fixture(scope="module")
def instance(module_broker):
    """Nobody here is so slow that a deadline would come first."""
    instance = Instance(module_broker(APP, close_timeout_seconds=60, ping_interval_seconds=600))
    yield instance
    assert instance.broker.host_pids() == instance.hosts


@pytest.fixture(scope="module")
def hasty(module_broker):
    """An instance that waits for no Close longer than a second."""
    instance = Instance(module_broker(APP, close_timeout_seconds=1))
    yield instance
    assert instance.broker.host_pids() == instance.hosts


_rooms = itertools.count()


@pytest.fixture
def room() -> str:
    return f"room-{next(_rooms)}"


def close_payload(code: int, reason: str | bytes = b"") -> bytes:
    return struct.pack(">H", code) + (reason.encode() if isinstance(reason, str) else reason)


# --- The client closes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]
)
def test_codes_and_reasons_of_the_client(instance, room, code):
    """S14: they are told to the room and echoed (RFC 6455, section 5.5.1)."""
    with instance.connect(room) as client:
        client.send_frame(CLOSE, close_payload(code, "grün"))
        assert client.expect_close() == (code, "grün")
        assert client.at_eof()
    assert instance.closed(room) == (code, "grün", True, "client_close")


def test_a_close_without_a_code(instance, room):
    """S14: 1005 for the room, and an empty answer: 1005 never goes on the wire."""
    with instance.connect(room) as client:
        client.send_frame(CLOSE)
        assert client.expect_close() == (None, "")
        assert client.at_eof()
    assert instance.closed(room) == (1005, "", True, "client_close")


def test_the_longest_reason(instance, room):
    """RFC 6455, section 5.5: 123 bytes."""
    with instance.connect(room) as client:
        client.send_frame(CLOSE, close_payload(4000, "x" * 123))
        assert client.expect_close() == (4000, "x" * 123)
    assert instance.closed(room)[1] == "x" * 123


def test_a_close_takes_its_place(instance, room):
    """S14: the messages before it are handled and answered before it is; what follows it is not looked at."""
    with instance.connect(room) as client:
        frames = encode_frame(TEXT, b"sleep 0.3") + b"".join(
            encode_frame(TEXT, b"%d" % n) for n in range(300)
        )
        client.send_bytes(
            frames
            + encode_frame(CLOSE, close_payload(4000, "bye"))
            + encode_frame(TEXT, b"late")
            + b"\xff" * 1000
        )
        assert [client.receive() for _ in range(301)] == ["did sleep", *[f"did {n}" for n in range(300)]]
        assert client.expect_close() == (4000, "bye")
        assert client.at_eof()
    assert instance.closed(room) == (4000, "bye", True, "client_close")
    assert "late" not in [each["text"] for each in instance.events(room, "message")]
    assert [each["event"] for each in instance.events(room)][-1] == "closed"


def test_a_close_behind_a_slow_turn_is_answered_in_time(hasty, room):
    """S14: at the latest after close_timeout_seconds; the turn goes on, and on_close waits for it."""
    with hasty.connect(room) as client:
        started = time.monotonic()
        client.send_bytes(
            encode_frame(TEXT, b"hold")
            + encode_frame(TEXT, b"next")
            + encode_frame(CLOSE, close_payload(4000))
        )
        assert client.expect_close() == (4000, "")
        assert time.monotonic() - started > 0.8
        assert not hasty.events(room, "closed")
        hasty.go(room)
    assert hasty.closed(room) == (4000, "", True, "client_close")
    assert [each["event"] for each in hasty.events(room)] == ["message", "message", "closed"]


def test_a_close_during_a_host_s_death(instance, room):
    """S14: messages before it are delivered again, and on_close comes once, after them."""
    with instance.connect(room) as client:
        client.send_bytes(
            encode_frame(TEXT, b"hold")
            + encode_frame(TEXT, b"next")
            + encode_frame(CLOSE, close_payload(4000))
        )
        eventually(lambda: instance.events(room, "message"), "the slow turn")
        instance.broker.kill_host()
        instance.hosts = instance.broker.host_pids()
        instance.go(room)
        assert [client.receive(), client.receive()] == ["did hold", "did next"]
        assert client.expect_close() == (4000, "")
    assert instance.closed(room) == (4000, "", True, "client_close")
    assert [each["text"] for each in instance.events(room, "message")] == ["hold", "hold", "next"]


@pytest.mark.parametrize("size", [1000, 500_000])
def test_what_was_sent_before_the_answer_arrives_before_it(instance, room, size):
    """S14: also what waits in the outbox."""
    with instance.connect(room) as client:
        client.send_bytes(encode_frame(TEXT, b"big %d" % size) + encode_frame(CLOSE, close_payload(4000)))
        time.sleep(0.2)  # the client reads late, not in vain
        assert client.receive() == "x" * size
        assert client.receive() == "did big"
        assert client.expect_close() == (4000, "")
        assert client.at_eof()
    assert instance.closed(room) == (4000, "", True, "client_close")


@pytest.mark.parametrize("word", ["big", "closebig"])
def test_a_client_that_closes_and_never_reads_is_let_go(hasty, room, word):
    """S14: after close_timeout_seconds, whoever closed."""
    with hasty.connect(room) as client:
        client.send(f"{word} 900000")
        eventually(lambda: hasty.events(room, "message"), "the turn")
        client.send_frame(CLOSE, close_payload(4009))
        code, _, _, cause = hasty.closed(room)
        # Where both close, either may be the first.
        assert (code, cause) in [(4009, "client_close"), (4000, "server_close")][: 1 if word == "big" else 2]
        assert hasty.broker.stats()["outbox_bytes"] == 0


# --- The client ends without a Close ----------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_an_end_without_a_close(instance, room, reset):
    """S14: FIN or RST: what came whole before it is handled, a part of a frame is dropped; 1006."""
    client = instance.connect(room)
    client.send_bytes(
        b"".join(encode_frame(TEXT, b"%d" % n) for n in range(50)) + encode_frame(TEXT, b"part of it")[:-3]
    )
    client.reset() if reset else client.close()
    assert instance.closed(room) == (1006, "", False, "client_gone")
    texts = [each["text"] for each in instance.events(room, "message")]
    assert texts == [str(n) for n in range(50)]


@pytest.mark.parametrize(
    "rest", [encode_frame(TEXT, b"x" * 500_000)[:300_000], encode_frame(TEXT, b"x" * 90_000, fin=False)]
)
def test_an_end_in_the_middle_of_a_large_message(instance, room, rest):
    """S14, S24: also while it moves into its spill file, which goes, too."""
    client = instance.connect(room)
    client.send_bytes(encode_frame(TEXT, b"before") + rest)
    assert client.receive() == "did before"
    client.close()
    assert instance.closed(room) == (1006, "", False, "client_gone")
    eventually(lambda: not list((instance.broker.data / "spill").iterdir()), "no spill file")


def test_many_ends_at_once(instance, room):
    """S14: each close turn comes once, whatever the end; the room hears of each."""
    watcher = instance.connect(room, "watcher")
    for number in range(60):
        client = instance.connect(room, str(number))
        client.send("hello")
        if number % 3 == 0:
            client.send_frame(CLOSE, close_payload(1000))
            client.close()
        elif number % 3 == 1:
            client.close()
        else:
            client.reset()
    gone = {watcher.receive() for _ in range(60)}
    assert gone == {f"{number} left" for number in range(60)}
    assert len(instance.events(room, "closed")) == 60
    watcher.close()


def test_a_message_and_a_reset_to_a_party_without_close_hook(instance, room):
    """A pong or an answer into a dead socket disturbs nobody."""
    for _ in range(50):
        client = instance.connect(room)
        client.send_bytes(encode_frame(PING, b"x") + encode_frame(TEXT, b"hello") + encode_frame(PING, b"y"))
        client.reset()
    eventually(lambda: len(instance.events(room, "closed")) == 50, "50 close turns")
    with instance.connect(room) as client:
        client.send("alive")
        assert client.receive() == "did alive"
    assert not [each for each in instance.broker.log_events() if "could not be served" in each["event"]]


# --- The room closes --------------------------------------------------------------------------------


def test_codes_and_reasons_of_the_room(instance, room):
    """S14, S18: a close takes its place behind what was sent; clean when the client has answered."""
    with instance.connect(room) as client:
        client.send("close 4321 tschüß")
        assert client.expect_close() == (4321, "tschüß")
        client.send_frame(CLOSE, close_payload(4321))
        assert client.at_eof()
    assert instance.closed(room) == (4321, "tschüß", True, "server_close")


def test_closing_twice_does_nothing(instance, room):
    """S14: the first one counts."""
    with instance.connect(room) as client:
        client.send("twice")
        assert client.expect_close() == (4000, "one")
        client.send_frame(CLOSE, close_payload(4000))
    assert instance.closed(room) == (4000, "one", True, "server_close")


def test_a_close_that_is_not_answered(hasty, room):
    """S14: is over after close_timeout_seconds, and not clean."""
    with hasty.connect(room) as client:
        started = time.monotonic()
        client.send("close 4000")
        assert client.expect_close() == (4000, "")
        assert client.at_eof()
        assert time.monotonic() - started > 0.8
    assert hasty.closed(room) == (4000, "", False, "server_close")


def test_a_close_that_is_answered_by_an_end(instance, room):
    """S14: no Close frame, so not clean."""
    with instance.connect(room) as client:
        client.send("close 4000")
        assert client.expect_close() == (4000, "")
    assert instance.closed(room) == (4000, "", False, "server_close")


def test_messages_after_the_room_s_close_are_thrown_away(instance, room):
    """S14: the client's Close behind them is found all the same, also behind half of a large message."""
    with instance.connect(room) as client:
        large = encode_frame(BINARY, b"\x88\x80" * 250_000)
        client.send_bytes(large[:300_000])
        eventually(lambda: list((instance.broker.data / "spill").iterdir()), "a spill file")
        with instance.connect(room, "other") as other:
            other.send("others")
            assert client.expect_close() == (4000, "by another")
            client.send_bytes(large[300_000:])
            client.send("late")
            client.send_frame(BINARY, b"x" * 100_000, fin=False)
            client.send_frame(CONTINUATION, b"x" * 100_000)
            client.send_frame(CLOSE, close_payload(4000))
            assert client.at_eof()
            [event] = eventually(lambda: instance.events(room, "closed"), "a close turn")
            assert (event["code"], event["clean"], event["cause"]) == (4000, True, "server_close")
    assert [each["text"] for each in instance.events(room, "message")] == ["others"]


def test_pipelined_messages_and_a_close_of_the_room(instance, room):
    """S14: on_close comes once, after every turn that was begun."""
    with instance.connect(room) as client:
        client.send_bytes(b"".join(encode_frame(TEXT, b"%d" % n) for n in range(100)))
        client.send_bytes(
            encode_frame(TEXT, b"close 4000") + b"".join(encode_frame(TEXT, b"late") for n in range(100))
        )
        assert [client.receive() for _ in range(100)] == [f"did {n}" for n in range(100)]
        assert client.expect_close() == (4000, "")
        client.send_frame(CLOSE, close_payload(4000))
        assert client.at_eof()
    assert instance.closed(room) == (4000, "", True, "server_close")
    assert instance.events(room)[-1]["event"] == "closed"


def test_both_close_at_once(instance, room):
    """S14: whoever was first, it is one end."""
    for number in range(20):
        with instance.connect(f"{room}-{number}") as client:
            client.send_bytes(encode_frame(TEXT, b"close 4001") + encode_frame(CLOSE, close_payload(4002)))
            code, _ = client.expect_close()
            assert client.at_eof()
        told, _, clean, cause = instance.closed(f"{room}-{number}")
        assert (told, cause) in ((4001, "server_close"), (4002, "client_close"))
        assert code == told
        assert clean


# --- Turns that fail --------------------------------------------------------------------------------


def test_a_failing_turn_keeps_the_socket(instance, room):
    """S20: its effects are discarded, on_error's are not; the next message goes on."""
    with instance.connect(room) as client:
        client.send("raise")
        client.send("more")
        assert client.receive() == "sorry: ValueError"
        assert client.receive() == "did more"
    assert [each["error"] for each in instance.events(room, "error")] == ["ValueError"]

    def failures() -> list[dict]:
        return [each for each in instance.broker.log_events("on_message failed") if each.get("room") == room]

    logged = eventually(failures, "the failure in the log")
    assert logged[0]["party"] == "main"
    assert logged[0]["connection"] == "x"
    assert "secret" in json.dumps(logged[0])


def test_a_failing_on_error_is_only_logged(instance, room):
    """S20."""
    with instance.broker.connect(f"/parties/fails/{room}?_pk=x") as client:
        client.send("raise")
        client.send("more")
        assert client.receive() == "did more"
    assert len(instance.events(room, "error")) == 1
    eventually(lambda: "in on_error" in instance.broker.log, "the second traceback")


@pytest.mark.parametrize("name", ["fails", "exits"])
def test_a_failing_on_close_is_over(instance, room, name):
    """S20: it is not tried again, and nothing is left of the connection."""
    with instance.connect(room, name):
        pass
    assert instance.closed(room)[3] == "client_gone"
    with instance.connect(room) as client:
        client.send("alive")
        assert client.receive() == "did alive"


# --- Drain ------------------------------------------------------------------------------------------


def test_a_stop_closes_with_1012(broker):
    """S14: every client is told, every close turn comes; a second instance finds nothing left over."""
    instance = Instance(broker(APP))
    clients = [instance.connect("r", str(number)) for number in range(5)]
    stopping = threading.Thread(target=instance.broker.stop)
    stopping.start()
    for client in clients:
        assert client.expect_close() == (1012, "service restart")
        client.send_frame(CLOSE, close_payload(1012))
        client.close()
    stopping.join()
    assert len(instance.events("r", "closed")) == 5
    assert {(each["code"], each["cause"]) for each in instance.events("r", "closed")} == {
        (1012, "server_close")
    }
    instance.broker.start()
    assert instance.broker.connections() == []
    with instance.connect("r") as client:
        client.send("hello")
        assert client.receive() == "did hello"
        assert len(instance.events("r", "closed")) == 5


def test_pongs_nobody_asked_for(instance, room):
    """RFC 6455, section 5.5.3: they are a sign of life and nothing else."""
    with instance.connect(room) as client:
        client.send_frame(PONG, b"unasked")
        client.send("hello")
        assert client.receive() == "did hello"
