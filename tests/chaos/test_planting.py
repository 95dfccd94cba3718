"""Planted faults: each finds a place in an ordinary history and is found; a blind checker is noticed."""

from pathlib import Path

import pytest

from tests.chaos import planting
from tests.chaos.checker import KINDS, Report, check_room
from tests.chaos.history import Event, read_lines
from tests.chaos.planting import PLANTERS, plant, prove_checker

#: A room of an undisturbed run, as `history` writes it.
SAMPLE = Path(__file__).with_name("sample.jsonl")


@pytest.fixture(scope="module")
def sample() -> list[Event]:
    events, broken = read_lines(SAMPLE)
    assert events and not broken
    return events


def test_the_sample_is_clean(sample):
    assert check_room("r0", sample).findings == []


@pytest.mark.parametrize("fault", PLANTERS)
def test_each_planted_fault_is_found_under_its_name(fault, sample):
    before = list(sample)
    for seed in range(10):
        planted = plant(sample, fault, seed)
        assert planted is not None
        found = {finding.kind for finding in check_room("r0", planted).findings}
        assert PLANTERS[fault][0] in found, f"seed {seed}"
    assert sample == before, "the history itself was changed"


def test_every_kind_of_finding_can_be_planted_but_two():
    planted = {kind for kind, _ in PLANTERS.values()}
    # The one is about the run; the other is the opposite of a missing broadcast.
    assert set(KINDS) - planted == {"unfinished", "broadcast astray"}


def test_the_checker_is_proved_on_the_sample(sample):
    assert prove_checker([*sample, Event(1e9, "client", "", "", 0, "finish")], seed=1) == []


def test_a_checker_that_sees_nothing_is_noticed(sample, monkeypatch):
    monkeypatch.setattr(planting, "check_room", lambda *args, **kwargs: Report())
    assert len(prove_checker(sample, seed=1)) == len(PLANTERS)


def test_a_history_in_which_nothing_happened_proves_nothing():
    assert len(prove_checker([Event(1.0, "client", "r", "one", 0, "connect", {})], seed=1)) == len(PLANTERS)
