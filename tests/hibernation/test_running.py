"""The note of turns in progress: what a host leaves behind, however it ends (S23)."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import hibernation.running
from broker import DataDirectoryError
from hibernation import wire
from hibernation.running import (
    ASKING,
    BLOCK_BYTES,
    CLOSING,
    CONNECTING,
    OTHER,
    SLOTS_PER_BLOCK,
    STARTING,
    Left,
    Running,
    mark_of,
    mark_of_start,
    read_left,
    running_path,
)
from tests.e2e.broker_process import ROOT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return running_path(tmp_path, 0)


def test_what_is_in_progress_is_read_by_who_comes_next(path):
    running = Running(path, code=7)
    first, second, third = running.take(), running.take(), running.take()
    first[1] = 100
    first[0] = 1
    second[1] = -1
    second[0] = 2
    second[2] = 1
    third[1] = 5
    third[0] = 3
    third[0] = 0
    other = running.enter()
    assert running.others == 1
    left = read_left(path)
    assert set(left.marks) == {((1, 100), False), ((2, -1), True), ((OTHER, 0), True)}
    assert (left.clean, left.blocked, left.code) == (False, False, 7)
    running.leave(other)
    running.give_back(second)
    assert read_left(path).marks == (((1, 100), False),)
    assert running.others == 0


def test_it_outlives_kill(path):
    """Without a system call of the dying process: its pages are the kernel's."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom hibernation.running import Running\n"
        "running = Running(Path(sys.argv[1]))\nnote = running.take()\nnote[1] = 7\nnote[0] = 42\n"
        "running.blocked(True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_left(path) == Left((((42, 7), False),), blocked=True)


def test_a_host_that_is_told_to_end_leaves_nothing(path):
    """Nor does one that ends for its disk's sake: no turn has to do with that."""
    for end, clean in ((Running.close, True), (Running.absolve, False)):
        running = Running(path)
        note = running.take()
        note[0] = 1
        end(running)
        assert read_left(path) == Left(clean=clean)


def test_the_death_of_the_machine_is_nobodys_fault(path, monkeypatch):
    running = Running(path)
    running.take()[0] = 1
    monkeypatch.setattr(hibernation.running, "_boot_id", lambda: (1, 2))
    assert read_left(path) == Left(clean=True)


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 64, b"\0" * BLOCK_BYTES, b"x" * BLOCK_BYTES])
def test_a_file_that_is_none_says_nothing(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert read_left(path) == Left(clean=True)


def test_no_file_says_nothing(path):
    assert read_left(path) == Left(clean=True)


def test_it_is_private_and_made_anew(path):
    os.umask(0)
    try:
        first = Running(path)
        first.take()[0] = 1
        second = Running(path)  # the first one's pages are its own from now on
        first.take()[0] = 2
    finally:
        os.umask(0o022)
    assert read_left(path).marks == ()
    second.take()[0] = 3
    assert read_left(path).marks == (((3, 0), False),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_grows_with_the_turns_that_wait_at_once(path):
    running = Running(path)
    notes = [running.take() for _ in range(2 * SLOTS_PER_BLOCK + 1)]
    for number, note in enumerate(notes, start=1):
        note[0] = number
    assert path.stat().st_size == 3 * BLOCK_BYTES
    assert {who for (who, _), _ in read_left(path).marks} == set(range(1, len(notes) + 1))


def test_all_its_pages_have_room_on_disk(path):
    """Or else a write to one might be answered with SIGBUS."""
    Running(path)
    assert path.stat().st_blocks * 512 >= BLOCK_BYTES


def test_a_full_disk_is_told_at_the_start_and_costs_no_turn_later(path, monkeypatch):
    running = Running(path)
    held = [running.take() for _ in range(SLOTS_PER_BLOCK - 1)]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    extra = running.take()
    extra[0] = 5
    held[0][0] = 1
    marks = read_left(path).marks
    # There is company, and it is not known which: so nobody is alone.
    assert set(marks) == {((1, 0), False), ((OTHER, 0), True)}
    running.give_back(extra)
    assert read_left(path).marks == (((1, 0), False),)
    with pytest.raises(DataDirectoryError, match=r"No space left.*Free 64 KiB"):
        Running(path)


def test_marks_name_the_events_that_come_again():
    assert mark_of([wire.MESSAGE, "main/r", 1, 20, b"", None, 300, "x"]) == (20, 300)
    assert mark_of([wire.CONNECT, "main/r", 1, 20, b"", None, b""]) == (20, CONNECTING)
    assert mark_of([wire.CLOSE, "main/r", 1, 20, b"", None, 1000, "", True, "x"]) == (20, CLOSING)
    assert mark_of([wire.BEFORE, "main/r", 9, b""]) == (ASKING, 9)
    assert mark_of([wire.REQUEST, "main/r", 9, {}]) is None
    keys = [f"main/{number}" for number in range(10_000)]
    marks = {mark_of_start(key) for key in keys}
    assert len(marks) == len(keys)
    assert {who for who, _ in marks} == {STARTING}
    assert all(0 <= what < 1 << 63 for _, what in marks)
