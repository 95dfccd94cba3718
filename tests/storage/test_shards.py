"""Room storage (S5, S21, S27): a shard against a model, its limits, its generation."""

import os
import sqlite3
import stat
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import (
    CommitRefused,
    DataDirectoryInUse,
    GenerationPassed,
    StorageLimitError,
    ValueEncodingError,
)
from storage.shards import KEY_BYTES_MAX, Shard, ShardBatch, shard_path
from storage.values import VALUE_BYTES_MAX

DURABILITIES = ["full", "os"]


@pytest.fixture(params=DURABILITIES)
def shard(request, tmp_path):
    shard = Shard(tmp_path, 0, durability=request.param)
    yield shard
    shard.close()


def batch_of(**entries):
    batch = ShardBatch()
    for key, value in entries.items():
        batch.put("main/a", key, value)
    return batch


def test_what_is_put_is_got_listed_and_still_there_after_opening_again(tmp_path):
    shard = Shard(tmp_path, 3, durability="full")
    shard.commit(batch_of(b=b"2", a=b"1"))
    assert shard.get("main/a", "a") == b"1"
    assert shard.get("main/a", "none") is None
    assert shard.get("main/b", "a") is None
    shard.close()
    shard = Shard(tmp_path, 3, durability="full")
    assert shard.list("main/a") == [("a", b"1"), ("b", b"2")]
    shard.close()


def test_an_empty_batch_is_false_and_commits_nothing(shard):
    assert not ShardBatch()
    shard.commit(ShardBatch())
    batch = ShardBatch()
    batch.clear("main/a")
    assert batch


def test_get_many_keeps_the_order_and_leaves_out_the_missing(shard):
    shard.commit(batch_of(a=b"1", b=b"2", c=b"3"))
    assert list(shard.get_many("main/a", ["c", "x", "a", "c"]).items()) == [("c", b"3"), ("a", b"1")]
    assert shard.get_many("main/a", []) == {}


def test_clear_takes_what_is_stored_and_what_was_staged_before_it(shard):
    shard.commit(batch_of(a=b"1", b=b"2"))
    other = ShardBatch()
    other.put("main/other", "a", b"stays")
    shard.commit(other)
    batch = batch_of(c=b"3")
    batch.clear("main/a")
    batch.put("main/a", "d", b"4")
    shard.commit(batch)
    assert shard.list("main/a") == [("d", b"4")]
    assert shard.list("main/other") == [("a", b"stays")]


def test_many_rooms_many_keys_many_deletes_in_one_batch(shard):
    """Statements take rows in powers of two: every size up to three full ones comes out right."""
    for total in [1, 2, 3, 7, 127, 128, 129, 255, 257, 384, 400]:
        batch = ShardBatch()
        for i in range(total):
            batch.put(f"main/{i}", "k", b"%d" % i)
            batch.put("main/all", f"{i:04}", b"%d" % i)
        shard.commit(batch)
        assert [value for _, value in shard.list("main/all")] == [b"%d" % i for i in range(total)]
        assert all(shard.get(f"main/{i}", "k") == b"%d" % i for i in range(total))
        batch = ShardBatch()
        for i in range(total):
            batch.delete("main/all", f"{i:04}")
            batch.clear(f"main/{i}")
        shard.commit(batch)
        assert shard.list("main/all") == []
        assert not any(shard.get(f"main/{i}", "k") for i in range(total))


KEYS = st.text(alphabet="ab\0é\ud7ff\ue000\uffff\U00010000\U0010ffff%_'", max_size=3)
BOUND = st.none() | KEYS


@given(
    st.dictionaries(KEYS, st.binary(max_size=3), max_size=12),
    BOUND,
    BOUND,
    BOUND,
    BOUND,
    st.booleans(),
    st.none() | st.integers(0, 5),
)
@settings(max_examples=300)
def test_list_is_what_filtering_the_bytes_gives(
    shard_once, entries, start, after, end, prefix, reverse, limit
):
    shard = shard_once
    batch = ShardBatch()
    batch.clear("main/a")
    for key, value in entries.items():
        batch.put("main/a", key, value)
        batch.put("main/a2", key, b"another room")
    shard.commit(batch)
    wanted = [
        (key, value)
        for key, value in sorted(entries.items(), key=lambda entry: entry[0].encode(), reverse=reverse)
        if (start is None or key.encode() >= start.encode())
        and (after is None or key.encode() > after.encode())
        and (end is None or key.encode() < end.encode())
        and (prefix is None or key.encode().startswith(prefix.encode()))
    ]
    assert shard.list("main/a", start, after, end, prefix, reverse, limit) == wanted[:limit]


