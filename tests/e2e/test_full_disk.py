"""A disk that is full, and is not any more (S36): a small file system in memory, filled and emptied again."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually

SIZE_BYTES = 48 * 1024 * 1024

APP = """
from broker import Server


class Main(Server):
    async def on_message(self, message, sender):
        if message == "read":
            sender.send(f"read {await self.room.storage.get('count', 0)}")
            return
        storage = self.room.storage
        count = await storage.get("count", 0) + 1
        storage.put("count", count)
        if self.room.id == "other":
            await storage.sql("CREATE TABLE IF NOT EXISTS heard (message TEXT)")
            await storage.sql("INSERT INTO heard VALUES (?)", message)
            [row] = await storage.sql("SELECT count(*) AS count FROM heard")
            count = min(count, row["count"])
        sender.send(f"{message} {count}")
"""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """The folder of a broker on a file system of SIZE_BYTES."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Take all that the file system has, but for `left` bytes."""
    file = folder / "ballast"
    with file.open("wb", buffering=0) as opened:
        while True:
            disk = os.statvfs(folder)
            size = min(disk.f_bavail * disk.f_frsize - left, 1 << 20)
            if size <= 0:
                return file
            try:
                opened.write(bytes(size))
            except OSError:
                return file


def health(site: BrokerProcess) -> tuple[int, str]:
    try:
        with urlopen(site.url("/_broker/health"), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


@pytest.mark.parametrize("left", [0, 4 * 1024 * 1024])
@pytest.mark.parametrize("durability", ["full", "os"])
def test_rooms_wait_for_the_disk_and_go_on_by_themselves(small: Path, durability: str, left: int) -> None:
    """S36: nothing is acknowledged that is not on disk, nobody is cut off, and rooms that only read go on."""
    with (
        BrokerProcess(small, APP, durability=durability) as site,
        site.connect("/party/writes") as writer,
        site.connect("/party/other") as other,
        site.connect("/party/reads") as reader,
    ):
        for client in (writer, other, reader):
            client.send("first")
            assert client.receive() == "first 1"
        assert health(site) == (200, "ready\n")
        hosts = site.host_pids()
        ballast = fill(small, left)
        for number in range(3):
            writer.send(f"{number}")
        for text in ("waits", "and waits"):
            other.send(text)
        eventually(lambda: site.stats()["paused"], "a pause")
        reader.send("read")
        assert reader.receive() == "read 1"
        status, text = health(site)
        assert status == 503
        assert text.startswith("paused: ")
        assert "Free some space" in text
        assert writer.is_silent(1.0)
        assert other.is_silent(0)
        assert "above the reserve" in site.stats()["paused"]
        ballast.unlink()
        for number in range(3):
            assert writer.receive() == f"{number} {number + 2}"
        assert [other.receive(), other.receive()] == ["waits 2", "and waits 3"]
        eventually(lambda: health(site) == (200, "ready\n"), "its end")
        assert site.stats()["paused"] is None
        assert site.host_pids() == hosts
        assert len(site.log_events("the disk refuses a commit: rooms that wait for it pause")) == 1
        assert len(site.log_events("the disk takes commits again: rooms go on")) == 1
        for client in (writer, other, reader):
            client.send("last")
            assert str(client.receive()).startswith("last")


def test_a_host_that_dies_while_the_disk_is_full_is_followed_by_one_that_waits(small: Path) -> None:
    """S22, S36: what was not committed is given out again, and counted once when there is space."""
    with BrokerProcess(small, APP) as site, site.connect("/party/writes") as writer:
        writer.send("first")
        assert writer.receive() == "first 1"
        ballast = fill(small, 4 * 1024 * 1024)
        writer.send("second")
        eventually(lambda: site.stats()["paused"], "a pause")
        site.kill_host()
        eventually(lambda: site.stats()["paused"], "the next one's pause")
        writer.send("third")
        assert writer.is_silent(0.5)
        ballast.unlink()
        assert writer.receive() == "second 2"
        assert writer.receive() == "third 3"
        assert writer.is_silent(0.1)
