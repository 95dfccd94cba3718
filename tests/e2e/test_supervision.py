"""Keeper, hosts and supervisor die, hang and are replaced, under clients that talk all the while (S32, S34).

A client sends numbered messages and reads the answers: each number is answered once, in order, whatever
happens meanwhile; which code answered shows as well.
"""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self
from urllib.request import urlopen

import pytest

from hibernation.admin import AdminClient
from hibernation.processes import started_at_ticks
from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient

pytestmark = pytest.mark.e2e

APP = """
from broker import Server

CODE = "one"

class Main(Server):
    def on_message(self, message, sender):
        sender.send(CODE + " " + message)
"""


class Talker:
    """A client that sends and reads in a thread of its own, until it leaves the block."""

    def __init__(self, client: RawClient) -> None:
        self.answers: list[str] = []
        self._client = client
        self._end = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._talk)

    def _talk(self) -> None:
        try:
            number = 0
            while not self._end.is_set():
                # Several on their way at once.
                for each in range(number, number + 8):
                    self._client.send(str(each))
                for _ in range(8):
                    self.answers.append(str(self._client.receive()))
                number += 8
        except BaseException as failure:
            self._failure = failure

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(60)
        self._client.close()
        assert not self._thread.is_alive() and self._failure is None, self._failure
        numbers = [int(answer.split()[1]) for answer in self.answers]
        assert numbers == list(range(len(numbers)))

    def hears(self, code: str) -> bool:
        """Whether the last answer is of this code."""
        return self.answers[-1:] != [] and self.answers[-1].startswith(code + " ")

    def goes_on(self) -> None:
        """Wait until answers have come that had not before."""
        known = len(self.answers)
        eventually(lambda: self._failure is not None or len(self.answers) > known + 16)
        assert self._failure is None, self._failure


def talkers(process: BrokerProcess, count: int = 4) -> list[Talker]:
    """One client in each of several rooms, which several hosts have."""
    return [Talker(process.connect(f"/party/{room}")) for room in range(count)]


def runs(pid: int) -> bool:
    return started_at_ticks(pid) is not None


def is_replaced(process: BrokerProcess, keeper: int) -> bool:
    return process._listed("keeper") not in ([], [keeper])


def holds_the_listener(process: BrokerProcess) -> bool:
    pids = [line["pid"] for line in process.log_events("keeper holds the listener")]
    return pids[-1:] == process._listed("keeper")


def code(name: str) -> str:
    return APP.replace("one", name)


def test_a_keeper_that_is_killed_is_replaced_and_nobody_notices(broker: BrokerFactory) -> None:
    process = broker(APP)
    first = process.keeper_pid()
    with Talker(process.connect()) as talker:
        for _ in range(3):
            eventually(partial(holds_the_listener, process))
            killed = process.keeper_pid()
            os.kill(killed, signal.SIGKILL)
            eventually(partial(is_replaced, process, killed))
            eventually(partial(holds_the_listener, process))
            talker.goes_on()
    assert len(process.log_events("keeper ended, starting another")) == 3
    assert not runs(first)


def test_a_reload_replaces_the_code_of_all_hosts_and_no_client_notices(broker: BrokerFactory) -> None:
    """S32: sockets stay, and each message is answered once, by the old code or by the new."""
    process = broker(APP, hosts=2)
    one, two, three, four = talkers(process)
    with one, two, three, four:
        for name in ("two", "three", "four"):
            before = process.host_pids()
            process.write_app(code(name))
            status, text = process.command("reload")
            assert status == 0 and "2 hosts" in text and "with new code" in text
            # It returns when the new code answers for every room.
            assert not any(runs(pid) for pid in before) and len(process.host_pids()) == 2
            for talker in (one, two, three, four):
                talker.goes_on()
                assert talker.hears(name)
    assert process.gateway_pid() == process.stats()["gateways"][0]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
        ("class Main(", "is not valid Python"),
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended while it was starting"),
        ("x = 1", "Server"),
    ],
)
def test_code_that_fails_its_check_changes_nothing_and_says_why(
    good: BrokerProcess, source: str, text: str
) -> None:
    """FAULTS 67; S32."""
    hosts = good.host_pids()
    with Talker(good.connect()) as talker:
        good.write_app(source)
        status, said = good.command("reload")
        assert status == 1 and text in said
        assert good.host_pids() == hosts
        talker.goes_on()
        assert talker.hears("one")
        good.write_app(APP)


