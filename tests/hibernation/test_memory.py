"""When freed memory is given back: after a burst, once it is quiet, and once only."""

from hibernation.memory import BURST, QUIET, Trimmer


def test_gives_back_once_after_a_burst() -> None:
    trimmer = Trimmer()
    assert not trimmer.each_second(0)
    assert not trimmer.each_second(BURST)  # the burst itself is no quiet second
    assert trimmer.each_second(BURST + QUIET)
    assert not trimmer.each_second(BURST + QUIET)
    assert not trimmer.each_second(2 * BURST + QUIET)
    assert trimmer.each_second(2 * BURST + QUIET)


def test_waits_for_quiet() -> None:
    trimmer = Trimmer()
    work = 0
    for _ in range(10):
        work += QUIET + 1 + BURST
        assert not trimmer.each_second(work)
    assert trimmer.each_second(work + QUIET)


def test_leaves_small_bursts_alone() -> None:
    trimmer = Trimmer()
    assert not trimmer.each_second(BURST - 1)
    assert not trimmer.each_second(BURST - 1)
