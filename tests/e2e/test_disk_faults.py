"""Disks that fail: a commit whose outcome is unknown, a full disk (S36).

What must hold, whatever the disk does: no socket closes, nothing is answered that is not stored, and when the
disk is well again every message is handled once and in order, without anybody's help.
"""

import contextlib
import errno
import os
import subprocess
import urllib.error
import urllib.request

import pytest

from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient
from tests.tools import missing
from tests.tracing import injected

pytestmark = pytest.mark.e2e

APP = """
from broker import Server


class Main(Server):
    '''Counts its messages in storage: one that is handled twice leaves a gap.'''

    async def on_message(self, message, sender):
        count = await self.room.storage.get("count", 0) + 1
        self.room.storage.put("count", count)
        sender.send(f"{count} {message}")

    async def on_close(self, connection):
        self.room.storage.put("closed", await self.room.storage.get("closed", 0) + 1)

    async def on_request(self, request):
        return await self.room.storage.list()
"""

MESSAGES = 12
#: Free space below which storage takes no transaction is 8 MiB.
RESERVE = 8 * 1024 * 1024
DISK = 40 * 1024 * 1024


def answers(client: RawClient, first: int, last: int) -> None:
    """Read the answers to messages `first` to `last`, each handled once and in order."""
    client.timeout_seconds = 60
    assert [client.receive() for _ in range(first, last + 1)] == [
        f"{number} m{number}" for number in range(first, last + 1)
    ]


def send(client: RawClient, first: int, last: int) -> None:
    for number in range(first, last + 1):
        client.send(f"m{number}")


class TestFsync:
    @pytest.mark.parametrize("when", [1, 2, 3, 4])
    def test_one_that_fails_once_costs_nothing(self, broker: BrokerFactory, when: int) -> None:
        """The commit may have come back or not: what decides is what the next host finds on disk."""
        site = broker(APP)
        with site.connect("/party/room") as client, site.connect("/party/other") as other:
            send(client, 1, 3)
            answers(client, 1, 3)
            [before] = site.host_pids()
            with injected([before], "fdatasync", f"error=EIO:when={when}"):
                for number in range(4, 4 + MESSAGES):
                    send(client, number, number)
                    answers(client, number, number)
                    send(other, number - 3, number - 3)
                    answers(other, number - 3, number - 3)
            assert site.host_pids() != [before], "no fsync failed"
            assert "outcome of a write is unknown" in site.log
            assert site.stats()["closes"] == {}

    def test_one_that_always_fails_pauses_the_rooms_and_nobody_else(self, broker: BrokerFactory) -> None:
        site = broker(APP)
        with site.connect("/party/room") as client:
            send(client, 1, 1)
            answers(client, 1, 1)
            [before] = site.host_pids()
            # The hosts that come next are children of the supervisor, and traced with it.
            with injected([site.pid, before], "fdatasync", "error=EIO:when=1+"):
                send(client, 2, 1 + MESSAGES)
                ends = "host ended, starting it again"
                # Under its tracer a host takes its time to start.
                eventually(lambda: len(site.log_events(ends)) >= 2, "end of another host", 90)
                assert before not in site.host_pids()
                assert client.is_silent()
                assert site.stats()["connections"] == 1, "the gateway answers"
                eventually(lambda: not site.stats()["ready"], "health that says so")
            answers(client, 2, 1 + MESSAGES)
            assert site.stats()["closes"] == {}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a way to fill it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        missing("mount")
    if mounted.returncode:
        missing("the right to mount a tmpfs (root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Disk:
    """Takes the free space of a file system away, and gives it back."""

    def __init__(self, folder) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"

    def leave(self, size: int) -> None:
        """Leave about `size` bytes free."""
        with self._ballast.open("ab") as file:

            def is_filled() -> bool:
                found = os.statvfs(self._folder)
                try:
                    os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - size)
                except OSError as error:  # the broker has written something since
                    assert error.errno == errno.ENOSPC, error
                    return False
                return True

            eventually(is_filled, "a disk that is full")

    def give_back(self) -> None:
        self._ballast.unlink()


def health(site: BrokerProcess) -> int:
    try:
        with urllib.request.urlopen(site.url("/_broker/health"), timeout=DEADLINE_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize("free", [RESERVE // 2, 0], ids=["below the reserve", "nothing free"])
class TestFullDisk:
    def test_rooms_pause_and_go_on_by_themselves(self, small_disk, free: int) -> None:
        with contextlib.ExitStack() as stack:
            site = stack.enter_context(BrokerProcess(small_disk, APP))
            client = stack.enter_context(site.connect("/party/room"))
            send(client, 1, 3)
            answers(client, 1, 3)
            disk = Disk(small_disk)
            disk.leave(free)
            send(client, 4, 3 + MESSAGES)
            eventually(lambda: health(site) == 503, "health that says so")
            assert client.is_silent(), "something was answered that cannot be stored"
            assert site.stats()["connections"] == 1
            disk.give_back()
            answers(client, 4, 3 + MESSAGES)
            eventually(lambda: health(site) == 200, "health")
            assert site.stats()["closes"] == {}

    def test_newcomers_are_refused_and_who_is_there_stays(self, small_disk, free: int) -> None:
        with contextlib.ExitStack() as stack:
            site = stack.enter_context(BrokerProcess(small_disk, APP))
            client = stack.enter_context(site.connect("/party/room"))
            send(client, 1, 1)
            answers(client, 1, 1)
            disk = Disk(small_disk)
            disk.leave(free)
            with RawClient(site.port) as newcomer:
                newcomer.send_handshake("/party/room")
                answer = newcomer.receive_answer()
            assert (answer.status, answer.headers.get("retry-after")) == (503, "1")
            assert site.stats()["connections"] == 1
            disk.give_back()
            with site.connect("/party/room") as newcomer:
                send(client, 2, 2)
                answers(client, 2, 2)
                send(newcomer, 3, 3)
                answers(newcomer, 3, 3)
            assert site.stats()["connections"] >= 1