@pytest.fixture(scope="module")
def good(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, hosts=2)


@pytest.fixture(scope="module")
def strict(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, hang_timeout=2)


def test_a_host_that_does_not_answer_is_named(good: BrokerProcess) -> None:
    """What it alone knows is left open, in numbers and in listings."""
    clients = [good.connect(f"/party/{room}") for room in range(4)]  # on both hosts
    silent, other = good.host_pids()
    os.kill(silent, signal.SIGSTOP)
    try:
        with AdminClient(good.data) as admin:
            stats = admin.ask("stats")
            rooms = admin.ask("rooms")["rooms"]
    finally:
        os.kill(silent, signal.SIGCONT)
    assert stats["silent_hosts"] == [silent] and stats["hosts"] == [other]
    assert {row["awake"] for row in rooms} == {None, False}
    for client in clients:
        client.close()
    assert good.stats()["silent_hosts"] == []


def test_a_host_that_is_stopped_is_killed_and_its_messages_go_to_the_next(strict: BrokerProcess) -> None:
    """S5, S23; FAULTS 5."""
    process = strict
    with Talker(process.connect()) as talker:
        talker.goes_on()
        [hung] = process.host_pids()
        os.kill(hung, signal.SIGSTOP)
        eventually(lambda: not runs(hung), "end of the host that was stopped")
        talker.goes_on()
    # A busy machine may hold up others for as long, and then they are killed as well.
    [line] = [line for line in process.log_events("killed: it hangs") if line["pid"] == hung]
    assert line["silent_s"] >= 2


def test_a_killed_supervisors_instance_is_taken_over_under_its_clients(broker: BrokerFactory) -> None:
    """S34: once with other code, once with code that does not load, once with other hosts."""
    process = broker(APP)
    keeper, gateway, hosts = process.keeper_pid(), process.gateway_pid(), process.host_pids()
    one, two, three, four = talkers(process)
    with one, two, three, four:
        process.kill_supervisor()
        one.goes_on()
        status, text = process.command("reload")
        assert status == 1 and "broker serve" in text

        process.write_app("x = 1")
        status, text = process.command("serve", "app.py", "--bind", f"127.0.0.1:{process.port}")
        assert status == 2 and "Server" in text
        assert (process.keeper_pid(), process.gateway_pid(), process.host_pids()) == (keeper, gateway, hosts)
        one.goes_on()

        process.write_app(code("two"))
        process.start()
        assert process.keeper_pid() == keeper
        assert not any(runs(pid) for pid in hosts)
        for talker in (one, two, three, four):
            talker.goes_on()
            assert talker.hears("two")
        eventually(lambda: gateway not in process._listed("gateway"), "another gateway")
        # What was taken over is looked after.
        process.kill_host()
        one.goes_on()

        process.kill_supervisor()
        process._options += ["--hosts", "3"]
        process.start()
        assert len(process.host_pids()) == 3
        for talker in (one, two, three, four):
            talker.goes_on()


def test_an_upgrade_brings_another_gateway_and_no_client_notices(broker: BrokerFactory) -> None:
    """S33: three in a row, with a reload and a death between."""
    process = broker(APP, hosts=2)
    one, two, three, four = talkers(process)
    with one, two, three, four:
        for _ in range(3):
            [before] = eventually(lambda: process._listed("gateway"), "a gateway")
            status, text = process.command("upgrade")
            assert status == 0 and "gateway replaced" in text and "pause" in text
            assert process.gateway_pid() != before
            for talker in (one, two, three, four):
                talker.goes_on()
            eventually(lambda: not process._listed("leaving"))
            assert process.command("reload")[0] == 0
            os.kill(process.gateway_pid(), signal.SIGKILL)
            for talker in (one, two, three, four):
                talker.goes_on()


SLOW = """
import os
import trio
from broker import Server

class Main(Server):
    def on_message(self, message, sender):
        sender.send("one " + message)

    async def on_request(self, request):
        open("begun", "w").close()
        while not os.path.exists("go"):
            await trio.sleep(0.02)
        return "slow"
"""