@pytest.mark.parametrize("prefix", ["\ud7ff", "\U0010ffff", "a\U0010ffff", "\uffff", "\0", "a"])
def test_prefixes_at_the_edges_of_the_code_points(shard, prefix):
    """There is no character between U+D7FF and U+E000, and none after U+10FFFF."""
    inside = [prefix, prefix + "\0", prefix + "x", prefix + "\U0010ffff" * 2]
    batch = ShardBatch()
    for key in [*inside, "a", "b", "\ue000", "", "\U00010000"]:
        batch.put("main/a", key, b"")
    shard.commit(batch)
    found = [key for key, _ in shard.list("main/a", prefix=prefix)]
    assert found == sorted({key for key in [*inside, "a"] if key.startswith(prefix)})


@pytest.fixture(scope="module")
def shard_once(tmp_path_factory):
    shard = Shard(tmp_path_factory.mktemp("shard"), 0, durability="os")
    yield shard
    shard.close()


ROOMS = st.sampled_from(["main/a", "main/b", "chat/a", "main/a/b"])
STEP = st.one_of(
    st.tuples(st.just("put"), ROOMS, KEYS, st.binary(max_size=5000)),
    st.tuples(st.just("delete"), ROOMS, KEYS),
    st.tuples(st.just("clear"), ROOMS),
    st.tuples(st.just("commit")),
)


@given(st.lists(STEP, max_size=40))
@settings(max_examples=150)
def test_batches_do_what_a_dict_does(shard_once, steps):
    """S27: in order, coalesced, and `clear` is atomic with what comes before and after it."""
    shard, batch = shard_once, ShardBatch()
    model: dict[tuple[str, str], bytes] = {}
    for room in ["main/a", "main/b", "chat/a", "main/a/b"]:
        batch.clear(room)
    for step in [*steps, ("commit",)]:
        if step[0] == "put":
            batch.put(step[1], step[2], step[3])
            model[step[1], step[2]] = step[3]
        elif step[0] == "delete":
            batch.delete(step[1], step[2])
            model.pop((step[1], step[2]), None)
        elif step[0] == "clear":
            batch.clear(step[1])
            model = {key: value for key, value in model.items() if key[0] != step[1]}
        else:
            shard.commit(batch)
            batch = ShardBatch()
            for room in ["main/a", "main/b", "chat/a", "main/a/b"]:
                stored = {(room, key): value for key, value in shard.list(room)}
                assert stored == {key: value for key, value in model.items() if key[0] == room}


@pytest.mark.parametrize("letter", ["k", "é"])
def test_keys_below_at_and_above_their_limit(shard, letter):
    fits = KEY_BYTES_MAX // len(letter.encode())
    for count in (fits - 1, fits):
        batch = ShardBatch()
        batch.put("main/a", letter * count, b"v")
        batch.delete("main/b", letter * count)
        shard.commit(batch)
        assert shard.get("main/a", letter * count) == b"v"
    for stage in (
        lambda batch, key: batch.put("main/a", key, b"v"),
        lambda batch, key: batch.delete("main/a", key),
    ):
        batch = ShardBatch()
        with pytest.raises(StorageLimitError) as caught:
            stage(batch, letter * fits + "x")
        assert (caught.value.given, caught.value.limit) == (KEY_BYTES_MAX + 1, KEY_BYTES_MAX)
        assert not batch
        assert batch.bytes == 0


def test_values_below_at_and_above_their_limit(shard):
    for size in (VALUE_BYTES_MAX - 1, VALUE_BYTES_MAX):
        shard.commit(batch_of(big=b"x" * size))
        assert shard.get("main/a", "big") == b"x" * size
    batch = ShardBatch()
    with pytest.raises(StorageLimitError):
        batch.put("main/a", "big", b"x" * (VALUE_BYTES_MAX + 1))
    assert not batch


def test_a_lone_surrogate_in_a_key_is_a_named_error_and_stages_nothing(shard):
    batch = ShardBatch()
    for stage in (lambda: batch.put("main/a", "\ud800", b""), lambda: batch.delete("main/a", "\ud800")):
        with pytest.raises(ValueEncodingError, match="surrogate"):
            stage()
    assert not batch
    for bound in ("start", "start_after", "end", "prefix"):
        with pytest.raises(ValueEncodingError, match="surrogate"):
            shard.list("main/a", **{bound: "\ud800"})


