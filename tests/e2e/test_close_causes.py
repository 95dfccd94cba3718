"""Every way in which a connection can end: its cause, its code, and exactly one `on_close` (S14)."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually, whole_lines
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import CLOSE, CONTINUATION, PING, TEXT, RawClient, encode_frame

pytestmark = pytest.mark.e2e

APP = """
import json
from pathlib import Path

from broker import Server

LOG = Path(__file__).with_name("closes.jsonl")


class Main(Server):
    duplicate_ids = "replace"
    message_bytes_max = 100_000
    outbox_bytes_max = 64 * 1024

    async def on_message(self, message, sender):
        if message == "close":
            sender.close(4000, "enough")
        elif message == "flood":
            for _ in range(100):
                sender.send("x" * 100_000)
        elif message == "state":
            sender.set_state("kept")
            sender.send("done")

    async def on_close(self, connection, code, reason, was_clean):
        with LOG.open("a") as log:
            log.write(json.dumps([connection.id, connection.close_cause, code, reason, was_clean]) + "\\n")
"""

#: What `on_close` is told: code, reason, clean. A reason of ours in words is None here.
TOLD: dict[str, tuple[int, str | None, bool]] = {
    "client_close": (4001, "bye", True),
    "client_gone": (1006, "", False),
    "ping_timeout": (1006, "", False),
    "slow_consumer": (1013, "", False),
    "too_big": (1009, None, False),
    "protocol_error": (1002, None, False),
    "limit": (1008, None, False),
    "server_close": (4000, "enough", True),
    "replaced": (4409, "replaced", False),
    "gateway_lost": (1006, "", False),
}


#: Those that come of a deadline. In all other ways no deadline may come first.
OF_DEADLINES = ("ping_timeout", "slow_consumer")


@pytest.fixture(scope="module")
def instances(module_broker: BrokerFactory) -> Iterator[dict[bool, BrokerProcess]]:
    """By whether its deadlines are short."""
    started = {
        False: module_broker(APP, close_timeout_seconds=60, ping_interval_seconds=600),
        True: module_broker(APP, close_timeout_seconds=1, ping_interval_seconds=2, ping_timeout_seconds=3),
    }
    yield started
    for instance in started.values():
        assert "a handler of the gateway failed" not in instance.log


def closes(instance: BrokerProcess) -> list[tuple[str, str, int, str, bool]]:
    """What `on_close` was told, call by call."""
    log = Path(instance.folder) / "closes.jsonl"
    return [tuple(json.loads(line)) for line in whole_lines(log)]


def replace(instance: BrokerProcess, client: RawClient) -> None:
    with instance.connect("/party/room?_pk=replaced") as newcomer:
        assert client.expect_close() == (4409, "replaced")
        newcomer.send_close(4001, "the newcomer")
        assert newcomer.expect_close()[0] == 4001


def be_closed(_: BrokerProcess, client: RawClient) -> None:
    client.send("close")
    assert client.expect_close() == (4000, "enough")
    client.send_close(4000)


def ignore_pings(_: BrokerProcess, client: RawClient) -> None:
    assert client.receive_frame() == (PING, b"")
    assert client.at_eof()


def lose_the_gateway(instance: BrokerProcess, client: RawClient) -> None:
    gateway = instance.gateway_pid()
    instance.kill("gateway", "keeper")
    assert client.at_eof()
    instance.wait_for_gateway(without=gateway)


WAYS: dict[str, Callable[[BrokerProcess, RawClient], object]] = {
    "client_close": lambda _, client: client.send_close(4001, "bye"),
    "client_gone": lambda _, client: client.reset(),
    "ping_timeout": ignore_pings,
    "slow_consumer": lambda _, client: client.send("flood"),
    "too_big": lambda _, client: client.send_bytes(encode_frame(TEXT, b"x" * 100_001)[:14]),
    "protocol_error": lambda _, client: client.send_frame(TEXT, "x", mask=False),
    "limit": lambda _, client: client.send_bytes(
        encode_frame(TEXT, b"", fin=False) + encode_frame(CONTINUATION, b"", fin=False) * 16_384
    ),
    "server_close": be_closed,
    "replaced": replace,
    "gateway_lost": lose_the_gateway,
}


@pytest.mark.parametrize("cause", TOLD)
def test_on_close_comes_once_with_its_cause(instances: dict[bool, BrokerProcess], cause: str) -> None:
    """S14: whatever ended it, and whoever dies afterwards."""
    instance = instances[cause in OF_DEADLINES]
    with instance.connect(f"/party/room?_pk={cause}") as client:
        client.send("state")
        assert client.receive() == "done"
        WAYS[cause](instance, client)
        eventually(lambda: any(each[1] == cause for each in closes(instance)), f"on_close for {cause}")
        code, reason, clean = TOLD[cause]
        [told] = [each for each in closes(instance) if each[1] == cause]
        assert told[0] == cause
        assert (told[2], told[4]) == (code, clean)
        assert reason is None or told[3] == reason


@pytest.mark.parametrize("hasty", [False, True])
def test_nobody_is_told_again(instances: dict[bool, BrokerProcess], hasty: bool) -> None:
    """S14, S22: the next gateway and the next host know nothing of what has been told."""
    instance = instances[hasty]
    instance.kill_host()
    instance.kill_gateway()
    with instance.connect("/party/room?_pk=last") as client:
        client.send_close(4001, "bye")
        while client.receive_frame()[0] != CLOSE:
            pass
    eventually(lambda: any(each[0] == "last" for each in closes(instance)), "the last on_close")
    counts = Counter(each[0] for each in closes(instance))
    expected = {cause: 1 for cause in TOLD if (cause in OF_DEADLINES) == hasty} | {"last": 1}
    assert counts == (expected if hasty else expected | {"replaced": 2})
    eventually(lambda: not instance.connections(), "no row")
