"""The entries of gateway and host processes, before they are told to go: what they check, and what they leave
alone.
"""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from hibernation.configuration import GatewayConfig, HostConfig
from hibernation.listener import bind_listener
from hibernation.settings import Settings
from storage.directory import DataDirectory
from storage.migrations import REGISTRY, SHARD, Schema
from storage.registry import registry_path
from storage.shards import shard_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    with DataDirectory(tmp_path / "data") as directory:
        yield directory.path


def newer(path: Path, schema: Schema) -> None:
    """A file as a newer broker would leave it."""
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.version + 1}")


class Entry:
    """One process that has its configuration and has not been told to go."""

    def __init__(self, module: str, config: GatewayConfig | HostConfig, reading: int, fds: list[int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(config.to_json().encode() + b"\n")
        self.process.stdin.flush()
        self._reports = os.fdopen(reading)

    def report(self) -> dict[str, object]:
        """Its next report."""
        given: dict[str, object] = json.loads(self._reports.readline())
        return given

    def leave(self) -> int:
        """End its input, as the death of a supervisor does; gives its status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reports.close()
        return self.process.wait(20)


def gateway(data: Path) -> Entry:
    reading, writing = os.pipe()
    with bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072) as listener:
        config = GatewayConfig(
            data=data,
            listener_fd=listener.fileno(),
            status_fd=writing,
            settings=Settings(),
            dev=False,
            address=listener.getsockname(),
            hosts=1,
            shard_count=4,
            handover=True,
        )
        entry = Entry("broker.gateway", config, reading, [writing, listener.fileno()])
    os.close(writing)
    return entry


def host(data: Path) -> Entry:
    reading, writing = os.pipe()
    (data.parent / "app.py").write_text("from broker import Server\nclass Main(Server): ...\n")
    config = HostConfig(
        data=data,
        index=0,
        shards=(0, 1, 2, 3),
        shard_count=4,
        app=str(data.parent / "app.py"),
        status_fd=writing,
        settings=Settings(),
        dev=False,
    )
    entry = Entry("broker.host", config, reading, [writing])
    os.close(writing)
    return entry


def files_of(pid: int, folder: Path) -> list[str]:
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize(("start", "word"), [(gateway, "waiting"), (host, "loaded")])
def test_what_waits_has_nothing_open_and_ends_with_its_supervisor(data, start, word):
    """S32, S33: the one that serves is not disturbed."""
    before = sorted(data.rglob("*"))
    entry = start(data)
    assert entry.report()["event"] == word
    assert files_of(entry.process.pid, data) == []
    assert sorted(data.rglob("*")) == before
    assert entry.leave() == 0
    assert sorted(data.rglob("*")) == before


def test_a_successor_that_does_not_know_the_registrys_schema_says_so(data):
    """FAULTS 17, 37."""
    newer(registry_path(data), REGISTRY)
    entry = gateway(data)
    report = entry.report()
    assert report["event"] == "error" and str(registry_path(data)) in str(report["text"])
    assert entry.leave() == 1


def test_a_host_that_does_not_know_its_shards_schema_says_so(data):
    newer(shard_path(data, 2), SHARD)
    entry = host(data)
    report = entry.report()
    assert report["event"] == "error" and str(shard_path(data, 2)) in str(report["text"])
    assert entry.leave() == 1
