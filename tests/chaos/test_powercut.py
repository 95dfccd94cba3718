"""The power-cut model: reading strace's log, rebuilding files, and a sample of the real thing (S21)."""

import random

import pytest

from tests.chaos.powercut import Trace, parse, rebuild, record, violations
from tests.tools import program

FOLDER = "/d/shards"


def quoted(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def write(thread, name, data, offset, end=") = 9"):
    return f'{thread} pwrite64(3<{quoted(f"{FOLDER}/{name}")}>, "{quoted(data)}", {len(data)}, {offset}{end}'


def sync(thread, name, end=") = 0"):
    return f"{thread} fdatasync(3<{quoted(f'{FOLDER}/{name}')}>{end}"


def say(thread, text):
    return f'{thread} sendto(6<UNIX-STREAM:[1->2]>, "{quoted(text)}", {len(text)}, 0, NULL, 0) = {len(text)}'


def files(trace: Trace, cut: int, keep: float) -> dict[str, bytes]:
    found = rebuild(trace, trace.cuts[cut], random.Random(1), keep)
    return {path.removeprefix(f"{FOLDER}/"): data for path, data in found.items()}


def test_only_what_was_synchronised_is_certain():
    lines = [
        write(1, "0.db-wal", "abc", 0),
        say(1, "ack r 1;"),
        sync(1, "0.db-wal"),
        write(1, "0.db-wal", "def", 3),
        say(1, "..ack r 2;ack s 1;"),
    ]
    trace = parse(lines, {f"{FOLDER}/0.db": b"base"}, FOLDER)
    assert [cut.said for cut in trace.cuts] == [{"r": 1}, {"r": 2, "s": 1}]
    assert files(trace, 0, 0.0) == {"0.db": b"base"}
    assert files(trace, 0, 1.0) == {"0.db": b"base", "0.db-wal": b"abc"}
    assert files(trace, 1, 0.0) == {"0.db": b"base", "0.db-wal": b"abc"}
    assert files(trace, 1, 1.0) == {"0.db": b"base", "0.db-wal": b"abcdef"}


def test_a_synchronisation_covers_what_was_written_when_it_began_and_counts_when_it_has_ended():
    lines = [
        write(1, "0.db-wal", "abc", 0),
        sync(1, "0.db-wal", " <unfinished ...>"),
        write(2, "0.db-wal", "def", 3, " <unfinished ...>"),
        say(3, "ack r 1;"),
        "1 <... fdatasync resumed>) = 0",
        say(3, "ack r 2;"),
    ]
    trace = parse(lines, {}, FOLDER)
    assert files(trace, 0, 0.0) == {}
    assert files(trace, 1, 0.0) == {"0.db-wal": b"abc"}


def test_one_that_fails_or_is_of_another_file_covers_nothing():
    lines = [
        write(1, "0.db-wal", "abc", 0),
        sync(1, "0.db-wal", ") = -1 EIO (Input/output error) (INJECTED)"),
        sync(1, "1.db-wal"),
        say(1, "ack r 1;"),
    ]
    assert files(parse(lines, {}, FOLDER), 0, 0.0) == {}


def test_holes_are_zeros_and_a_cut_off_file_is_short():
    lines = [
        write(1, "0.db", "xyz", 4),
        f"1 ftruncate(3<{quoted(f'{FOLDER}/0.db')}>, 5) = 0",
        sync(1, "0.db"),
        say(1, "ack r 1;"),
    ]
    assert files(parse(lines, {}, FOLDER), 0, 0.0) == {"0.db": b"\0\0\0\0x"}


def test_other_files_shared_memory_and_silence_are_none_of_it():
    elsewhere = quoted("/d/other.db")
    lines = [
        f'1 pwrite64(3<{elsewhere}>, "\\x61", 1, 0) = 1',
        write(1, "0.db-shm", "abc", 0),
        say(1, "nothing of note"),
    ]
    trace = parse(lines, {}, FOLDER)
    assert (trace.operations, trace.cuts) == ([], [])


@pytest.mark.e2e
def test_what_a_host_has_said_survives_a_power_cut_if_durability_is_full(tmp_path):
    program("strace")
    trace = record(tmp_path, "full", messages=30)
    assert len(trace.cuts) >= 5
    assert violations(trace, tmp_path, seed=1, cuts=30) == []


@pytest.mark.e2e
def test_the_model_sees_that_durability_os_promises_less(tmp_path):
    program("strace")
    trace = record(tmp_path, "os", messages=30)
    wrong = violations(trace, tmp_path, seed=1, cuts=30)
    assert len(wrong) >= 10
    # What was written is in the kernel: had the power stayed, all would be there.
    assert not any("100% of what" in text for text in wrong)
