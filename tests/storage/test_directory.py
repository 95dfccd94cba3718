"""The data directory (S39)."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys

import pytest

from storage.directory import (
    FORMAT,
    SHARD_COUNT_DEFAULT,
    SHARD_COUNT_MAX,
    SOCKET_PATH_BYTES_MAX,
    DataDirectory,
    Holder,
    read_holder,
    read_shard_count,
    read_token,
    socket_path,
)
from storage.errors import DatabaseDamaged, DataDirectoryError, DataDirectoryInUse, SchemaTooNew
from storage.registry import Registry, registry_path
from storage.shards import Shard, shard_path


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.mark.parametrize("mask", [0, 0o777])
def test_it_is_made_private_with_its_parents_whatever_the_umask(tmp_path, mask):
    path = tmp_path / "a" / "b" / "data"
    before = os.umask(mask)
    try:
        directory = DataDirectory(path)
    finally:
        os.umask(before)
    for each in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
    assert modes(path) == dict.fromkeys(["broker.lock", "meta.json", "token"], 0o600)
    directory.close()


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with DataDirectory(".broker") as directory:
        assert directory.path == tmp_path / ".broker"


def test_the_number_of_shards_is_fixed_when_it_is_made(tmp_path):
    with DataDirectory(tmp_path / "a") as directory:
        assert directory.shard_count == SHARD_COUNT_DEFAULT == read_shard_count(tmp_path / "a")
    with DataDirectory(tmp_path / "b", shard_count=7) as directory:
        assert directory.shard_count == 7
    with DataDirectory(tmp_path / "b", shard_count=2) as directory:
        assert directory.shard_count == 7


def test_the_number_of_shards_below_at_and_above_its_limits(tmp_path):
    for count in (1, 2, SHARD_COUNT_MAX - 1, SHARD_COUNT_MAX):
        DataDirectory(tmp_path / str(count), shard_count=count).close()
    for count in (0, SHARD_COUNT_MAX + 1):
        with pytest.raises(ValueError, match="shard_count"):
            DataDirectory(tmp_path / str(count), shard_count=count)
        assert not (tmp_path / str(count)).exists()


def test_the_token_is_made_once_and_is_long(tmp_path):
    with DataDirectory(tmp_path / "a") as directory:
        token = directory.token
    with DataDirectory(tmp_path / "a") as directory:
        assert directory.token == token == read_token(tmp_path / "a")
    assert len(token) >= 43
    assert token.isascii()
    with DataDirectory(tmp_path / "b") as directory:
        assert directory.token != token


def test_a_second_start_is_told_who_has_it(tmp_path):
    with DataDirectory(tmp_path / "a") as directory:
        directory.announce("127.0.0.1", 1999)
        with pytest.raises(DataDirectoryInUse) as caught:
            DataDirectory(tmp_path / "a")
        assert caught.value.holder == os.getpid()
        assert f"process {os.getpid()}" in str(caught.value)
        assert "--data" in str(caught.value)
        assert read_holder(tmp_path / "a") == Holder(os.getpid(), ("127.0.0.1", 1999))
    assert read_holder(tmp_path / "a") is None
    DataDirectory(tmp_path / "a").close()


def test_a_holder_that_was_killed_holds_nothing(tmp_path):
    code = (
        "import sys, time\n"
        "from storage.directory import DataDirectory\n"
        "directory = DataDirectory(sys.argv[1])\n"
        "directory.announce('127.0.0.1', 5)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            assert read_holder(tmp_path / "a") == Holder(process.pid, ("127.0.0.1", 5))
            with pytest.raises(DataDirectoryInUse, match=f"process {process.pid}"):
                DataDirectory(tmp_path / "a")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(10)
    assert read_holder(tmp_path / "a") is None
    DataDirectory(tmp_path / "a").close()


def test_the_lock_is_not_inherited_by_a_program_that_is_started(tmp_path):
    directory = DataDirectory(tmp_path / "a")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with child:
        directory.close()
        DataDirectory(tmp_path / "a").close()
        child.communicate(b"\n", timeout=30)


def test_asking_for_the_holder_disturbs_nobody(tmp_path):
    assert read_holder(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    assert read_holder(tmp_path / "file") is None
    DataDirectory(tmp_path / "a").close()
    for _ in range(50):
        assert read_holder(tmp_path / "a") is None
        DataDirectory(tmp_path / "a").close()


def test_a_lock_that_names_nobody_is_an_error(tmp_path):
    directory = DataDirectory(tmp_path / "a")
    (tmp_path / "a" / "broker.lock").write_bytes(b"")
    with pytest.raises(DataDirectoryError, match="does not say by whom"):
        read_holder(tmp_path / "a")
    with pytest.raises(DataDirectoryInUse, match="another process"):
        DataDirectory(tmp_path / "a")
    directory.close()


def test_a_directory_of_somebody_elses_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    os.chmod(tmp_path, 0o755)
    with pytest.raises(DataDirectoryError, match=r"thesis\.tex"):
        DataDirectory(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_an_empty_directory_is_taken_and_made_private(tmp_path):
    os.chmod(tmp_path, 0o755)
    DataDirectory(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_start_that_was_cut_short_is_finished_by_the_next(tmp_path):
    for leftovers in (
        ["broker.lock"],
        ["broker.lock", "token.new"],
        ["broker.lock", "token", "meta.json.new"],
    ):
        folder = tmp_path / "-".join(leftovers)
        folder.mkdir()
        for name in leftovers:
            (folder / name).write_bytes(b"")
        with DataDirectory(folder) as directory:
            assert len(directory.token) >= 43
        assert sorted(os.listdir(folder)) == ["broker.lock", "meta.json", "token"]


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataDirectoryError) as caught:
            DataDirectory(path)
        assert "--data" in caught.value.remedy
    assert (tmp_path / "file").read_text() == "x"


def test_a_place_that_the_system_refuses():
    with pytest.raises(DataDirectoryError) as caught:
        DataDirectory("/proc/self/broker")
    assert "/proc/self/broker" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "shard_count": 0}'])
def test_damaged_meta_is_named_and_releases_the_lock(tmp_path, content):
    DataDirectory(tmp_path).close()
    (tmp_path / "meta.json").write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataDirectoryError, match=r"meta\.json"):
            DataDirectory(tmp_path)
    assert (tmp_path / "meta.json").read_bytes() == content


def test_a_newer_layout_is_refused_with_both_numbers(tmp_path):
    DataDirectory(tmp_path).close()
    content = json.dumps({"format": FORMAT + 1, "shard_count": 4})
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(SchemaTooNew) as caught:
        DataDirectory(tmp_path)
    assert (caught.value.found, caught.value.known) == (FORMAT + 1, FORMAT)
    assert (tmp_path / "meta.json").read_text() == content


def test_a_newer_or_damaged_database_stops_the_start(tmp_path):
    """Before anything is started, and before the file is touched."""
    DataDirectory(tmp_path).close()
    Registry(tmp_path).close()
    Shard(tmp_path, 3, durability="os").close()
    for path in (registry_path(tmp_path), shard_path(tmp_path, 3)):
        DataDirectory(tmp_path).close()
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
        before = path.read_bytes()
        with pytest.raises(SchemaTooNew) as caught:
            DataDirectory(tmp_path)
        assert caught.value.path == str(path)
        assert path.read_bytes() == before
        path.write_bytes(b"")
        with pytest.raises(DatabaseDamaged, match="empty"):
            DataDirectory(tmp_path)
        path.unlink()


def test_socket_paths_below_at_and_above_their_limit():
    """Source: unix(7)."""
    tail = len("/gateway.sock")
    for size in (SOCKET_PATH_BYTES_MAX - 1, SOCKET_PATH_BYTES_MAX):
        path = "/" + "d" * (size - tail - 1)
        assert len(os.fsencode(socket_path(path))) == size
    with pytest.raises(DataDirectoryError, match="shorter --data") as caught:
        socket_path("/" + "d" * (SOCKET_PATH_BYTES_MAX + 1 - tail - 1))
    assert "108 bytes" in str(caught.value)
    with pytest.raises(DataDirectoryError):
        socket_path("/" + "é" * 50)


def test_what_the_reserve_of_a_path_says_the_system_agrees_with(tmp_path):
    import socket

    folder = tmp_path / (
        "d" * (SOCKET_PATH_BYTES_MAX - len(os.fsencode(tmp_path)) - 1 - len("/gateway.sock"))
    )
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(socket_path(folder)))
    listener.close()


def test_closing_twice_does_no_harm(tmp_path):
    directory = DataDirectory(tmp_path)
    directory.close()
    with DataDirectory(tmp_path):
        directory.close()
        assert read_holder(tmp_path) is not None
