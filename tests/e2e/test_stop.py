"""A stop is bounded, whatever clients, rooms and processes do, and says in the log what it waits for.

`drain` is long in all these tests: who waited for all of it would fail.
"""

import contextlib
import os
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually, whole_lines
from tests.e2e.raw_client import TEXT, encode_frame

pytestmark = pytest.mark.e2e

BrokerFactory = Callable[..., BrokerProcess]

#: An order of magnitude more than what is given to anything here.
DRAIN_SECONDS = 600

APP = """
    import os
    from pathlib import Path

    import trio

    from broker import Server

    FOLDER = Path(__file__).parent

    class Main(Server):
        async def on_message(self, message, sender):
            while message == "wait":
                FOLDER.joinpath(f"{self.room.id} waits").touch()
                if FOLDER.joinpath("deadly").exists():
                    os._exit(3)
                await trio.sleep(0.01)
            await self.room.storage.put("last", message)
            sender.send("kept")

        async def on_request(self, request):
            FOLDER.joinpath("asked").touch()
            while not FOLDER.joinpath("go").exists():
                await trio.sleep(0.01)
            return "done"

        def on_close(self, connection, code, reason, was_clean):
            if FOLDER.joinpath("deadly").exists():
                FOLDER.joinpath("deadly").unlink()
                os._exit(3)
            with FOLDER.joinpath("closed").open("a") as file:
                file.write(f"{connection.id} {connection.close_cause} {was_clean}\\n")
"""


CRON_APP = """
    from pathlib import Path

    import trio

    from broker import Server

    FOLDER = Path(__file__).parent

    class Main(Server):
        crons = {"each": "* * * * *"}
        turn_timeout = 600

        @staticmethod
        async def on_cron(cron):
            if not FOLDER.joinpath("busy").exists():
                return
            FOLDER.joinpath("begun").touch()
            try:
                await trio.sleep_forever()
            finally:
                FOLDER.joinpath("cut short").touch()
"""


def rows_left(data: Path) -> int:
    """Rows in the outboxes of all shards."""
    count = 0
    for path in (data / "shards").glob("*.db"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            count += database.execute("SELECT count(*) FROM outbox").fetchone()[0]
    return count


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ends_by_itself(process: BrokerProcess) -> None:
    """A stop that has been asked for comes to its end, without a second request, which would force it."""
    eventually(lambda: has_ended(process.pid), "end of the supervisor")
    process.stop()


@contextlib.contextmanager
def raw(process: BrokerProcess, sent: bytes = b"") -> Iterator[socket.socket]:
    """A TCP connection on which this has been sent."""
    with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connected:
        connected.sendall(sent)
        yield connected


def test_a_host_does_not_wait_for_a_commit_that_ended_when_the_gateway_had_gone(
    broker: BrokerFactory,
) -> None:
    """A second after the last commit the outbox is tidied; here that comes between the end of the gateway and
    the host's own.
    """
    process = broker(APP, drain=DRAIN_SECONDS)
    with process.connect() as client:
        client.send("something")
        assert client.receive() == "kept"
    [host], gateway = process.host_pids(), process.gateway_pid()
    process.kill_supervisor()
    os.kill(gateway, signal.SIGTERM)
    eventually(lambda: has_ended(gateway), "the gateway's end")
    eventually(lambda: not rows_left(process.data), "a tidy outbox")
    os.kill(host, signal.SIGTERM)
    eventually(lambda: has_ended(host), "the host's end")
    process.start()


def test_a_host_that_is_asked_a_second_time_cuts_a_cron_short_and_ends_in_order(
    broker: BrokerFactory,
) -> None:
    """As its supervisor asks it, shortly before it would kill it."""
    process = broker(CRON_APP, drain=DRAIN_SECONDS)
    process.stop()
    (process.folder / "busy").touch()
    for shard in (process.data / "shards").glob("*.db"):  # as if it had been stopped two minutes ago
        with contextlib.closing(sqlite3.connect(shard)) as database, database:
            database.execute("UPDATE crons SET last_ms = last_ms - 120000")
    process.start()
    eventually((process.folder / "begun").exists, "the cron that was missed")
    [host], gateway = process.host_pids(), process.gateway_pid()
    process.kill_supervisor()
    os.kill(gateway, signal.SIGTERM)
    eventually(lambda: has_ended(gateway), "the gateway's end")
    os.kill(host, signal.SIGTERM)
    [line] = eventually(lambda: process.log_events("stopping: this host waits")[:1], "what it waits for")
    assert line["crons"] is True
    os.kill(host, signal.SIGTERM)
    eventually(lambda: has_ended(host), "the host's end")
    assert (process.folder / "cut short").exists()
    (process.folder / "busy").unlink()
    process.start()


def test_connections_of_every_kind_do_not_hold_up_a_stop(broker: BrokerFactory) -> None:
    """As a browser has them: opened in advance and mute, between two requests, half-closed, stuck."""
    process = broker(APP, drain=DRAIN_SECONDS, close_timeout_seconds=1)
    get = b"GET /_broker/health HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"):
            stack.enter_context(raw(process, sent))
        for more in (b"", b"GET /_bro"):
            kept = stack.enter_context(raw(process, get))
            assert kept.recv(65536).startswith(b"HTTP/1.1 200")
            kept.sendall(more)
        half = stack.enter_context(raw(process, get))
        assert half.recv(65536)
        half.shutdown(socket.SHUT_WR)
        posting = b"POST /party/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"
        stack.enter_context(raw(process, get)).sendall(posting[:20])
        mute = stack.enter_context(process.connect("/party/mute"))  # never answers the Close
        partial = stack.enter_context(process.connect("/party/partial"))
        partial.send_bytes(encode_frame(TEXT, b"not all of it")[:-3])
        gone = stack.enter_context(process.connect("/party/gone"))
        gone.shutdown()
        process.stop()
        assert mute.expect_close()[0] == 1012
    assert "killed" not in process.log


