"""Rooms that do not start, as the gateway knows them (S4)."""

from broker.gateway.quarantine import Quarantine


def test_a_host_puts_rooms_in_and_takes_them_out():
    quarantine = Quarantine()
    assert not quarantine
    quarantine.put("main/a", "no database", 5.0, 2)
    quarantine.put("main/b", "no", 6.0, 3)
    assert ("main/a" in quarantine, "main/c" in quarantine, len(quarantine)) == (True, False, 2)
    found = quarantine.get("main/a")
    assert found is not None
    assert (found.reason, found.since) == ("no database", 5.0)
    quarantine.put("main/a", None, 0.0, 2)
    quarantine.put("main/c", None, 0.0, 2)  # released before this gateway came
    assert quarantine.get("main/a") is None
    assert len(quarantine) == 1


def test_another_host_begins_with_none():
    quarantine = Quarantine()
    for shard in range(4):
        quarantine.put(f"main/{shard}", "no", 1.0, shard)
    quarantine.forget([1, 3])
    assert [shard for shard in range(4) if f"main/{shard}" in quarantine] == [0, 2]
