"""Alarms in a shard: what is staged is there after the commit, in the order of due times (S29)."""

from pathlib import Path

import pytest

from storage.alarms import ALARM_NAME_BYTES_MAX, BEFORE_ALL, AlarmRow, AlarmTable, alarm_name_bytes
from storage.crons import CronRow, read_crons
from storage.errors import StorageLimitError, ValueEncodingError
from storage.shards import Shard, ShardBatch

FAR = 1 << 60


@pytest.fixture
def shard(tmp_path: Path):
    shard = Shard(tmp_path, 0, durability="os", reserve_bytes=0)
    yield shard
    shard.close()


def row(name: str, number: int, due_ms: int, **more) -> AlarmRow:
    return AlarmRow(name, number, due_ms, due_ms, more.pop("payload", None), **more)


def stored(shard: Shard, room: str, *rows: AlarmRow, deleted: tuple[str, ...] = ()) -> AlarmTable:
    batch = ShardBatch()
    batch.alarming.stage(room, {each.name: each for each in rows} | dict.fromkeys(deleted))
    shard.commit(batch)
    return AlarmTable(shard.read)


def test_alarms_are_set_replaced_and_deleted(shard):
    first = row("a", 1, 50, payload=b"\x01", attempt=2, reason="no")
    table = stored(shard, "main/r", first, row("b", 2, 40))
    assert table.one("main/r", "a") == first
    assert table.one("main/r", "c") is None
    assert table.one("main/other", "a") is None
    assert list(table.of_room("main/r")) == ["a", "b"]
    stored(shard, "main/r", row("a", 3, 60), deleted=("b", "never was"))
    assert table.of_room("main/r") == {"a": row("a", 3, 60)}
    assert (table.count_of_room("main/r"), table.count_of_room("main/other")) == (1, 0)


def test_they_are_due_in_order_and_failed_ones_never(shard):
    stored(shard, "main/r", row("late", 1, FAR), row("old", 2, -FAR), row("dead", 3, 0, failed=1))
    table = stored(shard, "main/q", row("b", 5, 7), row("a", 4, 7))
    order = [each.number for each in table.due_after(BEFORE_ALL, 10)]
    assert order == [2, 4, 5, 1]
    assert [each.number for each in table.due_after((7, 4), 1)] == [5]
    assert [each.number for each in table.due_after((7, 5), 10)] == [1]
    assert table.due_after((FAR, 1), 10) == []
    assert [each.name for each in table.due_of_room("main/r", 10)] == ["old", "late"]
    assert [each.name for each in table.due_of_room("main/r", 1)] == ["old"]
    assert table.counts() == (4, 1)


def test_clearing_a_room_takes_its_alarms_and_what_was_staged_before(shard):
    """S27: and nothing of other rooms, or staged after."""
    stored(shard, "main/r", row("old", 1, 1))
    table = stored(shard, "main/q", row("other", 2, 1))
    batch = ShardBatch()
    batch.alarming.stage("main/r", {"before": row("before", 3, 1)})
    batch.clear("main/r")
    batch.alarming.stage("main/r", {"after": row("after", 4, 1)})
    shard.commit(batch)
    assert list(table.of_room("main/r")) == ["after"]
    assert list(table.of_room("main/q")) == ["other"]


def test_a_batch_knows_whether_there_is_anything_to_write():
    batch = ShardBatch()
    batch.alarming.stage("main/r", {})
    assert not ShardBatch()
    batch.crons["a"] = CronRow("a", "* * * * *", 1)
    assert batch


def test_ticks_are_kept_by_name(shard):
    """S31."""
    for last_ms in (5, 7):
        batch = ShardBatch()
        batch.crons["a"] = CronRow("a", "* * * * * UTC", last_ms)
        shard.commit(batch)
    assert read_crons(shard.read) == {"a": CronRow("a", "* * * * * UTC", 7)}


def test_names_have_a_limit():
    for name in ("n" * ALARM_NAME_BYTES_MAX, "ä" * (ALARM_NAME_BYTES_MAX // 2), "n"):
        assert alarm_name_bytes(name) == len(name.encode())
    with pytest.raises(StorageLimitError, match=r"257 is over the limit of 256\. Use a shorter one"):
        alarm_name_bytes("n" * (ALARM_NAME_BYTES_MAX + 1))
    with pytest.raises(ValueError, match="not empty"):
        alarm_name_bytes("")
    with pytest.raises(TypeError, match="is a str, not int: 5"):
        alarm_name_bytes(5)  # type: ignore[arg-type]
    with pytest.raises(ValueEncodingError, match="lone surrogate"):
        alarm_name_bytes("\ud800")