def test_bytes_counts_what_was_staged():
    batch = ShardBatch()
    batch.put("main/a", "ké", b"12345")
    assert batch.bytes == 8
    batch.delete("main/a", "k")
    assert batch.bytes == 9


def test_the_generation_rises_at_each_opening(tmp_path):
    """S5."""
    seen = []
    for _ in range(3):
        shard = Shard(tmp_path, 0, durability="os")
        seen.append(shard.generation)
        shard.close()
    assert seen == [1, 2, 3]
    other = Shard(tmp_path, 1, durability="os")
    assert other.generation == 1
    other.close()


def test_a_host_that_was_replaced_can_write_nothing(tmp_path):
    """S5: the generation is checked in the same transaction as the writes."""
    shard = Shard(tmp_path, 0, durability="full")
    shard.commit(batch_of(a=b"1"))
    successor = sqlite3.connect(shard.path, isolation_level=None)
    successor.execute("UPDATE generations SET generation = generation + 1")
    successor.close()
    with pytest.raises(GenerationPassed) as caught:
        shard.commit(batch_of(a=b"2", b=b"3"))
    assert (caught.value.own, caught.value.current) == (1, 2)
    assert shard.list("main/a") == [("a", b"1")]
    shard.close()


def test_a_second_opening_names_the_first(tmp_path):
    shard = Shard(tmp_path, 0, durability="os")
    with pytest.raises(DataDirectoryInUse) as caught:
        Shard(tmp_path, 0, durability="os")
    assert caught.value.holder == os.getpid()
    assert str(os.getpid()) in str(caught.value)
    shard.commit(batch_of(a=b"1"))
    shard.close()
    shard.close()
    again = Shard(tmp_path, 0, durability="os")
    assert again.generation == 2
    again.close()


