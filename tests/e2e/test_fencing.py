"""A host that stops answering in the middle of a transaction, and answers again later, does no harm (S5).

It is stopped by SIGSTOP on entering a write to its shard, so that its transaction is open, and gets its
SIGCONT when its successor serves.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import DataDirectoryInUse
from storage.shards import Shard
from tests.e2e.broker_process import eventually, whole_lines
from tests.e2e.conftest import BrokerFactory
from tests.tracing import injected

pytestmark = pytest.mark.e2e

APP = """
from broker import Server


class Main(Server):
    async def on_message(self, message, sender):
        count = await self.room.storage.get("count", 0) + 1
        self.room.storage.put("count", count)
        sender.send(f"{count} {message}")
"""

WRITER = """
import sys
from storage.shards import Shard, ShardBatch
shard = Shard(sys.argv[1], 0, durability="full")
batch = ShardBatch()
batch.put("main/room", "who", b"first")
print("open", flush=True)
sys.stdin.readline()
shard.commit(batch)
print("committed", flush=True)
sys.stdin.readline()
"""


def state_of(pid: int) -> str:
    """The state of a process as proc(5) names it: R, S, T (stopped), …; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for_stop(log: Path) -> None:
    """Wait until the tracer says that the process is stopped, and not only stands at a call for a moment."""
    eventually(lambda: "--- stopped by SIGSTOP ---" in "".join(whole_lines(log)), "a process that is stopped")


def test_a_stopped_host_is_killed_before_its_successor_opens_its_shards(
    broker: BrokerFactory, tmp_path: Path
) -> None:
    site = broker(APP, hang_timeout=5)
    log = tmp_path / "calls"
    with site.connect("/party/room") as client, site.connect("/party/other") as other:
        client.timeout_seconds = other.timeout_seconds = 60
        client.send("a")
        assert client.receive() == "1 a"
        [stopped] = site.host_pids()
        with injected([stopped], "pwrite64", "signal=STOP:when=1", log=log):
            client.send("b")
            wait_for_stop(log)
        # Or it has been killed by now.
        eventually(lambda: state_of(stopped) in ("T", "", "Z"), "the stop to outlast its tracer")
        other.send("c")
        # Whenever there is a host that serves, it is the only one that lives.
        eventually(lambda: set(site.host_pids()) - {stopped} and site.stats()["ready"], "successor", 60)
        assert state_of(stopped) in ("", "Z"), "two hosts of one index"
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
        assert client.receive() == "2 b"
        assert other.receive() == "1 c"
        client.send("d")
        assert client.receive() == "3 d"
        assert site.stats()["closes"] == {}


def test_nobody_else_opens_a_shard_while_its_stopped_owner_lives(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir(exist_ok=True)
    Shard(tmp_path, 0, durability="full").close()
    owner = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        try:
            assert owner.stdin is not None and owner.stdout is not None
            assert owner.stdout.readline() == "open\n"
            log = tmp_path / "calls"
            with injected([owner.pid], "pwrite64", "signal=STOP:when=1", log=log):
                owner.stdin.write("go\n")
                owner.stdin.flush()
                wait_for_stop(log)
            eventually(lambda: state_of(owner.pid) == "T", "the stop to outlast its tracer")
            with pytest.raises(DataDirectoryInUse) as refused:
                Shard(tmp_path, 0, durability="full")
            assert refused.value.holder in (owner.pid, None)
            os.kill(owner.pid, signal.SIGCONT)
            assert owner.stdout.readline() == "committed\n"
        finally:
            owner.kill()
    successor = Shard(tmp_path, 0, durability="full")
    assert successor.get("main/room", "who") == b"first"
    successor.check()
    successor.close()