def test_the_log_says_what_a_stop_waits_for(broker: BrokerFactory) -> None:
    process = broker(APP, drain=DRAIN_SECONDS)
    with raw(process, b"GET /party/slow HTTP/1.1\r\nHost: x\r\n\r\n") as asking:
        eventually((process.folder / "asked").exists, "the request's turn")
        os.kill(process.pid, signal.SIGTERM)
        [line] = eventually(lambda: process.log_events("stopping: the gateway waits")[:1])
        assert (line["requests"], line["http_connections"]) == (1, 1)
        [line] = eventually(lambda: process.log_events("waiting for the end of a process")[:1])
        assert line["child"] == "gateway"
        (process.folder / "go").touch()
        assert b"done" in asking.recv(65536)
    ends_by_itself(process)


def test_close_turns_are_not_waited_for_when_their_host_has_died(broker: BrokerFactory) -> None:
    """S35: in a stop nobody starts another; they are run at the next start."""
    process = broker(APP, drain=DRAIN_SECONDS)
    client = process.connect("/party/room?_pk=last")
    (process.folder / "deadly").touch()
    os.kill(process.pid, signal.SIGTERM)
    assert client.expect_close()[0] == 1012
    client.send_close(1012)
    client.close()
    ends_by_itself(process)
    [line] = process.log_events("stopping: the gateway waits")[:1]
    assert line["without_host"] is True
    process.start()
    eventually(lambda: whole_lines(process.folder / "closed") == ["last server_close True"], "its close turn")


def test_a_client_may_take_its_time_for_its_close_when_the_host_has_died(broker: BrokerFactory) -> None:
    """S14: its close turn needs a host, its Close does not."""
    process = broker(APP, drain=DRAIN_SECONDS, close_timeout_seconds=60)
    slow, last = process.connect("/party/room?_pk=slow"), process.connect("/party/room?_pk=last")
    (process.folder / "deadly").touch()
    os.kill(process.pid, signal.SIGTERM)
    assert last.expect_close()[0] == slow.expect_close()[0] == 1012
    last.send_close(1012)
    last.close()

    def waits() -> bool:
        lines = process.log_events("stopping: the gateway waits")
        return len(lines) > 1 and lines[-1].get("without_host", False)

    eventually(waits, "a gateway that waits for long")
    slow.send_close(1012)
    assert slow.at_eof()
    slow.close()
    ends_by_itself(process)
    process.start()
    expected = ["last server_close True", "slow server_close True"]
    eventually(lambda: sorted(whole_lines(process.folder / "closed")) == expected, "two close turns")


def test_whose_turn_is_cut_off_by_a_stop_is_told_of_its_end_as_it_was(broker: BrokerFactory) -> None:
    """S14: who was closed, and who has closed and waits for the answer. Their turns are not run again: their
    messages go with the sockets.
    """
    process = broker(APP, drain=DRAIN_SECONDS, close_timeout_seconds=60)
    names = ("ours", "theirs")
    ours, theirs = [process.connect(f"/party/{name}?_pk={name}") for name in names]
    for name, client in zip(names, (ours, theirs), strict=True):
        client.send("wait")
        eventually((process.folder / f"{name} waits").exists, "its turn")
    theirs.send_close(4000)
    eventually(lambda: process.stats()["connections"] == 1, "its Close")
    os.kill(process.pid, signal.SIGTERM)
    assert ours.expect_close()[0] == 1012
    ours.send_close(1012)
    (process.folder / "deadly").touch()
    assert theirs.expect_close()[0] == 4000
    ends_by_itself(process)
    ours.close()
    theirs.close()
    (process.folder / "deadly").unlink()
    process.start()
    expected = ["ours server_close True", "theirs client_close True"]
    eventually(lambda: sorted(whole_lines(process.folder / "closed")) == expected, "two close turns")


def test_a_host_that_is_stopped_by_a_signal_does_not_hold_up_a_stop(broker: BrokerFactory) -> None:
    process = broker(APP, drain=DRAIN_SECONDS)
    client = process.connect()
    process.signal_hosts(signal.SIGSTOP)
    process.stop()
    client.close()