@pytest.mark.parametrize("mask", [0, 0o777])
def test_modes_are_private_whatever_the_umask(tmp_path, mask):
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    before = os.umask(mask)
    try:
        shard = Shard(data, 0, durability="full")
        shard.commit(batch_of(a=b"1"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((data / "shards").stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (data / "shards").iterdir()}
    assert set(files) == {"0.db", "0.db-wal", "0.db-shm", "0.db.lock"}
    assert set(files.values()) == {0o600}
    shard.close()


def test_reading_holds_no_snapshot_that_would_keep_the_log_from_being_emptied(tmp_path):
    shard = Shard(tmp_path, 0, durability="os")
    shard.commit(batch_of(a=b"1", b=b"2"))
    shard.get("main/a", "a")
    shard.get_many("main/a", ["a", "b"])
    shard.list("main/a", limit=1)
    assert shard.wal_bytes > 0
    shard.checkpoint()
    assert shard.wal_bytes == 0
    shard.commit(batch_of(a=b"3"))
    assert shard.get("main/a", "a") == b"3"
    shard.close()


def test_os_shards_ask_for_a_checkpoint_and_do_it_themselves_at_last(tmp_path):
    shard = Shard(tmp_path, 0, durability="os")
    assert not shard.checkpoint_due
    asked = forced = False
    largest = 0
    for i in range(40):
        before = shard.wal_bytes
        shard.commit(batch_of(**{f"k{i % 3}": b"x" * 1_000_000}))
        asked |= shard.checkpoint_due
        forced |= shard.wal_bytes < before
        largest = max(largest, shard.wal_bytes)
    assert asked
    assert forced
    assert largest <= 20 * 1024 * 1024
    shard.checkpoint()
    assert not shard.checkpoint_due
    shard.close()


def test_full_shards_checkpoint_by_themselves(tmp_path):
    shard = Shard(tmp_path, 0, durability="full")
    for i in range(20):
        shard.commit(batch_of(**{f"k{i % 3}": b"x" * 1_000_000}))
    assert not shard.checkpoint_due
    assert shard.wal_bytes <= 8 * 1024 * 1024
    shard.close()


def synchronous(shard):
    return shard._file._writer.execute("PRAGMA synchronous").fetchone()[0]


def test_durability_is_the_pragma_that_it_should_be(tmp_path):
    """S21. Source: sqlite.org/pragma.html#pragma_synchronous, 1 is NORMAL and 2 is FULL."""
    full, careless = Shard(tmp_path, 0, durability="full"), Shard(tmp_path, 1, durability="os")
    assert (synchronous(full), synchronous(careless)) == (2, 1)
    full.close()
    careless.close()


@given(st.text(min_size=1, max_size=512))
@settings(max_examples=30)
def test_no_room_or_key_ever_names_a_file(tmp_path_factory, name):
    """Whatever text can be a room id is told apart from every other, and stays in its file."""
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return
    folder = tmp_path_factory.mktemp("names")
    shard = Shard(folder, 0, durability="os")
    batch = ShardBatch()
    batch.put(f"main/{name}", "k", b"this")
    for other in {name.upper(), name.lower(), name + " ", "../" + name, name + "\0"} - {name}:
        batch.put(f"main/{other}", "k", b"other")
    shard.commit(batch)
    assert shard.get(f"main/{name}", "k") == b"this"
    shard.close()
    assert {path.name for path in folder.iterdir()} == {"shards"}
    assert {path.name for path in (folder / "shards").iterdir()} <= {"0.db", "0.db.lock"}


def test_shard_paths_are_numbers(tmp_path):
    assert shard_path(tmp_path, 11) == tmp_path / "shards" / "11.db"
    assert set(shard_path("d", 11).name) <= set(string.digits + ".db")


# The outbox


def test_rows_are_in_the_outbox_with_their_commit_and_leave_it_with_another(shard):
    """S22, R1: in one transaction with the entries, and in the order of the commits."""
    first, second, third = (shard.next_row() for _ in range(3))
    shard.commit(batch_of(a=b"1"), [(first, b"one"), (second, b"two")])
    assert shard.rows() == [(first, b"one"), (second, b"two")]
    shard.commit(batch_of(a=b"2"), [(third, b"three")], first)
    assert shard.rows() == [(second, b"two"), (third, b"three")]
    shard.commit(ShardBatch(), (), third)
    assert (shard.rows(), shard.get("main/a", "a")) == ([], b"2")


def test_row_numbers_rise_over_every_opening_of_the_shard(tmp_path):
    """R2: whatever was taken out in between."""
    newest = 0
    for generation in range(1, 4):
        shard = Shard(tmp_path, 0, durability="os")
        assert shard.generation == generation
        for _ in range(3):
            number = shard.next_row()
            assert (number > newest, number >> 32) == (True, generation)
            newest = number
            shard.commit(ShardBatch(), [(number, b"")], number - 1)
        shard.close()
    shard = Shard(tmp_path, 0, durability="os")
    assert shard.rows() == [(newest, b"")]
    shard.close()


def test_a_commit_that_fails_leaves_neither_entries_nor_rows(shard):
    """R1: one is not on disk without the other."""
    number = shard.next_row()
    shard.commit(batch_of(a=b"1"), [(number, b"one")])
    with pytest.raises(sqlite3.IntegrityError):
        shard.commit(batch_of(a=b"2"), [(number, b"again")], number - 1)
    assert (shard.rows(), shard.get("main/a", "a")) == ([(number, b"one")], b"1")


def test_rows_of_a_passed_generation_are_refused(tmp_path):
    """S5: a host that was thought dead says nothing any more."""
    shard = Shard(tmp_path, 0, durability="full")
    with shard._file.transaction() as writer:
        writer.execute("UPDATE generations SET generation = generation + 1")
    with pytest.raises(GenerationPassed):
        shard.commit(ShardBatch(), [(shard.next_row(), b"late")])
    assert shard.rows() == []
    shard.close()


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_row_as_large_as_the_largest_turn(tmp_path, durability):
    """S20: turn_bytes_max goes up to 256 MiB, and SQLite takes a thousand million bytes at once."""
    shard = Shard(tmp_path, 0, durability=durability)
    size = 256 * 1024 * 1024 + 65_536
    number = shard.next_row()
    shard.commit(batch_of(a=b"1"), [(number, bytes(size))])
    ((found, items),) = shard.rows()
    assert (found, len(items)) == (number, size)
    del items
    shard.commit(ShardBatch(), (), number)
    assert shard.rows() == []
    shard.close()


def test_a_shard_opens_and_counts_generations_on_a_disk_without_reserve(tmp_path):
    """S36: a host comes up on a full disk, to serve the rooms that only read."""
    Shard(tmp_path, 0, durability="full").close()
    shard = Shard(tmp_path, 0, durability="full", reserve_bytes=1 << 60)
    assert shard.generation == 2
    with pytest.raises(CommitRefused):
        shard.commit(batch_of(a=b"1"))
    assert shard.get("main/a", "a") is None
    shard.close()