def test_a_keeper_that_dies_in_an_upgrade_costs_the_upgrade_and_no_socket(broker: BrokerFactory) -> None:
    """S33: the old gateway is at rest and holds all sockets, the next keeper holds none."""
    process = broker(APP)
    old, keeper = process.gateway_pid(), process.keeper_pid()
    with Talker(process.connect()) as talker, ThreadPoolExecutor() as pool:
        os.kill(old, signal.SIGSTOP)
        upgrade = pool.submit(process.command, "upgrade")
        try:
            eventually(lambda: process.log_events("gateway freezes"), "a successor that waits")
            [successor] = process._listed("successor")
            os.kill(successor, signal.SIGSTOP)
        finally:
            os.kill(old, signal.SIGCONT)
        eventually(lambda: process.log_events("gateway takes over"), "the order to go")
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: is_replaced(process, keeper) and holds_the_listener(process), "another keeper")
        os.kill(successor, signal.SIGCONT)
        status, text = upgrade.result(60)
        assert status == 1 and "the keeper has died" in text and "the old one goes on" in text
        talker.goes_on()
        # It has filled the next keeper: now an upgrade can be done.
        eventually(lambda: len(process.log_events("a new keeper holds the sockets")) == 1, "the sockets kept")
        assert process.command("upgrade")[0] == 0
        talker.goes_on()
    assert process.gateway_pid() not in (old, successor)
    assert process.stats()["closes"].get("gateway_lost", 0) == 0


def test_an_upgrade_lets_requests_end_that_have_begun(broker: BrokerFactory) -> None:
    """S33: while they are waited for, everything goes on as before."""
    process = broker(SLOW)
    before = process.gateway_pid()
    with ThreadPoolExecutor() as pool, Talker(process.connect()) as talker:
        request = pool.submit(urlopen, f"http://127.0.0.1:{process.port}/party/slow", timeout=60)
        eventually((process.folder / "begun").exists)
        upgrade = pool.submit(process.command, "upgrade")
        eventually(lambda: process.log_events("gateway freezes"))
        end = time.monotonic() + 1.5  # longer than what requests get that come later
        while time.monotonic() < end:
            talker.goes_on()
        assert process._listed("gateway") == [before] and not upgrade.done()
        (process.folder / "go").touch()
        with request.result() as answer:
            assert (answer.status, answer.read()) == (200, b"slow")
        assert upgrade.result()[0] == 0
        talker.goes_on()


def test_a_gateway_that_is_stopped_is_killed_and_its_sockets_live_on(strict: BrokerProcess) -> None:
    """S23, S34; FAULTS 5."""
    process = strict
    with Talker(process.connect()) as talker:
        talker.goes_on()
        hung = process.gateway_pid()
        os.kill(hung, signal.SIGSTOP)
        eventually(lambda: not runs(hung), "end of the gateway that was stopped")
        talker.goes_on()


def test_a_drain_closes_all_and_takes_nobody(broker: BrokerFactory) -> None:
    process = broker(APP)
    clients = [process.connect(f"/party/{number}") for number in range(10)]
    status, _ = process.command("drain", "--seconds", "0.5")
    assert status == 0
    for client in clients:
        assert client.expect_close()[0] == 1012
        client.close()
    assert is_refused(process)
    eventually(lambda: not process.stats()["connections"], "the end of all connections")
    # A gateway that follows takes nobody either.
    dead = process.gateway_pid()
    os.kill(dead, signal.SIGKILL)
    eventually(lambda: process._listed("gateway") not in ([], [dead]))
    eventually(lambda: is_refused(process))


def is_refused(process: BrokerProcess) -> bool:
    """Whether newcomers get 503."""
    with RawClient(process.port) as newcomer:
        newcomer.send_handshake()
        return newcomer.receive_answer().status == 503


def test_the_status_of_the_processes_is_shown(good: BrokerProcess) -> None:
    spares = eventually(lambda: good._listed("spare"), "a spare gateway")
    status, text = good.command("stats", "--json")
    assert status == 0
    for pid in (good.keeper_pid(), good.gateway_pid(), *good.host_pids(), *spares):
        assert str(pid) in text
