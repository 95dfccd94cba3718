"""A sample of the sweep: death at a system call costs no client anything (S22, S34)."""

import pytest

from tests.chaos.planting import prove_checker
from tests.chaos.sweep import Point, Sweep
from tests.tools import program

pytestmark = pytest.mark.e2e

#: Some of what `python -m tests.chaos sweep` tries: near the begin and in the middle of each kind of call.
POINTS = {
    "host": {"pwrite64": (1, 6), "fdatasync": (1, 2, 4), "sendto": (1, 3, 6)},
    "gateway": {
        "recvfrom": (4, 17),
        "sendto": (2, 5, 14),
        "pwrite64": (1, 5),
        "epoll_ctl": (3,),
        "accept4": (2,),
        "sendmsg": (1, 3),
    },
    "keeper": {"recvmsg": (1, 3), "sendmsg": (1, 2), "close": (1,)},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    program("strace")
    with Sweep(tmp_path_factory.mktemp("sweep")) as sweep:
        yield sweep


@pytest.fixture(scope="module")
def events():
    """What every test of this module adds its history to."""
    return []


@pytest.mark.parametrize("process", POINTS)
def test_a_death_at_a_system_call_is_not_noticed(sweep, events, process):
    kills = 0
    for call, numbers in POINTS[process].items():
        for number in numbers:
            result = sweep.run(Point(process, call, number))
            assert result is not None, f"there is no {process}"
            assert not result.report.findings, "\n".join(
                [str(result.point), *map(str, result.report.findings)]
            )
            kills += result.killed
            events += result.events
    assert kills >= 3


def test_the_checker_finds_planted_faults_in_what_was_recorded(events):
    # In all of it: the scenarios of one process alone are too few to hold a place for each kind of fault.
    if not events:
        pytest.skip("the tests before did not run")
    assert prove_checker(events, seed=1) == []
