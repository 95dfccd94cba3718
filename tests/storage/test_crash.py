"""kill -9 while committing (S21, S22): every acknowledged commit is there, and every commit is whole."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
from itertools import pairwise

import pytest

from storage.registry import Registry
from storage.shards import Shard
from tests.tools import program

SHARD = """
import sys
from storage.shards import Shard, ShardBatch
shard = Shard(sys.argv[1], 0, durability=sys.argv[2])
number = int(shard.get("main/0", "number") or 0)
seen = shard.rows()
assert not number or [items for _, items in seen][-1] == b"row %d" % number * 500, seen
while True:
    number += 1
    batch = ShardBatch()
    batch.clear("main/cleared")
    batch.put("main/cleared", str(number), b"")
    for room in range(20):
        batch.put(f"main/{room}", "number", b"%d" % number)
        batch.put(f"main/{room}", "large", b"%d " % number * 2000)
    row = shard.next_row()
    shard.commit(batch, [(row, b"row %d" % number * 500)], row - 3)
    print(number, flush=True)
"""

REGISTRY = """
import sys
from storage.registry import Registry, RegistryBatch
registry = Registry(sys.argv[1], durability=sys.argv[2])
number = registry.next_number()
while True:
    batch = RegistryBatch()
    for each in range(number, number + 50):
        batch.open(each, "main", f"room{each % 7}", "id", "uri", 1.0, ("a", f"t{each % 3}"))
        batch.state(each, b"s")
        if each > 200:
            batch.forget(each - 200)
    number += 50
    registry.commit(batch)
    print(number - 1, flush=True)
"""


def run_and_kill(code, folder, durability, lines):
    """Let it commit until it has acknowledged `lines`, kill it, and give the last number it acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, durability], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    with process:
        try:
            last = [int(process.stdout.readline()) for _ in range(lines)][-1]
        finally:
            process.send_signal(signal.SIGKILL)
        # It may have gone on for a moment.
        for line in process.stdout.read().splitlines(keepends=True):
            if line.endswith("\n"):
                last = int(line)
        process.wait(10)
    return last


def integrity(path):
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@pytest.mark.parametrize("durability", ["os", "full"])
def test_a_shard_survives_kill_at_any_moment(tmp_path, durability):
    random_lines = random.Random(5)
    for _ in range(6):
        acknowledged = run_and_kill(SHARD, tmp_path, durability, random_lines.randint(1, 60))
        shard = Shard(tmp_path, 0, durability=durability)
        shard.check()
        numbers = {shard.get(f"main/{room}", "number") for room in range(20)}
        assert len(numbers) == 1, "a commit is there in part"
        (number,) = numbers
        assert number is not None
        # One more may have been committed, and not yet said so.
        assert acknowledged <= int(number) <= acknowledged + 1
        assert all(
            shard.get(f"main/{room}", "large") == number + (b" " + number) * 1999 + b" " for room in range(20)
        )
        assert shard.list("main/cleared") == [(number.decode(), b"")]
        # R1: the newest commit's row is there, and no row of one that is not.
        rows = shard.rows()
        newest = int(number)
        assert [items for _, items in rows] == [
            b"row %d" % each * 500 for each in range(newest - len(rows) + 1, newest + 1)
        ]
        assert 1 <= len(rows) <= 6
        assert all(before < after for (before, _), (after, _) in pairwise(rows))
        path = shard.path
        shard.close()
        integrity(path)


def test_the_registry_survives_kill_at_any_moment(tmp_path):
    random_lines = random.Random(6)
    former = 0
    for _ in range(6):
        acknowledged = run_and_kill(REGISTRY, tmp_path, "os", random_lines.randint(1, 60))
        registry = Registry(tmp_path, durability="os")
        registry.check()
        rows = list(registry.surviving())
        highest = registry.next_number() - 1
        assert highest in (acknowledged, acknowledged + 50), "numbers are given out twice"
        assert highest > former
        former = highest
        assert [row.number for row in rows] == list(range(max(1, highest - 199), highest + 1))
        assert all(row.state == b"s" and row.tags == ("a", f"t{row.number % 3}") for row in rows)
        stored = registry._file.read("SELECT number FROM tags ORDER BY number")
        assert [number for (number,) in stored] == [row.number for row in rows for _ in range(2)]
        path = registry.path
        registry.close()
        integrity(path)


FAILING = """
import sys
from storage.errors import CommitUnknown
from storage.shards import Shard, ShardBatch
shard = Shard(sys.argv[1], 0, durability="full")
number = int(shard.get("main/0", "number") or 0)
first = None
while first is None or number < first + 3:
    number += 1
    batch = ShardBatch()
    for room in range(20):
        batch.put(f"main/{room}", "number", b"%d" % number)
    row = shard.next_row()
    try:
        shard.commit(batch, [(row, b"%d" % number)], row - 2)
    except CommitUnknown:
        first = first or number
        print("unknown", number, flush=True)
    else:
        print("committed", number, flush=True)
"""


def test_after_a_failed_fsync_nothing_is_committed_and_the_next_process_finds_a_whole_state(tmp_path):
    """S36: the row of the failed commit may be there, or not; what was tried after it is not."""
    strace = program("strace")
    for when in (8, 9, 12, 15):
        shard = Shard(tmp_path, 0, durability="full")
        before = int(shard.get("main/0", "number") or 0)
        shard.close()
        inject = f"inject=fdatasync:error=EIO:when={when}"
        done = subprocess.run(
            [
                *(strace, "-f", "-o", os.devnull, "-e", "trace=fdatasync", "-e", inject),
                *(sys.executable, "-c", FAILING, tmp_path),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        said = [line.split() for line in done.stdout.splitlines()]
        failed = [int(number) for word, number in said if word == "unknown"]
        committed = [int(number) for word, number in said if word == "committed"]
        assert len(failed) == 4
        assert committed == list(range(before + 1, failed[0]))
        lock = tmp_path / "shards" / "0.db.lock"
        assert "SQLITE_IOERR" in lock.read_text()
        shard = Shard(tmp_path, 0, durability="full")
        assert not lock.stat().st_size, "it was not checked"
        (number,) = {shard.get(f"main/{room}", "number") for room in range(20)}
        assert number is not None
        assert int(number) in (failed[0] - 1, failed[0])
        # The outbox tells which: its newest row is that of the newest commit.
        assert shard.rows()[-1][1] == number
        shard.close()
