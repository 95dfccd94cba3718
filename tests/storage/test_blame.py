"""Suspects, dead letters and quarantine in a shard: what is staged is there after the commit."""

from dataclasses import replace
from pathlib import Path

import pytest

from storage.blame import BlameTables, Letter, Quarantined
from storage.errors import GenerationPassed
from storage.shards import Shard, ShardBatch

LETTER = Letter(None, "main/r", 5, 100, b"\x00event", 3, "it died", 12.5)
SUSPECT = (5, 100, 2, 1, 1, 12.5, "it died", 7)


@pytest.fixture
def shard(tmp_path: Path):
    shard = Shard(tmp_path, 0, durability="os", reserve_bytes=0)
    yield shard
    shard.close()


def test_suspects_are_kept_replaced_and_forgotten(shard):
    tables = BlameTables(shard)
    batch = ShardBatch()
    batch.blaming.suspect([SUSPECT, (-1, 9, 0, 2, 0, 1.0, "", 0)])
    shard.commit(batch)
    assert sorted(tables.suspects()) == [(-1, 9, 0, 2, 0, 1.0, "", 0), SUSPECT]
    batch = ShardBatch()
    batch.blaming.suspect([(5, 100, 3, 1, 1, 13.0, "again", 7)])
    batch.blaming.acquit([(-1, 9), (1, 1)])
    shard.commit(batch)
    assert tables.suspects() == [(5, 100, 3, 1, 1, 13.0, "again", 7)]
    batch = ShardBatch()
    batch.blaming.acquit_all()
    shard.commit(batch)
    assert tables.suspects() == []


def test_dead_letters_are_kept_once_for_each_event(shard):
    """S23: a host may die between the letter's commit and the end of its event."""
    tables = BlameTables(shard)
    for letter in (LETTER, replace(LETTER, tries=4), replace(LETTER, what=200)):
        batch = ShardBatch()
        batch.blaming.bury(letter)
        shard.commit(batch)
    first, second = tables.letters(0, 10)
    assert (first, second) == (replace(LETTER, id=first.id), replace(LETTER, id=second.id, what=200))
    assert first.id is not None
    assert tables.letters(first.id, 10) == [second]
    assert tables.letters(0, 1) == [first]
    assert tables.letter(first.id) == first
    assert tables.count() == 2
    batch = ShardBatch()
    batch.blaming.remove(first.id)
    shard.commit(batch)
    assert tables.letter(first.id) is None
    assert tables.count() == 1


def test_quarantine_is_kept_and_ended(shard):
    """S4."""
    tables = BlameTables(shard)
    batch = ShardBatch()
    for room in ("main/a", "main/b"):
        batch.blaming.quarantine(Quarantined(room, "no", 1.0, 7))
    batch.blaming.quarantine(Quarantined("main/a", "still not", 2.0, 7))
    shard.commit(batch)
    assert {each.room: each.reason for each in tables.quarantined()} == {
        "main/a": "still not",
        "main/b": "no",
    }
    batch = ShardBatch()
    batch.blaming.release(["main/a", "main/c"])
    shard.commit(batch)
    assert [each.room for each in tables.quarantined()] == ["main/b"]


def test_they_outlive_the_host_and_an_older_generation_writes_none(tmp_path):
    """S5."""
    shard = Shard(tmp_path, 0, durability="full", reserve_bytes=0)
    batch = ShardBatch()
    batch.put("main/r", "key", b"value")
    batch.blaming.bury(LETTER)
    shard.commit(batch)
    shard.close()
    shard = Shard(tmp_path, 0, durability="full", reserve_bytes=0)
    assert BlameTables(shard).count() == 1
    shard.generation -= 1
    batch = ShardBatch()
    batch.blaming.bury(replace(LETTER, what=1))
    with pytest.raises(GenerationPassed):
        shard.commit(batch)
    assert BlameTables(shard).count() == 1
    shard.close()


def test_a_batch_knows_whether_there_is_anything_to_write():
    batch = ShardBatch()
    assert not batch
    assert not batch.blaming
    assert not batch
    batch.blaming.acquit_all()
    assert batch
